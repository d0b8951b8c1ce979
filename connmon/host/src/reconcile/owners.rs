//! Finds the process that holds a socket, through `/proc/<pid>/fd`, and the
//! container in a cgroup path.
//!
//! The walker asks for the owners of listeners and keeps them in an
//! [`OwnerCache`]; `list` and `top` ask for those of all connections by [`find`].

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirEntry};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use connmon_core::event::Owner;

use super::clock::cpu_time;
use super::netns::{MAX_THREADS, Roots, link_inode};

/// CPU time that one walk spends on searches, enough for well over a million
/// descriptors. Any user can make more of them, and sockets that no process
/// shows (in SCM_RIGHTS messages).
const SEARCH: Duration = Duration::from_secs(2);
/// Descriptors between two readings of the clock: about 100 µs.
const LOOKS: usize = 64;
/// Cached inodes: more than any host listens on.
const MAX_ENTRIES: usize = 65_536;
/// Sockets remembered by one scan beside those asked for.
const MAX_REMEMBERED: usize = 65_536;
/// Further scans in one walk.
const MAX_RESCANS: u32 = 4;
/// Walks an unused entry survives.
const KEPT_WALKS: u64 = 3;
/// Most walks between two searches for a socket that no readable process holds.
const MAX_PAUSE_WALKS: u64 = 64;

/// Owners of listening sockets, found once and checked in each walk.
///
/// The lowest pid that holds a socket is its owner, as long as there is time to
/// read all. A socket that is not found has pid 0, and is looked for at ever
/// longer intervals.
#[derive(Debug, Default)]
pub struct OwnerCache {
    entries: HashMap<u32, Entry>,
    /// Counts walks, for ageing and for the intervals.
    walk: u64,
    scan: Option<Scan>,
    rescans: u32,
    /// CPU time that is left for this walk's searches.
    left: Duration,
    /// Once it is used up, another walk resumes.
    pauses: bool,
    /// A search paused before everything was found.
    waits: bool,
    /// The pid from which the next scan starts.
    from: u32,
}

#[derive(Debug)]
struct Entry {
    holder: Option<Holder>,
    comm: [u8; 16],
    last_walk: u64,
    /// Walks between searches, and the walk of the next one.
    pause: u64,
    next_search: u64,
    checked: u64,
}

/// A descriptor that was a socket when it was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holder {
    pid: u32,
    /// A thread that shows it: the first one, unless that has ended.
    tid: u32,
    fd: u32,
}

impl Holder {
    fn owner(self, comm: [u8; 16]) -> Owner {
        Owner {
            pid: self.pid,
            comm,
            cgroup: 0,
        }
    }
}

impl OwnerCache {
    /// A walk starts. Entries are checked when asked for, and dropped once
    /// `KEPT_WALKS` walks did not ask for them. Searches end after `SEARCH` of
    /// CPU time in all, or pause after `pause` until [`OwnerCache::resume`].
    pub fn begin_walk(&mut self, pause: Option<Duration>) {
        self.walk += 1;
        self.scan = None;
        self.rescans = 0;
        self.left = pause.unwrap_or(SEARCH);
        self.pauses = pause.is_some();
        self.waits = false;
        let walk = self.walk;
        self.entries
            .retain(|_, entry| entry.last_walk + KEPT_WALKS >= walk);
        if self.entries.values().all(|entry| entry.holder.is_some()) {
            self.from = 0;
        }
    }

    /// A walk starts that continues the search of the one before, to its end.
    pub fn resume(&mut self) {
        self.left = SEARCH;
        self.pauses = false;
        self.waits = false;
    }

    /// A walk ends. Returns whether its search paused.
    pub fn end_walk(&mut self) -> bool {
        if !self.waits {
            self.scan = None;
        }
        self.waits
    }

    /// The owner of each inode, in order. Those not known yet are looked for
    /// in one scan of `/proc`, which later calls of this walk continue.
    pub fn owners(&mut self, roots: &Roots, inodes: &[u32]) -> Vec<Owner> {
        let mut missing = HashSet::new();
        for &inode in inodes.iter().filter(|&&inode| inode != 0) {
            if !self.is_known(roots, inode) {
                missing.insert(inode);
            }
        }
        let unkept = match missing.is_empty() {
            true => HashMap::new(),
            false => self.search(roots, &missing),
        };
        let owner = |inode| match unkept.get(inode) {
            Some(owner) => *owner,
            None => self.cached(*inode),
        };
        inodes.iter().map(owner).collect()
    }

    /// The owner of one inode as far as it is known; reads nothing.
    pub fn cached(&self, inode: u32) -> Owner {
        let entry = self.entries.get(&inode);
        let owner = entry.and_then(|entry| Some(entry.holder?.owner(entry.comm)));
        owner.unwrap_or_default()
    }

    /// Marks an entry as used and checks, once a walk, that it still holds.
    fn is_known(&mut self, roots: &Roots, inode: u32) -> bool {
        let walk = self.walk;
        let Some(entry) = self.entries.get_mut(&inode) else {
            return false;
        };
        entry.last_walk = walk;
        let Some(Holder { pid, tid, fd }) = entry.holder else {
            return entry.next_search > walk;
        };
        if entry.checked == walk {
            return true;
        }
        let link = descriptors(roots, pid, tid).join(fd.to_string());
        if link_inode(&link, "socket").ok() != Some(inode) {
            self.entries.remove(&inode);
            return false;
        }
        entry.checked = walk;
        if let Some(comm) = comm(&roots.process(pid)) {
            entry.comm = comm;
        }
        true
    }

    /// Looks for sockets and keeps the results; returns the owners that do not
    /// fit into the cache.
    fn search(&mut self, roots: &Roots, missing: &HashSet<u32>) -> HashMap<u32, Owner> {
        let started = cpu_time();
        let until = Some(started + self.left);
        let from = self.from;
        let scan = self.scan.get_or_insert_with(|| Scan::new(roots, from));
        let mut done = scan.run(roots, missing, until);
        // The sockets asked for now may be among those that it could not
        // remember from an earlier call.
        if done
            && scan.forgot
            && self.rescans < MAX_RESCANS
            && missing.iter().any(|inode| !scan.seen.contains_key(inode))
        {
            self.rescans += 1;
            *scan = Scan::new(roots, from);
            done = scan.run(roots, missing, until);
        }
        self.left = self.left.saturating_sub(cpu_time().saturating_sub(started));
        if done {
            if scan.pids.is_empty() {
                self.from = 0;
            }
        } else if self.pauses {
            self.waits = true;
        } else {
            self.from = scan.next_start();
            log::warn!(
                "the search for owners of listening sockets ended after {SEARCH:?} of CPU time, \
                 before all processes' descriptors were read; those not found are unknown until \
                 another audit finds them",
            );
        }
        let mut unkept = HashMap::new();
        for &inode in missing {
            let holder = scan.seen.get(&inode).copied();
            if holder.is_none() && self.waits {
                continue;
            }
            let comm = holder
                .and_then(|holder| comm(&roots.process(holder.pid)))
                .unwrap_or_default();
            let before = self.entries.get(&inode);
            if before.is_none() && self.entries.len() >= MAX_ENTRIES {
                unkept.extend(holder.map(|holder| (inode, holder.owner(comm))));
                continue;
            }
            let pause = match before {
                Some(entry) if holder.is_none() => (entry.pause * 2).min(MAX_PAUSE_WALKS),
                _ => 1,
            };
            let entry = Entry {
                holder,
                comm,
                last_walk: self.walk,
                pause,
                next_search: self.walk + pause,
                checked: self.walk,
            };
            self.entries.insert(inode, entry);
        }
        unkept
    }
}

/// The owner of each of `inodes` that a readable process holds: one scan of
/// `/proc`, however long it takes.
pub fn find(roots: &Roots, inodes: &HashSet<u32>) -> HashMap<u32, Owner> {
    let mut scan = Scan::new(roots, 0);
    scan.remembers = 0;
    scan.run(roots, inodes, None);
    let mut names: HashMap<u32, [u8; 16]> = HashMap::new();
    let seen = scan.seen.into_iter();
    seen.map(|(inode, holder)| {
        let comm = *names
            .entry(holder.pid)
            .or_insert_with(|| comm(&roots.process(holder.pid)).unwrap_or_default());
        (inode, holder.owner(comm))
    })
    .collect()
}

/// Reads all processes' descriptors in ascending order of pid, so that the
/// first holder seen is the lowest. Stops once everything asked for is found,
/// and continues there when more is.
#[derive(Debug)]
struct Scan {
    /// Still to be read, the next one last.
    pids: Vec<u32>,
    /// The process it started with.
    first: Option<u32>,
    seen: HashMap<u32, Holder>,
    /// How many sockets are remembered that nobody asked for.
    remembers: usize,
    /// Whether one was not.
    forgot: bool,
}

impl Scan {
    /// Starts at the pid `from`, and ends with those before it.
    fn new(roots: &Roots, from: u32) -> Self {
        let mut pids = roots.pids().unwrap_or_default();
        let start = pids.partition_point(|&pid| pid < from);
        pids.rotate_left(start);
        pids.reverse();
        Self {
            first: pids.last().copied(),
            pids,
            seen: HashMap::new(),
            remembers: MAX_REMEMBERED,
            forgot: false,
        }
    }

    /// False when the time was up before the end.
    fn run(&mut self, roots: &Roots, wanted: &HashSet<u32>, until: Option<Duration>) -> bool {
        let is_up = || until.is_some_and(|until| cpu_time() >= until);
        let missing = |inode: &&u32| !self.seen.contains_key(inode);
        let mut left = wanted.iter().filter(missing).count();
        while left > 0 {
            let Some(&pid) = self.pids.last() else {
                return true;
            };
            if is_up() {
                return false;
            }
            for (looks, (tid, entry)) in all_descriptors(roots, pid).enumerate() {
                if looks % LOOKS == LOOKS - 1 && is_up() {
                    return false;
                }
                let Ok(inode) = link_inode(&entry.path(), "socket") else {
                    continue;
                };
                let Some(fd) = entry.file_name().to_str().and_then(|fd| fd.parse().ok()) else {
                    continue;
                };
                if self.seen.contains_key(&inode) {
                    continue;
                }
                let asked = wanted.contains(&inode);
                if !asked && self.seen.len() >= self.remembers {
                    self.forgot = true;
                    continue;
                }
                self.seen.insert(inode, Holder { pid, tid, fd });
                left -= usize::from(asked);
            }
            self.pids.pop();
        }
        true
    }

    /// Where the next scan starts when this one ran out of time: at the process
    /// it was reading. One that had all the time has too many descriptors ever
    /// to be read, and is passed over.
    fn next_start(&self) -> u32 {
        match self.pids.last() {
            Some(&pid) if self.first == Some(pid) => pid.saturating_add(1),
            Some(&pid) => pid,
            None => 0,
        }
    }
}

/// Where a thread shows the descriptors of its process.
fn descriptors(roots: &Roots, pid: u32, tid: u32) -> PathBuf {
    let task = match tid == pid {
        true => roots.process(pid),
        false => roots.thread(pid, tid),
    };
    task.join("fd")
}

/// The descriptors of a process by the first of its threads that shows any: one
/// that has ended shows none (`exit_files`), though the process may live on.
fn all_descriptors(roots: &Roots, pid: u32) -> impl Iterator<Item = (u32, DirEntry)> {
    let of = move |tid: u32| {
        let shown = fs::read_dir(descriptors(roots, pid, tid)).ok()?;
        let mut shown = shown.flatten().map(move |entry| (tid, entry)).peekable();
        shown.peek().is_some().then_some(shown)
    };
    let others = move || roots.later_threads(pid).into_iter().take(MAX_THREADS);
    let shown = of(pid).or_else(|| others().find_map(of));
    shown.into_iter().flatten()
}

/// `/proc/<pid>/comm` without its line feed; any bytes but NUL, which pad it.
fn comm(process: &Path) -> Option<[u8; 16]> {
    let mut name = [0; 16];
    let mut file = fs::File::open(process.join("comm")).ok()?;
    // At most 15 bytes and a line feed (TASK_COMM_LEN).
    let length = file.read(&mut name).ok()?;
    // The last one is the file's; any before it is part of the name.
    if let Some(last @ b'\n') = name[..length].last_mut() {
        *last = 0;
    }
    name[15] = 0;
    Some(name)
}

/// The container a process runs in, from the text of `/proc/<pid>/cgroup`: the
/// innermost 64-digit id in a path as Docker, containerd, CRI-O and podman make
/// them; `None` outside of containers.
pub fn container_id(cgroup: &str) -> Option<&str> {
    // Version 2 has one line, `0::PATH`; version 1 one per hierarchy, of which
    // any that names a container will do.
    cgroup.lines().find_map(|line| {
        let path = line.splitn(3, ':').nth(2)?;
        path.rsplit('/').find_map(container_component)
    })
}

fn container_component(component: &str) -> Option<&str> {
    let name = component.strip_suffix(".scope").unwrap_or(component);
    // `docker-ID.scope`, `cri-containerd-ID.scope`, `libpod-ID.scope`; and
    // with the systemd driver of older kubelets `PREFIX:cri-containerd:ID`.
    let (before, id) = match name.rfind(['-', ':']) {
        Some(dash) => (&name[..dash], &name[dash + 1..]),
        None => ("", name),
    };
    // The monitor beside a container is not in it.
    if before.ends_with("conmon") {
        return None;
    }
    (id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(id)
}

#[cfg(test)]
mod tests;

//! Socket inode → process, through `/proc/*/fd`, and where the first thread of
//! a process has ended through that of another one; and what a cgroup path says
//! about a container.

use std::collections::{HashMap, HashSet};
use std::fs::{self, DirEntry};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

use connmon_core::event::Owner;

use super::cpu_time;
use super::netns::{MAX_THREADS, Roots};

/// Owners of listening sockets, found once and checked at each walk.
///
/// The lowest pid that holds a socket is its owner, as long as there is time
/// to see them all. A socket that is not found has pid 0, and is looked for
/// again at ever longer intervals.
#[derive(Debug, Default)]
pub struct OwnerCache {
    entries: HashMap<u32, Entry>,
    /// Counts walks, for ageing and for the intervals.
    walk: u64,
    scan: Option<Scan>,
    rescans: u32,
    /// CPU time that is left for this walk's search.
    left: Duration,
    /// When it is used up, another walk goes on.
    pauses: bool,
    /// It paused before everything was found.
    waits: bool,
    /// The pid from which the next search starts: those before had their turn.
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

/// A descriptor seen to be a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Holder {
    pid: u32,
    /// A thread that shows it: the first one, which has the process's id,
    /// unless that has ended.
    tid: u32,
    fd: u32,
}

impl Holder {
    fn is_of(self, roots: &Roots, inode: u32) -> bool {
        let link = descriptors(roots, self.pid, self.tid).join(self.fd.to_string());
        socket_inode(&link) == Some(inode)
    }

    fn owner(self, comm: [u8; 16]) -> Owner {
        Owner {
            pid: self.pid,
            comm,
            cgroup: 0,
        }
    }
}

impl OwnerCache {
    /// A walk starts: entries are checked again when asked for. What the
    /// last `KEPT_WALKS` walks did not ask for is forgotten. Searches pause
    /// after `pause` of CPU time in all, for [`OwnerCache::go_on`] to take
    /// them up again; without it they end after `SEARCH`.
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

    /// A walk that goes on with the search of the one before and ends it.
    pub fn go_on(&mut self) {
        self.left = SEARCH;
        self.pauses = false;
        self.waits = false;
    }

    /// Whether the search paused before everything asked for was looked for.
    /// To be called at the end of a walk: what else its search remembers is
    /// forgotten.
    pub fn end_walk(&mut self) -> bool {
        if !self.waits {
            self.scan = None;
        }
        self.waits
    }

    /// The owner of each inode, in order. Those not known yet are looked for
    /// in one pass over `/proc` that this walk's later calls continue.
    pub fn owners(&mut self, roots: &Roots, inodes: &[u32]) -> Vec<Owner> {
        let mut missing = HashSet::new();
        for &inode in inodes.iter().filter(|&&inode| inode != 0) {
            if !self.is_known(roots, inode) {
                missing.insert(inode);
            }
        }
        let unkept = if missing.is_empty() {
            HashMap::new()
        } else {
            self.search(roots, &missing)
        };
        let owner = |inode: &u32| match unkept.get(inode) {
            Some(owner) => *owner,
            None => self.cached(*inode),
        };
        inodes.iter().map(owner).collect()
    }

    /// The owner of one inode as far as it is known, without any look at
    /// `/proc`.
    pub fn cached(&self, inode: u32) -> Owner {
        match self.entries.get(&inode) {
            Some(Entry {
                holder: Some(holder),
                comm,
                ..
            }) => holder.owner(*comm),
            _ => Owner::default(),
        }
    }

    /// Marks an entry as used and checks, once a walk, that it still holds.
    fn is_known(&mut self, roots: &Roots, inode: u32) -> bool {
        let walk = self.walk;
        let Some(entry) = self.entries.get_mut(&inode) else {
            return false;
        };
        entry.last_walk = walk;
        let Some(holder) = entry.holder else {
            return entry.next_search > walk;
        };
        if entry.checked == walk {
            return true;
        }
        if !holder.is_of(roots, inode) {
            self.entries.remove(&inode);
            return false;
        }
        entry.checked = walk;
        if let Some(comm) = comm(&roots.process(holder.pid)) {
            entry.comm = comm;
        }
        true
    }

    /// Looks for sockets and keeps what comes of it; gives the owners for
    /// which there is no room.
    fn search(&mut self, roots: &Roots, missing: &HashSet<u32>) -> HashMap<u32, Owner> {
        let started = cpu_time();
        let until = Some(started + self.left);
        let from = self.from;
        let scan = self.scan.get_or_insert_with(|| Scan::new(roots, from));
        let mut done = scan.run(roots, missing, until);
        // An earlier call of this walk passed by more sockets than it could
        // remember; look again for these, a few times a walk.
        if done
            && scan.forgot
            && self.rescans < MAX_RESCANS
            && missing.iter().any(|inode| !scan.seen.contains_key(inode))
        {
            self.rescans += 1;
            *scan = Scan::new(roots, from);
            done = scan.run(roots, missing, until);
        }
        let spent = cpu_time().saturating_sub(started);
        self.left = self.left.saturating_sub(spent);
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
            if self.entries.len() >= MAX_ENTRIES && !self.entries.contains_key(&inode) {
                if let Some(holder) = holder {
                    unkept.insert(inode, holder.owner(comm));
                }
                continue;
            }
            let pause = match self.entries.get(&inode) {
                Some(entry) if holder.is_none() => (entry.pause * 2).min(MAX_PAUSE_WALKS),
                _ => 1,
            };
            self.entries.insert(
                inode,
                Entry {
                    holder,
                    comm,
                    last_walk: self.walk,
                    pause,
                    next_search: self.walk + pause,
                    checked: self.walk,
                },
            );
        }
        unkept
    }
}

/// The owner of each of `inodes` that some readable process holds, for a
/// listing of all connections: one pass over `/proc`.
pub fn find(roots: &Roots, inodes: &HashSet<u32>) -> HashMap<u32, Owner> {
    let mut scan = Scan::new(roots, 0);
    scan.remembers = 0;
    scan.run(roots, inodes, None);
    let mut names: HashMap<u32, [u8; 16]> = HashMap::new();
    scan.seen
        .iter()
        .map(|(&inode, holder)| {
            let comm = *names
                .entry(holder.pid)
                .or_insert_with(|| comm(&roots.process(holder.pid)).unwrap_or_default());
            (inode, holder.owner(comm))
        })
        .collect()
}

/// One pass over all processes' descriptors in ascending order of pid, so
/// that the first holder seen is the lowest; it stops as soon as everything
/// asked for is found and goes on from there when more is. One that starts
/// amid the processes goes round.
#[derive(Debug)]
struct Scan {
    /// In descending order, so that the next one is the last.
    pids: Vec<u32>,
    /// The process it started with.
    first: Option<u32>,
    seen: HashMap<u32, Holder>,
    /// How many sockets nobody asked for are remembered.
    remembers: usize,
    /// Whether one was not.
    forgot: bool,
}

impl Scan {
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
        let mut left = wanted
            .iter()
            .filter(|inode| !self.seen.contains_key(inode))
            .count();
        while left > 0 {
            let Some(pid) = self.pids.pop() else {
                return true;
            };
            if is_up() {
                self.pids.push(pid);
                return false;
            }
            let mut looks = 0;
            for entry in all_descriptors(roots, pid) {
                looks += 1;
                if looks % LOOKS == LOOKS - 1 && is_up() {
                    self.pids.push(pid);
                    return false;
                }
                let (tid, entry) = entry;
                let Some(inode) = socket_inode(&entry.path()) else {
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
        }
        true
    }

    /// Where the next search starts when this one ran out of time: at the
    /// process it was at, which had a part of the time only. One that had all
    /// of it and did not end has too many descriptors to ever be done with.
    fn next_start(&self) -> u32 {
        match self.pids.last() {
            Some(&pid) if self.first == Some(pid) => pid.saturating_add(1),
            Some(&pid) => pid,
            None => 0,
        }
    }
}

/// CPU time that one walk spends on searches, for well over a million
/// descriptors. Anybody can make more of them, shared by many processes, and
/// sockets that none of them shows (under way in SCM_RIGHTS).
const SEARCH: Duration = Duration::from_secs(2);

/// Descriptors between two looks at the clock: about 100 µs.
const LOOKS: usize = 64;

/// Cached inodes: more than any host listens on.
const MAX_ENTRIES: usize = 65_536;
/// Sockets remembered by one scan beside those asked for.
const MAX_REMEMBERED: usize = 65_536;
/// Further passes over `/proc` in one walk.
const MAX_RESCANS: u32 = 4;
/// Walks an unused entry survives.
const KEPT_WALKS: u64 = 3;
/// Longest pause between two searches for a socket nobody readable holds.
const MAX_PAUSE_WALKS: u64 = 64;

/// Where a thread shows the descriptors of its process.
fn descriptors(roots: &Roots, pid: u32, tid: u32) -> PathBuf {
    let task = if tid == pid {
        roots.process(pid)
    } else {
        roots.thread(pid, tid)
    };
    task.join("fd")
}

/// The descriptors of a process by the first of its threads that shows any:
/// one that has ended has none (`exit_files`), and the process may go on
/// without its first.
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

/// The inode in a link such as `socket:[12345]`.
fn socket_inode(link: &Path) -> Option<u32> {
    let link = fs::read_link(link).ok()?;
    let inode = link
        .as_os_str()
        .as_encoded_bytes()
        .strip_prefix(b"socket:[")?
        .strip_suffix(b"]")?;
    std::str::from_utf8(inode).ok()?.parse().ok()
}

/// `/proc/<pid>/comm` without its line feed; any bytes but NUL, which pad it.
pub fn comm(process: &Path) -> Option<[u8; 16]> {
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

/// The container a process runs in, from the text of `/proc/<pid>/cgroup`:
/// the innermost 64-digit id in a path as Docker, containerd, CRI-O and
/// podman make them; `None` outside of containers.
pub fn container_id(cgroup: &str) -> Option<&str> {
    // Version 2 has one line, `0::PATH`; version 1 one per hierarchy, of
    // which any that names a container will do.
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

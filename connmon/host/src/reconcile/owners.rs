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
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new() -> Self {
            Self(tempfile::tempdir().unwrap())
        }

        fn process(&self, pid: u32, name: &str, sockets: &[(u32, u32)]) {
            let dir = self.0.path().join(pid.to_string());
            fs::create_dir_all(dir.join("fd")).unwrap();
            fs::write(dir.join("comm"), format!("{name}\n")).unwrap();
            for (fd, inode) in sockets {
                symlink(format!("socket:[{inode}]"), dir.join(format!("fd/{fd}"))).unwrap();
            }
            let _ = symlink("/dev/null", dir.join("fd/0"));
            let _ = symlink("socket:[no]", dir.join("fd/1"));
        }

        fn end(&self, pid: u32) {
            fs::remove_dir_all(self.0.path().join(pid.to_string())).unwrap();
        }

        fn roots(&self) -> Roots {
            Roots {
                proc: self.0.path().into(),
                mounts: Vec::new(),
            }
        }
    }

    fn pids(owners: &[Owner]) -> Vec<u32> {
        owners.iter().map(|owner| owner.pid).collect()
    }

    fn name(owner: Owner) -> String {
        String::from_utf8_lossy(&owner.comm)
            .trim_end_matches('\0')
            .to_owned()
    }

    #[test]
    fn the_lowest_holder_is_the_owner() {
        let tree = Tree::new();
        tree.process(100, "worker", &[(3, 55), (4, 56)]);
        tree.process(20, "master", &[(7, 55)]);
        let mut cache = OwnerCache::default();
        cache.begin_walk(None);
        let owners = cache.owners(&tree.roots(), &[55, 56, 0, 99]);
        assert_eq!(pids(&owners), [20, 100, 0, 0]);
        assert_eq!(name(owners[0]), "master");
        assert_eq!(cache.cached(56).pid, 100);
    }

    #[test]
    fn a_process_whose_first_thread_ended_still_owns_its_sockets() {
        let tree = Tree::new();
        let process = tree.0.path().join("20");
        fs::create_dir_all(process.join("fd")).unwrap();
        fs::write(process.join("comm"), "server\n").unwrap();
        for (tid, shows) in [(20, false), (21, false), (22, true)] {
            let fds = process.join(format!("task/{tid}/fd"));
            fs::create_dir_all(&fds).unwrap();
            if shows {
                symlink("socket:[55]", fds.join("7")).unwrap();
            }
        }
        let mut cache = OwnerCache::default();
        for _ in 0..2 {
            cache.begin_walk(None);
            let owners = cache.owners(&tree.roots(), &[55]);
            assert_eq!(pids(&owners), [20]);
            assert_eq!(name(owners[0]), "server");
            assert!(cache.scan.is_none() || cache.walk == 1, "found once");
        }
        assert_eq!(find(&tree.roots(), &HashSet::from([55]))[&55].pid, 20);
    }

    #[test]
    fn an_owner_that_ends_is_replaced_at_the_next_walk() {
        let tree = Tree::new();
        tree.process(20, "old", &[(7, 55)]);
        tree.process(30, "new", &[(7, 55)]);
        let mut cache = OwnerCache::default();
        cache.begin_walk(None);
        assert_eq!(pids(&cache.owners(&tree.roots(), &[55])), [20]);
        tree.end(20);
        cache.begin_walk(None);
        assert_eq!(pids(&cache.owners(&tree.roots(), &[55])), [30]);
    }

    #[test]
    fn a_search_that_pauses_goes_on_and_finds_the_rest() {
        let tree = Tree::new();
        tree.process(20, "a", &[(7, 55)]);
        let mut cache = OwnerCache::default();
        cache.begin_walk(Some(Duration::ZERO));
        assert_eq!(pids(&cache.owners(&tree.roots(), &[55, 99])), [0, 0]);
        assert!(cache.end_walk(), "it says that it is not done");
        cache.go_on();
        assert_eq!(pids(&cache.owners(&tree.roots(), &[55, 99])), [20, 0]);
        assert!(!cache.end_walk());
        assert!(cache.scan.is_none(), "nothing is kept but what was found");
    }

    /// A process with more descriptors than there was time for, all of them
    /// to be read again at every walk.
    #[test]
    fn a_search_out_of_time_ends_and_the_next_starts_elsewhere() {
        let tree = Tree::new();
        tree.process(20, "hoard", &[(7, 55)]);
        tree.process(30, "b", &[(7, 55), (8, 66)]);
        let mut cache = OwnerCache::default();
        for goes_on in [false, true] {
            cache.begin_walk(goes_on.then_some(Duration::ZERO));
            if goes_on {
                cache.owners(&tree.roots(), &[55]);
                assert!(cache.end_walk());
                cache.go_on();
            }
            assert_eq!(cache.left, SEARCH);
            cache.left = Duration::ZERO;
            assert_eq!(pids(&cache.owners(&tree.roots(), &[55])), [0]);
            assert!(!cache.end_walk(), "no walk goes on");
            cache.begin_walk(None);
            let owners = cache.owners(&tree.roots(), &[55, 66]);
            assert_eq!(pids(&owners), [30, 30], "20 had its turn");
            assert!(cache.left < SEARCH, "all searches of a walk count");
            cache.entries.remove(&55);
            cache.begin_walk(None);
            assert_eq!(pids(&cache.owners(&tree.roots(), &[55])), [20]);
            cache.entries.clear();
        }
    }

    #[test]
    fn a_search_goes_round_and_on_with_the_process_it_was_at() {
        let tree = Tree::new();
        for pid in [20, 30, 40] {
            tree.process(pid, "a", &[]);
        }
        let mut scan = Scan::new(&tree.roots(), 30);
        assert_eq!(scan.pids, [20, 40, 30]);
        assert_eq!(scan.next_start(), 31, "it had all the time there was");
        scan.pids.pop();
        assert_eq!(scan.next_start(), 40, "it had the rest of the time");
        assert_eq!(Scan::new(&tree.roots(), 41).pids, [40, 30, 20]);
    }

    #[test]
    fn an_owner_without_room_in_the_cache_is_known_to_its_walk() {
        let tree = Tree::new();
        tree.process(20, "a", &[(7, 55)]);
        let mut cache = OwnerCache::default();
        cache.begin_walk(None);
        let others = 100..100 + MAX_ENTRIES as u32;
        let walk = cache.walk;
        cache.entries.extend(others.map(|inode| {
            let entry = Entry {
                holder: None,
                comm: [0; 16],
                last_walk: walk,
                pause: 1,
                next_search: walk + 1,
                checked: walk,
            };
            (inode, entry)
        }));
        for _ in 0..2 {
            let owners = cache.owners(&tree.roots(), &[55, 56, 100]);
            assert_eq!(pids(&owners), [20, 0, 0]);
            assert_eq!(name(owners[0]), "a");
        }
        assert_eq!(cache.entries.len(), MAX_ENTRIES);
    }

    #[test]
    fn a_changed_name_is_seen_at_the_next_walk() {
        let tree = Tree::new();
        tree.process(20, "before", &[(7, 55)]);
        let mut cache = OwnerCache::default();
        cache.begin_walk(None);
        cache.owners(&tree.roots(), &[55]);
        tree.process(20, "after exec", &[]);
        cache.begin_walk(None);
        assert_eq!(name(cache.owners(&tree.roots(), &[55])[0]), "after exec");
    }

    #[test]
    fn one_scan_serves_all_namespaces_of_a_walk() {
        let tree = Tree::new();
        tree.process(20, "a", &[(7, 55)]);
        tree.process(30, "b", &[(7, 66)]);
        tree.process(40, "c", &[(7, 77)]);
        let mut cache = OwnerCache::default();
        cache.begin_walk(None);
        assert_eq!(pids(&cache.owners(&tree.roots(), &[66])), [30]);
        // The scan went past 20 and stopped at 30: the rest is unread.
        tree.end(20);
        assert_eq!(pids(&cache.owners(&tree.roots(), &[55, 77])), [20, 40]);
    }

    #[test]
    fn a_socket_without_a_readable_holder_is_searched_ever_less_often() {
        let tree = Tree::new();
        tree.process(20, "a", &[]);
        let mut cache = OwnerCache::default();
        let mut searches = Vec::new();
        for walk in 1..=300_u32 {
            cache.begin_walk(None);
            cache.owners(&tree.roots(), &[55]);
            if cache.scan.is_some() {
                searches.push(walk);
            }
        }
        assert_eq!(searches[..6], [1, 2, 4, 8, 16, 32]);
        assert!(
            searches
                .windows(2)
                .all(|w| w[1] - w[0] <= MAX_PAUSE_WALKS as u32)
        );
        // Found in the end, when somebody readable holds it.
        tree.process(30, "b", &[(9, 55)]);
        for _ in 0..MAX_PAUSE_WALKS {
            cache.begin_walk(None);
            cache.owners(&tree.roots(), &[55]);
        }
        assert_eq!(cache.cached(55).pid, 30);
    }

    #[test]
    fn what_is_not_asked_for_any_more_is_forgotten() {
        let tree = Tree::new();
        tree.process(20, "a", &[(7, 55)]);
        let mut cache = OwnerCache::default();
        cache.begin_walk(None);
        cache.owners(&tree.roots(), &[55]);
        for _ in 0..=KEPT_WALKS {
            assert_eq!(cache.entries.len(), 1);
            cache.begin_walk(None);
        }
        assert!(cache.entries.is_empty());
    }

    #[test]
    fn a_listing_finds_all_that_is_held() {
        let tree = Tree::new();
        tree.process(20, "a", &[(7, 55), (8, 56)]);
        tree.process(30, "b", &[(7, 55), (8, 57), (9, 58)]);
        let found = find(&tree.roots(), &HashSet::from([55, 57, 60]));
        assert_eq!(found.len(), 2);
        assert_eq!((found[&55].pid, found[&57].pid), (20, 30));
        assert_eq!(name(found[&57]), "b");
    }

    #[test]
    fn container_ids_of_the_usual_runtimes() {
        let id = "4c01db0b339cc2e7f3a0b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2";
        for (runtime, path) in [
            (
                "docker, v1",
                "12:pids:/docker/{}\n1:name=systemd:/docker/{}",
            ),
            (
                "docker, v2 with systemd",
                "0::/system.slice/docker-{}.scope",
            ),
            ("docker in docker", "0::/docker/aaaa/docker/{}"),
            (
                "containerd, systemd driver",
                "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1234_5678.slice/cri-containerd-{}.scope",
            ),
            (
                "containerd, cgroupfs driver",
                "0::/kubepods/besteffort/pod1234-5678/{}",
            ),
            (
                "containerd under systemd-cgroup kubelets",
                "0::/system.slice/containerd.service/kubepods-burstable-pod1.slice:cri-containerd:{}",
            ),
            (
                "cri-o",
                "0::/kubepods.slice/kubepods-pod1.slice/crio-{}.scope",
            ),
            (
                "cri-o with a container child",
                "0::/kubepods.slice/crio-{}.scope/container",
            ),
            ("podman", "0::/machine.slice/libpod-{}.scope/container"),
            (
                "podman, rootless",
                "0::/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{}.scope/container",
            ),
            ("nerdctl", "0::/default/{}"),
        ] {
            let text = path.replace("{}", id);
            assert_eq!(container_id(&text), Some(id), "{runtime}");
        }
    }

    #[test]
    fn what_is_no_container_has_no_id() {
        let id = "4c01db0b339cc2e7f3a0b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2";
        for path in [
            "",
            "0::/",
            "0::/init.scope",
            "0::/system.slice/ssh.service",
            "0::/user.slice/user-1000.slice/session-3.scope",
            "0::/machine.slice/libpod-conmon-{}.scope",
            "0::/kubepods.slice/crio-conmon-{}.scope",
            "0::/docker/4c01db0b339c",
            "no colons at all {}",
            "0::/docker/Z{}",
        ] {
            assert_eq!(container_id(&path.replace("{}", id)), None, "{path}");
        }
    }
}

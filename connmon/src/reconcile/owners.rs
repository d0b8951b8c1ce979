//! Socket inode → process, through `/proc/*/fd`; and what a cgroup path says
//! about a container.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use super::cpu_time;
use super::netns::Roots;
use crate::event::Owner;

/// Owners of listening sockets, found once and checked at each walk.
///
/// The lowest pid that holds a socket is its owner. A socket nobody readable
/// holds has pid 0, and is looked for again at ever longer intervals.
#[derive(Debug, Default)]
pub struct OwnerCache {
    entries: HashMap<u32, Entry>,
    /// Counts walks, for ageing and for the intervals.
    walk: u64,
    scan: Option<Scan>,
    rescans: u32,
    /// The thread's CPU time at which this walk's search pauses.
    until: Option<Duration>,
    /// It paused before everything was found.
    waits: bool,
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
    fd: u32,
}

impl OwnerCache {
    /// A walk starts: entries are checked again when asked for. What the
    /// last `KEPT_WALKS` walks did not ask for is forgotten. Searches take no
    /// more CPU time than `limit` in all; [`OwnerCache::go_on`] takes them up again.
    pub fn begin_walk(&mut self, limit: Option<Duration>) {
        self.walk += 1;
        self.scan = None;
        self.rescans = 0;
        self.until = limit.map(|limit| cpu_time() + limit);
        self.waits = false;
        let walk = self.walk;
        self.entries
            .retain(|_, entry| entry.last_walk + KEPT_WALKS >= walk);
    }

    /// A walk that goes on with the search of the one before, without limit.
    pub fn go_on(&mut self) {
        self.until = None;
        self.waits = false;
    }

    /// Whether the time was up before everything asked for was looked for.
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
        if !missing.is_empty() {
            self.search(roots, &missing);
        }
        inodes.iter().map(|inode| self.cached(*inode)).collect()
    }

    /// The owner of one inode as far as it is known, without any look at
    /// `/proc`.
    pub fn cached(&self, inode: u32) -> Owner {
        match self.entries.get(&inode) {
            Some(Entry {
                holder: Some(holder),
                comm,
                ..
            }) => Owner {
                pid: holder.pid,
                comm: *comm,
                cgroup: 0,
            },
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
        let process = roots.process(holder.pid);
        if socket_inode(&process.join("fd").join(holder.fd.to_string())) != Some(inode) {
            self.entries.remove(&inode);
            return false;
        }
        entry.checked = walk;
        if let Some(comm) = comm(&process) {
            entry.comm = comm;
        }
        true
    }

    fn search(&mut self, roots: &Roots, missing: &HashSet<u32>) {
        let until = self.until;
        let scan = self.scan.get_or_insert_with(|| Scan::new(roots));
        if !scan.run(roots, missing, until) {
            self.waits = true;
        }
        if scan.forgot && missing.iter().any(|inode| !scan.seen.contains_key(inode)) {
            // An earlier call of this walk passed by more sockets than it
            // could remember; look again for these, a few times a walk.
            if self.rescans < MAX_RESCANS {
                self.rescans += 1;
                let mut again = Scan::new(roots);
                if !again.run(roots, missing, until) {
                    self.waits = true;
                }
                *scan = again;
            }
        }
        for &inode in missing {
            if self.entries.len() >= MAX_ENTRIES && !self.entries.contains_key(&inode) {
                continue;
            }
            let holder = scan.seen.get(&inode).copied();
            if holder.is_none() && self.waits {
                continue;
            }
            let comm = holder
                .and_then(|holder| comm(&roots.process(holder.pid)))
                .unwrap_or_default();
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
    }
}

/// The owner of each of `inodes` that some readable process holds, for a
/// listing of all connections: one pass over `/proc`.
pub fn find(roots: &Roots, inodes: &HashSet<u32>) -> HashMap<u32, Owner> {
    let mut scan = Scan::new(roots);
    scan.remembers = 0;
    scan.run(roots, inodes, None);
    let mut names: HashMap<u32, [u8; 16]> = HashMap::new();
    scan.seen
        .iter()
        .map(|(&inode, holder)| {
            let comm = *names
                .entry(holder.pid)
                .or_insert_with(|| comm(&roots.process(holder.pid)).unwrap_or_default());
            let owner = Owner {
                pid: holder.pid,
                comm,
                cgroup: 0,
            };
            (inode, owner)
        })
        .collect()
}

/// One pass over all processes' descriptors in ascending order of pid, so
/// that the first holder seen is the lowest; it stops as soon as everything
/// asked for is found and goes on from there when more is.
#[derive(Debug)]
struct Scan {
    /// In descending order, so that the next one is the last.
    pids: Vec<u32>,
    seen: HashMap<u32, Holder>,
    /// How many sockets nobody asked for are remembered.
    remembers: usize,
    /// Whether one was not.
    forgot: bool,
}

impl Scan {
    fn new(roots: &Roots) -> Self {
        Self {
            pids: roots.pids().unwrap_or_default().into_iter().rev().collect(),
            seen: HashMap::new(),
            remembers: MAX_REMEMBERED,
            forgot: false,
        }
    }

    /// False when the time was up before the end.
    fn run(&mut self, roots: &Roots, wanted: &HashSet<u32>, until: Option<Duration>) -> bool {
        let mut left = wanted
            .iter()
            .filter(|inode| !self.seen.contains_key(inode))
            .count();
        while left > 0 {
            let Some(pid) = self.pids.pop() else {
                return true;
            };
            let Ok(descriptors) = fs::read_dir(roots.process(pid).join("fd")) else {
                continue;
            };
            for (at, entry) in descriptors.flatten().enumerate() {
                if at % LOOKS == 0 && until.is_some_and(|until| cpu_time() >= until) {
                    self.pids.push(pid);
                    return false;
                }
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
                self.seen.insert(inode, Holder { pid, fd });
                left -= usize::from(asked);
            }
        }
        true
    }
}

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

/// `/proc/<pid>/comm` without its line feed; any bytes.
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

//! Which container a process is, or was, in.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::DirEntryExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use connmon_core::event::Owner;
use connmon_host::reconcile::owners::container_id;

/// Digits of an id that are shown, as `docker ps` does.
const DIGITS: usize = 12;

/// Most processes remembered.
const PROCESSES_MAX: usize = 4096;

/// Most directories of containers remembered, and most of all looked at in
/// one pass.
const CGROUPS_MAX: usize = 16_384;

/// Pause between two passes over the hierarchy.
const PAUSE: Duration = Duration::from_secs(1);

/// Looks up containers by process, each once; by cgroup where the process has
/// ended.
#[derive(Debug)]
pub struct Containers {
    proc: PathBuf,
    processes: HashMap<(u32, u64), Option<String>>,
    cgroups: Cgroups,
}

impl Default for Containers {
    fn default() -> Self {
        Self::new("/proc".into(), unified_root())
    }
}

impl Containers {
    fn new(proc: PathBuf, root: Option<PathBuf>) -> Self {
        Self {
            proc,
            processes: HashMap::new(),
            cgroups: Cgroups {
                root,
                known: HashMap::new(),
                passed: None,
            },
        }
    }

    /// The container of an owner, first 12 digits of its id.
    pub fn of(&mut self, owner: &Owner) -> Option<String> {
        let key = (owner.pid, owner.cgroup);
        if key == (0, 0) {
            return None;
        }
        if let Some(known) = self.processes.get(&key) {
            return known.clone();
        }
        // Its own words first: with version 1 hierarchies the id that the
        // kernel side sends tells no container.
        let path = self.proc.join(format!("{}/cgroup", owner.pid));
        let Ok(text) = fs::read_to_string(path) else {
            return self.cgroups.container(owner.cgroup);
        };
        let found = container_id(&text).map(short);
        if self.processes.len() >= PROCESSES_MAX {
            self.processes.clear();
        }
        self.processes.insert(key, found.clone());
        found
    }
}

fn short(id: &str) -> String {
    id.chars().take(DIGITS).collect()
}

/// Where version 2 is mounted: alone, or beside version 1.
fn unified_root() -> Option<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .map(PathBuf::from)
        .into_iter()
        .find(|root| root.join("cgroup.controllers").exists())
}

/// cgroup id → container. The id of a version 2 cgroup is the inode of its
/// directory (`kernfs_node_id`, `bpf_get_current_cgroup_id(9)`).
#[derive(Debug)]
struct Cgroups {
    root: Option<PathBuf>,
    known: HashMap<u64, String>,
    passed: Option<Instant>,
}

impl Cgroups {
    fn container(&mut self, id: u64) -> Option<String> {
        if id == 0 {
            return None;
        }
        let due = self.passed.is_none_or(|passed| passed.elapsed() >= PAUSE);
        if !self.known.contains_key(&id)
            && due
            && let Some(root) = self.root.clone()
        {
            self.pass(&root);
            // After the pass: a huge hierarchy is read the more rarely.
            self.passed = Some(Instant::now());
        }
        self.known.get(&id).cloned()
    }

    /// Adds the directories of containers below `root`. What is gone stays
    /// known: its last connections may still be in the ring.
    fn pass(&mut self, root: &Path) {
        if self.known.len() >= CGROUPS_MAX {
            self.known.clear();
        }
        let mut waiting = vec![(root.to_owned(), None::<String>)];
        let mut looked = 0;
        while let Some((directory, above)) = waiting.pop() {
            let Ok(entries) = fs::read_dir(&directory) else {
                continue;
            };
            for entry in entries.flatten() {
                if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    continue;
                }
                looked += 1;
                if looked > CGROUPS_MAX {
                    return;
                }
                let name = entry.file_name();
                let line = format!("0::/{}", name.to_string_lossy());
                // The innermost container, for what lies below it too.
                let container = container_id(&line).map(short).or_else(|| above.clone());
                if let Some(container) = &container {
                    self.known.insert(entry.ino(), container.clone());
                }
                waiting.push((entry.path(), container));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use super::*;

    const ID: &str = "4c01db0b339cc2e7f3a0b3c2d1e0f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c4d3e2";

    fn owner(pid: u32, cgroup: u64) -> Owner {
        Owner {
            pid,
            cgroup,
            ..Owner::default()
        }
    }

    fn inode(path: &Path) -> u64 {
        fs::metadata(path).unwrap().ino()
    }

    #[test]
    fn a_living_process_says_and_a_dead_ones_cgroup_does() {
        let tree = tempfile::tempdir().unwrap();
        let (proc, root) = (tree.path().join("proc"), tree.path().join("cgroup"));
        let scope = root.join(format!("system.slice/docker-{ID}.scope"));
        let inner = scope.join("init");
        fs::create_dir_all(&inner).unwrap();
        fs::create_dir_all(proc.join("7")).unwrap();
        fs::write(proc.join("7/cgroup"), format!("0::/docker/{ID}\n")).unwrap();
        let mut containers = Containers::new(proc, Some(root.clone()));
        let expected = Some(ID[..DIGITS].to_owned());
        assert_eq!(containers.of(&owner(7, 0)), expected);
        // No such process; these are its cgroups.
        assert_eq!(containers.of(&owner(8, inode(&scope))), expected);
        assert_eq!(containers.of(&owner(9, inode(&inner))), expected);
        assert_eq!(
            containers.of(&owner(9, inode(&root.join("system.slice")))),
            None
        );
        assert_eq!(containers.of(&owner(10, 0)), None);
        assert_eq!(containers.of(&owner(0, 0)), None);
        // Seen once, it is known when the container has ended too.
        let ended = inode(&scope);
        fs::remove_dir_all(&scope).unwrap();
        containers.cgroups.passed = None;
        assert_eq!(containers.of(&owner(9, u64::MAX)), None);
        assert_eq!(containers.of(&owner(11, ended)), expected);
    }

    #[test]
    fn unknown_ids_do_not_read_the_hierarchy_again_and_again() {
        let tree = tempfile::tempdir().unwrap();
        let mut containers = Containers::new(tree.path().into(), Some(tree.path().into()));
        assert_eq!(containers.of(&owner(1, 1)), None);
        let scope = tree.path().join(ID);
        fs::create_dir(&scope).unwrap();
        assert_eq!(containers.of(&owner(2, inode(&scope))), None);
    }
}

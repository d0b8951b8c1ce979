//! Which container a process is, or was, in.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::DirEntryExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use connmon_core::event::Owner;
use connmon_host::reconcile::owners::container_id;

/// Digits of an id that are shown, as `docker ps` does.
const DIGITS: usize = 12;

/// Most processes remembered.
const PROCESSES_MAX: usize = 4096;

/// Most cgroups of containers remembered, and most cgroups read in one pass.
const CGROUPS_MAX: usize = 16_384;

/// Pause between two passes over the hierarchy.
const PAUSE: Duration = Duration::from_secs(1);

/// Looks up containers by process, and by cgroup where the process has ended.
#[derive(Debug)]
pub struct Containers {
    proc: PathBuf,
    /// Where version 2 is mounted: alone, or beside version 1.
    root: Option<PathBuf>,
    /// By pid and cgroup.
    processes: HashMap<(u32, u64), Option<String>>,
    /// By id, which is the inode of the directory (`kernfs_node_id`,
    /// `bpf_get_current_cgroup_id(9)`).
    cgroups: HashMap<u64, String>,
    /// The end of the last pass.
    passed: Option<Instant>,
}

impl Default for Containers {
    fn default() -> Self {
        let roots = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from);
        let mut roots = roots.into_iter();
        let root = roots.find(|root| root.join("cgroup.controllers").exists());
        Self::new("/proc".into(), root)
    }
}

impl Containers {
    fn new(proc: PathBuf, root: Option<PathBuf>) -> Self {
        Self {
            proc,
            root,
            processes: HashMap::new(),
            cgroups: HashMap::new(),
            passed: None,
        }
    }

    /// The container of an owner, first 12 digits of its id.
    pub fn of(&mut self, owner: &Owner) -> Option<String> {
        let key = (owner.pid, owner.cgroup);
        if let Some(known) = self.processes.get(&key) {
            return known.clone();
        }
        // The process first: in a version 1 hierarchy the id of its version 2
        // cgroup shows no container.
        let path = self.proc.join(format!("{}/cgroup", owner.pid));
        let Ok(text) = fs::read_to_string(path) else {
            return self.by_cgroup(owner.cgroup);
        };
        let found = container_id(&text).map(short);
        if self.processes.len() >= PROCESSES_MAX {
            self.processes.clear();
        }
        self.processes.insert(key, found.clone());
        found
    }

    fn by_cgroup(&mut self, id: u64) -> Option<String> {
        let due = self.passed.is_none_or(|passed| passed.elapsed() >= PAUSE);
        if id != 0 && due && !self.cgroups.contains_key(&id) {
            self.pass();
            // After the pass: a large hierarchy is read less often.
            self.passed = Some(Instant::now());
        }
        self.cgroups.get(&id).cloned()
    }

    /// Adds the cgroups of containers. What is gone stays known: its last
    /// connections may still be in the ring buffer.
    fn pass(&mut self) {
        if self.cgroups.len() >= CGROUPS_MAX {
            self.cgroups.clear();
        }
        let root = self.root.iter().map(|root| (root.clone(), None::<String>));
        let mut waiting: Vec<_> = root.collect();
        let mut read = 0;
        while let Some((directory, above)) = waiting.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    continue;
                }
                read += 1;
                if read > CGROUPS_MAX {
                    return;
                }
                let line = format!("0::/{}", entry.file_name().display());
                // The innermost container, also for what lies below it.
                let container = container_id(&line).map(short).or_else(|| above.clone());
                if let Some(container) = &container {
                    self.cgroups.insert(entry.ino(), container.clone());
                }
                waiting.push((entry.path(), container));
            }
        }
    }
}

fn short(id: &str) -> String {
    id.chars().take(DIGITS).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;
    use std::path::Path;

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
    fn a_process_that_ended_is_found_by_its_cgroup() {
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
        containers.passed = None;
        assert_eq!(containers.of(&owner(9, u64::MAX)), None);
        assert_eq!(containers.of(&owner(11, ended)), expected);
    }

    #[test]
    fn unknown_ids_do_not_reread_the_hierarchy_at_once() {
        let tree = tempfile::tempdir().unwrap();
        let mut containers = Containers::new(tree.path().into(), Some(tree.path().into()));
        assert_eq!(containers.of(&owner(1, 1)), None);
        let scope = tree.path().join(ID);
        fs::create_dir(&scope).unwrap();
        assert_eq!(containers.of(&owner(2, inode(&scope))), None);
    }
}

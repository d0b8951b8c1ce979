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
fn a_process_without_first_thread_owns_its_sockets() {
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
fn a_search_that_pauses_resumes_and_finds_the_rest() {
    let tree = Tree::new();
    tree.process(20, "a", &[(7, 55)]);
    let mut cache = OwnerCache::default();
    cache.begin_walk(Some(Duration::ZERO));
    assert_eq!(pids(&cache.owners(&tree.roots(), &[55, 99])), [0, 0]);
    assert!(cache.end_walk(), "the search paused");
    cache.resume();
    assert_eq!(pids(&cache.owners(&tree.roots(), &[55, 99])), [20, 0]);
    assert!(!cache.end_walk());
    assert!(cache.scan.is_none(), "nothing is kept but what was found");
}

/// A process with more descriptors than there is time for, in every walk.
#[test]
fn after_a_search_out_of_time_another_pid_is_first() {
    let tree = Tree::new();
    tree.process(20, "hoard", &[(7, 55)]);
    tree.process(30, "b", &[(7, 55), (8, 66)]);
    let mut cache = OwnerCache::default();
    for resumes in [false, true] {
        cache.begin_walk(resumes.then_some(Duration::ZERO));
        if resumes {
            cache.owners(&tree.roots(), &[55]);
            assert!(cache.end_walk());
            cache.resume();
        }
        assert_eq!(cache.left, SEARCH);
        cache.left = Duration::ZERO;
        assert_eq!(pids(&cache.owners(&tree.roots(), &[55])), [0]);
        assert!(!cache.end_walk(), "no walk resumes");
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
fn a_search_starts_at_a_pid_and_reads_all_others() {
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
fn an_owner_beyond_the_cache_is_known_to_its_walk() {
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
fn a_socket_without_holder_is_searched_ever_less() {
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
fn find_names_the_holder_of_every_socket() {
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
fn a_path_without_container_has_no_id() {
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

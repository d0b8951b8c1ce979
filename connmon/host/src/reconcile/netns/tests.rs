use std::os::unix::fs::symlink;

use super::*;

struct Tree(tempfile::TempDir);

impl Tree {
    fn new(own: u32) -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        tree.process("self", Some(own));
        tree
    }

    fn process(&self, pid: &str, netns: Option<u32>) {
        let dir = self.0.path().join(pid);
        fs::create_dir_all(dir.join("ns")).unwrap();
        fs::create_dir_all(dir.join("net")).unwrap();
        if let Some(netns) = netns {
            symlink(format!("net:[{netns}]"), dir.join("ns/net")).unwrap();
        }
    }

    fn roots(&self) -> Roots {
        Roots {
            proc: self.0.path().into(),
            mounts: vec![self.0.path().join("missing"), self.0.path().into()],
        }
    }

    fn find(&self) -> Found {
        self.walk(&mut ThreadSearch::default(), true)
    }

    fn walk(&self, threads: &mut ThreadSearch, search: bool) -> Found {
        // No mount here leads anywhere, so there is nowhere to return from.
        let home = File::open(self.0.path()).unwrap();
        self.roots().find(&home, threads, search).unwrap()
    }
}

#[test]
fn namespaces_are_unique_and_the_own_comes_first() {
    let tree = Tree::new(7);
    for (pid, netns) in [("1", 7), ("20", 9), ("3", 9), ("4", 8), ("5", 9), ("6", 9)] {
        tree.process(pid, Some(netns));
    }
    tree.process("30", None); // a zombie: no link
    fs::write(tree.0.path().join("version"), "").unwrap();
    let found = tree.find();
    assert_eq!(found.overflow, 0);
    assert_eq!(found.hidden, None);
    let ids: Vec<_> = found.namespaces.iter().map(|ns| ns.id).collect();
    assert_eq!(ids, [7, 9, 8]);
    assert_eq!(
        found.namespaces[0].handles,
        [Handle::Own, Handle::Process(1)]
    );
    let nine: Vec<_> = [3, 5, 6].map(Handle::Process).to_vec();
    assert_eq!(found.namespaces[1].handles, nine);
}

#[test]
fn a_process_without_first_thread_is_found() {
    let tree = Tree::new(7);
    tree.process("50/task/50", None);
    tree.process("50/task/51", Some(9));
    tree.process("60/task/60", None); // ended as a whole
    let found = tree.find();
    let ids: Vec<_> = found.namespaces.iter().map(|ns| ns.id).collect();
    assert_eq!(ids, [7, 9]);
    assert_eq!(found.namespaces[1].handles, [Handle::Process(51)]);
}

#[test]
fn a_namespace_of_later_threads_is_remembered() {
    let tree = Tree::new(7);
    tree.process("50", Some(7));
    tree.process("50/task/50", Some(7));
    tree.process("50/task/51", Some(7));
    tree.process("50/task/52", Some(9));
    let ids = |found: Found| -> Vec<_> { found.namespaces.iter().map(|ns| ns.id).collect() };
    let mut threads = ThreadSearch::default();
    assert_eq!(ids(tree.walk(&mut threads, false)), [7]);
    let found = tree.walk(&mut threads, true);
    assert_eq!(found.namespaces[1].handles, [Handle::Process(52)]);
    assert_eq!(ids(tree.walk(&mut threads, false)), [7, 9]);
    fs::remove_dir_all(tree.0.path().join("50/task/52")).unwrap();
    assert_eq!(ids(tree.walk(&mut threads, false)), [7]);
}

#[test]
fn threads_beyond_the_bound_wait_for_the_next_walk() {
    let tree = Tree::new(7);
    let last = 100 + MAX_LOOKS as u32;
    for tid in 100..=last {
        let netns = if tid == last { 9 } else { 7 };
        let dir = tree.0.path().join(format!("100/task/{tid}/ns"));
        fs::create_dir_all(&dir).unwrap();
        symlink(format!("net:[{netns}]"), dir.join("net")).unwrap();
    }
    tree.process("90", Some(7));
    tree.process("90/task/90", Some(7));
    tree.process("90/task/91", Some(7));
    let mut threads = ThreadSearch::default();
    // 91 is one of those that the first walk looks at.
    for expected in [1, 2, 2] {
        assert_eq!(tree.walk(&mut threads, true).namespaces.len(), expected);
    }
    assert_eq!(threads.last, (100, last - 1), "the third began anew");
}

#[test]
fn a_mount_is_kept_beside_many_processes() {
    let mut finder = Finder::default();
    for pid in 1..=5 {
        finder.note(9, false, Handle::Process(pid));
    }
    for name in ["a", "b"] {
        finder.note(9, false, Handle::Mount(name.into()));
    }
    let mut expected: Vec<_> = [1, 2, 3].map(Handle::Process).to_vec();
    expected.push(Handle::Mount("a".into()));
    assert_eq!(finder.found.namespaces[0].handles, expected);
}

#[test]
fn beyond_the_bound_namespaces_are_counted() {
    let tree = Tree::new(1);
    let mut finder = Finder::default();
    for id in 0..MAX_NAMESPACES as u32 + 10 {
        finder.note(id, false, Handle::Process(id));
        finder.note(id, false, Handle::Process(id + 1));
    }
    assert_eq!(finder.found.namespaces.len(), MAX_NAMESPACES);
    assert_eq!(finder.found.overflow, 10);
    drop(tree);
}

#[test]
fn the_host_is_pid_1_where_it_can_be_read() {
    let tree = Tree::new(7);
    assert_eq!(tree.roots().host().unwrap(), 7);
    assert_eq!(
        tree.roots().host_namespace().unwrap().handles,
        [Handle::Own]
    );
    tree.process("1", Some(5));
    assert_eq!(tree.roots().host().unwrap(), 5);
    let host = tree.roots().host_namespace().unwrap();
    assert_eq!(host.handles, [Handle::Process(1)]);
}

#[test]
fn the_hosts_table_is_recognized_without_its_link() {
    let tree = Tree::new(7);
    tree.process("1", Some(5));
    let table = tree.0.path().join("1/net/tcp");
    fs::write(&table, "").unwrap();
    let roots = tree.roots();
    let host = roots.host_namespace().unwrap();
    fs::remove_file(tree.0.path().join("1/ns/net")).unwrap();
    let home = File::open(tree.0.path()).unwrap();
    let open = || roots.open_table(&host, &Handle::Process(1), Family::V4, &home);
    assert!(open().unwrap().is_some());
    // The old file stays, so that its inode is not reused.
    fs::rename(&table, tree.0.path().join("old")).unwrap();
    fs::write(&table, "").unwrap();
    assert_eq!(open().unwrap_err().kind(), io::ErrorKind::NotFound);
}

#[test]
fn links_and_ranges_parse_or_do_not() {
    assert_eq!(parse_link(b"net:[4026531840]", "net"), Some(4_026_531_840));
    for link in [
        "",
        "net:[]",
        "net:[x]",
        "mnt:[1]",
        "net:[99999999999]",
        "net:[1",
    ] {
        assert_eq!(parse_link(link.as_bytes(), "net"), None, "{link}");
    }
    assert_eq!(parse_port_range("32768\t60999\n"), Some((32768, 60999)));
    for range in ["", "1", "x y", "2 1", "1 70000"] {
        assert_eq!(parse_port_range(range), None, "{range}");
    }
}

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use connmon_common::state;
use connmon_core::event::{LiveSocket, NetnsId, Traffic, Tuple};
use connmon_core::scan::{Row, Trigger};

use crate::reconcile::diag::States;
use crate::reconcile::netns::{Found, Handle, Namespace, Roots};

use super::session::Entry;
use super::*;

/// A tree like `/proc` whose namespace 9 has process 5, and a walker in it.
fn tree() -> (tempfile::TempDir, Session, mpsc::Receiver<WalkMessage>) {
    let tree = tempfile::tempdir().unwrap();
    for (process, netns) in [("self", 7), ("5", 9), ("6", 10)] {
        let dir = tree.path().join(process);
        std::fs::create_dir_all(dir.join("ns")).unwrap();
        std::fs::create_dir_all(dir.join("net")).unwrap();
        let link = format!("net:[{netns}]");
        std::os::unix::fs::symlink(&link, dir.join("ns/net")).unwrap();
        if netns != 10 {
            std::fs::write(dir.join("ns").join(link), "").unwrap();
            std::fs::write(
                dir.join("net/tcp"),
                "  sl  local_address rem_address   st\n",
            )
            .unwrap();
        }
    }
    let options = WalkerOptions {
        force_proc: true,
        roots: Roots {
            proc: tree.path().into(),
            mounts: Vec::new(),
        },
        ..WalkerOptions::default()
    };
    let (sender, receiver) = mpsc::channel(64);
    let (_, begun) = sync::sync_channel(1);
    (
        tree,
        Session::new(options, sender, begun).ok().unwrap(),
        receiver,
    )
}

#[test]
fn a_namespace_whose_processes_ended_is_retried() {
    let (_tree, mut session, mut messages) = tree();
    let walk = Walk {
        trigger: Trigger::Interval,
        traffic: false,
        audit: true,
    };
    let found = Found {
        // 9 has another process by now, 10 has one that is ending, 11 has
        // none.
        namespaces: [9, 10, 11]
            .map(|id| Namespace {
                id,
                surrogate: false,
                table: None,
                handles: vec![Handle::Process(1_000)],
            })
            .to_vec(),
        ..Found::default()
    };
    assert!(session.namespaces(walk, &found).is_ok());
    assert_eq!(ends(&mut messages), [(9, true), (10, false)]);
    assert_eq!(session.summary.unaudited, 1);
}

const SHOWN: u64 = u64::MAX - 7;

/// Delivers a handshake and a connection, or nothing; then fails, or not.
fn scripted(delivers: bool, fails: bool) -> SocketSource {
    Box::new(move |sink| {
        let states = [state::SYN_SENT, state::ESTABLISHED];
        for state in states.into_iter().filter(|_| delivers) {
            let goes_on = sink(LiveSocket {
                state,
                id: SHOWN,
                cookie: SHOWN,
                tuple: Tuple {
                    local: Ipv4Addr::LOCALHOST.into(),
                    local_port: 9,
                    remote: Ipv4Addr::LOCALHOST.into(),
                    remote_port: 9,
                },
                traffic: Some(Traffic::default()),
            });
            assert!(goes_on);
        }
        match fails {
            true => Err(io::ErrorKind::PermissionDenied.into()),
            false => Ok(true),
        }
    })
}

/// Passes in which rows came, and whether of open connections.
type Passes = BTreeSet<(u8, bool)>;

/// Those of an initial scan of the test's own namespace, what the source
/// delivered in it, and whether it is complete.
fn initial_scan(source: SocketSource) -> (Passes, Vec<(u8, Row)>, bool) {
    let (_tree, mut session, mut messages) = tree();
    let walk = Walk {
        trigger: Trigger::Startup,
        traffic: true,
        audit: true,
    };
    let (mut passes, mut shown, mut whole) = (BTreeSet::new(), Vec::new(), false);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            session.options.force_proc = false;
            session.options.source = Some(source);
            session.startup = true;
            session.outbox.begin_walk(walk, false);
            let own = Namespace {
                id: 7,
                surrogate: false,
                table: None,
                handles: Vec::new(),
            };
            let Entry::Open(entered) = session.enter(&own) else {
                panic!("the own namespace cannot be read");
            };
            assert!(session.read(walk, &own, entered).is_ok());
        });
        while let Some(message) = messages.blocking_recv() {
            match message {
                WalkMessage::Rows { pass, rows } => {
                    passes.extend(rows.iter().map(|row| (pass, States::OPEN.has(row.state))));
                    let rows = rows.into_iter().filter(|row| row.cookie == SHOWN);
                    shown.extend(rows.map(|row| (pass, row)));
                }
                WalkMessage::NamespaceEnd { complete, .. } => whole = complete,
                _ => {}
            }
        }
    });
    (passes, shown, whole)
}

#[test]
fn a_scan_makes_a_second_pass_needless() {
    let (passes, shown, whole) = initial_scan(scripted(true, false));
    assert!(whole && passes.iter().all(|(pass, _)| *pass == 0));
    let seen = shown
        .iter()
        .map(|(pass, row)| (*pass, row.state, row.traffic.is_some()));
    // No counters before a connection is open, as in a dump.
    let expected = [(0, state::SYN_SENT, false), (0, state::ESTABLISHED, true)];
    assert!(seen.eq(expected), "{shown:?}");
}

#[test]
fn two_dumps_replace_a_scan_that_broke_off() {
    // So that the dumps have something to show.
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let _client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    for shows in [true, false] {
        let (passes, shown, whole) = initial_scan(scripted(shows, true));
        // Rows count in pass 0, and each socket is to count once.
        let first: BTreeSet<bool> = passes
            .iter()
            .filter(|(pass, _)| *pass == 0)
            .map(|(_, is_open)| *is_open)
            .collect();
        assert!(first.contains(&true), "{passes:?}");
        assert!(passes.contains(&(1, true)) && whole);
        assert_eq!(shown.len(), if shows { 2 } else { 0 });
    }
}

#[test]
fn the_host_is_read_when_its_link_cannot_be() {
    let (tree, session, _) = tree();
    let first = tree.path().join("1");
    for part in ["ns", "net"] {
        std::fs::create_dir_all(first.join(part)).unwrap();
    }
    std::os::unix::fs::symlink("net:[9]", first.join("ns/net")).unwrap();
    std::fs::copy(tree.path().join("5/net/tcp"), first.join("net/tcp")).unwrap();
    let options = WalkerOptions {
        all_netns: false,
        ..session.options
    };
    let (sender, mut messages) = mpsc::channel(64);
    let (_, begun) = sync::sync_channel(1);
    let mut session = Session::new(options, sender, begun).ok().unwrap();
    std::fs::remove_file(first.join("ns/net")).unwrap();
    let walk = Walk {
        trigger: Trigger::Interval,
        traffic: false,
        audit: true,
    };
    let found = session.find(true).unwrap();
    assert!(session.namespaces(walk, &found).is_ok());
    assert_eq!(ends(&mut messages), [(9, true)]);
}

/// Which namespaces a walk named, and whether it read all of them.
fn ends(messages: &mut mpsc::Receiver<WalkMessage>) -> Vec<(NetnsId, bool)> {
    let mut ends = Vec::new();
    while let Ok(message) = messages.try_recv() {
        if let WalkMessage::NamespaceEnd {
            netns, complete, ..
        } = message
        {
            ends.push((netns, complete));
        }
    }
    ends
}

#[test]
fn walks_take_half_a_percent_of_a_core() {
    assert_eq!(rest_after(0), Duration::ZERO);
    assert_eq!(rest_after(1_000_000_000), Duration::from_secs(200));
    assert!(rest_after(u64::MAX) > Duration::from_secs(200));
}

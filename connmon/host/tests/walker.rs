//! The walker on the running kernel, compared with what `ss` shows in namespaces
//! made for it, and with what the test itself did.

#[path = "../../tests/namespaces/mod.rs"]
mod namespaces;

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use connmon_core::event::{LiveSocket, SYN_BYTES, Traffic};
use connmon_core::scan::{Access, Row, Trigger, Walk, WalkMessage, WalkSummary};
use connmon_host::kernel::AttachChoice;
use connmon_host::kernel::{SocketWalk, Tracer, TracerOptions, kernel_version};
use connmon_host::reconcile::{WalkMessages, Walker, WalkerOptions};
use namespaces::{Namespace, ip, may_run, wait_until};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags, capabilities, set_capabilities};

const AUDIT: Walk = Walk {
    trigger: Trigger::Interval,
    traffic: false,
    audit: true,
};
const SAMPLE: Walk = Walk {
    trigger: Trigger::Interval,
    traffic: true,
    audit: false,
};
const LISTENERS: Walk = Walk {
    trigger: Trigger::Interval,
    traffic: false,
    audit: false,
};
const STARTUP: Walk = Walk {
    trigger: Trigger::Startup,
    traffic: true,
    audit: true,
};

#[test]
fn namespaces_read_as_ss_shows_them() {
    if !may_run("namespaces read as ss shows them") {
        return;
    }
    let scenes: Vec<Scene> = (0..3).map(Scene::new).collect();
    for force_proc in [false, true] {
        let mut walker = Handle::new(force_proc, true);
        let seen = walker.walk(AUDIT);
        for scene in &scenes {
            let part = seen.only(scene.namespace.inode());
            let access = if force_proc {
                Access::Proc
            } else {
                Access::Diag
            };
            assert_eq!((part.access, part.complete), (access, true));
            assert_eq!(part.shown(), scene.ss(), "force_proc {force_proc}");
            for row in part.rows.iter().filter(|row| row.state == 10) {
                assert_eq!(row.owner.pid, std::process::id());
                assert_eq!(row.send_queue > 0, !force_proc, "{row:?}");
            }
            let first_other = part.rows.iter().position(|row| row.state != 10).unwrap();
            assert!(first_other > 0, "listeners come first");
        }
        assert_eq!(seen.summary.undecodable, 0);
    }
}

#[test]
fn each_kind_of_walk_reads_what_it_is_for() {
    if !may_run("each kind of walk reads what it is for") {
        return;
    }
    let scene = Scene::new(0);
    let inode = scene.namespace.inode();
    let mut walker = Handle::new(false, true);
    let states = |part: &Part| {
        let mut states: Vec<u8> = part.rows.iter().map(|row| row.state).collect();
        states.sort_unstable();
        states.dedup();
        states
    };
    let audit = walker.walk(AUDIT);
    assert_eq!(states(audit.only(inode)), [1, 2, 3, 5, 8, 10]);
    assert!(
        audit
            .only(inode)
            .rows
            .iter()
            .all(|row| row.traffic.is_none())
    );

    let sample = walker.walk(SAMPLE);
    assert_eq!(states(sample.only(inode)), [1, 5, 8, 10]);
    for row in &sample.only(inode).rows {
        assert_eq!(row.traffic.is_some(), row.state != 10, "{row:?}");
    }

    let listeners = walker.walk(LISTENERS);
    assert_eq!(states(listeners.only(inode)), [10]);
    let backlog: Vec<_> = listeners
        .only(inode)
        .rows
        .iter()
        .filter(|row| row.receive_queue > 0)
        .collect();
    assert_eq!(backlog.len(), 1, "one listener has a connection to accept");
    assert_eq!(backlog[0].receive_queue, 1);
    assert_eq!(
        backlog[0].owner.pid,
        std::process::id(),
        "known since the audit"
    );

    let startup = walker.walk(STARTUP);
    let passes: Vec<_> = startup.parts(inode).collect();
    assert_eq!(passes.len(), 2);
    assert_eq!((passes[0].pass, passes[1].pass), (0, 1));
    assert_eq!(passes[0].shown(), passes[1].shown());
    assert!(passes[0].rows.iter().all(|row| row.traffic.is_none()));
    assert!(passes[1].rows.iter().any(|row| row.traffic.is_some()));

    let mut proc = Handle::new(true, true);
    assert_eq!(states(proc.walk(LISTENERS).only(inode)), [10]);
    assert_eq!(states(proc.walk(AUDIT).only(inode)), [1, 2, 3, 5, 8, 10]);
}

#[test]
fn nothing_is_read_before_begin_is_acknowledged() {
    if !may_run("nothing is read before the beginning is folded") {
        return;
    }
    let namespace = Namespace::new();
    let inode = namespace.inode();
    let mut walker = Handle::new(false, false);
    walker.walker.request(AUDIT).unwrap();
    let begin = walker.messages.blocking_next().unwrap();
    assert!(matches!(begin, WalkMessage::Begin(walk) if walk == AUDIT));
    // Time in which the walker must not read.
    std::thread::sleep(Duration::from_millis(50));
    let _pair = namespace.run(|| pair("127.0.0.1:0"));
    let seen = walker.finish();
    let established = seen.only(inode).rows.iter().filter(|row| row.state == 1);
    assert_eq!(established.count(), 2);
}

#[test]
fn traffic_is_exactly_what_was_moved() {
    if !may_run("traffic is exactly what was moved") {
        return;
    }
    let (namespace, _held, expected) = moved();
    let mut walker = Handle::new(false, false);
    let seen = walker.walk(SAMPLE);
    assert_eq!(traffic_of(seen.only(namespace.inode())), expected);
    for traffic in [true, false] {
        let Some(mut walker) = Handle::of_table("traffic in the socket-table scan") else {
            return;
        };
        let seen = walker.walk(Walk { traffic, ..STARTUP });
        let moved = traffic_of(seen.only(namespace.inode()));
        assert_eq!(
            moved,
            if traffic {
                expected.clone()
            } else {
                Moved::new()
            }
        );
    }
}

/// Bytes sent and received, by local and remote port.
type Moved = BTreeMap<(u16, u16), (usize, usize)>;

/// Connections over which so many bytes went.
fn moved() -> (Namespace, Vec<(TcpListener, TcpStream, TcpStream)>, Moved) {
    let namespace = Namespace::new();
    let mut held = Vec::new();
    let mut expected = BTreeMap::new();
    namespace.run(|| {
        for (address, there, back, half_close) in [
            ("127.0.0.1:0", 0, 0, false),
            ("127.0.0.1:0", 1_000, 0, false),
            ("127.0.0.1:0", 1_000, 0, true),
            ("127.0.0.1:0", 3_000_000, 77, false),
            ("[::1]:0", 1, 500_000, false),
            ("[::1]:0", 12_345, 1, true),
        ] {
            let (listener, mut client, mut server) = pair(address);
            move_bytes(&mut client, &mut server, there);
            move_bytes(&mut server, &mut client, back);
            if half_close {
                client.shutdown(Shutdown::Write).unwrap();
                assert_eq!(server.read(&mut [0]).unwrap(), 0);
            }
            let port = |stream: &TcpStream| stream.local_addr().unwrap().port();
            expected.insert((port(&client), port(&server)), (there, back));
            expected.insert((port(&server), port(&client)), (back, there));
            held.push((listener, client, server));
        }
    });
    (namespace, held, expected)
}

fn traffic_of(part: &Part) -> Moved {
    let mut found = BTreeMap::new();
    for row in &part.rows {
        if let Some(Traffic {
            sent_bytes,
            received_bytes,
            retransmitted_segments,
            srtt_us,
        }) = row.traffic
        {
            // The kernel counts the SYN of whoever connected.
            let listens = part
                .rows
                .iter()
                .any(|other| other.state == 10 && other.tuple.local_port == row.tuple.local_port);
            let sent_bytes = sent_bytes - if listens { 0 } else { SYN_BYTES };
            let bytes = (sent_bytes as usize, received_bytes as usize);
            found.insert((row.tuple.local_port, row.tuple.remote_port), bytes);
            // A starved machine retransmits a few.
            assert!(retransmitted_segments < 100, "{retransmitted_segments}");
            // Both ends measured the handshake or the data.
            assert!(srtt_us > 0 && srtt_us < 1_000_000, "{srtt_us}");
        }
    }
    found
}

/// A thread that moved to a namespace of its own, which nothing else leads to.
#[test]
fn a_namespace_of_a_later_thread_is_read() {
    if !may_run("a namespace of a later thread is read") {
        return;
    }
    let (made, is_made) = mpsc::sync_channel(16);
    let (end, ends) = mpsc::sync_channel::<()>(16);
    let thread = std::thread::spawn(move || {
        #[expect(unsafe_code, reason = "the only way to get a network namespace")]
        // SAFETY: no file descriptors are unshared.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
        ip(&["link", "set", "lo", "up"]);
        let held = pair("127.0.0.1:0");
        let inode = std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino();
        made.send(inode).unwrap();
        let _ = ends.recv();
        drop(held);
    });
    let inode = is_made.recv().unwrap().try_into().unwrap();
    let mut walker = Handle::new(false, true);
    // What an audit has found, the samples after it remember.
    for walk in [AUDIT, SAMPLE] {
        let seen = walker.walk(walk);
        let part = seen.only(inode);
        assert_eq!((part.access, part.complete), (Access::Diag, true));
        let states: Vec<u8> = part.rows.iter().map(|row| row.state).collect();
        assert_eq!(states, [10, 1, 1]);
        assert_eq!(part.rows[0].owner.pid, std::process::id());
    }
    drop(end);
    thread.join().unwrap();
}

#[test]
fn the_table_shows_what_a_dump_shows() {
    if !may_run("the table shows what a dump shows") {
        return;
    }
    let Some(mut walker) = Handle::of_table("the table shows what a dump shows") else {
        return;
    };
    let scenes: Vec<Scene> = (0..2).map(Scene::new).collect();
    let seen = walker.walk(STARTUP);
    for scene in &scenes {
        let part = seen.only(scene.namespace.inode());
        assert_eq!(
            (part.pass, part.access, part.complete),
            (0, Access::Diag, true)
        );
        // The scan has the inodes of listeners only.
        let without = |mut line: String| {
            if !line.starts_with("10 ") {
                line.truncate(line.rfind(' ').unwrap());
            }
            line
        };
        let shown: Vec<String> = scene.ss().into_iter().map(without).collect();
        let seen: Vec<String> = part.shown().into_iter().map(without).collect();
        assert_eq!(seen, shown);
        let first_other = part.rows.iter().position(|row| row.state != 10).unwrap();
        assert!(part.rows[first_other..].iter().all(|row| row.state != 10));
    }
    // Walks after the first are dumps.
    assert_eq!(
        walker.walk(AUDIT).only(scenes[0].namespace.inode()).shown(),
        scenes[0].ss()
    );
}

#[test]
fn namespaces_come_and_go_under_the_walks() {
    if !may_run("namespaces come and go under the walks") {
        return;
    }
    let steady = Namespace::new();
    let _pairs: Vec<_> = (0..50)
        .map(|_| steady.run(|| pair("127.0.0.1:0")))
        .collect();
    let stop = AtomicBool::new(false);
    let stop_on_panic = StopOnDrop(&stop);
    let (walks, made) = std::thread::scope(|scope| {
        let stop_on_panic = stop_on_panic;
        let churn = scope.spawn(|| {
            let mut made = 0_u32;
            while !stop.load(Ordering::Relaxed) {
                let brief = Namespace::new();
                let resident = brief.resident();
                let pair = brief.run(|| pair("[::1]:0"));
                drop(brief); // the name; the process and the sockets keep it
                drop(resident);
                drop(pair);
                made += 1;
            }
            made
        });
        let mut walks = 0_u32;
        let until = Instant::now() + Duration::from_secs(3);
        for force_proc in [false, true] {
            let mut walker = Handle::new(force_proc, true);
            let half = until - Duration::from_millis(if force_proc { 0 } else { 1_500 });
            while Instant::now() < half {
                for walk in [AUDIT, SAMPLE, STARTUP] {
                    let seen = walker.walk(walk);
                    walks += 1;
                    for part in seen.parts(steady.inode()) {
                        let established = part.rows.iter().filter(|row| row.state == 1).count();
                        let expected = if force_proc && walk == SAMPLE { 0 } else { 100 };
                        assert_eq!((established, part.complete), (expected, true));
                    }
                    assert!(seen.parts(steady.inode()).count() > 0);
                }
            }
        }
        drop(stop_on_panic);
        (walks, churn.join().unwrap())
    });
    println!("{walks} walks over {made} short-lived namespaces");
    assert!(walks > 6 && made > 6, "{walks} walks, {made} namespaces");
}

/// Without any capability: other namespaces by `/proc/<pid>/net/tcp`, each
/// once however many processes are in it.
#[test]
fn unprivileged_each_namespace_is_read_once_by_proc() {
    if !may_run("an unprivileged walker reads /proc once per namespace") {
        return;
    }
    let scenes: Vec<Scene> = (0..2).map(Scene::new).collect();
    let residents: Vec<_> = scenes
        .iter()
        .flat_map(|scene| (0..3).map(|_| scene.namespace.resident()))
        .collect();
    let directory = tempfile::tempdir().unwrap();
    let executable = directory.path().join("test");
    // By another process: a copy of our own would be open for writing in
    // whatever the other tests fork meanwhile, and execve would refuse it.
    let copied = Command::new("cp")
        .args([&std::env::current_exe().unwrap(), &executable])
        .status()
        .unwrap();
    assert!(copied.success());
    let open = std::fs::Permissions::from_mode(0o755);
    std::fs::set_permissions(directory.path(), open.clone()).unwrap();
    std::fs::set_permissions(&executable, open).unwrap();
    let output = Command::new(&executable)
        .args(["--exact", "unprivileged_child", "--ignored", "--nocapture"])
        .uid(NOBODY)
        .gid(NOBODY)
        .current_dir("/")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");

    let surrogates: Vec<u64> = [0, 3]
        .map(|first: usize| {
            let table = format!("/proc/{}/net/tcp", residents[first].pid());
            std::fs::metadata(table).unwrap().ino()
        })
        .to_vec();
    assert_ne!(surrogates[0], surrogates[1]);
    for (scene, surrogate) in scenes.iter().zip(surrogates) {
        let head = format!("namespace {surrogate} Proc true");
        assert_eq!(text.matches(&head).count(), 1, "{head}\n{text}");
        let body = text.split(&head).nth(1).unwrap();
        let rows: Vec<&str> = body
            .lines()
            .skip(1)
            .take_while(|line| line.starts_with("row "))
            .map(|line| &line[4..])
            .collect();
        assert_eq!(rows, scene.ss());
    }
    let own = std::fs::metadata("/proc/self/ns/net").unwrap().ino();
    assert!(
        text.contains(&format!("namespace {own} Diag true")),
        "{text}"
    );
    assert!(
        text.contains("CAP_SYS_"),
        "the reason names the remedy: {text}"
    );
}

/// Run by the test above as uid 65534.
#[test]
#[ignore = "run by another test, as another user"]
fn unprivileged_child() {
    assert_eq!(rustix::process::geteuid().as_raw(), NOBODY);
    let seen = Handle::new(false, true).walk(AUDIT);
    println!();
    for part in &seen.parts {
        println!(
            "namespace {} {:?} {}",
            part.netns, part.access, part.complete
        );
        for row in part.shown() {
            println!("row {row}");
        }
    }
    println!("{:?}", seen.summary);
    assert!(seen.summary.surrogates >= 2);
}

#[test]
fn the_host_alone_is_the_host_alone() {
    let (walker, messages) = Walker::spawn(WalkerOptions {
        all_netns: false,
        ..WalkerOptions::default()
    })
    .unwrap();
    let mut walker = Handle { walker, messages };
    let seen = walker.walk(AUDIT);
    assert_eq!(seen.parts.len(), 1);
    assert_eq!(seen.summary.diag + seen.summary.proc, 1);
    assert_eq!(seen.summary.unaudited, 0);
}

/// As in a container with the host's processes and a network of its own.
#[test]
fn the_host_stays_the_host_without_capabilities() {
    let what = "the host stays the host without capabilities";
    if !may_run(what) {
        return;
    }
    if let Err(error) = std::fs::metadata("/proc/1/ns/net") {
        // Root or not: the kernel asks for every capability that pid 1 has.
        println!(
            "not applicable: {what}: the namespace of pid 1 cannot be read: /proc/1/ns/net: {error}"
        );
        return;
    }
    let executable = std::env::current_exe().unwrap();
    let text = Namespace::new().output(&[
        executable.to_str().unwrap(),
        "--exact",
        "host_child",
        "--ignored",
        "--nocapture",
    ]);
    assert!(text.contains("1 passed"), "{text}");
}

/// Run by the test above in another namespace.
#[test]
#[ignore = "run by another test, in another namespace"]
fn host_child() {
    let [own, host] = ["self", "1"].map(|process| {
        let file = std::fs::metadata(format!("/proc/{process}/ns/net")).unwrap();
        u32::try_from(file.ino()).unwrap()
    });
    assert_ne!(own, host);
    let options = WalkerOptions {
        all_netns: false,
        listeners: false,
        ..WalkerOptions::default()
    };
    let (walker, messages) =
        Walker::spawn_after(options, || drop_capabilities(CapabilitySet::all())).unwrap();
    let seen = Handle { walker, messages }.walk(AUDIT);
    assert_eq!(seen.parts.len(), 1);
    let part = seen.only(host);
    assert_eq!((part.access, part.complete), (Access::Proc, true));
    assert_eq!(seen.summary.unaudited, 0);
}

/// With the privilege to enter namespaces, without that to read processes.
#[test]
fn a_mount_and_a_hidden_process_are_one_namespace() {
    if !may_run("a mount and an unreadable process are one namespace") {
        return;
    }
    let namespace = Namespace::new();
    let resident = namespace.resident();
    let table = std::fs::metadata(format!("/proc/{}/net/tcp", resident.pid())).unwrap();
    let (walker, messages) = Walker::spawn_after(WalkerOptions::default(), || {
        drop_capabilities(CapabilitySet::SYS_PTRACE)
    })
    .unwrap();
    let seen = Handle { walker, messages }.walk(AUDIT);
    assert_eq!(seen.only(namespace.inode()).access, Access::Diag);
    let surrogate = u32::try_from(table.ino()).unwrap();
    assert_eq!(seen.parts(surrogate).count(), 0, "it was read twice");
}

/// For the calling thread alone.
fn drop_capabilities(dropped: CapabilitySet) -> io::Result<()> {
    let left = capabilities(None)?.permitted - dropped;
    let sets = CapabilitySets {
        effective: left,
        permitted: left,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, sets)?)
}

#[test]
fn namespaces_of_dead_test_runs_are_removed() {
    if !may_run("namespaces of dead test runs are removed") {
        return;
    }
    let mut dead = Command::new("true").spawn().unwrap();
    dead.wait().unwrap();
    let name = format!("reconcile-{}-0", dead.id());
    ip(&["netns", "add", &name]);
    let alive = Namespace::new();
    namespaces::remove_those_of_dead_runs();
    let exists = |name: &str| std::path::Path::new("/run/netns").join(name).exists();
    assert_eq!((exists(&name), exists(&alive.name)), (false, true));
}

#[test]
fn the_thread_ends_with_its_handle_or_messages() {
    let (walker, messages) = Walker::spawn(WalkerOptions::default()).unwrap();
    drop(messages);
    walker.request(AUDIT).unwrap();
    walker.join().unwrap();

    let (walker, mut messages) = Walker::spawn(WalkerOptions::default()).unwrap();
    drop(walker);
    assert!(messages.blocking_next().is_none());
}

/// Stops the other thread, also when an assertion fails.
struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

const NOBODY: u32 = 65534;

/// A namespace with a socket of each kind a test can make stay.
struct Scene {
    namespace: Namespace,
    _held: Vec<OwnedFd>,
}

impl Scene {
    fn new(number: u8) -> Self {
        let namespace = Namespace::new();
        let name = &namespace.name;
        // A neighbour whose answers go nowhere: SYN_SENT here, SYN_RECV there.
        let (a, b) = ("10.9.0.1/32", "10.9.0.2/32");
        ip(&[
            "-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1",
        ]);
        let peer = Namespace::new();
        ip(&["-n", name, "link", "set", "v1", "netns", &peer.name]);
        for (space, device, address, other) in [(name, "v0", a, b), (&peer.name, "v1", b, a)] {
            let other_ip = other.trim_end_matches("/32");
            ip(&["-n", space, "address", "add", address, "dev", device]);
            ip(&["-n", space, "link", "set", device, "up"]);
            ip(&["-n", space, "route", "add", other, "dev", device]);
            let nowhere = "02:00:00:00:00:99";
            if device == "v0" {
                ip(&[
                    "-n", space, "neigh", "add", other_ip, "lladdr", nowhere, "dev", device,
                ]);
            }
        }
        let mut held: Vec<OwnedFd> = Vec::new();
        namespace.run(|| {
            for _ in 0..=number {
                for address in ["127.0.0.1", "[::1]", "[::]"] {
                    let listener = TcpListener::bind(format!("{address}:0")).unwrap();
                    let port = listener.local_addr().unwrap().port();
                    let to = if address == "[::]" {
                        "127.0.0.1"
                    } else {
                        address
                    };
                    let (client, server) = connect(&listener, &format!("{to}:{port}"));
                    held.extend([listener.into(), client.into(), server.into()]);
                }
            }
            // Half closed: FIN_WAIT2 and CLOSE_WAIT.
            let (listener, client, mut server) = pair("127.0.0.1:0");
            client.shutdown(Shutdown::Write).unwrap();
            assert_eq!(server.read(&mut [0]).unwrap(), 0);
            held.extend([listener.into(), client.into(), server.into()]);
            // TIME_WAIT, which is nobody's connection any more.
            let (listener, client, mut server) = pair("127.0.0.1:0");
            drop(client);
            assert_eq!(server.read(&mut [0]).unwrap(), 0);
            drop(server);
            held.push(listener.into());
            // A connection nobody accepted.
            let listener = TcpListener::bind("127.0.0.2:0").unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            held.extend([listener.into(), client.into()]);
            // SYN_SENT.
            held.push(connecting(SocketAddr::from((
                Ipv4Addr::new(10, 9, 0, 2),
                9,
            ))));
            // The other end of SYN_RECV.
            held.push(TcpListener::bind("10.9.0.1:7777").unwrap().into());
        });
        peer.run(|| {
            held.push(connecting(SocketAddr::from((
                Ipv4Addr::new(10, 9, 0, 1),
                7777,
            ))))
        });
        let scene = Self {
            namespace,
            _held: held,
        };
        wait_until(|| scene.ss().iter().any(|line| line.starts_with("03 ")));
        scene
    }

    /// What `ss` shows, in the form of [`Part::shown`].
    fn ss(&self) -> Vec<String> {
        let text = self.namespace.output(&["ss", "-tnaeHO"]);
        let mut lines: Vec<String> = text.lines().filter_map(ss_line).collect();
        lines.sort();
        lines
    }
}

fn ss_line(line: &str) -> Option<String> {
    if line.contains("timer:(timewait") {
        return None;
    }
    let mut words = line.split_ascii_whitespace();
    let state = match words.next()? {
        "ESTAB" => 1,
        "SYN-SENT" => 2,
        "SYN-RECV" => 3,
        "FIN-WAIT-1" => 4,
        "FIN-WAIT-2" => 5,
        "CLOSE-WAIT" => 8,
        "LAST-ACK" => 9,
        "LISTEN" => 10,
        "CLOSING" => 11,
        other => panic!("{other}: {line}"),
    };
    let (_receive, _send) = (words.next()?, words.next()?);
    let end = |word: &str| -> (String, String) {
        let (address, port) = word.rsplit_once(':').unwrap();
        let address = address
            .trim_matches(['[', ']'])
            .trim_start_matches("::ffff:");
        (address.into(), port.replace('*', "0"))
    };
    let (mut local, local_port) = end(words.next()?);
    let (mut remote, remote_port) = end(words.next()?);
    for address in [&mut local, &mut remote] {
        if address == "*" {
            *address = "::".into();
        }
    }
    let inode = line.split("ino:").nth(1)?.split_whitespace().next()?;
    Some(format!(
        "{state:02} {local} {local_port} {remote} {remote_port} {inode}"
    ))
}

fn pair(address: &str) -> (TcpListener, TcpStream, TcpStream) {
    let listener = TcpListener::bind(address).unwrap();
    let to = listener.local_addr().unwrap().to_string();
    let (client, server) = connect(&listener, &to);
    (listener, client, server)
}

fn connect(listener: &TcpListener, to: &str) -> (TcpStream, TcpStream) {
    let client = TcpStream::connect(to).unwrap();
    (client, listener.accept().unwrap().0)
}

/// A socket whose connect() does not end.
fn connecting(to: SocketAddr) -> OwnedFd {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).unwrap();
    let error = rustix::net::connect(&socket, &to).unwrap_err();
    assert_eq!(
        error,
        rustix::io::Errno::INPROGRESS,
        "fd {}",
        socket.as_raw_fd()
    );
    socket
}

fn move_bytes(from: &mut TcpStream, to: &mut TcpStream, bytes: usize) {
    std::thread::scope(|scope| {
        scope.spawn(|| from.write_all(&vec![7; bytes]).unwrap());
        to.read_exact(&mut vec![0; bytes]).unwrap();
    });
}

/// `None`, and a printed reason, where nothing can be attached.
fn socket_walk(what: &str) -> Option<SocketWalk> {
    let mut tracer = Tracer::attach(&TracerOptions {
        attach: AttachChoice::Auto,
        ring_buffer_bytes: 4096,
        drop_loopback: false,
        only_netns: None,
        owners: false,
        traffic: true,
        log_level: log::LevelFilter::Info,
    })
    .inspect_err(|error| {
        println!("skipped: {what}: {error}");
        assert!(std::env::var_os("CI").is_none(), "skipped in CI: {error}");
    })
    .ok()?;
    let walk = tracer.socket_walk();
    if let Err(reason) = &walk {
        println!("not applicable: {what}: {reason}");
        let version = kernel_version();
        assert!(((5, 17)..(6, 1)).contains(&version), "{reason}");
    }
    walk.ok()
}

/// A walker and its messages.
struct Handle {
    walker: Walker,
    messages: WalkMessages,
}

/// One walk.
struct Seen {
    parts: Vec<Part>,
    summary: WalkSummary,
}

/// One namespace in one pass. Both passes of a startup walk come in any mixture.
struct Part {
    netns: u32,
    pass: u8,
    rows: Vec<Row>,
    access: Access,
    complete: bool,
}

impl Handle {
    fn new(force_proc: bool, listeners: bool) -> Self {
        let (walker, messages) = Walker::spawn(WalkerOptions {
            force_proc,
            listeners,
            ..WalkerOptions::default()
        })
        .unwrap();
        Self { walker, messages }
    }

    /// One whose initial scan reads the kernel's table.
    fn of_table(what: &str) -> Option<Self> {
        let mut scan = socket_walk(what)?;
        let (walker, messages) = Walker::spawn(WalkerOptions {
            source: Some(Box::new(move |sink: &mut dyn FnMut(LiveSocket) -> bool| {
                scan.read(sink)
            })),
            ..WalkerOptions::default()
        })
        .unwrap();
        Some(Self { walker, messages })
    }

    fn walk(&mut self, walk: Walk) -> Seen {
        self.walker.request(walk).unwrap();
        let begin = self.messages.blocking_next().unwrap();
        assert!(matches!(begin, WalkMessage::Begin(begun) if begun == walk));
        self.finish()
    }

    /// The rest of a walk after its beginning, in the promised order.
    fn finish(&mut self) -> Seen {
        let mut parts: Vec<Part> = Vec::new();
        let mut open = None;
        loop {
            match self.messages.blocking_next().unwrap() {
                WalkMessage::Begin(_) => panic!("a second beginning"),
                WalkMessage::NamespaceBegin {
                    netns,
                    t0_ns,
                    ephemeral,
                    ..
                } => {
                    assert!(open.is_none() && t0_ns > 0 && ephemeral.0 < ephemeral.1);
                    open = Some(parts.len());
                    parts.push(Part::new(netns, 0));
                }
                WalkMessage::Rows { pass, rows } => {
                    let first = open.expect("rows of some namespace");
                    assert!(!rows.is_empty() && rows.len() <= connmon_host::reconcile::BATCH_ROWS);
                    let at = first + usize::from(pass);
                    if at == parts.len() {
                        parts.push(Part::new(parts[first].netns, pass));
                    }
                    parts[at].rows.extend(rows);
                }
                WalkMessage::NamespaceEnd {
                    netns,
                    access,
                    complete,
                } => {
                    for part in &mut parts[open.take().unwrap()..] {
                        assert_eq!(part.netns, netns);
                        (part.access, part.complete) = (access, complete);
                    }
                }
                WalkMessage::End(summary) => {
                    assert!(open.is_none() && summary.duration_ns > 0 && summary.cpu_ns > 0);
                    return Seen { parts, summary };
                }
            }
        }
    }
}

impl Seen {
    fn parts(&self, netns: u32) -> impl Iterator<Item = &Part> {
        self.parts.iter().filter(move |part| part.netns == netns)
    }

    fn only(&self, netns: u32) -> &Part {
        let mut parts = self.parts(netns);
        let part = parts.next().unwrap();
        assert!(parts.next().is_none(), "a namespace was read twice");
        part
    }
}

impl Part {
    fn new(netns: u32, pass: u8) -> Self {
        Self {
            netns,
            pass,
            rows: Vec::new(),
            access: Access::Unaudited,
            complete: false,
        }
    }

    fn shown(&self) -> Vec<String> {
        let mut lines: Vec<String> = self
            .rows
            .iter()
            .map(|row| {
                let tuple = row.tuple;
                format!(
                    "{:02} {} {} {} {} {}",
                    row.state,
                    tuple.local,
                    tuple.local_port,
                    tuple.remote,
                    tuple.remote_port,
                    row.inode
                )
            })
            .collect();
        lines.sort();
        lines
    }
}

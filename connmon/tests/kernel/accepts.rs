//! Who accepts, and when: blocked in accept() before anything was attached,
//! more of them than a kretprobe has instances for, and Fast Open, where it may
//! come before the handshake ends.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, RawFd};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use connmon_common::state::{CLOSE, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, SYN_RECV};
use connmon_core::probe::{Method, Probe};
use connmon_host::kernel::Tracer;
use socket2::{Domain, Socket, Type};

use crate::harness::{PATIENCE, Scrape};
use crate::lives::{Life, active, passive};
use crate::network::{OURS, Qdisc, Sysctl};
use crate::raw;
use crate::scenarios::{FIN_FIRST, FIN_SECOND, NEVER, assert_lives, client, listen, server};
use crate::traffic::{Family, Pair, Server};
use crate::world::{Counts, Outcome, World};

const WAITS: &str = "connmon_port_accept_wait_seconds";
const MISSED: &str = "connmon_probe_missed_runs_total";

/// 64 threads that are blocked in accept() on one listener.
pub struct Blocked {
    /// Stays open, or polling could not see that its children are inbound.
    _listener: TcpListener,
    address: SocketAddr,
    threads: Vec<JoinHandle<TcpStream>>,
}

impl Blocked {
    pub const COUNT: usize = 64;

    pub fn new() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let clones: Vec<_> = (0..Self::COUNT)
            .map(|_| listener.try_clone().unwrap())
            .collect();
        let descriptors: Vec<_> = clones.iter().map(|clone| clone.as_raw_fd()).collect();
        let threads = clones
            .into_iter()
            .map(|listener| std::thread::spawn(move || listener.accept().unwrap().0))
            .collect();
        let until = Instant::now() + PATIENCE;
        while in_accept(&descriptors) < Self::COUNT {
            assert!(Instant::now() < until, "the threads never got to accept()");
            sleep(Duration::from_millis(5));
        }
        Self {
            _listener: listener,
            address,
            threads,
        }
    }
}

/// How many threads sleep in accept4() on one of these descriptors: a thread
/// that runs shows no system call.
fn in_accept(descriptors: &[RawFd]) -> usize {
    let accepts = |text: &str| {
        let mut words = text.split(' ');
        let call: i64 = words.next()?.parse().ok()?;
        let descriptor = RawFd::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
        Some(call == libc::SYS_accept4 && descriptors.contains(&descriptor))
    };
    std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("syscall")).ok())
        .filter(|text| accepts(text) == Some(true))
        .count()
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // Any of them may take any connection.
        let clients: Vec<_> = self
            .threads
            .iter()
            .map(|_| TcpStream::connect(self.address))
            .collect();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        drop(clients);
    }
}

/// Entered before the probes were attached, accept() returns unreported on every
/// rung; what is counted does not depend on it.
pub fn blocked_accepts(world: &mut World<'_>) -> Outcome {
    let blocked = world.blocked.pop().expect("one for each try");
    let port = blocked.address.port();
    let (lives, scrape) = accept_all(world, blocked);
    assert!(passive(&lives).all(|life| life.accepted_by.is_none()));
    if world.accepts_known() {
        assert_eq!(waits(world, &scrape, port).0, 0.0);
    }
    Outcome::Held
}

/// A kretprobe follows so many calls at once (10, or one a processor on a
/// kernel without preemption); further ones return unreported, and the kernel
/// counts them since 6.7. A trampoline follows all but those
/// that preempt its program.
pub fn many_accepts(world: &mut World<'_>) -> Outcome {
    let missed_before = missed(world);
    let blocked = Blocked::new();
    let port = blocked.address.port();
    world.sees_listener(port);
    let (lives, scrape) = accept_all(world, blocked);
    let known = passive(&lives)
        .filter(|life| life.accepted_by.is_some())
        .count();
    let count = Blocked::COUNT;
    let method = world.tracer.as_ref().and_then(accept_method);
    let missed = missed(world);
    match method {
        // Where the kernel preempts within programs, a second run on the same
        // processor is missed, and counted.
        Some(Method::Fexit) => {
            let rise = missed.unwrap_or(0) - missed_before.unwrap_or(0);
            assert_eq!(known + rise as usize, count, "{known} known, {rise} missed");
        }
        Some(Method::Kretprobe) => {
            assert!(known > 0 && known < count, "{known} of {count} known");
            if let (Some(before), Some(now)) = (missed_before, missed) {
                let missed = (now - before) as usize;
                assert!(known + missed >= count, "{known} known, {missed} missed");
            }
            let counted = connmon_host::kernel::kernel_version() >= (6, 7);
            assert_eq!(missed.is_some(), counted);
        }
        _ => assert_eq!(known, 0),
    }
    let (waited, _) = waits(world, &scrape, port);
    let risen = scrape.sum(MISSED, &[("probe", Probe::Accept.label())])
        - world
            .base()
            .sum(MISSED, &[("probe", Probe::Accept.label())]);
    match method {
        Some(Method::Fexit) => {
            assert_eq!(waited + risen, count as f64, "{waited}, {risen} missed");
        }
        Some(Method::Kretprobe) => {
            assert!(waited > 0.0 && waited < count as f64, "{waited} waits");
            match missed {
                Some(_) => assert!(waited + risen >= count as f64, "{waited}, {risen} missed"),
                None => assert!(!scrape.text.contains("missed_runs_total{probe=\"inet_csk")),
            }
        }
        _ => assert_eq!(waited, 0.0),
    }
    Outcome::Held
}

/// Connect and accept through io_uring, in whatever thread it runs them.
pub fn io_uring(world: &mut World<'_>) -> Outcome {
    let mut ring = match raw::Uring::new() {
        Ok(ring) => ring,
        Err(error) => return Outcome::NotApplicable(format!("io_uring: {error}")),
    };
    let listening = listen(world, Family::V4);
    let port = listening.port();
    let address = listening.listener.local_addr().unwrap();
    let (client_end, server_end) = ring.connect(&listening.listener, address).unwrap();
    let mut pair = Pair {
        client: client_end,
        server: server_end,
    };
    pair.exchange(1000, 500);
    world.gauges(port, 1, 1);
    pair.close();
    let lives = world.lives(port, 2);
    assert_lives(
        &lives,
        (1, &client(&FIN_FIRST), 0),
        (1, &server(&FIN_SECOND), 0),
    );
    world.settled(port, Counts::both(1), &[]);
    Outcome::Held
}

/// Missed runs of our own accept program, where the kernel counts them.
fn missed(world: &mut World<'_>) -> Option<u64> {
    let counters = world.tracer.as_mut()?.counters();
    let mut missed = counters.missed.into_iter();
    missed.find_map(|(probe, count)| (probe == Probe::Accept).then_some(count))
}

fn accept_method(tracer: &Tracer) -> Option<Method> {
    let mut rungs = tracer.rungs().iter();
    Some(rungs.find(|rung| rung.probe == Probe::Accept)?.method)
}

/// A connection for every thread, and the end of all.
fn accept_all(world: &mut World<'_>, mut blocked: Blocked) -> (Vec<Life>, Scrape) {
    let port = blocked.address.port();
    let count = Blocked::COUNT as u32;
    let clients: Vec<_> = (0..count)
        .map(|_| TcpStream::connect(blocked.address).unwrap())
        .collect();
    let servers: Vec<_> = blocked
        .threads
        .drain(..)
        .map(|thread| thread.join().unwrap())
        .collect();
    world.gauges(port, count, count);
    drop(clients);
    for mut server in servers {
        assert_eq!(server.read(&mut [0; 16]).unwrap(), 0);
    }
    let lives = world.lives(port, 2 * Blocked::COUNT);
    assert_lives(
        &lives,
        (Blocked::COUNT, &client(&FIN_FIRST), 0),
        (Blocked::COUNT, &server(&FIN_SECOND), 0),
    );
    let scrape = world.settled(port, Counts::both(count), &[]);
    (lives, scrape)
}

/// Where the rung reports accepts, each passive life has an owner.
pub fn each_known(world: &World<'_>, lives: &[Life]) {
    for life in passive(lives) {
        let known = life.accepted_by.is_some();
        assert_eq!(known, world.accepts_known(), "who accepted: {life:?}");
    }
}

/// Accept waits of a port since the scenario began: how many, and seconds.
pub fn waits(world: &World<'_>, scrape: &Scrape, port: u16) -> (f64, f64) {
    let name = port.to_string();
    let risen = |what: &str| {
        let family = format!("{WAITS}_{what}");
        let labels = [("port", name.as_str())];
        scrape.sum(&family, &labels) - world.base().sum(&family, &labels)
    };
    assert_eq!(scrape.has(&format!("{WAITS}_count")), world.accepts_known());
    (risen("count"), risen("sum"))
}

/// Fast Open on both sides, without cookies: client 1 and 4, server 2 and
/// 0x200 (`Documentation/networking/ip-sysctl.rst`).
fn fast_open_server(world: &World<'_>) -> Result<(Server, Sysctl), String> {
    let on = Sysctl::set("ipv4/tcp_fastopen", "519")?;
    let listening = listen(world, Family::V4);
    raw::set_tcp(&listening.listener, raw::TCP_FASTOPEN, 16)
        .map_err(|error| format!("TCP_FASTOPEN: {error}"))?;
    Ok((listening, on))
}

/// `TCPFastOpenPassive`: connections that were opened by data in a SYN.
fn fast_opened() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/netstat").unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let names = lines.next().unwrap().split_whitespace();
    let values = lines.next().unwrap().split_whitespace();
    names
        .zip(values)
        .find(|(name, _)| *name == "TCPFastOpenPassive")
        .and_then(|(_, value)| value.parse().ok())
        .unwrap_or(0)
}

pub fn fast_open(world: &mut World<'_>) -> Outcome {
    let (listening, _on) = match fast_open_server(world) {
        Ok(made) => made,
        Err(reason) => return Outcome::NotApplicable(reason),
    };
    let port = listening.port();
    let before = fast_opened();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let sent = socket
        .send_to_with_flags(b"hello", &listening.address.into(), libc::MSG_FASTOPEN)
        .unwrap();
    assert_eq!(sent, 5);
    fast_open_ends(world, &listening, socket.into(), before);
    world.settled(port, Counts::both(1), &[]);
    Outcome::Held
}

pub fn fast_open_deferred(world: &mut World<'_>) -> Outcome {
    let (listening, _on) = match fast_open_server(world) {
        Ok(made) => made,
        Err(reason) => return Outcome::NotApplicable(reason),
    };
    let port = listening.port();
    let before = fast_opened();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    if let Err(error) = raw::set_tcp(&socket, raw::TCP_FASTOPEN_CONNECT, 1) {
        return Outcome::NotApplicable(format!("TCP_FASTOPEN_CONNECT: {error}"));
    }
    socket.connect(&listening.address.into()).unwrap();
    let mut stream = TcpStream::from(socket);
    // No SYN yet, so nothing is open and nothing has failed.
    sleep(Duration::from_millis(50));
    world.gauges(port, 0, 0);
    stream.write_all(b"hello").unwrap();
    let lives = fast_open_ends(world, &listening, stream, before);
    let known = world.tracer.as_ref().is_some_and(|tracer| {
        tracer
            .rungs()
            .iter()
            .any(|rung| rung.probe.label() == "tcp_connect" && rung.method.label() != "none")
    });
    for life in active(&lives) {
        assert_eq!(life.sent_later, known, "reported by tcp_connect: {life:?}");
    }
    world.settled(port, Counts::both(1), &[]);
    Outcome::Held
}

/// A deferred connect that is closed without a write did not fail, however
/// soon that is; one that finds no port did.
pub fn fast_open_unwritten(world: &mut World<'_>) -> Outcome {
    let (listening, _on) = match fast_open_server(world) {
        Ok(made) => made,
        Err(reason) => return Outcome::NotApplicable(reason),
    };
    let port = listening.port();
    let deferred = || {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        raw::set_tcp(&socket, raw::TCP_FASTOPEN_CONNECT, 1)?;
        Ok::<_, std::io::Error>(socket)
    };
    let address = listening.address.into();
    let held = {
        let _range = Sysctl::set("ipv4/ip_local_port_range", "45001 45001").unwrap();
        let held = listening.pair();
        let socket = match deferred() {
            Ok(socket) => socket,
            Err(error) => return Outcome::NotApplicable(format!("TCP_FASTOPEN_CONNECT: {error}")),
        };
        let error = socket.connect(&address).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::AddrNotAvailable);
        held
    };
    held.reset();
    for (pause, linger) in [(0, None), (20, None), (0, Some(Duration::ZERO))] {
        let socket = deferred().unwrap();
        socket.set_linger(linger).unwrap();
        socket.connect(&address).unwrap();
        sleep(Duration::from_millis(pause));
    }
    let lives = world.lives(port, 6);
    let never: Vec<_> = active(&lives)
        .filter(|life| life.segments == Some(0))
        .collect();
    let shut_down: Vec<_> = never.iter().map(|life| life.shut_down).collect();
    if !lives.is_empty() {
        assert_eq!(shut_down, [false, true, true, true], "{never:#?}");
    }
    for life in never {
        assert_eq!(life.changes, NEVER, "{life:?}");
        assert_eq!(life.error, 0, "{life:?}");
    }
    world.settled(port, Counts::both(1), &[("local", 1)]);
    Outcome::Held
}

fn fast_open_ends(
    world: &mut World<'_>,
    listening: &Server,
    mut stream: TcpStream,
    before: u64,
) -> Vec<Life> {
    let (mut child, _) = listening.listener.accept().unwrap();
    child.read_exact(&mut [0; 5]).unwrap();
    assert_eq!(fast_opened(), before + 1, "the data came with the SYN");
    world.gauges(listening.port(), 1, 1);
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(child.read(&mut [0; 16]).unwrap(), 0);
    drop(child);
    assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
    drop(stream);
    let lives = world.reported_lives(listening.port(), 2);
    assert_lives(
        &lives,
        (1, &client(&FIN_FIRST), 0),
        (1, &server(&FIN_SECOND), 0),
    );
    each_known(world, &lives);
    lives
}

/// A child by Fast Open whose handshake has not ended, and cannot end before
/// `silence` is dropped: the client is elsewhere, and nothing that we send
/// reaches it. Our SYN-ACK is retransmitted for a minute.
struct Early {
    listening: Server,
    client: TcpStream,
    child: TcpStream,
    silence: Qdisc,
}

fn early_child(world: &mut World<'_>) -> Result<Early, String> {
    world.network.routed.clone()?;
    let on = Sysctl::set("ipv4/tcp_fastopen", "519")?;
    let listener = TcpListener::bind((OURS, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let listening = Server { listener, address };
    raw::set_tcp(&listening.listener, raw::TCP_FASTOPEN, 16)
        .map_err(|error| format!("TCP_FASTOPEN: {error}"))?;
    let silence = Qdisc::add(&["loss", "100%"])?;
    let before = fast_opened();
    let client = world.network.at_router(move || {
        let _on = Sysctl::set("ipv4/tcp_fastopen", "519")?;
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        // Or it would wait for the handshake.
        socket.set_nonblocking(true).unwrap();
        let sent = socket.send_to_with_flags(b"hello", &address.into(), libc::MSG_FASTOPEN);
        assert_eq!(sent.map_err(|error| error.to_string())?, 5);
        socket.set_nonblocking(false).unwrap();
        Ok::<_, String>(TcpStream::from(socket))
    })?;
    let (mut child, _) = listening.listener.accept().unwrap();
    child.read_exact(&mut [0; 5]).unwrap();
    assert_eq!(fast_opened(), before + 1, "the data came with the SYN");
    assert_eq!(raw::tcp_info(&child).unwrap().state, SYN_RECV);
    drop(on);
    Ok(Early {
        listening,
        client,
        child,
        silence,
    })
}

/// Accepted before its handshake ended, it has waited for nothing.
pub fn fast_open_early(world: &mut World<'_>) -> Outcome {
    let early = match early_child(world) {
        Ok(early) => early,
        Err(reason) => return Outcome::NotApplicable(reason),
    };
    let (mut client, mut child) = (early.client, early.child);
    let port = early.listening.port();
    drop(early.silence);
    world.gauges(port, 1, 1);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(child.read(&mut [0; 16]).unwrap(), 0);
    drop(child);
    assert_eq!(client.read(&mut [0; 16]).unwrap(), 0);
    drop(client);
    let lives = world.lives(port, 1);
    assert_lives(&lives, (0, &[], 0), (1, &server(&FIN_SECOND), 0));
    each_known(world, &lives);
    let scrape = world.settled(port, Counts::both(1), &[]);
    if world.accepts_known() {
        assert_eq!(waits(world, &scrape, port), (1.0, 0.0));
    }
    Outcome::Held
}

/// Closed before its handshake ended: SYN_RECV → FIN_WAIT1 where close() sends
/// the FIN at once, or else as soon as the handshake ends ("tcp: defer
/// shutdown(SEND_SHUTDOWN) for TCP_SYN_RECV sockets", 6.9 and stable kernels).
pub fn fast_open_closed(world: &mut World<'_>) -> Outcome {
    let early = match early_child(world) {
        Ok(early) => early,
        Err(reason) => return Outcome::NotApplicable(reason),
    };
    let mut client = early.client;
    let port = early.listening.port();
    drop(early.child);
    drop(early.silence);
    assert_eq!(client.read(&mut [0; 16]).unwrap(), 0);
    drop(client);
    let lives = world.lives(port, 1);
    let at_once = [(SYN_RECV, FIN_WAIT1), (FIN_WAIT2, CLOSE)];
    let deferred = [
        (SYN_RECV, ESTABLISHED),
        (ESTABLISHED, FIN_WAIT1),
        (FIN_WAIT2, CLOSE),
    ];
    for life in &lives {
        let went = &life.changes[..];
        assert!(
            !life.active && (went == at_once || went == deferred),
            "{life:?}"
        );
    }
    each_known(world, &lives);
    let scrape = world.settled(port, Counts::both(1), &[]);
    if world.accepts_known() {
        assert_eq!(waits(world, &scrape, port), (1.0, 0.0));
    }
    Outcome::Held
}

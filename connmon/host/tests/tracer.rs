//! The tracer on the running kernel: real sockets in, events out. Needs root
//! and a kernel that allows BPF tracing.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::time::{Duration, Instant};

use connmon_common::state::*;
use connmon_core::event::{Event, SocketId, Traffic, Tuple};
use connmon_core::probe::{Method, Probe};
use connmon_host::kernel::AttachChoice;
use connmon_host::kernel::{Tracer, TracerOptions};

const OPTIONS: TracerOptions = TracerOptions {
    attach: AttachChoice::Auto,
    ring_buffer_bytes: 1 << 20,
    drop_loopback: false,
    only_netns: None,
    owners: true,
    traffic: true,
    log_level: log::LevelFilter::Info,
};

/// `None`, after printing the reason, if this test cannot run here.
fn tracer(options: &TracerOptions) -> Option<Tracer> {
    if !rustix::process::geteuid().is_root() {
        return skipped("not root");
    }
    if options.attach == AttachChoice::Tracepoint && !mount_tracefs() {
        return skipped("tracefs cannot be mounted");
    }
    match Tracer::attach(options) {
        Ok(tracer) => Some(tracer),
        Err(error) => skipped(&error.to_string()),
    }
}

fn skipped<T>(reason: &str) -> Option<T> {
    println!("skipped: tracer: {reason}");
    assert!(std::env::var_os("CI").is_none(), "skipped in CI: {reason}");
    None
}

/// Mounts tracefs where it is missing, for this thread's own mount namespace
/// alone; gone when the thread ends.
fn mount_tracefs() -> bool {
    use rustix::mount::{MountFlags, MountPropagationFlags, mount, mount_change};
    use rustix::thread::UnshareFlags;
    let path = "/sys/kernel/tracing";
    let present = || std::path::Path::new("/sys/kernel/tracing/events/sock").exists();
    if present() {
        return true;
    }
    #[expect(unsafe_code, reason = "the only way to get a mount namespace")]
    // SAFETY: no file descriptors are unshared.
    let unshared = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.is_ok();
    unshared
        && mount_change(
            "/",
            MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
        )
        .is_ok()
        && mount("tracefs", path, "tracefs", MountFlags::empty(), None).is_ok()
        && present()
}

/// Collects events until `done`, or fails after a while.
fn collect(tracer: &mut Tracer, events: &mut Vec<Event>, done: impl Fn(&[Event]) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        while !tracer.drain(1000, |event| events.push(event)).empty {}
        if done(events) {
            return;
        }
        assert!(Instant::now() < deadline, "events do not come: {events:#?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The events of one end of a connection, by its local and remote port.
fn of_socket(events: &[Event], local: u16, remote: u16) -> Vec<Event> {
    let ports = |tuple: &Tuple| (tuple.local_port, tuple.remote_port) == (local, remote);
    let id = events.iter().find_map(|event| match event {
        Event::Open { socket, tuple, .. } if ports(tuple) => Some(socket.id),
        _ => None,
    });
    // The kernel reuses addresses: a life ends with its close.
    let same: Vec<Event> = events
        .iter()
        .filter(|event| id.is_some() && socket_id(event) == id)
        .copied()
        .collect();
    same.split_inclusive(|event| matches!(event, Event::Close { .. }))
        .find(|life| {
            life.iter()
                .any(|event| matches!(event, Event::Open { tuple, .. } if ports(tuple)))
        })
        .map(<[Event]>::to_vec)
        .unwrap_or_default()
}

fn socket_id(event: &Event) -> Option<SocketId> {
    Some(match event {
        Event::Connect { socket, .. }
        | Event::Open { socket, .. }
        | Event::Restore { socket, .. }
        | Event::Change { socket, .. }
        | Event::Close { socket, .. }
        | Event::Listen { socket, .. }
        | Event::Unlisten { socket, .. } => socket.id,
        Event::ConnectSent { id, .. } | Event::Accept { id, .. } => *id,
    })
}

/// (old, new) of each state event; connects and closes included.
fn transitions(events: &[Event]) -> Vec<(u8, u8)> {
    events
        .iter()
        .filter_map(|event| match event {
            Event::Connect { .. } => Some((CLOSE, SYN_SENT)),
            Event::Open { old, new, .. } | Event::Change { old, new, .. } => Some((*old, *new)),
            Event::Close { old, .. } => Some((*old, CLOSE)),
            _ => None,
        })
        .collect()
}

fn traffic(events: &[Event]) -> Traffic {
    events
        .iter()
        .find_map(|event| match event {
            Event::Close { traffic, .. } => *traffic,
            _ => None,
        })
        .expect("a close with stats")
}

fn is_closed(events: &[Event], local: u16, remote: u16) -> bool {
    of_socket(events, local, remote)
        .iter()
        .any(|event| matches!(event, Event::Close { .. }))
}

/// produced = decoded + ring_full, exactly, when the ring is empty. Other
/// sockets of this machine may produce between reading and draining, and a
/// record that is reserved and not submitted yet is counted but not there; so
/// it is tried until it is quiet for a moment.
fn assert_law(tracer: &mut Tracer, events: &mut Vec<Event>) {
    let mut last = None;
    for _ in 0..200 {
        let before = tracer.counters();
        while !tracer.drain(1000, |event| events.push(event)).empty {}
        let after = tracer.counters();
        let accounted = events.len() as u64 + after.ring_full;
        if before == after && after.produced == accounted {
            return;
        }
        last = Some((after, accounted));
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("produced is not what came and what was full: {last:?}");
}

/// Connects, moves 1,000 bytes up and 500 down, closes from the client.
fn fin_close(listener: &TcpListener, to: SocketAddr) -> (u16, u16) {
    let mut client = TcpStream::connect(to).unwrap();
    let (mut server, _) = listener.accept().unwrap();
    let ports = (client.local_addr().unwrap().port(), to.port());
    client.write_all(&[1; 1000]).unwrap();
    let mut buffer = [0; 1000];
    server.read_exact(&mut buffer).unwrap();
    server.write_all(&[2; 500]).unwrap();
    client.read_exact(&mut buffer[..500]).unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    // The FIN is there before the server closes.
    assert_eq!(server.read(&mut buffer).unwrap(), 0);
    drop(server);
    drop(client);
    ports
}

fn every_scenario(options: &TracerOptions, method: Method) {
    let Some(mut tracer) = tracer(options) else {
        return;
    };
    assert_eq!(tracer.rungs().len(), Probe::ALL.len());
    assert_eq!(tracer.rungs()[0].method, method);
    assert!(tracer.traffic_known());
    let mut events = Vec::new();

    // FIN close over IPv4, IPv6, and IPv4 on a dual-stack listener.
    let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut cases = vec![(v4.local_addr().unwrap(), v4)];
    match TcpListener::bind("[::]:0") {
        Ok(dual) => {
            let port = dual.local_addr().unwrap().port();
            let v6 = SocketAddr::new("::1".parse().unwrap(), port);
            cases.push((v6, dual.try_clone().unwrap()));
            // A v4 client of a v6 listener, and a v6 socket to a mapped address.
            let plain = SocketAddr::new("127.0.0.1".parse().unwrap(), port);
            let mapped = SocketAddr::new("::ffff:127.0.0.1".parse().unwrap(), port);
            cases.push((plain, dual.try_clone().unwrap()));
            cases.push((mapped, dual));
        }
        Err(_) => println!("not applicable: IPv6: off on this machine"),
    }
    for (to, listener) in &cases {
        let (client, server) = fin_close(listener, *to);
        collect(&mut tracer, &mut events, |events| {
            is_closed(events, client, server) && is_closed(events, server, client)
        });
        let active = of_socket(&events, client, server);
        assert_eq!(
            transitions(&active),
            [
                (CLOSE, SYN_SENT),
                (SYN_SENT, ESTABLISHED),
                (ESTABLISHED, FIN_WAIT1),
                (FIN_WAIT2, CLOSE)
            ],
            "{to}"
        );
        let passive = of_socket(&events, server, client);
        assert_eq!(
            transitions(&passive),
            [
                (SYN_RECV, ESTABLISHED),
                (ESTABLISHED, CLOSE_WAIT),
                (LAST_ACK, CLOSE)
            ],
            "{to}"
        );
        for (side, is_active, sent, received) in
            [(&active, true, 1000, 500), (&passive, false, 500, 1000)]
        {
            let stats = traffic(side);
            assert_eq!(
                (stats.sent_payload(is_active), stats.received_bytes),
                (sent, received),
                "{to}"
            );
            assert_eq!(stats.retransmitted_segments, 0);
            assert!(stats.srtt_us > 0, "{to}: no round-trip time");
        }
        let expected = to.ip().to_canonical();
        for event in active.iter().chain(&passive) {
            check_addresses(event, expected);
        }
        check_owner(&active);
    }

    // RST with linger 0, from the server.
    let (to, listener) = &cases[0];
    let client = TcpStream::connect(to).unwrap();
    let (server, _) = listener.accept().unwrap();
    set_linger_zero(&server);
    let port = client.local_addr().unwrap().port();
    drop(server);
    collect(&mut tracer, &mut events, |events| {
        is_closed(events, port, to.port()) && is_closed(events, to.port(), port)
    });
    let active = of_socket(&events, port, to.port());
    assert_eq!(transitions(&active).last(), Some(&(ESTABLISHED, CLOSE)));
    assert!(
        matches!(active.last(), Some(Event::Close { error: 104, .. })),
        "{active:?}"
    );
    drop(client);

    // Refused: nobody listens on a port that was just given up.
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let refused = closed.local_addr().unwrap();
    drop(closed);
    assert!(TcpStream::connect(refused).is_err());
    let failure = |events: &[Event]| {
        events.iter().find_map(|event| match event {
            Event::Close {
                tuple,
                old: SYN_SENT,
                error,
                segments_out,
                ..
            } if tuple.remote_port == refused.port() => Some((*error, *segments_out)),
            _ => None,
        })
    };
    collect(&mut tracer, &mut events, |events| failure(events).is_some());
    let (error, segments) = failure(&events).unwrap();
    assert_eq!(error, 111);
    assert!(segments.is_some_and(|count| count >= 1), "{segments:?}");

    // The listener that went.
    let port = refused.port();
    let listened = events
        .iter()
        .filter(|event| matches!(event, Event::Listen { port: p, owner, .. } if *p == port && owner.pid == std::process::id()))
        .count();
    let unlistened = events
        .iter()
        .filter(|event| matches!(event, Event::Unlisten { port: p, .. } if *p == port))
        .count();
    assert_eq!((listened, unlistened), (1, 1));

    assert_law(&mut tracer, &mut events);
    let counters = tracer.counters();
    assert_eq!(counters.ring_full, 0);
}

fn check_addresses(event: &Event, expected: IpAddr) {
    let (Event::Connect { socket, tuple, .. }
    | Event::Open { socket, tuple, .. }
    | Event::Change { socket, tuple, .. }
    | Event::Close { socket, tuple, .. }) = event
    else {
        return;
    };
    assert_eq!(
        (tuple.local, tuple.remote),
        (expected, expected),
        "{event:?}"
    );
    assert_eq!(u64::from(socket.netns), own_netns(), "{event:?}");
}

fn check_owner(active: &[Event]) {
    let Some(Event::Connect { owner, .. }) = active.first() else {
        panic!("no connect: {active:?}");
    };
    assert_eq!(owner.pid, std::process::id());
    // The test runs on a thread of another name.
    let mut name = std::fs::read("/proc/self/comm").unwrap();
    assert_ne!(std::fs::read("/proc/thread-self/comm").unwrap(), name);
    name.pop();
    name.resize(16, 0);
    assert_eq!(owner.comm[..], name);
    assert_ne!(owner.cgroup, 0);
}

fn own_netns() -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/thread-self/ns/net").unwrap().ino()
}

fn set_linger_zero(stream: &TcpStream) {
    rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).unwrap();
}

#[test]
fn tp_btf_sees_every_scenario() {
    every_scenario(&OPTIONS, Method::TpBtf);
}

#[test]
fn the_tracepoint_sees_every_scenario() {
    let options = TracerOptions {
        attach: AttachChoice::Tracepoint,
        ..OPTIONS
    };
    every_scenario(&options, Method::Tracepoint);
}

#[test]
fn filters_hold_in_the_program() {
    let options = TracerOptions {
        drop_loopback: true,
        ..OPTIONS
    };
    let Some(mut tracer) = tracer(&options) else {
        return;
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (client, server) = fin_close(&listener, listener.local_addr().unwrap());
    drop(listener);
    let mut events = Vec::new();
    // The listener is not filtered, and its end comes after all the rest.
    collect(&mut tracer, &mut events, |events| {
        events
            .iter()
            .any(|event| matches!(event, Event::Unlisten { port, .. } if *port == server))
    });
    assert!(of_socket(&events, client, server).is_empty(), "{events:?}");
    assert!(of_socket(&events, server, client).is_empty(), "{events:?}");
    drop(tracer);

    let options = TracerOptions {
        only_netns: Some(1),
        ..OPTIONS
    };
    let Some(mut tracer) = self::tracer(&options) else {
        return;
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    fin_close(&listener, listener.local_addr().unwrap());
    assert_eq!(tracer.counters().produced, 0);
    assert!(tracer.drain(1, |event| panic!("{event:?}")).empty);
}

#[test]
fn a_full_ring_is_counted_exactly() {
    let options = TracerOptions {
        ring_buffer_bytes: 4096,
        ..OPTIONS
    };
    let Some(mut tracer) = tracer(&options) else {
        return;
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    for _ in 0..50 {
        fin_close(&listener, listener.local_addr().unwrap());
    }
    let mut events = Vec::new();
    assert_law(&mut tracer, &mut events);
    let counters = tracer.counters();
    assert!(counters.ring_full > 100, "{counters:?}");
    assert!(counters.produced >= 350, "{counters:?}");
}

#[test]
fn the_reader_is_woken_when_the_ring_fills() {
    let options = TracerOptions {
        ring_buffer_bytes: 1 << 18,
        ..OPTIONS
    };
    let Some(mut tracer) = tracer(&options) else {
        return;
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let readable = |tracer: &Tracer, connections: u32| {
        use rustix::event::{Timespec, epoll};
        // Edge-triggered, as the agent waits.
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let data = epoll::EventData::new_u64(tracer.ring_fd().as_raw_fd() as u64);
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        epoll::add(&epoll, tracer.ring_fd(), data, flags).unwrap();
        let mut events = Vec::with_capacity(1);
        // What is there already does not count as an edge to wait for.
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let buffer = rustix::buffer::spare_capacity(&mut events);
        epoll::wait(&epoll, buffer, Some(&at_once)).unwrap();
        events.clear();
        for _ in 0..connections {
            fin_close(&listener, listener.local_addr().unwrap());
        }
        let soon = Timespec {
            tv_sec: 0,
            tv_nsec: 100_000_000,
        };
        epoll::wait(
            &epoll,
            rustix::buffer::spare_capacity(&mut events),
            Some(&soon),
        )
        .unwrap()
            > 0
    };
    // Others on this machine may fill the ring meanwhile: then once more.
    let quiet = (0..10).any(|_| {
        while !tracer.drain(1000, |_| ()).empty {}
        !readable(&tracer, 2)
    });
    assert!(quiet, "woken by a handful of records");
    assert!(readable(&tracer, 200), "not woken by a full ring");
}

#[test]
fn the_kernel_times_the_programs_when_asked() {
    let Some(mut tracer) = tracer(&OPTIONS) else {
        return;
    };
    tracer.enable_stats().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    fin_close(&listener, listener.local_addr().unwrap());
    let stats = tracer.program_stats();
    assert_eq!(stats[0].program, "state_tp_btf");
    assert!(stats[0].runs >= 10, "{stats:?}");
    assert!(stats[0].run_time_ns > 0, "{stats:?}");
}

/// Accepts come with their owner, and a normal connect costs no second
/// record, on the requested rung.
fn function_probes(attach: AttachChoice, connect: Method, accept: Method) {
    let options = TracerOptions { attach, ..OPTIONS };
    let Some(mut tracer) = tracer(&options) else {
        return;
    };
    for (probe, method) in [(Probe::Connect, connect), (Probe::Accept, accept)] {
        let rung = tracer
            .rungs()
            .iter()
            .find(|rung| rung.probe == probe)
            .unwrap();
        if rung.method == Method::None {
            let reason = rung.reason().unwrap_or_default();
            assert!(!reason.is_empty(), "{rung:?}");
            println!("not applicable: {}: {reason}", method.label());
            assert!(!tracer.accepts_known() || probe != Probe::Accept);
            return;
        }
        assert_eq!(rung.method, method, "{rung:?}");
        println!("attached: {} by {}", probe.label(), method.label());
    }
    assert!(tracer.accepts_known());
    let mut events = Vec::new();
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let Ok(listener) = TcpListener::bind(address) else {
            continue;
        };
        let (client, server) = fin_close(&listener, listener.local_addr().unwrap());
        let accepted = |events: &[Event]| {
            of_socket(events, server, client)
                .into_iter()
                .find_map(|event| match event {
                    Event::Accept { owner, .. } => Some(owner),
                    _ => None,
                })
        };
        collect(&mut tracer, &mut events, |events| {
            accepted(events).is_some() && is_closed(events, server, client)
        });
        let owner = accepted(&events).unwrap();
        assert_eq!(owner.pid, std::process::id());
        assert_ne!(owner.comm, [0; 16]);
        let sent = of_socket(&events, client, server)
            .iter()
            .any(|event| matches!(event, Event::ConnectSent { .. }));
        assert!(!sent, "a normal connect was reported twice");
    }
    deferred_fast_open(&mut tracer, &mut events);
    assert_law(&mut tracer, &mut events);
}

/// TCP_FASTOPEN_CONNECT: connect() returns at once, the SYN leaves with the
/// first write. Needs a cookie of an earlier connection; where there is none
/// the SYN is not put off, so the first attempt fetches one.
fn deferred_fast_open(tracer: &mut Tracer, events: &mut Vec<Event>) {
    let knob = "/proc/sys/net/ipv4/tcp_fastopen";
    let Ok(before) = std::fs::read_to_string(knob) else {
        return;
    };
    if std::fs::write(knob, "0x603").is_err() {
        println!("not applicable: Fast Open: {knob} cannot be written");
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    rustix::net::listen(&listener, 16).unwrap();
    let connect = || {
        use rustix::net::{AddressFamily, SocketType, ipproto, socket, sockopt};
        let fd = socket(AddressFamily::INET, SocketType::STREAM, Some(ipproto::TCP)).unwrap();
        set_fastopen_connect(&fd);
        let _ = sockopt::set_tcp_nodelay(&fd, true);
        rustix::net::connect(&fd, &to).unwrap();
        TcpStream::from(fd)
    };
    let mut client = connect();
    let _ = client.write_all(&[1; 10]);
    let _ = std::fs::write(knob, before);
    let (server, _) = listener.accept().unwrap();
    let port = client.local_addr().unwrap().port();
    drop(client);
    drop(server);
    collect(tracer, events, |events| is_closed(events, port, to.port()));
    let life = of_socket(events, port, to.port());
    assert!(
        life.iter()
            .any(|event| matches!(event, Event::ConnectSent { .. })),
        "{life:?}"
    );
}

/// `TCP_FASTOPEN_CONNECT`, which rustix does not wrap.
fn set_fastopen_connect(socket: &impl std::os::fd::AsFd) {
    const TCP_FASTOPEN_CONNECT: i32 = 30;
    let on: i32 = 1;
    #[expect(unsafe_code, reason = "no wrapper for this option")]
    // SAFETY: `on` is a valid int of the given size for the whole call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_FASTOPEN_CONNECT,
            std::ptr::from_ref(&on).cast(),
            size_of::<i32>() as u32,
        )
    };
    assert_eq!(result, 0);
}

#[test]
fn trampolines_report_accepts() {
    function_probes(AttachChoice::Fentry, Method::Fentry, Method::Fexit);
}

#[test]
fn breakpoints_report_accepts() {
    function_probes(AttachChoice::Kprobe, Method::Kprobe, Method::Kretprobe);
}

/// Keeps what is logged.
struct Kept(std::sync::Mutex<Vec<String>>);

static KEPT: Kept = Kept(std::sync::Mutex::new(Vec::new()));

impl log::Log for Kept {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let line = format!("{} {} {}", record.level(), record.target(), record.args());
        self.0.lock().unwrap().push(line);
    }

    fn flush(&self) {}
}

#[test]
fn the_programs_diagnostics_reach_the_log_at_debug() {
    let options = TracerOptions {
        ring_buffer_bytes: 4096,
        log_level: log::LevelFilter::Debug,
        ..OPTIONS
    };
    log::set_logger(&KEPT).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    for attach in [AttachChoice::Auto, AttachChoice::Tracepoint] {
        let Some(mut tracer) = tracer(&TracerOptions {
            attach,
            ..options.clone()
        }) else {
            return;
        };
        KEPT.0.lock().unwrap().clear();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        for _ in 0..30 {
            fin_close(&listener, listener.local_addr().unwrap());
        }
        tracer.drain(1000, |_| ());
        let lines = KEPT.0.lock().unwrap().clone();
        let full = "DEBUG connmon::kernel::program event ring buffer full";
        assert!(lines.iter().any(|line| line.starts_with(full)), "{lines:?}");
    }
}

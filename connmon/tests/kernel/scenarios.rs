//! What a TCP socket can live through, one function each.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use connmon_common::state::{
    CLOSE, CLOSE_WAIT, CLOSING, ESTABLISHED, FIN_WAIT1, FIN_WAIT2, LAST_ACK, SYN_RECV, SYN_SENT,
};
use socket2::{Domain, Socket, Type};

use crate::harness::{Agent, Scrape};
use crate::lives::{Life, active, passive};
use crate::network::{BEYOND, NOBODY, Sysctl};
use crate::raw;
use crate::traffic::{ClosedPort, Family, Pair, Server};
use crate::world::{CLOSED, Counts, OPENED, Outcome, Rung, World, in_guest};
use crate::{accepts, bytes, host, sockets};

/// Where a scenario is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum On {
    /// On every rung, polling included.
    Every,
    /// On the highest rung alone: it is about the kernel, not about a rung.
    Kernel,
    /// On every rung that traces.
    Traced,
}

impl On {
    pub fn includes(self, rung: Rung) -> bool {
        match self {
            Self::Every => true,
            Self::Kernel => matches!(rung, Rung::Auto | Rung::Fentry),
            Self::Traced => rung != Rung::Proc,
        }
    }
}

pub type Scenario = fn(&mut World<'_>) -> Outcome;

/// In this order; the first ones say what the others stand on.
pub const ALL: &[(&str, On, Scenario)] = &[
    ("attach", On::Every, host::attach),
    ("check", On::Every, host::check),
    ("no-btf", On::Traced, host::no_btf),
    ("tcp-diag", On::Kernel, host::tcp_diag),
    ("socket-walk", On::Kernel, sockets::walk),
    ("socket-walk-churn", On::Kernel, sockets::churn),
    ("sandbox", On::Kernel, host::sandbox),
    ("first-thread-ended", On::Kernel, host::first_thread_ended),
    ("blocked-accepts", On::Every, accepts::blocked_accepts),
    ("many-accepts", On::Every, accepts::many_accepts),
    ("io-uring", On::Every, accepts::io_uring),
    ("fin-client", On::Every, fin_client),
    ("fin-client-v6", On::Every, fin_client_v6),
    ("fin-server", On::Every, fin_server),
    ("simultaneous-open", On::Every, simultaneous_open),
    ("simultaneous-close", On::Every, simultaneous_close),
    ("half-close", On::Every, half_close),
    ("rst-linger-zero", On::Every, rst_linger_zero),
    ("rst-unread-data", On::Every, rst_unread_data),
    ("sock-destroy", On::Every, sock_destroy),
    ("listener-closed", On::Every, listener_closed),
    ("fast-open", On::Every, accepts::fast_open),
    ("fast-open-deferred", On::Every, accepts::fast_open_deferred),
    (
        "fast-open-unwritten",
        On::Every,
        accepts::fast_open_unwritten,
    ),
    ("fast-open-early", On::Traced, accepts::fast_open_early),
    ("fast-open-closed", On::Traced, accepts::fast_open_closed),
    ("refused", On::Every, refused),
    ("refused-v6", On::Every, refused_v6),
    ("timed-out", On::Every, timed_out),
    ("host-unreachable", On::Every, host_unreachable),
    ("network-unreachable", On::Every, network_unreachable),
    ("no-free-port", On::Every, no_free_port),
    ("disconnect", On::Every, disconnect),
    ("restored", On::Traced, restored),
    ("process-name", On::Traced, process_name),
    ("mptcp", On::Every, mptcp),
    ("sctp", On::Every, sctp),
    ("v4-mapped", On::Every, v4_mapped),
    ("v4-mapped-client", On::Every, v4_mapped_client),
    ("nonblocking-closed", On::Every, nonblocking_closed),
    ("nonblocking-succeeds", On::Every, nonblocking_succeeds),
    ("address-reused", On::Every, address_reused),
    ("idle-close", On::Every, idle_close),
    ("bytes", On::Every, bytes::bytes),
    ("bytes-live", On::Kernel, bytes::bytes_live),
    ("sent-queue-drops", On::Traced, bytes::queue_drops),
    ("sent-filter-drops", On::Traced, bytes::filter_drops),
    ("rtt", On::Traced, bytes::rtt),
    ("retransmits", On::Every, bytes::retransmits),
    ("many", On::Every, many),
];

pub const CONNECT: (u8, u8) = (CLOSE, SYN_SENT);
const ACTIVE: (u8, u8) = (SYN_SENT, ESTABLISHED);
pub const PASSIVE: (u8, u8) = (SYN_RECV, ESTABLISHED);
const ABORT: (u8, u8) = (ESTABLISHED, CLOSE);
/// After the birth: the side that sends its FIN first, and the other.
pub const FIN_FIRST: [(u8, u8); 2] = [(ESTABLISHED, FIN_WAIT1), (FIN_WAIT2, CLOSE)];
pub const FIN_SECOND: [(u8, u8); 2] = [(ESTABLISHED, CLOSE_WAIT), (LAST_ACK, CLOSE)];

pub fn client(end: &[(u8, u8)]) -> Vec<(u8, u8)> {
    [&[CONNECT, ACTIVE], end].concat()
}

pub fn server(end: &[(u8, u8)]) -> Vec<(u8, u8)> {
    [&[PASSIVE], end].concat()
}

/// A listener. Polling derives directions from listeners, so one that is polled
/// must be seen before its first child is.
pub fn listen(world: &World<'_>, family: Family) -> Server {
    let server = Server::new(family);
    world.sees_listener(server.port());
    server
}

/// Every active and every passive life went this way and ended with this
/// error.
pub fn assert_lives(
    lives: &[Life],
    clients: (usize, &[(u8, u8)], u32),
    servers: (usize, &[(u8, u8)], u32),
) {
    if lives.is_empty() {
        return;
    }
    assert_eq!(active(lives).count(), clients.0, "{lives:#?}");
    assert_eq!(passive(lives).count(), servers.0, "{lives:#?}");
    for life in lives {
        let (_, changes, error) = if life.active { clients } else { servers };
        assert_eq!(life.changes, changes, "{life:?}");
        assert_eq!(life.error, error, "{life:?}");
    }
}

fn fin_client(world: &mut World<'_>) -> Outcome {
    fin_by_client(world, Family::V4);
    Outcome::Held
}

fn fin_client_v6(world: &mut World<'_>) -> Outcome {
    fin_by_client(world, Family::V6);
    Outcome::Held
}

fn fin_by_client(world: &mut World<'_>, family: Family) {
    const WAIT: Duration = Duration::from_millis(200);
    let listening = listen(world, family);
    let port = listening.port();
    let client_end = listening.connect();
    // It lies in the accept queue.
    sleep(WAIT);
    let (server_end, _) = listening.listener.accept().unwrap();
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
    accepts::each_known(world, &lives);
    let scrape = world.settled(port, Counts::both(1), &[]);
    if !world.traced() {
        return;
    }
    let (count, sum) = accepts::waits(world, &scrape, port);
    assert_eq!(count, f64::from(u8::from(world.accepts_known())));
    assert!(count == 0.0 || sum >= WAIT.as_secs_f64(), "{sum} s");
    times(world, &scrape);
}

/// Since the scenario began, each connect that succeeded has a latency, each
/// accept that is known a wait, and each close a duration. Scrapes are
/// connections too.
fn times(world: &World<'_>, scrape: &Scrape) {
    let risen = |family: &str, labels: &[(&str, &str)]| {
        scrape.sum(family, labels) - world.base().sum(family, labels)
    };
    let connected = risen(OPENED, &[("direction", "outbound")]);
    let latencies = risen("connmon_connect_latency_seconds_count", &[]);
    let by_country = risen("connmon_country_connect_latency_seconds_count", &[]);
    let waits = risen("connmon_accept_wait_seconds_count", &[]);
    let by_port = risen("connmon_port_accept_wait_seconds_count", &[]);
    assert!(latencies >= 1.0 && latencies == by_country && waits == by_port);
    for direction in ["inbound", "outbound"] {
        let labels = [("direction", direction)];
        let durations = risen("connmon_connection_duration_seconds_count", &labels);
        let closed = risen(CLOSED, &labels);
        assert!(durations >= 1.0, "{direction}");
        // Elsewhere connections from before the agent's start end as well.
        assert!(durations == closed || !in_guest(), "{durations} {closed}");
    }
    assert!(latencies == connected || !in_guest());
}

fn fin_server(world: &mut World<'_>) -> Outcome {
    let listening = listen(world, Family::V4);
    let port = listening.port();
    let mut pair = listening.pair();
    world.gauges(port, 1, 1);
    pair.server.shutdown(Shutdown::Write).unwrap();
    assert_eq!(pair.client.read(&mut [0; 16]).unwrap(), 0);
    drop(pair.client);
    assert_eq!(pair.server.read(&mut [0; 16]).unwrap(), 0);
    drop(pair.server);
    let lives = world.lives(port, 2);
    assert_lives(
        &lives,
        (1, &client(&FIN_SECOND), 0),
        (1, &server(&FIN_FIRST), 0),
    );
    world.settled(port, Counts::both(1), &[]);
    Outcome::Held
}

/// A socket connected to itself: its SYN meets it in SYN_SENT.
fn to_itself() -> TcpStream {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    socket.bind(&any.into()).unwrap();
    let own = socket.local_addr().unwrap();
    socket.connect(&own).unwrap();
    socket.into()
}

fn simultaneous_open(world: &mut World<'_>) -> Outcome {
    let stream = to_itself();
    let port = stream.local_addr().unwrap().port();
    if world.traced() {
        world.gauges(port, 0, 1);
    }
    let socket = Socket::from(stream);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    drop(socket);
    let lives = world.lives(port, 1);
    assert_lives(
        &lives,
        (1, &[CONNECT, (SYN_RECV, ESTABLISHED), ABORT], 0),
        (0, &[], 0),
    );
    world.settled(port, Counts::sides(0, 1), &[]);
    Outcome::Held
}

fn simultaneous_close(world: &mut World<'_>) -> Outcome {
    let stream = to_itself();
    let port = stream.local_addr().unwrap().port();
    // Its FIN meets it in FIN_WAIT1.
    stream.shutdown(Shutdown::Write).unwrap();
    drop(stream);
    let lives = world.lives(port, 1);
    let end = [(ESTABLISHED, FIN_WAIT1), (CLOSING, CLOSE)];
    let changes = [&[CONNECT, (SYN_RECV, ESTABLISHED)], &end[..]].concat();
    assert_lives(&lives, (1, &changes, 0), (0, &[], 0));
    world.settled(port, Counts::sides(0, 1), &[]);
    Outcome::Held
}

fn half_close(world: &mut World<'_>) -> Outcome {
    let listening = listen(world, Family::V4);
    let port = listening.port();
    let mut pair = listening.pair();
    world.gauges(port, 1, 1);
    pair.client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(pair.server.read(&mut [0; 16]).unwrap(), 0);
    // Not ESTABLISHED on either side, and not closed: one still sends.
    for _ in 0..5 {
        pair.server.write_all(&[7; 1000]).unwrap();
        pair.client.read_exact(&mut [0; 1000]).unwrap();
        sleep(Duration::from_millis(100));
        world.gauges(port, 0, 0);
    }
    if world.traced() {
        let scrape = world.agent.scrape();
        let tracked = scrape.sum("connmon_tracked_connections", &[]);
        assert!(tracked >= 2.0, "{tracked} tracked");
    }
    drop(pair.server);
    assert_eq!(pair.client.read(&mut [0; 16]).unwrap(), 0);
    drop(pair.client);
    let lives = world.lives(port, 2);
    assert_lives(
        &lives,
        (1, &client(&FIN_FIRST), 0),
        (1, &server(&FIN_SECOND), 0),
    );
    world.settled(port, Counts::both(1), &[]);
    Outcome::Held
}

const RESET: u32 = libc::ECONNRESET as u32;

fn rst_linger_zero(world: &mut World<'_>) -> Outcome {
    let listening = listen(world, Family::V4);
    let port = listening.port();
    let pair = listening.pair();
    world.gauges(port, 1, 1);
    pair.reset();
    let lives = world.lives(port, 2);
    // The kernel sets the error of the resetting side after the event.
    assert_lives(
        &lives,
        (1, &client(&[ABORT]), 0),
        (1, &server(&[ABORT]), RESET),
    );
    world.settled(port, Counts::both(1), &[]);
    Outcome::Held
}

fn rst_unread_data(world: &mut World<'_>) -> Outcome {
    let listening = listen(world, Family::V4);
    let port = listening.port();
    let mut pair = listening.pair();
    pair.client.write_all(b"never read").unwrap();
    wait_readable(&pair.server);
    drop(pair.server);
    let error = pair.client.read(&mut [0; 16]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    drop(pair.client);
    let lives = world.lives(port, 2);
    assert_lives(
        &lives,
        (1, &client(&[ABORT]), RESET),
        (1, &server(&[ABORT]), 0),
    );
    world.settled(port, Counts::both(1), &[]);
    Outcome::Held
}

fn wait_readable(stream: &TcpStream) {
    assert_ne!(stream.peek(&mut [0]).unwrap(), 0);
}

fn sock_destroy(world: &mut World<'_>) -> Outcome {
    let listening = listen(world, Family::V4);
    let port = listening.port();
    let mut pair = listening.pair();
    world.gauges(port, 1, 1);
    let output = Command::new("ss")
        .args(["-KHtn", &format!("dport = :{port}")])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    pair.client.set_nonblocking(true).unwrap();
    let destroyed = match pair.client.read(&mut [0; 16]) {
        Err(error) => error.kind() == ErrorKind::ConnectionAborted,
        Ok(_) => true,
    };
    if !destroyed {
        // Built without INET_DIAG_DESTROY: `ss` lists what it would kill.
        pair.reset();
        world.lives(port, 2);
        return Outcome::NotApplicable(format!("ss -K destroys nothing here {said}"));
    }
    assert!(pair.server.read(&mut [0; 16]).is_err());
    drop(pair);
    let aborted = libc::ECONNABORTED as u32;
    let lives = world.lives(port, 2);
    assert_lives(
        &lives,
        (1, &client(&[ABORT]), aborted),
        (1, &server(&[ABORT]), RESET),
    );
    world.settled(port, Counts::both(1), &[]);
    Outcome::Held
}

fn listener_closed(world: &mut World<'_>) -> Outcome {
    const CHILDREN: usize = 5;
    let listening = listen(world, Family::V4);
    let port = listening.port();
    let mut clients: Vec<_> = (0..CHILDREN).map(|_| listening.connect()).collect();
    world.gauges(port, 5, 5);
    drop(listening);
    for stream in &mut clients {
        assert!(stream.read(&mut [0; 16]).is_err());
    }
    drop(clients);
    let lives = world.lives(port, 2 * CHILDREN);
    assert_lives(
        &lives,
        (CHILDREN, &client(&[ABORT]), RESET),
        (CHILDREN, &server(&[ABORT]), 0),
    );
    assert!(passive(&lives).all(|life| life.accepted_by.is_none()));
    world.settled(port, Counts::both(5), &[]);
    Outcome::Held
}

fn refused(world: &mut World<'_>) -> Outcome {
    refused_by(world, Family::V4)
}

fn refused_v6(world: &mut World<'_>) -> Outcome {
    refused_by(world, Family::V6)
}

pub const NEVER: [(u8, u8); 2] = [CONNECT, (SYN_SENT, CLOSE)];

fn refused_by(world: &mut World<'_>, family: Family) -> Outcome {
    let closed = ClosedPort::new(family);
    let port = closed.address().port();
    closed.refused();
    let lives = world.lives(port, 1);
    assert_lives(&lives, (1, &NEVER, libc::ECONNREFUSED as u32), (0, &[], 0));
    world.settled(port, Counts::default(), &[("refused", 1)]);
    Outcome::Held
}

/// A listener that drops every SYN: its queue of one is full. The second is
/// the connection that fills it.
fn deaf() -> (Server, TcpStream) {
    let listening = Server::with_backlog(Family::V4, 0);
    let filler = listening.connect();
    (listening, filler)
}

/// Ends the one connection of a deaf listener, the client's end first.
fn end_deaf((listening, filler): (Server, TcpStream)) {
    let (mut server, _) = listening.listener.accept().unwrap();
    drop(filler);
    assert_eq!(server.read(&mut [0; 16]).unwrap(), 0);
}

/// The one life that never opened; the filler's two are as they should be.
fn unopened(lives: &[Life]) -> Option<&Life> {
    if lives.is_empty() {
        return None;
    }
    let mut never = lives
        .iter()
        .filter(|life| life.active && life.changes.get(1) != Some(&ACTIVE));
    let life = never.next().expect("a life that never opened");
    assert_eq!(never.count(), 0, "{lives:#?}");
    assert_eq!(life.changes, NEVER, "{life:?}");
    Some(life)
}

fn timed_out(world: &mut World<'_>) -> Outcome {
    let deaf = deaf();
    let port = deaf.0.port();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    raw::set_tcp(&socket, raw::TCP_SYNCNT, 1).unwrap();
    let error = socket.connect(&deaf.0.address.into()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut);
    drop(socket);
    end_deaf(deaf);
    let lives = world.lives(port, 3);
    if let Some(life) = unopened(&lives) {
        assert_eq!(life.error, libc::ETIMEDOUT as u32, "{life:?}");
    }
    world.settled(port, Counts::both(1), &[("timeout", 1)]);
    Outcome::Held
}

fn host_unreachable(world: &mut World<'_>) -> Outcome {
    unreachable(world, NOBODY, libc::EHOSTUNREACH, "host_unreachable")
}

fn network_unreachable(world: &mut World<'_>) -> Outcome {
    unreachable(world, BEYOND, libc::ENETUNREACH, "network_unreachable")
}

fn unreachable(world: &mut World<'_>, address: &str, errno: i32, reason: &str) -> Outcome {
    if let Err(reason) = &world.network.routed {
        return Outcome::NotApplicable(reason.clone());
    }
    const PORT: u16 = 4777;
    let to = SocketAddr::new(address.parse().unwrap(), PORT);
    let error = TcpStream::connect(to).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(errno), "{error}");
    let lives = world.lives(PORT, 1);
    assert_lives(&lives, (1, &NEVER, errno.unsigned_abs()), (0, &[], 0));
    world.settled(PORT, Counts::default(), &[(reason, 1)]);
    Outcome::Held
}

fn no_free_port(world: &mut World<'_>) -> Outcome {
    let listening = listen(world, Family::V4);
    let port = listening.port();
    let (held, error) = {
        let _range = Sysctl::set("ipv4/ip_local_port_range", "45001 45001").unwrap();
        let held = listening.pair();
        (held, TcpStream::connect(listening.address).unwrap_err())
    };
    assert_eq!(error.kind(), ErrorKind::AddrNotAvailable);
    held.reset();
    let lives = world.lives(port, 3);
    if let Some(life) = unopened(&lives) {
        assert_eq!((life.error, life.segments), (0, Some(0)), "{life:?}");
    }
    world.settled(port, Counts::both(1), &[("local", 1)]);
    Outcome::Held
}

fn disconnect(world: &mut World<'_>) -> Outcome {
    let listening = listen(world, Family::V4);
    let port = listening.port();
    let mut pair = listening.pair();
    world.gauges(port, 1, 1);
    raw::disconnect(&pair.client).unwrap();
    assert!(pair.server.read(&mut [0; 16]).is_err());
    drop(pair.server);
    // The same socket once more, which is another connection.
    let socket = Socket::from(pair.client);
    socket.connect(&listening.address.into()).unwrap();
    let (server_again, _) = listening.listener.accept().unwrap();
    world.gauges(port, 1, 1);
    Pair {
        client: socket.into(),
        server: server_again,
    }
    .reset();
    let lives = world.lives(port, 4);
    assert_lives(
        &lives,
        (2, &client(&[ABORT]), 0),
        (2, &server(&[ABORT]), RESET),
    );
    let ids: Vec<_> = active(&lives).map(|life| life.id).collect();
    assert!(ids.windows(2).all(|pair| pair[0] == pair[1]), "{ids:?}");
    world.settled(port, Counts::both(2), &[]);
    Outcome::Held
}

/// A connection that is taken out of its sockets and put into others
/// (`TCP_REPAIR`) is not counted as opened: it exists, as one from before start.
fn restored(world: &mut World<'_>) -> Outcome {
    const DURATION: &str = "connmon_connection_duration_seconds_count";
    const CORRECTIONS: &str = "connmon_reconcile_corrections_total";
    let mut args = world.rung.args();
    args.extend(["--reconcile.interval", "1s"]);
    let agent = Agent::start(&args);
    let base = agent.scrape();
    let listening = listen(world, Family::V4);
    let port = listening.port();
    let pair = listening.pair();
    let client_port = pair.client.local_addr().unwrap().port();
    let [client, server] = match [pair.client, pair.server].map(raw::Dumped::take) {
        [Ok(client), Ok(server)] => [client, server],
        [Err(error), _] | [_, Err(error)] => {
            return Outcome::NotApplicable(format!("TCP_REPAIR: {error}"));
        }
    };
    let mut pair = Pair {
        client: client.restore().unwrap(),
        server: server.restore().unwrap(),
    };
    raw::end_repair(&pair.client).unwrap();
    raw::end_repair(&pair.server).unwrap();
    pair.exchange(1000, 500);
    let both = |scrape: &Scrape, family: &str, count: f64| {
        ["inbound", "outbound"]
            .iter()
            .all(|direction| scrape.port(family, port, direction) == count)
    };
    // The listener shows what an audit cannot see.
    let is_there = |scrape: &Scrape| {
        both(scrape, "connmon_port_connections", 1.0) && both(scrape, OPENED, 1.0)
    };
    agent.until("the restored connection", is_there);
    pair.close();
    let is_over = |scrape: &Scrape| {
        both(scrape, "connmon_port_connections", 0.0) && both(scrape, CLOSED, 2.0)
    };
    let scrape = agent.until("its end", is_over);
    assert!(both(&scrape, OPENED, 1.0));
    // Nor did the server's end connect to its client's port.
    for family in [OPENED, CLOSED] {
        assert_eq!(scrape.port(family, client_port, "outbound"), 0.0);
    }
    if in_guest() {
        let risen = |family: &str| scrape.sum(family, &[]) - base.sum(family, &[]);
        // Nobody knows since when it was open. (Scrapes are connections too,
        // and one from before the start may end meanwhile.)
        let without = risen(CLOSED) - risen(DURATION);
        assert!(without >= 2.0, "{without} closes without a duration");
        let seeded = [("action", "seeded")];
        let seeded = scrape.sum(CORRECTIONS, &seeded) - base.sum(CORRECTIONS, &seeded);
        assert_eq!(seeded, 2.0);
    }
    agent.check_laws();
    agent.stop();
    let lives = world.lives(port, 3);
    let restored: Vec<_> = lives.iter().filter(|life| life.restored).collect();
    assert_eq!(restored.len(), 1, "{lives:#?}");
    assert_eq!(restored[0].changes, [&[CONNECT], &FIN_FIRST[..]].concat());
    let traffic = restored[0].traffic.unwrap();
    assert_eq!((traffic.sent_bytes, traffic.received_bytes), (1000, 500));
    Outcome::Held
}

/// Whatever thread listens, connects and accepts: the name is the process's.
fn process_name(world: &mut World<'_>) -> Outcome {
    let process = std::fs::read_to_string("/proc/self/comm").unwrap();
    let process = process.trim_ascii_end();
    let named = || {
        let thread = std::fs::read_to_string("/proc/thread-self/comm").unwrap();
        assert_ne!(thread.trim_ascii_end(), process);
        let listening = listen(world, Family::V4);
        let pair = listening.pair();
        (listening, pair)
    };
    let (listening, pair) = std::thread::scope(|scope| {
        let builder = std::thread::Builder::new().name("thread".into());
        builder.spawn_scoped(scope, named).unwrap().join().unwrap()
    });
    let port = listening.port();
    let name = port.to_string();
    world.until("the listener's process", |scrape| {
        let labels = [("port", name.as_str()), ("process", process)];
        scrape.sum("connmon_listening_socket_info", &labels) == 1.0
    });
    pair.close();
    // The owners are compared with this process there.
    let lives = world.lives(port, 2);
    accepts::each_known(world, &lives);
    Outcome::Held
}

/// A listener, a client and a child of another protocol.
fn other_protocol(protocol: i32) -> std::io::Result<(Socket, Socket, Socket)> {
    let listener = raw::stream(protocol)?;
    listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())?;
    listener.listen(16)?;
    let client = raw::stream(protocol)?;
    client.connect(&listener.local_addr()?)?;
    let (child, _) = listener.accept()?;
    Ok((listener, client, child))
}

fn port_of(socket: &Socket) -> u16 {
    socket.local_addr().unwrap().as_socket().unwrap().port()
}

fn mptcp(world: &mut World<'_>) -> Outcome {
    let (listener, stream, child) = match other_protocol(libc::IPPROTO_MPTCP) {
        Ok(made) => made,
        Err(error) => return Outcome::NotApplicable(format!("socket(IPPROTO_MPTCP): {error}")),
    };
    let port = port_of(&listener);
    assert_eq!(stream.send(b"over a subflow").unwrap(), 14);
    let mut child = TcpStream::from(child);
    child.read_exact(&mut [0; 14]).unwrap();
    // One subflow on either side; the sockets above them are none.
    world.gauges(port, 1, 1);
    stream.shutdown(Shutdown::Both).unwrap();
    drop(stream);
    drop(child);
    drop(listener);
    if world.traced() {
        let lives = world.lives(port, 2);
        assert_eq!(active(&lives).count(), 1, "{lives:#?}");
        assert!(active(&lives).all(|life| life.changes.starts_with(&[CONNECT, ACTIVE])));
        assert!(passive(&lives).all(|life| life.changes.starts_with(&[PASSIVE])));
        // Subflows end as MPTCP's own worker gets to it, either side first.
        for life in &lives {
            let end = &life.changes[if life.active { 2 } else { 1 }..];
            let ways: [&[(u8, u8)]; 3] = [&FIN_FIRST, &FIN_SECOND, &[ABORT]];
            assert!(ways.contains(&end), "{life:?}");
        }
    }
    world.settled(port, Counts::both(1), &[]);
    Outcome::Held
}

fn sctp(world: &mut World<'_>) -> Outcome {
    let (listener, stream, child) = match other_protocol(libc::IPPROTO_SCTP) {
        Ok(made) => made,
        Err(error) => return Outcome::NotApplicable(format!("socket(IPPROTO_SCTP): {error}")),
    };
    let port = port_of(&listener);
    drop((stream, child, listener));
    // Nothing may come: a TCP connection after it shows that what was before
    // is through.
    let listening = listen(world, Family::V4);
    listening.pair().reset();
    world.lives(listening.port(), 2);
    assert!(world.lives(port, 0).is_empty());
    world.settled(port, Counts::default(), &[]);
    Outcome::Held
}

fn v4_mapped(world: &mut World<'_>) -> Outcome {
    let listening = listen(world, Family::Mapped);
    let port = listening.port();
    let pair = listening.pair();
    mapped(world, port, pair)
}

fn v4_mapped_client(world: &mut World<'_>) -> Outcome {
    let listening = listen(world, Family::Mapped);
    let port = listening.port();
    let to = SocketAddr::new(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(), port);
    let client = TcpStream::connect(to).unwrap();
    let (server, _) = listening.listener.accept().unwrap();
    mapped(world, port, Pair { client, server })
}

fn mapped(world: &mut World<'_>, port: u16, pair: Pair) -> Outcome {
    world.gauges(port, 1, 1);
    pair.close();
    let lives = world.lives(port, 2);
    assert_lives(
        &lives,
        (1, &client(&FIN_FIRST), 0),
        (1, &server(&FIN_SECOND), 0),
    );
    for life in &lives {
        assert_eq!(life.tuple.local, Ipv4Addr::LOCALHOST, "{life:?}");
        assert_eq!(life.tuple.remote, Ipv4Addr::LOCALHOST, "{life:?}");
    }
    world.settled(port, Counts::both(1), &[]);
    Outcome::Held
}

fn nonblocking_closed(world: &mut World<'_>) -> Outcome {
    let deaf = deaf();
    let port = deaf.0.port();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_nonblocking(true).unwrap();
    let error = socket.connect(&deaf.0.address.into()).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
    drop(socket);
    end_deaf(deaf);
    let lives = world.lives(port, 3);
    if let Some(life) = unopened(&lives) {
        assert_eq!((life.error, life.segments), (0, Some(1)), "{life:?}");
    }
    world.settled(port, Counts::both(1), &[("aborted", 1)]);
    Outcome::Held
}

fn nonblocking_succeeds(world: &mut World<'_>) -> Outcome {
    let listener = TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    world.sees_listener(address.port());
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None).unwrap();
    socket.set_nonblocking(true).unwrap();
    if let Err(error) = socket.connect(&address.into()) {
        assert_eq!(error.raw_os_error(), Some(libc::EINPROGRESS));
    }
    let (server_end, _) = listener.accept().unwrap();
    socket.set_nonblocking(false).unwrap();
    assert!(socket.as_raw_fd() >= 0);
    world.gauges(address.port(), 1, 1);
    Pair {
        client: socket.into(),
        server: server_end,
    }
    .close();
    let lives = world.lives(address.port(), 2);
    assert_lives(
        &lives,
        (1, &client(&FIN_FIRST), 0),
        (1, &server(&FIN_SECOND), 0),
    );
    world.settled(address.port(), Counts::both(1), &[]);
    Outcome::Held
}

fn address_reused(world: &mut World<'_>) -> Outcome {
    const ROUNDS: u32 = 100;
    let listening = listen(world, Family::V4);
    let port = listening.port();
    for _ in 0..ROUNDS {
        // The child's memory is free at once, and the next connect() takes it.
        let mut pair = listening.pair();
        let server = Socket::from(pair.server);
        server.set_linger(Some(Duration::ZERO)).unwrap();
        drop(server);
        assert!(pair.client.read(&mut [0; 16]).is_err());
    }
    let lives = world.lives(port, 2 * ROUNDS as usize);
    assert_lives(
        &lives,
        (ROUNDS as usize, &client(&[ABORT]), RESET),
        (ROUNDS as usize, &server(&[ABORT]), 0),
    );
    if world.traced() {
        let distinct: std::collections::BTreeSet<_> = lives.iter().map(|life| life.id).collect();
        assert!(distinct.len() < lives.len(), "no address was reused");
    }
    world.settled(port, Counts::both(ROUNDS), &[]);
    Outcome::Held
}

/// Closed after a while without a byte moved.
fn idle_close(world: &mut World<'_>) -> Outcome {
    let listening = listen(world, Family::V6);
    let port = listening.port();
    let pair = listening.pair();
    sleep(Duration::from_millis(300));
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

fn many(world: &mut World<'_>) -> Outcome {
    const COUNT: u32 = 300;
    let listening = listen(world, Family::V4);
    let port = listening.port();
    let pairs = listening.pairs(COUNT as usize);
    world.gauges(port, COUNT, COUNT);
    for (at, pair) in pairs.into_iter().enumerate() {
        if at % 2 == 0 {
            pair.close();
        } else {
            pair.reset();
        }
    }
    let lives = world.lives(port, 2 * COUNT as usize);
    let went = |active: bool, changes: &[(u8, u8)], error: u32| {
        lives
            .iter()
            .filter(|life| life.active == active && life.changes == changes && life.error == error)
            .count()
    };
    if world.traced() {
        let half = COUNT as usize / 2;
        assert_eq!(went(true, &client(&FIN_FIRST), 0), half);
        assert_eq!(went(false, &server(&FIN_SECOND), 0), half);
        assert_eq!(went(true, &client(&[ABORT]), 0), half);
        assert_eq!(went(false, &server(&[ABORT]), RESET), half);
        accepts::each_known(world, &lives);
    }
    world.settled(port, Counts::both(COUNT), &[]);
    Outcome::Held
}

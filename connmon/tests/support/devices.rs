//! Three sockets of one namespace with the same four endpoints, as devices to
//! which sockets are bound allow: each is a connection of its own.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU32, Ordering};

use ipnet::Ipv4Net;
use mmdb_writer::{Value, Writer};
use socket2::{Domain, Socket, Type};
use tempfile::TempDir;

use crate::harness::{Agent, Scrape};
use crate::namespaces::{Namespace, ip};
use crate::traffic::Pair;

const SOCKETS: usize = 3;

/// Where the peers listen; below the ephemeral range, unlike the ports here.
const PORT: u16 = 7411;
const LOCAL_PORT: u16 = 40_001;

/// Which of the three is closed first, second and third.
const ORDER: [usize; SOCKETS] = [1, 2, 0];

/// `here` has a device to each of three peers, with the same address on each;
/// all peers have the same address as well, which lies in DE.
struct Devices {
    second: u8,
    here: Namespace,
    peers: Vec<(Namespace, TcpListener)>,
    directory: TempDir,
}

impl Devices {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = std::process::id() + COUNT.fetch_add(1, Ordering::Relaxed);
        // Apart from the networks of `World`.
        let second = 216 + (count % 40) as u8;
        let here = Namespace::new();
        let peers = (0..SOCKETS)
            .map(|at| {
                let (peer, device) = (Namespace::new(), device(at));
                ip(&[
                    "-n", &here.name, "link", "add", &device, "type", "veth", "peer", "name",
                    "cnm0", "netns", &peer.name,
                ]);
                attach(&here, &device, here_address(second));
                attach(&peer, "cnm0", peer_address(second));
                let listener = peer.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)));
                (peer, listener.unwrap())
            })
            .collect();
        let directory = TempDir::with_prefix("connmon-devices-").unwrap();
        let path = directory.path().join("countries.mmdb");
        std::fs::write(path, database(peer_address(second))).unwrap();
        Self {
            second,
            here,
            peers,
            directory,
        }
    }

    /// An agent whose whole world is `here`, in which it is to be started.
    fn agent(&self, args: &[&str]) -> Agent {
        let database = self.directory.path().join("countries.mmdb");
        let world = ["--netns", "host", "--geoip.database"];
        Agent::start(&[args, &world, &[database.to_str().unwrap()]].concat())
    }

    /// Three connections from one port here, through a device each. To be
    /// called in `here`.
    fn connect(&self) -> Vec<Option<Pair>> {
        let from = SocketAddr::from((here_address(self.second), LOCAL_PORT));
        let to = SocketAddr::from((peer_address(self.second), PORT));
        let through = |(at, (_, listener)): (usize, &(Namespace, TcpListener))| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.bind_device(Some(device(at).as_bytes())).unwrap();
            socket.bind(&from.into()).unwrap();
            socket.connect(&to.into()).unwrap();
            let client = socket.into();
            let (server, peer) = listener.accept().unwrap();
            assert_eq!(peer, from);
            Some(Pair { client, server })
        };
        self.peers.iter().enumerate().map(through).collect()
    }
}

fn device(at: usize) -> String {
    format!("cnm{at}")
}

fn here_address(second: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, second, 0, 1)
}

fn peer_address(second: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, second, 1, 2)
}

fn attach(namespace: &Namespace, device: &str, address: Ipv4Addr) {
    let name = namespace.name.as_str();
    let address = format!("{address}/16");
    ip(&["-n", name, "addr", "add", &address, "dev", device]);
    ip(&["-n", name, "link", "set", device, "up"]);
}

fn database(address: Ipv4Addr) -> Vec<u8> {
    let mut writer = Writer::new("connmon-test");
    let network = Ipv4Net::new(address, 24).unwrap().trunc();
    let record = Value::map([("country_code", Value::from("DE"))]);
    writer.insert_value(network, record).unwrap();
    writer.to_bytes().unwrap()
}

/// Those that were there before the agent. Polling has no bytes.
pub fn seeds_are_each_counted(args: &[&str], has_bytes: bool) {
    let devices = Devices::new();
    devices.here.run(|| {
        let mut seeds = devices.connect();
        // Nothing of before the start is counted.
        for (at, pair) in seeds.iter_mut().flatten().enumerate() {
            pair.exchange(5_000 * (at + 1), 700);
        }
        let agent = devices.agent(args);
        let expected = Expected {
            has_bytes,
            connections: SOCKETS as f64,
            seeded: SOCKETS as f64,
            ..Expected::default()
        };
        expected.check(&agent.scrape());
        one_by_one(&agent, seeds, expected);
        agent.stop();
    });
}

/// Those that open while the agent runs.
pub fn opens_are_each_counted(args: &[&str], has_bytes: bool) {
    let devices = Devices::new();
    devices.here.run(|| {
        let agent = devices.agent(args);
        let pairs = devices.connect();
        let expected = Expected {
            has_bytes,
            connections: SOCKETS as f64,
            opened: SOCKETS as f64,
            ..Expected::default()
        };
        agent.until("the opens", |scrape| {
            of(scrape, "connections_opened_total") == expected.opened
        });
        one_by_one(&agent, pairs, expected);
        agent.stop();
    });
}

/// Moves bytes of a different number on each, then closes one after the other.
fn one_by_one(agent: &Agent, mut pairs: Vec<Option<Pair>>, mut expected: Expected) {
    audited(agent, &expected);
    let moved = |at: usize| (10_000 * (at + 1), 300 + at);
    for (at, pair) in pairs.iter_mut().flatten().enumerate() {
        let (up, down) = moved(at);
        pair.exchange(up, down);
        expected.moved.received += down as f64;
        expected.moved.sent += up as f64;
    }
    audited(agent, &expected);
    for (round, at) in ORDER.into_iter().enumerate() {
        let mut pair = pairs[at].take().unwrap();
        let (up, down) = moved(at);
        let last = 11 * (at + 1);
        pair.exchange(last, 0);
        expected.moved.sent += last as f64;
        pair.close_in_turn(round);
        expected.of_closed.received += down as f64;
        expected.of_closed.sent += (up + last) as f64;
        expected.connections -= 1.0;
        expected.closed += 1.0;
        agent.until("one close", |scrape| {
            let closed = of(scrape, "connections_closed_total");
            assert!(closed <= expected.closed, "{closed} closed by one");
            closed == expected.closed
        });
        audited(agent, &expected);
    }
    assert_eq!(expected.moved, expected.of_closed);
}

/// Two audits from now find nothing to correct, and neither does a scrape
/// before, between or after them.
fn audited(agent: &Agent, expected: &Expected) {
    let audits = |scrape: &Scrape| scrape.sum("connmon_reconcile_runs_total", &[]);
    let before = audits(&agent.scrape());
    agent.until("two audits", |scrape| {
        expected.check(scrape);
        // One may be under way.
        audits(scrape) >= before + 3.0
    });
}

/// What the agent is to show of DE, outbound, and of its audits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Expected {
    has_bytes: bool,
    connections: f64,
    seeded: f64,
    opened: f64,
    closed: f64,
    /// Of all since the start of the agent, and of what has closed among them.
    moved: Bytes,
    of_closed: Bytes,
}

#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Bytes {
    received: f64,
    sent: f64,
}

impl Expected {
    /// Bytes of those that are open may come with their close: a row names no
    /// kernel address, and an event before the close no cookie, so nothing
    /// shows whose they are. Once all are closed, they are exact.
    fn check(&self, scrape: &Scrape) {
        let correction = |action| {
            let labels = [("action", action)];
            scrape.sum("connmon_reconcile_corrections_total", &labels)
        };
        let bytes = Bytes {
            received: of(scrape, "received_bytes_total"),
            sent: of(scrape, "sent_bytes_total"),
        };
        let (least, most) = (self.of_closed, self.moved);
        let is_right = (least.received..=most.received).contains(&bytes.received)
            && (least.sent..=most.sent).contains(&bytes.sent);
        assert!(is_right || !self.has_bytes, "{bytes:?}: {self:?}");
        let shown = Self {
            connections: of(scrape, "connections"),
            seeded: correction("seeded"),
            opened: of(scrape, "connections_opened_total"),
            closed: of(scrape, "connections_closed_total"),
            ..*self
        };
        assert_eq!(shown, *self);
        let tracked = scrape.sum("connmon_tracked_connections", &[]);
        assert_eq!(tracked, self.connections, "tracked");
        let on_port = scrape.connections(PORT, "outbound");
        assert_eq!(on_port, self.connections, "on port {PORT}");
        for action in ["added", "removed", "updated"] {
            assert_eq!(correction(action), 0.0, "{action}");
        }
        for drift in [
            "connmon_drift_connections",
            "connmon_drift_suspected_connections",
        ] {
            assert_eq!(scrape.get(drift, &[]), Some(0.0), "{drift}");
        }
    }
}

fn of(scrape: &Scrape, family: &str) -> f64 {
    let labels = [("country", "DE"), ("direction", "outbound")];
    scrape.sum(&format!("connmon_country_{family}"), &labels)
}

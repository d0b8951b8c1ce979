//! `--filter.exclude` in a running agent: networks of IPv4 and IPv6 and
//! sockets of IPv6 that carry IPv4, for connections from before the start and
//! later ones, from events and by polling; and readers that do not read.
//!
//! Traffic stays on loopback devices, one of them in a namespace; a database made for the test places
//! parts of it in countries.

#[expect(dead_code, reason = "helpers that other tests use too")]
#[path = "support/agent.rs"]
mod agent;
#[expect(dead_code, reason = "helpers that other tests use too")]
mod namespaces;
#[path = "support/mod.rs"]
mod support;

use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use agent::{Agent, database_of};
use namespaces::{Namespace, ip};
use socket2::{Domain, Socket, Type};
use support::samples;

/// Both ends of one connection, in networks of the test's own.
struct Pair {
    _client: TcpStream,
    _server: TcpStream,
}

/// From one address to another, over IPv6 sockets where they are written so.
fn pair(client: &str, server: &str) -> Pair {
    let [client, server] = [client, server].map(|address| {
        let address: std::net::IpAddr = address.parse().unwrap();
        SocketAddr::new(address, 0)
    });
    let socket = |address: SocketAddr| {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        socket.bind(&address.into()).unwrap();
        socket
    };
    let listener = socket(server);
    listener.listen(1).unwrap();
    let listener: TcpListener = listener.into();
    let client = socket(client);
    client
        .connect(&listener.local_addr().unwrap().into())
        .unwrap();
    Pair {
        _client: client.into(),
        _server: listener.accept().unwrap().0,
    }
}

/// One counted connection, and one of each kind that can be left out.
fn connections() -> Vec<Pair> {
    vec![
        pair("127.78.0.1", "127.78.0.2"),
        pair("127.77.0.1", "127.77.0.2"),
        pair("::ffff:127.77.0.3", "::ffff:127.77.0.4"),
        pair("2001:db8:77::1", "2001:db8:77::2"),
    ]
}

/// Sockets in ESTABLISHED in a country, whatever their direction.
fn connected(text: &str, country: &str) -> f64 {
    let prefix = format!("connmon_country_connections{{country=\"{country}\",");
    let samples = samples(text).into_iter();
    let of = samples.filter(|(series, _)| series.starts_with(&prefix));
    of.map(|(_, value)| value).sum()
}

fn database(scratch: &tempfile::TempDir) -> PathBuf {
    let path = scratch.path().join("country.mmdb");
    let networks = [
        ("127.77.0.0/16".to_owned(), "SE"),
        ("127.78.0.0/16".to_owned(), "DE"),
        ("127.79.0.0/16".to_owned(), "FI"),
        ("2001:db8:77::/48".to_owned(), "NO"),
    ];
    std::fs::write(&path, database_of("test", &networks)).unwrap();
    path
}

#[test]
fn excluded_networks_are_in_no_metric_or_summary() {
    if !namespaces::may_run("filters in a running agent") {
        return;
    }
    let namespace = Namespace::new();
    for address in ["2001:db8:77::1/64", "2001:db8:77::2/64"] {
        let lo = ["address", "add", address, "dev", "lo", "nodad"];
        ip(&[&["-n", &namespace.name], &lo[..]].concat());
    }
    let scratch = tempfile::tempdir().unwrap();
    let database = database(&scratch);
    let before = namespace.run(connections);
    for source in ["--source=proc", "--source=ebpf"] {
        let start = |exclude: &[&str]| {
            let arguments = [
                source,
                "--proc.interval=200ms",
                "--filter.loopback=include",
                "--reconcile.interval=1s",
            ];
            Agent::start(&database, &[&arguments, exclude].concat())
        };
        let everything = start(&[]);
        let filtered = start(&[
            // The same network once more, as IPv6 writes it.
            "--filter.exclude=::ffff:127.77.0.0/112",
            "--filter.exclude=2001:db8:77::/48",
        ]);
        let later = namespace.run(connections);
        // Two sockets each, seeded and opened.
        everything.eventually("all of them", |text| {
            ["DE", "SE", "NO"].map(|country| connected(text, country)) == [4.0, 8.0, 4.0]
        });
        let text = filtered.eventually("those that are counted", |text| {
            connected(text, "DE") == 4.0
        });
        let countries = |text: &str| {
            ["SE", "NO"].map(|country| text.contains(&format!("country=\"{country}\"")))
        };
        assert_eq!(countries(&text), [false, false], "{source}:\n{text}");
        // Of those hidden, audits keep the count.
        let hidden = || -> serde_json::Value {
            let summary = filtered.get("/api/v1/summary");
            serde_json::from_str::<serde_json::Value>(&summary).unwrap()["hidden"]["excluded"]
                .take()
        };
        let until = Instant::now() + agent::PATIENCE;
        while hidden() != 12 {
            assert!(Instant::now() < until, "{source}: {} hidden", hidden());
            std::thread::sleep(Duration::from_millis(100));
        }
        // Closing them shows nowhere either.
        drop(later);
        let text = filtered.eventually("the later ones gone", |text| connected(text, "DE") == 2.0);
        assert_eq!(countries(&text), [false, false], "{source}:\n{text}");
    }
    drop(before);
}

/// Clients that ask and ask and read nothing hold back nobody but themselves.
#[test]
fn stalled_readers_do_not_delay_the_ring() {
    const HELD: usize = 300;
    if !namespaces::may_run("stalled readers") {
        return;
    }
    let scratch = tempfile::tempdir().unwrap();
    let arguments = [
        "--source=ebpf",
        "--filter.loopback=include",
        // Less than what is about to happen, should the fold wait for a reader.
        "--ebpf.ring-buffer-size=1MiB",
    ];
    let agent = Agent::start(&database(&scratch), &arguments);
    let stalled: Vec<TcpStream> = (0..8)
        .map(|_| {
            let mut stream = TcpStream::connect(agent.address).unwrap();
            let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(600);
            stream.write_all(&request).unwrap();
            stream
        })
        .collect();
    // Their buffers are full of what they do not read.
    std::thread::sleep(Duration::from_millis(500));
    let listener = TcpListener::bind("127.79.0.2:0").unwrap();
    let address = listener.local_addr().unwrap();
    let mut held = Vec::new();
    for number in 0..3_000 {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        let from: SocketAddr = "127.79.0.1:0".parse().unwrap();
        socket.bind(&from.into()).unwrap();
        socket.connect(&address.into()).unwrap();
        let ends = (socket, listener.accept().unwrap().0);
        if number % 10 == 0 {
            held.push(ends);
        } else {
            ends.0.set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
    let text = agent.eventually("exactly what is held", |text| {
        connected(text, "FI") == 2.0 * HELD as f64
    });
    assert_eq!(held.len(), HELD);
    let lost = samples(&text)
        .into_iter()
        .filter(|(series, _)| series.starts_with("connmon_events_dropped_total{"))
        .map(|(_, value)| value)
        .sum::<f64>();
    assert_eq!(lost, 0.0, "{text}");
    drop((stalled, held));
}

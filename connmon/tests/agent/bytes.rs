//! Payload bytes: exact for short and long connections, both directions,
//! every family and every close path; absent where they cannot be known.

use std::io::{Read as _, Write as _};

use crate::harness::{Agent, Scrape};
use crate::namespaces;
use crate::support;
use crate::traffic::{Family, Pair, Server};
use crate::world::World;

const RECEIVED: &str = "connmon_port_received_bytes_total";
const SENT: &str = "connmon_port_sent_bytes_total";

/// (received, sent) at the server, (received, sent) at the client.
fn bytes(scrape: &Scrape, port: u16) -> [f64; 4] {
    [
        scrape.port(RECEIVED, port, "inbound"),
        scrape.port(SENT, port, "inbound"),
        scrape.port(RECEIVED, port, "outbound"),
        scrape.port(SENT, port, "outbound"),
    ]
}

fn agent(extra: &[&str]) -> Option<Agent> {
    if !rustix::process::geteuid().is_root() {
        support::skipped("payload bytes", "needs root");
        return None;
    }
    let args = ["--filter.loopback", "include", "--source", "ebpf"];
    Some(Agent::start(&[&args, extra].concat()))
}

#[test]
fn payload_of_short_connections_is_exact() {
    let Some(agent) = agent(&["--traffic.interval", "1h"]) else {
        return;
    };
    for family in Family::ALL {
        let server = Server::new(family);
        let port = server.port();
        let (mut up, mut down, mut closed) = (0, 0, 0.0);
        for round in 0..40 {
            let mut pair = server.pair();
            let (now_up, now_down) = (1000 + round, 500 * (round % 3));
            pair.exchange(now_up, now_down);
            up += now_up;
            down += now_down;
            closed += 1.0;
            pair.close_in_turn(round);
        }
        let scrape = agent.until("every close", |scrape| {
            scrape.port("connmon_port_connections_closed_total", port, "inbound") == closed
                && scrape.port("connmon_port_connections_closed_total", port, "outbound") == closed
        });
        let (up, down) = (up as f64, down as f64);
        assert_eq!(bytes(&scrape, port), [up, down, down, up], "{family:?}");
    }
    agent.stop();
}

/// In a country that nothing else on this machine connects to.
#[test]
fn bytes_and_rtt_of_a_country_are_exact() {
    if !namespaces::may_run("bytes by country") {
        return;
    }
    let world = World::new();
    let database = world.database();
    let Some(agent) = agent(&["--geoip.database", database.to_str().unwrap()]) else {
        return;
    };
    let listener = world.listen(6002);
    for round in 1..=5 {
        let client = world.outbound("JP", 6002, 1).remove(0);
        let (server, _) = listener.accept().unwrap();
        let mut pair = Pair { client, server };
        pair.exchange(1000 * round, 7 * round);
        pair.close_in_turn(round);
    }
    for mut echoed in world.inbound("DE", 22, 3) {
        echoed.write_all(&[7; 321]).unwrap();
        echoed.read_exact(&mut [0; 321]).unwrap();
    }
    let by = |scrape: &Scrape, family: &str, country: &str, direction: &str| {
        let labels = [("country", country), ("direction", direction)];
        scrape.sum(&format!("connmon_country_{family}"), &labels)
    };
    let scrape = agent.until("every close", |scrape| {
        by(scrape, "connections_closed_total", "JP", "outbound") == 5.0
            && by(scrape, "connections_closed_total", "DE", "inbound") == 3.0
    });
    for (country, direction, received, sent) in [
        ("JP", "outbound", 7.0 * 15.0, 1000.0 * 15.0),
        ("JP", "inbound", 0.0, 0.0),
        ("DE", "inbound", 3.0 * 321.0, 3.0 * 321.0),
        ("DE", "outbound", 0.0, 0.0),
    ] {
        let bytes = ["received_bytes_total", "sent_bytes_total"]
            .map(|family| by(&scrape, family, country, direction));
        assert_eq!(bytes, [received, sent], "{country} {direction}");
    }
    let total = |family: &str| scrape.sum(family, &[("country", "JP")]);
    let measured = total("connmon_country_rtt_seconds_count");
    let mean = total("connmon_country_rtt_seconds_sum") / measured;
    assert!(
        (1.0..=5.0).contains(&measured),
        "{measured} of 5 connections"
    );
    // A microsecond is the kernel's unit; a veth pair takes tens of them.
    assert!((1e-6..0.2).contains(&mean), "a mean round trip of {mean} s");
    agent.stop();
}

#[test]
fn long_connections_are_sampled_and_counted_once() {
    let before = Server::new(Family::V4);
    let mut seeds = before.pairs(3);
    for pair in &mut seeds {
        pair.exchange(5000, 7000);
    }
    let Some(agent) = agent(&[
        "--traffic.interval",
        "200ms",
        "--reconcile.interval",
        "300ms",
        // Samples are spaced by what a walk takes, and other tests hold
        // crowds in namespaces of theirs.
        "--netns",
        "host",
    ]) else {
        return;
    };
    let server = Server::new(Family::V6);
    let mut pairs = server.pairs(5);
    let (mut up, mut down) = (0.0, 0.0);
    for round in 1..=5 {
        for pair in &mut pairs {
            pair.exchange(10_000 * round, 333 * round);
            up += 10_000.0 * round as f64;
            down += 333.0 * round as f64;
        }
        let expected = [up, down, down, up];
        agent.until("a sample of what is open", |scrape| {
            let now = bytes(scrape, server.port());
            assert!(
                now.iter().zip(expected).all(|(now, most)| *now <= most),
                "{now:?} is more than {expected:?}"
            );
            now == expected
        });
    }
    // What the seeds moved before the start does not count.
    for pair in &mut seeds {
        pair.exchange(100, 10);
    }
    let seeded = [300.0, 30.0, 30.0, 300.0];
    agent.until("a sample of the seeds", |scrape| {
        bytes(scrape, before.port()) == seeded
    });
    pairs.into_iter().chain(seeds).for_each(|pair| pair.close());
    let scrape = agent.until("every close", |scrape| {
        scrape.port(
            "connmon_port_connections_closed_total",
            server.port(),
            "outbound",
        ) == 5.0
            && scrape.port(
                "connmon_port_connections_closed_total",
                before.port(),
                "outbound",
            ) == 3.0
    });
    assert_eq!(bytes(&scrape, server.port()), [up, down, down, up]);
    assert_eq!(bytes(&scrape, before.port()), seeded);
    assert!(scrape.get("connmon_rtt_seconds_count", &[("direction", "outbound")]) > Some(0.0));
    agent.stop();
}

#[test]
fn polling_has_no_traffic_families() {
    let agent = Agent::start(&["--source", "proc", "--filter.loopback", "include"]);
    let scrape = agent.scrape();
    for family in [
        RECEIVED,
        "connmon_country_sent_bytes_total",
        "connmon_country_rtt_seconds_count",
        "connmon_rtt_seconds_count",
    ] {
        assert!(!scrape.has(family), "{family}");
    }
    agent.stop();
}

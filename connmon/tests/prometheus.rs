//! The agent scraped by a real Prometheus: what queries answer, and that
//! nothing a network does makes a scrape large or two sums differ.
//!
//! Traffic runs on the loopback device of a namespace made for the test, in
//! which all of 10.0.0.0/8 is local; a database made for the test places
//! 10.N.0.0/16 in the Nth country.

#[expect(dead_code, reason = "helpers that other tests use too")]
#[path = "support/agent.rs"]
mod agent;
#[path = "prometheus/fixture.rs"]
mod fixture;
#[path = "support/mod.rs"]
mod support;
#[path = "prometheus/traffic.rs"]
mod traffic;

use std::time::{Duration, Instant};

use agent::Agent;
use connmon_core::geo::Country;
use fixture::Prometheus;
use support::samples;
use traffic::Network;

/// The server's address; its /16 is the 1st country's.
const SERVER: &str = "10.1.0.1";

/// Countries that scan: 10.1.0.0/16 to 10.250.0.0/16.
const COUNTRIES: usize = 250;

/// Ports that are listened on at a time during the scan.
const BATCH: u16 = 512;

#[test]
fn queries_are_right_and_a_scan_stays_in_budget() {
    let Some(requirements) = fixture::requirements() else {
        return;
    };
    let network = Network::new(&requirements);
    let scratch = tempfile::tempdir().unwrap();
    let database = scratch.path().join("countries.mmdb");
    std::fs::write(&database, fixture::database(COUNTRIES)).unwrap();
    let agent = Agent::start(&database, &["--source=ebpf", "--reconcile.interval=5s"]);
    let prometheus = Prometheus::start(scratch.path(), agent.address);

    prometheus.eventually("up{job=\"connmon\"} == 1 and connmon_up == 1", |v| {
        v == [1.0]
    });
    prometheus.eventually("connmon_source_info{source=\"ebpf\"}", |v| v == [1.0]);

    gauges_follow_what_is_open(&network, &prometheus);
    rates_follow_what_was_opened(&network, &prometheus);
    a_full_scan_stays_under_budget(&network, &prometheus, &agent);
}

/// Twelve connections from the 7th country are held, then closed.
fn gauges_follow_what_is_open(network: &Network, prometheus: &Prometheus) {
    let held = network.hold(SERVER, "10.7.0.2", 12);
    let port = held.port();
    let country = country(7);
    let gauges = [
        format!("connmon_country_connections{{country=\"{country}\",direction=\"inbound\"}}"),
        format!("connmon_port_connections{{port=\"{port}\",direction=\"inbound\"}}"),
        format!("connmon_port_connections{{port=\"{port}\",direction=\"outbound\"}}"),
    ];
    for gauge in &gauges {
        prometheus.eventually(gauge, |v| v == [12.0]);
    }
    prometheus.eventually(
        &format!("connmon_listening_socket_info{{port=\"{port}\",address=\"{SERVER}\"}}"),
        |v| v == [1.0],
    );
    drop(held);
    for gauge in &gauges {
        prometheus.eventually(gauge, |v| v == [0.0]);
    }
}

/// 3,000 connections from the 9th country at an even pace.
fn rates_follow_what_was_opened(network: &Network, prometheus: &Prometheus) {
    const PER_SECOND: u32 = 200;
    const SECONDS: u32 = 15;
    let opened = format!(
        "connmon_country_connections_opened_total{{country=\"{}\",direction=\"inbound\"}}",
        country(9)
    );
    // The row exists before the rate begins, or its first value is no increase.
    network.open_and_close(SERVER, "10.9.0.2", 1, Duration::ZERO);
    prometheus.eventually(&opened, |v| v == [1.0]);
    let began = Instant::now();
    network.open_and_close(
        SERVER,
        "10.9.0.2",
        PER_SECOND * SECONDS,
        Duration::from_secs(1) / PER_SECOND,
    );
    // A busy machine does not keep the pace.
    let took = began.elapsed();
    let total = f64::from(PER_SECOND * SECONDS) + 1.0;
    prometheus.eventually(&opened, |v| v == [total]);
    // The steepest ten seconds ran at the pace of the test.
    let window = began.elapsed().as_secs() + 10;
    let steepest = format!("max_over_time(rate({opened}[10s])[{window}s:1s])");
    let steepest = prometheus.query(&steepest);
    let pace = (total - 1.0) / took.as_secs_f64();
    assert!(
        steepest.len() == 1 && (0.5 * pace..=2.0 * pace).contains(&steepest[0]),
        "rate {steepest:?}, pace {pace}"
    );
}

/// Every port of a host is opened once, by scanners of 250 countries.
fn a_full_scan_stays_under_budget(network: &Network, prometheus: &Prometheus, agent: &Agent) {
    let sum = |family: &str, direction: &str| {
        let query = format!("sum(connmon_{family}_opened_total{{direction=\"{direction}\"}})");
        prometheus.query(&query).first().copied().unwrap_or(0.0)
    };
    // increase() does not see the value a series is born with, so every
    // country connects once before the scan.
    for index in 1..=COUNTRIES {
        network.open_and_close(SERVER, &client(index), 1, Duration::ZERO);
    }
    let countries = "count(connmon_country_connections_opened_total{direction=\"inbound\"} > 0)";
    prometheus.eventually(&format!("{countries} >= {COUNTRIES}"), |v| v.len() == 1);
    let before = sum("port_connections", "inbound");
    let start = Instant::now();
    let scanned = network.scan(SERVER, BATCH, |port| {
        client(1 + usize::from(port) % COUNTRIES)
    });
    println!("scanned {scanned} ports in {:?}", start.elapsed());
    assert!(scanned >= 65_000, "{scanned}");
    prometheus.eventually(
        "sum(connmon_port_connections_opened_total{direction=\"inbound\"})",
        |v| v.len() == 1 && v[0] >= before + f64::from(scanned),
    );

    // Nothing was lost, and not every port got a row.
    prometheus.eventually("sum(connmon_events_dropped_total)", |v| v == [0.0]);
    for direction in ["inbound", "outbound"] {
        let ports = format!("count(connmon_port_connections{{direction=\"{direction}\"}})");
        prometheus.eventually(&ports, |v| v == [129.0]);
        // Within each scrape the two families agree exactly, ...
        for totals in [
            "connections_opened_total",
            "connections_closed_total",
            "connections",
        ] {
            let difference = format!(
                "max_over_time(abs(sum(connmon_country_{totals}{{direction=\"{direction}\"}}) \
                 - sum(connmon_port_{totals}{{direction=\"{direction}\"}}))[2m:1s])"
            );
            assert_eq!(prometheus.query(&difference), [0.0], "{difference}");
        }
        // ... and so do their increases over the scan. increase() itself
        // extrapolates each series by its own samples, so that a scan of two
        // seconds comes out some percent apart; the counters do not.
        let increase = |family: &str| {
            let opened =
                format!("connmon_{family}_connections_opened_total{{direction=\"{direction}\"}}");
            let seconds = start.elapsed().as_secs() + 4;
            let query = format!("sum({opened}) - (sum({opened} offset {seconds}s) or vector(0))");
            prometheus.query(&query)[0]
        };
        assert_eq!(increase("country"), increase("port"), "{direction}");
        assert!(increase("country") >= f64::from(scanned), "{direction}");
    }
    prometheus.eventually("connmon_series_overflow_total{family=\"port\"} > 0", |v| {
        !v.is_empty()
    });
    let largest = prometheus.query("max_over_time(scrape_samples_scraped{job=\"connmon\"}[5m])");
    let slowest = prometheus.query("max_over_time(scrape_duration_seconds{job=\"connmon\"}[5m])");
    println!("largest scrape: {largest:?} samples, slowest: {slowest:?} s");
    assert!(largest.len() == 1 && largest[0] < 15_000.0, "{largest:?}");
    assert_eq!(
        prometheus.query("min_over_time(up{job=\"connmon\"}[1m])"),
        [1.0]
    );

    // Other programs' events may be between the two at any one instant.
    agent.eventually("every event folded", |text| {
        value(text, "connmon_events_produced_total") == value(text, "connmon_events_folded_total")
    });
}

/// An address in the network of a country, other than the server's.
fn client(country: usize) -> String {
    format!("10.{country}.0.2")
}

fn country(index: usize) -> &'static str {
    fixture::country_of(index).code()
}

fn value(text: &str, series: &str) -> f64 {
    let found = samples(text).into_iter().find(|(name, _)| *name == series);
    found.unwrap_or_else(|| panic!("no {series}")).1
}

#[test]
fn each_network_has_a_country_of_its_own() {
    let mut countries: Vec<Country> = (1..=COUNTRIES).map(fixture::country_of).collect();
    countries.sort();
    countries.dedup();
    assert_eq!(countries.len(), COUNTRIES);
}

use serde_json::{Value, json};

use connmon_core::fold::Direction;

use super::*;
use crate::expose::sample;

fn rendered(report: &Report) -> Value {
    serde_json::from_slice(&render(report)).expect("the summary is JSON")
}

fn by<'a>(rows: &'a Value, key: &str, value: &str) -> &'a Value {
    rows.as_array()
        .and_then(|rows| rows.iter().find(|row| row[key] == value))
        .unwrap_or_else(|| panic!("no row with {key} {value}"))
}

#[test]
fn countries_have_every_field_by_direction() {
    let summary = rendered(&sample::report());
    let germany = by(&summary["countries"], "country", "DE");
    assert_eq!(
        germany["connections"],
        json!({"inbound": 40, "outbound": 2, "unknown": 1})
    );
    assert_eq!(germany["opened"]["inbound"], 400);
    assert_eq!(germany["closed"]["inbound"], 360);
    assert_eq!(germany["received_bytes"]["inbound"], 1_000_000);
    assert_eq!(germany["sent_bytes"]["outbound"], 3_000);
    assert_eq!(germany["retransmitted_segments"]["inbound"], 7);
    assert_eq!(germany["failures"]["refused"], 5);
    assert_eq!(germany["failures"].as_object().map(|f| f.len()), Some(8));
    assert_eq!(germany["connect_latency_seconds"]["sum"], 0.25);
}

#[test]
fn a_port_is_one_row_whatever_its_directions() {
    let summary = rendered(&sample::report());
    let ports = summary["ports"].as_array().unwrap();
    let order: Vec<_> = ports.iter().map(|p| p["port"].as_str().unwrap()).collect();
    assert_eq!(order, ["22", "443", "other"]);
    let https = by(&summary["ports"], "port", "443");
    assert_eq!(
        https["connections"],
        json!({"inbound": 40, "outbound": 12, "unknown": 0})
    );
    assert_eq!(https["failures"]["timeout"], 3);
    assert_eq!(https["close_wait"]["inbound"], 2);
    assert_eq!(https["processes"], json!(["nginx"]));
}

#[test]
fn the_agent_reports_its_state() {
    let summary = rendered(&sample::report());
    let agent = &summary["agent"];
    assert_eq!(agent["source"], "ebpf");
    assert_eq!(agent["degraded"], Value::Null);
    assert_eq!(agent["drift"], 0);
    assert_eq!(agent["probes"][0]["probe"], "inet_sock_set_state");
    assert_eq!(agent["probes"][0]["method"], "tp_btf");
    assert!(agent["probes"][1]["reason"].is_string());
    assert_eq!(agent["events"]["dropped"]["ring_full"], 0);
    assert_eq!(agent["namespaces"]["diag"], 3);
    assert_eq!(agent["database"]["attribution"]["url"], "https://db-ip.com");
    assert_eq!(summary["hidden"], json!({"loopback": 34, "excluded": 2}));
    assert_eq!(summary["established"], 65);
}

#[test]
fn what_cannot_be_known_is_null() {
    let mut report = sample::report();
    report.snapshot.traffic_known = false;
    report.snapshot.accept_known = false;
    report.snapshot.drift = None;
    report.status.source = Source::Proc;
    let summary = rendered(&report);
    let germany = by(&summary["countries"], "country", "DE");
    for key in [
        "received_bytes",
        "sent_bytes",
        "retransmitted_segments",
        "failures",
        "connect_latency_seconds",
        "rtt_seconds",
    ] {
        assert_eq!(germany[key], Value::Null, "{key}");
    }
    let https = by(&summary["ports"], "port", "443");
    assert_eq!(https["received_bytes"], Value::Null);
    assert_eq!(https["failures"], Value::Null);
    assert_eq!(https["accept_wait_seconds"], Value::Null);
    assert_eq!(summary["agent"]["drift"], Value::Null);
}

/// Every number of the summary is the sample of the same name and labels
/// in a scrape of the same report.
#[test]
fn every_number_equals_its_sample() {
    const DIRECTIONS: [&str; 3] = ["inbound", "outbound", "unknown"];
    let report = sample::report();
    let summary = rendered(&report);
    let text = crate::expose::metrics::Metrics::new().render(&report);
    let text = std::str::from_utf8(&text).unwrap();
    let samples: BTreeMap<&str, f64> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| line.rsplit_once(' ').unwrap())
        .map(|(series, value)| (series, value.parse().unwrap()))
        .collect();
    let mut compared = std::collections::BTreeSet::new();
    let mut same = |series: String, number: &Value| {
        let sample = samples.get(series.as_str());
        assert_eq!(number.as_f64(), sample.copied(), "{series}");
        compared.insert(series);
    };
    let families = [
        ("connections", "connections"),
        ("opened", "connections_opened_total"),
        ("closed", "connections_closed_total"),
        ("received_bytes", "received_bytes_total"),
        ("sent_bytes", "sent_bytes_total"),
        ("retransmitted_segments", "retransmitted_segments_total"),
        ("close_wait", "close_wait_connections"),
    ];
    for (table, id) in [("countries", "country"), ("ports", "port")] {
        for row in summary[table].as_array().unwrap() {
            let label = format!("{id}={}", row[id]);
            for (key, family) in families {
                for direction in DIRECTIONS {
                    let series =
                        format!("connmon_{id}_{family}{{{label},direction=\"{direction}\"}}");
                    let number = &row[key][direction];
                    // A port that never was one way has no series for it.
                    if id == "port" && *number == 0 && !samples.contains_key(series.as_str()) {
                        continue;
                    }
                    if key != "close_wait" || id == "port" {
                        same(series, number);
                    }
                }
            }
            for reason in FailureReason::ALL {
                let reason = reason.label();
                let series =
                    format!("connmon_{id}_connect_failures_total{{{label},reason=\"{reason}\"}}");
                if id == "country" || samples.contains_key(series.as_str()) {
                    same(series, &row["failures"][reason]);
                } else {
                    assert_eq!(row["failures"][reason], 0, "{series}");
                }
            }
            for key in [
                "connect_latency_seconds",
                "rtt_seconds",
                "accept_wait_seconds",
            ] {
                for part in ["count", "sum"] {
                    if let number @ Value::Number(_) = &row[key][part] {
                        same(format!("connmon_{id}_{key}_{part}{{{label}}}"), number);
                    }
                }
            }
        }
    }
    let agent = &summary["agent"];
    for (series, number) in [
        (
            "connmon_state_connections{state=\"established\"}",
            &summary["established"],
        ),
        ("connmon_tracked_connections", &summary["tracked"]),
        ("connmon_untracked_connections", &summary["untracked"]),
        ("connmon_drift_connections", &agent["drift"]),
        (
            "connmon_events_produced_total",
            &agent["events"]["produced"],
        ),
        ("connmon_events_folded_total", &agent["events"]["folded"]),
        (
            "connmon_events_dropped_total{reason=\"ring_full\"}",
            &agent["events"]["dropped"]["ring_full"],
        ),
        (
            "connmon_events_dropped_total{reason=\"undecodable\"}",
            &agent["events"]["dropped"]["undecodable"],
        ),
        (
            "connmon_missed_closes_total",
            &agent["events"]["missed_closes"],
        ),
        (
            "connmon_unattributed_events_total",
            &agent["events"]["unattributed"],
        ),
        (
            "connmon_probe_missed_runs_total{probe=\"inet_sock_set_state\"}",
            &agent["missed_runs"]["inet_sock_set_state"],
        ),
        (
            "connmon_network_namespaces{access=\"diag\"}",
            &agent["namespaces"]["diag"],
        ),
        (
            "connmon_reconcile_runs_total{trigger=\"startup\"}",
            &agent["reconcile"]["runs"]["startup"],
        ),
        (
            "connmon_reconcile_duration_seconds",
            &agent["reconcile"]["duration_seconds"],
        ),
        (
            "connmon_reconcile_interval_seconds",
            &agent["reconcile"]["interval_seconds"],
        ),
        (
            "connmon_reconcile_corrections_total{action=\"seeded\"}",
            &agent["corrections"]["seeded"],
        ),
        ("connmon_table_overflow_total", &agent["overflow"]["table"]),
        (
            "connmon_series_overflow_total{family=\"port\"}",
            &agent["overflow"]["series"]["port"],
        ),
        (
            "connmon_geoip_database_build_timestamp_seconds",
            &agent["database"]["build_timestamp"],
        ),
    ] {
        same(series.to_owned(), number);
    }
    // Nothing by country or by port is in the scrape alone.
    let of_tables = samples
        .keys()
        .filter(|series| {
            let by = series.strip_prefix("connmon_");
            by.is_some_and(|by| by.starts_with("country_") || by.starts_with("port_"))
        })
        .count();
    let compared = compared
        .iter()
        .filter(|series| series.contains("{country=") || series.contains("{port="))
        .count();
    assert_eq!(compared, of_tables);
}

/// The report that tests and screenshots show contradicts itself nowhere.
#[test]
fn the_sample_adds_up() {
    let snapshot = sample::report().snapshot;
    let countries: Vec<Flow> = snapshot
        .countries
        .iter()
        .flat_map(|row| row.flows)
        .collect();
    let ports: Vec<Flow> = snapshot.ports.iter().map(|row| row.flow).collect();
    for (what, number) in [
        ("connections", (|flow| flow.connections) as fn(&Flow) -> u64),
        ("opened", |flow| flow.opened),
        ("closed", |flow| flow.closed),
        ("received", |flow| flow.received_bytes),
        ("sent", |flow| flow.sent_bytes),
        ("retransmitted", |flow| flow.retransmitted_segments),
    ] {
        let sum = |flows: &[Flow]| flows.iter().map(number).sum::<u64>();
        assert_eq!(sum(&countries), sum(&ports), "{what}");
    }
    let failures = |counts: &[u64; FailureReason::COUNT]| counts.iter().sum::<u64>();
    let by_country: u64 = snapshot
        .countries
        .iter()
        .map(|row| failures(&row.failures))
        .sum();
    let by_port: u64 = snapshot
        .ports
        .iter()
        .flat_map(|row| &row.failures)
        .map(failures)
        .sum();
    assert_eq!(by_country, by_port);
    let sum = |number: fn(&Flow) -> u64| countries.iter().map(number).sum::<u64>();
    assert_eq!(sum(|flow| flow.connections), snapshot.established);
    let states: u64 = snapshot.audited_states.iter().sum();
    assert_eq!(snapshot.tracked, snapshot.established + states);
    // The law of connections.
    assert_eq!(
        sum(|flow| flow.opened) + snapshot.corrections.seeded,
        sum(|flow| flow.closed) + snapshot.tracked
    );
}

#[test]
fn hostile_names_are_strings_and_no_address_shows() {
    let mut report = sample::report();
    let hostile = "</script><img src=x onerror=alert(1)>\u{fffd}\n\"";
    report.snapshot.listeners[0].process = hostile.to_owned();
    report.status.database.database_type = hostile.to_owned();
    let bytes = render(&report);
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    assert!(!text.contains("203.0.113.9"), "a listener's address");
    let summary: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(summary["agent"]["database"]["type"], hostile);
    let ssh = by(&summary["ports"], "port", "22");
    assert_eq!(ssh["processes"][0], hostile);
}

/// At every cap together it is still an answer for every two seconds.
#[test]
fn at_every_cap_it_stays_small() {
    use std::io::Write as _;

    let mut report = sample::report();
    let mut n = 0_u64;
    let mut next = || {
        n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        n >> 44
    };
    let snapshot = &mut report.snapshot;
    snapshot.countries = (0..connmon_core::geo::Country::COUNT)
        .filter_map(connmon_core::geo::Country::from_index)
        .map(|country| {
            let mut row = sample::country(country, [next(), next(), next()], [next(), next(), 0]);
            for flow in &mut row.flows {
                flow.received_bytes = next() * 1_000;
                flow.sent_bytes = next() * 1_000;
            }
            row.failures = [next(); FailureReason::COUNT];
            row
        })
        .collect();
    snapshot.ports = (0..128 * 2)
        .map(|at| {
            let direction = Direction::ALL[at % 2];
            sample::port(PortLabel::Port(at as u16 + 1), direction, next(), next())
        })
        .collect();
    let json = render(&report);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&json).unwrap();
    let packed = gzip.finish().unwrap().len();
    assert!(json.len() < 512 * 1024, "{} bytes", json.len());
    assert!(packed < 64 * 1024, "{packed} bytes compressed");
    println!("{} bytes, {packed} compressed", json.len());
}

#[test]
fn databases_are_attributed_by_their_licence() {
    let database = |source, database_type: &str| DatabaseInfo {
        database_type: database_type.to_owned(),
        source,
        build_timestamp: 0,
        reloads_ok: 0,
        reloads_failed: 0,
    };
    let url = |d| attribution(&d).map(|(_, url)| url);
    assert_eq!(url(database("embedded", "?")), Some("https://db-ip.com"));
    assert_eq!(
        url(database("file", "DBIP-Country-Lite")),
        Some("https://db-ip.com")
    );
    assert_eq!(
        url(database("file", "GeoLite2-Country")),
        Some("https://www.maxmind.com")
    );
    assert_eq!(url(database("file", "Our-Own")), None);
}

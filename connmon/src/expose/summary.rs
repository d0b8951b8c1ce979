//! `/api/v1/summary`: what the page shows, as one JSON object.
//!
//! Field names are stable: new ones may appear, none is renamed or removed.
//! Label values are those of the metrics (`country`, `port`, `direction`,
//! `reason`, `probe`, `method`), and every number equals the sample of the
//! same name in a scrape of the same instant. What the source cannot know is
//! `null`, never 0. No remote address and no address of a listener appears.
//!
//! ```text
//! countries[]  country, connections, opened, closed, received_bytes,
//!              sent_bytes, retransmitted_segments (each by direction),
//!              failures (by reason), connect_latency_seconds, rtt_seconds
//!              (count and sum)
//! ports[]      port ("443" or "other"), the same by direction, failures,
//!              close_wait (by direction), accept_wait_seconds, processes
//!              (names that listen on this port)
//! established, tracked, untracked: as in connmon_state_connections,
//!              connmon_tracked_connections, connmon_untracked_connections
//! hidden       loopback, excluded: connections left out by the filters
//! agent        version, up, ready, waiting_for, demo, uptime_seconds, source,
//!              degraded, probes[], drift, events, missed_runs, namespaces,
//!              reconcile, corrections, overflow, database
//! ```

use std::collections::BTreeMap;

use bytes::Bytes;
use connmon_core::fold::{CountryRow, DIRECTIONS, FailureReason, Flow, PortLabel, Snapshot, Sum};
use connmon_core::report::{DatabaseInfo, Report, Source, Status};
use serde::Serialize;
use serde_json::{Value, json};

/// Most process names shown for one port.
const PROCESSES_PER_PORT: usize = 4;

/// The JSON of one report, UTF-8.
pub fn render(report: &Report) -> Bytes {
    let Report { snapshot, status } = report;
    let known = Known {
        traffic: snapshot.traffic_known,
        // Polling sees no handshakes.
        connects: status.source == Source::Ebpf,
    };
    let countries = snapshot.countries.iter();
    let summary = Summary {
        countries: countries.map(|row| Country::new(row, known)).collect(),
        ports: ports(snapshot, known),
        established: snapshot.established,
        tracked: snapshot.tracked,
        untracked: snapshot.untracked,
        hidden: json!({
            "loopback": snapshot.hidden_loopback,
            "excluded": snapshot.hidden_excluded,
        }),
        agent: agent(snapshot, status),
    };
    // Only maps with keys that are not strings and failing `Serialize`
    // implementations make this fail; there are none of either here.
    match serde_json::to_vec(&summary) {
        Ok(json) => json.into(),
        Err(error) => {
            log::error!("cannot write the summary as JSON: {error}");
            Bytes::from_static(b"{}")
        }
    }
}

/// What the source can know.
#[derive(Clone, Copy)]
struct Known {
    traffic: bool,
    connects: bool,
}

#[derive(Serialize)]
struct Summary<'a> {
    countries: Vec<Country>,
    ports: Vec<Port<'a>>,
    established: u64,
    tracked: u64,
    untracked: u64,
    hidden: Value,
    agent: Value,
}

/// One number for each value of the label `direction`.
#[derive(Serialize)]
struct ByDirection {
    inbound: u64,
    outbound: u64,
    unknown: u64,
}

impl From<[u64; DIRECTIONS]> for ByDirection {
    fn from([inbound, outbound, unknown]: [u64; DIRECTIONS]) -> Self {
        Self {
            inbound,
            outbound,
            unknown,
        }
    }
}

/// What countries and ports have in common.
#[derive(Serialize)]
struct Flows {
    connections: ByDirection,
    opened: ByDirection,
    closed: ByDirection,
    received_bytes: Option<ByDirection>,
    sent_bytes: Option<ByDirection>,
    retransmitted_segments: Option<ByDirection>,
    /// By the label `reason`, every reason present.
    failures: Option<BTreeMap<&'static str, u64>>,
}

impl Flows {
    fn new(flows: [Flow; DIRECTIONS], failures: [u64; FailureReason::COUNT], known: Known) -> Self {
        let by_direction = |field: fn(Flow) -> u64| ByDirection::from(flows.map(field));
        let traffic = |field| known.traffic.then(|| by_direction(field));
        let reasons = FailureReason::ALL.map(FailureReason::label);
        Self {
            connections: by_direction(|flow| flow.connections),
            opened: by_direction(|flow| flow.opened),
            closed: by_direction(|flow| flow.closed),
            received_bytes: traffic(|flow| flow.received_bytes),
            sent_bytes: traffic(|flow| flow.sent_bytes),
            retransmitted_segments: traffic(|flow| flow.retransmitted_segments),
            failures: known
                .connects
                .then(|| reasons.into_iter().zip(failures).collect()),
        }
    }
}

/// Count and sum of a summary family.
fn seconds(sum: Sum) -> Value {
    json!({ "count": sum.count, "sum": super::rows::seconds(sum.sum_ns) })
}

#[derive(Serialize)]
struct Country {
    country: &'static str,
    #[serde(flatten)]
    flows: Flows,
    connect_latency_seconds: Option<Value>,
    rtt_seconds: Option<Value>,
}

impl Country {
    fn new(row: &CountryRow, known: Known) -> Self {
        Self {
            country: row.country.code(),
            flows: Flows::new(row.flows, row.failures, known),
            connect_latency_seconds: known.connects.then(|| seconds(row.connect_latency)),
            rtt_seconds: known.traffic.then(|| seconds(row.rtt)),
        }
    }
}

#[derive(Serialize)]
struct Port<'a> {
    port: String,
    #[serde(flatten)]
    flows: Flows,
    close_wait: ByDirection,
    accept_wait_seconds: Option<Value>,
    processes: Vec<&'a str>,
}

/// A port's rows of every direction.
#[derive(Default)]
struct PortParts<'a> {
    flows: [Flow; DIRECTIONS],
    failures: [u64; FailureReason::COUNT],
    close_wait: [u64; DIRECTIONS],
    accept_wait: Option<Sum>,
    processes: Vec<&'a str>,
}

/// The fold has one row per port and direction; here a port is one row, in
/// the order of port numbers, `other` last.
fn ports(snapshot: &Snapshot, known: Known) -> Vec<Port<'_>> {
    let mut by_label: BTreeMap<PortLabel, PortParts<'_>> = BTreeMap::new();
    for row in &snapshot.ports {
        let port = by_label.entry(row.port).or_default();
        port.flows[row.direction as usize] = row.flow;
        port.close_wait[row.direction as usize] = row.close_wait;
        port.failures = row.failures.unwrap_or(port.failures);
        port.accept_wait = row.accept_wait.or(port.accept_wait);
    }
    for listener in &snapshot.listeners {
        if let Some(port) = by_label.get_mut(&PortLabel::Port(listener.port))
            && port.processes.len() < PROCESSES_PER_PORT
            && !port.processes.contains(&listener.process.as_str())
        {
            port.processes.push(&listener.process);
        }
    }
    by_label
        .into_iter()
        .map(|(label, parts)| Port {
            port: label.to_string(),
            flows: Flows::new(parts.flows, parts.failures, known),
            close_wait: parts.close_wait.into(),
            accept_wait_seconds: parts
                .accept_wait
                .filter(|_| snapshot.accept_known)
                .map(seconds),
            processes: parts.processes,
        })
        .collect()
}

fn agent(snapshot: &Snapshot, status: &Status) -> Value {
    let probe = |rung: &connmon_core::probe::Rung| {
        json!({
            "probe": rung.probe.label(),
            "method": rung.method.label(),
            // Why the method is not a better one, in one line.
            "reason": rung.reason(),
            // The same by method: stage, errno, message, verifier_log.
            "failures": rung.failures,
        })
    };
    let probes: Vec<Value> = status.rungs.iter().map(probe).collect();
    let missed_runs = status.missed_runs.iter();
    let missed_runs: BTreeMap<_, _> = missed_runs
        .map(|(probe, count)| (probe.label(), *count))
        .collect();
    let series: BTreeMap<_, _> = snapshot.series_overflow.iter().copied().collect();
    let [diag, proc, unaudited] = status.namespaces;
    let [startup, interval, loss] = status.reconcile_runs;
    let database = &status.database;
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "up": status.up,
        "ready": status.ready,
        "waiting_for": status.waiting_for,
        "demo": status.demo,
        "uptime_seconds": status.uptime_s,
        "source": status.source.label(),
        "degraded": status.degraded,
        "probes": probes,
        "drift": snapshot.drift,
        "events": {
            "produced": status.events_produced,
            "folded": status.events_folded,
            "dropped": {
                "ring_full": status.dropped_ring_full,
                "undecodable": status.dropped_undecodable,
            },
            "unattributed": snapshot.unattributed,
            "missed_closes": snapshot.missed_closes,
        },
        // Empty where the kernel does not count them.
        "missed_runs": missed_runs,
        "namespaces": { "diag": diag, "proc": proc, "unaudited": unaudited },
        "reconcile": {
            "runs": { "startup": startup, "interval": interval, "loss": loss },
            "duration_seconds": status.reconcile_duration_s,
            "interval_seconds": status.reconcile_interval_s,
        },
        "corrections": {
            "seeded": snapshot.corrections.seeded,
            "added": snapshot.corrections.added,
            "removed": snapshot.corrections.removed,
            "updated": snapshot.corrections.updated,
        },
        // What did not fit, since start.
        "overflow": { "table": snapshot.table_overflow, "series": series },
        "database": {
            "type": database.database_type,
            "source": database.source,
            "build_timestamp": database.build_timestamp,
            "reloads": { "success": database.reloads_ok, "failure": database.reloads_failed },
            "attribution": attribution(database).map(|(text, url)| json!({ "text": text, "url": url })),
        },
    })
}

/// Text and link that the licence of the database asks for, where connmon
/// knows it. DB-IP's CC BY 4.0 wants both wherever its results are shown.
fn attribution(database: &DatabaseInfo) -> Option<(&'static str, &'static str)> {
    let database_type = database.database_type.to_ascii_lowercase();
    if database.source == "embedded" || database_type.starts_with("dbip") {
        Some(("IP Geolocation by DB-IP", "https://db-ip.com"))
    } else if database_type.starts_with("geolite") {
        let text = "This product includes GeoLite Data created by MaxMind";
        Some((text, "https://www.maxmind.com"))
    } else {
        None
    }
}

#[cfg(test)]
mod tests;

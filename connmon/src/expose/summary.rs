//! `/api/v1/summary`: the figures behind the page, as one JSON object.
//!
//! Field names are stable: new ones may appear, none is renamed or removed.
//! Label values are the metrics' own (`country`, `port`, `direction`,
//! `reason`, `probe`, `method`), and every figure equals the sample of the
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
use connmon_core::fold::{CountryRow, Direction, FailureReason, Flow, PortLabel, Snapshot, Sum};
use connmon_core::probe::AttachFailure;
use connmon_core::report::{DatabaseInfo, Report, Source, Status};
use serde::Serialize;

/// Most process names shown for one port; more say nothing to a reader.
const PROCESSES_PER_PORT: usize = 4;

/// The JSON of one report, UTF-8.
pub fn render(report: &Report) -> Bytes {
    let Report { snapshot, status } = report;
    // Polling sees no handshakes.
    let connects_known = status.source == Source::Ebpf;
    let summary = Summary {
        countries: snapshot
            .countries
            .iter()
            .map(|row| Country::new(row, snapshot.traffic_known, connects_known))
            .collect(),
        ports: ports(snapshot, connects_known),
        established: snapshot.established,
        tracked: snapshot.tracked,
        untracked: snapshot.untracked,
        hidden: Hidden {
            loopback: snapshot.hidden_loopback,
            excluded: snapshot.hidden_excluded,
        },
        agent: Agent::new(snapshot, status),
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

#[derive(Serialize)]
struct Summary<'a> {
    countries: Vec<Country>,
    ports: Vec<Port<'a>>,
    established: u64,
    tracked: u64,
    untracked: u64,
    hidden: Hidden,
    agent: Agent<'a>,
}

#[derive(Serialize)]
struct Hidden {
    loopback: u64,
    excluded: u64,
}

/// One figure for each value of the label `direction`.
#[derive(Clone, Copy, Default, Serialize)]
struct ByDirection {
    inbound: u64,
    outbound: u64,
    unknown: u64,
}

impl ByDirection {
    fn add(&mut self, direction: Direction, value: u64) {
        match direction {
            Direction::Inbound => self.inbound += value,
            Direction::Outbound => self.outbound += value,
            Direction::Unknown => self.unknown += value,
        }
    }
}

/// What countries and ports have in common.
#[derive(Clone, Default, Serialize)]
struct Flows {
    connections: ByDirection,
    opened: ByDirection,
    closed: ByDirection,
    received_bytes: Option<ByDirection>,
    sent_bytes: Option<ByDirection>,
    retransmitted_segments: Option<ByDirection>,
}

impl Flows {
    fn new(traffic_known: bool) -> Self {
        let traffic = traffic_known.then(ByDirection::default);
        Self {
            received_bytes: traffic,
            sent_bytes: traffic,
            retransmitted_segments: traffic,
            ..Self::default()
        }
    }

    fn add(&mut self, direction: Direction, flow: &Flow) {
        self.connections.add(direction, flow.connections);
        self.opened.add(direction, flow.opened);
        self.closed.add(direction, flow.closed);
        for (sum, value) in [
            (&mut self.received_bytes, flow.received_bytes),
            (&mut self.sent_bytes, flow.sent_bytes),
            (
                &mut self.retransmitted_segments,
                flow.retransmitted_segments,
            ),
        ] {
            if let Some(sum) = sum {
                sum.add(direction, value);
            }
        }
    }
}

/// Failed connects by the label `reason`, every reason present.
type Failures = BTreeMap<&'static str, u64>;

fn failures(counts: &[u64; FailureReason::COUNT]) -> Failures {
    FailureReason::ALL
        .iter()
        .zip(counts)
        .map(|(reason, count)| (reason.label(), *count))
        .collect()
}

/// Count and sum of a summary family.
#[derive(Clone, Copy, Default, Serialize)]
struct Seconds {
    count: u64,
    sum: f64,
}

impl From<Sum> for Seconds {
    fn from(sum: Sum) -> Self {
        Self {
            count: sum.count,
            sum: sum.sum_ns as f64 / 1e9,
        }
    }
}

#[derive(Serialize)]
struct Country {
    country: &'static str,
    #[serde(flatten)]
    flows: Flows,
    failures: Option<Failures>,
    connect_latency_seconds: Option<Seconds>,
    rtt_seconds: Option<Seconds>,
}

impl Country {
    fn new(row: &CountryRow, traffic_known: bool, connects_known: bool) -> Self {
        let mut flows = Flows::new(traffic_known);
        for direction in Direction::ALL {
            flows.add(direction, &row.flows[direction as usize]);
        }
        Self {
            country: row.country.code(),
            flows,
            failures: connects_known.then(|| failures(&row.failures)),
            connect_latency_seconds: connects_known.then(|| row.connect_latency.into()),
            rtt_seconds: traffic_known.then(|| row.rtt.into()),
        }
    }
}

#[derive(Serialize)]
struct Port<'a> {
    port: String,
    #[serde(flatten)]
    flows: Flows,
    failures: Option<Failures>,
    close_wait: ByDirection,
    accept_wait_seconds: Option<Seconds>,
    processes: Vec<&'a str>,
}

/// The fold's rows are one per port and direction; here a port is one row,
/// in the order of port numbers, `other` last.
fn ports(snapshot: &Snapshot, connects_known: bool) -> Vec<Port<'_>> {
    let mut by_label: BTreeMap<PortLabel, Port<'_>> = BTreeMap::new();
    for row in &snapshot.ports {
        let port = by_label.entry(row.port).or_insert_with(|| Port {
            port: match row.port {
                PortLabel::Port(port) => port.to_string(),
                PortLabel::Other => "other".to_owned(),
            },
            flows: Flows::new(snapshot.traffic_known),
            failures: connects_known.then(|| failures(&[0; FailureReason::COUNT])),
            close_wait: ByDirection::default(),
            accept_wait_seconds: None,
            processes: Vec::new(),
        });
        port.flows.add(row.direction, &row.flow);
        port.close_wait.add(row.direction, row.close_wait);
        if let (Some(counts), Some(failures)) = (&row.failures, &mut port.failures) {
            for (reason, count) in FailureReason::ALL.iter().zip(counts) {
                *failures.entry(reason.label()).or_default() += count;
            }
        }
        if snapshot.accept_known
            && let Some(wait) = row.accept_wait
        {
            port.accept_wait_seconds = Some(wait.into());
        }
    }
    for listener in &snapshot.listeners {
        if let Some(port) = by_label.get_mut(&PortLabel::Port(listener.port))
            && port.processes.len() < PROCESSES_PER_PORT
            && !port.processes.contains(&listener.process.as_str())
        {
            port.processes.push(&listener.process);
        }
    }
    by_label.into_values().collect()
}

#[derive(Serialize)]
struct Agent<'a> {
    version: &'static str,
    up: bool,
    ready: bool,
    waiting_for: Option<&'a str>,
    demo: bool,
    uptime_seconds: f64,
    source: &'static str,
    degraded: Option<&'a str>,
    probes: Vec<ProbeState<'a>>,
    drift: Option<u64>,
    events: Events,
    /// By probe; empty where the kernel does not tell.
    missed_runs: BTreeMap<&'static str, u64>,
    namespaces: Namespaces,
    reconcile: Reconcile,
    corrections: Corrections,
    overflow: Overflow,
    database: Database<'a>,
}

#[derive(Serialize)]
struct ProbeState<'a> {
    probe: &'static str,
    method: &'static str,
    /// Why it is not on a higher rung, in one line.
    reason: Option<String>,
    /// The same by method tried: stage, errno, message, verifier_log.
    failures: &'a [AttachFailure],
}

#[derive(Serialize)]
struct Events {
    produced: u64,
    folded: u64,
    dropped: Dropped,
    unattributed: u64,
}

#[derive(Serialize)]
struct Dropped {
    ring_full: u64,
    undecodable: u64,
}

#[derive(Serialize)]
struct Namespaces {
    diag: u64,
    proc: u64,
    unaudited: u64,
}

#[derive(Serialize)]
struct Reconcile {
    runs: Runs,
    duration_seconds: f64,
    interval_seconds: f64,
}

#[derive(Serialize)]
struct Runs {
    startup: u64,
    interval: u64,
    loss: u64,
}

#[derive(Serialize)]
struct Corrections {
    seeded: u64,
    added: u64,
    removed: u64,
    updated: u64,
}

/// What did not fit, since start.
#[derive(Serialize)]
struct Overflow {
    table: u64,
    series: BTreeMap<&'static str, u64>,
}

#[derive(Serialize)]
struct Database<'a> {
    #[serde(rename = "type")]
    database_type: &'a str,
    source: &'static str,
    /// Unix seconds.
    build_timestamp: u64,
    reloads: Reloads,
    /// What the database's licence wants shown, where connmon knows it.
    attribution: Option<Attribution>,
}

#[derive(Serialize)]
struct Reloads {
    success: u64,
    failure: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
struct Attribution {
    text: &'static str,
    url: &'static str,
}

/// The embedded database is DB-IP's, whose CC BY 4.0 licence asks for a link
/// wherever its results are shown; files of the two common vendors are told
/// by their type.
fn attribution(database: &DatabaseInfo) -> Option<Attribution> {
    let database_type = database.database_type.to_ascii_lowercase();
    if database.source == "embedded" || database_type.starts_with("dbip") {
        Some(Attribution {
            text: "IP Geolocation by DB-IP",
            url: "https://db-ip.com",
        })
    } else if database_type.starts_with("geolite") {
        Some(Attribution {
            text: "This product includes GeoLite Data created by MaxMind",
            url: "https://www.maxmind.com",
        })
    } else {
        None
    }
}

impl<'a> Agent<'a> {
    fn new(snapshot: &Snapshot, status: &'a Status) -> Self {
        let [diag, proc, unaudited] = status.namespaces;
        let [startup, interval, loss] = status.reconcile_runs;
        Self {
            version: env!("CARGO_PKG_VERSION"),
            up: status.up,
            ready: status.ready,
            waiting_for: status.waiting_for.as_deref(),
            demo: status.demo,
            uptime_seconds: status.uptime_s,
            source: status.source.label(),
            degraded: status.degraded.as_deref(),
            probes: status
                .rungs
                .iter()
                .map(|rung| ProbeState {
                    probe: rung.probe.label(),
                    method: rung.method.label(),
                    reason: rung.reason(),
                    failures: &rung.failures,
                })
                .collect(),
            drift: snapshot.drift,
            events: Events {
                produced: status.events_produced,
                folded: status.events_folded,
                dropped: Dropped {
                    ring_full: status.dropped_ring_full,
                    undecodable: status.dropped_undecodable,
                },
                unattributed: snapshot.unattributed,
            },
            missed_runs: status
                .missed_runs
                .iter()
                .map(|(probe, count)| (probe.label(), *count))
                .collect(),
            namespaces: Namespaces {
                diag,
                proc,
                unaudited,
            },
            reconcile: Reconcile {
                runs: Runs {
                    startup,
                    interval,
                    loss,
                },
                duration_seconds: status.reconcile_duration_s,
                interval_seconds: status.reconcile_interval_s,
            },
            corrections: Corrections {
                seeded: snapshot.corrections.seeded,
                added: snapshot.corrections.added,
                removed: snapshot.corrections.removed,
                updated: snapshot.corrections.updated,
            },
            overflow: Overflow {
                table: snapshot.table_overflow,
                series: snapshot.series_overflow.iter().copied().collect(),
            },
            database: Database {
                database_type: &status.database.database_type,
                source: status.database.source,
                build_timestamp: status.database.build_timestamp,
                reloads: Reloads {
                    success: status.database.reloads_ok,
                    failure: status.database.reloads_failed,
                },
                attribution: attribution(&status.database),
            },
        }
    }
}

#[cfg(test)]
mod tests;

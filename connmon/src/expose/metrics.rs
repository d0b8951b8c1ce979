//! Report → telemetry text, format 0.0.4.
//!
//! What is not known is absent rather than zero: bytes and round-trip times
//! where the source has none, accept waits without an accept probe, connect
//! latency and failures in polling mode, which sees no handshakes, and limits
//! of accept queues that were read from /proc.

use std::hash::{BuildHasher as _, RandomState};

use bytes::Bytes;
use connmon_core::fold::{
    AUDITED_STATES, CountryRow, Direction, FailureReason, Flow, PortLabel, PortRow, Snapshot, Sum,
};
use connmon_core::report::{Report, Source, Status};

use crate::version;

use super::families::{FAMILIES, Id};
use super::process::{Process, ProcessStats};
use super::rows::{Rows, seconds};

/// Renders reports. Keeps rows between scrapes, so that a scrape writes
/// numbers and few labels.
#[derive(Debug)]
pub struct Metrics {
    rows: Vec<Rows>,
    /// Keys of rows whose labels are text. Keyed with a secret, since a local
    /// user chooses process names.
    keys: RandomState,
    process: Option<Process>,
    /// Length of the last text, the guess for the next one.
    last_length: usize,
}

impl Metrics {
    /// A renderer; opens /proc/self, which a sandbox may later forbid.
    pub fn new() -> Self {
        let process = Process::open()
            .inspect_err(|error| log::warn!("no process_* metrics: /proc/self: {error}"))
            .ok();
        Self {
            rows: FAMILIES.iter().map(Rows::new).collect(),
            keys: RandomState::new(),
            process,
            last_length: 16 * 1024,
        }
    }

    /// The telemetry text.
    pub fn render(&mut self, report: &Report) -> Bytes {
        let process = self.process.as_ref().and_then(Process::read);
        self.render_with(report, process)
    }

    /// The telemetry text with a given state of the process, for tests.
    pub fn render_with(&mut self, report: &Report, process: Option<ProcessStats>) -> Bytes {
        self.rows.iter_mut().for_each(Rows::begin);
        let known = Known {
            traffic: report.snapshot.traffic_known,
            accepts: report.snapshot.accept_known,
            connects: report.status.source == Source::Ebpf,
        };
        for country in &report.snapshot.countries {
            self.country(country, known);
        }
        for port in &report.snapshot.ports {
            self.port(port, known);
        }
        self.cross(&report.snapshot);
        self.totals(&report.snapshot, known);
        self.listeners(&report.snapshot);
        self.fold(&report.snapshot);
        self.events(&report.status);
        self.reconcile(&report.status);
        self.agent(&report.status);
        if let Some(process) = process {
            self.process(&process);
        }
        self.rows.iter_mut().for_each(Rows::end);
        self.encode()
    }

    fn encode(&mut self) -> Bytes {
        let mut text = Vec::with_capacity(self.last_length + self.last_length / 8);
        for rows in &self.rows {
            rows.encode(&mut text);
        }
        self.last_length = text.len();
        Bytes::from(text)
    }

    fn country(&mut self, row: &CountryRow, known: Known) {
        let key = (row.country.index() as u64) << 8;
        let code = row.country.code();
        for direction in Direction::ALL {
            let flow = &row.flows[direction as usize];
            self.flow(&COUNTRY, key, direction, flow, known, |label| label(code));
        }
        if known.connects {
            self.failures(Id::CountryConnectFailures, key, &row.failures, |label| {
                label(code);
            });
            self.summary(
                Id::CountryConnectLatency,
                key,
                row.connect_latency,
                |label| label(code),
            );
        }
        if known.traffic {
            self.summary(Id::CountryRtt, key, row.rtt, |label| label(code));
        }
    }

    fn port(&mut self, row: &PortRow, known: Known) {
        let key = port_key(row.port) << 8;
        let port = |label: &mut dyn FnMut(&str)| label(&row.port.to_string());
        self.flow(&PORT, key, row.direction, &row.flow, known, port);
        let direction = row.direction;
        let directed = key | direction as u64;
        self.count(Id::PortCloseWait, directed, row.close_wait, |label| {
            port(label);
            label(direction.label());
        });
        if let (Some(failures), true) = (&row.failures, known.connects) {
            self.failures(Id::PortConnectFailures, key, failures, port);
        }
        if let (Some(wait), true) = (row.accept_wait, known.accepts) {
            self.summary(Id::PortAcceptWait, key, wait, port);
        }
    }

    /// What country and port rows have in common, for one direction.
    fn flow(
        &mut self,
        ids: &[Id; 6],
        key: u64,
        direction: Direction,
        flow: &Flow,
        known: Known,
        first: impl Fn(&mut dyn FnMut(&str)),
    ) {
        let values = [
            flow.connections,
            flow.opened,
            flow.closed,
            flow.received_bytes,
            flow.sent_bytes,
            flow.retransmitted_segments,
        ];
        let shown = if known.traffic { 6 } else { 3 };
        for (id, value) in ids.iter().zip(values).take(shown) {
            self.count(*id, key | direction as u64, value, |label| {
                first(label);
                label(direction.label());
            });
        }
    }

    fn failures(
        &mut self,
        id: Id,
        key: u64,
        counts: &[u64; FailureReason::COUNT],
        first: impl Fn(&mut dyn FnMut(&str)),
    ) {
        for (reason, count) in FailureReason::ALL.into_iter().zip(counts) {
            self.count(id, key | reason as u64, *count, |label| {
                first(label);
                label(reason.label());
            });
        }
    }

    fn cross(&mut self, snapshot: &Snapshot) {
        for row in &snapshot.cross {
            let key =
                (row.country.index() as u64) << 32 | port_key(row.port) << 8 | row.direction as u64;
            let mut value = |id, value| {
                self.count(id, key, value, |label| {
                    label(row.country.code());
                    label(&row.port.to_string());
                    label(row.direction.label());
                });
            };
            value(Id::CountryPortConnections, row.connections);
            value(Id::CountryPortOpened, row.opened);
        }
    }

    fn totals(&mut self, snapshot: &Snapshot, known: Known) {
        let states = std::iter::once("established").chain(AUDITED_STATES.iter().map(|(_, s)| *s));
        let counts = std::iter::once(snapshot.established).chain(snapshot.audited_states);
        for (key, (state, count)) in states.zip(counts).enumerate() {
            self.count(Id::StateConnections, key as u64, count, |label| {
                label(state)
            });
        }
        if known.connects {
            let rows = &mut self.rows[Id::ConnectLatency as usize];
            rows.histogram(0, &snapshot.connect_latency, |_| {});
        }
        if known.accepts {
            let rows = &mut self.rows[Id::AcceptWait as usize];
            rows.histogram(0, &snapshot.accept_wait, |_| {});
        }
        for direction in Direction::ALL {
            let key = direction as u64;
            let mut histogram = |id: Id, histograms: &[connmon_core::fold::Histogram]| {
                let histogram = &histograms[direction as usize];
                self.rows[id as usize].histogram(key, histogram, |label| label(direction.label()));
            };
            histogram(Id::ConnectionDuration, &snapshot.duration);
            if known.traffic {
                histogram(Id::Rtt, &snapshot.rtt);
            }
        }
    }

    fn listeners(&mut self, snapshot: &Snapshot) {
        for row in &snapshot.listeners {
            let owner = (row.process.as_str(), row.pid);
            let place = (row.netns, row.host, row.address.as_str(), row.port);
            let key = self.keys.hash_one((place, owner));
            let mut value = |id: Id, value: u64, with_owner: bool| {
                self.count(id, key, value, |label| {
                    if row.host {
                        label("host");
                    } else {
                        label(&row.netns.to_string());
                    }
                    label(&row.address);
                    label(&row.port.to_string());
                    if with_owner {
                        label(&row.process);
                        label(&row.pid.to_string());
                    }
                });
            };
            value(Id::ListeningSocketInfo, row.sockets.into(), true);
            value(Id::AcceptQueueLength, row.queue_length, false);
            if let Some(limit) = row.queue_limit {
                value(Id::AcceptQueueLimit, limit, false);
            }
        }
    }

    fn fold(&mut self, snapshot: &Snapshot) {
        self.single(Id::TrackedConnections, snapshot.tracked as f64);
        self.single(Id::UntrackedConnections, snapshot.untracked as f64);
        self.single(Id::TableOverflow, snapshot.table_overflow as f64);
        self.single(Id::TombstoneOverflow, snapshot.tombstone_overflow as f64);
        self.single(Id::UnattributedEvents, snapshot.unattributed as f64);
        if let Some(drift) = snapshot.drift {
            self.single(Id::Drift, drift as f64);
        }
        if let Some(suspected) = snapshot.drift_suspected {
            self.single(Id::DriftSuspected, suspected as f64);
        }
        self.labelled(Id::SeriesOverflow, &snapshot.series_overflow);
        self.labelled(Id::SeriesEvicted, &snapshot.series_evicted);
        let corrections = &snapshot.corrections;
        self.labelled(
            Id::ReconcileCorrections,
            &[
                ("added", corrections.added),
                ("removed", corrections.removed),
                ("seeded", corrections.seeded),
                ("updated", corrections.updated),
            ],
        );
    }

    fn events(&mut self, status: &Status) {
        self.single(Id::EventsProduced, status.events_produced as f64);
        self.single(Id::EventsFolded, status.events_folded as f64);
        self.labelled(
            Id::EventsDropped,
            &[
                ("ring_full", status.dropped_ring_full),
                ("undecodable", status.dropped_undecodable),
            ],
        );
        for (probe, missed) in &status.missed_runs {
            self.count(Id::ProbeMissedRuns, *probe as u64, *missed, |label| {
                label(probe.label());
            });
        }
        for rung in &status.rungs {
            let key = (rung.probe as u64) << 8 | rung.method as u64;
            let attached = rung.method != connmon_core::probe::Method::None;
            self.count(Id::ProbeAttached, key, attached.into(), |label| {
                label(rung.probe.label());
                label(rung.method.label());
            });
        }
        for program in &status.programs {
            let key = self.keys.hash_one(&program.program);
            let mut value = |id: Id, value| {
                self.rows[id as usize].value(key, value, |label| label(&program.program));
            };
            value(Id::BpfProgramRuns, program.runs as f64);
            value(Id::BpfProgramRunSeconds, seconds(program.run_time_ns));
        }
    }

    fn reconcile(&mut self, status: &Status) {
        let [startup, interval, loss] = status.reconcile_runs;
        self.labelled(
            Id::ReconcileRuns,
            &[("startup", startup), ("interval", interval), ("loss", loss)],
        );
        self.single(Id::ReconcileDuration, status.reconcile_duration_s);
        self.single(Id::ReconcileInterval, status.reconcile_interval_s);
        let [diag, proc, unaudited] = status.namespaces;
        self.labelled(
            Id::NetworkNamespaces,
            &[("diag", diag), ("proc", proc), ("unaudited", unaudited)],
        );
    }

    fn agent(&mut self, status: &Status) {
        self.single(Id::Up, f64::from(u8::from(status.up)));
        if status.demo {
            self.single(Id::Demo, 1.0);
        }
        self.count(Id::BuildInfo, 0, 1, |label| {
            label(version::VERSION);
            label(version::REVISION);
            label(version::BRANCH);
            label(version::RUSTC);
            label(version::TARGET);
        });
        self.count(Id::SourceInfo, status.source as u64, 1, |label| {
            label(status.source.label());
        });
        let database = &status.database;
        let key = self
            .keys
            .hash_one((&database.database_type, database.source));
        self.count(Id::GeoipInfo, key, 1, |label| {
            label(&database.database_type);
            label(database.source);
        });
        self.single(Id::GeoipBuildTimestamp, database.build_timestamp as f64);
        self.labelled(
            Id::GeoipReloads,
            &[
                ("failure", database.reloads_failed),
                ("success", database.reloads_ok),
            ],
        );
    }

    fn process(&mut self, process: &ProcessStats) {
        self.single(Id::ProcessCpuSeconds, process.cpu_seconds);
        self.single(Id::ProcessOpenFds, process.open_fds);
        self.single(Id::ProcessMaxFds, process.max_fds);
        self.single(Id::ProcessVirtualMemory, process.virtual_memory_bytes);
        self.single(
            Id::ProcessVirtualMemoryMax,
            process.virtual_memory_max_bytes,
        );
        self.single(Id::ProcessResidentMemory, process.resident_memory_bytes);
        self.single(Id::ProcessStartTime, process.start_time_seconds);
    }

    /// The only row of a family without labels.
    fn single(&mut self, id: Id, value: f64) {
        self.rows[id as usize].value(0, value, |_| {});
    }

    fn count(&mut self, id: Id, key: u64, value: u64, labels: impl FnOnce(&mut dyn FnMut(&str))) {
        self.rows[id as usize].value(key, value as f64, labels);
    }

    fn summary(&mut self, id: Id, key: u64, sum: Sum, labels: impl FnOnce(&mut dyn FnMut(&str))) {
        self.rows[id as usize].summary(key, sum, labels);
    }

    /// Rows with one label, few of them.
    fn labelled(&mut self, id: Id, rows: &[(&str, u64)]) {
        for (value, count) in rows {
            let key = self.keys.hash_one(value);
            self.count(id, key, *count, |label| label(value));
        }
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// What the source can know.
#[derive(Clone, Copy)]
struct Known {
    traffic: bool,
    accepts: bool,
    connects: bool,
}

/// The families of [`Metrics::flow`], those of traffic last.
const COUNTRY: [Id; 6] = [
    Id::CountryConnections,
    Id::CountryOpened,
    Id::CountryClosed,
    Id::CountryReceivedBytes,
    Id::CountrySentBytes,
    Id::CountryRetransmitted,
];
const PORT: [Id; 6] = [
    Id::PortConnections,
    Id::PortOpened,
    Id::PortClosed,
    Id::PortReceivedBytes,
    Id::PortSentBytes,
    Id::PortRetransmitted,
];

fn port_key(port: PortLabel) -> u64 {
    match port {
        PortLabel::Port(port) => port.into(),
        PortLabel::Other => 1 << 16,
    }
}

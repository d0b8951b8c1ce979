//! Report → telemetry text, format 0.0.4.
//!
//! What is not known is absent rather than zero: bytes and round-trip times
//! without a source, accept waits without an accept probe, connect latency and
//! failures in polling mode, limits of accept queues read from /proc.

use bytes::Bytes;
use connmon_core::fold::{
    AUDITED_STATES, CountryRow, Direction, FailureReason, Flow, Histogram, PortRow, Snapshot, Sum,
};
use connmon_core::probe::Method;
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
            process,
            last_length: 16 * 1024,
        }
    }

    /// The telemetry text.
    pub fn render(&mut self, report: &Report) -> Bytes {
        let process = self.process.as_mut().and_then(Process::read);
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
        let mut text = Vec::with_capacity(self.last_length + self.last_length / 8);
        for rows in &mut self.rows {
            rows.end();
            rows.encode(&mut text);
        }
        self.last_length = text.len();
        Bytes::from(text)
    }

    fn country(&mut self, row: &CountryRow, known: Known) {
        let code = row.country.code();
        for (direction, flow) in Direction::ALL.into_iter().zip(&row.flows) {
            self.flow(&COUNTRY, [code, direction.label()], flow, known);
        }
        if known.connects {
            self.failures(Id::CountryConnectFailures, code, &row.failures);
            self.summary(Id::CountryConnectLatency, code, row.connect_latency);
        }
        if known.traffic {
            self.summary(Id::CountryRtt, code, row.rtt);
        }
    }

    fn port(&mut self, row: &PortRow, known: Known) {
        let port = row.port.to_string();
        let labels = [port.as_str(), row.direction.label()];
        self.flow(&PORT, labels, &row.flow, known);
        self.add(&labels, &[(Id::PortCloseWait, row.close_wait)]);
        if let (Some(failures), true) = (&row.failures, known.connects) {
            self.failures(Id::PortConnectFailures, &port, failures);
        }
        if let (Some(wait), true) = (row.accept_wait, known.accepts) {
            self.summary(Id::PortAcceptWait, &port, wait);
        }
    }

    /// What country and port rows have in common, for one direction.
    fn flow(&mut self, ids: &[Id; 6], labels: [&str; 2], flow: &Flow, known: Known) {
        let [connections, opened, closed, received, sent, retransmitted] = *ids;
        let values = [
            (connections, flow.connections),
            (opened, flow.opened),
            (closed, flow.closed),
            (received, flow.received_bytes),
            (sent, flow.sent_bytes),
            (retransmitted, flow.retransmitted_segments),
        ];
        let shown = if known.traffic { 6 } else { 3 };
        self.add(&labels, &values[..shown]);
    }

    fn failures(&mut self, id: Id, label: &str, counts: &[u64; FailureReason::COUNT]) {
        for (reason, count) in FailureReason::ALL.into_iter().zip(counts) {
            self.add(&[label, reason.label()], &[(id, *count)]);
        }
    }

    fn cross(&mut self, snapshot: &Snapshot) {
        for row in &snapshot.cross {
            let labels = [
                row.country.code(),
                &row.port.to_string(),
                row.direction.label(),
            ];
            let values = [
                (Id::CountryPortConnections, row.connections),
                (Id::CountryPortOpened, row.opened),
            ];
            self.add(&labels, &values);
        }
    }

    fn totals(&mut self, snapshot: &Snapshot, known: Known) {
        self.add(
            &["established"],
            &[(Id::StateConnections, snapshot.established)],
        );
        for ((_, state), count) in AUDITED_STATES.iter().zip(snapshot.audited_states) {
            self.add(&[state], &[(Id::StateConnections, count)]);
        }
        if known.connects {
            self.histogram(Id::ConnectLatency, &[], &snapshot.connect_latency);
        }
        if known.accepts {
            self.histogram(Id::AcceptWait, &[], &snapshot.accept_wait);
        }
        for direction in Direction::ALL {
            let (labels, at) = ([direction.label()], direction as usize);
            self.histogram(Id::ConnectionDuration, &labels, &snapshot.duration[at]);
            if known.traffic {
                self.histogram(Id::Rtt, &labels, &snapshot.rtt[at]);
            }
        }
    }

    fn listeners(&mut self, snapshot: &Snapshot) {
        for row in &snapshot.listeners {
            let netns = match row.host {
                true => "host".to_owned(),
                false => row.netns.to_string(),
            };
            let (port, pid) = (row.port.to_string(), row.pid.to_string());
            let labels = [netns.as_str(), &row.address, &port, &row.process, &pid];
            self.add(&labels, &[(Id::ListeningSocketInfo, row.sockets.into())]);
            let labels = &labels[..3];
            self.add(labels, &[(Id::AcceptQueueLength, row.queue_length)]);
            if let Some(limit) = row.queue_limit {
                self.add(labels, &[(Id::AcceptQueueLimit, limit)]);
            }
        }
    }

    fn fold(&mut self, snapshot: &Snapshot) {
        let corrections = &snapshot.corrections;
        self.add(
            &[],
            &[
                (Id::TrackedConnections, snapshot.tracked),
                (Id::UntrackedConnections, snapshot.untracked),
                (Id::TableOverflow, snapshot.table_overflow),
                (Id::TombstoneOverflow, snapshot.tombstone_overflow),
                (Id::MissedCloses, snapshot.missed_closes),
                (Id::UnattributedEvents, snapshot.unattributed),
            ],
        );
        for (id, value) in [
            (Id::Drift, snapshot.drift),
            (Id::DriftSuspected, snapshot.drift_suspected),
        ] {
            if let Some(value) = value {
                self.add(&[], &[(id, value)]);
            }
        }
        self.labelled(Id::SeriesOverflow, &snapshot.series_overflow);
        self.labelled(Id::SeriesEvicted, &snapshot.series_evicted);
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
        self.add(
            &[],
            &[
                (Id::EventsProduced, status.events_produced),
                (Id::EventsFolded, status.events_folded),
            ],
        );
        self.labelled(
            Id::EventsDropped,
            &[
                ("ring_full", status.dropped_ring_full),
                ("undecodable", status.dropped_undecodable),
            ],
        );
        for (probe, missed) in &status.missed_runs {
            self.labelled(Id::ProbeMissedRuns, &[(probe.label(), *missed)]);
        }
        for rung in &status.rungs {
            let attached = rung.method != Method::None;
            let labels = [rung.probe.label(), rung.method.label()];
            self.add(&labels, &[(Id::ProbeAttached, attached.into())]);
        }
        for program in &status.programs {
            let labels = [program.program.as_str()];
            self.add(&labels, &[(Id::BpfProgramRuns, program.runs)]);
            let run_time = seconds(program.run_time_ns);
            self.number(Id::BpfProgramRunSeconds, &labels, run_time);
        }
    }

    fn reconcile(&mut self, status: &Status) {
        let [startup, interval, loss] = status.reconcile_runs;
        self.labelled(
            Id::ReconcileRuns,
            &[("startup", startup), ("interval", interval), ("loss", loss)],
        );
        self.number(Id::ReconcileDuration, &[], status.reconcile_duration_s);
        self.number(Id::ReconcileInterval, &[], status.reconcile_interval_s);
        let [diag, proc, unaudited] = status.namespaces;
        self.labelled(
            Id::NetworkNamespaces,
            &[("diag", diag), ("proc", proc), ("unaudited", unaudited)],
        );
    }

    fn agent(&mut self, status: &Status) {
        let database = &status.database;
        self.add(
            &[],
            &[
                (Id::Up, status.up.into()),
                (Id::GeoipBuildTimestamp, database.build_timestamp),
            ],
        );
        if status.demo {
            self.add(&[], &[(Id::Demo, 1)]);
        }
        let build = [
            version::VERSION,
            version::REVISION,
            version::BRANCH,
            version::RUSTC,
            version::TARGET,
        ];
        self.add(&build, &[(Id::BuildInfo, 1)]);
        self.labelled(Id::SourceInfo, &[(status.source.label(), 1)]);
        let labels = [database.database_type.as_str(), database.source];
        self.add(&labels, &[(Id::GeoipInfo, 1)]);
        self.labelled(
            Id::GeoipReloads,
            &[
                ("failure", database.reloads_failed),
                ("success", database.reloads_ok),
            ],
        );
    }

    fn process(&mut self, process: &ProcessStats) {
        for (id, value) in [
            (Id::ProcessCpuSeconds, process.cpu_seconds),
            (Id::ProcessOpenFds, process.open_fds),
            (Id::ProcessMaxFds, process.max_fds),
            (Id::ProcessVirtualMemory, process.virtual_memory_bytes),
            (
                Id::ProcessVirtualMemoryMax,
                process.virtual_memory_max_bytes,
            ),
            (Id::ProcessResidentMemory, process.resident_memory_bytes),
            (Id::ProcessStartTime, process.start_time_seconds),
        ] {
            self.number(id, &[], value);
        }
    }

    /// One row with these labels in each of the families.
    fn add(&mut self, labels: &[&str], values: &[(Id, u64)]) {
        for (id, value) in values {
            self.number(*id, labels, *value as f64);
        }
    }

    fn number(&mut self, id: Id, labels: &[&str], value: f64) {
        self.rows[id as usize].value(labels, value);
    }

    fn summary(&mut self, id: Id, label: &str, sum: Sum) {
        self.rows[id as usize].summary(&[label], sum);
    }

    fn histogram(&mut self, id: Id, labels: &[&str], histogram: &Histogram) {
        self.rows[id as usize].histogram(labels, histogram);
    }

    /// Rows with one label.
    fn labelled(&mut self, id: Id, rows: &[(&str, u64)]) {
        for (label, value) in rows {
            self.add(&[label], &[(id, *value)]);
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

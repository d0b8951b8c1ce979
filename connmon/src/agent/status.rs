//! The agent's own part of a report: source, attached probes, counters of loss,
//! audits, readiness.

use std::time::{Duration, Instant};

use connmon_core::fold::{Corrections, Snapshot};
use connmon_core::probe::{Probe, Rung};
use connmon_core::report::{DatabaseInfo, ProgramStats, Source, Status};
use connmon_core::scan::{Trigger, Walk, WalkSummary};
use connmon_host::kernel::{Counters, monotonic_ns};
use log::{error, warn};
use tokio::sync::watch;

use super::startup;

/// Readiness waits this long for the initial scan at most.
const READY_AT_LATEST: Duration = Duration::from_secs(10);

/// `connmon_up` wants an audit younger than this many intervals.
const UP_INTERVALS: f64 = 3.0;

/// After so many audits without an event between them, a socket that appears
/// shows that the probe no longer delivers.
const STILL_AUDITS: u32 = 2;

/// A walk that ended.
#[derive(Clone, Debug)]
pub struct WalkState {
    /// Which.
    pub walk: Walk,
    /// What it found.
    pub summary: WalkSummary,
    /// When it ended, CLOCK_MONOTONIC.
    pub now_ns: u64,
    /// The audit interval from now on.
    pub audit_every: Duration,
    /// What audits corrected so far.
    pub corrections: Corrections,
}

/// What was lost between two readings of the kernel's counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Records that the full ring buffer dropped.
    pub events: u64,
    /// Program runs that the kernel skipped.
    pub missed_runs: u64,
    /// Those of them at the probe of state changes.
    pub missed_changes: u64,
}

impl Lost {
    /// Anything at all.
    pub fn any(&self) -> bool {
        self.events > 0 || self.missed_runs > 0
    }

    /// A connection may have opened or closed unseen.
    pub fn costs_connections(&self) -> bool {
        self.events > 0 || self.missed_changes > 0
    }
}

/// Collects the agent's part of a report.
#[derive(Debug)]
pub struct StatusBoard {
    started: Instant,
    /// The report's part, as of the last walk; [`StatusBoard::status`] fills in
    /// what changes between walks.
    status: Status,
    counters: Counters,
    /// Attempts to produce a record at the end of the last audit.
    produced_before: u64,
    /// Audits in a row between which no event came.
    still: u32,
    /// What the audits before the last had found that no event reported.
    found_before: u64,
    /// The last audit found changes although no event comes any more.
    without_events: bool,
    last_audit_ns: Option<u64>,
    namespace_reason: Option<String>,
    scanned: bool,
    ready: watch::Sender<bool>,
}

impl StatusBoard {
    /// A board before the initial scan; `ready` becomes true after it, or when
    /// it takes too long.
    pub fn new(
        source: Source,
        degraded: Option<String>,
        rungs: Vec<Rung>,
        database: DatabaseInfo,
        interval: Duration,
        demo: bool,
        ready: watch::Sender<bool>,
    ) -> Self {
        Self {
            started: Instant::now(),
            status: Status {
                source,
                degraded,
                rungs,
                up: false,
                ready: false,
                waiting_for: None,
                uptime_s: 0.0,
                events_produced: 0,
                events_folded: 0,
                dropped_ring_full: 0,
                dropped_undecodable: 0,
                missed_runs: Vec::new(),
                reconcile_runs: [0; 3],
                reconcile_duration_s: 0.0,
                reconcile_interval_s: interval.as_secs_f64(),
                namespaces: [0; 3],
                programs: Vec::new(),
                database,
                demo,
            },
            counters: Counters::default(),
            produced_before: 0,
            still: 0,
            found_before: 0,
            without_events: false,
            last_audit_ns: None,
            namespace_reason: None,
            scanned: false,
            ready,
        }
    }

    /// The startup summary of the log.
    pub fn summary(&self, snapshot: &Snapshot) -> String {
        startup::summary(snapshot, self.namespaces(), self.status.source)
    }

    /// Namespaces that the last walk knew of.
    fn namespaces(&self) -> u64 {
        self.status.namespaces.iter().sum()
    }

    /// A new country database is in use.
    pub fn database(&mut self, database: DatabaseInfo) {
        self.status.database = database;
    }

    /// Records that did not decode.
    pub fn undecodable(&mut self, records: u64) {
        self.status.dropped_undecodable += records;
        log::error!(
            "{records} records of the ring buffer not decoded and dropped: agent and BPF programs \
             do not match; install one release"
        );
    }

    /// Takes a reading of the kernel's counters and returns what was lost since
    /// the last one.
    pub fn counters(&mut self, counters: &Counters) -> Lost {
        let missed = |counters: &Counters, which: fn(Probe) -> bool| -> u64 {
            let missed = counters.missed.iter();
            missed
                .filter(|(probe, _)| which(*probe))
                .map(|(_, runs)| runs)
                .sum()
        };
        let rise = |which: fn(Probe) -> bool| {
            missed(counters, which).saturating_sub(missed(&self.counters, which))
        };
        let lost = Lost {
            events: counters.ring_full.saturating_sub(self.counters.ring_full),
            missed_runs: rise(|_| true),
            missed_changes: rise(|probe| probe == Probe::SetState),
        };
        let known = std::mem::take(&mut self.counters.missed);
        self.counters.clone_from(counters);
        // A reading that failed this time must not look like a rise next time.
        for (probe, runs) in known {
            if counters.missed.iter().all(|(other, _)| *other != probe) {
                self.counters.missed.push((probe, runs));
            }
        }
        lost
    }

    /// Reserve attempts at the last reading.
    pub fn produced(&self) -> u64 {
        self.counters.produced
    }

    /// A walk ended; true when it was the initial scan.
    pub fn walked(&mut self, ended: WalkState) -> bool {
        let summary = ended.summary;
        let status = &mut self.status;
        if ended.walk.audit {
            let trigger = match ended.walk.trigger {
                Trigger::Startup => 0,
                Trigger::Interval => 1,
                Trigger::Loss => 2,
            };
            status.reconcile_runs[trigger] += 1;
            // One that could read nothing proves nothing.
            if summary.diag + summary.proc > 0 {
                self.last_audit_ns = Some(ended.now_ns);
            }
            // Two audits, since the first may still mend what was lost before.
            self.still = match self.counters.produced == self.produced_before {
                true => self.still + 1,
                false => 0,
            };
            self.produced_before = self.counters.produced;
            let found = ended.corrections.added + ended.corrections.updated;
            self.without_events = status.source == Source::Ebpf
                && self.still >= STILL_AUDITS
                && found > self.found_before;
            self.found_before = found;
            status.reconcile_duration_s = summary.duration_ns as f64 / 1e9;
            status.reconcile_interval_s = ended.audit_every.as_secs_f64();
        }
        status.namespaces = [summary.diag, summary.proc, summary.unaudited].map(u64::from);
        if summary.reason != self.namespace_reason {
            if let Some(reason) = &summary.reason {
                warn!(
                    "{} of {} network namespaces cannot be read by sock_diag: {reason}",
                    summary.proc + summary.unaudited,
                    self.namespaces(),
                );
            }
            self.namespace_reason = summary.reason;
        }
        !std::mem::replace(&mut self.scanned, true)
    }

    /// The initial scan is folded and logged.
    pub fn ready(&self) {
        self.ready.send_replace(true);
    }

    /// Ends the wait for the initial scan when it takes too long.
    pub fn give_up_waiting(&self, waited: Duration) {
        if !*self.ready.borrow() && waited >= READY_AT_LATEST {
            error!(
                "the initial scan is not done after {} s: serving with connmon_up 0 until it is",
                READY_AT_LATEST.as_secs()
            );
            self.ready();
        }
    }

    /// Time since the start.
    pub fn waited(&self) -> Duration {
        self.started.elapsed()
    }

    /// `connmon_up`: the source delivers and the last audit is young.
    fn up(&self, now_ns: u64) -> bool {
        // The next audit needs its time, too.
        let limit_s =
            self.status.reconcile_interval_s * UP_INTERVALS + self.status.reconcile_duration_s;
        let age_s = |at_ns| now_ns.saturating_sub(at_ns) as f64 / 1e9;
        !self.without_events && self.last_audit_ns.is_some_and(|at| age_s(at) <= limit_s)
    }

    /// The agent's part of a report.
    pub fn status(&self, snapshot: &Snapshot, programs: Vec<ProgramStats>) -> Status {
        let ready = *self.ready.borrow();
        Status {
            up: self.up(monotonic_ns()),
            ready,
            waiting_for: (!ready)
                .then(|| "the initial scan of the kernel's socket tables".to_owned()),
            uptime_s: self.started.elapsed().as_secs_f64(),
            events_produced: self.counters.produced,
            events_folded: snapshot.folded,
            dropped_ring_full: self.counters.ring_full,
            missed_runs: self.counters.missed.clone(),
            programs,
            ..self.status.clone()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const SECOND_NS: u64 = 1_000_000_000;

    fn board() -> (StatusBoard, watch::Receiver<bool>) {
        let (ready, is_ready) = watch::channel(false);
        let database = connmon_core::geo::Database::embedded().unwrap().info(0, 0);
        let board = StatusBoard::new(
            Source::Ebpf,
            None,
            Vec::new(),
            database,
            MINUTE,
            false,
            ready,
        );
        (board, is_ready)
    }

    fn audit(board: &mut StatusBoard, trigger: Trigger, at_s: u64, read: u32, added: u64) {
        board.walked(WalkState {
            walk: Walk {
                trigger,
                traffic: false,
                audit: true,
            },
            summary: WalkSummary {
                diag: read,
                duration_ns: 5 * SECOND_NS,
                ..WalkSummary::default()
            },
            now_ns: at_s * SECOND_NS,
            audit_every: MINUTE,
            corrections: Corrections {
                added,
                ..Corrections::default()
            },
        });
    }

    fn counters(produced: u64, ring_full: u64, missed: &[(Probe, u64)]) -> Counters {
        Counters {
            produced,
            ring_full,
            missed: missed.to_vec(),
        }
    }

    #[test]
    fn up_needs_an_audit_of_the_last_three_intervals() {
        let (mut board, _ready) = board();
        assert!(!board.up(0), "never audited");
        audit(&mut board, Trigger::Startup, 100, 1, 0);
        assert!(board.up(100 * SECOND_NS));
        // Three intervals and the 5 s that an audit takes.
        assert!(board.up(285 * SECOND_NS));
        assert!(!board.up(286 * SECOND_NS));
        audit(&mut board, Trigger::Interval, 286, 0, 0);
        assert!(!board.up(286 * SECOND_NS), "an audit that read nothing");
    }

    #[test]
    fn up_ends_when_sockets_appear_and_no_event_comes() {
        let (mut board, _ready) = board();
        board.counters(&counters(10, 0, &[]));
        audit(&mut board, Trigger::Startup, 0, 1, 0);
        audit(&mut board, Trigger::Loss, 1, 1, 3);
        assert!(board.up(SECOND_NS), "what was lost before is mended");
        audit(&mut board, Trigger::Interval, 60, 1, 3);
        assert!(board.up(60 * SECOND_NS), "nothing happens");
        audit(&mut board, Trigger::Interval, 120, 1, 4);
        assert!(
            !board.up(120 * SECOND_NS),
            "a socket that no event reported"
        );
        board.counters(&counters(11, 0, &[]));
        audit(&mut board, Trigger::Interval, 180, 1, 4);
        assert!(board.up(180 * SECOND_NS), "events come once more");
    }

    #[test]
    fn readiness_waits_ten_seconds_at_most() {
        let (board, ready) = board();
        board.give_up_waiting(Duration::from_secs(9));
        assert!(!*ready.borrow());
        board.give_up_waiting(READY_AT_LATEST);
        assert!(*ready.borrow() && !board.up(0));
    }

    #[test]
    fn losses_differ_by_what_they_cost() {
        let (mut board, _ready) = board();
        assert!(
            !board
                .counters(&counters(5, 0, &[(Probe::SetState, 0)]))
                .any()
        );
        let lost = board.counters(&counters(9, 2, &[(Probe::SetState, 0)]));
        assert_eq!((lost.events, lost.missed_runs), (2, 0));
        assert!(lost.any() && lost.costs_connections());
        let accepts = [(Probe::SetState, 0), (Probe::Accept, 7)];
        let lost = board.counters(&counters(9, 2, &accepts));
        assert_eq!((lost.missed_runs, lost.missed_changes), (7, 0));
        assert!(lost.any() && !lost.costs_connections());
        let changes = [(Probe::SetState, 1), (Probe::Accept, 7)];
        assert!(
            board
                .counters(&counters(9, 2, &changes))
                .costs_connections()
        );
        // A reading that fails and comes back is no loss.
        assert!(!board.counters(&counters(9, 2, &[])).any());
        assert!(!board.counters(&counters(9, 2, &changes)).any());
    }
}

//! The fold thread: drains the ring buffer, folds events and the rows of walks,
//! answers report requests. No other thread touches this state, so it has no
//! lock.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use connmon_core::fold::Fold;
use connmon_core::geo::Locator;
use connmon_core::report::{DatabaseInfo, Report};
use connmon_core::scan::{Trigger, Walk, WalkMessage, WalkSummary};
use connmon_host::kernel::{self, Tracer, monotonic_ns};
use connmon_host::reconcile::{Refused, WalkMessages, Walker, cpu_time, rest_after};
use log::{debug, info, warn};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use super::reporter::Request;
use super::schedule::{Ended, Schedule};
use super::status::{StatusBoard, WalkState};

/// Longest wait of records below the wake-up threshold; half of the 100 ms that
/// `connmon trace` may be late.
const TICK: Duration = Duration::from_millis(50);

/// Most events folded before other work: some milliseconds.
const DRAIN_BUDGET: usize = 16_384;

/// Longest drain of the ring. A full ring takes a fraction of it; a longer one
/// means that the kernel fills the ring faster than the agent reads, and scrapes
/// and the shutdown must not wait for that.
const DRAIN_TIME: Duration = Duration::from_millis(250);

/// How long a row waits for a record before it that is still being written: far
/// longer than an interrupt, short beside a scrape.
const WRITING: Duration = Duration::from_millis(10);

/// A walk that sends no message for so long has stalled.
const STALLED: Duration = Duration::from_secs(60);

/// How often the kernel's loss counters are read.
const COUNTERS_EVERY: Duration = Duration::from_millis(250);

/// Tries to read ring and counters at the same instant.
const SAME_INSTANT_TRIES: usize = 4;

/// Report requests answered together.
const REQUEST_BATCH: usize = 64;

const WALKER_ENDED: &str = "the walker thread has ended";

/// The channels that end in the fold thread.
pub struct Inputs {
    /// Messages of the walker.
    pub messages: WalkMessages,
    /// Report requests.
    pub requests: mpsc::Receiver<Request>,
    /// New databases.
    pub databases: mpsc::Receiver<DatabaseChange>,
    /// Becomes true at shutdown.
    pub shutdown: watch::Receiver<bool>,
}

/// The country database changed, or a change of it was refused.
#[derive(Debug)]
pub struct DatabaseChange {
    /// The new one; `None` keeps the one in use.
    pub locator: Option<Locator>,
    /// What reports show from now on.
    pub info: DatabaseInfo,
}

/// The thread's state.
pub struct Pipeline {
    /// `None` polls.
    tracer: Option<Tracer>,
    fold: Fold,
    locator: Locator,
    walker: Walker,
    board: StatusBoard,
    schedule: Schedule,
    audit_every: Duration,
    traffic_every: Option<Duration>,
    walk: Option<Walk>,
    /// When the walk began or last sent a message.
    last_progress: Instant,
    /// CPU time that folding the walk's rows took so far.
    walk_cpu: Duration,
    /// The most of it between two drains of the ring.
    walk_step: Duration,
    settling: Option<WalkSummary>,
    counters_read: Instant,
    /// Connects without a place in the table that the log has reported.
    pending_overflow: u64,
    /// Missed closes that the log has reported.
    missed_closes: u64,
}

impl Pipeline {
    /// Audits every `audit_every` at most, and samples the bytes of live
    /// connections every `traffic_every` at most, `None` never.
    pub fn new(
        tracer: Option<Tracer>,
        fold: Fold,
        locator: Locator,
        walker: Walker,
        board: StatusBoard,
        audit_every: Duration,
        traffic_every: Option<Duration>,
    ) -> Self {
        let traffic = tracer.as_ref().is_some_and(Tracer::traffic_known);
        let traffic_every = traffic_every.filter(|_| traffic);
        Self {
            tracer,
            fold,
            locator,
            walker,
            board,
            schedule: Schedule::new(monotonic_ns(), audit_every, traffic_every),
            audit_every,
            traffic_every,
            walk: None,
            last_progress: Instant::now(),
            walk_cpu: Duration::ZERO,
            walk_step: Duration::ZERO,
            settling: None,
            counters_read: Instant::now(),
            pending_overflow: 0,
            missed_closes: 0,
        }
    }

    /// Runs until shutdown.
    ///
    /// # Errors
    /// When the ring cannot be watched or the walker is gone.
    pub async fn run(mut self, mut inputs: Inputs) -> anyhow::Result<()> {
        let ring = match &self.tracer {
            Some(tracer) => Some(kernel::watch(tracer.ring_fd())?),
            None => None,
        };
        self.request(Walk {
            trigger: Trigger::Startup,
            // Without samples too: the bytes that a connection moved before
            // the start are not counted.
            traffic: self.tracer.as_ref().is_some_and(Tracer::traffic_known),
            audit: true,
        })?;
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut waiting: Vec<Request> = Vec::with_capacity(REQUEST_BATCH);
        loop {
            tokio::select! {
                ready = readable(ring.as_ref()) => {
                    let mut guard = ready?;
                    // Edge-triggered: clear first, then drain to the end, so
                    // that a record submitted meanwhile raises the next edge.
                    guard.clear_ready();
                    self.drain();
                }
                _ = tick.tick() => self.tick()?,
                count = inputs.requests.recv_many(&mut waiting, REQUEST_BATCH) => {
                    if count == 0 {
                        return Ok(());
                    }
                    let report = Arc::new(self.report());
                    for request in waiting.drain(..) {
                        // A client that went away does not receive it.
                        let _ = request.send(Arc::clone(&report));
                    }
                }
                () = tokio::task::yield_now(), if self.settling.is_some() => self.settle(),
                message = inputs.messages.next(), if self.settling.is_none() => {
                    self.walk(message.context(WALKER_ENDED)?);
                }
                Some(change) = inputs.databases.recv() => {
                    // Events already in the ring belong to the old database.
                    self.drain();
                    if let Some(locator) = change.locator {
                        self.locator = locator;
                    }
                    self.board.database(change.info);
                }
                _ = inputs.shutdown.changed() => return Ok(()),
            }
        }
    }

    /// Folds what lies in the ring, to its end or for [`DRAIN_TIME`].
    fn drain(&mut self) {
        let started = Instant::now();
        while self.drain_some() && started.elapsed() < DRAIN_TIME {}
    }

    /// Folds at most [`DRAIN_BUDGET`] events; true when the budget was used up.
    fn drain_some(&mut self) -> bool {
        let Some(tracer) = &mut self.tracer else {
            return false;
        };
        let now_ns = monotonic_ns();
        let (fold, locator) = (&mut self.fold, &mut self.locator);
        let drained = tracer.drain(DRAIN_BUDGET, |event| fold.apply(now_ns, &event, locator));
        if drained.undecodable > 0 {
            self.board.undecodable(drained.undecodable);
            self.fold.lost(drained.undecodable);
            self.schedule.loss(now_ns);
        }
        !drained.empty
    }

    /// Folds every record that was produced before this call.
    fn drain_produced(&mut self) {
        let Some(tracer) = &mut self.tracer else {
            return;
        };
        let produced = tracer.produced();
        let mut stuck = None;
        // Ends however much is produced meanwhile.
        loop {
            let more = self.drain_some();
            let through = self
                .tracer
                .as_mut()
                .is_none_or(|tracer| tracer.is_through(produced));
            if through {
                return;
            }
            if more {
                stuck = None;
            } else if stuck.get_or_insert_with(Instant::now).elapsed() >= WRITING {
                return;
            } else {
                std::thread::yield_now();
            }
        }
    }

    fn tick(&mut self) -> anyhow::Result<()> {
        self.drain();
        if self.counters_read.elapsed() >= COUNTERS_EVERY {
            self.counters_read = Instant::now();
            self.read_counters();
            self.audit_missed_closes();
            self.warn_of_untimed();
            self.warn_of_stalled_walk();
        }
        let now_ns = monotonic_ns();
        if let Some(walk) = self.schedule.due(now_ns) {
            self.request(walk)?;
        }
        self.board.give_up_waiting(self.board.waited());
        Ok(())
    }

    fn request(&mut self, walk: Walk) -> anyhow::Result<()> {
        debug!("walk starts: {walk:?}");
        self.walk = Some(walk);
        self.last_progress = Instant::now();
        self.walk_cpu = Duration::ZERO;
        self.walk_step = Duration::ZERO;
        match self.walker.request(walk) {
            Ok(()) => Ok(()),
            Err(Refused::Busy) => anyhow::bail!("bug: two walks at once"),
            Err(Refused::Gone) => anyhow::bail!(WALKER_ENDED),
        }
    }

    /// Reads the kernel's counters; a rise of a loss counter triggers an audit.
    fn read_counters(&mut self) {
        let Some(tracer) = &mut self.tracer else {
            return;
        };
        let counters = tracer.counters();
        let lost = self.board.counters(&counters);
        if !lost.any() {
            return;
        }
        // A missed run of a function probe costs a name or a time, never a
        // connection.
        if lost.costs_connections() {
            self.fold.lost(lost.events);
        }
        self.schedule.loss(monotonic_ns());
        let remedy = match lost.events {
            0 => "",
            _ => "; the ring buffer was full, a larger --ebpf.ring-buffer-size may help",
        };
        warn!(
            "{} events dropped and {} probe runs missed: auditing now{remedy}",
            lost.events, lost.missed_runs,
        );
    }

    /// After a counted loss missed closes are expected, and its audits correct
    /// them. Otherwise the kernel lost events without counting them.
    fn audit_missed_closes(&mut self) {
        let missed = self.fold.missed_closes();
        let more = missed - std::mem::replace(&mut self.missed_closes, missed);
        if more == 0 || self.schedule.expects_loss() {
            return;
        }
        self.fold.lost(0);
        self.schedule.loss(monotonic_ns());
        warn!(
            "{more} connections closed without an event, and the kernel counted no loss: \
             auditing now"
        );
    }

    /// Connects beyond the bound lose their latency and nothing else, so they
    /// get a log line and no audit.
    fn warn_of_untimed(&mut self) {
        let untimed = self.fold.pending_overflow();
        let more = untimed - std::mem::replace(&mut self.pending_overflow, untimed);
        if more > 0 {
            warn!(
                "connect latency of {more} connections not measured: connects under way fill \
                 their eighth of the connection table; unless it is a port scan, raise \
                 --connections.max"
            );
        }
    }

    /// The kernel reads a socket's counters under the socket's lock. A process
    /// that holds the lock, by a write that never ends, also stops the walk.
    fn warn_of_stalled_walk(&self) {
        let stalled = self.last_progress.elapsed();
        if self.walk.is_some() && stalled >= STALLED {
            log::error!(
                "socket-table scan: no progress for {} s: another process holds the lock of a \
                 socket, or a file that the scan reads; there are no audits until it releases \
                 it, and gauges rest on events alone; end that process",
                stalled.as_secs()
            );
        }
    }

    fn walk(&mut self, message: WalkMessage) {
        self.last_progress = Instant::now();
        // Sound because a program runs before the state that it reports is
        // visible: what a row shows was produced by the time the row is here.
        self.drain_produced();
        if let WalkMessage::End(summary) = &message {
            self.settling = Some(summary.clone());
        }
        let started = cpu_time();
        self.fold.walk(monotonic_ns(), message, &mut self.locator);
        self.count_step(started);
        self.drain_some();
    }

    /// Counts a step of the walk that began at this CPU time. The ring is drained
    /// before and after it.
    fn count_step(&mut self, started: Duration) {
        let step = cpu_time().saturating_sub(started);
        self.walk_cpu += step;
        self.walk_step = self.walk_step.max(step);
    }

    /// One slice of the work that ends a walk; after the last, [`Self::end_walk`].
    fn settle(&mut self) {
        self.drain_some();
        let started = cpu_time();
        let more = self.fold.sweep(monotonic_ns());
        self.count_step(started);
        if more {
            return;
        }
        if let (Some(summary), Some(walk)) = (self.settling.take(), self.walk.take()) {
            debug!(
                "walk folded in {} µs of CPU time, at most {} µs of it between two drains of the ring",
                self.walk_cpu.as_micros(),
                self.walk_step.as_micros()
            );
            self.end_walk(walk, summary);
        }
    }

    /// Plans the next walk and reports what this one found.
    fn end_walk(&mut self, walk: Walk, mut summary: WalkSummary) {
        let unlisted = self.fold.unlisted_namespaces();
        if unlisted > 0 {
            summary.unaudited += unlisted;
            summary.reason.get_or_insert_with(|| {
                format!("{unlisted} with connections have neither a process nor a mount")
            });
        }
        let now_ns = monotonic_ns();
        let folding_ns = u64::try_from(self.walk_cpu.as_nanos()).unwrap_or(u64::MAX);
        let cpu_ns = summary.cpu_ns.saturating_add(folding_ns);
        // Audits read everything once.
        let cost = if summary.twice { cpu_ns / 2 } else { cpu_ns };
        // Polling is the source itself, at the pace that was asked for.
        let rest = match self.tracer {
            Some(_) => rest_after(cost),
            None => Duration::ZERO,
        };
        let audit_every = self.audit_every.max(rest);
        let ended = Ended {
            audit_every,
            traffic_every: self.traffic_every.map(|every| every.max(rest)),
            rest,
            suspects: self.fold.suspects() > 0,
            owners_wait: summary.owners_wait,
        };
        self.schedule.finished(now_ns, walk, ended);
        // First, since a loss that shows only now explains removals.
        self.read_counters();
        if let Some(unexplained) = self.fold.take_unexplained() {
            warn!(
                "the audit removed connections whose close no event reported, though no event is \
                 known to be lost: {unexplained}; please report this line"
            );
        }
        let first = self.board.walked(WalkState {
            walk,
            summary,
            now_ns,
            audit_every,
            corrections: self.fold.corrections(),
        });
        if first {
            let snapshot = self.fold.snapshot();
            info!("{}", self.board.summary(&snapshot));
            self.board.ready();
        }
        // Gives back what the initial scan and the search for owners after it used.
        if first || !walk.audit && !walk.traffic {
            kernel::trim_memory();
        }
    }

    fn report(&mut self) -> Report {
        #[cfg(debug_assertions)]
        super::panic_if_asked("fold");
        self.drain_whole();
        let snapshot = self.fold.snapshot();
        let programs = match &self.tracer {
            Some(tracer) => tracer.program_stats(),
            None => Vec::new(),
        };
        let status = self.board.status(&snapshot, programs);
        Report { snapshot, status }
    }

    /// Drains the ring and reads the counters so that both show the same
    /// instant, if the traffic allows: nothing was produced between a reading and
    /// the end of the drain after it.
    fn drain_whole(&mut self) {
        for _ in 0..SAME_INSTANT_TRIES {
            self.read_counters();
            let before = self.board.produced();
            self.drain();
            self.read_counters();
            if self.board.produced() == before {
                return;
            }
        }
    }
}

/// Resolves when the ring has data; never without a ring.
async fn readable(
    ring: Option<&AsyncFd<OwnedFd>>,
) -> std::io::Result<tokio::io::unix::AsyncFdReadyGuard<'_, OwnedFd>> {
    match ring {
        Some(ring) => ring.readable().await,
        None => std::future::pending().await,
    }
}

//! The fold thread: drains the ring, folds events and walks, answers report
//! requests. Nothing else touches the state, so nothing needs a lock.

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
use log::{debug, info};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use super::first_words;
use super::reporter::Request;
use super::schedule::{Ended, Schedule};
use super::status::{StatusBoard, WalkState};

/// Records below the wake-up threshold wait for this at most; half of the
/// promised 100 ms.
const TICK: Duration = Duration::from_millis(50);

/// Events folded before other work gets its turn: some milliseconds.
const DRAIN_BUDGET: usize = 16_384;

/// A full ring takes a fraction of this; with more the kernel fills it faster
/// than a starved agent can read, and scrapes and the order to stop wait.
const DRAIN_TIME: Duration = Duration::from_millis(250);

/// How long a row waits for the records that were produced before it, should
/// one of them be half written: far beyond any interrupt, short beside a scrape.
const WRITING: Duration = Duration::from_millis(10);

/// A walk that says nothing for so long hangs.
const SILENCE: Duration = Duration::from_secs(60);

/// How often the kernel's loss counters are read.
const COUNTERS_EVERY: Duration = Duration::from_millis(250);

/// Tries to read ring and counters at the same instant.
const SAME_INSTANT_TRIES: usize = 4;

/// Report requests answered together.
const REQUEST_BATCH: usize = 64;

/// What the pipeline is built from.
pub struct Parts {
    /// Kernel side; `None` polls.
    pub tracer: Option<Tracer>,
    /// State machine.
    pub fold: Fold,
    /// Country database.
    pub locator: Locator,
    /// Commands the walker thread.
    pub walker: Walker,
    /// Messages of the walker.
    pub messages: WalkMessages,
    /// Report requests.
    pub requests: mpsc::Receiver<Request>,
    /// New databases.
    pub databases: mpsc::Receiver<DatabaseChange>,
    /// Becomes true at shutdown.
    pub shutdown: watch::Receiver<bool>,
    /// Everything a report says of the agent itself.
    pub board: StatusBoard,
    /// How often to audit, at most.
    pub audit_every: Duration,
    /// Whether the source knows traffic figures.
    pub traffic: bool,
    /// How often to sample traffic, at most; `None` never.
    pub traffic_every: Option<Duration>,
}

/// The country database changed, or a change of it was refused.
#[derive(Debug)]
pub struct DatabaseChange {
    /// The new one; `None` keeps the one in use.
    pub locator: Option<Locator>,
    /// What reports say from now on.
    pub info: DatabaseInfo,
}

/// The thread's state.
struct Pipeline {
    tracer: Option<Tracer>,
    fold: Fold,
    locator: Locator,
    walker: Walker,
    board: StatusBoard,
    schedule: Schedule,
    audit_every: Duration,
    traffic_every: Option<Duration>,
    walk: Option<Walk>,
    /// When the walk began or last told of something.
    heard: Instant,
    /// CPU time that folding the walk's rows took so far.
    walk_cpu: Duration,
    /// The most of it between two drains of the ring.
    walk_step: Duration,
    settling: Option<WalkSummary>,
    counters_read: Instant,
    /// Active opens not kept that the log was told of.
    pending_overflow: u64,
}

/// Runs until shutdown.
///
/// # Errors
/// When the ring cannot be watched or the walker is gone.
pub async fn run(parts: Parts) -> anyhow::Result<()> {
    let Parts {
        tracer,
        fold,
        locator,
        walker,
        mut messages,
        mut requests,
        mut databases,
        mut shutdown,
        board,
        audit_every,
        traffic,
        traffic_every,
    } = parts;
    let now_ns = monotonic_ns();
    let ring = match &tracer {
        Some(tracer) => Some(kernel::watch(tracer.ring_fd())?),
        None => None,
    };
    let mut pipeline = Pipeline {
        tracer,
        fold,
        locator,
        walker,
        board,
        schedule: Schedule::new(now_ns, audit_every, traffic_every),
        audit_every,
        traffic_every,
        walk: None,
        heard: Instant::now(),
        walk_cpu: Duration::ZERO,
        walk_step: Duration::ZERO,
        settling: None,
        counters_read: Instant::now(),
        pending_overflow: 0,
    };
    pipeline.request(Walk {
        trigger: Trigger::Startup,
        // Without samples too: what a seed moved before start is not counted.
        traffic,
        audit: true,
    })?;
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut waiting: Vec<Request> = Vec::with_capacity(REQUEST_BATCH);
    loop {
        tokio::select! {
            ready = readable(ring.as_ref()) => {
                let mut guard = ready?;
                // Edge-triggered: clear first, then drain to the end, so that
                // a record submitted meanwhile raises the next edge.
                guard.clear_ready();
                pipeline.drain();
            }
            _ = tick.tick() => pipeline.tick()?,
            count = requests.recv_many(&mut waiting, REQUEST_BATCH) => {
                if count == 0 {
                    return Ok(());
                }
                let report = Arc::new(pipeline.report());
                for request in waiting.drain(..) {
                    // A client that went away has no use for it.
                    let _ = request.send(Arc::clone(&report));
                }
            }
            () = tokio::task::yield_now(), if pipeline.settling.is_some() => pipeline.settle(),
            message = messages.next(), if pipeline.settling.is_none() => {
                pipeline.walk(message.context("the reconcile thread has ended")?);
            }
            Some(change) = databases.recv() => {
                // Events already in the ring belong to the old database.
                pipeline.drain();
                if let Some(locator) = change.locator {
                    pipeline.locator = locator;
                }
                pipeline.board.database(change.info);
            }
            _ = shutdown.changed() => return Ok(()),
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

impl Pipeline {
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
        // An end is in sight, however much is produced meanwhile.
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
            self.tell_of_unkept();
            self.tell_of_silence();
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
        self.heard = Instant::now();
        self.walk_cpu = Duration::ZERO;
        self.walk_step = Duration::ZERO;
        match self.walker.request(walk) {
            Ok(()) => Ok(()),
            Err(Refused::Busy) => anyhow::bail!("bug: two walks at once"),
            Err(Refused::Gone) => anyhow::bail!("the reconcile thread has ended"),
        }
    }

    /// Reads the kernel's counters; a rise of a loss counter triggers an audit.
    fn read_counters(&mut self) {
        let Some(tracer) = &mut self.tracer else {
            return;
        };
        let counters = tracer.counters();
        let lost = self.board.counters(&counters);
        if lost.any() {
            // A missed run of a function probe costs a name or a time, never
            // a connection.
            if lost.costs_connections() {
                self.fold.lost(lost.events);
            }
            self.schedule.loss(monotonic_ns());
            let remedy = match lost.events {
                0 => "",
                _ => "; a larger --ebpf.ring-buffer-size may help",
            };
            log::warn!(
                "{} events dropped and {} program runs missed: auditing now{remedy}",
                lost.events,
                lost.missed_runs,
            );
        }
    }

    /// Connects beyond the bound lose their latency and nothing else, so they
    /// are worth a line, not an audit.
    fn tell_of_unkept(&mut self) {
        let unkept = self.fold.pending_overflow();
        let more = unkept - std::mem::replace(&mut self.pending_overflow, unkept);
        if more > 0 {
            log::warn!(
                "{more} connects not timed: no room for them in the connection table, an \
                     eighth of which is theirs; if it is no scan, a larger \
                     --connections.max helps",
            );
        }
    }

    /// A figure of a socket is read under its lock, and whoever keeps that,
    /// by a write that never ends, keeps the walk as well.
    fn tell_of_silence(&self) {
        let silence = self.heard.elapsed();
        if self.walk.is_some() && silence >= SILENCE {
            log::error!(
                "the walk of the kernel's socket tables has told of nothing for {} s: a socket or \
                 a file that it reads is held by another process; until it ends there are no \
                 audits, and the gauges rest on events alone",
                silence.as_secs()
            );
        }
    }

    fn walk(&mut self, message: WalkMessage) {
        self.heard = Instant::now();
        // The merge is sound because a trace precedes the state it tells of:
        // what a row shows was produced by the time the row is here.
        self.drain_produced();
        if let WalkMessage::End(summary) = &message {
            self.settling = Some(summary.clone());
        }
        let started = cpu_time();
        self.fold.walk(monotonic_ns(), message, &mut self.locator);
        self.count_step(started);
        self.drain_some();
    }

    /// Counts a step of the walk that began at this CPU time; the ring was
    /// drained before it and will be after it.
    fn count_step(&mut self, started: Duration) {
        let step = cpu_time().saturating_sub(started);
        self.walk_cpu += step;
        self.walk_step = self.walk_step.max(step);
    }

    /// One slice of the scans that end a walk, then its bookkeeping.
    fn settle(&mut self) {
        self.drain_some();
        let started = cpu_time();
        let more = self.fold.sweep(monotonic_ns());
        self.count_step(started);
        if more {
            return;
        }
        let (Some(mut summary), Some(walk)) = (self.settling.take(), self.walk.take()) else {
            return;
        };
        debug!(
            "walk folded in {} µs of CPU time, at most {} µs of it between two drains of the ring",
            self.walk_cpu.as_micros(),
            self.walk_step.as_micros()
        );
        let unlisted = self.fold.unlisted_namespaces();
        if unlisted > 0 {
            summary.unaudited += unlisted;
            summary.reason.get_or_insert_with(|| {
                format!("{unlisted} with connections are of no process and no mount")
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
        // A loss that shows only now explains them.
        self.read_counters();
        if let Some(unexplained) = self.fold.take_unexplained() {
            log::warn!(
                "the audit removed connections whose closes no event told, though no event is \
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
            info!("{}", first_words::line(&snapshot, &self.board));
            self.board.ready();
        }
        // What the first walk and the search after it needed for a moment.
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

    /// Drains the ring and reads the counters so that both tell of the same
    /// instant, if the traffic leaves one: nothing was produced between a
    /// reading and the end of the drain after it.
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

//! What a scrape, the page and the summary are rendered from: the fold's
//! snapshot and the state of the agent, taken at one instant.

use std::sync::Arc;

use crate::fold::Snapshot;
use crate::probe::{Probe, Rung};

/// One consistent answer.
#[derive(Clone, Debug)]
pub struct Report {
    /// The fold's part.
    pub snapshot: Snapshot,
    /// The agent's part.
    pub status: Status,
}

/// The label `source`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Kernel events.
    Ebpf,
    /// Polling /proc.
    Proc,
}

impl Source {
    /// Label value.
    pub fn label(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Proc => "proc",
        }
    }
}

/// Kernel-kept figures of one BPF program.
#[derive(Clone, Debug, PartialEq)]
pub struct ProgramStats {
    /// Program name.
    pub program: String,
    /// Runs.
    pub runs: u64,
    /// Nanoseconds.
    pub run_time_ns: u64,
}

/// The country database in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatabaseInfo {
    /// `database_type` of its metadata, invalid characters replaced.
    pub database_type: String,
    /// `embedded` or `file`.
    pub source: &'static str,
    /// Unix seconds.
    pub build_timestamp: u64,
    /// Successful reloads.
    pub reloads_ok: u64,
    /// Refused reloads.
    pub reloads_failed: u64,
}

/// State of the agent.
#[derive(Clone, Debug)]
pub struct Status {
    /// Source.
    pub source: Source,
    /// Why the source is not eBPF, or `None`.
    pub degraded: Option<String>,
    /// One per probe.
    pub rungs: Vec<Rung>,
    /// `connmon_up`.
    pub up: bool,
    /// Whether the first reconcile is folded (telemetry answers 503 before).
    pub ready: bool,
    /// What readiness waits for, when not ready.
    pub waiting_for: Option<String>,
    /// Seconds since start of the agent.
    pub uptime_s: f64,
    /// Reserve attempts, all programs.
    pub events_produced: u64,
    /// Events folded.
    pub events_folded: u64,
    /// Reserve failures.
    pub dropped_ring_full: u64,
    /// Records that did not decode.
    pub dropped_undecodable: u64,
    /// Per probe, only where the kernel tells.
    pub missed_runs: Vec<(Probe, u64)>,
    /// Runs by trigger: startup, interval, loss.
    pub reconcile_runs: [u64; 3],
    /// Last walk, seconds.
    pub reconcile_duration_s: f64,
    /// Current interval, seconds.
    pub reconcile_interval_s: f64,
    /// Namespaces by access: diag, proc, unaudited.
    pub namespaces: [u64; 3],
    /// Kernel's program statistics, empty unless kept.
    pub programs: Vec<ProgramStats>,
    /// Country database.
    pub database: DatabaseInfo,
    /// Set by `cargo xtask run --demo` (CONNMON_DEMO=1): mark it everywhere.
    pub demo: bool,
}

/// Why there is no report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unavailable {
    /// The fold thread did not answer in time.
    Timeout,
    /// The fold thread is gone.
    Gone,
}

/// Where reports come from. The agent's implementation asks the fold thread,
/// which drains the ring first, and lets requests that wait share one answer.
pub trait Reporter: Send + Sync + 'static {
    /// A report taken after this call.
    fn report(
        &self,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Arc<Report>, Unavailable>> + Send + '_>>;
}

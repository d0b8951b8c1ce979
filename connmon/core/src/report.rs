//! What a scrape, the page and the summary show: the fold's snapshot and the
//! state of the agent, taken at one instant.

use std::sync::Arc;

use crate::fold::Snapshot;
use crate::probe::{Probe, Rung};
use crate::text::label_values;

/// The state at one instant.
#[derive(Clone, Debug)]
pub struct Report {
    /// State of the fold.
    pub snapshot: Snapshot,
    /// State of the agent.
    pub status: Status,
}

label_values! {
    /// Label `source`.
    Source: 2 {
        /// Kernel events.
        Ebpf = "ebpf",
        /// Polling /proc.
        Proc = "proc",
    }
}

/// The kernel's statistics of one BPF program.
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
    /// Whether the initial scan is folded; before, telemetry answers 503.
    pub ready: bool,
    /// What readiness waits for, if not ready.
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
    /// Missed runs of each probe for which the kernel counts them.
    pub missed_runs: Vec<(Probe, u64)>,
    /// Runs by trigger: startup, interval, loss.
    pub reconcile_runs: [u64; 3],
    /// Last walk, seconds.
    pub reconcile_duration_s: f64,
    /// Current interval, seconds.
    pub reconcile_interval_s: f64,
    /// Namespaces by access: diag, proc, unaudited.
    pub namespaces: [u64; 3],
    /// Program statistics, empty unless the kernel keeps them.
    pub programs: Vec<ProgramStats>,
    /// Country database.
    pub database: DatabaseInfo,
    /// Set by `cargo xtask run --demo` (CONNMON_DEMO=1) and shown everywhere.
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

/// Makes reports. The agent's implementation asks the fold thread, which drains
/// the ring first; requests that wait share one report.
pub trait Reporter: Send + Sync + 'static {
    /// A report taken after this call.
    fn report(
        &self,
    ) -> std::pin::Pin<Box<dyn Future<Output = Result<Arc<Report>, Unavailable>> + Send + '_>>;
}

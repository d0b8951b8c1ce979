//! What the fold exports, copied at one instant.

use std::fmt;

use connmon_common::state;

use crate::event::NetnsId;
use crate::geo::Country;
use crate::text::label_values;

/// How many directions there are; rows are indexed by [`Direction`].
pub const DIRECTIONS: usize = Direction::ALL.len();

label_values! {
    /// Label `direction`.
    Direction: 3 {
        /// Passive open.
        Inbound = "inbound",
        /// Active open.
        Outbound = "outbound",
        /// Existed before start, and its direction cannot be known.
        Unknown = "unknown",
    }
}

label_values! {
    /// Label `reason` of the connect failure families.
    FailureReason: 8 {
        /// ECONNREFUSED.
        Refused = "refused",
        /// ETIMEDOUT.
        Timeout = "timeout",
        /// ECONNRESET.
        Reset = "reset",
        /// EHOSTUNREACH.
        HostUnreachable = "host_unreachable",
        /// ENETUNREACH.
        NetworkUnreachable = "network_unreachable",
        /// Closed locally, or SOCK_DESTROY.
        Aborted = "aborted",
        /// No port or address; no segment was sent.
        Local = "local",
        /// Anything else.
        Other = "other",
    }
}

impl FailureReason {
    /// How many there are.
    pub const COUNT: usize = Self::ALL.len();
}

/// Count and sum of a summary without quantiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Observations.
    pub count: u64,
    /// Their sum, nanoseconds.
    pub sum_ns: u64,
}

impl Sum {
    pub(super) fn add(&mut self, value_ns: u64) {
        self.count += 1;
        self.sum_ns = self.sum_ns.saturating_add(value_ns);
    }
}

/// What every row counts per direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// Sockets in ESTABLISHED now.
    pub connections: u64,
    /// Handshakes completed.
    pub opened: u64,
    /// Opened, seeded or added connections that reached CLOSE.
    pub closed: u64,
    /// Payload bytes received.
    pub received_bytes: u64,
    /// Payload bytes sent.
    pub sent_bytes: u64,
    /// Segments retransmitted.
    pub retransmitted_segments: u64,
}

/// One country; present once seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CountryRow {
    /// Label.
    pub country: Country,
    /// By [`Direction`].
    pub flows: [Flow; DIRECTIONS],
    /// By [`FailureReason`].
    pub failures: [u64; FailureReason::COUNT],
    /// Active handshakes.
    pub connect_latency: Sum,
    /// Smoothed RTT observations.
    pub rtt: Sum,
}

/// A `port` label value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum PortLabel {
    /// A service port.
    Port(u16),
    /// All ports without a row of their own.
    Other,
}

impl fmt::Display for PortLabel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Port(port) => write!(f, "{port}"),
            Self::Other => f.write_str("other"),
        }
    }
}

/// One (port, direction).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRow {
    /// Label.
    pub port: PortLabel,
    /// Label.
    pub direction: Direction,
    /// Counters.
    pub flow: Flow,
    /// CLOSE_WAIT at the last audit.
    pub close_wait: u64,
    /// Outbound rows: by [`FailureReason`]; `None` for other directions.
    pub failures: Option<[u64; FailureReason::COUNT]>,
    /// Inbound rows: handshake done to accept(); `None` for others.
    pub accept_wait: Option<Sum>,
}

/// One (country, port, direction), only with `--metrics.country-port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CrossRow {
    /// Label.
    pub country: Country,
    /// Label.
    pub port: PortLabel,
    /// Label.
    pub direction: Direction,
    /// ESTABLISHED now.
    pub connections: u64,
    /// Handshakes completed.
    pub opened: u64,
}

/// A histogram over one of the contract's bucket lists; `counts` are per
/// bucket (not cumulative), the last one is +Inf.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    /// Upper bounds, nanoseconds, ascending.
    pub bounds_ns: &'static [u64],
    /// `bounds_ns.len() + 1` counts.
    pub counts: Vec<u64>,
    /// Sum of observations, nanoseconds.
    pub sum_ns: u128,
}

/// One group of listening sockets (same namespace, address and port).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListenerRow {
    /// Namespace inode.
    pub netns: NetnsId,
    /// Whether that is the host's namespace.
    pub host: bool,
    /// Local address as text.
    pub address: String,
    /// Port.
    pub port: u16,
    /// Process name, invalid UTF-8 replaced; `unknown` if it is not known.
    pub process: String,
    /// Lowest pid of the group; 0 when unknown.
    pub pid: u32,
    /// Listening sockets behind this entry.
    pub sockets: u32,
    /// Accept queue length, summed.
    pub queue_length: u64,
    /// Accept queue limit, summed; `None` until sock_diag reported it.
    pub queue_limit: Option<u64>,
}

/// States other than ESTABLISHED, counted at the last audit, in this order.
pub const AUDITED_STATES: [(u8, &str); 7] = [
    (state::SYN_SENT, "syn_sent"),
    (state::SYN_RECV, "syn_recv"),
    (state::FIN_WAIT1, "fin_wait1"),
    (state::FIN_WAIT2, "fin_wait2"),
    (state::CLOSE_WAIT, "close_wait"),
    (state::LAST_ACK, "last_ack"),
    (state::CLOSING, "closing"),
];

/// Corrections by action.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Corrections {
    /// Connections found by the initial scan.
    pub seeded: u64,
    /// Connections of which no event was seen.
    pub added: u64,
    /// Entries the kernel does not have.
    pub removed: u64,
    /// States corrected.
    pub updated: u64,
}

/// Everything the fold exports.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Countries seen since start, ordered by label index.
    pub countries: Vec<CountryRow>,
    /// Port rows; `Other` rows always present for each direction.
    pub ports: Vec<PortRow>,
    /// Whether the cross families are on.
    pub cross_enabled: bool,
    /// Cross rows.
    pub cross: Vec<CrossRow>,
    /// Live ESTABLISHED count.
    pub established: u64,
    /// By [`AUDITED_STATES`].
    pub audited_states: [u64; AUDITED_STATES.len()],
    /// `connmon_connect_latency_seconds`.
    pub connect_latency: Histogram,
    /// `connmon_accept_wait_seconds`.
    pub accept_wait: Histogram,
    /// `connmon_rtt_seconds`, by direction.
    pub rtt: [Histogram; DIRECTIONS],
    /// `connmon_connection_duration_seconds`, by direction.
    pub duration: [Histogram; DIRECTIONS],
    /// Listening-port inventory, bounded by `--listeners.max`.
    pub listeners: Vec<ListenerRow>,
    /// `connmon_tracked_connections`: opened + seeded + added − closed − removed.
    pub tracked: u64,
    /// Open connections beyond the cap, in no gauge.
    pub untracked: u64,
    /// `connmon_table_overflow_total`.
    pub table_overflow: u64,
    /// `connmon_tombstone_overflow_total`: closes during a walk that were not
    /// remembered because too many were; older rows may add these connections
    /// back until the next audits.
    pub tombstone_overflow: u64,
    /// `connmon_series_overflow_total{family}`.
    pub series_overflow: Vec<(&'static str, u64)>,
    /// `connmon_series_evicted_total{family}`.
    pub series_evicted: Vec<(&'static str, u64)>,
    /// Events applied, knowingly ignored ones included.
    pub folded: u64,
    /// Events that were lost, and their country with them.
    pub unattributed: u64,
    /// Closes that no event reported; see `Fold::missed_closes`.
    pub missed_closes: u64,
    /// `connmon_reconcile_corrections_total`.
    pub corrections: Corrections,
    /// `connmon_drift_connections`; `None` before the first audit.
    pub drift: Option<u64>,
    /// `connmon_drift_suspected_connections`; `None` before the first audit.
    pub drift_suspected: Option<u64>,
    /// Loopback connections hidden by the filter, at the last walk.
    pub hidden_loopback: u64,
    /// Connections hidden by `--filter.exclude`, at the last walk.
    pub hidden_excluded: u64,
    /// Whether bytes, segments and RTT are known (false: absent, not zero).
    pub traffic_known: bool,
    /// Whether accept times are known (an accept probe is attached).
    pub accept_known: bool,
}

//! What the fold knows, copied out at one instant for exposition.

use std::fmt;

use crate::event::NetnsId;
use crate::geo::Country;

/// Index by [`Direction`].
pub const DIRECTIONS: usize = 3;

/// Label `direction`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Direction {
    /// Passive open.
    Inbound = 0,
    /// Active open.
    Outbound = 1,
    /// Existed before start and cannot be told.
    Unknown = 2,
}

impl Direction {
    /// Every direction, in index order.
    pub const ALL: [Self; DIRECTIONS] = [Self::Inbound, Self::Outbound, Self::Unknown];

    /// Label value.
    pub fn label(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
            Self::Unknown => "unknown",
        }
    }
}

/// Label `reason` of the connect failure families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum FailureReason {
    /// ECONNREFUSED.
    Refused = 0,
    /// ETIMEDOUT.
    Timeout = 1,
    /// ECONNRESET.
    Reset = 2,
    /// EHOSTUNREACH.
    HostUnreachable = 3,
    /// ENETUNREACH.
    NetworkUnreachable = 4,
    /// Closed locally, or SOCK_DESTROY.
    Aborted = 5,
    /// No port or address; no segment ever left.
    Local = 6,
    /// Anything else.
    Other = 7,
}

impl FailureReason {
    /// How many there are.
    pub const COUNT: usize = 8;
    /// Every reason, in index order.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Refused,
        Self::Timeout,
        Self::Reset,
        Self::HostUnreachable,
        Self::NetworkUnreachable,
        Self::Aborted,
        Self::Local,
        Self::Other,
    ];

    /// Label value.
    pub fn label(self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Timeout => "timeout",
            Self::Reset => "reset",
            Self::HostUnreachable => "host_unreachable",
            Self::NetworkUnreachable => "network_unreachable",
            Self::Aborted => "aborted",
            Self::Local => "local",
            Self::Other => "other",
        }
    }
}

/// Count and sum of a summary without quantiles.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    /// Observations.
    pub count: u64,
    /// Their sum, nanoseconds.
    pub sum_ns: u64,
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
    /// What has no row of its own.
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
    /// Process name, invalid UTF-8 replaced; `unknown` when not readable.
    pub process: String,
    /// Lowest pid of the group; 0 when unknown.
    pub pid: u32,
    /// Listening sockets behind this entry.
    pub sockets: u32,
    /// Accept queue length, summed.
    pub queue_length: u64,
    /// Accept queue limit, summed; `None` until a table has told it, which
    /// /proc does not.
    pub queue_limit: Option<u64>,
}

/// States beside ESTABLISHED, counted at the last audit, in this order.
pub const AUDITED_STATES: [(u8, &str); 7] = [
    (connmon_common::state::SYN_SENT, "syn_sent"),
    (connmon_common::state::SYN_RECV, "syn_recv"),
    (connmon_common::state::FIN_WAIT1, "fin_wait1"),
    (connmon_common::state::FIN_WAIT2, "fin_wait2"),
    (connmon_common::state::CLOSE_WAIT, "close_wait"),
    (connmon_common::state::LAST_ACK, "last_ack"),
    (connmon_common::state::CLOSING, "closing"),
];

/// Corrections by action.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Corrections {
    /// Seeds of the startup walk.
    pub seeded: u64,
    /// Rows that no event had told of.
    pub added: u64,
    /// Entries the kernel does not have.
    pub removed: u64,
    /// States corrected.
    pub updated: u64,
}

/// Everything the fold exports.
#[derive(Clone, Debug, PartialEq)]
pub struct Snapshot {
    /// Countries once seen, ordered by label index.
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
    /// `connmon_tombstone_overflow_total`: closes during a walk that were
    /// forgotten for want of room, so that older rows may bring them back
    /// until the next audits.
    pub tombstone_overflow: u64,
    /// `connmon_series_overflow_total{family}`.
    pub series_overflow: Vec<(&'static str, u64)>,
    /// `connmon_series_evicted_total{family}`.
    pub series_evicted: Vec<(&'static str, u64)>,
    /// Events applied, knowingly ignored ones included.
    pub folded: u64,
    /// Events whose country is lost, counted inside the fold.
    pub unattributed: u64,
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
    /// Whether traffic figures exist (false: absent, not zero).
    pub traffic_known: bool,
    /// Whether accept times exist (an accept probe is attached).
    pub accept_known: bool,
}

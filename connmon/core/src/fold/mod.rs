//! Events and rows → connections, counters and gauges. Pure: time, events,
//! rows and the country database are arguments.

mod absences;
mod accepts;
mod counters;
mod countries;
mod cross;
mod dimension;
mod direction;
mod entry;
mod events;
mod failures;
mod filter;
mod histogram;
mod key;
mod listeners;
mod merge;
mod ports;
mod snapshot;
mod sweep;
mod table;
#[cfg(test)]
mod tests;
mod tombstones;
mod traffic;
mod walk;

pub use absences::Unexplained;
pub use direction::Listening;
pub use events::country_of;
pub use failures::{failure_reason, is_unwritten};
pub use filter::{Filter, Hidden};
pub use snapshot::*;

use std::net::IpAddr;

use absences::Absences;
use accepts::EarlyAccepts;
use counters::Counters;
use listeners::Listeners;
use ports::Ports;
use table::Table;
use tombstones::Tombstones;
use walk::{AuditCounts, Progress};

use crate::event::NetnsId;

/// `--filter.loopback` and `--filter.exclude`.
#[derive(Clone, Debug, Default)]
pub struct RemoteFilter {
    /// Exclude loopback (127.0.0.0/8, ::1, local address = remote address).
    pub exclude_loopback: bool,
    /// Excluded networks; IPv4-mapped ones must be given as IPv4.
    pub exclude: Vec<Network>,
}

/// A CIDR block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// First address, host bits zero.
    pub address: IpAddr,
    /// Prefix length: at most 32 for IPv4, 128 for IPv6.
    pub prefix: u8,
}

/// `--ports.allow`: inclusive ranges, sorted; `None` allows all.
pub type PortRanges = Option<Vec<(u16, u16)>>;

/// `--metrics.country-port`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum CrossFamilies {
    /// No cross families.
    #[default]
    Off,
    /// Every port.
    All,
    /// These ports.
    Ports(Vec<(u16, u16)>),
}

/// Settings of the fold, fixed at start.
#[derive(Clone, Debug)]
pub struct FoldConfig {
    /// Connections that are not counted.
    pub filter: RemoteFilter,
    /// Ports that may have rows.
    pub ports_allow: PortRanges,
    /// Most distinct `port` values per direction.
    pub ports_max: usize,
    /// Cross families.
    pub cross: CrossFamilies,
    /// Most tracked connections and pending active opens; at most an eighth of
    /// them are pending.
    pub connections_max: usize,
    /// Listening-port inventory on.
    pub listeners: bool,
    /// Most inventory entries.
    pub listeners_max: usize,
    /// The namespace shown as `host`.
    pub host_netns: NetnsId,
    /// Secret key of all hashes, so that no remote host can provoke collisions.
    pub hash_key: [u8; 16],
    /// Whether the source reports bytes, segments and round-trip times.
    pub traffic: bool,
    /// Whether an accept probe reports accepts.
    pub accepts: bool,
    /// Polling mode: walks are the only source. A new row is an open (in the
    /// first walk a seed), one absence is a close.
    pub polling: bool,
}

/// The state machine.
#[derive(Debug)]
pub struct Fold {
    config: FoldConfig,
    filter: Filter,
    table: Table,
    counters: Counters,
    listeners: Listeners,
    tombstones: Tombstones,
    early_accepts: EarlyAccepts,
    absences: Absences,
    /// The walk in progress, or the sweep that ends it.
    progress: Option<Box<Progress>>,
    /// Number of the current walk, 1..=255. Entries seen since it began have
    /// it in [`entry::Entry::epoch`].
    epoch: u8,
    /// The initial scan is folded.
    started: bool,
    /// Events were lost since the last audit began.
    lost: bool,
    totals: Totals,
}

/// Counts without labels; for their meaning see [`Snapshot`].
#[derive(Debug, Default)]
struct Totals {
    tracked: u64,
    untracked: u64,
    table_overflow: u64,
    pending_overflow: u64,
    folded: u64,
    unattributed: u64,
    missed_closes: u64,
    corrections: Corrections,
    drift: Option<u64>,
    drift_suspected: Option<u64>,
    unlisted_namespaces: u32,
    audited: AuditCounts,
}

impl Fold {
    /// An empty fold.
    pub fn new(config: FoldConfig) -> Self {
        let hasher = key::Hasher::new(&config.hash_key);
        Self {
            filter: Filter::new(&config.filter),
            table: Table::new(config.connections_max, hasher),
            counters: Counters::new(&config),
            listeners: Listeners::new(config.listeners, config.listeners_max, config.host_netns),
            tombstones: Tombstones::default(),
            early_accepts: EarlyAccepts::default(),
            absences: Absences::default(),
            progress: None,
            epoch: 1,
            started: false,
            lost: false,
            totals: Totals::default(),
            config,
        }
    }

    /// Events were lost (ring full, missed run); they count as unattributed. The
    /// next walk evicts entries of namespaces that it cannot read.
    pub fn lost(&mut self, events: u64) {
        self.lost = true;
        self.absences.lost();
        self.totals.unattributed += events;
    }

    /// What is known of the connections that the last audit removed although
    /// no loss was reported; once.
    pub fn take_unexplained(&mut self) -> Option<Unexplained> {
        self.absences.take()
    }

    /// Entries that the next audit will remove if it does not find them either,
    /// and forgotten closes: with any, the next audit is due soon.
    pub fn suspects(&self) -> u64 {
        self.totals.drift_suspected.unwrap_or(0) + self.tombstones.forgotten()
    }

    /// Network namespaces that the last audit could not find, although events
    /// reported connections there: only sockets refer to them.
    pub fn unlisted_namespaces(&self) -> u32 {
        self.totals.unlisted_namespaces
    }

    /// Active opens without an entry, because too many were pending or the
    /// table was full; their latency is not observed.
    pub fn pending_overflow(&self) -> u64 {
        self.totals.pending_overflow
    }

    /// Connections whose close no event reported, although nothing need have
    /// been counted as lost: another socket has the address of theirs.
    pub fn missed_closes(&self) -> u64 {
        self.totals.missed_closes
    }

    /// What audits corrected since start.
    pub fn corrections(&self) -> Corrections {
        self.totals.corrections
    }

    /// Copies what is exported.
    pub fn snapshot(&self) -> Snapshot {
        let (counters, listeners) = (&self.counters, &self.listeners);
        let cross = &counters.cross.rows;
        let (port_overflow, port_evicted) = counters.port_losses();
        Snapshot {
            countries: countries::snapshot(&counters.countries),
            ports: counters.ports.iter().flat_map(Ports::snapshot).collect(),
            cross_enabled: counters.cross.enabled,
            cross: counters.cross_rows(),
            established: counters.established,
            audited_states: self.totals.audited.states,
            connect_latency: counters.connect_latency.snapshot(),
            accept_wait: counters.accept_wait.snapshot(),
            rtt: counters.rtt.each_ref().map(histogram::Buckets::snapshot),
            duration: counters
                .duration
                .each_ref()
                .map(histogram::Buckets::snapshot),
            listeners: listeners.snapshot(),
            tracked: self.totals.tracked,
            untracked: self.totals.untracked,
            table_overflow: self.totals.table_overflow,
            tombstone_overflow: self.tombstones.overflow,
            series_overflow: vec![
                ("country_port", cross.overflow),
                ("listener", listeners.overflow),
                ("port", port_overflow),
            ],
            series_evicted: vec![("country_port", cross.evicted), ("port", port_evicted)],
            folded: self.totals.folded,
            unattributed: self.totals.unattributed,
            missed_closes: self.totals.missed_closes,
            corrections: self.totals.corrections,
            drift: self.totals.drift,
            drift_suspected: self.totals.drift_suspected,
            hidden_loopback: self.totals.audited.hidden_loopback,
            hidden_excluded: self.totals.audited.hidden_excluded,
            traffic_known: self.config.traffic,
            accept_known: self.config.accepts,
        }
    }

    /// A socket listens on this port; the port gets a row.
    fn listening_port(&mut self, address: IpAddr, port: u16) {
        if !self.filter.hides_listener(address) {
            self.counters.reserve_listening(port);
            if let Some(progress) = &mut self.progress {
                progress.listening_anywhere.insert(port);
            }
        }
    }
}

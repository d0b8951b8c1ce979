//! Events and rows → connections, counters and gauges. Pure: time, events,
//! rows and the country database come in as arguments; no clock, no I/O, no
//! async runtime.
//!
//! The public surface is fixed here; everything else is private modules.

mod absences;
mod accepts;
mod countries;
mod cross;
mod dimension;
mod direction;
mod events;
mod failures;
mod filter;
mod histogram;
mod key;
mod ledger;
mod listeners;
mod merge;
mod ports;
mod snapshot;
mod table;
#[cfg(test)]
mod tests;
mod tombstones;
mod traffic;

pub use absences::Unexplained;
pub use direction::Listening;
pub use events::country_of;
pub use failures::{failure_reason, is_unwritten};
pub use filter::{Filter, Hidden};
pub use snapshot::*;

use std::net::IpAddr;

use absences::Absences;
use accepts::EarlyAccepts;
use ledger::Ledger;
use listeners::Listeners;
use table::Table;
use tombstones::Tombstones;

use crate::event::{Event, NetnsId, Owner};
use crate::geo::Locate;
use crate::scan::WalkMessage;

/// `--filter.loopback` and `--filter.exclude`, applied alike to events,
/// seeds and polling.
#[derive(Clone, Debug, Default)]
pub struct RemoteFilter {
    /// Leave loopback out (127.0.0.0/8, ::1, local address = remote address).
    pub exclude_loopback: bool,
    /// Networks left out, v4-mapped ones already turned into IPv4.
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

/// Everything that shapes the fold, fixed at start.
#[derive(Clone, Debug)]
pub struct FoldConfig {
    /// Remote filter.
    pub filter: RemoteFilter,
    /// Ports that may have rows.
    pub ports_allow: PortRanges,
    /// Most distinct `port` values per direction.
    pub ports_max: usize,
    /// Cross families.
    pub cross: CrossFamilies,
    /// Most tracked connections, pending active opens included; of these there
    /// are at most an eighth.
    pub connections_max: usize,
    /// Listening-port inventory on.
    pub listeners: bool,
    /// Most inventory entries.
    pub listeners_max: usize,
    /// The namespace shown as `host`.
    pub host_netns: NetnsId,
    /// Secret that keys the tuple hash, so that a remote cannot aim collisions.
    pub hash_key: [u8; 16],
    /// Whether the source reports traffic figures.
    pub traffic: bool,
    /// Whether an accept probe reports accepts.
    pub accepts: bool,
    /// Polling mode: walks are the only source; a row never seen before is an
    /// open (seed in the first walk), one absence is a close.
    pub polling: bool,
}

/// The state machine.
#[derive(Debug)]
pub struct Fold {
    config: FoldConfig,
    filter: Filter,
    table: Table,
    ledger: Ledger,
    listeners: Listeners,
    tombstones: Tombstones,
    early_accepts: EarlyAccepts,
    /// The walk under way, or the scan that ends it.
    progress: Option<Box<merge::Progress>>,
    /// Stamp of the current walk, 1..=255; entries touched since it began
    /// carry it.
    epoch: u8,
    /// The startup walk is folded.
    started: bool,
    /// Events were lost since the last audit began.
    lost: bool,
    absences: Absences,
    /// Open tracked connections.
    open: u64,
    untracked: u64,
    table_overflow: u64,
    pending_overflow: u64,
    folded: u64,
    unattributed: u64,
    corrections: Corrections,
    drift: Option<u64>,
    drift_suspected: Option<u64>,
    unlisted_namespaces: u32,
    audited_states: [u64; AUDITED_STATES.len()],
    hidden_loopback: u64,
    hidden_excluded: u64,
}

impl Fold {
    /// An empty fold.
    pub fn new(config: FoldConfig) -> Self {
        let hasher = key::Hasher::new(&config.hash_key);
        Self {
            filter: Filter::new(&config.filter),
            table: Table::new(config.connections_max, hasher),
            ledger: Ledger::new(&config),
            listeners: Listeners::new(config.listeners, config.listeners_max, config.host_netns),
            tombstones: Tombstones::new(),
            early_accepts: EarlyAccepts::new(),
            progress: None,
            epoch: 1,
            started: false,
            lost: false,
            absences: Absences::new(),
            open: 0,
            untracked: 0,
            table_overflow: 0,
            pending_overflow: 0,
            folded: 0,
            unattributed: 0,
            corrections: Corrections::default(),
            drift: None,
            drift_suspected: None,
            audited_states: [0; AUDITED_STATES.len()],
            unlisted_namespaces: 0,
            hidden_loopback: 0,
            hidden_excluded: 0,
            config,
        }
    }

    /// Folds one event. `now_ns` is CLOCK_MONOTONIC at the time of folding;
    /// durations use the event's own times.
    pub fn apply(&mut self, now_ns: u64, event: &Event, geo: &mut impl Locate) {
        self.folded += 1;
        self.event(now_ns, event, geo);
    }

    /// Folds one message of a walk.
    ///
    /// What the caller owes: no row may be read from the kernel before
    /// `Begin` was passed in here (else an event between the two would look
    /// older than the row), and the ring must be drained after a message was
    /// received and before it is passed in (else a row would be taken for a
    /// connection that nothing had told of). Big end-of-walk scans are
    /// resumable: while [`Fold::settle`] returns true there is work left.
    pub fn walk(&mut self, now_ns: u64, message: WalkMessage, geo: &mut impl Locate) {
        self.walk_message(now_ns, message, geo);
    }

    /// Does a bounded slice of pending end-of-walk work; true while more is
    /// left. The caller drains the ring in between.
    pub fn settle(&mut self, now_ns: u64) -> bool {
        self.scan_slice(now_ns)
    }

    /// A program failed to deliver events (ring full, missed run): entries
    /// of namespaces that no walk can audit are evicted after the next walk,
    /// and `events` are counted as unattributed.
    pub fn lost(&mut self, events: u64) {
        self.lost = true;
        self.absences.lost();
        self.unattributed += events;
    }

    /// What is known of the connections that the last audit removed although
    /// no loss was told; `None` if there were none, or when it was asked for
    /// before, or when a loss was told since.
    pub fn take_unexplained(&mut self) -> Option<Unexplained> {
        self.absences.take()
    }

    /// Entries that the last audit did not find and that the next one will
    /// remove, if it does not find them either, and closes it forgot for want
    /// of room: with any, another audit is due soon.
    pub fn suspects(&self) -> u64 {
        self.drift_suspected.unwrap_or(0) + self.tombstones.forgotten()
    }

    /// Network namespaces that hold connections by what events told, and that
    /// the last audit could not find: nothing leads there but the sockets.
    pub fn unlisted_namespaces(&self) -> u32 {
        self.unlisted_namespaces
    }

    /// Active opens that were not kept while they were pending, for want of
    /// room; how long those that completed took was not observed.
    pub fn pending_overflow(&self) -> u64 {
        self.pending_overflow
    }

    /// What audits corrected since start.
    pub fn corrections(&self) -> Corrections {
        self.corrections
    }

    /// Copies out what is exported.
    pub fn snapshot(&self) -> Snapshot {
        let [cross, port] = self.ledger.series_losses();
        let (ledger, listeners) = (&self.ledger, &self.listeners);
        Snapshot {
            countries: ledger.countries.snapshot(),
            ports: ledger.port_rows(),
            cross_enabled: ledger.cross_enabled(),
            cross: ledger.cross_rows(),
            established: ledger.established,
            audited_states: self.audited_states,
            connect_latency: ledger.connect_latency.snapshot(),
            accept_wait: ledger.accept_wait.snapshot(),
            rtt: ledger.rtt.each_ref().map(|buckets| buckets.snapshot()),
            duration: ledger.duration.each_ref().map(|buckets| buckets.snapshot()),
            listeners: listeners.snapshot(),
            tracked: self.open,
            untracked: self.untracked,
            table_overflow: self.table_overflow,
            tombstone_overflow: self.tombstones.overflow,
            series_overflow: vec![
                (cross.0, cross.1),
                ("listener", listeners.overflow),
                (port.0, port.1),
            ],
            series_evicted: vec![(cross.0, cross.2), (port.0, port.2)],
            folded: self.folded,
            unattributed: self.unattributed,
            corrections: self.corrections,
            drift: self.drift,
            drift_suspected: self.drift_suspected,
            hidden_loopback: self.hidden_loopback,
            hidden_excluded: self.hidden_excluded,
            traffic_known: self.config.traffic,
            accept_known: self.config.accepts,
        }
    }

    /// A socket began to listen; its port gets a row.
    fn listen(&mut self, now_ns: u64, netns: NetnsId, address: IpAddr, port: u16, owner: &Owner) {
        self.listeners.listen(netns, address, port, owner);
        if !self.filter.hides_listener(address) {
            self.ledger.reserve_listening(now_ns, port);
            if let Some(progress) = &mut self.progress {
                progress.heard_listen(port);
            }
        }
    }

    fn unlisten(&mut self, netns: NetnsId, address: IpAddr, port: u16) {
        self.listeners.unlisten(netns, address, port);
    }
}

//! One pass over the kernel's socket tables, which corrects what the events
//! reported.
//!
//! A row is matched to an entry, else to a tombstone, else added (`merge.rs`,
//! kernel-notes §6). An entry takes the state of its row, unless an event
//! changed it since the walk began. At the end, an entry goes if two complete
//! audits in a row did not show it and no event was seen meanwhile (`sweep.rs`).

use std::collections::{HashMap, HashSet};

use super::Fold;
use super::direction::Listening;
use super::entry::walk_identity;
use super::ports::PortSet;
use super::snapshot::{AUDITED_STATES, Direction};
use super::table::Slot;
use crate::event::{Cookie, NetnsId, Tuple};
use crate::geo::Locate;
use crate::scan::{Access, Row, Trigger, Walk, WalkMessage, WalkSummary};

/// Most rows that wait for LISTEN rows; the direction of others is decided at
/// once.
pub(super) const UNDECIDED_MAX: usize = 1 << 16;

/// Most namespaces remembered in a walk; entries of others are not evicted.
pub(super) const NAMESPACES_MAX: usize = 1 << 16;

/// How well a namespace was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Coverage {
    Complete,
    /// A socket that was not shown may be there.
    Incomplete,
    /// It exists, but nothing was read.
    Unread,
    /// It is not in the list of namespaces: it is gone, or out of reach.
    Unlisted,
}

/// What an audit counts, beside the entries.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AuditCounts {
    pub(super) states: [u64; AUDITED_STATES.len()],
    pub(super) hidden_loopback: u64,
    pub(super) hidden_excluded: u64,
}

/// The walk in progress.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Absence from this walk counts.
    pub(super) audit: bool,
    /// The first walk: what it adds are seeds.
    pub(super) seeding: bool,
    /// Events were lost before: evict entries of namespaces without coverage.
    pub(super) evict: bool,
    /// The namespace being read, or a surrogate id for it.
    pub(super) netns: NetnsId,
    pub(super) surrogate: bool,
    any_surrogate: bool,
    /// Number of the namespace being read, from 1.
    ordinal: u16,
    /// Pass of the last rows.
    pub(super) pass: u8,
    /// When the namespace being read was begun.
    pub(super) t0_ns: u64,
    pub(super) ephemeral: (u16, u16),
    /// What listens in the namespace being read.
    pub(super) listening: Listening,
    /// Polling: all LISTEN rows of the namespace have been read.
    all_listeners: bool,
    /// Ports that listen in any namespace.
    pub(super) listening_anywhere: PortSet,
    /// Entries that wait for the LISTEN rows of their namespace, with their
    /// endpoints. At most [`UNDECIDED_MAX`].
    pub(super) undecided: Vec<(Slot, Tuple)>,
    /// Polling: rows of new connections that wait for all LISTEN rows of the
    /// namespace. At most [`UNDECIDED_MAX`].
    pub(super) waiting: Vec<Row>,
    covered: HashMap<NetnsId, Coverage>,
    /// Every namespace was read to its end.
    pub(super) all_complete: bool,
    any_incomplete: bool,
    /// A namespace that was not listed does not exist.
    pub(super) listed: bool,
    pub(super) counts: AuditCounts,
    pub(super) drift: u64,
    /// Entries absent for the first time.
    pub(super) suspects: u64,
    /// Rows for which the table was full.
    pub(super) untracked: u64,
    /// Untracked connections of the poll before that this one has not met.
    untracked_before: u64,
    /// Namespaces of entries that stay although they were not listed; at most
    /// [`NAMESPACES_MAX`].
    pub(super) unlisted: HashSet<NetnsId>,
    /// Next slot of the sweep, once all rows are merged.
    pub(super) sweep: Option<Slot>,
}

impl Progress {
    /// Whether this walk adds, corrects and removes.
    pub(super) fn audits(&self) -> bool {
        self.audit || self.seeding
    }

    /// Whether rows are counted: the second pass of the initial scan shows the
    /// same sockets as the first.
    pub(super) fn counts_rows(&self) -> bool {
        self.audits() && self.pass == 0
    }

    /// The namespace for the keys of rows. Events have another id for a
    /// surrogate, so that becomes 0, which matches any.
    pub(super) fn key_netns(&self) -> NetnsId {
        if self.surrogate { 0 } else { self.netns }
    }

    /// The cookie of a row, or its walk identity, or 0.
    pub(super) fn identity(&self, row: &Row) -> Cookie {
        match row.cookie {
            0 if row.id == 0 && self.audits() => walk_identity(self.ordinal, row.inode),
            cookie => cookie,
        }
    }

    /// Polling: whether the LISTEN row that gives the direction of a new
    /// connection may still follow.
    pub(super) fn waits_for_listeners(&self, row: &Row) -> bool {
        !self.all_listeners
            && self.waiting.len() < UNDECIDED_MAX
            && !self
                .listening
                .accepts(row.tuple.local, row.tuple.local_port)
    }

    /// Polling: whether an unknown row is taken for an untracked connection of
    /// the poll before. Only the number of these is known.
    pub(super) fn is_untracked(&mut self) -> bool {
        let is = self.untracked_before > 0;
        self.untracked_before -= u64::from(is);
        is
    }

    pub(super) fn coverage(&self, netns: NetnsId) -> Coverage {
        // Without its id it may be any namespace that was read.
        let any = netns == 0 || self.any_surrogate;
        match self.covered.get(&netns) {
            Some(&coverage) => coverage,
            None if any && self.all_complete => Coverage::Complete,
            None if any && self.any_incomplete => Coverage::Incomplete,
            None => Coverage::Unlisted,
        }
    }

    fn cover(&mut self, netns: NetnsId, coverage: Coverage) {
        self.all_complete &= coverage == Coverage::Complete;
        self.any_incomplete |= coverage == Coverage::Incomplete;
        if self.covered.len() < NAMESPACES_MAX || self.covered.contains_key(&netns) {
            let known = self.covered.entry(netns).or_insert(coverage);
            if coverage != Coverage::Complete {
                *known = coverage;
            }
        } else {
            self.all_complete = false;
            self.listed = false;
        }
    }
}

impl Fold {
    /// Folds one message of a walk.
    ///
    /// The caller must pass in `Begin` before a row is read from the kernel,
    /// else an event between the two would look older than the row. It must
    /// drain the ring between receiving a message and passing it in, else a row
    /// would be taken for a connection without an event. After `End` it must
    /// call [`Fold::sweep`] until that returns false.
    pub fn walk(&mut self, now_ns: u64, message: WalkMessage, geo: &mut impl Locate) {
        self.counters.now_ns = now_ns;
        if let WalkMessage::Begin(walk) = message {
            self.begin_walk(walk);
            return;
        }
        let merging = |progress: &mut Box<Progress>| progress.sweep.is_none();
        let Some(mut progress) = self.progress.take_if(merging) else {
            return;
        };
        match message {
            WalkMessage::Begin(_) => {}
            WalkMessage::NamespaceBegin {
                netns,
                surrogate,
                t0_ns,
                ephemeral,
            } => {
                progress.listening.clear();
                progress.waiting.clear();
                progress.all_listeners = false;
                self.tombstones.begin_namespace(t0_ns);
                progress.ordinal = progress.ordinal.saturating_add(1);
                progress.netns = netns;
                // Without events a surrogate id is as good as the inode.
                progress.surrogate = surrogate && !self.config.polling;
                progress.any_surrogate |= progress.surrogate;
                progress.t0_ns = t0_ns;
                progress.ephemeral = ephemeral;
            }
            WalkMessage::Rows { pass, rows } => {
                progress.pass = pass;
                for row in &rows {
                    self.merge_row(&mut progress, row, geo);
                }
            }
            WalkMessage::NamespaceEnd {
                netns,
                access,
                complete,
            } => {
                progress.all_listeners = true;
                for row in std::mem::take(&mut progress.waiting) {
                    self.merge_row(&mut progress, &row, geo);
                }
                self.decide_waiting(&mut progress);
                let coverage = match (access, complete) {
                    (Access::Unaudited, _) => Coverage::Unread,
                    (_, true) => Coverage::Complete,
                    (_, false) => Coverage::Incomplete,
                };
                progress.cover(netns, coverage);
                let complete = coverage == Coverage::Complete;
                self.listeners
                    .end_namespace(netns, complete, access == Access::Diag);
            }
            WalkMessage::End(summary) => {
                self.end_rows(&mut progress, &summary);
                if !progress.audits() {
                    return;
                }
                progress.sweep = Some(0);
            }
        }
        self.progress = Some(progress);
        if self.config.polling {
            // No ring waits meanwhile, and gauges must be exact at once.
            while self.sweep(now_ns) {}
        }
    }

    fn begin_walk(&mut self, walk: Walk) {
        let now_ns = self.counters.now_ns;
        while self.sweep(now_ns) {}
        self.epoch = self.epoch.checked_add(1).unwrap_or(1);
        self.absences.walk_begins(self.epoch, now_ns);
        self.tombstones.start();
        self.counters.end_close_wait(false);
        self.listeners.begin();
        self.progress = Some(Box::new(Progress {
            audit: walk.audit,
            seeding: !self.started && (walk.audit || walk.trigger == Trigger::Startup),
            evict: walk.audit && std::mem::take(&mut self.lost),
            untracked_before: self.totals.untracked,
            all_complete: true,
            listed: true,
            ..Progress::default()
        }));
    }

    /// All rows are merged: publishes what the audit counted.
    fn end_rows(&mut self, progress: &mut Progress, summary: &WalkSummary) {
        self.tombstones.stop();
        // At least the walker's own namespace exists, so a walk without any
        // has not found out which exist.
        progress.listed &= !summary.unlisted && !progress.covered.is_empty();
        progress.all_complete &= summary.unaudited == 0 && progress.listed;
        if progress.evict && !progress.listed {
            // The next walk evicts.
            self.lost = true;
        }
        // With surrogate ids, a namespace that was not read under its own id
        // was read under a surrogate, unless some were not read.
        let some_unread = !progress.listed || progress.any_incomplete || summary.unaudited > 0;
        self.listeners.end(
            |netns| match progress.covered.get(&netns) {
                Some(Coverage::Complete | Coverage::Incomplete) => true,
                Some(_) if !progress.any_surrogate => true,
                _ => !progress.listed || (progress.any_surrogate && some_unread),
            },
            progress.audits(),
        );
        self.started |= progress.seeding;
        if progress.audits() {
            self.counters.end_close_wait(true);
            if progress.all_complete {
                let inbound = &mut self.counters.ports[Direction::Inbound as usize];
                inbound.set_listening(&progress.listening_anywhere);
            }
            self.totals.audited = progress.counts;
            self.totals.untracked = progress.untracked;
        }
    }
}

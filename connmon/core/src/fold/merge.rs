//! Walks: what the kernel's own tables say, joined with what the events said.
//!
//! The rules, from kernel-notes §6. A row is first looked for among the live
//! (by endpoints, the cookie decides), then among the tombstones, and only
//! then taken in: one sighting adds. An entry that no event spoke of since the
//! walk began takes the row's state. An entry absent from two complete audits
//! in a row, with no event since, goes. Where a walk did not reach, entries
//! stay, unless events were lost: then they are evicted, since nothing could
//! ever correct them.
//!
//! Where several sockets of a namespace have the same endpoints (VRFs, bound
//! devices), each row takes an entry of its own. Which one is a guess until an
//! event names kernel address and cookie together; then the entries exchange
//! what the rows told.
//!
//! Direction of what is taken in: see [`Listening`]. A row that comes before
//! its namespace's LISTEN rows waits for them.

use std::collections::{HashMap, HashSet};

use connmon_common::state::{
    CLOSE, CLOSE_WAIT, ESTABLISHED, LISTEN, NEW_SYN_RECV, SYN_SENT, TIME_WAIT,
};

use crate::event::{Cookie, NetnsId, Tuple};
use crate::geo::Locate;
use crate::scan::{Access, Row, Trigger, Walk, WalkMessage, WalkSummary};

use super::Fold;
use super::direction::Listening;
use super::events::{country_of, is_open_state};
use super::filter::Hidden;
use super::key::Key;
use super::ledger::{Ledger, Place};
use super::ports::PortSet;
use super::snapshot::{AUDITED_STATES, Direction};
use super::table::{Flags, Slot, walk_identity};
use super::tombstones::Verdict;

/// Slots looked at by one [`Fold::settle`]: about 100 µs.
const SLICE: Slot = 8192;

/// Most rows that wait for LISTEN rows; further ones are decided at once.
const UNDECIDED_MAX: usize = 1 << 16;

/// Most namespaces remembered in a walk; none beyond them is ever evicted.
const NAMESPACES_MAX: usize = 1 << 16;

/// A pending active open older than this is forgotten at an audit: ten
/// minutes, far beyond the default SYN retries, so its close was missed.
/// Should it complete after all, only its latency is lost.
const PENDING_NS: u64 = 600 * 1_000_000_000;

/// How well a namespace was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Coverage {
    /// Absence means something.
    Complete,
    /// Presence does.
    Incomplete,
    /// Nothing was read, though it is there.
    Unread,
    /// The list of namespaces does not have it: it is gone, or out of reach.
    Unlisted,
}

/// A walk under way.
#[derive(Debug)]
pub(super) struct Progress {
    walk: Walk,
    /// The first merge: what it takes in are seeds.
    seeding: bool,
    netns: NetnsId,
    /// The namespace of the rows' keys: 0, which matches any, where `netns`
    /// only stands in for what events carry.
    key_netns: NetnsId,
    /// A namespace was read under a surrogate id.
    surrogates: bool,
    /// Pass of the rows last come.
    pass: u8,
    t0_ns: u64,
    ephemeral: (u16, u16),
    /// What listens in the namespace being read.
    listening: Listening,
    /// Ports listening anywhere.
    listening_anywhere: PortSet,
    covered: HashMap<NetnsId, Coverage>,
    /// Entries that wait for the LISTEN rows of their namespace, with their
    /// endpoints.
    undecided: Vec<(Slot, Tuple)>,
    /// Polling: rows of new connections, until all listeners of the namespace
    /// are known. At most [`UNDECIDED_MAX`].
    late: Vec<Row>,
    /// All LISTEN rows of the namespace have come.
    all_listeners: bool,
    /// Events were lost before: evict what is not covered.
    evict: bool,
    drift: u64,
    states: [u64; AUDITED_STATES.len()],
    hidden_loopback: u64,
    hidden_excluded: u64,
    /// Rows that found no room.
    untracked: u64,
    /// Of the connections that the poll before found no room for, those not
    /// met again yet.
    untracked_before: u64,
    /// Entries absent for the first time.
    suspects: u64,
    /// Namespaces of entries that stay although the walk did not name theirs;
    /// at most [`NAMESPACES_MAX`].
    unlisted: HashSet<NetnsId>,
    /// Next slot of the scan for absent entries, once the rows are in.
    scan: Option<Slot>,
    /// Every namespace was read to its end.
    all_complete: bool,
    /// Some namespace was not.
    any_incomplete: bool,
    /// A namespace that is not named is not there.
    listed: bool,
    /// Number of the namespace being read, from 1.
    ordinal: u16,
}

impl Progress {
    fn new(walk: Walk, seeding: bool, evict: bool) -> Self {
        Self {
            walk,
            seeding,
            netns: 0,
            key_netns: 0,
            surrogates: false,
            pass: 0,
            t0_ns: 0,
            ephemeral: (0, 0),
            listening: Listening::default(),
            listening_anywhere: PortSet::new(),
            covered: HashMap::new(),
            undecided: Vec::new(),
            late: Vec::new(),
            all_listeners: false,
            evict,
            drift: 0,
            suspects: 0,
            unlisted: HashSet::new(),
            states: [0; AUDITED_STATES.len()],
            hidden_loopback: 0,
            hidden_excluded: 0,
            untracked: 0,
            untracked_before: 0,
            scan: None,
            all_complete: true,
            any_incomplete: false,
            listed: true,
            ordinal: 0,
        }
    }

    /// A port began to listen while the walk is under way.
    pub(super) fn heard_listen(&mut self, port: u16) {
        self.listening_anywhere.insert(port);
    }

    /// Whether a listener that tells a new connection's direction may still
    /// come: one younger than the LISTEN rows that were read first.
    fn waits_for_listeners(&self, row: &Row) -> bool {
        let tuple = &row.tuple;
        !self.all_listeners
            && self.late.len() < UNDECIDED_MAX
            && !self.listening.accepts(tuple.local, tuple.local_port)
    }

    /// Whether this walk takes in, corrects and removes.
    fn audits(&self) -> bool {
        self.walk.audit || self.seeding
    }

    /// Whether rows count for the figures of the audit: the second pass of a
    /// startup walk shows the same sockets again.
    fn counts(&self) -> bool {
        self.audits() && self.pass == 0
    }

    /// Polling: whether an unknown row is taken for a connection that the poll
    /// before found no room for. Nothing tells one from another, so as many
    /// are as there were.
    fn meets_untracked(&mut self) -> bool {
        let met = self.untracked_before > 0;
        self.untracked_before -= u64::from(met);
        met
    }

    /// Direction and service port of a connection that a row shows.
    fn direction(&self, tuple: &Tuple) -> (Direction, u16) {
        let direction = self.listening.direction(tuple, self.ephemeral);
        let port = match direction {
            Direction::Inbound => tuple.local_port,
            Direction::Outbound => tuple.remote_port,
            Direction::Unknown => 0,
        };
        (direction, port)
    }

    /// What tells the socket of a row from others with the same endpoints;
    /// 0 where nothing does.
    fn identity(&self, row: &Row) -> Cookie {
        match row.cookie {
            0 if row.id == 0 && self.audits() => walk_identity(self.ordinal, row.inode),
            cookie => cookie,
        }
    }

    fn coverage(&self, netns: NetnsId) -> Coverage {
        match self.covered.get(&netns) {
            Some(&coverage) => coverage,
            // Wherever it is, it was read, or in part.
            None if netns == 0 || self.surrogates => match self.all_complete {
                true => Coverage::Complete,
                false if self.any_incomplete => Coverage::Incomplete,
                false => Coverage::Unlisted,
            },
            None => Coverage::Unlisted,
        }
    }
}

impl Fold {
    pub(super) fn walk_message(
        &mut self,
        now_ns: u64,
        message: WalkMessage,
        geo: &mut impl Locate,
    ) {
        let begun = match message {
            WalkMessage::Begin(walk) => {
                self.begin_walk(now_ns, walk);
                return;
            }
            _ => self.progress.take_if(|progress| progress.scan.is_none()),
        };
        let Some(mut progress) = begun else {
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
                progress.late.clear();
                progress.all_listeners = false;
                self.tombstones.begin_namespace(t0_ns);
                // More than a walk may name are all told apart from none.
                progress.ordinal = progress.ordinal.saturating_add(1);
                // Without events a surrogate id is as good as the inode.
                let surrogate = surrogate && !self.config.polling;
                progress.netns = netns;
                progress.key_netns = if surrogate { 0 } else { netns };
                progress.surrogates |= surrogate;
                progress.t0_ns = t0_ns;
                progress.ephemeral = ephemeral;
            }
            WalkMessage::Rows { pass, rows } => {
                progress.pass = pass;
                for row in &rows {
                    self.row(now_ns, &mut progress, row, geo);
                }
            }
            WalkMessage::NamespaceEnd {
                netns,
                access,
                complete,
            } => {
                progress.all_listeners = true;
                for row in std::mem::take(&mut progress.late) {
                    self.row(now_ns, &mut progress, &row, geo);
                }
                self.end_namespace(now_ns, &mut progress, netns, access, complete);
            }
            WalkMessage::End(summary) => {
                self.end_rows(&mut progress, &summary);
                if !progress.audits() {
                    return;
                }
                progress.scan = Some(0);
            }
        }
        self.progress = Some(progress);
        if self.config.polling {
            // No ring waits meanwhile, and gauges are to be exact at once.
            while self.scan_slice(now_ns) {}
        }
    }

    fn begin_walk(&mut self, now_ns: u64, walk: Walk) {
        while self.scan_slice(now_ns) {}
        self.epoch = self.epoch.checked_add(1).unwrap_or(1);
        self.absences.walk_begins(self.epoch, now_ns);
        self.tombstones.start();
        self.ledger.forget_close_wait();
        self.listeners.begin();
        let seeding = !self.started && (walk.audit || walk.trigger == Trigger::Startup);
        let evict = walk.audit && std::mem::take(&mut self.lost);
        let mut progress = Progress::new(walk, seeding, evict);
        progress.untracked_before = self.untracked;
        self.progress = Some(Box::new(progress));
    }

    fn row(&mut self, now_ns: u64, progress: &mut Progress, row: &Row, geo: &mut impl Locate) {
        match row.state {
            LISTEN => return self.listen_row(now_ns, progress, row),
            CLOSE | TIME_WAIT => return,
            // About to close: it has given its port back, and its close will
            // tell another one.
            _ if row.tuple.local_port == 0 => return,
            _ => {}
        }
        if let Some(hidden) = self.filter.hides(&row.tuple) {
            if progress.counts() && row.state == ESTABLISHED {
                match hidden {
                    Hidden::Loopback => progress.hidden_loopback += 1,
                    Hidden::Excluded => progress.hidden_excluded += 1,
                }
            }
            return;
        }
        if progress.counts()
            && let Some(index) = AUDITED_STATES.iter().position(|&(s, _)| s == row.state)
        {
            progress.states[index] += 1;
        }
        if !is_open_state(row.state) || row.state == NEW_SYN_RECV {
            return;
        }
        let key = self.table.hasher().key(&row.tuple, progress.key_netns);
        let verdict =
            self.tombstones
                .verdict(self.table.hasher(), &key, row.cookie, progress.t0_ns);
        let identity = progress.identity(row);
        let established = row.state == ESTABLISHED;
        let found = self
            .table
            .find_row(&key, row.id, identity, self.epoch, established);
        // A socket that was closed and connected again keeps its cookie.
        let known = |slot| row.cookie != 0 && self.table.entry(slot).cookie() == row.cookie;
        let slot = match found {
            Some((slot, alone)) if verdict == Verdict::Alive || known(slot) => {
                self.sighted(now_ns, progress, slot, row, alone);
                slot
            }
            Some((slot, _)) if verdict == Verdict::MayBeDead => {
                // Not of what opened meanwhile; of what was there before, it
                // may be one of several, of which another closed.
                let entry = self.table.entry_mut(slot);
                if entry.epoch == self.epoch {
                    return;
                }
                entry.epoch = self.epoch;
                entry.flags.clear(Flags::BY_EVENT | Flags::MISSED);
                slot
            }
            _ if verdict != Verdict::Alive || !progress.audits() => return,
            // What is counted as opened cannot be moved.
            _ if self.config.polling && !progress.seeding && progress.waits_for_listeners(row) => {
                progress.late.push(*row);
                return;
            }
            _ => match self.take_in(now_ns, progress, row, key, geo) {
                Some(slot) => slot,
                None => return,
            },
        };
        let entry = self.table.entry(slot);
        let counted = !entry.flags.has(Flags::UNDECIDED);
        if counted && progress.counts() && row.state == CLOSE_WAIT {
            self.ledger.saw_close_wait(Place::of(entry));
        }
    }

    fn listen_row(&mut self, now_ns: u64, progress: &mut Progress, row: &Row) {
        let port = row.tuple.local_port;
        progress.listening.insert(row.tuple.local, port);
        if progress.pass == 0 {
            let surrogate = progress.netns != progress.key_netns;
            self.listeners.row(progress.netns, surrogate, row);
        }
        if !self.filter.hides_listener(row.tuple.local) {
            progress.listening_anywhere.insert(port);
            self.ledger.reserve_listening(now_ns, port);
        }
    }

    /// A live entry's own row; with others that have its endpoints, not
    /// `alone`, it may be one of theirs.
    fn sighted(
        &mut self,
        now_ns: u64,
        progress: &mut Progress,
        slot: Slot,
        row: &Row,
        alone: bool,
    ) {
        let epoch = self.epoch;
        self.table.learn_netns(slot, progress.key_netns);
        self.table.learn_id(slot, row.id);
        let entry = self.table.entry_mut(slot);
        let newer = entry.epoch == epoch && entry.flags.has(Flags::BY_EVENT);
        entry.learn_identity(progress.identity(row));
        entry.flags.clear(Flags::MISSED | Flags::SUSPECT);
        let undecided = entry.flags.has(Flags::UNDECIDED);
        // What this walk took in waits already.
        if undecided
            && progress.audits()
            && (entry.epoch != epoch || entry.flags.has(Flags::BY_EVENT))
            && progress.undecided.len() < UNDECIDED_MAX
        {
            progress.undecided.push((slot, row.tuple));
        }
        if newer {
            return;
        }
        entry.epoch = epoch;
        entry.flags.clear(Flags::BY_EVENT);
        if progress.audits() && self.set_state(now_ns, slot, row.state) && !self.config.polling {
            self.corrections.updated += 1;
            progress.drift += 1;
        }
        let entry = self.table.entry(slot);
        // Else its close tells all that it moved.
        let own = alone || row.id != 0 || !entry.flags.has(Flags::ROW_COOKIE) || entry.is_unbound();
        if let Some(traffic) = row.traffic.as_ref().filter(|_| own) {
            self.sample_traffic(now_ns, slot, row.state, traffic);
        }
    }

    /// A connection that nothing had told of; `None` where there is no room.
    fn take_in(
        &mut self,
        now_ns: u64,
        progress: &mut Progress,
        row: &Row,
        key: Key,
        geo: &mut impl Locate,
    ) -> Option<Slot> {
        if self.tombstones.overflowed() && !progress.seeding {
            // It may be one whose close was forgotten; the next audit knows.
            return None;
        }
        let Some(slot) = self.table.allocate() else {
            if progress.counts() {
                progress.untracked += 1;
                if self.config.polling && !progress.seeding && !progress.meets_untracked() {
                    self.opened_at_the_cap(now_ns, progress, &row.tuple, geo);
                }
            }
            return None;
        };
        self.table.bind_key(slot, key);
        self.table.learn_id(slot, row.id);
        let country = country_of(&row.tuple, geo);
        let entry = self.table.entry_mut(slot);
        entry.learn_identity(progress.identity(row));
        entry.epoch = self.epoch;
        entry.flags.set(Flags::UNDECIDED);
        self.settle_in(now_ns, slot, Ledger::unsettled_place(country), row.state);
        // A poll's rows come here once all its LISTEN rows have been read.
        let certain = progress
            .listening
            .accepts(row.tuple.local, row.tuple.local_port)
            || self.config.polling && !progress.seeding;
        if certain || progress.undecided.len() >= UNDECIDED_MAX {
            self.decide(now_ns, progress, slot, &row.tuple);
        } else {
            progress.undecided.push((slot, row.tuple));
        }
        if progress.seeding {
            self.corrections.seeded += 1;
        } else if self.config.polling {
            if progress.meets_untracked() {
                // Opened when it found no room, or a seed.
                self.untracked = self.untracked.saturating_sub(1);
                self.corrections.added += 1;
            } else {
                self.ledger
                    .opened(now_ns, Place::of(self.table.entry(slot)));
            }
        } else {
            self.corrections.added += 1;
            if self.untracked > 0 {
                self.untracked -= 1;
            } else {
                progress.drift += 1;
            }
        }
        if let Some(traffic) = &row.traffic {
            self.sample_traffic(now_ns, slot, row.state, traffic);
        }
        Some(slot)
    }

    /// Polling: a connection is new, and there is no room for it.
    fn opened_at_the_cap(
        &mut self,
        now_ns: u64,
        progress: &Progress,
        tuple: &Tuple,
        geo: &mut impl Locate,
    ) {
        self.table_overflow += 1;
        let (direction, port) = progress.direction(tuple);
        let country = country_of(tuple, geo);
        let place = self.ledger.place(now_ns, country, direction, port);
        self.ledger.opened(now_ns, place);
    }

    /// Gives an undecided entry its direction and rows.
    fn decide(&mut self, now_ns: u64, progress: &Progress, slot: Slot, tuple: &Tuple) {
        let entry = self.table.entry_mut(slot);
        entry.flags.clear(Flags::UNDECIDED);
        let (direction, port) = progress.direction(tuple);
        let before = Place::of(entry);
        let established = entry.state() == ESTABLISHED;
        let place = self.ledger.place(now_ns, before.country, direction, port);
        self.ledger.attach(now_ns, place);
        if established {
            self.ledger.left_established(now_ns, before);
            self.ledger.entered_established(now_ns, place);
        }
        self.ledger.detach(now_ns, before);
        let entry = self.table.entry_mut(slot);
        entry.set_direction(place.direction);
        entry.port = place.port;
        entry.cross = place.cross;
    }

    fn end_namespace(
        &mut self,
        now_ns: u64,
        progress: &mut Progress,
        netns: NetnsId,
        access: Access,
        complete: bool,
    ) {
        for (slot, tuple) in std::mem::take(&mut progress.undecided) {
            let entry = self.table.entry(slot);
            // The slot may be another connection's by now.
            let key = self.table.hasher().key(&tuple, progress.key_netns);
            let same = entry.is_used() && entry.key().matches(&key);
            if same && entry.flags.has(Flags::UNDECIDED) {
                self.decide(now_ns, progress, slot, &tuple);
                let entry = self.table.entry(slot);
                if progress.audits() && entry.state() == CLOSE_WAIT {
                    self.ledger.saw_close_wait(Place::of(entry));
                }
            }
        }
        let coverage = match (access, complete) {
            (Access::Unaudited, _) => Coverage::Unread,
            (_, true) => Coverage::Complete,
            (_, false) => Coverage::Incomplete,
        };
        progress.all_complete &= coverage == Coverage::Complete;
        progress.any_incomplete |= coverage == Coverage::Incomplete;
        if progress.covered.len() < NAMESPACES_MAX || progress.covered.contains_key(&netns) {
            let known = progress.covered.entry(netns).or_insert(coverage);
            if coverage != Coverage::Complete {
                *known = coverage;
            }
        } else {
            progress.all_complete = false;
            progress.listed = false;
        }
        let complete = coverage == Coverage::Complete;
        self.listeners
            .end_namespace(netns, complete, access == Access::Diag);
    }

    /// The rows are in: publishes what the audit counted.
    fn end_rows(&mut self, progress: &mut Progress, summary: &WalkSummary) {
        self.tombstones.stop();
        // A walk that names no namespace at all has not found out which there
        // are: its own is always there.
        progress.listed &= !summary.unlisted && !progress.covered.is_empty();
        progress.all_complete &= summary.unaudited == 0 && progress.listed;
        if progress.evict && !progress.listed {
            // What could not be looked for yet goes after the next walk.
            self.lost = true;
        }
        // Where surrogate ids were read, a namespace that was not read under its
        // own name was under one of theirs, unless some were not read at all.
        let some_unread = !progress.listed || progress.any_incomplete || summary.unaudited > 0;
        self.listeners.end(
            |netns| match progress.covered.get(&netns) {
                Some(Coverage::Complete | Coverage::Incomplete) => true,
                Some(_) if !progress.surrogates => true,
                _ => !progress.listed || (progress.surrogates && some_unread),
            },
            progress.audits(),
        );
        if progress.seeding {
            self.started = true;
        }
        if !progress.audits() {
            return;
        }
        self.ledger.publish_close_wait();
        if progress.all_complete {
            self.ledger.set_listening(&progress.listening_anywhere);
        }
        self.audited_states = progress.states;
        self.hidden_loopback = progress.hidden_loopback;
        self.hidden_excluded = progress.hidden_excluded;
        self.untracked = progress.untracked;
    }

    /// Looks at the next slots for entries that the walk did not show; true
    /// while there are more.
    pub(super) fn scan_slice(&mut self, now_ns: u64) -> bool {
        let Some(mut progress) = self.progress.take_if(|progress| progress.scan.is_some()) else {
            return false;
        };
        let first = progress.scan.unwrap_or(0);
        let end = self.table.end();
        let last = first.saturating_add(SLICE).min(end);
        for slot in first..last {
            if self.table.entry(slot).is_used() {
                self.scan_entry(now_ns, &mut progress, slot);
            }
        }
        if last < end {
            progress.scan = Some(last);
            self.progress = Some(progress);
            return true;
        }
        if self.tombstones.forgotten() > 0 {
            // A row may have brought back one whose close was forgotten.
            self.absences.lost();
        }
        if progress.walk.audit {
            let table = &self.table;
            self.absences.audit_ends(progress.all_complete, |slot| {
                table.entry(slot).flags.has(Flags::MISSED)
            });
            self.drift = Some(progress.drift);
            self.drift_suspected = Some(progress.suspects);
            self.unlisted_namespaces = progress.unlisted.len() as u32;
        }
        false
    }

    fn scan_entry(&mut self, now_ns: u64, progress: &mut Progress, slot: Slot) {
        let epoch = self.epoch;
        let polling = self.config.polling;
        let entry = self.table.entry_mut(slot);
        if entry.is_pending() {
            debug_assert_eq!(entry.state(), SYN_SENT);
            if now_ns.saturating_sub(entry.since_ns) > PENDING_NS {
                self.table.remove(slot);
            }
            return;
        }
        entry.forget_identity();
        if entry.epoch == epoch {
            return;
        }
        if !entry.flags.has(Flags::MISSED) {
            self.absences.missed(slot, entry);
        }
        // No later epoch may take an old stamp for its own.
        entry.epoch = 0;
        let netns = entry.key().netns;
        let coverage = progress.coverage(netns);
        let gone = match coverage {
            Coverage::Complete if polling || entry.flags.has(Flags::MISSED) => true,
            Coverage::Complete => {
                entry.flags.set(Flags::MISSED);
                progress.suspects += 1;
                false
            }
            Coverage::Incomplete => false,
            // A failed read is no close.
            Coverage::Unread => progress.evict && !polling && progress.listed,
            Coverage::Unlisted => (progress.evict || polling) && progress.listed,
        };
        if !gone {
            let is_unlisted = coverage == Coverage::Unlisted && progress.listed && netns != 0;
            if is_unlisted && progress.unlisted.len() < NAMESPACES_MAX {
                progress.unlisted.insert(netns);
            }
            return;
        }
        if polling {
            self.finish(now_ns, slot, now_ns, None, false);
        } else {
            self.corrections.removed += 1;
            progress.drift += 1;
            let table = &self.table;
            self.absences
                .removed(now_ns, slot, table.entry(slot), || table.has_twin(slot));
            self.forget(now_ns, slot);
        }
    }
}

//! Rows of a walk, merged into the table.
//!
//! If several sockets of a namespace have the same endpoints (VRFs, bound
//! devices), each row is matched to an entry of its own. Which one is a guess
//! until an event has kernel address and cookie together; then the entries
//! exchange their cookies.

use connmon_common::state::{CLOSE, CLOSE_WAIT, ESTABLISHED, LISTEN, NEW_SYN_RECV, TIME_WAIT};

use super::Fold;
use super::counters::Labels;
use super::entry::Flags;
use super::events::{country_of, is_open_state};
use super::filter::Hidden;
use super::key::Key;
use super::snapshot::{AUDITED_STATES, Direction};
use super::table::Slot;
use super::tombstones::Verdict;
use super::walk::{Progress, UNDECIDED_MAX};
use crate::event::Tuple;
use crate::geo::{Country, Locate};
use crate::scan::Row;

impl Fold {
    pub(super) fn merge_row(&mut self, progress: &mut Progress, row: &Row, geo: &mut impl Locate) {
        match row.state {
            LISTEN => return self.merge_listener(progress, row),
            CLOSE | TIME_WAIT => return,
            // About to close: it has released its local port, so its close has
            // other endpoints than its entry.
            _ if row.tuple.local_port == 0 => return,
            _ => {}
        }
        if let Some(hidden) = self.filter.hides(&row.tuple) {
            if progress.counts_rows() && row.state == ESTABLISHED {
                match hidden {
                    Hidden::Loopback => progress.counts.hidden_loopback += 1,
                    Hidden::Excluded => progress.counts.hidden_excluded += 1,
                }
            }
            return;
        }
        if progress.counts_rows()
            && let Some(index) = AUDITED_STATES.iter().position(|&(s, _)| s == row.state)
        {
            progress.counts.states[index] += 1;
        }
        if is_open_state(row.state)
            && row.state != NEW_SYN_RECV
            && let Some(slot) = self.match_row(progress, row, geo)
            && row.state == CLOSE_WAIT
            && progress.counts_rows()
        {
            let entry = self.table.entry(slot);
            if !entry.flags.contains(Flags::UNDECIDED) {
                self.counters.count_close_wait(Labels::of(entry));
            }
        }
    }

    fn merge_listener(&mut self, progress: &mut Progress, row: &Row) {
        let (address, port) = (row.tuple.local, row.tuple.local_port);
        progress.listening.insert(address, port);
        if progress.pass == 0 {
            self.listeners.row(progress.netns, progress.surrogate, row);
        }
        if !self.filter.hides_listener(address) {
            progress.listening_anywhere.insert(port);
            self.counters.reserve_listening(port);
        }
    }

    /// Updates the entry of a row, or adds one. `None` if the row has none.
    fn match_row(
        &mut self,
        progress: &mut Progress,
        row: &Row,
        geo: &mut impl Locate,
    ) -> Option<Slot> {
        let hasher = self.table.hasher();
        let key = hasher.key(&row.tuple, progress.key_netns());
        let verdict = self
            .tombstones
            .verdict(hasher, &key, row.cookie, progress.t0_ns);
        let identity = progress.identity(row);
        let established = row.state == ESTABLISHED;
        let maybe_closed = verdict == Verdict::MaybeClosed;
        // A reopened entry is stale only if its close was lost. Otherwise it
        // needs a row more than an entry that was seen in this walk.
        let prefer_unmatched = maybe_closed || !self.absences.lost_recently();
        let epoch = self.epoch;
        let found =
            self.table
                .find_row(&key, row.id, identity, epoch, established, prefer_unmatched);
        // A socket that was closed and connected anew keeps its cookie.
        let known = |slot| row.cookie != 0 && self.table.entry(slot).cookie() == row.cookie;
        match found {
            Some((slot, alone)) if verdict == Verdict::Open || known(slot) => {
                self.update_entry(progress, slot, row, alone);
                Some(slot)
            }
            Some((slot, _)) if maybe_closed => {
                // If several sockets have these endpoints, another one may have
                // closed. The row is not of a connection opened since.
                let entry = self.table.entry_mut(slot);
                if entry.epoch == self.epoch {
                    return None;
                }
                entry.epoch = self.epoch;
                entry.flags.remove(Flags::BY_EVENT | Flags::MISSED);
                Some(slot)
            }
            _ if verdict != Verdict::Open || !progress.audits() => None,
            // An open cannot be given another direction later.
            _ if self.config.polling && !progress.seeding && progress.waits_for_listeners(row) => {
                progress.waiting.push(*row);
                None
            }
            _ => self.add_entry(progress, row, key, geo),
        }
    }

    /// The row of an entry; if that is not `alone` with its endpoints, the row
    /// may be of another entry.
    fn update_entry(&mut self, progress: &mut Progress, slot: Slot, row: &Row, alone: bool) {
        let epoch = self.epoch;
        self.table.learn_netns(slot, progress.key_netns());
        self.table.learn_id(slot, row.id);
        let entry = self.table.entry_mut(slot);
        let seen = entry.epoch == epoch;
        let newer = seen && entry.flags.contains(Flags::BY_EVENT);
        entry.learn_identity(progress.identity(row));
        entry.flags.remove(Flags::MISSED | Flags::REOPENED);
        // What this walk added waits already.
        if entry.flags.contains(Flags::UNDECIDED)
            && progress.audits()
            && (!seen || newer)
            && progress.undecided.len() < UNDECIDED_MAX
        {
            progress.undecided.push((slot, row.tuple));
        }
        if newer {
            return;
        }
        entry.epoch = epoch;
        entry.flags.remove(Flags::BY_EVENT);
        if progress.audits() && self.set_state(slot, row.state) && !self.config.polling {
            self.totals.corrections.updated += 1;
            progress.drift += 1;
        }
        let entry = self.table.entry(slot);
        // Else its close has all that moved.
        let own = alone || row.id != 0 || !entry.flags.contains(Flags::ROW_COOKIE) || entry.id == 0;
        if let Some(traffic) = row.traffic.as_ref().filter(|_| own) {
            self.sample_traffic(slot, row.state, traffic);
        }
    }

    /// Adds a connection without an event; `None` if the table is full.
    fn add_entry(
        &mut self,
        progress: &mut Progress,
        row: &Row,
        key: Key,
        geo: &mut impl Locate,
    ) -> Option<Slot> {
        if self.tombstones.overflowed() && !progress.seeding {
            // Its close may be among those forgotten; the next audit decides.
            return None;
        }
        // Polling: what the first walk did not show was opened since.
        let opened = self.config.polling && !progress.seeding;
        let Some(slot) = self.table.insert(0, key) else {
            if progress.counts_rows() {
                progress.untracked += 1;
                if opened && !progress.is_untracked() {
                    self.totals.table_overflow += 1;
                    let country = country_of(&row.tuple, geo);
                    let labels = self.row_labels(progress, &row.tuple, country);
                    self.counters.opened(labels);
                }
            }
            return None;
        };
        self.table.learn_id(slot, row.id);
        let entry = self.table.entry_mut(slot);
        entry.learn_identity(progress.identity(row));
        entry.epoch = self.epoch;
        entry.flags.insert(Flags::UNDECIDED);
        let labels = Labels::without_direction(country_of(&row.tuple, geo));
        self.track(slot, labels, row.state);
        let (local, port) = (row.tuple.local, row.tuple.local_port);
        let certain = opened || progress.listening.accepts(local, port);
        if certain || progress.undecided.len() >= UNDECIDED_MAX {
            self.decide(progress, slot, &row.tuple);
        } else {
            progress.undecided.push((slot, row.tuple));
        }
        if progress.seeding {
            self.totals.corrections.seeded += 1;
        } else if opened && !progress.is_untracked() {
            let labels = Labels::of(self.table.entry(slot));
            self.counters.opened(labels);
        } else {
            self.totals.corrections.added += 1;
            if self.totals.untracked > 0 {
                self.totals.untracked -= 1;
            } else {
                progress.drift += u64::from(!opened);
            }
        }
        if let Some(traffic) = &row.traffic {
            self.sample_traffic(slot, row.state, traffic);
        }
        Some(slot)
    }

    fn row_labels(&mut self, progress: &Progress, tuple: &Tuple, country: Country) -> Labels {
        let direction = progress.listening.direction(tuple, progress.ephemeral);
        let port = match direction {
            Direction::Inbound => tuple.local_port,
            Direction::Outbound => tuple.remote_port,
            Direction::Unknown => 0,
        };
        self.counters.labels(country, direction, port)
    }

    /// Gives an undecided entry its direction and rows.
    fn decide(&mut self, progress: &Progress, slot: Slot, tuple: &Tuple) {
        let before = Labels::of(self.table.entry(slot));
        let labels = self.row_labels(progress, tuple, before.country);
        let entry = self.table.entry_mut(slot);
        entry.flags.remove(Flags::UNDECIDED);
        labels.store(entry);
        let established = entry.state() == ESTABLISHED;
        self.counters.attach(labels, established);
        self.counters.detach(before, established, false);
    }

    /// All LISTEN rows of a namespace are merged: decides the entries that
    /// waited for them.
    pub(super) fn decide_waiting(&mut self, progress: &mut Progress) {
        for (slot, tuple) in std::mem::take(&mut progress.undecided) {
            let entry = self.table.entry(slot);
            // Meanwhile the slot may have become that of another connection.
            let key = self.table.hasher().key(&tuple, progress.key_netns());
            let same = entry.flags.contains(Flags::USED) && entry.key.matches(&key);
            if same && entry.flags.contains(Flags::UNDECIDED) {
                self.decide(progress, slot, &tuple);
                let entry = self.table.entry(slot);
                if progress.audits() && entry.state() == CLOSE_WAIT {
                    self.counters.count_close_wait(Labels::of(entry));
                }
            }
        }
    }
}

//! Entries that an audit removes although no loss of events is known: a close
//! was lost and not counted. What is known of them is logged.
//!
//! An entry goes when two audits in a row do not show it. So a loss explains
//! its removal unless two complete audits have begun and ended since the loss.
//! (With equal endpoints, or without cookies, the row of one connection may
//! have kept the entry of another for longer.)

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use super::entry::Entry;
use super::snapshot::{AUDITED_STATES, Direction};
use super::table::Slot;

/// Audits after a loss whose removals the loss explains.
const EXPLAINED_AUDITS: u8 = 2;

/// Most absent entries whose time is remembered; others are counted only.
const REMEMBERED_MAX: usize = 1024;

/// What is known of the connections that an audit removed although no loss is
/// known. Without addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unexplained {
    /// How many by last known state and direction.
    pub by_state: BTreeMap<(u8, Direction), u64>,
    /// The least and the greatest time since the last event or row of one;
    /// `None` if no time is known.
    pub last_seen_ns: Option<(u64, u64)>,
}

impl fmt::Display for Unexplained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} connections", self.by_state.values().sum::<u64>())?;
        let mut separator = " (";
        for ((state, direction), count) in &self.by_state {
            let audited = AUDITED_STATES.iter().find(|(audited, _)| audited == state);
            let state = audited.map_or("established", |(_, name)| name);
            write!(f, "{separator}{count} {} {state}", direction.label())?;
            separator = ", ";
        }
        if let Some((least, most)) = self.last_seen_ns {
            let [least, most] = [least, most].map(|ns| ns as f64 / 1e9);
            write!(f, "; last seen at most {least:.1} to {most:.1} s ago")?;
        }
        f.write_str(")")
    }
}

/// What [`Unexplained`] is made from.
#[derive(Debug, Default)]
pub(super) struct Absences {
    /// Complete audits to come whose removals a loss explains.
    explained: u8,
    /// Events were lost since the walk in progress began.
    lost: bool,
    /// When the last walk of each epoch began.
    begun_ns: HashMap<u8, u64>,
    /// When the walk began in which an absent entry was last seen; at most
    /// [`REMEMBERED_MAX`].
    last_seen_ns: HashMap<Slot, u64>,
    found: Option<Unexplained>,
}

impl Absences {
    /// Events were lost.
    pub(super) fn lost(&mut self) {
        self.explained = EXPLAINED_AUDITS;
        self.lost = true;
        self.found = None;
    }

    /// Whether a loss explains what the next audit removes.
    pub(super) fn lost_recently(&self) -> bool {
        self.explained > 0
    }

    pub(super) fn walk_begins(&mut self, epoch: u8, now_ns: u64) {
        self.begun_ns.insert(epoch, now_ns);
        self.lost = false;
    }

    /// An audit does not show an entry for the first time.
    pub(super) fn missed(&mut self, slot: Slot, entry: &Entry) {
        if let Some(&seen_ns) = self.begun_ns.get(&entry.epoch)
            && self.last_seen_ns.len() < REMEMBERED_MAX
        {
            self.last_seen_ns.insert(slot, seen_ns);
        }
    }

    /// An audit removes an entry.
    pub(super) fn removed(&mut self, now_ns: u64, slot: Slot, entry: &Entry) {
        let seen_ns = self.last_seen_ns.remove(&slot);
        if self.explained > 0 {
            return;
        }
        let found = self.found.get_or_insert_default();
        let by_state = found.by_state.entry((entry.state(), entry.direction()));
        *by_state.or_default() += 1;
        if let Some(seen_ns) = seen_ns {
            let age = now_ns.saturating_sub(seen_ns);
            let (least, most) = found.last_seen_ns.unwrap_or((age, age));
            found.last_seen_ns = Some((least.min(age), most.max(age)));
        }
    }

    /// An audit is over. `complete`: it read every namespace to its end;
    /// `is_missed`: whether it did not show the entry at a slot.
    pub(super) fn audit_ends(&mut self, complete: bool, is_missed: impl Fn(Slot) -> bool) {
        if complete && !self.lost {
            self.explained = self.explained.saturating_sub(1);
        }
        self.last_seen_ns.retain(|&slot, _| is_missed(slot));
    }

    /// What the last audit removed without a known loss; once.
    pub(super) fn take(&mut self) -> Option<Unexplained> {
        self.found.take()
    }
}

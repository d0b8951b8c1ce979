//! Entries that an audit removes although no loss is known: their closes were
//! lost and nothing counted that. What is known of them is kept for a line of
//! the log.
//!
//! A loss explains a removal if it was told after the beginning of the last
//! audit that showed the connection. An entry goes when two audits in a row do
//! not show it, so two whole audits must have begun and ended since the last
//! loss was told, and none be told in the one that removes. (Where several
//! connections have the same endpoints, or the tables tell no cookies, the row
//! of one may have kept the entry of another for longer.)

use std::collections::HashMap;
use std::fmt;

use connmon_common::state::ESTABLISHED;

use super::snapshot::{AUDITED_STATES, DIRECTIONS, Direction};
use super::table::{Entry, Flags, Slot};

/// Audits without a loss before a removal is unexplained.
const QUIET: u8 = 2;

/// Most absent entries whose time is remembered; of any beyond, all is counted
/// but that.
const REMEMBERED_MAX: usize = 1024;

/// What is known of the connections that an audit removed although no loss is
/// known. Without addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unexplained {
    /// How many by the last state known and by direction.
    pub by_state: [[u64; DIRECTIONS]; 16],
    /// Those whose cookie was known.
    pub with_cookie: u64,
    /// Those that had the endpoints of another entry when they were removed.
    pub with_twin: u64,
    /// Those whose endpoints were opened once more.
    pub reopened: u64,
    /// The last event or row of each came at most so long before: the
    /// shortest and the longest of these times. `None` where none is known.
    pub last_seen_ns: Option<(u64, u64)>,
}

impl fmt::Display for Unexplained {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: u64 = self.by_state.as_flattened().iter().sum();
        write!(f, "{total} connections (")?;
        let states = std::iter::once((ESTABLISHED, "established")).chain(AUDITED_STATES);
        let mut comma = "";
        for (state, name) in states {
            let counts = self.by_state[usize::from(state)];
            for (direction, count) in Direction::ALL.into_iter().zip(counts) {
                if count > 0 {
                    write!(f, "{comma}{count} {} {name}", direction.label())?;
                    comma = ", ";
                }
            }
        }
        write!(
            f,
            "; {} with a cookie, {} with the endpoints of another entry, {} whose endpoints were \
             opened again",
            self.with_cookie, self.with_twin, self.reopened
        )?;
        if let Some((least, most)) = self.last_seen_ns {
            let seconds = |ns: u64| ns as f64 / 1e9;
            let (least, most) = (seconds(least), seconds(most));
            write!(f, "; last seen at most {least:.1} to {most:.1} s ago")?;
        }
        f.write_str(")")
    }
}

/// What [`Unexplained`] is made from.
#[derive(Debug)]
pub(super) struct Absences {
    /// Whole audits since a loss was told, up to [`QUIET`].
    quiet: u8,
    /// A loss was told since the walk under way began.
    lost: bool,
    /// When the last walk of each epoch began.
    begun_ns: [u64; 256],
    /// Of entries that the last audit did not show: when the walk began after
    /// which nothing told of them. At most [`REMEMBERED_MAX`].
    last_seen_ns: HashMap<Slot, u64>,
    found: Option<Unexplained>,
}

impl Absences {
    pub(super) fn new() -> Self {
        Self {
            quiet: QUIET,
            lost: false,
            begun_ns: [0; 256],
            last_seen_ns: HashMap::new(),
            found: None,
        }
    }

    /// Events were lost.
    pub(super) fn lost(&mut self) {
        self.quiet = 0;
        self.lost = true;
        self.found = None;
    }

    pub(super) fn walk_begins(&mut self, epoch: u8, now_ns: u64) {
        self.begun_ns[usize::from(epoch)] = now_ns;
        self.lost = false;
    }

    /// An audit does not show the entry of `slot` for the first time.
    pub(super) fn missed(&mut self, slot: Slot, entry: &Entry) {
        let seen_ns = self.begun_ns[usize::from(entry.epoch)];
        if seen_ns != 0 && self.last_seen_ns.len() < REMEMBERED_MAX {
            self.last_seen_ns.insert(slot, seen_ns);
        }
    }

    /// An audit removes the entry of `slot`, which it has not shown for the
    /// second time; `has_twin`: whether another one has the same endpoints.
    pub(super) fn removed(
        &mut self,
        now_ns: u64,
        slot: Slot,
        entry: &Entry,
        has_twin: impl FnOnce() -> bool,
    ) {
        let seen_ns = self.last_seen_ns.remove(&slot);
        if self.quiet < QUIET {
            return;
        }
        let found = self.found.get_or_insert(Unexplained {
            by_state: [[0; DIRECTIONS]; 16],
            with_cookie: 0,
            with_twin: 0,
            reopened: 0,
            last_seen_ns: None,
        });
        found.by_state[usize::from(entry.state() & 15)][entry.direction() as usize] += 1;
        found.with_cookie += u64::from(entry.cookie() != 0);
        found.with_twin += u64::from(has_twin());
        found.reopened += u64::from(entry.flags.has(Flags::SUSPECT));
        if let Some(seen_ns) = seen_ns {
            let age = now_ns.saturating_sub(seen_ns);
            let (least, most) = found.last_seen_ns.unwrap_or((age, age));
            found.last_seen_ns = Some((least.min(age), most.max(age)));
        }
    }

    /// An audit is over, `whole` if it read every namespace to its end.
    /// `is_missed`: whether it did not show the entry of a
    /// slot.
    pub(super) fn audit_ends(&mut self, whole: bool, is_missed: impl Fn(Slot) -> bool) {
        if whole && !self.lost && self.quiet < QUIET {
            self.quiet += 1;
        }
        self.last_seen_ns.retain(|&slot, _| is_missed(slot));
    }

    /// What the last audit removed without a known loss, once.
    pub(super) fn take(&mut self) -> Option<Unexplained> {
        self.found.take()
    }
}

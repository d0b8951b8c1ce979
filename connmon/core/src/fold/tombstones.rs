//! Connections that closed during a walk, so that a row which was read before
//! the close does not add one back.

use hashbrown::HashTable;

use super::key::{Hasher, Key};
use crate::event::Cookie;

/// Most closes remembered at a time: 5 MiB at 40 bytes each. Only those since
/// the namespace being read was begun matter, a second or two; this is 65,000
/// closes a second for two.
pub(super) const MAX: usize = 1 << 17;

/// A close matters for the rows of a namespace unless it is older than the
/// begin of the dump by this much. The socket was unhashed before its close was
/// reported, but the time of the close can be that of an earlier packet in the
/// same jiffy: 10 ms at most (CONFIG_HZ=100).
const SLACK_NS: u64 = 11_000_000;

#[derive(Clone, Copy, Debug)]
struct Tombstone {
    key: Key,
    cookie: Cookie,
    at_ns: u64,
}

/// The closes of the walk in progress; empty otherwise.
#[derive(Debug, Default)]
pub(super) struct Tombstones {
    table: HashTable<Tombstone>,
    active: bool,
    /// Closes before this no longer matter.
    horizon_ns: u64,
    /// The horizon when old closes were last dropped.
    dropped_ns: u64,
    /// The latest close that was forgotten because the table was full.
    forgotten_ns: Option<u64>,
    /// Closes forgotten in the walk in progress, or the last one.
    forgotten: u64,
    /// Closes forgotten since start.
    pub(super) overflow: u64,
}

/// What the tombstones show about a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// No connection with these endpoints closed.
    Open,
    /// One with these endpoints closed; no cookie shows whether it is this one.
    MaybeClosed,
    /// This one closed after the row was read.
    Closed,
}

impl Tombstones {
    /// A walk begins.
    pub(super) fn start(&mut self) {
        *self = Self {
            active: true,
            overflow: self.overflow,
            ..Self::default()
        };
    }

    /// The rows to come were all read at `t0_ns` or later.
    pub(super) fn begin_namespace(&mut self, t0_ns: u64) {
        self.horizon_ns = t0_ns.saturating_sub(SLACK_NS);
    }

    /// A walk is over.
    pub(super) fn stop(&mut self) {
        self.table = HashTable::new();
        self.active = false;
    }

    /// A connection closed.
    pub(super) fn close(&mut self, hasher: &Hasher, key: Key, cookie: Cookie, at_ns: u64) {
        if !self.active {
            return;
        }
        if self.table.len() >= MAX && self.dropped_ns < self.horizon_ns {
            self.dropped_ns = self.horizon_ns;
            self.table.retain(|other| other.at_ns >= self.dropped_ns);
        }
        if self.table.len() >= MAX {
            self.forgotten_ns = self.forgotten_ns.max(Some(at_ns));
            self.forgotten += 1;
            self.overflow += 1;
            return;
        }
        let tombstone = Tombstone { key, cookie, at_ns };
        self.table
            .insert_unique(hasher.hash_key(&key), tombstone, |other| {
                hasher.hash_key(&other.key)
            });
    }

    /// Whether a forgotten close can be that of a row of the namespace being
    /// read.
    pub(super) fn overflowed(&self) -> bool {
        self.forgotten_ns.is_some_and(|at| at >= self.horizon_ns)
    }

    /// How many closes the walk in progress, or the last one, forgot.
    pub(super) fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Whether a row, read at `t0_ns` or later, is of a connection that
    /// closed. The cookie decides if both are known, else endpoints and time: a
    /// socket that was opened since is known by its event and needs no row.
    pub(super) fn verdict(
        &self,
        hasher: &Hasher,
        key: &Key,
        cookie: Cookie,
        t0_ns: u64,
    ) -> Verdict {
        let mut verdict = Verdict::Open;
        if self.table.is_empty() {
            return verdict;
        }
        for other in self.table.iter_hash(hasher.hash_key(key)) {
            if !other.key.matches(key) {
                continue;
            }
            if other.cookie == 0 || cookie == 0 {
                if other.at_ns >= t0_ns.saturating_sub(SLACK_NS) {
                    verdict = Verdict::MaybeClosed;
                }
            } else if other.cookie == cookie {
                return Verdict::Closed;
            }
        }
        verdict
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key {
        a: 1,
        b: 2,
        netns: 3,
    };

    #[test]
    fn cookies_decide_where_both_are_known_else_time() {
        let hasher = Hasher::new(&[0; 16]);
        let mut tombstones = Tombstones::default();
        tombstones.close(&hasher, KEY, 7, 100);
        tombstones.start();
        assert_eq!(
            tombstones.verdict(&hasher, &KEY, 7, 0),
            Verdict::Open,
            "no walk, no record"
        );
        tombstones.close(&hasher, KEY, 7, 100);
        let verdict = |cookie, t0| tombstones.verdict(&hasher, &KEY, cookie, t0);
        assert_eq!(verdict(7, 200 + SLACK_NS), Verdict::Closed);
        assert_eq!(verdict(8, 50), Verdict::Open);
        assert_eq!(verdict(0, 100), Verdict::MaybeClosed);
        assert_eq!(verdict(0, 100 + SLACK_NS), Verdict::MaybeClosed);
        assert_eq!(verdict(0, 101 + SLACK_NS), Verdict::Open);
        let elsewhere = Key { netns: 4, ..KEY };
        assert_eq!(tombstones.verdict(&hasher, &elsewhere, 7, 0), Verdict::Open);
    }

    #[test]
    fn a_flood_of_closes_is_bounded_and_known() {
        let hasher = Hasher::new(&[0; 16]);
        let mut tombstones = Tombstones::default();
        tombstones.start();
        for b in 0..=MAX as u32 {
            assert!(!tombstones.overflowed());
            tombstones.close(&hasher, Key { b, ..KEY }, 0, 1);
        }
        assert!(tombstones.overflowed());
        assert_eq!((tombstones.forgotten(), tombstones.overflow), (1, 1));
        tombstones.start();
        assert!(!tombstones.overflowed());
        assert_eq!((tombstones.forgotten(), tombstones.overflow), (0, 1));
    }

    #[test]
    fn closes_before_a_namespace_was_begun_are_dropped() {
        let hasher = Hasher::new(&[0; 16]);
        let mut tombstones = Tombstones::default();
        tombstones.start();
        let late = 1 + 2 * SLACK_NS;
        for b in 0..=MAX as u32 {
            tombstones.close(&hasher, Key { b, ..KEY }, 0, 1);
        }
        assert!(tombstones.overflowed());
        tombstones.begin_namespace(late);
        assert!(!tombstones.overflowed(), "nothing forgotten matters here");
        for b in 0..MAX as u32 {
            tombstones.close(&hasher, Key { b, ..KEY }, 0, late);
        }
        assert!(!tombstones.overflowed());
        let last = Key {
            b: MAX as u32 - 1,
            ..KEY
        };
        assert_eq!(
            tombstones.verdict(&hasher, &last, 0, late),
            Verdict::MaybeClosed
        );
        tombstones.close(&hasher, KEY, 0, late);
        assert!(tombstones.overflowed());
        assert_eq!(tombstones.overflow, 2);
    }
}

//! Connections that closed while a walk is under way: a row that was read
//! before its close must not bring one back.

use hashbrown::HashTable;

use super::key::{Hasher, Key};
use crate::event::Cookie;

/// Most closes remembered at a time: at 40 bytes with index, 5 MiB. Only those
/// since the namespace being read was begun matter, and that takes at most a
/// second or two; this is 65,000 closes a second for two.
pub(super) const MAX: usize = 1 << 17;

/// How much older than the beginning of a namespace's dump a close has to be
/// to mean nothing for its rows. The socket was unhashed before its close was
/// told, but the time of one can be that of an earlier packet in the same
/// jiffy, which lasts 10 ms at most (CONFIG_HZ=100).
const SLACK_NS: u64 = 11_000_000;

#[derive(Clone, Copy, Debug)]
struct Tombstone {
    key: Key,
    cookie: Cookie,
    at_ns: u64,
}

/// The closes of the walk under way; empty otherwise.
#[derive(Debug)]
pub(super) struct Tombstones {
    table: HashTable<Tombstone>,
    active: bool,
    /// Closes before this mean nothing any more.
    horizon_ns: u64,
    /// The horizon at the last clearing out.
    cleared_ns: u64,
    /// The latest close that was forgotten for want of room.
    forgotten_ns: Option<u64>,
    /// Closes forgotten in the walk under way, or the last one.
    forgotten: u64,
    /// Closes forgotten since start.
    pub(super) overflow: u64,
}

/// What the tombstones say of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing with these endpoints closed.
    Alive,
    /// One with these endpoints closed, and no cookie tells whether it is this
    /// one.
    MayBeDead,
    /// This socket closed after the row was read.
    Dead,
}

impl Tombstones {
    pub(super) fn new() -> Self {
        Self {
            table: HashTable::new(),
            active: false,
            horizon_ns: 0,
            cleared_ns: 0,
            forgotten_ns: None,
            forgotten: 0,
            overflow: 0,
        }
    }

    /// A walk begins.
    pub(super) fn start(&mut self) {
        *self = Self {
            active: true,
            overflow: self.overflow,
            ..Self::new()
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
        if self.table.len() >= MAX && self.cleared_ns < self.horizon_ns {
            // At most once a namespace, and only where there is need.
            self.cleared_ns = self.horizon_ns;
            self.table.retain(|other| other.at_ns >= self.cleared_ns);
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

    /// Whether closes were forgotten for want of room that rows of the
    /// namespace being read may belong to.
    pub(super) fn overflowed(&self) -> bool {
        self.forgotten_ns.is_some_and(|at| at >= self.horizon_ns)
    }

    /// How many closes the walk under way, or the last one, forgot.
    pub(super) fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// Whether a row with these endpoints and cookie, read at `t0_ns` or
    /// later, is of a connection that closed: decided by the cookie where
    /// both are known, else by endpoints and time. What was opened again since
    /// is known by event and needs no row.
    pub(super) fn verdict(
        &self,
        hasher: &Hasher,
        key: &Key,
        cookie: Cookie,
        t0_ns: u64,
    ) -> Verdict {
        if self.table.is_empty() {
            return Verdict::Alive;
        }
        let mut verdict = Verdict::Alive;
        for other in self.table.iter_hash(hasher.hash_key(key)) {
            if !other.key.matches(key) {
                continue;
            }
            if other.cookie == 0 || cookie == 0 {
                if other.at_ns >= t0_ns.saturating_sub(SLACK_NS) {
                    verdict = Verdict::MayBeDead;
                }
            } else if other.cookie == cookie {
                return Verdict::Dead;
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
        let mut tombstones = Tombstones::new();
        tombstones.close(&hasher, KEY, 7, 100);
        tombstones.start();
        assert_eq!(
            tombstones.verdict(&hasher, &KEY, 7, 0),
            Verdict::Alive,
            "no walk, no record"
        );
        tombstones.close(&hasher, KEY, 7, 100);
        let verdict = |cookie, t0| tombstones.verdict(&hasher, &KEY, cookie, t0);
        assert_eq!(verdict(7, 200 + SLACK_NS), Verdict::Dead);
        assert_eq!(verdict(8, 50), Verdict::Alive);
        assert_eq!(verdict(0, 100), Verdict::MayBeDead);
        assert_eq!(verdict(0, 100 + SLACK_NS), Verdict::MayBeDead);
        assert_eq!(verdict(0, 101 + SLACK_NS), Verdict::Alive);
        let elsewhere = Key { netns: 4, ..KEY };
        assert_eq!(
            tombstones.verdict(&hasher, &elsewhere, 7, 0),
            Verdict::Alive
        );
    }

    #[test]
    fn a_flood_of_closes_is_bounded_and_known() {
        let hasher = Hasher::new(&[0; 16]);
        let mut tombstones = Tombstones::new();
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
    fn closes_of_before_a_namespace_was_begun_make_room() {
        let hasher = Hasher::new(&[0; 16]);
        let mut tombstones = Tombstones::new();
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
            Verdict::MayBeDead
        );
        tombstones.close(&hasher, KEY, 0, late);
        assert!(tombstones.overflowed());
        assert_eq!(tombstones.overflow, 2);
    }
}

//! One connection of the table, in 64 bytes.

use bitflags::bitflags;
use connmon_common::state::SYN_SENT;

use super::dimension::NO_ROW;
use super::key::Key;
use super::snapshot::Direction;
use crate::event::{Cookie, SocketId};
use crate::geo::Country;

/// Set in a walk identity; no cookie is so large.
const WALK_ONLY: u64 = 1 << 63;

/// A substitute for the cookie of a row that has none: distinguishes sockets with the
/// same endpoints apart within one walk. `ordinal` is the number of the
/// namespace in the walk, `inode` is 0 if no process holds the socket.
pub(super) fn walk_identity(ordinal: u16, inode: u32) -> Cookie {
    WALK_ONLY | u64::from(ordinal) << 32 | u64::from(inode)
}

/// Whether an identity is a [`walk_identity`].
pub(super) fn is_walk_identity(identity: Cookie) -> bool {
    identity & WALK_ONLY != 0
}

/// The low 48 bits of a byte counter.
const LOW_48: u64 = (1 << 48) - 1;

bitflags! {
    /// Facts about an entry; also its direction in bits 10 and 11, its TCP
    /// state in bits 12 to 15.
    #[derive(Clone, Copy, Debug)]
    pub(super) struct Flags: u16 {
        /// Its cookie comes from a row. If several sockets have its endpoints, the
        /// cookie may be that of another one, until an event names it.
        const ROW_COOKIE = 1;
        /// Its open was seen: its start time is known, and its bytes began at 0.
        const OPENED = 1 << 1;
        /// [`Entry::baseline`] is valid.
        const BASELINE = 1 << 2;
        /// A round-trip time was observed.
        const RTT = 1 << 3;
        /// The epoch was set by an event, not by a row alone.
        const BY_EVENT = 1 << 4;
        /// Absent from the last complete audit.
        const MISSED = 1 << 5;
        /// Its accept was observed.
        const ACCEPTED = 1 << 6;
        /// Its direction and port are not known until a walk has read the
        /// listening sockets of its namespace.
        const UNDECIDED = 1 << 7;
        /// In use.
        const USED = 1 << 8;
        /// A socket with the same endpoints was opened later: probably the close
        /// of this one was missed, so it is the last to which a row is matched.
        /// Not certain, since in VRFs and on bound devices several sockets can
        /// have the same endpoints.
        const REOPENED = 1 << 9;
    }
}

/// The kernel's counters of a socket when they were last read: bytes modulo
/// 2^48, and segments.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Baseline {
    received_low: u32,
    sent_low: u32,
    received_high: u16,
    sent_high: u16,
    retransmitted: u32,
}

impl Baseline {
    /// Sets received bytes to `now`. Returns the increase; 0 if the kernel's
    /// counter went back, because it was reset.
    pub(super) fn advance_received(&mut self, now: u64) -> u64 {
        advance(&mut self.received_low, &mut self.received_high, now)
    }

    /// The same for sent bytes.
    pub(super) fn advance_sent(&mut self, now: u64) -> u64 {
        advance(&mut self.sent_low, &mut self.sent_high, now)
    }

    /// The same for retransmitted segments.
    pub(super) fn advance_retransmitted(&mut self, now: u32) -> u64 {
        let moved = now.wrapping_sub(self.retransmitted);
        self.retransmitted = now;
        if moved >> 31 == 0 { moved.into() } else { 0 }
    }
}

fn advance(low: &mut u32, high: &mut u16, now: u64) -> u64 {
    let before = u64::from(*high) << 32 | u64::from(*low);
    (*low, *high) = (now as u32, (now >> 32) as u16);
    let moved = now.wrapping_sub(before) & LOW_48;
    if moved >> 47 == 0 { moved } else { 0 }
}

/// One connection. Its addresses are not kept: country and port row are found
/// when it is added, and its endpoints remain in [`Key`] only.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Entry {
    /// Kernel address; 0 until an event or a row has named it.
    pub(super) id: SocketId,
    /// Cookie, or walk identity, or 0.
    pub(super) identity: Cookie,
    /// Both endpoints; of a pending entry the remote endpoint.
    pub(super) key: Key,
    /// Start of the handshake if pending; its end if opened.
    pub(super) since_ns: u64,
    pub(super) baseline: Baseline,
    /// Row in the port table of its direction.
    pub(super) port: u16,
    /// Row in the cross table, or [`NO_ROW`].
    pub(super) cross: u16,
    pub(super) flags: Flags,
    pub(super) country: Country,
    /// Epoch of the walk in which it was last seen; see [`super::Fold::epoch`].
    pub(super) epoch: u8,
}

const _: () = assert!(size_of::<Entry>() == 64 && align_of::<Entry>() == 64);

impl Entry {
    pub(super) const FREE: Self = Self {
        id: 0,
        identity: 0,
        key: Key {
            a: 0,
            b: 0,
            netns: 0,
        },
        since_ns: 0,
        baseline: Baseline {
            received_low: 0,
            sent_low: 0,
            received_high: 0,
            sent_high: 0,
            retransmitted: 0,
        },
        port: 0,
        cross: NO_ROW,
        flags: Flags::empty(),
        country: Country::UNKNOWN,
        epoch: 0,
    };

    /// An active open that has not completed; in no counter and no gauge.
    pub(super) fn is_pending(&self) -> bool {
        self.state() == SYN_SENT
    }

    /// Its cookie, 0 if it is not known.
    pub(super) fn cookie(&self) -> Cookie {
        if is_walk_identity(self.identity) {
            0
        } else {
            self.identity
        }
    }

    /// Takes a row's identity, unless a better one is known.
    pub(super) fn learn_identity(&mut self, identity: Cookie) {
        let inode_known = is_walk_identity(self.identity) && self.identity as u32 != 0;
        let known = self.cookie() != 0 || inode_known && is_walk_identity(identity);
        if identity != 0 && !known {
            self.identity = identity;
            self.flags.insert(Flags::ROW_COOKIE);
        }
    }

    /// A walk is over, and with it the validity of its identities.
    pub(super) fn forget_walk_identity(&mut self) {
        self.identity = self.cookie();
    }

    /// Whether both identities are known and differ: it is another socket.
    pub(super) fn contradicts(&self, identity: Cookie) -> bool {
        if self.identity == 0 || identity == 0 || self.identity == identity {
            return false;
        }
        match (is_walk_identity(self.identity), is_walk_identity(identity)) {
            (false, false) => true,
            (true, true) => {
                let inodes = (self.identity as u32, identity as u32);
                let other_netns = self.identity >> 32 != identity >> 32;
                other_netns || inodes.0 != 0 && inodes.1 != 0 && inodes.0 != inodes.1
            }
            _ => false,
        }
    }

    /// Exchanges cookies with an entry that has the same endpoints, since
    /// `cookie` is this one's: rows of `other` were matched to this entry. If
    /// `other` is known by the row with `cookie` alone, the row's byte counters
    /// were this one's too.
    pub(super) fn exchange_cookies(&mut self, other: &mut Self, cookie: Cookie, epoch: u8) {
        if self.cookie() != 0 && !self.flags.contains(Flags::BY_EVENT) {
            // What a row showed of this entry, it showed of `other`.
            if !self.flags.contains(Flags::MISSED) {
                other.flags.remove(Flags::MISSED);
            }
            if self.epoch == epoch && other.epoch != epoch {
                other.epoch = epoch;
                other.flags.remove(Flags::BY_EVENT);
            }
        }
        let known_by_row = other.id == 0 && cookie != 0 && other.identity == cookie;
        std::mem::swap(&mut self.identity, &mut other.identity);
        other.flags.insert(Flags::ROW_COOKIE);
        if known_by_row {
            std::mem::swap(&mut self.baseline, &mut other.baseline);
            let counted = Flags::BASELINE | Flags::RTT;
            let differing = (self.flags ^ other.flags) & counted;
            self.flags ^= differing;
            other.flags ^= differing;
        }
    }

    pub(super) fn direction(&self) -> Direction {
        match self.flags.bits() >> 10 & 3 {
            0 => Direction::Inbound,
            1 => Direction::Outbound,
            _ => Direction::Unknown,
        }
    }

    pub(super) fn set_direction(&mut self, direction: Direction) {
        let rest = self.flags.bits() & !(3 << 10);
        self.flags = Flags::from_bits_retain(rest | u16::from(direction as u8) << 10);
    }

    pub(super) fn state(&self) -> u8 {
        (self.flags.bits() >> 12) as u8
    }

    pub(super) fn set_state(&mut self, state: u8) {
        let rest = self.flags.bits() & 0x0fff;
        self.flags = Flags::from_bits_retain(rest | u16::from(state) << 12);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_wrap_and_a_reset_counts_nothing() {
        let mut baseline = Baseline::default();
        assert_eq!(
            baseline.advance_received((1 << 48) - 10),
            0,
            "a counter that went back"
        );
        assert_eq!(baseline.advance_received((1 << 48) + 5), 15);
        assert_eq!(baseline.advance_received(1000), 995);
        assert_eq!(baseline.advance_received(10), 0);
        assert_eq!(baseline.advance_received(30), 20);
        assert_eq!(baseline.advance_sent(7), 7);
        assert_eq!(baseline.advance_retransmitted(u32::MAX), 0);
        assert_eq!(baseline.advance_retransmitted(4), 5);
        assert_eq!(baseline.advance_retransmitted(3), 0);
    }

    #[test]
    fn state_and_direction_do_not_overlap() {
        let mut entry = Entry::FREE;
        for direction in Direction::ALL {
            for state in 1..=12 {
                entry.set_direction(direction);
                entry.set_state(state);
                assert_eq!((entry.direction(), entry.state()), (direction, state));
            }
        }
    }
}

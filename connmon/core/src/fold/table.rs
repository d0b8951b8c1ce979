//! The connection table: a slab of 64-byte entries and two index tables over
//! it, one by the kernel's socket address, one by endpoints.
//!
//! Everything included a connection costs 64 bytes of slab and, at the load
//! factors of hashbrown, 5 to 11 bytes in each index.

use connmon_common::state::{ESTABLISHED, SYN_SENT};
use hashbrown::HashTable;

use crate::event::{Cookie, SocketId};
use crate::geo::Country;

use super::dimension::NO_ROW;
use super::key::{Hasher, Key};
use super::snapshot::Direction;

/// Place of an entry in the slab.
pub(super) type Slot = u32;

/// Entries per slab chunk: 64 KiB, so that an idle agent stays small and
/// growing never copies.
const CHUNK: usize = 1024;

/// Set in what tells apart the sockets of rows without a cookie: with it the
/// number of the namespace in the walk and the inode, 0 where no process holds
/// the socket. It holds for the walk that read the row; no cookie is so large.
const WALK_ONLY: u64 = 1 << 63;

/// What tells the socket of a row without a cookie from others with the same
/// endpoints, within a walk; `ordinal` numbers its namespaces.
pub(super) fn walk_identity(ordinal: u16, inode: u32) -> Cookie {
    WALK_ONLY | u64::from(ordinal) << 32 | u64::from(inode)
}

/// The low 48 bits of a byte counter.
const LOW_48: u64 = (1 << 48) - 1;

/// Facts about an entry, one bit each; its direction in bits 10 and 11, its
/// TCP state in bits 12 to 15.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Flags(u16);

impl Flags {
    /// Its cookie comes from a row: where several sockets have its endpoints,
    /// it may be another one's, and an event of either puts that right.
    pub(super) const ROW_COOKIE: Self = Self(1);
    /// Opened before our eyes: has a start time and started at zero bytes.
    pub(super) const OPENED: Self = Self(1 << 1);
    /// The byte baselines are valid.
    pub(super) const BASELINE: Self = Self(1 << 2);
    /// A round-trip time was observed for it.
    pub(super) const RTT: Self = Self(1 << 3);
    /// The epoch stamp comes from an event, not from a row alone.
    pub(super) const BY_EVENT: Self = Self(1 << 4);
    /// Absent from the last complete audit.
    pub(super) const MISSED: Self = Self(1 << 5);
    /// Its accept was observed.
    pub(super) const ACCEPTED: Self = Self(1 << 6);
    /// Direction and port are not settled yet: waits for the listening
    /// sockets of its namespace, or was met in an event before the startup
    /// walk came to it.
    pub(super) const UNDECIDED: Self = Self(1 << 7);
    /// A later open has the same endpoints under another kernel address, so
    /// its close was probably missed; rows are joined to it last. Not gone,
    /// since with VRFs or bound devices several sockets can have the same
    /// endpoints.
    pub(super) const SUSPECT: Self = Self(1 << 9);
    /// Slot in use.
    const USED: Self = Self(1 << 8);

    pub(super) fn has(self, flag: Self) -> bool {
        self.0 & flag.0 != 0
    }

    pub(super) fn set(&mut self, flag: Self) {
        self.0 |= flag.0;
    }

    pub(super) fn clear(&mut self, flag: Self) {
        self.0 &= !flag.0;
    }

    fn put(&mut self, flag: Self, on: bool) {
        if on { self.set(flag) } else { self.clear(flag) }
    }
}

impl std::ops::BitOr for Flags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// One connection. Addresses are not kept: country and port row are decided
/// at birth, and endpoints live on in [`Key`] only.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(64))]
pub(super) struct Entry {
    /// Kernel address; 0 while no event has named it.
    id: SocketId,
    cookie: Cookie,
    /// Both endpoints, or for a pending entry the remote end alone.
    key: Key,
    /// Pending: start of the handshake; opened: its end.
    pub(super) since_ns: u64,
    received_low: u32,
    sent_low: u32,
    received_high: u16,
    sent_high: u16,
    pub(super) retransmitted: u32,
    /// Row of its direction's port table.
    pub(super) port: u16,
    /// Row of the cross table, or [`NO_ROW`].
    pub(super) cross: u16,
    pub(super) flags: Flags,
    pub(super) country: Country,
    /// Walk in which it was last touched.
    pub(super) epoch: u8,
}

const _: () = assert!(size_of::<Entry>() == 64 && align_of::<Entry>() == 64);

impl Entry {
    const FREE: Self = Self {
        id: 0,
        cookie: 0,
        key: Key {
            a: 0,
            b: 0,
            netns: 0,
        },
        since_ns: 0,
        received_low: 0,
        sent_low: 0,
        received_high: 0,
        sent_high: 0,
        retransmitted: 0,
        port: 0,
        cross: NO_ROW,
        flags: Flags(0),
        country: Country::UNKNOWN,
        epoch: 0,
    };

    pub(super) fn key(&self) -> Key {
        self.key
    }

    pub(super) fn is_used(&self) -> bool {
        self.flags.has(Flags::USED)
    }

    /// An active open that has not completed; in no count and no gauge.
    pub(super) fn is_pending(&self) -> bool {
        self.state() == SYN_SENT
    }

    /// Whether no kernel address is known of it yet.
    pub(super) fn is_unbound(&self) -> bool {
        self.id == 0
    }

    /// Its cookie, 0 where it is not known.
    pub(super) fn cookie(&self) -> Cookie {
        if self.cookie & WALK_ONLY == 0 {
            self.cookie
        } else {
            0
        }
    }

    /// The cookie that an event told for a new entry, or 0.
    pub(super) fn set_cookie(&mut self, cookie: Cookie) {
        self.cookie = cookie;
    }

    /// Takes from a row what tells its socket from others, unless that is
    /// known better.
    pub(super) fn learn_identity(&mut self, identity: Cookie) {
        let inode_known = self.cookie & WALK_ONLY != 0 && self.cookie as u32 != 0;
        let known = self.cookie() != 0 || inode_known && identity & WALK_ONLY != 0;
        if identity != 0 && !known {
            self.cookie = identity;
            self.flags.set(Flags::ROW_COOKIE);
        }
    }

    /// The walk is over, and with it what only held for it.
    pub(super) fn forget_identity(&mut self) {
        self.cookie = self.cookie();
    }

    /// Whether both cookies are known and differ: then it is another socket.
    /// The same for what stands for a cookie within a walk.
    pub(super) fn contradicts(&self, cookie: Cookie) -> bool {
        if self.cookie == 0 || cookie == 0 || self.cookie == cookie {
            return false;
        }
        match (self.cookie & WALK_ONLY != 0, cookie & WALK_ONLY != 0) {
            (false, false) => true,
            (true, true) => {
                let inodes = (self.cookie as u32, cookie as u32);
                let elsewhere = self.cookie >> 32 != cookie >> 32;
                elsewhere || inodes.0 != 0 && inodes.1 != 0 && inodes.0 != inodes.1
            }
            _ => false,
        }
    }

    pub(super) fn direction(&self) -> Direction {
        match self.flags.0 >> 10 & 3 {
            0 => Direction::Inbound,
            1 => Direction::Outbound,
            _ => Direction::Unknown,
        }
    }

    pub(super) fn set_direction(&mut self, direction: Direction) {
        self.flags.0 = self.flags.0 & !(3 << 10) | u16::from(direction as u8) << 10;
    }

    pub(super) fn state(&self) -> u8 {
        (self.flags.0 >> 12) as u8
    }

    pub(super) fn set_state(&mut self, state: u8) {
        self.flags.0 = self.flags.0 & 0x0fff | u16::from(state) << 12;
    }

    /// Moves the baseline of received bytes to `now` and returns how far it
    /// moved: modulo 2^48, and 0 where it went back (the kernel's counter was
    /// reset).
    pub(super) fn advance_received(&mut self, now: u64) -> u64 {
        let before = u64::from(self.received_high) << 32 | u64::from(self.received_low);
        self.received_low = now as u32;
        self.received_high = (now >> 32) as u16;
        forward(before, now)
    }

    /// As [`Entry::advance_received`], for sent bytes.
    pub(super) fn advance_sent(&mut self, now: u64) -> u64 {
        let before = u64::from(self.sent_high) << 32 | u64::from(self.sent_low);
        self.sent_low = now as u32;
        self.sent_high = (now >> 32) as u16;
        forward(before, now)
    }

    /// As [`Entry::advance_received`], for retransmitted segments.
    pub(super) fn advance_retransmitted(&mut self, now: u32) -> u64 {
        let moved = now.wrapping_sub(self.retransmitted);
        self.retransmitted = now;
        if moved >> 31 == 0 { moved.into() } else { 0 }
    }
}

fn forward(before: u64, now: u64) -> u64 {
    let moved = now.wrapping_sub(before) & LOW_48;
    if moved >> 47 == 0 { moved } else { 0 }
}

/// The table.
#[derive(Debug)]
pub(super) struct Table {
    chunks: Slab,
    by_id: HashTable<Slot>,
    by_key: HashTable<Slot>,
    hasher: Hasher,
    /// First free slot of a list linked through `since_ns`; `Slot::MAX` ends it.
    free: Slot,
    used: usize,
    capacity: usize,
    /// Entries that are pending, at most `pending_max`.
    pending: usize,
    pending_max: usize,
}

#[derive(Debug, Default)]
struct Slab(Vec<Box<[Entry]>>);

impl std::ops::Index<Slot> for Slab {
    type Output = Entry;

    fn index(&self, slot: Slot) -> &Entry {
        &self.0[slot as usize / CHUNK][slot as usize % CHUNK]
    }
}

impl std::ops::IndexMut<Slot> for Slab {
    fn index_mut(&mut self, slot: Slot) -> &mut Entry {
        &mut self.0[slot as usize / CHUNK][slot as usize % CHUNK]
    }
}

impl Table {
    /// An empty table that will hold at most `capacity` entries, pending ones
    /// included, of which an eighth may be pending (one at least): connects
    /// that nobody answers do not take the places of connections.
    pub(super) fn new(capacity: usize, hasher: Hasher) -> Self {
        Self {
            chunks: Slab::default(),
            by_id: HashTable::new(),
            by_key: HashTable::new(),
            hasher,
            free: Slot::MAX,
            used: 0,
            pending: 0,
            pending_max: (capacity / 8).max(1),
            capacity: capacity.min(Slot::MAX as usize - CHUNK),
        }
    }

    pub(super) fn hasher(&self) -> &Hasher {
        &self.hasher
    }

    pub(super) fn is_full(&self) -> bool {
        self.used >= self.capacity
    }

    /// One past the highest slot ever used, for scans.
    pub(super) fn end(&self) -> Slot {
        (self.chunks.0.len() * CHUNK) as Slot
    }

    pub(super) fn entry(&self, slot: Slot) -> &Entry {
        &self.chunks[slot]
    }

    pub(super) fn entry_mut(&mut self, slot: Slot) -> &mut Entry {
        &mut self.chunks[slot]
    }

    /// The entry of a kernel address.
    pub(super) fn find_id(&self, id: SocketId) -> Option<Slot> {
        let chunks = &self.chunks;
        self.by_id
            .find(self.hasher.hash_id(id), |&slot| chunks[slot].id == id)
            .copied()
    }

    /// The entry that a row is of, by what tells its socket from others
    /// (cookie or [`walk_identity`]), and whether no other has these endpoints.
    ///
    /// That with the same kernel address or identity, else one that does not
    /// contradict them. Of several, those come last whose state differs in
    /// being ESTABLISHED, so that no state is corrected that was right; then
    /// suspects; then those that `epoch` stamped already, so that each row
    /// takes another. The last two change places where no cookie remains when
    /// the walk is over: a stamped one needs no row.
    pub(super) fn find_row(
        &self,
        key: &Key,
        id: SocketId,
        identity: Cookie,
        epoch: u8,
        established: bool,
    ) -> Option<(Slot, bool)> {
        let mut best: Option<(u8, Slot)> = None;
        let mut count = 0;
        for &slot in self.by_key.iter_hash(self.hasher.hash_key(key)) {
            let entry = &self.chunks[slot];
            if !entry.key.matches(key) {
                continue;
            }
            count += 1;
            let same_id = id != 0 && entry.id == id;
            let other_id = id != 0 && entry.id != 0 && !same_id;
            if other_id || entry.contradicts(identity) {
                continue;
            }
            let unlike = !same_id && (identity == 0 || entry.cookie != identity);
            let lasting = identity & WALK_ONLY == 0;
            // An event since is newer than the row, and takes nothing from it.
            let newer = entry.epoch == epoch && entry.flags.has(Flags::BY_EVENT);
            let unlike_state = (lasting || !newer) && (entry.state() == ESTABLISHED) != established;
            let suspect = u8::from(entry.flags.has(Flags::SUSPECT));
            let stamped = u8::from(entry.epoch == epoch);
            let rank = u8::from(unlike) << 3
                | u8::from(unlike_state) << 2
                | if lasting {
                    suspect << 1 | stamped
                } else {
                    stamped << 1 | suspect
                };
            if best.is_none_or(|(least, _)| rank < least) {
                best = Some((rank, slot));
            }
        }
        best.map(|(_, slot)| (slot, count == 1))
    }

    /// An event tells the cookie of the socket at `slot`. Where a row gave it
    /// to another entry with the same endpoints, the two exchange theirs; what
    /// a row counted goes along if the other one is known by that row alone.
    pub(super) fn learn_cookie(&mut self, slot: Slot, cookie: Cookie) {
        let entry = &self.chunks[slot];
        if cookie != 0 && entry.cookie != cookie {
            let key = entry.key;
            let same = self.by_key.iter_hash(self.hasher.hash_key(&key));
            let other = same.copied().find(|&other| {
                let entry = &self.chunks[other];
                other != slot && entry.cookie == cookie && entry.key.matches(&key)
            });
            if let Some(other) = other {
                self.exchange(slot, other);
            }
            self.chunks[slot].cookie = cookie;
        }
        if cookie != 0 {
            self.chunks[slot].flags.clear(Flags::ROW_COOKIE);
        }
    }

    /// Two entries with the same endpoints exchange their cookies.
    fn exchange(&mut self, slot: Slot, other: Slot) {
        const COUNTED: [Flags; 2] = [Flags::BASELINE, Flags::RTT];
        let (mut one, mut two) = (self.chunks[slot], self.chunks[other]);
        std::mem::swap(&mut one.cookie, &mut two.cookie);
        two.flags.set(Flags::ROW_COOKIE);
        if two.id == 0 {
            std::mem::swap(&mut one.received_low, &mut two.received_low);
            std::mem::swap(&mut one.received_high, &mut two.received_high);
            std::mem::swap(&mut one.sent_low, &mut two.sent_low);
            std::mem::swap(&mut one.sent_high, &mut two.sent_high);
            std::mem::swap(&mut one.retransmitted, &mut two.retransmitted);
            for flag in COUNTED {
                let (had_one, had_two) = (one.flags.has(flag), two.flags.has(flag));
                one.flags.put(flag, had_two);
                two.flags.put(flag, had_one);
            }
        }
        (self.chunks[slot], self.chunks[other]) = (one, two);
    }

    /// The entry that a socket under an unknown kernel address can be: one
    /// with its endpoints that no event has named and whose cookie does not
    /// contradict, or one with its very cookie, then named wrongly. Of several
    /// one that is in ESTABLISHED or not as the event's old state.
    pub(super) fn find_adoptable(&self, key: &Key, cookie: Cookie, old: u8) -> Option<Slot> {
        let mut found: Option<Slot> = None;
        for &slot in self.by_key.iter_hash(self.hasher.hash_key(key)) {
            let entry = &self.chunks[slot];
            if !entry.key.matches(key) {
                continue;
            }
            if cookie != 0 && entry.cookie == cookie {
                return Some(slot);
            }
            if entry.id == 0 && !entry.contradicts(cookie) {
                let like = (entry.state() == ESTABLISHED) == (old == ESTABLISHED);
                if like || found.is_none() {
                    found = Some(slot);
                }
            }
        }
        found
    }

    /// A socket opens with these endpoints: entries that have them too are
    /// suspect from now on.
    pub(super) fn suspect_twins(&mut self, key: &Key) {
        for &slot in self.by_key.iter_hash(self.hasher.hash_key(key)) {
            let entry = &mut self.chunks[slot];
            if entry.key.matches(key) {
                entry.flags.set(Flags::SUSPECT);
            }
        }
    }

    /// Whether another entry has the endpoints of this one.
    pub(super) fn has_twin(&self, slot: Slot) -> bool {
        let key = self.chunks[slot].key;
        let mut same = self.by_key.iter_hash(self.hasher.hash_key(&key));
        same.any(|&other| other != slot && self.chunks[other].key.matches(&key))
    }

    /// A fresh entry in no index, or `None` at the cap.
    pub(super) fn allocate(&mut self) -> Option<Slot> {
        if self.is_full() {
            return None;
        }
        if self.free == Slot::MAX {
            self.grow();
        }
        let slot = self.free;
        let entry = &mut self.chunks[slot];
        self.free = entry.since_ns as Slot;
        *entry = Entry::FREE;
        entry.flags.set(Flags::USED);
        self.used += 1;
        Some(slot)
    }

    /// As [`Table::allocate`], for an active open that has yet to complete;
    /// `None` too where as many are pending as may be.
    pub(super) fn allocate_pending(&mut self) -> Option<Slot> {
        if self.pending >= self.pending_max {
            return None;
        }
        let slot = self.allocate()?;
        self.chunks[slot].set_state(SYN_SENT);
        self.pending += 1;
        Some(slot)
    }

    /// An active open completed: its entry is a connection's from now on, in
    /// the state that it enters next.
    pub(super) fn complete(&mut self, slot: Slot) {
        let entry = &mut self.chunks[slot];
        if entry.is_pending() {
            entry.set_state(0);
            self.pending -= 1;
        }
    }

    fn grow(&mut self) {
        let first = self.end();
        let mut chunk = vec![Entry::FREE; CHUNK].into_boxed_slice();
        for (entry, next) in chunk.iter_mut().zip(first + 1..) {
            entry.since_ns = next.into();
        }
        chunk[CHUNK - 1].since_ns = Slot::MAX.into();
        self.chunks.0.push(chunk);
        self.free = first;
    }

    /// Names an entry's kernel address (not 0, in no other entry).
    pub(super) fn bind_id(&mut self, slot: Slot, id: SocketId) {
        debug_assert!(id != 0 && self.entry(slot).id == 0 && self.find_id(id).is_none());
        self.chunks[slot].id = id;
        let (chunks, hasher) = (&self.chunks, &self.hasher);
        self.by_id.insert_unique(hasher.hash_id(id), slot, |&slot| {
            hasher.hash_id(chunks[slot].id)
        });
    }

    /// Takes from a row the kernel address of an entry that has none, unless
    /// another one has it: then the row is older.
    pub(super) fn learn_id(&mut self, slot: Slot, id: SocketId) {
        if id != 0 && self.entry(slot).is_unbound() && self.find_id(id).is_none() {
            self.bind_id(slot, id);
        }
    }

    /// Names an entry anew.
    pub(super) fn rebind_id(&mut self, slot: Slot, id: SocketId) {
        self.unbind_id(slot);
        self.bind_id(slot, id);
    }

    fn unbind_id(&mut self, slot: Slot) {
        let id = std::mem::take(&mut self.chunks[slot].id);
        if id != 0
            && let Ok(found) = self
                .by_id
                .find_entry(self.hasher.hash_id(id), |&other| other == slot)
        {
            found.remove();
        }
    }

    /// Gives a pending entry its remote key; it stays out of the key index.
    pub(super) fn set_remote_key(&mut self, slot: Slot, key: Key) {
        self.chunks[slot].key = key;
    }

    /// Gives an entry its endpoints and puts it in the key index.
    pub(super) fn bind_key(&mut self, slot: Slot, key: Key) {
        self.chunks[slot].key = key;
        let (chunks, hasher) = (&self.chunks, &self.hasher);
        self.by_key
            .insert_unique(hasher.hash_key(&key), slot, |&slot| {
                hasher.hash_key(&chunks[slot].key)
            });
    }

    /// Tells an entry its namespace, where it was unknown.
    pub(super) fn learn_netns(&mut self, slot: Slot, netns: u32) {
        let key = &mut self.chunks[slot].key;
        if key.netns == 0 {
            key.netns = netns;
        }
    }

    /// Takes an entry out of the table and both indexes.
    pub(super) fn remove(&mut self, slot: Slot) {
        self.unbind_id(slot);
        let entry = &self.chunks[slot];
        debug_assert!(entry.is_used());
        if entry.is_pending() {
            self.pending -= 1;
        } else if let Ok(found) = self
            .by_key
            .find_entry(self.hasher.hash_key(&entry.key), |&other| other == slot)
        {
            found.remove();
        }
        let entry = &mut self.chunks[slot];
        *entry = Entry::FREE;
        entry.since_ns = self.free.into();
        self.free = slot;
        self.used -= 1;
    }

    /// Bytes of heap in use.
    #[cfg(test)]
    pub(super) fn heap_bytes(&self) -> usize {
        self.chunks.0.len() * CHUNK * size_of::<Entry>()
            + self.by_id.allocation_size()
            + self.by_key.allocation_size()
    }
}

#[cfg(test)]
mod tests;

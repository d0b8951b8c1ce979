//! The connection table: a slab of 64-byte entries and two index tables over
//! it, one by the kernel's socket address, one by endpoints.
//!
//! Everything included a connection costs 64 bytes of slab and, at the load
//! factors of hashbrown, 5 to 11 bytes in each index.

use hashbrown::HashTable;

use super::dimension::NO_ROW;
use super::key::{Hasher, Key};
use super::snapshot::Direction;
use crate::event::{Cookie, SocketId, Tuple};
use crate::geo::Country;

/// Place of an entry in the slab.
pub(super) type Slot = u32;

/// Entries per slab chunk: 64 KiB, so that an idle agent stays small and
/// growing never copies.
const CHUNK: usize = 1024;

/// The low 48 bits of a byte counter.
const LOW_48: u64 = (1 << 48) - 1;

/// Facts about an entry, one bit each; its direction in bits 10 and 11, its
/// TCP state in bits 12 to 15.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Flags(u16);

impl Flags {
    /// An active open that has not completed; in no count and no gauge.
    pub(super) const PENDING: Self = Self(1);
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
    /// sockets of its namespace (`since_ns` holds its ports), or was met in
    /// an event before the startup walk came to it.
    pub(super) const UNDECIDED: Self = Self(1 << 7);
    /// A later open has the same endpoints under another kernel address, so
    /// its close was probably missed; rows are joined to it last.
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
    pub(super) cookie: Cookie,
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

    pub(super) fn is_pending(&self) -> bool {
        self.flags.has(Flags::PENDING)
    }

    /// Whether no event has named its kernel address yet.
    pub(super) fn is_unbound(&self) -> bool {
        self.id == 0
    }

    /// Whether both cookies are known and differ: then it is another socket.
    pub(super) fn contradicts(&self, cookie: Cookie) -> bool {
        self.cookie != 0 && cookie != 0 && self.cookie != cookie
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

    /// Keeps the ports of an undecided entry where a start time would be.
    pub(super) fn set_ports(&mut self, tuple: &Tuple) {
        self.since_ns = u64::from(tuple.local_port) << 16 | u64::from(tuple.remote_port);
    }

    /// Local and remote port of an undecided entry.
    pub(super) fn ports(&self) -> (u16, u16) {
        ((self.since_ns >> 16) as u16, self.since_ns as u16)
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
    /// By slot, which namespace of the walk under way showed the entry; grown
    /// only where stand-ins make that a question, two bytes a connection.
    sights: Vec<u16>,
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
            sights: Vec::new(),
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

    /// The entry with these endpoints that best fits `cookie`: one with the
    /// same cookie, else one that does not contradict it, a suspect last.
    /// With a `sight` other than 0, one that was marked with another is none.
    pub(super) fn find_key(&self, key: &Key, cookie: Cookie, sight: u16) -> Option<Slot> {
        let mut found = None;
        let mut suspect = None;
        for &slot in self.by_key.iter_hash(self.hasher.hash_key(key)) {
            let entry = &self.chunks[slot];
            if !entry.key.matches(key)
                || entry.contradicts(cookie)
                || self.is_sighted_elsewhere(slot, sight)
            {
                continue;
            }
            if cookie != 0 && entry.cookie == cookie {
                return Some(slot);
            }
            if entry.flags.has(Flags::SUSPECT) {
                suspect.get_or_insert(slot);
            } else {
                found.get_or_insert(slot);
            }
        }
        found.or(suspect)
    }

    fn is_sighted_elsewhere(&self, slot: Slot, sight: u16) -> bool {
        let marked = self.sights.get(slot as usize).copied().unwrap_or(0);
        sight != 0 && marked != 0 && marked != sight
    }

    /// Notes which namespace of the walk under way showed an entry; 0 none.
    pub(super) fn mark_sighted(&mut self, slot: Slot, sight: u16) {
        if sight == 0 {
            return;
        }
        if self.sights.len() <= slot as usize {
            self.sights.resize(self.end() as usize, 0);
        }
        self.sights[slot as usize] = sight;
    }

    /// A walk begins or is over.
    pub(super) fn forget_sights(&mut self) {
        self.sights = Vec::new();
    }

    /// The entry that a socket under an unknown kernel address can be: one
    /// with its endpoints that no event has named and whose cookie does not
    /// contradict, or one with its very cookie, then named wrongly.
    pub(super) fn find_adoptable(&self, key: &Key, cookie: Cookie) -> Option<Slot> {
        let mut found = None;
        for &slot in self.by_key.iter_hash(self.hasher.hash_key(key)) {
            let entry = &self.chunks[slot];
            if !entry.key.matches(key) {
                continue;
            }
            if cookie != 0 && entry.cookie == cookie {
                return Some(slot);
            }
            if entry.is_unbound() && !entry.contradicts(cookie) {
                found.get_or_insert(slot);
            }
        }
        found
    }

    /// A socket opens with these endpoints: the entry that no event has named
    /// and that it must have replaced, whatever its cookie. Others with these
    /// endpoints are suspect from now on; not gone, since with VRFs or bound
    /// devices two sockets can have the same endpoints.
    pub(super) fn replaced_by_open(&mut self, key: &Key) -> Option<Slot> {
        let mut replaced = None;
        for &slot in self.by_key.iter_hash(self.hasher.hash_key(key)) {
            let entry = &mut self.chunks[slot];
            if entry.key.matches(key) {
                if entry.is_unbound() {
                    replaced = Some(slot);
                }
                entry.flags.set(Flags::SUSPECT);
            }
        }
        replaced
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
        if let Some(sight) = self.sights.get_mut(slot as usize) {
            *sight = 0;
        }
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
        self.chunks[slot].flags.set(Flags::PENDING);
        self.pending += 1;
        Some(slot)
    }

    /// An active open completed: its entry is a connection's from now on.
    pub(super) fn complete(&mut self, slot: Slot) {
        let entry = &mut self.chunks[slot];
        if entry.is_pending() {
            entry.flags.clear(Flags::PENDING);
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
mod tests {
    use super::*;

    fn key(b: u32) -> Key {
        Key { a: 1, b, netns: 1 }
    }

    fn table(capacity: usize) -> Table {
        Table::new(capacity, Hasher::new(&[3; 16]))
    }

    #[test]
    fn slots_come_back_and_indexes_follow() {
        let mut table = table(3000);
        let mut slots = Vec::new();
        for n in 0..3000u32 {
            let slot = table.allocate().unwrap();
            table.bind_id(slot, u64::from(n) + 1);
            table.bind_key(slot, key(n));
            slots.push(slot);
        }
        assert!(table.is_full() && table.allocate().is_none());
        for (n, &slot) in (0u32..).zip(&slots) {
            assert_eq!(table.find_id(u64::from(n) + 1), Some(slot));
            assert_eq!(table.find_key(&key(n), 0, 0), Some(slot));
        }
        for &slot in &slots {
            table.remove(slot);
        }
        assert_eq!(table.find_id(1), None);
        assert_eq!(table.find_key(&key(0), 0, 0), None);
        assert!(table.allocate().is_some());
    }

    #[test]
    fn the_same_cookie_beats_no_cookie_and_another_cookie_is_another_socket() {
        let mut table = table(10);
        let [none, seven] = [0, 7].map(|cookie| {
            let slot = table.allocate().unwrap();
            table.entry_mut(slot).cookie = cookie;
            table.bind_key(slot, key(5));
            slot
        });
        assert_eq!(table.find_key(&key(5), 7, 0), Some(seven));
        assert_eq!(table.find_key(&key(5), 8, 0), Some(none));
        table.bind_id(none, 99);
        assert_eq!(table.find_adoptable(&key(5), 8), None);
        assert_eq!(table.find_adoptable(&key(5), 0), Some(seven));
        table.rebind_id(none, 98);
        assert_eq!((table.find_id(99), table.find_id(98)), (None, Some(none)));
    }

    #[test]
    fn a_later_open_makes_suspects_and_rows_go_to_it_first() {
        let mut table = table(10);
        let stale = table.allocate().unwrap();
        table.bind_id(stale, 1);
        table.bind_key(stale, key(5));
        assert_eq!(table.replaced_by_open(&key(5)), None);
        let newer = table.allocate().unwrap();
        table.bind_id(newer, 2);
        table.bind_key(newer, key(5));
        assert_eq!(table.find_key(&key(5), 7, 0), Some(newer));
        table.remove(newer);
        assert_eq!(table.find_key(&key(5), 7, 0), Some(stale));
    }

    #[test]
    fn baselines_wrap_and_resets_count_nothing() {
        let mut entry = Entry::FREE;
        assert_eq!(
            entry.advance_received((1 << 48) - 10),
            0,
            "more than half way round is back"
        );
        assert_eq!(entry.advance_received((1 << 48) + 5), 15);
        assert_eq!(entry.advance_received(1000), 995);
        assert_eq!(entry.advance_received(10), 0);
        assert_eq!(entry.advance_received(30), 20);
        assert_eq!(entry.advance_sent(7), 7);
        assert_eq!(entry.advance_retransmitted(u32::MAX), 0);
        assert_eq!(entry.advance_retransmitted(4), 5);
        assert_eq!(entry.advance_retransmitted(3), 0);
    }

    #[test]
    fn state_and_direction_share_a_byte() {
        let mut entry = Entry::FREE;
        for direction in Direction::ALL {
            for state in 1..=12 {
                entry.set_direction(direction);
                entry.set_state(state);
                assert_eq!((entry.direction(), entry.state()), (direction, state));
            }
        }
    }

    #[test]
    fn a_million_connections_cost_at_most_ninety_bytes_each() {
        let mut table = table(1 << 20);
        for n in 0..1_000_000u32 {
            let slot = table.allocate().unwrap();
            table.bind_id(slot, u64::from(n) * 2048 + 0xffff_8880_0000_0000);
            table.bind_key(slot, key(n));
        }
        let each = table.heap_bytes() as f64 / 1e6;
        println!("{each:.1} bytes per connection at 1,000,000");
        assert!(each <= 90.0, "{each}");
    }
}

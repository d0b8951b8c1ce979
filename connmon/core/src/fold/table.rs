//! The connection table: a slab of 64-byte entries and two indexes over it,
//! one by the kernel's socket address, one by endpoints.
//!
//! A connection costs 64 bytes of slab and, at the load factors of hashbrown,
//! 5 to 11 bytes in each index.

use connmon_common::state::{ESTABLISHED, SYN_SENT};
use hashbrown::HashTable;

use super::entry::{Entry, Flags, is_walk_identity};
use super::key::{Hasher, Key};
use crate::event::{Cookie, SocketId};

/// Index of an entry in the slab.
pub(super) type Slot = u32;

/// Entries per slab chunk: 64 KiB, so that an idle agent stays small and
/// growing never copies.
const CHUNK: usize = 1024;

/// The table.
#[derive(Debug)]
pub(super) struct Table {
    slab: Slab,
    by_id: HashTable<Slot>,
    by_key: HashTable<Slot>,
    hasher: Hasher,
    free: Vec<Slot>,
    capacity: usize,
    /// Pending entries, at most `pending_max`.
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
    /// An empty table of at most `capacity` entries. At most an eighth of them
    /// (but one at least) are pending, so that connects without an answer do
    /// not displace connections.
    pub(super) fn new(capacity: usize, hasher: Hasher) -> Self {
        Self {
            slab: Slab::default(),
            by_id: HashTable::new(),
            by_key: HashTable::new(),
            hasher,
            free: Vec::new(),
            pending: 0,
            pending_max: (capacity / 8).max(1),
            capacity: capacity.min(Slot::MAX as usize - CHUNK),
        }
    }

    pub(super) fn hasher(&self) -> &Hasher {
        &self.hasher
    }

    /// One past the highest slot ever used.
    pub(super) fn end(&self) -> Slot {
        (self.slab.0.len() * CHUNK) as Slot
    }

    pub(super) fn entry(&self, slot: Slot) -> &Entry {
        &self.slab[slot]
    }

    pub(super) fn entry_mut(&mut self, slot: Slot) -> &mut Entry {
        &mut self.slab[slot]
    }

    /// The entry with this kernel address.
    pub(super) fn find_id(&self, id: SocketId) -> Option<Slot> {
        let slab = &self.slab;
        self.by_id
            .find(self.hasher.hash_id(id), |&slot| slab[slot].id == id)
            .copied()
    }

    /// The entries with these endpoints.
    fn with_key(&self, key: &Key) -> impl Iterator<Item = (Slot, &Entry)> {
        self.by_key
            .iter_hash(self.hasher.hash_key(key))
            .map(|&slot| (slot, &self.slab[slot]))
            .filter(|(_, entry)| entry.key.matches(key))
    }

    /// The entry of a row, and whether no other has its endpoints. `identity`
    /// is the row's cookie or walk identity.
    ///
    /// Entries with another kernel address or identity are left out. The rest
    /// rank in this order: the same address or identity; the same answer to
    /// "is it ESTABLISHED?", so that no correct state is changed; not reopened;
    /// not matched in this walk, so that each row gets an entry of its own.
    /// With `prefer_unmatched`, or where no cookie outlasts the walk, the last
    /// two change places, since a matched entry needs no row.
    pub(super) fn find_row(
        &self,
        key: &Key,
        id: SocketId,
        identity: Cookie,
        epoch: u8,
        established: bool,
        prefer_unmatched: bool,
    ) -> Option<(Slot, bool)> {
        let mut best: Option<(u8, Slot)> = None;
        let mut count = 0;
        for (slot, entry) in self.with_key(key) {
            count += 1;
            let same_id = id != 0 && entry.id == id;
            let other_id = id != 0 && entry.id != 0 && !same_id;
            if other_id || entry.contradicts(identity) {
                continue;
            }
            let unlike = !same_id && (identity == 0 || entry.identity != identity);
            let lasting = !is_walk_identity(identity);
            let matched = entry.epoch == epoch;
            // An entry newer than the row keeps its state.
            let newer = matched && entry.flags.contains(Flags::BY_EVENT);
            let unlike_state = (lasting || !newer) && (entry.state() == ESTABLISHED) != established;
            let reopened = entry.flags.contains(Flags::REOPENED);
            let (third, fourth) = if prefer_unmatched || !lasting {
                (matched, reopened)
            } else {
                (reopened, matched)
            };
            let rank = u8::from(unlike) << 3
                | u8::from(unlike_state) << 2
                | u8::from(third) << 1
                | u8::from(fourth);
            if best.is_none_or(|(least, _)| rank < least) {
                best = Some((rank, slot));
            }
        }
        best.map(|(_, slot)| (slot, count == 1))
    }

    /// An event shows the cookie of the socket at `slot`, 0 if it has none yet.
    /// If a row gave this entry the cookie of another socket with the same
    /// endpoints, that one's entry gets it, with what the row showed: the entry
    /// that has this cookie, else one without any.
    pub(super) fn learn_cookie(&mut self, slot: Slot, cookie: Cookie, epoch: u8) {
        let entry = &self.slab[slot];
        let foreign = entry.identity != cookie
            && entry.cookie() != 0
            && entry.flags.contains(Flags::ROW_COOKIE);
        if entry.identity != cookie && (cookie != 0 || foreign) {
            let mut owner = None;
            for (other, candidate) in self
                .with_key(&entry.key)
                .filter(|&(other, _)| other != slot)
            {
                if cookie != 0 && candidate.identity == cookie {
                    owner = Some(other);
                    break;
                }
                if foreign && candidate.cookie() == 0 {
                    owner = Some(other);
                }
            }
            if let Some(other) = owner {
                let (mut one, mut two) = (self.slab[slot], self.slab[other]);
                one.exchange_cookies(&mut two, cookie, epoch);
                (self.slab[slot], self.slab[other]) = (one, two);
            }
        }
        if cookie != 0 {
            let entry = &mut self.slab[slot];
            entry.identity = cookie;
            entry.flags.remove(Flags::ROW_COOKIE);
        }
    }

    /// The entry of a socket whose kernel address is unknown: one with its
    /// cookie, else one with its endpoints that has no address yet and no other
    /// cookie, if possible one that is in ESTABLISHED as `old` is, or not.
    pub(super) fn find_unnamed(&self, key: &Key, cookie: Cookie, old: u8) -> Option<Slot> {
        let mut found: Option<Slot> = None;
        for (slot, entry) in self.with_key(key) {
            if cookie != 0 && entry.identity == cookie {
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

    /// A socket opens with these endpoints: marks the entries that have them.
    pub(super) fn mark_reopened(&mut self, key: &Key) {
        for &slot in self.by_key.iter_hash(self.hasher.hash_key(key)) {
            let entry = &mut self.slab[slot];
            if entry.key.matches(key) {
                entry.flags.insert(Flags::REOPENED);
            }
        }
    }

    /// Adds an entry, named unless `id` is 0. `None` if the table is full.
    pub(super) fn insert(&mut self, id: SocketId, key: Key) -> Option<Slot> {
        let slot = self.allocate(id)?;
        self.bind_key(slot, key);
        Some(slot)
    }

    /// Adds an active open that has yet to complete. It is in no index by
    /// endpoints. `None` if the table is full, or too many are pending.
    pub(super) fn insert_pending(&mut self, id: SocketId, remote: Key) -> Option<Slot> {
        if self.pending >= self.pending_max {
            return None;
        }
        let slot = self.allocate(id)?;
        let entry = &mut self.slab[slot];
        entry.key = remote;
        entry.set_state(SYN_SENT);
        self.pending += 1;
        Some(slot)
    }

    /// A pending active open completed.
    pub(super) fn complete(&mut self, slot: Slot, key: Key) {
        debug_assert!(self.slab[slot].is_pending());
        self.slab[slot].set_state(0);
        self.pending -= 1;
        self.bind_key(slot, key);
    }

    fn allocate(&mut self, id: SocketId) -> Option<Slot> {
        if self.end() as usize - self.free.len() >= self.capacity {
            return None;
        }
        if self.free.is_empty() {
            let first = self.end();
            self.slab.0.push(vec![Entry::FREE; CHUNK].into());
            self.free.extend((first..self.end()).rev());
        }
        let slot = self.free.pop()?;
        self.slab[slot].flags.insert(Flags::USED);
        if id != 0 {
            self.bind_id(slot, id);
        }
        Some(slot)
    }

    /// Names an entry; no other has this kernel address.
    fn bind_id(&mut self, slot: Slot, id: SocketId) {
        debug_assert!(id != 0 && self.entry(slot).id == 0 && self.find_id(id).is_none());
        self.slab[slot].id = id;
        let (slab, hasher) = (&self.slab, &self.hasher);
        self.by_id.insert_unique(hasher.hash_id(id), slot, |&slot| {
            hasher.hash_id(slab[slot].id)
        });
    }

    /// Takes the kernel address of a row, unless the entry has one, or another
    /// has this one: then the row is older.
    pub(super) fn learn_id(&mut self, slot: Slot, id: SocketId) {
        if id != 0 && self.entry(slot).id == 0 && self.find_id(id).is_none() {
            self.bind_id(slot, id);
        }
    }

    /// Gives an entry another kernel address.
    pub(super) fn rebind_id(&mut self, slot: Slot, id: SocketId) {
        self.unbind_id(slot);
        self.bind_id(slot, id);
    }

    fn unbind_id(&mut self, slot: Slot) {
        let id = std::mem::take(&mut self.slab[slot].id);
        if id != 0 {
            unlink(&mut self.by_id, self.hasher.hash_id(id), slot);
        }
    }

    fn bind_key(&mut self, slot: Slot, key: Key) {
        self.slab[slot].key = key;
        let (slab, hasher) = (&self.slab, &self.hasher);
        self.by_key
            .insert_unique(hasher.hash_key(&key), slot, |&slot| {
                hasher.hash_key(&slab[slot].key)
            });
    }

    /// Sets the namespace of an entry, if it is unknown.
    pub(super) fn learn_netns(&mut self, slot: Slot, netns: u32) {
        let key = &mut self.slab[slot].key;
        if key.netns == 0 {
            key.netns = netns;
        }
    }

    /// Removes an entry from the slab and both indexes.
    pub(super) fn remove(&mut self, slot: Slot) {
        self.unbind_id(slot);
        let entry = &mut self.slab[slot];
        debug_assert!(entry.flags.contains(Flags::USED));
        if entry.is_pending() {
            self.pending -= 1;
        } else {
            unlink(&mut self.by_key, self.hasher.hash_key(&entry.key), slot);
        }
        *entry = Entry::FREE;
        self.free.push(slot);
    }

    /// Bytes of heap in use.
    #[cfg(test)]
    pub(super) fn heap_bytes(&self) -> usize {
        self.slab.0.len() * CHUNK * size_of::<Entry>()
            + self.by_id.allocation_size()
            + self.by_key.allocation_size()
            + self.free.capacity() * size_of::<Slot>()
    }
}

fn unlink(index: &mut HashTable<Slot>, hash: u64, slot: Slot) {
    if let Ok(found) = index.find_entry(hash, |&other| other == slot) {
        found.remove();
    }
}

#[cfg(test)]
mod tests;

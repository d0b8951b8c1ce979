//! What each event changes in the table and the counters.

use connmon_common::state::{CLOSE, ESTABLISHED, LISTEN, SYN_RECV, SYN_SENT};

use super::Fold;
use super::counters::Labels;
use super::entry::Flags;
use super::failures::is_unwritten;
use super::key::Key;
use super::snapshot::Direction;
use super::table::Slot;
use crate::event::{Event, SYN_BYTES, Socket, SocketId, Traffic, Tuple};
use crate::geo::{Country, Locate};

/// Whether a socket in this state has completed its handshake.
pub(super) fn is_open_state(state: u8) -> bool {
    !matches!(state, SYN_SENT | SYN_RECV | CLOSE | LISTEN)
}

/// The country of a connection: `loopback` if both ends have the same address,
/// else that of the remote address.
pub fn country_of(tuple: &Tuple, geo: &mut impl Locate) -> Country {
    if tuple.local == tuple.remote {
        Country::LOOPBACK
    } else {
        geo.country(tuple.remote)
    }
}

/// The entry of an event's socket.
enum Own {
    None,
    Pending(Slot),
    Open(Slot),
}

impl Fold {
    /// Folds one event. `now_ns` is CLOCK_MONOTONIC at the time of folding;
    /// durations use the event's own times.
    pub fn apply(&mut self, now_ns: u64, event: &Event, geo: &mut impl Locate) {
        self.counters.now_ns = now_ns;
        self.totals.folded += 1;
        match *event {
            Event::Connect {
                socket,
                at_ns,
                ref tuple,
                ..
            } => self.connect(socket, at_ns, tuple),
            Event::ConnectSent { id, at_ns, .. } => self.connect_sent(id, at_ns),
            Event::Open {
                socket,
                at_ns,
                ref tuple,
                old,
                new,
            } => self.open(socket, at_ns, tuple, old, new, geo),
            Event::Restore { socket, ref tuple } => self.restore(socket, tuple, geo),
            Event::Change {
                socket,
                ref tuple,
                old,
                new,
            } => self.change(socket, tuple, old, new, geo),
            Event::Close {
                socket,
                at_ns,
                ref tuple,
                old,
                error,
                segments_out,
                shut_down,
                ref traffic,
            } => {
                if self.close(socket, at_ns, tuple, old, traffic.as_ref())
                    && !is_unwritten(error, segments_out, shut_down)
                {
                    let (country, port) = (country_of(tuple, geo), tuple.remote_port);
                    self.counters.failed(country, port, error, segments_out);
                }
            }
            Event::Listen {
                socket,
                address,
                port,
                ref owner,
            } => {
                self.listeners.listen(socket.netns, address, port, owner);
                self.listening_port(address, port);
            }
            Event::Unlisten {
                socket,
                address,
                port,
            } => self.listeners.unlisten(socket.netns, address, port),
            Event::Accept { id, at_ns, .. } => self.accept(id, at_ns),
        }
    }

    /// A socket gets a new connection, so an entry with its address is of one
    /// whose close was missed. False if a filter hides the new one.
    fn begin(&mut self, socket: &Socket, at_ns: u64, tuple: &Tuple) -> bool {
        self.early_accepts.take(socket.id);
        if let Some(slot) = self.table.find_id(socket.id) {
            self.close_missed(slot, at_ns);
        }
        self.filter.hides(tuple).is_none()
    }

    /// An active open begins. If there is no entry for it, its end is that of
    /// an unknown socket: an open or a failure, but without its latency.
    fn connect(&mut self, socket: Socket, at_ns: u64, tuple: &Tuple) {
        if !self.begin(&socket, at_ns, tuple) {
            return;
        }
        let key = self.table.hasher().remote_key(tuple, socket.netns);
        let Some(slot) = self.table.insert_pending(socket.id, key) else {
            self.totals.pending_overflow += 1;
            return;
        };
        let entry = self.table.entry_mut(slot);
        entry.identity = socket.cookie;
        entry.since_ns = at_ns;
        entry.set_direction(Direction::Outbound);
        self.touch(slot);
    }

    /// The handshake of a deferred connect() starts only now.
    fn connect_sent(&mut self, id: SocketId, at_ns: u64) {
        if let Some(slot) = self.table.find_id(id) {
            let entry = self.table.entry_mut(slot);
            if entry.is_pending() {
                entry.since_ns = at_ns;
                self.touch(slot);
            }
        }
    }

    /// A handshake ended.
    fn open(
        &mut self,
        socket: Socket,
        at_ns: u64,
        tuple: &Tuple,
        old: u8,
        new: u8,
        geo: &mut impl Locate,
    ) {
        let accepted = self.early_accepts.take(socket.id);
        let pending = match self.find_own(&socket, tuple, None, at_ns) {
            Own::Pending(slot) => Some(slot),
            _ => None,
        };
        if self.filter.hides(tuple).is_some() {
            if let Some(slot) = pending {
                self.table.remove(slot);
            }
            return;
        }
        let (direction, port) = if pending.is_some() || old == SYN_SENT {
            (Direction::Outbound, tuple.remote_port)
        } else {
            (Direction::Inbound, tuple.local_port)
        };
        let key = self.table.hasher().key(tuple, socket.netns);
        self.table.mark_reopened(&key);
        let country = country_of(tuple, geo);
        let labels = self.counters.labels(country, direction, port);
        self.counters.opened(labels);
        let early = accepted && direction == Direction::Inbound;
        if early {
            self.counters.accepted_after(labels, 0);
        }
        let slot = if let Some(slot) = pending {
            let latency = at_ns.saturating_sub(self.table.entry(slot).since_ns);
            self.counters.connected_after(country, latency);
            self.table.complete(slot, key);
            slot
        } else if let Some(slot) = self.table.insert(socket.id, key) {
            slot
        } else {
            self.totals.table_overflow += 1;
            self.totals.untracked += 1;
            return;
        };
        let entry = self.table.entry_mut(slot);
        entry.flags.insert(Flags::OPENED | Flags::BASELINE);
        if direction == Direction::Outbound {
            entry.baseline.advance_sent(SYN_BYTES);
        }
        if early {
            entry.flags.insert(Flags::ACCEPTED);
        }
        if socket.cookie != 0 {
            entry.identity = socket.cookie;
        }
        entry.since_ns = at_ns;
        self.track(slot, labels, new);
        self.touch(slot);
    }

    /// The entry of a socket, by its kernel address; closes another's entry
    /// with that address. With a `key` it may be that of an open connection.
    fn find_own(&mut self, socket: &Socket, tuple: &Tuple, key: Option<&Key>, at_ns: u64) -> Own {
        let Some(slot) = self.table.find_id(socket.id) else {
            return Own::None;
        };
        let entry = self.table.entry(slot);
        let same_cookie = !entry.contradicts(socket.cookie);
        if entry.is_pending() {
            let remote = self.table.hasher().remote_key(tuple, socket.netns);
            if same_cookie && entry.key.matches(&remote) {
                return Own::Pending(slot);
            }
        } else if let Some(key) = key
            // A row may have given it the cookie of another socket with the
            // same endpoints; `learn` corrects that.
            && (same_cookie || entry.flags.contains(Flags::ROW_COOKIE))
            && entry.key.matches(key)
        {
            return Own::Open(slot);
        }
        self.close_missed(slot, at_ns);
        Own::None
    }

    /// Counts an entry under these labels; it is open from now on, in `state`.
    pub(super) fn track(&mut self, slot: Slot, labels: Labels, state: u8) {
        let entry = self.table.entry_mut(slot);
        labels.store(entry);
        entry.set_state(state);
        self.totals.tracked += 1;
        self.counters.attach(labels, state == ESTABLISHED);
    }

    /// A connection moved between open states.
    fn change(&mut self, socket: Socket, tuple: &Tuple, old: u8, new: u8, geo: &mut impl Locate) {
        let key = self.table.hasher().key(tuple, socket.netns);
        let mut direction = Direction::Unknown;
        match self.find_own(&socket, tuple, Some(&key), self.counters.now_ns) {
            Own::Open(slot) => {
                if is_open_state(new) {
                    self.set_state(slot, new);
                }
                self.learn(slot, &socket);
                return;
            }
            Own::Pending(slot) => {
                // Its open was lost, but it was an active one.
                direction = Direction::Outbound;
                self.table.remove(slot);
            }
            Own::None => {}
        }
        if self.filter.hides(tuple).is_some() || !is_open_state(old) || !is_open_state(new) {
            return;
        }
        if let Some(slot) = self.table.find_unnamed(&key, socket.cookie, old) {
            self.table.rebind_id(slot, socket.id);
            self.set_state(slot, new);
            self.learn(slot, &socket);
        } else if self.totals.untracked == 0 {
            let seed = !self.started;
            self.add_live(socket, tuple, direction, new, seed, geo);
        }
        // Else it is taken for one of the untracked connections.
    }

    /// Adds a connection that is open already: a seed, which existed before
    /// the start or was restored, or one whose open was lost. A walk finds the
    /// direction of a seed.
    fn add_live(
        &mut self,
        socket: Socket,
        tuple: &Tuple,
        direction: Direction,
        state: u8,
        seed: bool,
        geo: &mut impl Locate,
    ) -> Option<Slot> {
        let key = self.table.hasher().key(tuple, socket.netns);
        let slot = self.table.insert(socket.id, key)?;
        let country = country_of(tuple, geo);
        let labels = if direction == Direction::Outbound {
            let port = tuple.remote_port;
            self.counters.labels(country, direction, port)
        } else if seed {
            self.table.entry_mut(slot).flags.insert(Flags::UNDECIDED);
            Labels::without_direction(country)
        } else {
            self.counters.labels(country, direction, 0)
        };
        if seed {
            self.totals.corrections.seeded += 1;
        } else {
            self.totals.corrections.added += 1;
        }
        self.track(slot, labels, state);
        self.learn(slot, &socket);
        Some(slot)
    }

    /// A connection that was opened on another host continues on this one.
    fn restore(&mut self, socket: Socket, tuple: &Tuple, geo: &mut impl Locate) {
        if !self.begin(&socket, self.counters.now_ns, tuple) {
            return;
        }
        let direction = Direction::Unknown;
        match self.add_live(socket, tuple, direction, ESTABLISHED, true, geo) {
            // The kernel's counters begin here.
            Some(slot) => self.table.entry_mut(slot).flags.insert(Flags::BASELINE),
            None => self.totals.untracked += 1,
        }
    }

    /// A socket reached CLOSE; true if that is a failed active open.
    ///
    /// The close of an unknown socket is that of an unnamed entry with the
    /// same endpoints, else of an untracked connection if there are any, else
    /// it is ignored: it never decrements anything.
    fn close(
        &mut self,
        socket: Socket,
        at_ns: u64,
        tuple: &Tuple,
        old: u8,
        traffic: Option<&Traffic>,
    ) -> bool {
        self.early_accepts.take(socket.id);
        let handshake = matches!(old, SYN_SENT | SYN_RECV);
        let key = self.table.hasher().key(tuple, socket.netns);
        match self.find_own(&socket, tuple, Some(&key).filter(|_| !handshake), at_ns) {
            Own::Open(slot) => {
                self.learn(slot, &socket);
                self.close_entry(slot, at_ns, traffic, true);
                return false;
            }
            Own::Pending(slot) => {
                self.table.remove(slot);
                if handshake {
                    return true;
                }
                // Its open was lost, or its close and the address is reused.
            }
            Own::None => {}
        }
        if old == SYN_RECV || self.filter.hides(tuple).is_some() {
            return false;
        }
        if old == SYN_SENT {
            // Its connect came before the probes were attached, or had no entry.
            return true;
        }
        if let Some(slot) = self.table.find_unnamed(&key, socket.cookie, old) {
            self.learn(slot, &socket);
            self.close_entry(slot, at_ns, traffic, true);
        } else {
            self.tombstones
                .close(self.table.hasher(), key, socket.cookie, at_ns);
            self.totals.untracked = self.totals.untracked.saturating_sub(1);
        }
        false
    }

    /// accept() returned a socket.
    fn accept(&mut self, id: SocketId, at_ns: u64) {
        let Some(slot) = self.table.find_id(id) else {
            self.early_accepts.keep(id);
            return;
        };
        let entry = self.table.entry_mut(slot);
        let waits = entry.flags.contains(Flags::OPENED)
            && !entry.flags.contains(Flags::ACCEPTED)
            && entry.direction() == Direction::Inbound;
        if waits {
            entry.flags.insert(Flags::ACCEPTED);
            let wait = at_ns.saturating_sub(entry.since_ns);
            self.counters.accepted_after(Labels::of(entry), wait);
        }
    }

    /// Closes an entry whose close was missed; removes it if it is pending.
    fn close_missed(&mut self, slot: Slot, at_ns: u64) {
        if self.table.entry(slot).is_pending() {
            self.table.remove(slot);
        } else {
            self.totals.missed_closes += 1;
            self.close_entry(slot, at_ns, None, false);
        }
    }

    /// Closes an entry. Its duration is observed if its open was seen and its
    /// close too (`seen`).
    pub(super) fn close_entry(
        &mut self,
        slot: Slot,
        at_ns: u64,
        traffic: Option<&Traffic>,
        seen: bool,
    ) {
        if let Some(traffic) = traffic {
            self.final_traffic(slot, traffic);
        }
        let entry = self.table.entry(slot);
        let labels = Labels::of(entry);
        if seen && entry.flags.contains(Flags::OPENED) {
            let duration = at_ns.saturating_sub(entry.since_ns);
            self.counters.duration[labels.direction as usize].observe(duration);
        }
        self.tombstones
            .close(self.table.hasher(), entry.key, entry.cookie(), at_ns);
        self.untrack(slot, true);
    }

    /// Removes an open entry from the gauges and the table.
    pub(super) fn untrack(&mut self, slot: Slot, closed: bool) {
        let entry = self.table.entry(slot);
        let established = entry.state() == ESTABLISHED;
        self.counters.detach(Labels::of(entry), established, closed);
        self.totals.tracked -= 1;
        self.table.remove(slot);
    }

    /// Sets the state of an entry; true if that is into or out of ESTABLISHED.
    pub(super) fn set_state(&mut self, slot: Slot, state: u8) -> bool {
        let entry = self.table.entry_mut(slot);
        let before = entry.state() == ESTABLISHED;
        entry.set_state(state);
        let established = state == ESTABLISHED;
        if before != established {
            let labels = Labels::of(entry);
            self.counters.set_established(labels, established);
        }
        before != established
    }

    /// Marks an entry as changed by an event, so that rows read before are
    /// older.
    fn touch(&mut self, slot: Slot) {
        let epoch = self.epoch;
        let entry = self.table.entry_mut(slot);
        entry.epoch = epoch;
        entry.flags.insert(Flags::BY_EVENT);
        entry.flags.remove(Flags::MISSED);
    }

    /// Takes from an event what the entry lacks.
    fn learn(&mut self, slot: Slot, socket: &Socket) {
        self.table.learn_netns(slot, socket.netns);
        self.table.learn_cookie(slot, socket.cookie, self.epoch);
        self.touch(slot);
    }
}

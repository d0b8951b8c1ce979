//! What each event does to the table and the books.

use connmon_common::state::{CLOSE, ESTABLISHED, LISTEN, SYN_RECV, SYN_SENT};

use crate::event::{Event, SYN_BYTES, Socket, SocketId, Traffic, Tuple};
use crate::geo::{Country, Locate};

use super::Fold;
use super::failures::is_unwritten;
use super::key::Key;
use super::ledger::{Ledger, Place};
use super::snapshot::Direction;
use super::table::{Flags, Slot};

/// Whether a socket in this state has completed its handshake.
pub(super) fn is_open_state(state: u8) -> bool {
    !matches!(state, SYN_SENT | SYN_RECV | CLOSE | LISTEN)
}

/// The country a connection counts in: `loopback` where both ends have the
/// same address, else what the locator says of the remote.
pub fn country_of(tuple: &Tuple, geo: &mut impl Locate) -> Country {
    if tuple.local == tuple.remote {
        Country::LOOPBACK
    } else {
        geo.country(tuple.remote)
    }
}

impl Fold {
    pub(super) fn event(&mut self, now_ns: u64, event: &Event, geo: &mut impl Locate) {
        match *event {
            Event::Connect {
                socket,
                at_ns,
                ref tuple,
                ..
            } => self.connect(now_ns, socket, at_ns, tuple),
            Event::ConnectSent { id, at_ns, .. } => self.connect_sent(id, at_ns),
            Event::Open {
                socket,
                at_ns,
                ref tuple,
                old,
                new,
            } => self.open(now_ns, socket, at_ns, tuple, old, new, geo),
            Event::Restore { socket, ref tuple } => self.restore(now_ns, socket, tuple, geo),
            Event::Change {
                socket,
                ref tuple,
                old,
                new,
            } => self.change(now_ns, socket, tuple, old, new, geo),
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
                if self.close(now_ns, socket, at_ns, tuple, old, traffic.as_ref())
                    && !is_unwritten(error, segments_out, shut_down)
                {
                    let country = country_of(tuple, geo);
                    self.ledger
                        .failed(now_ns, country, tuple.remote_port, error, segments_out);
                }
            }
            Event::Listen {
                socket,
                address,
                port,
                ref owner,
            } => self.listen(now_ns, socket.netns, address, port, owner),
            Event::Unlisten {
                socket,
                address,
                port,
            } => self.unlisten(socket.netns, address, port),
            Event::Accept { id, at_ns, .. } => self.accept(now_ns, id, at_ns),
        }
    }

    /// An active open begins. At the cap, or with as many pending as may be,
    /// it is not kept: its end is then that of an unknown socket, which still
    /// tells an open from a failure, but not how long it took.
    fn connect(&mut self, now_ns: u64, socket: Socket, at_ns: u64, tuple: &Tuple) {
        self.early_accepts.take(socket.id);
        if let Some(slot) = self.table.find_id(socket.id) {
            self.supersede(now_ns, slot, at_ns);
        }
        if self.filter.hides(tuple).is_some() {
            return;
        }
        let Some(slot) = self.table.allocate_pending() else {
            self.pending_overflow += 1;
            return;
        };
        let key = self.table.hasher().remote_key(tuple, socket.netns);
        self.table.bind_id(slot, socket.id);
        self.table.set_remote_key(slot, key);
        let entry = self.table.entry_mut(slot);
        entry.set_cookie(socket.cookie);
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
    #[expect(clippy::too_many_arguments, reason = "the event's own fields")]
    fn open(
        &mut self,
        now_ns: u64,
        socket: Socket,
        at_ns: u64,
        tuple: &Tuple,
        old: u8,
        new: u8,
        geo: &mut impl Locate,
    ) {
        let accepted = self.early_accepts.take(socket.id);
        let pending = self.table.find_id(socket.id).filter(|&slot| {
            let own = self.is_own_pending(slot, &socket, tuple);
            if !own {
                self.supersede(now_ns, slot, at_ns);
            }
            own
        });
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
        self.table.suspect_twins(&key);
        let country = country_of(tuple, geo);
        let place = self.ledger.place(now_ns, country, direction, port);
        self.ledger.opened(now_ns, place);
        if let Some(slot) = pending {
            let latency = at_ns.saturating_sub(self.table.entry(slot).since_ns);
            self.ledger.connected_after(now_ns, country, latency);
        }
        let early = accepted && direction == Direction::Inbound;
        if early {
            self.ledger.accepted_after(now_ns, place, 0);
        }
        let slot = match pending {
            Some(slot) => slot,
            None => {
                let Some(slot) = self.table.allocate() else {
                    self.table_overflow += 1;
                    self.untracked += 1;
                    return;
                };
                self.table.bind_id(slot, socket.id);
                slot
            }
        };
        self.table.complete(slot);
        self.table.bind_key(slot, key);
        let entry = self.table.entry_mut(slot);
        entry.flags.set(Flags::OPENED | Flags::BASELINE);
        if direction == Direction::Outbound {
            entry.advance_sent(SYN_BYTES);
        }
        if early {
            entry.flags.set(Flags::ACCEPTED);
        }
        if socket.cookie != 0 {
            entry.set_cookie(socket.cookie);
        }
        entry.since_ns = at_ns;
        self.settle_in(now_ns, slot, place, new);
        self.touch(slot);
    }

    /// Whether `slot` is the pending active open that this socket completes:
    /// SYN_SENT → open, or through SYN_RECV by a simultaneous open.
    fn is_own_pending(&self, slot: Slot, socket: &Socket, tuple: &Tuple) -> bool {
        let entry = self.table.entry(slot);
        let remote = self.table.hasher().remote_key(tuple, socket.netns);
        entry.is_pending() && entry.key().matches(&remote) && !entry.contradicts(socket.cookie)
    }

    /// Whether `slot`, found by this socket's kernel address, is its entry. A
    /// cookie that only a row told may be that of another socket with the same
    /// endpoints: [`Fold::learn`] puts it right.
    fn is_own(&self, slot: Slot, socket: &Socket, key: &Key) -> bool {
        let entry = self.table.entry(slot);
        let same_cookie = !entry.contradicts(socket.cookie) || entry.flags.has(Flags::ROW_COOKIE);
        entry.key().matches(key) && same_cookie
    }

    /// Takes up a place: the entry is open from now on, in `state`.
    pub(super) fn settle_in(&mut self, now_ns: u64, slot: Slot, place: Place, state: u8) {
        let entry = self.table.entry_mut(slot);
        entry.country = place.country;
        entry.set_direction(place.direction);
        entry.port = place.port;
        entry.cross = place.cross;
        entry.set_state(state);
        self.open += 1;
        self.ledger.attach(now_ns, place);
        if state == ESTABLISHED {
            self.ledger.entered_established(now_ns, place);
        }
    }

    /// A connection moved between open states.
    fn change(
        &mut self,
        now_ns: u64,
        socket: Socket,
        tuple: &Tuple,
        old: u8,
        new: u8,
        geo: &mut impl Locate,
    ) {
        let key = self.table.hasher().key(tuple, socket.netns);
        let mut direction = Direction::Unknown;
        if let Some(slot) = self.table.find_id(socket.id) {
            if self.table.entry(slot).is_pending() {
                // Its open was lost; that it was active is still known.
                if self.is_own_pending(slot, &socket, tuple) {
                    direction = Direction::Outbound;
                }
                self.table.remove(slot);
            } else if self.is_own(slot, &socket, &key) {
                if is_open_state(new) {
                    self.set_state(now_ns, slot, new);
                }
                self.learn(slot, &socket);
                return;
            } else {
                self.supersede(now_ns, slot, now_ns);
            }
        }
        if self.filter.hides(tuple).is_some() || !is_open_state(old) || !is_open_state(new) {
            return;
        }
        if let Some(slot) = self.table.find_adoptable(&key, socket.cookie, old) {
            self.table.rebind_id(slot, socket.id);
            self.set_state(now_ns, slot, new);
            self.learn(slot, &socket);
        } else {
            self.adopt(now_ns, socket, tuple, key, direction, new, geo);
        }
    }

    /// Takes in a live connection that nothing had told of: one that existed
    /// before start and that the startup walk has not come to (`seeded`), or
    /// one whose open was lost (`added`). With untracked connections about it
    /// is taken for one of them and left alone.
    #[expect(clippy::too_many_arguments, reason = "the event's own fields")]
    fn adopt(
        &mut self,
        now_ns: u64,
        socket: Socket,
        tuple: &Tuple,
        key: Key,
        direction: Direction,
        state: u8,
        geo: &mut impl Locate,
    ) {
        if self.untracked > 0 {
            return;
        }
        let Some(slot) = self.table.allocate() else {
            return;
        };
        self.table.bind_id(slot, socket.id);
        self.table.bind_key(slot, key);
        let country = country_of(tuple, geo);
        let place = match direction {
            Direction::Outbound => self
                .ledger
                .place(now_ns, country, direction, tuple.remote_port),
            _ if self.started => self.ledger.place(now_ns, country, direction, 0),
            _ => self.undecided_place(slot, country),
        };
        if self.started {
            self.corrections.added += 1;
        } else {
            self.corrections.seeded += 1;
        }
        self.settle_in(now_ns, slot, place, state);
        self.learn(slot, &socket);
    }

    /// A connection that was opened elsewhere goes on here. It is taken in as a
    /// seed, and the next audit finds its direction.
    fn restore(&mut self, now_ns: u64, socket: Socket, tuple: &Tuple, geo: &mut impl Locate) {
        if let Some(slot) = self.table.find_id(socket.id) {
            self.supersede(now_ns, slot, now_ns);
        }
        if self.filter.hides(tuple).is_some() {
            return;
        }
        let Some(slot) = self.table.allocate() else {
            self.untracked += 1;
            return;
        };
        let key = self.table.hasher().key(tuple, socket.netns);
        self.table.bind_id(slot, socket.id);
        self.table.bind_key(slot, key);
        let place = self.undecided_place(slot, country_of(tuple, geo));
        // Its counters begin here.
        self.table.entry_mut(slot).flags.set(Flags::BASELINE);
        self.corrections.seeded += 1;
        self.settle_in(now_ns, slot, place, ESTABLISHED);
        self.learn(slot, &socket);
    }

    /// The place of an entry whose direction only a walk can tell.
    fn undecided_place(&mut self, slot: Slot, country: Country) -> Place {
        self.table.entry_mut(slot).flags.set(Flags::UNDECIDED);
        Ledger::unsettled_place(country)
    }

    /// A socket reached CLOSE; true if that is a failed active open.
    ///
    /// An unknown socket's close is that of a seed with the same endpoints,
    /// else of an untracked connection if there are any, else it is ignored:
    /// never does it decrement anything.
    fn close(
        &mut self,
        now_ns: u64,
        socket: Socket,
        at_ns: u64,
        tuple: &Tuple,
        old: u8,
        traffic: Option<&Traffic>,
    ) -> bool {
        // The address is somebody else's from now on.
        self.early_accepts.take(socket.id);
        let handshake = matches!(old, SYN_SENT | SYN_RECV);
        let mut key = None;
        if let Some(slot) = self.table.find_id(socket.id) {
            if self.table.entry(slot).is_pending() {
                let own = self.is_own_pending(slot, &socket, tuple);
                self.table.remove(slot);
                if handshake && own {
                    return true;
                }
                // Its open was lost, or its close and the address is reused.
            } else {
                let own = self.table.hasher().key(tuple, socket.netns);
                if !handshake && self.is_own(slot, &socket, &own) {
                    self.learn(slot, &socket);
                    self.finish(now_ns, slot, at_ns, traffic, true);
                    return false;
                }
                self.supersede(now_ns, slot, at_ns);
                key = Some(own);
            }
        }
        if old == SYN_RECV {
            return false;
        }
        if self.filter.hides(tuple).is_some() {
            return false;
        }
        if old == SYN_SENT {
            // A handshake that was under way at attach, or beyond the cap.
            return true;
        }
        let key = key.unwrap_or_else(|| self.table.hasher().key(tuple, socket.netns));
        if let Some(slot) = self.table.find_adoptable(&key, socket.cookie, old) {
            self.learn(slot, &socket);
            self.finish(now_ns, slot, at_ns, traffic, true);
        } else {
            self.tombstones
                .close(self.table.hasher(), key, socket.cookie, at_ns);
            self.untracked = self.untracked.saturating_sub(1);
        }
        false
    }

    /// accept() returned a socket.
    fn accept(&mut self, now_ns: u64, id: SocketId, at_ns: u64) {
        let Some(slot) = self.table.find_id(id) else {
            self.early_accepts.keep(id);
            return;
        };
        let entry = self.table.entry_mut(slot);
        let waits = entry.flags.has(Flags::OPENED)
            && !entry.flags.has(Flags::ACCEPTED)
            && entry.direction() == Direction::Inbound;
        if waits {
            entry.flags.set(Flags::ACCEPTED);
            let wait = at_ns.saturating_sub(entry.since_ns);
            let place = Place::of(entry);
            self.ledger.accepted_after(now_ns, place, wait);
        }
    }

    /// The socket of `slot` is another one now, so its close was missed:
    /// closes it (a pending open just goes).
    fn supersede(&mut self, now_ns: u64, slot: Slot, at_ns: u64) {
        if self.table.entry(slot).is_pending() {
            self.table.remove(slot);
        } else {
            self.finish(now_ns, slot, at_ns, None, false);
        }
    }

    /// Closes an entry. Its duration is observed where the end was `seen` and
    /// the start known.
    pub(super) fn finish(
        &mut self,
        now_ns: u64,
        slot: Slot,
        at_ns: u64,
        traffic: Option<&Traffic>,
        seen: bool,
    ) {
        if let Some(traffic) = traffic {
            self.final_traffic(now_ns, slot, traffic);
        }
        let entry = self.table.entry(slot);
        let place = Place::of(entry);
        if seen && entry.flags.has(Flags::OPENED) {
            let duration = at_ns.saturating_sub(entry.since_ns);
            self.ledger.duration[place.direction as usize].observe(duration);
        }
        self.ledger.closed(now_ns, place);
        self.tombstones
            .close(self.table.hasher(), entry.key(), entry.cookie(), at_ns);
        self.forget(now_ns, slot);
    }

    /// Takes an open entry out of the gauges and the table.
    pub(super) fn forget(&mut self, now_ns: u64, slot: Slot) {
        let entry = self.table.entry(slot);
        let place = Place::of(entry);
        if entry.state() == ESTABLISHED {
            self.ledger.left_established(now_ns, place);
        }
        self.ledger.detach(now_ns, place);
        self.open -= 1;
        self.table.remove(slot);
    }

    /// Moves an entry to a state; true if that is into or out of ESTABLISHED.
    pub(super) fn set_state(&mut self, now_ns: u64, slot: Slot, state: u8) -> bool {
        let entry = self.table.entry_mut(slot);
        let before = entry.state();
        entry.set_state(state);
        let place = Place::of(entry);
        match (before == ESTABLISHED, state == ESTABLISHED) {
            (true, false) => self.ledger.left_established(now_ns, place),
            (false, true) => self.ledger.entered_established(now_ns, place),
            _ => return false,
        }
        true
    }

    /// An event was about this entry: whatever a walk reads from before is
    /// older.
    pub(super) fn touch(&mut self, slot: Slot) {
        let epoch = self.epoch;
        let entry = self.table.entry_mut(slot);
        entry.epoch = epoch;
        entry.flags.set(Flags::BY_EVENT);
        entry.flags.clear(Flags::MISSED);
    }

    /// Takes from an event what the entry did not know yet.
    fn learn(&mut self, slot: Slot, socket: &Socket) {
        self.touch(slot);
        self.table.learn_netns(slot, socket.netns);
        self.table.learn_cookie(slot, socket.cookie);
    }
}

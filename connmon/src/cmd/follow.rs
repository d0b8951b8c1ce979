//! Events → what happened to which connection, with its owner and times:
//! the state behind `trace` and `top`. Pure like the fold, but it keeps
//! addresses and owners, which the agent's table does without.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use connmon_common::state;
use connmon_core::event::{Event, NetnsId, Owner, Socket, SocketId, Traffic, Tuple};
use connmon_core::fold::{Direction, FailureReason, failure_reason, is_unwritten};

use super::connection::Connection;
use super::snapshot::{Listening, Tables};

/// Most connections, endpoints of older ones and listeners that are kept;
/// beyond it a connection's close is reported without its owner and duration.
const MAX_FOLLOWED: usize = 1 << 18;

/// What happened to a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Happening {
    /// Nothing: it is in this TCP state.
    Live(u8),
    /// Handshake done.
    Open,
    /// An open connection reached CLOSE.
    Close,
    /// An active open never completed.
    Fail(FailureReason),
}

/// A connection at the moment something happened to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Occurrence {
    /// What.
    pub happening: Happening,
    /// When, CLOCK_MONOTONIC.
    pub at_ns: u64,
    /// Which.
    pub connection: Connection,
    /// Of the connection at its close, of the attempt at its failure, of the
    /// handshake when an outbound one opens.
    pub duration_ns: Option<u64>,
    /// Bytes and segments of its whole life, at a close.
    pub traffic: Option<Traffic>,
}

impl Occurrence {
    /// [`Self::duration_ns`] in seconds.
    pub fn duration_seconds(&self) -> Option<f64> {
        self.duration_ns.map(|ns| ns as f64 / 1e9)
    }
}

#[derive(Clone, Copy, Debug)]
struct Followed {
    connection: Connection,
    since_ns: Option<u64>,
    open: bool,
}

impl Followed {
    /// Whether an event of this socket, with these endpoints, is about it.
    fn is_of(&self, socket: &Socket, tuple: &Tuple) -> bool {
        let known = &self.connection.tuple;
        // A pending open may not have its local port yet.
        let local = !self.open
            || known.local == tuple.local
                && agree(known.local_port.into(), tuple.local_port.into());
        local && known.remote_endpoint() == tuple.remote_endpoint() && self.connection.is_of(socket)
    }

    fn age_ns(&self, at_ns: u64) -> Option<u64> {
        self.since_ns.map(|since| at_ns.saturating_sub(since))
    }
}

impl Connection {
    fn is_of(&self, socket: &Socket) -> bool {
        agree(self.cookie, socket.cookie) && agree(self.netns.into(), socket.netns.into())
    }
}

/// Whether two ids or ports may be the same; 0 is an unknown one.
fn agree(a: u64, b: u64) -> bool {
    a == b || a == 0 || b == 0
}

/// Whether a socket that leaves this state has not completed its handshake.
fn is_handshake(old: u8) -> bool {
    matches!(old, state::SYN_SENT | state::SYN_RECV)
}

/// Follows connections through the event stream.
#[derive(Debug, Default)]
pub struct Follower {
    by_id: HashMap<SocketId, Followed>,
    /// Connections that existed before, by their endpoints: events may not
    /// carry the namespace.
    seeds: HashMap<Tuple, Vec<Connection>>,
    /// Under namespace 0 the last one on the endpoint in any: for events that
    /// do not carry the namespace.
    listeners: HashMap<(NetnsId, IpAddr, u16), Listener>,
}

/// The listening sockets of one endpoint: with SO_REUSEPORT several.
#[derive(Clone, Copy, Debug, Default)]
struct Listener {
    /// Of the last one.
    owner: Owner,
    sockets: u32,
}

impl Follower {
    /// Takes over what existed before the events, so that later events about
    /// it have a direction and an owner.
    pub fn start(&mut self, tables: &Tables) {
        self.listeners(&tables.listening);
        for live in &tables.connections {
            self.seed(live.connection);
        }
    }

    /// All listening sockets that there are. Until an accept reports the
    /// accepting process, a connection has the owner of its listener.
    fn listeners(&mut self, all: &[Listening]) {
        self.listeners.clear();
        for one in all {
            self.listen(one.netns, one.address, one.port, one.owner);
        }
    }

    fn listen(&mut self, netns: NetnsId, address: IpAddr, port: u16, owner: Owner) {
        for netns in namespaces(netns) {
            let key = (netns, address, port);
            if self.listeners.len() < MAX_FOLLOWED || self.listeners.contains_key(&key) {
                let listener = self.listeners.entry(key).or_default();
                listener.sockets += 1;
                if owner.pid != 0 {
                    listener.owner = owner;
                }
            }
        }
    }

    fn unlisten(&mut self, netns: NetnsId, address: IpAddr, port: u16) {
        for netns in namespaces(netns) {
            let key = (netns, address, port);
            if let Some(listener) = self.listeners.get_mut(&key) {
                listener.sockets -= 1;
                if listener.sockets == 0 {
                    self.listeners.remove(&key);
                }
            }
        }
    }

    /// The owner of the listener that took a connection with this local end:
    /// of that on its address, else of a wildcard; one on `::` may take IPv4.
    fn listener_of(&self, netns: NetnsId, tuple: &Tuple) -> Option<Owner> {
        let addresses = [
            tuple.local,
            if tuple.local.is_ipv4() {
                Ipv4Addr::UNSPECIFIED.into()
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            },
            Ipv6Addr::UNSPECIFIED.into(),
        ];
        let mut found = addresses
            .iter()
            .filter_map(|&address| self.listeners.get(&(netns, address, tuple.local_port)));
        found.next().map(|found| found.owner)
    }

    /// A connection that existed before. A row may come twice.
    fn seed(&mut self, seed: Connection) {
        if self.seeds.len() >= MAX_FOLLOWED && !self.seeds.contains_key(&seed.tuple) {
            return;
        }
        let seeds = self.seeds.entry(seed.tuple).or_default();
        seeds.retain(|other| other.netns != seed.netns);
        seeds.push(seed);
    }

    fn take_seed(&mut self, socket: &Socket, tuple: &Tuple) -> Option<Followed> {
        let seeds = self.seeds.get_mut(tuple)?;
        let found = seeds.iter().position(|seed| seed.is_of(socket))?;
        let connection = seeds.swap_remove(found);
        if seeds.is_empty() {
            self.seeds.remove(tuple);
        }
        Some(Followed {
            connection,
            since_ns: None,
            open: true,
        })
    }

    /// Applies one event. Returns what happened to a connection, if anything.
    pub fn apply(&mut self, event: &Event) -> Option<Occurrence> {
        match *event {
            Event::Connect {
                socket,
                at_ns,
                tuple,
                owner,
            } => {
                let connection = Connection::new(socket, tuple, Direction::Outbound, owner);
                self.insert(socket.id, connection, Some(at_ns), false);
            }
            Event::ConnectSent { id, at_ns, .. } => {
                if let Some(pending) = self.by_id.get_mut(&id).filter(|entry| !entry.open) {
                    pending.since_ns = Some(at_ns);
                }
            }
            Event::Open {
                socket,
                at_ns,
                tuple,
                old,
                ..
            } => {
                return Some(self.open(socket, at_ns, tuple, old));
            }
            Event::Restore { socket, tuple } => self.restore(socket, tuple),
            Event::Close {
                socket,
                at_ns,
                tuple,
                old,
                error,
                segments_out,
                shut_down,
                traffic,
            } => {
                let known = self.take(&socket, &tuple, old);
                if is_unwritten(error, segments_out, shut_down) {
                    return None;
                }
                let reason = || failure_reason(error, segments_out);
                let (happening, connection) = close(&socket, tuple, old, known, reason)?;
                return Some(Occurrence {
                    happening,
                    at_ns,
                    connection,
                    duration_ns: known.and_then(|entry| entry.age_ns(at_ns)),
                    traffic: traffic.filter(|_| happening == Happening::Close),
                });
            }
            Event::Accept { id, owner, .. } => {
                if let Some(accepted) = self.by_id.get_mut(&id) {
                    accepted.connection.owner = owner;
                }
            }
            Event::Listen {
                socket,
                address,
                port,
                owner,
            } => {
                self.listen(socket.netns, address, port, owner);
            }
            Event::Unlisten {
                socket,
                address,
                port,
            } => {
                self.unlisten(socket.netns, address, port);
            }
            Event::Change { .. } => {}
        }
        None
    }

    /// The active open that this socket began.
    fn pending(&self, socket: &Socket, tuple: &Tuple) -> Option<Followed> {
        let known = self.by_id.get(&socket.id).copied();
        known.filter(|entry| !entry.open && entry.is_of(socket, tuple))
    }

    /// A connection that was opened elsewhere (TCP_REPAIR): as one from
    /// before, inbound if its port is known to listen.
    fn restore(&mut self, socket: Socket, tuple: Tuple) {
        let direction = match self.listener_of(socket.netns, &tuple) {
            Some(_) => Direction::Inbound,
            None => Direction::Unknown,
        };
        let pending = self.pending(&socket, &tuple);
        let owner = pending.map_or_else(Owner::default, |entry| entry.connection.owner);
        let connection = Connection::new(socket, tuple, direction, owner);
        self.insert(socket.id, connection, None, true);
    }

    /// Forgets the connection that reached CLOSE and returns what was known
    /// of it. Under the socket's address there may be another one, whose close
    /// was missed: it is forgotten, and nothing of it is returned.
    fn take(&mut self, socket: &Socket, tuple: &Tuple, old: u8) -> Option<Followed> {
        let handshake = is_handshake(old);
        let is_it = |entry: &Followed| entry.is_of(socket, tuple) && !(entry.open && handshake);
        let followed = self.by_id.remove(&socket.id).filter(is_it);
        if handshake {
            // Seeds are open.
            return followed;
        }
        followed.or_else(|| self.take_seed(socket, tuple))
    }

    fn open(&mut self, socket: Socket, at_ns: u64, tuple: Tuple, old: u8) -> Occurrence {
        let pending = self.pending(&socket, &tuple);
        let (direction, owner) = match pending {
            Some(pending) => (Direction::Outbound, pending.connection.owner),
            None if old == state::SYN_SENT => (Direction::Outbound, Owner::default()),
            None => {
                let owner = self.listener_of(socket.netns, &tuple);
                (Direction::Inbound, owner.unwrap_or_default())
            }
        };
        let connection = Connection::new(socket, tuple, direction, owner);
        self.insert(socket.id, connection, Some(at_ns), true);
        Occurrence {
            happening: Happening::Open,
            at_ns,
            connection,
            duration_ns: pending.and_then(|pending| pending.age_ns(at_ns)),
            traffic: None,
        }
    }

    fn insert(&mut self, id: SocketId, connection: Connection, since_ns: Option<u64>, open: bool) {
        let followed = Followed {
            connection,
            since_ns,
            open,
        };
        if self.by_id.len() < MAX_FOLLOWED || self.by_id.contains_key(&id) {
            self.by_id.insert(id, followed);
        }
    }
}

/// Under which namespaces a listener is kept: its own, and 0.
fn namespaces(netns: NetnsId) -> impl Iterator<Item = NetnsId> {
    [netns, 0].into_iter().take(1 + usize::from(netns != 0))
}

/// What the end of a socket that left state `old` means for its connection.
fn close(
    socket: &Socket,
    tuple: Tuple,
    old: u8,
    known: Option<Followed>,
    reason: impl FnOnce() -> FailureReason,
) -> Option<(Happening, Connection)> {
    let known = known.map(|entry| entry.connection);
    let active = known.is_some_and(|known| known.direction == Direction::Outbound);
    let (happening, direction) = if !is_handshake(old) {
        (Happening::Close, Direction::Unknown)
    } else if active || old == state::SYN_SENT {
        (Happening::Fail(reason()), Direction::Outbound)
    } else {
        // A passive open that never completed is nobody's connection.
        return None;
    };
    let mut connection = Connection::new(*socket, tuple, direction, Owner::default());
    if let Some(known) = known {
        connection.direction = known.direction;
        connection.owner = known.owner;
        // An autobound socket has lost its local port when it reaches CLOSE.
        if tuple.local_port == 0 || known.tuple.local_port != 0 {
            connection.tuple = known.tuple;
        }
    }
    Some((happening, connection))
}

#[cfg(test)]
mod tests;

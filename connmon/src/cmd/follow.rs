//! Events → what happened to which connection, with its owner and times:
//! the state behind `trace` and `top`. Pure like the fold, but it keeps
//! addresses and owners, which the agent's table does without.

use std::collections::HashMap;
use std::hash::{BuildHasher as _, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use connmon_common::state;
use connmon_core::event::{Cookie, Event, NetnsId, Owner, Socket, SocketId, Traffic, Tuple};
use connmon_core::fold::{Direction, FailureReason, failure_reason, is_unwritten};
use connmon_core::scan::Row;
use hashbrown::HashTable;

use super::snapshot::Listening;

/// Most connections followed at once; beyond it a connection's close is
/// reported without its owner and duration.
const MAX_FOLLOWED: usize = 1 << 18;

/// What happened to a connection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Happening {
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
    /// Socket cookie, or 0.
    pub cookie: Cookie,
    /// Namespace inode.
    pub netns: NetnsId,
    /// Endpoints.
    pub tuple: Tuple,
    /// Direction.
    pub direction: Direction,
    /// Owner; pid 0 when unknown.
    pub owner: Owner,
    /// See `ConnectionRecord::duration_seconds`.
    pub duration_ns: Option<u64>,
    /// Final figures of a close.
    pub traffic: Option<Traffic>,
}

#[derive(Clone, Copy, Debug)]
struct Followed {
    cookie: Cookie,
    netns: NetnsId,
    tuple: Tuple,
    direction: Direction,
    owner: Owner,
    since_ns: Option<u64>,
    open: bool,
}

impl Followed {
    /// Whether an event of this socket, with these endpoints, is about it.
    fn is_of(&self, socket: &Socket, tuple: &Tuple) -> bool {
        // A pending open may not have its local port yet.
        let local = !self.open
            || self.tuple.local == tuple.local
                && agree(self.tuple.local_port.into(), tuple.local_port.into());
        local
            && self.tuple.remote_endpoint() == tuple.remote_endpoint()
            && agree(self.cookie, socket.cookie)
            && agree(self.netns.into(), socket.netns.into())
    }
}

/// Whether two figures do not contradict each other; 0 is an unknown one.
fn agree(a: u64, b: u64) -> bool {
    a == b || a == 0 || b == 0
}

/// Whether a socket that leaves this state has not completed its handshake.
fn is_handshake(old: u8) -> bool {
    matches!(old, state::SYN_SENT | state::SYN_RECV)
}

/// Connections that existed before, found by their endpoints: events may not
/// tell the namespace.
#[derive(Debug, Default)]
struct Seeds {
    table: HashTable<Followed>,
    hasher: RandomState,
}

impl Seeds {
    /// Keeps it once: a row may come twice.
    fn insert(&mut self, seed: Followed) {
        let hash = self.hasher.hash_one(seed.tuple);
        let same = |other: &Followed| other.tuple == seed.tuple && other.netns == seed.netns;
        if let Some(known) = self.table.find_mut(hash, same) {
            *known = seed;
        } else if self.table.len() < MAX_FOLLOWED {
            let hasher = &self.hasher;
            self.table
                .insert_unique(hash, seed, |other| hasher.hash_one(other.tuple));
        }
    }

    fn take(&mut self, socket: &Socket, tuple: &Tuple) -> Option<Followed> {
        let hash = self.hasher.hash_one(tuple);
        let found = self
            .table
            .find_entry(hash, |seed| {
                seed.tuple == *tuple && seed.is_of(socket, tuple)
            })
            .ok()?;
        Some(found.remove().0)
    }
}

/// Follows connections through the event stream.
#[derive(Debug, Default)]
pub struct Follower {
    by_id: HashMap<SocketId, Followed>,
    seeds: Seeds,
    /// Under namespace 0 the last one on the endpoint in any: for events that
    /// do not tell the namespace.
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
    /// All listening sockets there are, as the tables show them: the owner of
    /// one stands for the accepting process until an accept tells that.
    pub fn listeners(&mut self, all: &[Listening]) {
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

    /// A connection that existed before.
    pub fn seed(&mut self, netns: NetnsId, row: &Row, direction: Direction) {
        self.seeds.insert(Followed {
            cookie: row.cookie,
            netns,
            tuple: row.tuple,
            direction,
            owner: row.owner,
            since_ns: None,
            open: true,
        });
    }

    /// Takes one event; says what happened, if it is something to report.
    pub fn apply(&mut self, event: &Event) -> Option<Occurrence> {
        match *event {
            Event::Connect {
                socket,
                at_ns,
                tuple,
                owner,
            } => {
                self.insert(
                    socket.id,
                    Followed {
                        cookie: socket.cookie,
                        netns: socket.netns,
                        tuple,
                        direction: Direction::Outbound,
                        owner,
                        since_ns: Some(at_ns),
                        open: false,
                    },
                );
                None
            }
            Event::ConnectSent { id, at_ns, .. } => {
                if let Some(pending) = self.by_id.get_mut(&id).filter(|entry| !entry.open) {
                    pending.since_ns = Some(at_ns);
                }
                None
            }
            Event::Open {
                socket,
                at_ns,
                tuple,
                old,
                ..
            } => Some(self.open(socket, at_ns, tuple, old)),
            Event::Restore { socket, tuple } => {
                self.restore(socket, tuple);
                None
            }
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
                close(socket, at_ns, tuple, old, known, traffic, || {
                    failure_reason(error, segments_out)
                })
            }
            Event::Accept { id, owner, .. } => {
                if let Some(accepted) = self.by_id.get_mut(&id) {
                    accepted.owner = owner;
                }
                None
            }
            Event::Listen {
                socket,
                address,
                port,
                owner,
            } => {
                self.listen(socket.netns, address, port, owner);
                None
            }
            Event::Unlisten {
                socket,
                address,
                port,
            } => {
                self.unlisten(socket.netns, address, port);
                None
            }
            Event::Change { .. } => None,
        }
    }

    /// A connection that was opened elsewhere: as one from before, inbound if
    /// its port is known to listen.
    fn restore(&mut self, socket: Socket, tuple: Tuple) {
        let pending = self.by_id.get(&socket.id).copied();
        let listener = self.listener_of(socket.netns, &tuple);
        self.insert(
            socket.id,
            Followed {
                cookie: socket.cookie,
                netns: socket.netns,
                tuple,
                direction: match listener {
                    Some(_) => Direction::Inbound,
                    None => Direction::Unknown,
                },
                owner: pending
                    .filter(|entry| !entry.open && entry.is_of(&socket, &tuple))
                    .map_or_else(Owner::default, |entry| entry.owner),
                since_ns: None,
                open: true,
            },
        );
    }

    /// Forgets the connection that reached CLOSE; what was known of it. Under
    /// the socket's address there may be another one, whose close was missed:
    /// it is forgotten and tells nothing of this one.
    fn take(&mut self, socket: &Socket, tuple: &Tuple, old: u8) -> Option<Followed> {
        let handshake = is_handshake(old);
        let followed = self
            .by_id
            .remove(&socket.id)
            .filter(|entry| entry.is_of(socket, tuple) && !(entry.open && handshake));
        if handshake {
            // Seeds are open.
            return followed;
        }
        followed.or_else(|| self.seeds.take(socket, tuple))
    }

    fn open(&mut self, socket: Socket, at_ns: u64, tuple: Tuple, old: u8) -> Occurrence {
        let pending = self
            .by_id
            .get(&socket.id)
            .copied()
            .filter(|entry| !entry.open && entry.is_of(&socket, &tuple));
        let (direction, owner, duration_ns) = match pending {
            Some(pending) => (
                Direction::Outbound,
                pending.owner,
                pending.since_ns.map(|since| at_ns.saturating_sub(since)),
            ),
            None if old == state::SYN_SENT => (Direction::Outbound, Owner::default(), None),
            None => {
                let owner = self.listener_of(socket.netns, &tuple).unwrap_or_default();
                (Direction::Inbound, owner, None)
            }
        };
        self.insert(
            socket.id,
            Followed {
                cookie: socket.cookie,
                netns: socket.netns,
                tuple,
                direction,
                owner,
                since_ns: Some(at_ns),
                open: true,
            },
        );
        Occurrence {
            happening: Happening::Open,
            at_ns,
            cookie: socket.cookie,
            netns: socket.netns,
            tuple,
            direction,
            owner,
            duration_ns,
            traffic: None,
        }
    }

    fn insert(&mut self, id: SocketId, entry: Followed) {
        if self.by_id.len() < MAX_FOLLOWED || self.by_id.contains_key(&id) {
            self.by_id.insert(id, entry);
        }
    }
}

/// Under which namespaces a listener is kept: its own, and 0.
fn namespaces(netns: NetnsId) -> impl Iterator<Item = NetnsId> {
    [netns, 0].into_iter().take(1 + usize::from(netns != 0))
}

fn close(
    socket: Socket,
    at_ns: u64,
    tuple: Tuple,
    old: u8,
    known: Option<Followed>,
    traffic: Option<Traffic>,
    reason: impl FnOnce() -> FailureReason,
) -> Option<Occurrence> {
    let active = known.is_some_and(|entry| entry.direction == Direction::Outbound);
    let happening = if !is_handshake(old) {
        Happening::Close
    } else if active || old == state::SYN_SENT {
        Happening::Fail(reason())
    } else {
        // A passive open that never completed is nobody's connection.
        return None;
    };
    // An autobound socket has lost its local port when it reaches CLOSE.
    let tuple = known.map_or(tuple, |entry| {
        if tuple.local_port == 0 || entry.tuple.local_port != 0 {
            entry.tuple
        } else {
            tuple
        }
    });
    let unknown = match happening {
        Happening::Fail(_) => Direction::Outbound,
        _ => Direction::Unknown,
    };
    Some(Occurrence {
        happening,
        at_ns,
        cookie: socket.cookie,
        netns: socket.netns,
        tuple,
        direction: known.map_or(unknown, |entry| entry.direction),
        owner: known.map_or_else(Owner::default, |entry| entry.owner),
        duration_ns: known
            .and_then(|entry| entry.since_ns)
            .map(|since| at_ns.saturating_sub(since)),
        traffic: traffic.filter(|_| happening == Happening::Close),
    })
}

#[cfg(test)]
mod tests;

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
mod tests {
    use super::*;

    const TUPLE: Tuple = Tuple {
        local: std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)),
        local_port: 4000,
        remote: std::net::IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2)),
        remote_port: 80,
    };
    const SOCKET: Socket = Socket {
        id: 0xffff_8000_0000_1000,
        cookie: 1,
        netns: 7,
    };

    fn owner(pid: u32) -> Owner {
        Owner {
            pid,
            comm: *b"curl\0\0\0\0\0\0\0\0\0\0\0\0",
            cgroup: 0,
        }
    }

    fn connect(at_ns: u64) -> Event {
        Event::Connect {
            socket: SOCKET,
            at_ns,
            tuple: Tuple {
                local_port: 0,
                ..TUPLE
            },
            owner: owner(5),
        }
    }

    fn open(at_ns: u64, old: u8) -> Event {
        Event::Open {
            socket: SOCKET,
            at_ns,
            tuple: TUPLE,
            old,
            new: state::ESTABLISHED,
        }
    }

    fn closed(at_ns: u64, old: u8, error: u32) -> Event {
        Event::Close {
            socket: SOCKET,
            at_ns,
            tuple: Tuple {
                local_port: 0,
                ..TUPLE
            },
            old,
            error,
            segments_out: Some(1),
            shut_down: false,
            traffic: Some(Traffic::default()),
        }
    }

    /// The close of another socket than [`SOCKET`], or with other endpoints.
    fn closed_as(socket: Socket, tuple: Tuple, old: u8) -> Event {
        Event::Close {
            socket,
            at_ns: 2000,
            tuple,
            old,
            error: 0,
            segments_out: Some(1),
            shut_down: false,
            traffic: None,
        }
    }

    /// A row with the owner 3.
    fn row(tuple: Tuple) -> Row {
        Row {
            state: state::ESTABLISHED,
            tuple,
            cookie: 0,
            inode: 0,
            id: 0,
            receive_queue: 0,
            send_queue: 0,
            traffic: None,
            owner: owner(3),
        }
    }

    #[test]
    fn an_outbound_connection_keeps_owner_port_and_times() {
        let mut follower = Follower::default();
        assert_eq!(follower.apply(&connect(100)), None);
        let opened = follower.apply(&open(350, state::SYN_SENT)).unwrap();
        assert_eq!(opened.duration_ns, Some(250));
        assert_eq!(opened.owner.pid, 5);
        let closed = follower.apply(&closed(1350, state::FIN_WAIT2, 0)).unwrap();
        assert_eq!(closed.happening, Happening::Close);
        assert_eq!(closed.duration_ns, Some(1000));
        assert_eq!(closed.tuple, TUPLE);
        assert!(follower.by_id.is_empty());
    }

    #[test]
    fn a_failed_connect_has_a_reason_and_no_traffic() {
        let mut follower = Follower::default();
        follower.apply(&connect(0));
        let failed = follower.apply(&closed(10, state::SYN_SENT, 111)).unwrap();
        assert_eq!(failed.happening, Happening::Fail(FailureReason::Refused));
        assert_eq!(failed.traffic, None);
    }

    #[test]
    fn a_fast_open_connect_that_is_never_written_is_nothing() {
        for shut_down in [true, false] {
            let mut follower = Follower::default();
            follower.apply(&connect(0));
            let ended = follower.apply(&Event::Close {
                socket: SOCKET,
                at_ns: 10,
                tuple: TUPLE,
                old: state::SYN_SENT,
                error: 0,
                segments_out: Some(0),
                shut_down,
                traffic: None,
            });
            let expected = (!shut_down).then_some(Happening::Fail(FailureReason::Local));
            assert_eq!(ended.map(|ended| ended.happening), expected);
            assert!(follower.by_id.is_empty());
        }
    }

    #[test]
    fn an_accepted_connection_belongs_to_the_listener_then_to_the_acceptor() {
        let mut follower = Follower::default();
        follower.listeners(&[listening(ANY, 1)]);
        let opened = follower.apply(&open(0, state::SYN_RECV)).unwrap();
        assert_eq!(
            (opened.direction, opened.owner.pid),
            (Direction::Inbound, 1)
        );
        follower.apply(&Event::Accept {
            id: SOCKET.id,
            at_ns: 1,
            owner: owner(2),
        });
        let closed = follower.apply(&closed(9, state::LAST_ACK, 0)).unwrap();
        assert_eq!(closed.owner.pid, 2);
    }

    /// A listener of namespace 7 on the port of [`TUPLE`].
    fn listening(address: IpAddr, pid: u32) -> Listening {
        Listening {
            netns: 7,
            address,
            port: TUPLE.local_port,
            owner: owner(pid),
        }
    }

    const ANY: IpAddr = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
    const ANY_V6: IpAddr = IpAddr::V6(Ipv6Addr::UNSPECIFIED);

    #[test]
    fn a_listener_is_found_by_its_address() {
        let another = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 9));
        for (listeners, expected) in [
            (&[(TUPLE.local, 1), (another, 2)][..], 1),
            (&[(another, 2), (TUPLE.local, 1)], 1),
            (&[(another, 2)], 0),
            (&[(ANY, 3), (another, 2)], 3),
            (&[(TUPLE.local, 1), (ANY, 3)], 1),
            (&[(ANY_V6, 4)], 4),
            (&[(ANY_V6, 4), (ANY, 3)], 3),
        ] {
            let mut follower = Follower::default();
            let all: Vec<Listening> = (listeners.iter())
                .map(|&(address, pid)| listening(address, pid))
                .collect();
            follower.listeners(&all);
            let opened = follower.apply(&open(0, state::SYN_RECV)).unwrap();
            assert_eq!(opened.owner.pid, expected, "{listeners:?}");
        }
    }

    #[test]
    fn a_listener_that_ended_names_nobody() {
        let mut follower = Follower::default();
        let (address, port) = (TUPLE.local, TUPLE.local_port);
        let socket = SOCKET;
        follower.listeners(&[listening(ANY, 3)]);
        for pid in [1, 2] {
            follower.apply(&Event::Listen {
                socket,
                address,
                port,
                owner: owner(pid),
            });
        }
        // Of two that share the endpoint one is left.
        for expected in [2, 3] {
            follower.apply(&Event::Unlisten {
                socket,
                address,
                port,
            });
            let opened = follower.apply(&open(0, state::SYN_RECV)).unwrap();
            assert_eq!(opened.owner.pid, expected);
        }
    }

    #[test]
    fn a_passive_open_that_never_completed_is_nothing() {
        let mut follower = Follower::default();
        assert_eq!(follower.apply(&closed(0, state::SYN_RECV, 0)), None);
    }

    #[test]
    fn who_had_a_socket_address_before_is_not_who_closes_now() {
        let elsewhere = Tuple {
            remote_port: 81,
            ..TUPLE
        };
        let later = Socket {
            cookie: 2,
            ..SOCKET
        };
        for (socket, tuple, old, told) in [
            (
                SOCKET,
                elsewhere,
                state::FIN_WAIT2,
                Some(Direction::Unknown),
            ),
            (later, TUPLE, state::FIN_WAIT2, Some(Direction::Unknown)),
            (SOCKET, TUPLE, state::SYN_SENT, Some(Direction::Outbound)),
            (SOCKET, TUPLE, state::SYN_RECV, None),
        ] {
            let mut follower = Follower::default();
            follower.apply(&connect(100));
            follower.apply(&open(350, state::SYN_SENT));
            let ended = follower.apply(&closed_as(socket, tuple, old));
            let found = ended.map(|ended| {
                assert_eq!((ended.tuple, ended.duration_ns), (tuple, None));
                (ended.direction, ended.owner.pid)
            });
            let expected = told.map(|direction| (direction, 0));
            assert_eq!(found, expected, "{socket:?} {tuple:?} {old}");
            assert!(follower.by_id.is_empty());
        }
    }

    #[test]
    fn a_seed_closes_under_an_address_that_another_connection_had() {
        let seeded = Tuple {
            local_port: 22,
            remote_port: 50_000,
            ..TUPLE
        };
        let mut follower = Follower::default();
        follower.seed(7, &row(seeded), Direction::Inbound);
        follower.apply(&connect(100));
        follower.apply(&open(350, state::SYN_SENT));
        let socket = Socket {
            cookie: 2,
            ..SOCKET
        };
        let ended = follower
            .apply(&closed_as(socket, seeded, state::LAST_ACK))
            .unwrap();
        assert_eq!((ended.direction, ended.owner.pid), (Direction::Inbound, 3));
    }

    #[test]
    fn a_pending_open_of_who_had_the_address_does_not_open_now() {
        let mut follower = Follower::default();
        follower.apply(&connect(100));
        let opened = follower
            .apply(&Event::Open {
                socket: Socket {
                    cookie: 2,
                    ..SOCKET
                },
                at_ns: 350,
                tuple: TUPLE,
                old: state::SYN_RECV,
                new: state::ESTABLISHED,
            })
            .unwrap();
        assert_eq!(
            (opened.direction, opened.owner.pid, opened.duration_ns),
            (Direction::Inbound, 0, None)
        );
    }

    /// The tracepoint's program without BTF.
    #[test]
    fn events_that_do_not_tell_the_namespace_go_by_endpoints_and_port() {
        let socket = Socket {
            cookie: 0,
            netns: 0,
            ..SOCKET
        };
        let mut follower = Follower::default();
        follower.seed(7, &row(TUPLE), Direction::Inbound);
        follower.listeners(&[listening(ANY, 1)]);
        let ended = follower
            .apply(&closed_as(socket, TUPLE, state::LAST_ACK))
            .unwrap();
        assert_eq!((ended.direction, ended.owner.pid), (Direction::Inbound, 3));
        let opened = follower
            .apply(&Event::Open {
                socket,
                at_ns: 3000,
                tuple: TUPLE,
                old: state::SYN_RECV,
                new: state::ESTABLISHED,
            })
            .unwrap();
        assert_eq!(opened.owner.pid, 1);
    }

    #[test]
    fn the_same_endpoints_in_another_namespace_are_another_connection() {
        let mut follower = Follower::default();
        for _ in 0..2 {
            follower.seed(7, &row(TUPLE), Direction::Inbound);
            follower.seed(8, &row(TUPLE), Direction::Outbound);
        }
        assert_eq!(follower.seeds.table.len(), 2);
        for (netns, direction) in [
            (9, Direction::Unknown),
            (8, Direction::Outbound),
            (7, Direction::Inbound),
        ] {
            let socket = Socket { netns, ..SOCKET };
            let ended = follower
                .apply(&closed_as(socket, TUPLE, state::LAST_ACK))
                .unwrap();
            assert_eq!(ended.direction, direction, "{netns}");
        }
        assert!(follower.seeds.table.is_empty());
    }
}

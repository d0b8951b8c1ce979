//! Events → what happened to which connection, with its owner and times:
//! the state behind `trace` and `top`. Pure like the fold, but it keeps
//! addresses and owners, which the agent's table does without.

use std::collections::HashMap;

use connmon_common::state;

use crate::event::{Cookie, Event, NetnsId, Owner, Socket, SocketId, Traffic, Tuple};
use crate::fold::{Direction, FailureReason, failure_reason};
use crate::reconcile::Row;

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
    tuple: Tuple,
    direction: Direction,
    owner: Owner,
    since_ns: Option<u64>,
    open: bool,
}

/// Follows connections through the event stream.
#[derive(Debug, Default)]
pub struct Follower {
    by_id: HashMap<SocketId, Followed>,
    seeds: HashMap<(NetnsId, Tuple), Followed>,
    listeners: HashMap<(NetnsId, u16), Owner>,
}

impl Follower {
    /// A listening socket that existed before: its owner stands in for the
    /// accepting process where no accept probe can be attached.
    pub fn listener(&mut self, netns: NetnsId, port: u16, owner: Owner) {
        if owner.pid != 0 && self.listeners.len() < MAX_FOLLOWED {
            self.listeners.insert((netns, port), owner);
        }
    }

    /// A connection that existed before.
    pub fn seed(&mut self, netns: NetnsId, row: &Row, direction: Direction) {
        if self.seeds.len() < MAX_FOLLOWED {
            let seed = Followed {
                tuple: row.tuple,
                direction,
                owner: row.owner,
                since_ns: None,
                open: true,
            };
            self.seeds.insert((netns, row.tuple), seed);
        }
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
            Event::Close {
                socket,
                at_ns,
                tuple,
                old,
                error,
                segments_out,
                traffic,
            } => {
                let known = self
                    .by_id
                    .remove(&socket.id)
                    .or_else(|| self.seeds.remove(&(socket.netns, tuple)));
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
                port,
                owner,
                ..
            } => {
                self.listener(socket.netns, port, owner);
                None
            }
            Event::Change { .. } | Event::Unlisten { .. } => None,
        }
    }

    fn open(&mut self, socket: Socket, at_ns: u64, tuple: Tuple, old: u8) -> Occurrence {
        let pending = self
            .by_id
            .get(&socket.id)
            .copied()
            .filter(|entry| !entry.open && entry.tuple.remote == tuple.remote);
        let (direction, owner, duration_ns) = match pending {
            Some(pending) => (
                Direction::Outbound,
                pending.owner,
                pending.since_ns.map(|since| at_ns.saturating_sub(since)),
            ),
            None if old == state::SYN_SENT => (Direction::Outbound, Owner::default(), None),
            None => {
                let listener = self.listeners.get(&(socket.netns, tuple.local_port));
                let owner = listener.copied().unwrap_or_default();
                (Direction::Inbound, owner, None)
            }
        };
        self.insert(
            socket.id,
            Followed {
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

fn close(
    socket: Socket,
    at_ns: u64,
    tuple: Tuple,
    old: u8,
    known: Option<Followed>,
    traffic: Option<Traffic>,
    reason: impl FnOnce() -> FailureReason,
) -> Option<Occurrence> {
    let opening = matches!(old, state::SYN_SENT | state::SYN_RECV);
    let active = known.is_some_and(|entry| entry.direction == Direction::Outbound);
    let happening = if !opening {
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
        cookie: 0,
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
            traffic: Some(Traffic::default()),
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
    fn an_accepted_connection_belongs_to_the_listener_then_to_the_acceptor() {
        let mut follower = Follower::default();
        follower.listener(7, 4000, owner(1));
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

    #[test]
    fn a_passive_open_that_never_completed_is_nothing() {
        let mut follower = Follower::default();
        assert_eq!(follower.apply(&closed(0, state::SYN_RECV, 0)), None);
    }
}

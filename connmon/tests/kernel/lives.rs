//! Events → what happened to each socket of one service port.

use std::collections::HashMap;

use connmon_common::state::{CLOSE, SYN_SENT};
use connmon_core::event::{Event, Owner, SocketId, Traffic, Tuple};

/// One socket from its first event to its close.
#[derive(Clone, Debug)]
pub struct Life {
    /// Opened by connect().
    pub active: bool,
    /// (old, new) of each change that was sent.
    pub changes: Vec<(u8, u8)>,
    /// Endpoints, at the latest event that has them all.
    pub tuple: Tuple,
    /// Namespaces named.
    pub netns: Vec<u32>,
    /// Who connected.
    pub connected_by: Option<Owner>,
    /// Who accepted.
    pub accepted_by: Option<Owner>,
    /// A deferred SYN was reported.
    pub sent_later: bool,
    /// Opened elsewhere and restored here.
    pub restored: bool,
    /// Statistics at the close.
    pub traffic: Option<Traffic>,
    /// `sk_err` at the close.
    pub error: u32,
    /// Segments sent, at the close.
    pub segments: Option<u32>,
    /// Shut down before it left SYN_SENT for CLOSE.
    pub shut_down: bool,
    /// Reached CLOSE.
    pub closed: bool,
    /// Address of the socket.
    pub id: SocketId,
}

/// The lives of the sockets whose service port is `port`, in order of birth.
pub fn lives(events: &[Event], port: u16) -> Vec<Life> {
    let mut lives: Vec<Life> = Vec::new();
    let mut current: HashMap<SocketId, usize> = HashMap::new();
    let mut accepts: HashMap<SocketId, Owner> = HashMap::new();
    for event in events {
        match event {
            Event::Connect {
                socket,
                tuple,
                owner,
                ..
            } => {
                current.remove(&socket.id);
                if tuple.remote_port != port {
                    continue;
                }
                let mut life = Life::new(socket.id, true, *tuple);
                life.connected_by = Some(*owner);
                life.netns.push(socket.netns);
                life.changes.push((CLOSE, SYN_SENT));
                current.insert(socket.id, lives.len());
                lives.push(life);
            }
            Event::Open {
                socket,
                tuple,
                old,
                new,
                ..
            } => {
                let at = match current.get(&socket.id) {
                    Some(at) => *at,
                    None if tuple.local_port == port => {
                        let mut life = Life::new(socket.id, false, *tuple);
                        life.accepted_by = accepts.remove(&socket.id);
                        current.insert(socket.id, lives.len());
                        lives.push(life);
                        lives.len() - 1
                    }
                    None => continue,
                };
                lives[at].tuple = *tuple;
                lives[at].netns.push(socket.netns);
                lives[at].changes.push((*old, *new));
            }
            Event::Restore { socket, tuple } => {
                if let Some(at) = current.get(&socket.id) {
                    lives[*at].restored = true;
                    lives[*at].tuple = *tuple;
                    lives[*at].netns.push(socket.netns);
                }
            }
            Event::Change {
                socket, old, new, ..
            } => {
                if let Some(at) = current.get(&socket.id) {
                    lives[*at].netns.push(socket.netns);
                    lives[*at].changes.push((*old, *new));
                }
            }
            Event::Close {
                socket,
                old,
                error,
                segments_out,
                shut_down,
                traffic,
                ..
            } => {
                accepts.remove(&socket.id);
                if let Some(at) = current.remove(&socket.id) {
                    let life = &mut lives[at];
                    life.changes.push((*old, CLOSE));
                    life.netns.push(socket.netns);
                    life.error = *error;
                    life.segments = *segments_out;
                    life.shut_down = *shut_down;
                    life.traffic = *traffic;
                    life.closed = true;
                }
            }
            Event::Accept { id, owner, .. } => match current.get(id) {
                Some(at) => lives[*at].accepted_by = Some(*owner),
                // Before its handshake ended (Fast Open).
                None => {
                    accepts.insert(*id, *owner);
                }
            },
            Event::ConnectSent { id, .. } => {
                if let Some(at) = current.get(id) {
                    lives[*at].sent_later = true;
                }
            }
            Event::Listen { .. } | Event::Unlisten { .. } => {}
        }
    }
    lives
}

/// Those that connected.
pub fn active(lives: &[Life]) -> impl Iterator<Item = &Life> {
    lives.iter().filter(|life| life.active)
}

/// Those that came in.
pub fn passive(lives: &[Life]) -> impl Iterator<Item = &Life> {
    lives.iter().filter(|life| !life.active)
}

impl Life {
    fn new(id: SocketId, active: bool, tuple: Tuple) -> Self {
        Self {
            active,
            changes: Vec::new(),
            tuple,
            netns: Vec::new(),
            connected_by: None,
            accepted_by: None,
            sent_later: false,
            restored: false,
            traffic: None,
            error: 0,
            segments: None,
            shut_down: false,
            closed: false,
            id,
        }
    }
}

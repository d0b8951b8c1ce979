//! The wire contract between connmon's kernel side and its agent: record
//! layouts, map names and TCP states, each defined here alone.
//!
//! Every record is `repr(C)`, made of integers with explicit padding, and its
//! size, alignment and offsets are asserted at compile time.
#![no_std]
#![forbid(unsafe_code)]

pub mod tuning;
pub mod wire;

/// TCP states as the kernel numbers them (`include/net/tcp_states.h`).
pub mod state {
    /// Connection open, data may flow.
    pub const ESTABLISHED: u8 = 1;
    /// Active open: SYN sent.
    pub const SYN_SENT: u8 = 2;
    /// Passive open: child socket before the end of its handshake.
    pub const SYN_RECV: u8 = 3;
    /// Closed locally, FIN sent.
    pub const FIN_WAIT1: u8 = 4;
    /// FIN acknowledged, peer still open.
    pub const FIN_WAIT2: u8 = 5;
    /// A minisock; never a state of a full socket.
    pub const TIME_WAIT: u8 = 6;
    /// No connection.
    pub const CLOSE: u8 = 7;
    /// Closed by the peer, not yet locally.
    pub const CLOSE_WAIT: u8 = 8;
    /// Closed by the peer first, then locally, FIN sent.
    pub const LAST_ACK: u8 = 9;
    /// Listening socket.
    pub const LISTEN: u8 = 10;
    /// Both sides closed at once.
    pub const CLOSING: u8 = 11;
    /// Request socket; seen in dumps only.
    pub const NEW_SYN_RECV: u8 = 12;
}

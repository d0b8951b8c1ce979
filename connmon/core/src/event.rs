//! Ring buffer bytes → [`Event`]: a total function, no unsafe.

mod decode;

pub use decode::{LiveSocket, Undecodable, decode, decode_live};

use std::net::{IpAddr, SocketAddr};

/// Address of the kernel's `struct sock`: identity of a socket within the
/// event stream (kernel reuses it only after CLOSE was reported).
pub type SocketId = u64;

/// The kernel's socket cookie (`sk->__sk_common.skc_cookie`), never reused;
/// 0 when the kernel has not generated one yet.
pub type Cookie = u64;

/// Inode number of a network namespace.
pub type NetnsId = u32;

/// Both ends of a connection, v4-mapped addresses already unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Local address.
    pub local: IpAddr,
    /// Local port, host order; 0 while an active open has none yet.
    pub local_port: u16,
    /// Remote address.
    pub remote: IpAddr,
    /// Remote port, host order.
    pub remote_port: u16,
}

impl Tuple {
    /// Local end.
    pub fn local_endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.local, self.local_port)
    }

    /// Remote end.
    pub fn remote_endpoint(&self) -> SocketAddr {
        SocketAddr::new(self.remote, self.remote_port)
    }
}

/// Which socket an event is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// `struct sock` address.
    pub id: SocketId,
    /// Cookie, or 0.
    pub cookie: Cookie,
    /// Namespace inode; 0 when the rung cannot tell.
    pub netns: NetnsId,
}

/// The task that owns a socket, where the kernel context can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Owner {
    /// Thread group id (what user space calls pid) in the initial pid
    /// namespace; 0 when unknown.
    pub pid: u32,
    /// `comm` of the process, not of the thread that ran; NUL padded, else
    /// any bytes.
    pub comm: [u8; 16],
    /// cgroup v2 id; 0 when not collected.
    pub cgroup: u64,
}

/// TCP figures of one socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Payload bytes received, FIN not counted.
    pub received_bytes: u64,
    /// Payload bytes sent, each once; one more if the connection was opened by
    /// connect(), for its SYN, which the kernel counts and of which nothing in
    /// a socket tells. See [`Traffic::sent_payload`].
    pub sent_bytes: u64,
    /// Segments retransmitted (`total_retrans`).
    pub retransmitted_segments: u32,
    /// Smoothed round-trip time in microseconds; 0 when there is none.
    pub srtt_us: u32,
}

/// What the SYN of an active open adds to [`Traffic::sent_bytes`].
pub const SYN_BYTES: u64 = 1;

impl Traffic {
    /// Payload bytes sent by a connection that was opened here by connect()
    /// (`active`), or that was not.
    pub fn sent_payload(&self, active: bool) -> u64 {
        let syn = if active { SYN_BYTES } else { 0 };
        self.sent_bytes.saturating_sub(syn)
    }
}

/// One thing the kernel reported. Times are CLOCK_MONOTONIC nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// CLOSE → SYN_SENT: an active open begins.
    Connect {
        /// Socket.
        socket: Socket,
        /// When.
        at_ns: u64,
        /// Endpoints; the local port may still be 0.
        tuple: Tuple,
        /// The connecting task.
        owner: Owner,
    },
    /// `tcp_connect` for a connect() that was deferred (Fast Open): the SYN
    /// leaves now.
    ConnectSent {
        /// `struct sock` address.
        id: SocketId,
        /// When.
        at_ns: u64,
        /// The task that wrote.
        owner: Owner,
    },
    /// First entry to a state outside SYN_SENT, SYN_RECV, CLOSE and LISTEN.
    Open {
        /// Socket.
        socket: Socket,
        /// When.
        at_ns: u64,
        /// Endpoints.
        tuple: Tuple,
        /// SYN_SENT or SYN_RECV.
        old: u8,
        /// ESTABLISHED, or with Fast Open FIN_WAIT1 or CLOSE_WAIT.
        new: u8,
    },
    /// A connection that was opened elsewhere is restored here, ESTABLISHED
    /// (`TCP_REPAIR`). Its connect() was no active open, though an
    /// [`Event::Connect`] came.
    Restore {
        /// Socket.
        socket: Socket,
        /// Endpoints.
        tuple: Tuple,
    },
    /// A later change between open states (usually out of ESTABLISHED).
    Change {
        /// Socket.
        socket: Socket,
        /// Endpoints.
        tuple: Tuple,
        /// State left.
        old: u8,
        /// State entered.
        new: u8,
    },
    /// Anything but LISTEN → CLOSE.
    Close {
        /// Socket.
        socket: Socket,
        /// When.
        at_ns: u64,
        /// Endpoints; the local port may be 0 for a connect that never had one.
        tuple: Tuple,
        /// State left.
        old: u8,
        /// `sk_err`: 0 or a positive errno. Also 0 where the rung cannot read
        /// it, and then `segments_out` is `None`.
        error: u32,
        /// Segments sent, `None` where the rung cannot read it.
        segments_out: Option<u32>,
        /// From SYN_SENT: whether the socket was shut down in both directions,
        /// as close() does and a connect() that fails does not. False from any
        /// other state, and where the rung cannot read it.
        shut_down: bool,
        /// Final figures, `None` where the rung cannot read them.
        traffic: Option<Traffic>,
    },
    /// CLOSE → LISTEN.
    Listen {
        /// Socket.
        socket: Socket,
        /// Local address (unspecified for a wildcard listener).
        address: IpAddr,
        /// Local port.
        port: u16,
        /// The listening task.
        owner: Owner,
    },
    /// LISTEN → CLOSE.
    Unlisten {
        /// Socket.
        socket: Socket,
        /// Local address.
        address: IpAddr,
        /// Local port.
        port: u16,
    },
    /// `inet_csk_accept` returned this socket.
    Accept {
        /// `struct sock` address of the child.
        id: SocketId,
        /// When.
        at_ns: u64,
        /// The accepting task.
        owner: Owner,
    },
}

//! Ring buffer bytes → [`Event`]. Decoding is a total function.

mod decode;

pub use decode::{LiveSocket, Undecodable, decode, decode_live};

use std::net::{IpAddr, SocketAddr};

/// Address of the kernel's `struct sock`. Identifies a socket within the event
/// stream: the kernel reuses it only after CLOSE was reported.
pub type SocketId = u64;

/// The kernel's socket cookie (`sk->__sk_common.skc_cookie`), never reused;
/// 0 if the kernel has not generated one yet.
pub type Cookie = u64;

/// Inode number of a network namespace.
pub type NetnsId = u32;

/// Both ends of a connection. IPv4-mapped addresses are IPv4.
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

/// The socket of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// `struct sock` address.
    pub id: SocketId,
    /// Cookie, or 0.
    pub cookie: Cookie,
    /// Inode of the network namespace; 0 if the method cannot read it.
    pub netns: NetnsId,
}

/// The process that connects, listens or accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Owner {
    /// Thread group id (what user space calls pid) in the initial pid
    /// namespace; 0 if unknown.
    pub pid: u32,
    /// `comm` of the process, not of the thread; NUL padded, else any bytes.
    pub comm: [u8; 16],
    /// cgroup v2 id; 0 if not collected.
    pub cgroup: u64,
}

/// Bytes, retransmissions and RTT of one socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Payload bytes received, FIN not counted.
    pub received_bytes: u64,
    /// Payload bytes sent, each once; one more if the connection was opened by
    /// connect(), since the kernel counts its SYN and the socket does not show
    /// how it was opened. See [`Traffic::sent_payload`].
    pub sent_bytes: u64,
    /// Segments retransmitted (`total_retrans`).
    pub retransmitted_segments: u32,
    /// Smoothed round-trip time in microseconds; 0 if there is none.
    pub srtt_us: u32,
}

/// Bytes that the SYN of an active open adds to [`Traffic::sent_bytes`].
pub const SYN_BYTES: u64 = 1;

impl Traffic {
    /// Payload bytes sent by a connection; `active` if it was opened by connect()
    /// on this host.
    pub fn sent_payload(&self, active: bool) -> u64 {
        let syn = if active { SYN_BYTES } else { 0 };
        self.sent_bytes.saturating_sub(syn)
    }
}

/// What one record reports. Times are CLOCK_MONOTONIC nanoseconds.
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
    /// `tcp_connect` for a connect() whose SYN was deferred (Fast Open) and is
    /// sent now.
    ConnectSent {
        /// `struct sock` address.
        id: SocketId,
        /// When.
        at_ns: u64,
        /// The task that wrote first.
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
    /// (`TCP_REPAIR`). The [`Event::Connect`] before it was no active open.
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
        /// Endpoints; the local port is 0 if a connect never had one.
        tuple: Tuple,
        /// State left.
        old: u8,
        /// `sk_err`: 0 or a positive errno. Also 0 if the method cannot read it;
        /// then `segments_out` is `None`.
        error: u32,
        /// Segments sent; `None` if the method cannot read it.
        segments_out: Option<u32>,
        /// Whether the socket was shut down in both directions, as close() does
        /// and a failed connect() does not. Read only from SYN_SENT, else false.
        shut_down: bool,
        /// Final values; `None` if the method cannot read them.
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

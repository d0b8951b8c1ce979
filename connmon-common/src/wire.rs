//! The records of the event ring buffer and of the socket scan.
//!
//! The size of a record follows from its [`kind`] and from [`flag::V6`]. All
//! integers are in host order. Addresses are the bytes of the packet, held in
//! words so that a program can build a record without loops.

use core::mem::{align_of, offset_of, size_of};

/// What a record reports. 0 is not used, so that a zeroed record is invalid.
pub mod kind {
    /// CLOSE → SYN_SENT, as [`super::Connect`].
    pub const CONNECT: u8 = 1;
    /// {SYN_SENT, SYN_RECV} → any state outside {SYN_SENT, SYN_RECV, CLOSE,
    /// LISTEN}, as [`super::Open`].
    pub const OPEN: u8 = 2;
    /// ESTABLISHED → another state that is not CLOSE, as [`super::Change`].
    pub const CHANGE: u8 = 3;
    /// Anything but LISTEN → CLOSE, as [`super::Close`].
    pub const CLOSE: u8 = 4;
    /// CLOSE → LISTEN, as [`super::Listen`].
    pub const LISTEN: u8 = 5;
    /// LISTEN → CLOSE, as [`super::Change`].
    pub const UNLISTEN: u8 = 6;
    /// A deferred Fast Open SYN is sent, as [`super::Task`].
    pub const CONNECT_SENT: u8 = 7;
    /// `inet_csk_accept` returned a socket, as [`super::Task`].
    pub const ACCEPT: u8 = 8;
    /// A socket that exists, as [`super::Live`]; from the socket scan, never in
    /// the ring.
    pub const LIVE: u8 = 9;
    /// SYN_SENT → ESTABLISHED of a connection that was opened elsewhere and is
    /// restored here (`TCP_REPAIR`), as [`super::Change`].
    pub const RESTORE: u8 = 10;
}

/// Bits of [`Head::flags`].
pub mod flag {
    /// The endpoints are a [`super::EndsV6`], else a [`super::EndsV4`].
    pub const V6: u8 = 1;
    /// `error` and `segments_out` of a [`super::Close`] were read.
    pub const ERROR: u8 = 2;
    /// Bytes, retransmissions and RTT of a [`super::Close`] or [`super::Live`]
    /// were read.
    pub const TRAFFIC: u8 = 4;
    /// The socket of a [`super::Close`] from SYN_SENT was shut down in both
    /// directions (`sk_shutdown`). close() does that first; a failed connect()
    /// does not.
    pub const SHUT_DOWN: u8 = 8;
    /// Every bit in use.
    pub const ALL: u8 = V6 | ERROR | TRAFFIC | SHUT_DOWN;
}

/// The start of every record.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Head {
    /// See [`kind`].
    pub kind: u8,
    /// See [`flag`].
    pub flags: u8,
    /// State left; 0 in [`Task`] records.
    pub old: u8,
    /// State entered; 0 in [`Task`] records.
    pub new: u8,
    /// Inode of the network namespace; 0 if it cannot be read.
    pub netns: u32,
    /// Address of the `struct sock`.
    pub id: u64,
    /// `sk->__sk_common.skc_cookie`; 0 if there is none yet or it cannot be read.
    pub cookie: u64,
}

/// Endpoints, with addresses as a word or words in network order.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ends<A> {
    /// Local address.
    pub local: A,
    /// Remote address.
    pub remote: A,
    /// Local port, host order.
    pub local_port: u16,
    /// Remote port, host order.
    pub remote_port: u16,
    /// Zero.
    pub pad: u32,
}

/// Endpoints of an IPv4 connection, v4-mapped ones included.
pub type EndsV4 = Ends<u32>;
/// Endpoints of an IPv6 connection.
pub type EndsV6 = Ends<[u64; 2]>;

/// The task in whose context the program ran.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Owner {
    /// cgroup v2 id; 0 unless collected.
    pub cgroup: u64,
    /// `comm` of the thread group leader, the name of the process. It ends at
    /// its first NUL; any bytes may follow.
    pub comm: [u8; 16],
    /// Thread group id in the initial pid namespace.
    pub pid: u32,
    /// Zero.
    pub pad: u32,
}

/// Statistics of a socket, until it closed or until now.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Stats {
    /// Payload bytes received, FIN not counted.
    pub received_bytes: u64,
    /// Payload bytes sent, each once, and 1 for the SYN of an active open.
    pub sent_bytes: u64,
    /// `total_retrans`.
    pub retransmitted_segments: u32,
    /// `srtt_us >> 3`: smoothed round-trip time in microseconds.
    pub srtt_us: u32,
    /// `segs_out`.
    pub segments_out: u32,
    /// `sk_err`: 0 or a positive errno.
    pub error: u32,
}

/// [`kind::CONNECT`]. The local port may still be 0.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Connect<E> {
    /// Common part.
    pub head: Head,
    /// CLOCK_MONOTONIC nanoseconds.
    pub at_ns: u64,
    /// Caller of `connect()`.
    pub owner: Owner,
    /// Endpoints.
    pub ends: E,
}

/// [`kind::OPEN`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Open<E> {
    /// Common part.
    pub head: Head,
    /// CLOCK_MONOTONIC nanoseconds.
    pub at_ns: u64,
    /// Endpoints.
    pub ends: E,
}

/// [`kind::CHANGE`], [`kind::UNLISTEN`] and [`kind::RESTORE`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Change<E> {
    /// Common part.
    pub head: Head,
    /// Endpoints.
    pub ends: E,
}

/// [`kind::CLOSE`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Close<E> {
    /// Common part.
    pub head: Head,
    /// CLOCK_MONOTONIC nanoseconds.
    pub at_ns: u64,
    /// Statistics.
    pub stats: Stats,
    /// Endpoints. The local port is 0 for a connect that never had one.
    pub ends: E,
}

/// [`kind::LISTEN`]. The local end is the listener, the remote end is zero.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Listen<E> {
    /// Common part.
    pub head: Head,
    /// Caller of `listen()`.
    pub owner: Owner,
    /// Endpoints.
    pub ends: E,
}

/// [`kind::CONNECT_SENT`] and [`kind::ACCEPT`].
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// Common part; netns and cookie are 0.
    pub head: Head,
    /// CLOCK_MONOTONIC nanoseconds.
    pub at_ns: u64,
    /// The running task.
    pub owner: Owner,
}

/// [`kind::LIVE`]. Both states of the head are the current state.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Live<E> {
    /// Common part.
    pub head: Head,
    /// Statistics; `segments_out` and `error` are 0.
    pub stats: Stats,
    /// Endpoints.
    pub ends: E,
}

/// Largest record, bytes.
pub const MAX_RECORD_BYTES: usize = size_of::<Close<EndsV6>>();

const _: () = {
    assert!(align_of::<Head>() == 8 && size_of::<Head>() == 24);
    assert!(offset_of!(Head, kind) == 0 && offset_of!(Head, flags) == 1);
    assert!(offset_of!(Head, old) == 2 && offset_of!(Head, new) == 3);
    assert!(offset_of!(Head, netns) == 4);
    assert!(offset_of!(Head, id) == 8 && offset_of!(Head, cookie) == 16);

    assert!(align_of::<EndsV4>() == 4 && size_of::<EndsV4>() == 16);
    assert!(offset_of!(EndsV4, remote) == 4 && offset_of!(EndsV4, local_port) == 8);
    assert!(align_of::<EndsV6>() == 8 && size_of::<EndsV6>() == 40);
    assert!(offset_of!(EndsV6, remote) == 16 && offset_of!(EndsV6, local_port) == 32);
    assert!(size_of::<Stats>() == 32 && offset_of!(Stats, error) == 28);
    assert!(size_of::<Owner>() == 32 && offset_of!(Owner, pid) == 24);

    assert!(size_of::<Connect<EndsV4>>() == 80 && size_of::<Connect<EndsV6>>() == 104);
    assert!(offset_of!(Connect<EndsV4>, ends) == offset_of!(Connect<EndsV6>, ends));
    assert!(size_of::<Open<EndsV4>>() == 48 && size_of::<Open<EndsV6>>() == 72);
    assert!(offset_of!(Open<EndsV4>, ends) == 32 && offset_of!(Open<EndsV6>, ends) == 32);
    assert!(size_of::<Change<EndsV4>>() == 40 && size_of::<Change<EndsV6>>() == 64);
    assert!(size_of::<Close<EndsV4>>() == 80 && size_of::<Close<EndsV6>>() == 104);
    assert!(offset_of!(Close<EndsV4>, ends) == 64 && offset_of!(Close<EndsV6>, ends) == 64);
    assert!(size_of::<Listen<EndsV4>>() == 72 && size_of::<Listen<EndsV6>>() == 96);
    assert!(size_of::<Task>() == 64);
    assert!(size_of::<Live<EndsV4>>() == 72 && size_of::<Live<EndsV6>>() == 96);
    assert!(offset_of!(Live<EndsV4>, ends) == 56 && offset_of!(Live<EndsV6>, ends) == 56);
    // No record has hidden padding: each size is the sum of its parts, and a
    // multiple of the ring buffer's 8 bytes.
    assert!(MAX_RECORD_BYTES == 104);
};

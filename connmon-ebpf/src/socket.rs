//! The identity of a socket: addresses, ports, namespace, cookie; and which
//! sockets the filters leave out.

use core::mem::offset_of;
use core::ptr::read_volatile;

use connmon_common::tuning::{Field, SetState, SockCommon};

use crate::globals::{DROP_LOOPBACK, ONLY_NETNS, offset};
use crate::memory::{Address, BtfPointer, Memory};

/// `AF_INET`.
pub const AF_INET: u16 = 2;
/// `AF_INET6`.
pub const AF_INET6: u16 = 10;

/// `IPPROTO_TCP`: not SCTP, DCCP or the main socket of MPTCP.
pub const IPPROTO_TCP: u16 = 6;

/// The two words of `::1`.
const V6_LOOPBACK: [u64; 2] = [0, 1u64.to_be()];
/// The third 4 bytes of `::ffff:0:0/96`.
const V4_MAPPED: u32 = 0xffff_u32.to_be();

/// What the state program reads of a socket.
pub trait Socket {
    /// How kernel memory is read.
    type Memory: Memory;
    /// The `struct sock`.
    fn sock(&self) -> Self::Memory;
    /// The address of the `struct sock`.
    fn id(&self) -> u64;
    /// `IPPROTO_*`.
    fn protocol(&self) -> u16;
    /// Address family.
    fn family(&self) -> u16;
    /// IPv4 addresses: local, remote. Valid for v4-mapped sockets too.
    fn v4(&self) -> (u32, u32);
    /// IPv6 local address.
    fn v6_local(&self) -> [u64; 2];
    /// IPv6 remote address.
    fn v6_remote(&self) -> [u64; 2];
    /// Local port, which may be 0, and remote port, in host order.
    fn ports(&self) -> (u16, u16);
}

/// `struct sock *`, as an argument of tp_btf.
impl Socket for BtfPointer {
    type Memory = Self;

    #[inline(always)]
    fn sock(&self) -> Self {
        *self
    }

    #[inline(always)]
    fn id(&self) -> u64 {
        self.0 as u64
    }

    #[inline(always)]
    fn protocol(&self) -> u16 {
        // SAFETY: a u16 since 5.6, offset from BTF.
        unsafe { self.read(offset(Field::SkProtocol)) }
    }

    #[inline(always)]
    fn family(&self) -> u16 {
        // SAFETY: here and below, the loader compared `SockCommon` with BTF.
        unsafe { self.read(offset_of!(SockCommon, family)) }
    }

    #[inline(always)]
    fn v4(&self) -> (u32, u32) {
        // SAFETY: as in `family`.
        let pair: u64 = unsafe { self.read(offset_of!(SockCommon, addresses)) };
        ((pair >> 32) as u32, pair as u32)
    }

    #[inline(always)]
    fn v6_local(&self) -> [u64; 2] {
        // SAFETY: as in `family`.
        unsafe { self.read(offset_of!(SockCommon, v6_rcv_saddr)) }
    }

    #[inline(always)]
    fn v6_remote(&self) -> [u64; 2] {
        // SAFETY: as in `family`.
        unsafe { self.read(offset_of!(SockCommon, v6_daddr)) }
    }

    #[inline(always)]
    fn ports(&self) -> (u16, u16) {
        // SAFETY: as in `family`.
        unsafe {
            let remote = u16::from_be(self.read(SockCommon::DPORT));
            (self.read(SockCommon::NUM), remote)
        }
    }
}

/// The context of the classic tracepoint.
pub struct TracepointSocket(pub *const SetState);

macro_rules! context {
    ($self:ident.$field:ident) => {
        // SAFETY: the context is a `SetState` (the loader compared the
        // format file); volatile, so that each field is one context load.
        unsafe { read_volatile(core::ptr::addr_of!((*$self.0).$field)) }
    };
}

impl TracepointSocket {
    /// Old and new state.
    #[inline(always)]
    pub fn states(&self) -> (u32, u32) {
        (context!(self.oldstate), context!(self.newstate))
    }
}

impl Socket for TracepointSocket {
    type Memory = Address;

    #[inline(always)]
    fn sock(&self) -> Address {
        Address(self.id())
    }

    #[inline(always)]
    fn id(&self) -> u64 {
        context!(self.skaddr)
    }

    #[inline(always)]
    fn protocol(&self) -> u16 {
        context!(self.protocol)
    }

    #[inline(always)]
    fn family(&self) -> u16 {
        context!(self.family)
    }

    #[inline(always)]
    fn v4(&self) -> (u32, u32) {
        (context!(self.saddr), context!(self.daddr))
    }

    #[inline(always)]
    fn v6_local(&self) -> [u64; 2] {
        context!(self.saddr_v6)
    }

    #[inline(always)]
    fn v6_remote(&self) -> [u64; 2] {
        context!(self.daddr_v6)
    }

    #[inline(always)]
    fn ports(&self) -> (u16, u16) {
        (context!(self.sport), context!(self.dport))
    }
}

/// Inode of the network namespace; 0 if offsets are not known.
#[inline(always)]
pub fn netns<M: Memory>(sock: M) -> u32 {
    if !M::offsets_known() {
        return 0;
    }
    // SAFETY: compared by the loader; the namespace outlives its sockets.
    unsafe {
        let net: M = sock.read(offset_of!(SockCommon, net));
        net.read(offset(Field::NetInum))
    }
}

/// Cookie; 0 if there is none yet or offsets are not known.
#[inline(always)]
pub fn cookie<M: Memory>(sock: M) -> u64 {
    if !M::offsets_known() {
        return 0;
    }
    // SAFETY: compared by the loader.
    unsafe { sock.read(offset_of!(SockCommon, cookie)) }
}

/// Whether the socket is in repair (`TCP_REPAIR`): a connection is being
/// restored, with queues and sequence numbers from elsewhere.
#[inline(always)]
pub fn is_in_repair<M: Memory>(tcp: Option<M>) -> bool {
    let bit = offset(Field::Repair);
    // SAFETY: offset from BTF; the verifier lets the byte of a bit field be
    // read.
    tcp.is_some_and(|tcp| unsafe { tcp.read::<u8>(bit / 8) } >> (bit % 8) & 1 != 0)
}

/// Local port, host order. An autobound socket has given up its port before it
/// closes (`inet_put_port`), but `inet_sport` still has it.
#[inline(always)]
pub fn former_port<M: Memory>(port: u16, tcp: Option<M>) -> u16 {
    match tcp {
        // SAFETY: a u16, offset from BTF.
        Some(tcp) if port == 0 => u16::from_be(unsafe { tcp.read(offset(Field::InetSport)) }),
        _ => port,
    }
}

/// Whether `tcp_connect` sends a Fast Open SYN: then connect() may have
/// returned long ago. True if offsets are not known.
#[inline(always)]
pub fn has_fastopen_request<M: Memory>(sock: M) -> bool {
    // SAFETY: a pointer, offset from BTF.
    sock.tcp_sock()
        .is_none_or(|tcp| unsafe { tcp.read::<u64>(offset(Field::FastopenReq)) } != 0)
}

/// Whether the filters leave the socket at this address out.
#[inline(always)]
pub fn is_filtered(id: u64) -> bool {
    let sock = Address(id);
    if !Address::offsets_known() {
        return false;
    }
    if ONLY_NETNS.load() != 0 && netns(sock) != ONLY_NETNS.load() {
        return true;
    }
    if DROP_LOOPBACK.load() == 0 {
        return false;
    }
    // SAFETY: integers, and the loader compared `SockCommon` with BTF.
    unsafe {
        let pair: u64 = sock.read(offset_of!(SockCommon, addresses));
        let family: u16 = sock.read(offset_of!(SockCommon, family));
        if family == AF_INET {
            return is_loopback_v4((pair >> 32) as u32, pair as u32);
        }
        let remote: [u64; 2] = sock.read(offset_of!(SockCommon, v6_daddr));
        let local: [u64; 2] = sock.read(offset_of!(SockCommon, v6_rcv_saddr));
        if is_v4_mapped(remote) {
            return is_loopback_v4((pair >> 32) as u32, pair as u32);
        }
        is_loopback_v6(local, remote)
    }
}

/// Whether `address` is in `::ffff:0:0/96`.
#[inline(always)]
pub fn is_v4_mapped(address: [u64; 2]) -> bool {
    address[0] == 0 && address[1] as u32 == V4_MAPPED
}

/// 127.0.0.0/8, or both addresses the same.
#[inline(always)]
pub fn is_loopback_v4(local: u32, remote: u32) -> bool {
    (remote & 0xff_u32) == 127 || local == remote
}

/// `::1`, or both addresses the same. Not for v4-mapped addresses.
#[inline(always)]
pub fn is_loopback_v6(local: [u64; 2], remote: [u64; 2]) -> bool {
    (remote[0] == V6_LOOPBACK[0] && remote[1] == V6_LOOPBACK[1])
        || (local[0] == remote[0] && local[1] == remote[1])
}

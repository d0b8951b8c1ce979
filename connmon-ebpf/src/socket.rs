//! Reading the kernel's sockets: the one place that does.
//!
//! A program sees a socket in one of two ways: as a BTF pointer that may be
//! dereferenced ([`BtfSocket`], in tp_btf), or as the context of the classic
//! tracepoint plus an address that only `bpf_probe_read_kernel` reads
//! ([`TracedSocket`]). Offsets beyond `struct sock_common` are globals which
//! the loader takes from the kernel's BTF.

use core::ffi::c_void;
use core::mem::MaybeUninit;
use core::ptr::{addr_of_mut, read_volatile};

use aya_ebpf::Global;
use aya_ebpf::helpers::generated::{
    bpf_jiffies64, bpf_ktime_get_ns, bpf_probe_read_kernel, bpf_skc_to_tcp_sock,
};
use connmon_common::state::{CLOSING, FIN_WAIT1, FIN_WAIT2, LAST_ACK, SYN_SENT};
use connmon_common::tuning::sock_common;
use connmon_common::tuning::tracepoint::SetState;
use connmon_common::wire::{EndsV4, EndsV6, Stats, flag};

use crate::emit::zero;
use crate::globals::{
    BIT_REPAIR, DROP_LOOPBACK, OFF_BYTES_ACKED, OFF_BYTES_RECEIVED, OFF_FASTOPEN_REQ,
    OFF_INET_SPORT, OFF_NET_INUM, OFF_RCV_TSTAMP, OFF_SEGS_OUT, OFF_SK_ERR, OFF_SK_FLAGS,
    OFF_SK_PROTOCOL, OFF_SK_SHUTDOWN, OFF_SND_NXT, OFF_SND_UNA, OFF_SRTT_US, OFF_TCP_MSTAMP,
    OFF_TOTAL_RETRANS, OFF_WRITE_SEQ, OFFSETS_KNOWN, ONLY_NETNS, TRAFFIC,
};
use crate::task::{BtfTask, CurrentTask, ProbedTask};

/// `AF_INET`.
pub const AF_INET: u16 = 2;
/// `AF_INET6`.
pub const AF_INET6: u16 = 10;

const IPPROTO_TCP: u16 = 6;

/// Bit of `sk_flags` that `tcp_fin()` sets (`enum sock_flags`): the peer's
/// FIN was received, and `bytes_received` counts it.
const SOCK_DONE: u64 = 1 << 1;

/// `SHUTDOWN_MASK` of `sk_shutdown`: no more is received and none is sent.
const BOTH_WAYS: u8 = 3;

/// First 8 bytes of `::1`, and the second.
const V6_LOOPBACK: [u64; 2] = [0, 1u64.to_be()];
/// Second word of `::ffff:0:0/96`, bytes in network order.
const V4_MAPPED: u32 = 0xffff_u32.to_be();

/// What the state program asks of a socket.
pub trait Socket {
    /// Address of the `struct sock`.
    fn id(&self) -> u64;
    /// Whether it is a TCP socket (not SCTP, DCCP or the MPTCP main socket).
    fn is_tcp(&self) -> bool;
    /// Address family.
    fn family(&self) -> u16;
    /// IPv4 addresses: local, remote. Valid for v4-mapped sockets too.
    fn v4(&self) -> (u32, u32);
    /// IPv6 remote address.
    fn v6_remote(&self) -> [u64; 2];
    /// IPv6 local address.
    fn v6_local(&self) -> [u64; 2];
    /// Local port, which may be 0, and remote port, in host order.
    fn ports(&self) -> (u16, u16);
    /// Inode of the network namespace, or 0.
    fn netns(&self) -> u32;
    /// Cookie, or 0. Never generates one.
    fn cookie(&self) -> u64;
    /// The full socket, for what lies past `struct sock`. A helper call for
    /// one kind of socket: ask once.
    fn full(&self) -> Self::Full;
    /// See [`Socket::full`].
    type Full: FullSocket;
    /// How the running task is read beside it.
    type Task: CurrentTask;
    /// `sk_err` and `sk_flags`; meaningless where [`FullSocket`] knows
    /// nothing.
    fn error_and_flags(&self) -> (u32, u64);
    /// `sk_shutdown`; meaningless as above.
    fn shutdown(&self) -> u8;
}

/// A `struct tcp_sock`.
pub trait FullSocket {
    /// Whether there is something to be read.
    fn is_known(&self) -> bool;
    /// The 8 bytes at an offset.
    fn wide(&self, offset: usize) -> u64;
    /// The 4 bytes at an offset.
    fn narrow(&self, offset: usize) -> u32;
    /// The 2 bytes at an offset.
    fn short(&self, offset: usize) -> u16;
    /// The byte at an offset.
    fn byte(&self, offset: usize) -> u8;
    /// CLOCK_MONOTONIC nanoseconds, now or when the packet that is being
    /// handled arrived.
    fn now(&self) -> u64;

    /// Whether the socket is in repair (`TCP_REPAIR`): a connection is being
    /// restored, with queues and sequence numbers from elsewhere.
    #[inline(always)]
    fn is_in_repair(&self) -> bool {
        let bit = offset(&BIT_REPAIR);
        self.is_known() && self.byte(bit / 8) >> (bit % 8) & 1 != 0
    }
}

/// Endpoints of either family.
pub trait Ends: Copy + 'static {
    /// Bits for the head's flags.
    const FLAGS: u8;
    /// Local port, host order.
    fn local_port(&mut self) -> &mut u16;
}

impl Ends for EndsV4 {
    const FLAGS: u8 = 0;

    #[inline(always)]
    fn local_port(&mut self) -> &mut u16 {
        &mut self.local_port
    }
}

impl Ends for EndsV6 {
    const FLAGS: u8 = flag::V6;

    #[inline(always)]
    fn local_port(&mut self) -> &mut u16 {
        &mut self.local_port
    }
}

/// Whether `address` is in `::ffff:0:0/96`.
#[inline(always)]
pub fn is_v4_mapped(address: [u64; 2]) -> bool {
    address[0] == 0 && address[1] as u32 == V4_MAPPED
}

/// 127.0.0.0/8, or both ends the same.
#[inline(always)]
pub fn is_loopback_v4(local: u32, remote: u32) -> bool {
    (remote & 0xff_u32) == 127 || local == remote
}

/// `::1`, or both ends the same. A v4-mapped address is not looked into.
#[inline(always)]
pub fn is_loopback_v6(local: [u64; 2], remote: [u64; 2]) -> bool {
    (remote[0] == V6_LOOPBACK[0] && remote[1] == V6_LOOPBACK[1])
        || (local[0] == remote[0] && local[1] == remote[1])
}

/// A `struct sock *` that the verifier knows as such.
pub struct BtfSocket(pub *const u8);

impl BtfSocket {
    /// # Safety
    ///
    /// A `T` must lie at `offset` of the `struct sock`. (A wrong offset is
    /// caught: the verifier compares it with the kernel's BTF.)
    #[inline(always)]
    unsafe fn at<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: the caller's; the kernel turns faults into zeroes.
        unsafe { load(self.0, offset) }
    }
}

impl Socket for BtfSocket {
    #[inline(always)]
    fn id(&self) -> u64 {
        self.0 as u64
    }

    #[inline(always)]
    fn is_tcp(&self) -> bool {
        // SAFETY: `sk_protocol` is a u16 since 5.6, offset from BTF.
        unsafe { self.at::<u16>(offset(&OFF_SK_PROTOCOL)) == IPPROTO_TCP }
    }

    #[inline(always)]
    fn family(&self) -> u16 {
        // SAFETY: asserted by the loader.
        unsafe { self.at(sock_common::FAMILY) }
    }

    #[inline(always)]
    fn v4(&self) -> (u32, u32) {
        // SAFETY: asserted by the loader; skc_addrpair is one u64.
        let pair: u64 = unsafe { self.at(sock_common::ADDRESSES) };
        ((pair >> 32) as u32, pair as u32)
    }

    #[inline(always)]
    fn v6_remote(&self) -> [u64; 2] {
        // SAFETY: asserted by the loader.
        unsafe {
            [
                self.at(sock_common::V6_DADDR),
                self.at(sock_common::V6_DADDR + 8),
            ]
        }
    }

    #[inline(always)]
    fn v6_local(&self) -> [u64; 2] {
        // SAFETY: asserted by the loader.
        unsafe {
            [
                self.at(sock_common::V6_RCV_SADDR),
                self.at(sock_common::V6_RCV_SADDR + 8),
            ]
        }
    }

    #[inline(always)]
    fn ports(&self) -> (u16, u16) {
        // SAFETY: asserted by the loader.
        let remote = u16::from_be(unsafe { self.at(sock_common::DPORT) });
        // SAFETY: asserted by the loader.
        (unsafe { self.at(sock_common::NUM) }, remote)
    }

    #[inline(always)]
    fn netns(&self) -> u32 {
        // SAFETY: asserted by the loader; the namespace outlives its socket.
        unsafe {
            let net: *const u8 = self.at(sock_common::NET);
            load(net, offset(&OFF_NET_INUM))
        }
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        // SAFETY: asserted by the loader.
        unsafe { self.at(sock_common::COOKIE) }
    }

    type Full = BtfFull;
    type Task = BtfTask;

    #[inline(always)]
    fn full(&self) -> BtfFull {
        // SAFETY: helper (5.9) on a BTF socket pointer; `is_known` checks it.
        BtfFull(unsafe { bpf_skc_to_tcp_sock(self.0.cast_mut().cast()) }.cast())
    }

    #[inline(always)]
    fn error_and_flags(&self) -> (u32, u64) {
        // SAFETY: `sk_err` is an int and `sk_flags` (skc_flags) an unsigned
        // long, offsets from BTF.
        unsafe { (self.at(offset(&OFF_SK_ERR)), self.at(offset(&OFF_SK_FLAGS))) }
    }

    #[inline(always)]
    fn shutdown(&self) -> u8 {
        // SAFETY: `sk_shutdown` is a u8, offset from BTF.
        unsafe { self.at(offset(&OFF_SK_SHUTDOWN)) }
    }
}

/// A `struct tcp_sock *`, or NULL.
#[derive(Clone, Copy)]
pub struct BtfFull(*const u8);

impl FullSocket for BtfFull {
    #[inline(always)]
    fn is_known(&self) -> bool {
        !self.0.is_null()
    }

    #[inline(always)]
    fn wide(&self, offset: usize) -> u64 {
        // SAFETY: the verifier wants `is_known` asked before, and compares
        // the offset with the kernel's BTF.
        unsafe { load(self.0, offset) }
    }

    #[inline(always)]
    fn narrow(&self, offset: usize) -> u32 {
        // SAFETY: as in `wide`.
        unsafe { load(self.0, offset) }
    }

    #[inline(always)]
    fn short(&self, offset: usize) -> u16 {
        // SAFETY: as in `wide`.
        unsafe { load(self.0, offset) }
    }

    #[inline(always)]
    fn byte(&self, offset: usize) -> u8 {
        // SAFETY: as in `wide`; the verifier lets bit fields be read so.
        unsafe { load(self.0, offset) }
    }

    /// Reading the clock is a third of what a record costs, and TCP has read
    /// it for the packet that brought this change about: `tcp_mstamp`, in
    /// microseconds. `rcv_tstamp`, the jiffy of the last ACK, tells whether
    /// there was one just now. In repair `tcp_connect_init()` sets the latter
    /// alone, and `tcp_mstamp` is 0.
    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: helper without preconditions (5.5, inlined).
        let jiffies = unsafe { bpf_jiffies64() } as u32;
        if self.is_known() && jiffies == self.narrow(offset(&OFF_RCV_TSTAMP)) {
            let stamp = self.wide(offset(&OFF_TCP_MSTAMP));
            if stamp != 0 {
                return stamp * 1000;
            }
        }
        // SAFETY: helper without preconditions.
        unsafe { bpf_ktime_get_ns() }
    }
}

/// The context of the classic tracepoint.
pub struct TracedSocket(pub *const SetState);

macro_rules! context {
    ($self:ident.$field:ident) => {
        // SAFETY: the context is a `SetState` (the loader compared the
        // format file); volatile, so that each field is one context load.
        unsafe { read_volatile(core::ptr::addr_of!((*$self.0).$field)) }
    };
}

impl Socket for TracedSocket {
    #[inline(always)]
    fn id(&self) -> u64 {
        context!(self.skaddr)
    }

    #[inline(always)]
    fn is_tcp(&self) -> bool {
        context!(self.protocol) == IPPROTO_TCP
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
    fn v6_remote(&self) -> [u64; 2] {
        context!(self.daddr_v6)
    }

    #[inline(always)]
    fn v6_local(&self) -> [u64; 2] {
        context!(self.saddr_v6)
    }

    #[inline(always)]
    fn ports(&self) -> (u16, u16) {
        (context!(self.sport), context!(self.dport))
    }

    #[inline(always)]
    fn netns(&self) -> u32 {
        if OFFSETS_KNOWN.load() == 0 {
            return 0;
        }
        // SAFETY: probe_read checks the addresses.
        unsafe {
            let net: u64 = probe(self.id(), sock_common::NET);
            probe(net, offset(&OFF_NET_INUM))
        }
    }

    #[inline(always)]
    fn cookie(&self) -> u64 {
        if OFFSETS_KNOWN.load() == 0 {
            return 0;
        }
        // SAFETY: probe_read checks the address.
        unsafe { probe(self.id(), sock_common::COOKIE) }
    }

    type Full = TracedFull;
    type Task = ProbedTask;

    #[inline(always)]
    fn full(&self) -> TracedFull {
        TracedFull(self.id())
    }

    #[inline(always)]
    fn error_and_flags(&self) -> (u32, u64) {
        let id = self.id();
        // SAFETY: probe_read checks the address.
        unsafe {
            (
                probe(id, offset(&OFF_SK_ERR)),
                probe(id, offset(&OFF_SK_FLAGS)),
            )
        }
    }

    #[inline(always)]
    fn shutdown(&self) -> u8 {
        // SAFETY: probe_read checks the address.
        unsafe { probe(self.id(), offset(&OFF_SK_SHUTDOWN)) }
    }
}

/// Address of a `struct tcp_sock`.
#[derive(Clone, Copy)]
pub struct TracedFull(pub u64);

impl FullSocket for TracedFull {
    #[inline(always)]
    fn is_known(&self) -> bool {
        OFFSETS_KNOWN.load() != 0
    }

    #[inline(always)]
    fn wide(&self, offset: usize) -> u64 {
        // SAFETY: probe_read checks the address.
        unsafe { probe(self.0, offset) }
    }

    #[inline(always)]
    fn narrow(&self, offset: usize) -> u32 {
        // SAFETY: probe_read checks the address.
        unsafe { probe(self.0, offset) }
    }

    #[inline(always)]
    fn short(&self, offset: usize) -> u16 {
        // SAFETY: probe_read checks the address.
        unsafe { probe(self.0, offset) }
    }

    #[inline(always)]
    fn byte(&self, offset: usize) -> u8 {
        // SAFETY: probe_read checks the address.
        unsafe { probe(self.0, offset) }
    }

    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: helper without preconditions; two reads cost more.
        unsafe { bpf_ktime_get_ns() }
    }
}

/// Whether the filters leave the socket at this address out. For programs
/// that hold an address and no BTF pointer. Reads nothing when nothing is
/// filtered.
#[inline(always)]
pub fn is_filtered(id: u64) -> bool {
    if OFFSETS_KNOWN.load() == 0 {
        return false;
    }
    if ONLY_NETNS.load() != 0 {
        // SAFETY: probe_read checks the addresses.
        let netns: u32 = unsafe {
            let net: u64 = probe(id, sock_common::NET);
            probe(net, offset(&OFF_NET_INUM))
        };
        if netns != ONLY_NETNS.load() {
            return true;
        }
    }
    if DROP_LOOPBACK.load() == 0 {
        return false;
    }
    // SAFETY: probe_read checks the address.
    let pair: u64 = unsafe { probe(id, sock_common::ADDRESSES) };
    // SAFETY: as above.
    let family: u16 = unsafe { probe(id, sock_common::FAMILY) };
    if family == AF_INET {
        return is_loopback_v4((pair >> 32) as u32, pair as u32);
    }
    // SAFETY: as above.
    let (remote, local): ([u64; 2], [u64; 2]) = unsafe {
        (
            probe(id, sock_common::V6_DADDR),
            probe(id, sock_common::V6_RCV_SADDR),
        )
    };
    if is_v4_mapped(remote) {
        return is_loopback_v4((pair >> 32) as u32, pair as u32);
    }
    is_loopback_v6(local, remote)
}

/// Whether `tcp_connect` sends a Fast Open SYN: then connect() may have
/// returned long ago. By BTF pointer.
#[inline(always)]
pub fn has_fastopen_request(sk: *const u8) -> bool {
    // SAFETY: helper on a BTF socket pointer; the result is checked, the
    // offset is from BTF.
    unsafe {
        let tcp = bpf_skc_to_tcp_sock(sk.cast_mut().cast()).cast::<u8>();
        !tcp.is_null() && load::<u64>(tcp, offset(&OFF_FASTOPEN_REQ)) != 0
    }
}

/// The same by address. True where the offset is not known.
#[inline(always)]
pub fn has_fastopen_request_at(id: u64) -> bool {
    // SAFETY: probe_read checks the address.
    OFFSETS_KNOWN.load() == 0 || unsafe { probe::<u64>(id, offset(&OFF_FASTOPEN_REQ)) } != 0
}

/// Writes what a socket that leaves the state `old` for CLOSE counted; which
/// of it could be read is the result, as bits of [`flag`].
///
/// # Safety
///
/// `out` must be valid for writes.
#[inline(always)]
pub unsafe fn write_stats<S: Socket>(
    socket: &S,
    full: &S::Full,
    old: u8,
    out: *mut Stats,
) -> u8 {
    // SAFETY: the caller's.
    unsafe {
        if !full.is_known() {
            zero(out);
            return 0;
        }
        if TRAFFIC.load() == 0 {
            zero(out);
        }
        let (error, flags) = socket.error_and_flags();
        addr_of_mut!((*out).error).write(error);
        addr_of_mut!((*out).segments_out).write(full.narrow(offset(&OFF_SEGS_OUT)));
        let read = if old == SYN_SENT && socket.shutdown() & BOTH_WAYS == BOTH_WAYS {
            flag::ERROR | flag::SHUT_DOWN
        } else {
            flag::ERROR
        };
        if TRAFFIC.load() == 0 {
            return read;
        }
        write_traffic(full, old, flags, out);
        read | flag::TRAFFIC
    }
}

/// Writes what is sampled of a live socket, whose state and `sk_flags` are
/// given; the result as of [`write_figures`].
///
/// # Safety
///
/// As [`write_figures`].
#[inline(always)]
pub unsafe fn write_live_stats(
    full: &impl FullSocket,
    state: u8,
    flags: u64,
    out: *mut Stats,
) -> u8 {
    // SAFETY: the caller's.
    unsafe {
        zero(out);
        if !full.is_known() {
            return 0;
        }
        write_traffic(full, state, flags, out);
    }
    flag::TRAFFIC
}

/// # Safety
///
/// As [`write_figures`], and `full` must be known.
#[inline(always)]
unsafe fn write_traffic(full: &impl FullSocket, state: u8, flags: u64, out: *mut Stats) {
    let fin = u64::from(flags & SOCK_DONE != 0);
    let received = full.wide(offset(&OFF_BYTES_RECEIVED));
    let sent = sent_bytes(full, state);
    let retrans = full.narrow(offset(&OFF_TOTAL_RETRANS));
    // SAFETY: the caller's.
    unsafe {
        addr_of_mut!((*out).received_bytes).write(received - fin);
        addr_of_mut!((*out).sent_bytes).write(sent);
        addr_of_mut!((*out).retransmitted_segments).write(retrans);
        addr_of_mut!((*out).srtt_us).write(full.narrow(offset(&OFF_SRTT_US)) >> 3);
    }
}

/// What was sent, each byte once, and the SYN of an active open: what was
/// acknowledged, and what is on its way. (`bytes_sent` counts a segment again
/// that our own queue or a filter has dropped.) The FIN is left out: it has
/// been sent where nothing is left to send in the states that one leads to.
///
/// In this order, a socket that goes on meanwhile shows too little, not too
/// much: `tcp_snd_una_update()` raises `bytes_acked` and then `snd_una`.
#[inline(always)]
fn sent_bytes(full: &impl FullSocket, state: u8) -> u64 {
    let acked = full.wide(offset(&OFF_BYTES_ACKED));
    let oldest = full.narrow(offset(&OFF_SND_UNA));
    let next = full.narrow(offset(&OFF_SND_NXT));
    let sent = acked + u64::from(next.wrapping_sub(oldest));
    let is_closing = matches!(state, FIN_WAIT1 | FIN_WAIT2 | LAST_ACK | CLOSING);
    if is_closing && full.narrow(offset(&OFF_WRITE_SEQ)) == next {
        sent.saturating_sub(1)
    } else {
        sent
    }
}

/// Local port, host order, of a socket that may have given it up: an
/// autobound one has returned it before it closes (`inet_put_port`), but
/// `inet_sport` still tells.
#[inline(always)]
pub fn former_port(full: &impl FullSocket) -> u16 {
    if full.is_known() {
        u16::from_be(full.short(offset(&OFF_INET_SPORT)))
    } else {
        0
    }
}

#[inline(always)]
pub fn offset(global: &Global<u32>) -> usize {
    global.load() as usize
}

/// One load of a `T`, never merged with its neighbours: the verifier checks
/// each against the kernel's BTF.
///
/// # Safety
///
/// `base` must be a BTF pointer with a `T` at `offset`.
#[inline(always)]
pub unsafe fn load<T: Copy>(base: *const u8, offset: usize) -> T {
    // SAFETY: the caller's.
    unsafe { read_volatile(base.add(offset).cast()) }
}

/// `bpf_probe_read_kernel` (5.5) of a `T`; zeroes when the address is bad.
///
/// # Safety
///
/// Every bit pattern must be a valid `T`.
#[inline(always)]
pub unsafe fn probe<T: Copy>(base: u64, offset: usize) -> T {
    let mut value = MaybeUninit::<T>::uninit();
    let address = base.wrapping_add(offset as u64) as *const c_void;
    // SAFETY: the helper writes exactly `size_of::<T>()` bytes, zeroes on a
    // fault; the rest is the caller's.
    unsafe {
        bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, address);
        value.assume_init()
    }
}

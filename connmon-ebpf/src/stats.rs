//! Statistics of a TCP socket: bytes, retransmissions, RTT, error.

use core::ptr::addr_of_mut;

use connmon_common::state::{CLOSING, FIN_WAIT1, FIN_WAIT2, LAST_ACK, SYN_SENT};
use connmon_common::tuning::Field;
use connmon_common::wire::{Stats, flag};

use crate::globals::{TRAFFIC, offset};
use crate::memory::{Memory, zero};

/// Bit of `sk_flags` that `tcp_fin()` sets (`enum sock_flags`): the peer's
/// FIN was received, and `bytes_received` counts it.
const SOCK_DONE: u64 = 1 << 1;

/// `SHUTDOWN_MASK` of `sk_shutdown`: shut down in both directions.
const SHUTDOWN_MASK: u8 = 3;

/// Writes the statistics of a socket that changes from `old` to CLOSE. The
/// result says which could be read, as bits of [`flag`].
///
/// # Safety
///
/// `out` must be valid for writes; `sock` and `tcp` must be the same socket.
#[inline(always)]
pub unsafe fn write_stats<M: Memory>(sock: M, tcp: Option<M>, old: u8, out: *mut Stats) -> u8 {
    // SAFETY: the caller's; fields of the types that BTF says.
    unsafe {
        let Some(tcp) = tcp else {
            zero(out);
            return 0;
        };
        if TRAFFIC.load() == 0 {
            zero(out);
        }
        addr_of_mut!((*out).error).write(sock.read(offset(Field::SkErr)));
        let flags: u64 = sock.read(offset(Field::SkFlags));
        addr_of_mut!((*out).segments_out).write(tcp.read(offset(Field::SegsOut)));
        let read = if old == SYN_SENT
            && sock.read::<u8>(offset(Field::SkShutdown)) & SHUTDOWN_MASK == SHUTDOWN_MASK
        {
            flag::ERROR | flag::SHUT_DOWN
        } else {
            flag::ERROR
        };
        if TRAFFIC.load() == 0 {
            return read;
        }
        write_traffic(tcp, old, flags, out);
        read | flag::TRAFFIC
    }
}

/// Writes bytes, retransmissions and RTT of a socket in this state and with
/// these `sk_flags`.
///
/// # Safety
///
/// `out` must be valid for writes.
#[inline(always)]
pub unsafe fn write_traffic<M: Memory>(tcp: M, state: u8, flags: u64, out: *mut Stats) {
    // SAFETY: the caller's; fields of the types that BTF says.
    unsafe {
        let fin = u64::from(flags & SOCK_DONE != 0);
        let received: u64 = tcp.read(offset(Field::BytesReceived));
        let sent = sent_bytes(tcp, state);
        let retrans: u32 = tcp.read(offset(Field::TotalRetrans));
        addr_of_mut!((*out).received_bytes).write(received - fin);
        addr_of_mut!((*out).sent_bytes).write(sent);
        addr_of_mut!((*out).retransmitted_segments).write(retrans);
        addr_of_mut!((*out).srtt_us).write(tcp.read::<u32>(offset(Field::SrttUs)) >> 3);
    }
}

/// Bytes sent, each once, and the SYN of an active open: acknowledged bytes
/// and those in flight. (`bytes_sent` counts a segment twice that our own
/// queue or a filter dropped.) The FIN is left out: in a closing state it has
/// been sent if nothing is left to send.
///
/// The order of the reads makes the result too small, not too large, if the
/// socket is in use meanwhile: `tcp_snd_una_update()` raises `bytes_acked`
/// before `snd_una`.
#[inline(always)]
fn sent_bytes<M: Memory>(tcp: M, state: u8) -> u64 {
    // SAFETY: fields of the types that BTF says.
    unsafe {
        let acked: u64 = tcp.read(offset(Field::BytesAcked));
        let oldest: u32 = tcp.read(offset(Field::SndUna));
        let next: u32 = tcp.read(offset(Field::SndNxt));
        let sent = acked + u64::from(next.wrapping_sub(oldest));
        let is_closing = matches!(state, FIN_WAIT1 | FIN_WAIT2 | LAST_ACK | CLOSING);
        if is_closing && tcp.read::<u32>(offset(Field::WriteSeq)) == next {
            sent.saturating_sub(1)
        } else {
            sent
        }
    }
}

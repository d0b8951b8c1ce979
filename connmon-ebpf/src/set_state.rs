//! `inet_sock_set_state`: every change of a TCP socket's state.
//!
//! ```c
//! // include/trace/events/sock.h; called by inet_sk_state_store() and
//! // inet_sk_set_state() (net/ipv4/af_inet.c) before sk_state is stored
//! TP_PROTO(const struct sock *sk, const int oldstate, const int newstate)
//! ```
//!
//! Each method has a second program for what the kernel did not run the first
//! for, see [`misses`]. Not every change becomes a record: LISTEN → SYN_RECV
//! does not (the child has no endpoints yet before 6.18, and its opening shows
//! that it was passive), nor do changes between states after ESTABLISHED.

use core::ptr::addr_of_mut;

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint, tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext, TracePointContext};
use connmon_common::state::{CLOSE, CLOSE_WAIT, ESTABLISHED, LISTEN, SYN_RECV, SYN_SENT};
use connmon_common::tuning::{PerCpu, probe};
use connmon_common::wire::{Change, Close, Connect, Ends, Head, Listen, Open, flag, kind};

use crate::emit::{counters, emit};
use crate::globals::{DROP_LOOPBACK, ONLY_NETNS, OWNERS};
use crate::memory::{BtfPointer, Memory, add_one};
use crate::misses::{self, change};
use crate::socket::{
    AF_INET, AF_INET6, IPPROTO_TCP, Socket, TracepointSocket, cookie, former_port, is_in_repair,
    is_loopback_v4, is_loopback_v6, is_v4_mapped, netns,
};
use crate::stats::write_stats;
use crate::task::write_owner;

/// The preferred method. 5.9, for `bpf_skc_to_tcp_sock`.
#[btf_tracepoint(function = "inet_sock_set_state")]
fn state_tp_btf(ctx: BtfTracePointContext) -> i32 {
    if let Some(counters) = counters() {
        // SAFETY: this CPU's map value.
        unsafe { misses::begin(counters) };
        from_btf(&ctx, counters);
        let change = change(ctx.arg(0), ctx.arg(1), ctx.arg(2));
        // SAFETY: as above.
        unsafe { misses::handled(counters, change) };
    }
    0
}

/// Handles the recursion misses of `state_tp_btf`. Attached after it, since a
/// tracepoint's programs run in the order of attachment. 6.1.
#[btf_tracepoint(function = "inet_sock_set_state")]
fn state_nested(ctx: BtfTracePointContext) -> i32 {
    if let Some(counters) = counters() {
        let change = change(ctx.arg(0), ctx.arg(1), ctx.arg(2));
        // SAFETY: this CPU's map value, and an aligned counter in it.
        unsafe {
            if !misses::take(counters, change) {
                add_one(addr_of_mut!((*counters).recovered));
                from_btf(&ctx, counters);
            }
        }
    }
    0
}

#[inline(always)]
fn from_btf(ctx: &BtfTracePointContext, counters: *mut PerCpu) {
    let (old, new): (i32, i32) = (ctx.arg(1), ctx.arg(2));
    set_state(&BtfPointer(ctx.arg(0)), counters, old as u8, new as u8);
}

/// The fallback. 5.6, for the layout of the context.
#[tracepoint(category = "sock", name = "inet_sock_set_state")]
fn state_tp(ctx: TracePointContext) -> u32 {
    let socket = TracepointSocket(ctx.as_ptr().cast());
    let (old, new) = socket.states();
    if let Some(counters) = counters() {
        // SAFETY: this CPU's map value.
        unsafe { misses::begin(counters) };
        set_state(&socket, counters, old as u8, new as u8);
        let change = change(socket.id(), old as i32, new as i32);
        // SAFETY: as above.
        unsafe { misses::handled(counters, change) };
    }
    0
}

/// Counts the recursion misses of `state_tp`; without BTF it could not read the
/// socket. Attached after it, as above. 4.17.
#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
fn state_lost(ctx: RawTracePointContext) -> i32 {
    if let Some(counters) = counters() {
        let change = change(ctx.arg(0), ctx.arg(1), ctx.arg(2));
        // SAFETY: this CPU's map value, and an aligned counter in it.
        unsafe {
            if !misses::take(counters, change) {
                add_one(addr_of_mut!((*counters).missed));
            }
        }
    }
    0
}

/// The kind of record that a change becomes; 0 for none.
#[inline(always)]
fn kind_of(old: u8, new: u8) -> u8 {
    if old == new {
        // Normal: close() after shutdown(), MPTCP.
        0
    } else if new == CLOSE {
        if old == LISTEN {
            kind::UNLISTEN
        } else {
            kind::CLOSE
        }
    } else if old == ESTABLISHED {
        kind::CHANGE
    } else if old == SYN_SENT || old == SYN_RECV {
        if new == SYN_SENT || new == SYN_RECV {
            0
        } else {
            kind::OPEN
        }
    } else if old == CLOSE {
        if new == SYN_SENT {
            kind::CONNECT
        } else if new == LISTEN {
            kind::LISTEN
        } else {
            0
        }
    } else {
        0
    }
}

#[inline(always)]
fn set_state(socket: &impl Socket, counters: *mut PerCpu, old: u8, new: u8) {
    let kind = kind_of(old, new);
    if kind == 0 || socket.protocol() != IPPROTO_TCP {
        return;
    }
    let netns = netns(socket.sock());
    let only = ONLY_NETNS.load();
    if only != 0 && netns != 0 && netns != only {
        return;
    }
    // Listeners have no remote end, and the inventory needs them all.
    let drop_loopback = DROP_LOOPBACK.load() != 0 && kind != kind::LISTEN && kind != kind::UNLISTEN;
    let family = socket.family();
    if family == AF_INET6 {
        let remote = socket.v6_remote();
        if !is_v4_mapped(remote) {
            let local = socket.v6_local();
            if drop_loopback && is_loopback_v6(local, remote) {
                return;
            }
            send(socket, counters, (kind, old, new), netns, (local, remote));
            return;
        }
    } else if family != AF_INET {
        return;
    }
    let (local, remote) = socket.v4();
    if drop_loopback && is_loopback_v4(local, remote) {
        return;
    }
    send(socket, counters, (kind, old, new), netns, (local, remote));
}

#[inline(always)]
fn send<S: Socket, A: Copy + 'static>(
    socket: &S,
    counters: *mut PerCpu,
    (kind, old, new): (u8, u8, u8),
    netns: u32,
    (local, remote): (A, A),
) {
    let (local_port, remote_port) = socket.ports();
    let ends = Ends {
        local,
        remote,
        local_port,
        remote_port,
        pad: 0,
    };
    let v6 = if size_of::<A>() == 16 { flag::V6 } else { 0 };
    let head = |kind: u8, flags: u8| Head {
        kind,
        flags: flags | v6,
        old,
        new,
        netns,
        id: socket.id(),
        cookie: cookie(socket.sock()),
    };
    // SAFETY: in every arm `record` is the reservation, and every field is
    // written.
    match kind {
        kind::CLOSE => emit::<Close<Ends<A>>>(counters, probe::SET_STATE, |record| unsafe {
            let sock = socket.sock();
            let tcp = sock.tcp_sock();
            let flags = write_stats(sock, tcp, old, addr_of_mut!((*record).stats));
            addr_of_mut!((*record).head).write(head(kind, flags));
            addr_of_mut!((*record).ends).write(Ends {
                local_port: former_port(local_port, tcp),
                ..ends
            });
            // A local abort has no packet whose time could be used.
            let abort = old == ESTABLISHED || old == CLOSE_WAIT;
            let at_ns = if abort {
                bpf_ktime_get_ns()
            } else {
                Memory::now(tcp)
            };
            addr_of_mut!((*record).at_ns).write(at_ns);
        }),
        kind::OPEN => {
            let tcp = socket.sock().tcp_sock();
            if old == SYN_SENT && is_in_repair(tcp) {
                // `tcp_connect()` sends no SYN then, and `tcp_mstamp` is 0.
                emit::<Change<Ends<A>>>(counters, probe::SET_STATE, |record| unsafe {
                    addr_of_mut!((*record).head).write(head(kind::RESTORE, 0));
                    addr_of_mut!((*record).ends).write(ends);
                });
                return;
            }
            emit::<Open<Ends<A>>>(counters, probe::SET_STATE, |record| unsafe {
                addr_of_mut!((*record).head).write(head(kind, 0));
                addr_of_mut!((*record).ends).write(ends);
                addr_of_mut!((*record).at_ns).write(Memory::now(tcp));
            })
        }
        kind::CONNECT => emit::<Connect<Ends<A>>>(counters, probe::SET_STATE, |record| unsafe {
            addr_of_mut!((*record).head).write(head(kind, 0));
            addr_of_mut!((*record).ends).write(ends);
            addr_of_mut!((*record).at_ns).write(bpf_ktime_get_ns());
            write_owner::<S::Memory>(addr_of_mut!((*record).owner), OWNERS.load() != 0);
        }),
        kind::LISTEN => emit::<Listen<Ends<A>>>(counters, probe::SET_STATE, |record| unsafe {
            addr_of_mut!((*record).head).write(head(kind, 0));
            addr_of_mut!((*record).ends).write(ends);
            write_owner::<S::Memory>(addr_of_mut!((*record).owner), true);
        }),
        kind::UNLISTEN => emit::<Change<Ends<A>>>(counters, probe::SET_STATE, |record| unsafe {
            addr_of_mut!((*record).head).write(head(kind, 0));
            let tcp = socket.sock().tcp_sock();
            addr_of_mut!((*record).ends).write(Ends {
                local_port: former_port(local_port, tcp),
                ..ends
            });
        }),
        _ => emit::<Change<Ends<A>>>(counters, probe::SET_STATE, |record| unsafe {
            addr_of_mut!((*record).head).write(head(kind, 0));
            addr_of_mut!((*record).ends).write(ends);
        }),
    }
}

//! `inet_sock_set_state`: every change of a TCP socket's state.
//!
//! ```c
//! // include/trace/events/sock.h; called by inet_sk_state_store() and
//! // inet_sk_set_state() (net/ipv4/af_inet.c) before sk_state is stored
//! TP_PROTO(const struct sock *sk, const int oldstate, const int newstate)
//! ```
//!
//! Only what the agent needs is sent: nothing at LISTEN → SYN_RECV (the
//! child's endpoints are not set before 6.18, and its opening tells that it
//! was passive), nothing among the states after ESTABLISHED.

use core::ptr::addr_of_mut;

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::{btf_tracepoint, tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, TracePointContext};
use connmon_common::state::{CLOSE, CLOSE_WAIT, ESTABLISHED, LISTEN, SYN_RECV, SYN_SENT};
use connmon_common::tuning::{PerCpu, probe};
use connmon_common::wire::{Change, Close, Connect, EndsV4, EndsV6, Head, Listen, Open, kind};

use crate::emit::{counters, emit, write_owner};
use crate::globals::{DROP_LOOPBACK, ONLY_NETNS, OWNERS};
use crate::nested;
use crate::socket::{
    AF_INET, AF_INET6, BtfSocket, Ends, FullSocket, Socket, TracedSocket, former_port,
    is_loopback_v4, is_loopback_v6, is_v4_mapped, write_stats,
};

/// Primary: BTF raw tracepoint, fields by direct loads. 5.5.
#[btf_tracepoint(function = "inet_sock_set_state")]
fn state_tp_btf(ctx: BtfTracePointContext) -> i32 {
    if let Some(counters) = counters() {
        // SAFETY: this CPU's map value.
        unsafe { nested::begin(counters) };
        from_btf(&ctx, counters);
        // SAFETY: as above.
        unsafe { nested::tell_seen(counters, ctx.arg(0), ctx.arg(1), ctx.arg(2)) };
    }
    0
}

/// Sends what a run by BTF asks for.
#[inline(always)]
pub fn from_btf(ctx: &BtfTracePointContext, counters: *mut PerCpu) {
    let (old, new): (i32, i32) = (ctx.arg(1), ctx.arg(2));
    set_state(&BtfSocket(ctx.arg(0)), counters, old as u8, new as u8);
}

/// Fallback: classic tracepoint. Layout as since 5.6.
#[tracepoint(category = "sock", name = "inet_sock_set_state")]
fn state_tp(ctx: TracePointContext) -> u32 {
    let context = ctx
        .as_ptr()
        .cast::<connmon_common::tuning::tracepoint::SetState>();
    // SAFETY: the context is a `SetState`: the loader compared the format.
    let (old, new) = unsafe {
        (
            core::ptr::read_volatile(addr_of_mut!((*context).oldstate)),
            core::ptr::read_volatile(addr_of_mut!((*context).newstate)),
        )
    };
    if let Some(counters) = counters() {
        let socket = TracedSocket(context);
        // SAFETY: this CPU's map value.
        unsafe { nested::begin(counters) };
        set_state(&socket, counters, old as u8, new as u8);
        // SAFETY: as above.
        unsafe { nested::tell_seen(counters, socket.id(), old as i32, new as i32) };
    }
    0
}

/// The kind of record a transition asks for; 0 for none.
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
    if kind == 0 || !socket.is_tcp() {
        return;
    }
    let netns = socket.netns();
    let only = ONLY_NETNS.load();
    if only != 0 && netns != 0 && netns != only {
        return;
    }
    // Listeners have no remote end, and the inventory wants them all.
    let drop_loopback = DROP_LOOPBACK.load() != 0 && kind != kind::LISTEN && kind != kind::UNLISTEN;
    let family = socket.family();
    if family == AF_INET6 {
        let remote = socket.v6_remote();
        if !is_v4_mapped(remote) {
            let local = socket.v6_local();
            if drop_loopback && is_loopback_v6(local, remote) {
                return;
            }
            let (local_port, remote_port) = socket.ports();
            let ends = EndsV6 {
                local,
                remote,
                local_port,
                remote_port,
                pad: 0,
            };
            send(socket, counters, kind, old, new, netns, ends);
            return;
        }
    } else if family != AF_INET {
        return;
    }
    let (local, remote) = socket.v4();
    if drop_loopback && is_loopback_v4(local, remote) {
        return;
    }
    let (local_port, remote_port) = socket.ports();
    let ends = EndsV4 {
        local,
        remote,
        local_port,
        remote_port,
        pad: 0,
    };
    send(socket, counters, kind, old, new, netns, ends);
}

#[inline(always)]
fn send<S: Socket, E: Ends>(
    socket: &S,
    counters: *mut PerCpu,
    kind: u8,
    old: u8,
    new: u8,
    netns: u32,
    ends: E,
) {
    let head = |flags: u8| Head {
        kind,
        flags: flags | E::FLAGS,
        old,
        new,
        netns,
        id: socket.id(),
        cookie: socket.cookie(),
    };
    // SAFETY: in every arm `record` is the reservation, and every field is
    // written.
    match kind {
        kind::CLOSE => emit::<Close<E>>(counters, probe::SET_STATE, |record| unsafe {
            let full = socket.full();
            let flags = write_stats(socket, &full, old, addr_of_mut!((*record).stats));
            addr_of_mut!((*record).head).write(head(flags));
            let mut ends = ends;
            let port = *ends.local_port();
            *ends.local_port() = if port == 0 { former_port(&full) } else { port };
            addr_of_mut!((*record).ends).write(ends);
            // A local abort has no packet to take the time from.
            let abort = old == ESTABLISHED || old == CLOSE_WAIT;
            let at_ns = if abort {
                bpf_ktime_get_ns()
            } else {
                full.now()
            };
            addr_of_mut!((*record).at_ns).write(at_ns);
        }),
        kind::OPEN => {
            let full = socket.full();
            if old == SYN_SENT && full.is_in_repair() {
                // `tcp_connect()` sends no SYN then. The socket's clock has
                // never run, and nobody opens anything.
                emit::<Change<E>>(counters, probe::SET_STATE, |record| unsafe {
                    let restored = Head {
                        kind: kind::RESTORE,
                        ..head(0)
                    };
                    addr_of_mut!((*record).head).write(restored);
                    addr_of_mut!((*record).ends).write(ends);
                });
                return;
            }
            emit::<Open<E>>(counters, probe::SET_STATE, |record| unsafe {
                addr_of_mut!((*record).head).write(head(0));
                addr_of_mut!((*record).ends).write(ends);
                addr_of_mut!((*record).at_ns).write(full.now());
            })
        }
        kind::CONNECT => emit::<Connect<E>>(counters, probe::SET_STATE, |record| unsafe {
            addr_of_mut!((*record).head).write(head(0));
            addr_of_mut!((*record).ends).write(ends);
            addr_of_mut!((*record).at_ns).write(bpf_ktime_get_ns());
            write_owner::<S::Task>(addr_of_mut!((*record).owner), OWNERS.load() != 0);
        }),
        kind::LISTEN => emit::<Listen<E>>(counters, probe::SET_STATE, |record| unsafe {
            addr_of_mut!((*record).head).write(head(0));
            addr_of_mut!((*record).ends).write(ends);
            write_owner::<S::Task>(addr_of_mut!((*record).owner), true);
        }),
        kind::UNLISTEN => emit::<Change<E>>(counters, probe::SET_STATE, |record| unsafe {
            addr_of_mut!((*record).head).write(head(0));
            let mut ends = ends;
            let port = *ends.local_port();
            *ends.local_port() = if port == 0 {
                former_port(&socket.full())
            } else {
                port
            };
            addr_of_mut!((*record).ends).write(ends);
        }),
        _ => emit::<Change<E>>(counters, probe::SET_STATE, |record| unsafe {
            addr_of_mut!((*record).head).write(head(0));
            addr_of_mut!((*record).ends).write(ends);
        }),
    }
}

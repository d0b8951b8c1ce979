//! Runs that the kernel leaves out: the second programs on
//! `inet_sock_set_state`.
//!
//! While a program runs on a CPU the kernel does not run it once more (BTF
//! raw tracepoints, `__bpf_trace_run` since 6.1), or no perf program at all
//! (classic tracepoints, `trace_call_bpf`), and an interrupt in its midst can
//! hand a whole batch of packets, with all their state changes, to the softirq
//! on its way out. A second program is not in the midst of itself then. The
//! first leaves word of each change that it saw; what the second has no word
//! of, it sends, or counts where it has nothing to send.

use core::ptr::addr_of_mut;

use aya_ebpf::macros::{btf_tracepoint, raw_tracepoint};
use aya_ebpf::programs::{BtfTracePointContext, RawTracePointContext};
use connmon_common::tuning::{PerCpu, SEEN_WAITS, Seen};

use crate::emit::{add_one, counters};
use crate::set_state::from_btf;

/// Takes what `state_tp_btf` has not seen. Attached after it: a tracepoint's
/// programs run in the order in which they came. 6.1.
#[btf_tracepoint(function = "inet_sock_set_state")]
fn state_nested(ctx: BtfTracePointContext) -> i32 {
    if let Some(counters) = counters() {
        // SAFETY: this CPU's map value.
        let seen = unsafe { was_seen(counters, ctx.arg(0), ctx.arg(1), ctx.arg(2)) };
        if !seen {
            // SAFETY: an aligned counter of the map value.
            unsafe { add_one(addr_of_mut!((*counters).caught)) };
            from_btf(&ctx, counters);
        }
    }
    0
}

/// Counts what `state_tp` has not seen; without BTF it could not read the
/// socket. Attached after it, as above. 4.17.
#[raw_tracepoint(tracepoint = "inet_sock_set_state")]
fn state_lost(ctx: RawTracePointContext) -> i32 {
    if let Some(counters) = counters() {
        // SAFETY: this CPU's map value.
        let seen = unsafe { was_seen(counters, ctx.arg(0), ctx.arg(1), ctx.arg(2)) };
        if !seen {
            // SAFETY: an aligned counter of the map value.
            unsafe { add_one(addr_of_mut!((*counters).lost)) };
        }
    }
    0
}

/// The first program begins: until [`tell_seen`] it is not run once more on this
/// CPU, so the second one can know without a word that it was left out.
///
/// # Safety
///
/// As [`tell_seen`].
#[inline(always)]
pub unsafe fn begin(counters: *mut PerCpu) {
    // SAFETY: the caller's. Volatile, since an interrupt reads it.
    unsafe { addr_of_mut!((*counters).inside).write_volatile(1) };
}

/// The first program ends. Leaves word of a change of `socket` for
/// [`was_seen`]: in the second place when this context has interrupted another
/// one between its two programs. A softirq interrupts no softirq, so two places
/// are enough; and a socket's lock keeps it from changing state on two levels
/// at once.
///
/// # Safety
///
/// `counters` must be those of this CPU.
#[inline(always)]
pub unsafe fn tell_seen(counters: *mut PerCpu, socket: u64, old: i32, new: i32) {
    // SAFETY: the caller's. Volatile, since an interrupt reads and writes it;
    // the socket first, which takes the place.
    unsafe {
        let mut place = addr_of_mut!((*counters).seen).cast::<Seen>();
        if read(place).socket != 0 {
            place = place.add(1);
        }
        addr_of_mut!((*place).socket).write_volatile(socket);
        addr_of_mut!((*place).states).write_volatile(states(old, new));
        addr_of_mut!((*counters).inside).write_volatile(0);
    }
}

/// Whether [`tell_seen`] left word of this change, and takes that away. Word
/// that is never asked for, because the second program itself was interrupted,
/// goes after [`SEEN_WAITS`]; until then it might be taken for that of a later
/// socket at the same address and between the same states, which would then be
/// lost: so it is not looked at while the first program is interrupted.
///
/// # Safety
///
/// As [`tell_seen`].
#[inline(always)]
unsafe fn was_seen(counters: *mut PerCpu, socket: u64, old: i32, new: i32) -> bool {
    // SAFETY: as in `tell_seen`.
    unsafe {
        if addr_of_mut!((*counters).inside).read_volatile() != 0 {
            return false;
        }
        let first = addr_of_mut!((*counters).seen).cast::<Seen>();
        let second = first.add(1);
        let waited = addr_of_mut!((*counters).waited);
        let states = states(old, new);
        let is_this = |place| {
            let seen = read(place);
            seen.socket == socket && seen.states == states
        };
        if is_this(first) {
            addr_of_mut!((*first).socket).write_volatile(0);
            // That of a context within this one cannot be due any more.
            addr_of_mut!((*second).socket).write_volatile(0);
            waited.write_volatile(0);
            return true;
        }
        if !is_this(second) {
            return false;
        }
        addr_of_mut!((*second).socket).write_volatile(0);
        let count = waited.read_volatile() + 1;
        waited.write_volatile(count);
        if count >= SEEN_WAITS {
            waited.write_volatile(0);
            addr_of_mut!((*first).socket).write_volatile(0);
        }
        true
    }
}

#[inline(always)]
unsafe fn read(place: *mut Seen) -> Seen {
    // SAFETY: the caller's: a place of this CPU's counters.
    unsafe {
        Seen {
            socket: addr_of_mut!((*place).socket).read_volatile(),
            states: addr_of_mut!((*place).states).read_volatile(),
        }
    }
}

#[inline(always)]
fn states(old: i32, new: i32) -> u64 {
    u64::from(old as u8) << 8 | u64::from(new as u8)
}

//! Recursion misses: which state changes the first program on
//! `inet_sock_set_state` did not see.
//!
//! While a program runs on a CPU, the kernel does not run it again there (BTF
//! raw tracepoints, `__bpf_trace_run` since 6.1), or runs no perf program at
//! all (classic tracepoints, `trace_call_bpf`). An interrupt during the program
//! can handle a whole batch of packets, and their state changes are recursion
//! misses. A second program on the same hook is not running then. The first
//! program notes each change that it handles; the second handles or counts each
//! change without a note.

use core::ptr::addr_of_mut;

use connmon_common::tuning::{PerCpu, STALE_AFTER, StateChange};

/// Notes that the first program starts. Until [`handled`], the kernel does not
/// run it again on this CPU, so every change that the second program sees is a
/// recursion miss.
///
/// # Safety
///
/// `counters` must be those of this CPU.
#[inline(always)]
pub unsafe fn begin(counters: *mut PerCpu) {
    // SAFETY: the caller's. Volatile, since an interrupt reads it.
    unsafe { addr_of_mut!((*counters).running).write_volatile(1) };
}

/// Notes at the end of the first program which change it handled, for
/// [`take`]: in the second entry if this context interrupted another one
/// between its two programs. Two entries are enough, since a softirq interrupts
/// no softirq; and a socket's lock keeps both from changing the same socket.
///
/// # Safety
///
/// `counters` must be those of this CPU.
#[inline(always)]
pub unsafe fn handled(counters: *mut PerCpu, change: StateChange) {
    // SAFETY: the caller's. Volatile, since an interrupt reads and writes it;
    // the socket first, which marks the entry as used.
    unsafe {
        let mut entry = addr_of_mut!((*counters).handled).cast::<StateChange>();
        if read(entry).socket != 0 {
            entry = entry.add(1);
        }
        addr_of_mut!((*entry).socket).write_volatile(change.socket);
        addr_of_mut!((*entry).states).write_volatile(change.states);
        addr_of_mut!((*counters).running).write_volatile(0);
    }
}

/// Whether the first program handled this change; frees its entry.
///
/// An entry stays if the second program itself was missed, and goes after
/// [`STALE_AFTER`]. Until then it could match a later change of a socket at the
/// same address between the same states; so no entry counts while the first
/// program is interrupted.
///
/// # Safety
///
/// `counters` must be those of this CPU.
#[inline(always)]
pub unsafe fn take(counters: *mut PerCpu, change: StateChange) -> bool {
    // SAFETY: as in `handled`.
    unsafe {
        if addr_of_mut!((*counters).running).read_volatile() != 0 {
            return false;
        }
        let first = addr_of_mut!((*counters).handled).cast::<StateChange>();
        let second = first.add(1);
        let uses = addr_of_mut!((*counters).second_uses);
        let is_this = |entry| {
            let other = read(entry);
            other.socket == change.socket && other.states == change.states
        };
        if is_this(first) {
            addr_of_mut!((*first).socket).write_volatile(0);
            // A context that interrupted this one has ended.
            addr_of_mut!((*second).socket).write_volatile(0);
            uses.write_volatile(0);
            return true;
        }
        if !is_this(second) {
            return false;
        }
        addr_of_mut!((*second).socket).write_volatile(0);
        let count = uses.read_volatile() + 1;
        uses.write_volatile(count);
        if count >= STALE_AFTER {
            uses.write_volatile(0);
            addr_of_mut!((*first).socket).write_volatile(0);
        }
        true
    }
}

/// A change as it is noted.
#[inline(always)]
pub fn change(socket: u64, old: i32, new: i32) -> StateChange {
    StateChange {
        socket,
        states: u64::from(old as u8) << 8 | u64::from(new as u8),
    }
}

#[inline(always)]
unsafe fn read(entry: *mut StateChange) -> StateChange {
    // SAFETY: the caller's: an entry of this CPU's counters.
    unsafe {
        StateChange {
            socket: addr_of_mut!((*entry).socket).read_volatile(),
            states: addr_of_mut!((*entry).states).read_volatile(),
        }
    }
}

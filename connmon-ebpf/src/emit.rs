//! The ring buffer, its counters and when its reader is woken.

use core::arch::asm;
use core::ptr::{addr_of_mut, read_volatile};

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::helpers::generated::{bpf_get_current_cgroup_id, bpf_get_current_pid_tgid};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{PerCpuArray, RingBuf};
use aya_log_ebpf::macro_support::{Level, level_enabled};
use aya_log_ebpf::warn;
use connmon_common::tuning::{PerCpu, WAKE_EVERY};
use connmon_common::wire::{Head, Owner, Task};

use crate::globals::{OWNERS, WAKE_BYTES};
use crate::task::CurrentTask;

/// Sized by the loader.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 23, 0);

#[map]
static COUNTERS: PerCpuArray<PerCpu> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's counters.
#[inline(always)]
pub fn counters() -> Option<*mut PerCpu> {
    COUNTERS.get_ptr_mut(0)
}

/// Reserves a `T`, lets `fill` write every byte of it, submits it; counts
/// the attempt and, where it comes to that, the failure under `probe` in
/// `counters`, which are those of [`counters`].
#[inline(always)]
pub fn emit<T: 'static>(counters: *mut PerCpu, probe: usize, fill: impl FnOnce(*mut T)) {
    // SAFETY: the map value is a `PerCpu` of this CPU, `probe` is one of the
    // constants of `connmon_common::tuning::probe`.
    let (produced, ring_full) = unsafe {
        (
            addr_of_mut!((*counters).produced[probe]),
            addr_of_mut!((*counters).ring_full[probe]),
        )
    };
    // SAFETY: both point to aligned counters of the map value.
    unsafe { add_one(produced) };
    let Some(mut entry) = EVENTS.reserve::<T>(0) else {
        // SAFETY: as above.
        unsafe { add_one(ring_full) };
        // SAFETY: as above.
        if level_enabled(Level::Warn) && unsafe { read_volatile(ring_full) } == 1 {
            log_ring_full(probe as u32);
        }
        return;
    };
    fill(entry.as_mut_ptr());
    // SAFETY: as above; a stale value only shifts a wake-up by a record.
    let count = unsafe { read_volatile(produced) };
    // Looking at the fill level costs a helper call, so only one record in
    // WAKE_EVERY does; a timer of the agent's bounds the delay of the rest.
    let flags = if count % WAKE_EVERY == 0
        && EVENTS.query(u64::from(BPF_RB_AVAIL_DATA)) >= WAKE_BYTES.load()
    {
        u64::from(BPF_RB_FORCE_WAKEUP)
    } else {
        u64::from(BPF_RB_NO_WAKEUP)
    };
    entry.submit(flags);
}

/// Once per CPU and program. Apart, so that its code is there once.
#[inline(never)]
fn log_ring_full(probe: u32) {
    warn!(
        (),
        "event ring buffer full, first record of probe {} lost on this CPU", probe
    );
}

/// Emits a record about the running task and the socket `id`.
#[inline(always)]
pub fn emit_task<T: CurrentTask>(probe: usize, kind: u8, id: u64) {
    let Some(counters) = counters() else {
        return;
    };
    emit::<Task>(counters, probe, |record| {
        // SAFETY: `record` is the reservation.
        unsafe {
            addr_of_mut!((*record).head).write(Head {
                kind,
                flags: 0,
                old: 0,
                new: 0,
                netns: 0,
                id,
                cookie: 0,
            });
            addr_of_mut!((*record).at_ns).write(bpf_ktime_get_ns());
            write_owner::<T>(addr_of_mut!((*record).owner), OWNERS.load() != 0);
        }
    });
}

/// Writes the running task; its name and cgroup cost more than its pid and
/// are left zero unless they are wanted.
///
/// # Safety
///
/// `owner` must be valid for writes.
#[inline(always)]
pub unsafe fn write_owner<T: CurrentTask>(owner: *mut Owner, wanted: bool) {
    // SAFETY: the caller's; helpers without preconditions.
    unsafe {
        if wanted {
            T::write_process_name(addr_of_mut!((*owner).comm));
        } else {
            zero(addr_of_mut!((*owner).comm));
        }
        let cgroup = if OWNERS.load() != 0 {
            bpf_get_current_cgroup_id()
        } else {
            0
        };
        addr_of_mut!((*owner).cgroup).write(cgroup);
        addr_of_mut!((*owner).pid).write((bpf_get_current_pid_tgid() >> 32) as u32);
        addr_of_mut!((*owner).pad).write(0);
    }
}

/// Zeroes a `T` word by word: a plain write becomes a call of `memset`, which
/// is a loop over bytes.
///
/// # Safety
///
/// `value` must be valid for writes, its address and its size multiples of 8.
#[inline(always)]
pub unsafe fn zero<T>(value: *mut T) {
    const { assert!(size_of::<T>() % 8 == 0 && size_of::<T>() <= 32) };
    let words = value.cast::<u64>();
    // SAFETY: the caller's; at most `size_of::<T>()` bytes.
    unsafe {
        if size_of::<T>() > 0 {
            words.write_volatile(0);
        }
        if size_of::<T>() > 8 {
            words.add(1).write_volatile(0);
        }
        if size_of::<T>() > 16 {
            words.add(2).write_volatile(0);
        }
        if size_of::<T>() > 24 {
            words.add(3).write_volatile(0);
        }
    }
}

/// Adds 1 atomically. The result is not used, since the fetching form needs
/// Linux 5.12; `core`'s atomics are not offered for BPF.
///
/// # Safety
///
/// `counter` must point to an aligned map value.
#[inline(always)]
pub unsafe fn add_one(counter: *mut u64) {
    // SAFETY: the caller's.
    unsafe {
        asm!(
            "lock *(u64 *)({counter} + 0) += {one}",
            counter = in(reg) counter,
            one = in(reg) 1u64,
        );
    }
}

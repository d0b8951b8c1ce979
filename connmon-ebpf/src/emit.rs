//! The ring buffer, its counters and when its reader is woken.

use core::ptr::{addr_of_mut, read_volatile};

use aya_ebpf::bindings::{BPF_RB_AVAIL_DATA, BPF_RB_FORCE_WAKEUP, BPF_RB_NO_WAKEUP};
use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{PerCpuArray, RingBuf};
use aya_log_ebpf::macro_support::{Level, level_enabled};
use aya_log_ebpf::warn;
use connmon_common::tuning::{PerCpu, WAKE_EVERY};
use connmon_common::wire::{Head, Task};

use crate::globals::{OWNERS, WAKE_BYTES};
use crate::memory::{Memory, add_one};
use crate::task::write_owner;

/// The loader sets its size.
#[map]
static EVENTS: RingBuf = RingBuf::with_byte_size(1 << 23, 0);

#[map]
static COUNTERS: PerCpuArray<PerCpu> = PerCpuArray::with_max_entries(1, 0);

/// This CPU's counters.
#[inline(always)]
pub fn counters() -> Option<*mut PerCpu> {
    COUNTERS.get_ptr_mut(0)
}

/// Reserves a `T`, lets `fill` write every byte of it and submits it. Counts
/// the attempt, and a failure, under `probe` in `counters`, which are those of
/// [`counters`].
#[inline(always)]
pub fn emit<T: 'static>(counters: *mut PerCpu, probe: usize, fill: impl FnOnce(*mut T)) {
    // SAFETY: the map value is a `PerCpu` of this CPU, and `probe` is one of
    // the constants of `connmon_common::tuning::probe`, so that all pointers
    // are to aligned counters of the map value.
    unsafe {
        let produced = addr_of_mut!((*counters).produced[probe]);
        add_one(produced);
        let Some(mut entry) = EVENTS.reserve::<T>(0) else {
            let ring_full = addr_of_mut!((*counters).ring_full[probe]);
            add_one(ring_full);
            if level_enabled(Level::Warn) && read_volatile(ring_full) == 1 {
                log_ring_full(probe as u32);
            }
            return;
        };
        fill(entry.as_mut_ptr());
        // The fill level costs a helper call, so only one record in WAKE_EVERY
        // asks for it; a timer of the agent bounds the delay of the others.
        // A stale count only moves a wake-up by a record.
        let flags = if read_volatile(produced) % WAKE_EVERY == 0
            && EVENTS.query(u64::from(BPF_RB_AVAIL_DATA)) >= WAKE_BYTES.load()
        {
            BPF_RB_FORCE_WAKEUP
        } else {
            BPF_RB_NO_WAKEUP
        };
        entry.submit(u64::from(flags));
    }
}

/// Logs once per CPU and probe. Not inlined, so that the object has it once.
#[inline(never)]
fn log_ring_full(probe: u32) {
    warn!(
        (),
        "event ring buffer full, first record of probe {} lost on this CPU", probe
    );
}

/// Emits a record about the running task and the socket `id`.
#[inline(always)]
pub fn emit_task<M: Memory>(probe: usize, kind: u8, id: u64) {
    let Some(counters) = counters() else {
        return;
    };
    emit::<Task>(counters, probe, |record| {
        let head = Head {
            kind,
            flags: 0,
            old: 0,
            new: 0,
            netns: 0,
            id,
            cookie: 0,
        };
        // SAFETY: `record` is the reservation.
        unsafe {
            addr_of_mut!((*record).head).write(head);
            addr_of_mut!((*record).at_ns).write(bpf_ktime_get_ns());
            write_owner::<M>(addr_of_mut!((*record).owner), OWNERS.load() != 0);
        }
    });
}

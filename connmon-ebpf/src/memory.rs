//! Reading kernel memory and writing map memory.
//!
//! A program reads kernel memory in one of two ways: through a BTF pointer,
//! whose loads the verifier checks ([`BtfPointer`], in tp_btf and fentry), or
//! at an address with `bpf_probe_read_kernel` ([`Address`]).

use core::arch::asm;
use core::ffi::c_void;
use core::mem::MaybeUninit;
use core::ptr::read_volatile;

use aya_ebpf::helpers::generated::{
    bpf_get_current_task, bpf_get_current_task_btf, bpf_jiffies64, bpf_ktime_get_ns,
    bpf_probe_read_kernel, bpf_skc_to_tcp_sock,
};
use connmon_common::tuning::Field;

use crate::globals::{OFFSETS_KNOWN, TASK_BTF, offset};

/// A place in kernel memory, and the way to read there.
pub trait Memory: Copy {
    /// Whether the offsets of fields are valid.
    fn offsets_known() -> bool;

    /// Whether [`Memory::current_task`] works on this kernel.
    fn has_current_task() -> bool;

    /// The running task.
    fn current_task() -> Self;

    /// The value at an offset; zeroes if the address is bad.
    ///
    /// # Safety
    ///
    /// Every bit pattern must be a valid `T`. A BTF pointer must have a `T` at
    /// this offset; the verifier refuses the program if it has not.
    unsafe fn read<T: Copy>(self, offset: usize) -> T;

    /// A `struct sock` as a `struct tcp_sock`. `None` if offsets are not known
    /// or it is not a TCP socket. With BTF this calls a helper (5.9).
    fn tcp_sock(self) -> Option<Self>;

    /// CLOCK_MONOTONIC nanoseconds: now, or when the packet that `tcp` is
    /// handling arrived.
    fn now(tcp: Option<Self>) -> u64;
}

/// A pointer whose type the verifier knows from BTF.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct BtfPointer(pub *const u8);

impl Memory for BtfPointer {
    #[inline(always)]
    fn offsets_known() -> bool {
        true
    }

    #[inline(always)]
    fn has_current_task() -> bool {
        TASK_BTF.load() != 0
    }

    /// 5.11.
    #[inline(always)]
    fn current_task() -> Self {
        // SAFETY: helper without preconditions.
        Self(unsafe { bpf_get_current_task_btf() }.cast())
    }

    /// One load, never merged with its neighbours, since the verifier compares
    /// each load with the kernel's BTF.
    #[inline(always)]
    unsafe fn read<T: Copy>(self, offset: usize) -> T {
        // SAFETY: the caller's; the kernel turns faults into zeroes.
        unsafe { read_volatile(self.0.add(offset).cast()) }
    }

    #[inline(always)]
    fn tcp_sock(self) -> Option<Self> {
        // SAFETY: helper on a BTF socket pointer.
        let tcp = Self(unsafe { bpf_skc_to_tcp_sock(self.0.cast_mut().cast()) }.cast());
        (!tcp.0.is_null()).then_some(tcp)
    }

    /// Reading the clock is a third of the cost of a record, and TCP has read
    /// it for the packet that caused this change: `tcp_mstamp`, in
    /// microseconds, valid if `rcv_tstamp`, the jiffy of the last ACK, is the
    /// current jiffy. In repair `tcp_connect_init()` sets `rcv_tstamp` alone,
    /// and `tcp_mstamp` is 0.
    #[inline(always)]
    fn now(tcp: Option<Self>) -> u64 {
        // SAFETY: helper without preconditions (5.5, inlined); fields of the
        // types that BTF says.
        unsafe {
            let jiffies = bpf_jiffies64() as u32;
            if let Some(tcp) = tcp
                && jiffies == tcp.read::<u32>(offset(Field::RcvTstamp))
            {
                let stamp: u64 = tcp.read(offset(Field::TcpMstamp));
                if stamp != 0 {
                    return stamp * 1000;
                }
            }
            bpf_ktime_get_ns()
        }
    }
}

/// A kernel address.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Address(pub u64);

impl Memory for Address {
    #[inline(always)]
    fn offsets_known() -> bool {
        OFFSETS_KNOWN.load() != 0
    }

    #[inline(always)]
    fn has_current_task() -> bool {
        true
    }

    #[inline(always)]
    fn current_task() -> Self {
        // SAFETY: helper without preconditions.
        Self(unsafe { bpf_get_current_task() })
    }

    /// `bpf_probe_read_kernel`. 5.5.
    #[inline(always)]
    unsafe fn read<T: Copy>(self, offset: usize) -> T {
        let mut value = MaybeUninit::<T>::uninit();
        let address = self.0.wrapping_add(offset as u64) as *const c_void;
        // SAFETY: the helper writes exactly `size_of::<T>()` bytes, zeroes on
        // a fault; the rest is the caller's.
        unsafe {
            bpf_probe_read_kernel(value.as_mut_ptr().cast(), size_of::<T>() as u32, address);
            value.assume_init()
        }
    }

    #[inline(always)]
    fn tcp_sock(self) -> Option<Self> {
        Self::offsets_known().then_some(self)
    }

    /// The clock: reading `tcp_mstamp` costs more.
    #[inline(always)]
    fn now(_tcp: Option<Self>) -> u64 {
        // SAFETY: helper without preconditions.
        unsafe { bpf_ktime_get_ns() }
    }
}

/// Zeroes a `T` word by word: a plain write becomes a call of `memset`, which
/// is a loop over bytes.
///
/// # Safety
///
/// `value` must be valid for writes, its address a multiple of 8.
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
/// Linux 5.12; `core` has no atomics for BPF.
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

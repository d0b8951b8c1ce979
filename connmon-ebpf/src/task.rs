//! The running task: the name of its process.
//!
//! `bpf_get_current_comm` gives the name of the thread, which is another one
//! in many programs. That of the process is the name of the thread group's
//! leader, also after the leader has ended: `task->group_leader->comm`.

use core::ptr::addr_of_mut;

use aya_ebpf::helpers::generated::{
    bpf_get_current_comm, bpf_get_current_pid_tgid, bpf_get_current_task, bpf_get_current_task_btf,
};

use crate::emit::zero;
use crate::globals::{OFF_TASK_COMM, OFF_TASK_LEADER, OFFSETS_KNOWN, TASK_BTF};
use crate::socket::{load, offset, probe};

/// A way to read the running task.
pub trait CurrentTask {
    /// Writes the name of its process, which ends at the first NUL.
    ///
    /// # Safety
    ///
    /// `name` must be valid for writes and aligned to 8 bytes.
    unsafe fn write_process_name(name: *mut [u8; 16]);
}

/// By BTF pointer, for programs that the kernel's BTF is checked for. 5.11;
/// before that as [`ProbedTask`].
pub struct BtfTask;

impl CurrentTask for BtfTask {
    #[inline(always)]
    unsafe fn write_process_name(name: *mut [u8; 16]) {
        // SAFETY: the caller's. The running task and its leader exist, and the
        // offsets are from BTF, with which the verifier compares them.
        unsafe {
            if TASK_BTF.load() == 0 {
                ProbedTask::write_process_name(name);
                return;
            }
            let task: *const u8 = bpf_get_current_task_btf().cast();
            let leader: *const u8 = load(task, offset(&OFF_TASK_LEADER));
            let words: *mut u64 = name.cast();
            words.write_volatile(load(leader, offset(&OFF_TASK_COMM)));
            words
                .add(1)
                .write_volatile(load(leader, offset(&OFF_TASK_COMM) + 8));
        }
    }
}

/// By address. Without BTF a thread has no name but the first one of a
/// process: none is better than a wrong one.
pub struct ProbedTask;

impl CurrentTask for ProbedTask {
    #[inline(always)]
    unsafe fn write_process_name(name: *mut [u8; 16]) {
        // SAFETY: the caller's; probe_read checks the addresses, the helpers
        // have no preconditions, and the buffer's length is its own.
        unsafe {
            if OFFSETS_KNOWN.load() != 0 {
                let leader: u64 = probe(bpf_get_current_task(), offset(&OFF_TASK_LEADER));
                name.write(probe(leader, offset(&OFF_TASK_COMM)));
                return;
            }
            let ids = bpf_get_current_pid_tgid();
            if ids >> 32 == ids & 0xffff_ffff {
                // On failure the helper zeroes the buffer.
                bpf_get_current_comm(name.cast(), 16);
            } else {
                zero(addr_of_mut!(*name));
            }
        }
    }
}

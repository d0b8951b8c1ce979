//! The running task: the pid, cgroup and name of its process.
//!
//! `bpf_get_current_comm` gives the name of the thread, which many programs
//! set. The name of the process is `task->group_leader->comm`, also after the
//! leader has ended.

use core::ptr::addr_of_mut;

use aya_ebpf::helpers::generated::{
    bpf_get_current_cgroup_id, bpf_get_current_comm, bpf_get_current_pid_tgid,
};
use connmon_common::tuning::Field;
use connmon_common::wire::Owner;

use crate::globals::{OWNERS, offset};
use crate::memory::{Address, Memory, zero};

/// Writes the running task, with its name if `named`. The cgroup is 0 unless
/// owners are collected, since it costs more than the pid.
///
/// # Safety
///
/// `owner` must be valid for writes.
#[inline(always)]
pub unsafe fn write_owner<M: Memory>(owner: *mut Owner, named: bool) {
    // SAFETY: the caller's; helpers without preconditions.
    unsafe {
        let comm = addr_of_mut!((*owner).comm);
        if !named {
            zero(comm);
        } else if M::has_current_task() {
            write_process_name::<M>(comm);
        } else {
            write_process_name::<Address>(comm);
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

/// Writes the name of the process, which ends at the first NUL.
///
/// # Safety
///
/// `name` must be valid for writes and aligned to 8 bytes.
#[inline(always)]
unsafe fn write_process_name<M: Memory>(name: *mut [u8; 16]) {
    // SAFETY: the caller's; helpers without preconditions. The running task
    // and its leader exist.
    unsafe {
        if M::offsets_known() {
            let leader: M = M::current_task().read(offset(Field::TaskLeader));
            let words: [u64; 2] = leader.read(offset(Field::TaskComm));
            name.cast::<[u64; 2]>().write_volatile(words);
            return;
        }
        // Without BTF only a first thread has a name: it is the process's.
        let ids = bpf_get_current_pid_tgid();
        if ids >> 32 == ids & 0xffff_ffff {
            // On failure the helper zeroes the buffer.
            bpf_get_current_comm(name.cast(), 16);
        } else {
            zero(name);
        }
    }
}

//! A BPF program that does nothing, on the hook of connmon's own: what any
//! program there costs.

#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper without a loader")]

use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result};

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const BPF_PROG_TYPE_RAW_TRACEPOINT: u32 = 17;

/// `r0 = 0; exit`
const PROGRAM: [u64; 2] = [0x0000_0000_0000_00b7, 0x0000_0000_0000_0095];

/// The head of `union bpf_attr` for BPF_PROG_LOAD, up to the name.
#[repr(C)]
#[derive(Default)]
struct LoadAttributes {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buffer: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// `union bpf_attr` for BPF_RAW_TRACEPOINT_OPEN.
#[repr(C)]
#[derive(Default)]
struct OpenAttributes {
    name: u64,
    program: u32,
    padding: u32,
}

/// The program and its link; detached when dropped.
#[derive(Debug)]
pub struct Attached {
    _program: OwnedFd,
    _link: OwnedFd,
}

/// Loads and attaches it.
///
/// # Errors
/// Without CAP_BPF and CAP_PERFMON.
pub fn attach() -> Result<Attached> {
    let license = c"GPL";
    let mut name = [0; 16];
    name[..12].copy_from_slice(b"connmon_none");
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_RAW_TRACEPOINT,
        instruction_count: PROGRAM.len() as u32,
        instructions: PROGRAM.as_ptr() as u64,
        license: license.as_ptr() as u64,
        name,
        ..LoadAttributes::default()
    };
    let program = bpf(BPF_PROG_LOAD, &attributes).context("cannot load an empty program")?;
    let hook = c"inet_sock_set_state";
    let attributes = OpenAttributes {
        name: hook.as_ptr() as u64,
        program: std::os::fd::AsRawFd::as_raw_fd(&program) as u32,
        padding: 0,
    };
    let link =
        bpf(BPF_RAW_TRACEPOINT_OPEN, &attributes).context("cannot attach an empty program")?;
    Ok(Attached {
        _program: program,
        _link: link,
    })
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attributes` is a repr(C) prefix of `union bpf_attr` whose size
    // is passed along, so the kernel reads nothing beyond it; the pointers in
    // it are to statics or to locals of the caller, which outlive the call;
    // both commands only read.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a non-negative result of these commands is a new descriptor
    // that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

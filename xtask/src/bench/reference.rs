//! Two BPF programs on the hook of connmon's own: one that does nothing, what
//! any program there costs; and one that hands the smallest of records over at
//! every change, what a program costs that tells somebody and nothing more.

#![expect(unsafe_code, reason = "bpf(2) has no safe wrapper without a loader")]

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result};

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const BPF_PROG_TYPE_RAW_TRACEPOINT: u32 = 17;
const BPF_MAP_TYPE_RINGBUF: u32 = 27;

/// `r0 = 0; exit`
const NOTHING: [u64; 2] = [0x0000_0000_0000_00b7, 0x0000_0000_0000_0095];

/// Reserves 8 bytes of the ring, sets them to 0 and submits them without
/// waking anybody.
const fn record(ring: u32) -> [u64; 12] {
    [
        0x1118 | (ring as u64) << 32, // r1 = the ring
        0,
        0x0000_0008_0000_02b7, // r2 = 8
        0x0000_0000_0000_03b7, // r3 = 0
        0x0000_0083_0000_0085, // r0 = bpf_ringbuf_reserve(r1, r2, r3)
        0x0000_0000_0004_0015, // if r0 == 0 goto +4
        0x0000_0000_0000_007a, // *(u64 *)r0 = 0
        0x0000_0000_0000_01bf, // r1 = r0
        0x0000_0001_0000_02b7, // r2 = BPF_RB_NO_WAKEUP
        0x0000_0084_0000_0085, // bpf_ringbuf_submit(r1, r2)
        NOTHING[0],
        NOTHING[1],
    ]
}

/// Bytes of the ring; the records of a second need as much.
const RING_BYTES: u32 = 16 << 20;

/// The head of `union bpf_attr` for BPF_MAP_CREATE.
#[repr(C)]
#[derive(Default)]
struct MapAttributes {
    map_type: u32,
    key_bytes: u32,
    value_bytes: u32,
    entries: u32,
}

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

/// Loads and attaches the one that does nothing.
///
/// # Errors
/// Without CAP_BPF and CAP_PERFMON.
pub fn attach_nothing() -> Result<Attached> {
    attach(&NOTHING)
}

/// The ring of the other one, and its attachment.
#[derive(Debug)]
pub struct Ring {
    _attached: Attached,
    _map: OwnedFd,
    consumer: NonNull<AtomicU64>,
    producer: NonNull<AtomicU64>,
}

/// Loads and attaches the one that hands records over. They are to be
/// discarded before [`RING_BYTES`] are full.
///
/// # Errors
/// As [`attach_nothing`].
pub fn attach_record() -> Result<Ring> {
    let attributes = MapAttributes {
        map_type: BPF_MAP_TYPE_RINGBUF,
        entries: RING_BYTES,
        ..MapAttributes::default()
    };
    let map = bpf(BPF_MAP_CREATE, &attributes).context("cannot make a ring buffer")?;
    let page = rustix::param::page_size();
    // The reader's position, and on the next page the writer's
    // (kernel/bpf/ringbuf.c, `ringbuf_map_mmap_kern`).
    let consumer = position(&map, 0, libc::PROT_READ | libc::PROT_WRITE)?;
    let producer = position(&map, page, libc::PROT_READ)?;
    let attached = attach(&record(map.as_raw_fd() as u32))?;
    Ok(Ring {
        _attached: attached,
        _map: map,
        consumer,
        producer,
    })
}

impl Ring {
    /// Has all records read without a look at them.
    pub fn discard(&self) {
        // SAFETY: both pages stay mapped for as long as the process lives,
        // and begin with an aligned u64 that the kernel accesses atomically.
        let (consumer, producer) = unsafe { (self.consumer.as_ref(), self.producer.as_ref()) };
        consumer.store(producer.load(Ordering::Acquire), Ordering::Release);
    }
}

/// Maps a page of the ring, for good.
fn position(map: &OwnedFd, offset: usize, protection: i32) -> Result<NonNull<AtomicU64>> {
    let length = rustix::param::page_size();
    // SAFETY: a new mapping where the kernel chooses, so none is replaced.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            protection,
            libc::MAP_SHARED,
            map.as_raw_fd(),
            offset as libc::off_t,
        )
    };
    if page == libc::MAP_FAILED {
        return Err(io::Error::last_os_error()).context("cannot map the ring buffer");
    }
    NonNull::new(page.cast()).context("a ring buffer at address 0")
}

fn attach(instructions: &[u64]) -> Result<Attached> {
    let license = c"GPL";
    let mut name = [0; 16];
    name[..12].copy_from_slice(b"connmon_none");
    let attributes = LoadAttributes {
        program_type: BPF_PROG_TYPE_RAW_TRACEPOINT,
        instruction_count: instructions.len() as u32,
        instructions: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        name,
        ..LoadAttributes::default()
    };
    let program = bpf(BPF_PROG_LOAD, &attributes).context("cannot load a program")?;
    let hook = c"inet_sock_set_state";
    let attributes = OpenAttributes {
        name: hook.as_ptr() as u64,
        program: program.as_raw_fd() as u32,
        padding: 0,
    };
    let link = bpf(BPF_RAW_TRACEPOINT_OPEN, &attributes).context("cannot attach a program")?;
    Ok(Attached {
        _program: program,
        _link: link,
    })
}

fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: `attributes` is a repr(C) prefix of `union bpf_attr` whose size
    // is passed along, so the kernel reads nothing beyond it; the pointers in
    // it are to statics or to locals of the caller, which outlive the call;
    // all three commands only read.
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

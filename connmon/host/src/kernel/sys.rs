//! The few bpf(2) commands that aya does not offer, and memory trimming.
#![expect(unsafe_code, reason = "raw bpf(2), mmap, mallopt")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_GET_FD_BY_ID: libc::c_int = 30;
const BPF_ENABLE_STATS: libc::c_int = 32;

/// `BPF_MAP_LOOKUP_ELEM` of element 0 into `value` (Linux 3.19). For a
/// per-CPU map the value is one element per possible CPU, each rounded up to
/// 8 bytes.
///
/// # Errors
///
/// The system call's, and `InvalidInput` when `value` is shorter than
/// `value_bytes`, what the kernel will write.
pub fn map_lookup_first(
    map: BorrowedFd<'_>,
    value: &mut [u64],
    value_bytes: usize,
) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        map_fd: u32,
        pad: u32,
        key: u64,
        value: u64,
        flags: u64,
    }
    if size_of_val(value) < value_bytes {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let key = 0u32;
    let attr = Attr {
        map_fd: map.as_raw_fd() as u32,
        pad: 0,
        key: std::ptr::from_ref(&key) as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: `key` is the map's 4-byte key and outlives the call; `value` is
    // at least as long as what the kernel writes, checked above for the size
    // that the caller derived from the map it created.
    unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &attr) }.map(|_| ())
}

/// `BPF_OBJ_GET_INFO_BY_FD` (Linux 4.13) into `info`; how many bytes of it
/// the kernel filled.
///
/// # Errors
///
/// The system call's.
pub fn object_info(object: BorrowedFd<'_>, info: &mut [u64]) -> io::Result<usize> {
    #[repr(C)]
    struct Attr {
        bpf_fd: u32,
        info_len: u32,
        info: u64,
    }
    let attr = Attr {
        bpf_fd: object.as_raw_fd() as u32,
        info_len: size_of_val(info) as u32,
        info: info.as_mut_ptr() as u64,
    };
    let mut attr = attr;
    // SAFETY: `info` is valid for `info_len` bytes of any pattern, and zeroed
    // or initialized, as the kernel reads pointers to user buffers from it:
    // the callers pass zeroes.
    unsafe { bpf_mut(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok(attr.info_len as usize)
}

/// `BPF_LINK_GET_FD_BY_ID` (Linux 5.8).
///
/// # Errors
///
/// The system call's.
pub fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    let attr: [u32; 4] = [id, 0, 0, 0];
    // SAFETY: the attribute is plain integers.
    let fd = unsafe { bpf(BPF_LINK_GET_FD_BY_ID, &attr) }?;
    // SAFETY: the kernel just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `BPF_PROG_TEST_RUN` of a raw tracepoint's program without a context, on the
/// calling thread (Linux 5.10).
///
/// # Errors
///
/// The system call's.
pub fn run(program: BorrowedFd<'_>) -> io::Result<()> {
    // prog_fd, and up to batch_size and its padding.
    let mut attr = [0u32; 20];
    attr[0] = program.as_raw_fd() as u32;
    // SAFETY: the attribute is plain integers, the pointers in it null.
    unsafe { bpf_mut(BPF_PROG_TEST_RUN, &mut attr) }?;
    Ok(())
}

/// A value that programs write to, mapped.
#[derive(Debug)]
pub struct Shared<T>(NonNull<T>);

// SAFETY: the mapping belongs to this value alone.
unsafe impl<T: Send> Send for Shared<T> {}

impl<T> Shared<T> {
    /// Maps element 0 of an array made with BPF_F_MMAPABLE (Linux 5.5), whose
    /// values are `T`s.
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn map(array: BorrowedFd<'_>) -> io::Result<Self> {
        // SAFETY: a new mapping where the kernel chooses, so none is replaced;
        // the kernel refuses more than the map's size, rounded up to pages.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                array.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(address.cast())
            .map(Self)
            .ok_or_else(|| io::Error::other("mapped at address 0"))
    }

    /// Where it is: valid while this value lives, for reading and writing.
    pub fn as_ptr(&self) -> *mut T {
        self.0.as_ptr()
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nobody has it now.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<T>()) };
    }
}

/// `BPF_ENABLE_STATS` (Linux 5.8): the kernel times programs while the
/// returned descriptor is open.
///
/// # Errors
///
/// The system call's; `EPERM` without CAP_SYS_ADMIN.
pub fn enable_stats() -> io::Result<OwnedFd> {
    // BPF_STATS_RUN_TIME
    let attr: [u32; 1] = [0];
    // SAFETY: the attribute is plain integers.
    let fd = unsafe { bpf(BPF_ENABLE_STATS, &attr) }?;
    // SAFETY: the kernel just returned this descriptor to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Gives freed memory back to the kernel. Parsing the kernel's type
/// information frees about 20 MB in small pieces that the allocator would
/// keep for good.
pub fn trim_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Has large pieces of memory come from the kernel and go back to it at once.
/// glibc would raise both thresholds with each large piece that is freed, and
/// keep what the threads' arenas end in: megabytes after the first walk.
pub fn return_memory_at_once() {
    /// glibc's initial thresholds, in bytes.
    const LARGE: libc::c_int = 128 * 1024;
    #[cfg(target_env = "gnu")]
    // SAFETY: no preconditions.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
        libc::mallopt(libc::M_TRIM_THRESHOLD, LARGE);
    }
}

/// # Safety
///
/// `attr` must be what `command` wants, its pointers valid for what the
/// command does with them.
unsafe fn bpf<T>(command: libc::c_int, attr: &T) -> io::Result<i32> {
    // SAFETY: the caller's; the kernel reads `size_of::<T>()` bytes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

/// As [`bpf`], for commands that write into the attribute.
///
/// # Safety
///
/// As [`bpf`].
unsafe fn bpf_mut<T>(command: libc::c_int, attr: &mut T) -> io::Result<i32> {
    // SAFETY: the caller's; the kernel reads and writes `size_of::<T>()`
    // bytes at most.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_mut(attr),
            size_of::<T>(),
        )
    };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result as i32)
    }
}

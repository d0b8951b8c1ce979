//! The bpf(2) commands that aya does not offer, and memory trimming.
#![expect(unsafe_code, reason = "raw bpf(2), mmap, mallopt")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_GET_FD_BY_ID: libc::c_int = 30;

/// `BPF_MAP_LOOKUP_ELEM` of element 0 into `value` (Linux 3.19). The value of a
/// per-CPU map is one element per possible CPU, each rounded up to 8 bytes.
/// aya would read the number of CPUs from a file, which the sandbox refuses.
///
/// # Errors
///
/// The system call's.
///
/// # Safety
///
/// The map's key must have 4 bytes, and `value` the size of its value.
pub unsafe fn map_lookup_first(map: BorrowedFd<'_>, value: &mut [u64]) -> io::Result<()> {
    let key = 0u32;
    // map_fd, key, value, flags.
    let mut attr = [
        map.as_raw_fd() as u64,
        std::ptr::from_ref(&key) as u64,
        value.as_mut_ptr() as u64,
        0,
    ];
    // SAFETY: the caller's; `key` outlives the call.
    unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) }.map(drop)
}

/// `BPF_OBJ_GET_INFO_BY_FD` (Linux 4.13). Returns the first 64-bit words of the
/// information and how many bytes of it the kernel filled.
///
/// # Errors
///
/// The system call's.
pub fn object_info(object: BorrowedFd<'_>) -> io::Result<([u64; 16], usize)> {
    #[repr(C)]
    struct Attr {
        bpf_fd: u32,
        info_len: u32,
        info: u64,
    }
    let mut info = [0; 16];
    let mut attr = Attr {
        bpf_fd: object.as_raw_fd() as u32,
        info_len: size_of_val(&info) as u32,
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: `info` is valid for `info_len` bytes of any pattern. The kernel
    // reads pointers to user buffers from it, and all are null.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    Ok((info, attr.info_len as usize))
}

/// `BPF_LINK_GET_FD_BY_ID` (Linux 5.8).
///
/// # Errors
///
/// The system call's.
pub fn link_by_id(id: u32) -> io::Result<OwnedFd> {
    // SAFETY: the attribute is plain integers.
    let fd = unsafe { bpf(BPF_LINK_GET_FD_BY_ID, &mut [id, 0, 0, 0]) }?;
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
    unsafe { bpf(BPF_PROG_TEST_RUN, &mut attr) }.map(drop)
}

/// A mapped value that programs write to.
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

    /// Its address: valid while this value lives, for reading and writing.
    pub fn as_ptr(&self) -> *mut T {
        self.0.as_ptr()
    }
}

impl<T> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: mapped by `map` with this length, and nobody uses it now.
        unsafe { libc::munmap(self.0.as_ptr().cast(), size_of::<T>()) };
    }
}

/// Gives freed memory back to the kernel. Parsing BTF frees about 20 MB in small
/// pieces that the allocator would keep.
pub fn trim_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Makes the allocator map large pieces of memory and unmap them when freed.
/// glibc would raise both thresholds with each large piece that is freed, and
/// keep megabytes in the threads' arenas after the first walk.
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
/// `attr` must be the attribute of `command`, its pointers valid for what the
/// command does with them.
unsafe fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<i32> {
    let (attr, size) = (std::ptr::from_mut(attr), size_of::<T>());
    // SAFETY: the caller's; the kernel reads and writes at most `size` bytes.
    match unsafe { libc::syscall(libc::SYS_bpf, command, attr, size) } {
        result if result < 0 => Err(io::Error::last_os_error()),
        result => Ok(result as i32),
    }
}

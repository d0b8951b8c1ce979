//! The kernel's iterator over TCP sockets, `iter/tcp`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use super::sys;

/// Reads the connections of a network namespace, each exactly once if it is
/// there from beginning to end, whatever opens and closes meanwhile: a bucket
/// of the kernel's table is taken as a whole, and a read goes on after the
/// last by cookies (`bpf_iter_tcp_resume_established`). Linux 6.17, and
/// longterm kernels that took that over (Debian's 6.1 and 6.12).
#[derive(Debug)]
pub struct SocketIterator(OwnedFd);

impl SocketIterator {
    pub(super) fn new(link: OwnedFd) -> Self {
        Self(link)
    }

    /// A file over the network namespace of the calling thread. To be read to
    /// its end once; what it gives are the records of
    /// [`crate::event::decode_live`]. Needs no capability.
    ///
    /// # Errors
    ///
    /// bpf(BPF_ITER_CREATE)'s: EPERM under a seccomp filter, EMFILE.
    pub fn open(&self) -> io::Result<File> {
        Ok(File::from(sys::create_iterator(self.0.as_fd())?))
    }
}

//! Readiness of the ring buffer for tokio.

#![expect(unsafe_code, reason = "tokio requires a valid descriptor")]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Watches a descriptor for readability, through a duplicate of its own.
///
/// # Errors
/// If no descriptor is free (EMFILE), or outside of a runtime.
pub fn watch(descriptor: BorrowedFd<'_>) -> io::Result<AsyncFd<OwnedFd>> {
    let own = descriptor.try_clone_to_owned()?;
    // SAFETY: the descriptor must stay open and be the same file while it is
    // registered. `AsyncFd` owns `own` and deregisters before it drops it,
    // nothing else knows its number, and `OwnedFd::as_raw_fd` always gives
    // that number.
    unsafe { AsyncFd::register_with_interest(own, Interest::READABLE) }.map_err(Into::into)
}

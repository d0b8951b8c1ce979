//! Errors that say nothing about what was asked for.

use std::io;

/// Whether an error says that the agent or the system has run out of
/// descriptors or memory.
pub fn is_shortage(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)
    )
}

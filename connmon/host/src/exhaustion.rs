//! Errors that are about the agent's limits, not about what was asked for.

use std::io;

/// Whether the agent or the system has run out of descriptors or memory.
pub fn is_resource_exhausted(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)
    )
}

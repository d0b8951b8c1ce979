//! The kernel's own tables (walked, by sock_diag, from /proc/net/tcp) → messages
//! for the fold: what existed before start, and the audit of what events say.
//!
//! A dedicated walker thread produces [`connmon_core::scan::WalkMessage`]s; the fold thread
//! consumes them between draining the ring. Nothing here changes state.

pub mod diag;
pub mod netns;
pub mod owners;
pub mod procfs;
mod walker;

pub use walker::{BATCH_ROWS, Refused, WalkMessages, Walker, WalkerOptions, rest_after};

use std::io;
use std::time::Duration;

use connmon_core::event::LiveSocket;

/// Shows every connection and handshake that is in a network namespace from
/// beginning to end, which a dump does not promise. May show one twice.
pub trait SocketSource: Send {
    /// Reads the namespace of the calling thread; `sink` says whether to go on.
    /// Whether it came to the end.
    ///
    /// # Errors
    /// What cut it short; what was shown before is true all the same.
    fn read(&mut self, sink: &mut dyn FnMut(LiveSocket) -> bool) -> io::Result<bool>;
}

impl<F> SocketSource for F
where
    F: FnMut(&mut dyn FnMut(LiveSocket) -> bool) -> io::Result<bool> + Send,
{
    fn read(&mut self, sink: &mut dyn FnMut(LiveSocket) -> bool) -> io::Result<bool> {
        self(sink)
    }
}

/// CPU time of the calling thread: what a walk costs, whoever else runs.
pub fn cpu_time() -> Duration {
    Duration::from_nanos(walker::now_ns(rustix::time::ClockId::ThreadCPUTime))
}

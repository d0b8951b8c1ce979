//! The kernel's clocks.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// CPU time of the calling thread: what its work costs, whatever else runs.
pub fn cpu_time() -> Duration {
    Duration::from_nanos(now_ns(ClockId::ThreadCPUTime))
}

pub(super) fn now_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    // No clock that is read here is ever negative.
    (now.tv_sec as u64) * 1_000_000_000 + now.tv_nsec as u64
}

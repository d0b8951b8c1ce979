//! Reads the kernel's TCP sockets: those that existed before the agent started,
//! and in audits what the events report against what is there.
//!
//! The walker thread reads and sends [`connmon_core::scan::WalkMessage`]s; the
//! fold thread merges them. Nothing here changes counters.

mod clock;
pub mod diag;
pub mod netns;
pub mod owners;
mod parsed;
pub mod procfs;
mod walker;

pub use clock::cpu_time;
pub use parsed::Parsed;
pub use walker::{
    BATCH_ROWS, Refused, SocketSource, WalkMessages, Walker, WalkerOptions, rest_after,
};

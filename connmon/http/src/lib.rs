//! The HTTP server of connmon with its web configuration (TLS, basic auth,
//! headers, rate limit), and the files that configure it.
//!
//! The server knows nothing of metrics: it asks a [`Content`] to turn a
//! [`Report`] into bytes, and a [`connmon_core::report::Reporter`] for the
//! report.
#![forbid(unsafe_code)]

pub mod address;
mod app;
mod connections;
mod duration;
mod encoding;
mod error;
mod limits;
mod listen;
pub mod read_file;
mod render_queue;
mod response;
mod server;
mod stream;
pub mod webconfig;
pub mod yaml;

pub use duration::duration;
pub use error::{ConfigError, is_state_of_host};
pub use limits::Limits;
pub use server::{Options, ServeError, Server};

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use connmon_core::report::Report;

/// What the server serves, given by the agent. Every method runs on
/// the serving thread; a slow one delays other requests, never the ring.
pub trait Content: Send + 'static {
    /// The telemetry text in format 0.0.4, uncompressed. Called once for all
    /// the scrapes that wait for the same report; may keep state (buffers,
    /// metric families) between calls.
    fn metrics(&mut self, report: &Report) -> Bytes;

    /// The JSON of `/api/v1/summary`, uncompressed.
    fn summary(&mut self, report: &Report) -> Bytes;

    /// The file at `path` of the page (`/`, `/page.js`, …), or `None` (404).
    /// Must give the same answer for the same path every time: the server
    /// keeps the compressed form.
    fn asset(&self, path: &str) -> Option<Asset>;
}

/// One file of the page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asset {
    /// Full media type, e.g. `text/html; charset=utf-8`.
    pub content_type: &'static str,
    /// The file, uncompressed.
    pub body: Bytes,
}

/// Every change under a lock here is complete in itself, so a panic while it
/// was held has left nothing half done.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

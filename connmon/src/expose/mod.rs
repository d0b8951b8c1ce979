//! State → text, JSON, page; and the HTTP server that hands them out.
//!
//! The server knows nothing of metrics: it asks a [`Content`] to turn a
//! [`Report`] into bytes, and a [`connmon_core::report::Reporter`] for the report.

mod connections;
mod encoding;
pub mod families;
mod flight;
mod limits;
mod listen;
pub mod metrics;
pub mod page;
pub mod process;
mod response;
mod rows;
#[cfg(test)]
pub(crate) mod sample;
mod server;
mod stream;
pub mod summary;
pub mod webconfig;

use bytes::Bytes;
use connmon_core::report::Report;

pub use limits::Limits;
pub use listen::BindError;
pub use server::Server;

/// What the server serves, given by the agent's wiring. Every method runs on
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

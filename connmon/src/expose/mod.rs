//! What the agent shows: a report as telemetry text, as JSON, and as the page.

pub mod families;
pub mod metrics;
pub mod page;
pub mod process;
mod rows;
#[cfg(test)]
#[path = "../../tests/support/sample.rs"]
pub(crate) mod sample;
pub mod summary;

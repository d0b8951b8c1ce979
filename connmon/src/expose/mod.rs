//! State → text, JSON, page.

pub mod families;
pub mod metrics;
pub mod page;
pub mod process;
mod rows;
#[cfg(test)]
pub(crate) mod sample;
pub mod summary;

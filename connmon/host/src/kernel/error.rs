//! Why there is no tracing, in one sentence.

use std::fmt;

use aya::EbpfError;
use aya::maps::MapError;

use super::{HostFacts, Rung};

/// Tracing cannot start. Displays as one sentence with the remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachError {
    sentence: String,
}

impl fmt::Display for AttachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.sentence)
    }
}

impl std::error::Error for AttachError {}

impl AttachError {
    pub(super) fn other(sentence: String) -> Self {
        Self { sentence }
    }

    /// Maps could not be made, or the object not be read.
    pub(super) fn prepare(error: &EbpfError, ring_bytes: u32) -> Self {
        Self::diagnosed(&chain(error), ring_bytes)
    }

    pub(super) fn map(name: &str, error: &MapError, ring_bytes: u32) -> Self {
        Self::diagnosed(&format!("map {name}: {}", chain(error)), ring_bytes)
    }

    /// No rung of the state program holds.
    pub(super) fn state(rung: &Rung, ring_bytes: u32) -> Self {
        Self::diagnosed(rung.reason.as_deref().unwrap_or_default(), ring_bytes)
    }

    fn diagnosed(message: &str, ring_bytes: u32) -> Self {
        let facts = HostFacts::read();
        Self::other(facts.diagnose(message, ring_bytes).to_string())
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

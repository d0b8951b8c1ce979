//! Ctrl-C and SIGTERM for the tools that run until they are stopped.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Whether to stop.
#[derive(Clone, Debug)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Whether SIGINT or SIGTERM has come.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// From now on SIGINT and SIGTERM ask to stop instead of killing; the second
/// one kills, should the first have found a write that waits for its reader.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn on_signals() -> anyhow::Result<Stop> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first one finds the flag still down.
        signal_hook::flag::register_conditional_default(signal, Arc::clone(&flag))
            .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&flag)))
            .with_context(|| format!("cannot handle signal {signal}"))?;
    }
    Ok(Stop(flag))
}

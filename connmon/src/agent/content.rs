//! What the server hands out: metrics, summary, page.

use bytes::Bytes;
use connmon_core::report::Report;
use connmon_http::{Asset, Content};

use crate::config::Config;
use crate::expose::metrics::Metrics;
use crate::expose::page::Page;
use crate::expose::summary;

/// The agent's [`Content`].
pub struct AgentContent {
    metrics: Metrics,
    page: Page,
}

impl AgentContent {
    /// Content for this configuration.
    pub fn new(config: &Config) -> Self {
        Self {
            metrics: Metrics::new(),
            page: Page::new(&config.telemetry_path),
        }
    }
}

impl Content for AgentContent {
    fn metrics(&mut self, report: &Report) -> Bytes {
        #[cfg(debug_assertions)]
        super::panic_if_asked("serve");
        self.metrics.render(report)
    }

    fn summary(&mut self, report: &Report) -> Bytes {
        summary::render(report)
    }

    fn asset(&self, path: &str) -> Option<Asset> {
        self.page.asset(path)
    }
}

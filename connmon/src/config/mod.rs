//! One typed configuration behind flags, environment and file.
//!
//! What was typed (flags, `CONNMON_*`, YAML) is one type, what the program
//! needs is another: [`Config`]. Only this module reads the environment.

mod check;
mod error;
mod file;
mod load;
pub mod parse;
pub mod settings;
pub use check::{check, check_serving};
pub use connmon_http::ConfigError;
pub use error::Origin;
pub use load::{Loaded, load, log_format};

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use connmon_core::fold::{CrossFamilies, Network, PortRanges};
use connmon_host::kernel::AttachChoice;
use connmon_host::sandbox::{Plan, SandboxChoice};
use connmon_http::address::ListenAddress;

/// `--source`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceChoice {
    /// eBPF, else polling.
    Auto,
    /// eBPF or fail.
    Ebpf,
    /// Polling.
    Proc,
}

/// `--log.format`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// `key=value`.
    Logfmt,
    /// One JSON object a line.
    Json,
}

/// Everything the agent needs, validated.
#[derive(Clone, Debug)]
pub struct Config {
    /// `--web.listen-address`, at least one.
    pub listen: Vec<ListenAddress>,
    /// `--web.telemetry-path`.
    pub telemetry_path: String,
    /// `--web.config.file`.
    pub web_config_file: Option<PathBuf>,
    /// `--web.max-requests`; 0 is unlimited.
    pub web_max_requests: usize,
    /// `--source`.
    pub source: SourceChoice,
    /// `--proc.interval`.
    pub proc_interval: Duration,
    /// `--ebpf.attach`.
    pub attach: AttachChoice,
    /// `--ebpf.ring-buffer-size`, bytes, already rounded to page × 2^n.
    pub ring_buffer_bytes: u32,
    /// `--ebpf.stats`.
    pub bpf_stats: bool,
    /// `--geoip.database`; `None` is the embedded one.
    pub geoip_database: Option<PathBuf>,
    /// `--filter.loopback exclude`.
    pub exclude_loopback: bool,
    /// `--filter.exclude`.
    pub exclude: Vec<Network>,
    /// `--ports.allow`.
    pub ports_allow: PortRanges,
    /// `--ports.max`.
    pub ports_max: usize,
    /// `--connections.max`.
    pub connections_max: usize,
    /// `--listeners on`.
    pub listeners: bool,
    /// `--listeners.max`.
    pub listeners_max: usize,
    /// `--metrics.country-port`.
    pub cross: CrossFamilies,
    /// `--reconcile.interval`.
    pub reconcile_interval: Duration,
    /// `--traffic.interval`; `None` when 0 (off).
    pub traffic_interval: Option<Duration>,
    /// `--netns all`.
    pub all_netns: bool,
    /// `--sandbox`.
    pub sandbox: SandboxChoice,
    /// `--log.level`.
    pub log_level: log::LevelFilter,
    /// `--log.format`.
    pub log_format: LogFormat,
    /// `CONNMON_DEMO=1`, set by `cargo xtask run --demo`; marks every output.
    pub demo: bool,
    /// Where each setting that was written stands, by key.
    origins: BTreeMap<&'static str, Origin>,
}

impl Config {
    /// What the HTTP server is asked to do.
    pub fn server_options(&self) -> connmon_http::Options {
        connmon_http::Options {
            listen: self.listen.clone(),
            telemetry_path: self.telemetry_path.clone(),
            web_config_file: self.web_config_file.clone(),
            max_requests: self.web_max_requests,
        }
    }

    /// What each thread may still do once the agent runs, by these settings.
    /// Has no effect by itself.
    pub fn sandbox_plan(&self) -> Plan {
        let mut plan = Plan::new(self.sandbox, self.all_netns, self.listeners);
        let reloaded = self.web_config_file.iter().chain(&self.geoip_database);
        reloaded.for_each(|file| plan.also_readable(file));
        plan
    }

    /// The error for a value of `key` that only turned out bad when it was
    /// used, like a file that cannot be read: it names where the value stands.
    pub fn refused(&self, key: &'static str, error: impl Into<ConfigError>) -> ConfigError {
        let origin = self.origins.get(key).cloned();
        error.into().under(origin.unwrap_or(Origin::Flag(key)))
    }
}

//! The settings, from flags, environment variables and a file.
//!
//! [`Config`] is the one table of settings: the command line, the names of
//! the variables, the keys of the file and the help texts are made from it.
//! `load` fills it from the three sources, which `main` passes in.

mod check;
mod file;
mod load;
pub mod parse;
pub use check::{check, check_serving};
pub use connmon_http::ConfigError;
pub use load::{Loaded, load, log_format};

use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use clap::{Arg, ArgAction, Args, Command};
use connmon_core::fold::{CrossFamilies, Network, PortRanges, RemoteFilter};
use connmon_host::kernel::AttachChoice;
use connmon_host::sandbox::{Plan, SandboxChoice};
use connmon_http::address::ListenAddress;
use log::LevelFilter;
use parse::{BOOLEANS, DAY, HOUR, LOG_FORMATS, SHORTEST, between, choice, count};

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

/// Everything the agent needs, validated. The comment of a field is its help
/// text.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Agent flags")]
pub struct Config {
    /// YAML file with any of these settings as flat dotted keys
    #[arg(long = "config.file", value_name = "PATH")]
    pub config_file: Option<PathBuf>,
    /// Validate the whole configuration, then exit: 0 valid, 2 invalid, 1 a file, host or interface
    /// in it does not exist yet
    #[arg(long = "config.check", value_name = "BOOL", default_value = "false")]
    #[arg(hide_default_value = true, num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "true", action = ArgAction::Set)]
    #[arg(value_parser = choice(BOOLEANS))]
    pub check_only: bool,
    /// Address to listen on, repeatable; :19910 is port 19910 of every IPv4 and IPv6 address
    #[arg(long = "web.listen-address", value_name = "ADDR")]
    #[arg(default_value = ":19910", value_parser = parse::listen_address)]
    pub listen: Vec<ListenAddress>,
    /// Path under which metrics are served
    #[arg(long = "web.telemetry-path", value_name = "PATH")]
    #[arg(default_value = "/metrics", value_parser = parse::telemetry_path)]
    pub telemetry_path: String,
    /// File with TLS, basic authentication and headers, as in the Prometheus exporter-toolkit
    #[arg(long = "web.config.file", value_name = "PATH")]
    pub web_config_file: Option<PathBuf>,
    /// Most scrapes answered at once, more get status 503; 0 is no limit
    #[arg(long = "web.max-requests", value_name = "N", default_value = "40")]
    #[arg(value_parser = count(0, 1_000_000))]
    pub web_max_requests: usize,
    /// Where connections come from; auto polls /proc where eBPF is not possible, and logs why
    #[arg(long, value_name = "auto|ebpf|proc", default_value = "auto")]
    #[arg(value_parser = choice(parse::SOURCES))]
    pub source: SourceChoice,
    /// How often the kernel's socket tables are read while polling
    #[arg(long = "proc.interval", value_name = "DURATION")]
    #[arg(default_value = "5s", value_parser = between(SHORTEST, HOUR))]
    pub proc_interval: Duration,
    /// How the function probes are attached; tracepoint leaves them out
    #[arg(long = "ebpf.attach", value_name = "auto|fentry|kprobe|tracepoint")]
    #[arg(default_value = "auto", value_parser = choice(parse::ATTACH))]
    pub attach: AttachChoice,
    /// Size of the event ring buffer, rounded up to a power-of-two number of pages
    #[arg(long = "ebpf.ring-buffer-size", value_name = "BYTES")]
    #[arg(default_value = "8388608")]
    #[arg(value_parser = |text: &str| parse::ring_bytes(text, rustix::param::page_size() as u64))]
    pub ring_buffer_bytes: u32,
    /// Let the kernel measure the run time of the eBPF programs (needs CAP_SYS_ADMIN)
    #[arg(long = "ebpf.stats", value_name = "BOOL", default_value = "false")]
    #[arg(hide_default_value = true, num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "true", action = ArgAction::Set)]
    #[arg(value_parser = choice(BOOLEANS))]
    pub bpf_stats: bool,
    /// Country database (MMDB), reloaded when it changes; without it the embedded DB-IP Lite
    #[arg(long = "geoip.database", value_name = "PATH")]
    pub geoip_database: Option<PathBuf>,
    /// Loopback connections: 127.0.0.0/8, ::1, or local address = remote address
    #[arg(long = "filter.loopback", value_name = "exclude|include")]
    #[arg(default_value = "exclude", action = ArgAction::Set)]
    #[arg(value_parser = choice(&[("exclude", true), ("include", false)]))]
    pub exclude_loopback: bool,
    /// Remote network whose connections are not counted, repeatable
    #[arg(long = "filter.exclude", value_name = "CIDR")]
    #[arg(value_parser = parse::network)]
    pub exclude: Vec<Network>,
    /// Ports that may have series, e.g. 22,80,443,8000-8100; the rest count as other
    #[arg(long = "ports.allow", value_name = "LIST", default_value = "all")]
    #[arg(value_parser = parse::ports_allow)]
    pub ports_allow: PortRanges,
    /// Most distinct port values per direction; the rest count as other
    #[arg(long = "ports.max", value_name = "N", default_value = "128")]
    #[arg(value_parser = count(0, 65_535))]
    pub ports_max: usize,
    // About 6 GB of table at most.
    /// Most connections tracked at once
    #[arg(long = "connections.max", value_name = "N")]
    #[arg(default_value = "1048576", value_parser = count(1, 1 << 26))]
    pub connections_max: usize,
    /// Inventory of listening ports
    #[arg(long, value_name = "on|off", default_value = "on")]
    #[arg(action = ArgAction::Set, value_parser = choice(BOOLEANS))]
    pub listeners: bool,
    /// Most entries in the inventory of listening ports
    #[arg(long = "listeners.max", value_name = "N", default_value = "512")]
    #[arg(value_parser = parse::listeners_max)]
    pub listeners_max: usize,
    /// Metrics by country and port, for all or the listed ports
    #[arg(long = "metrics.country-port", value_name = "off|all|LIST")]
    #[arg(default_value = "off", value_parser = parse::cross_families)]
    pub cross: CrossFamilies,
    /// How often the counts are audited against the kernel's socket tables; less often where audits
    /// would take more than 0.5 % of a core
    #[arg(long = "reconcile.interval", value_name = "DURATION")]
    #[arg(default_value = "60s", value_parser = between(SHORTEST, DAY))]
    pub reconcile_interval: Duration,
    // With its path, so that clap takes it for the value.
    /// How often the bytes of open connections are read; 0 switches it off
    #[arg(long = "traffic.interval", value_name = "DURATION")]
    #[arg(default_value = "15s", value_parser = parse::traffic_interval)]
    pub traffic_interval: std::option::Option<Duration>,
    /// Network namespaces that are watched
    #[arg(long = "netns", value_name = "all|host", default_value = "all")]
    #[arg(action = ArgAction::Set)]
    #[arg(value_parser = choice(&[("all", true), ("host", false)]))]
    pub all_netns: bool,
    /// Drop the privileges that the agent does not need once it runs; strict fails where that is
    /// impossible
    #[arg(long, value_name = "auto|strict|off", default_value = "auto")]
    #[arg(value_parser = choice(parse::SANDBOX))]
    pub sandbox: SandboxChoice,
    /// Lowest level logged: error, warn, info, debug or trace
    #[arg(long = "log.level", value_name = "LEVEL", default_value = "info")]
    #[arg(value_parser = choice(parse::LOG_LEVELS))]
    pub log_level: LevelFilter,
    /// Format of log lines
    #[arg(long = "log.format", value_name = "logfmt|json")]
    #[arg(default_value = "logfmt", value_parser = choice(LOG_FORMATS))]
    pub log_format: LogFormat,
    /// `CONNMON_DEMO=1`, set by `cargo xtask run --demo`; marks every output.
    #[arg(skip)]
    pub demo: bool,
    /// What was written for each setting, and where.
    #[arg(skip)]
    written: load::Layer,
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

    /// Which remotes are not counted.
    pub fn remote_filter(&self) -> RemoteFilter {
        RemoteFilter {
            exclude_loopback: self.exclude_loopback,
            exclude: self.exclude.clone(),
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
    pub fn refused(&self, key: &str, error: impl Into<ConfigError>) -> ConfigError {
        let written = self.written.get(key).and_then(|values| values.first());
        let error = error.into();
        match written {
            Some((_, origin)) => error.under(origin),
            None => error.under(format_args!("--{key}")),
        }
    }
}

/// The settings as a command line of their own.
fn command() -> Command {
    let command = Command::new("connmon").no_binary_name(true);
    Config::augment_args(command.disable_help_flag(true))
}

/// Every setting, as clap knows it.
pub fn settings() -> &'static [Arg] {
    static SETTINGS: LazyLock<Vec<Arg>> =
        LazyLock::new(|| command().get_arguments().cloned().collect());
    &SETTINGS
}

/// The flag of a setting without its dashes, which is its key in the file.
pub fn key(setting: &Arg) -> &str {
    setting.get_long().unwrap_or_default()
}

/// The environment variable of a setting: `web.listen-address` is
/// `CONNMON_WEB_LISTEN_ADDRESS`.
pub fn variable(key: &str) -> String {
    let name = key.replace(['.', '-'], "_").to_uppercase();
    format!("{VARIABLE_PREFIX}{name}")
}

/// What all of connmon's environment variables start with.
const VARIABLE_PREFIX: &str = "CONNMON_";

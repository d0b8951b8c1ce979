//! Flags over environment over file over defaults → [`Config`].

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::time::Duration;

use connmon_core::fold::Network;
use connmon_http::address::{self, ListenAddress};

use super::ConfigError;
use super::error::Origin;
use super::settings::{Kind, SETTINGS, Setting, VARIABLE_PREFIX};
use super::{AttachChoice, Config, LogFormat, SandboxChoice, SourceChoice, file, parse};

/// A validated configuration and what is to be said about it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// `--config.check` was given.
    pub check_only: bool,
    /// For `--config.check`: flags, variables and file each without the
    /// others, so that what is overridden is checked too.
    pub alone: Vec<Config>,
    /// `CONNMON_*` variables that name no setting, for a debug line:
    /// Kubernetes injects some for a service called `connmon`.
    pub unknown_variables: Vec<String>,
}

/// Marks every output as a demo; not a setting, `cargo xtask run --demo` sets it.
const DEMO_VARIABLE: &str = "CONNMON_DEMO";

/// Resolves and validates. `flags` are keys with the text typed, in order.
///
/// # Errors
/// The first setting that cannot be used, with where it was written.
pub fn load(
    flags: &[(&'static str, String)],
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Loaded, ConfigError> {
    let flags = Values::from_flags(flags);
    let mut variables = Values::default();
    let mut demo = false;
    let mut unknown_variables = Vec::new();
    for (name, value) in environment {
        let Some(name) = name
            .to_str()
            .filter(|name| name.starts_with(VARIABLE_PREFIX))
        else {
            continue;
        };
        // An empty variable is an unset one, as in Go's kingpin.
        if value.is_empty() {
            continue;
        }
        if name == DEMO_VARIABLE {
            demo = value == "1";
            continue;
        }
        match SETTINGS.iter().find(|setting| setting.variable() == name) {
            Some(setting) => {
                let origin = Origin::Variable(name.to_owned());
                let value = value.into_string().map_err(|value| {
                    ConfigError::at(
                        &origin,
                        format_args!("bad value {value:?}: not valid UTF-8"),
                    )
                })?;
                let list = setting.kind == Kind::List;
                let values = pieces(list, &value, &origin);
                let written = Written { origin, values };
                variables.0.insert(setting.key, written);
            }
            None => unknown_variables.push(name.to_owned()),
        }
    }
    unknown_variables.sort();
    let mut values = flags.over(&variables);
    let file = match values.optional("config.file", |text| Ok(PathBuf::from(text)))? {
        Some(path) => {
            let entries = file::read(&path);
            Values::from_file(entries.map_err(|error| values.under("config.file", error))?)
        }
        None => Values::default(),
    };
    values = values.over(&file);
    let check_only = values.one("config.check", parse::switch)?;
    let mut alone = Vec::new();
    if check_only {
        for source in [flags, variables, file] {
            source.one("config.check", parse::switch)?;
            alone.push(config(&source, demo)?);
        }
    }
    Ok(Loaded {
        config: config(&values, demo)?,
        check_only,
        alone,
        unknown_variables,
    })
}

/// `--log.format` of a configuration that is refused: the first of flag,
/// variable and file that names a format, whatever is wrong with the rest.
pub fn log_format(
    flags: &[(&'static str, String)],
    environment: &[(OsString, OsString)],
) -> LogFormat {
    let written = |key: &'static str| {
        let flag = flags.iter().rev().find(|(name, _)| *name == key);
        let variable = Setting::find(key).map(Setting::variable);
        let value = environment.iter().find(|(name, value)| {
            Some(name.as_os_str()) == variable.as_deref().map(OsStr::new) && !value.is_empty()
        });
        let flag = flag.map(|(_, text)| text.clone());
        let variable = value.and_then(|(_, text)| text.to_str().map(str::to_owned));
        [flag, variable]
    };
    let format = |text: String| parse::choice(&text, LOG_FORMATS).ok();
    let file = || {
        let path = written("config.file").into_iter().flatten().next()?;
        file::log_format(Path::new(&path))
    };
    let above = written("log.format").into_iter().flatten().find_map(format);
    above
        .or_else(|| format(file()?))
        .unwrap_or(LogFormat::Logfmt)
}

fn config(values: &Values, demo: bool) -> Result<Config, ConfigError> {
    let count =
        |least, most| move |text: &str| parse::number(text, least, most).map(|n| n as usize);
    let within = |least, most| move |text: &str| parse::duration_within(text, least, most);
    let path = |text: &str| Ok(PathBuf::from(text));
    Ok(Config {
        listen: listen_addresses(values)?,
        telemetry_path: values.one("web.telemetry-path", parse::telemetry_path)?,
        web_config_file: values.optional("web.config.file", path)?,
        web_max_requests: values.one("web.max-requests", count(0, 1_000_000))?,
        source: values.choice(
            "source",
            &[
                ("auto", SourceChoice::Auto),
                ("ebpf", SourceChoice::Ebpf),
                ("proc", SourceChoice::Proc),
            ],
        )?,
        proc_interval: values.one("proc.interval", within(SHORTEST, HOUR))?,
        attach: values.choice(
            "ebpf.attach",
            &[
                ("auto", AttachChoice::Auto),
                ("fentry", AttachChoice::Fentry),
                ("kprobe", AttachChoice::Kprobe),
                ("tracepoint", AttachChoice::Tracepoint),
            ],
        )?,
        ring_buffer_bytes: values.one("ebpf.ring-buffer-size", |text| {
            parse::ring_bytes(text, rustix::param::page_size() as u64)
        })?,
        bpf_stats: values.one("ebpf.stats", parse::switch)?,
        geoip_database: values.optional("geoip.database", path)?,
        exclude_loopback: values
            .choice("filter.loopback", &[("exclude", true), ("include", false)])?,
        exclude: networks(values)?,
        ports_allow: values.joined("ports.allow", parse::ports_allow)?,
        ports_max: values.one("ports.max", count(0, 65_535))?,
        connections_max: values.one("connections.max", count(1, MOST_CONNECTIONS))?,
        listeners: values.choice("listeners", ON_OFF)?,
        listeners_max: values.one("listeners.max", |text| {
            parse::number(text, 1, 65_536)
                .map(|n| n as usize)
                .map_err(|problem| format!("{problem}; --listeners off switches the inventory off"))
        })?,
        cross: values.joined("metrics.country-port", parse::cross_families)?,
        reconcile_interval: values.one("reconcile.interval", within(SHORTEST, DAY))?,
        traffic_interval: values.one("traffic.interval", |text| {
            match connmon_http::duration(text)? {
                Duration::ZERO => Ok(None),
                _ => parse::duration_within(text, SHORTEST, DAY)
                    .map(Some)
                    .map_err(|problem| format!("{problem}, or 0 to switch sampling off")),
            }
        })?,
        all_netns: values.choice("netns", &[("all", true), ("host", false)])?,
        sandbox: values.choice(
            "sandbox",
            &[
                ("auto", SandboxChoice::Auto),
                ("strict", SandboxChoice::Strict),
                ("off", SandboxChoice::Off),
            ],
        )?,
        log_level: values.choice(
            "log.level",
            &[
                ("error", log::LevelFilter::Error),
                ("warn", log::LevelFilter::Warn),
                ("info", log::LevelFilter::Info),
                ("debug", log::LevelFilter::Debug),
                ("trace", log::LevelFilter::Trace),
            ],
        )?,
        log_format: values.choice("log.format", LOG_FORMATS)?,
        demo,
        origins: values.origins(),
    })
}

/// Shortest interval: below it the agent would do little else.
const SHORTEST: Duration = Duration::from_millis(100);
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);
/// Largest `--connections.max`; about 6 GB of table.
const MOST_CONNECTIONS: u64 = 1 << 26;
const LOG_FORMATS: &[(&str, LogFormat)] =
    &[("logfmt", LogFormat::Logfmt), ("json", LogFormat::Json)];
const ON_OFF: &[(&str, bool)] = &[
    ("on", true),
    ("off", false),
    ("true", true),
    ("false", false),
];

/// Addresses to listen on, refusing two that would fight for one port.
fn listen_addresses(values: &Values) -> Result<Vec<ListenAddress>, ConfigError> {
    let mut addresses: Vec<ListenAddress> = Vec::new();
    for (text, origin) in values.list("web.listen-address") {
        let (host, port) =
            address::parse(&text).map_err(|problem| ConfigError::at(&origin, problem))?;
        addresses.push(ListenAddress {
            text,
            origin: origin.to_string(),
            host,
            port,
        });
    }
    if addresses.is_empty() {
        return Err(values.empty("web.listen-address"));
    }
    address::check_literal(&addresses)?;
    Ok(addresses)
}

/// Excluded networks, each once.
fn networks(values: &Values) -> Result<Vec<Network>, ConfigError> {
    let mut networks = Vec::new();
    for (text, origin) in &values.list("filter.exclude") {
        let network = parse::network(text).map_err(|problem| ConfigError::at(origin, problem))?;
        if !networks.contains(&network) {
            networks.push(network);
        }
    }
    Ok(networks)
}

/// What was written for one key.
#[derive(Clone, Debug)]
struct Written {
    /// Where the key stands.
    origin: Origin,
    /// Its values with where each stands; empty for an empty list.
    values: Vec<(String, Origin)>,
}

/// What was written, per key: of one source, or of the strongest that names
/// it.
#[derive(Debug, Default)]
struct Values(BTreeMap<&'static str, Written>);

impl Values {
    fn from_flags(flags: &[(&'static str, String)]) -> Self {
        let mut all = Self::default();
        for (key, text) in flags {
            let list = Setting::find(key).is_some_and(|setting| setting.kind == Kind::List);
            let origin = Origin::Flag(key);
            let pieces = pieces(list, text, &origin);
            let written = all.0.entry(key).or_insert(Written {
                origin,
                values: Vec::new(),
            });
            if !list {
                written.values.clear();
            }
            written.values.extend(pieces);
        }
        all
    }

    fn from_file(entries: Vec<file::Entry>) -> Self {
        let written = |entry: file::Entry| {
            let file::Entry {
                key,
                origin,
                values,
            } = entry;
            (key, Written { origin, values })
        };
        Self(entries.into_iter().map(written).collect())
    }

    /// These, and those of `weaker` that are not among them.
    fn over(&self, weaker: &Self) -> Self {
        let mut all = weaker.0.clone();
        all.extend(self.0.iter().map(|(key, written)| (*key, written.clone())));
        Self(all)
    }

    /// The error, with where the value of `key` stands before it.
    fn under(&self, key: &'static str, error: ConfigError) -> ConfigError {
        match self.0.get(key) {
            Some(written) => error.under(&written.origin),
            None => error,
        }
    }

    fn origins(&self) -> BTreeMap<&'static str, Origin> {
        let first = |written: &Written| Some(written.values.first()?.1.clone());
        let keys = self.0.iter();
        keys.filter_map(|(key, written)| Some((*key, first(written)?)))
            .collect()
    }

    fn list(&self, key: &'static str) -> Vec<(String, Origin)> {
        match self.0.get(key) {
            Some(written) => written.values.clone(),
            None => match default_of(key) {
                "" => Vec::new(),
                default => vec![(default.to_owned(), Origin::Default(key))],
            },
        }
    }

    fn optional<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        let Some((text, origin)) = self.list(key).into_iter().next() else {
            return Ok(None);
        };
        if text.is_empty() {
            return Err(ConfigError::at(
                &origin,
                "bad value \"\": must not be empty",
            ));
        }
        parse(&text)
            .map(Some)
            .map_err(|problem| ConfigError::at(&origin, problem))
    }

    fn one<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        self.optional(key, parse)?.ok_or_else(|| self.empty(key))
    }

    /// The error for a key that needs a value and has an empty list.
    fn empty(&self, key: &'static str) -> ConfigError {
        let written = self.0.get(key).map(|written| written.origin.clone());
        ConfigError::at(
            written.unwrap_or(Origin::Default(key)),
            "the list is empty; give a value or remove the key",
        )
    }

    /// One value that the file may write as a list: each item is read alone
    /// first, so that a bad one is named with its own line.
    fn joined<T>(
        &self,
        key: &'static str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Result<T, ConfigError> {
        let items = self.list(key);
        let [_, .., (_, last)] = items.as_slice() else {
            return self.one(key, parse);
        };
        for (text, origin) in &items {
            parse::port_list(text).map_err(|problem| ConfigError::at(origin, problem))?;
        }
        let texts: Vec<&str> = items.iter().map(|(text, _)| text.as_str()).collect();
        parse(&texts.join(",")).map_err(|problem| ConfigError::at(last, problem))
    }

    fn choice<T: Copy>(&self, key: &'static str, choices: &[(&str, T)]) -> Result<T, ConfigError> {
        self.one(key, |text| parse::choice(text, choices))
    }
}

fn default_of(key: &str) -> &'static str {
    Setting::find(key).map_or("", |setting| setting.default)
}

fn pieces(list: bool, text: &str, origin: &Origin) -> Vec<(String, Origin)> {
    if !list {
        return vec![(text.to_owned(), origin.clone())];
    }
    text.split(',')
        .map(|piece| (piece.trim().to_owned(), origin.clone()))
        .collect()
}

#[cfg(test)]
mod tests;

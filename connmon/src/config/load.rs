//! Flags over environment over file over defaults → [`Config`].

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::ffi::OsString;
use std::path::Path;

use clap::error::{ContextKind, ContextValue};
use clap::{ArgAction, FromArgMatches as _};
use connmon_http::address;

use super::{Config, ConfigError, LogFormat, VARIABLE_PREFIX, command, file, key, parse, variable};

/// A validated configuration, and what to report about it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// For `--config.check`: flags, variables and file each without the
    /// others, so that what is overridden is checked too.
    pub alone: Vec<Config>,
    /// A sentence for each `CONNMON_*` variable that names no setting.
    pub unknown_variables: Vec<UnknownVariable>,
}

/// A `CONNMON_*` variable that names no setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownVariable {
    /// What to report.
    pub message: String,
    /// [`log::Level::Warn`] where it differs from a known variable by one
    /// character or two that are swapped, else [`log::Level::Debug`]:
    /// Kubernetes injects some for a service called `connmon`.
    pub level: log::Level,
}

/// Values by key, in order, each with where it stands.
pub(super) type Layer = BTreeMap<String, Vec<(String, String)>>;

/// Marks every output as a demo; not a setting, `cargo xtask run --demo` sets it.
const DEMO_VARIABLE: &str = "CONNMON_DEMO";

/// Merges and validates. `flags` are keys with the text typed, in order.
///
/// # Errors
/// The first setting that cannot be used, with where it was written.
pub fn load<K: AsRef<str>>(
    flags: &[(K, String)],
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<Loaded, ConfigError> {
    let lists = lists();
    let mut typed = Layer::new();
    for (key, text) in flags {
        let key = key.as_ref();
        let values = typed.entry(key.to_owned()).or_default();
        if lists.contains(key) {
            values.extend(items(text, &format!("--{key}")));
        } else {
            *values = vec![(text.clone(), format!("--{key}"))];
        }
    }
    let (variables, demo, unknown_variables) = from_environment(environment)?;
    let mut merged = variables.clone();
    merged.extend(typed.clone());
    let file = match merged.get("config.file").and_then(|values| values.first()) {
        Some((path, origin)) if !path.is_empty() => {
            file::read(Path::new(path)).map_err(|error| error.under(origin))?
        }
        _ => Layer::new(),
    };
    for (key, values) in &file {
        merged.entry(key.clone()).or_insert_with(|| values.clone());
    }
    let config = config(&merged, demo)?;
    let mut alone = Vec::new();
    if config.check_only {
        for layer in [&typed, &variables, &file] {
            alone.push(self::config(layer, demo)?);
        }
    }
    Ok(Loaded {
        config,
        alone,
        unknown_variables,
    })
}

/// Keys of the settings that are lists of values: a repeatable flag, a
/// variable with commas, a list in the file.
pub(super) fn lists() -> BTreeSet<String> {
    let settings = super::settings();
    let repeatable = settings
        .iter()
        .filter(|setting| matches!(setting.get_action(), ArgAction::Append));
    repeatable.map(|setting| key(setting).to_owned()).collect()
}

/// The values of a comma-separated list.
fn items(text: &str, origin: &str) -> impl Iterator<Item = (String, String)> {
    text.split(',')
        .map(|item| (item.trim().to_owned(), origin.to_owned()))
}

fn from_environment(
    environment: impl IntoIterator<Item = (OsString, OsString)>,
) -> Result<(Layer, bool, Vec<UnknownVariable>), ConfigError> {
    let settings = super::settings();
    let known: BTreeMap<String, &str> = settings
        .iter()
        .map(|setting| (variable(key(setting)), key(setting)))
        .collect();
    let lists = lists();
    let (mut layer, mut demo, mut unknown) = (Layer::new(), false, Vec::new());
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
        let Some(&key) = known.get(name) else {
            unknown.push(unknown_variable(name, known.keys()));
            continue;
        };
        let value = value.into_string().map_err(|value| {
            ConfigError::at(name, format_args!("bad value {value:?}: not valid UTF-8"))
        })?;
        let values = match lists.contains(key) {
            true => items(&value, name).collect(),
            false => vec![(value, name.to_owned())],
        };
        layer.insert(key.to_owned(), values);
    }
    unknown.sort_by(|a, b| a.message.cmp(&b.message));
    Ok((layer, demo, unknown))
}

fn unknown_variable<'a>(
    name: &str,
    mut known: impl Iterator<Item = &'a String>,
) -> UnknownVariable {
    let ignored = format!("environment variable {name} names no setting and is ignored");
    match known.find(|known| strsim::osa_distance(known, name) == 1) {
        Some(near) => UnknownVariable {
            message: format!("{ignored}; did you mean {near}?"),
            level: log::Level::Warn,
        },
        None => UnknownVariable {
            message: ignored,
            level: log::Level::Debug,
        },
    }
}

fn config(layer: &Layer, demo: bool) -> Result<Config, ConfigError> {
    let mut arguments = Vec::new();
    let lists = lists();
    for (key, values) in layer {
        for (text, origin) in values {
            if text.is_empty() && !lists.contains(key) {
                return Err(ConfigError::at(origin, "bad value \"\": must not be empty"));
            }
            arguments.push(format!("--{key}={text}"));
        }
    }
    let matches = command().try_get_matches_from(arguments);
    let config = matches.and_then(|matches| Config::from_arg_matches(&matches));
    let mut config = config.map_err(|error| refusal(&error, layer))?;
    let written = layer.get("web.listen-address").into_iter().flatten();
    for (address, (_, origin)) in config.listen.iter_mut().zip(written) {
        address.origin.clone_from(origin);
    }
    address::check_literal(&config.listen)?;
    let first = |(key, values): (&String, &Vec<(String, String)>)| {
        Some((key.clone(), values.first()?.1.clone()))
    };
    config.origins = layer.iter().filter_map(first).collect();
    config.demo = demo;
    Ok(config)
}

/// The error for a value that its parser refused, with where the value stands.
fn refusal(error: &clap::Error, layer: &Layer) -> ConfigError {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.as_str(),
        _ => "",
    };
    let (argument, value) = (
        context(ContextKind::InvalidArg),
        context(ContextKind::InvalidValue),
    );
    let key = argument
        .trim_start_matches('-')
        .split([' ', '[', '='])
        .next()
        .unwrap_or_default();
    let mut values = layer.get(key).into_iter().flatten();
    let origin = values
        .find(|(text, _)| text == value)
        .map_or(argument, |(_, origin)| origin);
    match error.source() {
        Some(problem) => ConfigError::at(origin, problem),
        None => ConfigError::at(origin, error),
    }
}

/// `--log.format` of a configuration that is refused: that of the first of
/// flag, variable and file that has a valid one, whatever is wrong with the
/// rest.
pub fn log_format(words: &[OsString], environment: &[(OsString, OsString)]) -> LogFormat {
    let flag = |key: &str| {
        let mut words = words.iter().map(|word| word.to_str().unwrap_or_default());
        let mut found = None;
        while let Some(word) = words.next() {
            match word
                .strip_prefix("--")
                .and_then(|word| word.strip_prefix(key))
            {
                Some("") => found = words.next(),
                Some(rest) if rest.starts_with('=') => found = Some(&rest[1..]),
                _ => {}
            }
        }
        found
    };
    let variable = |key: &str| {
        let mut variables = environment.iter();
        let set = variables.find(|(name, value)| *name == *variable(key) && !value.is_empty());
        set.and_then(|(_, value)| value.to_str())
    };
    let format = |text: &str| parse::choice(parse::LOG_FORMATS)(text).ok();
    let file = || {
        // Line by line: the file as a whole may be invalid.
        let path = flag("config.file").or_else(|| variable("config.file"))?;
        let text = file::read_text(Path::new(path)).ok()?;
        text.lines().find_map(|line| {
            let (_, rest) = line.split_once("log.format")?;
            let rest = rest.trim_start_matches(['"', '\'', ':', ' ', '\t']);
            format(rest.split(|c: char| !c.is_ascii_alphabetic()).next()?)
        })
    };
    let written = [flag("log.format"), variable("log.format")];
    let format = written.into_iter().flatten().find_map(format).or_else(file);
    format.unwrap_or(LogFormat::Logfmt)
}

#[cfg(test)]
mod tests;

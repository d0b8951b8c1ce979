//! Flags over environment over file over defaults → [`Config`].

use std::collections::BTreeMap;
use std::error::Error as _;
use std::ffi::OsString;
use std::path::Path;

use clap::error::{ContextKind, ContextValue};
use clap::{ArgAction, FromArgMatches as _};
use connmon_http::address;

use super::{
    Config, ConfigError, LogFormat, VARIABLE_PREFIX, command, file, key, parse, settings, variable,
};

/// A validated configuration, and what to report about it.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The configuration.
    pub config: Config,
    /// For `--config.check`: flags, variables and file each without the
    /// others, so that what is overridden is checked too.
    pub alone: Vec<Config>,
    /// What to log about each `CONNMON_*` variable that names no setting: a
    /// warning where it differs from a known one by one character or two that
    /// are swapped, else at debug, since Kubernetes injects some for a service
    /// called `connmon`.
    pub unknown_variables: Vec<(log::Level, String)>,
}

/// Values by key, in order, each with where it stands.
pub(super) type Layer = BTreeMap<&'static str, Vec<(String, String)>>;

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
    let (mut typed, mut variables) = (Layer::new(), Layer::new());
    for (key, text) in flags {
        let key = key.as_ref();
        add(&mut typed, key, text, &format!("--{key}"));
    }
    let (mut demo, mut unknown_variables) = (false, Vec::new());
    for (name, value) in environment {
        let name = name.to_str().unwrap_or_default();
        // An empty variable is an unset one, as in Go's kingpin.
        if !name.starts_with(VARIABLE_PREFIX) || value.is_empty() {
            continue;
        }
        if name == DEMO_VARIABLE {
            demo = value == "1";
            continue;
        }
        let mut keys = settings().iter().map(key);
        let Some(key) = keys.find(|key| variable(key) == name) else {
            unknown_variables.push(unknown_variable(name));
            continue;
        };
        let Some(text) = value.to_str() else {
            let problem = format_args!("bad value {value:?}: not valid UTF-8");
            return Err(ConfigError::at(name, problem));
        };
        add(&mut variables, key, text, name);
    }
    unknown_variables.sort();
    let mut merged = variables.clone();
    merged.extend(typed.clone());
    let file = match merged.get("config.file").and_then(|values| values.first()) {
        Some((path, origin)) if !path.is_empty() => {
            file::read(Path::new(path)).map_err(|error| error.under(origin))?
        }
        _ => Layer::new(),
    };
    for (key, values) in &file {
        merged.entry(key).or_insert_with(|| values.clone());
    }
    let mut config = self::config(merged)?;
    config.demo = demo;
    let mut alone = Vec::new();
    if config.check_only {
        for layer in [typed, variables, file] {
            alone.push(self::config(layer)?);
        }
    }
    Ok(Loaded {
        config,
        alone,
        unknown_variables,
    })
}

/// Whether a setting is a list of values: a repeatable flag, a variable with
/// commas, a list in the file.
pub(super) fn is_list(key: &str) -> bool {
    let mut lists = settings()
        .iter()
        .filter(|setting| matches!(setting.get_action(), ArgAction::Append));
    lists.any(|setting| super::key(setting) == key)
}

/// Adds what was written for a setting.
fn add(layer: &mut Layer, key: &str, text: &str, origin: &str) {
    let Some(key) = settings()
        .iter()
        .map(super::key)
        .find(|known| *known == key)
    else {
        return;
    };
    let value = |text: &str| (text.to_owned(), origin.to_owned());
    if is_list(key) {
        let items = text.split(',').map(|item| value(item.trim()));
        layer.entry(key).or_default().extend(items);
    } else {
        layer.insert(key, vec![value(text)]);
    }
}

fn unknown_variable(name: &str) -> (log::Level, String) {
    let ignored = format!("environment variable {name} names no setting and is ignored");
    let mut known = settings().iter().map(|setting| variable(key(setting)));
    match known.find(|known| strsim::osa_distance(known, name) == 1) {
        Some(near) => (log::Level::Warn, format!("{ignored}; did you mean {near}?")),
        None => (log::Level::Debug, ignored),
    }
}

fn config(layer: Layer) -> Result<Config, ConfigError> {
    let mut arguments = Vec::new();
    for (key, values) in &layer {
        for (text, origin) in values {
            if text.is_empty() && !is_list(key) {
                return Err(ConfigError::at(origin, "bad value \"\": must not be empty"));
            }
            arguments.push(format!("--{key}={text}"));
        }
    }
    let matches = command().try_get_matches_from(arguments);
    let config = matches.and_then(|matches| Config::from_arg_matches(&matches));
    let mut config = config.map_err(|error| refusal(&error, &layer))?;
    let written = layer.get("web.listen-address").into_iter().flatten();
    for (address, (_, origin)) in config.listen.iter_mut().zip(written) {
        address.origin.clone_from(origin);
    }
    address::check_literal(&config.listen)?;
    config.written = layer;
    Ok(config)
}

/// The error for a value that its parser refused, with where the value stands.
fn refusal(error: &clap::Error, layer: &Layer) -> ConfigError {
    let context = [ContextKind::InvalidArg, ContextKind::InvalidValue];
    let [argument, value] = context.map(|kind| match error.get(kind) {
        Some(ContextValue::String(text)) => text.as_str(),
        _ => "",
    });
    // `--ports.max <N>`, `--config.check[=<BOOL>]`.
    let end = argument.find([' ', '[']).unwrap_or(argument.len());
    let flag = &argument[..end];
    let mut values = layer.get(&flag[2.min(end)..]).into_iter().flatten();
    let origin = values
        .find(|(text, _)| text == value)
        .map(|(_, origin)| origin.as_str());
    match error.source() {
        Some(problem) => ConfigError::at(origin.unwrap_or(flag), problem),
        None => ConfigError::at(origin.unwrap_or(flag), error),
    }
}

/// `--log.format` of a configuration that is refused: that of the first of
/// flag, variable and file that has a valid one, whatever is wrong with the
/// rest.
pub fn log_format(words: &[OsString], environment: &[(OsString, OsString)]) -> LogFormat {
    let flag = |key: &str| {
        let value = |at: usize| {
            let rest = words[at].to_str()?.strip_prefix("--")?.strip_prefix(key)?;
            match rest {
                "" => words.get(at + 1)?.to_str(),
                rest => rest.strip_prefix('='),
            }
        };
        (0..words.len()).rev().find_map(value)
    };
    let variable = |key: &str| {
        let mut set = environment.iter().filter(|(_, value)| !value.is_empty());
        set.find(|(name, _)| *name == *variable(key))?.1.to_str()
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

//! The YAML of `--config.file` and `--web.config.file`: types out of text, or
//! what is wrong with it, on which line and under which key.

use std::fmt::Display;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_path_to_error::{Deserializer, Segment, Track};
use serde_saphyr::{
    Error, Location, MessageFormatter as _, Options, Spanned, UserMessageFormatter, budget,
    options, with_deserializer_from_str_with_options,
};

use crate::ConfigError;

/// Deepest nesting; the web configuration needs three levels.
const MAX_DEPTH: usize = 16;

/// Most values, those repeated through aliases included, so that a file of a
/// few lines cannot grow without bound.
const MAX_NODES: usize = 20_000;

/// What is wrong, and on which line (1-based; 0: with the file as a whole).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// 1-based; 0 is the file as a whole.
    pub line: usize,
    /// What is wrong.
    pub text: String,
    /// The text may be right, and what it names is not there yet.
    pub not_yet: bool,
}

impl Problem {
    /// A problem with the text itself.
    pub fn new(line: usize, text: impl Display) -> Self {
        Self {
            line,
            text: text.to_string(),
            not_yet: false,
        }
    }

    /// The error for the file at `path`.
    pub fn of(&self, path: &Path) -> ConfigError {
        let (path, text) = (path.display(), &self.text);
        let error = match self.line {
            0 => ConfigError::new(format_args!("{path}: {text}")),
            line => ConfigError::new(format_args!("{path}:{line}: {text}")),
        };
        error.not_yet_if(self.not_yet)
    }
}

/// The file's bytes as text.
pub fn utf8(bytes: Vec<u8>) -> Result<String, Problem> {
    String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        Problem::new(line, "not valid UTF-8")
    })
}

/// A value and the line that it, or the alias for it, stands on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(from = "Spanned<T>", bound = "T: Deserialize<'de>")]
pub struct Located<T> {
    /// 1-based.
    pub line: usize,
    /// The value.
    pub value: T,
}

impl<T> From<Spanned<T>> for Located<T> {
    fn from(spanned: Spanned<T>) -> Self {
        Self {
            line: line(spanned.referenced),
            value: spanned.value,
        }
    }
}

fn line(location: Location) -> usize {
    usize::try_from(location.line()).unwrap_or(usize::MAX)
}

/// The document in `text`; `None` when there is nothing in it. `booleans`
/// tells whether `on`, `off`, `yes` and `no` are booleans, as in YAML 1.1, or
/// words.
pub fn parse<T: DeserializeOwned>(text: &str, booleans: Booleans) -> Result<Option<T>, Problem> {
    let mut track = Track::new();
    with_deserializer_from_str_with_options(text, limits(booleans), |yaml| {
        Option::deserialize(Deserializer::new(yaml, &mut track))
    })
    .map_err(|error| problem(&error, track, text))
}

/// What a boolean is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Booleans {
    /// `true`, `false`, `yes`, `no`, `on`, `off`.
    Yaml11,
    /// `true` and `false`.
    Yaml12,
}

fn limits(booleans: Booleans) -> Options {
    options! {
        budget: budget! {
            max_depth: MAX_DEPTH,
            max_nodes: MAX_NODES,
            max_events: 3 * MAX_NODES,
        },
        alias_limits: serde_saphyr::alias_limits! {
            max_total_replayed_events: MAX_NODES,
        },
        strict_booleans: booleans == Booleans::Yaml12,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        with_snippet: false,
    }
}

/// What the crate found, in the words of the rest of the configuration.
fn problem(error: &Error, track: Track, text: &str) -> Problem {
    let line = error.location().map_or(0, line);
    let mut error = error;
    while let Error::AliasError { error: inner, .. } = error {
        error = inner;
    }
    let key = key(track);
    let (key, what) = match error {
        Error::ExternalMessage { msg, .. } => {
            return Problem::new(line, format_args!("bad YAML: {msg}"));
        }
        Error::MultipleDocuments { .. } => {
            return Problem::new(line, "a second document; only one is allowed");
        }
        Error::SerdeUnknownField { expected, .. } => {
            let known = expected.join(", ");
            (key, format!("unknown key; known here: {known}"))
        }
        Error::DuplicateMappingKey { key: name, .. } => {
            let name = name.as_deref().unwrap_or_default();
            let dot = if key.is_empty() { "" } else { "." };
            (
                format!("{key}{dot}{name}"),
                "written twice; remove one".to_owned(),
            )
        }
        Error::NullIntoString { .. } => (key, "has no value".to_owned()),
        Error::Unexpected {
            expected: what,
            location,
        }
        | Error::InvalidScalar { ty: what, location } => {
            let what = a(what);
            match written(text, *location) {
                value if !value.is_empty() && !is_secret(&key) => {
                    (key, format!("must be {what}, not {value:?}"))
                }
                _ => (key, format!("must be {what}")),
            }
        }
        error => (key, UserMessageFormatter.format_message(error).into_owned()),
    };
    let colon = if key.is_empty() { "" } else { ": " };
    Problem::new(line, format_args!("{key}{colon}{what}"))
}

/// Where in the document, by its keys. `value` is the field of [`Spanned`].
fn key(track: Track) -> String {
    let path = track.path();
    let keys = path.iter().filter_map(|segment| match segment {
        Segment::Map { key } if key != "value" => Some(key.as_str()),
        _ => None,
    });
    keys.collect::<Vec<_>>().join(".")
}

/// The crate's words for what it expects.
fn a(expected: &str) -> &str {
    match expected {
        "mapping start" => "a mapping",
        "sequence start" => "a list",
        "string scalar" => "a string",
        "boolean" => "true or false",
        "u64" => "a whole number",
        other => other,
    }
}

/// Whether the value may be a password, its hash or a private key.
fn is_secret(key: &str) -> bool {
    key.starts_with("basic_auth_users") || key == "tls_server_config.key"
}

/// The scalar at `location`.
fn written(text: &str, location: Location) -> &str {
    let span = location.span();
    let bounds = || {
        let start = usize::try_from(span.byte_offset()?).ok()?;
        Some(start..start.checked_add(usize::try_from(span.byte_len()?).ok()?)?)
    };
    let written = bounds().and_then(|bounds| text.get(bounds));
    written
        .filter(|text| !text.starts_with(['[', '{']))
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::Value;

    use super::*;

    fn any(text: &str) -> Result<Option<BTreeMap<String, Value>>, Problem> {
        parse(text, Booleans::Yaml11)
    }

    #[test]
    fn aliases_work_and_cannot_grow_without_bound() {
        let both = any("a: &x {k: 1}\nb: *x\n").unwrap().unwrap();
        assert_eq!(both["a"], both["b"]);
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..10 {
            let before = vec![format!("*a{}", level - 1); 10].join(",");
            bomb += &format!("a{level}: &a{level} [{before}]\n");
        }
        for text in [
            bomb,
            "a: ".to_owned() + &"[".repeat(100) + &"]".repeat(100),
            "a: &a [*a]".to_owned(),
        ] {
            let problem = any(&text).unwrap_err();
            assert!(problem.line > 0 && problem.text.len() < 300, "{problem:?}");
        }
        let long = "- x\n".repeat(MAX_NODES + 1);
        assert!(parse::<Vec<String>>(&long, Booleans::Yaml11).is_err());
    }

    #[test]
    fn nothing_is_none() {
        for text in ["", "\n", "# only a comment\n", "---\n", "null", "~"] {
            assert_eq!(any(text), Ok(None), "{text:?}");
        }
        assert_eq!(any("{}"), Ok(Some(BTreeMap::new())));
    }
}

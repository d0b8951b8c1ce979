//! The YAML of `--config.file` and `--web.config.file`: types out of text, or
//! what is wrong with it, on which line and under which key.

use std::fmt::Display;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_path_to_error::{Deserializer, Segment, Track};
use serde_saphyr::{
    Error, Location, MessageFormatter as _, Spanned, UserMessageFormatter, budget, options,
    with_deserializer_from_str_with_options,
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

/// The document in `text`; `None` when there is nothing in it.
pub fn parse<T: DeserializeOwned>(text: &str, booleans: Booleans) -> Result<Option<T>, Problem> {
    let options = options! {
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
    };
    let mut track = Track::new();
    with_deserializer_from_str_with_options(text, options, |yaml| {
        Option::deserialize(Deserializer::new(yaml, &mut track))
    })
    .map_err(|error| problem(&error, track, text))
}

/// What a boolean is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Booleans {
    /// `true`, `false`, `yes`, `no`, `on`, `off`.
    Yaml11,
    /// `true` and `false`; the others are words.
    Yaml12,
}

/// The crate's error in the words of the rest of the configuration.
fn problem(error: &Error, track: Track, text: &str) -> Problem {
    let line = error.location().map_or(0, line);
    let mut error = error;
    while let Error::AliasError { error: inner, .. } = error {
        error = inner;
    }
    // `value` is the field of `Spanned`.
    let path = track.path();
    let mut keys: Vec<&str> = path
        .iter()
        .filter_map(|segment| match segment {
            Segment::Map { key } if key != "value" => Some(key.as_str()),
            _ => None,
        })
        .collect();
    let what = match error {
        Error::ExternalMessage { msg, .. } => {
            return Problem::new(line, format_args!("bad YAML: {msg}"));
        }
        Error::MultipleDocuments { .. } => {
            return Problem::new(line, "a second document; only one is allowed");
        }
        Error::SerdeUnknownField { expected, .. } => {
            format!("unknown key; known here: {}", expected.join(", "))
        }
        Error::SerdeUnknownVariant {
            variant, expected, ..
        } => {
            let known = expected.join(", ");
            format!("unknown value {variant:?}; must be one of {known}")
        }
        Error::DuplicateMappingKey { key, .. } => {
            keys.extend(key.as_deref());
            "written twice; remove one".to_owned()
        }
        Error::ExternallyTaggedEnumExpectedScalarOrMapping { .. } => "must be a name".to_owned(),
        Error::NullIntoString { .. } => "has no value".to_owned(),
        Error::Unexpected {
            expected: what,
            location,
        }
        | Error::InvalidScalar { ty: what, location } => {
            let what = match *what {
                "mapping start" => "a mapping",
                "sequence start" => "a list",
                "string scalar" => "a string",
                "boolean" => "true or false",
                "u64" => "a whole number",
                other => other,
            };
            // Passwords, their hashes and private keys are in no message.
            let is_secret = matches!(
                keys[..],
                ["basic_auth_users", ..] | ["tls_server_config", "key"]
            );
            match scalar(text, *location).filter(|_| !is_secret) {
                Some(value) => format!("must be {what}, not {value:?}"),
                None => format!("must be {what}"),
            }
        }
        error => UserMessageFormatter.format_message(error).into_owned(),
    };
    let key = keys.join(".");
    let colon = if key.is_empty() { "" } else { ": " };
    Problem::new(line, format_args!("{key}{colon}{what}"))
}

/// The scalar at `location`.
fn scalar(text: &str, location: Location) -> Option<&str> {
    let span = location.span();
    let start = usize::try_from(span.byte_offset()?).ok()?;
    let length = usize::try_from(span.byte_len()?).ok()?;
    let scalar = text.get(start..start.checked_add(length)?)?;
    (!scalar.is_empty() && !scalar.starts_with(['[', '{'])).then_some(scalar)
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

//! The YAML of `--config.file`: one flat mapping of dotted keys to scalars
//! or lists of scalars, read with line numbers.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use connmon_http::read_file::read_file;
use connmon_http::yaml::{self, Booleans, Located, Problem};
use connmon_http::{ConfigError, is_state_of_host};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::error::Origin;
use super::settings::{Kind, Setting};

/// Largest configuration file read, bytes; anything larger is a mistake.
const MAX_BYTES: u64 = 1 << 20;

/// Values of one key, as written.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    /// The setting.
    pub key: &'static str,
    /// Where the key stands.
    pub origin: Origin,
    /// Its values with where each stands; empty for an empty list.
    pub values: Vec<(String, Origin)>,
}

/// Reads and parses the file.
pub fn read(path: &Path) -> Result<Vec<Entry>, ConfigError> {
    let text = read_text(path)?;
    parse(path, &text)
}

/// Reads the file.
pub fn read_text(path: &Path) -> Result<String, ConfigError> {
    let bytes = read_file(path, MAX_BYTES).map_err(|error| {
        ConfigError::new(format_args!("{}: cannot read: {error}", path.display()))
            .not_yet_if(is_state_of_host(error.raw_os_error()))
    })?;
    yaml::utf8(bytes).map_err(|problem| problem.of(path))
}

/// `log.format` of a file that may be refused as a whole.
pub fn log_format(path: &Path) -> Option<String> {
    let text = read_text(path).ok()?;
    match parse(path, &text) {
        Ok(entries) => {
            let entry = entries
                .into_iter()
                .find(|entry| entry.key == "log.format")?;
            entry.values.into_iter().next().map(|(text, _)| text)
        }
        Err(_) => text.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            let bare = |text: &str| text.trim().trim_matches(['"', '\'']).to_owned();
            let value = value.split(" #").next().unwrap_or(value);
            (bare(key) == "log.format").then(|| bare(value))
        }),
    }
}

/// Parses the text of the file.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Entry>, ConfigError> {
    // Keys sort by their lines.
    let entries: Option<BTreeMap<Located<String>, Located<Value>>> =
        yaml::parse(text, Booleans::Yaml12).map_err(|problem| problem.of(path))?;
    let path = Arc::new(path.to_owned());
    let entries = entries.unwrap_or_default().into_iter();
    let entry = |(key, value): (Located<String>, Located<Value>)| {
        let origin = |line| Origin::File {
            path: Arc::clone(&path),
            line,
            key: key.value.clone(),
        };
        let Some(setting) = Setting::find(&key.value) else {
            return Err(Problem::new(key.line, unknown_key(&key.value)).of(&path));
        };
        if matches!(setting.key, "config.file" | "config.check") {
            let text = format_args!("{} can only be a flag or a variable", setting.key);
            return Err(Problem::new(key.line, text).of(&path));
        }
        let is_list = matches!(setting.kind, Kind::List | Kind::Joined);
        let items = match value.value {
            Value::List(items) if is_list => items,
            _ => vec![value],
        };
        let texts = items.into_iter().map(|item| {
            let origin = origin(item.line);
            let problem = match item.value {
                Value::Text(text) if !text.is_empty() => return Ok((text, origin)),
                Value::Text(_) | Value::Nothing => "has no value; give one or remove the line",
                Value::List(_) if is_list => "must be a list of plain values",
                Value::List(_) => "takes one value, not a list",
                Value::Mapping => {
                    "takes a value, not a mapping; keys are flat, like `ports.max: 64`"
                }
            };
            Err(ConfigError::at(&origin, problem))
        });
        Ok(Entry {
            key: setting.key,
            origin: origin(key.line),
            values: texts.collect::<Result<_, _>>()?,
        })
    };
    entries.map(entry).collect()
}

/// A value before it is known what its key takes. A number or boolean is its
/// text.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Value {
    Nothing,
    Text(String),
    List(Vec<Located<Value>>),
    Mapping,
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue)
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value or a list of values")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Nothing)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::Text(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::Text(format!("{value:?}")))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::Text(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut pairs: A) -> Result<Value, A::Error> {
        while pairs.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Mapping)
    }
}

fn unknown_key(key: &str) -> String {
    let nearest = super::settings::SETTINGS
        .iter()
        .map(|setting| (distance(setting.key, key), setting.key))
        .min()
        .filter(|(distance, _)| *distance <= 3);
    match nearest {
        Some((_, nearest)) => format!("unknown key {key:?}; did you mean {nearest}?"),
        None => format!("unknown key {key:?}; keys are the agent's flags without dashes"),
    }
}

/// Levenshtein distance, for suggestions.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().take(64).collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<Vec<(&'static str, Vec<String>)>, String> {
        parse(Path::new("c.yml"), text)
            .map(|entries| {
                entries
                    .into_iter()
                    .map(|entry| (entry.key, entry.values.into_iter().map(|v| v.0).collect()))
                    .collect()
            })
            .map_err(|error| error.to_string())
    }

    #[test]
    fn keys_are_flat_and_lists_are_lists() {
        let text = "# comment\nports.max: 64\nlisteners: on\nports.allow: [22, 80-90]\n\
                    web.listen-address:\n  - \":1\"\n  - '127.0.0.1:2'\nfilter.exclude: 10.0.0.0/8\n";
        assert_eq!(
            parsed(text).unwrap(),
            vec![
                ("ports.max", vec!["64".to_owned()]),
                ("listeners", vec!["on".to_owned()]),
                ("ports.allow", vec!["22".to_owned(), "80-90".to_owned()]),
                (
                    "web.listen-address",
                    vec![":1".to_owned(), "127.0.0.1:2".to_owned()]
                ),
                ("filter.exclude", vec!["10.0.0.0/8".to_owned()]),
            ]
        );
        // Numbers and words stay as they are written.
        let text = "ports.max:\t010\nlisteners: off\nproc.interval: 1_0\nsandbox: yes\n";
        let values = parsed(text)
            .unwrap()
            .into_iter()
            .map(|(_, values)| values.concat());
        assert_eq!(values.collect::<Vec<_>>(), ["010", "off", "1_0", "yes"]);
        for empty in ["", "# nothing\n", "---\n", "{}\n", "~\n"] {
            assert_eq!(parsed(empty), Ok(vec![]), "{empty:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_line() {
        for (text, message) in [
            (
                "ports.max: 1\nport.max: 2\n",
                "c.yml:2: unknown key \"port.max\"; did you mean ports.max?",
            ),
            ("banana: 1\n", "c.yml:1: unknown key \"banana\""),
            (
                "ports.max: 1\n\nports.max: 2\n",
                "c.yml:3: ports.max: written twice",
            ),
            ("ports.max:\n", "c.yml:1: ports.max: has no value"),
            (
                "ports.max: [1]\n",
                "c.yml:1: ports.max: takes one value, not a list",
            ),
            (
                "web:\n  listen-address: x\n",
                "c.yml:1: unknown key \"web\"",
            ),
            ("ports.max: {a: 1}\n", "takes a value, not a mapping"),
            ("- a\n", "c.yml:1: must be a mapping"),
            ("hello\n", "c.yml:1: must be a mapping"),
            (
                "ports.max: 1\n---\nports.max: 2\n",
                "a second document; only one is allowed",
            ),
            ("ports.max: \"1\n", "bad YAML"),
            ("config.file: x\n", "config.file can only be a flag"),
            ("ports.allow: [[1]]\n", "must be a list of plain values"),
        ] {
            let error = parsed(text).unwrap_err();
            assert!(error.contains(message), "{text:?}: {error}");
        }
    }

    proptest::proptest! {
        /// Any text is settings or an error that names the file; never a
        /// panic, never an endless loop.
        #[test]
        fn parsing_is_total(text in ".*", yaml in "([a-z.:\\-\\[\\]{}&*!|>'\"#%@, \n]){0,80}") {
            for text in [text, yaml] {
                if let Err(error) = parse(Path::new("c.yml"), &text) {
                    proptest::prop_assert!(error.to_string().starts_with("c.yml:"), "{}", error);
                }
            }
        }
    }

    #[test]
    fn unreadable_files_are_named() {
        let error = read(Path::new("/nonexistent/connmon.yml")).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("/nonexistent/connmon.yml: cannot read")
        );
        assert!(
            read(Path::new("/dev/zero"))
                .unwrap_err()
                .to_string()
                .contains("/dev/zero: cannot read: is a character device")
        );
    }
}

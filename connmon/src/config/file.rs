//! The YAML of `--config.file`: one flat mapping of dotted keys to values or
//! lists of values.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use connmon_http::read_file::read_file;
use connmon_http::yaml::{self, Booleans, Located, Problem};
use connmon_http::{ConfigError, is_state_of_host};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::load::{Layer, is_list};
use super::{key, parse, settings};

/// Largest configuration file that is read, bytes.
const MAX_BYTES: u64 = 1 << 20;

/// Reads and parses the file.
pub fn read(path: &Path) -> Result<Layer, ConfigError> {
    parse(path, &read_text(path)?)
}

/// Reads the file.
pub fn read_text(path: &Path) -> Result<String, ConfigError> {
    let bytes = read_file(path, MAX_BYTES).map_err(|error| {
        ConfigError::new(format_args!("{}: cannot read: {error}", path.display()))
            .not_yet_if(is_state_of_host(error.raw_os_error()))
    })?;
    yaml::utf8(bytes).map_err(|problem| problem.of(path))
}

/// Parses the text of the file.
fn parse(path: &Path, text: &str) -> Result<Layer, ConfigError> {
    // Keys sort by their lines, so that the first error is reported.
    let entries: Option<BTreeMap<Located<String>, Located<Value>>> =
        yaml::parse(text, Booleans::Yaml12).map_err(|problem| problem.of(path))?;
    let mut layer = Layer::new();
    for (written, value) in entries.unwrap_or_default() {
        let (line, written) = (written.line, written.value);
        let refuse = |line, text: String| Err(Problem::new(line, text).of(path));
        let Some(key) = settings().iter().map(key).find(|known| *known == written) else {
            return refuse(line, unknown_key(&written));
        };
        if matches!(key, "config.file" | "config.check") {
            let text = format!("{key}: can only be a flag or a variable; remove the line");
            return refuse(line, text);
        }
        let values = values(key, value)
            .map_err(|(line, text)| Problem::new(line, format_args!("{key}: {text}")).of(path))?;
        let origin = |line| format!("{}:{line}: {key}", path.display());
        let mut values: Vec<_> = values
            .into_iter()
            .map(|(line, text)| (text, origin(line)))
            .collect();
        if is_joined(key) && values.len() > 1 {
            // Each alone, so that an invalid one is named with its own line.
            for (text, origin) in &values {
                parse::port_list(text).map_err(|problem| ConfigError::at(origin, problem))?;
            }
            let texts: Vec<&str> = values.iter().map(|(text, _)| text.as_str()).collect();
            values = vec![(texts.join(","), origin(line))];
        }
        // Without a default, an empty list is its value.
        if values.is_empty() && key != "filter.exclude" {
            let text = format!("{key}: the list is empty; give a value or remove the key");
            return refuse(line, text);
        }
        layer.insert(key, values);
    }
    Ok(layer)
}

/// Whether a setting is one value that is itself a list of ports.
fn is_joined(key: &str) -> bool {
    matches!(key, "ports.allow" | "metrics.country-port")
}

/// The values of a key with their lines, or what is wrong on which line.
fn values(key: &str, value: Located<Value>) -> Result<Vec<(usize, String)>, (usize, &'static str)> {
    let takes_list = is_list(key) || is_joined(key);
    let items = match value.value {
        Value::List(items) if takes_list => items,
        _ => vec![value],
    };
    let texts = items.into_iter().map(|item| match item.value {
        Value::One(text) if !text.is_empty() => Ok((item.line, text)),
        Value::One(_) => Err((item.line, "has no value; give one or remove the line")),
        Value::List(_) if takes_list => Err((item.line, "must be a list of plain values")),
        Value::List(_) => Err((item.line, "takes one value, not a list")),
        Value::Mapping => {
            let text = "takes a value, not a mapping; keys are flat, like `ports.max: 64`";
            Err((item.line, text))
        }
    });
    texts.collect()
}

/// The value of a key, whatever the key takes. A number or boolean is its
/// text, nothing is empty.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Value {
    One(String),
    List(Vec<Located<Value>>),
    Mapping,
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value or a list of values")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::One(String::new()))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::One(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::One(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::One(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Value::One(format!("{value:?}")))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::One(value.to_owned()))
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

fn unknown_key(written: &str) -> String {
    let known = settings().iter().map(key);
    let distances = known.map(|known| (strsim::levenshtein(known, written), known));
    match distances.min().filter(|(distance, _)| *distance <= 3) {
        Some((_, nearest)) => format!("unknown key {written:?}; did you mean {nearest}?"),
        None => format!("unknown key {written:?}; keys are the agent's flags without dashes"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Result<BTreeMap<&'static str, Vec<String>>, String> {
        let layer = parse(Path::new("c.yml"), text).map_err(|error| error.to_string())?;
        let texts = |(key, values): (_, Vec<(String, _)>)| {
            (key, values.into_iter().map(|(text, _)| text).collect())
        };
        Ok(layer.into_iter().map(texts).collect())
    }

    #[test]
    fn keys_are_flat_and_lists_are_lists() {
        let text = "# comment\nports.max: 64\nlisteners: on\nports.allow: [22, 80-90]\n\
                    web.listen-address:\n  - \":1\"\n  - '127.0.0.1:2'\nfilter.exclude: 10.0.0.0/8\n";
        let expected = [
            ("ports.max", &["64"][..]),
            ("listeners", &["on"]),
            ("ports.allow", &["22,80-90"]),
            ("web.listen-address", &[":1", "127.0.0.1:2"]),
            ("filter.exclude", &["10.0.0.0/8"]),
        ];
        let texts = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect();
        let expected = expected.map(|(key, values)| (key, texts(values)));
        assert_eq!(parsed(text), Ok(BTreeMap::from(expected)));
        // Numbers and words stay as they are written.
        let text = "ports.max:\t010\nlisteners: off\nproc.interval: 1_0\nsandbox: yes\n";
        let values = parsed(text).unwrap().into_values().flatten();
        assert_eq!(values.collect::<Vec<_>>(), ["off", "010", "1_0", "yes"]);
        for empty in ["", "# nothing\n", "---\n", "{}\n", "~\n"] {
            assert_eq!(parsed(empty), Ok(BTreeMap::new()), "{empty:?}");
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
            ("config.file: x\n", "config.file: can only be a flag"),
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

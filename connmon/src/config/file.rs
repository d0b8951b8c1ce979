//! The YAML of `--config.file`: one flat mapping of dotted keys to scalars
//! or lists of scalars, read with line numbers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use saphyr_parser::{Event, Parser, ScalarStyle};

use super::error::{ConfigError, Origin};
use super::settings::{Kind, Setting};
use crate::read_file::read_file;

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
    let bytes = read_file(path, MAX_BYTES)
        .map_err(|error| ConfigError::new(format!("{}: cannot read: {error}", path.display())))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        ConfigError::new(format!("{}:{line}: not valid UTF-8", path.display()))
    })?;
    parse(path, &text)
}

/// Parses the text of the file.
pub fn parse(path: &Path, text: &str) -> Result<Vec<Entry>, ConfigError> {
    let mut reader = Reader {
        path: Arc::new(path.to_owned()),
        parser: Parser::new_from_str(text),
        documents: 0,
    };
    let mut entries: Vec<Entry> = Vec::new();
    loop {
        let (event, line) = reader.next()?;
        match event {
            Event::StreamStart | Event::DocumentEnd | Event::Nothing => {}
            Event::StreamEnd => return Ok(entries),
            Event::DocumentStart(_) => {
                reader.documents += 1;
                if reader.documents > 1 {
                    return Err(reader.refuse(line, "a second document; only one is allowed"));
                }
            }
            Event::MappingStart(..) => reader.mapping(&mut entries)?,
            // An empty document is a null scalar.
            Event::Scalar(text, ScalarStyle::Plain, _, None) if is_null(&text) => {}
            _ => {
                return Err(
                    reader.refuse(line, "must be a mapping of settings, like `ports.max: 64`")
                );
            }
        }
    }
}

struct Reader<'input> {
    path: Arc<PathBuf>,
    parser: Parser<'input, saphyr_parser::StrInput<'input>>,
    documents: usize,
}

impl<'input> Reader<'input> {
    fn next(&mut self) -> Result<(Event<'input>, usize), ConfigError> {
        match self.parser.next_event() {
            None => Ok((Event::StreamEnd, 0)),
            Some(Ok((event, span))) => Ok((event, span.start.line())),
            Some(Err(error)) => {
                let line = error.marker().line();
                Err(self.refuse(line, &format!("bad YAML: {}", error.info())))
            }
        }
    }

    fn refuse(&self, line: usize, problem: &str) -> ConfigError {
        ConfigError::new(format!("{}:{line}: {problem}", self.path.display()))
    }

    fn mapping(&mut self, entries: &mut Vec<Entry>) -> Result<(), ConfigError> {
        loop {
            let (event, line) = self.next()?;
            let key = match event {
                Event::MappingEnd => return Ok(()),
                Event::Scalar(key, ..) => key,
                _ => return Err(self.refuse(line, "a key must be a plain word")),
            };
            let Some(setting) = Setting::find(&key) else {
                return Err(self.refuse(line, &unknown_key(&key)));
            };
            if matches!(setting.key, "config.file" | "config.check") {
                return Err(self.refuse(line, &format!("{key} can only be a flag or a variable")));
            }
            let origin = self.origin(line, &key);
            if let Some(before) = entries.iter().find(|entry| entry.key == setting.key) {
                return Err(ConfigError::at(
                    &origin,
                    format_args!("written twice, first at {}; remove one", before.origin),
                ));
            }
            let values = self.values(setting, &key)?;
            entries.push(Entry {
                key: setting.key,
                origin,
                values,
            });
        }
    }

    fn origin(&self, line: usize, key: &str) -> Origin {
        Origin::File {
            path: Arc::clone(&self.path),
            line,
            key: key.to_owned(),
        }
    }

    fn values(
        &mut self,
        setting: &Setting,
        key: &str,
    ) -> Result<Vec<(String, Origin)>, ConfigError> {
        let (event, line) = self.next()?;
        let origin = self.origin(line, key);
        match event {
            Event::Scalar(text, style, ..) => Ok(vec![self.scalar(&text, style, origin)?]),
            Event::SequenceStart(..) if matches!(setting.kind, Kind::List | Kind::Joined) => {
                let mut values = Vec::new();
                loop {
                    let (event, line) = self.next()?;
                    let origin = self.origin(line, key);
                    match event {
                        Event::SequenceEnd => break,
                        Event::Scalar(text, style, ..) => {
                            values.push(self.scalar(&text, style, origin)?);
                        }
                        _ => {
                            return Err(ConfigError::at(&origin, "must be a list of plain values"));
                        }
                    }
                }
                Ok(values)
            }
            Event::SequenceStart(..) => {
                Err(ConfigError::at(&origin, "takes one value, not a list"))
            }
            Event::Alias(_) => Err(ConfigError::at(&origin, "aliases are not supported")),
            _ => Err(ConfigError::at(
                &origin,
                format_args!("takes a value, not a mapping; keys are flat, like `{key}: …`"),
            )),
        }
    }

    fn scalar(
        &self,
        text: &str,
        style: ScalarStyle,
        origin: Origin,
    ) -> Result<(String, Origin), ConfigError> {
        if text.is_empty() || (style == ScalarStyle::Plain && is_null(text)) {
            return Err(ConfigError::at(
                &origin,
                "has no value; give one or remove the line",
            ));
        }
        Ok((text.to_owned(), origin))
    }
}

fn is_null(text: &str) -> bool {
    matches!(text, "" | "~" | "null" | "Null" | "NULL")
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
                "c.yml:3: ports.max: written twice, first at c.yml:1",
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
                "c.yml:2: a second document",
            ),
            ("ports.max: \"1\n", "bad YAML"),
            ("config.file: x\n", "config.file can only be a flag"),
            (
                "filter.exclude: &a [10.0.0.0/8]\nweb.listen-address: *a\n",
                "aliases are not supported",
            ),
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

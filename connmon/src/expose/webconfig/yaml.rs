//! YAML as the toolkit's parser (Go's yaml.v2, strict) understands it: a
//! small tree with line numbers, YAML 1.1 booleans, Go's integers, aliases
//! and merge keys.

use std::collections::{HashMap, HashSet};
use std::fmt::Display;

use saphyr_parser::{Event, Parser, ScalarStyle, StrInput};

/// Deepest nesting; the format itself needs three levels.
const MAX_DEPTH: usize = 32;

/// Most nodes, those repeated through aliases included, so that a file of a
/// few lines cannot grow without bound.
const MAX_NODES: usize = 20_000;

/// What is wrong, and on which line (1-based; 0: with the file as a whole).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) line: usize,
    pub(super) text: String,
    /// The file may be right: another that it names cannot be read yet.
    pub(super) not_yet: bool,
}

impl Problem {
    pub(super) fn new(line: usize, text: impl Display) -> Self {
        Self {
            line,
            text: text.to_string(),
            not_yet: false,
        }
    }
}

/// One value and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) line: usize,
    /// Stands here through an alias.
    alias: bool,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    Scalar { text: String, plain: bool },
    Sequence(Vec<Node>),
    Mapping(Vec<(Node, Node)>),
}

/// The first document, or `None` when there is nothing in it; what follows
/// it is not looked at, as in Go's `yaml.Unmarshal`.
pub(super) fn parse(text: &str) -> Result<Option<Node>, Problem> {
    directives(text)?;
    let mut builder = Builder {
        parser: Parser::new_from_str(text),
        anchors: HashMap::new(),
        nodes: 0,
    };
    loop {
        match builder.next()? {
            (Event::StreamEnd | Event::DocumentEnd, _) => return Ok(None),
            (Event::StreamStart | Event::Nothing | Event::DocumentStart(_), _) => {}
            (event, line) => {
                let node = builder.node(event, line, 0)?;
                return Ok((!node.is_null()).then_some(node));
            }
        }
    }
}

/// What stands before the document: Go's parser knows YAML 1.1 alone, and no
/// directive beside `%YAML` and `%TAG`; ours reports neither.
fn directives(text: &str) -> Result<(), Problem> {
    let text = text.trim_start_matches('\u{feff}');
    for (line, at) in text.lines().zip(1..) {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("%YAML") if words.next() != Some("1.1") => {
                let text = "%YAML: found incompatible YAML document; only 1.1 is read";
                return Err(Problem::new(at, text));
            }
            Some("%YAML" | "%TAG") => {}
            Some(word) if line.starts_with('%') => {
                return Err(Problem::new(at, format_args!("unknown directive {word:?}")));
            }
            Some(word) if !word.starts_with('#') => break,
            _ => {}
        }
    }
    Ok(())
}

struct Builder<'input> {
    parser: Parser<'input, StrInput<'input>>,
    anchors: HashMap<usize, Node>,
    nodes: usize,
}

impl<'input> Builder<'input> {
    fn next(&mut self) -> Result<(Event<'input>, usize), Problem> {
        match self.parser.next_event() {
            None => Ok((Event::StreamEnd, 0)),
            Some(Ok((event, span))) => Ok((event, span.start.line())),
            Some(Err(error)) => Err(Problem::new(
                error.marker().line(),
                format_args!("bad YAML: {}", error.info()),
            )),
        }
    }

    fn node(&mut self, event: Event<'input>, line: usize, depth: usize) -> Result<Node, Problem> {
        self.count(1, line)?;
        if depth >= MAX_DEPTH {
            return Err(Problem::new(
                line,
                format_args!("nested deeper than {MAX_DEPTH} levels"),
            ));
        }
        let (content, anchor) = match event {
            Event::Alias(anchor) => {
                let Some(mut node) = self.anchors.get(&anchor).cloned() else {
                    return Err(Problem::new(
                        line,
                        "an alias of something that is not complete",
                    ));
                };
                self.count(node.size(), line)?;
                if depth + node.depth() >= MAX_DEPTH {
                    return Err(Problem::new(
                        line,
                        format_args!("nested deeper than {MAX_DEPTH} levels"),
                    ));
                }
                node.line = line;
                node.alias = true;
                return Ok(node);
            }
            Event::Scalar(text, style, anchor, tag) => {
                let string =
                    tag.is_some_and(|tag| tag.is_yaml_core_schema() && tag.suffix == "str");
                let content = Content::Scalar {
                    text: text.into_owned(),
                    plain: style == ScalarStyle::Plain && !string,
                };
                (content, anchor)
            }
            Event::SequenceStart(anchor, _) => {
                let mut items = Vec::new();
                loop {
                    match self.next()? {
                        (Event::SequenceEnd, _) => break,
                        (event, line) => items.push(self.node(event, line, depth + 1)?),
                    }
                }
                (Content::Sequence(items), anchor)
            }
            Event::MappingStart(anchor, _) => {
                let mut pairs = Vec::new();
                loop {
                    let (event, line) = self.next()?;
                    if matches!(event, Event::MappingEnd) {
                        break;
                    }
                    let key = self.node(event, line, depth + 1)?;
                    let (event, line) = self.next()?;
                    pairs.push((key, self.node(event, line, depth + 1)?));
                }
                (Content::Mapping(pairs), anchor)
            }
            _ => return Err(Problem::new(line, "bad YAML: unexpected end")),
        };
        let node = Node {
            line,
            alias: false,
            content,
        };
        // The parser numbers anchors from 1; 0 is none.
        if anchor > 0 {
            self.anchors.insert(anchor, node.clone());
        }
        Ok(node)
    }

    fn count(&mut self, nodes: usize, line: usize) -> Result<(), Problem> {
        self.nodes += nodes;
        if self.nodes > MAX_NODES {
            return Err(Problem::new(
                line,
                format_args!("more than {MAX_NODES} values (aliases multiply them)"),
            ));
        }
        Ok(())
    }
}

impl Node {
    fn size(&self) -> usize {
        match &self.content {
            Content::Scalar { .. } => 1,
            Content::Sequence(items) => 1 + items.iter().map(Self::size).sum::<usize>(),
            Content::Mapping(pairs) => {
                let sizes = pairs.iter().map(|(key, value)| key.size() + value.size());
                1 + sizes.sum::<usize>()
            }
        }
    }

    fn depth(&self) -> usize {
        let deepest = |nodes: &mut dyn Iterator<Item = &Self>| nodes.map(Self::depth).max();
        1 + match &self.content {
            Content::Scalar { .. } => None,
            Content::Sequence(items) => deepest(&mut items.iter()),
            Content::Mapping(pairs) => {
                deepest(&mut pairs.iter().flat_map(|(key, value)| [key, value]))
            }
        }
        .unwrap_or(0)
    }

    /// Whether nothing is written, or a null.
    pub(super) fn is_null(&self) -> bool {
        matches!(&self.content, Content::Scalar { text, plain: true }
            if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// A null that Go leaves out before a type of its own sees it; `Null`
    /// and `NULL` reach that type, as an empty string.
    pub(super) fn is_left_out(&self) -> bool {
        self.is_null()
            && matches!(&self.content, Content::Scalar { text, .. }
                if !matches!(text.as_str(), "Null" | "NULL"))
    }

    fn what(&self) -> String {
        match &self.content {
            Content::Scalar { text, .. } => format!("{text:?}"),
            Content::Sequence(_) => "a list".to_owned(),
            Content::Mapping(_) => "a mapping".to_owned(),
        }
    }

    /// Any scalar as the text that was written; null is the empty string.
    pub(super) fn string(&self, key: &str) -> Result<String, Problem> {
        match &self.content {
            _ if self.is_null() => Ok(String::new()),
            Content::Scalar { text, .. } => Ok(text.clone()),
            _ => Err(self.problem(key, "must be a string")),
        }
    }

    /// A YAML 1.1 boolean; null is false.
    pub(super) fn boolean(&self, key: &str) -> Result<bool, Problem> {
        match &self.content {
            _ if self.is_null() => Ok(false),
            Content::Scalar { text, plain: true } => match text.as_str() {
                "y" | "Y" | "yes" | "Yes" | "YES" | "true" | "True" | "TRUE" | "on" | "On"
                | "ON" => Ok(true),
                "n" | "N" | "no" | "No" | "NO" | "false" | "False" | "FALSE" | "off" | "Off"
                | "OFF" => Ok(false),
                _ => Err(self.problem(key, "must be true or false")),
            },
            _ => Err(self.problem(key, "must be true or false")),
        }
    }

    /// A number, as Go reads it into an int (a fraction is cut off); null is 0.
    pub(super) fn integer(&self, key: &str) -> Result<i64, Problem> {
        match &self.content {
            _ if self.is_null() => Ok(0),
            Content::Scalar { text, plain: true } => {
                integer(text).ok_or_else(|| self.problem(key, "must be a whole number"))
            }
            _ => Err(self.problem(key, "must be a whole number")),
        }
    }

    /// A Go duration (`1s`, `1h30m`, `-5ms`) or a bare number of nanoseconds.
    pub(super) fn duration_ns(&self, key: &str) -> Result<i64, Problem> {
        let refuse = || self.problem(key, "must be a duration like 500ms, 1s or 1h30m");
        match &self.content {
            _ if self.is_null() => Ok(0),
            Content::Scalar { text, plain } => duration_ns(text)
                .or_else(|| plain.then(|| integer(text)).flatten())
                .ok_or_else(refuse),
            _ => Err(refuse()),
        }
    }

    /// The items of a list; `None` for null.
    pub(super) fn list(&self, key: &str) -> Result<Option<&[Self]>, Problem> {
        match &self.content {
            _ if self.is_null() => Ok(None),
            Content::Sequence(items) => Ok(Some(items)),
            _ => Err(self.problem(key, "must be a list")),
        }
    }

    /// The fields of a section, in order; empty for null. As in yaml.v2, what
    /// a merge key brings and what is written after it beat what stands
    /// before; a field written twice is refused.
    pub(super) fn fields(&self, key: &str) -> Result<Vec<(String, &Self)>, Problem> {
        let mut fields: Vec<(String, &Self)> = Vec::new();
        for (name, value) in self.entries(key)? {
            match fields.iter_mut().find(|(before, _)| *before == name) {
                None => fields.push((name, value)),
                Some(field) => field.1 = value,
            }
        }
        Ok(fields)
    }

    /// The pairs of a mapping with free keys; empty for null. A key twice is
    /// refused, be it merged or written.
    pub(super) fn pairs(&self, key: &str) -> Result<Vec<(String, &Self)>, Problem> {
        let mut pairs: Vec<(String, &Self)> = Vec::new();
        for (name, value) in self.entries(key)? {
            if pairs.iter().any(|(before, _)| *before == name) {
                return Err(twice(key, &name, value));
            }
            pairs.push((name, value));
        }
        Ok(pairs)
    }

    /// Names and values, those that merge keys bring where these stand. A
    /// name written twice in one mapping is refused.
    fn entries(&self, key: &str) -> Result<Vec<(String, &Self)>, Problem> {
        let Content::Mapping(pairs) = &self.content else {
            return if self.is_null() {
                Ok(Vec::new())
            } else {
                Err(self.problem(key, "must be a mapping"))
            };
        };
        let mut entries = Vec::new();
        let mut written = HashSet::new();
        for (name, value) in pairs {
            let plain = matches!(name.content, Content::Scalar { plain: true, .. });
            let name_text = name.string(key)?;
            if !plain || name_text != "<<" {
                if !written.insert(name_text.clone()) {
                    return Err(twice(key, &name_text, value));
                }
                entries.push((name_text, value));
                continue;
            }
            // Of several, the first counts: it comes last.
            let sources = match &value.content {
                // Written out, that is: Go takes no alias of a list.
                Content::Sequence(items) if !value.alias => items.iter().rev().collect(),
                _ => vec![value],
            };
            for source in sources {
                if !matches!(source.content, Content::Mapping(_)) {
                    return Err(source.problem(key, "only a mapping can be merged"));
                }
                entries.extend(source.entries(key)?);
            }
        }
        Ok(entries)
    }

    /// This value is not what `key` needs.
    pub(super) fn problem(&self, key: &str, needs: impl Display) -> Problem {
        let colon = if key.is_empty() { "" } else { ": " };
        let text = format!("{key}{colon}{needs}, not {}", self.what());
        Problem::new(self.line, text)
    }
}

fn twice(key: &str, name: &str, value: &Node) -> Problem {
    let text = format!("{key}{}{name}: written twice", dot(key));
    Problem::new(value.line, text)
}

/// What stands between a section and a key in messages.
pub(super) fn dot(section: &str) -> &'static str {
    if section.is_empty() { "" } else { "." }
}

fn integer(text: &str) -> Option<i64> {
    let plain: String = text.chars().filter(|char| *char != '_').collect();
    let (negative, digits) = match plain.as_bytes().first()? {
        b'-' => (true, &plain[1..]),
        b'+' => (false, &plain[1..]),
        _ => (false, &plain[..]),
    };
    let radix = |prefix: &[&str], radix| {
        let digits = prefix
            .iter()
            .find_map(|prefix| digits.strip_prefix(prefix))?;
        let unsigned = digits.bytes().all(|byte| byte.is_ascii_alphanumeric());
        unsigned
            .then(|| i64::from_str_radix(digits, radix).ok())
            .flatten()
    };
    let value = radix(&["0x", "0X"], 16)
        .or_else(|| radix(&["0b", "0B"], 2))
        .or_else(|| radix(&["0o", "0O"], 8));
    let value = match value {
        Some(value) => value,
        None if !digits.starts_with(|char: char| char.is_ascii_digit() || char == '.') => {
            return None;
        }
        None if digits.len() > 1
            && digits.starts_with('0')
            && digits.bytes().all(|byte| matches!(byte, b'0'..=b'7')) =>
        {
            i64::from_str_radix(digits, 8).ok()?
        }
        None => match digits.parse::<i64>() {
            Ok(value) => value,
            Err(_) => {
                let float: f64 = digits.parse().ok()?;
                // Within ±2^63, as Go asks before it cuts the fraction off.
                (float.abs() < 9.2e18).then_some(float as i64)?
            }
        },
    };
    Some(if negative { -value } else { value })
}

/// Go's `time.ParseDuration`, in nanoseconds.
fn duration_ns(text: &str) -> Option<i64> {
    let (negative, mut rest) = match text.as_bytes().first()? {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        _ => (false, text),
    };
    if rest == "0" {
        return Some(0);
    }
    let mut total = 0.0_f64;
    if rest.is_empty() {
        return None;
    }
    while !rest.is_empty() {
        let end = rest.find(|char: char| !char.is_ascii_digit() && char != '.')?;
        let (number, unit) = rest.split_at(end);
        if !number.bytes().any(|byte| byte.is_ascii_digit()) {
            return None;
        }
        let number: f64 = number.parse().ok()?;
        let end = unit
            .find(|char: char| char.is_ascii_digit() || char == '.')
            .unwrap_or(unit.len());
        let (unit, next) = unit.split_at(end);
        total += number
            * match unit {
                "ns" => 1.0,
                "us" | "µs" | "μs" => 1e3,
                "ms" => 1e6,
                "s" => 1e9,
                "m" => 60e9,
                "h" => 3600e9,
                _ => return None,
            };
        rest = next;
    }
    (total < 9.2e18).then_some(if negative { -total } else { total } as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(text: &str) -> Node {
        let root = parse(&format!("k:\n  {text}\n")).unwrap().unwrap();
        root.pairs("").unwrap()[0].1.clone()
    }

    #[test]
    fn scalars_are_read_as_go_reads_them() {
        for (text, expected) in [
            ("1", Some(1)),
            ("-3", Some(-3)),
            ("0x10", Some(16)),
            ("010", Some(8)),
            // No octal number, so a float, and those are cut off.
            ("08", Some(8)),
            ("-09", Some(-9)),
            ("0b11", Some(3)),
            ("1_000", Some(1000)),
            ("1.9", Some(1)),
            ("\"1\"", None),
            ("one", None),
            ("1s", None),
            ("inf", None),
            ("--1", None),
        ] {
            assert_eq!(value(text).integer("k").ok(), expected, "{text}");
        }
        for (text, expected) in [
            ("1s", Some(1_000_000_000)),
            ("\"1s\"", Some(1_000_000_000)),
            ("1h30m", Some(5_400_000_000_000)),
            ("1.5ms", Some(1_500_000)),
            ("-5us", Some(-5_000)),
            ("5", Some(5)),
            ("\"5\"", None),
            ("0", Some(0)),
            ("1 s", None),
            ("s", None),
            ("1d", None),
            (".s", None),
            ("\"\"", None),
        ] {
            assert_eq!(value(text).duration_ns("k").ok(), expected, "{text}");
        }
        for (text, expected) in [
            ("true", Some(true)),
            ("on", Some(true)),
            ("No", Some(false)),
            ("\"true\"", None),
            ("1", None),
            ("tRue", None),
            ("~", Some(false)),
        ] {
            assert_eq!(value(text).boolean("k").ok(), expected, "{text}");
        }
    }

    #[test]
    fn aliases_and_merges_work_and_cannot_explode() {
        let node = parse("a: &x {k: 1, l: 2}\nb:\n  <<: *x\n  l: 3\n")
            .unwrap()
            .unwrap();
        let pairs = node.pairs("").unwrap();
        assert!(pairs[1].1.pairs("b").is_err());
        let b = pairs[1].1.fields("b").unwrap();
        let b: Vec<_> = b
            .iter()
            .map(|(key, value)| (key.as_str(), value.string("").unwrap()))
            .collect();
        assert_eq!(b, [("k", "1".to_owned()), ("l", "3".to_owned())]);

        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..10 {
            let before = level - 1;
            bomb += &format!(
                "a{level}: &a{level} [{}]\n",
                vec![format!("*a{before}"); 10].join(",")
            );
        }
        assert!(parse(&bomb).unwrap_err().text.contains("aliases multiply"));
        let deep = "[".repeat(1000) + &"]".repeat(1000);
        assert!(parse(&deep).is_err());
        assert!(parse("a: &a [*a]").is_err());
    }

    #[test]
    fn nothing_is_nothing() {
        for text in ["", "\n", "# only a comment\n", "---\n", "null", "~"] {
            assert!(parse(text).unwrap().is_none(), "{text:?}");
        }
    }
}

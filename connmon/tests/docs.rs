//! What the documents name exists, and what exists is documented: flags, their
//! defaults, metric names, tests, messages. And plain words everywhere.

use std::fs;
use std::path::{Path, PathBuf};

use clap::{Arg, CommandFactory};
use connmon::config::{key, settings, variable};
use connmon::expose::families::FAMILIES;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).unwrap()
}

/// Documents and everything under deploy/, as (path, text).
fn documents() -> Vec<(PathBuf, String)> {
    let mut paths = vec![root().join("README.md")];
    let mut directories = vec![root().join("deploy"), root().join("docs")];
    while let Some(directory) = directories.pop() {
        let Ok(entries) = fs::read_dir(directory) else {
            continue;
        };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                paths.push(path);
            }
        }
    }
    // Pictures are no text.
    let read = |path: PathBuf| Some((path.clone(), fs::read_to_string(path).ok()?));
    paths.into_iter().filter_map(read).collect()
}

/// Words of `text` that start with `prefix` and go on with characters that
/// are `allowed`, each with the character after it.
fn words<'a>(
    text: &'a str,
    prefix: &'a str,
    allowed: fn(char) -> bool,
) -> impl Iterator<Item = (&'a str, Option<char>)> {
    text.match_indices(prefix).filter_map(move |(at, _)| {
        let before = text[..at].chars().next_back();
        let rest = &text[at..];
        let length = rest.find(|c| !allowed(c)).unwrap_or(rest.len());
        let inside = before.is_some_and(|c| allowed(c) || c == ':' || c == '/');
        (!inside).then(|| (&rest[..length], rest[length..].chars().next()))
    })
}

fn is_metric_character(c: char) -> bool {
    c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'
}

#[test]
fn every_metric_name_in_the_documents_exists() {
    let mut checked = 0;
    for (path, text) in documents() {
        for (name, next) in words(&text, "connmon_", is_metric_character) {
            // `connmon_bpf_program_*`, or a regular expression: some name must
            // start so. A colon makes it the name of a recording rule.
            let open = name.ends_with('_') && matches!(next, Some('*' | '.'));
            if next == Some(':') {
                continue;
            }
            let known = FAMILIES.iter().any(|family| {
                if open {
                    return family.name.starts_with(name);
                }
                let part = name.strip_prefix(family.name);
                part.is_some_and(|part| matches!(part, "" | "_sum" | "_count" | "_bucket"))
            });
            assert!(known, "{}: no metric {name:?}", path.display());
            checked += 1;
        }
    }
    assert!(checked > 50, "{checked}");
}

#[test]
fn every_flag_in_the_readme_exists() {
    let mut known: Vec<String> = ["--help", "--demo", "--check", "--path", "--locked"]
        .map(str::to_owned)
        .to_vec();
    let command = connmon::cli::Cli::command();
    for command in std::iter::once(&command).chain(command.get_subcommands()) {
        let longs = command.get_arguments().filter_map(|arg| arg.get_long());
        known.extend(longs.map(|long| format!("--{long}")));
    }
    // Flags of other programs, on the lines that call them.
    let readme: String = readme()
        .lines()
        .filter(|line| !line.starts_with("docker "))
        .map(|line| format!("{line}\n"))
        .collect();
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    for (flag, _) in words(&readme, "--", allowed) {
        let flag = flag.trim_end_matches('.');
        let bare = flag.trim_matches('-').is_empty();
        let container = flag == "--pid";
        assert!(
            bare || container || known.iter().any(|known| known == flag),
            "no flag {flag:?}"
        );
    }
}

#[test]
fn flags_in_the_readme_have_their_defaults() {
    let readme = readme();
    let rows: Vec<&str> = readme
        .lines()
        .filter(|line| line.starts_with("| `--"))
        .collect();
    assert_eq!(rows.len(), 10);
    for row in rows {
        let flag = row.split(['`', ' ']).nth(2).unwrap();
        let setting = settings().iter().find(|arg| key(arg) == &flag[2..]);
        let setting = setting.unwrap_or_else(|| panic!("no setting {flag}"));
        // The database is embedded: it has no path to show.
        if !setting.is_hide_default_value_set() && key(setting) != "geoip.database" {
            assert!(row.contains(&default(setting)), "{row}");
        }
    }
}

/// What the table says of a setting's default.
fn default(setting: &Arg) -> String {
    let shown = !setting.is_hide_default_value_set();
    let values = setting.get_default_values().iter().filter(|_| shown);
    let values: Vec<_> = values.map(|value| value.to_str().unwrap()).collect();
    match values.join(",") {
        none if none.is_empty() => "none".to_owned(),
        values => format!("`{values}`"),
    }
}

/// A table cell: text whose bars do not end it.
fn cell(text: &str) -> String {
    text.replace('|', "\\|")
}

/// Compares `document` with what the tables of the program give. Regenerate
/// with `UPDATE_DOCS=1 cargo test -p connmon --test docs`.
fn generated(document: &str, text: &str) {
    let path = root().join(document);
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::write(&path, text).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap();
    assert_eq!(written, text, "{document} is not up to date");
}

#[test]
fn the_list_of_metrics_is_the_table_of_families() {
    let mut text = String::from(
        "# Metrics\n\n\
         Generated from the help texts of `connmon/src/expose/families.rs`; do not edit.\n\n\
         `direction`, `country` and `port` are explained in the [README](../README.md). A summary \
         has `_sum` and `_count`, without quantiles. What the source cannot know is absent, not 0.\n\n\
         | name | type | labels | meaning |\n|---|---|---|---|\n",
    );
    for family in FAMILIES {
        let kind = format!("{:?}", family.kind).to_lowercase();
        let labels = family.labels.join(", ");
        let (name, help) = (family.name, cell(family.help));
        text += &format!("| `{name}` | {kind} | {labels} | {help} |\n");
    }
    generated("docs/metrics.md", &text);
}

#[test]
fn the_list_of_flags_is_what_clap_knows() {
    let mut text = String::from(
        "# Flags\n\n\
         Generated from `connmon/src/config/mod.rs`; do not edit.\n\n\
         Each flag is also an environment variable (lists comma-separated) and a flat key, the flag \
         without its dashes, in the YAML of `--config.file`. A flag beats the environment, which \
         beats the file. `connmon --help` prints the same.\n\n\
         | flag | variable | default | meaning |\n|---|---|---|---|\n",
    );
    for setting in settings() {
        let mut flag = format!("--{}", key(setting));
        if setting.get_action().takes_values() {
            let names = setting.get_value_names().unwrap_or_default();
            flag = format!("{flag} {}", cell(names.first().unwrap()));
        }
        let (variable, default) = (variable(key(setting)), default(setting));
        let help = cell(&setting.get_help().unwrap().to_string());
        text += &format!("| `{flag}` | `{variable}` | {default} | {help} |\n");
    }
    generated("docs/flags.md", &text);
}

#[test]
fn links_lead_to_files_and_every_document_is_linked() {
    let readme = readme();
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(readme.contains(&format!("(docs/{name})")), "docs/{name}");
    }
    let mut followed = 0;
    for (path, text) in documents() {
        if path.extension().is_none_or(|extension| extension != "md") {
            continue;
        }
        for target in text.split("](").skip(1) {
            let target = target.split([')', '#']).next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            followed += 1;
            let file = path.parent().unwrap().join(target);
            assert!(file.exists(), "{}: no {target}", path.display());
        }
    }
    assert!(followed > 20, "{followed}");
}

/// Every line of Rust in the repository.
fn sources() -> String {
    let mut text = String::new();
    let mut directories = ["connmon", "xtask"]
        .map(|directory| root().join(directory))
        .to_vec();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                text += &fs::read_to_string(path).unwrap();
            }
        }
    }
    text
}

#[test]
fn every_test_that_a_document_cites_exists() {
    let sources = sources();
    let mut cited = 0;
    for document in ["SECURITY.md", "docs/faults.md"] {
        let text = fs::read_to_string(root().join(document)).unwrap();
        for code in text.split('`').skip(1).step_by(2) {
            // Names of tests are sentences; metrics and fields are shorter.
            let names = code
                .split([' ', ':', ','])
                .filter(|word| word.matches('_').count() >= 3 && !word.starts_with("connmon_"));
            for name in names {
                cited += 1;
                assert!(
                    sources.contains(&format!("fn {name}(")),
                    "{document} cites {name}, which is no test"
                );
            }
        }
    }
    assert!(cited > 50, "only {cited} found");
}

#[test]
fn every_message_to_troubleshoot_is_logged() {
    // As the compiler reads them: literals may go on in the next line.
    let sources: String = sources()
        .split("\\\n")
        .map(str::trim_start)
        .collect::<Vec<_>>()
        .join("");
    let text = fs::read_to_string(root().join("docs/troubleshooting.md")).unwrap();
    let mut messages = 0;
    for row in text.lines().filter(|line| line.starts_with("| `")) {
        let message = row.split('`').nth(1).unwrap();
        for part in message.split('…').map(str::trim) {
            messages += 1;
            let part = part.trim_end_matches(':').trim();
            assert!(sources.contains(part), "no message has `{part}`: {row}");
        }
    }
    assert!(messages > 15, "only {messages} found");
}

/// The words of CONTRIBUTING.md's glossary that never mean anything else.
const NOT: [&str; 14] = [
    "doorkeeper",
    "ledger",
    "stand-in",
    "stand_in",
    "standin",
    "told of",
    "word of",
    "says so",
    "shortage",
    "in the midst",
    "first words",
    "first_words",
    "sighted",
    "desk",
];

/// Text of every source, test and document.
fn texts(directory: &Path, found: &mut Vec<(PathBuf, String)>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if path.is_dir() {
            if !matches!(name, "target" | ".git" | "data" | "corpus") {
                texts(&path, found);
            }
        } else if name != "Cargo.lock" && !path.ends_with("connmon/tests/docs.rs") {
            // What is no text, such as a picture, is skipped.
            found.extend(fs::read_to_string(&path).ok().map(|text| (path, text)));
        }
    }
}

#[test]
fn words_of_the_glossary_occur_nowhere() {
    let mut found = Vec::new();
    texts(&root(), &mut found);
    assert!(found.len() > 200, "{}", found.len());
    let mut wrong = Vec::new();
    for (path, text) in found {
        let mut text = text.to_lowercase();
        if path.ends_with("CONTRIBUTING.md") {
            let (before, glossary) = text.split_once("\n## words\n").unwrap();
            let after = glossary.split_once("\n## ").map_or("", |(_, after)| after);
            text = format!("{before}\n{after}");
        }
        // A phrase may go on in the next line of a comment.
        let words = text
            .split_whitespace()
            .filter(|word| !matches!(*word, "//" | "///" | "//!" | "#" | "*"));
        let text = words.collect::<Vec<_>>().join(" ");
        for not in NOT {
            let is_letter = |c: Option<char>| c.is_some_and(char::is_alphabetic);
            for (at, _) in text.match_indices(not) {
                let after = text[at + not.len()..].trim_start_matches('s');
                if !is_letter(text[..at].chars().next_back()) && !is_letter(after.chars().next()) {
                    let end = text.floor_char_boundary(at + 40);
                    let path = path.strip_prefix(root()).unwrap().display();
                    wrong.push(format!("{path}: {}", &text[at..end]));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "CONTRIBUTING.md has other words for {}, the first:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(20)].join("\n")
    );
}

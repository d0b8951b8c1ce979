//! What the documents name exists, and what exists is documented: flags,
//! their defaults, metric names in dashboards, rules and the README.

use std::fs;
use std::path::{Path, PathBuf};

use clap::CommandFactory;
use connmon::config::{key, settings};
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
            // `connmon_port_…`, `connmon_geoip_*`: every name that starts so.
            // A colon makes it the name of a recording rule.
            let open = name.ends_with('_') || next == Some('*') || next == Some('…');
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
fn every_setting_and_its_default_is_in_the_readme() {
    let readme = readme();
    for setting in settings() {
        let flag = format!("--{}", key(setting));
        let row = readme
            .lines()
            .find(|line| line.starts_with("| `--") && line.contains(&flag))
            .unwrap_or_else(|| panic!("{flag} is not in the README's table"));
        let shown = !setting.is_hide_default_value_set();
        for default in setting.get_default_values().iter().filter(|_| shown) {
            let default = default.to_str().unwrap();
            assert!(row.contains(default), "{flag}: default {default}: {row}");
        }
    }
}

#[test]
fn every_metric_is_in_the_readme() {
    let readme = readme();
    for family in FAMILIES {
        let whole = format!("`{}", family.name);
        // A shared beginning covers its families: `connmon_geoip_*`.
        let mut ends = family.name.match_indices('_').map(|(at, _)| at + 1);
        let covered = readme.contains(&whole)
            || ends.any(|end| {
                let stem = &family.name[..end];
                readme.contains(&format!("`{stem}*`")) || readme.contains(&format!("`{stem}…`"))
            })
            // `connmon_country_received_bytes_total`, `…_sent_bytes_total`.
            || family.name.match_indices('_').any(|(at, _)| {
                readme.contains(&format!("`…{}`", &family.name[at..]))
            });
        assert!(covered, "{} is not in the README", family.name);
    }
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
fn every_message_in_the_readme_is_one_of_the_agents() {
    // As the compiler reads them: literals may go on in the next line.
    let sources: String = sources()
        .split("\\\n")
        .map(str::trim_start)
        .collect::<Vec<_>>()
        .join("");
    let readme = readme();
    let table = readme.split("## When something is wrong").nth(1).unwrap();
    let table = table.split("\n## ").next().unwrap();
    let mut messages = 0;
    for row in table.lines().filter(|line| line.starts_with("| `")) {
        let message = row.split('`').nth(1).unwrap();
        for part in message.split('…').map(str::trim) {
            messages += 1;
            let part = part.trim_end_matches(':').trim();
            assert!(sources.contains(part), "no message has `{part}`: {row}");
        }
    }
    assert!(messages > 15, "only {messages} found");
}

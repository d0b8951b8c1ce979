//! What deny.toml allows is what is built: licences, duplicates and sources
//! of every package, without the network. Advisories are `cargo deny`'s.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::Command;

use serde_json::Value;

const TARGETS: [&str; 2] = ["x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"];

struct Package {
    name: String,
    version: String,
    license: String,
    source: Option<String>,
}

/// Everything that a build or a test of the workspace compiles.
fn packages() -> Vec<Package> {
    let mut found = BTreeMap::new();
    for target in TARGETS {
        let output = Command::new(env!("CARGO"))
            .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
            .args([
                "metadata",
                "--format-version=1",
                "--locked",
                "--filter-platform",
                target,
            ])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
        let needed: BTreeSet<&str> = metadata["resolve"]["nodes"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|node| node["id"].as_str())
            .collect();
        for package in metadata["packages"].as_array().unwrap() {
            let text = |key: &str| package[key].as_str().map(str::to_owned);
            let id = text("id").unwrap();
            if needed.contains(id.as_str()) {
                let package = Package {
                    name: text("name").unwrap(),
                    version: text("version").unwrap(),
                    license: text("license").unwrap_or_default(),
                    source: text("source"),
                };
                found.insert(id, package);
            }
        }
    }
    found.into_values().collect()
}

fn deny() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deny.toml");
    std::fs::read_to_string(path).unwrap()
}

/// The quoted strings that follow `start` on the lines of a list.
fn list(text: &str, list: &str, start: &str) -> BTreeSet<String> {
    text.lines()
        .skip_while(|line| !line.starts_with(list))
        .skip(1)
        .take_while(|line| !line.starts_with(']'))
        .filter_map(|line| line.trim().strip_prefix(start)?.split('"').next())
        .map(str::to_owned)
        .collect()
}

/// Whether an SPDX expression is met by the allowed licences: OR by one
/// side, AND by both. Parentheses only as the crates here use them, around
/// an OR.
fn allowed(expression: &str, licences: &BTreeSet<String>) -> bool {
    expression
        .replace(['(', ')'], "")
        .split(" AND ")
        .all(|part| {
            part.replace(" / ", "/")
                .replace('/', " OR ")
                .split(" OR ")
                .any(|name| licences.contains(name.trim()))
        })
}

#[test]
fn every_licence_is_one_that_is_allowed() {
    let licences = list(&deny(), "allow = [", "\"");
    assert!(licences.contains("MIT") && !licences.contains("GPL-3.0"));
    assert!(!allowed("MIT AND GPL-3.0", &licences));
    let packages = packages();
    assert!(packages.len() > 100);
    let others: Vec<String> = packages
        .iter()
        .filter(|package| !allowed(&package.license, &licences))
        .map(|package| {
            format!(
                "{} {}: {:?}",
                package.name, package.version, package.license
            )
        })
        .collect();
    assert_eq!(others, Vec::<String>::new());
    for licence in &licences {
        let used = packages
            .iter()
            .any(|package| package.license.contains(licence.as_str()));
        assert!(used, "{licence} is allowed and not used");
    }
}

#[test]
fn every_duplicate_has_a_reason() {
    let skipped = list(&deny(), "skip = [", "{ crate = \"");
    let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in packages() {
        versions
            .entry(package.name)
            .or_default()
            .push(package.version);
    }
    let mut excused = BTreeSet::new();
    for (name, found) in &versions {
        let left: Vec<&String> = found
            .iter()
            .filter(|version| !skipped.contains(&format!("{name}@{version}")))
            .collect();
        assert!(left.len() <= 1, "{name} is built in {found:?}");
        if left.len() < found.len() {
            excused.extend(found.iter().map(|version| format!("{name}@{version}")));
        }
    }
    let stale: Vec<&String> = skipped.difference(&excused).collect();
    assert!(stale.is_empty(), "excused, and no duplicate: {stale:?}");
}

#[test]
fn everything_comes_from_the_registry_and_nothing_is_openssl() {
    let banned = list(&deny(), "deny = [", "{ crate = \"");
    assert!(banned.contains("openssl-sys"));
    for package in packages() {
        assert!(!banned.contains(&package.name), "{}", package.name);
        let source = package.source.unwrap_or_default();
        assert!(
            source.is_empty()
                || source.starts_with("registry+https://github.com/rust-lang/crates.io-index"),
            "{}: {source}",
            package.name
        );
    }
}

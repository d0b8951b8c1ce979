//! Shared by the tests.

use std::io::Write;
use std::process::{Command, Stdio};

/// Reports that a test cannot run because a tool is missing; fails under
/// `CI=true`.
pub fn skipped(what: &str, reason: &str) {
    println!("skipped: {what}: {reason}");
    let strict = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    assert!(!strict, "skipped: {what}: {reason}");
}

/// Lints a scrape by `promtool check metrics`, which must print nothing.
pub fn promtool(what: &str, text: &str) {
    let child = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return skipped(what, &format!("promtool: {error}")),
    };
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let printed = [output.stdout, output.stderr].concat();
    assert!(
        output.status.success() && printed.is_empty(),
        "promtool check metrics: {}",
        String::from_utf8_lossy(&printed)
    );
}

/// Samples of a scrape: the text before the last space of every line that is
/// no comment, and its value.
pub fn samples(text: &str) -> Vec<(&str, f64)> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            (series, value.parse().unwrap())
        })
        .collect()
}

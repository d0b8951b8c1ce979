//! What test runs came to: reads the events of libtest and libtest-mimic,
//! retries what failed, and prints the summary.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::{exec, install};

/// Failed tests that are retried once, alone, before they count. More are no
/// accident of a busy machine.
const RETRIES: usize = 5;

/// Tests that may be retried in one run under `CI=true`: each may be a fault
/// that shows itself now and then.
const RETRIED_IN_CI: usize = 2;

/// Lines of a failure's message that are kept, and bytes of the whole.
const MESSAGE_LINES: usize = 4;
const MESSAGE_BYTES: usize = 600;

/// Something that runs tests: a test binary, here or in a guest.
pub trait Target: Sync {
    /// Its name in the output.
    fn name(&self) -> &str;

    /// Runs the tests of these names one by one, or every test without names.
    ///
    /// # Errors
    /// When it cannot be started.
    fn run(&self, names: &[String]) -> Result<Results>;
}

/// A test that failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The test's name.
    pub test: String,
    /// Its message on one line.
    pub message: String,
}

/// What one run of a target came to.
#[derive(Debug, Default)]
pub struct Results {
    /// Names of the tests that passed.
    pub passed: BTreeSet<String>,
    /// Those that failed.
    pub failed: Vec<Failure>,
    /// Those that the kernel cannot run.
    pub ignored: Vec<String>,
    /// Lines in which a test reports something beside its result.
    pub notes: Vec<String>,
    /// The harness has printed its last event.
    pub ended: bool,
}

/// The fields of an event that count; `--format json` prints one a line.
#[derive(Deserialize)]
struct Event {
    r#type: String,
    event: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    stdout: String,
}

impl Results {
    /// Reads one line of a harness, and returns what belongs into the file
    /// with the details.
    pub fn line(&mut self, line: &str) -> String {
        // A child of a test may have printed a part of a line before it.
        let event = (line.find("{ \"type\"")).and_then(|at| serde_json::from_str(&line[at..]).ok());
        let Some(Event {
            r#type,
            event,
            name,
            stdout,
        }) = event
        else {
            self.note(line);
            return format!("{line}\n");
        };
        stdout.lines().for_each(|line| self.note(line));
        match (r#type.as_str(), event.as_str()) {
            ("suite", "started") => self.ended = false,
            ("suite", "ok" | "failed") => self.ended = true,
            ("test", "ok") => {
                self.passed.insert(name);
            }
            ("test", "ignored") => self.ignored.push(name),
            ("test", "failed") => {
                let details = format!("---- {name} ----\n{stdout}\n");
                let message = message(&stdout);
                self.failed.push(Failure {
                    test: name,
                    message,
                });
                return details;
            }
            _ => {}
        }
        String::new()
    }

    fn note(&mut self, line: &str) {
        let kinds = [
            "retried: ",
            "inconclusive: ",
            "skipped: ",
            "not applicable: ",
        ];
        if kinds.iter().any(|kind| line.starts_with(kind)) {
            self.notes.push(shortened(line));
        }
    }

    /// Adds a failure of the run itself.
    pub fn fail(&mut self, message: String) {
        self.failed.push(Failure {
            test: "the whole run".to_owned(),
            message,
        });
    }
}

/// The first lines of a test's output from the panic on.
fn message(stdout: &str) -> String {
    let from = stdout.find("\nthread '").map_or(0, |at| at + 1);
    let lines: Vec<&str> = stdout[from..]
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.starts_with("note: run with"))
        .take(MESSAGE_LINES)
        .collect();
    shortened(&lines.join(" | "))
}

fn shortened(line: &str) -> String {
    line[..line.floor_char_boundary(MESSAGE_BYTES)].to_owned()
}

/// The file with all that a target's tests print, which begins empty.
///
/// # Errors
/// When it cannot be made.
pub fn details(target: &str, first: bool) -> Result<File> {
    let path = details_path(target);
    fs::create_dir_all(path.with_file_name(""))?;
    File::options()
        .create(true)
        .append(true)
        .open(&path)
        .and_then(|file| {
            if first {
                file.set_len(0)?;
            }
            Ok(file)
        })
        .with_context(|| format!("cannot write {}", path.display()))
}

fn details_path(target: &str) -> PathBuf {
    exec::target_dir()
        .join("test")
        .join(format!("{target}.txt"))
}

/// What all targets came to.
#[derive(Debug, Default)]
pub struct Report {
    /// How many tests passed.
    pub passed: usize,
    /// One line for each that failed.
    failed: Vec<String>,
    /// One line for each that passed only when it was retried, with the
    /// message of its first try.
    retried: Vec<String>,
    inconclusive: Vec<String>,
    skipped: Vec<String>,
    not_applicable: BTreeSet<String>,
}

impl Report {
    /// Adds and prints a failure that is no test's.
    pub fn fail(&mut self, what: String) {
        println!("failed: {what}");
        self.failed.push(what);
    }

    /// Adds and prints what could not be tested.
    pub fn skip(&mut self, what: &str) {
        println!("skipped: {what}");
        self.skipped.push(format!("skipped: {what}"));
    }

    /// Adds what targets came to; the few tests that failed are retried
    /// first, after everything else has ended.
    ///
    /// # Errors
    /// When a target cannot be started.
    pub fn add(&mut self, runs: Vec<(&dyn Target, Results)>) -> Result<()> {
        let failed: usize = runs.iter().map(|(_, first)| first.failed.len()).sum();
        for (target, first) in runs {
            let names: Vec<String> = first
                .failed
                .iter()
                .map(|failed| failed.test.clone())
                .collect();
            let second = if (1..=RETRIES).contains(&failed) && !names.is_empty() && first.ended {
                println!("retrying {} of {}", names.join(" "), target.name());
                target.run(&names)?
            } else {
                Results::default()
            };
            self.settle(target.name(), first, second);
        }
        Ok(())
    }

    /// Counts the results of a target, given those of the retried tests.
    fn settle(&mut self, target: &str, first: Results, second: Results) {
        self.passed += first.passed.len();
        for Failure { test, message } in first.failed {
            let line = format!("{target} {test}: {message}");
            if second.passed.contains(&test) {
                self.passed += 1;
                self.retried.push(format!("retried: {line}"));
            } else if let Some(other) = second.failed.iter().find(|other| other.test == test) {
                self.failed
                    .push(format!("{line}; retried: {}", other.message));
            } else {
                self.failed.push(line);
            }
        }
        for note in first.notes.into_iter().chain(second.notes) {
            let (kind, _) = note.split_once(": ").unwrap_or_default();
            match kind {
                "retried" => self.retried.push(note),
                "inconclusive" => self.inconclusive.push(note),
                "skipped" => self.skipped.push(note),
                _ => drop(self.not_applicable.insert(note)),
            }
        }
    }

    /// Prints all that has not plainly passed, and the counts last.
    ///
    /// # Errors
    /// When the list of what is not applicable cannot be written.
    pub fn print(self, started: Instant) -> Result<ExitCode> {
        let not_applicable = &self.not_applicable;
        if !not_applicable.is_empty() {
            let mut list = details("not-applicable", true)?;
            for line in not_applicable {
                writeln!(list, "{line}")?;
            }
            let path = details_path("not-applicable");
            println!(
                "\nnot applicable here: {}, see {}",
                not_applicable.len(),
                path.display()
            );
        }
        let (lines, green) = self.summary(install::is_ci());
        let (counts, lines) = lines.split_last().expect("the counts");
        lines.iter().for_each(|line| println!("{line}"));
        println!("{} s\n{counts}", started.elapsed().as_secs());
        Ok(match green {
            true => ExitCode::SUCCESS,
            false => ExitCode::FAILURE,
        })
    }

    /// The lines of the summary, the counts last, and whether all is well. In
    /// CI what is skipped has failed, and so has a run with too many retries.
    fn summary(mut self, ci: bool) -> (Vec<String>, bool) {
        self.skipped.sort();
        self.skipped.dedup();
        let counts = [
            (self.retried.len(), "retried"),
            (self.inconclusive.len(), "inconclusive"),
            (self.skipped.len(), "skipped"),
        ];
        if ci {
            self.failed.extend(
                self.skipped
                    .iter()
                    .map(|line| format!("under CI=true: {line}")),
            );
            if self.retried.len() > RETRIED_IN_CI {
                self.failed.push(format!(
                    "{} tests were retried, and CI=true allows {RETRIED_IN_CI}: mend the unsteady \
                     ones, listed above",
                    self.retried.len()
                ));
            }
        }
        let failed = self.failed.len();
        let mut lines = [self.skipped, self.inconclusive, self.retried].concat();
        lines.extend(self.failed.iter().map(|line| format!("failed: {line}")));
        let mut last = format!("{} passed, {failed} failed", self.passed);
        for (count, what) in counts.iter().filter(|(count, _)| *count > 0) {
            last += &format!(", {count} {what}");
        }
        lines.push(last);
        (lines, failed == 0)
    }
}

/// Prints one line for a target that has ended, and three for each test of it
/// that failed.
pub fn progress(target: &str, results: &Results, started: Instant) {
    let (passed, failed) = (results.passed.len(), results.failed.len());
    if passed + failed + results.ignored.len() == 0 {
        return;
    }
    let seconds = started.elapsed().as_secs();
    println!("{target}: {passed} passed, {failed} failed in {seconds} s");
    for Failure { test, message } in &results.failed {
        let path = details_path(target);
        println!(
            "failed: {target} {test}\n  {message}\n  its output: {}",
            path.display()
        );
    }
}

#[cfg(test)]
#[path = "report_tests.rs"]
mod tests;

//! What test runs came to, and the last words about it.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::Instant;

use crate::install;

/// What runs of tests came to.
#[derive(Debug, Default)]
pub struct Tally {
    /// Tests and scenarios that passed.
    pub passed: u64,
    /// One entry for each that did not: what, and its first words.
    pub failed: Vec<String>,
    /// Those that passed only when they ran again, with what they said first.
    pub again: Vec<String>,
    /// `skipped: …` lines.
    pub skipped: Vec<String>,
    /// `not applicable: …` lines.
    pub not_applicable: Vec<String>,
}

impl Tally {
    /// Counts and prints a failure.
    pub fn fail(&mut self, line: String) {
        println!("{line}");
        self.failed.push(line);
    }

    /// Counts and prints what could not be tested.
    pub fn skip(&mut self, what: &str) {
        let line = format!("skipped: {what}");
        println!("{line}");
        self.skipped.push(line);
    }

    /// Adds what another run came to.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.again.extend(other.again);
        self.skipped.extend(other.skipped);
        self.not_applicable.extend(other.not_applicable);
    }

    /// Prints all that is not plainly passed, and the counts last. Under
    /// `CI=true` what is skipped has failed.
    pub fn report(mut self, started: Instant) -> ExitCode {
        println!();
        for lines in [&mut self.not_applicable, &mut self.skipped] {
            lines.sort();
            lines.dedup();
        }
        for line in self.not_applicable.iter().chain(&self.skipped) {
            println!("{line}");
        }
        if install::is_ci() && !self.skipped.is_empty() {
            println!("under CI=true what is skipped has failed");
            self.failed.append(&mut self.skipped);
        }
        for line in &self.again {
            println!("passed when run again: {line}");
        }
        for line in &self.failed {
            println!("failed: {line}");
        }
        println!("{} s", started.elapsed().as_secs());
        let (passed, failed) = (self.passed, self.failed.len());
        match self.skipped.len() {
            0 => println!("{passed} passed, {failed} failed"),
            skipped => println!("{passed} passed, {failed} failed, {skipped} skipped"),
        }
        if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// Lines of a failed test that are kept.
const WORDS: usize = 6;
/// Bytes of each.
const LENGTH: usize = 400;

/// Reads what libtest prints.
#[derive(Debug, Default)]
pub struct Libtest {
    /// How many passed.
    pub passed: u64,
    /// How many failed.
    pub failed: u64,
    /// `skipped: …` lines.
    pub skipped: Vec<String>,
    /// `not applicable: …` lines.
    pub not_applicable: Vec<String>,
    /// The passed tests by name.
    good: BTreeSet<String>,
    /// The failed tests that were named.
    names: BTreeSet<String>,
    /// Their first words, from the panic on.
    words: BTreeMap<String, Vec<String>>,
    /// Whose output this is, and whether it has panicked.
    current: Option<(String, bool)>,
    /// `FAIL …` lines of the binary that runs; those of one that passes are
    /// what its tests printed.
    scenarios: Vec<String>,
}

impl Libtest {
    /// Takes one line.
    pub fn line(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix("test result: ") {
            let count = |what: &str| -> u64 {
                counts
                    .split([';', '.'])
                    .filter_map(|part| part.trim().strip_suffix(what))
                    .filter_map(|number| number.trim().parse::<u64>().ok())
                    .sum()
            };
            self.passed += count("passed");
            self.failed += count("failed");
            self.current = None;
            let scenarios = std::mem::take(&mut self.scenarios);
            if counts.starts_with("FAILED") {
                let each = scenarios.into_iter().map(|line| (line, Vec::new()));
                self.words.extend(each);
            }
        } else if line.starts_with("skipped: ") {
            self.skipped.push(line.to_owned());
        } else if line.starts_with("not applicable: ") {
            self.not_applicable.push(line.to_owned());
        } else if let Some((test, verdict)) = line
            .strip_prefix("test ")
            .and_then(|rest| rest.rsplit_once(" ... "))
        {
            match verdict {
                "ok" => self.good.insert(test.to_owned()),
                "FAILED" => self.names.insert(test.to_owned()),
                _ => false,
            };
        } else if let Some(test) = line
            .strip_prefix("---- ")
            .and_then(|rest| rest.strip_suffix(" stdout ----"))
        {
            self.current = Some((test.to_owned(), false));
        } else if ["successes:", "failures:"].contains(&line) {
            self.current = None;
        } else if let Some((test, panicked)) = &mut self.current {
            *panicked |= line.contains(" panicked at ");
            if *panicked && self.names.contains(test) {
                let words = self.words.entry(test.clone()).or_default();
                if words.len() < WORDS && !line.trim().is_empty() {
                    let end = line.floor_char_boundary(LENGTH);
                    words.push(line[..end].to_owned());
                }
            }
        } else if line.starts_with("FAIL ") {
            // A scenario of the kernel's tests, which name it so.
            let end = line.floor_char_boundary(4 * LENGTH);
            self.scenarios.push(line[..end].to_owned());
        }
    }

    /// Names of failed tests, for `--exact`; `None` if some failed without
    /// a name that libtest would know.
    pub fn names(&self) -> Option<Vec<String>> {
        (self.names.len() as u64 == self.failed).then(|| self.names.iter().cloned().collect())
    }

    /// Whether a test of this name ran and passed.
    pub fn passed(&self, name: &str) -> bool {
        self.good.contains(name) && !self.names.contains(name)
    }

    /// Name of each that failed and its first words; as many as were counted.
    pub fn failures(&self) -> Vec<(String, String)> {
        let silent = (self.names.iter())
            .filter(|name| !self.words.contains_key(*name))
            .map(|name| (name.clone(), String::new()));
        let mut failures: Vec<_> = (self.words.iter())
            .map(|(name, words)| (name.clone(), words.join(" | ")))
            .chain(silent)
            .collect();
        let counted = usize::try_from(self.failed).unwrap_or(usize::MAX);
        while failures.len() < counted {
            failures.push(("a test that was not named".to_owned(), String::new()));
        }
        failures
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Libtest {
        let mut read = Libtest::default();
        text.lines().for_each(|line| read.line(line));
        read
    }

    #[test]
    fn counts_what_libtest_says() {
        let read = read(
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out\n\
             test a ... FAILED\ntest b ... FAILED\n\
             test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out\n\
             skipped: the page: chromium is missing\n",
        );
        assert_eq!((read.passed, read.failed), (14, 3));
        assert_eq!(read.skipped.len(), 1);
        let names: Vec<_> = read.failures().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["a", "b", "a test that was not named"]);
        assert_eq!(read.names(), None);
    }

    #[test]
    fn a_failed_test_keeps_its_first_words() {
        let read = read(
            "test e2e::a ... ok\ntest e2e::b ... FAILED\n\
             \nsuccesses:\n\n---- e2e::a stdout ----\nthread 'e2e::a' (7) panicked at as it should\n\
             \nfailures:\n\n---- e2e::b stdout ----\nlong log\n\
             thread 'e2e::b' (8) panicked at x.rs:1:2:\nnever came\n\
             \nfailures:\n    e2e::b\n\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n",
        );
        let words = "thread 'e2e::b' (8) panicked at x.rs:1:2: | never came";
        assert_eq!(read.failures(), [("e2e::b".into(), words.into())]);
        assert_eq!(read.names().unwrap(), ["e2e::b"]);
        assert!(read.passed("e2e::a") && !read.passed("e2e::b"));
    }

    #[test]
    fn a_failed_scenario_is_its_line() {
        let read = read(
            "PASS 6.18 auto fin 3 ms\nFAIL 6.18 auto rst it was not\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n\
             FAIL 5.10 of a unit test\n\
             test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n",
        );
        let line = "FAIL 6.18 auto rst it was not";
        assert_eq!(read.failures(), [(line.into(), String::new())]);
        assert_eq!(read.names(), None);
    }
}

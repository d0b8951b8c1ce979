//! What test runs came to, and the last words about it.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::Instant;

use crate::install;

/// Failed tests that are retried once, alone, before they count: a machine
/// that does other work at the wrong moment fails one or two, a fault more or
/// the same ones again. The summary lists each with what its first try said.
pub const RETRIES: usize = 5;

/// Tests that may be retried in one run under `CI=true`. Each may be a fault
/// that shows itself now and then, beside those that the machine caused.
const RETRIED_IN_CI: usize = 2;

/// What runs of tests came to.
#[derive(Debug, Default)]
pub struct Tally {
    /// Tests and scenarios that passed.
    pub passed: u64,
    /// One entry for each that did not: what, and its first words.
    pub failed: Vec<String>,
    /// One entry for each that ran more than once and then passed: what, and
    /// the first words of its first try.
    pub retried: Vec<String>,
    /// `inconclusive: …` lines: what a test could not judge on this machine.
    pub inconclusive: Vec<String>,
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

    /// Keeps a line in which a test reports something other than pass or
    /// fail; whether it is one.
    pub fn note(&mut self, line: &str) -> bool {
        let lines = match line.split_once(": ") {
            Some(("retried", _)) => &mut self.retried,
            Some(("inconclusive", _)) => &mut self.inconclusive,
            Some(("skipped", _)) => &mut self.skipped,
            Some(("not applicable", _)) => &mut self.not_applicable,
            _ => return false,
        };
        lines.push(shortened(line, 4 * LENGTH));
        true
    }

    /// Adds what another run came to.
    pub fn add(&mut self, mut other: Self) {
        self.passed += other.passed;
        self.failed.append(&mut other.failed);
        self.add_notes(other);
    }

    /// Adds what a second try reported beside its result.
    pub fn add_notes(&mut self, other: Self) {
        self.retried.extend(other.retried);
        self.inconclusive.extend(other.inconclusive);
        self.skipped.extend(other.skipped);
        self.not_applicable.extend(other.not_applicable);
    }

    /// Counts a test that failed and passed when it was retried.
    pub fn passed_when_retried(&mut self, first: &str) {
        self.passed += 1;
        self.retried.push(format!("retried: {first}"));
    }

    /// Prints all that is not plainly passed, and the counts last.
    pub fn report(self, started: Instant) -> ExitCode {
        let (lines, green) = self.summary(install::is_ci());
        let (counts, lines) = lines.split_last().expect("the counts");
        println!("\n{}", lines.join("\n"));
        println!("{} s\n{counts}", started.elapsed().as_secs());
        if green {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    /// The lines of the report, the counts last, and whether all is well. In
    /// CI what is skipped has failed, and so has a run with too many retries.
    fn summary(mut self, ci: bool) -> (Vec<String>, bool) {
        for lines in [&mut self.not_applicable, &mut self.skipped] {
            lines.sort();
            lines.dedup();
        }
        let mut report = self.not_applicable;
        report.extend_from_slice(&self.skipped);
        if ci && !self.skipped.is_empty() {
            report.push("under CI=true what is skipped has failed".to_owned());
            self.failed.append(&mut self.skipped);
        }
        let (retried, inconclusive) = (self.retried.len(), self.inconclusive.len());
        report.append(&mut self.inconclusive);
        report.append(&mut self.retried);
        if ci && retried > RETRIED_IN_CI {
            self.failed.push(format!(
                "{retried} tests were retried, and CI=true allows {RETRIED_IN_CI}: mend the \
                 unsteady ones, listed above"
            ));
        }
        let failed = self.failed.len();
        report.extend(self.failed.iter().map(|line| format!("failed: {line}")));
        let mut counts = format!("{} passed, {failed} failed", self.passed);
        for (count, what) in [
            (retried, "retried"),
            (inconclusive, "inconclusive"),
            (self.skipped.len(), "skipped"),
        ] {
            if count > 0 {
                counts.push_str(&format!(", {count} {what}"));
            }
        }
        report.push(counts);
        (report, failed == 0)
    }
}

/// Lines of a failed test that are kept.
const WORDS: usize = 6;
/// Bytes of each.
const LENGTH: usize = 400;

/// Whether a test binary begins with this line: `running 7 tests`.
fn is_beginning(line: &str) -> bool {
    let mut words = line.split(' ');
    words.next() == Some("running")
        && words
            .next()
            .is_some_and(|count| count.parse::<u64>().is_ok())
        && matches!(words.next(), Some("test" | "tests" | "scenarios"))
        && words.next().is_none()
}

/// At most so many bytes of a line.
fn shortened(line: &str, length: usize) -> String {
    line[..line.floor_char_boundary(length)].to_owned()
}

/// Reads what libtest prints.
#[derive(Debug, Default)]
pub struct Libtest {
    /// How many passed.
    pub passed: u64,
    /// How many failed.
    pub failed: u64,
    /// What tests reported beside their results.
    pub notes: Tally,
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
    /// A binary has begun and printed no result yet.
    running: bool,
    /// A binary ended without a result.
    cut_short: bool,
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
            self.running = false;
            let scenarios = std::mem::take(&mut self.scenarios);
            if counts.starts_with("FAILED") {
                let each = scenarios.into_iter().map(|line| (line, Vec::new()));
                self.words.extend(each);
            }
        } else if is_beginning(line) {
            self.cut_short |= std::mem::replace(&mut self.running, true);
        } else if self.notes.note(line) {
            // Kept.
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
                    words.push(shortened(line, LENGTH));
                }
            }
        } else if line.starts_with("FAIL ") {
            // A scenario of the kernel's tests, which name it so.
            self.scenarios.push(shortened(line, 4 * LENGTH));
        }
    }

    /// Whether every binary that began has printed its result; one that
    /// crashed has not.
    pub fn is_whole(&self) -> bool {
        !self.running && !self.cut_short
    }

    /// What it came to, given the second try of its failed tests.
    pub fn settle(self, second: Option<Self>) -> Tally {
        let mut tally = Tally {
            passed: self.passed,
            ..Tally::default()
        };
        let again: BTreeMap<_, _> = (second.iter().flat_map(Self::failures)).collect();
        for (name, words) in self.failures() {
            let first = format!("{name} {words}").trim_end().to_owned();
            if second.as_ref().is_some_and(|second| second.passed(&name)) {
                tally.passed_when_retried(&first);
            } else if let Some(words) = again.get(&name) {
                tally.failed.push(format!("{first}; retried: {words}"));
            } else {
                tally.failed.push(first);
            }
        }
        tally.add_notes(self.notes);
        if let Some(second) = second {
            tally.add_notes(second.notes);
        }
        tally
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
        assert_eq!(read.notes.skipped.len(), 1);
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

    const FIRST: &str = "running 2 tests\ntest a ... ok\ntest b ... FAILED\n\
        \nfailures:\n\n---- b stdout ----\nthread 'b' (8) panicked at x.rs:1:2:\nnever came\n\
        inconclusive: at full speed: 7 events were lost\n\
        \nfailures:\n    b\n\n\
        test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n";

    #[test]
    fn a_retried_test_is_listed_with_what_the_first_try_said() {
        let second = read(
            "running 1 test\ntest b ... ok\nskipped: the page: chromium is missing\n\
             test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out\n",
        );
        let tally = read(FIRST).settle(Some(second));
        assert_eq!((tally.passed, tally.failed.len()), (2, 0));
        let line = "retried: b thread 'b' (8) panicked at x.rs:1:2: | never came";
        assert!(tally.retried[0].starts_with(line), "{:?}", tally.retried);
        // What either try reported beside its result is kept.
        assert_eq!(tally.inconclusive.len(), 1);
        assert_eq!(tally.skipped.len(), 1);
        let (lines, green) = tally.summary(false);
        assert!(green && lines.iter().any(|shown| shown.starts_with(line)));
        assert_eq!(
            lines.last().unwrap(),
            "2 passed, 0 failed, 1 retried, 1 inconclusive, 1 skipped"
        );
    }

    #[test]
    fn a_test_that_fails_twice_shows_both_tries() {
        let second = read(
            "running 1 test\ntest b ... FAILED\n\
             \nfailures:\n\n---- b stdout ----\nthread 'b' (9) panicked at x.rs:3:4:\nanother\n\
             \nfailures:\n    b\n\n\
             test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 1 filtered out\n",
        );
        let tally = read(FIRST).settle(Some(second));
        assert_eq!((tally.passed, tally.retried.len()), (1, 0));
        let [failed] = &tally.failed[..] else {
            panic!("{:?}", tally.failed);
        };
        assert!(
            failed.contains("never came") && failed.contains("another"),
            "{failed}"
        );
    }

    #[test]
    fn a_few_retries_are_let_pass_and_in_ci_no_more_than_two() {
        let retried = |count: usize| {
            let mut tally = Tally::default();
            for at in 0..count {
                tally.passed_when_retried(&format!("test {at} never came"));
            }
            tally
        };
        for (count, ci, green) in [(2, true, true), (3, true, false), (5, false, true)] {
            let (lines, is_green) = retried(count).summary(ci);
            assert_eq!(is_green, green, "{count} {ci}: {lines:#?}");
            let shown = lines.iter().filter(|line| line.starts_with("retried: "));
            assert_eq!(shown.count(), count, "{lines:#?}");
            let counts = format!(
                "{count} passed, {} failed, {count} retried",
                u8::from(!green)
            );
            assert_eq!(*lines.last().unwrap(), counts);
        }
    }

    #[test]
    fn what_is_skipped_has_failed_in_ci_alone() {
        for (ci, counts) in [
            (false, "0 passed, 0 failed, 1 skipped"),
            (true, "0 passed, 1 failed"),
        ] {
            let mut tally = Tally::default();
            assert!(tally.note("skipped: the page: chromium is missing"));
            assert!(!tally.note("a line: of a log"));
            assert_eq!(tally.summary(ci).0.last().unwrap(), counts);
        }
    }

    #[test]
    fn a_binary_that_crashed_is_no_failed_test() {
        let passed = "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert!(read(FIRST).is_whole());
        assert!(!read(&format!("{FIRST}running 3 tests\n")).is_whole());
        let crashed = format!("running 3 scenarios\n{FIRST}running 0 tests\n{passed}");
        assert!(!read(&crashed).is_whole());
    }
}

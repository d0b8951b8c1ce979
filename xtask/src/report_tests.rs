use super::*;

fn read(lines: &[&str]) -> Results {
    let mut results = Results::default();
    for line in lines {
        results.line(line);
    }
    results
}

fn settled(first: Results, second: Results) -> Report {
    let mut report = Report::default();
    report.settle("agent", first, second);
    report
}

const STARTED: &str = r#"{ "type": "suite", "event": "started", "test_count": 2 }"#;
const FAILED_B: &str = r#"{ "type": "test", "name": "b", "event": "failed", "stdout": "a long log\n\nthread 'b' (8) panicked at x.rs:1:2:\nnever came\nnote: run with `RUST_BACKTRACE=1`\ninconclusive: at full speed: 7 events were lost\n" }"#;
const PASSED_A: &str = r#"{ "type": "test", "name": "a", "event": "ok", "stdout": "skipped: the page: chromium is missing\n" }"#;
const ENDED: &str = r#"{ "type": "suite", "event": "failed", "passed": 1, "failed": 1 }"#;

fn first() -> Results {
    read(&[STARTED, PASSED_A, FAILED_B, ENDED])
}

#[test]
fn events_and_notes_are_read() {
    let results = first();
    assert!(results.ended && results.passed.contains("a"));
    let message = "thread 'b' (8) panicked at x.rs:1:2: | never came | inconclusive: at full speed: 7 events were lost";
    let failed = Failure {
        test: "b".into(),
        message: message.into(),
    };
    assert_eq!(results.failed, [failed]);
    assert_eq!(results.notes.len(), 2, "{:?}", results.notes);
}

#[test]
fn what_is_no_event_goes_to_the_details() {
    let mut results = Results::default();
    assert_eq!(
        results.line("[ 0.0] a kernel line"),
        "[ 0.0] a kernel line\n"
    );
    assert_eq!(results.line(PASSED_A), "");
    assert!(results.line(FAILED_B).contains("a long log"));
    // A child printed no newline.
    results.line(&format!("12 bytes{}", PASSED_A.replace("\"a\"", "\"c\"")));
    assert_eq!(results.passed.len(), 2);
}

#[test]
fn a_binary_that_crashed_has_not_ended() {
    assert!(!read(&[STARTED, PASSED_A]).ended);
    assert!(!read(&[STARTED, ENDED, STARTED]).ended);
}

#[test]
fn a_retried_test_is_listed_with_its_first_try() {
    let second = read(&[STARTED, &PASSED_A.replace("\"a\"", "\"b\""), ENDED]);
    let report = settled(first(), second);
    assert_eq!((report.passed, report.failed.len()), (2, 0));
    let (lines, green) = report.summary(false);
    let line = "retried: agent b: thread 'b' (8) panicked at x.rs:1:2: | never came";
    assert!(
        green && lines.iter().any(|shown| shown.starts_with(line)),
        "{lines:#?}"
    );
    assert_eq!(
        lines.last().unwrap(),
        "2 passed, 0 failed, 1 retried, 1 inconclusive, 1 skipped"
    );
}

#[test]
fn a_test_that_fails_twice_shows_both_tries() {
    let second = read(&[STARTED, &FAILED_B.replace("never came", "another"), ENDED]);
    let report = settled(first(), second);
    assert_eq!((report.passed, report.retried.len()), (1, 0));
    let [failed] = &report.failed[..] else {
        panic!("{:?}", report.failed);
    };
    assert!(
        failed.contains("never came") && failed.contains("another"),
        "{failed}"
    );
}

#[test]
fn more_than_two_retries_fail_in_ci_alone() {
    for (count, ci, green) in [(2, true, true), (3, true, false), (5, false, true)] {
        let report = Report {
            retried: vec!["retried: agent b: never came".to_owned(); count],
            ..Report::default()
        };
        let (lines, is_green) = report.summary(ci);
        assert_eq!(is_green, green, "{count} {ci}: {lines:#?}");
        let shown = lines.iter().filter(|line| line.starts_with("retried: "));
        assert_eq!(shown.count(), count, "{lines:#?}");
        let failed = u8::from(!green);
        let counts = format!("0 passed, {failed} failed, {count} retried");
        assert_eq!(*lines.last().unwrap(), counts);
    }
}

#[test]
fn a_skipped_test_fails_in_ci_alone() {
    for (ci, counts) in [
        (false, "1 passed, 0 failed, 1 skipped"),
        (true, "1 passed, 1 failed, 1 skipped"),
    ] {
        let report = settled(read(&[PASSED_A]), Results::default());
        assert_eq!(report.summary(ci).0.last().unwrap(), counts);
    }
}

struct Unsteady;

impl Target for Unsteady {
    fn name(&self) -> &str {
        "agent"
    }

    fn run(&self, names: &[String]) -> Result<Results> {
        let passed = names.iter().cloned().collect();
        Ok(Results {
            passed,
            ended: true,
            ..Results::default()
        })
    }
}

#[test]
fn at_most_five_failed_tests_are_retried() {
    for (count, retried) in [(RETRIES, RETRIES), (RETRIES + 1, 0)] {
        let failed = (0..count).map(|at| Failure {
            test: at.to_string(),
            message: "never came".into(),
        });
        let first = Results {
            failed: failed.collect(),
            ended: true,
            ..Results::default()
        };
        let mut report = Report::default();
        report.add(vec![(&Unsteady, first)]).unwrap();
        assert_eq!(report.retried.len(), retried);
        assert_eq!(report.failed.len(), count - retried);
    }
}

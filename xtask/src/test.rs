//! Every test, one summary.

use std::io::{BufRead, BufReader};
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::{dist, exec, install, vm};

/// `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Make the release as well and check it: some minutes more
    #[arg(long)]
    dist: bool,
    /// Only tests whose name contains this
    filter: Option<String>,
}

/// What the runs came to.
#[derive(Debug, Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: Vec<String>,
    not_applicable: Vec<String>,
}

/// Installs, runs, sums up.
///
/// # Errors
/// When something cannot be started.
pub fn run(args: &Args) -> Result<ExitCode> {
    let started = Instant::now();
    if let Err(error) = install::tools() {
        // The tests that need them say so, one by one.
        println!("{error:#}");
    }
    install::mount_tracefs();
    let mut tally = Tally::default();
    if args.filter.is_some() {
        tally.libtest(&args.filter, &[])?;
    } else {
        tally.everything()?;
    }
    if args.dist {
        tally.release();
    }
    Ok(tally.report(started))
}

/// Names of the workspace's integration tests.
fn test_targets() -> Result<Vec<String>> {
    let mut command = exec::cargo();
    command.args(["metadata", "--no-deps", "--locked", "--format-version=1"]);
    let output = command
        .output()
        .with_context(|| format!("cannot start `{}`", exec::shown(&command)))?;
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("what `{}` printed", exec::shown(&command)))?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    Ok(packages
        .flat_map(|package| package["targets"].as_array().into_iter().flatten())
        .filter(|target| target["kind"][0] == "test")
        .filter_map(|target| Some(target["name"].as_str()?.to_owned()))
        .collect())
}

impl Tally {
    /// The agent's tests load the machine, and want it for themselves. Most
    /// others wait, and leave that time to the guests, which run the same
    /// build.
    fn everything(&mut self) -> Result<()> {
        let targets = test_targets()?;
        let (loading, waiting): (Vec<_>, Vec<_>) = (targets.iter())
            .map(|target| format!("--test={target}"))
            .partition(|target| target == "--test=agent");
        ensure!(loading.len() == 1, "no test `agent` among {targets:?}");
        self.libtest(&None, &loading)?;
        let mut rest = Self::default();
        let guests = std::thread::scope(|scope| {
            let guests = scope.spawn(|| vm::matrix(&vm::Args::default()));
            let units = ["--lib", "--bins", "--examples"].map(str::to_owned);
            let ran = rest
                .libtest(&None, &[&units[..], &waiting].concat())
                .and_then(|()| rest.libtest(&None, &["--doc".to_owned()]));
            let guests = guests.join();
            ran.map(|()| guests)
        })?
        .map_err(|_| anyhow!("the guests' thread panicked"))??;
        self.add(rest);
        self.add(Self {
            passed: guests.passed,
            failed: guests.failed,
            skipped: guests.skipped,
            not_applicable: guests.not_applicable,
        });
        Ok(())
    }

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped.extend(other.skipped);
        self.not_applicable.extend(other.not_applicable);
    }

    /// Runs `cargo test`, passing its output on and counting.
    fn libtest(&mut self, filter: &Option<String>, targets: &[String]) -> Result<()> {
        let mut command = exec::cargo();
        command.args(["test", "--workspace", "--locked", "--no-fail-fast"]);
        command.args(targets).args(filter);
        // Tests say in their output what they could not do.
        command.args(["--", "--show-output"]);
        let shown = exec::shown(&command);
        let before = self.failed;
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{shown}`"))?;
        let output = child.stdout.take().context("piped")?;
        for line in BufReader::new(output).split(b'\n') {
            let line = line.with_context(|| format!("cannot read what `{shown}` prints"))?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            self.line(&line);
        }
        let status = child.wait().with_context(|| format!("`{shown}`"))?;
        if !status.success() && self.failed == before {
            // It did not even build.
            self.failed += 1;
        }
        Ok(())
    }

    /// Makes the release and checks it.
    fn release(&mut self) {
        if let Some(reason) = dist::missing() {
            let line = format!("skipped: dist: {reason}");
            println!("{line}");
            self.skipped.push(line);
            return;
        }
        match dist::release(&dist::Args::default()) {
            Ok(checks) => self.passed += checks,
            Err(error) => {
                println!("{error:#}");
                self.failed += 1;
            }
        }
    }

    fn line(&mut self, line: &str) {
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
        } else if line.starts_with("skipped: ") {
            self.skipped.push(line.to_owned());
        } else if line.starts_with("not applicable: ") {
            self.not_applicable.push(line.to_owned());
        }
    }

    fn report(mut self, started: Instant) -> ExitCode {
        println!();
        for lines in [&mut self.not_applicable, &mut self.skipped] {
            lines.sort();
            lines.dedup();
            for line in lines.iter() {
                println!("{line}");
            }
        }
        if install::is_ci() && !self.skipped.is_empty() {
            println!("under CI=true what is skipped has failed");
            self.failed += self.skipped.len() as u64;
            self.skipped.clear();
        }
        println!("{} s", started.elapsed().as_secs());
        let Self {
            passed,
            failed,
            skipped,
            ..
        } = self;
        if skipped.is_empty() {
            println!("{passed} passed, {failed} failed");
        } else {
            println!(
                "{passed} passed, {failed} failed, {} skipped",
                skipped.len()
            );
        }
        if failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_test_of_the_workspace_is_found() {
        let targets = test_targets().unwrap();
        for name in ["agent", "kernel", "architecture"] {
            assert!(targets.iter().any(|target| target == name), "{targets:?}");
        }
    }

    #[test]
    fn counts_what_libtest_says() {
        let mut tally = Tally::default();
        tally.line("test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.01s");
        tally
            .line("test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 0 filtered out");
        tally.line("skipped: the page: chromium is missing");
        assert_eq!((tally.passed, tally.failed), (14, 3));
        assert_eq!(tally.skipped.len(), 1);
    }
}

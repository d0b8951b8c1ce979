//! Every test, one summary.

use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, anyhow, ensure};

use crate::tally::{Libtest, RETRIES, Tally};
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
    let mut tally = match &args.filter {
        Some(filter) => Run::new(&["--".to_owned(), filter.clone()])?.settled()?,
        None => everything()?,
    };
    if args.dist {
        release(&mut tally);
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

/// The agent's tests load the machine and have it to themselves. The others
/// mostly wait, so they run beside the guests, which use the same build.
fn everything() -> Result<Tally> {
    let targets = test_targets()?;
    let (loading, waiting): (Vec<_>, Vec<_>) = (targets.iter())
        .map(|target| format!("--test={target}"))
        .partition(|target| target == "--test=agent");
    ensure!(loading.len() == 1, "no test `agent` among {targets:?}");
    let units = ["--lib", "--bins", "--examples"].map(str::to_owned);
    // In its own step: no other build may take time from these tests.
    exec::run(exec::cargo().args(BUILD).arg("--no-run").args(&loading))?;
    let loading = Run::new(&loading)?;
    let (rest, guests) = std::thread::scope(|scope| {
        let guests = scope.spawn(|| vm::matrix(&vm::Args::all(!is_long())));
        let rest = Run::new(&[&units[..], &waiting].concat())
            .and_then(|rest| Ok([rest, Run::new(&["--doc".to_owned()])?]));
        rest.map(|rest| (rest, guests.join()))
    })?;
    let mut tally = guests.map_err(|_| anyhow!("the guests' thread panicked"))??;
    for run in [loading].into_iter().chain(rest) {
        tally.add(run.settled()?);
    }
    Ok(tally)
}

/// What every build and run of tests shares, so that each needs no other
/// build.
const BUILD: [&str; 4] = ["test", "--workspace", "--locked", "--no-fail-fast"];

/// Whether the storms and the guests run in full length.
fn is_long() -> bool {
    std::env::var_os("CONNMON_STORM").is_some_and(|storm| storm == "long")
}

/// Makes the release and checks it.
fn release(tally: &mut Tally) {
    if let Some(reason) = dist::missing() {
        tally.skip(&format!("dist: {reason}"));
        return;
    }
    let checked = dist::release(&dist::Args::default()).and_then(|release| {
        tally.passed += release.checked;
        let storm = RESTARTS.map(str::to_owned);
        let restarts = Run::of(&storm, &[("CONNMON_AGENT", release.binary)])?;
        let ran = restarts.read.passed + restarts.read.failed;
        ensure!(ran == 1, "{} is {ran} tests", RESTARTS.join(" "));
        restarts.settled()
    });
    match checked {
        Ok(restarts) => tally.add(restarts),
        Err(error) => tally.fail(format!("{error:#}")),
    }
}

/// Restarts under load once more, by the agent as released, which leaves the
/// load the time to be one.
const RESTARTS: [&str; 5] = [
    "--test=agent",
    "--",
    "--exact",
    "storm::restarts_under_load_start_exact",
    "--test-threads=1",
];

/// One `cargo test`.
struct Run {
    /// What was asked for.
    args: Vec<String>,
    environment: Vec<(&'static str, PathBuf)>,
    read: Libtest,
    /// It succeeded, or failed by tests that are counted and nothing else.
    sound: bool,
}

impl Run {
    /// Runs it, passing its output on and counting.
    fn new(args: &[String]) -> Result<Self> {
        Self::of(args, &[])
    }

    /// The same with some variables.
    fn of(args: &[String], environment: &[(&'static str, PathBuf)]) -> Result<Self> {
        let mut command = exec::cargo();
        command.args(BUILD).args(args);
        command.envs(environment.iter().map(|(name, value)| (name, value)));
        if !args.iter().any(|arg| arg == "--") {
            command.arg("--");
        }
        // Tests say in their output what they could not do.
        command.arg("--show-output");
        let shown = exec::shown(&command);
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{shown}`"))?;
        let output = child.stdout.take().context("piped")?;
        let mut read = Libtest::default();
        for line in BufReader::new(output).split(b'\n') {
            let line = line.with_context(|| format!("cannot read what `{shown}` prints"))?;
            let line = String::from_utf8_lossy(&line);
            println!("{line}");
            read.line(&line);
        }
        let status = child.wait().with_context(|| format!("`{shown}`"))?;
        Ok(Self {
            args: args.to_vec(),
            environment: environment.to_vec(),
            sound: status.success() || read.failed > 0 && read.is_whole(),
            read,
        })
    }

    /// Retries the few that failed, one by one, and counts.
    fn settled(self) -> Result<Tally> {
        let names = self.read.names().unwrap_or_default();
        let second = if (1..=RETRIES).contains(&names.len()) {
            println!("retried, one by one: {}", names.join(" "));
            let alone = ["--", "--exact", "--test-threads=1"].map(str::to_owned);
            let before = self.args.iter().take_while(|arg| *arg != "--");
            let args: Vec<String> = before.chain(&alone).chain(&names).cloned().collect();
            Some(Self::of(&args, &self.environment)?.read)
        } else {
            None
        };
        let mut tally = self.read.settle(second);
        if !self.sound {
            tally.fail(format!("`cargo test {}`", self.args.join(" ")));
        }
        Ok(tally)
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
}

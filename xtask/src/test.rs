//! `cargo xtask test`: every test, one line a target, one summary.
//!
//! Test binaries are built by one `cargo test --no-run` and started from
//! here, since only then their results can be read as events.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::Deserialize;

use crate::report::{self, Report, Results, Target};
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

/// A test binary that takes longer hangs.
const TIME: Duration = Duration::from_secs(3600);

/// Restarts under load once more, by the released agent, which leaves the
/// load enough of the processors.
const RESTARTS: &str = "storm::restarts_under_load_start_exact";

/// Installs, builds, runs, sums up.
///
/// # Errors
/// When something cannot be built or started.
pub fn run(args: &Args) -> Result<ExitCode> {
    let started = Instant::now();
    if let Err(error) = install::tools() {
        // The tests that need a missing tool report that themselves.
        println!("{error:#}");
    }
    install::mount_tracefs();
    let mut report = Report::default();
    let binaries = build(&["--lib", "--bins", "--examples", "--tests"])?.tests;
    let binaries: Vec<Binary> = (binaries.into_iter())
        .map(|binary| Binary {
            filter: args.filter.clone(),
            ..binary
        })
        .collect();
    match &args.filter {
        Some(_) => report.add(run_all(&binaries)?)?,
        None => everything(&binaries, &mut report)?,
    }
    if args.dist {
        release(&binaries, &mut report);
    }
    report.print(started)
}

/// The agent's tests load the machine and have it to themselves. The others
/// mostly wait, so they run beside the guests.
fn everything(binaries: &[Binary], report: &mut Report) -> Result<()> {
    exec::output(exec::cargo().args(["test", "--workspace", "--locked", "--quiet", "--doc"]))?;
    let (loading, waiting): (Vec<_>, Vec<_>) =
        (binaries.iter()).partition(|binary| binary.name == "agent");
    ensure!(
        loading.len() == 1,
        "cargo built {} tests called `agent`",
        loading.len()
    );
    let mut runs = run_all(loading)?;
    let guests = vm::prepare(&vm::Args::all(!is_long()), report)?;
    let (rest, booted) = std::thread::scope(|scope| {
        let booted = scope.spawn(|| vm::boot_all(&guests));
        (run_all(waiting), booted.join())
    });
    runs.extend(rest?);
    runs.extend(booted.map_err(|_| anyhow!("the guests' thread panicked"))??);
    report.add(runs)
}

/// Whether the storms and the guests run in full length.
fn is_long() -> bool {
    std::env::var_os("CONNMON_STORM").is_some_and(|storm| storm == "long")
}

/// Runs binaries one after the other and prints a line for each.
fn run_all<'a>(
    binaries: impl IntoIterator<Item = &'a Binary>,
) -> Result<Vec<(&'a dyn Target, Results)>> {
    let mut runs: Vec<(&dyn Target, Results)> = Vec::new();
    for binary in binaries {
        let started = Instant::now();
        let results = binary.run(&[])?;
        report::progress(&binary.name, &results, started);
        runs.push((binary, results));
    }
    Ok(runs)
}

/// Makes the release and checks it.
fn release(binaries: &[Binary], report: &mut Report) {
    if let Some(reason) = dist::missing() {
        return report.skip(&format!("dist: {reason}"));
    }
    let checked = dist::release(&dist::Args::default()).and_then(|release| {
        report.passed += release.checked;
        let agent = (binaries.iter())
            .find(|binary| binary.name == "agent")
            .context("cargo built no test `agent`")?;
        let agent = Binary {
            name: "agent-as-released".to_owned(),
            agent: Some(release.binary),
            ..agent.clone()
        };
        let results = agent.run(&[RESTARTS.to_owned()])?;
        let ran = results.passed.len() + results.failed.len();
        ensure!(ran == 1, "{RESTARTS} is {ran} tests");
        report.add(vec![(&agent, results)])
    });
    if let Err(error) = checked {
        report.fail(format!("{error:#}"));
    }
}

/// A test binary of this machine.
#[derive(Clone, Debug)]
pub struct Binary {
    /// Name of its target; a package's own tests are `PACKAGE-lib` or so.
    name: String,
    /// The file.
    pub path: PathBuf,
    /// Its package's directory, where tests are run.
    directory: PathBuf,
    filter: Option<String>,
    /// The agent that it starts, instead of the one beside it.
    agent: Option<PathBuf>,
}

impl Target for Binary {
    fn name(&self) -> &str {
        &self.name
    }

    fn run(&self, names: &[String]) -> Result<Results> {
        let mut results = Results::default();
        let details = report::details(&self.name, names.is_empty())?;
        // One process a name: libtest-mimic takes only one, and a retried test
        // runs alone.
        let runs = match names {
            [] => vec![None],
            names => names.iter().map(Some).collect(),
        };
        for name in runs {
            let mut command = Command::new(&self.path);
            command
                .args(["--show-output", "--format=json", "-Zunstable-options"])
                .args(name.map(|_| "--exact"))
                .args(name.or(self.filter.as_ref()))
                .current_dir(&self.directory)
                .env("CARGO_MANIFEST_DIR", &self.directory)
                // The format is unstable, and this obeys stable compilers too.
                .env("RUSTC_BOOTSTRAP", "1")
                .envs(self.agent.iter().map(|agent| ("CONNMON_AGENT", agent)))
                .stderr(details.try_clone()?);
            let failed = results.failed.len();
            let status = exec::lines(&mut command, TIME, |line| {
                let text = results.line(line);
                // What fails to be written is missing in the details alone.
                let _ = (&details).write_all(text.as_bytes());
            })?;
            if !status.success() && (results.failed.len() == failed || !results.ended) {
                results.fail(format!("{} ended early: {status}", self.path.display()));
            }
        }
        Ok(results)
    }
}

/// What a build of tests made.
pub struct Built {
    /// Every test binary.
    pub tests: Vec<Binary>,
    /// The agent, which tests start.
    pub agent: PathBuf,
}

/// A message of cargo's about a file that it made.
#[derive(Deserialize)]
struct Artifact {
    target: ArtifactTarget,
    profile: Profile,
    manifest_path: PathBuf,
    executable: PathBuf,
}

#[derive(Deserialize)]
struct ArtifactTarget {
    name: String,
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

/// Builds test binaries, `targets` as cargo takes them. Always of the whole
/// workspace: one package alone has other features, and would be built anew.
///
/// # Errors
/// When the build fails.
pub fn build(targets: &[&str]) -> Result<Built> {
    let messages = exec::output(
        exec::cargo()
            .args(["test", "--no-run", "--workspace", "--locked"])
            .arg("--message-format=json-render-diagnostics")
            .args(targets),
    )?;
    let (mut tests, mut agent) = (Vec::new(), None);
    for line in messages.lines() {
        // Other messages have no executable.
        let Ok(artifact) = serde_json::from_str::<Artifact>(line) else {
            continue;
        };
        let directory = artifact.manifest_path.with_file_name("");
        let ArtifactTarget { name, kind } = artifact.target;
        if artifact.profile.test {
            let name = match kind[0].as_str() {
                "test" => name,
                kind => format!("{name}-{kind}"),
            };
            tests.push(Binary {
                name,
                path: artifact.executable,
                directory,
                filter: None,
                agent: None,
            });
        } else if name == "connmon" && kind == ["bin"] {
            agent = Some(artifact.executable);
        }
    }
    Ok(Built {
        tests,
        agent: agent.context("cargo built no agent")?,
    })
}

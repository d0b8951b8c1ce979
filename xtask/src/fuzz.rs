//! Runs every fuzz target for a while.

use std::process::{Command, ExitCode};
use std::sync::Mutex;

use anyhow::{Context as _, Result, anyhow};

use crate::{exec, install};

/// (target, folders with seeds).
const TARGETS: [(&str, &[&str]); 5] = [
    ("proc_table", &["connmon/fixtures/proc"]),
    ("netlink", &["connmon/fixtures/diag"]),
    ("event", &[]),
    ("database", &["fuzz/seeds/database"]),
    ("web_config", &["connmon/fixtures/web"]),
];

const CARGO_FUZZ: (&str, &str) = ("cargo-fuzz", "0.13.2");

/// `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Only these targets
    target: Vec<String>,
}

/// Fails at the first finding.
///
/// # Errors
/// When cargo-fuzz cannot be had, or a target found something.
pub fn run(args: &Args) -> Result<ExitCode> {
    install::cargo_tool(CARGO_FUZZ)?;
    for asked in &args.target {
        anyhow::ensure!(
            TARGETS.iter().any(|(target, _)| target == asked),
            "no fuzz target {asked}; there are {}",
            TARGETS.map(|(target, _)| target).join(", ")
        );
    }
    exec::run(fuzz().arg("build"))?;
    let asked = |target: &str| args.target.is_empty() || args.target.iter().any(|a| a == target);
    let targets = Mutex::new(TARGETS.iter().filter(|(target, _)| asked(target)));
    let next = || targets.lock().ok().and_then(|mut targets| targets.next());
    // Each keeps one processor busy.
    let workers = std::thread::available_parallelism()?.get();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers)
            .map(|_| {
                scope.spawn(|| {
                    while let Some((target, seeds)) = next() {
                        run_target(target, seeds, args.seconds)?;
                    }
                    Ok(())
                })
            })
            .collect();
        let ended = workers.into_iter().map(|worker| worker.join());
        ended
            .map(|ended| ended.map_err(|_| anyhow!("a fuzzer's thread panicked"))?)
            .collect::<Result<Vec<()>>>()
    })?;
    Ok(ExitCode::SUCCESS)
}

fn run_target(target: &str, seeds: &[&str], seconds: u32) -> Result<()> {
    let corpus = exec::root().join("fuzz/corpus").join(target);
    std::fs::create_dir_all(&corpus).with_context(|| corpus.display().to_string())?;
    let mut command = fuzz();
    command
        .args(["run", target])
        .arg(&corpus)
        .args(seeds.iter().map(|seeds| exec::root().join(seeds)))
        .args(["--", "-print_final_stats=1"])
        .arg(format!("-max_total_time={seconds}"));
    exec::run(&mut command)?;
    println!("fuzz: {target}: nothing found in {seconds} s");
    Ok(())
}

fn fuzz() -> Command {
    let mut command = exec::cargo();
    // Sanitizers are not for stable compilers; this one obeys all the same.
    command.env("RUSTC_BOOTSTRAP", "1").arg("fuzz");
    command
}

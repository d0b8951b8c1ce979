//! Format, lints, docs, supply chain, the other architecture.

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::exec::{cargo, root, run as exec};
use crate::{cross, install};

/// Pinned; takes minutes to build, so that only CI installs it by itself.
const CARGO_DENY: (&str, &str) = ("cargo-deny", "0.20.2");

/// Everything with a lock file of its own.
const MANIFESTS: [&str; 3] = ["Cargo.toml", "connmon-ebpf/Cargo.toml", "fuzz/Cargo.toml"];

/// What deny.toml says for one manifest need not occur in another.
const NOT_EVERYWHERE: [&str; 4] = [
    "unmatched-skip",
    "unnecessary-skip",
    "license-not-encountered",
    "license-exception-not-encountered",
];

/// Fails at the first complaint.
///
/// # Errors
/// When a tool complains or cannot be started.
pub fn run() -> Result<ExitCode> {
    exec(cargo().args(["fmt", "--all", "--check"]))?;
    exec(cargo().args([
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--",
        "-D",
        "warnings",
    ]))?;
    exec(
        cargo()
            .args(["doc", "--workspace", "--no-deps", "--locked", "--quiet"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    supply_chain()?;
    cross::check()?;
    println!("format, lints, docs and supply chain are clean");
    Ok(ExitCode::SUCCESS)
}

/// What deny.toml allows is what is built.
fn supply_chain() -> Result<()> {
    let (name, version) = CARGO_DENY;
    if !install::is_ci() && !install::has_cargo_tool(CARGO_DENY) {
        println!(
            "skipped: cargo deny: not there, and takes minutes to build: \
             cargo install --locked {name}@{version}"
        );
        return Ok(());
    }
    install::cargo_tool(CARGO_DENY)?;
    for manifest in MANIFESTS {
        exec(deny(manifest, &[]).args(["licenses", "bans", "sources"]))?;
    }
    advisories()
}

fn deny(manifest: &str, options: &[&str]) -> Command {
    let mut command = cargo();
    command
        .args(["deny", "--locked", "--log-level=error"])
        .args(options)
        .arg("--config")
        .arg(root().join("deny.toml"))
        .arg("--manifest-path")
        .arg(root().join(manifest))
        .arg("check");
    for lint in NOT_EVERYWHERE {
        command.args(["--allow", lint]);
    }
    command
}

/// Known vulnerabilities. Their database lies in a git repository, not in a
/// registry of packages, and is fetched only where that is asked for.
fn advisories() -> Result<()> {
    let offline: &[&str] = match std::env::var_os(FETCH) {
        Some(_) => &[],
        None => &["--offline"],
    };
    let output = deny(MANIFESTS[0], offline)
        .arg("advisories")
        .env("GIT_TERMINAL_PROMPT", "0")
        .output()
        .context("cannot start cargo deny")?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    if !said.contains("advisory-db") {
        bail!("cargo deny check advisories:\n{said}");
    }
    println!("not applicable: advisories: no database here; {FETCH}=1 fetches it");
    Ok(())
}

/// Asks for the database of advisories.
const FETCH: &str = "CONNMON_FETCH_ADVISORIES";

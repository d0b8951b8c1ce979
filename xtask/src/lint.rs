//! `cargo xtask lint`: format, lints, docs, supply chain, and the other
//! architecture.

use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::exec::{cargo, root, run as exec};
use crate::{cross, install};

/// Takes minutes to build, so that only CI installs it by itself.
const CARGO_DENY: (&str, &str) = ("cargo-deny", "0.20.2");

/// Every manifest with a lock file of its own. deny.toml is written for the
/// first; what it allows or skips need not occur in the others.
const MANIFESTS: [&str; 3] = ["Cargo.toml", "connmon-ebpf/Cargo.toml", "fuzz/Cargo.toml"];

/// Lints about what deny.toml names and a manifest does not need.
const UNUSED: [&str; 3] = [
    "unmatched-skip",
    "unnecessary-skip",
    "license-not-encountered",
];

/// With this variable cargo-deny fetches the database of advisories, which is
/// a git repository and no package of a registry.
const FETCH: &str = "CONNMON_FETCH_ADVISORIES";

/// Fails at the first complaint.
///
/// # Errors
/// When a tool complains or cannot be started.
pub fn run() -> Result<ExitCode> {
    exec(cargo().args(["fmt", "--all", "--check"]))?;
    exec(
        cargo()
            .args(["clippy", "--workspace", "--all-targets", "--locked"])
            .args(["--", "-D", "warnings"]),
    )?;
    exec(
        cargo()
            .args(["doc", "--workspace", "--no-deps", "--locked", "--quiet"])
            .env("RUSTDOCFLAGS", "-D warnings"),
    )?;
    supply_chain()?;
    cross::check()?;
    println!("format, lints, docs, supply chain and the check for aarch64 are clean");
    Ok(ExitCode::SUCCESS)
}

/// Licences, duplicates, sources and advisories, by deny.toml.
fn supply_chain() -> Result<()> {
    let (name, version) = CARGO_DENY;
    if !install::is_ci() && !install::has_cargo_tool(CARGO_DENY) {
        println!(
            "skipped: supply chain: cargo-deny is not installed and takes minutes to build: \
             cargo install --locked {name}@{version}"
        );
        return Ok(());
    }
    install::cargo_tool(CARGO_DENY)?;
    for manifest in MANIFESTS {
        let level = match manifest == MANIFESTS[0] {
            true => "--deny",
            false => "--allow",
        };
        let mut command = deny(manifest, &[]);
        for lint in UNUSED {
            command.args([level, lint]);
        }
        // Of the fuzz targets alone.
        command.args(["--allow", "license-exception-not-encountered"]);
        exec(command.args(["licenses", "bans", "sources"]))?;
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
    command
}

/// Known vulnerabilities, where their database is on this machine.
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
    let errors = String::from_utf8_lossy(&output.stderr);
    if !errors.contains("advisory-db") {
        bail!("cargo deny check advisories:\n{errors}");
    }
    println!(
        "not applicable: advisories: their database is not on this machine; {FETCH}=1 fetches it"
    );
    Ok(())
}

//! Facts about this build for `--version` and `connmon_build_info`.
//!
//! Nothing here reads the clock: the date is that of the commit, or
//! SOURCE_DATE_EPOCH, so that the same sources give the same binary.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=SOURCE_DATE_EPOCH");
    let vcs = packaged_revision().map_or_else(git, |revision| Vcs {
        revision: Some(revision),
        ..Vcs::default()
    });
    let date = std::env::var("SOURCE_DATE_EPOCH")
        .ok()
        .or(vcs.commit_epoch)
        .and_then(|epoch| epoch.parse::<u64>().ok())
        .map(|epoch| {
            humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(epoch)).to_string()
        });
    let rustc = std::env::var("RUSTC").ok().and_then(|rustc| {
        // `rustc 1.95.0 (59807616e 2026-04-14)`: the second word.
        let version = output(Command::new(rustc).arg("--version"))?;
        version.split_whitespace().nth(1).map(str::to_owned)
    });
    set("CONNMON_BUILD_REVISION", vcs.revision);
    set("CONNMON_BUILD_BRANCH", vcs.branch);
    set("CONNMON_BUILD_DATE", date);
    set("CONNMON_BUILD_RUSTC", rustc);
    set("CONNMON_BUILD_TARGET", std::env::var("TARGET").ok());
}

fn set(name: &str, value: Option<String>) {
    let value = value.filter(|value| !value.is_empty() && !value.contains('\n'));
    println!(
        "cargo::rustc-env={name}={}",
        value.as_deref().unwrap_or("unknown")
    );
}

#[derive(Default)]
struct Vcs {
    revision: Option<String>,
    branch: Option<String>,
    commit_epoch: Option<String>,
}

/// The commit that `cargo package` wrote down, in a crate from a registry.
fn packaged_revision() -> Option<String> {
    let text = std::fs::read_to_string(".cargo_vcs_info.json").ok()?;
    let (_, rest) = text.split_once("\"sha1\"")?;
    rest.split('"').nth(1).map(str::to_owned)
}

/// The checkout this crate lies in, if it is connmon's and not one around it.
fn git() -> Vcs {
    let git = |args: &[&str]| output(Command::new("git").args(args));
    if git(&["ls-files", "--error-unmatch", "build.rs"]).is_none() {
        return Vcs::default();
    }
    // HEAD changes with the branch, its log with every commit.
    for name in ["HEAD", "logs/HEAD"] {
        if let Some(path) = git(&["rev-parse", "--git-path", name])
            && Path::new(&path).exists()
        {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    Vcs {
        revision: git(&["rev-parse", "HEAD"]),
        branch: git(&["rev-parse", "--abbrev-ref", "HEAD"]),
        commit_epoch: git(&["show", "-s", "--format=%ct", "HEAD"]),
    }
}

fn output(command: &mut Command) -> Option<String> {
    let output = command
        .output()
        .ok()
        .filter(|output| output.status.success())?;
    Some(String::from_utf8(output.stdout).ok()?.trim().to_owned())
}

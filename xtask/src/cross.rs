//! `cargo check` of the agent for aarch64 on an x86_64 machine, by Debian's
//! compiler and Debian's arm64 standard library, unpacked under `target/`.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::exec;
use crate::install::{self, PrivateApt};

const TARGET: &str = "aarch64-unknown-linux-gnu";
/// Of rustc-web, whichever rustc comes first on the PATH.
const RUSTC: &str = "/usr/bin/rustc";
const LIBRARY: &str = "libstd-rust-web-dev";
/// The compiler, and for ring's build script a C compiler with headers.
const PACKAGES: [&str; 3] = [
    "rustc-web",
    "gcc-aarch64-linux-gnu",
    "libc6-dev-arm64-cross",
];

/// Checks the agent, or prints why it was skipped.
///
/// # Errors
/// When the check fails; in CI also when it cannot be made.
pub fn check() -> Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        println!("not applicable: cargo check for {TARGET}: this is no x86_64 machine");
        return Ok(());
    }
    let sysroot = match sysroot() {
        Ok(sysroot) => sysroot,
        Err(error) if install::is_ci() => return Err(error),
        Err(error) => {
            println!("skipped: cargo check for {TARGET}: {error:#}");
            return Ok(());
        }
    };
    let flags = format!("--sysroot={}", sysroot.display());
    exec::run(
        exec::cargo()
            .args(["check", "--quiet", "--locked", "--package=connmon"])
            .args(["--target", TARGET])
            .env("CARGO_TARGET_DIR", exec::target_dir().join("aarch64"))
            .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS", flags)
            .env("RUSTC", RUSTC)
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTUP_TOOLCHAIN"),
    )
}

/// A directory with the standard library, fetched once for each version.
fn sysroot() -> Result<PathBuf> {
    if !PACKAGES.iter().all(|package| version(package).is_some()) {
        ensure!(
            install::can_install(),
            "needs Debian's {}, and root to install them",
            PACKAGES.join(", ")
        );
        install::packages(&PACKAGES)?;
    }
    let version = version(LIBRARY).with_context(|| format!("{LIBRARY} is not installed"))?;
    let dir = exec::target_dir().join("aarch64/sysroot").join(&version);
    if !dir.join("complete").exists() {
        let apt = PrivateApt {
            dir: &dir,
            architecture: "arm64",
            sources: None,
        };
        apt.unpack(&dir, || Ok(vec![format!("{LIBRARY}={version}")]))
            .with_context(|| format!("cannot fetch {LIBRARY} for arm64"))?;
        fs::write(dir.join("complete"), "")?;
    }
    Ok(dir.join("usr"))
}

/// The installed version of a package.
fn version(package: &str) -> Option<String> {
    let format = "--showformat=${db:Status-Status} ${Version}";
    let output = Command::new("dpkg-query")
        .args(["--show", format, package])
        .output();
    let text = String::from_utf8(output.ok()?.stdout).ok()?;
    text.strip_prefix("installed ").map(str::to_owned)
}

//! The agent for aarch64, checked on an x86_64 machine: Debian's compiler,
//! and Debian's standard library for arm64, unpacked under target/.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use crate::{exec, install};

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

/// Checks the agent, and skips where that cannot be had.
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
            .args([
                "check",
                "--quiet",
                "--locked",
                "--package=connmon",
                "--target",
            ])
            .arg(TARGET)
            .env("CARGO_TARGET_DIR", exec::target_dir().join("aarch64"))
            .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUSTFLAGS", flags)
            .env("RUSTC", RUSTC)
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTUP_TOOLCHAIN"),
    )?;
    println!("the agent checks for {TARGET}");
    Ok(())
}

/// A directory with the target's standard library, fetched once a version.
fn sysroot() -> Result<PathBuf> {
    if !PACKAGES.iter().all(|package| version(package).is_some()) {
        ensure!(
            exec::is_root() && exec::has("apt-get"),
            "needs Debian's {}, and root to install them",
            PACKAGES.join(", ")
        );
        install::packages(&PACKAGES)?;
    }
    let version = version(LIBRARY).with_context(|| format!("{LIBRARY} is not installed"))?;
    let dir = exec::target_dir().join("aarch64/sysroot").join(&version);
    let root = dir.join("usr");
    if !dir.join("complete").exists() {
        fetch(&dir, &version).with_context(|| format!("cannot fetch {LIBRARY} for arm64"))?;
        fs::write(dir.join("complete"), "")?;
    }
    Ok(root)
}

fn version(package: &str) -> Option<String> {
    let output = Command::new("dpkg-query")
        .args([
            "--show",
            "--showformat=${db:Status-Status} ${Version}",
            package,
        ])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.strip_prefix("installed ").map(str::to_owned)
}

/// By the host's own sources, for the other architecture; lists, state and
/// cache are private, so that the host's apt stays as it is.
fn fetch(dir: &Path, version: &str) -> Result<()> {
    for part in ["lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(dir.join(part))?;
    }
    fs::write(dir.join("status"), "")?;
    let apt = || {
        let mut command = Command::new("apt-get");
        command.current_dir(dir).arg("-qq");
        for (key, value) in [
            ("APT::Architecture", "arm64".to_owned()),
            ("APT::Architectures", "arm64".to_owned()),
            ("Dir::State::Lists", dir.join("lists").display().to_string()),
            (
                "Dir::State::status",
                dir.join("status").display().to_string(),
            ),
            ("Dir::Cache", dir.join("cache").display().to_string()),
            ("Acquire::Languages", "none".to_owned()),
            ("APT::Sandbox::User", "root".to_owned()),
        ] {
            command.arg(format!("-o{key}={value}"));
        }
        command
    };
    // One source that has nothing for arm64 must not take the others with it.
    let updated = exec::run(apt().arg("update"));
    let downloaded = exec::run(apt().arg("download").arg(format!("{LIBRARY}={version}")));
    if let Err(error) = downloaded {
        updated?;
        return Err(error);
    }
    let deb = fs::read_dir(dir)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    let Some(deb) = deb else {
        bail!("apt-get download left no package in {}", dir.display());
    };
    exec::run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(dir))?;
    fs::remove_file(&deb)?;
    fs::remove_dir_all(dir.join("lists"))?;
    Ok(())
}

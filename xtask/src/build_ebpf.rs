//! The BPF objects under `connmon/bpf`, rebuilt from `connmon-ebpf` and
//! checked against it.
//!
//! The objects are committed, so that building the agent needs neither LLVM
//! nor a nightly compiler. A sidecar beside them names what built them and
//! carries a hash of the sources; a test compares that without a toolchain.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::{exec, install};

/// Architectures with an object; as `bpf_target_arch` wants them.
const ARCHITECTURES: [&str; 2] = ["x86_64", "aarch64"];
const TARGET: &str = "bpfel-unknown-none";
const SIDECAR: &str = "connmon.provenance";

/// Debian's prebuilt `core` for BPF, and what bpf-linker links with.
const DEBIAN_PACKAGES: [&str; 6] = [
    "rustc-web",
    "libstd-rust-web-dev-bpf",
    "llvm-22-dev",
    "libpolly-22-dev",
    "libzstd-dev",
    "zlib1g-dev",
];
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CORE: &str = "/usr/lib/rustlib/bpfel-unknown-none";
const DEBIAN_LLVM: &str = "/usr/lib/llvm-22";
const BPF_LINKER: &str = "0.13.0";

/// Options of `build-ebpf`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Change nothing; fail when the committed objects are not what the
    /// sources say
    #[arg(long)]
    check: bool,
}

/// Rebuilds, or checks.
///
/// # Errors
/// When there is no toolchain, it fails, or `--check` finds a difference.
pub fn run(args: &Args) -> Result<ExitCode> {
    if args.check {
        check(&exec::root())?;
        println!("the BPF objects are those of the sources");
        return Ok(ExitCode::SUCCESS);
    }
    let toolchain = Toolchain::find()?;
    println!("building with {}", toolchain.name());
    let folder = exec::root().join("connmon/bpf");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    for architecture in ARCHITECTURES {
        toolchain.build(architecture, &folder.join(object_name(architecture)))?;
    }
    let sidecar = toolchain.sidecar(&exec::root())?;
    let path = folder.join(SIDECAR);
    fs::write(&path, &sidecar).with_context(|| format!("cannot write {}", path.display()))?;
    print!("{sidecar}");
    Ok(ExitCode::SUCCESS)
}

fn object_name(architecture: &str) -> String {
    format!("connmon-{architecture}.o")
}

/// Compares the sidecar with the sources and the objects.
///
/// # Errors
/// When they disagree; the message says what to do.
pub fn check(root: &Path) -> Result<()> {
    let path = root.join("connmon/bpf").join(SIDECAR);
    let sidecar =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    for (key, hash) in hashes(root)? {
        let stands = sidecar
            .lines()
            .find_map(|line| line.strip_prefix(&format!("{key}: ")));
        if stands != Some(hash.as_str()) {
            bail!(
                "{key} is {hash}, but {} says {}: run `cargo xtask build-ebpf` and commit connmon/bpf",
                path.display(),
                stands.unwrap_or("nothing")
            );
        }
    }
    Ok(())
}

/// What the sidecar holds of sources and objects: key and SHA-256.
fn hashes(root: &Path) -> Result<Vec<(String, String)>> {
    let mut list = vec![("sources".to_owned(), hash_sources(root)?)];
    for architecture in ARCHITECTURES {
        let name = object_name(architecture);
        let path = root.join("connmon/bpf").join(&name);
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        list.push((name, hex(&Sha256::digest(bytes))));
    }
    Ok(list)
}

/// One hash over everything that shapes the objects: names and contents, in
/// the order of the names.
fn hash_sources(root: &Path) -> Result<String> {
    let mut files = Vec::new();
    for part in ["connmon-ebpf", "connmon-common"] {
        for name in ["Cargo.toml", "Cargo.lock"] {
            let path = root.join(part).join(name);
            if path.is_file() {
                files.push(path);
            }
        }
        collect(&root.join(part).join("src"), &mut files)?;
    }
    files.sort();
    let mut hash = Sha256::new();
    for path in files {
        let name = path.strip_prefix(root).unwrap_or(&path);
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        hash.update(name.to_string_lossy().as_bytes());
        hash.update([0]);
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    }
    Ok(hex(&hash.finalize()))
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What can build for the BPF target.
enum Toolchain {
    /// Debian's rustc-web with a prebuilt `core`.
    Debian,
    /// A nightly with rust-src, which builds `core` itself.
    Nightly,
}

impl Toolchain {
    /// What is there; as root on Debian, what can be installed.
    fn find() -> Result<Self> {
        if Path::new(DEBIAN_CORE).is_dir() && linker().is_some() {
            return Ok(Self::Debian);
        }
        if linker().is_some() && nightly_has_sources() {
            return Ok(Self::Nightly);
        }
        if exec::is_root() && exec::has("apt-get") {
            install_debian()?;
            return Ok(Self::Debian);
        }
        bail!(
            "no BPF toolchain: install a nightly with rust-src (rustup toolchain install nightly -c rust-src) \
             and bpf-linker (cargo install bpf-linker), or run this as root on Debian"
        );
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Debian => "Debian's rustc-web",
            Self::Nightly => "nightly with rust-src",
        }
    }

    fn cargo(&self) -> Command {
        let mut command = exec::cargo();
        if let Self::Nightly = self {
            command = Command::new("cargo");
            command.arg("+nightly");
        } else {
            command
                .env("RUSTC", DEBIAN_RUSTC)
                .env("RUSTC_BOOTSTRAP", "1");
        }
        // Of the outer cargo's, which may be for another compiler.
        command
            .env_remove("RUSTC_WRAPPER")
            .env_remove("RUSTUP_TOOLCHAIN");
        command.current_dir(exec::root().join("connmon-ebpf"));
        command
    }

    fn build(&self, architecture: &str, object: &Path) -> Result<()> {
        let target_dir = exec::target_dir().join("ebpf").join(architecture);
        let linker = linker().context("bpf-linker is gone")?;
        let mut command = self.cargo();
        command
            .args(["build", "--release", "--locked", "--target", TARGET])
            .env("CARGO_TARGET_DIR", &target_dir)
            // Paths of this machine would make the object differ from
            // another's.
            .env(
                "CARGO_ENCODED_RUSTFLAGS",
                [
                    "-Cdebuginfo=2".to_owned(),
                    format!("-Clinker={}", linker.display()),
                    "-Clink-arg=--btf".to_owned(),
                    format!("--cfg=bpf_target_arch=\"{architecture}\""),
                    format!("--remap-path-prefix={}=.", exec::root().display()),
                    format!("--remap-path-prefix={}=cargo", cargo_home().display()),
                ]
                .join("\x1f"),
            );
        if let Self::Nightly = self {
            command.args(["-Z", "build-std=core"]);
        }
        exec::run(&mut command)?;
        let built = target_dir.join(TARGET).join("release/connmon");
        // DWARF is six times the rest; the BTF that the kernel wants stays.
        exec::run(
            Command::new(objcopy()?)
                .arg("--strip-debug")
                .args([&built, object]),
        )
    }

    fn sidecar(&self, root: &Path) -> Result<String> {
        let mut rustc = match self {
            Self::Debian => Command::new(DEBIAN_RUSTC),
            Self::Nightly => {
                let mut command = Command::new("rustc");
                command.arg("+nightly");
                command
            }
        };
        let linker = linker().context("bpf-linker is gone")?;
        let mut text = String::from("# Written by `cargo xtask build-ebpf`.\n");
        for (key, command) in [
            ("compiler", rustc.arg("--version")),
            ("linker", Command::new(linker).arg("--version")),
        ] {
            let _ = writeln!(text, "{key}: {}", first_line(command)?);
        }
        for (key, hash) in hashes(root)? {
            let _ = writeln!(text, "{key}: {hash}");
        }
        Ok(text)
    }
}

fn first_line(command: &mut Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start `{}`", exec::shown(command)))?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(text.lines().next().unwrap_or("unknown").trim().to_owned())
}

fn nightly_has_sources() -> bool {
    let sysroot = Command::new("rustc")
        .args(["+nightly", "--print", "sysroot"])
        .output();
    sysroot.is_ok_and(|output| {
        let root = String::from_utf8_lossy(&output.stdout).trim().to_owned();
        output.status.success()
            && Path::new(&root)
                .join("lib/rustlib/src/rust/library/core")
                .is_dir()
    })
}

fn cargo_home() -> PathBuf {
    env::var_os("CARGO_HOME").map_or_else(
        || PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cargo"),
        PathBuf::from,
    )
}

fn linker() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain([cargo_home().join("bin")])
        .map(|folder| folder.join("bpf-linker"))
        .find(|file| file.is_file())
}

fn objcopy() -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let debian = PathBuf::from(DEBIAN_LLVM).join("bin");
    env::split_paths(&path)
        .chain([debian])
        .flat_map(|folder| {
            ["llvm-objcopy", "llvm-objcopy-22", "rust-objcopy"].map(|name| folder.join(name))
        })
        .find(|file| file.is_file())
        .context("no llvm-objcopy: install LLVM's tools (Debian: llvm-22) or cargo-binutils")
}

fn install_debian() -> Result<()> {
    install::packages(&DEBIAN_PACKAGES)?;
    if linker().is_none() {
        println!("installing bpf-linker {BPF_LINKER}");
        let mut path = env::join_paths(
            std::iter::once(PathBuf::from(DEBIAN_LLVM).join("bin"))
                .chain(env::split_paths(&env::var_os("PATH").unwrap_or_default())),
        )?;
        exec::run(
            exec::cargo()
                .env("LLVM_PREFIX", DEBIAN_LLVM)
                .env("PATH", std::mem::take(&mut path))
                .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked"])
                .args(["--no-default-features", "--features", "llvm-22"]),
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs no toolchain: a change of the programs without a rebuild fails.
    #[test]
    fn the_committed_objects_are_those_of_the_sources() {
        check(&exec::root()).unwrap();
    }

    #[test]
    fn any_change_of_a_source_changes_the_hash() {
        let root = std::env::temp_dir().join(format!("connmon-hash-{}", std::process::id()));
        let source = root.join("connmon-ebpf/src/deep/a.rs");
        fs::create_dir_all(source.parent().unwrap()).unwrap();
        fs::create_dir_all(root.join("connmon-common/src")).unwrap();
        fs::write(&source, "one").unwrap();
        let first = hash_sources(&root).unwrap();
        assert_eq!(first, hash_sources(&root).unwrap());
        fs::write(&source, "two").unwrap();
        let second = hash_sources(&root).unwrap();
        assert_ne!(first, second);
        fs::rename(&source, source.with_file_name("b.rs")).unwrap();
        assert_ne!(second, hash_sources(&root).unwrap());
        fs::remove_dir_all(&root).unwrap();
    }
}

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

use anyhow::{Context as _, Result, ensure};
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

/// `cargo xtask build-ebpf`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Change nothing; fail when the committed objects are not built from the
    /// sources
    #[arg(long)]
    check: bool,
}

/// Rebuilds, or checks.
///
/// # Errors
/// When there is no toolchain, it fails, or `--check` finds a difference.
pub fn run(args: &Args) -> Result<ExitCode> {
    let root = exec::root();
    if args.check {
        check(&root)?;
        println!("the BPF objects are built from the sources");
        return Ok(ExitCode::SUCCESS);
    }
    let toolchain = Toolchain::find()?;
    for architecture in ARCHITECTURES {
        toolchain.build(
            architecture,
            &root.join("connmon/bpf").join(object_name(architecture)),
        )?;
    }
    let sidecar = toolchain.sidecar(&root)?;
    let path = root.join("connmon/bpf").join(SIDECAR);
    fs::write(&path, &sidecar).with_context(|| format!("cannot write {}", path.display()))?;
    print!("{sidecar}");
    Ok(ExitCode::SUCCESS)
}

fn object_name(architecture: &str) -> String {
    format!("connmon-{architecture}.o")
}

/// Compares the sidecar with the sources and the objects.
fn check(root: &Path) -> Result<()> {
    let path = root.join("connmon/bpf").join(SIDECAR);
    let sidecar =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    for (key, hash) in hashes(root)? {
        let mut lines = sidecar.lines();
        let recorded = lines.find_map(|line| line.strip_prefix(&format!("{key}: ")));
        ensure!(
            recorded == Some(hash.as_str()),
            "{key} is {hash}, but {} has {}: run `cargo xtask build-ebpf` and commit connmon/bpf",
            path.display(),
            recorded.unwrap_or("none")
        );
    }
    Ok(())
}

/// What the sidecar holds of sources and objects: key and SHA-256.
fn hashes(root: &Path) -> Result<Vec<(String, String)>> {
    let mut list = vec![("sources".to_owned(), hash_sources(root)?)];
    for name in ARCHITECTURES.map(object_name) {
        let path = root.join("connmon/bpf").join(&name);
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        list.push((name, sha256(bytes)));
    }
    Ok(list)
}

/// One hash over everything that shapes the objects: names and contents, in
/// the order of the names.
fn hash_sources(root: &Path) -> Result<String> {
    let mut files = Vec::new();
    for part in ["connmon-ebpf", "connmon-common"] {
        let manifests = ["Cargo.toml", "Cargo.lock"].map(|name| root.join(part).join(name));
        files.extend(manifests.into_iter().filter(|path| path.is_file()));
        collect(&root.join(part).join("src"), &mut files)?;
    }
    files.sort();
    let mut hashed = Vec::new();
    for path in files {
        let name = path.strip_prefix(root).unwrap_or(&path);
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        hashed.extend(name.to_string_lossy().as_bytes());
        hashed.push(0);
        hashed.extend((bytes.len() as u64).to_le_bytes());
        hashed.extend(bytes);
    }
    Ok(sha256(hashed))
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

/// SHA-256 in hexadecimal.
pub fn sha256(bytes: impl AsRef<[u8]>) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// What can build for the BPF target.
enum Toolchain {
    /// Debian's rustc-web with a prebuilt `core`.
    Debian,
    /// A nightly with rust-src, which builds `core` itself.
    Nightly,
}

impl Toolchain {
    /// The one that is there; as root on Debian, one that can be installed.
    fn find() -> Result<Self> {
        if linker().is_ok() && Path::new(DEBIAN_CORE).is_dir() {
            return Ok(Self::Debian);
        }
        if linker().is_ok() && nightly_has_sources() {
            return Ok(Self::Nightly);
        }
        ensure!(
            install::can_install(),
            "no BPF toolchain: install a nightly with rust-src (rustup toolchain install nightly -c rust-src) \
             and bpf-linker (cargo install bpf-linker), or run this as root on Debian"
        );
        install_debian()?;
        Ok(Self::Debian)
    }

    fn cargo(&self) -> Command {
        let mut command = exec::cargo();
        match self {
            Self::Debian => {
                command
                    .env("RUSTC", DEBIAN_RUSTC)
                    .env("RUSTC_BOOTSTRAP", "1");
            }
            Self::Nightly => {
                command = Command::new("cargo");
                command.arg("+nightly");
            }
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
        // Paths of this machine would make the object differ from another's.
        let flags = [
            "-Cdebuginfo=2".to_owned(),
            format!("-Clinker={}", linker()?.display()),
            "-Clink-arg=--btf".to_owned(),
            format!("--cfg=bpf_target_arch=\"{architecture}\""),
            format!("--remap-path-prefix={}=.", exec::root().display()),
            format!("--remap-path-prefix={}=cargo", exec::cargo_home().display()),
        ];
        let mut command = self.cargo();
        command
            .args(["build", "--release", "--locked", "--target", TARGET])
            .env("CARGO_TARGET_DIR", &target_dir)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
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
            Self::Nightly => Command::new("rustc"),
        };
        if let Self::Nightly = self {
            rustc.arg("+nightly");
        }
        let compiler = exec::output(rustc.arg("--version"))?;
        let linker = exec::output(Command::new(linker()?).arg("--version"))?;
        let linker = linker.lines().next().unwrap_or_default();
        let mut text = format!(
            "# Written by `cargo xtask build-ebpf`.\ncompiler: {compiler}\nlinker: {linker}\n"
        );
        for (key, hash) in hashes(root)? {
            let _ = writeln!(text, "{key}: {hash}");
        }
        Ok(text)
    }
}

fn nightly_has_sources() -> bool {
    let mut rustc = Command::new("rustc");
    let sysroot = exec::output(rustc.args(["+nightly", "--print", "sysroot"]));
    sysroot.is_ok_and(|root| {
        Path::new(&root)
            .join("lib/rustlib/src/rust/library/core")
            .is_dir()
    })
}

fn linker() -> Result<PathBuf> {
    exec::find("bpf-linker")
        .or_else(|| Some(exec::cargo_home().join("bin/bpf-linker")).filter(|file| file.is_file()))
        .context("there is no bpf-linker")
}

fn objcopy() -> Result<PathBuf> {
    let debian = Path::new(DEBIAN_LLVM).join("bin/llvm-objcopy");
    let named = ["llvm-objcopy", "llvm-objcopy-22", "rust-objcopy"];
    (named.into_iter().find_map(exec::find))
        .or_else(|| Some(debian).filter(|file| file.is_file()))
        .context("no llvm-objcopy: install LLVM's tools (Debian: llvm-22) or cargo-binutils")
}

fn install_debian() -> Result<()> {
    install::packages(&DEBIAN_PACKAGES)?;
    if linker().is_ok() {
        return Ok(());
    }
    println!("installing bpf-linker {BPF_LINKER}");
    let path = env::var_os("PATH").unwrap_or_default();
    let llvm = PathBuf::from(DEBIAN_LLVM).join("bin");
    exec::run(
        exec::cargo()
            .env("LLVM_PREFIX", DEBIAN_LLVM)
            .env(
                "PATH",
                env::join_paths([llvm].into_iter().chain(env::split_paths(&path)))?,
            )
            .args(["install", "bpf-linker", "--version", BPF_LINKER, "--locked"])
            .args(["--no-default-features", "--features", "llvm-22"]),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Needs no toolchain: a change of the programs without a rebuild fails.
    #[test]
    fn the_committed_objects_match_the_sources() {
        check(&exec::root()).unwrap();
    }

    #[test]
    fn any_change_of_a_source_changes_the_hash() {
        let root = env::temp_dir().join(format!("connmon-hash-{}", std::process::id()));
        let source = root.join("connmon-ebpf/src/deep/a.rs");
        fs::create_dir_all(source.with_file_name("")).unwrap();
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

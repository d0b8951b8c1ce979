//! `cargo xtask dist`: everything that is released, in target/dist.
//!
//! One static binary, in a tarball that runs in an empty root and in a Debian
//! package, with man pages, completions, SBOM and checksums. Nothing in it
//! depends on the clock, the builder's paths or the order of a directory:
//! the same commit gives the same bytes (`--verify` builds once more, from a
//! clone in another place, and compares).

mod checks;
mod parts;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail, ensure};

use crate::{exec, install};

/// `cargo xtask dist`.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Build the binary twice from scratch, the second time from a clone in
    /// another place, and compare
    #[arg(long)]
    verify: bool,
    /// Take the binary that is already built
    #[arg(long, conflicts_with = "verify")]
    no_build: bool,
}

/// Most bytes that the stripped binary, its database included, may have.
const MOST_BINARY_BYTES: u64 = 14_000_000;
/// The same of one whose release profile is overridden to build faster, as
/// `.ci/run` does: without link-time optimization it is a ninth larger.
const MOST_QUICK_BYTES: u64 = 16_000_000;

/// Relative relocations as bitmaps, a thirtieth of the size; glibc's static
/// start-up reads them from 2.36 on.
const PACK_RELOCATIONS: &str = "-Clink-arg=-Wl,-z,pack-relative-relocs";
/// Functions that are the same machine code and whose address nobody
/// compares are kept once (lld, rustc's own linker).
const FOLD_CODE: &str = "-Clink-arg=-Wl,--icf=safe";

/// cargo-deb is told the same one.
const PROFILE: &str = "release";

const CARGO_DEB: (&str, &str) = ("cargo-deb", "3.8.0");

/// Third-party licences, as packed.
const THIRD_PARTY: &str = "THIRD-PARTY";

/// Runs the task.
///
/// # Errors
/// When a tool fails, or what it made is not what was promised.
pub fn run(args: &Args) -> anyhow::Result<ExitCode> {
    release(args)?;
    Ok(ExitCode::SUCCESS)
}

/// Why a release cannot be made and checked here.
pub fn missing() -> Option<&'static str> {
    if !exec::is_root() {
        return Some("installing the package in a root of its own needs root");
    }
    let debian = exec::has("dpkg-deb") && exec::has("dpkg");
    (!debian).then_some("no dpkg: this is not Debian")
}

/// What was made.
pub struct Release {
    /// The agent.
    pub binary: PathBuf,
    /// How many checks it passed.
    pub checked: u64,
}

/// Makes everything and checks it.
///
/// # Errors
/// As [`run`].
pub fn release(args: &Args) -> anyhow::Result<Release> {
    let dist = Dist::new()?;
    let mut checked = 0;
    let mut check = |what: &str, result: anyhow::Result<()>| -> anyhow::Result<()> {
        result.with_context(|| format!("dist: {what}"))?;
        println!("dist: {what} ... ok");
        checked += 1;
        Ok(())
    };
    if args.verify {
        check(
            "two builds from scratch, in two places, are the same bytes",
            dist.verify(),
        )?;
    }
    let binary = if args.no_build {
        dist.binary("dist-build")
    } else {
        dist.build("dist-build")?
    };
    check("the binary is static and small", check_binary(&binary))?;
    if dist.out.exists() {
        fs::remove_dir_all(&dist.out)
            .with_context(|| format!("cannot clear {}", dist.out.display()))?;
    }
    dist.manual()?;
    let crates = parts::crates(&dist.top, &dist.target)?;
    fs::write(dist.out.join(THIRD_PARTY), parts::third_party(&crates)?)?;
    dist.root(&binary)?;
    let (tarball, package, sbom) = (dist.tarball()?, dist.package()?, dist.sbom()?);
    let again = dist.again()?;
    check(
        "tarball, package and SBOM, made twice, are the same bytes",
        checks::same(&tarball, &again.tarball()?)
            .and_then(|()| checks::same(&package, &again.package()?))
            .and_then(|()| checks::same(&sbom, &again.sbom()?)),
    )?;
    check(
        "the tarball's binary serves a scrape in an empty root",
        checks::runs_in_an_empty_root(&tarball, &again.out),
    )?;
    check(
        "the package installs what it should, and runs",
        checks::installs(&package, &again.out),
    )?;
    check(
        "the package keeps its configuration and starts its unit",
        checks::scripts(&package),
    )?;
    check(
        "the SBOM is complete and names no path",
        checks::sbom_is_complete(&sbom, &dist.top),
    )?;
    let files = [tarball, package, sbom];
    dist.checksums(&files)?;
    for file in files {
        let bytes = fs::metadata(&file)?.len();
        println!("{bytes:>10}  {}", file.display());
    }
    Ok(Release { binary, checked })
}

struct Dist {
    /// The checkout.
    top: PathBuf,
    /// target/dist.
    out: PathBuf,
    version: &'static str,
    target: String,
    /// Unix time of the commit, as text: the only time that enters a file.
    epoch: String,
}

impl Dist {
    fn new() -> anyhow::Result<Self> {
        let top = exec::root();
        let epoch =
            match std::env::var("SOURCE_DATE_EPOCH") {
                Ok(epoch) => epoch,
                Err(_) => output(Command::new("git").current_dir(&top).args([
                    "log",
                    "-1",
                    "--format=%ct",
                ]))
                .context("SOURCE_DATE_EPOCH is not set and git cannot tell the commit's time")?,
            };
        let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
        let out = top.join("target/dist");
        Ok(Self {
            top,
            out,
            version: env!("CARGO_PKG_VERSION"),
            target,
            epoch,
        })
    }

    /// The same content, to be packed a second time beside the first.
    fn again(&self) -> anyhow::Result<Self> {
        let out = self.top.join("target/dist-scratch");
        if out.exists() {
            fs::remove_dir_all(&out)?;
        }
        fs::create_dir_all(&out)?;
        let (from, to) = (self.out.join("root"), out.join("root"));
        exec::run(Command::new("cp").arg("-r").arg(&from).arg(&to))?;
        Ok(Self {
            top: self.top.clone(),
            out,
            version: self.version,
            target: self.target.clone(),
            epoch: self.epoch.clone(),
        })
    }

    fn cargo(&self, directory: &str) -> Command {
        let home = std::env::var_os("CARGO_HOME").map_or_else(
            || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cargo"),
            PathBuf::from,
        );
        let flags = [
            "-Ctarget-feature=+crt-static".to_owned(),
            format!("--remap-path-prefix={}=/connmon", self.top.display()),
            format!("--remap-path-prefix={}=/cargo", home.display()),
        ];
        let mut command = exec::cargo();
        command
            .current_dir(&self.top)
            .env("SOURCE_DATE_EPOCH", &self.epoch)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
            .env("CARGO_TARGET_DIR", self.top.join("target").join(directory));
        command
    }

    /// Builds here and in a clone elsewhere, nothing taken over from earlier.
    fn verify(&self) -> anyhow::Result<()> {
        let changed = output(Command::new("git").current_dir(&self.top).args([
            "status",
            "--porcelain",
            "--untracked-files=no",
        ]))?;
        ensure!(
            changed.is_empty(),
            "--verify builds a commit, and these files differ from it:\n{changed}"
        );
        let elsewhere = self.top.join("target/dist-elsewhere");
        for directory in [&self.top.join("target/dist-build"), &elsewhere] {
            if directory.exists() {
                fs::remove_dir_all(directory)
                    .with_context(|| format!("cannot clear {}", directory.display()))?;
            }
        }
        exec::run(
            Command::new("git")
                .args(["clone", "--quiet", "--no-hardlinks"])
                .args([&self.top, &elsewhere]),
        )?;
        let clone = Self {
            top: elsewhere.clone(),
            out: elsewhere.join("target/dist"),
            version: self.version,
            target: self.target.clone(),
            epoch: self.epoch.clone(),
        };
        checks::same(&self.build("dist-build")?, &clone.build("dist-build")?)?;
        fs::remove_dir_all(&elsewhere).context("cannot remove the clone")
    }

    fn binary(&self, directory: &str) -> PathBuf {
        self.top
            .join("target")
            .join(directory)
            .join(&self.target)
            .join(PROFILE)
            .join("connmon")
    }

    /// The static binary. `--target`, so that build scripts and macros stay
    /// dynamic.
    fn build(&self, directory: &str) -> anyhow::Result<PathBuf> {
        exec::run(self.cargo(directory).args([
            "rustc",
            "--profile",
            PROFILE,
            "--locked",
            "--package=connmon",
            "--bin=connmon",
            "--target",
            &self.target,
            "--",
            PACK_RELOCATIONS,
            FOLD_CODE,
        ]))?;
        Ok(self.binary(directory))
    }

    /// Man pages and completions, from the command line's definition.
    fn manual(&self) -> anyhow::Result<()> {
        let share = self.out.join("share");
        // An ordinary build: this one only runs here.
        let mut cargo = self.cargo("");
        cargo.env_remove("CARGO_ENCODED_RUSTFLAGS");
        exec::run(
            cargo
                .args(["run", "--quiet", "--locked", "--package=connmon"])
                .args(["--example=manual", "--"])
                .arg(&share),
        )
    }

    /// The whole content of tarball and container image.
    fn root(&self, binary: &Path) -> anyhow::Result<()> {
        let root = self.out.join("root");
        let place = |from: &Path, to: &str| -> anyhow::Result<()> {
            let to = root.join(to);
            let parent = to.parent().context("a file has a directory")?;
            fs::create_dir_all(parent)?;
            fs::copy(from, &to)
                .with_context(|| format!("cannot copy {} to {}", from.display(), to.display()))?;
            Ok(())
        };
        place(binary, "usr/bin/connmon")?;
        for name in ["LICENSE-MIT", "LICENSE-APACHE", "NOTICE", "README.md"] {
            place(
                &self.top.join(name),
                &format!("usr/share/doc/connmon/{name}"),
            )?;
        }
        place(
            &self.out.join(THIRD_PARTY),
            &format!("usr/share/doc/connmon/{THIRD_PARTY}"),
        )?;
        let pages = fs::read_dir(self.out.join("share/man"))?;
        for page in pages {
            let page = page?;
            let name = page.file_name();
            let name = name.to_str().context("a man page's name is ASCII")?;
            place(&page.path(), &format!("usr/share/man/man1/{name}"))?;
        }
        Ok(())
    }

    fn tarball(&self) -> anyhow::Result<PathBuf> {
        let name = format!("connmon-{}-{}", self.version, self.target);
        let tar = self.out.join(format!("{name}.tar"));
        exec::run(
            Command::new("tar")
                .args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
                .args(["--format=ustar", "--mode=u+rwX,go+rX,go-w"])
                .arg(format!("--mtime=@{}", self.epoch))
                .arg(format!("--transform=s,^[.],{name},"))
                .arg("-C")
                .arg(self.out.join("root"))
                .arg("-cf")
                .arg(&tar)
                .arg("."),
        )?;
        exec::run(
            Command::new("gzip")
                .args(["--no-name", "--best", "--force"])
                .arg(&tar),
        )?;
        Ok(tar.with_extension("tar.gz"))
    }

    fn package(&self) -> anyhow::Result<PathBuf> {
        install::cargo_tool(CARGO_DEB)?;
        let path = self
            .out
            .join(format!("connmon_{}_{}.deb", self.version, debian_arch()?));
        exec::run(
            self.cargo("dist-build")
                .args(["deb", "--package=connmon", "--no-build", "--no-strip"])
                .args(["--profile", PROFILE])
                .args(["--deb-revision=", "--target", &self.target, "--output"])
                .arg(&path),
        )?;
        Ok(path)
    }

    fn sbom(&self) -> anyhow::Result<PathBuf> {
        let path = self.out.join(format!("connmon-{}.cdx.json", self.version));
        let crates = parts::crates(&self.top, &self.target)?;
        let text = parts::sbom(&self.top, &self.target, &self.epoch, &crates)?;
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }

    fn checksums(&self, files: &[PathBuf]) -> anyhow::Result<()> {
        let names = files.iter().filter_map(|file| file.file_name());
        let sums = output(Command::new("sha256sum").current_dir(&self.out).args(names))?;
        fs::write(self.out.join("SHA256SUMS"), sums + "\n").context("cannot write SHA256SUMS")
    }
}

/// Static, and no bigger than promised.
fn check_binary(binary: &Path) -> anyhow::Result<()> {
    let bytes = fs::read(binary).with_context(|| format!("cannot read {}", binary.display()))?;
    let quick = std::env::var_os("CARGO_PROFILE_RELEASE_OPT_LEVEL").is_some();
    let most = if quick {
        MOST_QUICK_BYTES
    } else {
        MOST_BINARY_BYTES
    };
    ensure!(
        bytes.len() as u64 <= most,
        "{} has {} bytes, more than {most}",
        binary.display(),
        bytes.len()
    );
    ensure!(
        !needs_interpreter(&bytes)?,
        "{} is not static: it names a program interpreter",
        binary.display()
    );
    println!("binary: {} bytes", bytes.len());
    Ok(())
}

/// Whether an ELF file has a PT_INTERP header (elf(5)), for a 64-bit
/// little-endian machine.
fn needs_interpreter(elf: &[u8]) -> anyhow::Result<bool> {
    const PT_INTERP: u64 = 3;
    let field = |at: usize, size: usize| -> anyhow::Result<u64> {
        let bytes = elf
            .get(at..at + size)
            .context("the ELF file is cut short")?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | u64::from(byte)))
    };
    ensure!(
        elf.starts_with(b"\x7fELF\x02\x01"),
        "no 64-bit little-endian ELF file"
    );
    let (table, size, count) = (field(32, 8)?, field(54, 2)?, field(56, 2)?);
    for index in 0..count {
        if field((table + index * size) as usize, 4)? == PT_INTERP {
            return Ok(true);
        }
    }
    Ok(false)
}

fn debian_arch() -> anyhow::Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        other => bail!("no Debian name for the architecture {other}"),
    }
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {}", exec::shown(command)))?;
    ensure!(
        output.status.success(),
        "{} failed: {}",
        exec::shown(command),
        output.status
    );
    Ok(String::from_utf8(output.stdout)?.trim().to_owned())
}

//! `cargo xtask dist`: everything that is released, in `target/dist`.
//!
//! One static binary, in a tarball that runs in an empty root and in a Debian
//! package, with man pages, completions, SBOM and checksums. Nothing in it
//! depends on the clock, the builder's paths or the order of a directory:
//! the same commit gives the same bytes (`--verify` builds once more, from a
//! clone in another place, and compares).

mod checks;
mod sbom;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail, ensure};

use crate::exec::{self, output};
use crate::install;

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

/// Relative relocations as bitmaps, a thirtieth of the size; glibc's static
/// start-up reads them from 2.36 on.
const PACK_RELOCATIONS: &str = "-Clink-arg=-Wl,-z,pack-relative-relocs";
/// Functions that are the same machine code and whose address nobody
/// compares are kept once (lld, rustc's own linker).
const FOLD_CODE: &str = "-Clink-arg=-Wl,--icf=safe";

const PROFILE: &str = "release";

const CARGO_DEB: (&str, &str) = ("cargo-deb", "3.8.0");

/// Third-party licences, as packed.
const THIRD_PARTY: &str = "THIRD-PARTY";

/// Makes everything and checks it.
///
/// # Errors
/// When a tool fails, or what it made does not pass a check.
pub fn run(args: &Args) -> Result<ExitCode> {
    release(args)?;
    Ok(ExitCode::SUCCESS)
}

/// Why a release cannot be made and checked here.
pub fn missing() -> Option<&'static str> {
    if !exec::is_root() {
        return Some("installing the package in a root of its own needs root");
    }
    let debian = exec::find("dpkg-deb").is_some() && exec::find("dpkg").is_some();
    (!debian).then_some("no dpkg: this is not Debian")
}

/// A release that passed its checks.
pub struct Release {
    /// The agent.
    pub binary: PathBuf,
    /// How many checks.
    pub checked: usize,
}

/// As [`run`].
///
/// # Errors
/// As [`run`].
pub fn release(args: &Args) -> Result<Release> {
    if let Some(reason) = missing() {
        bail!("dist: {reason}");
    }
    let dist = Dist::new()?;
    let mut checked = 0;
    let mut check = |what: &str, result: Result<()>| -> Result<()> {
        result.with_context(|| format!("dist: {what}"))?;
        println!("dist: {what}: ok");
        checked += 1;
        Ok(())
    };
    if args.verify {
        check(
            "two builds from scratch, in two places, are the same bytes",
            dist.verify(),
        )?;
    }
    let binary = match args.no_build {
        true => dist.binary(),
        false => dist.build()?,
    };
    check("the binary is small", check_size(&binary))?;
    fresh(&dist.out)?;
    dist.manual()?;
    let sbom = dist.sbom()?;
    fs::write(
        dist.out.join(THIRD_PARTY),
        sbom::third_party(&dist, &fs::read_to_string(&sbom)?)?,
    )?;
    dist.root(&binary)?;
    let (tarball, package) = (dist.tarball()?, dist.package()?);
    let copy = dist.copy()?;
    check(
        "tarball, package and SBOM, made twice, are the same bytes",
        checks::same(&tarball, &copy.tarball()?)
            .and_then(|()| checks::same(&package, &copy.package()?))
            .and_then(|()| checks::same(&sbom, &copy.sbom()?)),
    )?;
    check(
        "the tarball's binary serves a scrape in an empty root",
        checks::runs_in_an_empty_root(&tarball, &copy.out),
    )?;
    check(
        "the package installs what it should, and runs",
        checks::installs(&package, &copy.out),
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
    let names = files.iter().filter_map(|file| file.file_name());
    let sums = output(Command::new("sha256sum").current_dir(&dist.out).args(names))?;
    fs::write(dist.out.join("SHA256SUMS"), sums + "\n").context("cannot write SHA256SUMS")?;
    for file in files {
        println!("{:>10}  {}", fs::metadata(&file)?.len(), file.display());
    }
    Ok(Release { binary, checked })
}

struct Dist {
    /// The checkout.
    top: PathBuf,
    /// Where the files of the release go.
    out: PathBuf,
    target: String,
    /// Unix time of the commit, as text: the only time that enters a file.
    epoch: String,
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

impl Dist {
    fn new() -> Result<Self> {
        let top = exec::root();
        let epoch = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(epoch) => epoch,
            Err(_) => output(git(&top).args(["log", "-1", "--format=%ct"]))
                .context("cannot learn the commit's time: set SOURCE_DATE_EPOCH")?,
        };
        Ok(Self {
            out: top.join("target/dist"),
            top,
            target: format!("{}-unknown-linux-gnu", std::env::consts::ARCH),
            epoch,
        })
    }

    /// The same checkout, or a copy of it, with files in another place.
    fn at(&self, top: &Path, out: PathBuf) -> Self {
        Self {
            top: top.to_owned(),
            out,
            target: self.target.clone(),
            epoch: self.epoch.clone(),
        }
    }

    /// The same content, to be packed a second time beside the first.
    fn copy(&self) -> Result<Self> {
        let copy = self.at(&self.top, self.top.join("target/dist-scratch"));
        fresh(&copy.out)?;
        exec::run(
            Command::new("cp")
                .arg("-r")
                .arg(self.out.join("root"))
                .arg(&copy.out),
        )?;
        Ok(copy)
    }

    fn cargo(&self) -> Command {
        let flags = [
            "-Ctarget-feature=+crt-static".to_owned(),
            format!("--remap-path-prefix={}=/connmon", self.top.display()),
            format!(
                "--remap-path-prefix={}=/cargo",
                exec::cargo_home().display()
            ),
        ];
        let mut command = exec::cargo();
        command
            .current_dir(&self.top)
            .env("SOURCE_DATE_EPOCH", &self.epoch)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"))
            .env("CARGO_TARGET_DIR", self.top.join("target/dist-build"));
        command
    }

    /// Builds here and in a clone elsewhere, both from scratch.
    fn verify(&self) -> Result<()> {
        let changed =
            output(git(&self.top).args(["status", "--porcelain", "--untracked-files=no"]))?;
        ensure!(
            changed.is_empty(),
            "--verify builds a commit, and these files differ from it:\n{changed}"
        );
        let elsewhere = self.top.join("target/dist-elsewhere");
        fresh(&self.top.join("target/dist-build"))?;
        fresh(&elsewhere)?;
        exec::run(
            git(&self.top)
                .args(["clone", "--quiet", "--no-hardlinks", "."])
                .arg(&elsewhere),
        )?;
        let clone = self.at(&elsewhere, elsewhere.join("target/dist"));
        checks::same(&self.build()?, &clone.build()?)?;
        fs::remove_dir_all(&elsewhere).context("cannot remove the clone")
    }

    fn binary(&self) -> PathBuf {
        let directory = self.top.join("target/dist-build").join(&self.target);
        directory.join(PROFILE).join("connmon")
    }

    /// The static binary. `--target`, so that build scripts and macros stay
    /// dynamic.
    fn build(&self) -> Result<PathBuf> {
        exec::run(
            self.cargo()
                .args(["rustc", "--quiet", "--profile", PROFILE, "--locked"])
                .args([
                    "--package=connmon",
                    "--bin=connmon",
                    "--target",
                    &self.target,
                ])
                .args(["--", PACK_RELOCATIONS, FOLD_CODE]),
        )?;
        Ok(self.binary())
    }

    /// Man pages and completions, from the command line's definition. An
    /// ordinary build: this one only runs here.
    fn manual(&self) -> Result<()> {
        exec::run(
            exec::cargo()
                .current_dir(&self.top)
                .env("SOURCE_DATE_EPOCH", &self.epoch)
                .args([
                    "run",
                    "--quiet",
                    "--locked",
                    "--package=connmon",
                    "--example=manual",
                    "--",
                ])
                .arg(self.out.join("share")),
        )
    }

    /// The whole content of tarball and container image.
    fn root(&self, binary: &Path) -> Result<()> {
        let root = self.out.join("root/usr");
        let mut files = vec![
            (binary.to_owned(), "bin"),
            (self.out.join(THIRD_PARTY), "share/doc/connmon"),
        ];
        for name in ["LICENSE-MIT", "LICENSE-APACHE", "NOTICE", "README.md"] {
            files.push((self.top.join(name), "share/doc/connmon"));
        }
        for page in fs::read_dir(self.out.join("share/man"))? {
            files.push((page?.path(), "share/man/man1"));
        }
        for (file, place) in files {
            let to = root.join(place);
            fs::create_dir_all(&to)?;
            fs::copy(&file, to.join(file.file_name().unwrap_or_default()))
                .with_context(|| format!("cannot copy {} to {}", file.display(), to.display()))?;
        }
        Ok(())
    }

    fn tarball(&self) -> Result<PathBuf> {
        let name = format!("connmon-{VERSION}-{}", self.target);
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
                .args([&tar, Path::new(".")]),
        )?;
        exec::run(
            Command::new("gzip")
                .args(["--no-name", "--best", "--force"])
                .arg(&tar),
        )?;
        Ok(tar.with_extension("tar.gz"))
    }

    fn package(&self) -> Result<PathBuf> {
        install::cargo_tool(CARGO_DEB)?;
        let architecture = output(Command::new("dpkg").arg("--print-architecture"))?;
        let path = self
            .out
            .join(format!("connmon_{VERSION}_{architecture}.deb"));
        exec::run(
            self.cargo()
                .args([
                    "deb",
                    "--quiet",
                    "--package=connmon",
                    "--no-build",
                    "--no-strip",
                ])
                .args(["--profile", PROFILE])
                .args(["--deb-revision=", "--target", &self.target, "--output"])
                .arg(&path),
        )?;
        Ok(path)
    }

    fn sbom(&self) -> Result<PathBuf> {
        let path = self.out.join(format!("connmon-{VERSION}.cdx.json"));
        fs::write(&path, sbom::sbom(self)?)
            .with_context(|| format!("cannot write {}", path.display()))?;
        Ok(path)
    }
}

/// That it is static is shown by running it in an empty root.
fn check_size(binary: &Path) -> Result<()> {
    let file = fs::metadata(binary).with_context(|| format!("cannot read {}", binary.display()))?;
    println!("binary: {} bytes", file.len());
    ensure!(
        file.len() <= MOST_BINARY_BYTES,
        "{} has {} bytes, more than {MOST_BINARY_BYTES}",
        binary.display(),
        file.len()
    );
    Ok(())
}

/// Makes an empty directory, whatever was there.
fn fresh(directory: &Path) -> Result<()> {
    let shown = directory.display();
    if directory.exists() {
        fs::remove_dir_all(directory).with_context(|| format!("cannot clear {shown}"))?;
    }
    fs::create_dir_all(directory).with_context(|| format!("cannot make {shown}"))
}

fn git(directory: &Path) -> Command {
    let mut command = Command::new("git");
    command.current_dir(directory);
    command
}

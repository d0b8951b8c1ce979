//! Installs what the tasks need: Debian packages, packages of other suites
//! and architectures under `target/`, and tools from crates.io.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

use crate::exec;

/// (program, with arguments if it must also succeed; its Debian package; what
/// needs it).
type Tool = (&'static str, &'static str, &'static str);

const TESTS: &[Tool] = &[
    ("ss", "iproute2", "comparing with the kernel's own count"),
    ("ip", "iproute2", "network namespaces"),
    ("setpriv", "util-linux", "tests without privileges"),
    ("kill", "procps", "signals"),
    ("promtool", "prometheus", "linting scrapes and rules"),
    ("chromium", "chromium", "the page in a browser"),
    ("chromedriver", "chromium-driver", "the page in a browser"),
    ("qemu-system-x86_64", "qemu-system-x86", "kernels in guests"),
    ("busybox", "busybox-static", "kernels in guests"),
    ("cpio", "cpio", "kernels in guests"),
    ("xz", "xz-utils", "kernel modules"),
    ("nft", "nftables", "a filter that drops our own packets"),
    ("strip", "binutils", "kernels in guests"),
    ("systemd-analyze", "systemd", "the unit's exposure"),
    ("dpkg-deb", "dpkg", "packages"),
    ("curl", "curl", "packages and pages"),
    ("tmux", "tmux", "terminal programs"),
    ("modprobe", "kmod", "kernel modules"),
    ("perl", "perl", "a process with a hostile name"),
    ("node", "nodejs", "types of the Prometheus operator"),
    ("npm", "npm", "types of the Prometheus operator"),
    (
        "python3 -m ensurepip --version",
        "python3-venv",
        "schemas of Kubernetes, and kubectl",
    ),
];

/// What `bench` measures connmon beside, and measures with.
const CONTENDERS: &[Tool] = &[
    ("bpftool", "bpftool", "reading program statistics"),
    ("taskset", "util-linux", "pinning"),
    ("tcplife", "libbpf-tools", "a contender"),
    ("bpftrace", "bpftrace", "a contender"),
    (
        "prometheus-node-exporter",
        "prometheus-node-exporter",
        "a contender",
    ),
];

/// Installs what the tests need, see [`install`].
///
/// # Errors
/// When apt fails.
pub fn tools() -> Result<()> {
    install(TESTS)
}

/// Installs what the benchmarks need, see [`install`].
///
/// # Errors
/// When apt fails.
pub fn contenders() -> Result<()> {
    install(CONTENDERS)
}

/// Installs what is missing when root on Debian, and otherwise prints what is
/// missing and how to install it.
fn install(tools: &[Tool]) -> Result<()> {
    let is_there = |program: &str| {
        let words: Vec<&str> = program.split(' ').collect();
        exec::find(words[0]).is_some()
            && (words.len() == 1
                || Command::new(words[0])
                    .args(&words[1..])
                    .output()
                    .is_ok_and(|output| output.status.success()))
    };
    let missing: Vec<_> = (tools.iter())
        .filter(|(program, _, _)| !is_there(program))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    if !can_install() {
        for (program, package, purpose) in missing {
            println!("missing: {program} for {purpose}; on Debian: apt-get install {package}");
        }
        return Ok(());
    }
    let mut names: Vec<&str> = missing.iter().map(|(_, package, _)| *package).collect();
    names.dedup();
    packages(&names)
}

/// Whether Debian packages can be installed.
pub fn can_install() -> bool {
    exec::is_root() && exec::find("apt-get").is_some()
}

/// Installs Debian packages, after an update of the package lists.
///
/// # Errors
/// When apt fails.
pub fn packages(packages: &[&str]) -> Result<()> {
    println!("installing from Debian: {}", packages.join(" "));
    let apt = || {
        let mut command = Command::new("apt-get");
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["-qq", "-o=Dpkg::Use-Pty=0"]);
        command
    };
    // A failed update of one of several sources need not matter.
    if let Err(error) = exec::run(apt().arg("update")) {
        println!("{error:#}; the package lists stay as they are");
    }
    exec::run(
        apt()
            .args(["install", "-y", "--no-install-recommends"])
            .args(packages)
            .stdout(Stdio::null()),
    )
}

/// apt with lists, state and cache in a directory of their own, so that the
/// host's apt stays as it is.
pub struct PrivateApt<'a> {
    /// The directory.
    pub dir: &'a Path,
    /// Architecture of the packages, as Debian names it.
    pub architecture: &'static str,
    /// Sources in the one-line format; the host's own without.
    pub sources: Option<String>,
}

impl PrivateApt<'_> {
    /// A command of apt's.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.current_dir(self.dir).stdin(Stdio::null());
        let mut set = |key: &str, value: &str| {
            command.arg(format!("-o{key}={value}"));
        };
        let path = |part: &str| self.dir.join(part).display().to_string();
        if self.sources.is_some() {
            set("Dir::Etc::sourcelist", &path("sources.list"));
            set("Dir::Etc::sourceparts", "-");
        }
        set("Dir::State::Lists", &path("lists"));
        set("Dir::State::status", &path("status"));
        set("Dir::Cache", &path("cache"));
        set("APT::Architecture", self.architecture);
        set("APT::Architectures", self.architecture);
        set("APT::Sandbox::User", "root");
        set("Acquire::Check-Valid-Until", "false");
        set("Acquire::Languages", "none");
        command
    }

    /// Downloads the packages that `names` returns once the lists are there,
    /// and unpacks them into `root`.
    ///
    /// # Errors
    /// When apt fails; one source that fails must not take the others with
    /// it, so its error is returned only if a package is not found.
    pub fn unpack(&self, root: &Path, names: impl Fn() -> Result<Vec<String>>) -> Result<()> {
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(self.dir.join(part))?;
        }
        fs::create_dir_all(root)?;
        fs::write(self.dir.join("status"), "")?;
        if let Some(sources) = &self.sources {
            fs::write(self.dir.join("sources.list"), sources)?;
        }
        let updated = exec::run(self.command("apt-get").args(["-qq", "update"]));
        let downloaded = names().and_then(|names| {
            println!("fetching {}", names.join(" "));
            exec::run(
                self.command("apt-get")
                    .args(["-qq", "download"])
                    .args(names),
            )
        });
        if let Err(error) = downloaded {
            updated?;
            return Err(error);
        }
        for entry in fs::read_dir(self.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "deb") {
                exec::run(Command::new("dpkg-deb").arg("-x").args([&path, root]))?;
                fs::remove_file(&path)?;
            }
        }
        fs::remove_dir_all(self.dir.join("lists")).context("cannot remove the package lists")
    }
}

/// Whether what cannot be done is a failure.
pub fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|ci| ci == "true")
}

/// Whether that version of a cargo subcommand is installed.
pub fn has_cargo_tool((name, version): (&str, &str)) -> bool {
    let subcommand = name.trim_start_matches("cargo-");
    let output = exec::cargo().args([subcommand, "--version"]).output();
    // cargo-deb prints the number alone, the others their name before it.
    output.is_ok_and(|output| {
        String::from_utf8_lossy(&output.stdout)
            .split_whitespace()
            .any(|word| word == version)
    })
}

/// Installs a cargo subcommand from crates.io unless that version is there;
/// its own lock file pins its dependencies.
///
/// # Errors
/// When it cannot be fetched or built.
pub fn cargo_tool((name, version): (&str, &str)) -> Result<()> {
    if has_cargo_tool((name, version)) {
        return Ok(());
    }
    println!("installing {name} {version} with cargo");
    // These run for seconds: optimizing them takes minutes more than it saves.
    exec::run(
        exec::cargo()
            .args(["install", "--quiet", "--locked", "--version", version, name])
            // Dependencies that two tools share are built once.
            .env("CARGO_TARGET_DIR", exec::target_dir().join("tools"))
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"),
    )
}

/// Mounts tracefs, which the tracepoint rung needs.
pub fn mount_tracefs() {
    let mounted = Path::new("/sys/kernel/tracing/events").exists();
    if mounted || !exec::is_root() {
        return;
    }
    match exec::run(Command::new("mount").args(["-t", "tracefs", "tracefs", "/sys/kernel/tracing"]))
    {
        Ok(()) => println!("mounted tracefs on /sys/kernel/tracing"),
        Err(error) => println!("{error:#}; the tracepoint rung cannot be tested"),
    }
}

//! What the tests need from Debian, installed when that is possible.

use std::process::Command;

use anyhow::Result;

use crate::exec;

/// (program that must be there, Debian package that brings it, for what). With
/// arguments, it must also succeed.
const TOOLS: &[(&str, &str, &str)] = &[
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

/// What `bench` measures connmon beside.
const CONTENDERS: &[(&str, &str, &str)] = &[
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

/// What the tests need.
///
/// # Errors
/// When apt fails.
pub fn tools() -> Result<()> {
    install(TOOLS)
}

/// What the benchmarks need.
///
/// # Errors
/// When apt fails.
pub fn contenders() -> Result<()> {
    install(CONTENDERS)
}

/// Installs what is missing, when root on Debian; prints what it did and
/// what stays missing.
///
/// # Errors
/// When apt fails.
fn install(tools: &[(&str, &str, &str)]) -> Result<()> {
    let missing: Vec<_> = tools
        .iter()
        .filter(|(program, _, _)| !is_there(program))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let mut packages: Vec<&str> = missing.iter().map(|(_, package, _)| *package).collect();
    packages.dedup();
    if !exec::is_root() || !exec::has("apt-get") {
        for (program, package, purpose) in missing {
            println!("missing: {program} for {purpose}; on Debian: apt-get install {package}");
        }
        return Ok(());
    }
    self::packages(&packages)
}

fn is_there(program: &str) -> bool {
    let mut words = program.split(' ');
    let name = words.next().unwrap_or_default();
    let arguments: Vec<&str> = words.collect();
    exec::has(name)
        && (arguments.is_empty()
            || Command::new(name)
                .args(arguments)
                .output()
                .is_ok_and(|output| output.status.success()))
}

/// Installs Debian packages, the lists of packages renewed first.
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
    // An old list names packages that are gone; a failed update of one of
    // several sources need not matter.
    if let Err(error) = exec::run(apt().arg("update")) {
        println!("{error:#}; going on with the lists there are");
    }
    exec::run(
        apt()
            .args(["install", "-y", "--no-install-recommends"])
            .args(packages)
            .stdout(std::process::Stdio::null()),
    )
}

/// Whether what cannot be done is a failure.
pub fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|ci| ci == "true")
}

/// Whether that version of a cargo subcommand is there.
pub fn has_cargo_tool((name, version): (&str, &str)) -> bool {
    let subcommand = name.trim_start_matches("cargo-");
    let there = exec::cargo().args([subcommand, "--version"]).output();
    there.is_ok_and(|there| {
        let said = String::from_utf8_lossy(&there.stdout);
        // cargo-deb says the number alone, cargo-deny its name before it.
        said.split_whitespace().any(|word| word == version)
    })
}

/// Installs a cargo subcommand from crates.io unless that version is there;
/// its own lock file holds its dependencies.
///
/// # Errors
/// When it cannot be fetched or built.
pub fn cargo_tool((name, version): (&str, &str)) -> Result<()> {
    if has_cargo_tool((name, version)) {
        return Ok(());
    }
    println!("installing {name} {version} with cargo");
    // Run for seconds: what its release profile optimizes takes minutes more
    // to build than it saves.
    exec::run(
        exec::cargo()
            .args(["install", "--locked", "--version", version, name])
            .env("CARGO_PROFILE_RELEASE_LTO", "off")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16")
            .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0"),
    )
}

/// Makes tracefs visible, which the tracepoint rung needs.
pub fn mount_tracefs() {
    let mounted = std::path::Path::new("/sys/kernel/tracing/events").exists();
    if mounted || !exec::is_root() {
        return;
    }
    match exec::run(Command::new("mount").args(["-t", "tracefs", "tracefs", "/sys/kernel/tracing"]))
    {
        Ok(()) => println!("mounted tracefs on /sys/kernel/tracing"),
        Err(error) => println!("{error:#}; the tracepoint rung cannot be tested"),
    }
}

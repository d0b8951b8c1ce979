//! What a release promises, checked on the release itself.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use super::fresh;
use crate::build_ebpf::sha256;
use crate::exec::{self, output};

/// What the package puts where.
const INSTALLED: [&str; 13] = [
    "usr/bin/connmon",
    "usr/lib/systemd/system/connmon.service",
    "etc/default/connmon",
    "usr/share/man/man1/connmon.1.gz",
    "usr/share/man/man1/connmon-check.1.gz",
    "usr/share/bash-completion/completions/connmon",
    "usr/share/fish/vendor_completions.d/connmon.fish",
    "usr/share/zsh/vendor-completions/_connmon",
    "usr/share/doc/connmon/LICENSE-MIT",
    "usr/share/doc/connmon/NOTICE",
    "usr/share/doc/connmon/THIRD-PARTY",
    "usr/share/doc/connmon/README.md",
    "usr/share/doc/connmon/copyright",
];

/// The tarball's binary serves where there is nothing but /proc.
pub fn runs_in_an_empty_root(tarball: &Path, scratch: &Path) -> anyhow::Result<()> {
    let root = scratch.join("empty-root");
    fresh(&root)?;
    exec::run(
        Command::new("tar")
            .args(["--strip-components=1", "-xzf"])
            .arg(tarball)
            .arg("-C")
            .arg(&root),
    )?;
    for name in ["NOTICE", "LICENSE-MIT", "LICENSE-APACHE", "THIRD-PARTY"] {
        let path = root.join("usr/share/doc/connmon").join(name);
        ensure!(path.is_file(), "the tarball has no {name}");
    }
    let notice = fs::read_to_string(root.join("usr/share/doc/connmon/NOTICE"))?;
    for part in ["DB-IP", "Natural Earth", "GNU C Library", "libgcc"] {
        ensure!(notice.contains(part), "NOTICE does not name {part}");
    }
    runs_in(&root, "the tarball's binary")?;
    serves_in(&root)
}

/// The package installs in a scratch root, holds what it should, and its
/// binary runs there.
pub fn installs(package: &Path, scratch: &Path) -> anyhow::Result<()> {
    let root = scratch.join("installed");
    fresh(&root)?;
    // A root that dpkg has never seen. Unpacked, not configured: the scripts
    // that enable the unit are for a running system.
    let state = root.join("var/lib/dpkg");
    fs::create_dir_all(state.join("info"))?;
    fs::create_dir_all(state.join("updates"))?;
    fs::write(state.join("status"), "")?;
    exec::run(
        Command::new("dpkg")
            .arg(format!("--root={}", root.display()))
            .arg("--unpack")
            .arg(package)
            .stdout(Stdio::null()),
    )?;
    let status = fs::read_to_string(state.join("status"))?;
    ensure!(
        status.contains("Package: connmon\nStatus: install ok unpacked"),
        "dpkg's status is:\n{status}"
    );
    for name in INSTALLED {
        // Debian's merged /usr: either place is the same one.
        let other = name.strip_prefix("usr/").unwrap_or(name);
        // A configuration file has its name once the package is configured.
        let unpacked = format!("{name}.dpkg-new");
        let places = [name, other, &unpacked];
        let there = places.iter().any(|name| root.join(name).is_file());
        ensure!(there, "the package installs no {name}");
    }
    let control = output(Command::new("dpkg-deb").arg("--info").arg(package))?;
    let depends = |line: &str| {
        let rest = line.trim().strip_prefix("Depends:");
        rest.is_some_and(|rest| !rest.trim().is_empty())
    };
    ensure!(
        !control.lines().any(depends),
        "a static package depends on something:\n{control}"
    );
    runs_in(&root, "the package's binary")
}

/// Settings of the administrator survive an upgrade, and the unit is enabled
/// and started by the package's own scripts.
pub fn scripts(package: &Path) -> anyhow::Result<()> {
    let control = |file: &str| {
        output(
            Command::new("dpkg-deb")
                .arg("--info")
                .arg(package)
                .arg(file),
        )
        .with_context(|| format!("the package has no {file}"))
    };
    let conffiles = control("conffiles")?;
    ensure!(
        conffiles == "/etc/default/connmon",
        "the package's configuration files are {conffiles:?}"
    );
    for (script, words) in [
        (
            "postinst",
            ["deb-systemd-helper enable", "deb-systemd-invoke"].as_slice(),
        ),
        ("prerm", &["deb-systemd-invoke stop"]),
    ] {
        let text = control(script)?;
        for word in words {
            let there = text
                .lines()
                .any(|line| line.contains(word) || line.contains(&word.replace(' ', " '")));
            ensure!(
                there && text.contains("connmon.service"),
                "{script} has no {word:?} for connmon.service:\n{text}"
            );
        }
    }
    Ok(())
}

/// Names the agent's crates and everything else that is in the binary, each
/// with a licence, and nothing of the machine that made it.
pub fn sbom_is_complete(sbom: &Path, top: &Path) -> anyhow::Result<()> {
    let text = fs::read_to_string(sbom)?;
    for path in ["path+file", "file://", &top.display().to_string()] {
        ensure!(!text.contains(path), "{} names {path}", sbom.display());
    }
    let document: Value =
        serde_json::from_str(&text).with_context(|| format!("{} is no JSON", sbom.display()))?;
    let components = document["components"]
        .as_array()
        .context("the SBOM has no components")?;
    let object = format!("connmon-{}.o", std::env::consts::ARCH);
    let embedded = [
        ("dbip-country-lite", "connmon/data/dbip-country-lite.mmdb"),
        ("natural-earth", "connmon/data/worldmap.svg"),
        (&object, &format!("connmon/bpf/{object}")),
    ];
    let named = |name: &str| {
        let found = components
            .iter()
            .find(|component| component["name"] == *name);
        found.with_context(|| format!("{name} is not in {}", sbom.display()))
    };
    for name in ["aya", "aya-ebpf", "hyper", "maxminddb", "tokio", "glibc"] {
        named(name)?;
    }
    for (name, file) in embedded {
        let hash = sha256(fs::read(top.join(file))?);
        ensure!(
            named(name)?["hashes"][0]["content"] == *hash,
            "the SBOM's hash of {name} is not that of {file}"
        );
    }
    ensure!(
        named("dbip-country-lite")?["licenses"][0]["expression"] == "CC-BY-4.0",
        "the SBOM does not have CC-BY-4.0 as the licence of DB-IP's data"
    );
    for component in components {
        let licence = &component["licenses"][0];
        let names = [&licence["expression"], &licence["license"]["name"]];
        ensure!(
            names
                .iter()
                .any(|name| name.as_str().is_some_and(|name| !name.is_empty())),
            "{} has no licence",
            component["name"]
        );
    }
    println!("SBOM: {} components", components.len());
    Ok(())
}

/// Two runs of a step make the same bytes.
pub fn same(first: &Path, second: &Path) -> anyhow::Result<()> {
    ensure!(
        fs::read(first)? == fs::read(second)?,
        "{} and {} differ: not reproducible",
        first.display(),
        second.display()
    );
    Ok(())
}

fn runs_in(root: &Path, what: &str) -> anyhow::Result<()> {
    let version = output(
        Command::new("chroot")
            .arg(root)
            .args(["/usr/bin/connmon", "--version"]),
    )
    .with_context(|| format!("{what} does not run in an empty root"))?;
    ensure!(
        version.contains("connmon, version"),
        "{what} prints {version:?}"
    );
    Ok(())
}

/// The agent of a root without libraries, configuration or database, with
/// the machine's /proc: one scrape, and a clean end.
fn serves_in(root: &Path) -> anyhow::Result<()> {
    fs::create_dir_all(root.join("proc"))?;
    // Each program replaces the one before, so that the child is the agent.
    let script = "mount --rbind /proc \"$0/proc\" && exec chroot \"$0\" /usr/bin/connmon run \
                  --source proc --web.listen-address 127.0.0.1:0";
    let mut child = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(root)
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start unshare")?;
    // Open until the end: a log that cannot be written is an error.
    let mut log = BufReader::new(child.stderr.take().context("piped")?).lines();
    let scraped = scrape(&mut log);
    // The agent ends whether the scrape failed or not.
    exec::run(Command::new("kill").args(["-TERM", &child.id().to_string()]))?;
    let status = child.wait()?;
    let body = scraped?;
    ensure!(
        body.contains("connmon_up 1") && body.contains("connmon_source_info{source=\"proc\"} 1"),
        "the agent in an empty root answers:\n{body}"
    );
    ensure!(
        status.success(),
        "the agent in an empty root ends with {status} after SIGTERM"
    );
    Ok(())
}

/// Waits for the line that names the address, then for a scrape.
fn scrape(lines: &mut impl Iterator<Item = std::io::Result<String>>) -> anyhow::Result<String> {
    let mut before = String::new();
    let address = loop {
        let line = lines
            .next()
            .with_context(|| format!("the agent in an empty root ended:\n{before}"))??;
        if let Some((_, rest)) = line.split_once("http://") {
            break rest.split('/').next().unwrap_or_default().parse()?;
        }
        before += &line;
        before.push('\n');
    };
    // What it goes on printing is not read, and far less than a pipe holds.
    let until = Instant::now() + Duration::from_secs(20);
    loop {
        match exec::get(address, "/metrics") {
            Err(_) if Instant::now() < until => sleep(Duration::from_millis(100)),
            answer => return answer,
        }
    }
}

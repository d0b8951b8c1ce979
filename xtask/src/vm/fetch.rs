//! Debian's kernels, from the archives of the host's own apt sources with
//! only the suite changed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::exec;
use crate::install::PrivateApt;

/// A kernel that is booted.
#[derive(Debug)]
pub struct Kernel {
    /// As `--kernel` names it.
    pub name: &'static str,
    /// Suites that have it, of the main and the security archive.
    suites: &'static [&'static str],
    /// Package names, as regular expressions. The newest match of each is
    /// unpacked.
    packages: &'static [&'static str],
}

/// Every kernel there is a test for.
pub const KERNELS: [Kernel; 4] = [
    Kernel {
        name: "5.10",
        suites: &["bullseye", "bullseye-security"],
        packages: &["^linux-image-5.10.0-[0-9]+-cloud-amd64$"],
    },
    Kernel {
        name: "6.1",
        suites: &["bookworm", "bookworm-security"],
        packages: &["^linux-image-6.1.0-[0-9]+-cloud-amd64$"],
    },
    Kernel {
        name: "6.12",
        suites: &["trixie", "bookworm-security", "trixie-security"],
        packages: &["^linux-image-6.12.[0-9]+[+]deb[0-9.]+-cloud-amd64$"],
    },
    Kernel {
        name: "7.2",
        suites: &["sid"],
        packages: &[
            "^linux-binary-7.2.[0-9]+([+]deb[0-9.]+)?-cloud-amd64$",
            "^linux-modules-7.2.[0-9]+([+]deb[0-9.]+)?-cloud-amd64$",
        ],
    },
];

/// The keys of Debian's archives, where its package puts them.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An unpacked kernel.
#[derive(Debug)]
pub struct Unpacked {
    /// The image that boots.
    pub vmlinuz: PathBuf,
    /// `…/lib/modules/RELEASE`; `None` without modules.
    pub modules: Option<PathBuf>,
}

impl Kernel {
    /// The kernel, from `target/vm` or the archive.
    ///
    /// # Errors
    /// When no source of the host has it, or it cannot be unpacked.
    pub fn fetch(&self, dir: &Path) -> Result<Unpacked> {
        let dir = dir.join(self.name);
        let root = dir.join("root");
        if !dir.join("complete").exists() {
            let _ = fs::remove_dir_all(&root);
            fs::create_dir_all(&dir)?;
            self.download(&dir, &root)
                .with_context(|| format!("cannot fetch kernel {}", self.name))?;
            fs::write(dir.join("complete"), "")?;
        }
        // Before and after Debian merged /lib into /usr/lib.
        let modules = ["lib/modules", "usr/lib/modules"].map(|part| root.join(part));
        let modules = (modules.iter().filter_map(|dir| fs::read_dir(dir).ok()))
            .flatten()
            .find_map(|entry| Some(entry.ok()?.path()))
            .with_context(|| format!("no modules below {}", root.display()))?;
        let release = modules.file_name().unwrap_or_default().to_string_lossy();
        let images = [
            root.join(format!("boot/vmlinuz-{release}")),
            modules.join("vmlinuz"),
        ];
        Ok(Unpacked {
            vmlinuz: (images.into_iter().find(|image| image.exists()))
                .with_context(|| format!("no vmlinuz below {}", root.display()))?,
            modules: Some(modules),
        })
    }

    fn download(&self, dir: &Path, root: &Path) -> Result<()> {
        let apt = PrivateApt {
            dir,
            architecture: "amd64",
            sources: Some(self.sources(&archives()?)),
        };
        apt.unpack(root, || {
            let newest = |pattern: &&str| newest(&apt, pattern);
            self.packages.iter().map(newest).collect()
        })
    }

    /// apt's one-line format: each suite from each archive of its kind.
    fn sources(&self, archives: &str) -> String {
        let mut text = String::new();
        for line in archives.lines() {
            let Some((label @ ("Debian" | "Debian-Security"), uri)) = line.split_once(' ') else {
                continue;
            };
            for suite in self.suites {
                if suite.ends_with("-security") == (label == "Debian-Security") {
                    text += &format!("deb [signed-by={KEYRING}] {uri} {suite} main\n");
                }
            }
        }
        text
    }
}

/// Label and address of each archive that the host's apt knows.
fn archives() -> Result<String> {
    let targets = || {
        exec::output(Command::new("apt-get").args([
            "indextargets",
            "--format=$(LABEL) $(REPO_URI)",
            "Created-By: Packages",
        ]))
    };
    let mut text = targets()?;
    if !text.contains("Debian ") {
        // Labels are known once the lists are there.
        exec::run(Command::new("apt-get").args(["-qq", "update"]))?;
        text = targets()?;
    }
    let mut lines: Vec<&str> = text.lines().collect();
    lines.dedup();
    Ok(lines.join("\n"))
}

/// The newest package whose name matches.
fn newest(apt: &PrivateApt<'_>, pattern: &str) -> Result<String> {
    let found = exec::output(
        apt.command("apt-cache")
            .args(["search", "--names-only", pattern]),
    )?;
    let mut sort = Command::new("sh");
    sort.args([
        "-c",
        "printf '%s\\n' \"$0\" | cut -d ' ' -f 1 | sort -V | tail -n 1",
        &found,
    ]);
    let newest = exec::output(&mut sort)?;
    ensure!(!newest.is_empty(), "no package matches {pattern}");
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_suite_of_the_sources_changes() {
        let archives = "Debian http://a/debian\nDebian-Security http://a/security\ncloud http://b\n$(LABEL) http://c";
        assert_eq!(
            KERNELS[0].sources(archives),
            format!(
                "deb [signed-by={KEYRING}] http://a/debian bullseye main\n\
                 deb [signed-by={KEYRING}] http://a/security bullseye-security main\n"
            )
        );
    }
}

//! Debian's kernels, by the host's own apt sources with only the suite
//! changed. Lists, state and cache are private to `target/vm`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::exec;

/// A kernel that is booted.
#[derive(Debug)]
pub struct Kernel {
    /// As `--kernel` names it.
    pub name: &'static str,
    /// Suites that have it, of the main archive.
    suites: &'static [&'static str],
    /// Suites that have it, of the security archive.
    security: &'static [&'static str],
    /// Package names: `*` is anything. The newest match of each is unpacked.
    packages: &'static [&'static str],
}

/// Every kernel there is a test for.
pub const KERNELS: [Kernel; 4] = [
    Kernel {
        name: "5.10",
        suites: &["bullseye"],
        security: &["bullseye-security"],
        packages: &["linux-image-5.10.0-*-cloud-amd64"],
    },
    Kernel {
        name: "6.1",
        suites: &["bookworm"],
        security: &["bookworm-security"],
        packages: &["linux-image-6.1.0-*-cloud-amd64"],
    },
    Kernel {
        name: "6.12",
        suites: &["trixie"],
        security: &["bookworm-security", "trixie-security"],
        packages: &["linux-image-6.12.*-cloud-amd64"],
    },
    Kernel {
        name: "7.2",
        suites: &["sid"],
        security: &[],
        packages: &[
            "linux-binary-7.2.*-cloud-amd64",
            "linux-modules-7.2.*-cloud-amd64",
        ],
    },
];

/// An unpacked kernel.
#[derive(Debug)]
pub struct Unpacked {
    /// The image that boots.
    pub vmlinuz: PathBuf,
    /// Where its modules lie; `None` without any.
    pub modules: Option<PathBuf>,
}

/// Where Debian's archives are, as the host's apt knows them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Archives {
    main: Vec<String>,
    security: Vec<String>,
    /// Keyring named by the host's sources.
    signed_by: Option<String>,
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
            self.download(&dir, &root)
                .with_context(|| format!("cannot fetch kernel {}", self.name))?;
            fs::write(dir.join("complete"), "")?;
        }
        let mut images = Vec::new();
        let mut modules = Vec::new();
        find(&root, &mut |path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with("vmlinuz") {
                images.push(path.to_owned());
            } else if path.is_dir() && name == "kernel" {
                modules.push(path.to_owned());
            }
        })?;
        Ok(Unpacked {
            vmlinuz: images
                .pop()
                .with_context(|| format!("no vmlinuz below {}", root.display()))?,
            // Deeper down there is a kernel/kernel of the core's own modules.
            modules: modules
                .into_iter()
                .min_by_key(|path| path.components().count()),
        })
    }

    fn download(&self, dir: &Path, root: &Path) -> Result<()> {
        fs::create_dir_all(root)?;
        for part in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(part))?;
        }
        let archives = host_archives()?;
        fs::write(dir.join("sources.list"), archives.sources(self))?;
        fs::write(dir.join("status"), "")?;
        // One suite that is gone must not take the others with it: what
        // counts is whether a package is found.
        let updated = exec::run(apt(dir, "apt-get").args(["-qq", "update"]));
        for pattern in self.packages {
            let Some(package) = newest(dir, pattern)? else {
                if let Err(error) = &updated {
                    bail!("no package {pattern}: {error:#}");
                }
                bail!("no package {pattern} in {}", self.wanted_suites());
            };
            println!("fetching {package}");
            exec::run(
                apt(dir, "apt-get")
                    .current_dir(dir)
                    .args(["-qq", "download", &package]),
            )?;
            let prefix = format!("{package}_");
            let deb = fs::read_dir(dir)?
                .filter_map(|entry| Some(entry.ok()?.path()))
                .find(|path| {
                    path.file_name()
                        .is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
                })
                .with_context(|| format!("apt-get download left no {prefix}*.deb"))?;
            exec::run(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(root))?;
            fs::remove_file(&deb)?;
        }
        Ok(())
    }

    fn wanted_suites(&self) -> String {
        [self.suites, self.security].concat().join(", ")
    }
}

impl Archives {
    /// apt's one-line format, the suite changed to the kernel's.
    fn sources(&self, kernel: &Kernel) -> String {
        let options = match &self.signed_by {
            Some(key) => format!("[signed-by={key} arch=amd64]"),
            None => "[arch=amd64]".to_owned(),
        };
        let mut text = String::new();
        for (uris, suites) in [
            (&self.main, kernel.suites),
            (&self.security, kernel.security),
        ] {
            for uri in uris {
                for suite in suites {
                    text += &format!("deb {options} {uri} {suite} main\n");
                }
            }
        }
        text
    }

    /// Takes over a source if it is of Debian's own suites.
    fn add(&mut self, uris: &[&str], suites: &[&str], signed_by: Option<&str>) {
        let security = suites
            .iter()
            .any(|suite| suite.ends_with("-security") || suite.ends_with("/updates"));
        let main = suites.iter().any(|suite| {
            let name = suite.split('-').next().unwrap_or(suite);
            DEBIAN.contains(&name) && !suite.contains('/')
        });
        if !main && !security {
            return;
        }
        let into = if security {
            &mut self.security
        } else {
            &mut self.main
        };
        for uri in uris {
            let uri = uri.trim_end_matches('/').to_owned();
            if !into.contains(&uri) {
                into.push(uri);
            }
        }
        if self.signed_by.is_none() {
            self.signed_by = signed_by
                .filter(|key| key.starts_with('/'))
                .map(ToOwned::to_owned);
        }
    }

    /// Reads a `.sources` file.
    fn deb822(&mut self, text: &str) {
        for stanza in text.split("\n\n") {
            let field = |name: &str| {
                stanza
                    .lines()
                    .filter(|line| !line.starts_with('#'))
                    .find_map(|line| {
                        let (key, value) = line.split_once(':')?;
                        key.eq_ignore_ascii_case(name).then_some(value.trim())
                    })
            };
            let words = |name| -> Vec<&str> {
                field(name).map_or_else(Vec::new, |text| text.split_whitespace().collect())
            };
            if words("Types").contains(&"deb") {
                self.add(&words("URIs"), &words("Suites"), field("Signed-By"));
            }
        }
    }

    /// Reads a `.list` file.
    fn one_line(&mut self, text: &str) {
        for line in text.lines() {
            let Some(rest) = line.trim().strip_prefix("deb ") else {
                continue;
            };
            let rest = rest.trim();
            let (options, rest) = match rest.strip_prefix('[').and_then(|r| r.split_once(']')) {
                Some((options, rest)) => (options, rest),
                None => ("", rest),
            };
            let signed_by = options
                .split_whitespace()
                .find_map(|option| option.strip_prefix("signed-by="));
            let mut words = rest.split_whitespace();
            if let (Some(uri), Some(suite)) = (words.next(), words.next()) {
                self.add(&[uri], &[suite], signed_by);
            }
        }
    }
}

/// First words of the suites that Debian's own archives have.
const DEBIAN: [&str; 8] = [
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "sid",
    "stable",
    "oldstable",
    "testing",
];

fn host_archives() -> Result<Archives> {
    let mut archives = Archives::default();
    let etc = Path::new("/etc/apt");
    let mut files = vec![etc.join("sources.list")];
    if let Ok(entries) = fs::read_dir(etc.join("sources.list.d")) {
        files.extend(entries.filter_map(|entry| Some(entry.ok()?.path())));
    }
    files.sort();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("sources") => archives.deb822(&text),
            _ => archives.one_line(&text),
        }
    }
    if archives.main.is_empty() {
        bail!("the host's apt sources name no Debian archive");
    }
    Ok(archives)
}

/// apt with everything private but the trusted keys.
fn apt(dir: &Path, program: &str) -> Command {
    let mut command = Command::new(program);
    let set = |command: &mut Command, key: &str, value: &str| {
        command.arg(format!("-o{key}={value}"));
    };
    let path = |part: &str| dir.join(part).display().to_string();
    set(&mut command, "Dir::Etc::sourcelist", &path("sources.list"));
    set(&mut command, "Dir::Etc::sourceparts", "-");
    set(&mut command, "Dir::State::Lists", &path("lists"));
    set(&mut command, "Dir::State::status", &path("status"));
    set(&mut command, "Dir::Cache", &path("cache"));
    set(&mut command, "APT::Architecture", "amd64");
    set(&mut command, "APT::Sandbox::User", "root");
    set(&mut command, "Acquire::Check-Valid-Until", "false");
    set(&mut command, "Acquire::Languages", "none");
    command.stdin(Stdio::null());
    command
}

/// The newest package whose name matches.
fn newest(dir: &Path, pattern: &str) -> Result<Option<String>> {
    let mut command = apt(dir, "apt-cache");
    command.arg("pkgnames");
    let output = command
        .output()
        .with_context(|| format!("cannot start `{}`", exec::shown(&command)))?;
    let names = String::from_utf8_lossy(&output.stdout);
    Ok(names
        .lines()
        .filter(|name| matches(pattern, name))
        .max_by_key(|name| numbers(name))
        .map(ToOwned::to_owned))
}

/// `*` stands for a version: digits, dots, pluses and Debian revisions, so
/// that neither `-dbg` nor `-unsigned` nor another flavour matches.
fn matches(pattern: &str, name: &str) -> bool {
    let Some((before, after)) = pattern.split_once('*') else {
        return pattern == name;
    };
    name.strip_prefix(before)
        .and_then(|rest| rest.strip_suffix(after))
        .is_some_and(|version| {
            !version.is_empty()
                && !version.contains("rt")
                && version
                    .chars()
                    .all(|c| c.is_ascii_digit() || ".+-~".contains(c) || c.is_ascii_lowercase())
                && !version.contains("cloud")
                && !version.contains("unsigned")
        })
}

/// The numbers in a name, in order: what versions are compared by.
fn numbers(name: &str) -> Vec<u64> {
    // "-cloud-amd64" has a number of its own.
    let version = name
        .split_once("-cloud")
        .map_or(name, |(version, _)| version);
    version
        .split(|c: char| !c.is_ascii_digit())
        .filter_map(|number| number.parse().ok())
        .collect()
}

/// Every path below a directory, links not followed.
pub fn find(dir: &Path, visit: &mut impl FnMut(&Path)) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let path = entry?.path();
        visit(&path);
        if path.is_dir() && !path.is_symlink() {
            find(&path, visit)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_suite_of_the_hosts_sources_changes() {
        let mut archives = Archives::default();
        archives.deb822(
            "Types: deb\n# a comment\nURIs: http://mirror.example/debian\n\
             Suites: bookworm bookworm-updates\nComponents: main\nSigned-By: /keys/a.gpg\n\n\
             Types: deb\nURIs: http://mirror.example/security/\nSuites: bookworm-security\n\n\
             Types: deb\nURIs: https://other.example/node\nSuites: nodistro\n",
        );
        archives.one_line("# deb http://x bookworm main\ndeb [arch=amd64 signed-by=/k] http://tools.example/apt cloud main");
        assert_eq!(archives.main, ["http://mirror.example/debian"]);
        assert_eq!(archives.security, ["http://mirror.example/security"]);
        assert_eq!(
            archives.sources(&KERNELS[0]),
            "deb [signed-by=/keys/a.gpg arch=amd64] http://mirror.example/debian bullseye main\n\
             deb [signed-by=/keys/a.gpg arch=amd64] http://mirror.example/security bullseye-security main\n"
        );
    }

    #[test]
    fn the_newest_of_the_right_flavour_is_taken() {
        let pattern = "linux-image-6.12.*-cloud-amd64";
        for wrong in [
            "linux-image-6.12.43+deb13-cloud-amd64-dbg",
            "linux-image-6.12.43+deb13-cloud-amd64-unsigned",
            "linux-image-6.12.43+deb13-rt-cloud-amd64",
            "linux-image-6.1.0-9-cloud-amd64",
        ] {
            assert!(!matches(pattern, wrong), "{wrong}");
        }
        let newest = [
            "linux-image-6.12.9+deb13-cloud-amd64",
            "linux-image-6.12.43+deb13-cloud-amd64",
            "linux-image-6.12.43+bpo-cloud-amd64",
        ];
        assert!(newest.iter().all(|name| matches(pattern, name)));
        assert_eq!(
            newest.iter().max_by_key(|name| numbers(name)),
            Some(&newest[1])
        );
    }
}

//! What the released binary is made of: crates, and everything else that is
//! linked or embedded. SBOM and third-party licences are written from it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use super::output;
use crate::exec;

/// Files of a crate that hold licence terms, by how their names begin.
const TERMS: [&str; 5] = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE"];

/// A crate of the binary, or of the programs that it embeds.
pub struct Crate {
    name: String,
    version: String,
    /// An SPDX expression.
    licence: String,
    repository: String,
    /// Where its sources lie.
    folder: PathBuf,
    /// SHA-256 of the registry's archive; none for this repository's own.
    checksum: Option<String>,
    /// Package URLs of its own dependencies.
    needs: BTreeSet<String>,
}

/// Something in the binary that is no crate.
struct Other {
    kind: &'static str,
    name: String,
    version: String,
    licence: Value,
    /// The file that is embedded, below the checkout.
    file: Option<String>,
    address: &'static str,
}

impl Crate {
    /// Names it wherever it was built; no path of the builder's.
    fn url(&self) -> String {
        format!("pkg:cargo/{}@{}", self.name, self.version)
    }

    fn is_ours(&self) -> bool {
        self.checksum.is_none()
    }
}

/// The crates whose code is in the binary for `target`, by name: neither
/// build scripts nor macros nor tests.
pub fn crates(top: &Path, target: &str) -> Result<Vec<Crate>> {
    let mut found = BTreeMap::new();
    for manifest in ["connmon/Cargo.toml", "connmon-ebpf/Cargo.toml"] {
        read_crates(&top.join(manifest), target, &mut found)
            .with_context(|| format!("cannot list the crates of {manifest}"))?;
    }
    Ok(found.into_values().collect())
}

fn read_crates(
    manifest: &Path,
    target: &str,
    found: &mut BTreeMap<(String, String), Crate>,
) -> Result<()> {
    let tree = output(
        exec::cargo()
            .args(["tree", "--quiet", "--locked", "--prefix=none"])
            .args(["--edges=normal,no-proc-macro", "--format={p}", "--target"])
            .arg(target)
            .arg("--manifest-path")
            .arg(manifest),
    )?;
    let wanted: BTreeSet<(&str, &str)> = tree
        .lines()
        .filter_map(|line| {
            let mut words = line.split_whitespace();
            Some((words.next()?, words.next()?.strip_prefix('v')?))
        })
        .collect();
    let metadata = output(
        exec::cargo()
            .args(["metadata", "--quiet", "--locked", "--format-version=1"])
            .args(["--filter-platform", target, "--manifest-path"])
            .arg(manifest),
    )?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let lock = fs::read_to_string(Path::new(&text(&metadata["workspace_root"])).join("Cargo.lock"))
        .context("cannot read Cargo.lock")?;
    let mut urls = BTreeMap::new();
    for package in list(&metadata["packages"]) {
        let (name, version) = (text(&package["name"]), text(&package["version"]));
        if !wanted.contains(&(name.as_str(), version.as_str())) {
            continue;
        }
        let member = Crate {
            // As `MIT/Apache-2.0` was written once.
            licence: text(&package["license"])
                .replace(" / ", "/")
                .replace('/', " OR "),
            repository: text(&package["repository"]),
            folder: Path::new(&text(&package["manifest_path"]))
                .parent()
                .context("a manifest has a folder")?
                .to_owned(),
            checksum: checksum(&lock, &name, &version),
            needs: BTreeSet::new(),
            name: name.clone(),
            version: version.clone(),
        };
        urls.insert(text(&package["id"]), (member.url(), (name, version)));
        found
            .entry(urls[&text(&package["id"])].1.clone())
            .or_insert(member);
    }
    ensure!(
        urls.len() == wanted.len(),
        "cargo tree names {} crates, cargo metadata {} of them",
        wanted.len(),
        urls.len()
    );
    for node in list(&metadata["resolve"]["nodes"]) {
        let Some((_, key)) = urls.get(&text(&node["id"])) else {
            continue;
        };
        let needs = list(&node["deps"]).into_iter().filter(|dep| {
            // `null` is a normal dependency.
            list(&dep["dep_kinds"])
                .iter()
                .any(|kind| kind["kind"].is_null())
        });
        let needs = needs.filter_map(|dep| Some(urls.get(&text(&dep["pkg"]))?.0.clone()));
        if let Some(member) = found.get_mut(key) {
            member.needs.extend(needs);
        }
    }
    Ok(())
}

/// What Cargo.lock says of a crate; nothing for a path.
fn checksum(lock: &str, name: &str, version: &str) -> Option<String> {
    let start = format!("name = \"{name}\"\nversion = \"{version}\"\n");
    let entry = lock
        .split("[[package]]\n")
        .find(|entry| entry.starts_with(&start))?;
    let line = entry
        .lines()
        .find_map(|line| line.strip_prefix("checksum = \""))?;
    Some(line.trim_end_matches('"').to_owned())
}

fn others(arch: &str) -> Result<Vec<Other>> {
    let spdx = |expression: &str| json!([{ "expression": expression }]);
    let compiler = output(Command::new("rustc").arg("--version"))?;
    let libc = output(Command::new("getconf").arg("GNU_LIBC_VERSION"))?;
    let gcc = output(Command::new("cc").arg("-dumpfullversion"))?;
    let word = |text: &str| {
        text.split_whitespace()
            .nth(1)
            .unwrap_or_default()
            .to_owned()
    };
    let embedded = |name: &str, version: &str, licence, file: &str, address| Other {
        kind: "data",
        name: name.to_owned(),
        version: version.to_owned(),
        licence,
        file: Some(file.to_owned()),
        address,
    };
    let library = |name: &str, version, licence, address| Other {
        kind: "library",
        name: name.to_owned(),
        version,
        licence,
        file: None,
        address,
    };
    let object = format!("connmon-{arch}.o");
    Ok(vec![
        embedded(
            "dbip-country-lite",
            "",
            spdx("CC-BY-4.0"),
            "connmon/data/dbip-country-lite.mmdb",
            "https://db-ip.com",
        ),
        embedded(
            "natural-earth",
            "4.1",
            json!([{ "license": { "name": "public domain" } }]),
            "connmon/data/worldmap.svg",
            "https://www.naturalearthdata.com",
        ),
        Other {
            kind: "application",
            ..embedded(
                &object,
                env!("CARGO_PKG_VERSION"),
                spdx("MIT OR GPL-2.0-only"),
                &format!("connmon/bpf/{object}"),
                env!("CARGO_PKG_REPOSITORY"),
            )
        },
        library(
            "rust-std",
            word(&compiler),
            spdx("MIT OR Apache-2.0"),
            "https://github.com/rust-lang/rust",
        ),
        library(
            "glibc",
            word(&libc),
            spdx("LGPL-2.1-or-later"),
            "https://sourceware.org/glibc",
        ),
        library(
            "libgcc",
            gcc,
            spdx("GPL-3.0-or-later WITH GCC-exception-3.1"),
            "https://gcc.gnu.org",
        ),
    ])
}

/// The SBOM: CycloneDX 1.5 in JSON.
pub fn sbom(top: &Path, target: &str, epoch: &str, crates: &[Crate]) -> Result<String> {
    let time = output(
        Command::new("date")
            .args(["-u", "+%Y-%m-%dT%H:%M:%SZ", "-d"])
            .arg(format!("@{epoch}")),
    )?;
    let mut components = Vec::new();
    let mut dependencies = Vec::new();
    let mut own = Value::Null;
    for member in crates {
        let mut component = json!({
            "type": "library",
            "bom-ref": member.url(),
            "name": member.name,
            "version": member.version,
            "licenses": [{ "expression": member.licence }],
            "purl": member.url(),
        });
        if let Some(hash) = &member.checksum {
            component["hashes"] = json!([{ "alg": "SHA-256", "content": hash }]);
        }
        if !member.repository.is_empty() {
            component["externalReferences"] = json!([{ "type": "vcs", "url": member.repository }]);
        }
        dependencies.push(json!({ "ref": member.url(), "dependsOn": member.needs }));
        if member.name == "connmon" {
            component["type"] = "application".into();
            own = component;
        } else {
            components.push(component);
        }
    }
    let arch = target.split('-').next().unwrap_or(target);
    for other in others(arch)? {
        let reference = format!("pkg:generic/{}@{}", other.name, other.version);
        let reference = reference.trim_end_matches('@').to_owned();
        let mut component = json!({
            "type": other.kind,
            "bom-ref": reference,
            "name": other.name,
            "version": other.version,
            "licenses": other.licence,
            "externalReferences": [{ "type": "website", "url": other.address }],
        });
        if let Some(file) = other.file {
            let bytes = fs::read(top.join(&file)).with_context(|| format!("cannot read {file}"))?;
            component["hashes"] = json!([{ "alg": "SHA-256", "content": hex(&bytes) }]);
        }
        if let Some(first) = dependencies
            .iter_mut()
            .find(|entry| entry["ref"] == own["bom-ref"])
            && let Some(list) = first["dependsOn"].as_array_mut()
        {
            list.push(reference.into());
        }
        components.push(component);
    }
    ensure!(!own.is_null(), "cargo tree does not name connmon itself");
    let document = json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": time,
            "component": own,
            "properties": [{ "name": "cdx:rustc:sbom:target:triple", "value": target }],
        },
        "components": components,
        "dependencies": dependencies,
    });
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}

/// SHA-256 in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for byte in Sha256::digest(bytes) {
        let _ = write!(text, "{byte:02x}");
    }
    text
}

/// The licence terms of every crate that is not this repository's own, each
/// text once.
pub fn third_party(crates: &[Crate]) -> Result<String> {
    let mut text = String::from(
        "Crates in connmon's binary and in the BPF programs that it embeds, with the\n\
         terms that come with them. NOTICE names what else is in there.\n\n",
    );
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for member in crates.iter().filter(|member| !member.is_ours()) {
        let name = format!("{} {}", member.name, member.version);
        let _ = write!(text, "{name}: {}", member.licence);
        let terms = terms(&member.folder)?;
        if terms.is_empty() {
            // The expression above and the project's own page are all there is.
            let _ = write!(text, ", terms at {}", member.repository);
        }
        text.push('\n');
        for terms in terms {
            texts.entry(terms).or_default().push(name.clone());
        }
    }
    let mut texts: Vec<_> = texts.into_iter().collect();
    texts.sort_by(|(_, a), (_, b)| a.cmp(b));
    for (terms, names) in texts {
        let rule = "-".repeat(72);
        let _ = write!(text, "\n{rule}\n{}\n{rule}\n{terms}\n", names.join(", "));
    }
    Ok(text)
}

fn terms(folder: &Path) -> Result<Vec<String>> {
    let mut files: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("cannot read {}", folder.display()))?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let name = name.to_uppercase();
            path.is_file() && TERMS.iter().any(|start| name.starts_with(start))
        })
        .collect();
    files.sort();
    let read = |path: PathBuf| -> Result<String> {
        let bytes = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let text = String::from_utf8_lossy(&bytes).replace("\r\n", "\n");
        Ok(text.trim().to_owned())
    };
    files.into_iter().map(read).collect()
}

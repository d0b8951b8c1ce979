//! What the released binary is made of: the SBOM by cargo-cyclonedx, with
//! what is linked or embedded beside the crates, and the crates' licences.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::Dist;
use crate::build_ebpf::sha256;
use crate::{exec, install};

const CARGO_CYCLONEDX: (&str, &str) = ("cargo-cyclonedx", "0.5.9");

/// The agent, and the programs that it embeds.
const PACKAGES: [&str; 2] = ["connmon", "connmon-ebpf"];

/// Name of the file that cargo-cyclonedx writes beside each manifest.
const FILE: &str = "cyclonedx-of-dist";

/// Files of a crate that hold licence terms, by how their names begin.
const TERMS: [&str; 5] = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE"];

/// The SBOM: CycloneDX 1.5 in JSON, without a path of this machine.
///
/// # Errors
/// When cargo-cyclonedx fails.
pub fn sbom(dist: &Dist) -> Result<String> {
    install::cargo_tool(CARGO_CYCLONEDX)?;
    let mut document = cyclonedx(dist, PACKAGES[0])?;
    let ebpf = cyclonedx(dist, PACKAGES[1])?;
    let own = document["metadata"]["component"]["bom-ref"].clone();
    let others = others(dist)?;
    let needed: Vec<Value> = others
        .iter()
        .map(|other| other["bom-ref"].clone())
        .collect();
    for (list, key, more) in [
        ("components", "bom-ref", others),
        ("components", "bom-ref", array(&ebpf["components"])),
        ("dependencies", "ref", array(&ebpf["dependencies"])),
    ] {
        let list = document[list]
            .as_array_mut()
            .context("the SBOM lacks a list")?;
        for entry in more {
            if !list.iter().any(|known| known[key] == entry[key]) {
                list.push(entry);
            }
        }
    }
    for entry in document["dependencies"]
        .as_array_mut()
        .into_iter()
        .flatten()
    {
        if entry["ref"] == own
            && let Some(list) = entry["dependsOn"].as_array_mut()
        {
            list.extend(needed.iter().cloned());
        }
    }
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}

/// What cargo-cyclonedx writes of one package.
fn cyclonedx(dist: &Dist, package: &str) -> Result<Value> {
    let directory = dist.top.join(package);
    exec::run(
        exec::cargo()
            .args(["cyclonedx", "-qq", "--format=json", "--spec-version=1.5"])
            .args(["--no-build-deps", "--override-filename", FILE])
            .args(["--target", &dist.target, "--manifest-path"])
            .arg(directory.join("Cargo.toml"))
            .env("SOURCE_DATE_EPOCH", &dist.epoch),
    )?;
    let file = directory.join(format!("{FILE}.json"));
    let text =
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    // It writes one beside every member of the workspace.
    exec::run(Command::new("find").arg(&dist.top).args([
        "-maxdepth",
        "3",
        "-name",
        &format!("{FILE}.json"),
        "-delete",
    ]))?;
    let text = text
        .replace(&format!("path+file://{}/", dist.top.display()), "")
        .replace("?download_url=file://", "#");
    serde_json::from_str(&text).context("cargo-cyclonedx wrote no JSON")
}

fn array(value: &Value) -> Vec<Value> {
    value.as_array().cloned().unwrap_or_default()
}

/// What is linked or embedded and is no crate.
fn others(dist: &Dist) -> Result<Vec<Value>> {
    let word = |program: &str, argument: &str| -> Result<String> {
        let text = exec::output(Command::new(program).arg(argument))?;
        let word = text.split_whitespace().nth(1).unwrap_or(&text);
        Ok(word.to_owned())
    };
    let spdx = |expression: &str| json!({ "expression": expression });
    let object = format!("connmon-{}.o", std::env::consts::ARCH);
    let version = env!("CARGO_PKG_VERSION");
    let mut components = Vec::new();
    for (kind, name, version, licence, file, address) in [
        (
            "data",
            "dbip-country-lite",
            "",
            spdx("CC-BY-4.0"),
            "connmon/data/dbip-country-lite.mmdb",
            "https://db-ip.com",
        ),
        (
            "data",
            "natural-earth",
            "4.1",
            json!({ "license": { "name": "public domain" } }),
            "connmon/data/worldmap.svg",
            "https://www.naturalearthdata.com",
        ),
        (
            "application",
            &object,
            version,
            spdx("MIT OR GPL-2.0-only"),
            &format!("connmon/bpf/{object}"),
            env!("CARGO_PKG_REPOSITORY"),
        ),
        (
            "library",
            "rust-std",
            &word("rustc", "--version")?,
            spdx("MIT OR Apache-2.0"),
            "",
            "https://github.com/rust-lang/rust",
        ),
        (
            "library",
            "glibc",
            &word("getconf", "GNU_LIBC_VERSION")?,
            spdx("LGPL-2.1-or-later"),
            "",
            "https://sourceware.org/glibc",
        ),
        (
            "library",
            "libgcc",
            &word("cc", "-dumpfullversion")?,
            spdx("GPL-3.0-or-later WITH GCC-exception-3.1"),
            "",
            "https://gcc.gnu.org",
        ),
    ] {
        let reference = format!("pkg:generic/{name}@{version}");
        let mut component = json!({
            "type": kind,
            "bom-ref": reference.trim_end_matches('@'),
            "name": name,
            "version": version,
            "licenses": [licence],
            "externalReferences": [{ "type": "website", "url": address }],
        });
        if !file.is_empty() {
            let bytes =
                fs::read(dist.top.join(file)).with_context(|| format!("cannot read {file}"))?;
            component["hashes"] = json!([{ "alg": "SHA-256", "content": sha256(bytes) }]);
        }
        components.push(component);
    }
    Ok(components)
}

/// The licence terms of every crate that is not this repository's own, each
/// text once.
///
/// # Errors
/// When cargo does not know where a crate of the SBOM lies.
pub fn third_party(dist: &Dist, sbom: &str) -> Result<String> {
    let mut folders = BTreeMap::new();
    for package in PACKAGES {
        let metadata = exec::output(
            exec::cargo()
                .args([
                    "metadata",
                    "--quiet",
                    "--locked",
                    "--format-version=1",
                    "--manifest-path",
                ])
                .arg(dist.top.join(package).join("Cargo.toml")),
        )?;
        let metadata: Value = serde_json::from_str(&metadata)?;
        for package in array(&metadata["packages"]) {
            let manifest = PathBuf::from(package["manifest_path"].as_str().unwrap_or_default());
            let name = format!("{} {}", package["name"], package["version"]);
            folders.insert(name, manifest.with_file_name(""));
        }
    }
    let mut text = String::from(
        "Crates in connmon's binary and in the BPF programs that it embeds, with the\n\
         terms that come with them. NOTICE names what else is in there.\n\n",
    );
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let sbom: Value = serde_json::from_str(sbom)?;
    // Crates of the registry alone have this URL and a hash.
    for member in array(&sbom["components"]) {
        let url = member["purl"].as_str().unwrap_or_default();
        if !url.starts_with("pkg:cargo/") || member["hashes"].is_null() {
            continue;
        }
        let folder = folders.get(&format!("{} {}", member["name"], member["version"]));
        let terms = terms(folder.with_context(|| format!("cargo metadata has no {url}"))?)?;
        let name = url.trim_start_matches("pkg:cargo/").replace('@', " ");
        let licence = member["licenses"][0]["expression"]
            .as_str()
            .unwrap_or_default();
        let absent = match terms.is_empty() {
            true => ", terms at the address in the SBOM",
            false => "",
        };
        let _ = writeln!(text, "{name}: {licence}{absent}");
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
    let mut texts = Vec::new();
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?
    {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .to_uppercase();
        if path.is_file() && TERMS.iter().any(|start| name.starts_with(start)) {
            let text = String::from_utf8_lossy(&fs::read(&path)?).replace("\r\n", "\n");
            texts.push((name, text.trim().to_owned()));
        }
    }
    texts.sort();
    Ok(texts.into_iter().map(|(_, text)| text).collect())
}

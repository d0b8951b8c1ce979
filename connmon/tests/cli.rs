//! The command line as a shell sees it: output, exit codes, closed pipes.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

#[expect(dead_code, reason = "other tests use more of it")]
mod support;

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
        for setting in connmon::config::settings() {
            let flag = format!("--{}", connmon::config::key(setting));
            assert!(out.contains(&flag), "{flag}");
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
    let directory = scratch.0.path().to_str().unwrap();
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
        (
            &["--config.check", "--geoip.database", &empty],
            "empty.mmdb: the file is empty",
        ),
        (
            &["--config.check", "--geoip.database", directory],
            "--geoip.database: ",
        ),
        (&["--config.file", directory], "--config.file: "),
        (
            &["--config.check", "--web.config.file", directory],
            "--web.config.file: ",
        ),
        (
            &["--web.listen-address", "[fe80::1]:80"],
            "needs an interface",
        ),
        (
            &[
                "--config.check",
                "--web.listen-address",
                "localhost:9,127.0.0.1:9",
            ],
            "overlaps \"localhost:9\"",
        ),
        // What is wrong comes before what is not there yet.
        (
            &[
                "--config.check",
                "--geoip.database=/no/such.mmdb",
                "--web.config.file",
                &unknown,
            ],
            "unknown.yml:1",
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

/// Files on a mount, names of a resolver and interfaces may come after the
/// agent; the service manager restarts it after exit code 1.
#[test]
fn what_is_not_there_yet_ends_with_1() {
    let scratch = Scratch::new();
    let file = scratch.file("file", b"");
    let web = |text: &str| scratch.file(&format!("web-{}.yml", text.len()), text.as_bytes());
    let no_certificate = web("tls_server_config: {cert_file: no.crt, key_file: no.key}\n");
    let certified = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    scratch.file("good.crt", certified.cert.pem().as_bytes());
    scratch.file("good.key", certified.signing_key.serialize_pem().as_bytes());
    let no_key = web("tls_server_config: {cert_file: good.crt, key_file: missing.key}\n");
    let no_ca = web(
        "tls_server_config: {cert_file: good.crt, key_file: good.key, \
         client_auth_type: RequireAndVerifyClientCert, client_ca_file: no-such-ca.crt}\n",
    );
    let below_a_file = format!("{file}/database.mmdb");
    for (flag, value, message) in [
        (
            "--config.file",
            "/no/such.yml",
            "--config.file: /no/such.yml: cannot read",
        ),
        (
            "--geoip.database",
            "/no/such.mmdb",
            "--geoip.database: country database /no/such.mmdb",
        ),
        ("--geoip.database", &below_a_file, "Not a directory"),
        (
            "--web.config.file",
            "/no/such.yml",
            "--web.config.file: /no/such.yml: cannot read",
        ),
        (
            "--web.config.file",
            &no_certificate,
            "tls_server_config.cert_file: /",
        ),
        (
            "--web.config.file",
            &no_key,
            "tls_server_config.key_file: /",
        ),
        (
            "--web.config.file",
            &no_ca,
            "tls_server_config.client_ca_file: /",
        ),
        (
            "--web.listen-address",
            "no-such-host.invalid:0",
            "the host does not resolve",
        ),
        (
            "--web.listen-address",
            "[fe80::1%connmon-none]:0",
            "no interface \"connmon-none\"",
        ),
    ] {
        for mode in ["--config.check", "--source=proc"] {
            let mut command = connmon(&[mode, "--log.level=error", flag, value]);
            if flag != "--web.listen-address" {
                command.arg("--web.listen-address=127.0.0.1:0");
            }
            let (code, out, err) = said(command.output().unwrap());
            assert_eq!((code, out.as_str()), (1, ""), "{mode} {value}: {err}");
            assert!(err.contains(message), "{mode} {value}: {err}");
            assert_eq!(err.lines().count(), 1, "{mode} {value}: {err}");
        }
    }
    // Documentation addresses, on no interface.
    for address in ["192.0.2.1:0", "[2001:db8::1]:0"] {
        let args = [
            "--source=proc",
            "--log.level=error",
            "--web.listen-address",
            address,
        ];
        let (code, _, err) = run(&args);
        assert_eq!(code, 1, "{err}");
        assert!(
            err.contains(&format!("--web.listen-address: cannot listen on {address}")),
            "{err}"
        );
    }
}

#[test]
fn the_unit_starts_again_for_1_and_not_for_2() {
    let unit = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/systemd/connmon.service"
    );
    let unit = std::fs::read_to_string(unit).unwrap();
    let value = |key: &str| unit.lines().find_map(|line| line.strip_prefix(key));
    assert_eq!(value("Restart="), Some("on-failure"));
    assert_eq!(value("RestartPreventExitStatus="), Some("2"));
    // Else five failures in ten seconds are the last.
    assert_eq!(value("StartLimitIntervalSec="), Some("0"));
}

#[test]
fn a_missing_database_exits_1_and_a_broken_one_2() {
    let scratch = Scratch::new();
    let broken = scratch.file("broken.mmdb", b"no database");
    for (database, expected) in [("/no/such.mmdb", 1), (broken.as_str(), 2)] {
        let args = ["list", "--source=proc", "--geoip.database", database];
        let (code, out, err) = run(&args);
        assert_eq!((code, out.as_str()), (expected, ""), "{err}");
        assert!(
            err.contains(&format!("--geoip.database: country database {database}")),
            "{err}"
        );
        // A check reports either in its lines, and that the agent cannot run.
        let args = [
            "check",
            "--source=proc",
            "--log.level=error",
            "--geoip.database",
            database,
        ];
        let (code, out, _) = run(&args);
        assert_eq!(code, 1, "{out}");
        assert!(
            out.contains(&format!(
                "failed    country database: country database {database}"
            )),
            "{out}"
        );
    }
    let args = [
        "check",
        "--source=proc",
        "--web.listen-address=no-such-host.invalid:80",
    ];
    let (code, out, _) = run(&args);
    assert_eq!(code, 1, "{out}");
    let line = "failed    serving: --web.listen-address: bad address";
    assert!(out.contains(line), "{out}");
    let args = ["check", "--source=proc", "--web.config.file=/no/such.yml"];
    let (code, out, _) = run(&args);
    assert_eq!(code, 1, "{out}");
    let line = "failed    serving: --web.config.file: /no/such.yml";
    assert!(out.contains(line), "{out}");
}

/// A value is reported with where it was written, whatever is wrong with it.
#[test]
fn a_bad_value_is_reported_with_its_variable_flag_or_line() {
    let scratch = Scratch::new();
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = holder.local_addr().unwrap().to_string();
    let unknown = scratch.file("unknown.yml", b"ports.max: 1\nno.such: 1\n");
    let binary = scratch.file("binary.yml", b"ports.max: 1\n\xff\n");
    let listen = format!("\nweb.listen-address:\n  - 127.0.0.1:0\n  - {taken}\n");
    let listen = scratch.file("listen.yml", listen.as_bytes());
    let file = |path: &str| ("CONNMON_CONFIG_FILE", path.to_owned());
    for (flag, (name, value), message) in [
        (
            None,
            file("/no/such.yml"),
            "CONNMON_CONFIG_FILE: /no/such.yml: cannot read".to_owned(),
        ),
        (
            None,
            file(&unknown),
            format!("CONNMON_CONFIG_FILE: {unknown}:2: unknown key"),
        ),
        (
            None,
            file(&binary),
            format!("CONNMON_CONFIG_FILE: {binary}:2: not valid UTF-8"),
        ),
        (
            Some(format!("--config.file={unknown}")),
            file("/no/such.yml"),
            format!("--config.file: {unknown}:2: unknown key"),
        ),
        (
            None,
            file(&listen),
            format!("{listen}:4: web.listen-address: cannot listen on {taken}"),
        ),
        (
            None,
            ("CONNMON_WEB_LISTEN_ADDRESS", taken.clone()),
            format!("CONNMON_WEB_LISTEN_ADDRESS: cannot listen on {taken}"),
        ),
        (
            Some(format!("--web.listen-address={taken}")),
            ("CONNMON_PORTS_MAX", "1".to_owned()),
            format!("--web.listen-address: cannot listen on {taken}"),
        ),
        (
            None,
            (
                "CONNMON_WEB_LISTEN_ADDRESS",
                "no-such-host.invalid:1".to_owned(),
            ),
            "CONNMON_WEB_LISTEN_ADDRESS: bad address".to_owned(),
        ),
        (
            None,
            ("CONNMON_LOG_LEVEL", "LOUD".to_owned()),
            "CONNMON_LOG_LEVEL: bad value \"LOUD\"".to_owned(),
        ),
    ] {
        let mut command = connmon(&["--source=proc", "--log.level=error"]);
        if name == "CONNMON_LOG_LEVEL" {
            command = connmon(&["--source=proc"]);
        }
        let (_, _, err) = said(command.args(flag).env(name, value).output().unwrap());
        assert!(
            err.starts_with(&format!("connmon: {message}")),
            "{message}: {err}"
        );
    }
}

/// The last line is for whatever reads the log, as far as that is known.
#[test]
fn the_last_line_of_a_failed_start_is_json_when_asked() {
    let scratch = Scratch::new();
    let holder = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("--web.listen-address={}", holder.local_addr().unwrap());
    let file = |text: &str| {
        let name = format!("{}.yml", text.len());
        format!("--config.file={}", scratch.file(&name, text.as_bytes()))
    };
    let json = "--log.format=json".to_owned();
    let variable = Some(("CONNMON_LOG_FORMAT", "JSON"));
    for (args, variable, code, message) in [
        (
            vec![json.clone(), taken.clone()],
            None,
            1,
            "cannot listen on",
        ),
        (
            vec![json.clone(), "--ports.max=many".into()],
            None,
            2,
            "bad number",
        ),
        (
            vec![json.clone(), "--no.such".into()],
            None,
            2,
            "unexpected argument '--no.such'",
        ),
        (
            vec!["--no.such".into(), "-log.format".into(), "json".into()],
            None,
            2,
            "--no.such",
        ),
        (
            vec![json.clone(), "--config.file=/no/such.yml".into()],
            None,
            1,
            "/no/such.yml",
        ),
        (
            vec![
                json.clone(),
                "--config.check".into(),
                "--geoip.database=/no/such".into(),
            ],
            None,
            1,
            "/no/such",
        ),
        (vec!["--ports.max=many".into()], variable, 2, "bad number"),
        (vec![taken.clone()], variable, 1, "cannot listen on"),
        (vec!["--no.such".into()], variable, 2, "--no.such"),
        (
            vec!["list".into(), "--geoip.database=/no/such".into()],
            variable,
            1,
            "/no/such",
        ),
        (
            vec![file("log.format: json\n"), taken.clone()],
            None,
            1,
            "cannot listen on",
        ),
        (
            vec![file("ports.max: many\nlog.format: json\n")],
            None,
            2,
            "bad number",
        ),
        // The file as a whole is refused.
        (
            vec![file("no.such: 1\n\"log.format\": 'json' # here\n")],
            None,
            2,
            "no.such",
        ),
        (
            vec![file("{log.format: json, ports.max: many}")],
            None,
            2,
            "bad number",
        ),
        (
            vec![file("log.format: json\nports.max: \"1\n")],
            None,
            2,
            "bad YAML",
        ),
        // A weaker source does not overrule a stronger one.
        (
            vec![json, file("log.format: logfmt\nports.max: x\n")],
            None,
            2,
            "bad number",
        ),
    ] {
        let mut command = connmon(&[]);
        command.args(&args).envs(variable);
        let (ended, out, err) = said(command.output().unwrap());
        assert_eq!((ended, out.as_str()), (code, ""), "{args:?}: {err}");
        for line in err.lines() {
            let line: serde_json::Value = serde_json::from_str(line).expect(line);
            assert!(
                line["ts"].is_string() && line["level"].is_string(),
                "{line}"
            );
        }
        let last: serde_json::Value = serde_json::from_str(err.lines().last().unwrap()).unwrap();
        assert_eq!(last["level"], "error", "{args:?}: {err}");
        assert!(
            last["msg"].as_str().unwrap().contains(message),
            "{args:?}: {err}"
        );
    }
    // For people otherwise.
    for args in [
        vec!["--ports.max=many".to_owned()],
        vec![
            "--log.format=logfmt".to_owned(),
            "--ports.max=many".to_owned(),
        ],
    ] {
        let output = connmon(&[]).args(&args).output().unwrap();
        let (_, _, err) = said(output);
        assert!(err.starts_with("connmon: --ports.max: bad number"), "{err}");
    }
}

#[test]
fn words_of_settings_may_be_written_in_capitals() {
    let args = [
        "--config.check",
        "--log.level=INFO",
        "--log.format=JSON",
        "--source=Proc",
    ];
    let (code, _, err) = run(&args);
    assert_eq!(code, 0, "{err}");
    let (code, _, err) = run(&["list", "--source=PROC", "-o", "JSON", "--by", "Country"]);
    assert_eq!(code, 0, "{err}");
}

/// Served on the link-local address of one interface, as other exporters do.
#[test]
fn an_interface_is_named_in_a_listen_address() {
    let setup = "ip link set lo up && ip -6 addr add fe80::1/64 dev lo nodad";
    let possible = Command::new("unshare")
        .args(["-n", "sh", "-c", setup])
        .output();
    match possible {
        Ok(output) if output.status.success() => {}
        other => return support::skipped("a zone", &format!("a namespace with IPv6: {other:?}")),
    }
    for zone in ["lo", "1"] {
        let address = format!("[fe80::1%{zone}]:19910");
        let script = format!("{setup} && exec \"$0\" --source=proc --web.listen-address={address}");
        let mut child = Command::new("unshare")
            .args(["-n", "sh", "-c", &script, env!("CARGO_BIN_EXE_connmon")])
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // FE80::1 as the kernel prints it, port 19910, LISTEN.
        let expected =
            "000080FE000000000000000001000000:4DC6 00000000000000000000000000000000:0000 0A";
        let table = format!("/proc/{}/net/tcp6", child.id());
        let until = Instant::now() + Duration::from_secs(30);
        let is_served =
            || std::fs::read_to_string(&table).is_ok_and(|text| text.contains(expected));
        while !is_served() && Instant::now() < until && child.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(20));
        }
        let served = is_served();
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        assert!(
            served,
            "{zone}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

/// What no other command minds is wrong usage of this one.
#[test]
fn trace_refuses_polling_and_names_its_origin() {
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
/// names where it was written.
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
    assert_eq!(out, "the configuration is valid\n");
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
fn an_unknown_variable_is_a_debug_line_in_json() {
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

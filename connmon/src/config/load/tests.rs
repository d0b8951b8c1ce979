use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::config::SourceChoice;
use connmon_core::fold::CrossFamilies;

fn with(flags: &[(&str, &str)], environment: &[(&str, &str)]) -> Result<Loaded, String> {
    let flags: Vec<_> = flags.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
    let environment = environment.iter().map(|(k, v)| (k.into(), v.into()));
    load(&flags, environment).map_err(|error| error.to_string())
}

struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("connmon-{}-{name}.yml", std::process::id()));
        std::fs::write(&path, text).unwrap();
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn defaults_are_the_contracts() {
    let loaded = with(&[], &[]).unwrap();
    assert!(loaded.alone.is_empty() && loaded.unknown_variables.is_empty());
    let config = loaded.config;
    assert!(!config.check_only);
    assert_eq!(config.listen.len(), 1);
    assert_eq!(
        config.listen[0].host,
        connmon_http::address::ListenHost::Any
    );
    assert_eq!(config.listen[0].port, 19_910);
    assert_eq!(config.telemetry_path, "/metrics");
    assert_eq!(config.web_max_requests, 40);
    assert_eq!(config.source, SourceChoice::Auto);
    assert_eq!(config.proc_interval, Duration::from_secs(5));
    assert_eq!(config.ring_buffer_bytes, 8_388_608);
    assert!(config.exclude_loopback && config.exclude.is_empty());
    assert_eq!((config.ports_max, config.connections_max), (128, 1_048_576));
    assert!(config.listeners && config.listeners_max == 512);
    assert_eq!(config.cross, CrossFamilies::Off);
    assert_eq!(config.reconcile_interval, Duration::from_secs(60));
    assert_eq!(config.traffic_interval, Some(Duration::from_secs(15)));
    assert!(config.all_netns && !config.bpf_stats && !config.demo);
    assert_eq!(config.log_level, log::LevelFilter::Info);
}

#[test]
fn flag_beats_environment_beats_file() {
    let file = Scratch::new(
        "order",
        "ports.max: 1\nlisteners.max: 1\nproc.interval: 1s\nfilter.exclude: [10.0.0.0/8, \"::/0\"]\n",
    );
    let path = file.0.to_str().unwrap();
    let loaded = with(
        &[("config.file", path), ("ports.max", "3")],
        &[
            ("CONNMON_PORTS_MAX", "2"),
            ("CONNMON_LISTENERS_MAX", "2"),
            ("CONNMON_WEB_LISTEN_ADDRESS", "127.0.0.1:1, [::1]:1"),
            ("CONNMON_PORT", "tcp://10.0.0.1:19910"),
            ("CONNMON_SOURCE", ""),
            ("HOME", "/root"),
        ],
    )
    .unwrap();
    let config = loaded.config;
    assert_eq!((config.ports_max, config.listeners_max), (3, 2));
    assert_eq!(config.proc_interval, Duration::from_secs(1));
    assert_eq!(config.exclude.len(), 2);
    assert_eq!(config.listen.len(), 2);
    assert_eq!(config.source, SourceChoice::Auto);
    let unknown: Vec<log::Level> = loaded
        .unknown_variables
        .iter()
        .map(|(level, _)| *level)
        .collect();
    assert_eq!(unknown, [log::Level::Debug]);
}

#[test]
fn refusals_name_source_value_and_remedy() {
    let file = Scratch::new("refuse", "ports.max: 5\nproc.interval: 5\n");
    let path = file.0.to_str().unwrap();
    for (flags, environment, message) in [
        (
            &[("proc.interval", "0")][..],
            &[][..],
            "--proc.interval: bad duration \"0\": must be between 100ms and 1h",
        ),
        (
            &[],
            &[("CONNMON_PORTS_MAX", "-1")],
            "CONNMON_PORTS_MAX: bad number \"-1\"",
        ),
        (
            &[("config.file", path)],
            &[],
            "yml:2: proc.interval: bad duration \"5\"",
        ),
        (
            &[
                ("filter.exclude", "10.0.0.0/8"),
                ("filter.exclude", "banana/8"),
            ],
            &[],
            "--filter.exclude: bad network \"banana/8\"",
        ),
        (
            &[("web.listen-address", ":1"), ("web.listen-address", ":1")],
            &[],
            "duplicate address \":1\"",
        ),
        (
            &[("web.listen-address", "127.0.0.1:9,127.0.0.1:9")],
            &[],
            "duplicate address",
        ),
        (
            &[
                ("web.listen-address", ":7"),
                ("web.listen-address", "127.0.0.1:7"),
            ],
            &[],
            "overlaps \":7\"",
        ),
        (
            &[("source", "bpf")],
            &[],
            "--source: bad value \"bpf\": must be one of auto, ebpf, proc",
        ),
        (&[("listeners.max", "0")], &[], "--listeners off"),
        (
            &[("traffic.interval", "1ms")],
            &[],
            "or 0 to switch sampling off",
        ),
        (
            &[("reconcile.interval", "0")],
            &[],
            "--reconcile.interval: bad duration",
        ),
        (
            &[("geoip.database", "")],
            &[],
            "--geoip.database: bad value \"\"",
        ),
        (
            &[("log.level", "loud")],
            &[],
            "must be one of error, warn, info, debug, trace",
        ),
        (
            &[("config.check", "maybe")],
            &[],
            "--config.check: bad value \"maybe\"",
        ),
        (&[("web.listen-address", "")], &[], "a port is missing"),
    ] {
        let error = with(flags, environment).unwrap_err();
        assert!(
            error.contains(message),
            "{flags:?} {environment:?}: {error}"
        );
    }
}

#[test]
fn addresses_that_fight_for_one_port_are_refused() {
    for (first, second) in [
        ("0.0.0.0:9", "127.0.0.1:9"),
        ("127.0.0.1:9", "0.0.0.0:9"),
        ("[::]:9", "0.0.0.0:9"),
        ("[::]:9", "[::1]:9"),
        (":9", "127.0.0.1:9"),
        (":9", "[::]:9"),
        ("[::ffff:127.0.0.1]:9", "127.0.0.1:9"),
    ] {
        let flags = [
            ("web.listen-address", first),
            ("web.listen-address", second),
        ];
        let error = with(&flags, &[]).unwrap_err();
        assert!(error.contains(second), "{first} {second}: {error}");
    }
    for (first, second) in [
        ("0.0.0.0:9", "[::1]:9"),
        ("[fe80::1%2]:9", "[fe80::1%3]:9"),
        ("[::]:9", "0.0.0.0:10"),
    ] {
        let flags = [
            ("web.listen-address", first),
            ("web.listen-address", second),
        ];
        assert!(with(&flags, &[]).is_ok(), "{first} {second}");
    }
}

#[test]
fn an_item_of_a_list_is_named_with_its_own_line() {
    for (text, message) in [
        (
            "ports.allow:\n  - 22\n  - 80\n  - http\n",
            ":4: ports.allow: bad port \"http\"",
        ),
        (
            "metrics.country-port:\n- 22\n- all\n- 80\n",
            ":3: metrics.country-port: bad port \"all\"",
        ),
        (
            "ports.max: 1\nweb.listen-address:\n  - \":80\"\n  - \":81\"\n  - \":80\"\n",
            ":5: web.listen-address: duplicate address \":80\"",
        ),
    ] {
        let file = Scratch::new("items", text);
        let error = with(&[("config.file", file.0.to_str().unwrap())], &[]).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
    let file = Scratch::new("good-items", "ports.allow:\n  - 22\n  - 80-90\n");
    let loaded = with(&[("config.file", file.0.to_str().unwrap())], &[]).unwrap();
    assert_eq!(loaded.config.ports_allow, Some(vec![(22, 22), (80, 90)]));
}

#[test]
fn an_empty_list_is_named_with_its_line() {
    for key in ["web.listen-address", "ports.allow", "metrics.country-port"] {
        let file = Scratch::new("empty", &format!("ports.max: 1\n{key}: []\n"));
        let path = file.0.to_str().unwrap();
        let error = with(&[("config.file", path)], &[]).unwrap_err();
        assert_eq!(
            error,
            format!(
                "--config.file: {path}:2: {key}: the list is empty; give a value or remove the key"
            )
        );
    }
    let file = Scratch::new("no-networks", "filter.exclude: []\n");
    let loaded = with(&[("config.file", file.0.to_str().unwrap())], &[]).unwrap();
    assert!(loaded.config.exclude.is_empty());
}

#[test]
fn config_check_alone_checks_overridden_values() {
    let file = Scratch::new("overridden", "\nports.max: many\n");
    let flags = [
        ("config.file", file.0.to_str().unwrap()),
        ("ports.max", "3"),
        ("config.check", "true"),
    ];
    let error = with(&flags, &[]).unwrap_err();
    assert!(
        error.contains(":2: ports.max: bad number \"many\""),
        "{error}"
    );
    assert_eq!(with(&flags[..2], &[]).unwrap().config.ports_max, 3);
    for (name, message) in [
        ("CONNMON_PORTS_MAX", "CONNMON_PORTS_MAX: bad number"),
        ("CONNMON_CONFIG_CHECK", "CONNMON_CONFIG_CHECK: bad value"),
    ] {
        let error = with(&flags[1..], &[(name, "x")]).unwrap_err();
        assert!(error.contains(message), "{error}");
    }
}

#[test]
fn zero_ports_and_separate_hosts_are_no_duplicates() {
    let flags = [
        ("web.listen-address", "127.0.0.1:0"),
        ("web.listen-address", "127.0.0.1:0,[::1]:80,127.0.0.1:80"),
    ];
    assert_eq!(with(&flags, &[]).unwrap().config.listen.len(), 4);
    let none = with(&[("traffic.interval", "0")], &[("CONNMON_DEMO", "1")])
        .unwrap()
        .config;
    assert!(none.traffic_interval.is_none() && none.demo);
}

#[test]
fn a_variable_one_slip_away_is_warned_about() {
    for (name, level, near) in [
        (
            "CONNMON_PORT_MAX",
            log::Level::Warn,
            Some("CONNMON_PORTS_MAX"),
        ),
        ("CONNMON_SUORCE", log::Level::Warn, Some("CONNMON_SOURCE")),
        ("CONNMON_NETN", log::Level::Warn, Some("CONNMON_NETNS")),
        ("CONNMON_PORT", log::Level::Debug, None),
        ("CONNMON_SERVICE_HOST", log::Level::Debug, None),
    ] {
        let unknown = with(&[], &[(name, "1")]).unwrap().unknown_variables;
        let near = near.map_or("is ignored".to_owned(), |near| {
            format!("did you mean {near}?")
        });
        let (logged, message) = &unknown[0];
        assert_eq!(*logged, level, "{message}");
        assert!(
            message.contains(name) && message.ends_with(&near),
            "{message}"
        );
    }
}

#[test]
fn the_log_format_of_a_refused_line_is_found() {
    for (line, format) in [
        ("connmon --no.such --log.format=json", LogFormat::Json),
        ("connmon run --log.format json --no.such", LogFormat::Json),
        ("connmon --log.format", LogFormat::Logfmt),
        ("connmon --log.formats=json json", LogFormat::Logfmt),
    ] {
        let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        assert_eq!(log_format(&words, &[]), format, "{line}");
    }
}

//! The telemetry text: all families, the budget, hostile names.

#[path = "support/mod.rs"]
mod support;
#[path = "support/report.rs"]
mod synthetic;

use std::collections::HashSet;
use std::path::Path;

use connmon::expose::families::{FAMILIES, Kind};
use connmon::expose::metrics::Metrics;
use connmon::expose::process::ProcessStats;
use connmon_core::geo::Country;
use connmon_core::probe::Method;
use connmon_core::report::{Report, Source};
use support::{promtool, samples};
use synthetic::Size;

/// A few rows in every family.
const SMALL: Size = Size {
    countries: 2,
    ports: 2,
    cross: 2,
    listeners: 2,
};

/// Every cap of the contract's defaults at once, cross families aside.
const FULL: Size = Size {
    countries: Country::COUNT,
    ports: 128,
    cross: 0,
    listeners: 512,
};

const PROCESS: ProcessStats = ProcessStats {
    cpu_seconds: 1.23,
    open_fds: 17.0,
    max_fds: 1_024.0,
    virtual_memory_bytes: 104_857_600.0,
    virtual_memory_max_bytes: u64::MAX as f64,
    resident_memory_bytes: 12_345_344.0,
    start_time_seconds: 1_761_955_200.25,
};

fn render(report: &Report) -> String {
    text(&mut Metrics::new(), report)
}

fn text(metrics: &mut Metrics, report: &Report) -> String {
    String::from_utf8(metrics.render_with(report, Some(PROCESS)).to_vec()).unwrap()
}

/// Every line of a valid scrape: unique series, finite values.
fn check(text: &str) {
    let mut seen = HashSet::new();
    for (series, value) in samples(text) {
        assert!(seen.insert(series), "twice: {series}");
        assert!(value.is_finite(), "{series} {value}");
    }
}

/// One line differs from build to build.
fn without_build(text: &str) -> String {
    text.lines()
        .map(|line| match line.starts_with("connmon_build_info{") {
            true => "connmon_build_info{version=\"V\",revision=\"R\",branch=\"B\",rustversion=\"C\",target=\"T\"} 1\n".to_owned(),
            false => format!("{line}\n"),
        })
        .collect()
}

/// Regenerate with `UPDATE_GOLDEN=1 cargo test -p connmon --test metrics`.
#[test]
fn golden_scrape() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/golden.prom");
    let text = without_build(&render(&synthetic::report(SMALL)));
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &text).unwrap();
    }
    let golden = std::fs::read_to_string(&path).unwrap();
    for (ours, golden) in text.lines().zip(golden.lines()) {
        assert_eq!(ours, golden, "differs from fixtures/golden.prom");
    }
    assert_eq!(text, golden);
    for family in FAMILIES {
        let kind = match family.kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Summary => "summary",
            Kind::Histogram => "histogram",
        };
        let header = format!(
            "# HELP {0} {1}\n# TYPE {0} {kind}\n",
            family.name, family.help
        );
        assert!(golden.contains(&header), "{header}");
    }
    check(&golden);
    promtool("golden scrape", &golden);
}

type Promise = (&'static str, Kind, &'static [&'static str]);

/// What dashboards and alerts hold on to, written out once more: a renamed
/// family or label fails here, whatever the golden scrape was updated to.
#[rustfmt::skip]
const PROMISED: &[Promise] = {
    use Kind::{Counter, Gauge, Histogram, Summary};
    &[
        ("connmon_country_connections", Gauge, &["country", "direction"]),
        ("connmon_country_connections_opened_total", Counter, &["country", "direction"]),
        ("connmon_country_connections_closed_total", Counter, &["country", "direction"]),
        ("connmon_country_connect_failures_total", Counter, &["country", "reason"]),
        ("connmon_country_received_bytes_total", Counter, &["country", "direction"]),
        ("connmon_country_sent_bytes_total", Counter, &["country", "direction"]),
        ("connmon_country_retransmitted_segments_total", Counter, &["country", "direction"]),
        ("connmon_country_connect_latency_seconds", Summary, &["country"]),
        ("connmon_country_rtt_seconds", Summary, &["country"]),
        ("connmon_port_connections", Gauge, &["port", "direction"]),
        ("connmon_port_connections_opened_total", Counter, &["port", "direction"]),
        ("connmon_port_connections_closed_total", Counter, &["port", "direction"]),
        ("connmon_port_received_bytes_total", Counter, &["port", "direction"]),
        ("connmon_port_sent_bytes_total", Counter, &["port", "direction"]),
        ("connmon_port_retransmitted_segments_total", Counter, &["port", "direction"]),
        ("connmon_port_connect_failures_total", Counter, &["port", "reason"]),
        ("connmon_port_accept_wait_seconds", Summary, &["port"]),
        ("connmon_port_close_wait_connections", Gauge, &["port", "direction"]),
        ("connmon_country_port_connections", Gauge, &["country", "port", "direction"]),
        ("connmon_country_port_connections_opened_total", Counter, &["country", "port", "direction"]),
        ("connmon_state_connections", Gauge, &["state"]),
        ("connmon_connect_latency_seconds", Histogram, &[]),
        ("connmon_accept_wait_seconds", Histogram, &[]),
        ("connmon_rtt_seconds", Histogram, &["direction"]),
        ("connmon_connection_duration_seconds", Histogram, &["direction"]),
        ("connmon_listening_socket_info", Gauge, &["netns", "address", "port", "process", "pid"]),
        ("connmon_accept_queue_length", Gauge, &["netns", "address", "port"]),
        ("connmon_accept_queue_limit", Gauge, &["netns", "address", "port"]),
        ("connmon_up", Gauge, &[]),
        ("connmon_build_info", Gauge, &["version", "revision", "branch", "rustversion", "target"]),
        ("process_cpu_seconds_total", Counter, &[]),
        ("process_max_fds", Gauge, &[]),
        ("process_open_fds", Gauge, &[]),
        ("process_resident_memory_bytes", Gauge, &[]),
        ("process_start_time_seconds", Gauge, &[]),
        ("process_virtual_memory_bytes", Gauge, &[]),
        ("process_virtual_memory_max_bytes", Gauge, &[]),
        ("connmon_source_info", Gauge, &["source"]),
        ("connmon_probe_attached", Gauge, &["probe", "method"]),
        ("connmon_events_produced_total", Counter, &[]),
        ("connmon_events_folded_total", Counter, &[]),
        ("connmon_events_dropped_total", Counter, &["reason"]),
        ("connmon_probe_missed_runs_total", Counter, &["probe"]),
        ("connmon_missed_closes_total", Counter, &[]),
        ("connmon_unattributed_events_total", Counter, &[]),
        ("connmon_tracked_connections", Gauge, &[]),
        ("connmon_untracked_connections", Gauge, &[]),
        ("connmon_table_overflow_total", Counter, &[]),
        ("connmon_series_overflow_total", Counter, &["family"]),
        ("connmon_series_evicted_total", Counter, &["family"]),
        ("connmon_reconcile_runs_total", Counter, &["trigger"]),
        ("connmon_reconcile_duration_seconds", Gauge, &[]),
        ("connmon_reconcile_interval_seconds", Gauge, &[]),
        ("connmon_reconcile_corrections_total", Counter, &["action"]),
        ("connmon_drift_connections", Gauge, &[]),
        ("connmon_drift_suspected_connections", Gauge, &[]),
        ("connmon_network_namespaces", Gauge, &["access"]),
        ("connmon_geoip_database_info", Gauge, &["database_type", "source"]),
        ("connmon_geoip_database_build_timestamp_seconds", Gauge, &[]),
        ("connmon_geoip_reloads_total", Counter, &["result"]),
        ("connmon_bpf_program_runs_total", Counter, &["program"]),
        ("connmon_bpf_program_run_seconds_total", Counter, &["program"]),
    ]
};

#[test]
fn the_contract_is_kept_by_name_type_and_labels() {
    for (name, kind, labels) in PROMISED {
        let Some(family) = FAMILIES.iter().find(|family| family.name == *name) else {
            panic!("no family {name}");
        };
        assert_eq!((family.kind, family.labels), (*kind, *labels), "{name}");
    }
    // Adding is fine, and written down here when it becomes a promise.
    let more: Vec<&str> = FAMILIES
        .iter()
        .map(|family| family.name)
        .filter(|name| !PROMISED.iter().any(|(promised, ..)| promised == name))
        .collect();
    assert_eq!(more, ["connmon_demo", "connmon_tombstone_overflow_total"]);
}

/// Values of labels that are part of the promise, as a scrape has them.
#[test]
fn fixed_label_values_are_the_promised_ones() {
    let text = render(&synthetic::report(SMALL));
    for (family, label, values) in [
        (
            "connmon_country_connect_failures_total",
            "reason",
            &[
                "aborted",
                "host_unreachable",
                "local",
                "network_unreachable",
                "other",
                "refused",
                "reset",
                "timeout",
            ][..],
        ),
        (
            "connmon_state_connections",
            "state",
            &[
                "close_wait",
                "closing",
                "established",
                "fin_wait1",
                "fin_wait2",
                "last_ack",
                "syn_recv",
                "syn_sent",
            ],
        ),
        (
            "connmon_events_dropped_total",
            "reason",
            &["ring_full", "undecodable"],
        ),
        (
            "connmon_network_namespaces",
            "access",
            &["diag", "proc", "unaudited"],
        ),
        (
            "connmon_reconcile_runs_total",
            "trigger",
            &["interval", "loss", "startup"],
        ),
        (
            "connmon_reconcile_corrections_total",
            "action",
            &["added", "removed", "seeded", "updated"],
        ),
        (
            "connmon_probe_attached",
            "probe",
            &["inet_csk_accept", "inet_sock_set_state", "tcp_connect"],
        ),
        (
            "connmon_country_connections",
            "direction",
            &["inbound", "outbound", "unknown"],
        ),
        (
            "connmon_series_overflow_total",
            "family",
            &["country_port", "listener", "port"],
        ),
        (
            "connmon_series_evicted_total",
            "family",
            &["country_port", "port"],
        ),
    ] {
        let mut found: Vec<&str> = samples(&text)
            .into_iter()
            .filter_map(|(series, _)| series.strip_prefix(family)?.strip_prefix('{'))
            .map(|labels| {
                let (_, after) = labels.split_once(&format!("{label}=\"")).unwrap();
                after.split('"').next().unwrap()
            })
            .collect();
        found.sort_unstable();
        found.dedup();
        assert_eq!(found, values, "{family}");
    }
}

/// `connmon_build_info` and `--version` describe the same build.
#[test]
fn build_info_matches_version() {
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_connmon"))
        .arg("--version")
        .output()
        .unwrap();
    let version = String::from_utf8(output.stdout).unwrap();
    let text = render(&synthetic::report(SMALL));
    let line = text
        .lines()
        .find(|line| line.starts_with("connmon_build_info{"))
        .unwrap();
    let label = |name: &str| {
        let (_, after) = line.split_once(&format!("{name}=\"")).unwrap();
        let value = after.split('"').next().unwrap();
        assert!(!value.is_empty(), "{name}");
        value
    };
    let (number, branch, revision) = (label("version"), label("branch"), label("revision"));
    assert_eq!(
        version.lines().next().unwrap(),
        format!("connmon, version {number} (branch: {branch}, revision: {revision})")
    );
    for (title, name) in [("rust version:", "rustversion"), ("platform:", "target")] {
        let printed = version
            .lines()
            .find_map(|line| line.trim().strip_prefix(title));
        assert_eq!(printed.map(str::trim), Some(label(name)));
    }
    assert_eq!(number, env!("CARGO_PKG_VERSION"));
}

#[test]
fn every_cap_together_stays_under_budget() {
    let text = render(&synthetic::report(FULL));
    check(&text);
    let count = samples(&text).len();
    println!("every cap: {count} samples, {} bytes", text.len());
    assert!(count < 15_000, "{count}");
    // 512 listeners, 253 countries, 129 inbound ports really are there.
    for (family, rows) in [
        ("connmon_listening_socket_info{", 512),
        ("connmon_country_connections{", 253 * 3),
        ("connmon_port_connections{", 129 * 2 + 1),
        ("connmon_country_connect_failures_total{", 253 * 8),
    ] {
        assert_eq!(text.matches(family).count(), rows, "{family}");
    }
    let crossed = render(&synthetic::report(Size {
        cross: 2_000,
        ..FULL
    }));
    let count = samples(&crossed).len();
    println!("with cross families: {count} samples");
    assert!(count < 20_000, "{count}");
    promtool("scrape at every cap", &crossed);
}

#[test]
fn hostile_names_leave_the_scrape_valid() {
    let mut report = synthetic::report(SMALL);
    let hostile = [
        "\u{fffd}\n\"",
        "a\\",
        "{}\"} 1",
        "<script>",
        "\r\t\u{1b}\u{0}",
        "",
    ];
    report.snapshot.listeners = hostile
        .iter()
        .zip(1..)
        .map(|(name, port)| {
            let mut row = report.snapshot.listeners[0].clone();
            row.process = (*name).to_owned();
            row.port = port;
            row
        })
        .collect();
    report.status.database.database_type = "\"<script>\\\n".to_owned();
    report.status.programs[0].program = "x\"\n".to_owned();
    let text = render(&report);
    check(&text);
    assert!(text.contains(r#"process="�\n\"""#));
    assert!(text.contains(r#"database_type="\"<script>\\\n""#));
    promtool("hostile names", &text);
}

#[test]
fn what_is_not_known_is_absent() {
    let has = |text: &str, family: &str| text.contains(&format!("# TYPE {family} "));
    let traffic = [
        "connmon_country_received_bytes_total",
        "connmon_country_rtt_seconds",
        "connmon_port_sent_bytes_total",
        "connmon_port_retransmitted_segments_total",
        "connmon_rtt_seconds",
    ];
    let accept = [
        "connmon_accept_wait_seconds",
        "connmon_port_accept_wait_seconds",
    ];
    let connect = [
        "connmon_connect_latency_seconds",
        "connmon_country_connect_latency_seconds",
        "connmon_country_connect_failures_total",
        "connmon_port_connect_failures_total",
    ];
    let optional = [
        "connmon_drift_connections",
        "connmon_drift_suspected_connections",
        "connmon_probe_missed_runs_total",
        "connmon_bpf_program_runs_total",
        "connmon_country_port_connections",
        "connmon_listening_socket_info",
        "connmon_demo",
    ];
    let mut report = synthetic::report(SMALL);
    let mut metrics = Metrics::new();
    let full = text(&mut metrics, &report);
    for family in [&traffic[..], &accept, &connect, &optional].concat() {
        assert!(has(&full, family), "{family}");
    }
    report.snapshot.traffic_known = false;
    report.snapshot.accept_known = false;
    report.snapshot.drift = None;
    report.snapshot.drift_suspected = None;
    report.snapshot.cross.clear();
    report.snapshot.listeners.clear();
    report.status.missed_runs.clear();
    report.status.programs.clear();
    report.status.demo = false;
    report.status.source = Source::Proc;
    for rung in &mut report.status.rungs {
        rung.method = Method::None;
    }
    // By the same renderer: rows of the scrape before must not stay.
    let bare = text(&mut metrics, &report);
    for family in [&traffic[..], &accept, &connect, &optional].concat() {
        assert!(!has(&bare, family), "{family}");
    }
    assert!(bare.contains("connmon_source_info{source=\"proc\"} 1\n"));
    assert!(!bare.contains("source=\"ebpf\""));
    assert!(bare.contains("connmon_probe_attached{probe=\"tcp_connect\",method=\"none\"} 0\n"));
    assert!(!bare.contains("method=\"tp_btf\""));
    promtool("bare scrape", &bare);
    assert_eq!(without_build(&bare), without_build(&render(&report)));
}

/// A renderer that has seen other reports writes what a new one writes.
#[test]
fn earlier_scrapes_do_not_change_a_scrape() {
    let mut metrics = Metrics::new();
    for (countries, ports, cross, listeners) in [
        (253, 128, 2_000, 512),
        (3, 2, 0, 1),
        (100, 60, 700, 300),
        (0, 0, 0, 0),
        (253, 128, 2_000, 512),
    ] {
        let mut report = synthetic::report(Size {
            countries,
            ports,
            cross,
            listeners,
        });
        if countries == 100 {
            report
                .snapshot
                .countries
                .retain(|row| row.country.index() % 3 != 0);
            report.snapshot.ports.reverse();
            report.snapshot.listeners.reverse();
            report.status.database.reloads_ok += 1;
            report.status.database.database_type = "Other".to_owned();
        }
        assert_eq!(text(&mut metrics, &report), render(&report));
    }
}

#[test]
fn the_own_process_is_in_every_scrape() {
    let report = synthetic::report(SMALL);
    let text = Metrics::new().render(&report);
    let text = std::str::from_utf8(&text).unwrap();
    for name in [
        "process_cpu_seconds_total",
        "process_max_fds",
        "process_open_fds",
        "process_resident_memory_bytes",
        "process_start_time_seconds",
        "process_virtual_memory_bytes",
        "process_virtual_memory_max_bytes",
    ] {
        let sample = samples(text)
            .into_iter()
            .find(|(series, _)| *series == name);
        assert!(sample.is_some_and(|(_, value)| value >= 0.0), "{name}");
    }
}

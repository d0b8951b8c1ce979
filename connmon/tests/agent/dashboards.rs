//! What Prometheus and Grafana make of the agent: rules by promtool, and
//! every query of the dashboard against a real Prometheus that scrapes a real
//! agent.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use connmon::expose::families::FAMILIES;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{Agent, PATIENCE, Scrape};
use crate::namespaces;
use crate::support::skipped;
use crate::world::World;

/// Every panel has this long to show something.
const PANELS_WITHIN: Duration = Duration::from_secs(60);

fn deploy(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(file)
        .canonicalize()
        .unwrap()
}

fn read(file: &str) -> String {
    std::fs::read_to_string(deploy(file)).unwrap()
}

fn promtool(arguments: &[&str]) {
    let output = Command::new("promtool")
        .args(arguments)
        .current_dir(deploy("prometheus"))
        .output();
    match output {
        Err(error) => skipped(&format!("promtool {arguments:?}"), &error.to_string()),
        Ok(output) => assert!(
            output.status.success(),
            "promtool {arguments:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        ),
    }
}

#[test]
fn rules_pass_promtool_and_their_own_tests() {
    promtool(&["check", "rules", "rules-recording.yml", "alerts.yml"]);
    promtool(&["check", "config", "scrape.yml"]);
    promtool(&["test", "rules", "alerts_test.yml", "new_country_test.yml"]);
}

/// Each alert is expected to fire somewhere, and to be quiet somewhere.
#[test]
fn every_alert_has_a_test() {
    let tests = read("prometheus/alerts_test.yml") + &read("prometheus/new_country_test.yml");
    let alerts = read("prometheus/alerts.yml");
    let names: Vec<_> = alerts
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
        .collect();
    assert!(names.len() >= 12, "{names:?}");
    for name in names {
        let fires = tests
            .split(&format!("alertname: {name}\n"))
            .skip(1)
            .any(|rest| {
                let case = rest.split("alertname: ").next().unwrap();
                case.contains("exp_labels")
            });
        assert!(fires, "no test has {name} fire");
    }
}

/// Metrics that dashboards, rules and alerts name exist.
#[test]
fn nothing_names_a_metric_that_does_not_exist() {
    for file in [
        "grafana/connmon.json",
        "prometheus/rules-recording.yml",
        "prometheus/alerts.yml",
    ] {
        let text = read(file);
        let named = metrics(&text);
        assert!(named.len() > 5, "{file}: {named:?}");
        for name in named {
            assert!(known(&name), "{file} names {name}");
        }
    }
}

/// What Grafana would refuse, since the test has no Grafana.
#[test]
fn the_dashboard_is_consistent() {
    let dashboard: Value = serde_json::from_str(&read("grafana/connmon.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let mut ids = BTreeSet::new();
    let mut cells = BTreeSet::new();
    for panel in panels {
        let title = &panel["title"];
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "id of {title}");
        let at = |key: &str| panel["gridPos"][key].as_u64().unwrap();
        assert!(at("x") + at("w") <= 24, "{title} is too wide");
        for x in at("x")..at("x") + at("w") {
            for y in at("y")..at("y") + at("h") {
                assert!(cells.insert((x, y)), "{title} lies on another panel");
            }
        }
        let mut letters = BTreeSet::new();
        for target in panel["targets"].as_array().into_iter().flatten() {
            assert!(letters.insert(target["refId"].as_str().unwrap()), "{title}");
            assert_eq!(target["datasource"]["uid"], "${datasource}", "{title}");
        }
    }
    let variables: Vec<_> = dashboard["templating"]["list"]
        .as_array()
        .unwrap()
        .iter()
        .map(|variable| variable["name"].as_str().unwrap())
        .collect();
    assert_eq!(
        variables,
        ["datasource", "job", "instance", "direction", "port"]
    );
    let map = panels
        .iter()
        .find(|panel| panel["type"] == "geomap")
        .unwrap();
    let target = &map["targets"][0];
    assert_eq!(target["instant"], true);
    assert_eq!(target["format"], "table");
    assert!(
        target["expr"]
            .as_str()
            .unwrap()
            .contains("country=~\"[A-Z]{2}\"")
    );
    let location = &map["options"]["layers"][0]["location"];
    assert_eq!(location["mode"], "lookup");
    assert_eq!(location["lookup"], "country");
    assert!(read("grafana/connmon.json").contains("https://db-ip.com"));
}

#[test]
fn every_panel_shows_data() {
    if !namespaces::may_run("dashboards against a real Prometheus") {
        return;
    }
    let world = World::new();
    let database = world.database();
    let agent = Agent::start(&[
        "--geoip.database",
        database.to_str().unwrap(),
        "--metrics.country-port",
        "22",
        "--reconcile.interval",
        "2s",
        "--traffic.interval",
        "1s",
        "--ebpf.stats",
    ]);
    let Some(prometheus) = Prometheus::start(agent.address()) else {
        return;
    };
    let held = [world.inbound("DE", 22, 3), world.outbound("US", 443, 2)];
    let bustle = world.bustle();
    let dashboard: Value = serde_json::from_str(&read("grafana/connmon.json")).unwrap();
    let mut missing = queries(&dashboard);
    assert!(missing.len() > 60, "{}", missing.len());
    let rule = "country:connmon_country_connections:sum{country=\"DE\"}";
    missing.push(("a recording rule".to_owned(), rule.to_owned()));
    let until = Instant::now() + PANELS_WITHIN;
    let scrape = loop {
        sleep(Duration::from_secs(1));
        missing.retain(|(_, query)| !prometheus.has(query));
        let scrape = agent.scrape();
        let late = |(_, query): &(String, String)| absent(query, &scrape).is_none();
        if !missing.iter().any(late) || Instant::now() > until {
            break scrape;
        }
    };
    let mut empty = Vec::new();
    for (panel, query) in missing {
        match absent(&query, &scrape) {
            Some(name) => println!("not applicable: panel {panel:?}: {name} is absent here"),
            None => empty.push(format!("{panel}: {query}")),
        }
    }
    assert!(empty.is_empty(), "no data:\n{}", empty.join("\n"));

    // The traffic of the test makes more than zeros.
    let mut made = Vec::new();
    for family in [
        "opened_total",
        "closed_total",
        "connect_failures_total",
        "received_bytes_total",
        "sent_bytes_total",
        "rtt_seconds_count",
    ] {
        for (_, query) in queries(&dashboard) {
            let named = metrics(&query);
            // Shares may be 0.
            let plain = named.len() == 1 && !query.contains('/') && !query.contains("local");
            let of = |name: &String| name.ends_with(family) && name.contains("country");
            if plain && named.iter().any(of) && absent(&query, &scrape).is_none() {
                made.push(query);
            }
        }
    }
    assert!(made.len() >= 5, "{made:#?}");
    for query in made {
        let until = Instant::now() + PATIENCE;
        while !prometheus.query(&query).iter().any(|value| *value > 0.0) {
            assert!(Instant::now() < until, "{query} is never more than 0");
            sleep(Duration::from_millis(200));
        }
    }

    // The numbers are right: connections that this test holds.
    let sure = |query: &str, value: f64| {
        let until = Instant::now() + PATIENCE;
        loop {
            let got = prometheus.value(query);
            if got == Some(value) {
                return;
            }
            assert!(Instant::now() < until, "{query} is {got:?}, not {value}");
            sleep(Duration::from_millis(200));
        }
    };
    drop(bustle);
    sure(
        "sum(connmon_country_port_connections{port=\"22\",country=\"DE\",direction=\"inbound\"})",
        3.0,
    );
    sure(
        "sum(country:connmon_country_connections:sum{country=\"US\"})",
        2.0,
    );
    sure("up{job=\"connmon\"}", 1.0);
    drop(held);
    agent.stop();
}

/// (panel, query) of every target of a dashboard, variables filled in.
fn queries(dashboard: &Value) -> Vec<(String, String)> {
    let mut found = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let Some(targets) = panel["targets"].as_array() else {
            continue;
        };
        for target in targets {
            let expression = target["expr"].as_str().unwrap();
            let query = expression
                .replace("$__rate_interval", "10s")
                .replace("$__range", "30s")
                .replace("$job", "connmon")
                .replace("$instance", ".*")
                .replace("$direction", ".*")
                .replace("$port", "22");
            assert!(!query.contains('$'), "a variable is left in {query}");
            found.push((panel["title"].as_str().unwrap().to_owned(), query));
        }
    }
    found
}

/// Names of connmon's and the process's metrics in a text.
fn metrics(text: &str) -> BTreeSet<String> {
    let part = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    text.split(part)
        .filter(|word| word.starts_with("connmon_") || word.starts_with("process_"))
        .map(str::to_owned)
        .collect()
}

/// Whether there is such a metric, or a recorded sighting named after one.
fn known(name: &str) -> bool {
    let family = |name: &str| FAMILIES.iter().any(|family| family.name == name);
    let recorded = ["connmon_country_seen"];
    family(name)
        || recorded.contains(&name)
        || ["_sum", "_count", "_bucket", "_total"]
            .iter()
            .any(|suffix| name.strip_suffix(suffix).is_some_and(family))
        // Names of recording rules leave `_total` out.
        || family(&format!("{name}_total"))
        || name == "connmon_country_retransmitted_bytes"
}

/// A metric of the query that this kernel, source or probe does not give;
/// the contract has such families absent rather than zero. With `tp_btf`
/// every close has its traffic, so no traffic family may be absent then.
fn absent(query: &str, scrape: &Scrape) -> Option<String> {
    let no_accepts = scrape.get(
        "connmon_probe_attached",
        &[("probe", "inet_csk_accept"), ("method", "none")],
    ) == Some(0.0);
    let traffic = scrape.get(
        "connmon_probe_attached",
        &[("probe", "inet_sock_set_state"), ("method", "tp_btf")],
    ) == Some(1.0);
    metrics(query).into_iter().find(|name| match name.as_str() {
        name if name.contains("accept_wait") => no_accepts,
        "connmon_probe_missed_runs_total" | "connmon_bpf_program_run_seconds_total" => {
            !scrape.has(name)
        }
        name if name.contains("bytes") || name.contains("segments") || name.contains("rtt") => {
            !traffic
        }
        _ => false,
    })
}

/// A Prometheus that scrapes one agent each second and evaluates our rules.
struct Prometheus {
    child: Child,
    url: String,
    client: ureq::Agent,
    _directory: TempDir,
}

impl Prometheus {
    fn start(agent: &str) -> Option<Self> {
        let directory = TempDir::with_prefix("connmon-prometheus-").unwrap();
        let config = directory.path().join("prometheus.yml");
        let rules = deploy("prometheus/rules-recording.yml");
        let alerts = deploy("prometheus/alerts.yml");
        std::fs::write(
            &config,
            format!(
                "global: {{scrape_interval: 1s, scrape_timeout: 1s, evaluation_interval: 1s}}\n\
                 rule_files: [{rules:?}, {alerts:?}]\n\
                 scrape_configs:\n\
                 - job_name: connmon\n  \
                   static_configs: [{{targets: [{agent:?}]}}]\n"
            ),
        )
        .unwrap();
        // An address of this process alone: one that was only free a moment
        // ago, another test may have taken.
        let [_, _, high, low] = std::process::id().to_be_bytes();
        let address = SocketAddr::from((Ipv4Addr::new(127, 90, high, low), 9090));
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", config.display()))
            .arg(format!(
                "--storage.tsdb.path={}",
                directory.path().join("data").display()
            ))
            .arg(format!("--web.listen-address={address}"))
            .arg("--log.level=warn")
            .stdin(Stdio::null())
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(error) => {
                skipped("dashboards", &format!("prometheus: {error}"));
                return None;
            }
        };
        let client: ureq::Agent = ureq::Agent::config_builder()
            .timeout_global(Some(PATIENCE))
            .proxy(None)
            .build()
            .into();
        let prometheus = Self {
            child,
            url: format!("http://{address}"),
            client,
            _directory: directory,
        };
        let until = Instant::now() + PATIENCE;
        let ready = format!("{}/-/ready", prometheus.url);
        while prometheus.client.get(&ready).call().is_err() {
            assert!(Instant::now() < until, "Prometheus is not ready");
            sleep(Duration::from_millis(50));
        }
        Some(prometheus)
    }

    fn query(&self, query: &str) -> Vec<f64> {
        let mut answer = self
            .client
            .post(&format!("{}/api/v1/query", self.url))
            .send_form([("query", query)])
            .unwrap_or_else(|error| panic!("{query}: {error}"));
        let answer: Value = answer.body_mut().read_json().unwrap();
        let result = &answer["data"]["result"];
        let value = |sample: &Value| sample["value"][1].as_str().unwrap().parse().unwrap();
        result.as_array().unwrap().iter().map(value).collect()
    }

    /// Whether there is a sample that is a number.
    fn has(&self, query: &str) -> bool {
        self.query(query).iter().any(|value| !value.is_nan())
    }

    fn value(&self, query: &str) -> Option<f64> {
        self.query(query).first().copied()
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

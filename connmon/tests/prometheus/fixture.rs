//! What the test needs, and a Prometheus that scrapes the agent.

use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use connmon_core::geo::Country;

use super::agent::{PATIENCE, Running, database_of, free_address, get, ready, retried};

/// Proof that the test can run here.
pub struct Requirements(());

/// Checks what the test needs and prints what is missing.
pub fn requirements() -> Option<Requirements> {
    const WHAT: &str = "the agent scraped by Prometheus";
    for (program, argument) in [("prometheus", "--version"), ("ip", "-V")] {
        if let Err(error) = Command::new(program).arg(argument).output() {
            super::support::skipped(WHAT, &format!("{program}: {error}"));
            return None;
        }
    }
    if !rustix::process::geteuid().is_root() {
        super::support::skipped(WHAT, "not root, so no eBPF and no namespaces");
        return None;
    }
    Some(Requirements(()))
}

/// The country of 10.`index`.0.0/16.
pub fn country_of(index: usize) -> Country {
    // Real countries only, spread over the alphabet.
    Country::from_index((index - 1) % (Country::COUNT - 3)).expect("an index below the count")
}

/// A database that places 10.1.0.0/16 to 10.`countries`.0.0/16.
pub fn database(countries: usize) -> Vec<u8> {
    let networks: Vec<_> = (1..=countries)
        .map(|index| (format!("10.{index}.0.0/16"), country_of(index).code()))
        .collect();
    database_of("connmon-test", &networks)
}

/// Debian's Prometheus, scraping every three seconds.
pub struct Prometheus {
    _running: Running,
    address: SocketAddr,
}

impl Prometheus {
    pub fn start(scratch: &Path, target: SocketAddr) -> Self {
        let config = scratch.join("prometheus.yml");
        let yaml = format!(
            "global: {{scrape_interval: 3s, scrape_timeout: 3s}}\n\
             scrape_configs:\n\
             - job_name: connmon\n  static_configs: [{{targets: ['{target}']}}]\n"
        );
        std::fs::write(&config, yaml).unwrap();
        retried(|| {
            let address = free_address();
            let child = Command::new("prometheus")
                .arg(format!("--config.file={}", config.display()))
                .arg(format!(
                    "--storage.tsdb.path={}",
                    scratch.join("data").display()
                ))
                .arg(format!("--web.listen-address={address}"))
                .args(["--log.level=warn", "--query.lookback-delta=10s"])
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            let mut running = Running::new(child);
            ready(address, &mut running).then_some(Self {
                _running: running,
                address,
            })
        })
    }

    /// Values of an instant query, one for each series.
    pub fn query(&self, query: &str) -> Vec<f64> {
        let path = format!("/api/v1/query?query={}", percent_encode(query));
        let (code, body) = get(self.address, &path).unwrap();
        assert_eq!(code, 200, "{query}: {body}");
        let answer: serde_json::Value = serde_json::from_str(&body).unwrap();
        let series = answer["data"]["result"].as_array().unwrap();
        series
            .iter()
            .map(|series| series["value"][1].as_str().unwrap().parse().unwrap())
            .collect()
    }

    /// Asks until the answer is right.
    pub fn eventually(&self, query: &str, right: impl Fn(&[f64]) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let values = self.query(query);
            if right(&values) {
                return;
            }
            assert!(Instant::now() < deadline, "{query}: {values:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }
}

fn percent_encode(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

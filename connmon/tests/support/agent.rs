//! The agent's binary on a free port, ended with the test.

use std::collections::HashSet;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mmdb_writer::{Value, Writer};

use crate::support::{promtool, samples};

/// How long something may take to become true.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A database that places each network in a country.
pub fn database_of(database_type: &str, networks: &[(String, &str)]) -> Vec<u8> {
    let mut writer = Writer::new(database_type);
    for (network, country) in networks {
        let network: ipnet::IpNet = network.parse().unwrap();
        let record = Value::map([("country_code", Value::from(*country))]);
        writer.insert_value(network, record).unwrap();
    }
    writer.to_bytes().unwrap()
}

/// A child process that does not outlive the test.
pub struct Running(Child);

impl Running {
    pub fn new(child: Child) -> Self {
        Self(child)
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        let pid = self.0.id().to_string();
        let status = Command::new("kill")
            .args([&format!("-{name}"), &pid])
            .status();
        assert!(status.unwrap().success(), "kill -{name} {pid}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The agent.
pub struct Agent {
    running: Running,
    /// Where it serves.
    pub address: SocketAddr,
    log: Arc<Mutex<String>>,
}

impl Agent {
    /// Starts it and waits until it is ready.
    pub fn start(database: &Path, arguments: &[&str]) -> Self {
        retried(|| {
            let address = free_address();
            let mut child = Command::new(env!("CARGO_BIN_EXE_connmon"))
                .arg(format!("--web.listen-address={address}"))
                .arg(format!("--geoip.database={}", database.display()))
                .arg("--log.level=warn")
                .args(arguments)
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let log = kept(child.stderr.take().unwrap());
            let mut agent = Self {
                running: Running::new(child),
                address,
                log,
            };
            let ended = ready(address, &mut agent.running);
            assert!(
                ended || agent.log().contains("address already in use"),
                "the agent ended:\n{}",
                agent.log()
            );
            ended.then_some(agent)
        })
    }

    /// What it has written to stderr so far.
    pub fn log(&self) -> String {
        let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        log.clone()
    }

    /// Waits for a line of the log that contains this.
    pub fn logs(&self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !self.log().contains(text) {
            assert!(Instant::now() < deadline, "never: {text}:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        self.running.signal(name);
    }

    /// Body of a GET that must succeed.
    pub fn get(&self, path: &str) -> String {
        let (code, body) = get(self.address, path).unwrap();
        assert_eq!(code, 200, "{path}: {body}");
        body
    }

    /// Scrapes until the scrape is right.
    pub fn eventually(&self, what: &str, right: impl Fn(&str) -> bool) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let text = self.scrape();
            if right(&text) {
                return text;
            }
            assert!(Instant::now() < deadline, "not in time: {what}\n{text}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// One scrape, linted.
    pub fn scrape(&self) -> String {
        let text = self.get("/metrics");
        lint(&text);
        text
    }

    /// Both conservation laws; events of other programs on this machine may
    /// be under way, so it looks more than once.
    fn check_laws(&self) {
        self.eventually("an instant at which the law of events holds", |text| {
            let sum = |family: &str| -> f64 {
                let samples = samples(text).into_iter();
                let of = samples.filter(|(series, _)| series.split('{').next() == Some(family));
                of.map(|(_, value)| value).sum()
            };
            let action = |action: &str| {
                let series = format!("connmon_reconcile_corrections_total{{action=\"{action}\"}}");
                let found = samples(text).into_iter().find(|(name, _)| *name == series);
                found.unwrap().1
            };
            assert_eq!(
                sum("connmon_country_connections_opened_total")
                    + action("seeded")
                    + action("added"),
                sum("connmon_country_connections_closed_total")
                    + action("removed")
                    + sum("connmon_tracked_connections"),
                "the law of connections:\n{text}"
            );
            sum("connmon_events_produced_total")
                == sum("connmon_events_folded_total") + sum("connmon_events_dropped_total")
        });
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.check_laws();
        }
    }
}

/// Has promtool lint a scrape, once for all scrapes of the same series.
fn lint(text: &str) {
    static SEEN: Mutex<Option<HashSet<String>>> = Mutex::new(None);
    let series = samples(text).into_iter().map(|(series, _)| series);
    let shape = series.collect::<Vec<_>>().join("\n");
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    if seen.get_or_insert_default().insert(shape) {
        promtool("a scrape of the agent", text);
    }
}

/// What comes out of a child's stderr, kept and passed on.
fn kept(stderr: impl Read + Send + 'static) -> Arc<Mutex<String>> {
    let log: Arc<Mutex<String>> = Arc::default();
    let keep = Arc::clone(&log);
    std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            eprintln!("{line}");
            let mut log = keep.lock().unwrap_or_else(PoisonError::into_inner);
            log.push_str(&line);
            log.push('\n');
        }
    });
    log
}

/// Whether it answers that it is ready, before it ends.
pub fn ready(address: SocketAddr, running: &mut Running) -> bool {
    let deadline = Instant::now() + PATIENCE;
    while !matches!(get(address, "/-/ready"), Ok((200, _))) {
        if running.0.try_wait().unwrap().is_some() {
            // Its last lines may not have arrived.
            std::thread::sleep(Duration::from_millis(100));
            return false;
        }
        assert!(Instant::now() < deadline, "not ready");
        std::thread::sleep(Duration::from_millis(50));
    }
    true
}

/// Starts something on a free address, and retries where another program was
/// quicker to take it.
pub fn retried<T>(mut start: impl FnMut() -> Option<T>) -> T {
    (0..5)
        .find_map(|_| start())
        .expect("an address that stays free")
}

/// An address that was free a moment ago; see [`retried`].
pub fn free_address() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
}

/// Status code and body of a GET.
pub fn get(address: SocketAddr, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let bad = || std::io::Error::other(format!("bad status line {line:?}"));
    let code = line
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .ok_or_else(bad)?;
    let mut chunked = false;
    loop {
        let mut header = String::new();
        reader.read_line(&mut header)?;
        let header = header.trim().to_ascii_lowercase();
        chunked |= header == "transfer-encoding: chunked";
        if header.is_empty() {
            break;
        }
    }
    let mut body = Vec::new();
    if chunked {
        loop {
            let mut size = String::new();
            reader.read_line(&mut size)?;
            let size = u64::from_str_radix(size.trim(), 16).map_err(std::io::Error::other)?;
            let read = reader.by_ref().take(size + 2).read_to_end(&mut body)?;
            body.truncate(body.len() - read.min(2));
            if size == 0 {
                break;
            }
        }
    } else {
        reader.read_to_end(&mut body)?;
    }
    Ok((
        code,
        String::from_utf8(body).map_err(std::io::Error::other)?,
    ))
}

//! A running agent under test. Whatever a test does, the laws of events and
//! of connections are checked when the agent is stopped or dropped.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use crate::support::{promtool, samples};

/// How long anything that should happen at once may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How long stopping may take while other tests load the machine; e2e's own
/// test has it stop within a second. In a guest under software emulation no
/// timing means anything.
const STOPPING: Duration = Duration::from_secs(10);

/// One scrape.
#[derive(Clone, Debug)]
pub struct Scrape {
    pub text: String,
    series: BTreeMap<String, f64>,
}

impl Scrape {
    pub fn parse(text: String) -> Self {
        let series = samples(&text)
            .into_iter()
            .map(|(series, value)| (series.to_owned(), value))
            .collect();
        Self { text, series }
    }

    /// The sum over every series of a family whose labels include `labels`;
    /// 0 without any.
    pub fn sum(&self, family: &str, labels: &[(&str, &str)]) -> f64 {
        self.matching(family, labels).sum()
    }

    /// The one series of a family whose labels include `labels`.
    pub fn get(&self, family: &str, labels: &[(&str, &str)]) -> Option<f64> {
        self.matching(family, labels).next()
    }

    fn matching<'a>(
        &'a self,
        family: &'a str,
        labels: &'a [(&str, &str)],
    ) -> impl Iterator<Item = f64> + 'a {
        self.series
            .iter()
            .filter(move |(series, _)| {
                let (name, rest) = series.split_once('{').unwrap_or((series, ""));
                name == family
                    && labels.iter().all(|(label, value)| {
                        let wanted = format!("{label}=\"{value}\"");
                        rest.split(&wanted)
                            .zip(rest.split(&wanted).skip(1))
                            .any(|(before, _)| before.is_empty() || before.ends_with(','))
                    })
            })
            .map(|(_, value)| *value)
    }

    /// Whether the family has any series.
    pub fn has(&self, family: &str) -> bool {
        self.get(family, &[]).is_some()
    }

    /// A port's gauge in one direction.
    pub fn connections(&self, port: u16, direction: &str) -> f64 {
        self.port("connmon_port_connections", port, direction)
    }

    /// A family's value for a port in one direction.
    pub fn port(&self, family: &str, port: u16, direction: &str) -> f64 {
        self.sum(
            family,
            &[("port", &port.to_string()), ("direction", direction)],
        )
    }

    /// produced - folded - dropped: 0 when the law of events holds.
    pub fn events_unaccounted(&self) -> f64 {
        self.sum("connmon_events_produced_total", &[])
            - self.sum("connmon_events_folded_total", &[])
            - self.sum("connmon_events_dropped_total", &[])
    }

    /// The difference of the law of connections: 0 when it holds.
    pub fn connections_unaccounted(&self) -> f64 {
        let corrections =
            |action| self.sum("connmon_reconcile_corrections_total", &[("action", action)]);
        self.sum("connmon_country_connections_opened_total", &[])
            + corrections("seeded")
            + corrections("added")
            - self.sum("connmon_country_connections_closed_total", &[])
            - corrections("removed")
            - self.sum("connmon_tracked_connections", &[])
    }
}

/// A running agent.
pub struct Agent {
    child: Child,
    log: Arc<Mutex<String>>,
    /// Reads the log to its end.
    reader: Option<JoinHandle<()>>,
    address: String,
    telemetry: String,
    /// Below the cap, the law of connections holds.
    capped: bool,
    stopped: bool,
}

impl Agent {
    /// The binary under test: this build's, or the one that `CONNMON_AGENT`
    /// names.
    pub fn binary() -> Command {
        let given = std::env::var_os("CONNMON_AGENT");
        let mut command = Command::new(given.unwrap_or(env!("CARGO_BIN_EXE_connmon").into()));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("CONNMON_") {
                command.env_remove(name);
            }
        }
        command
    }

    /// Starts an agent on a port of its own and waits until it is ready.
    pub fn start(args: &[&str]) -> Self {
        let mut command = Self::binary();
        command.args(args);
        Self::spawn(command)
    }

    /// Starts the agent, or a wrapper around it (setpriv, `ip netns exec`) that
    /// passes on the arguments.
    pub fn spawn(mut command: Command) -> Self {
        command
            .args(["--web.listen-address", "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let capped = command
            .get_args()
            .any(|arg| arg.to_string_lossy().starts_with("--connections.max"));
        let mut child = command.spawn().expect("the agent starts");
        let log = Arc::new(Mutex::new(String::new()));
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let reader = std::thread::spawn({
            let log = Arc::clone(&log);
            move || {
                for line in stderr.split(b'\n').map_while(Result::ok) {
                    let mut log = log.lock().unwrap();
                    log.push_str(&String::from_utf8_lossy(&line));
                    log.push('\n');
                }
            }
        });
        let mut agent = Self {
            child,
            log,
            reader: Some(reader),
            address: String::new(),
            telemetry: String::new(),
            capped,
            stopped: false,
        };
        agent.wait_until_ready();
        agent
    }

    fn wait_until_ready(&mut self) {
        let until = Instant::now() + PATIENCE;
        loop {
            let log = self.log();
            if let Some((address, telemetry)) = addresses(&log) {
                self.address = address;
                self.telemetry = telemetry;
                return;
            }
            if let Some(status) = self.child.try_wait().unwrap() {
                self.stopped = true;
                panic!("the agent ended with {status}:\n{log}");
            }
            assert!(Instant::now() < until, "the agent is not ready:\n{log}");
            sleep(Duration::from_millis(5));
        }
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Memory of its own, bytes (RssAnon).
    pub fn memory(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<u64>().unwrap() * 1024
    }

    /// Status code of the telemetry path.
    pub fn telemetry_status(&self) -> u16 {
        get(&self.address, &self.telemetry)
            .expect("the agent answers")
            .0
    }

    /// `127.0.0.1:PORT`.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Everything logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Body of a 200 answer.
    pub fn get(&self, path: &str) -> String {
        let (status, body) = get(&self.address, path).expect("the agent answers");
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    /// One scrape.
    pub fn scrape(&self) -> Scrape {
        let text = self.get(&self.telemetry);
        lint(&text);
        Scrape::parse(text)
    }

    /// One scrape; `None` while the agent is too busy for one more client.
    fn try_scrape(&self) -> Option<Scrape> {
        let (status, body) = get(&self.address, &self.telemetry).expect("the agent answers");
        match status {
            200 => {
                lint(&body);
                Some(Scrape::parse(body))
            }
            503 => None,
            _ => panic!("{}: {status}: {body}", self.telemetry),
        }
    }

    /// Scrapes until `good` holds, and fails with the last scrape. It waits
    /// for some audits at least, however the agent stretched their interval.
    pub fn until(&self, what: &str, mut good: impl FnMut(&Scrape) -> bool) -> Scrape {
        let asked = Instant::now();
        let mut patience = PATIENCE;
        loop {
            let scrape = self.try_scrape();
            if let Some(scrape) = &scrape {
                if good(scrape) {
                    return scrape.clone();
                }
                let interval = scrape.sum("connmon_reconcile_interval_seconds", &[]);
                patience = patience.max(Duration::from_secs_f64(4.0 * interval));
            }
            assert!(
                asked.elapsed() < patience,
                "{what} never came:\n{}\n{}",
                scrape.map_or("503".to_owned(), |scrape| interesting(&scrape.text)),
                self.log()
            );
            sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal by number.
    pub fn signal(&self, signal: i32) {
        let status = Command::new("kill")
            .args([format!("-{signal}"), self.pid().to_string()])
            .status()
            .unwrap();
        assert!(status.success());
    }

    /// The laws, with the scrape that shows them. Events of other programs on
    /// this machine may be under way, so it looks more than once.
    pub fn check_laws(&self) -> Scrape {
        self.until("an instant at which the law of events holds", |scrape| {
            self.check_connections(scrape);
            scrape.events_unaccounted() == 0.0
        })
    }

    fn check_connections(&self, scrape: &Scrape) {
        assert!(
            self.capped || scrape.connections_unaccounted() == 0.0,
            "the law of connections misses {}:\n{}",
            scrape.connections_unaccounted(),
            interesting(&scrape.text)
        );
    }

    /// Checks the laws, ends the agent by SIGTERM and expects a clean exit,
    /// in good time.
    pub fn stop(mut self) -> String {
        self.check_laws();
        self.stopped = true;
        self.signal(15);
        let asked = Instant::now();
        let status = self.wait();
        assert!(status.success(), "{status}:\n{}", self.log());
        assert!(
            asked.elapsed() < STOPPING || std::env::var_os("CONNMON_GUEST").is_some(),
            "stopping took {:?}",
            asked.elapsed()
        );
        self.log()
    }

    /// Waits for the end, for tests that cause it; the log is whole then.
    pub fn wait(&mut self) -> ExitStatus {
        self.stopped = true;
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                if let Some(reader) = self.reader.take() {
                    reader.join().unwrap();
                }
                return status;
            }
            assert!(
                Instant::now() < until,
                "the agent does not end:\n{}",
                self.log()
            );
            sleep(Duration::from_millis(5));
        }
    }

    /// Kills it with SIGKILL, in the middle of whatever happens: of the laws
    /// only that of connections holds at any instant.
    pub fn kill(mut self) {
        self.check_connections(&self.scrape());
        self.stopped = true;
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if !self.stopped {
            if !std::thread::panicking() {
                self.check_laws();
            } else {
                eprintln!("log of the agent:\n{}", self.log());
            }
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// (`127.0.0.1:PORT`, telemetry path) from the line that names them.
fn addresses(log: &str) -> Option<(String, String)> {
    let line = log.lines().find(|line| line.contains(" shows the map"))?;
    let mut urls = line.split("http://").skip(1);
    let page = urls.next()?;
    let metrics = urls.next()?;
    let address = page.split('/').next()?.to_owned();
    let path = metrics.strip_prefix(&address)?.split(' ').next()?;
    Some((address, path.trim_end_matches('"').to_owned()))
}

/// Lints a scrape by promtool, once for all scrapes that differ in numbers only.
fn lint(text: &str) {
    static SEEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let lines: BTreeSet<String> = text
        .lines()
        .map(|line| match line.rsplit_once(' ') {
            Some((series, _)) if !line.starts_with('#') => without_numbers(series),
            _ => line.to_owned(),
        })
        .collect();
    let shape = lines.into_iter().collect::<Vec<_>>().join("\n");
    // A failed lint has failed its test already.
    let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
    if seen.insert(shape) {
        drop(seen);
        promtool("a scrape", text);
    }
}

/// Every run of digits becomes one.
fn without_numbers(series: &str) -> String {
    let mut shape = String::with_capacity(series.len());
    for character in series.chars() {
        match character {
            '0'..='9' if shape.ends_with('0') => {}
            '0'..='9' => shape.push('0'),
            _ => shape.push(character),
        }
    }
    shape
}

/// Lines of a scrape that are neither comments nor zero.
pub fn interesting(text: &str) -> String {
    text.lines()
        .filter(|line| !line.starts_with('#') && !line.ends_with(" 0"))
        .filter(|line| !line.contains("_bucket{"))
        .fold(String::new(), |all, line| all + line + "\n")
}

/// A GET without any library between the test and the socket.
pub fn get(address: &str, path: &str) -> std::io::Result<(u16, String)> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let bad = || std::io::Error::other(format!("bad answer: {answer}"));
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(bad)?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|status| status.parse().ok())
        .ok_or_else(bad)?;
    Ok((status, body.to_owned()))
}

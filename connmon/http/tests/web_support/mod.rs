//! A running server with a made-up reporter, and clients on real sockets.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use connmon_core::fold::{Corrections, Histogram, Snapshot};
use connmon_core::report::{DatabaseInfo, Report, Reporter, Source, Status, Unavailable};
use connmon_http::address::{self, ListenAddress};
use connmon_http::{Asset, Content, Limits, Options, Server};

/// What the reporter answers next.
#[derive(Clone, Debug)]
pub enum FakeState {
    Ready,
    WaitingFor(&'static str),
    Unavailable(Unavailable),
    Never,
}

/// A reporter that counts its reports; `folded` is the number of each.
pub struct FakeReporter {
    pub state: Mutex<FakeState>,
    pub delay: Mutex<Duration>,
    pub reports: AtomicU64,
}

impl Reporter for FakeReporter {
    fn report(
        &self,
    ) -> Pin<Box<dyn Future<Output = Result<Arc<Report>, Unavailable>> + Send + '_>> {
        let number = self.reports.fetch_add(1, Ordering::SeqCst) + 1;
        let (state, delay) = (
            self.state.lock().unwrap().clone(),
            *self.delay.lock().unwrap(),
        );
        Box::pin(async move {
            tokio::time::sleep(delay).await;
            match state {
                FakeState::Ready => Ok(Arc::new(report(number, None))),
                FakeState::WaitingFor(what) => Ok(Arc::new(report(number, Some(what)))),
                FakeState::Unavailable(why) => Err(why),
                FakeState::Never => std::future::pending().await,
            }
        })
    }
}

fn empty_histogram() -> Histogram {
    Histogram {
        bounds_ns: &[],
        counts: vec![0],
        sum_ns: 0,
    }
}

/// A report whose `folded` is `number`.
pub fn report(number: u64, waiting_for: Option<&str>) -> Report {
    let histograms = || [empty_histogram(), empty_histogram(), empty_histogram()];
    Report {
        snapshot: Snapshot {
            countries: Vec::new(),
            ports: Vec::new(),
            cross_enabled: false,
            cross: Vec::new(),
            established: 0,
            audited_states: [0; 7],
            connect_latency: empty_histogram(),
            accept_wait: empty_histogram(),
            rtt: histograms(),
            duration: histograms(),
            listeners: Vec::new(),
            tracked: 0,
            untracked: 0,
            table_overflow: 0,
            tombstone_overflow: 0,
            series_overflow: Vec::new(),
            series_evicted: Vec::new(),
            folded: number,
            unattributed: 0,
            missed_closes: 0,
            corrections: Corrections::default(),
            drift: None,
            drift_suspected: None,
            hidden_loopback: 0,
            hidden_excluded: 0,
            traffic_known: false,
            accept_known: false,
        },
        status: Status {
            source: Source::Ebpf,
            degraded: None,
            rungs: Vec::new(),
            up: true,
            ready: waiting_for.is_none(),
            waiting_for: waiting_for.map(str::to_owned),
            uptime_s: 1.0,
            events_produced: number,
            events_folded: number,
            dropped_ring_full: 0,
            dropped_undecodable: 0,
            missed_runs: Vec::new(),
            reconcile_runs: [1, 0, 0],
            reconcile_duration_s: 0.0,
            reconcile_interval_s: 60.0,
            namespaces: [1, 0, 0],
            programs: Vec::new(),
            database: DatabaseInfo {
                database_type: "test".to_owned(),
                source: "embedded",
                build_timestamp: 0,
                reloads_ok: 0,
                reloads_failed: 0,
            },
            demo: false,
        },
    }
}

/// Content whose metrics are `padding` bytes of comments and one sample with
/// the report's number.
pub struct FakeContent {
    pub padding: usize,
    pub renders: Arc<AtomicU64>,
}

impl Content for FakeContent {
    fn metrics(&mut self, report: &Report) -> Bytes {
        self.renders.fetch_add(1, Ordering::SeqCst);
        assert!(self.padding < usize::MAX, "asked to panic");
        let mut text = String::with_capacity(self.padding + 64);
        while text.len() < self.padding {
            text.push_str("# nothing but text that takes space on the wire\n");
        }
        text.push_str(&format!("report {}\n", report.snapshot.folded));
        text.into()
    }

    fn summary(&mut self, report: &Report) -> Bytes {
        format!("{{\"report\":{}}}\n", report.snapshot.folded).into()
    }

    fn asset(&self, path: &str) -> Option<Asset> {
        match path {
            "/" => Some(Asset {
                content_type: "text/html; charset=utf-8",
                body: "<!doctype html><title>connmon</title>\n".repeat(100).into(),
            }),
            "/page.js" => Some(Asset {
                content_type: "text/javascript; charset=utf-8",
                body: "1\n".into(),
            }),
            _ => None,
        }
    }
}

/// A server on its own thread, stopped and joined on drop.
pub struct Running {
    pub address: SocketAddr,
    pub addresses: Vec<SocketAddr>,
    pub reporter: Arc<FakeReporter>,
    pub renders: Arc<AtomicU64>,
    stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// How to start one.
pub struct Start {
    pub listen: Vec<&'static str>,
    pub max_requests: usize,
    pub limits: Limits,
    pub padding: usize,
    pub state: FakeState,
    pub delay: Duration,
    pub web_config: Option<std::path::PathBuf>,
}

impl Default for Start {
    fn default() -> Self {
        Self {
            listen: vec!["127.0.0.1:0"],
            max_requests: 40,
            limits: Limits::default(),
            padding: 2000,
            state: FakeState::Ready,
            delay: Duration::ZERO,
            web_config: None,
        }
    }
}

fn options(start: &Start) -> Options {
    let listen = start.listen.iter().map(|text| {
        let (host, port) = address::parse(text).unwrap();
        ListenAddress {
            text: (*text).to_owned(),
            origin: "--web.listen-address".to_owned(),
            host,
            port,
        }
    });
    Options {
        listen: listen.collect(),
        telemetry_path: "/metrics".to_owned(),
        web_config_file: start.web_config.clone(),
        max_requests: start.max_requests,
    }
}

impl Start {
    pub fn run(self) -> Running {
        let server = Server::bind(&options(&self))
            .unwrap()
            .with_limits(self.limits);
        let addresses = server.addresses();
        let reporter = Arc::new(FakeReporter {
            state: Mutex::new(self.state),
            delay: Mutex::new(self.delay),
            reports: AtomicU64::new(0),
        });
        let renders = Arc::new(AtomicU64::new(0));
        let content = FakeContent {
            padding: self.padding,
            renders: Arc::clone(&renders),
        };
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let asked = Arc::clone(&reporter);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            let shutdown = async { drop(stopped.await) };
            runtime
                .block_on(server.serve(asked, content, shutdown))
                .unwrap();
        });
        Running {
            address: addresses[0],
            addresses,
            reporter,
            renders,
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Running {
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(8)))
            .unwrap();
        stream
    }

    /// Sends `request` as it is, on a connection of its own, and reads until
    /// the server closes.
    pub fn raw(&self, request: &str) -> Reply {
        let mut stream = self.connect();
        stream.write_all(request.as_bytes()).unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        parse(&bytes)
    }

    /// GET with extra header lines (each ending in CRLF).
    pub fn get(&self, path: &str, headers: &str) -> Reply {
        self.request("GET", path, headers)
    }

    pub fn request(&self, method: &str, path: &str, headers: &str) -> Reply {
        self.raw(&format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{headers}\r\n"
        ))
    }

    /// Waits for the server to end by itself, and whether that was a panic.
    pub fn panicked(mut self) -> bool {
        self.thread.take().unwrap().join().is_err()
    }

    /// Stops the server and returns how long that took.
    pub fn stop(&mut self) -> Duration {
        let began = std::time::Instant::now();
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            if !std::thread::panicking() {
                joined.expect("the server thread ends cleanly");
            }
        }
        began.elapsed()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A response taken apart.
#[derive(Debug, Default)]
pub struct Reply {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn gunzipped(&self) -> String {
        let mut text = String::new();
        flate2::read::GzDecoder::new(&self.body[..])
            .read_to_string(&mut text)
            .unwrap();
        text
    }
}

/// The first response in `bytes`; its body is all that follows.
pub fn parse(bytes: &[u8]) -> Reply {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    let Some(end) = end else {
        return Reply {
            body: bytes.to_vec(),
            ..Reply::default()
        };
    };
    let head = std::str::from_utf8(&bytes[..end]).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap();
    Reply {
        status: status.parse().unwrap(),
        headers: lines
            .map(|line| {
                let (name, value) = line.split_once(':').unwrap();
                (name.to_ascii_lowercase(), value.trim().to_owned())
            })
            .collect(),
        body: bytes[end + 4..].to_vec(),
    }
}

//! An agent with made-up reports behind the real server and the real page.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use anyhow::{Context as _, Result, anyhow};
use bytes::Bytes;
use connmon::config;
use connmon::expose::metrics::Metrics;
use connmon::expose::page::Page;
use connmon::expose::summary;
use connmon_core::report::{Report, Reporter, Unavailable};
use connmon_http::{Asset, Content, Server};
use serde_json::Value;
use tokio::sync::oneshot;

/// Serves on a thread of its own until dropped.
pub struct Agent {
    shared: Arc<Shared>,
    address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
}

/// `None`: the fold does not answer.
struct Shared(Mutex<Option<Arc<Report>>>);

impl Reporter for Shared {
    fn report(
        &self,
    ) -> Pin<Box<dyn Future<Output = Result<Arc<Report>, Unavailable>> + Send + '_>> {
        let report = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        Box::pin(async { report.ok_or(Unavailable::Timeout) })
    }
}

struct Pages {
    page: Page,
    metrics: Metrics,
}

impl Content for Pages {
    fn metrics(&mut self, report: &Report) -> Bytes {
        self.metrics.render(report)
    }

    fn summary(&mut self, report: &Report) -> Bytes {
        summary::render(report)
    }

    fn asset(&self, path: &str) -> Option<Asset> {
        self.page.asset(path)
    }
}

impl Agent {
    /// On a free port.
    pub fn start(report: Report) -> Result<Self> {
        Self::start_with(&[], report)
    }

    /// With another telemetry path.
    pub fn start_at(telemetry_path: &str, report: Report) -> Result<Self> {
        let path = ("web.telemetry-path", telemetry_path.to_owned());
        Self::start_with(&[path], report)
    }

    /// On a given address.
    pub fn start_on(address: SocketAddr, telemetry_path: &str, report: Report) -> Result<Self> {
        let address = ("web.listen-address", address.to_string());
        let path = ("web.telemetry-path", telemetry_path.to_owned());
        Self::start_with(&[address, path], report)
    }

    /// With these flags, on a free port unless they name one.
    pub fn start_with(flags: &[(&'static str, String)], report: Report) -> Result<Self> {
        let mut flags = flags.to_vec();
        if flags.iter().all(|(name, _)| *name != "web.listen-address") {
            flags.push(("web.listen-address", "127.0.0.1:0".to_owned()));
        }
        let config = config::load(&flags, [])?.config;
        let server = Server::bind(&config.server_options())?;
        let address = *server.addresses().first().context("no address")?;
        let shared = Arc::new(Shared(Mutex::new(Some(Arc::new(report)))));
        let reporter: Arc<dyn Reporter> = Arc::clone(&shared) as _;
        let pages = Pages {
            page: Page::new(&config.telemetry_path),
            metrics: Metrics::new(),
        };
        let (stop, stopped) = oneshot::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(server.serve(reporter, pages, async {
                let _ = stopped.await;
            }))?;
            Ok(())
        });
        Ok(Self {
            shared,
            address,
            stop: Some(stop),
            thread: Some(thread),
        })
    }

    /// What is reported from now on.
    pub fn set(&self, report: Report) {
        self.put(Some(Arc::new(report)));
    }

    /// From now on there is none, which is a 503.
    pub fn stop_reporting(&self) {
        self.put(None);
    }

    fn put(&self, report: Option<Arc<Report>>) {
        *self.shared.0.lock().unwrap_or_else(PoisonError::into_inner) = report;
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The page.
    pub fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// `/api/v1/summary`, fetched.
    pub fn summary(&self) -> Result<Value> {
        let url = format!("{}api/v1/summary", self.url());
        Ok(ureq::get(&url).call()?.body_mut().read_json()?)
    }

    /// Stops serving and frees the port.
    pub fn stop(mut self) -> Result<()> {
        self.end()
    }

    fn end(&mut self) -> Result<()> {
        drop(self.stop.take());
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(ended) => ended.map_err(|_| anyhow!("the server panicked"))?,
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

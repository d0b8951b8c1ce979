//! The serving thread: HTTP, signals, the file of the country database, the
//! service manager.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use connmon_core::geo::{Database, Locator};
use connmon_core::report::{Report, Reporter};
use connmon_host::sandbox::{Plan, Role};
use connmon_http::{Asset, Content, Server};
use log::info;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

use crate::database::{Outcome, Reloader};
use crate::expose::metrics::Metrics;
use crate::expose::page::Page;
use crate::expose::summary;
use crate::notify::Notify;

use super::pipeline::DatabaseChange;
use super::reporter::FoldReporter;

/// How often the database file is looked at.
const DATABASE_POLL: Duration = Duration::from_secs(1);

/// What the serving thread works with; made before it enters its sandbox.
pub struct Serving {
    /// Bound, not yet serving.
    pub server: Server,
    /// What it serves.
    pub content: AgentContent,
    /// Where reports come from.
    pub reporter: FoldReporter,
    /// Logged once the agent is ready.
    pub when_ready: Vec<String>,
    /// Becomes true after the initial scan.
    pub ready: watch::Receiver<bool>,
    /// Resolves when the fold thread ends.
    pub fold_ended: oneshot::Receiver<anyhow::Result<()>>,
    /// Ends everything when it becomes true.
    pub stop: watch::Sender<bool>,
    /// Signals.
    pub signals: Signals,
    /// The country database's file.
    pub database: DatabaseWatch,
    /// The service manager.
    pub notify: Notify,
}

impl Serving {
    /// Serves until a signal.
    ///
    /// # Errors
    /// When the sandbox is strict and incomplete, or a thread failed.
    pub async fn run(mut self, plan: &Plan) -> anyhow::Result<()> {
        plan.enter(Role::Serve)?;
        let notify = Arc::new(self.notify);
        let Signals {
            mut term,
            mut int,
            hangup,
        } = self.signals;
        let mut stopped = self.stop.subscribe();
        let reporter = Arc::new(self.reporter.clone());
        let http = self.server.serve(reporter, self.content, async move {
            let _ = stopped.changed().await;
        });
        let mut http = std::pin::pin!(http);
        // A panic in one of these ends the process by the panic hook.
        tokio::spawn(self.database.run(hangup));
        tokio::spawn(feed_watchdog(Arc::clone(&notify), self.reporter));
        let mut logged = false;
        loop {
            tokio::select! {
                done = &mut http => {
                    done.context("the HTTP server failed")?;
                    anyhow::bail!("the HTTP server ended by itself");
                }
                outcome = &mut self.fold_ended => {
                    return match outcome {
                        Ok(Err(error)) => Err(error.context("the fold thread failed")),
                        Ok(Ok(())) | Err(_) => anyhow::bail!("the fold thread ended by itself"),
                    };
                }
                _ = term.recv() => {
                    info!("SIGTERM received: stopping");
                    break;
                }
                _ = int.recv() => {
                    info!("SIGINT received: stopping");
                    break;
                }
                changed = self.ready.changed(), if !logged => {
                    logged = true;
                    if changed.is_ok() {
                        self.when_ready.iter().for_each(|line| info!("{line}"));
                        notify.ready("watching");
                    }
                }
            }
        }
        notify.stopping();
        self.stop.send_replace(true);
        http.await.context("the HTTP server failed while stopping")
    }
}

/// Reports to the service manager that the fold still answers.
async fn feed_watchdog(notify: Arc<Notify>, reporter: FoldReporter) {
    let Some(interval) = notify.interval() else {
        return;
    };
    let mut tick = tokio::time::interval(interval);
    loop {
        tick.tick().await;
        if reporter.report().await.is_ok() {
            notify.alive();
        }
    }
}

/// What the server serves: metrics, summary, page.
pub struct AgentContent {
    metrics: Metrics,
    page: Page,
}

impl AgentContent {
    /// Content whose page links to the metrics at this path.
    pub fn new(telemetry_path: &str) -> Self {
        Self {
            metrics: Metrics::new(),
            page: Page::new(telemetry_path),
        }
    }
}

impl Content for AgentContent {
    fn metrics(&mut self, report: &Report) -> Bytes {
        #[cfg(debug_assertions)]
        super::panic_if_asked("serve");
        self.metrics.render(report)
    }

    fn summary(&mut self, report: &Report) -> Bytes {
        summary::render(report)
    }

    fn asset(&self, path: &str) -> Option<Asset> {
        self.page.asset(path)
    }
}

/// The signals that the agent handles.
pub struct Signals {
    term: Signal,
    int: Signal,
    hangup: Signal,
}

impl Signals {
    /// From now on they no longer end the process. To be called inside a
    /// runtime.
    ///
    /// # Errors
    /// When a handler cannot be installed.
    pub fn new() -> anyhow::Result<Self> {
        let listen = |kind: SignalKind, name: &str| {
            signal(kind).with_context(|| format!("cannot handle {name}"))
        };
        Ok(Self {
            term: listen(SignalKind::terminate(), "SIGTERM")?,
            int: listen(SignalKind::interrupt(), "SIGINT")?,
            hangup: listen(SignalKind::hangup(), "SIGHUP")?,
        })
    }
}

/// Watches the country database's file and passes new ones to the fold thread.
pub struct DatabaseWatch {
    /// `None`: the embedded database, which never changes.
    pub reloader: Option<Reloader>,
    /// The database in use.
    pub current: Arc<Database>,
    /// Where changes go.
    pub fold: mpsc::Sender<DatabaseChange>,
}

impl DatabaseWatch {
    async fn run(mut self, mut hangup: Signal) {
        let mut tick = tokio::time::interval(DATABASE_POLL);
        loop {
            let force = tokio::select! {
                _ = hangup.recv() => true,
                _ = tick.tick(), if self.reloader.is_some() => false,
            };
            self.poll(force).await;
        }
    }

    /// Looks at the file; with `force` reads it even if it did not change.
    /// Reading and checking take a while, so another thread does both.
    async fn poll(&mut self, force: bool) {
        // Not while the fold has yet to take the database before this one:
        // memory is meant for two. A fold thread that ended is noticed elsewhere.
        let Ok(permit) = self.fold.clone().reserve_owned().await else {
            return;
        };
        let Some(mut reloader) = self.reloader.take() else {
            return;
        };
        let polled = tokio::task::spawn_blocking(move || {
            let outcome = reloader.poll(force);
            (reloader, outcome)
        });
        // A panic there has ended the process; else the runtime ends.
        let Ok((reloader, outcome)) = polled.await else {
            return;
        };
        let (ok, failed) = reloader.counts();
        self.reloader = Some(reloader);
        let locator = match outcome {
            None => return,
            Some(Outcome::Refused(_)) => None,
            Some(Outcome::Replaced(database)) => {
                self.current = Arc::new(database);
                Some(Locator::new(Arc::clone(&self.current)))
            }
        };
        let info = self.current.info(ok, failed);
        permit.send(DatabaseChange { locator, info });
    }
}

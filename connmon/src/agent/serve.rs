//! The serving thread: HTTP, signals, file watching, the service manager.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use connmon_core::geo::{Database, Locator};
use connmon_core::report::Reporter;
use connmon_host::sandbox::{Plan, Role};
use connmon_http::Server;
use log::info;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};

use crate::database::{Outcome, Reloader};
use crate::notify::Notify;

use super::content::AgentContent;
use super::pipeline::DatabaseChange;
use super::reporter::FoldReporter;

/// How often the database file is looked at.
const DATABASE_POLL: Duration = Duration::from_secs(1);

/// What the serving thread works with; made before its sandbox closes.
pub struct Serving {
    /// Bound, not yet serving.
    pub server: Server,
    /// What it hands out.
    pub content: AgentContent,
    /// Where reports come from.
    pub reporter: FoldReporter,
    /// The line that names the page.
    pub page: Option<String>,
    /// Becomes true with the first merge.
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

/// Serves until a signal.
///
/// # Errors
/// When the sandbox is strict and incomplete, or a thread failed.
pub async fn run(serving: Serving, plan: &Plan) -> anyhow::Result<()> {
    let Serving {
        server,
        content,
        reporter,
        page,
        mut ready,
        mut fold_ended,
        stop,
        signals,
        database,
        notify,
    } = serving;
    plan.enter(Role::Serve)?;
    let notify = Arc::new(notify);
    let Signals {
        mut term,
        mut int,
        hangup,
    } = signals;
    let mut stopped = stop.subscribe();
    let http = server.serve(Arc::new(reporter.clone()), content, async move {
        let _ = stopped.changed().await;
    });
    let mut http = std::pin::pin!(http);
    // A panic in one of these ends the process by the panic hook.
    tokio::spawn(database.run(hangup));
    tokio::spawn(feed_watchdog(Arc::clone(&notify), reporter));
    let mut said = false;
    loop {
        tokio::select! {
            done = &mut http => {
                done.context("the HTTP server failed")?;
                anyhow::bail!("the HTTP server ended by itself");
            }
            outcome = &mut fold_ended => {
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
            changed = ready.changed(), if !said => {
                said = true;
                if changed.is_ok() {
                    if let Some(page) = &page {
                        info!("{page}");
                    }
                    notify.ready("watching");
                }
            }
        }
    }
    notify.stopping();
    stop.send_replace(true);
    http.await.context("the HTTP server failed while stopping")
}

/// Tells the service manager that the fold still answers.
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

/// The signals the agent knows.
pub struct Signals {
    term: Signal,
    int: Signal,
    hangup: Signal,
}

impl Signals {
    /// From now on they no longer kill. To be called inside a runtime.
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

/// Watches the country database's file and hands new ones to the fold thread.
pub struct DatabaseWatch {
    reloader: Option<Reloader>,
    current: Arc<Database>,
    fold: mpsc::Sender<DatabaseChange>,
}

impl DatabaseWatch {
    /// Watches what `reloader` watches; without one there is nothing to do.
    pub fn new(
        reloader: Option<Reloader>,
        current: Arc<Database>,
        fold: mpsc::Sender<DatabaseChange>,
    ) -> Self {
        Self {
            reloader,
            current,
            fold,
        }
    }

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

    /// Looks at the file; with `force` reads it whatever it looks like.
    /// Reading and checking take a while, so they happen on another thread.
    async fn poll(&mut self, force: bool) {
        // Not while a database waits for the fold, which has another: a third
        // one has no place in memory. A fold thread that is gone is noticed
        // elsewhere.
        let Ok(place) = self.fold.clone().reserve_owned().await else {
            return;
        };
        let Some(mut reloader) = self.reloader.take() else {
            return;
        };
        let polled = tokio::task::spawn_blocking(move || {
            let outcome = reloader.poll(force);
            (reloader, outcome)
        });
        let Ok((reloader, outcome)) = polled.await else {
            // A panic there has ended the process; else the runtime ends.
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
        place.send(DatabaseChange { locator, info });
    }
}

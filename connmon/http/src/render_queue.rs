//! One report and one rendering for all the requests that wait for them.
//!
//! Requests queue while a rendering is under way; the next one takes them
//! all. So however many ask at once, at most one report is being made, no
//! answer is older than the request it goes to, and the fold is not asked
//! more often than it can answer.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use connmon_core::report::{Report, Reporter, Unavailable};
use tokio::sync::{mpsc, oneshot};

use crate::Content;
use crate::encoding::{WORTH_COMPRESSING, gzip};

/// Requests that can wait for the next rendering; more are turned away. More
/// than connections can bring (HTTP/2 streams included) before they are
/// bounded by `--web.max-requests`.
const QUEUE: usize = 1024;

/// What a request wants of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// Only whether the agent is ready.
    Readiness,
    /// The telemetry text.
    Metrics {
        /// Compressed.
        gzip: bool,
    },
    /// The summary.
    Summary {
        /// Compressed.
        gzip: bool,
    },
}

/// What it gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// The agent is ready (the answer to [`Want::Readiness`]).
    Ready,
    /// The body, and whether it is gzip (short ones are left as they are).
    Body {
        /// The body.
        body: Bytes,
        /// Its content coding.
        gzip: bool,
    },
    /// The first reconcile is not folded yet; what it waits for.
    NotReady(String),
    /// There is no report; why.
    Unavailable(&'static str),
}

struct Ticket {
    want: Want,
    reply: oneshot::Sender<Answer>,
}

/// The counter where requests queue.
#[derive(Clone)]
pub(crate) struct Desk {
    queue: mpsc::Sender<Ticket>,
}

impl Desk {
    /// Waits for a report taken after this call, rendered as wanted.
    pub(crate) async fn ask(&self, want: Want) -> Answer {
        let (reply, answer) = oneshot::channel();
        if self.queue.try_send(Ticket { want, reply }).is_err() {
            return Answer::Unavailable("too many requests are waiting for a report");
        }
        answer
            .await
            .unwrap_or(Answer::Unavailable("the server is stopping"))
    }
}

/// The counter and the task behind it, which ends when the counter is gone.
pub(crate) fn open(
    reporter: Arc<dyn Reporter>,
    content: Arc<Mutex<impl Content>>,
    patience: Duration,
) -> (Desk, impl Future<Output = ()> + Send) {
    let (queue, tickets) = mpsc::channel(QUEUE);
    (Desk { queue }, work(tickets, reporter, content, patience))
}

async fn work(
    mut tickets: mpsc::Receiver<Ticket>,
    reporter: Arc<dyn Reporter>,
    content: Arc<Mutex<impl Content>>,
    patience: Duration,
) {
    let mut waiting = Vec::new();
    while tickets.recv_many(&mut waiting, QUEUE).await > 0 {
        waiting.retain(|ticket| !ticket.reply.is_closed());
        if waiting.is_empty() {
            continue;
        }
        let report = match tokio::time::timeout(patience, reporter.report()).await {
            Ok(report) => report,
            Err(_) => Err(Unavailable::Timeout),
        };
        match report {
            Err(error) => {
                for ticket in waiting.drain(..) {
                    let _ = ticket
                        .reply
                        .send(Answer::Unavailable(explain(error.clone())));
                }
            }
            Ok(report) if !report.status.ready => {
                let what = report.status.waiting_for.as_deref();
                let what = what.unwrap_or("the first reconcile with the kernel's tables");
                for ticket in waiting.drain(..) {
                    let _ = ticket.reply.send(Answer::NotReady(what.to_owned()));
                }
            }
            Ok(report) => {
                let mut content = content.lock().unwrap_or_else(PoisonError::into_inner);
                let mut metrics = Rendering::default();
                let mut summary = Rendering::default();
                for ticket in waiting.drain(..) {
                    let answer = match ticket.want {
                        Want::Readiness => Answer::Ready,
                        Want::Metrics { gzip } => {
                            metrics.answer(gzip, &report, |report| content.metrics(report))
                        }
                        Want::Summary { gzip } => {
                            summary.answer(gzip, &report, |report| content.summary(report))
                        }
                    };
                    let _ = ticket.reply.send(answer);
                }
            }
        }
        // Bodies can be large: give the connections a turn to write them.
        tokio::task::yield_now().await;
    }
}

fn explain(error: Unavailable) -> &'static str {
    match error {
        Unavailable::Timeout => "the fold did not answer in time; see the log of connmon",
        Unavailable::Gone => "the fold has ended; see the log of connmon",
    }
}

/// A body of one report, made at most once in each coding.
#[derive(Default)]
struct Rendering {
    plain: Option<Bytes>,
    packed: Option<Bytes>,
}

impl Rendering {
    fn answer(
        &mut self,
        wants_gzip: bool,
        report: &Report,
        render: impl FnOnce(&Report) -> Bytes,
    ) -> Answer {
        let plain = self.plain.get_or_insert_with(|| render(report));
        if wants_gzip && plain.len() >= WORTH_COMPRESSING {
            let packed = self.packed.get_or_insert_with(|| gzip(plain));
            return Answer::Body {
                body: packed.clone(),
                gzip: true,
            };
        }
        Answer::Body {
            body: plain.clone(),
            gzip: false,
        }
    }
}

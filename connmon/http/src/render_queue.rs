//! One report and one rendering for all the requests that wait for them.
//!
//! Requests queue while a rendering is under way; the next one takes them
//! all. So however many arrive at once, at most one report is being made, no
//! answer is older than the request it goes to, and the fold is not asked
//! more often than it can answer.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use connmon_core::report::{Report, Reporter, Unavailable};
use tokio::sync::{mpsc, oneshot};

use flate2::Compression;

use crate::encoding::{WORTH_COMPRESSING, gzip};
use crate::{Content, lock};

/// Requests that can wait for the next rendering; more get 503. More than
/// connections can bring (HTTP/2 streams included) before they are bounded by
/// `--web.max-requests`.
const QUEUE: usize = 1024;

/// What a request wants of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Want {
    /// Only whether the agent is ready; the body is empty.
    Readiness,
    Metrics,
    Summary,
}

/// A body, and whether it is gzip (short ones are left as they are); or the
/// line of a 503.
pub(crate) type Answer = Result<(Bytes, bool), String>;

struct Request {
    want: Want,
    gzip: bool,
    reply: oneshot::Sender<Answer>,
}

#[derive(Clone)]
pub(crate) struct RenderQueue(mpsc::Sender<Request>);

impl RenderQueue {
    /// The queue, and the task that answers it until it is dropped. A report
    /// may take `patience`.
    pub(crate) fn new(
        reporter: Arc<dyn Reporter>,
        content: Arc<Mutex<impl Content>>,
        patience: Duration,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (sender, requests) = mpsc::channel(QUEUE);
        (Self(sender), work(requests, reporter, content, patience))
    }

    /// Waits for a report taken after this call, rendered as wanted.
    pub(crate) async fn ask(&self, want: Want, gzip: bool) -> Answer {
        let (reply, answer) = oneshot::channel();
        let request = Request { want, gzip, reply };
        if self.0.try_send(request).is_err() {
            return Err("too many requests are waiting for a report".to_owned());
        }
        let stopping = |_| Err("the server is stopping".to_owned());
        answer.await.unwrap_or_else(stopping)
    }
}

async fn work(
    mut requests: mpsc::Receiver<Request>,
    reporter: Arc<dyn Reporter>,
    content: Arc<Mutex<impl Content>>,
    patience: Duration,
) {
    let mut waiting = Vec::new();
    while requests.recv_many(&mut waiting, QUEUE).await > 0 {
        waiting.retain(|request| !request.reply.is_closed());
        if waiting.is_empty() {
            continue;
        }
        let report = tokio::time::timeout(patience, reporter.report()).await;
        let report = usable(report.unwrap_or(Err(Unavailable::Timeout)));
        let mut metrics = Rendering::default();
        let mut summary = Rendering::default();
        for Request { want, gzip, reply } in waiting.drain(..) {
            let answer = report.as_ref().map_err(String::clone).map(|report| {
                let mut content = lock(&content);
                match want {
                    Want::Readiness => (Bytes::new(), false),
                    Want::Metrics => metrics.body(gzip, || content.metrics(report)),
                    Want::Summary => summary.body(gzip, || content.summary(report)),
                }
            });
            // The client may have disconnected.
            let _ = reply.send(answer);
        }
        // Bodies can be large: give the connections a turn to write them.
        tokio::task::yield_now().await;
    }
}

/// The report, if the agent is ready.
fn usable(report: Result<Arc<Report>, Unavailable>) -> Result<Arc<Report>, String> {
    let report = report.map_err(|error| match error {
        Unavailable::Timeout => "the fold did not answer in time; see the log of connmon",
        Unavailable::Gone => "the fold has ended; see the log of connmon",
    })?;
    if report.status.ready {
        return Ok(report);
    }
    let what = report.status.waiting_for.as_deref();
    let what = what.unwrap_or("the first reconcile with the kernel's tables");
    Err(format!("not ready yet: waiting for {what}"))
}

/// A body of one report, made at most once in each coding.
#[derive(Default)]
struct Rendering {
    plain: Option<Bytes>,
    compressed: Option<Bytes>,
}

impl Rendering {
    fn body(&mut self, wants_gzip: bool, render: impl FnOnce() -> Bytes) -> (Bytes, bool) {
        let plain = self.plain.get_or_insert_with(render);
        if !wants_gzip || plain.len() < WORTH_COMPRESSING {
            return (plain.clone(), false);
        }
        let compressed = self
            .compressed
            .get_or_insert_with(|| gzip(plain, Compression::fast()));
        (compressed.clone(), true)
    }
}

//! The fold thread's answers to the serving side.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use connmon_core::report::{Report, Reporter, Unavailable};
use tokio::sync::{mpsc, oneshot};

/// A fold that does not answer for so long is stuck; the scrape fails rather
/// than serving old numbers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Requests in the queue; the server lets waiting scrapes share one, so a few
/// are plenty. More wait their turn.
const QUEUE: usize = 64;

/// One request for a report.
pub type Request = oneshot::Sender<Arc<Report>>;

/// Asks the fold thread for reports.
#[derive(Clone, Debug)]
pub struct FoldReporter {
    requests: mpsc::Sender<Request>,
}

/// A reporter and the queue that the fold thread answers.
pub fn channel() -> (FoldReporter, mpsc::Receiver<Request>) {
    let (requests, queue) = mpsc::channel(QUEUE);
    (FoldReporter { requests }, queue)
}

impl Reporter for FoldReporter {
    fn report(
        &self,
    ) -> Pin<Box<dyn Future<Output = Result<Arc<Report>, Unavailable>> + Send + '_>> {
        Box::pin(async move {
            let (request, answer) = oneshot::channel();
            let ask = async {
                self.requests
                    .send(request)
                    .await
                    .map_err(|_| Unavailable::Gone)?;
                answer.await.map_err(|_| Unavailable::Gone)
            };
            match tokio::time::timeout(ANSWER_TIMEOUT, ask).await {
                Ok(result) => result,
                Err(_) => Err(Unavailable::Timeout),
            }
        })
    }
}

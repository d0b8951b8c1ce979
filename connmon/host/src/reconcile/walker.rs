//! The walker: a thread that reads the kernel's socket tables when asked, and
//! sends what it reads as [`WalkMessage`]s.
//!
//! It enters other network namespaces with setns(2), so nothing else may run on
//! it. It starts before the agent restricts itself by Landlock, which would
//! refuse `/proc/<pid>/ns/net` to every thread started later.

mod outbox;
mod read;
mod session;

pub use outbox::BATCH_ROWS;
pub use session::{SocketSource, WalkerOptions};

use std::io;
use std::sync::mpsc as sync;
use std::thread::JoinHandle;
use std::time::Duration;

use connmon_core::scan::{Walk, WalkMessage};
use tokio::sync::mpsc;

use session::Session;

/// The handle of the walker thread. Dropping it ends the thread after the
/// current walk; dropping the [`WalkMessages`] breaks that walk off.
#[derive(Debug)]
pub struct Walker {
    requests: sync::SyncSender<Walk>,
    thread: JoinHandle<()>,
}

/// Why a request for a walk was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// Another one already waits for the current walk to end.
    Busy,
    /// The thread is gone.
    Gone,
}

impl Walker {
    /// Starts the thread. It waits for the first request.
    ///
    /// # Errors
    /// Without a readable `/proc/self/ns/net`, or when no thread can be had.
    pub fn spawn(options: WalkerOptions) -> io::Result<(Self, WalkMessages)> {
        Self::spawn_after(options, || Ok(()))
    }

    /// Starts the thread, on which `enter` runs first (its sandbox).
    ///
    /// # Errors
    /// As [`Walker::spawn`], and what `enter` returns.
    pub fn spawn_after(
        options: WalkerOptions,
        enter: impl FnOnce() -> io::Result<()> + Send + 'static,
    ) -> io::Result<(Self, WalkMessages)> {
        let (requests, waiting) = sync::sync_channel(1);
        let (sender, receiver) = mpsc::channel(CHANNEL_MESSAGES);
        let (begun, has_begun) = sync::sync_channel(1);
        let (entered, has_entered) = sync::sync_channel(1);
        let mut session = Session::new(options, sender, has_begun)?;
        let thread = std::thread::Builder::new()
            .name("connmon-walker".into())
            .spawn(move || {
                let result = enter();
                let refused = result.is_err();
                if entered.send(result).is_err() || refused {
                    return;
                }
                while let Ok(walk) = waiting.recv() {
                    if session.walk(walk).is_err() {
                        return;
                    }
                }
            })?;
        has_entered.recv().map_err(io::Error::other)??;
        let messages = WalkMessages {
            receiver,
            begun,
            is_begin: false,
        };
        Ok((Self { requests, thread }, messages))
    }

    /// Asks for a walk. One with [`connmon_core::scan::Trigger::Startup`] reads
    /// every namespace by [`WalkerOptions::source`], or without it twice. Never
    /// blocks: at most one walk waits for the current one to end.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn request(&self, walk: Walk) -> Result<(), Refused> {
        self.requests.try_send(walk).map_err(|error| match error {
            sync::TrySendError::Full(_) => Refused::Busy,
            sync::TrySendError::Disconnected(_) => Refused::Gone,
        })
    }

    /// Ends the thread and waits for it. Drop the [`WalkMessages`] first, or
    /// the current walk may wait for ever for room to send.
    ///
    /// # Errors
    /// The payload of the thread's panic.
    pub fn join(self) -> std::thread::Result<()> {
        drop(self.requests);
        self.thread.join()
    }
}

/// The receiving end. Asking for the next message acknowledges the last one:
/// the walker reads no table before [`WalkMessage::Begin`] is acknowledged, so
/// every event from before the first row is folded before that row.
#[derive(Debug)]
pub struct WalkMessages {
    receiver: mpsc::Receiver<WalkMessage>,
    begun: sync::SyncSender<()>,
    /// The last message was a beginning.
    is_begin: bool,
}

impl WalkMessages {
    /// The next message; `None` when the thread has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<WalkMessage> {
        self.acknowledge();
        let message = self.receiver.recv().await;
        self.take(message)
    }

    /// [`WalkMessages::next`] for a thread without an async runtime.
    pub fn blocking_next(&mut self) -> Option<WalkMessage> {
        self.acknowledge();
        let message = self.receiver.blocking_recv();
        self.take(message)
    }

    fn acknowledge(&mut self) {
        if std::mem::take(&mut self.is_begin) {
            // There is room for one, and no second is sent before the first
            // is received. Fails only when the thread has ended.
            let _ = self.begun.try_send(());
        }
    }

    fn take(&mut self, message: Option<WalkMessage>) -> Option<WalkMessage> {
        self.is_begin = matches!(message, Some(WalkMessage::Begin(_)));
        message
    }
}

/// How long to rest after a walk that took `cpu_ns`, on the walker's thread and
/// for folding its rows, so that walks take at most 0.5 % of a core.
pub fn rest_after(cpu_ns: u64) -> Duration {
    Duration::from_nanos(cpu_ns.saturating_mul(WALK_SHARE))
}

/// 1 / 0.5 %.
const WALK_SHARE: u64 = 200;

/// Messages in the channel, which bounds the memory between the two threads.
const CHANNEL_MESSAGES: usize = 8;

#[cfg(test)]
mod tests;

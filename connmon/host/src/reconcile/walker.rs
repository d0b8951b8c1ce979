//! The walker: a thread of its own that reads kernel tables on command and
//! sends what it reads as [`WalkMessage`]s.
//!
//! It enters other network namespaces with setns(2), so nothing else may run
//! on it. It has to be started before the agent gives up the right to read
//! `/proc/<pid>/ns/net` (Landlock restricts the calling thread and those it
//! starts later).

mod outbox;
mod read;
mod session;

use std::io;
use std::sync::mpsc as sync;
use std::thread::JoinHandle;
use std::time::Duration;

use connmon_core::scan::{Walk, WalkMessage};
use rustix::time::{ClockId, clock_gettime};
use tokio::sync::mpsc;

use super::SocketSource;
use super::netns::Roots;
use session::Session;

/// What holds for every walk.
pub struct WalkerOptions {
    /// Every namespace (`--netns all`), or the host's alone.
    pub all_netns: bool,
    /// Whether owners of listening sockets are looked for (`--listeners`).
    pub listeners: bool,
    /// Read `/proc` only (polling mode).
    pub force_proc: bool,
    /// For the first walk, which drops it; without one that is two dumps.
    pub source: Option<Box<dyn SocketSource>>,
    /// Where namespaces and processes are found.
    pub roots: Roots,
}

impl Default for WalkerOptions {
    fn default() -> Self {
        Self {
            all_netns: true,
            listeners: true,
            force_proc: false,
            source: None,
            roots: Roots::default(),
        }
    }
}

/// The handle of the walker thread. Dropping it ends the thread after the
/// walk under way; dropping the [`WalkMessages`] breaks that one off.
#[derive(Debug)]
pub struct Walker {
    requests: sync::SyncSender<Walk>,
    thread: JoinHandle<()>,
}

/// Why a walk was not taken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refused {
    /// One is under way and another already waits.
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
        let (folded, begun) = sync::sync_channel(1);
        let (entered, has_entered) = sync::sync_channel(1);
        let mut session = Session::new(options, sender, begun)?;
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
            folded,
            owed: false,
        };
        Ok((Self { requests, thread }, messages))
    }

    /// Asks for a walk; one with [`connmon_core::scan::Trigger::Startup`] reads every namespace
    /// by [`WalkerOptions::source`], or without it twice, and then carries
    /// figures in pass 1 alone. Never blocks: at most one walk waits behind the one
    /// under way.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn request(&self, walk: Walk) -> Result<(), Refused> {
        self.requests.try_send(walk).map_err(|error| match error {
            sync::TrySendError::Full(_) => Refused::Busy,
            sync::TrySendError::Disconnected(_) => Refused::Gone,
        })
    }

    /// Whether the thread has ended; if nobody stopped it, it panicked.
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends the thread and waits for it. Drop the [`WalkMessages`] first, or
    /// a walk under way may wait for them for ever.
    ///
    /// # Errors
    /// The payload of the thread's panic.
    pub fn join(self) -> std::thread::Result<()> {
        drop(self.requests);
        self.thread.join()
    }
}

/// The receiving end. Asking for the next message says that the last one is
/// dealt with: the walker reads no table before [`WalkMessage::Begin`] is, so
/// that every event of before the first row is folded before the walk counts
/// as begun.
#[derive(Debug)]
pub struct WalkMessages {
    receiver: mpsc::Receiver<WalkMessage>,
    folded: sync::SyncSender<()>,
    owed: bool,
}

impl WalkMessages {
    /// The next message; `None` when the thread has ended. Cancel safe.
    pub async fn next(&mut self) -> Option<WalkMessage> {
        self.settle();
        let message = self.receiver.recv().await;
        self.take(message)
    }

    /// [`WalkMessages::next`] for a thread without an async runtime.
    pub fn blocking_next(&mut self) -> Option<WalkMessage> {
        self.settle();
        let message = self.receiver.blocking_recv();
        self.take(message)
    }

    fn settle(&mut self) {
        if std::mem::take(&mut self.owed) {
            // Room for one, and one is owed at a time; without a thread
            // there is nobody to tell.
            let _ = self.folded.try_send(());
        }
    }

    fn take(&mut self, message: Option<WalkMessage>) -> Option<WalkMessage> {
        self.owed = matches!(message, Some(WalkMessage::Begin(_)));
        message
    }
}

/// How long to rest after a walk that took `cpu_ns`, so that walks take at
/// most 0.5 % of a core.
///
/// `cpu_ns` is the whole cost: the walker's ([`connmon_core::scan::WalkSummary::cpu_ns`]) and what
/// folding the rows took.
pub fn rest_after(cpu_ns: u64) -> Duration {
    Duration::from_nanos(cpu_ns.saturating_mul(WALK_SHARE))
}

/// 1 / 0.5 %.
const WALK_SHARE: u64 = 200;

/// Rows per message: enough that sending costs nothing beside the dump, few
/// enough that the fold is back at its ring within a millisecond.
pub const BATCH_ROWS: usize = 512;

/// Messages under way, which bounds the memory between the two threads.
const CHANNEL_MESSAGES: usize = 8;
/// The receiving end is gone; so shall the thread be.
struct Closed;
pub(super) fn now_ns(clock: ClockId) -> u64 {
    let now = clock_gettime(clock);
    // Neither clock is ever negative.
    (now.tv_sec as u64) * 1_000_000_000 + now.tv_nsec as u64
}
#[cfg(test)]
mod tests;

//! The thread that writes the log, and the bounded queue before it.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::ThreadId;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Most bytes of lines that wait to be written. Lines beyond it are dropped,
/// and counted in a line of their own once the others are written.
const QUEUE_BYTES: usize = 256 * 1024;

/// How long the end of the process waits for stderr to take what is queued.
const LAST_LINES_TIME: Duration = Duration::from_secs(1);

/// How often the thread looks for a sandbox to enter while it waits for stderr.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};

static QUEUE: Queue = Queue::new();

/// From now on a thread writes what is logged; before, whoever logs does.
///
/// # Errors
/// When the thread cannot be started.
pub fn write_in_background() -> io::Result<()> {
    let write_all = || {
        QUEUE.lock().writer = Some(std::thread::current().id());
        loop {
            let text = QUEUE.next();
            wait_for_stderr();
            write_now(&text);
            QUEUE.written();
        }
    };
    let thread = std::thread::Builder::new()
        .name("connmon-log".into())
        .spawn(write_all)?;
    QUEUE.lock().writer = Some(thread.thread().id());
    Ok(())
}

/// Has the thread that writes the log call `enter`, which takes from it what
/// it does not need.
pub fn enter_sandbox(enter: impl FnOnce() + Send + 'static) {
    QUEUE.lock().sandbox = Some(Box::new(enter));
    QUEUE.changed.notify_all();
}

/// Logs a line, without a wait for stderr where a thread writes the log.
pub(super) fn write(line: String) {
    if let Some(line) = QUEUE.push(line, QUEUE_BYTES) {
        write_now(&line);
    }
}

/// Writes the last line of the process, after all others. Gives up after a
/// second when nobody reads stderr.
pub fn last_line(line: String) {
    if let Some(line) = QUEUE.push(line, usize::MAX) {
        write_now(&line);
    }
    flush();
}

/// Waits until everything that was logged is written, a second at most.
pub fn flush() {
    QUEUE.wait_until_written(LAST_LINES_TIME);
}

fn write_now(text: &str) {
    // There is no other place to report that stderr is gone.
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Waits until stderr takes something, or has an error that the write returns.
fn wait_for_stderr() {
    let stderr = io::stderr();
    loop {
        let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
        let polled = poll(&mut fds, Some(&LOOK));
        if !matches!(polled, Ok(0) | Err(rustix::io::Errno::INTR)) {
            return;
        }
        let sandbox = QUEUE.lock().sandbox.take();
        if let Some(enter) = sandbox {
            enter();
        }
    }
}

struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    /// The thread that writes, once there is one.
    writer: Option<ThreadId>,
    /// To be called by that thread.
    sandbox: Option<Box<dyn FnOnce() + Send>>,
    lines: VecDeque<String>,
    /// Length of `lines` together.
    bytes: usize,
    /// Lines dropped since the queue was last empty.
    dropped: u64,
    /// The writer has taken something and not written it yet.
    writing: bool,
}

impl Queue {
    const fn new() -> Self {
        Self {
            state: Mutex::new(State {
                writer: None,
                sandbox: None,
                lines: VecDeque::new(),
                bytes: 0,
                dropped: 0,
                writing: false,
            }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the caller has to write itself: it is the writer, or there is
    /// none yet.
    fn is_caller(state: &State) -> bool {
        let caller = std::thread::current().id();
        state.writer.is_none_or(|writer| writer == caller)
    }

    /// Queues a line if those that wait stay within `most` bytes. After one
    /// that was dropped none is queued until the queue is empty, so that the
    /// line with their number stands where they are missing. Returns the line
    /// where the caller has to write it.
    fn push(&self, line: String, most: usize) -> Option<String> {
        let mut state = self.lock();
        if Self::is_caller(&state) {
            return Some(line);
        }
        let last = most == usize::MAX;
        if last || (state.dropped == 0 && state.bytes + line.len() <= most) {
            state.bytes += line.len();
            state.lines.push_back(line);
            self.changed.notify_all();
        } else {
            state.dropped += 1;
        }
        None
    }

    /// What is to be written next; waits for it, and enters the sandbox
    /// meanwhile.
    fn next(&self) -> String {
        let mut state = self.lock();
        loop {
            if let Some(enter) = state.sandbox.take() {
                drop(state);
                enter();
                state = self.lock();
            } else if let Some(text) = state.take() {
                state.writing = true;
                return text;
            } else {
                let waited = self.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn written(&self) {
        self.lock().writing = false;
        self.changed.notify_all();
    }

    fn wait_until_written(&self, most: Duration) {
        let until = Instant::now() + most;
        let mut state = self.lock();
        if Self::is_caller(&state) {
            return;
        }
        while !state.lines.is_empty() || state.dropped > 0 || state.writing {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let waited = self.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl State {
    /// The line that waits longest; after the last one, how many were dropped.
    fn take(&mut self) -> Option<String> {
        if let Some(line) = self.lines.pop_front() {
            self.bytes -= line.len();
            return Some(line);
        }
        let dropped = std::mem::take(&mut self.dropped);
        (dropped > 0).then(|| {
            let text = format!(
                "{dropped} log lines dropped: the reader of stderr is too slow; use a faster one or a higher --log.level"
            );
            super::line_now(log::Level::Warn, module_path!(), &text)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A queue whose writer is another thread.
    fn queue() -> Queue {
        let queue = Queue::new();
        let writer = std::thread::spawn(|| {});
        queue.lock().writer = Some(writer.thread().id());
        queue
    }

    fn written(queue: &Queue) -> String {
        let text = queue.next();
        queue.written();
        text
    }

    #[test]
    fn lines_beyond_the_bound_are_counted() {
        let queue = queue();
        for n in 0..10 {
            assert_eq!(queue.push(format!("line {n}\n"), 3 * 7), None);
        }
        for n in 0..3 {
            assert_eq!(written(&queue), format!("line {n}\n"));
        }
        let counted = written(&queue);
        assert!(counted.contains("level=warn"), "{counted}");
        assert!(counted.contains("7 log lines dropped"), "{counted}");
        queue.push("next\n".to_owned(), 21);
        assert_eq!(written(&queue), "next\n");
        assert_eq!(queue.lock().bytes, 0);
    }

    #[test]
    fn no_line_comes_between_dropped_ones_and_count() {
        let queue = queue();
        for line in ["first\n", "too long a line\n", "a\n"] {
            queue.push(line.to_owned(), 10);
        }
        queue.push("last\n".to_owned(), usize::MAX);
        assert_eq!(written(&queue), "first\n");
        assert_eq!(written(&queue), "last\n");
        assert!(written(&queue).contains("2 log lines dropped"));
    }

    #[test]
    fn a_flush_waits_for_the_queue_within_its_limit() {
        let queue = queue();
        let asked = Instant::now();
        queue.wait_until_written(Duration::from_secs(60));
        queue.push("line\n".to_owned(), 10);
        queue.wait_until_written(Duration::from_millis(100));
        assert!(asked.elapsed() >= Duration::from_millis(100));
        std::thread::scope(|scope| {
            scope.spawn(|| written(&queue));
            queue.wait_until_written(Duration::from_secs(60));
        });
        assert!(asked.elapsed() < Duration::from_secs(60));
    }
}

//! Why there is no tracing, or not by a better method.

use std::error::Error;
use std::{fmt, io};

use aya::programs::ProgramError;
use connmon_core::probe::{AttachFailure, Method, Stage};

use super::{Diagnosis, HostFacts};

/// Most bytes of an error's message.
const MAX_MESSAGE_BYTES: usize = 300;
/// Most bytes of a verifier log that are kept.
const MAX_LOG_BYTES: usize = 2048;

/// Tracing cannot start. Displays as one sentence: cause and remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachError {
    /// What failed, for each method that was tried.
    pub failures: Vec<AttachFailure>,
    /// What it means on this host.
    pub diagnosis: Diagnosis,
}

impl fmt::Display for AttachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.diagnosis.fmt(f)
    }
}

impl Error for AttachError {}

impl AttachError {
    /// `--netns host` on a kernel whose events carry no namespace.
    pub(super) fn no_namespaces(reason: &str) -> Self {
        Self {
            failures: vec![AttachFailure::new(Method::None, Stage::Btf, reason)],
            diagnosis: Diagnosis {
                cause: format!(
                    "--netns host: without the kernel's BTF, events carry no network namespace ({reason})"
                ),
                remedy: "run a kernel with CONFIG_DEBUG_INFO_BTF, or leave --netns at all".into(),
            },
        }
    }

    /// The object was not read, or a map of it not created or mapped.
    pub(super) fn map(what: &str, error: &(dyn Error + 'static), ring_bytes: u32) -> Self {
        let message = format!("{what}: {}", chain(error));
        let failure = AttachFailure {
            errno: errno(error),
            ..AttachFailure::new(Method::None, Stage::Map, message)
        };
        Self::diagnosed(vec![failure], ring_bytes)
    }

    /// `failures` kept the state program, or a map, from being set up.
    pub(super) fn diagnosed(failures: Vec<AttachFailure>, ring_bytes: u32) -> Self {
        let diagnosis = HostFacts::read().diagnose(&failures, ring_bytes);
        Self {
            failures,
            diagnosis,
        }
    }
}

/// Why a program was not loaded and attached by `method`.
pub(super) fn failure(method: Method, error: &ProgramError) -> AttachFailure {
    let mut log = String::new();
    let (stage, message) = match error {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => {
            log = log_tail(&verifier_log.to_string());
            (Stage::Load, format!("load: {io_error}"))
        }
        ProgramError::SyscallError(error) => {
            (Stage::Attach, format!("{}: {}", error.call, error.io_error))
        }
        ProgramError::Btf(_) => (Stage::Btf, chain(error)),
        error => (Stage::Attach, chain(error)),
    };
    let end = message.floor_char_boundary(MAX_MESSAGE_BYTES);
    let more = if end < message.len() { "…" } else { "" };
    AttachFailure {
        method,
        stage,
        errno: errno(error),
        message: format!("{}{more}", message[..end].replace('\n', " ")),
        verifier_log: log,
    }
}

/// An error and its causes in one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

/// The error number of the first `io::Error` among an error and its causes.
fn errno(error: &(dyn Error + 'static)) -> Option<i32> {
    causes(error)
        .find_map(|cause| cause.downcast_ref::<io::Error>())?
        .raw_os_error()
}

/// An error and its causes.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// The last lines of a verifier log, without its statistics.
fn log_tail(log: &str) -> String {
    const STATISTICS: [&str; 5] = [
        "processed ",
        "verification time",
        "stack depth",
        "peak_states",
        "mark_read",
    ];
    let is_statistics = |line: &str| STATISTICS.iter().any(|start| line.starts_with(start));
    let lines: Vec<_> = (log.lines().map(str::trim))
        .filter(|line| !line.is_empty() && !is_statistics(line))
        .collect();
    let text = lines.join("\n");
    match text.len().checked_sub(MAX_LOG_BYTES) {
        None | Some(0) => text,
        Some(excess) => {
            let tail = &text[text.ceil_char_boundary(excess)..];
            let whole = tail.split_once('\n').map_or(tail, |(_, whole)| whole);
            whole.to_owned()
        }
    }
}

//! The kernel probes, how each is attached, and why not by a better method.

use std::fmt;

use serde::Serialize;

/// A kernel probe (label `probe`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Probe {
    /// State changes.
    SetState,
    /// Active opens.
    Connect,
    /// Accepts.
    Accept,
}

impl Probe {
    /// Every probe.
    pub const ALL: [Self; 3] = [Self::SetState, Self::Connect, Self::Accept];

    /// Label value.
    pub fn label(self) -> &'static str {
        match self {
            Self::SetState => "inet_sock_set_state",
            Self::Connect => "tcp_connect",
            Self::Accept => "inet_csk_accept",
        }
    }
}

/// How a probe is attached (label `method`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// BTF raw tracepoint.
    TpBtf,
    /// Classic tracepoint.
    Tracepoint,
    /// Function entry trampoline.
    Fentry,
    /// Function exit trampoline.
    Fexit,
    /// kprobe.
    Kprobe,
    /// kretprobe.
    Kretprobe,
    /// Not attached.
    None,
}

impl Method {
    /// Label value.
    pub fn label(self) -> &'static str {
        match self {
            Self::TpBtf => "tp_btf",
            Self::Tracepoint => "tracepoint",
            Self::Fentry => "fentry",
            Self::Fexit => "fexit",
            Self::Kprobe => "kprobe",
            Self::Kretprobe => "kretprobe",
            Self::None => "none",
        }
    }
}

/// Which step of attaching failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The configuration excludes this method.
    Configuration,
    /// The kernel's BTF is absent, or lacks a type or member.
    Btf,
    /// Creating or mapping a BPF map.
    Map,
    /// Reading the tracepoint's format in tracefs.
    Tracefs,
    /// The tracepoint's fields are not where the program reads them.
    Format,
    /// BPF_PROG_LOAD, the verifier included.
    Load,
    /// Attaching the loaded program.
    Attach,
}

/// Why a probe was not attached by a method.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AttachFailure {
    /// The method tried; [`Method::None`] if it failed before any.
    pub method: Method,
    /// The step that failed.
    pub stage: Stage,
    /// The kernel's error number, if there is one.
    pub errno: Option<i32>,
    /// What failed, in one line.
    pub message: String,
    /// The last lines of the verifier's log, at most 2 KiB; empty if there is
    /// none.
    pub verifier_log: String,
}

impl AttachFailure {
    /// A failure without an error number or verifier log.
    pub fn new(method: Method, stage: Stage, message: impl Into<String>) -> Self {
        Self {
            method,
            stage,
            errno: None,
            message: message.into(),
            verifier_log: String::new(),
        }
    }
}

impl fmt::Display for AttachFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.method != Method::None && self.stage != Stage::Configuration {
            write!(f, "{}: ", self.method.label())?;
        }
        f.write_str(&self.message)?;
        match self.verifier_log.lines().next_back() {
            Some(line) => write!(f, " ({line})"),
            None => Ok(()),
        }
    }
}

/// How a probe is attached, and why better methods failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rung {
    /// Probe.
    pub probe: Probe,
    /// Method.
    pub method: Method,
    /// One for each method tried before this one, best first.
    pub failures: Vec<AttachFailure>,
}

impl Rung {
    /// Why the method is not a better one, in one line; `None` for the best.
    pub fn reason(&self) -> Option<String> {
        let failures: Vec<_> = self.failures.iter().map(AttachFailure::to_string).collect();
        (!failures.is_empty()).then(|| failures.join("; "))
    }
}

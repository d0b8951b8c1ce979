//! The kernel probes and how each is attached.

/// A probe of the contract (label `probe`).
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

/// Where a probe ended up on its ladder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rung {
    /// Probe.
    pub probe: Probe,
    /// Method.
    pub method: Method,
    /// Why it is not higher, in words; `None` on the highest rung.
    pub reason: Option<String>,
}

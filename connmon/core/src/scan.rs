//! What a reader of the kernel's socket tables sends to the fold: rows, and
//! which namespace and which scan they belong to.

use crate::event::{Cookie, NetnsId, Owner, SocketId, Traffic, Tuple};

/// Why a walk happens (label `trigger`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// The first merge.
    Startup,
    /// The periodic audit.
    Interval,
    /// A drop counter or a missed-run counter rose.
    Loss,
}

/// How a namespace's sockets were read (label `access`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Access {
    /// sock_diag.
    Diag,
    /// `/proc/<pid>/net/tcp{,6}`.
    Proc,
    /// Not at all.
    Unaudited,
}

/// What a walk is for.
///
/// | `audit` | `traffic` | rows |
/// |---|---|---|
/// | true | either | every open state, SYN_SENT, SYN_RECV and LISTEN |
/// | false | true | the open states and LISTEN: a traffic sample (LISTEN only from /proc, which has no figures) |
/// | false | false | LISTEN only: goes on with the search for their owners |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Trigger.
    pub trigger: Trigger,
    /// Whether rows carry [`Traffic`] (INET_DIAG_INFO).
    pub traffic: bool,
    /// Whether absence from this walk counts (audits and polls; a pure
    /// traffic sample does not).
    pub audit: bool,
}

/// One socket of a kernel table. TIME_WAIT minisocks and CLOSE rows are
/// already left out.
///
/// SYN_RECV rows are mostly request sockets: half-open, no connection yet and
/// unknown to the event stream. They come with audits only, to be counted for
/// `connmon_state_connections{state="syn_recv"}` after the filters; they are
/// never seeded, bound or added. (One that matches a live key is a child in
/// a simultaneous or Fast Open and is present like any other row.)
///
/// A dump is not atomic: the same socket may come twice, and one may be
/// missing although it is there (kernel-notes §6).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// TCP state, see [`connmon_common::state`].
    pub state: u8,
    /// Endpoints, v4-mapped addresses unmapped; LISTEN rows have the
    /// listener's address and port as local end.
    pub tuple: Tuple,
    /// Address of the kernel's `struct sock` as in events, which a source tells
    /// of full sockets; else 0.
    pub id: SocketId,
    /// Cookie; 0 from /proc, and from a source where there is none yet.
    pub cookie: Cookie,
    /// Socket inode; 0 for an unaccepted child or an orphan, and from a source,
    /// as are the queues.
    pub inode: u32,
    /// Accept queue length for LISTEN rows, else receive queue bytes.
    pub receive_queue: u32,
    /// Accept queue limit for LISTEN rows (0 from /proc, which does not tell
    /// it), else send queue bytes.
    pub send_queue: u32,
    /// Figures, where asked for and given; only in ESTABLISHED, FIN_WAIT1,
    /// FIN_WAIT2, CLOSE_WAIT, LAST_ACK and CLOSING, payload bytes alone. A
    /// FIN that arrives while the kernel fills the row can make
    /// `received_bytes` one too high, so a later figure may be one lower.
    pub traffic: Option<Traffic>,
    /// Owner of a LISTEN row as found under /proc/*/fd; pid 0 when unknown.
    pub owner: Owner,
}

/// What the walker tells the fold, in this order:
/// `Begin (NamespaceBegin Rows* NamespaceEnd)* End`. A startup walk reads
/// every namespace once where its `SocketSource` shows all, else twice, where
/// it can at the same time: rows of pass 0 and 1 come in any mixture, and the
/// fold seeds their union.
#[derive(Debug)]
pub enum WalkMessage {
    /// A walk starts. The fold drains the ring before it looks at rows.
    Begin(Walk),
    /// Rows of this namespace follow.
    NamespaceBegin {
        /// Inode. Where the walker may not read namespace inodes (no
        /// CAP_SYS_PTRACE), the inode of the namespace's `/proc/<pid>/net/tcp`
        /// stands in: unique among the namespaces of a walk and stable, but
        /// not what events carry; [`WalkSummary::surrogates`] counts them.
        netns: NetnsId,
        /// Whether `netns` is such a surrogate id.
        surrogate: bool,
        /// CLOCK_MONOTONIC before the dump was asked for.
        t0_ns: u64,
        /// `net.ipv4.ip_local_port_range` of the namespace, inclusive.
        ephemeral: (u16, u16),
    },
    /// Sockets of the namespace last begun; bounded batches.
    Rows {
        /// Pass of a startup walk (0 or 1); 0 otherwise.
        pass: u8,
        /// In each pass the listeners of a family come before its connections.
        rows: Vec<Row>,
    },
    /// The namespace is read.
    NamespaceEnd {
        /// Inode.
        netns: NetnsId,
        /// How it was read.
        access: Access,
        /// False when a dump was cut short: absence then proves nothing.
        complete: bool,
    },
    /// The walk is over.
    End(WalkSummary),
}

/// Totals of a walk.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WalkSummary {
    /// Namespaces read by sock_diag.
    pub diag: u32,
    /// Namespaces read by /proc.
    pub proc: u32,
    /// Namespaces known but unreadable.
    pub unaudited: u32,
    /// The list of namespaces is not whole: one that this walk did not name
    /// may be there all the same.
    pub unlisted: bool,
    /// Namespaces named by a surrogate id, see [`WalkMessage::NamespaceBegin`].
    pub surrogates: u32,
    /// Lines of /proc or netlink messages that did not parse and were skipped.
    pub undecodable: u64,
    /// The time for owners was up before all were found; a walk of listeners
    /// alone goes on.
    pub owners_wait: bool,
    /// Why the first unreadable or /proc-read namespace is so, in words.
    pub reason: Option<String>,
    /// Wall time of the walk.
    pub duration_ns: u64,
    /// CPU time of the walk (CLOCK_THREAD_CPUTIME_ID of its threads).
    pub cpu_ns: u64,
    /// Every namespace was read twice.
    pub twice: bool,
}

//! The messages of a walk over the kernel's socket tables: rows, and the
//! namespace and walk that they belong to.

use crate::event::{Cookie, NetnsId, Owner, SocketId, Traffic, Tuple};

/// Why a walk happens (label `trigger`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// The initial scan.
    Startup,
    /// The periodic audit.
    Interval,
    /// A counter of dropped events or missed runs rose.
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

/// The purpose of a walk.
///
/// | `audit` | `traffic` | rows |
/// |---|---|---|
/// | true | either | every open state, SYN_SENT, SYN_RECV and LISTEN |
/// | false | true | the open states; LISTEN only from /proc, which has no [`Traffic`] |
/// | false | false | LISTEN, to find more owners |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Trigger.
    pub trigger: Trigger,
    /// Rows carry [`Traffic`] (INET_DIAG_INFO).
    pub traffic: bool,
    /// Absence from this walk counts: audits and polls.
    pub audit: bool,
}

/// One socket of a kernel table, except TIME_WAIT and CLOSE.
///
/// Most SYN_RECV rows are request sockets: half-open, not reported by events.
/// They come with audits and are counted, but never added. One that matches an
/// entry is a child in a simultaneous or Fast Open.
///
/// A dump is not atomic: a socket may come twice or be missing (kernel-notes
/// §6).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    /// TCP state, see [`connmon_common::state`].
    pub state: u8,
    /// Endpoints, IPv4-mapped addresses as IPv4. The local end of a LISTEN row
    /// is the listener's.
    pub tuple: Tuple,
    /// Address of the kernel's `struct sock`, as in events; only from a
    /// `SocketSource` and for full sockets, else 0.
    pub id: SocketId,
    /// Cookie; 0 from /proc, and if a `SocketSource` finds none yet.
    pub cookie: Cookie,
    /// Inode; 0 if not accepted or orphaned, and from a `SocketSource`, which
    /// has no queues either.
    pub inode: u32,
    /// Accept queue length of LISTEN rows, else receive queue, bytes.
    pub receive_queue: u32,
    /// Accept queue limit of LISTEN rows (0 from /proc), else send queue, bytes.
    pub send_queue: u32,
    /// Payload bytes, segments and RTT, if requested; only in ESTABLISHED,
    /// FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK and CLOSING. A FIN that
    /// arrives meanwhile can make `received_bytes` one too high, so a later
    /// value may be one lower.
    pub traffic: Option<Traffic>,
    /// Owner of a LISTEN row, from /proc/*/fd; pid 0 if unknown.
    pub owner: Owner,
}

/// The messages of a walk, in this order:
/// `Begin (NamespaceBegin Rows* NamespaceEnd)* End`. The initial scan reads
/// every namespace twice, in passes 0 and 1, unless a `SocketSource` shows all
/// sockets; the rows of both passes may be mixed.
#[derive(Debug)]
pub enum WalkMessage {
    /// A walk starts. The fold drains the ring before it looks at rows.
    Begin(Walk),
    /// Rows of this namespace follow.
    NamespaceBegin {
        /// Inode. If the walker may not read it (no CAP_SYS_PTRACE), the inode
        /// of `/proc/<pid>/net/tcp` as a surrogate id: stable, and unique in a
        /// walk, but not the id in events.
        netns: NetnsId,
        /// Whether `netns` is a surrogate id.
        surrogate: bool,
        /// CLOCK_MONOTONIC before the first request for rows.
        t0_ns: u64,
        /// `net.ipv4.ip_local_port_range` of the namespace, inclusive.
        ephemeral: (u16, u16),
    },
    /// Sockets of the namespace last begun; bounded batches.
    Rows {
        /// Pass of the initial scan (0 or 1); else 0.
        pass: u8,
        /// In each pass the listeners of a family precede its connections.
        rows: Vec<Row>,
    },
    /// The namespace is read.
    NamespaceEnd {
        /// As in `NamespaceBegin`.
        netns: NetnsId,
        /// How it was read.
        access: Access,
        /// False if rows are missing; then absence proves nothing.
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
    /// The list of namespaces is incomplete.
    pub unlisted: bool,
    /// Namespaces with a surrogate id.
    pub surrogates: u32,
    /// Lines of /proc or netlink messages that did not parse.
    pub undecodable: u64,
    /// The time limit ended the search for owners; a walk for LISTEN rows
    /// continues it.
    pub owners_wait: bool,
    /// Why the first namespace without sock_diag could not be read by it.
    pub reason: Option<String>,
    /// Wall time of the walk.
    pub duration_ns: u64,
    /// CPU time of the walk (CLOCK_THREAD_CPUTIME_ID of its threads).
    pub cpu_ns: u64,
    /// Every namespace was read twice.
    pub twice: bool,
}

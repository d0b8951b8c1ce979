//! What the agent and the programs share beside the records: names of maps
//! and globals, the kernel fields whose offsets the agent resolves, and the
//! layouts of the counters, of a batch of the socket scan and of the
//! tracepoint's context.

use core::mem::{offset_of, size_of};

use crate::wire::{EndsV6, Live};

/// The event ring buffer.
pub const EVENTS_MAP: &str = "EVENTS";
/// Per-CPU array with one [`PerCpu`].
pub const COUNTERS_MAP: &str = "COUNTERS";
/// Array with one [`Batch`], mapped into the agent.
pub const BATCH_MAP: &str = "BATCH";

/// Most chain ends and sockets that one run of the socket scan visits.
pub const STEPS: usize = 64;

/// State of the scan of the kernel's TCP socket table: where the next run
/// begins, and what the last one found.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Batch {
    /// The first bucket that is not done. The agent sets it to 0 to begin.
    pub bucket: u64,
    /// Buckets of the table; 0 if the table was not found.
    pub buckets: u64,
    /// Sockets found in the buckets that this run finished.
    pub found: u64,
    /// The same, including the unfinished bucket.
    pub count: u64,
    /// The next node of the unfinished bucket's chain.
    pub node: u64,
    /// One [`Live`] record each.
    pub sockets: [[u64; 12]; STEPS],
}

const _: () = assert!(size_of::<[u64; 12]>() == size_of::<Live<EndsV6>>());

/// Index of a probe in [`PerCpu`].
pub mod probe {
    /// `inet_sock_set_state`.
    pub const SET_STATE: usize = 0;
    /// `tcp_connect`.
    pub const CONNECT: usize = 1;
    /// `inet_csk_accept`.
    pub const ACCEPT: usize = 2;
    /// Number of probes.
    pub const COUNT: usize = 3;
}

/// Counters of one CPU. Written with atomic adds, since another run of a
/// program can interrupt it on the same CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PerCpu {
    /// Attempts to reserve a record, by [`probe`].
    pub produced: [u64; probe::COUNT],
    /// Failed attempts among them.
    pub ring_full: [u64; probe::COUNT],
    /// Recursion misses of `state_tp_btf` that its second program handled.
    pub recovered: u64,
    /// Recursion misses of `state_tp`, counted by its second program.
    pub missed: u64,
    /// State changes that the first program has handled and the second has not
    /// seen yet. The second entry is for a softirq that interrupts between the
    /// two programs.
    pub handled: [StateChange; 2],
    /// Uses of the second entry since the first was last taken.
    pub second_uses: u64,
    /// 1 while the first program runs.
    pub running: u64,
}

const _: () = assert!(size_of::<PerCpu>() == 112);

/// One state change of one socket.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct StateChange {
    /// The socket's kernel address; 0 in a free entry.
    pub socket: u64,
    /// Old and new state.
    pub states: u64,
}

/// After so many uses of the second entry of [`PerCpu::handled`], the first is
/// stale. More than the state changes of one softirq.
pub const STALE_AFTER: u64 = 1024;

/// Every so many records of one CPU, a program checks how full the ring is,
/// and wakes the reader if an eighth is used. A power of two. The ring must
/// hold far more records than this per CPU.
pub const WAKE_EVERY: u64 = 128;

/// Globals (read-only data) that the loader sets; all are `u32` except where
/// noted.
pub mod global {
    /// Bytes available in the ring at which the reader is woken (`u64`).
    pub const WAKE_BYTES: &str = "WAKE_BYTES";
    /// 1: leave loopback connections out.
    pub const DROP_LOOPBACK: &str = "DROP_LOOPBACK";
    /// Inode of the only network namespace to trace; 0: all.
    pub const ONLY_NETNS: &str = "ONLY_NETNS";
    /// 1: collect process name and cgroup at connect and accept.
    pub const OWNERS: &str = "OWNERS";
    /// 1: collect bytes, retransmissions and RTT at close.
    pub const TRAFFIC: &str = "TRAFFIC";
    /// 1: [`OFFSETS`] is valid.
    pub const OFFSETS_KNOWN: &str = "OFFSETS_KNOWN";
    /// 1: the kernel has `bpf_get_current_task_btf` (5.11).
    pub const TASK_BTF: &str = "TASK_BTF";
    /// The offset of each [`super::Field`] (`[u32; Field::COUNT]`).
    pub const OFFSETS: &str = "OFFSETS";
}

macro_rules! fields {
    ($($name:ident: $container:literal, $path:literal;)*) => {
        /// A kernel field whose offset the agent takes from BTF at start, and
        /// its index in [`global::OFFSETS`]. Offsets are in bytes, except for
        /// the bit field [`Field::Repair`], whose offset is in bits.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Field {
            $(#[doc = concat!("`", $container, ".", $path, "`")] $name,)*
        }

        impl Field {
            /// Every field, in the order of its index.
            pub const ALL: &[Self] = &[$(Self::$name),*];
            /// Number of fields.
            pub const COUNT: usize = Self::ALL.len();

            /// The structure, and the path of the member in it. Anonymous
            /// structures and unions have no part in the path.
            pub fn member(self) -> (&'static str, &'static str) {
                match self {
                    $(Self::$name => ($container, $path),)*
                }
            }
        }
    };
}

fields! {
    NetInum: "net", "ns.inum";
    SkProtocol: "sock", "sk_protocol";
    SkErr: "sock", "sk_err";
    SkFlags: "sock_common", "skc_flags";
    SkShutdown: "sock", "sk_shutdown";
    InetSport: "inet_sock", "inet_sport";
    BytesReceived: "tcp_sock", "bytes_received";
    BytesAcked: "tcp_sock", "bytes_acked";
    SndUna: "tcp_sock", "snd_una";
    SndNxt: "tcp_sock", "snd_nxt";
    WriteSeq: "tcp_sock", "write_seq";
    SegsOut: "tcp_sock", "segs_out";
    SrttUs: "tcp_sock", "srtt_us";
    TotalRetrans: "tcp_sock", "total_retrans";
    RcvTstamp: "tcp_sock", "rcv_tstamp";
    TcpMstamp: "tcp_sock", "tcp_mstamp";
    FastopenReq: "tcp_sock", "fastopen_req";
    Repair: "tcp_sock", "repair";
    TaskLeader: "task_struct", "group_leader";
    TaskComm: "task_struct", "comm";
    TaskNsproxy: "task_struct", "nsproxy";
    NsproxyNet: "nsproxy", "net_ns";
    NetTable: "net", "ipv4.tcp_death_row.hashinfo";
    TableBuckets: "inet_hashinfo", "ehash";
    TableMask: "inet_hashinfo", "ehash_mask";
    SkNode: "sock_common", "skc_nulls_node";
}

impl Field {
    /// Whether only the socket scan reads this field. Without such a field there
    /// is no scan: `tcp_death_row` was a pointer from 5.17 to 6.0.
    pub fn is_for_scan(self) -> bool {
        self as usize >= Self::TaskNsproxy as usize
    }
}

/// The start of `struct sock_common`, the same on every supported kernel and
/// architecture (64 bit). The loader compares it with BTF, and refuses the
/// programs that use it if it differs.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct SockCommon {
    /// `skc_addrpair`: IPv4 remote address, then local.
    pub addresses: u64,
    /// `skc_hash`, `skc_dport` (network order) and `skc_num` (host order).
    pub hash_and_ports: u64,
    /// `skc_family`.
    pub family: u16,
    /// `skc_state`.
    pub state: u8,
    /// `skc_reuse` and other bits.
    pub bits: u8,
    /// `skc_bound_dev_if`.
    pub bound_dev_if: u32,
    /// `skc_bind_node`.
    pub bind_node: [u64; 2],
    /// `skc_prot`.
    pub prot: u64,
    /// `skc_net`.
    pub net: u64,
    /// `skc_v6_daddr`.
    pub v6_daddr: [u64; 2],
    /// `skc_v6_rcv_saddr`.
    pub v6_rcv_saddr: [u64; 2],
    /// `skc_cookie`.
    pub cookie: u64,
}

impl SockCommon {
    /// Offset of `skc_dport`.
    pub const DPORT: usize = offset_of!(Self, hash_and_ports) + 4;
    /// Offset of `skc_num`.
    pub const NUM: usize = offset_of!(Self, hash_and_ports) + 6;

    /// Member and offset, for the loader to compare.
    pub const ASSERTED: &[(&str, usize)] = &[
        ("skc_daddr", offset_of!(Self, addresses)),
        ("skc_rcv_saddr", offset_of!(Self, addresses) + 4),
        ("skc_dport", Self::DPORT),
        ("skc_num", Self::NUM),
        ("skc_family", offset_of!(Self, family)),
        ("skc_state", offset_of!(Self, state)),
        ("skc_net", offset_of!(Self, net)),
        ("skc_v6_daddr", offset_of!(Self, v6_daddr)),
        ("skc_v6_rcv_saddr", offset_of!(Self, v6_rcv_saddr)),
        ("skc_cookie", offset_of!(Self, cookie)),
    ];
}

const _: () = assert!(size_of::<SockCommon>() == 96);

macro_rules! tracepoint {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {
        /// Context of the classic tracepoint `sock:inet_sock_set_state`
        /// (`include/trace/events/sock.h`), the same since 5.6. The loader
        /// compares it with the `format` file before it attaches.
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct SetState {
            /// `common_*`, which programs may not read.
            pub common: u64,
            $($(#[$doc])* pub $name: $type,)*
        }

        impl SetState {
            /// Name, offset and size of each field, for the loader to compare.
            pub const ASSERTED: &[(&str, usize, usize)] = &[
                $((stringify!($name), offset_of!(Self, $name), size_of::<$type>()),)*
            ];
        }
    };
}

tracepoint! {
    /// Address of the `struct sock`.
    skaddr: u64;
    /// State left.
    oldstate: u32;
    /// State entered.
    newstate: u32;
    /// Local port, host order.
    sport: u16;
    /// Remote port, host order.
    dport: u16;
    /// AF_INET or AF_INET6.
    family: u16;
    /// IPPROTO_*.
    protocol: u16;
    /// Local IPv4 address; not valid for some IPv6 sockets.
    saddr: u32;
    /// Remote IPv4 address; not valid for some IPv6 sockets.
    daddr: u32;
    /// Local address as IPv6 words, v4-mapped for IPv4 sockets.
    saddr_v6: [u64; 2];
    /// Remote address as IPv6 words, v4-mapped for IPv4 sockets.
    daddr_v6: [u64; 2];
}

const _: () = assert!(size_of::<SetState>() == 72);

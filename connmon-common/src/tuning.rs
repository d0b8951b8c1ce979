//! What the agent tells the programs: names of maps and globals, kernel
//! fields whose offsets it resolves, and the layout of the counters.

/// The event ring buffer.
pub const EVENTS_MAP: &str = "EVENTS";
/// Per-CPU array with one [`PerCpu`].
pub const COUNTERS_MAP: &str = "COUNTERS";
/// Array with one [`Stretch`], mapped into the agent.
pub const STRETCH_MAP: &str = "STRETCH";

/// Chains' ends and sockets that one run of the walk looks at, at most.
pub const STEPS: usize = 64;

/// A stretch of the walk over the kernel's table of TCP sockets: where the next
/// run begins, and what the last one found.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Stretch {
    /// The first bucket that is not done. Set to 0 to begin.
    pub bucket: u64,
    /// How many there are; 0 where the table could not be found.
    pub buckets: u64,
    /// Sockets found in those that were done.
    pub found: u64,
    /// Those of the bucket under way included.
    pub count: u64,
    /// The place in its chain.
    pub node: u64,
    /// A [`crate::wire::Live`] each.
    pub sockets: [[u64; 12]; STEPS],
}

const _: () = assert!(
    core::mem::size_of::<[u64; 12]>()
        == core::mem::size_of::<crate::wire::Live<crate::wire::EndsV6>>()
);

/// Index of a probe in [`PerCpu`].
pub mod probe {
    /// `inet_sock_set_state`.
    pub const SET_STATE: usize = 0;
    /// `tcp_connect`.
    pub const CONNECT: usize = 1;
    /// `inet_csk_accept`.
    pub const ACCEPT: usize = 2;
    /// How many there are.
    pub const COUNT: usize = 3;
}

/// Counters of one CPU. Written with atomic adds, since a program can be
/// interrupted by another run of itself on the same CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct PerCpu {
    /// Attempts to reserve a record, by [`probe`].
    pub produced: [u64; probe::COUNT],
    /// Failed ones among them.
    pub ring_full: [u64; probe::COUNT],
    /// State changes that `state_nested` took because the kernel left
    /// `state_tp_btf` out.
    pub caught: u64,
    /// State changes that the kernel left `state_tp` out of.
    pub lost: u64,
    /// Word of a change that the first program has seen and the second has
    /// not yet: of a context that was interrupted, or of the one that runs;
    /// of the one that interrupted it.
    pub seen: [Seen; 2],
    /// Changes in the second place since the first was last asked for.
    pub waited: u64,
    /// Not 0 while the first program runs.
    pub inside: u64,
}

const _: () = assert!(core::mem::size_of::<PerCpu>() == 112);

/// Word of one change.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Seen {
    /// The socket's kernel address; 0 for none.
    pub socket: u64,
    /// Old and new state.
    pub states: u64,
}

/// A first place of [`PerCpu::seen`] that outlives so many changes in the
/// second belongs to nobody: more than one softirq handles before it yields.
pub const SEEN_WAITS: u64 = 1024;

/// A record in so many of one CPU looks at the fill level of the ring and
/// wakes the reader when an eighth is used; all others never wake it.
/// A power of two. The ring must hold far more than this many records per
/// CPU.
pub const WAKE_EVERY: u64 = 128;

/// Globals (read-only data) that the loader may override; all are `u32`
/// except where noted.
pub mod global {
    /// Bytes available in the ring at which the reader is woken (`u64`).
    pub const WAKE_BYTES: &str = "WAKE_BYTES";
    /// 1: leave loopback connections out.
    pub const DROP_LOOPBACK: &str = "DROP_LOOPBACK";
    /// Only this network namespace's inode; 0: all.
    pub const ONLY_NETNS: &str = "ONLY_NETNS";
    /// 1: collect name and cgroup of those who connect and accept.
    pub const OWNERS: &str = "OWNERS";
    /// 1: collect traffic figures at close.
    pub const TRAFFIC: &str = "TRAFFIC";
    /// 1: the offsets below are valid.
    pub const OFFSETS_KNOWN: &str = "OFFSETS_KNOWN";
    /// 1: the kernel has `bpf_get_current_task_btf` (5.11).
    pub const TASK_BTF: &str = "TASK_BTF";
}

/// A kernel field whose offset is resolved from BTF at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name of the global that receives the offset (`u32`), in bytes except
    /// for [`BITS`].
    pub global: &'static str,
    /// The structure the offset counts from.
    pub container: &'static str,
    /// The member, dots between nested structures; anonymous structures and
    /// unions are looked through.
    pub path: &'static str,
}

/// Every field the programs read at a resolved offset.
pub const FIELDS: &[Field] = &[
    field("OFF_NET_INUM", "net", "ns.inum"),
    field("OFF_SK_PROTOCOL", "sock", "sk_protocol"),
    field("OFF_SK_ERR", "sock", "sk_err"),
    field("OFF_SK_FLAGS", "sock_common", "skc_flags"),
    field("OFF_SK_SHUTDOWN", "sock", "sk_shutdown"),
    field("OFF_INET_SPORT", "inet_sock", "inet_sport"),
    field("OFF_BYTES_RECEIVED", "tcp_sock", "bytes_received"),
    field("OFF_BYTES_ACKED", "tcp_sock", "bytes_acked"),
    field("OFF_SND_UNA", "tcp_sock", "snd_una"),
    field("OFF_SND_NXT", "tcp_sock", "snd_nxt"),
    field("OFF_WRITE_SEQ", "tcp_sock", "write_seq"),
    field("OFF_SEGS_OUT", "tcp_sock", "segs_out"),
    field("OFF_SRTT_US", "tcp_sock", "srtt_us"),
    field("OFF_TOTAL_RETRANS", "tcp_sock", "total_retrans"),
    field("OFF_RCV_TSTAMP", "tcp_sock", "rcv_tstamp"),
    field("OFF_TCP_MSTAMP", "tcp_sock", "tcp_mstamp"),
    field("OFF_FASTOPEN_REQ", "tcp_sock", "fastopen_req"),
    field("OFF_TASK_LEADER", "task_struct", "group_leader"),
    field("OFF_TASK_COMM", "task_struct", "comm"),
];

/// Every bit that the programs read; the global receives its offset in bits.
pub const BITS: &[Field] = &[field("BIT_REPAIR", "tcp_sock", "repair")];

/// Fields that lead to the table of sockets. Where one is missing, there is no
/// walk: `tcp_death_row` was a pointer from 5.17 to 6.0.
pub const TABLE_FIELDS: &[Field] = &[
    field("OFF_TASK_NSPROXY", "task_struct", "nsproxy"),
    field("OFF_NSPROXY_NET", "nsproxy", "net_ns"),
    field("OFF_NET_TABLE", "net", "ipv4.tcp_death_row.hashinfo"),
    field("OFF_TABLE_BUCKETS", "inet_hashinfo", "ehash"),
    field("OFF_TABLE_MASK", "inet_hashinfo", "ehash_mask"),
    field("OFF_SK_NODE", "sock_common", "skc_nulls_node"),
];

const fn field(global: &'static str, container: &'static str, path: &'static str) -> Field {
    Field {
        global,
        container,
        path,
    }
}

/// Offsets within `struct sock_common`, the same on every supported kernel
/// and architecture (64 bit); the loader checks each against BTF and refuses
/// the programs that use them when one differs.
pub mod sock_common {
    /// `skc_daddr`, followed by `skc_rcv_saddr`: IPv4 remote, local.
    pub const ADDRESSES: usize = 0;
    /// `skc_dport`, network order.
    pub const DPORT: usize = 12;
    /// `skc_num`, host order.
    pub const NUM: usize = 14;
    /// `skc_family`.
    pub const FAMILY: usize = 16;
    /// `skc_state`.
    pub const STATE: usize = 18;
    /// `skc_net`.
    pub const NET: usize = 48;
    /// `skc_v6_daddr`.
    pub const V6_DADDR: usize = 56;
    /// `skc_v6_rcv_saddr`.
    pub const V6_RCV_SADDR: usize = 72;
    /// `skc_cookie`.
    pub const COOKIE: usize = 88;
    /// Bytes from the start that hold all of the above.
    pub const LEN: usize = 96;

    /// Member and asserted offset.
    pub const ASSERTED: &[(&str, usize)] = &[
        ("skc_daddr", ADDRESSES),
        ("skc_rcv_saddr", ADDRESSES + 4),
        ("skc_dport", DPORT),
        ("skc_num", NUM),
        ("skc_family", FAMILY),
        ("skc_state", STATE),
        ("skc_net", NET),
        ("skc_v6_daddr", V6_DADDR),
        ("skc_v6_rcv_saddr", V6_RCV_SADDR),
        ("skc_cookie", COOKIE),
    ];
}

/// The record of the classic tracepoint `sock:inet_sock_set_state`
/// (`include/trace/events/sock.h`), the same since 5.6; the loader compares
/// it with the `format` file before it attaches.
pub mod tracepoint {
    /// Layout of the context. The first 8 bytes are not readable.
    #[repr(C)]
    #[derive(Clone, Copy, Debug)]
    pub struct SetState {
        /// `common_*`, unreadable.
        pub common: u64,
        /// Address of the `struct sock`.
        pub skaddr: u64,
        /// State left.
        pub oldstate: u32,
        /// State entered.
        pub newstate: u32,
        /// Local port, host order.
        pub sport: u16,
        /// Remote port, host order.
        pub dport: u16,
        /// AF_INET or AF_INET6.
        pub family: u16,
        /// IPPROTO_*.
        pub protocol: u16,
        /// Local IPv4 address; junk for some IPv6 sockets.
        pub saddr: u32,
        /// Remote IPv4 address; junk for some IPv6 sockets.
        pub daddr: u32,
        /// Local address as IPv6 words, v4-mapped for IPv4 sockets.
        pub saddr_v6: [u64; 2],
        /// Remote address as IPv6 words, v4-mapped for IPv4 sockets.
        pub daddr_v6: [u64; 2],
    }

    /// Field name and asserted offset and size.
    pub const ASSERTED: &[(&str, usize, usize)] = &[
        ("skaddr", core::mem::offset_of!(SetState, skaddr), 8),
        ("oldstate", core::mem::offset_of!(SetState, oldstate), 4),
        ("newstate", core::mem::offset_of!(SetState, newstate), 4),
        ("sport", core::mem::offset_of!(SetState, sport), 2),
        ("dport", core::mem::offset_of!(SetState, dport), 2),
        ("family", core::mem::offset_of!(SetState, family), 2),
        ("protocol", core::mem::offset_of!(SetState, protocol), 2),
        ("saddr", core::mem::offset_of!(SetState, saddr), 4),
        ("daddr", core::mem::offset_of!(SetState, daddr), 4),
        ("saddr_v6", core::mem::offset_of!(SetState, saddr_v6), 16),
        ("daddr_v6", core::mem::offset_of!(SetState, daddr_v6), 16),
    ];

    const _: () = assert!(core::mem::size_of::<SetState>() == 72);
}

//! Read-only data that the loader fills in before it loads a program. The
//! verifier takes it for constants: a branch on a global that is 0 is removed
//! from the program. Names and meanings are in `connmon_common::tuning`.

use aya_ebpf::Global;

macro_rules! globals {
    ($($name:ident: $type:ty = $value:expr;)*) => {
        $(#[unsafe(no_mangle)]
        pub static $name: Global<$type> = Global::new($value);)*
    };
}

globals! {
    WAKE_BYTES: u64 = 1 << 20;
    DROP_LOOPBACK: u32 = 0;
    ONLY_NETNS: u32 = 0;
    OWNERS: u32 = 0;
    TRAFFIC: u32 = 0;
    OFFSETS_KNOWN: u32 = 0;
    OFF_NET_INUM: u32 = 0;
    OFF_SK_PROTOCOL: u32 = 0;
    OFF_SK_ERR: u32 = 0;
    OFF_SK_FLAGS: u32 = 0;
    OFF_SK_SHUTDOWN: u32 = 0;
    OFF_INET_SPORT: u32 = 0;
    OFF_BYTES_RECEIVED: u32 = 0;
    OFF_BYTES_ACKED: u32 = 0;
    OFF_SND_UNA: u32 = 0;
    OFF_SND_NXT: u32 = 0;
    OFF_WRITE_SEQ: u32 = 0;
    OFF_SEGS_OUT: u32 = 0;
    OFF_SRTT_US: u32 = 0;
    OFF_TOTAL_RETRANS: u32 = 0;
    OFF_RCV_TSTAMP: u32 = 0;
    OFF_TCP_MSTAMP: u32 = 0;
    OFF_FASTOPEN_REQ: u32 = 0;
    BIT_REPAIR: u32 = 0;
    TASK_BTF: u32 = 0;
    OFF_TASK_LEADER: u32 = 0;
    OFF_TASK_COMM: u32 = 0;
    OFF_TASK_NSPROXY: u32 = 0;
    OFF_NSPROXY_NET: u32 = 0;
    OFF_NET_TABLE: u32 = 0;
    OFF_TABLE_BUCKETS: u32 = 0;
    OFF_TABLE_MASK: u32 = 0;
    OFF_SK_NODE: u32 = 0;
}

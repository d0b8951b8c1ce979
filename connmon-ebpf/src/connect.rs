//! `tcp_connect`: a SYN is about to be sent.
//!
//! ```c
//! int tcp_connect(struct sock *sk);   // net/ipv4/tcp_output.c, since 2.6
//! ```
//!
//! The state program has already reported a normal active open, with its owner.
//! This program adds a record only if the SYN was deferred to the first write
//! (Fast Open, and `TCP_FASTOPEN_CONNECT`): `fastopen_req` is set then, see
//! `tcp_sendmsg_fastopen()`.

use aya_ebpf::macros::{fentry, kprobe};
use aya_ebpf::programs::{FEntryContext, ProbeContext};
use aya_log_ebpf::debug;
use connmon_common::tuning::probe;
use connmon_common::wire::kind;

use crate::emit::emit_task;
use crate::memory::{Address, BtfPointer};
use crate::socket::{has_fastopen_request, is_filtered};

/// 5.9, for `bpf_skc_to_tcp_sock`.
#[fentry(function = "tcp_connect")]
fn connect_fentry(ctx: FEntryContext) -> i32 {
    let sk: *const u8 = ctx.arg(0);
    if has_fastopen_request(BtfPointer(sk)) && !is_filtered(sk as u64) {
        debug!((), "deferred SYN of socket {:x} is sent", sk as u64);
        emit_task::<BtfPointer>(probe::CONNECT, kind::CONNECT_SENT, sk as u64);
    }
    0
}

#[kprobe]
fn connect_kprobe(ctx: ProbeContext) -> u32 {
    if let Some(sk) = ctx.arg::<u64>(0)
        && has_fastopen_request(Address(sk))
        && !is_filtered(sk)
    {
        emit_task::<Address>(probe::CONNECT, kind::CONNECT_SENT, sk);
    }
    0
}

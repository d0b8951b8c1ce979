//! `tcp_connect`: a SYN is about to be sent.
//!
//! ```c
//! int tcp_connect(struct sock *sk);   // net/ipv4/tcp_output.c, since 2.6
//! ```
//!
//! The state program has already told of a normal active open, with its
//! owner; only where the SYN was put off to the first write (Fast Open, and
//! `TCP_FASTOPEN_CONNECT`) does this one add a record: `fastopen_req` is set
//! then, see `tcp_sendmsg_fastopen()`.

use aya_ebpf::macros::{fentry, kprobe};
use aya_ebpf::programs::{FEntryContext, ProbeContext};
use aya_log_ebpf::debug;
use connmon_common::tuning::probe;
use connmon_common::wire::kind;

use crate::emit::emit_task;
use crate::socket::{has_fastopen_request, has_fastopen_request_at, is_filtered};
use crate::task::{BtfTask, ProbedTask};

/// By trampoline. 5.5.
#[fentry(function = "tcp_connect")]
fn connect_fentry(ctx: FEntryContext) -> i32 {
    let sk: *const u8 = ctx.arg(0);
    if has_fastopen_request(sk) && !is_filtered(sk as u64) {
        debug!((), "deferred SYN of socket {:x} leaves", sk as u64);
        emit_task::<BtfTask>(probe::CONNECT, kind::CONNECT_SENT, sk as u64);
    }
    0
}

/// By breakpoint or ftrace.
#[kprobe]
fn connect_kprobe(ctx: ProbeContext) -> u32 {
    let Some(sk) = ctx.arg::<u64>(0) else {
        return 0;
    };
    if has_fastopen_request_at(sk) && !is_filtered(sk) {
        emit_task::<ProbedTask>(probe::CONNECT, kind::CONNECT_SENT, sk);
    }
    0
}

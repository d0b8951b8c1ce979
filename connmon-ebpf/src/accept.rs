//! `inet_csk_accept`: a process took a connection from the accept queue.
//!
//! ```c
//! // net/ipv4/inet_connection_sock.c
//! struct sock *inet_csk_accept(struct sock *sk, int flags, int *err, bool kern);    // .. 6.9
//! struct sock *inet_csk_accept(struct sock *sk, struct proto_accept_arg *arg);      // 6.10 ..
//! ```

use aya_ebpf::macros::{fexit, kretprobe};
use aya_ebpf::programs::{FExitContext, RetProbeContext};
use connmon_common::tuning::probe;
use connmon_common::wire::kind;

use crate::emit::emit_task;
use crate::memory::{Address, BtfPointer, Memory};
use crate::socket::is_filtered;

/// `bpf_get_func_ret` needs 5.17.
#[fexit(function = "inet_csk_accept")]
fn accept_fexit(ctx: FExitContext) -> i32 {
    if let Ok(sk) = ctx.ret::<u64>() {
        accepted::<BtfPointer>(sk);
    }
    0
}

/// 5.5 to 5.16: the return value follows the four arguments. The loader must not
/// use it on 6.10 and later, where the return value follows two.
#[fexit(function = "inet_csk_accept")]
fn accept_fexit_arg(ctx: FExitContext) -> i32 {
    let sk: *const u8 = ctx.arg(4);
    accepted::<BtfPointer>(sk as u64);
    0
}

#[kretprobe]
fn accept_kret(ctx: RetProbeContext) -> u32 {
    accepted::<Address>(ctx.ret());
    0
}

#[inline(always)]
fn accepted<M: Memory>(sk: u64) {
    // NULL when accept() fails.
    if sk != 0 && !is_filtered(sk) {
        emit_task::<M>(probe::ACCEPT, kind::ACCEPT, sk);
    }
}

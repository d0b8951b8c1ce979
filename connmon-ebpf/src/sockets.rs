//! A walk over the kernel's table of TCP sockets (`ehash`), which the agent
//! runs by bpf(BPF_PROG_TEST_RUN), a stretch of buckets at a time.
//!
//! It reads as the kernel's own lookups do (`__inet_lookup_established`): under
//! RCU and without any lock. A chain ends in the number of its bucket; whoever
//! comes to another one was led there by a socket that was freed and used
//! again meanwhile, and goes through the bucket once more. So every socket
//! that is there throughout is seen, and each stretch ends with a bucket. (As
//! there, a bucket of the same number in another namespace's own table would
//! not be noticed.)
//!
//! Nothing is written to and no reference is taken. 5.10.

use core::arch::asm;
use core::mem::offset_of;
use core::ptr::addr_of_mut;

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::helpers::generated::bpf_get_current_task;
use aya_ebpf::macros::{map, raw_tracepoint};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::RawTracePointContext;
use connmon_common::state::{
    CLOSE, CLOSING, ESTABLISHED, LISTEN, NEW_SYN_RECV, SYN_RECV, TIME_WAIT,
};
use connmon_common::tuning::{STEPS, Stretch, sock_common};
use connmon_common::wire::{EndsV4, EndsV6, Head, Live, flag, kind};

use crate::emit::zero;
use crate::globals::{
    OFF_NET_TABLE, OFF_NSPROXY_NET, OFF_SK_FLAGS, OFF_SK_NODE, OFF_TABLE_BUCKETS, OFF_TABLE_MASK,
    OFF_TASK_NSPROXY,
};
use crate::socket::{AF_INET6, TracedFull, is_v4_mapped, offset, probe, write_live_stats};

#[map]
static STRETCH: Array<Stretch> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// `skc_addrpair`: remote and local address; `skc_hash`, and `skc_portpair`:
/// remote port, local port.
type Identity = [u64; 2];

/// `struct sock_common` up to the cookie.
#[repr(C)]
#[derive(Clone, Copy)]
struct Common {
    identity: Identity,
    family: u16,
    state: u8,
    flags: u8,
    bound_dev_if: u32,
    bind_node: [u64; 2],
    prot: u64,
    net: u64,
    v6_daddr: [u64; 2],
    v6_rcv_saddr: [u64; 2],
    cookie: u64,
}

const _: () = {
    assert!(size_of::<Common>() == sock_common::LEN);
    assert!(sock_common::ADDRESSES == 0 && sock_common::DPORT == 12 && sock_common::NUM == 14);
    assert!(offset_of!(Common, state) == sock_common::STATE);
    assert!(offset_of!(Common, net) == sock_common::NET);
    assert!(offset_of!(Common, v6_daddr) == sock_common::V6_DADDR);
    assert!(offset_of!(Common, v6_rcv_saddr) == sock_common::V6_RCV_SADDR);
    assert!(offset_of!(Common, cookie) == sock_common::COOKIE);
};

/// Takes the buckets from `bucket` on of the table of the running task's
/// network namespace, and leaves a [`Live`] of each of the namespace's
/// connections and handshakes. Listeners, which are in another table, and
/// TIME_WAIT are left out. Never attached.
#[raw_tracepoint(tracepoint = "sockets")]
fn sockets(_context: RawTracePointContext) -> i32 {
    let Some(stretch) = STRETCH.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: probe_read checks the addresses; the map value is a `Stretch`,
    // which nobody else writes to while this runs.
    unsafe {
        let nsproxy: u64 = probe(bpf_get_current_task(), offset(&OFF_TASK_NSPROXY));
        let net: u64 = probe(nsproxy, offset(&OFF_NSPROXY_NET));
        let table: u64 = probe(net, offset(&OFF_NET_TABLE));
        let heads: u64 = probe(table, offset(&OFF_TABLE_BUCKETS));
        let mask: u32 = probe(table, offset(&OFF_TABLE_MASK));
        let buckets = if heads == 0 { 0 } else { u64::from(mask) + 1 };
        let walk = Walk {
            stretch,
            net,
            heads,
            buckets,
        };
        addr_of_mut!((*stretch).buckets).write_volatile(buckets);
        addr_of_mut!((*stretch).found).write_volatile(0);
        if walk.bucket() >= buckets {
            return 0;
        }
        walk.begin_bucket();
        for _ in 0..STEPS {
            let node = addr_of_mut!((*stretch).node).read_volatile();
            if node & 1 == 0 {
                if !walk.take(node) {
                    break;
                }
            } else if !walk.end_bucket(node >> 1) {
                break;
            }
        }
    }
    0
}

/// What a run knows. Its state is kept in the map value, which the verifier
/// takes for unknown each time: it would follow every count of its own.
struct Walk {
    stretch: *mut Stretch,
    net: u64,
    heads: u64,
    buckets: u64,
}

/// The end of no chain: the bucket is gone through again.
const ASTRAY: u64 = u64::MAX;

/// Heads of buckets that are read at once.
const HEADS: usize = 8;

impl Walk {
    #[inline(always)]
    unsafe fn bucket(&self) -> u64 {
        // SAFETY: as in `sockets`.
        unsafe { addr_of_mut!((*self.stretch).bucket).read_volatile() }
    }

    /// Goes to the first socket of the bucket, or of one after it if it is
    /// empty: most are, and eight are read at once.
    #[inline(always)]
    unsafe fn begin_bucket(&self) {
        // SAFETY: as in `sockets`. `struct inet_ehash_bucket` is a pointer.
        unsafe {
            let mut bucket = self.bucket();
            let at = (bucket * 8) as usize;
            let head = if bucket + HEADS as u64 <= self.buckets {
                let heads: [u64; HEADS] = probe(self.heads, at);
                let mut head = heads[0];
                for next in &heads[1..] {
                    if head != bucket << 1 | 1 {
                        break;
                    }
                    head = *next;
                    bucket += 1;
                }
                head
            } else {
                probe(self.heads, at)
            };
            addr_of_mut!((*self.stretch).bucket).write_volatile(bucket);
            addr_of_mut!((*self.stretch).node).write_volatile(head);
            let found = addr_of_mut!((*self.stretch).found).read_volatile();
            addr_of_mut!((*self.stretch).count).write_volatile(found);
        }
    }

    /// At the end of a chain; false at that of the table.
    #[inline(always)]
    unsafe fn end_bucket(&self, end: u64) -> bool {
        // SAFETY: as in `sockets`.
        unsafe {
            let bucket = self.bucket();
            if end == bucket {
                let count = addr_of_mut!((*self.stretch).count).read_volatile();
                addr_of_mut!((*self.stretch).found).write_volatile(count);
                addr_of_mut!((*self.stretch).bucket).write_volatile(bucket + 1);
                if bucket + 1 >= self.buckets {
                    return false;
                }
            }
            self.begin_bucket();
            true
        }
    }

    /// Leaves word of the socket at this node and goes to the next; false where
    /// there is no room for it.
    #[inline(always)]
    unsafe fn take(&self, node: u64) -> bool {
        // SAFETY: as in `sockets`.
        unsafe {
            let next: u64 = probe(node, 0);
            let id = node.wrapping_sub(offset(&OFF_SK_NODE) as u64);
            let common: Common = probe(id, 0);
            if common.net == self.net && common.state != TIME_WAIT {
                let count = addr_of_mut!((*self.stretch).count).read_volatile();
                if count >= STEPS as u64 {
                    return false;
                }
                let place = addr_of_mut!((*self.stretch).sockets)
                    .cast::<u8>()
                    .add(bounded(count) as usize * size_of::<Live<EndsV6>>());
                let is_one = write(place, id, &common);
                // Freed and used again meanwhile: what was read is of two.
                let again: Identity = probe(id, 0);
                if again[0] != common.identity[0] || again[1] != common.identity[1] {
                    addr_of_mut!((*self.stretch).node).write_volatile(ASTRAY);
                    return true;
                }
                if is_one {
                    addr_of_mut!((*self.stretch).count).write_volatile(count + 1);
                }
            }
            addr_of_mut!((*self.stretch).node).write_volatile(next);
            true
        }
    }
}

/// The same, less than [`STEPS`], in a register of which the verifier knows it:
/// what a comparison says of one, the compiler uses in another.
#[inline(always)]
fn bounded(count: u64) -> u64 {
    const { assert!(STEPS == 64) };
    let mut count = count;
    // SAFETY: arithmetic on a register.
    unsafe { asm!("{0} &= 63", inout(reg) count) };
    count
}

/// Writes a [`Live`]; false for what is none.
///
/// # Safety
///
/// `place` must be valid for the larger one.
#[inline(always)]
unsafe fn write(place: *mut u8, id: u64, common: &Common) -> bool {
    let state = match common.state {
        NEW_SYN_RECV => SYN_RECV,
        TIME_WAIT | CLOSE | LISTEN => return false,
        state @ ESTABLISHED..=CLOSING => state,
        // Just allocated.
        _ => return false,
    };
    let [addresses, ports] = common.identity;
    let remote_port = u16::from_be((ports >> 32) as u16);
    let local_port = (ports >> 48) as u16;
    if local_port == 0 {
        // About to close: it has left the table and given its port back
        // (`tcp_set_state`).
        return false;
    }
    // Both begin alike.
    const { assert!(offset_of!(Live<EndsV4>, ends) == offset_of!(Live<EndsV6>, ends)) };
    let live = place.cast::<Live<EndsV6>>();
    // SAFETY: the caller's; probe_read checks the address. What is no full
    // socket has nothing where the figures would be.
    unsafe {
        let is_v6 = common.family == AF_INET6 && !is_v4_mapped(common.v6_daddr);
        let ends = addr_of_mut!((*live).ends);
        if is_v6 {
            ends.write(EndsV6 {
                local: common.v6_rcv_saddr,
                remote: common.v6_daddr,
                local_port,
                remote_port,
                pad: 0,
            });
        } else {
            ends.cast::<EndsV4>().write(EndsV4 {
                local: (addresses >> 32) as u32,
                remote: addresses as u32,
                local_port,
                remote_port,
                pad: 0,
            });
        }
        let stats = addr_of_mut!((*live).stats);
        let flags = if common.state == NEW_SYN_RECV {
            zero(stats);
            0
        } else {
            let flags: u64 = probe(id, offset(&OFF_SK_FLAGS));
            write_live_stats(&TracedFull(id), state, flags, stats)
        };
        addr_of_mut!((*live).head).write(Head {
            kind: kind::LIVE,
            flags: flags | if is_v6 { flag::V6 } else { 0 },
            old: state,
            new: state,
            // That of the reader, who knows it.
            netns: 0,
            id,
            cookie: common.cookie,
        });
    }
    true
}

//! The scan of the kernel's TCP socket table (`ehash`). The agent runs it by
//! bpf(BPF_PROG_TEST_RUN), a batch of buckets at a time.
//!
//! It reads as the kernel's own lookups do (`__inet_lookup_established`): under
//! RCU and without a lock. A chain ends with the number of its bucket. A socket
//! that was freed and reused during the scan can lead to another chain; the end
//! of that one has another number, and the bucket is scanned again. So the scan
//! finds every socket that exists throughout, and each batch ends with a whole
//! bucket. (As in the kernel, a bucket of the same number in another
//! namespace's own table goes unnoticed.)
//!
//! It changes no socket and takes no reference. 5.10.

use core::arch::asm;
use core::mem::offset_of;
use core::ptr::addr_of_mut;

use aya_ebpf::bindings::BPF_F_MMAPABLE;
use aya_ebpf::macros::{map, raw_tracepoint};
use aya_ebpf::maps::Array;
use aya_ebpf::programs::RawTracePointContext;
use connmon_common::state::{
    CLOSE, CLOSING, ESTABLISHED, LISTEN, NEW_SYN_RECV, SYN_RECV, TIME_WAIT,
};
use connmon_common::tuning::{Batch, Field, STEPS, SockCommon};
use connmon_common::wire::{EndsV4, EndsV6, Head, Live, flag, kind};

use crate::globals::offset;
use crate::memory::{Address, Memory, zero};
use crate::socket::{AF_INET6, is_v4_mapped};
use crate::stats::write_traffic;

#[map]
static BATCH: Array<Batch> = Array::with_max_entries(1, BPF_F_MMAPABLE);

/// Scans buckets, from [`Batch::bucket`] on, of the table that the running
/// task's network namespace uses. Stores a [`Live`] record of each connection
/// and handshake of that namespace. Listeners are in another table, and
/// TIME_WAIT is left out. Never attached.
#[raw_tracepoint(tracepoint = "sockets")]
fn sockets(_context: RawTracePointContext) -> i32 {
    let Some(batch) = BATCH.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: bad addresses read as zeroes; the map value is a `Batch`, and
    // only this run writes to it now.
    unsafe {
        let nsproxy: Address = Address::current_task().read(offset(Field::TaskNsproxy));
        let net: Address = nsproxy.read(offset(Field::NsproxyNet));
        let table: Address = net.read(offset(Field::NetTable));
        let heads: Address = table.read(offset(Field::TableBuckets));
        let mask: u32 = table.read(offset(Field::TableMask));
        let buckets = if heads.0 == 0 { 0 } else { u64::from(mask) + 1 };
        let scan = Scan {
            batch,
            net: net.0,
            heads,
            buckets,
        };
        addr_of_mut!((*batch).buckets).write_volatile(buckets);
        addr_of_mut!((*batch).found).write_volatile(0);
        if scan.bucket() >= buckets {
            return 0;
        }
        scan.begin_bucket();
        for _ in 0..STEPS {
            let node = addr_of_mut!((*batch).node).read_volatile();
            if node & 1 == 0 {
                if !scan.take(node) {
                    break;
                }
            } else if !scan.end_bucket(node >> 1) {
                break;
            }
        }
    }
    0
}

/// One run. Its state is in the map value, whose contents the verifier does not
/// track: it would follow each value of a local counter.
struct Scan {
    batch: *mut Batch,
    net: u64,
    heads: Address,
    buckets: u64,
}

/// The number of no bucket: the current one is scanned again.
const WRONG_CHAIN: u64 = u64::MAX;

/// Bucket heads that are read at once.
const HEADS: usize = 8;

impl Scan {
    #[inline(always)]
    unsafe fn bucket(&self) -> u64 {
        // SAFETY: as in `sockets`.
        unsafe { addr_of_mut!((*self.batch).bucket).read_volatile() }
    }

    /// Goes to the first socket of the bucket, or of a later one if it is empty,
    /// as most are.
    #[inline(always)]
    unsafe fn begin_bucket(&self) {
        // SAFETY: as in `sockets`. `struct inet_ehash_bucket` is a pointer.
        unsafe {
            let mut bucket = self.bucket();
            let at = (bucket * 8) as usize;
            let head = if bucket + HEADS as u64 <= self.buckets {
                let heads: [u64; HEADS] = self.heads.read(at);
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
                self.heads.read(at)
            };
            addr_of_mut!((*self.batch).bucket).write_volatile(bucket);
            addr_of_mut!((*self.batch).node).write_volatile(head);
            let found = addr_of_mut!((*self.batch).found).read_volatile();
            addr_of_mut!((*self.batch).count).write_volatile(found);
        }
    }

    /// Handles the end of a chain; false at the end of the table.
    #[inline(always)]
    unsafe fn end_bucket(&self, end: u64) -> bool {
        // SAFETY: as in `sockets`.
        unsafe {
            let bucket = self.bucket();
            if end == bucket {
                let count = addr_of_mut!((*self.batch).count).read_volatile();
                addr_of_mut!((*self.batch).found).write_volatile(count);
                addr_of_mut!((*self.batch).bucket).write_volatile(bucket + 1);
                if bucket + 1 >= self.buckets {
                    return false;
                }
            }
            self.begin_bucket();
            true
        }
    }

    /// Stores the socket at this node and goes to the next; false if the batch is
    /// full.
    #[inline(always)]
    unsafe fn take(&self, node: u64) -> bool {
        // SAFETY: as in `sockets`.
        unsafe {
            let next: u64 = Address(node).read(0);
            let sock = Address(node.wrapping_sub(offset(Field::SkNode) as u64));
            let common: SockCommon = sock.read(0);
            if common.net == self.net && common.state != TIME_WAIT {
                let count = addr_of_mut!((*self.batch).count).read_volatile();
                if count >= STEPS as u64 {
                    return false;
                }
                let slot = addr_of_mut!((*self.batch).sockets)
                    .cast::<u8>()
                    .add(bounded(count) as usize * size_of::<Live<EndsV6>>());
                let stored = write(slot, sock, &common);
                // Freed and reused meanwhile: the record mixes two sockets.
                let [addresses, ports]: [u64; 2] = sock.read(0);
                if addresses != common.addresses || ports != common.hash_and_ports {
                    addr_of_mut!((*self.batch).node).write_volatile(WRONG_CHAIN);
                    return true;
                }
                if stored {
                    addr_of_mut!((*self.batch).count).write_volatile(count + 1);
                }
            }
            addr_of_mut!((*self.batch).node).write_volatile(next);
            true
        }
    }
}

/// The same value, in a register that the verifier knows to be below [`STEPS`].
/// After a comparison the compiler may use another register than the compared
/// one.
#[inline(always)]
fn bounded(count: u64) -> u64 {
    const { assert!(STEPS == 64) };
    let mut count = count;
    // SAFETY: arithmetic on a register.
    unsafe { asm!("{0} &= 63", inout(reg) count) };
    count
}

/// Writes a [`Live`] record; false if the socket has no state to report.
///
/// # Safety
///
/// `slot` must be valid for the larger record.
#[inline(always)]
unsafe fn write(slot: *mut u8, sock: Address, common: &SockCommon) -> bool {
    let state = match common.state {
        NEW_SYN_RECV => SYN_RECV,
        TIME_WAIT | CLOSE | LISTEN => return false,
        state @ ESTABLISHED..=CLOSING => state,
        // Just allocated.
        _ => return false,
    };
    let remote_port = u16::from_be((common.hash_and_ports >> 32) as u16);
    let local_port = (common.hash_and_ports >> 48) as u16;
    if local_port == 0 {
        // About to close: it has left the table and released its port
        // (`tcp_set_state`).
        return false;
    }
    const { assert!(offset_of!(Live<EndsV4>, ends) == offset_of!(Live<EndsV6>, ends)) };
    let live = slot.cast::<Live<EndsV6>>();
    // SAFETY: the caller's; fields of the types that BTF says. A request socket
    // has no statistics.
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
                local: (common.addresses >> 32) as u32,
                remote: common.addresses as u32,
                local_port,
                remote_port,
                pad: 0,
            });
        }
        let stats = addr_of_mut!((*live).stats);
        zero(stats);
        let flags = if common.state == NEW_SYN_RECV {
            0
        } else {
            let flags: u64 = sock.read(offset(Field::SkFlags));
            write_traffic(sock, state, flags, stats);
            flag::TRAFFIC
        };
        addr_of_mut!((*live).head).write(Head {
            kind: kind::LIVE,
            flags: flags | if is_v6 { flag::V6 } else { 0 },
            old: state,
            new: state,
            // The agent knows it.
            netns: 0,
            id: sock.0,
            cookie: common.cookie,
        });
    }
    true
}

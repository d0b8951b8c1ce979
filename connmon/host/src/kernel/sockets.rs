//! The walk over the kernel's TCP socket table.
#![expect(unsafe_code, reason = "a map that a program writes to")]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::addr_of_mut;

use connmon_common::tuning::{Batch, STEPS};
use connmon_core::event::{LiveSocket, decode_live};

use super::sys::{self, Shared};

/// Runs in a row that may end in the bucket where they began: a chain that
/// changes during a run is scanned again.
const MAX_RETRIES: u32 = 16;

/// Reads the connections and handshakes of a network namespace, without a lock
/// and without a reference to any (`connmon-ebpf/src/sockets.rs`). Each that
/// exists throughout is read at least once. Linux 5.10, with the offsets of
/// [`connmon_common::tuning::Field::is_for_scan`].
#[derive(Debug)]
pub struct SocketWalk {
    program: OwnedFd,
    batch: Shared<Batch>,
}

impl SocketWalk {
    /// Tries one run.
    ///
    /// # Errors
    ///
    /// Why it does not work here, in words.
    pub(super) fn new(program: OwnedFd, batch: Shared<Batch>) -> Result<Self, String> {
        let mut walk = Self { program, batch };
        walk.run(0)
            .map_err(|error| format!("bpf(BPF_PROG_TEST_RUN): {error}"))?;
        Ok(walk)
    }

    /// Reads the network namespace of the calling thread. `sink` gets each
    /// socket and returns whether to continue; the result is whether all were
    /// read.
    ///
    /// # Errors
    ///
    /// bpf(BPF_PROG_TEST_RUN)'s: EPERM under a seccomp filter, and before 6.0
    /// without CAP_BPF. Or a chain of the table has more than [`STEPS`] sockets,
    /// those of other namespaces and in TIME_WAIT included. What was delivered
    /// before is valid.
    pub fn read(&mut self, mut sink: impl FnMut(LiveSocket) -> bool) -> io::Result<bool> {
        let (mut bucket, mut retries) = (0, 0);
        loop {
            let batch = self.run(bucket)?;
            for index in 0..batch.found {
                if !sink(self.socket(index)?) {
                    return Ok(false);
                }
            }
            if batch.next >= batch.buckets {
                return Ok(true);
            }
            retries = if batch.next > bucket { 0 } else { retries + 1 };
            bucket = batch.next;
            if retries == MAX_RETRIES {
                return Err(io::Error::other(format!(
                    "bucket {bucket} of {}: its chain has {STEPS} sockets or more, or keeps changing",
                    batch.buckets
                )));
            }
        }
    }

    /// Scans a batch of buckets, from this one on.
    fn run(&mut self, bucket: u64) -> io::Result<Found> {
        let batch = self.batch.as_ptr();
        // SAFETY: `Shared`'s; the program runs only within the call below.
        unsafe {
            addr_of_mut!((*batch).bucket).write_volatile(bucket);
            // For a run that does not reach the program.
            addr_of_mut!((*batch).buckets).write_volatile(0);
            addr_of_mut!((*batch).found).write_volatile(0);
        }
        sys::run(self.program.as_fd())?;
        // SAFETY: as above.
        let found = unsafe {
            Found {
                next: addr_of_mut!((*batch).bucket).read_volatile(),
                buckets: addr_of_mut!((*batch).buckets).read_volatile(),
                found: STEPS.min(addr_of_mut!((*batch).found).read_volatile() as usize),
            }
        };
        match found.buckets {
            0 => Err(io::Error::other("the socket table was not found")),
            _ => Ok(found),
        }
    }

    fn socket(&self, index: usize) -> io::Result<LiveSocket> {
        // SAFETY: as in `run`; `found` is within bounds.
        let words = unsafe { addr_of_mut!((*self.batch.as_ptr()).sockets[index]).read_volatile() };
        decode_live(words.map(u64::to_ne_bytes).as_flattened()).map_err(io::Error::other)
    }
}

/// What a run left in the [`Batch`].
struct Found {
    /// The first bucket that is not done.
    next: u64,
    buckets: u64,
    found: usize,
}

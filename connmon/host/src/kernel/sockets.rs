//! The walk over the kernel's table of TCP sockets.
#![expect(unsafe_code, reason = "a map that a program writes to")]

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::addr_of_mut;

use connmon_common::tuning::{STEPS, Stretch};
use connmon_core::event::{LiveSocket, decode_live};

use super::sys::{self, Shared};

/// Reads the connections and handshakes of a network namespace, each that is
/// there throughout at least once, without a lock and without a reference to
/// any (`connmon-ebpf/src/sockets.rs`). Linux 5.10, with the offsets of
/// [`connmon_common::tuning::TABLE_FIELDS`].
#[derive(Debug)]
pub struct SocketWalk {
    program: OwnedFd,
    stretch: Shared<Stretch>,
}

impl SocketWalk {
    /// The reason in words when it does not work here.
    pub(super) fn new(program: OwnedFd, stretch: Shared<Stretch>) -> Result<Self, String> {
        let mut walk = Self { program, stretch };
        walk.run(0)
            .map_err(|error| format!("bpf(BPF_PROG_TEST_RUN): {error}"))?;
        Ok(walk)
    }

    /// Reads the namespace of the calling thread to its end; `sink` gets each
    /// socket and says whether to go on. Whether it came to the end.
    ///
    /// # Errors
    ///
    /// bpf(BPF_PROG_TEST_RUN)'s: EPERM under a seccomp filter, and before 6.0
    /// without CAP_BPF. Or a chain of the table is longer than a run may be
    /// ([`STEPS`], whatever namespace its sockets are of, TIME_WAIT included).
    /// What was delivered before is true all the same.
    pub fn read(&mut self, mut sink: impl FnMut(LiveSocket) -> bool) -> io::Result<bool> {
        let mut bucket = 0;
        // Runs of a bucket in vain: a chain that changes under it is gone
        // through again.
        let mut vain = 0;
        loop {
            self.run(bucket)?;
            for place in 0..self.found() {
                if !sink(self.socket(place)?) {
                    return Ok(false);
                }
            }
            let (begun, buckets) = (bucket, self.buckets());
            bucket = self.bucket();
            if bucket >= buckets {
                return Ok(true);
            }
            vain = if bucket > begun { 0 } else { vain + 1 };
            if vain == TRIES {
                return Err(io::Error::other(format!(
                    "bucket {bucket} of {buckets}: a chain of {STEPS} sockets or more, or one that does not hold still"
                )));
            }
        }
    }

    /// Takes the buckets from this one on.
    fn run(&mut self, bucket: u64) -> io::Result<()> {
        let stretch = self.stretch.as_ptr();
        // SAFETY: `Shared`'s; the program runs within the call below only.
        unsafe {
            addr_of_mut!((*stretch).bucket).write_volatile(bucket);
            // What a program that was not run leaves.
            addr_of_mut!((*stretch).buckets).write_volatile(0);
            addr_of_mut!((*stretch).found).write_volatile(0);
        }
        sys::run(self.program.as_fd())?;
        match self.buckets() {
            0 => Err(io::Error::other("the table of sockets was not found")),
            _ => Ok(()),
        }
    }

    fn bucket(&self) -> u64 {
        // SAFETY: as in `run`.
        unsafe { addr_of_mut!((*self.stretch.as_ptr()).bucket).read_volatile() }
    }

    fn buckets(&self) -> u64 {
        // SAFETY: as in `run`.
        unsafe { addr_of_mut!((*self.stretch.as_ptr()).buckets).read_volatile() }
    }

    fn found(&self) -> usize {
        // SAFETY: as in `run`.
        let found = unsafe { addr_of_mut!((*self.stretch.as_ptr()).found).read_volatile() };
        STEPS.min(found as usize)
    }

    fn socket(&self, place: usize) -> io::Result<LiveSocket> {
        // SAFETY: as in `run`; `found` is within bounds.
        let words =
            unsafe { addr_of_mut!((*self.stretch.as_ptr()).sockets[place]).read_volatile() };
        decode_live(words.map(u64::to_ne_bytes).as_flattened()).map_err(io::Error::other)
    }
}

const TRIES: u32 = 16;

//! Reading what the programs produce: records, counters, missed runs.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use aya::maps::{Map, MapData, RingBuf};
use connmon_common::tuning::PerCpu;
use connmon_core::event::{self, Event};
use connmon_core::report::ProgramStats;

use super::ladder::Attached;
use super::{Method, Probe, Rung, sys};

/// What one drain of the ring did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Records taken, undecodable ones included.
    pub records: u64,
    /// Those that were no event.
    pub undecodable: u64,
    /// Nothing was left; else the budget ended it.
    pub empty: bool,
}

/// The event ring buffer.
pub struct Ring(RingBuf<MapData>);

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Ring").field(&self.0.as_raw_fd()).finish()
    }
}

impl Ring {
    pub fn new(map: Map) -> Result<Self, aya::maps::MapError> {
        Ok(Self(RingBuf::try_from(map)?))
    }

    /// Hands at most `budget` records on.
    pub fn drain(&mut self, budget: usize, mut f: impl FnMut(Event)) -> Drained {
        let mut drained = Drained::default();
        while drained.records < budget as u64 {
            let Some(record) = self.0.next() else {
                drained.empty = true;
                break;
            };
            drained.records += 1;
            match event::decode(&record) {
                Ok(event) => f(event),
                Err(_) => drained.undecodable += 1,
            }
        }
        drained
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Totals since the programs were attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Attempts to reserve a record, all programs.
    pub produced: u64,
    /// Failed ones.
    pub ring_full: u64,
    /// Runs that the kernel left out, where it tells.
    pub missed: Vec<(Probe, u64)>,
}

/// Sums of [`PerCpu`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// Attempts to reserve a record.
    pub produced: u64,
    /// Failed ones.
    pub ring_full: u64,
    /// Missed runs of the state program that its second made good.
    pub caught: u64,
    /// Missed runs of the classic tracepoint's program, as its second tells.
    pub lost: u64,
}

/// Reads the per-CPU counters without allocating.
#[derive(Debug)]
pub struct CounterReader {
    map: MapData,
    /// One [`PerCpu`] per possible CPU.
    values: Vec<u64>,
}

impl CounterReader {
    pub fn new(map: Map) -> io::Result<Self> {
        let Map::PerCpuArray(map) = map else {
            return Err(io::Error::other("COUNTERS is no per-CPU array"));
        };
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        Ok(Self {
            map,
            values: vec![0; cpus * WORDS],
        })
    }

    /// Sums over all CPUs and programs; the last known ones when the kernel
    /// refuses.
    pub fn read(&mut self) -> Totals {
        let bytes = size_of_val(&self.values[..]);
        if let Err(error) = sys::map_lookup_first(self.map.fd().as_fd(), &mut self.values, bytes) {
            log::debug!("the programs' counters cannot be read: {error}");
        }
        let mut totals = Totals::default();
        for cpu in self.values.as_chunks::<WORDS>().0 {
            totals.produced += cpu[..RING_FULL].iter().sum::<u64>();
            totals.ring_full += cpu[RING_FULL..CAUGHT].iter().sum::<u64>();
            totals.caught += cpu[CAUGHT];
            totals.lost += cpu[LOST];
        }
        totals
    }
}

/// Words of a [`PerCpu`], and where those after `produced` begin.
const WORDS: usize = size_of::<PerCpu>() / 8;
const RING_FULL: usize = std::mem::offset_of!(PerCpu, ring_full) / 8;
const CAUGHT: usize = std::mem::offset_of!(PerCpu, caught) / 8;
const LOST: usize = std::mem::offset_of!(PerCpu, lost) / 8;
const _: () = assert!(std::mem::offset_of!(PerCpu, produced) == 0);

/// What the kernel keeps about one attached program.
#[derive(Debug)]
pub struct ProgramMeter {
    attached: Attached,
    method: Method,
    /// `/proc/self/fdinfo/N` of the program, kept open: each read is fresh.
    fdinfo: Option<File>,
}

/// `fdinfo` of a program, what of it is used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Fdinfo {
    run_time_ns: Option<u64>,
    run_cnt: Option<u64>,
    recursion_misses: Option<u64>,
}

impl ProgramMeter {
    pub fn new(attached: Attached, rung: &Rung) -> Self {
        Self::with(attached, rung.method)
    }

    /// Of a program beside the one that serves the probe; runs that it misses
    /// are no loss.
    pub fn second(attached: Attached) -> Self {
        Self::with(attached, Method::None)
    }

    fn with(attached: Attached, method: Method) -> Self {
        let path = format!("/proc/self/fdinfo/{}", attached.program.as_raw_fd());
        Self {
            attached,
            method,
            fdinfo: File::open(path).ok(),
        }
    }

    /// Runs left out; `None` where this kernel does not count them.
    pub fn missed(&self) -> Option<(Probe, u64)> {
        let version = super::kernel_version();
        // recursion_misses is shown since 5.12, but who counts in it grew:
        // trampolines with it, raw tracepoints in 6.1 (bpf_trace_run*),
        // perf-based programs in 6.7 (trace_call_bpf).
        let since = match self.method {
            Method::Fentry | Method::Fexit => (5, 12),
            Method::TpBtf => (6, 1),
            Method::Tracepoint | Method::Kprobe | Method::Kretprobe => (6, 7),
            Method::None => return None,
        };
        if version < since {
            return None;
        }
        let mut missed = self.read()?.recursion_misses?;
        if let Some(link) = &self.attached.link {
            missed += link_missed(link.fd.as_ref()?.as_fd())?;
        }
        Some((self.attached.probe, missed))
    }

    /// Runs and run time, whether or not the kernel keeps them now.
    pub fn stats(&self) -> Option<ProgramStats> {
        let info = self.read()?;
        Some(ProgramStats {
            program: self.attached.name.to_owned(),
            runs: info.run_cnt?,
            run_time_ns: info.run_time_ns?,
        })
    }

    /// Length of the program as the kernel keeps it, bytes: without the code
    /// that the verifier found dead.
    #[cfg(test)]
    pub fn translated_len(&self) -> u64 {
        // struct bpf_prog_info: type, id, tag, jited_prog_len, xlated_prog_len.
        let mut info = [0u64; 3];
        sys::object_info(self.attached.program.as_fd(), &mut info).unwrap();
        info[2] >> 32
    }

    fn read(&self) -> Option<Fdinfo> {
        let mut text = [0; 1024];
        let len = self.fdinfo.as_ref()?.read_at(&mut text, 0).ok()?;
        Some(parse_fdinfo(std::str::from_utf8(text.get(..len)?).ok()?))
    }
}

fn parse_fdinfo(text: &str) -> Fdinfo {
    let mut info = Fdinfo::default();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let value = value.trim().parse().ok();
        match key {
            "run_time_ns" => info.run_time_ns = value,
            "run_cnt" => info.run_cnt = value,
            "recursion_misses" => info.recursion_misses = value,
            _ => {}
        }
    }
    info
}

/// `bpf_link_info.perf_event.kprobe.missed`, since 6.7: full kretprobe
/// instances and the like.
fn link_missed(link: BorrowedFd<'_>) -> Option<u64> {
    // Words of struct bpf_link_info: 0 type and id, 1 prog_id, 2 perf event
    // type, 3 func_name, 4 name_len and offset, 5 addr, 6 missed, 7 cookie.
    let mut info = [0u64; 16];
    let filled = sys::object_info(link, &mut info).ok()?;
    (filled >= 7 * 8).then_some(info[6])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_of_old_and_new_kernels() {
        let new = "pos:\t0\nflags:\t02000002\nmnt_id:\t16\nino:\t2064\nprog_type:\t26\nprog_jited:\t1\n\
                   prog_tag:\t6deef7357e7b4530\nmemlock:\t4096\nprog_id:\t12\nrun_time_ns:\t1830\n\
                   run_cnt:\t30\nrecursion_misses:\t2\nverified_insns:\t85\n";
        assert_eq!(
            parse_fdinfo(new),
            Fdinfo {
                run_time_ns: Some(1830),
                run_cnt: Some(30),
                recursion_misses: Some(2),
            }
        );
        let old = "prog_id:\t12\nrun_time_ns:\t0\nrun_cnt:\t0\n";
        assert_eq!(parse_fdinfo(old).recursion_misses, None);
        assert_eq!(parse_fdinfo("garbage\n:\nrun_cnt:\tx\n"), Fdinfo::default());
    }
}

//! Reading what the programs produce: records, counters, missed runs.
#![expect(unsafe_code, reason = "a map lookup into a buffer")]

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;

use aya::maps::{Map, MapData, RingBuf};
use connmon_common::tuning::PerCpu;
use connmon_core::event::{self, Event};
use connmon_core::report::ProgramStats;

use super::ladder::Attached;
use super::{Method, Probe, sys};

/// What one drain of the ring did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Records taken, undecodable ones included.
    pub records: u64,
    /// Undecodable records.
    pub undecodable: u64,
    /// Whether the ring was empty at the end; else the budget ended the drain.
    pub empty: bool,
}

/// Delivers at most `budget` events of the ring.
pub fn drain(ring: &mut RingBuf<MapData>, budget: usize, mut f: impl FnMut(Event)) -> Drained {
    let mut drained = Drained::default();
    while drained.records < budget as u64 {
        let Some(record) = ring.next() else {
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

/// Totals since the programs were attached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Attempts to reserve a record, all programs.
    pub produced: u64,
    /// Failed attempts among them.
    pub ring_full: u64,
    /// Missed runs of each probe, where the kernel counts them.
    pub missed: Vec<(Probe, u64)>,
}

/// Sums of [`PerCpu`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Totals {
    /// See [`PerCpu::produced`].
    pub produced: u64,
    /// See [`PerCpu::ring_full`].
    pub ring_full: u64,
    /// See [`PerCpu::recovered`].
    pub recovered: u64,
    /// See [`PerCpu::missed`].
    pub missed: u64,
}

/// Reads the per-CPU counters.
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
        let info = map.info().map_err(io::Error::other)?;
        if info.value_size() as usize != size_of::<PerCpu>() {
            return Err(io::Error::other("COUNTERS has values of another size"));
        }
        let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
        Ok(Self {
            map,
            values: vec![0; cpus * WORDS],
        })
    }

    /// Sums over all CPUs and programs; the last known ones if the kernel
    /// refuses.
    pub fn read(&mut self) -> Totals {
        // SAFETY: an array's key has 4 bytes; `new` checked the value's size,
        // and there is one for each possible CPU.
        let read = unsafe { sys::map_lookup_first(self.map.fd().as_fd(), &mut self.values) };
        if let Err(error) = read {
            log::debug!("the programs' counters cannot be read: {error}");
        }
        let mut totals = Totals::default();
        for cpu in self.values.as_chunks::<WORDS>().0 {
            totals.produced += cpu[..RING_FULL].iter().sum::<u64>();
            totals.ring_full += cpu[RING_FULL..RECOVERED].iter().sum::<u64>();
            totals.recovered += cpu[RECOVERED];
            totals.missed += cpu[MISSED];
        }
        totals
    }
}

/// Words of a [`PerCpu`], and where those after `produced` begin.
const WORDS: usize = size_of::<PerCpu>() / 8;
const RING_FULL: usize = offset_of!(PerCpu, ring_full) / 8;
const RECOVERED: usize = offset_of!(PerCpu, recovered) / 8;
const MISSED: usize = offset_of!(PerCpu, missed) / 8;
const _: () = assert!(offset_of!(PerCpu, produced) == 0);

/// The kernel's statistics of one attached program.
pub struct ProgramMeter {
    attached: Attached,
    method: Method,
    /// `/proc/self/fdinfo/N` of the program. It stays open, since the sandbox
    /// allows no opening; each read is fresh.
    fdinfo: Option<File>,
}

impl ProgramMeter {
    /// [`Method::None`] for the second state program, whose missed runs are no
    /// loss.
    pub fn new(attached: Attached, method: Method) -> Self {
        let path = format!("/proc/self/fdinfo/{}", attached.program.as_raw_fd());
        Self {
            attached,
            method,
            fdinfo: File::open(path).ok(),
        }
    }

    /// Missed runs; `None` if this kernel does not count them.
    pub fn missed(&self) -> Option<(Probe, u64)> {
        // Shown since 5.12 for trampolines. Raw tracepoints count since 6.1
        // (bpf_trace_run*), perf-based programs since 6.7 (trace_call_bpf).
        let since = match self.method {
            Method::Fentry | Method::Fexit => (5, 12),
            Method::TpBtf => (6, 1),
            Method::Tracepoint | Method::Kprobe | Method::Kretprobe => (6, 7),
            Method::None => return None,
        };
        if super::kernel_version() < since {
            return None;
        }
        let [mut missed] = self.read(["recursion_misses"])?;
        if let Some(link) = &self.attached.link {
            missed += link_missed(link.fd.as_ref()?.as_fd())?;
        }
        Some((self.attached.probe, missed))
    }

    /// Runs and run time, whether or not the kernel counts them now.
    pub fn stats(&self) -> Option<ProgramStats> {
        let [runs, run_time_ns] = self.read(["run_cnt", "run_time_ns"])?;
        Some(ProgramStats {
            program: self.attached.name.to_owned(),
            runs,
            run_time_ns,
        })
    }

    /// Size of the program in the kernel in bytes, without the code that the
    /// verifier found dead.
    #[cfg(test)]
    pub fn translated_len(&self) -> u64 {
        // struct bpf_prog_info: type, id, tag, jited_prog_len, xlated_prog_len.
        let (info, _) = sys::object_info(self.attached.program.as_fd()).unwrap();
        info[2] >> 32
    }

    fn read<const N: usize>(&self, keys: [&str; N]) -> Option<[u64; N]> {
        let mut text = [0; 1024];
        let len = self.fdinfo.as_ref()?.read_at(&mut text, 0).ok()?;
        parse_fdinfo(std::str::from_utf8(text.get(..len)?).ok()?, keys)
    }
}

/// The values of these keys, if all are there.
fn parse_fdinfo<const N: usize>(text: &str, keys: [&str; N]) -> Option<[u64; N]> {
    let mut values = [0; N];
    for (value, wanted) in values.iter_mut().zip(keys) {
        let mut pairs = text.lines().filter_map(|line| line.split_once(':'));
        let (_, number) = pairs.find(|(key, _)| *key == wanted)?;
        *value = number.trim().parse().ok()?;
    }
    Some(values)
}

/// `bpf_link_info.perf_event.kprobe.missed` (6.7): kretprobe instances that ran
/// out, and the like.
fn link_missed(link: BorrowedFd<'_>) -> Option<u64> {
    // Words of struct bpf_link_info: 0 type and id, 1 prog_id, 2 perf event
    // type, 3 func_name, 4 name_len and offset, 5 addr, 6 missed, 7 cookie.
    let (info, filled) = sys::object_info(link).ok()?;
    (filled >= 7 * 8).then_some(info[6])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fdinfo_of_old_and_new_kernels_parses() {
        let keys = ["run_time_ns", "run_cnt"];
        let new = "pos:\t0\nflags:\t02000002\nmnt_id:\t16\nino:\t2064\nprog_type:\t26\nprog_jited:\t1\n\
                   prog_tag:\t6deef7357e7b4530\nmemlock:\t4096\nprog_id:\t12\nrun_time_ns:\t1830\n\
                   run_cnt:\t30\nrecursion_misses:\t2\nverified_insns:\t85\n";
        assert_eq!(parse_fdinfo(new, keys), Some([1830, 30]));
        assert_eq!(parse_fdinfo(new, ["recursion_misses"]), Some([2]));
        let old = "prog_id:\t12\nrun_time_ns:\t0\nrun_cnt:\t0\n";
        assert_eq!(parse_fdinfo(old, keys), Some([0, 0]));
        assert_eq!(parse_fdinfo(old, ["recursion_misses"]), None);
        assert_eq!(parse_fdinfo("garbage\n:\nrun_cnt:\tx\n", keys), None);
    }
}

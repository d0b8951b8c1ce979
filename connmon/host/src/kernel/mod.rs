//! The kernel side, seen from user space: resolves offsets from BTF, loads and
//! attaches the programs, drains the ring buffer, reads the counters.

mod btf;
mod error;
mod facts;
mod ladder;
mod load;
mod logs;
mod ring;
mod sockets;
mod sys;
mod tracefs;
mod watch;

pub use error::AttachError;
pub use facts::{Diagnosis, HostFacts};
pub use ring::{Counters, Drained};
pub use sockets::SocketWalk;
pub use sys::{return_memory_at_once, trim_memory};
pub use tracefs::{MOUNT_TRACEFS, OPEN_TRACEFS, Tracefs};
pub use watch::watch;

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;

use aya::maps::{Map, MapData, MapError, RingBuf};
use connmon_common::tuning::{BATCH_MAP, COUNTERS_MAP, EVENTS_MAP};
use connmon_core::event::Event;
use connmon_core::probe::{AttachFailure, Method, Probe, Rung};
use connmon_core::report::ProgramStats;

use ring::{CounterReader, ProgramMeter};
use sys::Shared;

/// `--ebpf.attach`: the methods that are tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachChoice {
    /// Every method, best first.
    Auto,
    /// Only fentry and fexit for the function probes.
    Fentry,
    /// Only kprobe and kretprobe for the function probes.
    Kprobe,
    /// No function probes; the classic tracepoint for state changes.
    Tracepoint,
}

impl AttachChoice {
    /// The value of the flag.
    pub fn label(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Fentry => "fentry",
            Self::Kprobe => "kprobe",
            Self::Tracepoint => "tracepoint",
        }
    }

    fn allows(self, method: Method) -> bool {
        match method {
            Method::Tracepoint => true,
            Method::TpBtf => self != Self::Tracepoint,
            Method::Fentry | Method::Fexit => matches!(self, Self::Auto | Self::Fentry),
            _ => matches!(self, Self::Auto | Self::Kprobe),
        }
    }
}

/// Options of a [`Tracer`].
#[derive(Clone, Debug)]
pub struct TracerOptions {
    /// `--ebpf.attach`.
    pub attach: AttachChoice,
    /// Size of the ring, a power of two number of pages.
    pub ring_buffer_bytes: u32,
    /// Let the programs leave out loopback connections. Not without the kernel's
    /// BTF: then the function probes could not leave them out, and the fold would
    /// wait for the openings that belong to their records.
    pub drop_loopback: bool,
    /// Let the programs trace only the network namespace with this inode. An
    /// error without the kernel's BTF, since events carry no namespace then.
    pub only_netns: Option<u32>,
    /// Collect process name and cgroup at connect and accept; else only the pid.
    /// Both are always collected at listen.
    pub owners: bool,
    /// Collect bytes, retransmissions and RTT at close.
    pub traffic: bool,
    /// At debug and above, the programs' own diagnostics are logged.
    pub log_level: log::LevelFilter,
}

impl TracerOptions {
    /// Whether the programs' own diagnostics are compiled in.
    fn logs(&self) -> bool {
        self.log_level >= log::LevelFilter::Debug
    }
}

/// The attached programs and what they produce. Dropping it detaches them.
pub struct Tracer {
    ring: RingBuf<MapData>,
    counters: CounterReader,
    /// Records drained since attach.
    taken: u64,
    /// State changes that no state program handled.
    missed: u64,
    /// Whether a second program counts them itself, on any kernel.
    counts_misses: bool,
    ring_bytes: u32,
    rungs: Vec<Rung>,
    meters: Vec<ProgramMeter>,
    traffic: bool,
    logger: Option<logs::ProgramLog>,
    stats: Option<OwnedFd>,
    /// `kernel.bpf_stats_enabled`. It stays open, since the sandbox allows no
    /// opening.
    stats_switch: Option<File>,
    /// Why the socket table cannot be walked, if so.
    no_table: Option<String>,
    /// Holds the attachments.
    programs: aya::Ebpf,
}

impl Tracer {
    /// Loads and attaches, the state program first and fully. Linux 5.10.
    ///
    /// # Errors
    ///
    /// If no method attaches a state program; the message is one sentence with
    /// the remedy. A function probe that fails is no error.
    pub fn attach(options: &TracerOptions) -> Result<Self, AttachError> {
        let ring_bytes = options.ring_buffer_bytes;
        let types = load::KernelTypes::read();
        if let (Err(reason), Some(_)) = (&types, options.only_netns) {
            return Err(AttachError::no_namespaces(reason));
        }
        let mut ebpf = load::prepare(options, types.as_ref().ok())
            .map_err(|error| AttachError::map("the BPF object", &error, ring_bytes))?;
        // Before a program that writes to its map is loaded.
        let logger = (options.logs())
            .then(|| logs::ProgramLog::new(&mut ebpf))
            .flatten();
        let map_error = |name: &str, error: &(dyn Error + 'static)| {
            AttachError::map(&format!("map {name}"), error, ring_bytes)
        };
        let mut map = |name: &str| {
            let missing = MapError::InvalidName { name: name.into() };
            ebpf.take_map(name).ok_or_else(|| map_error(name, &missing))
        };
        let ring =
            RingBuf::try_from(map(EVENTS_MAP)?).map_err(|error| map_error(EVENTS_MAP, &error))?;
        let counters = CounterReader::new(map(COUNTERS_MAP)?)
            .map_err(|error| map_error(COUNTERS_MAP, &error))?;

        let known = types.as_ref().map_err(String::as_str);
        let mut rungs = Vec::new();
        let mut meters = Vec::new();
        let mut counts_misses = false;
        for probe in Probe::ALL {
            let (rung, attached) = ladder::attach_probe(&mut ebpf, known, options.attach, probe);
            meters.extend(attached.map(|attached| ProgramMeter::new(attached, rung.method)));
            if probe == Probe::SetState {
                let Some(first) = meters.first() else {
                    return Err(AttachError::diagnosed(rung.failures, ring_bytes));
                };
                let is_classic = rung.method == Method::Tracepoint;
                if is_classic || first.missed().is_some() {
                    match ladder::attach_second(&mut ebpf, known, rung.method) {
                        Ok(attached) => {
                            counts_misses = is_classic;
                            meters.push(ProgramMeter::new(attached, Method::None));
                        }
                        Err(reason) => {
                            log::info!("state changes within interrupts may be missed: {reason}")
                        }
                    }
                }
            }
            rungs.push(rung);
        }
        let traffic = options.traffic && (rungs[0].method == Method::TpBtf || known.is_ok());
        let no_table = match types {
            Ok(types) => types.no_table,
            Err(reason) => Some(reason),
        };
        sys::trim_memory();
        Ok(Self {
            ring,
            counters,
            taken: 0,
            missed: 0,
            counts_misses,
            ring_bytes,
            rungs,
            meters,
            traffic,
            logger,
            stats: None,
            stats_switch: File::open("/proc/sys/kernel/bpf_stats_enabled").ok(),
            no_table,
            programs: ebpf,
        })
    }

    /// Closes the maps that only loading needs: the programs keep them. After
    /// this nothing more can be loaded.
    pub fn close_maps(&mut self) {
        let names: Vec<String> = self
            .programs
            .maps()
            .map(|(name, _)| name.to_owned())
            .collect();
        for name in names {
            drop(self.programs.take_map(&name));
        }
    }

    /// How each probe is attached, in the order of [`Probe::ALL`].
    pub fn rungs(&self) -> &[Rung] {
        &self.rungs
    }

    /// Readable once an eighth of the ring is used. Below that nobody is woken,
    /// so drain on a timer as well.
    pub fn ring_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    /// Delivers at most `budget` events, in the order of their reservation.
    pub fn drain(&mut self, budget: usize, f: impl FnMut(Event)) -> Drained {
        let drained = ring::drain(&mut self.ring, budget, f);
        self.taken += drained.records;
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
        drained
    }

    /// Attempts to reserve a record so far, all before this call included.
    pub fn produced(&mut self) -> u64 {
        self.counters.read().produced
    }

    /// Whether the first `produced` attempts are drained or failed. A drain ends
    /// at a record that another CPU is still writing, even if later ones are
    /// finished (`bpf_ringbuf_reserve` orders by reservation).
    pub fn is_through(&mut self, produced: u64) -> bool {
        self.taken >= produced || self.taken + self.counters.read().ring_full >= produced
    }

    /// Totals since attach; the last known ones if the kernel refuses the lookup
    /// (5.10 without CAP_BPF).
    pub fn counters(&mut self) -> Counters {
        // Before the counters: a run is missed first and recovered then.
        let mut missed: Vec<_> = (self.meters.iter())
            .filter_map(ProgramMeter::missed)
            .collect();
        let totals = self.counters.read();
        if self.counts_misses {
            missed.retain(|(probe, _)| *probe != Probe::SetState);
            missed.insert(0, (Probe::SetState, totals.missed));
        }
        for (probe, missed) in &mut missed {
            if *probe == Probe::SetState {
                // Never lower: runs that were missed and recovered between the
                // two readings would hide older misses.
                self.missed = self.missed.max(missed.saturating_sub(totals.recovered));
                *missed = self.missed;
            }
        }
        Counters {
            produced: totals.produced,
            ring_full: totals.ring_full,
            missed,
        }
    }

    /// The walk over the kernel's TCP socket table, for
    /// [`crate::reconcile::WalkerOptions`]. Only the first call succeeds.
    ///
    /// # Errors
    ///
    /// Why there is none, in words.
    pub fn socket_walk(&mut self) -> Result<SocketWalk, String> {
        if let Some(reason) = &self.no_table {
            return Err(reason.clone());
        }
        let map = self.programs.take_map(BATCH_MAP);
        let Some(Map::Array(map)) = map else {
            return Err(format!("the object has no map {BATCH_MAP}"));
        };
        let program =
            ladder::socket_walk(&mut self.programs).map_err(|failure| failure.to_string())?;
        let batch =
            Shared::map(map.fd().as_fd()).map_err(|error| format!("map {BATCH_MAP}: {error}"))?;
        SocketWalk::new(program, batch)
    }

    /// Size of the ring in bytes.
    pub fn ring_len(&self) -> u32 {
        self.ring_bytes
    }

    /// Runs and run time of each program; empty unless the kernel counts them
    /// (`kernel.bpf_stats_enabled`, or [`Tracer::enable_stats`]).
    pub fn program_stats(&self) -> Vec<ProgramStats> {
        let stats: Vec<_> = self.meters.iter().filter_map(ProgramMeter::stats).collect();
        let counted = self.stats.is_some()
            || stats.iter().any(|program| program.runs > 0)
            || self.stats_switch.as_ref().is_some_and(is_on);
        if counted { stats } else { Vec::new() }
    }

    /// Makes the kernel time the programs while this tracer lives. Linux 5.8,
    /// CAP_SYS_ADMIN.
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn enable_stats(&mut self) -> io::Result<()> {
        let stats = aya::sys::enable_stats(aya::sys::Stats::RunTime);
        self.stats = Some(stats.map_err(|error| error.io_error)?);
        Ok(())
    }

    /// Whether closes carry bytes, retransmissions and RTT.
    pub fn traffic_known(&self) -> bool {
        self.traffic
    }

    /// Whether accepts are reported.
    pub fn accepts_known(&self) -> bool {
        self.rungs
            .iter()
            .any(|rung| rung.probe == Probe::Accept && rung.method != Method::None)
    }
}

/// Whether a sysctl is 1 now: a read at offset 0 is fresh.
fn is_on(switch: &File) -> bool {
    let mut text = [0; 1];
    switch.read_at(&mut text, 0).is_ok() && text == *b"1"
}

/// CLOCK_MONOTONIC in nanoseconds, as `bpf_ktime_get_ns`.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// The rungs if nothing is attached, because of `failures`.
pub fn no_rungs(failures: &[AttachFailure]) -> Vec<Rung> {
    Probe::ALL
        .into_iter()
        .map(|probe| Rung {
            probe,
            method: Method::None,
            failures: failures.to_vec(),
        })
        .collect()
}

/// Major and minor version of the running kernel; (0, 0) if unreadable.
pub fn kernel_version() -> (u32, u32) {
    static VERSION: OnceLock<(u32, u32)> = OnceLock::new();
    *VERSION.get_or_init(|| parse_version(&rustix::system::uname().release().to_string_lossy()))
}

fn parse_version(release: &str) -> (u32, u32) {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_parse_and_compare() {
        assert_eq!(parse_version("5.10.0-32-cloud-amd64"), (5, 10));
        assert_eq!(parse_version("6.18.44-fc-v657"), (6, 18));
        assert_eq!(parse_version("7.2"), (7, 2));
        assert_eq!(parse_version(""), (0, 0));
        assert!(parse_version("6.1.0") > parse_version("5.17.3"));
    }

    /// `None` where nothing can be attached.
    fn attach(log_level: log::LevelFilter) -> Option<Tracer> {
        let options = TracerOptions {
            attach: AttachChoice::Auto,
            ring_buffer_bytes: 4096,
            drop_loopback: false,
            only_netns: Some(1),
            owners: true,
            traffic: true,
            log_level,
        };
        Tracer::attach(&options)
            .inspect_err(|error| {
                println!("skipped: tracer: {error}");
                assert!(std::env::var_os("CI").is_none(), "skipped in CI: {error}");
            })
            .ok()
    }

    #[test]
    fn diagnostics_that_are_off_cost_no_code() {
        let length = |tracer: Tracer| tracer.meters[0].translated_len();
        if let Some(without) = attach(log::LevelFilter::Info).map(length) {
            let with = attach(log::LevelFilter::Debug).map(length).unwrap();
            assert!(0 < without && without < with, "{without} {with}");
        }
    }

    #[test]
    fn a_sysctl_is_read_afresh() {
        let path = std::env::temp_dir().join(format!("connmon-switch-{}", std::process::id()));
        std::fs::write(&path, "0\n").unwrap();
        let switch = File::open(&path).unwrap();
        assert!(!is_on(&switch));
        std::fs::write(&path, "1\n").unwrap();
        assert!(is_on(&switch) && is_on(&switch));
        std::fs::remove_file(&path).unwrap();
    }
}

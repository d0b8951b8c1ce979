//! The userspace edge of the kernel: BTF offsets, load, attach ladder, ring
//! drain. With `reconcile/` and `sandbox/`, the only place with `unsafe`.

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

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;

use aya::maps::{Map, MapError};
use connmon_common::tuning::{COUNTERS_MAP, EVENTS_MAP, STRETCH_MAP};
use connmon_core::event::Event;
use connmon_core::probe::{AttachFailure, Method, Probe, Rung};
use connmon_core::report::ProgramStats;

use ring::{CounterReader, ProgramMeter, Ring};
use sys::Shared;

/// `--ebpf.attach`: the highest rung tried for the function probes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachChoice {
    /// The whole ladder.
    Auto,
    /// fentry/fexit only.
    Fentry,
    /// kprobe/kretprobe only.
    Kprobe,
    /// No function probes; the classic tracepoint for state changes.
    Tracepoint,
}

impl AttachChoice {
    /// As it is written.
    pub fn label(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Fentry => "fentry",
            Self::Kprobe => "kprobe",
            Self::Tracepoint => "tracepoint",
        }
    }
}

/// What a [`Tracer`] is asked to do.
#[derive(Clone, Debug)]
pub struct TracerOptions {
    /// `--ebpf.attach`.
    pub attach: AttachChoice,
    /// Size of the ring, a power of two number of pages.
    pub ring_buffer_bytes: u32,
    /// Leave loopback connections out in the programs already; without the
    /// kernel's BTF they come all the same, since the function probes could
    /// not leave them out, and their records would wait for an opening.
    pub drop_loopback: bool,
    /// Only this namespace, in the programs already; refused where nothing
    /// tells namespaces, which is without the kernel's BTF.
    pub only_netns: Option<u32>,
    /// Collect name and cgroup of those who connect and accept; else only
    /// their pid. Who listens is always named.
    pub owners: bool,
    /// Collect traffic figures at close.
    pub traffic: bool,
    /// At debug and above the programs' own diagnostics are logged.
    pub log_level: log::LevelFilter,
}

/// The programs, attached, and what they produce. Dropping it detaches them.
#[derive(Debug)]
pub struct Tracer {
    ring: Ring,
    counters: CounterReader,
    /// Records drained since attach.
    taken: u64,
    /// Missed runs of the state program that nothing made good.
    missed: u64,
    /// A second program tells of missed runs, on any kernel.
    lost_told: bool,
    ring_bytes: u32,
    rungs: Vec<Rung>,
    meters: Vec<ProgramMeter>,
    traffic: bool,
    logger: Option<logs::ProgramLog>,
    stats: Option<OwnedFd>,
    /// `kernel.bpf_stats_enabled`, opened before the thread that reports is
    /// closed in and may open nothing any more.
    stats_switch: Option<File>,
    /// Why the table of sockets cannot be walked, if so.
    no_table: Option<String>,
    /// Holds the attachments.
    programs: aya::Ebpf,
}

impl Tracer {
    /// Loads and attaches, the state program first and fully. Linux 5.8.
    ///
    /// # Errors
    ///
    /// When there is no state program on any rung; the message is one
    /// sentence with the remedy. Function probes that fail are a lower rung,
    /// not an error.
    pub fn attach(options: &TracerOptions) -> Result<Self, AttachError> {
        let types = load::KernelTypes::read();
        if let (Err(reason), Some(_)) = (&types, options.only_netns) {
            return Err(AttachError::no_namespaces(reason));
        }
        let mut ebpf = load::prepare(options, types.as_ref().ok()).map_err(|error| {
            AttachError::map("the BPF object", &error, options.ring_buffer_bytes)
        })?;
        let map_error = |name: &str, error: &(dyn std::error::Error + 'static)| {
            AttachError::map(&format!("map {name}"), error, options.ring_buffer_bytes)
        };
        let no_map = |name: &str| map_error(name, &MapError::InvalidName { name: name.into() });

        // The logger must exist before a program that writes to its map.
        let logger = load::logs(options)
            .then(|| logs::ProgramLog::new(&mut ebpf))
            .flatten();
        let map = ebpf
            .take_map(EVENTS_MAP)
            .ok_or_else(|| no_map(EVENTS_MAP))?;
        let ring = Ring::new(map).map_err(|error| map_error(EVENTS_MAP, &error))?;
        let map = ebpf
            .take_map(COUNTERS_MAP)
            .ok_or_else(|| no_map(COUNTERS_MAP))?;
        let counters = CounterReader::new(map).map_err(|error| map_error(COUNTERS_MAP, &error))?;

        let known = types.as_ref().map_err(String::as_str);
        let (rung, attached) = ladder::attach_state(&mut ebpf, known, options.attach);
        let Some(attached) = attached else {
            return Err(AttachError::state(rung, options.ring_buffer_bytes));
        };
        let mut meters = vec![ProgramMeter::new(attached, &rung)];
        let mut lost_told = false;
        if meters[0].missed().is_some() || rung.method == Method::Tracepoint {
            match ladder::attach_second(&mut ebpf, known, rung.method) {
                Ok(attached) => {
                    lost_told = rung.method == Method::Tracepoint;
                    meters.push(ProgramMeter::second(attached));
                }
                Err(reason) => {
                    log::info!("state changes within interrupts may be missed: {reason}")
                }
            }
        }
        let traffic = options.traffic && (rung.method == Method::TpBtf || known.is_ok());
        let mut rungs = vec![rung];
        for probe in [Probe::Connect, Probe::Accept] {
            let (rung, attached) = ladder::attach_function(&mut ebpf, known, options.attach, probe);
            meters.extend(attached.map(|attached| ProgramMeter::new(attached, &rung)));
            rungs.push(rung);
        }
        let no_table = match &types {
            Ok(types) => types.no_table(),
            Err(reason) => Some(reason.clone()),
        };
        drop(types);
        sys::trim_memory();
        Ok(Self {
            ring,
            counters,
            taken: 0,
            missed: 0,
            lost_told,
            ring_bytes: options.ring_buffer_bytes,
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

    /// Closes the maps that only loading needs: the programs hold them. After
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

    /// Where each probe ended up, in the order of [`Probe::ALL`].
    pub fn rungs(&self) -> &[Rung] {
        &self.rungs
    }

    /// Readable when the ring fills up (an eighth of it); below that nobody
    /// is woken, so drain on a timer as well.
    pub fn ring_fd(&self) -> BorrowedFd<'_> {
        self.ring.fd()
    }

    /// Hands at most `budget` events on, in the order in which the kernel
    /// reserved them.
    pub fn drain(&mut self, budget: usize, f: impl FnMut(Event)) -> Drained {
        let drained = self.ring.drain(budget, f);
        self.taken += drained.records;
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
        drained
    }

    /// Attempts to reserve a record so far. What a program told before this
    /// call is among them.
    pub fn produced(&mut self) -> u64 {
        self.counters.read().produced
    }

    /// Whether the first `produced` attempts are drained or failed. A drain
    /// ends at a record that another processor is still writing, and leaves
    /// finished ones behind it (`bpf_ringbuf_reserve` orders by reservation).
    pub fn is_through(&mut self, produced: u64) -> bool {
        self.taken >= produced || self.taken + self.counters.read().ring_full >= produced
    }

    /// Totals since attach. Where the kernel refuses the lookup (5.10 without
    /// CAP_BPF) the last known ones stand.
    pub fn counters(&mut self) -> Counters {
        // Before the counters: a run is missed first, and caught then.
        let mut missed: Vec<_> = (self.meters.iter())
            .filter_map(ProgramMeter::missed)
            .collect();
        let totals = self.counters.read();
        if self.lost_told {
            missed.retain(|(probe, _)| *probe != Probe::SetState);
            missed.insert(0, (Probe::SetState, totals.lost));
        }
        for (probe, missed) in &mut missed {
            if *probe == Probe::SetState {
                // Runs that were missed between the two readings and caught
                // would hide older ones for a moment.
                self.missed = self.missed.max(missed.saturating_sub(totals.caught));
                *missed = self.missed;
            }
        }
        Counters {
            produced: totals.produced,
            ring_full: totals.ring_full,
            missed,
        }
    }

    /// The walk over the kernel's table of TCP sockets, once: for
    /// [`crate::reconcile::WalkerOptions`].
    ///
    /// # Errors
    ///
    /// The reason in words.
    pub fn socket_walk(&mut self) -> Result<SocketWalk, String> {
        if let Some(reason) = &self.no_table {
            return Err(reason.clone());
        }
        let map = self.programs.take_map(STRETCH_MAP);
        let Some(Map::Array(map)) = map else {
            return Err(format!("the object has no map {STRETCH_MAP}"));
        };
        let program =
            ladder::socket_walk(&mut self.programs).map_err(|failure| failure.to_string())?;
        let stretch =
            Shared::map(map.fd().as_fd()).map_err(|error| format!("map {STRETCH_MAP}: {error}"))?;
        SocketWalk::new(program, stretch)
    }

    /// Size of the ring in bytes.
    pub fn ring_len(&self) -> u32 {
        self.ring_bytes
    }

    /// Runs and run time of each program; empty unless the kernel keeps them
    /// (`kernel.bpf_stats_enabled`, or [`Tracer::enable_stats`]).
    pub fn program_stats(&self) -> Vec<ProgramStats> {
        let stats: Vec<_> = self.meters.iter().filter_map(ProgramMeter::stats).collect();
        let kept = self.stats.is_some()
            || stats.iter().any(|program| program.runs > 0)
            || self.stats_switch.as_ref().is_some_and(is_on);
        if kept { stats } else { Vec::new() }
    }

    /// Has the kernel time the programs while this tracer lives. Linux 5.8,
    /// CAP_SYS_ADMIN.
    ///
    /// # Errors
    ///
    /// The system call's.
    pub fn enable_stats(&mut self) -> io::Result<()> {
        if self.stats.is_none() {
            self.stats = Some(sys::enable_stats()?);
        }
        Ok(())
    }

    /// Whether closes carry traffic figures.
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

/// Whether a sysctl is 1 now: each read at offset 0 is fresh.
fn is_on(switch: &File) -> bool {
    let mut text = [0; 1];
    switch.read_at(&mut text, 0).is_ok() && text == *b"1"
}

/// CLOCK_MONOTONIC, as `bpf_ktime_get_ns`.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}

/// The rungs when nothing is attached, because of `failures`.
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

/// Major and minor number of the running kernel; (0, 0) when unreadable.
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

//! One rung under test: a tracer, an agent, and what a scenario asks of both.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use connmon_core::event::{Event, Owner};
use connmon_core::probe::{Method, Probe};
use connmon_host::kernel::AttachChoice;
use connmon_host::kernel::{Tracer, TracerOptions};

use crate::accepts::Blocked;
use crate::harness::{Agent, PATIENCE, Scrape};
use crate::lives::{Life, active, lives};
use crate::network::Network;

pub const OPENED: &str = "connmon_port_connections_opened_total";
pub const CLOSED: &str = "connmon_port_connections_closed_total";
/// What a poll cannot know is absent, not zero.
const UNPOLLED: [&str; 12] = [
    FAILURES,
    "connmon_port_connect_failures_total",
    "connmon_connect_latency_seconds_count",
    "connmon_country_connect_latency_seconds_count",
    "connmon_accept_wait_seconds_count",
    "connmon_port_accept_wait_seconds_count",
    "connmon_rtt_seconds_count",
    "connmon_country_rtt_seconds_count",
    "connmon_port_sent_bytes_total",
    "connmon_port_received_bytes_total",
    "connmon_country_sent_bytes_total",
    "connmon_port_retransmitted_segments_total",
];

pub const FAILURES: &str = "connmon_country_connect_failures_total";

/// A way to trace, or to poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rung {
    /// The best that this kernel allows.
    Auto,
    Fentry,
    Kprobe,
    Tracepoint,
    Proc,
}

impl Rung {
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Fentry => "fentry",
            Self::Kprobe => "kprobe",
            Self::Tracepoint => "tracepoint",
            Self::Proc => "proc",
        }
    }

    pub fn from_name(name: &str) -> Option<Self> {
        let all = [
            Self::Auto,
            Self::Fentry,
            Self::Kprobe,
            Self::Tracepoint,
            Self::Proc,
        ];
        all.into_iter().find(|rung| rung.name() == name)
    }

    /// The agent's arguments for it.
    pub fn args(self) -> Vec<&'static str> {
        let mut args = vec!["--filter.loopback", "include"];
        match self {
            Self::Proc => args.extend(["--source", "proc", "--proc.interval", "100ms"]),
            _ => args.extend(["--source", "ebpf", "--ebpf.attach", self.name()]),
        }
        args
    }

    fn attach(self) -> Option<AttachChoice> {
        match self {
            Self::Auto => Some(AttachChoice::Auto),
            Self::Fentry => Some(AttachChoice::Fentry),
            Self::Kprobe => Some(AttachChoice::Kprobe),
            Self::Tracepoint => Some(AttachChoice::Tracepoint),
            Self::Proc => None,
        }
    }

    /// What each probe must be attached by, in guests, whose kernels have
    /// everything.
    pub fn methods(self) -> Option<[&'static str; 3]> {
        match self {
            Self::Auto => None,
            Self::Fentry => Some(["tp_btf", "fentry", "fexit"]),
            Self::Kprobe => Some(["tp_btf", "kprobe", "kretprobe"]),
            Self::Tracepoint => Some(["tracepoint", "none", "none"]),
            Self::Proc => Some(["none", "none", "none"]),
        }
    }
}

/// How a scenario ended, short of a panic.
pub enum Outcome {
    /// Everything asserted holds.
    Held,
    /// This kernel cannot have it.
    NotApplicable(String),
}

/// In a guest every rung must be there.
pub fn in_guest() -> bool {
    std::env::var_os("CONNMON_GUEST").is_some()
}

/// How often a scenario is run at most, see [`World::excuse`].
pub const TRIES: usize = 3;

/// How long to wait for what a run left out by the kernel has lost.
const LOST: Duration = Duration::from_secs(3);

/// A rung, running.
pub struct World<'a> {
    pub rung: Rung,
    pub network: &'a Network,
    pub tracer: Option<Tracer>,
    pub agent: Agent,
    /// Threads in accept() since before anything was attached, for each try.
    pub blocked: Vec<Blocked>,
    events: Vec<Event>,
    base: Option<Scrape>,
    missed: Missed,
    netns: u32,
}

/// Runs of the state program that the kernel left out: of our tracer's, and
/// of the agent's. `None` where it does not count them.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Missed {
    tracer: Option<u64>,
    agent: Option<f64>,
}

/// What the counters of a port must have become: (inbound, outbound).
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub opened: (u32, u32),
    pub closed: (u32, u32),
}

impl Counts {
    /// Opened and closed alike on both sides.
    pub fn both(count: u32) -> Self {
        Self {
            opened: (count, count),
            closed: (count, count),
        }
    }

    /// Which side each is.
    pub fn sides(inbound: u32, outbound: u32) -> Self {
        Self {
            opened: (inbound, outbound),
            closed: (inbound, outbound),
        }
    }
}

impl<'a> World<'a> {
    /// Attaches, and starts an agent.
    pub fn new(rung: Rung, network: &'a Network) -> Result<Self, String> {
        mount_tracefs()?;
        let blocked = (0..TRIES).map(|_| Blocked::new()).collect();
        let netns = std::fs::metadata("/proc/thread-self/ns/net")
            .map_err(|error| error.to_string())?
            .ino();
        let netns = u32::try_from(netns).map_err(|error| error.to_string())?;
        let tracer = match rung.attach() {
            Some(attach) => Some(
                Tracer::attach(&TracerOptions {
                    attach,
                    ring_buffer_bytes: 1 << 20,
                    drop_loopback: false,
                    // What others do meanwhile must not fill our ring.
                    only_netns: Some(netns),
                    owners: true,
                    traffic: true,
                    log_level: log::LevelFilter::Info,
                })
                .map_err(|error| error.to_string())?,
            ),
            None => None,
        };
        let agent = Agent::start(&rung.args());
        let world = Self {
            rung,
            network,
            tracer,
            agent,
            blocked,
            events: Vec::new(),
            base: None,
            missed: Missed {
                tracer: None,
                agent: None,
            },
            netns,
        };
        Ok(world)
    }

    /// Whether events are traced, not polled.
    pub fn traced(&self) -> bool {
        self.tracer.is_some()
    }

    /// Forgets what was; the next asserts are about what comes.
    pub fn begin(&mut self) {
        self.drain();
        self.events.clear();
        let base = self.agent.scrape();
        self.missed = self.missed(&base);
        self.base = Some(base);
    }

    /// The scrape that the scenario began with.
    pub fn base(&self) -> &Scrape {
        self.base.as_ref().expect("begun")
    }

    fn missed(&mut self, scrape: &Scrape) -> Missed {
        let state = Probe::SetState;
        let counters = self.tracer.as_mut().map(Tracer::counters);
        Missed {
            tracer: counters.and_then(|counters| {
                let mut missed = counters.missed.into_iter();
                missed.find_map(|(probe, count)| (probe == state).then_some(count))
            }),
            agent: scrape.get(
                "connmon_probe_missed_runs_total",
                &[("probe", state.label())],
            ),
        }
    }

    /// Why a scenario that failed is to be tried once more: while a BPF
    /// program runs, the kernel leaves out its run for a change of state that
    /// an interrupt brings on the same processor (`bpf_trace_run*` since 6.1,
    /// `trace_call_bpf` ever since). No test can keep it from that, least of
    /// all under software emulation on a busy machine. Where the kernel tells
    /// of it, nothing but its word counts; where it does not, one more try
    /// must do.
    pub fn excuse(&mut self, tries: usize) -> Option<String> {
        let method = self.tracer.as_ref()?.rungs().first()?.method;
        let scrape = self.agent.scrape();
        let (before, now) = (self.missed, self.missed(&scrape));
        if now != before {
            return Some(format!(
                "runs left out by the kernel, {before:?} to {now:?}"
            ));
        }
        (method == Method::Tracepoint && now.tracer.is_none() && tries == 1)
            .then(|| "this kernel does not count missed runs".into())
    }

    /// The agent's own test: nothing lost, nothing out of balance.
    pub fn check_laws(&self) {
        let scrape = self.agent.check_laws();
        assert_eq!(scrape.sum("connmon_events_dropped_total", &[]), 0.0);
    }

    /// Ends the agent, which must exit cleanly.
    pub fn end(self) {
        // Whoever still waits for a connection gets one before the agent ends.
        drop(self.blocked);
        self.agent.stop();
    }

    /// Takes what lies in the ring of our own tracer. Whoever waits does so
    /// all the while: scrapes are connections too, and would fill it.
    pub fn drain(&mut self) {
        drain(&mut self.tracer, &mut self.events);
    }

    /// Reports what a scenario could not judge on this machine, and why.
    pub fn inconclusive(&self, what: &str) {
        println!(
            "inconclusive: {} {}: {what}",
            crate::release(),
            self.rung.name()
        );
    }

    /// When polling, waits until a poll has met this listener.
    pub fn sees_listener(&self, port: u16) {
        if self.traced() {
            return;
        }
        self.agent
            .until(&format!("listener on port {port}"), |scrape| {
                scrape.sum(
                    "connmon_listening_socket_info",
                    &[("port", &port.to_string())],
                ) > 0.0
            });
    }

    /// Waits until the gauges of a port are these, on any rung.
    pub fn gauges(&mut self, port: u16, inbound: u32, outbound: u32) {
        self.until(
            &format!("{inbound} inbound and {outbound} outbound on port {port}"),
            |scrape| {
                scrape.connections(port, "inbound") == f64::from(inbound)
                    && scrape.connections(port, "outbound") == f64::from(outbound)
            },
        );
    }

    /// As [`Agent::until`], and gives up early on what the kernel has left
    /// out.
    pub fn until(&mut self, what: &str, good: impl Fn(&Scrape) -> bool) -> Scrape {
        let started = Instant::now();
        let before = self.missed.agent;
        let state = Probe::SetState.label();
        self.agent.until(what, |scrape| {
            drain(&mut self.tracer, &mut self.events);
            let good = good(scrape);
            let missed = scrape.get("connmon_probe_missed_runs_total", &[("probe", state)]);
            assert!(
                good || missed == before || started.elapsed() < LOST,
                "{what} never came: runs left out, {before:?} to {missed:?}"
            );
            good
        })
    }

    /// Waits for the lives of `count` sockets of a port to end, and checks
    /// what holds of any. Empty when polling.
    pub fn lives(&mut self, port: u16, count: usize) -> Vec<Life> {
        let lives = self.reported_lives(port, count);
        for life in active(&lives) {
            assert!(!life.sent_later, "reported twice: {life:?}");
        }
        lives
    }

    /// As [`World::lives`], where a SYN may have been put off.
    pub fn reported_lives(&mut self, port: u16, count: usize) -> Vec<Life> {
        if self.tracer.is_none() {
            return Vec::new();
        }
        let started = Instant::now();
        let lives = loop {
            self.drain();
            let lives = lives(&self.events, port);
            if lives.len() >= count && lives.iter().all(|life| life.closed) {
                break lives;
            }
            let waited = started.elapsed();
            if waited >= PATIENCE || waited >= LOST && self.tracer_missed() {
                self.never_ended(port, count, &lives);
            }
            sleep(Duration::from_millis(5));
        };
        assert_eq!(lives.len(), count, "lives on port {port}: {lives:#?}");
        for life in &lives {
            assert!(
                life.netns.iter().all(|netns| *netns == self.netns),
                "netns {} expected: {life:?}",
                self.netns
            );
            assert_eq!(life.connected_by.is_some(), life.active, "{life:?}");
            if let Some(owner) = &life.connected_by {
                assert_own(owner);
            }
            if let Some(owner) = &life.accepted_by {
                assert_own(owner);
            }
        }
        lives
    }

    fn tracer_missed(&mut self) -> bool {
        let base = self.base.take().expect("begun");
        let now = self.missed(&base);
        self.base = Some(base);
        now.tracer != self.missed.tracer
    }

    /// Fails with what distinguishes a lost event from a socket that is still open.
    fn never_ended(&mut self, port: u16, count: usize, lives: &[Life]) -> ! {
        let open: Vec<_> = lives.iter().filter(|life| !life.closed).collect();
        let counters = self.tracer.as_mut().map(Tracer::counters);
        let output = Command::new("ss")
            .args(["-Htanoe", &format!("sport = :{port} or dport = :{port}")])
            .output();
        let sockets = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        panic!(
            "{count} lives on port {port} never ended: {} came, {} are open, by {counters:?}; \
             the kernel has {sockets:?}; {open:#?}\n{}",
            lives.len(),
            open.len(),
            crate::harness::interesting(&self.agent.scrape().text)
        );
    }

    /// Waits until the agent's counters for a port have risen by `counts`,
    /// its gauges are 0, and the failures since [`World::begin`] are these
    /// and, in a guest where nobody else connects, no others. A poll sees
    /// what it meets: at most that many, and no failure at all.
    pub fn settled(&mut self, port: u16, counts: Counts, failures: &[(&str, u32)]) -> Scrape {
        let base = self.base().clone();
        let risen = |scrape: &Scrape, family: &str, direction: &str| {
            scrape.port(family, port, direction) - base.port(family, port, direction)
        };
        let now = |scrape: &Scrape| {
            [
                risen(scrape, OPENED, "inbound"),
                risen(scrape, OPENED, "outbound"),
                risen(scrape, CLOSED, "inbound"),
                risen(scrape, CLOSED, "outbound"),
            ]
        };
        let wanted = [
            counts.opened.0,
            counts.opened.1,
            counts.closed.0,
            counts.closed.1,
        ]
        .map(f64::from);
        let traced = self.traced();
        let scrape = self.until(
            &format!("opened in/out, closed in/out {wanted:?} on port {port}"),
            |scrape| {
                let idle = ["inbound", "outbound"]
                    .iter()
                    .all(|direction| scrape.connections(port, direction) == 0.0);
                let now = now(scrape);
                assert!(
                    now.iter().zip(wanted).all(|(now, wanted)| *now <= wanted),
                    "counted {now:?}, expected {wanted:?} on port {port}"
                );
                let failed = failed_all(scrape, &base);
                let alike = match sum(failures) {
                    failures if in_guest() => failed == failures,
                    failures => failed >= failures,
                };
                let [opened_in, opened_out, closed_in, closed_out] = now;
                let reported = if traced {
                    now == wanted && alike
                } else {
                    (opened_in, opened_out) == (closed_in, closed_out)
                };
                idle && reported
            },
        );
        if !traced {
            for family in UNPOLLED {
                assert!(!scrape.has(family), "{family} cannot be known by polling");
            }
            return scrape;
        }
        for (reason, count) in failures {
            let of_reason = |scrape: &Scrape| scrape.sum(FAILURES, &[("reason", reason)]);
            let risen = of_reason(&scrape) - of_reason(&base);
            assert!(
                risen == f64::from(*count) || !in_guest() && risen > f64::from(*count),
                "{risen} failures of reason {reason}, expected {count}"
            );
        }
        scrape
    }

    /// Whether this rung reports accepts.
    pub fn accepts_known(&self) -> bool {
        self.tracer.as_ref().is_some_and(Tracer::accepts_known)
    }
}

fn drain(tracer: &mut Option<Tracer>, events: &mut Vec<Event>) {
    if let Some(tracer) = tracer {
        while !tracer.drain(1000, |event| events.push(event)).empty {}
    }
}

/// It was this process, by its name, in a cgroup.
fn assert_own(owner: &Owner) {
    let name = std::fs::read("/proc/self/comm").unwrap();
    let name = name.trim_ascii_end();
    let (said, rest) = owner.comm.split_at(name.len());
    assert!(
        owner.pid == std::process::id() && said == name && rest.iter().all(|byte| *byte == 0),
        "not {}: {owner:?}",
        String::from_utf8_lossy(name)
    );
    assert_ne!(owner.cgroup, 0, "{owner:?}");
}

fn failed_all(scrape: &Scrape, base: &Scrape) -> f64 {
    scrape.sum(FAILURES, &[]) - base.sum(FAILURES, &[])
}

fn sum(failures: &[(&str, u32)]) -> f64 {
    failures.iter().map(|(_, count)| f64::from(*count)).sum()
}

/// The tracepoint rung needs it.
fn mount_tracefs() -> Result<(), String> {
    let path = "/sys/kernel/tracing";
    if Path::new(path).join("events").exists() {
        return Ok(());
    }
    let status = Command::new("mount")
        .args(["-t", "tracefs", "tracefs", path])
        .status()
        .map_err(|error| format!("mount: {error}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(format!("tracefs cannot be mounted: {status}"))
    }
}

//! `connmon trace`: connection events as they happen.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use connmon_core::fold::{Direction, country_of};
use connmon_core::geo::Country;
use connmon_core::probe::Method;
use connmon_core::text::process_name;
use connmon_host::kernel::{Tracer, monotonic_ns};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cli::{EventKind, Output, TraceArgs};
use crate::config::{Config, SourceChoice};

use super::connection::{ConnectionRecord, heading, is_named, service_port};
use super::containers::Containers;
use super::follow::{Follower, Happening, Occurrence};
use super::snapshot::Reader;
use super::time::Clock;

/// Events wait in the ring for this at most.
const TICK: Duration = Duration::from_millis(50);

/// Events taken before anything is printed.
const DRAIN_BUDGET: usize = 4096;

/// What lies in the ring when the end comes still belongs to the trace, as
/// far as this suffices: under load the ring never runs empty.
const LAST_DRAIN: Duration = Duration::from_secs(1);

/// Runs the command.
///
/// # Errors
/// When events cannot be traced or the output cannot be written; a
/// [`ConfigError`](crate::config::ConfigError) with `--source proc`.
pub fn run(config: &Config, args: &TraceArgs) -> anyhow::Result<()> {
    if config.source == SourceChoice::Proc {
        let problem = "bad value \"proc\": trace needs eBPF; leave it out, or use `connmon list`";
        return Err(config.refused("source", problem).into());
    }
    let stop = super::stop::on_signals()?;
    let mut tracer = Tracer::attach(&super::tracer_options(config)?).context("cannot trace")?;
    let mut reader = Reader::new(config)?;
    let mut follower = Follower::default();
    // What exists already: so that its close has a direction and an owner.
    let tables = reader.read()?;
    follower.listeners(&tables.listening);
    for live in &tables.connections {
        follower.seed(live.netns, &live.row, live.direction);
    }
    let mut printer = Printer {
        args,
        out: std::io::BufWriter::new(std::io::stdout().lock()),
        containers: Containers::default(),
        printed: 0,
    };
    if args.output == Output::Table {
        writeln!(printer.out, "{}", heading())?;
        printer.out.flush()?;
    }
    let attached = tracer.rungs().iter().map(|rung| rung.method);
    let methods: Vec<&str> = attached
        .filter(|&method| method != Method::None)
        .map(Method::label)
        .collect();
    // To stderr: not among the events, even where both are shown.
    let _ = writeln!(
        std::io::stderr(),
        "tracing by {}; Ctrl-C ends it",
        methods.join(", ")
    );
    let until = args.duration.map(|duration| Instant::now() + duration);
    let mut occurrences: Vec<Occurrence> = Vec::new();
    let mut undecodable = 0;
    let mut last: Option<Instant> = None;
    let mut over = || {
        let now = Instant::now();
        if stop.requested() || until.is_some_and(|until| now >= until) {
            last.get_or_insert(now + LAST_DRAIN);
        }
        (last.is_some(), last.is_some_and(|last| now >= last))
    };
    loop {
        let (ending, _) = over();
        let drained = tracer.drain(DRAIN_BUDGET, |event| {
            if let Some(occurrence) = follower.apply(&event)
                && reader.filter().hides(&occurrence.tuple).is_none()
            {
                occurrences.push(occurrence);
            }
        });
        undecodable += drained.undecodable;
        let now_ns = monotonic_ns();
        for occurrence in occurrences.drain(..) {
            let country = country_of(&occurrence.tuple, reader.locator());
            printer.print(now_ns, &occurrence, country)?;
            if printer.full() || over().1 {
                break;
            }
        }
        printer.out.flush()?;
        if printer.full() || over().1 || (ending && drained.empty) {
            break;
        }
        if drained.empty {
            let timeout = Timespec::try_from(TICK).context("tick")?;
            let ring = tracer.ring_fd();
            let mut waited = [PollFd::from_borrowed_fd(ring.as_fd(), PollFlags::IN)];
            // Interrupted by the signal that ends us, or by nothing of note.
            let _ = poll(&mut waited, Some(&timeout));
        }
    }
    let counters = tracer.counters();
    let missed: u64 = counters.missed.iter().map(|(_, runs)| runs).sum();
    let _ = writeln!(
        std::io::stderr(),
        "{} events printed, {} lost (ring full {}, undecodable {undecodable}), {missed} program runs missed",
        printer.printed,
        counters.ring_full + undecodable,
        counters.ring_full,
    );
    Ok(())
}

struct Printer<'a, W: Write> {
    args: &'a TraceArgs,
    out: W,
    containers: Containers,
    printed: u64,
}

impl<W: Write> Printer<'_, W> {
    /// Whether `--count` is reached.
    fn full(&self) -> bool {
        self.args.count.is_some_and(|count| self.printed >= count)
    }

    /// Prints what the filters let through.
    fn print(
        &mut self,
        now_ns: u64,
        occurrence: &Occurrence,
        country: Country,
    ) -> anyhow::Result<()> {
        if !wanted(self.args, occurrence, country) {
            return Ok(());
        }
        let clock = Clock::of(occurrence.at_ns, now_ns);
        let record = self.record(clock, occurrence, country.code());
        match self.args.output {
            Output::Table => writeln!(self.out, "{}", record.line(&clock.time_of_day()))?,
            Output::Json => writeln!(self.out, "{}", serde_json::to_string(&record)?)?,
        }
        self.printed += 1;
        Ok(())
    }

    fn record(
        &mut self,
        clock: Clock,
        occurrence: &Occurrence,
        country: &'static str,
    ) -> ConnectionRecord {
        let (event, reason) = match occurrence.happening {
            Happening::Open => ("open", None),
            Happening::Close => ("close", None),
            Happening::Fail(reason) => ("fail", Some(reason.label())),
        };
        let owner = &occurrence.owner;
        ConnectionRecord {
            time: clock.rfc3339(),
            event,
            direction: occurrence.direction.label(),
            process: process_name(&owner.comm),
            pid: (owner.pid != 0).then_some(owner.pid),
            container: self.containers.of(owner),
            netns: occurrence.netns,
            local: occurrence.tuple.local_endpoint(),
            remote: occurrence.tuple.remote_endpoint(),
            country,
            port: service_port(occurrence.direction, &occurrence.tuple),
            state: None,
            duration_seconds: occurrence.duration_ns.map(|ns| ns as f64 / 1e9),
            received_bytes: occurrence.traffic.map(|traffic| traffic.received_bytes),
            sent_bytes: occurrence
                .traffic
                .map(|traffic| traffic.sent_payload(occurrence.direction == Direction::Outbound)),
            reason,
        }
    }
}

/// Whether the command's filters let it through. Before anything is made of
/// it: most of a busy machine's events are not asked for.
fn wanted(args: &TraceArgs, occurrence: &Occurrence, country: Country) -> bool {
    fn any<T>(asked: &[T], found: impl FnMut(&T) -> bool) -> bool {
        asked.is_empty() || asked.iter().any(found)
    }
    let kind = match occurrence.happening {
        Happening::Open => EventKind::Open,
        Happening::Close => EventKind::Close,
        Happening::Fail(_) => EventKind::Fail,
    };
    let owner = &occurrence.owner;
    any(&args.event, |&asked| asked == kind)
        && args
            .direction
            .is_none_or(|asked| asked == occurrence.direction)
        && any(&args.country, |&asked| asked == country)
        && any(&args.port, |&asked| {
            service_port(occurrence.direction, &occurrence.tuple) == Some(asked)
        })
        && any(&args.pid, |&asked| asked == owner.pid)
        && any(&args.process, |asked| is_named(&owner.comm, asked))
}

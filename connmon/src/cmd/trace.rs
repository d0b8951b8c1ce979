//! `connmon trace`: connection events as they happen.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use connmon_core::fold::country_of;
use connmon_core::geo::Country;
use connmon_core::probe::Method;
use connmon_host::kernel::{Tracer, monotonic_ns};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cli::{EventKind, TraceArgs};
use crate::config::{Config, SourceChoice};

use super::connection::{Printer, is_named, wall_clock};
use super::follow::{Follower, Happening, Occurrence};
use super::snapshot::Reader;
use super::stop::Stop;

/// Longest time that an event waits in the ring buffer.
const TICK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// Most events taken before anything is printed.
const DRAIN_BUDGET: usize = 4096;

/// How long events that are in the ring buffer at the end are still printed:
/// under load it never runs empty.
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
    follower.start(&reader.read()?);
    let out = std::io::BufWriter::new(std::io::stdout().lock());
    let mut printer = Printer::new(out, args.output)?;
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
    let mut end = End::new(args, stop);
    let mut undecodable = 0;
    let mut occurrences: Vec<Occurrence> = Vec::new();
    loop {
        let ending = end.has_begun();
        let drained = tracer.drain(DRAIN_BUDGET, |event| {
            let occurrence = follower.apply(&event);
            occurrences.extend(
                occurrence.filter(|it| reader.filter.hides(&it.connection.tuple).is_none()),
            );
        });
        undecodable += drained.undecodable;
        let now_ns = monotonic_ns();
        for occurrence in occurrences.drain(..) {
            let country = country_of(&occurrence.connection.tuple, &mut reader.locator);
            if is_wanted(args, &occurrence, country) {
                printer.print(wall_clock(occurrence.at_ns, now_ns), &occurrence, country)?;
                end.printed += 1;
            }
            if end.is_reached() {
                break;
            }
        }
        printer.flush()?;
        if end.is_reached() || (ending && drained.empty) {
            break;
        }
        if drained.empty {
            let ring = tracer.ring_fd();
            let mut waited = [PollFd::from_borrowed_fd(ring.as_fd(), PollFlags::IN)];
            // A signal that ends the wait is seen at the next turn.
            let _ = poll(&mut waited, Some(&TICK));
        }
    }
    let counters = tracer.counters();
    let missed: u64 = counters.missed.iter().map(|(_, runs)| runs).sum();
    let _ = writeln!(
        std::io::stderr(),
        "{} events printed, {} lost (ring full {}, undecodable {undecodable}), {missed} program runs missed",
        end.printed,
        counters.ring_full + undecodable,
        counters.ring_full,
    );
    Ok(())
}

/// When the trace ends: by a signal, `--duration` or `--count`.
struct End {
    stop: Stop,
    until: Option<Instant>,
    count: Option<u64>,
    printed: u64,
    /// Until when the rest of the ring buffer is printed, once it has begun.
    last: Option<Instant>,
}

impl End {
    fn new(args: &TraceArgs, stop: Stop) -> Self {
        Self {
            stop,
            until: args.duration.map(|duration| Instant::now() + duration),
            count: args.count,
            printed: 0,
            last: None,
        }
    }

    /// Whether only what is in the ring buffer now is still to be printed.
    fn has_begun(&mut self) -> bool {
        let now = Instant::now();
        if self.stop.requested() || self.until.is_some_and(|until| now >= until) {
            self.last.get_or_insert(now + LAST_DRAIN);
        }
        self.last.is_some()
    }

    fn is_reached(&mut self) -> bool {
        self.count.is_some_and(|count| self.printed >= count)
            || self.has_begun() && self.last.is_some_and(|last| Instant::now() >= last)
    }
}

/// Whether the command's filters let it through. Checked before a line is
/// made: most events of a busy machine are not wanted.
fn is_wanted(args: &TraceArgs, occurrence: &Occurrence, country: Country) -> bool {
    fn any<T>(wanted: &[T], found: impl FnMut(&T) -> bool) -> bool {
        wanted.is_empty() || wanted.iter().any(found)
    }
    let kind = match occurrence.happening {
        Happening::Live(_) | Happening::Open => EventKind::Open,
        Happening::Close => EventKind::Close,
        Happening::Fail(_) => EventKind::Fail,
    };
    let connection = &occurrence.connection;
    let (port, owner) = (connection.service_port(), &connection.owner);
    any(&args.event, |&wanted| wanted == kind)
        && args
            .direction
            .is_none_or(|wanted| wanted == connection.direction)
        && any(&args.country, |&wanted| wanted == country)
        && any(&args.port, |&wanted| Some(wanted) == port)
        && any(&args.pid, |&wanted| wanted == owner.pid)
        && any(&args.process, |wanted| is_named(&owner.comm, wanted))
}

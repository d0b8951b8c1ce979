//! `connmon top`: a refreshing view by country, port and process.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use connmon_core::fold::{Direction, Filter, PortLabel, country_of};
use connmon_core::geo::Locator;
use connmon_core::text::process_name;
use connmon_host::kernel::{Tracer, monotonic_ns};

use crate::config::{Config, SourceChoice};

use super::columns::{self, Column, left, right};
use super::connection::{bytes, service_port};
use super::follow::{Follower, Happening, Occurrence};
use super::samples::Samples;
use super::snapshot::{Live, Reader, Tables};
use super::terminal::{self, Key, Keyboard, Screen};

/// How often the tables are read and the screen is drawn.
const REFRESH: Duration = Duration::from_secs(2);

/// One part in so many of the time goes into reading the tables at most: a
/// million connections take longer than [`REFRESH`].
const READING_SHARE: u32 = 5;

/// Between two looks at the ring and at the window's size.
const TICK: Duration = Duration::from_millis(100);

/// Events taken between two looks at the keyboard.
const DRAIN_BUDGET: usize = 16_384;

/// How long a reading waits for the ring to be empty: under load it never is.
const LATEST: Duration = Duration::from_secs(2);

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    Country,
    Port,
    Process,
}

impl View {
    const ALL: [Self; 3] = [Self::Country, Self::Port, Self::Process];

    fn name(self) -> &'static str {
        match self {
            Self::Country => "COUNTRY",
            Self::Port => "PORT",
            Self::Process => "PROCESS",
        }
    }

    fn next(self) -> Self {
        match self {
            Self::Country => Self::Port,
            Self::Port => Self::Process,
            Self::Process => Self::Country,
        }
    }
}

/// What is known of one line.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Tally {
    inbound: u64,
    outbound: u64,
    unknown: u64,
    opened: u64,
    closed: u64,
    failed: u64,
    received: u64,
    sent: u64,
}

impl Tally {
    fn now(&self) -> u64 {
        self.inbound + self.outbound + self.unknown
    }
}

/// The lines of every view, between two refreshes.
#[derive(Debug, Default)]
struct Tallies([HashMap<String, Tally>; 3]);

impl Tallies {
    fn add(&mut self, keys: &[String; 3], change: impl Fn(&mut Tally)) {
        for (lines, key) in self.0.iter_mut().zip(keys) {
            change(lines.entry(key.clone()).or_default());
        }
    }
}

fn keys(country: &str, port: Option<u16>, direction: Direction, process: &[u8; 16]) -> [String; 3] {
    let port = port.map_or(PortLabel::Other, PortLabel::Port);
    let arrow = match direction {
        Direction::Inbound => "in",
        Direction::Outbound => "out",
        Direction::Unknown => "?",
    };
    [
        country.to_owned(),
        format!("{port} {arrow}"),
        process_name(process).unwrap_or_else(|| "unknown".to_owned()),
    ]
}

/// Runs the command; `plain` for a terminal without escape sequences.
///
/// # Errors
/// Without a terminal, or when connections cannot be read.
pub fn run(config: &Config, plain: bool) -> anyhow::Result<()> {
    anyhow::ensure!(
        std::io::stdout().is_terminal(),
        "top needs a terminal; `connmon list --by country` prints one snapshot"
    );
    let stop = super::stop::on_signals()?;
    let keyboard = Keyboard::open().context("cannot read the keyboard")?;
    let mut top = Top::new(config)?;
    let mut screen = Screen::enter(plain)?;
    let mut view = View::Country;
    let mut size = terminal::size();
    screen.show(&top.lines(view, size), size)?;
    while !stop.requested() {
        let (mut changed, idle) = top.advance()?;
        let wait = if idle { TICK } else { Duration::ZERO };
        for key in keyboard.keys(wait).context("cannot read the keyboard")? {
            match key {
                Key::End | Key::Char('q') => return Ok(()),
                Key::Suspend => screen.suspend(&stop)?,
                Key::Char('c') => view = View::Country,
                Key::Char('p') => view = View::Port,
                Key::Char('r') => view = View::Process,
                Key::Tab | Key::Char(' ') => view = view.next(),
                Key::Char(_) => continue,
            }
            changed = true;
        }
        changed |= screen.was_continued(&stop)?;
        let now = terminal::size();
        changed |= now != size;
        size = now;
        if changed && !stop.requested() {
            screen.show(&top.lines(view, size), size)?;
        }
    }
    Ok(())
}

/// Reads the tables on a thread of its own: keys do not wait for them.
struct Readings {
    ask: SyncSender<()>,
    read: Receiver<anyhow::Result<Tables>>,
}

impl Readings {
    fn start(mut reader: Reader) -> anyhow::Result<Self> {
        let (ask, asked) = sync_channel(1);
        let (send, read) = sync_channel(1);
        std::thread::Builder::new()
            .name("connmon-tables".into())
            .spawn(move || {
                while asked.recv().is_ok() {
                    if send.send(reader.read()).is_err() {
                        return;
                    }
                }
            })
            .context("cannot start the thread that reads the tables")?;
        Ok(Self { ask, read })
    }
}

/// A reading of the tables under way.
#[derive(Clone, Copy)]
struct Started {
    at: Instant,
    at_ns: u64,
}

impl Started {
    fn now() -> Self {
        Self {
            at: Instant::now(),
            at_ns: monotonic_ns(),
        }
    }
}

struct Top {
    readings: Readings,
    locator: Locator,
    filter: Filter,
    tracer: Option<Tracer>,
    source: String,
    follower: Follower,
    /// Events since the last reading.
    events: Tallies,
    /// What the screen shows, and over how many seconds.
    shown: Tallies,
    seconds: f64,
    samples: Samples,
    under_way: Option<Started>,
    /// The last one, once there was one.
    last: Option<Started>,
    attached: Instant,
    due: Instant,
    totals: (usize, usize),
    lost: u64,
}

impl Top {
    fn new(config: &Config) -> anyhow::Result<Self> {
        let (tracer, source) = if config.source == SourceChoice::Proc {
            (None, "polling".to_owned())
        } else {
            match Tracer::attach(&super::tracer_options(config)?) {
                Ok(tracer) => (Some(tracer), "eBPF".to_owned()),
                Err(error) if config.source == SourceChoice::Auto => {
                    (None, format!("polling, no opens or failures: {error}"))
                }
                Err(error) => return Err(anyhow::Error::new(error).context("--source ebpf")),
            }
        };
        let reader = Reader::new(config)?;
        Ok(Self {
            locator: Locator::new(reader.database()),
            filter: Filter::new(&config.remote_filter()),
            readings: Readings::start(reader)?,
            tracer,
            source,
            follower: Follower::default(),
            events: Tallies::default(),
            shown: Tallies::default(),
            seconds: 1.0,
            samples: Samples::default(),
            under_way: None,
            last: None,
            attached: Instant::now(),
            due: Instant::now(),
            totals: (0, 0),
            lost: 0,
        })
    }

    /// Goes on with what is due. Whether there is something new to show, and
    /// whether there is nothing to do until the next tick.
    ///
    /// Either the ring is drained or the tables are read: what closes while
    /// they are is then told by an event after its row.
    fn advance(&mut self) -> anyhow::Result<(bool, bool)> {
        let Some(started) = self.under_way else {
            let empty = self.drain();
            let now = Instant::now();
            if now >= self.due && (empty || now >= self.due + LATEST) {
                self.under_way = Some(Started::now());
                // Room for one, and one is asked for at a time.
                let _ = self.readings.ask.try_send(());
            }
            return Ok((false, empty));
        };
        match self.readings.read.try_recv() {
            Ok(tables) => {
                self.take(&tables?, started);
                self.under_way = None;
                self.due = started.at + REFRESH.max(started.at.elapsed() * READING_SHARE);
                Ok((true, false))
            }
            Err(TryRecvError::Empty) => Ok((false, true)),
            Err(TryRecvError::Disconnected) => {
                anyhow::bail!("the thread that reads tables is gone")
            }
        }
    }

    /// Whether the ring is empty now.
    fn drain(&mut self) -> bool {
        let Some(tracer) = &mut self.tracer else {
            return true;
        };
        let mut occurrences: Vec<Occurrence> = Vec::new();
        let (follower, filter) = (&mut self.follower, &self.filter);
        let drained = tracer.drain(DRAIN_BUDGET, |event| {
            if let Some(occurrence) = follower.apply(&event)
                && filter.hides(&occurrence.tuple).is_none()
            {
                occurrences.push(occurrence);
            }
        });
        for occurrence in occurrences {
            self.count(&occurrence);
        }
        drained.empty
    }

    fn count(&mut self, occurrence: &Occurrence) {
        let country = country_of(&occurrence.tuple, &mut self.locator);
        let port = service_port(occurrence.direction, &occurrence.tuple);
        let keys = keys(
            country.code(),
            port,
            occurrence.direction,
            &occurrence.owner.comm,
        );
        let (received, sent) = match (occurrence.traffic, self.last) {
            (Some(traffic), Some(last)) => {
                let opened = occurrence
                    .duration_ns
                    .map(|age| occurrence.at_ns.saturating_sub(age));
                self.samples.close(
                    occurrence.cookie,
                    (
                        traffic.received_bytes,
                        traffic.sent_payload(occurrence.direction == Direction::Outbound),
                    ),
                    opened.is_some_and(|opened| opened >= last.at_ns),
                )
            }
            _ => (0, 0),
        };
        self.events.add(&keys, |tally| {
            match occurrence.happening {
                Happening::Open => tally.opened += 1,
                Happening::Close => tally.closed += 1,
                Happening::Fail(_) => tally.failed += 1,
            }
            tally.received += received;
            tally.sent += sent;
        });
    }

    fn take(&mut self, tables: &Tables, started: Started) {
        let mut shown = std::mem::take(&mut self.events);
        for live in &tables.connections {
            self.live(live, &mut shown);
        }
        self.samples.turn();
        if self.last.is_none() {
            self.learn(tables);
        }
        let since = self.last.map_or(self.attached, |last| last.at);
        self.seconds = (started.at - since).as_secs_f64().max(0.001);
        self.last = Some(started);
        self.shown = shown;
        self.totals = (tables.connections.len(), tables.hidden);
        if let Some(tracer) = &mut self.tracer {
            self.lost = tracer.counters().ring_full;
        }
    }

    fn live(&mut self, live: &Live, shown: &mut Tallies) {
        let port = service_port(live.direction, &live.row.tuple);
        let keys = keys(
            live.country.code(),
            port,
            live.direction,
            &live.row.owner.comm,
        );
        let traffic = live.row.traffic.unwrap_or_default();
        let active = live.direction == Direction::Outbound;
        let total = (traffic.received_bytes, traffic.sent_payload(active));
        let (received, sent) = self.samples.row(live.row.cookie, total);
        let established = live.row.state == connmon_common::state::ESTABLISHED;
        shown.add(&keys, |tally| {
            if established {
                match live.direction {
                    Direction::Inbound => tally.inbound += 1,
                    Direction::Outbound => tally.outbound += 1,
                    Direction::Unknown => tally.unknown += 1,
                }
            }
            tally.received += received;
            tally.sent += sent;
        });
    }

    /// What existed before: so that its close has a direction and an owner.
    fn learn(&mut self, tables: &Tables) {
        self.follower.listeners(&tables.listening);
        for live in &tables.connections {
            self.follower.seed(live.netns, &live.row, live.direction);
        }
    }

    fn lines(&self, view: View, (_, rows): (u16, u16)) -> Vec<String> {
        let (connections, hidden) = self.totals;
        let title = match self.last {
            Some(_) => format!(
                "connmon top: {connections} connections, {hidden} hidden, by {}",
                self.source
            ),
            None => "connmon top: reading the tables".to_owned(),
        };
        let lost = match self.lost {
            0 => String::new(),
            lost => format!("   {lost} events lost"),
        };
        let keys = format!("c country  p port  r process  Tab next  q quit{lost}");
        let mut lines = head(title, keys, view, rows);
        let room = usize::from(rows).saturating_sub(lines.len());
        let index = View::ALL
            .iter()
            .position(|&other| other == view)
            .unwrap_or(0);
        let mut tallies: Vec<(&String, &Tally)> = self.shown.0[index].iter().collect();
        tallies.sort_by(|(a_key, a), (b_key, b)| {
            (b.now(), b.opened, *a_key).cmp(&(a.now(), a.opened, *b_key))
        });
        let shown = tallies.into_iter().take(room);
        lines.extend(shown.map(|(key, tally)| self.line(view, key, tally)));
        lines
    }

    fn line(&self, view: View, key: &str, tally: &Tally) -> String {
        let rate = |count: u64| count as f64 / self.seconds;
        let events = |count: u64| match self.tracer {
            Some(_) => format!("{:.1}", rate(count)),
            None => "-".to_owned(),
        };
        let cells: [String; 9] = [
            key.to_owned(),
            tally.now().to_string(),
            tally.inbound.to_string(),
            tally.outbound.to_string(),
            events(tally.opened),
            events(tally.closed),
            events(tally.failed),
            bytes(rate(tally.received) as u64),
            bytes(rate(tally.sent) as u64),
        ];
        columns::row(&table(view), cells)
    }
}

fn table(view: View) -> [Column; 9] {
    [
        left(view.name(), 16),
        right("NOW", 7),
        right("INBOUND", 7),
        right("OUTBOUND", 8),
        right("OPEN/s", 8),
        right("CLOSE/s", 8),
        right("FAIL/s", 8),
        right("RECV/s", 9),
        right("SENT/s", 9),
    ]
}

/// Rows below which the keys give way to a line of the table.
const ROWS_FOR_KEYS: u16 = 6;

/// What stands above the table's lines, at most so many rows of it.
fn head(title: String, keys: String, view: View, rows: u16) -> Vec<String> {
    let mut lines = vec![title];
    if rows >= ROWS_FOR_KEYS {
        lines.extend([keys, String::new()]);
    }
    lines.push(columns::heading(&table(view)));
    lines.truncate(rows.into());
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_window_has_room_for_what_counts() {
        for (rows, lines) in [(1, 1), (2, 2), (3, 2), (5, 2), (6, 4), (24, 4)] {
            let head = head("title".into(), "keys".into(), View::Port, rows);
            assert_eq!(head.len(), lines, "{rows}");
            assert_eq!(head[0], "title");
        }
    }
}

//! `connmon top`: a refreshing view by country, port and process.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use connmon_core::fold::{Direction, Filter, country_of};
use connmon_core::geo::{Country, Locator};
use connmon_host::kernel::{Tracer, monotonic_ns};

use crate::config::{Config, SourceChoice};

use super::columns::{self, Column, left, right};
use super::connection::{Connection, bytes};
use super::follow::{Follower, Happening, Occurrence};
use super::samples::Samples;
use super::snapshot::{Live, Reader, Tables};
use super::terminal::{self, CTRL_C, CTRL_Z, ESCAPE, Keyboard, Screen};

/// How often the tables are read and the screen is drawn.
const REFRESH_NS: u64 = 2_000_000_000;

/// At most one part in so many of the time goes into reading the tables: a
/// million connections take longer than [`REFRESH_NS`].
const READING_SHARE: u64 = 5;

/// Between two looks at the ring buffer and at the window's size.
const TICK: Duration = Duration::from_millis(100);

/// Most events taken between two looks at the keyboard.
const DRAIN_BUDGET: usize = 16_384;

/// How long a reading waits for the ring buffer to be empty: under load it
/// never is.
const LATEST_NS: u64 = 2_000_000_000;

/// What a line is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum View {
    Country,
    Port,
    Process,
}

impl View {
    fn name(self) -> &'static str {
        ["COUNTRY", "PORT", "PROCESS"][self as usize]
    }

    fn next(self) -> Self {
        [Self::Port, Self::Process, Self::Country][self as usize]
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

/// The lines of every [`View`], between two refreshes.
#[derive(Debug, Default)]
struct Tallies([HashMap<String, Tally>; 3]);

impl Tallies {
    fn add(&mut self, connection: &Connection, country: Country, change: impl Fn(&mut Tally)) {
        let arrow = match connection.direction {
            Direction::Inbound => "in",
            Direction::Outbound => "out",
            Direction::Unknown => "?",
        };
        let keys = [
            country.code().to_owned(),
            format!("{} {arrow}", connection.port_name()),
            connection.process_name(),
        ];
        for (lines, key) in self.0.iter_mut().zip(keys) {
            change(lines.entry(key).or_default());
        }
    }
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
                CTRL_C | ESCAPE | b'q' => return Ok(()),
                CTRL_Z => screen.suspend(&stop)?,
                b'c' => view = View::Country,
                b'p' => view = View::Port,
                b'r' => view = View::Process,
                b'\t' | b' ' => view = view.next(),
                _ => continue,
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

/// A thread that reads the tables and returns the reader with them.
type Reading = JoinHandle<(Reader, anyhow::Result<Tables>)>;

struct Top {
    /// Away while it reads.
    reader: Option<Reader>,
    /// The reading that runs, since when (`CLOCK_MONOTONIC`, as all times
    /// here). It has a thread of its own: keys do not wait for it.
    reading: Option<(u64, Reading)>,
    /// When the next one begins.
    due_ns: u64,
    /// When the last one began.
    last_ns: Option<u64>,
    attached_ns: u64,
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
    /// Connections shown and hidden.
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
        let now_ns = monotonic_ns();
        Ok(Self {
            locator: Locator::new(Arc::clone(reader.locator.database())),
            reader: Some(reader),
            reading: None,
            due_ns: now_ns,
            last_ns: None,
            attached_ns: now_ns,
            filter: Filter::new(&config.remote_filter()),
            tracer,
            source,
            follower: Follower::default(),
            events: Tallies::default(),
            shown: Tallies::default(),
            seconds: 1.0,
            samples: Samples::default(),
            totals: (0, 0),
            lost: 0,
        })
    }

    /// Drains the ring buffer, or waits for the tables. Returns whether there
    /// is something new to show, and whether there is nothing to do until the
    /// next tick.
    ///
    /// Never both at once: so the event of a connection that closes during a
    /// reading comes after its row.
    fn advance(&mut self) -> anyhow::Result<(bool, bool)> {
        if let Some(mut reader) = self.reader.take() {
            let empty = self.drain();
            let now_ns = monotonic_ns();
            if now_ns < self.due_ns || !empty && now_ns < self.due_ns + LATEST_NS {
                self.reader = Some(reader);
                return Ok((false, empty));
            }
            let thread = std::thread::Builder::new().name("connmon-tables".into());
            let read = move || {
                let tables = reader.read();
                (reader, tables)
            };
            let reading = thread
                .spawn(read)
                .context("cannot start the thread that reads the socket tables")?;
            self.reading = Some((now_ns, reading));
        }
        let Some((started_ns, reading)) =
            self.reading.take_if(|(_, reading)| reading.is_finished())
        else {
            return Ok((false, true));
        };
        let ended = reading.join();
        let (reader, tables) =
            ended.map_err(|_| anyhow::anyhow!("bug: reading the socket tables panicked"))?;
        self.reader = Some(reader);
        self.take(&tables?, started_ns);
        let took_ns = monotonic_ns() - started_ns;
        self.due_ns = started_ns + REFRESH_NS.max(took_ns * READING_SHARE);
        Ok((true, false))
    }

    /// Whether the ring buffer is empty now.
    fn drain(&mut self) -> bool {
        let Some(tracer) = &mut self.tracer else {
            return true;
        };
        let mut occurrences: Vec<Occurrence> = Vec::new();
        let drained = tracer.drain(DRAIN_BUDGET, |event| {
            let occurrence = self.follower.apply(&event);
            occurrences
                .extend(occurrence.filter(|it| self.filter.hides(&it.connection.tuple).is_none()));
        });
        for occurrence in occurrences {
            self.count(&occurrence);
        }
        drained.empty
    }

    fn count(&mut self, occurrence: &Occurrence) {
        let connection = &occurrence.connection;
        let country = country_of(&connection.tuple, &mut self.locator);
        let (received, sent) = match (occurrence.traffic, self.last_ns) {
            (Some(traffic), Some(last_ns)) => {
                let age_ns = occurrence.duration_ns;
                let opened_ns = age_ns.map(|age_ns| occurrence.at_ns.saturating_sub(age_ns));
                let is_new = opened_ns.is_some_and(|opened_ns| opened_ns >= last_ns);
                self.samples
                    .close(connection.cookie, connection.bytes(traffic), is_new)
            }
            _ => (0, 0),
        };
        self.events.add(connection, country, |tally| {
            match occurrence.happening {
                Happening::Live(_) => {}
                Happening::Open => tally.opened += 1,
                Happening::Close => tally.closed += 1,
                Happening::Fail(_) => tally.failed += 1,
            }
            tally.received += received;
            tally.sent += sent;
        });
    }

    fn take(&mut self, tables: &Tables, started_ns: u64) {
        self.shown = std::mem::take(&mut self.events);
        for live in &tables.connections {
            self.live(live);
        }
        self.samples.turn();
        if self.last_ns.is_none() {
            self.follower.start(tables);
        }
        let since_ns = self.last_ns.unwrap_or(self.attached_ns);
        self.seconds = (started_ns.saturating_sub(since_ns) as f64 / 1e9).max(0.001);
        self.last_ns = Some(started_ns);
        self.totals = (tables.connections.len(), tables.hidden);
        if let Some(tracer) = &mut self.tracer {
            self.lost = tracer.counters().ring_full;
        }
    }

    fn live(&mut self, live: &Live) {
        let connection = &live.connection;
        let total = connection.bytes(live.traffic.unwrap_or_default());
        let (received, sent) = self.samples.row(connection.cookie, total);
        self.shown.add(connection, live.country, |tally| {
            if live.state == connmon_common::state::ESTABLISHED {
                match connection.direction {
                    Direction::Inbound => tally.inbound += 1,
                    Direction::Outbound => tally.outbound += 1,
                    Direction::Unknown => tally.unknown += 1,
                }
            }
            tally.received += received;
            tally.sent += sent;
        });
    }

    fn lines(&self, view: View, (_, rows): (u16, u16)) -> Vec<String> {
        let (connections, hidden) = self.totals;
        let title = match self.last_ns {
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
        let left = usize::from(rows).saturating_sub(lines.len());
        let mut tallies: Vec<(&String, &Tally)> = self.shown.0[view as usize].iter().collect();
        tallies.sort_by(|(a_key, a), (b_key, b)| {
            (b.now(), b.opened, *a_key).cmp(&(a.now(), a.opened, *b_key))
        });
        let shown = tallies.into_iter().take(left);
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

//! One line about one connection: what `trace` and `list` print, as an
//! aligned table or as JSON, from the same struct.

use std::io::Write;
use std::time::Duration;

use connmon_common::state;
use connmon_core::event::{Cookie, NetnsId, Owner, Socket, Traffic, Tuple};
use connmon_core::fold::{Direction, PortLabel};
use connmon_core::geo::Country;
use connmon_core::text::{comm_bytes, process_name};
use jiff::{Timestamp, tz::TimeZone};
use serde::{Serialize, Serializer};
use serde_json::Value;

use super::columns::{self, Column, left};
use super::containers::Containers;
use super::follow::{Happening, Occurrence};
use crate::cli::Output;

/// A connection and its owner.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Connection {
    /// Socket cookie, or 0.
    pub cookie: Cookie,
    /// Namespace inode, or 0.
    pub netns: NetnsId,
    /// Endpoints.
    pub tuple: Tuple,
    /// Direction, as far as it is known.
    pub direction: Direction,
    /// Owner; pid 0 when unknown.
    pub owner: Owner,
}

impl Connection {
    /// That of a socket.
    pub fn new(socket: Socket, tuple: Tuple, direction: Direction, owner: Owner) -> Self {
        Self {
            cookie: socket.cookie,
            netns: socket.netns,
            tuple,
            direction,
            owner,
        }
    }

    /// The service port, where the direction shows which end that is.
    pub fn service_port(&self) -> Option<u16> {
        match self.direction {
            Direction::Inbound => Some(self.tuple.local_port),
            Direction::Outbound => Some(self.tuple.remote_port),
            Direction::Unknown => None,
        }
    }

    /// The service port as groups name it.
    pub fn port_name(&self) -> String {
        let port = self.service_port();
        port.map_or(PortLabel::Other, PortLabel::Port).to_string()
    }

    /// The process as groups name it.
    pub fn process_name(&self) -> String {
        process_name(&self.owner.comm).unwrap_or_else(|| "unknown".to_owned())
    }

    /// Payload bytes received and sent.
    pub fn bytes(&self, traffic: Traffic) -> (u64, u64) {
        let sent = traffic.sent_payload(self.direction == Direction::Outbound);
        (traffic.received_bytes, sent)
    }
}

/// Prints connections, one a line.
pub struct Printer<W> {
    out: W,
    output: Output,
    containers: Containers,
}

impl<W: Write> Printer<W> {
    /// Prints the heading of a table at once.
    pub fn new(mut out: W, output: Output) -> std::io::Result<Self> {
        if output == Output::Table {
            writeln!(out, "{}", columns::heading(&COLUMNS))?;
            out.flush()?;
        }
        let containers = Containers::default();
        Ok(Self {
            out,
            output,
            containers,
        })
    }

    /// Prints one line about what happened at `at`.
    pub fn print(
        &mut self,
        at: Timestamp,
        occurrence: &Occurrence,
        country: Country,
    ) -> std::io::Result<()> {
        let container = self.containers.of(&occurrence.connection.owner);
        match self.output {
            Output::Table => {
                let cells = cells(at, occurrence, country, container);
                writeln!(self.out, "{}", columns::row(&COLUMNS, cells))
            }
            Output::Json => {
                let fields = fields(at, occurrence, country, container);
                super::print_json(&mut self.out, &Fields(&fields))
            }
        }
    }

    /// Passes on what was printed.
    pub fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// The moment of a kernel timestamp, given `now_ns` of the same clock.
pub fn wall_clock(at_ns: u64, now_ns: u64) -> Timestamp {
    let now = Timestamp::now();
    let ago = Duration::from_nanos(now_ns.saturating_sub(at_ns));
    now.checked_sub(ago).unwrap_or(now)
}

const COLUMNS: [Column; 13] = [
    left("TIME", 12),
    left("EVENT", 5),
    left("DIRECTION", 9),
    left("PROCESS", 15),
    left("PID", 7),
    left("CONTAINER", 12),
    left("LOCAL", 21),
    left("REMOTE", 21),
    left("COUNTRY", 8),
    left("DURATION", 9),
    left("RECEIVED", 9),
    left("SENT", 9),
    left("REASON", 0),
];

/// The name of an event, and why it is one or the state it left.
fn event(happening: Happening) -> (&'static str, Option<&'static str>, Option<&'static str>) {
    match happening {
        Happening::Live(number) => ("live", Some(state_name(number)), None),
        Happening::Open => ("open", None, None),
        Happening::Close => ("close", None, None),
        Happening::Fail(reason) => ("fail", None, Some(reason.label())),
    }
}

/// The cells of [`COLUMNS`]; the time is local.
fn cells(
    at: Timestamp,
    occurrence: &Occurrence,
    country: Country,
    container: Option<String>,
) -> [String; COLUMNS.len()] {
    let Connection {
        tuple,
        direction,
        owner,
        ..
    } = &occurrence.connection;
    let (event, state, reason) = event(occurrence.happening);
    let moved = occurrence
        .traffic
        .map(|traffic| occurrence.connection.bytes(traffic));
    let local = at.to_zoned(TimeZone::system());
    [
        local.strftime("%H:%M:%S%.3f").to_string(),
        event.to_owned(),
        direction.label().to_owned(),
        or_dash(process_name(&owner.comm)),
        or_dash((owner.pid != 0).then(|| owner.pid.to_string())),
        or_dash(container),
        tuple.local_endpoint().to_string(),
        tuple.remote_endpoint().to_string(),
        country.code().to_owned(),
        or_dash(occurrence.duration_seconds().map(seconds)),
        or_dash(moved.map(|(received, _)| bytes(received))),
        or_dash(moved.map(|(_, sent)| bytes(sent))),
        or_dash(reason.or(state).map(str::to_owned)),
    ]
}

/// The fields of the JSON object; null ones are left out.
fn fields(
    at: Timestamp,
    occurrence: &Occurrence,
    country: Country,
    container: Option<String>,
) -> [(&'static str, Value); 16] {
    let connection = &occurrence.connection;
    let Connection {
        netns,
        tuple,
        direction,
        owner,
        ..
    } = connection;
    let (event, state, reason) = event(occurrence.happening);
    let moved = occurrence.traffic.map(|traffic| connection.bytes(traffic));
    [
        // RFC 3339, UTC.
        ("time", format!("{at:.3}").into()),
        ("event", event.into()),
        ("direction", direction.label().into()),
        ("process", process_name(&owner.comm).into()),
        // In the initial pid namespace.
        ("pid", (owner.pid != 0).then_some(owner.pid).into()),
        // The first 12 digits of its id.
        ("container", container.into()),
        ("netns", (*netns).into()),
        ("local", tuple.local_endpoint().to_string().into()),
        ("remote", tuple.remote_endpoint().to_string().into()),
        ("country", country.code().into()),
        ("port", connection.service_port().into()),
        ("state", state.into()),
        ("duration_seconds", occurrence.duration_seconds().into()),
        ("received_bytes", moved.map(|(received, _)| received).into()),
        ("sent_bytes", moved.map(|(_, sent)| sent).into()),
        ("reason", reason.into()),
    ]
}

/// A JSON object of named values, in their order, without null ones.
pub struct Fields<'a>(pub &'a [(&'static str, Value)]);

impl Serialize for Fields<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let known = self.0.iter().filter(|(_, value)| !value.is_null());
        serializer.collect_map(known.map(|(name, value)| (name, value)))
    }
}

/// A TCP state as `ss` names it.
fn state_name(number: u8) -> &'static str {
    match number {
        state::ESTABLISHED => "established",
        state::SYN_SENT => "syn-sent",
        state::SYN_RECV => "syn-recv",
        state::FIN_WAIT1 => "fin-wait-1",
        state::FIN_WAIT2 => "fin-wait-2",
        state::CLOSE_WAIT => "close-wait",
        state::LAST_ACK => "last-ack",
        state::LISTEN => "listening",
        state::CLOSING => "closing",
        _ => "unknown",
    }
}

/// Whether a process is the one asked for: by its name, which the kernel has
/// cut at 15 bytes, or by what is printed for it.
pub fn is_named(comm: &[u8; 16], asked: &str) -> bool {
    let name = comm_bytes(comm);
    // As bytes: the kernel cuts through characters too.
    let kept = &asked.as_bytes()[..asked.len().min(NAME_BYTES)];
    !name.is_empty() && (name == kept || process_name(comm).as_deref() == Some(asked))
}

/// Bytes of a name that the kernel keeps: `TASK_COMM_LEN` without the NUL.
const NAME_BYTES: usize = 15;

/// Seconds with the unit that keeps three digits.
fn seconds(value: f64) -> String {
    if value < 0.001 {
        format!("{:.0}us", value * 1e6)
    } else if value < 1.0 {
        format!("{:.1}ms", value * 1e3)
    } else if value < 120.0 {
        format!("{value:.2}s")
    } else {
        let minutes = (value / 60.0).floor();
        format!("{minutes:.0}m{:02.0}s", value - minutes * 60.0)
    }
}

/// Bytes with a binary unit, exact below 10 KiB.
pub fn bytes(value: u64) -> String {
    const UNITS: [&str; 5] = ["Ki", "Mi", "Gi", "Ti", "Pi"];
    if value < 10 * 1024 {
        return value.to_string();
    }
    let mut scaled = value as f64;
    let mut unit = "";
    for next in UNITS {
        if scaled < 1024.0 {
            break;
        }
        scaled /= 1024.0;
        unit = next;
    }
    format!("{scaled:.1}{unit}")
}

/// The cell of what may be unknown or not apply.
pub fn or_dash(value: Option<String>) -> String {
    value.unwrap_or_else(|| "-".to_owned())
}

#[cfg(test)]
mod tests {
    use connmon_core::fold::FailureReason;
    use unicode_width::UnicodeWidthStr as _;

    use super::*;

    /// What the kernel keeps of a name.
    fn comm(name: &str) -> [u8; 16] {
        let mut comm = [0; 16];
        for (kept, byte) in comm[..NAME_BYTES].iter_mut().zip(name.bytes()) {
            *kept = byte;
        }
        comm
    }

    #[test]
    fn a_name_is_asked_for_whole_or_as_the_kernel_cut_it() {
        let resolved = comm("systemd-resolved");
        assert_eq!(process_name(&resolved).unwrap(), "systemd-resolve");
        for asked in ["systemd-resolved", "systemd-resolve"] {
            assert!(is_named(&resolved, asked), "{asked}");
        }
        for asked in ["systemd-resolv", "systemd", ""] {
            assert!(!is_named(&resolved, asked), "{asked}");
        }
        assert!(!is_named(&comm("curl"), "curlew"));
        assert!(!is_named(&[0; 16], ""));
        // Cut within a character.
        let cut = comm("éééééééé");
        assert!(is_named(&cut, "éééééééé"));
        assert!(is_named(&cut, &process_name(&cut).unwrap()));
    }

    #[test]
    fn units_keep_their_digits() {
        assert_eq!(seconds(0.000_045), "45us");
        assert_eq!(seconds(0.25), "250.0ms");
        assert_eq!(seconds(3.5), "3.50s");
        assert_eq!(seconds(125.0), "2m05s");
        assert_eq!(bytes(1000), "1000");
        assert_eq!(bytes(10 * 1024), "10.0Ki");
        assert_eq!(bytes(u64::MAX), "16384.0Pi");
    }

    #[test]
    fn a_line_lies_under_its_heading() {
        let mut connection = Connection {
            cookie: 0,
            netns: 1,
            tuple: Tuple {
                local: "10.0.0.1".parse().unwrap(),
                local_port: 1,
                remote: "10.0.0.2".parse().unwrap(),
                remote_port: 80,
            },
            direction: Direction::Outbound,
            owner: Owner::default(),
        };
        let failed = |connection| Occurrence {
            happening: Happening::Fail(FailureReason::Refused),
            at_ns: 0,
            connection,
            duration_ns: Some(1_000_000_000),
            traffic: None,
        };
        let (now, country) = (Timestamp::now(), Country::PRIVATE);
        let heading = columns::heading(&COLUMNS);
        for name in ["", "curl", "日本語", "e\u{301}"] {
            connection.owner.comm = comm(name);
            let cells = cells(now, &failed(connection), country, None);
            let line = columns::row(&COLUMNS, cells);
            for (cell, name) in [("10.0.0.2:80", "REMOTE"), ("refused", "REASON")] {
                let before = line.split(cell).next().unwrap();
                assert_eq!(Some(before.width()), heading.find(name), "{line}");
            }
        }
        let fields = fields(now, &failed(connection), country, None);
        let json = serde_json::to_value(Fields(&fields)).unwrap();
        assert_eq!(json["reason"], "refused");
        assert_eq!(json["duration_seconds"], 1.0);
        assert!(json.get("pid").is_none());
    }
}

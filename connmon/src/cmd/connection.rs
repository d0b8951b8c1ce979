//! One line about one connection: what `trace` and `list` print, as an
//! aligned table or as JSON, from the same struct.

use std::io::Write;
use std::net::SocketAddr;
use std::time::Duration;

use connmon_common::state;
use connmon_core::event::{Cookie, NetnsId, Owner, Socket, Traffic, Tuple};
use connmon_core::fold::{Direction, PortLabel};
use connmon_core::geo::Country;
use connmon_core::text::{comm_bytes, process_name};
use jiff::{Timestamp, tz::TimeZone};
use serde::Serialize;

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
        let record = ConnectionRecord::new(at, occurrence, country, container);
        match self.output {
            Output::Table => {
                let local = at.to_zoned(TimeZone::system());
                let clock = local.strftime("%H:%M:%S%.3f").to_string();
                writeln!(self.out, "{}", record.line(&clock))
            }
            Output::Json => super::print_json(&mut self.out, &record),
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

/// One connection event, or one connection of a snapshot. Fields that do not
/// apply are absent from the JSON and `-` in the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct ConnectionRecord {
    /// RFC 3339, UTC, milliseconds.
    time: String,
    /// `open`, `close`, `fail`; `live` in a snapshot.
    event: &'static str,
    /// `inbound`, `outbound` or `unknown`.
    direction: &'static str,
    /// Process name, made printable.
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<String>,
    /// Process id in the initial pid namespace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pid: Option<u32>,
    /// Container id from the process's cgroup, first 12 digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    container: Option<String>,
    /// Network namespace inode.
    netns: u32,
    /// Local endpoint.
    local: SocketAddr,
    /// Remote endpoint.
    remote: SocketAddr,
    /// The `country` label value.
    country: &'static str,
    /// Service port: inbound the local one, outbound the remote one.
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<u16>,
    /// TCP state, in a snapshot.
    #[serde(skip_serializing_if = "Option::is_none")]
    state: Option<&'static str>,
    /// Seconds: of the connection for `close`, of the attempt for `fail`, of
    /// the handshake for an outbound `open`.
    #[serde(skip_serializing_if = "Option::is_none")]
    duration_seconds: Option<f64>,
    /// Payload bytes received.
    #[serde(skip_serializing_if = "Option::is_none")]
    received_bytes: Option<u64>,
    /// Payload bytes sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    sent_bytes: Option<u64>,
    /// Why an attempt failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
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

impl ConnectionRecord {
    fn new(
        at: Timestamp,
        occurrence: &Occurrence,
        country: Country,
        container: Option<String>,
    ) -> Self {
        let Occurrence {
            happening,
            connection,
            duration_ns,
            traffic,
            ..
        } = occurrence;
        let (event, state, reason) = match happening {
            Happening::Live(number) => ("live", Some(state_name(*number)), None),
            Happening::Open => ("open", None, None),
            Happening::Close => ("close", None, None),
            Happening::Fail(reason) => ("fail", None, Some(reason.label())),
        };
        let bytes = traffic.map(|traffic| connection.bytes(traffic));
        let owner = &connection.owner;
        Self {
            time: format!("{at:.3}"),
            event,
            direction: connection.direction.label(),
            process: process_name(&owner.comm),
            pid: (owner.pid != 0).then_some(owner.pid),
            container,
            netns: connection.netns,
            local: connection.tuple.local_endpoint(),
            remote: connection.tuple.remote_endpoint(),
            country: country.code(),
            port: connection.service_port(),
            state,
            duration_seconds: duration_ns.map(|ns| ns as f64 / 1e9),
            received_bytes: bytes.map(|(received, _)| received),
            sent_bytes: bytes.map(|(_, sent)| sent),
            reason,
        }
    }

    /// One aligned line, no line feed. `clock` is the local time of day.
    fn line(&self, clock: &str) -> String {
        let last = self.reason.or(self.state).map(str::to_owned);
        let cells: [String; COLUMNS.len()] = [
            clock.to_owned(),
            self.event.to_owned(),
            self.direction.to_owned(),
            or_dash(self.process.clone()),
            or_dash(self.pid.map(|pid| pid.to_string())),
            or_dash(self.container.clone()),
            self.local.to_string(),
            self.remote.to_string(),
            self.country.to_owned(),
            or_dash(self.duration_seconds.map(seconds)),
            or_dash(self.received_bytes.map(bytes)),
            or_dash(self.sent_bytes.map(bytes)),
            or_dash(last),
        ];
        columns::row(&COLUMNS, cells)
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
        let record = ConnectionRecord {
            time: "2026-01-01T00:00:00.000Z".into(),
            event: "fail",
            direction: "outbound",
            process: None,
            pid: Some(12),
            container: None,
            netns: 1,
            local: "10.0.0.1:1".parse().unwrap(),
            remote: "10.0.0.2:80".parse().unwrap(),
            country: "private",
            port: Some(80),
            state: None,
            duration_seconds: Some(1.0),
            received_bytes: None,
            sent_bytes: None,
            reason: Some("refused"),
        };
        let heading = columns::heading(&COLUMNS);
        let line = record.line("00:00:00.000");
        assert_eq!(heading.find("REMOTE"), line.find("10.0.0.2:80"));
        assert_eq!(heading.find("REASON"), line.find("refused"));
        for name in ["curl", "日本語", "e\u{301}"] {
            let named = ConnectionRecord {
                process: Some(name.into()),
                ..record.clone()
            };
            let named = named.line("00:00:00.000");
            let before = named.split("10.0.0.2:80").next().unwrap();
            assert_eq!(Some(before.width()), heading.find("REMOTE"), "{named}");
        }
        let json = serde_json::to_value(&record).unwrap();
        assert_eq!(json["reason"], "refused");
        assert!(json.get("process").is_none());
    }
}

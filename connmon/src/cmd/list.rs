//! `connmon list`: one snapshot of what is connected now.

use std::collections::BTreeMap;
use std::io::Write;

use connmon_core::fold::Direction;
use jiff::Timestamp;
use serde::{Serialize, Serializer};

use crate::cli::{By, ListArgs, Output};
use crate::config::Config;

use super::columns::{self, Column, left, right};
use super::connection::{Printer, bytes, or_dash};
use super::follow::{Happening, Occurrence};
use super::snapshot::{Live, Reader, Tables};

/// Runs the command.
///
/// # Errors
/// When connections cannot be read or the output cannot be written.
pub fn run(config: &Config, args: &ListArgs) -> anyhow::Result<()> {
    let mut reader = Reader::new(config)?;
    let tables = reader.read()?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    match (args.by, args.output) {
        (By::Connection, output) => connections(&mut out, &tables, output)?,
        (by, Output::Json) => {
            for group in groups(by, &tables) {
                super::print_json(&mut out, &group)?;
            }
        }
        (by, Output::Table) => table(&mut out, by, &groups(by, &tables))?,
    }
    out.flush()?;
    if args.output == Output::Table {
        notes(&tables);
    }
    Ok(())
}

/// Prints what the table leaves out to stderr, out of the way of pipes.
fn notes(tables: &Tables) {
    let mut stderr = std::io::stderr();
    if tables.hidden > 0 {
        let _ = writeln!(
            stderr,
            "{} connections are hidden by the filters; --filter.loopback include shows loopback",
            tables.hidden
        );
    }
    if let Some(reason) = &tables.unread {
        let _ = writeln!(
            stderr,
            "some network namespaces cannot be read: {reason}; `connmon check` shows what helps"
        );
    }
}

fn connections(out: &mut impl Write, tables: &Tables, output: Output) -> std::io::Result<()> {
    let now = Timestamp::now();
    let mut rows: Vec<&Live> = tables.connections.iter().collect();
    rows.sort_by_key(|live| {
        let tuple = &live.connection.tuple;
        (live.connection.netns, tuple.local_port, tuple.remote)
    });
    let mut printer = Printer::new(out, output)?;
    for live in rows {
        let occurrence = Occurrence {
            happening: Happening::Live(live.state),
            at_ns: 0,
            connection: live.connection,
            duration_ns: None,
            traffic: live.traffic,
        };
        printer.print(now, &occurrence, live.country)?;
    }
    Ok(())
}

/// What a line of `--by` is about: names of fields and values.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
struct Key(Vec<(&'static str, String)>);

impl Key {
    fn new(by: By, live: &Live) -> Self {
        let connection = &live.connection;
        Self(match by {
            By::Connection => Vec::new(),
            By::Country => vec![("country", live.country.code().to_owned())],
            By::Port => vec![
                ("port", connection.port_name()),
                ("direction", connection.direction.label().to_owned()),
            ],
            By::Process => vec![("process", connection.process_name())],
        })
    }
}

impl Serialize for Key {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().map(|(name, value)| (name, value)))
    }
}

/// A line of `--by`.
#[derive(Clone, Debug, Default, Serialize)]
struct Group {
    #[serde(flatten)]
    key: Key,
    /// In ESTABLISHED.
    connections: u64,
    inbound: u64,
    outbound: u64,
    unknown: u64,
    /// In any other state after the handshake.
    closing: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    received_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    sent_bytes: Option<u64>,
}

impl Group {
    fn add(&mut self, live: &Live) {
        if live.state == connmon_common::state::ESTABLISHED {
            self.connections += 1;
            match live.connection.direction {
                Direction::Inbound => self.inbound += 1,
                Direction::Outbound => self.outbound += 1,
                Direction::Unknown => self.unknown += 1,
            }
        } else {
            self.closing += 1;
        }
        if let Some(traffic) = live.traffic {
            let (received, sent) = live.connection.bytes(traffic);
            *self.received_bytes.get_or_insert(0) += received;
            *self.sent_bytes.get_or_insert(0) += sent;
        }
    }
}

fn groups(by: By, tables: &Tables) -> Vec<Group> {
    let mut groups: BTreeMap<Key, Group> = BTreeMap::new();
    for live in &tables.connections {
        groups.entry(Key::new(by, live)).or_default().add(live);
    }
    let groups = groups
        .into_iter()
        .map(|(key, group)| Group { key, ..group });
    let mut groups: Vec<Group> = groups.collect();
    groups.sort_by_key(|group| std::cmp::Reverse(group.connections));
    groups
}

/// What follows the key in a table of groups.
const COUNTS: [Column; 7] = [
    right("CONNECTIONS", 11),
    right("INBOUND", 8),
    right("OUTBOUND", 8),
    right("UNKNOWN", 8),
    right("CLOSING", 8),
    right("RECEIVED", 9),
    right("SENT", 9),
];

fn table(out: &mut impl Write, by: By, groups: &[Group]) -> std::io::Result<()> {
    let key: &[Column] = match by {
        By::Connection => &[],
        By::Country => &[left("COUNTRY", 8)],
        By::Port => &[left("PORT", 7), left("DIRECTION", 9)],
        By::Process => &[left("PROCESS", 16)],
    };
    let table = [key, &COUNTS].concat();
    writeln!(out, "{}", columns::heading(&table))?;
    for group in groups {
        let counts = [
            group.connections.to_string(),
            group.inbound.to_string(),
            group.outbound.to_string(),
            group.unknown.to_string(),
            group.closing.to_string(),
            or_dash(group.received_bytes.map(bytes)),
            or_dash(group.sent_bytes.map(bytes)),
        ];
        let key = group.key.0.iter().map(|(_, value)| value);
        writeln!(out, "{}", columns::row(&table, key.chain(&counts)))?;
    }
    Ok(())
}

//! `connmon list`: one snapshot of what is connected now.

use std::collections::BTreeMap;
use std::io::Write;

use connmon_core::fold::{Direction, PortLabel};
use connmon_core::text::process_name;
use serde::Serialize;

use crate::cli::{By, ListArgs, Output};
use crate::config::Config;

use super::columns::{self, Column, left, right};
use super::connection::{ConnectionRecord, bytes, heading, service_port, state_name};
use super::containers::Containers;
use super::snapshot::{Live, Reader, Tables};
use super::time::Clock;

/// Runs the command.
///
/// # Errors
/// When connections cannot be read or the output cannot be written.
pub fn run(config: &Config, args: &ListArgs) -> anyhow::Result<()> {
    let mut reader = Reader::new(config)?;
    let tables = reader.read()?;
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    match args.by {
        By::Connection => connections(&mut out, &tables, args.output)?,
        By::Country => groups(
            &mut out,
            args.output,
            &[left("COUNTRY", 8)],
            &tables,
            |live| Key {
                country: Some(live.country.code()),
                ..Key::default()
            },
        )?,
        By::Port => groups(
            &mut out,
            args.output,
            &[left("PORT", 7), left("DIRECTION", 9)],
            &tables,
            |live| Key {
                port: Some(
                    service_port(live.direction, &live.row.tuple)
                        .map_or(PortLabel::Other, PortLabel::Port)
                        .to_string(),
                ),
                direction: Some(live.direction.label()),
                ..Key::default()
            },
        )?,
        By::Process => groups(
            &mut out,
            args.output,
            &[left("PROCESS", 16)],
            &tables,
            |live| Key {
                process: Some(
                    process_name(&live.row.owner.comm).unwrap_or_else(|| "unknown".to_owned()),
                ),
                ..Key::default()
            },
        )?,
    }
    out.flush()?;
    if args.output == Output::Table {
        notes(&tables);
    }
    Ok(())
}

/// What the table does not show goes to stderr, out of the way of pipes.
fn notes(tables: &Tables) {
    let mut stderr = std::io::stderr();
    if tables.hidden > 0 {
        let _ = writeln!(
            stderr,
            "{} connections are hidden by the filters; --filter.loopback include shows loopback",
            tables.hidden
        );
    }
    if let Some(gap) = &tables.gap {
        let _ = writeln!(stderr, "some namespaces could not be read: {gap}");
    }
}

fn connections(out: &mut impl Write, tables: &Tables, output: Output) -> anyhow::Result<()> {
    let clock = Clock::now();
    let (time, wall) = (clock.rfc3339(), clock.time_of_day());
    let mut containers = Containers::default();
    let mut rows: Vec<&Live> = tables.connections.iter().collect();
    rows.sort_by_key(|live| (live.netns, live.row.tuple.local_port, live.row.tuple.remote));
    if output == Output::Table {
        writeln!(out, "{}", heading())?;
    }
    for live in rows {
        let record = record(live, &time, &mut containers);
        match output {
            Output::Table => writeln!(out, "{}", record.line(&wall))?,
            Output::Json => writeln!(out, "{}", serde_json::to_string(&record)?)?,
        }
    }
    Ok(())
}

fn record(live: &Live, time: &str, containers: &mut Containers) -> ConnectionRecord {
    let Live {
        netns,
        row,
        direction,
        country,
    } = live;
    ConnectionRecord {
        time: time.to_owned(),
        event: "live",
        direction: direction.label(),
        process: process_name(&row.owner.comm),
        pid: (row.owner.pid != 0).then_some(row.owner.pid),
        container: containers.of(&row.owner),
        netns: *netns,
        local: row.tuple.local_endpoint(),
        remote: row.tuple.remote_endpoint(),
        country: country.code(),
        port: service_port(*direction, &row.tuple),
        state: Some(state_name(row.state)),
        duration_seconds: None,
        received_bytes: row.traffic.map(|traffic| traffic.received_bytes),
        sent_bytes: row
            .traffic
            .map(|traffic| traffic.sent_payload(*direction == Direction::Outbound)),
        reason: None,
    }
}

/// What a line of `--by` is about.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize)]
struct Key {
    #[serde(skip_serializing_if = "Option::is_none")]
    country: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    port: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    direction: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    process: Option<String>,
}

impl Key {
    fn cells(&self) -> Vec<String> {
        [
            self.country.map(str::to_owned),
            self.port.clone(),
            self.direction.map(str::to_owned),
            self.process.clone(),
        ]
        .into_iter()
        .flatten()
        .collect()
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
        if live.row.state != connmon_common::state::ESTABLISHED {
            self.closing += 1;
        } else {
            self.connections += 1;
            match live.direction {
                Direction::Inbound => self.inbound += 1,
                Direction::Outbound => self.outbound += 1,
                Direction::Unknown => self.unknown += 1,
            }
        }
        if let Some(traffic) = live.row.traffic {
            *self.received_bytes.get_or_insert(0) += traffic.received_bytes;
            *self.sent_bytes.get_or_insert(0) +=
                traffic.sent_payload(live.direction == Direction::Outbound);
        }
    }
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

fn groups(
    out: &mut impl Write,
    output: Output,
    by: &[Column],
    tables: &Tables,
    key: impl Fn(&Live) -> Key,
) -> anyhow::Result<()> {
    let mut groups: BTreeMap<Key, Group> = BTreeMap::new();
    for live in &tables.connections {
        let key = key(live);
        groups
            .entry(key.clone())
            .or_insert_with(|| Group {
                key,
                ..Group::default()
            })
            .add(live);
    }
    let mut groups: Vec<Group> = groups.into_values().collect();
    groups.sort_by_key(|group| std::cmp::Reverse(group.connections));
    if output == Output::Json {
        for group in &groups {
            writeln!(out, "{}", serde_json::to_string(group)?)?;
        }
        return Ok(());
    }
    let table = [by, &COUNTS].concat();
    writeln!(out, "{}", columns::heading(&table))?;
    for group in &groups {
        let amount = |value: Option<u64>| value.map_or_else(|| "-".to_owned(), bytes);
        let mut cells = group.key.cells();
        cells.extend([
            group.connections.to_string(),
            group.inbound.to_string(),
            group.outbound.to_string(),
            group.unknown.to_string(),
            group.closing.to_string(),
            amount(group.received_bytes),
            amount(group.sent_bytes),
        ]);
        writeln!(out, "{}", columns::row(&table, cells))?;
    }
    Ok(())
}

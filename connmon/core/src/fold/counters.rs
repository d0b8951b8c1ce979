//! Counters and gauges. Every change goes through here and is made in each
//! dimension, so that the sums over their rows agree.

use super::FoldConfig;
use super::countries::{self, row_of};
use super::cross::Cross;
use super::dimension::{Counts, Dimension, NO_ROW, OTHER};
use super::entry::Entry;
use super::failures::failure_reason;
use super::histogram::{Buckets, DURATION_NS, LATENCY_NS};
use super::ports::{PortSet, Ports};
use super::snapshot::{CrossRow, DIRECTIONS, Direction, Flow};
use crate::geo::Country;

/// The labels of one connection: its direction, and its row in each dimension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Labels {
    pub(super) direction: Direction,
    pub(super) country: Country,
    pub(super) port: u16,
    pub(super) cross: u16,
}

impl Labels {
    /// The labels of an entry.
    pub(super) fn of(entry: &Entry) -> Self {
        Self {
            direction: entry.direction(),
            country: entry.country,
            port: entry.port,
            cross: entry.cross,
        }
    }

    /// The labels of a connection whose direction is not known (yet).
    pub(super) fn without_direction(country: Country) -> Self {
        Self {
            direction: Direction::Unknown,
            country,
            port: OTHER,
            cross: NO_ROW,
        }
    }

    /// Makes them the labels of an entry.
    pub(super) fn store(self, entry: &mut Entry) {
        entry.set_direction(self.direction);
        entry.country = self.country;
        entry.port = self.port;
        entry.cross = self.cross;
    }
}

/// Counters and gauges.
#[derive(Debug)]
pub(super) struct Counters {
    /// The time of every change from now on, CLOCK_MONOTONIC.
    pub(super) now_ns: u64,
    pub(super) countries: Dimension<Country>,
    pub(super) ports: [Ports; DIRECTIONS],
    pub(super) cross: Cross,
    /// Sockets in ESTABLISHED now.
    pub(super) established: u64,
    pub(super) connect_latency: Buckets,
    pub(super) accept_wait: Buckets,
    pub(super) rtt: [Buckets; DIRECTIONS],
    pub(super) duration: [Buckets; DIRECTIONS],
}

impl Counters {
    pub(super) fn new(config: &FoldConfig) -> Self {
        let allow = config.ports_allow.as_deref().map(PortSet::of_ranges);
        Self {
            now_ns: 0,
            countries: countries::new(),
            ports: Direction::ALL
                .map(|direction| Ports::new(direction, allow.clone(), config.ports_max)),
            cross: Cross::new(&config.cross),
            established: 0,
            connect_latency: Buckets::new(&LATENCY_NS),
            accept_wait: Buckets::new(&LATENCY_NS),
            rtt: Direction::ALL.map(|_| Buckets::new(&LATENCY_NS)),
            duration: Direction::ALL.map(|_| Buckets::new(&DURATION_NS)),
        }
    }

    /// The labels of a connection to service port `port`.
    pub(super) fn labels(&mut self, country: Country, direction: Direction, port: u16) -> Labels {
        let (row, ended) = self.ports[direction as usize].row_for(self.now_ns, port);
        self.end_cross_rows(direction, ended);
        Labels {
            direction,
            country,
            port: row,
            cross: self
                .cross
                .row_for(self.now_ns, country, direction, port, row),
        }
    }

    fn end_cross_rows(&mut self, direction: Direction, ended: Option<u16>) {
        if let Some(port_row) = ended {
            self.cross.end_port_row(direction, port_row);
        }
    }

    /// Makes rows for an inbound port that listens, before anybody connects.
    pub(super) fn reserve_listening(&mut self, port: u16) {
        let ended = self.ports[Direction::Inbound as usize].reserve(self.now_ns, port);
        self.end_cross_rows(Direction::Inbound, ended);
    }

    /// Makes the same change in the row of each dimension.
    fn each_row(&mut self, labels: Labels, change: impl Fn(&mut Counts)) {
        let Labels {
            direction,
            country,
            port,
            cross,
        } = labels;
        self.countries.change(self.now_ns, row_of(country), &change);
        let ports = &mut self.ports[direction as usize].rows;
        ports.change(self.now_ns, port, &change);
        self.cross.rows.change(self.now_ns, cross, &change);
    }

    fn each_flow(&mut self, labels: Labels, change: impl Fn(&mut Flow)) {
        let direction = labels.direction as usize;
        self.each_row(labels, |row| change(&mut row.flows[direction]));
    }

    /// A tracked connection refers to its rows from now on.
    pub(super) fn attach(&mut self, labels: Labels, established: bool) {
        let established = u64::from(established);
        self.established += established;
        self.each_row(labels, |row| {
            row.live += 1;
            row.flows[labels.direction as usize].connections += established;
        });
    }

    /// A tracked connection no longer refers to its rows; `closed`: because it
    /// reached CLOSE.
    pub(super) fn detach(&mut self, labels: Labels, established: bool, closed: bool) {
        let established = u64::from(established);
        // A bug must not turn a gauge into 2^64.
        self.established = self.established.saturating_sub(established);
        self.each_row(labels, |row| {
            row.live = row.live.saturating_sub(1);
            let flow = &mut row.flows[labels.direction as usize];
            flow.connections = flow.connections.saturating_sub(established);
            flow.closed += u64::from(closed);
        });
    }

    /// A tracked connection entered or left ESTABLISHED.
    pub(super) fn set_established(&mut self, labels: Labels, established: bool) {
        let change = |count: u64| if established { count + 1 } else { count - 1 };
        self.established = change(self.established);
        self.each_flow(labels, |flow| flow.connections = change(flow.connections));
    }

    /// A handshake ended.
    pub(super) fn opened(&mut self, labels: Labels) {
        self.each_flow(labels, |flow| flow.opened += 1);
    }

    /// Adds bytes and retransmits to those of a connection.
    pub(super) fn moved(&mut self, labels: Labels, received: u64, sent: u64, retransmitted: u64) {
        if received | sent | retransmitted == 0 {
            return;
        }
        self.each_flow(labels, |flow| {
            flow.received_bytes += received;
            flow.sent_bytes += sent;
            flow.retransmitted_segments += retransmitted;
        });
    }

    /// An active open never completed.
    pub(super) fn failed(
        &mut self,
        country: Country,
        port: u16,
        error: u32,
        segments_out: Option<u32>,
    ) {
        let direction = Direction::Outbound;
        let (row, ended) = self.ports[direction as usize].row_for_failure(self.now_ns, port);
        self.end_cross_rows(direction, ended);
        let labels = Labels {
            direction,
            country,
            port: row,
            cross: NO_ROW,
        };
        let reason = failure_reason(error, segments_out) as usize;
        self.each_row(labels, |row| row.failures[reason] += 1);
    }

    /// An active handshake took this long.
    pub(super) fn connected_after(&mut self, country: Country, latency_ns: u64) {
        self.connect_latency.observe(latency_ns);
        let row = self.countries.row_mut(row_of(country));
        row.extra.connect_latency.add(latency_ns);
    }

    /// A passive connection waited this long for accept().
    pub(super) fn accepted_after(&mut self, labels: Labels, wait_ns: u64) {
        self.accept_wait.observe(wait_ns);
        let ports = &mut self.ports[labels.direction as usize].rows;
        ports.row_mut(labels.port).extra.accept_wait.add(wait_ns);
    }

    /// A connection's smoothed round-trip time.
    pub(super) fn round_trip(&mut self, labels: Labels, rtt_ns: u64) {
        self.rtt[labels.direction as usize].observe(rtt_ns);
        let row = self.countries.row_mut(row_of(labels.country));
        row.extra.rtt.add(rtt_ns);
    }

    /// Counts a CLOSE_WAIT row of the audit in progress.
    pub(super) fn count_close_wait(&mut self, labels: Labels) {
        let ports = &mut self.ports[labels.direction as usize].rows;
        ports.row_mut(labels.port).extra.close_wait_next += 1;
    }

    /// Publishes the CLOSE_WAIT counts of the audit that ended, or drops those
    /// of one that did not end.
    pub(super) fn end_close_wait(&mut self, publish: bool) {
        let rows = self
            .ports
            .iter_mut()
            .flat_map(|ports| ports.rows.rows_mut());
        for (_, row) in rows {
            let counted = std::mem::take(&mut row.extra.close_wait_next);
            if publish {
                row.extra.close_wait = counted;
            }
        }
    }

    pub(super) fn cross_rows(&self) -> Vec<CrossRow> {
        let rows = self.cross.rows.rows();
        rows.filter_map(|(labels, row)| {
            let labels = labels?;
            let direction = labels.direction as usize;
            Some(CrossRow {
                country: labels.country,
                port: self.ports[direction].label(labels.port_row),
                direction: labels.direction,
                connections: row.counts.flows[direction].connections,
                opened: row.counts.flows[direction].opened,
            })
        })
        .collect()
    }

    /// Over all directions: connections counted in `other` because all rows of
    /// their dimension were taken, and rows that ended.
    pub(super) fn port_losses(&self) -> (u64, u64) {
        let sum = |of: fn(&Ports) -> u64| self.ports.iter().map(of).sum();
        (
            sum(|ports| ports.rows.overflow),
            sum(|ports| ports.rows.evicted),
        )
    }
}

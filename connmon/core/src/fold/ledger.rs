//! The books: every increase goes through here once and lands in a country,
//! a port row and, where they are on, a cross row, so that their sums agree.

use super::countries::Countries;
use super::cross::Cross;
use super::dimension::{NO_ROW, OTHER};
use super::failures;
use super::histogram::{Buckets, DURATION_NS, LATENCY_NS};
use super::ports::{PortSet, Ports};
use super::snapshot::{CrossRow, DIRECTIONS, Direction, Flow, PortRow};
use super::table::Entry;
use super::{FoldConfig, snapshot::Sum};
use crate::geo::Country;

/// The rows one connection is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) country: Country,
    pub(super) direction: Direction,
    pub(super) port: u16,
    pub(super) cross: u16,
}

impl Place {
    /// Where an entry is counted.
    pub(super) fn of(entry: &Entry) -> Self {
        Self {
            country: entry.country,
            direction: entry.direction(),
            port: entry.port,
            cross: entry.cross,
        }
    }
}

/// Counters and gauges.
#[derive(Debug)]
pub(super) struct Ledger {
    pub(super) countries: Countries,
    ports: [Ports; DIRECTIONS],
    cross: Cross,
    /// Sockets in ESTABLISHED now.
    pub(super) established: u64,
    pub(super) connect_latency: Buckets,
    pub(super) accept_wait: Buckets,
    pub(super) rtt: [Buckets; DIRECTIONS],
    pub(super) duration: [Buckets; DIRECTIONS],
}

impl Ledger {
    pub(super) fn new(config: &FoldConfig) -> Self {
        let allow = config.ports_allow.as_deref().map(PortSet::of_ranges);
        Self {
            countries: Countries::new(),
            ports: Direction::ALL
                .map(|direction| Ports::new(direction, allow.clone(), config.ports_max)),
            cross: Cross::new(&config.cross),
            established: 0,
            connect_latency: Buckets::new(&LATENCY_NS),
            accept_wait: Buckets::new(&LATENCY_NS),
            rtt: [const { &LATENCY_NS }; DIRECTIONS].map(|bounds| Buckets::new(bounds)),
            duration: [const { &DURATION_NS }; DIRECTIONS].map(|bounds| Buckets::new(bounds)),
        }
    }

    fn ports(&mut self, direction: Direction) -> &mut Ports {
        &mut self.ports[direction as usize]
    }

    /// The rows a connection to service port `port` counts in from now on.
    pub(super) fn place(
        &mut self,
        now_ns: u64,
        country: Country,
        direction: Direction,
        port: u16,
    ) -> Place {
        let (row, ended) = self.ports(direction).row_for(now_ns, port);
        self.end_cross_rows(direction, ended);
        Place {
            country,
            direction,
            port: row,
            cross: self.cross.row_for(now_ns, country, direction, port, row),
        }
    }

    fn end_cross_rows(&mut self, direction: Direction, ended: Option<u16>) {
        if let Some(port_row) = ended {
            self.cross.end_port_row(direction, port_row);
        }
    }

    /// The rows of a connection whose direction is not known (yet).
    pub(super) fn unsettled_place(country: Country) -> Place {
        Place {
            country,
            direction: Direction::Unknown,
            port: OTHER,
            cross: NO_ROW,
        }
    }

    /// Inbound ports that listen get a row before anybody connects.
    pub(super) fn reserve_listening(&mut self, now_ns: u64, port: u16) {
        let ended = self.ports(Direction::Inbound).reserve(now_ns, port);
        self.end_cross_rows(Direction::Inbound, ended);
    }

    pub(super) fn set_listening(&mut self, ports: &PortSet) {
        self.ports(Direction::Inbound).set_listening(ports);
    }

    /// A tracked connection refers to its rows from now on.
    pub(super) fn attach(&mut self, now_ns: u64, place: Place) {
        self.countries.change(now_ns, place.country);
        self.ports(place.direction).rows.attach(now_ns, place.port);
        if place.cross != NO_ROW {
            self.cross.rows.attach(now_ns, place.cross);
        }
    }

    /// A tracked connection is gone from its rows.
    pub(super) fn detach(&mut self, now_ns: u64, place: Place) {
        self.ports(place.direction).rows.detach(now_ns, place.port);
        if place.cross != NO_ROW {
            self.cross.rows.detach(now_ns, place.cross);
        }
    }

    /// Applies `change` to the flow of each row of a connection, so that all
    /// dimensions have the same sums.
    fn each_flow(&mut self, now_ns: u64, place: Place, change: impl Fn(&mut Flow)) {
        let direction = place.direction as usize;
        change(&mut self.countries.change(now_ns, place.country).flows[direction]);
        let ports = &mut self.ports[direction].rows;
        change(&mut ports.change(now_ns, place.port).flows[direction]);
        if place.cross != NO_ROW {
            change(&mut self.cross.rows.change(now_ns, place.cross).flows[direction]);
        }
    }

    /// A handshake ended.
    pub(super) fn opened(&mut self, now_ns: u64, place: Place) {
        self.each_flow(now_ns, place, |flow| flow.opened += 1);
    }

    /// A tracked connection reached CLOSE.
    pub(super) fn closed(&mut self, now_ns: u64, place: Place) {
        self.each_flow(now_ns, place, |flow| flow.closed += 1);
    }

    /// A tracked connection entered ESTABLISHED.
    pub(super) fn entered_established(&mut self, now_ns: u64, place: Place) {
        self.established += 1;
        self.each_flow(now_ns, place, |flow| flow.connections += 1);
    }

    /// A tracked connection left ESTABLISHED.
    pub(super) fn left_established(&mut self, now_ns: u64, place: Place) {
        debug_assert!(self.established > 0);
        self.established = self.established.saturating_sub(1);
        self.each_flow(now_ns, place, |flow| {
            debug_assert!(flow.connections > 0);
            flow.connections = flow.connections.saturating_sub(1);
        });
    }

    /// Payload and retransmits since the last look at a connection.
    pub(super) fn moved(
        &mut self,
        now_ns: u64,
        place: Place,
        received: u64,
        sent: u64,
        retransmitted: u64,
    ) {
        if received | sent | retransmitted == 0 {
            return;
        }
        self.each_flow(now_ns, place, |flow| {
            flow.received_bytes += received;
            flow.sent_bytes += sent;
            flow.retransmitted_segments += retransmitted;
        });
    }

    /// An active open never completed.
    pub(super) fn failed(
        &mut self,
        now_ns: u64,
        country: Country,
        port: u16,
        error: u32,
        segments_out: Option<u32>,
    ) {
        let reason = failures::failure_reason(error, segments_out) as usize;
        self.countries.change(now_ns, country).failures[reason] += 1;
        let ports = self.ports(Direction::Outbound);
        let (row, ended) = ports.row_for_failure(now_ns, port);
        ports.rows.change(now_ns, row).failures[reason] += 1;
        self.end_cross_rows(Direction::Outbound, ended);
    }

    /// An active handshake took this long.
    pub(super) fn connected_after(&mut self, now_ns: u64, country: Country, latency_ns: u64) {
        self.connect_latency.observe(latency_ns);
        let row = self.countries.change(now_ns, country);
        add(&mut row.extra.connect_latency, latency_ns);
    }

    /// A passive connection waited this long for accept().
    pub(super) fn accepted_after(&mut self, now_ns: u64, place: Place, wait_ns: u64) {
        self.accept_wait.observe(wait_ns);
        let ports = &mut self.ports(place.direction).rows;
        add(
            &mut ports.change(now_ns, place.port).extra.accept_wait,
            wait_ns,
        );
    }

    /// A connection's smoothed round-trip time.
    pub(super) fn round_trip(&mut self, now_ns: u64, place: Place, rtt_ns: u64) {
        self.rtt[place.direction as usize].observe(rtt_ns);
        add(
            &mut self.countries.change(now_ns, place.country).extra.rtt,
            rtt_ns,
        );
    }

    pub(super) fn saw_close_wait(&mut self, place: Place) {
        self.ports(place.direction).saw_close_wait(place.port);
    }

    pub(super) fn forget_close_wait(&mut self) {
        for ports in &mut self.ports {
            ports.forget_close_wait();
        }
    }

    pub(super) fn publish_close_wait(&mut self) {
        for ports in &mut self.ports {
            ports.publish_close_wait();
        }
    }

    pub(super) fn port_rows(&self) -> Vec<PortRow> {
        let mut rows = Vec::new();
        for ports in &self.ports {
            ports.snapshot(&mut rows);
        }
        rows
    }

    pub(super) fn cross_enabled(&self) -> bool {
        self.cross.is_enabled()
    }

    pub(super) fn cross_rows(&self) -> Vec<CrossRow> {
        let rows = self.cross.rows.rows();
        rows.filter_map(|(labels, row)| {
            let labels = labels?;
            let flow = &row.flows[labels.direction as usize];
            Some(CrossRow {
                country: labels.country,
                port: self.ports[labels.direction as usize].label(labels.port_row),
                direction: labels.direction,
                connections: flow.connections,
                opened: flow.opened,
            })
        })
        .collect()
    }

    /// `connmon_series_overflow_total` and `connmon_series_evicted_total` of
    /// the port and cross families.
    pub(super) fn series_losses(&self) -> [(&'static str, u64, u64); 2] {
        let ports = |of: fn(&Ports) -> u64| self.ports.iter().map(of).sum();
        [
            (
                "country_port",
                self.cross.rows.overflow,
                self.cross.rows.evicted,
            ),
            (
                "port",
                ports(|ports| ports.rows.overflow),
                ports(|ports| ports.rows.evicted),
            ),
        ]
    }
}

fn add(sum: &mut Sum, value_ns: u64) {
    sum.count += 1;
    sum.sum_ns = sum.sum_ns.saturating_add(value_ns);
}

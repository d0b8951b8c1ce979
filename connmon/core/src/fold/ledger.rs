//! The books: every increase goes through here once and lands in a country,
//! a port row and, where they are on, a cross row, so that their sums agree.

use super::countries::Countries;
use super::cross::Cross;
use super::failures;
use super::histogram::{Buckets, DURATION_NS, LATENCY_NS};
use super::ports::{OTHER, PortSet, Ports};
use super::snapshot::{CrossRow, DIRECTIONS, Direction, PortRow};
use super::table::{Entry, NO_CROSS};
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
        if let Some(ended) = ended {
            self.cross.end_port_row(direction, ended);
        }
        Place {
            country,
            direction,
            port: row,
            cross: self.cross.row_for(country, direction, port, row),
        }
    }

    /// The rows of a connection whose direction is not known (yet).
    pub(super) fn unsettled_place(country: Country) -> Place {
        Place {
            country,
            direction: Direction::Unknown,
            port: OTHER,
            cross: NO_CROSS,
        }
    }

    /// Inbound ports that listen get a row before anybody connects.
    pub(super) fn reserve_listening(&mut self, now_ns: u64, port: u16) {
        if let Some(ended) = self.ports(Direction::Inbound).reserve(now_ns, port) {
            self.cross.end_port_row(Direction::Inbound, ended);
        }
    }

    pub(super) fn set_listening(&mut self, ports: &PortSet) {
        self.ports(Direction::Inbound).set_listening(ports);
    }

    /// A tracked connection refers to its rows from now on.
    pub(super) fn attach(&mut self, now_ns: u64, place: Place) {
        self.countries.row(place.country);
        self.ports(place.direction).attach(now_ns, place.port);
    }

    /// A tracked connection is gone from its rows.
    pub(super) fn detach(&mut self, now_ns: u64, place: Place) {
        self.ports(place.direction).detach(now_ns, place.port);
    }

    /// A handshake ended.
    pub(super) fn opened(&mut self, now_ns: u64, place: Place) {
        let direction = place.direction as usize;
        self.countries.row(place.country).flows[direction].opened += 1;
        self.ports(place.direction)
            .change(now_ns, place.port)
            .flow
            .opened += 1;
        if let Some(cross) = self.cross.row(place.cross) {
            cross.opened += 1;
        }
    }

    /// A tracked connection reached CLOSE.
    pub(super) fn closed(&mut self, now_ns: u64, place: Place) {
        let direction = place.direction as usize;
        self.countries.row(place.country).flows[direction].closed += 1;
        self.ports(place.direction)
            .change(now_ns, place.port)
            .flow
            .closed += 1;
    }

    /// A tracked connection entered ESTABLISHED.
    pub(super) fn entered_established(&mut self, now_ns: u64, place: Place) {
        let direction = place.direction as usize;
        self.established += 1;
        self.countries.row(place.country).flows[direction].connections += 1;
        self.ports(place.direction)
            .change(now_ns, place.port)
            .flow
            .connections += 1;
        if let Some(cross) = self.cross.row(place.cross) {
            cross.connections += 1;
        }
    }

    /// A tracked connection left ESTABLISHED.
    pub(super) fn left_established(&mut self, now_ns: u64, place: Place) {
        let direction = place.direction as usize;
        let country = &mut self.countries.row(place.country).flows[direction].connections;
        let port = &mut self.ports[direction]
            .change(now_ns, place.port)
            .flow
            .connections;
        debug_assert!(self.established > 0 && *country > 0 && *port > 0);
        self.established = self.established.saturating_sub(1);
        *country = country.saturating_sub(1);
        *port = port.saturating_sub(1);
        if let Some(cross) = self.cross.row(place.cross) {
            debug_assert!(cross.connections > 0);
            cross.connections = cross.connections.saturating_sub(1);
        }
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
        let direction = place.direction as usize;
        let country = &mut self.countries.row(place.country).flows[direction];
        let port = &mut self.ports[direction].change(now_ns, place.port).flow;
        for flow in [country, port] {
            flow.received_bytes += received;
            flow.sent_bytes += sent;
            flow.retransmitted_segments += retransmitted;
        }
    }

    /// An active open never completed; it counts in its port's row if there
    /// is one already, since a row takes a completed handshake.
    pub(super) fn failed(
        &mut self,
        now_ns: u64,
        country: Country,
        port: u16,
        error: u32,
        segments_out: Option<u32>,
    ) {
        let reason = failures::failure_reason(error, segments_out) as usize;
        self.countries.row(country).failures[reason] += 1;
        let ports = self.ports(Direction::Outbound);
        let row = ports.existing(port);
        ports.change(now_ns, row).failures[reason] += 1;
    }

    /// An active handshake took this long.
    pub(super) fn connected_after(&mut self, country: Country, latency_ns: u64) {
        self.connect_latency.observe(latency_ns);
        add(&mut self.countries.row(country).connect_latency, latency_ns);
    }

    /// A passive connection waited this long for accept().
    pub(super) fn accepted_after(&mut self, now_ns: u64, place: Place, wait_ns: u64) {
        self.accept_wait.observe(wait_ns);
        let row = self.ports(place.direction).change(now_ns, place.port);
        add(&mut row.accept_wait, wait_ns);
    }

    /// A connection's smoothed round-trip time.
    pub(super) fn round_trip(&mut self, place: Place, rtt_ns: u64) {
        self.rtt[place.direction as usize].observe(rtt_ns);
        add(&mut self.countries.row(place.country).rtt, rtt_ns);
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
        self.cross
            .rows()
            .map(|row| CrossRow {
                country: row.country,
                port: self.ports[row.direction as usize].label(row.port_row),
                direction: row.direction,
                connections: row.connections,
                opened: row.opened,
            })
            .collect()
    }

    /// `connmon_series_overflow_total` and `connmon_series_evicted_total` of
    /// the port and cross families.
    pub(super) fn series_losses(&self) -> [(&'static str, u64, u64); 2] {
        let ports = |of: fn(&Ports) -> u64| self.ports.iter().map(of).sum();
        [
            ("country_port", self.cross.overflow, self.cross.evicted),
            (
                "port",
                ports(|ports| ports.overflow),
                ports(|ports| ports.evicted),
            ),
        ]
    }
}

fn add(sum: &mut Sum, value_ns: u64) {
    sum.count += 1;
    sum.sum_ns = sum.sum_ns.saturating_add(value_ns);
}

//! Counters by service port and direction, limited by `--ports.allow` and
//! `--ports.max`.

use super::dimension::{Dimension, OTHER, Rank, Value};
use super::snapshot::{Direction, PortLabel, PortRow, Sum};

/// A service port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Port(pub(super) u16);

impl Value for Port {
    type Extra = PortExtra;
}

/// What a port's row holds beside the counts of every dimension.
#[derive(Debug, Default)]
pub(super) struct PortExtra {
    pub(super) accept_wait: Sum,
    pub(super) close_wait: u64,
    /// CLOSE_WAIT rows of the audit in progress.
    pub(super) close_wait_next: u64,
}

/// A set of ports: 8 KiB.
#[derive(Clone, Debug)]
pub(super) struct PortSet(Box<[u64; 1024]>);

impl Default for PortSet {
    fn default() -> Self {
        Self(Box::new([0; 1024]))
    }
}

impl PortSet {
    /// The ports of inclusive ranges.
    pub(super) fn of_ranges(ranges: &[(u16, u16)]) -> Self {
        let mut set = Self::default();
        for port in ranges.iter().flat_map(|&(first, last)| first..=last) {
            set.insert(port);
        }
        set
    }

    pub(super) fn insert(&mut self, port: u16) {
        self.0[usize::from(port / 64)] |= 1 << (port % 64);
    }

    pub(super) fn contains(&self, port: u16) -> bool {
        self.0[usize::from(port / 64)] >> (port % 64) & 1 == 1
    }

    pub(super) fn clear(&mut self) {
        self.0.fill(0);
    }
}

/// The rows of one direction.
#[derive(Debug)]
pub(super) struct Ports {
    direction: Direction,
    pub(super) rows: Dimension<Port>,
    allow: Option<PortSet>,
    /// Ports that listened at the last audit, or have begun to since.
    listening: PortSet,
}

impl Ports {
    pub(super) fn new(direction: Direction, allow: Option<PortSet>, max: usize) -> Self {
        Self {
            direction,
            rows: Dimension::new(max),
            allow,
            listening: PortSet::default(),
        }
    }

    /// The row for a connection to `port`, and a row that ended for it.
    pub(super) fn row_for(&mut self, now_ns: u64, port: u16) -> (u16, Option<u16>) {
        let rank = if self.listening.contains(port) {
            Rank::Listening
        } else {
            Rank::Opened
        };
        let (row, ended) = self.row(now_ns, port, rank, rank);
        self.rows.overflow += u64::from(row == OTHER && self.may_have_row(port));
        (row, ended)
    }

    /// The row for a failed connect, which replaces only rows of ports to
    /// which every connect failed.
    pub(super) fn row_for_failure(&mut self, now_ns: u64, port: u16) -> (u16, Option<u16>) {
        self.row(now_ns, port, Rank::Failed, Rank::Failed)
    }

    /// Marks `port` as listening and makes its row, unless that would replace
    /// the row of another listening port. Returns the row that ended for it.
    pub(super) fn reserve(&mut self, now_ns: u64, port: u16) -> Option<u16> {
        self.listening.insert(port);
        self.row(now_ns, port, Rank::Listening, Rank::Opened).1
    }

    fn row(&mut self, now_ns: u64, port: u16, rank: Rank, over: Rank) -> (u16, Option<u16>) {
        if !self.may_have_row(port) {
            return (OTHER, None);
        }
        self.rows.row_for(now_ns, Port(port), rank, Some(over))
    }

    fn may_have_row(&self, port: u16) -> bool {
        self.direction != Direction::Unknown
            && self.allow.as_ref().is_none_or(|allow| allow.contains(port))
    }

    /// Sets the listening ports to those of a finished audit.
    pub(super) fn set_listening(&mut self, ports: &PortSet) {
        self.listening.0.copy_from_slice(&ports.0[..]);
        for (port, row) in self.rows.rows_mut() {
            let Some(Port(port)) = port else { continue };
            if self.listening.contains(port) {
                row.rank = Rank::Listening;
            } else if row.rank == Rank::Listening {
                row.rank = Rank::Opened;
            }
        }
    }

    /// The label of a row.
    pub(super) fn label(&self, row: u16) -> PortLabel {
        self.rows.value(row).into()
    }

    pub(super) fn snapshot(&self) -> impl Iterator<Item = PortRow> {
        let direction = self.direction;
        self.rows.rows().map(move |(port, row)| PortRow {
            port: port.into(),
            direction,
            flow: row.counts.flows[direction as usize],
            close_wait: row.extra.close_wait,
            failures: (direction == Direction::Outbound).then_some(row.counts.failures),
            accept_wait: (direction == Direction::Inbound).then_some(row.extra.accept_wait),
        })
    }
}

impl From<Option<Port>> for PortLabel {
    fn from(port: Option<Port>) -> Self {
        port.map_or(Self::Other, |Port(port)| Self::Port(port))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn inbound(max: usize) -> Ports {
        Ports::new(Direction::Inbound, None, max)
    }

    impl Ports {
        fn existing(&self, port: u16) -> u16 {
            self.rows.find(Port(port)).unwrap_or(OTHER)
        }
    }

    #[test]
    fn listening_ports_come_first() {
        let mut ports = inbound(2);
        assert_eq!(ports.reserve(0, 80), None);
        ports.row_for(0, 5000);
        assert_eq!(ports.row_for(600 * S, 6000).0, ports.existing(6000));
        assert_ne!(ports.existing(80), OTHER, "5000 went, though 80 is as idle");
        assert_eq!(ports.existing(5000), OTHER);
        assert_eq!(ports.row_for(1200 * S, 6001).0, ports.existing(6001));
        let row = ports.existing(6001);
        ports.rows.change(1200 * S, row, |counts| counts.live += 1);
        assert_eq!(ports.row_for(9999 * S, 6002), (OTHER, None), "80 listens");
        assert_eq!(ports.reserve(9999 * S, 443), None);
        assert_eq!(
            ports.existing(443),
            OTHER,
            "reserving does not push out another listener"
        );
        assert_ne!(ports.row_for(9999 * S, 443).0, OTHER, "a connection does");
        assert_eq!(ports.existing(80), OTHER);
    }

    #[test]
    fn a_port_that_no_longer_listens_gives_way() {
        let mut ports = inbound(1);
        ports.reserve(0, 80);
        assert_eq!(ports.row_for(600 * S, 6000), (OTHER, None));
        ports.set_listening(&PortSet::default());
        assert_ne!(ports.row_for(600 * S, 6000).0, OTHER);
    }

    #[test]
    fn a_row_that_fell_idle_later_goes_before_a_listening_one() {
        let mut ports = inbound(2);
        ports.reserve(0, 80);
        let (row, _) = ports.row_for(0, 5000);
        ports.rows.change(300 * S, row, |_| {});
        assert_eq!(ports.row_for(600 * S, 6000), (OTHER, None), "80 listens");
        assert_eq!(ports.row_for(1000 * S, 6000), (row, Some(row)));
        assert_ne!(ports.existing(80), OTHER);
        // As for a port that listens itself, though 80 is idle.
        let mut ports = inbound(2);
        ports.reserve(0, 80);
        let (row, _) = ports.row_for(0, 5000);
        ports.rows.change(300 * S, row, |_| {});
        assert_eq!(ports.row_for(600 * S, 6000), (OTHER, None));
        ports.reserve(700 * S, 443);
        assert_eq!(ports.row_for(1000 * S, 443), (row, Some(row)));
        assert_ne!(ports.existing(80), OTHER);
    }

    #[test]
    fn the_allow_list_is_no_overflow() {
        let allow = PortSet::of_ranges(&[(22, 22), (8000, 8002)]);
        let mut ports = Ports::new(Direction::Outbound, Some(allow), 10);
        assert_eq!(ports.row_for(0, 23), (OTHER, None));
        assert_ne!(ports.row_for(0, 8002).0, OTHER);
        assert_eq!(ports.row_for(0, 8003), (OTHER, None));
        assert_eq!(ports.rows.overflow, 0);
    }

    #[test]
    fn every_port_at_once_stays_bounded() {
        let mut ports = inbound(128);
        for round in 0..3u64 {
            for port in 0..=u16::MAX {
                ports.row_for(round * 700 * S, port);
            }
        }
        let rows: Vec<_> = ports.snapshot().collect();
        assert_eq!(rows.len(), 129);
        assert_eq!(rows[0].port, PortLabel::Other);
    }

    #[test]
    fn a_scan_of_closed_ports_takes_no_used_row() {
        let mut ports = Ports::new(Direction::Outbound, None, 128);
        for port in 1..=100 {
            ports.row_for(0, port);
        }
        for round in 1..4u64 {
            for port in 0..=u16::MAX {
                let (row, _) = ports.row_for_failure(round * 700 * S, port);
                let now_ns = round * 700 * S;
                ports
                    .rows
                    .change(now_ns, row, |counts| counts.failures[0] += 1);
            }
        }
        assert!((1..=100).all(|port| ports.existing(port) != OTHER));
        assert_eq!(ports.rows.rows().count(), 129);
        assert_eq!(ports.rows.overflow, 0, "no connection lacks a row");
        // A port that is reached takes an idle row of one that is not.
        let (row, ended) = ports.row_for(9_999 * S, 443);
        assert_eq!((row, ended), (ports.existing(443), Some(row)));
    }
}

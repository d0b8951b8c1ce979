//! `--metrics.country-port`: counters by country, port and direction.
//!
//! Each pair of country and direction has a row for `other` from its first
//! connection, so that no row ends for another; the rest of [`MAX_ROWS`] are
//! for single ports. The port label is that of the connection's port row, or
//! `other` if the port is not listed. A row ends with its port row.

use super::CrossFamilies;
use super::dimension::{Dimension, NO_ROW, OTHER, Rank, Value};
use super::ports::PortSet;
use super::snapshot::{DIRECTIONS, Direction};
use crate::geo::Country;

/// Most label sets.
const MAX_ROWS: usize = 2000;

/// Most label sets with a single port.
const MAX_PORT_ROWS: usize = MAX_ROWS - Country::COUNT * DIRECTIONS;

/// The labels of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct CountryPort {
    pub(super) country: Country,
    pub(super) direction: Direction,
    pub(super) port_row: u16,
}

impl Value for CountryPort {
    type Extra = ();
}

/// The rows by country and port.
#[derive(Debug)]
pub(super) struct Cross {
    pub(super) enabled: bool,
    /// Listed ports; `None` lists all.
    listed: Option<PortSet>,
    pub(super) rows: Dimension<CountryPort>,
}

impl Cross {
    pub(super) fn new(families: &CrossFamilies) -> Self {
        Self {
            enabled: *families != CrossFamilies::Off,
            listed: match families {
                CrossFamilies::Off | CrossFamilies::All => None,
                CrossFamilies::Ports(ranges) => Some(PortSet::of_ranges(ranges)),
            },
            rows: Dimension::new(MAX_PORT_ROWS),
        }
    }

    /// The row of a connection; [`NO_ROW`] if the families are off.
    pub(super) fn row_for(
        &mut self,
        now_ns: u64,
        country: Country,
        direction: Direction,
        port: u16,
        port_row: u16,
    ) -> u16 {
        if !self.enabled {
            return NO_ROW;
        }
        let labels = |port_row| CountryPort {
            country,
            direction,
            port_row,
        };
        let listed = self.listed.as_ref().is_none_or(|set| set.contains(port));
        if listed && port_row != OTHER {
            let own = labels(port_row);
            let (row, _) = self.rows.row_for(now_ns, own, Rank::Opened, None);
            if row != OTHER {
                return row;
            }
            self.rows.overflow += 1;
        }
        self.rows.pin(now_ns, labels(OTHER))
    }

    /// Ends the rows of a port row that ended.
    pub(super) fn end_port_row(&mut self, direction: Direction, port_row: u16) {
        self.rows
            .end_where(|row| row.direction == direction && row.port_row == port_row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn label_sets_are_bounded_and_all_are_counted() {
        let mut cross = Cross::new(&CrossFamilies::All);
        let mut opened = |country, direction, port_row| {
            let row = cross.row_for(0, country, direction, port_row, port_row);
            cross.rows.change(0, row, |counts| {
                counts.flows[direction as usize].opened += 1;
            });
        };
        for port_row in 1..=100 {
            for index in 0..Country::COUNT {
                for direction in [Direction::Inbound, Direction::Outbound] {
                    opened(Country::from_index(index).unwrap(), direction, port_row);
                }
            }
        }
        for index in 0..Country::COUNT {
            opened(
                Country::from_index(index).unwrap(),
                Direction::Unknown,
                OTHER,
            );
        }
        let rows = cross
            .rows
            .rows()
            .filter_map(|(value, row)| value.map(|_| row));
        let opened: Vec<u64> = rows
            .map(|row| row.counts.flows.iter().map(|flow| flow.opened).sum())
            .collect();
        assert!((1900..=MAX_ROWS).contains(&opened.len()));
        assert_eq!(opened.iter().sum::<u64>(), Country::COUNT as u64 * 201);
        assert!(cross.rows.overflow > 0);
    }

    #[test]
    fn unlisted_ports_are_other_and_off_is_no_row() {
        let mut cross = Cross::new(&CrossFamilies::Ports(vec![(443, 443)]));
        let us = Country::from_code("US");
        let listed = cross.row_for(0, us, Direction::Outbound, 443, 7);
        let other = cross.row_for(0, us, Direction::Outbound, 80, 8);
        assert_eq!(cross.rows.value(listed).unwrap().port_row, 7);
        assert_eq!(cross.rows.value(other).unwrap().port_row, OTHER);
        let mut off = Cross::new(&CrossFamilies::Off);
        assert_eq!(off.row_for(0, us, Direction::Outbound, 443, 7), NO_ROW);
    }

    #[test]
    fn rows_end_with_their_port_row() {
        let mut cross = Cross::new(&CrossFamilies::All);
        let us = Country::from_code("US");
        let gone = cross.row_for(0, us, Direction::Inbound, 80, 1);
        let kept = cross.row_for(0, us, Direction::Outbound, 80, 1);
        cross.end_port_row(Direction::Inbound, 1);
        assert!(cross.rows.value(gone).is_none() && cross.rows.value(kept).is_some());
        assert_eq!(cross.rows.evicted, 1);
        assert_eq!(cross.row_for(0, us, Direction::Inbound, 81, 1), gone);
    }
}

//! `--metrics.country-port`: what is counted per country, port and direction.
//!
//! At most [`MAX_ROWS`] label sets: each of the `Country::COUNT` × directions
//! pairs keeps a place for its `other`, the rest are for ports of their own,
//! so a connection always finds a row and no row ever has to go for another.
//! The port label is that of the connection's port row (so `--ports.allow` and
//! `--ports.max` hold here too), or `other` where the port is not listed; a
//! row ends together with its port row.

use std::collections::HashMap;

use super::CrossFamilies;
use super::ports::{OTHER, PortSet};
use super::snapshot::{DIRECTIONS, Direction};
use super::table::NO_CROSS;
use crate::geo::Country;

/// Most label sets of the cross families.
const MAX_ROWS: usize = 2000;

/// Most of them with a port of their own.
const MAX_PORT_ROWS: usize = MAX_ROWS - Country::COUNT * DIRECTIONS;

/// One row; its label is (country, direction, port row).
#[derive(Clone, Debug)]
pub(super) struct CrossCounters {
    pub(super) country: Country,
    pub(super) direction: Direction,
    pub(super) port_row: u16,
    pub(super) connections: u64,
    pub(super) opened: u64,
}

/// The cross families' rows.
#[derive(Debug)]
pub(super) struct Cross {
    enabled: bool,
    /// Listed ports; `None` lists all.
    listed: Option<PortSet>,
    rows: Vec<Option<CrossCounters>>,
    free: Vec<u16>,
    index: HashMap<(Country, Direction, u16), u16>,
    port_rows: usize,
    pub(super) overflow: u64,
    pub(super) evicted: u64,
}

impl Cross {
    pub(super) fn new(families: &CrossFamilies) -> Self {
        Self {
            enabled: *families != CrossFamilies::Off,
            listed: match families {
                CrossFamilies::Off | CrossFamilies::All => None,
                CrossFamilies::Ports(ranges) => Some(PortSet::of_ranges(ranges)),
            },
            rows: Vec::new(),
            free: Vec::new(),
            index: HashMap::new(),
            port_rows: 0,
            overflow: 0,
            evicted: 0,
        }
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// The row of a connection, [`NO_CROSS`] where the families are off.
    pub(super) fn row_for(
        &mut self,
        country: Country,
        direction: Direction,
        port: u16,
        port_row: u16,
    ) -> u16 {
        if !self.enabled {
            return NO_CROSS;
        }
        let mut port_row = port_row;
        if self.listed.as_ref().is_some_and(|set| !set.contains(port)) {
            port_row = OTHER;
        }
        if let Some(&row) = self.index.get(&(country, direction, port_row)) {
            return row;
        }
        if port_row != OTHER && self.port_rows >= MAX_PORT_ROWS {
            self.overflow += 1;
            port_row = OTHER;
            if let Some(&row) = self.index.get(&(country, direction, OTHER)) {
                return row;
            }
        }
        self.port_rows += usize::from(port_row != OTHER);
        let counters = Some(CrossCounters {
            country,
            direction,
            port_row,
            connections: 0,
            opened: 0,
        });
        let row = match self.free.pop() {
            Some(row) => {
                self.rows[usize::from(row)] = counters;
                row
            }
            None => {
                self.rows.push(counters);
                (self.rows.len() - 1) as u16
            }
        };
        self.index.insert((country, direction, port_row), row);
        row
    }

    /// A row's counters; `None` for [`NO_CROSS`].
    pub(super) fn row(&mut self, row: u16) -> Option<&mut CrossCounters> {
        self.rows.get_mut(usize::from(row))?.as_mut()
    }

    /// A port row ended, and with it its cross rows.
    pub(super) fn end_port_row(&mut self, direction: Direction, port_row: u16) {
        if !self.enabled {
            return;
        }
        for (number, row) in (0u16..).zip(&mut self.rows) {
            let Some(ended) =
                row.take_if(|row| row.direction == direction && row.port_row == port_row)
            else {
                continue;
            };
            debug_assert_eq!(ended.connections, 0);
            self.index.remove(&(ended.country, direction, port_row));
            self.free.push(number);
            self.port_rows -= 1;
            self.evicted += 1;
        }
    }

    pub(super) fn rows(&self) -> impl Iterator<Item = &CrossCounters> {
        self.rows.iter().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_thousand_label_sets_are_the_end_and_every_connection_has_a_row() {
        let mut cross = Cross::new(&CrossFamilies::All);
        for port_row in 1..=100 {
            for index in 0..Country::COUNT {
                for direction in [Direction::Inbound, Direction::Outbound] {
                    let country = Country::from_index(index).unwrap();
                    let row = cross.row_for(country, direction, port_row, port_row);
                    cross.row(row).unwrap().opened += 1;
                }
            }
        }
        for index in 0..Country::COUNT {
            let country = Country::from_index(index).unwrap();
            let row = cross.row_for(country, Direction::Unknown, 0, OTHER);
            cross.row(row).unwrap().opened += 1;
        }
        let count = cross.rows().count();
        assert!((1900..=MAX_ROWS).contains(&count), "{count}");
        let opened: u64 = cross.rows().map(|row| row.opened).sum();
        assert_eq!(opened as usize, Country::COUNT * 201);
        assert!(cross.overflow > 0);
    }

    #[test]
    fn unlisted_ports_are_other_and_off_is_nothing() {
        let mut cross = Cross::new(&CrossFamilies::Ports(vec![(443, 443)]));
        let us = Country::from_code("US");
        let listed = cross.row_for(us, Direction::Outbound, 443, 7);
        let other = cross.row_for(us, Direction::Outbound, 80, 8);
        assert_eq!(cross.row(listed).unwrap().port_row, 7);
        assert_eq!(cross.row(other).unwrap().port_row, OTHER);
        let mut off = Cross::new(&CrossFamilies::Off);
        assert_eq!(off.row_for(us, Direction::Outbound, 443, 7), NO_CROSS);
        assert!(off.row(NO_CROSS).is_none() && cross.row(NO_CROSS).is_none());
    }

    #[test]
    fn rows_end_with_their_port_row() {
        let mut cross = Cross::new(&CrossFamilies::All);
        let us = Country::from_code("US");
        let gone = cross.row_for(us, Direction::Inbound, 80, 1);
        let kept = cross.row_for(us, Direction::Outbound, 80, 1);
        cross.end_port_row(Direction::Inbound, 1);
        assert!(cross.row(gone).is_none() && cross.row(kept).is_some());
        assert_eq!(cross.evicted, 1);
        assert_eq!(cross.row_for(us, Direction::Inbound, 81, 1), gone);
    }
}

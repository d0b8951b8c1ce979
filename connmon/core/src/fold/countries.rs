//! Counters by country. Every country has a row from the start; one is
//! exported from when something is first counted in it.

use super::dimension::{Dimension, Index, Rank, Row, Value};
use super::snapshot::{CountryRow, Sum};
use crate::geo::Country;

impl Value for Country {
    type Index = CountryIndex;
    type Extra = CountryExtra;
}

/// What a country's row holds beside flows and failures.
#[derive(Debug, Default)]
pub(super) struct CountryExtra {
    pub(super) connect_latency: Sum,
    pub(super) rtt: Sum,
    seen: bool,
}

/// Row by country: rows are made in the order of [`Country::index`].
#[derive(Debug, Default)]
pub(super) struct CountryIndex {
    rows: u16,
}

impl Index<Country> for CountryIndex {
    fn get(&self, country: Country) -> u16 {
        let row = row_of(country);
        if row <= self.rows {
            row
        } else {
            super::dimension::OTHER
        }
    }

    fn set(&mut self, _: Country, row: u16) {
        self.rows = self.rows.max(row);
    }
}

fn row_of(country: Country) -> u16 {
    country.index() as u16 + 1
}

/// All countries.
#[derive(Debug)]
pub(super) struct Countries(Dimension<Country>);

impl Countries {
    pub(super) fn new() -> Self {
        let mut rows = Dimension::new(Country::COUNT);
        for country in (0..Country::COUNT).filter_map(Country::from_index) {
            rows.row_for(0, country, Rank::Opened, None);
        }
        Self(rows)
    }

    /// The counters of a country, which is exported from now on.
    pub(super) fn change(&mut self, now_ns: u64, country: Country) -> &mut Row<Country> {
        let row = self.0.change(now_ns, row_of(country));
        row.extra.seen = true;
        row
    }

    pub(super) fn snapshot(&self) -> Vec<CountryRow> {
        self.0
            .rows()
            .filter(|(_, row)| row.extra.seen)
            .filter_map(|(country, row)| {
                Some(CountryRow {
                    country: country?,
                    flows: row.flows,
                    failures: row.failures,
                    connect_latency: row.extra.connect_latency,
                    rtt: row.extra.rtt,
                })
            })
            .collect()
    }
}

//! Counters by country. Every country has a row from the start; one is
//! exported once something was counted in it.

use super::dimension::{Dimension, NEVER, Value};
use super::snapshot::{CountryRow, Sum};
use crate::geo::Country;

impl Value for Country {
    type Extra = CountryExtra;
}

/// What a country's row holds beside the counts of every dimension.
#[derive(Debug, Default)]
pub(super) struct CountryExtra {
    pub(super) connect_latency: Sum,
    pub(super) rtt: Sum,
}

pub(super) fn new() -> Dimension<Country> {
    Dimension::fixed((0..Country::COUNT).filter_map(Country::from_index))
}

/// The row of a country, which needs no search.
pub(super) fn row_of(country: Country) -> u16 {
    country.index() as u16 + 1
}

pub(super) fn snapshot(rows: &Dimension<Country>) -> Vec<CountryRow> {
    rows.rows()
        .filter(|(_, row)| row.counts.changed_ns != NEVER)
        .filter_map(|(country, row)| {
            Some(CountryRow {
                country: country?,
                flows: row.counts.flows,
                failures: row.counts.failures,
                connect_latency: row.extra.connect_latency,
                rtt: row.extra.rtt,
            })
        })
        .collect()
}

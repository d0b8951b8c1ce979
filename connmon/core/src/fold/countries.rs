//! What is counted per country.

use super::snapshot::{CountryRow, DIRECTIONS, FailureReason, Flow, Sum};
use crate::geo::Country;

/// One country's counters.
#[derive(Clone, Debug, Default)]
pub(super) struct CountryCounters {
    pub(super) flows: [Flow; DIRECTIONS],
    pub(super) failures: [u64; FailureReason::COUNT],
    pub(super) connect_latency: Sum,
    pub(super) rtt: Sum,
    /// Its row exists, for ever.
    seen: bool,
}

/// All countries; bounded by [`Country::COUNT`].
#[derive(Debug)]
pub(super) struct Countries {
    rows: Vec<CountryCounters>,
}

impl Countries {
    pub(super) fn new() -> Self {
        Self {
            rows: vec![CountryCounters::default(); Country::COUNT],
        }
    }

    /// The counters of a country, which exists from now on.
    pub(super) fn row(&mut self, country: Country) -> &mut CountryCounters {
        let row = &mut self.rows[country.index()];
        row.seen = true;
        row
    }

    pub(super) fn snapshot(&self) -> Vec<CountryRow> {
        self.rows
            .iter()
            .enumerate()
            .filter(|(_, row)| row.seen)
            .filter_map(|(index, row)| {
                Some(CountryRow {
                    country: Country::from_index(index)?,
                    flows: row.flows,
                    failures: row.failures,
                    connect_latency: row.connect_latency,
                    rtt: row.rtt,
                })
            })
            .collect()
    }
}

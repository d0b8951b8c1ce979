//! Numbers → table: medians, spread, verdicts.

use serde::Serialize;

/// One measured row.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What was measured.
    pub what: String,
    /// What must be reached, in words; empty where there is no bound.
    pub target: String,
    /// What was.
    pub measured: String,
    /// Whether the bound holds; `None` for context.
    pub reached: Option<bool>,
}

impl Row {
    /// A row with a bound.
    pub fn bound(
        what: impl Into<String>,
        target: impl Into<String>,
        measured: impl Into<String>,
        reached: bool,
    ) -> Self {
        Self {
            what: what.into(),
            target: target.into(),
            measured: measured.into(),
            reached: Some(reached),
        }
    }

    /// A row that stands beside another.
    pub fn context(what: impl Into<String>, measured: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            target: String::new(),
            measured: measured.into(),
            reached: None,
        }
    }
}

/// Minimum, median and maximum of a sample.
#[derive(Clone, Copy, Debug)]
pub struct Spread {
    /// Smallest.
    pub min: f64,
    /// Middle.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one number.
    pub fn of(numbers: &[f64]) -> Self {
        Self {
            min: quantile(numbers, 0.0),
            median: quantile(numbers, 0.5),
            max: quantile(numbers, 1.0),
        }
    }
}

/// The value below which a share of the sample lies; NaN of nothing.
pub fn quantile(numbers: &[f64], share: f64) -> f64 {
    let mut sorted = numbers.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count => sorted[((count - 1) as f64 * share).round() as usize],
    }
}

/// The Markdown table.
pub fn markdown(rows: &[Row]) -> String {
    let mut text = String::from("| what | must reach | measured | reached |\n|---|---|---|---|\n");
    for row in rows {
        let reached = match row.reached {
            Some(true) => "yes",
            Some(false) => "**no**",
            None => "",
        };
        text += &format!(
            "| {} | {} | {} | {reached} |\n",
            row.what, row.target, row.measured
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_small_samples() {
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.5), 2.0);
        assert_eq!(quantile(&[3.0, 1.0, 2.0], 0.99), 3.0);
        assert!(quantile(&[], 0.5).is_nan());
    }
}

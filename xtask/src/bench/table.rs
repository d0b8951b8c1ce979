//! Numbers to rows of a table: medians, spread, bounds.

use serde::{Deserialize, Serialize};

/// One measured row.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Row {
    /// Set by the bench: the section that measured it.
    pub section: String,
    /// What was measured.
    pub what: String,
    /// The bound, in words; empty where there is none.
    pub target: String,
    /// What came out.
    pub measured: String,
    /// Whether the bound holds; `None` without one.
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
            target: target.into(),
            reached: Some(reached),
            ..Self::context(what, measured)
        }
    }

    /// A row without a bound, to compare others with.
    pub fn context(what: impl Into<String>, measured: impl Into<String>) -> Self {
        Self {
            section: String::new(),
            what: what.into(),
            target: String::new(),
            measured: measured.into(),
            reached: None,
        }
    }
}

/// The middle of the numbers.
pub fn median(numbers: &[f64]) -> f64 {
    quantile(numbers, 0.5)
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

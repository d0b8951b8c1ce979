//! Rows of one metric family that outlive a scrape: the `prometheus` crate
//! writes the lines of a row when it appears; a scrape writes numbers.

use std::io::Write as _;

use connmon_core::fold;
use prometheus::TextEncoder;
use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType, Summary,
};

use super::families::{Family, Kind};

/// How far ahead a row is looked for before it counts as new.
const LOOK_AHEAD: usize = 16;

/// A family and its rows. A scrape goes through them in order: [`Rows::begin`],
/// one call for each row, [`Rows::end`], [`Rows::encode`].
#[derive(Debug)]
pub struct Rows {
    family: &'static Family,
    /// The HELP and TYPE lines; empty until there is a row.
    header: String,
    rows: Vec<Row>,
    /// Those of `rows` that have no lines yet, in their order, their numbers
    /// all 0.
    new: Vec<Metric>,
    /// The numbers of this scrape, one for each line of the rows.
    values: Vec<f64>,
    next: usize,
}

/// One metric.
#[derive(Debug)]
struct Row {
    /// The values of its labels, by which it is found.
    labels: Box<[String]>,
    /// Its lines without their numbers, one newline between two; empty until
    /// the end of the scrape that brings it.
    lines: Box<str>,
}

impl Rows {
    /// No rows yet.
    pub fn new(family: &'static Family) -> Self {
        Self {
            family,
            header: String::new(),
            rows: Vec::new(),
            new: Vec::new(),
            values: Vec::new(),
            next: 0,
        }
    }

    /// Starts a scrape.
    pub fn begin(&mut self) {
        self.next = 0;
        self.values.clear();
    }

    /// Drops the rows this scrape did not mention and writes the new ones'
    /// lines.
    pub fn end(&mut self) {
        self.rows.truncate(self.next);
        if !self.new.is_empty() {
            self.write_lines();
        }
    }

    /// Appends the family's text; nothing without rows, since a family without
    /// samples is not exposed.
    pub fn encode(&self, text: &mut Vec<u8>) {
        if self.rows.is_empty() {
            return;
        }
        text.extend_from_slice(self.header.as_bytes());
        let mut values = self.values.iter();
        for row in &self.rows {
            for (line, value) in row.lines.split('\n').zip(&mut values) {
                text.extend_from_slice(line.as_bytes());
                number(*value, text);
                text.push(b'\n');
            }
        }
    }

    /// A counter or a gauge.
    pub fn value(&mut self, labels: &[&str], value: f64) {
        self.row(labels, &[]);
        self.values.push(value);
    }

    /// A summary without quantiles.
    pub fn summary(&mut self, labels: &[&str], sum: fold::Sum) {
        self.row(labels, &[]);
        self.values
            .extend_from_slice(&[seconds(sum.sum_ns), sum.count as f64]);
    }

    /// A histogram, of the same bounds for as long as the row is there.
    pub fn histogram(&mut self, labels: &[&str], histogram: &fold::Histogram) {
        self.row(labels, histogram.bounds_ns);
        let mut cumulative = 0;
        for (_, count) in histogram.bounds_ns.iter().zip(&histogram.counts) {
            cumulative += count;
            self.values.push(cumulative as f64);
        }
        let count = histogram.counts.iter().sum::<u64>() as f64;
        self.values
            .extend_from_slice(&[count, seconds(histogram.sum_ns), count]);
    }

    /// Finds or makes the next row.
    fn row(&mut self, labels: &[&str], bounds_ns: &[u64]) {
        let at = self.next;
        self.next += 1;
        let mut ahead = self.rows.iter().skip(at).take(LOOK_AHEAD);
        match ahead.position(|old| *old.labels == *labels) {
            Some(0) => {}
            Some(gone) => drop(self.rows.drain(at..at + gone)),
            None => {
                self.new.push(metric(self.family, labels, bounds_ns));
                let row = Row {
                    labels: labels.iter().map(|label| (*label).to_owned()).collect(),
                    lines: Box::default(),
                };
                self.rows.insert(at, row);
            }
        }
    }

    /// What the encoder writes, without the numbers.
    fn write_lines(&mut self) {
        let new = std::mem::take(&mut self.new);
        let rows = new.len();
        let mut text = String::new();
        // Fails for a family without name or metric, and there are none.
        if let Err(error) = TextEncoder::new().encode_utf8(&[family(self.family, new)], &mut text) {
            log::error!("cannot encode {}: {error}", self.family.name);
        }
        let mut lines = text.split_inclusive('\n');
        self.header = lines.by_ref().take(2).collect();
        let lines: Vec<&str> = lines.filter_map(|line| line.strip_suffix("0\n")).collect();
        // All rows of a family have as many.
        let mut lines = lines.chunks((lines.len() / rows).max(1));
        for row in self.rows.iter_mut().filter(|row| row.lines.is_empty()) {
            row.lines = lines.next().unwrap_or_default().join("\n").into();
        }
    }
}

/// A metric, its numbers all 0.
fn metric(family: &Family, labels: &[&str], bounds_ns: &[u64]) -> Metric {
    debug_assert_eq!(labels.len(), family.labels.len(), "{}", family.name);
    let pair = |(name, value): (&&str, &&str)| {
        let mut pair = LabelPair::default();
        pair.set_name((*name).to_owned());
        pair.set_value((*value).to_owned());
        pair
    };
    let pairs = family.labels.iter().zip(labels).map(pair).collect();
    let mut metric = Metric::from_label(pairs);
    match family.kind {
        Kind::Counter => metric.set_counter(Counter::default()),
        Kind::Gauge => metric.set_gauge(Gauge::default()),
        Kind::Summary => metric.set_summary(Summary::default()),
        Kind::Histogram => {
            let bucket = |bound: &u64| {
                let mut bucket = Bucket::default();
                bucket.set_upper_bound(seconds(*bound));
                bucket
            };
            let mut histogram = Histogram::default();
            histogram.set_bucket(bounds_ns.iter().map(bucket).collect());
            metric.set_histogram(histogram);
        }
    }
    metric
}

fn family(family: &Family, metrics: Vec<Metric>) -> MetricFamily {
    let mut proto = MetricFamily::default();
    proto.set_name(family.name.to_owned());
    proto.set_help(family.help.to_owned());
    proto.set_field_type(match family.kind {
        Kind::Counter => MetricType::COUNTER,
        Kind::Gauge => MetricType::GAUGE,
        Kind::Summary => MetricType::SUMMARY,
        Kind::Histogram => MetricType::HISTOGRAM,
    });
    proto.set_metric(metrics);
    proto
}

/// Whole numbers below this are the same as `f64` and as `u64`.
const EXACT: f64 = (1_u64 << 53) as f64;

/// Writes a number as the encoder does, which is as `f64` is displayed.
fn number(value: f64, text: &mut Vec<u8>) {
    if value.is_sign_positive() && value < EXACT && value.fract() == 0.0 {
        text.extend_from_slice(itoa::Buffer::new().format(value as u64).as_bytes());
    } else {
        // Writing to memory does not fail.
        let _ = write!(text, "{value}");
    }
}

/// Nanoseconds as seconds, correctly rounded.
pub fn seconds(ns: impl Into<u128>) -> f64 {
    ns.into() as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expose::families::Id;

    /// The text at the end of a scrape.
    fn ended(rows: &mut Rows) -> String {
        rows.end();
        let mut text = Vec::new();
        rows.encode(&mut text);
        String::from_utf8(text).unwrap()
    }

    fn scrape(rows: &mut Rows, wanted: &[u64], built: &mut usize) -> Vec<(String, f64)> {
        rows.begin();
        for key in wanted {
            rows.value(&[&key.to_string()], *key as f64);
        }
        *built = rows.new.len();
        let text = ended(rows);
        let samples = text.lines().filter(|line| !line.starts_with('#'));
        samples
            .map(|line| {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let label = series.split('"').nth(1).unwrap();
                (label.to_owned(), value.parse().unwrap())
            })
            .collect()
    }

    #[test]
    fn labels_are_built_once_and_always_fit_their_row() {
        let mut rows = Rows::new(Id::NetworkNamespaces.family());
        let sets: [&[u64]; 9] = [
            &[1, 2, 3, 4, 5],
            &[1, 2, 3, 4, 5],
            &[1, 3, 5],
            &[0, 1, 2, 3, 4, 5, 6],
            &[],
            &[9],
            &[5, 4, 3, 2, 1],
            &[1, 2, 3, 4, 5],
            &[2, 7, 4],
        ];
        for wanted in sets {
            let mut built = 0;
            let expected: Vec<_> = wanted.iter().map(|k| (k.to_string(), *k as f64)).collect();
            assert_eq!(scrape(&mut rows, wanted, &mut built), expected);
            assert!(built <= wanted.len());
            // Nothing changed, so nothing is built.
            built = 0;
            assert_eq!(scrape(&mut rows, wanted, &mut built), expected);
            assert_eq!(built, 0);
        }
        // One row more or less does not rebuild its neighbours.
        let many: Vec<u64> = (0..1_000).collect();
        let mut built = 0;
        scrape(&mut rows, &many, &mut built);
        let without: Vec<u64> = many.iter().copied().filter(|key| *key != 500).collect();
        built = 0;
        scrape(&mut rows, &without, &mut built);
        assert_eq!(built, 0);
        scrape(&mut rows, &many, &mut built);
        assert_eq!(built, 1);
    }

    /// What the encoder writes of the same row with its numbers in place.
    fn by_the_crate(id: Id, labels: &[&str], fill: impl FnOnce(&mut Metric)) -> String {
        let family = id.family();
        let bounds: &[u64] = match family.kind {
            Kind::Histogram => &BOUNDS,
            _ => &[],
        };
        let mut metric = metric(family, labels, bounds);
        fill(&mut metric);
        let proto = super::family(family, vec![metric]);
        TextEncoder::new().encode_to_string(&[proto]).unwrap()
    }

    const BOUNDS: [u64; 3] = [1_000_000, 2_500_000, 10_000_000_000];

    const HOSTILE: [&str; 6] = [
        "",
        "0",
        "a\"b",
        "back\\slash",
        "two\nlines\r0\n",
        "\u{1f980}} 0",
    ];

    #[test]
    fn rows_match_the_encoder() {
        let numbers = [
            0.0,
            -0.0,
            1.0,
            -7.0,
            0.1,
            1.5e-9,
            1_761_955_200.25,
            EXACT - 1.0,
            EXACT,
            EXACT + 2.0,
            u64::MAX as f64,
            1e300,
            f64::INFINITY,
            f64::NAN,
        ];
        for label in HOSTILE {
            for number in numbers {
                let labels = [label, "direction"];
                let mut rows = Rows::new(Id::PortConnections.family());
                rows.value(&labels, number);
                let text = ended(&mut rows);
                let expected = by_the_crate(Id::PortConnections, &labels, |metric| {
                    let mut gauge = Gauge::default();
                    gauge.set_value(number);
                    metric.set_gauge(gauge);
                });
                assert_eq!(text, expected);
            }
        }
    }

    #[test]
    fn sums_and_histograms_match_the_encoder() {
        for label in HOSTILE {
            let sum = fold::Sum {
                count: 12,
                sum_ns: 3_456_789_012,
            };
            let mut rows = Rows::new(Id::PortAcceptWait.family());
            rows.summary(&[label], sum);
            let text = ended(&mut rows);
            let expected = by_the_crate(Id::PortAcceptWait, &[label], |metric| {
                let mut summary = Summary::default();
                summary.set_sample_count(sum.count);
                summary.set_sample_sum(seconds(sum.sum_ns));
                metric.set_summary(summary);
            });
            assert_eq!(text, expected);

            let histogram = fold::Histogram {
                bounds_ns: &BOUNDS,
                counts: vec![3, 0, 4, 5],
                sum_ns: 17_000_000_001,
            };
            let mut rows = Rows::new(Id::Rtt.family());
            rows.histogram(&[label], &histogram);
            let text = ended(&mut rows);
            let expected = by_the_crate(Id::Rtt, &[label], |metric| {
                let mut proto = Histogram::default();
                let cumulative = BOUNDS.iter().zip([3, 3, 7]);
                let buckets = cumulative.map(|(bound, count)| {
                    let mut bucket = Bucket::default();
                    bucket.set_upper_bound(seconds(*bound));
                    bucket.set_cumulative_count(count);
                    bucket
                });
                proto.set_bucket(buckets.collect());
                proto.set_sample_count(12);
                proto.set_sample_sum(seconds(histogram.sum_ns));
                metric.set_histogram(proto);
            });
            assert_eq!(text, expected);
        }
    }
}

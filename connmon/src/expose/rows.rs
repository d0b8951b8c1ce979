//! Rows of one metric family that outlive a scrape: values are updated in
//! place, labels are built only when a row appears.

use prometheus::proto::{
    Bucket, Counter, Gauge, Histogram, LabelPair, Metric, MetricFamily, MetricType, Summary,
};

use super::families::{Family, Kind};
use crate::fold;

/// How far ahead a row is looked for before it counts as new.
const LOOK_AHEAD: usize = 16;

/// A family and its rows. A scrape goes through them in order: [`Rows::begin`],
/// one call for each row, [`Rows::end`].
#[derive(Debug)]
pub struct Rows {
    family: &'static Family,
    proto: MetricFamily,
    /// What row stands at each place of `proto`'s metrics.
    keys: Vec<u64>,
    next: usize,
}

impl Rows {
    /// No rows yet.
    pub fn new(family: &'static Family) -> Self {
        let mut proto = MetricFamily::default();
        proto.set_name(family.name.to_owned());
        proto.set_help(family.help.to_owned());
        proto.set_field_type(match family.kind {
            Kind::Counter => MetricType::COUNTER,
            Kind::Gauge => MetricType::GAUGE,
            Kind::Summary => MetricType::SUMMARY,
            Kind::Histogram => MetricType::HISTOGRAM,
        });
        Self {
            family,
            proto,
            keys: Vec::new(),
            next: 0,
        }
    }

    /// Starts a scrape.
    pub fn begin(&mut self) {
        self.next = 0;
    }

    /// Drops the rows this scrape did not mention.
    pub fn end(&mut self) {
        self.keys.truncate(self.next);
        self.proto.mut_metric().truncate(self.next);
    }

    /// The family with its rows; `None` without rows, since a family without
    /// samples is not exposed.
    pub fn proto(&self) -> Option<&MetricFamily> {
        (!self.keys.is_empty()).then_some(&self.proto)
    }

    /// A counter or a gauge. `key` tells this family's rows apart; `labels`
    /// are the values of its labels and are asked for when the row is new.
    pub fn value(&mut self, key: u64, value: f64, labels: impl FnOnce(&mut dyn FnMut(&str))) {
        let kind = self.family.kind;
        let metric = self.row(key, labels);
        if kind == Kind::Counter {
            let mut counter = Counter::default();
            counter.set_value(value);
            metric.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            metric.set_gauge(gauge);
        }
    }

    /// A summary without quantiles.
    pub fn summary(&mut self, key: u64, sum: fold::Sum, labels: impl FnOnce(&mut dyn FnMut(&str))) {
        let mut summary = Summary::default();
        summary.set_sample_count(sum.count);
        summary.set_sample_sum(seconds(sum.sum_ns));
        self.row(key, labels).set_summary(summary);
    }

    /// A histogram.
    pub fn histogram(
        &mut self,
        key: u64,
        histogram: &fold::Histogram,
        labels: impl FnOnce(&mut dyn FnMut(&str)),
    ) {
        let mut cumulative = 0;
        let mut buckets = Vec::with_capacity(histogram.bounds_ns.len());
        for (bound, count) in histogram.bounds_ns.iter().zip(&histogram.counts) {
            cumulative += count;
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(seconds(*bound));
            bucket.set_cumulative_count(cumulative);
            buckets.push(bucket);
        }
        let mut proto = Histogram::default();
        proto.set_bucket(buckets);
        proto.set_sample_count(histogram.counts.iter().sum());
        proto.set_sample_sum(seconds(histogram.sum_ns));
        self.row(key, labels).set_histogram(proto);
    }

    fn row(&mut self, key: u64, labels: impl FnOnce(&mut dyn FnMut(&str))) -> &mut Metric {
        let at = self.next;
        self.next += 1;
        let metrics = self.proto.mut_metric();
        let ahead = &self.keys[at.min(self.keys.len())..];
        match ahead.iter().take(LOOK_AHEAD).position(|old| *old == key) {
            Some(0) => {}
            Some(gone) => {
                self.keys.drain(at..at + gone);
                metrics.drain(at..at + gone);
            }
            None => {
                self.keys.insert(at, key);
                metrics.insert(at, new_metric(self.family, labels));
            }
        }
        &mut metrics[at]
    }
}

fn new_metric(family: &Family, labels: impl FnOnce(&mut dyn FnMut(&str))) -> Metric {
    let mut pairs = Vec::with_capacity(family.labels.len());
    let mut names = family.labels.iter();
    labels(&mut |value| {
        if let Some(name) = names.next() {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value(value.to_owned());
            pairs.push(pair);
        }
    });
    debug_assert_eq!(pairs.len(), family.labels.len(), "{}", family.name);
    Metric::from_label(pairs)
}

/// Nanoseconds as seconds, correctly rounded.
pub fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::expose::families::Id;

    fn scrape(rows: &mut Rows, wanted: &[u64], built: &mut usize) -> Vec<(String, f64)> {
        rows.begin();
        for key in wanted {
            rows.value(*key, *key as f64, |label| {
                *built += 1;
                label(&key.to_string());
            });
        }
        rows.end();
        let metrics = rows.proto().map_or(&[][..], |proto| proto.get_metric());
        metrics
            .iter()
            .map(|metric| {
                (
                    metric.get_label()[0].value().to_owned(),
                    metric.get_gauge().get_value(),
                )
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
}

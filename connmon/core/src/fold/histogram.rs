//! Histograms over the contract's bucket lists.

use super::snapshot::Histogram;

const fn scaled<const N: usize>(unit_ns: u64, mut bounds: [u64; N]) -> [u64; N] {
    let mut index = 0;
    while index < N {
        bounds[index] *= unit_ns;
        index += 1;
    }
    bounds
}

/// Buckets of `connmon_connect_latency_seconds`, `connmon_accept_wait_seconds`
/// and `connmon_rtt_seconds`: 50 µs to 30 s.
pub(super) static LATENCY_NS: [u64; 18] = scaled(
    1_000,
    [
        50, 100, 250, 500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000,
        1_000_000, 2_500_000, 5_000_000, 10_000_000, 30_000_000,
    ],
);

/// Buckets of `connmon_connection_duration_seconds`: 1 ms to a day.
pub(super) static DURATION_NS: [u64; 12] = scaled(
    1_000_000,
    [
        1, 10, 100, 1_000, 5_000, 15_000, 60_000, 300_000, 900_000, 3_600_000, 14_400_000,
        86_400_000,
    ],
);

/// A histogram being filled.
#[derive(Clone, Debug)]
pub(super) struct Buckets {
    bounds_ns: &'static [u64],
    counts: [u64; LATENCY_NS.len() + 1],
    /// The durations of a hundred thousand connections at a time would fill 64
    /// bits in two days.
    sum_ns: u128,
}

impl Buckets {
    pub(super) fn new(bounds_ns: &'static [u64]) -> Self {
        Self {
            bounds_ns,
            counts: [0; LATENCY_NS.len() + 1],
            sum_ns: 0,
        }
    }

    /// A value on a bound belongs to that bound's bucket (`le`).
    pub(super) fn observe(&mut self, value_ns: u64) {
        let bucket = self.bounds_ns.partition_point(|&bound| bound < value_ns);
        self.counts[bucket] += 1;
        self.sum_ns += u128::from(value_ns);
    }

    pub(super) fn snapshot(&self) -> Histogram {
        Histogram {
            bounds_ns: self.bounds_ns,
            counts: self.counts[..=self.bounds_ns.len()].to_vec(),
            sum_ns: self.sum_ns,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;
    const S: u64 = 1_000 * MS;

    #[test]
    fn bounds_are_inclusive_and_the_last_bucket_is_infinite() {
        let mut buckets = Buckets::new(&DURATION_NS);
        for value in [0, MS, MS + 1, 86_400 * S, 86_400 * S + 1] {
            buckets.observe(value);
        }
        let histogram = buckets.snapshot();
        assert_eq!(histogram.counts.len(), 13);
        assert_eq!(histogram.counts[..3], [2, 1, 0]);
        assert_eq!(histogram.counts[11..], [1, 1]);
        let sum = u128::from(2 * MS + 2 + 2 * 86_400 * S);
        assert_eq!(histogram.sum_ns, sum);
        for _ in 0..300 {
            buckets.observe(u64::MAX >> 4);
        }
        let more = u128::from(u64::MAX >> 4) * 300;
        assert_eq!(buckets.snapshot().sum_ns, sum + more);
        assert!(LATENCY_NS.is_sorted() && DURATION_NS.is_sorted());
    }
}

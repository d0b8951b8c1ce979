//! `rate_limit`: a token bucket, as in Go's `rate.Limiter`.

use std::time::{Duration, Instant};

/// The section: one token comes in every `interval`, the bucket holds `burst`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rate {
    pub(super) interval: Duration,
    pub(super) burst: u64,
}

/// Starts full. Time is a parameter.
#[derive(Debug)]
pub(super) struct Bucket {
    pub(super) rate: Rate,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        Self {
            rate,
            tokens: rate.burst as f64,
            at: now,
        }
    }

    /// Takes a token, if there is one.
    pub(super) fn allow(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.at);
        self.at = self.at.max(now);
        let earned = passed.as_secs_f64() / self.rate.interval.as_secs_f64();
        self.tokens = (self.tokens + earned).min(self.rate.burst as f64);
        let allowed = self.tokens >= 1.0;
        if allowed {
            self.tokens -= 1.0;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_then_one_each_interval() {
        let start = Instant::now();
        let at = |millis| start + Duration::from_millis(millis);
        let rate = |interval, burst| Rate { interval, burst };
        let mut bucket = Bucket::new(rate(Duration::from_secs(1), 2), start);
        let verdicts: Vec<_> = [0, 0, 0, 900, 1000, 1100, 9000, 9000, 9000]
            .map(|millis| bucket.allow(at(millis)))
            .into();
        assert_eq!(
            verdicts,
            [true, true, false, false, true, false, true, true, false]
        );
        let mut none = Bucket::new(rate(Duration::from_secs(1), 0), start);
        assert!(!none.allow(start) && !none.allow(at(10_000)));
    }
}

//! Totals of connections → what they moved since the last reading.

use std::collections::HashMap;

/// Payload bytes received and sent.
pub type Bytes = (u64, u64);

/// Most connections whose byte counts are kept between two readings.
const SAMPLES_MAX: usize = 1 << 18;

/// The byte counts of every connection at the last reading, by cookie.
#[derive(Debug, Default)]
pub struct Samples {
    latest: HashMap<u64, Bytes>,
    /// Of the reading under way.
    next: HashMap<u64, Bytes>,
    /// What the last reading found no more: it closed before its row was
    /// read, and its event is only drained afterwards.
    gone: HashMap<u64, Bytes>,
    /// Whether the last reading kept every connection, so that one
    /// unknown is new.
    complete: bool,
    full: bool,
}

impl Samples {
    /// What a connection of the reading under way moved since the last one.
    /// One that may have been there before counts nothing: its total is no
    /// rate.
    pub fn row(&mut self, cookie: u64, total: Bytes) -> Bytes {
        if cookie == 0 {
            return (0, 0);
        }
        let known = self.latest.remove(&cookie);
        if self.next.len() < SAMPLES_MAX {
            self.next.insert(cookie, total);
        } else {
            self.full = true;
        }
        match known {
            Some(before) => since(before, total),
            None if self.complete => total,
            None => (0, 0),
        }
    }

    /// What a connection moved between the last reading and its close;
    /// `opened_since` when it is younger than that reading.
    pub fn close(&mut self, cookie: u64, total: Bytes, opened_since: bool) -> Bytes {
        let known = self.latest.remove(&cookie);
        match known.or_else(|| self.gone.remove(&cookie)) {
            Some(before) => since(before, total),
            None if opened_since => total,
            None => (0, 0),
        }
    }

    /// The reading under way is the last one now.
    pub fn turn(&mut self) {
        self.gone = std::mem::replace(&mut self.latest, std::mem::take(&mut self.next));
        self.complete = !std::mem::take(&mut self.full);
    }
}

fn since(before: Bytes, now: Bytes) -> Bytes {
    (
        now.0.saturating_sub(before.0),
        now.1.saturating_sub(before.1),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_of_before_the_first_reading_do_not_count() {
        let mut samples = Samples::default();
        assert_eq!(samples.row(1, (1000, 10)), (0, 0));
        samples.turn();
        assert_eq!(samples.row(1, (1500, 11)), (500, 1));
        // Opened since.
        assert_eq!(samples.row(2, (7, 8)), (7, 8));
        samples.turn();
        assert_eq!(samples.close(2, (9, 9), false), (2, 1));
        assert_eq!(samples.close(3, (4, 4), true), (4, 4));
        assert_eq!(samples.close(4, (1 << 40, 0), false), (0, 0));
    }

    #[test]
    fn a_close_before_its_row_counts_from_its_sample() {
        let mut samples = Samples::default();
        samples.row(1, (1 << 40, 0));
        samples.turn();
        // Its row is not there any more, its close not drained yet.
        samples.turn();
        assert_eq!(samples.close(1, ((1 << 40) + 5, 0), false), (5, 0));
        // Once.
        assert_eq!(samples.close(1, (1 << 40, 0), false), (0, 0));
    }

    #[test]
    fn connections_beyond_the_bound_count_nothing() {
        let mut samples = Samples::default();
        for _ in 0..3 {
            for cookie in 1..=SAMPLES_MAX as u64 + 1 {
                assert_eq!(samples.row(cookie, (1000, 1000)), (0, 0), "{cookie}");
            }
            samples.turn();
        }
    }
}

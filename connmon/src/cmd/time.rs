//! Wall-clock time as the tools print it.

use std::time::{Duration, SystemTime};

use jiff::{Timestamp, tz::TimeZone};

/// A moment.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Timestamp);

impl Clock {
    /// This moment.
    pub fn now() -> Self {
        Self(Timestamp::now())
    }

    /// The moment of a kernel timestamp, given `now_ns` of the same clock.
    pub fn of(at_ns: u64, now_ns: u64) -> Self {
        let ago = Duration::from_nanos(now_ns.saturating_sub(at_ns));
        let at = SystemTime::now()
            .checked_sub(ago)
            .unwrap_or_else(SystemTime::now);
        Self(Timestamp::try_from(at).unwrap_or_else(|_| Timestamp::now()))
    }

    /// `2026-01-31T23:59:59.123Z`.
    pub fn rfc3339(self) -> String {
        format!("{:.3}", self.0)
    }

    /// `23:59:59.123`, local time.
    pub fn time_of_day(self) -> String {
        self.0
            .to_zoned(TimeZone::system())
            .strftime("%H:%M:%S%.3f")
            .to_string()
    }
}

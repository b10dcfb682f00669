//! [`Pace`]: lets bytes through at a rate.

use std::time::{Duration, Instant};

/// What was not used of the rate is good for so long.
const MOST_CREDIT: Duration = Duration::from_secs(1);

/// When the next bytes may go.
pub(super) struct Pace {
    /// Bytes a second; `None` is as fast as they come.
    rate: Option<u64>,
    due: Instant,
}

impl Pace {
    pub(super) fn at(rate: Option<u64>) -> Pace {
        Pace { rate, due: Instant::now() }
    }

    /// How long to wait before so many more bytes.
    pub(super) fn before(&mut self, bytes: u64) -> Duration {
        self.before_at(bytes, Instant::now())
    }

    fn before_at(&mut self, bytes: u64, now: Instant) -> Duration {
        let Some(rate) = self.rate else { return Duration::ZERO };
        let wait = self.due.saturating_duration_since(now);
        if now.saturating_duration_since(self.due) > MOST_CREDIT {
            self.due = now;
        }
        self.due += Duration::from_secs_f64(bytes as f64 / rate as f64);
        wait
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_kept_from_the_first_byte_on_and_none_waits_for_nothing() {
        let mut pace = Pace::at(Some(1_000));
        let began = pace.due;
        let at = |millis| began + Duration::from_millis(millis);
        assert_eq!(pace.before_at(500, at(0)), Duration::ZERO);
        assert_eq!(pace.before_at(500, at(0)), Duration::from_millis(500));
        assert_eq!(pace.before_at(1, at(700)), Duration::from_millis(300));
        let mut pace = Pace::at(None);
        assert_eq!((pace.before(u64::MAX / 2), pace.before(1)), (Duration::ZERO, Duration::ZERO));
    }

    #[test]
    fn what_was_not_used_long_ago_is_not_made_up_for() {
        let mut pace = Pace::at(Some(1_000));
        let began = pace.due;
        let at = |seconds| began + Duration::from_secs(seconds);
        assert_eq!(pace.before_at(1_000, at(3_600)), Duration::ZERO);
        assert_eq!(pace.before_at(1_000, at(3_600)), Duration::from_secs(1));
        // A short pause is.
        assert_eq!(pace.before_at(1_000, at(3_603)), Duration::ZERO);
        assert_eq!(pace.before_at(1_000, at(3_603)), Duration::ZERO);
    }
}

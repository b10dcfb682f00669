//! [`Throughput`]: how fast bytes come from the sources, all pulls together.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// What is looked at as one: long enough that a range that ends does not look like a source that stands still.
const WINDOW: Duration = Duration::from_millis(200);

/// Counts what comes, one window after another.
#[derive(Default)]
pub(super) struct Throughput(Mutex<Counted>);

#[derive(Debug, Default)]
struct Counted {
    /// When the window began; none while nothing comes.
    since: Option<Instant>,
    bytes: u64,
    /// Of the last window that was whole.
    bytes_per_second: Option<u64>,
}

impl Throughput {
    /// So many bytes came. The rate of a window, in bytes a second, when that has ended.
    pub(super) fn count(&self, bytes: usize) -> Option<u64> {
        self.count_at(bytes, Instant::now())
    }

    pub(super) fn count_at(&self, bytes: usize, now: Instant) -> Option<u64> {
        self.0.lock().expect("no panic while bytes are counted").count(bytes as u64, now)
    }

    /// Bytes a second in the last whole window; `None` if nothing has come for longer than that.
    pub(super) fn bytes_per_second(&self) -> Option<u64> {
        self.0.lock().expect("no panic while bytes are counted").bytes_per_second
    }
}

impl Counted {
    fn count(&mut self, bytes: u64, now: Instant) -> Option<u64> {
        let since = *self.since.get_or_insert(now);
        let passed = now - since;
        if passed < WINDOW {
            self.bytes += bytes;
            return None;
        }
        if passed > WINDOW * 2 {
            // Nothing has come for a time: that says how long nobody asked, not how fast a source is.
            *self = Counted { since: Some(now), bytes, bytes_per_second: None };
            return None;
        }
        let rate = (u128::from(self.bytes + bytes) * 1000 / passed.as_millis()) as u64;
        *self = Counted { since: Some(now), bytes: 0, bytes_per_second: Some(rate) };
        Some(rate)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_of_a_whole_window_in_which_bytes_came() {
        let (mut counted, began) = (Counted::default(), Instant::now());
        let mut at = |millis, bytes| counted.count(bytes, began + Duration::from_millis(millis));
        assert_eq!([at(0, 500), at(100, 500), at(199, 500)], [None; 3]);
        assert_eq!(at(200, 500), Some(10_000));
        assert_eq!(at(300, 1_000), None);
        assert_eq!(at(450, 1_000), Some(8_000));
        assert_eq!(counted.bytes_per_second, Some(8_000));
    }

    #[test]
    fn a_pause_is_not_a_slow_source() {
        let (mut counted, began) = (Counted::default(), Instant::now());
        counted.count(1_000, began);
        counted.count(1_000, began + WINDOW);
        assert_eq!(counted.count(1_000, began + WINDOW * 10), None);
        assert_eq!(counted.bytes_per_second, None);
        assert_eq!(counted.count(1_000, began + WINDOW * 11), Some(10_000));
    }
}

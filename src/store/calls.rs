//! Calls that change the disk while they are under way: how long it has not answered.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Calls of one disk. Cheap to clone: all clones are one.
#[derive(Clone, Default)]
pub(super) struct Calls(Arc<Mutex<UnderWay>>);

#[derive(Default)]
struct UnderWay {
    /// By a number that grows: the first is the oldest.
    began: BTreeMap<u64, Instant>,
    last: u64,
    /// When the disk itself has last said something. A write that the kernel keeps in memory says nothing about the disk.
    answered: Option<Instant>,
}

/// One of them. Dropping it says that it has ended.
#[must_use]
pub(super) struct Call {
    of: Calls,
    number: u64,
}

impl Calls {
    pub(super) fn begin(&self) -> Call {
        let mut calls = self.held();
        calls.last += 1;
        let number = calls.last;
        calls.began.insert(number, Instant::now());
        Call { of: self.clone(), number }
    }

    /// For how long the disk has left a call unanswered; `None` when no call is under way. A call that takes long while
    /// others are answered is work, not silence.
    pub(super) fn silent_for(&self) -> Option<Duration> {
        let calls = self.held();
        let began = *calls.began.values().next()?;
        Some(calls.answered.map_or(began, |answered| answered.max(began)).elapsed())
    }

    /// Whether the disk has answered so short a time ago.
    pub(super) fn has_answered_within(&self, time: Duration) -> bool {
        self.held().answered.is_some_and(|answered| answered.elapsed() < time)
    }

    fn held(&self) -> MutexGuard<'_, UnderWay> {
        // Each change is one call.
        self.0.lock().unwrap_or_else(|held| held.into_inner())
    }
}

impl Call {
    /// The disk itself has answered it, whatever it said.
    pub(super) fn answered(self) {
        self.of.held().answered = Some(Instant::now());
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.of.held().began.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_silent_since_its_oldest_call_unless_it_has_answered_another() {
        let calls = Calls::default();
        assert_eq!(calls.silent_for(), None);
        let oldest = calls.begin();
        let began = Instant::now();
        let kept_in_memory = calls.begin();
        while began.elapsed() < Duration::from_millis(5) {
            std::thread::yield_now();
        }
        drop(kept_in_memory);
        let so_far = began.elapsed();
        assert!(calls.silent_for().unwrap() >= so_far);
        assert!(!calls.has_answered_within(Duration::MAX));

        let asked = Instant::now();
        calls.begin().answered();
        assert!(calls.has_answered_within(Duration::from_secs(3600)));
        let silent = calls.silent_for().unwrap();
        assert!(silent <= asked.elapsed(), "it is only slow");
        drop(oldest);
        assert_eq!(calls.silent_for(), None);
    }
}

//! [`Clock`]: measures the stages of one pull. Its parts say what they do with guards, from any thread.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::{microseconds, now_ms};
use crate::model::{Course, Stage, Timeline};

/// The time of one pull, from when it was asked for.
pub(super) struct Clock {
    began: Instant,
    course: Mutex<Course>,
}

/// A part of a pull is in this stage, until it is dropped.
#[must_use = "dropping it ends what it stands for"]
pub(super) struct During {
    clock: Arc<Clock>,
    stage: Mutex<Stage>,
}

impl Clock {
    /// Begins to run.
    pub(super) fn start() -> Arc<Clock> {
        Arc::new(Clock { began: Instant::now(), course: Mutex::new(Course::begin(now_ms())) })
    }

    /// A part does this from now on.
    pub(super) fn during(self: &Arc<Self>, stage: Stage) -> During {
        self.course().enter(stage, || self.passed_us());
        During { clock: self.clone(), stage: Mutex::new(stage) }
    }

    /// Stops it; the whole.
    pub(super) fn stop(&self) -> Timeline {
        let mut course = self.course();
        course.end(self.passed_us())
    }

    /// As it stands, and the stage it is in, unless it was stopped.
    pub(super) fn read(&self) -> (Timeline, Option<Stage>) {
        let course = self.course();
        (course.so_far(self.passed_us()), course.now())
    }

    fn course(&self) -> MutexGuard<'_, Course> {
        self.course.lock().expect("no panic while the course is held")
    }

    /// Read while the course is held, so that it never goes back.
    fn passed_us(&self) -> u64 {
        microseconds(self.began.elapsed())
    }
}

impl During {
    /// The part does something else from now on.
    pub(super) fn becomes(&self, next: Stage) {
        let mut stage = self.stage.lock().expect("no panic while the stage is held");
        if *stage != next {
            self.clock.course().shift(*stage, next, || self.clock.passed_us());
            *stage = next;
        }
    }
}

impl Drop for During {
    fn drop(&mut self) {
        let stage = *self.stage.get_mut().expect("no panic while the stage is held");
        self.clock.course().leave(stage, || self.clock.passed_us());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_on_many_threads_leave_no_gap_and_no_overlap() {
        let clock = Clock::start();
        std::thread::scope(|threads| {
            for seed in 0..4 {
                let clock = &clock;
                threads.spawn(move || {
                    let mut random = fastrand::Rng::with_seed(seed);
                    for _ in 0..500 {
                        let part = clock.during(Stage::ALL[random.usize(..Stage::ALL.len())]);
                        part.becomes(Stage::ALL[random.usize(..Stage::ALL.len())]);
                        let _other = clock.during(Stage::Writing);
                    }
                });
            }
        });
        assert_eq!(clock.read().1, Some(Stage::Bookkeeping), "every part has ended");
        let before = clock.passed_us();
        let whole = clock.stop();
        let after = clock.passed_us();
        assert!((before..=after).contains(&whole.total_us()), "{before} {whole:?} {after}");
        assert_eq!(clock.read(), (whole, None));
    }
}

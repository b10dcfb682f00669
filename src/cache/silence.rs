//! Whether the disk answers. It is asked only by who wants to know: an idle daemon asks nothing.

use std::sync::Arc;
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::Semaphore;

use super::{Cache, Error};
use crate::store;

/// A disk that has not answered for so long is stalled. A busy one answers a small question much sooner.
const STALLED_AFTER: Duration = Duration::from_secs(10);
/// How long an answer is waited for; kubelet waits a second for ours.
const ANSWERED_WITHIN: Duration = Duration::from_millis(200);
/// A disk that has answered so short a time ago is not asked again.
const JUST_NOW: Duration = Duration::from_secs(1);
/// Most threads that wait for their turn to write a note. The others are told at once that the disk is slow.
const MAX_WAITING: usize = 64;

/// Lets one question at a time wait for the disk.
pub(super) struct Asking(Arc<Semaphore>);

impl Default for Asking {
    fn default() -> Asking {
        Asking(Arc::new(Semaphore::new(1)))
    }
}

impl Cache {
    /// Why nothing can be written now, if the disk does not answer. Takes a moment at most, whatever the disk does.
    pub async fn why_stalled(&self) -> Option<Error> {
        if let Ok(turn) = self.0.asking.0.clone().try_acquire_owned()
            && let Some(question) = self.0.volume.question(JUST_NOW)
        {
            let asked = tokio::task::spawn_blocking(move || {
                question.ask();
                drop(turn);
            });
            let _ = tokio::time::timeout(ANSWERED_WITHIN, asked).await;
        }
        let silent = self.0.volume.silent_for().filter(|silent| *silent >= STALLED_AFTER)?;
        Some(self.silent(silent))
    }

    /// Waits for its turn to write notes, for as long as a disk may be silent.
    pub(super) fn noting(&self) -> Result<Turn<'_>, Error> {
        self.0.noting.enter(MAX_WAITING, STALLED_AFTER).map_err(|waited| self.silent(waited))
    }

    fn silent(&self, time: Duration) -> Error {
        store::Error::Silent { root: self.0.config.root.clone(), seconds: time.as_secs() }.into()
    }
}

/// Lets one in at a time, in any order; who would have to wait with too many, or for too long, is sent away.
#[derive(Default)]
pub(super) struct Turnstile {
    inside: Mutex<Inside>,
    left: Condvar,
}

#[derive(Default)]
struct Inside {
    is_taken: bool,
    waiting: usize,
}

/// Somebody is inside while it is held.
#[must_use]
pub(super) struct Turn<'a>(&'a Turnstile);

impl Turnstile {
    /// Blocks for `longest` at most; how long it was, if in vain.
    fn enter(&self, most_waiting: usize, longest: Duration) -> Result<Turn<'_>, Duration> {
        let began = Instant::now();
        let mut inside = self.inside();
        if inside.is_taken && inside.waiting >= most_waiting {
            return Err(Duration::ZERO);
        }
        inside.waiting += 1;
        let wait = self.left.wait_timeout_while(inside, longest, |inside| inside.is_taken);
        let (mut inside, _) = wait.unwrap_or_else(|held| held.into_inner());
        inside.waiting -= 1;
        if inside.is_taken {
            return Err(began.elapsed());
        }
        inside.is_taken = true;
        Ok(Turn(self))
    }

    fn inside(&self) -> MutexGuard<'_, Inside> {
        // Each change is one field.
        self.inside.lock().unwrap_or_else(|held| held.into_inner())
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.inside().is_taken = false;
        self.0.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn who_waits_in_vain_is_sent_away_and_the_next_one_gets_in() {
        let turnstile = Turnstile::default();
        let first = turnstile.enter(1, Duration::ZERO).ok().unwrap();
        assert_eq!(turnstile.enter(0, Duration::MAX).err(), Some(Duration::ZERO), "too many wait");
        assert!(turnstile.enter(1, Duration::from_millis(1)).is_err(), "it takes too long");
        std::thread::scope(|scope| {
            let (entered, entries) = mpsc::channel();
            let turnstile = &turnstile;
            scope.spawn(move || {
                let _second = turnstile.enter(1, Duration::MAX).ok().unwrap();
                entered.send(()).unwrap();
            });
            assert!(entries.try_recv().is_err());
            drop(first);
            entries.recv().unwrap();
        });
        assert!(turnstile.enter(0, Duration::ZERO).is_ok());
    }
}

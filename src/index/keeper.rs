//! The thread that keeps sled, and how long it may take.
//!
//! sled panics on some damage instead of telling, and when the disk refuses a write of its own files it can wait for ever,
//! with locks held that the next call waits for. So every call of it is made on one thread, nobody waits for that
//! longer than a limit, and whoever asks while it is stuck is refused at once. When it answers again, it is asked again.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use super::Sled;

/// How long sled may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Limits {
    /// To open and be read through.
    pub(super) open: Duration,
    /// For one call.
    pub(super) call: Duration,
    /// To close.
    pub(super) close: Duration,
}

impl Limits {
    pub(super) const DEFAULT: Limits =
        Limits { open: Duration::from_secs(10), call: Duration::from_secs(10), close: Duration::from_secs(5) };
}

/// What the thread does, in the order it was asked.
type Call = Box<dyn FnOnce(&Sled) + Send>;

/// The way to the thread. Dropping it closes sled.
pub(super) struct Keeper {
    limits: Limits,
    /// `None` once it is closed.
    calls: Option<Sender<Call>>,
    /// What became of sled when it was closed.
    closed: Mutex<Receiver<Result<(), String>>>,
    work: Arc<Mutex<Work>>,
}

/// What the thread is at.
#[derive(Default)]
struct Work {
    /// Since when it has been at one call.
    busy_since: Option<Instant>,
    /// Somebody gave up waiting while it was at this call, and it was logged.
    is_late: bool,
}

impl Keeper {
    /// Starts the thread, which opens sled by `open`. A thread that does not get that done in time is left behind: it holds
    /// nothing but the directory, which is then moved away from under it, and closes what it opened after all.
    pub(super) fn start(
        limits: Limits,
        open: impl FnOnce() -> Result<Sled, String> + Send + 'static,
    ) -> Result<Keeper, String> {
        let (calls, to_do) = mpsc::channel();
        let (tell_opened, opened) = mpsc::channel();
        let (tell_closed, closed) = mpsc::channel();
        let work = Arc::new(Mutex::new(Work::default()));
        let at_work = Arc::clone(&work);
        let keep = move || {
            let sled = match guarded(open).unwrap_or_else(Err) {
                Ok(sled) => sled,
                // Nobody listens any more if it took too long; so below.
                Err(why) => return drop(tell_opened.send(Err(why))),
            };
            let _ = tell_opened.send(Ok(()));
            serve(&sled, &to_do, &at_work);
            let _ = tell_closed.send(guarded(|| drop(sled)));
        };
        thread::Builder::new().name("index".into()).spawn(keep).map_err(|e| e.to_string())?;
        let late = |_| Err(format!("it did not open in {} s", limits.open.as_secs()));
        opened.recv_timeout(limits.open).unwrap_or_else(late)?;
        Ok(Keeper { limits, calls: Some(calls), closed: Mutex::new(closed), work })
    }

    /// Has the thread do it, and waits for that at most as long as a call may take. What is given up is done all the
    /// same should the thread go on, in its turn: what was asked later comes after it.
    pub(super) fn ask<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Sled) -> sled::Result<T> + Send + 'static,
    ) -> Result<T, String> {
        if let Some(silence) = self.silence() {
            return Err(silence);
        }
        let (tell, answer) = mpsc::channel();
        let call = move |sled: &Sled| {
            let done = guarded(|| call(sled)).and_then(|done| done.map_err(|e| e.to_string()));
            // Nobody listens any more if it took too long.
            let _ = tell.send(done);
        };
        let calls = self.calls.as_ref().ok_or("it is closed")?;
        calls.send(Box::new(call)).map_err(|_| "its thread is gone".to_owned())?;
        answer.recv_timeout(self.limits.call).unwrap_or_else(|_| Err(self.gave_up()))
    }

    /// Why the thread is not to be waited for, if it is so.
    pub(super) fn silence(&self) -> Option<String> {
        let work = hold(&self.work);
        let busy_since = work.busy_since?;
        (work.is_late || busy_since.elapsed() >= self.limits.call).then(|| self.silent())
    }

    fn silent(&self) -> String {
        format!("sled has not answered in {} s", self.limits.call.as_secs())
    }

    fn gave_up(&self) -> String {
        let mut work = hold(&self.work);
        // Where it has just ended, nobody would say that it answers again.
        if work.busy_since.is_some() && !std::mem::replace(&mut work.is_late, true) {
            tracing::warn!(why = self.silent(), "{NOT_ANSWERING}");
        }
        self.silent()
    }
}

const NOT_ANSWERING: &str = "the index does not answer: no model is lost, but files may be fetched or hashed again";

impl Drop for Keeper {
    /// sled writes when it is closed. What it had to say can be lost, the answer of the command that ends cannot: so it is
    /// left to itself if it takes too long.
    fn drop(&mut self) {
        let is_silent = self.silence().is_some();
        self.calls = None;
        if is_silent {
            return;
        }
        let closed = self.closed.get_mut().unwrap_or_else(|held| held.into_inner());
        let why = match closed.recv_timeout(self.limits.close) {
            Ok(Ok(())) => return,
            Ok(Err(why)) => why,
            Err(_) => format!("it did not close in {} s", self.limits.close.as_secs()),
        };
        tracing::warn!(why, "the index could not be closed");
    }
}

/// Does what is asked until nobody can ask any more.
fn serve(sled: &Sled, to_do: &Receiver<Call>, work: &Mutex<Work>) {
    for call in to_do {
        hold(work).busy_since = Some(Instant::now());
        call(sled);
        let mut work = hold(work);
        work.busy_since = None;
        if std::mem::take(&mut work.is_late) {
            tracing::info!("the index answers again");
        }
    }
}

fn hold(work: &Mutex<Work>) -> MutexGuard<'_, Work> {
    work.lock().expect("no panic while it is held")
}

fn guarded<T>(call: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|panic| panicked(panic.as_ref()))
}

fn panicked(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    format!("sled panicked: {}", text.unwrap_or("it did not say why"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::index::open_and_read;

    fn keeper(dir: &Path, call: Duration) -> Keeper {
        let dir = dir.join("index");
        Keeper::start(Limits { call, ..Limits::DEFAULT }, move || open_and_read(&dir)).unwrap()
    }

    #[test]
    fn a_call_that_never_ends_is_given_up_the_next_are_refused_and_all_goes_on_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let keeper = keeper(dir.path(), Duration::from_millis(20));
        let (release, held) = mpsc::channel::<()>();
        let stuck = move |_: &Sled| {
            let _ = held.recv();
            Ok(())
        };
        assert!(keeper.ask(stuck).unwrap_err().contains("has not answered"));
        // This one would be done at once, if it were waited for.
        let (tell, done) = mpsc::channel();
        let refused = move |_: &Sled| Ok(tell.send(()).is_ok());
        assert!(keeper.ask(refused).unwrap_err().contains("has not answered"));
        assert!(done.recv().is_err(), "it was not even queued");
        assert!(keeper.silence().is_some());
        drop(release);
        while keeper.silence().is_some() {
            thread::yield_now();
        }
        let asked_again =
            std::iter::repeat_with(|| keeper.ask(|sled| sled.claims.insert("k", "v"))).find(Result::is_ok);
        assert!(asked_again.is_some());
    }

    #[test]
    fn a_keeper_that_is_stuck_is_not_waited_for_when_it_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits { call: Duration::from_millis(20), close: Duration::MAX, ..Limits::DEFAULT };
        let at = dir.path().join("index");
        let keeper = Keeper::start(limits, move || open_and_read(&at)).unwrap();
        let (release, held) = mpsc::channel::<()>();
        assert!(keeper.ask(move |_| Ok(held.recv().is_err())).is_err());
        drop(keeper);
        drop(release);
    }

    #[test]
    fn a_call_that_panics_is_an_error_and_the_next_is_answered() {
        let dir = tempfile::tempdir().unwrap();
        let keeper = keeper(dir.path(), Limits::DEFAULT.call);
        let panics = |_: &Sled| -> sled::Result<()> { panic!("as sled does") };
        assert_eq!(keeper.ask(panics), Err("sled panicked: as sled does".into()));
        assert!(keeper.ask(|sled| sled.claims.insert("k", "v")).is_ok());
    }

    #[test]
    fn sled_that_does_not_open_in_time_is_left_behind() {
        let (release, held) = mpsc::channel::<()>();
        let limits = Limits { open: Duration::ZERO, ..Limits::DEFAULT };
        let opened = Keeper::start(limits, move || Err(format!("{:?}", held.recv())));
        assert_eq!(opened.err().as_deref(), Some("it did not open in 0 s"));
        drop(release);
    }
}

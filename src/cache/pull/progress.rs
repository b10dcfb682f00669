//! Where a pull stands, for everybody who watches it.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::time::Instant;

use crate::cache::transfer::Tally;
use crate::cache::{now_ms, rfc3339};
use crate::fault::{Diagnose, Fault, Problem};
use crate::model::{ListedFile, Listing, Record};
use crate::source::Attempt;
use crate::wire::http::{Phase, ProblemBody, PullStatus};

/// How often the numbers are published.
const PUBLISH_EVERY: Duration = Duration::from_millis(250);
/// The rate is measured over this many publications: some seconds.
const RATE_WINDOW: usize = 20;

pub(super) struct Progress {
    status: watch::Sender<PullStatus>,
    tally: Arc<Tally>,
    files_done: AtomicU64,
    /// Files under way, the one begun first in front: it is the one that is told.
    under_way: Mutex<Vec<String>>,
    /// The last retry that was announced, and the bytes there were then: more bytes mean that it is over.
    waiting: Mutex<Option<(String, u64)>>,
}

impl Progress {
    pub(super) fn new(id: &str, reference: &str) -> Progress {
        let status = PullStatus::started(id, reference, rfc3339(now_ms()));
        Progress {
            status: watch::Sender::new(status),
            tally: Arc::default(),
            files_done: AtomicU64::new(0),
            under_way: Mutex::default(),
            waiting: Mutex::new(None),
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<PullStatus> {
        self.status.subscribe()
    }

    /// As it stands this moment, not as it was last published.
    pub(super) fn status(&self) -> PullStatus {
        let mut status = self.status.borrow().clone();
        if !status.phase.is_final() {
            self.count_into(&mut status);
        }
        status
    }

    pub(super) fn tally(&self) -> Arc<Tally> {
        self.tally.clone()
    }

    pub(super) fn fetched_bytes(&self) -> u64 {
        self.tally.fetched.load(Ordering::Relaxed)
    }

    pub(super) fn asked_again(&self) {
        self.status.send_modify(|status| status.asked += 1);
    }

    pub(super) fn resolved(&self, listing: &Listing) {
        *self.waiting.lock().expect("no panic while the notice is held") = None;
        self.status.send_modify(|status| {
            status.phase = Phase::Fetching;
            status.version = Some(listing.version().to_owned());
            status.files_total = listing.files().len() as u64;
            status.bytes_total = listing.total_bytes();
            status.waiting = None;
        });
    }

    /// The source changed: what was counted was of another version.
    pub(super) fn start_again(&self) {
        self.tally.done.store(0, Ordering::Relaxed);
        self.files_done.store(0, Ordering::Relaxed);
        self.status.send_modify(|status| status.phase = Phase::Resolving);
    }

    pub(super) fn now_fetching(&self, file: &ListedFile) {
        self.under_way.lock().expect("no panic while the files are held").push(file.path.to_string());
        self.tell_first_file();
    }

    /// It came, or it did not.
    pub(super) fn no_longer_fetching(&self, file: &ListedFile) {
        self.under_way.lock().expect("no panic while the files are held").retain(|path| *path != file.path.as_str());
        self.tell_first_file();
    }

    fn tell_first_file(&self) {
        self.status.send_modify(|status| {
            status.file = self.under_way.lock().expect("no panic while the files are held").first().cloned();
        });
    }

    pub(super) fn file_done(&self) {
        self.files_done.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn waits(&self, attempt: &Attempt) {
        let at = humantime::format_rfc3339_seconds(SystemTime::now() + attempt.wait).to_string();
        let clock = at.get(11..19).unwrap_or_default();
        let notice = format!("{}; next try at {clock} UTC (attempt {})", attempt.error, attempt.number + 1);
        let bytes = self.fetched_bytes();
        *self.waiting.lock().expect("no panic while the notice is held") = Some((notice.clone(), bytes));
        self.status.send_modify(|status| status.waiting = Some(notice));
    }

    pub(super) fn publishing(&self) {
        self.status.send_modify(|status| {
            self.count_into(status);
            status.phase = Phase::Publishing;
            status.file = None;
        });
    }

    pub(super) fn ready(&self, record: &Record, path: &Path) {
        self.status.send_modify(|status| {
            self.count_into(status);
            status.phase = Phase::Ready;
            status.version = Some(record.version.clone());
            status.files_done = record.total_files;
            status.files_total = record.total_files;
            status.bytes_done = record.total_bytes;
            status.bytes_total = record.total_bytes;
            status.percent = 100;
            status.model = Some(record.id().to_string());
            status.path = Some(path.display().to_string());
            rest(status);
        });
    }

    pub(super) fn ended(&self, problem: &Problem) {
        self.status.send_modify(|status| {
            self.count_into(status);
            let cancelled = problem.code().fault() == Fault::Cancelled;
            status.phase = if cancelled { Phase::Cancelled } else { Phase::Failed };
            status.error = Some(ProblemBody::from(problem));
            rest(status);
        });
    }

    /// Publishes the numbers until it is dropped.
    pub(super) async fn keep_publishing(&self) {
        let mut samples = std::collections::VecDeque::from([(Instant::now(), self.fetched_bytes())]);
        let mut ticks = tokio::time::interval(PUBLISH_EVERY);
        loop {
            ticks.tick().await;
            samples.push_back((Instant::now(), self.fetched_bytes()));
            if samples.len() > RATE_WINDOW {
                samples.pop_front();
            }
            let (first, last) = (samples[0], samples[samples.len() - 1]);
            let rate = rate(last.1 - first.1, last.0 - first.0);
            self.status.send_if_modified(|status| {
                let before = status.clone();
                self.count_into(status);
                status.bytes_per_second = rate;
                let left = status.bytes_total.saturating_sub(status.bytes_done);
                let counting = rate > 0 && status.phase == Phase::Fetching;
                status.eta_seconds = counting.then(|| left.div_ceil(rate.max(1)));
                *status != before
            });
        }
    }

    fn count_into(&self, status: &mut PullStatus) {
        status.bytes_fetched = self.fetched_bytes();
        status.bytes_done = self.tally.done.load(Ordering::Relaxed).min(status.bytes_total);
        status.files_done = self.files_done.load(Ordering::Relaxed);
        status.percent = percent(status.bytes_done, status.bytes_total);
        let waiting = self.waiting.lock().expect("no panic while the notice is held");
        let goes_on = waiting.as_ref().is_some_and(|(_, bytes)| status.bytes_fetched > *bytes);
        if goes_on {
            status.waiting = None;
        }
    }
}

/// Nothing moves any more.
fn rest(status: &mut PullStatus) {
    status.bytes_per_second = 0;
    status.eta_seconds = None;
    status.file = None;
    status.waiting = None;
    status.ended_at = Some(rfc3339(now_ms()));
}

/// Rounded down, and never 100 before the model has its name.
fn percent(done: u64, total: u64) -> u8 {
    match u128::from(done) * 100 / u128::from(total.max(1)) {
        0..=98 => (u128::from(done) * 100 / u128::from(total.max(1))) as u8,
        _ => 99,
    }
}

fn rate(bytes: u64, over: Duration) -> u64 {
    let millis = over.as_millis().max(1);
    u64::try_from(u128::from(bytes) * 1000 / millis).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundred_percent_is_said_only_by_ready() {
        assert_eq!([percent(0, 0), percent(0, 10), percent(1, 3), percent(10, 10)], [0, 0, 33, 99]);
        assert_eq!(percent(u64::MAX, u64::MAX), 99);
        assert_eq!(rate(1000, Duration::from_millis(500)), 2000);
        assert_eq!(rate(5, Duration::ZERO), 5000);
    }
}

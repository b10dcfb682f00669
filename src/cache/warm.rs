//! Warm-ups: a version that is local is brought into the page cache, so that its readers find it in memory.
//!
//! It is read, in large blocks by some threads at once. To advise the kernel instead (`MADV_WILLNEED`) is several times slower
//! on some nodes and as fast on others, and it can neither be bounded nor taken back. What is resident is never assumed but
//! asked for afterwards. None is waited for by an open or a pull. One warm-up reads at a time for readers, and one for nobody
//! in particular, which lets go first what somebody waits for.

mod reading;
mod resident;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::demand::{Demand, Urgency};
use super::job::JobHandle;
use super::lease::Lease;
use super::memory::{Bound, Limit, Memory};
use super::{Cache, Error, now_ms, rfc3339};
use crate::fault::Problem;
use crate::model::{Bytes, ModelId, ModelRef, Record};
use crate::telemetry::metrics::WarmOutcome;
use crate::wire::http::{Detail, ProblemBody, WarmPhase, WarmStatus};
use crate::wire::residency::Method;
use reading::{Ended, GivesWay, Reading, Tally};
use resident::{LastResidency, blobs_of, percent, total_of};

/// Who holds the lease on a version that is being warmed, in words.
const HOLDER: &str = "larder, warming up";
/// Warm-ups that have not ended; all but one of them wait.
const MAX_ACTIVE_WARMS: usize = 256;
/// Warm-ups that have ended and are still told about.
const MAX_ENDED_WARMS: usize = 64;
/// How often the numbers are published.
const PUBLISH_EVERY: Duration = Duration::from_millis(250);
/// A model of which so much is resident is warm: some pages go at any moment.
const WARM_PERCENT: u8 = 99;
/// Opens of a version within so long of each other look once whether it is resident.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Versions whose last look is remembered.
const MAX_LOOKS: usize = 1024;

/// A warm-up somebody waits on. Dropping it does not stop the warm-up.
pub type WarmHandle = JobHandle<WarmStatus>;

/// All warm-ups this process knows, and what it last measured.
#[derive(Default)]
pub(super) struct Warms {
    books: Mutex<Books>,
    /// Whose turn it is to read for readers, in the order of asking.
    for_readers: tokio::sync::Mutex<()>,
    /// The same for the others.
    ahead: tokio::sync::Mutex<()>,
    residency: LastResidency,
}

#[derive(Default)]
struct Books {
    active: HashMap<ModelId, Arc<Warm>>,
    ended: VecDeque<Arc<Warm>>,
    started: u64,
    /// When an open of a version last looked whether it is resident.
    looks: HashMap<ModelId, Instant>,
}

struct Warm {
    id: String,
    status: watch::Sender<WarmStatus>,
    tally: Tally,
    /// Raised when it is for a reader.
    urgency: Urgency,
    cancelled: CancellationToken,
}

impl Warm {
    fn new(id: String, status: WarmStatus, urgency: Urgency, cancelled: CancellationToken) -> Warm {
        Warm { id, status: watch::Sender::new(status), tally: Tally::default(), urgency, cancelled }
    }

    fn handle(&self) -> WarmHandle {
        WarmHandle { id: self.id.clone(), status: self.status.subscribe() }
    }
}

impl Warms {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().expect("no panic while the warm-ups are held")
    }

    /// Waits until it may read.
    async fn turn(&self, demand: &Demand, urgency: &Urgency) -> tokio::sync::MutexGuard<'_, ()> {
        tokio::select! {
            biased;
            () = demand.is_wanted(urgency) => self.for_readers.lock().await,
            turn = self.ahead.lock() => turn,
        }
    }
}

impl Books {
    fn find(&self, id: &str) -> Result<Arc<Warm>, Error> {
        let found = self.active.values().chain(&self.ended).find(|warm| warm.id == id);
        found.cloned().ok_or_else(|| Error::WarmNotFound { id: id.chars().take(80).collect() })
    }

    /// Whether it is time to look, in which case it counts as done.
    fn may_look(&mut self, model: ModelId) -> bool {
        let now = Instant::now();
        let recent = |at: &Instant| now.duration_since(*at) < LOOK_EVERY;
        if self.looks.get(&model).is_some_and(recent) {
            return false;
        }
        if self.looks.len() >= MAX_LOOKS {
            self.looks.retain(|_, at| recent(at));
        }
        // So many versions are opened at once that not each can be looked at.
        if self.looks.len() >= MAX_LOOKS {
            return false;
        }
        self.looks.insert(model, now);
        true
    }
}

/// What a warm-up came to.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    phase: WarmPhase,
    why: Option<String>,
}

impl Cache {
    /// Joins the warm-up of the version a reference means now, or starts one. Needs a tokio runtime; returns at once.
    pub fn warm(&self, reference: &ModelRef) -> Result<WarmHandle, Error> {
        Ok(self.warm_version(reference, None)?.handle())
    }

    fn warm_version(&self, reference: &ModelRef, version: Option<&str>) -> Result<Arc<Warm>, Error> {
        let mut books = self.0.warms.books();
        if self.0.stop.is_cancelled() {
            return Err(Error::DrainingWarms);
        }
        let (record, lease) = self.lease_connection(reference, version, HOLDER)?;
        if let Some(warm) = books.active.get(&record.id()) {
            return Ok(warm.clone());
        }
        if books.active.len() >= MAX_ACTIVE_WARMS {
            return Err(Error::TooManyWarms { most: MAX_ACTIVE_WARMS });
        }
        books.started += 1;
        // The letter tells them from pulls.
        let id = format!("w{:012x}-{:04x}", now_ms(), books.started & 0xffff);
        let status = WarmStatus::queued(&id, &record.id().to_string(), &reference.to_string(), rfc3339(now_ms()));
        let warm = Arc::new(Warm::new(id, status, Urgency::of(&self.0.demand), self.0.stop.child_token()));
        books.active.insert(record.id(), warm.clone());
        let (cache, started) = (self.clone(), warm.clone());
        self.0.tasks.spawn(async move { cache.run_warm(started, record, lease).await });
        Ok(warm)
    }

    /// Every warm-up this process remembers, newest first.
    pub fn warms(&self) -> Vec<WarmStatus> {
        let books = self.0.warms.books();
        let all = books.active.values().chain(&books.ended);
        let mut statuses: Vec<_> = all.map(|warm| warm.status.borrow().clone()).collect();
        statuses.sort_by(|a, b| b.id.cmp(&a.id));
        statuses
    }

    /// One warm-up, to look at or to wait on.
    pub fn warm_status(&self, id: &str) -> Result<WarmHandle, Error> {
        Ok(self.0.warms.books().find(id)?.handle())
    }

    /// Stops a warm-up, for everybody who waits on it. What is resident stays so. Cancelling one that has ended changes
    /// nothing.
    pub async fn cancel_warm(&self, id: &str) -> Result<WarmStatus, Error> {
        let warm = self.0.warms.books().find(id)?;
        warm.cancelled.cancel();
        Ok(warm.handle().finished().await)
    }

    /// Starts a warm-up for a reader who has opened it, or makes that one its own which is under way. Needs a tokio runtime.
    pub(super) fn warm_for_reader(&self, reference: &ModelRef, version: &str) {
        if let Some(warm) = self.warm_or_say_why(reference, version) {
            warm.urgency.raise();
        }
    }

    /// Starts a warm-up for who may come. Needs a tokio runtime.
    pub(super) fn warm_ahead(&self, reference: &ModelRef, version: &str) {
        self.warm_or_say_why(reference, version);
    }

    fn warm_or_say_why(&self, reference: &ModelRef, version: &str) -> Option<Arc<Warm>> {
        let warm = self.warm_version(reference, Some(version));
        warm.inspect_err(|error| tracing::warn!(%reference, %error, "a model is not warmed")).ok()
    }

    /// Somebody opened this version: if that is configured, starts a warm-up unless it is resident. Costs the open a look
    /// into a map; everything else happens after it. Needs a tokio runtime if it is configured.
    pub(super) fn warm_on_open(&self, record: &Arc<Record>) {
        if !self.0.config.warm_on_open || !self.0.warms.books().may_look(record.id()) {
            return;
        }
        let (cache, record) = (self.clone(), record.clone());
        self.0.tasks.spawn(async move {
            let manifest = record.manifest;
            let measured = cache.blocking(move |cache| {
                let blobs = blobs_of(&*cache.manifest(manifest)?);
                Ok(cache.resident_of(&blobs).map(|resident| percent(resident, total_of(&blobs))))
            });
            match measured.await {
                Ok(Some(percent)) if percent >= WARM_PERCENT => {}
                Ok(_) => cache.warm_for_reader(&record.reference, &record.version),
                Err(error) => tracing::warn!(reference = %record.reference, %error, "a model is not warmed"),
            }
        });
    }

    /// How residency is told here, and whether a memory limit keeps warm-ups from being of use.
    pub(super) fn warm_details(&self) -> [Detail; 2] {
        let method = Method::of_this_kernel();
        let memory = Memory::of_this_process();
        [residency_detail(method), limit_detail(memory.limit())]
    }

    async fn run_warm(&self, warm: Arc<Warm>, record: Arc<Record>, lease: Lease) {
        let began = Instant::now();
        let result = tokio::select! {
            biased;
            () = warm.cancelled.cancelled() => Ok(Verdict::cancelled()),
            turn = self.0.warms.turn(&self.0.demand, &warm.urgency) => {
                let result = self.bring_in(&warm, &record).await;
                drop(turn);
                result
            }
        };
        warm.urgency.end();
        drop(lease);
        let read = warm.tally.read.load(Ordering::Relaxed);
        let outcome = match &result {
            Ok(Verdict { phase: WarmPhase::Warm, .. }) => WarmOutcome::Warm,
            Ok(Verdict { phase: WarmPhase::Cancelled, .. }) => WarmOutcome::Cancelled,
            Ok(_) => WarmOutcome::Stopped,
            Err(_) => WarmOutcome::Failed,
        };
        self.0.metrics.warm_ended(outcome, read);
        // Out of the active ones first: who is told that it has ended may ask for the next one at once.
        {
            let mut books = self.0.warms.books();
            books.active.remove(&record.id());
            books.ended.push_front(warm.clone());
            books.ended.truncate(MAX_ENDED_WARMS);
        }
        warm.ended(result);
        let status = warm.status.borrow();
        tracing::info!(
            warm = warm.id, reference = %record.reference, phase = status.phase.text(), read,
            resident = status.resident_bytes, bytes = status.bytes_total, seconds = began.elapsed().as_secs_f64(),
            why = status.why, error = status.error.as_ref().map(|error| error.detail.as_str()), "warm-up ended"
        );
    }

    async fn bring_in(&self, warm: &Arc<Warm>, record: &Arc<Record>) -> Result<Verdict, Error> {
        let (warm_there, record) = (warm.clone(), record.clone());
        let work = self.blocking(move |cache| cache.read_in(&warm_there, &record));
        let mut work = std::pin::pin!(work);
        let began = Instant::now();
        let mut ticks = tokio::time::interval(PUBLISH_EVERY);
        loop {
            tokio::select! {
                verdict = &mut work => {
                    warm.publish(began.elapsed());
                    return verdict;
                }
                _ = ticks.tick() => warm.publish(began.elapsed()),
            }
        }
    }

    /// Blocking.
    fn read_in(&self, warm: &Warm, record: &Arc<Record>) -> Result<Verdict, Error> {
        let blobs = blobs_of(&*self.prove(record)?);
        let total = total_of(&blobs);
        let before = self.resident_of(&blobs);
        warm.begins(total, before);
        let allowance = || Memory::of_this_process().allowance(before.unwrap_or(0));
        // Told before the first byte is read, not when it turns out.
        let first = allowance();
        if total - before.unwrap_or(0) > first.bytes {
            warm.status.send_modify(|status| status.why = Some(first.bound.to_string()));
        }
        let (volume, tally, cancelled) = (&self.0.volume, &warm.tally, &warm.cancelled);
        let way = ForDemand { demand: &self.0.demand, urgency: &warm.urgency, runtime: Handle::current() };
        let ended = Reading { volume, blobs: &blobs, allowance: &allowance, tally, cancelled, way: &way }.run()?;
        let resident = self.resident_of(&blobs);
        warm.status.send_modify(|status| status.resident_bytes = resident);
        Ok(verdict(ended, resident, total, Memory::of_this_process().limit()))
    }
}

/// A warm-up for nobody in particular gives way to what somebody waits for.
struct ForDemand<'a> {
    demand: &'a Demand,
    urgency: &'a Urgency,
    runtime: Handle,
}

impl GivesWay for ForDemand<'_> {
    fn is_ahead(&self) -> bool {
        !self.urgency.is_raised()
    }

    fn wait_until_free(&self, enough: &CancellationToken) {
        self.runtime.block_on(async {
            tokio::select! { () = self.demand.comes_first(self.urgency) => {}, () = enough.cancelled() => {} }
        });
    }
}

/// What it came to. Only what the kernel says is resident makes a model warm.
fn verdict(ended: Ended, resident: Option<u64>, total: u64, limit: Option<&Limit>) -> Verdict {
    let stopped = |why: String| Verdict { phase: WarmPhase::Stopped, why: Some(why) };
    let is_warm = resident.is_some_and(|resident| percent(resident, total) >= WARM_PERCENT);
    match (ended, resident) {
        (Ended::Cancelled, _) => Verdict::cancelled(),
        _ if is_warm => Verdict { phase: WarmPhase::Warm, why: None },
        (Ended::Short(bound), _) => stopped(bound.to_string()),
        (Ended::Through, None) => stopped(
            "every byte was read, but this kernel does not tell this user how much of it is resident".to_owned(),
        ),
        (Ended::Through, Some(resident)) => {
            let reason = limit.map_or_else(
                || "the node is short of memory, or something drops its page cache".to_owned(),
                |limit| Bound::Limit(limit.clone()).to_string(),
            );
            let (resident, total) = (Bytes(resident), Bytes(total));
            stopped(format!("every byte was read, but only {resident} of {total} are resident: {reason}"))
        }
    }
}

impl Verdict {
    fn cancelled() -> Verdict {
        Verdict { phase: WarmPhase::Cancelled, why: None }
    }
}

impl Warm {
    fn begins(&self, total: u64, resident: Option<u64>) {
        self.status.send_modify(|status| {
            status.phase = WarmPhase::Reading;
            status.bytes_total = total;
            status.resident_bytes_before = resident;
            status.resident_bytes = resident;
        });
    }

    fn publish(&self, elapsed: Duration) {
        self.status.send_if_modified(|status| {
            if status.phase != WarmPhase::Reading {
                return false;
            }
            let before = status.clone();
            status.bytes_done = self.tally.done.load(Ordering::Relaxed);
            status.bytes_read = self.tally.read.load(Ordering::Relaxed);
            // A hundred only when it has been measured.
            status.percent = Some(percent(status.bytes_done, status.bytes_total).min(99));
            let millis = elapsed.as_millis().max(1);
            status.bytes_per_second = u64::try_from(u128::from(status.bytes_read) * 1000 / millis).unwrap_or(u64::MAX);
            *status != before
        });
    }

    fn ended(&self, result: Result<Verdict, Error>) {
        self.status.send_modify(|status| {
            status.percent = status.resident_bytes.map(|resident| percent(resident, status.bytes_total));
            status.ended_at = Some(rfc3339(now_ms()));
            match result {
                Ok(Verdict { phase, why }) => (status.phase, status.why) = (phase, why),
                Err(error) => {
                    status.phase = WarmPhase::Failed;
                    status.error = Some(ProblemBody::from(&Problem::of(&error)));
                }
            }
        });
    }
}

fn residency_detail(method: Method) -> Detail {
    let means = match method {
        Method::Cachestat => "how much of a model is in memory is told exactly",
        Method::Mincore => {
            "how much of a model is in memory is told by mapping its files, and only to the user who owns them; Linux 6.5 \
             has a cheaper way"
        }
    };
    Detail {
        name: "page cache".to_owned(),
        state: method.text().to_owned(),
        means: means.to_owned(),
        best: method == Method::Cachestat,
    }
}

fn limit_detail(limit: Option<&Limit>) -> Detail {
    let (state, means) = match limit {
        None => ("none".to_owned(), "warm-ups are bounded by the memory of the node alone".to_owned()),
        Some(limit) => (Bytes(limit.bytes).to_string(), limit.to_string()),
    };
    Detail { name: "memory limit".to_owned(), state, means, best: limit.is_none() }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[test]
    fn only_what_is_resident_makes_a_model_warm() {
        let short = || Ended::Short(Bound::Unknown);
        for (ended, resident, phase, why) in [
            (Ended::Through, Some(1000), WarmPhase::Warm, None),
            (Ended::Through, Some(990), WarmPhase::Warm, None),
            (
                Ended::Through,
                Some(989),
                WarmPhase::Stopped,
                Some("only 989 B of 1.0 kB are resident: the node is short"),
            ),
            (Ended::Through, Some(0), WarmPhase::Stopped, Some("only 0 B of 1.0 kB are resident")),
            (Ended::Through, None, WarmPhase::Stopped, Some("does not tell this user")),
            (short(), Some(500), WarmPhase::Stopped, Some("`/proc/meminfo` does not say")),
            (short(), None, WarmPhase::Stopped, Some("`/proc/meminfo` does not say")),
            (short(), Some(1000), WarmPhase::Warm, None),
            (Ended::Cancelled, Some(1000), WarmPhase::Cancelled, None),
        ] {
            let said = format!("{ended:?} {resident:?}");
            let verdict = verdict(ended, resident, 1000, None);
            assert_eq!(verdict.phase, phase, "{said}");
            match (verdict.why, why) {
                (Some(found), Some(why)) => assert!(found.contains(why), "{said}: {found}"),
                (found, why) => assert_eq!(found.as_deref(), why, "{said}"),
            }
        }
    }

    #[test]
    fn a_percentage_is_told_when_it_is_known_and_a_hundred_only_when_the_kernel_has_said_so() {
        let status = WarmStatus::queued("w1", "0123456789abcdef", "hf://o/n@main", String::new());
        let warm = Warm::new("w1".into(), status, Urgency::of(&Demand::new(None)), CancellationToken::new());
        let told = |warm: &Warm| (warm.status.borrow().percent, warm.status.borrow().bytes_done);
        let tick = |warm: &Warm| warm.publish(Duration::from_secs(2));
        tick(&warm);
        assert_eq!(told(&warm), (None, 0), "nothing is known yet");
        warm.begins(1000, Some(100));
        warm.tally.done.store(500, Ordering::Relaxed);
        warm.tally.read.store(400, Ordering::Relaxed);
        tick(&warm);
        assert_eq!((told(&warm), warm.status.borrow().bytes_per_second), ((Some(50), 500), 200));
        warm.tally.done.store(1000, Ordering::Relaxed);
        tick(&warm);
        assert_eq!(told(&warm), (Some(99), 1000));
        warm.status.send_modify(|status| status.resident_bytes = Some(300));
        warm.ended(Ok(verdict(Ended::Through, Some(300), 1000, None)));
        assert_eq!(told(&warm), (Some(30), 1000), "it was read, and it is not there");
        assert!(warm.status.borrow().why.as_ref().unwrap().contains("only 300 B of 1.0 kB are resident"));
    }

    #[tokio::test]
    async fn a_warm_up_for_a_reader_waits_for_those_of_readers_alone() {
        let (warms, demand) = (Warms::default(), Demand::new(None));
        let [first, second, third] = [(); 3].map(|()| Urgency::of(&demand));
        let turn = |urgency| Box::pin(warms.turn(&demand, urgency));
        let _reads = turn(&first).await;
        let (mut waits, mut also) = (turn(&second), turn(&third));
        assert!((&mut waits).now_or_never().is_none() && (&mut also).now_or_never().is_none());
        second.raise();
        let reads_too = waits.await;
        third.raise();
        assert!((&mut also).now_or_never().is_none());
        drop(reads_too);
        drop(also.await);
    }

    #[test]
    fn an_open_looks_once_in_a_while_and_at_a_bounded_number_of_versions() {
        let mut books = Books::default();
        let model = |n: usize| ModelId::new(&"hf://o/n".parse().unwrap(), &n.to_string());
        assert!(books.may_look(model(0)));
        assert!(!books.may_look(model(0)));
        let looked = (0..2 * MAX_LOOKS).filter(|n| books.may_look(model(*n))).count();
        assert_eq!((looked, books.looks.len()), (MAX_LOOKS - 1, MAX_LOOKS));
    }
}

//! The job of making one reference local. One at a time per reference: who comes second waits on the first.

mod progress;

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use tokio_util::sync::CancellationToken;

use super::caching::Caching;
use super::clock::Clock;
use super::demand::Urgency;
use super::evict::Cause;
use super::job::JobHandle;
use super::ledger::{Hold, NoRoom, Reservation};
use super::memory::Memory;
use super::transfer::{Transfer, is_marked};
use super::{Cache, Error, now_ms};
use crate::fault::{Code, Diagnose, Problem};
use crate::heap;
use crate::model::{
    Bytes, Claim, Digest, Effort, ListedFile, Listing, Location, Manifest, ManifestFile, ModelId, ModelRef, Record,
    Stage, Timeline,
};
use crate::source::{self, Attempt, RetryPolicy, Source};
use crate::store::{self, Begun, Blob, IngestKey, PendingPull, StartNote, snapshot_path};
use crate::telemetry::Parent;
use crate::telemetry::metrics::PullOutcome;
use crate::wire::http::{Phase, PullStatus};
use progress::Progress;

/// Files of one pull that are written at the same time.
const MAX_FILES_AT_ONCE: usize = 8;
/// Pulls that have ended and are still told about.
const MAX_ENDED_PULLS: usize = 256;
/// Pulls under way; each has a task, a listing and up to [`MAX_FILES_AT_ONCE`] writers.
const MAX_ACTIVE_PULLS: usize = 256;
/// How often a pull starts again from the listing, because the source changed under it.
const MAX_CHANGES: u32 = 3;
/// How often a file is fetched again because its bytes differ from its checksum.
const MAX_MISMATCHES: u32 = 1;
/// How often a pull makes room that others take.
const MAX_ROUNDS_FOR_ROOM: u32 = 8;
/// The first pause between two attempts; it doubles, with jitter.
const FIRST_WAIT: Duration = Duration::from_millis(250);
/// The longest pause we choose ourselves (a source may ask for more).
const MAX_WAIT: Duration = Duration::from_secs(30);

/// A pull somebody waits on. Dropping it does not stop the pull.
pub type PullHandle = JobHandle<PullStatus>;

/// All pulls this process knows.
#[derive(Default)]
pub(super) struct Pulls {
    active: HashMap<String, Arc<Pull>>,
    ended: VecDeque<Arc<Pull>>,
    started: u64,
    in_flight: HashMap<Claim, Arc<tokio::sync::Mutex<()>>>,
}

struct Pull {
    id: String,
    reference: ModelRef,
    progress: Progress,
    clock: Arc<Clock>,
    cancelled: CancellationToken,
    urgency: Arc<Urgency>,
    /// Somebody wants it warmed when it is ready.
    warm: AtomicBool,
    /// What it has brought, if it has brought a version.
    brought: OnceLock<StartNote>,
    /// Whose trace it goes on with.
    caller: Option<Parent>,
}

/// What this process knows of one pull, of one moment.
pub(super) struct KnownPull {
    pub(super) status: PullStatus,
    pub(super) timeline: Timeline,
    pub(super) now: Option<Stage>,
    pub(super) effort: Effort,
    pub(super) brought: Option<StartNote>,
}

/// For whom a model is pulled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// Somebody waits for it.
    BySomebody,
    /// Somebody will want it.
    Ahead,
}

impl Pull {
    fn handle(&self) -> PullHandle {
        PullHandle { id: self.id.clone(), status: self.progress.subscribe() }
    }

    fn known(&self) -> KnownPull {
        let (timeline, now) = self.clock.read();
        let (effort, brought) = (self.progress.tally().effort(), self.brought.get().cloned());
        KnownPull { status: self.progress.status(), timeline, now, effort, brought }
    }
}

impl Pulls {
    pub(super) fn active(&self) -> usize {
        self.active.len()
    }

    /// What is being pulled.
    pub(super) fn references(&self) -> HashSet<String> {
        self.active.keys().cloned().collect()
    }

    pub(super) fn is_active(&self, reference: &ModelRef) -> bool {
        self.active.contains_key(&reference.to_string())
    }

    fn newest_first(&self) -> Vec<Arc<Pull>> {
        let mut pulls: Vec<_> = self.active.values().chain(&self.ended).cloned().collect();
        pulls.sort_by(|a, b| b.id.cmp(&a.id));
        pulls
    }

    /// Those of one reference, newest first.
    pub(super) fn of(&self, reference: &ModelRef) -> Vec<KnownPull> {
        let active = self.active.get(&reference.to_string());
        let ended = self.ended.iter().filter(|pull| pull.reference == *reference);
        active.into_iter().chain(ended).map(|pull| pull.known()).collect()
    }

    fn find(&self, id: &str) -> Result<Arc<Pull>, Error> {
        let found = self.active.values().chain(&self.ended).find(|pull| pull.id == id);
        found.cloned().ok_or_else(|| Error::PullNotFound { id: id.chars().take(80).collect() })
    }

    /// A model that is not local may be on its way.
    pub(super) fn why_not_open(&self, reference: &ModelRef) -> Error {
        let reference = reference.to_string();
        match self.active.get(&reference).map(|pull| pull.progress.status()) {
            Some(status) => {
                let eta = status.eta_seconds.map(Duration::from_secs);
                Error::NotReady { reference, percent: status.percent, eta }
            }
            None => Error::NotLocal { reference, evicted: None },
        }
    }

    fn end(&mut self, pull: &Arc<Pull>) {
        self.active.remove(&pull.reference.to_string());
        self.ended.push_front(pull.clone());
        self.ended.truncate(MAX_ENDED_PULLS);
    }
}

impl Cache {
    /// Joins the pull of this reference, or starts one. Needs a tokio runtime; returns at once.
    pub fn pull(&self, reference: &ModelRef) -> Result<PullHandle, Error> {
        self.pull_as(None, reference, Asked::BySomebody, None)
    }

    /// The same for nobody who waits: it lets go first what somebody waits for.
    pub fn pull_ahead(&self, reference: &ModelRef) -> Result<PullHandle, Error> {
        self.pull_ahead_for(reference, None)
    }

    /// The same for a caller who traces. A pull that is joined goes on with the trace of who asked for it first.
    pub fn pull_ahead_for(&self, reference: &ModelRef, caller: Option<Parent>) -> Result<PullHandle, Error> {
        self.pull_as(None, reference, Asked::Ahead, caller)
    }

    /// The same, but `None` if it is local: a pull that has just ended is not followed by another one of those who waited
    /// for it. Needs a tokio runtime; returns at once.
    pub fn pull_unless_local(&self, reference: &ModelRef) -> Result<Option<PullHandle>, Error> {
        self.hands()?;
        let mut pulls = self.0.pulls.lock().expect("no panic while the pulls are held");
        // A model has its name before its pull leaves the active ones.
        let local = !pulls.active.contains_key(&reference.to_string()) && self.0.ledger.current(reference).is_some();
        if local {
            Ok(None)
        } else {
            self.join_or_start(&mut pulls, None, reference, Asked::BySomebody, None).map(Some)
        }
    }

    /// A pull of a former process keeps its id, under which its intention is on the disk.
    fn pull_as(
        &self,
        id: Option<String>,
        reference: &ModelRef,
        asked: Asked,
        caller: Option<Parent>,
    ) -> Result<PullHandle, Error> {
        self.hands()?;
        let mut pulls = self.0.pulls.lock().expect("no panic while the pulls are held");
        self.join_or_start(&mut pulls, id, reference, asked, caller)
    }

    fn join_or_start(
        &self,
        pulls: &mut Pulls,
        id: Option<String>,
        reference: &ModelRef,
        asked: Asked,
        caller: Option<Parent>,
    ) -> Result<PullHandle, Error> {
        let text = reference.to_string();
        if let Some(pull) = pulls.active.get(&text) {
            pull.progress.asked_again();
            if asked == Asked::BySomebody {
                pull.urgency.raise();
            }
            return Ok(pull.handle());
        }
        if self.0.stop.is_cancelled() {
            return Err(Error::Draining);
        }
        if pulls.active.len() >= MAX_ACTIVE_PULLS {
            return Err(Error::TooManyPulls { most: MAX_ACTIVE_PULLS });
        }
        pulls.started += 1;
        let id = id.unwrap_or_else(|| format!("{:012x}-{:04x}", now_ms(), pulls.started & 0xffff));
        let pull = Arc::new(Pull {
            progress: Progress::new(&id, &text),
            id,
            reference: reference.clone(),
            clock: Clock::start(),
            cancelled: self.0.stop.child_token(),
            urgency: Arc::new(Urgency::of(&self.0.demand)),
            warm: AtomicBool::new(false),
            brought: OnceLock::new(),
            caller,
        });
        if asked == Asked::BySomebody {
            pull.urgency.raise();
        }
        pulls.active.insert(text, pull.clone());
        let handle = pull.handle();
        let cache = self.clone();
        self.0.tasks.spawn(async move { cache.run_pull(pull).await });
        Ok(handle)
    }

    /// Every pull this process remembers, newest first.
    pub fn pulls(&self) -> Vec<PullStatus> {
        let pulls = self.0.pulls.lock().expect("no panic while the pulls are held").newest_first();
        pulls.iter().map(|pull| pull.progress.status()).collect()
    }

    /// One pull, to wait on: from now on somebody does.
    pub fn follow_pull(&self, id: &str) -> Result<PullHandle, Error> {
        let pull = self.0.pulls.lock().expect("no panic while the pulls are held").find(id)?;
        pull.urgency.raise();
        Ok(pull.handle())
    }

    /// One pull, to look at.
    pub fn pull_status(&self, id: &str) -> Result<PullHandle, Error> {
        Ok(self.0.pulls.lock().expect("no panic while the pulls are held").find(id)?.handle())
    }

    /// Takes a pull back, for everybody who waits on it. What has come so far stays for a later pull. Cancelling a pull
    /// that has ended changes nothing.
    pub async fn cancel(&self, id: &str) -> Result<PullStatus, Error> {
        let pull = self.0.pulls.lock().expect("no panic while the pulls are held").find(id)?;
        pull.cancelled.cancel();
        Ok(pull.handle().finished().await)
    }

    /// Brings the model of a pull into the page cache as soon as it is ready. A restart forgets that it was asked for.
    pub fn warm_when_ready(&self, id: &str) -> Result<(), Error> {
        let pull = self.0.pulls.lock().expect("no panic while the pulls are held").find(id)?;
        // In the order opposite to that of `run_pull`, so that one of the two sees it. If both do, they join.
        pull.warm.store(true, Ordering::SeqCst);
        let status = pull.progress.status();
        if let (Phase::Ready, Some(version)) = (status.phase, status.version) {
            self.warm_ahead(&pull.reference, &version);
        }
        Ok(())
    }

    /// Starts the pulls again that a former process did not end. Blocking; needs a tokio runtime.
    pub fn resume_pending(&self) {
        let pending = match self.0.volume.notes::<PendingPull>() {
            Ok((pending, unreadable)) => {
                for error in unreadable {
                    // A lost note costs only that somebody has to ask again.
                    tracing::warn!(%error, "a pull of the former run is not resumed");
                }
                pending
            }
            Err(error) => {
                return tracing::warn!(%error, "pulls of the former run cannot be read, so they are not resumed");
            }
        };
        for pull in pending {
            tracing::info!(reference = %pull.reference, "resuming a pull of the former run");
            match self.pull_as(Some(pull.id.clone()), &pull.reference, Asked::Ahead, None) {
                // Somebody asked for it before us: that pull has its own intention.
                Ok(handle) if handle.id != pull.id => {
                    if let Err(error) = self.0.volume.remove_note::<PendingPull>(&pull.id) {
                        tracing::warn!(reference = %pull.reference, %error, "the next start will resume this pull again");
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(reference = %pull.reference, %error, "a pull of the former run is not resumed");
                }
            }
        }
    }

    async fn run_pull(&self, pull: Arc<Pull>) {
        let began = Instant::now();
        tracing::info!(pull = pull.id, reference = %pull.reference, "pull started");
        let ticker = tokio::spawn({
            let pull = pull.clone();
            async move { pull.progress.keep_publishing().await }
        });
        let mut result = self.make_local(&pull).await;
        ticker.abort();
        pull.urgency.end();

        if self.0.stop.is_cancelled() && matches!(result, Err(Error::Cancelled)) {
            result = Err(Error::Paused { reference: pull.reference.to_string() });
        } else {
            self.forget_pending(&pull).await;
        }
        let seconds = began.elapsed().as_secs_f64();
        let fetched = pull.progress.fetched_bytes();
        self.0.metrics.origin_bytes(fetched);
        let outcome = match &result {
            Ok(Outcome { unchanged: true, .. }) => PullOutcome::Unchanged,
            Ok(_) => PullOutcome::Ready,
            Err(Error::Cancelled | Error::Paused { .. }) => PullOutcome::Cancelled,
            Err(error) => {
                self.0.metrics.pull_failed(error.code().fault().label(), error.code().text());
                PullOutcome::Failed
            }
        };
        self.0.metrics.pull_ended(outcome, seconds);
        match &result {
            Ok(done) => tracing::info!(
                pull = pull.id, reference = %pull.reference, version = done.record.version, bytes = done.record.total_bytes,
                fetched, seconds, "pull ready"
            ),
            Err(error @ (Error::Cancelled | Error::Paused { .. })) => tracing::info!(
                pull = pull.id, reference = %pull.reference, code = %error.code(), fetched, seconds,
                "pull stopped; its bytes stay"
            ),
            Err(error) => tracing::warn!(
                pull = pull.id, reference = %pull.reference, code = %error.code(), fetched, seconds, "pull ended: {error}"
            ),
        }
        let (timeline, effort) = (pull.clock.stop(), pull.progress.tally().effort());
        let version = result.as_ref().map_or("", |done| done.record.version.as_str());
        let reference = pull.reference.to_string();
        let texts = [("larder.reference", reference.as_str()), ("larder.pull", &pull.id), ("larder.version", version)];
        let texts = if result.is_ok() { &texts[..] } else { &texts[..2] };
        self.pull_ended(&timeline, effort, texts, result.as_ref().err().map(Diagnose::code), pull.caller.as_ref());
        if let Ok(Outcome { record, unchanged: false }) = &result {
            let id = pull.id.clone();
            pull.brought.get_or_init(|| StartNote { model: record.id(), pull: id, timeline, effort });
        }
        // Out of the active pulls first: who is told that it has ended may ask for the next one at once.
        let idle = {
            let mut pulls = self.0.pulls.lock().expect("no panic while the pulls are held");
            pulls.end(&pull);
            pulls.active.is_empty()
        };
        match result {
            Ok(done) => {
                pull.progress.ready(&done.record, &self.directory(&done.record));
                if pull.warm.load(Ordering::SeqCst) {
                    self.warm_ahead(&pull.reference, &done.record.version);
                }
                // Nobody waits for it: a crash before it is done costs a hash of the model at its next open, and the knowledge
                // how it came.
                let flushed = self.blocking(move |cache| {
                    if let Some(brought) = pull.brought.get()
                        && let Err(error) = cache.0.volume.remember_start(brought)
                    {
                        tracing::warn!(%error, model = %brought.model, "a restart forgets how this model came");
                    }
                    cache.flush();
                    Ok(())
                });
                let _ = flushed.await;
            }
            Err(error) => pull.progress.ended(&Problem::of(&error)),
        }
        if idle {
            // When who waits has been told. A pull that has begun meanwhile only has to learn again.
            let rested = self.blocking(|cache| {
                cache.0.budget.rest();
                Ok(())
            });
            let _ = rested.await;
            // Connections are kept for a while, with their buffers; those whose time is over are closed at every end of such a while.
            tokio::select! {
                () = tokio::time::sleep(2 * source::http::IDLE_CONNECTION) => {}
                () = self.0.stop.cancelled() => return,
            }
            let given_back = self.blocking(|_| {
                heap::give_back();
                Ok(())
            });
            let _ = given_back.await;
        }
    }

    async fn make_local(&self, pull: &Arc<Pull>) -> Result<Outcome, Error> {
        let pending = PendingPull { id: pull.id.clone(), reference: pull.reference.clone() };
        self.blocking(move |cache| Ok(cache.0.volume.write_note(&pending)?)).await?;
        let mut changes = 0;
        loop {
            match self.attempt(pull).await {
                Err(Error::Source(error @ source::Error::Changed { .. })) if changes < MAX_CHANGES => {
                    changes += 1;
                    tracing::warn!(pull = pull.id, %error, "the source changed; starting again with its new version");
                    pull.progress.start_again();
                }
                Err(error) if is_damage(&error) && changes < MAX_CHANGES => {
                    changes += 1;
                    tracing::warn!(pull = pull.id, %error, "bytes that were here are wrong; fetching them too");
                    pull.progress.start_again();
                }
                other => return other,
            }
        }
    }

    async fn attempt(&self, pull: &Arc<Pull>) -> Result<Outcome, Error> {
        let policy = RetryPolicy {
            attempts: self.0.config.retry_attempts,
            first_wait: FIRST_WAIT,
            max_wait: MAX_WAIT,
            stall_timeout: self.0.config.stall_timeout,
        };
        let on_wait: source::OnWait = {
            let (pull, metrics) = (pull.clone(), self.0.metrics.clone());
            Arc::new(move |attempt| {
                metrics.source_retry(attempt.error.code().text());
                pull.progress.waits(attempt);
                Box::new(pull.clock.during(Stage::BackingOff))
            })
        };
        let on_gate: source::OnGate = {
            let clock = pull.clock.clone();
            Arc::new(move || Box::new(clock.during(Stage::BackingOff)))
        };
        let source: Arc<dyn Source> = Arc::from(self.hands()?.sources.open(&pull.reference)?);
        let resolving = pull.clock.during(Stage::Resolving);
        let listing = tokio::select! {
            listing = source::telling_of_gates(on_gate.clone(), policy.resolve(source.as_ref(), &on_wait)) => listing?,
            () = pull.cancelled.cancelled() => return Err(Error::Cancelled),
        };
        drop(resolving);
        pull.progress.resolved(&listing);

        if let Some(outcome) = self.confirm_unchanged(pull, &listing).await? {
            return Ok(outcome);
        }
        let caching = Caching::of(self.0.config.page_cache, listing.total_bytes(), &Memory::of_this_process());
        tracing::debug!(pull = pull.id, ?caching, "fetching");
        let transfer = Transfer {
            source,
            caching,
            policy,
            on_wait,
            on_gate,
            clock: pull.clock.clone(),
            budget: self.0.budget.clone(),
            demand: self.0.demand.clone(),
            urgency: pull.urgency.clone(),
            tally: pull.progress.tally(),
            cancelled: pull.cancelled.child_token(),
            commits: self.0.commits.clone(),
        };
        let (digests, _hold) = self.fetch_missing(pull, &listing, transfer).await?;
        pull.progress.publishing();
        let _publishing = pull.clock.during(Stage::Publishing);
        let record = self.publish(pull, listing, digests).await?;
        Ok(Outcome { record, unchanged: false })
    }

    /// The version the source has is local: nothing is fetched, and its record says that it was confirmed.
    ///
    /// The snapshot is laid out again all the same, which changes nothing when it is whole and mends it when it is not.
    async fn confirm_unchanged(&self, pull: &Arc<Pull>, listing: &Listing) -> Result<Option<Outcome>, Error> {
        if !has_identity(listing) {
            return Ok(None);
        }
        let Some(record) = self.0.ledger.model(ModelId::new(&pull.reference, listing.version())) else {
            return Ok(None);
        };
        let _checking = pull.clock.during(Stage::Checking);
        let confirmed = self.blocking(move |cache| {
            let manifest = cache.0.volume.read_manifest(record.manifest)?;
            cache.name(record.as_ref().clone(), &manifest)
        });
        match confirmed.await {
            Ok(record) => {
                self.0.metrics.avoided_bytes(record.total_bytes);
                Ok(Some(Outcome { record, unchanged: true }))
            }
            Err(error) if is_damage(&error) => {
                tracing::warn!(pull = pull.id, %error, "the local copy is damaged; what is missing is fetched again");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Makes every file of the listing a blob. The hold keeps them until the model has its name.
    async fn fetch_missing(
        &self,
        pull: &Arc<Pull>,
        listing: &Listing,
        transfer: Transfer,
    ) -> Result<(BTreeMap<usize, Digest>, Hold), Error> {
        let mut hold = self.0.ledger.hold();
        let mut digests = BTreeMap::new();
        // Files with the same claim are one fetch; the others wait for its digest.
        let mut missing: BTreeMap<Key, Vec<usize>> = BTreeMap::new();
        let known = self.known_digests(pull, listing).await?;
        for (at, (file, known)) in listing.files().iter().zip(known).enumerate() {
            match known {
                Some(digest) if self.0.ledger.hold_if_here(&mut hold, digest) => {
                    digests.insert(at, digest);
                    pull.progress.file_done();
                    transfer.tally.done.fetch_add(file.size, Ordering::Relaxed);
                    self.0.metrics.avoided_bytes(file.size);
                }
                _ => missing.entry(Claim::of(file).map_or(Key::Place(at), Key::Claim)).or_default().push(at),
            }
        }
        let room = self.room()?;
        let want = missing.values().map(|files| room.on_disk(listing.files()[files[0]].size)).sum();
        let reservation = Arc::new(Mutex::new((self.reserve(pull, want, listing.total_bytes()).await?, hold)));

        let mut queue: Vec<Vec<usize>> = missing.into_values().collect();
        // Largest first, so that no large file is left alone at the end.
        queue.sort_by_key(|files| listing.files()[files[0]].size);
        let mut running = FuturesUnordered::new();
        let mut failed = None;
        loop {
            while failed.is_none()
                && running.len() < MAX_FILES_AT_ONCE
                && !transfer.cancelled.is_cancelled()
                && let Some(files) = queue.pop()
            {
                let (transfer, books) = (&transfer, reservation.clone());
                running.push(async move {
                    let blob = self.fetch_file(pull, &listing.files()[files[0]], transfer, books).await;
                    (files, blob)
                });
            }
            match running.next().await {
                None => break,
                Some((files, Ok(blob))) => {
                    // The first was counted while it came; its twins cost nothing.
                    let twins = (files.len() as u64 - 1) * blob.size;
                    transfer.tally.done.fetch_add(twins, Ordering::Relaxed);
                    self.0.metrics.avoided_bytes(twins);
                    for at in files {
                        digests.insert(at, blob.digest);
                        pull.progress.file_done();
                    }
                }
                Some((_, Err(error))) => {
                    // The first failure is the reason; that the others were stopped because of it is not.
                    failed.get_or_insert(error);
                    transfer.cancelled.cancel();
                }
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
        if digests.len() < listing.files().len() {
            return Err(Error::Cancelled);
        }
        let books = Arc::into_inner(reservation).expect("every transfer has ended");
        let (_given_back, hold) = books.into_inner().expect("no panic while the books are held");
        Ok((digests, hold))
    }

    /// For each file of the listing the blob that is here.
    async fn known_digests(&self, pull: &Pull, listing: &Listing) -> Result<Vec<Option<Digest>>, Error> {
        let _checking = pull.clock.during(Stage::Checking);
        let keys: Vec<IngestKey> = listing.files().iter().map(|file| ingest_key(pull, file)).collect();
        self.blocking(move |cache| keys.iter().map(|key| cache.local_digest(key)).collect()).await
    }

    async fn fetch_file(
        &self,
        pull: &Arc<Pull>,
        file: &ListedFile,
        transfer: &Transfer,
        books: Arc<Mutex<(Reservation, Hold)>>,
    ) -> Result<Blob, Error> {
        let claim = Claim::of(file);
        // Two models may want the same bytes at the same time: one fetches, the other finds them done.
        let turn = claim.as_ref().map(|claim| self.turn(claim));
        let queued = pull.clock.during(Stage::Queued);
        let _turn = match &turn {
            Some(turn) => tokio::select! {
                turn = turn.lock() => Some(turn),
                () = transfer.cancelled.cancelled() => return Err(Error::Cancelled),
            },
            None => None,
        };
        let _file = self.0.budget.file().await;
        drop(queued);
        let (mut mismatches, mut failures) = (0, 0);
        loop {
            let key = ingest_key(pull, file);
            let checking = pull.clock.during(Stage::Checking);
            let begun = self.blocking(move |cache| Ok(cache.0.volume.begin(&key)?)).await?;
            drop(checking);
            let adopt = {
                let (books, cache) = (books.clone(), self.clone());
                move |blob: Blob| {
                    // It is here and cannot go; if it cannot be measured, its size is near enough.
                    let disk_bytes = cache.0.volume.disk_bytes(blob.digest).unwrap_or(blob.size);
                    let mut books = books.lock().expect("no panic while the books are held");
                    let (reservation, hold) = &mut *books;
                    reservation.became(blob, disk_bytes, hold);
                }
            };
            let ingest = match begun {
                Begun::Done(blob) => {
                    if !self.adopt_if_here(blob, adopt).await? {
                        continue;
                    }
                    transfer.tally.done.fetch_add(blob.size, Ordering::Relaxed);
                    return Ok(blob);
                }
                Begun::Ingest(ingest) => ingest,
            };
            let on_disk = self.room()?.on_disk(file.size);
            books.lock().expect("no panic while the books are held").0.written(on_disk);
            pull.progress.now_fetching(file);
            let fetched = transfer.run(file, ingest, adopt).await;
            pull.progress.no_longer_fetching(file);
            match fetched {
                Err(Error::Store(error @ store::Error::Checksum { .. })) if mismatches < MAX_MISMATCHES => {
                    mismatches += 1;
                    tracing::warn!(pull = pull.id, %error, "the bytes differ from their checksum; fetching them once more");
                }
                Err(Error::Source(error)) if !is_marked(file) => {
                    failures += 1;
                    let wait = transfer.policy.pause(&error, failures).filter(|_| failures < transfer.policy.attempts);
                    let Some(wait) = wait else { return Err(Error::Source(error)) };
                    let _pause = (transfer.on_wait)(&Attempt { number: failures, error, wait });
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = transfer.cancelled.cancelled() => return Err(Error::Cancelled),
                    }
                }
                other => return other,
            }
        }
    }

    /// A blob an earlier pull has left may have been removed since it was found: then it is fetched after all.
    async fn adopt_if_here(&self, blob: Blob, adopt: impl FnOnce(Blob) + Send + 'static) -> Result<bool, Error> {
        self.blocking(move |cache| {
            let _commit = cache.0.commits.read().expect("no panic while a commit is under way");
            let here = cache.0.volume.blob_size(blob.digest)? == Some(blob.size);
            if here {
                adopt(blob);
            }
            Ok(here)
        })
        .await
    }

    /// Order: manifest, snapshot, index, record, so that what is named is whole.
    async fn publish(
        &self,
        pull: &Arc<Pull>,
        listing: Listing,
        digests: BTreeMap<usize, Digest>,
    ) -> Result<Record, Error> {
        let reference = pull.reference.clone();
        self.blocking(move |cache| {
            let files = listing.files().iter().enumerate();
            let file = |(at, f): (usize, &ListedFile)| ManifestFile {
                path: f.path.clone(),
                digest: digests[&at],
                size: f.size,
            };
            let manifest = Manifest::new(files.map(file).collect());
            let digest = cache.0.volume.write_manifest(&manifest)?;
            let version = if has_identity(&listing) {
                listing.version().to_owned()
            } else {
                // The source says nothing that would change with the bytes, so the bytes themselves name the version.
                format!("{}-{}", listing.version(), &digest.to_hex()[..16])
            };
            let claims = listing.files().iter().enumerate();
            let claims: Vec<_> = claims.filter_map(|(at, f)| Some((Claim::of(f)?, digests[&at]))).collect();
            let record = Record {
                snapshot: snapshot_path(&reference, &version),
                version,
                manifest: digest,
                confirmed_at_ms: 0,
                sequence: 0,
                total_bytes: manifest.total_bytes(),
                total_files: manifest.files().len() as u64,
                claims,
                reference,
            };
            let record = cache.name(record, &manifest)?;
            cache.mend_others();
            let claims: Vec<_> = record.claims.iter().map(|(claim, _)| claim.clone()).collect();
            cache.0.volume.forget_ingests(&claims)?;
            Ok(record)
        })
        .await
    }

    /// Gives a model its name, or confirms it, once all its bytes are known to be right. Blocking.
    fn name(&self, record: Record, manifest: &Manifest) -> Result<Record, Error> {
        if let Some(file) = self.first_lacking(manifest)? {
            let (what, file) = (record.reference.to_string(), file.to_string());
            return Err(Error::Spoilt { what, file, percent: 0, eta: None });
        }
        let record = self.name_proven(record, manifest);
        self.save_stamps();
        record
    }

    fn name_proven(&self, mut record: Record, manifest: &Manifest) -> Result<Record, Error> {
        let _naming = self.0.naming.lock().expect("no panic while names change");
        record.confirmed_at_ms = now_ms();
        record.sequence = self.0.ledger.next_sequence();
        self.0.volume.publish(&record.snapshot, manifest)?;
        if let Err(error) = self.hands()?.index.add(&record) {
            tracing::warn!(%error, model = %record.id(), "the index does not take the model; it is rebuilt at the next start");
        }
        self.0.volume.write_record(&record)?;
        self.0.ledger.name(record.clone(), manifest);
        self.hands()?.index.pulled(record.id());
        self.came_back(&record.reference);
        if let Location::Hub { repo, revision, .. } = record.reference.location() {
            self.point_hub_ref(repo, revision)?;
        }
        Ok(record)
    }

    /// Promises room, and makes it if there is none: before the first byte, or not at all.
    async fn reserve(&self, pull: &Pull, want: u64, model: u64) -> Result<Reservation, Error> {
        let _making_room = pull.clock.during(Stage::MakingRoom);
        let mut rounds = 0;
        loop {
            let refusal = match self.0.ledger.reserve(want, model, self.room()?) {
                Ok(reservation) => return Ok(reservation),
                Err(NoRoom::Never { quota }) => {
                    let reference = pull.reference.to_string();
                    return Err(Error::NeverFits { reference, size: Bytes(model), quota });
                }
                Err(NoRoom::Now(refusal)) => refusal,
            };
            let cause = Cause::Pull(pull.reference.clone());
            let made = self.blocking(move |cache| cache.make_room(want, &cause)).await?;
            rounds += 1;
            // Another pull may have taken what was made for this one.
            let is_in_vain = made.freed_bytes == 0 && !made.outlook.has_room();
            if is_in_vain || rounds == MAX_ROUNDS_FOR_ROOM {
                let what = format!("pull `{}`", pull.reference);
                return Err(self.no_room(what, want, refusal, &made.outlook));
            }
        }
    }

    /// The blob that is these bytes, if a model or an earlier pull has brought it. Blocking.
    fn local_digest(&self, key: &IngestKey) -> Result<Option<Digest>, Error> {
        let Some(claim) = &key.claim else { return Ok(None) };
        let is_whole = |digest| matches!(self.0.volume.blob_size(digest), Ok(Some(found)) if found == key.size);
        match self.hands()?.index.digest_of(claim).filter(|digest| is_whole(*digest)) {
            Some(digest) => Ok(Some(digest)),
            None => Ok(self.0.volume.committed(key)?.map(|blob| blob.digest)),
        }
    }

    fn turn(&self, claim: &Claim) -> Arc<tokio::sync::Mutex<()>> {
        let mut pulls = self.0.pulls.lock().expect("no panic while the pulls are held");
        // Turns nobody holds any more are forgotten here, so that the map does not grow with every file ever fetched.
        pulls.in_flight.retain(|_, turn| Arc::strong_count(turn) > 1);
        pulls.in_flight.entry(claim.clone()).or_default().clone()
    }

    async fn forget_pending(&self, pull: &Arc<Pull>) {
        let id = pull.id.clone();
        if let Err(error) = self.blocking(move |cache| Ok(cache.0.volume.remove_note::<PendingPull>(&id)?)).await {
            tracing::warn!(pull = pull.id, %error, "the pull has ended, but the next start will resume it");
        }
    }

    /// Does disk work on a thread that may wait.
    pub(super) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Cache) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let cache = self.clone();
        tokio::task::spawn_blocking(move || work(&cache)).await.expect("disk work does not panic")
    }
}

fn ingest_key(pull: &Pull, file: &ListedFile) -> IngestKey {
    IngestKey {
        claim: Claim::of(file),
        checksum: file.checksum,
        size: file.size,
        what: format!("{} ({})", file.path, pull.reference),
    }
}

struct Outcome {
    record: Record,
    unchanged: bool,
}

/// What files are gathered by: the same claim, or nothing but their own place.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Claim(Claim),
    Place(usize),
}

/// Whether bytes on this disk are in the way, which the next attempt does without.
fn is_damage(error: &Error) -> bool {
    matches!(error, Error::Spoilt { .. }) || error.code() == Code::StoreCorrupt
}

/// Whether the version of the listing changes whenever a byte does.
fn has_identity(listing: &Listing) -> bool {
    listing.files().iter().all(is_marked)
}

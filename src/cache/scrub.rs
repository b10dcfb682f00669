//! Scrubbing: the bytes of every blob are read from the disk and hashed again, at a bounded rate. What is wrong goes to
//! quarantine, and the models that list it are pulled again.
//!
//! One pass runs at a time. The daemon runs one by itself from time to time, slowly, and goes on where it stopped after a
//! restart; one that somebody asks for begins anew and is as fast as they say.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::demand::Demand;
use super::job::JobHandle;
use super::pace::Pace;
use super::{Cache, Error, now_ms, rfc3339};
use crate::fault::{Diagnose, Problem};
use crate::huge_page::HugePage;
use crate::model::{Digest, Manifest};
use crate::priority::IoPriority;
use crate::store::{self, Blob, ScrubNote, Scrubbed};
use crate::wire::http::{Found, ProblemBody, ScrubFinding, ScrubPhase, ScrubStatus};

/// Passes that have ended and are still told about.
const MAX_ENDED_SCRUBS: usize = 16;
/// Findings that are told one by one; the others are counted.
const MAX_FINDINGS: usize = 1_000;
/// How often it is written down how far a pass has come, and told to who watches.
const NOTE_EVERY: Duration = Duration::from_secs(60);
const TELL_EVERY: Duration = Duration::from_millis(250);

/// A pass somebody waits on. Dropping it does not stop the pass.
pub type ScrubHandle = JobHandle<ScrubStatus>;

/// All passes this process knows.
#[derive(Default)]
pub(super) struct Scrubs(Mutex<Books>);

#[derive(Default)]
struct Books {
    active: Option<Arc<Scrub>>,
    /// Newest first. One that gives way is here before it has stopped.
    ended: VecDeque<Arc<Scrub>>,
    started: u64,
}

impl Books {
    fn put_away(&mut self, scrub: Arc<Scrub>) {
        self.ended.push_front(scrub);
        self.ended.truncate(MAX_ENDED_SCRUBS);
    }
}

struct Scrub {
    id: String,
    /// Bytes a second; `None` is as fast as the disk.
    rate: Option<u64>,
    /// By itself: it goes on where the last one stopped, and gives way to one that somebody asks for.
    in_background: bool,
    status: watch::Sender<ScrubStatus>,
    cancelled: CancellationToken,
}

impl Scrub {
    fn handle(&self) -> ScrubHandle {
        ScrubHandle { id: self.id.clone(), status: self.status.subscribe() }
    }

    /// Waits so long; and one that nobody has asked for, which has weeks, as long as somebody waits for a model. Not once it
    /// is stopped.
    async fn pause(&self, demand: &Demand, wait: Duration) {
        let over = async {
            tokio::time::sleep(wait).await;
            if self.in_background {
                demand.is_quiet().await;
            }
        };
        tokio::select! { () = over => {}, () = self.cancelled.cancelled() => {} }
    }
}

impl Cache {
    /// Joins the pass that somebody asked for, or starts one over all blobs; `rate` in bytes a second. Needs a tokio runtime;
    /// returns at once.
    pub fn scrub(&self, rate: Option<u64>) -> Result<ScrubHandle, Error> {
        self.start_scrub(rate, false)
    }

    /// Starts a pass by itself, if the last one ended `every` ago or longer and none is under way. Blocking; needs a tokio
    /// runtime.
    pub fn scrub_in_background(&self, rate: u64, every: Duration) {
        if self.0.scrubs.0.lock().expect("no panic while the passes are held").active.is_some() {
            return;
        }
        let note = self.0.volume.scrub_note();
        let due = match note.ended_ms {
            _ if note.reached.is_some() => true,
            // A clock that was set back makes it late, never early.
            Some(ended_ms) => now_ms().saturating_sub(ended_ms) >= every.as_millis() as u64,
            None => {
                // What has just been written was just hashed: the time begins now.
                self.remember(&ScrubNote { ended_ms: Some(now_ms()), ..note });
                false
            }
        };
        if due && let Err(error) = self.start_scrub(Some(rate), true) {
            tracing::debug!(%error, "the volume is not scrubbed now");
        }
    }

    fn start_scrub(&self, rate: Option<u64>, in_background: bool) -> Result<ScrubHandle, Error> {
        self.hands()?;
        let mut books = self.0.scrubs.0.lock().expect("no panic while the passes are held");
        if self.0.stop.is_cancelled() {
            return Err(Error::Draining);
        }
        if let Some(active) = books.active.take_if(|active| active.in_background && !in_background) {
            active.cancelled.cancel();
            books.put_away(active);
        }
        if let Some(active) = &books.active {
            return Ok(active.handle());
        }
        books.started += 1;
        let id = format!("s{:012x}-{:04x}", now_ms(), books.started & 0xffff);
        let scrub = Arc::new(Scrub {
            status: watch::Sender::new(ScrubStatus::started(&id, rate, in_background, rfc3339(now_ms()))),
            id,
            rate,
            in_background,
            cancelled: self.0.stop.child_token(),
        });
        books.active = Some(scrub.clone());
        let (cache, handle) = (self.clone(), scrub.handle());
        self.0.tasks.spawn(async move { cache.run_scrub(scrub).await });
        Ok(handle)
    }

    /// Every pass this process remembers, newest first.
    pub fn scrubs(&self) -> Vec<ScrubStatus> {
        let books = self.0.scrubs.0.lock().expect("no panic while the passes are held");
        books.active.iter().chain(&books.ended).map(|scrub| scrub.status.borrow().clone()).collect()
    }

    /// One pass, to look at or to wait on.
    pub fn scrub_status(&self, id: &str) -> Result<ScrubHandle, Error> {
        Ok(self.find_scrub(id)?.handle())
    }

    /// Stops a pass. What it has found stays found.
    pub async fn cancel_scrub(&self, id: &str) -> Result<ScrubStatus, Error> {
        let scrub = self.find_scrub(id)?;
        scrub.cancelled.cancel();
        Ok(scrub.handle().finished().await)
    }

    fn find_scrub(&self, id: &str) -> Result<Arc<Scrub>, Error> {
        let books = self.0.scrubs.0.lock().expect("no panic while the passes are held");
        let found = books.active.iter().chain(&books.ended).find(|scrub| scrub.id == id);
        found.cloned().ok_or_else(|| Error::ScrubNotFound { id: id.chars().take(80).collect() })
    }

    async fn run_scrub(&self, scrub: Arc<Scrub>) {
        let (there, runtime) = (scrub.clone(), Handle::current());
        let result = self.blocking(move |cache| cache.pass(&there, &runtime)).await;
        // Out of the active ones first: who is told that it has ended may ask for the next one at once.
        {
            let mut books = self.0.scrubs.0.lock().expect("no panic while the passes are held");
            if let Some(scrub) = books.active.take_if(|active| active.id == scrub.id) {
                books.put_away(scrub);
            }
        }
        scrub.status.send_modify(|status| {
            status.ended_at = Some(rfc3339(now_ms()));
            status.phase = match &result {
                Ok(true) => ScrubPhase::Done,
                Ok(false) => ScrubPhase::Cancelled,
                Err(error) => {
                    status.error = Some(ProblemBody::from(&Problem::of(error)));
                    ScrubPhase::Failed
                }
            };
            tracing::info!(
                scrub = status.id,
                phase = status.phase.text(),
                blobs = status.blobs_done,
                bytes = status.bytes_done,
                findings = status.findings_total,
                code = result.as_ref().err().map(|error| error.code().text()),
                "scrub ended"
            );
        });
    }

    /// One pass over all blobs, by digest; `false` if it was stopped. Blocking.
    fn pass(&self, scrub: &Scrub, runtime: &Handle) -> Result<bool, Error> {
        let mut note = self.0.volume.scrub_note();
        let reached = note.reached.filter(|_| scrub.in_background);
        let mut blobs = self.0.ledger.blobs();
        blobs.sort_by_key(|blob| blob.digest);
        blobs.retain(|blob| reached.is_none_or(|reached| blob.digest > reached));
        scrub.status.send_modify(|status| {
            status.blobs_total = blobs.len() as u64;
            status.bytes_total = blobs.iter().map(|blob| blob.size).sum();
        });
        let mut priority = IoPriority::of_this_thread();
        let mut pace = Pace::at(scrub.rate);
        // One for all: to find and clear it takes longer than to read a small file.
        let mut page = HugePage::map().map_err(|source| {
            let path = self.0.volume.root().to_owned();
            store::Error::Disk { verb: "take memory to scrub", path, source }
        })?;
        let (mut told, mut noted) = (Instant::now(), Instant::now());
        for blob in blobs {
            let go_on = |bytes: u64| {
                let wait = pace.before(bytes);
                if told.elapsed() >= TELL_EVERY || !wait.is_zero() {
                    told = Instant::now();
                    scrub.status.send_modify(|_| ());
                }
                self.0.metrics.scrubbed(bytes);
                scrub.status.send_if_modified(|status| {
                    status.bytes_done += bytes;
                    false
                });
                if !wait.is_zero() || scrub.in_background {
                    runtime.block_on(scrub.pause(&self.0.demand, wait));
                }
                !scrub.cancelled.is_cancelled()
            };
            // Also where somebody asked for it: whoever reads a model now cannot wait, this can.
            priority.give_way(true);
            let found = self.0.volume.scrub_blob(blob.digest, blob.size, &mut page, go_on)?;
            priority.give_way(false);
            if found == Scrubbed::Stopped {
                self.remember(&note);
                return Ok(false);
            }
            self.act_on(scrub, blob, found)?;
            scrub.status.send_if_modified(|status| {
                status.blobs_done += 1;
                false
            });
            note.reached = Some(blob.digest);
            if noted.elapsed() >= NOTE_EVERY {
                noted = Instant::now();
                self.remember(&note);
            }
        }
        self.remember(&ScrubNote { reached: None, ended_ms: Some(now_ms()) });
        Ok(true)
    }

    /// A pass that is forgotten only begins anew.
    fn remember(&self, note: &ScrubNote) {
        if let Err(error) = self.0.volume.write_scrub_note(note) {
            tracing::warn!(%error, "it cannot be written down how far scrubbing has come");
        }
    }

    fn act_on(&self, scrub: &Scrub, blob: Blob, found: Scrubbed) -> Result<(), Error> {
        let (found, inode) = match found {
            Scrubbed::Right | Scrubbed::Stopped | Scrubbed::Leased => return Ok(()),
            // Somebody has removed the model since the blobs were listed.
            Scrubbed::Missing if !self.0.ledger.is_here(blob.digest) => return Ok(()),
            Scrubbed::Missing => (Found::Missing, None),
            Scrubbed::Wrong { inode } => (Found::Wrong, Some(inode)),
            Scrubbed::Unreadable { inode, why } => {
                tracing::warn!(blob = %blob.digest.short(), why, "the disk does not give the bytes of a blob");
                (Found::Unreadable, Some(inode))
            }
        };
        self.0.metrics.scrub_found(found.text());
        tracing::warn!(blob = %blob.digest.short(), bytes = blob.size, ?found, "scrubbing found a blob that is not right");
        // Who opens it meanwhile must not be told by its stamp that it is right.
        self.0.volume.distrust(blob.digest)?;
        let lists = self.files_of(blob.digest);
        self.give_up(blob.digest, inode)?;
        self.save_stamps();
        scrub.status.send_modify(|status| {
            status.findings_total += 1;
            let lists = if lists.is_empty() { vec![(None, None)] } else { lists };
            for (reference, file) in lists {
                if status.findings.len() < MAX_FINDINGS {
                    status.findings.push(ScrubFinding { blob: blob.digest.to_string(), found, reference, file });
                }
            }
        });
        Ok(())
    }

    /// Which files of which models a blob is.
    fn files_of(&self, digest: Digest) -> Vec<(Option<String>, Option<String>)> {
        let mut found = Vec::new();
        for (record, _) in self.0.ledger.models() {
            let manifest = self.0.volume.read_manifest(record.manifest);
            let files = manifest.as_ref().map(Manifest::files).unwrap_or_default();
            let named = files.iter().filter(|file| file.digest == digest);
            found.extend(named.map(|file| (Some(record.reference.to_string()), Some(file.path.to_string()))));
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::super::demand::Urgency;
    use super::*;

    fn scrub(in_background: bool) -> Scrub {
        let status = ScrubStatus::started("s1", None, in_background, String::new());
        let status = watch::Sender::new(status);
        Scrub { id: "s1".into(), rate: None, in_background, status, cancelled: CancellationToken::new() }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_nobody_asked_for_stands_still_while_somebody_waits_also_at_a_rate() {
        let demand = Demand::new(None);
        let wanted = Urgency::of(&demand);
        wanted.raise();
        for wait in [Duration::ZERO, Duration::from_millis(50)] {
            let (background, asked_for) = (scrub(true), scrub(false));
            asked_for.pause(&demand, wait).await;
            let mut stands_still = Box::pin(background.pause(&demand, wait));
            let hour = Duration::from_secs(3600);
            assert!(tokio::time::timeout(hour, &mut stands_still).await.is_err(), "{wait:?}");
            background.cancelled.cancel();
            stands_still.await;
        }
        wanted.end();
        tokio::time::sleep(Duration::from_millis(1)).await;
        scrub(true).pause(&demand, Duration::ZERO).await;
        assert!(demand.is_quiet().now_or_never().is_some());
    }
}

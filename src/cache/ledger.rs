//! What is here and what is promised, under the one lock. Nothing waits inside it: no I/O, no `.await`, no callback.

mod leases;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use super::lease::Held;
use super::limits::{Room, Taken};
use crate::model::{Bytes, Digest, Holder, Location, Manifest, ManifestFile, ModelId, ModelRef, Record, RelPath};
use crate::store::{Blob, PinnedBy};
use crate::telemetry::metrics::LeaseCounts;
use leases::Leases;

/// The facts the cache decides by. Cheap to clone.
#[derive(Clone, Default)]
pub(super) struct Ledger(Arc<Mutex<Facts>>);

#[derive(Default)]
struct Facts {
    models: BTreeMap<ModelId, Arc<Record>>,
    /// Of each model.
    contents: HashMap<ModelId, Content>,
    /// Models that have their name and lack bytes, and which file lacks them.
    broken: BTreeMap<ModelId, RelPath>,
    /// By reference text: its version with the highest sequence.
    current: HashMap<String, ModelId>,
    /// By id. Each is on a model that is in these books.
    leases: Leases,
    /// By reference text.
    pins: BTreeMap<String, Pinned>,
    /// A lease or a pin cannot be read: nobody knows what it keeps.
    unknown_holders: Option<String>,
    blobs: HashMap<Digest, BlobUse>,
    taken: Taken,
    last_sequence: u64,
    /// A record or a manifest cannot be read: what it names is not in these books.
    incomplete: bool,
}

/// What a model is made of.
#[derive(Clone)]
struct Content {
    /// Each once.
    blobs: Arc<[Digest]>,
    /// When it came, if that was in the life of this process.
    came: Option<Instant>,
}

/// One blob in the books.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlobUse {
    pub(super) size: u64,
    /// Bytes of the disk it takes.
    pub(super) disk_bytes: u64,
    /// Not so after its bytes were found wrong, until they have come again.
    pub(super) is_here: bool,
    /// Models that list it, and pulls that hold it.
    pub(super) users: u32,
}

impl BlobUse {
    fn missing(size: u64) -> BlobUse {
        BlobUse { size, disk_bytes: 0, is_here: false, users: 0 }
    }
}

/// A model that was taken out of the books: nobody can open it.
#[must_use = "it is destroyed, or taken back"]
pub(super) struct Unnamed {
    pub(super) record: Arc<Record>,
    content: Content,
    lacking: Option<RelPath>,
}

impl Unnamed {
    /// Its blobs, each once.
    pub(super) fn blobs(&self) -> Arc<[Digest]> {
        self.content.blobs.clone()
    }
}

/// What an eviction is decided by, all of one moment.
pub(super) struct Books {
    pub(super) models: Vec<BookedModel>,
    pub(super) blobs: HashMap<Digest, BlobUse>,
    /// Why it cannot be known what somebody uses.
    pub(super) unknown: Option<String>,
}

/// One model of them.
pub(super) struct BookedModel {
    pub(super) id: ModelId,
    pub(super) record: Arc<Record>,
    pub(super) blobs: Arc<[Digest]>,
    pub(super) came: Option<Instant>,
    /// Who holds leases on it, in words.
    pub(super) holders: Vec<String>,
    pub(super) is_pinned: bool,
}

/// A reference that is kept, as the books have it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pinned {
    pub(super) reference: ModelRef,
    pub(super) by: BTreeSet<PinnedBy>,
    pub(super) since_ms: u64,
}

/// Why a model keeps its name: who uses it, in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum InUse {
    /// These hold leases or pins on it.
    By(Vec<String>),
    /// There is a lease or a pin that cannot be read.
    Unknown(String),
}

/// Why there is no room. "Never" and "not now" are different answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoRoom {
    /// The model is larger than the quota.
    Never {
        /// The quota.
        quota: Bytes,
    },
    /// It would fit if something else were not here.
    Now(Refusal),
}

/// The numbers of a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refusal {
    /// What could still be written.
    pub(super) free: Bytes,
    /// What models use.
    pub(super) used: Bytes,
    /// What other pulls were promised.
    pub(super) reserved: Bytes,
    /// The quota, if it is what is short; otherwise the disk is.
    pub(super) quota: Option<Bytes>,
}

/// A promise of bytes that are not written yet. Drop gives back what is left of it.
#[must_use]
pub(super) struct Reservation {
    ledger: Ledger,
    left_bytes: u64,
    written_bytes: u64,
}

/// Keeps blobs from being removed while a pull counts on them. Drop lets go.
#[must_use]
pub(super) struct Hold {
    ledger: Ledger,
    digests: Vec<Digest>,
}

/// Counts for `/metrics`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Totals {
    pub(super) models: u64,
    pub(super) taken: Taken,
}

impl Ledger {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.lock().expect("no panic while the ledger is held")
    }

    /// Start-up: a blob that is on disk, named or not, and the bytes of the disk it takes.
    pub(super) fn found_blob(&self, blob: Blob, disk_bytes: u64) {
        let mut facts = self.facts();
        let found = BlobUse { size: blob.size, disk_bytes, is_here: true, users: 0 };
        if facts.blobs.insert(blob.digest, found).is_none() {
            facts.taken.blob_bytes += disk_bytes;
        }
    }

    /// Start-up: a model that has its name.
    pub(super) fn found(&self, record: Record, manifest: &Manifest) {
        self.enter(record, manifest, None);
    }

    /// A model has its name: it counts from now on. Replaces what the same id said before. It is broken if a blob of it is
    /// not here.
    pub(super) fn name(&self, record: Record, manifest: &Manifest) {
        self.enter(record, manifest, Some(Instant::now()));
    }

    fn enter(&self, record: Record, manifest: &Manifest, came: Option<Instant>) {
        let mut facts = self.facts();
        let id = record.id();
        facts.last_sequence = facts.last_sequence.max(record.sequence);
        // Other content under the same id is counted too. What it replaces keeps its count, and so its bytes, until the
        // next start: too much is kept rather than too little.
        let replaced = facts.models.insert(id, Arc::new(record.clone()));
        if replaced.is_none_or(|replaced| replaced.manifest != record.manifest) {
            let sizes: BTreeMap<Digest, u64> = manifest.files().iter().map(|file| (file.digest, file.size)).collect();
            for (digest, size) in &sizes {
                facts.blobs.entry(*digest).or_insert(BlobUse::missing(*size)).users += 1;
            }
            facts.contents.insert(id, Content { blobs: sizes.into_keys().collect(), came });
        }
        let lacks = |file: &&ManifestFile| facts.blobs.get(&file.digest).is_none_or(|user| !user.is_here);
        match manifest.files().iter().find(lacks).map(|file| file.path.clone()) {
            Some(path) => facts.broken.insert(id, path),
            None => facts.broken.remove(&id),
        };
        facts.may_be_current(&record);
    }

    /// A model loses its name, unless somebody uses it. From now on nobody can open it. `None` if it is not here.
    pub(super) fn unname(&self, id: ModelId) -> Result<Option<Unnamed>, InUse> {
        let mut facts = self.facts();
        facts.not_in_use(id)?;
        let (Some(record), Some(content)) = (facts.models.remove(&id), facts.contents.remove(&id)) else {
            return Ok(None);
        };
        let lacking = facts.broken.remove(&id);
        for digest in &*content.blobs {
            if let Some(user) = facts.blobs.get_mut(digest) {
                user.users = user.users.saturating_sub(1);
            }
        }
        let text = record.reference.to_string();
        let next = facts.models.values().filter(|r| r.reference == record.reference).max_by_key(|r| r.sequence);
        match next.map(|r| r.id()) {
            Some(next) => facts.current.insert(text, next),
            None => facts.current.remove(&text),
        };
        Ok(Some(Unnamed { record, content, lacking }))
    }

    /// A model has its name again, as if it had never lost it.
    pub(super) fn take_back(&self, unnamed: Unnamed) {
        let Unnamed { record, content, lacking } = unnamed;
        let mut facts = self.facts();
        let id = record.id();
        for digest in &*content.blobs {
            facts.blobs.entry(*digest).or_insert(BlobUse::missing(0)).users += 1;
        }
        if let Some(file) = lacking {
            facts.broken.insert(id, file);
        }
        facts.may_be_current(&record);
        facts.models.insert(id, record);
        facts.contents.insert(id, content);
    }

    /// Everything an eviction is decided by. Copies, so that deciding holds nobody up.
    pub(super) fn books(&self) -> Books {
        let facts = self.facts();
        let pinned: BTreeSet<ModelId> =
            facts.pins.keys().filter_map(|reference| facts.current.get(reference)).copied().collect();
        let model = |(id, record): (&ModelId, &Arc<Record>)| {
            let content = facts.contents.get(id)?;
            Some(BookedModel {
                id: *id,
                record: record.clone(),
                blobs: content.blobs.clone(),
                came: content.came,
                holders: facts.holders_of(*id),
                is_pinned: pinned.contains(id),
            })
        };
        Books {
            models: facts.models.iter().filter_map(model).collect(),
            blobs: facts.blobs.clone(),
            unknown: facts.why_unknown(),
        }
    }

    /// Why it cannot be known what somebody uses.
    pub(super) fn why_unknown(&self) -> Option<String> {
        self.facts().why_unknown()
    }

    /// Those of the blobs that nothing uses.
    pub(super) fn unused_of(&self, blobs: &[Digest]) -> Vec<Digest> {
        let facts = self.facts();
        let is_unused = |digest: &&Digest| facts.blobs.get(digest).is_some_and(|user| user.users == 0);
        blobs.iter().filter(is_unused).copied().collect()
    }

    /// Who uses a model, if anybody does.
    pub(super) fn not_in_use(&self, id: ModelId) -> Result<(), InUse> {
        self.facts().not_in_use(id)
    }

    /// Leases a version of a reference: this one, or the one it means now. `held` must not use the books.
    pub(super) fn lease_version(
        &self,
        reference: &ModelRef,
        version: Option<&str>,
        held: impl FnOnce(ModelId) -> Held,
    ) -> Option<(Arc<Record>, Held)> {
        let mut facts = self.facts();
        let id = match version {
            Some(version) => ModelId::new(reference, version),
            None => *facts.current.get(&reference.to_string())?,
        };
        let record = facts.models.get(&id).cloned()?;
        let held = held(id);
        facts.leases.insert(held.clone());
        Some((record, held))
    }

    /// Leases a version, if it is here; what the same id said before.
    pub(super) fn lease(&self, held: Held) -> Result<Option<Held>, ()> {
        let mut facts = self.facts();
        if !facts.models.contains_key(&held.model) {
            return Err(());
        }
        Ok(facts.leases.insert(held))
    }

    /// A lease ends.
    pub(super) fn release(&self, id: &str) {
        self.facts().leases.remove(id);
    }

    /// Every lease, also those whose time is over.
    pub(super) fn leases(&self) -> Vec<Held> {
        self.facts().leases.iter().cloned().collect()
    }

    /// One lease.
    pub(super) fn lease_by_id(&self, id: &str) -> Option<Held> {
        self.facts().leases.get(id).cloned()
    }

    /// The lease this holder has on this version.
    pub(super) fn lease_of(&self, holder: &Holder, model: ModelId) -> Option<Held> {
        self.facts().leases.on(model).find(|held| &held.holder == holder).cloned()
    }

    /// How many leases outlive their request.
    pub(super) fn noted_leases(&self) -> usize {
        self.facts().leases.noted()
    }

    /// Leases on a version, and whether a pin keeps it.
    pub(super) fn uses_of(&self, id: ModelId) -> (u64, bool) {
        let facts = self.facts();
        (facts.leases.count_on(id) as u64, facts.pin_of(id).is_some())
    }

    /// Start-up: there is a lease or a pin that cannot be read.
    pub(super) fn holders_are_unknown(&self, why: String) {
        self.facts().unknown_holders.get_or_insert(why);
    }

    /// Sets a pin; what was there before.
    pub(super) fn pin(&self, pinned: Pinned) -> Option<Pinned> {
        self.facts().pins.insert(pinned.reference.to_string(), pinned)
    }

    /// Takes a pin away.
    pub(super) fn unpin(&self, reference: &ModelRef) -> Option<Pinned> {
        self.facts().pins.remove(&reference.to_string())
    }

    /// The pin of a reference.
    pub(super) fn pinned(&self, reference: &ModelRef) -> Option<Pinned> {
        self.facts().pins.get(&reference.to_string()).cloned()
    }

    /// Every pin, by reference.
    pub(super) fn pins(&self) -> Vec<Pinned> {
        self.facts().pins.values().cloned().collect()
    }

    /// The number the next confirmation gets.
    pub(super) fn next_sequence(&self) -> u64 {
        let mut facts = self.facts();
        facts.last_sequence += 1;
        facts.last_sequence
    }

    /// The version a reference means now.
    pub(super) fn current(&self, reference: &ModelRef) -> Option<Arc<Record>> {
        let facts = self.facts();
        facts.current.get(&reference.to_string()).and_then(|id| facts.models.get(id)).cloned()
    }

    /// Whether a reference means this version now.
    pub(super) fn is_current(&self, reference: &ModelRef, id: ModelId) -> bool {
        self.facts().current.get(&reference.to_string()) == Some(&id)
    }

    /// One version.
    pub(super) fn model(&self, id: ModelId) -> Option<Arc<Record>> {
        self.facts().models.get(&id).cloned()
    }

    /// Every version of every reference, each with whether it is the current one.
    pub(super) fn models(&self) -> Vec<(Arc<Record>, bool)> {
        let facts = self.facts();
        let is_current = |r: &Record| facts.current.get(&r.reference.to_string()) == Some(&r.id());
        facts.models.values().map(|r| (r.clone(), is_current(r))).collect()
    }

    /// The bytes of a blob are gone. Who uses it still does, and lacks them.
    pub(super) fn lose(&self, digest: Digest) {
        let mut facts = self.facts();
        if let Some(user) = facts.blobs.get_mut(&digest).filter(|user| user.is_here) {
            user.is_here = false;
            let disk_bytes = std::mem::take(&mut user.disk_bytes);
            facts.taken.blob_bytes -= disk_bytes;
        }
    }

    /// Another inode has taken the place of a blob.
    pub(super) fn is_renewed(&self, digest: Digest, disk_bytes: u64) {
        let mut facts = self.facts();
        if let Some(user) = facts.blobs.get_mut(&digest).filter(|user| user.is_here) {
            let before = std::mem::replace(&mut user.disk_bytes, disk_bytes);
            facts.taken.blob_bytes = facts.taken.blob_bytes - before + disk_bytes;
        }
    }

    /// A model lacks the bytes of this file: it is not opened, nor told of as local, until it is named again.
    pub(super) fn lacks(&self, id: ModelId, file: &RelPath) {
        let mut facts = self.facts();
        if facts.models.contains_key(&id) {
            facts.broken.insert(id, file.clone());
        }
    }

    /// A model is laid out again, and lacks nothing.
    pub(super) fn is_mended(&self, id: ModelId) {
        self.facts().broken.remove(&id);
    }

    /// Whether the bytes of a blob are here.
    pub(super) fn is_here(&self, digest: Digest) -> bool {
        self.facts().blobs.get(&digest).is_some_and(|user| user.is_here)
    }

    /// The file whose bytes a model lacks.
    pub(super) fn lacking(&self, id: ModelId) -> Option<RelPath> {
        self.facts().broken.get(&id).cloned()
    }

    /// Whether any model is laid out there.
    pub(super) fn uses_snapshot(&self, snapshot: &RelPath) -> bool {
        self.facts().models.values().any(|r| &r.snapshot == snapshot)
    }

    /// Whether any model has this content.
    pub(super) fn uses_manifest(&self, manifest: Digest) -> bool {
        self.facts().models.values().any(|r| r.manifest == manifest)
    }

    /// What `refs/<revision>` of a Hub repository should lead to: the whole repository if it is here, else the newest
    /// selection of it, because an unmodified reader knows no selections.
    pub(super) fn hub_target(&self, repo: &str, revision: &str) -> Option<RelPath> {
        let facts = self.facts();
        let names = |r: &Arc<Record>| match r.reference.location() {
            Location::Hub { repo: its, revision: at, .. } => its == repo && at == revision,
            _ => false,
        };
        let models = facts.models.iter().filter(|(id, r)| names(r) && !facts.broken.contains_key(id));
        let best = models.max_by_key(|(_, r)| (!r.reference.is_partial(), r.sequence));
        best.map(|(_, r)| r.snapshot.clone())
    }

    /// Holds a blob if it is here.
    pub(super) fn hold_if_here(&self, hold: &mut Hold, digest: Digest) -> bool {
        let mut facts = self.facts();
        let Some(user) = facts.blobs.get_mut(&digest).filter(|user| user.is_here) else { return false };
        user.users += 1;
        hold.digests.push(digest);
        true
    }

    /// A hold on nothing yet.
    pub(super) fn hold(&self) -> Hold {
        Hold { ledger: self.clone(), digests: Vec::new() }
    }

    /// Start-up: there is a record or a manifest that cannot be read, so nobody knows what it names.
    pub(super) fn lacks_a_name(&self) {
        self.facts().incomplete = true;
    }

    /// Blobs that neither a model nor a pull uses: what pulls that did not end well have left. None if that cannot be
    /// known.
    pub(super) fn unused_blobs(&self) -> Vec<Digest> {
        let facts = self.facts();
        let unused = facts.blobs.iter().filter(|(_, user)| user.users == 0 && !facts.incomplete);
        unused.map(|(digest, _)| *digest).collect()
    }

    /// Every blob that is here.
    pub(super) fn blobs(&self) -> Vec<Blob> {
        self.facts().blobs.iter().map(|(digest, found)| Blob { digest: *digest, size: found.size }).collect()
    }

    /// Takes a blob that nothing uses out of the books, so that its bytes can be unlinked. The bytes of the disk it takes
    /// still count, until [`Ledger::given_back`].
    pub(super) fn strike_if_unused(&self, digest: Digest) -> Option<u64> {
        let mut facts = self.facts();
        let disk_bytes = facts.blobs.get(&digest).filter(|user| user.users == 0)?.disk_bytes;
        facts.blobs.remove(&digest);
        facts.taken.blob_bytes -= disk_bytes;
        facts.taken.going_bytes += disk_bytes;
        Some(disk_bytes)
    }

    /// The disk has the bytes of struck blobs back.
    pub(super) fn given_back(&self, disk_bytes: u64) {
        self.facts().taken.going_bytes -= disk_bytes;
    }

    /// Promises `want_bytes` of a model of `model_bytes`, before the first one is written.
    pub(super) fn reserve(&self, want_bytes: u64, model_bytes: u64, room: Room) -> Result<Reservation, NoRoom> {
        let mut facts = self.facts();
        if let Some(quota) = room.quota.filter(|quota| model_bytes > quota.0) {
            return Err(NoRoom::Never { quota });
        }
        if let Some(refusal) = facts.refusal(want_bytes, room) {
            return Err(NoRoom::Now(refusal));
        }
        facts.taken.reserved_bytes += want_bytes;
        Ok(Reservation { ledger: self.clone(), left_bytes: want_bytes, written_bytes: 0 })
    }

    /// Why so many bytes would not be promised now, if so.
    pub(super) fn refusal(&self, want_bytes: u64, room: Room) -> Option<Refusal> {
        self.facts().refusal(want_bytes, room)
    }

    /// The sums.
    pub(super) fn totals(&self) -> Totals {
        let facts = self.facts();
        Totals { models: (facts.models.len() - facts.broken.len()) as u64, taken: facts.taken }
    }

    /// Leases by the kind of their holder.
    pub(super) fn lease_counts(&self) -> LeaseCounts {
        let mut counts = LeaseCounts::default();
        for held in self.facts().leases.iter().filter(|held| !held.is_over()) {
            match held.holder {
                Holder::Pod(_) => counts.pods += 1,
                Holder::Name(_) => counts.names += 1,
                Holder::Connection(_) => counts.connections += 1,
            }
        }
        counts
    }
}

impl Facts {
    /// Of the versions of one reference, the one with the highest sequence is current.
    fn may_be_current(&mut self, record: &Record) {
        let text = record.reference.to_string();
        let newest = self.current.get(&text).and_then(|id| self.models.get(id)).map_or(0, |r| r.sequence);
        if record.sequence >= newest {
            self.current.insert(text, record.id());
        }
    }

    fn refusal(&self, want_bytes: u64, room: Room) -> Option<Refusal> {
        let taken = &self.taken;
        let of_quota = room.left_of_quota(taken).filter(|left| want_bytes > *left).map(|left| (left, room.quota));
        let left = room.left_of_disk(taken);
        let (free, quota) = of_quota.or((want_bytes > left).then_some((left, None)))?;
        let (used, reserved) = (Bytes(taken.blob_bytes + taken.going_bytes), Bytes(taken.reserved_bytes));
        Some(Refusal { free: Bytes(free), used, reserved, quota })
    }

    /// The pin that keeps a version: it keeps what the reference means now.
    fn pin_of(&self, id: ModelId) -> Option<&Pinned> {
        let text = self.models.get(&id)?.reference.to_string();
        self.pins.get(&text).filter(|_| self.current.get(&text) == Some(&id))
    }

    fn why_unknown(&self) -> Option<String> {
        let unnamed = || "a record or a manifest cannot be read".to_owned();
        self.unknown_holders.clone().or_else(|| self.incomplete.then(unnamed))
    }

    /// Who holds leases on a version, in words.
    fn holders_of(&self, id: ModelId) -> Vec<String> {
        let leases = self.leases.on(id).filter(|held| !held.is_over());
        let mut by: Vec<String> = leases.map(|held| format!("{} (lease `{}`)", held.holder, held.id)).collect();
        by.sort();
        by
    }

    fn not_in_use(&self, id: ModelId) -> Result<(), InUse> {
        if let Some(why) = &self.unknown_holders {
            return Err(InUse::Unknown(why.clone()));
        }
        let mut by = self.holders_of(id);
        by.extend(self.pin_of(id).map(|pin| format!("a pin on `{}`", pin.reference)));
        if by.is_empty() { Ok(()) } else { Err(InUse::By(by)) }
    }
}

impl Reservation {
    /// The file system has given these bytes: they are no longer free, but not yet a blob.
    pub(super) fn written(&mut self, bytes: u64) {
        let bytes = bytes.min(self.left_bytes - self.written_bytes);
        self.written_bytes += bytes;
        self.ledger.facts().taken.written_bytes += bytes;
    }

    /// The file system has these bytes back, or they have become a blob: they are no longer written ahead.
    fn settle(&mut self, facts: &mut Facts, bytes: u64) {
        let bytes = bytes.min(self.written_bytes);
        self.written_bytes -= bytes;
        facts.taken.written_bytes -= bytes;
    }

    /// Reserved bytes have become a blob that takes so many of the disk; `hold` keeps it.
    pub(super) fn became(&mut self, blob: Blob, disk_bytes: u64, hold: &mut Hold) {
        let ledger = self.ledger.clone();
        let mut facts = ledger.facts();
        self.settle(&mut facts, disk_bytes);
        let given = disk_bytes.min(self.left_bytes);
        self.left_bytes -= given;
        facts.taken.reserved_bytes -= given;
        let user = facts.blobs.entry(blob.digest).or_insert(BlobUse::missing(blob.size));
        let before = std::mem::replace(&mut user.disk_bytes, disk_bytes);
        *user = BlobUse { size: blob.size, disk_bytes, is_here: true, users: user.users + 1 };
        facts.taken.blob_bytes = facts.taken.blob_bytes - before + disk_bytes;
        hold.digests.push(blob.digest);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let ledger = self.ledger.clone();
        let mut facts = ledger.facts();
        self.settle(&mut facts, u64::MAX);
        facts.taken.reserved_bytes -= self.left_bytes;
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut facts = self.ledger.facts();
        for digest in &self.digests {
            if let Some(user) = facts.blobs.get_mut(digest) {
                user.users = user.users.saturating_sub(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ManifestFile;

    fn room(quota: Option<u64>, free_bytes: u64) -> Room {
        Room { quota: quota.map(Bytes), free_bytes, ..Room::default() }
    }

    fn taken(ledger: &Ledger) -> (u64, u64, u64) {
        let taken = ledger.totals().taken;
        (taken.blob_bytes, taken.going_bytes, taken.reserved_bytes)
    }

    fn blob(name: &str, size: u64) -> Blob {
        Blob { digest: Digest::of(name.as_bytes()), size }
    }

    #[test]
    fn never_fits_and_not_now_are_different_answers() {
        let ledger = Ledger::default();
        assert!(matches!(ledger.reserve(60, 101, room(Some(100), 1000)), Err(NoRoom::Never { quota: Bytes(100) })));
        let first = ledger.reserve(60, 60, room(Some(100), 1000)).ok().unwrap();
        let refused = ledger.reserve(60, 60, room(Some(100), 1000)).err().unwrap();
        let expected = Refusal { free: Bytes(40), used: Bytes(0), reserved: Bytes(60), quota: Some(Bytes(100)) };
        assert_eq!(refused, NoRoom::Now(expected));
        drop(first);
        assert!(ledger.reserve(60, 60, room(Some(100), 1000)).is_ok());
    }

    #[test]
    fn the_disk_can_be_short_where_the_quota_is_not() {
        let ledger = Ledger::default();
        let mut first = ledger.reserve(60, 60, room(None, 100)).ok().unwrap();
        assert!(matches!(
            ledger.reserve(41, 41, room(None, 100)),
            Err(NoRoom::Now(Refusal { free: Bytes(40), quota: None, .. }))
        ));
        // Half of the promise is on the disk: the disk has less, and less is promised of what it has.
        first.written(30);
        assert!(ledger.reserve(41, 41, room(None, 70)).is_err());
        assert!(ledger.reserve(40, 40, room(None, 70)).is_ok());
    }

    #[test]
    fn a_reservation_becomes_used_without_counting_twice_or_never() {
        let ledger = Ledger::default();
        let mut hold = ledger.hold();
        let mut reservation = ledger.reserve(100, 100, room(None, 1000)).ok().unwrap();
        reservation.written(60);
        reservation.became(blob("a", 58), 60, &mut hold);
        assert_eq!(taken(&ledger), (60, 0, 40));
        drop(reservation);
        assert_eq!(taken(&ledger), (60, 0, 0));
        assert_eq!(ledger.facts().taken.written_bytes, 0);
    }

    #[test]
    fn only_what_surely_nobody_uses_is_unused() {
        let ledger = Ledger::default();
        let [a, b, c] = ["a", "b", "c"].map(|name| blob(name, 5));
        for blob in [a, b, c] {
            ledger.found_blob(blob, 5);
        }
        let path = RelPath::new("weights").unwrap();
        let manifest =
            |blob: Blob| Manifest::new(vec![ManifestFile { path: path.clone(), digest: blob.digest, size: blob.size }]);
        let record = |manifest: &Manifest| Record {
            reference: "hf://org/name".parse().unwrap(),
            version: "v1".into(),
            manifest: manifest.digest(),
            snapshot: path.clone(),
            confirmed_at_ms: 0,
            sequence: 1,
            total_bytes: 5,
            total_files: 1,
            claims: Vec::new(),
        };
        ledger.name(record(&manifest(a)), &manifest(a));
        // A damaged model was fetched again, and the source gave other bytes under the same version.
        ledger.name(record(&manifest(b)), &manifest(b));
        assert_eq!(ledger.unused_blobs(), [c.digest]);
        ledger.lacks_a_name();
        assert_eq!(ledger.unused_blobs(), []);
    }

    #[test]
    fn a_blob_whose_bytes_are_lost_is_missed_until_they_come_again() {
        let ledger = Ledger::default();
        let a = blob("a", 5);
        ledger.found_blob(a, 5);
        let path = RelPath::new("weights").unwrap();
        let manifest = Manifest::new(vec![ManifestFile { path: path.clone(), digest: a.digest, size: 5 }]);
        let record = Record {
            reference: "hf://org/name".parse().unwrap(),
            version: "v1".into(),
            manifest: manifest.digest(),
            snapshot: path.clone(),
            confirmed_at_ms: 0,
            sequence: 1,
            total_bytes: 5,
            total_files: 1,
            claims: Vec::new(),
        };
        ledger.name(record.clone(), &manifest);
        assert_eq!(ledger.lacking(record.id()), None);

        ledger.lose(a.digest);
        ledger.lose(a.digest);
        ledger.lacks(record.id(), &path);
        assert_eq!((ledger.totals().models, taken(&ledger)), (0, (0, 0, 0)));
        assert!(!ledger.hold_if_here(&mut ledger.hold(), a.digest));
        assert_eq!(ledger.hub_target("org/name", "main"), None);
        ledger.name(record.clone(), &manifest);
        assert_eq!(ledger.lacking(record.id()), Some(path));

        let mut hold = ledger.hold();
        ledger.reserve(5, 5, room(None, 100)).ok().unwrap().became(a, 5, &mut hold);
        ledger.name(record.clone(), &manifest);
        drop(hold);
        assert_eq!(ledger.lacking(record.id()), None);
        assert_eq!((ledger.totals().models, taken(&ledger)), (1, (5, 0, 0)));
        assert_eq!(ledger.unused_blobs(), [], "the model still uses it");
    }

    #[test]
    fn a_model_that_is_taken_back_is_as_it_was() {
        let ledger = Ledger::default();
        let a = blob("a", 5);
        ledger.found_blob(a, 5);
        let file = |path: &str| ManifestFile { path: RelPath::new(path).unwrap(), digest: a.digest, size: 5 };
        let manifest = Manifest::new(vec![file("one"), file("two")]);
        let record = |version: &str, sequence| Record {
            reference: "hf://org/name".parse().unwrap(),
            version: version.into(),
            manifest: manifest.digest(),
            snapshot: RelPath::new(version).unwrap(),
            confirmed_at_ms: 0,
            sequence,
            total_bytes: 10,
            total_files: 2,
            claims: Vec::new(),
        };
        let (old, new) = (record("v1", 1), record("v2", 2));
        ledger.name(old.clone(), &manifest);
        ledger.name(new.clone(), &manifest);
        let current = |ledger: &Ledger| ledger.current(&new.reference).map(|record| record.version.clone());
        let unnamed = ledger.unname(new.id()).ok().flatten().unwrap();
        assert_eq!((current(&ledger).as_deref(), ledger.books().blobs[&a.digest].users), (Some("v1"), 1));
        assert_eq!(ledger.unused_of(&unnamed.blobs()), []);
        ledger.take_back(unnamed);
        assert_eq!((current(&ledger).as_deref(), ledger.books().blobs[&a.digest].users), (Some("v2"), 2));
        for record in [old, new] {
            assert!(ledger.unname(record.id()).ok().flatten().is_some());
        }
        assert_eq!(ledger.unused_of(&[a.digest]), [a.digest]);
    }

    #[test]
    fn a_held_blob_is_not_struck() {
        let ledger = Ledger::default();
        let a = blob("a", 5);
        ledger.found_blob(a, 5);
        let mut hold = ledger.hold();
        assert!(ledger.hold_if_here(&mut hold, a.digest));
        assert_eq!(ledger.strike_if_unused(a.digest), None);
        drop(hold);
        assert_eq!(ledger.strike_if_unused(a.digest), Some(5));
        assert!(!ledger.hold_if_here(&mut ledger.hold(), a.digest));
        assert_eq!(taken(&ledger), (0, 5, 0), "the disk has not got them back yet");
        ledger.given_back(5);
        assert_eq!(taken(&ledger), (0, 0, 0));
    }
}

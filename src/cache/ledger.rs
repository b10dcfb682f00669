//! What is here and what is promised, under the one lock. Nothing waits inside it: no I/O, no `.await`, no callback.

mod leases;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};

use super::lease::Held;
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
    blob_bytes: u64,
    reserved_bytes: u64,
    /// The part of `reserved_bytes` the file system has already given.
    written_bytes: u64,
    last_sequence: u64,
    /// A record or a manifest cannot be read: what it names is not in these books.
    incomplete: bool,
}

struct BlobUse {
    size: u64,
    /// Not so after its bytes were found wrong, until they have come again.
    is_here: bool,
    /// Models that list it, and pulls that hold it.
    users: u32,
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

/// How much room there is, for the decision and for the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// `volume.quota`, if one is set.
    pub(super) quota: Option<Bytes>,
    /// Bytes the file system would still give, less what we leave to others.
    pub(super) free_bytes: u64,
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
    Now {
        /// What could still be written.
        free: Bytes,
        /// What models use.
        used: Bytes,
        /// What other pulls were promised.
        reserved: Bytes,
        /// The quota, if it is what is short; otherwise the disk is.
        quota: Option<Bytes>,
    },
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
    pub(super) blob_bytes: u64,
    pub(super) reserved_bytes: u64,
}

impl Ledger {
    fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.lock().expect("no panic while the ledger is held")
    }

    /// Start-up: a blob that is on disk, named or not.
    pub(super) fn found_blob(&self, blob: Blob) {
        let mut facts = self.facts();
        if facts.blobs.insert(blob.digest, BlobUse { size: blob.size, is_here: true, users: 0 }).is_none() {
            facts.blob_bytes += blob.size;
        }
    }

    /// A model has its name: it counts from now on. Replaces what the same id said before. It is broken if a blob of it is
    /// not here.
    pub(super) fn name(&self, record: Record, manifest: &Manifest) {
        let mut facts = self.facts();
        let id = record.id();
        facts.last_sequence = facts.last_sequence.max(record.sequence);
        // Other content under the same id is counted too. What it replaces keeps its count, and so its bytes, until the
        // next start: too much is kept rather than too little.
        let replaced = facts.models.insert(id, Arc::new(record.clone()));
        if replaced.is_none_or(|replaced| replaced.manifest != record.manifest) {
            for file in manifest.files() {
                let missing = BlobUse { size: file.size, is_here: false, users: 0 };
                facts.blobs.entry(file.digest).or_insert(missing).users += 1;
            }
        }
        let lacks = |file: &&ManifestFile| facts.blobs.get(&file.digest).is_none_or(|user| !user.is_here);
        match manifest.files().iter().find(lacks).map(|file| file.path.clone()) {
            Some(path) => facts.broken.insert(id, path),
            None => facts.broken.remove(&id),
        };
        let text = record.reference.to_string();
        let newest = facts.current.get(&text).and_then(|id| facts.models.get(id)).map_or(0, |r| r.sequence);
        if record.sequence >= newest {
            facts.current.insert(text, id);
        }
    }

    /// A model loses its name, unless somebody uses it. From now on nobody can open it.
    pub(super) fn unname(&self, id: ModelId, manifest: &Manifest) -> Result<(), InUse> {
        let mut facts = self.facts();
        facts.not_in_use(id)?;
        let Some(record) = facts.models.remove(&id) else { return Ok(()) };
        facts.broken.remove(&id);
        for file in manifest.files() {
            if let Some(user) = facts.blobs.get_mut(&file.digest) {
                user.users = user.users.saturating_sub(1);
            }
        }
        let text = record.reference.to_string();
        let next = facts.models.values().filter(|r| r.reference == record.reference).max_by_key(|r| r.sequence);
        match next.map(|r| r.id()) {
            Some(next) => facts.current.insert(text, next),
            None => facts.current.remove(&text),
        };
        Ok(())
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
        let held = held(record.id());
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
        let leases = facts.leases.on(id).filter(|held| !held.is_over()).count();
        (leases as u64, facts.pin_of(id).is_some())
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
            let size = user.size;
            facts.blob_bytes -= size;
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
        let names = |r: &&Arc<Record>| match r.reference.location() {
            Location::Hub { repo: its, revision: at, .. } => its == repo && at == revision,
            _ => false,
        };
        let models = facts.models.values().filter(|r| !facts.broken.contains_key(&r.id()));
        let best = models.filter(names).max_by_key(|r| (!r.reference.is_partial(), r.sequence));
        best.map(|r| r.snapshot.clone())
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

    /// Takes a blob that nothing uses out of the books, so that its bytes can be unlinked.
    pub(super) fn strike_if_unused(&self, digest: Digest) -> bool {
        let mut facts = self.facts();
        match facts.blobs.get(&digest) {
            Some(user) if user.users == 0 => {
                let size = if user.is_here { user.size } else { 0 };
                facts.blob_bytes -= size;
                facts.blobs.remove(&digest);
                true
            }
            _ => false,
        }
    }

    /// Promises `want_bytes` of a model of `model_bytes`, before the first one is written.
    pub(super) fn reserve(&self, want_bytes: u64, model_bytes: u64, room: Room) -> Result<Reservation, NoRoom> {
        let mut facts = self.facts();
        if let Some(quota) = room.quota.filter(|quota| model_bytes > quota.0) {
            return Err(NoRoom::Never { quota });
        }
        let refuse = |free: u64, quota| NoRoom::Now {
            free: Bytes(free),
            used: Bytes(facts.blob_bytes),
            reserved: Bytes(facts.reserved_bytes),
            quota,
        };
        if let Some(quota) = room.quota {
            let left = quota.0.saturating_sub(facts.blob_bytes).saturating_sub(facts.reserved_bytes);
            if want_bytes > left {
                return Err(refuse(left, Some(quota)));
            }
        }
        let left = room.free_bytes.saturating_sub(facts.reserved_bytes - facts.written_bytes);
        if want_bytes > left {
            return Err(refuse(left, None));
        }
        facts.reserved_bytes += want_bytes;
        Ok(Reservation { ledger: self.clone(), left_bytes: want_bytes, written_bytes: 0 })
    }

    /// The sums.
    pub(super) fn totals(&self) -> Totals {
        let facts = self.facts();
        let models = (facts.models.len() - facts.broken.len()) as u64;
        Totals { models, blob_bytes: facts.blob_bytes, reserved_bytes: facts.reserved_bytes }
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
    /// The pin that keeps a version: it keeps what the reference means now.
    fn pin_of(&self, id: ModelId) -> Option<&Pinned> {
        let text = self.models.get(&id)?.reference.to_string();
        self.pins.get(&text).filter(|_| self.current.get(&text) == Some(&id))
    }

    fn not_in_use(&self, id: ModelId) -> Result<(), InUse> {
        if let Some(why) = &self.unknown_holders {
            return Err(InUse::Unknown(why.clone()));
        }
        let leases = self.leases.on(id).filter(|held| !held.is_over());
        let mut by: Vec<String> = leases.map(|held| format!("{} (lease `{}`)", held.holder, held.id)).collect();
        by.sort();
        by.extend(self.pin_of(id).map(|pin| format!("a pin on `{}`", pin.reference)));
        if by.is_empty() { Ok(()) } else { Err(InUse::By(by)) }
    }
}

impl Reservation {
    /// The file system has given these bytes: they are no longer free, but not yet a blob.
    pub(super) fn written(&mut self, bytes: u64) {
        let bytes = bytes.min(self.left_bytes - self.written_bytes);
        self.written_bytes += bytes;
        self.ledger.facts().written_bytes += bytes;
    }

    /// The file system has these bytes back, or they have become a blob: they are no longer written ahead.
    fn settle(&mut self, facts: &mut Facts, bytes: u64) {
        let bytes = bytes.min(self.written_bytes);
        self.written_bytes -= bytes;
        facts.written_bytes -= bytes;
    }

    /// Reserved bytes have become a blob; `hold` keeps it.
    pub(super) fn became(&mut self, blob: Blob, hold: &mut Hold) {
        let ledger = self.ledger.clone();
        let mut facts = ledger.facts();
        self.settle(&mut facts, blob.size);
        let given = blob.size.min(self.left_bytes);
        self.left_bytes -= given;
        facts.reserved_bytes -= given;
        let missing = BlobUse { size: blob.size, is_here: false, users: 0 };
        let user = facts.blobs.entry(blob.digest).or_insert(missing);
        let is_new = !user.is_here;
        *user = BlobUse { size: if is_new { blob.size } else { user.size }, is_here: true, users: user.users + 1 };
        if is_new {
            facts.blob_bytes += blob.size;
        }
        hold.digests.push(blob.digest);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let ledger = self.ledger.clone();
        let mut facts = ledger.facts();
        self.settle(&mut facts, u64::MAX);
        facts.reserved_bytes -= self.left_bytes;
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
        Room { quota: quota.map(Bytes), free_bytes }
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
        let expected = NoRoom::Now { free: Bytes(40), used: Bytes(0), reserved: Bytes(60), quota: Some(Bytes(100)) };
        assert_eq!(refused, expected);
        drop(first);
        assert!(ledger.reserve(60, 60, room(Some(100), 1000)).is_ok());
    }

    #[test]
    fn the_disk_can_be_short_where_the_quota_is_not() {
        let ledger = Ledger::default();
        let mut first = ledger.reserve(60, 60, room(None, 100)).ok().unwrap();
        assert!(matches!(
            ledger.reserve(41, 41, room(None, 100)),
            Err(NoRoom::Now { free: Bytes(40), quota: None, .. })
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
        reservation.became(blob("a", 60), &mut hold);
        assert_eq!(ledger.totals(), Totals { models: 0, blob_bytes: 60, reserved_bytes: 40 });
        drop(reservation);
        assert_eq!(ledger.totals(), Totals { models: 0, blob_bytes: 60, reserved_bytes: 0 });
        assert_eq!(ledger.facts().written_bytes, 0);
    }

    #[test]
    fn only_what_surely_nobody_uses_is_unused() {
        let ledger = Ledger::default();
        let [a, b, c] = ["a", "b", "c"].map(|name| blob(name, 5));
        for blob in [a, b, c] {
            ledger.found_blob(blob);
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
        ledger.found_blob(a);
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
        assert_eq!(ledger.totals(), Totals { models: 0, blob_bytes: 0, reserved_bytes: 0 });
        assert!(!ledger.hold_if_here(&mut ledger.hold(), a.digest));
        assert_eq!(ledger.hub_target("org/name", "main"), None);
        ledger.name(record.clone(), &manifest);
        assert_eq!(ledger.lacking(record.id()), Some(path));

        let mut hold = ledger.hold();
        ledger.reserve(5, 5, room(None, 100)).ok().unwrap().became(a, &mut hold);
        ledger.name(record.clone(), &manifest);
        drop(hold);
        assert_eq!(ledger.lacking(record.id()), None);
        assert_eq!(ledger.totals(), Totals { models: 1, blob_bytes: 5, reserved_bytes: 0 });
        assert_eq!(ledger.unused_blobs(), [], "the model still uses it");
    }

    #[test]
    fn a_held_blob_is_not_struck() {
        let ledger = Ledger::default();
        let a = blob("a", 5);
        ledger.found_blob(a);
        let mut hold = ledger.hold();
        assert!(ledger.hold_if_here(&mut hold, a.digest));
        assert!(!ledger.strike_if_unused(a.digest));
        drop(hold);
        assert!(ledger.strike_if_unused(a.digest));
        assert!(!ledger.hold_if_here(&mut ledger.hold(), a.digest));
        assert_eq!(ledger.totals().blob_bytes, 0);
    }
}

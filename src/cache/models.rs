//! The verbs on models that are local: list, remove.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::ledger::{InUse, Unnamed};
use super::{Cache, Error, rfc3339};
use crate::model::{Digest, Location, ModelId, ModelRef, Record};
use crate::store::Holders;
use crate::wire::http::{ModelDetail, ModelFile, ModelInfo, Removed};

impl Cache {
    /// Every version of every reference, by reference and then newest first.
    pub fn models(&self) -> Vec<ModelInfo> {
        let mut models = self.0.ledger.models();
        models.retain(|(record, _)| self.0.ledger.lacking(record.id()).is_none());
        models.sort_by_key(|(record, _)| (record.reference.to_string(), u64::MAX - record.sequence));
        models.iter().map(|(record, current)| self.info(record, *current)).collect()
    }

    /// A version by its id, or the current version of a reference. Blocking.
    pub fn model(&self, name: &str) -> Result<ModelDetail, Error> {
        let record = match name.parse::<ModelId>() {
            Ok(id) => self.0.ledger.model(id),
            Err(()) => self.0.ledger.current(&name.parse()?),
        };
        let record = record.ok_or_else(|| self.not_local(name))?;
        if self.0.ledger.lacking(record.id()).is_some() {
            return Err(self.why_not_open(&record.reference));
        }
        let manifest = self.manifest(record.manifest)?;
        let file = |f: &crate::model::ManifestFile| ModelFile {
            path: f.path.to_string(),
            digest: f.digest.to_string(),
            size: f.size,
        };
        let mut model = self.info_now(&record);
        self.tell_residency(&mut model, &manifest);
        Ok(ModelDetail { model, manifest_files: manifest.files().iter().map(file).collect() })
    }

    /// Removes a version by its id, or every version of a reference. Blocking.
    pub fn remove(&self, name: &str) -> Result<Removed, Error> {
        self.hands()?;
        self.spend_reserve()?;
        let removed = self.remove_named(name);
        self.keep_reserve();
        removed
    }

    fn remove_named(&self, name: &str) -> Result<Removed, Error> {
        let _naming = self.0.naming.lock().expect("no panic while names change");
        let records: Vec<_> = match name.parse::<ModelId>() {
            Ok(id) => self.0.ledger.model(id).into_iter().collect(),
            Err(()) => {
                let reference: ModelRef = name.parse()?;
                self.0.ledger.models().into_iter().map(|(r, _)| r).filter(|r| r.reference == reference).collect()
            }
        };
        if records.is_empty() {
            return Err(Error::NothingToRemove { reference: name.to_owned() });
        }
        // All or nothing, as far as that can be: a reference some version of which is in use keeps them all.
        for record in &records {
            self.0.ledger.not_in_use(record.id()).map_err(|by| in_use(record, by))?;
        }
        let mut removed = Removed { models: Vec::new(), freed_bytes: 0 };
        for record in records {
            removed.models.push(self.info_now(&record));
            // Nobody may open it between the question whether it is in use and its end.
            let unnamed = self.0.ledger.unname(record.id()).map_err(|by| in_use(&record, by))?;
            if let Some(unnamed) = unnamed {
                removed.freed_bytes += self.destroy(unnamed, Vec::new())?;
                self.0.starts.removed(&record.reference);
            }
            tracing::info!(model = %record.id(), reference = %record.reference, version = record.version, "removed");
        }
        self.save_stamps();
        Ok(removed)
    }

    /// Takes away what is left of a model that nobody can open any more; returns the bytes of the disk this gives back.
    /// `holders` is what the kernel says of its blobs, where it was asked. Blocking; the caller holds `naming`.
    ///
    /// Order: name, index, snapshot, manifest, blobs, so that a crash leaves only what nothing names. If the name cannot be
    /// taken away, the model has it again.
    pub(super) fn destroy(&self, unnamed: Unnamed, holders: Vec<(Digest, Holders)>) -> Result<u64, Error> {
        let (record, blobs) = (unnamed.record.clone(), unnamed.blobs());
        if let Err(error) = self.0.volume.remove_record(record.id()) {
            self.0.ledger.take_back(unnamed);
            return Err(error.into());
        }
        if let Location::Hub { repo, revision, .. } = record.reference.location() {
            self.point_hub_ref(repo, revision)?;
        }
        if let Err(error) = self.hands()?.index.remove(&record) {
            tracing::warn!(%error, model = %record.id(), "the index still knows a model that is gone; it is not believed");
        }
        if let Err(error) = self.0.volume.forget_start(record.id()) {
            tracing::warn!(%error, model = %record.id(), "how a model came is still written down; the next start clears it away");
        }
        if !self.0.ledger.uses_snapshot(&record.snapshot) {
            self.0.volume.remove_snapshot(&record.snapshot)?;
        }
        if !self.0.ledger.uses_manifest(record.manifest) {
            self.0.volume.remove_manifest(record.manifest)?;
        }
        self.remove_unused_blobs(blobs.iter().copied(), holders)
    }

    /// Removes those of the blobs that neither a model nor a pull uses; returns the bytes of the disk this gives back.
    /// `holders` is what the kernel says of them, where it was asked. Blocking.
    pub(super) fn remove_unused_blobs(
        &self,
        digests: impl IntoIterator<Item = Digest>,
        holders: Vec<(Digest, Holders)>,
    ) -> Result<u64, Error> {
        let _no_commits = self.0.commits.write().expect("no panic while a commit is under way");
        let digests: BTreeSet<Digest> = digests.into_iter().collect();
        let mut holders: BTreeMap<Digest, Holders> = holders.into_iter().collect();
        let mut freed_bytes = 0;
        for digest in digests {
            let Some(booked_bytes) = self.0.ledger.strike_if_unused(digest) else { continue };
            // Where the kernel does not say, what readers keep open is not counted.
            let holders = holders.remove(&digest).or_else(|| self.0.volume.holders_now(digest).ok());
            let freed = self.0.volume.remove_blob(digest, holders)?;
            freed_bytes += freed.disk_bytes;
            match freed.open_yet {
                Some(open_yet) => self.watch(open_yet, booked_bytes),
                None => self.0.ledger.given_back(booked_bytes),
            }
        }
        Ok(freed_bytes)
    }

    /// Makes `refs/<revision>` lead to what the ledger says. Blocking; the caller holds `naming`, or nobody else runs.
    pub(super) fn point_hub_ref(&self, repo: &str, revision: &str) -> Result<(), Error> {
        match self.0.ledger.hub_target(repo, revision) {
            Some(snapshot) => {
                let name = snapshot.components().last().expect("a path has a last component").to_owned();
                self.0.volume.write_hub_ref(repo, revision, &name)?;
            }
            None => self.0.volume.remove_hub_ref(repo, revision)?,
        }
        Ok(())
    }

    /// The directory that was asked for: the snapshot, or the sub-directory of it.
    pub(super) fn directory(&self, record: &Record) -> PathBuf {
        self.0.volume.public().join(self.below_public(record))
    }

    /// The same, relative to the directory that readers mount.
    pub(super) fn below_public(&self, record: &Record) -> String {
        match record.reference.subdir() {
            Some(dir) => format!("{}/{dir}", record.snapshot),
            None => record.snapshot.to_string(),
        }
    }

    /// The same that a list says of it.
    pub(super) fn info_now(&self, record: &Record) -> ModelInfo {
        self.info(record, self.0.ledger.is_current(&record.reference, record.id()))
    }

    pub(super) fn info(&self, record: &Record, current: bool) -> ModelInfo {
        let id = record.id();
        let (leases, pinned) = self.0.ledger.uses_of(id);
        let opened = self.0.hands.as_ref().and_then(|hands| hands.index.last_use(id).opened_ms);
        ModelInfo {
            id: id.to_string(),
            reference: record.reference.to_string(),
            version: record.version.clone(),
            manifest: record.manifest.to_string(),
            current,
            path: self.directory(record).display().to_string(),
            bytes: record.total_bytes,
            files: record.total_files,
            confirmed_at: rfc3339(record.confirmed_at_ms),
            opened_at: opened.map(rfc3339),
            pinned,
            leases,
            resident_bytes: None,
            resident_percent: None,
        }
    }
}

fn in_use(record: &Record, by: InUse) -> Error {
    let reference = record.reference.to_string();
    match by {
        InUse::By(holders) => Error::InUse { reference, holders },
        InUse::Unknown(why) => Error::HoldersUnknown { reference, why },
    }
}

//! What an open hands out is what its name says.
//!
//! Before each open the names and inodes of the model are looked at. What nobody touched since it was last known to be right
//! needs no more; the bytes of the rest are hashed again. Right bytes are kept and laid out again where that is needed;
//! wrong ones go to quarantine, and the models that need them are pulled again.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::{Cache, Error};
use crate::model::{Digest, Location, Manifest, ManifestFile, ModelRef, Record, RelPath};
use crate::store::{self, Proof};
use crate::telemetry::metrics::ProofOutcome;

/// How often a model is looked at again because it was touched while it was being proven.
pub(super) const MAX_ROUNDS: u32 = 3;

/// Most opens that hash or wait for a hash at the same time; each has a thread. The others are told to ask again.
const MAX_PROVING: usize = 256;

/// Blobs that are being hashed, each once.
#[derive(Default)]
pub(super) struct Proofs(Mutex<HashMap<Digest, Arc<Mutex<()>>>>);

impl Proofs {
    /// `None` when there are too many.
    fn turn(&self, digest: Digest) -> Option<Arc<Mutex<()>>> {
        let mut turns = self.0.lock().expect("no panic while the turns are held");
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        let taken: usize = turns.values().map(|turn| Arc::strong_count(turn) - 1).sum();
        (taken < MAX_PROVING).then(|| turns.entry(digest).or_default().clone())
    }
}

impl Cache {
    /// Makes sure of a model that is to be handed out, and gives its files. Blocking; needs a tokio runtime, because what is
    /// wrong is pulled again.
    pub(super) fn prove(&self, record: &Arc<Record>) -> Result<Arc<Manifest>, Error> {
        let manifest = self.manifest(record.manifest)?;
        if self.is_as_left(record, &manifest)? {
            return Ok(manifest);
        }
        if self.0.hands.is_none() {
            // A view cannot mend anything; who holds the volume can.
            return Err(self.why_not_open(&record.reference));
        }
        let began = Instant::now();
        self.mend(record, &manifest)?;
        self.0.starts.proved(record.id(), began.elapsed());
        Ok(manifest)
    }

    /// Makes sure of one blob that is to be handed out. `false`: its bytes are not here, or no longer. Blocking; needs a tokio
    /// runtime.
    pub(super) fn prove_blob(&self, file: &ManifestFile) -> Result<bool, Error> {
        let digest = file.digest;
        if self.0.volume.is_proven(digest)? {
            return Ok(true);
        }
        let being_hashed = || Error::BeingHashed { file: file.path.to_string() };
        let turn = self.0.proofs.turn(digest).ok_or_else(being_hashed)?;
        let _turn = turn.lock().unwrap_or_else(|held| held.into_inner());
        if self.0.volume.is_proven(digest)? {
            return Ok(true);
        }
        // Nobody removes it while we look at it, or puts it back after it was removed.
        let mut hold = self.0.ledger.hold();
        if !self.0.ledger.hold_if_here(&mut hold, digest) {
            return Ok(false);
        }
        let proof = self.0.volume.prove(digest, file.size)?;
        match proof {
            Proof::Right => {
                self.0.metrics.proved(ProofOutcome::Right);
                tracing::info!(blob = %digest.short(), bytes = file.size, "a blob without a fitting stamp was hashed: it is right");
            }
            Proof::Renewed => {
                self.0.metrics.proved(ProofOutcome::Renewed);
                self.0.ledger.is_renewed(digest, self.0.volume.disk_bytes(digest)?);
                tracing::warn!(
                    blob = %digest.short(), bytes = file.size,
                    "a blob can be written by others, so a copy of it takes its place; its bytes are right"
                );
            }
            Proof::Wrong { inode } => {
                self.0.metrics.proved(ProofOutcome::Wrong);
                tracing::warn!(blob = %digest.short(), bytes = file.size, "the bytes of a blob are wrong: it goes to quarantine");
                self.give_up(digest, Some(inode))?;
            }
            Proof::Missing => {
                tracing::warn!(blob = %digest.short(), bytes = file.size, "a blob is gone");
                self.give_up(digest, None)?;
            }
        }
        self.save_stamps();
        Ok(matches!(proof, Proof::Right | Proof::Renewed))
    }

    /// The first file whose bytes are not here, after every blob was proven. Blocking; needs a tokio runtime.
    pub(super) fn first_lacking(&self, manifest: &Manifest) -> Result<Option<RelPath>, Error> {
        let (mut seen, mut lacking) = (BTreeSet::new(), None);
        for file in manifest.files() {
            if seen.insert(file.digest) && !self.prove_blob(file)? {
                lacking.get_or_insert_with(|| file.path.clone());
            }
        }
        Ok(lacking)
    }

    /// Why a file of a model cannot be had; the model is pulled again.
    pub(super) fn pull_again(&self, reference: &ModelRef, file: &RelPath) -> Error {
        match self.pull(reference) {
            Ok(pull) => {
                let status = pull.status.borrow();
                let eta = status.eta_seconds.map(Duration::from_secs);
                Error::Spoilt { what: reference.to_string(), file: file.to_string(), percent: status.percent, eta }
            }
            Err(error) => {
                tracing::warn!(%error, %reference, "a model whose bytes are wrong is not pulled again");
                error
            }
        }
    }

    /// After a pull: versions that lacked the same bytes have them again.
    pub(super) fn mend_others(&self) {
        for (record, _) in self.0.ledger.models() {
            if self.0.ledger.lacking(record.id()).is_none() {
                continue;
            }
            let Ok(manifest) = self.0.volume.read_manifest(record.manifest) else { continue };
            if manifest.files().iter().all(|file| self.0.ledger.is_here(file.digest))
                && let Err(error) = self.mend(&record, &manifest)
            {
                tracing::warn!(%error, model = %record.id(), "a model that has its bytes again cannot be laid out");
            }
        }
    }

    /// Proves the blobs, then lays the model out again if that is needed.
    pub(super) fn mend(&self, record: &Arc<Record>, manifest: &Manifest) -> Result<(), Error> {
        let mut rounds = 0;
        loop {
            if let Some(file) = self.first_lacking(manifest)? {
                self.0.ledger.lacks(record.id(), &file);
                let reference = &record.reference;
                if self.0.ledger.is_current(reference, record.id()) {
                    return Err(self.pull_again(reference, &file));
                }
                // Its source is not asked for former versions.
                let (reference, version) = (reference.to_string(), record.version.clone());
                return Err(Error::VersionNotLocal { reference, version });
            }
            rounds += 1;
            match self.lay_out_again(record, manifest) {
                Err(Error::Store(store::Error::Unproven { .. })) if rounds < MAX_ROUNDS => {}
                done => return done,
            }
        }
    }

    fn lay_out_again(&self, record: &Arc<Record>, manifest: &Manifest) -> Result<(), Error> {
        let _naming = self.0.naming.lock().expect("no panic while names change");
        // Somebody may have removed or mended it while we hashed.
        if self.0.ledger.model(record.id()).is_none() {
            return Err(self.why_not_open(&record.reference));
        }
        if !self.0.volume.is_laid_out(&record.snapshot, manifest)? {
            self.spend_reserve()?;
            self.0.volume.publish(&record.snapshot, manifest)?;
            self.keep_reserve();
            self.0.metrics.snapshot_mended();
            tracing::warn!(
                model = %record.id(), reference = %record.reference, snapshot = %record.snapshot,
                "the directory of a model was not as larder left it, and is laid out again"
            );
        }
        self.0.ledger.is_mended(record.id());
        if let Location::Hub { repo, revision, .. } = record.reference.location()
            && !self.hub_ref_is_as_left(repo, revision)?
        {
            match self.point_hub_ref(repo, revision) {
                Ok(()) => {
                    tracing::warn!(repo, revision, "a revision of the public tree led astray, and was written again")
                }
                // Another revision is a directory of this one: the pull has said so.
                Err(Error::Store(store::Error::RefConflict { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        self.save_stamps();
        Ok(())
    }

    /// Whether nobody touched it since it was last known to be right: a look at its names, and nothing is read but the
    /// Hub's ref.
    fn is_as_left(&self, record: &Record, manifest: &Manifest) -> Result<bool, Error> {
        Ok(self.0.volume.is_laid_out(&record.snapshot, manifest)? && self.is_named_as_left(record)?)
    }

    /// The same without opening its files: for who then gets descriptors, of which each is proven by itself.
    pub(super) fn looks_as_left(&self, record: &Record, manifest: &Manifest) -> Result<bool, Error> {
        Ok(self.0.volume.looks_laid_out(&record.snapshot, manifest)? && self.is_named_as_left(record)?)
    }

    fn is_named_as_left(&self, record: &Record) -> Result<bool, Error> {
        if self.0.ledger.lacking(record.id()).is_some() {
            return Ok(false);
        }
        match record.reference.location() {
            Location::Hub { repo, revision, .. } => self.hub_ref_is_as_left(repo, revision),
            _ => Ok(true),
        }
    }

    fn hub_ref_is_as_left(&self, repo: &str, revision: &str) -> Result<bool, Error> {
        let target = self.0.ledger.hub_target(repo, revision);
        let name = target.as_ref().and_then(|snapshot| snapshot.components().last());
        Ok(self.0.volume.hub_ref(repo, revision)?.as_deref() == name)
    }

    /// Takes bytes that are wrong (those of this inode), or gone, out of the books, and the models that list them out of the
    /// public tree: what is named is whole. Their records stay, so leases and pins know what they keep.
    pub(super) fn give_up(&self, digest: Digest, inode: Option<u64>) -> Result<(), Error> {
        let mut again = Vec::new();
        {
            let _naming = self.0.naming.lock().expect("no panic while names change");
            let _no_commits = self.0.commits.write().expect("no panic while a commit is under way");
            let is_gone = match inode {
                Some(inode) => self.0.volume.quarantine(digest, inode)?,
                None => self.0.volume.blob_size(digest)?.is_none(),
            };
            if !is_gone {
                // Somebody has put the right bytes in their place.
                return Ok(());
            }
            self.0.ledger.lose(digest);
            for (record, is_current) in self.0.ledger.models() {
                let Ok(manifest) = self.0.volume.read_manifest(record.manifest) else { continue };
                let Some(file) = manifest.files().iter().find(|file| file.digest == digest) else { continue };
                self.0.ledger.lacks(record.id(), &file.path);
                tracing::warn!(
                    model = %record.id(), reference = %record.reference, file = %file.path,
                    "a model lacks bytes that were found wrong, and is taken out of the public tree"
                );
                if let Location::Hub { repo, revision, .. } = record.reference.location() {
                    self.point_hub_ref(repo, revision)?;
                }
                self.0.volume.remove_snapshot(&record.snapshot)?;
                if is_current {
                    again.push((record.reference.clone(), file.path.clone()));
                }
            }
        }
        for (reference, file) in again {
            self.pull_again(&reference, &file);
        }
        Ok(())
    }

    /// Tells the index which inodes are known to be right. What it does not learn is hashed again after a restart.
    pub(super) fn save_stamps(&self) {
        let Some(hands) = &self.0.hands else { return };
        let changed = self.0.volume.changed_stamps();
        if !changed.is_empty()
            && let Err(error) = hands.index.write_stamps(&changed)
        {
            tracing::warn!(%error, "the index does not take the stamps of blobs: they are hashed again after a restart");
        }
    }
}

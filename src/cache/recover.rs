//! Start-up: what the disk says becomes what we know.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Budget, Cache, CacheConfig, Demand, Error, Hands, Inner, Ledger, now_ms};
use crate::index::Index;
use crate::model::{Location, Record};
use crate::source::Sources;
use crate::store::Volume;
use crate::telemetry::Metrics;

/// The index lives beside what it indexes; its schema's version is in the name, so that another schema starts empty.
const INDEX_DIRECTORY: &str = "index-v1";

impl Cache {
    /// Takes the volume and recovers: records, index (rebuilt if it is gone), sweep, ledger. Blocking.
    ///
    /// Fails if another process holds the volume, or if the directory is not a volume this program can read.
    pub fn start(config: CacheConfig, sources: Sources, metrics: Arc<Metrics>) -> Result<Cache, Error> {
        let volume = Volume::open(&config.root)?;
        // On a full disk the index could not be opened, and nothing be taken away.
        if volume.spend_reserve()? {
            tracing::warn!(
                "the disk is full: its reserve is given back, so that models can be opened, evicted or removed"
            );
        }
        let index = Index::open(&volume.root().join(INDEX_DIRECTORY));
        if index.was_rebuilt() {
            metrics.index_rebuilt();
        }
        // Before anything is linked or unlinked: who has no stamp cannot keep it.
        volume.recall_stamps(index.stamps());
        let (records, unreadable) = volume.records()?;
        if let Err(error) = index.reconcile(&records) {
            tracing::warn!(%error, "the index could not be filled; files that are here may be fetched again");
        }
        if unreadable.is_empty() {
            let swept = volume.sweep(&records)?;
            metrics.swept(swept.bytes);
            if swept.bytes > 0 {
                tracing::info!(bytes = swept.bytes, blobs = swept.blobs, "cleared away what nothing names");
            }
        }
        for error in &unreadable {
            tracing::warn!(%error, "a record cannot be read; nothing is cleared away until it is gone");
        }
        let cache = Cache::over(config, volume, Some(Hands { index, sources }), metrics);
        if !unreadable.is_empty() {
            cache.0.ledger.lacks_a_name();
        }
        cache.learn(records)?;
        cache.restore_leases()?;
        cache.restore_pins()?;
        cache.mend_snapshots();
        cache.mend_hub_refs();
        cache.recall_evictions();
        cache.keep_reserve();
        Ok(cache)
    }

    /// A view of a volume that another process may hold: lists and opens, writes nothing. Blocking.
    pub fn view(config: CacheConfig, metrics: Arc<Metrics>) -> Result<Cache, Error> {
        let volume = Volume::open_reader(&config.root)?;
        let (records, _) = volume.records()?;
        let cache = Cache::over(config, volume, None, metrics);
        cache.learn(records)?;
        cache.restore_leases()?;
        cache.restore_pins()?;
        cache.recall_evictions();
        Ok(cache)
    }

    fn over(config: CacheConfig, volume: Volume, hands: Option<Hands>, metrics: Arc<Metrics>) -> Cache {
        let budget = Arc::new(Budget::new(config.pull_memory.0, config.pull_connections));
        let limits = Mutex::new(config.limits);
        let demand = Demand::new(config.background_rate.map(|rate| rate.0));
        Cache(Arc::new(Inner {
            config,
            limits,
            evictions: Default::default(),
            starts: Default::default(),
            began_at_ms: now_ms(),
            volume,
            hands,
            metrics,
            traces: Default::default(),
            ledger: Ledger::default(),
            pods: Default::default(),
            pulls: Default::default(),
            manifests: Default::default(),
            demand,
            warms: Default::default(),
            scrubs: Default::default(),
            proofs: Default::default(),
            budget,
            naming: Default::default(),
            noting: Default::default(),
            asking: Default::default(),
            commits: Default::default(),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        }))
    }

    /// Fills the ledger. A record whose manifest cannot be read is not a model: it is said, and kept for a repair.
    fn learn(&self, records: Vec<Record>) -> Result<(), Error> {
        for (blob, disk_bytes) in self.0.volume.blobs()? {
            self.0.ledger.found_blob(blob, disk_bytes);
        }
        for record in records {
            match self.0.volume.read_manifest(record.manifest) {
                Ok(manifest) => self.0.ledger.found(record, &manifest),
                Err(error) => {
                    self.0.ledger.lacks_a_name();
                    tracing::warn!(%error, model = %record.id(), "a model is not served: pull it again");
                }
            }
        }
        Ok(())
    }

    /// A crash while a spoilt snapshot was being replaced leaves a model without one; its blobs are here.
    fn mend_snapshots(&self) {
        for (record, _) in self.0.ledger.models() {
            let lacks = self.0.ledger.lacking(record.id()).is_some();
            if lacks || self.0.volume.public().join(record.snapshot.as_path()).is_dir() {
                continue;
            }
            let manifest = self.0.volume.read_manifest(record.manifest).map_err(Error::from);
            if let Err(error) = manifest.and_then(|manifest| self.mend(&record, &manifest)) {
                tracing::warn!(%error, model = %record.id(), "a model cannot be laid out again: pull it again");
            }
        }
    }

    /// A crash between a record and its `refs/<revision>` leaves the old one; the records say what it should be.
    fn mend_hub_refs(&self) {
        let mut revisions = BTreeSet::new();
        for (record, _) in self.0.ledger.models() {
            if let Location::Hub { repo, revision, .. } = record.reference.location() {
                revisions.insert((repo.clone(), revision.clone()));
            }
        }
        for (repo, revision) in revisions {
            if let Err(error) = self.point_hub_ref(&repo, &revision) {
                tracing::warn!(%error, repo, revision, "a revision of the public tree could not be pointed at its snapshot");
            }
        }
    }
}

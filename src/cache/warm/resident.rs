//! What of the models is in the page cache, as the kernel tells. It is asked, never remembered: pages go at any moment.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::cache::Cache;
use crate::model::{Digest, Manifest, ModelId};
use crate::store::Blob;
use crate::telemetry::metrics::ResidentModel;
use crate::wire::http::ModelInfo;

/// A measurement of the whole volume is good for so long at least.
const GOOD_FOR: Duration = Duration::from_secs(5);
/// And for so many times what it took, so that scraping a large volume keeps no processor busy: a twentieth of one.
const GOOD_FOR_TIMES: u32 = 20;

/// The whole volume, as it was measured last. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub(in crate::cache) struct Residency {
    /// All blobs together; `None` if the kernel does not tell.
    pub(in crate::cache) bytes: Option<u64>,
    /// Each model, if that is configured.
    pub(in crate::cache) models: Vec<ResidentModel>,
}

/// The last measurement. Its lock is held while the next one is made, so that scrapes that come together make one; taken on
/// blocking threads only.
#[derive(Default)]
pub(super) struct LastResidency(Mutex<Option<Measured>>);

struct Measured {
    residency: Residency,
    good_until: Instant,
}

impl Cache {
    /// The same models, with how much of each is resident. Opens each of their blobs; blocking.
    pub fn with_residency(&self, mut models: Vec<ModelInfo>) -> Vec<ModelInfo> {
        for model in &mut models {
            let record = model.id.parse::<ModelId>().ok().and_then(|id| self.0.ledger.model(id));
            let manifest = record.and_then(|record| self.0.volume.read_manifest(record.manifest).ok());
            if let Some(manifest) = manifest {
                self.tell_residency(model, &manifest);
            }
        }
        models
    }

    /// Blocking.
    pub(in crate::cache) fn tell_residency(&self, model: &mut ModelInfo, manifest: &Manifest) {
        let blobs = blobs_of(manifest);
        model.resident_bytes = self.resident_of(&blobs);
        model.resident_percent = model.resident_bytes.map(|resident| percent(resident, total_of(&blobs)));
    }

    /// How many bytes of these are resident; `None` unless the kernel tells it of each. Blocking.
    pub(super) fn resident_of(&self, blobs: &[Blob]) -> Option<u64> {
        blobs.iter().map(|blob| self.0.volume.resident_bytes(blob.digest, blob.size)).sum()
    }

    /// The whole volume, as it was some seconds ago at most, or longer where it has very many files. Blocking.
    pub(in crate::cache) fn residency(&self) -> Residency {
        let mut last = self.0.warms.residency.0.lock().expect("no panic while residency is measured");
        if let Some(measured) = last.as_ref().filter(|measured| Instant::now() < measured.good_until) {
            return measured.residency.clone();
        }
        let began = Instant::now();
        let residency = self.measure();
        let good_for = GOOD_FOR.max(began.elapsed() * GOOD_FOR_TIMES);
        *last = Some(Measured { residency: residency.clone(), good_until: Instant::now() + good_for });
        residency
    }

    fn measure(&self) -> Residency {
        let blobs = self.0.ledger.blobs();
        let of_each = blobs.iter().map(|blob| {
            let resident = self.0.volume.resident_bytes(blob.digest, blob.size)?;
            Some((blob.digest, resident))
        });
        // One that is not told makes the sum unknown.
        let Some(of_each) = of_each.collect::<Option<HashMap<Digest, u64>>>() else { return Residency::default() };
        let models = if self.0.config.metrics_by_model { self.resident_models(&of_each) } else { Vec::new() };
        Residency { bytes: Some(of_each.values().sum()), models }
    }

    fn resident_models(&self, of_each: &HashMap<Digest, u64>) -> Vec<ResidentModel> {
        let models = self.0.ledger.models().into_iter().filter_map(|(record, _)| {
            let manifest = self.0.volume.read_manifest(record.manifest).ok()?;
            let bytes = blobs_of(&manifest).iter().filter_map(|blob| of_each.get(&blob.digest)).sum();
            Some(ResidentModel { model: record.id().to_string(), reference: record.reference.to_string(), bytes })
        });
        models.collect()
    }
}

/// The blobs of a model in the order of its paths, each once: one that stands twice is in memory once.
pub(super) fn blobs_of(manifest: &Manifest) -> Vec<Blob> {
    let mut seen = std::collections::HashSet::new();
    let files = manifest.files().iter().filter(|file| seen.insert(file.digest));
    files.map(|file| Blob { digest: file.digest, size: file.size }).collect()
}

/// Bytes of distinct blobs.
pub(super) fn total_of(blobs: &[Blob]) -> u64 {
    blobs.iter().map(|blob| blob.size).sum()
}

/// Rounded down: 100 only if nothing is missing.
pub(super) fn percent(bytes: u64, total: u64) -> u8 {
    if total == 0 {
        return 100;
    }
    (u128::from(bytes.min(total)) * 100 / u128::from(total)) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ManifestFile, RelPath};

    #[test]
    fn a_percentage_never_says_more_than_there_is() {
        for (bytes, total, expected) in
            [(0, 0, 100), (0, 10, 0), (1, 1000, 0), (999, 1000, 99), (1000, 1000, 100), (2000, 1000, 100)]
        {
            assert_eq!(percent(bytes, total), expected, "{bytes} of {total}");
        }
        assert_eq!(percent(u64::MAX - 1, u64::MAX), 99);
    }

    #[test]
    fn a_blob_that_stands_twice_counts_once_and_in_the_order_of_the_paths() {
        let file = |path: &str, content: &str| ManifestFile {
            path: RelPath::new(path).unwrap(),
            digest: Digest::of(content.as_bytes()),
            size: 5,
        };
        let manifest = Manifest::new(vec![file("b", "2"), file("a", "1"), file("c", "1")]);
        let blobs = blobs_of(&manifest);
        let digests: Vec<_> = blobs.iter().map(|blob| blob.digest).collect();
        assert_eq!(digests, [Digest::of(b"1"), Digest::of(b"2")]);
        assert_eq!(total_of(&blobs), 10);
    }
}

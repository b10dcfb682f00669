//! Opening a model that is local: its directory, or its files, and a lease on it. No network, no disk write but the note
//! of a lease that outlives the request.

use std::fs::File;
use std::sync::Arc;

use super::lease::{Lease, Terms};
use super::{Cache, Error, now_ms};
use crate::model::{Manifest, ManifestFile, ModelRef, Record, RelPath};
use crate::wire::http::{Detail, ModelInfo, OpenRequest, Opened};

/// A model that a connection has open.
pub struct OpenModel {
    /// The version.
    pub model: ModelInfo,
    /// Its files, relative to the directory that was asked for.
    pub files: Vec<ManifestFile>,
    /// While it is held, nothing of this version is taken away.
    pub lease: Lease,
}

impl Cache {
    /// The directory of the version a reference means now.
    pub fn open(&self, reference: &ModelRef) -> Result<ModelInfo, Error> {
        let record = self.0.ledger.current(reference);
        self.opened(reference, record)
    }

    /// The same, as a request asks for it: with a lease, if it wants one. Blocking.
    pub fn open_as(&self, asked: &OpenRequest) -> Result<Opened, Error> {
        let reference = ModelRef::parse_with(&asked.reference, &asked.include, &asked.exclude)?;
        let terms = asked.lease.as_ref().map(Terms::read).transpose()?;
        let (record, lease) = match terms {
            Some(terms) => {
                let (record, lease) = self.lease_noted(&reference, &terms)?;
                (Some(record), Some(lease))
            }
            None => (self.0.ledger.current(&reference), None),
        };
        Ok(Opened { model: self.opened(&reference, record)?, lease })
    }

    /// The files of the version a reference means now, for as long as a connection to `process` lasts. Blocking.
    pub fn open_files(&self, reference: &ModelRef, process: String) -> Result<OpenModel, Error> {
        let (record, lease) = match self.lease_connection(reference, process) {
            Ok(leased) => leased,
            Err(error) => {
                self.0.metrics.opened(false);
                return Err(error);
            }
        };
        let model = self.opened(reference, Some(record.clone()))?;
        let manifest = self.0.volume.read_manifest(record.manifest)?;
        Ok(OpenModel { model, files: below(&manifest, reference.subdir()), lease })
    }

    /// A descriptor of a file, for one reader alone: descriptors that are shared share a position. Blocking.
    pub fn descriptor(&self, file: &ManifestFile) -> Result<File, Error> {
        Ok(self.0.volume.open_blob(file.digest, file.size)?)
    }

    /// How this node does things where it depends on the kernel, the file system or our rights.
    pub fn details(&self) -> Vec<Detail> {
        Vec::new()
    }

    fn opened(&self, reference: &ModelRef, record: Option<Arc<Record>>) -> Result<ModelInfo, Error> {
        let Some(record) = record.filter(|record| self.directory(record).is_dir()) else {
            self.0.metrics.opened(false);
            return Err(self.why_not_open(reference));
        };
        self.0.metrics.opened(true);
        if let Some(hands) = &self.0.hands {
            hands.index.touch(record.id(), now_ms());
        }
        Ok(self.info(&record, true))
    }

    pub(super) fn why_not_open(&self, reference: &ModelRef) -> Error {
        self.0.pulls.lock().expect("no panic while the pulls are held").why_not_open(reference)
    }
}

/// The files in and below a directory of the manifest, relative to it.
fn below(manifest: &Manifest, dir: Option<&RelPath>) -> Vec<ManifestFile> {
    let Some(dir) = dir else { return manifest.files().to_vec() };
    let prefix = format!("{dir}/");
    let files = manifest.files().iter().filter_map(|file| {
        let path = RelPath::new(file.path.as_str().strip_prefix(&prefix)?).ok()?;
        Some(ManifestFile { path, ..file.clone() })
    });
    files.collect()
}

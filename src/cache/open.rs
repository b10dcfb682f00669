//! Opening a model that is local: its directory, or its files, and a lease on it. No network, no disk write but the note
//! of a lease that outlives the request.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, Weak};

use super::lease::{Lease, Terms};
use super::proof::MAX_ROUNDS;
use super::{Cache, Error, now_ms};
use crate::model::{Manifest, ManifestFile, ModelId, ModelRef, Record, RelPath};
use crate::store::{self, Descriptors};
use crate::wire::frame::OpenFiles;
use crate::wire::http::{LeaseInfo, ModelInfo, OpenRequest, Opened};

/// A model that a connection has open.
pub struct OpenModel {
    /// The version.
    pub model: ModelInfo,
    /// Its directory, relative to the one that readers mount.
    pub path_below_public: String,
    /// Its files, relative to the directory that was asked for. Readers of one version share the list.
    pub files: Arc<Vec<ManifestFile>>,
    /// While it is held, nothing of this version is taken away.
    pub lease: Lease,
    /// The same, in words.
    pub lease_info: LeaseInfo,
    /// The lease that outlives the connection, if one was asked for.
    pub lasting_lease: Option<LeaseInfo>,
}

/// The lists of files that are being handed out, so that they take memory once for each version and not for each reader.
#[derive(Default)]
pub(super) struct SharedFiles(Mutex<HashMap<ModelId, Weak<Vec<ManifestFile>>>>);

impl SharedFiles {
    fn of(
        &self,
        id: ModelId,
        read: impl FnOnce() -> Result<Vec<ManifestFile>, Error>,
    ) -> Result<Arc<Vec<ManifestFile>>, Error> {
        let lists = || self.0.lock().expect("no panic while the lists are held");
        if let Some(files) = lists().get(&id).and_then(Weak::upgrade) {
            return Ok(files);
        }
        let files = Arc::new(read()?);
        let mut lists = lists();
        lists.retain(|_, list| list.strong_count() > 0);
        lists.insert(id, Arc::downgrade(&files));
        Ok(files)
    }
}

impl Cache {
    /// The directory of the version a reference means now. Blocking, and so are the others: what was touched since it was
    /// last known to be right is hashed first. They need a tokio runtime, because what is wrong is pulled again.
    pub fn open(&self, reference: &ModelRef) -> Result<ModelInfo, Error> {
        let record = self.0.ledger.current(reference);
        Ok(self.opened(reference, record)?.0)
    }

    /// The same, as a request asks for it: with a lease, if it wants one, and a warm-up. Blocking; needs a tokio runtime.
    pub fn open_as(&self, asked: &OpenRequest) -> Result<Opened, Error> {
        let reference = ModelRef::parse_with(&asked.reference, &asked.include, &asked.exclude)?;
        let terms = asked.lease.as_ref().map(Terms::read).transpose()?;
        let record = self.0.ledger.current(&reference);
        let (mut model, _) = self.opened(&reference, record.clone())?;
        // Last, so that an open that is refused leaves none behind; if it has gone since, this is refused too.
        let lease = match (record, terms) {
            (Some(record), Some(terms)) => {
                let lease = self.lease_noted(&record, &terms)?;
                (model.leases, model.pinned) = self.0.ledger.uses_of(record.id());
                Some(lease)
            }
            _ => None,
        };
        if asked.warm {
            self.warm_in_background(&reference, &model.version);
        }
        Ok(Opened { model, lease })
    }

    /// The files of a version, as a frame asks for them, for as long as a connection to `process` lasts. Pulls nothing.
    /// Blocking.
    pub fn open_files(&self, asked: &OpenFiles, process: String) -> Result<OpenModel, Error> {
        let reference = ModelRef::parse_with(&asked.reference, &asked.include, &asked.exclude)?;
        let terms = asked.lease.as_ref().map(Terms::read).transpose()?;
        let (record, lease) = match self.lease_connection(&reference, asked.version.as_deref(), process) {
            Ok(leased) => leased,
            Err(error) => {
                self.0.metrics.opened(false);
                return Err(error);
            }
        };
        let (model, manifest) = self.opened(&reference, Some(record.clone()))?;
        let files = self.0.files.of(record.id(), || Ok(below(&manifest, reference.subdir())))?;
        let files = match &asked.file {
            Some(name) => Arc::new(vec![file_of(&files, name).ok_or_else(|| Error::NoSuchFile {
                reference: reference.to_string(),
                file: name.chars().take(200).collect(),
            })?]),
            None => files,
        };
        let lasting_lease = terms.map(|terms| self.lease_noted(&record, &terms)).transpose()?;
        if asked.warm {
            self.warm_in_background(&reference, &record.version);
        }
        let lease_info = lease.info(&record);
        Ok(OpenModel { model, path_below_public: self.below_public(&record), files, lease, lease_info, lasting_lease })
    }

    /// A descriptor of a file, for one reader alone: descriptors that are shared share a position. Blocking.
    pub fn descriptor(&self, file: &ManifestFile) -> Result<File, Error> {
        let mut rounds = 0;
        loop {
            match self.0.volume.open_blob(file.digest, file.size) {
                // It was touched since the model was opened.
                Err(store::Error::Unproven { .. }) if rounds < MAX_ROUNDS => rounds += 1,
                opened => return Ok(opened?),
            }
            if !self.prove_blob(file)? {
                let (what, file) = (file.path.to_string(), file.path.to_string());
                return Err(Error::Spoilt { what, file, percent: 0, eta: None });
            }
        }
    }

    /// What keeps a descriptor from being a way to write, as the socket's protocol names it.
    pub fn descriptors(&self) -> &'static str {
        match self.0.volume.descriptors() {
            Descriptors::ReadOnlyMount => "read-only-mount",
            Descriptors::FileModes { .. } => "modes",
        }
    }

    fn opened(&self, reference: &ModelRef, record: Option<Arc<Record>>) -> Result<(ModelInfo, Manifest), Error> {
        let proven = record.ok_or_else(|| self.why_not_open(reference));
        let proven = proven.and_then(|record| Ok((self.prove(&record)?, record)));
        self.0.metrics.opened(proven.is_ok());
        let (manifest, record) = proven?;
        if let Some(hands) = &self.0.hands {
            hands.index.opened(record.id(), now_ms());
        }
        self.warm_on_open(&record);
        let current = self.0.ledger.current(reference).is_some_and(|current| current.id() == record.id());
        Ok((self.info(&record, current), manifest))
    }

    pub(super) fn why_not_open(&self, reference: &ModelRef) -> Error {
        let why = self.0.pulls.lock().expect("no panic while the pulls are held").why_not_open(reference);
        match why {
            Error::NotLocal { reference, .. } => self.not_local(&reference),
            why => why,
        }
    }

    /// It is not here, and may have been evicted.
    pub(super) fn not_local(&self, reference: &str) -> Error {
        Error::NotLocal { reference: reference.to_owned(), evicted: self.when_evicted(reference) }
    }
}

/// The file with exactly this name: what was asked for is compared, and never becomes a path.
fn file_of(files: &[ManifestFile], name: &str) -> Option<ManifestFile> {
    files.iter().find(|file| file.path.as_str() == name).cloned()
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

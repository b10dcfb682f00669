//! Opening a model that is local: its directory, or its files, and a lease on it. No network, no disk write but the note
//! of a lease that outlives the request.

use std::fs::File;
use std::sync::Arc;

use super::lease::{Lease, Terms};
use super::proof::MAX_ROUNDS;
use super::traced::Watched;
use super::{Cache, Error, now_ms};
use crate::model::{Manifest, ManifestFile, ModelRef, Record, RelPath, Stage};
use crate::store::{self, Descriptors};
use crate::telemetry::Parent;
use crate::wire::frame::OpenFiles;
use crate::wire::http::{LeaseInfo, ModelInfo, OpenRequest, Opened};

/// A model that a connection has open.
pub struct OpenModel {
    /// The version.
    pub model: ModelInfo,
    /// Its directory, relative to the one that readers mount.
    pub path_below_public: String,
    /// Its files, relative to the directory that was asked for. Readers of one version share the list.
    pub files: Arc<[ManifestFile]>,
    /// While it is held, nothing of this version is taken away.
    pub lease: Lease,
    /// The same, in words.
    pub lease_info: LeaseInfo,
    /// The lease that outlives the connection, if one was asked for.
    pub lasting_lease: Option<LeaseInfo>,
}

/// Most files of a model that is opened at once: looking at each takes some microseconds.
const MAX_FILES_AT_ONCE: usize = 256;

impl Cache {
    /// The directory of the version a reference means now. Blocking, and so are the others: what was touched since it was
    /// last known to be right is hashed first. They need a tokio runtime, because what is wrong is pulled again.
    pub fn open(&self, reference: &ModelRef) -> Result<ModelInfo, Error> {
        let record = self.0.ledger.current(reference);
        Ok(self.opened(reference, record)?.0)
    }

    /// The same, as a request asks for it: with a lease, if it wants one, and a warm-up. Blocking; needs a tokio runtime.
    pub fn open_as(&self, asked: &OpenRequest) -> Result<Opened, Error> {
        self.open_for(asked, None)
    }

    /// The same for a caller who traces.
    pub fn open_for(&self, asked: &OpenRequest, caller: Option<&Parent>) -> Result<Opened, Error> {
        let reference = ModelRef::parse_with(&asked.reference, &asked.include, &asked.exclude)?;
        let terms = asked.lease.as_ref().map(Terms::read).transpose()?;
        let watched = self.watch_open();
        let opened = self.open_and_lease(asked, &reference, terms, &watched);
        let version = opened.as_ref().map(|opened| opened.model.version.as_str());
        self.open_ended(&watched, &reference, version, caller);
        opened
    }

    fn open_and_lease(
        &self,
        asked: &OpenRequest,
        reference: &ModelRef,
        terms: Option<Terms>,
        watched: &Watched,
    ) -> Result<Opened, Error> {
        let record = self.0.ledger.current(reference);
        let checking = watched.during(Stage::Checking);
        let (mut model, _) = self.opened(reference, record.clone())?;
        drop(checking);
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
            self.warm_for_reader(reference, &model.version);
        }
        Ok(Opened { model, lease })
    }

    /// The files of a version, as a frame asks for them, for as long as a connection to `process` lasts. Pulls nothing.
    /// Blocking.
    pub fn open_files(&self, asked: &OpenFiles, process: &str) -> Result<OpenModel, Error> {
        let reference = ModelRef::parse_with(&asked.reference, &asked.include, &asked.exclude)?;
        let terms = asked.lease.as_ref().map(Terms::read).transpose()?;
        let watched = self.watch_open();
        let open = self.open_and_keep(asked, &reference, terms, process, &watched);
        let version = open.as_ref().map(|open| open.model.version.as_str());
        self.open_ended(&watched, &reference, version, None);
        open
    }

    fn open_and_keep(
        &self,
        asked: &OpenFiles,
        reference: &ModelRef,
        terms: Option<Terms>,
        process: &str,
        watched: &Watched,
    ) -> Result<OpenModel, Error> {
        let (record, lease) = match self.lease_connection(reference, asked.version.as_deref(), process) {
            Ok(leased) => leased,
            Err(error) => {
                self.0.metrics.opened(false);
                return Err(error);
            }
        };
        let checking = watched.during(Stage::Checking);
        let (model, manifest) = self.opened(reference, Some(record.clone()))?;
        drop(checking);
        let mut open = self.open_model(asked, reference, &record, &manifest, model, lease)?;
        open.lasting_lease = terms.map(|terms| self.lease_noted(&record, &terms)).transpose()?;
        Ok(open)
    }

    /// The same with descriptors, where that is a matter of microseconds, and waits for nothing: the manifest is in memory,
    /// nobody touched the model, and no lease is to be written down. `None`: ask [`Cache::open_files`], which also tells what is wrong.
    pub fn open_files_at_once(&self, asked: &OpenFiles, process: &str) -> Option<OpenModel> {
        if asked.lease.is_some() || !asked.descriptors {
            return None;
        }
        let reference = ModelRef::parse_with(&asked.reference, &asked.include, &asked.exclude).ok()?;
        let watched = self.watch_open();
        let checking = watched.during(Stage::Checking);
        let (record, lease) = self.lease_if_here(&reference, asked.version.as_deref(), process)?;
        let manifest = self.0.manifests.get(record.manifest)?;
        if manifest.files().len() > MAX_FILES_AT_ONCE || !self.looks_as_left(&record, &manifest).ok()? {
            return None;
        }
        drop(checking);
        let model = self.used(&reference, &record);
        let open = self.open_model(asked, &reference, &record, &manifest, model, lease).ok()?;
        self.open_ended(&watched, &reference, Ok(&open.model.version), None);
        Some(open)
    }

    fn open_model(
        &self,
        asked: &OpenFiles,
        reference: &ModelRef,
        record: &Arc<Record>,
        manifest: &Manifest,
        model: ModelInfo,
        lease: Lease,
    ) -> Result<OpenModel, Error> {
        let files = match reference.subdir() {
            None => manifest.shared_files(),
            Some(dir) => below(manifest, dir),
        };
        let files = match &asked.file {
            Some(name) => [file_of(&files, name).ok_or_else(|| Error::NoSuchFile {
                reference: reference.to_string(),
                file: name.chars().take(200).collect(),
            })?]
            .into(),
            None => files,
        };
        if asked.warm {
            self.warm_for_reader(reference, &record.version);
        }
        let (lease_info, path_below_public) = (lease.info(record), self.below_public(record));
        Ok(OpenModel { model, path_below_public, files, lease, lease_info, lasting_lease: None })
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

    /// The same for some files, where nothing is to be hashed and no descriptor is lacking; else `None`: [`Cache::descriptor`]
    /// tells why. Microseconds each.
    pub fn descriptors_at_once(&self, files: &[ManifestFile]) -> Option<Vec<File>> {
        files.iter().map(|file| self.0.volume.open_blob(file.digest, file.size).ok()).collect()
    }

    /// What keeps a descriptor from being a way to write, as the socket's protocol names it.
    pub fn descriptors(&self) -> &'static str {
        match self.0.volume.descriptors() {
            Descriptors::ReadOnlyMount => "read-only-mount",
            Descriptors::FileModes { .. } => "modes",
        }
    }

    fn opened(&self, reference: &ModelRef, record: Option<Arc<Record>>) -> Result<(ModelInfo, Arc<Manifest>), Error> {
        let proven = record.ok_or_else(|| self.why_not_open(reference));
        let proven = proven.and_then(|record| Ok((self.prove(&record)?, record)));
        let (manifest, record) = proven.inspect_err(|_| self.0.metrics.opened(false))?;
        Ok((self.used(reference, &record), manifest))
    }

    /// A version is handed out.
    fn used(&self, reference: &ModelRef, record: &Arc<Record>) -> ModelInfo {
        self.0.metrics.opened(true);
        let id = record.id();
        if let Some(hands) = &self.0.hands {
            hands.index.opened(id, now_ms());
        }
        self.warm_on_open(record);
        self.info(record, self.0.ledger.is_current(reference, id))
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
fn below(manifest: &Manifest, dir: &RelPath) -> Arc<[ManifestFile]> {
    let prefix = format!("{dir}/");
    let files = manifest.files().iter().filter_map(|file| {
        let path = RelPath::new(file.path.as_str().strip_prefix(&prefix)?).ok()?;
        Some(ManifestFile { path, ..file.clone() })
    });
    files.collect()
}

//! [`Model`]: the files of one version, and the lease on it.

use std::fmt;
use std::fs::File;
use std::sync::{Arc, Mutex};

use super::conversation::Delivered;
use crate::fault::{Code, Problem};
use crate::wire::http::{LeaseInfo, ModelFile, ModelInfo};
use crate::wire::mapping::Map;

/// A model that is open. While it is held, nothing of its version is taken away; dropping it ends the lease. Maps and files
/// stay readable after it, without a lease.
///
/// It holds one descriptor for each file.
pub struct Model {
    info: ModelInfo,
    path_below_public: String,
    files: Vec<(ModelFile, File)>,
    lasting_lease: Option<LeaseInfo>,
    lease: LeaseNow,
    /// Takes the lease again when the daemon was away; ends when it is dropped.
    _keeper: Box<dyn Send + Sync>,
}

/// The lease as it is now: none while the daemon is away.
pub(super) type LeaseNow = Arc<Mutex<Option<LeaseInfo>>>;

impl Model {
    pub(super) fn new(delivered: Delivered, lease: LeaseNow, keeper: Box<dyn Send + Sync>) -> Model {
        let Delivered { opened, files } = delivered;
        Model {
            info: opened.model,
            path_below_public: opened.path_below_public,
            files,
            lasting_lease: opened.lasting_lease,
            lease,
            _keeper: keeper,
        }
    }

    /// The version, as it was when it was opened.
    pub fn info(&self) -> &ModelInfo {
        &self.info
    }

    /// Its directory, relative to the daemon's `public` directory, wherever that is mounted.
    pub fn path_below_public(&self) -> &str {
        &self.path_below_public
    }

    /// What was opened of it, sorted by path.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &ModelFile> {
        self.files.iter().map(|(file, _)| file)
    }

    /// A file, open for reading. Its position is shared by all who use it: read at offsets, or map it.
    pub fn file(&self, path: &str) -> Result<&File, Problem> {
        match self.files.iter().find(|(file, _)| file.path == path) {
            Some((_, file)) => Ok(file),
            None => Err(Problem::new(
                Code::FileNotFound,
                format!(
                    "cannot read {path:?} of `{}`: it is not among its {} files",
                    self.info.reference,
                    self.files.len()
                ),
                "take a name of `Model::files`",
            )),
        }
    }

    /// A file in memory, shared with every other reader of it and not copied. Its pages are read when they are touched.
    pub fn mmap(&self, path: &str) -> Result<Map, Problem> {
        Map::of(self.file(path)?).map_err(|error| {
            Problem::new(
                Code::DiskError,
                format!("cannot map {path:?} of `{}`: {error}", self.info.reference),
                "look at the limits of this process (`ulimit -v`, `vm.max_map_count`)",
            )
        })
    }

    /// The lease of this process. `None` while the daemon is away, or if it has lost the version meanwhile.
    pub fn lease(&self) -> Option<LeaseInfo> {
        self.lease.lock().expect("no panic while the lease is held").clone()
    }

    /// The lease that outlives this process, if one was asked for.
    pub fn lasting_lease(&self) -> Option<&LeaseInfo> {
        self.lasting_lease.as_ref()
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("info", &self.info).field("files", &self.files.len()).finish()
    }
}

//! Models outside of the volume: in directories, as `file://` sources, or elsewhere.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use larder::store::snapshot_path;

/// The files of a model, by path.
pub(crate) type Files = BTreeMap<String, Vec<u8>>;

/// What there is to pull, by reference.
#[derive(Default, Clone)]
pub(crate) struct Models(BTreeMap<String, Files>);

impl Models {
    /// Puts a model into the directory of that name, and gives its reference.
    pub(crate) fn put(&mut self, home: &Path, name: &str, files: &[(&str, Vec<u8>)]) -> String {
        let dir = home.join("models").join(name);
        for (path, bytes) in files {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().expect("it is below the model")).unwrap();
            fs::write(path, bytes).unwrap();
        }
        let reference = format!("file://{}", dir.display());
        self.are_at(&reference, files.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.clone())).collect());
        reference
    }

    /// These files are what that reference means.
    pub(crate) fn are_at(&mut self, reference: &str, files: Files) {
        self.0.insert(reference.to_owned(), files);
    }

    pub(crate) fn files(&self, reference: &str) -> &Files {
        self.0.get(reference).unwrap_or_else(|| panic!("nobody made {reference}"))
    }

    /// The model whose versions are laid out where this snapshot is.
    pub(crate) fn laid_out_in(&self, public: &Path, snapshot: &Path) -> Option<&Files> {
        let place = snapshot.parent()?.strip_prefix(public).ok()?;
        let is_there =
            |reference: &str| snapshot_path(&reference.parse().unwrap(), "any").as_path().parent() == Some(place);
        self.0.iter().find(|(reference, _)| is_there(reference)).map(|(_, files)| files)
    }
}

/// Bytes nobody else has.
pub(crate) fn bytes(seed: &str, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(seed.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

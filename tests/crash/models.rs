//! Models in directories outside of the volume, as `file://` sources.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

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
        self.0
            .insert(reference.clone(), files.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.clone())).collect());
        reference
    }

    pub(crate) fn files(&self, reference: &str) -> &Files {
        self.0.get(reference).unwrap_or_else(|| panic!("nobody made {reference}"))
    }

    /// The models whose directory in `public/` begins with this path.
    pub(crate) fn laid_out_in(&self, public: &Path, snapshot: &Path) -> Option<&Files> {
        let place = snapshot.parent()?.strip_prefix(public.join("file")).ok()?;
        self.0.get(&format!("file:///{}", place.display()))
    }
}

/// Bytes nobody else has.
pub(crate) fn bytes(seed: &str, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(seed.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

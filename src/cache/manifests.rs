//! Manifests that were read lately: an open of the same model neither reads, hashes nor parses one again. What a digest
//! names never changes, so what was right once stays so.

use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Mutex};

use super::{Cache, Error};
use crate::model::{Digest, Manifest};

/// Files of all manifests of one generation; there are two. A file takes some 150 bytes.
const MAX_FILES: usize = 8192;

/// In two generations: what is used moves to the younger one, and when that is full the older one is forgotten.
#[derive(Default)]
pub(super) struct Manifests(Mutex<Generations>);

#[derive(Default)]
struct Generations {
    young: HashMap<Digest, Arc<Manifest>>,
    old: HashMap<Digest, Arc<Manifest>>,
    young_files: usize,
}

impl Manifests {
    /// One that is kept.
    pub(super) fn get(&self, digest: Digest) -> Option<Arc<Manifest>> {
        let mut kept = self.0.lock().expect("no panic while the manifests are held");
        if let Some(manifest) = kept.young.get(&digest) {
            return Some(manifest.clone());
        }
        let manifest = kept.old.remove(&digest)?;
        kept.keep(digest, manifest.clone());
        Some(manifest)
    }

    fn keep(&self, digest: Digest, manifest: Arc<Manifest>) {
        self.0.lock().expect("no panic while the manifests are held").keep(digest, manifest);
    }
}

impl Generations {
    fn keep(&mut self, digest: Digest, manifest: Arc<Manifest>) {
        let files = manifest.files().len();
        if files > MAX_FILES {
            return;
        }
        if self.young_files + files > MAX_FILES {
            self.old = mem::take(&mut self.young);
            self.young_files = 0;
        }
        if self.young.insert(digest, manifest).is_none() {
            self.young_files += files;
        }
    }
}

impl Cache {
    /// A manifest of a model that is local. Blocking, if it was not read lately.
    pub(super) fn manifest(&self, digest: Digest) -> Result<Arc<Manifest>, Error> {
        if let Some(manifest) = self.0.manifests.get(digest) {
            return Ok(manifest);
        }
        let manifest = Arc::new(self.0.volume.read_manifest(digest)?);
        self.0.manifests.keep(digest, manifest.clone());
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ManifestFile, RelPath};

    fn manifest(name: &str, files: usize) -> (Digest, Arc<Manifest>) {
        let file = |at| ManifestFile {
            path: RelPath::new(&format!("{name}-{at}")).unwrap(),
            digest: Digest::of(name.as_bytes()),
            size: 1,
        };
        let manifest = Manifest::new((0..files).map(file).collect());
        (manifest.digest(), Arc::new(manifest))
    }

    #[test]
    fn what_is_used_stays_and_memory_has_a_limit() {
        let (manifests, (used, model)) = (Manifests::default(), manifest("used", 10));
        manifests.keep(used, model);
        let others: Vec<_> = (0..100).map(|at| manifest(&at.to_string(), 500)).collect();
        for (digest, model) in &others {
            manifests.keep(*digest, model.clone());
            assert!(manifests.get(used).is_some(), "it was used just now");
        }
        let kept = manifests.0.lock().unwrap();
        let files = |generation: &HashMap<Digest, Arc<Manifest>>| -> usize {
            generation.values().map(|manifest| manifest.files().len()).sum()
        };
        assert_eq!(files(&kept.young), kept.young_files);
        assert!(files(&kept.young) <= MAX_FILES && files(&kept.old) <= MAX_FILES);
        assert!(!kept.young.contains_key(&others[0].0) && !kept.old.contains_key(&others[0].0), "it was not used");
    }

    #[test]
    fn one_that_is_larger_than_all_of_it_is_not_kept() {
        let (manifests, (digest, model)) = (Manifests::default(), manifest("large", MAX_FILES + 1));
        manifests.keep(digest, model);
        assert!(manifests.get(digest).is_none());
    }
}

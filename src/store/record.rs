//! Small files written whole: manifests, and the records that name models.

use serde::Serialize;

use super::io::{names_in, read_small};
use super::layout::Scratch;
use super::{Error, Volume};
use crate::model::{Digest, Manifest, ModelId, Record};

impl Volume {
    /// Writes a manifest under its digest. Durable on return; its blobs must be so before.
    pub fn write_manifest(&self, manifest: &Manifest) -> Result<Digest, Error> {
        let text = manifest.encode();
        let digest = Digest::of(text.as_bytes());
        // One that is there and right is not written again, but a crash may have come before its name was durable.
        match self.read_manifest(digest) {
            Ok(_) => self.disk.sync_dir(&self.layout.manifests())?,
            Err(_) => {
                let scratch = self.layout.scratch(Scratch::File);
                self.disk.replace(&scratch, &self.layout.manifest(digest), text.as_bytes(), 0o444)?;
            }
        }
        Ok(digest)
    }

    /// Reads a manifest and makes sure that it is what its name says.
    pub fn read_manifest(&self, digest: Digest) -> Result<Manifest, Error> {
        let path = self.layout.manifest(digest);
        let corrupt = |found: String| Error::Corrupt { verb: "read", noun: "manifest", path: path.clone(), found };
        let bytes = read_small(&path)?.ok_or_else(|| corrupt("it is missing".into()))?;
        let found = Digest::of(&bytes);
        if found != digest {
            return Err(corrupt(format!("its text hashes to {}", found.short())));
        }
        let text = String::from_utf8(bytes).map_err(|_| corrupt("it is not text".into()))?;
        Manifest::decode(&text).map_err(|e| corrupt(e.to_string()))
    }

    /// Removes a manifest that no record names any more. Not durable on return: if it comes back it is swept.
    pub fn remove_manifest(&self, digest: Digest) -> Result<(), Error> {
        self.disk.unlink(&self.layout.manifest(digest)).map(drop)
    }

    /// Names a model: from now on it is local and whole. Durable on return; all that it names must be so before.
    pub fn write_record(&self, record: &Record) -> Result<(), Error> {
        let path = self.layout.record(record.id());
        self.disk.replace(&self.layout.scratch(Scratch::File), &path, &json_line(record), 0o600)
    }

    /// All records that can be read, sorted by id; those that cannot are returned as errors next to them.
    pub fn records(&self) -> Result<(Vec<Record>, Vec<Error>), Error> {
        let (mut records, mut errors) = (Vec::new(), Vec::new());
        for name in names_in(&self.layout.records())? {
            match self.read_record(&name) {
                Ok(record) => records.extend(record),
                Err(error) => errors.push(error),
            }
        }
        Ok((records, errors))
    }

    /// `None` when it was removed since its name was listed.
    fn read_record(&self, name: &str) -> Result<Option<Record>, Error> {
        let path = self.layout.records().join(name);
        let corrupt = |found: String| Error::Corrupt { verb: "read", noun: "record", path: path.clone(), found };
        let Some(bytes) = read_small(&path)? else { return Ok(None) };
        let line = bytes.strip_suffix(b"\n").ok_or_else(|| corrupt("it does not end in a newline".into()))?;
        let record: Record = serde_json::from_slice(line).map_err(|e| corrupt(e.to_string()))?;
        if record.id().to_string() != name {
            return Err(corrupt(format!("it is the record of {}", record.id())));
        }
        Ok(Some(record))
    }

    /// Takes the name from a model: the first step of destroying it. Durable on return.
    pub fn remove_record(&self, id: ModelId) -> Result<(), Error> {
        let path = self.layout.record(id);
        self.disk.unlink(&path)?;
        self.sync_parent(&path)
    }
}

pub(super) fn json_line(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).expect("our own plain structs become JSON");
    line.push(b'\n');
    line
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::fault::{Code, Diagnose};
    use crate::model::{ManifestFile, ModelRef, RelPath};
    use crate::store::snapshot_path;
    use std::fs;

    pub(crate) fn manifest(files: &[(&str, &[u8])]) -> Manifest {
        let file = |(path, bytes): &(&str, &[u8])| ManifestFile {
            path: RelPath::new(path).unwrap(),
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
        };
        Manifest::new(files.iter().map(file).collect())
    }

    pub(crate) fn record(reference: &str, version: &str, manifest: &Manifest) -> Record {
        let reference: ModelRef = reference.parse().unwrap();
        Record {
            snapshot: snapshot_path(&reference, version),
            reference,
            version: version.into(),
            manifest: manifest.digest(),
            confirmed_at_ms: 1,
            sequence: 1,
            total_bytes: manifest.total_bytes(),
            total_files: 1,
            claims: Vec::new(),
        }
    }

    #[test]
    fn manifests_round_trip_and_a_changed_one_is_corrupt() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let manifest = manifest(&[("a", b"1"), ("b/c", b"")]);
        let digest = volume.write_manifest(&manifest).unwrap();
        assert_eq!(volume.read_manifest(digest).unwrap(), manifest);

        let path = dir.path().join("manifests").join(digest.to_hex());
        fs::remove_file(&path).unwrap();
        assert_eq!(volume.read_manifest(digest).unwrap_err().code(), Code::StoreCorrupt);
        for torn in [&b""[..], b"larder-manifest 1\n", b"\xff", &[0; 4096]] {
            fs::remove_file(&path).ok();
            fs::write(&path, torn).unwrap();
            assert_eq!(volume.read_manifest(digest).unwrap_err().code(), Code::StoreCorrupt);
        }
        volume.write_manifest(&manifest).unwrap();
        assert_eq!(volume.read_manifest(digest).unwrap(), manifest);
        volume.remove_manifest(digest).unwrap();
        volume.remove_manifest(digest).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_record_that_cannot_be_read_is_told_and_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let good = record("hf://o/n@main", "v1", &manifest(&[]));
        volume.write_record(&good).unwrap();
        let refs = dir.path().join("refs");
        let text = fs::read(refs.join(good.id().to_string())).unwrap();
        assert!(text.ends_with(b"}\n"));
        fs::write(refs.join("0000000000000001"), &text[..text.len() / 2]).unwrap();
        fs::write(refs.join("0000000000000002"), &text).unwrap();
        fs::write(refs.join("0000000000000003"), "").unwrap();
        fs::write(refs.join("0000000000000004"), &text[..text.len() - 1]).unwrap();
        fs::write(refs.join("notes.txt"), "x").unwrap();
        fs::create_dir(refs.join("0000000000000005")).unwrap();
        let outside = dir.path().join("outside");
        fs::write(&outside, &text).unwrap();
        std::os::unix::fs::symlink(&outside, refs.join("0000000000000006")).unwrap();

        let (records, errors) = volume.records().unwrap();
        assert_eq!(records, std::slice::from_ref(&good));
        assert_eq!(errors.len(), 7, "{errors:?}");
        assert!(errors.iter().all(|e| e.code() == Code::StoreCorrupt), "{errors:?}");

        volume.remove_record(good.id()).unwrap();
        volume.remove_record(good.id()).unwrap();
        assert!(volume.records().unwrap().0.is_empty());
    }

    #[test]
    fn a_record_is_written_over_a_planted_link_not_through_it() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let record = record("hf://o/n@main", "v1", &manifest(&[]));
        let outside = dir.path().join("outside");
        fs::write(&outside, "precious").unwrap();
        std::os::unix::fs::symlink(&outside, dir.path().join("refs").join(record.id().to_string())).unwrap();
        volume.write_record(&record).unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "precious");
        assert_eq!(volume.records().unwrap().0, [record]);
    }
}

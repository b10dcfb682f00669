//! Blobs: immutable bytes named by their digest.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::io::{self, allocated_bytes, look_at};
use super::{Error, Volume, sizes_differ};
use crate::model::Digest;
use crate::wire::residency;

/// Bytes that are verified, durable, and named by their digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    /// BLAKE3 of the bytes.
    pub digest: Digest,
    /// How many they are.
    pub size: u64,
}

impl Volume {
    /// Where a blob is, if it is here.
    pub fn blob_path(&self, digest: Digest) -> PathBuf {
        self.layout.blob(digest)
    }

    /// Size of a blob in bytes, if it is here as a regular file.
    pub fn blob_size(&self, digest: Digest) -> Result<Option<u64>, Error> {
        Ok(look_at(&self.layout.blob(digest))?.filter(|found| found.is_file()).map(|found| found.len()))
    }

    /// Opens a blob for ourselves: its size is right, its bytes are not known to be.
    pub fn read_blob(&self, digest: Digest, size: u64) -> Result<File, Error> {
        let path = self.layout.blob(digest);
        let corrupt = |found: String| Error::Corrupt { verb: "open", noun: "blob", path: path.clone(), found };
        let file = io::open_file(&path)?.ok_or_else(|| corrupt("it is missing".into()))?;
        let found = file.metadata().map_err(|e| corrupt(e.to_string()))?.len();
        if found != size {
            return Err(corrupt(sizes_differ(found, size)));
        }
        Ok(file)
    }

    /// Opens a blob for a reader, with an open file description of its own: see [`Volume::descriptors`].
    ///
    /// Its bytes are known to be right: the stamp is compared with the very descriptor that is handed out. If they are not
    /// known, [`Error::Unproven`]: ask [`Volume::prove`].
    pub fn open_blob(&self, digest: Digest, size: u64) -> Result<File, Error> {
        let Some(window) = &self.window else { return self.read_blob(digest, size) };
        let path = self.layout.blob(digest);
        let Some(file) = window.open_blob(digest)? else {
            return Err(Error::Corrupt { verb: "open", noun: "blob", path, found: "it is missing".into() });
        };
        // The size of a blob is one with its bytes.
        if self.stamps.fits(digest, &file, &path)? { Ok(file) } else { Err(Error::Unproven { path }) }
    }

    /// Bytes of a blob that are in the page cache; `None` if it is not here or the kernel does not tell.
    pub fn resident_bytes(&self, digest: Digest, size: u64) -> Option<u64> {
        residency::resident_bytes(&io::open_file(&self.layout.blob(digest)).ok()??, size)
    }

    /// Every blob, sorted by digest.
    pub fn blobs(&self) -> Result<Vec<Blob>, Error> {
        let mut blobs = Vec::new();
        for dir in self.layout.blob_dirs() {
            for name in io::names_in(&dir)? {
                let Ok(digest) = Digest::from_hex(&name) else { continue };
                // Elsewhere than where its name says, nothing finds it.
                if self.layout.blob_dir(digest) != dir {
                    continue;
                }
                if let Some(size) = self.blob_size(digest)? {
                    blobs.push(Blob { digest, size });
                }
            }
        }
        Ok(blobs)
    }

    /// Removes a blob that no manifest names any more. Returns the bytes of the disk this gives back: 0 while a
    /// snapshot still links it, or when it is not here.
    ///
    /// Not durable on return: a blob that comes back after a power cut is nameless, and swept.
    pub fn remove_blob(&self, digest: Digest) -> Result<u64, Error> {
        let path = self.layout.blob(digest);
        let Some(found) = look_at(&path)? else { return Ok(0) };
        let last = found.nlink() == 1;
        let removed = self.disk.unlink(&path)?;
        self.stamps.forget(found.ino());
        Ok(if removed && last { allocated_bytes(&found) } else { 0 })
    }

    /// Moves a blob whose bytes, those of this inode, are not what its name says to `quarantine/`, so that it is never served
    /// again. Durable on return. Snapshots that link it are the caller's to remove. `false`: this inode is not the blob any
    /// more.
    pub fn quarantine(&self, digest: Digest, inode: u64) -> Result<bool, Error> {
        let path = self.layout.blob(digest);
        if look_at(&path)?.is_none_or(|found| found.ino() != inode) {
            return Ok(false);
        }
        self.disk.rename(&path, &self.layout.quarantine().join(digest.to_hex()))?;
        self.stamps.forget(inode);
        self.disk.sync_dir(&self.layout.quarantine())?;
        self.sync_parent(&path)?;
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::ingest::tests::stored;
    use std::fs;

    #[test]
    fn only_whole_files_under_their_own_name_are_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let blob = stored(&volume, b"bytes");
        let elsewhere = dir.path().join(format!("blobs/{:02x}", 0)).join(blob.digest.to_hex());
        if elsewhere != volume.blob_path(blob.digest) {
            fs::write(&elsewhere, "x").unwrap();
        }
        fs::write(dir.path().join("blobs/00/README"), "x").unwrap();
        let other = Digest::of(b"a directory");
        fs::create_dir(volume.blob_path(other)).unwrap();

        assert_eq!(volume.blobs().unwrap(), [blob]);
        assert_eq!(volume.blob_size(blob.digest).unwrap(), Some(5));
        assert_eq!(volume.blob_size(other).unwrap(), None);
    }

    #[test]
    fn removing_counts_what_the_disk_gets_back() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let blob = stored(&volume, &[7; 10_000]);
        let link = dir.path().join("public/link");
        fs::hard_link(volume.blob_path(blob.digest), &link).unwrap();
        assert_eq!(volume.remove_blob(blob.digest).unwrap(), 0);
        fs::rename(&link, volume.blob_path(blob.digest)).unwrap();
        assert!(volume.remove_blob(blob.digest).unwrap() >= 10_000);
        assert_eq!(volume.remove_blob(blob.digest).unwrap(), 0);
        assert_eq!(volume.blobs().unwrap(), []);
    }

    #[test]
    fn a_quarantined_blob_is_not_here_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let blob = stored(&volume, b"bytes");
        let inode = fs::metadata(volume.blob_path(blob.digest)).unwrap().ino();
        assert!(!volume.quarantine(blob.digest, inode + 1).unwrap(), "another inode is another's business");
        assert!(volume.quarantine(blob.digest, inode).unwrap());
        assert!(!volume.quarantine(blob.digest, inode).unwrap());
        assert_eq!(volume.blob_size(blob.digest).unwrap(), None);
        assert!(dir.path().join("quarantine").join(blob.digest.to_hex()).exists());
    }
}

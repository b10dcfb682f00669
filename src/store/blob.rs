//! Blobs: immutable bytes named by their digest.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::io::{self, allocated_bytes, look_at};
use super::{Error, Volume, layout, sizes_differ};
use crate::model::Digest;
use crate::wire::guard::SoleLease;
use crate::wire::residency;

/// How often the kernel is asked again, a millisecond apart, whether somebody has a blob open: a process that is just being
/// started has copies of our descriptors for a moment.
const ASKED_AGAIN: usize = 5;

/// Bytes that are verified, durable, and named by their digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Blob {
    /// BLAKE3 of the bytes.
    pub digest: Digest,
    /// How many they are.
    pub size: u64,
}

/// Whether anybody has a blob open or mapped, as the kernel says, however he came by it.
#[derive(Debug)]
#[must_use = "dropping it gives the answer up"]
pub enum Holders {
    /// Nobody, until this is dropped: who opens the blob waits that long.
    Nobody(SoleLease),
    /// Somebody; and our descriptor of it, if we got one.
    Somebody(Option<File>),
    /// The blob is not here.
    Missing,
}

/// A blob that has no name any more, and whose bytes the disk gets back when the last reader has closed it.
#[derive(Debug)]
pub struct OpenYet(File);

impl OpenYet {
    /// Asks the kernel again; itself if it is still open, or if that cannot be known.
    pub fn if_open(self) -> Option<OpenYet> {
        SoleLease::take(self.0).err().map(|(file, _)| OpenYet(file))
    }
}

/// What a removal gave back.
#[derive(Debug, Default)]
pub struct Freed {
    /// Bytes the disk has back.
    pub disk_bytes: u64,
    /// Or will have, once it is closed.
    pub open_yet: Option<OpenYet>,
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

    /// Bytes of the disk a blob takes; 0 if it is not here.
    pub fn disk_bytes(&self, digest: Digest) -> Result<u64, Error> {
        Ok(look_at(&self.layout.blob(digest))?.map_or(0, |found| allocated_bytes(&found)))
    }

    /// Asks the kernel whether anybody has a blob open or mapped, and keeps the answer true while it is held.
    /// [`Error::HoldersUnknown`] when it does not say.
    pub fn holders_of(&self, digest: Digest) -> Result<Holders, Error> {
        self.ask(digest, ASKED_AGAIN, |holders| holders)
    }

    /// The same, asked once: somebody may be a process that is just being started.
    pub fn holders_now(&self, digest: Digest) -> Result<Holders, Error> {
        self.ask(digest, 0, |holders| holders)
    }

    /// The same without keeping the answer: no open waits for it.
    pub fn is_open(&self, digest: Digest) -> Result<bool, Error> {
        self.ask(digest, ASKED_AGAIN, |holders| matches!(holders, Holders::Somebody(_)))
    }

    fn ask<T>(&self, digest: Digest, again: usize, read: impl Fn(Holders) -> T) -> Result<T, Error> {
        let path = self.layout.blob(digest);
        let mut attempt = 0;
        loop {
            let holders = holders_at(&path)?;
            if attempt == again || !matches!(holders, Holders::Somebody(_)) {
                return Ok(read(holders));
            }
            drop(holders);
            thread::park_timeout(Duration::from_millis(1));
            attempt += 1;
        }
    }

    /// Whether the kernel tells who has a file open here, and if not, why.
    pub fn tells_holders(&self) -> Result<(), Error> {
        holders_at(&self.layout.format()).map(drop)
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
        let name = layout::blob_name(digest);
        let path = self.layout.blobs().join(&name);
        let Some(file) = window.open_blob(&name)? else {
            return Err(Error::Corrupt { verb: "open", noun: "blob", path, found: "it is missing".into() });
        };
        // The size of a blob is one with its bytes.
        if self.stamps.fits(digest, &file, &path)? { Ok(file) } else { Err(Error::Unproven { path }) }
    }

    /// Bytes of a blob that are in the page cache; `None` if it is not here or the kernel does not tell.
    pub fn resident_bytes(&self, digest: Digest, size: u64) -> Option<u64> {
        residency::resident_bytes(&io::open_file(&self.layout.blob(digest)).ok()??, size)
    }

    /// Every blob, sorted by digest, with the bytes of the disk that it takes. One look at each: there may be very many.
    pub fn blobs(&self) -> Result<Vec<(Blob, u64)>, Error> {
        let mut blobs = Vec::new();
        for digest in self.blob_names()? {
            if let Some(found) = look_at(&self.layout.blob(digest))?.filter(|found| found.is_file()) {
                blobs.push((Blob { digest, size: found.len() }, allocated_bytes(&found)));
            }
        }
        Ok(blobs)
    }

    /// Every name that a blob can have, whatever it is of.
    pub(super) fn blob_names(&self) -> Result<Vec<Digest>, Error> {
        let mut digests = Vec::new();
        for dir in self.layout.blob_dirs() {
            let names = io::names_in(&dir)?.into_iter().filter_map(|name| Digest::from_hex(&name).ok());
            // Elsewhere than where its name says, nothing finds it.
            digests.extend(names.filter(|digest| self.layout.blob_dir(*digest) == dir));
        }
        Ok(digests)
    }

    /// A blob is about to go: what is known of its bytes is forgotten, so that its names can be taken away without opening
    /// it, which would break the lease of [`Holders::Nobody`].
    pub fn condemn(&self, digest: Digest) -> Result<(), Error> {
        if let Some(found) = look_at(&self.layout.blob(digest))? {
            self.stamps.forget(found.ino());
        }
        Ok(())
    }

    /// Removes a blob that no manifest names any more; `holders` is what the kernel says of it. It gives nothing back while a
    /// snapshot still links it, or when it is not here.
    ///
    /// Not durable on return: a blob that comes back after a power cut is nameless, and swept.
    pub fn remove_blob(&self, digest: Digest, holders: Option<Holders>) -> Result<Freed, Error> {
        let path = self.layout.blob(digest);
        let Some(found) = look_at(&path)? else { return Ok(Freed::default()) };
        let last = found.nlink() == 1;
        let removed = self.disk.unlink(&path)?;
        self.stamps.forget(found.ino());
        if !removed || !last {
            return Ok(Freed::default());
        }
        let open = match holders {
            Some(Holders::Somebody(file)) => file,
            // Who asked for it while nobody had it gets it now, without its name.
            Some(Holders::Nobody(lease)) => Some(lease.give_up()).filter(|(_, held)| !held).map(|(file, _)| file),
            Some(Holders::Missing) | None => None,
        };
        Ok(match open {
            Some(file) => Freed { disk_bytes: 0, open_yet: Some(OpenYet(file)) },
            None => Freed { disk_bytes: allocated_bytes(&found), open_yet: None },
        })
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

fn holders_at(path: &Path) -> Result<Holders, Error> {
    let file = match io::open_file(path) {
        Ok(Some(file)) => file,
        Ok(None) => return Ok(Holders::Missing),
        // Who has a lease of the kernel on it has it open.
        Err(Error::Leased { .. }) => return Ok(Holders::Somebody(None)),
        Err(error) => return Err(error),
    };
    match SoleLease::take(file) {
        Ok(lease) => Ok(Holders::Nobody(lease)),
        Err((file, error)) if error.kind() == ErrorKind::WouldBlock => Ok(Holders::Somebody(Some(file))),
        Err((_, source)) => Err(Error::HoldersUnknown { path: path.to_owned(), source }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::ingest::tests::stored;
    use std::fs;
    use std::os::unix::fs::OpenOptionsExt;

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

        assert_eq!(volume.blobs().unwrap(), [(blob, volume.disk_bytes(blob.digest).unwrap())]);
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
        let remove = || volume.remove_blob(blob.digest, None).unwrap().disk_bytes;
        assert_eq!(remove(), 0);
        fs::rename(&link, volume.blob_path(blob.digest)).unwrap();
        let disk_bytes = volume.disk_bytes(blob.digest).unwrap();
        assert!(disk_bytes >= 10_000);
        assert_eq!((remove(), remove()), (disk_bytes, 0));
        assert_eq!(volume.blobs().unwrap(), []);
    }

    #[test]
    fn bytes_that_somebody_has_open_are_given_back_when_he_closes_them() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let blob = stored(&volume, &[7; 10_000]);
        assert!(!volume.is_open(blob.digest).unwrap());
        let reader = File::open(volume.blob_path(blob.digest)).unwrap();
        assert!(volume.is_open(blob.digest).unwrap());
        let holders = volume.holders_of(blob.digest).unwrap();
        let freed = volume.remove_blob(blob.digest, Some(holders)).unwrap();
        let open_yet = freed.open_yet.unwrap();
        assert_eq!(freed.disk_bytes, 0);
        let open_yet = open_yet.if_open().expect("the reader has it");
        drop(reader);
        assert!(open_yet.if_open().is_none());
        assert!(matches!(volume.holders_of(blob.digest), Ok(Holders::Missing)));
    }

    #[test]
    fn who_comes_between_the_question_and_the_removal_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let blob = stored(&volume, &[7; 10_000]);
        let holders = volume.holders_of(blob.digest).unwrap();
        assert!(matches!(holders, Holders::Nobody(_)));
        let path = volume.blob_path(blob.digest);
        let refused = fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        assert!(refused.is_err(), "nobody gets in meanwhile");
        assert!(volume.remove_blob(blob.digest, Some(holders)).unwrap().open_yet.is_some());
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

//! The directory that descriptors for readers are opened through: a mount nobody can write through, where we may make one.
//!
//! A process with root's rights can open a descriptor it was given once more, for writing (`/proc/self/fd/N`), whatever the
//! mode of the file; through a read-only mount the kernel refuses that to everybody, in every namespace, also when this
//! process is gone. The mount is never attached anywhere: it has no path, no other process sees it, it does not propagate,
//! and it goes away with the last descriptor that was opened through it. So nothing is left behind after a crash.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::Error;
use super::io::{failed, patiently};
use crate::wire::guard::make_read_only;

/// What keeps a reader from writing through a descriptor it was given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Descriptors {
    /// A private read-only mount: the kernel refuses.
    ReadOnlyMount,
    /// The mode of the file (0444): enough against ordinary users, not against root.
    FileModes {
        /// Why there is no mount.
        why: String,
    },
}

/// The blobs, as readers get them.
pub(super) struct Window {
    path: PathBuf,
    dir: OwnedFd,
    descriptors: Descriptors,
}

impl Window {
    /// Opens `blobs/`, through a mount of its own if we may make one.
    pub(super) fn open(blobs: &Path) -> Result<Window, Error> {
        let (dir, descriptors) = match mounted(blobs) {
            Ok(tree) => (tree, Descriptors::ReadOnlyMount),
            Err(error) => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let dir = openat(CWD, blobs, flags, Mode::empty()).map_err(|e| failed("open", blobs, e.into()))?;
                (dir, Descriptors::FileModes { why: why_not(&error) })
            }
        };
        Ok(Window { path: blobs.to_owned(), dir, descriptors })
    }

    pub(super) fn descriptors(&self) -> &Descriptors {
        &self.descriptors
    }

    /// Opens the blob of this name, with an open file description of its own; `None` when it is not here.
    pub(super) fn open_blob(&self, name: &str) -> Result<Option<File>, Error> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        match patiently(|| Ok(openat(&self.dir, name, flags, Mode::empty())?)) {
            Ok(file) => Ok(Some(File::from(file))),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(e) => Err(failed("open", &self.path.join(name), e)),
        }
    }
}

fn mounted(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let tree = open_tree(CWD, dir, flags)?;
    make_read_only(tree.as_fd())?;
    Ok(tree)
}

fn why_not(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::PermissionDenied => "larder may not make mounts: it lacks CAP_SYS_ADMIN".into(),
        io::ErrorKind::Unsupported => "the kernel is older than Linux 5.12".into(),
        _ => format!("a mount cannot be made: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Digest;
    use crate::store::Volume;
    use crate::store::ingest::tests::stored;
    use std::fs;
    use std::io::Read;
    use std::os::fd::AsRawFd;

    #[test]
    fn readers_get_the_bytes_and_nothing_is_mounted_anywhere() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let blob = stored(&volume, b"bytes");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(dir.path().to_str().unwrap()), "{mounts}");
        let mut files = [(); 2].map(|()| volume.open_blob(blob.digest, 5).unwrap());
        for file in &mut files {
            let mut bytes = String::new();
            // Each has a position of its own.
            file.read_to_string(&mut bytes).unwrap();
            assert_eq!(bytes, "bytes");
        }
        assert!(volume.open_blob(Digest::of(b"other"), 5).is_err());
    }

    #[test]
    fn a_descriptor_stays_unwritable_when_the_volume_is_closed() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let blob = stored(&volume, b"bytes");
        let file = volume.open_blob(blob.digest, 5).unwrap();
        if let Descriptors::FileModes { why } = volume.descriptors() {
            println!("skipped: {why}");
            return;
        }
        drop(volume);
        let again = fs::File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd()));
        assert_eq!(again.unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
    }
}

//! Scrubbing: the bytes of a blob as the disk has them, not as memory has them, are hashed again.

use std::fs::File;
use std::io::ErrorKind;
use std::num::NonZero;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{Advice, OFlags, fadvise, fcntl_getfl, fcntl_setfl};
use serde::{Deserialize, Serialize};

use super::io::{self, read_small};
use super::layout::Scratch;
use super::record::json_line;
use super::{Error, Volume};
use crate::huge_page::HugePage;
use crate::model::{Digest, Digester, Verified};

/// Bytes of one read. A power of two, so that reads past the page cache begin where a disk's blocks do.
pub const SCRUB_BLOCK_BYTES: usize = 1 << 20;

/// What a look at the bytes of a blob on the disk found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Scrubbed {
    /// They are right.
    Right,
    /// They are wrong: those of this inode.
    Wrong {
        /// The inode.
        inode: u64,
    },
    /// The disk does not give them.
    Unreadable {
        /// The inode.
        inode: u64,
        /// The system's words.
        why: String,
    },
    /// There is no such blob.
    Missing,
    /// It was not looked at: it is being evicted, or a process has a lease of the kernel on it.
    Leased,
    /// The caller has had enough.
    Stopped,
}

/// How far scrubbing has come, over restarts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubNote {
    /// Blobs up to this digest have been scrubbed in the pass that is under way.
    pub reached: Option<Digest>,
    /// When the last whole pass ended, if one did; milliseconds since the Unix epoch.
    pub ended_ms: Option<u64>,
}

impl Volume {
    /// Reads a blob from the disk, a block at a time into `page`, and compares it with its name. `go_on` is told of each block's
    /// bytes before it is read, may wait, and ends it by `false`. Nothing is changed, nothing is locked, and nothing is open while
    /// it waits: who has a blob open keeps its model from being evicted.
    pub fn scrub_blob(
        &self,
        digest: Digest,
        size: u64,
        page: &mut HugePage,
        mut go_on: impl FnMut(u64) -> bool,
    ) -> Result<Scrubbed, Error> {
        let path = self.blob_path(digest);
        let block = &mut page[..SCRUB_BLOCK_BYTES];
        let (mut seen, mut at, mut digester) = (None, 0, Digester::new(None, size));
        let mut takes_direct_reads = true;
        let inode = loop {
            if at < size && !go_on((size - at).min(SCRUB_BLOCK_BYTES as u64)) {
                return Ok(Scrubbed::Stopped);
            }
            let file = match io::open_file(&path) {
                Ok(Some(file)) => file,
                Ok(None) => return Ok(Scrubbed::Missing),
                Err(Error::Leased { .. }) => return Ok(Scrubbed::Leased),
                Err(error) => return Err(error),
            };
            let found =
                file.metadata().map_err(|source| Error::Disk { verb: "look at", path: path.clone(), source })?;
            let inode = found.ino();
            if seen.replace(inode).is_some_and(|before| before != inode) {
                // A copy, or the same bytes of another pull, have taken its place.
                (at, digester) = (0, Digester::new(None, size));
            }
            if found.len() != size {
                return Ok(Scrubbed::Wrong { inode });
            }
            if at == size {
                break inode;
            }
            takes_direct_reads = takes_direct_reads && reads_directly(&file);
            if !takes_direct_reads {
                // What nobody has mapped goes from memory, and is read anew.
                let _ = fadvise(&file, at, NonZero::new(block.len() as u64), Advice::DontNeed);
            }
            match file.read_at(block, at) {
                Ok(0) => break inode,
                Ok(got) => {
                    digester.update(&block[..got]);
                    at += got as u64;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // The file system takes no reads past the page cache after all.
                Err(e) if e.kind() == ErrorKind::InvalidInput && takes_direct_reads => takes_direct_reads = false,
                Err(e) => return Ok(Scrubbed::Unreadable { inode, why: e.to_string() }),
            }
        };
        Ok(match digester.finish() {
            Verified::As(found) if found == digest => Scrubbed::Right,
            _ => Scrubbed::Wrong { inode },
        })
    }

    /// How far scrubbing has come. What cannot be read is forgotten: it costs that a pass begins anew.
    pub fn scrub_note(&self) -> ScrubNote {
        let bytes = read_small(&self.layout.scrub()).ok().flatten().unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// Remembers it. Durable on return.
    pub fn write_scrub_note(&self, note: &ScrubNote) -> Result<(), Error> {
        self.disk.replace(&self.layout.scratch(Scratch::File), &self.layout.scrub(), &json_line(note), 0o600)
    }

    /// What was right before is not known to be so any more: the next open hashes it.
    pub fn distrust(&self, digest: Digest) -> Result<(), Error> {
        let path = self.blob_path(digest);
        if let Some(found) = io::look_at(&path)? {
            self.stamps.forget(found.ino());
        }
        Ok(())
    }
}

/// Has the disk itself be read from here on, so that what others keep in memory stays there; `false` if it cannot be.
fn reads_directly(file: &File) -> bool {
    fcntl_getfl(file).and_then(|flags| fcntl_setfl(file, flags | OFlags::DIRECT)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::ingest::tests::stored;
    use std::fs;
    use std::path::Path;

    fn spoil(path: &Path, bytes: &[u8], at: u64) {
        // As a disk does: the inode stays, and a writer that is no reader of ours has it for a moment.
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        let file = fs::File::options().write(true).open(path).unwrap();
        file.write_all_at(bytes, at).unwrap();
        file.sync_all().unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o444)).unwrap();
    }

    #[test]
    fn each_byte_of_a_blob_is_looked_at() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        for size in [0, 1, 4096, SCRUB_BLOCK_BYTES, SCRUB_BLOCK_BYTES + 17, 3 * SCRUB_BLOCK_BYTES] {
            let bytes: Vec<u8> = (0..size).map(|n| (n * 7 + size) as u8).collect();
            let blob = stored(&volume, &bytes);
            let scrub = || volume.scrub_blob(blob.digest, blob.size, &mut HugePage::map().unwrap(), |_| true).unwrap();
            assert_eq!(scrub(), Scrubbed::Right, "{size}");
            if size > 0 {
                spoil(&volume.blob_path(blob.digest), &[bytes[size - 1] ^ 1], size as u64 - 1);
                assert!(matches!(scrub(), Scrubbed::Wrong { .. }), "{size}");
            }
            fs::remove_file(volume.blob_path(blob.digest)).unwrap();
            assert_eq!(scrub(), Scrubbed::Missing);
        }
    }

    #[test]
    fn a_short_and_a_long_blob_are_wrong_and_a_scrub_can_be_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let blob = stored(&volume, b"bytes");
        assert_eq!(
            volume.scrub_blob(blob.digest, 5, &mut HugePage::map().unwrap(), |_| false).unwrap(),
            Scrubbed::Stopped
        );
        spoil(&volume.blob_path(blob.digest), b"more", 5);
        assert!(matches!(
            volume.scrub_blob(blob.digest, 5, &mut HugePage::map().unwrap(), |_| true).unwrap(),
            Scrubbed::Wrong { .. }
        ));
    }

    #[test]
    fn a_blob_is_not_held_between_its_blocks_and_may_go_or_be_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let bytes = vec![7; 2 * SCRUB_BLOCK_BYTES + 1];
        let blob = stored(&volume, &bytes);
        let path = volume.blob_path(blob.digest);
        let scrub = |between: &dyn Fn()| {
            let mut blocks = 0;
            let found = volume.scrub_blob(blob.digest, blob.size, &mut HugePage::map().unwrap(), |_| {
                blocks += 1;
                assert!(!volume.is_open(blob.digest).unwrap());
                if blocks == 2 {
                    between();
                }
                true
            });
            (found.unwrap(), blocks)
        };
        assert_eq!(scrub(&|| ()), (Scrubbed::Right, 3));
        let replace = || {
            fs::write(dir.path().join("other"), &bytes).unwrap();
            fs::rename(dir.path().join("other"), &path).unwrap();
        };
        assert_eq!(scrub(&replace), (Scrubbed::Right, 4), "it begins anew");
        let lease = std::cell::RefCell::new(None);
        let evict = || drop(lease.replace(Some(volume.holders_of(blob.digest).unwrap())));
        let mut blocks = 0;
        let found = volume.scrub_blob(blob.digest, blob.size, &mut HugePage::map().unwrap(), |_| {
            blocks += 1;
            if blocks == 2 {
                evict();
            }
            true
        });
        assert_eq!(found.unwrap(), Scrubbed::Leased);
        lease.take();
        assert_eq!(scrub(&|| fs::remove_file(&path).unwrap()), (Scrubbed::Missing, 2));
    }

    #[test]
    fn how_far_it_has_come_survives_and_garbage_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        assert_eq!(volume.scrub_note(), ScrubNote::default());
        let note = ScrubNote { reached: Some(Digest::of(b"x")), ended_ms: Some(7) };
        volume.write_scrub_note(&note).unwrap();
        assert_eq!(volume.scrub_note(), note);
        fs::write(dir.path().join("scrub"), "{").unwrap();
        assert_eq!(volume.scrub_note(), ScrubNote::default());
    }
}

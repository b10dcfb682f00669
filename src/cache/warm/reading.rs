//! Reads files so that the kernel keeps their pages: large blocks, some threads, in the order of the files.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::{Advice, fadvise};
use tokio_util::sync::CancellationToken;

use crate::cache::Error;
use crate::cache::memory::{Allowance, Bound};
use crate::priority::IoPriority;
use crate::store::{self, Blob, Volume};
use crate::wire::residency;

/// Threads that read. One leaves a disk waiting that serves requests in parallel; more than four gained nothing where it was
/// measured (`larder bench --only warm-up` compares them with the disk's own speed).
const READERS: usize = 4;
/// Bytes of one read, and of each thread's buffer.
const BLOCK_BYTES: u64 = 2 << 20;
/// Bytes that are read between two looks at the memory.
const LOOK_EVERY_BYTES: u64 = 64 << 20;

/// How far it is, for whoever watches.
#[derive(Debug, Default)]
pub(super) struct Tally {
    /// Bytes that were found resident or have been read.
    pub(super) done: AtomicU64,
    /// Bytes that have been read.
    pub(super) read: AtomicU64,
}

/// How it ended.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Every byte was resident or has been read.
    Through,
    /// There was no memory for more.
    Short(Bound),
    /// Somebody took it back.
    Cancelled,
}

/// What is read, and for how long.
pub(super) struct Reading<'a> {
    pub(super) volume: &'a Volume,
    /// In this order: a loader that begins meanwhile opens the files of a model by name, and is then always behind us; and
    /// of a model that does not fit, whole files are resident.
    pub(super) blobs: &'a [Blob],
    /// How many bytes may be read in all, as it is known now.
    pub(super) allowance: &'a (dyn Fn() -> Allowance + Sync),
    pub(super) tally: &'a Tally,
    pub(super) cancelled: &'a CancellationToken,
    pub(super) way: &'a dyn GivesWay,
}

/// Whether others go first.
pub(super) trait GivesWay: Sync {
    /// It is for nobody in particular now: what others want of the disk is served before it.
    fn is_ahead(&self) -> bool;

    /// Waits while others go first, or until it is enough. All readers but one do: it comes to no halt. Blocking.
    fn wait_until_free(&self, enough: &CancellationToken);
}

/// A file that is being read.
struct OpenBlob {
    blob: Blob,
    file: Arc<File>,
    /// The numbers of its blocks that were not resident when it was opened, the next one first. They are found before it is
    /// read, because then the kernel reads ahead. They take 4 MB for a file of 1 TB.
    missing: VecDeque<u64>,
}

/// A piece of a file that was not wholly resident.
struct Block {
    blob: Blob,
    file: Arc<File>,
    offset: u64,
    length: u64,
}

/// Where the readers are. One of them moves it at a time.
struct Cursor<'a> {
    blobs: std::slice::Iter<'a, Blob>,
    open: Option<OpenBlob>,
    given_bytes: u64,
    allowance: Allowance,
    looked_at_bytes: u64,
    ended: Option<Result<Ended, Error>>,
}

impl Reading<'_> {
    /// Reads until the end, until there is no memory for more, or until it is cancelled. Blocking; all threads have ended
    /// on return.
    pub(super) fn run(&self) -> Result<Ended, Error> {
        let cursor = Mutex::new(Cursor {
            blobs: self.blobs.iter(),
            open: None,
            given_bytes: 0,
            allowance: (self.allowance)(),
            looked_at_bytes: 0,
            ended: None,
        });
        let enough = self.cancelled.child_token();
        std::thread::scope(|scope| {
            for _ in 1..READERS {
                let reader = std::thread::Builder::new().name("larder-warm".to_owned());
                let read = || self.read_blocks(&cursor, || self.way.wait_until_free(&enough));
                // Without one more thread it is slower, and no worse.
                drop(reader.spawn_scoped(scope, read));
            }
            self.read_blocks(&cursor, || ());
            enough.cancel();
        });
        let cursor = cursor.into_inner().expect("no panic while a block is taken");
        cursor.ended.unwrap_or(Ok(Ended::Through))
    }

    fn read_blocks(&self, cursor: &Mutex<Cursor<'_>>, wait_until_free: impl Fn()) {
        let mut buffer = vec![0; BLOCK_BYTES as usize];
        let mut priority = IoPriority::of_this_thread();
        loop {
            wait_until_free();
            priority.give_way(self.way.is_ahead());
            let block = cursor.lock().expect("no panic while a block is taken").next(self);
            let Some(block) = block else { return };
            let read = block.file.read_exact_at(&mut buffer[..block.length as usize], block.offset);
            if let Err(source) = read {
                let path = self.volume.blob_path(block.blob.digest);
                let error = store::Error::Disk { verb: "read", path, source };
                cursor.lock().expect("no panic while a block is taken").end(Err(error.into()));
                return;
            }
            self.tally.read.fetch_add(block.length, Ordering::Relaxed);
            self.tally.done.fetch_add(block.length, Ordering::Relaxed);
        }
    }
}

impl OpenBlob {
    fn next(&mut self) -> Option<Block> {
        let (offset, length) = block_at(self.missing.pop_front()?, self.blob.size);
        Some(Block { blob: self.blob, file: self.file.clone(), offset, length })
    }
}

/// Where a block begins, and its length: the last one may be shorter.
fn block_at(number: u64, size: u64) -> (u64, u64) {
    let offset = number * BLOCK_BYTES;
    (offset, BLOCK_BYTES.min(size - offset))
}

impl Cursor<'_> {
    /// The next block that is to be read; none when it has ended, for whatever reason.
    fn next(&mut self, reading: &Reading<'_>) -> Option<Block> {
        loop {
            if self.ended.is_some() {
                return None;
            }
            if reading.cancelled.is_cancelled() {
                return self.end(Ok(Ended::Cancelled));
            }
            let Some(block) = self.open.as_mut().and_then(OpenBlob::next) else {
                match self.open_next(reading) {
                    Ok(true) => continue,
                    Ok(false) => return self.end(Ok(Ended::Through)),
                    Err(error) => return self.end(Err(error)),
                }
            };
            if self.given_bytes - self.looked_at_bytes >= LOOK_EVERY_BYTES {
                self.allowance = (reading.allowance)();
                self.looked_at_bytes = self.given_bytes;
            }
            if self.given_bytes + block.length > self.allowance.bytes {
                let bound = self.allowance.bound.clone();
                return self.end(Ok(Ended::Short(bound)));
            }
            self.given_bytes += block.length;
            return Some(block);
        }
    }

    /// Whether there was one.
    fn open_next(&mut self, reading: &Reading<'_>) -> Result<bool, Error> {
        let Some(blob) = self.blobs.find(|blob| blob.size > 0) else { return Ok(false) };
        let file = reading.volume.read_blob(blob.digest, blob.size)?;
        // Only advice: a file system that does not take it reads all the same.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        let mut missing = VecDeque::new();
        for number in 0..blob.size.div_ceil(BLOCK_BYTES) {
            let (offset, length) = block_at(number, blob.size);
            // To ask costs next to nothing beside reading, even from memory.
            if residency::resident_bytes_in(&file, offset, length) == Some(length) {
                reading.tally.done.fetch_add(length, Ordering::Relaxed);
            } else {
                missing.push_back(number);
            }
        }
        self.open = Some(OpenBlob { blob: *blob, file: Arc::new(file), missing });
        Ok(true)
    }

    /// The first reason is the one that counts.
    fn end(&mut self, how: Result<Ended, Error>) -> Option<Block> {
        self.ended.get_or_insert(how);
        None
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::model::Digest;

    const MIB: u64 = 1 << 20;

    /// A volume with blobs of these sizes. They are holes, which are resident when they have been read like everything else.
    fn volume(sizes: &[u64]) -> (tempfile::TempDir, Volume, Vec<Blob>) {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let blobs = sizes.iter().zip(0u32..).map(|(size, n)| {
            let blob = Blob { digest: Digest::of(&n.to_le_bytes()), size: *size };
            fs::File::create(volume.blob_path(blob.digest)).unwrap().set_len(*size).unwrap();
            blob
        });
        let blobs = blobs.collect();
        (dir, volume, blobs)
    }

    /// Others go first all the time.
    struct Busy;

    impl GivesWay for Busy {
        fn is_ahead(&self) -> bool {
            true
        }

        fn wait_until_free(&self, enough: &CancellationToken) {
            futures::executor::block_on(enough.cancelled());
        }
    }

    fn plenty() -> Allowance {
        Allowance { bytes: u64::MAX, bound: Bound::Unknown }
    }

    fn run(
        (_, volume, blobs): &(tempfile::TempDir, Volume, Vec<Blob>),
        allowance: &(dyn Fn() -> Allowance + Sync),
        cancelled: &CancellationToken,
    ) -> (Result<Ended, Error>, u64, u64) {
        let tally = Tally::default();
        let ended = Reading { volume, blobs, allowance, tally: &tally, cancelled, way: &Busy }.run();
        (ended, tally.done.load(Ordering::Relaxed), tally.read.load(Ordering::Relaxed))
    }

    fn resident(volume: &(tempfile::TempDir, Volume, Vec<Blob>)) -> Vec<u64> {
        volume.2.iter().map(|blob| volume.1.resident_bytes(blob.digest, blob.size).unwrap()).collect()
    }

    #[test]
    fn every_byte_is_read_once_and_not_again() {
        let there = volume(&[3 * MIB + 17, 0, 1, 8 * MIB]);
        let total = 11 * MIB + 18;
        assert_eq!(resident(&there), [0, 0, 0, 0]);
        let (ended, done, read) = run(&there, &plenty, &CancellationToken::new());
        assert_eq!((ended.unwrap(), done, read), (Ended::Through, total, total));
        assert_eq!(resident(&there), [3 * MIB + 17, 0, 1, 8 * MIB]);
        let (ended, done, read) = run(&there, &plenty, &CancellationToken::new());
        assert_eq!((ended.unwrap(), done, read), (Ended::Through, total, 0));
    }

    #[test]
    fn a_model_that_does_not_fit_is_read_from_its_beginning() {
        let there = volume(&[4 * MIB, 4 * MIB, 64 * MIB]);
        let bound = Bound::Node { available: crate::model::Bytes(9), reserve: crate::model::Bytes(1) };
        let allowance = || Allowance { bytes: 8 * MIB + 17, bound: bound.clone() };
        let (ended, _, read) = run(&there, &allowance, &CancellationToken::new());
        assert_eq!((ended.unwrap(), read), (Ended::Short(bound.clone()), 8 * MIB));
        assert_eq!(resident(&there)[..2], [4 * MIB, 4 * MIB]);
        assert!(resident(&there)[2] < 64 * MIB);
        // What is resident needs no memory.
        let none = || Allowance { bytes: 0, bound: bound.clone() };
        let (ended, done, read) = run(&there, &none, &CancellationToken::new());
        assert_eq!((ended.unwrap(), read), (Ended::Short(bound.clone()), 0));
        assert!(done >= 8 * MIB);
    }

    #[test]
    fn memory_that_becomes_short_meanwhile_is_seen() {
        let there = volume(&[3 * LOOK_EVERY_BYTES]);
        let looks = AtomicU64::new(0);
        let allowance = || match looks.fetch_add(1, Ordering::Relaxed) {
            0 => plenty(),
            _ => Allowance { bytes: LOOK_EVERY_BYTES, bound: Bound::Unknown },
        };
        let (ended, _, read) = run(&there, &allowance, &CancellationToken::new());
        assert_eq!((ended.unwrap(), read), (Ended::Short(Bound::Unknown), LOOK_EVERY_BYTES));
    }

    #[test]
    fn it_ends_where_it_is_when_it_is_cancelled() {
        let there = volume(&[3 * LOOK_EVERY_BYTES]);
        let (looks, cancelled) = (AtomicU64::new(0), CancellationToken::new());
        let allowance = || {
            if looks.fetch_add(1, Ordering::Relaxed) == 1 {
                cancelled.cancel();
            }
            plenty()
        };
        let (ended, _, read) = run(&there, &allowance, &cancelled);
        assert_eq!(ended.unwrap(), Ended::Cancelled);
        assert_eq!(read, LOOK_EVERY_BYTES + BLOCK_BYTES, "the block that was being taken is the last");
    }

    #[test]
    fn a_blob_that_is_not_here_is_an_error_and_ends_it() {
        let there = volume(&[4 * MIB, 4 * MIB]);
        fs::remove_file(there.1.blob_path(there.2[1].digest)).unwrap();
        let (ended, _, _) = run(&there, &plenty, &CancellationToken::new());
        let Err(Error::Store(store::Error::Corrupt { found, .. })) = ended else { panic!("{ended:?}") };
        assert_eq!(found, "it is missing");
    }
}

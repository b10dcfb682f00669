//! Reads files so that the kernel keeps their pages: large blocks, some threads, in the order of the files.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::{Advice, fadvise};
use tokio_util::sync::CancellationToken;

use super::memory::{Allowance, Bound};
use crate::cache::Error;
use crate::store::{self, Blob, Volume};
use crate::wire::residency;

/// Threads that read. Measured with `benches/warm_up.rs`: a disk that serves requests in parallel needs more than one, and
/// more than this gained nothing on two cores.
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
}

/// A piece of a file that is not wholly resident.
struct Block {
    blob: Blob,
    file: Arc<File>,
    offset: u64,
    length: u64,
}

/// Where the readers are. One of them moves it at a time.
struct Cursor<'a> {
    blobs: std::slice::Iter<'a, Blob>,
    open: Option<(Blob, Arc<File>, u64)>,
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
        std::thread::scope(|scope| {
            for _ in 1..READERS {
                let reader = std::thread::Builder::new().name("larder-warm".to_owned());
                // Without one more thread it is slower, and no worse.
                drop(reader.spawn_scoped(scope, || self.read_blocks(&cursor)));
            }
            self.read_blocks(&cursor);
        });
        let cursor = cursor.into_inner().expect("no panic while a block is taken");
        cursor.ended.unwrap_or(Ok(Ended::Through))
    }

    fn read_blocks(&self, cursor: &Mutex<Cursor<'_>>) {
        let mut buffer = vec![0; BLOCK_BYTES as usize];
        loop {
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
            let Some((blob, file, offset)) = &mut self.open else {
                match self.open_next(reading) {
                    Ok(true) => continue,
                    Ok(false) => return self.end(Ok(Ended::Through)),
                    Err(error) => return self.end(Err(error)),
                }
            };
            let length = BLOCK_BYTES.min(blob.size - *offset);
            let block = Block { blob: *blob, file: file.clone(), offset: *offset, length };
            // Asking costs a hundredth of reading from memory, and warming what is warm costs next to nothing.
            let resident = residency::resident_bytes_in(&block.file, block.offset, length) == Some(length);
            if !resident && self.given_bytes - self.looked_at_bytes >= LOOK_EVERY_BYTES {
                self.allowance = (reading.allowance)();
                self.looked_at_bytes = self.given_bytes;
            }
            if !resident && self.given_bytes + length > self.allowance.bytes {
                let bound = self.allowance.bound.clone();
                return self.end(Ok(Ended::Short(bound)));
            }
            if block.offset + length == block.blob.size {
                self.open = None;
            } else if let Some((_, _, offset)) = &mut self.open {
                *offset += length;
            }
            if resident {
                reading.tally.done.fetch_add(length, Ordering::Relaxed);
                continue;
            }
            self.given_bytes += length;
            return Some(block);
        }
    }

    /// Whether there was one.
    fn open_next(&mut self, reading: &Reading<'_>) -> Result<bool, Error> {
        let Some(blob) = self.blobs.find(|blob| blob.size > 0) else { return Ok(false) };
        let file = reading.volume.open_blob(blob.digest, blob.size)?;
        // Only advice: a file system that does not take it reads all the same.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        self.open = Some((*blob, Arc::new(file), 0));
        Ok(true)
    }

    /// The first reason is the one that counts.
    fn end(&mut self, how: Result<Ended, Error>) -> Option<Block> {
        self.ended.get_or_insert(how);
        None
    }
}

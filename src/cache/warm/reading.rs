//! Has the kernel read files into its page cache: some threads, each a stretch at a time, in the order of the files.
//!
//! Nothing is copied: the pages go to `/dev/null`, which takes them as they are. To look at each byte once cost ten times as
//! much of the processors as to have it read. Each thread reads its stretches through a file of its own: the kernel reads
//! ahead for each open file, further and in larger pages the longer it is read in order.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{Advice, Mode, OFlags, fadvise, open, sendfile};
use rustix::io::Errno;
use tokio_util::sync::CancellationToken;

use crate::cache::Error;
use crate::cache::memory::{Allowance, Bound};
use crate::priority::IoPriority;
use crate::store::{self, Blob, Volume};
use crate::wire::residency;

/// Threads that read. They hardly compute, and each has asked for a few hundred KiB to some MiB ahead, as `read_ahead_kb` of the
/// disk says: a disk that serves requests in parallel waits for fewer (`larder bench --only warm-up` compares them with its
/// own speed).
const READERS: usize = 16;
/// Bytes of one call. Between two of them others may go first.
const BLOCK_BYTES: u64 = 2 << 20;
/// The most that a thread reads in order, of what others do not read.
const STRETCH_BYTES: u64 = 32 << 20;
/// Bytes that are read between two looks at the memory.
const LOOK_EVERY_BYTES: u64 = STRETCH_BYTES;

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

/// A part of a blob that was not resident. It begins with a block, and ends with one or with the blob.
struct Stretch {
    blob: Blob,
    range: Range<u64>,
}

/// Where the readers are. One of them moves it at a time.
struct Cursor<'a> {
    blobs: std::slice::Iter<'a, Blob>,
    /// Of the blob that was looked at last, what nobody reads yet. All of it is found before it is read, because then the
    /// kernel reads ahead.
    missing: VecDeque<Stretch>,
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
            missing: VecDeque::new(),
            given_bytes: 0,
            allowance: (self.allowance)(),
            looked_at_bytes: 0,
            ended: None,
        });
        let enough = self.cancelled.child_token();
        std::thread::scope(|scope| {
            for _ in 1..READERS {
                let reader = std::thread::Builder::new().name("larder-warm".to_owned());
                let read = || self.read_stretches(&cursor, || self.way.wait_until_free(&enough));
                // Without one more thread it is slower, and no worse.
                drop(reader.spawn_scoped(scope, read));
            }
            self.read_stretches(&cursor, || ());
            enough.cancel();
        });
        let cursor = cursor.into_inner().expect("no panic while a stretch is taken");
        cursor.ended.unwrap_or(Ok(Ended::Through))
    }

    fn read_stretches(&self, cursor: &Mutex<Cursor<'_>>, wait_until_free: impl Fn()) {
        let cursor = || cursor.lock().expect("no panic while a stretch is taken");
        let mut hand = Hand { priority: IoPriority::of_this_thread(), pages: Pages::default(), last: None };
        // Before a stretch is taken, too: who waits holds none that another one could read.
        wait_until_free();
        loop {
            let Some(stretch) = cursor().next(self) else { return };
            if let Err(error) = self.read_stretch(&stretch, &mut hand, &wait_until_free) {
                return cursor().end(Err(error));
            }
        }
    }

    /// Reads it to its end, or until it is cancelled.
    fn read_stretch(&self, stretch: &Stretch, hand: &mut Hand, wait_until_free: &impl Fn()) -> Result<(), Error> {
        let Stretch { blob, range } = stretch;
        let file = match hand.last.take_if(|(of, _)| of == blob) {
            Some((_, file)) => file,
            None => self.open(*blob)?,
        };
        for at in range.clone().step_by(BLOCK_BYTES as usize) {
            hand.priority.give_way(self.way.is_ahead());
            if self.cancelled.is_cancelled() {
                break;
            }
            let length = BLOCK_BYTES.min(range.end - at);
            hand.pages.read(&file, at, length).map_err(|source| {
                let path = self.volume.blob_path(blob.digest);
                store::Error::Disk { verb: "read", path, source }
            })?;
            self.tally.read.fetch_add(length, Ordering::Relaxed);
            self.tally.done.fetch_add(length, Ordering::Relaxed);
            wait_until_free();
        }
        hand.last = Some((*blob, file));
        Ok(())
    }

    fn open(&self, blob: Blob) -> Result<File, Error> {
        let file = self.volume.read_blob(blob.digest, blob.size)?;
        // Only advice: a file system that does not take it reads all the same.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        Ok(file)
    }
}

/// What a thread keeps from one stretch to the next.
struct Hand {
    priority: IoPriority,
    pages: Pages,
    /// Its own file of the blob that it read last: for how far the kernel reads ahead in it.
    last: Option<(Blob, File)>,
}

/// Has pages read that nobody looks at.
#[derive(Default)]
struct Pages {
    /// Where they go, once it is open.
    nowhere: Option<OwnedFd>,
}

impl Pages {
    fn read(&mut self, file: &File, offset: u64, length: u64) -> io::Result<()> {
        let nowhere = match &mut self.nowhere {
            Some(nowhere) => nowhere,
            none => none.insert(open("/dev/null", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?),
        };
        let (mut at, end) = (offset, offset + length);
        while at < end {
            let left = (end - at) as usize;
            match sendfile(&*nowhere, file, Some(&mut at), left) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) | Err(Errno::INTR) => {}
                // A file system that cannot lend its pages: it copies them.
                Err(Errno::INVAL) => return file.read_exact_at(&mut vec![0; left], at),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

impl Cursor<'_> {
    /// The next stretch that is to be read; none when it has ended, for whatever reason.
    fn next(&mut self, reading: &Reading<'_>) -> Option<Stretch> {
        loop {
            if self.ended.is_none() && reading.cancelled.is_cancelled() {
                self.end(Ok(Ended::Cancelled));
            }
            if self.ended.is_some() {
                return None;
            }
            let Some(mut stretch) = self.missing.pop_front() else {
                match self.look_at_next(reading) {
                    Ok(true) => {}
                    // What others still read may fail: that it is through is known when all have come here.
                    Ok(false) => return None,
                    Err(error) => self.end(Err(error)),
                }
                continue;
            };
            if self.given_bytes - self.looked_at_bytes >= LOOK_EVERY_BYTES {
                self.allowance = (reading.allowance)();
                self.looked_at_bytes = self.given_bytes;
            }
            let (length, left) =
                (stretch.range.end - stretch.range.start, self.allowance.bytes.saturating_sub(self.given_bytes));
            if length > left {
                self.end(Ok(Ended::Short(self.allowance.bound.clone())));
                stretch.range.end = stretch.range.start + left / BLOCK_BYTES * BLOCK_BYTES;
            }
            self.given_bytes += stretch.range.end - stretch.range.start;
            return Some(stretch).filter(|stretch| !stretch.range.is_empty());
        }
    }

    /// Whether there was one more blob.
    fn look_at_next(&mut self, reading: &Reading<'_>) -> Result<bool, Error> {
        let Some(blob) = self.blobs.find(|blob| blob.size > 0) else { return Ok(false) };
        let file = reading.open(*blob)?;
        for offset in (0..blob.size).step_by(BLOCK_BYTES as usize) {
            let length = BLOCK_BYTES.min(blob.size - offset);
            // To ask costs next to nothing beside reading, even from memory.
            if residency::resident_bytes_in(&file, offset, length) == Some(length) {
                reading.tally.done.fetch_add(length, Ordering::Relaxed);
                continue;
            }
            let goes_on =
                |last: &&mut Stretch| last.range.end == offset && offset + length - last.range.start <= STRETCH_BYTES;
            match self.missing.back_mut().filter(goes_on) {
                Some(last) => last.range.end = offset + length,
                None => self.missing.push_back(Stretch { blob: *blob, range: offset..offset + length }),
            }
        }
        Ok(true)
    }

    /// The first reason is the one that counts.
    fn end(&mut self, how: Result<Ended, Error>) {
        self.ended.get_or_insert(how);
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
        assert_eq!((ended.unwrap(), read), (Ended::Cancelled, LOOK_EVERY_BYTES));
    }

    #[test]
    fn what_cannot_be_lent_is_copied_and_what_ends_too_early_is_an_error() {
        let mut pages = Pages::default();
        // The kernel makes it up for each who reads it: there are no pages.
        pages.read(&File::open("/proc/self/status").unwrap(), 0, 100).unwrap();
        let short = tempfile::tempfile().unwrap();
        short.set_len(MIB).unwrap();
        pages.read(&short, 0, MIB).unwrap();
        assert_eq!(pages.read(&short, 0, MIB + 1).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
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

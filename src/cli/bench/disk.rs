//! What the disk itself gives to whoever goes around the page cache, several at a time.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::floor::{directly, no_direct};
use crate::huge_page::HugePage;

/// Enough for a disk that answers several requests at once; more are not faster on any we know.
const THREADS: u64 = 8;
/// Read or written by one call.
const BLOCK_BYTES: u64 = 1 << 20;

/// So many bytes, into as many files as there are threads.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::cli) struct Write {
    pub(in crate::cli) directory: PathBuf,
    pub(in crate::cli) bytes: u64,
}

/// All of these files.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::cli) struct Read {
    pub(in crate::cli) files: Vec<PathBuf>,
    /// Into memory that nobody has used yet and that stays until the end, as a page cache is filled; else the same few blocks of
    /// memory are used again and again.
    pub(in crate::cli) keeps: bool,
}

impl Write {
    /// What is written in all.
    pub(in crate::cli) fn total_bytes(&self) -> u64 {
        self.of_each() * THREADS
    }

    /// What is written to.
    pub(in crate::cli) fn files(&self) -> impl Iterator<Item = PathBuf> {
        (0..THREADS).map(|thread| self.file(thread))
    }

    fn file(&self, thread: u64) -> PathBuf {
        self.directory.join(format!("written-{thread}"))
    }

    fn of_each(&self) -> u64 {
        (self.bytes / THREADS / BLOCK_BYTES).max(1) * BLOCK_BYTES
    }
}

/// Writes, and makes it durable.
pub(in crate::cli) fn write(write: &Write) -> io::Result<Duration> {
    let began = Instant::now();
    in_threads(|thread| {
        let file = directly(&write.file(thread), write.of_each())?;
        let mut page = HugePage::map()?;
        let block = &mut page[..BLOCK_BYTES as usize];
        blake3::Hasher::new().update(&thread.to_le_bytes()).finalize_xof().fill(block);
        for at in (0..write.of_each()).step_by(BLOCK_BYTES as usize) {
            file.write_all_at(block, at)?;
        }
        file.sync_all()
    })?;
    File::open(&write.directory)?.sync_all()?;
    Ok(began.elapsed())
}

/// Reads, wherever the bytes are in the page cache too.
pub(in crate::cli) fn read(read: &Read) -> io::Result<Duration> {
    let direct = OFlags::DIRECT.bits() as i32;
    let open = |path: &PathBuf| {
        let file = OpenOptions::new().read(true).custom_flags(direct).open(path).map_err(no_direct)?;
        let size = file.metadata()?.len();
        io::Result::Ok((file, size))
    };
    let files: Vec<(File, u64)> = read.files.iter().map(open).collect::<io::Result<_>>()?;
    let blocks = |(_, size): &(File, u64)| size.div_ceil(BLOCK_BYTES);
    let began = Instant::now();
    let next = AtomicU64::new(0);
    let kept = in_threads(|_| {
        let (mut free, mut kept) = (Vec::new(), Vec::new());
        loop {
            let mut number = next.fetch_add(1, Ordering::Relaxed);
            let found = files.iter().find(|file| {
                let here = number < blocks(file);
                number -= if here { 0 } else { blocks(file) };
                here
            });
            let Some((file, _)) = found else { return Ok(kept) };
            if free.is_empty() {
                free = HugePage::map()?.cut(BLOCK_BYTES as usize);
            }
            let mut block = free.pop().expect("a page has parts");
            // The last block of a file is shorter.
            file.read_at(&mut block, number * BLOCK_BYTES)?;
            if read.keeps { &mut kept } else { &mut free }.push(block);
        }
    })?;
    let took = began.elapsed();
    // Only now: to give it back takes time too.
    drop(kept);
    Ok(took)
}

fn in_threads<T: Send>(work: impl Fn(u64) -> io::Result<T> + Sync) -> io::Result<Vec<T>> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                scope.spawn({
                    let work = &work;
                    move || work(thread)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("reading and writing do not panic")).collect()
    })
}

//! Moves one file from a source into an ingest: ranges in parallel, one writer, bounded memory.
//!
//! The budget is counted in pieces. A range takes the pieces for all its bytes *before* it asks the source for the first
//! one, and the ranges of a file take them in ascending order. So the lowest unfinished range of every file owns all the
//! memory it needs to end, and waiting for memory can never become a deadlock.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use bytes::Bytes;
use futures::StreamExt;
use memmap2::MmapMut;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::Error;
use super::caching::Caching;
use super::connections::Connections;
use super::demand::{Demand, Turn, Urgency};
use super::throughput::Throughput;
use crate::model::{Claim, ListedFile};
use crate::source::{self, OnWait, RetryPolicy, Source};
use crate::store::{Blob, Ingest};

/// Bytes of one piece: large enough for wide SIMD and few system calls, small enough to stay in the cache while the
/// writer's passes (BLAKE3, the checksum, the write) go over it.
const PIECE_BYTES: usize = 1 << 20;
/// Largest range. What a crash loses of a file is its ranges in memory, so all pulls together lose the budget at most, and
/// what the notes of their ingests do not vouch for yet.
const MAX_RANGE_BYTES: u64 = 16 << 20;
/// Files that are written at the same time, all pulls together. Each has a thread for its writer: with more files than
/// threads, ranges would hold memory for writers that cannot run.
const MAX_OPEN_FILES: usize = 64;
/// Ranges of one file that may wait for its writer; the budget is the real bound.
const MAX_RANGES_IN_FLIGHT: usize = 256;

/// The memory and the connections that all pulls share.
pub(super) struct Budget {
    pieces: Arc<Semaphore>,
    connections: Arc<Connections>,
    throughput: Throughput,
    files: Arc<Semaphore>,
    buffers: Mutex<Vec<MmapMut>>,
    range_bytes: u64,
}

impl Budget {
    /// `memory_bytes` is rounded down to whole pieces, at least one; `connections` is at least one.
    pub(super) fn new(memory_bytes: u64, connections: usize) -> Budget {
        let pieces = usize::try_from(memory_bytes / PIECE_BYTES as u64).unwrap_or(usize::MAX).clamp(1, 1 << 16);
        let connections = connections.max(1);
        let share = (pieces / connections).max(1) as u64 * PIECE_BYTES as u64;
        Budget {
            pieces: Arc::new(Semaphore::new(pieces)),
            connections: Connections::new(connections),
            throughput: Throughput::default(),
            files: Arc::new(Semaphore::new(MAX_OPEN_FILES)),
            buffers: Mutex::default(),
            range_bytes: share.min(MAX_RANGE_BYTES),
        }
    }

    /// Waits for a place among the files that are being written.
    pub(super) async fn file(&self) -> OwnedSemaphorePermit {
        self.files.clone().acquire_owned().await.expect("the budget is never closed")
    }

    /// No pull is left: the buffers go back to the system, and what was learnt of the source is forgotten.
    pub(super) fn rest(&self) {
        self.connections.start_over();
        *self.buffers.lock().expect("no panic while the buffers are held") = Vec::new();
    }

    fn piece(self: &Arc<Self>, permit: OwnedSemaphorePermit, share: Option<Arc<OwnedSemaphorePermit>>) -> Piece {
        let reused = self.buffers.lock().expect("no panic while the buffers are held").pop();
        let buffer = reused.unwrap_or_else(|| MmapMut::map_anon(PIECE_BYTES).expect("there is memory for a piece"));
        Piece { buffer: Some(buffer), length: 0, budget: self.clone(), _permit: permit, _share: share }
    }
}

/// Some bytes on their way, and the part of the budget they use. The buffer is a map of its own: so it begins at a page, as
/// writes past the page cache need it, and what is given back goes to the system and not to a heap that keeps it.
struct Piece {
    /// Until it is dropped.
    buffer: Option<MmapMut>,
    length: usize,
    budget: Arc<Budget>,
    _permit: OwnedSemaphorePermit,
    _share: Option<Arc<OwnedSemaphorePermit>>,
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        &self.buffer.as_ref().expect("the piece is not dropped yet")[..self.length]
    }

    fn is_full(&self) -> bool {
        self.length == PIECE_BYTES
    }

    /// Takes from the front of `chunk` what still fits.
    fn take(&mut self, chunk: &mut Bytes) {
        let taken = chunk.split_to(chunk.len().min(PIECE_BYTES - self.length));
        let buffer = self.buffer.as_mut().expect("the piece is not dropped yet");
        buffer[self.length..][..taken.len()].copy_from_slice(&taken);
        self.length += taken.len();
    }
}

/// The pieces that a range may fill.
enum Share {
    /// Enough for all its bytes: each piece takes its permit along.
    All(OwnedSemaphorePermit),
    /// Fewer: one must have been written before the next is filled. Given back when the last piece is written.
    Lent { pieces: Arc<Semaphore>, share: Arc<OwnedSemaphorePermit> },
}

impl Share {
    async fn piece(&mut self, budget: &Arc<Budget>) -> Piece {
        let (permit, share) = match self {
            Share::All(permits) => (permits.split(1).expect("a range's bytes fit in the pieces it took"), None),
            Share::Lent { pieces, share } => {
                let permit = pieces.clone().acquire_owned().await.expect("the share is never closed");
                (permit, Some(share.clone()))
            }
        };
        budget.piece(permit, share)
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let buffer = self.buffer.take();
        self.budget.buffers.lock().expect("no panic while the buffers are held").extend(buffer);
    }
}

/// The ranges that are still to be fetched: ascending, without gap or overlap, cut at multiples of `range_bytes`.
fn plan_ranges(start: u64, size: u64, range_bytes: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = start;
    std::iter::from_fn(move || {
        if at >= size {
            return None;
        }
        let end = (at / range_bytes + 1).saturating_mul(range_bytes).min(size);
        let range = at..end;
        at = end;
        Some(range)
    })
}

/// Whether two answers about the file can be told to be of the same bytes. If not, all of it must come in one answer:
/// its ranges, or its two halves around a break, could be of two versions.
pub(super) fn is_marked(file: &ListedFile) -> bool {
    Claim::of(file).is_some()
}

/// What a pull counts while it runs.
#[derive(Default)]
pub(super) struct Tally {
    /// Bytes of the model that are on this disk.
    pub(super) done: AtomicU64,
    /// Bytes that came from the source.
    pub(super) fetched: AtomicU64,
}

/// What one transfer needs besides the file.
#[derive(Clone)]
pub(super) struct Transfer {
    pub(super) source: Arc<dyn Source>,
    pub(super) policy: RetryPolicy,
    pub(super) on_wait: OnWait,
    pub(super) budget: Arc<Budget>,
    pub(super) demand: Arc<Demand>,
    pub(super) urgency: Arc<Urgency>,
    pub(super) caching: Caching,
    pub(super) tally: Arc<Tally>,
    pub(super) cancelled: CancellationToken,
    /// Held for reading while a blob is committed, for writing while blobs are unlinked.
    pub(super) commits: Arc<RwLock<()>>,
}

impl Transfer {
    /// Fetches what the ingest lacks and commits it; `adopt` runs before a removal can see the new blob.
    ///
    /// When it ends without a blob (an error, or cancelled) the bytes so far are kept for the next attempt, if the file
    /// has a claim by which that attempt can recognise them. A file without one is not resumed here either: it comes in one
    /// answer, and the caller begins again.
    pub(super) async fn run(
        &self,
        file: &ListedFile,
        ingest: Ingest,
        adopt: impl FnOnce(Blob) + Send + 'static,
    ) -> Result<Blob, Error> {
        let start = ingest.len();
        self.tally.done.fetch_add(start, Ordering::Relaxed);
        let (ranges_in, ranges_out) = mpsc::channel(MAX_RANGES_IN_FLIGHT);
        let (transfer, size) = (self.clone(), file.size);
        let mut writer = tokio::task::spawn_blocking(move || transfer.write_in_order(ingest, size, ranges_out, adopt));

        let (marked, budget) = (is_marked(file), &self.budget);
        let mut readers = JoinSet::new();
        for range in plan_ranges(start, file.size, if marked { budget.range_bytes } else { u64::MAX }) {
            while readers.try_join_next().is_some() {}
            let pieces = (range.end - range.start).min(budget.range_bytes).div_ceil(PIECE_BYTES as u64);
            let pieces = u32::try_from(pieces).expect("a range is at most 16 MiB");
            let turn = async {
                let turn = self.demand.turn(&self.urgency).await;
                (turn, self.budget.pieces.clone().acquire_many_owned(pieces).await)
            };
            let (turn, permits) = tokio::select! {
                taken = turn => taken,
                // The writer ends early only with an error: there is nobody left to read for.
                ended = &mut writer => return ended.expect("the writer does not panic"),
                () = self.cancelled.cancelled() => break,
            };
            let permits = permits.expect("the budget is never closed");
            let (pieces_in, pieces_out) = mpsc::unbounded_channel();
            if ranges_in.send((range.clone(), pieces_out)).await.is_err() {
                break;
            }
            let share = match marked {
                true => Share::All(permits),
                false => Share::Lent { pieces: Arc::new(Semaphore::new(pieces as usize)), share: Arc::new(permits) },
            };
            readers.spawn(self.clone().read_range(file.clone(), range, share, turn, pieces_in));
        }
        drop(ranges_in);
        tokio::select! {
            ended = &mut writer => return ended.expect("the writer does not panic"),
            () = self.cancelled.cancelled() => {}
        }
        // Without readers their channels close; the writer sees it, keeps what it has, and ends.
        readers.shutdown().await;
        writer.await.expect("the writer does not panic")
    }

    async fn read_range(
        self,
        file: ListedFile,
        range: Range<u64>,
        mut share: Share,
        _turn: Turn,
        pieces: mpsc::UnboundedSender<Result<Piece, source::Error>>,
    ) {
        let connection = self.budget.connections.acquire().await;
        let policy = match share {
            Share::All(_) => self.policy,
            Share::Lent { .. } => RetryPolicy { attempts: 1, ..self.policy },
        };
        let mut stream = policy.fetch(self.source, file, range, self.on_wait);
        let mut piece: Option<Piece> = None;
        while let Some(chunk) = stream.next().await {
            let mut chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => {
                    // What came before the error is good: the next attempt begins behind it.
                    for message in piece.take().map(Ok).into_iter().chain([Err(error)]) {
                        let _ = pieces.send(message);
                    }
                    return;
                }
            };
            self.tally.fetched.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            if let Some(bytes_per_second) = self.budget.throughput.count(chunk.len()) {
                self.budget.connections.adapt(bytes_per_second);
            }
            while !chunk.is_empty() {
                if piece.is_none() {
                    piece = Some(share.piece(&self.budget).await);
                }
                let Some(current) = &mut piece else { break };
                current.take(&mut chunk);
                if current.is_full()
                    && let Some(full) = piece.take()
                    && pieces.send(Ok(full)).is_err()
                {
                    return;
                }
            }
        }
        drop(connection);
        if let Some(rest) = piece {
            let _ = pieces.send(Ok(rest));
        }
    }

    /// The one writer of a file. Runs on a blocking thread.
    fn write_in_order(
        &self,
        mut ingest: Ingest,
        size: u64,
        mut ranges: mpsc::Receiver<(Range<u64>, Pieces)>,
        adopt: impl FnOnce(Blob),
    ) -> Result<Blob, Error> {
        let done = &self.tally.done;
        while let Some((range, mut pieces)) = ranges.blocking_recv() {
            while let Some(piece) = pieces.blocking_recv() {
                match piece {
                    Ok(piece) => {
                        ingest.bypass_page_cache(self.caching.bypasses(self.budget.throughput.bytes_per_second()))?;
                        ingest.write(piece.bytes())?;
                        done.fetch_add(piece.length as u64, Ordering::Relaxed);
                    }
                    Err(error) => {
                        done.fetch_sub(ingest.len(), Ordering::Relaxed);
                        ingest.pause()?;
                        return Err(Error::Source(error));
                    }
                }
            }
            // A reader that was dropped leaves its range short; what the next range holds must not be taken for its rest.
            if ingest.len() != range.end {
                break;
            }
        }
        let written = ingest.len();
        if written < size {
            done.fetch_sub(written, Ordering::Relaxed);
            ingest.pause()?;
            return Err(Error::Cancelled);
        }
        let _commit = self.commits.read().expect("no panic while a commit is under way");
        let blob = ingest.commit().inspect_err(|_| {
            done.fetch_sub(written, Ordering::Relaxed);
        })?;
        adopt(blob);
        Ok(blob)
    }
}

type Pieces = mpsc::UnboundedReceiver<Result<Piece, source::Error>>;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn ranges_cover_what_is_missing_once_and_in_order(size in 0u64..1_000_000, start in 0u64..1_000_000, step in 1u64..100_000) {
            let mut at = start.min(size);
            for range in plan_ranges(at, size, step) {
                prop_assert_eq!(range.start, at);
                prop_assert!(range.start < range.end && range.end - range.start <= step);
                at = range.end;
            }
            prop_assert_eq!(at, size);
        }

        #[test]
        fn a_range_always_fits_in_the_budget(memory in 0u64..1 << 32, connections in 0usize..300) {
            let budget = Budget::new(memory, connections);
            let pieces = budget.range_bytes.div_ceil(PIECE_BYTES as u64) as usize;
            prop_assert!(pieces >= 1 && pieces <= budget.pieces.available_permits());
        }
    }

    #[test]
    fn ranges_near_the_end_of_numbers_do_not_overflow() {
        assert_eq!(plan_ranges(u64::MAX - 5, u64::MAX, 1 << 22).map(|r| r.end - r.start).sum::<u64>(), 5);
    }
}

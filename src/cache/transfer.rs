//! Moves one file from a source into an ingest: ranges in parallel, one writer, bounded memory.
//!
//! The budget is counted in pieces. A range takes a connection and a piece of its own *before* it asks the source, and the
//! ranges of a file take them in ascending order. Its own piece comes back to it each time that it has been written, so the
//! lowest unfinished range of every file can always go on, and waiting for memory can never become a deadlock. The others go
//! ahead as far as there are pieces left.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Instant;

use futures::FutureExt;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::caching::Caching;
use super::clock::{Clock, During};
use super::connections::{Connection, Connections};
use super::demand::{Demand, Turn, Urgency};
use super::piece::{Buffers, PIECE_BYTES};
use super::throughput::Throughput;
use super::{Error, microseconds};
use crate::heap;
use crate::huge_page::PagePart;
use crate::model::{Claim, Effort, ListedFile, Stage};
use crate::priority::IoPriority;
use crate::source::{self, OnGate, OnWait, RangeReader, RetryPolicy, Source};
use crate::store::{Blob, Ingest, WriteTime};

/// From a source that gives more than this on each connection, in bytes a second, ranges are twice as long as memory allows
/// for all of them at once: the lowest of a file needs next to none, the others half of theirs on average, and who asks less
/// often waits less for answers. What there is no memory for waits until the lowest has come: here some seconds, which no
/// server takes for the end of a reader.
const BRISK_BYTES_PER_SECOND: u64 = 1_000_000;
/// Largest range.
const MAX_RANGE_BYTES: u64 = 16 << 20;
/// A file of fewer is asked for in ranges of one length: each request costs something too.
const MANY_RANGES: u64 = 16;
/// A range asks for at most one part in so many of what is left of its file.
const SHARE_OF_THE_REST: u64 = 4;
/// Pieces of its own that a range takes where its file comes in one answer: then no others go ahead of it.
const PIECES_OF_A_WHOLE: usize = 4;
/// Files that are written at the same time, all pulls together. Each has a thread for its writer: with more files than
/// threads, ranges would hold memory for writers that cannot run.
const MAX_OPEN_FILES: usize = 64;
/// Ranges of one file that may wait for its writer; the budget is the real bound.
const MAX_RANGES_IN_FLIGHT: usize = 256;

/// The memory and the connections that all pulls share.
pub(super) struct Budget {
    most_pieces: usize,
    pieces: Arc<Semaphore>,
    connections: Arc<Connections>,
    throughput: Throughput,
    files: Arc<Semaphore>,
    buffers: Buffers,
    /// Holds pieces that nobody is to use now.
    set_aside: Mutex<Option<AbortOnDropHandle<()>>>,
    /// So many for each connection fit in memory.
    short_range_bytes: u64,
    /// Twice as many, and what that leaves over.
    long_range_bytes: u64,
    brisk_bytes_per_second: u64,
}

impl Budget {
    /// `memory_bytes` is rounded down to whole pieces, at least one; `connections` is at least one.
    pub(super) fn new(memory_bytes: u64, connections: usize) -> Budget {
        let pieces = usize::try_from(memory_bytes / PIECE_BYTES as u64).unwrap_or(usize::MAX).clamp(1, 1 << 16);
        let connections = connections.max(1);
        let range = |pieces: usize| (pieces.max(1) as u64 * PIECE_BYTES as u64).min(MAX_RANGE_BYTES);
        Budget {
            most_pieces: pieces,
            pieces: Arc::new(Semaphore::new(pieces)),
            connections: Connections::new(connections),
            throughput: Throughput::default(),
            files: Arc::new(Semaphore::new(MAX_OPEN_FILES)),
            buffers: Buffers::default(),
            set_aside: Mutex::default(),
            short_range_bytes: range(pieces / connections),
            long_range_bytes: range(2 * pieces / connections),
            brisk_bytes_per_second: connections as u64 * BRISK_BYTES_PER_SECOND,
        }
    }

    /// So many bytes came.
    fn came(&self, bytes: usize) {
        if let Some(bytes_per_second) = self.throughput.count(bytes) {
            let few_are_enough = self.connections.adapt(bytes_per_second);
            self.set_some_aside(few_are_enough);
        }
    }

    /// Sets a quarter of the memory aside, or gives it back. A source that gives all on few connections gives more than the
    /// disk takes: whatever memory there is, it fills, and all of that comes again if we are killed.
    fn set_some_aside(&self, wanted: bool) {
        let mut set_aside = self.set_aside.lock().expect("no panic while pieces are set aside");
        let quarter = (self.most_pieces / 4) as u32;
        // What is left must be enough for a file that comes as a whole.
        if !wanted || self.most_pieces - (quarter as usize) < PIECES_OF_A_WHOLE {
            *set_aside = None;
        } else if set_aside.is_none() {
            let pieces = self.pieces.clone();
            *set_aside = Some(AbortOnDropHandle::new(tokio::spawn(async move {
                let _held = pieces.acquire_many(quarter).await;
                std::future::pending::<()>().await;
            })));
        }
    }

    /// How long the next range is.
    fn range_bytes(&self) -> u64 {
        match self.throughput.bytes_per_second() {
            Some(rate) if rate > self.brisk_bytes_per_second => self.long_range_bytes,
            _ => self.short_range_bytes,
        }
    }

    /// What a range takes before it begins; the file comes in parts or as a whole.
    fn own_pieces(&self, in_parts: bool) -> u32 {
        if in_parts { 1 } else { self.most_pieces.min(PIECES_OF_A_WHOLE) as u32 }
    }

    /// Waits for a place among the files that are being written.
    pub(super) async fn file(&self) -> OwnedSemaphorePermit {
        self.files.clone().acquire_owned().await.expect("the budget is never closed")
    }

    /// No pull is left: the buffers go back to the system, and what was learnt of the source is forgotten. Who waited opens and
    /// loads now, so the program stays as it is.
    pub(super) fn rest(&self) {
        self.connections.start_over();
        self.set_some_aside(false);
        self.buffers.give_back();
        heap::trim();
    }

    fn piece(self: &Arc<Self>, permit: OwnedSemaphorePermit, own: Option<Arc<OwnedSemaphorePermit>>) -> Piece {
        Piece { buffer: Some(self.buffers.take()), length: 0, budget: self.clone(), _permit: permit, _own: own }
    }
}

/// Some bytes on their way, and the part of the budget they use.
struct Piece {
    /// Until it is dropped.
    buffer: Option<PagePart>,
    length: usize,
    budget: Arc<Budget>,
    _permit: OwnedSemaphorePermit,
    _own: Option<Arc<OwnedSemaphorePermit>>,
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        &self.buffer.as_ref().expect("the piece is not dropped yet")[..self.length]
    }

    fn is_full(&self) -> bool {
        self.length == PIECE_BYTES
    }

    /// Receives what comes next into what is free of it, and at most so many bytes: how many came.
    async fn fill(&mut self, reader: &mut dyn RangeReader, at_most: u64) -> Result<usize, source::Error> {
        let free = usize::try_from(at_most).unwrap_or(usize::MAX).min(PIECE_BYTES - self.length);
        let buffer = self.buffer.as_mut().expect("the piece is not dropped yet");
        let came = reader.read(&mut buffer[self.length..][..free]).await?;
        self.length += came;
        Ok(came)
    }
}

/// The pieces that a range may fill.
struct Share {
    /// Its own, which come back to it when they have been written.
    own: Arc<Semaphore>,
    /// What they are of the budget: given back when the last of them has been written.
    held: Arc<OwnedSemaphorePermit>,
    /// Whether it may fill others too, as long as there are some.
    goes_ahead: bool,
}

impl Share {
    fn of(held: OwnedSemaphorePermit, goes_ahead: bool) -> Share {
        Share { own: Arc::new(Semaphore::new(held.num_permits())), held: Arc::new(held), goes_ahead }
    }

    async fn piece(&self, budget: &Arc<Budget>) -> Piece {
        tokio::select! {
            biased;
            own = self.own.clone().acquire_owned() => {
                budget.piece(own.expect("a share is never closed"), Some(self.held.clone()))
            }
            other = budget.pieces.clone().acquire_owned(), if self.goes_ahead => {
                budget.piece(other.expect("the budget is never closed"), None)
            }
        }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            self.budget.buffers.put_back(buffer);
        }
    }
}

/// Does what bytes that have come may have to wait for; if they must, `doing` says that this is what the range does.
async fn if_it_waits<T>(stage: Stage, doing: &During, work: impl Future<Output = T>) -> T {
    tokio::pin!(work);
    if let Some(done) = work.as_mut().now_or_never() {
        return done;
    }
    doing.becomes(stage);
    let done = work.await;
    doing.becomes(Stage::Receiving);
    done
}

/// Where a range ends that begins there, after so many of its file were asked for: at the end of a piece, or of the file.
///
/// Where a file has many, the first grow from one piece on. So they end one after another and not all at once, each has half of
/// the next ones in memory and not all of them, and nobody waits for memory. The last shrink, so that connections which find
/// nothing more to ask for do not wait long for the others.
fn end_of_range(start: u64, size: u64, range_bytes: u64, asked_for: u64) -> u64 {
    let mut pieces = range_bytes / PIECE_BYTES as u64;
    if size / range_bytes >= MANY_RANGES {
        let left = (size - start) / PIECE_BYTES as u64;
        pieces = pieces.min(asked_for + 1).min((left / SHARE_OF_THE_REST).max(pieces / 4)).max(1);
    }
    (start / PIECE_BYTES as u64 + pieces).saturating_mul(PIECE_BYTES as u64).min(size)
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
    /// Microseconds that all writers together have hashed, written and made durable.
    hashing_us: AtomicU64,
    writing_us: AtomicU64,
    durable_us: AtomicU64,
}

impl Tally {
    pub(super) fn effort(&self) -> Effort {
        let [fetched_bytes, hashing_us, writing_us, durable_us] =
            [&self.fetched, &self.hashing_us, &self.writing_us, &self.durable_us].map(|n| n.load(Ordering::Relaxed));
        Effort { fetched_bytes, hashing_us, writing_us, durable_us }
    }

    fn spent(&self, time: WriteTime) {
        self.hashing_us.fetch_add(microseconds(time.hashing), Ordering::Relaxed);
        self.writing_us.fetch_add(microseconds(time.writing), Ordering::Relaxed);
    }
}

/// What one transfer needs besides the file.
#[derive(Clone)]
pub(super) struct Transfer {
    pub(super) source: Arc<dyn Source>,
    pub(super) policy: RetryPolicy,
    pub(super) on_wait: OnWait,
    pub(super) on_gate: OnGate,
    pub(super) clock: Arc<Clock>,
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
        let (mut at, mut asked_for) = (start, 0);
        while at < file.size {
            while readers.try_join_next().is_some() {}
            let turn = async {
                let doing = self.clock.during(Stage::Queued);
                let turn = self.demand.turn(&self.urgency).await;
                let connection = budget.connections.acquire().await;
                doing.becomes(Stage::Memory);
                let own = budget.pieces.clone().acquire_many_owned(budget.own_pieces(marked)).await;
                (turn, connection, Share::of(own.expect("the budget is never closed"), marked))
            };
            let (turn, connection, share) = tokio::select! {
                taken = turn => taken,
                // The writer ends early only with an error: there is nobody left to read for.
                ended = &mut writer => return ended.expect("the writer does not panic"),
                () = self.cancelled.cancelled() => break,
            };
            let end = match marked {
                true => end_of_range(at, file.size, budget.range_bytes(), asked_for),
                false => file.size,
            };
            let range = at..end;
            (at, asked_for) = (end, asked_for + 1);
            let (pieces_in, pieces_out) = mpsc::unbounded_channel();
            if ranges_in.send((range.clone(), pieces_out)).await.is_err() {
                break;
            }
            let reader = self.clone().read_range(file.clone(), range, share, (turn, connection), pieces_in);
            readers.spawn(source::telling_of_gates(self.on_gate.clone(), reader));
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
        share: Share,
        may: (Turn, Connection),
        pieces: mpsc::UnboundedSender<Result<Piece, source::Error>>,
    ) {
        let policy = match share.goes_ahead {
            true => self.policy,
            false => RetryPolicy { attempts: 1, ..self.policy },
        };
        let doing = Arc::new(self.clock.during(Stage::Asking));
        let on_wait: OnWait = {
            let (doing, on_wait) = (doing.clone(), self.on_wait);
            Arc::new(move |attempt| {
                // It is asked again after the pause.
                doing.becomes(Stage::Asking);
                on_wait(attempt)
            })
        };
        let mut left = range.end - range.start;
        let mut reader = policy.fetch(self.source, file, range, on_wait);
        while left > 0 {
            let mut piece = if_it_waits(Stage::Memory, &doing, share.piece(&self.budget)).await;
            while left > 0 && !piece.is_full() {
                let came = match piece.fill(&mut *reader, left).await {
                    Ok(came) => came,
                    Err(error) => {
                        // What came before the error is good: the next attempt begins behind it.
                        let good = Some(piece).filter(|piece| piece.length > 0);
                        for message in good.map(Ok).into_iter().chain([Err(error)]) {
                            let _ = pieces.send(message);
                        }
                        return;
                    }
                };
                left -= came as u64;
                doing.becomes(Stage::Receiving);
                self.tally.fetched.fetch_add(came as u64, Ordering::Relaxed);
                if_it_waits(Stage::Queued, &doing, self.demand.has_come(&self.urgency, came as u64)).await;
                self.budget.came(came);
            }
            if pieces.send(Ok(piece)).is_err() {
                return;
            }
        }
        drop(may);
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
        let mut priority = IoPriority::of_this_thread();
        while let Some((range, mut pieces)) = ranges.blocking_recv() {
            while let Some(piece) = pieces.blocking_recv() {
                match piece {
                    Ok(piece) => {
                        priority.give_way(!self.urgency.is_raised());
                        let _doing = self.clock.during(Stage::Writing);
                        ingest.bypass_page_cache(self.caching.bypasses(self.budget.throughput.bytes_per_second()))?;
                        self.tally.spent(ingest.write(piece.bytes())?);
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
        let (_doing, began) = (self.clock.during(Stage::Writing), Instant::now());
        let _commit = self.commits.read().expect("no panic while a commit is under way");
        let blob = ingest.commit().inspect_err(|_| {
            done.fetch_sub(written, Ordering::Relaxed);
        })?;
        self.tally.durable_us.fetch_add(microseconds(began.elapsed()), Ordering::Relaxed);
        adopt(blob);
        Ok(blob)
    }
}

type Pieces = mpsc::UnboundedReceiver<Result<Piece, source::Error>>;

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_range_is_not_empty_and_ends_with_a_piece_or_the_file(
            size in 1u64..1 << 30, at in 0u64..1 << 30, pieces in 1u64..17, asked_for in 0u64..100
        ) {
            let (at, most) = (at.min(size - 1), pieces * PIECE_BYTES as u64);
            let end = end_of_range(at, size, most, asked_for);
            prop_assert!(at < end && end <= size && end - at <= most);
            prop_assert!(end == size || end.is_multiple_of(PIECE_BYTES as u64));
        }

        #[test]
        fn memory_holds_what_a_range_takes_and_short_ranges_on_all_connections(memory in 0u64..1 << 32, connections in 0usize..300) {
            let budget = Budget::new(memory, connections);
            let pieces = budget.pieces.available_permits() as u64;
            prop_assert!(u64::from(budget.own_pieces(false).max(budget.own_pieces(true))) <= pieces);
            let at_once = (connections.max(1) as u64).min(pieces);
            prop_assert!(budget.short_range_bytes / PIECE_BYTES as u64 * at_once <= pieces);
        }
    }

    #[test]
    fn a_brisk_source_is_asked_for_more_at_a_time() {
        let budget = Budget::new(64 << 20, 16);
        assert_eq!(budget.range_bytes(), 4 << 20, "nothing is known of it");
        let (bytes, began) = (16 * BRISK_BYTES_PER_SECOND as usize, std::time::Instant::now());
        budget.throughput.count_at(1, began);
        budget.throughput.count_at(bytes, began + std::time::Duration::from_millis(300));
        assert_eq!(budget.range_bytes(), 8 << 20);
        budget.throughput.count_at(0, began + std::time::Duration::from_millis(600));
        assert_eq!(budget.range_bytes(), 4 << 20);
    }

    #[tokio::test]
    async fn some_memory_is_set_aside_while_few_connections_are_enough() {
        let budget = Arc::new(Budget::new(16 << 20, 16));
        let mut taken = budget.pieces.clone().try_acquire_many_owned(14).unwrap();
        budget.set_some_aside(true);
        budget.set_some_aside(true);
        tokio::task::yield_now().await;
        assert_eq!(budget.pieces.available_permits(), 0, "two are held, and two more are waited for");
        drop(taken.split(10));
        assert_eq!(budget.pieces.available_permits(), 8);
        budget.set_some_aside(false);
        tokio::task::yield_now().await;
        assert_eq!(budget.pieces.available_permits(), 12);

        let small = Arc::new(Budget::new(4 << 20, 16));
        small.set_some_aside(true);
        tokio::task::yield_now().await;
        assert_eq!(small.pieces.available_permits(), 4, "a file that comes as a whole needs them");
    }

    #[test]
    fn the_ranges_of_a_large_file_grow_and_shrink_and_those_of_a_small_one_are_few() {
        let lengths = |mib: u64| {
            let (mut at, mut lengths) = (0, Vec::new());
            while at < mib << 20 {
                let end = end_of_range(at, mib << 20, 8 << 20, lengths.len() as u64);
                lengths.push((end - at) >> 20);
                at = end;
            }
            lengths
        };
        assert_eq!(lengths(8), [8]);
        assert_eq!(lengths(100), [[8; 12].as_slice(), &[4]].concat());
        let large = lengths(1000);
        assert_eq!(
            (&large[..9], &large[large.len() - 6..]),
            (&[1, 2, 3, 4, 5, 6, 7, 8, 8][..], &[3, 2, 2, 2, 2, 1][..])
        );
        assert!(large[8..large.len() - 12].iter().all(|length| *length == 8), "{large:?}");
    }

    #[tokio::test]
    async fn a_range_goes_ahead_with_what_is_left_and_always_with_its_own() {
        let budget = Arc::new(Budget::new(4 << 20, 2));
        assert_eq!((budget.range_bytes(), budget.own_pieces(true), budget.own_pieces(false)), (2 << 20, 1, 4));
        let own = budget.pieces.clone().try_acquire_many_owned(1).unwrap();
        let share = Share::of(own, true);
        let mut taken = Vec::new();
        for left in [3, 2, 1, 0] {
            taken.push(share.piece(&budget).await);
            assert_eq!(budget.pieces.available_permits(), left);
        }
        assert!(share.piece(&budget).now_or_never().is_none(), "all are taken");
        // Its own has been written, and comes back to it, not to others.
        taken.remove(0);
        assert_eq!(budget.pieces.available_permits(), 0);
        taken.push(share.piece(&budget).await);
        drop(share);
        assert_eq!(budget.pieces.available_permits(), 0);
        drop(taken);
        assert_eq!(budget.pieces.available_permits(), 4);
    }

    #[tokio::test]
    async fn what_comes_as_a_whole_leaves_the_rest_to_others() {
        let budget = Arc::new(Budget::new(8 << 20, 2));
        let own = budget.pieces.clone().try_acquire_many_owned(budget.own_pieces(false)).unwrap();
        let share = Share::of(own, false);
        let _taken = [(); PIECES_OF_A_WHOLE].map(|()| share.piece(&budget).now_or_never().unwrap());
        assert!(share.piece(&budget).now_or_never().is_none());
        assert_eq!(budget.pieces.available_permits(), 4);
        assert_eq!(Budget::new(0, 0).own_pieces(false), 1, "a budget is never less than what one range takes");
    }

    #[test]
    fn ranges_near_the_end_of_numbers_do_not_overflow() {
        assert_eq!(end_of_range(u64::MAX - 5, u64::MAX, 1 << 22, 9), u64::MAX);
    }
}

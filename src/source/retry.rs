//! [`RetryPolicy`]: asks again, and resumes broken streams at the byte where they broke.

use std::sync::Arc;

use tokio::time::{Instant, sleep, timeout};

use super::*;

/// One failed attempt, and when the next is made.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// How many have failed in a row, this one included.
    pub number: u32,
    /// Why this one failed.
    pub error: Error,
    /// How long until the next.
    pub wait: Duration,
}

/// Told before each pause. What it returns is held until the pause is over.
pub type OnWait = Arc<dyn Fn(&Attempt) -> Box<dyn Send> + Send + Sync>;

/// How often a source is asked again, and how patiently.
#[derive(Debug, Clone)]
pub struct RetryPolicy {
    /// Most attempts without progress, the first included. A stream may fail [`RetryPolicy::STREAM_BUDGET`] times as
    /// often if it brings a little each time.
    pub attempts: u32,
    /// Longest first pause; doubles with each attempt. Each pause is a random part of it.
    pub first_wait: Duration,
    /// Longest pause that the source did not ask for.
    pub max_wait: Duration,
    /// Longest time in which a stream may bring fewer than [`RetryPolicy::MIN_STALL_BYTES`].
    pub stall_timeout: Duration,
}

impl Default for RetryPolicy {
    fn default() -> RetryPolicy {
        RetryPolicy {
            attempts: 6,
            first_wait: Duration::from_millis(500),
            max_wait: Duration::from_secs(30),
            stall_timeout: SourceConfig::default().stall_timeout,
        }
    }
}

/// What a stream knows between two of its pieces.
struct Resumed {
    policy: RetryPolicy,
    source: Arc<dyn Source>,
    file: ListedFile,
    /// Where the next byte belongs.
    next: u64,
    range: Range<u64>,
    on_wait: OnWait,
    open: Option<Box<dyn RangeReader>>,
    /// Failures since the last byte.
    failures: u32,
    /// Failures that brought fewer than [`RetryPolicy::MIN_PROGRESS_BYTES`].
    meagre_failures: u32,
    /// Bytes since the last failure.
    progress: u64,
    /// Time waited for bytes, and bytes that came, since the last moment at which the stream was fast enough.
    waited: Duration,
    brought: u64,
}

impl RetryPolicy {
    /// A stream that fails more than `attempts` times this often, and brings less than
    /// [`RetryPolicy::MIN_PROGRESS_BYTES`] each time, ends: a byte for each connection is no progress.
    pub const STREAM_BUDGET: u32 = 8;
    /// A failure after at least so many bytes (1 MiB) costs nothing of the stream's budget.
    pub const MIN_PROGRESS_BYTES: u64 = 1 << 20;
    /// A stream that brings fewer bytes than this (4 KiB) in `stall_timeout` has stalled.
    pub const MIN_STALL_BYTES: u64 = 4096;

    /// Resolves, with retries.
    pub async fn resolve(&self, source: &dyn Source, on_wait: &OnWait) -> Result<Listing, Error> {
        let mut failures = 0;
        loop {
            let error = match source.resolve().await {
                Ok(listing) => return Ok(listing),
                Err(error) => error,
            };
            failures += 1;
            let Some(wait) = self.pause(&error, failures).filter(|_| failures < self.attempts) else {
                return Err(error);
            };
            let _pause = on_wait(&Attempt { number: failures, error, wait });
            sleep(wait).await;
        }
    }

    /// The bytes of `range`, resumed where a stream broke or stalled. Ends with the first error that retries cannot mend.
    pub fn fetch(
        &self,
        source: Arc<dyn Source>,
        file: ListedFile,
        range: Range<u64>,
        on_wait: OnWait,
    ) -> Box<dyn RangeReader> {
        Box::new(Resumed {
            policy: self.clone(),
            source,
            file,
            next: range.start,
            range,
            on_wait,
            open: None,
            failures: 0,
            meagre_failures: 0,
            progress: 0,
            waited: Duration::ZERO,
            brought: 0,
        })
    }

    /// How long to wait after so many failures in a row; `None` if asking again is useless.
    pub fn pause(&self, error: &Error, failures: u32) -> Option<Duration> {
        let doubled = self.first_wait.saturating_mul(1 << (failures - 1).min(20));
        // A random part of it, so that those who failed together do not come back together.
        let backoff = doubled.min(self.max_wait).mul_f64(fastrand::f64());
        match error.retry() {
            Retry::Never => None,
            Retry::Backoff => Some(backoff),
            // Never earlier than asked; "0" still backs off.
            Retry::After(asked) => Some(asked.mul_f64(1.0 + fastrand::f64() / 10.0).max(backoff)),
        }
    }
}

#[async_trait]
impl RangeReader for Resumed {
    async fn read(&mut self, into: &mut [u8]) -> Result<usize, Error> {
        while self.next < self.range.end {
            let error = match self.try_read(into).await {
                Ok(came) => return Ok(came),
                Err(error) => error,
            };
            let Some(attempt) = self.failed(error.clone()) else {
                self.next = self.range.end;
                return Err(error);
            };
            let _pause = (self.on_wait)(&attempt);
            sleep(attempt.wait).await;
        }
        Ok(0)
    }
}

impl Resumed {
    /// The next bytes of the range: at least one, and nothing but the range.
    async fn try_read(&mut self, into: &mut [u8]) -> Result<usize, Error> {
        let expected = self.range.end - self.range.start;
        let what = || self.file.path.to_string();
        let reader = match &mut self.open {
            Some(reader) => reader,
            None => {
                (self.waited, self.brought) = (Duration::ZERO, 0);
                self.open.insert(self.source.fetch(&self.file, self.next..self.range.end).await?)
            }
        };
        // Only waiting counts: a slow reader of ours is no stall of theirs.
        let stall_timeout = self.policy.stall_timeout;
        let began = Instant::now();
        let read = timeout(stall_timeout.saturating_sub(self.waited), reader.read(into)).await;
        self.waited += began.elapsed();
        let came = match read {
            Err(_) => return Err(Error::Stalled { what: what(), seconds: stall_timeout.as_secs() }),
            Ok(Ok(0)) => {
                let got = self.next - self.range.start;
                return Err(Error::Truncated { what: what(), expected, got });
            }
            Ok(came) => came?,
        };
        let length = came as u64;
        if length > self.range.end - self.next {
            return Err(Error::Overlong { what: what(), expected });
        }
        self.next += length;
        self.progress += length;
        self.brought += length;
        self.failures = 0;
        if self.brought >= RetryPolicy::MIN_STALL_BYTES {
            (self.waited, self.brought) = (Duration::ZERO, 0);
        }
        Ok(came)
    }

    /// Drops the broken stream; the next attempt, unless there is none.
    fn failed(&mut self, error: Error) -> Option<Attempt> {
        self.open = None;
        self.failures += 1;
        if self.progress < RetryPolicy::MIN_PROGRESS_BYTES {
            self.meagre_failures += 1;
        }
        self.progress = 0;
        let attempts = self.policy.attempts;
        if self.failures >= attempts || self.meagre_failures >= attempts.saturating_mul(RetryPolicy::STREAM_BUDGET) {
            return None;
        }
        let wait = self.policy.pause(&error, self.failures)?;
        Some(Attempt { number: self.failures, error, wait })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::collections::VecDeque;
    use std::sync::Mutex;

    use futures::{StreamExt, stream};

    use super::super::reader::collect;
    use crate::model::{ListingBuilder, RelPath};

    /// What one call does.
    enum Turn {
        /// Gives so many bytes, then ends with the error, or as if the connection were closed.
        Give(u64, Option<Error>),
        /// Gives so many bytes, then nothing more.
        Hang(u64),
        /// Gives a byte each time this passes.
        Drip(Duration),
        Refuse(Error),
    }

    #[derive(Default)]
    struct Scripted {
        turns: Mutex<VecDeque<Turn>>,
        asked: Mutex<Vec<Range<u64>>>,
    }

    /// The byte at a place of the file.
    fn byte(at: u64) -> u8 {
        (at % 251) as u8
    }

    fn piece(range: Range<u64>) -> Result<Bytes, Error> {
        Ok(range.map(byte).collect::<Vec<_>>().into())
    }

    #[async_trait]
    impl Source for Scripted {
        async fn resolve(&self) -> Result<Listing, Error> {
            self.asked.lock().unwrap().push(0..0);
            match self.turns.lock().unwrap().pop_front() {
                Some(Turn::Refuse(error)) => Err(error),
                _ => Ok(ListingBuilder::new().finish_by_content().unwrap()),
            }
        }

        async fn fetch(&self, _: &ListedFile, range: Range<u64>) -> Result<Box<dyn RangeReader>, Error> {
            self.asked.lock().unwrap().push(range.clone());
            let some = |bytes: u64| range.start..range.end.min(range.start + bytes);
            let turn = self.turns.lock().unwrap().pop_front();
            Ok(match turn {
                None => Pieces::of(stream::iter([piece(range)])),
                Some(Turn::Refuse(error)) => return Err(error),
                Some(Turn::Give(bytes, None)) => Pieces::of(stream::iter([piece(some(bytes))])),
                Some(Turn::Give(bytes, Some(e))) => Pieces::of(stream::iter([piece(some(bytes)), Err(e)])),
                Some(Turn::Hang(bytes)) => Pieces::of(stream::iter([piece(some(bytes))]).chain(stream::pending())),
                Some(Turn::Drip(pause)) => Pieces::of(stream::iter(range).then(move |at| async move {
                    sleep(pause).await;
                    piece(at..at + 1)
                })),
            })
        }
    }

    const POLICY: RetryPolicy = RetryPolicy {
        attempts: 4,
        first_wait: Duration::from_millis(100),
        max_wait: Duration::from_secs(1),
        stall_timeout: Duration::from_secs(30),
    };

    fn server_error() -> Error {
        Error::Server { what: "x".into(), host: "h".into(), status: 502 }
    }

    fn changed() -> Error {
        Error::Changed { what: "x".into(), began: "a".into(), now: "b".into() }
    }

    struct Outcome {
        bytes: Result<Vec<u8>, Error>,
        asked: Vec<Range<u64>>,
        waits: Vec<Attempt>,
    }

    async fn fetch(range: Range<u64>, turns: impl IntoIterator<Item = Turn>) -> Outcome {
        let source = Arc::new(Scripted { turns: Mutex::new(turns.into_iter().collect()), asked: Mutex::default() });
        let waits = Arc::new(Mutex::new(Vec::new()));
        let told = waits.clone();
        let on_wait: OnWait = Arc::new(move |attempt| {
            told.lock().unwrap().push(attempt.clone());
            Box::new(())
        });
        let path = RelPath::new("weights").unwrap();
        let file = ListedFile { path, size: range.end, checksum: None, pin: None, locator: String::new() };
        let bytes = collect(POLICY.fetch(source.clone(), file, range, on_wait)).await;
        let (asked, waits) = (source.asked.lock().unwrap().clone(), waits.lock().unwrap().clone());
        Outcome { bytes, asked, waits }
    }

    #[tokio::test(start_paused = true)]
    async fn a_broken_stream_is_resumed_at_the_byte_where_it_broke() {
        let turns = [Turn::Give(10, None), Turn::Give(5, Some(server_error())), Turn::Refuse(server_error())];
        let outcome = fetch(100..200, turns).await;
        assert_eq!(outcome.bytes.unwrap(), (100..200).map(byte).collect::<Vec<_>>());
        assert_eq!(outcome.asked, [100..200, 110..200, 115..200, 115..200]);
        assert_eq!(
            outcome.waits.iter().map(|a| a.number).collect::<Vec<_>>(),
            [1, 1, 2],
            "progress begins a new count"
        );
        assert!(matches!(outcome.waits[0].error, Error::Truncated { expected: 100, got: 10, .. }));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_stalls_is_dropped_and_resumed() {
        let began = Instant::now();
        let outcome = fetch(0..100, [Turn::Hang(7)]).await;
        assert_eq!(outcome.bytes.unwrap().len(), 100);
        assert_eq!(outcome.asked, [0..100, 7..100]);
        assert!(matches!(outcome.waits[0].error, Error::Stalled { seconds: 30, .. }), "{:?}", outcome.waits);
        assert!(began.elapsed() >= POLICY.stall_timeout);
    }

    #[tokio::test(start_paused = true)]
    async fn a_drip_is_a_stall() {
        let outcome = fetch(0..100_000, [Turn::Drip(Duration::from_secs(10))]).await;
        assert_eq!(outcome.bytes.unwrap().len(), 100_000);
        assert_eq!(outcome.asked.len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_is_no_stall() {
        let source = Arc::new(Scripted::default());
        source.turns.lock().unwrap().push_back(Turn::Drip(Duration::from_millis(1)));
        let path = RelPath::new("weights").unwrap();
        let file = ListedFile { path, size: 10, checksum: None, pin: None, locator: String::new() };
        let mut reader = POLICY.fetch(source.clone(), file, 0..10, Arc::new(|_| Box::new(())));
        while reader.read(&mut [0; 16]).await.unwrap() > 0 {
            sleep(POLICY.stall_timeout * 2).await;
        }
        assert_eq!(source.asked.lock().unwrap().len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn attempts_without_progress_are_counted_and_end() {
        let outcome = fetch(0..10, std::iter::repeat_with(|| Turn::Refuse(server_error())).take(20)).await;
        assert_eq!(outcome.bytes.unwrap_err(), server_error());
        assert_eq!((outcome.asked.len(), outcome.waits.len()), (4, 3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_byte_for_each_connection_ends_too() {
        let outcome = fetch(0..1000, std::iter::repeat_with(|| Turn::Give(1, None)).take(1000)).await;
        assert!(matches!(outcome.bytes, Err(Error::Truncated { .. })));
        assert_eq!(outcome.asked.len() as u32, POLICY.attempts * RetryPolicy::STREAM_BUDGET);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_brings_much_each_time_may_break_as_often_as_it_likes() {
        let step = RetryPolicy::MIN_PROGRESS_BYTES;
        let outcome = fetch(0..step * 40, std::iter::repeat_with(|| Turn::Give(step, None)).take(40)).await;
        assert_eq!(outcome.bytes.unwrap().len() as u64, step * 40);
    }

    #[tokio::test(start_paused = true)]
    async fn what_retries_cannot_mend_passes_at_once() {
        let missing = Error::FileNotFound { what: "x".into() };
        for error in [changed(), missing, Error::AuthMissing { what: "x".into(), action: String::new() }] {
            let outcome = fetch(0..10, [Turn::Give(3, Some(error.clone()))]).await;
            assert_eq!(outcome.bytes.unwrap_err(), error);
            assert_eq!((outcome.asked.len(), outcome.waits.len()), (1, 0));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_gives_too_much_never_passes_it_on() {
        struct Generous;
        #[async_trait]
        impl Source for Generous {
            async fn resolve(&self) -> Result<Listing, Error> {
                Err(changed())
            }

            async fn fetch(&self, _: &ListedFile, range: Range<u64>) -> Result<Box<dyn RangeReader>, Error> {
                Ok(Pieces::of(stream::iter([piece(range.start..range.end + 1)])))
            }
        }
        let path = RelPath::new("weights").unwrap();
        let file = ListedFile { path, size: 10, checksum: None, pin: None, locator: String::new() };
        let mut reader = POLICY.fetch(Arc::new(Generous), file, 0..10, Arc::new(|_| Box::new(())));
        let mut block = [0; 16];
        assert!(matches!(reader.read(&mut block).await, Err(Error::Overlong { expected: 10, .. })));
        assert_eq!(reader.read(&mut block).await, Ok(0));
    }

    #[tokio::test(start_paused = true)]
    async fn a_source_that_names_a_time_is_not_asked_before_it() {
        let limited = |seconds| {
            let retry_after = Some(Duration::from_secs(seconds));
            Turn::Refuse(Error::RateLimited { what: "x".into(), host: "h".into(), retry_after })
        };
        let began = Instant::now();
        let outcome = fetch(0..10, [limited(120), limited(0)]).await;
        assert_eq!(outcome.bytes.unwrap().len(), 10);
        let waits: Vec<_> = outcome.waits.iter().map(|attempt| attempt.wait.as_secs_f64()).collect();
        assert!((120.0..=132.0).contains(&waits[0]), "the time, and at most a tenth more: {waits:?}");
        assert!(waits[1] <= 0.2, "{waits:?}");
        assert!(began.elapsed() >= Duration::from_secs(120));
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_and_are_bounded() {
        for failures in 1..100 {
            let wait = POLICY.pause(&server_error(), failures).unwrap();
            let most = (POLICY.first_wait * 2u32.pow((failures - 1).min(10))).min(POLICY.max_wait);
            assert!(wait <= most, "{wait:?} after {failures} failures");
        }
        let longest = (0..200).map(|_| POLICY.pause(&server_error(), 10).unwrap()).max().unwrap();
        assert!(longest > POLICY.first_wait, "{longest:?}: the pauses do not grow");
    }

    #[tokio::test(start_paused = true)]
    async fn a_listing_is_asked_for_again_too() {
        let refusals = |n: usize| std::iter::repeat_with(|| Turn::Refuse(server_error())).take(n).collect();
        let quiet: OnWait = Arc::new(|_| Box::new(()));
        let source = Scripted { turns: Mutex::new(refusals(3)), asked: Mutex::default() };
        POLICY.resolve(&source, &quiet).await.unwrap();
        let source = Scripted { turns: Mutex::new(refusals(9)), asked: Mutex::default() };
        assert_eq!(POLICY.resolve(&source, &quiet).await.unwrap_err(), server_error());
        assert_eq!(source.asked.lock().unwrap().len(), 4);
        let source = Scripted { turns: Mutex::new([Turn::Refuse(changed())].into()), asked: Mutex::default() };
        assert_eq!(POLICY.resolve(&source, &quiet).await.unwrap_err(), changed());
    }
}

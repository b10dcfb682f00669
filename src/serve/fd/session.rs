//! [`Session`]: one connection as requests. What it has open, it holds leases on; they end with it.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::line::{Line, Over};
use super::{Frames, encoded, error_frame, is_exhausted};
use crate::cache::{self, Lease, OpenModel, PullHandle};
use crate::fault::{Code, Problem};
use crate::model::{ManifestFile, ModelRef, Scheme};
use crate::store;
use crate::wire::frame::{self, Answer, BadFrame, MAX_BATCH_FILES, OpenFiles, OpenedFiles, PROTOCOL, Request};
use crate::wire::http::{LeaseInfo, ModelFile, Phase, PullStatus};

/// Most models that one connection has open.
const MAX_OPEN_MODELS: usize = 64;

/// Shortest time between two frames of progress: about five a second are enough for an eye.
const PROGRESS_GAP: Duration = Duration::from_millis(200);

/// Longest time between two frames of progress, so that a daemon that is gone can be told from a slow source.
const PROGRESS_EVERY: Duration = Duration::from_secs(10);

/// The first pause when no descriptor is left; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// The longest such pause; after it the request is refused. With those before it, about five seconds.
const LAST_PAUSE: Duration = Duration::from_millis(2560);

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Asker {
    /// Whoever may open the node's own socket, and so may do all.
    Node,
    /// A pod. What it has pulled is fetched with the node's eyes and credentials.
    Pod,
}

/// One connection. It is closed before its leases end: the fields are dropped in this order.
pub(super) struct Session {
    line: Line,
    asker: Asker,
    process: String,
    frames: Frames,
    open: Vec<Open>,
    pending: Option<Pending>,
}

/// A model that is open.
struct Open {
    lease: Lease,
    info: LeaseInfo,
}

/// Files that the client has yet to ask for.
struct Pending {
    lease: String,
    files: Arc<[ManifestFile]>,
    sent: usize,
    descriptors: bool,
}

/// Why a request is not answered as it was asked.
enum Stop {
    /// The connection ends.
    Over(Over),
    /// It is told why, and may ask again.
    Refused(Problem),
}

impl From<Over> for Stop {
    fn from(over: Over) -> Stop {
        Stop::Over(over)
    }
}

impl From<Problem> for Stop {
    fn from(problem: Problem) -> Stop {
        Stop::Refused(problem)
    }
}

impl From<cache::Error> for Stop {
    fn from(error: cache::Error) -> Stop {
        Stop::Refused(match &error {
            // Wherever in an open the last descriptor was missed: it is the limit that is to be told, not a disk.
            cache::Error::Store(store::Error::Disk { source, .. }) if is_exhausted(source) => none_left(source),
            _ => error.into(),
        })
    }
}

fn none_left(error: &io::Error) -> Problem {
    Problem::new(
        Code::TooManyHolders,
        format!("cannot hand out files: {error}"),
        "ask again soon; if it stays so, raise the daemon's limit of open files (`ulimit -n`)",
    )
}

impl Session {
    pub(super) fn new(stream: UnixStream, seen: Vec<u8>, asker: Asker, frames: Frames) -> Session {
        let line = Line::new(stream, seen);
        Session { process: line.process(), line, asker, frames, open: Vec::new(), pending: None }
    }

    /// Answers requests until the connection ends.
    pub(super) async fn run(mut self) {
        let over = loop {
            match self.next().await {
                Ok(()) => {}
                Err(Stop::Refused(problem)) => {
                    let (code, error) = (problem.code.text(), problem.message.as_str());
                    tracing::info!(process = self.process, code, error, "refused");
                    if let Err(over) = self.line.send(&error_frame(&problem)).await {
                        break over;
                    }
                }
                Err(Stop::Over(over)) => break over,
            }
        };
        tracing::debug!(process = self.process, %over, "a connection of frames ends");
        if let Some(problem) = last_word(&over) {
            // It ends whether this is read or not.
            let _ = self.line.finish(&error_frame(&problem)).await;
        }
    }

    async fn next(&mut self) -> Result<(), Stop> {
        let shutdown = self.frames.0.shutdown.clone();
        let json = tokio::select! {
            json = self.line.request() => json?,
            () = shutdown.cancelled() => return Err(Over::Draining.into()),
        };
        match understood(&json)? {
            Request::Open(asked) => self.open(*asked).await,
            Request::More {} => self.send_batch(Vec::new()).await,
            Request::Release { lease } => self.release(lease).await,
        }
    }

    async fn open(&mut self, asked: OpenFiles) -> Result<(), Stop> {
        // What was not asked for up to now will not be.
        self.pending = None;
        if self.open.len() >= MAX_OPEN_MODELS {
            return Err(Stop::Refused(Problem::new(
                Code::TooManyHolders,
                format!("cannot open one more model: {MAX_OPEN_MODELS} models are open on this connection"),
                "release some of its leases, or open another connection",
            )));
        }
        let descriptors = asked.descriptors;
        let answer = match self.frames.0.cache.open_files_at_once(&asked, &self.process) {
            Some(opened) => self.holds(opened, descriptors),
            None => {
                // On the heap: what can wait for a pull is large, and most opens do not.
                let opened = Box::pin(self.opened(Arc::new(asked))).await?;
                self.holds(opened, descriptors)
            }
        };
        self.send_batch(answer).await
    }

    /// From now on the connection has a model open; what is said of it.
    fn holds(&mut self, opened: OpenModel, descriptors: bool) -> Vec<u8> {
        let answer = encoded(&Answer::Opened(Box::new(OpenedFiles {
            path_below_public: opened.path_below_public,
            files: opened.files.len() as u64,
            bytes: opened.files.iter().map(|file| file.size).sum(),
            lease: opened.lease_info.clone(),
            lasting_lease: opened.lasting_lease,
            descriptors: self.frames.0.cache.descriptors().to_owned(),
            model: opened.model,
        })));
        self.pending = Some(Pending { lease: opened.lease_info.id.clone(), files: opened.files, sent: 0, descriptors });
        self.open.push(Open { lease: opened.lease, info: opened.lease_info });
        answer
    }

    /// Opens what is local; pulls what is not, if the client wants to wait for it.
    async fn opened(&mut self, asked: Arc<OpenFiles>) -> Result<OpenModel, Stop> {
        match self.try_open(&asked).await {
            Err(Stop::Refused(problem)) if asked.wait && is_absent(&problem) => {}
            answer => return answer,
        }
        let reference = ModelRef::parse_with(&asked.reference, &asked.include, &asked.exclude);
        let reference = reference.map_err(cache::Error::from)?;
        if self.asker == Asker::Pod {
            pods_may_pull(&reference)?;
        }
        if let Some(pull) = self.frames.0.cache.pull_unless_local(&reference)? {
            self.watch(pull).await?;
            return self.try_open(&asked).await;
        }
        match self.try_open(&asked).await {
            // It has a name, but not this version, or not its directory: only the source can give those.
            Err(Stop::Refused(problem)) if is_absent(&problem) => {
                let pull = self.frames.0.cache.pull(&reference)?;
                self.watch(pull).await?;
                self.try_open(&asked).await
            }
            answer => answer,
        }
    }

    /// What the last descriptor was missed for is tried again: they come back when batches have been sent.
    async fn try_open(&self, asked: &Arc<OpenFiles>) -> Result<OpenModel, Stop> {
        let mut pause = FIRST_PAUSE;
        loop {
            let (cache, asked, process) = (self.frames.0.cache.clone(), asked.clone(), self.process.clone());
            match blocking(move || cache.open_files(&asked, &process)).await? {
                Err(cache::Error::Store(store::Error::Disk { source, .. }))
                    if is_exhausted(&source) && pause <= LAST_PAUSE =>
                {
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                opened => return Ok(opened?),
            }
        }
    }

    /// Tells how a pull stands until it is ready. Notices when nobody waits any more.
    async fn watch(&mut self, mut pull: PullHandle) -> Result<(), Stop> {
        let shutdown = self.frames.0.shutdown.clone();
        loop {
            let status = pull.status.borrow_and_update().clone();
            match (status.phase, &status.error) {
                (Phase::Ready, _) => return Ok(()),
                (_, Some(error)) => return Err(Stop::Refused(Problem::from(error))),
                (Phase::Cancelled | Phase::Failed, None) => return Err(cache::Error::Cancelled.into()),
                _ => {}
            }
            self.say(&Answer::Progress { pull: Box::new(status) }).await?;
            tokio::select! {
                () = changed(&mut pull.status) => {}
                over = self.line.interruption() => return Err(over.into()),
                () = shutdown.cancelled() => return Err(cache::Error::Draining.into()),
            }
        }
    }

    /// Sends the next files of what was opened last, after what is said before them. All of it at once, so that who waits for
    /// it wakes up once: a message of its own for what is said before would wake him, and have him wait again.
    async fn send_batch(&mut self, mut bytes: Vec<u8>) -> Result<(), Stop> {
        let Some(mut pending) = self.pending.take() else {
            return Err(Stop::Refused(Problem::new(
                Code::BadRequest,
                "cannot send more files: all of them were sent, or nothing was opened",
                "send `more` only while fewer files have come than `opened` says",
            )));
        };
        let batch: Vec<ManifestFile> = pending.files.iter().skip(pending.sent).take(MAX_BATCH_FILES).cloned().collect();
        if batch.is_empty() {
            return Ok(self.line.send(&bytes).await?);
        }
        pending.sent += batch.len();
        bytes.extend(encoded(&Answer::Files {
            files: batch.iter().map(told).collect(),
            descriptors: if pending.descriptors { batch.len() } else { 0 },
        }));
        let sent = match pending.descriptors {
            true => self.hand_over(&bytes, Arc::new(batch)).await,
            false => Ok(0),
        };
        match sent {
            Ok(sent) => self.line.send(&bytes[sent..]).await?,
            Err(stop) => {
                // A model some of whose files cannot be had is not open.
                self.open.retain(|open| open.info.id != pending.lease);
                return Err(stop);
            }
        }
        self.pending = (pending.sent < pending.files.len()).then_some(pending);
        Ok(())
    }

    /// Opens the files of a batch and sends them with the first bytes of what is said; how many bytes went with them. The files
    /// are open here only while they are sent.
    async fn hand_over(&self, bytes: &[u8], batch: Arc<Vec<ManifestFile>>) -> Result<usize, Stop> {
        let mut pause = FIRST_PAUSE;
        loop {
            // Before a turn is taken: who does not read must not keep others waiting.
            self.line.writable().await?;
            let turn = self.frames.0.batches.acquire().await.expect("the semaphore is never closed");
            let sent = match self.files_of(&batch).await? {
                Ok(files) => self.line.try_send_files(bytes, &files),
                Err(none_left) => Err(none_left),
            };
            drop(turn);
            match sent {
                Ok(sent) => return Ok(sent),
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(e) if e.kind() == ErrorKind::BrokenPipe => return Err(Over::Gone.into()),
                Err(e) if is_exhausted(&e) && pause <= LAST_PAUSE => {
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                Err(e) if is_exhausted(&e) => return Err(Stop::Refused(none_left(&e))),
                Err(e) => return Err(Over::Broken(e).into()),
            }
        }
    }

    /// The files, each opened for this client alone; or why no descriptor is left for them.
    async fn files_of(&self, batch: &Arc<Vec<ManifestFile>>) -> Result<io::Result<Vec<File>>, Stop> {
        if let Some(files) = self.frames.0.cache.descriptors_at_once(batch) {
            return Ok(Ok(files));
        }
        let (cache, batch) = (self.frames.0.cache.clone(), batch.clone());
        let files = blocking(move || batch.iter().map(|file| cache.descriptor(file)).collect::<Result<Vec<_>, _>>());
        match files.await? {
            Ok(files) => Ok(Ok(files)),
            Err(cache::Error::Store(store::Error::Disk { source, .. })) if is_exhausted(&source) => Ok(Err(source)),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends a lease of this connection, or one that outlives its connection.
    async fn release(&mut self, id: String) -> Result<(), Stop> {
        let info = match self.open.iter().position(|open| open.info.id == id) {
            Some(at) => {
                let Open { lease, info } = self.open.swap_remove(at);
                drop(lease);
                self.pending.take_if(|pending| pending.lease == id);
                info
            }
            None => {
                let cache = self.frames.0.cache.clone();
                blocking(move || cache.release(&id)).await??
            }
        };
        self.say(&Answer::Released { lease: Box::new(info) }).await
    }

    async fn say(&self, answer: &Answer) -> Result<(), Stop> {
        Ok(self.line.send(&encoded(answer)).await?)
    }
}

/// Reads a request. One of another protocol may have fields we do not know, so then it is its number that is told.
fn understood(json: &[u8]) -> Result<Request, Stop> {
    #[derive(Deserialize)]
    struct Numbered {
        protocol: Option<u32>,
    }
    let request = frame::decode(json);
    let protocol = match &request {
        Ok(Request::Open(asked)) => Some(asked.protocol),
        Ok(Request::More {} | Request::Release { .. }) => None,
        Err(_) => frame::decode::<Numbered>(json).ok().and_then(|numbered| numbered.protocol),
    };
    match protocol {
        Some(protocol) if protocol != PROTOCOL => Err(Stop::Refused(Problem::new(
            Code::BadRequest,
            format!("cannot answer a request of protocol {protocol}: this larder speaks protocol {PROTOCOL}"),
            "use a client of the same version as the daemon (`larder --version`)",
        ))),
        _ => Ok(request.map_err(Over::Bad)?),
    }
}

/// What is said before a connection is closed, if the other side has not ended it.
fn last_word(over: &Over) -> Option<Problem> {
    match over {
        Over::Gone | Over::Stalled | Over::Draining | Over::Broken(_) => None,
        Over::Bad(BadFrame::Unreadable { .. }) => Some(Problem::new(
            Code::BadRequest,
            over.to_string(),
            "correct the request; docs/protocol.md has its fields",
        )),
        Over::Bad(_) => {
            Some(Problem::new(Code::BadRequest, over.to_string(), "send frames as docs/protocol.md has them"))
        }
        Over::OutOfTurn | Over::Late => Some(Problem::new(
            Code::BadRequest,
            format!("cannot go on with this connection: {over}"),
            "send a request at once and whole, and wait for its answer",
        )),
    }
}

/// Refuses what would let a pod see with the node's eyes what it cannot see with its own: the node's disk, and the services
/// a cloud offers to a node over plain HTTP. What somebody else has pulled, it may open all the same.
fn pods_may_pull(reference: &ModelRef) -> Result<(), Problem> {
    let reads = match reference.scheme() {
        Scheme::File => "the node's own disk",
        Scheme::Http => "what the node reaches without encryption, such as its cloud's metadata",
        Scheme::Hf | Scheme::S3 | Scheme::Gs | Scheme::Az | Scheme::Https => return Ok(()),
    };
    Err(Problem::new(
        Code::PolicyDenied,
        format!("cannot pull `{reference}` for a pod: `{}://` reads {reads}", reference.scheme().text()),
        format!("have it pulled on the node (`larder pull '{reference}'`, or `pull.pinned`): then pods can open it"),
    ))
}

/// Whether a pull could help.
fn is_absent(problem: &Problem) -> bool {
    matches!(problem.code, Code::NotLocal | Code::NotReady)
}

fn told(file: &ManifestFile) -> ModelFile {
    ModelFile { path: file.path.to_string(), digest: file.digest.to_string(), size: file.size }
}

/// Waits for news that are worth a frame: a change, but not at once after the last one; the end, at once; or that it is
/// time to say that we are still there.
async fn changed(status: &mut watch::Receiver<PullStatus>) {
    let change = async {
        // On a clone: waiting marks what it sees as seen.
        let mut ending = status.clone();
        let _ = tokio::time::timeout(PROGRESS_GAP, ending.wait_for(|pull| pull.phase.is_final())).await;
        if status.changed().await.is_err() {
            // Forgotten while it ran: the registry is going away, and the connection with it.
            std::future::pending::<()>().await;
        }
    };
    let _ = tokio::time::timeout(PROGRESS_EVERY, change).await;
}

/// Does on a blocking thread what touches the disk.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Stop> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => Ok(result),
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        Err(_) => Err(Over::Draining.into()),
    }
}

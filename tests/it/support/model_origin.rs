//! A web server of models that counts each byte it sends, and stops, changes and lies when told to.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};

use larder::model::Digest;
use tokio::net::TcpListener;
use tokio::sync::watch;

use super::raw_http::{Answer, Asked, Connection, sha256};

/// Bytes that are given, counted and held back at a time.
const STEP_BYTES: u64 = 16 << 10;

/// Serves directories, each with its `larder.json`.
pub(crate) struct ModelOrigin {
    port: u16,
    state: Arc<State>,
}

struct State {
    inner: Mutex<Inner>,
    /// How much may still be sent.
    limit: watch::Sender<Limit>,
    /// Bytes of files that were sent.
    sent: watch::Sender<u64>,
    /// Connections on which something is held back.
    held: watch::Sender<usize>,
}

/// What is held back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Limit {
    Nothing,
    /// Everything but the ranges that begin here.
    From(u64),
    /// All bytes of files beyond so many.
    After(u64),
    /// Listings, and nothing else.
    Listings,
}

struct Inner {
    models: BTreeMap<String, Model>,
    /// Bytes sent of each file, by model and path.
    sent: HashMap<(String, String), u64>,
    /// Ranges of files that were asked for, in order.
    /// After so many bytes of files, put this file in place of the one that is there.
    changes: VecDeque<(u64, String, String, Vec<u8>)>,
    /// Refuses everything, and asks to come back after so many seconds.
    busy: Option<u64>,
}

#[derive(Default)]
struct Model {
    files: BTreeMap<String, Vec<u8>>,
    /// What is served in place of the right bytes.
    lies: BTreeMap<String, Vec<u8>>,
    listing: Option<String>,
    marks: Marks,
}

/// By what the files of a model can be recognised.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Marks {
    /// A checksum in the listing and an ETag.
    #[default]
    Checksums,
    /// An ETag.
    Etags,
    /// A checksum in the listing.
    OnlyChecksums,
    /// Nothing but the size.
    Nothing,
}

impl ModelOrigin {
    /// Starts without a model.
    pub(crate) async fn start() -> ModelOrigin {
        let inner = Inner { models: BTreeMap::new(), sent: HashMap::new(), changes: VecDeque::new(), busy: None };
        let (limit, sent) = (watch::Sender::new(Limit::Nothing), watch::Sender::new(0));
        let state = Arc::new(State { inner: Mutex::new(inner), limit, sent, held: watch::Sender::new(0) });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let origin = ModelOrigin { port, state: state.clone() };
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let state = state.clone();
                tokio::spawn(async move {
                    let mut connection = Connection::new(stream);
                    while let Some(asked) = connection.next().await {
                        if !state.serve(&mut connection, &asked).await {
                            return;
                        }
                    }
                });
            }
        });
        origin
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.state.inner.lock().unwrap()
    }

    /// The reference to a model.
    pub(crate) fn reference(&self, model: &str) -> String {
        format!("http://127.0.0.1:{}/{model}/", self.port)
    }

    /// Puts a file into a model.
    pub(crate) fn put(&self, model: &str, path: &str, bytes: &[u8]) {
        self.lock().models.entry(model.into()).or_default().files.insert(path.into(), bytes.into());
    }

    /// Says by what the files of a model can be recognised.
    pub(crate) fn mark(&self, model: &str, marks: Marks) {
        self.lock().models.entry(model.into()).or_default().marks = marks;
    }

    /// Serves these bytes in place of the right ones, or the right ones again.
    pub(crate) fn lie(&self, model: &str, path: &str, bytes: Option<&[u8]>) {
        let mut inner = self.lock();
        let lies = &mut inner.models.get_mut(model).unwrap().lies;
        match bytes {
            Some(bytes) => lies.insert(path.into(), bytes.into()),
            None => lies.remove(path),
        };
    }

    /// Serves this in place of the right listing.
    pub(crate) fn list(&self, model: &str, listing: String) {
        self.lock().models.entry(model.into()).or_default().listing = Some(listing);
    }

    /// When so many bytes of files were sent, the file is another one.
    pub(crate) fn change_after(&self, sent_bytes: u64, model: &str, path: &str, bytes: &[u8]) {
        self.lock().changes.push_back((sent_bytes, model.into(), path.into(), bytes.into()));
    }

    /// Nothing changes any more.
    pub(crate) fn stays_as_it_is(&self) {
        self.lock().changes.clear();
    }

    /// Sends so many bytes of files in all, and holds the rest back.
    pub(crate) fn hold_after(&self, bytes: u64) {
        self.state.limit.send_replace(Limit::After(bytes));
    }

    /// Holds the ranges back that begin at this offset of their file.
    pub(crate) fn hold_ranges_from(&self, offset: u64) {
        self.state.limit.send_replace(Limit::From(offset));
    }

    /// Holds listings back.
    pub(crate) fn hold_listings(&self) {
        self.state.limit.send_replace(Limit::Listings);
    }

    /// Refuses everything from now on, and asks to come back after so many seconds.
    pub(crate) fn is_busy_for(&self, seconds: u64) {
        self.lock().busy = Some(seconds);
    }

    /// Holds nothing back.
    pub(crate) fn let_go(&self) {
        self.state.limit.send_replace(Limit::Nothing);
    }

    /// Waits until somebody waits for what is held back.
    pub(crate) async fn is_waited_for(&self) {
        self.state.held.subscribe().wait_for(|held| *held > 0).await.unwrap();
    }

    /// How many wait for what is held back, as soon as it is so many.
    pub(crate) async fn has_waiting(&self, least: usize) -> usize {
        *self.state.held.subscribe().wait_for(|held| *held >= least).await.unwrap()
    }

    /// Waits until nobody waits for what is held back.
    pub(crate) async fn is_left(&self) {
        self.state.held.subscribe().wait_for(|held| *held == 0).await.unwrap();
    }

    /// Waits until so many bytes of files were sent.
    pub(crate) async fn has_sent(&self, bytes: u64) {
        self.state.sent.subscribe().wait_for(|sent| *sent >= bytes).await.unwrap();
    }

    /// Bytes of files that were sent.
    pub(crate) fn sent_bytes(&self) -> u64 {
        *self.state.sent.borrow()
    }

    /// Bytes that were sent of one file.
    pub(crate) fn sent_of(&self, model: &str, path: &str) -> u64 {
        self.lock().sent.get(&(model.into(), path.into())).copied().unwrap_or(0)
    }
}

impl State {
    /// False when the client is gone.
    async fn serve(&self, connection: &mut Connection, asked: &Asked) -> bool {
        let busy = self.inner.lock().unwrap().busy;
        if let Some(seconds) = busy {
            let refusal = Answer::new(503, &[("Retry-After", &seconds.to_string())], "busy");
            return connection.answer(asked, refusal).await;
        }
        let found = self.inner.lock().unwrap().answer(asked);
        let Some((model, path, answer)) = found else {
            return connection.answer(asked, Answer::new(404, &[], "not here")).await;
        };
        if path == "larder.json" && !self.is_let_go(connection).await {
            return false;
        }
        if path == "larder.json" || asked.method == "HEAD" || answer.status >= 300 {
            return connection.answer(asked, answer).await;
        }
        let start = asked.header("range").and_then(|r| r.strip_prefix("bytes=")?.split('-').next()?.parse().ok());
        let start: u64 = start.unwrap_or(0);
        if !connection.write(answer.head(answer.body.len())).await {
            return false;
        }
        let mut limit = self.limit.subscribe();
        for step in answer.body.chunks(STEP_BYTES as usize) {
            while !self.count(start, step.len(), &model, &path) {
                self.held.send_modify(|held| *held += 1);
                let is_there = tokio::select! {
                    changed = limit.changed() => changed.is_ok(),
                    () = connection.stall() => false,
                };
                self.held.send_modify(|held| *held -= 1);
                if !is_there {
                    return false;
                }
            }
            if !connection.write(step).await {
                return false;
            }
        }
        true
    }

    /// Waits until listings are not held back. False when the client is gone.
    async fn is_let_go(&self, connection: &mut Connection) -> bool {
        let mut limit = self.limit.subscribe();
        if *limit.borrow_and_update() != Limit::Listings {
            return true;
        }
        self.held.send_modify(|held| *held += 1);
        let is_there = tokio::select! {
            let_go = limit.wait_for(|limit| *limit != Limit::Listings) => let_go.is_ok(),
            () = connection.stall() => false,
        };
        self.held.send_modify(|held| *held -= 1);
        is_there
    }

    fn allows(&self, limit: Limit, start: u64, step: usize) -> bool {
        match limit {
            Limit::Nothing | Limit::Listings => true,
            Limit::From(offset) => start != offset,
            Limit::After(bytes) => *self.sent.borrow() + step as u64 <= bytes,
        }
    }

    /// Takes these bytes out of what is allowed, if nobody else has.
    fn count(&self, start: u64, step: usize, model: &str, path: &str) -> bool {
        let mut inner = self.inner.lock().unwrap();
        let limit = *self.limit.borrow();
        if !self.allows(limit, start, step) {
            return false;
        }
        *inner.sent.entry((model.into(), path.into())).or_default() += step as u64;
        let sent = *self.sent.borrow() + step as u64;
        if inner.changes.front().is_some_and(|(after, ..)| sent >= *after)
            && let Some((_, model, path, bytes)) = inner.changes.pop_front()
        {
            inner.models.get_mut(&model).unwrap().files.insert(path, bytes);
        }
        self.sent.send_replace(sent);
        true
    }
}

impl Inner {
    fn answer(&self, asked: &Asked) -> Option<(String, String, Answer)> {
        let (model, path) = asked.path.strip_prefix('/')?.split_once('/')?;
        let found = self.models.get(model)?;
        let answer = if path == "larder.json" {
            Answer::new(200, &[], found.listing.clone().unwrap_or_else(|| found.listing()))
        } else {
            let bytes = found.lies.get(path).or_else(|| found.files.get(path))?;
            let mut answer = Answer::file(asked, bytes, &format!("\"{}\"", Digest::of(&found.files[path]).short()));
            if matches!(found.marks, Marks::OnlyChecksums | Marks::Nothing) {
                answer.headers.retain(|(name, _)| name != "ETag");
            }
            answer
        };
        Some((model.into(), path.into(), answer))
    }
}

impl Model {
    fn listing(&self) -> String {
        let files = self.files.iter().map(|(path, bytes)| {
            let mut entry = serde_json::json!({"path": path, "size": bytes.len()});
            if matches!(self.marks, Marks::Checksums | Marks::OnlyChecksums) {
                entry["sha256"] = sha256(bytes).into();
            }
            entry
        });
        serde_json::json!({"files": files.collect::<Vec<_>>()}).to_string()
    }
}

//! The door from the other side: what the command line and the tests ask a running daemon with.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use futures::stream::BoxStream;
use futures::{StreamExt, stream};
use reqwest::{Method, RequestBuilder, Response, StatusCode, header};
use serde::de::DeserializeOwned;
use url::Url;

use crate::fault::{Code, Problem};
use crate::wire::http::{
    EvictRequest, Evicted, EvictionInfo, EvictionList, EvictionPlan, LeaseInfo, LeaseList, ModelDetail, ModelInfo,
    ModelList, OpenRequest, Opened, PinInfo, PinList, PinRequest, ProblemBody, PullList, PullRequest, PullStatus,
    Readiness, Removed, ScrubList, ScrubRequest, ScrubStatus, Start, StartList, WarmList, WarmRequest, WarmStatus,
};

/// Longest time for one answer. A removal of a large model is the slowest.
const ANSWER_SECONDS: u64 = 120;

/// Longest time without a byte while a pull is followed: four comments of the daemon.
const SILENCE_SECONDS: u64 = 60;

/// Longest time to learn whether a daemon is there.
const PROBE_SECONDS: u64 = 2;

/// Largest answer that is read into memory: the files of the largest model.
const MAX_ANSWER_BYTES: usize = 256 * 1024 * 1024;

/// Longest line of an event stream.
const MAX_LINE_BYTES: usize = 1024 * 1024;

/// Asks one daemon. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    base: Url,
    /// What is asked, as errors name it.
    place: String,
}

impl Client {
    /// Asks on a Unix socket. Nothing is connected yet.
    pub fn new(socket: &Path) -> Client {
        let base = Url::parse("http://localhost/").expect("a constant URL");
        Client::build(reqwest::Client::builder().unix_socket(socket), base, socket.display().to_string())
    }

    /// Asks on a Unix socket that leads to a daemon elsewhere, which errors call `place`. Nothing is connected yet.
    pub fn leading_to(place: &str, socket: &Path) -> Client {
        Client { place: place.to_owned(), ..Client::new(socket) }
    }

    /// Asks on TCP, at `http://host:port/`.
    pub fn tcp(base: &Url) -> Client {
        Client::build(reqwest::Client::builder(), base.clone(), base.to_string())
    }

    fn build(builder: reqwest::ClientBuilder, base: Url, place: String) -> Client {
        // A daemon is on this machine: neither proxies nor certificates of the system are for it.
        let builder = builder.no_proxy().tls_certs_only([]).redirect(reqwest::redirect::Policy::none());
        // Shorter than the daemon keeps an idle connection, so that it is never closed under a request.
        let builder = builder.pool_idle_timeout(Duration::from_secs(10));
        let http =
            builder.build().expect("a client without proxies and certificates reads nothing that could be wrong");
        Client { http, base, place }
    }

    /// Whether a daemon answers. The pods' socket refuses HTTP, and so does a daemon.
    pub async fn reachable(&self) -> bool {
        let probe = self.request(Method::GET, &["livez"]).timeout(Duration::from_secs(PROBE_SECONDS));
        probe.send().await.is_ok_and(|answer| matches!(answer.status(), StatusCode::OK | StatusCode::FORBIDDEN))
    }

    /// Whether the daemon is ready, and if not, why.
    pub async fn readiness(&self) -> Result<Readiness, Problem> {
        let answer = self.send(self.request(Method::GET, &["readyz"])).await?;
        match answer.status() {
            StatusCode::OK | StatusCode::SERVICE_UNAVAILABLE => self.read(answer).await,
            _ => Err(self.refusal(answer).await),
        }
    }

    /// Asks for a pull, or joins it.
    pub async fn pull(&self, request: &PullRequest) -> Result<PullStatus, Problem> {
        self.ask(self.request(Method::POST, &["v1", "pulls"]).json(request)).await
    }

    /// The pulls the daemon remembers, newest first.
    pub async fn pulls(&self) -> Result<Vec<PullStatus>, Problem> {
        Ok(self.ask::<PullList>(self.request(Method::GET, &["v1", "pulls"])).await?.pulls)
    }

    /// A pull as it stands now.
    pub async fn pull_status(&self, id: &str) -> Result<PullStatus, Problem> {
        self.ask(self.request(Method::GET, &["v1", "pulls", id])).await
    }

    /// Follows a pull: its status now, at each change, and at its end. The stream ends after a final status; if the
    /// daemon goes away before, it ends with a problem.
    pub async fn watch(&self, id: &str) -> Result<BoxStream<'static, Result<PullStatus, Problem>>, Problem> {
        let request = self.request(Method::GET, &["v1", "pulls", id]).header(header::ACCEPT, "text/event-stream");
        // Not the request's own time limit: that one would end the stream too.
        let head = tokio::time::timeout(Duration::from_secs(ANSWER_SECONDS), request.send()).await;
        let head = head.map_err(|_| self.unreachable(&format!("no answer within {ANSWER_SECONDS} s")))?;
        let answer = self.transport(head)?;
        if answer.status() != StatusCode::OK {
            return Err(self.refusal(answer).await);
        }
        Ok(self.follow(id.to_owned(), answer.bytes_stream().map(|piece| piece.map_err(|e| cause(&e))).boxed()))
    }

    /// Takes a pull back.
    pub async fn cancel(&self, id: &str) -> Result<PullStatus, Problem> {
        self.ask(self.request(Method::DELETE, &["v1", "pulls", id])).await
    }

    /// The directory of a model that is local.
    pub async fn open(&self, request: &OpenRequest) -> Result<Opened, Problem> {
        self.ask(self.request(Method::POST, &["v1", "opens"]).json(request)).await
    }

    /// The models that are local and whole.
    pub async fn models(&self) -> Result<Vec<ModelInfo>, Problem> {
        Ok(self.ask::<ModelList>(self.request(Method::GET, &["v1", "models"])).await?.models)
    }

    /// The same, each with how much of it is in the page cache.
    pub async fn models_with_residency(&self) -> Result<Vec<ModelInfo>, Problem> {
        let request = self.request(Method::GET, &["v1", "models"]).query(&[("resident", true)]);
        Ok(self.ask::<ModelList>(request).await?.models)
    }

    /// A model with its files, by id or by reference.
    pub async fn model(&self, name: &str) -> Result<ModelDetail, Problem> {
        self.ask(self.request(Method::GET, &["v1", "models", name])).await
    }

    /// What the last start of a model has cost, by reference or by id; or why it is not here.
    pub async fn last_start(&self, name: &str) -> Result<Start, Problem> {
        let request = self.request(Method::GET, &["v1", "starts"]).query(&[("model", name)]);
        let mut starts = self.ask::<StartList>(request).await?.starts;
        starts.pop().ok_or_else(|| self.strange("it answered without a start"))
    }

    /// The same for each model that a pod (`NAMESPACE/NAME`) leases, or has leased while that is remembered.
    pub async fn last_starts_of_pod(&self, pod: &str) -> Result<Vec<Start>, Problem> {
        let request = self.request(Method::GET, &["v1", "starts"]).query(&[("pod", pod)]);
        Ok(self.ask::<StartList>(request).await?.starts)
    }

    /// The leases, oldest first.
    pub async fn leases(&self) -> Result<Vec<LeaseInfo>, Problem> {
        Ok(self.ask::<LeaseList>(self.request(Method::GET, &["v1", "leases"])).await?.leases)
    }

    /// Releases a lease that is not a connection.
    pub async fn release(&self, id: &str) -> Result<LeaseInfo, Problem> {
        self.ask(self.request(Method::DELETE, &["v1", "leases", id])).await
    }

    /// Pins a reference; the daemon pulls it if it is not local.
    pub async fn pin(&self, request: &PinRequest) -> Result<PinInfo, Problem> {
        self.ask(self.request(Method::POST, &["v1", "pins"]).json(request)).await
    }

    /// The pins, by reference.
    pub async fn pins(&self) -> Result<Vec<PinInfo>, Problem> {
        Ok(self.ask::<PinList>(self.request(Method::GET, &["v1", "pins"])).await?.pins)
    }

    /// Unpins a reference.
    pub async fn unpin(&self, reference: &str) -> Result<PinInfo, Problem> {
        self.ask(self.request(Method::DELETE, &["v1", "pins", reference])).await
    }

    /// Removes a model by id, or all versions of a reference.
    pub async fn remove(&self, name: &str) -> Result<Removed, Problem> {
        self.ask(self.request(Method::DELETE, &["v1", "models", name])).await
    }

    /// Asks for a scrub, or joins the one that somebody has asked for.
    pub async fn scrub(&self, request: &ScrubRequest) -> Result<ScrubStatus, Problem> {
        self.ask(self.request(Method::POST, &["v1", "scrubs"]).json(request)).await
    }

    /// The scrubs the daemon remembers, newest first.
    pub async fn scrubs(&self) -> Result<Vec<ScrubStatus>, Problem> {
        Ok(self.ask::<ScrubList>(self.request(Method::GET, &["v1", "scrubs"])).await?.scrubs)
    }

    /// A scrub as it stands now.
    pub async fn scrub_status(&self, id: &str) -> Result<ScrubStatus, Problem> {
        self.ask(self.request(Method::GET, &["v1", "scrubs", id])).await
    }

    /// Stops a scrub.
    pub async fn cancel_scrub(&self, id: &str) -> Result<ScrubStatus, Problem> {
        self.ask(self.request(Method::DELETE, &["v1", "scrubs", id])).await
    }

    /// What would be evicted for so many bytes.
    pub async fn eviction_plan(&self, need_bytes: u64) -> Result<EvictionPlan, Problem> {
        let request = self.request(Method::GET, &["v1", "evictions", "plan"]);
        self.ask(request.query(&[("need", need_bytes)])).await
    }

    /// Makes so many bytes fit.
    pub async fn evict(&self, need_bytes: u64) -> Result<Evicted, Problem> {
        self.ask(self.request(Method::POST, &["v1", "evictions"]).json(&EvictRequest { need_bytes })).await
    }

    /// What was evicted, newest first.
    pub async fn evictions(&self) -> Result<Vec<EvictionInfo>, Problem> {
        Ok(self.ask::<EvictionList>(self.request(Method::GET, &["v1", "evictions"])).await?.evictions)
    }

    /// Asks for a warm-up, or joins it.
    pub async fn warm(&self, request: &WarmRequest) -> Result<WarmStatus, Problem> {
        self.ask(self.request(Method::POST, &["v1", "warms"]).json(request)).await
    }

    /// The warm-ups the daemon remembers, newest first.
    pub async fn warms(&self) -> Result<Vec<WarmStatus>, Problem> {
        Ok(self.ask::<WarmList>(self.request(Method::GET, &["v1", "warms"])).await?.warms)
    }

    /// A warm-up as it stands now.
    pub async fn warm_status(&self, id: &str) -> Result<WarmStatus, Problem> {
        self.ask(self.request(Method::GET, &["v1", "warms", id])).await
    }

    /// Stops a warm-up.
    pub async fn cancel_warm(&self, id: &str) -> Result<WarmStatus, Problem> {
        self.ask(self.request(Method::DELETE, &["v1", "warms", id])).await
    }

    fn request(&self, method: Method, path: &[&str]) -> RequestBuilder {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            // Percent-encodes each: a reference is one segment.
            segments.clear().extend(path);
        }
        self.http.request(method, url)
    }

    async fn ask<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, Problem> {
        let answer = self.send(request).await?;
        match answer.status().is_success() {
            true => self.read(answer).await,
            false => Err(self.refusal(answer).await),
        }
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, Problem> {
        self.transport(request.timeout(Duration::from_secs(ANSWER_SECONDS)).send().await)
    }

    async fn read<T: DeserializeOwned>(&self, answer: Response) -> Result<T, Problem> {
        let body = self.body(answer, MAX_ANSWER_BYTES).await?;
        serde_json::from_slice(&body).map_err(|e| self.strange(&format!("its answer cannot be read: {e}")))
    }

    /// What an answer that is not a success says.
    async fn refusal(&self, answer: Response) -> Problem {
        let status = answer.status();
        match self.body(answer, MAX_LINE_BYTES).await {
            Err(problem) => problem,
            Ok(body) => match serde_json::from_slice::<ProblemBody>(&body) {
                Ok(body) => Problem::from(&body),
                Err(_) => self.strange(&format!("it answered {status} without a problem")),
            },
        }
    }

    async fn body(&self, answer: Response, most: usize) -> Result<Vec<u8>, Problem> {
        let mut body = Vec::new();
        let mut pieces = answer.bytes_stream();
        while let Some(piece) = pieces.next().await {
            let piece = self.transport(piece)?;
            if body.len() + piece.len() > most {
                return Err(self.strange(&format!("its answer is larger than {most} bytes")));
            }
            body.extend_from_slice(&piece);
        }
        Ok(body)
    }

    fn transport<T>(&self, result: reqwest::Result<T>) -> Result<T, Problem> {
        result.map_err(|e| self.unreachable(&cause(&e)))
    }

    fn unreachable(&self, why: &str) -> Problem {
        Problem {
            code: Code::DaemonUnreachable,
            message: format!("cannot reach the daemon on `{}`: {why}", self.place),
            action: "start it with `larder serve`, or set LARDER_SOCKET".to_owned(),
            retry_after_seconds: None,
        }
    }

    fn strange(&self, what: &str) -> Problem {
        Problem {
            code: Code::InternalError,
            message: format!("cannot understand what answers on `{}`: {what}", self.place),
            action: "check that it is a larder, of the same version as this one (`larder --version`)".to_owned(),
            retry_after_seconds: None,
        }
    }

    fn follow(
        &self,
        id: String,
        pieces: BoxStream<'static, Result<bytes::Bytes, String>>,
    ) -> BoxStream<'static, Result<PullStatus, Problem>> {
        struct Following {
            client: Client,
            id: String,
            pieces: BoxStream<'static, Result<bytes::Bytes, String>>,
            parser: EventParser,
            over: bool,
        }
        impl Following {
            fn fail(mut self, problem: Problem) -> Option<(Result<PullStatus, Problem>, Following)> {
                self.over = true;
                Some((Err(problem), self))
            }
        }
        let begin = Following { client: self.clone(), id, pieces, parser: EventParser::default(), over: false };
        stream::unfold(begin, |mut at| async move {
            loop {
                if at.over {
                    return None;
                }
                while let Some(event) = at.parser.next() {
                    match event.name.as_str() {
                        "end" => return None,
                        "status" => match serde_json::from_str::<PullStatus>(&event.data) {
                            Ok(pull) => {
                                at.over = pull.phase.is_final();
                                return Some((Ok(pull), at));
                            }
                            Err(e) => {
                                let problem = at.client.strange(&format!("an event cannot be read: {e}"));
                                return at.fail(problem);
                            }
                        },
                        _ => {}
                    }
                }
                let silence = Duration::from_secs(SILENCE_SECONDS);
                let why = match tokio::time::timeout(silence, at.pieces.next()).await {
                    Ok(Some(Ok(piece))) => match at.parser.feed(&piece) {
                        Ok(()) => continue,
                        Err(TooLong) => {
                            let problem = at.client.strange("a line of its events is too long");
                            return at.fail(problem);
                        }
                    },
                    Ok(Some(Err(e))) => e,
                    Ok(None) => "it ended the stream".to_owned(),
                    Err(_) => format!("nothing came for {SILENCE_SECONDS} s"),
                };
                let mut problem = at.client.unreachable(&why);
                problem.message = format!("cannot follow pull `{}`: {}", at.id, problem.message);
                problem.action =
                    "start it with `larder serve` if it has stopped: the pull then goes on by itself".into();
                return at.fail(problem);
            }
        })
        .boxed()
    }
}

/// The innermost cause: `Connection refused`, not the layers around it.
fn cause(error: &reqwest::Error) -> String {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(inner) = innermost.source() {
        innermost = inner;
    }
    innermost.to_string()
}

#[derive(Debug, PartialEq, Eq)]
struct Event {
    name: String,
    data: String,
}

#[derive(Debug, PartialEq, Eq)]
struct TooLong;

/// Reads an event stream as the HTML standard defines it, without ids, `retry` and lines ended by a lone CR: the daemon
/// sends none.
#[derive(Default)]
struct EventParser {
    line: Vec<u8>,
    name: String,
    data: Vec<String>,
    ready: VecDeque<Event>,
}

impl EventParser {
    fn feed(&mut self, bytes: &[u8]) -> Result<(), TooLong> {
        for part in bytes.split_inclusive(|b| *b == b'\n') {
            let held: usize = self.line.len() + self.data.iter().map(String::len).sum::<usize>();
            if held + part.len() > MAX_LINE_BYTES {
                return Err(TooLong);
            }
            self.line.extend_from_slice(part);
            if self.line.last() == Some(&b'\n') {
                let line = std::mem::take(&mut self.line);
                self.take(String::from_utf8_lossy(&line).trim_end_matches(['\n', '\r']));
            }
        }
        Ok(())
    }

    fn take(&mut self, line: &str) {
        if line.is_empty() {
            let (name, data) = (std::mem::take(&mut self.name), std::mem::take(&mut self.data));
            if !data.is_empty() {
                self.ready.push_back(Event { name, data: data.join("\n") });
            }
            return;
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => self.name = value.to_owned(),
            "data" => self.data.push(value.to_owned()),
            _ => {}
        }
    }

    fn next(&mut self) -> Option<Event> {
        self.ready.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn events(pieces: &[&[u8]]) -> Vec<(String, String)> {
        let mut parser = EventParser::default();
        for piece in pieces {
            parser.feed(piece).unwrap();
        }
        std::iter::from_fn(|| parser.next()).map(|e| (e.name, e.data)).collect()
    }

    fn event(name: &str, data: &str) -> (String, String) {
        (name.to_owned(), data.to_owned())
    }

    #[test]
    fn events_are_read_however_the_bytes_are_cut() {
        let text =
            ": hello\n\nevent: status\ndata: {\"a\":\ndata: \"\u{e9}\"}\n\nevent: end\r\ndata:{}\r\n\r\n".as_bytes();
        let expected = [event("status", "{\"a\":\n\"\u{e9}\"}"), event("end", "{}")];
        assert_eq!(events(&[text]), expected);
        let bytes: Vec<&[u8]> = text.chunks(1).collect();
        assert_eq!(events(&bytes), expected);
    }

    #[test]
    fn an_event_that_is_not_finished_is_not_told() {
        assert_eq!(events(&[b"event: status\ndata: {}\n"]), []);
        assert_eq!(events(&[b"event: status\n\n"]), []);
    }

    #[test]
    fn an_endless_line_and_endless_data_are_refused() {
        let mut parser = EventParser::default();
        let piece = vec![b'x'; MAX_LINE_BYTES / 2];
        parser.feed(&piece).unwrap();
        assert_eq!(parser.feed(&vec![b'x'; MAX_LINE_BYTES]), Err(TooLong));

        let mut parser = EventParser::default();
        let line = [b"data: ".as_slice(), &piece, b"\n"].concat();
        parser.feed(&line).unwrap();
        assert_eq!(parser.feed(&line).and_then(|()| parser.feed(&line)), Err(TooLong));
    }

    fn status(phase: &str) -> String {
        let pull = serde_json::json!({
            "id": "1", "reference": "file:///m", "phase": phase, "files_done": 0, "files_total": 0, "bytes_done": 0,
            "bytes_total": 0, "bytes_fetched": 0, "percent": 0, "bytes_per_second": 0,
            "started_at": "2026-01-01T00:00:00Z", "asked": 1,
        });
        format!("event: status\ndata: {pull}\n\n")
    }

    async fn followed(pieces: Vec<Result<&'static str, &'static str>>, texts: &[String]) -> Vec<Result<String, Code>> {
        let client = Client::new(Path::new("/nowhere/larder.sock"));
        let pieces = pieces.into_iter().map(|p| p.map(Into::into).map_err(str::to_owned));
        let texts: Vec<_> = texts.iter().map(|t| Ok(bytes::Bytes::from(t.clone()))).collect();
        let all = client.follow("1".to_owned(), stream::iter(texts.into_iter().chain(pieces)).boxed());
        all.map(|r| r.map(|p| p.phase.text().to_owned()).map_err(|p| p.code)).collect().await
    }

    #[tokio::test]
    async fn following_ends_after_a_final_status() {
        let seen = followed(vec![Err("never read")], &[status("fetching"), status("ready")]).await;
        assert_eq!(seen, [Ok("fetching".to_owned()), Ok("ready".to_owned())]);
    }

    #[tokio::test]
    async fn a_daemon_that_goes_away_is_told_once() {
        let seen = followed(vec![], &[status("fetching")]).await;
        assert_eq!(seen, [Ok("fetching".to_owned()), Err(Code::DaemonUnreachable)]);
        let seen = followed(vec![Err("connection reset"), Ok("data: x\n\n")], &[]).await;
        assert_eq!(seen, [Err(Code::DaemonUnreachable)]);
    }

    #[tokio::test]
    async fn a_strange_event_is_an_error_of_ours() {
        let seen = followed(vec![Ok("event: news\ndata: 1\n\n"), Ok("event: status\ndata: 1\n\n")], &[]).await;
        assert_eq!(seen, [Err(Code::InternalError)]);
    }

    #[tokio::test]
    async fn nobody_on_the_socket_says_how_to_start_one() {
        let dir = tempfile::tempdir().unwrap();
        let client = Client::new(&dir.path().join("larder.sock"));
        assert!(!client.reachable().await);
        let problem = client.models().await.unwrap_err();
        assert_eq!(problem.code, Code::DaemonUnreachable);
        assert!(problem.action.contains("larder serve"), "{}", problem.action);
        assert!(problem.message.contains("larder.sock`: No such file"), "{}", problem.message);
    }

    #[test]
    fn a_reference_is_one_segment_of_the_path() {
        let client = Client::new(Path::new("/x"));
        let request = client.request(Method::GET, &["v1", "models", "hf://o/n@main#include=a%2Fb"]).build().unwrap();
        assert_eq!(request.url().path(), "/v1/models/hf:%2F%2Fo%2Fn@main%23include=a%252Fb");
    }
}

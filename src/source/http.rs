//! Our own HTTP requests: redirects, ranges and answers are checked here, for every source that speaks HTTP itself.
//!
//! A [`Client`] follows redirects itself, because a credential must not travel to another origin, not even on the way
//! back. [`Client::open_range`] gives exactly the bytes of a range or an error. The [`HostGate`] holds back every request
//! to a host that has said when it may be asked again.

mod direct;
mod range;
mod redirect;

use std::sync::Arc;

use hyper_util::client::proxy::matcher::Matcher;
use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Method, StatusCode};
use tokio::time::{Instant, timeout, timeout_at};
use url::Url;

use super::gate::{asked_to_wait, authority};
use super::*;
use redirect::{redirect_target, without_sensitive};

pub(super) use direct::{Answer, BoxError, DirectBody, DirectClient};
pub use range::Body;
pub(super) use redirect::permitted;
pub use redirect::{MAX_LOCATION_BYTES, MAX_REDIRECTS};

/// How much of an error body is read to quote it, in bytes.
const MAX_QUOTED_BODY_BYTES: usize = 4096;
/// How much of a source's words an error quotes, in characters.
const MAX_QUOTED_CHARS: usize = 200;

/// Sends requests. Cheap to clone: clones share connections and the [`HostGate`].
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    /// For the bytes of files.
    direct: Arc<DirectClient>,
    gate: Arc<HostGate>,
    /// Longest wait for the head of an answer.
    answer_timeout: Duration,
    /// Longest wait for the next bytes of a body that is read whole.
    stall_timeout: Duration,
}

/// Who asks.
const USER_AGENT: &str = concat!("larder/", env!("CARGO_PKG_VERSION"));

/// How long a connection that nobody uses is kept for the next request. It may keep buffers, some 400 KB, so not for long.
pub const IDLE_CONNECTION: Duration = Duration::from_secs(10);

/// What authenticates a request. Goes only to the origin (scheme, host and port) of [`Request::url`].
#[derive(Clone)]
pub struct Credential {
    /// The whole `Authorization` value.
    value: HeaderValue,
    /// Where it was found (a variable, a file), for errors.
    origin: String,
}

impl Credential {
    /// `Authorization: Bearer <token>`; `origin` says where the token was found. `None` if it cannot be a header.
    pub fn bearer(token: &str, origin: &str) -> Option<Credential> {
        let mut value = HeaderValue::from_str(&format!("Bearer {token}")).ok()?;
        value.set_sensitive(true);
        Some(Credential { value, origin: origin.to_owned() })
    }
}

/// Which redirects are followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Follow {
    /// All that lead to a permitted place.
    All,
    /// Only those that stay on the origin; the first other one is given back as the [`Response`].
    SameOrigin,
}

/// What a 404 means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Missing {
    /// [`Error::RepoNotFound`]
    Repo,
    /// [`Error::FileNotFound`]
    File,
}

/// One request. No `Debug`: the URL may be signed.
#[derive(Clone)]
pub struct Request {
    /// Where to. Must have no user.
    pub url: Url,
    /// GET or HEAD.
    pub method: Method,
    /// Sent on every hop, but those marked sensitive only to the origin of `url`.
    pub headers: HeaderMap,
    /// Whether a credential may travel over plain http is the caller's decision.
    pub credential: Option<Credential>,
    /// The bytes that are asked for; not empty.
    pub range: Option<Range<u64>>,
    /// Which redirects are followed.
    pub follow: Follow,
    /// What is asked for, for errors: a reference or a file of one, never a signed URL.
    pub what: String,
    /// What a 404 means.
    pub missing: Missing,
    /// The action of [`Error::AuthMissing`]: how to configure a credential for this kind of source.
    pub sign_in: String,
}

impl Request {
    /// A GET that follows all redirects and to which a 404 means [`Missing::Repo`].
    pub fn get(url: Url, what: impl Into<String>) -> Request {
        Request {
            url,
            method: Method::GET,
            headers: HeaderMap::new(),
            credential: None,
            range: None,
            follow: Follow::All,
            what: what.into(),
            missing: Missing::Repo,
            sign_in: String::new(),
        }
    }

    /// The same as a HEAD.
    pub fn head(url: Url, what: impl Into<String>) -> Request {
        Request { method: Method::HEAD, ..Request::get(url, what) }
    }
}

/// The head of an answer, and its body still to be read.
pub struct Response {
    /// Without the body, if that is direct.
    inner: reqwest::Response,
    direct: Option<Box<DirectBody>>,
    url: Url,
    /// The checked target of a redirect that was not followed.
    redirect: Option<Url>,
    what: String,
    missing: Missing,
    credential_origin: Option<String>,
    sign_in: String,
    stall_timeout: Duration,
}

impl Client {
    /// Sets up the connections. Proxies come from HTTPS_PROXY, HTTP_PROXY and NO_PROXY, a private CA from SSL_CERT_FILE.
    pub fn new(config: &SourceConfig) -> Result<Client, Error> {
        let http = builder(config.connect_timeout)
            .pool_idle_timeout(IDLE_CONNECTION)
            .build()
            .map_err(|e| Error::Misconfigured { what: "https://".into(), detail: deepest(&e) })?;
        Ok(Client {
            http,
            direct: Arc::new(DirectClient::new(config.connect_timeout, Vec::new(), Arc::new(Matcher::from_env()))),
            gate: Arc::default(),
            answer_timeout: config.connect_timeout + config.stall_timeout,
            stall_timeout: config.stall_timeout,
        })
    }

    /// The gate that all clones share.
    pub fn gate(&self) -> Arc<HostGate> {
        self.gate.clone()
    }

    /// Sends the request and follows redirects. 408, 429 and 5xx are errors; every other status is an answer, which
    /// [`Response::accept`] turns into an error where it is one.
    pub async fn send(&self, request: Request) -> Result<Response, Error> {
        let Request { url, method, mut headers, credential, range, follow, what, missing, sign_in } = request;
        let began_at = url.clone();
        let credential_origin = credential.as_ref().map(|c| c.origin.clone());
        if let Some(credential) = credential {
            headers.insert(header::AUTHORIZATION, credential.value);
        }
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        // The bytes of a file are many; all other bodies are small.
        let directly = range.is_some() && method == Method::GET;
        if let Some(range) = range {
            let value = format!("bytes={}-{}", range.start, range.end - 1);
            headers.insert(header::RANGE, value.parse().expect("a range is a header"));
        }
        let mut at = url;
        for _ in 0..=MAX_REDIRECTS {
            let host = authority(&at);
            self.gate.wait(&host).await;
            let sent = self.exchange(&method, &at, &headers, directly);
            let (inner, direct) = match timeout(self.answer_timeout, sent).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(e)) => return Err(unreachable(&what, &host, &*e)),
                Err(_) => {
                    let detail = format!("no answer for {} s", self.answer_timeout.as_secs());
                    return Err(Error::Unreachable { host, step: Step::Timeout, detail });
                }
            };
            let (status, wait) = (inner.status(), asked_to_wait(inner.headers(), inner.status()));
            if let Some(wait) = wait {
                self.gate.note(&host, wait);
            }
            match status.as_u16() {
                429 => return Err(Error::RateLimited { what, host, retry_after: wait }),
                503 if wait.is_some() => return Err(Error::RateLimited { what, host, retry_after: wait }),
                408 | 500..=599 => return Err(Error::Server { what, host, status: status.as_u16() }),
                _ => {}
            }
            let target = match status.as_u16() {
                301 | 302 | 303 | 307 | 308 => inner.headers().get(header::LOCATION),
                _ => None,
            };
            let next = target.map(|location| redirect_target(&began_at, &at, location, &what)).transpose()?;
            let leaves = next.as_ref().is_some_and(|next| next.origin() != at.origin());
            match next {
                Some(next) if follow == Follow::All || !leaves => {
                    if leaves {
                        // Removed, not skipped: a later hop back to the first origin does not restore it.
                        headers = without_sensitive(headers);
                    }
                    at = next;
                }
                redirect => {
                    return Ok(Response {
                        inner,
                        direct,
                        url: at,
                        redirect,
                        what,
                        missing,
                        credential_origin,
                        sign_in,
                        stall_timeout: self.stall_timeout,
                    });
                }
            }
        }
        Err(Error::Redirect { what, host: authority(&at), why: "there are more than 10 redirects" })
    }

    /// One request and its answer; with the body apart from it, if that is direct.
    async fn exchange(
        &self,
        method: &Method,
        at: &Url,
        headers: &HeaderMap,
        directly: bool,
    ) -> Result<(reqwest::Response, Option<Box<DirectBody>>), BoxError> {
        if directly
            && let Ok(uri) = at.as_str().parse()
            && self.direct.reaches(&uri)
        {
            return Ok(match self.direct.get(&uri, headers).await? {
                Answer::Direct(answer) => {
                    let (head, body) = answer.into_parts();
                    (hyper::Response::from_parts(head, "").into(), Some(body))
                }
                Answer::Through(answer) => (answer.map(reqwest::Body::wrap).into(), None),
            });
        }
        let sent = self.http.request(method.clone(), at.clone()).headers(headers.clone()).send().await;
        Ok((sent.map_err(reqwest::Error::without_url)?, None))
    }
}

impl Response {
    /// The status of the last hop.
    pub fn status(&self) -> StatusCode {
        self.inner.status()
    }

    /// The URL of the last hop. It may be signed: never for logs or errors.
    pub fn url(&self) -> &Url {
        &self.url
    }

    /// Where the redirect leads that [`Follow::SameOrigin`] did not follow; a permitted place.
    pub fn redirect(&self) -> Option<&Url> {
        self.redirect.as_ref()
    }

    /// All headers of the last hop.
    pub fn headers(&self) -> &HeaderMap {
        self.inner.headers()
    }

    /// A header, if it is there and is visible ASCII.
    pub fn header(&self, name: impl header::AsHeaderName) -> Option<&str> {
        self.inner.headers().get(name)?.to_str().ok()
    }

    /// Content-Length, if it is there and is one number.
    pub fn content_length(&self) -> Option<u64> {
        self.header(header::CONTENT_LENGTH)?.trim().parse().ok()
    }

    /// The ETag as written, quotes included, if it is strong and at most 256 bytes of visible ASCII.
    pub fn strong_etag(&self) -> Option<String> {
        self.header(header::ETAG).filter(|etag| is_strong(etag)).map(str::to_owned)
    }

    /// What marks exactly these bytes: the strong ETag, or else a Last-Modified that is a minute older than the answer,
    /// because a younger one may stand for two versions (RFC 9110, 8.8.2.2).
    pub fn mark(&self) -> Option<String> {
        self.strong_etag().or_else(|| {
            let modified = self.header(header::LAST_MODIFIED)?;
            let answered = httpdate::parse_http_date(self.header(header::DATE)?).ok()?;
            let age = answered.duration_since(httpdate::parse_http_date(modified).ok()?).ok()?;
            (age >= Duration::from_secs(60)).then(|| modified.to_owned())
        })
    }

    /// 2xx passes; 401, 403, 404 and 410 become the errors they mean, everything else [`Error::Protocol`].
    pub async fn accept(self) -> Result<Response, Error> {
        let status = self.status().as_u16();
        let host = authority(&self.url);
        match status {
            200..=299 => Ok(self),
            401 | 403 => {
                let what = self.what.clone();
                match self.credential_origin.clone() {
                    None => Err(Error::AuthMissing { what, action: self.sign_in.clone() }),
                    Some(origin) => {
                        let detail = format!("`{host}` answered {status}{}", self.words().await);
                        Err(Error::AuthInvalid { what, origin, detail })
                    }
                }
            }
            404 | 410 => Err(match self.missing {
                Missing::Repo => Error::RepoNotFound { what: self.what, detail: format!("`{host}` answered {status}") },
                Missing::File => Error::FileNotFound { what: self.what },
            }),
            _ => {
                let what = self.what.clone();
                Err(Error::Protocol { what, detail: format!("`{host}` answered {status}{}", self.words().await) })
            }
        }
    }

    /// The whole body, which may have at most `max` bytes.
    pub async fn bytes(mut self, max: usize) -> Result<Vec<u8>, Error> {
        let expected = self.content_length();
        let too_long = Error::Overlong { what: self.what.clone(), expected: max as u64 };
        if expected.is_some_and(|length| length > max as u64) {
            return Err(too_long);
        }
        let mut body = Vec::new();
        // The same floor as for streams: 4 KiB in each stall timeout.
        let (mut deadline, mut brought) = (Instant::now() + self.stall_timeout, 0);
        loop {
            match timeout_at(deadline, self.inner.chunk()).await {
                Err(_) => {
                    return Err(Error::Stalled { what: self.what, seconds: self.stall_timeout.as_secs() });
                }
                Ok(Err(e)) => {
                    let got = body.len() as u64;
                    return Err(match expected {
                        Some(expected) => Error::Truncated { what: self.what, expected, got },
                        None => unreachable(&self.what, &authority(&self.url), &e.without_url()),
                    });
                }
                Ok(Ok(Some(chunk))) if body.len() + chunk.len() > max => return Err(too_long),
                Ok(Ok(Some(chunk))) => {
                    body.extend_from_slice(&chunk);
                    brought += chunk.len() as u64;
                    if brought >= RetryPolicy::MIN_STALL_BYTES {
                        (deadline, brought) = (Instant::now() + self.stall_timeout, 0);
                    }
                }
                Ok(Ok(None)) => return Ok(body),
            }
        }
    }

    /// The beginning of an error's body, to be quoted: `: "…"`, or nothing if it has no words.
    async fn words(mut self) -> String {
        let mut body = Vec::new();
        let deadline = Instant::now() + self.stall_timeout;
        while body.len() < MAX_QUOTED_BODY_BYTES
            && let Ok(Ok(Some(chunk))) = timeout_at(deadline, self.inner.chunk()).await
        {
            body.extend_from_slice(&chunk);
        }
        body.truncate(MAX_QUOTED_BODY_BYTES);
        match String::from_utf8_lossy(&body).trim() {
            "" => String::new(),
            words => format!(": {}", quoted(words)),
        }
    }
}

/// A source's words, escaped and shortened.
pub(super) fn quoted(words: &str) -> String {
    let short: String = words.chars().take(MAX_QUOTED_CHARS).collect();
    let ellipsis = if short.len() < words.len() { "…" } else { "" };
    format!("{short:?}{ellipsis}")
}

fn is_strong(etag: &str) -> bool {
    (3..=256).contains(&etag.len()) && etag.starts_with('"') && etag.ends_with('"')
}

/// What holds for every connection to a source of bytes, our own and those of `object_store`: one request is one answer,
/// as it was sent.
pub(super) fn builder(connect_timeout: Duration) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .user_agent(USER_AGENT)
        // Followed unseen, a redirect would carry credentials to a host that nobody checked.
        .redirect(reqwest::redirect::Policy::none())
        .retry(reqwest::retry::never())
        .referer(false)
        // Many sockets carry more than one multiplexed one.
        .http1_only()
        .no_gzip()
        .no_brotli()
        .no_zstd()
        .no_deflate()
        .connect_timeout(connect_timeout)
        .tcp_nodelay(true)
}

/// `error` must not name a URL.
fn unreachable(what: &str, host: &str, error: &(dyn std::error::Error + 'static)) -> Error {
    // The head of the answer could not be read: reached, but not HTTP.
    const NOT_HTTP: [&str; 4] =
        ["invalid http", "message head is too large", "invalid content-length", "unexpected transfer-encoding"];
    if causes(error).any(|e| NOT_HTTP.iter().any(|words| e.to_string().to_ascii_lowercase().contains(words))) {
        return Error::Protocol { what: what.to_owned(), detail: format!("`{host}`: {}", deepest(error)) };
    }
    Error::Unreachable { host: host.to_owned(), step: Step::of(error), detail: deepest(error) }
}

/// The words of the deepest cause, shortened: the ones above it say only that something below failed.
pub(super) fn deepest(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(cause) = deepest.source() {
        deepest = cause;
    }
    deepest.to_string().chars().take(MAX_QUOTED_CHARS).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::sync::Mutex;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    pub(super) fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    /// Answers each request with what `answer` makes of its head; gives every head back.
    pub(super) async fn server(answer: impl Fn(&str) -> String + Send + 'static) -> (u16, Arc<Mutex<Vec<String>>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let heads = Arc::new(Mutex::new(Vec::new()));
        let log = heads.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(stream.read_u8().await.unwrap());
                }
                let head = String::from_utf8(head).unwrap().to_ascii_lowercase();
                log.lock().unwrap().push(head.clone());
                stream.write_all(answer(&head).as_bytes()).await.unwrap();
            }
        });
        (port, heads)
    }

    pub(super) fn answer(status: u16, headers: &str, body: &str) -> String {
        format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len())
    }

    pub(super) fn client() -> Client {
        Client::new(&SourceConfig::default()).unwrap()
    }

    pub(super) fn secret_request(port: u16) -> Request {
        let mut request = Request::get(url(&format!("http://127.0.0.1:{port}/")), "hf://org/name");
        let mut private = HeaderValue::from_static("canary");
        private.set_sensitive(true);
        request.headers.insert("x-private", private);
        request.headers.insert("x-public", HeaderValue::from_static("for all"));
        Request { credential: Credential::bearer("canary", "HF_TOKEN"), ..request }
    }

    #[tokio::test]
    async fn refusals_say_whose_credential_it_was_and_never_the_credential() {
        let (port, _) = server(|head| match head.contains("authorization") {
            true => answer(401, "", "bad token \u{1b}[31m"),
            false => answer(403, "", ""),
        })
        .await;
        let client = client();
        let rejected = client.send(secret_request(port)).await.unwrap().accept().await.err().unwrap();
        assert!(matches!(&rejected, Error::AuthInvalid { origin, .. } if origin == "HF_TOKEN"), "{rejected}");
        let text = rejected.to_string();
        assert!(text.contains("bad token") && !text.contains('\u{1b}') && !text.contains("canary"), "{text}");

        let anonymous = Request { credential: None, sign_in: "set HF_TOKEN".into(), ..secret_request(port) };
        let missing = client.send(anonymous).await.unwrap().accept().await.err().unwrap();
        assert!(matches!(&missing, Error::AuthMissing { action, .. } if action == "set HF_TOKEN"), "{missing}");
    }

    #[tokio::test(start_paused = true)]
    async fn one_refusal_holds_back_all_requests_to_its_host() {
        let first = Mutex::new(true);
        let (port, heads) = server(move |_| match std::mem::take(&mut *first.lock().unwrap()) {
            true => answer(429, "Retry-After: 90\r\n", ""),
            false => answer(200, "", ""),
        })
        .await;
        // The paused clock also jumps while bytes are on their way: no other timer may be near.
        let far = Duration::from_secs(1_000_000);
        let client =
            Client::new(&SourceConfig { connect_timeout: far, stall_timeout: far, environment: None }).unwrap();
        let began = Instant::now();
        let error = client.send(secret_request(port)).await.err().unwrap();
        assert_eq!(error.retry(), Retry::After(Duration::from_secs(90)));
        let requests = (0..16).map(|_| client.send(secret_request(port)));
        futures::future::try_join_all(requests).await.unwrap();
        assert!(began.elapsed() >= Duration::from_secs(90), "{:?}", began.elapsed());
        assert_eq!(heads.lock().unwrap().len(), 17);
    }

    fn step(error: &Error) -> Option<Step> {
        match error {
            Error::Unreachable { step, .. } => Some(*step),
            _ => None,
        }
    }

    #[tokio::test]
    async fn a_name_without_an_address_is_told_as_such() {
        // No label may have 64 letters, so no resolver is asked.
        let request = Request::get(url(&format!("http://{}.invalid/", "x".repeat(64))), "x");
        let error = client().send(request).await.err().unwrap();
        assert_eq!(step(&error), Some(Step::Dns), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_speaks_no_tls_is_told_as_such() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 400 no TLS here\r\n\r\n").await.unwrap();
            let mut hello = [0; 4096];
            while stream.read(&mut hello).await.is_ok_and(|read| read > 0) {}
        });
        let request = Request::get(url(&format!("https://127.0.0.1:{port}/")), "x");
        let error = client().send(request).await.err().unwrap();
        assert_eq!(step(&error), Some(Step::Tls), "{error}");
    }
}

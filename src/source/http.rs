//! Our own HTTP requests: redirects, ranges and answers are checked here, for every source that speaks HTTP itself.
//!
//! A [`Client`] follows redirects itself, because a credential must not travel to another origin, not even on the way
//! back. [`Client::open_range`] gives exactly the bytes of a range or an error. [`HostGate`] holds back every request
//! to a host that has said when it may be asked again.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, StatusCode};
use tokio::time::{Instant, timeout, timeout_at};
use url::{Host, Url};

use super::*;

/// Longest wait a source may ask for: a longer Retry-After counts as this.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(600);
/// Most redirects that one request follows.
pub const MAX_REDIRECTS: usize = 10;
/// Longest Location that is followed, in bytes: signed URLs have 2 to 4 KiB.
pub const MAX_LOCATION_BYTES: usize = 16 * 1024;
/// Most hosts the [`HostGate`] remembers; more than any pull talks to.
const MAX_GATED_HOSTS: usize = 1024;
/// How much of an error body is read to quote it, in bytes.
const MAX_QUOTED_BODY_BYTES: usize = 4096;
/// How much of a source's words an error quotes, in characters.
const MAX_QUOTED_CHARS: usize = 200;

/// Sends requests. Cheap to clone: clones share connections and the [`HostGate`].
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    gate: Arc<HostGate>,
    /// Longest wait for the head of an answer.
    answer_timeout: Duration,
    /// Longest wait for the next bytes of a body that is read whole.
    stall_timeout: Duration,
}

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
    inner: reqwest::Response,
    url: Url,
    /// The checked target of a redirect that was not followed.
    redirect: Option<Url>,
    what: String,
    missing: Missing,
    credential_origin: Option<String>,
    sign_in: String,
    stall_timeout: Duration,
}

/// An open range.
pub struct Body {
    /// Exactly the bytes of the range, or an error.
    pub bytes: ByteStream,
    /// The mark of the file they are from, as [`Response::mark`] gives it.
    pub mark: Option<String>,
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Body").field("mark", &self.mark).finish_non_exhaustive()
    }
}

impl Client {
    /// Sets up the connections. Proxies come from HTTPS_PROXY, HTTP_PROXY and NO_PROXY, a private CA from SSL_CERT_FILE.
    pub fn new(config: &SourceConfig) -> Result<Client, Error> {
        let http = reqwest::Client::builder()
            .user_agent(concat!("larder/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .retry(reqwest::retry::never())
            .referer(false)
            // Many sockets carry more than one multiplexed one.
            .http1_only()
            .no_gzip()
            .no_brotli()
            .no_zstd()
            .no_deflate()
            .connect_timeout(config.connect_timeout)
            .tcp_nodelay(true)
            .pool_idle_timeout(Duration::from_secs(60))
            .build()
            .map_err(|e| Error::Misconfigured { what: "https://".into(), detail: deepest(&e) })?;
        Ok(Client {
            http,
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
        if let Some(range) = range {
            let value = format!("bytes={}-{}", range.start, range.end - 1);
            headers.insert(header::RANGE, value.parse().expect("a range is a header"));
        }
        let mut at = url;
        for _ in 0..=MAX_REDIRECTS {
            let host = authority(&at);
            self.gate.wait(&host).await;
            let sent = self.http.request(method.clone(), at.clone()).headers(headers.clone()).send();
            let inner = match timeout(self.answer_timeout, sent).await {
                Ok(Ok(response)) => response,
                Ok(Err(e)) => return Err(unreachable(&what, &host, e)),
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

    /// Opens `range` of a file of `size` bytes. `range` is not empty and lies within the file; `request.range` is
    /// overwritten.
    ///
    /// `pin` is what [`Response::mark`] gave before: the server is asked for exactly that version, and an answer that is
    /// of another one, or does not say which, is an error. Anything else (a weak ETag) is ignored.
    pub async fn open_range(
        &self,
        mut request: Request,
        size: u64,
        range: Range<u64>,
        pin: Option<&str>,
    ) -> Result<Body, Error> {
        let pin = pin.and_then(Pin::read);
        if let Some(pin) = &pin
            && let Ok(value) = HeaderValue::from_str(pin.text)
        {
            request.headers.insert(pin.condition.clone(), value);
        }
        request.range = Some(range.clone());
        let what = request.what.clone();
        let response = self.send(request).await?;
        let began = || pin.as_ref().map_or_else(|| format!("{size} bytes"), |pin| pin.text.to_owned());
        let changed = |now: String| Error::Changed { what: what.clone(), began: began(), now };
        let protocol = |detail: String| Error::Protocol { what: what.clone(), detail };
        let content_range = response.header(header::CONTENT_RANGE).map(ContentRange::parse);
        match response.status().as_u16() {
            412 => return Err(changed(response.mark().unwrap_or_else(|| "another version".into()))),
            416 => {
                let now = match content_range {
                    Some(Some(ContentRange { total: Some(total), .. })) => format!("{total} bytes"),
                    _ => "shorter".into(),
                };
                return Err(changed(now));
            }
            200 | 206 => {}
            _ => {
                let status = response.status();
                return Err(match response.accept().await {
                    Ok(_) => protocol(format!("the server answered {} to a range", status.as_u16())),
                    Err(e) => e,
                });
            }
        }
        if let Some(pin) = &pin {
            match response.header(&pin.validator) {
                Some(now) if now == pin.text => {}
                Some(now) => return Err(changed(quoted(now))),
                None => return Err(protocol(format!("the answer has no {}, though the file has one", pin.validator))),
            }
        }
        if let Some(coding) = response.header(header::CONTENT_ENCODING).filter(|c| !c.eq_ignore_ascii_case("identity"))
        {
            return Err(protocol(format!("the body is encoded as {}, which was not asked for", quoted(coding))));
        }
        let expected = range.end - range.start;
        let length = response.content_length();
        if response.status() == StatusCode::OK {
            if range != (0..size) {
                return Err(protocol("the server ignored the range and sent the whole file".into()));
            }
            if let Some(length) = length.filter(|length| *length != size) {
                return Err(match &pin {
                    Some(_) => protocol(format!("the answer has {length} bytes, the file {size}")),
                    None => changed(format!("{length} bytes")),
                });
            }
        } else {
            let kind = response.header(header::CONTENT_TYPE).unwrap_or_default();
            if kind.to_ascii_lowercase().starts_with("multipart/") {
                return Err(protocol("the answer is a multipart body, which was not asked for".into()));
            }
            match content_range {
                None => return Err(protocol("the answer to a range has no Content-Range".into())),
                Some(Some(ContentRange { span: Some(span), total: Some(total) })) if span == range => {
                    if total != size {
                        return Err(match &pin {
                            Some(_) => protocol(format!("the range is of {total} bytes, the file has {size}")),
                            None => changed(format!("{total} bytes")),
                        });
                    }
                }
                Some(_) => {
                    let shown = quoted(response.header(header::CONTENT_RANGE).unwrap_or_default());
                    let asked = format!("{}-{}/{size}", range.start, range.end - 1);
                    return Err(protocol(format!("the answer is range {shown}, asked for was {asked}")));
                }
            }
            if let Some(length) = length.filter(|length| *length != expected) {
                return Err(protocol(format!("the answer has {length} bytes, the range {expected}")));
            }
        }
        let mark = response.mark();
        Ok(Body { bytes: exactly(response.inner, what, expected), mark })
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
                        None => unreachable(&self.what, &authority(&self.url), e),
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

/// Holds back requests to a host until the time it named. Shared by all sources, so that sixteen parallel ranges do not
/// ask sixteen times.
#[derive(Default)]
pub struct HostGate {
    not_before: Mutex<HashMap<String, Instant>>,
}

impl HostGate {
    /// Nobody asks `host` (with its port, if it is not the scheme's) for `wait`, at most [`MAX_RETRY_AFTER`].
    pub fn note(&self, host: &str, wait: Duration) {
        if wait.is_zero() {
            return;
        }
        let now = Instant::now();
        let until = now + wait.min(MAX_RETRY_AFTER);
        let mut hosts = self.not_before.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.len() >= MAX_GATED_HOSTS {
            hosts.retain(|_, until| *until > now);
        }
        if let Some(known) = hosts.get_mut(host) {
            *known = until.max(*known);
        } else if hosts.len() < MAX_GATED_HOSTS {
            hosts.insert(host.to_owned(), until);
        }
    }

    /// Waits until `host` may be asked; at most [`MAX_RETRY_AFTER`], however often it is noted meanwhile.
    pub async fn wait(&self, host: &str) {
        let latest = Instant::now() + MAX_RETRY_AFTER;
        loop {
            let until = {
                let mut hosts = self.not_before.lock().unwrap_or_else(PoisonError::into_inner);
                match hosts.get(host) {
                    Some(until) if *until > Instant::now() && Instant::now() < latest => (*until).min(latest),
                    Some(_) => {
                        hosts.remove(host);
                        return;
                    }
                    None => return,
                }
            };
            tokio::time::sleep_until(until).await;
        }
    }
}

/// `host` or `host:port`, as errors and the gate name it.
pub fn authority(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => String::new(),
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

fn without_sensitive(headers: HeaderMap) -> HeaderMap {
    let always = [header::AUTHORIZATION, header::PROXY_AUTHORIZATION, header::COOKIE];
    let public = headers.iter().filter(|(name, value)| !value.is_sensitive() && !always.contains(*name));
    public.map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn redirect_target(began_at: &Url, at: &Url, location: &HeaderValue, what: &str) -> Result<Url, Error> {
    let refuse = |why| Err(Error::Redirect { what: what.to_owned(), host: authority(at), why });
    if location.len() > MAX_LOCATION_BYTES {
        return refuse("the Location is longer than 16 KiB");
    }
    match location.to_str() {
        Ok(location) => permitted(began_at, at, location, what),
        Err(_) => refuse("the Location is not a URL"),
    }
}

/// Where the text of a server at `at` leads, if it may lead there: not from https to http, and not to this machine or
/// a metadata service unless the user asked for one to begin with.
pub(super) fn permitted(began_at: &Url, at: &Url, text: &str, what: &str) -> Result<Url, Error> {
    let refuse = |host: String, why| Err(Error::Redirect { what: what.to_owned(), host, why });
    let Ok(mut target) = at.join(text) else {
        return refuse(authority(at), "the address is not a URL");
    };
    target.set_fragment(None);
    let host = authority(&target);
    if !matches!(target.scheme(), "http" | "https") || target.host().is_none() {
        return refuse(host, "it is not an HTTP address");
    }
    if !target.username().is_empty() || target.password().is_some() {
        return refuse(host, "it has a user name in it");
    }
    if at.scheme() == "https" && target.scheme() == "http" {
        return refuse(host, "it leads from https to http");
    }
    for place in [Place::LinkLocal, Place::Loopback] {
        if place.has(&target) && !place.has(began_at) {
            return refuse(host, place.why());
        }
    }
    Ok(target)
}

/// Places that a server out there must not make us ask for it.
#[derive(Clone, Copy)]
enum Place {
    /// Link-local addresses and the clouds' metadata services.
    LinkLocal,
    /// This machine.
    Loopback,
}

impl Place {
    fn why(self) -> &'static str {
        match self {
            Place::LinkLocal => "it leads to a link-local or metadata address",
            Place::Loopback => "it leads to this machine",
        }
    }

    fn has(self, url: &Url) -> bool {
        match url.host() {
            None => false,
            Some(Host::Ipv4(ip)) => self.has_v4(ip),
            Some(Host::Ipv6(ip)) => self.has_v6(ip),
            Some(Host::Domain(name)) => {
                let name = name.trim_end_matches('.').to_ascii_lowercase();
                match self {
                    Place::LinkLocal => name == "metadata.google.internal" || name == "metadata",
                    Place::Loopback => name == "localhost" || name.ends_with(".localhost"),
                }
            }
        }
    }

    fn has_v4(self, ip: Ipv4Addr) -> bool {
        match self {
            // The last two are Alibaba's and Azure's.
            Place::LinkLocal => ip.is_link_local() || [[100, 100, 100, 200], [168, 63, 129, 16]].contains(&ip.octets()),
            Place::Loopback => ip.is_loopback() || ip.is_unspecified(),
        }
    }

    fn has_v6(self, ip: Ipv6Addr) -> bool {
        // ::ffff:a.b.c.d, ::a.b.c.d and 64:ff9b::a.b.c.d reach an IPv4 address.
        let segments = ip.segments();
        let embedded = match segments {
            [0, 0, 0, 0, 0, 0xffff | 0, high, low] | [0x64, 0xff9b, 0, 0, 0, 0, high, low] => Some((high, low)),
            _ => None,
        };
        let v4 = embedded.map(|(high, low)| Ipv4Addr::from(u32::from(high) << 16 | u32::from(low)));
        let itself = match self {
            Place::LinkLocal => ip.is_unicast_link_local() || segments == [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254],
            Place::Loopback => IpAddr::V6(ip).is_loopback() || ip.is_unspecified(),
        };
        itself || v4.is_some_and(|v4| self.has_v4(v4))
    }
}

/// How long the answer asks to wait, at most [`MAX_RETRY_AFTER`]: Retry-After of a refusal, or what is left of a window
/// whose requests are used up.
pub(super) fn asked_to_wait(headers: &HeaderMap, status: StatusCode) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let refused = matches!(status.as_u16(), 429 | 503);
    let retry_after = text("retry-after").filter(|_| refused).and_then(|value| retry_after(value, SystemTime::now()));
    let window = text("ratelimit").and_then(used_up_window);
    let older = match (text("ratelimit-remaining").map(str::trim), text("ratelimit-reset")) {
        (Some("0"), Some(reset)) => seconds(reset),
        _ => None,
    };
    retry_after.or(window).or(older)
}

/// Retry-After: seconds or a date, from servers that may write anything.
fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    seconds(value).or_else(|| {
        let at = httpdate::parse_http_date(value.trim()).ok()?;
        Some(at.duration_since(now).unwrap_or_default().min(MAX_RETRY_AFTER))
    })
}

fn seconds(value: &str) -> Option<Duration> {
    let seconds: f64 = value.trim().parse().ok().filter(|s: &f64| !s.is_nan())?;
    Some(Duration::from_secs_f64(seconds.clamp(0.0, MAX_RETRY_AFTER.as_secs_f64())))
}

/// `RateLimit: "name";r=0;t=55`, a list of them, or the older `limit=100, remaining=0, reset=55`: the longest wait of
/// those that have nothing remaining.
fn used_up_window(value: &str) -> Option<Duration> {
    let parameters = |item: &str| -> HashMap<String, String> {
        item.split(';').filter_map(|p| p.split_once('=')).map(|(k, v)| (k.trim().into(), v.trim().into())).collect()
    };
    let older = parameters(&value.replace(',', ";"));
    if older.get("remaining").is_some_and(|r| r == "0") {
        return older.get("reset").and_then(|reset| seconds(reset));
    }
    let used_up = value.split(',').map(parameters).filter(|p| p.get("r").is_some_and(|r| r == "0"));
    used_up.filter_map(|p| p.get("t").and_then(|t| seconds(t))).max()
}

/// A mark of a file, and the headers it stands in.
struct Pin<'a> {
    text: &'a str,
    condition: HeaderName,
    validator: HeaderName,
}

impl Pin<'_> {
    fn read(text: &str) -> Option<Pin<'_>> {
        if is_strong(text) {
            return Some(Pin { text, condition: header::IF_MATCH, validator: header::ETAG });
        }
        httpdate::parse_http_date(text).ok()?;
        Some(Pin { text, condition: header::IF_UNMODIFIED_SINCE, validator: header::LAST_MODIFIED })
    }
}

/// `Content-Range: bytes 0-9/100`, `bytes */100` or `bytes 0-9/*`.
struct ContentRange {
    span: Option<Range<u64>>,
    total: Option<u64>,
}

impl ContentRange {
    fn parse(value: &str) -> Option<ContentRange> {
        let (span, total) = value.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let span = match span.trim() {
            "*" => None,
            span => {
                let (first, last) = span.split_once('-')?;
                Some(number(first)?..number(last)?.checked_add(1)?)
            }
        };
        Some(ContentRange { span, total: number(total) })
    }
}

/// Counts a body: `expected` bytes, or an error, and never a byte more.
fn exactly(response: reqwest::Response, what: String, expected: u64) -> ByteStream {
    let start = Some((response, 0u64));
    Box::pin(futures::stream::unfold(start, move |state| {
        let what = what.clone();
        async move {
            let (mut response, got) = state.filter(|(_, got)| *got < expected)?;
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) | Err(_) => return Some((Err(Error::Truncated { what, expected, got }), None)),
            };
            let got = got + chunk.len() as u64;
            if got > expected {
                return Some((Err(Error::Overlong { what, expected }), None));
            }
            // The last piece is given only when the body ends there, so that a body that is too long fails whole. A
            // connection that breaks now, breaks after the last byte.
            if got == expected
                && let Ok(Some(more)) = response.chunk().await
                && !more.is_empty()
            {
                return Some((Err(Error::Overlong { what, expected }), None));
            }
            Some((Ok(chunk), Some((response, got))))
        }
    }))
}

fn unreachable(what: &str, host: &str, error: reqwest::Error) -> Error {
    let error = error.without_url();
    let mut chain = String::new();
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(e) = cause {
        chain.push_str(&e.to_string().to_ascii_lowercase());
        chain.push('\n');
        cause = e.source();
    }
    let has = |words: &[&str]| words.iter().any(|word| chain.contains(word));
    // The head of the answer could not be read: reached, but not HTTP.
    if has(&["invalid http", "message head is too large", "invalid content-length", "unexpected transfer-encoding"]) {
        return Error::Protocol { what: what.to_owned(), detail: format!("`{host}`: {}", deepest(&error)) };
    }
    let step = if has(&["tunnel error", "socks error", "proxy"]) {
        Step::Proxy
    } else if error.is_dns() || has(&["dns error", "failed to lookup address"]) {
        Step::Dns
    } else if has(&["certificate", "tls", "handshake", "fatal alert", "corrupt message", "invalidmessage"]) {
        Step::Tls
    } else if error.is_timeout() {
        Step::Timeout
    } else {
        Step::Connect
    };
    Error::Unreachable { host: host.to_owned(), step, detail: deepest(&error) }
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

    use futures::TryStreamExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    fn url(text: &str) -> Url {
        text.parse().unwrap()
    }

    #[test]
    fn retry_after_is_understood_in_every_form_and_clamped() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let date = |offset: u64| httpdate::fmt_http_date(now + Duration::from_secs(offset));
        let past = httpdate::fmt_http_date(now - Duration::from_secs(60));
        for (text, seconds) in [
            ("0", Some(0)),
            ("120", Some(120)),
            (" 7 ", Some(7)),
            ("-5", Some(0)),
            ("1e12", Some(600)),
            ("99999999999999999999999", Some(600)),
            ("inf", Some(600)),
            (&date(90), Some(90)),
            (&date(1_000_000), Some(600)),
            (&past, Some(0)),
            ("NaN", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(retry_after(text, now), seconds.map(Duration::from_secs), "{text:?}");
        }
    }

    #[test]
    fn a_window_that_is_used_up_is_waited_for() {
        for (text, seconds) in [
            (r#""default";r=0;t=55"#, Some(55)),
            (r#""api";r=4;t=55"#, None),
            (r#""a";r=0;t=5, "b";r=0;t=9, "c";r=1;t=99"#, Some(9)),
            ("limit=10, remaining=0, reset=12", Some(12)),
            ("limit=10, remaining=3, reset=12", None),
            (r#""a";r=0;t=1e99"#, Some(600)),
            (r#""a";r=0"#, None),
            (";;==,,", None),
        ] {
            assert_eq!(used_up_window(text), seconds.map(Duration::from_secs), "{text:?}");
        }
        let headers = |pairs: &[(&'static str, &'static str)]| -> HeaderMap {
            pairs.iter().map(|(k, v)| (HeaderName::from_static(k), HeaderValue::from_static(v))).collect()
        };
        let older = headers(&[("ratelimit-remaining", "0"), ("ratelimit-reset", "3")]);
        assert_eq!(asked_to_wait(&older, StatusCode::OK), Some(Duration::from_secs(3)));
        let page = headers(&[("retry-after", "3")]);
        assert_eq!(asked_to_wait(&page, StatusCode::OK), None, "Retry-After of an answer that is no refusal");
        assert_eq!(asked_to_wait(&page, StatusCode::SERVICE_UNAVAILABLE), Some(Duration::from_secs(3)));
    }

    #[test]
    fn redirects_lead_only_to_permitted_places() {
        let from = url("https://hub.example/model");
        for bad in [
            "http://hub.example/model",
            "https://user@cdn.example/x",
            "https://user:secret@cdn.example/x",
            "https://169.254.169.254/latest",
            "https://0xa9fea9fe/",
            "https://2852039166/",
            "https://0251.0376.0251.0376/",
            "https://[::ffff:169.254.169.254]/",
            "https://[64:ff9b::a9fe:a9fe]/",
            "https://[fe80::1]/",
            "https://[fd00:ec2::254]/",
            "https://metadata.google.internal./",
            "https://100.100.100.200/",
            "https://127.0.0.1/",
            "https://localhost/",
            "https://0.0.0.0/",
            "https://[::1]/",
            "https://[::ffff:127.0.0.1]/",
            "ftp://hub.example/",
            "file:///etc/passwd",
            "javascript:alert(1)",
            "https://",
        ] {
            let refused = permitted(&from, &from, bad, "x").expect_err(bad);
            assert!(matches!(refused, Error::Redirect { .. }), "{refused}");
            assert!(!refused.to_string().contains("secret"), "{refused}");
        }
        for good in ["/other", "model2", "https://cdn.example:8443/x?sig=1", "//cdn.example/x", "https://10.0.0.7/x"] {
            permitted(&from, &from, good, "x").unwrap();
        }
        let (local, metadata) = (url("http://127.0.0.1:8080/"), url("http://169.254.169.254/"));
        permitted(&local, &local, "http://localhost:9090/", "x").unwrap();
        permitted(&metadata, &metadata, "/latest", "x").unwrap();
        assert!(permitted(&local, &local, "http://169.254.169.254/", "x").is_err());
    }

    #[test]
    fn content_ranges_are_read_strictly() {
        let read = |text| ContentRange::parse(text).map(|range| (range.span, range.total));
        assert_eq!(read("bytes 0-9/100"), Some((Some(0..10), Some(100))));
        assert_eq!(read("bytes */100"), Some((None, Some(100))));
        assert_eq!(read("bytes 5-9/*"), Some((Some(5..10), None)));
        for bad in ["", "bytes", "bytes 1/2", "bytes a-b/3", "bytes 0-18446744073709551615/3", "items 0-9/100"] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_gate_holds_a_host_back_until_its_time_and_no_other_host() {
        let gate = HostGate::default();
        let began = Instant::now();
        gate.note("busy.example", Duration::from_secs(40));
        gate.note("busy.example", Duration::from_secs(10));
        gate.wait("idle.example").await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        gate.wait("busy.example").await;
        assert_eq!(began.elapsed().as_secs(), 40, "the later time counts");
        gate.wait("busy.example").await;
        assert_eq!(began.elapsed().as_secs(), 40);

        gate.note("busy.example", Duration::from_secs(1_000_000));
        gate.wait("busy.example").await;
        assert_eq!(began.elapsed().as_secs(), 40 + 600, "no host holds us longer than the longest wait");
    }

    #[test]
    fn the_gate_remembers_only_so_many_hosts() {
        let gate = HostGate::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _entered = runtime.enter();
        for i in 0..5000 {
            gate.note(&format!("{i}.example"), Duration::from_secs(60));
        }
        assert_eq!(gate.not_before.lock().unwrap().len(), MAX_GATED_HOSTS);
    }

    /// Answers each request with what `answer` makes of its head; gives every head back.
    async fn server(answer: impl Fn(&str) -> String + Send + 'static) -> (u16, Arc<Mutex<Vec<String>>>) {
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

    fn answer(status: u16, headers: &str, body: &str) -> String {
        format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n{headers}\r\n{body}", body.len())
    }

    fn client() -> Client {
        Client::new(&SourceConfig::default()).unwrap()
    }

    fn secret_request(port: u16) -> Request {
        let mut request = Request::get(url(&format!("http://127.0.0.1:{port}/")), "hf://org/name");
        let mut private = HeaderValue::from_static("canary");
        private.set_sensitive(true);
        request.headers.insert("x-private", private);
        request.headers.insert("x-public", HeaderValue::from_static("for all"));
        Request { credential: Credential::bearer("canary", "HF_TOKEN"), ..request }
    }

    #[tokio::test]
    async fn a_credential_goes_to_its_origin_only_and_does_not_come_back() {
        // a/ -> a/again -> b/ -> a/back -> 200
        let back = Arc::new(Mutex::new(String::new()));
        let to = back.clone();
        let (b, b_heads) = server(move |_| answer(302, &format!("Location: {}\r\n", to.lock().unwrap()), "")).await;
        let (a, a_heads) = server(move |head| match head.split(' ').nth(1).unwrap() {
            "/" => answer(307, "Location: /again\r\n", ""),
            "/again" => answer(302, &format!("Location: http://127.0.0.1:{b}/\r\n"), ""),
            _ => answer(200, "", "done"),
        })
        .await;
        *back.lock().unwrap() = format!("http://127.0.0.1:{a}/back");

        let response = client().send(secret_request(a)).await.unwrap();
        assert_eq!(response.url().path(), "/back");
        assert_eq!(response.bytes(100).await.unwrap(), b"done");
        let (a_heads, b_heads) = (a_heads.lock().unwrap().clone(), b_heads.lock().unwrap().clone());
        let secret: Vec<_> = a_heads.iter().map(|head| head.matches("canary").count()).collect();
        assert_eq!(secret, [2, 2, 0], "sent to its origin, and not again after another one: {a_heads:?}");
        assert!(!b_heads[0].contains("canary") && b_heads[0].contains("for all"), "{b_heads:?}");
    }

    #[tokio::test]
    async fn a_redirect_off_the_origin_can_be_read_and_not_followed() {
        let (port, heads) = server(|head| match head.split(' ').nth(1).unwrap() {
            "/" => answer(307, "Location: /moved\r\n", ""),
            _ => answer(302, "X-Linked-Size: 7\r\nLocation: http://127.0.0.2:1/signed?sig=1\r\n", ""),
        })
        .await;
        let request = Request { follow: Follow::SameOrigin, ..secret_request(port) };
        let response = client().send(request).await.unwrap();
        assert_eq!(response.header("x-linked-size"), Some("7"));
        assert_eq!(response.redirect().unwrap().as_str(), "http://127.0.0.2:1/signed?sig=1");
        assert_eq!(heads.lock().unwrap().len(), 2, "the one on the origin is followed");
    }

    #[tokio::test]
    async fn eleven_redirects_are_too_many() {
        let (port, heads) = server(|_| answer(302, "Location: /\r\n", "")).await;
        let error = client().send(secret_request(port)).await.err().unwrap();
        assert!(matches!(error, Error::Redirect { .. }), "{error}");
        assert_eq!(heads.lock().unwrap().len(), MAX_REDIRECTS + 1);
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
        let client = Client::new(&SourceConfig { connect_timeout: far, stall_timeout: far }).unwrap();
        let began = Instant::now();
        let error = client.send(secret_request(port)).await.err().unwrap();
        assert_eq!(error.retry(), Retry::After(Duration::from_secs(90)));
        let requests = (0..16).map(|_| client.send(secret_request(port)));
        futures::future::try_join_all(requests).await.unwrap();
        assert!(began.elapsed() >= Duration::from_secs(90), "{:?}", began.elapsed());
        assert_eq!(heads.lock().unwrap().len(), 17);
    }

    /// What becomes of a range 2..5 of `abcdefgh`, if the server answers this.
    async fn range_from(answer: String, pin: Option<&str>) -> Result<Vec<u8>, Error> {
        let (port, _) = server(move |_| answer.clone()).await;
        let request = Request::get(url(&format!("http://127.0.0.1:{port}/")), "x");
        let body = client().open_range(request, 8, 2..5, pin).await?;
        body.bytes.try_fold(Vec::new(), async |all, chunk| Ok([all, chunk.to_vec()].concat())).await
    }

    #[tokio::test]
    async fn a_range_is_exactly_the_range_or_an_error() {
        let pin = Some("\"v1\"");
        let right = "ETag: \"v1\"\r\nContent-Range: bytes 2-4/8\r\n";
        assert_eq!(range_from(answer(206, right, "cde"), pin).await.unwrap(), b"cde");
        assert_eq!(range_from(answer(206, right, "cde"), Some("W/\"weak\"")).await.unwrap(), b"cde", "no pin");

        let changed = [
            answer(206, "ETag: \"v2\"\r\nContent-Range: bytes 2-4/8\r\n", "cde"),
            answer(200, "ETag: \"v2\"\r\n", "abcdefgh"),
            answer(412, "", ""),
            answer(416, "Content-Range: bytes */1\r\n", ""),
        ];
        for answer in changed {
            let error = range_from(answer.clone(), pin).await.unwrap_err();
            assert!(matches!(error, Error::Changed { .. }), "{answer:?}: {error}");
        }
        let error = range_from(answer(206, "Content-Range: bytes 2-4/9\r\n", "cde"), None).await.unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{error}");

        let confused = [
            answer(200, "ETag: \"v1\"\r\n", "abcdefgh"),
            answer(206, "ETag: \"v1\"\r\nContent-Range: bytes 1-3/8\r\n", "cde"),
            answer(206, "ETag: \"v1\"\r\nContent-Range: bytes 2-4/9\r\n", "cde"),
            answer(206, "ETag: \"v1\"\r\nContent-Range: bytes 2-4/*\r\n", "cde"),
            answer(206, "ETag: \"v1\"\r\n", "cde"),
            answer(206, "Content-Range: bytes 2-4/8\r\n", "cde"),
            answer(206, right, "cd"),
            answer(206, right, "cdef"),
            answer(206, &format!("{right}Content-Encoding: gzip\r\n"), "cde"),
            answer(206, &format!("{right}Content-Type: multipart/byteranges; boundary=b\r\n"), "cde"),
            answer(204, "", ""),
            answer(304, "", ""),
        ];
        for answer in confused {
            let error = range_from(answer.clone(), pin).await.unwrap_err();
            assert!(matches!(error, Error::Protocol { .. }), "{answer:?}: {error}");
        }

        let chunked = |body: &str| format!("HTTP/1.1 206 X\r\n{right}Transfer-Encoding: chunked\r\n\r\n{body}");
        assert_eq!(range_from(chunked("3\r\ncde\r\n0\r\n\r\n"), pin).await.unwrap(), b"cde");
        let error = range_from(chunked("2\r\ncd\r\n0\r\n\r\n"), pin).await.unwrap_err();
        assert_eq!(error, Error::Truncated { what: "x".into(), expected: 3, got: 2 });
        for longer in ["4\r\ncdef\r\n0\r\n\r\n", "3\r\ncde\r\n1\r\nf\r\n0\r\n\r\n"] {
            let error = range_from(chunked(longer), pin).await.unwrap_err();
            assert_eq!(error, Error::Overlong { what: "x".into(), expected: 3 });
        }
    }

    #[tokio::test]
    async fn a_whole_file_may_come_without_a_range() {
        let (port, _) = server(|_| answer(200, "ETag: \"v1\"\r\n", "abcdefgh")).await;
        let request = Request::get(url(&format!("http://127.0.0.1:{port}/")), "x");
        let body = client().open_range(request.clone(), 8, 0..8, Some("\"v1\"")).await.unwrap();
        assert_eq!(body.bytes.try_collect::<Vec<_>>().await.unwrap().concat(), b"abcdefgh");
        let error = client().open_range(request, 9, 0..9, None).await.unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_date_pins_where_there_is_no_etag() {
        let old = "Sun, 06 Nov 1994 08:49:37 GMT";
        let head = |modified: &str| format!("Last-Modified: {modified}\r\nContent-Range: bytes 2-4/8\r\n");
        assert_eq!(range_from(answer(206, &head(old), "cde"), Some(old)).await.unwrap(), b"cde");
        let newer = head("Sun, 06 Nov 1994 08:49:38 GMT");
        let error = range_from(answer(206, &newer, "cde"), Some(old)).await.unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{error}");

        for (date, mark) in [("Sun, 06 Nov 1994 08:50:37 GMT", Some(old)), ("Sun, 06 Nov 1994 08:50:00 GMT", None)] {
            let (port, _) =
                server(move |_| answer(200, &format!("Date: {date}\r\nLast-Modified: {old}\r\n"), "")).await;
            let request = Request::get(url(&format!("http://127.0.0.1:{port}/")), "x");
            assert_eq!(client().send(request).await.unwrap().mark().as_deref(), mark, "answered {date}");
        }
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

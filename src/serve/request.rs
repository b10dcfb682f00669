//! What happens to every request before and after its route: an id, a guard, a log line, a number, and errors written
//! as problems. And how routes read what was sent.

use std::any::Any;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::{FromRequest, FromRequestParts, MatchedPath, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Router, body, middleware};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use tower_http::catch_panic::CatchPanicLayer;

use super::Door;
use super::Via;
use super::doorkeeper::Doorkeeper;
use super::problem::Refused;
use crate::fault::{Code, Problem};
use crate::telemetry::{Metrics, Parent};

/// Largest body of a request.
pub(super) const MAX_BODY_BYTES: usize = 64 * 1024;

/// Longest time for a body to arrive.
const BODY_SECONDS: u64 = 30;

/// Longest id that is taken over from a request.
const MAX_REQUEST_ID_BYTES: usize = 64;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Puts around `routes` what every request gets. Must be the last thing done to a router.
pub(super) fn with_manners(routes: Router, metrics: Arc<Metrics>) -> Router {
    routes
        .fallback(unknown_route)
        .method_not_allowed_fallback(unknown_method)
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(metrics, around))
}

async fn unknown_route(method: Method) -> Refused {
    Refused::new(
        Code::RouteNotFound,
        format!("cannot answer {method}: no such route"),
        "read the routes with `GET /openapi.json`",
    )
}

async fn unknown_method(method: Method) -> Refused {
    Refused::method_not_allowed(method.as_str())
}

/// The panic itself is in the log only: it may quote anything.
fn panicked(payload: Box<dyn Any + Send>) -> Response {
    let text = payload.downcast_ref::<String>().map(String::as_str).or(payload.downcast_ref::<&str>().copied());
    tracing::error!(error = text.unwrap_or("no message"), "a route panicked");
    Refused::new(
        Code::InternalError,
        "cannot answer the request: a bug of larder",
        "report it with the lines of the log that carry this request_id",
    )
    .into_response()
}

async fn around(State(metrics): State<Arc<Metrics>>, request: Request, next: Next) -> Response {
    let began = Instant::now();
    let id = request_id(request.headers());
    let method = request.method().clone();
    // A pattern of the router: what was really asked for is unbounded and may quote anything.
    let matched = request.extensions().get::<MatchedPath>().cloned();
    let route = matched.as_ref().map_or("unknown", MatchedPath::as_str);
    // A listener that forgot to say what it is gets the stricter treatment.
    let via = request.extensions().get::<Via>().copied().unwrap_or(Via::Tcp);

    let admitted = match request.extensions().get::<Arc<Doorkeeper>>().cloned() {
        Some(doorkeeper) => doorkeeper.admit(&method, request.headers()).await,
        None => guard(via, request.method(), request.uri(), request.headers()),
    };
    let mut response = match admitted {
        Ok(()) => next.run(request).await,
        Err(refused) => refused.into_response(),
    };

    let refused = response.extensions_mut().remove::<Refused>();
    let problem = refused.as_ref().map(|r| r.problem.clone());
    if let Some(refused) = refused {
        refused.write_into(&mut response, &id);
    }
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let (status, took) = (response.status().as_u16(), began.elapsed());
    metrics.http_answered(route, status, took);
    log(&id, &method, route, status, took, problem.as_ref());
    response
}

fn log(request_id: &str, method: &Method, route: &str, status: u16, took: Duration, problem: Option<&Problem>) {
    let seconds = took.as_secs_f64();
    match problem {
        Some(problem) => {
            let (code, error) = (problem.code.text(), problem.message.as_str());
            tracing::info!(request_id, %method, route, status, seconds, code, error, "refused");
        }
        None if route.starts_with("/v1/") => tracing::info!(request_id, %method, route, status, seconds, "answered"),
        None => tracing::debug!(request_id, %method, route, status, seconds, "answered"),
    }
}

/// The id that was sent, if it is one that can stand in a log; else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let sent = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let sane = |id: &&str| {
        (1..=MAX_REQUEST_ID_BYTES).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    sent.filter(sane).map_or_else(|| format!("{:016x}", fastrand::u64(..)), str::to_owned)
}

/// Whose trace the request goes on with, if he traces.
pub(super) fn caller(headers: &HeaderMap) -> Option<Parent> {
    Parent::read(|name| headers.get(name).and_then(|value| value.to_str().ok()))
}

/// On TCP, keeps web pages out: a browser on this machine, or on one that can reach the port, would carry their requests.
///
/// A page whose host name was rebound to our address still sends that name as `Host`, so a `Host` must be `localhost` or
/// an address. A page elsewhere may not read answers, but could send a request that changes something: it then carries
/// an `Origin`, which must be this machine's.
fn guard(via: Via, method: &Method, uri: &Uri, headers: &HeaderMap) -> Result<(), Refused> {
    if via == Via::Unix {
        return Ok(());
    }
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = match (uri.authority(), hosts.next(), hosts.next()) {
        (Some(authority), ..) => Some(authority.as_str()),
        (None, Some(host), None) => host.to_str().ok(),
        _ => None,
    };
    if !host.is_some_and(|host| is_localhost(host) || address_in(host).is_some()) {
        return Err(Refused::new(
            Code::PolicyDenied,
            "cannot answer on TCP: the Host header is neither `localhost` nor an address, as if a web page were asking",
            "ask by `localhost`, by address, or on the Unix socket",
        ));
    }
    if method.is_safe() {
        return Ok(());
    }
    for origin in headers.get_all(header::ORIGIN) {
        let host = origin.to_str().ok().and_then(|o| o.strip_prefix("http://").or(o.strip_prefix("https://")));
        let ours = |host: &str| is_localhost(host) || address_in(host).is_some_and(|ip| ip.is_loopback());
        if !host.is_some_and(ours) {
            return Err(Refused::new(
                Code::PolicyDenied,
                format!("cannot answer {method} on TCP: the Origin header names a web page of another machine"),
                "ask without an Origin header, or on the Unix socket",
            ));
        }
    }
    Ok(())
}

/// Splits `host:port`; a port must be a number.
fn host_of(authority: &str) -> Option<&str> {
    let (host, port) = match authority.rfind(':') {
        Some(at) if !authority.ends_with(']') => (&authority[..at], Some(&authority[at + 1..])),
        _ => (authority, None),
    };
    port.is_none_or(|port| port.parse::<u16>().is_ok()).then_some(host)
}

fn is_localhost(authority: &str) -> bool {
    host_of(authority).is_some_and(|host| host.eq_ignore_ascii_case("localhost"))
}

fn address_in(authority: &str) -> Option<IpAddr> {
    let host = host_of(authority)?;
    match host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        Some(v6) => v6.parse().ok().map(IpAddr::V6),
        None => host.parse().ok().map(IpAddr::V4),
    }
}

/// A JSON body of at most [`MAX_BODY_BYTES`].
pub(super) struct Body<T>(pub(super) T);

fn unreadable(what: &str, found: impl std::fmt::Display, action: &str) -> Refused {
    Refused::new(Code::BadRequest, format!("cannot read the {what}: {found}"), action)
}

/// Reads a body. One that is somewhat too large is read to its end all the same: closing a connection on bytes that
/// nobody read resets it, and the asker would not see why.
async fn arrive(body: body::Body) -> Result<Vec<u8>, String> {
    let (mut kept, mut came) = (Vec::new(), 0);
    let mut pieces = body.into_data_stream();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|_| "it broke off".to_owned())?;
        came += piece.len();
        if came <= MAX_BODY_BYTES {
            kept.extend_from_slice(&piece);
        } else if came > 16 * MAX_BODY_BYTES {
            break;
        }
    }
    if came > MAX_BODY_BYTES {
        return Err(format!("it is larger than {MAX_BODY_BYTES} bytes"));
    }
    Ok(kept)
}

const SEE_SCHEMA: &str = "correct it; `GET /openapi.json` has the schema";

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = Refused;

    async fn from_request(request: Request, _: &S) -> Result<Body<T>, Refused> {
        let kind = request.headers().get(header::CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or("nothing");
        let media = kind.split(';').next().unwrap_or_default().trim();
        if !media.eq_ignore_ascii_case("application/json") {
            let found: String = media.chars().take(60).collect();
            return Err(unreadable(
                "request body",
                format!("its content type is `{found}`"),
                "send `content-type: application/json`",
            ));
        }
        let arrival = arrive(request.into_body());
        let bytes = match tokio::time::timeout(Duration::from_secs(BODY_SECONDS), arrival).await {
            Ok(Ok(bytes)) => bytes,
            Ok(Err(found)) => return Err(unreadable("request body", found, "send a shorter one, to its end")),
            Err(_) => {
                let found = format!("it did not arrive within {BODY_SECONDS} s");
                return Err(unreadable("request body", found, "send it at once"));
            }
        };
        serde_json::from_slice(&bytes).map(Body).map_err(|e| unreadable("request body", e, SEE_SCHEMA))
    }
}

/// The one name in a route's path, percent-decoded.
pub(super) struct Name(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Refused;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Name, Refused> {
        match Path::<String>::from_request_parts(parts, state).await {
            Ok(Path(name)) => Ok(Name(name)),
            Err(e) => Err(unreadable("path", e.body_text(), "percent-encode the name as UTF-8")),
        }
    }
}

/// The query, as `T`.
pub(super) fn query<T: DeserializeOwned>(uri: &Uri) -> Result<T, Refused> {
    match Query::try_from_uri(uri) {
        Ok(Query(query)) => Ok(query),
        Err(e) => Err(unreadable("query", e.body_text(), SEE_SCHEMA)),
    }
}

/// Does on a blocking thread what touches the disk, so that a slow disk does not stop `/livez`.
pub(super) async fn blocking<T: Send + 'static>(
    door: &Door,
    work: impl FnOnce(&Door) -> Result<T, Problem> + Send + 'static,
) -> Result<T, Refused> {
    let door = door.clone();
    match tokio::task::spawn_blocking(move || work(&door)).await {
        Ok(result) => Ok(result?),
        Err(e) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        Err(_) => Err(Refused::new(Code::Draining, "cannot answer: the daemon is shutting down", "ask again soon")),
    }
}

#[cfg(test)]
mod tests {
    use axum::Json;
    use axum::routing::{get, post};
    use serde::Deserialize;

    use super::super::tests::Running;
    use super::*;
    use crate::wire::http::{OpenRequest, ProblemBody};

    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Wanted {
        reference: Option<String>,
    }

    async fn tcp() -> Running {
        let routes = Router::new()
            .route("/v1/echo", post(|Body(asked): Body<OpenRequest>| async { Json(asked) }))
            .route("/v1/name/{name}", get(|Name(name): Name| async { name }))
            .route(
                "/v1/query",
                get(|uri: Uri| async move { query::<Wanted>(&uri).map(|w| w.reference.unwrap_or_default()) }),
            )
            .route("/v1/panic", get(async || -> &'static str { panic!("secret in a panic") }))
            .route(
                "/v1/later",
                get(async || -> Refused {
                    Problem {
                        code: Code::NotReady,
                        message: "cannot open `m`: 43 %".into(),
                        action: "wait".into(),
                        retry_after_seconds: Some(7),
                    }
                    .into()
                }),
            );
        Running::tcp(with_manners(routes, Arc::new(Metrics::new()))).await
    }

    fn problem(answer: &str) -> ProblemBody {
        assert!(answer.contains("content-type: application/problem+json\r\n"), "{answer}");
        let body: ProblemBody = serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {} ", body.status)), "{answer}");
        assert!(answer.contains(&format!("x-request-id: {}\r\n", body.request_id.as_deref().unwrap())), "{answer}");
        assert!(!body.action.is_empty() && body.kind.ends_with(&format!("#{}", body.code)), "{answer}");
        body
    }

    #[tokio::test]
    async fn an_error_says_what_happened_what_to_do_and_when_to_come_back() {
        let running = tcp().await;
        let answer = running.raw("GET /v1/later HTTP/1.1\r\nhost: localhost\r\nx-request-id: abc-1\r\n").await;
        assert!(answer.contains("retry-after: 7\r\n"), "{answer}");
        let body = problem(&answer);
        assert_eq!((body.status, body.code.as_str()), (503, "not-ready"));
        assert_eq!((body.detail.as_str(), body.action.as_str()), ("cannot open `m`: 43 %", "wait"));
        assert_eq!((body.request_id.as_deref(), body.retry_after_seconds), (Some("abc-1"), Some(7)));
    }

    #[tokio::test]
    async fn unknown_routes_and_methods_are_problems() {
        let running = tcp().await;
        let body = problem(&running.raw("GET /v1/nothing HTTP/1.1\r\nhost: localhost\r\n").await);
        assert_eq!((body.status, body.code.as_str()), (404, "route-not-found"));
        let answer = running.raw("DELETE /v1/echo HTTP/1.1\r\nhost: localhost\r\n").await;
        assert!(answer.to_lowercase().contains("\r\nallow: post\r\n"), "{answer}");
        let body = problem(&answer);
        assert_eq!((body.status, body.code.as_str()), (405, "bad-request"));
    }

    #[tokio::test]
    async fn a_panic_is_a_problem_that_does_not_quote_it() {
        let running = tcp().await;
        let answer = running.raw("GET /v1/panic HTTP/1.1\r\nhost: localhost\r\n").await;
        assert_eq!(problem(&answer).code, "internal-error");
        assert!(!answer.contains("secret"), "{answer}");
    }

    #[tokio::test]
    async fn a_request_id_that_could_not_stand_in_a_log_is_replaced() {
        let running = tcp().await;
        for id in ["", "a b", "a\"b", &"x".repeat(65)] {
            let answer = running.raw(&format!("GET /v1/x HTTP/1.1\r\nhost: localhost\r\nx-request-id: {id}\r\n")).await;
            let made = problem(&answer).request_id.unwrap();
            assert!(made.len() == 16 && made.bytes().all(|b| b.is_ascii_hexdigit()), "{made}");
        }
    }

    async fn posted(running: &Running, kind: &str, body: &str) -> String {
        let length = body.len();
        let head = format!("POST /v1/echo HTTP/1.1\r\nhost: localhost\r\n{kind}content-length: {length}\r\n");
        running.raw_with_body(&head, body).await
    }

    #[tokio::test]
    async fn a_body_that_cannot_be_read_says_where() {
        const JSON: &str = "content-type: application/json; charset=utf-8\r\n";
        let running = tcp().await;
        assert!(posted(&running, JSON, r#"{"reference":"m"}"#).await.starts_with("HTTP/1.1 200 "));
        for (kind, body, says) in [
            (JSON, "{\"reference\": \n oops}", "line 2 column 2"),
            (JSON, r#"{"reference":"m","inclde":[]}"#, "unknown field `inclde`, expected one of"),
            (JSON, r#"{"reference":7}"#, "invalid type: integer `7`, expected a string"),
            (JSON, "{}", "missing field `reference`"),
            (JSON, "", "EOF"),
            ("", r#"{"reference":"m"}"#, "its content type is `nothing`"),
            ("content-type: text/plain\r\n", r#"{"reference":"m"}"#, "its content type is `text/plain`"),
        ] {
            let body = problem(&posted(&running, kind, body).await);
            assert_eq!((body.status, body.code.as_str()), (400, "bad-request"));
            assert!(
                body.detail.starts_with("cannot read the request body: ") && body.detail.contains(says),
                "{body:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_body_over_the_limit_is_refused() {
        let running = tcp().await;
        let body = format!(r#"{{"reference":"{}"}}"#, "x".repeat(MAX_BODY_BYTES));
        let body = problem(&posted(&running, "content-type: application/json\r\n", &body).await);
        assert_eq!(body.code, "bad-request");
        assert!(body.detail.contains("larger than 65536 bytes"), "{}", body.detail);
    }

    #[tokio::test]
    async fn names_are_decoded_and_queries_are_strict() {
        let running = tcp().await;
        let get = async |path: &str| running.raw(&format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n")).await;
        assert!(get("/v1/name/hf:%2F%2Fo%2Fn@main%23include=a").await.ends_with("\r\nhf://o/n@main#include=a"));
        assert_eq!(problem(&get("/v1/name/%ff").await).code, "bad-request");
        assert!(get("/v1/query?reference=a%2Fb").await.ends_with("\r\na/b"));
        let body = problem(&get("/v1/query?referense=a").await);
        assert!(body.code == "bad-request" && body.detail.contains("referense"), "{body:?}");
    }

    fn headers(pairs: &[(HeaderName, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(name, HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn a_host_name_that_a_web_page_could_have_is_refused_on_tcp() {
        let allowed = |via, hosts: &[&'static str]| {
            let hosts: Vec<_> = hosts.iter().map(|host| (header::HOST, *host)).collect();
            guard(via, &Method::GET, &Uri::from_static("/v1/models"), &headers(&hosts)).is_ok()
        };
        for host in ["localhost", "LOCALHOST:80", "127.0.0.1:7070", "[::1]", "[::1]:7070", "10.1.2.3:7070"] {
            assert!(allowed(Via::Tcp, &[host]), "{host}");
        }
        for host in ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "localhost:x", "::1", ""] {
            assert!(!allowed(Via::Tcp, &[host]), "{host}");
            assert!(allowed(Via::Unix, &[host]), "{host}");
        }
        assert!(!allowed(Via::Tcp, &[]));
        assert!(!allowed(Via::Tcp, &["localhost", "evil.example"]));
        let uri = Uri::from_static("http://evil.example/v1/models");
        assert!(guard(Via::Tcp, &Method::GET, &uri, &headers(&[(header::HOST, "localhost")])).is_err());
    }

    #[test]
    fn a_web_page_of_another_machine_changes_nothing() {
        let allowed = |via, method: &Method, origin| {
            let headers = headers(&[(header::HOST, "localhost"), (header::ORIGIN, origin)]);
            guard(via, method, &Uri::from_static("/v1/pulls"), &headers).is_ok()
        };
        for origin in ["https://evil.example", "null", "http://10.1.2.3", "http://localhost.evil.example", "file://"] {
            assert!(!allowed(Via::Tcp, &Method::POST, origin), "{origin}");
            assert!(!allowed(Via::Tcp, &Method::DELETE, origin), "{origin}");
            assert!(allowed(Via::Tcp, &Method::GET, origin), "{origin}");
            assert!(allowed(Via::Unix, &Method::POST, origin), "{origin}");
        }
        for origin in ["http://localhost:3000", "https://127.0.0.1", "http://[::1]:80"] {
            assert!(allowed(Via::Tcp, &Method::POST, origin), "{origin}");
        }
    }

    #[tokio::test]
    async fn the_guard_answers_with_a_problem_and_only_on_tcp() {
        let running = tcp().await;
        let body = problem(&running.raw("GET /v1/later HTTP/1.1\r\nhost: evil.example\r\n").await);
        assert_eq!((body.status, body.code.as_str()), (403, "policy-denied"));
    }
}

//! How `object_store` sends a request: behind the [`HostGate`], without redirects, and with typed refusals.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use futures::StreamExt;
use http_body_util::BodyExt;
use hyper_util::client::proxy::matcher::Matcher;
use object_store::ClientOptions;
use object_store::client::{
    ClientConfigKey, HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody,
    HttpService,
};
use reqwest::header::{CONTENT_TYPE, LOCATION, RANGE};
use reqwest::{Certificate, Method, NoProxy, Proxy};
use rustls::pki_types::CertificateDer;

use super::super::*;
use http::{Answer, DirectBody, DirectClient};

/// How much of a refusal's body is read for its code, in bytes.
const MAX_REFUSAL_BYTES: usize = 8 * 1024;

/// Hosts of the clouds' own metadata services: link-local, so never behind a proxy.
const METADATA_HOSTS: &str = "169.254.0.0/16,metadata.google.internal,fd00:ec2::/32";

/// Makes the clients of one store.
pub(super) struct Connector {
    /// Host, with its port if it has one, that answers for the bucket. Other hosts are asked for credentials only.
    pub(super) host: String,
    /// The bucket, because some endpoints put it before the host.
    pub(super) bucket: String,
    pub(super) gate: Arc<HostGate>,
    pub(super) connect_timeout: Duration,
    pub(super) stall_timeout: Duration,
    pub(super) certificates: Vec<CertificateDer<'static>>,
    pub(super) proxies: Proxies,
    /// Set when a host gave us a credential that the environment does not hold.
    pub(super) was_given_credential: Arc<AtomicBool>,
}

/// Why a request failed, in a form that survives being wrapped by `object_store`.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum Cause {
    /// The store answered, but not with what was asked for.
    #[error("`{}` answered {}", .0.host, .0.status)]
    Refused(Refusal),
    /// The store did not answer.
    #[error("`{host}`: {detail}")]
    Unreachable { host: String, step: Step, detail: String },
    /// A page that has nothing to do with a bucket, as a captive portal or a proxy sends it.
    #[error("`{host}` answered {content_type} where a listing was asked for")]
    NotAListing { host: String, content_type: String },
    /// A host that gives credentials gave none.
    #[error("`{host}`: {detail}")]
    NoCredential { host: String, detail: String },
}

/// What an answer other than success says. Never its words: they can hold the request's signature.
#[derive(Debug, Clone)]
pub(super) struct Refusal {
    pub(super) host: String,
    pub(super) status: u16,
    /// The service's own code (`SlowDown`, `AuthorizationFailure`).
    pub(super) code: Option<String>,
    /// The region the bucket is in, if it said so.
    pub(super) region: Option<String>,
    /// The host a redirect leads to.
    pub(super) location: Option<String>,
    pub(super) retry_after: Option<Duration>,
}

/// The cause this module gave, below whatever was put around it.
pub(super) fn cause_of(error: &object_store::Error) -> Option<&Cause> {
    causes(error).find_map(|e| e.downcast_ref::<Cause>())
}

/// Whether the connection broke while a body was read, and how.
pub(super) fn broken_body(error: &object_store::Error) -> Option<Step> {
    let broken = causes(error).find_map(|e| e.downcast_ref::<HttpError>())?;
    Some(if broken.kind() == HttpErrorKind::Timeout { Step::Timeout } else { Step::Connect })
}

/// The proxies of an environment.
pub(super) struct Proxies {
    through: Vec<Proxy>,
    /// Which requests go through one of them.
    matcher: Arc<Matcher>,
}

/// The proxies of the environment, as every HTTP client reads them.
pub(super) fn proxies(environment: &Environment) -> Result<Proxies, String> {
    let either = |name: &str| environment.get(&name.to_ascii_lowercase()).or_else(|| environment.get(name));
    let exempt = format!("{},{METADATA_HOSTS}", either("NO_PROXY").unwrap_or_default());
    let mut through = Vec::new();
    type Make = fn(String) -> reqwest::Result<Proxy>;
    let kinds: [(&str, Make); 3] =
        [("HTTPS_PROXY", Proxy::https), ("HTTP_PROXY", Proxy::http), ("ALL_PROXY", Proxy::all)];
    for (name, make) in kinds {
        if let Some(url) = either(name) {
            let proxy = make(url.to_owned()).map_err(|_| format!("`{name}` is not the URL of a proxy"))?;
            through.push(proxy.no_proxy(NoProxy::from_string(&exempt)));
        }
    }
    let of = |name: &str| either(name).unwrap_or_default().to_owned();
    let matcher = Matcher::builder().https(of("HTTPS_PROXY")).http(of("HTTP_PROXY")).all(of("ALL_PROXY")).no(exempt);
    Ok(Proxies { through, matcher: Arc::new(matcher.build()) })
}

impl std::fmt::Debug for Connector {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connector").field("host", &self.host).finish_non_exhaustive()
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        // `object_store` shortens the connection time-out for metadata services, which are near or not there at all.
        let connect_timeout = options
            .get_config_value(&ClientConfigKey::ConnectTimeout)
            .and_then(|text| humantime::parse_duration(&text).ok())
            .map_or(self.connect_timeout, |near| near.min(self.connect_timeout));
        let allow_http = options.get_config_value(&ClientConfigKey::AllowHttp).as_deref() == Some("true");
        let mut builder = http::builder(connect_timeout)
            .https_only(!allow_http)
            .read_timeout(self.stall_timeout)
            .tls_certs_merge(self.certificates.iter().filter_map(|der| Certificate::from_der(der).ok()))
            .no_proxy();
        for proxy in &self.proxies.through {
            builder = builder.proxy(proxy.clone());
        }
        let http = builder.build().map_err(|e| object_store::Error::Generic { store: "TLS", source: Box::new(e) })?;
        let direct = DirectClient::new(connect_timeout, self.certificates.clone(), self.proxies.matcher.clone());
        Ok(HttpClient::new(Requests {
            http,
            direct,
            stall_timeout: self.stall_timeout,
            host: self.host.clone(),
            bucket: self.bucket.clone(),
            gate: self.gate.clone(),
            was_given_credential: self.was_given_credential.clone(),
        }))
    }
}

struct Requests {
    http: reqwest::Client,
    /// For the bytes of objects.
    direct: DirectClient,
    stall_timeout: Duration,
    host: String,
    bucket: String,
    gate: Arc<HostGate>,
    was_given_credential: Arc<AtomicBool>,
}

impl std::fmt::Debug for Requests {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Requests").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Requests {
    /// Whether a request is for the bucket. We only ever read, so everything else asks for a credential.
    fn is_for_the_bucket(&self, host: &str, method: &Method) -> bool {
        let ours = host == self.host || host.strip_prefix(&self.bucket).is_some_and(|rest| rest.starts_with('.'));
        ours && (method == Method::GET || method == Method::HEAD)
    }
}

#[async_trait]
impl HttpService for Requests {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let host = request.uri().authority().map(|a| a.as_str().to_owned()).unwrap_or_default();
        let for_the_bucket = self.is_for_the_bucket(&host, request.method());
        let lists = request.uri().query().is_some_and(|q| q.contains("list-type=2") || q.contains("comp=list"));
        // With this answer the metadata service sends its clients to its older version.
        let may_be_refused = request.method() == Method::PUT && request.uri().path() == "/latest/api/token";
        self.gate.wait(&host).await;
        // The bytes of an object are many; all other bodies are small.
        let is_of_bytes = for_the_bucket && request.method() == Method::GET && request.headers().contains_key(RANGE);
        let answered = match is_of_bytes && self.direct.reaches(request.uri()) {
            true => get_directly(&self.direct, request, self.stall_timeout).await,
            false => HttpService::call(&self.http, request).await,
        };
        let response = match answered {
            Ok(response) => response,
            Err(error) => {
                let kind = error.kind();
                let detail = http::deepest(&error);
                let cause = if for_the_bucket {
                    Cause::Unreachable { host, step: Step::of(&error), detail }
                } else {
                    Cause::NoCredential { host, detail }
                };
                return Err(HttpError::new(kind, cause));
            }
        };
        let status = response.status();
        let retry_after = gate::asked_to_wait(response.headers(), status);
        if let Some(wait) = retry_after {
            self.gate.note(&host, wait);
        }
        // An HTML page parses as a listing without objects.
        let content_type = response.headers().get(CONTENT_TYPE).and_then(|v| v.to_str().ok()).unwrap_or_default();
        if for_the_bucket && lists && status.is_success() && !content_type.is_empty() && !content_type.contains("xml") {
            let content_type = http::quoted(content_type);
            return Err(HttpError::new(HttpErrorKind::Unknown, Cause::NotAListing { host, content_type }));
        }
        if status.is_success() || may_be_refused {
            if !for_the_bucket {
                self.was_given_credential.store(true, Ordering::Relaxed);
            }
            return Ok(response);
        }
        let cause = if for_the_bucket {
            Cause::Refused(Refusal::read(host, retry_after, response).await)
        } else {
            Cause::NoCredential { host, detail: format!("answered {}", status.as_u16()) }
        };
        Err(HttpError::new(HttpErrorKind::Unknown, cause))
    }
}

/// A body that is still in its connection, beside an answer that has none: a store knows nothing of such bodies.
#[derive(Clone)]
pub(super) struct Apart(Arc<Mutex<Option<Box<DirectBody>>>>);

impl Apart {
    /// The body, once.
    pub(super) fn take(&self) -> Option<Box<DirectBody>> {
        self.0.lock().expect("no panic while a body is taken").take()
    }
}

async fn get_directly(
    direct: &DirectClient,
    request: HttpRequest,
    answer_timeout: Duration,
) -> Result<HttpResponse, HttpError> {
    let failed = |error: http::BoxError| HttpError::new_boxed(HttpErrorKind::Request, error);
    let answer = tokio::time::timeout(answer_timeout, direct.get(request.uri(), request.headers())).await;
    let answer = answer.map_err(|_| failed(std::io::Error::from(std::io::ErrorKind::TimedOut).into()))?;
    Ok(match answer.map_err(failed)? {
        Answer::Direct(answer) => {
            let (mut head, body) = answer.into_parts();
            head.extensions.insert(Apart(Arc::new(Mutex::new(Some(body)))));
            HttpResponse::from_parts(head, Bytes::new().into())
        }
        Answer::Through(answer) => {
            answer.map(|body| HttpResponseBody::new(body.map_err(|e| HttpError::new(HttpErrorKind::Interrupted, e))))
        }
    })
}

impl Refusal {
    async fn read(host: String, retry_after: Option<Duration>, response: HttpResponse) -> Refusal {
        let (parts, body) = response.into_parts();
        let header = |name: &str| parts.headers.get(name).and_then(|v| v.to_str().ok()).and_then(word);
        let location = parts.headers.get(LOCATION).and_then(|v| v.to_str().ok()).and_then(|location| {
            url::Url::parse(location).ok().map(|url| gate::authority(&url)).filter(|host| !host.is_empty())
        });
        let mut text = Vec::new();
        let mut chunks = body.bytes_stream();
        while text.len() < MAX_REFUSAL_BYTES
            && let Some(Ok(chunk)) = chunks.next().await
        {
            text.extend_from_slice(&chunk[..chunk.len().min(MAX_REFUSAL_BYTES - text.len())]);
        }
        let text = String::from_utf8_lossy(&text);
        Refusal {
            host,
            status: parts.status.as_u16(),
            code: header("x-ms-error-code").or_else(|| element(&text, "Code").and_then(word)),
            region: header("x-amz-bucket-region").or_else(|| element(&text, "Region").and_then(word)),
            location,
            retry_after,
        }
    }
}

/// The text of the first XML element of this name.
fn element<'a>(xml: &'a str, name: &str) -> Option<&'a str> {
    let rest = xml.split_once(&format!("<{name}>"))?.1;
    Some(rest.split_once(&format!("</{name}>"))?.0)
}

/// A code or a region: one short word, or nothing.
fn word(text: &str) -> Option<String> {
    let text = text.trim();
    let plain = !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    plain.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_words_of_an_answer_are_kept() {
        let body = "<Error><Code>SignatureDoesNotMatch</Code><StringToSign>AWS4 secret</StringToSign></Error>";
        assert_eq!(element(body, "Code").and_then(word).as_deref(), Some("SignatureDoesNotMatch"));
        assert_eq!(element(body, "Region"), None);
        for hostile in ["", "two words", "<b>", &"x".repeat(65), "a\nb"] {
            assert_eq!(word(hostile), None, "{hostile:?}");
        }
    }

    #[test]
    fn requests_that_are_not_for_the_bucket_ask_for_credentials() {
        let requests = Requests {
            http: reqwest::Client::new(),
            direct: DirectClient::new(Duration::ZERO, Vec::new(), Arc::new(Matcher::builder().build())),
            stall_timeout: Duration::ZERO,
            host: "s3.example.com:9000".into(),
            bucket: "models".into(),
            gate: Arc::default(),
            was_given_credential: Arc::default(),
        };
        assert!(requests.is_for_the_bucket("s3.example.com:9000", &Method::GET));
        assert!(requests.is_for_the_bucket("models.s3.example.com:9000", &Method::HEAD));
        assert!(!requests.is_for_the_bucket("s3.example.com:9000", &Method::POST), "STS at the same endpoint");
        assert!(!requests.is_for_the_bucket("169.254.169.254", &Method::GET));
        assert!(!requests.is_for_the_bucket("models-evil.example.com", &Method::GET));
    }
}

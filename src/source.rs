//! Places that resolve a reference and stream its files.
//!
//! A [`Source`] only claims and streams: it does not retry, does not write, and does not decide. Each stream it opens is
//! checked while it flows: status, Content-Range, length and pin must be what was asked for, so that a body is either
//! exactly the range, or an error. [`retry`] resumes broken streams at the byte where they broke.

mod environment;
mod file;
mod gate;
mod hf;
pub mod http;
mod object;
mod reader;
mod retry;
mod web;

use std::borrow::Cow;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures::Stream;

use crate::fault::{Code, Diagnose};
use crate::model::{ListedFile, Listing, ListingError, Location, ModelRef};

pub use environment::Environment;
pub use gate::{HostGate, MAX_RETRY_AFTER, OnGate, telling_of_gates};
use reader::Pieces;
pub use reader::RangeReader;
pub use retry::{Attempt, OnWait, RetryPolicy};

/// A place that resolves one reference and streams its files.
#[async_trait]
pub trait Source: Send + Sync {
    /// Asks which version and which files the reference means now. Only files the reference takes are listed.
    async fn resolve(&self) -> Result<Listing, Error>;

    /// Opens `range` of a file of a listing this source gave. The range is not empty and lies within the file.
    async fn fetch(&self, file: &ListedFile, range: Range<u64>) -> Result<Box<dyn RangeReader>, Error>;
}

/// What the sources are configured with. Credentials and endpoints come from each ecosystem's own environment variables.
#[derive(Debug, Clone)]
pub struct SourceConfig {
    /// Longest time to establish a connection.
    pub connect_timeout: Duration,
    /// Longest time with (almost) no byte, before a stream is dropped and resumed.
    pub stall_timeout: Duration,
    /// A directory of variables that go before those of the process. It is read again for each source, so that a new
    /// credential needs no restart.
    pub environment: Option<PathBuf>,
}

impl Default for SourceConfig {
    fn default() -> SourceConfig {
        let (connect_timeout, stall_timeout) = (Duration::from_secs(10), Duration::from_secs(30));
        SourceConfig { connect_timeout, stall_timeout, environment: None }
    }
}

/// Makes the [`Source`] of a reference. Holds the connections that sources share.
pub struct Sources {
    /// Made when first needed: to load the certificates takes longer than to list the models.
    http: OnceLock<http::Client>,
    config: SourceConfig,
    environment: Environment,
}

impl Sources {
    /// Nothing is connected yet.
    pub fn new(config: SourceConfig, environment: Environment) -> Sources {
        Sources { http: OnceLock::new(), config, environment }
    }

    /// The source of a reference. Fails if the TLS stack cannot be set up, or if the environment is unusable. Reads small
    /// files.
    pub fn open(&self, reference: &ModelRef) -> Result<Box<dyn Source>, Error> {
        Ok(match reference.location() {
            Location::Hub { .. } => Box::new(hf::Hub::new(reference, self.http()?, &*self.environment(reference)?)?),
            Location::Bucket { .. } => {
                let environment = self.environment(reference)?;
                Box::new(object::Bucket::new(reference, &self.config, self.http()?.gate(), &environment)?)
            }
            Location::Web { .. } => Box::new(web::Web::new(reference, self.http()?)),
            Location::Directory { .. } => Box::new(file::Directory::new(reference)),
        })
    }

    fn environment(&self, reference: &ModelRef) -> Result<Cow<'_, Environment>, Error> {
        let Some(directory) = &self.config.environment else { return Ok(Cow::Borrowed(&self.environment)) };
        let misconfigured = |detail| Error::Misconfigured { what: reference.to_string(), detail };
        self.environment.over(directory).map(Cow::Owned).map_err(misconfigured)
    }

    fn http(&self) -> Result<&http::Client, Error> {
        match self.http.get() {
            Some(client) => Ok(client),
            None => {
                let client = http::Client::new(&self.config)?;
                // Who was faster made the one that all share.
                Ok(self.http.get_or_init(|| client))
            }
        }
    }
}

/// An error, and below it one cause after the other.
fn causes<'a>(
    error: &'a (dyn std::error::Error + 'static),
) -> impl Iterator<Item = &'a (dyn std::error::Error + 'static)> {
    std::iter::successors(Some(error), |e| e.source())
}

/// Which step of reaching a source failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The host's name has no address.
    Dns,
    /// No connection, or it broke.
    Connect,
    /// The certificate or the handshake.
    Tls,
    /// The proxy.
    Proxy,
    /// No answer in time.
    Timeout,
}

impl Step {
    /// The step that an error of an HTTP library or of the system is from: they say so only in words.
    fn of(error: &(dyn std::error::Error + 'static)) -> Step {
        let words: Vec<_> = causes(error).map(|e| e.to_string().to_ascii_lowercase()).collect();
        let says = |marks: &[&str]| words.iter().any(|words| marks.iter().any(|mark| words.contains(mark)));
        let timed_out = |e: &(dyn std::error::Error + 'static)| match e.downcast_ref::<std::io::Error>() {
            Some(e) => e.kind() == std::io::ErrorKind::TimedOut,
            None => e.downcast_ref::<reqwest::Error>().is_some_and(reqwest::Error::is_timeout),
        };
        if says(&["tunnel error", "socks error", "proxy"]) {
            Step::Proxy
        } else if says(&["dns error", "failed to lookup address"]) {
            Step::Dns
        } else if says(&["certificate", "tls", "handshake", "fatal alert", "corrupt message", "invalidmessage"]) {
            Step::Tls
        } else if says(&["timed out"]) || causes(error).any(timed_out) {
            Step::Timeout
        } else {
            Step::Connect
        }
    }

    /// The step in words.
    pub fn text(self) -> &'static str {
        match self {
            Step::Dns => "name resolution",
            Step::Connect => "the connection",
            Step::Tls => "the TLS handshake",
            Step::Proxy => "the proxy",
            Step::Timeout => "waiting for an answer",
        }
    }
}

/// Why a source did not give what was asked for. `what` is a reference or a file of one, never a signed URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// 401 or 403, and no credential was sent.
    #[error("cannot read `{what}`: it is private, gated or does not exist, and no credential is configured")]
    AuthMissing {
        /// What was asked for.
        what: String,
        /// How to configure a credential for this kind of source.
        action: String,
    },
    /// The credential was rejected.
    #[error("cannot read `{what}`: the credential from {origin} is rejected ({detail})")]
    AuthInvalid {
        /// What was asked for.
        what: String,
        /// Where the credential was found: a variable, a file.
        origin: String,
        /// The source's own words, shortened.
        detail: String,
    },
    /// The credential works, but its account has not accepted the licence.
    #[error("cannot read `{what}`: the account {account} has not been granted access to it")]
    LicenceNotAccepted {
        /// What was asked for.
        what: String,
        /// Its name, quoted, or whose it is.
        account: String,
        /// The page on which access is asked for.
        url: String,
    },
    /// The repository, bucket, prefix or URL does not exist.
    #[error("cannot find `{what}`: {detail}")]
    RepoNotFound {
        /// What was asked for.
        what: String,
        /// What was found.
        detail: String,
    },
    /// The repository has no such revision.
    #[error("cannot find revision `{revision}` of `{what}`")]
    RevisionNotFound {
        /// The repository.
        what: String,
        /// The revision that was asked for.
        revision: String,
        /// Some it has, if it said.
        known: Vec<String>,
    },
    /// A listed file is not there.
    #[error("cannot find `{what}`: the source lists it, but does not have it")]
    FileNotFound {
        /// The file.
        what: String,
    },
    /// The reference selects no file.
    #[error("cannot pull `{what}`: the selection leaves none of its {listed} files")]
    NothingSelected {
        /// The reference.
        what: String,
        /// Files before the selection.
        listed: usize,
    },
    /// 429, or a 503 that names a time.
    #[error("cannot read `{what}`: `{host}` limits the rate of requests")]
    RateLimited {
        /// What was asked for.
        what: String,
        /// Who limits.
        host: String,
        /// When it may be asked again, if it said; bounded by [`MAX_RETRY_AFTER`].
        retry_after: Option<Duration>,
    },
    /// It could not be reached.
    #[error("cannot reach `{host}`: {} failed: {detail}", step.text())]
    Unreachable {
        /// Who.
        host: String,
        /// Which step.
        step: Step,
        /// The cause.
        detail: String,
    },
    /// A 5xx.
    #[error("cannot read `{what}`: `{host}` answered {status}")]
    Server {
        /// What was asked for.
        what: String,
        /// Who answered.
        host: String,
        /// The status.
        status: u16,
    },
    /// Too few bytes for too long: fewer than [`RetryPolicy::MIN_STALL_BYTES`].
    #[error("cannot read `{what}`: it stalled: almost nothing came for {seconds} s")]
    Stalled {
        /// The file.
        what: String,
        /// How long was waited.
        seconds: u64,
    },
    /// The body ended early or the connection broke in it.
    #[error("cannot read `{what}`: the body ended after {got} of {expected} bytes")]
    Truncated {
        /// The file.
        what: String,
        /// Bytes of the range.
        expected: u64,
        /// Bytes that came.
        got: u64,
    },
    /// The body is longer than the range.
    #[error("cannot read `{what}`: the body is longer than the {expected} bytes that were asked for")]
    Overlong {
        /// The file.
        what: String,
        /// Bytes of the range.
        expected: u64,
    },
    /// The file is another one than the listing names.
    #[error("cannot pull `{what}`: it changed at the source: it was {began}, now it is {now}")]
    Changed {
        /// The file.
        what: String,
        /// The pin or size of the listing.
        began: String,
        /// What the source has now.
        now: String,
    },
    /// It answered, but not as its protocol says it must.
    #[error("cannot read `{what}`: {detail}")]
    Protocol {
        /// What was asked for.
        what: String,
        /// What was wrong with the answer.
        detail: String,
    },
    /// The listing cannot become a directory.
    #[error("cannot pull `{what}`: {why}")]
    Listing {
        /// The reference.
        what: String,
        /// What is wrong with it.
        why: ListingError,
    },
    /// Offline mode is on.
    #[error("cannot ask for `{what}`: `{variable}` is set, so no request is made")]
    Offline {
        /// The reference.
        what: String,
        /// The variable that turned it on.
        variable: &'static str,
    },
    /// Redirects to a place they may not lead to, or too many.
    #[error("cannot follow the redirect of `{what}` to `{host}`: {why}")]
    Redirect {
        /// What was asked for.
        what: String,
        /// The host it leads to.
        host: String,
        /// Why it is refused.
        why: &'static str,
    },
    /// The environment of the source cannot be used.
    #[error("cannot set up the source of `{what}`: {detail}")]
    Misconfigured {
        /// The reference.
        what: String,
        /// What is wrong.
        detail: String,
    },
    /// A local directory could not be read.
    #[error("cannot read `{what}`: {detail}")]
    Io {
        /// The path.
        what: String,
        /// The system's words.
        detail: String,
    },
}

/// Whether another attempt makes sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Retry {
    /// The answer will be the same.
    Never,
    /// After a pause that grows with each attempt.
    Backoff,
    /// Not before this time has passed.
    After(Duration),
}

impl Error {
    /// Whether another attempt makes sense. A change is not retried here: the pull starts again from the listing.
    pub fn retry(&self) -> Retry {
        match self {
            Error::RateLimited { retry_after: Some(wait), .. } => Retry::After(*wait),
            Error::RateLimited { .. }
            | Error::Unreachable { .. }
            | Error::Server { .. }
            | Error::Stalled { .. }
            | Error::Truncated { .. } => Retry::Backoff,
            // A server that is confused once (a proxy's page, a wrong range) is often right the next time.
            Error::Overlong { .. } | Error::Protocol { .. } => Retry::Backoff,
            _ => Retry::Never,
        }
    }
}

impl Diagnose for Error {
    fn code(&self) -> Code {
        match self {
            Error::AuthMissing { .. } => Code::AuthMissing,
            Error::AuthInvalid { .. } => Code::AuthInvalid,
            Error::LicenceNotAccepted { .. } => Code::LicenceNotAccepted,
            Error::RepoNotFound { .. } => Code::RepoNotFound,
            Error::RevisionNotFound { .. } => Code::RevisionNotFound,
            Error::FileNotFound { .. } => Code::FileNotFound,
            Error::NothingSelected { .. } => Code::NothingSelected,
            Error::RateLimited { .. } => Code::RateLimited,
            Error::Unreachable { .. } | Error::Stalled { .. } | Error::Truncated { .. } => Code::SourceUnreachable,
            Error::Server { .. } | Error::Overlong { .. } | Error::Protocol { .. } | Error::Redirect { .. } => {
                Code::SourceProtocol
            }
            Error::Changed { .. } => Code::SourceChanged,
            Error::Listing { .. } => Code::UnsafeName,
            Error::Offline { .. } => Code::Offline,
            Error::Misconfigured { .. } => Code::ConfigInvalid,
            Error::Io { .. } => Code::SourceUnreachable,
        }
    }

    fn action(&self) -> String {
        match self {
            Error::AuthMissing { action, .. } => action.clone(),
            Error::AuthInvalid { origin, .. } => {
                format!(
                    "replace the credential in {origin}; a file is read again at the next pull, a variable at the next start"
                )
            }
            Error::LicenceNotAccepted { url, .. } => {
                format!("ask for access at {url} with that account, then pull again")
            }
            Error::RepoNotFound { .. } => {
                "check the spelling, and that we may see it from here, with the credentials we have".into()
            }
            Error::RevisionNotFound { known, .. } if !known.is_empty() => format!("it has {}", known.join(", ")),
            Error::RevisionNotFound { .. } => "check the spelling of the branch, tag or commit".into(),
            Error::FileNotFound { .. } => "pull again; if it stays away, ask the owner of the source".into(),
            Error::NothingSelected { .. } => "check the patterns of `--include` and `--exclude`".into(),
            Error::RateLimited { retry_after: Some(wait), .. } => {
                let at = humantime::format_rfc3339_seconds(SystemTime::now() + *wait);
                format!("pull again after {at}; a token or a mirror raises the limit")
            }
            Error::RateLimited { .. } => "pull again in some minutes; a token or a mirror raises the limit".into(),
            Error::Unreachable { step, .. } => match step {
                Step::Dns => "check the spelling of the host, DNS and any NetworkPolicy".into(),
                Step::Connect => "check that the host is up, HTTPS_PROXY, NO_PROXY and any NetworkPolicy".into(),
                Step::Tls => "check the certificate, and SSL_CERT_FILE if a private CA signs it".into(),
                Step::Proxy => "check HTTPS_PROXY and NO_PROXY".into(),
                Step::Timeout => "check that the host answers, HTTPS_PROXY and any NetworkPolicy".into(),
            },
            Error::Server { .. } | Error::Stalled { .. } | Error::Truncated { .. } => {
                "pull again: it goes on where it stopped; if it stays so, ask the owner of the source".into()
            }
            Error::Overlong { .. } | Error::Protocol { .. } => {
                "look for a proxy or a gateway in between that changes answers; then pull again".into()
            }
            Error::Redirect { .. } => "check the endpoint, and ask the owner of the source".into(),
            Error::Changed { .. } => "pull again: the new version is taken as a whole".into(),
            Error::Listing { .. } => "ask the owner of the source to rename the file".into(),
            Error::Offline { variable, .. } => format!("unset `{variable}`, or pull on a machine with a network"),
            Error::Misconfigured { .. } => {
                "correct it: a file is read again at the next pull, a variable of the process at the next start".into()
            }
            Error::Io { .. } => "check that the directory exists and that this user may read it".into(),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Error::RateLimited { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

//! What an error must say: what happened, whose it is to fix, and what to do.
//!
//! Each module of rank 3 and up has its own error enum whose variants carry values. All of them implement [`Diagnose`],
//! and the doors render that: nobody else formats an error for a person. A [`Problem`] is the same thing owned, so that
//! one failure can be told to every waiter and cross a process.

use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// The classes of failure. Closed: adding one breaks the build wherever it must be handled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fault {
    /// The request is wrong.
    Invalid,
    /// The source or we do not have it.
    NotFound,
    /// Token, licence or policy.
    Denied,
    /// Quota or disk, now.
    Full,
    /// A limit of ours, draining, or not ready yet.
    Busy,
    /// The source failed or is slow.
    Upstream,
    /// Bytes differ from their digest or checksum.
    Corrupt,
    /// Our configuration or the node.
    Misconfigured,
    /// The asker took it back.
    Cancelled,
    /// A bug.
    Internal,
}

impl Fault {
    /// Every fault, in the order of the documentation.
    pub const ALL: [Fault; 10] = [
        Fault::Invalid,
        Fault::NotFound,
        Fault::Denied,
        Fault::Full,
        Fault::Busy,
        Fault::Upstream,
        Fault::Corrupt,
        Fault::Misconfigured,
        Fault::Cancelled,
        Fault::Internal,
    ];

    /// HTTP status (RFC 9110; 507 is from RFC 4918).
    pub fn http_status(self) -> u16 {
        match self {
            Fault::Invalid => 400,
            Fault::NotFound => 404,
            Fault::Denied => 403,
            Fault::Full => 507,
            Fault::Busy => 503,
            Fault::Upstream => 502,
            Fault::Corrupt => 503,
            Fault::Misconfigured => 500,
            Fault::Cancelled => 409,
            Fault::Internal => 500,
        }
    }

    /// Exit code of the command line (sysexits.h; 130 is a shell's code for an interrupted command).
    pub fn exit_code(self) -> u8 {
        match self {
            Fault::Invalid => 65,
            Fault::NotFound => 66,
            Fault::Denied => 77,
            Fault::Full => 73,
            Fault::Busy => 75,
            Fault::Upstream => 69,
            Fault::Corrupt => 74,
            Fault::Misconfigured => 78,
            Fault::Cancelled => 130,
            Fault::Internal => 70,
        }
    }

    /// Label value in metrics and logs.
    pub fn label(self) -> &'static str {
        match self {
            Fault::Invalid => "invalid",
            Fault::NotFound => "not-found",
            Fault::Denied => "denied",
            Fault::Full => "full",
            Fault::Busy => "busy",
            Fault::Upstream => "upstream",
            Fault::Corrupt => "corrupt",
            Fault::Misconfigured => "misconfigured",
            Fault::Cancelled => "cancelled",
            Fault::Internal => "internal",
        }
    }
}

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal => $fault:ident,)*) => {
        /// The stable code of each failure. Part of the contract: scripts and alerts match on it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum Code {
            $($(#[$doc])* #[serde(rename = $text)] $variant,)*
        }

        impl Code {
            /// Every code, in the order of the documentation.
            pub const ALL: &'static [Code] = &[$(Code::$variant,)*];

            /// The code as it is printed.
            pub fn text(self) -> &'static str {
                match self { $(Code::$variant => $text,)* }
            }

            /// The class the code belongs to.
            pub fn fault(self) -> Fault {
                match self { $(Code::$variant => Fault::$fault,)* }
            }
        }
    };
}

codes! {
    /// A model reference has an unknown scheme or breaks the grammar.
    BadReference = "bad-reference" => Invalid,
    /// A request body, query or path of the API cannot be read.
    BadRequest = "bad-request" => Invalid,
    /// A pattern of `--include` or `--exclude` cannot be read.
    BadPattern = "bad-pattern" => Invalid,
    /// The selection leaves no file to pull.
    NothingSelected = "nothing-selected" => Invalid,
    /// The repository, bucket, prefix or URL does not exist at the source.
    RepoNotFound = "repo-not-found" => NotFound,
    /// The repository exists, the revision does not.
    RevisionNotFound = "revision-not-found" => NotFound,
    /// A file of the listing is not there.
    FileNotFound = "file-not-found" => NotFound,
    /// The model is not local.
    NotLocal = "not-local" => NotFound,
    /// No pull has this id.
    PullNotFound = "pull-not-found" => NotFound,
    /// No lease has this id, or none is known of the pod.
    LeaseNotFound = "lease-not-found" => NotFound,
    /// The reference is not pinned.
    NotPinned = "not-pinned" => NotFound,
    /// No warm-up has this id.
    WarmNotFound = "warm-not-found" => NotFound,
    /// No scrub has this id.
    ScrubNotFound = "scrub-not-found" => NotFound,
    /// The cluster has no node that was meant.
    NodeNotFound = "node-not-found" => NotFound,
    /// The cluster has no larder where it was looked for.
    DaemonNotFound = "daemon-not-found" => NotFound,
    /// The path of the API does not exist.
    RouteNotFound = "route-not-found" => NotFound,
    /// 401 or 403 and no credential was sent.
    AuthMissing = "auth-missing" => Denied,
    /// The credential was rejected.
    AuthInvalid = "auth-invalid" => Denied,
    /// The account has not accepted the model's licence.
    LicenceNotAccepted = "licence-not-accepted" => Denied,
    /// The API is asked over the network without a token of a ServiceAccount that is good for it.
    TokenRefused = "token-refused" => Denied,
    /// A rule of ours forbids it.
    PolicyDenied = "policy-denied" => Denied,
    /// The model does not fit in what is free now.
    VolumeFull = "volume-full" => Full,
    /// The model is larger than the quota.
    NeverFits = "never-fits" => Full,
    /// The model is still being pulled.
    NotReady = "not-ready" => Busy,
    /// Somebody holds a lease on the model, or it is pinned.
    ModelInUse = "model-in-use" => Busy,
    /// As many pulls are under way as we allow.
    TooManyPulls = "too-many-pulls" => Busy,
    /// As many connections, leases or pins are held as we allow.
    TooManyHolders = "too-many-holders" => Busy,
    /// The daemon is shutting down.
    Draining = "draining" => Busy,
    /// The disk takes calls and does not answer.
    DiskStalled = "disk-stalled" => Busy,
    /// Another process holds the volume.
    VolumeLocked = "volume-locked" => Busy,
    /// No daemon answers on the socket.
    DaemonUnreachable = "daemon-unreachable" => Busy,
    /// The API server of the cluster does not answer, or not as it should.
    KubernetesUnreachable = "kubernetes-unreachable" => Busy,
    /// The source limits our rate.
    RateLimited = "rate-limited" => Upstream,
    /// Name resolution, connection, TLS, proxy or time-out.
    SourceUnreachable = "source-unreachable" => Upstream,
    /// The source answered, but not as its protocol says it must.
    SourceProtocol = "source-protocol" => Upstream,
    /// The source changed while we read it.
    SourceChanged = "source-changed" => Upstream,
    /// Offline mode is on and the answer needs the network.
    Offline = "offline" => Upstream,
    /// A name in a listing cannot become a path.
    UnsafeName = "unsafe-name" => Upstream,
    /// The bytes differ from the checksum the source claims.
    ChecksumMismatch = "checksum-mismatch" => Corrupt,
    /// A blob or a record on disk differs from its name.
    StoreCorrupt = "store-corrupt" => Corrupt,
    /// A disk call failed.
    DiskError = "disk-error" => Misconfigured,
    /// A write could not be made durable, so the volume takes no more writes.
    VolumeReadOnly = "volume-read-only" => Misconfigured,
    /// The directory is not a larder volume.
    VolumeForeign = "volume-foreign" => Misconfigured,
    /// The volume was written by a newer larder.
    VolumeNewer = "volume-newer" => Misconfigured,
    /// The configuration has mistakes.
    ConfigInvalid = "config-invalid" => Misconfigured,
    /// An address or a socket cannot be listened on.
    ListenFailed = "listen-failed" => Misconfigured,
    /// The API server of the cluster does not let us do what we need.
    KubernetesDenied = "kubernetes-denied" => Misconfigured,
    /// The directory a model was to be made usable in does not take it.
    DestinationUnusable = "destination-unusable" => Misconfigured,
    /// The pull was cancelled by request.
    PullCancelled = "pull-cancelled" => Cancelled,
    /// The warm-up was cancelled by request.
    WarmCancelled = "warm-cancelled" => Cancelled,
    /// `larder bench` was interrupted.
    BenchStopped = "bench-stopped" => Cancelled,
    /// A bug of ours.
    InternalError = "internal-error" => Internal,
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

/// What every error of rank 3 and up can be asked.
///
/// `Display` says what happened, as `cannot <verb> <noun>: <what was found>`, with numbers.
pub trait Diagnose: std::error::Error {
    /// The stable code; its class follows from it.
    fn code(&self) -> Code;

    /// What to do about it: names a command, a key or an object. Empty when there is nothing to do.
    fn action(&self) -> String;

    /// When it makes sense to ask again, if the answer is known.
    fn retry_after(&self) -> Option<Duration> {
        None
    }
}

/// A diagnosis that owns itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Problem {
    /// The stable code.
    pub code: Code,
    /// What happened, with numbers.
    pub message: String,
    /// What to do.
    pub action: String,
    /// Seconds until it makes sense to ask again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u64>,
}

impl Problem {
    /// A failure that no module's own error stands for.
    pub fn new(code: Code, message: impl Into<String>, action: impl Into<String>) -> Problem {
        Problem { code, message: message.into(), action: action.into(), retry_after_seconds: None }
    }

    /// Owns what `error` says.
    pub fn of(error: &(impl Diagnose + ?Sized)) -> Problem {
        Problem {
            code: error.code(),
            message: error.to_string(),
            action: error.action(),
            retry_after_seconds: error.retry_after().map(|d| d.as_secs()),
        }
    }

    /// The class of the failure.
    pub fn fault(&self) -> Fault {
        self.code.fault()
    }
}

impl Diagnose for Problem {
    fn code(&self) -> Code {
        self.code
    }

    fn action(&self) -> String {
        self.action.clone()
    }

    fn retry_after(&self) -> Option<Duration> {
        self.retry_after_seconds.map(Duration::from_secs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_unique_and_print_as_they_serialise() {
        let mut seen = std::collections::BTreeSet::new();
        for code in Code::ALL {
            assert!(seen.insert(code.text()), "{code} stands twice");
            assert_eq!(serde_json::to_string(code).unwrap(), format!("\"{code}\""));
        }
    }

    #[test]
    fn every_fault_has_a_code_and_its_own_label() {
        let labels: std::collections::BTreeSet<_> = Fault::ALL.iter().map(|f| f.label()).collect();
        assert_eq!(labels.len(), Fault::ALL.len());
        for fault in Fault::ALL {
            assert!(Code::ALL.iter().any(|c| c.fault() == fault), "{} has no code", fault.label());
        }
    }
}

//! What larder hears from the Kubernetes API of its own cluster, and what it tells there. Without an answer larder goes on, and
//! says so.
//!
//! It asks with the token of the pod's ServiceAccount. Where there is none, nothing of this runs. Only [`Daemons`] is for people:
//! it finds and reaches the larders of a cluster with somebody's kubeconfig.

mod announcer;
mod daemons;
mod happening;
mod kubeconfig;
mod notice;
mod pods;
mod rights;
mod tokens;
mod tunnel;

use std::mem::discriminant;
use std::time::Duration;

use kube::runtime::watcher;
use tokio::time::timeout;

use crate::fault::{Code, Diagnose};

pub use announcer::NodeAnnouncer;
pub use daemons::{Daemon, Daemons, POD_LABEL};
pub use notice::{MAX_LABELLED, MODEL_PREFIX, NAMES_ANNOTATION, READY_LABEL};
pub use pods::NodePods;
pub use rights::Right;
pub use tunnel::{POD_PORT, Trouble, Tunnel};

/// Longest time without a byte on a connection: a watch is ended by the API server before that.
const MAX_SILENCE: Duration = Duration::from_secs(300);

/// Longest wait for the answer to one request.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// What to do where a right is missing.
pub const GIVE_RIGHTS: &str =
    "give larder's ServiceAccount its rights (`rbac.yaml` in `daemonset/`): apply your kustomization again";

/// Most characters of somebody else's words in an error.
const MAX_QUOTED_CHARS: usize = 300;

/// The API server of a cluster, and who we are to it.
#[derive(Debug, Clone)]
pub struct Cluster {
    config: kube::Config,
}

impl Cluster {
    /// The cluster that this process is a pod of: its address from the environment, token and authority from the files
    /// that kubelet mounts. Blocking, for as long as it takes to read them.
    pub fn of_this_pod() -> Result<Cluster, Error> {
        let config = kube::Config::incluster();
        config.map(Cluster::new).map_err(|error| {
            let what = "ask the API server of the cluster".to_owned();
            Error { what, found: Found::NoIdentity { detail: deepest(&error) } }
        })
    }

    /// This cluster.
    pub fn new(mut config: kube::Config) -> Cluster {
        // Who asks decides when to ask again, and says why.
        config.default_retry = false;
        config.read_timeout = Some(MAX_SILENCE);
        // The silence of a connection that nobody used does not count.
        config.reset_reader_on_write = true;
        Cluster { config }
    }

    /// A client that has read the token just now. It reads it again within a minute; a new client is for who was refused
    /// meanwhile.
    fn client(&self) -> Result<kube::Client, Found> {
        kube::Client::try_from(self.config.clone()).map_err(|error| found(&error))
    }
}

/// Why the API server did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot {what}: {found}")]
pub struct Error {
    /// What was to be done, such as "watch the pods of node `n1`".
    pub what: String,
    /// What came of it.
    pub found: Found,
}

/// What came of a request to the API server.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Found {
    /// Nothing yet.
    #[error("the API server has not answered yet")]
    NotYet,
    /// It took the request and did not answer.
    #[error("the API server has not answered for {seconds} s")]
    Silent {
        /// For how long, in seconds.
        seconds: u64,
    },
    /// No answer, or one that says that it failed.
    #[error("the API server cannot be reached: {detail}")]
    Unreachable {
        /// The system's words, or the API server's.
        detail: String,
    },
    /// An answer that is none.
    #[error("the API server answers what cannot be read: {detail}")]
    Garbled {
        /// What is wrong with it.
        detail: String,
    },
    /// It does not let us.
    #[error("the API server refuses it ({status}): {detail}")]
    Refused {
        /// 401: it does not know us; 403: we lack a right; others: the request makes no sense to it.
        status: u16,
        /// The API server's words.
        detail: String,
    },
    /// What was known is too old to go on from; everything has to be asked again.
    #[error("the API server has forgotten what changed since it was asked last")]
    Gone,
    /// This pod has no token, or this is no pod.
    #[error("there is no identity to ask with: {detail}")]
    NoIdentity {
        /// What is missing.
        detail: String,
    },
}

impl Diagnose for Error {
    fn code(&self) -> Code {
        match self.found {
            Found::Refused { .. } | Found::NoIdentity { .. } => Code::KubernetesDenied,
            _ => Code::KubernetesUnreachable,
        }
    }

    fn action(&self) -> String {
        match self.found {
            Found::Refused { status: 401, .. } => {
                "nothing, if the token has just been rotated: it is read again; else look at the log of the API server".into()
            }
            Found::Refused { status: 409, .. } => "nothing: somebody else was faster, and it is tried again".into(),
            Found::Refused { status: 404, .. } => {
                "set `kubernetes.node` to the name of this node (`kubectl get nodes`)".into()
            }
            Found::Refused { .. } => {
                GIVE_RIGHTS.into()
            }
            Found::NoIdentity { .. } => {
                "let kubelet mount the token (`automountServiceAccountToken: true` in the DaemonSet), or set \
                 `kubernetes.node` and `serve.network_listen` to `off`"
                    .into()
            }
            Found::NotYet | Found::Gone => "nothing: it is waited for".into(),
            _ => "nothing, if the API server is being restarted: it is asked again; else look at it (`kubectl get --raw /readyz`) \
                  and at what keeps this node's pods from it (a NetworkPolicy)"
                .into(),
        }
    }
}

impl Found {
    /// Whether it is another trouble than the one before, and so is to be said.
    fn is_news_after(&self, before: Option<&Found>) -> bool {
        before.is_none_or(|before| discriminant(before) != discriminant(self))
    }
}

/// Waits for the answer to one request, but not for ever.
async fn answer<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, Found> {
    match timeout(ANSWER_TIMEOUT, request).await {
        Ok(answered) => answered.map_err(|error| found(&error)),
        Err(_) => Err(Found::Silent { seconds: ANSWER_TIMEOUT.as_secs() }),
    }
}

fn found(error: &kube::Error) -> Found {
    match error {
        kube::Error::Api(status) => answered(status),
        kube::Error::SerdeError(error) => Found::Garbled { detail: quoted(&error.to_string()) },
        kube::Error::FromUtf8(error) => Found::Garbled { detail: quoted(&error.to_string()) },
        error => Found::Unreachable { detail: deepest(error) },
    }
}

fn answered(status: &kube::core::Status) -> Found {
    let detail = quoted(&status.message);
    match status.code {
        410 => Found::Gone,
        status @ (400..=428 | 430..=499) => Found::Refused { status, detail },
        code => Found::Unreachable { detail: format!("it answers {code}: {detail}") },
    }
}

fn of_watch(error: &watcher::Error) -> Found {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => found(error),
        watcher::Error::WatchError(status) => answered(status),
        watcher::Error::NoResourceVersion => Found::Garbled { detail: "a list without a resourceVersion".into() },
    }
}

/// The words of the deepest cause: the ones above it say only that something below failed.
fn deepest(error: &dyn std::error::Error) -> String {
    let mut deepest = error;
    while let Some(cause) = deepest.source() {
        deepest = cause;
    }
    quoted(&deepest.to_string())
}

fn quoted(text: &str) -> String {
    let shown = |c: char| if c.is_control() { c.escape_debug().to_string() } else { c.to_string() };
    text.chars().take(MAX_QUOTED_CHARS).map(shown).collect()
}

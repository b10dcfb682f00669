//! [`Door`]: a command says what it wants once; whether a daemon or this process does it is hidden here.

use std::path::PathBuf;
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt};
use tokio::sync::watch;

use super::Error;
use crate::cache::{Cache, JobStatus};
use crate::client::Client;
use crate::config::Config;
use crate::daemon;
use crate::fault::{Code, Problem};
use crate::model::ModelRef;
use crate::wire::http::{
    Evicted, EvictionInfo, EvictionPlan, LeaseInfo, ModelInfo, PinInfo, PinRequest, PullRequest, PullStatus, Readiness,
    Removed, ScrubRequest, ScrubStatus, Start, WarmRequest, WarmStatus,
};

/// Longest wait for jobs to stop where they are, when this process ends.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// How often a daemon is asked how far a warm-up or a scrub is.
const ASK_EVERY: Duration = Duration::from_millis(250);

/// The states of one job, until a final one.
pub(super) type Statuses<J> = BoxStream<'static, Result<J, Problem>>;

/// Who does the work.
pub(super) enum Door {
    /// The daemon that answers on the socket.
    Daemon(Client),
    /// This process, on the same volume.
    Here(Cache),
}

impl Door {
    /// A door through which the volume can be changed: the daemon's, or our own when there is no daemon.
    pub(super) async fn to_change(config: &Config) -> Result<Door, Problem> {
        match daemon_of(config).await? {
            Some(client) => Ok(Door::Daemon(client)),
            None => Ok(Door::Here(daemon::build_cache(config).await?.0)),
        }
    }

    /// A door to look through: it opens while another process pulls, but then refuses changes.
    pub(super) async fn to_read(config: &Config) -> Result<Door, Problem> {
        match Door::to_change(config).await {
            Err(problem) if problem.code == Code::VolumeLocked => Ok(Door::Here(daemon::build_view(config).await?)),
            other => other,
        }
    }

    /// The daemon's door, for what only a daemon has.
    pub(super) async fn of_daemon(config: &Config) -> Result<Client, Problem> {
        daemon_of(config).await?.ok_or_else(|| Problem::of(&Error::Unreachable { socket: socket(config) }))
    }

    /// Whether a job goes on when this process ends.
    pub(super) fn outlives_us(&self) -> bool {
        matches!(self, Door::Daemon(_))
    }

    /// Joins or starts a pull. Dropping the stream does not stop it. If `warm`, a daemon warms the model when it is ready;
    /// this process must then ask for it itself.
    pub(super) async fn pull(&self, reference: &ModelRef, warm: bool) -> Result<Statuses<PullStatus>, Problem> {
        match self {
            Door::Daemon(client) => {
                let request = PullRequest { warm, ..PullRequest::of(reference) };
                let first = client.pull(&request).await?;
                // A pull that has ended needs no watching.
                let rest = match first.phase.is_final() {
                    true => stream::empty().boxed(),
                    false => client.watch(&first.id).await?,
                };
                Ok(stream::once(std::future::ready(Ok(first))).chain(rest).boxed())
            }
            Door::Here(cache) => Ok(states(cache.pull(reference)?.status)),
        }
    }

    /// Joins or starts a warm-up. Dropping the stream does not stop it.
    pub(super) async fn warm(&self, reference: &ModelRef) -> Result<Statuses<WarmStatus>, Problem> {
        match self {
            Door::Daemon(client) => {
                let (client, first) = (client.clone(), client.warm(&WarmRequest::of(reference)).await?);
                Ok(asked(first, move |last| {
                    let client = client.clone();
                    async move { client.warm_status(&last.id).await }
                }))
            }
            Door::Here(cache) => Ok(states(cache.warm(reference)?.status)),
        }
    }

    /// Joins or starts a scrub. Dropping the stream does not stop it.
    pub(super) async fn scrub(&self, bytes_per_second: Option<u64>) -> Result<Statuses<ScrubStatus>, Problem> {
        match self {
            Door::Daemon(client) => {
                let (client, first) = (client.clone(), client.scrub(&ScrubRequest { bytes_per_second }).await?);
                Ok(asked(first, move |last| {
                    let client = client.clone();
                    async move { client.scrub_status(&last.id).await }
                }))
            }
            Door::Here(cache) => Ok(states(cache.scrub(bytes_per_second)?.status)),
        }
    }

    /// What the last start of a model has cost, by reference or by id; or why it is not here.
    pub(super) async fn last_start(&self, name: &str) -> Result<Start, Problem> {
        match self {
            Door::Daemon(client) => client.last_start(name).await,
            Door::Here(cache) => {
                let (cache, name) = (cache.clone(), name.to_owned());
                Ok(blocking(move || cache.last_start(&name)).await??)
            }
        }
    }

    /// The same for each model of a pod.
    pub(super) async fn last_starts_of_pod(&self, pod: &str) -> Result<Vec<Start>, Problem> {
        match self {
            Door::Daemon(client) => client.last_starts_of_pod(pod).await,
            Door::Here(cache) => {
                let (cache, pod) = (cache.clone(), pod.to_owned());
                Ok(blocking(move || cache.last_starts_of_pod(&pod)).await??)
            }
        }
    }

    /// The leases, oldest first.
    pub(super) async fn leases(&self) -> Result<Vec<LeaseInfo>, Problem> {
        match self {
            Door::Daemon(client) => client.leases().await,
            Door::Here(cache) => Ok(cache.leases()),
        }
    }

    /// Releases a lease.
    pub(super) async fn release(&self, id: &str) -> Result<LeaseInfo, Problem> {
        match self {
            Door::Daemon(client) => client.release(id).await,
            Door::Here(cache) => {
                let (cache, id) = (cache.clone(), id.to_owned());
                Ok(blocking(move || cache.release(&id)).await??)
            }
        }
    }

    /// The pins, by reference.
    pub(super) async fn pins(&self) -> Result<Vec<PinInfo>, Problem> {
        match self {
            Door::Daemon(client) => client.pins().await,
            Door::Here(cache) => Ok(cache.pins()),
        }
    }

    /// Pins a reference. A daemon begins to pull it; here, the caller pulls it.
    pub(super) async fn pin(&self, reference: &ModelRef) -> Result<PinInfo, Problem> {
        match self {
            Door::Daemon(client) => {
                let request = PinRequest { reference: reference.to_string(), include: vec![], exclude: vec![] };
                client.pin(&request).await
            }
            Door::Here(cache) => {
                let (cache, reference) = (cache.clone(), reference.clone());
                Ok(blocking(move || cache.pin(&reference)).await??)
            }
        }
    }

    /// Unpins a reference.
    pub(super) async fn unpin(&self, reference: &ModelRef) -> Result<PinInfo, Problem> {
        match self {
            Door::Daemon(client) => client.unpin(&reference.to_string()).await,
            Door::Here(cache) => {
                let (cache, reference) = (cache.clone(), reference.clone());
                Ok(blocking(move || cache.unpin(&reference)).await??)
            }
        }
    }

    /// The models that are local, with how much of each is in the page cache.
    pub(super) async fn models(&self) -> Result<Vec<ModelInfo>, Problem> {
        match self {
            Door::Daemon(client) => client.models_with_residency().await,
            Door::Here(cache) => {
                let cache = cache.clone();
                blocking(move || cache.with_residency(cache.models())).await
            }
        }
    }

    /// How this node is.
    pub(super) async fn readiness(&self) -> Result<Readiness, Problem> {
        match self {
            Door::Daemon(client) => client.readiness().await,
            Door::Here(cache) => Ok(Readiness {
                ready: true,
                waiting_for: Vec::new(),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                details: cache.details(),
            }),
        }
    }

    /// Removes one version by its id, or all versions of a reference.
    pub(super) async fn remove(&self, name: &str) -> Result<Removed, Problem> {
        match self {
            Door::Daemon(client) => client.remove(name).await,
            Door::Here(cache) => {
                let (cache, name) = (cache.clone(), name.to_owned());
                Ok(blocking(move || cache.remove(&name)).await??)
            }
        }
    }

    /// What would be evicted for so many bytes.
    pub(super) async fn eviction_plan(&self, need_bytes: u64) -> Result<EvictionPlan, Problem> {
        match self {
            Door::Daemon(client) => client.eviction_plan(need_bytes).await,
            Door::Here(cache) => {
                let cache = cache.clone();
                Ok(blocking(move || cache.eviction_plan(need_bytes)).await??)
            }
        }
    }

    /// Makes so many bytes fit.
    pub(super) async fn evict(&self, need_bytes: u64) -> Result<Evicted, Problem> {
        match self {
            Door::Daemon(client) => client.evict(need_bytes).await,
            Door::Here(cache) => {
                let cache = cache.clone();
                Ok(blocking(move || cache.evict_for(need_bytes)).await??)
            }
        }
    }

    /// What was evicted, newest first.
    pub(super) async fn evictions(&self) -> Result<Vec<EvictionInfo>, Problem> {
        match self {
            Door::Daemon(client) => client.evictions().await,
            Door::Here(cache) => {
                let cache = cache.clone();
                Ok(blocking(move || cache.evictions()).await??)
            }
        }
    }

    /// Leaves. Jobs of this process stop where they are; the next one resumes them.
    pub(super) async fn close(self) {
        match self {
            Door::Daemon(_) => {}
            Door::Here(cache) => cache.drain(DRAIN_DEADLINE).await,
        }
    }
}

/// What a job of this process publishes.
fn states<J: Clone + Send + Sync + 'static>(receiver: watch::Receiver<J>) -> Statuses<J> {
    let states = stream::unfold((receiver, true), |(mut receiver, first)| async move {
        if !first {
            receiver.changed().await.ok()?;
        }
        let status = receiver.borrow_and_update().clone();
        Some((Ok(status), (receiver, false)))
    });
    states.boxed()
}

/// The states of a job of the daemon that is asked for from time to time: the first one, then what `ask` answers, until a
/// final one or a problem.
fn asked<J, A, F>(first: J, ask: A) -> Statuses<J>
where
    J: JobStatus + Send + 'static,
    A: Fn(J) -> F + Send + 'static,
    F: Future<Output = Result<J, Problem>> + Send,
{
    let states = stream::unfold((Some(first), true, ask), |(last, fresh, ask)| async move {
        let last = last?;
        if fresh {
            return Some((Ok(last.clone()), (Some(last), false, ask)));
        }
        if last.is_final() {
            return None;
        }
        tokio::time::sleep(ASK_EVERY).await;
        let next = ask(last).await;
        let known = next.as_ref().ok().cloned();
        Some((next, (known, false, ask)))
    });
    states.boxed()
}

/// The daemon, if one answers. A socket that was named for this command must have one.
async fn daemon_of(config: &Config) -> Result<Option<Client>, Problem> {
    let client = Client::new(&config.serve.socket);
    if client.reachable().await {
        Ok(Some(client))
    } else if config.socket_is_explicit() {
        Err(Problem::of(&Error::Unreachable { socket: socket(config) }))
    } else {
        Ok(None)
    }
}

fn socket(config: &Config) -> PathBuf {
    config.serve.socket.clone()
}

/// Does disk work on a thread that may wait.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Problem::of(&Error::Bug { why: error.to_string() }))
}

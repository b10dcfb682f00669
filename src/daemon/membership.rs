//! The daemon as a member of its cluster: what it hears and tells there. Without a cluster there is none of it.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::task::JoinHandle;

use super::blocking;
use crate::cache::Cache;
use crate::config::KubernetesConfig;
use crate::fault::Problem;
use crate::kubernetes::{self, Cluster, NodeAnnouncer, NodePods};
use crate::serve::{AUDIENCE, Account, Doorkeeper, ReadyLatches, TokenReviewer};

/// How often the daemon looks what there is to tell.
const LOOK_EVERY: Duration = Duration::from_secs(5);

/// What runs for the cluster.
pub(super) struct Membership {
    pods: Arc<NodePods>,
    watching: JoinHandle<()>,
    announcing: Option<Announcing>,
}

struct Announcing {
    announcer: Arc<NodeAnnouncer>,
    looking: JoinHandle<()>,
    telling: JoinHandle<()>,
}

impl Membership {
    /// Begins to listen and to tell; `None` where that is not wanted, or where there is no identity to do it with.
    pub(super) async fn begin(
        config: &KubernetesConfig,
        cache: &Cache,
        latches: &ReadyLatches,
    ) -> Result<Option<Membership>, Problem> {
        let Some(node) = &config.node else { return Ok(None) };
        let cluster = match blocking(Cluster::of_this_pod).await? {
            Ok(cluster) => cluster,
            Err(error) => {
                say_that_pods_stay_unknown(&error);
                return Ok(None);
            }
        };
        let pods = Arc::new(NodePods::new(node));
        let (asked, asking) = (pods.clone(), cache.clone());
        blocking(move || {
            asking.ask_about_pods(asked);
            // Asked before the first list begins, so that it answers for every lease that a former process granted.
            asking.end_leases();
        })
        .await?;
        let (watched, asked) = (pods.clone(), cluster.clone());
        let watching = tokio::spawn(async move { watched.watch(asked).await });
        let announcing = config.announce.then(|| {
            let announcer = Arc::new(NodeAnnouncer::new(node, config.startup_taint.clone()));
            cache.announce_by(announcer.clone());
            let looking = tokio::spawn(look(announcer.clone(), cache.clone(), latches.clone()));
            let tells = announcer.clone();
            let telling = tokio::spawn(async move { tells.tell(cluster).await });
            Announcing { announcer, looking, telling }
        });
        Ok(Some(Membership { pods, watching, announcing }))
    }

    /// Who tells when pods have gone.
    pub(super) fn pods(&self) -> Arc<NodePods> {
        self.pods.clone()
    }

    /// The node stops saying that it is ready, and nothing is heard any more.
    pub(super) async fn end(self) {
        if let Some(Announcing { announcer, looking, telling }) = self.announcing {
            looking.abort();
            if let Err(problem) = blocking(move || announcer.say_farewell()).await {
                tracing::warn!(code = %problem.code, "the node may still say that it is ready: {problem}");
            }
            telling.abort();
        }
        self.watching.abort();
    }
}

/// The doorkeeper of the door on the network. An error where nobody can tell whose a token is, because then nobody could be let in.
pub(super) async fn doorkeeper(accounts: &[Account]) -> Result<Doorkeeper, Problem> {
    let cluster = blocking(Cluster::of_this_pod).await?.map_err(|error| Problem::of(&error))?;
    Ok(Doorkeeper::new(Arc::new(Reviewer(cluster)), accounts))
}

struct Reviewer(Cluster);

#[async_trait]
impl TokenReviewer for Reviewer {
    async fn review(&self, token: &str) -> Result<Option<String>, Problem> {
        self.0.user_of_token(token, AUDIENCE).await.map_err(|error| Problem::of(&error))
    }
}

/// Looks from time to time what there is to tell. A disk that does not answer is not asked.
async fn look(announcer: Arc<NodeAnnouncer>, cache: Cache, latches: ReadyLatches) {
    let mut ticks = tokio::time::interval(LOOK_EVERY);
    loop {
        ticks.tick().await;
        if cache.why_stalled().await.is_some() {
            announcer.is_not_ready();
            continue;
        }
        let (announcer, cache, ready) = (announcer.clone(), cache.clone(), latches.waiting_for().is_empty());
        if blocking(move || announcer.look_at(&cache, ready)).await.is_err() {
            return;
        }
    }
}

fn say_that_pods_stay_unknown(error: &kubernetes::Error) {
    let Problem { code, message, action, .. } = Problem::of(error);
    tracing::warn!(%code, action, error = message, "it cannot be known which pods are gone: their leases are kept");
}

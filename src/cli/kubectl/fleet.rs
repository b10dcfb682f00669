//! [`Fleet`]: the larders that were asked for, and how each is reached.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::{StreamExt, stream};

use super::{Error, Permission, Words};
use crate::cli::scratch::Scratch;
use crate::client::Client;
use crate::fault::{Code, Problem};
use crate::kubernetes::{self, Cluster, Daemon, Daemons, Found, Trouble, Tunnel};

/// Most nodes that are asked at once, so that neither the API server nor a source has to bear all of a cluster.
const MAX_NODES_AT_ONCE: usize = 16;

/// Longest wait for the first answer of a node.
const ANSWER_SECONDS: u64 = 30;

/// Which nodes are wanted.
pub(super) enum Nodes<'a> {
    /// Each that has a larder.
    All,
    /// Those with these labels, whether they have one or not.
    Labelled(&'a str),
    /// This one.
    Named(&'a str),
}

/// The larders of some nodes.
pub(super) struct Fleet {
    daemons: Daemons,
    namespace: String,
    nodes: BTreeMap<String, Daemon>,
    /// Where the sockets of tunnels are: of this user alone.
    sockets: Scratch,
}

/// A larder that can be asked.
pub(super) struct Reached {
    pub(super) node: String,
    pub(super) client: Client,
    namespace: String,
    tunnel: Tunnel,
}

impl Fleet {
    /// Looks where they are. At least one node is wanted, or it is an error.
    pub(super) async fn of(words: &Words, wanted: Nodes<'_>) -> Result<Fleet, Problem> {
        let (kubeconfig, context) = (words.kubeconfig.as_deref(), words.context.as_deref());
        let cluster = Cluster::of_kubeconfig(kubeconfig, context).map_err(Error::NoCluster)?;
        let namespace = words.namespace.clone();
        let daemons = Daemons::of(&cluster, &namespace).map_err(Error::NoCluster)?;
        let nodes = find(&daemons, &namespace, wanted).await?;
        let sockets = Scratch::below(&std::env::temp_dir(), "kubectl-larder");
        let sockets = sockets.map_err(|error| Error::NoSocket { why: error.to_string() })?;
        Ok(Fleet { daemons, namespace, nodes, sockets })
    }

    /// How many nodes there are.
    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// What each of them says, by the names of the nodes.
    pub(super) async fn each<T>(
        &self,
        ask: impl AsyncFn(&Reached) -> Result<T, Problem>,
    ) -> BTreeMap<String, Result<T, Problem>> {
        let ask = &ask;
        let asked = stream::iter(self.nodes.iter().enumerate()).map(|(number, (node, daemon))| async move {
            let answer = match self.reach(number, node, daemon) {
                Ok(reached) => ask(&reached).await,
                Err(error) => Err(error.into()),
            };
            (node.clone(), answer)
        });
        asked.buffer_unordered(MAX_NODES_AT_ONCE).collect().await
    }

    fn reach(&self, number: usize, node: &str, daemon: &Daemon) -> Result<Reached, Error> {
        let (namespace, node) = (self.namespace.clone(), node.to_owned());
        let pod = match daemon.clone() {
            Daemon::Runs { pod } => pod,
            Daemon::Waits { pod, state } => return Err(Error::Waits { namespace, node, pod, state }),
            Daemon::Missing => return Err(Error::Missing { namespace, node }),
        };
        // Short, because the path of a socket must be.
        let socket = self.sockets.path().join(number.to_string());
        let tunnel = self.daemons.tunnel(&node, &pod, &socket);
        let tunnel = tunnel.map_err(|error| Error::NoSocket { why: error.to_string() })?;
        Ok(Reached { client: Client::leading_to(&node, &socket), node, namespace, tunnel })
    }
}

async fn find(daemons: &Daemons, namespace: &str, wanted: Nodes<'_>) -> Result<BTreeMap<String, Daemon>, Error> {
    let namespace = namespace.to_owned();
    let named = match wanted {
        Nodes::Named(node) => Some(node),
        Nodes::All | Nodes::Labelled(_) => None,
    };
    let labelled = match wanted {
        Nodes::Labelled(selector) => {
            let nodes = daemons.nodes(selector).await;
            let nodes = nodes.map_err(|error| Error::Cluster { error, right: Permission::ListNodes })?;
            if nodes.is_empty() {
                return Err(Error::NoNode { selector: selector.to_owned() });
            }
            Some(nodes)
        }
        Nodes::All | Nodes::Named(_) => None,
    };
    let mut found = daemons.by_node(named).await.map_err(|error| {
        let right = Permission::ListPods { namespace: namespace.clone() };
        Error::Cluster { error, right }
    })?;
    if found.is_empty() {
        return Err(Error::NoDaemon { namespace, node: named.map(str::to_owned) });
    }
    let Some(labelled) = labelled else { return Ok(found) };
    let larder_of = |node: String| {
        let daemon = found.remove(&node).unwrap_or(Daemon::Missing);
        (node, daemon)
    };
    Ok(labelled.into_iter().map(larder_of).collect())
}

impl Reached {
    /// The first answer to what it is asked for, if it comes soon enough.
    pub(super) async fn answer<T>(&self, asked: impl Future<Output = Result<T, Problem>>) -> Result<T, Problem> {
        let answer = tokio::time::timeout(Duration::from_secs(ANSWER_SECONDS), asked).await;
        answer.unwrap_or_else(|_| Err(self.unreachable(format!("no answer within {ANSWER_SECONDS} s")).into()))
    }

    /// Says of a failure what somebody in front of the cluster can do.
    pub(super) fn explain(&self, problem: Problem) -> Problem {
        match (problem.code, self.tunnel.trouble()) {
            (Code::DaemonUnreachable, Some(Trouble::ApiServer(found @ Found::Refused { status: 401 | 403, .. }))) => {
                let what = format!("forward a port of the pod `{}` on `{}`", self.tunnel.pod(), self.node);
                let right = Permission::ForwardPorts { namespace: self.namespace.clone() };
                Error::Cluster { error: kubernetes::Error { what, found }, right }.into()
            }
            (Code::DaemonUnreachable, Some(Trouble::ApiServer(found))) => self.unreachable(found.to_string()).into(),
            (Code::DaemonUnreachable, Some(Trouble::Pod(why))) => self.unreachable(why).into(),
            (Code::DaemonUnreachable, None) => {
                let action = Problem::from(self.unreachable(String::new())).action;
                Problem { action, ..problem }
            }
            (Code::RouteNotFound, _) => {
                Error::TooOld { namespace: self.namespace.clone(), node: self.node.clone() }.into()
            }
            _ => problem,
        }
    }

    fn unreachable(&self, why: String) -> Error {
        let (namespace, node, pod) = (self.namespace.clone(), self.node.clone(), self.tunnel.pod());
        Error::Unreachable { namespace, node, pod, why }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Nodes with a larder each, in a cluster that nobody answers for.
    fn fleet(nodes: usize) -> Fleet {
        let cluster = Cluster::new(kube::Config::new("http://127.0.0.1:1".parse().unwrap()));
        let daemons = Daemons::of(&cluster, "larder").unwrap();
        let larder = |number| (format!("n{number}"), Daemon::Runs { pod: format!("larder-{number}") });
        let sockets = Scratch::below(&std::env::temp_dir(), "kubectl-larder").unwrap();
        Fleet { daemons, namespace: "larder".into(), nodes: (1..=nodes).map(larder).collect(), sockets }
    }

    async fn problem(ask: impl AsyncFn(&Reached) -> Result<(), Problem>) -> Problem {
        fleet(1).each(ask).await.remove("n1").unwrap().unwrap_err()
    }

    #[tokio::test(start_paused = true)]
    async fn every_node_is_asked_and_not_too_many_at_once() {
        let (fleet, now, most) = (fleet(3 * MAX_NODES_AT_ONCE), AtomicUsize::new(0), AtomicUsize::new(0));
        let answers = fleet.each(async |reached| {
            most.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_secs(1)).await;
            now.fetch_sub(1, Ordering::Relaxed);
            Ok(reached.node.clone())
        });
        let answers = answers.await;
        assert_eq!(answers.len(), 3 * MAX_NODES_AT_ONCE);
        assert!(answers.iter().all(|(node, answer)| answer.as_ref() == Ok(node)), "{answers:?}");
        assert_eq!(most.into_inner(), MAX_NODES_AT_ONCE);
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_never_answers_is_told_and_left() {
        let problem = problem(async |reached| reached.answer(std::future::pending()).await).await;
        assert_eq!(problem.code, Code::DaemonUnreachable);
        assert_eq!(problem.message, "cannot reach the daemon on `n1`: no answer within 30 s");
        assert!(problem.action.contains("`kubectl -n larder logs larder-1`"), "{}", problem.action);
    }

    #[tokio::test]
    async fn a_daemon_that_is_too_old_is_to_be_rolled_out() {
        let unknown = Problem::new(Code::RouteNotFound, "cannot answer", "look");
        let problem = problem(async |reached| Err(reached.explain(unknown.clone()))).await;
        assert_eq!(problem.message, "cannot ask the daemon on `n1`: it is too old to know what it was asked for");
        assert!(problem.action.contains("`kubectl -n larder rollout status daemonset/larder`"), "{}", problem.action);
    }

    #[tokio::test]
    async fn what_a_daemon_says_itself_is_told_as_it_is() {
        let full = Problem::new(Code::VolumeFull, "cannot pull", "make room");
        assert_eq!(problem(async |reached| Err(reached.explain(full.clone()))).await, full);
    }
}

//! The larders of a cluster: on which nodes they are, and which of them can be asked.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::path::Path;

use k8s_openapi::api::core::v1::{ContainerStatus, Node, Pod};
use kube::Api;
use kube::api::ListParams;
use kube::core::{ObjectList, PartialObjectMeta};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::tunnel::Tunnel;
use super::{Cluster, Error, Found, answer, quoted};

/// The label of the pods of larder, as `daemonset/` sets it.
pub const POD_LABEL: &str = "app.kubernetes.io/name=larder";

/// Objects in one answer of a list.
const PAGE_OBJECTS: u32 = 500;
/// Most nodes of a cluster that are looked at. Kubernetes itself supports 5,000.
const MAX_NODES: usize = 10_000;

/// Finds and reaches the larders of a cluster.
#[derive(Clone)]
pub struct Daemons {
    client: kube::Client,
    namespace: String,
}

/// The larder of one node, as the API server knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Daemon {
    /// It runs.
    Runs {
        /// The name of its pod.
        pod: String,
    },
    /// There is a pod, in which it does not run.
    Waits {
        /// The name of the pod.
        pod: String,
        /// What the pod is or waits for, such as `Pending` or `CrashLoopBackOff`.
        state: String,
    },
    /// There is no pod.
    Missing,
}

impl Daemons {
    /// Those of a namespace. Makes one client for all that follows: somebody's kubeconfig may start a program to get a token.
    pub fn of(cluster: &Cluster, namespace: &str) -> Result<Daemons, Error> {
        let client = cluster.client();
        let client = client.map_err(|found| Error { what: "ask the API server of the cluster".to_owned(), found })?;
        Ok(Daemons { client, namespace: namespace.to_owned() })
    }

    /// The larder of each node that has a pod of larder; or of this node alone.
    pub async fn by_node(&self, node: Option<&str>) -> Result<BTreeMap<String, Daemon>, Error> {
        let mut params = ListParams::default().labels(POD_LABEL).limit(PAGE_OBJECTS);
        if let Some(node) = node {
            params = params.fields(&format!("spec.nodeName={node}"));
        }
        let pods = all(&self.pods(), params).await;
        let pods = pods.map_err(|found| {
            let what = format!("list the pods of larder in the namespace `{}`", quoted(&self.namespace));
            Error { what, found }
        })?;
        let mut daemons = BTreeMap::new();
        for pod in &pods {
            let Some(node) = node_of(pod) else { continue };
            let daemon = Daemon::of(pod);
            // While a pod is replaced there are two.
            let better = daemons.get(node).is_none_or(|known: &Daemon| !matches!(known, Daemon::Runs { .. }));
            if better {
                daemons.insert(node.to_owned(), daemon);
            }
        }
        Ok(daemons)
    }

    /// The names of the nodes that have these labels, such as `pool=gpu`; sorted.
    pub async fn nodes(&self, selector: &str) -> Result<Vec<String>, Error> {
        let params = ListParams::default().labels(selector).limit(PAGE_OBJECTS);
        // Their names are all that is wanted.
        let nodes = all(&Api::<PartialObjectMeta<Node>>::all(self.client.clone()), params).await;
        let nodes = nodes.map_err(|found| {
            let what = format!("list the nodes with the labels `{}`", quoted(selector));
            Error { what, found }
        })?;
        let mut names: Vec<String> = nodes.into_iter().filter_map(|node| node.metadata.name).collect();
        names.sort();
        Ok(names)
    }

    /// A tunnel to the larder of a node, which is in this pod or in those that come after it. Nothing is connected yet.
    pub fn tunnel(&self, node: &str, pod: &str, socket: &Path) -> std::io::Result<Tunnel> {
        Tunnel::open(self, node, pod, socket)
    }

    pub(super) fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }
}

/// All objects of a list, page by page.
async fn all<K>(api: &Api<K>, mut params: ListParams) -> Result<Vec<K>, Found>
where
    K: Clone + Debug + DeserializeOwned,
    ObjectList<K>: Serialize,
{
    let mut objects = Vec::new();
    loop {
        let page = answer(api.list(&params)).await?;
        objects.extend(page.items);
        if objects.len() > MAX_NODES {
            return Err(Found::Garbled { detail: format!("there are more than {MAX_NODES}") });
        }
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(objects),
        }
    }
}

impl Daemon {
    fn of(pod: &Pod) -> Daemon {
        let name = pod.metadata.name.clone().unwrap_or_default();
        match state_of(pod) {
            None => Daemon::Runs { pod: name },
            Some(state) => Daemon::Waits { pod: name, state },
        }
    }
}

/// Where a pod is; or, if it has no place yet, the one node that its DaemonSet made it for.
fn node_of(pod: &Pod) -> Option<&str> {
    let spec = pod.spec.as_ref()?;
    if let Some(node) = &spec.node_name {
        return Some(node);
    }
    let required = spec.affinity.as_ref()?.node_affinity.as_ref()?;
    let terms = required.required_during_scheduling_ignored_during_execution.as_ref()?;
    let mut fields = terms.node_selector_terms.iter().flat_map(|term| term.match_fields.iter().flatten());
    let name = fields.find(|field| field.key == "metadata.name")?;
    name.values.as_ref()?.first().map(String::as_str)
}

/// What a pod is in which larder does not run; `None` if it does.
fn state_of(pod: &Pod) -> Option<String> {
    if pod.metadata.deletion_timestamp.is_some() {
        return Some("Terminating".to_owned());
    }
    let status = pod.status.as_ref();
    let containers = |of: fn(&k8s_openapi::api::core::v1::PodStatus) -> &Option<Vec<ContainerStatus>>| {
        status.and_then(|status| of(status).as_deref()).unwrap_or_default()
    };
    let (first, then) = (containers(|s| &s.init_container_statuses), containers(|s| &s.container_statuses));
    let waits =
        first.iter().chain(then).find_map(|container| container.state.as_ref()?.waiting.as_ref()?.reason.as_ref());
    let phase = status.and_then(|status| status.phase.as_deref()).unwrap_or("unknown");
    match waits {
        // Of a container that has not been started because another one is: the phase says as much.
        Some(reason) if reason != "PodInitializing" => Some(quoted(reason)),
        _ if phase == "Running" => None,
        _ => Some(quoted(phase)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(spec: Value, metadata: Value, status: Value) -> Pod {
        let mut pod = json!({"metadata": {"name": "larder-x"}, "spec": {"containers": []}, "status": status});
        pod["spec"].as_object_mut().unwrap().extend(spec.as_object().unwrap().clone());
        pod["metadata"].as_object_mut().unwrap().extend(metadata.as_object().unwrap().clone());
        serde_json::from_value(pod).unwrap()
    }

    fn state(status: Value) -> Option<String> {
        state_of(&pod(json!({}), json!({}), status))
    }

    #[test]
    fn a_pod_runs_or_says_what_it_waits_for() {
        let waiting = |reason: &str| {
            json!([{"name": "larder", "ready": false, "restartCount": 0, "image": "", "imageID": "",
            "state": {"waiting": {"reason": reason}}}])
        };
        assert_eq!(state(json!({"phase": "Running"})), None);
        assert_eq!(state(json!({"phase": "Pending"})).as_deref(), Some("Pending"));
        let crashing = json!({"phase": "Running", "containerStatuses": waiting("CrashLoopBackOff")});
        assert_eq!(state(crashing).as_deref(), Some("CrashLoopBackOff"));
        let preparing = json!({
            "phase": "Pending", "initContainerStatuses": waiting("ImagePullBackOff"),
            "containerStatuses": waiting("PodInitializing"),
        });
        assert_eq!(state(preparing).as_deref(), Some("ImagePullBackOff"));
        let preparing = json!({"phase": "Pending", "containerStatuses": waiting("PodInitializing")});
        assert_eq!(state(preparing).as_deref(), Some("Pending"));
        let leaves = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
        assert_eq!(state_of(&pod(json!({}), leaves, json!({"phase": "Running"}))).as_deref(), Some("Terminating"));
    }

    #[test]
    fn a_pod_that_has_no_place_yet_belongs_to_the_node_it_was_made_for() {
        let placed = pod(json!({"nodeName": "n1"}), json!({}), json!({}));
        assert_eq!(node_of(&placed), Some("n1"));
        let made_for = json!({"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n2"]}]}],
        }}}});
        assert_eq!(node_of(&pod(made_for, json!({}), json!({}))), Some("n2"));
        assert_eq!(node_of(&pod(json!({}), json!({}), json!({}))), None);
    }
}

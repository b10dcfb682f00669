//! What the API server must let larder do, and whether it does.

use std::fmt;

use k8s_openapi::api::authorization::v1::{ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec};
use kube::Api;
use kube::api::PostParams;

use super::{Cluster, Error, Found, answer};

/// One right, as `rbac.yaml` gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Right {
    /// What is done.
    pub verb: &'static str,
    /// The API group; empty for the core.
    pub group: &'static str,
    /// To what, in the plural.
    pub resource: &'static str,
    /// What it is for.
    pub why: &'static str,
    /// What becomes of larder without it.
    pub without: &'static str,
}

const LEASES_STAY: &str = "leases of pods stay until somebody releases them, and their models cannot be evicted";
const SAYS_NOTHING: &str = "the node's labels do not tell which models are here, nor whether larder is ready";

impl Right {
    /// The first look at the pods of the node.
    pub const LIST_PODS: Right = Right {
        verb: "list",
        group: "",
        resource: "pods",
        why: "the lease of a pod ends with the pod",
        without: LEASES_STAY,
    };
    /// To hear when one goes.
    pub const WATCH_PODS: Right = Right { verb: "watch", ..Right::LIST_PODS };
    /// To change the labels of the node.
    pub const PATCH_NODES: Right = Right {
        verb: "patch",
        group: "",
        resource: "nodes",
        why: "the node's labels tell which models are here",
        without: SAYS_NOTHING,
    };
    /// To look whether the start-up taint is there.
    pub const GET_NODES: Right = Right {
        verb: "get",
        group: "",
        resource: "nodes",
        why: "the start-up taint goes when the pinned models are here",
        without: "the start-up taint stays, and no pod comes to the node",
    };
    /// To say what happened.
    pub const CREATE_EVENTS: Right = Right {
        verb: "create",
        group: "events.k8s.io",
        resource: "events",
        why: "failed pulls and evictions are events of the node",
        without: "failed pulls and evictions stand in the log alone",
    };
    /// To know who asks over the network.
    pub const REVIEW_TOKENS: Right = Right {
        verb: "create",
        group: "authentication.k8s.io",
        resource: "tokenreviews",
        why: "who asks over the network is known",
        without: "nobody is let in over the network",
    };
}

impl fmt::Display for Right {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.verb, self.resource)
    }
}

impl Cluster {
    /// Whether the API server lets us: it says so to everybody about themselves, and nothing is tried.
    pub async fn may(&self, right: &Right) -> Result<bool, Error> {
        let asked = self.ask_whether_we_may(right).await;
        asked.map_err(|found| Error { what: format!("find out whether larder may {right}"), found })
    }

    async fn ask_whether_we_may(&self, right: &Right) -> Result<bool, Found> {
        let attributes = ResourceAttributes {
            verb: Some(right.verb.to_owned()),
            group: Some(right.group.to_owned()),
            resource: Some(right.resource.to_owned()),
            ..ResourceAttributes::default()
        };
        let spec = SelfSubjectAccessReviewSpec { resource_attributes: Some(attributes), ..Default::default() };
        let asked = SelfSubjectAccessReview { spec, ..SelfSubjectAccessReview::default() };
        let reviews: Api<SelfSubjectAccessReview> = Api::all(self.client()?);
        let answered = answer(reviews.create(&PostParams::default(), &asked)).await?;
        Ok(answered.status.is_some_and(|status| status.allowed))
    }
}

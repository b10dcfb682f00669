//! The pods of our own node: which of them are gone.
//!
//! A watch tells of each pod that ends, and a list of those that are there. A pod that neither has ever named is not gone for
//! that: it may have come since. Only a list that began after somebody asked about it can say so, and such a list is asked
//! for then. Names say nothing: a pod of the same name may have come before or after the one that is asked about.

use std::collections::{HashSet, VecDeque};
use std::mem::take;
use std::pin::pin;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::Pod as KubernetesPod;
use kube::Api;
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::{self, DefaultBackoff, Event};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::{Cluster, Error, Found, of_watch};
use crate::cache::PodDirectory;
use crate::fault::Problem;
use crate::model::{MAX_HOLDER_BYTES, Pod};

/// Most pods of one node. Kubernetes itself advises at most 110.
const MAX_PODS: usize = 10_000;
/// Most pods that are remembered as gone; of one that is forgotten a list tells again.
const MAX_GONE: usize = 1_024;
/// Most pods that are asked about and not known: as many as there can be leases.
const MAX_DOUBTED: usize = 10_000;
/// Pods in one answer of a list, so that reading it takes little memory.
const PAGE_PODS: u32 = 50;
/// Longest wait for one answer of a list.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);
/// Shortest time between two lists that somebody's question leads to.
const BETWEEN_LISTS: Duration = Duration::from_secs(60);

/// What kubelet puts on the pod in the API that stands for a static one: the uid that the pod itself knows.
const MIRROR: &str = "kubernetes.io/config.mirror";

/// The pods of one node, as a watch tells of them.
pub struct NodePods {
    node: String,
    known: Mutex<Known>,
    /// A pod has gone.
    went: Notify,
    /// Somebody asked about a pod that is not known.
    doubt: Notify,
}

impl NodePods {
    /// Nothing is known yet.
    pub fn new(node: &str) -> NodePods {
        let (went, doubt) = (Notify::new(), Notify::new());
        NodePods { node: node.to_owned(), known: Mutex::new(Known::nothing()), went, doubt }
    }

    /// Waits until pods have gone since it last returned.
    pub async fn some_went(&self) {
        self.went.notified().await;
    }

    /// Keeps knowing. Never ends: what fails is said once and tried again, ever less often.
    pub async fn watch(&self, cluster: Cluster) {
        let mut backoff = DefaultBackoff::default();
        loop {
            let found = self.follow(&cluster).await;
            // That is no trouble: a list follows.
            if found != Found::Gone {
                self.say(found);
            }
            sleep(backoff.next().expect("it has no last one")).await;
        }
    }

    /// Lists and watches, until that fails. After a failure everything is listed again: a watch that merely goes on says nothing
    /// until something changes, so nobody could tell whether it is well.
    async fn follow(&self, cluster: &Cluster) -> Found {
        let mut not_before = Instant::now();
        loop {
            match self.follow_until_in_doubt(cluster, not_before).await {
                Ok(()) => not_before = Instant::now() + BETWEEN_LISTS,
                Err(found) => return found,
            }
        }
    }

    /// The same, until somebody asks about a pod that is not known; but not before this time.
    async fn follow_until_in_doubt(&self, cluster: &Cluster, not_before: Instant) -> Result<(), Found> {
        let client = cluster.client()?;
        // A pod that has ended leaves the selection, which the watch tells as if it were deleted.
        let fields = format!("spec.nodeName={},status.phase!=Succeeded,status.phase!=Failed", self.node);
        let config = watcher::Config::default().fields(&fields).page_size(PAGE_PODS);
        // Without `spec` and `status`: who they are is enough.
        let api: Api<PartialObjectMeta<KubernetesPod>> = Api::all(client);
        let mut events = pin!(watcher::watcher(api, config));
        let mut listing = None;
        loop {
            let event = match &listing {
                Some(_) => {
                    let silent = |_| Found::Silent { seconds: LIST_TIMEOUT.as_secs() };
                    timeout(LIST_TIMEOUT, events.next()).await.map_err(silent)?
                }
                None => tokio::select! {
                    event = events.next() => event,
                    () = self.in_doubt(not_before) => return Ok(()),
                },
            };
            match event.expect("a watch has no end").map_err(|error| of_watch(&error))? {
                Event::Init => listing = Some(self.known().begin()),
                Event::InitApply(pod) => {
                    let Some(listing) = &mut listing else { continue };
                    listing.add(Seen::read(&pod)?)?;
                }
                Event::InitDone => self.listed(listing.take()),
                Event::Apply(pod) => self.known().came(Seen::read(&pod)?)?,
                Event::Delete(pod) => {
                    self.known().left(Seen::read(&pod)?);
                    self.went.notify_one();
                }
            }
        }
    }

    async fn in_doubt(&self, not_before: Instant) {
        self.doubt.notified().await;
        sleep_until(not_before).await;
    }

    fn listed(&self, listing: Option<Listing>) {
        let Some(listing) = listing else { return };
        let mut known = self.known();
        let trouble = known.trouble.take();
        let (pods, gone) = (listing.found.len(), known.complete(listing));
        drop(known);
        if trouble.is_some() {
            tracing::info!(
                node = self.node,
                pods,
                "the pods of this node are known: leases of those that are gone end"
            );
        }
        if gone > 0 {
            self.went.notify_one();
        }
    }

    /// Logged when it begins and when it becomes another one.
    fn say(&self, found: Found) {
        let before = self.known().trouble.replace(found.clone());
        if found.is_news_after(before.as_ref()) {
            let problem = Problem::of(&self.error(found));
            tracing::warn!(
                code = %problem.code, action = problem.action, error = problem.message,
                "it cannot be known which pods are gone: their leases are kept"
            );
        }
    }

    fn error(&self, found: Found) -> Error {
        Error { what: format!("watch the pods of node `{}`", self.node), found }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().expect("no panic while the pods are held")
    }
}

impl PodDirectory for NodePods {
    fn is_gone(&self, pod: &Pod) -> Option<bool> {
        let mut known = self.known();
        let is_gone = known.is_gone(pod.uid());
        let in_doubt = is_gone.is_none();
        drop(known);
        if in_doubt {
            self.doubt.notify_one();
        }
        is_gone
    }

    fn trouble(&self) -> Option<Problem> {
        let found = self.known().trouble.clone()?;
        Some(Problem::of(&self.error(found)))
    }
}

type Uid = Box<str>;

/// What of a pod is kept.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    uid: Uid,
    /// It stands for a static pod, which goes on when this one is deleted; kubelet then makes another one for it.
    is_mirror: bool,
}

impl Seen {
    fn read(pod: &PartialObjectMeta<KubernetesPod>) -> Result<Seen, Found> {
        let annotations = pod.metadata.annotations.as_ref();
        let of_static = annotations.and_then(|annotations| annotations.get(MIRROR));
        match of_static.or(pod.metadata.uid.as_ref()) {
            Some(uid) if (1..=MAX_HOLDER_BYTES).contains(&uid.len()) => {
                Ok(Seen { uid: uid.as_str().into(), is_mirror: of_static.is_some() })
            }
            _ => Err(Found::Garbled { detail: "a pod without a uid".into() }),
        }
    }
}

/// What is known of the pods of a node.
struct Known {
    here: HashSet<Uid>,
    /// Those of them that went last. A uid is never used again.
    gone: VecDeque<Uid>,
    /// Asked about, and never heard of.
    doubted: HashSet<Uid>,
    /// Why nothing new is known.
    trouble: Option<Found>,
}

/// A list that is being read.
struct Listing {
    /// What was asked about before it began.
    doubted: HashSet<Uid>,
    found: HashSet<Uid>,
}

impl Listing {
    fn add(&mut self, pod: Seen) -> Result<(), Found> {
        insert(&mut self.found, pod.uid)
    }
}

impl Known {
    fn nothing() -> Known {
        let (here, gone, doubted) = (HashSet::new(), VecDeque::new(), HashSet::new());
        Known { here, gone, doubted, trouble: Some(Found::NotYet) }
    }

    fn is_gone(&mut self, uid: &str) -> Option<bool> {
        if self.here.contains(uid) {
            return Some(false);
        }
        if self.gone.iter().any(|gone| **gone == *uid) {
            return Some(true);
        }
        if self.doubted.len() < MAX_DOUBTED {
            self.doubted.insert(uid.into());
        }
        None
    }

    fn begin(&mut self) -> Listing {
        Listing { doubted: take(&mut self.doubted), found: HashSet::new() }
    }

    /// How many are found to have gone.
    fn complete(&mut self, listing: Listing) -> usize {
        let Listing { doubted, found } = listing;
        let before = std::mem::replace(&mut self.here, found);
        let gone: HashSet<Uid> = before.into_iter().chain(doubted).filter(|uid| !self.here.contains(uid)).collect();
        let count = gone.len();
        gone.into_iter().for_each(|uid| self.remember_gone(uid));
        count
    }

    fn came(&mut self, pod: Seen) -> Result<(), Found> {
        self.gone.retain(|gone| *gone != pod.uid);
        insert(&mut self.here, pod.uid)
    }

    fn left(&mut self, pod: Seen) {
        self.here.remove(&pod.uid);
        // Of a static one a list tells whether it is still wanted.
        if !pod.is_mirror {
            self.remember_gone(pod.uid);
        }
    }

    fn remember_gone(&mut self, uid: Uid) {
        if self.gone.len() == MAX_GONE {
            self.gone.pop_front();
        }
        self.gone.push_back(uid);
    }
}

fn insert(pods: &mut HashSet<Uid>, uid: Uid) -> Result<(), Found> {
    pods.insert(uid);
    match pods.len() {
        0..=MAX_PODS => Ok(()),
        _ => Err(Found::Garbled { detail: format!("more than {MAX_PODS} pods of one node") }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(uid: &str) -> Seen {
        Seen { uid: uid.into(), is_mirror: false }
    }

    fn list(known: &mut Known, uids: &[&str]) {
        let mut listing = known.begin();
        uids.iter().for_each(|uid| listing.add(seen(uid)).unwrap());
        known.complete(listing);
    }

    #[test]
    fn a_pod_is_gone_when_a_list_that_began_after_the_question_lacks_it() {
        let mut known = Known::nothing();
        assert_eq!(known.is_gone("a"), None);
        let listing = known.begin();
        assert_eq!(known.is_gone("b"), None, "before the list is complete");
        known.complete(listing);
        assert_eq!((known.is_gone("a"), known.is_gone("b")), (Some(true), None));
        list(&mut known, &["c"]);
        assert_eq!((known.is_gone("b"), known.is_gone("c")), (Some(true), Some(false)));
    }

    #[test]
    fn a_pod_that_was_here_is_gone_when_the_watch_or_the_next_list_says_so() {
        let mut known = Known::nothing();
        list(&mut known, &["a", "b"]);
        known.came(seen("c")).unwrap();
        known.left(seen("a"));
        assert_eq!(["a", "b", "c"].map(|uid| known.is_gone(uid)), [Some(true), Some(false), Some(false)]);
        list(&mut known, &["c"]);
        assert_eq!(["a", "b", "c"].map(|uid| known.is_gone(uid)), [Some(true), Some(true), Some(false)]);
    }

    #[test]
    fn a_static_pod_is_not_gone_because_what_stands_for_it_was_deleted() {
        let mut meta = PartialObjectMeta::<KubernetesPod>::default();
        meta.metadata.uid = Some("of the mirror".into());
        assert_eq!(&*Seen::read(&meta).unwrap().uid, "of the mirror");
        meta.metadata.annotations = Some([(MIRROR.to_owned(), "static".to_owned())].into());
        let mut known = Known::nothing();
        known.came(Seen::read(&meta).unwrap()).unwrap();
        assert_eq!(known.is_gone("static"), Some(false));
        known.left(Seen::read(&meta).unwrap());
        assert_eq!(known.is_gone("static"), None);
        list(&mut known, &[]);
        assert_eq!(known.is_gone("static"), Some(true));
        known.came(Seen::read(&meta).unwrap()).unwrap();
        assert_eq!(known.is_gone("static"), Some(false));
    }

    #[test]
    fn what_is_remembered_is_bounded_and_what_is_forgotten_is_asked_again() {
        let mut known = Known::nothing();
        for n in 0..=MAX_GONE {
            known.left(seen(&n.to_string()));
        }
        assert_eq!((known.gone.len(), known.is_gone("0"), known.is_gone("1")), (MAX_GONE, None, Some(true)));
        list(&mut known, &[]);
        assert_eq!(known.is_gone("0"), Some(true));
        for n in 0..MAX_PODS {
            known.came(seen(&n.to_string())).unwrap();
        }
        assert!(known.came(seen("one more")).is_err());
        for n in 0..=MAX_DOUBTED {
            known.is_gone(&format!("never heard of {n}"));
        }
        assert_eq!(known.doubted.len(), MAX_DOUBTED);
    }

    #[test]
    fn a_pod_without_a_uid_is_garbage() {
        let mut meta = PartialObjectMeta::<KubernetesPod>::default();
        for uid in [None, Some(String::new()), Some("u".repeat(MAX_HOLDER_BYTES + 1))] {
            meta.metadata.uid = uid;
            assert!(matches!(Seen::read(&meta), Err(Found::Garbled { .. })));
        }
    }
}

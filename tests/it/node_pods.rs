//! Leases of pods end when Kubernetes says that the pod is gone, and for no other reason: what cannot be known keeps them.

use std::sync::Arc;
use std::time::Duration;

use larder::cache::PodDirectory;
use larder::fault::Code;
use larder::kubernetes::NodePods;
use larder::wire::http::{LeaseTerms, OpenRequest, PodIdentity};
use tokio::task::JoinHandle;

use super::support::api_server::{ApiServer, Mood};
use super::support::larder::Home;
use super::support::model_origin::ModelOrigin;
use super::support::node::TestNode;

/// Longest wait for what must come: a bound against hanging, not a measurement.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// A node of a cluster with one model on it.
struct ClusterNode {
    node: TestNode,
    model: String,
    api: ApiServer,
    pods: Arc<NodePods>,
    watching: JoinHandle<()>,
}

impl ClusterNode {
    /// Nobody holds a lease yet.
    async fn of(mood: Mood) -> ClusterNode {
        let (origin, api) = (ModelOrigin::start().await, ApiServer::start().await);
        api.becomes(mood);
        origin.put("m", "model.safetensors", b"weights");
        let model = origin.reference("m");
        let node = TestNode::new().start().await;
        node.ready(&model).await;
        let (pods, watching) = watch(&node, &api);
        ClusterNode { node, model, api, pods, watching }
    }

    /// With a lease for each of these pods, which the cluster knows.
    async fn with_leases_of(uids: &[&str]) -> ClusterNode {
        let here = ClusterNode::of(Mood::Well).await;
        for uid in uids {
            here.api.add("n1", "team", &format!("pod-{uid}"), uid);
            here.lease(uid);
        }
        here
    }

    fn lease(&self, uid: &str) {
        let pod = PodIdentity { uid: uid.into(), namespace: "team".into(), name: format!("pod-{uid}") };
        let terms = LeaseTerms { pod: Some(pod), ..LeaseTerms::default() };
        let asked = OpenRequest { lease: Some(terms), ..OpenRequest::of(&self.model) };
        self.node.cache().open_as(&asked).unwrap();
    }

    /// The pods that hold a lease, sorted.
    fn holders(&self) -> Vec<String> {
        let mut holders: Vec<_> = self.node.cache().leases().into_iter().map(|lease| lease.holder).collect();
        holders.sort();
        holders
    }

    /// Waits until only these pods hold one, as the daemon does: it looks when pods have gone.
    async fn holders_become(&self, uids: &[&str]) {
        let expected: Vec<_> = uids.iter().map(|uid| format!("team/pod-{uid}")).collect();
        let ended = async {
            loop {
                self.node.cache().end_leases();
                if self.holders() == expected {
                    return;
                }
                self.pods.some_went().await;
            }
        };
        let ended = tokio::time::timeout(MAX_WAIT, ended).await;
        assert!(ended.is_ok(), "{:?} hold a lease", self.holders());
    }

    /// Waits for this trouble, or for none; what it says.
    async fn trouble_becomes(&self, code: Option<Code>) -> String {
        let told = async {
            loop {
                let trouble = self.pods.trouble();
                if trouble.as_ref().map(|problem| problem.code) == code {
                    return trouble.map(|problem| format!("{problem}; {}", problem.action)).unwrap_or_default();
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(MAX_WAIT, told).await.expect("the trouble comes")
    }

    fn detail(&self) -> (String, String, bool) {
        let details = self.node.cache().details();
        let pods = details.into_iter().find(|detail| detail.name == "pods").expect("pods are told of");
        (pods.state, pods.means, pods.best)
    }
}

fn watch(node: &TestNode, api: &ApiServer) -> (Arc<NodePods>, JoinHandle<()>) {
    let pods = Arc::new(NodePods::new("n1"));
    node.cache().ask_about_pods(pods.clone());
    node.cache().end_leases();
    let (watched, cluster) = (pods.clone(), api.cluster());
    (pods, tokio::spawn(async move { watched.watch(cluster).await }))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_ends_when_its_pod_is_deleted_or_has_ended_and_no_other_does() {
    let here = ClusterNode::with_leases_of(&["a", "b", "c"]).await;
    here.trouble_becomes(None).await;
    here.holders_become(&["a", "b", "c"]).await;
    here.api.remove("a");
    here.holders_become(&["b", "c"]).await;
    // A pod of the same name is another one.
    here.api.add("n1", "team", "pod-a", "a2");
    here.api.remove("c");
    here.holders_become(&["b"]).await;
    assert_eq!(here.node.counted("larder_pods_unknown"), 0);
    assert_eq!(here.detail().0, "watched");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_of_another_node_never_ends_a_lease_of_ours() {
    let here = ClusterNode::with_leases_of(&["a"]).await;
    here.trouble_becomes(None).await;
    here.api.add("n2", "team", "pod-a", "elsewhere");
    here.api.remove("elsewhere");
    here.api.add("n1", "team", "mark", "mark");
    here.lease("mark");
    here.api.remove("mark");
    here.holders_become(&["a"]).await;
    // Nothing but who the pods of this node are has come over: no `spec` with somebody's environment in it.
    for asked in here.api.asked() {
        assert!(asked.accept.contains("as=PartialObjectMetadata"), "{asked:?}");
        assert!(asked.query["fieldSelector"].starts_with("spec.nodeName=n1,"), "{asked:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_api_server_is_down_leases_stay_and_it_is_said_and_made_up_for() {
    let here = ClusterNode::with_leases_of(&["a", "b"]).await;
    here.trouble_becomes(None).await;
    here.api.becomes(Mood::Down);
    let said = here.trouble_becomes(Some(Code::KubernetesUnreachable)).await;
    assert!(said.starts_with("cannot watch the pods of node `n1`: the API server cannot be reached: "), "{said}");
    here.api.remove("a");
    here.lease("came-meanwhile");
    here.node.cache().end_leases();
    assert_eq!(here.holders(), ["team/pod-a", "team/pod-b", "team/pod-came-meanwhile"].map(str::to_owned));
    assert_eq!(here.node.counted("larder_pods_unknown"), 1);
    let (state, means, best) = here.detail();
    assert_eq!((state.as_str(), best), ("unknown", false));
    assert!(
        means.contains("their leases are kept: cannot watch") && means.contains("kubectl get --raw /readyz"),
        "{means}"
    );
    here.api.add("n1", "team", "pod-came-meanwhile", "came-meanwhile");
    here.api.becomes(Mood::Well);
    here.trouble_becomes(None).await;
    here.holders_become(&["b", "came-meanwhile"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_else_the_api_server_answers_leases_stay_until_it_is_well_again() {
    let cases = [
        (
            Mood::Refuses(403),
            Code::KubernetesDenied,
            "refuses it (403): no rights, says the test; give larder's ServiceAccount",
        ),
        (
            Mood::Refuses(401),
            Code::KubernetesDenied,
            "refuses it (401): no rights, says the test; nothing, if the token",
        ),
        (Mood::Refuses(500), Code::KubernetesUnreachable, "it answers 500: no rights, says the test"),
        (Mood::Babbles, Code::KubernetesUnreachable, "answers what cannot be read: expected value at line 1 column 1"),
    ];
    let tried = cases.map(|(mood, code, says)| async move {
        let here = ClusterNode::with_leases_of(&["a"]).await;
        here.trouble_becomes(None).await;
        // What it knows is not enough to go on, so it has to ask.
        here.api.becomes(mood);
        here.api.forget();
        let said = here.trouble_becomes(Some(code)).await;
        assert!(said.contains(says), "{said}");
        here.api.remove("a");
        here.node.cache().end_leases();
        assert_eq!(here.holders(), ["team/pod-a"]);
        here.api.becomes(Mood::Well);
        here.holders_become(&[]).await;
    });
    futures::future::join_all(tried).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn before_the_first_list_is_complete_nobody_is_gone() {
    let here = ClusterNode::of(Mood::Hangs).await;
    here.lease("a");
    here.api.was_asked(1).await;
    here.node.cache().end_leases();
    assert_eq!(here.holders(), ["team/pod-a"]);
    assert!(here.detail().1.contains("the API server has not answered yet"), "{:?}", here.detail());
}

/// On a clock that is turned: it goes on whenever nothing else does.
#[tokio::test(start_paused = true)]
async fn an_api_server_that_takes_a_question_and_never_answers_is_asked_again() {
    let api = ApiServer::start().await;
    api.becomes(Mood::Hangs);
    let (pods, cluster) = (Arc::new(NodePods::new("n1")), api.cluster());
    let watched = pods.clone();
    tokio::spawn(async move { watched.watch(cluster).await });
    api.was_asked(2).await;
    let problem = pods.trouble().unwrap();
    assert_eq!(problem.code, Code::KubernetesUnreachable);
    assert!(problem.message.ends_with("the API server has not answered for 30 s"), "{}", problem.message);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_been_forgotten_is_listed_again_without_any_trouble() {
    let here = ClusterNode::with_leases_of(&["a", "b"]).await;
    here.trouble_becomes(None).await;
    here.api.remove("a");
    here.api.forget();
    here.holders_become(&["b"]).await;
    assert_eq!(here.pods.trouble(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_was_rotated_is_read_again() {
    let here = ClusterNode::with_leases_of(&["a"]).await;
    here.trouble_becomes(None).await;
    here.api.rotate_token();
    here.api.remove("a");
    here.api.forget();
    here.holders_become(&[]).await;
    here.trouble_becomes(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_of_pods_that_went_while_the_daemon_was_away_end_after_its_start() {
    let mut here = ClusterNode::with_leases_of(&["a", "b"]).await;
    here.trouble_becomes(None).await;
    here.watching.abort();
    here.node.restart(|_| {}).await;
    here.api.remove("a");
    assert_eq!(here.holders(), ["team/pod-a", "team/pod-b"]);
    (here.pods, here.watching) = watch(&here.node, &here.api);
    here.holders_become(&["b"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_that_nobody_has_heard_of_is_asked_about_and_its_lease_ends() {
    let here = ClusterNode::with_leases_of(&["a"]).await;
    here.trouble_becomes(None).await;
    here.lease("never-was");
    here.holders_become(&["a"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_long_list_is_read_page_by_page() {
    let here = ClusterNode::with_leases_of(&["kept"]).await;
    for n in 0..120 {
        here.api.add("n1", "many", &format!("pod-{n}"), &format!("{n:03}"));
    }
    here.api.forget();
    here.lease("never-was");
    here.holders_become(&["kept"]).await;
    let pages: Vec<_> = here.api.asked().into_iter().filter(|asked| !asked.is_watch()).collect();
    assert!(pages.iter().all(|asked| asked.query["limit"] == "50") && pages.len() >= 3, "{pages:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_ends_leases_of_pods_with_what_kubelet_gives_it_and_says_when_it_cannot() {
    let (origin, api) = (ModelOrigin::start().await, ApiServer::start_with_tls().await);
    origin.put("m", "model.safetensors", b"weights");
    let model = origin.reference("m");
    let mut home = Home::new();
    let identity = api.becomes_the_cluster_of(&mut home);
    home.set("LARDER_KUBERNETES_NODE", "n1");
    api.add("n1", "team", "vllm-0", "uid-0");
    api.add("n1", "team", "vllm-1", "uid-1");
    let Some(mut daemon) = home.serve_as_pod(identity).await else { return };
    daemon.says("the pods of this node are known").await;
    home.done(&["pull", &model]).await;
    for n in ["0", "1"] {
        home.set("POD_UID", &format!("uid-{n}"));
        home.set("POD_NAMESPACE", "team");
        home.set("POD_NAME", &format!("vllm-{n}"));
        home.done(&["open", "--lease-for", "pod", &model]).await;
    }
    api.remove("uid-0");
    let line = daemon.says("its pod is gone").await;
    assert!(line.contains("team/vllm-0"), "{line}");

    api.becomes(Mood::Down);
    let line = daemon.says("it cannot be known which pods are gone: their leases are kept").await;
    assert!(line.contains("kubernetes-unreachable") && line.contains("kubectl get --raw /readyz"), "{line}");
    let doctor = home.done(&["doctor"]).await;
    assert!(doctor.lines().any(|line| line.starts_with("note") && line.contains("pods")), "{doctor}");
    api.remove("uid-1");
    daemon.kill().await;
    let Some(mut daemon) = home.serve_as_pod(identity).await else { return };
    daemon.says("it cannot be known which pods are gone: their leases are kept").await;
    assert!(home.done(&["leases"]).await.contains("team/vllm-1"));
    api.becomes(Mood::Well);
    let line = daemon.says("its pod is gone").await;
    assert!(line.contains("team/vllm-1"), "{line}");
    assert!(!daemon.said().contains("token-one"), "the token is in the log");
}

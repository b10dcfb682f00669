//! What a node says of itself to the cluster: what is here and nothing else, and never so that larder waits for an answer.

use std::sync::Arc;

use larder::fault::Code;
use larder::kubernetes::{MODEL_PREFIX, NAMES_ANNOTATION, NodeAnnouncer, READY_LABEL};
use larder::wire::http::Phase;
use serde_json::{Value, json};

use super::support::api_server::{ApiServer, FakeNode, Mood};
use super::support::larder::Home;
use super::support::model_origin::ModelOrigin;
use super::support::node::{TestNode, reference};

const MIB: usize = 1 << 20;

/// A node that tells of itself.
struct Speaking {
    node: TestNode,
    origin: ModelOrigin,
    api: ApiServer,
    announcer: Arc<NodeAnnouncer>,
}

impl Speaking {
    async fn start(node: TestNode, startup_taint: Option<&str>) -> Speaking {
        let (origin, api) = (ModelOrigin::start().await, ApiServer::start().await);
        let node = node.start().await;
        let announcer = Arc::new(NodeAnnouncer::new("n1", startup_taint.map(str::to_owned)));
        node.cache().announce_by(announcer.clone());
        let (telling, cluster) = (announcer.clone(), api.cluster());
        tokio::spawn(async move { telling.tell(cluster).await });
        Speaking { node, origin, api, announcer }
    }

    /// Has a model pulled; its reference.
    async fn pull(&self, name: &str, bytes: usize) -> String {
        self.origin.put(name, "model.safetensors", name.repeat(bytes).as_bytes());
        let model = self.origin.reference(name);
        self.node.ready(&model).await;
        model
    }

    fn look(&self) {
        self.announcer.look_at(self.node.cache(), true);
    }

    /// Waits until the node names these models and no others, with these values of their labels.
    async fn tells(&self, expected: &[(&str, &str)]) -> FakeNode {
        let mut expected: Vec<_> =
            expected.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        expected.sort();
        self.api.node_becomes(|node| told(node) == expected).await
    }
}

/// The references that a node names, with the values of their labels.
fn told(node: &FakeNode) -> Vec<(String, String)> {
    let names = node.annotations.get(NAMES_ANNOTATION).map_or("{}", String::as_str);
    let names: Value = serde_json::from_str(names).unwrap();
    let labels = node.labels.iter().filter_map(|(label, value)| Some((label.strip_prefix(MODEL_PREFIX)?, value)));
    let mut told: Vec<_> =
        labels.map(|(key, value)| (names[key].as_str().unwrap().to_owned(), value.clone())).collect();
    told.sort();
    assert_eq!(told.len(), names.as_object().unwrap().len());
    told
}

#[tokio::test(flavor = "multi_thread")]
async fn the_node_says_what_is_here_and_that_it_is_ready_and_takes_both_back() {
    let here = Speaking::start(TestNode::new(), None).await;
    let (a, b) = (here.pull("a", 1).await, here.pull("b", 1).await);
    here.node.cache().pin(&reference(&b)).unwrap();
    here.look();
    let node = here.tells(&[(&a, "pulled"), (&b, "pinned")]).await;
    assert_eq!(node.labels[READY_LABEL], "true");
    here.node.cache().remove(&a).unwrap();
    here.look();
    here.tells(&[(&b, "pinned")]).await;
    let announcer = here.announcer.clone();
    tokio::task::spawn_blocking(move || announcer.say_farewell()).await.unwrap();
    let node = here.tells(&[(&b, "pinned")]).await;
    assert!(!node.labels.contains_key(READY_LABEL), "{node:?}");
}

/// Room for two of the models below.
fn small() -> TestNode {
    TestNode::new().quota(2 * MIB as u64 + MIB as u64 / 2)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_label_is_gone_before_its_model_is() {
    let here = Speaking::start(small(), None).await;
    let (a, b) = (here.pull("a", MIB).await, here.pull("b", MIB).await);
    here.look();
    here.tells(&[(&a, "pulled"), (&b, "pulled")]).await;
    here.api.becomes(Mood::Hangs);
    let asked = here.api.asked().len();
    here.origin.put("c", "model.safetensors", "c".repeat(MIB).as_bytes());
    let mut pulling = here.node.cache().pull(&reference(&here.origin.reference("c"))).unwrap();
    here.api.was_asked(asked + 1).await;
    assert!(here.node.cache().model(&a).is_ok(), "it has gone although its label stands");
    here.api.becomes(Mood::Well);
    here.tells(&[(&b, "pulled")]).await;
    assert_eq!(pulling.finished().await.phase, Phase::Ready);
    assert!(here.node.cache().model(&a).is_err());
    here.look();
    here.tells(&[(&b, "pulled"), (&here.origin.reference("c"), "pulled")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_api_server_a_model_goes_all_the_same_and_its_label_when_there_is_one_again() {
    let here = Speaking::start(small(), None).await;
    let (a, b) = (here.pull("a", MIB).await, here.pull("b", MIB).await);
    here.look();
    here.tells(&[(&a, "pulled"), (&b, "pulled")]).await;
    here.api.becomes(Mood::Down);
    let c = here.pull("c", MIB).await;
    assert!(here.node.cache().model(&a).is_err());
    here.look();
    here.api.becomes(Mood::Well);
    here.tells(&[(&b, "pulled"), (&c, "pulled")]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn events_say_what_went_wrong_and_what_to_do_once() {
    let here = Speaking::start(small(), None).await;
    let absent = here.origin.reference("absent");
    for _ in 0..3 {
        here.node.pull(&absent).await;
        here.look();
    }
    let (a, b, c) = (here.pull("a", MIB).await, here.pull("b", MIB).await, here.pull("c", MIB).await);
    for model in [&b, &c] {
        here.node.cache().pin(&reference(model)).unwrap();
    }
    here.origin.put("d", "model.safetensors", "d".repeat(MIB).as_bytes());
    here.node.pull(&here.origin.reference("d")).await;
    here.look();
    let events = here.api.events(3).await;
    let said: Vec<_> =
        events.iter().map(|event| (&event["type"], &event["reason"], event["note"].as_str().unwrap())).collect();
    assert_eq!((said[0].0, said[0].1), (&json!("Warning"), &json!("PullFailed")));
    assert!(
        said[0].2.contains("cannot ") && said[0].2.ends_with(&format!(" ({})", Code::RepoNotFound)),
        "{}",
        said[0].2
    );
    assert_eq!((said[1].0, said[1].1), (&json!("Normal"), &json!("ModelEvicted")));
    assert!(
        said[1].2.contains(&format!("evicted `{a}`")) && said[1].2.contains(&format!("for the pull of `{c}`")),
        "{}",
        said[1].2
    );
    assert_eq!((said[2].0, said[2].1), (&json!("Warning"), &json!("VolumeFull")));
    assert!(
        said[2].2.contains("larder evict --need 0 --dry-run") && said[2].2.ends_with(" (volume-full)"),
        "{}",
        said[2].2
    );
    for event in &events {
        assert_eq!(event["regarding"], json!({"apiVersion": "v1", "kind": "Node", "name": "n1", "uid": "n1"}));
        assert!(event["eventTime"].as_str().unwrap().ends_with('Z'));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taint_goes_when_everything_that_is_pinned_is_here_and_those_of_others_stay() {
    let here = Speaking::start(TestNode::new(), Some("larder.dev/starting")).await;
    here.api.taint("larder.dev/starting");
    here.api.taint("nvidia.com/gpu");
    let (a, b) = (here.origin.reference("a"), here.origin.reference("b"));
    here.pull("a", 1).await;
    here.node.cache().keep_pinned(&[reference(&a), reference(&b)]);
    // The pull that this has begun fails: the model is not there yet.
    assert_eq!(here.node.pull(&b).await.phase, Phase::Failed);
    here.look();
    // Events are told last.
    here.api.events(1).await;
    let node = here.tells(&[(&a, "pinned")]).await;
    assert_eq!(node.taints, ["larder.dev/starting", "nvidia.com/gpu"]);
    here.pull("b", 1).await;
    here.look();
    let node = here.api.node_becomes(|node| node.taints.len() == 1).await;
    assert_eq!(node.taints, ["nvidia.com/gpu"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_tells_as_soon_as_it_is_ready_and_takes_it_back_when_it_stops() {
    let (origin, api) = (ModelOrigin::start().await, ApiServer::start_with_tls().await);
    origin.put("m", "model.safetensors", b"weights");
    let model = origin.reference("m");
    let mut home = Home::new();
    let identity = api.becomes_the_cluster_of(&mut home);
    home.set("LARDER_KUBERNETES_NODE", "n1");
    home.set("LARDER_KUBERNETES_ANNOUNCE", "true");
    let Some(mut daemon) = home.serve_as_pod(identity).await else { return };
    home.done(&["pull", "--pin", &model]).await;
    let expected = [(model.clone(), "pinned".to_owned())];
    api.node_becomes(|node| node.labels.contains_key(READY_LABEL) && told(node) == expected).await;
    daemon.terminate();
    let node = api.node_becomes(|node| !node.labels.contains_key(READY_LABEL)).await;
    assert_eq!(told(&node), expected);
    assert!(daemon.ended().await.0.success());
}

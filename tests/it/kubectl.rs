//! `kubectl larder`, as a process with a kubeconfig, against an API server whose port-forwards end at real daemons: one for each node.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Command;

use serde_json::Value;

use super::support::api_server::{ApiServer, Mood};
use super::support::gated_origin::GatedOrigin;
use super::support::larder::{Ended, Home, Running};
use super::support::model_origin::ModelOrigin;
use super::support::skip::skipped;

const PLUGIN: &str = env!("CARGO_BIN_EXE_kubectl-larder");

/// More than the smallest quota.
const LARGE_BYTES: usize = 1_500_000;

/// A cluster, and somebody in front of it.
struct Cluster {
    api: ApiServer,
    nodes: BTreeMap<&'static str, (Home, Running)>,
    person: Home,
}

impl Cluster {
    /// With the label `pool=gpu` on each node, and a daemon.
    async fn of(nodes: &[&'static str]) -> Cluster {
        let api = ApiServer::start_with_tls().await;
        let mut person = Home::new();
        person.set("KUBECONFIG", api.kubeconfig().to_str().unwrap());
        let mut cluster = Cluster { api, nodes: BTreeMap::new(), person };
        for node in nodes {
            cluster.add(node, Home::new()).await;
        }
        cluster
    }

    /// One more node, whose daemon has this home.
    async fn add(&mut self, node: &'static str, home: Home) {
        let daemon = home.serve().await;
        self.api.add_node(node, "pool=gpu");
        self.api.add_larder(node, daemon.tcp_address());
        self.nodes.insert(node, (home, daemon));
    }

    fn command(&self, words: &[&str]) -> Command {
        self.person.command_of(PLUGIN, words)
    }

    async fn run(&self, words: &[&str]) -> Ended {
        Ended::of(self.command(words)).await
    }

    /// What the daemon of a node itself says is local.
    async fn references_on(&self, node: &str) -> Vec<String> {
        let list: Value = serde_json::from_str(&self.nodes[node].0.done(&["list", "-o", "json"]).await).unwrap();
        let models = list["models"].as_array().unwrap();
        models.iter().map(|model| model["reference"].as_str().unwrap().to_owned()).collect()
    }

    /// Nothing is left where the sockets were.
    fn assert_nothing_is_left(&self) {
        let left: Vec<_> = std::fs::read_dir(self.person.path().join("tmp")).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

/// A model of some size on an origin.
async fn model(bytes: usize) -> (ModelOrigin, String) {
    let origin = ModelOrigin::start().await;
    origin.put("m", "model.safetensors", &vec![7; bytes]);
    let reference = origin.reference("m");
    (origin, reference)
}

/// The cells of a line of a table that begins with this one.
fn cells<'a>(table: &'a str, first: &str) -> Vec<&'a str> {
    let line = table.lines().find(|line| line.split_whitespace().next() == Some(first));
    line.unwrap_or_else(|| panic!("no line `{first}` in:\n{table}"))
        .split("  ")
        .map(str::trim)
        .filter(|c| !c.is_empty())
        .collect()
}

/// An address that nobody listens on.
async fn nobody() -> SocketAddr {
    tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn a_pull_is_waited_for_on_all_nodes() {
    let cluster = Cluster::of(&["n1", "n2", "n3"]).await;
    let (_origin, reference) = model(LARGE_BYTES).await;
    let ended = cluster.run(&["pull", &reference, "--nodes", "pool=gpu", "--wait"]).await;
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    for node in ["n1", "n2", "n3"] {
        let cells = cells(&ended.out, node);
        assert_eq!(cells[..4], [node, &reference, "ready", "1.5 MB"], "{}", ended.out);
        assert!(cells[4].ends_with(" s"), "{}", ended.out);
        assert!(ended.err.contains(&format!("{node}: ready {reference}  1.5 MB in ")), "{}", ended.err);
        assert_eq!(cluster.references_on(node).await, [reference.as_str()]);
    }
    cluster.assert_nothing_is_left();
}

#[tokio::test]
async fn without_waiting_it_says_on_how_many_nodes_the_pull_was_accepted() {
    let cluster = Cluster::of(&["n1", "n2"]).await;
    let origin = GatedOrigin::start([("model.bin".to_owned(), vec![7; 1000])].into()).await;
    let ended = cluster.run(&["pull", &origin.reference()]).await;
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.starts_with("accepted on 2 of 2 nodes; "), "{}", ended.err);
    for node in ["n1", "n2"] {
        assert!(["resolving", "fetching"].contains(&cells(&ended.out, node)[2]), "{}", ended.out);
    }
}

#[tokio::test]
async fn a_node_that_fails_is_named_and_the_others_become_ready() {
    let mut cluster = Cluster::of(&["n1"]).await;
    let mut small = Home::new();
    small.set("LARDER_VOLUME_QUOTA", "1MB");
    cluster.add("n2", small).await;
    cluster.api.add_larder("n3", nobody().await);
    cluster.api.add_larder_that_waits("n4", "ImagePullBackOff");
    cluster.api.add_larder_that_is_away("n6");
    for node in ["n3", "n4", "n5", "n6"] {
        cluster.api.add_node(node, "pool=gpu");
    }
    let (_origin, reference) = model(LARGE_BYTES).await;
    let ended = cluster.run(&["pull", &reference, "--nodes", "pool=gpu", "--wait"]).await;
    // That of the first that failed.
    assert_eq!(ended.code, Some(73), "{}", ended.err);
    assert_eq!(cells(&ended.out, "n1")[2], "ready", "{}", ended.out);
    let says = |node: &str, fragments: &[&str]| {
        let cells = cells(&ended.out, node);
        assert_eq!(cells[2], "failed", "{}", ended.out);
        for fragment in fragments {
            assert!(cells.last().unwrap().contains(fragment), "no `{fragment}` in: {}", cells.last().unwrap());
        }
    };
    says("n2", &["never-fits: cannot pull"]);
    says("n3", &["daemon-unreachable: cannot reach the daemon on `n3`: ", "Connection refused", "logs larder-n3"]);
    says("n4", &["`larder-n4` is not running: ImagePullBackOff; `kubectl -n larder describe pod larder-n4`"]);
    says("n5", &["daemon-unreachable: cannot reach the daemon on `n5`: no pod of larder is there"]);
    says("n6", &["`n6`: the API server cannot be reached: it answers 502: error dialing backend"]);
    assert!(ended.err.contains("error: cannot pull on 5 of 6 nodes: n2, n3, n4, n5, n6\naction: "), "{}", ended.err);
    assert!(ended.err.contains("code: never-fits"), "{}", ended.err);
    cluster.assert_nothing_is_left();
}

#[tokio::test]
async fn a_daemon_that_restarts_is_followed_on() {
    let mut cluster = Cluster::of(&["n1"]).await;
    let origin = GatedOrigin::start([("model.bin".to_owned(), vec![7; LARGE_BYTES])].into()).await;
    let mut pull = Running::start(cluster.command(&["pull", &origin.reference(), "--wait"]));
    pull.says("1.5 MB to fetch").await;
    let (mut home, daemon) = cluster.nodes.remove("n1").unwrap();
    home.set("LARDER_SERVE_LISTEN", &daemon.tcp_address().to_string());
    daemon.kill().await;
    let _daemon = home.serve().await;
    origin.allow_more(u64::MAX);
    let (status, out) = pull.ended().await;
    assert!(status.success(), "{}", pull.said());
    assert_eq!(cells(&out, "n1")[2], "ready", "{out}");
}

#[tokio::test]
async fn a_pod_that_is_replaced_is_followed_on() {
    let mut cluster = Cluster::of(&["n1"]).await;
    let origin = GatedOrigin::start([("model.bin".to_owned(), vec![7; LARGE_BYTES])].into()).await;
    let mut pull = Running::start(cluster.command(&["pull", &origin.reference(), "--wait"]));
    pull.says("1.5 MB to fetch").await;
    let (home, daemon) = cluster.nodes.remove("n1").unwrap();
    daemon.kill().await;
    let daemon = home.serve().await;
    cluster.api.replace_larder("n1", daemon.tcp_address());
    origin.allow_more(u64::MAX);
    let (status, out) = pull.ended().await;
    assert!(status.success(), "{}", pull.said());
    assert_eq!(cells(&out, "n1")[2], "ready", "{out}");
}

#[tokio::test]
async fn an_interruption_leaves_the_pulls_to_the_daemons() {
    let cluster = Cluster::of(&["n1"]).await;
    let origin = GatedOrigin::start([("model.bin".to_owned(), vec![7; LARGE_BYTES])].into()).await;
    let mut pull = Running::start(cluster.command(&["pull", &origin.reference(), "--wait"]));
    pull.says("1.5 MB to fetch").await;
    pull.terminate();
    let (status, out) = pull.ended().await;
    assert_eq!(status.code(), Some(130), "{}", pull.said());
    assert_eq!(cells(&out, "n1")[2], "fetching", "{out}");
    assert!(pull.said().contains("pulls that have begun go on"), "{}", pull.said());
    cluster.assert_nothing_is_left();
    origin.allow_more(u64::MAX);
    let ended = cluster.run(&["pull", &origin.reference(), "--wait"]).await;
    assert_eq!(ended.code, Some(0), "{}", ended.err);
}

#[tokio::test]
async fn models_are_listed_node_by_node() {
    let cluster = Cluster::of(&["n1", "n2", "n3"]).await;
    let (_origin, reference) = model(1000).await;
    for node in ["n1", "n2"] {
        cluster.nodes[node].0.done(&["pull", &reference]).await;
    }
    let ended = cluster.run(&["list", "--all-nodes"]).await;
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert_eq!(cells(&ended.out, "n1")[..2], ["n1", &reference], "{}", ended.out);
    assert_eq!(cells(&ended.out, "n2")[..2], ["n2", &reference], "{}", ended.out);
    assert_eq!(ended.err, "n3: no model is local\n");

    let ended = cluster.run(&["list", "--node", "n2", "-o", "json"]).await;
    let body: Value = serde_json::from_str(&ended.out).unwrap();
    assert_eq!(body["nodes"].as_array().unwrap().len(), 1, "{body}");
    assert_eq!((&body["nodes"][0]["node"], &body["nodes"][0]["error"]), (&"n2".into(), &Value::Null), "{body}");
    assert_eq!(body["nodes"][0]["models"][0]["reference"], reference, "{body}");
    cluster.assert_nothing_is_left();
}

#[tokio::test]
async fn a_list_without_one_node_has_the_others_and_fails() {
    let cluster = Cluster::of(&["n1"]).await;
    cluster.api.add_larder("n2", nobody().await);
    let (_origin, reference) = model(1000).await;
    cluster.nodes["n1"].0.done(&["pull", &reference]).await;
    let ended = cluster.run(&["list", "--all-nodes"]).await;
    assert_eq!(ended.code, Some(75), "{}", ended.err);
    assert_eq!(cells(&ended.out, "n1")[..2], ["n1", &reference], "{}", ended.out);
    assert!(cells(&ended.out, "n2")[1].starts_with("daemon-unreachable: cannot reach"), "{}", ended.out);
    assert!(ended.err.starts_with("error: cannot list the models on 1 of 2 nodes: n2\n"), "{}", ended.err);
}

#[tokio::test]
async fn what_is_forbidden_names_the_verb_and_the_resource() {
    for (verb, resource, says) in [
        ("list", "nodes", "`list` on `nodes`"),
        ("list", "pods", "`list` on `pods` in the namespace `larder`"),
        ("get", "pods/portforward", "`get` and `create` on `pods/portforward` in the namespace `larder`"),
    ] {
        let cluster = Cluster::of(&["n1"]).await;
        cluster.api.denies(verb, resource);
        let ended = cluster.run(&["pull", "http://127.0.0.1:1/m/", "--nodes", "pool=gpu"]).await;
        assert_eq!(ended.code, Some(78), "{}", ended.err);
        let allow = format!("allow you {says}: the Role is in docs/kubernetes.md");
        assert!(ended.err.contains(&allow) && ended.err.contains("code: kubernetes-denied"), "{}", ended.err);
        let refused = format!("User \"jane\" cannot {verb} resource \"{resource}\"");
        let told = format!("{}{}", ended.out, ended.err).replace("\\\"", "\"");
        assert!(told.contains(&refused), "{told}");
    }
}

#[tokio::test]
async fn nothing_to_ask_is_an_error_that_says_where_to_look() {
    let cluster = Cluster::of(&["n1"]).await;
    let says = async |words: &[&str], code: i32, fragments: &[&str]| {
        let ended = cluster.run(words).await;
        assert_eq!((ended.code, ended.out.as_str()), (Some(code), ""), "{}", ended.err);
        for fragment in fragments {
            assert!(ended.err.contains(fragment), "no `{fragment}` in: {}", ended.err);
        }
    };
    let reference = "http://127.0.0.1:1/m/";
    let none = ["cannot find a node: none has the labels `pool=cpu`", "--show-labels", "code: node-not-found"];
    says(&["pull", reference, "--nodes", "pool=cpu"], 66, &none).await;
    let wrong = ["unable to parse requirement: gpu", "`--nodes LABEL=VALUE`", "code: bad-request"];
    says(&["pull", reference, "--nodes", "gpu"], 65, &wrong).await;
    let elsewhere = ["in the namespace `elsewhere`", "app.kubernetes.io/name=larder", "`-n`", "code: daemon-not-found"];
    says(&["list", "--all-nodes", "-n", "elsewhere"], 66, &elsewhere).await;
    says(&["list", "--node", "n7"], 66, &["on the node `n7`", "code: daemon-not-found"]).await;
    let config = ["cannot find the cluster in a kubeconfig", "`--kubeconfig` or KUBECONFIG", "code: kubernetes-denied"];
    says(&["list", "--all-nodes", "--kubeconfig", "/nonexistent/config"], 78, &config).await;
    says(&["list", "--all-nodes", "--context", "other"], 78, &config).await;
    says(&["pull", "ftp://x"], 65, &["code: bad-reference"]).await;
    cluster.api.becomes(Mood::Down);
    says(&["list", "--all-nodes"], 75, &["`kubectl get --raw /readyz`", "code: kubernetes-unreachable"]).await;
}

#[tokio::test]
async fn a_proxy_is_used_but_for_those_that_are_exempt() {
    let mut cluster = Cluster::of(&["n1"]).await;
    cluster.person.set("HTTPS_PROXY", "http://127.0.0.2:1");
    let ended = cluster.run(&["list", "--all-nodes"]).await;
    assert_eq!(ended.code, Some(75), "{}", ended.err);
    assert!(ended.err.contains("code: kubernetes-unreachable"), "{}", ended.err);
    cluster.person.set("NO_PROXY", "127.0.0.1");
    let ended = cluster.run(&["list", "--all-nodes"]).await;
    assert_eq!(ended.code, Some(0), "{}", ended.err);
}

#[tokio::test]
async fn kubectl_finds_the_plug_in() {
    match Command::new("kubectl").arg("version").arg("--client").output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => return skipped(&format!("`kubectl` fails: {}", String::from_utf8_lossy(&output.stderr).trim())),
        Err(error) => return skipped(&format!("`kubectl` does not run: {error}")),
    }
    let mut cluster = Cluster::of(&["n1"]).await;
    let (_origin, reference) = model(1000).await;
    cluster.nodes["n1"].0.done(&["pull", &reference]).await;
    let beside = std::path::Path::new(PLUGIN).parent().unwrap();
    let path = std::env::var("PATH").unwrap();
    cluster.person.set("PATH", &format!("{}:{path}", beside.display()));
    let ended = Ended::of(cluster.person.command_of("kubectl", &["larder", "list", "--all-nodes"])).await;
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert_eq!(cells(&ended.out, "n1")[..2], ["n1", &reference], "{}", ended.out);
}

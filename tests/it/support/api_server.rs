//! As much of a Kubernetes API server as larder asks: lists and watches of pods, nodes, events, reviews of tokens, port-forwards, over
//! plain HTTP or TLS; and what goes wrong with one.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use futures::stream;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use larder::kubernetes::Cluster;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::aws_lc_rs;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;

use super::port_forward::{self, Upgrade};

use super::larder::Home;

/// Longest wait for a request: a bound against hanging, not a measurement.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// How it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mood {
    /// As it should.
    Well,
    /// It takes no connection, and has closed those there were.
    Down,
    /// This status to everything.
    Refuses(u16),
    /// What is no JSON, with 200.
    Babbles,
    /// Not before it becomes another one.
    Hangs,
}

/// The server. Use a clone from another task: all are one.
#[derive(Clone)]
pub(crate) struct ApiServer {
    port: u16,
    world: watch::Sender<World>,
    asked: Arc<Mutex<Vec<Asked>>>,
    account: Arc<Account>,
}

/// What kubelet mounts into a pod: the token, the authority of the API server, and the namespace.
struct Account {
    dir: TempDir,
}

impl Account {
    fn token(&self) -> PathBuf {
        self.dir.path().join("token")
    }
}

/// One request.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) query: HashMap<String, String>,
    pub(crate) accept: String,
}

impl Asked {
    pub(crate) fn is_watch(&self) -> bool {
        self.query.contains_key("watch")
    }
}

struct World {
    mood: Mood,
    /// Who may ask.
    token: String,
    version: u64,
    pods: BTreeMap<String, FakePod>,
    /// What changed, by version.
    changes: Vec<(u64, &'static str, FakePod)>,
    /// Changes up to here are forgotten.
    forgotten: u64,
    node: FakeNode,
    events: Vec<Value>,
    /// What the account lacks: verb and resource.
    denied: Vec<(String, String)>,
    /// Labels of further nodes, by name, such as `pool=gpu`.
    nodes: BTreeMap<String, &'static str>,
    /// Of the namespace `larder`, by the names of their pods.
    larders: BTreeMap<String, FakeLarder>,
}

/// A pod of larder.
#[derive(Debug, Clone)]
struct FakeLarder {
    node: String,
    /// What its container waits for, if it does not run.
    waits_for: Option<&'static str>,
    /// Where a port-forward ends; nowhere if the kubelet of the node is away.
    daemon: Option<SocketAddr>,
}

impl FakeLarder {
    fn object(&self, name: &str) -> Value {
        let state = match self.waits_for {
            None => json!({"running": {}}),
            Some(reason) => json!({"waiting": {"reason": reason}}),
        };
        let container = json!({
            "name": "larder", "state": state, "ready": true, "restartCount": 0, "image": "larder:0.1.0", "imageID": "",
        });
        json!({
            "kind": "Pod", "apiVersion": "v1", "metadata": {"name": name, "namespace": "larder"},
            "spec": {"nodeName": self.node, "containers": [{"name": "larder"}]},
            "status": {"phase": "Running", "containerStatuses": [container]},
        })
    }
}

/// Node `n1`, as far as larder has to do with it.
#[derive(Debug, Clone, Default)]
pub(crate) struct FakeNode {
    /// What larder has applied.
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) annotations: BTreeMap<String, String>,
    /// Keys.
    pub(crate) taints: Vec<String>,
}

impl FakeNode {
    fn object(&self, version: u64) -> Value {
        let taints: Vec<_> = self.taints.iter().map(|key| json!({"key": key, "effect": "NoSchedule"})).collect();
        let metadata = json!({"name": "n1", "resourceVersion": version.to_string()});
        json!({"kind": "Node", "apiVersion": "v1", "metadata": metadata, "spec": {"taints": taints}})
    }
}

#[derive(Debug, Clone)]
struct FakePod {
    node: String,
    namespace: String,
    name: String,
    uid: String,
    version: u64,
}

impl FakePod {
    /// Only who it is, which is what was asked for.
    fn metadata(&self) -> Value {
        let metadata = json!({
            "name": self.name, "namespace": self.namespace, "uid": self.uid, "resourceVersion": self.version.to_string(),
            "managedFields": [{"manager": "kubelet", "operation": "Update"}],
        });
        json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
    }
}

impl ApiServer {
    /// Without any pod, over plain HTTP.
    pub(crate) async fn start() -> ApiServer {
        ApiServer::start_with(None, "").await
    }

    /// The same over TLS, with a certificate that its authority has signed.
    pub(crate) async fn start_with_tls() -> ApiServer {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
        let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()));
        let config = config.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
        let config = config.with_single_cert(vec![made.cert.der().clone()], key).unwrap();
        ApiServer::start_with(Some(TlsAcceptor::from(Arc::new(config))), &made.cert.pem()).await
    }

    async fn start_with(tls: Option<TlsAcceptor>, authority: &str) -> ApiServer {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let world = World {
            mood: Mood::Well,
            token: "token-one".into(),
            version: 1,
            pods: BTreeMap::new(),
            changes: Vec::new(),
            forgotten: 0,
            node: FakeNode::default(),
            events: Vec::new(),
            denied: Vec::new(),
            nodes: BTreeMap::new(),
            larders: BTreeMap::new(),
        };
        let account = Arc::new(Account { dir: tempfile::tempdir().unwrap() });
        for (name, text) in [("token", "token-one"), ("ca.crt", authority), ("namespace", "larder")] {
            std::fs::write(account.dir.path().join(name), text).unwrap();
        }
        let server = ApiServer { port, world: watch::Sender::new(world), asked: Arc::default(), account };
        let router = Router::new().fallback(answer).with_state(server.clone());
        tokio::spawn(accept(listener, tls, router, server.world.subscribe()));
        server
    }

    /// As larder's pod would find it.
    pub(crate) fn cluster(&self) -> Cluster {
        let url: Uri = format!("http://127.0.0.1:{}", self.port).parse().unwrap();
        let mut config = kube::Config::new(url);
        config.auth_info.token_file = Some(self.account.token().to_str().unwrap().to_owned());
        Cluster::new(config)
    }

    /// The same for processes: the variables that kubelet sets, and the directory that it mounts.
    pub(crate) fn becomes_the_cluster_of(&self, home: &mut Home) -> &Path {
        home.set("KUBERNETES_SERVICE_HOST", "127.0.0.1");
        home.set("KUBERNETES_SERVICE_PORT", &self.port.to_string());
        self.account.dir.path()
    }

    /// The same for a person: a kubeconfig.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        let dir = self.account.dir.path();
        let authority = dir.join("ca.crt");
        let (scheme, authority) = match std::fs::metadata(&authority).unwrap().len() {
            0 => ("http", Value::Null),
            _ => ("https", authority.to_str().unwrap().into()),
        };
        let server = format!("{scheme}://127.0.0.1:{}", self.port);
        let kubeconfig = json!({
            "kind": "Config", "apiVersion": "v1", "current-context": "test",
            "clusters": [{"name": "c", "cluster": {"server": server, "certificate-authority": authority}}],
            "users": [{"name": "u", "user": {"tokenFile": self.account.token()}}],
            "contexts": [{"name": "test", "context": {"cluster": "c", "user": "u"}}],
        });
        let file = dir.join("kubeconfig");
        std::fs::write(&file, kubeconfig.to_string()).unwrap();
        file
    }

    /// A node with one label, such as `pool=gpu`, and nothing on it.
    pub(crate) fn add_node(&self, name: &str, label: &'static str) {
        self.world.send_modify(|world| {
            world.nodes.insert(name.to_owned(), label);
        });
    }

    /// On a node, the pod `larder-<node>`; port-forwards to it end at this address.
    pub(crate) fn add_larder(&self, node: &str, daemon: SocketAddr) {
        self.put_larder(FakeLarder { node: node.to_owned(), waits_for: None, daemon: Some(daemon) });
    }

    /// The same, but its container has not been started, for this reason.
    pub(crate) fn add_larder_that_waits(&self, node: &str, reason: &'static str) {
        self.put_larder(FakeLarder { node: node.to_owned(), waits_for: Some(reason), daemon: None });
    }

    /// The same, and the API server still takes it for one that runs: its node is away.
    pub(crate) fn add_larder_that_is_away(&self, node: &str) {
        self.put_larder(FakeLarder { node: node.to_owned(), waits_for: None, daemon: None });
    }

    fn put_larder(&self, larder: FakeLarder) {
        let name = format!("larder-{}", larder.node);
        self.world.send_modify(|world| {
            world.larders.insert(name, larder);
        });
    }

    /// In the place of the pod `larder-<node>` comes `larder-<node>-again`.
    pub(crate) fn replace_larder(&self, node: &str, daemon: SocketAddr) {
        self.world.send_modify(|world| {
            let old = world.larders.remove(&format!("larder-{node}")).expect("it is there");
            world.larders.insert(format!("larder-{node}-again"), FakeLarder { daemon: Some(daemon), ..old });
        });
    }

    /// From now on the account has no such right, such as `list` on `nodes`, and says so to who asks.
    pub(crate) fn denies(&self, verb: &str, resource: &str) {
        self.world.send_modify(|world| world.denied.push((verb.into(), resource.into())));
    }

    /// How it answers from now on.
    pub(crate) fn becomes(&self, mood: Mood) {
        self.world.send_modify(|world| world.mood = mood);
    }

    /// From now on only another token is good; it is in the file of the pod at once.
    pub(crate) fn rotate_token(&self) {
        self.world.send_modify(|world| world.token = "token-two".into());
        std::fs::write(self.account.token(), "token-two").unwrap();
    }

    /// A pod comes to a node.
    pub(crate) fn add(&self, node: &str, namespace: &str, name: &str, uid: &str) {
        self.world.send_modify(|world| {
            let [node, namespace, name, uid] = [node, namespace, name, uid].map(str::to_owned);
            let pod = FakePod { node, namespace, name, uid, version: world.version + 1 };
            world.pods.insert(pod.uid.clone(), pod.clone());
            world.change("ADDED", pod);
        });
    }

    /// A pod is deleted, or has ended, which is the same for who asks for those that have not.
    pub(crate) fn remove(&self, uid: &str) {
        self.world.send_modify(|world| {
            let pod = world.pods.remove(uid).expect("the pod is there");
            world.change("DELETED", pod);
        });
    }

    /// Nobody can go on from what he knows: all must be listed.
    pub(crate) fn forget(&self) {
        self.world.send_modify(|world| {
            world.version += 1;
            world.forgotten = world.version;
            world.changes.clear();
        });
    }

    /// A taint on the node.
    pub(crate) fn taint(&self, key: &str) {
        self.world.send_modify(|world| world.node.taints.push(key.to_owned()));
    }

    /// Waits until the node is as it should be.
    pub(crate) async fn node_becomes(&self, expected: impl Fn(&FakeNode) -> bool) -> FakeNode {
        let mut world = self.world.subscribe();
        let seen = tokio::time::timeout(MAX_WAIT, world.wait_for(|world| expected(&world.node))).await;
        let node = || self.world.borrow().node.clone();
        seen.unwrap_or_else(|_| panic!("the node stays {:?}", node())).unwrap().node.clone()
    }

    /// Waits until there are so many events; all of them.
    pub(crate) async fn events(&self, count: usize) -> Vec<Value> {
        let mut world = self.world.subscribe();
        let seen = tokio::time::timeout(MAX_WAIT, world.wait_for(|world| world.events.len() >= count)).await;
        seen.expect("there are events").unwrap().events.clone()
    }

    /// Every request so far, in order.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// Waits until so many requests have come in all.
    pub(crate) async fn was_asked(&self, times: usize) {
        let mut world = self.world.subscribe();
        let enough = async {
            while self.asked().len() < times {
                world.changed().await.unwrap();
            }
        };
        let asked = || self.asked().len();
        assert!(tokio::time::timeout(MAX_WAIT, enough).await.is_ok(), "asked {} times, not {times}", asked());
    }
}

impl World {
    /// Nothing is changed without a body.
    fn change_node(&mut self, body: Option<Value>, merge: bool, query: &HashMap<String, String>) -> Response {
        match body {
            None => {}
            Some(body) if merge => {
                let seen = body["metadata"]["resourceVersion"].as_str().unwrap();
                if seen.parse::<u64>().unwrap() != self.version {
                    return status(409, "the node has changed");
                }
                let taints = body["spec"]["taints"].as_array().unwrap();
                self.node.taints = taints.iter().map(|taint| taint["key"].as_str().unwrap().to_owned()).collect();
            }
            Some(body) => {
                assert_eq!((query["fieldManager"].as_str(), query["force"].as_str()), ("larder", "true"));
                let texts = |field: &str| serde_json::from_value(body["metadata"][field].clone()).unwrap();
                (self.node.labels, self.node.annotations) = (texts("labels"), texts("annotations"));
            }
        }
        self.version += 1;
        self.node.object(self.version).to_string().into_response()
    }

    fn change(&mut self, kind: &'static str, pod: FakePod) {
        self.version += 1;
        self.changes.push((self.version, kind, FakePod { version: self.version, ..pod }));
    }
}

async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, router: Router, world: watch::Receiver<World>) {
    while let Ok((stream, _)) = listener.accept().await {
        let (tls, router, mut world) = (tls.clone(), router.clone(), world.clone());
        tokio::spawn(async move {
            let connection = async {
                match tls {
                    None => serve(stream, router).await,
                    Some(tls) => match tls.accept(stream).await {
                        Ok(stream) => serve(stream, router).await,
                        Err(_refused) => {}
                    },
                }
            };
            tokio::select! {
                () = connection => {}
                _down = world.wait_for(|world| world.mood == Mood::Down) => {}
            }
        });
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, router: Router) {
    let service = TowerToHyperService::new(router);
    let builder = auto::Builder::new(TokioExecutor::new());
    let _ended = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
}

async fn answer(
    State(server): State<ApiServer>,
    method: Method,
    uri: Uri,
    Query(query): Query<HashMap<String, String>>,
    headers: HeaderMap,
    upgrade: Upgrade,
    body: Bytes,
) -> Response {
    let said = |name| headers.get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
    let asked = Asked { query: query.clone(), accept: said(header::ACCEPT) };
    let (mood, token) = {
        let world = server.world.borrow();
        (world.mood, format!("Bearer {}", world.token))
    };
    server.asked.lock().unwrap().push(asked.clone());
    // Whoever waits for a request looks.
    server.world.send_modify(|_| {});
    match mood {
        Mood::Refuses(code) => return status(code, "no rights, says the test"),
        Mood::Babbles => return (StatusCode::OK, "<html>welcome</html>\n").into_response(),
        Mood::Hangs => drop(server.world.subscribe().wait_for(|world| world.mood != Mood::Hangs).await),
        Mood::Well | Mood::Down => {}
    }
    if said(header::AUTHORIZATION) != token {
        return status(401, "Unauthorized");
    }
    match uri.path() {
        "/api/v1/pods" if asked.is_watch() => watch_pods(&server, &query),
        "/api/v1/pods" => list_pods(&server, &query),
        "/api/v1/nodes/n1" => {
            let (mut answered, merge) = (status(500, ""), said(header::CONTENT_TYPE) == "application/merge-patch+json");
            let body = (method == Method::PATCH).then(|| serde_json::from_slice(&body).unwrap());
            server.world.send_modify(|world| answered = world.change_node(body, merge, &query));
            answered
        }
        "/apis/authentication.k8s.io/v1/tokenreviews" if method == Method::POST => {
            review(&serde_json::from_slice(&body).unwrap())
        }
        "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews" if method == Method::POST => {
            let mut asked: Value = serde_json::from_slice(&body).unwrap();
            let attributes = &asked["spec"]["resourceAttributes"];
            let right = |key: &str| attributes[key].as_str().unwrap().to_owned();
            let is_denied = server.world.borrow().denied.contains(&(right("verb"), right("resource")));
            asked["status"] = json!({"allowed": !is_denied});
            (StatusCode::CREATED, asked.to_string()).into_response()
        }
        "/apis/events.k8s.io/v1/namespaces/default/events" if method == Method::POST => {
            let event: Value = serde_json::from_slice(&body).unwrap();
            server.world.send_modify(|world| world.events.push(event.clone()));
            (StatusCode::CREATED, event.to_string()).into_response()
        }
        "/api/v1/nodes" => server.refusal("list", "nodes").unwrap_or_else(|| list_nodes(&server, &query)),
        "/api/v1/namespaces/larder/pods" => {
            server.refusal("list", "pods").unwrap_or_else(|| list_larders(&server, &query))
        }
        "/api/v1/namespaces/elsewhere/pods" => list("Pod", Vec::new()),
        path => match path
            .strip_prefix("/api/v1/namespaces/larder/pods/")
            .and_then(|path| path.strip_suffix("/portforward"))
        {
            Some(pod) => {
                server.refusal("get", "pods/portforward").unwrap_or_else(|| forward(&server, pod, &query, upgrade))
            }
            None => status(404, "not found"),
        },
    }
}

impl ApiServer {
    /// The answer to what is denied.
    fn refusal(&self, verb: &'static str, resource: &'static str) -> Option<Response> {
        let denied = (verb.to_owned(), resource.to_owned());
        let is_denied = self.world.borrow().denied.contains(&denied);
        is_denied.then(|| {
            status(403, &format!("{resource} is forbidden: User \"jane\" cannot {verb} resource \"{resource}\""))
        })
    }
}

fn list(kind: &str, items: Vec<Value>) -> Response {
    let metadata = json!({"resourceVersion": "1"});
    json!({"kind": format!("{kind}List"), "apiVersion": "v1", "metadata": metadata, "items": items})
        .to_string()
        .into_response()
}

fn list_nodes(server: &ApiServer, query: &HashMap<String, String>) -> Response {
    let selector = &query["labelSelector"];
    if !selector.contains('=') {
        return status(400, &format!("unable to parse requirement: {selector}"));
    }
    let world = server.world.borrow();
    let selected = world.nodes.iter().filter(|(_, label)| **label == selector.as_str());
    list("Node", selected.map(|(name, _)| json!({"metadata": {"name": name}})).collect())
}

fn list_larders(server: &ApiServer, query: &HashMap<String, String>) -> Response {
    assert_eq!(query["labelSelector"], larder::kubernetes::POD_LABEL);
    let node = query.get("fieldSelector").map(|selector| selector.strip_prefix("spec.nodeName=").unwrap());
    let world = server.world.borrow();
    let selected = world.larders.iter().filter(|(_, larder)| node.is_none_or(|node| node == larder.node));
    list("Pod", selected.map(|(name, larder)| larder.object(name)).collect())
}

/// Only to the port that larder has in its pod.
fn forward(server: &ApiServer, pod: &str, query: &HashMap<String, String>, upgrade: Upgrade) -> Response {
    let port: u16 = query["ports"].parse().unwrap();
    assert_eq!(port, larder::kubernetes::POD_PORT);
    match server.world.borrow().larders.get(pod) {
        None => status(404, &format!("pods \"{pod}\" not found")),
        Some(FakeLarder { daemon: None, .. }) => status(502, "error dialing backend: no route to host"),
        Some(FakeLarder { daemon: Some(daemon), .. }) => port_forward::begin(upgrade, port, *daemon),
    }
}

fn status(code: u16, message: &str) -> Response {
    let body = json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code});
    (StatusCode::from_u16(code).unwrap(), body.to_string()).into_response()
}

/// A token for us is `larder.<namespace>--<name>.x`; one for the API server begins otherwise.
fn review(asked: &Value) -> Response {
    assert_eq!(asked["spec"]["audiences"], json!(["larder.dev"]));
    let token = asked["spec"]["token"].as_str().unwrap();
    let mut answer = json!({"kind": "TokenReview", "apiVersion": "authentication.k8s.io/v1", "spec": {}});
    let of = token.split('.').nth(1).and_then(|of| of.split_once("--"));
    answer["status"] = match of {
        None => json!({"error": "not a token of ours"}),
        Some((namespace, name)) => {
            let user = json!({"username": format!("system:serviceaccount:{namespace}:{name}")});
            let audience = if token.starts_with("larder.") { "larder.dev" } else { "https://kubernetes.default.svc" };
            json!({"authenticated": true, "user": user, "audiences": [audience]})
        }
    };
    (StatusCode::CREATED, answer.to_string()).into_response()
}

/// The node that is asked about.
fn node_of(query: &HashMap<String, String>) -> String {
    let selector = query.get("fieldSelector").expect("not all pods of the cluster are wanted");
    let node = selector.strip_prefix("spec.nodeName=").expect("pods of one node are wanted");
    let node = node.strip_suffix(",status.phase!=Succeeded,status.phase!=Failed");
    node.expect("pods that have ended are not wanted").to_owned()
}

fn list_pods(server: &ApiServer, query: &HashMap<String, String>) -> Response {
    let world = server.world.borrow();
    let node = node_of(query);
    let from: usize = query.get("continue").map_or(0, |token| token.parse().unwrap());
    let limit: usize = query["limit"].parse().unwrap();
    let all: Vec<_> = world.pods.values().filter(|pod| pod.node == node).collect();
    let items: Vec<_> = all.iter().skip(from).take(limit).map(|pod| pod.metadata()).collect();
    let mut metadata = json!({"resourceVersion": world.version.to_string()});
    if from + limit < all.len() {
        metadata["continue"] = (from + limit).to_string().into();
    }
    let list = json!({
        "kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": metadata, "items": items,
    });
    list.to_string().into_response()
}

fn watch_pods(server: &ApiServer, query: &HashMap<String, String>) -> Response {
    let node = node_of(query);
    let since: u64 = query["resourceVersion"].parse().unwrap();
    let lines = stream::unfold((server.world.subscribe(), since), move |(mut world, since)| {
        let node = node.clone();
        async move {
            let mut text = String::new();
            loop {
                let version = {
                    let world = world.borrow_and_update();
                    if since < world.forgotten {
                        let gone = json!({"kind": "Status", "code": 410, "status": "Failure", "reason": "Expired"});
                        text = format!("{}\n", json!({"type": "ERROR", "object": gone}));
                    }
                    for (_, kind, pod) in world.changes.iter().filter(|(at, _, pod)| *at > since && pod.node == node) {
                        text += &format!("{}\n", json!({"type": kind, "object": pod.metadata()}));
                    }
                    if world.version > since {
                        let metadata = json!({"resourceVersion": world.version.to_string()});
                        let object = json!({"kind": "Pod", "apiVersion": "v1", "metadata": metadata});
                        text += &format!("{}\n", json!({"type": "BOOKMARK", "object": object}));
                    }
                    world.version
                };
                if !text.is_empty() {
                    return Some((Ok::<_, Infallible>(text), (world, version)));
                }
                world.changed().await.ok()?;
            }
        }
    });
    Response::new(Body::from_stream(lines))
}

//! The HTTP API from outside: a cache with a door on a socket and on TCP, asked by the client and by raw requests.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use larder::cache::{Cache, CacheConfig, Limits, MinFree, PageCache};
use larder::client::Client;
use larder::fault::Code;
use larder::model::{Bytes, Share};
use larder::serve::{self, Door, ReadyLatches};
use larder::source::{Environment, SourceConfig, Sources};
use larder::telemetry::Metrics;
use larder::wire::http::{OpenRequest, Phase, PullRequest, PullStatus};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

struct Node {
    dir: TempDir,
    client: Client,
    address: SocketAddr,
    latches: ReadyLatches,
    shutdown: CancellationToken,
    doors: Vec<JoinHandle<()>>,
}

impl Node {
    async fn start() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let config = CacheConfig {
            root: dir.path().join("volume"),
            limits: Limits {
                quota: Some(Share::Bytes(Bytes(64 << 20))),
                low_water_percent: 95,
                min_free: MinFree::Of(Share::Bytes(Bytes(0))),
                min_residency: Duration::ZERO,
            },
            in_kubernetes: false,
            pull_memory: Bytes(16 << 20),
            pull_connections: 4,
            background_rate: None,
            page_cache: PageCache::Auto,
            stall_timeout: Duration::from_secs(30),
            retry_attempts: 2,
            warm_on_open: false,
            metrics_by_model: false,
        };
        let metrics = Arc::new(Metrics::new());
        let counted = metrics.clone();
        let started = move || {
            let sources = Sources::new(SourceConfig::default(), Environment::default());
            Cache::start(config, sources, counted).unwrap()
        };
        let cache = tokio::task::spawn_blocking(started).await.unwrap();
        let (latches, shutdown) = (ReadyLatches::new(), CancellationToken::new());
        let door = Door { cache, metrics, latches: latches.clone(), shutdown: shutdown.clone() };
        let router = serve::router(door);
        let socket = dir.path().join("larder.sock");
        let unix = serve::bind_unix(&socket).await.unwrap();
        let tcp = serve::bind_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = tcp.tcp_address().unwrap();
        let doors = [unix, tcp].map(|l| tokio::spawn(serve::listen(l, router.clone(), None, shutdown.clone())));
        Node { client: Client::new(&socket), address, latches, shutdown, doors: doors.into(), dir }
    }

    /// A directory with files, and the reference to it.
    fn origin(&self, name: &str, files: &[(&str, &str)]) -> String {
        let root = self.dir.path().join(name);
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        reference(&root)
    }

    async fn pulled(&self, reference: &str) -> PullStatus {
        let pull = self.client.pull(&wanted(reference)).await.unwrap();
        let events = self.client.watch(&pull.id).await.unwrap();
        events.map(|event| event.unwrap()).collect::<Vec<_>>().await.pop().unwrap()
    }

    /// The status line, the headers and the body of the answer to a raw request on TCP.
    async fn raw(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    async fn get(&self, path: &str) -> String {
        self.raw(&format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")).await
    }

    async fn post(&self, path: &str, body: &str) -> String {
        let length = body.len();
        self.raw(&format!(
            "POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n\r\n{body}"
        ))
        .await
    }
}

fn reference(root: &Path) -> String {
    format!("file://{}", root.display())
}

fn wanted(reference: &str) -> PullRequest {
    PullRequest::of(reference)
}

fn to_open(reference: &str) -> OpenRequest {
    OpenRequest::of(reference)
}

fn json(answer: &str) -> serde_json::Value {
    serde_json::from_str(answer.split_once("\r\n\r\n").unwrap().1).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_is_pulled_followed_opened_listed_and_removed() {
    let node = Node::start().await;
    let origin = node.origin("origin", &[("config.json", "{}"), ("weights/a.bin", "bytes")]);

    let missing = node.client.open(&to_open(&origin)).await.unwrap_err();
    assert_eq!(missing.code, Code::NotLocal);

    let ended = node.pulled(&origin).await;
    assert_eq!((ended.phase, ended.percent, ended.bytes_total), (Phase::Ready, 100, 7), "{ended:?}");
    assert_eq!(node.client.pull_status(&ended.id).await.unwrap().phase, Phase::Ready);
    assert_eq!(node.client.pulls().await.unwrap()[0].id, ended.id);

    let opened = node.client.open(&to_open(&origin)).await.unwrap();
    assert_eq!(Some(&opened.model.path), ended.path.as_ref());
    assert_eq!(fs::read_to_string(PathBuf::from(&opened.model.path).join("weights/a.bin")).unwrap(), "bytes");

    let listed = node.client.models().await.unwrap();
    assert_eq!(listed.iter().map(|model| &model.id).collect::<Vec<_>>(), [&opened.model.id]);
    for name in [&opened.model.id, &origin] {
        let detail = node.client.model(name).await.unwrap();
        let files: Vec<_> = detail.manifest_files.iter().map(|file| (file.path.as_str(), file.size)).collect();
        assert_eq!(files, [("config.json", 2), ("weights/a.bin", 5)], "by {name}");
    }

    let removed = node.client.remove(&origin).await.unwrap();
    assert_eq!(removed.models[0].id, opened.model.id);
    // Counted in blocks of the file system.
    assert!(removed.freed_bytes >= 7, "{}", removed.freed_bytes);
    assert!(node.client.models().await.unwrap().is_empty());
    assert_eq!(node.client.model(&opened.model.id).await.unwrap_err().code, Code::NotLocal);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_is_accepted_with_its_place() {
    let node = Node::start().await;
    let origin = node.origin("origin", &[("a", "1")]);
    let answer = node.post("/v1/pulls", &format!(r#"{{"reference":"{origin}"}}"#)).await;
    let id = json(&answer)["id"].as_str().unwrap().to_owned();
    assert!(answer.starts_with("HTTP/1.1 202 ") || answer.starts_with("HTTP/1.1 200 "), "{answer}");
    assert!(answer.contains(&format!("\r\nlocation: /v1/pulls/{id}\r\n")), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reference_that_cannot_be_read_is_refused_when_it_is_sent() {
    let node = Node::start().await;
    let problem = node.client.pull(&wanted("ftp://host/m")).await.unwrap_err();
    assert_eq!(problem.code, Code::BadReference);
    assert!(problem.action.contains("https://host/m"), "{}", problem.action);
    let bad_pattern = PullRequest { include: vec!["[".into()], ..wanted("hf://o/n") };
    assert_eq!(node.client.pull(&bad_pattern).await.unwrap_err().code, Code::BadPattern);
    assert!(node.client.pulls().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_fails_says_why_in_its_status() {
    let node = Node::start().await;
    let ended = node.pulled(&reference(&node.dir.path().join("nowhere"))).await;
    assert_eq!(ended.phase, Phase::Failed);
    let error = ended.error.unwrap();
    assert_eq!((error.code.as_str(), error.status), ("repo-not-found", 404));
    assert!(!error.action.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_asked_for_is_not_found() {
    let node = Node::start().await;
    assert_eq!(node.client.pull_status("nothing").await.unwrap_err().code, Code::PullNotFound);
    assert_eq!(node.client.cancel("nothing").await.unwrap_err().code, Code::PullNotFound);
    assert_eq!(node.client.watch("nothing").await.err().unwrap().code, Code::PullNotFound);
    assert_eq!(node.client.remove("0123456789abcdef").await.unwrap_err().code, Code::NotLocal);
    let answer = node.get("/v2/models").await;
    assert_eq!(
        (json(&answer)["code"].as_str(), json(&answer)["status"].as_u64()),
        (Some("route-not-found"), Some(404))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_list_can_be_narrowed_to_one_reference() {
    let node = Node::start().await;
    let (one, two) = (node.origin("one", &[("a", "1")]), node.origin("two", &[("a", "2")]));
    node.pulled(&one).await;
    node.pulled(&two).await;
    assert_eq!(node.client.models().await.unwrap().len(), 2);
    let answer = json(&node.get(&format!("/v1/models?reference={one}")).await);
    assert_eq!(answer["models"].as_array().unwrap().len(), 1);
    assert_eq!(answer["models"][0]["reference"].as_str(), Some(one.as_str()));
    assert_eq!(json(&node.get("/v1/models?reference=nonsense").await)["code"], "bad-reference");
    assert_eq!(json(&node.get("/v1/models?referense=x").await)["code"], "bad-request");
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_follows_the_latches() {
    let node = Node::start().await;
    assert!(node.client.reachable().await);
    assert!(node.client.readiness().await.unwrap().ready);
    let latch = node.latches.hold("the volume");
    let readiness = node.client.readiness().await.unwrap();
    assert_eq!((readiness.ready, readiness.waiting_for), (false, vec!["the volume".to_owned()]));
    assert!(node.get("/readyz").await.starts_with("HTTP/1.1 503 "));
    assert!(node.get("/livez").await.starts_with("HTTP/1.1 200 "));
    drop(latch);
    assert!(node.client.readiness().await.unwrap().ready);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_numbers_tell_what_happened() {
    let node = Node::start().await;
    let origin = node.origin("origin", &[("a", "12345")]);
    node.pulled(&origin).await;
    node.client.open(&to_open(&origin)).await.unwrap();
    let answer = node.get("/metrics").await;
    assert!(answer.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"), "{answer}");
    for line in [
        "larder_pulls_total{outcome=\"ready\"} 1",
        "larder_origin_bytes_total 5",
        "larder_opens_total{outcome=\"hit\"} 1",
        "larder_models 1",
        "larder_blob_bytes 4096",
        "larder_quota_bytes 67108864",
        "larder_pulls_active 0",
        "larder_volume_read_only 0",
        "larder_http_requests_total{route=\"/v1/opens\",status=\"200\"} 1",
    ] {
        assert!(answer.lines().any(|l| l == line), "`{line}` is missing in\n{answer}");
    }
    assert!(!answer.contains(&node.dir.path().display().to_string()), "no label has what somebody sent");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_web_page_is_kept_out_on_tcp() {
    let node = Node::start().await;
    let rebound = "GET /v1/models HTTP/1.1\r\nhost: evil.example\r\nconnection: close\r\n\r\n";
    assert_eq!(json(&node.raw(rebound).await)["code"], "policy-denied");
    let elsewhere = "DELETE /v1/models/x HTTP/1.1\r\nhost: localhost\r\norigin: https://evil.example\r\n\
                     connection: close\r\n\r\n";
    assert_eq!(json(&node.raw(elsewhere).await)["code"], "policy-denied");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_document_is_served() {
    let node = Node::start().await;
    let served = json(&node.get("/openapi.json").await);
    assert_eq!(served, serde_json::to_value(serve::openapi()).unwrap());
}

/// A pull that does not end by itself within this test: its source takes the connection and never answers.
async fn a_pull_that_goes_on(node: &Node) -> (PullStatus, TcpListener) {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let reference = format!("http://{}/model.bin", silent.local_addr().unwrap());
    (node.client.pull(&wanted(&reference)).await.unwrap(), silent)
}

#[tokio::test(flavor = "multi_thread")]
async fn asking_again_joins_and_taking_back_ends_it_for_all() {
    let node = Node::start().await;
    let (first, _silent) = a_pull_that_goes_on(&node).await;
    let second = node.client.pull(&wanted(&first.reference)).await.unwrap();
    assert_eq!((&second.id, second.asked), (&first.id, 2));
    let error = node.client.open(&to_open(&first.reference)).await.unwrap_err();
    assert_eq!(error.code, Code::NotReady);
    assert!(error.retry_after_seconds.is_some());

    let events = node.client.watch(&first.id).await.unwrap();
    node.client.cancel(&first.id).await.unwrap();
    let last = events.map(|event| event.unwrap()).collect::<Vec<_>>().await.pop().unwrap();
    assert_eq!(last.phase, Phase::Cancelled);
    assert_eq!(node.client.pull_status(&first.id).await.unwrap().phase, Phase::Cancelled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_door_that_closes_ends_the_streams_and_says_so() {
    let mut node = Node::start().await;
    let (pull, _silent) = a_pull_that_goes_on(&node).await;
    let mut events = node.client.watch(&pull.id).await.unwrap();
    assert!(!events.next().await.unwrap().unwrap().phase.is_final());
    node.shutdown.cancel();
    let problem = loop {
        match events.next().await.expect("it ends with a problem") {
            Ok(pull) => assert!(!pull.phase.is_final(), "{pull:?}"),
            Err(problem) => break problem,
        }
    };
    assert_eq!(problem.code, Code::DaemonUnreachable);
    for door in node.doors.drain(..) {
        door.await.unwrap();
    }
    assert!(!node.client.reachable().await);
    assert!(!node.dir.path().join("larder.sock").exists());
}

//! The socket door: a cache in this process that hands out its files, to the client library and to clients that keep no
//! rule.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::Arc;
use std::time::Duration;

use futures::future::try_join_all;
use larder::fault::Code;
use larder::serve::fd::raise_descriptor_limit;
use larder::telemetry::metrics::LeaseCounts;
use larder::wire::frame::{
    Decoder, MAX_ANSWER_BYTES, MAX_BATCH_FILES, MAX_REQUEST_BYTES, decode, receive_with_descriptors,
};
use larder::wire::http::{HolderKind, LeaseTerms};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;

use super::support::frames::{FrameDoor, RawFrames, frame};
use super::support::model_origin::ModelOrigin;
use super::support::node::{TestNode, reference};

/// More connections than any test but those that count them has.
const PLENTY: usize = 4096;

/// Longest wait for what happens by itself: a bound against hanging, not a measurement.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// A pattern that shows a byte in the wrong place.
fn bytes(seed: u8, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

fn model() -> BTreeMap<String, Vec<u8>> {
    [("config.json", b"{}".to_vec()), ("empty", Vec::new()), ("sub/model.safetensors", bytes(1, 300_000))]
        .map(|(path, bytes)| (path.to_owned(), bytes))
        .into()
}

/// A node, an origin that has [`model`], and the doors over it.
struct Scene {
    door: FrameDoor,
    node: TestNode,
    origin: ModelOrigin,
    reference: String,
}

impl Scene {
    async fn with(most_connections: usize, files: &BTreeMap<String, Vec<u8>>) -> Scene {
        let origin = ModelOrigin::start().await;
        for (path, bytes) in files {
            origin.put("m", path, bytes);
        }
        let node = TestNode::new().start().await;
        let door = FrameDoor::start(node.cache(), most_connections).await;
        Scene { door, node, reference: origin.reference("m"), origin }
    }

    async fn absent() -> Scene {
        Scene::with(PLENTY, &model()).await
    }

    async fn local() -> Scene {
        let scene = Scene::absent().await;
        scene.node.ready(&scene.reference).await;
        scene
    }

    fn open(&self) -> Value {
        json!({"type": "open", "protocol": 1, "reference": self.reference, "descriptors": true})
    }

    /// Waits until so many leases are held: a connection that has ended takes its leases with it a moment later.
    async fn are_held(&self, leases: usize) {
        let held = async {
            while self.node.cache().leases().len() != leases {
                tokio::task::yield_now().await;
            }
        };
        let held = tokio::time::timeout(MAX_WAIT, held).await;
        held.unwrap_or_else(|_| panic!("{:#?}", self.node.cache().leases()));
    }
}

/// `open` with other fields.
fn with(mut request: Value, fields: Value) -> Value {
    request.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn every_file_of_a_model_is_handed_out_without_a_copy() {
    let scene = Scene::local().await;
    let model = scene.door.opener().open(&reference(&scene.reference)).await.unwrap();
    let files = self::model();
    assert_eq!(model.files().map(|file| &file.path).collect::<Vec<_>>(), files.keys().collect::<Vec<_>>());
    let snapshot = scene.node.cache().public().join(model.path_below_public());
    assert_eq!(snapshot.to_str().unwrap(), model.info().path);
    for (path, bytes) in &files {
        assert_eq!(&*model.mmap(path).unwrap(), bytes, "{path}");
        let handed = model.file(path).unwrap().metadata().unwrap();
        let local = std::fs::metadata(snapshot.join(path)).unwrap();
        assert_eq!((handed.dev(), handed.ino()), (local.dev(), local.ino()), "{path} was copied");
    }
    assert_eq!(model.file("nothing").unwrap_err().code, Code::FileNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_opened_and_its_first_files_come_at_once() {
    let scene = Scene::local().await;
    let mut client = UnixStream::connect(scene.door.socket()).await.unwrap();
    client.write_all(&frame(&scene.open().to_string())).await.unwrap();
    let (mut buffer, mut came) = ([0; 16 * 1024], VecDeque::new());
    let receive = || receive_with_descriptors(client.as_fd(), &mut buffer, &mut came);
    let received = client.async_io(Interest::READABLE, receive).await.unwrap();
    let (mut bytes, mut decoder) = (&buffer[..received], Decoder::new(MAX_ANSWER_BYTES));
    let mut hear = || decode::<Value>(&decoder.take(&mut bytes).unwrap().expect("a whole frame")).unwrap();
    let (opened, files) = (hear(), hear());
    assert_eq!((&opened["type"], &opened["files"]), (&json!("opened"), &json!(3)));
    assert_eq!((&files["type"], &files["descriptors"]), (&json!("files"), &json!(3)));
    assert_eq!((bytes, came.len()), (&[][..], 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_program_without_a_runtime_opens_models_too() {
    let scene = Scene::absent().await;
    let (opener, asked) = (scene.door.opener(), reference(&scene.reference));
    let opened = tokio::task::spawn_blocking(move || {
        let model = opener.open_blocking(&asked).unwrap();
        assert_eq!(&*model.mmap("sub/model.safetensors").unwrap(), bytes(1, 300_000));
        assert_eq!(model.lease().unwrap().kind, HolderKind::Connection);
        model
    });
    let model = opened.await.unwrap();
    assert_eq!(scene.node.cache().leases().len(), 1);
    drop(model);
    scene.are_held(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_descriptor_can_only_be_read_and_has_a_position_of_its_own() {
    let scene = Scene::local().await;
    let opener = scene.door.opener().file("sub/model.safetensors");
    let asked = reference(&scene.reference);
    let (one, other) = (opener.open(&asked).await.unwrap(), opener.open(&asked).await.unwrap());
    assert_eq!(one.files().len(), 1);
    let (one, other) = (one.file("sub/model.safetensors").unwrap(), other.file("sub/model.safetensors").unwrap());
    let flags = rustix::fs::fcntl_getfl(one.as_fd()).unwrap();
    assert_eq!(flags & rustix::fs::OFlags::RWMODE, rustix::fs::OFlags::RDONLY);
    assert!(rustix::io::fcntl_getfd(one.as_fd()).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
    assert!(one.write_at(b"x", 0).is_err());
    rustix::fs::seek(one, rustix::fs::SeekFrom::Start(7)).unwrap();
    assert_eq!(rustix::fs::tell(other).unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_not_local_is_pulled_and_told_of() {
    let scene = Scene::absent().await;
    scene.origin.hold_after(64 << 10);
    let (say, mut hear) = tokio::sync::watch::channel(0);
    let opener = scene.door.opener().on_progress(move |pull| {
        say.send_replace(pull.bytes_total);
    });
    let asked = reference(&scene.reference);
    let opening = tokio::spawn(async move { opener.open(&asked).await });
    hear.wait_for(|total| *total == 300_002).await.unwrap();
    assert!(scene.node.cache().leases().is_empty());
    scene.origin.let_go();
    let model = opening.await.unwrap().unwrap();
    assert_eq!(&*model.mmap("sub/model.safetensors").unwrap(), bytes(1, 300_000));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_want_to_wait_is_told_where_it_stands() {
    let scene = Scene::absent().await;
    let (opener, asked) = (scene.door.opener().wait(false), reference(&scene.reference));
    assert_eq!(opener.open(&asked).await.unwrap_err().code, Code::NotLocal);
    scene.origin.hold_after(0);
    let mut pull = scene.node.cache().pull(&asked).unwrap();
    scene.origin.is_waited_for().await;
    assert_eq!(opener.open(&asked).await.unwrap_err().code, Code::NotReady);
    scene.origin.let_go();
    pull.finished().await;
    opener.open(&asked).await.unwrap();
    let missing = opener.clone().file("no.bin").open(&asked).await.unwrap_err();
    assert_eq!((missing.code, missing.message.contains("it has no file \"no.bin\"")), (Code::FileNotFound, true));
    let version = opener.version("v0").open(&asked).await.unwrap_err();
    assert_eq!((version.code, version.message.contains("its version `v0` is not local")), (Code::NotLocal, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_fails_is_an_error_with_its_code() {
    let scene = Scene::absent().await;
    let asked = reference(&scene.origin.reference("nothing"));
    let error = scene.door.opener().open(&asked).await.unwrap_err();
    assert_eq!(error.code, Code::RepoNotFound, "{error}");
    assert!(!error.action.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_connection_is_the_lease() {
    let scene = Scene::local().await;
    let model = scene.door.opener().open(&reference(&scene.reference)).await.unwrap();
    let leases = scene.node.cache().leases();
    assert_eq!(leases, [model.lease().unwrap()]);
    let uid = rustix::process::getuid().as_raw();
    assert_eq!(leases[0].holder, format!("process {} of user {uid}", std::process::id()));
    assert_eq!(scene.node.cache().gauges().leases, LeaseCounts { connections: 1, ..LeaseCounts::default() });
    let refused = scene.node.cache().remove(&scene.reference).unwrap_err();
    assert!(refused.to_string().contains("it is held by process"), "{refused}");
    drop(model);
    scene.are_held(0).await;
    scene.node.cache().remove(&scene.reference).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_was_asked_for_outlives_the_connection() {
    let scene = Scene::local().await;
    let terms = LeaseTerms { holder: Some("job-7".into()), ..LeaseTerms::default() };
    let model = scene.door.opener().lease(terms).open(&reference(&scene.reference)).await.unwrap();
    let lasting = model.lasting_lease().unwrap().clone();
    assert_eq!((lasting.kind, lasting.holder.as_str()), (HolderKind::Name, "job-7"));
    drop(model);
    scene.are_held(1).await;
    assert_eq!(scene.node.cache().leases(), std::slice::from_ref(&lasting));

    let mut raw = scene.door.raw().await;
    raw.say(json!({"type": "release", "lease": lasting.id})).await;
    assert_eq!(raw.hears("released").await["lease"]["holder"], "job-7");
    assert!(scene.node.cache().leases().is_empty());
    raw.say(json!({"type": "release", "lease": lasting.id})).await;
    raw.hears_error("lease-not-found").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_holds_several_models_and_may_let_go_of_one() {
    let scene = Scene::local().await;
    let mut raw = scene.door.raw().await;
    let mut leases = Vec::new();
    for _ in 0..64 {
        raw.say(with(scene.open(), json!({"descriptors": false}))).await;
        leases.push(raw.hears("opened").await["lease"]["id"].as_str().unwrap().to_owned());
        raw.hears("files").await;
    }
    raw.say(scene.open()).await;
    assert!(raw.hears_error("too-many-holders").await.contains("64 models are open"));
    raw.say(json!({"type": "release", "lease": leases[0]})).await;
    raw.hears("released").await;
    assert_eq!(scene.node.cache().leases().len(), 63);
    raw.say(scene.open()).await;
    raw.hears("opened").await;
    drop(raw);
    scene.are_held(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_files_than_one_batch_come_when_they_are_asked_for() {
    let many = 1000;
    let files = (0..many).map(|at| (format!("{at:04}.bin"), vec![(at % 251) as u8; 1 + at % 3])).collect();
    let scene = Scene::with(PLENTY, &files).await;
    raise_descriptor_limit();
    let model = scene.door.opener().open(&reference(&scene.reference)).await.unwrap();
    assert_eq!(model.files().len(), many);
    for (path, bytes) in &files {
        assert_eq!(&*model.mmap(path).unwrap(), bytes, "{path}");
    }

    let mut raw = scene.door.raw().await;
    raw.say(scene.open()).await;
    assert_eq!(raw.hears("opened").await["files"], many);
    let mut came = 0;
    for batch in 0..many.div_ceil(MAX_BATCH_FILES) {
        if batch > 0 {
            raw.say(json!({"type": "more"})).await;
        }
        let files = raw.hears("files").await;
        assert_eq!(files["descriptors"], files["files"].as_array().unwrap().len());
        came += files["files"].as_array().unwrap().len();
    }
    assert_eq!(came, many);
    raw.say(json!({"type": "more"})).await;
    assert!(raw.hears_error("bad-request").await.contains("all of them were sent"));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_frames_are_told_and_end_their_connection_alone() {
    let scene = Scene::local().await;
    let _other = scene.door.opener().open(&reference(&scene.reference)).await.unwrap();
    let most = MAX_REQUEST_BYTES;
    let open = |fields: Value| frame(&with(scene.open(), fields).to_string());
    for (sent, says) in [
        (vec![0, 0, 0, 0], "its length is 0".to_owned()),
        (frame(&" ".repeat(most + 1)), format!("its length is {} bytes, more than {most}", most + 1)),
        (vec![0, 255, 255, 255], format!("its length is 16777215 bytes, more than {most}")),
        (frame("GET / HTTP/1.1"), "expected value at line 1 column 1".to_owned()),
        (frame("\u{fffd}"), "expected value".to_owned()),
        (frame("[[[[[[[[[["), "it is a list".to_owned()),
        (frame(&"{\"a\":".repeat(10_000)), "recursion limit exceeded".to_owned()),
        (frame(r#"{"type":"remove","model":"x"}"#), "unknown variant `remove`".to_owned()),
        (open(json!({"wiat": true})), "unknown field `wiat`".to_owned()),
        (open(json!({"wait": "yes"})), "invalid type: string \"yes\", expected a boolean".to_owned()),
        (open(json!({"lease": {"forever": true}})), "unknown field `forever`".to_owned()),
    ] {
        let mut raw = scene.door.raw().await;
        raw.send(&sent).await;
        let detail = raw.hears_error("bad-request").await;
        assert!(detail.starts_with("cannot read a frame: ") && detail.contains(&says), "{detail}");
        assert_eq!(raw.hear().await, None, "after {says}");
    }
    assert_eq!(scene.node.cache().leases().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_is_torn_ends_its_connection() {
    let scene = Scene::local().await;
    let whole = frame(&scene.open().to_string());
    for length in [1, 3, 4, 5, whole.len() - 1] {
        let mut raw = scene.door.raw().await;
        raw.send(&whole[..length]).await;
        raw.finish().await;
        assert_eq!(raw.hear().await, None, "{length} bytes");
    }
    let mut raw = scene.door.raw().await;
    for byte in &whole {
        raw.send(&[*byte]).await;
    }
    raw.hears("opened").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn after_an_error_about_a_model_the_connection_may_ask_again() {
    let scene = Scene::local().await;
    let mut raw = scene.door.raw().await;
    for (fields, code, says) in [
        (json!({"protocol": 2, "later": true}), "bad-request", "speaks protocol 1"),
        (json!({"reference": "ftp://x"}), "bad-reference", "ftp"),
        (json!({"reference": "hf://org/name@main"}), "not-local", "it is not local"),
        (json!({"include": ["["]}), "bad-pattern", "["),
        (json!({"lease": {}}), "bad-request", "nothing says when it ends"),
        (json!({"file": "../config.json"}), "file-not-found", "no file"),
        (json!({"file": "sub"}), "file-not-found", "no file"),
    ] {
        raw.say(with(scene.open(), fields)).await;
        let detail = raw.hears_error(code).await;
        assert!(detail.contains(says), "{detail}");
    }
    assert!(scene.node.cache().leases().is_empty());
    raw.say(scene.open()).await;
    raw.hears("opened").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_in_a_request_never_becomes_a_path() {
    let scene = Scene::local().await;
    let mut raw = scene.door.raw().await;
    let blobs = scene.node.volume().join("FORMAT");
    for name in ["/etc/passwd", "../../FORMAT", "sub/../config.json", "./config.json", "config.json/", "", "\0", "*"] {
        raw.say(with(scene.open(), json!({"file": name}))).await;
        raw.hears_error("file-not-found").await;
        raw.say(with(scene.open(), json!({"version": name}))).await;
        raw.hears_error("not-local").await;
        raw.say(json!({"type": "release", "lease": name})).await;
        raw.hears_error("lease-not-found").await;
    }
    raw.say(with(scene.open(), json!({"reference": format!("file://{}", blobs.display())}))).await;
    raw.hears_error("not-local").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_speaks_out_of_turn_does_not_wait_any_longer() {
    let scene = Scene::absent().await;
    scene.origin.hold_after(0);
    let mut raw = scene.door.raw().await;
    raw.say(with(scene.open(), json!({"wait": true}))).await;
    raw.hears("progress").await;
    raw.say(json!({"type": "more"})).await;
    loop {
        let heard = raw.hear().await.unwrap();
        if heard["type"] != "progress" {
            assert_eq!(heard["problem"]["code"], "bad-request", "{heard:#}");
            break;
        }
    }
    assert_eq!(raw.hear().await, None);
    scene.origin.let_go();
    scene.node.ready(&scene.reference).await;
}

/// On a clock that is turned: the time limit passes when nothing else happens.
#[tokio::test]
async fn a_client_that_never_reads_loses_its_lease_and_stalls_nobody() {
    let scene = Scene::local().await;
    tokio::time::pause();
    let mut raw = scene.door.raw().await;
    let request = frame(&scene.open().to_string());
    // Until the daemon has closed it: answers that nobody reads take no memory of the daemon, so it stops to read, too.
    let mut asked = 0;
    while tokio::time::timeout(MAX_WAIT, raw.send(&request)).await.expect("it is given up") {
        asked += 1;
        if asked == 100 {
            scene.door.opener().open(&reference(&scene.reference)).await.unwrap();
        }
        assert!(asked < 1_000_000, "it is read for ever");
    }
    assert!(asked > 100, "{asked}");
    scene.are_held(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_opens_at_once_are_all_granted() {
    let scene = Scene::local().await;
    raise_descriptor_limit();
    let (opener, asked) = (scene.door.opener(), reference(&scene.reference));
    let models = try_join_all((0..1000).map(|_| opener.open(&asked))).await.unwrap();
    assert_eq!(scene.node.cache().leases().len(), 1000);
    for model in &models {
        assert_eq!(&*model.mmap("sub/model.safetensors").unwrap(), bytes(1, 300_000));
    }
    drop(models);
    scene.are_held(0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_who_wait_for_one_model_are_one_pull() {
    let scene = Scene::absent().await;
    raise_descriptor_limit();
    let (opener, asked) = (scene.door.opener().file("config.json"), reference(&scene.reference));
    let models = try_join_all((0..1000).map(|_| opener.open(&asked))).await.unwrap();
    assert_eq!(models.len(), 1000);
    assert_eq!(scene.node.cache().pulls().len(), 1);
    assert_eq!(scene.origin.sent_bytes(), 300_002);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_connection_too_many_is_told_so_at_once() {
    let scene = Scene::with(2, &model()).await;
    scene.node.ready(&scene.reference).await;
    let opener = scene.door.opener();
    let asked = reference(&scene.reference);
    let first = opener.open(&asked).await.unwrap();
    let _second = opener.open(&asked).await.unwrap();
    let error = opener.open(&asked).await.unwrap_err();
    assert_eq!((error.code, error.retry_after_seconds), (Code::TooManyHolders, Some(60)));
    let mut pods = RawFrames::connect(&scene.door.pod_socket()).await;
    assert!(pods.hears_error("too-many-holders").await.contains("2 are held already"));
    assert_eq!(pods.hear().await, None);
    drop(first);
    scene.are_held(1).await;
    // Its place is free a moment after its lease has ended.
    let granted = async {
        while opener.open(&asked).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(MAX_WAIT, granted).await.expect("a place that is left is given again");
}

#[tokio::test(flavor = "multi_thread")]
async fn http_and_frames_share_the_socket_of_the_node() {
    let scene = Scene::local().await;
    let model = scene.door.opener().open(&reference(&scene.reference)).await.unwrap();
    let listed = scene.door.http().models().await.unwrap();
    assert_eq!((listed.len(), &listed[0].id, listed[0].leases), (1, &model.info().id, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_open_models_and_can_do_nothing_else() {
    let scene = Scene::local().await;
    let mut http = UnixStream::connect(scene.door.pod_socket()).await.unwrap();
    http.write_all(b"DELETE /v1/models/m HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    http.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 403 Forbidden\r\n"), "{head}");
    let body: Value = serde_json::from_str(body).unwrap();
    assert_eq!((&body["code"], &body["status"]), (&json!("policy-denied"), &json!(403)));

    let opener = larder::client::Opener::new(&scene.door.pod_socket());
    let model = opener.open(&reference(&scene.reference)).await.unwrap();
    assert_eq!(&*model.mmap("config.json").unwrap(), b"{}");
    for verb in ["remove", "evict", "pin", "leases"] {
        let mut raw = RawFrames::connect(&scene.door.pod_socket()).await;
        raw.say(json!({"type": verb, "model": scene.reference})).await;
        raw.hears_error("bad-request").await;
    }
    assert_eq!(scene.node.cache().models().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shutdown_ends_leases_and_tells_who_waits() {
    let mut scene = Scene::absent().await;
    scene.origin.hold_after(0);
    let mut raw = scene.door.raw().await;
    raw.say(with(scene.open(), json!({"wait": true}))).await;
    raw.hears("progress").await;
    let mut idle = scene.door.raw().await;
    idle.send(&[0]).await;
    let draining = scene.door.drain();
    let told = async {
        loop {
            let heard = raw.hear().await.unwrap();
            if heard["type"] != "progress" {
                break heard;
            }
        }
    };
    let ((), heard) = tokio::join!(draining, told);
    assert_eq!(heard["problem"]["code"], "draining", "{heard:#}");
    assert_eq!((raw.hear().await, idle.hear().await), (None, None));
    scene.origin.let_go();
    scene.node.ready(&scene.reference).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_does_not_come_is_not_waited_for_beyond_patience() {
    let dir = tempfile::tempdir().unwrap();
    let asked = reference("hf://org/name@main");
    let opener = larder::client::Opener::new(&dir.path().join("run/larder.sock")).patience(Duration::from_millis(50));
    let error = opener.open(&asked).await.unwrap_err();
    assert_eq!(error.code, Code::DaemonUnreachable);
    assert!(error.message.ends_with("run` is not there"), "{error}");
    let opener = Arc::new(opener);
    let blocking = tokio::task::spawn_blocking(move || opener.open_blocking(&asked).unwrap_err());
    assert_eq!(blocking.await.unwrap().message, error.message);
}

//! The program end to end: the daemon and the commands as processes, killed and stopped in the middle of their work.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use futures::StreamExt;
use larder::client::Client;
use larder::model::Digest;
use larder::store::CHECKPOINT_BYTES;
use larder::wire::http::PullRequest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};

use super::support::gated_origin::GatedOrigin;
use super::support::hub::{Canned, RepoFile, TestHub};
use super::support::larder::Home;
use super::support::model_origin::ModelOrigin;

const MIB: u64 = 1 << 20;
const TOKEN: &str = "hf_canarysecret";
/// `LARDER_PULL_MEMORY` of a [`Home`]: what may have come and not be written.
const IN_MEMORY_BYTES: u64 = 8 * MIB;
/// Its connections, each with a range that nobody has read yet: the kernel takes it in all the same.
const ON_THE_WAY_BYTES: u64 = 4 * 4 * MIB;

/// What is lost by a crash is on its way, or the end of a file that no note vouches for yet.
fn assert_little_came_twice(origin: &GatedOrigin) {
    let again = origin.sent_bytes().saturating_sub(origin.total_bytes());
    let most = IN_MEMORY_BYTES + ON_THE_WAY_BYTES + origin.files.len() as u64 * CHECKPOINT_BYTES;
    assert!(again <= most, "{again} bytes came twice");
}

fn bytes(seed: &str, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    blake3::Hasher::new().update(seed.as_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn model(seed: &str, megabytes: &[u64]) -> BTreeMap<String, Vec<u8>> {
    let shards = megabytes.iter().enumerate();
    let shards =
        shards.map(|(at, mb)| (format!("model-{at}.safetensors"), bytes(&format!("{seed}{at}"), mb * MIB + 17)));
    shards.chain([("config.json".to_owned(), b"{}".to_vec())]).collect()
}

/// Every file below a directory, by its path relative to it.
fn files_below(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fn walk(base: &Path, dir: &Path, found: &mut BTreeMap<String, Vec<u8>>) {
        for entry in fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap()) {
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                walk(base, &entry.path(), found);
            } else if kind.is_file() {
                let name = entry.path().strip_prefix(base).unwrap().to_str().unwrap().to_owned();
                found.insert(name, fs::read(entry.path()).unwrap());
            }
        }
    }
    let mut found = BTreeMap::new();
    walk(dir, dir, &mut found);
    found
}

/// What is named is whole: every blob has the bytes of its name, every directory readers see has all files of `model`.
fn assert_whole(home: &Home, model: &BTreeMap<String, Vec<u8>>) {
    for (path, bytes) in files_below(&home.root().join("blobs")) {
        assert_eq!(path.rsplit('/').next(), Some(Digest::of(&bytes).to_hex().as_str()), "a blob that is not its name");
    }
    let public = files_below(&home.public());
    for (path, bytes) in &public {
        let file = path.rsplit('/').next().unwrap();
        assert!(model.get(file) == Some(bytes), "{path} is half");
    }
    assert!(public.is_empty() || public.len() == model.len(), "half a model is visible: {:?}", public.keys());
}

/// The directory a command printed.
fn directory(printed: &str) -> PathBuf {
    let path = printed.strip_suffix('\n').expect("one line");
    assert!(!path.contains('\n'), "{printed}");
    PathBuf::from(path)
}

/// No line of a daemon's log is a warning or an error.
fn assert_calm(said: &str) {
    for level in ["\"level\":\"WARN\"", "\"level\":\"ERROR\"", "panicked"] {
        assert!(!said.contains(level), "{said}");
    }
}

async fn open_origin(seed: &str, megabytes: &[u64]) -> GatedOrigin {
    let origin = GatedOrigin::start(model(seed, megabytes)).await;
    origin.allow_more(u64::MAX);
    origin
}

/// The main job through the commands: pull, open, list, pull again, remove.
async fn the_commands_do_the_main_job(home: &Home) {
    let origin = open_origin("main", &[3, 1]).await;
    let reference = origin.reference();
    let pulled = home.run(&["pull", &reference]).await;
    assert_eq!(pulled.code, Some(0), "{}", pulled.err);
    assert!(pulled.err.contains(&format!("ready {reference}  4.2 MB in ")), "{}", pulled.err);
    let path = directory(&pulled.out);
    assert!(path.starts_with(home.public()));
    assert!(files_below(&path) == *origin.files);

    assert_eq!(home.done(&["open", &reference]).await, pulled.out);
    let list = home.done(&["list"]).await;
    let row = list.lines().find(|line| line.starts_with(&reference)).expect("it is listed");
    assert!(row.contains(" 4.2 MB ") && row.ends_with(path.to_str().unwrap()), "{list}");
    let sent = origin.sent_bytes();
    assert_eq!(home.done(&["pull", "--quiet", &reference]).await, pulled.out);
    assert_eq!((sent, origin.sent_bytes()), (origin.total_bytes(), origin.total_bytes()), "each byte comes once");

    let removed = home.done(&["remove", &reference]).await;
    assert!(removed.starts_with(&format!("removed {reference} ")) && removed.ends_with("freed 4.2 MB\n"), "{removed}");
    assert!(files_below(&home.public()).is_empty() && files_below(&home.root().join("blobs")).is_empty());
    let list = home.run(&["list"]).await;
    assert_eq!((list.code, list.out.as_str()), (Some(0), ""));
    assert_eq!(list.err, "no model is local; `larder pull hf://org/name` brings one\n");
}

/// The mistakes people make, and the sentences they get.
async fn mistakes_are_told(home: &Home) {
    let origin = open_origin("big", &[2]).await;
    let reference = origin.reference();
    let absent = "hf://org/name@main";
    let missing = reference.replace("model", "nothing");
    let (nothing, host) = (format!("{missing}larder.json"), origin.host());
    let cases: [(&[&str], i32, String, &str, &str); 6] = [
        (
            &["pull", "hf:/org/name"],
            65,
            "cannot read the reference `hf:/org/name`: it has no scheme".to_owned(),
            "the schemes are hf:// s3:// gs:// az:// https:// http:// file://",
            "bad-reference",
        ),
        (
            &["open", absent],
            66,
            format!("cannot open `{absent}`: it is not local"),
            &format!("pull it: `larder pull {absent}`, or open it with `--wait`"),
            "not-local",
        ),
        (
            &["remove", absent],
            66,
            format!("cannot remove `{absent}`: it is not local"),
            "see what is local with `larder list`",
            "not-local",
        ),
        (
            &["pull", &missing],
            66,
            format!("cannot find `{nothing}`: `{host}` answered 404"),
            "check the spelling, and that we may see it from here, with the credentials we have",
            "repo-not-found",
        ),
        (
            &["pull", &reference],
            73,
            format!("cannot pull `{reference}`: it has 2.1 MB, more than the quota of 1.0 MB"),
            "raise `volume.quota`, or pull fewer files with `--include`",
            "never-fits",
        ),
        (
            &["pull", "--exclude", "*", &reference],
            65,
            format!("cannot pull `{reference}#exclude=*`: the selection leaves none of its 2 files"),
            "check the patterns of `--include` and `--exclude`",
            "nothing-selected",
        ),
    ];
    for (words, exit, message, action, code) in cases {
        let ended = home.run(&[words, &["--quiet"]].concat()).await;
        let expected = format!("error: {message}\naction: {action}            code: {code}\n");
        assert_eq!(
            (ended.code, ended.out.as_str(), ended.err),
            (Some(exit), "", expected),
            "larder {}",
            words.join(" ")
        );
    }
    assert_eq!(origin.sent_bytes(), 0, "it is refused before its first byte");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_daemon_the_commands_do_the_main_job() {
    let home = Home::new();
    let mut daemon = home.serve().await;
    the_commands_do_the_main_job(&home).await;
    daemon.terminate();
    assert!(daemon.ended().await.0.success());
    assert_calm(&daemon.said());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_daemon_the_commands_do_the_main_job() {
    the_commands_do_the_main_job(&Home::new()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_get_the_same_sentence_with_and_without_a_daemon() {
    let mut home = Home::new();
    home.set("LARDER_VOLUME_QUOTA", "1MB");
    mistakes_are_told(&home).await;
    let _daemon = home.serve().await;
    mistakes_are_told(&home).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_that_was_named_must_have_a_daemon() {
    let home = Home::new();
    let socket = home.path().join("other.sock");
    let ended = home.run(&["list", "--socket", socket.to_str().unwrap()]).await;
    assert_eq!(ended.code, Some(75));
    let socket = socket.display();
    assert!(ended.err.starts_with(&format!("error: cannot reach the daemon: nobody answers on `{socket}`\naction: ")));
    assert!(!home.root().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn beside_a_pull_without_a_daemon_models_are_listed_and_opened_and_nothing_else() {
    let home = Home::new();
    let here = open_origin("here", &[1]).await;
    let path = home.done(&["pull", &here.reference()]).await;
    let slow = GatedOrigin::start(model("slow", &[2])).await;
    slow.allow_more(MIB);
    let mut pull = home.start(&["pull", &slow.reference()]);
    slow.held().await;

    assert_eq!(home.done(&["open", &here.reference()]).await, path);
    assert_eq!(home.done(&["list"]).await.lines().count(), 2);
    let holder = format!("process {}", pull.id());
    for words in [&["remove", &here.reference()][..], &["pull", &here.reference()], &["serve"]] {
        let ended = home.run(words).await;
        assert_eq!(ended.code, Some(75), "{ended:?}");
        assert!(ended.err.contains(&holder) && ended.err.contains("code: volume-locked"), "{ended:?}");
    }
    slow.allow_more(u64::MAX);
    let (status, out) = pull.ended().await;
    assert!(status.success(), "{}", pull.said());
    assert!(files_below(&directory(&out)) == *slow.files);
    assert!(files_below(&directory(&path)) == *here.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_one_root_names_the_first() {
    let home = Home::new();
    let daemon = home.serve().await;
    let second = home.run(&["serve", "--socket", home.path().join("second.sock").to_str().unwrap()]).await;
    assert_eq!(second.code, Some(75), "{second:?}");
    assert!(second.err.contains(&daemon.id().to_string()) && second.err.contains("volume-locked"), "{second:?}");
    assert!(Client::new(&home.socket()).readiness().await.unwrap().ready, "the first does not notice");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_survives_kill_9_and_nothing_half_is_visible() {
    let home = Home::new();
    let origin = GatedOrigin::start(model("killed", &[48, 8])).await;
    origin.allow_more(40 * MIB);
    let daemon = home.serve().await;
    let id = home.done(&["pull", "--detach", &origin.reference()]).await;
    assert!(id.trim().len() == 17, "{id}");
    origin.held().await;
    daemon.kill().await;
    assert_whole(&home, &BTreeMap::new());
    assert!(files_below(&home.public()).is_empty());

    origin.allow_more(u64::MAX);
    let mut daemon = home.serve().await;
    daemon.says("\"message\":\"pull ready\"").await;
    let path = directory(&home.done(&["open", &origin.reference()]).await);
    assert!(files_below(&path) == *origin.files);
    assert_whole(&home, &origin.files);
    assert_little_came_twice(&origin);
    assert_calm(&daemon.said());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_restart_after_kill_9_at_any_point_is_clean() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let home = Home::new();
    let origin = GatedOrigin::start(model("often", &[9, 5, 1])).await;
    let mut daemon = home.serve().await;
    home.done(&["pull", "--detach", &origin.reference()]).await;
    for cycle in 0..11 {
        let (sent, more) = (origin.sent_bytes(), random.u64(0..3 * MIB / 2));
        match cycle {
            // In the middle of what the origin lets out: less in all than it takes.
            0..4 => {
                origin.allow_more(more);
                origin.has_sent(sent + random.u64(0..=more)).await;
            }
            // When nothing more comes.
            4..8 => {
                origin.allow_more(more);
                origin.held().await;
            }
            // Towards the end, and while it verifies, commits and names.
            8 => {
                origin.allow_more(u64::MAX);
                origin.has_sent(origin.total_bytes()).await;
            }
            _ => {}
        }
        let said = daemon.said();
        daemon.kill().await;
        assert_calm(&said);
        assert_whole(&home, &origin.files);
        daemon = home.serve().await;
    }
    let path = directory(&home.done(&["pull", &origin.reference()]).await);
    assert!(files_below(&path) == *origin.files);
    assert_whole(&home, &origin.files);
    assert_eq!(files_below(&home.root().join("ingests")).len(), 0, "nothing is left of the attempts");
    daemon.terminate();
    assert!(daemon.ended().await.0.success());
    assert_calm(&daemon.said());
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_drains_and_the_next_start_resumes() {
    let home = Home::new();
    let origin = GatedOrigin::start(model("drained", &[48])).await;
    origin.allow_more(40 * MIB);
    let mut daemon = home.serve().await;
    // Connections that ask for nothing: one silent, one that was answered and is kept.
    let mut silent = TcpStream::connect(daemon.tcp_address()).await.unwrap();
    let mut idle = UnixStream::connect(home.socket()).await.unwrap();
    idle.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let mut answer = [0; 4];
    idle.read_exact(&mut answer).await.unwrap();
    // Followers: the API's and a person's.
    let client = Client::new(&home.socket());
    let wanted = PullRequest::of(origin.reference());
    let pull = client.pull(&wanted).await.unwrap();
    let followed = client.watch(&pull.id).await.unwrap();
    let mut person = home.start(&["pull", &origin.reference()]);
    person.says("version ").await;
    origin.held().await;

    daemon.terminate();
    let (status, _) = daemon.ended().await;
    assert_eq!(status.code(), Some(0), "{}", daemon.said());
    assert!(daemon.said().contains("\"message\":\"stopped\""), "{}", daemon.said());
    // It says so when it has waited for the whole grace.
    assert_calm(&daemon.said());
    assert!(!home.socket().exists());
    let mut rest = Vec::new();
    assert_eq!(silent.read_to_end(&mut rest).await.unwrap(), 0);
    idle.read_to_end(&mut rest).await.unwrap();
    let _all = followed.collect::<Vec<_>>().await;
    let (status, out) = person.ended().await;
    assert_eq!((status.code(), out.as_str()), (Some(75), ""), "{}", person.said());
    assert!(person.said().contains("action: start it with `larder serve` if it has stopped: the pull then goes on"));
    assert_whole(&home, &BTreeMap::new());

    origin.allow_more(u64::MAX);
    let mut daemon = home.serve().await;
    daemon.says("\"message\":\"pull ready\"").await;
    assert_little_came_twice(&origin);
    assert_whole(&home, &origin.files);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_socket_of_a_killed_daemon_is_replaced_and_a_file_is_not() {
    let home = Home::new();
    home.serve().await.kill().await;
    assert!(home.socket().exists(), "nobody could take it away");
    let daemon = home.serve().await;
    assert_eq!(home.run(&["list"]).await.code, Some(0));
    daemon.kill().await;

    fs::remove_file(home.socket()).unwrap();
    fs::write(home.socket(), "notes").unwrap();
    let refused = home.run(&["serve"]).await;
    assert_eq!(refused.code, Some(78), "{refused:?}");
    let socket = home.socket().display().to_string();
    assert!(refused.err.contains(&format!("error: cannot listen on `{socket}`: it exists and is not a socket\n")));
    assert_eq!(fs::read_to_string(home.socket()).unwrap(), "notes");

    let taken = home.path().join("taken.sock");
    let _owner = UnixListener::bind(&taken).unwrap();
    let refused = home.run(&["serve", "--socket", taken.to_str().unwrap()]).await;
    assert_eq!(refused.code, Some(78), "{refused:?}");
    assert!(refused.err.contains("another process listens on it"), "{refused:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_never_notices_that_the_daemon_is_killed_and_started() {
    let home = Home::new();
    let origin = open_origin("read", &[2, 1]).await;
    let path = directory(&home.done(&["pull", &origin.reference()]).await);
    let stop = Arc::new(AtomicBool::new(false));
    let (say, mut rounds) = tokio::sync::mpsc::unbounded_channel();
    let reader = std::thread::spawn({
        let (stop, files) = (stop.clone(), origin.files.clone());
        move || {
            // SAFETY: the file is immutable as long as it exists; that it stays so is what this test is about.
            #[expect(unsafe_code, reason = "a loader maps the file")]
            let map = |path: PathBuf| unsafe { memmap2::Mmap::map(&fs::File::open(path).unwrap()).unwrap() };
            let kept: Vec<_> = files.keys().map(|name| map(path.join(name))).collect();
            while !stop.load(Ordering::Relaxed) {
                for ((name, expected), kept) in files.iter().zip(&kept) {
                    let mut read = Vec::new();
                    fs::File::open(path.join(name)).unwrap().read_to_end(&mut read).unwrap();
                    assert!(read == *expected && map(path.join(name))[..] == expected[..] && kept[..] == expected[..]);
                }
                if say.send(()).is_err() {
                    return;
                }
            }
        }
    });
    let slow = GatedOrigin::start(model("beside", &[6])).await;
    let mut daemon = home.serve().await;
    home.done(&["pull", "--detach", &slow.reference()]).await;
    for _ in 0..3 {
        slow.allow_more(MIB);
        slow.held().await;
        daemon.kill().await;
        for _ in 0..2 {
            rounds.recv().await.expect("the reader reads on without a daemon");
        }
        daemon = home.serve().await;
        rounds.recv().await.expect("the reader reads on");
    }
    stop.store(true, Ordering::Relaxed);
    reader.join().expect("the reader saw nothing but its bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_demonstration_fetches_each_byte_once_and_leaves_nothing() {
    let home = Home::new();
    let shown = home.run(&["demo"]).await;
    assert_eq!(shown.code, Some(0), "{}", shown.err);
    assert!(shown.out.contains("The origin sent each byte once."), "{}", shown.out);
    assert_eq!(fs::read_dir(home.path().join("tmp")).unwrap().count(), 0);
    assert!(!home.root().exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_and_a_signed_url_are_never_written_anywhere() {
    let hub = TestHub::start().await;
    let mut home = Home::new();
    home.set("HF_ENDPOINT", hub.endpoint());
    home.set("HF_TOKEN", TOKEN);
    home.set("LARDER_PULL_RETRIES", "1");
    let mut everything = String::new();
    // The last round lets every library speak, too.
    let libraries = "hf_hub=trace,hyper=trace,hyper_util=trace,reqwest=trace,rustls=trace";
    let rounds =
        [("alone", "trace".to_owned()), ("daemon", "trace".to_owned()), ("loud", format!("trace,{libraries}"))];
    for (round, filter) in rounds {
        home.set("LARDER_LOG_FILTER", &filter);
        let daemon = if round == "alone" { None } else { Some(home.serve().await) };
        for (name, code) in [
            ("open", 0),
            ("gated", 0),
            ("broken", 0),
            ("forbidden", 77),
            ("absent", 66),
            ("refused", 77),
            ("expired", 77),
        ] {
            let repo = format!("{name}/{round}");
            if name != "absent" {
                let shard = RepoFile::new("m.safetensors", bytes(&repo, MIB));
                hub.publish(&repo, vec![RepoFile::new("config.json", "{}"), shard]);
            }
            match name {
                "gated" => {
                    hub.gate(&repo);
                    hub.grant(TOKEN, &repo);
                }
                "forbidden" => {
                    hub.gate(&repo);
                    hub.allow(TOKEN);
                }
                "broken" => hub.break_next_body(1000),
                "refused" => {
                    let refusal = Canned { status: 403, headers: vec![], body: "AccessDenied".into() };
                    (0..20).for_each(|_| hub.answer_next(&format!("/{repo}/resolve"), refusal.clone()));
                }
                "expired" => hub.revoke(TOKEN),
                _ => hub.allow(TOKEN),
            }
            let ended = home.run(&["pull", "-o", "json", &format!("hf://{repo}")]).await;
            assert_eq!(ended.code, Some(code), "{repo}: {}", ended.err);
            everything += &format!("{}{}", ended.out, ended.err);
        }
        hub.allow(TOKEN);
        for words in [&["config", "show"][..], &["list", "-o", "json"]] {
            everything += &home.done(words).await;
        }
        if let Some(mut daemon) = daemon {
            everything += &home.done(&["pulls", "-o", "json"]).await;
            daemon.terminate();
            daemon.ended().await;
            everything += &daemon.said();
        }
    }
    let sent = format!("Bearer {TOKEN}");
    assert!(hub.requests().iter().any(|seen| seen.headers.get("authorization").is_some_and(|v| v == sent.as_str())));
    assert!(hub.cdn_requests().iter().all(|seen| !seen.headers.contains_key("authorization")));
    assert!(hub.cdn_requests().iter().any(|seen| seen.path.contains("Signature=")));
    for speaker in ["larder::", "hyper_util::", "hf_hub::", "reqwest::"] {
        assert!(everything.contains(&format!("\"target\":\"{speaker}")), "{speaker} says nothing");
    }
    for secret in [TOKEN, "Signature=", "Key-Pair-Id"] {
        let line = everything.lines().find(|line| line.contains(secret));
        assert_eq!(line, None, "{secret} was printed");
        for (path, bytes) in files_below(home.path()) {
            let found = String::from_utf8_lossy(&bytes).contains(secret);
            assert!(!found, "{secret} is in {path}");
        }
    }
}

#[tokio::test]
async fn a_pull_that_nobody_follows_fetches_one_range_at_a_time_beside_one_that_somebody_does() {
    let (origin, home) = (ModelOrigin::start().await, Home::new());
    origin.put("wanted", "a.safetensors", b"a");
    for shard in ["a", "b", "c"] {
        origin.put("ahead", &format!("{shard}.safetensors"), &bytes(shard, MIB));
    }
    origin.hold_after(0);
    let mut daemon = home.serve().await;
    let client = Client::new(&home.socket());
    let mut wanted = home.start(&["pull", "-q", &origin.reference("wanted")]);
    origin.has_waiting(1).await;
    let ahead = client.pull(&PullRequest::of(origin.reference("ahead"))).await.unwrap();
    origin.has_waiting(2).await;
    for _ in 0..50 {
        // Time enough for more, if more were asked for.
        client.pulls().await.unwrap();
    }
    assert_eq!(origin.has_waiting(0).await, 2);
    client.pull_status(&ahead.id).await.unwrap();
    assert_eq!(origin.has_waiting(4).await, 4, "now somebody waits for both");
    origin.let_go();
    assert!(wanted.ended().await.0.success());
    home.done(&["pull", "-q", &origin.reference("ahead")]).await;
    daemon.terminate();
    daemon.ended().await;
}

#[tokio::test]
async fn a_credential_that_was_changed_in_its_directory_counts_without_a_restart() {
    let hub = TestHub::start().await;
    hub.publish("acme/tiny", vec![RepoFile::new("config.json", b"{}".to_vec())]);
    hub.make_private("acme/tiny");
    hub.grant(TOKEN, "acme/tiny");
    let mut home = Home::new();
    let directory = home.path().join("secret");
    home.set("HF_ENDPOINT", hub.endpoint());
    home.set("LARDER_PULL_ENVIRONMENT", directory.to_str().unwrap());
    let mut daemon = home.serve().await;
    let pull = async || home.run(&["pull", "-q", "hf://acme/tiny"]).await;

    let ended = pull().await;
    assert!(ended.err.contains("code: config-invalid") && ended.err.contains("/secret` cannot be read"), "{ended:?}");
    fs::create_dir(&directory).unwrap();
    assert!(pull().await.err.contains("code: auth-missing"));
    fs::write(directory.join("HF_TOKEN"), "hf_expired").unwrap();
    let ended = pull().await;
    assert!(
        ended.err.contains("code: auth-invalid") && ended.err.contains("/secret/HF_TOKEN` is rejected"),
        "{ended:?}"
    );
    fs::write(directory.join("HF_TOKEN"), format!("{TOKEN}\n")).unwrap();
    assert_eq!(pull().await.code, Some(0));
    daemon.terminate();
    daemon.ended().await;
    assert!(!daemon.said().contains(TOKEN) && !daemon.said().contains("hf_expired"));
}

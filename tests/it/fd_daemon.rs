//! The socket door of the program itself: clients and daemons that are killed while models are open.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};

use futures::future::try_join_all;
use larder::client::{Client, Model, Opener};
use larder::fault::{Code, Problem};
use larder::model::ModelRef;
use larder::wire::frame::MAX_BATCH_FILES;
use tokio::net::UnixStream;

use super::support::gated_origin::GatedOrigin;
use super::support::larder::{Home, Running};
use super::support::model_origin::ModelOrigin;
use super::support::node::reference;

const FILE: &str = "model.safetensors";

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

fn opener(home: &Home) -> Opener {
    Opener::new(&home.socket())
}

/// A model on an origin.
async fn origin() -> (ModelOrigin, String) {
    let origin = ModelOrigin::start().await;
    origin.put("m", FILE, &bytes(1 << 20));
    origin.put("m", "config.json", b"{}");
    let reference = origin.reference("m");
    (origin, reference)
}

fn open_descriptors(daemon: &Running) -> usize {
    fs::read_dir(format!("/proc/{}/fd", daemon.id())).unwrap().count()
}

/// The field of a line of the log.
fn field(line: &str, name: &str) -> String {
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    line[name].as_str().unwrap_or_else(|| panic!("no {name} in {line}")).to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_opens_leave_nothing_behind() {
    const AT_ONCE: usize = 8;
    const EACH: usize = 1250;
    let (_origin, asked) = origin().await;
    let home = Home::new();
    let mut daemon = home.serve().await;
    let (opener, asked) = (opener(&home), reference(&asked));
    drop(opener.open(&asked).await.unwrap());
    daemon.says("lease ended").await;
    let before = open_descriptors(&daemon);

    let one_after_another = || async {
        for _ in 0..EACH {
            opener.open(&asked).await?;
        }
        Ok::<_, Problem>(())
    };
    try_join_all((0..AT_ONCE).map(|_| one_after_another())).await.unwrap();
    for _ in 0..AT_ONCE * EACH {
        daemon.says("lease ended").await;
    }
    // A connection is closed before its lease ends. That to the origin may have been open still.
    let after = open_descriptors(&daemon);
    assert!(after <= before, "{before} descriptors were open, and {after} are");
    assert_eq!(Client::new(&home.socket()).leases().await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_without_a_descriptor_left_says_so_and_recovers() {
    const MOST: u32 = 128;
    let origin = ModelOrigin::start().await;
    for at in 0..MAX_BATCH_FILES {
        origin.put("m", &format!("{at}.bin"), b"x");
    }
    let home = Home::new();
    let _daemon = home.serve_with_descriptors(MOST).await;
    let (opener, asked) = (opener(&home), reference(&origin.reference("m")));
    // More at once than it can have open: they wait for each other.
    try_join_all((0..8).map(|_| opener.open(&asked))).await.unwrap();

    // Each connection that says nothing leaves one descriptor fewer for files.
    let mut idle = Vec::new();
    let error = loop {
        idle.push(UnixStream::connect(home.socket()).await.unwrap());
        match opener.open(&asked).await {
            Ok(_) => assert!(idle.len() < MOST as usize, "they cost no descriptor"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.code, Code::TooManyHolders, "{error}");
    assert!(error.message.starts_with("cannot hand out files: ") && !error.action.is_empty(), "{error}");
    drop(idle);
    opener.open(&asked).await.unwrap();
}

/// What other tests start as a process of its own, to kill it.
#[test]
#[ignore = "started by other tests"]
fn a_client_that_is_killed() {
    let socket = std::env::var_os("LARDER_SOCKET").expect("it is started by another test");
    let asked: ModelRef = std::env::var("LARDER_TEST_REFERENCE").unwrap().parse().unwrap();
    let _model = Opener::new(socket.as_ref()).open_blocking(&asked).unwrap();
    // Until it is killed, or the other test has ended.
    std::io::stdin().read_line(&mut String::new()).unwrap();
}

struct Victim(Child);

impl Victim {
    fn start(home: &Home, asked: &str) -> Victim {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "fd_daemon::a_client_that_is_killed", "--ignored"]);
        command.env("LARDER_SOCKET", home.socket()).env("LARDER_TEST_REFERENCE", asked);
        Victim(command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// SIGKILL.
    fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_killed_holds_nothing_any_more() {
    let (_origin, asked) = origin().await;
    let home = Home::new();
    let mut daemon = home.serve().await;
    let victim = Victim::start(&home, &asked);
    let lease = field(&daemon.says("\"message\":\"leased\"").await, "lease");
    let refused = home.run(&["remove", &asked]).await;
    assert!(refused.err.contains("model-in-use"), "{}", refused.err);
    victim.kill();
    assert_eq!(field(&daemon.says("lease ended").await, "lease"), lease);
    assert_eq!(Client::new(&home.socket()).leases().await.unwrap(), []);
    home.done(&["remove", &asked]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_is_killed_while_it_waits_is_noticed() {
    let origin = GatedOrigin::start(BTreeMap::from([(FILE.to_owned(), bytes(1 << 20))])).await;
    let mut home = Home::new();
    home.set("LARDER_LOG_FILTER", "info,larder::serve=debug,larder::cache::lease=debug");
    let mut daemon = home.serve().await;
    let victim = Victim::start(&home, &origin.reference());
    origin.held().await;
    daemon.says("pull started").await;
    victim.kill();
    let line = daemon.says("a connection of frames ends").await;
    assert_eq!(field(&line, "over"), "the other side has ended");
    // The pull is for whoever asks next.
    origin.allow_more(u64::MAX);
    opener(&home).open(&reference(&origin.reference())).await.unwrap();
}

/// Opens on a runtime and without one.
async fn open_both_ways(opener: &Opener, asked: &ModelRef) -> [Model; 2] {
    let (plain, without) = (opener.clone(), asked.clone());
    let blocking = tokio::task::spawn_blocking(move || plain.open_blocking(&without));
    let (one, other) = tokio::join!(opener.open(asked), blocking);
    [one.unwrap(), other.unwrap().unwrap()]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_not_there_yet_is_waited_for() {
    let (_origin, asked) = origin().await;
    let home = Home::new();
    let (opener, asked) = (opener(&home), reference(&asked));
    let opening = tokio::spawn(async move { open_both_ways(&opener, &asked).await });
    let _daemon = home.serve().await;
    for model in opening.await.unwrap() {
        assert_eq!(*model.mmap(FILE).unwrap(), bytes(1 << 20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_is_killed_in_the_middle_of_a_pull_is_waited_for() {
    let origin = GatedOrigin::start(BTreeMap::from([(FILE.to_owned(), bytes(1 << 20))])).await;
    let home = Home::new();
    let daemon = home.serve().await;
    let (opener, asked) = (opener(&home), reference(&origin.reference()));
    let opening = tokio::spawn(async move { open_both_ways(&opener, &asked).await });
    origin.allow_more(256 << 10);
    origin.held().await;
    daemon.kill().await;
    origin.allow_more(u64::MAX);
    let _daemon = home.serve().await;
    for model in opening.await.unwrap() {
        assert_eq!(*model.mmap(FILE).unwrap(), bytes(1 << 20));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_do_not_notice_that_the_daemon_is_killed_and_are_leased_again() {
    let (_origin, asked) = origin().await;
    let home = Home::new();
    let mut daemon = home.serve().await;
    let models = open_both_ways(&opener(&home), &reference(&asked)).await;
    let maps = models.each_ref().map(|model| model.mmap(FILE).unwrap());
    for _ in 0..3 {
        daemon.kill().await;
        for (model, map) in models.iter().zip(&maps) {
            assert_eq!(**map, bytes(1 << 20));
            assert_eq!(*model.mmap("config.json").unwrap(), b"{}"[..]);
        }
        // It may lease before it says that it is ready.
        daemon = home.start(&["serve"]);
        for _ in &models {
            let line = daemon.says("\"message\":\"leased\"").await;
            assert_eq!(field(&line, "model"), models[0].info().id);
        }
    }
    drop(models);
    for _ in &maps {
        daemon.says("lease ended").await;
    }
    assert_eq!(Client::new(&home.socket()).leases().await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_version_that_is_open_is_leased_again_though_the_reference_means_another() {
    let (origin, asked) = origin().await;
    let home = Home::new();
    let daemon = home.serve().await;
    let models = open_both_ways(&opener(&home), &reference(&asked)).await;
    daemon.kill().await;
    origin.put("m", "config.json", b"{\"moved\": true}");
    home.done(&["pull", &asked]).await;

    let mut daemon = home.start(&["serve"]);
    for _ in &models {
        daemon.says("\"message\":\"leased\"").await;
    }
    let listed = Client::new(&home.socket()).models().await.unwrap();
    let leases: Vec<_> = listed.iter().map(|model| (model.current, model.leases)).collect();
    assert_eq!(leases, [(true, 0), (false, 2)]);
    assert_eq!(listed[1].id, models[0].info().id);
    assert_eq!(*models[1].mmap("config.json").unwrap(), b"{}"[..]);
}

//! Why a start was slow, or a model is not here: the time of each part, over restarts too, and never an invented reason.

use std::fs::File;
use std::time::{Duration, SystemTime};

use larder::client::Client;
use larder::fault::Code;
use larder::model::Stage;
use larder::wire::http::{
    AbsentBecause, HolderKind, LeaseTerms, OpenRequest, Phase, PodIdentity, PullRequest, PullStatus, PullTimeline,
    Start, StartState,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::support::larder::Home;
use super::support::model_origin::ModelOrigin;
use super::support::node::files_below;

/// Longest wait for a stage: a bound against hanging, not a measurement. Less than after which a silent source is left.
const MAX_WAIT: Duration = Duration::from_secs(25);
const MIB: u64 = 1 << 20;
const POD: &str = "team/vllm-0";

async fn origin_with(model: &str, mib: u64) -> ModelOrigin {
    let origin = ModelOrigin::start().await;
    origin.put(model, "weights", &noise(mib));
    origin.put(model, "config.json", b"{}");
    origin
}

fn noise(mib: u64) -> Vec<u8> {
    let mut bytes = vec![0; (mib * MIB) as usize];
    fastrand::Rng::with_seed(mib).fill(&mut bytes);
    bytes
}

/// Asks for a pull and does not wait.
async fn asked(client: &Client, model: &str) -> PullStatus {
    client.pull(&PullRequest::of(model)).await.unwrap()
}

/// Waits for its end.
async fn ended(client: &Client, pull: &PullStatus) -> PullStatus {
    use futures::StreamExt;
    client.watch(&pull.id).await.unwrap().map(Result::unwrap).collect::<Vec<_>>().await.pop().unwrap()
}

async fn ready(client: &Client, model: &str) -> PullStatus {
    let status = ended(client, &asked(client, model).await).await;
    assert_eq!(status.phase, Phase::Ready, "{status:#?}");
    status
}

/// Asks until the pull of a model is in a stage.
async fn in_stage(client: &Client, model: &str, stage: Stage) -> PullTimeline {
    let found = async {
        loop {
            let start = client.last_start(model).await.unwrap();
            assert_eq!(start.state, StartState::OnItsWay, "{start:#?}");
            let pull = start.pull.unwrap();
            assert_eq!(pull.took_us, sum(&pull), "{pull:#?}");
            if pull.now == Some(stage) {
                return pull;
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(MAX_WAIT, found).await.unwrap_or_else(|_| panic!("the pull of {model} never was in {stage:?}"))
}

fn sum(pull: &PullTimeline) -> u64 {
    pull.stages.iter().map(|span| span.took_us).sum()
}

fn because(start: &Start) -> Option<AbsentBecause> {
    assert_eq!(start.state == StartState::Absent, start.absence.is_some(), "{start:#?}");
    start.absence.as_ref().map(|absence| absence.because)
}

async fn stopped(mut daemon: super::support::larder::Running) {
    daemon.terminate();
    assert!(daemon.ended().await.0.success());
}

fn lease_of_pod(model: &str) -> OpenRequest {
    let (namespace, name) = POD.split_once('/').unwrap();
    let pod = PodIdentity { uid: "uid-1".into(), namespace: namespace.into(), name: name.into() };
    OpenRequest { lease: Some(LeaseTerms { pod: Some(pod), ..LeaseTerms::default() }), ..OpenRequest::of(model) }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_part_shows_as_its_stage_and_the_stages_sum_to_the_whole_after_a_restart_too() {
    let origin = origin_with("m", 3).await;
    let (home, model) = (Home::new(), origin.reference("m"));
    let (daemon, client) = (home.serve().await, Client::new(&home.socket()));
    origin.hold_listings();
    let pull = asked(&client, &model).await;
    let mut seen = vec![(Stage::Resolving, in_stage(&client, &model, Stage::Resolving).await)];
    origin.hold_after(0);
    seen.push((Stage::Asking, in_stage(&client, &model, Stage::Asking).await));
    // Less than any range of it has, so that none ends.
    origin.hold_after(MIB / 2);
    seen.push((Stage::Receiving, in_stage(&client, &model, Stage::Receiving).await));
    let shown = home.done(&["why", &model]).await;
    assert!(shown.contains("is on its way") && shown.contains("; now: receiving"), "{shown}");
    origin.let_go();
    assert_eq!(ended(&client, &pull).await.phase, Phase::Ready);

    let start = client.last_start(&model).await.unwrap();
    assert_eq!((start.state, &start.absence, &start.later_pull), (StartState::Local, &None, &None));
    let came = start.pull.clone().unwrap();
    assert_eq!((came.pull.as_str(), came.phase, came.now), (pull.id.as_str(), Phase::Ready, None));
    assert_eq!((came.took_us, came.fetched_bytes), (sum(&came), 3 * MIB + 2), "{came:#?}");
    assert!(came.durable_us > 0 && came.hashing_us > 0, "{came:#?}");
    for (stage, then) in &seen {
        // What was held back longer than it was looked at is in the stage it was held in, and in no other.
        assert!(came.of(*stage) >= then.of(*stage), "{stage:?} of {then:#?} is not in {came:#?}");
        assert!(then.of(*stage) > 0, "{then:#?}");
    }
    let info = start.model.as_ref().unwrap();
    assert_eq!(info.resident_percent, client.models_with_residency().await.unwrap()[0].resident_percent);
    let by_id = client.last_start(&info.id).await.unwrap();
    assert_eq!((by_id.reference, by_id.pull), (start.reference, start.pull.clone()));

    // Asking again finds nothing to fetch, and does not hide what it cost to bring it.
    let again = ready(&client, &model).await;
    let start = client.last_start(&model).await.unwrap();
    assert_eq!(start.pull.as_ref(), Some(&came));
    let later = start.later_pull.unwrap();
    assert_eq!((later.pull, later.fetched_bytes), (again.id, 0));

    stopped(daemon).await;
    let here: serde_json::Value = serde_json::from_str(&home.done(&["why", &model, "-o", "json"]).await).unwrap();
    assert_eq!(here["starts"][0]["pull"], serde_json::to_value(&came).unwrap(), "without a daemon");
    let daemon = home.serve().await;
    let start = client.last_start(&model).await.unwrap();
    assert_eq!((start.pull, start.later_pull), (Some(came), None), "after a restart");
    let shown = home.done(&["why", &model]).await;
    for part in ["is here: version", "receiving", "bytes came from the source: 3.1 MB", "the whole"] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }

    // What a crash has torn is not known, and the model is there all the same.
    stopped(daemon).await;
    let [note] = files_below(&home.root().join("starts")).try_into().unwrap();
    std::fs::write(note, "{\"model\":").unwrap();
    let _daemon = home.serve().await;
    let start = client.last_start(&model).await.unwrap();
    assert_eq!((start.state, start.pull), (StartState::Local, None));
    assert!(home.done(&["why", &model]).await.contains("How it came is not known"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_asks_to_wait_shows_for_every_pull_that_waits_for_it() {
    let origin = origin_with("m", 1).await;
    let (home, model, other) = (Home::new(), origin.reference("m"), origin.reference("other"));
    let (_daemon, client) = (home.serve().await, Client::new(&home.socket()));
    origin.is_busy_for(3600);
    let first = asked(&client, &model).await;
    let told = in_stage(&client, &model, Stage::BackingOff).await;
    assert_eq!(told.phase, Phase::Resolving);
    // The host has told the first one to wait; nobody asks it for the second one.
    let second = asked(&client, &other).await;
    in_stage(&client, &other, Stage::BackingOff).await;

    for (pull, model) in [(first, &model), (second, &other)] {
        client.cancel(&pull.id).await.unwrap();
        let start = client.last_start(model).await.unwrap();
        assert_eq!(because(&start), Some(AbsentBecause::Cancelled), "{start:#?}");
        let told = start.pull.unwrap();
        assert_eq!((told.pull.clone(), told.phase, sum(&told)), (pull.id, Phase::Cancelled, told.took_us));
        assert!(told.of(Stage::BackingOff) > 0, "{told:#?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_the_bytes_of_another_pull_is_queued() {
    let origin = ModelOrigin::start().await;
    for model in ["a", "b"] {
        origin.put(model, "weights", &noise(2));
    }
    let home = Home::new();
    let (_daemon, client) = (home.serve().await, Client::new(&home.socket()));
    let [a, b] = ["a", "b"].map(|model| origin.reference(model));
    origin.hold_after(MIB / 2);
    let first = asked(&client, &a).await;
    in_stage(&client, &a, Stage::Receiving).await;
    let second = asked(&client, &b).await;
    in_stage(&client, &b, Stage::Queued).await;
    origin.let_go();
    for pull in [&first, &second] {
        assert_eq!(ended(&client, pull).await.phase, Phase::Ready);
    }
    assert_eq!(client.last_start(&b).await.unwrap().pull.unwrap().fetched_bytes, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_not_here_says_why_as_far_as_that_is_known() {
    let origin = origin_with("m", 1).await;
    let (mut home, model, missing) = (Home::new(), origin.reference("m"), origin.reference("missing"));
    home.set("LARDER_VOLUME_QUOTA", "3MiB");
    home.set("LARDER_VOLUME_MIN_RESIDENCY", "0s");
    let (daemon, client) = (home.serve().await, Client::new(&home.socket()));
    let start = client.last_start(&model).await.unwrap();
    assert_eq!((because(&start), start.pull), (Some(AbsentBecause::NotAsked), None));
    let shown = home.done(&["why", &model]).await;
    assert!(shown.contains("is not here") && shown.contains(&format!("`larder pull '{model}'`")), "{shown}");

    let failed = ended(&client, &asked(&client, &missing).await).await;
    let (start, error) = (client.last_start(&missing).await.unwrap(), failed.error.unwrap());
    assert_eq!(because(&start), Some(AbsentBecause::Failed));
    let absence = start.absence.unwrap();
    assert_eq!((absence.code, absence.detail, absence.action), (Some(error.code), error.detail, error.action));
    assert_eq!(start.pull.map(|pull| (pull.pull, pull.phase)), Some((failed.id, Phase::Failed)));

    ready(&client, &model).await;
    client.evict(3 * MIB).await.unwrap();
    let evicted = client.last_start(&model).await.unwrap();
    assert_eq!(because(&evicted), Some(AbsentBecause::Evicted), "{evicted:#?}");
    let absence = evicted.absence.clone().unwrap();
    assert!(absence.detail.contains("an operator, who asked for room"), "{absence:?}");
    assert_eq!(absence.at, Some(client.evictions().await.unwrap().remove(0).at));

    // A restart forgets what failed, and says so; what was evicted is on record.
    stopped(daemon).await;
    assert!(files_below(&home.root().join("starts")).is_empty(), "what came of a model goes with it");
    let _daemon = home.serve().await;
    let start = client.last_start(&missing).await.unwrap();
    assert_eq!((because(&start), start.pull), (Some(AbsentBecause::NotAsked), None));
    assert!(start.absence.unwrap().detail.contains("what else was before is not known"));
    assert_eq!(client.last_start(&model).await.unwrap().absence, evicted.absence);

    ready(&client, &model).await;
    client.remove(&model).await.unwrap();
    let removed = client.last_start(&model).await.unwrap();
    assert_eq!(because(&removed), Some(AbsentBecause::Removed), "{removed:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_sees_its_models_and_when_it_leased_them() {
    let origin = origin_with("m", 1).await;
    let (home, model) = (Home::new(), origin.reference("m"));
    let (daemon, client) = (home.serve().await, Client::new(&home.socket()));
    ready(&client, &model).await;
    let unknown = client.last_starts_of_pod(POD).await.unwrap_err();
    assert_eq!(unknown.code, Code::LeaseNotFound);
    let ended = home.run(&["why", POD]).await;
    assert_eq!(ended.code, Some(66));
    assert!(ended.err.contains(&format!("`larder why hf://{POD}`")), "{}", ended.err);

    let lease = client.open(&lease_of_pod(&model)).await.unwrap().lease.unwrap();
    client
        .open(&OpenRequest {
            lease: Some(LeaseTerms { holder: Some("ci".into()), ..LeaseTerms::default() }),
            ..OpenRequest::of(&model)
        })
        .await
        .unwrap();
    let [start] = client.last_starts_of_pod(POD).await.unwrap().try_into().unwrap();
    assert_eq!((start.reference.as_str(), start.state), (model.as_str(), StartState::Local));
    assert!(start.pull.is_some() && start.model.is_some());
    let [held] = start.leases.clone().try_into().unwrap();
    assert_eq!(
        (held.kind, held.holder.as_str(), &held.since, &held.ended_at),
        (HolderKind::Pod, POD, &lease.since, &None)
    );
    assert!(held.after_ready_ms.is_some_and(|ms| ms >= 0), "{held:?}");
    let both = client.last_start(&model).await.unwrap().leases;
    assert_eq!(both.len(), 2, "who asks for the model sees every lease: {both:?}");
    let shown = home.done(&["why", POD]).await;
    assert!(shown.contains(&model) && shown.contains("still uses it") && !shown.contains("ci"), "{shown}");

    // The lease and the pull are both known after a restart, and with them how far they are apart.
    stopped(daemon).await;
    let _daemon = home.serve().await;
    let [start] = client.last_starts_of_pod(POD).await.unwrap().try_into().unwrap();
    assert_eq!(start.leases, [held]);

    client.release(&lease.id).await.unwrap();
    let [start] = client.last_starts_of_pod(POD).await.unwrap().try_into().unwrap();
    assert!(start.leases[0].ended_at.is_some(), "{start:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_that_had_to_hash_again_is_told() {
    let origin = origin_with("m", 1).await;
    let (home, model) = (Home::new(), origin.reference("m"));
    let (_daemon, client) = (home.serve().await, Client::new(&home.socket()));
    let path = ready(&client, &model).await.path.unwrap();
    client.open(&OpenRequest::of(&model)).await.unwrap();
    assert_eq!(client.last_start(&model).await.unwrap().proof, None);
    let file = File::open(std::path::Path::new(&path).join("weights")).unwrap();
    file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    client.open(&OpenRequest::of(&model)).await.unwrap();
    let proof = client.last_start(&model).await.unwrap().proof.expect("it was touched");
    assert!(proof.took_us > 0);
    assert!(home.done(&["why", &model]).await.contains("An open had to read and hash files again"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_about_is_one_thing() {
    let home = Home::new();
    let daemon = home.serve().await;
    for query in ["", "?model=hf://o/n&pod=a/b", "?node=x", "?model=ftp://x"] {
        let mut stream = TcpStream::connect(daemon.tcp_address()).await.unwrap();
        let request = format!("GET /v1/starts{query} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("\"action\""), "{query}: {answer}");
    }
}

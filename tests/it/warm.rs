//! Warm-ups: what was dropped from memory is brought back, and what is resident is what the kernel says.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use larder::client::Client;
use larder::fault::{Code, Diagnose};
use larder::wire::http::{OpenRequest, PullRequest, WarmPhase, WarmRequest, WarmStatus};
use larder::wire::residency;
use rustix::fs::{Advice, fadvise};

use super::support::larder::{Ended, Home};
use super::support::memory_group::MemoryGroup;
use super::support::node::{TestNode, files_below, reference};
use super::support::skip::skipped;

const MIB: usize = 1 << 20;

/// A directory with a model of two weights that are the same file, one of its own, and a small file; and its size with the
/// twin counted once.
fn origin(dir: &Path) -> (String, u64) {
    let model = dir.join("origin");
    fs::create_dir(&model).unwrap();
    let weights = |seed: u8, length| {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
        bytes
    };
    fs::write(model.join("a.safetensors"), weights(1, 5 * MIB + 17)).unwrap();
    fs::write(model.join("b.safetensors"), weights(1, 5 * MIB + 17)).unwrap();
    fs::write(model.join("c.safetensors"), weights(2, 3 * MIB)).unwrap();
    fs::write(model.join("config.json"), "{}").unwrap();
    (format!("file://{}", model.display()), (8 * MIB + 17 + 2) as u64)
}

/// Drops every blob of a volume from memory; false, with a word, where the file system does not do that.
fn dropped(volume: &Path) -> bool {
    let mut left = 0;
    for path in files_below(&volume.join("blobs")) {
        let file = File::open(path).unwrap();
        // Pages that are not written yet cannot be dropped.
        file.sync_all().unwrap();
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        left += residency::resident_bytes(&file, file.metadata().unwrap().len()).unwrap_or(1);
    }
    if left > 0 {
        skipped("the file system of the temporary directory does not drop its pages");
    }
    left == 0
}

/// A model that is local and not in memory.
async fn cold() -> Option<(TestNode, String, u64)> {
    let node = TestNode::new().start().await;
    let (reference, bytes) = origin(node.beside_volume());
    node.ready(&reference).await;
    dropped(node.volume()).then_some((node, reference, bytes))
}

async fn warmed(node: &TestNode, text: &str) -> WarmStatus {
    node.cache().warm(&reference(text)).unwrap().finished().await
}

#[tokio::test]
async fn a_model_that_was_dropped_is_resident_after_a_warm_up_and_is_not_read_twice() {
    let Some((node, reference, bytes)) = cold().await else { return };
    let model = node.cache().model(&reference).unwrap().model;
    assert_eq!((model.resident_bytes, model.resident_percent), (Some(0), Some(0)));

    let first = warmed(&node, &reference).await;
    assert_eq!((first.phase, first.why.as_deref()), (WarmPhase::Warm, None), "{first:#?}");
    assert_eq!((first.bytes_total, first.bytes_done, first.bytes_read), (bytes, bytes, bytes));
    assert_eq!((first.resident_bytes_before, first.resident_bytes, first.percent), (Some(0), Some(bytes), Some(100)));
    assert!(first.ended_at.is_some());
    let model = node.cache().model(&reference).unwrap().model;
    assert_eq!((model.resident_bytes, model.resident_percent), (Some(bytes), Some(100)), "the twin is there once");
    assert!(model.bytes > bytes && model.leases == 0);

    let second = warmed(&node, &reference).await;
    assert_eq!((second.phase, second.bytes_read, second.bytes_done), (WarmPhase::Warm, 0, bytes));
    assert_eq!(node.cache().gauges().resident_bytes, Some(bytes));
    let listed: Vec<_> = node.cache().warms().into_iter().map(|status| status.id).collect();
    assert_eq!(listed, [second.id, first.id], "newest first");
}

// One thread: nothing of a warm-up happens before the test waits.
#[tokio::test]
async fn who_asks_for_the_same_version_joins_and_the_next_one_waits_for_its_turn() {
    let Some((node, reference_text, bytes)) = cold().await else { return };
    let some = format!("{reference_text}#include=c.safetensors");
    node.ready(&some).await;
    let cache = node.cache();
    let mut first = cache.warm(&reference(&reference_text)).unwrap();
    let mut other = cache.warm(&reference(&some)).unwrap();
    let joined = cache.warm(&reference(&reference_text)).unwrap();
    assert_eq!(first.id, joined.id);
    assert_ne!(first.id, other.id);
    assert_eq!(other.status.borrow().phase, WarmPhase::Queued);
    let (first, other) = (first.finished().await, other.finished().await);
    assert_eq!((first.phase, other.phase), (WarmPhase::Warm, WarmPhase::Warm));
    assert_eq!((first.bytes_read, other.bytes_read), (bytes, 0), "the second found what the first had read");
    assert_eq!(cache.warms().len(), 2);
}

#[tokio::test]
async fn a_warm_up_that_is_taken_back_reads_no_more_and_changes_nothing_when_it_has_ended() {
    let Some((node, text, _)) = cold().await else { return };
    let handle = node.cache().warm(&reference(&text)).unwrap();
    let ended = node.cache().cancel_warm(&handle.id).await.unwrap();
    assert_eq!((ended.phase, ended.bytes_read), (WarmPhase::Cancelled, 0));
    let warm = warmed(&node, &text).await;
    assert_ne!(warm.id, handle.id);
    assert_eq!(node.cache().cancel_warm(&warm.id).await.unwrap(), warm);
    let error = node.cache().cancel_warm("w0").await.unwrap_err();
    assert_eq!(error.code(), Code::WarmNotFound);
}

#[tokio::test]
async fn a_drain_ends_warm_ups_and_then_nothing_is_warmed() {
    let Some((node, text, _)) = cold().await else { return };
    let mut handle = node.cache().warm(&reference(&text)).unwrap();
    node.cache().drain(std::time::Duration::from_secs(30)).await;
    assert_eq!(handle.finished().await.phase, WarmPhase::Cancelled);
    assert_eq!(node.cache().warm(&reference(&text)).err().unwrap().code(), Code::Draining);
}

#[tokio::test]
async fn a_model_is_not_removed_while_it_is_being_warmed_and_not_warmed_when_it_is_gone() {
    let Some((node, text, _)) = cold().await else { return };
    let mut handle = node.cache().warm(&reference(&text)).unwrap();
    let refused = node.cache().remove(&text).unwrap_err();
    assert_eq!(refused.code(), Code::ModelInUse);
    assert!(refused.to_string().contains("held by larder, warming up"), "{refused}");
    assert_eq!(handle.finished().await.phase, WarmPhase::Warm);
    node.cache().remove(&text).unwrap();
    assert_eq!(node.cache().warm(&reference(&text)).err().unwrap().code(), Code::NotLocal);
}

#[tokio::test]
async fn a_blob_that_is_missing_fails_the_warm_up_and_comes_again() {
    let Some((node, text, _)) = cold().await else { return };
    let blobs = files_below(&node.volume().join("blobs"));
    fs::remove_file(blobs.iter().max_by_key(|path| fs::metadata(path).unwrap().len()).unwrap()).unwrap();
    let failed = warmed(&node, &text).await;
    assert_eq!(failed.phase, WarmPhase::Failed);
    let error = failed.error.unwrap();
    assert!(error.code == "not-ready" && error.detail.contains("being pulled again"), "{error:?}");
    node.ready(&text).await;
    assert_eq!(warmed(&node, &text).await.phase, WarmPhase::Warm);
}

/// A home with a model that is local and not in memory.
async fn cold_home(home: &Home) -> Option<(String, u64)> {
    let (reference, bytes) = origin(home.path());
    home.done(&["pull", &reference]).await;
    dropped(&home.root()).then_some((reference, bytes))
}

fn status(ended: &Ended) -> WarmStatus {
    serde_json::from_str(&ended.out).unwrap_or_else(|e| panic!("{e}: {ended:?}"))
}

async fn resident_column(home: &Home) -> String {
    let list = home.done(&["list"]).await;
    let (heading, row) = list.split_once('\n').unwrap();
    let end = heading.find("RESIDENT").unwrap() + "RESIDENT".len();
    row[..end].rsplit("  ").next().unwrap().trim().to_owned()
}

#[tokio::test]
async fn without_a_daemon_the_command_warms_and_says_what_is_resident() {
    let home = Home::new();
    let Some((reference, _)) = cold_home(&home).await else { return };
    assert_eq!(resident_column(&home).await, "0 %");
    let ended = home.run(&["warm", &reference]).await;
    assert_eq!((ended.code, ended.out.as_str()), (Some(0), "100 % resident (8.4 of 8.4 MB)\n"), "{}", ended.err);
    assert!(ended.err.contains(&format!("warming {reference}: 8.4 MB of 8.4 MB to read\n")), "{}", ended.err);
    assert!(ended.err.contains(&format!("warm {reference}  100 % resident")), "{}", ended.err);
    assert_eq!(resident_column(&home).await, "100 %");

    for (words, code) in [
        (["warm", "--detach", &reference], "daemon-unreachable"),
        (["warm", "--quiet", "file:///not/here"], "not-local"),
    ] {
        let ended = home.run(&words).await;
        assert!(ended.code != Some(0) && ended.err.contains(code), "{ended:?}");
    }
}

/// Tried again if the kernel has taken a page back before we look: where memory is short it may do so at any moment.
async fn assert_makes_resident(home: &Home, words: &[&str]) {
    let mut seen = Vec::new();
    for _ in 0..3 {
        assert!(dropped(&home.root()));
        home.done(words).await;
        seen.push(resident_column(home).await);
        if seen.last().is_some_and(|column| column == "100 %") {
            return;
        }
    }
    panic!("{words:?} left {seen:?} resident");
}

#[tokio::test]
async fn pull_and_open_warm_when_they_are_asked_to() {
    let home = Home::new();
    let Some((reference, _)) = cold_home(&home).await else { return };
    let path = home.done(&["open", &reference]).await;
    assert_eq!(resident_column(&home).await, "0 %");
    assert_eq!(home.done(&["open", "--warm", &reference]).await, path);
    assert_eq!(resident_column(&home).await, "100 %");

    let mut daemon = home.serve().await;
    assert!(dropped(&home.root()));
    assert_eq!(home.done(&["open", "--warm", &reference]).await, path);
    daemon.says("warm-up ended").await;
    assert_eq!(resident_column(&home).await, "100 %");
    for words in [["pull", "--warm", &reference], ["warm", "--quiet", &reference]] {
        assert_makes_resident(&home, &words).await;
    }
    assert!(dropped(&home.root()));
    let id = home.done(&["warm", "--detach", &reference]).await;
    let cancelled = home.done(&["cancel", id.trim()]).await;
    // It may have ended before.
    assert!([format!("cancelled {reference}\n"), format!("warm {reference}\n")].contains(&cancelled), "{cancelled}");
    drop(daemon);
}

#[tokio::test]
async fn an_open_warms_what_is_not_resident_if_that_is_configured() {
    let mut home = Home::new();
    home.set("LARDER_SERVE_WARM_ON_OPEN", "true");
    home.set("LARDER_SERVE_METRICS_BY_MODEL", "true");
    let Some((reference, bytes)) = cold_home(&home).await else { return };
    let mut daemon = home.serve().await;
    home.done(&["open", &reference]).await;
    daemon.says("warm-up ended").await;
    let client = Client::new(&home.socket());
    let model = client.model(&reference).await.unwrap().model;
    assert_eq!(model.resident_bytes, Some(bytes));
    // Another open within some seconds does not look again.
    home.done(&["open", &reference]).await;
    assert_eq!(client.warms().await.unwrap().len(), 1);
    let metrics = reqwest::get(format!("http://{}/metrics", daemon.tcp_address())).await.unwrap().text().await.unwrap();
    for line in [
        format!("larder_resident_bytes {bytes}"),
        format!("larder_model_resident_bytes{{model=\"{}\",reference=\"{reference}\"}} {bytes}", model.id),
        "larder_warms_total{outcome=\"warm\"} 1".to_owned(),
        format!("larder_warm_read_bytes_total {bytes}"),
    ] {
        assert!(metrics.lines().any(|found| found == line), "`{line}` is missing in\n{metrics}");
    }
}

#[tokio::test]
async fn the_api_warms_and_tells_residency_where_it_is_asked_for() {
    let home = Home::new();
    let Some((reference, bytes)) = cold_home(&home).await else { return };
    let _daemon = home.serve().await;
    let client = Client::new(&home.socket());

    let asked = client.warm(&WarmRequest::of(&reference)).await.unwrap();
    let ended = ended(&client, &asked.id).await;
    assert_eq!((ended.phase, ended.percent), (WarmPhase::Warm, Some(100)));
    assert_eq!(client.cancel_warm(&asked.id).await.unwrap(), ended, "what has ended stays as it was");
    assert_eq!(client.warm_status("w0").await.unwrap_err().code, Code::WarmNotFound);
    let untold = WarmRequest::of("file:///not/here");
    assert_eq!(client.warm(&untold).await.unwrap_err().code, Code::NotLocal);

    assert_eq!(client.models().await.unwrap()[0].resident_bytes, None, "nobody asked for it");
    assert_eq!(client.models_with_residency().await.unwrap()[0].resident_bytes, Some(bytes));
    let details = client.readiness().await.unwrap().details;
    let state = |name: &str| details.iter().find(|detail| detail.name == name).unwrap().state.clone();
    assert_eq!(state("page cache"), residency::Method::of_this_kernel().text());
    assert_ne!(state("memory limit"), "");

    assert!(dropped(&home.root()));
    client.open(&OpenRequest { warm: true, ..OpenRequest::of(&reference) }).await.unwrap();
    let by_open = client.warms().await.unwrap()[0].clone();
    assert_eq!(self::ended(&client, &by_open.id).await.bytes_read, bytes);

    assert!(dropped(&home.root()));
    client.pull(&PullRequest { warm: true, ..PullRequest::of(&reference) }).await.unwrap();
    let by_pull = bounded(async || {
        let newest = client.warms().await.unwrap()[0].clone();
        (newest.id != by_open.id).then_some(newest)
    });
    let by_pull = by_pull.await;
    assert_eq!(self::ended(&client, &by_pull.id).await.bytes_read, bytes);
}

/// Asks until it has ended.
async fn ended(client: &Client, id: &str) -> WarmStatus {
    bounded(async || Some(client.warm_status(id).await.unwrap()).filter(|status| status.phase.is_final())).await
}

/// Asks again and again until there is an answer; the bound is against hanging, not a measurement.
async fn bounded<T>(mut ask: impl AsyncFnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            match ask().await {
                Some(answer) => return answer,
                None => tokio::task::yield_now().await,
            }
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(120), asking).await.expect("it never came")
}

#[tokio::test]
async fn under_a_memory_limit_the_trap_is_told_and_no_more_is_read_than_stays() {
    const LIMIT: u64 = 128 << 20;
    let group = match MemoryGroup::new("trap", LIMIT) {
        Ok(group) => group,
        Err(why) => return skipped(&why),
    };
    let home = Home::new();
    let model = home.path().join("large");
    fs::create_dir(&model).unwrap();
    for n in 0..6u8 {
        let mut bytes = vec![0; 32 * MIB];
        blake3::Hasher::new().update(&[n]).finalize_xof().fill(&mut bytes);
        fs::write(model.join(format!("{n}.safetensors")), bytes).unwrap();
    }
    let reference = format!("file://{}", model.display());
    home.done(&["pull", &reference]).await;
    if !dropped(&home.root()) {
        return;
    }
    let inside = async |words: &[&str]| {
        let mut command: Command = group.enter(&home.command(words));
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    };
    let ended = inside(&["warm", "-o", "json", &reference]).await;
    let warm = status(&ended);
    assert_eq!((ended.code, warm.phase), (Some(0), WarmPhase::Stopped), "{ended:?}");
    let why = warm.why.clone().unwrap();
    let trap = format!("larder runs under a memory limit of 134.2 MB (`{}`)", group.place().display());
    assert!(why.contains(&trap) && why.contains("remove the memory limit (keep the request)"), "{why}");
    assert!(warm.bytes_read > 0 && warm.bytes_read < LIMIT, "{warm:?}");
    assert!(warm.resident_bytes.unwrap() >= warm.bytes_read / 10 * 9, "what was read stays: {:?}", warm.resident_bytes);
    assert!(ended.err.contains(&format!("stopped {reference}  ")) && ended.err.contains(&trap), "{}", ended.err);
    // Outside of the limit it is warmed; what the kernel has taken of the group's pages meanwhile, at the next try.
    let mut told = Vec::new();
    for _ in 0..3 {
        told.push(home.done(&["warm", &reference]).await);
        if told.last().is_some_and(|told| told.starts_with("100 % resident")) {
            return;
        }
    }
    panic!("{told:?}");
}

//! Whole pulls: what becomes of a model between its source and its name.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use larder::fault::Code;
use larder::wire::http::Phase;

use crate::support::hostile_origin::{HostileOrigin, seeds};
use crate::support::hub::{RepoFile, TestHub};
use crate::support::model_origin::{Marks, ModelOrigin};
use crate::support::node::{TestNode, files_below, reference, selection};
use crate::support::raw_http::sha256;

const MIB: u64 = 1 << 20;

/// So many bytes, no two of whose stretches are alike.
fn noise(seed: u64, length: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0; length as usize];
    rng.fill(&mut bytes);
    bytes
}

/// An origin with one model `m`, of these files.
async fn origin_of(files: &[(&str, &[u8])]) -> (ModelOrigin, String) {
    let origin = ModelOrigin::start().await;
    for (path, bytes) in files {
        origin.put("m", path, bytes);
    }
    let reference = origin.reference("m");
    (origin, reference)
}

fn assert_is(path: &Path, bytes: &[u8]) {
    assert!(fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())) == bytes, "{}", path.display());
}

/// The names below a directory.
fn names(dir: &Path) -> Vec<String> {
    let files = files_below(dir).into_iter();
    files.map(|path| path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_pulls_of_one_reference_are_one_pull() {
    let weights = noise(1, 6 * MIB + 77);
    let (origin, model) = origin_of(&[("weights", &weights), ("config.json", b"{}")]).await;
    let node = TestNode::new().start().await;
    origin.hold_after(3 * MIB);
    let ask = |_| {
        let (cache, model) = (node.cache().clone(), reference(&model));
        tokio::spawn(async move { cache.pull(&model).unwrap() })
    };
    let asked = futures::future::join_all((0..1000).map(ask)).await;
    origin.let_go();
    let mut answers = BTreeSet::new();
    for mut handle in asked.into_iter().map(Result::unwrap) {
        let status = handle.finished().await;
        assert_eq!((status.phase, status.asked), (Phase::Ready, 1000), "{status:#?}");
        answers.insert((status.id, status.path.unwrap()));
    }
    assert_eq!(answers.len(), 1, "one pull, one directory");
    assert_eq!(origin.sent_of("m", "weights"), weights.len() as u64);
    assert_eq!(origin.sent_of("m", "config.json"), 2);
    assert_is(&Path::new(&answers.first().unwrap().1).join("weights"), &weights);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_flight_never_exceeds_the_memory_however_large_the_file_is() {
    let memory = 8 * MIB;
    let weights = noise(2, 64 * MIB + 5);
    let (origin, model) = origin_of(&[("weights", &weights)]).await;
    let node = TestNode::new().memory(memory).start().await;
    // Without its first range nothing of the file can be written: what comes of the others stays in memory.
    origin.hold_ranges_from(0);
    let mut handle = node.cache().pull(&reference(&model)).unwrap();
    origin.is_waited_for().await;
    let now = || node.cache().pulls().remove(0);
    // All but the piece that the first range has to itself.
    while now().bytes_fetched < memory - MIB {
        tokio::task::yield_now().await;
    }
    assert_eq!(now().bytes_done, 0);
    // What each of the four connections has received and no piece was free for.
    let received = 4 * MIB;
    assert!(now().bytes_fetched <= memory + received, "{} bytes are in memory", now().bytes_fetched);
    origin.let_go();
    let finished = handle.finished();
    tokio::pin!(finished);
    loop {
        // In this order: what is written after the first look only makes the difference smaller.
        let fetched = now().bytes_fetched;
        let written = now().bytes_done;
        assert!(fetched <= written + memory + received, "{} bytes are in memory", fetched - written);
        tokio::select! {
            biased;
            status = &mut finished => break assert_eq!(status.phase, Phase::Ready, "{status:#?}"),
            () = tokio::task::yield_now() => {}
        }
    }
    assert_eq!(origin.sent_bytes(), weights.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_whose_checksum_is_here_are_never_fetched_again() {
    let (weights, other) = (noise(3, 3 * MIB), noise(4, MIB));
    let hub = TestHub::start().await;
    let node = TestNode::new().hub(hub.endpoint()).start().await;
    let file = |path: &str, bytes: &[u8]| RepoFile::new(path, bytes.to_vec());
    let sum = sha256(&weights);
    hub.publish("acme/base", vec![file("model.safetensors", &weights), file("config.json", b"{}")]);
    node.ready("hf://acme/base").await;
    let sent = || hub.bytes_sent(&sum) + hub.bytes_sent("config.json");
    let once = weights.len() as u64 + 2;
    assert_eq!(sent(), once);

    hub.publish(
        "acme/base",
        vec![file("model.safetensors", &weights), file("config.json", b"{}"), file("README.md", b"new")],
    );
    let second = node.ready("hf://acme/base").await;
    assert_is(&second.join("model.safetensors"), &weights);
    hub.publish("acme/tune", vec![file("base.safetensors", &weights), file("tune.safetensors", &other)]);
    let tune = node.ready("hf://acme/tune").await;
    assert_is(&tune.join("base.safetensors"), &weights);
    assert_is(&tune.join("tune.safetensors"), &other);
    let (origin, model) =
        origin_of(&[("same", &weights), ("twin-a", &noise(5, MIB)), ("twin-b", &noise(5, MIB))]).await;
    let web = node.ready(&model).await;
    assert_is(&web.join("same"), &weights);
    assert_is(&web.join("twin-a"), &noise(5, MIB));
    assert_is(&web.join("twin-b"), &noise(5, MIB));

    assert_eq!(sent(), once, "what two repositories share is sent once");
    assert_eq!(origin.sent_of("m", "same"), 0, "another source has it with the same checksum");
    assert_eq!(origin.sent_bytes(), MIB, "twins in one listing are fetched once");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_selections_never_collide() {
    let hub = TestHub::start().await;
    let node = TestNode::new().hub(hub.endpoint()).start().await;
    let all = ["config.json", "model.safetensors", "onnx/config.json", "onnx/model.onnx"];
    hub.publish("acme/m", all.iter().map(|path| RepoFile::new(path, path.as_bytes().to_vec())).collect());
    let wanted = [
        (reference("hf://acme/m"), all.to_vec()),
        (selection("hf://acme/m", &["*.json"]), vec!["config.json", "onnx/config.json"]),
        (selection("hf://acme/m", &["*.safetensors"]), vec!["model.safetensors"]),
        (reference("hf://acme/m@main/onnx"), vec!["config.json", "model.onnx"]),
        (selection("hf://acme/m@main/onnx", &["*.json"]), vec!["config.json"]),
    ];
    let mut paths = BTreeSet::new();
    for (model, _) in &wanted {
        paths.insert(node.ready_ref(model).await);
    }
    assert_eq!(paths.len(), wanted.len(), "{paths:#?}");
    let ids: BTreeSet<_> = node.cache().models().into_iter().map(|model| model.id).collect();
    assert_eq!(ids.len(), wanted.len());
    for (model, expected) in &wanted {
        // Whatever was pulled after it.
        let opened = node.cache().open(model).unwrap();
        assert_eq!(&names(Path::new(&opened.path)), expected, "{model}");
        for name in expected {
            let inside = if model.subdir().is_some() { format!("onnx/{name}") } else { (*name).to_owned() };
            assert_is(&Path::new(&opened.path).join(name), inside.as_bytes());
        }
    }
    node.refused(&selection("hf://acme/m", &["*.gguf"]), Code::NothingSelected).await;
    assert_eq!(node.cache().models().len(), wanted.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_does_not_fit_is_refused_before_its_first_byte() {
    let origin = ModelOrigin::start().await;
    origin.put("large", "weights", &noise(6, 4_500_000));
    origin.put("first", "weights", &noise(7, 732 * 4096));
    origin.put("second", "weights", &noise(8, 2_500_000));
    let node = TestNode::new().quota(4_000_000).start().await;
    let [large, first, second] = ["large", "first", "second"].map(|model| origin.reference(model));

    let says = node.refused(&reference(&large), Code::NeverFits).await;
    assert!(says.contains("4.5 MB") && says.contains("4.0 MB"), "{says}");
    node.ready(&first).await;
    node.cache().pin(&reference(&first)).unwrap();
    let says = node.refused(&reference(&second), Code::VolumeFull).await;
    let pin = format!("0 B can be evicted; the rest is held by a pin on `{first}`");
    for part in ["2.5 MB", "1.0 MB", "4.0 MB", "3.0 MB", &pin] {
        assert!(says.contains(part), "{part} is not in: {says}");
    }
    assert_eq!(origin.sent_bytes(), 732 * 4096, "a byte of a model that was refused was fetched");
    node.cache().unpin(&reference(&first)).unwrap();
    node.ready(&second).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pull_left_behind_is_not_in_the_way_of_the_next_one() {
    let (small, large) = (noise(9, MIB), noise(10, 3 * MIB));
    let (origin, model) = origin_of(&[("a-large", &large), ("b-small", &small)]).await;
    origin.put("other", "weights", &noise(11, 4 * MIB));
    // Exactly one of the two models fits.
    let node = TestNode::new().quota(4 * MIB).leaves_parts().start().await;
    let mut broken = large.clone();
    broken[5] ^= 1;
    origin.lie("m", "a-large", Some(&broken));
    // The large file ends when the small one is done.
    origin.hold_ranges_from(2 * MIB);
    let mut handle = node.cache().pull(&reference(&model)).unwrap();
    handle.status.wait_for(|status| status.files_done == 1).await.unwrap();
    origin.let_go();
    assert_eq!(handle.finished().await.error.unwrap().code, Code::ChecksumMismatch.text());
    origin.lie("m", "a-large", None);
    node.ready(&model).await;
    node.cache().remove(&model).unwrap();

    // Another one, after a pull that was given up with a file of it done.
    origin.lie("m", "a-large", Some(&broken));
    node.refused(&reference(&model), Code::ChecksumMismatch).await;
    node.ready(&origin.reference("other")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changes_in_the_middle_never_becomes_a_mixture() {
    for marks in [Marks::Checksums, Marks::Etags, Marks::OnlyChecksums] {
        let (old, new) = (noise(12, 6 * MIB), noise(13, 6 * MIB));
        let (origin, model) = origin_of(&[("config.json", b"{}"), ("weights", &old)]).await;
        origin.mark("m", marks);
        origin.change_after(3 * MIB, "m", "weights", &new);
        let node = TestNode::new().memory(2 * MIB).leaves_parts().start().await;
        let status = node.pull(&model).await;
        match status.phase {
            Phase::Ready => assert_is(&Path::new(&status.path.unwrap()).join("weights"), &new),
            _ => {
                let code = status.error.unwrap().code;
                // Only a checksum can tell, and it tells that the bytes are not what the listing said.
                let expected = if marks == Marks::OnlyChecksums { Code::ChecksumMismatch } else { Code::SourceChanged };
                assert_eq!(code, expected.text(), "{marks:?}");
                assert_is(&node.ready(&model).await.join("weights"), &new);
            }
        }
        assert_eq!(node.cache().models().len(), 1, "{marks:?}");
    }
}

/// Two answers about such a file could be of two versions, and nobody would know: so there is one answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_nothing_marks_comes_in_one_answer_and_never_becomes_a_mixture() {
    let (old, new) = (noise(14, 6 * MIB), noise(15, 6 * MIB));
    let (origin, model) = origin_of(&[("config.json", b"{}"), ("weights", &old)]).await;
    origin.mark("m", Marks::Nothing);
    origin.change_after(3 * MIB, "m", "weights", &new);
    let node = TestNode::new().memory(2 * MIB).start().await;
    let weights = node.ready(&model).await.join("weights");
    let found = std::fs::read(&weights).unwrap();
    assert!(found == old || found == new, "the file is a mixture of two versions");
    // Nothing says that it is still the same, so it is fetched again, and is the new one.
    assert_is(&node.ready(&model).await.join("weights"), &new);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_differ_from_their_checksum_get_one_more_try_and_no_name() {
    let right = noise(14, 2 * MIB);
    let mut wrong = right.clone();
    wrong[MIB as usize] ^= 0x80;
    let (origin, model) = origin_of(&[("weights", &right)]).await;
    origin.lie("m", "weights", Some(&wrong));
    let node = TestNode::new().start().await;
    let says = node.refused(&reference(&model), Code::ChecksumMismatch).await;
    assert!(says.contains("weights"), "{says}");
    assert_eq!(origin.sent_bytes(), 2 * right.len() as u64);
    assert_eq!(node.blobs(), BTreeMap::new());
    assert_eq!(node.cache().models(), []);
    assert_eq!(names(&node.volume().join("public")), [] as [&str; 0]);
    node.check();

    origin.lie("m", "weights", None);
    assert_is(&node.ready(&model).await.join("weights"), &right);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_pull_goes_on_where_it_stopped() {
    let (size, memory) = (24 * MIB, 4 * MIB);
    let weights = noise(15, size);
    let (origin, model) = origin_of(&[("weights", &weights)]).await;
    let node = TestNode::new().memory(memory).start().await;
    origin.hold_after(14 * MIB);
    let handle = node.cache().pull(&reference(&model)).unwrap();
    origin.has_sent(14 * MIB).await;
    let status = node.cache().cancel(&handle.id).await.unwrap();
    assert_eq!(status.phase, Phase::Cancelled, "{status:#?}");
    assert_eq!(status.error.unwrap().code, Code::PullCancelled.text());
    assert_eq!(node.cache().models(), []);
    origin.is_left().await;
    origin.let_go();
    let second = node.pull(&model).await;
    assert_is(&Path::new(&second.path.unwrap()).join("weights"), &weights);
    // What was asked for and not written is what may be sent twice, and ranges are never more than twice the memory.
    let twice = 2 * memory;
    assert!(origin.sent_bytes() <= size + twice, "{} bytes were sent for {size}", origin.sent_bytes());
    assert!(second.bytes_fetched <= size - 14 * MIB + twice, "{} bytes were fetched again", second.bytes_fetched);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_drained_is_finished_by_the_next_start() {
    let (size, memory) = (24 * MIB, 4 * MIB);
    let weights = noise(16, size);
    let (origin, model) = origin_of(&[("weights", &weights)]).await;
    let mut node = TestNode::new().memory(memory).start().await;
    origin.hold_after(14 * MIB);
    let handle = node.cache().pull(&reference(&model)).unwrap();
    origin.has_sent(14 * MIB).await;
    drop(handle);
    node.restart(|_| {}).await;
    origin.is_left().await;
    origin.let_go();
    assert_eq!(node.cache().models(), []);
    node.cache().resume_pending();
    let resumed = node.cache().pulls();
    assert_eq!(resumed.iter().map(|pull| &pull.reference).collect::<Vec<_>>(), [&model]);
    let status = node.cache().pull_status(&resumed[0].id).unwrap().finished().await;
    assert_is(&Path::new(&status.path.unwrap()).join("weights"), &weights);
    assert!(origin.sent_bytes() <= size + 2 * memory, "{} bytes were sent for {size}", origin.sent_bytes());
}

/// The record of the only model: its sequence and when it was confirmed.
fn confirmed(node: &TestNode) -> (u64, u64) {
    let records = files_below(&node.volume().join("refs"));
    assert_eq!(records.len(), 1);
    let record: serde_json::Value = serde_json::from_slice(&fs::read(&records[0]).unwrap()).unwrap();
    (record["sequence"].as_u64().unwrap(), record["confirmed_at_ms"].as_u64().unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unchanged_model_is_confirmed_without_a_byte() {
    for marks in [Marks::Checksums, Marks::Etags] {
        let (origin, model) = origin_of(&[("config.json", b"{}"), ("weights", &noise(17, MIB))]).await;
        origin.mark("m", marks);
        let node = TestNode::new().start().await;
        let first = node.ready(&model).await;
        let (before, sent) = (confirmed(&node), origin.sent_bytes());
        let status = node.pull(&model).await;
        assert_eq!(status.phase, Phase::Ready);
        assert_eq!(status.path.as_deref(), first.to_str());
        assert_eq!(status.bytes_fetched, 0);
        assert_eq!(origin.sent_bytes(), sent, "{marks:?}");
        let after = confirmed(&node);
        assert!(after.0 > before.0 && after.1 >= before.1, "{before:?} {after:?}");
        assert_eq!(node.cache().models().len(), 1);
    }
}

/// Removes a file from a directory that is read-only.
fn tear_out(path: &Path) {
    fs::set_permissions(path.parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::remove_file(path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_model_is_mended_by_the_next_pull() {
    let (weights, more) = (noise(18, 2 * MIB), noise(19, MIB));
    let (origin, model) = origin_of(&[("weights", &weights), ("sub/more", &more)]).await;
    let node = TestNode::new().start().await;
    let path = node.ready(&model).await;
    let whole = origin.sent_bytes();

    tear_out(&path.join("sub/more"));
    node.ready(&model).await;
    assert_is(&path.join("sub/more"), &more);
    assert_eq!(origin.sent_bytes(), whole, "the blob is here");

    let digest = larder::model::Digest::of(&weights).to_hex().to_string();
    tear_out(&node.volume().join("blobs").join(&digest[..2]).join(&digest));
    node.ready(&model).await;
    assert_is(&path.join("weights"), &weights);
    assert_eq!(origin.sent_bytes(), whole + weights.len() as u64, "only what is missing is fetched");
}

#[tokio::test(flavor = "multi_thread")]
async fn when_a_branch_moves_the_old_version_stays_until_it_is_removed() {
    let hub = TestHub::start().await;
    let node = TestNode::new().hub(hub.endpoint()).start().await;
    let [shared, old, new] = [20, 21, 22].map(|seed| noise(seed, MIB));
    let files =
        |own: &[u8]| vec![RepoFile::new("a.safetensors", shared.clone()), RepoFile::new("b.safetensors", own.to_vec())];
    let model = "hf://acme/m";
    let first = hub.publish("acme/m", files(&old));
    let first_path = node.ready(model).await;
    let second = hub.publish("acme/m", files(&new));
    let second_path = node.ready(model).await;
    let main = node.volume().join("public/hub/models--acme--m/refs/main");
    let listed = || {
        let models = node.cache().models().into_iter();
        models.map(|model| (model.version, model.current, model.id)).collect::<Vec<_>>()
    };
    let [newest, oldest] = listed().try_into().unwrap();
    assert_eq!((&newest.0, newest.1, &oldest.0, oldest.1), (&second, true, &first, false));
    assert_is(&first_path.join("b.safetensors"), &old);
    assert_is(&second_path.join("b.safetensors"), &new);
    assert_eq!(fs::read_to_string(&main).unwrap(), second);

    let removed = node.cache().remove(&newest.2).unwrap();
    assert_eq!(removed.models.len(), 1);
    assert_eq!(fs::read_to_string(&main).unwrap(), first);
    assert_eq!(listed(), [(first.clone(), true, oldest.2)]);
    assert_eq!(node.blobs().len(), 2, "what the old version shares stays");
    assert!(!second_path.exists());
    assert_is(&first_path.join("a.safetensors"), &shared);

    // Both versions again, and another repository that shares a file with them.
    node.ready(model).await;
    hub.publish("acme/tune", vec![RepoFile::new("base.safetensors", shared.clone())]);
    let tune = node.ready("hf://acme/tune").await;
    let removed = node.cache().remove(model).unwrap();
    assert_eq!(removed.models.len(), 2, "a reference is all its versions");
    assert_eq!(node.blobs().into_values().collect::<Vec<_>>(), [MIB], "only what nobody shares is freed");
    assert_is(&tune.join("base.safetensors"), &shared);
    assert!(!main.exists());
    assert_eq!(listed().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn losing_the_index_loses_nothing() {
    let (weights, more) = (noise(23, 2 * MIB), noise(24, MIB));
    let (origin, model) = origin_of(&[("weights", &weights)]).await;
    origin.put("more", "weights", &weights);
    origin.put("more", "more", &more);
    let mut node = TestNode::new().start().await;
    let path = node.ready(&model).await;
    let before = node.cache().models();
    node.restart(|volume| fs::remove_dir_all(volume.join("index-v1")).unwrap()).await;
    assert_eq!(node.cache().models(), before);
    assert_eq!(node.cache().open(&reference(&model)).unwrap().path, path.to_str().unwrap());
    let sent = origin.sent_bytes();
    node.ready(&model).await;
    assert_eq!(origin.sent_bytes(), sent);
    node.ready(&origin.reference("more")).await;
    assert_eq!(origin.sent_bytes(), sent + more.len() as u64, "the blob is known by its checksum again");
}

#[tokio::test(start_paused = true)]
async fn pulls_from_a_hostile_origin_are_right_or_say_why() {
    let (mut ready, mut failed) = (0, 0);
    let seeds = seeds(60);
    let mut node = TestNode::new().leaves_parts().start().await;
    for (at, &seed) in seeds.iter().enumerate() {
        println!("seed {seed}");
        if at > 0 && at % 50 == 0 {
            // All of the volume is checked after each seed.
            node = TestNode::new().leaves_parts().start().await;
        }
        // Every other one behaves in the end, and then so does the pull.
        let heals = seed % 2 == 1;
        let origin = HostileOrigin::start(seed, heals).await;
        let rerun = || origin.how_to_rerun("pulls_from_a_hostile_origin");
        let rounds = if heals { HostileOrigin::FAULTS_BEFORE_HEALED + 1 } else { 1 };
        let mut whole = false;
        for _ in 0..rounds {
            let status = origin.in_no_time(node.pull(&origin.url)).await;
            if status.phase == Phase::Ready {
                let path = status.path.expect("a model that is ready has a directory");
                let expected: Vec<_> = origin.files.keys().cloned().collect();
                assert_eq!(names(Path::new(&path)), expected, "{}", rerun());
                for (name, right) in &origin.files {
                    let bytes = fs::read(Path::new(&path).join(name)).unwrap();
                    // Without a checksum, the other version is a version; a mixture of the two never is.
                    let other_version = !origin.has_checksums() && bytes == HostileOrigin::changed(right);
                    assert!(bytes == *right || other_version, "wrong bytes of {name} have a name: {}", rerun());
                }
                whole = true;
                break;
            }
            let error = status.error.unwrap_or_else(|| panic!("{:?} without a reason: {}", status.phase, rerun()));
            assert_eq!(status.phase, Phase::Failed, "{}", rerun());
            assert!(!error.code.is_empty() && !error.action.is_empty(), "{error:?}: {}", rerun());
            assert_ne!(error.code, Code::InternalError.text(), "{error:?}: {}", rerun());
            assert!(node.cache().models().iter().all(|model| model.reference != origin.url), "{}", rerun());
        }
        assert!(whole || !heals, "{}", rerun());
        if whole {
            ready += 1
        } else {
            failed += 1
        }
        node.check();
    }
    println!("{ready} of {} seeds became ready, {failed} failed", seeds.len());
    assert!(seeds.len() == 1 || (ready > 0 && failed > 0), "{ready} ready, {failed} failed: the faults prove nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hostile_name_is_refused_and_touches_nothing() {
    let origin = ModelOrigin::start().await;
    let node = TestNode::new().start().await;
    let outside = node.beside_volume().join("escaped");
    let absolute = outside.display().to_string();
    let (long, deep) = ("n".repeat(5000), vec!["d"; 2500].join("/"));
    let hostile = [
        "..",
        ".",
        "",
        "../../../../escaped",
        "a/../../../../../escaped",
        &absolute,
        "a\0b",
        "a\\..\\b",
        "\\\\host\\x",
        &long,
        &deep,
        "a//b",
        "a/",
        "\u{1b}[2J",
    ];
    let public = node.volume().join("public");
    let before = files_below(node.volume());
    let refuse = async |listing: serde_json::Value, what: &str| {
        origin.put("m", "good", b"good");
        origin.list("m", listing.to_string());
        let says = node.refused(&reference(&origin.reference("m")), Code::UnsafeName).await;
        assert!(says.len() < 1000 && !says.chars().any(char::is_control), "{what}: {says:?}");
    };
    let entry = |path: &str| serde_json::json!({"path": path, "size": 4, "sha256": sha256(b"good")});
    for name in hostile {
        refuse(serde_json::json!({"files": [entry("good"), entry(name)]}), name).await;
    }
    let many: Vec<_> = (0..=100_000).map(|i| serde_json::json!({"path": format!("f{i}"), "size": 1})).collect();
    refuse(serde_json::json!({ "files": many }), "100,001 files").await;

    assert_eq!(origin.sent_bytes(), 0);
    assert_eq!(names(&public), [] as [&str; 0]);
    assert!(!outside.exists());
    assert_eq!(fs::read_dir(node.beside_volume()).unwrap().count(), 1);
    let index = node.volume().join("index-v1");
    let new: Vec<_> = files_below(node.volume())
        .into_iter()
        .filter(|path| !before.contains(path) && !path.starts_with(&index))
        .collect();
    assert_eq!(new, [] as [&Path; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_differ_only_in_case_both_arrive() {
    let (_origin, model) =
        origin_of(&[("README", b"upper"), ("readme", b"lower"), ("Dir/x", b"1"), ("dir/x", b"2")]).await;
    let node = TestNode::new().start().await;
    let path = node.ready(&model).await;
    for (name, bytes) in [("README", "upper"), ("readme", "lower"), ("Dir/x", "1"), ("dir/x", "2")] {
        assert_is(&path.join(name), bytes.as_bytes());
    }
}

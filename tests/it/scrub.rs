//! Scrubbing finds what no stamp shows: bytes that the disk itself has lost. What is wrong is never served again, and comes
//! anew if somebody wants it.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use larder::fault::Code;
use larder::model::Digest;
use larder::wire::http::{Found, ScrubFinding, ScrubPhase};

use super::support::larder::Home;
use super::support::model_origin::ModelOrigin;
use super::support::node::{TestNode, files_below, reference};

async fn origin() -> ModelOrigin {
    let origin = ModelOrigin::start().await;
    for (model, path, bytes) in [
        ("m", "config.json", &b"{}"[..]),
        ("m", "model.safetensors", &[7; 3_000_000]),
        ("twin", "weights.bin", &[7; 3_000_000]),
        ("other", "other.bin", b"other"),
    ] {
        origin.put(model, path, bytes);
    }
    origin
}

fn blob(root: &Path, bytes: &[u8]) -> PathBuf {
    let hex = Digest::of(bytes).to_hex();
    root.join("blobs").join(&hex[..2]).join(&hex)
}

/// Flips a bit, as a disk does.
fn flip(path: &Path, at: u64) {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    file.sync_all().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flipped_bit_and_a_missing_blob_are_found_quarantined_and_fetched_anew() {
    let origin = origin().await;
    let node = TestNode::new().start().await;
    for model in ["m", "twin", "other"] {
        node.ready(&origin.reference(model)).await;
    }
    let clean = node.cache().scrub(None).unwrap().finished().await;
    assert_eq!(
        (clean.phase, clean.findings_total, clean.blobs_done, clean.bytes_done),
        (ScrubPhase::Done, 0, 3, 3_000_007)
    );

    let weights = blob(node.volume(), &[7; 3_000_000]);
    flip(&weights, 2_999_999);
    fs::remove_file(blob(node.volume(), b"other")).unwrap();
    let sent = origin.sent_bytes();
    let status = node.cache().scrub(None).unwrap().finished().await;
    assert_eq!((status.phase, status.findings_total), (ScrubPhase::Done, 2), "{status:#?}");
    let of = |model: &str, file: &str, bytes: &[u8], found| ScrubFinding {
        blob: Digest::of(bytes).to_string(),
        found,
        reference: Some(origin.reference(model)),
        file: Some(file.into()),
    };
    for expected in [
        of("m", "model.safetensors", &[7; 3_000_000], Found::Wrong),
        of("twin", "weights.bin", &[7; 3_000_000], Found::Wrong),
        of("other", "other.bin", b"other", Found::Missing),
    ] {
        assert!(status.findings.contains(&expected), "{expected:?} is not in {status:#?}");
    }
    assert_eq!(files_below(&node.volume().join("quarantine")).len(), 1);
    for model in ["m", "twin", "other"] {
        node.ready(&origin.reference(model)).await;
        assert!(node.cache().open(&reference(&origin.reference(model))).is_ok());
    }
    assert_eq!(origin.sent_bytes() - sent, 3_000_005, "only what was wrong, and once");
    let again = node.cache().scrub(None).unwrap().finished().await;
    assert_eq!((again.findings_total, again.blobs_done), (0, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_that_is_stopped_stays_stopped_and_one_that_is_asked_for_does_not_wait_for_the_slow_one() {
    let origin = origin().await;
    let node = TestNode::new().start().await;
    node.ready(&origin.reference("m")).await;
    // A new volume is not due; one that was never finished is.
    node.cache().scrub_in_background(1, Duration::ZERO);
    assert_eq!(node.cache().scrubs(), []);
    node.cache().scrub_in_background(1, Duration::ZERO);
    let slow = node.cache().scrubs()[0].clone();
    assert_eq!((slow.in_background, slow.rate_bytes_per_second), (true, Some(1)));
    node.cache().scrub_in_background(1, Duration::ZERO);
    assert_eq!(node.cache().scrubs().len(), 1, "one at a time");

    let asked = node.cache().scrub(None).unwrap().finished().await;
    assert_eq!((asked.phase, asked.blobs_done), (ScrubPhase::Done, 2));
    let slow = node.cache().scrub_status(&slow.id).unwrap().finished().await;
    assert_eq!(slow.phase, ScrubPhase::Cancelled);

    let running = node.cache().scrub(Some(1)).unwrap();
    let joined = node.cache().scrub(None).unwrap();
    assert_eq!(running.id, joined.id);
    assert_eq!(node.cache().cancel_scrub(&running.id).await.unwrap().phase, ScrubPhase::Cancelled);
    let error = node.cache().scrub_status("s0").err().unwrap();
    assert_eq!(larder::fault::Diagnose::code(&error), Code::ScrubNotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_says_what_is_wrong_and_ends_with_the_code_of_corruption_with_a_daemon_and_without() {
    let origin = origin().await;
    let model = origin.reference("m");
    let home = Home::new();
    for with_daemon in [false, true] {
        let daemon = if with_daemon { Some(home.serve().await) } else { None };
        home.done(&["pull", &model]).await;
        let ended = home.run(&["scrub", "--rate", "1GB/s"]).await;
        assert_eq!((ended.code, ended.out.as_str()), (Some(0), ""), "{}", ended.err);
        assert!(
            ended.err.contains("scrubbed 3.0 MB in 2 blobs, in ") && ended.err.contains("all are right"),
            "{}",
            ended.err
        );
        flip(&blob(&home.root(), &[7; 3_000_000]), 17);
        let ended = home.run(&["scrub"]).await;
        assert_eq!(ended.code, Some(74), "{}", ended.err);
        let row: Vec<&str> = ended.out.lines().nth(1).expect("a finding").split_whitespace().collect();
        assert_eq!(row[..3], ["wrong", &model, "model.safetensors"], "{}", ended.out);
        assert!(ended.err.contains("code: store-corrupt"), "{}", ended.err);
        drop(daemon);
    }
}

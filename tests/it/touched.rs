//! What somebody changed on the volume is found before the next open, is never handed out, and comes again.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use larder::fault::{Code, Diagnose};
use larder::model::{Digest, ManifestFile, RelPath};
use larder::wire::http::Phase;

use crate::support::hub::{RepoFile, TestHub};
use crate::support::model_origin::ModelOrigin;
use crate::support::node::{TestNode, files_below, reference};

const WEIGHTS: &[u8] = &[7; 300_000];
const CONFIG: &[u8] = b"{\"layers\": 2}";
const WRONG: &str = "larder_proofs_total{outcome=\"wrong\"}";
const RIGHT: &str = "larder_proofs_total{outcome=\"right\"}";
const RENEWED: &str = "larder_proofs_total{outcome=\"renewed\"}";
const MENDED: &str = "larder_snapshots_mended_total";

async fn origin(models: &[&str]) -> ModelOrigin {
    let origin = ModelOrigin::start().await;
    for model in models {
        origin.put(model, "d/weights", WEIGHTS);
        origin.put(model, "config.json", CONFIG);
    }
    origin
}

/// As a writer that may do anything to what it sees, but for the times of the inode.
fn overwrite(path: &Path, bytes: &[u8]) {
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    File::options().write(true).open(path).unwrap().write_all_at(bytes, 1000).unwrap();
    fs::set_permissions(path, Permissions::from_mode(0o444)).unwrap();
}

fn unlocked(dir: &Path) -> &Path {
    fs::set_permissions(dir, Permissions::from_mode(0o755)).unwrap();
    dir
}

fn assert_whole(dir: &Path) {
    assert_eq!(fs::read(dir.join("d/weights")).unwrap(), WEIGHTS);
    assert_eq!(fs::read(dir.join("config.json")).unwrap(), CONFIG);
    assert_eq!(files_below(dir).len(), 2, "{:?}", files_below(dir));
}

fn quarantined(node: &TestNode) -> usize {
    files_below(&node.volume().join("quarantine")).len()
}

fn blob_of(node: &TestNode, bytes: &[u8]) -> PathBuf {
    let hex = Digest::of(bytes).to_hex();
    node.volume().join("blobs").join(&hex[..2]).join(hex)
}

#[tokio::test]
async fn changed_bytes_are_not_opened_and_only_they_are_fetched_again() {
    let origin = origin(&["m"]).await;
    let node = TestNode::new().start().await;
    let m = origin.reference("m");
    let dir = node.ready(&m).await;
    let sent = origin.sent_of("m", "config.json");
    overwrite(&dir.join("d/weights"), b"EVIL");

    let (code, told) = node.open(&m).await.unwrap_err();
    assert_eq!(code, Code::NotReady);
    assert!(
        told.contains("the bytes of `d/weights` on this disk were wrong or missing; it is being pulled again"),
        "{told}"
    );
    assert_eq!(node.ready(&m).await, dir);
    assert_whole(&node.open(&m).await.unwrap());
    assert_eq!((quarantined(&node), node.counted(WRONG)), (1, 1));
    assert_eq!(origin.sent_of("m", "config.json"), sent);
    assert_eq!(origin.sent_of("m", "d/weights"), 2 * WEIGHTS.len() as u64);
}

#[tokio::test]
async fn while_the_bytes_are_not_here_nothing_says_that_the_model_is() {
    let origin = origin(&["m"]).await;
    let mut node = TestNode::new().leaves_parts().start().await;
    let m = origin.reference("m");
    let dir = node.ready(&m).await;
    overwrite(&dir.join("d/weights"), b"EVIL");
    origin.hold_after(0);

    node.open(&m).await.unwrap_err();
    origin.is_waited_for().await;
    assert_eq!(node.open(&m).await.unwrap_err().0, Code::NotReady);
    assert!(!dir.exists() && node.cache().models().is_empty());
    assert_eq!(node.cache().gauges().models, 0);
    // Its name stays, and with it what is whole of it.
    node.restart(|_| {}).await;
    node.cache().resume_pending();
    assert!(node.cache().models().is_empty());
    assert!(blob_of(&node, CONFIG).exists());
    assert_eq!(node.open(&m).await.unwrap_err().0, Code::NotReady);
    origin.let_go();
    assert_eq!(node.ready(&m).await, dir);
    assert_whole(&dir);
}

#[tokio::test]
async fn a_model_that_shares_the_changed_bytes_comes_again_too() {
    let origin = origin(&["m", "n"]).await;
    origin.put("n", "more", b"another");
    let node = TestNode::new().start().await;
    let (m, n) = (origin.reference("m"), origin.reference("n"));
    let (dir, other) = (node.ready(&m).await, node.ready(&n).await);
    overwrite(&other.join("d/weights"), b"EVIL");
    node.open(&m).await.unwrap_err();
    assert!(!other.exists(), "its directory has the wrong bytes too");
    assert_eq!((node.ready(&m).await, node.ready(&n).await), (dir.clone(), other.clone()));
    assert_whole(&dir);
    assert_eq!(fs::read(other.join("d/weights")).unwrap(), WEIGHTS);
    assert_eq!(origin.sent_of("m", "d/weights") + origin.sent_of("n", "d/weights"), 2 * WEIGHTS.len() as u64);
}

#[tokio::test]
async fn an_older_version_that_lacked_the_bytes_has_them_again() {
    let origin = origin(&["m"]).await;
    let node = TestNode::new().start().await;
    let m = origin.reference("m");
    let old = node.ready(&m).await;
    origin.put("m", "config.json", b"{}");
    let new = node.ready(&m).await;
    assert_ne!(old, new);
    overwrite(&new.join("d/weights"), b"EVIL");
    node.open(&m).await.unwrap_err();
    assert!(!old.exists());
    node.ready(&m).await;
    assert_whole(&old);
    assert_eq!(node.cache().models().len(), 2);
}

#[tokio::test]
async fn a_change_is_found_after_a_restart_too() {
    let origin = origin(&["m"]).await;
    let mut node = TestNode::new().start().await;
    let m = origin.reference("m");
    let dir = node.ready(&m).await;
    node.restart(|_| overwrite(&dir.join("d/weights"), b"EVIL")).await;
    node.open(&m).await.unwrap_err();
    node.ready(&m).await;
    assert_whole(&dir);
}

#[tokio::test]
async fn what_nobody_touched_is_not_hashed_again_after_a_restart() {
    let origin = origin(&["m", "n"]).await;
    let mut node = TestNode::new().start().await;
    let (m, n) = (origin.reference("m"), origin.reference("n"));
    node.ready(&m).await;
    // Shares, and goes: links and unlinks of our own.
    node.ready(&n).await;
    node.cache().remove(&n).unwrap();
    assert_whole(&node.open(&m).await.unwrap());
    node.restart(|_| {}).await;
    assert_whole(&node.open(&m).await.unwrap());
    assert_eq!((node.counted(RIGHT), node.counted(RENEWED), node.counted(MENDED)), (0, 0, 0));
}

#[tokio::test]
async fn without_its_index_a_model_is_hashed_once() {
    let origin = origin(&["m"]).await;
    let mut node = TestNode::new().start().await;
    let m = origin.reference("m");
    let dir = node.ready(&m).await;
    let inode = fs::metadata(dir.join("d/weights")).unwrap().ino();
    node.restart(|volume| fs::remove_dir_all(volume.join("index-v1")).unwrap()).await;
    for _ in 0..2 {
        assert_whole(&node.open(&m).await.unwrap());
    }
    assert_eq!((node.counted(RIGHT), node.counted(MENDED)), (2, 0));
    assert_eq!(fs::metadata(dir.join("d/weights")).unwrap().ino(), inode);

    node.restart(|volume| {
        fs::remove_dir_all(volume.join("index-v1")).unwrap();
        overwrite(&dir.join("d/weights"), b"EVIL");
    })
    .await;
    node.open(&m).await.unwrap_err();
    node.ready(&m).await;
    assert_whole(&dir);
}

/// Killed between a link and its stamp: ctime is newer than what the index says.
#[tokio::test]
async fn what_a_kill_left_without_a_stamp_costs_a_hash_and_no_copy() {
    let origin = origin(&["m"]).await;
    let mut node = TestNode::new().start().await;
    let m = origin.reference("m");
    let dir = node.ready(&m).await;
    let inode = fs::metadata(dir.join("d/weights")).unwrap().ino();
    node.restart(|volume| {
        let scratch = volume.join("ingests/snapshot-0");
        fs::create_dir(&scratch).unwrap();
        fs::hard_link(dir.join("d/weights"), scratch.join("weights")).unwrap();
    })
    .await;
    assert_whole(&node.open(&m).await.unwrap());
    assert_eq!((node.counted(RIGHT), node.counted(MENDED)), (1, 0));
    assert_eq!(fs::metadata(dir.join("d/weights")).unwrap().ino(), inode);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_opens_of_a_changed_blob_hash_it_once() {
    let origin = origin(&["m"]).await;
    // Long enough to be hashed that the others come meanwhile.
    origin.put("m", "d/weights", &[7; 16 << 20]);
    let node = TestNode::new().leaves_parts().start().await;
    let m = origin.reference("m");
    let dir = node.ready(&m).await;
    overwrite(&dir.join("d/weights"), b"EVIL");
    origin.hold_after(0);
    let opens: Vec<_> = (0..32).map(|_| node.open(&m)).collect();
    for refused in futures::future::join_all(opens).await {
        assert_eq!(refused.unwrap_err().0, Code::NotReady);
    }
    assert_eq!((node.counted(WRONG), node.cache().gauges().pulls_active), (1, 1));
    origin.let_go();
    node.ready(&m).await;
}

#[tokio::test]
async fn without_its_source_the_model_waits_and_others_do_not() {
    let origin = origin(&["n"]).await;
    let node = TestNode::new().start().await;
    let local = node.beside_volume().join("model");
    fs::create_dir_all(local.join("d")).unwrap();
    fs::write(local.join("d/weights"), [8; 5000]).unwrap();
    let (m, n) = (format!("file://{}", local.display()), origin.reference("n"));
    let dir = node.ready(&m).await;
    node.ready(&n).await;
    overwrite(&dir.join("d/weights"), b"EVIL");
    fs::rename(&local, local.with_extension("away")).unwrap();

    assert_eq!(node.open(&m).await.unwrap_err().0, Code::NotReady);
    let told = node.refused(&reference(&m), Code::RepoNotFound).await;
    assert!(told.contains("model"), "{told}");
    assert_eq!(node.open(&m).await.unwrap_err().0, Code::NotReady);
    assert_whole(&node.open(&n).await.unwrap());
    assert_eq!(node.pull(&m).await.phase, Phase::Failed);

    fs::rename(local.with_extension("away"), &local).unwrap();
    assert_eq!(node.ready(&m).await, dir);
    assert_eq!(fs::read(node.open(&m).await.unwrap().join("d/weights")).unwrap(), [8; 5000]);
}

#[tokio::test]
async fn a_directory_that_was_changed_is_laid_out_again() {
    let origin = origin(&["m"]).await;
    let node = TestNode::new().start().await;
    let m = origin.reference("m");
    let dir = node.ready(&m).await;
    let public = node.volume().join("public");
    type Change<'a> = &'a dyn Fn(&Path);
    let changes: [Change<'_>; 9] = [
        &|dir| fs::write(unlocked(dir).join("extra.py"), "import os").unwrap(),
        &|dir| fs::create_dir(unlocked(dir).join("extra")).unwrap(),
        &|dir| fs::remove_file(unlocked(&dir.join("d")).join("weights")).unwrap(),
        &|dir| {
            fs::rename(unlocked(dir).join("config.json"), public.join("stolen")).unwrap();
            fs::write(dir.join("config.json"), "{\"layers\": 3}").unwrap();
            fs::remove_file(public.join("stolen")).unwrap();
        },
        &|dir| {
            fs::remove_file(unlocked(dir).join("config.json")).unwrap();
            symlink("/etc/passwd", dir.join("config.json")).unwrap();
        },
        &|dir| fs::set_permissions(dir.join("d"), Permissions::from_mode(0o777)).unwrap(),
        &|_| fs::rename(public.join("http"), public.join("gone")).unwrap(),
        &|_| {
            symlink("gone", public.join("http")).unwrap();
        },
        &|_| fs::set_permissions(public.join("http"), Permissions::from_mode(0o700)).unwrap(),
    ];
    for (number, change) in changes.iter().enumerate() {
        let reader = File::open(dir.join("d/weights")).unwrap();
        // The last but one makes a link in the place of what the one before it has moved.
        if number == 7 {
            fs::remove_dir_all(public.join("http")).unwrap();
        }
        change(&dir);
        assert_eq!(node.open(&m).await.unwrap(), dir, "change {number}");
        assert_whole(&dir);
        let mut bytes = vec![0; WEIGHTS.len()];
        reader.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, WEIGHTS, "who has a file open keeps it");
    }
    for (path, mode) in [("", 0o755), ("http", 0o755)] {
        assert_eq!(fs::metadata(public.join(path)).unwrap().mode() & 0o777, mode, "{path}");
    }
    assert_eq!(fs::metadata(dir.join("d")).unwrap().mode() & 0o777, 0o555);
    assert_eq!(quarantined(&node), 0);
    // What was moved elsewhere is not ours to find.
    fs::remove_dir_all(public.join("gone")).unwrap();
}

#[tokio::test]
async fn a_revision_that_leads_astray_is_written_again() {
    let hub = TestHub::start().await;
    hub.publish("acme/tiny", vec![RepoFile::new("config.json", CONFIG)]);
    let node = TestNode::new().hub(hub.endpoint()).start().await;
    let model = "hf://acme/tiny@main";
    let dir = node.ready(model).await;
    let repo = dir.parent().unwrap().parent().unwrap();
    let main = repo.join("refs/main");
    let right = fs::read(&main).unwrap();
    type Change<'a> = &'a dyn Fn();
    let changes: [Change<'_>; 4] = [
        &|| fs::write(&main, "0000000000000000000000000000000000000000").unwrap(),
        &|| fs::remove_file(&main).unwrap(),
        &|| fs::set_permissions(&main, Permissions::from_mode(0o600)).unwrap(),
        &|| {
            fs::rename(repo.join("refs"), repo.join("other")).unwrap();
            symlink("other", repo.join("refs")).unwrap();
            fs::write(repo.join("other/main"), "astray").unwrap();
        },
    ];
    for change in changes {
        change();
        node.open(model).await.unwrap();
        assert_eq!(fs::read(&main).unwrap(), right);
        assert!(fs::symlink_metadata(repo.join("refs")).unwrap().is_dir());
        assert_eq!(fs::metadata(&main).unwrap().mode() & 0o777, 0o444);
    }
    fs::remove_dir_all(repo.join("other")).unwrap();
}

/// A map that was made while the file could be written changes it later without moving ctime.
#[tokio::test]
async fn who_could_write_once_cannot_change_what_is_opened_later() {
    let origin = origin(&["m"]).await;
    let node = TestNode::new().start().await;
    let m = origin.reference("m");
    let dir = node.ready(&m).await;
    let file = dir.join("d/weights");
    fs::set_permissions(&file, Permissions::from_mode(0o644)).unwrap();
    let writer = File::options().read(true).write(true).open(&file).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o444)).unwrap();
    writer.write_all_at(&WEIGHTS[..1], 0).unwrap();
    let before = fs::metadata(&file).unwrap().ino();

    assert_whole(&node.open(&m).await.unwrap());
    assert_ne!(fs::metadata(&file).unwrap().ino(), before);
    assert_eq!((node.counted(RENEWED), node.counted(MENDED), node.counted(WRONG)), (1, 1, 0));
    writer.write_all_at(b"EVIL", 0).unwrap();
    assert_whole(&node.open(&m).await.unwrap());
}

#[tokio::test]
async fn a_descriptor_is_of_right_bytes_or_it_is_none() {
    let origin = origin(&["m"]).await;
    let node = TestNode::new().start().await;
    let m = origin.reference("m");
    let dir = node.ready(&m).await;
    let weights = ManifestFile {
        path: RelPath::new("d/weights").unwrap(),
        digest: Digest::of(WEIGHTS),
        size: WEIGHTS.len() as u64,
    };
    let bytes_of = |file: File| {
        let mut bytes = vec![0; WEIGHTS.len()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    assert_eq!(bytes_of(node.cache().descriptor(&weights).unwrap()), WEIGHTS);
    fs::set_permissions(dir.join("d/weights"), Permissions::from_mode(0o644)).unwrap();
    assert_eq!(bytes_of(node.cache().descriptor(&weights).unwrap()), WEIGHTS, "touched, and right");
    // The snapshot still links the former inode: this changes nothing of the blob.
    overwrite(&dir.join("d/weights"), b"EVIL");
    assert_eq!(bytes_of(node.cache().descriptor(&weights).unwrap()), WEIGHTS);
    node.open(&m).await.unwrap();
    overwrite(&dir.join("d/weights"), b"EVIL");
    let refused = node.cache().descriptor(&weights).unwrap_err();
    assert_eq!(refused.code(), Code::NotReady, "{refused}");
    node.ready(&m).await;
    assert_eq!(bytes_of(node.cache().descriptor(&weights).unwrap()), WEIGHTS);
}

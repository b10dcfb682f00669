//! What must be true of a volume after anything that can happen to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use futures::StreamExt;
use larder::client::Client;
use larder::model::Digest;
use larder::wire::http::{OpenRequest, Phase};
use serde_json::Value;

use super::larder::{Home, Running};
use super::models::{Files, Models};

/// What commands have said is done.
#[derive(Debug, Default, Clone)]
pub(crate) struct Promised {
    /// References whose models are here.
    pub(crate) here: BTreeSet<String>,
    /// References whose models are not here.
    pub(crate) gone: BTreeSet<String>,
    /// References that are kept.
    pub(crate) pinned: BTreeSet<String>,
    /// Holders of leases.
    pub(crate) leased: BTreeSet<String>,
    /// A model with bytes that somebody else changed: it is whole once it was opened.
    pub(crate) spoilt: Option<String>,
}

/// Names in a directory, with what is told of them.
pub(crate) type Tree = BTreeMap<PathBuf, String>;

/// Starts the daemon on the volume as it was left, and checks all of it; then starts again and checks that nothing
/// changes. `outside` is what the home looked like before. Panics with what was found.
pub(crate) async fn check(home: &Home, models: &Models, promised: &Promised, outside: &Tree) {
    let root = home.root();
    if promised.spoilt.is_none() {
        every_name_is_whole(&root, models);
    }

    let mut daemon = home.serve().await;
    let client = Client::new(&home.socket());
    if let Some(reference) = &promised.spoilt {
        home.done(&["open", "--wait", reference]).await;
    }
    let listed = settled(&client).await;
    // Who opens a model finds it as it should be: one whose files were replaced is laid out again only then.
    // Twice: what is replaced when one is opened may be a file of another one that was opened before.
    let current = || listed.iter().filter(|model| model.current);
    for model in current().chain(current()) {
        client.open(&OpenRequest::of(&model.reference)).await.unwrap();
    }
    for reference in &promised.here {
        let found = listed.iter().find(|model| model.current && model.reference == *reference);
        let found = found.unwrap_or_else(|| panic!("{reference} was promised and is not here: {}", daemon.said()));
        assert!(files_in(Path::new(&found.path)) == *models.files(reference), "{} is not the model", found.path);
    }
    for reference in &promised.gone {
        assert!(listed.iter().all(|model| model.reference != *reference), "{reference} was removed and is here");
    }
    let pins = client.pins().await.unwrap();
    for reference in &promised.pinned {
        assert!(pins.iter().any(|pin| pin.reference == *reference), "the pin of {reference} is lost");
    }
    let leases = client.leases().await.unwrap();
    for holder in &promised.leased {
        assert!(leases.iter().any(|lease| lease.holder.contains(holder.as_str())), "the lease of {holder} is lost");
    }
    let counted = metric(&daemon, "larder_blob_bytes").await;
    daemon.terminate();
    let (status, _) = daemon.ended().await;
    assert!(status.success() && !daemon.said().contains("panicked"), "{}", daemon.said());

    every_name_is_whole(&root, models);
    let blobs = files_in(&root.join("blobs"));
    let taken = |name: &String| fs::metadata(root.join("blobs").join(name)).unwrap().blocks() * 512;
    assert_eq!(counted, blobs.keys().map(taken).sum::<u64>(), "larder_blob_bytes is not the disk");
    books_agree(&root, listed.len(), &daemon);
    nothing_is_left_over(&root, &blobs);
    let quarantined = files_in(&root.join("quarantine"));
    assert!(quarantined.is_empty() || promised.spoilt.is_some(), "nobody changed {:?}", quarantined.keys());

    let before = tree_of(&root, is_ours_to_compare);
    home.done(&["list"]).await;
    assert_same(&before, &tree_of(&root, is_ours_to_compare), "the second start changed the volume");
    assert_same(outside, &outside_of(home), "something outside of the volume changed");
}

/// What is outside of the volume.
pub(crate) fn outside_of(home: &Home) -> Tree {
    tree_of(home.path(), |path| !path.starts_with("volume"))
}

/// What is named is whole, even before anything was mended: each blob, and each directory that readers see.
fn every_name_is_whole(root: &Path, models: &Models) {
    for (path, bytes) in files_in(&root.join("blobs")) {
        let name = path.rsplit('/').next().expect("it has a name");
        assert_eq!(Digest::of(&bytes).to_hex(), name, "a blob of {} bytes is not what its name says", bytes.len());
    }
    let public = root.join("public");
    for snapshot in snapshots_in(&public) {
        let files = models.laid_out_in(&public, &snapshot);
        let files = files.unwrap_or_else(|| panic!("{} is of no model", snapshot.display()));
        let found = files_in(&snapshot);
        assert!(found == *files, "{} is not whole: it has {:?}", snapshot.display(), sizes(&found));
    }
}

/// Records, manifests, snapshots and blobs name the same things, and one inode each.
fn books_agree(root: &Path, listed: usize, daemon: &Running) {
    let mut named = BTreeMap::from([("manifests", BTreeSet::new()), ("blobs", BTreeSet::new())]);
    let mut snapshots = BTreeSet::new();
    let records = files_in(&root.join("refs"));
    assert_eq!(records.len(), listed, "as many records as models: {:?}", records.keys());
    for (name, line) in records {
        let record: Value =
            serde_json::from_slice(&line).unwrap_or_else(|e| panic!("the record {name} cannot be read: {e}"));
        let manifest = record["manifest"].as_str().expect("a record names its manifest").trim_start_matches("blake3:");
        let snapshot = root.join("public").join(record["snapshot"].as_str().expect("a record names its snapshot"));
        let text =
            fs::read(root.join("manifests").join(manifest)).unwrap_or_else(|e| panic!("a manifest is lost: {e}"));
        assert_eq!(Digest::of(&text).to_hex(), manifest, "a manifest is not what its name says");
        for line in String::from_utf8(text).unwrap().lines().skip(1) {
            let (digest, path) = line.split_once(' ').expect("a line of a manifest has three words");
            let path = snapshot.join(path.split_once(' ').expect("a line of a manifest has three words").1);
            let digest = digest.trim_start_matches("blake3:");
            let blob = root.join("blobs").join(&digest[..2]).join(digest);
            let inode = |path: &Path| fs::metadata(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())).ino();
            let is_its_blob = inode(&path) == inode(&blob);
            assert!(is_its_blob, "{} is not its blob: {}", path.display(), daemon.said());
            named.entry("blobs").or_default().insert(digest.to_owned());
        }
        named.entry("manifests").or_default().insert(manifest.to_owned());
        snapshots.insert(snapshot);
    }
    assert_eq!(snapshots_in(&root.join("public")), snapshots, "snapshots that no record names, or none");
    let manifests: BTreeSet<_> = files_in(&root.join("manifests")).into_keys().collect();
    assert_eq!(manifests, named["manifests"], "manifests that no record names");
}

/// No scratch, no trash, and nothing that was pulled for nobody but what the next pull can resume.
fn nothing_is_left_over(root: &Path, blobs: &Files) {
    let ingests = files_in(&root.join("ingests"));
    let mut resumable = BTreeSet::new();
    for (name, bytes) in &ingests {
        let (id, kind) = name.rsplit_once('.').unwrap_or_else(|| panic!("ingests/{name} is left over"));
        let log = ingests.get(&format!("{id}.log")).unwrap_or_else(|| panic!("ingests/{name} has no log"));
        let log = String::from_utf8_lossy(log);
        assert!(log.starts_with("larder-ingest 1 {") && !log.contains("\"claim\":null"), "ingests/{name}: {log}");
        let done = log.lines().find_map(|line| line.strip_prefix("done "));
        match kind {
            "part" => assert!(bytes.len() < 1 << 30),
            "log" => assert!(ingests.contains_key(&format!("{id}.part")) || done.is_some(), "ingests/{name}: no part"),
            _ => panic!("ingests/{name} is left over"),
        }
        resumable.extend(done.map(str::to_owned));
    }
    let named: BTreeSet<String> = files_in(&root.join("manifests"))
        .values()
        .flat_map(|text| {
            let text = String::from_utf8_lossy(text).into_owned();
            text.lines().skip(1).map(|line| line[7..71].to_owned()).collect::<Vec<_>>()
        })
        .collect();
    for path in blobs.keys() {
        let digest = path.rsplit('/').next().expect("it has a name");
        assert!(named.contains(digest) || resumable.contains(digest), "blob {digest} is left over");
    }
    assert!(files_in(&root.join("pulls")).is_empty(), "pulls/ is not empty");
}

/// The models, once every pull that was resumed has ended.
async fn settled(client: &Client) -> Vec<larder::wire::http::ModelInfo> {
    for pull in client.pulls().await.unwrap() {
        let last = client.watch(&pull.id).await.unwrap().collect::<Vec<_>>().await.pop();
        let last = last.expect("a pull has a last state").unwrap();
        assert_eq!(last.phase, Phase::Ready, "a pull that was resumed failed: {last:?}");
    }
    client.models().await.unwrap()
}

fn snapshots_in(public: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    let mut ahead = vec![public.to_owned()];
    while let Some(dir) = ahead.pop() {
        for entry in fs::read_dir(dir).into_iter().flatten().map(Result::unwrap) {
            match entry.file_name().to_str().is_some_and(|name| name.starts_with('@')) {
                true => drop(found.insert(entry.path())),
                false => ahead.push(entry.path()),
            }
        }
    }
    found
}

/// Every file below a directory, by its path relative to it.
pub(crate) fn files_in(dir: &Path) -> Files {
    let mut found = Files::new();
    walk(dir, &mut |path, metadata| {
        if metadata.is_file() {
            let name = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
            found.insert(name, fs::read(path).unwrap());
        }
        true
    });
    found
}

/// Kind, mode, inode, size and bytes of everything that `is_wanted`, by its path relative to the directory.
fn tree_of(dir: &Path, is_wanted: impl Fn(&Path) -> bool) -> Tree {
    let mut found = Tree::new();
    walk(dir, &mut |path, metadata| {
        let name = path.strip_prefix(dir).unwrap();
        let wanted = is_wanted(name) && !metadata.file_type().is_socket();
        if wanted {
            let bytes = if metadata.is_file() { Digest::of(&fs::read(path).unwrap()).short() } else { String::new() };
            let told = format!(
                "{:o} {} {} {bytes}",
                metadata.mode(),
                metadata.ino(),
                if metadata.is_file() { metadata.len() } else { 0 }
            );
            found.insert(name.to_owned(), told);
        }
        wanted
    });
    found
}

/// sled's files change at each start, and the lock holds the id of a process.
fn is_ours_to_compare(path: &Path) -> bool {
    let first = path.components().next().map(|first| first.as_os_str().to_string_lossy().into_owned());
    !first.is_some_and(|name| name.starts_with("index-v1") || name == "lock" || name == "lost+found")
}

fn walk(dir: &Path, see: &mut dyn FnMut(&Path, &fs::Metadata) -> bool) {
    for entry in fs::read_dir(dir).into_iter().flatten().map(Result::unwrap) {
        let metadata = entry.metadata().unwrap();
        if see(&entry.path(), &metadata) && metadata.is_dir() {
            walk(&entry.path(), see);
        }
    }
}

fn assert_same(before: &Tree, after: &Tree, what: &str) {
    let changed: Vec<_> =
        before.keys().chain(after.keys()).filter(|path| before.get(*path) != after.get(*path)).collect();
    assert!(changed.is_empty(), "{what}: {changed:?}");
}

fn sizes(files: &Files) -> BTreeMap<&String, usize> {
    files.iter().map(|(path, bytes)| (path, bytes.len())).collect()
}

/// A number of `/metrics`.
async fn metric(daemon: &Running, name: &str) -> u64 {
    let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).build().unwrap();
    let answer = client.get(format!("http://{}/metrics", daemon.tcp_address())).send().await.unwrap();
    let text = answer.text().await.unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.and_then(|number| number.parse().ok()).unwrap_or_else(|| panic!("no {name} in {text}"))
}

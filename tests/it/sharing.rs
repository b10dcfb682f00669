//! Readers share the volume's bytes, in memory and on disk, and a daemon that dies takes nothing from them.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use aws_lc_rs::digest::{SHA256, digest};
use larder::client::Opener;
use larder::model::Digest;
use serde_json::Value;

use super::support::larder::Home;
use super::support::model_origin::ModelOrigin;
use super::support::node::{files_below, reference};
use super::support::skip::skipped;

/// How often the daemon is killed under its readers.
const KILLS: usize = 20;

fn files() -> BTreeMap<String, Vec<u8>> {
    let bytes = |seed: &str, length: usize| {
        let mut bytes = vec![0; length];
        blake3::Hasher::new().update(seed.as_bytes()).finalize_xof().fill(&mut bytes);
        bytes
    };
    let shards = (0..3).map(|n| (format!("model-{n}.safetensors"), bytes(&n.to_string(), 4 << 20)));
    shards.chain([("config.json".to_owned(), b"{}".to_vec())]).collect()
}

async fn origin() -> (ModelOrigin, String) {
    let origin = ModelOrigin::start().await;
    for (path, bytes) in files() {
        origin.put("m", &path, &bytes);
    }
    let reference = origin.reference("m");
    (origin, reference)
}

/// A reader in mount and process namespaces of its own.
struct Reader {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Reader {
    /// `None`, after saying why, if there can be none here.
    fn start(prepare: &str, words: &[&str]) -> Option<Reader> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/reader.py");
        let run = format!("{prepare} exec python3 \"$0\" \"$@\"");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--mount-proc", "--kill-child", "sh", "-ec", &run])
            .arg(script)
            .args(words);
        let spawned = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
        let mut child = match spawned {
            Ok(child) => child,
            Err(e) => {
                skipped(&format!("unshare: {e}"));
                return None;
            }
        };
        let (ask, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        let mut reader = Reader { child, ask, answers };
        match reader.asked("namespaces") {
            Some(_) => Some(reader),
            None => {
                let mut said = String::new();
                std::io::Read::read_to_string(&mut reader.child.stderr.take().unwrap(), &mut said).unwrap();
                // Without the right to make namespaces, or without python.
                let cannot = ["unshare", "python3", "mount"].iter().any(|program| said.contains(program));
                assert!(cannot && !said.contains("Traceback"), "{said}");
                skipped(said.trim());
                None
            }
        }
    }

    fn asked(&mut self, word: &str) -> Option<Value> {
        writeln!(self.ask, "{word}").ok()?;
        let mut line = String::new();
        self.answers.read_line(&mut line).ok().filter(|read| *read > 0)?;
        Some(serde_json::from_str(&line).unwrap())
    }

    fn tell(&mut self, word: &str) -> Value {
        self.asked(word).unwrap_or_else(|| panic!("the reader is gone"))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Blocks of the disk that a directory takes, each inode once.
fn blocks(dir: &Path) -> u64 {
    let inodes: BTreeMap<u64, u64> = files_below(dir)
        .iter()
        .map(|path| fs::symlink_metadata(path).unwrap())
        .map(|found| (found.ino(), found.blocks()))
        .collect();
    inodes.values().sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_in_other_namespaces_share_one_copy_in_memory_and_on_disk() {
    let (_origin, model) = origin().await;
    let home = Home::new();
    let _daemon = home.serve().await;
    let path = home.done(&["pull", &model]).await;
    let below = Path::new(path.trim()).strip_prefix(home.public()).unwrap();
    let before = (blocks(&home.root().join("blobs")), blocks(&home.public()));

    // As a pod sees it: the public tree, mounted read-only somewhere else.
    let mount = home.path().join("seen");
    fs::create_dir(&mount).unwrap();
    let (public, seen) = (home.public().display().to_string(), mount.display().to_string());
    let prepare = format!("mount --bind '{public}' '{seen}'; mount -o remount,bind,ro '{seen}';");
    let Some(by_directory) = Reader::start(&prepare, &["directory", mount.join(below).to_str().unwrap()]) else {
        return;
    };
    let socket = home.pod_socket();
    let Some(by_socket) = Reader::start("", &["socket", socket.to_str().unwrap(), &model]) else { return };
    let mut readers = [by_directory, by_socket];

    let spaces = readers.each_mut().map(|reader| reader.tell("namespaces"));
    assert!(spaces[0]["mnt"] != spaces[1]["mnt"] && spaces[0]["pid"] != spaces[1]["pid"], "{spaces:?}");
    let expected: BTreeMap<String, String> =
        files().iter().map(|(path, bytes)| (path.clone(), hex::encode(digest(&SHA256, bytes)))).collect();
    for reader in &mut readers {
        assert_eq!(reader.tell("hash"), serde_json::to_value(&expected).unwrap());
    }
    let memory = readers.each_mut().map(|reader| reader.tell("memory"));
    let sum = |name: &str| memory.iter().map(|found| found[name].as_u64().unwrap()).sum::<u64>();
    let pages = |bytes: u64| bytes.next_multiple_of(4096);
    let whole: u64 = files().values().map(|bytes| pages(bytes.len() as u64)).sum();
    // Each page is counted in parts by those who map it: together once, though each has all of it.
    let (pss, rss) = (sum("Pss"), sum("Rss"));
    assert_eq!(rss, 2 * whole, "{memory:?}");
    assert!(pss.abs_diff(whole) < whole / 100, "{pss} of {whole} bytes: {memory:?}");
    assert_eq!(sum("Private_Dirty"), 0);

    drop(readers);
    assert_eq!((blocks(&home.root().join("blobs")), blocks(&home.public())), before, "something was copied");
}

/// Reads without an end, and counts.
fn read_until(stop: &Arc<AtomicBool>, mut round: impl FnMut() + Send + 'static) -> std::thread::JoinHandle<u64> {
    let stop = stop.clone();
    std::thread::spawn(move || {
        let mut rounds = 0;
        while !stop.load(Ordering::Relaxed) {
            round();
            rounds += 1;
        }
        rounds
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_kills_of_the_daemon_are_noticed_by_no_reader() {
    let (_origin, model) = origin().await;
    let home = Home::new();
    let mut daemon = home.serve().await;
    let path = PathBuf::from(home.done(&["pull", &model]).await.trim());
    home.done(&["pin", &model]).await;
    home.done(&["open", "--lease-for", "ci", &model]).await;
    let digests: BTreeMap<String, Digest> = files().iter().map(|(path, b)| (path.clone(), Digest::of(b))).collect();
    let opener = Opener::new(&home.pod_socket()).patience(Duration::from_secs(120));
    let wanted = reference(&model);

    let stop = Arc::new(AtomicBool::new(false));
    let held = opener.clone().open_blocking(&wanted);
    let held = tokio::task::block_in_place(|| held).unwrap();
    let (expected, directory) = (digests.clone(), path.clone());
    let walks = read_until(&stop, move || {
        let mut names: Vec<_> = fs::read_dir(&directory).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names.len(), expected.len());
        for (name, digest) in &expected {
            assert_eq!(Digest::of(&fs::read(directory.join(name)).unwrap()), *digest, "{name}");
        }
    });
    let expected = digests.clone();
    let maps = read_until(&stop, move || {
        for (name, digest) in &expected {
            assert_eq!(Digest::of(&held.mmap(name).unwrap()), *digest, "{name}");
        }
    });
    let opened = Arc::new(AtomicU64::new(0));
    let (count, expected) = (opened.clone(), digests["config.json"]);
    let opens = read_until(&stop, move || {
        let model = opener.open_blocking(&wanted).unwrap_or_else(|problem| panic!("{problem}"));
        assert_eq!(Digest::of(&model.mmap("config.json").unwrap()), expected);
        count.fetch_add(1, Ordering::Relaxed);
    });

    for _ in 0..KILLS {
        let before = opened.load(Ordering::Relaxed);
        daemon.kill().await;
        daemon = home.serve().await;
        // Not before somebody has come through the new one.
        while opened.load(Ordering::Relaxed) < before + 2 {
            tokio::task::yield_now().await;
        }
    }
    stop.store(true, Ordering::Relaxed);
    for (what, reader) in [("walks", walks), ("maps", maps), ("opens", opens)] {
        let rounds = tokio::task::block_in_place(|| reader.join()).unwrap_or_else(|_| panic!("{what} met an error"));
        assert!(rounds > 0, "no {what}");
    }
    assert_eq!(home.done(&["pins"]).await.lines().count(), 2);
    assert!(home.done(&["leases"]).await.contains(" name  ci "), "{}", home.done(&["leases"]).await);
}

//! Real things from end to end: real servers and a real model, a daemon in a process of its own, and the clients that
//! people load models with.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use larder::source::Environment;
use serde_json::Value;
use tempfile::TempDir;

use super::support::azurite::{self, Azurite};
use super::support::fake_gcs::FakeGcs;
use super::support::hub::{RepoFile, TestHub};
use super::support::moto::Moto;
use super::support::real_client::{
    assert_real_client_loads, assert_real_client_reads, can_load, python, real_model, run,
};
use super::support::server_process::ServerProcess;
use super::support::source_contract::FILES;

/// The user that owns nothing.
const NOBODY: u32 = 65_534;

/// What a directory holds, as its readers see it: token ids, and the shape and digest of every tensor.
const LOAD: &str = r#"
import hashlib, json, sys
from safetensors.numpy import load_file
from tokenizers import Tokenizer

ids = Tokenizer.from_file(sys.argv[1] + "/tokenizer.json").encode("A model is local once.").ids
tensors = sorted(load_file(sys.argv[1] + "/model.safetensors").items())
print(json.dumps([ids, {name: [t.shape, hashlib.sha256(t.tobytes()).hexdigest()] for name, t in tensors}]))
"#;

/// What transformers makes of a repository whose weights are not there.
const TOKENIZE: &str = r#"
import json, sys
from transformers import AutoConfig, AutoTokenizer

print(json.dumps([AutoConfig.from_pretrained(sys.argv[1]).model_type, AutoTokenizer.from_pretrained(sys.argv[1])("A model is local once.")["input_ids"]]))
"#;

const CACHE_LS: &str = "import sys; from huggingface_hub.cli.hf import main; sys.argv[0] = 'hf'; main()";

/// A daemon with a volume, and the commands that ask it. Only the daemon knows the variables of the sources.
struct Node {
    _daemon: ServerProcess,
    program: PathBuf,
    user: Option<u32>,
    dir: TempDir,
}

impl Node {
    fn start(environment: &Environment) -> Node {
        Node::start_as(None, Path::new(env!("CARGO_BIN_EXE_larder")), tempfile::tempdir().unwrap(), environment)
    }

    fn start_as(user: Option<u32>, program: &Path, dir: TempDir, environment: &Environment) -> Node {
        // It logs to standard error; the shell turns that round and is replaced by it.
        let mut command = Node::command("sh".as_ref(), user, dir.path());
        command.args(["-c", "exec \"$0\" serve 2>&1"]).arg(program).envs(environment.iter());
        let started = ServerProcess::start(command, |line| line.contains("ready").then_some(()));
        let (daemon, ()) = started.expect("the daemon starts");
        Node { _daemon: daemon, program: program.to_owned(), user, dir }
    }

    fn command(program: &Path, user: Option<u32>, dir: &Path) -> Command {
        let mut command = Command::new(program);
        command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).env("HOME", dir);
        command.env("LARDER_ROOT", dir.join("volume")).env("LARDER_SOCKET", dir.join("larder.sock"));
        command.env("LARDER_SERVE_LISTEN", "off").env("LARDER_VOLUME_MIN_FREE", "0").stdin(Stdio::null());
        if let Some(user) = user {
            command.uid(user).gid(user);
        }
        command
    }

    /// Runs a command of the program, and gives its standard output.
    fn larder(&self, words: &[&str]) -> String {
        let mut command = Node::command(&self.program, self.user, self.dir.path());
        run(command.args(words)).unwrap_or_else(|error| panic!("larder {words:?}: {error}"))
    }

    /// Pulls, and gives the directory that was printed.
    fn pull(&self, words: &[&str]) -> PathBuf {
        let printed = self.larder(&[&["pull", "--quiet"], words].concat());
        PathBuf::from(printed.strip_suffix('\n').expect("one line"))
    }

    fn public(&self, below: &str) -> PathBuf {
        self.dir.path().join("volume/public").join(below)
    }
}

impl Drop for Node {
    /// Only root can remove what is in a read-only directory.
    fn drop(&mut self) {
        for dir in all_below(self.dir.path()).iter().filter(|path| path.is_dir()) {
            let _gone = fs::set_permissions(dir, fs::Permissions::from_mode(0o755));
        }
    }
}

/// Every path below; a directory comes before what is in it.
fn all_below(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        all.push(entry.path());
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            all.extend(all_below(&entry.path()));
        }
    }
    all
}

/// Every file below, by its path.
fn files_of(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = all_below(dir).into_iter().filter(|path| !path.is_dir());
    files.map(|path| (path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned(), fs::read(path).unwrap())).collect()
}

/// The same names, and the same bytes under each.
fn assert_same(dir: &Path, expected: &BTreeMap<String, Vec<u8>>) {
    let found = files_of(dir);
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (path, bytes) in expected {
        assert!(&found[path] == bytes, "{path} differs");
    }
}

/// What a Python program prints, as JSON. It sees the volume as its Hub cache, offline.
fn printed_by(program: &str, hub: &Path, words: &[&str]) -> Value {
    let home = tempfile::tempdir().unwrap();
    let mut command = python().expect("whoever asks has seen that it is there");
    command.env("HOME", home.path()).env("HF_HUB_CACHE", hub).env("HF_HUB_OFFLINE", "1");
    let printed = run(command.arg("-c").arg(program).args(words)).unwrap_or_else(|e| panic!("{words:?}: {e}"));
    serde_json::from_str(printed.lines().last().unwrap_or_default()).unwrap_or_else(|e| panic!("{e}: {printed}"))
}

fn environment_of(hub: &TestHub) -> Environment {
    [("HF_ENDPOINT", hub.endpoint())].into_iter().collect()
}

fn repo_files(files: &BTreeMap<String, Vec<u8>>) -> Vec<RepoFile> {
    files.iter().map(|(path, bytes)| RepoFile::new(path, bytes.clone())).collect()
}

fn names(files: &BTreeMap<String, Vec<u8>>) -> Vec<&str> {
    files.keys().map(String::as_str).collect()
}

/// A model whose weights take several requests.
fn made_up_model() -> BTreeMap<String, Vec<u8>> {
    let mut files: BTreeMap<_, _> = FILES.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec())).collect();
    let mut weights = vec![0; 24 << 20];
    blake3::Hasher::new().finalize_xof().fill(&mut weights);
    files.insert("model.safetensors".into(), weights);
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_model_in_s3_arrives_byte_for_byte_and_loads() {
    let Some(model) = real_model() else { return };
    let Some(moto) = Moto::start() else { return };
    if !can_load() {
        return;
    }
    let files = files_of(&model);
    moto.make_bucket("bucket").await;
    for (path, bytes) in &files {
        moto.put("bucket", &format!("models/minilm/{path}"), bytes).await;
    }
    moto.put("bucket", "models/minilm-hf/config.json", b"the neighbour's").await;

    let node = Node::start(&moto.environment(&moto.endpoint));
    let path = node.pull(&["s3://bucket/models/minilm"]);
    assert!(path.starts_with(node.public("s3/bucket/models/minilm")), "{}", path.display());
    assert_same(&path, &files);
    let loaded = |dir: &Path| printed_by(LOAD, &node.public("hub"), &[dir.to_str().unwrap()]);
    assert_eq!(loaded(&path), loaded(&model));
    assert_eq!(node.larder(&["open", "s3://bucket/models/minilm"]), format!("{}\n", path.display()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hubs_own_clients_load_a_real_model_and_follow_it_when_main_moves() {
    let Some(model) = real_model() else { return };
    let mut files = files_of(&model);
    let hub = TestHub::start().await;
    let first = hub.publish("acme/minilm", repo_files(&files));
    let node = Node::start(&environment_of(&hub));
    let cache = node.public("hub");

    let path = node.pull(&["hf://acme/minilm"]);
    assert_same(&path, &files);
    let Some(seen) = assert_real_client_loads(&cache, "acme/minilm", &names(&files)) else { return };
    assert_eq!(seen["snapshot"], path.to_str().unwrap());
    assert!(path.ends_with(&first), "{}", path.display());
    assert_eq!(seen["model_type"], "bert", "{seen:#}");
    let listed = printed_by(CACHE_LS, &cache, &["cache", "ls", "--format", "json"]);
    assert!(listed.to_string().contains("acme/minilm"), "{listed:#}");

    let weights = RepoFile::new("model.safetensors", files["model.safetensors"].clone()).sha256();
    let sent = hub.bytes_sent(&weights);
    let old = files.clone();
    files.get_mut("config.json").unwrap().push(b'\n');
    files.remove("README.md");
    let second = hub.publish("acme/minilm", repo_files(&files));
    let moved = node.pull(&["hf://acme/minilm"]);
    assert!(moved.ends_with(&second), "{}", moved.display());
    assert_same(&moved, &files);
    assert_eq!(hub.bytes_sent(&weights), sent, "weights that are here are not fetched again");
    let seen = assert_real_client_loads(&cache, "acme/minilm", &names(&files)).unwrap();
    assert_eq!(seen["snapshot"], moved.to_str().unwrap());

    const BY_COMMIT: &str = "import sys, json; from huggingface_hub import snapshot_download; \
                             print(json.dumps(snapshot_download(sys.argv[1], revision=sys.argv[2])))";
    assert_eq!(printed_by(BY_COMMIT, &cache, &["acme/minilm", &first]), path.to_str().unwrap());
    assert_same(&path, &old);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_selection_without_weights_is_enough_for_tokenizer_and_config() {
    let Some(model) = real_model() else { return };
    if !can_load() {
        return;
    }
    let files = files_of(&model);
    let hub = TestHub::start().await;
    hub.publish("acme/minilm", repo_files(&files));
    let node = Node::start(&environment_of(&hub));
    let cache = node.public("hub");

    let selected: BTreeMap<_, _> = files.clone().into_iter().filter(|(path, _)| path.ends_with(".json")).collect();
    let path = node.pull(&["hf://acme/minilm", "--include", "*.json"]);
    assert_same(&path, &selected);
    let seen = assert_real_client_reads(&cache, "acme/minilm", &names(&selected)).unwrap();
    assert_eq!(seen["snapshot"], path.to_str().unwrap());
    let tokenized = printed_by(TOKENIZE, &cache, &["acme/minilm"]);
    assert_eq!(tokenized[0], "bert");
    assert_eq!(tokenized, printed_by(TOKENIZE, &cache, &[model.to_str().unwrap()]));

    // The whole of it beside its part: the name now means the whole.
    let whole = node.pull(&["hf://acme/minilm"]);
    assert_same(&whole, &files);
    let seen = assert_real_client_loads(&cache, "acme/minilm", &names(&files)).unwrap();
    assert_eq!(seen["snapshot"], whole.to_str().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_in_azure_arrives_byte_for_byte() {
    let Some(azurite) = Azurite::start() else { return };
    let files = made_up_model();
    azurite.make_container("models", false).await;
    for (path, bytes) in &files {
        azurite.put("models", &format!("org/model/{path}"), bytes).await;
    }
    let node = Node::start(&azurite.environment(&azurite.endpoint, azurite::KEY));
    assert_same(&node.pull(&["az://models/org/model"]), &files);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_in_google_cloud_storage_arrives_byte_for_byte() {
    let Some(server) = FakeGcs::start() else { return };
    let files = made_up_model();
    server.make_bucket("models").await;
    for (path, bytes) in &files {
        server.put("models", &format!("org/model/{path}"), bytes).await;
    }
    let node = Node::start(&[("STORAGE_EMULATOR_HOST", server.endpoint.as_str())].into_iter().collect());
    assert_same(&node.pull(&["gs://models/org/model"]), &files);
}

/// Only root may write into the read-only directories of snapshots, so root would not notice what others cannot do.
#[test]
fn an_ordinary_user_pulls_lists_mends_and_removes() {
    let user = rustix::process::geteuid().is_root().then_some(NOBODY);
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("larder");
    fs::copy(env!("CARGO_BIN_EXE_larder"), &program).unwrap();
    if user.is_some() {
        chown(dir.path(), user, user).unwrap();
    }
    let origin = dir.path().join("origin");
    fs::create_dir_all(origin.join("weights")).unwrap();
    fs::write(origin.join("config.json"), "one").unwrap();
    fs::write(origin.join("weights/a.bin"), "bytes").unwrap();
    let node = Node::start_as(user, &program, dir, &Environment::default());
    let reference = format!("file://{}", origin.display());

    let first = node.pull(&[&reference]);
    let found = fs::metadata(&first).unwrap();
    assert_eq!(found.mode() & 0o777, 0o555);
    assert!(user.is_none_or(|user| found.uid() == user), "the daemon is not the user it should be");
    assert_same(&first, &files_of(&origin));
    assert!(node.larder(&["list"]).contains(&reference));

    fs::write(origin.join("config.json"), "the second").unwrap();
    let second = node.pull(&[&reference]);
    assert_ne!(first, second);
    assert_same(&second, &files_of(&origin));

    // Somebody damages the directory; the next pull puts a whole one in its place.
    fs::set_permissions(&second, fs::Permissions::from_mode(0o755)).unwrap();
    fs::remove_file(second.join("config.json")).unwrap();
    fs::set_permissions(&second, fs::Permissions::from_mode(0o555)).unwrap();
    assert_eq!(node.pull(&[&reference]), second);
    assert_same(&second, &files_of(&origin));

    node.larder(&["remove", &reference]);
    assert_eq!(all_below(&node.public("")), Vec::<PathBuf>::new());
    for left in ["blobs", "ingests"] {
        let left = files_of(&node.dir.path().join("volume").join(left));
        assert!(left.is_empty(), "{:?}", left.keys());
    }
}

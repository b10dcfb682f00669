//! The test Hub is held to the real `huggingface_hub` package: what that accepts, finds and refuses here must be what it
//! accepts, finds and refuses at the Hub. Then a test against the test Hub is a test of the protocol.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::support::hub::{RepoFile, TestHub};
use crate::support::real_client::{assert_real_client_loads, assert_real_client_reads, python, real_model, run};

const TOKEN: &str = "hf_OnlyForTests";
/// Asks for everything, and gives the names of the exceptions where the real Hub makes the package raise them.
const CLIENT: &str = r#"
import json, os, sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, get_hf_file_metadata, hf_hub_url
from huggingface_hub.utils import HfHubHTTPError
from huggingface_hub.errors import LocalEntryNotFoundError
api, cache = HfApi(), os.environ["HF_HUB_CACHE"]

def raised(call):
    try:
        call()
    except LocalEntryNotFoundError as error:
        return type(error.__cause__).__name__
    except HfHubHTTPError as error:
        return f"{type(error).__name__} {error.response.status_code}"
    except Exception as error:
        return type(error).__name__

def content(path):
    with open(path, "rb") as file:
        return len(file.read())

snapshot = snapshot_download("acme/tiny")
info = api.model_info("acme/tiny")
tree = list(api.list_repo_tree("acme/tiny", recursive=True))
refs = api.list_repo_refs("acme/tiny")
meta = get_hf_file_metadata(hf_hub_url("acme/tiny", "model.safetensors"))
small = get_hf_file_metadata(hf_hub_url("acme/tiny", "config.json"))
print(json.dumps({
    "snapshot": os.path.basename(snapshot),
    "sizes": {name: content(os.path.join(snapshot, name)) for name in ["config.json", "model.safetensors"]},
    "nested": content(os.path.join(snapshot, "sub/dir/a b+c#.json")),
    "legacy": content(hf_hub_download("gpt2", "config.json")),
    "renamed": content(hf_hub_download("acme/old", "config.json")),
    "sha": info.sha, "siblings": len(info.siblings), "gated": info.gated,
    "expanded": api.model_info("acme/tiny", expand=["sha"]).sha,
    "lfs": {f.path: f.lfs.sha256 for f in tree if getattr(f, "lfs", None)},
    "blobs": {f.path: f.blob_id for f in tree if getattr(f, "blob_id", None) and not f.lfs},
    "directories": sorted(f.path for f in tree if not hasattr(f, "blob_id")),
    "many": sum(1 for _ in api.list_repo_tree("acme/many", recursive=True)),
    "below": [f.path for f in api.list_repo_tree("acme/tiny", "sub/dir", recursive=True)],
    "branches": [b.name for b in refs.branches], "tags": [t.name for t in refs.tags],
    "etag": meta.etag, "size": meta.size, "commit": meta.commit_hash, "elsewhere": "Signature" in meta.location,
    "small": [small.etag, small.size, small.commit_hash],
    "whoami": api.whoami(token=os.environ["GOOD"])["name"],
    "raised": {
        "missing": raised(lambda: api.model_info("acme/absent")),
        "missing with token": raised(lambda: api.model_info("acme/absent", token=os.environ["GOOD"])),
        "private": raised(lambda: api.model_info("acme/private")),
        "bad token": raised(lambda: api.model_info("acme/tiny", token="hf_bad")),
        "bad whoami": raised(lambda: api.whoami(token="hf_bad")),
        "revision": raised(lambda: api.model_info("acme/tiny", revision="v9")),
        "entry": raised(lambda: hf_hub_download("acme/tiny", "absent.json")),
        "tree": raised(lambda: list(api.list_repo_tree("acme/tiny", "absent"))),
        "gated info": raised(lambda: api.model_info("acme/gated")),
        "gated tree": raised(lambda: list(api.list_repo_tree("acme/gated"))),
        "gated file": raised(lambda: hf_hub_download("acme/gated", "config.json")),
        "gated file with token": raised(lambda: hf_hub_download("acme/gated", "config.json", token=os.environ["GOOD"])),
        "gated check": raised(lambda: api.auth_check("acme/gated", token=os.environ["GOOD"])),
        "granted check": raised(lambda: api.auth_check("acme/gated", token=os.environ["GRANTED"])),
        "granted": raised(lambda: hf_hub_download("acme/gated", "model.safetensors", token=os.environ["GRANTED"])),
    },
}))
"#;

#[tokio::test(flavor = "multi_thread")]
async fn the_real_client_finds_here_what_it_finds_at_the_hub() {
    let Some(mut client) = python() else { return };
    let hub = TestHub::start().await;
    let weights: Vec<u8> = (0..200_000u32).map(|i| i as u8).collect();
    let files = vec![
        RepoFile::new(".gitattributes", "*.safetensors filter=lfs"),
        RepoFile::new("config.json", "{\"model_type\": \"bert\"}"),
        RepoFile::new("empty", ""),
        RepoFile::new("model.safetensors", weights),
        RepoFile::new("sub/dir/a b+c#.json", "{}"),
    ];
    let commit = hub.publish("acme/tiny", files.clone());
    hub.tag("acme/tiny", "v1", &commit);
    for repo in ["gpt2", "acme/old", "acme/gated", "acme/private"] {
        hub.publish(repo, files.clone());
    }
    hub.publish("acme/many", (0..2500).map(|i| RepoFile::new(&format!("{i}.json"), format!("{i}"))).collect());
    hub.rename("acme/old", "acme/new");
    hub.gate("acme/gated");
    hub.make_private("acme/private");
    hub.allow(TOKEN);
    hub.grant("hf_Granted", "acme/gated");

    let cache = tempfile::tempdir().unwrap();
    client
        .env("HF_ENDPOINT", hub.endpoint())
        .env("HF_HOME", cache.path())
        .env("HF_HUB_CACHE", cache.path().join("hub"))
        .env("GOOD", TOKEN)
        .env("GRANTED", "hf_Granted")
        .args(["-c", CLIENT]);
    let printed = tokio::task::spawn_blocking(move || run(&mut client)).await.unwrap();
    let printed = printed.unwrap_or_else(|e| panic!("the client failed: {e}"));
    let mut found: Value = serde_json::from_str(printed.lines().last().unwrap_or_default()).unwrap();
    let raised = found.as_object_mut().unwrap().remove("raised").unwrap();

    let (lfs, small): (Vec<_>, Vec<_>) = files.iter().partition(|f| f.lfs);
    let by = |files: &[&RepoFile], id: fn(&RepoFile) -> String| -> Value {
        files.iter().map(|f| (f.path.clone(), Value::String(id(f)))).collect::<serde_json::Map<_, _>>().into()
    };
    let expected = json!({
        "snapshot": commit,
        "sizes": {"config.json": 22, "model.safetensors": 200_000},
        "nested": 2,
        "legacy": 22,
        "renamed": 22,
        "sha": commit, "siblings": 5, "gated": false,
        "expanded": commit,
        "lfs": by(&lfs, RepoFile::sha256),
        "blobs": by(&small, RepoFile::git_sha1),
        "directories": ["sub", "sub/dir"],
        "many": 2500,
        "below": ["sub/dir/a b+c#.json"],
        "branches": ["main"], "tags": ["v1"],
        "etag": lfs[0].sha256(), "size": 200_000, "commit": commit, "elsewhere": true,
        "small": [files[1].git_sha1(), 22, commit],
        "whoami": "tester",
    });
    assert_eq!(found, expected);
    // Over https the package calls every 401 of an unknown repository RepositoryNotFoundError; over http it does not.
    let expected = json!({
        "missing": "HfHubHTTPError 401",
        "missing with token": "RepositoryNotFoundError 404",
        "private": "HfHubHTTPError 401",
        "bad token": "HfHubHTTPError 401",
        "bad whoami": "HfHubHTTPError 401",
        "revision": "RevisionNotFoundError 404",
        "entry": "RemoteEntryNotFoundError 404",
        "tree": "RemoteEntryNotFoundError 404",
        "gated info": null,
        "gated tree": null,
        "gated file": "GatedRepoError 401",
        "gated file with token": "GatedRepoError 403",
        "gated check": "GatedRepoError 403",
        "granted check": null,
        "granted": null,
    });
    assert_eq!(raised, expected);
    assert!(hub.cdn_requests().iter().all(|seen| !seen.headers.contains_key("authorization")));
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Lays out a hub directory as snapshots do, in the smallest form: real files, no `blobs/`, a ref without a line end.
fn lay_out(hub_dir: &Path, repo: &str, files: &[(&str, Vec<u8>)]) {
    let model = hub_dir.join(format!("models--{}", repo.replace('/', "--")));
    for (name, bytes) in files {
        let path = model.join("snapshots").join(COMMIT).join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), COMMIT).unwrap();
}

/// Everything below gets the mode, or is made writable again so that it can be removed.
fn set_read_only(path: &Path, read_only: bool) {
    let is_dir = path.is_dir();
    if is_dir && !read_only {
        std::fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    if is_dir {
        for entry in std::fs::read_dir(path).unwrap() {
            set_read_only(&entry.unwrap().path(), read_only);
        }
    }
    if read_only {
        std::fs::set_permissions(path, Permissions::from_mode(if is_dir { 0o555 } else { 0o444 })).unwrap();
    }
}

#[test]
fn the_real_client_reads_a_cache_of_real_files_in_read_only_directories() {
    let root = tempfile::tempdir().unwrap();
    let files = ["config.json", "1_Pooling/config.json"];
    lay_out(root.path(), "acme/tiny", &files.map(|name| (name, b"{}".to_vec())));
    set_read_only(root.path(), true);
    let report = assert_real_client_reads(root.path(), "acme/tiny", &files);
    set_read_only(root.path(), false);
    if let Some(report) = report {
        assert_eq!(report["refs"], json!(["main"]));
    }
}

#[test]
fn the_real_client_loads_a_real_model_from_a_cache_of_real_files() {
    let Some(model) = real_model() else { return };
    let root = tempfile::tempdir().unwrap();
    let files = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"];
    lay_out(root.path(), "acme/minilm", &files.map(|name| (name, std::fs::read(model.join(name)).unwrap())));
    set_read_only(root.path(), true);
    let report = assert_real_client_loads(root.path(), "acme/minilm", &files);
    set_read_only(root.path(), false);
    if let Some(report) = report {
        assert_eq!(report["tensors"]["embeddings.word_embeddings.weight"], json!([30522, 384]));
    }
}

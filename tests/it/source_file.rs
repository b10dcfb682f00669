//! `file://` sources.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use larder::fault::{Code, Diagnose};
use larder::model::ModelRef;
use larder::source::Environment;

use crate::support::source_contract::{FILES, Origin, collect, fetch_whole, holds, open};

struct LocalOrigin {
    dir: tempfile::TempDir,
}

impl LocalOrigin {
    fn start() -> LocalOrigin {
        let dir = tempfile::tempdir().unwrap();
        let origin = LocalOrigin { dir };
        for (path, bytes) in FILES {
            let path = origin.model().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        origin
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }
}

fn reference(path: &Path) -> ModelRef {
    format!("file://{}", path.display()).parse().unwrap()
}

#[async_trait]
impl Origin for LocalOrigin {
    fn environment(&self) -> Environment {
        Environment::default()
    }

    fn reference(&self) -> ModelRef {
        reference(&self.model())
    }

    fn missing(&self) -> ModelRef {
        reference(&self.dir.path().join("no-such-model"))
    }

    async fn put(&self, path: &str, bytes: &[u8]) {
        fs::write(self.model().join(path), bytes).unwrap();
    }

    async fn deny(&self, denied: bool) -> bool {
        let mode = if denied { 0o000 } else { 0o755 };
        fs::set_permissions(self.model(), fs::Permissions::from_mode(mode)).unwrap();
        // Permissions do not bind root.
        let bound = !denied || fs::read_dir(self.model()).is_err();
        if !bound {
            fs::set_permissions(self.model(), fs::Permissions::from_mode(0o755)).unwrap();
        }
        bound
    }

    async fn break_next_body_after(&self, _: u64) -> bool {
        false
    }
}

#[tokio::test]
async fn a_directory_keeps_the_contract() {
    holds(&LocalOrigin::start()).await;
}

#[tokio::test]
async fn a_cache_of_the_hub_is_read_through_its_links() {
    let origin = LocalOrigin::start();
    let snapshot = origin.dir.path().join("snapshot");
    fs::create_dir(&snapshot).unwrap();
    symlink("../model/config.json", snapshot.join("config.json")).unwrap();
    let source = open(&origin, &reference(&snapshot));
    let listing = source.resolve().await.unwrap();
    assert_eq!(fetch_whole(&source, &listing.files()[0]).await.unwrap(), FILES[0].1);
}

#[tokio::test]
async fn a_link_that_leads_back_up_is_refused() {
    let origin = LocalOrigin::start();
    symlink("..", origin.model().join("weights/up")).unwrap();
    let error = open(&origin, &origin.reference()).resolve().await.unwrap_err();
    assert!(error.to_string().contains("symbolic link"), "{error}");
}

#[tokio::test]
async fn a_fifo_is_refused_without_waiting_for_its_other_end() {
    let origin = LocalOrigin::start();
    let fifo = origin.model().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status();
    if !made.is_ok_and(|status| status.success()) {
        super::support::skip::skipped("mkfifo is not there");
        return;
    }
    let error = open(&origin, &origin.reference()).resolve().await.unwrap_err();
    assert!(error.to_string().contains("neither a file nor a directory"), "{error}");

    // Also when it takes the place of a listed file.
    fs::remove_file(&fifo).unwrap();
    let source = open(&origin, &origin.reference());
    let listing = source.resolve().await.unwrap();
    let config = origin.model().join("config.json");
    fs::remove_file(&config).unwrap();
    assert!(std::process::Command::new("mkfifo").arg(&config).status().unwrap().success());
    let error = source.fetch(&listing.files()[0], 0..1).await.err().expect("a FIFO is not the file that was listed");
    assert_eq!(error.code(), Code::SourceChanged, "{error}");
}

#[tokio::test]
async fn a_file_that_changes_while_it_is_read_is_noticed() {
    let origin = LocalOrigin::start();
    let large = vec![1; 3 << 20];
    origin.put("large", &large).await;
    let source = open(&origin, &origin.reference());
    let listing = source.resolve().await.unwrap();
    let file = crate::support::source_contract::file(&listing, "large");
    let mut reader = source.fetch(file, 0..file.size).await.unwrap();
    let first = reader.read(&mut [0; 16]).await.unwrap();
    assert!(first > 0, "it is read in pieces");
    origin.put("large", &large[..1 << 20]).await;
    let error = collect(reader).await.unwrap_err();
    assert_eq!(error.code(), Code::SourceChanged, "{error}");
}

#[tokio::test]
async fn a_file_that_is_gone_is_told_by_name() {
    let origin = LocalOrigin::start();
    let source = open(&origin, &origin.reference());
    let listing = source.resolve().await.unwrap();
    fs::remove_file(origin.model().join("config.json")).unwrap();
    let error = source.fetch(&listing.files()[0], 0..1).await.err().unwrap();
    assert_eq!(error.code(), Code::FileNotFound, "{error}");
    assert!(error.to_string().contains("config.json"), "{error}");
}

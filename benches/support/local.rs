//! A cache in this process, and a model in it.

use std::path::Path;

use larder::cache::Cache;
use larder::daemon::build_cache;
use larder::model::ModelRef;
use larder::wire::frame::OpenFiles;
use larder::wire::http::Phase;
use tokio::runtime::{Builder, Runtime};

use crate::settings::settings;

/// A runtime that does everything here but what blocks.
pub(crate) fn one_thread() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

/// A cache below this directory, and a model of so many small files that is local.
pub(crate) async fn cache_with_a_model(home: &Path, files: usize) -> (Cache, ModelRef) {
    let reference = model(home, files);
    let (cache, _) = build_cache(&settings(home)).await.expect("an empty directory becomes a volume");
    pull(&cache, &reference).await;
    (cache, reference)
}

/// A model below this directory of so many files, each another one of 4 KiB.
pub(crate) fn model(home: &Path, files: usize) -> ModelRef {
    let directory = home.join("origin");
    std::fs::create_dir_all(&directory).expect("a directory of ours");
    for file in 0..files {
        let content = file.to_le_bytes().repeat(512);
        std::fs::write(directory.join(format!("{file}.safetensors")), content).expect("the disk takes it");
    }
    format!("file://{}", directory.display()).parse().expect("a reference")
}

/// Pulls to the end.
pub(crate) async fn pull(cache: &Cache, reference: &ModelRef) {
    let ended = cache.pull(reference).expect("nothing is in the way").finished().await;
    assert_eq!(ended.phase, Phase::Ready, "{:?}", ended.error);
}

/// What a reader asks for who wants the files.
pub(crate) fn asked(reference: &str) -> OpenFiles {
    OpenFiles { wait: true, descriptors: true, ..OpenFiles::of(reference) }
}

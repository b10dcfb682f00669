//! A cache on a volume of its own, in this process. What must hold of every volume is checked when it goes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use larder::cache::{Cache, CacheConfig, Limits, MinFree, PageCache};
use larder::fault::{Code, Diagnose};
use larder::model::{Bytes, Digest, ModelRef, Share};
use larder::source::{Environment, SourceConfig, Sources};
use larder::telemetry::Metrics;
use larder::wire::http::{Phase, PullStatus};
use tempfile::TempDir;

/// Long enough never to pass in a test, except on a clock that is turned.
const TIMEOUT: Duration = Duration::from_secs(30);

/// The cache. Use what it is made with (`quota`, `memory`, …) before [`TestNode::start`].
pub(crate) struct TestNode {
    dir: TempDir,
    config: CacheConfig,
    environment: Environment,
    metrics: Arc<Metrics>,
    cache: Option<Cache>,
    leaves_parts: bool,
}

impl TestNode {
    /// With no quota, 8 MiB of memory and 4 connections.
    pub(crate) fn new() -> TestNode {
        let dir = tempfile::tempdir().unwrap();
        let config = CacheConfig {
            root: dir.path().join("volume"),
            limits: Limits {
                quota: None,
                low_water_percent: 100,
                min_free: MinFree::Of(Share::Bytes(Bytes(0))),
                min_residency: Duration::ZERO,
            },
            in_kubernetes: false,
            pull_memory: Bytes(8 << 20),
            pull_connections: 4,
            background_rate: None,
            page_cache: PageCache::Auto,
            stall_timeout: TIMEOUT,
            retry_attempts: 5,
            warm_on_open: false,
            metrics_by_model: false,
        };
        let (environment, metrics) = (Environment::default(), Arc::default());
        TestNode { dir, config, environment, metrics, cache: None, leaves_parts: false }
    }

    /// Most bytes models may use.
    pub(crate) fn quota(mut self, bytes: u64) -> TestNode {
        self.config.limits.quota = Some(Share::Bytes(Bytes(bytes)));
        self
    }

    /// Its volume is here.
    pub(crate) fn at(mut self, root: &Path) -> TestNode {
        self.config.root = root.to_owned();
        self
    }

    /// What models may take otherwise.
    pub(crate) fn limits(mut self, change: impl FnOnce(&mut Limits)) -> TestNode {
        change(&mut self.config.limits);
        self
    }

    /// Memory for bytes in flight.
    pub(crate) fn memory(mut self, bytes: u64) -> TestNode {
        self.config.pull_memory = Bytes(bytes);
        self
    }

    /// The Hub is here.
    pub(crate) fn hub(mut self, endpoint: &str) -> TestNode {
        self.environment = [("HF_ENDPOINT", endpoint), ("HOME", "/nonexistent")].into_iter().collect();
        self
    }

    /// Takes the volume. Also after [`TestNode::stop`], on the same one.
    pub(crate) async fn start(mut self) -> TestNode {
        self.start_again().await;
        self
    }

    async fn start_again(&mut self) {
        self.metrics = Arc::new(Metrics::new());
        let (config, environment, metrics) = (self.config.clone(), self.environment.clone(), self.metrics.clone());
        let start = move || {
            let config_of_sources =
                SourceConfig { connect_timeout: TIMEOUT, stall_timeout: TIMEOUT, environment: None };
            let sources = Sources::new(config_of_sources, environment);
            Cache::start(config, sources, metrics).unwrap()
        };
        self.cache = Some(tokio::task::spawn_blocking(start).await.unwrap());
    }

    /// Drains, does `meanwhile` to the volume, and starts again.
    pub(crate) async fn restart(&mut self, meanwhile: impl FnOnce(&Path)) {
        self.cache().drain(TIMEOUT).await;
        drop(self.cache.take());
        meanwhile(&self.config.root);
        self.start_again().await;
    }

    /// The cache.
    pub(crate) fn cache(&self) -> &Cache {
        self.cache.as_ref().expect("it was started")
    }

    /// What a counter says since the last start, such as `larder_proofs_total{outcome="wrong"}`.
    pub(crate) fn counted(&self, series: &str) -> u64 {
        let text = self.metrics.encode(&self.cache().gauges());
        let value = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        value.unwrap_or_else(|| panic!("no series `{series}`")).parse().unwrap()
    }

    /// Opens a model; its directory, or the code of the refusal and what it says.
    pub(crate) async fn open(&self, reference: &str) -> Result<PathBuf, (Code, String)> {
        let (cache, reference) = (self.cache().clone(), self::reference(reference));
        let opened = tokio::task::spawn_blocking(move || cache.open(&reference)).await.unwrap();
        opened.map(|model| model.path.into()).map_err(|error| (error.code(), error.to_string()))
    }

    /// The volume's directory.
    pub(crate) fn volume(&self) -> &Path {
        &self.config.root
    }

    /// The directory the volume is in; nothing else is.
    pub(crate) fn beside_volume(&self) -> &Path {
        self.dir.path()
    }

    /// Pulls, whatever comes of it.
    pub(crate) async fn pull(&self, reference: &str) -> PullStatus {
        self.pull_ref(&self::reference(reference)).await
    }

    /// The same.
    pub(crate) async fn pull_ref(&self, reference: &ModelRef) -> PullStatus {
        self.cache().pull(reference).unwrap().finished().await
    }

    /// Pulls what must become ready; the directory.
    pub(crate) async fn ready(&self, reference: &str) -> PathBuf {
        self.ready_ref(&self::reference(reference)).await
    }

    /// The same.
    pub(crate) async fn ready_ref(&self, reference: &ModelRef) -> PathBuf {
        let status = self.pull_ref(reference).await;
        assert_eq!(status.phase, Phase::Ready, "{status:#?}");
        PathBuf::from(status.path.expect("a model that is ready has a directory"))
    }

    /// Pulls what must fail with this code and say what to do; what it says.
    pub(crate) async fn refused(&self, reference: &ModelRef, code: Code) -> String {
        let status = self.pull_ref(reference).await;
        let error = status.error.unwrap_or_else(|| panic!("{reference} became {:?}", status.phase));
        assert_eq!((status.phase, error.code.as_str()), (Phase::Failed, code.text()), "{}", error.detail);
        assert!(!error.action.is_empty(), "{}", error.detail);
        error.detail
    }

    /// Names of the blobs, with their sizes.
    pub(crate) fn blobs(&self) -> BTreeMap<String, u64> {
        let files = files_below(&self.config.root.join("blobs")).into_iter();
        files.map(|path| (name_of(&path), fs::metadata(&path).unwrap().len())).collect()
    }

    /// The test has pulls that did not end ready, so bytes may wait for the next attempt.
    pub(crate) fn leaves_parts(mut self) -> TestNode {
        self.leaves_parts = true;
        self
    }

    /// What must hold of every volume on which nothing is under way.
    pub(crate) fn check(&self) {
        let root = &self.config.root;
        let gauges = self.cache().gauges();
        assert_eq!(gauges.pulls_active, 0, "a pull is still under way");
        assert_eq!(gauges.reserved_bytes, 0, "a promise of bytes was not given back");
        assert!(!gauges.volume_read_only);
        let on_disk = |path: &PathBuf| fs::metadata(path).unwrap().blocks() * 512;
        let blob_bytes: u64 = files_below(&root.join("blobs")).iter().map(on_disk).sum();
        assert_eq!(gauges.blob_bytes, blob_bytes, "the books differ from the disk");

        let mut blobs = BTreeSet::new();
        for path in files_below(&root.join("blobs")) {
            let bytes = fs::read(&path).unwrap();
            assert_eq!(Digest::of(&bytes).to_hex().to_string(), name_of(&path), "a blob is not what its name says");
            let metadata = fs::metadata(&path).unwrap();
            assert_eq!(metadata.mode() & 0o777, 0o444, "{}", path.display());
            blobs.insert(metadata.ino());
        }
        for path in files_below(&root.join("public")) {
            let is_hub_ref =
                path.strip_prefix(root.join("public/hub")).is_ok_and(|p| p.iter().nth(1) == Some("refs".as_ref()));
            let inode = fs::symlink_metadata(&path).unwrap().ino();
            assert!(is_hub_ref || blobs.contains(&inode), "{} is no blob", path.display());
        }
        for path in files_below(&root.join("ingests")) {
            let name = name_of(&path);
            assert!(self.leaves_parts || name.ends_with(".log"), "{name} was left behind");
            assert!(name.ends_with(".part") || name.ends_with(".log"), "{name} was left behind");
        }
        assert_eq!(files_below(&root.join("pulls")), [] as [PathBuf; 0], "a pull that ended would be resumed");
        for model in self.cache().models() {
            let detail = self.cache().model(&model.id).unwrap();
            for file in detail.manifest_files {
                let subdir = reference(&model.reference);
                let subdir = subdir.subdir().map_or("", |dir| dir.as_str());
                let inside = file.path.strip_prefix(subdir).unwrap().trim_start_matches('/');
                let bytes = fs::read(Path::new(&model.path).join(inside)).unwrap();
                assert_eq!(Digest::of(&bytes).to_string(), file.digest, "{} of {}", file.path, model.reference);
            }
        }
    }
}

impl Drop for TestNode {
    fn drop(&mut self) {
        // A test that failed has said why.
        if !std::thread::panicking() && self.cache.is_some() {
            self.check();
        }
    }
}

/// A reference that can be read.
pub(crate) fn reference(text: &str) -> ModelRef {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// A reference to some files of a model.
pub(crate) fn selection(text: &str, include: &[&str]) -> ModelRef {
    let include: Vec<String> = include.iter().map(|pattern| (*pattern).to_owned()).collect();
    ModelRef::parse_with(text, &include, &[]).unwrap_or_else(|e| panic!("{text}: {e}"))
}

/// Every file below a directory, sorted.
pub(crate) fn files_below(dir: &Path) -> Vec<PathBuf> {
    let (mut files, mut left) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let path = entry.unwrap().path();
            if fs::symlink_metadata(&path).unwrap().is_dir() { left.push(path) } else { files.push(path) }
        }
    }
    files.sort();
    files
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap().to_str().unwrap().to_owned()
}

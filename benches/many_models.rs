//! What a volume with many models costs: how long a start takes (with the end that follows it), an open, a plan of what to
//! evict, and an open while many models are being evicted.
//!
//! The volumes are made through the store, of files of a few bytes: what is measured grows with their number. Each number is the
//! median of several rounds, or of many opens; of opens also what 99 of 100 stay below. Run it on an idle machine, on the
//! file system that counts (`TMPDIR`); it takes some minutes:
//!
//! ```text
//! cargo bench --bench many_models
//! ```

#[path = "support/settings.rs"]
mod settings;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use larder::cache::Cache;
use larder::index::Index;
use larder::model::{Bytes, Digest, Manifest, ManifestFile, ModelRef, Record, RelPath, Share};
use larder::source::{Environment, SourceConfig, Sources};
use larder::store::{Begun, Blob, IngestKey, Volume, snapshot_path};
use larder::telemetry::Metrics;
use settings::settings;

/// Models, and files of each.
const VOLUMES: [(usize, usize); 5] = [(10, 1), (100, 1), (1_000, 1), (10_000, 1), (1_000, 100)];
const STARTS: usize = 5;
const PLANS: usize = 9;
const OPENS: usize = 5_000;
/// Most models that are evicted while others are opened.
const MOST_EVICTED: usize = 2_000;
/// Threads that make a volume: each waits for the disk most of the time.
const MAKERS: usize = 32;
/// Bytes of the disk that a file takes, on the file systems this is run on.
const BLOCK_BYTES: u64 = 4096;

fn main() {
    // `cargo test --benches` runs this too, and has no use for minutes of it.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    println!(
        "| models | files | start and end | plan for one | plan for half | open p50 | p99 | open beside evictions p50 | p99 |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let _entered = runtime.enter();
    for (models, files) in VOLUMES {
        let place = tempfile::tempdir().expect("a temporary directory");
        let home = place.path();
        make(home, models, files);
        let bytes = (models * files) as u64 * BLOCK_BYTES;
        let start = median((0..STARTS).map(|_| timed(|| start(home, bytes)).1).collect());
        let cache = start_cache(home, bytes);
        (0..models).for_each(|model| open(&cache, model));
        let opens = opened(&cache, 0..models, || true);
        let plan = |bytes: u64| {
            let plan = || cache.eviction_plan(bytes).expect("a plan");
            assert!(plan().is_enough && !plan().victims.is_empty());
            median((0..PLANS).map(|_| timed(plan).1).collect())
        };
        let (one, half) = (plan(files as u64 * BLOCK_BYTES), plan(bytes / 2));

        let evicted = (models / 2).min(MOST_EVICTED);
        let (is_over, stays) = (AtomicBool::new(false), models - models / 2..models);
        // What was opened last stays.
        stays.clone().for_each(|model| open(&cache, model));
        let beside = thread::scope(|scope| {
            let (cache, is_over) = (&cache, &is_over);
            scope.spawn(move || {
                let need = (evicted * files) as u64 * BLOCK_BYTES;
                let gone = cache.evict_for(need).expect("they are evicted").evictions.len();
                assert_eq!(gone, evicted);
                is_over.store(true, Ordering::SeqCst);
            });
            opened(cache, stays, || !is_over.load(Ordering::SeqCst))
        });
        println!(
            "| {models} | {} | {start:.1?} | {one:.2?} | {half:.2?} | {:.1?} | {:.1?} | {:.1?} | {:.1?} |",
            models * files,
            percentile(&opens, 50),
            percentile(&opens, 99),
            percentile(&beside, 50),
            percentile(&beside, 99),
        );
        runtime.block_on(cache.drain(Duration::from_secs(60)));
    }
}

fn reference(model: usize) -> ModelRef {
    format!("file:///models/{model}").parse().expect("a reference")
}

/// A volume as a daemon leaves it.
fn make(home: &Path, models: usize, files: usize) {
    let root = settings(home).volume.root;
    let volume = Volume::open(&root).expect("a volume");
    let (next, records) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..MAKERS {
            scope.spawn(|| {
                loop {
                    let model = next.fetch_add(1, Ordering::Relaxed);
                    if model >= models {
                        break;
                    }
                    let record = make_model(&volume, model, files);
                    records.lock().expect("no maker panics").push(record);
                }
            });
        }
    });
    let index = Index::open(&root.join("index-v1"));
    for record in records.into_inner().expect("no maker panics") {
        index.add(&record).expect("the index takes it");
    }
    index.write_stamps(&volume.changed_stamps()).expect("the index takes them");
    index.flush().expect("the index is durable");
}

fn make_model(volume: &Volume, model: usize, files: usize) -> Record {
    let file = |at: usize| {
        let blob = make_blob(volume, format!("file {at} of model {model}").as_bytes());
        let path = RelPath::new(&format!("part-{at:05}.bin")).expect("a path");
        ManifestFile { path, digest: blob.digest, size: blob.size }
    };
    let manifest = Manifest::new((0..files).map(file).collect());
    let (reference, version) = (reference(model), format!("{model:016x}"));
    let record = Record {
        manifest: volume.write_manifest(&manifest).expect("a manifest"),
        snapshot: snapshot_path(&reference, &version),
        confirmed_at_ms: 0,
        sequence: model as u64 + 1,
        total_bytes: manifest.total_bytes(),
        total_files: files as u64,
        claims: Vec::new(),
        reference,
        version,
    };
    volume.publish(&record.snapshot, &manifest).expect("a directory");
    volume.write_record(&record).expect("a record");
    record
}

fn make_blob(volume: &Volume, bytes: &[u8]) -> Blob {
    let key = IngestKey { claim: None, checksum: None, size: bytes.len() as u64, what: Digest::of(bytes).short() };
    let Begun::Ingest(mut ingest) = volume.begin(&key).expect("an ingest") else { unreachable!("it has no claim") };
    ingest.write(bytes).expect("it is written");
    ingest.commit().expect("a blob")
}

fn start(home: &Path, quota_bytes: u64) {
    drop(start_cache(home, quota_bytes));
}

fn start_cache(home: &Path, quota_bytes: u64) -> Cache {
    let mut config = settings(home).cache();
    config.limits.quota = Some(Share::Bytes(Bytes(quota_bytes)));
    config.limits.low_water_percent = 100;
    config.limits.min_residency = Duration::ZERO;
    let sources = Sources::new(SourceConfig::default(), Environment::default());
    Cache::start(config, sources, Arc::new(Metrics::new())).expect("it starts")
}

fn open(cache: &Cache, model: usize) {
    cache.open(&reference(model)).expect("it is here");
}

/// Opens models of that range at random while `goes_on`, and so often at most; how long each took.
fn opened(cache: &Cache, models: std::ops::Range<usize>, goes_on: impl Fn() -> bool) -> Vec<Duration> {
    let mut random = fastrand::Rng::with_seed(7);
    let mut times = Vec::with_capacity(OPENS);
    while times.len() < OPENS && goes_on() {
        let model = random.usize(models.clone());
        times.push(timed(|| open(cache, model)).1);
    }
    times
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let began = Instant::now();
    let done = work();
    (done, began.elapsed())
}

fn median(times: Vec<Duration>) -> Duration {
    percentile(&times, 50)
}

fn percentile(times: &[Duration], percent: usize) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort();
    sorted.get(sorted.len() * percent / 100).copied().unwrap_or_default()
}

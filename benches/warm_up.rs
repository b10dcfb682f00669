//! A warm-up of a model that is not in memory, beside what the disk gives to whoever goes around the page cache, and beside
//! the ways in which a reader could have it brought there instead.
//!
//! All read the same files, dropped from memory before each, in turn; what counts is the ratio of each pair, and the median
//! of those. Run it on an idle machine, in a directory on the disk in question (`TMPDIR`):
//!
//! ```text
//! cargo bench --bench warm_up
//! ```

use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use larder::cache::{Cache, CacheConfig, Limits, MinFree, PageCache};
use larder::model::{Bytes, ModelRef, Share};
use larder::source::{Environment, SourceConfig, Sources};
use larder::telemetry::Metrics;
use larder::wire::http::{Phase, WarmPhase};
use larder::wire::residency;
use memmap2::{Advice, Mmap, MmapMut};
use rustix::fs::{OFlags, fadvise};

const SHARDS: usize = 4;
const SHARD_BYTES: u64 = 256 << 20;
const ROUNDS: usize = 7;

/// Of the direct reads: those of a warm-up.
const DIRECT_THREADS: usize = 4;
const DIRECT_BLOCK_BYTES: u64 = 2 << 20;

#[tokio::main]
async fn main() {
    // `cargo test --benches` runs this too, and has no use for minutes of it.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let place = tempfile::tempdir().expect("a temporary directory");
    let reference = generate(&place.path().join("origin"));
    let cache = local(&place.path().join("volume"), &reference).await;
    let directory = PathBuf::from(cache.open(&reference).expect("it is local").path);
    let files: Vec<PathBuf> = (0..SHARDS).map(|shard| directory.join(name(shard))).collect();

    println!("{} in {SHARDS} files, {ROUNDS} rounds after one that is not counted", Bytes(total()));
    let (mut of_direct, mut of_map, mut of_advice) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let direct = timed(&files, || read_directly(&files));
        let map = timed(&files, || read_mapped(&files, None));
        let advice = timed(&files, || read_mapped(&files, Some(Advice::WillNeed)));
        drop_pages(&files);
        let began = Instant::now();
        let ended = cache.warm(&reference).expect("it is local").finished().await;
        let larder = began.elapsed();
        assert_eq!((ended.phase, ended.bytes_read), (WarmPhase::Warm, total()), "{:?}", ended.why);
        println!(
            "direct {}   mmap {}   MADV_WILLNEED {}   larder {}",
            rate(direct),
            rate(map),
            rate(advice),
            rate(larder)
        );
        if round > 0 {
            let ratio = |other: Duration| other.as_secs_f64() / larder.as_secs_f64();
            of_direct.push(ratio(direct));
            of_map.push(ratio(map));
            of_advice.push(ratio(advice));
        }
    }
    for (what, mut ratios) in [("direct reads", of_direct), ("mmap", of_map), ("MADV_WILLNEED", of_advice)] {
        ratios.sort_by(f64::total_cmp);
        let (median, least, most) = (ratios[ROUNDS / 2], ratios[0], ratios[ROUNDS - 1]);
        println!("larder reaches {median:.2} of {what} (median; {least:.2} to {most:.2})");
    }
    let began = Instant::now();
    let again = cache.warm(&reference).expect("it is local").finished().await;
    println!("a warm-up of what is warm reads {} bytes and takes {:?}", again.bytes_read, began.elapsed());
    cache.drain(Duration::from_secs(5)).await;
}

fn total() -> u64 {
    SHARDS as u64 * SHARD_BYTES
}

fn name(shard: usize) -> String {
    format!("{shard}.safetensors")
}

fn generate(directory: &Path) -> ModelRef {
    std::fs::create_dir(directory).expect("a directory of ours");
    for shard in 0..SHARDS {
        let mut bytes = vec![0; SHARD_BYTES as usize];
        blake3::Hasher::new().update(&shard.to_le_bytes()).finalize_xof().fill(&mut bytes);
        std::fs::write(directory.join(name(shard)), bytes).expect("the disk takes it");
    }
    format!("file://{}", directory.display()).parse().expect("a reference")
}

async fn local(root: &Path, reference: &ModelRef) -> Cache {
    let config = CacheConfig {
        root: root.to_owned(),
        limits: Limits {
            quota: None,
            low_water_percent: 95,
            min_free: MinFree::Of(Share::Bytes(Bytes(0))),
            min_residency: Duration::ZERO,
        },
        in_kubernetes: false,
        pull_memory: Bytes(64 << 20),
        pull_connections: 16,
        page_cache: PageCache::Auto,
        stall_timeout: Duration::from_secs(30),
        retry_attempts: 0,
        warm_on_open: false,
        metrics_by_model: false,
    };
    let sources = Sources::new(SourceConfig::default(), Environment::default());
    let cache = Cache::start(config, sources, Arc::new(Metrics::new())).expect("an empty directory becomes a volume");
    let ended = cache.pull(reference).expect("nothing is in the way").finished().await;
    assert_eq!(ended.phase, Phase::Ready, "{:?}", ended.error);
    cache
}

fn drop_pages(files: &[PathBuf]) {
    for path in files {
        let file = File::open(path).expect("it is there");
        file.sync_all().expect("the disk takes it");
        fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("a file has pages");
        assert_eq!(residency::resident_bytes(&file, SHARD_BYTES), Some(0), "its pages cannot be dropped");
    }
}

fn timed(files: &[PathBuf], work: impl FnOnce()) -> Duration {
    drop_pages(files);
    let began = Instant::now();
    work();
    began.elapsed()
}

/// Around the page cache: what the disk itself gives.
fn read_directly(files: &[PathBuf]) {
    let open = |path| OpenOptions::new().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path);
    let files: Vec<File> = files.iter().map(|path| open(path).expect("a disk that takes O_DIRECT")).collect();
    let next = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..DIRECT_THREADS {
            scope.spawn(|| {
                // A mapping of its own is aligned as O_DIRECT wants it.
                let mut buffer = MmapMut::map_anon(DIRECT_BLOCK_BYTES as usize).expect("memory");
                loop {
                    let at = next.fetch_add(DIRECT_BLOCK_BYTES, Ordering::Relaxed);
                    let Some(file) = files.get((at / SHARD_BYTES) as usize) else { return };
                    file.read_exact_at(&mut buffer, at % SHARD_BYTES).expect("the disk gives it");
                }
            });
        }
    });
}

/// As a loader reads that maps its files.
fn read_mapped(files: &[PathBuf], advice: Option<Advice>) {
    for path in files {
        let file = File::open(path).expect("it is there");
        // SAFETY: a file of ours that nobody changes.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.expect("it can be mapped");
        if let Some(advice) = advice {
            map.advise(advice).expect("the kernel knows it");
        }
        let sum = map.iter().step_by(4096).fold(0u64, |sum, byte| sum + u64::from(*byte));
        black_box(sum);
    }
}

fn rate(took: Duration) -> String {
    format!("{:7.0} MB/s", total() as f64 / took.as_secs_f64() / 1e6)
}

//! A cold pull beside the least that any program would have to do for the same files: receive, hash, write, fsync.
//!
//! Both read the same origin (bytes in memory, behind HTTP on loopback, in this process) and write to the same file
//! system, in turn; what counts is the ratio of each pair, and the median of those. Run it on an idle machine:
//!
//! ```text
//! cargo bench --bench cold_pull
//! ```

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes as Chunk};
use axum::extract::{Path as Name, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures::StreamExt;
use larder::cache::{Cache, CacheConfig, Limits, MinFree, PageCache};
use larder::model::{Bytes, Share};
use larder::source::{Environment, SourceConfig, Sources};
use larder::telemetry::Metrics;
use larder::wire::http::Phase;

const SHARDS: usize = 4;
const SHARD_BYTES: usize = 256 << 20;
const ROUNDS: usize = 5;

struct Model {
    shards: Vec<Chunk>,
    listing: String,
}

#[tokio::main]
async fn main() {
    // `cargo test --benches` runs this too, and has no use for minutes of it.
    if !std::env::args().any(|arg| arg == "--bench") {
        return;
    }
    let model = Arc::new(generate());
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let origin = format!("http://{}/model/", listener.local_addr().expect("a bound socket has an address"));
    let routes = Router::new().route("/model/{name}", get(send)).with_state(model);
    tokio::spawn(async move { axum::serve(listener, routes).await });

    let place = tempfile::tempdir().expect("a temporary directory");
    let mut ratios = Vec::new();
    println!(
        "{} in {SHARDS} files, {ROUNDS} rounds after one that is not counted",
        Bytes((SHARDS * SHARD_BYTES) as u64)
    );
    for round in 0..=ROUNDS {
        let floor = floor(&origin, &place.path().join(format!("floor-{round}"))).await;
        let larder = pull(&origin, &place.path().join(format!("larder-{round}"))).await;
        println!("receive + BLAKE3 + write + fsync {}   larder {}", rate(floor), rate(larder));
        if round > 0 {
            ratios.push(floor.as_secs_f64() / larder.as_secs_f64());
        }
    }
    ratios.sort_by(f64::total_cmp);
    println!("larder reaches {:.2} of it (median; {:.2} to {:.2})", ratios[ROUNDS / 2], ratios[0], ratios[ROUNDS - 1]);
}

fn generate() -> Model {
    let shards: Vec<Chunk> = (0..SHARDS)
        .map(|shard| {
            let mut bytes = vec![0; SHARD_BYTES];
            blake3::Hasher::new().update(&shard.to_le_bytes()).finalize_xof().fill(&mut bytes);
            bytes.into()
        })
        .collect();
    // Without checksums: the floor checks none either, and BLAKE3 is computed by both.
    let listed: Vec<_> = (0..SHARDS)
        .map(|shard| serde_json::json!({"path": format!("{shard}.safetensors"), "size": SHARD_BYTES}))
        .collect();
    Model { shards, listing: serde_json::json!({"files": listed}).to_string() }
}

async fn send(State(model): State<Arc<Model>>, Name(name): Name<String>, headers: HeaderMap) -> Response {
    if name == "larder.json" {
        return model.listing.clone().into_response();
    }
    let shard: Option<usize> = name.strip_suffix(".safetensors").and_then(|number| number.parse().ok());
    let Some(bytes) = shard.and_then(|shard| model.shards.get(shard)) else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let etag = (header::ETAG, format!("\"{name}\""));
    let range =
        headers.get(header::RANGE).and_then(|range| range.to_str().ok()?.strip_prefix("bytes=")?.split_once('-'));
    let Some((first, last)) = range.and_then(|(a, b)| Some((a.parse::<usize>().ok()?, b.parse::<usize>().ok()?)))
    else {
        return ([etag], Body::from(bytes.clone())).into_response();
    };
    let content_range = (header::CONTENT_RANGE, format!("bytes {first}-{last}/{}", bytes.len()));
    (StatusCode::PARTIAL_CONTENT, [etag, content_range], Body::from(bytes.slice(first..=last))).into_response()
}

/// One stream per file, hashed and written as it comes, made durable at the end.
async fn floor(origin: &str, directory: &Path) -> Duration {
    std::fs::create_dir(directory).expect("a directory of ours");
    let client = reqwest::Client::new();
    let began = Instant::now();
    let files = (0..SHARDS).map(|shard| {
        let (client, url) = (client.clone(), format!("{origin}{shard}.safetensors"));
        let path = directory.join(shard.to_string());
        tokio::spawn(async move {
            let (pieces, mut received) = tokio::sync::mpsc::channel::<Chunk>(16);
            let writer = tokio::task::spawn_blocking(move || {
                let (mut file, mut hasher) = (File::create(path)?, blake3::Hasher::new());
                while let Some(piece) = received.blocking_recv() {
                    hasher.update(&piece);
                    file.write_all(&piece)?;
                }
                file.sync_all()?;
                std::io::Result::Ok(hasher.finalize())
            });
            let mut body = client.get(url).send().await.expect("the origin answers").bytes_stream();
            while let Some(piece) = body.next().await {
                pieces.send(piece.expect("the origin does not break")).await.expect("the writer is there");
            }
            drop(pieces);
            writer.await.expect("the writer does not panic").expect("the disk takes it")
        })
    });
    futures::future::join_all(files).await;
    let took = began.elapsed();
    std::fs::remove_dir_all(directory).expect("a directory of ours");
    took
}

async fn pull(origin: &str, root: &Path) -> Duration {
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
    let reference = origin.parse().expect("a reference");
    let began = Instant::now();
    let ended = cache.pull(&reference).expect("nothing is in the way").finished().await;
    let took = began.elapsed();
    assert_eq!(ended.phase, Phase::Ready, "{:?}", ended.error);
    cache.remove(origin).expect("it is local");
    cache.drain(Duration::from_secs(5)).await;
    took
}

fn rate(took: Duration) -> String {
    format!("{:7.0} MB/s", (SHARDS * SHARD_BYTES) as f64 / took.as_secs_f64() / 1e6)
}

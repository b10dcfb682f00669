//! The embedded origin of the demonstration: a listing and files over HTTP, generated when they are asked for.
//!
//! The bytes are BLAKE3's output stream, which can be read at any offset, so nothing is kept in memory.

use std::io::{Read, Seek, SeekFrom};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use aws_lc_rs::digest as lc;
use axum::Router;
use axum::body::{Body, Bytes as Chunk};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// Shards of the generated model, and the bytes of each: enough to see the parallel ranges, small enough for a laptop.
const SHARDS: usize = 4;
const SHARD_BYTES: u64 = 96 << 20;
/// Bytes generated at a time.
const CHUNK_BYTES: usize = 1 << 20;

pub(super) struct Origin {
    address: SocketAddr,
    model: Arc<Model>,
}

struct Model {
    files: Vec<GeneratedFile>,
    listing: String,
    sent_bytes: AtomicU64,
}

#[derive(Clone)]
struct GeneratedFile {
    name: String,
    /// What stands at the start; the generated stream follows.
    head: Chunk,
    size: u64,
    seed: u64,
}

impl Origin {
    /// Generates the model once to know its checksums, and serves it on a free port of the loopback interface.
    pub(super) async fn start() -> std::io::Result<Origin> {
        let model = tokio::task::spawn_blocking(Model::generate).await.map_err(std::io::Error::other)?;
        let model = Arc::new(model);
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let routes = Router::new().route("/demo-model/{name}", get(serve)).with_state(model.clone());
        tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, routes).await {
                tracing::error!(%error, "the origin ended");
            }
        });
        Ok(Origin { address, model })
    }

    pub(super) fn reference(&self) -> String {
        format!("http://{}/demo-model/", self.address)
    }

    pub(super) fn files(&self) -> usize {
        self.model.files.len()
    }

    pub(super) fn total_bytes(&self) -> u64 {
        self.model.files.iter().map(|f| f.size).sum()
    }

    /// Bytes of files that were sent, however often.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.model.sent_bytes.load(Ordering::Relaxed)
    }
}

impl Model {
    fn generate() -> Model {
        let mut files = vec![
            text("config.json", r#"{"architectures":["DemoForCausalLM"],"hidden_size":4096,"torch_dtype":"bfloat16"}"#),
            text("tokenizer.json", r#"{"version":"1.0","model":{"type":"BPE","vocab":{},"merges":[]}}"#),
        ];
        let mut weights = serde_json::Map::new();
        for shard in 0..SHARDS {
            let name = format!("model-{:05}-of-{SHARDS:05}.safetensors", shard + 1);
            let tensor = format!("model.layers.{shard}.weight");
            weights.insert(tensor.clone(), name.clone().into());
            files.push(safetensors(name, &tensor, shard as u64));
        }
        let index = serde_json::json!({"metadata": {"total_size": SHARD_BYTES * SHARDS as u64}, "weight_map": weights});
        files.push(text("model.safetensors.index.json", &index.to_string()));
        let listed: Vec<_> =
            files.iter().map(|f| serde_json::json!({"path": f.name, "size": f.size, "sha256": f.sha256()})).collect();
        Model { files, listing: serde_json::json!({"files": listed}).to_string(), sent_bytes: AtomicU64::new(0) }
    }
}

fn text(name: &str, content: &str) -> GeneratedFile {
    let head = Chunk::copy_from_slice(content.as_bytes());
    GeneratedFile { name: name.into(), size: head.len() as u64, head, seed: 0 }
}

/// One tensor of bfloat16, in the safetensors format: the header's length, the header, the data.
fn safetensors(name: String, tensor: &str, seed: u64) -> GeneratedFile {
    let shape = [SHARD_BYTES / 2 / 4096, 4096];
    let entry = serde_json::json!({"dtype": "BF16", "shape": shape, "data_offsets": [0, SHARD_BYTES]});
    let header = serde_json::json!({tensor: entry}).to_string();
    let mut head = (header.len() as u64).to_le_bytes().to_vec();
    head.extend_from_slice(header.as_bytes());
    GeneratedFile { name, size: head.len() as u64 + SHARD_BYTES, head: head.into(), seed }
}

impl GeneratedFile {
    /// Bytes from `at`, at most [`CHUNK_BYTES`] and never past `end`.
    fn chunk(&self, at: u64, end: u64) -> Chunk {
        let head = self.head.len() as u64;
        if at < head {
            return self.head.slice(at as usize..end.min(head) as usize);
        }
        let mut chunk = vec![0; usize::try_from(end - at).unwrap_or(usize::MAX).min(CHUNK_BYTES)];
        let mut stream = blake3::Hasher::new().update(&self.seed.to_le_bytes()).finalize_xof();
        let generated = stream.seek(SeekFrom::Start(at - head)).and_then(|_| stream.read_exact(&mut chunk));
        generated.expect("the output stream of BLAKE3 has no end");
        chunk.into()
    }

    fn sha256(&self) -> String {
        let mut context = lc::Context::new(&lc::SHA256);
        let mut at = 0;
        while at < self.size {
            let chunk = self.chunk(at, self.size);
            context.update(&chunk);
            at += chunk.len() as u64;
        }
        hex::encode(context.finish())
    }
}

async fn serve(State(model): State<Arc<Model>>, Path(name): Path<String>, headers: HeaderMap) -> Response {
    if name == "larder.json" {
        return ([(header::CONTENT_TYPE, "application/json")], model.listing.clone()).into_response();
    }
    let Some(file) = model.files.iter().find(|f| f.name == name).cloned() else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let asked =
        headers.get(header::RANGE).and_then(|range| range.to_str().ok()).and_then(|r| parse_range(r, file.size));
    let (start, end) = asked.unwrap_or((0, file.size));
    let content_range = format!("bytes {start}-{}/{}", end.saturating_sub(1), file.size);
    let body = futures::stream::unfold(start, move |at| {
        let (file, model) = (file.clone(), model.clone());
        async move {
            if at >= end {
                return None;
            }
            let chunk = tokio::task::spawn_blocking(move || file.chunk(at, end)).await.ok()?;
            model.sent_bytes.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            let next = at + chunk.len() as u64;
            Some((Ok::<_, std::convert::Infallible>(chunk), next))
        }
    });
    let status = if asked.is_some() { StatusCode::PARTIAL_CONTENT } else { StatusCode::OK };
    let mut response =
        (status, [(header::CONTENT_LENGTH, (end - start).to_string())], Body::from_stream(body)).into_response();
    if asked.is_some()
        && let Ok(value) = content_range.parse()
    {
        response.headers_mut().insert(header::CONTENT_RANGE, value);
    }
    response
}

/// `bytes=FIRST-LAST` as (first, one past the last).
fn parse_range(text: &str, size: u64) -> Option<(u64, u64)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last && last < size).then_some((first, last + 1))
}

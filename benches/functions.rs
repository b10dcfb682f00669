//! The hot functions, one by one, in time and in allocations.
//!
//! ```text
//! cargo bench --bench functions
//! ```

#[path = "support/local.rs"]
mod local;
#[path = "support/settings.rs"]
mod settings;

use divan::counter::BytesCount;
use divan::{AllocProfiler, Bencher, black_box};
use larder::model::{Checksum, Digest, Manifest, ManifestFile, ModelRef, RelPath};
use larder::store::{Begun, IngestKey, Volume};
use larder::wire::frame::{
    Answer, Decoder, MAX_ANSWER_BYTES, MAX_BATCH_FILES, MAX_REQUEST_BYTES, Request, decode, encode,
};
use larder::wire::http::ModelFile;

#[global_allocator]
static ALLOCATIONS: AllocProfiler = AllocProfiler::system();

const MIB: usize = 1 << 20;
/// As a large model has.
const FILES: usize = 256;
/// More than is written to it; the disk has that much free, because a file is allocated before it is written.
const INGEST_BYTES: u64 = 1 << 30;
const REFERENCE: &str = "hf://Qwen/Qwen3-235B-A22B-Instruct@main";

fn main() {
    divan::main();
}

fn path(file: usize) -> String {
    format!("original/model-{file:05}-of-{FILES:05}.safetensors")
}

fn manifest() -> Manifest {
    let files = (0..FILES).map(|file| ManifestFile {
        path: RelPath::new(&path(file)).expect("a name"),
        digest: Digest::of(&file.to_le_bytes()),
        size: 4_000_000_000,
    });
    Manifest::new(files.collect())
}

fn batch() -> Answer {
    let files = (0..MAX_BATCH_FILES).map(|file| ModelFile {
        path: path(file),
        digest: Digest::of(&file.to_le_bytes()).to_string(),
        size: 4_000_000_000,
    });
    Answer::Files { files: files.collect(), descriptors: MAX_BATCH_FILES }
}

fn request() -> Request {
    Request::Open(Box::new(local::asked(REFERENCE)))
}

fn whole<T: serde::de::DeserializeOwned>(mut frame: &[u8], most: usize) -> T {
    let json = Decoder::new(most).take(&mut frame).expect("a frame").expect("a whole one");
    decode(&json).expect("a message")
}

#[divan::bench]
fn encode_an_open(bencher: Bencher<'_, '_>) {
    let request = request();
    bencher.bench(|| encode(black_box(&request), MAX_REQUEST_BYTES));
}

#[divan::bench]
fn decode_an_open(bencher: Bencher<'_, '_>) {
    let frame = encode(&request(), MAX_REQUEST_BYTES).expect("a short request");
    bencher.bench(|| whole::<Request>(black_box(&frame), MAX_REQUEST_BYTES));
}

#[divan::bench]
fn encode_a_batch_of_64_files(bencher: Bencher<'_, '_>) {
    let batch = batch();
    bencher.bench(|| encode(black_box(&batch), MAX_ANSWER_BYTES));
}

#[divan::bench]
fn decode_a_batch_of_64_files(bencher: Bencher<'_, '_>) {
    let frame = encode(&batch(), MAX_ANSWER_BYTES).expect("a batch fits");
    bencher.bench(|| whole::<Answer>(black_box(&frame), MAX_ANSWER_BYTES));
}

#[divan::bench]
fn read_a_reference(bencher: Bencher<'_, '_>) {
    bencher.bench(|| black_box(REFERENCE).parse::<ModelRef>());
}

#[divan::bench]
fn make_a_path_of_a_name(bencher: Bencher<'_, '_>) {
    let name = path(7);
    bencher.bench(|| RelPath::new(black_box(&name)));
}

#[divan::bench]
fn read_a_manifest_of_256_files(bencher: Bencher<'_, '_>) {
    let text = manifest().encode();
    bencher.counter(BytesCount::of_str(&text)).bench(|| Manifest::decode(black_box(&text)));
}

#[divan::bench]
fn write_a_manifest_of_256_files(bencher: Bencher<'_, '_>) {
    let manifest = manifest();
    bencher.counter(BytesCount::of_str(&manifest.encode())).bench(|| black_box(&manifest).encode());
}

/// Without a door.
#[divan::bench]
fn open_a_warm_model_of_4_files(bencher: Bencher<'_, '_>) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let runtime = local::one_thread();
    let (cache, reference) = runtime.block_on(local::cache_with_a_model(dir.path(), 4));
    bencher.bench_local(|| cache.open(black_box(&reference)));
}

/// The same with descriptors and a lease, as the door opens it that hands them out.
#[divan::bench]
fn open_the_files_of_a_warm_model_of_4_files(bencher: Bencher<'_, '_>) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let runtime = local::one_thread();
    let (cache, reference) = runtime.block_on(local::cache_with_a_model(dir.path(), 4));
    let asked = local::asked(&reference.to_string());
    // Brings the manifest into memory.
    cache.open(&reference).expect("it is local");
    bencher.bench_local(|| cache.open_files_at_once(black_box(&asked), "a bench").expect("nobody touched it"));
}

/// The way of each MiB of a pull from memory to a file, without its begin and its commit.
#[divan::bench(sample_count = 100, sample_size = 1)]
fn ingest_a_mib(bencher: Bencher<'_, '_>) {
    ingest(bencher, None);
}

/// The same where the source gives a SHA-256.
#[divan::bench(sample_count = 100, sample_size = 1)]
fn ingest_a_mib_with_its_sha256(bencher: Bencher<'_, '_>) {
    ingest(bencher, Some(Checksum::Sha256([0; 32])));
}

fn ingest(bencher: Bencher<'_, '_>, checksum: Option<Checksum>) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let volume = Volume::open(dir.path()).expect("an empty directory becomes a volume");
    let bytes: Vec<u8> = (0..MIB).map(|at| at as u8).collect();
    let key = IngestKey { claim: None, checksum, size: INGEST_BYTES, what: "a file".into() };
    let Begun::Ingest(mut ingest) = volume.begin(&key).expect("the disk takes it") else {
        unreachable!("it has no claim")
    };
    bencher.counter(BytesCount::new(MIB)).bench_local(|| ingest.write(black_box(&bytes)).expect("the disk takes it"));
}

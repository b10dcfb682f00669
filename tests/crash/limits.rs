//! Little memory, and much to pull.

use std::fs;
use std::io::Read;

use larder::model::Digest;

use super::checker;
use super::larder::{Home, Running};
use super::memory_group::MemoryGroup;
use super::row::{Row, size};
use super::skip::skipped;

const LIMIT_BYTES: u64 = 128 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_of_much_more_than_the_memory_limit_is_not_killed() {
    let group = match MemoryGroup::new("crash", LIMIT_BYTES) {
        Ok(group) => group,
        Err(why) => return skipped(&why),
    };
    let home = Home::new();
    let model = home.path().join("models/much");
    fs::create_dir_all(&model).unwrap();
    let length = size(1, 20) as u64 * (1 << 30);
    fs::File::create(model.join("zeros.bin")).unwrap().set_len(length).unwrap();
    let reference = format!("file://{}", model.display());
    let mut row = Row::new("a pull of 1 GiB (20 in the long version) with 128 MiB of memory");
    let case = async {
        let mut pull = Running::start(group.enter(&home.command(&["pull", "-q", &reference])));
        let (status, out) = pull.ended().await;
        assert!(status.success(), "{status}: {}", pull.said());
        let pulled = fs::File::open(format!("{}/zeros.bin", out.trim())).unwrap();
        assert_eq!(pulled.metadata().unwrap().len(), length);
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(pulled.take(length)).unwrap();
        let blobs = home.root().join("blobs");
        let hex = Digest::finish(&hasher).to_hex();
        assert!(blobs.join(&hex[..2]).join(&hex).exists(), "its blob has another name");
        assert!(checker::files_in(&home.root().join("ingests")).is_empty());
    };
    row.case("pull", case).await;
    row.end();
}

//! The model that the origin serves: shards of real shape that no file system can compress, in little memory.
//!
//! Each shard is a safetensors header of its own and then bytes of one pool, again and again, from another place on for
//! each shard. The pool is larger than what any compressor looks back, and than the caches of a processor.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use aws_lc_rs::digest as lc;
use rustix::fs::{MemfdFlags, memfd_create};
use serde::{Deserialize, Serialize};

/// A shard's header, filled up with blanks as safetensors allows: what follows is aligned to pages, so that the kernel
/// can send them without copying.
pub(super) const HEAD_BYTES: u64 = 4096;
/// Of a multiple of this many bytes is each shard, so that it can be written around the page cache.
pub(super) const ALIGN_BYTES: u64 = 4096;
const POOL_BYTES: u64 = 256 << 20;
/// How far apart in the pool two shards begin.
const STRIDE_BYTES: u64 = 24 << 20;
/// The shard that another revision changes.
const CHANGED_SHARD: u64 = 0;

/// The shape of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shape {
    pub(super) shards: u64,
    /// A multiple of [`ALIGN_BYTES`], and larger than [`HEAD_BYTES`].
    pub(super) shard_bytes: u64,
}

impl Shape {
    /// So many bytes in so many shards; a little less, if that does not come out even.
    pub(super) fn of(bytes: u64, shards: u64) -> Shape {
        let shard_bytes = bytes / shards / ALIGN_BYTES * ALIGN_BYTES;
        Shape { shards, shard_bytes: shard_bytes.max(HEAD_BYTES + ALIGN_BYTES) }
    }

    pub(super) fn bytes(self) -> u64 {
        self.shards * self.shard_bytes
    }

    /// The name of a shard, counted from 0.
    pub(super) fn name(self, shard: u64) -> String {
        format!("model-{:05}-of-{:05}.safetensors", shard + 1, self.shards)
    }

    pub(super) fn names(self) -> impl Iterator<Item = String> {
        (0..self.shards).map(move |shard| self.name(shard))
    }
}

/// All its bytes.
pub(super) struct Content {
    pub(super) shape: Shape,
    /// How often [`CHANGED_SHARD`] has changed.
    revision: u64,
    /// In memory, and a file all the same: what is sent from it is not copied here.
    pool: File,
    pool_bytes: u64,
    sha256: Vec<String>,
}

/// Where some bytes of a shard are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// From here on in its header.
    Head { at: u64, length: u64 },
    /// From here on in the pool.
    Pool { at: u64, length: u64 },
}

impl Content {
    /// Generates the pool, and the checksum of each shard.
    pub(super) fn generate(shape: Shape) -> io::Result<Content> {
        let pool_bytes = POOL_BYTES.min(shape.shard_bytes - HEAD_BYTES);
        let mut pool = File::from(memfd_create("larder-bench", MemfdFlags::CLOEXEC)?);
        let (mut stream, mut block) = (blake3::Hasher::new().finalize_xof(), vec![0; 1 << 20]);
        let mut left = pool_bytes;
        while left > 0 {
            let length = left.min(block.len() as u64);
            stream.fill(&mut block[..length as usize]);
            pool.write_all(&block[..length as usize])?;
            left -= length;
        }
        let content = Content { shape, revision: 0, pool, pool_bytes, sha256: Vec::new() };
        let sha256: io::Result<Vec<String>> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..shape.shards)
                .map(|shard| {
                    scope.spawn({
                        let content = &content;
                        move || content.sha256_of(shard)
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().expect("a checksum does not panic")).collect()
        });
        Ok(Content { sha256: sha256?, ..content })
    }

    /// Another revision: one shard is another one.
    pub(super) fn revise(&mut self) -> io::Result<()> {
        self.revision += 1;
        self.sha256[CHANGED_SHARD as usize] = self.sha256_of(CHANGED_SHARD)?;
        Ok(())
    }

    /// `larder.json`, with checksums or without.
    pub(super) fn listing(&self, checksums: bool) -> String {
        let listed = self.shape.names().zip(&self.sha256).map(|(path, sha256)| {
            let mut file = serde_json::json!({"path": path, "size": self.shape.shard_bytes});
            if checksums {
                file["sha256"] = sha256.as_str().into();
            }
            file
        });
        serde_json::json!({"files": listed.collect::<Vec<_>>()}).to_string()
    }

    /// By what a shard can be recognised.
    pub(super) fn etag(&self, shard: u64) -> String {
        format!("\"{shard}-{}\"", self.revision_of(shard))
    }

    pub(super) fn pool(&self) -> &File {
        &self.pool
    }

    /// The header of a shard: the length of the JSON, the JSON, blanks.
    pub(super) fn head(&self, shard: u64) -> Vec<u8> {
        let data_bytes = self.shape.shard_bytes - HEAD_BYTES;
        let tensor = format!("model.layers.{shard}.revision.{}.weight", self.revision_of(shard));
        let entry = serde_json::json!({"dtype": "U8", "shape": [data_bytes], "data_offsets": [0, data_bytes]});
        let json = serde_json::json!({tensor: entry}).to_string();
        let mut head = (HEAD_BYTES - 8).to_le_bytes().to_vec();
        head.extend_from_slice(json.as_bytes());
        head.resize(HEAD_BYTES as usize, b' ');
        head
    }

    /// Where the bytes from `at` on are, and how many in a row; not more than up to `end`.
    pub(super) fn piece(&self, shard: u64, at: u64, end: u64) -> Piece {
        if at < HEAD_BYTES {
            return Piece::Head { at, length: end.min(HEAD_BYTES) - at };
        }
        let start = (shard * STRIDE_BYTES + at - HEAD_BYTES) % self.pool_bytes;
        Piece::Pool { at: start, length: (end - at).min(self.pool_bytes - start) }
    }

    fn revision_of(&self, shard: u64) -> u64 {
        if shard == CHANGED_SHARD { self.revision } else { 0 }
    }

    fn sha256_of(&self, shard: u64) -> io::Result<String> {
        let (mut context, mut block) = (lc::Context::new(&lc::SHA256), vec![0; 1 << 20]);
        context.update(&self.head(shard));
        let mut at = HEAD_BYTES;
        while at < self.shape.shard_bytes {
            let end = self.shape.shard_bytes.min(at + block.len() as u64);
            let Piece::Pool { at: start, length } = self.piece(shard, at, end) else {
                unreachable!("behind the header")
            };
            let block = &mut block[..length as usize];
            self.pool.read_exact_at(block, start)?;
            context.update(block);
            at += length;
        }
        Ok(hex::encode(context.finish()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(content: &Content, shard: u64, at: u64, end: u64) -> Vec<u8> {
        let (mut all, mut at) = (Vec::new(), at);
        while at < end {
            match content.piece(shard, at, end) {
                Piece::Head { at: start, length } => {
                    all.extend_from_slice(&content.head(shard)[start as usize..][..length as usize]);
                    at += length;
                }
                Piece::Pool { at: start, length } => {
                    let mut block = vec![0; length as usize];
                    content.pool().read_exact_at(&mut block, start).unwrap();
                    all.append(&mut block);
                    at += length;
                }
            }
        }
        all
    }

    #[test]
    fn a_size_becomes_shards_that_can_be_written_directly() {
        assert_eq!(Shape::of(4_000_000_000, 4), Shape { shards: 4, shard_bytes: 999_997_440 });
        assert_eq!(Shape::of(1, 10).shard_bytes, 8192, "a header and something behind it");
        let names: Vec<String> = Shape::of(1 << 20, 2).names().collect();
        assert_eq!(names, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
    }

    #[test]
    fn every_range_of_a_shard_is_the_same_bytes_and_their_checksum_is_right() {
        let content = Content::generate(Shape { shards: 3, shard_bytes: 64 << 10 }).unwrap();
        let whole: Vec<Vec<u8>> = (0..3).map(|shard| bytes(&content, shard, 0, 64 << 10)).collect();
        assert!(whole[0] != whole[1] && whole[1] != whole[2]);
        for (at, end) in [(0, 1), (4095, 4097), (4096, 8192), (100, 60_000), (65_535, 65_536)] {
            assert_eq!(bytes(&content, 1, at, end), whole[1][at as usize..end as usize], "{at}..{end}");
        }
        let sha256 = hex::encode(lc::digest(&lc::SHA256, &whole[2]));
        assert!(content.listing(true).contains(&sha256));
        assert!(!content.listing(false).contains("sha256"));
        let length = u64::from_le_bytes(whole[0][..8].try_into().unwrap());
        let header: serde_json::Value = serde_json::from_slice(&whole[0][8..8 + length as usize]).unwrap();
        assert_eq!(header["model.layers.0.revision.0.weight"]["data_offsets"][1], (64 << 10) - HEAD_BYTES);
    }

    #[test]
    fn another_revision_has_one_other_shard() {
        let mut content = Content::generate(Shape { shards: 3, shard_bytes: 16 << 10 }).unwrap();
        let mark = |content: &Content| (0..3).map(|shard| content.etag(shard)).collect::<Vec<_>>();
        let (before, marks) = (content.sha256.clone(), mark(&content));
        content.revise().unwrap();
        let changed = |a: &[String], b: &[String]| a.iter().zip(b).filter(|(a, b)| a != b).count();
        assert_eq!((changed(&before, &content.sha256), changed(&marks, &mark(&content))), (1, 1));
    }
}

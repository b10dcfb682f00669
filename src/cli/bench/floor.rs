//! The floor of a cold pull: the least that any program has to do for the same files, in the way that is fastest on a disk
//! that is slower than the network. One stream for each file, received into one small buffer, hashed while it is hot,
//! written around the page cache into blocks that were allocated before, and made durable at the end.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, OFlags, fallocate};
use serde::{Deserialize, Serialize};

use super::content::Shape;
use super::process::Used;
use crate::huge_page::HugePage;

/// Received, hashed and written at a time. Smaller ones make more calls, larger ones leave the cache of the processor.
const BLOCK_BYTES: usize = 1 << 20;

/// What is received, and what is done with it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Receive {
    /// Where an origin serves, below 127.0.0.1.
    pub(super) url: String,
    pub(super) shape: Shape,
    /// Hash and write into this directory; without it, throw away.
    pub(super) into: Option<PathBuf>,
}

/// How that went.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Received {
    /// From the first connection to the last fsync.
    pub(super) took: Duration,
    /// From the last byte that came to the last fsync.
    pub(super) sync: Duration,
    pub(super) used: Used,
}

/// The process itself.
pub(super) fn run(receive: &Receive) -> io::Result<Received> {
    let began = Instant::now();
    let last = std::thread::scope(|scope| {
        let shards = receive.shape.names().map(|name| scope.spawn(move || receive.shard(&name)));
        let threads: Vec<_> = shards.collect();
        threads
            .into_iter()
            .map(|thread| thread.join().expect("a stream does not panic"))
            .try_fold(began, |last, came| Ok::<_, io::Error>(last.max(came?)))
    })?;
    if let Some(directory) = &receive.into {
        File::open(directory)?.sync_all()?;
    }
    let ended = Instant::now();
    let used = Used::by_this_process().map_err(io::Error::other)?;
    Ok(Received { took: ended - began, sync: ended - last, used })
}

impl Receive {
    /// When its last byte had come.
    fn shard(&self, name: &str) -> io::Result<Instant> {
        let (mut stream, mut page) = (self.ask(name)?, HugePage::map()?);
        let block = &mut page[..BLOCK_BYTES];
        let mut held = body_of(&mut stream, block)?;
        let mut file =
            self.into.as_deref().map(|into| directly(&into.join(name), self.shape.shard_bytes)).transpose()?;
        let (mut hasher, mut at) = (blake3::Hasher::new(), 0);
        let mut came;
        loop {
            let want = usize::try_from(self.shape.shard_bytes - at).unwrap_or(BLOCK_BYTES).min(BLOCK_BYTES);
            stream.read_exact(&mut block[held..want])?;
            came = Instant::now();
            if let Some(file) = &mut file {
                hasher.update(&block[..want]);
                file.write_all_at(&block[..want], at)?;
            }
            (at, held) = (at + want as u64, 0);
            if at == self.shape.shard_bytes {
                break;
            }
        }
        if let Some(file) = file {
            std::hint::black_box(hasher.finalize());
            file.sync_all()?;
        }
        Ok(came)
    }

    fn ask(&self, name: &str) -> io::Result<TcpStream> {
        let (address, path) = self.url.trim_start_matches("http://").split_once('/').unwrap_or_default();
        let port = address.rsplit(':').next().and_then(|port| port.parse::<u16>().ok());
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port.ok_or(io::ErrorKind::InvalidInput)?))?;
        stream.write_all(format!("GET /{path}{name} HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes())?;
        Ok(stream)
    }
}

/// Reads the head of an answer; how many bytes of the body came with it, and stand at the start of `block` now.
fn body_of(stream: &mut impl Read, block: &mut [u8]) -> io::Result<usize> {
    let mut came = 0;
    loop {
        came += match stream.read(&mut block[came..8192])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => more,
        };
        if let Some(end) = block[..came].windows(4).position(|four| four == b"\r\n\r\n") {
            if !block.starts_with(b"HTTP/1.1 200 ") {
                return Err(io::Error::other("the origin does not have the file"));
            }
            block.copy_within(end + 4..came, 0);
            return Ok(came - end - 4);
        }
    }
}

/// A new file of so many bytes that is written around the page cache.
pub(super) fn directly(path: &Path, bytes: u64) -> io::Result<File> {
    let direct = OFlags::DIRECT.bits() as i32;
    let file = OpenOptions::new().write(true).create_new(true).custom_flags(direct).open(path).map_err(no_direct)?;
    fallocate(&file, FallocateFlags::empty(), 0, bytes)?;
    Ok(file)
}

/// What a file system says to O_DIRECT that has no such thing.
pub(super) fn no_direct(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::InvalidInput => io::Error::other("this file system takes no O_DIRECT"),
        _ => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_came_with_the_head_is_kept() {
        let mut block = [0; 8192];
        let mut answer: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nbody";
        assert_eq!(body_of(&mut answer, &mut block).unwrap(), 4);
        assert_eq!(&block[..4], b"body");
        assert!(body_of(&mut &b"HTTP/1.1 404 Not Found\r\n\r\n"[..], &mut block).is_err());
        assert!(body_of(&mut &b"HTTP/1.1 200 OK\r\n"[..], &mut block).is_err());
    }
}

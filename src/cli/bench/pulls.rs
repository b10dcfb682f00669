//! Pulls: cold, from a slow source, interrupted, repeated, by many at once, and of another revision.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::content::Shape;
use super::floor::{Receive, Received};
use super::node::Node;
use super::origin::{Origin, Pace, Sent, now};
use super::part::{self, Part, cannot};
use super::row::Row;
use super::{Bench, blocking};
use crate::config::SETTINGS;
use crate::fault::Problem;
use crate::wire::http::PullRequest;

/// Clients that ask at once for one absent model.
const CROWD: usize = 64;
/// The slow source.
const SLOW: Pace = Pace { latency: Duration::from_millis(20), bytes_per_second: 25_000_000 };

/// What a pull took, and of whom.
struct Pulled {
    took: Duration,
    processor: Duration,
    /// From the last byte that the origin sent until the reader had its descriptors.
    last_byte: Duration,
    peak_resident_bytes: u64,
    before: Sent,
    after: Sent,
}

/// The floor and larder in turn, each time in another order.
pub(super) async fn cold(bench: &mut Bench) -> Result<(), Problem> {
    let shape = bench.plan.model;
    let mut origin = Origin::start(shape, None).await?;
    // What happens only once: the origin's pages, our program's.
    receive(bench, &origin, false).await?;
    for round in 0..bench.rounds {
        for turn in 0..4 {
            bench.settle().await?;
            match (round + turn) % 4 {
                0 => {
                    let received = receive(bench, &origin, false).await?;
                    bench.push(Row::Receive, rate(shape, received.took));
                }
                1 => match receive(bench, &origin, true).await {
                    Ok(floor) => {
                        bench.push(Row::Floor, rate(shape, floor.took));
                        bench.push(Row::FloorCpu, of_gigabyte(shape, floor.used.processor));
                        bench.push(Row::FloorSync, millis(floor.sync));
                    }
                    // Where there is no O_DIRECT there is no floor, and larder all the same.
                    Err(problem) => {
                        for row in [Row::Floor, Row::FloorCpu, Row::FloorSync] {
                            bench.fail(row, &problem);
                        }
                    }
                },
                2 => {
                    let pulled = pull(bench, &mut origin, &Origin::plain).await?;
                    bench.push(Row::ColdPull, rate(shape, pulled.took));
                    bench.push(Row::ColdPullCpu, of_gigabyte(shape, pulled.processor));
                    bench.push(Row::LastByte, millis(pulled.last_byte));
                    bench.push(Row::PullMemory, mebibytes(pulled.peak_resident_bytes));
                }
                _ => {
                    let pulled = pull(bench, &mut origin, &Origin::checked).await?;
                    bench.push(Row::CheckedPull, rate(shape, pulled.took));
                    bench.push(Row::CheckedPullCpu, of_gigabyte(shape, pulled.processor));
                    bench.push(Row::PullMemory, mebibytes(pulled.peak_resident_bytes));
                }
            }
        }
    }
    Ok(())
}

async fn receive(bench: &Bench, origin: &Origin, keep: bool) -> Result<Received, Problem> {
    let into = bench.directory("floor")?;
    let (url, shape) = (origin.plain(), origin.shape);
    let received = part::result_of(&Part::Receive(Receive { url, shape, into: keep.then(|| into.clone()) })).await;
    bench.remove(&into)?;
    received
}

/// A pull by a daemon that has just started, on a volume with nothing in it.
async fn pull(bench: &Bench, origin: &mut Origin, model: &dyn Fn(&Origin) -> String) -> Result<Pulled, Problem> {
    let node = Node::start(&bench.place("node")).await?;
    let pulled = pull_by(&node, origin, model).await?;
    node.remove()?;
    let came = pulled.after.body_bytes - pulled.before.body_bytes;
    match came.cmp(&origin.shape.bytes()) {
        std::cmp::Ordering::Less => Err(cannot("a pull ended before all bytes had come")),
        _ => Ok(pulled),
    }
}

async fn pull_by(node: &Node, origin: &mut Origin, model: &dyn Fn(&Origin) -> String) -> Result<Pulled, Problem> {
    let (before, used) = (origin.sent().await?, node.used()?);
    let began = Instant::now();
    let opened = node.open(&model(origin)).await?;
    let (took, opened_at) = (began.elapsed(), now());
    let (after, using) = (origin.sent().await?, node.used()?);
    drop(opened);
    Ok(Pulled {
        took,
        processor: using.processor.saturating_sub(used.processor),
        last_byte: opened_at.saturating_sub(after.last_at),
        peak_resident_bytes: using.peak_resident_bytes,
        before,
        after,
    })
}

/// A source that is far away, and gives little on each connection.
pub(super) async fn slow_source(bench: &mut Bench) -> Result<(), Problem> {
    // Whole: what a pull loses at its beginning and its end does not grow with it.
    let shape = bench.plan.model;
    let mut origin = Origin::start(shape, Some(SLOW)).await?;
    for _ in 0..bench.rounds {
        let pulled = pull(bench, &mut origin, &Origin::plain).await?;
        let link = (connections() * SLOW.bytes_per_second) as f64 / 1e6;
        bench.push(Row::SlowSource, rate(shape, pulled.took) / link);
        bench.push(Row::SlowSourceCpu, of_gigabyte(shape, pulled.processor));
    }
    Ok(())
}

/// Those that a daemon opens to a source at most, unless it is configured otherwise.
fn connections() -> u64 {
    let setting = SETTINGS.iter().find(|setting| setting.key == "pull.connections").expect("a setting");
    setting.default.text().parse().expect("its default is a number")
}

/// A daemon that is killed at half, and the next one that goes on.
pub(super) async fn resume(bench: &mut Bench) -> Result<(), Problem> {
    let shape = bench.plan.model;
    let mut origin = Origin::start(shape, None).await?;
    for _ in 0..bench.rounds {
        bench.settle().await?;
        let before = origin.sent().await?.body_bytes;
        let node = Node::start(&bench.place("node")).await?;
        node.client.pull(&PullRequest::of(origin.checked())).await?;
        origin.sent_at_least(before + shape.bytes() / 2).await?;
        drop(node);
        let node = Node::start(&bench.place("node")).await?;
        node.open(&origin.checked()).await?;
        node.remove()?;
        bench.push(Row::Resume, times(origin.sent().await?.body_bytes - before, shape.bytes()));
    }
    Ok(())
}

/// The same again, when nothing has changed.
pub(super) async fn repull(bench: &mut Bench) -> Result<(), Problem> {
    let mut origin = Origin::start(bench.plan.small, None).await?;
    let node = Node::start(&bench.place("node")).await?;
    node.open(&origin.checked()).await?;
    for _ in 0..bench.rounds {
        let url = origin.checked();
        let took = blocking(move || round_trip(&url)).await?.map_err(|e| cannot(&e.to_string()))?;
        bench.push(Row::RoundTrip, millis(took));
        let before = origin.sent().await?;
        let began = Instant::now();
        node.pulled(&origin.checked()).await?;
        let took = began.elapsed();
        let after = origin.sent().await?;
        bench.push(Row::Repull, millis(took));
        bench.push(Row::RepullRequests, (after.requests - before.requests) as f64);
        bench.push(Row::RepullBytes, (after.body_bytes - before.body_bytes) as f64);
    }
    node.remove()
}

/// Asks for the listing, and receives it.
fn round_trip(url: &str) -> io::Result<Duration> {
    let (address, path) = url.trim_start_matches("http://").split_once('/').unwrap_or_default();
    let port = address.rsplit(':').next().and_then(|port| port.parse::<u16>().ok());
    let began = Instant::now();
    let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port.ok_or(io::ErrorKind::InvalidInput)?))?;
    stream.write_all(format!("GET /{path}larder.json HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes())?;
    let mut answer = vec![0; 64 << 10];
    // The listing of some shards comes in one piece.
    match stream.read(&mut answer)? {
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(began.elapsed()),
    }
}

/// Many clients at once for one absent model.
pub(super) async fn crowd(bench: &mut Bench) -> Result<(), Problem> {
    let shape = bench.plan.small;
    let mut origin = Origin::start(shape, None).await?;
    for _ in 0..bench.rounds {
        let before = origin.sent().await?.body_bytes;
        let node = Node::start(&bench.place("node")).await?;
        let reference = origin.checked();
        let clients = (0..CROWD).map(|_| node.open(&reference));
        let opened: Result<Vec<_>, Problem> = futures::future::join_all(clients).await.into_iter().collect();
        drop(opened?);
        node.remove()?;
        bench.push(Row::Crowd, times(origin.sent().await?.body_bytes - before, shape.bytes()));
    }
    Ok(())
}

/// A revision of which one shard is another one, beside the one that is local.
pub(super) async fn revision(bench: &mut Bench) -> Result<(), Problem> {
    let shape = bench.plan.revised;
    for _ in 0..bench.rounds {
        let mut origin = Origin::start(shape, None).await?;
        let node = Node::start(&bench.place("node")).await?;
        // Who has the first one open keeps it.
        let first = node.open(&origin.checked()).await?;
        let disk_before = disk_bytes(&node.volume()).map_err(|e| cannot(&e.to_string()))?;
        let before = origin.revise().await?.body_bytes;
        node.pulled(&origin.checked()).await?;
        let disk = disk_bytes(&node.volume()).map_err(|e| cannot(&e.to_string()))?;
        drop(first);
        node.remove()?;
        bench.push(Row::RevisionOrigin, times(origin.sent().await?.body_bytes - before, shape.bytes()));
        bench.push(Row::RevisionDisk, 1.0 + times(disk.saturating_sub(disk_before), shape.bytes()));
    }
    Ok(())
}

/// What a directory takes of the disk. A file with several names takes it once.
fn disk_bytes(directory: &Path) -> io::Result<u64> {
    fn sum(directory: &Path, seen: &mut HashSet<u64>) -> io::Result<u64> {
        let mut bytes = 0;
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                bytes += sum(&entry.path(), seen)?;
            } else if seen.insert(metadata.ino()) {
                bytes += metadata.blocks() * 512;
            }
        }
        Ok(bytes)
    }
    sum(directory, &mut HashSet::new())
}

/// MB/s.
fn rate(shape: Shape, took: Duration) -> f64 {
    shape.bytes() as f64 / 1e6 / took.as_secs_f64()
}

fn of_gigabyte(shape: Shape, processor: Duration) -> f64 {
    processor.as_secs_f64() / (shape.bytes() as f64 / 1e9)
}

fn times(bytes: u64, of: u64) -> f64 {
    bytes as f64 / of as f64
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_two_names_takes_the_disk_once() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("below");
        std::fs::create_dir(&below).unwrap();
        std::fs::write(dir.path().join("file"), vec![7; 1 << 20]).unwrap();
        let once = disk_bytes(dir.path()).unwrap();
        std::fs::hard_link(dir.path().join("file"), below.join("link")).unwrap();
        assert_eq!(disk_bytes(dir.path()).unwrap(), once);
        assert!(once >= 1 << 20);
    }
}

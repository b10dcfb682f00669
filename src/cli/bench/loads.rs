//! Loads of a model that is local and of which nothing is resident.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};

use super::disk::Read;
use super::node::{Node, parsed};
use super::origin::Origin;
use super::part::{self, Part, cannot};
use super::row::Row;
use super::{Bench, blocking};
use crate::client::Opener;
use crate::fault::Problem;
use crate::wire::http::{WarmPhase, WarmRequest};
use crate::wire::residency;

/// How often a daemon is asked whether a warm-up has ended.
const ASK_EVERY: Duration = Duration::from_millis(2);
/// A page that is just being used by somebody else, the kernel's own work included, is not dropped: it is tried again.
const MOST_TRIES: u32 = 40;
const TRY_AGAIN_AFTER: Duration = Duration::from_millis(50);

pub(super) async fn loads(bench: &mut Bench) -> Result<(), Problem> {
    let origin = Origin::start(bench.plan.model, None).await?;
    let node = Node::start(&bench.place("node")).await?;
    let reference = origin.plain();
    let model = node.open(&reference).await?;
    let files: Vec<PathBuf> = origin.shape.names().map(|name| Path::new(&model.info().path).join(name)).collect();
    drop(model);
    drop(origin);
    let megabytes = bench.plan.model.bytes() as f64 / 1e6;
    bench.settle().await?;
    for round in 0..bench.rounds {
        for turn in 0..5 {
            drop_pages(&files).await?;
            let (row, read) = match (round + turn) % 5 {
                0 => (Row::DirectRead, read_directly(&files, false).await),
                1 => (Row::DirectReadKept, read_directly(&files, true).await),
                2 => (Row::WarmUp, warm(&node, &reference).await),
                3 => (Row::LoadPlain, load(&node, &reference, &files, false).await),
                _ => (Row::LoadWarm, load(&node, &reference, &files, true).await),
            };
            match (row, read) {
                (Row::LoadPlain | Row::LoadWarm, Ok(took)) => bench.push(row, took.as_secs_f64()),
                (_, Ok(took)) => bench.push(row, megabytes / took.as_secs_f64()),
                (_, Err(problem)) => bench.fail(row, &problem),
            }
        }
    }
    node.remove()
}

async fn read_directly(files: &[PathBuf], keeps: bool) -> Result<Duration, Problem> {
    part::result_of(&Part::ReadDirectly(Read { files: files.to_vec(), keeps })).await
}

async fn warm(node: &Node, reference: &str) -> Result<Duration, Problem> {
    let began = Instant::now();
    let mut status = node.client.warm(&WarmRequest::of(parsed(reference))).await?;
    while !status.phase.is_final() {
        tokio::time::sleep(ASK_EVERY).await;
        status = node.client.warm_status(&status.id).await?;
    }
    match (status.phase, status.error, status.why) {
        (WarmPhase::Warm, ..) => Ok(began.elapsed()),
        (_, Some(error), _) => Err(Problem::from(&error)),
        (_, _, why) => Err(cannot(&why.unwrap_or_else(|| "the warm-up was stopped".to_owned()))),
    }
}

/// Opens, maps every file and touches every page, one after the other, as a loader does.
pub(super) async fn load(node: &Node, reference: &str, files: &[PathBuf], warm: bool) -> Result<Duration, Problem> {
    let opener = Opener::new(&node.socket()).wait(false);
    let opener = if warm { opener.warm() } else { opener };
    let reference = parsed(reference);
    let names: Vec<String> =
        files.iter().filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned())).collect();
    blocking(move || {
        let began = Instant::now();
        let model = opener.open_blocking(&reference)?;
        for name in names {
            let map = model.mmap(&name)?;
            let page = rustix::param::page_size();
            std::hint::black_box(map.iter().step_by(page).fold(0u64, |sum, byte| sum + u64::from(*byte)));
        }
        Ok(began.elapsed())
    })
    .await?
}

/// Makes the model cold again. No privilege is needed for that: the pages are clean, and nobody maps them.
pub(super) async fn drop_pages(files: &[PathBuf]) -> Result<(), Problem> {
    for _ in 0..MOST_TRIES {
        if dropped(files).await? == 0 {
            return Ok(());
        }
        tokio::time::sleep(TRY_AGAIN_AFTER).await;
    }
    match dropped(files).await? {
        0 => Ok(()),
        left => Err(cannot(&format!("{left} bytes of the model cannot be dropped from the page cache"))),
    }
}

/// Bytes that are left.
async fn dropped(files: &[PathBuf]) -> Result<u64, Problem> {
    let files = files.to_vec();
    let left = blocking(move || {
        files.iter().try_fold(0, |left, path| {
            let file = File::open(path)?;
            fadvise(&file, 0, None, Advice::DontNeed)?;
            let size = file.metadata()?.len();
            Ok::<_, std::io::Error>(left + residency::resident_bytes(&file, size).unwrap_or(0))
        })
    });
    left.await?.map_err(|e| cannot(&e.to_string()))
}

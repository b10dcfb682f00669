//! `larder bench`: what this node gives, and what larder makes of it, beside each other in one run.
//!
//! What is compared is done in turn, in another order each round, on the same disk and against the same origin; what
//! counts is the ratio of each pair, and the median of those. docs/performance.md says what each row means.

mod beside;
mod content;
mod descriptors;
pub(super) mod disk;
mod floor;
mod idle;
mod loads;
pub(super) mod machine;
mod node;
mod opens;
mod origin;
mod part;
mod plan;
mod process;
mod pulls;
mod report;
mod row;
mod statistics;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use clap::Args;

use super::report::{json, out, say};
use super::scratch::{self, Scratch};
use super::{Cli, interruption};
use crate::cache::KUBELET_DIRECTORY;
use crate::config::Config;
use crate::fault::{Code, Diagnose, Problem};
use crate::model::Bytes;
use crate::store::{Space, share_a_disk};
use disk::Write;
use part::{Part, cannot};
use plan::{LEAST_BYTES, Plan, Room};
use report::{Readings, Report};
use row::{Row, Section};
use statistics::Samples;

pub(super) use part::be;

/// The longest path a Unix socket can be bound to, in bytes, less the names we give below a scratch directory.
const MAX_PLACE_BYTES: usize = 107 - "/node/s".len();
/// Written to find out how fast the disk is; more does not make it truer.
const MAX_WRITTEN_BYTES: u64 = 1_000_000_000;

/// The words of `larder bench`.
#[derive(Debug, Args)]
pub(super) struct Words {
    /// A directory on the disk to measure: of an existing volume its root, else the current one
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    dir: Option<PathBuf>,
    /// The size of the model that is pulled; less is taken where less fits
    #[arg(long, default_value = "4GB", value_name = "SIZE", value_parser = size)]
    size: Bytes,
    /// How often everything is measured; what is printed is the median
    #[arg(long, default_value_t = 5, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Measure only this row; may be repeated
    #[arg(long, value_enum, value_name = "ROW", hide_possible_values = true)]
    only: Vec<Row>,
    /// Print one JSON object instead of the table
    #[arg(long)]
    pub(super) json: bool,
}

fn size(text: &str) -> Result<Bytes, String> {
    match text.parse()? {
        Bytes(bytes @ 1_000_000..=1_000_000_000_000) => Ok(Bytes(bytes)),
        _ => Err("it is not from 1MB to 1TB".to_owned()),
    }
}

/// Why nothing can be measured.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot measure in `{}`: {found}", directory.display())]
    Place { directory: PathBuf, found: String },
    #[error("cannot measure in `{}`: {found} free and not left to others, {} are needed", directory.display(), Bytes(LEAST_BYTES * 2))]
    NoRoom { directory: PathBuf, found: String },
    #[error("cannot finish the benchmark: interrupted")]
    Stopped,
}

impl Diagnose for Error {
    fn code(&self) -> Code {
        match self {
            Error::Place { .. } => Code::DiskError,
            Error::NoRoom { .. } => Code::VolumeFull,
            Error::Stopped => Code::BenchStopped,
        }
    }

    fn action(&self) -> String {
        match self {
            Error::Place { .. } => "name a directory that you may write to, with a short path, with `--dir`".to_owned(),
            Error::NoRoom { .. } => {
                "free some, ask for less with `--size`, or name another disk with `--dir`".to_owned()
            }
            Error::Stopped => "`larder bench` begins again; `--only ROW` and `--rounds 1` make it shorter".to_owned(),
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Problem {
        Problem::of(&error)
    }
}

/// A measurement under way.
struct Bench {
    plan: Plan,
    rounds: u32,
    scratch: Scratch,
    readings: Readings,
}

/// Measures, and prints what it finds. Nothing is left behind, also when it is interrupted.
pub(super) async fn run(cli: &Cli, words: &Words) -> Result<(), Problem> {
    let config = cli.load()?;
    let directory = match &words.dir {
        Some(directory) => directory.clone(),
        None => usual_directory(&config)?,
    };
    let place = |found: String| Error::Place { directory: directory.clone(), found };
    let plan = Plan::new(words.size.0, room(&config, &directory).map_err(|e| place(e.to_string()))?);
    let plan = plan.ok_or_else(|| {
        let found = room(&config, &directory).map_or_else(|e| e.to_string(), |room| Bytes(room.disk_bytes).to_string());
        Error::NoRoom { directory: directory.clone(), found }
    })?;
    let absolute = std::path::absolute(&directory).map_err(|e| place(e.to_string()))?;
    let scratch = Scratch::below(&absolute, "larder-bench").map_err(|e| place(e.to_string()))?;
    if scratch.path().as_os_str().len() > MAX_PLACE_BYTES {
        return Err(place("its path is too long for a socket in it".to_owned()).into());
    }
    let mut bench = Bench { plan, rounds: words.rounds, scratch, readings: Readings::default() };
    tokio::select! {
        () = bench.measure(&words.only, cli.quiet) => {}
        () = interruption() => return Err(Error::Stopped.into()),
    }
    let report = bench.report(&words.only);
    drop(bench);
    Ok(out(&if words.json { json(&report) } else { report::text(&report) })?)
}

/// The disk that models are on, or will be.
fn usual_directory(config: &Config) -> Result<PathBuf, Problem> {
    let root = &config.volume.root;
    if root.join("FORMAT").exists() {
        return Ok(root.clone());
    }
    let here = std::env::current_dir();
    Ok(here.map_err(|e| Error::Place { directory: ".".into(), found: e.to_string() })?)
}

/// What may be taken: never so much that a daemon on this disk would begin to evict.
fn room(config: &Config, directory: &Path) -> std::io::Result<Room> {
    let space = Space::at(directory)?;
    let beside_kubelet = config.cache().in_kubernetes || share_a_disk(Path::new(KUBELET_DIRECTORY), directory);
    let left = config.volume.limits.min_free.on(space.total_bytes, beside_kubelet);
    Ok(Room { disk_bytes: space.free_bytes.saturating_sub(left), memory_bytes: machine::free_memory_bytes() })
}

impl Bench {
    async fn measure(&mut self, only: &[Row], quiet: bool) {
        let rows = if only.is_empty() { Row::ALL } else { only };
        let sections: BTreeSet<Section> = rows.iter().map(|row| row.facts().section).collect();
        for section in sections {
            if !quiet {
                say(&format!("measuring {}", names_of(section).join(", ")));
            }
            let done = match section {
                Section::Processor => self.processor().await,
                Section::Disk => self.disk().await,
                Section::ColdPull => pulls::cold(self).await,
                Section::SlowSource => pulls::slow_source(self).await,
                Section::Resume => pulls::resume(self).await,
                Section::Repull => pulls::repull(self).await,
                Section::Crowd => pulls::crowd(self).await,
                Section::Revision => pulls::revision(self).await,
                Section::Opens => opens::opens(self).await,
                Section::Loads => loads::loads(self).await,
                Section::Beside => beside::beside(self).await,
                Section::Idle => idle::idle(self).await,
            };
            if let Err(problem) = done {
                // What one could not do does not keep the others from being measured.
                for row in Row::ALL.iter().filter(|row| row.facts().section == section) {
                    self.fail(*row, &problem);
                }
            }
            self.clear();
        }
    }

    async fn processor(&mut self) -> Result<(), Problem> {
        for _ in 0..self.rounds {
            self.push(Row::Blake3, blocking(machine::blake3_rate).await?);
            self.push(Row::Sha256, blocking(machine::sha256_rate).await?);
        }
        Ok(())
    }

    async fn disk(&mut self) -> Result<(), Problem> {
        for _ in 0..self.rounds {
            self.settle().await?;
            let directory = self.directory("written")?;
            let bytes = self.plan.model.bytes().min(MAX_WRITTEN_BYTES);
            let write = Write { directory: directory.clone(), bytes };
            let bytes = write.total_bytes() as f64;
            let took: std::time::Duration = part::result_of(&Part::WriteDirectly(write)).await?;
            self.remove(&directory)?;
            self.push(Row::DirectWrite, bytes / 1e6 / took.as_secs_f64());
        }
        Ok(())
    }

    fn push(&mut self, row: Row, value: f64) {
        self.readings.push(row, value);
    }

    /// Of many readings of one round, in seconds; so many hundredths, in the unit of the row.
    fn push_percentile(&mut self, row: Row, samples: &Samples, hundredths: usize, units: f64) {
        if let Some(seconds) = samples.percentile(hundredths) {
            self.push(row, seconds * units);
        }
    }

    fn fail(&mut self, row: Row, problem: &Problem) {
        self.readings.fail(row, problem.message.trim_start_matches("cannot measure: "));
    }

    /// A name that nothing has yet.
    fn place(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// A directory with nothing in it.
    fn directory(&self, name: &str) -> Result<PathBuf, Problem> {
        let path = self.place(name);
        std::fs::create_dir(&path).map_err(|e| cannot(&format!("{}: {e}", path.display())))?;
        Ok(path)
    }

    fn remove(&self, directory: &Path) -> Result<(), Problem> {
        scratch::remove(directory).map_err(|e| cannot(&format!("{}: {e}", directory.display())))
    }

    /// Waits until the disk has done what was asked of it before: what follows would pay for it.
    async fn settle(&self) -> Result<(), Problem> {
        let path = self.scratch.path().to_owned();
        let settled = blocking(move || rustix::fs::syncfs(std::fs::File::open(path)?).map_err(std::io::Error::from));
        settled.await?.map_err(|e| cannot(&e.to_string()))
    }

    /// What a section that failed has left.
    fn clear(&self) {
        for entry in std::fs::read_dir(self.scratch.path()).into_iter().flatten().flatten() {
            let path = entry.path();
            // What cannot be removed now is removed, or named, at the end.
            let _ = if path.is_dir() { scratch::remove(&path) } else { std::fs::remove_file(&path) };
        }
    }

    fn report(&self, only: &[Row]) -> Report {
        Report {
            larder: env!("CARGO_PKG_VERSION"),
            machine: machine::machine(self.scratch.path()),
            size_bytes: self.plan.model.bytes(),
            shards: self.plan.model.shards,
            rounds: self.rounds,
            notes: self.plan.notes.clone(),
            rows: report::lines(&self.readings, only),
        }
    }
}

fn names_of(section: Section) -> Vec<String> {
    Row::ALL.iter().filter(|row| row.facts().section == section).map(|row| row.name()).collect()
}

/// Does work on a thread that may wait, so that an interruption is noticed meanwhile.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Problem::of(&super::Error::Bug { why: e.to_string() }))
}

//! Opens of a model that is local and resident: beside the least that can be done, and by many at once.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::RwLock;
use std::time::{Duration, Instant};

use super::content::Shape;
use super::descriptors::{BareClient, Opened, fetch_bare};
use super::node::{Node, parsed};
use super::origin::Origin;
use super::part::{Helper, OURSELVES, Part, cannot};
use super::plan::SHARDS;
use super::row::Row;
use super::statistics::Samples;
use super::{Bench, blocking};
use crate::client::Opener;
use crate::fault::Problem;
use crate::serve::fd::raise_descriptor_limit;

/// Of each kind, in each round.
const OPENS: usize = 1000;
/// Processes of each kind, in each round.
const COMMANDS: usize = 100;
/// Clients at once.
const CROWD: usize = 1000;
/// Descriptors that one of them holds: its connection, and the shards.
const DESCRIPTORS_EACH: u64 = 1 + SHARDS;
/// What an open costs does not depend on it.
const SHARD_BYTES: u64 = 1 << 20;
/// Enough for a client, which needs little: a thousand of the usual size are much to reserve.
const STACK_BYTES: usize = 256 << 10;

/// What is opened, and where.
#[derive(Clone)]
struct Target {
    /// Of the commands: an ordinary user needs one.
    home: PathBuf,
    socket: PathBuf,
    reference: String,
    /// Where the process listens that only hands out descriptors.
    bare_socket: PathBuf,
}

/// What one of a crowd does.
type Opening = fn(&Target) -> Result<Opened, Problem>;

pub(super) async fn opens(bench: &mut Bench) -> Result<(), Problem> {
    let descriptors = raise_descriptor_limit();
    let origin = Origin::start(Shape { shards: SHARDS, shard_bytes: SHARD_BYTES }, None).await?;
    let home = bench.place("node");
    let node = Node::start(&home).await?;
    let target = Target { home, socket: node.socket(), reference: origin.plain(), bare_socket: bench.place("d") };
    let model = node.open(&target.reference).await?;
    let files = origin.shape.names().map(|name| Path::new(&model.info().path).join(name)).collect();
    drop(model);
    let mut helper = Helper::start(&Part::Descriptors { socket: target.bare_socket.clone(), files })?;
    helper.heard::<()>().await?;
    for _ in 0..bench.rounds {
        one_after_the_other(bench, &target).await?;
        commands(bench, &target).await?;
        let crowds: [(Opening, Row); 2] = [(bare_descriptors, Row::DescriptorsCrowd), (bare_open, Row::OpenCrowd)];
        for (open, row) in crowds {
            match at_once(&target, descriptors, open).await {
                Ok(samples) => bench.push_percentile(row, &samples, 99, 1e3),
                Err(problem) => bench.fail(row, &problem),
            }
        }
    }
    drop(helper);
    node.remove()
}

async fn one_after_the_other(bench: &mut Bench, target: &Target) -> Result<(), Problem> {
    type Kind = fn(&Target) -> Result<Duration, Problem>;
    let kinds: [(Kind, Row, Row); 3] = [
        (descriptors_alone, Row::Descriptors, Row::DescriptorsP99),
        (by_client, Row::Open, Row::OpenP99),
        (by_bare_client, Row::OpenBare, Row::OpenBareP99),
    ];
    for (open, p50, p99) in kinds {
        let target = target.clone();
        let samples = blocking(move || (0..OPENS).map(|_| seconds(open(&target))).collect::<Result<Samples, _>>());
        let samples = samples.await??;
        bench.push_percentile(p50, &samples, 50, 1e6);
        bench.push_percentile(p99, &samples, 99, 1e6);
    }
    Ok(())
}

fn descriptors_alone(target: &Target) -> Result<Duration, Problem> {
    let began = Instant::now();
    bare_descriptors(target)?.touch().map_err(|e| cannot(&format!("a file cannot be mapped: {e}")))?;
    Ok(began.elapsed())
}

fn bare_descriptors(target: &Target) -> Result<Opened, Problem> {
    fetch_bare(&target.bare_socket).map_err(|e| cannot(&format!("descriptors did not come: {e}")))
}

fn bare_open(target: &Target) -> Result<Opened, Problem> {
    BareClient::new(&target.socket, &target.reference).open(SHARDS as usize)
}

fn by_client(target: &Target) -> Result<Duration, Problem> {
    let reference = parsed(&target.reference);
    let opener = Opener::new(&target.socket).wait(false);
    let began = Instant::now();
    let model = opener.open_blocking(&reference)?;
    let took = began.elapsed();
    drop(model);
    Ok(took)
}

fn by_bare_client(target: &Target) -> Result<Duration, Problem> {
    let client = BareClient::new(&target.socket, &target.reference);
    let began = Instant::now();
    let opened = client.open(SHARDS as usize)?;
    opened.touch().map_err(|e| cannot(&format!("a file cannot be mapped: {e}")))?;
    Ok(began.elapsed())
}

async fn commands(bench: &mut Bench, target: &Target) -> Result<(), Problem> {
    let target = target.clone();
    let samples = blocking(move || {
        let (mut floor, mut open) = (Samples::default(), Samples::default());
        for _ in 0..COMMANDS {
            floor.push(seconds(ended(&mut Command::new("/bin/true")))?);
            let mut command = Command::new(OURSELVES);
            command.args(["open", &target.reference]).env_clear();
            command.env("HOME", &target.home).env("LARDER_SOCKET", &target.socket);
            open.push(seconds(ended(&mut command))?);
        }
        Ok::<_, Problem>((floor, open))
    });
    let (floor, open) = samples.await??;
    bench.push_percentile(Row::Process, &floor, 50, 1e3);
    bench.push_percentile(Row::OpenCommand, &open, 50, 1e3);
    bench.push_percentile(Row::OpenCommandP99, &open, 99, 1e3);
    Ok(())
}

fn ended(command: &mut Command) -> Result<Duration, Problem> {
    let began = Instant::now();
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status();
    let took = began.elapsed();
    match status {
        Ok(status) if status.success() => Ok(took),
        Ok(status) => Err(cannot(&format!("{:?} ended with {status}", command.get_program()))),
        Err(error) => Err(cannot(&format!("{:?} cannot be started: {error}", command.get_program()))),
    }
}

/// Each client keeps what it has until all have it.
async fn at_once(target: &Target, descriptor_limit: u64, open: Opening) -> Result<Samples, Problem> {
    let needed = CROWD as u64 * DESCRIPTORS_EACH + 64;
    if descriptor_limit < needed {
        return Err(cannot(&format!("{CROWD} clients need {needed} descriptors, and {descriptor_limit} may be open")));
    }
    let target = target.clone();
    blocking(move || {
        // Held until all have been started, and so begin at the same moment; or until one could not be, and none begins.
        let all_started = RwLock::new(false);
        std::thread::scope(|scope| {
            let mut gate = all_started.write().expect("nobody panics with it");
            let client = || {
                let began = all_started.read().expect("nobody panics with it").then(Instant::now)?;
                let opened = open(&target);
                Some(opened.map(|opened| (began.elapsed(), opened)))
            };
            let start = |_| std::thread::Builder::new().stack_size(STACK_BYTES).spawn_scoped(scope, client);
            let threads: Result<Vec<_>, _> = (0..CROWD).map(start).collect();
            *gate = threads.is_ok();
            drop(gate);
            let threads = threads.map_err(|e| cannot(&format!("{CROWD} threads cannot be started: {e}")))?;
            let ended = threads.into_iter().filter_map(|thread| thread.join().expect("a client does not panic"));
            let opened: Vec<_> = ended.collect::<Result<_, Problem>>()?;
            Ok(opened.iter().map(|(took, _)| took.as_secs_f64()).collect())
        })
    })
    .await?
}

fn seconds(took: Result<Duration, Problem>) -> Result<f64, Problem> {
    took.map(|took| took.as_secs_f64())
}

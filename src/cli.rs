//! Words to one call: the commands, what they print, and their exit codes.
//!
//! With a daemon on the socket a command asks it; without one it works in this process, on the same volume. Results go
//! to standard output, everything else to standard error, so that scripts can use the one and people see the other.

mod bench;
mod demo;
mod doctor;
mod door;
mod evict;
mod init;
pub mod kubectl;
mod leases;
mod mounts;
mod open;
mod pins;
mod prepare;
mod progress;
mod report;
mod scratch;
mod scrub;
mod socket;
mod table;
mod warm;
mod why;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::builder::PossibleValuesParser;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use tokio::time::Instant;

use crate::config::{Config, Flags, SETTINGS, Surroundings};
use crate::daemon;
use crate::fault::{Code, Diagnose, Problem};
use crate::heap;
use crate::model::{Bytes, ModelId, ModelRef};
use crate::wire::http::{ModelInfo, ModelList, Phase, PullList, PullStatus};

use door::Door;
use evict::Evict;
use init::Init;
use open::Open;
use prepare::Prepare;
use progress::{Followed, Reporter};
use report::{json, out, say};
use scrub::Scrub;
use table::Align;
use why::Why;

/// Most threads that run tasks; the disk and the digests have threads of their own.
const MAX_WORKERS: usize = 4;
/// Longest wait for a blocking call that still runs when a command has ended.
const LAST_CALLS: Duration = Duration::from_secs(5);

/// A node-local model cache: makes a model local once, proves every byte, and hands it to any number of readers.
#[derive(Debug, Parser)]
#[command(name = "larder", version, propagate_version = true, max_term_width = 120)]
#[command(after_help = "Exit codes and examples are in docs/cli.md, every setting is in docs/configuration.md.")]
pub struct Cli {
    /// The configuration file; it must be there
    #[arg(long, global = true, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    config: Option<PathBuf>,
    /// The directory of the volume (setting `volume.root`)
    #[arg(long, global = true, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    root: Option<String>,
    /// The socket of the daemon (setting `serve.socket`); one must answer there
    #[arg(long, global = true, value_name = "PATH", value_hint = clap::ValueHint::FilePath)]
    socket: Option<String>,
    /// Show no progress
    #[arg(short, long, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon
    Serve,
    /// Make the directories that the daemon needs, and give them to the user who will run it
    Prepare(Prepare),
    /// Make a model local, and print its directory
    Pull(Pull),
    /// List the models that are local
    #[command(visible_alias = "ls")]
    List(Rendering),
    /// Print the directory of a model that is local
    Open(Open),
    /// Make models usable in directories of a pod: the command of an init container
    Init(Init),
    /// Bring a model into memory, and print how much of it is there
    Warm(Warm),
    /// Remove a model
    #[command(visible_alias = "rm")]
    Remove(Remove),
    /// Make room: evict what was used least recently and nobody uses
    Evict(Evict),
    /// List what was evicted, and why
    History(Rendering),
    /// List who uses which model
    Leases(Rendering),
    /// Release a lease
    Release(Release),
    /// List the references that are kept
    Pins(Rendering),
    /// Keep a reference: pull it if it is not local, and never let it go by itself
    Pin(PinWords),
    /// Take a pin back; the model stays until it is removed
    Unpin(PinWords),
    /// Read every blob from the disk, and say which are not right
    Scrub(Scrub),
    /// List the pulls of the daemon
    Pulls(Rendering),
    /// Say why a start was slow, part by part, or why a model is not here
    Why(Why),
    /// Stop a pull, a warm-up or a scrub of the daemon; its bytes stay
    Cancel(Cancel),
    /// Say how this node is, and what could be better
    Doctor(doctor::Words),
    /// Look at the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Print the completions for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// Show what larder does, on this machine alone: no network, no token, nothing left behind
    Demo,
    /// Measure this node, and larder on it: a table of ratios
    Bench(bench::Words),
    /// A process of `larder bench`
    #[command(hide = true)]
    BenchPart {
        /// Which one, as JSON
        part: String,
    },
}

#[derive(Debug, Args)]
struct Pull {
    #[command(flatten)]
    target: Target,
    /// Leave the pull to the daemon and print its id
    #[arg(long, conflicts_with = "wait")]
    detach: bool,
    /// Wait until the model is there (the default)
    #[arg(long)]
    wait: bool,
    /// Pin the reference too, as `larder pin` does
    #[arg(long)]
    pin: bool,
    /// Bring it into memory when it is there
    #[arg(long)]
    warm: bool,
    #[command(flatten)]
    rendering: Rendering,
}

#[derive(Debug, Args)]
struct Warm {
    #[command(flatten)]
    target: Target,
    /// Leave the warm-up to the daemon and print its id
    #[arg(long, conflicts_with = "wait")]
    detach: bool,
    /// Wait until it has ended (the default)
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    rendering: Rendering,
}

#[derive(Debug, Args)]
struct Remove {
    /// A reference (all its versions), or the id of one version
    #[arg(value_name = "REF|ID")]
    name: String,
    #[command(flatten)]
    rendering: Rendering,
}

#[derive(Debug, Args)]
struct Release {
    /// The id, as `larder leases` shows it
    id: String,
    #[command(flatten)]
    rendering: Rendering,
}

/// The words of `larder pin` and `larder unpin`.
#[derive(Debug, Args)]
struct PinWords {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    rendering: Rendering,
}

#[derive(Debug, Args)]
struct Cancel {
    /// The id, as `larder pulls` shows it or `larder warm --detach` prints it
    id: String,
    #[command(flatten)]
    rendering: Rendering,
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print every value and who said it
    Show {
        /// Print only the value of this key
        #[arg(value_parser = PossibleValuesParser::new(SETTINGS.iter().map(|s| s.key)), hide_possible_values = true)]
        key: Option<String>,
        #[command(flatten)]
        rendering: Rendering,
    },
    /// Print `ok`, or every mistake
    Check {
        /// The file, instead of the one that would be read
        #[arg(value_hint = clap::ValueHint::FilePath)]
        file: Option<PathBuf>,
    },
}

/// A model, and which files of it.
#[derive(Debug, Args)]
struct Target {
    /// What to make local: `hf://org/name@revision`, `s3://bucket/prefix`, `https://host/file`, …
    #[arg(value_name = "REF")]
    reference: String,
    /// Take only files that match; may be repeated
    #[arg(long, value_name = "PATTERN")]
    include: Vec<String>,
    /// Leave files that match; may be repeated
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
}

impl Target {
    fn parse(&self) -> Result<ModelRef, Problem> {
        ModelRef::parse_with(&self.reference, &self.include, &self.exclude).map_err(|error| Problem::of(&error))
    }
}

#[derive(Debug, Args)]
struct Rendering {
    /// How the result is printed
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

/// How results and errors are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Table,
    /// For programs: the bodies of the HTTP API
    Json,
}

/// What kind of job a command follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Pull,
    WarmUp,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::Pull => "pull",
            Kind::WarmUp => "warm-up",
        })
    }
}

/// What goes wrong between the words and the call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Error {
    #[error("cannot reach the daemon: nobody answers on `{}`", socket.display())]
    Unreachable { socket: PathBuf },
    #[error("cannot leave the {job} of `{reference}` to the daemon: nobody answers on `{}`", socket.display())]
    NobodyToLeaveItTo { job: Kind, reference: String, socket: PathBuf },
    #[error("cannot wait for `{reference}`: interrupted at {percent} %; the {job} goes on in the daemon")]
    StoppedWaiting { job: Kind, reference: String, percent: u8, id: String },
    #[error("cannot pull `{reference}`: interrupted at {percent} %; the bytes so far stay")]
    StoppedPulling { reference: String, percent: u8 },
    #[error("cannot pull `{reference}`: it was cancelled")]
    Cancelled { reference: String },
    #[error("cannot take a lease for this pod: {} {} not set", missing.join(", "), if missing.len() == 1 { "is" } else { "are" })]
    NoPod { missing: Vec<&'static str> },
    #[error("cannot wait for the scrub: interrupted; it goes on in the daemon")]
    StoppedWatchingScrub { id: String },
    #[error("cannot finish the scrub: it was stopped")]
    StoppedScrubbing,
    #[error("cannot vouch for the volume: of {read}, {wrong} blobs are not right")]
    Scrubbed { wrong: u64, read: String },
    #[error("cannot warm `{reference}`: it was cancelled; what is resident stays")]
    StoppedWarming { reference: String },
    #[error("cannot follow the {job} of `{reference}`: nothing more is heard of it")]
    Lost { job: Kind, reference: String },
    #[error("cannot call this node well: {problems} problem{}, the first: {first}", if *problems == 1 { "" } else { "s" })]
    Unwell { problems: usize, first: String, code: Code },
    #[error("cannot write the result: {why}")]
    Output { why: String },
    #[error("cannot start the program: {why}")]
    Start { why: String },
    #[error("cannot finish the command: {why}")]
    Bug { why: String },
}

impl Diagnose for Error {
    fn code(&self) -> Code {
        match self {
            Error::Unreachable { .. } | Error::NobodyToLeaveItTo { .. } | Error::Lost { .. } => Code::DaemonUnreachable,
            Error::StoppedWaiting { job: Kind::Pull, .. } | Error::StoppedPulling { .. } | Error::Cancelled { .. } => {
                Code::PullCancelled
            }
            Error::NoPod { .. } => Code::BadRequest,
            Error::StoppedWaiting { job: Kind::WarmUp, .. } | Error::StoppedWarming { .. } => Code::WarmCancelled,
            Error::Unwell { code, .. } => *code,
            Error::StoppedWatchingScrub { .. } | Error::StoppedScrubbing => Code::PullCancelled,
            Error::Scrubbed { .. } => Code::StoreCorrupt,
            Error::Output { .. } => Code::DiskError,
            Error::Start { .. } | Error::Bug { .. } => Code::InternalError,
        }
    }

    fn action(&self) -> String {
        match self {
            Error::Unreachable { .. } => {
                "start `larder serve`; without `--socket` and `LARDER_SOCKET`, `pull`, `open`, \
                                          `list` and `remove` need no daemon"
                    .to_owned()
            }
            Error::NobodyToLeaveItTo { .. } => "start `larder serve`, or leave out `--detach`".to_owned(),
            Error::StoppedWaiting { id, .. } => format!("`larder cancel {id}` stops it"),
            Error::StoppedPulling { reference, .. } | Error::Cancelled { reference } => {
                format!("`larder pull '{reference}'` goes on from there")
            }
            Error::NoPod { .. } => {
                "set them from the downward API: `env: [{name: POD_UID, valueFrom: {fieldRef: {fieldPath: metadata.uid}}}, …]` \
                 (metadata.namespace, metadata.name)"
                    .to_owned()
            }
            Error::StoppedWatchingScrub { id } => format!("`larder cancel {id}` stops it"),
            Error::StoppedScrubbing => "`larder scrub` begins again".to_owned(),
            Error::Scrubbed { .. } => {
                "look for disk errors (`dmesg`); what is wrong is in quarantine, and models that list it are pulled again \
                 (`larder pulls`)"
                    .to_owned()
            }
            Error::StoppedWarming { reference } => format!("`larder warm '{reference}'` goes on from there"),
            Error::Lost { .. } => "run the command again: it goes on from there".to_owned(),
            Error::Unwell { code: Code::DaemonUnreachable, .. } => "start `larder serve`".to_owned(),
            Error::Unwell { .. } => "do what is said there, or look at the log of the daemon; docs/operations.md says more".to_owned(),
            Error::Output { .. } => "look at where standard output goes".to_owned(),
            Error::Start { .. } => "look at the limits of this process: threads, open files".to_owned(),
            Error::Bug { .. } => "report it, with the output of the command".to_owned(),
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Problem {
        Problem::of(&error)
    }
}

impl Cli {
    fn flags(&self) -> Flags {
        Flags { config: self.config.clone(), root: self.root.clone(), socket: self.socket.clone() }
    }

    fn load(&self) -> Result<Config, Problem> {
        Config::load(&self.flags(), &Surroundings::of_process()).map_err(|error| Problem::of(&error))
    }

    fn reporter(&self) -> Reporter {
        Reporter::for_stderr(self.quiet, is_terminal())
    }

    fn output(&self) -> Output {
        match &self.command {
            Command::Pull(Pull { rendering, .. })
            | Command::List(rendering)
            | Command::Evict(Evict { rendering, .. })
            | Command::History(rendering)
            | Command::Leases(rendering)
            | Command::Release(Release { rendering, .. })
            | Command::Pins(rendering)
            | Command::Pin(PinWords { rendering, .. })
            | Command::Unpin(PinWords { rendering, .. })
            | Command::Scrub(Scrub { rendering, .. })
            | Command::Open(Open { rendering, .. })
            | Command::Warm(Warm { rendering, .. })
            | Command::Remove(Remove { rendering, .. })
            | Command::Why(Why { rendering, .. })
            | Command::Pulls(rendering)
            | Command::Doctor(doctor::Words { rendering, .. })
            | Command::Cancel(Cancel { rendering, .. })
            | Command::Config(ConfigCommand::Show { rendering, .. }) => rendering.output,
            Command::Bench(bench::Words { json: true, .. }) => Output::Json,
            Command::Serve
            | Command::Prepare(_)
            | Command::Init(_)
            | Command::Config(ConfigCommand::Check { .. })
            | Command::Completions { .. }
            | Command::Demo
            | Command::Bench(_)
            | Command::BenchPart { .. } => Output::Table,
        }
    }
}

/// Whether standard error is a terminal that can draw.
fn is_terminal() -> bool {
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    std::io::stderr().is_terminal() && !dumb
}

/// Does what the words say.
pub fn run(cli: &Cli) -> Result<(), Problem> {
    if matches!(cli.command, Command::Serve) {
        // Before there are threads.
        heap::share();
    }
    block_on(obey(cli))
}

/// Runs a command to its end.
fn block_on(command: impl Future<Output = Result<(), Problem>>) -> Result<(), Problem> {
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_WORKERS);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(workers).enable_all().build();
    let runtime = runtime.map_err(|error| Error::Start { why: error.to_string() })?;
    let done = runtime.block_on(command);
    runtime.shutdown_timeout(LAST_CALLS);
    done
}

/// Tells standard error what went wrong, and the exit code that belongs to it.
pub fn report(cli: &Cli, problem: &Problem) -> ExitCode {
    report::error(problem, cli.output());
    match cli.command {
        // Who starts init containers knows only that it failed, and asks for the last lines of the log.
        Command::Init(_) => ExitCode::FAILURE,
        _ => ExitCode::from(problem.fault().exit_code()),
    }
}

async fn obey(cli: &Cli) -> Result<(), Problem> {
    let output = cli.output();
    match &cli.command {
        Command::Serve => daemon::run(&cli.load()?, || cli.load()).await,
        Command::Prepare(words) => prepare::run(&cli.load()?, words),
        Command::Pull(pull) => self::pull(cli, pull).await,
        Command::List(_) => list(&cli.load()?, output).await,
        Command::Open(open) => open::run(cli, open).await,
        Command::Init(init) => init::run(init, cli.socket.as_deref().map(Path::new), cli.quiet).await,
        Command::Warm(warm) => self::warm::warm(cli, warm).await,
        Command::Remove(remove) => self::remove(&cli.load()?, &remove.name, output).await,
        Command::Evict(words) => evict::evict(&cli.load()?, words).await,
        Command::History(_) => evict::history(&cli.load()?, output).await,
        Command::Leases(_) => leases::list(&cli.load()?, output).await,
        Command::Release(Release { id, .. }) => leases::release(&cli.load()?, id, output).await,
        Command::Pins(_) => pins::list(&cli.load()?, output).await,
        Command::Pin(words) => pins::pin(cli, words).await,
        Command::Unpin(words) => pins::unpin(cli, words).await,
        Command::Scrub(words) => scrub::run(cli, words).await,
        Command::Pulls(_) => pulls(&cli.load()?, output).await,
        Command::Why(words) => self::why::run(cli, words).await,
        Command::Cancel(Cancel { id, .. }) => cancel(&cli.load()?, id, output).await,
        Command::Doctor(words) => doctor::run(&cli.load()?, words).await,
        Command::Config(ConfigCommand::Show { key, .. }) => show(&cli.load()?, key.as_deref(), output),
        Command::Config(ConfigCommand::Check { file }) => {
            let flags = cli.flags();
            let flags = Flags { config: file.clone().or(flags.config), ..flags };
            Config::load(&flags, &Surroundings::of_process()).map_err(|error| Problem::of(&error))?;
            Ok(out("ok\n")?)
        }
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "larder", &mut script);
            Ok(out(&String::from_utf8_lossy(&script))?)
        }
        Command::Demo => demo::run().await,
        Command::Bench(words) => bench::run(cli, words).await,
        Command::BenchPart { part } => bench::be(part),
    }
}

async fn pull(cli: &Cli, pull: &Pull) -> Result<(), Problem> {
    let reference = pull.target.parse()?;
    let config = cli.load()?;
    let door = Door::to_change(&config).await?;
    if pull.detach && !door.outlives_us() {
        door.close().await;
        let socket = config.serve.socket;
        return Err(Error::NobodyToLeaveItTo { job: Kind::Pull, reference: reference.to_string(), socket }.into());
    }
    if pull.pin
        && let Err(problem) = door.pin(&reference).await
    {
        door.close().await;
        return Err(problem);
    }
    let mut done = if pull.detach {
        hand_over(&door, &reference, pull.warm, cli.output()).await
    } else {
        wait_for(&door, &reference, pull.warm, cli, true).await
    };
    if done.is_ok() && pull.warm && !pull.detach {
        done = warm::follow(&door, &reference, cli).await.map(drop);
    }
    door.close().await;
    done
}

/// Starts a pull and does not wait for it.
async fn hand_over(door: &Door, reference: &ModelRef, warm: bool, output: Output) -> Result<(), Problem> {
    use futures::StreamExt;
    let first = door.pull(reference, warm).await?.next().await;
    let status = first.ok_or_else(|| Error::Lost { job: Kind::Pull, reference: reference.to_string() })??;
    let text = match output {
        Output::Table => format!("{}\n", status.id),
        Output::Json => json(&status),
    };
    Ok(out(&text)?)
}

/// Pulls and shows how far it is; prints where the model is, if `print`.
async fn wait_for(door: &Door, reference: &ModelRef, warm: bool, cli: &Cli, print: bool) -> Result<(), Problem> {
    let began = Instant::now();
    let statuses = door.pull(reference, warm).await?;
    let mut reporter = cli.reporter();
    let status = match progress::follow(statuses, &mut reporter, interruption()).await? {
        Followed::Ended(status) => status,
        Followed::Interrupted(last) => {
            let percent = last.as_ref().map_or(0, |status| status.percent);
            let reference = reference.to_string();
            return Err(match last {
                Some(PullStatus { id, .. }) if door.outlives_us() => {
                    Error::StoppedWaiting { job: Kind::Pull, reference, percent, id }
                }
                _ => Error::StoppedPulling { reference, percent },
            }
            .into());
        }
        Followed::Lost => return Err(Error::Lost { job: Kind::Pull, reference: reference.to_string() }.into()),
    };
    if print && cli.output() == Output::Json {
        out(&json(&status))?;
    }
    let path = outcome(&status)?;
    reporter.ready(&status, began.elapsed());
    if print && cli.output() == Output::Table {
        out(&format!("{path}\n"))?;
    }
    Ok(())
}

/// The directory of a pull that has ended well, or why it did not.
fn outcome(status: &PullStatus) -> Result<&str, Problem> {
    let reference = || status.reference.clone();
    match (status.phase, &status.path, &status.error) {
        (Phase::Ready, Some(path), _) => Ok(path),
        (_, _, Some(error)) => Err(Problem::from(error)),
        (Phase::Cancelled, ..) => Err(Error::Cancelled { reference: reference() }.into()),
        _ => Err(Error::Lost { job: Kind::Pull, reference: reference() }.into()),
    }
}

/// Ends when the user or the system asks this process to stop.
async fn interruption() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        // Without a handler the signal keeps its own meaning.
        return std::future::pending().await;
    };
    tokio::select! {
        Ok(()) = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}

async fn list(config: &Config, output: Output) -> Result<(), Problem> {
    let door = Door::to_read(config).await?;
    let models = door.models().await;
    door.close().await;
    let models = models?;
    if output == Output::Json {
        return Ok(out(&json(&ModelList { models }))?);
    }
    if models.is_empty() {
        say("no model is local; `larder pull hf://org/name` brings one");
        return Ok(());
    }
    Ok(out(&model_table(&models))?)
}

const MODEL_COLUMNS: [(&str, Align); 8] = [
    ("REFERENCE", Align::Left),
    ("VERSION", Align::Left),
    ("SIZE", Align::Right),
    ("FILES", Align::Right),
    ("RESIDENT", Align::Right),
    ("CURRENT", Align::Left),
    ("OPENED", Align::Left),
    ("PATH", Align::Left),
];

fn model_table(models: &[ModelInfo]) -> String {
    table::render(MODEL_COLUMNS, &models.iter().map(model_cells).collect::<Vec<_>>())
}

fn model_cells(model: &ModelInfo) -> [String; 8] {
    [
        model.reference.clone(),
        progress::short(&model.version),
        Bytes(model.bytes).to_string(),
        model.files.to_string(),
        model.resident_percent.map_or_else(|| "?".to_owned(), |percent| format!("{percent} %")),
        if model.current { "yes" } else { "no" }.to_owned(),
        model.opened_at.clone().unwrap_or_else(|| "never".to_owned()),
        model.path.clone(),
    ]
}

async fn remove(config: &Config, name: &str, output: Output) -> Result<(), Problem> {
    let name = match name.parse::<ModelId>() {
        Ok(id) => id.to_string(),
        Err(()) => name.parse::<ModelRef>().map_err(|error| Problem::of(&error))?.to_string(),
    };
    let door = Door::to_change(config).await?;
    let removed = door.remove(&name).await;
    door.close().await;
    let removed = removed?;
    if output == Output::Json {
        return Ok(out(&json(&removed))?);
    }
    let mut text = String::new();
    for model in &removed.models {
        text.push_str(&format!("removed {} {}\n", model.reference, progress::short(&model.version)));
    }
    text.push_str(&format!("freed {}\n", Bytes(removed.freed_bytes)));
    Ok(out(&report::plain(&text))?)
}

async fn pulls(config: &Config, output: Output) -> Result<(), Problem> {
    let pulls = Door::of_daemon(config).await?.pulls().await?;
    if output == Output::Json {
        return Ok(out(&json(&PullList { pulls }))?);
    }
    if pulls.is_empty() {
        say("the daemon remembers no pull");
        return Ok(());
    }
    Ok(out(&pull_table(&pulls))?)
}

fn pull_table(pulls: &[PullStatus]) -> String {
    let rows: Vec<[String; 4]> = pulls
        .iter()
        .map(|pull| {
            let state = match (&pull.error, pull.phase.is_final()) {
                (Some(error), _) => format!("{}: {}", error.code, error.detail),
                (None, true) => Bytes(pull.bytes_total).to_string(),
                (None, false) => progress::summary(pull),
            };
            [pull.id.clone(), pull.phase.text().to_owned(), pull.reference.clone(), state]
        })
        .collect();
    let columns = [("ID", Align::Left), ("PHASE", Align::Left), ("REFERENCE", Align::Left), ("STATE", Align::Left)];
    table::render(columns, &rows)
}

async fn cancel(config: &Config, id: &str, output: Output) -> Result<(), Problem> {
    let daemon = Door::of_daemon(config).await?;
    let (body, phase, reference) = if id.starts_with('s') {
        let status = daemon.cancel_scrub(id).await?;
        (json(&status), status.phase.text(), "the scrub".to_owned())
    } else if id.starts_with('w') {
        let status = daemon.cancel_warm(id).await?;
        (json(&status), status.phase.text(), status.reference)
    } else {
        let status = daemon.cancel(id).await?;
        (json(&status), status.phase.text(), status.reference)
    };
    let text = match output {
        Output::Table => report::plain(&format!("{phase} {reference}\n")),
        Output::Json => body,
    };
    Ok(out(&text)?)
}

fn show(config: &Config, key: Option<&str>, output: Output) -> Result<(), Problem> {
    let shown: Vec<_> = config.effective().iter().filter(|e| key.is_none_or(|key| e.key == key)).collect();
    let text = match (output, key) {
        (Output::Json, _) => json(&shown),
        (Output::Table, Some(_)) => shown.iter().map(|e| format!("{}\n", e.value)).collect(),
        (Output::Table, None) => {
            let rows: Vec<[String; 3]> =
                shown.iter().map(|e| [e.key.to_owned(), e.value.clone(), e.origin.to_string()]).collect();
            table::render([("KEY", Align::Left), ("VALUE", Align::Left), ("FROM", Align::Left)], &rows)
        }
    };
    Ok(out(&text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pull that has just begun.
    pub(super) fn status(reference: &str) -> PullStatus {
        PullStatus::started("p1", reference, "2026-01-01T00:00:00Z".into())
    }

    fn words(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_may_stand_after_the_command() {
        let cli = words("larder list --root /x -o json").unwrap();
        assert_eq!((cli.flags().root.as_deref(), cli.output()), (Some("/x"), Output::Json));
        assert!(matches!(words("larder ls").unwrap().command, Command::List(_)));
        assert!(matches!(words("larder rm hf://o/n").unwrap().command, Command::Remove(_)));
    }

    #[test]
    fn waiting_is_the_default_and_may_be_said() {
        for line in ["larder pull hf://o/n", "larder pull hf://o/n --wait"] {
            assert!(matches!(words(line).unwrap().command, Command::Pull(Pull { detach: false, .. })));
        }
        assert!(words("larder pull hf://o/n --wait --detach").is_err());
    }

    #[test]
    fn wrong_words_end_with_exit_code_2() {
        assert_eq!(words("larder fetch").unwrap_err().exit_code(), 2);
        assert_eq!(words("larder config show volume.rot").unwrap_err().exit_code(), 2);
        assert_eq!(words("larder --version").unwrap_err().exit_code(), 0);
    }

    #[test]
    fn a_list_has_one_aligned_line_for_each_version() {
        let model = |reference: &str, bytes, opened: Option<&str>| ModelInfo {
            id: "0123456789abcdef".into(),
            reference: reference.into(),
            version: "0123456789abcdef0123".into(),
            manifest: "blake3:00".into(),
            current: opened.is_some(),
            path: "/v/public/x".into(),
            bytes,
            files: 3,
            confirmed_at: "2026-01-01T00:00:00Z".into(),
            opened_at: opened.map(str::to_owned),
            pinned: false,
            leases: 0,
            resident_bytes: None,
            resident_percent: opened.map(|_| 43),
        };
        let text = model_table(&[model("hf://o/name@main", 2_800_000_000, None), model("s3://b/p", 9, Some("2026"))]);
        assert_eq!(
            text,
            "REFERENCE         VERSION         SIZE  FILES  RESIDENT  CURRENT  OPENED  PATH\n\
             hf://o/name@main  0123456789ab  2.8 GB      3         ?  no       never   /v/public/x\n\
             s3://b/p          0123456789ab     9 B      3      43 %  yes      2026    /v/public/x\n"
        );
    }

    #[test]
    fn an_interrupted_wait_says_that_the_pull_goes_on_and_how_to_stop_it() {
        let error =
            Error::StoppedWaiting { job: Kind::Pull, reference: "hf://o/n@main".into(), percent: 43, id: "p7".into() };
        let problem = Problem::from(error);
        assert_eq!(
            report::error_text(&problem),
            "error: cannot wait for `hf://o/n@main`: interrupted at 43 %; the pull goes on in the daemon\n\
             action: `larder cancel p7` stops it            code: pull-cancelled\n"
        );
        assert_eq!(problem.fault().exit_code(), 130);
    }

    #[test]
    fn a_pull_that_ended_is_a_directory_or_the_reason_the_cache_gave() {
        let ready = PullStatus { phase: Phase::Ready, path: Some("/v/x".into()), ..status("hf://o/n@main") };
        assert_eq!(outcome(&ready), Ok("/v/x"));
        let why = Problem {
            code: Code::ChecksumMismatch,
            message: "cannot pull `x`: bytes differ".into(),
            action: "pull again".into(),
            retry_after_seconds: None,
        };
        let body = crate::wire::http::ProblemBody::from(&why);
        let failed = PullStatus { phase: Phase::Failed, error: Some(body), ..status("hf://o/n@main") };
        assert_eq!(outcome(&failed), Err(why));
        let cancelled = PullStatus { phase: Phase::Cancelled, ..status("hf://o/n@main") };
        assert_eq!(outcome(&cancelled).unwrap_err().code, Code::PullCancelled);
        let endless = PullStatus { phase: Phase::Ready, ..status("hf://o/n@main") };
        assert!(outcome(&endless).is_err(), "ready without a directory is no result");
    }

    #[tokio::test]
    async fn a_socket_that_was_named_must_have_a_daemon() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| Some(dir.path().join(name).display().to_string());
        let flags = Flags { config: None, root: path("root"), socket: path("s.sock") };
        let config = Config::load(&flags, &Surroundings::default()).unwrap();
        for problem in [
            Door::to_change(&config).await.err().unwrap(),
            Door::to_read(&config).await.err().unwrap(),
            Door::of_daemon(&config).await.err().unwrap(),
        ] {
            assert_eq!(problem.code, Code::DaemonUnreachable);
            assert!(problem.message.contains("s.sock"), "{problem}");
        }
        assert!(!dir.path().join("root").exists(), "nothing may be done in silence instead");
    }

    /// Every command with its path, such as `larder config show`.
    fn commands(command: &clap::Command, path: &str, into: &mut Vec<(String, clap::Command)>) {
        for sub in command.get_subcommands().filter(|sub| sub.get_name() != "help" && !sub.is_hide_set()) {
            let path = format!("{path} {}", sub.get_name());
            into.push((path.clone(), sub.clone()));
            commands(sub, &path, into);
        }
    }

    #[test]
    fn docs_cli_md_has_every_command_and_every_flag() {
        let page = include_str!("../docs/cli.md");
        let mut all = Vec::new();
        commands(&Cli::command(), "larder", &mut all);
        commands(&kubectl::Words::command(), "kubectl larder", &mut all);
        assert!(all.len() > 10);
        for (path, command) in all {
            let section = page.split("\n### `").find(|s| {
                s.split('`').next().is_some_and(|head| {
                    head == path || head.strip_prefix(&path).is_some_and(|rest| rest.starts_with(' '))
                })
            });
            let section = section.unwrap_or_else(|| panic!("docs/cli.md has no section ### `{path} …`"));
            for flag in command.get_arguments().filter_map(|argument| argument.get_long()) {
                assert!(section.contains(&format!("`--{flag}")), "docs/cli.md: {path}: `--{flag}` is missing");
            }
        }
        let (one, many) = (Cli::command(), kubectl::Words::command());
        for flag in one.get_arguments().chain(many.get_arguments()).filter_map(|argument| argument.get_long()) {
            assert!(page.contains(&format!("`--{flag}")), "docs/cli.md: `--{flag}` is missing");
        }
    }

    #[test]
    fn docs_cli_md_has_the_exit_code_of_every_fault() {
        let page = include_str!("../docs/cli.md");
        for fault in crate::fault::Fault::ALL {
            let row = format!("| {} | {} |", fault.exit_code(), fault.label());
            assert!(page.contains(&row), "docs/cli.md has no row `{row} …`");
        }
    }
}

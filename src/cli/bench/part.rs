//! What `larder bench` runs as processes of their own: whose processor time is counted apart, and who is killed. The hidden
//! command `larder bench-part` is all of them; its one argument says which, as JSON. It is no part of the command line's
//! contract.
//!
//! A part ends with whoever started it: the kernel kills it when the thread that started it ends. So parts are started
//! from the main thread only, where the future of a command runs.

use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};

use rustix::process::{Signal, set_parent_process_death_signal};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::net::unix::pipe;

use super::content::Shape;
use super::disk::{Read, Write as WriteDirectly};
use super::floor::Receive;
use super::{descriptors, disk, floor, origin};
use crate::fault::{Code, Problem};

/// This program, also when its file has been replaced meanwhile.
pub(super) const OURSELVES: &str = "/proc/self/exe";

/// One of them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Part {
    /// `larder serve`, as it is.
    Daemon,
    Origin {
        shape: Shape,
        pace: Option<origin::Pace>,
    },
    Receive(Receive),
    WriteDirectly(WriteDirectly),
    ReadDirectly(Read),
    Descriptors {
        socket: PathBuf,
        files: Vec<PathBuf>,
    },
}

/// Is this part, until its work is done.
pub(in crate::cli) fn be(part: &str) -> Result<(), Problem> {
    let part = serde_json::from_str(part).map_err(|e| broken(&format!("{part:?} is no part of a benchmark: {e}")))?;
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| broken(&e.to_string()))?;
    let done = match part {
        Part::Daemon => Err(Command::new(OURSELVES).arg("serve").exec()),
        Part::Origin { shape, pace } => origin::run(shape, pace),
        Part::Receive(receive) => floor::run(&receive).and_then(|received| say(&received)),
        Part::WriteDirectly(write) => disk::write(&write).and_then(|took| say(&took)),
        Part::ReadDirectly(read) => disk::read(&read).and_then(|took| say(&took)),
        Part::Descriptors { socket, files } => descriptors::run(&socket, &files),
    };
    match done {
        Ok(()) => Ok(()),
        // Whoever started it reads standard output.
        Err(error) => tell(&Err::<(), _>(error.to_string())).map_err(|e| broken(&e.to_string())),
    }
}

/// Tells whoever started this part.
pub(super) fn say(what: &impl Serialize) -> io::Result<()> {
    tell(&Ok::<_, String>(what))
}

fn tell(line: &Result<impl Serialize, String>) -> io::Result<()> {
    let mut line = serde_json::to_vec(line)?;
    line.push(b'\n');
    io::stdout().write_all(&line)
}

/// A process that runs. When it is dropped it is killed, and has ended: then nothing it works on is in use any more.
pub(super) struct Process(Child);

impl Process {
    pub(super) fn start(command: &mut Command) -> Result<Process, Problem> {
        Ok(Process(command.spawn().map_err(|e| broken(&format!("a process cannot be started: {e}")))?))
    }

    pub(super) fn id(&self) -> u32 {
        self.0.id()
    }

    /// How it has ended, if it has.
    pub(super) fn has_ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().ok().flatten()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only if it has ended already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A part that runs and is talked to.
pub(super) struct Helper {
    _process: Process,
    stdin: ChildStdin,
    lines: Lines<BufReader<pipe::Receiver>>,
}

impl Helper {
    /// Starts one.
    pub(super) fn start(part: &Part) -> Result<Helper, Problem> {
        let mut command = command(part);
        let mut process = Process::start(command.env_clear().stdin(Stdio::piped()).stdout(Stdio::piped()))?;
        let (stdin, stdout) = (process.0.stdin.take(), process.0.stdout.take());
        let stdout = pipe::Receiver::from_owned_fd(stdout.expect("it is piped").into());
        let stdout = stdout.map_err(|e| broken(&e.to_string()))?;
        let lines = BufReader::new(stdout).lines();
        Ok(Helper { _process: process, stdin: stdin.expect("it is piped"), lines })
    }

    /// Waits for what it says next.
    pub(super) async fn heard<T: DeserializeOwned>(&mut self) -> Result<T, Problem> {
        let line = self.lines.next_line().await.map_err(|e| broken(&e.to_string()))?;
        let line = line.ok_or_else(|| broken("a process of the benchmark has ended"))?;
        let told: Result<T, String> = serde_json::from_str(&line).map_err(|e| broken(&e.to_string()))?;
        told.map_err(|why| cannot(&why))
    }

    /// Asks it something, and waits for the answer.
    pub(super) async fn ask<T: DeserializeOwned>(&mut self, question: &impl Serialize) -> Result<T, Problem> {
        let mut line = serde_json::to_vec(question).expect("a question serialises");
        line.push(b'\n');
        self.stdin.write_all(&line).map_err(|e| broken(&format!("a process of the benchmark has ended: {e}")))?;
        self.heard().await
    }
}

/// Runs a part that says one thing, and that.
pub(super) async fn result_of<T: DeserializeOwned>(part: &Part) -> Result<T, Problem> {
    Helper::start(part)?.heard().await
}

/// A part that is not started.
pub(super) fn command(part: &Part) -> Command {
    let mut command = Command::new(OURSELVES);
    command.arg("bench-part").arg(serde_json::to_string(part).expect("a part serialises"));
    command
}

/// What this machine does not give.
pub(super) fn cannot(why: &str) -> Problem {
    let action = "look at the disk (`--dir` names another one) and at the limits of this process (`ulimit -a`)";
    Problem::new(Code::DiskError, format!("cannot measure: {why}"), action)
}

fn broken(why: &str) -> Problem {
    Problem::new(Code::InternalError, format!("cannot measure: {why}"), "report it, with the output of the command")
}

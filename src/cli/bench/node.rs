//! [`Node`]: the daemon that is measured. It is `larder serve`, a process of its own, with the default settings.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use futures::StreamExt;

use super::part::{self, Part, Process, cannot};
use super::process::Used;
use crate::cli::scratch;
use crate::client::{Client, Model, Opener};
use crate::fault::{Code, Problem};
use crate::model::ModelRef;
use crate::wire::http::{Phase, PullRequest};

/// How often a daemon that starts is asked whether it is ready.
const ASK_EVERY: Duration = Duration::from_millis(5);
/// Longest wait for that.
const START_DEADLINE: Duration = Duration::from_secs(60);

/// A daemon that runs. Killed when it is dropped; its directory stays.
pub(super) struct Node {
    process: Process,
    home: PathBuf,
    pub(super) client: Client,
}

impl Node {
    /// Starts one in a directory, which is made if it is not there, and waits until it is ready.
    pub(super) async fn start(home: &Path) -> Result<Node, Problem> {
        std::fs::create_dir_all(home).map_err(|e| cannot(&format!("{}: {e}", home.display())))?;
        let log = File::create(home.join("log")).map_err(|e| cannot(&format!("{}: {e}", home.display())))?;
        let socket = socket_in(home);
        let mut command = part::command(&Part::Daemon);
        command.env_clear().envs([
            ("HOME", home),
            ("LARDER_ROOT", &home.join("volume")),
            ("LARDER_SOCKET", &socket),
            ("LARDER_SERVE_LISTEN", Path::new("off")),
            ("LARDER_SERVE_POD_SOCKET", Path::new("off")),
            // What is left free was looked at before anything was measured.
            ("LARDER_VOLUME_MIN_FREE", Path::new("0")),
            // It would begin to read in the middle of something.
            ("LARDER_SCRUB_RATE", Path::new("none")),
        ]);
        let process = Process::start(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log))?;
        let mut node = Node { process, home: home.to_owned(), client: Client::new(&socket) };
        match tokio::time::timeout(START_DEADLINE, node.ready()).await {
            Ok(None) => Ok(node),
            Ok(Some(status)) => Err(node.ended(&status.to_string())),
            Err(_) => Err(node.ended(&format!("it was not ready after {} s", START_DEADLINE.as_secs()))),
        }
    }

    /// `None` when it is ready; else how it ended.
    async fn ready(&mut self) -> Option<ExitStatus> {
        loop {
            if self.client.readiness().await.is_ok_and(|readiness| readiness.ready) {
                return None;
            }
            if let Some(status) = self.process.has_ended() {
                return Some(status);
            }
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    fn ended(&self, how: &str) -> Problem {
        let log = std::fs::read_to_string(self.home.join("log")).unwrap_or_default();
        let last = log.lines().last().unwrap_or("it said nothing");
        let message = format!("cannot measure: a daemon did not start ({how}): {last}");
        Problem::new(Code::InternalError, message, "try `larder serve --root DIR` on this disk")
    }

    pub(super) fn socket(&self) -> PathBuf {
        socket_in(&self.home)
    }

    pub(super) fn volume(&self) -> PathBuf {
        self.home.join("volume")
    }

    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(super) fn used(&self) -> Result<Used, Problem> {
        Used::by(self.pid())
    }

    /// Opens a model as a reader does; one that is not local is pulled and waited for.
    pub(super) async fn open(&self, reference: &str) -> Result<Model, Problem> {
        Opener::new(&self.socket()).open(&parsed(reference)).await
    }

    /// A pull, also of what is local, to its end. Nothing is open afterwards.
    pub(super) async fn pulled(&self, reference: &str) -> Result<(), Problem> {
        let mut status = self.client.pull(&PullRequest::of(parsed(reference))).await?;
        let mut states = self.client.watch(&status.id).await?;
        while let Some(state) = states.next().await {
            status = state?;
        }
        match (status.phase, &status.error) {
            (Phase::Ready, _) => Ok(()),
            (_, Some(error)) => Err(Problem::from(error)),
            (phase, None) => Err(cannot(&format!("a pull ended as {}", phase.text()))),
        }
    }

    /// SIGKILL, and its end, and that of all it has on the disk.
    pub(super) fn remove(self) -> Result<(), Problem> {
        let home = self.home.clone();
        drop(self);
        scratch::remove(&home).map_err(|e| cannot(&format!("{}: {e}", home.display())))
    }
}

/// The path of the socket of a node.
pub(super) fn socket_in(home: &Path) -> PathBuf {
    home.join("s")
}

/// A reference to an origin of ours.
pub(super) fn parsed(reference: &str) -> ModelRef {
    reference.parse().expect("the address of an origin is a reference")
}

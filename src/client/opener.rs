//! [`Opener`]: how a model is to be opened; and what to do while no daemon answers.

use std::ffi::OsString;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::model::Model;
use super::{asynchronous, blocking};
use crate::fault::{Code, Fault, Problem};
use crate::model::ModelRef;
use crate::wire::frame::{OpenFiles, OpenedFiles};
use crate::wire::http::{LeaseTerms, PullStatus};

/// How long is waited for a daemon that does not answer, unless another time is asked for.
pub const DEFAULT_PATIENCE: Duration = Duration::from_secs(30);

/// Longest time without a byte of an answer: six frames of progress.
pub(super) const SILENCE: Duration = Duration::from_secs(60);

/// The first pause between two attempts; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(20);

/// The longest pause while somebody waits for the model.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The longest pause while only a lease is to be taken again.
pub(super) const LONGEST_KEEPER_PAUSE: Duration = Duration::from_secs(5);

/// The socket that is asked when none is named: `LARDER_SOCKET`; else `/run/larder/larder.sock`, if it is there, as in a pod
/// and on a node; else the one of a daemon that this user has started.
pub fn default_socket() -> PathBuf {
    socket_of(|name| std::env::var_os(name), Path::new("/run/larder/larder.sock"))
}

fn socket_of(variable: impl Fn(&str) -> Option<OsString>, of_node: &Path) -> PathBuf {
    let path = |name| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(socket) = path("LARDER_SOCKET") {
        return socket;
    }
    let data = || path("XDG_DATA_HOME").or_else(|| Some(path("HOME")?.join(".local/share")));
    match path("XDG_RUNTIME_DIR").or_else(data) {
        Some(dir) if !of_node.exists() => dir.join("larder/larder.sock"),
        _ => of_node.to_owned(),
    }
}

/// Opens models on one socket. A model that is not local is pulled, and waited for.
#[derive(Clone)]
pub struct Opener {
    pub(super) socket: PathBuf,
    pub(super) patience: Duration,
    pub(super) progress: Option<Progress>,
    wait: bool,
    files: bool,
    warm: bool,
    file: Option<String>,
    version: Option<String>,
    lease: Option<LeaseTerms>,
}

/// Told where a pull stands.
pub(super) type Progress = Arc<dyn Fn(&PullStatus) + Send + Sync>;

impl Opener {
    /// Opens on this socket. Nothing is connected yet.
    pub fn new(socket: &Path) -> Opener {
        Opener {
            socket: socket.to_owned(),
            patience: DEFAULT_PATIENCE,
            progress: None,
            wait: true,
            files: true,
            warm: false,
            file: None,
            version: None,
            lease: None,
        }
    }

    /// Asks for no files: what is opened is a directory, and the lease on it.
    pub fn without_files(mut self) -> Opener {
        self.files = false;
        self
    }

    /// Whether a model that is not local is pulled, however long that takes; else it is an error.
    pub fn wait(mut self, wait: bool) -> Opener {
        self.wait = wait;
        self
    }

    /// Longest time, all pauses together, that is waited for a daemon that does not answer. One that restarts costs some of
    /// it, also in the middle of a pull.
    pub fn patience(mut self, patience: Duration) -> Opener {
        self.patience = patience;
        self
    }

    /// Takes a lease too that outlives the connection, such as a pod's.
    pub fn lease(mut self, terms: LeaseTerms) -> Opener {
        self.lease = Some(terms);
        self
    }

    /// Opens only this file of the model.
    pub fn file(mut self, path: &str) -> Opener {
        self.file = Some(path.to_owned());
        self
    }

    /// Opens only this version, not what the reference means now.
    pub fn version(mut self, version: &str) -> Opener {
        self.version = Some(version.to_owned());
        self
    }

    /// Has the daemon begin to bring the model into the page cache.
    pub fn warm(mut self) -> Opener {
        self.warm = true;
        self
    }

    /// Calls `heard` with where the pull stands, some times a second. It must not block.
    pub fn on_progress(mut self, heard: impl Fn(&PullStatus) + Send + Sync + 'static) -> Opener {
        self.progress = Some(Arc::new(heard));
        self
    }

    /// Opens a model. Needs a tokio runtime, and the lease is kept for as long as that runs.
    pub async fn open(&self, reference: &ModelRef) -> Result<Model, Problem> {
        asynchronous::open(self, reference).await
    }

    /// Opens a model without a runtime. Blocks.
    pub fn open_blocking(&self, reference: &ModelRef) -> Result<Model, Problem> {
        blocking::open_with(self, reference)
    }

    pub(super) fn request(&self, reference: &ModelRef) -> OpenFiles {
        OpenFiles {
            version: self.version.clone(),
            file: self.file.clone(),
            wait: self.wait,
            descriptors: self.files,
            warm: self.warm,
            lease: self.lease.clone(),
            ..OpenFiles::of(reference)
        }
    }
}

/// Takes the connection's lease on a version again that is open already, and nothing else.
pub(super) fn renewal(opened: &OpenedFiles) -> OpenFiles {
    OpenFiles {
        // What the reference means may have changed; what is open has not.
        version: Some(opened.model.version.clone()),
        ..OpenFiles::of(&opened.model.reference)
    }
}

/// Why an attempt to open a model did not end well.
#[derive(Debug)]
pub(super) enum Failed {
    /// The daemon was not there, or went away: it may come back.
    Lost(String),
    /// It will be the same the next time.
    Problem(Problem),
}

impl Failed {
    pub(super) fn ended() -> Failed {
        Failed::Lost("the daemon closed the connection".to_owned())
    }

    /// Whether a lease that was lost can be taken later.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Failed::Lost(_) => true,
            Failed::Problem(problem) => problem.fault() == Fault::Busy,
        }
    }

    /// The model that is open stays readable, and is kept no longer.
    pub(super) fn warn(self, asked: &OpenFiles) {
        let why = match self {
            Failed::Lost(why) => why,
            Failed::Problem(problem) => problem.message,
        };
        tracing::warn!(why, reference = asked.reference, version = asked.version, "a lease cannot be taken again");
    }
}

impl From<Problem> for Failed {
    fn from(problem: Problem) -> Failed {
        match problem.code {
            Code::Draining => Failed::Lost(problem.message),
            _ => Failed::Problem(problem),
        }
    }
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        match error.kind() {
            ErrorKind::NotFound
            | ErrorKind::ConnectionRefused
            | ErrorKind::ConnectionReset
            | ErrorKind::ConnectionAborted
            | ErrorKind::BrokenPipe
            // The daemon has not accepted those who came before.
            | ErrorKind::WouldBlock => Failed::Lost(error.to_string()),
            ErrorKind::TimedOut => Failed::Problem(Problem::new(
                Code::DaemonUnreachable,
                format!("cannot open the model: the daemon said nothing for {} s", SILENCE.as_secs()),
                "look at its log and at the disk of the volume",
            )),
            _ => Failed::Problem(Problem::new(
                Code::DaemonUnreachable,
                format!("cannot talk to the daemon: {error}"),
                "check the permissions of the socket, and the limit of open files of this process (`ulimit -n`)",
            )),
        }
    }
}

/// The pauses between attempts.
pub(super) struct Pauses {
    next: Duration,
    longest: Duration,
}

impl Pauses {
    pub(super) fn up_to(longest: Duration) -> Pauses {
        Pauses { next: FIRST_PAUSE, longest }
    }

    /// How long to wait before the next one.
    pub(super) fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(self.longest);
        pause
    }
}

/// The same, while somebody waits for the model: they come to an end.
pub(super) struct Patience {
    pauses: Pauses,
    left: Duration,
}

impl Patience {
    pub(super) fn of(patience: Duration) -> Patience {
        Patience { pauses: Pauses::up_to(LONGEST_PAUSE), left: patience }
    }

    /// How long to wait before the next attempt. `None`: that was long enough.
    pub(super) fn next(&mut self) -> Option<Duration> {
        let pause = self.pauses.pause().min(self.left);
        self.left -= pause;
        (!pause.is_zero()).then_some(pause)
    }

    /// The daemon is there: should it go away once more, it is asked soon.
    pub(super) fn heard(&mut self) {
        self.pauses = Pauses::up_to(LONGEST_PAUSE);
    }
}

/// What is said when patience is over.
pub(super) fn unreachable(opener: &Opener, why: &str) -> Problem {
    let (socket, patience) = (opener.socket.display(), humantime::format_duration(opener.patience));
    let dir = opener.socket.parent().filter(|dir| !dir.as_os_str().is_empty());
    let (found, action) = match dir {
        Some(dir) if !dir.is_dir() => (
            format!("the directory `{}` is not there", dir.display()),
            "is the socket's directory mounted? Mount the node's directory of `serve.pod_socket` there, or set \
             LARDER_SOCKET",
        ),
        _ if !opener.socket.exists() => (
            "its directory is there, and no socket in it".to_owned(),
            "start the daemon of this node (`larder serve`), or set LARDER_SOCKET",
        ),
        _ => (why.to_owned(), "look whether the daemon of this node runs (`larder serve`), or set LARDER_SOCKET"),
    };
    Problem::new(
        Code::DaemonUnreachable,
        format!("cannot reach the daemon on `{socket}` within {patience}: {found}"),
        action,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_limit_and_end_with_patience() {
        let mut patience = Patience::of(Duration::from_secs(30));
        let pauses: Vec<Duration> = std::iter::from_fn(|| patience.next()).collect();
        assert_eq!(pauses[..3], [20, 40, 80].map(Duration::from_millis));
        assert_eq!(pauses.iter().sum::<Duration>(), Duration::from_secs(30));
        assert!(pauses.iter().all(|pause| *pause <= LONGEST_PAUSE));
        assert_eq!(Patience::of(Duration::ZERO).next(), None);
    }

    #[test]
    fn a_daemon_that_was_heard_is_asked_again_soon() {
        let mut patience = Patience::of(DEFAULT_PATIENCE);
        for _ in 0..5 {
            patience.next();
        }
        patience.heard();
        assert_eq!(patience.next(), Some(FIRST_PAUSE));
    }

    #[test]
    fn the_socket_is_the_one_that_is_named_or_the_nodes_or_the_users() {
        let dir = tempfile::tempdir().unwrap();
        let (present, absent) = (dir.path().to_owned(), dir.path().join("larder.sock"));
        let socket = |variables: &[(&str, &str)], of_node: &Path| {
            let found = |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| value.into());
            socket_of(found, of_node)
        };
        let home = ("HOME", "/home/u");
        assert_eq!(socket(&[("LARDER_SOCKET", "/s"), home], &present), Path::new("/s"));
        assert_eq!(socket(&[("LARDER_SOCKET", ""), home], &present), present);
        assert_eq!(socket(&[home], &absent), Path::new("/home/u/.local/share/larder/larder.sock"));
        assert_eq!(
            socket(&[home, ("XDG_RUNTIME_DIR", "/run/user/7")], &absent),
            Path::new("/run/user/7/larder/larder.sock")
        );
        assert_eq!(socket(&[], &absent), absent);
    }

    #[test]
    fn what_is_missing_of_the_socket_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let problem =
            |path: &str| unreachable(&Opener::new(&dir.path().join(path)), "Connection refused (os error 111)");
        let mount = problem("run/larder.sock");
        assert!(mount.message.ends_with("run` is not there") && mount.action.contains("mounted?"), "{mount:?}");
        let start = problem("larder.sock");
        assert!(start.message.ends_with("within 30s: its directory is there, and no socket in it"), "{start:?}");
        std::fs::write(dir.path().join("larder.sock"), "").unwrap();
        assert!(problem("larder.sock").message.ends_with("Connection refused (os error 111)"));
        assert_eq!(mount.code, Code::DaemonUnreachable);
    }
}

//! The program itself, as processes of a user who has nothing but a home.

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use tokio::sync::mpsc;

use super::skip::skipped;

/// Longest wait for a line: a bound against hanging, not a measurement.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// A home with a volume in it, and the environment its processes get.
pub(crate) struct Home {
    dir: TempDir,
    environment: Vec<(String, String)>,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ended {
    /// Runs a command to its end.
    pub(crate) async fn of(mut command: Command) -> Ended {
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    }
}

impl Home {
    /// Nothing is there yet.
    pub(crate) fn new() -> Home {
        let dir = tempfile::tempdir().unwrap();
        let mut home = Home { dir, environment: Vec::new() };
        for (name, path) in [("HOME", ""), ("XDG_CONFIG_HOME", "config"), ("XDG_DATA_HOME", "data"), ("TMPDIR", "tmp")]
        {
            let path = home.dir.path().join(path);
            std::fs::create_dir_all(&path).unwrap();
            home.set(name, path.to_str().unwrap());
        }
        home.set("LARDER_ROOT", home.root().to_str().unwrap().to_owned().as_str());
        home.set("LARDER_SERVE_LISTEN", "127.0.0.1:0");
        home.set("LARDER_VOLUME_MIN_FREE", "0");
        home.set("LARDER_PULL_MEMORY", "8MiB");
        home.set("LARDER_PULL_CONNECTIONS", "4");
        // Tests wait for the ends of leases of connections.
        home.set("LARDER_LOG_FILTER", "info,larder::cache::lease=debug");
        home
    }

    /// A variable for every process from now on.
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("volume")
    }

    pub(crate) fn public(&self) -> PathBuf {
        self.root().join("public")
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.root().join("larder.sock")
    }

    pub(crate) fn pod_socket(&self) -> PathBuf {
        self.root().join("pods/larder.sock")
    }

    /// A command that is not started.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        self.command_of(env!("CARGO_BIN_EXE_larder"), words)
    }

    /// The same of another program.
    pub(crate) fn command_of(&self, program: &str, words: &[&str]) -> Command {
        let mut command = Command::new(program);
        command.args(words).env_clear().envs(self.environment.iter().cloned()).stdin(Stdio::null());
        command
    }

    /// Runs a command to its end.
    pub(crate) async fn run(&self, words: &[&str]) -> Ended {
        Ended::of(self.command(words)).await
    }

    /// What a command that must work prints.
    pub(crate) async fn done(&self, words: &[&str]) -> String {
        let ended = self.run(words).await;
        assert_eq!(ended.code, Some(0), "larder {}: {}", words.join(" "), ended.err);
        ended.out
    }

    /// Starts a command and does not wait for it.
    pub(crate) fn start(&self, words: &[&str]) -> Running {
        Running::start(self.command(words))
    }

    /// Starts a daemon and waits until it says that it is ready.
    pub(crate) async fn serve(&self) -> Running {
        let mut daemon = self.start(&["serve"]);
        daemon.says("\"message\":\"ready\"").await;
        daemon
    }
}

impl Home {
    /// What is seen of a daemon while it runs.
    pub(crate) async fn serve_for<T>(&self, see: impl FnOnce(&Running) -> T) -> T {
        see(&self.serve().await)
    }

    /// The same daemon as a pod, whose kubelet has mounted this directory as its identity. `None`, after saying why, where
    /// nothing can be mounted.
    pub(crate) async fn serve_as_pod(&self, identity: &Path) -> Option<Running> {
        let mut daemon = Running::start(self.command_as_pod(identity, &["serve"])?);
        daemon.says("\"message\":\"ready\"").await;
        Some(daemon)
    }

    /// A command of such a pod, run to its end.
    pub(crate) async fn run_as_pod(&self, identity: &Path, words: &[&str]) -> Option<Ended> {
        Some(Ended::of(self.command_as_pod(identity, words)?).await)
    }

    fn command_as_pod(&self, identity: &Path, words: &[&str]) -> Option<Command> {
        const AS_POD: &str = "mount -t tmpfs tmpfs /run && mkdir -p /run/secrets/kubernetes.io \
                              && ln -s \"$1\" /run/secrets/kubernetes.io/serviceaccount && shift && exec \"$0\" \"$@\"";
        match Command::new("unshare").args(["--mount", "true"]).output() {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                skipped(&format!("no mount namespace: {}", String::from_utf8_lossy(&output.stderr).trim()));
                return None;
            }
            Err(e) => {
                skipped(&format!("`unshare` does not run: {e}"));
                return None;
            }
        }
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c", AS_POD, env!("CARGO_BIN_EXE_larder")]).arg(identity).args(words);
        command.env_clear().envs(self.environment.iter().cloned()).stdin(Stdio::null());
        Some(command)
    }

    /// The same daemon, which may open no more descriptors than this.
    pub(crate) async fn serve_with_descriptors(&self, most: u32) -> Running {
        let mut command = Command::new("sh");
        command.args(["-c", "ulimit -n \"$1\"; exec \"$0\" serve", env!("CARGO_BIN_EXE_larder"), &most.to_string()]);
        command.env_clear().envs(self.environment.iter().cloned()).stdin(Stdio::null());
        let mut daemon = Running::start(command);
        daemon.says("\"message\":\"ready\"").await;
        daemon
    }
}

/// A process whose standard error is read as it comes. Killed when it is dropped.
pub(crate) struct Running {
    child: Child,
    lines: mpsc::UnboundedReceiver<String>,
    said: Arc<Mutex<String>>,
}

impl Running {
    /// Starts a command that was made by [`Home::command`].
    pub(crate) fn start(mut command: Command) -> Running {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().expect("it is piped");
        let (say, lines) = mpsc::unbounded_channel();
        let said: Arc<Mutex<String>> = Arc::default();
        let log = said.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                *log.lock().unwrap() += &format!("{line}\n");
                let _ = say.send(line);
            }
        });
        Running { child, lines, said }
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the next line of standard error that contains `fragment`.
    pub(crate) async fn says(&mut self, fragment: &str) -> String {
        let lines = &mut self.lines;
        let found = async {
            while let Some(line) = lines.recv().await {
                if line.contains(fragment) {
                    return Some(line);
                }
            }
            None
        };
        match tokio::time::timeout(MAX_WAIT, found).await {
            Ok(Some(line)) => line,
            _ => panic!("it did not say {fragment}; it said:\n{}", self.said()),
        }
    }

    /// Everything it has said on standard error.
    pub(crate) fn said(&self) -> String {
        self.said.lock().unwrap().clone()
    }

    /// Where it listens on TCP, from the line that says that it is ready.
    pub(crate) fn tcp_address(&self) -> SocketAddr {
        self.address("listen")
    }

    /// The same for another setting of `serve`.
    pub(crate) fn address(&self, setting: &str) -> SocketAddr {
        let said = self.said();
        let ready = said.lines().find(|line| line.contains("\"message\":\"ready\"")).expect("it is ready");
        let line: serde_json::Value = serde_json::from_str(ready).unwrap();
        line[setting].as_str().expect("it listens on TCP").parse().unwrap()
    }

    /// SIGKILL, and its end.
    pub(crate) async fn kill(mut self) {
        self.child.kill().unwrap();
        self.ended().await;
    }

    /// SIGTERM.
    pub(crate) fn terminate(&self) {
        kill_process(Pid::from_child(&self.child), Signal::TERM).unwrap();
    }

    /// SIGHUP.
    pub(crate) fn hang_up(&self) {
        kill_process(Pid::from_child(&self.child), Signal::HUP).unwrap();
    }

    /// Waits for its end, and gives what it wrote to standard output.
    pub(crate) async fn ended(&mut self) -> (ExitStatus, String) {
        // The log is complete when its channel is closed.
        while self.lines.recv().await.is_some() {}
        let mut out = String::new();
        if let Some(mut stdout) = self.child.stdout.take() {
            stdout.read_to_string(&mut out).unwrap();
        }
        (self.child.wait().unwrap(), out)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! A server of somebody else, as a process that ends with its test.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

/// Longest wait for a server to say where it listens: a bound against hanging, not a measurement.
const MAX_START: Duration = Duration::from_secs(120);

/// A running server.
pub(crate) struct ServerProcess {
    child: Child,
    /// Kept open: a server that reads it ends with us, however we end.
    _stdin: Option<ChildStdin>,
}

impl ServerProcess {
    /// Starts a server and waits for the first line of its output from which `read` gets something. `None` if the
    /// program is not there, or ends before.
    pub(crate) fn start<T: Send + 'static>(
        mut command: Command,
        read: impl Fn(&str) -> Option<T> + Send + 'static,
    ) -> Option<(ServerProcess, T)> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().ok()?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().expect("it is piped");
        let process = ServerProcess { child, _stdin: stdin };
        let (say, hear) = mpsc::channel();
        std::thread::spawn(move || {
            // Reads to the end, so that the server never waits for us to read.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Some(found) = read(&line) {
                    let _ = say.send(found);
                }
            }
        });
        match hear.recv_timeout(MAX_START) {
            Ok(found) => Some((process, found)),
            Err(mpsc::RecvTimeoutError::Disconnected) => None,
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("the server did not say where it listens"),
        }
    }

    /// The process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

//! The program under `strace`: killed after the Nth call that changes the volume, or with a call that fails.
//!
//! strace's own `signal=KILL:when=N` counts each thread by itself, so it never reaches what a thread does after another
//! one has come to N. Here every call of every thread is held for some milliseconds after it is done; whoever reads the
//! trace kills the process meanwhile. Threads make their calls in any order, so the Nth call is not always the same one.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// Calls that change a disk, and are held after they are done.
const HELD: &str = "write,pwrite64,ftruncate,fallocate,fsync,fdatasync,sync_file_range,rename,renameat,renameat2,link,\
                    linkat,unlink,unlinkat,rmdir,fchmod,utimensat";
/// Calls of which a start makes hundreds that change nothing: they are counted when they do, and not held.
const FLEETING: &str = "openat,mkdir,mkdirat";
/// How long a call is held: the time there is to kill.
const HELD_MICROSECONDS: u32 = 2000;

/// Longest time that one run may take: a bound against hanging, not a measurement.
const LONGEST_RUN: Duration = Duration::from_secs(120);

/// What became of a command.
#[derive(Debug)]
pub(crate) struct Traced {
    /// It came to the call it was to be killed at. It may have ended by itself before the kill reached it: a command that
    /// is told of the end of its disk does.
    pub(crate) was_cut_off: bool,
    /// None: a kill ended it.
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    /// What it said on standard error.
    pub(crate) err: String,
    /// Calls that changed the volume.
    pub(crate) calls: usize,
    /// The last of them.
    pub(crate) last: String,
}

impl Traced {
    /// Whether the command said that it is done: by what it printed, or by its exit code.
    pub(crate) fn acknowledged(&self) -> bool {
        self.code == Some(0) || !self.out.is_empty()
    }
}

/// Whether strace works here; if not, why.
pub(crate) fn unusable() -> Option<String> {
    let tried = Command::new("strace").args(["-D", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "true"]).output();
    match tried {
        Ok(output) if output.status.success() => None,
        Ok(output) => Some(format!("strace does not work: {}", String::from_utf8_lossy(&output.stderr))),
        Err(e) => Some(format!("strace is not there: {e}")),
    }
}

/// The same command, traced. `-D`: the program is our child, strace is not, so that who waits for it waits for its end.
fn traced(command: &Command, options: &[String]) -> Command {
    let mut traced = Command::new("strace");
    traced.args(["-D", "-f", "--seccomp-bpf", "-qq", "-y", "-e", "signal=none"]).args(options);
    traced.arg(command.get_program()).args(command.get_args()).env_clear();
    traced.envs(std::env::var_os("PATH").map(|path| ("PATH", path)));
    traced.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    traced.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    traced
}

/// Runs a command, and kills it at the first call on the volume of which `is_the_end` says so: it gets how many are done,
/// and the line of the trace; that of a call that is not done yet, too. A daemon, which does not end by itself, is asked to
/// end (SIGTERM) as soon as it says `last_word`. Blocking.
pub(crate) fn run_until(
    command: &Command,
    root: &Path,
    last_word: Option<&str>,
    mut is_the_end: impl FnMut(usize, &str) -> bool,
) -> Traced {
    let options =
        ["-e", &format!("trace={HELD},{FLEETING}"), "-e", &format!("inject={HELD}:delay_exit={HELD_MICROSECONDS}")];
    let mut child = traced(command, &options.map(str::to_owned)).spawn().unwrap();
    let process = Pid::from_child(&child);
    let (runs, has_ended) = mpsc::channel::<()>();
    std::thread::spawn(move || {
        if has_ended.recv_timeout(LONGEST_RUN) == Err(RecvTimeoutError::Timeout) {
            let _ = kill_process(process, Signal::KILL);
        }
    });
    let root = root.to_str().expect("it is text");
    let mut ended = Traced {
        was_cut_off: false,
        code: None,
        out: String::new(),
        err: String::new(),
        calls: 0,
        last: String::new(),
    };
    let said = BufReader::new(child.stderr.take().expect("it is piped"));
    for line in said.lines().map_while(Result::ok) {
        // It may stand in the middle of a line of the trace.
        if last_word.is_some_and(|word| line.contains(word)) {
            let _ = kill_process(process, Signal::TERM);
        }
        // Faults of writing are tried with `pwrite64`. sled's own files are another thing.
        let file = without_thread(&line).strip_prefix("write(").and_then(|rest| rest.split_once('>'));
        assert!(file.is_none_or(|(file, _)| !file.contains(root) || file.contains("/index-v1/")), "{line}");
        if !is_call(&line) {
            ended.err += &format!("{line}\n");
        } else if changes_volume(&line, root) && !ended.was_cut_off {
            ended.calls += usize::from(!line.contains("<unfinished "));
            ended.was_cut_off = is_the_end(ended.calls, &line);
            ended.last = line;
            if ended.was_cut_off {
                child.kill().unwrap();
            }
        }
    }
    child.stdout.take().expect("it is piped").read_to_string(&mut ended.out).unwrap();
    // Before its process id can become another's.
    drop(runs);
    let status = child.wait().unwrap();
    ended.code = status.code();
    assert!(ended.code.is_some() || ended.was_cut_off && status.signal() == Some(9), "{status}: {ended:?}");
    ended
}

/// A line of the trace, not of the program.
fn is_call(line: &str) -> bool {
    let mut names = HELD.split(',').chain(FLEETING.split(','));
    let call = without_thread(line);
    call.starts_with("<... ") || call.starts_with("+++ ") || names.any(|name| is_call_of(name, line))
}

fn is_call_of(name: &str, line: &str) -> bool {
    without_thread(line).split_once('(').is_some_and(|(called, _)| called == name)
}

fn without_thread(line: &str) -> &str {
    line.strip_prefix("[pid").and_then(|rest| rest.split_once("] ")).map_or(line, |(_, call)| call)
}

/// A call that was not refused.
fn changes_volume(line: &str, root: &str) -> bool {
    let works = !line.contains(" = -1 ") && !line.contains("+++ ");
    // The second half of a line that another thread has cut in two does not say of what it is.
    let is_ours = line.contains(root) || line.contains(" resumed>");
    works && is_ours && (!line.contains("openat") || line.contains("O_CREAT"))
}

/// The same command; what comes of its calls of that name is in files of this directory, one for each thread: so no line is
/// cut in two by another thread's.
pub(crate) fn told(command: &Command, call: &str, dir: &Path) -> Command {
    let file = dir.join("thread").to_str().expect("it is text").to_owned();
    traced(command, &["-ff".to_owned(), "-o".to_owned(), file, "-e".to_owned(), format!("trace={call}")])
}

/// A call, or the half of it.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) thread: u32,
    pub(crate) name: String,
    /// The files it is about, as strace prints them: names given as text, and those of open files.
    pub(crate) paths: Vec<PathBuf>,
    pub(crate) step: Step,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    Begins,
    HasWorked,
}

/// Runs a command to its end, and gives all its calls of these names, of all threads, in order: each twice, unless it failed.
/// Blocking.
pub(crate) fn calls(command: &Command, names: &str) -> (Output, Vec<Call>) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("trace");
    let options =
        ["-o".to_owned(), file.to_str().expect("it is text").to_owned(), "-e".to_owned(), format!("trace={names}")];
    // strace has its standard error too, so all is written when that comes to its end.
    let output = traced(command, &options).output().unwrap();
    let mut begun: BTreeMap<u32, (String, Vec<PathBuf>)> = BTreeMap::new();
    let mut calls = Vec::new();
    for line in std::fs::read_to_string(&file).unwrap().lines() {
        let (thread, call) = line.trim_start().split_once(' ').expect("a thread and a call");
        let (thread, call) = (thread.parse().expect("a number"), call.trim_start());
        if call.starts_with("+++ ") {
            continue;
        }
        let is_resumed = call.starts_with("<... ");
        if !is_resumed {
            let (name, rest) = call.split_once('(').expect("a call");
            let (name, paths) = (name.to_owned(), paths_of(rest));
            calls.push(Call { thread, name: name.clone(), paths: paths.clone(), step: Step::Begins });
            begun.insert(thread, (name, paths));
        }
        if call.contains(" <unfinished ...>") {
            continue;
        }
        let (name, paths) = begun.remove(&thread).expect("it has begun");
        let result = call.rsplit_once(" = ").expect("a call that has ended").1;
        if !result.starts_with('-') {
            calls.push(Call { thread, name, paths, step: Step::HasWorked });
        }
    }
    (output, calls)
}

/// The file that is open, if the first argument is one; or else all that is given as text.
fn paths_of(arguments: &str) -> Vec<PathBuf> {
    let open = arguments.starts_with(|first: char| first.is_ascii_digit());
    match arguments.split_once('<').and_then(|(_, rest)| rest.split_once('>')) {
        Some((path, _)) if open => vec![path.into()],
        _ => arguments.split('"').skip(1).step_by(2).map(PathBuf::from).collect(),
    }
}

/// The same command, of which the Nth such call of each thread fails. What strace says is on standard error.
pub(crate) fn failing(command: &Command, call: &str, error: &str, nth: usize) -> Command {
    let options = ["-e", &format!("trace={call}"), "-e", &format!("inject={call}:error={error}:when={nth}")];
    traced(command, &options.map(str::to_owned))
}

/// Makes the Nth such call of each thread of a process fail, as long as it runs; says `attached` when it has begun.
pub(crate) fn attached(process: u32, call: &str, error: &str, nth: usize) -> Command {
    let mut command = Command::new("strace");
    command.args(["-f", "-y", "-e", "signal=none", "-e", &format!("trace={call}")]);
    command.args(["-e", &format!("inject={call}:error={error}:when={nth}"), "-p", &process.to_string()]);
    command.stdin(Stdio::null());
    command
}

/// The same for every such call on one file.
pub(crate) fn attached_to(file: &Path, process: u32, calls: &str, error: &str) -> Command {
    let mut command = attached(process, calls, error, 1);
    command.args(["-e", &format!("inject={calls}:error={error}"), "-P"]).arg(file);
    command
}

//! Opening models without a runtime: plain calls that block, and one small thread for each model that is open.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::conversation::{Conversation, Delivered, Step};
use super::model::{LeaseNow, Model};
use super::opener::{
    Failed, LONGEST_KEEPER_PAUSE, Opener, Patience, Pauses, SILENCE, default_socket, renewal, unreachable,
};
use crate::fault::Problem;
use crate::model::ModelRef;
use crate::wire::frame::{OpenFiles, receive_with_descriptors};
use crate::wire::http::PullStatus;

/// Bytes that are received at once.
const RECEIVE_BYTES: usize = 16 * 1024;

/// Opens a model on the [`default_socket`]; one that is not local is pulled first. Blocks.
pub fn open(reference: &ModelRef) -> Result<Model, Problem> {
    open_with(&Opener::new(&default_socket()), reference)
}

pub(super) fn open_with(opener: &Opener, reference: &ModelRef) -> Result<Model, Problem> {
    let asked = opener.request(reference);
    let mut patience = Patience::of(opener.patience);
    loop {
        let attempt = attempt(&opener.socket, &asked, &mut |pull| {
            patience.heard();
            if let Some(progress) = &opener.progress {
                progress(pull);
            }
        });
        let opened = attempt.and_then(|(delivered, stream)| {
            let lease: LeaseNow = Arc::new(Mutex::new(Some(delivered.opened.lease.clone())));
            let keeper = Keeper::start(opener.socket.clone(), renewal(&delivered.opened), stream, lease.clone())?;
            Ok(Model::new(delivered, lease, Box::new(keeper)))
        });
        let why = match opened {
            Ok(model) => return Ok(model),
            Err(Failed::Problem(problem)) => return Err(problem),
            Err(Failed::Lost(why)) => why,
        };
        match patience.next() {
            Some(pause) => thread::park_timeout(pause),
            None => return Err(unreachable(opener, &why)),
        }
    }
}

/// Asks once. The connection is the lease.
fn attempt(
    socket: &Path,
    asked: &OpenFiles,
    heard: &mut dyn FnMut(&PullStatus),
) -> Result<(Delivered, UnixStream), Failed> {
    let (mut conversation, first) = Conversation::new(asked)?;
    let mut stream = connected(socket)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    stream.write_all(&first).map_err(silence)?;
    let (mut buffer, mut came) = ([0; RECEIVE_BYTES], VecDeque::new());
    loop {
        let received = match receive_with_descriptors(stream.as_fd(), &mut buffer, &mut came) {
            Ok(0) => return Err(Failed::ended()),
            Ok(received) => received,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(silence(e).into()),
        };
        let mut bytes = &buffer[..received];
        loop {
            match conversation.step(&mut bytes, &mut came)? {
                Step::Receive => break,
                Step::Send(frame) => stream.write_all(&frame).map_err(silence)?,
                Step::Show(pull) => heard(&pull),
                Step::Done(delivered) => return Ok((*delivered, stream)),
            }
        }
    }
}

/// A socket's time limit shows as a call that would block.
fn silence(error: io::Error) -> io::Error {
    match error.kind() {
        ErrorKind::WouldBlock => ErrorKind::TimedOut.into(),
        _ => error,
    }
}

/// Connects at once or not at all: a blocking connect would wait without a limit on a daemon that does not accept.
fn connected(socket: &Path) -> io::Result<UnixStream> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let stream = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&stream, &SocketAddrUnix::new(socket)?)?;
    let stream = UnixStream::from(stream);
    stream.set_nonblocking(false)?;
    Ok(stream)
}

/// Holds the connection that is the lease, and makes another one when the daemon was away.
struct Keeper {
    connection: Arc<Mutex<Connection>>,
    /// Its end ends the keeper's pauses.
    _alive: mpsc::Sender<()>,
}

enum Connection {
    Open(Arc<UnixStream>),
    Closed,
}

impl Keeper {
    fn start(socket: PathBuf, asked: OpenFiles, stream: UnixStream, lease: LeaseNow) -> io::Result<Keeper> {
        let stream = Arc::new(stream);
        let connection = Arc::new(Mutex::new(Connection::Open(stream.clone())));
        let (alive, closed) = mpsc::channel();
        let held = connection.clone();
        let keep = move || keep(&socket, &asked, stream, &lease, &held, &closed);
        thread::Builder::new().name("larder-lease".into()).spawn(keep)?;
        Ok(Keeper { connection, _alive: alive })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        let mut connection = self.connection.lock().expect("no panic while the connection is held");
        if let Connection::Open(stream) = std::mem::replace(&mut *connection, Connection::Closed) {
            // The daemon sees the end at once, and the thread that reads does too.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn keep(
    socket: &Path,
    asked: &OpenFiles,
    mut stream: Arc<UnixStream>,
    lease: &LeaseNow,
    held: &Mutex<Connection>,
    closed: &mpsc::Receiver<()>,
) {
    loop {
        wait_for_end(&stream);
        *lease.lock().expect("no panic while the lease is held") = None;
        let mut pauses = Pauses::up_to(LONGEST_KEEPER_PAUSE);
        let (delivered, again) = loop {
            if closed.recv_timeout(pauses.pause()) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            match attempt(socket, asked, &mut |_| ()) {
                Ok(taken) => break taken,
                Err(failed) if failed.may_pass() => {}
                Err(failed) => return failed.warn(asked),
            }
        };
        let again = Arc::new(again);
        let mut held = held.lock().expect("no panic while the connection is held");
        match &mut *held {
            // It was closed meanwhile.
            Connection::Closed => return,
            Connection::Open(old) => *old = again.clone(),
        }
        stream = again;
        *lease.lock().expect("no panic while the lease is held") = Some(delivered.opened.lease);
    }
}

/// Nothing more is said on a connection that is a lease, but it ends.
fn wait_for_end(mut stream: &UnixStream) {
    let mut nothing = [0; 1024];
    let _ = stream.set_read_timeout(None);
    loop {
        match stream.read(&mut nothing) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

//! Opening models on a tokio runtime: the same as `blocking`, with one small task for each model that is open.

use std::collections::VecDeque;
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio_util::sync::CancellationToken;

use super::conversation::{Conversation, Delivered, Step};
use super::model::{LeaseNow, Model};
use super::opener::{Failed, LONGEST_KEEPER_PAUSE, Opener, Patience, Pauses, SILENCE, renewal, unreachable};
use crate::fault::Problem;
use crate::model::ModelRef;
use crate::wire::frame::{OpenFiles, receive_with_descriptors};
use crate::wire::http::PullStatus;

/// Bytes that are received at once.
const RECEIVE_BYTES: usize = 16 * 1024;

pub(super) async fn open(opener: &Opener, reference: &ModelRef) -> Result<Model, Problem> {
    let asked = opener.request(reference);
    let mut patience = Patience::of(opener.patience);
    loop {
        let attempt = attempt(&opener.socket, &asked, |pull| {
            patience.heard();
            if let Some(progress) = &opener.progress {
                progress(pull);
            }
        });
        let why = match attempt.await {
            Ok((delivered, stream)) => {
                let lease: LeaseNow = Arc::new(Mutex::new(Some(delivered.opened.lease.clone())));
                let closed = CancellationToken::new();
                let keeper = keep(opener.socket.clone(), renewal(&delivered.opened), stream, lease.clone());
                tokio::spawn(closed.clone().run_until_cancelled_owned(keeper));
                return Ok(Model::new(delivered, lease, Box::new(closed.drop_guard())));
            }
            Err(Failed::Problem(problem)) => return Err(problem),
            Err(Failed::Lost(why)) => why,
        };
        match patience.next() {
            Some(pause) => tokio::time::sleep(pause).await,
            None => return Err(unreachable(opener, &why)),
        }
    }
}

/// Asks once. The connection is the lease.
async fn attempt(
    socket: &Path,
    asked: &OpenFiles,
    mut heard: impl FnMut(&PullStatus),
) -> Result<(Delivered, UnixStream), Failed> {
    let (mut conversation, first) = Conversation::new(asked)?;
    let mut stream = UnixStream::connect(socket).await?;
    within_silence(stream.write_all(&first)).await?;
    let (mut buffer, mut came) = (vec![0; RECEIVE_BYTES], VecDeque::new());
    loop {
        let received =
            stream.async_io(Interest::READABLE, || receive_with_descriptors(stream.as_fd(), &mut buffer, &mut came));
        let received = match within_silence(received).await {
            Ok(0) => return Err(Failed::ended()),
            Ok(received) => received,
            Err(e) if e.kind() == ErrorKind::Interrupted => continue,
            Err(e) => return Err(e.into()),
        };
        let mut bytes = &buffer[..received];
        loop {
            match conversation.step(&mut bytes, &mut came)? {
                Step::Receive => break,
                Step::Send(frame) => within_silence(stream.write_all(&frame)).await?,
                Step::Show(pull) => heard(&pull),
                Step::Done(delivered) => return Ok((*delivered, stream)),
            }
        }
    }
}

async fn within_silence<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(SILENCE, work).await.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
}

/// Holds the connection that is the lease, and makes another one when the daemon was away.
async fn keep(socket: PathBuf, asked: OpenFiles, mut stream: UnixStream, lease: LeaseNow) {
    loop {
        wait_for_end(&mut stream).await;
        *lease.lock().expect("no panic while the lease is held") = None;
        let mut pauses = Pauses::up_to(LONGEST_KEEPER_PAUSE);
        let delivered;
        (delivered, stream) = loop {
            tokio::time::sleep(pauses.pause()).await;
            match attempt(&socket, &asked, |_| ()).await {
                Ok(taken) => break taken,
                Err(failed) if failed.may_pass() => {}
                Err(failed) => return failed.warn(&asked),
            }
        };
        *lease.lock().expect("no panic while the lease is held") = Some(delivered.opened.lease);
    }
}

/// Nothing more is said on a connection that is a lease, but it ends.
async fn wait_for_end(stream: &mut UnixStream) {
    let mut nothing = [0; 1024];
    while stream.read(&mut nothing).await.is_ok_and(|read| read > 0) {}
}

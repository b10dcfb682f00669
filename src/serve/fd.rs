//! The socket door: hands descriptors of a model's files to a process, by frames (`wire/frame.rs`, `docs/protocol.md`). The
//! connection is the lease: it ends when the process closes it, or when the kernel does because the process is gone.
//!
//! - [`limits`]: how many connections there may be.
//! - [`line`]: one connection as bytes: frames in, frames and descriptors out, each within its time.
//! - [`session`]: one connection as requests: open, more, release.
//! - [`pods`]: the socket that pods mount, on which nothing but frames is answered.

mod limits;
mod line;
mod pods;
mod session;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::HEAD_SECONDS;
use crate::cache::Cache;
use crate::fault::{Code, Problem};
use crate::wire::frame::{self, Answer, MAX_ANSWER_BYTES};
use crate::wire::http::ProblemBody;
use line::READ_BYTES;
use session::{Asker, Session};

pub use limits::{MAX_POD_CONNECTIONS, most_connections, raise_descriptor_limit};
pub use pods::listen_to_pods;

/// Batches whose descriptors are open here at the same time: 1,024 descriptors, as long as one sendmsg takes.
const BATCHES_AT_ONCE: usize = 16;

/// What answers frames, on all sockets of one daemon. Cheap to clone.
#[derive(Clone)]
pub struct Frames(Arc<Shared>);

struct Shared {
    cache: Cache,
    shutdown: CancellationToken,
    most_connections: usize,
    connections: Arc<Semaphore>,
    batches: Semaphore,
}

impl Frames {
    /// For `most_connections` connections in all; they are leases, and may last as long as a pod.
    pub fn new(cache: Cache, most_connections: usize, shutdown: CancellationToken) -> Frames {
        Frames(Arc::new(Shared {
            cache,
            shutdown,
            most_connections,
            connections: Arc::new(Semaphore::new(most_connections)),
            batches: Semaphore::new(BATCHES_AT_ONCE),
        }))
    }

    /// A place for one more connection. Without one, its process is told so.
    fn place_for(&self, stream: &UnixStream) -> Option<OwnedSemaphorePermit> {
        let place = self.0.connections.clone().try_acquire_owned().ok();
        if place.is_none() {
            let most = self.0.most_connections;
            let problem = Problem {
                retry_after_seconds: Some(60),
                ..Problem::new(
                    Code::TooManyHolders,
                    format!("cannot take a connection: {most} are held already"),
                    "close models that are not needed (`larder leases`), or raise the daemon's limit of open files",
                )
            };
            tracing::info!(code = %problem.code, connections = most, "refused");
            // What has just been connected has room for it.
            let _ = stream.try_write(&error_frame(&problem));
        }
        place
    }

    /// Answers requests, whose first bytes [`spoken`] has seen, until the other side ends, breaks the protocol, or the daemon
    /// shuts down.
    pub(super) async fn answer(self, stream: UnixStream, seen: Vec<u8>) {
        if let Some(place) = self.place_for(&stream) {
            self.converse(stream, seen, Asker::Node, place).await;
        }
    }

    async fn converse(self, stream: UnixStream, seen: Vec<u8>, asker: Asker, place: OwnedSemaphorePermit) {
        Session::new(stream, seen, asker, self).run().await;
        drop(place);
    }
}

/// What a process speaks, from the first byte it sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Spoken {
    /// A frame's length begins with a zero.
    Frames,
    /// Anything else is left to the HTTP code to judge.
    Http,
}

/// Waits for the first bytes, and leaves them where they are; a copy of them too, which most often is the whole request.
/// `None`: there will be none, or none came in time.
pub(super) async fn spoken(stream: &UnixStream) -> Option<(Spoken, Vec<u8>)> {
    let peek = || {
        let mut buffer = [0; READ_BYTES];
        let (_, seen) = recv(stream, &mut buffer[..], RecvFlags::PEEK)?;
        Ok(buffer[..seen].to_vec())
    };
    let first = stream.async_io(Interest::READABLE, peek);
    let seen = tokio::time::timeout(Duration::from_secs(HEAD_SECONDS), first).await.ok()?.ok()?;
    let spoken = if *seen.first()? == 0 { Spoken::Frames } else { Spoken::Http };
    Some((spoken, seen))
}

/// What is said when a request is not granted.
fn error_frame(problem: &Problem) -> Vec<u8> {
    encoded(&Answer::Error { problem: Box::new(ProblemBody::from(problem)) })
}

fn encoded(answer: &Answer) -> Vec<u8> {
    frame::encode(answer, MAX_ANSWER_BYTES).expect("every field has a limit, and they fit together")
}

/// Whether this process or the system has no descriptor left, for now.
fn is_exhausted(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::MFILE, Errno::NFILE, Errno::TOOMANYREFS].iter().any(|e| error.raw_os_error() == Some(e.raw_os_error()))
}

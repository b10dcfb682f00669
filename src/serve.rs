//! The doors, on Unix sockets and on TCP: a translation of requests to the verbs of [`crate::cache`], and nothing else.
//! HTTP has all routes on one page, [`http`]; [`fd`] hands out descriptors of files.

mod doorkeeper;
mod evictions;
pub mod fd;
mod health;
pub mod http;
mod leases;
mod models;
mod pins;
mod problem;
mod pulls;
mod request;
mod scrubs;
mod starts;
mod warms;

use std::fs;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Router};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::fault::{Code, Diagnose};
use crate::telemetry::Metrics;

pub use doorkeeper::{AUDIENCE, Account, Doorkeeper, TokenReviewer};
use fd::{Frames, Spoken, spoken};
pub use health::{Latch, ReadyLatches};
pub use http::{health_router, openapi, router};

/// What the routes need. Cheap to clone.
#[derive(Clone)]
pub struct Door {
    /// The verbs.
    pub cache: Cache,
    /// What is counted.
    pub metrics: Arc<Metrics>,
    /// What readiness waits for.
    pub latches: ReadyLatches,
    /// Ends streams of events; the same token that [`listen`] is given.
    pub shutdown: CancellationToken,
}

/// Most connections of one listener. More wait in the kernel's queue, so a flood costs no memory of ours.
pub const MAX_CONNECTIONS: usize = 1024;

/// Longest time for the head of a request; a connection without one is closed after as long.
const HEAD_SECONDS: u64 = 30;

/// Longest time that requests under way get to end, once shutdown has begun.
const GRACE_SECONDS: u64 = 10;

/// Longest path of a Unix socket in bytes: `sun_path` has 108 with the zero at its end.
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// Why nothing can be listened on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The kernel has no room for the path.
    #[error(
        "cannot listen on `{}`: the path has {bytes} bytes, a socket's has at most {MAX_SOCKET_PATH_BYTES}",
        path.display()
    )]
    PathTooLong {
        /// The socket.
        path: PathBuf,
        /// Its length.
        bytes: usize,
    },
    /// Something that is not a socket stands there.
    #[error("cannot listen on `{}`: it exists and is not a socket", path.display())]
    NotASocket {
        /// What stands there.
        path: PathBuf,
    },
    /// Somebody answers on the socket.
    #[error("cannot listen on `{}`: another process listens on it", path.display())]
    SocketInUse {
        /// The socket.
        path: PathBuf,
    },
    /// The socket cannot be made.
    #[error("cannot listen on `{}`: {detail}", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The system's words.
        detail: String,
    },
    /// Another process has the port.
    #[error("cannot listen on `{address}`: another process listens on it")]
    PortInUse {
        /// The address.
        address: SocketAddr,
    },
    /// The address cannot be bound.
    #[error("cannot listen on `{address}`: {detail}")]
    Address {
        /// The address.
        address: SocketAddr,
        /// The system's words.
        detail: String,
    },
}

/// Where sockets are set.
const SETTINGS: &str = "`serve.socket` (LARDER_SOCKET) or `serve.pod_socket` (LARDER_SERVE_POD_SOCKET)";

impl Diagnose for Error {
    fn code(&self) -> Code {
        Code::ListenFailed
    }

    fn action(&self) -> String {
        match self {
            Error::PathTooLong { .. } => format!("set {SETTINGS} to a shorter path"),
            Error::NotASocket { path } => format!("move `{}` away, or set {SETTINGS}", path.display()),
            Error::SocketInUse { .. } => format!("stop the larder that runs, or set {SETTINGS} to another path"),
            Error::Socket { .. } => format!("make its directory writable for this user, or set {SETTINGS}"),
            Error::PortInUse { .. } | Error::Address { .. } => {
                "set `serve.listen`, `serve.health_listen` or `serve.network_listen` to an address of this machine and a free port"
                    .into()
            }
        }
    }
}

/// Something that connections come in by.
#[derive(Debug)]
pub enum Listener {
    /// Whoever may open the socket's file may ask.
    Unix(UnixListener, SocketFile),
    /// Whoever reaches the port may ask, but not a web page: see [`Via::Tcp`].
    Tcp(TcpListener),
}

/// The file of a socket we listen on. It goes away with its owner.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // A successor may have put its own socket here.
        if fs::symlink_metadata(&self.path).is_ok_and(|found| (found.dev(), found.ino()) == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The socket that pods mount: whoever reaches it may open models, and do nothing else.
#[derive(Debug)]
pub struct PodListener {
    listener: UnixListener,
    _file: SocketFile,
}

impl PodListener {
    async fn accept(&self) -> io::Result<UnixStream> {
        Ok(self.listener.accept().await?.0)
    }
}

/// Which way a request came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Via {
    /// The file's permissions decide.
    Unix,
    /// Web pages in a browser on this machine reach it too, so `Host` and `Origin` are checked.
    Tcp,
}

/// Listens on a Unix socket that only this user may open (mode 0600). Needs a tokio runtime.
///
/// A missing directory is made, for this user only. A socket that nobody answers on is what a crash left, and is
/// replaced; anything else that stands there is an error.
pub async fn bind_unix(path: &Path) -> Result<Listener, Error> {
    let (listener, file) = bind(path, 0o700, 0o600).await?;
    Ok(Listener::Unix(listener, file))
}

/// The same for the socket that pods mount with its directory: everybody may enter that and open the socket.
pub async fn bind_for_pods(path: &Path) -> Result<PodListener, Error> {
    let (listener, file) = bind(path, 0o755, 0o666).await?;
    Ok(PodListener { listener, _file: file })
}

async fn bind(path: &Path, dir_mode: u32, mode: u32) -> Result<(UnixListener, SocketFile), Error> {
    let bytes = path.as_os_str().as_bytes().len();
    if bytes > MAX_SOCKET_PATH_BYTES {
        return Err(Error::PathTooLong { path: path.to_owned(), bytes });
    }
    let failed = |e: io::Error| Error::Socket { path: path.to_owned(), detail: e.to_string() };
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty() && !p.exists()) {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(parent).map_err(failed)?;
        fs::set_permissions(parent, fs::Permissions::from_mode(dir_mode)).map_err(failed)?;
    }
    match fs::symlink_metadata(path) {
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
        Ok(found) if !found.file_type().is_socket() => return Err(Error::NotASocket { path: path.to_owned() }),
        Ok(_) => match UnixStream::connect(path).await {
            Err(e) if e.kind() == ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed)?,
            // A full queue is an owner that is busy.
            Err(e) if e.kind() == ErrorKind::WouldBlock => return Err(Error::SocketInUse { path: path.to_owned() }),
            Err(e) => return Err(failed(e)),
            Ok(_) => return Err(Error::SocketInUse { path: path.to_owned() }),
        },
    }
    let listener = UnixListener::bind(path).map_err(|e| match e.kind() {
        ErrorKind::AddrInUse => Error::SocketInUse { path: path.to_owned() },
        _ => failed(e),
    })?;
    let made = fs::symlink_metadata(path).map_err(failed)?;
    let file = SocketFile { path: path.to_owned(), inode: (made.dev(), made.ino()) };
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok((listener, file))
}

/// Listens on a TCP address; port 0 lets the system choose. Needs a tokio runtime.
pub async fn bind_tcp(address: SocketAddr) -> Result<Listener, Error> {
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(Listener::Tcp(listener)),
        Err(e) if e.kind() == ErrorKind::AddrInUse => Err(Error::PortInUse { address }),
        Err(e) => Err(Error::Address { address, detail: e.to_string() }),
    }
}

impl Listener {
    /// The address, if it is TCP: with port 0 only the system knows it.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        match self {
            Listener::Tcp(listener) => listener.local_addr().ok(),
            Listener::Unix(..) => None,
        }
    }
}

/// Answers requests until `shutdown`, then lets those under way end, for [`GRACE_SECONDS`] at most. On a Unix socket,
/// `frames` answers who speaks them.
pub async fn listen(listener: Listener, router: Router, frames: Option<Frames>, shutdown: CancellationToken) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    let via = match &listener {
        Listener::Unix(..) => Via::Unix,
        Listener::Tcp(_) => Via::Tcp,
    };
    let router = router.layer(Extension(via));
    loop {
        // Ended ones are taken out as we go, so the set is never larger than the permits and the places for frames.
        while connections.try_join_next().is_some() {}
        let permit = tokio::select! {
            permit = permits.clone().acquire_owned() => permit.expect("the semaphore is never closed"),
            () = shutdown.cancelled() => break,
        };
        let accepted = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = shutdown.cancelled() => break,
        };
        match accepted {
            Ok(stream) => {
                let (router, frames, shutdown) = (router.clone(), frames.clone(), shutdown.clone());
                connections.spawn(async move {
                    match (stream, frames) {
                        (Stream::Unix(stream), Some(frames)) => {
                            let spoken = tokio::select! {
                                spoken = spoken(&stream) => spoken,
                                () = shutdown.cancelled() => None,
                            };
                            match spoken {
                                Some((Spoken::Frames, seen)) => {
                                    // It may last for days, and has a place of its own.
                                    drop(permit);
                                    frames.answer(stream, seen).await;
                                }
                                Some((Spoken::Http, _)) => answer(stream, router, shutdown).await,
                                None => {}
                            }
                        }
                        (Stream::Unix(stream), None) => answer(stream, router, shutdown).await,
                        (Stream::Tcp(stream), _) => answer(stream, router, shutdown).await,
                    }
                });
            }
            Err(error) => accept_again_after(error).await,
        }
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(Duration::from_secs(GRACE_SECONDS), ended).await.is_err() {
        tracing::warn!(seconds = GRACE_SECONDS, "requests were still under way and are cut off");
    }
}

/// Out of file descriptors, most likely: they come back when connections end.
async fn accept_again_after(error: io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(200)).await;
}

enum Stream {
    Unix(UnixStream),
    Tcp(tokio::net::TcpStream),
}

async fn accept(listener: &Listener) -> io::Result<Stream> {
    Ok(match listener {
        Listener::Unix(listener, _) => Stream::Unix(listener.accept().await?.0),
        Listener::Tcp(listener) => Stream::Tcp(listener.accept().await?.0),
    })
}

async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin + 'static, router: Router, shutdown: CancellationToken) {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    builder.http1().timer(TokioTimer::new()).header_read_timeout(Duration::from_secs(HEAD_SECONDS));
    // On the heap: it is some kilobytes, which a connection of frames would carry along for nothing.
    let mut connection = Box::pin(builder.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router)));
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = shutdown.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        tracing::debug!(error, "a connection broke");
    }
}

#[cfg(test)]
mod tests {
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::task::JoinHandle;

    use super::*;

    /// A door that is open until it is dropped.
    pub(in crate::serve) struct Running {
        address: SocketAddr,
        shutdown: CancellationToken,
        task: JoinHandle<()>,
    }

    impl Running {
        pub(in crate::serve) async fn tcp(router: Router) -> Running {
            let listener = bind_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
            let address = listener.tcp_address().unwrap();
            let shutdown = CancellationToken::new();
            let task = tokio::spawn(listen(listener, router, None, shutdown.clone()));
            Running { address, shutdown, task }
        }

        /// Everything that is answered to a request without a body; the connection is closed after it.
        pub(in crate::serve) async fn raw(&self, head: &str) -> String {
            self.raw_with_body(head, "").await
        }

        pub(in crate::serve) async fn raw_with_body(&self, head: &str, body: &str) -> String {
            let mut stream = TcpStream::connect(self.address).await.unwrap();
            stream.write_all(format!("{head}connection: close\r\n\r\n").as_bytes()).await.unwrap();
            // A body that is refused need not be read to its end.
            let _ = stream.write_all(body.as_bytes()).await;
            let mut answer = Vec::new();
            let _ = stream.read_to_end(&mut answer).await;
            String::from_utf8(answer).unwrap()
        }
    }

    impl Drop for Running {
        fn drop(&mut self) {
            self.shutdown.cancel();
        }
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[tokio::test]
    async fn a_socket_is_for_its_user_only_and_goes_away_with_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run/larder/larder.sock");
        let listener = bind_unix(&path).await.unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        UnixStream::connect(&path).await.unwrap();
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn pods_may_enter_their_directory_and_open_their_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("larder/pods/larder.sock");
        let listener = bind_for_pods(&path).await.unwrap();
        let pods = path.parent().unwrap();
        assert_eq!((mode(&path), mode(pods), mode(pods.parent().unwrap())), (0o666, 0o755, 0o700));
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn what_a_crash_left_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("larder.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _listener = bind_unix(&path).await.unwrap();
        UnixStream::connect(&path).await.unwrap();
    }

    #[tokio::test]
    async fn a_socket_that_somebody_answers_on_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("larder.sock");
        let _owner = bind_unix(&path).await.unwrap();
        let error = bind_unix(&path).await.unwrap_err();
        assert_eq!(error, Error::SocketInUse { path: path.clone() });
        assert_eq!(error.code(), Code::ListenFailed);
        UnixStream::connect(&path).await.unwrap();
    }

    #[tokio::test]
    async fn a_file_that_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("larder.sock");
        fs::write(&path, "mine").unwrap();
        assert_eq!(bind_unix(&path).await.unwrap_err(), Error::NotASocket { path: path.clone() });
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
    }

    #[tokio::test]
    async fn a_path_too_long_for_a_socket_is_said_with_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x".repeat(120));
        let error = bind_unix(&path).await.unwrap_err();
        assert!(matches!(error, Error::PathTooLong { bytes, .. } if bytes > 107), "{error}");
        assert!(error.to_string().contains("at most 107"), "{error}");
    }

    #[tokio::test]
    async fn a_successors_socket_is_not_unlinked() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("larder.sock");
        let old = bind_unix(&path).await.unwrap();
        fs::rename(&path, dir.path().join("aside")).unwrap();
        let _new = bind_unix(&path).await.unwrap();
        drop(old);
        UnixStream::connect(&path).await.unwrap();
    }

    #[tokio::test]
    async fn a_port_that_is_taken_names_the_setting() {
        let taken = bind_tcp("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = taken.tcp_address().unwrap();
        let error = bind_tcp(address).await.unwrap_err();
        assert_eq!(error, Error::PortInUse { address });
        assert!(error.action().contains("`serve.listen`"));
    }

    #[tokio::test]
    async fn a_request_under_way_is_answered_before_the_door_closes() {
        let begun = Arc::new(Semaphore::new(0));
        let may_end = Arc::new(Semaphore::new(0));
        let router = {
            let (begun, may_end) = (begun.clone(), may_end.clone());
            Router::new().route(
                "/",
                get(async move || {
                    begun.add_permits(1);
                    let _ = may_end.acquire().await;
                    "answered"
                }),
            )
        };
        let mut running = Running::tcp(router).await;
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        let _ = begun.acquire().await;
        running.shutdown.cancel();
        may_end.add_permits(1);
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("answered"), "{answer}");
        (&mut running.task).await.unwrap();
        assert!(TcpStream::connect(running.address).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_says_nothing_is_closed() {
        let running = Running::tcp(Router::new()).await;
        let mut stream = TcpStream::connect(running.address).await.unwrap();
        stream.write_all(b"GET / HT").await.unwrap();
        let mut answer = Vec::new();
        // Ends because the time limit passes; nothing else would end it.
        let _ = stream.read_to_end(&mut answer).await;
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 408"), "{answer:?}");
    }
}

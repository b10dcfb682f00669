//! The socket door over a cache in this process, and a client that says whatever it is told to.

use std::path::{Path, PathBuf};

use larder::cache::Cache;
use larder::client::{Client, Opener};
use larder::serve::fd::{Frames, listen_to_pods};
use larder::serve::{self, Door, ReadyLatches};
use larder::telemetry::Metrics;
use larder::wire::frame::{Decoder, MAX_ANSWER_BYTES};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// The node's own socket and the pods', as a daemon has them.
pub(crate) struct FrameDoor {
    dir: TempDir,
    shutdown: CancellationToken,
    doors: Vec<JoinHandle<()>>,
}

impl FrameDoor {
    /// With places for as many connections of frames.
    pub(crate) async fn start(cache: &Cache, most_connections: usize) -> FrameDoor {
        let dir = tempfile::tempdir().unwrap();
        let shutdown = CancellationToken::new();
        let frames = Frames::new(cache.clone(), most_connections, shutdown.clone());
        let (metrics, latches) = (Metrics::new().into(), ReadyLatches::new());
        let router = serve::router(Door { cache: cache.clone(), metrics, latches, shutdown: shutdown.clone() });
        let own = serve::bind_unix(&dir.path().join("larder.sock")).await.unwrap();
        let pods = serve::bind_for_pods(&dir.path().join("pods/larder.sock")).await.unwrap();
        let doors = vec![
            tokio::spawn(serve::listen(own, router, Some(frames.clone()), shutdown.clone())),
            tokio::spawn(listen_to_pods(pods, frames)),
        ];
        FrameDoor { dir, shutdown, doors }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.dir.path().join("larder.sock")
    }

    pub(crate) fn pod_socket(&self) -> PathBuf {
        self.dir.path().join("pods/larder.sock")
    }

    pub(crate) fn opener(&self) -> Opener {
        Opener::new(&self.socket())
    }

    pub(crate) fn http(&self) -> Client {
        Client::new(&self.socket())
    }

    pub(crate) async fn raw(&self) -> RawFrames {
        RawFrames::connect(&self.socket()).await
    }

    /// Shuts down, and waits until every connection has ended.
    pub(crate) async fn drain(&mut self) {
        self.shutdown.cancel();
        for door in &mut self.doors {
            door.await.unwrap();
        }
    }
}

impl Drop for FrameDoor {
    fn drop(&mut self) {
        self.shutdown.cancel();
    }
}

/// A client that takes no descriptors, and keeps no rule.
pub(crate) struct RawFrames {
    stream: UnixStream,
    decoder: Decoder,
    unread: Vec<u8>,
}

impl RawFrames {
    pub(crate) async fn connect(socket: &Path) -> RawFrames {
        let stream = UnixStream::connect(socket).await.unwrap();
        RawFrames { stream, decoder: Decoder::new(MAX_ANSWER_BYTES), unread: Vec::new() }
    }

    /// False when the other side is gone.
    pub(crate) async fn send(&mut self, bytes: &[u8]) -> bool {
        self.stream.write_all(bytes).await.is_ok()
    }

    pub(crate) async fn say(&mut self, request: Value) {
        assert!(self.send(&frame(&request.to_string())).await, "the daemon has closed the connection");
    }

    /// Says no more.
    pub(crate) async fn finish(&mut self) {
        self.stream.shutdown().await.unwrap();
    }

    /// The next frame; `None` at the end.
    pub(crate) async fn hear(&mut self) -> Option<Value> {
        loop {
            let mut bytes = self.unread.as_slice();
            let json = self.decoder.take(&mut bytes).unwrap();
            self.unread = bytes.to_vec();
            if let Some(json) = json {
                return Some(serde_json::from_slice(&json).unwrap());
            }
            let mut buffer = vec![0; 4096];
            // What was not read when it was closed shows as a reset.
            match self.stream.read(&mut buffer).await.unwrap_or(0) {
                0 => return None,
                read => self.unread.extend_from_slice(&buffer[..read]),
            }
        }
    }

    /// The next frame, which must be of this type.
    pub(crate) async fn hears(&mut self, kind: &str) -> Value {
        let heard = self.hear().await.unwrap_or_else(|| panic!("the connection ended instead of {kind}"));
        assert_eq!(heard["type"], kind, "{heard:#}");
        heard
    }

    /// The next frame, which must be an error of this code.
    pub(crate) async fn hears_error(&mut self, code: &str) -> String {
        let heard = &self.hears("error").await["problem"];
        assert_eq!(heard["code"], code, "{heard:#}");
        assert!(!heard["action"].as_str().unwrap().is_empty(), "{heard:#}");
        heard["detail"].as_str().unwrap().to_owned()
    }
}

/// A frame with this JSON.
pub(crate) fn frame(json: &str) -> Vec<u8> {
    [&u32::try_from(json.len()).unwrap().to_be_bytes(), json.as_bytes()].concat()
}

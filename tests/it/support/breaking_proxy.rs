//! A TCP proxy that breaks what real servers do not break by themselves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Forwards to a port of this machine; cuts and refuses when told to.
pub(crate) struct BreakingProxy {
    /// Where it listens.
    pub(crate) port: u16,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    denied: AtomicBool,
    /// Cut the first answer that is longer than this; 0 is never.
    cut_after: AtomicU64,
    connections: AtomicU64,
    received: AtomicU64,
}

impl BreakingProxy {
    /// Listens on a free port, and forwards to `upstream`.
    pub(crate) async fn start(upstream: u16) -> BreakingProxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = BreakingProxy { port: listener.local_addr().unwrap().port(), state: Arc::default() };
        let state = proxy.state.clone();
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                state.connections.fetch_add(1, Ordering::SeqCst);
                let state = state.clone();
                tokio::spawn(async move { forward(client, upstream, &state).await });
            }
        });
        proxy
    }

    /// Cuts the connection in the first answer that is longer than `bytes`, head included, once.
    pub(crate) fn cut_next_after(&self, bytes: u64) {
        self.state.cut_after.store(bytes, Ordering::SeqCst);
    }

    /// Whether the cut of [`BreakingProxy::cut_next_after`] is still to come.
    pub(crate) fn is_armed(&self) -> bool {
        self.state.cut_after.load(Ordering::SeqCst) > 0
    }

    /// Answers 403 to everything from now on, or no longer.
    pub(crate) fn deny(&self, denied: bool) {
        self.state.denied.store(denied, Ordering::SeqCst);
    }

    /// Connections so far.
    pub(crate) fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::SeqCst)
    }

    /// Bytes so far that came from upstream.
    pub(crate) fn received_bytes(&self) -> u64 {
        self.state.received.load(Ordering::SeqCst)
    }
}

async fn forward(mut client: TcpStream, upstream: u16, state: &State) {
    let Ok(mut server) = TcpStream::connect(("127.0.0.1", upstream)).await else { return };
    for stream in [&client, &server] {
        stream.set_nodelay(true).expect("a connected socket takes TCP_NODELAY");
    }
    let (mut up, mut down) = (vec![0; 16 * 1024], vec![0; 16 * 1024]);
    let mut answered = 0;
    loop {
        tokio::select! {
            read = client.read(&mut up) => {
                let Ok(read @ 1..) = read else { return };
                if state.denied.load(Ordering::SeqCst) {
                    let refusal = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
                    let _gone = client.write_all(refusal).await;
                    return;
                }
                // A request: what comes next is its answer.
                answered = 0;
                if server.write_all(&up[..read]).await.is_err() {
                    return;
                }
            }
            read = server.read(&mut down) => {
                let Ok(read @ 1..) = read else { return };
                state.received.fetch_add(read as u64, Ordering::SeqCst);
                answered += read as u64;
                let limit = state.cut_after.load(Ordering::SeqCst);
                let cut = limit > 0 && answered > limit;
                let kept = if cut { read - ((answered - limit) as usize).min(read) } else { read };
                if client.write_all(&down[..kept]).await.is_err() || cut {
                    state.cut_after.store(0, Ordering::SeqCst);
                    return;
                }
            }
        }
    }
}

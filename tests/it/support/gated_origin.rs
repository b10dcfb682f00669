//! A web server that sends as many bytes of files as it is told to, and then holds back the rest.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;

use super::raw_http::{Answer, Asked, Connection, sha256};

/// Longest wait for a client: a bound against hanging, not a measurement.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// Serves `/model/` with its listing.
pub(crate) struct GatedOrigin {
    port: u16,
    pub(crate) files: Arc<BTreeMap<String, Vec<u8>>>,
    gate: watch::Sender<Gate>,
}

#[derive(Debug, Clone, Copy)]
struct Gate {
    /// Bytes of files that may be sent, all requests together.
    allowed: u64,
    sent: u64,
}

impl GatedOrigin {
    /// Starts with these files; sends nothing of them yet.
    pub(crate) async fn start(files: BTreeMap<String, Vec<u8>>) -> GatedOrigin {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (files, gate) = (Arc::new(files), watch::Sender::new(Gate { allowed: 0, sent: 0 }));
        let entries = files.iter().map(|(p, b)| serde_json::json!({"path": p, "size": b.len(), "sha256": sha256(b)}));
        let listing = serde_json::json!({"files": entries.collect::<Vec<_>>()}).to_string();
        let (served, gated) = (files.clone(), gate.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (files, gate, listing) = (served.clone(), gated.clone(), listing.clone());
                tokio::spawn(async move {
                    let mut connection = Connection::new(stream);
                    while let Some(asked) = connection.next().await {
                        let file = asked.path.strip_prefix("/model/").and_then(|path| files.get(path));
                        let sent = match file {
                            Some(bytes) => send(&mut connection, &asked, bytes, &gate).await,
                            None if asked.path == "/model/larder.json" => {
                                connection.answer(&asked, Answer::new(200, &[], listing.clone())).await
                            }
                            None => connection.answer(&asked, Answer::new(404, &[], "no such file")).await,
                        };
                        if !sent {
                            return;
                        }
                    }
                });
            }
        });
        GatedOrigin { port, files, gate }
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }

    /// What to pull.
    pub(crate) fn reference(&self) -> String {
        format!("http://{}/model/", self.host())
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.files.values().map(|bytes| bytes.len() as u64).sum()
    }

    /// Bytes of files sent so far, all requests together.
    pub(crate) fn sent_bytes(&self) -> u64 {
        self.gate.borrow().sent
    }

    /// Lets so many more bytes out.
    pub(crate) fn allow_more(&self, bytes: u64) {
        self.gate.send_modify(|gate| gate.allowed = gate.sent.saturating_add(bytes));
    }

    /// Waits until it holds back.
    pub(crate) async fn held(&self) {
        self.until(|gate| gate.sent == gate.allowed).await;
    }

    /// Waits until it has sent so many bytes in all.
    pub(crate) async fn has_sent(&self, bytes: u64) {
        self.until(|gate| gate.sent >= bytes).await;
    }

    async fn until(&self, reached: impl FnMut(&Gate) -> bool) {
        let mut gate = self.gate.subscribe();
        let waited = tokio::time::timeout(MAX_WAIT, gate.wait_for(reached)).await;
        waited
            .unwrap_or_else(|_| panic!("nobody asks any more: {:?}", self.gate.borrow()))
            .expect("the sender is ours");
    }
}

/// Sends a file as far as the gate lets it. False when the client is gone.
async fn send(connection: &mut Connection, asked: &Asked, bytes: &[u8], gate: &watch::Sender<Gate>) -> bool {
    let answer = Answer::file(asked, bytes, &format!("\"{}\"", bytes.len()));
    if !connection.write(answer.head(answer.body.len())).await {
        return false;
    }
    let mut rest = if asked.method == "HEAD" { &[][..] } else { &answer.body[..] };
    let mut changes = gate.subscribe();
    while !rest.is_empty() {
        let mut granted = 0;
        gate.send_if_modified(|gate| {
            granted = (gate.allowed - gate.sent).min(rest.len().min(64 << 10) as u64);
            gate.sent += granted;
            granted > 0
        });
        if granted == 0 {
            tokio::select! {
                more = changes.wait_for(|gate| gate.allowed > gate.sent) => {
                    more.expect("the sender is ours");
                }
                () = connection.stall() => return false,
            }
            continue;
        }
        let (now, later) = rest.split_at(granted as usize);
        if !connection.write(now).await {
            return false;
        }
        rest = later;
    }
    true
}

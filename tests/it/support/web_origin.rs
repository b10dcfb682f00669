//! A web server that behaves, with a proxy before it that does not have to.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use larder::model::{Digest, ModelRef};
use larder::source::Environment;
use tokio::net::TcpListener;

use super::breaking_proxy::BreakingProxy;
use super::raw_http::{Answer, Asked, Connection, sha256};
use super::source_contract::{FILES, Origin};

/// Serves `/model/` with its `larder.json`, and the same files below `/plain/` without one.
pub(crate) struct WebOrigin {
    pub(crate) proxy: BreakingProxy,
    files: Arc<Mutex<Files>>,
    asked: Arc<Mutex<Vec<Asked>>>,
}

struct Files {
    bytes: BTreeMap<String, Vec<u8>>,
    checksums: bool,
}

impl WebOrigin {
    /// Starts with [`FILES`]; the listing has checksums, or only sizes.
    pub(crate) async fn start(checksums: bool) -> WebOrigin {
        let bytes = FILES.iter().map(|(path, bytes)| ((*path).to_owned(), bytes.to_vec())).collect();
        let files = Arc::new(Mutex::new(Files { bytes, checksums }));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = BreakingProxy::start(listener.local_addr().unwrap().port()).await;
        let (served, log) = (files.clone(), asked.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (served, log) = (served.clone(), log.clone());
                tokio::spawn(async move {
                    let mut connection = Connection::new(stream);
                    while let Some(asked) = connection.next().await {
                        log.lock().unwrap().push(asked.clone());
                        let answer = served.lock().unwrap().answer(&asked);
                        if !connection.answer(&asked, answer).await {
                            return;
                        }
                    }
                });
            }
        });
        WebOrigin { proxy, files, asked }
    }

    /// The address of a path.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}/{path}", self.proxy.port)
    }

    /// Every request so far, in order.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }
}

impl Files {
    fn answer(&self, asked: &Asked) -> Answer {
        if asked.path == "/model/larder.json" {
            return Answer::new(200, &[], self.listing());
        }
        let path = asked.path.strip_prefix("/model/").or_else(|| asked.path.strip_prefix("/plain/"));
        let path = path.map(|path| path.replace("%20", " "));
        match path.and_then(|path| self.bytes.get(&path)) {
            Some(bytes) => Answer::file(asked, bytes, &format!("\"{}\"", Digest::of(bytes).short())),
            None => Answer::new(404, &[], "no such file"),
        }
    }

    fn listing(&self) -> String {
        let files = self.bytes.iter().map(|(path, bytes)| {
            let mut entry = serde_json::json!({"path": path, "size": bytes.len()});
            if self.checksums {
                entry["sha256"] = sha256(bytes).into();
            }
            entry
        });
        serde_json::json!({"files": files.collect::<Vec<_>>()}).to_string()
    }
}

#[async_trait]
impl Origin for WebOrigin {
    fn environment(&self) -> Environment {
        Environment::default()
    }

    fn reference(&self) -> ModelRef {
        self.url("model/").parse().unwrap()
    }

    fn missing(&self) -> ModelRef {
        self.url("no-such-model/").parse().unwrap()
    }

    async fn put(&self, path: &str, bytes: &[u8]) {
        self.files.lock().unwrap().bytes.insert(path.to_owned(), bytes.to_vec());
    }

    async fn deny(&self, denied: bool) -> bool {
        self.proxy.deny(denied);
        true
    }

    async fn break_next_body_after(&self, bytes: u64) -> bool {
        self.proxy.cut_next_after(bytes);
        true
    }
}

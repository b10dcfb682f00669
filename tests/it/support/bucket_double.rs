//! A server that answers what it is told, for answers that the real servers cannot be made to give.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::Response;

/// One answer: status, headers, body.
pub(crate) struct Answer {
    /// The status.
    pub(crate) status: u16,
    /// Headers beside Content-Length.
    pub(crate) headers: Vec<(&'static str, String)>,
    /// The body.
    pub(crate) body: String,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    /// Path and query.
    pub(crate) target: String,
    /// When, on the clock of the runtime.
    pub(crate) at: tokio::time::Instant,
    /// Whether it carried a signature.
    pub(crate) signed: bool,
}

#[derive(Default)]
struct Script {
    answers: VecDeque<Answer>,
    seen: Vec<Seen>,
}

/// The double. Answers in the order given, then 500.
pub(crate) struct BucketDouble {
    /// `http://127.0.0.1:port`
    pub(crate) endpoint: String,
    script: Arc<Mutex<Script>>,
    task: tokio::task::JoinHandle<()>,
}

impl BucketDouble {
    /// Starts one with its answers.
    pub(crate) async fn start(answers: Vec<Answer>) -> BucketDouble {
        let script = Arc::new(Mutex::new(Script { answers: answers.into(), seen: Vec::new() }));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let router = axum::Router::new().fallback(answer).with_state(script.clone());
        let task = tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        BucketDouble { endpoint, script, task }
    }

    /// What was asked so far.
    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.script.lock().unwrap().seen.clone()
    }
}

impl Drop for BucketDouble {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn answer(State(script): State<Arc<Mutex<Script>>>, request: Request) -> Response<Body> {
    let mut script = script.lock().unwrap();
    script.seen.push(Seen {
        target: request.uri().to_string(),
        at: tokio::time::Instant::now(),
        signed: request.headers().contains_key("authorization"),
    });
    let fallback = || Answer { status: 500, headers: Vec::new(), body: "the script is at its end".into() };
    let answer = script.answers.pop_front().unwrap_or_else(fallback);
    let mut response = Response::builder().status(answer.status);
    for (name, value) in answer.headers {
        response = response.header(name, value);
    }
    response.body(Body::from(answer.body)).unwrap()
}

/// The page of an S3 (and GCS XML) listing with one object.
pub(crate) fn listing_of(key: &str, size: usize, etag: Option<&str>) -> String {
    let etag = etag.map(|etag| format!("<ETag>{etag}</ETag>")).unwrap_or_default();
    format!(
        "<ListBucketResult><Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00Z</LastModified>{etag}\
         <Size>{size}</Size></Contents></ListBucketResult>"
    )
}

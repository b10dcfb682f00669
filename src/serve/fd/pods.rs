//! The socket that pods mount. Whoever reaches it may open models, and do nothing else: HTTP, by which models can be
//! removed, is not spoken here.

use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;

use super::line::Line;
use super::session::Asker;
use super::{Frames, Spoken, spoken};
use crate::fault::{Code, Problem};
use crate::serve::problem::PROBLEM_JSON;
use crate::serve::{GRACE_SECONDS, PodListener, accept_again_after};
use crate::wire::http::ProblemBody;

/// Answers frames until the daemon shuts down. A connection for which there is no place is told so, and never left waiting.
pub async fn listen_to_pods(listener: PodListener, frames: Frames) {
    let mut connections = JoinSet::new();
    loop {
        // Ended ones are taken out as we go, so the set is never larger than the places.
        while connections.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = frames.0.shutdown.cancelled() => break,
        };
        match accepted {
            Ok(stream) => {
                if let Some(place) = frames.place_for(&stream) {
                    connections.spawn(answer(stream, place, frames.clone()));
                }
            }
            Err(error) => accept_again_after(error).await,
        }
    }
    drop(listener);
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(Duration::from_secs(GRACE_SECONDS), ended).await.is_err() {
        tracing::warn!(seconds = GRACE_SECONDS, "frames were still being sent and are cut off");
    }
}

async fn answer(stream: UnixStream, place: OwnedSemaphorePermit, frames: Frames) {
    let spoken = tokio::select! {
        spoken = spoken(&stream) => spoken,
        () = frames.0.shutdown.cancelled() => None,
    };
    match spoken {
        Some((Spoken::Frames, seen)) => frames.converse(stream, seen, Asker::Pod, place).await,
        Some((Spoken::Http, seen)) => {
            if let Err(over) = Line::new(stream, seen).finish(&not_here()).await {
                tracing::debug!(%over, "a connection broke");
            }
        }
        None => {}
    }
}

/// What is answered to HTTP, as HTTP.
fn not_here() -> Vec<u8> {
    let problem = Problem::new(
        Code::PolicyDenied,
        "cannot answer HTTP here: this socket hands out files of models, by frames, and does nothing else",
        "open models with a client of frames (docs/protocol.md); ask HTTP on the node's own socket (`serve.socket`)",
    );
    // Strings and numbers only: they always serialise.
    let body = serde_json::to_string(&ProblemBody::from(&problem)).unwrap_or_default();
    let length = body.len();
    let head = format!(
        "HTTP/1.1 403 Forbidden\r\ncontent-type: {PROBLEM_JSON}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n"
    );
    (head + &body).into_bytes()
}

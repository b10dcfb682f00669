//! Pulls: ask for one, follow it, take it back.

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::{Stream, StreamExt, stream};
use tokio::sync::watch;

use super::Door;
use super::problem::Refused;
use super::request::{Body, Name, blocking, caller};
use crate::model::ModelRef;
use crate::wire::http::{Phase, ProblemBody, PullList, PullRequest, PullStatus};

/// Shortest time between two events of one stream: about five a second are enough for an eye.
const EVENT_GAP: Duration = Duration::from_millis(200);

/// Time after which a comment says that the stream lives.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Makes a model local. Asking again joins the pull that is under way. Until somebody asks how it stands, the pull lets go first
/// what somebody waits for.
#[utoipa::path(post, operation_id = "submit_pull", path = "/v1/pulls", tag = "pulls",
    request_body = PullRequest,
    responses(
        (status = 200, description = "The model is local already", body = PullStatus,
            headers(("location" = String, description = "Where to ask how it stands"))),
        (status = 202, description = "The pull is under way", body = PullStatus,
            headers(("location" = String, description = "Where to ask how it stands"))),
        (status = 400, description = "bad-request, bad-reference, bad-pattern",
            body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "draining", body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn submit(
    State(door): State<Door>,
    headers: HeaderMap,
    Body(asked): Body<PullRequest>,
) -> Result<Response, Refused> {
    let reference = ModelRef::parse_with(&asked.reference, &asked.include, &asked.exclude)?;
    if asked.pin {
        let pinned = reference.clone();
        blocking(&door, move |door| Ok(door.cache.pin(&pinned)?)).await?;
    }
    // Who waits for it asks for it again, by its id.
    let handle = door.cache.pull_ahead_for(&reference, caller(&headers))?;
    if asked.warm {
        door.cache.warm_when_ready(&handle.id)?;
    }
    let pull = handle.status.borrow().clone();
    let status = if pull.phase == Phase::Ready { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, [(header::LOCATION, format!("/v1/pulls/{}", handle.id))], Json(pull)).into_response())
}

/// Lists the pulls the daemon remembers, newest first.
#[utoipa::path(get, operation_id = "list_pulls", path = "/v1/pulls", tag = "pulls",
    responses((status = 200, description = "The pulls", body = PullList)))]
pub(super) async fn list(State(door): State<Door>) -> Json<PullList> {
    Json(PullList { pulls: door.cache.pulls() })
}

/// Shows a pull; with `Accept: text/event-stream`, follows it to its end.
#[utoipa::path(get, operation_id = "show_pull", path = "/v1/pulls/{id}", tag = "pulls",
    params(("id" = String, Path, description = "The id that the pull was answered with")),
    responses(
        (status = 200, description = "As it stands now; or events `status`, each a PullStatus, and a last one `end`",
            content((PullStatus = "application/json"), (String = "text/event-stream"))),
        (status = 404, description = "pull-not-found", body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn show(State(door): State<Door>, Name(id): Name, headers: HeaderMap) -> Result<Response, Refused> {
    let handle = door.cache.follow_pull(&id)?;
    if !wants_events(&headers) {
        let pull = handle.status.borrow().clone();
        return Ok(Json(pull).into_response());
    }
    let events = events(handle.status)
        .map(|(name, data)| Ok::<_, Infallible>(Event::default().event(name).data(data)))
        .take_until(door.shutdown.clone().cancelled_owned());
    Ok(Sse::new(events).keep_alive(KeepAlive::new().interval(KEEP_ALIVE)).into_response())
}

/// Takes a pull back. Bytes so far stay on the disk for a later pull.
#[utoipa::path(delete, operation_id = "cancel_pull", path = "/v1/pulls/{id}", tag = "pulls",
    params(("id" = String, Path, description = "The id that the pull was answered with")),
    responses(
        (status = 200, description = "As it stood at its end", body = PullStatus),
        (status = 404, description = "pull-not-found", body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn cancel(State(door): State<Door>, Name(id): Name) -> Result<Json<PullStatus>, Refused> {
    Ok(Json(door.cache.cancel(&id).await?))
}

fn wants_events(headers: &HeaderMap) -> bool {
    headers.get_all(header::ACCEPT).iter().filter_map(|v| v.to_str().ok()).any(|v| v.contains("text/event-stream"))
}

enum Next {
    First,
    Change,
    End,
    Over,
}

/// `status` with the status now and at each change, then `end`. The end is never held back by the gap between events.
fn events(status: watch::Receiver<PullStatus>) -> impl Stream<Item = (&'static str, String)> {
    stream::unfold((status, Next::First), |(mut status, next)| async move {
        match next {
            Next::First => {}
            Next::Change => {
                // On a clone: waiting marks what it sees as seen.
                let mut ending = status.clone();
                let _ = tokio::time::timeout(EVENT_GAP, ending.wait_for(|pull| pull.phase.is_final())).await;
                if status.changed().await.is_err() {
                    return Some((("end", "{}".to_owned()), (status, Next::Over)));
                }
            }
            Next::End => return Some((("end", "{}".to_owned()), (status, Next::Over))),
            Next::Over => return None,
        }
        let pull = status.borrow_and_update().clone();
        let next = if pull.phase.is_final() { Next::End } else { Next::Change };
        // Strings and numbers only: it always serialises.
        let data = serde_json::to_string(&pull).unwrap_or_default();
        Some((("status", data), (status, next)))
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::serve) fn pull(phase: Phase, bytes_done: u64) -> PullStatus {
        PullStatus {
            phase,
            files_total: 1,
            bytes_done,
            bytes_total: 10,
            ..PullStatus::started("1", "file:///m", "2026-01-01T00:00:00Z".into())
        }
    }

    fn bytes_done((name, data): &(&'static str, String)) -> Option<u64> {
        (*name == "status").then(|| serde_json::from_str::<PullStatus>(data).unwrap().bytes_done)
    }

    #[tokio::test(start_paused = true)]
    async fn changes_faster_than_an_eye_become_one_event() {
        let (sender, receiver) = watch::channel(pull(Phase::Fetching, 0));
        let mut events = Box::pin(events(receiver));
        assert_eq!(bytes_done(&events.next().await.unwrap()), Some(0));
        for done in 1..=5 {
            sender.send_replace(pull(Phase::Fetching, done));
        }
        let before = tokio::time::Instant::now();
        assert_eq!(bytes_done(&events.next().await.unwrap()), Some(5));
        assert!(before.elapsed() >= EVENT_GAP);
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_within_the_gap_is_not_lost() {
        let (sender, receiver) = watch::channel(pull(Phase::Fetching, 0));
        let mut events = Box::pin(events(receiver));
        events.next().await.unwrap();
        let next = tokio::spawn(async move { events.next().await.unwrap() });
        tokio::task::yield_now().await;
        sender.send_replace(pull(Phase::Fetching, 1));
        assert_eq!(bytes_done(&next.await.unwrap()), Some(1));
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_comes_at_once_and_ends_the_stream() {
        let (sender, receiver) = watch::channel(pull(Phase::Fetching, 0));
        let mut events = Box::pin(events(receiver));
        events.next().await.unwrap();
        sender.send_replace(pull(Phase::Ready, 10));
        let before = tokio::time::Instant::now();
        assert_eq!(bytes_done(&events.next().await.unwrap()), Some(10));
        assert_eq!(before.elapsed(), Duration::ZERO);
        assert_eq!(events.next().await.unwrap().0, "end");
        assert!(events.next().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_pull_that_is_forgotten_ends_the_stream() {
        let (sender, receiver) = watch::channel(pull(Phase::Fetching, 0));
        let mut events = Box::pin(events(receiver));
        events.next().await.unwrap();
        drop(sender);
        assert_eq!(events.next().await.unwrap().0, "end");
    }
}

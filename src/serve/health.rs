//! Whether the process lives, whether it is ready, and its numbers.

use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::Door;
use super::problem::Refused;
use super::request::blocking;
use crate::fault::Problem;
use crate::telemetry::metrics;
use crate::wire::http::{Detail, Readiness};

/// What still has to happen before the daemon is ready. Cheap to clone: all clones are one.
///
/// Each thing is a named [`Latch`]; the daemon is ready when none is held. A drain holds one to its end.
#[derive(Debug, Clone, Default)]
pub struct ReadyLatches {
    held: Arc<Mutex<Held>>,
}

#[derive(Debug, Default)]
struct Held {
    last_id: u64,
    /// An id besides the name, so that two latches of one name are two.
    latches: Vec<(u64, String)>,
}

/// One thing that still has to happen. Dropping it says that it has.
#[derive(Debug)]
#[must_use = "dropping a latch says that the thing has happened"]
pub struct Latch {
    id: u64,
    of: ReadyLatches,
}

impl ReadyLatches {
    /// Nothing is held: ready.
    pub fn new() -> ReadyLatches {
        ReadyLatches::default()
    }

    /// From now on the daemon is not ready, because of `what`; until the latch is dropped.
    pub fn hold(&self, what: impl Into<String>) -> Latch {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.last_id += 1;
        let id = held.last_id;
        held.latches.push((id, what.into()));
        Latch { id, of: self.clone() }
    }

    /// What is held, in the order it was taken.
    pub fn waiting_for(&self) -> Vec<String> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.latches.iter().map(|(_, what)| what.clone()).collect()
    }
}

impl Drop for Latch {
    fn drop(&mut self) {
        let mut held = self.of.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.latches.retain(|(id, _)| *id != self.id);
    }
}

/// `read_only` does not make it unready: what is local can still be opened. A disk that is `stalled` does, because it may not
/// give that either.
fn readiness(
    latches: &ReadyLatches,
    stalled: Option<Problem>,
    read_only: Option<String>,
    details: Vec<Detail>,
) -> Readiness {
    let mut waiting_for = latches.waiting_for();
    waiting_for.extend(stalled.map(|why| format!("{}: {}; {}", why.code, why.message, why.action)));
    let ready = waiting_for.is_empty();
    waiting_for.extend(read_only.map(|why| format!("volume is read-only: {why}")));
    Readiness { ready, waiting_for, version: env!("CARGO_PKG_VERSION").to_owned(), details }
}

/// Whether the process answers at all. Touches neither disk nor network.
#[utoipa::path(get, path = "/livez", tag = "health", responses(
    (status = 200, description = "The process answers", body = String, content_type = "text/plain", example = "ok"),
))]
pub(super) async fn livez() -> &'static str {
    "ok"
}

/// Whether models can be opened and pulled, and if not, what is missing.
#[utoipa::path(get, path = "/readyz", tag = "health", responses(
    (status = 200, description = "Ready", body = Readiness),
    (status = 503, description = "Not ready: starting, shutting down, or the disk does not answer", body = Readiness),
))]
pub(super) async fn readyz(State(door): State<Door>) -> Response {
    let stalled = door.cache.why_stalled().await.map(Problem::from);
    // They ask the disk.
    let details = if stalled.is_some() { Vec::new() } else { door.cache.details() };
    let readiness = readiness(&door.latches, stalled, door.cache.read_only_because(), details);
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(readiness)).into_response()
}

/// Numbers for Prometheus, as OpenMetrics text.
#[utoipa::path(get, operation_id = "metrics", path = "/metrics", tag = "health", responses(
    (status = 200, description = "OpenMetrics text", body = String, content_type = "application/openmetrics-text"),
))]
pub(super) async fn numbers(State(door): State<Door>) -> Result<Response, Refused> {
    let text = blocking(&door, |door| Ok(door.metrics.encode(&door.cache.gauges()))).await?;
    Ok(([(header::CONTENT_TYPE, metrics::CONTENT_TYPE)], text).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Code;

    #[test]
    fn ready_when_every_latch_is_dropped_and_not_before() {
        let latches = ReadyLatches::new();
        let volume = latches.hold("volume");
        let listeners = latches.hold("listeners");
        let twin = latches.hold("listeners");
        assert_eq!(readiness(&latches, None, None, vec![]).waiting_for, ["volume", "listeners", "listeners"]);
        drop(volume);
        drop(twin);
        let seen = readiness(&latches, None, None, vec![]);
        assert_eq!((seen.ready, seen.waiting_for), (false, vec!["listeners".to_owned()]));
        drop(listeners);
        assert!(readiness(&latches, None, None, vec![]).ready);
    }

    #[test]
    fn a_read_only_volume_is_listed_but_ready() {
        let latches = ReadyLatches::new();
        let seen = readiness(&latches, None, Some("fsync failed".to_owned()), vec![]);
        assert_eq!((seen.ready, seen.waiting_for), (true, vec!["volume is read-only: fsync failed".to_owned()]));
    }

    #[test]
    fn a_disk_that_does_not_answer_is_named_with_what_to_do() {
        let stalled = Problem::new(Code::DiskStalled, "it has not answered for 12 s", "look at it");
        let seen = readiness(&ReadyLatches::new(), Some(stalled), None, vec![]);
        let expected = "disk-stalled: it has not answered for 12 s; look at it".to_owned();
        assert_eq!((seen.ready, seen.waiting_for), (false, vec![expected]));
    }
}

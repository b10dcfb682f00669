//! Scrubs: ask for one, look at it, take it back.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::Door;
use super::problem::Refused;
use super::request::{Body, Name};
use crate::fault::Code;
use crate::wire::http::{ProblemBody, ScrubList, ScrubRequest, ScrubStatus};

/// Reads every blob from the disk and hashes it again. Asking again joins the scrub that somebody has asked for; one that the
/// daemon began by itself gives way.
#[utoipa::path(post, operation_id = "submit_scrub", path = "/v1/scrubs", tag = "scrubs",
    request_body = ScrubRequest,
    responses(
        (status = 202, description = "The scrub is under way", body = ScrubStatus,
            headers(("location" = String, description = "Where to ask how it stands"))),
        (status = 400, description = "bad-request", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "draining", body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn submit(State(door): State<Door>, Body(asked): Body<ScrubRequest>) -> Result<Response, Refused> {
    if asked.bytes_per_second == Some(0) {
        let found = "cannot scrub: `bytes_per_second` is 0";
        return Err(Refused::new(
            Code::BadRequest,
            found,
            "leave it out, or say how many bytes may be read in a second",
        ));
    }
    let handle = door.cache.scrub(asked.bytes_per_second)?;
    let scrub = handle.status.borrow().clone();
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, format!("/v1/scrubs/{}", handle.id))], Json(scrub)).into_response())
}

/// Lists the scrubs the daemon remembers, newest first.
#[utoipa::path(get, operation_id = "list_scrubs", path = "/v1/scrubs", tag = "scrubs",
    responses((status = 200, description = "The scrubs", body = ScrubList)))]
pub(super) async fn list(State(door): State<Door>) -> Json<ScrubList> {
    Json(ScrubList { scrubs: door.cache.scrubs() })
}

/// Shows a scrub as it stands now.
#[utoipa::path(get, operation_id = "show_scrub", path = "/v1/scrubs/{id}", tag = "scrubs",
    params(("id" = String, Path, description = "The id that the scrub was answered with")),
    responses(
        (status = 200, description = "As it stands now", body = ScrubStatus),
        (status = 404, description = "scrub-not-found", body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn show(State(door): State<Door>, Name(id): Name) -> Result<Json<ScrubStatus>, Refused> {
    let scrub = door.cache.scrub_status(&id)?.status.borrow().clone();
    Ok(Json(scrub))
}

/// Stops a scrub. What it has found stays found.
#[utoipa::path(delete, operation_id = "cancel_scrub", path = "/v1/scrubs/{id}", tag = "scrubs",
    params(("id" = String, Path, description = "The id that the scrub was answered with")),
    responses(
        (status = 200, description = "As it stood at its end", body = ScrubStatus),
        (status = 404, description = "scrub-not-found", body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn cancel(State(door): State<Door>, Name(id): Name) -> Result<Json<ScrubStatus>, Refused> {
    Ok(Json(door.cache.cancel_scrub(&id).await?))
}

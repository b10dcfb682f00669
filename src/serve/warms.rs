//! Warm-ups: ask for one, look at it, take it back.

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};

use super::Door;
use super::problem::Refused;
use super::request::{Body, Name};
use crate::model::ModelRef;
use crate::wire::http::{ProblemBody, WarmList, WarmRequest, WarmStatus};

/// Brings a model that is local into the page cache. Asking again joins the warm-up that is under way.
#[utoipa::path(post, operation_id = "submit_warm", path = "/v1/warms", tag = "warms",
    request_body = WarmRequest,
    responses(
        (status = 202, description = "The warm-up is under way", body = WarmStatus,
            headers(("location" = String, description = "Where to ask how it stands"))),
        (status = 400, description = "bad-request, bad-reference, bad-pattern",
            body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "not-local", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "not-ready: it is being pulled; too-many-holders, draining",
            body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn submit(State(door): State<Door>, Body(asked): Body<WarmRequest>) -> Result<Response, Refused> {
    let reference = ModelRef::parse_with(&asked.reference, &asked.include, &asked.exclude)?;
    let handle = door.cache.warm(&reference)?;
    let warm = handle.status.borrow().clone();
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, format!("/v1/warms/{}", handle.id))], Json(warm)).into_response())
}

/// Lists the warm-ups the daemon remembers, newest first.
#[utoipa::path(get, operation_id = "list_warms", path = "/v1/warms", tag = "warms",
    responses((status = 200, description = "The warm-ups", body = WarmList)))]
pub(super) async fn list(State(door): State<Door>) -> Json<WarmList> {
    Json(WarmList { warms: door.cache.warms() })
}

/// Shows a warm-up as it stands now.
#[utoipa::path(get, operation_id = "show_warm", path = "/v1/warms/{id}", tag = "warms",
    params(("id" = String, Path, description = "The id that the warm-up was answered with")),
    responses(
        (status = 200, description = "As it stands now", body = WarmStatus),
        (status = 404, description = "warm-not-found", body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn show(State(door): State<Door>, Name(id): Name) -> Result<Json<WarmStatus>, Refused> {
    let warm = door.cache.warm_status(&id)?.status.borrow().clone();
    Ok(Json(warm))
}

/// Stops a warm-up. What is resident stays so.
#[utoipa::path(delete, operation_id = "cancel_warm", path = "/v1/warms/{id}", tag = "warms",
    params(("id" = String, Path, description = "The id that the warm-up was answered with")),
    responses(
        (status = 200, description = "As it stood at its end", body = WarmStatus),
        (status = 404, description = "warm-not-found", body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn cancel(State(door): State<Door>, Name(id): Name) -> Result<Json<WarmStatus>, Refused> {
    Ok(Json(door.cache.cancel_warm(&id).await?))
}

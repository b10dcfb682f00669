//! Pins: which references are kept.

use axum::Json;
use axum::extract::State;

use super::Door;
use super::problem::Refused;
use super::request::{Body, Name, blocking};
use crate::model::ModelRef;
use crate::wire::http::{PinInfo, PinList, PinRequest, ProblemBody};

/// Pins a reference, and pulls it if it is not local. Pinning it again changes nothing.
#[utoipa::path(post, operation_id = "pin", path = "/v1/pins", tag = "pins",
    request_body = PinRequest,
    responses(
        (status = 200, description = "The pin", body = PinInfo),
        (status = 400, description = "bad-request, bad-reference, bad-pattern",
            body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "too-many-holders, too-many-pulls, draining",
            body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn pin(State(door): State<Door>, Body(asked): Body<PinRequest>) -> Result<Json<PinInfo>, Refused> {
    let reference = ModelRef::parse_with(&asked.reference, &asked.include, &asked.exclude)?;
    let wanted = reference.clone();
    let pin = blocking(&door, move |door| Ok(door.cache.pin(&reference)?)).await?;
    if pin.model.is_none() {
        door.cache.pull(&wanted)?;
    }
    Ok(Json(pin))
}

/// Lists the pins.
#[utoipa::path(get, operation_id = "list_pins", path = "/v1/pins", tag = "pins",
    responses((status = 200, description = "The pins", body = PinList)))]
pub(super) async fn list(State(door): State<Door>) -> Json<PinList> {
    Json(PinList { pins: door.cache.pins() })
}

/// Unpins a reference. The model stays until it is removed.
#[utoipa::path(delete, operation_id = "unpin", path = "/v1/pins/{name}", tag = "pins",
    params(("name" = String, Path, description = "A percent-encoded reference")),
    responses(
        (status = 200, description = "Who still wants it kept", body = PinInfo),
        (status = 403, description = "policy-denied: the configuration lists it",
            body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "not-pinned", body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn unpin(State(door): State<Door>, Name(name): Name) -> Result<Json<PinInfo>, Refused> {
    let reference: ModelRef = name.parse()?;
    Ok(Json(blocking(&door, move |door| Ok(door.cache.unpin(&reference)?)).await?))
}

//! Evictions: what would go, what goes now, and what went.

use axum::Json;
use axum::extract::State;
use axum::http::Uri;
use serde::Deserialize;

use super::Door;
use super::problem::Refused;
use super::request::{Body, blocking, query};
use crate::fault::Code;
use crate::model::Bytes;
use crate::wire::http::{EvictRequest, Evicted, EvictionList, EvictionPlan, ProblemBody};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    need: String,
}

/// Says what would be evicted for so many bytes, and who keeps the rest. Changes nothing.
#[utoipa::path(get, operation_id = "plan_evictions", path = "/v1/evictions/plan", tag = "evictions",
    params(("need" = String, Query, description = "How much should fit: `140GB`, or a number of bytes")),
    responses(
        (status = 200, description = "The plan", body = EvictionPlan),
        (status = 400, description = "bad-request", body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn plan(State(door): State<Door>, uri: Uri) -> Result<Json<EvictionPlan>, Refused> {
    let Wanted { need } = query(&uri)?;
    let need: Bytes = need.parse().map_err(|found: String| {
        Refused::new(Code::BadRequest, format!("cannot read `need`: {found}"), "write it as in `need=140GB`")
    })?;
    Ok(Json(blocking(&door, move |door| Ok(door.cache.eviction_plan(need.0)?)).await?))
}

/// Makes so many bytes fit, as a pull would: all of it, or nothing goes.
#[utoipa::path(post, operation_id = "evict", path = "/v1/evictions", tag = "evictions",
    request_body = EvictRequest,
    responses(
        (status = 200, description = "What is gone", body = Evicted),
        (status = 503, description = "model-in-use: who uses what cannot be known",
            body = ProblemBody, content_type = "application/problem+json"),
        (status = 507, description = "volume-full: too much is kept",
            body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn evict(State(door): State<Door>, Body(asked): Body<EvictRequest>) -> Result<Json<Evicted>, Refused> {
    Ok(Json(blocking(&door, move |door| Ok(door.cache.evict_for(asked.need_bytes)?)).await?))
}

/// Lists what was evicted and why, newest first: the last thousand.
#[utoipa::path(get, operation_id = "list_evictions", path = "/v1/evictions", tag = "evictions",
    responses((status = 200, description = "The evictions", body = EvictionList)))]
pub(super) async fn list(State(door): State<Door>) -> Result<Json<EvictionList>, Refused> {
    let evictions = blocking(&door, |door| Ok(door.cache.evictions()?)).await?;
    Ok(Json(EvictionList { evictions }))
}

//! Starts: what a model, or the models of a pod, cost whoever waited for them.

use axum::Json;
use axum::extract::State;
use axum::http::Uri;
use serde::Deserialize;

use super::Door;
use super::problem::Refused;
use super::request::{blocking, query};
use crate::fault::Code;
use crate::wire::http::{ProblemBody, StartList};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    model: Option<String>,
    pod: Option<String>,
}

/// Says what the last start of a model has cost, or why it is not here; or the same for each model of a pod.
#[utoipa::path(get, operation_id = "list_starts", path = "/v1/starts", tag = "starts",
    params(
        ("model" = Option<String>, Query, description = "A reference: its current version; or a model id"),
        ("pod" = Option<String>, Query, description = "`NAMESPACE/NAME`: the models that it leases, or has leased while that is remembered"),
    ),
    responses(
        (status = 200, description = "The starts, at least one", body = StartList),
        (status = 400, description = "bad-request: neither `model` nor `pod`, or both; bad-reference",
            body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "lease-not-found: no lease of the pod is known; not-local: no version has this id",
            body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn list(State(door): State<Door>, uri: Uri) -> Result<Json<StartList>, Refused> {
    let starts = match query(&uri)? {
        Wanted { model: Some(name), pod: None } => {
            vec![blocking(&door, move |door| Ok(door.cache.last_start(&name)?)).await?]
        }
        Wanted { model: None, pod: Some(pod) } => {
            blocking(&door, move |door| Ok(door.cache.last_starts_of_pod(&pod)?)).await?
        }
        _ => {
            let found = "cannot read the query: it has not exactly one of `model` and `pod`";
            return Err(Refused::new(Code::BadRequest, found, "ask for one: `?model=REF` or `?pod=NAMESPACE/NAME`"));
        }
    };
    Ok(Json(StartList { starts }))
}

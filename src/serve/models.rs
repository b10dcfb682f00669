//! Models: list, look at, open, remove.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, Uri};
use serde::Deserialize;

use super::Door;
use super::problem::Refused;
use super::request::{Body, Name, blocking, caller, query};
use crate::model::ModelRef;
use crate::wire::http::{ModelDetail, ModelList, OpenRequest, Opened, ProblemBody, Removed};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Wanted {
    reference: Option<String>,
    #[serde(default)]
    resident: bool,
}

/// Lists the models that are local and whole.
#[utoipa::path(get, operation_id = "list_models", path = "/v1/models", tag = "models",
    params(
        ("reference" = Option<String>, Query, description = "Only the versions of this reference"),
        ("resident" = Option<bool>, Query, description = "Ask the kernel how much of each is in the page cache"),
    ),
    responses((status = 200, description = "The models", body = ModelList)))]
pub(super) async fn list(State(door): State<Door>, uri: Uri) -> Result<Json<ModelList>, Refused> {
    let Wanted { reference, resident } = query(&uri)?;
    let reference = reference.map(|text| text.parse::<ModelRef>()).transpose()?.map(|r| r.to_string());
    let mut models = blocking(&door, |door| Ok(door.cache.models())).await?;
    if let Some(reference) = reference {
        models.retain(|model| model.reference == reference);
    }
    if resident {
        models = blocking(&door, |door| Ok(door.cache.with_residency(models))).await?;
    }
    Ok(Json(ModelList { models }))
}

/// Shows a model with its files.
#[utoipa::path(get, operation_id = "show_model", path = "/v1/models/{name}", tag = "models",
    params(("name" = String, Path, description = "A model id, or a percent-encoded reference: its current version")),
    responses(
        (status = 200, description = "The model", body = ModelDetail),
        (status = 404, description = "not-local", body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn show(State(door): State<Door>, Name(name): Name) -> Result<Json<ModelDetail>, Refused> {
    Ok(Json(blocking(&door, move |door| Ok(door.cache.model(&name)?)).await?))
}

/// Removes a model, or all versions of a reference. Readers that have files open keep them.
#[utoipa::path(delete, operation_id = "remove_model", path = "/v1/models/{name}", tag = "models",
    params(("name" = String, Path, description = "A model id, or a percent-encoded reference: all its versions")),
    responses(
        (status = 200, description = "What is gone", body = Removed),
        (status = 404, description = "not-local", body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn remove(State(door): State<Door>, Name(name): Name) -> Result<Json<Removed>, Refused> {
    Ok(Json(blocking(&door, move |door| Ok(door.cache.remove(&name)?)).await?))
}

/// Opens a model that is local: answers with the directory to read. Never asks the source.
#[utoipa::path(post, operation_id = "open_model", path = "/v1/opens", tag = "models",
    request_body = OpenRequest,
    responses(
        (status = 200, description = "The current version", body = Opened),
        (status = 400, description = "bad-request, bad-reference, bad-pattern",
            body = ProblemBody, content_type = "application/problem+json"),
        (status = 404, description = "not-local", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "not-ready: it is being pulled",
            body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn open(
    State(door): State<Door>,
    headers: HeaderMap,
    Body(asked): Body<OpenRequest>,
) -> Result<Json<Opened>, Refused> {
    let caller = caller(&headers);
    Ok(Json(blocking(&door, move |door| Ok(door.cache.open_for(&asked, caller.as_ref())?)).await?))
}

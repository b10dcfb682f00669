//! Leases: who uses what. They are taken by opening a model.

use axum::Json;
use axum::extract::State;

use super::Door;
use super::problem::Refused;
use super::request::{Name, blocking};
use crate::wire::http::{LeaseInfo, LeaseList, ProblemBody};

/// Lists the leases, oldest first.
#[utoipa::path(get, operation_id = "list_leases", path = "/v1/leases", tag = "leases",
    responses((status = 200, description = "The leases", body = LeaseList)))]
pub(super) async fn list(State(door): State<Door>) -> Json<LeaseList> {
    Json(LeaseList { leases: door.cache.leases() })
}

/// Releases a lease. One of a connection ends with its connection only.
#[utoipa::path(delete, operation_id = "release_lease", path = "/v1/leases/{id}", tag = "leases",
    params(("id" = String, Path, description = "The id that the lease was answered with")),
    responses(
        (status = 200, description = "As it was", body = LeaseInfo),
        (status = 404, description = "lease-not-found", body = ProblemBody, content_type = "application/problem+json"),
        (status = 503, description = "model-in-use: it is a connection",
            body = ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn release(State(door): State<Door>, Name(id): Name) -> Result<Json<LeaseInfo>, Refused> {
    Ok(Json(blocking(&door, move |door| Ok(door.cache.release(&id)?)).await?))
}

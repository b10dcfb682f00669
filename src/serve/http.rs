//! All routes on one page.

use axum::{Json, Router};
use utoipa::OpenApi;
use utoipa::openapi::{ContentBuilder, Ref, Response, ResponseBuilder};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::problem::PROBLEM_JSON;
use super::{Door, evictions, health, leases, models, pins, pulls, request, scrubs, starts, warms};
use crate::wire::http::ProblemBody;

#[derive(OpenApi)]
#[openapi(
    info(title = "larder", description = "A node-local model cache: makes a model local once, and proves every byte"),
    tags(
        (name = "pulls", description = "Make a model local"),
        (name = "models", description = "What is local"),
        (name = "starts", description = "Why a start was slow, or a model is not here"),
        (name = "leases", description = "Who uses what"),
        (name = "pins", description = "What is kept"),
        (name = "scrubs", description = "Look at every byte on the disk"),
        (name = "evictions", description = "Make room, and say what went"),
        (name = "warms", description = "Bring a model into memory"),
        (name = "health", description = "For probes and Prometheus"),
    ),
    components(schemas(ProblemBody)),
)]
struct Api;

fn routes() -> OpenApiRouter<Door> {
    OpenApiRouter::with_openapi(Api::openapi())
        .routes(routes!(pulls::submit, pulls::list)) //     POST   GET     /v1/pulls
        .routes(routes!(pulls::show, pulls::cancel)) //     GET    DELETE  /v1/pulls/{id}
        .routes(routes!(models::list)) //                   GET            /v1/models
        .routes(routes!(models::show, models::remove)) //   GET    DELETE  /v1/models/{name}
        .routes(routes!(models::open)) //                   POST           /v1/opens
        .routes(routes!(starts::list)) //                   GET            /v1/starts
        .routes(routes!(leases::list)) //                   GET            /v1/leases
        .routes(routes!(leases::release)) //                       DELETE  /v1/leases/{id}
        .routes(routes!(pins::pin, pins::list)) //          POST   GET     /v1/pins
        .routes(routes!(pins::unpin)) //                           DELETE  /v1/pins/{name}
        .routes(routes!(scrubs::submit, scrubs::list)) //   POST   GET     /v1/scrubs
        .routes(routes!(scrubs::show, scrubs::cancel)) //   GET    DELETE  /v1/scrubs/{id}
        .routes(routes!(evictions::evict, evictions::list)) // POST GET    /v1/evictions
        .routes(routes!(evictions::plan)) //                GET            /v1/evictions/plan
        .routes(routes!(warms::submit, warms::list)) //     POST   GET     /v1/warms
        .routes(routes!(warms::show, warms::cancel)) //     GET    DELETE  /v1/warms/{id}
        .routes(routes!(document)) //                       GET            /openapi.json
        .merge(health_routes())
}

/// What probes and Prometheus ask. They change nothing.
fn health_routes() -> OpenApiRouter<Door> {
    OpenApiRouter::new()
        .routes(routes!(health::livez)) //                  GET            /livez
        .routes(routes!(health::readyz)) //                 GET            /readyz
        .routes(routes!(health::numbers)) //                GET            /metrics
}

/// This document.
#[utoipa::path(get, operation_id = "openapi", path = "/openapi.json", tag = "health", responses(
    (status = 200, description = "OpenAPI 3.1", body = serde_json::Value),
))]
async fn document() -> Json<utoipa::openapi::OpenApi> {
    Json(openapi())
}

/// The API with everything a request gets on its way in and out.
pub fn router(door: Door) -> Router {
    let metrics = door.metrics.clone();
    request::with_manners(routes().with_state(door).into(), metrics)
}

/// Health and metrics alone, with the same manners: for a port that more may reach than may pull.
pub fn health_router(door: Door) -> Router {
    let metrics = door.metrics.clone();
    request::with_manners(health_routes().with_state(door).into(), metrics)
}

/// The API in OpenAPI 3.1, from the handlers themselves.
pub fn openapi() -> utoipa::openapi::OpenApi {
    let mut api = routes().into_openapi();
    for (_, item) in api.paths.paths.iter_mut().filter(|(path, _)| path.starts_with("/v1/")) {
        let operations = [&mut item.get, &mut item.post, &mut item.delete];
        for operation in operations.into_iter().flatten() {
            operation.responses.responses.insert("default".to_owned(), any_problem().into());
        }
    }
    api
}

/// What an operation answers besides what it lists.
fn any_problem() -> Response {
    let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("ProblemBody"))).build();
    ResponseBuilder::new().description("Any error; `code` says which").content(PROBLEM_JSON, content).build()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_document_is_openapi_3_1_with_this_version() {
        let api = serde_json::to_value(openapi()).unwrap();
        assert!(api["openapi"].as_str().unwrap().starts_with("3.1."), "{}", api["openapi"]);
        assert_eq!(api["info"]["version"], env!("CARGO_PKG_VERSION"));
    }

    /// Generated clients name their functions after these.
    #[test]
    fn every_operation_has_a_name_of_its_own() {
        let api = serde_json::to_value(openapi()).unwrap();
        let items = api["paths"].as_object().unwrap().values();
        let operations: Vec<_> = items.flat_map(|item| item.as_object().unwrap().values()).collect();
        let names: BTreeSet<_> =
            operations.iter().map(|operation| operation["operationId"].as_str().unwrap()).collect();
        assert_eq!(names.len(), operations.len(), "{names:?}");
    }

    #[test]
    fn every_error_is_documented_as_a_problem() {
        let api = serde_json::to_value(openapi()).unwrap();
        for (path, item) in api["paths"].as_object().unwrap() {
            for (method, operation) in item.as_object().unwrap() {
                let responses = operation["responses"].as_object().unwrap();
                assert!(!path.starts_with("/v1/") || responses.contains_key("default"), "{method} {path}");
                let errors = responses.iter().filter(|(status, _)| !status.starts_with('2'));
                // What `/readyz` answers when it is not ready is not an error of the request.
                for (status, response) in errors.filter(|_| path != "/readyz") {
                    let schema = &response["content"][PROBLEM_JSON]["schema"]["$ref"];
                    assert_eq!(schema, "#/components/schemas/ProblemBody", "{method} {path} {status}");
                }
            }
        }
    }

    #[test]
    fn every_reference_in_the_document_leads_somewhere() {
        let text = serde_json::to_string(&openapi()).unwrap();
        let api: serde_json::Value = serde_json::from_str(&text).unwrap();
        let named: BTreeSet<&str> =
            text.split("\"#/components/schemas/").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        assert!(named.contains("PullStatus") && named.contains("ModelDetail"), "{named:?}");
        for name in named {
            assert!(api["components"]["schemas"].get(name).is_some(), "{name} is not in the document");
        }
    }
}

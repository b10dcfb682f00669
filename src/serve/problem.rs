//! Every error of the door, as `application/problem+json` (RFC 9457).

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};

use crate::fault::{Code, Diagnose, Problem};
use crate::wire::http::ProblemBody;

/// Media type of every error.
pub(super) const PROBLEM_JSON: &str = "application/problem+json";

/// A request that is not granted. It travels as an extension of an empty response to the outermost layer, which alone
/// knows the request's id and writes the body and the log line.
#[derive(Debug, Clone)]
pub(super) struct Refused {
    pub(super) problem: Problem,
    status: StatusCode,
}

impl<E: Diagnose> From<E> for Refused {
    fn from(error: E) -> Refused {
        let problem = Problem::of(&error);
        let status = StatusCode::from_u16(problem.fault().http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Refused { problem, status }
    }
}

impl Refused {
    /// A refusal that the door itself has a reason for.
    pub(super) fn new(code: Code, message: impl Into<String>, action: impl Into<String>) -> Refused {
        Problem { code, message: message.into(), action: action.into(), retry_after_seconds: None }.into()
    }

    /// 405 is not the status of any fault: the code stays `bad-request`.
    pub(super) fn method_not_allowed(method: &str) -> Refused {
        let mut refused = Refused::new(
            Code::BadRequest,
            format!("cannot answer {method} here: the route exists, the method does not"),
            "see the Allow header and `GET /openapi.json`",
        );
        refused.status = StatusCode::METHOD_NOT_ALLOWED;
        refused
    }

    /// 401 is not the status of any fault: who asks must say who he is.
    pub(super) fn without_a_token(message: String, action: String) -> Refused {
        let mut refused = Refused::new(Code::TokenRefused, message, action);
        refused.status = StatusCode::UNAUTHORIZED;
        refused
    }

    /// Makes `response`, which carries this refusal, say it.
    pub(super) fn write_into(self, response: &mut Response, request_id: &str) {
        let mut body = ProblemBody::from(&self.problem);
        body.status = self.status.as_u16();
        body.request_id = Some(request_id.to_owned());
        *response.status_mut() = self.status;
        // Strings and numbers only: they always serialise.
        let text = serde_json::to_vec(&body).unwrap_or_default();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        headers.insert(header::CONTENT_LENGTH, HeaderValue::from(text.len()));
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(seconds) = self.problem.retry_after_seconds {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        *response.body_mut() = text.into();
    }
}

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        response.extensions_mut().insert(self);
        response
    }
}

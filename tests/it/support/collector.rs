//! A collector of traces: takes OTLP over HTTP, and keeps every span.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::http::HeaderMap;
use axum::routing::post;
use opentelemetry_proto::tonic::collector::trace::v1::{ExportTraceServiceRequest, ExportTraceServiceResponse};
use opentelemetry_proto::tonic::common::v1::{KeyValue, any_value};
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Longest wait for a span: a bound against hanging, not a measurement.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// Answers on `/v1/traces`.
pub(crate) struct Collector {
    port: u16,
    spans: watch::Sender<Vec<Span>>,
    taken: Arc<Mutex<Taken>>,
}

/// What came besides the spans.
#[derive(Default)]
struct Taken {
    /// Attributes of whoever sent them.
    resource: BTreeMap<String, String>,
    /// The `authorization` of each request.
    authorizations: Vec<String>,
    /// Every body, as it came.
    bodies: Vec<u8>,
}

impl Collector {
    pub(crate) async fn start() -> Collector {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (spans, taken) = (watch::Sender::new(Vec::new()), Arc::<Mutex<Taken>>::default());
        let (sink, notes) = (spans.clone(), taken.clone());
        let take = move |headers: HeaderMap, body: Bytes| async move {
            let asked = ExportTraceServiceRequest::decode(&body[..]).unwrap();
            {
                let mut taken = notes.lock().unwrap();
                let authorization = headers.get("authorization").map(|value| value.to_str().unwrap().to_owned());
                taken.authorizations.extend(authorization);
                taken.bodies.extend_from_slice(&body);
                for of in &asked.resource_spans {
                    taken.resource = attributes(&of.resource.as_ref().unwrap().attributes);
                }
            }
            let scopes = asked.resource_spans.into_iter().flat_map(|of| of.scope_spans);
            sink.send_modify(|spans| spans.extend(scopes.flat_map(|scope| scope.spans)));
            ExportTraceServiceResponse::default().encode_to_vec()
        };
        tokio::spawn(async move { axum::serve(listener, Router::new().route("/v1/traces", post(take))).await });
        Collector { port, spans, taken }
    }

    /// What OTEL_EXPORTER_OTLP_ENDPOINT names.
    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Waits for a span of which this is true, and gives it with those directly below it, in the order of their beginnings.
    pub(crate) async fn work(&self, is_it: impl Fn(&Span) -> bool) -> (Span, Vec<Span>) {
        let mut spans = self.spans.subscribe();
        let found = tokio::time::timeout(MAX_WAIT, spans.wait_for(|spans| spans.iter().any(&is_it)));
        let spans = found.await.unwrap_or_else(|_| panic!("it is not in {:#?}", self.spans())).unwrap();
        // A span is sent after those below it.
        let whole = spans.iter().find(|span| is_it(span)).unwrap().clone();
        let mut parts: Vec<Span> = spans.iter().filter(|span| span.parent_span_id == whole.span_id).cloned().collect();
        parts.sort_by_key(|span| span.start_time_unix_nano);
        (whole, parts)
    }

    pub(crate) fn spans(&self) -> Vec<Span> {
        self.spans.borrow().clone()
    }

    pub(crate) fn resource(&self) -> BTreeMap<String, String> {
        self.taken.lock().unwrap().resource.clone()
    }

    pub(crate) fn authorizations(&self) -> Vec<String> {
        self.taken.lock().unwrap().authorizations.clone()
    }

    /// Whether a text came in any body.
    pub(crate) fn has_seen(&self, text: &str) -> bool {
        self.taken.lock().unwrap().bodies.windows(text.len()).any(|window| window == text.as_bytes())
    }
}

/// Attributes as text.
pub(crate) fn attributes(pairs: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |pair: &KeyValue| match pair.value.as_ref().and_then(|value| value.value.clone()) {
        Some(any_value::Value::StringValue(text)) => text,
        Some(any_value::Value::IntValue(number)) => number.to_string(),
        other => format!("{other:?}"),
    };
    pairs.iter().map(|pair| (pair.key.clone(), text(pair))).collect()
}

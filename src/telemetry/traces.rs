//! Traces, in OTLP over HTTP, where the environment asks for them: one pull or open is one trace, and its stages are the spans
//! below it.
//!
//! The standard variables say where they go (OTEL_EXPORTER_OTLP_ENDPOINT, …); the SDK reads them. Without one of the two that
//! name a collector nothing of this is there: no thread, no client, no memory. With one, spans wait in a queue that is bounded,
//! and a thread sends them; if the collector is away they are dropped.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use opentelemetry::propagation::{Extractor, TextMapPropagator};
use opentelemetry::trace::{Span, SpanContext, SpanKind, Status, TraceContextExt, Tracer, TracerProvider};
use opentelemetry::{Context, KeyValue, Value};
use opentelemetry_http::{HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{SpanExporter, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{SdkTracer, SdkTracerProvider};
use tokio::runtime::Handle;

/// The variables that name a collector. The SDK has a default, which we do not take: traces are sent where somebody asked for it.
const COLLECTORS: [&str; 2] = ["OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"];

/// Longest time for one request to the collector; OTEL_EXPORTER_OTLP_TIMEOUT may say less.
const SEND_SECONDS: u64 = 10;

/// Longest wait for the last spans when the process ends.
const LAST_SPANS: Duration = Duration::from_secs(2);

/// Sends traces to the collector that the environment names. Cheap to clone.
#[derive(Clone)]
pub struct Traces {
    provider: SdkTracerProvider,
    tracer: SdkTracer,
}

/// Whose trace a request goes on with: the caller's, from his `traceparent` (W3C).
#[derive(Debug, Clone)]
pub struct Parent(SpanContext);

/// A piece of work that has ended.
#[derive(Debug)]
pub struct Work<'a> {
    /// What it was: the name of its span.
    pub name: &'static str,
    /// When it began.
    pub began: SystemTime,
    /// What its time went into, in order, without gap or overlap: the spans below it.
    pub parts: &'a [(&'static str, Duration)],
    /// What it was of, as text; never a secret.
    pub texts: &'a [(&'static str, &'a str)],
    /// What it came to, in numbers.
    pub numbers: &'a [(&'static str, u64)],
    /// The code of the error, if it failed.
    pub error: Option<&'static str>,
    /// Whose trace it goes on with.
    pub parent: Option<&'a Parent>,
}

/// Why no traces are sent although somebody asks for them. Quotes no value: an address may hold a secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TracesError {
    /// The SDK cannot make sense of a variable.
    #[error("a variable OTEL_EXPORTER_OTLP_… cannot be read: perhaps the address is none")]
    Variable,
    /// There is no HTTP client.
    #[error("no HTTP client can be made: {0}")]
    Client(String),
}

impl Traces {
    /// Those the environment of this process asks for, if it asks for any. Needs a tokio runtime.
    pub fn of_process() -> Result<Option<Traces>, TracesError> {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let is_off = variable("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true"))
            || variable("OTEL_TRACES_EXPORTER").is_some_and(|value| value == "none");
        if is_off || COLLECTORS.iter().all(|name| variable(name).is_none()) {
            return Ok(None);
        }
        let exporter = SpanExporter::builder().with_http().with_http_client(Sender::new()?).build();
        let exporter = exporter.map_err(|_| TracesError::Variable)?;
        // The SDK prefers the attributes, against its specification, and has no good name for us.
        let name = variable("OTEL_SERVICE_NAME").or_else(named_in_attributes);
        let resource = Resource::builder().with_service_name(name.unwrap_or_else(|| "larder".to_owned()));
        let resource = resource.with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION"))).build();
        let provider = SdkTracerProvider::builder().with_batch_exporter(exporter).with_resource(resource).build();
        let tracer = provider.tracer("larder");
        Ok(Some(Traces { provider, tracer }))
    }

    /// One trace, or the part of one that is ours. Waits for nothing: if the queue is full, it is dropped.
    pub fn send(&self, work: &Work<'_>) {
        let texts = work.texts.iter().map(|(key, value)| KeyValue::new(*key, (*value).to_owned()));
        let number = |value: u64| Value::I64(i64::try_from(value).unwrap_or(i64::MAX));
        let numbers = work.numbers.iter().map(|(key, value)| KeyValue::new(*key, number(*value)));
        let error = work.error.map(|code| KeyValue::new("error.type", code));
        let above = match work.parent {
            Some(Parent(caller)) => Context::new().with_remote_span_context(caller.clone()),
            None => Context::new(),
        };
        let kind = if work.parent.is_some() { SpanKind::Server } else { SpanKind::Internal };
        let span = self.tracer.span_builder(work.name).with_kind(kind).with_start_time(work.began);
        let span = span.with_attributes(texts.chain(numbers).chain(error).collect::<Vec<_>>());
        let mut span = self.tracer.build_with_context(span, &above);
        if let Some(code) = work.error {
            span.set_status(Status::error(code));
        }
        let below = above.with_remote_span_context(span.span_context().clone());
        let mut at = work.began;
        for (name, took) in work.parts {
            let part = self.tracer.span_builder(*name).with_kind(SpanKind::Internal).with_start_time(at);
            at += *took;
            self.tracer.build_with_context(part, &below).end_with_timestamp(at);
        }
        span.end_with_timestamp(at);
    }

    /// Sends what waits, for a short time at most; after it nothing is sent any more. Blocking.
    pub fn end(&self) {
        // What the collector does not take now is lost, as at any other time.
        let _ = self.provider.shutdown_with_timeout(LAST_SPANS);
    }
}

/// `service.name` in OTEL_RESOURCE_ATTRIBUTES.
fn named_in_attributes() -> Option<String> {
    let attributes = std::env::var("OTEL_RESOURCE_ATTRIBUTES").ok()?;
    let mut pairs = attributes.split(',').filter_map(|pair| pair.split_once('='));
    pairs.find(|(key, _)| key.trim() == "service.name").map(|(_, name)| name.trim().to_owned())
}

impl Parent {
    /// Reads the headers of a request; `None` if they name no trace.
    pub fn read<'a>(header: impl Fn(&str) -> Option<&'a str>) -> Option<Parent> {
        struct Headers<'a>([(&'static str, Option<&'a str>); 2]);
        impl Extractor for Headers<'_> {
            fn get(&self, key: &str) -> Option<&str> {
                self.0.iter().find(|(name, _)| *name == key)?.1
            }

            fn keys(&self) -> Vec<&str> {
                self.0.iter().map(|(name, _)| *name).collect()
            }
        }
        let headers = Headers(["traceparent", "tracestate"].map(|name| (name, header(name))));
        // Most requests have none.
        headers.0[0].1?;
        let context = TraceContextPropagator::new().extract_with_context(&Context::new(), &headers);
        let caller = context.span().span_context().clone();
        caller.is_valid().then_some(Parent(caller))
    }
}

/// Sends on the runtime of the process, because the thread that asks has none. Says once that the collector is away, and once that
/// it is back. What is sent, and where to, is not said: headers and addresses may hold secrets.
#[derive(Debug)]
struct Sender {
    http: reqwest::Client,
    runtime: Handle,
    is_away: AtomicBool,
}

impl Sender {
    fn new() -> Result<Sender, TracesError> {
        // A redirect would carry the headers elsewhere.
        let http = reqwest::Client::builder().timeout(Duration::from_secs(SEND_SECONDS));
        let http = http.redirect(reqwest::redirect::Policy::none()).build();
        let http = http.map_err(|error| TracesError::Client(error.to_string()))?;
        Ok(Sender { http, runtime: Handle::current(), is_away: AtomicBool::new(false) })
    }

    fn tell(&self, trouble: Option<&str>) {
        match trouble {
            Some(why) if !self.is_away.swap(true, Ordering::Relaxed) => {
                tracing::warn!(why, "the collector does not take traces; they are dropped until it does");
            }
            None if self.is_away.swap(false, Ordering::Relaxed) => tracing::info!("the collector takes traces again"),
            _ => {}
        }
    }
}

#[async_trait]
impl HttpClient for Sender {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let http = self.http.clone();
        let sending = self.runtime.spawn(async move { http.send_bytes(request).await });
        let answer = sending.await.map_err(|ended| Box::new(ended) as HttpError).and_then(|answer| answer);
        match &answer {
            Ok(answer) if answer.status().is_success() => self.tell(None),
            Ok(answer) => self.tell(Some(&format!("it answers {}", answer.status().as_u16()))),
            Err(error) => self.tell(Some(kind_of(error))),
        }
        answer
    }
}

/// What went wrong, in words that quote nothing.
fn kind_of(error: &HttpError) -> &'static str {
    match error.downcast_ref::<reqwest::Error>() {
        Some(error) if error.is_timeout() => "it does not answer in time",
        Some(error) if error.is_connect() => "it cannot be reached",
        _ => "the request broke off",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_caller_is_known_by_a_traceparent_and_nothing_else() {
        let parent = |value: &'static str| Parent::read(|name| (name == "traceparent").then_some(value));
        let Parent(caller) = parent("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01").unwrap();
        assert_eq!(caller.trace_id().to_string(), "4bf92f3577b34da6a3ce929d0e0e4736");
        assert!(caller.is_remote() && caller.is_sampled());
        for wrong in ["", "00-0-0-0", "x", "00-00000000000000000000000000000000-00f067aa0ba902b7-01"] {
            assert!(parent(wrong).is_none(), "{wrong}");
        }
        assert!(Parent::read(|_| None).is_none());
    }
}

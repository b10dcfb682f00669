//! Traces: one for each pull and open, whose spans sum to it, if the environment asks for them, and nothing if not.

use std::fs;

use larder::client::{Client, Opener};
use larder::model::Stage;
use larder::wire::http::{LeaseTerms, OpenRequest, Phase, PullRequest, PullStatus};
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use tokio::net::TcpListener;

use super::support::collector::{Collector, attributes};
use super::support::hub::{RepoFile, TestHub};
use super::support::larder::{Home, Running};
use super::support::model_origin::ModelOrigin;
use super::support::node::reference;

/// What the headers for the collector and the token of the source hold: no span and no line of the log may.
const SECRETS: [&str; 2] = ["secret-of-the-collector", "hf_of_a_test"];
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

fn home_of(collector: &str) -> Home {
    let mut home = Home::new();
    home.set("OTEL_EXPORTER_OTLP_ENDPOINT", collector);
    home.set("OTEL_EXPORTER_OTLP_HEADERS", &format!("authorization=Bearer%20{}", SECRETS[0]));
    home.set("OTEL_BSP_SCHEDULE_DELAY", "20");
    home
}

/// A request of somebody who traces.
async fn posted(daemon: &Running, route: &str, body: &impl serde::Serialize) -> reqwest::Response {
    let url = format!("http://{}/v1/{route}", daemon.tcp_address());
    let request = reqwest::Client::new().post(url).header("traceparent", format!("00-{TRACE}-{SPAN}-01"));
    request.json(body).send().await.unwrap().error_for_status().unwrap()
}

async fn ended(client: &Client, id: &str) -> PullStatus {
    use futures::StreamExt;
    client.watch(id).await.unwrap().map(Result::unwrap).collect::<Vec<_>>().await.pop().unwrap()
}

async fn pulled(client: &Client, model: &str) -> PullStatus {
    ended(client, &client.pull(&PullRequest::of(model)).await.unwrap().id).await
}

fn is_of(span: &Span, name: &str, model: &str) -> bool {
    span.name == name && attributes(&span.attributes).get("larder.reference").is_some_and(|of| of == model)
}

/// The parts follow each other without gap or overlap, from the beginning of the whole to its end; name and microseconds of each.
fn parts_of(whole: &Span, parts: &[Span]) -> Vec<(String, u64)> {
    let mut at = whole.start_time_unix_nano;
    for part in parts {
        assert_eq!(part.trace_id, whole.trace_id);
        assert_eq!(part.start_time_unix_nano, at, "{whole:#?}\n{parts:#?}");
        at = part.end_time_unix_nano;
    }
    assert_eq!(at, whole.end_time_unix_nano, "{whole:#?}\n{parts:#?}");
    let took = |span: &Span| (span.end_time_unix_nano - span.start_time_unix_nano) / 1000;
    parts.iter().map(|part| (part.name.clone(), took(part))).collect()
}

fn assert_keeps_secrets(daemon: &Running, collector: &Collector) {
    for secret in SECRETS {
        assert!(!collector.has_seen(secret), "{secret} was sent");
        assert!(!daemon.said().contains(secret), "{secret} is in the log");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_is_one_trace_whose_spans_are_its_stages_and_goes_on_with_that_of_the_caller() {
    let (collector, hub) = (Collector::start().await, TestHub::start().await);
    hub.publish(
        "acme/m",
        vec![RepoFile::new("weights", vec![7; 3 << 20]), RepoFile::new("config.json", b"{}".to_vec())],
    );
    hub.make_private("acme/m");
    hub.allow(SECRETS[1]);
    hub.grant(SECRETS[1], "acme/m");
    let mut home = home_of(&collector.endpoint());
    home.set("HF_ENDPOINT", hub.endpoint());
    home.set("HF_TOKEN", SECRETS[1]);
    home.set("OTEL_SERVICE_NAME", "cache-of-node-7");
    home.set("OTEL_RESOURCE_ATTRIBUTES", "k8s.node.name=node-7,service.name=not-this");
    let daemon = home.serve().await;
    let (client, model) = (Client::new(&home.socket()), "hf://acme/m@main");

    let answer = posted(&daemon, "pulls", &PullRequest::of(model)).await.bytes().await.unwrap();
    let pull: PullStatus = serde_json::from_slice(&answer).unwrap();
    assert_eq!(ended(&client, &pull.id).await.phase, Phase::Ready);
    let (whole, parts) = collector.work(|span| is_of(span, "pull", model)).await;
    assert_eq!((hex::encode(&whole.trace_id), hex::encode(&whole.parent_span_id)), (TRACE.into(), SPAN.into()));
    // The very stages that `larder why` tells.
    let told = client.last_start(model).await.unwrap().pull.unwrap();
    let stages: Vec<_> = told.stages.iter().map(|span| (span.stage.text().to_owned(), span.took_us)).collect();
    assert_eq!(parts_of(&whole, &parts), stages);
    assert_eq!((whole.end_time_unix_nano - whole.start_time_unix_nano) / 1000, told.took_us);
    let of = attributes(&whole.attributes);
    assert_eq!((&of["larder.pull"], &of["larder.fetched_bytes"]), (&pull.id, &told.fetched_bytes.to_string()));

    let request = OpenRequest {
        lease: Some(LeaseTerms { holder: Some("ci".into()), ..LeaseTerms::default() }),
        ..OpenRequest::of(model)
    };
    posted(&daemon, "opens", &request).await;
    let is_open = |span: &Span| is_of(span, "open", model) && hex::encode(&span.parent_span_id) == SPAN;
    let (whole, parts) = collector.work(is_open).await;
    let names: Vec<_> = parts_of(&whole, &parts).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, [Stage::Bookkeeping, Stage::Checking].map(Stage::text));

    // Over the socket too; and there nobody says whose trace it is.
    drop(Opener::new(&home.socket()).open(&reference(model)).await.unwrap());
    let (whole, parts) = collector.work(|span| is_of(span, "open", model) && span.parent_span_id.is_empty()).await;
    assert!(hex::encode(&whole.trace_id) != TRACE && !parts_of(&whole, &parts).is_empty());

    let missing = "hf://acme/missing@main";
    let failed = pulled(&client, missing).await;
    let (whole, parts) = collector.work(|span| is_of(span, "pull", missing)).await;
    parts_of(&whole, &parts);
    assert_eq!(attributes(&whole.attributes)["error.type"], failed.error.unwrap().code);
    assert_eq!(whole.status.unwrap().code(), StatusCode::Error);

    let resource = collector.resource();
    assert_eq!((resource["service.name"].as_str(), resource["k8s.node.name"].as_str()), ("cache-of-node-7", "node-7"));
    assert!(collector.authorizations().iter().all(|sent| *sent == format!("Bearer {}", SECRETS[0])));
    assert!(!collector.authorizations().is_empty());
    assert_keeps_secrets(&daemon, &collector);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sampler_of_the_environment_decides_what_is_sent_and_what_waits_is_sent_at_the_end() {
    let (collector, origin) = (Collector::start().await, ModelOrigin::start().await);
    origin.put("m", "weights", b"bytes");
    let mut home = home_of(&collector.endpoint());
    home.set("OTEL_TRACES_SAMPLER", "parentbased_always_off");
    // Nothing is sent before the end.
    home.set("OTEL_BSP_SCHEDULE_DELAY", "3600000");
    let mut daemon = home.serve().await;
    let (client, model) = (Client::new(&home.socket()), origin.reference("m"));
    assert_eq!(pulled(&client, &model).await.phase, Phase::Ready);
    posted(&daemon, "opens", &OpenRequest::of(&model)).await;
    daemon.terminate();
    assert!(daemon.ended().await.0.success());
    let (whole, _) = collector.work(|span| is_of(span, "open", &model)).await;
    assert_eq!(hex::encode(whole.trace_id), TRACE, "the caller wants it");
    assert!(!collector.spans().iter().any(|span| span.name == "pull"), "nobody wants it");
    assert_eq!(collector.resource()["service.name"], "larder");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_costs_one_line_and_nothing_else() {
    let origin = ModelOrigin::start().await;
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let mut home = home_of(&format!("http://{nobody}"));
    home.set("OTEL_EXPORTER_OTLP_TIMEOUT", "100");
    let mut daemon = home.serve().await;
    let client = Client::new(&home.socket());
    const AWAY: &str = "the collector does not take traces";
    for model in ["a", "b", "c"] {
        origin.put(model, "weights", model.as_bytes());
        assert_eq!(pulled(&client, &origin.reference(model)).await.phase, Phase::Ready);
        if model == "a" {
            daemon.says(AWAY).await;
        }
    }
    daemon.terminate();
    assert!(daemon.ended().await.0.success());
    assert_eq!(daemon.said().matches(AWAY).count(), 1, "{}", daemon.said());
    assert!(!daemon.said().contains(SECRETS[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_collector_nothing_is_started_and_a_wrong_address_is_said_without_being_quoted() {
    let collector = Collector::start().await;
    let sends = |daemon: &Running| {
        let tasks = fs::read_dir(format!("/proc/{}/task", daemon.id())).unwrap();
        let names: Vec<String> =
            tasks.map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default()).collect();
        names.iter().any(|name| name.starts_with("OpenTelemetry"))
    };
    let with = home_of(&collector.endpoint()).serve_for(sends).await;
    assert!(with, "the thread that sends has another name");
    assert!(!Home::new().serve_for(sends).await);
    for (name, value) in [("OTEL_SDK_DISABLED", "true"), ("OTEL_TRACES_EXPORTER", "none")] {
        let mut home = home_of(&collector.endpoint());
        home.set(name, value);
        assert!(!home.serve_for(sends).await, "{name}={value}");
    }
    let wrong = home_of(&format!("http://user:{}@[", SECRETS[0]));
    let said = wrong.serve_for(|daemon| daemon.said()).await;
    assert!(said.contains("no traces are sent") && !said.contains(SECRETS[0]), "{said}");
}

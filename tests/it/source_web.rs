//! `https://` and `http://` sources, against servers that behave and servers that do not.

use larder::fault::{Code, Diagnose};
use larder::source::{Environment, SourceConfig, Sources};

use crate::support::source_contract::{FILES, Origin, WEIGHTS, collect, fetch_whole, holds, open};
use crate::support::web_origin::WebOrigin;

#[tokio::test]
async fn a_directory_with_checksums_keeps_the_contract() {
    holds(&WebOrigin::start(true).await).await;
}

#[tokio::test]
async fn a_directory_without_checksums_keeps_the_contract() {
    holds(&WebOrigin::start(false).await).await;
}

#[tokio::test]
async fn a_single_file_is_a_model() {
    let origin = WebOrigin::start(true).await;
    let reference = origin.url("plain/weights/a%20b+c.safetensors").parse().unwrap();
    let source = open(&origin, &reference);
    let listing = source.resolve().await.unwrap();
    let [file] = listing.files() else { panic!("{listing:?}") };
    assert_eq!((file.path.as_str(), file.size), ("a b+c.safetensors", WEIGHTS.len() as u64));
    assert!(file.pin.is_some(), "the ETag pins it");
    assert!(fetch_whole(&source, file).await.unwrap() == WEIGHTS);

    origin.put(FILES[2].0, b"another").await;
    assert_eq!(fetch_whole(&source, file).await.unwrap_err().code(), Code::SourceChanged);
}

#[tokio::test]
async fn an_empty_selection_is_told_and_a_partial_one_asks_only_for_its_files() {
    let origin = WebOrigin::start(false).await;
    let text = origin.reference().to_string();
    let only = |pattern: &str| larder::model::ModelRef::parse_with(&text, &[pattern.to_owned()], &[]).unwrap();

    let nothing = open(&origin, &only("*.gguf")).resolve().await.unwrap_err();
    assert_eq!(nothing.code(), Code::NothingSelected, "{nothing}");

    let listing = open(&origin, &only("*.json")).resolve().await.unwrap();
    assert_eq!(listing.files().iter().map(|f| f.path.as_str()).collect::<Vec<_>>(), ["config.json"]);
    assert!(!origin.asked().iter().any(|asked| asked.path.contains("weights")), "{:?}", origin.asked());
}

#[tokio::test]
async fn a_change_between_two_ranges_is_noticed_although_the_listing_pins_nothing() {
    let origin = WebOrigin::start(true).await;
    let source = open(&origin, &origin.reference());
    let listing = source.resolve().await.unwrap();
    let weights = &listing.files()[2];
    assert_eq!(weights.pin, None);
    collect(source.fetch(weights, 0..1000).await.unwrap()).await.unwrap();
    origin.put(FILES[2].0, &[7; WEIGHTS.len()]).await;
    let error = source.fetch(weights, 1000..2000).await.err().expect("the second range is of another version");
    assert_eq!(error.code(), Code::SourceChanged, "{error}");
}

#[tokio::test]
async fn a_broken_body_costs_only_what_was_not_there_yet() {
    let origin = WebOrigin::start(true).await;
    let source = open(&origin, &origin.reference());
    let listing = source.resolve().await.unwrap();
    let (before, connections) = (origin.proxy.received_bytes(), origin.proxy.connections());
    origin.proxy.cut_next_after(200_000);
    assert!(fetch_whole(&source, &listing.files()[2]).await.unwrap() == WEIGHTS);
    assert!(!origin.proxy.is_armed(), "the body was cut");
    assert_eq!(origin.proxy.connections(), connections + 2, "one for bytes, and one in its place when it broke");
    let again: Vec<_> = origin.asked().iter().filter_map(|asked| asked.header("range").map(str::to_owned)).collect();
    let [whole, rest] = again.as_slice() else { panic!("{again:?}") };
    assert_eq!(whole, "bytes=0-299999");
    assert_ne!(rest, whole, "it is resumed, not begun again");
    // What the proxy had read but not passed on is lost; never the whole file.
    let received = origin.proxy.received_bytes() - before;
    assert!(received < 300_000 + 200_000, "{received} bytes for a file of 300,000");
}

#[tokio::test]
async fn a_server_that_is_not_there_is_told_with_the_step_that_failed() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let sources = Sources::new(SourceConfig::default(), Environment::default());
    let source = sources.open(&format!("http://127.0.0.1:{port}/model/").parse().unwrap()).unwrap();
    let error = source.resolve().await.unwrap_err();
    assert_eq!(error.code(), Code::SourceUnreachable);
    let text = error.to_string();
    assert!(text.contains("the connection failed") && text.contains(&port.to_string()), "{text}");
}

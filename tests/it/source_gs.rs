//! gs://, against fake-gcs-server, and against a double for what it does not check.

use async_trait::async_trait;
use larder::fault::{Code, Diagnose};
use larder::model::ModelRef;
use larder::source::{Environment, Error};

use super::support::breaking_proxy::BreakingProxy;
use super::support::bucket_double::{Answer, BucketDouble, listing_of};
use super::support::fake_gcs::FakeGcs;
use super::support::source_contract::{self, FILES, Origin, listed, open_in as open};

struct Gs {
    server: FakeGcs,
    wire: BreakingProxy,
}

impl Gs {
    async fn start() -> Option<Gs> {
        let server = FakeGcs::start()?;
        server.make_bucket("models").await;
        let wire = BreakingProxy::start(server.port).await;
        Some(Gs { server, wire })
    }
}

#[async_trait]
impl Origin for Gs {
    fn environment(&self) -> Environment {
        [("STORAGE_EMULATOR_HOST", format!("127.0.0.1:{}", self.wire.port).as_str())].into_iter().collect()
    }

    fn reference(&self) -> ModelRef {
        "gs://models/org/model".parse().unwrap()
    }

    fn missing(&self) -> ModelRef {
        "gs://models/org/mod".parse().unwrap()
    }

    async fn put(&self, path: &str, bytes: &[u8]) {
        self.server.put("models", &format!("org/model/{path}"), bytes).await;
    }

    async fn deny(&self, denied: bool) -> bool {
        self.wire.deny(denied);
        true
    }

    async fn break_next_body_after(&self, bytes: u64) -> bool {
        self.wire.cut_next_after(bytes);
        true
    }
}

fn answer(status: u16, body: &str) -> Answer {
    Answer { status, headers: Vec::new(), body: body.into() }
}

#[tokio::test]
async fn gs_keeps_the_contract_of_a_source() {
    let Some(gs) = Gs::start().await else { return };
    for (path, bytes) in FILES {
        gs.put(path, bytes).await;
    }
    source_contract::holds(&gs).await;
    assert!(!gs.wire.is_armed(), "the body was broken");
}

#[tokio::test]
async fn gs_takes_a_prefix_as_a_directory_and_an_object_as_a_model_of_one_file() {
    let Some(gs) = Gs::start().await else { return };
    for key in ["model/config.json", "model-hf/config.json", "model/sub/deep.bin", "loose/model.gguf"] {
        gs.server.put("models", key, key.as_bytes()).await;
    }
    // As the console of Google makes directories.
    gs.server.put("models", "model/", b"").await;
    let source = |reference| open(gs.environment(), reference).unwrap();
    assert_eq!(listed(&source("gs://models/model")).await, ["config.json", "sub/deep.bin"]);
    assert_eq!(listed(&source("gs://models/loose/model.gguf")).await, ["model.gguf"]);
    let error = source("gs://models/mod").resolve().await.unwrap_err();
    assert!(error.to_string().contains("neither an object `mod`"), "{error}");
}

#[tokio::test]
async fn gs_says_whether_a_credential_is_missing_or_wrong() {
    let denied = "<Error><Code>AccessDenied</Code></Error>";
    let double = BucketDouble::start(vec![answer(401, denied), answer(403, denied), answer(404, denied)]).await;
    let with = |name: &'static str, value: &'static str| -> Environment {
        [("GOOGLE_BASE_URL", double.endpoint.as_str()), (name, value)].into_iter().collect()
    };
    let anonymous = open(with("GOOGLE_SKIP_SIGNATURE", "true"), "gs://models/m").unwrap();
    let error = anonymous.resolve().await.unwrap_err();
    assert_eq!(error.code(), Code::AuthMissing, "{error}");
    assert!(error.action().contains("GOOGLE_APPLICATION_CREDENTIALS"), "{}", error.action());

    let source = open(with("GOOGLE_BEARER_TOKEN", "not-a-real-token"), "gs://models/m").unwrap();
    let error = source.resolve().await.unwrap_err();
    assert!(matches!(&error, Error::AuthInvalid { origin, .. } if origin == "`GOOGLE_BEARER_TOKEN`"), "{error}");
    assert!(!error.to_string().contains("not-a-real-token"), "{error}");
    assert_eq!(source.resolve().await.unwrap_err().code(), Code::RepoNotFound);

    let signed: Vec<bool> = double.seen().iter().map(|seen| seen.signed).collect();
    assert_eq!(signed, [false, true, true], "an anonymous request carries nothing");
}

#[tokio::test]
async fn gs_base_url_goes_before_the_emulator() {
    let double = BucketDouble::start(vec![answer(200, &listing_of("m/a", 1, Some("&quot;e&quot;")))]).await;
    let environment = [
        ("GOOGLE_BASE_URL", double.endpoint.as_str()),
        ("STORAGE_EMULATOR_HOST", "127.0.0.1:1"),
        ("GOOGLE_SKIP_SIGNATURE", "true"),
    ];
    let source = open(environment.into_iter().collect(), "gs://models/m").unwrap();
    assert_eq!(listed(&source).await, ["a"]);
}

#[test]
fn gs_environment_mistakes_are_named() {
    let cases: [(&[(&str, &str)], &str); 2] = [
        (&[("GOOGLE_BASE_URL", "storage.example.com")], "`GOOGLE_BASE_URL` is not a URL"),
        (&[("GOOGLE_APPLICATION_CREDENTIALS", "/nowhere/key.json")], "/nowhere/key.json"),
    ];
    for (variables, words) in cases {
        let Err(error) = open(variables.iter().copied().collect(), "gs://models/m") else {
            panic!("{words}: accepted")
        };
        assert_eq!(error.code(), Code::ConfigInvalid, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
}

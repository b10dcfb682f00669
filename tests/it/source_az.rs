//! az://, against Azurite.

use async_trait::async_trait;
use larder::fault::{Code, Diagnose};
use larder::model::ModelRef;
use larder::source::{Environment, Error};

use super::support::azurite::{ACCOUNT, Azurite, KEY};
use super::support::breaking_proxy::BreakingProxy;
use super::support::source_contract::{self, FILES, Origin, file, listed, open_in as open};

struct Az {
    azurite: Azurite,
    wire: BreakingProxy,
}

impl Az {
    async fn start() -> Option<Az> {
        let azurite = Azurite::start()?;
        azurite.make_container("models", false).await;
        let wire = BreakingProxy::start(azurite.port).await;
        Some(Az { azurite, wire })
    }
}

#[async_trait]
impl Origin for Az {
    fn environment(&self) -> Environment {
        self.azurite.environment(&format!("http://127.0.0.1:{}", self.wire.port), KEY)
    }

    fn reference(&self) -> ModelRef {
        "az://models/org/model".parse().unwrap()
    }

    fn missing(&self) -> ModelRef {
        "az://models/org/mod".parse().unwrap()
    }

    async fn put(&self, path: &str, bytes: &[u8]) {
        self.azurite.put("models", &format!("org/model/{path}"), bytes).await;
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

#[tokio::test]
async fn az_keeps_the_contract_of_a_source() {
    let Some(az) = Az::start().await else { return };
    for (path, bytes) in FILES {
        az.put(path, bytes).await;
    }
    source_contract::holds(&az).await;
    assert!(!az.wire.is_armed(), "the body was broken");
}

#[tokio::test]
async fn az_takes_a_prefix_as_a_directory_and_an_object_as_a_model_of_one_file() {
    let Some(az) = Az::start().await else { return };
    for key in ["model/config.json", "model-hf/config.json", "model/sub/deep.bin", "loose/model.gguf"] {
        az.azurite.put("models", key, key.as_bytes()).await;
    }
    let source = |reference| open(az.environment(), reference).unwrap();
    assert_eq!(listed(&source("az://models/model")).await, ["config.json", "sub/deep.bin"]);
    assert_eq!(listed(&source("az://models/loose/model.gguf")).await, ["model.gguf"]);
    for (reference, words) in
        [("az://models/mod", "neither an object `mod`"), ("az://nobody-has-this/model", "no bucket `nobody-has-this`")]
    {
        let error = source(reference).resolve().await.unwrap_err();
        assert_eq!(error.code(), Code::RepoNotFound, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[tokio::test]
async fn az_says_whether_a_credential_is_missing_or_wrong() {
    let Some(az) = Az::start().await else { return };
    az.azurite.put("models", "private/a", b"a").await;
    az.azurite.make_container("open", true).await;
    az.azurite.put("open", "model/a", b"a").await;

    let anonymous: Environment = [
        ("AZURE_STORAGE_ACCOUNT", ACCOUNT),
        ("AZURE_STORAGE_ENDPOINT", &format!("{}/{ACCOUNT}", az.azurite.endpoint)),
        ("AZURE_SKIP_SIGNATURE", "1"),
    ]
    .into_iter()
    .collect();
    assert_eq!(listed(&open(anonymous.clone(), "az://open/model").unwrap()).await, ["a"]);
    let error = open(anonymous, "az://models/private").unwrap().resolve().await.expect_err("it is private");
    assert!(
        [Code::AuthMissing, Code::RepoNotFound].contains(&error.code()),
        "without a credential Azure does not say whether a private container is there: {error}"
    );

    let wrong = az.azurite.environment(&az.azurite.endpoint, "bm90LXRoZS1rZXk=");
    let error = open(wrong, "az://models/private").unwrap().resolve().await.unwrap_err();
    let origin_is = |name: &str| matches!(&error, Error::AuthInvalid { origin, .. } if origin == name);
    assert!(origin_is("`AZURE_STORAGE_ACCOUNT_KEY`"), "{error}");
    assert!(!error.to_string().contains("bm90LXRoZS1rZXk"), "{error}");
}

#[tokio::test]
async fn az_reads_what_the_tools_of_azure_read() {
    let Some(az) = Az::start().await else { return };
    az.azurite.put("models", "m/a", b"a").await;
    let endpoint = format!("{}/{ACCOUNT}", az.azurite.endpoint);
    let connection =
        format!("DefaultEndpointsProtocol=http;AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={endpoint};");
    let environments: [Vec<(&str, &str)>; 3] = [
        vec![("AZURE_STORAGE_CONNECTION_STRING", &connection)],
        vec![("AZURE_STORAGE_USE_EMULATOR", "true"), ("AZURITE_BLOB_STORAGE_URL", &az.azurite.endpoint)],
        vec![("AZURE_STORAGE_ACCOUNT", ACCOUNT), ("AZURE_STORAGE_KEY", KEY), ("AZURE_STORAGE_ENDPOINT", &endpoint)],
    ];
    for environment in environments {
        let shown = environment[0].0;
        let source = open(environment.into_iter().collect(), "az://models/m").unwrap();
        assert_eq!(listed(&source).await, ["a"], "{shown}");
    }
}

#[tokio::test]
async fn az_marks_a_file_by_the_etag_it_answers_with() {
    let Some(az) = Az::start().await else { return };
    az.put("a", b"a").await;
    let source = source_contract::open(&az, &az.reference());
    let listing = source.resolve().await.unwrap();
    let pin = file(&listing, "a").pin.as_deref().expect("Azure lists ETags");
    assert!(pin.starts_with('"') && pin.ends_with('"'), "{pin} has the quotes that Azure leaves away in listings");
}

#[test]
fn az_environment_mistakes_are_named() {
    let cases: [(&[(&str, &str)], &str); 4] = [
        (&[], "set AZURE_STORAGE_ACCOUNT_NAME"),
        (&[("AZURE_STORAGE_ACCOUNT_NAME", "a/b")], "letters, digits"),
        (
            &[("AZURE_STORAGE_ACCOUNT_NAME", "a"), ("AZURE_STORAGE_ENDPOINT", "a.b.c")],
            "`AZURE_STORAGE_ENDPOINT` is not a URL",
        ),
        (&[("AZURE_STORAGE_ACCOUNT_NAME", "a"), ("AZURE_STORAGE_ACCOUNT_KEY", "%")], "Invalid Access Key"),
    ];
    for (variables, words) in cases {
        let Err(error) = open(variables.iter().copied().collect(), "az://models/m") else {
            panic!("{words}: accepted")
        };
        assert_eq!(error.code(), Code::ConfigInvalid, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
}

//! s3://, against moto, and against a double where moto cannot be made to misbehave.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use larder::fault::{Code, Diagnose};
use larder::model::{ModelRef, RelPath};
use larder::source::{Environment, Error, OnWait, RetryPolicy, SourceConfig, Sources, Step};

use super::support::breaking_proxy::BreakingProxy;
use super::support::bucket_double::{Answer, BucketDouble, listing_of};
use super::support::moto::Moto;
use super::support::source_contract::{self, FILES, Origin, collect, file, listed, open_in as open};

struct S3 {
    moto: Moto,
    wire: BreakingProxy,
}

impl S3 {
    async fn start() -> Option<S3> {
        let moto = Moto::start()?;
        moto.make_bucket("models").await;
        let wire = BreakingProxy::start(moto.port).await;
        Some(S3 { moto, wire })
    }
}

#[async_trait]
impl Origin for S3 {
    fn environment(&self) -> Environment {
        self.moto.environment(&at(self.wire.port))
    }

    fn reference(&self) -> ModelRef {
        "s3://models/org/model".parse().unwrap()
    }

    fn missing(&self) -> ModelRef {
        "s3://models/org/mod".parse().unwrap()
    }

    async fn put(&self, path: &str, bytes: &[u8]) {
        self.moto.put("models", &format!("org/model/{path}"), bytes).await;
    }

    async fn deny(&self, denied: bool) -> bool {
        self.moto.check_credentials(denied).await;
        true
    }

    async fn break_next_body_after(&self, bytes: u64) -> bool {
        self.wire.cut_next_after(bytes);
        true
    }
}

fn at(port: u16) -> String {
    format!("http://127.0.0.1:{port}")
}

fn with(environment: Environment, more: &[(&str, &str)]) -> Environment {
    let own: Vec<(String, String)> = environment.iter().map(|(k, v)| (k.into(), v.into())).collect();
    own.into_iter().chain(more.iter().map(|(k, v)| ((*k).into(), (*v).into()))).collect()
}

fn code_of(result: Result<impl Sized, Error>) -> Code {
    match result {
        Ok(_) => panic!("it succeeded"),
        Err(error) => error.code(),
    }
}

#[tokio::test]
async fn s3_keeps_the_contract_of_a_source() {
    let Some(s3) = S3::start().await else { return };
    for (path, bytes) in FILES {
        s3.put(path, bytes).await;
    }
    source_contract::holds(&s3).await;
    assert!(!s3.wire.is_armed(), "the body was broken");
}

#[tokio::test]
async fn s3_takes_a_prefix_as_a_directory_and_an_object_as_a_model_of_one_file() {
    let Some(s3) = S3::start().await else { return };
    let moto = &s3.moto;
    moto.put("models", "model/config.json", b"{}").await;
    moto.put("models", "model-hf/config.json", b"{\"sibling\": true}").await;
    moto.put("models", "model/sub/__init__.py", b"").await;
    // The markers that consoles and file browsers leave.
    for marker in ["model/", "model/sub/", "model/nothing-in-it/"] {
        moto.put_raw("models", marker, &[], b"").await;
    }
    moto.put("models", "loose/model.gguf", b"GGUF").await;
    let environment = || moto.environment(&moto.endpoint);

    let model = open(environment(), "s3://models/model").unwrap();
    assert_eq!(listed(&model).await, ["config.json", "sub/__init__.py"]);

    let all = open(environment(), "s3://models").unwrap();
    let expected = ["loose/model.gguf", "model-hf/config.json", "model/config.json", "model/sub/__init__.py"];
    assert_eq!(listed(&all).await, expected);

    let selected = open(environment(), "s3://models/model#include=*.json").unwrap();
    assert_eq!(listed(&selected).await, ["config.json"]);
    let none = open(environment(), "s3://models/model#include=*.safetensors").unwrap();
    let error = none.resolve().await.unwrap_err();
    assert!(matches!(error, Error::NothingSelected { listed: 2.., .. }), "{error}");

    let single = open(environment(), "s3://models/loose/model.gguf").unwrap();
    let listing = single.resolve().await.unwrap();
    let gguf = file(&listing, "model.gguf");
    assert_eq!(collect(single.fetch(gguf, 0..4).await.unwrap()).await.unwrap(), b"GGUF");

    for (reference, words) in [
        ("s3://models/mod", "neither an object `mod` nor anything below `mod/`"),
        ("s3://nobody-has-this/model", "no bucket `nobody-has-this`"),
    ] {
        let error = open(environment(), reference).unwrap().resolve().await.unwrap_err();
        assert_eq!(error.code(), Code::RepoNotFound);
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[tokio::test]
async fn s3_says_whether_a_credential_is_missing_or_wrong() {
    let Some(s3) = S3::start().await else { return };
    let moto = &s3.moto;
    moto.put("models", "private/a", b"a").await;
    moto.make_public_bucket("open").await;
    moto.put_raw("open", "model/a", &[("x-amz-acl", "public-read")], b"a").await;

    let anonymous: Environment =
        [("AWS_ENDPOINT_URL", moto.endpoint.as_str()), ("AWS_NO_SIGN_REQUEST", "true")].into_iter().collect();
    let source = open(anonymous.clone(), "s3://open/model").unwrap();
    assert_eq!(listed(&source).await, ["a"], "a public bucket needs no credential");
    // moto lets everybody list, but not read.
    let private = open(anonymous, "s3://models/private").unwrap();
    let listing = private.resolve().await.unwrap();
    let error = private.fetch(file(&listing, "a"), 0..1).await.err().expect("it is private");
    assert_eq!(error.code(), Code::AuthMissing, "{error}");
    assert!(error.action().contains("AWS_ACCESS_KEY_ID"), "{}", error.action());

    moto.check_credentials(true).await;
    let error = open(moto.environment(&moto.endpoint), "s3://models/private").unwrap().resolve().await.unwrap_err();
    assert!(matches!(&error, Error::AuthInvalid { origin, .. } if origin == "`AWS_ACCESS_KEY_ID`"), "{error}");
    assert!(error.to_string().contains("InvalidAccessKeyId"), "{error}");
    assert!(!error.to_string().contains("not-a-real-secret"), "{error}");
}

#[tokio::test]
async fn s3_reads_its_variables_again_where_they_are_files() {
    let Some(s3) = S3::start().await else { return };
    s3.put("a", b"a").await;
    let directory = tempfile::tempdir().unwrap();
    let config = SourceConfig { environment: Some(directory.path().to_owned()), ..SourceConfig::default() };
    let sources = Sources::new(config, signed("http://127.0.0.1:1"));
    let resolve = async || sources.open(&s3.reference()).unwrap().resolve().await;
    assert_eq!(resolve().await.unwrap_err().code(), Code::SourceUnreachable, "the process names a server that is away");

    std::fs::write(directory.path().join("AWS_ENDPOINT_URL_S3"), &s3.moto.endpoint).unwrap();
    std::fs::write(directory.path().join("AWS_ACCESS_KEY_ID"), "rotated\n").unwrap();
    assert_eq!(resolve().await.unwrap().files().len(), 1);

    s3.moto.check_credentials(true).await;
    let error = resolve().await.unwrap_err();
    let file = format!("`{}`", directory.path().join("AWS_ACCESS_KEY_ID").display());
    assert!(matches!(&error, Error::AuthInvalid { origin, .. } if *origin == file), "{error}");
}

#[tokio::test]
async fn s3_notices_that_an_object_was_overwritten_while_it_is_fetched() {
    let Some(s3) = S3::start().await else { return };
    s3.put("weights", &[1; 1000]).await;
    let source = source_contract::open(&s3, &s3.reference());
    let listing = source.resolve().await.unwrap();
    let weights = file(&listing, "weights");
    collect(source.fetch(weights, 0..500).await.unwrap()).await.unwrap();
    // The same size, so that nothing but the mark tells them apart.
    s3.put("weights", &[2; 1000]).await;
    let error = source.fetch(weights, 500..1000).await.err().expect("the second half is of another file");
    assert_eq!(error.code(), Code::SourceChanged, "{error}");
}

#[tokio::test]
async fn s3_finds_files_of_two_servers_apart() {
    let Some(s3) = S3::start().await else { return };
    s3.put("a", b"a").await;
    let locator = async |endpoint: &str| {
        let source = open(s3.moto.environment(endpoint), "s3://models/org/model").unwrap();
        source.resolve().await.unwrap().files()[0].locator.clone()
    };
    assert_ne!(locator(&s3.moto.endpoint).await, locator(&at(s3.wire.port)).await);
}

fn signed(endpoint: &str) -> Environment {
    [
        ("AWS_ENDPOINT_URL_S3", endpoint),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:1"),
        ("AWS_ACCESS_KEY_ID", "test"),
        ("AWS_SECRET_ACCESS_KEY", "test"),
    ]
    .into_iter()
    .collect()
}

fn answer(status: u16, headers: &[(&'static str, &str)], body: &str) -> Answer {
    Answer { status, headers: headers.iter().map(|(k, v)| (*k, (*v).to_owned())).collect(), body: body.into() }
}

#[tokio::test]
async fn s3_asks_again_only_when_the_server_said_it_may() {
    let busy = "<Error><Code>SlowDown</Code></Error>";
    let page = listing_of("m/a", 1, Some("&quot;e&quot;"));
    let double = BucketDouble::start(vec![answer(503, &[("retry-after", "1")], busy), answer(200, &[], &page)]).await;
    let source = open(signed(&double.endpoint), "s3://bucket/m").unwrap();

    let error = source.resolve().await.unwrap_err();
    let Error::RateLimited { retry_after: Some(wait), .. } = &error else { panic!("{error}") };
    assert_eq!(*wait, Duration::from_secs(1));
    source.resolve().await.unwrap();

    let seen = double.seen();
    assert_eq!(seen.len(), 2, "nothing but the policy repeats a request");
    assert!(seen[1].at - seen[0].at >= Duration::from_secs(1), "the next request of anybody waits");
    assert!(seen[0].target.starts_with("/bucket?"), "the path style is the default: {}", seen[0].target);
}

#[tokio::test]
async fn s3_gives_back_refusals_as_what_they_mean() {
    let cases = [
        (answer(503, &[], "<Error><Code>SlowDown</Code></Error>"), Code::RateLimited),
        (answer(429, &[], ""), Code::RateLimited),
        (answer(503, &[], "<html>"), Code::SourceProtocol),
        (answer(500, &[], "<Error><Code>InternalError</Code></Error>"), Code::SourceProtocol),
        (answer(400, &[], "<Error><Code>ExpiredToken</Code></Error>"), Code::AuthInvalid),
        (answer(403, &[], "<Error><Code>AccessDenied</Code></Error>"), Code::AuthInvalid),
        (answer(404, &[], "<Error><Code>NoSuchBucket</Code></Error>"), Code::RepoNotFound),
        (answer(200, &[("content-type", "text/html")], "<html>a captive portal</html>"), Code::SourceProtocol),
        (answer(200, &[], &listing_of("m/../../etc/passwd", 1, None)), Code::UnsafeName),
        (answer(200, &[], &listing_of("m//a", 1, None)), Code::UnsafeName),
        (answer(200, &[], &listing_of(r"m/a\b", 1, None)), Code::UnsafeName),
    ];
    for (answer, expected) in cases {
        let shown = format!("{} {}", answer.status, answer.body);
        let double = BucketDouble::start(vec![answer]).await;
        let source = open(signed(&double.endpoint), "s3://bucket/m").unwrap();
        let error = source.resolve().await.expect_err(&shown);
        assert_eq!(error.code(), expected, "{shown}: {error}");
        assert_eq!(double.seen().len(), 1, "{shown} is not repeated here");
    }
}

#[tokio::test]
async fn s3_names_the_region_of_a_bucket_that_is_elsewhere() {
    let elsewhere = "<Error><Code>PermanentRedirect</Code></Error>";
    let malformed = "<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-3</Region></Error>";
    for answer in [
        answer(301, &[("x-amz-bucket-region", "eu-west-3")], elsewhere),
        answer(307, &[("x-amz-bucket-region", "eu-west-3"), ("location", "http://127.0.0.1:1/")], ""),
        answer(400, &[], malformed),
    ] {
        let double = BucketDouble::start(vec![answer]).await;
        let error = open(signed(&double.endpoint), "s3://bucket/m").unwrap().resolve().await.unwrap_err();
        assert_eq!(error.code(), Code::ConfigInvalid, "{error}");
        assert!(error.to_string().contains("set AWS_REGION=eu-west-3"), "{error}");
    }
}

#[tokio::test]
async fn s3_carries_no_credential_to_where_a_redirect_leads() {
    let thief = BucketDouble::start(Vec::new()).await;
    let to_thief = format!("{}/bucket", thief.endpoint);
    let double = BucketDouble::start(vec![answer(307, &[("location", &to_thief)], "")]).await;
    let error = open(signed(&double.endpoint), "s3://bucket/m").unwrap().resolve().await.unwrap_err();
    assert!(matches!(error, Error::Redirect { .. }), "{error}");
    assert!(double.seen()[0].signed, "the request had something to steal");
    assert!(thief.seen().is_empty(), "nothing was asked of the other server");
}

#[tokio::test]
async fn s3_asks_for_the_mark_of_an_object_that_is_listed_without_one() {
    let head = [("etag", "\"mark\""), ("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT"), ("content-length", "7")];
    let answers = vec![answer(200, &[], &listing_of("m/a", 7, None)), answer(200, &head, "")];
    let double = BucketDouble::start(answers).await;
    let source = open(signed(&double.endpoint), "s3://bucket/m").unwrap();
    let listing = source.resolve().await.unwrap();
    assert_eq!(listing.files()[0].pin.as_deref(), Some("\"mark\""));
    assert_eq!(listing.files()[0].size, 7);
}

#[tokio::test]
async fn s3_does_not_take_another_object_or_another_range_for_the_one_asked_for() {
    let date = ("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT");
    let whole = [("etag", "\"e\""), date];
    let part = |range: &'static str, etag: &'static str| [("etag", etag), date, ("content-range", range)];
    let cases = [
        (answer(200, &whole, "abcd"), Code::SourceProtocol, "the range is ignored"),
        (answer(206, &part("bytes 0-1/4", "\"other\""), "ab"), Code::SourceChanged, "If-Match is ignored"),
        (answer(206, &part("bytes 0-1/9", "\"e\""), "ab"), Code::SourceChanged, "the object grew"),
        (answer(206, &part("bytes 2-3/4", "\"e\""), "cd"), Code::SourceProtocol, "another range"),
        (answer(206, &[date, ("content-range", "bytes 0-1/4")], "ab"), Code::SourceProtocol, "no ETag"),
        (answer(412, &[], ""), Code::SourceChanged, "If-Match is honoured"),
        (answer(404, &[], "<Error><Code>NoSuchKey</Code></Error>"), Code::FileNotFound, "it is gone"),
    ];
    for (answer, expected, why) in cases {
        let page = super::support::bucket_double::listing_of("m/a", 4, Some("&quot;e&quot;"));
        let listing_answer = Answer { status: 200, headers: Vec::new(), body: page };
        let double = BucketDouble::start(vec![listing_answer, answer]).await;
        let source = open(signed(&double.endpoint), "s3://bucket/m").unwrap();
        let listing = source.resolve().await.unwrap();
        assert_eq!(code_of(source.fetch(&listing.files()[0], 0..2).await), expected, "{why}");
        assert_eq!(double.seen().len(), 2, "{why}: not repeated here");
    }
}

#[tokio::test]
async fn s3_is_not_resumed_by_the_library() {
    let Some(s3) = S3::start().await else { return };
    s3.put("weights", &vec![7; 200_000]).await;
    let source = source_contract::open(&s3, &s3.reference());
    let listing = source.resolve().await.unwrap();
    s3.wire.cut_next_after(50_000);
    let body = source.fetch(file(&listing, "weights"), 0..200_000).await.unwrap();
    let error = collect(body).await.unwrap_err();
    assert!(matches!(error, Error::Truncated { expected: 200_000, got: 1..200_000, .. }), "{error}");
}

#[tokio::test]
async fn s3_environment_mistakes_are_named() {
    let base = |more: &[(&str, &str)]| with(signed("http://127.0.0.1:1"), more);
    let cases = [
        (base(&[("AWS_CA_BUNDLE", "/nowhere/ca.pem")]), "`AWS_CA_BUNDLE` names `/nowhere/ca.pem`"),
        (base(&[("SSL_CERT_FILE", "/dev/null")]), "holds no PEM certificate"),
        (base(&[("AWS_ENDPOINT_URL_S3", "minio:9000")]), "`AWS_ENDPOINT_URL_S3` is not a URL"),
        (base(&[("HTTPS_PROXY", "http://[")]), "`HTTPS_PROXY` is not the URL of a proxy"),
        (
            [("AWS_WEB_IDENTITY_TOKEN_FILE", "/nowhere/token"), ("AWS_ROLE_ARN", "arn:aws:iam::1:role/models")]
                .into_iter()
                .collect(),
            "`AWS_WEB_IDENTITY_TOKEN_FILE` names `/nowhere/token`",
        ),
        ([("AWS_ACCESS_KEY_ID", "half")].into_iter().collect(), "SecretAccessKey"),
    ];
    for (environment, words) in cases {
        let Err(error) = open(environment, "s3://bucket/m") else { panic!("{words}: it was accepted") };
        assert_eq!(error.code(), Code::ConfigInvalid, "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[tokio::test]
async fn s3_says_that_nobody_listens() {
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let error = open(signed(&closed), "s3://bucket/m").unwrap().resolve().await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { step: Step::Connect, .. }), "{error}");
}

#[tokio::test]
async fn s3_retries_are_made_by_the_policy() {
    let page = listing_of("m/a", 1, Some("&quot;e&quot;"));
    let double = BucketDouble::start(vec![answer(500, &[], ""), answer(500, &[], ""), answer(200, &[], &page)]).await;
    let source = open(signed(&double.endpoint), "s3://bucket/m").unwrap();
    let policy = RetryPolicy { first_wait: Duration::from_millis(1), ..RetryPolicy::default() };
    let quiet: OnWait = Arc::new(|_| Box::new(()));
    let listing = policy.resolve(&*source, &quiet).await.unwrap();
    assert_eq!(listing.files()[0].path, RelPath::new("a").unwrap());
    assert_eq!(double.seen().len(), 3);
}

#[tokio::test]
async fn s3_counts_a_body_against_the_range() {
    let head =
        [("etag", "\"e\""), ("last-modified", "Thu, 01 Jan 2026 00:00:00 GMT"), ("content-range", "bytes 0-1/4")];
    for (body, is_expected) in [
        ("abcd", (|e| matches!(e, Error::Overlong { expected: 2, .. })) as fn(&Error) -> bool),
        ("a", |e| matches!(e, Error::Truncated { expected: 2, got: 1, .. })),
    ] {
        let page = listing_of("m/a", 4, Some("&quot;e&quot;"));
        let twice = || [answer(200, &[], &page), answer(206, &head, body)];
        let double = BucketDouble::start(twice().into_iter().chain(twice()).collect()).await;
        let direct = fetch_two(signed(&double.endpoint)).await.unwrap_err();
        assert!(matches!(direct, Error::Protocol { .. }), "{body}: {direct}");
        let proxied = with(signed("http://s3.invalid:9000"), &[("HTTP_PROXY", &double.endpoint)]);
        let error = fetch_two(proxied).await.unwrap_err();
        assert!(is_expected(&error), "{body}: {error}");
    }
}

/// The first two bytes of the only object.
async fn fetch_two(environment: Environment) -> Result<Vec<u8>, Error> {
    let source = open(environment, "s3://bucket/m")?;
    let listing = source.resolve().await?;
    collect(source.fetch(&listing.files()[0], 0..2).await?).await
}

#[tokio::test]
async fn s3_gives_up_a_body_that_stands_still() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = at(listener.local_addr().unwrap().port());
    let page = listing_of("m/a", 4, Some("&quot;e&quot;"));
    let server = tokio::spawn(async move {
        let common = "etag: \"e\"\r\nlast-modified: Thu, 01 Jan 2026 00:00:00 GMT\r\n";
        let listing = format!("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{page}", page.len());
        let body = format!("HTTP/1.1 206 OK\r\n{common}content-range: bytes 0-3/4\r\ncontent-length: 4\r\n\r\nab");
        let mut open = Vec::new();
        for answer in [listing, body] {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut request = [0; 8192];
            assert!(client.read(&mut request).await.unwrap() > 0);
            client.write_all(answer.as_bytes()).await.unwrap();
            open.push(client);
            // The listing ends here; the body is left hanging as long as the test runs.
            if open.len() == 1 {
                open[0].shutdown().await.unwrap();
            }
        }
        std::future::pending::<()>().await;
    });
    let source = open(signed(&endpoint), "s3://bucket/m").unwrap();
    let listing = source.resolve().await.unwrap();
    let policy = RetryPolicy { attempts: 1, stall_timeout: Duration::from_millis(100), ..RetryPolicy::default() };
    let body = policy.fetch(source, listing.files()[0].clone(), 0..4, Arc::new(|_| Box::new(())));
    let error = collect(body).await.unwrap_err();
    assert!(matches!(error, Error::Stalled { .. }), "{error}");
    server.abort();
}

#[tokio::test]
async fn s3_goes_through_the_proxy_of_the_captured_environment() {
    let page = listing_of("m/a", 1, Some("&quot;e&quot;"));
    let proxy = BucketDouble::start(vec![answer(200, &[], &page), answer(200, &[], &page)]).await;
    let environment = with(signed("http://s3.invalid:9000"), &[("HTTP_PROXY", &proxy.endpoint)]);
    assert_eq!(listed(&open(environment.clone(), "s3://bucket/m").unwrap()).await, ["a"]);
    let hosted = with(environment.clone(), &[("AWS_S3_ADDRESSING_STYLE", "virtual")]);
    assert_eq!(listed(&open(hosted, "s3://bucket/m").unwrap()).await, ["a"]);
    let targets: Vec<String> =
        proxy.seen().iter().map(|seen| seen.target.split('?').next().unwrap().to_owned()).collect();
    assert_eq!(targets, ["http://s3.invalid:9000/bucket", "http://bucket.s3.invalid:9000/"]);

    let exempt = with(environment, &[("NO_PROXY", "s3.invalid")]);
    let error = open(exempt, "s3://bucket/m").unwrap().resolve().await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { step: Step::Dns, .. }), "{error}");
    assert_eq!(proxy.seen().len(), 2);
}

#[tokio::test]
async fn s3_tells_no_identity_at_all_from_one_that_may_not_read() {
    let denied = "<Error><Code>AccessDenied</Code></Error>";
    let store = BucketDouble::start(vec![answer(403, &[], denied)]).await;
    let node = |metadata: &str| -> Environment {
        [("AWS_ENDPOINT_URL", store.endpoint.as_str()), ("AWS_METADATA_ENDPOINT", metadata)].into_iter().collect()
    };
    let nobody = open(node("http://127.0.0.1:1"), "s3://bucket/m").unwrap();
    let error = nobody.resolve().await.unwrap_err();
    assert_eq!(error.code(), Code::AuthMissing, "{error}");
    assert!(store.seen().is_empty(), "nothing is asked without a signature unless that is wanted");

    let role = r#"{"AccessKeyId":"A","SecretAccessKey":"S","Token":"T","Expiration":"2099-01-01T00:00:00Z"}"#;
    let metadata =
        BucketDouble::start(vec![answer(200, &[], "token"), answer(200, &[], "role"), answer(200, &[], role)]).await;
    let error = open(node(&metadata.endpoint), "s3://bucket/m").unwrap().resolve().await.unwrap_err();
    assert!(matches!(&error, Error::AuthInvalid { origin, .. } if origin.contains("identity")), "{error}");
    assert!(store.seen()[0].signed);
}

//! What `hf://` promises, against a Hub that `hub_protocol.rs` holds to the real client.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use larder::fault::{Code, Diagnose};
use larder::model::{Checksum, ListedFile, Listing, ModelRef};
use larder::source::{Environment, Error, Retry, Source, SourceConfig, Sources};

use crate::support::breaking_proxy::BreakingProxy;
use crate::support::hub::{Canned, RepoFile, TestHub};
use crate::support::source_contract::{self, FILES, Origin, WEIGHTS, collect, fetch_whole, file};

const REPO: &str = "acme/tiny";
const TOKEN: &str = "hf_OnlyForTests";

/// Variables of an environment.
type Variables<'a> = &'a [(&'a str, &'a str)];

fn files() -> Vec<RepoFile> {
    FILES.iter().map(|(path, bytes)| RepoFile::new(path, bytes.to_vec())).collect()
}

async fn hub() -> TestHub {
    let hub = TestHub::start().await;
    hub.publish(REPO, files());
    hub
}

fn environment(hub: &TestHub, more: Variables<'_>) -> Environment {
    let own = [("HF_ENDPOINT", hub.endpoint()), ("HOME", "/nonexistent")];
    own.iter().chain(more).map(|(k, v)| (*k, *v)).collect()
}

fn open(hub: &TestHub, reference: &str, more: Variables<'_>) -> Arc<dyn Source> {
    let sources = Sources::new(SourceConfig::default(), environment(hub, more));
    sources.open(&reference.parse::<ModelRef>().unwrap()).unwrap_or_else(|e| panic!("{reference}: {e}")).into()
}

async fn resolve(hub: &TestHub, reference: &str, more: Variables<'_>) -> Result<Listing, Error> {
    open(hub, reference, more).resolve().await
}

fn paths(listing: &Listing) -> Vec<&str> {
    listing.files().iter().map(|f| f.path.as_str()).collect()
}

fn token_seen(seen: &[crate::support::hub::Seen]) -> bool {
    seen.iter().any(|s| s.headers.values().any(|v| v.to_str().unwrap_or_default().contains(TOKEN)))
}

async fn part(source: &Arc<dyn Source>, file: &ListedFile, range: std::ops::Range<u64>) -> Result<Vec<u8>, Error> {
    collect(source.fetch(file, range).await?).await
}

/// A Hub and its other host, each behind a proxy that breaks.
struct Proxied {
    hub: TestHub,
    front: BreakingProxy,
    bytes: BreakingProxy,
}

fn port(origin: &str) -> u16 {
    url::Url::parse(origin).unwrap().port().unwrap()
}

#[async_trait]
impl Origin for Proxied {
    fn environment(&self) -> Environment {
        let endpoint = format!("http://127.0.0.1:{}", self.front.port);
        environment(&self.hub, &[("HF_TOKEN", TOKEN), ("HF_ENDPOINT", &endpoint)])
    }

    fn reference(&self) -> ModelRef {
        format!("hf://{REPO}").parse().unwrap()
    }

    fn missing(&self) -> ModelRef {
        "hf://acme/absent".parse().unwrap()
    }

    async fn put(&self, path: &str, bytes: &[u8]) {
        let mut files = files();
        files.iter_mut().find(|f| f.path == path).unwrap().bytes = bytes.to_vec().into();
        self.hub.publish(REPO, files);
    }

    async fn deny(&self, denied: bool) -> bool {
        self.front.deny(denied);
        true
    }

    async fn break_next_body_after(&self, bytes: u64) -> bool {
        self.bytes.cut_next_after(bytes);
        true
    }
}

#[tokio::test]
async fn holds_the_contract_of_sources() {
    let hub = hub().await;
    hub.allow(TOKEN);
    let front = BreakingProxy::start(port(hub.endpoint())).await;
    let bytes = BreakingProxy::start(port(&hub.cdn())).await;
    hub.set_cdn(&format!("http://127.0.0.1:{}", bytes.port));
    let proxied = Proxied { hub, front, bytes };
    source_contract::holds(&proxied).await;
    assert!(!proxied.bytes.is_armed(), "no body was broken");
}

#[tokio::test]
async fn a_body_that_breaks_is_resumed_where_it_broke() {
    let hub = hub().await;
    let source = open(&hub, "hf://acme/tiny", &[]);
    let listing = source.resolve().await.unwrap();
    hub.break_next_body(100_000);
    assert!(fetch_whole(&source, file(&listing, FILES[2].0)).await.unwrap() == WEIGHTS);
    let ranges: Vec<_> = hub.cdn_requests().iter().map(|s| s.headers["range"].to_str().unwrap().to_owned()).collect();
    assert_eq!(ranges.len(), 2);
    let resumed: u64 = ranges[1].strip_prefix("bytes=").unwrap().split('-').next().unwrap().parse().unwrap();
    assert_eq!(resumed, 100_000, "{ranges:?}");
}

#[tokio::test]
async fn the_listing_names_the_commit_and_every_checksum() {
    let hub = TestHub::start().await;
    let commit = hub.publish(REPO, files());
    let listing = resolve(&hub, "hf://acme/tiny", &[]).await.unwrap();
    assert_eq!(listing.version(), commit);
    for listed in listing.files() {
        let published = files().into_iter().find(|f| f.path == listed.path.as_str()).unwrap();
        let expected = match published.lfs {
            true => format!("sha256:{}", published.sha256()),
            false => format!("git-sha1:{}", published.git_sha1()),
        };
        assert_eq!(listed.checksum, Some(expected.parse::<Checksum>().unwrap()), "{}", listed.path);
        assert_eq!(listed.size, published.bytes.len() as u64);
    }
    assert!(listing.files().iter().any(|f| matches!(f.checksum, Some(Checksum::Sha256(_)))));
}

#[tokio::test]
async fn a_listing_of_many_pages_is_whole() {
    let hub = TestHub::start().await;
    let many = (0..2500).map(|i| RepoFile::new(&format!("shards/{i:05}.json"), format!("{i}"))).collect();
    hub.publish(REPO, many);
    let listing = resolve(&hub, "hf://acme/tiny", &[]).await.unwrap();
    assert_eq!(listing.files().len(), 2500);
    assert_eq!(hub.count("/tree/"), 3, "2,500 files and a directory are three pages");
}

#[tokio::test]
async fn a_mirror_may_pass_on_links_of_the_hub_without_getting_us_there() {
    let (hub, elsewhere) = (hub().await, hub().await);
    hub.allow(TOKEN);
    let link = format!("<{}/api/models/acme/tiny/tree/main?cursor=00&limit=1000>; rel=\"next\"", elsewhere.endpoint());
    hub.answer_next("/tree/", Canned { status: 200, headers: vec![("link", link)], body: "[]".into() });
    let listing = resolve(&hub, "hf://acme/tiny", &[("HF_TOKEN", TOKEN)]).await.unwrap();
    assert!(!listing.files().is_empty(), "the next page comes from the mirror itself");
    assert!(elsewhere.requests().is_empty());
}

#[tokio::test]
async fn a_link_that_leads_in_a_circle_ends() {
    let hub = hub().await;
    let link = "</api/models/acme/tiny/tree/main?recursive=true&expand=false&limit=1000>; rel=\"next\"".to_owned();
    hub.answer_next("/tree/", Canned { status: 200, headers: vec![("link", link)], body: "[]".into() });
    let error = resolve(&hub, "hf://acme/tiny", &[]).await.unwrap_err();
    assert_eq!(error.code(), Code::SourceProtocol, "{error}");
}

#[tokio::test]
async fn subdirectory_and_patterns_choose_and_keep_paths_from_the_root() {
    let hub = TestHub::start().await;
    let names = ["config.json", "onnx/config.json", "onnx/a/model.onnx", "onnx-old/model.onnx"];
    hub.publish(REPO, names.map(|name| RepoFile::new(name, name.as_bytes().to_vec())).to_vec());
    let listing = resolve(&hub, "hf://acme/tiny@main/onnx", &[]).await.unwrap();
    assert_eq!(paths(&listing), ["onnx/a/model.onnx", "onnx/config.json"]);
    let listing = resolve(&hub, "hf://acme/tiny#include=*.json", &[]).await.unwrap();
    assert_eq!(paths(&listing), ["config.json", "onnx/config.json"]);

    let error = resolve(&hub, "hf://acme/tiny@main/absent", &[]).await.unwrap_err();
    assert_eq!(error.code(), Code::RepoNotFound);
    assert!(error.to_string().contains("no directory `absent`"), "{error}");
    let error = resolve(&hub, "hf://acme/tiny#include=*.gguf", &[]).await.unwrap_err();
    assert_eq!(error, Error::NothingSelected { what: "hf://acme/tiny@main#include=*.gguf".into(), listed: 4 });
}

#[tokio::test]
async fn names_that_leave_the_directory_are_refused() {
    for name in ["../x", "/etc/passwd", "a/../../b", "a\\b", "a\nb"] {
        let hub = TestHub::start().await;
        hub.publish(REPO, vec![RepoFile::new(name, "x")]);
        let error = resolve(&hub, "hf://acme/tiny", &[]).await.unwrap_err();
        assert_eq!(error.code(), Code::UnsafeName, "{name:?}: {error}");
    }
}

#[tokio::test]
async fn a_listing_without_checksums_is_not_believed() {
    let hub = hub().await;
    let body = r#"[{"type":"file","path":"a","size":1,"oid":"zz"}]"#.to_owned();
    hub.answer_next("/tree/", Canned { status: 200, headers: vec![], body });
    let error = resolve(&hub, "hf://acme/tiny", &[]).await.unwrap_err();
    assert_eq!(error.code(), Code::SourceProtocol, "{error}");
}

#[tokio::test]
async fn a_commit_that_is_none_is_refused() {
    let hub = hub().await;
    for sha in ["null", "\"../../x\"", "\"ABCDEF\""] {
        let body = format!(r#"{{"id":"acme/tiny","sha":{sha}}}"#);
        hub.answer_next("/revision/", Canned { status: 200, headers: vec![], body });
        let error = resolve(&hub, "hf://acme/tiny", &[]).await.unwrap_err();
        assert_eq!(error.code(), Code::SourceProtocol, "{sha}: {error}");
    }
}

#[tokio::test]
async fn branches_tags_commits_and_old_names_are_found() {
    let hub = TestHub::start().await;
    let first = hub.publish("gpt2", vec![RepoFile::new("config.json", "one")]);
    let second = hub.publish("gpt2", vec![RepoFile::new("config.json", "two")]);
    hub.tag("gpt2", "v1", &first);
    hub.branch("gpt2", "refs/pr/1", &first);
    hub.branch("gpt2", "feature/x", &first);
    for (revision, commit) in [
        ("", &second),
        ("@main", &second),
        ("@v1", &first),
        ("@refs/pr/1", &first),
        ("@feature%2Fx", &first),
        (&format!("@{first}"), &first),
    ] {
        let listing = resolve(&hub, &format!("hf://gpt2{revision}"), &[]).await.unwrap();
        assert_eq!(listing.version(), *commit, "{revision}");
    }
    hub.rename("gpt2", "openai-community/gpt2");
    let source = open(&hub, "hf://gpt2", &[]);
    let listing = source.resolve().await.unwrap();
    assert_eq!(fetch_whole(&source, &listing.files()[0]).await.unwrap(), b"two");
}

#[tokio::test]
async fn a_mirror_below_a_path_works() {
    let hub = TestHub::start_below("/mirrors/hf").await;
    hub.publish(REPO, files());
    hub.set_page(2);
    let source = open(&hub, "hf://acme/tiny", &[]);
    let listing = source.resolve().await.unwrap();
    assert_eq!(listing.files().len(), FILES.len());
    for (path, bytes) in FILES.iter().filter(|(_, bytes)| !bytes.is_empty()) {
        assert_eq!(&fetch_whole(&source, file(&listing, path)).await.unwrap(), bytes);
    }
}

#[tokio::test]
async fn the_token_reaches_the_hub_and_never_the_host_of_the_bytes() {
    let hub = hub().await;
    hub.gate(REPO);
    hub.grant(TOKEN, REPO);
    let source = open(&hub, "hf://acme/tiny", &[("HF_TOKEN", &format!(" {TOKEN}\n"))]);
    let listing = source.resolve().await.unwrap();
    let weights = file(&listing, FILES[2].0);
    assert!(fetch_whole(&source, weights).await.unwrap() == WEIGHTS);
    assert!(part(&source, weights, 5..100_000).await.unwrap() == WEIGHTS[5..100_000]);
    assert!(hub.requests().iter().all(|seen| token_seen(std::slice::from_ref(seen))), "the token is trimmed and sent");
    assert_eq!(hub.cdn_requests().len(), 2);
    assert!(!token_seen(&hub.cdn_requests()));
    assert!(hub.cdn_requests().iter().all(|seen| !seen.headers.contains_key("authorization")));
}

#[tokio::test]
async fn without_a_token_none_is_sent() {
    let hub = hub().await;
    hub.allow(TOKEN);
    let disabled = [("HF_TOKEN", TOKEN), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")];
    for more in [&[][..], &disabled] {
        let source = open(&hub, "hf://acme/tiny", more);
        let listing = source.resolve().await.unwrap();
        fetch_whole(&source, &listing.files()[0]).await.unwrap();
    }
    assert!(hub.requests().iter().all(|seen| !seen.headers.contains_key("authorization")));
}

#[tokio::test]
async fn tokens_come_from_where_the_python_client_finds_them_and_are_read_for_each_source() {
    let hub = hub().await;
    hub.make_private(REPO);
    hub.grant(TOKEN, REPO);
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path).to_str().unwrap().to_owned();
    for path in ["named", "home/token", "cache/huggingface/token", "user/.cache/huggingface/token"] {
        std::fs::create_dir_all(dir.path().join(path).parent().unwrap()).unwrap();
        std::fs::write(dir.path().join(path), format!("{TOKEN}\n")).unwrap();
    }
    for (variable, path) in
        [("HF_TOKEN_PATH", "named"), ("HF_HOME", "home"), ("XDG_CACHE_HOME", "cache"), ("HOME", "user")]
    {
        resolve(&hub, "hf://acme/tiny", &[(variable, &at(path))]).await.unwrap_or_else(|e| panic!("{variable}: {e}"));
    }

    std::fs::write(at("named"), "hf_other").unwrap();
    let error = resolve(&hub, "hf://acme/tiny", &[("HF_TOKEN_PATH", &at("named"))]).await.unwrap_err();
    assert_eq!(error.code(), Code::AuthInvalid, "a rotated token counts at once: {error}");
    assert!(error.to_string().contains(&at("named")), "{error}");
    let error = resolve(&hub, "hf://acme/tiny", &[("HF_TOKEN_PATH", &at("absent"))]).await.unwrap_err();
    assert_eq!(error.code(), Code::AuthMissing, "a secret that is not mounted is no token: {error}");
    let directory = Sources::new(SourceConfig::default(), environment(&hub, &[("HF_TOKEN_PATH", &at("home"))]));
    let error = directory.open(&"hf://acme/tiny".parse().unwrap()).err().unwrap();
    assert_eq!(error.code(), Code::ConfigInvalid, "{error}");
}

#[tokio::test]
async fn who_must_do_what_is_told_apart() {
    let hub = hub().await;
    for name in ["acme/gated", "acme/private"] {
        hub.publish(name, files());
    }
    hub.gate("acme/gated");
    hub.make_private("acme/private");
    hub.allow(TOKEN);
    let (with, without, wrong): (Variables, Variables, Variables) =
        (&[("HF_TOKEN", TOKEN)], &[], &[("HF_TOKEN", "hf_wrong")]);
    let cases = [
        ("hf://acme/absent", without, Code::AuthMissing, "--from-literal=HF_TOKEN="),
        ("hf://acme/private", without, Code::AuthMissing, "spelling"),
        ("hf://acme/gated", without, Code::AuthMissing, "/acme/gated"),
        ("hf://acme/absent", with, Code::RepoNotFound, "spelling"),
        ("hf://acme/private", with, Code::RepoNotFound, "spelling"),
        ("hf://acme/gated", with, Code::LicenceNotAccepted, "/acme/gated"),
        ("hf://acme/tiny", wrong, Code::AuthInvalid, "HF_TOKEN"),
        ("hf://acme/tiny@v9", without, Code::RevisionNotFound, "main"),
        ("hf://acme/tiny@v9", with, Code::RevisionNotFound, "main"),
    ];
    for (reference, environment, code, action) in cases {
        let error = resolve(&hub, reference, environment).await.unwrap_err();
        assert_eq!(error.code(), code, "{reference} {environment:?}: {error}");
        assert!(error.action().contains(action), "{reference} {environment:?}: {}", error.action());
        let said = format!("{error} {} {error:?}", error.action());
        assert!(!said.contains("hf_wrong") && !said.contains(TOKEN), "{said}");
    }
    hub.grant(TOKEN, "acme/gated");
    resolve(&hub, "hf://acme/gated", with).await.expect("who has been granted access gets it");
}

#[tokio::test]
async fn a_401_for_a_token_that_works_means_the_repository() {
    let hub = hub().await;
    hub.allow(TOKEN);
    let body = r#"{"error":"Invalid username or password."}"#.to_owned();
    hub.answer_next("/revision/", Canned { status: 401, headers: vec![], body });
    let error = resolve(&hub, "hf://acme/tiny", &[("HF_TOKEN", TOKEN)]).await.unwrap_err();
    assert_eq!(error.code(), Code::RepoNotFound, "{error}");
    assert_eq!(hub.count("/api/whoami-v2"), 1);
}

#[tokio::test]
async fn a_repository_that_the_hub_has_disabled_needs_no_token() {
    let hub = hub().await;
    let headers = vec![("x-error-message", "Access to this resource is disabled.".to_owned())];
    hub.answer_next("/revision/", Canned { status: 403, headers, body: "{}".into() });
    let error = resolve(&hub, "hf://acme/tiny", &[]).await.unwrap_err();
    assert_eq!(error.code(), Code::RepoNotFound, "{error}");
    assert!(error.to_string().contains("disabled"), "{error}");
}

#[tokio::test]
async fn access_taken_back_during_a_pull_is_told_as_such() {
    let hub = hub().await;
    hub.allow(TOKEN);
    let source = open(&hub, "hf://acme/tiny", &[("HF_TOKEN", TOKEN)]);
    let listing = source.resolve().await.unwrap();
    hub.gate(REPO);
    for path in [FILES[0].0, FILES[2].0] {
        let error = fetch_whole(&source, file(&listing, path)).await.unwrap_err();
        assert_eq!(error.code(), Code::LicenceNotAccepted, "{path}: {error}");
    }
    let error = part(&source, file(&listing, FILES[2].0), 1..2).await.unwrap_err();
    assert_eq!(error.code(), Code::LicenceNotAccepted, "{error}");
    hub.revoke(TOKEN);
    let error = fetch_whole(&source, file(&listing, FILES[0].0)).await.unwrap_err();
    assert_eq!(error.code(), Code::AuthInvalid, "{error}");
}

#[tokio::test]
async fn offline_makes_no_request_and_names_the_variable() {
    let hub = hub().await;
    for variable in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
        let error = resolve(&hub, "hf://acme/tiny", &[(variable, "1")]).await.unwrap_err();
        assert_eq!(error.code(), Code::Offline);
        assert!(error.action().contains(variable), "{}", error.action());
    }
    assert!(hub.requests().is_empty());
}

#[tokio::test]
async fn a_rate_limit_carries_its_time_however_the_hub_says_it() {
    let date = || httpdate::fmt_http_date(std::time::SystemTime::now() + Duration::from_secs(500));
    let ways: [(&str, &str, String); 4] = [
        ("/revision/", "retry-after", "77".into()),
        ("/revision/", "ratelimit", "\"api\";r=0;t=77".into()),
        ("/revision/", "retry-after", date()),
        ("/tree/", "ratelimit", "\"api\";r=0;t=77".into()),
    ];
    for (route, header, value) in ways {
        let hub = hub().await;
        hub.limit_next(route, 2, &[(header, &value)]);
        let error = resolve(&hub, "hf://acme/tiny", &[]).await.unwrap_err();
        assert_eq!(error.code(), Code::RateLimited, "{header} at {route}: {error}");
        let Retry::After(wait) = error.retry() else { panic!("{header} at {route}: {:?}", error.retry()) };
        assert!((77..=500).contains(&wait.as_secs()), "{header} at {route}: {wait:?}");
    }
}

#[tokio::test]
async fn a_server_error_is_asked_again_later_and_an_html_page_is_no_listing() {
    let hub = hub().await;
    let page = |status| Canned { status, headers: vec![("content-type", "text/html".into())], body: "<html>".into() };
    for _ in 0..2 {
        hub.answer_next("/revision/", page(503));
    }
    let error = resolve(&hub, "hf://acme/tiny", &[]).await.unwrap_err();
    assert!(matches!(error, Error::Server { status: 503, .. }), "{error}");
    for route in ["/revision/", "/revision/", "/tree/"] {
        hub.answer_next(route, page(200));
    }
    for _ in 0..2 {
        let error = resolve(&hub, "hf://acme/tiny", &[]).await.unwrap_err();
        assert_eq!(error.code(), Code::SourceProtocol, "{error}");
        assert_eq!(error.retry(), Retry::Backoff);
    }
}

#[tokio::test]
async fn nobody_listening_is_told_as_a_connection() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let environment: Environment = [("HF_ENDPOINT", format!("http://{free}"))].into_iter().collect();
    let sources = Sources::new(SourceConfig::default(), environment);
    let error = sources.open(&"hf://acme/tiny".parse().unwrap()).unwrap().resolve().await.unwrap_err();
    assert!(matches!(error, Error::Unreachable { step: larder::source::Step::Connect, .. }), "{error}");
}

#[tokio::test]
async fn ranges_of_one_file_ask_the_hub_once_where_it_is() {
    let hub = hub().await;
    let source = open(&hub, "hf://acme/tiny", &[]);
    let listing = source.resolve().await.unwrap();
    let weights = file(&listing, FILES[2].0);
    let parts = (0..30).map(|i| part(&source, weights, i * 10_000..(i + 1) * 10_000));
    let bytes = futures::future::try_join_all(parts).await.unwrap().concat();
    assert!(bytes == WEIGHTS);
    let asked: Vec<_> = hub.requests().into_iter().filter(|seen| seen.path.contains("/resolve/")).collect();
    assert_eq!(asked.iter().map(|seen| seen.method.as_str()).collect::<Vec<_>>(), ["HEAD"]);
    assert_eq!(hub.cdn_requests().len(), 30);
    let sha256 = RepoFile::new(FILES[2].0, WEIGHTS.to_vec()).sha256();
    assert_eq!(hub.bytes_sent(&sha256), WEIGHTS.len() as u64, "no byte is sent twice");
}

#[tokio::test]
async fn a_file_in_one_piece_costs_no_extra_request() {
    let hub = hub().await;
    let source = open(&hub, "hf://acme/tiny", &[]);
    let listing = source.resolve().await.unwrap();
    let before = hub.requests().len();
    fetch_whole(&source, file(&listing, FILES[2].0)).await.unwrap();
    assert_eq!((hub.requests().len() - before, hub.cdn_requests().len()), (1, 1));
    fetch_whole(&source, file(&listing, FILES[0].0)).await.unwrap();
    assert_eq!(hub.requests().len() - before, 3, "the Hub redirects small files to a route of its own");
}

#[tokio::test]
async fn an_expired_address_is_asked_for_again() {
    let hub = hub().await;
    let source = open(&hub, "hf://acme/tiny", &[]);
    let listing = source.resolve().await.unwrap();
    let weights = file(&listing, FILES[2].0);
    part(&source, weights, 0..1000).await.unwrap();
    hub.expire_signatures();
    let parts = (1..9).map(|i| part(&source, weights, i * 1000..(i + 1) * 1000));
    let bytes = futures::future::try_join_all(parts).await.unwrap().concat();
    assert!(bytes == WEIGHTS[1000..9000]);
    assert_eq!(hub.count("/resolve/"), 2, "eight ranges that meet the expired address ask once");
}

#[tokio::test]
async fn a_host_that_refuses_a_fresh_address_is_no_fault_of_the_token() {
    let hub = hub().await;
    hub.allow(TOKEN);
    let source = open(&hub, "hf://acme/tiny", &[("HF_TOKEN", TOKEN)]);
    let listing = source.resolve().await.unwrap();
    let weights = file(&listing, FILES[2].0);
    for (range, refusals) in [(0..10, 2), (0..weights.size, 1)] {
        for _ in 0..refusals {
            hub.answer_next("/repos/", Canned { status: 403, headers: vec![], body: "<Error/>".into() });
        }
        let error = part(&source, weights, range.clone()).await.unwrap_err();
        assert_eq!(error.code(), Code::SourceProtocol, "{range:?}: {error}");
        assert_eq!(error.retry(), Retry::Backoff);
        assert!(!error.to_string().contains("Signature"), "{error}");
    }
}

#[tokio::test]
async fn a_hub_that_resolves_to_another_file_is_noticed() {
    let hub = hub().await;
    let source = open(&hub, "hf://acme/tiny", &[]);
    let listing = source.resolve().await.unwrap();
    let weights = file(&listing, FILES[2].0);
    let location = ("location", format!("{}/repos/x?Signature=1", hub.cdn()));
    for (name, value) in [("x-repo-commit", "0".repeat(40)), ("x-linked-size", "7".into())] {
        let headers = vec![location.clone(), (name, value)];
        hub.answer_next("/resolve/", Canned { status: 302, headers, body: String::new() });
        let error = part(&source, weights, 0..10).await.unwrap_err();
        assert_eq!(error.code(), Code::SourceChanged, "{name}: {error}");
    }
}

#[tokio::test]
async fn endpoints_that_are_none_are_named_and_hide_their_password() {
    for endpoint in ["huggingface.co", "ftp://host", "https://user:secret@host", "https://host/?a=b"] {
        let environment: Environment = [("HF_ENDPOINT", endpoint)].into_iter().collect();
        let sources = Sources::new(SourceConfig::default(), environment);
        let error = sources.open(&"hf://acme/tiny".parse().unwrap()).err().unwrap();
        assert_eq!(error.code(), Code::ConfigInvalid, "{endpoint}");
        assert!(error.to_string().contains("HF_ENDPOINT"), "{error}");
        assert!(!error.to_string().contains("secret"), "{error}");
    }
}

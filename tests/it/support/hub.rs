//! A Hub for tests: what huggingface.co answers, as its own clients see it.
//!
//! `hub_protocol.rs` holds this file to the real `huggingface_hub` package, so that the tests of our client stand on the
//! protocol and not on our idea of it. Two listeners: the Hub, and the host its LFS files are redirected to.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};

use aws_lc_rs::digest as lc;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt;
use serde_json::{Value, json};

/// A running Hub. It ends with the runtime of the test.
pub(crate) struct TestHub {
    endpoint: String,
    shared: Arc<Shared>,
}

struct Shared {
    /// Path before every route, as a mirror below a path has it; empty or `/like/this`.
    prefix: String,
    inner: Mutex<Inner>,
}

struct Inner {
    /// Origin of signed URLs.
    cdn: String,
    repos: BTreeMap<String, Repo>,
    renamed: BTreeMap<String, String>,
    tokens: BTreeSet<String>,
    grants: BTreeSet<(String, String)>,
    canned: VecDeque<(String, Canned)>,
    requests: Vec<Seen>,
    cdn_requests: Vec<Seen>,
    /// Bytes sent of each file, by path in the repository or SHA-256.
    sent: BTreeMap<String, u64>,
    blobs: BTreeMap<String, Bytes>,
    /// Which signatures are still good.
    signature: u64,
    break_after: Option<usize>,
    page: usize,
}

#[derive(Default)]
struct Repo {
    branches: BTreeMap<String, String>,
    tags: BTreeMap<String, String>,
    commits: BTreeMap<String, Vec<RepoFile>>,
    gated: bool,
    private: bool,
}

/// One file of a commit.
#[derive(Clone)]
pub(crate) struct RepoFile {
    pub(crate) path: String,
    pub(crate) bytes: Bytes,
    /// Whether it is in LFS, and so served by the other host.
    pub(crate) lfs: bool,
}

impl RepoFile {
    /// A file that is in LFS if a model repository's usual `.gitattributes` would put it there.
    pub(crate) fn new(path: &str, bytes: impl Into<Bytes>) -> RepoFile {
        let lfs = [".safetensors", ".bin", ".onnx", ".gguf", ".h5"].iter().any(|end| path.ends_with(end));
        RepoFile { path: path.to_owned(), bytes: bytes.into(), lfs }
    }

    /// Git's object id of the content.
    pub(crate) fn git_sha1(&self) -> String {
        git_sha1(&self.bytes)
    }

    /// SHA-256 of the content.
    pub(crate) fn sha256(&self) -> String {
        hex::encode(lc::digest(&lc::SHA256, &self.bytes))
    }

    fn pointer_sha1(&self) -> String {
        let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{}\n", self.sha256());
        git_sha1(format!("{pointer}size {}\n", self.bytes.len()).as_bytes())
    }
}

fn git_sha1(bytes: &[u8]) -> String {
    let mut context = lc::Context::new(&lc::SHA1_FOR_LEGACY_USE_ONLY);
    context.update(format!("blob {}\0", bytes.len()).as_bytes());
    context.update(bytes);
    hex::encode(context.finish())
}

/// A request that came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    /// Path and query as they were sent, without the prefix.
    pub(crate) path: String,
    pub(crate) headers: HeaderMap,
}

/// An answer prepared for the next request to a path.
#[derive(Debug, Clone)]
pub(crate) struct Canned {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: String,
}

impl TestHub {
    /// Starts an empty Hub on free ports.
    pub(crate) async fn start() -> TestHub {
        TestHub::start_below("").await
    }

    /// The same, with every route below `prefix`, as a company's mirror has it.
    pub(crate) async fn start_below(prefix: &str) -> TestHub {
        let (hub, hub_at) = listen().await;
        let (cdn, cdn_at) = listen().await;
        let inner = Inner {
            cdn: format!("http://{cdn_at}"),
            repos: BTreeMap::new(),
            renamed: BTreeMap::new(),
            tokens: BTreeSet::new(),
            grants: BTreeSet::new(),
            canned: VecDeque::new(),
            requests: Vec::new(),
            cdn_requests: Vec::new(),
            sent: BTreeMap::new(),
            blobs: BTreeMap::new(),
            signature: 1,
            break_after: None,
            page: 1000,
        };
        let shared = Arc::new(Shared { prefix: prefix.to_owned(), inner: Mutex::new(inner) });
        let app = axum::Router::new().fallback(answer).with_state(shared.clone());
        tokio::spawn(async move { axum::serve(hub, app).await });
        let app = axum::Router::new().fallback(answer_cdn).with_state(shared.clone());
        tokio::spawn(async move { axum::serve(cdn, app).await });
        TestHub { endpoint: format!("http://{hub_at}{prefix}"), shared }
    }

    /// What HF_ENDPOINT must be.
    pub(crate) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Origin that signed URLs lead to.
    pub(crate) fn cdn(&self) -> String {
        self.lock().cdn.clone()
    }

    /// Lets signed URLs lead to another origin: a proxy in front of the CDN.
    pub(crate) fn set_cdn(&self, origin: &str) {
        self.lock().cdn = origin.trim_end_matches('/').to_owned();
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.shared.inner.lock().unwrap()
    }

    /// Makes a commit with these files, moves `main` to it, and gives its name.
    pub(crate) fn publish(&self, repo: &str, files: Vec<RepoFile>) -> String {
        let mut inner = self.lock();
        for file in files.iter().filter(|file| file.lfs) {
            inner.blobs.insert(file.sha256(), file.bytes.clone());
        }
        let entry = inner.repos.entry(repo.to_owned()).or_default();
        let mut context = lc::Context::new(&lc::SHA1_FOR_LEGACY_USE_ONLY);
        context.update(format!("{repo} {}", entry.commits.len()).as_bytes());
        for file in &files {
            context.update(file.path.as_bytes());
            context.update(file.git_sha1().as_bytes());
        }
        let commit = hex::encode(context.finish());
        entry.commits.insert(commit.clone(), files);
        entry.branches.insert("main".into(), commit.clone());
        commit
    }

    /// Names a commit.
    pub(crate) fn tag(&self, repo: &str, tag: &str, commit: &str) {
        let mut inner = self.lock();
        inner.repos.get_mut(repo).unwrap().tags.insert(tag.into(), commit.into());
    }

    /// A branch of any name, such as `refs/pr/1`.
    pub(crate) fn branch(&self, repo: &str, branch: &str, commit: &str) {
        let mut inner = self.lock();
        inner.repos.get_mut(repo).unwrap().branches.insert(branch.into(), commit.into());
    }

    /// From now on its files need a token whose account was granted access.
    pub(crate) fn gate(&self, repo: &str) {
        self.lock().repos.get_mut(repo).unwrap().gated = true;
    }

    /// From now on only granted tokens see it at all.
    pub(crate) fn make_private(&self, repo: &str) {
        self.lock().repos.get_mut(repo).unwrap().private = true;
    }

    /// From now on the old name leads to the new one.
    pub(crate) fn rename(&self, old: &str, new: &str) {
        let mut inner = self.lock();
        let repo = inner.repos.remove(old).unwrap();
        inner.repos.insert(new.into(), repo);
        inner.renamed.insert(old.into(), new.into());
    }

    /// Makes a token valid.
    pub(crate) fn allow(&self, token: &str) {
        self.lock().tokens.insert(token.into());
    }

    /// Makes a token valid and gives its account access to a gated or private repository.
    pub(crate) fn grant(&self, token: &str, repo: &str) {
        let mut inner = self.lock();
        inner.tokens.insert(token.into());
        inner.grants.insert((token.into(), repo.into()));
    }

    /// Takes a token back.
    pub(crate) fn revoke(&self, token: &str) {
        self.lock().tokens.remove(token);
    }

    /// Entries of one page of a listing, where the client asks for more.
    pub(crate) fn set_page(&self, entries: usize) {
        self.lock().page = entries;
    }

    /// No URL signed until now works any more.
    pub(crate) fn expire_signatures(&self) {
        self.lock().signature += 1;
    }

    /// The next body of a file breaks off after so many bytes.
    pub(crate) fn break_next_body(&self, after: usize) {
        self.lock().break_after = Some(after);
    }

    /// The next request whose path contains `fragment` is answered with this. Works on both hosts.
    pub(crate) fn answer_next(&self, fragment: &str, answer: Canned) {
        self.lock().canned.push_back((fragment.into(), answer));
    }

    /// The next `count` requests to `fragment` are answered with 429 and these headers.
    pub(crate) fn limit_next(&self, fragment: &str, count: usize, headers: &[(&'static str, &str)]) {
        let headers = headers.iter().map(|(name, value)| (*name, (*value).to_owned())).collect::<Vec<_>>();
        for _ in 0..count {
            let body = json!({"error": "We had to rate limit your IP"}).to_string();
            self.answer_next(fragment, Canned { status: 429, headers: headers.clone(), body });
        }
    }

    /// Requests the Hub got, in order.
    pub(crate) fn requests(&self) -> Vec<Seen> {
        self.lock().requests.clone()
    }

    /// How many of them had `fragment` in their path.
    pub(crate) fn count(&self, fragment: &str) -> usize {
        self.lock().requests.iter().filter(|seen| seen.path.contains(fragment)).count()
    }

    /// Requests the other host got, in order.
    pub(crate) fn cdn_requests(&self) -> Vec<Seen> {
        self.lock().cdn_requests.clone()
    }

    /// Bytes sent of a file: by its path if the Hub serves it itself, by its SHA-256 if the other host does.
    pub(crate) fn bytes_sent(&self, file: &str) -> u64 {
        self.lock().sent.get(file).copied().unwrap_or(0)
    }
}

async fn listen() -> (tokio::net::TcpListener, SocketAddr) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

/// The token, or why the request is refused before anything else is looked at.
enum Asker {
    Nobody,
    Token(String),
    Rejected,
}

impl Inner {
    fn asker(&self, headers: &HeaderMap) -> Asker {
        let Some(value) = headers.get(header::AUTHORIZATION) else { return Asker::Nobody };
        match value.to_str().ok().and_then(|v| v.strip_prefix("Bearer ")) {
            Some(token) if self.tokens.contains(token) => Asker::Token(token.to_owned()),
            _ => Asker::Rejected,
        }
    }

    fn canned(&mut self, path: &str) -> Option<Response> {
        let at = self.canned.iter().position(|(fragment, _)| path.contains(fragment.as_str()))?;
        let (_, canned) = self.canned.remove(at)?;
        let mut response = Response::builder().status(canned.status);
        for (name, value) in &canned.headers {
            response = response.header(*name, value);
        }
        Some(response.body(Body::from(canned.body)).unwrap())
    }

    /// Sends a range of a file, and counts it.
    fn send(&mut self, name: &str, bytes: &Bytes, request: &HeaderMap, method: &Method, extra: Headers) -> Response {
        let length = bytes.len();
        let range = match request.get(header::RANGE).map(|v| parse_range(v.to_str().unwrap_or(""), length)) {
            None => None,
            Some(Some(range)) => Some(range),
            Some(None) => {
                let unsatisfied = vec![("content-range", format!("bytes */{length}"))];
                return plain(StatusCode::RANGE_NOT_SATISFIABLE, unsatisfied, "");
            }
        };
        let mut response = Response::builder().header("accept-ranges", "bytes");
        for (key, value) in extra {
            response = response.header(key, value);
        }
        let part = match range {
            Some((first, last)) => {
                let content_range = format!("bytes {first}-{last}/{length}");
                response = response.status(StatusCode::PARTIAL_CONTENT).header("content-range", content_range);
                bytes.slice(first..=last)
            }
            None => bytes.clone(),
        };
        response = response.header("content-length", part.len());
        if method == Method::HEAD {
            return response.body(Body::empty()).unwrap();
        }
        let body = match self.break_after.take() {
            Some(after) => {
                let part = part.slice(..after.min(part.len()));
                *self.sent.entry(name.to_owned()).or_default() += part.len() as u64;
                // What was sent is flushed when the body pauses; without the pause it is thrown away with the connection.
                let pause = futures::stream::once(async {
                    tokio::task::yield_now().await;
                    Err(std::io::Error::other("broken on request"))
                });
                Body::from_stream(futures::stream::iter([Ok(part)]).chain(pause))
            }
            None => {
                *self.sent.entry(name.to_owned()).or_default() += part.len() as u64;
                Body::from(part)
            }
        };
        response.body(body).unwrap()
    }
}

type Headers = Vec<(&'static str, String)>;

fn plain(status: StatusCode, headers: Headers, body: &str) -> Response {
    let mut response = Response::builder().status(status);
    for (key, value) in headers {
        response = response.header(key, value);
    }
    response.body(Body::from(body.to_owned())).unwrap()
}

fn as_json(value: &Value, mut headers: Headers) -> Response {
    headers.push(("content-type", "application/json; charset=utf-8".into()));
    plain(StatusCode::OK, headers, &value.to_string())
}

/// An error as the Hub words it; `code` is missing from most of its 401s.
fn refuse(status: u16, code: Option<&str>, message: &str) -> Response {
    let mut headers = vec![("content-type", "application/json; charset=utf-8".into())];
    headers.push(("x-error-message", message.to_owned()));
    headers.push(("x-request-id", "Root=1-test".into()));
    if let Some(code) = code {
        headers.push(("x-error-code", code.to_owned()));
    }
    plain(StatusCode::from_u16(status).unwrap(), headers, &json!({ "error": message }).to_string())
}

fn parse_range(value: &str, length: usize) -> Option<(usize, usize)> {
    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    let (first, last) = match (first.parse::<usize>().ok(), last.parse::<usize>().ok()) {
        (Some(first), Some(last)) => (first, last.min(length.checked_sub(1)?)),
        (Some(first), None) => (first, length.checked_sub(1)?),
        (None, Some(suffix)) => (length.checked_sub(suffix)?, length.checked_sub(1)?),
        (None, None) => return None,
    };
    (first <= last).then_some((first, last))
}

fn decode(segment: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = segment.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        let escaped = tail.get(..2).filter(|_| first == b'%').and_then(|digits| hex::decode(digits).ok());
        match escaped {
            Some(byte) => {
                bytes.extend(byte);
                rest = &tail[2..];
            }
            None => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

fn encode(segment: &str) -> String {
    url::form_urlencoded::byte_serialize(segment.as_bytes()).collect::<String>().replace('+', "%20")
}

/// `org/name` or `name`, and what follows it.
fn split_repo<'a>(names: &'a [String], verbs: &[&str]) -> (String, &'a [String]) {
    let long = names.len() >= 2 && !verbs.contains(&names[1].as_str());
    let (repo, rest) = names.split_at(if long { 2 } else { names.len().min(1) });
    (repo.join("/"), rest)
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let raw = request.uri().path_and_query().map(|p| p.as_str()).unwrap_or("/").to_owned();
    let mut inner = shared.inner.lock().unwrap();
    let Some(raw) = raw.strip_prefix(shared.prefix.as_str()).map(str::to_owned) else {
        return refuse(404, None, "Sorry, we can't find the page you are looking for.");
    };
    let (method, headers) = (request.method().clone(), request.headers().clone());
    inner.requests.push(Seen { method: method.to_string(), path: raw.clone(), headers: headers.clone() });
    if let Some(canned) = inner.canned(&raw) {
        return canned;
    }
    let asker = inner.asker(&headers);
    let (path, query) = raw.split_once('?').unwrap_or((&raw, ""));
    let names: Vec<String> = path.split('/').filter(|s| !s.is_empty()).map(decode).collect();
    let texts: Vec<&str> = names.iter().map(String::as_str).collect();
    if matches!(asker, Asker::Rejected) {
        return refuse(401, None, "Invalid credentials in Authorization header");
    }
    match texts.as_slice() {
        ["api", "whoami-v2"] => match asker {
            Asker::Token(_) => {
                as_json(&json!({"type": "user", "id": "1", "name": "tester", "fullname": "Tester", "orgs": []}), vec![])
            }
            _ => refuse(401, None, "Invalid username or password."),
        },
        ["api", "models", ..] => {
            let verbs = ["revision", "tree", "refs", "auth-check"];
            let (repo, rest) = split_repo(&names[2..], &verbs);
            if let Some(response) = inner.refusal(&shared.prefix, &repo, &raw, &asker, false) {
                return response;
            }
            inner.api(&shared.prefix, &repo, rest, query, &headers, &asker)
        }
        // Where the Hub serves small files from; the resolve route leads here.
        ["api", "resolve-cache", "models", ..] => {
            let known = inner.repos.contains_key(&names[3..5].join("/"));
            let (repo, rest) = names[3..].split_at(if known { 2 } else { 1 });
            let repo = repo.join("/");
            if let Some(response) = inner.refusal(&shared.prefix, &repo, &raw, &asker, true) {
                return response;
            }
            let (commit, path) = (rest[0].clone(), rest[1..].join("/"));
            let file = inner.repos[&repo].commits[&commit].iter().find(|f| f.path == path).cloned();
            let Some(file) = file else { return refuse(404, Some("EntryNotFound"), "Entry not found") };
            let extra = vec![
                ("etag", format!("\"{}\"", file.git_sha1())),
                ("x-repo-commit", commit),
                ("content-disposition", "inline".into()),
            ];
            inner.send(&path, &file.bytes, &headers, &method, extra)
        }
        [_, "resolve", ..] | [_, _, "resolve", ..] => {
            let (repo, rest) = split_repo(&names, &["resolve"]);
            if let Some(response) = inner.refusal(&shared.prefix, &repo, &raw, &asker, true) {
                return response;
            }
            inner.resolve(&shared.prefix, &repo, &rest[1..])
        }
        _ => refuse(404, None, "Sorry, we can't find the page you are looking for."),
    }
}

impl Inner {
    /// Why this asker may not have it, or the redirect of a renamed repository.
    fn refusal(&self, prefix: &str, repo: &str, raw: &str, asker: &Asker, content: bool) -> Option<Response> {
        if let Some(new) = self.renamed.get(repo) {
            let location = format!("{prefix}{}", raw.replacen(repo, new, 1));
            return Some(plain(StatusCode::TEMPORARY_REDIRECT, vec![("location", location)], ""));
        }
        let granted = match asker {
            Asker::Token(token) => self.grants.contains(&(token.clone(), repo.to_owned())),
            _ => false,
        };
        let anonymous = matches!(asker, Asker::Nobody);
        match self.repos.get(repo) {
            Some(found) if found.gated && content && !granted => Some(if anonymous {
                let message = format!(
                    "Access to model {repo} is restricted. You must have access to it and be authenticated to access \
                     it. Please log in."
                );
                refuse(401, Some("GatedRepo"), &message)
            } else {
                let message = format!("Access to model {repo} is restricted and you are not in the authorized list.");
                refuse(403, Some("GatedRepo"), &message)
            }),
            Some(found) if !found.private || granted => None,
            _ if anonymous => Some(refuse(401, None, "Invalid username or password.")),
            _ => Some(refuse(404, Some("RepoNotFound"), "Repository not found")),
        }
    }

    fn commit(&self, repo: &str, revision: &str) -> Result<String, Box<Response>> {
        let found = &self.repos[repo];
        let named = found.branches.get(revision).or_else(|| found.tags.get(revision)).cloned();
        let commit = named.or_else(|| found.commits.contains_key(revision).then(|| revision.to_owned()));
        commit.ok_or_else(|| Box::new(refuse(404, Some("RevisionNotFound"), &format!("Invalid rev id: {revision}"))))
    }

    fn api(
        &self,
        prefix: &str,
        repo: &str,
        rest: &[String],
        query: &str,
        headers: &HeaderMap,
        asker: &Asker,
    ) -> Response {
        let found = &self.repos[repo];
        let texts: Vec<&str> = rest.iter().map(String::as_str).collect();
        match texts.as_slice() {
            [] => self.info(repo, "main", query),
            ["revision", revision] => self.info(repo, revision, query),
            ["auth-check"] => {
                self.refusal(prefix, repo, "", asker, true).unwrap_or_else(|| as_json(&json!({}), vec![]))
            }
            ["refs"] => {
                let list = |names: &BTreeMap<String, String>, kind: &str| {
                    let list = names.iter().filter(|(name, _)| !name.starts_with("refs/"));
                    let one = |(name, commit): (&String, &String)| {
                        let full = format!("refs/{kind}/{name}");
                        json!({"name": name, "ref": full, "targetCommit": commit})
                    };
                    list.map(one).collect::<Vec<_>>()
                };
                let branches = list(&found.branches, "heads");
                as_json(&json!({"branches": branches, "tags": list(&found.tags, "tags"), "converts": []}), vec![])
            }
            ["tree", revision, dir @ ..] => {
                let commit = match self.commit(repo, revision) {
                    Ok(commit) => commit,
                    Err(response) => return *response,
                };
                self.tree(prefix, repo, &commit, &dir.join("/"), query, headers)
            }
            _ => refuse(404, None, "Sorry, we can't find the page you are looking for."),
        }
    }

    fn info(&self, repo: &str, revision: &str, query: &str) -> Response {
        let commit = match self.commit(repo, revision) {
            Ok(commit) => commit,
            Err(response) => return *response,
        };
        let found = &self.repos[repo];
        let siblings: Vec<Value> = found.commits[&commit].iter().map(|f| json!({"rfilename": f.path})).collect();
        let mut info = json!({
            "_id": "621ffdc036468d709f17434d",
            "id": repo,
            "modelId": repo,
            "author": repo.split('/').next(),
            "sha": commit,
            "private": found.private,
            "gated": if found.gated { json!("auto") } else { json!(false) },
            "disabled": false,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "createdAt": "2022-03-02T23:29:04.000Z",
            "lastModified": "2024-01-01T00:00:00.000Z",
            "siblings": siblings,
        });
        let expand: Vec<String> = url::form_urlencoded::parse(query.as_bytes())
            .filter(|(key, _)| matches!(key.as_ref(), "expand" | "expand[]"))
            .map(|(_, value)| value.into_owned())
            .collect();
        if !expand.is_empty() {
            let kept = |key: &String| key == "_id" || key == "id" || expand.contains(key);
            info.as_object_mut().unwrap().retain(|key, _| kept(key));
        }
        as_json(&info, vec![])
    }

    fn tree(&self, prefix: &str, repo: &str, commit: &str, dir: &str, query: &str, headers: &HeaderMap) -> Response {
        let query: BTreeMap<String, String> = url::form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        let flag = |name: &str| query.get(name).is_some_and(|v| v.eq_ignore_ascii_case("true") || v == "1");
        let inside = if dir.is_empty() { String::new() } else { format!("{dir}/") };
        let mut entries: BTreeMap<String, Value> = BTreeMap::new();
        for file in self.repos[repo].commits[commit].iter().filter(|f| f.path.starts_with(&inside)) {
            let below = &file.path[inside.len()..];
            for (at, _) in below.match_indices('/') {
                let path = format!("{inside}{}", &below[..at]);
                let oid = git_sha1(path.as_bytes());
                entries.insert(path.clone(), json!({"type": "directory", "oid": oid, "size": 0, "path": path}));
                if !flag("recursive") {
                    break;
                }
            }
            if flag("recursive") || !below.contains('/') {
                let size = file.bytes.len();
                let entry = if file.lfs {
                    let pointer = 120 + size.to_string().len();
                    let lfs = json!({"oid": file.sha256(), "size": size, "pointerSize": pointer});
                    let oid = file.pointer_sha1();
                    json!({"type": "file", "oid": oid, "size": size, "lfs": lfs, "path": file.path})
                } else {
                    json!({"type": "file", "oid": file.git_sha1(), "size": size, "path": file.path})
                };
                entries.insert(file.path.clone(), entry);
            }
        }
        if entries.is_empty() && !dir.is_empty() {
            return refuse(404, Some("EntryNotFound"), &format!("{dir} does not exist on \"{commit}\""));
        }
        let limit = query.get("limit").and_then(|l| l.parse().ok()).unwrap_or(1000).min(self.page);
        let from = query.get("cursor").and_then(|c| hex::decode(c).ok()).and_then(|c| String::from_utf8(c).ok());
        let mut page: Vec<(String, Value)> =
            entries.into_iter().filter(|(path, _)| from.as_ref().is_none_or(|from| path > from)).collect();
        let more = page.len() > limit;
        page.truncate(limit);
        let mut link = vec![];
        if more {
            let cursor = hex::encode(&page.last().unwrap().0);
            let mut kept = url::form_urlencoded::Serializer::new(String::new());
            kept.extend_pairs(query.iter().filter(|(key, _)| *key != "cursor"));
            kept.append_pair("cursor", &cursor);
            let host = headers.get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or("localhost");
            let dir: String = inside.split_terminator('/').map(|name| format!("/{}", encode(name))).collect();
            let next = format!("http://{host}{prefix}/api/models/{repo}/tree/{commit}{dir}?{}", kept.finish());
            link.push(("link", format!("<{next}>; rel=\"next\"")));
        }
        as_json(&Value::Array(page.into_iter().map(|(_, entry)| entry).collect()), link)
    }

    fn resolve(&self, prefix: &str, repo: &str, rest: &[String]) -> Response {
        let [revision, path @ ..] = rest else { return refuse(404, Some("EntryNotFound"), "Entry not found") };
        let commit = match self.commit(repo, revision) {
            Ok(commit) => commit,
            Err(response) => return *response,
        };
        let path = path.join("/");
        let Some(file) = self.repos[repo].commits[&commit].iter().find(|f| f.path == path) else {
            return refuse(404, Some("EntryNotFound"), "Entry not found");
        };
        if !file.lfs {
            let encoded: String = path.split('/').map(|name| format!("/{}", encode(name))).collect();
            let location = format!("{prefix}/api/resolve-cache/models/{repo}/{commit}{encoded}?etag=x");
            let headers = vec![("location", location), ("x-repo-commit", commit)];
            return plain(StatusCode::TEMPORARY_REDIRECT, headers, "");
        }
        let (sha256, size) = (file.sha256(), file.bytes.len());
        let headers = vec![
            (
                "location",
                format!("{}/repos/{sha256}?Expires=3600&Signature={}&Key-Pair-Id=K", self.cdn, self.signature),
            ),
            ("x-repo-commit", commit),
            ("x-linked-etag", format!("\"{sha256}\"")),
            ("x-linked-size", size.to_string()),
            ("etag", format!("\"{}\"", file.pointer_sha1())),
            ("accept-ranges", "bytes".into()),
        ];
        plain(StatusCode::FOUND, headers, "Found. Redirecting")
    }
}

async fn answer_cdn(State(shared): State<Arc<Shared>>, request: Request) -> Response {
    let raw = request.uri().path_and_query().map(|p| p.as_str()).unwrap_or("/").to_owned();
    let (method, headers) = (request.method().clone(), request.headers().clone());
    let mut inner = shared.inner.lock().unwrap();
    inner.cdn_requests.push(Seen { method: method.to_string(), path: raw.clone(), headers: headers.clone() });
    if let Some(canned) = inner.canned(&raw) {
        return canned;
    }
    if !raw.contains(&format!("&Signature={}&", inner.signature)) {
        let body = "<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code><Message>Access denied</Message></Error>";
        return plain(StatusCode::FORBIDDEN, vec![("content-type", "text/xml".into())], body);
    }
    let sha256 = raw.trim_start_matches("/repos/").split('?').next().unwrap_or_default().to_owned();
    let Some(bytes) = inner.blobs.get(&sha256).cloned() else { return plain(StatusCode::NOT_FOUND, vec![], "") };
    inner.send(&sha256, &bytes, &headers, &method, vec![("etag", format!("\"{}\"", &sha256[..32]))])
}

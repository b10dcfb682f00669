//! `hf://`: model repositories of the Hugging Face Hub or a mirror of it.
//!
//! The control plane (what does `main` mean, whose token is this, which revisions are there) is asked through `hf-hub`;
//! listings and bytes go through our own client, because only there are checksums, Retry-After and redirects in our
//! hands. `docs/decisions/0002-hf-hub-for-the-control-plane.md` has the reasons.

use std::collections::HashMap;
use std::io::Read;
use std::sync::{Arc, Mutex, PoisonError};

use hf_hub::{HFClient, HFError};
use serde::Deserialize;
use tokio::time::timeout;
use url::Url;

use super::gate::authority;
use super::http::{Client, Credential, Follow, Missing, Request, Response, quoted};
use super::*;
use crate::model::{Checksum, ListingBuilder, RelPath};

/// Where the Hub is, unless HF_ENDPOINT says otherwise.
const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
/// Entries asked for in one page of a listing; the most the Hub gives.
const PAGE_ENTRIES: &str = "1000";
/// Longest page of a listing, in bytes: a thousand entries with the longest names.
const MAX_PAGE_BYTES: usize = 8 << 20;
/// Most pages of one listing: what a repository with the most files and as many directories needs, ten times.
const MAX_PAGES: usize = 2000;
/// Most revisions an error names.
const MAX_KNOWN_REVISIONS: usize = 10;
/// Most signed URLs kept; each has at most `http::MAX_LOCATION_BYTES`.
const MAX_LOCATED_FILES: usize = 256;
/// Longest token file, in bytes.
const MAX_TOKEN_FILE_BYTES: u64 = 16 * 1024;
/// Most characters of the name of an account.
const MAX_ACCOUNT_CHARS: usize = 96;
/// Longest wait for one answer that `hf-hub` reads; it has no limit of its own.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest wait for a connection of `hf-hub`.
const CONTROL_CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// One reference to a repository. Holds a token, so it has no `Debug`.
pub(super) struct Hub {
    reference: ModelRef,
    repo: String,
    revision: String,
    endpoint: Url,
    http: Client,
    control: HFClient,
    token: Option<Token>,
    /// The variable that forbids requests.
    offline: Option<&'static str>,
    /// How to configure a token.
    sign_in: String,
    /// Where the bytes of files in LFS are, by locator. One request asks for all ranges of a file.
    located: Mutex<HashMap<String, Arc<tokio::sync::Mutex<Option<Place>>>>>,
}

struct Token {
    credential: Credential,
    /// The variable or file it was found in.
    origin: String,
}

/// Where the bytes of a file are.
#[derive(Clone, PartialEq, Eq)]
enum Place {
    /// On the Hub itself: the resolve route, with the token.
    Hub,
    /// At a signed URL of another host, without the token. A secret while it lasts.
    Signed(Url),
}

/// What an error of the Hub says of itself.
struct Refusal {
    status: u16,
    /// `X-Error-Code`
    code: Option<String>,
    /// `X-Error-Message`
    message: Option<String>,
}

/// One entry of a page of `GET /api/models/{repo}/tree/{commit}`.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    size: u64,
    #[serde(default)]
    oid: String,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    /// SHA-256 of the content. `hf-hub` loses it: it looks for `sha256`.
    oid: String,
    size: u64,
}

impl Hub {
    /// Reads the environment as the Python client does: HF_ENDPOINT, HF_TOKEN, HF_TOKEN_PATH, HF_HOME, XDG_CACHE_HOME,
    /// HF_HUB_DISABLE_IMPLICIT_TOKEN, HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE. The token file is read now, so a rotated
    /// token counts from the next source on.
    pub(super) fn new(reference: &ModelRef, http: &Client, environment: &Environment) -> Result<Hub, Error> {
        let what = reference.to_string();
        let misconfigured = |detail: String| Error::Misconfigured { what: what.clone(), detail };
        let Location::Hub { repo, revision, .. } = reference.location() else {
            return Err(misconfigured("it is not a reference to a Hub".into()));
        };
        let endpoint = endpoint(environment).map_err(misconfigured)?;
        let token = token(environment).map_err(misconfigured)?;
        let control = control(&endpoint, token.as_ref().map(|(text, _)| text.as_str())).map_err(misconfigured)?;
        let token = match token {
            None => None,
            Some((text, origin)) => {
                let credential = Credential::bearer(&text, &origin)
                    .ok_or_else(|| misconfigured(format!("the token in {origin} has characters no token has")))?;
                Some(Token { credential, origin })
            }
        };
        let secret = "set HF_TOKEN (`kubectl -n larder create secret generic larder-token --from-literal=HF_TOKEN=…`)";
        let sign_in = match token_disabled(environment) {
            true => "check the spelling; HF_HUB_DISABLE_IMPLICIT_TOKEN is set, so no token is sent: unset it".into(),
            false => format!("check the spelling; if it is private or gated, {secret}"),
        };
        Ok(Hub {
            reference: reference.clone(),
            repo: repo.clone(),
            revision: revision.clone(),
            endpoint,
            http: http.clone(),
            control,
            token,
            offline: ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find(|name| environment.flag(name)),
            sign_in,
            located: Mutex::default(),
        })
    }

    /// `{endpoint}/{names…}`, each name encoded as one segment.
    fn url<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> Url {
        let mut url = self.endpoint.clone();
        // `endpoint` has a host, so it has path segments.
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(names);
        }
        url
    }

    /// `{endpoint}/api/models/{repo}/{names…}`
    fn api<'a>(&'a self, names: impl IntoIterator<Item = &'a str>) -> Url {
        self.url(["api", "models"].into_iter().chain(self.repo.split('/')).chain(names))
    }

    fn request(&self, url: Url, what: String) -> Request {
        Request {
            credential: self.token.as_ref().map(|token| token.credential.clone()),
            sign_in: self.sign_in.clone(),
            ..Request::get(url, what)
        }
    }

    fn what(&self) -> String {
        self.reference.to_string()
    }

    fn protocol(&self, detail: String) -> Error {
        Error::Protocol { what: self.what(), detail }
    }

    /// The page on which a person sees the repository.
    fn page(&self) -> String {
        self.url(self.repo.split('/')).to_string()
    }

    /// Asks for the revision's commit, and whether the repository is gated.
    async fn commit(&self) -> Result<(String, bool), Error> {
        let host = authority(&self.endpoint);
        self.http.gate().wait(&host).await;
        let (owner, name) = hf_hub::split_id(&self.repo);
        let repo = self.control.model(owner, name);
        // Without `expand` the answer names every file, and `hf-hub` reads answers whole.
        let fields = vec!["sha".to_owned(), "gated".to_owned()];
        let info = repo.info().revision(self.revision.as_str()).expand(fields).send();
        let (sha, gated) = match timeout(CONTROL_TIMEOUT, info).await {
            Ok(Ok(info)) => (info.sha, info.gated.is_some_and(|gated| gated != false)),
            Ok(Err(
                HFError::AuthRequired { context }
                | HFError::Forbidden { context }
                | HFError::RepoNotFound { context: Some(context), .. }
                | HFError::RevisionNotFound { context: Some(context), .. },
            )) => {
                let status = context.status.as_u16();
                let refusal = Refusal { status, code: context.error_code, message: context.server_message };
                return Err(self.refused(self.what(), refusal).await);
            }
            Ok(Err(HFError::RateLimited { retry_after: Some(wait), .. })) => {
                let wait = wait.min(MAX_RETRY_AFTER);
                self.http.gate().note(&host, wait);
                return Err(Error::RateLimited { what: self.what(), host, retry_after: Some(wait) });
            }
            // What is left has lost what a person needs: which step of the connection failed, the date in Retry-After,
            // the RateLimit header. So the same is asked once more by the client that reads them.
            Ok(Err(_)) | Err(_) => self.commit_again().await?,
        };
        match sha {
            Some(sha) if sha.len() == 40 && sha.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) => {
                Ok((sha, gated))
            }
            Some(sha) => Err(self.protocol(format!("the Hub names the commit {}", quoted(&sha)))),
            None => Err(self.protocol("the Hub names no commit".into())),
        }
    }

    async fn commit_again(&self) -> Result<(Option<String>, bool), Error> {
        #[derive(Deserialize)]
        struct Info {
            sha: Option<String>,
            gated: Option<serde_json::Value>,
        }
        let mut url = self.api(["revision", self.revision.as_str()]);
        url.set_query(Some("expand=sha&expand=gated"));
        let response = self.http.send(self.request(url, self.what())).await?;
        let body = self.accept(response, self.what()).await?.bytes(MAX_PAGE_BYTES).await?;
        let info: Info = serde_json::from_slice(&body)
            .map_err(|e| self.protocol(format!("the Hub's answer about the revision cannot be read: {e}")))?;
        Ok((info.sha, info.gated.is_some_and(|gated| gated != false)))
    }

    /// Finds out before the first byte is reserved whether the files of a gated repository will be given: the Hub lists
    /// them to everybody.
    async fn check_gate(&self) -> Result<(), Error> {
        let response = self.http.send(self.request(self.api(["auth-check"]), self.what())).await?;
        match response.status().as_u16() {
            401 | 403 => Err(self.refused(self.what(), Refusal::of(&response)).await),
            // A mirror without this route says so at the first file.
            _ => Ok(()),
        }
    }

    /// Every page of the listing, into `listing`; gives the number of files before the selection.
    async fn list(&self, commit: &str, listing: &mut ListingBuilder) -> Result<usize, Error> {
        let subdir = self.reference.subdir();
        let mut url = self.api(["tree", commit].into_iter().chain(subdir.into_iter().flat_map(RelPath::components)));
        url.set_query(Some(&format!("recursive=true&expand=false&limit={PAGE_ENTRIES}")));
        let refuse = |why| Error::Listing { what: self.what(), why };
        let mut files = 0;
        for _ in 0..MAX_PAGES {
            let response = self.http.send(self.request(url.clone(), self.what())).await?;
            if response.status().as_u16() == 404
                && let Some(dir) = subdir
                && !Refusal::of(&response).is("RepoNotFound")
            {
                let detail = format!("commit {commit} has no directory `{dir}`");
                return Err(Error::RepoNotFound { what: self.what(), detail });
            }
            let response = self.accept(response, self.what()).await?;
            let next = response.headers().get_all("link").iter().filter_map(|v| v.to_str().ok()).find_map(next_page);
            let next = next.map(|next| response.url().join(next));
            let body = response.bytes(MAX_PAGE_BYTES).await?;
            let entries: Vec<Entry> = serde_json::from_slice(&body)
                .map_err(|e| self.protocol(format!("a page of the listing cannot be read: {e}")))?;
            for entry in entries.into_iter().filter(|entry| entry.kind == "file") {
                files += 1;
                let path = RelPath::new(&entry.path).map_err(|why| refuse(why.into()))?;
                if self.reference.takes(&path) {
                    listing.push(self.listed(commit, path, entry)?).map_err(refuse)?;
                }
            }
            match next {
                None => return Ok(files),
                // Only the query is taken: a mirror may pass on links to the Hub itself, which must not see our token.
                Some(Ok(next)) if next.query().is_some() && next.query() != url.query() => url.set_query(next.query()),
                Some(_) => return Err(self.protocol("the link to the next page of the listing leads nowhere".into())),
            }
        }
        Err(self.protocol(format!("the listing has more than {MAX_PAGES} pages")))
    }

    fn listed(&self, commit: &str, path: RelPath, entry: Entry) -> Result<ListedFile, Error> {
        let (claim, size) = match &entry.lfs {
            Some(lfs) => (format!("sha256:{}", lfs.oid), lfs.size),
            None => (format!("git-sha1:{}", entry.oid), entry.size),
        };
        let checksum: Checksum =
            claim.parse().map_err(|e| self.protocol(format!("of {path:?} the listing says {e}")))?;
        let locator = format!("{commit}/{path}");
        Ok(ListedFile { path, size, checksum: Some(checksum), pin: None, locator })
    }

    /// 2xx passes, the rest is what the Hub means by it.
    async fn accept(&self, response: Response, what: String) -> Result<Response, Error> {
        match response.status().as_u16() {
            401 | 403 | 404 => Err(self.refused(what, Refusal::of(&response)).await),
            _ => response.accept().await,
        }
    }

    /// What a refusal means. The Hub says 401 for what is private, gated or missing, so more may have to be asked.
    async fn refused(&self, what: String, refusal: Refusal) -> Error {
        let detail = refusal.detail();
        match (refusal.status, &self.token) {
            (403, _) if refusal.message.as_deref() == Some("Access to this resource is disabled.") => {
                Error::RepoNotFound { what, detail }
            }
            (404, _) => self.not_found(what, refusal).await,
            (_, None) if refusal.is("GatedRepo") => {
                let action = format!("ask for access at {}, then {}", self.page(), self.sign_in);
                Error::AuthMissing { what, action }
            }
            (_, None) => Error::AuthMissing { what, action: self.sign_in.clone() },
            (401, Some(token)) if !self.token_works().await => {
                Error::AuthInvalid { what, origin: token.origin.clone(), detail }
            }
            (401, Some(token)) if !refusal.is("GatedRepo") => {
                let origin = &token.origin;
                let detail = format!("it does not exist, or is private and the token from {origin} may not see it");
                Error::RepoNotFound { what, detail }
            }
            (_, Some(token)) if refusal.is("GatedRepo") => {
                let account = self.account().await;
                let account =
                    account.map_or_else(|| format!("of the token from {}", token.origin), |name| format!("`{name}`"));
                Error::LicenceNotAccepted { what, account, url: self.page() }
            }
            (_, Some(token)) => Error::AuthInvalid { what, origin: token.origin.clone(), detail },
        }
    }

    /// Whether the Hub knows whose the token is. When nobody can say, no: the Hub has just refused it.
    async fn token_works(&self) -> bool {
        match timeout(CONTROL_TIMEOUT, self.control.whoami().send()).await {
            Ok(Ok(_)) => true,
            // An account that `hf-hub` cannot read is an account.
            Ok(Err(HFError::Request { source, .. })) => source.is_decode(),
            _ => false,
        }
    }

    /// Whose the token is, if the Hub says so.
    async fn account(&self) -> Option<String> {
        let user = timeout(CONTROL_TIMEOUT, self.control.whoami().send()).await.ok()?.ok()?;
        Some(user.username.chars().take(MAX_ACCOUNT_CHARS).collect())
    }

    async fn not_found(&self, what: String, refusal: Refusal) -> Error {
        let missing = |what, detail: String| Error::RepoNotFound { what, detail };
        if refusal.is("EntryNotFound") {
            return Error::FileNotFound { what };
        }
        if refusal.is("RepoNotFound") {
            return missing(what, format!("`{}` has no such repository", authority(&self.endpoint)));
        }
        let (owner, name) = hf_hub::split_id(&self.repo);
        let repo = self.control.model(owner, name);
        match timeout(CONTROL_TIMEOUT, repo.list_refs().send()).await {
            Ok(Ok(refs)) => {
                let names = refs.branches.into_iter().chain(refs.tags).map(|r| r.name);
                let known = names.filter(|name| RelPath::new(name).is_ok()).take(MAX_KNOWN_REVISIONS).collect();
                Error::RevisionNotFound { what: format!("hf://{}", self.repo), revision: self.revision.clone(), known }
            }
            _ if refusal.is("RevisionNotFound") => Error::RevisionNotFound {
                what: format!("hf://{}", self.repo),
                revision: self.revision.clone(),
                known: Vec::new(),
            },
            // A mirror that does not say what is missing, and has no revisions of it: the repository is.
            _ => missing(what, refusal.detail()),
        }
    }

    /// The resolve route of a file, and what an error calls it.
    fn file_request(&self, file: &ListedFile) -> Result<(Request, String), Error> {
        let what = format!("hf://{}/{}", self.repo, file.path);
        let (commit, path) = file.locator.split_once('/').ok_or_else(|| Error::Protocol {
            what: what.clone(),
            detail: "the listing is not of this source".into(),
        })?;
        let names = self.repo.split('/').chain(["resolve", commit]).chain(path.split('/'));
        let mut request = self.request(self.url(names), what);
        request.missing = Missing::File;
        Ok((request, commit.to_owned()))
    }

    /// Where the bytes of a file in LFS are. `stale` is the place that has just not worked.
    async fn locate(&self, file: &ListedFile, stale: Option<&Place>) -> Result<Place, Error> {
        let cell = {
            let mut located = self.located.lock().unwrap_or_else(PoisonError::into_inner);
            if located.len() >= MAX_LOCATED_FILES && !located.contains_key(&file.locator) {
                located.clear();
            }
            located.entry(file.locator.clone()).or_default().clone()
        };
        // Held over the request, so that parallel ranges of one file ask once.
        let mut place = cell.lock().await;
        if let Some(known) = place.as_ref().filter(|known| Some(*known) != stale) {
            return Ok(known.clone());
        }
        *place = None;
        let found = self.ask_place(file).await?;
        Ok(place.insert(found).clone())
    }

    async fn ask_place(&self, file: &ListedFile) -> Result<Place, Error> {
        let (mut request, commit) = self.file_request(file)?;
        request.method = reqwest::Method::HEAD;
        request.follow = Follow::SameOrigin;
        let what = request.what.clone();
        let response = self.http.send(request).await?;
        let redirect = response.redirect().cloned();
        let response = if redirect.is_none() { self.accept(response, what.clone()).await? } else { response };
        let changed = |began: String, now: &str| Err(Error::Changed { what: what.clone(), began, now: quoted(now) });
        if let Some(now) = response.header("x-repo-commit").filter(|now| *now != commit) {
            return changed(format!("of commit {commit}"), now);
        }
        if let Some(now) = response.header("x-linked-size").filter(|now| now.parse() != Ok(file.size)) {
            return changed(format!("{} bytes", file.size), now);
        }
        Ok(redirect.map_or(Place::Hub, Place::Signed))
    }

    /// Opens a range with one request that follows redirects; the token stays on the Hub.
    async fn open_at_hub(&self, file: &ListedFile, range: Range<u64>) -> Result<Box<dyn RangeReader>, Error> {
        let (request, _) = self.file_request(file)?;
        let error = match self.http.open_range(request, file.size, range, None).await {
            Ok(body) => return Ok(body.bytes),
            Err(error) => error,
        };
        let refused = matches!(error, Error::AuthMissing { .. } | Error::AuthInvalid { .. });
        if !refused && !matches!(error, Error::FileNotFound { .. }) {
            return Err(error);
        }
        // The refusal's headers are gone, so the Hub is asked for the reason. If it has none, the refusal came from the
        // host it redirects to, and no token of ours is meant.
        let place = self.ask_place(file).await?;
        Err(if refused { self.bytes_refused(file, &place) } else { error })
    }

    fn bytes_refused(&self, file: &ListedFile, place: &Place) -> Error {
        let host = if let Place::Signed(url) = place { authority(url) } else { authority(&self.endpoint) };
        let detail = format!("the Hub gives it, but `{host}`, which has the bytes, refuses them");
        Error::Protocol { what: format!("hf://{}/{}", self.repo, file.path), detail }
    }

    async fn open_at(
        &self,
        place: &Place,
        file: &ListedFile,
        range: Range<u64>,
    ) -> Result<Box<dyn RangeReader>, Error> {
        let Place::Signed(url) = place else { return self.open_at_hub(file, range).await };
        let (request, _) = self.file_request(file)?;
        let request = Request { url: url.clone(), credential: None, ..request };
        Ok(self.http.open_range(request, file.size, range, None).await?.bytes)
    }
}

#[async_trait]
impl Source for Hub {
    async fn resolve(&self) -> Result<Listing, Error> {
        if let Some(variable) = self.offline {
            return Err(Error::Offline { what: self.what(), variable });
        }
        let (commit, gated) = self.commit().await?;
        if gated {
            self.check_gate().await?;
        }
        let mut listing = ListingBuilder::new();
        let listed = self.list(&commit, &mut listing).await?;
        let listing = listing.finish(commit).map_err(|why| Error::Listing { what: self.what(), why })?;
        if listing.files().is_empty() {
            return Err(Error::NothingSelected { what: self.what(), listed });
        }
        Ok(listing)
    }

    async fn fetch(&self, file: &ListedFile, range: Range<u64>) -> Result<Box<dyn RangeReader>, Error> {
        if let Some(variable) = self.offline {
            return Err(Error::Offline { what: self.what(), variable });
        }
        // The Hub serves small files itself, and a file that comes in one piece needs no place to be kept.
        if !matches!(file.checksum, Some(Checksum::Sha256(_))) || range == (0..file.size) {
            return self.open_at_hub(file, range).await;
        }
        let place = self.locate(file, None).await?;
        let error = match self.open_at(&place, file, range.clone()).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let refused = matches!(
            error,
            Error::AuthMissing { .. }
                | Error::AuthInvalid { .. }
                | Error::RepoNotFound { .. }
                | Error::FileNotFound { .. }
                | Error::Protocol { .. }
        );
        if place == Place::Hub || !refused {
            return Err(error);
        }
        // A signed URL lasts for minutes to an hour; hosts say that it is over in many ways.
        let place = self.locate(file, Some(&place)).await?;
        self.open_at(&place, file, range).await.map_err(|error| match error {
            Error::AuthMissing { .. } => self.bytes_refused(file, &place),
            error => error,
        })
    }
}

impl Refusal {
    fn of(response: &Response) -> Refusal {
        let header = |name| response.header(name).map(str::to_owned);
        Refusal { status: response.status().as_u16(), code: header("x-error-code"), message: header("x-error-message") }
    }

    fn is(&self, code: &str) -> bool {
        self.code.as_deref() == Some(code)
    }

    /// The Hub's own words.
    fn detail(&self) -> String {
        match &self.message {
            Some(message) => format!("the Hub answered {}: {}", self.status, quoted(message)),
            None => format!("the Hub answered {}", self.status),
        }
    }
}

/// The target of `rel="next"` in a Link header.
fn next_page(link: &str) -> Option<&str> {
    link.split(',').find_map(|one| {
        let (target, parameters) = one.trim().strip_prefix('<')?.split_once('>')?;
        let next = parameters.split(';').any(|p| matches!(p.trim(), "rel=\"next\"" | "rel=next"));
        next.then_some(target)
    })
}

fn endpoint(environment: &Environment) -> Result<Url, String> {
    let text = environment.get("HF_ENDPOINT").map_or(DEFAULT_ENDPOINT, str::trim).trim_end_matches('/');
    let url = Url::parse(text).map_err(|e| format!("HF_ENDPOINT is not a URL: {e}"))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err("HF_ENDPOINT does not begin with https:// or http://".into());
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("HF_ENDPOINT carries a user or a password; set HF_TOKEN instead".into());
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err("HF_ENDPOINT has a query or a fragment".into());
    }
    Ok(url)
}

fn token_disabled(environment: &Environment) -> bool {
    environment.flag("HF_HUB_DISABLE_IMPLICIT_TOKEN")
}

/// The token, trimmed, and where it was found.
fn token(environment: &Environment) -> Result<Option<(String, String)>, String> {
    if token_disabled(environment) {
        return Ok(None);
    }
    for variable in ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"] {
        if let Some(token) = environment.get(variable).map(str::trim).filter(|token| !token.is_empty()) {
            return Ok(Some((token.to_owned(), environment.origin(variable))));
        }
    }
    let home = environment.get("HOME").unwrap_or_default();
    let expanded =
        |path: &str| path.strip_prefix("~/").map_or_else(|| path.to_owned(), |rest| format!("{home}/{rest}"));
    let named = environment.get("HF_TOKEN_PATH");
    let path = match (named, environment.get("HF_HOME"), environment.get("XDG_CACHE_HOME")) {
        (Some(path), _, _) => expanded(path),
        (None, Some(home), _) => format!("{}/token", expanded(home)),
        (None, None, Some(cache)) => format!("{}/huggingface/token", expanded(cache)),
        (None, None, None) => format!("{home}/.cache/huggingface/token"),
    };
    let mut text = String::new();
    let read = std::fs::File::open(&path).and_then(|file| file.take(MAX_TOKEN_FILE_BYTES).read_to_string(&mut text));
    match read {
        Ok(_) if text.trim().is_empty() => Ok(None),
        Ok(_) => Ok(Some((text.trim().to_owned(), format!("`{path}`")))),
        // An optional secret that is not mounted is no mistake; a file that was named and cannot be read is one.
        Err(e) if named.is_some() && e.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("the token file `{path}` of HF_TOKEN_PATH cannot be read: {e}"))
        }
        Err(_) => Ok(None),
    }
}

/// `hf-hub`, kept to one attempt (retries are [`RetryPolicy`]'s), to our limits of time, and to the endpoint's origin.
fn control(endpoint: &Url, token: Option<&str>) -> Result<HFClient, String> {
    let same_origin = reqwest::redirect::Policy::custom(|attempt| {
        let began_at = attempt.previous().first().map(Url::origin);
        if began_at == Some(attempt.url().origin()) && attempt.previous().len() <= http::MAX_REDIRECTS {
            attempt.follow()
        } else {
            attempt.stop()
        }
    });
    let client = reqwest::Client::builder()
        .user_agent(concat!("larder/", env!("CARGO_PKG_VERSION")))
        .redirect(same_origin)
        .referer(false)
        .connect_timeout(CONTROL_CONNECT_TIMEOUT)
        .timeout(CONTROL_TIMEOUT)
        .build()
        .map_err(|e| e.to_string())?;
    HFClient::builder()
        .endpoint(endpoint.as_str().trim_end_matches('/'))
        // Without one, `hf-hub` looks for a token in the process itself. What cannot be a header is not sent.
        .token(token.unwrap_or("\n"))
        .client(client)
        .cache_enabled(false)
        .retry_max_attempts(0)
        .build()
        .map_err(|e| e.to_string())
}

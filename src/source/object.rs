//! `s3://`, `gs://` and `az://` through `object_store`: its signatures, identities, listing and ranged reads.
//!
//! Three of its habits are switched off, because they are decided elsewhere: it does not retry and does not resume bodies
//! ([`super::retry`] does, and knows when to stop), and it follows no redirect ([`connector`]).

mod connector;
mod setup;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt};

use super::*;
use crate::model::{ListingBuilder, MAX_LISTED_FILES, RelPath};
use connector::{Apart, Cause, Refusal};
use setup::Place;

/// Most HEAD requests in flight while a listing is completed.
const MAX_HEADS: usize = 16;

/// Longest text of another program that goes into an error, in characters.
const MAX_DETAIL_CHARS: usize = 200;

/// A directory, or a single object, of a bucket.
pub(super) struct Bucket {
    reference: ModelRef,
    bucket: String,
    prefix: Option<Path>,
    place: Place,
    stall_timeout: Duration,
}

/// An object of a listing before it becomes a [`ListedFile`].
struct Listed {
    key: Path,
    size: u64,
    pin: Option<String>,
}

/// Which question an answer belongs to: the same 404 means different things.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asked {
    List,
    Object,
}

impl Bucket {
    /// Prepares the store of a bucket's reference. No request is made.
    pub(super) fn new(
        reference: &ModelRef,
        config: &SourceConfig,
        gate: Arc<HostGate>,
        environment: &Environment,
    ) -> Result<Bucket, Error> {
        let Location::Bucket { scheme, bucket, prefix } = reference.location() else {
            unreachable!("`Sources::open` gives only buckets")
        };
        let misconfigured = |detail: String| Error::Misconfigured { what: reference.to_string(), detail };
        let place = Place::new(*scheme, bucket, config, gate, environment).map_err(misconfigured)?;
        let prefix = match prefix {
            Some(prefix) => Some(Path::parse(prefix.as_str()).map_err(|e| misconfigured(shortened(&e.to_string())))?),
            None => None,
        };
        Ok(Bucket {
            reference: reference.clone(),
            bucket: bucket.clone(),
            prefix,
            place,
            stall_timeout: config.stall_timeout,
        })
    }

    /// The object as a person writes it.
    fn name_of(&self, key: &Path) -> String {
        format!("{}://{}/{key}", self.reference.scheme().text(), self.bucket)
    }

    /// What stands before the key in a locator. It has the endpoint, so that objects of the same name on two servers are
    /// never taken for each other.
    fn locator_base(&self) -> String {
        format!("{}+{}/{}/", self.reference.scheme().text(), self.place.endpoint, self.bucket)
    }

    fn error(&self, what: &str, asked: Asked, error: &object_store::Error) -> Error {
        let what = what.to_owned();
        if let object_store::Error::InvalidPath { source } = error
            && let Some(why) = unsafe_name(source)
        {
            return Error::Listing { what, why };
        }
        match connector::cause_of(error) {
            Some(Cause::Refused(refusal)) => self.refused(what, asked, refusal),
            Some(Cause::Unreachable { host, step, detail }) => {
                Error::Unreachable { host: host.clone(), step: *step, detail: detail.clone() }
            }
            Some(cause @ Cause::NotAListing { .. }) => Error::Protocol { what, detail: cause.to_string() },
            Some(Cause::NoCredential { host, detail }) => match self.place.origin() {
                Some(origin) => Error::AuthInvalid { what, origin, detail: format!("{host}: {detail}") },
                None => Error::AuthMissing { what, action: self.place.advice.to_owned() },
            },
            None => match connector::broken_body(error) {
                Some(step) => {
                    Error::Unreachable { host: self.place.host.clone(), step, detail: shortened(&root_of(error)) }
                }
                None => Error::Protocol { what, detail: shortened(&root_of(error)) },
            },
        }
    }

    fn refused(&self, what: String, asked: Asked, refusal: &Refusal) -> Error {
        let Refusal { host, status, code, region, location, retry_after } = refusal;
        let code_is = |codes: &[&str]| code.as_deref().is_some_and(|code| codes.contains(&code));
        let said = match code {
            Some(code) => format!("{status} {code}"),
            None => status.to_string(),
        };
        // The answer to a HEAD has no code.
        let malformed = code.is_none() || code_is(&["AuthorizationHeaderMalformed"]);
        let elsewhere = matches!(status, 300..400) || (*status == 400 && malformed);
        if elsewhere && let Some(region) = region {
            let detail = format!(
                "bucket `{}` is in region `{region}`, which is not asked: set AWS_REGION={region}",
                self.bucket
            );
            return Error::Misconfigured { what, detail };
        }
        let expired = ["ExpiredToken", "InvalidToken", "TokenRefreshRequired", "PublicAccessNotPermitted"];
        match *status {
            300..400 => Error::Redirect {
                what,
                host: location.clone().unwrap_or_else(|| "nowhere".into()),
                why: "a bucket's endpoint answers itself, and credentials are not carried elsewhere",
            },
            401 | 403 => self.denied(what, said),
            400 | 409 if code_is(&expired) => self.denied(what, said),
            404 if asked == Asked::List => Error::RepoNotFound {
                what,
                detail: format!("there is no bucket `{}` at `{}` ({said})", self.bucket, self.place.host),
            },
            404 => Error::FileNotFound { what },
            412 | 416 => {
                Error::Changed { what, began: "what the listing says".into(), now: format!("another version ({said})") }
            }
            429 => Error::RateLimited { what, host: host.clone(), retry_after: *retry_after },
            503 if retry_after.is_some() || code_is(&["SlowDown", "ServerBusy"]) => {
                Error::RateLimited { what, host: host.clone(), retry_after: *retry_after }
            }
            408 | 500..600 => Error::Server { what, host: host.clone(), status: *status },
            _ => Error::Protocol { what, detail: format!("`{host}` answered {said}") },
        }
    }

    fn denied(&self, what: String, detail: String) -> Error {
        match self.place.origin() {
            Some(origin) => Error::AuthInvalid { what, origin, detail },
            None => Error::AuthMissing { what, action: self.place.advice.to_owned() },
        }
    }

    fn not_listable(&self, why: ListingError) -> Error {
        Error::Listing { what: self.reference.to_string(), why }
    }

    /// Every object below the prefix, by its path relative to it.
    async fn list(&self) -> Result<BTreeMap<String, Listed>, Error> {
        let what = self.reference.to_string();
        let mut found: BTreeMap<String, Listed> = BTreeMap::new();
        let mut objects = self.place.store.list(self.prefix.as_ref());
        while let Some(meta) = objects.try_next().await.map_err(|e| self.error(&what, Asked::List, &e))? {
            let Some(path) = self.relative(&meta.location) else { continue };
            if found.len() == MAX_LISTED_FILES {
                return Err(self.not_listable(ListingError::TooMany));
            }
            let path = RelPath::new(path).map_err(|e| self.not_listable(e.into()))?;
            let entry = Listed { pin: strong(meta.e_tag.as_deref()), size: meta.size, key: meta.location };
            match found.get(path.as_str()) {
                // `dir/` (a marker of 0 bytes) and `dir` are two keys, but one path.
                Some(_) if entry.size == 0 => {}
                Some(other) if other.size > 0 => return Err(self.not_listable(ListingError::Twice(path))),
                _ => {
                    found.insert(path.as_str().to_owned(), entry);
                }
            }
        }
        // What has no bytes and other objects below it is the marker of a directory.
        let markers: Vec<String> = found
            .iter()
            .filter(|(path, entry)| entry.size == 0 && has_children(&found, path))
            .map(|(path, _)| path.clone())
            .collect();
        for marker in markers {
            found.remove(&marker);
        }
        Ok(found)
    }

    /// The key without the prefix; nothing for the marker of the prefix itself.
    fn relative<'a>(&self, key: &'a Path) -> Option<&'a str> {
        let rest = match &self.prefix {
            Some(prefix) => key.as_ref().strip_prefix(prefix.as_ref())?.strip_prefix('/')?,
            None => key.as_ref(),
        };
        (!rest.is_empty()).then_some(rest)
    }

    /// The object that is named by the whole prefix.
    async fn single(&self) -> Result<BTreeMap<String, Listed>, Error> {
        let absent = |detail: String| Error::RepoNotFound { what: self.reference.to_string(), detail };
        let Some(prefix) = &self.prefix else {
            return Err(absent(format!("bucket `{}` has no objects", self.bucket)));
        };
        match self.head(prefix).await {
            Ok(meta) => {
                let name = prefix.filename().unwrap_or(prefix.as_ref()).to_owned();
                let entry = Listed { key: prefix.clone(), size: meta.size, pin: strong(meta.e_tag.as_deref()) };
                Ok(BTreeMap::from([(name, entry)]))
            }
            Err(Error::FileNotFound { .. }) => Err(absent(format!(
                "bucket `{}` is there, but has neither an object `{prefix}` nor anything below `{prefix}/`",
                self.bucket
            ))),
            Err(error) => Err(error),
        }
    }

    async fn head(&self, key: &Path) -> Result<ObjectMeta, Error> {
        self.place.store.head(key).await.map_err(|e| self.error(&self.name_of(key), Asked::Object, &e))
    }

    /// Asks for the object itself where the listing does not say enough: no ETag, or no bytes, which may be an empty file
    /// or the marker of an empty directory (a key with a slash at its end). A marker gives nothing.
    async fn complete(&self, path: String, mut entry: Listed) -> Result<Option<(String, Listed)>, Error> {
        if entry.pin.is_none() || entry.size == 0 {
            match self.head(&entry.key).await {
                Ok(meta) => {
                    entry.size = meta.size;
                    entry.pin = strong(meta.e_tag.as_deref());
                }
                Err(Error::FileNotFound { .. }) if entry.size == 0 => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Ok(Some((path, entry)))
    }
}

#[async_trait]
impl Source for Bucket {
    async fn resolve(&self) -> Result<Listing, Error> {
        let mut found = self.list().await?;
        if found.is_empty() {
            found = self.single().await?;
        }
        let listed = found.len();
        let mut wanted = Vec::new();
        for (path, entry) in found {
            let path = RelPath::new(&path).map_err(|e| self.not_listable(e.into()))?;
            if self.reference.takes(&path) {
                wanted.push((path.as_str().to_owned(), entry));
            }
        }
        if wanted.is_empty() {
            return Err(Error::NothingSelected { what: self.reference.to_string(), listed });
        }
        let base = self.locator_base();
        let mut completed =
            futures::stream::iter(wanted).map(|(path, entry)| self.complete(path, entry)).buffer_unordered(MAX_HEADS);
        let mut listing = ListingBuilder::new();
        let mut files = 0;
        while let Some(file) = completed.try_next().await? {
            let Some((path, entry)) = file else { continue };
            files += 1;
            let path = RelPath::new(&path).map_err(|e| self.not_listable(e.into()))?;
            let locator = format!("{base}{}", entry.key);
            listing
                .push(ListedFile { path, size: entry.size, checksum: None, pin: entry.pin, locator })
                .map_err(|e| self.not_listable(e))?;
        }
        if files == 0 {
            let detail = format!("bucket `{}` has only empty directories there", self.bucket);
            return Err(Error::RepoNotFound { what: self.reference.to_string(), detail });
        }
        listing.finish_by_content().map_err(|e| self.not_listable(e))
    }

    async fn fetch(&self, file: &ListedFile, range: Range<u64>) -> Result<Box<dyn RangeReader>, Error> {
        let foreign = || Error::Protocol {
            what: file.path.to_string(),
            detail: "it was listed by another source; pull again".into(),
        };
        let key = file.locator.strip_prefix(&self.locator_base()).ok_or_else(foreign)?;
        let key = Path::parse(key).map_err(|_| foreign())?;
        let what = self.name_of(&key);
        let options = GetOptions {
            range: Some(GetRange::Bounded(range.clone())),
            if_match: file.pin.clone(),
            ..GetOptions::default()
        };
        let answer = match self.place.store.get_opts(&key, options).await {
            Ok(answer) => answer,
            Err(error) => {
                return Err(match self.error(&what, Asked::Object, &error) {
                    Error::Changed { what, now, .. } => Error::Changed { what, began: version_of(file), now },
                    other => other,
                });
            }
        };
        // Some servers ignore If-Match, so the answer is compared as well.
        let now = strong(answer.meta.e_tag.as_deref());
        if file.pin.is_some() && now.is_none() {
            return Err(Error::Protocol { what, detail: "the listing has an ETag, the answer has none".into() });
        }
        if (file.pin.is_some() && now != file.pin) || answer.meta.size != file.size {
            let now = format!("{} bytes, ETag {}", answer.meta.size, now.as_deref().unwrap_or("none"));
            return Err(Error::Changed { what, began: version_of(file), now });
        }
        if answer.range != range {
            let detail = format!("bytes {range:?} were asked for, bytes {:?} are answered", answer.range);
            return Err(Error::Protocol { what, detail });
        }
        let expected = range.end - range.start;
        if let Some(body) = answer.extensions.get().and_then(Apart::take) {
            return body.into_reader(what, expected);
        }
        let body =
            Body { chunks: answer.into_stream(), what, expected, got: 0, stall_seconds: self.stall_timeout.as_secs() };
        Ok(Pieces::of(futures::stream::try_unfold(body, Body::next)))
    }
}

/// A body that is counted while it flows.
struct Body {
    chunks: futures::stream::BoxStream<'static, object_store::Result<Bytes>>,
    what: String,
    expected: u64,
    got: u64,
    stall_seconds: u64,
}

impl Body {
    async fn next(mut self) -> Result<Option<(Bytes, Body)>, Error> {
        let what = || self.what.clone();
        match self.chunks.next().await {
            Some(Ok(chunk)) => {
                let got = self.got + chunk.len() as u64;
                if got > self.expected {
                    return Err(Error::Overlong { what: what(), expected: self.expected });
                }
                self.got = got;
                Ok(Some((chunk, self)))
            }
            Some(Err(error)) if connector::broken_body(&error) == Some(Step::Timeout) => {
                Err(Error::Stalled { what: what(), seconds: self.stall_seconds })
            }
            None if self.got == self.expected => Ok(None),
            Some(Err(_)) | None => Err(Error::Truncated { what: what(), expected: self.expected, got: self.got }),
        }
    }
}

fn version_of(file: &ListedFile) -> String {
    format!("{} bytes, ETag {}", file.size, file.pin.as_deref().unwrap_or("none"))
}

fn has_children(found: &BTreeMap<String, Listed>, path: &str) -> bool {
    let below = format!("{path}/");
    found.range(below.clone()..).next().is_some_and(|(next, _)| next.starts_with(&below))
}

/// A strong ETag in its quotes, which Azure leaves away when it lists. A weak one does not mark exact bytes.
fn strong(etag: Option<&str>) -> Option<String> {
    let etag = etag?.trim();
    if etag.starts_with("W/") {
        return None;
    }
    let bare = etag.strip_prefix('"').and_then(|e| e.strip_suffix('"')).unwrap_or(etag);
    (!bare.is_empty()).then(|| format!("\"{bare}\""))
}

/// What our own rule says about a key that `object_store` cannot express.
fn unsafe_name(error: &object_store::path::Error) -> Option<ListingError> {
    use object_store::path::Error as PathError;
    let (PathError::EmptySegment { path } | PathError::BadSegment { path, .. }) = error else { return None };
    RelPath::new(path).err().map(ListingError::from)
}

/// The innermost cause: the outer ones repeat it, and name URLs.
fn root_of(error: &dyn std::error::Error) -> String {
    let mut root = error;
    while let Some(source) = root.source() {
        root = source;
    }
    root.to_string()
}

fn shortened(text: &str) -> String {
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(MAX_DETAIL_CHARS).collect();
    line
}

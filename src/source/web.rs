//! `https://` and `http://`: one file, or a directory that a `larder.json` describes (docs/listing.md).
//!
//! No credential is ever sent. A file is pinned by its strong ETag or an old enough Last-Modified; one that the listing
//! gives a SHA-256 is pinned by the first answer to it, so that a change in the middle is noticed at once and not only
//! when all its bytes are here.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use futures::{StreamExt, TryStreamExt};
use reqwest::header;
use serde::Deserialize;
use serde::de::{IgnoredAny, SeqAccess, Visitor};
use url::Url;

use super::http::{Client, Missing, Request, Response, permitted, quoted};
use super::*;
use crate::model::{Checksum, ListingBuilder, MAX_LISTED_FILES, RelPath};

/// Name of the listing inside its directory.
const LISTING_NAME: &str = "larder.json";
/// Longest listing: 100,000 files with 300 bytes each.
const MAX_LISTING_BYTES: usize = 32 << 20;
/// Most files asked about at the same time.
const PARALLEL_PROBES: usize = 8;
/// What to do about a refusal.
const SIGN_IN: &str = "larder sends no credential to https:// sources: use an address that needs none, or the hf://, \
                       s3://, gs:// or az:// source that holds the model";

/// A file or a directory on a web server.
pub(super) struct Web {
    reference: ModelRef,
    url: Url,
    http: Client,
    /// The mark of the first answer, by address, of files that the listing does not pin.
    first_marks: Mutex<HashMap<String, String>>,
}

/// What a server says about a file without sending it.
struct Probe {
    size: u64,
    mark: Option<String>,
}

/// `larder.json`. Unknown fields are left for later versions.
#[derive(Deserialize)]
struct Directory {
    #[serde(deserialize_with = "bounded")]
    files: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    path: String,
    size: u64,
    sha256: Option<String>,
    url: Option<String>,
}

impl Web {
    /// The source of an `https://` or `http://` reference.
    pub(super) fn new(reference: &ModelRef, http: &Client) -> Web {
        let Location::Web { url } = reference.location() else { unreachable!("Sources::open matched the location") };
        let (reference, url, http) = (reference.clone(), url.clone(), http.clone());
        Web { reference, url, http, first_marks: Mutex::default() }
    }

    async fn resolve_file(&self) -> Result<Listing, Error> {
        let what = self.reference.to_string();
        let name = self.url.path().rsplit('/').next().unwrap_or_default();
        let name = decoded(name).ok_or_else(|| Error::Protocol {
            what: what.clone(),
            detail: "the last part of the address is not UTF-8".into(),
        })?;
        let path = RelPath::new(&name).map_err(|why| Error::Listing { what: what.clone(), why: why.into() })?;
        if !self.reference.takes(&path) {
            return Err(Error::NothingSelected { what, listed: 1 });
        }
        let Probe { size, mark } = self.probe(&self.url, &what, Missing::Repo).await?;
        let file = ListedFile { path, size, checksum: None, pin: mark, locator: self.url.to_string() };
        self.listing([file])
    }

    async fn resolve_directory(&self) -> Result<Listing, Error> {
        let what = self.reference.to_string();
        let at = self.url.join(LISTING_NAME).expect("a name joins every http address");
        let request = Request { sign_in: SIGN_IN.into(), ..Request::get(at, format!("{}{LISTING_NAME}", self.url)) };
        let body = self.http.send(request).await?.accept().await?.bytes(MAX_LISTING_BYTES).await?;
        let directory: Directory = serde_json::from_slice(&body).map_err(|e| Error::Protocol {
            what: what.clone(),
            detail: format!("its {LISTING_NAME} cannot be read: {}", quoted(&e.to_string())),
        })?;
        drop(body);
        let listed = directory.files.len();
        let mut files = Vec::new();
        for entry in directory.files {
            let file = self.file(entry, &what)?;
            if self.reference.takes(&file.path) {
                files.push(file);
            }
        }
        if files.is_empty() {
            return Err(Error::NothingSelected { what, listed });
        }
        // Refused before anything is asked about its files.
        let listing = self.listing(files)?;
        if listing.files().iter().all(|file| file.checksum.is_some()) {
            return Ok(listing);
        }
        let pinned = futures::stream::iter(listing.files().to_vec()).map(|file| self.pinned(file));
        self.listing(pinned.buffer_unordered(PARALLEL_PROBES).try_collect::<Vec<_>>().await?)
    }

    fn file(&self, entry: Entry, what: &str) -> Result<ListedFile, Error> {
        let path = RelPath::new(&entry.path).map_err(|why| Error::Listing { what: what.into(), why: why.into() })?;
        let checksum = entry.sha256.map(|hex| {
            format!("sha256:{}", hex.to_ascii_lowercase()).parse::<Checksum>().map_err(|_| Error::Protocol {
                what: what.into(),
                detail: format!("the `sha256` of {path:?} in its {LISTING_NAME} is not 64 hexadecimal digits"),
            })
        });
        let url = match &entry.url {
            Some(url) => permitted(&self.url, &self.url, url, what)?,
            None => {
                let mut url = self.url.clone();
                if let Ok(mut segments) = url.path_segments_mut() {
                    segments.pop_if_empty().extend(path.components());
                }
                url
            }
        };
        Ok(ListedFile { path, size: entry.size, checksum: checksum.transpose()?, pin: None, locator: url.into() })
    }

    /// A file with its mark, if it has no checksum by which it would be known.
    async fn pinned(&self, file: ListedFile) -> Result<ListedFile, Error> {
        if file.checksum.is_some() {
            return Ok(file);
        }
        let what = self.what(&file);
        let probe = self.probe(&self.address(&file)?, &what, Missing::File).await?;
        if probe.size != file.size {
            let detail = format!("it has {} bytes, the {LISTING_NAME} says {}", probe.size, file.size);
            return Err(Error::Protocol { what, detail });
        }
        Ok(ListedFile { pin: probe.mark, ..file })
    }

    /// Size and mark of a file, by HEAD, or by a range of one byte where HEAD is refused or says no size.
    async fn probe(&self, url: &Url, what: &str, missing: Missing) -> Result<Probe, Error> {
        let head = Request { missing, sign_in: SIGN_IN.into(), ..Request::head(url.clone(), what) };
        let get = Request { method: reqwest::Method::GET, range: Some(0..1), ..head.clone() };
        let plain = |response: &Response| response.header(header::CONTENT_ENCODING).is_none();
        match self.http.send(head).await {
            Ok(response) if response.status().is_success() && plain(&response) => {
                if let Some(size) = response.content_length() {
                    return Ok(Probe { size, mark: response.mark() });
                }
            }
            Ok(_) | Err(Error::Server { status: 501, .. }) => {}
            Err(e) => return Err(e),
        }
        let response = self.http.send(get).await?;
        let total = response.header(header::CONTENT_RANGE).and_then(|range| range.rsplit('/').next()?.parse().ok());
        let size = match response.status().as_u16() {
            // An empty file has no first byte.
            206 | 416 => total,
            _ => None,
        };
        if let Some(size) = size {
            return Ok(Probe { size, mark: response.mark() });
        }
        let response = response.accept().await?;
        match response.content_length().filter(|_| plain(&response)) {
            Some(size) => Ok(Probe { size, mark: response.mark() }),
            None => Err(Error::Protocol { what: what.into(), detail: "the server does not say how long it is".into() }),
        }
    }

    fn listing(&self, files: impl IntoIterator<Item = ListedFile>) -> Result<Listing, Error> {
        let mut builder = ListingBuilder::new();
        let built =
            files.into_iter().try_for_each(|file| builder.push(file)).and_then(|()| builder.finish_by_content());
        built.map_err(|why| Error::Listing { what: self.reference.to_string(), why })
    }

    fn address(&self, file: &ListedFile) -> Result<Url, Error> {
        file.locator.parse().map_err(|_| Error::FileNotFound { what: self.what(file) })
    }

    /// The file as it stands in errors: never its own address, which a listing may have signed.
    fn what(&self, file: &ListedFile) -> String {
        if self.is_directory() { format!("{}{}", self.url, file.path) } else { self.reference.to_string() }
    }

    fn is_directory(&self) -> bool {
        self.url.path().ends_with('/')
    }
}

#[async_trait]
impl Source for Web {
    async fn resolve(&self) -> Result<Listing, Error> {
        // A new listing is a new beginning: what changed since the last one is what it lists.
        self.first_marks.lock().unwrap_or_else(PoisonError::into_inner).clear();
        if self.is_directory() { self.resolve_directory().await } else { self.resolve_file().await }
    }

    async fn fetch(&self, file: &ListedFile, range: Range<u64>) -> Result<Box<dyn RangeReader>, Error> {
        let what = self.what(file);
        let first_mark = |mark: Option<String>| {
            let mut marks = self.first_marks.lock().unwrap_or_else(PoisonError::into_inner);
            match (marks.get(&file.locator), mark) {
                (Some(known), _) => Some(known.clone()),
                (None, Some(mark)) if marks.len() < MAX_LISTED_FILES => {
                    marks.insert(file.locator.clone(), mark.clone());
                    Some(mark)
                }
                (None, mark) => mark,
            }
        };
        let pin = file.pin.clone().or_else(|| first_mark(None));
        let request = Request {
            missing: Missing::File,
            sign_in: SIGN_IN.into(),
            ..Request::get(self.address(file)?, what.clone())
        };
        let body = self.http.open_range(request, file.size, range, pin.as_deref()).await?;
        if pin.is_none()
            && let Some(now) = body.mark
            && let Some(began) = first_mark(Some(now.clone()))
            && began != now
        {
            // Another range of the file was opened meanwhile, and it was of another version.
            return Err(Error::Changed { what, began, now });
        }
        Ok(body.bytes)
    }
}

/// Reads at most one file more than a listing may have, so that memory stays bounded and the limit is still noticed.
fn bounded<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Vec<Entry>, D::Error> {
    struct Entries;
    impl<'de> Visitor<'de> for Entries {
        type Value = Vec<Entry>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a list of files")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<Entry>, A::Error> {
            let mut entries = Vec::new();
            while entries.len() <= MAX_LISTED_FILES {
                match list.next_element()? {
                    Some(entry) => entries.push(entry),
                    None => return Ok(entries),
                }
            }
            while list.next_element::<IgnoredAny>()?.is_some() {}
            Ok(entries)
        }
    }
    deserializer.deserialize_seq(Entries)
}

/// Percent-decoded, if that is UTF-8.
fn decoded(segment: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        match (byte, after) {
            (b'%', [high, low, after @ ..]) if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                bytes.extend(hex::decode([*high, *low]).ok()?);
                rest = after;
            }
            _ => {
                bytes.push(byte);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_decoded_once() {
        assert_eq!(decoded("a%20b+c%2Bd.bin").as_deref(), Some("a b+c+d.bin"));
        assert_eq!(decoded("%2525%").as_deref(), Some("%25%"));
        assert_eq!(decoded("%ff"), None);
    }

    #[test]
    fn a_listing_is_read_no_further_than_its_limit() {
        let entries = vec![r#"{"path":"a","size":1,"later":true}"#; MAX_LISTED_FILES + 500].join(",");
        let directory: Directory = serde_json::from_str(&format!(r#"{{"later":1,"files":[{entries}]}}"#)).unwrap();
        assert_eq!(directory.files.len(), MAX_LISTED_FILES + 1);
        for bad in
            [r#"{}"#, r#"{"files":[{}]}"#, r#"{"files":[{"path":"a"}]}"#, r#"{"files":[{"path":"a","size":-1}]}"#]
        {
            assert!(serde_json::from_str::<Directory>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_listing_in_the_documentation_is_one() {
        let page = include_str!("../../docs/listing.md");
        let json = page.split("```json").nth(1).unwrap().split("```").next().unwrap();
        let directory: Directory = serde_json::from_str(json).unwrap();
        let reference: ModelRef = "https://models.example/llama/".parse().unwrap();
        let web = Web::new(&reference, &Client::new(&SourceConfig::default()).unwrap());
        let files: Vec<_> = directory.files.into_iter().map(|entry| web.file(entry, "x").unwrap()).collect();
        assert_eq!(files[0].locator, "https://models.example/llama/config.json");
        assert_eq!(files[1].locator, "https://cdn.example.com/llama/1");
        assert!(files[1].checksum.is_some());
    }

    #[test]
    fn addresses_in_a_listing_are_encoded_and_lead_only_to_permitted_places() {
        let reference: ModelRef = "https://models.example/llama/".parse().unwrap();
        let web = Web::new(&reference, &Client::new(&SourceConfig::default()).unwrap());
        let entry = |path: &str, url: Option<&str>| {
            let (path, url) = (path.to_owned(), url.map(str::to_owned));
            web.file(Entry { path, size: 1, sha256: None, url }, "x")
        };
        let encoded = entry("a b/c?d#e%2f..", None).unwrap();
        assert_eq!(encoded.locator, "https://models.example/llama/a%20b/c%3Fd%23e%252f..");
        assert_eq!(entry("a", Some("blobs/1")).unwrap().locator, "https://models.example/llama/blobs/1");
        for bad in ["http://models.example/a", "https://169.254.169.254/", "https://u:p@models.example/", "file:///a"] {
            assert!(matches!(entry("a", Some(bad)), Err(Error::Redirect { .. })), "{bad}");
        }
    }
}

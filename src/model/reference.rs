//! [`ModelRef`]: what somebody asks for.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{PatternError, RelPath, Selection};
use crate::fault::{Code, Diagnose};

/// Where a reference points: the part of it before `://`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Scheme {
    /// A model repository on the Hugging Face Hub or a mirror of it.
    Hf,
    /// Amazon S3 or a server that speaks its protocol.
    S3,
    /// Google Cloud Storage.
    Gs,
    /// Azure Blob Storage; the account comes from the environment.
    Az,
    /// One file, or a directory described by a listing, over TLS.
    Https,
    /// The same without TLS; no credential is ever sent.
    Http,
    /// A directory of this machine.
    File,
}

impl Scheme {
    /// Every scheme, in the order of the documentation.
    pub const ALL: [Scheme; 7] =
        [Scheme::Hf, Scheme::S3, Scheme::Gs, Scheme::Az, Scheme::Https, Scheme::Http, Scheme::File];

    /// The text before `://`.
    pub fn text(self) -> &'static str {
        match self {
            Scheme::Hf => "hf",
            Scheme::S3 => "s3",
            Scheme::Gs => "gs",
            Scheme::Az => "az",
            Scheme::Https => "https",
            Scheme::Http => "http",
            Scheme::File => "file",
        }
    }
}

/// What a reference names, without the selection.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Location {
    /// `hf://org/name@revision/sub/dir`
    Hub {
        /// `org/name`, or `name` for the Hub's oldest models.
        repo: String,
        /// Branch, tag or commit; `main` when none is written.
        revision: String,
        /// The directory asked for, if not the whole repository.
        subdir: Option<RelPath>,
    },
    /// `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`
    Bucket {
        /// One of `S3`, `Gs`, `Az`.
        scheme: Scheme,
        /// The bucket or container.
        bucket: String,
        /// The prefix is a directory: no slash at either end. `None` is the whole bucket.
        prefix: Option<RelPath>,
    },
    /// `https://host/file` or `https://host/directory/` (the slash says which).
    Web {
        /// Normalised by the URL standard: no user, no query, no fragment.
        url: url::Url,
    },
    /// `file:///absolute/directory`
    Directory {
        /// The path without its leading slash.
        path: RelPath,
    },
}

/// What somebody asks for: a location and a selection of its files. Canonical, and never carries a secret.
///
/// The text form is the location, followed by `#include=…&exclude=…` if not everything is selected; it parses back to
/// itself. Longest text: [`ModelRef::MAX_BYTES`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelRef {
    location: Location,
    selection: Selection,
}

/// Why a text is not a reference.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// No scheme, or one that is not supported.
    #[error("cannot read the reference `{shown}`: {why}")]
    Scheme {
        /// The text, shortened.
        shown: String,
        /// What was found.
        why: String,
        /// What was probably meant.
        hint: Option<String>,
    },
    /// The rest breaks the grammar of its scheme.
    #[error("cannot read the reference `{shown}`: {why}")]
    Grammar {
        /// The text, shortened.
        shown: String,
        /// What was found.
        why: String,
        /// How it is written.
        grammar: &'static str,
    },
    /// A pattern cannot be read.
    #[error(transparent)]
    Pattern(#[from] PatternError),
}

impl Diagnose for ReferenceError {
    fn code(&self) -> Code {
        match self {
            ReferenceError::Pattern(e) => e.code(),
            _ => Code::BadReference,
        }
    }

    fn action(&self) -> String {
        let schemes = || Scheme::ALL.map(|s| format!("{}://", s.text())).join(" ");
        match self {
            ReferenceError::Scheme { hint: Some(hint), .. } => {
                format!("did you mean `{hint}`? The schemes are {}", schemes())
            }
            ReferenceError::Scheme { hint: None, .. } => format!("the schemes are {}", schemes()),
            ReferenceError::Grammar { grammar, .. } => format!("write `{grammar}`"),
            ReferenceError::Pattern(e) => e.action(),
        }
    }
}

const HF_GRAMMAR: &str = "hf://org/name[@revision][/sub/directory]";
const BUCKET_GRAMMAR: &str = "s3://bucket/prefix (likewise gs:// and az://)";
const WEB_GRAMMAR: &str = "https://host/file, or https://host/directory/ with a slash at the end";
const FILE_GRAMMAR: &str = "file:///absolute/directory";

impl ModelRef {
    /// Longest text of a reference, in bytes.
    pub const MAX_BYTES: usize = 16 * 1024;
    /// Longest single name in a location, in bytes: it becomes a directory, percent-encoded.
    const MAX_NAME_BYTES: usize = 200;

    /// Reads a location text, and adds the patterns to those it carries.
    pub fn parse_with(text: &str, include: &[String], exclude: &[String]) -> Result<ModelRef, ReferenceError> {
        let bare: ModelRef = text.parse()?;
        if include.is_empty() && exclude.is_empty() {
            return Ok(bare);
        }
        let joined = |own: &[String], more: &[String]| own.iter().chain(more).cloned().collect::<Vec<_>>();
        let selection =
            Selection::new(&joined(bare.selection.include(), include), &joined(bare.selection.exclude(), exclude))?;
        Ok(ModelRef { location: bare.location, selection })
    }

    /// What it names.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Which files are asked for.
    pub fn selection(&self) -> &Selection {
        &self.selection
    }

    /// The scheme it is written with.
    pub fn scheme(&self) -> Scheme {
        match &self.location {
            Location::Hub { .. } => Scheme::Hf,
            Location::Bucket { scheme, .. } => *scheme,
            Location::Web { url } if url.scheme() == "http" => Scheme::Http,
            Location::Web { .. } => Scheme::Https,
            Location::Directory { .. } => Scheme::File,
        }
    }

    /// The directory inside the snapshot that was asked for (`hf://org/name@main/sub/dir`), if not all of it.
    pub fn subdir(&self) -> Option<&RelPath> {
        match &self.location {
            Location::Hub { subdir, .. } => subdir.as_ref(),
            _ => None,
        }
    }

    /// Whether a file of the source is asked for: it lies in the sub-directory and is selected.
    pub fn takes(&self, path: &RelPath) -> bool {
        self.subdir().is_none_or(|dir| path.is_inside(dir)) && self.selection.takes(path)
    }

    /// Whether only part of what the location holds is asked for.
    pub fn is_partial(&self) -> bool {
        self.subdir().is_some() || !self.selection.is_everything()
    }
}

impl FromStr for ModelRef {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<ModelRef, ReferenceError> {
        let text = text.trim();
        let scheme_error = |why: &str, hint: Option<String>| {
            Err(ReferenceError::Scheme { shown: shown(text), why: why.to_owned(), hint })
        };
        if text.len() > ModelRef::MAX_BYTES {
            return scheme_error("it is longer than 16 KiB", None);
        }
        if text.chars().any(char::is_control) {
            return scheme_error("it has a control character", None);
        }
        let (location, selection) = split_selection(text)?;
        let Some((scheme, rest)) = location.split_once("://") else {
            let hint = if location.starts_with('/') {
                Some(format!("file://{location}"))
            } else {
                parse_hub(location, location).is_ok().then(|| format!("hf://{location}"))
            };
            return scheme_error("it has no scheme", hint);
        };
        let location = match scheme {
            "hf" => parse_hub(location, rest)?,
            "s3" => parse_bucket(location, Scheme::S3, rest)?,
            "gs" => parse_bucket(location, Scheme::Gs, rest)?,
            "az" => parse_bucket(location, Scheme::Az, rest)?,
            "https" | "http" => parse_web(location)?,
            "file" => parse_directory(location, rest)?,
            other => {
                let near = match other.to_ascii_lowercase().as_str() {
                    "ftp" | "ftps" | "sftp" => Some("https"),
                    "huggingface" | "hub" | "hugging-face" => Some("hf"),
                    "gcs" | "google" => Some("gs"),
                    "azure" | "abfs" | "abfss" | "wasb" | "wasbs" => Some("az"),
                    "s3a" | "s3n" | "minio" => Some("s3"),
                    lower => Scheme::ALL.map(Scheme::text).into_iter().find(|s| *s == lower),
                };
                return scheme_error(
                    &format!("`{}://` is not supported", shown(other)),
                    near.map(|s| format!("{s}://{rest}")).map(|s| shown(&s)),
                );
            }
        };
        Ok(ModelRef { location, selection })
    }
}

impl fmt::Display for ModelRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.location {
            Location::Hub { repo, revision, subdir } => {
                write!(f, "hf://{repo}@{}", encode_revision(revision))?;
                if let Some(dir) = subdir {
                    write!(f, "/{dir}")?;
                }
            }
            Location::Bucket { scheme, bucket, prefix } => {
                write!(f, "{}://{bucket}", scheme.text())?;
                if let Some(prefix) = prefix {
                    write!(f, "/{prefix}")?;
                }
            }
            Location::Web { url } => f.write_str(url.as_str())?,
            Location::Directory { path } => write!(f, "file:///{path}")?,
        }
        if !self.selection.is_everything() {
            let mut query = url::form_urlencoded::Serializer::new(String::new());
            for pattern in self.selection.include() {
                query.append_pair("include", pattern);
            }
            for pattern in self.selection.exclude() {
                query.append_pair("exclude", pattern);
            }
            write!(f, "#{}", query.finish())?;
        }
        Ok(())
    }
}

impl Serialize for ModelRef {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ModelRef {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<ModelRef, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// At most 120 characters, escaped, and nothing that stands where a password stands.
fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(120).flat_map(char::escape_debug).collect();
    if let Some(at) = out.find("://").map(|i| i + 3) {
        let end = out[at..].find('/').map_or(out.len(), |i| at + i);
        if text.starts_with("http")
            && let Some(user_end) = out[at..end].rfind('@')
        {
            out.replace_range(at..at + user_end, "…");
        }
    }
    if text.starts_with("http")
        && let Some(query) = out.find('?')
    {
        out.replace_range(query + 1.., "…");
    }
    out
}

fn grammar(text: &str, why: impl Into<String>, grammar: &'static str) -> ReferenceError {
    ReferenceError::Grammar { shown: shown(text), why: why.into(), grammar }
}

fn split_selection(text: &str) -> Result<(&str, Selection), ReferenceError> {
    let Some(at) = ["#include=", "#exclude="].iter().filter_map(|mark| text.find(mark)).min() else {
        return Ok((text, Selection::default()));
    };
    let (mut include, mut exclude) = (Vec::new(), Vec::new());
    for (key, value) in url::form_urlencoded::parse(&text.as_bytes()[at + 1..]) {
        match key.as_ref() {
            "include" => include.push(value.into_owned()),
            "exclude" => exclude.push(value.into_owned()),
            other => {
                let why = format!("the selection has `{}`, only `include` and `exclude` are known", shown(other));
                return Err(grammar(text, why, "REFERENCE#include=PATTERN&exclude=PATTERN"));
            }
        }
    }
    Ok((&text[..at], Selection::new(&include, &exclude)?))
}

fn parse_hub(text: &str, rest: &str) -> Result<Location, ReferenceError> {
    let bad = |why: String| grammar(text, why, HF_GRAMMAR);
    let (repo, tail) = match rest.split_once('@') {
        Some((repo, tail)) => (repo.to_owned(), Some(tail)),
        None => {
            // Without a revision the first two names are the repository, what follows is the sub-directory.
            let mut names = rest.splitn(3, '/');
            let repo = names.by_ref().take(2).collect::<Vec<_>>().join("/");
            let subdir = names.next().filter(|s| !s.is_empty());
            let subdir = subdir.map(|s| relative(text, s.trim_end_matches('/'), HF_GRAMMAR)).transpose()?;
            check_repo(&repo).map_err(bad)?;
            return Ok(Location::Hub { repo, revision: "main".to_owned(), subdir });
        }
    };
    check_repo(&repo).map_err(bad)?;
    let tail = tail.unwrap_or_default();
    // `refs/pr/7` and `refs/convert/parquet` are revisions with slashes that people write as they are.
    let names: Vec<&str> = tail.splitn(4, '/').collect();
    let (revision, subdir) = match names.as_slice() {
        ["refs", kind @ ("pr" | "convert"), name, more @ ..] => {
            (format!("refs/{kind}/{name}"), more.first().copied().unwrap_or_default())
        }
        _ => {
            let (revision, subdir) = tail.split_once('/').unwrap_or((tail, ""));
            let slash = if revision.contains("%2f") { "%2f" } else { "%2F" };
            (revision.replace(slash, "/").replace("%25", "%"), subdir)
        }
    };
    if let Err(why) = RelPath::new(&revision) {
        return Err(bad(format!("as a revision, {why}")));
    }
    let subdir = subdir.trim_end_matches('/');
    let subdir = if subdir.is_empty() { None } else { Some(relative(text, subdir, HF_GRAMMAR)?) };
    Ok(Location::Hub { repo, revision, subdir })
}

fn encode_revision(revision: &str) -> String {
    let names: Vec<&str> = revision.split('/').collect();
    match names.as_slice() {
        ["refs", "pr" | "convert", _] if !revision.contains('%') => revision.to_owned(),
        _ => revision.replace('%', "%25").replace('/', "%2F"),
    }
}

/// The Hub's own rule for names: letters, digits, `-`, `_`, `.`; at most 96; no `--`, no `..`; no `-` or `.` at an end.
fn check_repo(repo: &str) -> Result<(), String> {
    let names: Vec<&str> = repo.split('/').collect();
    if names.len() > 2 || repo.is_empty() {
        return Err(format!("`{}` is not `org/name`", shown(repo)));
    }
    for name in names {
        let fits = !name.is_empty() && name.len() <= 96;
        let letters = name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
        let ends = !name.starts_with(['-', '.']) && !name.ends_with(['-', '.']);
        if !(fits && letters && ends) || name.contains("--") || name.contains("..") {
            return Err(format!("`{}` is not a name the Hub allows", shown(name)));
        }
    }
    Ok(())
}

fn relative(text: &str, path: &str, how: &'static str) -> Result<RelPath, ReferenceError> {
    let path = RelPath::new(path).map_err(|why| grammar(text, why.to_string(), how))?;
    if path.components().any(|c| c.len() > ModelRef::MAX_NAME_BYTES) {
        return Err(grammar(text, "a name in it is longer than 200 bytes", how));
    }
    Ok(path)
}

fn parse_bucket(text: &str, scheme: Scheme, rest: &str) -> Result<Location, ReferenceError> {
    let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
    let letters = bucket.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'));
    if bucket.len() < 2 || bucket.len() > 222 || !letters || bucket.contains("..") || bucket.starts_with('.') {
        return Err(grammar(text, format!("`{}` is not a bucket name", shown(bucket)), BUCKET_GRAMMAR));
    }
    let prefix = prefix.trim_end_matches('/');
    let prefix = if prefix.is_empty() { None } else { Some(relative(text, prefix, BUCKET_GRAMMAR)?) };
    Ok(Location::Bucket { scheme, bucket: bucket.to_owned(), prefix })
}

fn parse_web(text: &str) -> Result<Location, ReferenceError> {
    let bad = |why: &str| grammar(text, why, WEB_GRAMMAR);
    let url = url::Url::parse(text).map_err(|e| bad(&e.to_string()))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(bad("it carries a user or a password; a reference never carries a secret"));
    }
    if url.query().is_some() {
        return Err(bad("it has a query (`?…`), which may carry a secret such as a signature"));
    }
    if url.fragment().is_some() {
        return Err(bad("it has a fragment (`#…`)"));
    }
    if url.host_str().is_none_or(|host| host.len() > ModelRef::MAX_NAME_BYTES) {
        return Err(bad("it has no usable host"));
    }
    let segments: Vec<&str> = url.path_segments().map(Iterator::collect).unwrap_or_default();
    let names = segments.len() - usize::from(segments.last() == Some(&""));
    if segments.iter().take(names).any(|s| s.is_empty()) {
        return Err(bad("its path has an empty component"));
    }
    if segments.iter().any(|s| s.len() > ModelRef::MAX_NAME_BYTES) || names > RelPath::MAX_DEPTH - 4 {
        return Err(bad("its path is too long"));
    }
    Ok(Location::Web { url })
}

fn parse_directory(text: &str, rest: &str) -> Result<Location, ReferenceError> {
    let Some(path) = rest.strip_prefix('/') else {
        return Err(grammar(text, "the path is not absolute", FILE_GRAMMAR));
    };
    Ok(Location::Directory { path: relative(text, path.trim_end_matches('/'), FILE_GRAMMAR)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn canonical(text: &str) -> String {
        text.parse::<ModelRef>().unwrap_or_else(|e| panic!("{text}: {e}")).to_string()
    }

    #[test]
    fn references_have_one_canonical_form() {
        for (text, form) in [
            ("hf://org/name", "hf://org/name@main"),
            ("hf://gpt2", "hf://gpt2@main"),
            ("hf://gpt2@v1", "hf://gpt2@v1"),
            (" hf://org/name@v1/sub/dir/ ", "hf://org/name@v1/sub/dir"),
            ("hf://org/name/sub/dir", "hf://org/name@main/sub/dir"),
            ("hf://org/name@refs/pr/7", "hf://org/name@refs/pr/7"),
            ("hf://org/name@refs%2Fpr%2F7/x", "hf://org/name@refs/pr/7/x"),
            ("hf://org/name@feature%2Fa/x", "hf://org/name@feature%2Fa/x"),
            ("s3://bucket", "s3://bucket"),
            ("s3://bucket/a/b/", "s3://bucket/a/b"),
            ("gs://bucket/a b", "gs://bucket/a b"),
            ("az://container/a", "az://container/a"),
            ("https://HOST/x/../y/", "https://host/y/"),
            ("https://host:443/f.gguf", "https://host/f.gguf"),
            ("http://127.0.0.1:8080/m/", "http://127.0.0.1:8080/m/"),
            ("file:///srv/models/x/", "file:///srv/models/x"),
            ("hf://o/n#exclude=*.bin&include=b&include=a&include=a", "hf://o/n@main#include=a&include=b&exclude=*.bin"),
        ] {
            assert_eq!(canonical(text), form);
            assert_eq!(canonical(form), form);
        }
    }

    #[test]
    fn two_selections_are_two_references() {
        let plain = ModelRef::parse_with("hf://o/n", &[], &[]).unwrap();
        let some = ModelRef::parse_with("hf://o/n", &["*.json".into()], &[]).unwrap();
        let same = ModelRef::parse_with("hf://o/n@main#include=*.json", &[], &[]).unwrap();
        assert_ne!(plain.to_string(), some.to_string());
        assert_eq!(some.to_string(), same.to_string());
    }

    #[test]
    fn mistakes_are_named_with_what_was_meant() {
        for (text, hint) in [
            ("ftp://host/x", "https://host/x"),
            ("s3a://bucket/x", "s3://bucket/x"),
            ("HF://org/name", "hf://org/name"),
            ("org/name", "hf://org/name"),
            ("/srv/model", "file:///srv/model"),
            ("hf://org/name/../x", "hf://org/name[@revision]"),
            ("hf://a--b/c", "hf://org/name[@revision]"),
            ("hf://org/name@../x", "hf://org/name[@revision]"),
            ("s3://b/../x", "s3://bucket/prefix"),
            ("s3:///x", "s3://bucket/prefix"),
            ("file://relative", "file:///absolute"),
            ("file:///a/../b", "file:///absolute"),
            ("", "the schemes are"),
            ("hf://o/n#include=[", "pattern"),
        ] {
            let error = text.parse::<ModelRef>().expect_err(text);
            assert!(error.action().contains(hint), "{text}: {}", error.action());
        }
    }

    #[test]
    fn a_reference_never_carries_a_secret() {
        for text in ["https://user:hunter2@host/x", "https://host/x?X-Amz-Signature=hunter2", "https://hunter2@host/x"]
        {
            let error = text.parse::<ModelRef>().expect_err(text);
            assert!(!format!("{error} {}", error.action()).contains("hunter2"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn what_parses_prints_to_itself(text in "(hf|s3|gs|az|https|file)://[a-zA-Z0-9@/%._ #=&-]{0,40}") {
            if let Ok(reference) = text.parse::<ModelRef>() {
                let printed = reference.to_string();
                let again: ModelRef = printed.parse().map_err(|e| TestCaseError::fail(format!("{printed}: {e}")))?;
                prop_assert_eq!(&again, &reference, "{}", printed);
            }
        }

        #[test]
        fn nothing_panics(text in "\\PC{0,60}") {
            if let Err(error) = text.parse::<ModelRef>() {
                prop_assert!(!error.to_string().is_empty());
            }
        }

        #[test]
        fn selections_survive_the_text_form(patterns in proptest::collection::vec("[a-z*?/.&=# %+]{1,12}", 0..4)) {
            if let Ok(reference) = ModelRef::parse_with("hf://o/n", &patterns, &[]) {
                prop_assert_eq!(reference.to_string().parse::<ModelRef>().unwrap(), reference);
            }
        }
    }
}

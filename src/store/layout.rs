//! The disk tree: the only place that knows a name in it. `docs/on-disk.md` draws it.
//!
//! ```text
//! <root>/FORMAT              `larder-volume 1`
//!        lock                held while a process writes here; its id
//!        blobs/ab/<64 hex>   0444, name = BLAKE3 of the bytes
//!        ingests/            <id>.part <id>.log, and what is being built or thrown away: tmp-* snapshot-* trash-*
//!        manifests/<64 hex>  canonical text, name = BLAKE3 of it
//!        refs/<model id>     the records
//!        pulls/<id>          pulls to resume
//!        leases/<id>         leases that outlive their request
//!        pins/<32 hex>       references that are kept; name = BLAKE3 of the reference, cut
//!        starts/<model id>   how the pull that brought a model has spent its time
//!        scrub               how far scrubbing has come
//!        history             which models were evicted, and why
//!        reserve             room that is given up when the disk is full
//!        quarantine/<64 hex> blobs found wrong
//!        index-v1/           owned by `index`
//!        public/             the only directory that pods see
//! ```

use std::path::{Path, PathBuf};

use crate::model::{Digest, Location, ModelId, ModelRef, RelPath};

/// What stands in `FORMAT` before the number.
pub(super) const FORMAT_NAME: &str = "larder-volume";
/// The format this code reads and writes.
pub(super) const FORMAT_VERSION: u32 = 1;

/// The names below one root.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    root: PathBuf,
}

/// What a name in `ingests/` that is not an ingest begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scratch {
    /// A small file before it gets its name.
    File,
    /// A snapshot before it gets its name.
    Snapshot,
    /// A snapshot that lost its name.
    Trash,
}

impl Scratch {
    pub(super) const ALL: [Scratch; 3] = [Scratch::File, Scratch::Snapshot, Scratch::Trash];

    pub(super) fn prefix(self) -> &'static str {
        match self {
            Scratch::File => "tmp-",
            Scratch::Snapshot => "snapshot-",
            Scratch::Trash => "trash-",
        }
    }
}

impl Layout {
    pub(super) fn new(root: &Path) -> Layout {
        Layout { root: root.to_owned() }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn format(&self) -> PathBuf {
        self.root.join("FORMAT")
    }

    /// `FORMAT` before it has its name: the one scratch file that is not in `ingests/`, which is not there yet.
    pub(super) fn format_scratch(&self) -> PathBuf {
        self.root.join("FORMAT.tmp")
    }

    pub(super) fn lock(&self) -> PathBuf {
        self.root.join("lock")
    }

    pub(super) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    /// The 256 directories of `blobs/`.
    pub(super) fn blob_dirs(&self) -> impl Iterator<Item = PathBuf> {
        let blobs = self.blobs();
        (0..=255u8).map(move |first| blobs.join(format!("{first:02x}")))
    }

    pub(super) fn blob_dir(&self, digest: Digest) -> PathBuf {
        self.blobs().join(&digest.to_hex()[..2])
    }

    pub(super) fn blob(&self, digest: Digest) -> PathBuf {
        self.blobs().join(blob_name(digest))
    }

    pub(super) fn ingests(&self) -> PathBuf {
        self.root.join("ingests")
    }

    pub(super) fn ingest_part(&self, id: &str) -> PathBuf {
        self.ingests().join(format!("{id}.part"))
    }

    pub(super) fn ingest_log(&self, id: &str) -> PathBuf {
        self.ingests().join(format!("{id}.log"))
    }

    /// A name in `ingests/` that nothing has.
    pub(super) fn scratch(&self, kind: Scratch) -> PathBuf {
        self.ingests().join(format!("{}{:032x}", kind.prefix(), fastrand::u128(..)))
    }

    pub(super) fn manifests(&self) -> PathBuf {
        self.root.join("manifests")
    }

    pub(super) fn manifest(&self, digest: Digest) -> PathBuf {
        self.manifests().join(digest.to_hex())
    }

    pub(super) fn records(&self) -> PathBuf {
        self.root.join("refs")
    }

    pub(super) fn record(&self, id: ModelId) -> PathBuf {
        self.records().join(id.to_string())
    }

    pub(super) fn pulls(&self) -> PathBuf {
        self.root.join("pulls")
    }

    pub(super) fn leases(&self) -> PathBuf {
        self.root.join("leases")
    }

    pub(super) fn pins(&self) -> PathBuf {
        self.root.join("pins")
    }

    pub(super) fn starts(&self) -> PathBuf {
        self.root.join("starts")
    }

    pub(super) fn start(&self, id: ModelId) -> PathBuf {
        self.starts().join(id.to_string())
    }

    pub(super) fn scrub(&self) -> PathBuf {
        self.root.join("scrub")
    }

    pub(super) fn history(&self) -> PathBuf {
        self.root.join("history")
    }

    pub(super) fn reserve(&self) -> PathBuf {
        self.root.join("reserve")
    }

    pub(super) fn quarantine(&self) -> PathBuf {
        self.root.join("quarantine")
    }

    pub(super) fn public(&self) -> PathBuf {
        self.root.join("public")
    }

    /// The directories only we may enter.
    pub(super) fn private_dirs(&self) -> [PathBuf; 9] {
        [
            self.blobs(),
            self.ingests(),
            self.manifests(),
            self.records(),
            self.pulls(),
            self.leases(),
            self.pins(),
            self.starts(),
            self.quarantine(),
        ]
    }

    /// Whether a root that has no `FORMAT` may hold this name and still be new: what an interrupted first start left,
    /// and what mkfs makes.
    pub(super) fn may_be_in_a_new_root(name: &str) -> bool {
        matches!(name, "lock" | "FORMAT.tmp" | "lost+found")
    }
}

/// `ab/abcd…`: where a blob is in `blobs/`.
pub(super) fn blob_name(digest: Digest) -> String {
    let hex = digest.to_hex();
    format!("{}/{hex}", &hex[..2])
}

/// The directory of `public/` that holds the Hugging Face layout.
pub(super) const HUB: &str = "hub";
/// The other directories of `public/`, one per scheme.
pub(super) const BY_SCHEME: [&str; 6] = ["s3", "gs", "az", "https", "http", "file"];
/// What the last component of a snapshot's path begins with, outside of `hub/`. No other component does.
pub(super) const VERSION_MARK: char = '@';

/// `hub/models--org--name`
pub(super) fn hub_repo(repo: &str) -> String {
    format!("{HUB}/models--{}", repo.replace('/', "--"))
}

/// Where a version of a reference is laid out, relative to `public/`.
///
/// - a whole Hub repository: `hub/models--org--name/snapshots/<version>`, as the Hub's own cache has it, so it is the
///   same for every revision that names this version;
/// - everything else: `<scheme>/<place>/<path>/@<version>`.
///
/// When only a part is asked for (a selection, a sub-directory, one file of a web server), the last component ends in
/// `-` and 16 hexadecimal digits that stand for the reference. So two paths are equal only when the content is. Places
/// that are too long or too deep for a path are written `<scheme>/%long/<hash>/@<version>`.
pub fn snapshot_path(reference: &ModelRef, version: &str) -> RelPath {
    let scheme = reference.scheme().text();
    let (place, part) = match reference.location() {
        Location::Hub { repo, .. } => {
            let path = format!("{}/snapshots/{}", hub_repo(repo), leaf(reference, version, reference.is_partial()));
            // The Hub's names have at most 96 bytes, so this can only be too long with a name that no parser let in.
            return RelPath::new(&path).unwrap_or_else(|_| long_path(HUB, reference, version));
        }
        Location::Bucket { bucket, prefix, .. } => {
            let mut place = vec![bucket.clone()];
            place.extend(prefix.iter().flat_map(|prefix| prefix.components()).map(plain_component));
            (place, false)
        }
        Location::Web { url } => {
            let mut place = vec![host_component(url)];
            let segments = url.path_segments().into_iter().flatten();
            place.extend(segments.filter(|segment| !segment.is_empty()).map(plain_component));
            // `https://host/x` and `https://host/x/` are two things: the first is one file.
            (place, !url.path().ends_with('/'))
        }
        Location::Directory { path } => (path.components().map(plain_component).collect(), false),
    };
    let leaf = leaf(reference, version, reference.is_partial() || part);
    RelPath::new(&format!("{scheme}/{}/{VERSION_MARK}{leaf}", place.join("/")))
        .unwrap_or_else(|_| long_path(scheme, reference, version))
}

/// `%long` is no bucket and no host, and a path component that begins with `%` is written `%25`.
fn long_path(scheme: &str, reference: &ModelRef, version: &str) -> RelPath {
    let place = &blake3::hash(reference.to_string().as_bytes()).to_hex()[..32];
    RelPath::new(&format!("{scheme}/%long/{place}/{VERSION_MARK}{}", leaf(reference, version, true)))
        .expect("a few short components are a path")
}

fn leaf(reference: &ModelRef, version: &str, partial: bool) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    let usable = !version.is_empty() && version.len() <= 64 && !version.starts_with('.') && version.bytes().all(plain);
    let name =
        if usable { version.to_owned() } else { format!("%{}", &blake3::hash(version.as_bytes()).to_hex()[..32]) };
    // A version that looks as if it had our suffix gets one, so that it cannot be taken for a part of another version.
    if partial || looks_partial(&name) {
        format!("{name}-{}", &blake3::hash(reference.to_string().as_bytes()).to_hex()[..16])
    } else {
        name
    }
}

fn looks_partial(name: &str) -> bool {
    let digits = |s: &str| s.len() == 16 && s.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    name.rsplit_once('-').is_some_and(|(_, end)| digits(end))
}

/// Only the first character can make a component look like a version (`@`), or like one that was changed here (`%`).
fn plain_component(component: &str) -> String {
    match component.strip_prefix([VERSION_MARK, '%']) {
        Some(rest) if component.starts_with(VERSION_MARK) => format!("%40{rest}"),
        Some(rest) => format!("%25{rest}"),
        None => component.to_owned(),
    }
}

/// Host and port in one name. `_` is the mark between them, so one in the host is escaped, as are `[`, `:` and `]`.
fn host_component(url: &url::Url) -> String {
    let mut name = String::new();
    for byte in url.host_str().unwrap_or_default().bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-') {
            name.push(byte as char);
        } else {
            name.push_str(&format!("%{byte:02X}"));
        }
    }
    if let Some(port) = url.port() {
        name.push_str(&format!("_{port}"));
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn path(reference: &str, version: &str) -> String {
        snapshot_path(&reference.parse().unwrap_or_else(|e| panic!("{reference}: {e}")), version).to_string()
    }

    #[test]
    fn whole_models_have_readable_paths() {
        for (reference, expected) in [
            ("hf://org/name@main", "hub/models--org--name/snapshots/v1"),
            ("hf://org/name@v2", "hub/models--org--name/snapshots/v1"),
            ("hf://gpt2", "hub/models--gpt2/snapshots/v1"),
            ("s3://bucket", "s3/bucket/@v1"),
            ("gs://bucket/a/b", "gs/bucket/a/b/@v1"),
            ("az://bucket/@a/x@y", "az/bucket/%40a/x@y/@v1"),
            ("az://bucket/%40a", "az/bucket/%2540a/@v1"),
            ("https://Host.example/m/", "https/host.example/m/@v1"),
            ("http://127.0.0.1:8080/m/", "http/127.0.0.1_8080/m/@v1"),
            ("http://[::1]:8080/", "http/%5B%3A%3A1%5D_8080/@v1"),
            ("http://a_80/", "http/a%5F80/@v1"),
            ("file:///srv/m", "file/srv/m/@v1"),
        ] {
            assert_eq!(path(reference, "v1"), expected, "{reference}");
        }
    }

    #[test]
    fn parts_are_told_apart_from_the_whole_and_from_each_other() {
        let whole = "hf://org/name@main";
        let parts = ["hf://org/name@main/onnx", "hf://org/name@main#include=*.json", "hf://org/name@v2/onnx"];
        let mut seen: Vec<String> = parts.iter().map(|p| path(p, "v1")).collect();
        for (part, at) in parts.iter().zip(&seen) {
            let suffix = at.strip_prefix("hub/models--org--name/snapshots/v1-").unwrap_or_else(|| panic!("{at}"));
            assert_eq!(suffix.len(), 16);
            // A whole repository whose version is spelled like that part's directory.
            assert_ne!(path(whole, &format!("v1-{suffix}")), *at, "{part}");
        }
        seen.extend([path(whole, "v1"), path("https://h/x", "v1"), path("https://h/x/", "v1")]);
        let distinct: std::collections::BTreeSet<_> = seen.iter().collect();
        assert_eq!(distinct.len(), seen.len(), "{seen:?}");
    }

    #[test]
    fn the_longest_and_deepest_places_and_hostile_versions_have_a_path() {
        let deep = format!("file:///{}", vec!["d"; 31].join("/"));
        let long = format!("s3://bucket/{}", vec!["n".repeat(200); 5].join("/"));
        let host = format!("https://{}/", "_".repeat(180));
        for reference in [deep.as_str(), &long, &host, "hf://o/n"] {
            for version in ["v", "", "..", ".x", "a/b", "\0", &"v".repeat(3000)] {
                let parsed: ModelRef = reference.parse().unwrap_or_else(|e| panic!("{reference}: {e}"));
                let first = snapshot_path(&parsed, version);
                assert_eq!(snapshot_path(&parsed, version), first);
                assert!(!first.as_str().contains("/../"));
            }
        }
        assert!(path(&deep, "v").starts_with("file/%long/"));
        assert_ne!(path(&deep, "v"), path(&format!("{}e", &deep[..deep.len() - 1]), "v"));
    }

    proptest! {
        #[test]
        fn two_references_never_share_a_path(
            a in "(s3|gs|https|http|file)://[a-b@%_.:0-1/]{0,9}(#include=[a-b])?",
            b in "(s3|gs|https|http|file)://[a-b@%_.:0-1/]{0,9}(#include=[a-b])?",
            versions in ("[a-b.@/%-]{0,3}", "[a-b.@/%-]{0,3}"),
        ) {
            if let (Ok(left), Ok(right)) = (a.parse::<ModelRef>(), b.parse::<ModelRef>()) {
                let same = (left.to_string(), &versions.0) == (right.to_string(), &versions.1);
                let equal = snapshot_path(&left, &versions.0) == snapshot_path(&right, &versions.1);
                prop_assert_eq!(equal, same, "{} {} / {} {}", a, versions.0, b, versions.1);
            }
        }

        #[test]
        fn a_snapshot_never_lies_in_another(
            a in "(s3|https|file)://(a|aa|@a|@v1)?(/(a|@a|@v1)){0,3}/?",
            b in "(s3|https|file)://(a|aa|@a|@v1)?(/(a|@a|@v1)){0,3}/?",
        ) {
            if let (Ok(left), Ok(right)) = (a.parse::<ModelRef>(), b.parse::<ModelRef>()) {
                let (left, right) = (snapshot_path(&left, "v1"), snapshot_path(&right, "v1"));
                prop_assert!(!left.is_inside(&right), "{} in {}", left, right);
            }
        }
    }
}

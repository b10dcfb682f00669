//! [`Manifest`]: our verified list of a model version's files.

use std::sync::Arc;

use super::{Digest, RelPath};

/// One file of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestFile {
    /// Where it is in the snapshot.
    pub path: RelPath,
    /// What its bytes are.
    pub digest: Digest,
    /// How many they are.
    pub size: u64,
}

/// Path, digest and size of every file of a model version, sorted by path. Its own digest names the content.
///
/// The text form is canonical, so that it can be hashed and compared:
///
/// ```text
/// larder-manifest 1
/// blake3:<64 hex> <size> <path>
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    files: Arc<[ManifestFile]>,
}

/// Why a text is not a manifest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// The first line is not ours.
    #[error("the first line is not `larder-manifest 1`")]
    Header,
    /// A line cannot be read.
    #[error("line {0} is not `blake3:HEX SIZE PATH`")]
    Line(usize),
    /// The lines are not sorted by path, or a path stands twice.
    #[error("line {0} is out of order")]
    Order(usize),
}

const HEADER: &str = "larder-manifest 1\n";

impl Manifest {
    /// Sorts the files. The caller has made sure that no path stands twice (a [`super::Listing`] guarantees it).
    pub fn new(mut files: Vec<ManifestFile>) -> Manifest {
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Manifest { files: files.into() }
    }

    /// The files, sorted by path.
    pub fn files(&self) -> &[ManifestFile] {
        &self.files
    }

    /// The same, to keep: they stay in memory once, however many keep them.
    pub fn shared_files(&self) -> Arc<[ManifestFile]> {
        self.files.clone()
    }

    /// Bytes of all files, each counted as often as it is listed.
    pub fn total_bytes(&self) -> u64 {
        // A text that nobody verified may claim anything.
        self.files.iter().fold(0, |sum, file| sum.saturating_add(file.size))
    }

    /// The canonical text.
    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(HEADER.len() + self.files.len() * 128);
        text.push_str(HEADER);
        for file in self.files.iter() {
            text.push_str(&format!("{} {} {}\n", file.digest, file.size, file.path));
        }
        text
    }

    /// The digest of the canonical text.
    pub fn digest(&self) -> Digest {
        Digest::of(self.encode().as_bytes())
    }

    /// Reads the canonical text, and nothing but it.
    pub fn decode(text: &str) -> Result<Manifest, ManifestError> {
        let body = text.strip_prefix(HEADER).ok_or(ManifestError::Header)?;
        let mut files: Vec<ManifestFile> = Vec::new();
        for (at, line) in body.split_inclusive('\n').enumerate() {
            let number = at + 2;
            let file = decode_line(line).ok_or(ManifestError::Line(number))?;
            if files.last().is_some_and(|last| last.path >= file.path) {
                return Err(ManifestError::Order(number));
            }
            files.push(file);
        }
        Ok(Manifest { files: files.into() })
    }
}

fn decode_line(line: &str) -> Option<ManifestFile> {
    let mut fields = line.strip_suffix('\n')?.splitn(3, ' ');
    let digest = fields.next()?.parse().ok()?;
    let written = fields.next()?;
    let size: u64 = written.parse().ok()?;
    let path = RelPath::new(fields.next()?).ok()?;
    // `+7` and `007` parse as numbers too, but are not how we write them.
    (size.to_string() == written).then_some(ManifestFile { path, digest, size })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn manifest(paths: &[String]) -> Manifest {
        let paths: std::collections::BTreeSet<_> = paths.iter().filter_map(|p| RelPath::new(p).ok()).collect();
        Manifest::new(
            paths
                .into_iter()
                .map(|path| ManifestFile {
                    digest: Digest::of(path.as_str().as_bytes()),
                    size: path.as_str().len() as u64,
                    path,
                })
                .collect(),
        )
    }

    proptest! {
        #[test]
        fn encoding_round_trips(paths in proptest::collection::vec("[a-c /é]{1,6}", 0..12)) {
            let manifest = manifest(&paths);
            prop_assert_eq!(Manifest::decode(&manifest.encode()).unwrap(), manifest);
        }

        #[test]
        fn only_the_canonical_text_is_read(at in 0usize..200, byte in 0x20u8..0x7f) {
            let manifest = manifest(&["a".into(), "b/c".into()]);
            let mut text = manifest.encode().into_bytes();
            let at = at % text.len();
            if text[at] != byte {
                text[at] = byte;
                let text = String::from_utf8(text).unwrap();
                if let Ok(other) = Manifest::decode(&text) {
                    prop_assert_eq!(other.encode(), text);
                }
            }
        }
    }

    #[test]
    fn torn_and_foreign_texts_are_refused() {
        let text = manifest(&["a".into(), "b".into()]).encode();
        assert_eq!(Manifest::decode(""), Err(ManifestError::Header));
        assert_eq!(Manifest::decode(&text[..text.len() - 1]), Err(ManifestError::Line(3)));
        let lines: Vec<&str> = text.split_inclusive('\n').collect();
        assert_eq!(Manifest::decode(&[lines[0], lines[2], lines[1]].concat()), Err(ManifestError::Order(3)));
        assert_eq!(Manifest::decode(&[lines[0], lines[1], lines[1]].concat()), Err(ManifestError::Order(3)));
    }
}

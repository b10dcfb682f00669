//! [`Listing`]: what a source claims. Facts are in [`super::Manifest`].

use std::collections::BTreeMap;

use super::{Bytes, Checksum, RelPath, RelPathError};

/// Most files one model may have.
pub const MAX_LISTED_FILES: usize = 100_000;

/// One file as its source describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedFile {
    /// Where it goes in the snapshot.
    pub path: RelPath,
    /// Bytes; a body of another length is an error.
    pub size: u64,
    /// What the bytes hash to, if the source says so.
    pub checksum: Option<Checksum>,
    /// The source's mark of exactly these bytes (a strong ETag, an object version): sent with each range, so that no
    /// two versions mix. Never used as a path.
    pub pin: Option<String>,
    /// What the source itself needs to find the file again: a key, a URL, a path.
    pub locator: String,
}

/// What a source claims: an immutable version, and its files. Built by [`ListingBuilder`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Names the version: a commit, or a hash over what is listed. Letters, digits, `-`, `_`, `.`; at most 64.
    version: String,
    files: Vec<ListedFile>,
}

/// Why a listing cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ListingError {
    /// A name cannot become a path.
    #[error(transparent)]
    Name(#[from] RelPathError),
    /// One name stands twice.
    #[error("name {0:?} stands twice")]
    Twice(RelPath),
    /// One name is both a file and a directory.
    #[error("name {0:?} is a file and also a directory of other files")]
    FileAndDirectory(String),
    /// More files than [`MAX_LISTED_FILES`].
    #[error("there are more than 100,000 files")]
    TooMany,
    /// The sizes do not add up to a number a disk can have.
    #[error("the sizes add up to more than {}", Bytes(ListingBuilder::MAX_TOTAL_BYTES))]
    TooLarge,
    /// The version cannot become a directory name.
    #[error("the version {0:?} is not made of letters, digits, `-`, `_` and `.`")]
    Version(String),
}

/// Collects a listing file by file and refuses it as soon as it breaks a limit, so that memory stays bounded.
#[derive(Debug, Default)]
pub struct ListingBuilder {
    files: BTreeMap<RelPath, ListedFile>,
    total: u64,
}

impl ListingBuilder {
    /// Most bytes one model may claim: 1 PB.
    pub const MAX_TOTAL_BYTES: u64 = 1_000_000_000_000_000;

    /// Starts an empty listing.
    pub fn new() -> ListingBuilder {
        ListingBuilder::default()
    }

    /// Adds a file.
    pub fn push(&mut self, file: ListedFile) -> Result<(), ListingError> {
        if self.files.len() == MAX_LISTED_FILES {
            return Err(ListingError::TooMany);
        }
        let total = self.total.checked_add(file.size).filter(|total| *total <= Self::MAX_TOTAL_BYTES);
        self.total = total.ok_or(ListingError::TooLarge)?;
        let path = file.path.clone();
        match self.files.insert(path.clone(), file) {
            None => Ok(()),
            Some(_) => Err(ListingError::Twice(path)),
        }
    }

    /// Names the version by what is listed: path, size, checksum and pin of each file.
    pub fn finish_by_content(self) -> Result<Listing, ListingError> {
        let mut hasher = blake3::Hasher::new();
        for file in self.files.values() {
            let checksum = file.checksum.map(|c| c.to_string()).unwrap_or_default();
            for field in [file.path.as_str(), &file.size.to_string(), &checksum, file.pin.as_deref().unwrap_or("")] {
                hasher.update(&(field.len() as u64).to_le_bytes());
                hasher.update(field.as_bytes());
            }
        }
        let version = hasher.finalize().to_hex()[..16].to_owned();
        self.finish(version)
    }

    /// Names the version as the source does.
    pub fn finish(self, version: String) -> Result<Listing, ListingError> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if version.is_empty() || version.len() > 64 || version.starts_with('.') || !version.bytes().all(plain) {
            return Err(ListingError::Version(version.chars().take(80).collect()));
        }
        for path in self.files.keys() {
            if let Some(parent) =
                path.parents().find(|parent| RelPath::new(parent).is_ok_and(|parent| self.files.contains_key(&parent)))
            {
                return Err(ListingError::FileAndDirectory(parent.to_owned()));
            }
        }
        Ok(Listing { version, files: self.files.into_values().collect() })
    }
}

impl Listing {
    /// The version's name.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// The files, sorted by path.
    pub fn files(&self) -> &[ListedFile] {
        &self.files
    }

    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|f| f.size).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, size: u64) -> ListedFile {
        ListedFile { path: RelPath::new(path).unwrap(), size, checksum: None, pin: None, locator: path.into() }
    }

    #[test]
    fn listings_that_cannot_be_laid_out_are_refused() {
        let mut twice = ListingBuilder::new();
        twice.push(file("a", 1)).unwrap();
        assert!(matches!(twice.push(file("a", 2)), Err(ListingError::Twice(_))));

        let mut both = ListingBuilder::new();
        for path in ["blob", "blob-x", "blob/child/deep"] {
            both.push(file(path, 1)).unwrap();
        }
        assert_eq!(both.finish_by_content().unwrap_err(), ListingError::FileAndDirectory("blob".into()));

        let mut large = ListingBuilder::new();
        large.push(file("a", 1)).unwrap();
        assert_eq!(large.push(file("b", u64::MAX)), Err(ListingError::TooLarge));

        for version in ["", "../x", ".x", "a/b", &"v".repeat(65)] {
            assert!(matches!(ListingBuilder::new().finish(version.into()), Err(ListingError::Version(_))), "{version}");
        }
    }

    #[test]
    fn names_that_differ_only_in_case_are_two_files() {
        let mut listing = ListingBuilder::new();
        listing.push(file("Config.json", 1)).unwrap();
        listing.push(file("config.json", 1)).unwrap();
        assert_eq!(listing.finish_by_content().unwrap().files().len(), 2);
    }

    #[test]
    fn a_hundred_thousand_files_and_not_one_more() {
        let mut listing = ListingBuilder::new();
        for i in 0..MAX_LISTED_FILES {
            listing.push(file(&format!("f{i}"), 1)).unwrap();
        }
        assert_eq!(listing.push(file("one-more", 1)), Err(ListingError::TooMany));
        assert_eq!(listing.finish_by_content().unwrap().total_bytes(), MAX_LISTED_FILES as u64);
    }

    #[test]
    fn the_version_follows_what_is_listed() {
        let version = |pin: Option<&str>| {
            let mut listing = ListingBuilder::new();
            listing.push(ListedFile { pin: pin.map(Into::into), ..file("a", 1) }).unwrap();
            listing.finish_by_content().unwrap().version().to_owned()
        };
        assert_eq!(version(Some("x")), version(Some("x")));
        assert_ne!(version(Some("x")), version(Some("y")));
        assert_ne!(version(None), version(Some("y")));
    }
}

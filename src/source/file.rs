//! `file://`: a directory of this machine.
//!
//! Symbolic links are followed, because the Hub's cache is made of them; a link to a directory above itself is refused.
//! Nothing but regular files is opened for reading, so that a FIFO or a device cannot hold us.

use std::fs::{self, File, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use tokio::task::spawn_blocking;

use super::*;
use crate::model::{ListingBuilder, RelPath};

/// Bytes that are read at once.
const PIECE_BYTES: u64 = 1 << 20;

/// A directory of this machine.
pub(super) struct Directory {
    reference: ModelRef,
    root: PathBuf,
}

impl Directory {
    /// The source of a `file://` reference.
    pub(super) fn new(reference: &ModelRef) -> Directory {
        let Location::Directory { path } = reference.location() else {
            unreachable!("Sources::open matched the location")
        };
        Directory { reference: reference.clone(), root: Path::new("/").join(path.as_path()) }
    }
}

#[async_trait]
impl Source for Directory {
    async fn resolve(&self) -> Result<Listing, Error> {
        let (reference, root) = (self.reference.clone(), self.root.clone());
        on_a_blocking_thread(&self.root, move || walk(&reference, root)).await
    }

    async fn fetch(&self, file: &ListedFile, range: Range<u64>) -> Result<Box<dyn RangeReader>, Error> {
        let path = PathBuf::from(&file.locator);
        let pin = file.pin.clone().unwrap_or_default();
        let opened = on_a_blocking_thread(&self.root, {
            let (path, pin) = (path.clone(), pin.clone());
            move || open(&path, &pin)
        });
        let start = Reading { file: Arc::new(opened.await?), path, pin, next: range.start, range };
        Ok(Pieces::of(futures::stream::try_unfold(start, async |mut reading| {
            if reading.next == reading.range.end {
                return Ok(None);
            }
            let (piece, reading) = on_a_blocking_thread(&reading.path.clone(), move || {
                let piece = reading.piece()?;
                Ok((piece, reading))
            })
            .await?;
            Ok(Some((piece, reading)))
        })))
    }
}

/// A file that is being read.
struct Reading {
    file: Arc<File>,
    path: PathBuf,
    pin: String,
    next: u64,
    range: Range<u64>,
}

impl Reading {
    fn piece(&mut self) -> Result<Bytes, Error> {
        let length = PIECE_BYTES.min(self.range.end - self.next);
        let mut piece = vec![0; length as usize];
        let read = self.file.read_exact_at(&mut piece, self.next);
        // Looked at after the read, so that what was written before it is noticed.
        unchanged(&self.path, &self.file.metadata().map_err(|e| io(&self.path, e))?, &self.pin)?;
        read.map_err(|e| io(&self.path, e))?;
        self.next += length;
        Ok(piece.into())
    }
}

/// Lists the regular files below `root`.
fn walk(reference: &ModelRef, root: PathBuf) -> Result<Listing, Error> {
    let what = reference.to_string();
    let not_found = |detail: &str| Error::RepoNotFound { what: what.clone(), detail: detail.into() };
    match fs::metadata(&root) {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => return Err(not_found("it is not a directory")),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Err(not_found("there is no such directory on this machine"));
        }
        Err(e) => return Err(io(&root, e)),
    }
    let listing_error = |why| Error::Listing { what: what.clone(), why };
    let mut listing = ListingBuilder::new();
    let mut listed = 0;
    let mut taken = 0;
    // Directories still to read, with the identities of all above them.
    let mut directories = vec![(root, String::new(), Vec::new())];
    while let Some((directory, prefix, mut above)) = directories.pop() {
        let metadata = fs::metadata(&directory).map_err(|e| io(&directory, e))?;
        let identity = (metadata.dev(), metadata.ino());
        if above.contains(&identity) {
            return Err(Error::Io {
                what: shown(&directory),
                detail: "it is a symbolic link to a directory above itself".into(),
            });
        }
        above.push(identity);
        for entry in fs::read_dir(&directory).map_err(|e| io(&directory, e))? {
            let path = entry.map_err(|e| io(&directory, e))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
                return Err(Error::Io { what: shown(&path), detail: "its name is not UTF-8".into() });
            };
            let name = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
            let relative = RelPath::new(&name).map_err(|why| listing_error(why.into()))?;
            let metadata = fs::metadata(&path);
            if let Ok(metadata) = &metadata
                && metadata.is_dir()
            {
                directories.push((path, name, above.clone()));
                continue;
            }
            listed += 1;
            if !reference.takes(&relative) {
                continue;
            }
            let metadata = metadata.map_err(|e| io(&path, e))?;
            if !metadata.is_file() {
                return Err(Error::Io { what: shown(&path), detail: "it is neither a file nor a directory".into() });
            }
            let Some(locator) = path.to_str().map(str::to_owned) else { continue };
            let pin = Some(pin(&metadata));
            let file = ListedFile { path: relative, size: metadata.len(), checksum: None, pin, locator };
            listing.push(file).map_err(listing_error)?;
            taken += 1;
        }
    }
    if taken == 0 {
        return Err(Error::NothingSelected { what, listed });
    }
    listing.finish_by_content().map_err(listing_error)
}

/// Opens a file if it is the one that was listed. Does not wait for the other end of a FIFO.
fn open(path: &Path, pin: &str) -> Result<File, Error> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file: File = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => file.into(),
        Err(rustix::io::Errno::NOENT) => return Err(Error::FileNotFound { what: shown(path) }),
        Err(e) => return Err(io(path, e.into())),
    };
    unchanged(path, &file.metadata().map_err(|e| io(path, e))?, pin)?;
    Ok(file)
}

/// Device, inode, size, and the two times in nanoseconds: no write leaves all of them alone.
fn pin(m: &Metadata) -> String {
    let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
    let (modified, changed) = (ns(m.mtime(), m.mtime_nsec()), ns(m.ctime(), m.ctime_nsec()));
    format!("{:x}:{}:{}:{modified}:{changed}", m.dev(), m.ino(), m.len())
}

fn unchanged(path: &Path, metadata: &Metadata, began: &str) -> Result<(), Error> {
    match pin(metadata) {
        now if now == began && metadata.is_file() => Ok(()),
        now => Err(Error::Changed { what: shown(path), began: began.to_owned(), now }),
    }
}

async fn on_a_blocking_thread<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    // Fails only when the runtime is shutting down.
    let gone = |e: tokio::task::JoinError| Error::Io { what: shown(path), detail: e.to_string() };
    spawn_blocking(work).await.map_err(gone)?
}

fn io(path: &Path, error: std::io::Error) -> Error {
    Error::Io { what: shown(path), detail: error.to_string() }
}

/// The path, escaped: it goes to a terminal.
fn shown(path: &Path) -> String {
    path.to_string_lossy().chars().flat_map(char::escape_debug).collect()
}

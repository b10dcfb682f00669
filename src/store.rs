//! Bytes on this disk: the only code that changes the disk.
//!
//! A [`Volume`] is one directory. What is *named* in it is *whole*: a blob gets its name after its bytes are verified
//! and durable, a manifest after its blobs, a snapshot after its manifest, a record last; they are destroyed the other
//! way round. So a crash leaves only nameless bytes, and [`Volume::sweep`] clears them away. `docs/on-disk.md` draws the
//! tree and tells what happens after each crash.
//!
//! - `layout`: every name on the disk, and where a snapshot goes.
//! - `io`: every call that changes the disk; `calls`: those under way, so that a disk which does not answer is noticed.
//! - `ingest`: a blob being written; `blob`: one that is.
//! - `snapshot`: `public/`: the directories pods read, and the Hub's refs.
//! - `record`: manifests and records: small files written whole.
//! - `note`: pulls to resume, leases, pins: likewise.
//! - `start`: how the pull that brought a model has spent its time; decides nothing.
//! - `descriptors`: what readers get them through; `stamp`: whether their bytes are known to be right.
//! - `history`: which models were evicted, and why; `reserve`: what lets that happen on a full disk.
//! - `sweep`: what nothing names.

mod blob;
mod calls;
mod descriptors;
mod glance;
mod history;
mod ingest;
mod io;
mod layout;
mod note;
mod record;
mod reserve;
mod scrub;
mod snapshot;
mod stamp;
mod start;
mod sweep;

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::fault::{Code, Diagnose};
use crate::model::{Bytes, Checksum, RelPathError};
use calls::Call;
use descriptors::Window;
use glance::Glances;
use io::Disk;
use layout::{FORMAT_NAME, FORMAT_VERSION, Layout};
use stamp::Stamps;

pub use blob::{Blob, Freed, Holders, OpenYet};
pub use descriptors::Descriptors;
pub use history::Eviction;
pub use ingest::{Begun, CHECKPOINT_BYTES, Ingest, IngestKey, WriteTime};
pub use layout::snapshot_path;
pub use note::{LeaseNote, Note, NotedHolder, PendingPull, PinNote, PinnedBy};
pub use scrub::{SCRUB_BLOCK_BYTES, ScrubNote, Scrubbed};
pub use stamp::{Proof, StampChange};
pub use start::StartNote;
pub use sweep::{Swept, UNNAMED_KEPT};

/// A directory larder owns, and its lock. All calls block on the disk.
pub struct Volume {
    disk: Arc<Disk>,
    layout: Layout,
    /// `None` beside the process that holds the volume.
    window: Option<Window>,
    stamps: Arc<Stamps>,
    glances: Glances,
    /// Held while the shape of `public/` changes: a directory found empty must still be empty when it is removed, and
    /// one just made must still be there when something is put into it.
    shape: Mutex<()>,
}

/// A question that only the disk itself can answer.
#[must_use = "it is open until it is asked or dropped"]
pub struct Question {
    disk: Arc<Disk>,
    call: Call,
}

impl Question {
    /// Waits for the answer for as long as it takes.
    pub fn ask(self) {
        self.disk.ask(self.call);
    }
}

/// How much room a file system has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes it would still give an ordinary user.
    pub free_bytes: u64,
    /// A file takes a multiple of this many bytes.
    pub block_bytes: u64,
}

impl Space {
    /// Of the file system that a path is on.
    pub fn at(path: &Path) -> std::io::Result<Space> {
        let found = rustix::fs::statvfs(path)?;
        Ok(Space {
            total_bytes: found.f_blocks.saturating_mul(found.f_frsize),
            free_bytes: found.f_bavail.saturating_mul(found.f_frsize),
            block_bytes: found.f_frsize,
        })
    }
}

/// Whether both are there, and on the same file system.
pub fn share_a_disk(one: &Path, other: &Path) -> bool {
    let device = |path: &Path| std::fs::metadata(path).ok().map(|found| found.dev());
    device(one).is_some_and(|of| Some(of) == device(other))
}

/// Why the disk did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another process holds the volume.
    #[error("cannot open volume `{}`: {} holds it", .root.display(), .pid.map_or("another process".into(), |pid| format!("process {pid}")))]
    Locked {
        /// The volume.
        root: PathBuf,
        /// The process that wrote its id into the lock, if it could be read.
        pid: Option<u32>,
    },
    /// The directory holds something else.
    #[error("cannot open volume `{}`: it is not a larder volume, {found}", .root.display())]
    Foreign {
        /// The directory.
        root: PathBuf,
        /// What was found.
        found: String,
    },
    /// A newer larder wrote it.
    #[error("cannot open volume `{}`: its format is {version}, this larder knows up to {FORMAT_VERSION}", .root.display())]
    Newer {
        /// The volume.
        root: PathBuf,
        /// Its format.
        version: u32,
    },
    /// A process has a lease of the kernel (`F_SETLEASE`) on a file of ours, and must give it up first.
    #[error("cannot {verb} `{}`: a process holds a lease of the kernel on it (F_SETLEASE)", .path.display())]
    Leased {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
    },
    /// The kernel does not say whether anybody has a file of ours open.
    #[error("cannot ask who has `{}` open: {source}", .path.display())]
    HoldersUnknown {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Nobody knows whether the bytes of a blob are right: it must be hashed.
    #[error("cannot use blob `{}`: it was touched since it was last hashed", .path.display())]
    Unproven {
        /// Where it is.
        path: PathBuf,
    },
    /// No space, no quota, or too large a file.
    #[error("cannot {verb} `{}`: {source}", .path.display())]
    Full {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A disk call failed.
    #[error("cannot {verb} `{}`: {source}", .path.display())]
    Disk {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An fsync failed: what was written may be lost, and the volume takes no more writes.
    #[error("cannot make `{}` durable: {source}", .path.display())]
    NotDurable {
        /// What could not be made durable.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The disk takes calls and does not answer them.
    #[error("cannot write to volume `{}`: its disk has not answered for {seconds} s", .root.display())]
    Silent {
        /// The volume.
        root: PathBuf,
        /// For how long.
        seconds: u64,
    },
    /// The volume takes no writes.
    #[error("cannot write to volume `{}`: {why}", .root.display())]
    ReadOnly {
        /// The volume.
        root: PathBuf,
        /// Since when and why.
        why: String,
    },
    /// Something on disk is missing, or is not what its name says.
    #[error("cannot {verb} {noun} `{}`: {found}", .path.display())]
    Corrupt {
        /// What was tried.
        verb: &'static str,
        /// Manifest, record, blob, …
        noun: &'static str,
        /// Where it is.
        path: PathBuf,
        /// What was found.
        found: String,
    },
    /// The bytes are not what the source claims.
    #[error("cannot keep `{what}`: the source claims {claimed}, its bytes are {found}")]
    Checksum {
        /// What was fetched.
        what: String,
        /// What the source claims.
        claimed: Checksum,
        /// What the bytes are.
        found: Checksum,
    },
    /// The bytes are more or fewer than the source claims.
    #[error("cannot keep `{what}`: the source claims {claimed} bytes, it sent {found}")]
    Length {
        /// What was fetched.
        what: String,
        /// Bytes the source claims.
        claimed: u64,
        /// Bytes that came.
        found: u64,
    },
    /// The same bytes are being written already.
    #[error("cannot begin the ingest of `{what}`: it is being written already")]
    InUse {
        /// What is fetched.
        what: String,
    },
    /// A name cannot become a path.
    #[error("cannot write {noun}: {source}")]
    Name {
        /// What was to be written.
        noun: &'static str,
        /// What is wrong with the name.
        source: RelPathError,
    },
    /// One revision is a directory of another (`a` and `a/b`): both cannot be files.
    #[error("cannot write the Hub ref `{revision}` of `{repo}`: `{}` is in its way", .path.display())]
    RefConflict {
        /// The repository.
        repo: String,
        /// The revision.
        revision: String,
        /// What is there.
        path: PathBuf,
    },
}

impl Diagnose for Error {
    fn code(&self) -> Code {
        match self {
            Error::Locked { .. } | Error::InUse { .. } => Code::VolumeLocked,
            Error::Leased { .. } | Error::HoldersUnknown { .. } => Code::ModelInUse,
            Error::Foreign { .. } => Code::VolumeForeign,
            Error::Newer { .. } => Code::VolumeNewer,
            Error::Full { .. } => Code::VolumeFull,
            Error::Disk { .. } => Code::DiskError,
            Error::Silent { .. } => Code::DiskStalled,
            Error::NotDurable { .. } | Error::ReadOnly { .. } => Code::VolumeReadOnly,
            Error::Corrupt { .. } | Error::Unproven { .. } => Code::StoreCorrupt,
            Error::Checksum { .. } => Code::ChecksumMismatch,
            Error::Length { .. } => Code::SourceProtocol,
            Error::Name { .. } | Error::RefConflict { .. } => Code::UnsafeName,
        }
    }

    fn action(&self) -> String {
        match self {
            Error::Locked { pid: Some(pid), .. } => {
                format!("ask the running daemon instead, or stop process {pid}, or choose another `volume.root`")
            }
            Error::Locked { pid: None, .. } => {
                "ask the running daemon instead, or stop it, or choose another `volume.root`".into()
            }
            Error::Leased { path, .. } => format!(
                "ask again in a minute: the kernel takes it from that process (`lsof {}` says which)",
                path.display()
            ),
            Error::HoldersUnknown { .. } => {
                "put the volume on a file system that has leases (ext4, xfs, btrfs), or give larder CAP_LEASE; until then \
                 nothing is evicted: `larder remove` does it by hand"
                    .into()
            }
            Error::Unproven { .. } => "open the model again: then it is hashed".into(),
            Error::Foreign { .. } => {
                "point `volume.root` at an empty directory; nothing in this one was touched".into()
            }
            Error::Newer { .. } => "run the larder that wrote it, or a newer one; nothing was touched".into(),
            Error::Full { path, .. } => {
                format!("free space or inodes on the file system of `{}`, or remove a model", path.display())
            }
            Error::Disk { source, .. } if source.kind() == std::io::ErrorKind::ReadOnlyFilesystem => {
                "look for why its file system is read-only (`dmesg`, `findmnt`), and mount it writable".into()
            }
            Error::Disk { path, .. } => {
                format!("look for disk errors (`dmesg`) and at the owner and mode of `{}`", path.display())
            }
            Error::Silent { .. } => {
                "look for what holds the disk up (`dmesg`, `iostat -x 1`); larder goes on by itself when it answers, and models \
                 that are local can be opened meanwhile"
                    .into()
            }
            Error::NotDurable { .. } | Error::ReadOnly { .. } => {
                "look for disk errors (`dmesg`), mend the disk, then restart larder; models that are local stay readable".into()
            }
            Error::Corrupt { noun: "manifest" | "blob", .. } => "remove the model it belongs to and pull it again".into(),
            Error::Corrupt { path, .. } => format!(
                "look at `{}`; larder did not write it so. Stop larder, move it out of the volume, start larder",
                path.display()
            ),
            Error::Checksum { .. } => {
                "pull again: none of these bytes is kept; if it stays so, the source or a proxy on the way sends wrong bytes".into()
            }
            Error::Length { .. } => "pull again; if it stays so, the source is wrong about its own files".into(),
            Error::InUse { .. } => "wait for the pull that writes it".into(),
            Error::Name { .. } => "ask for another revision or another name".into(),
            Error::RefConflict { .. } => {
                "remove the model of the revision that is in the way, or pull this one by its commit".into()
            }
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        // A lease is taken from its holder after 45 s at most; a disk may answer at any time.
        matches!(self, Error::Leased { .. } | Error::Silent { .. }).then_some(Duration::from_secs(10))
    }
}

/// What `FORMAT` and its neighbours say.
enum Found {
    Ours,
    New,
}

fn recognise(layout: &Layout) -> Result<Found, Error> {
    let root = || layout.root().to_owned();
    let foreign = |found: &str| Error::Foreign { root: root(), found: found.to_owned() };
    // The root itself may be a symbolic link: that is the operator's choice.
    if layout.root().exists() && !layout.root().is_dir() {
        return Err(foreign("it is not a directory"));
    }
    let text = match io::read_small(&layout.format()) {
        Ok(Some(bytes)) => String::from_utf8(bytes).map_err(|_| foreign("its `FORMAT` is not text"))?,
        Ok(None) => {
            let names = io::names_in(layout.root())?;
            return match names.iter().find(|name| !Layout::may_be_in_a_new_root(name)) {
                None => Ok(Found::New),
                Some(name) => Err(foreign(&format!("it has no `FORMAT` but holds {name:?}"))),
            };
        }
        Err(Error::Corrupt { .. }) => return Err(foreign("its `FORMAT` is not a file")),
        Err(e) => return Err(e),
    };
    let number = text.strip_prefix(FORMAT_NAME).and_then(|rest| rest.strip_prefix(' ')?.strip_suffix('\n'));
    match number.and_then(|number| number.parse().ok()) {
        Some(version) if text != format!("{FORMAT_NAME} {version}\n") => Err(foreign("its `FORMAT` is not ours")),
        Some(FORMAT_VERSION) => Ok(Found::Ours),
        Some(version) if version > FORMAT_VERSION => Err(Error::Newer { root: root(), version }),
        _ => Err(foreign("its `FORMAT` is not ours")),
    }
}

impl Volume {
    /// Takes the lock and makes what is missing of the tree. A root that is missing or empty becomes a volume; one that
    /// holds something else is refused ([`Error::Foreign`]), as is one in use ([`Error::Locked`]) and one a newer larder
    /// wrote ([`Error::Newer`]): in these cases nothing in it is changed.
    pub fn open(root: &Path) -> Result<Volume, Error> {
        let root = absolute(root)?;
        let layout = Layout::new(&root);
        recognise(&layout)?;
        Disk::make_root(&root)?;
        let disk = Disk::locked(&root, &layout.lock())?;
        // Again, because another process may have made the volume before we had the lock.
        if let Found::New = recognise(&layout)? {
            // FORMAT comes before the tree, so that a first start that is cut off leaves something we recognise.
            disk.unlink(&layout.format_scratch())?;
            let text = format!("{FORMAT_NAME} {FORMAT_VERSION}\n");
            disk.replace(&layout.format_scratch(), &layout.format(), text.as_bytes(), 0o444)?;
        }
        let mut made = false;
        for dir in layout.private_dirs() {
            made |= disk.make_dir(&dir, 0o700)?;
        }
        made |= disk.make_dir(&layout.public(), 0o755)?;
        if made {
            disk.sync_dir(&root)?;
        }
        let mut made = false;
        for dir in layout.blob_dirs() {
            made |= disk.make_dir(&dir, 0o700)?;
        }
        if made {
            disk.sync_dir(&layout.blobs())?;
        }
        let window = Some(Window::open(&layout.blobs())?);
        let stamps = Arc::new(Stamps::on(&root));
        Ok(Volume { disk: Arc::new(disk), layout, window, stamps, glances: Glances::default(), shape: Mutex::new(()) })
    }

    /// Makes a root that is missing, and gives it to a user and a group who can then open the volume. What is in it keeps its
    /// owner. A root that holds something else is refused, as by [`Volume::open`], and so is one of another format.
    pub fn give_root(root: &Path, user: u32, group: u32) -> Result<(), Error> {
        let root = absolute(root)?;
        recognise(&Layout::new(&root))?;
        Disk::make_root(&root)?;
        Disk::give_root(&root, user, group)
    }

    /// Without a lock and without a write: to look beside a running process. A root that is not there is an empty
    /// volume; every write fails with [`Error::ReadOnly`]. Whether bytes are right is not known here.
    pub fn open_reader(root: &Path) -> Result<Volume, Error> {
        let root = absolute(root)?;
        let layout = Layout::new(&root);
        recognise(&layout)?;
        let disk = Arc::new(Disk::for_reading(&root));
        Ok(Volume {
            disk,
            layout,
            window: None,
            stamps: Arc::default(),
            glances: Glances::default(),
            shape: Mutex::new(()),
        })
    }

    /// The directory, absolute.
    pub fn root(&self) -> &Path {
        self.layout.root()
    }

    /// The directory pods may see.
    pub fn public(&self) -> PathBuf {
        self.layout.public()
    }

    /// What keeps readers from writing through the descriptors of [`Volume::open_blob`].
    pub fn descriptors(&self) -> Descriptors {
        let beside = || Descriptors::FileModes { why: "another process holds the volume".into() };
        self.window.as_ref().map_or_else(beside, |window| window.descriptors().clone())
    }

    /// How much room the file system has.
    pub fn space(&self) -> Result<Space, Error> {
        let path = self.layout.root();
        Space::at(path).map_err(|error| io::failed("measure", path, error))
    }

    /// Whether a directory is there and on the same file system.
    pub fn shares_its_disk_with(&self, dir: &Path) -> bool {
        share_a_disk(dir, self.layout.root())
    }

    /// Why the volume takes no writes: after a failed fsync, or because it was opened for reading. `None` while it does.
    pub fn read_only_because(&self) -> Option<String> {
        self.disk.refuses().map(str::to_owned)
    }

    /// For how long the disk has left a call of ours unanswered; `None` when none is under way.
    pub fn silent_for(&self) -> Option<Duration> {
        self.disk.calls().silent_for()
    }

    /// Something to ask the disk, unless it has just answered, so short a time ago, or is asked nothing any more.
    pub fn question(&self, just: Duration) -> Option<Question> {
        if self.disk.refuses().is_some() || self.disk.calls().has_answered_within(just) {
            return None;
        }
        Some(Question { disk: self.disk.clone(), call: self.disk.calls().begin() })
    }

    /// The parent of a thing of ours has been changed: makes that durable.
    fn sync_parent(&self, path: &Path) -> Result<(), Error> {
        self.disk.sync_dir(path.parent().expect("a thing of ours has a parent"))
    }

    fn shape(&self) -> std::sync::MutexGuard<'_, ()> {
        // It guards no data, so a panic while it was held leaves nothing torn.
        self.shape.lock().unwrap_or_else(|held| held.into_inner())
    }
}

fn absolute(root: &Path) -> Result<PathBuf, Error> {
    std::path::absolute(root).map_err(|source| Error::Disk { verb: "find", path: root.to_owned(), source })
}

/// `12 B, not 10 B`: how a size differs.
fn sizes_differ(found: u64, expected: u64) -> String {
    if Bytes(found).to_string() == Bytes(expected).to_string() {
        format!("it has {found} bytes, not {expected}")
    } else {
        format!("it has {}, not {}", Bytes(found), Bytes(expected))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_missing_or_empty_root_becomes_a_volume() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("empty/lost+found")).unwrap();
        for root in ["missing/below", "empty"].map(|name| dir.path().join(name)) {
            let volume = Volume::open(&root).unwrap();
            assert_eq!(fs::read_to_string(root.join("FORMAT")).unwrap(), "larder-volume 1\n");
            let mode = |name: &str| fs::metadata(root.join(name)).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode("blobs"), mode("blobs/00"), mode("refs"), mode("public")), (0o700, 0o700, 0o700, 0o755));
            assert_eq!(fs::read_dir(root.join("blobs")).unwrap().count(), 256);
            assert!(volume.space().unwrap().free_bytes > 0);
            assert_eq!(volume.read_only_because(), None);
            drop(volume);
            Volume::open(&root).unwrap();
        }
    }

    #[test]
    fn a_first_start_that_was_cut_off_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("lock"), "1\n").unwrap();
        fs::write(dir.path().join("FORMAT.tmp"), "larder-vol").unwrap();
        drop(Volume::open(dir.path()).unwrap());
        assert!(!dir.path().join("FORMAT.tmp").exists());

        fs::remove_dir(dir.path().join("blobs/7f")).unwrap();
        fs::remove_dir(dir.path().join("pulls")).unwrap();
        Volume::open(dir.path()).unwrap();
        assert!(dir.path().join("blobs/7f").exists() && dir.path().join("pulls").exists());
    }

    #[test]
    fn the_second_opener_is_told_who_holds_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        let first = Volume::open(dir.path()).unwrap();
        let error = Volume::open(dir.path()).err().unwrap();
        assert_eq!(error.code(), Code::VolumeLocked);
        assert!(error.to_string().contains(&format!("process {} holds it", std::process::id())), "{error}");
        assert!(Volume::open_reader(dir.path()).is_ok());
        drop(first);
        Volume::open(dir.path()).unwrap();
    }

    #[test]
    fn foreign_and_newer_directories_are_refused_and_not_touched() {
        for (name, text, code) in [
            ("thesis.tex", "words", Code::VolumeForeign),
            ("FORMAT", "something else", Code::VolumeForeign),
            ("FORMAT", "", Code::VolumeForeign),
            ("FORMAT", "larder-volume 01\n", Code::VolumeForeign),
            ("FORMAT", "larder-volume 0\n", Code::VolumeForeign),
            ("FORMAT", "larder-volume 2\n", Code::VolumeNewer),
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join(name), text).unwrap();
            for opened in [Volume::open(dir.path()), Volume::open_reader(dir.path())] {
                let error = opened.err().unwrap();
                assert_eq!(error.code(), code, "{name} {text:?}: {error}");
            }
            assert_eq!(io::names_in(dir.path()).unwrap(), [name]);
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        assert_eq!(Volume::open(file.path()).err().unwrap().code(), Code::VolumeForeign);
    }

    #[test]
    fn a_reader_sees_nothing_where_nothing_is_and_writes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("missing");
        let reader = Volume::open_reader(&root).unwrap();
        let (records, errors) = reader.records().unwrap();
        assert!(records.is_empty() && errors.is_empty());
        assert!(reader.blobs().unwrap().is_empty());
        assert!(reader.notes::<PendingPull>().unwrap().0.is_empty());
        let error = reader.remove_note::<PendingPull>("x").unwrap_err();
        assert_eq!(error.code(), Code::VolumeReadOnly);
        assert!(!root.exists());
    }
}

//! Every call that changes the disk, and how it can fail. Nothing else in `store` creates, writes, links or removes.
//!
//! No name of ours is followed when it is a symbolic link, and nothing is opened that could block (a FIFO).

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, SystemTime};

use rustix::fs::{FallocateFlags, FlockOperation, OFlags};
use rustix::io::Errno;

use super::Error;
use super::calls::{Call, Calls};

/// Most bytes of a file that is read or written as a whole. The longest manifest (100,000 files with paths of 1,024
/// bytes) is a little shorter.
pub(super) const MAX_SMALL_FILE_BYTES: usize = 128 << 20;

/// How often an open that would have to wait is tried again, a millisecond apart.
const OPENED_AGAIN: usize = 10;

/// The disk below one root, and whether it still takes writes.
pub(super) struct Disk {
    root: PathBuf,
    /// Set once and for ever: why no more writes are taken.
    refuses: OnceLock<String>,
    calls: Calls,
    /// Held while this value lives: an ingest keeps it too, so nobody else opens a volume that is still written.
    lock: Option<LockedFile>,
}

/// Flags of every open: a planted symbolic link is an error, a planted FIFO does not block.
fn guarded() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32);
    options
}

pub(super) fn failed(verb: &'static str, path: &Path, error: io::Error) -> Error {
    let path = path.to_owned();
    let full = [Errno::NOSPC, Errno::DQUOT, Errno::FBIG];
    if full.iter().any(|errno| error.raw_os_error() == Some(errno.raw_os_error())) {
        Error::Full { verb, path, source: error }
    } else if error.kind() == io::ErrorKind::WouldBlock {
        Error::Leased { verb, path }
    } else if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) {
        Error::Corrupt { verb, noun: "file", path, found: "it is a symbolic link".into() }
    } else {
        Error::Disk { verb, path, source: error }
    }
}

/// The metadata of the name itself, or `None` when nothing has the name.
pub(super) fn look_at(path: &Path) -> Result<Option<fs::Metadata>, Error> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(e) => Err(failed("look at", path, e)),
    }
}

/// Bytes of the disk that a file takes.
pub(super) fn allocated_bytes(metadata: &fs::Metadata) -> u64 {
    // POSIX counts blocks of 512 bytes, whatever the file system's own blocks are.
    metadata.blocks() * 512
}

/// Opens, and again a little later when that would have to wait for a lease of the kernel: our own question who has a file
/// open is in the way for an instant. Who holds one for longer is another process.
pub(super) fn patiently<T>(open: impl Fn() -> io::Result<T>) -> io::Result<T> {
    for _ in 0..OPENED_AGAIN {
        match open() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::park_timeout(Duration::from_millis(1)),
            done => return done,
        }
    }
    open()
}

/// Opens a regular file for reading; `None` when nothing has the name.
pub(super) fn open_file(path: &Path) -> Result<Option<File>, Error> {
    let file = match patiently(|| guarded().read(true).open(path)) {
        Ok(file) => file,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => return Ok(None),
        Err(e) => return Err(failed("open", path, e)),
    };
    must_be_regular(&file, path)?;
    Ok(Some(file))
}

fn must_be_regular(file: &File, path: &Path) -> Result<(), Error> {
    let metadata = file.metadata().map_err(|e| failed("look at", path, e))?;
    if metadata.is_file() {
        return Ok(());
    }
    Err(Error::Corrupt { verb: "open", noun: "file", path: path.to_owned(), found: "it is not a regular file".into() })
}

/// Reads a whole small file; `None` when nothing has the name.
pub(super) fn read_small(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let Some(file) = open_file(path)? else { return Ok(None) };
    let mut bytes = Vec::new();
    file.take(MAX_SMALL_FILE_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(|e| failed("read", path, e))?;
    if bytes.len() > MAX_SMALL_FILE_BYTES {
        let found = "it is larger than 128 MiB".into();
        return Err(Error::Corrupt { verb: "read", noun: "file", path: path.to_owned(), found });
    }
    Ok(Some(bytes))
}

/// Reads on from where the file stands; fewer bytes than asked for only at its end.
pub(super) fn read_up_to(mut file: &File, path: &Path, buffer: &mut [u8]) -> Result<usize, Error> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(failed("read", path, e)),
        }
    }
    Ok(filled)
}

/// The names in a directory, sorted; none when it is not there. Names that are not UTF-8 are not ours and are left out.
pub(super) fn names_in(dir: &Path) -> Result<Vec<String>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed("list", dir, e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| failed("list", dir, e))?;
        names.extend(entry.file_name().into_string().ok());
    }
    names.sort();
    Ok(names)
}

/// Everything in a directory, whatever its name, and whether it is a directory; nothing when it is not there.
pub(super) fn entries_in(dir: &Path) -> Result<Vec<(PathBuf, bool)>, Error> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed("list", dir, e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| failed("list", dir, e))?;
        let is_dir = entry.file_type().map_err(|e| failed("look at", &entry.path(), e))?.is_dir();
        found.push((entry.path(), is_dir));
    }
    Ok(found)
}

/// A file nobody else holds.
pub(super) struct LockedFile(File);

impl std::ops::Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for LockedFile {
    /// Closing is not enough: a child process between fork and exec has the same open file, and with it the lock.
    fn drop(&mut self) {
        // When it fails, closing the file still gives the lock back.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

fn write_process_id(lock: &File) -> io::Result<()> {
    let text = format!("{}\n", std::process::id());
    lock.write_all_at(text.as_bytes(), 0)?;
    lock.set_len(text.len() as u64)
}

/// Locks the file, unless somebody holds it.
pub(super) fn try_lock(file: File, path: &Path) -> Result<Option<LockedFile>, Error> {
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(LockedFile(file))),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(e) => Err(failed("lock", path, e.into())),
    }
}

impl Disk {
    /// Makes the root if it is not there. It is the one directory whose parents are made too.
    pub(super) fn make_root(root: &Path) -> Result<(), Error> {
        if root.is_dir() {
            return Ok(());
        }
        let made = DirBuilder::new().recursive(true).mode(0o755).create(root);
        // Pods enter it on their way to `public/`, whatever the umask says.
        let made = made.and_then(|()| fs::set_permissions(root, Permissions::from_mode(0o755)));
        made.map_err(|e| failed("create", root, e))
    }

    /// Gives the root to a user and a group, if it is not theirs.
    pub(super) fn give_root(root: &Path, user: u32, group: u32) -> Result<(), Error> {
        let found = fs::metadata(root).map_err(|e| failed("look at", root, e))?;
        if (found.uid(), found.gid()) == (user, group) {
            return Ok(());
        }
        chown(root, Some(user), Some(group)).map_err(|e| failed("give away", root, e))
    }

    /// Takes the lock of the volume and writes our process id into it.
    pub(super) fn locked(root: &Path, lock: &Path) -> Result<Disk, Error> {
        let mut options = guarded();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(lock).map_err(|e| failed("create", lock, e))?;
        must_be_regular(&file, lock)?;
        let Some(file) = try_lock(file, lock)? else {
            let bytes = read_small(lock)?.unwrap_or_default();
            let pid = std::str::from_utf8(&bytes).ok().and_then(|text| text.trim().parse().ok());
            return Err(Error::Locked { root: root.to_owned(), pid });
        };
        // The lock is what counts. On a full disk the text may fail, and larder must start there to remove a model.
        let _ = write_process_id(&file);
        Ok(Disk { root: root.to_owned(), refuses: OnceLock::new(), calls: Calls::default(), lock: Some(file) })
    }

    /// A disk that takes no writes.
    pub(super) fn for_reading(root: &Path) -> Disk {
        let refuses = OnceLock::from("it was opened for reading only".to_owned());
        Disk { root: root.to_owned(), refuses, calls: Calls::default(), lock: None }
    }

    /// Why no more writes are taken.
    pub(super) fn refuses(&self) -> Option<&str> {
        self.refuses.get().map(String::as_str)
    }

    /// Which calls are under way.
    pub(super) fn calls(&self) -> &Calls {
        &self.calls
    }

    /// Has the disk itself answer a call: a few bytes that are there already are written to it. What it answers does not
    /// matter here.
    pub(super) fn ask(&self, call: Call) {
        if let Some(lock) = &self.lock {
            let _ = write_process_id(lock).and_then(|()| lock.sync_data());
        }
        call.answered();
    }

    /// Before each call that changes the disk.
    fn begin(&self) -> Result<Call, Error> {
        match self.refuses() {
            None => Ok(self.calls.begin()),
            Some(why) => Err(Error::ReadOnly { root: self.root.clone(), why: why.to_owned() }),
        }
    }

    /// After a failed fsync the kernel may have dropped the bytes and marked them clean: a second fsync would succeed
    /// and prove nothing. So it is never retried, and nothing is written after it.
    fn poisoned(&self, path: &Path, error: io::Error) -> Error {
        let why = format!("`{}` could not be made durable: {error}", path.display());
        self.refuses.get_or_init(|| why);
        Error::NotDurable { path: path.to_owned(), source: error }
    }

    /// Makes the bytes of a file durable, and as much of its metadata as is needed to read them.
    pub(super) fn sync_data(&self, file: &File, path: &Path) -> Result<(), Error> {
        let call = self.begin()?;
        let synced = file.sync_data();
        call.answered();
        synced.map_err(|e| self.poisoned(path, e))
    }

    /// Makes the names in a directory durable.
    pub(super) fn sync_dir(&self, dir: &Path) -> Result<(), Error> {
        let call = self.begin()?;
        let file = self.open_dir(dir)?;
        let synced = file.sync_all();
        call.answered();
        synced.map_err(|e| self.poisoned(dir, e))
    }

    fn open_dir(&self, dir: &Path) -> Result<File, Error> {
        let mut options = OpenOptions::new();
        options.read(true).custom_flags((OFlags::NOFOLLOW | OFlags::DIRECTORY).bits() as i32);
        options.open(dir).map_err(|e| failed("open", dir, e))
    }

    /// Sets the mode of a file.
    pub(super) fn set_mode(&self, file: &File, path: &Path, mode: u32) -> Result<(), Error> {
        let _call = self.begin()?;
        file.set_permissions(Permissions::from_mode(mode)).map_err(|e| failed("set the mode of", path, e))
    }

    /// Sets the mode of a directory.
    pub(super) fn set_dir_mode(&self, dir: &Path, mode: u32) -> Result<(), Error> {
        let _call = self.begin()?;
        let file = self.open_dir(dir)?;
        self.set_mode(&file, dir, mode)
    }

    /// Makes one directory with exactly this mode, whatever the umask. `false` when it was there already.
    pub(super) fn make_dir(&self, dir: &Path, mode: u32) -> Result<bool, Error> {
        let _call = self.begin()?;
        match DirBuilder::new().mode(mode).create(dir) {
            Ok(()) => {
                if look_at(dir)?.is_some_and(|made| made.mode() & 0o777 != mode) {
                    self.set_dir_mode(dir, mode)?;
                }
                Ok(true)
            }
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {
                if look_at(dir)?.is_some_and(|found| found.is_dir()) {
                    return Ok(false);
                }
                let found = "it is there and not a directory".into();
                Err(Error::Corrupt { verb: "create", noun: "directory", path: dir.to_owned(), found })
            }
            Err(e) => Err(failed("create", dir, e)),
        }
    }

    /// Creates a file that is not there yet, readable and writable by us alone.
    pub(super) fn create_new(&self, path: &Path) -> Result<File, Error> {
        let _call = self.begin()?;
        guarded().write(true).create_new(true).mode(0o600).open(path).map_err(|e| failed("create", path, e))
    }

    /// Opens a file to read and write it, and makes it if it is not there.
    pub(super) fn open_or_create(&self, path: &Path) -> Result<File, Error> {
        let _call = self.begin()?;
        let mut options = guarded();
        options.read(true).write(true).create(true).truncate(false).mode(0o600);
        let file = options.open(path).map_err(|e| failed("create", path, e))?;
        must_be_regular(&file, path)?;
        Ok(file)
    }

    /// Writes at an offset: after a failure the same call can be made again.
    pub(super) fn write_at(&self, file: &File, path: &Path, bytes: &[u8], offset: u64) -> Result<(), Error> {
        let _call = self.begin()?;
        file.write_all_at(bytes, offset).map_err(|e| failed("write", path, e))
    }

    /// Opens a file that is there once more, for writes that go past the page cache: at offsets, from addresses and of
    /// lengths that are multiples of the logical block. `None`: this file system has no such writes.
    pub(super) fn open_direct(&self, path: &Path) -> Result<Option<File>, Error> {
        let _call = self.begin()?;
        let flags = (OFlags::DIRECT | OFlags::NOFOLLOW | OFlags::NONBLOCK).bits();
        match OpenOptions::new().write(true).custom_flags(flags.cast_signed()).open(path) {
            Ok(file) => Ok(Some(file)),
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(None),
            Err(e) => Err(failed("open", path, e)),
        }
    }

    /// The same as [`Disk::write_at`] for such a file; `false`: the device wants another alignment, and nothing is written.
    pub(super) fn write_direct_at(&self, file: &File, path: &Path, bytes: &[u8], offset: u64) -> Result<bool, Error> {
        let _call = self.begin()?;
        match file.write_all_at(bytes, offset) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(false),
            Err(e) => Err(failed("write", path, e)),
        }
    }

    /// Sets the length, and gives back what was preallocated beyond it.
    pub(super) fn set_len(&self, file: &File, path: &Path, length: u64) -> Result<(), Error> {
        let _call = self.begin()?;
        file.set_len(length).map_err(|e| failed("truncate", path, e))
    }

    /// Sets when the bytes of a file were last changed.
    pub(super) fn set_modified(&self, file: &File, path: &Path, at: SystemTime) -> Result<(), Error> {
        let _call = self.begin()?;
        file.set_modified(at).map_err(|e| failed("set the time of", path, e))
    }

    /// Asks for the space of a file before its bytes come, so that a full disk is known early. A file system that
    /// cannot promise is not an error.
    pub(super) fn preallocate(&self, file: &File, path: &Path, length: u64) -> Result<(), Error> {
        let _call = self.begin()?;
        match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, length) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Ok(()),
            Err(e) => Err(failed("reserve space for", path, e.into())),
        }
    }

    /// Gives a thing another name. What had the new name is replaced.
    pub(super) fn rename(&self, from: &Path, to: &Path) -> Result<(), Error> {
        let _call = self.begin()?;
        fs::rename(from, to).map_err(|e| failed("rename to", to, e))
    }

    /// Makes an empty file share the bytes of another, where the file system can; `false` where it cannot.
    pub(super) fn clone_bytes(&self, from: &File, to: &File, path: &Path) -> Result<bool, Error> {
        let _call = self.begin()?;
        match rustix::fs::ioctl_ficlone(to, from) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS | Errno::INVAL | Errno::XDEV) => Ok(false),
            Err(e) => Err(failed("write", path, e.into())),
        }
    }

    /// Gives a file a second name. `false` when the file has as many as the file system allows.
    pub(super) fn link(&self, from: &Path, to: &Path) -> Result<bool, Error> {
        let _call = self.begin()?;
        match fs::hard_link(from, to) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(Errno::MLINK.raw_os_error()) => Ok(false),
            Err(e) => Err(failed("link", to, e)),
        }
    }

    /// Takes a name away. `false` when nothing had it.
    pub(super) fn unlink(&self, path: &Path) -> Result<bool, Error> {
        let _call = self.begin()?;
        match fs::remove_file(path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(failed("remove", path, e)),
        }
    }

    /// Removes a directory if it is empty; `false` when it is not, or not there.
    pub(super) fn remove_empty_dir(&self, dir: &Path) -> Result<bool, Error> {
        let _call = self.begin()?;
        match fs::remove_dir(dir) {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => Ok(false),
            Err(e) => Err(failed("remove", dir, e)),
        }
    }

    /// Removes a directory and all below it, read-only directories too; `unlink` removes the files. Links are removed, never
    /// followed.
    pub(super) fn remove_tree(
        &self,
        top: &Path,
        mut unlink: impl FnMut(&Path) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        if look_at(top)?.is_none() {
            return Ok(());
        }
        let mut dirs = Vec::new();
        let mut ahead = vec![top.to_owned()];
        while let Some(dir) = ahead.pop() {
            self.set_dir_mode(&dir, 0o700)?;
            for (path, is_dir) in entries_in(&dir)? {
                if is_dir {
                    ahead.push(path);
                } else {
                    unlink(&path)?;
                }
            }
            dirs.push(dir);
        }
        // A directory was put down before those below it, so the reverse order is inside out.
        for dir in dirs.iter().rev() {
            self.remove_empty_dir(dir)?;
        }
        Ok(())
    }

    /// Writes a whole small file durably: `scratch` -> fsync -> rename -> fsync(dir). A reader sees the old file or the
    /// new one. `scratch` is a name on the same file system that nothing has.
    pub(super) fn replace(&self, scratch: &Path, path: &Path, bytes: &[u8], mode: u32) -> Result<(), Error> {
        if bytes.len() > MAX_SMALL_FILE_BYTES {
            let found = format!("it has {} bytes, more than 128 MiB", bytes.len());
            return Err(Error::Corrupt { verb: "write", noun: "file", path: path.to_owned(), found });
        }
        let file = self.create_new(scratch)?;
        let placed = self
            .write_at(&file, path, bytes, 0)
            .and_then(|()| self.set_mode(&file, scratch, mode))
            .and_then(|()| self.sync_data(&file, path))
            .and_then(|()| self.rename(scratch, path));
        if placed.is_err() {
            // The first error is the one to report; start-up sweeps what stays behind.
            let _ = self.unlink(scratch);
        }
        placed?;
        self.sync_dir(path.parent().expect("a file of ours has a parent"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Code, Diagnose};

    fn disk(root: &Path) -> Disk {
        Disk::locked(root, &root.join("lock")).unwrap()
    }

    #[test]
    fn after_a_failed_fsync_nothing_is_written_any_more() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(dir.path());
        assert_eq!(disk.refuses(), None);
        // Linux refuses to fsync a character device.
        let device = File::open("/dev/null").unwrap();
        let error = disk.sync_data(&device, Path::new("/dev/null")).unwrap_err();
        assert_eq!(error.code(), Code::VolumeReadOnly);

        assert!(disk.refuses().unwrap().contains("/dev/null"));
        for result in [
            disk.create_new(&dir.path().join("x")).map(drop),
            disk.make_dir(&dir.path().join("d"), 0o700).map(drop),
            disk.unlink(&dir.path().join("lock")).map(drop),
            disk.sync_dir(dir.path()),
        ] {
            assert_eq!(result.unwrap_err().code(), Code::VolumeReadOnly);
        }
        assert_eq!(names_in(dir.path()).unwrap(), ["lock"]);
    }

    #[test]
    fn a_full_disk_is_told_apart_from_a_broken_one() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(dir.path());
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = disk.write_at(&full, Path::new("/dev/full"), b"x", 0).unwrap_err();
        assert_eq!(error.code(), Code::VolumeFull);
        for errno in [Errno::DQUOT, Errno::FBIG] {
            assert_eq!(failed("write", Path::new("x"), errno.into()).code(), Code::VolumeFull);
        }
        assert_eq!(failed("write", Path::new("x"), Errno::IO.into()).code(), Code::DiskError);
        // What an open says that would have to wait for a lease of the kernel.
        let leased = failed("open", Path::new("x"), Errno::AGAIN.into());
        assert_eq!((leased.code(), leased.retry_after().is_some()), (Code::ModelInUse, true));
        assert_eq!(disk.refuses(), None);
    }

    #[test]
    fn links_and_fifos_are_neither_followed_nor_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(dir.path());
        let (link, fifo, target) = (dir.path().join("link"), dir.path().join("fifo"), dir.path().join("target"));
        fs::write(&target, "precious").unwrap();
        std::os::unix::fs::symlink(&target, &link).unwrap();
        let status = std::process::Command::new("mkfifo").arg(&fifo).status();
        for path in [Some(&link), status.is_ok_and(|s| s.success()).then_some(&fifo)].into_iter().flatten() {
            assert_eq!(read_small(path).unwrap_err().code(), Code::StoreCorrupt);
            assert_eq!(disk.open_or_create(path).unwrap_err().code(), Code::StoreCorrupt);
            assert!(disk.create_new(path).is_err());
        }
        disk.replace(&dir.path().join("scratch"), &link, b"new", 0o600).unwrap();
        assert_eq!(fs::read(&target).unwrap(), b"precious");
        assert_eq!(read_small(&link).unwrap().unwrap(), b"new");
    }

    #[test]
    fn trees_are_removed_without_following_links() {
        let dir = tempfile::tempdir().unwrap();
        let disk = disk(dir.path());
        let (top, outside) = (dir.path().join("top"), dir.path().join("outside"));
        fs::create_dir_all(top.join("a/b")).unwrap();
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("precious"), "x").unwrap();
        fs::write(top.join("a/b/file"), "x").unwrap();
        std::os::unix::fs::symlink(&outside, top.join("a/link")).unwrap();
        for locked in ["a/b", "a", ""] {
            fs::set_permissions(top.join(locked), Permissions::from_mode(0o555)).unwrap();
        }
        disk.remove_tree(&top, |path| disk.unlink(path)).unwrap();
        assert!(look_at(&top).unwrap().is_none());
        assert!(outside.join("precious").exists());
    }
}

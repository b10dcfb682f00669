//! Stamps: how the inodes looked that are known to hold the right bytes, and how we change their names without losing that
//! knowledge.
//!
//! An inode whose stamp still fits needs no look at its bytes. One without a stamp, or with another one than it had, is
//! hashed again before it is handed out ([`Volume::prove`]).

use std::collections::{BTreeSet, HashMap};
use std::fs::{File, Metadata};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};

use super::io::{self, look_at};
use super::layout::Scratch;
use super::{Error, Volume};
use crate::model::{Digest, Digester, Stamp};
use crate::wire::guard::{ReadLease, place_of};

/// Most files that are kept from writers at the same time; each takes a descriptor.
const MAX_LEASES: usize = 128;

/// How often the kernel is asked for a lease that it refuses.
const LEASE_ATTEMPTS: u32 = 3;

/// `statfs` types of the file systems on which a writer can exchange blocks of two files without moving a time: ext4, XFS.
const EXCHANGES_BLOCKS: [u64; 2] = [0xEF53, 0x5846_5342];

/// The mode of a blob, and of every link to it.
pub(super) const BLOB_MODE: u32 = 0o444;

/// By inode, because a blob that has run out of links has several.
#[derive(Default)]
pub(super) struct Stamps {
    /// Whether blocks of two files can be exchanged here.
    with_place: bool,
    known: Mutex<Known>,
    /// Held while a change of ours to names has moved a ctime, and the stamp does not say so yet.
    touching: Mutex<()>,
}

#[derive(Default)]
struct Known {
    by_inode: HashMap<u64, (Digest, Stamp)>,
    /// Since [`Volume::changed_stamps`] was last asked.
    changed: BTreeSet<u64>,
}

/// A stamp that is new, or gone; by inode.
pub type StampChange = (u64, Option<(Digest, Stamp)>);

/// What a look at the bytes of a blob found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// They are right, and so is the inode: nobody can write it.
    Right,
    /// They are right, but somebody could write the inode, or had changed its mode or owner: the blob is another inode now,
    /// and snapshots that link the former one are to be laid out again.
    Renewed,
    /// They are wrong: those of this inode.
    Wrong {
        /// The inode.
        inode: u64,
    },
    /// There is no such blob.
    Missing,
}

impl Stamps {
    /// Stamps of the file system that `root` is on.
    pub(super) fn on(root: &Path) -> Stamps {
        let kind = rustix::fs::statfs(root).map_or(0, |found| u64::try_from(found.f_type).unwrap_or(0));
        Stamps { with_place: EXCHANGES_BLOCKS.contains(&kind), ..Stamps::default() }
    }

    /// How the inode of a file looks now.
    pub(super) fn of(&self, file: &File, path: &Path) -> Result<Stamp, Error> {
        let cannot = |source| Error::Disk { verb: "look at", path: path.to_owned(), source };
        let place = if self.with_place { place_of(file).map_err(cannot)? } else { 0 };
        Ok(stamp_of(&file.metadata().map_err(cannot)?, place))
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Each change is one call per field; a stamp that is not noted as changed only costs a hash after a restart.
        self.known.lock().unwrap_or_else(|held| held.into_inner())
    }

    /// Waits until no name of ours is being changed, and keeps it so.
    pub(super) fn settled(&self) -> Settled<'_> {
        // It guards no data.
        Settled { stamps: self, _held: self.touching.lock().unwrap_or_else(|held| held.into_inner()) }
    }

    /// Whether this file is known to hold these bytes. A change of ours to its names is waited for.
    pub(super) fn fits(&self, digest: Digest, file: &File, path: &Path) -> Result<bool, Error> {
        match self.look(digest, file, path)? {
            Some(false) => Ok(self.settled().stamps.look(digest, file, path)? == Some(true)),
            known => Ok(known.unwrap_or(false)),
        }
    }

    /// Whether what has this name is the inode that is known to hold these bytes, and nobody wrote to it. Opens nothing, so
    /// it does not see where the bytes are now.
    pub(super) fn fits_but_for_place(&self, digest: Digest, path: &Path) -> Result<bool, Error> {
        let Some(found) = look_at(path)?.filter(Metadata::is_file) else { return Ok(false) };
        let known = self.get(found.ino());
        Ok(known.is_some_and(|(of, known)| of == digest && known == stamp_of(&found, known.place)))
    }

    /// Whether what has this name is known to hold these bytes. What is no regular file holds none.
    pub(super) fn fits_at(&self, digest: Digest, path: &Path) -> Result<bool, Error> {
        self.regular_at(path)?.map_or(Ok(false), |file| self.fits(digest, &file, path))
    }

    fn regular_at(&self, path: &Path) -> Result<Option<File>, Error> {
        match io::open_file(path) {
            Err(Error::Corrupt { .. }) => Ok(None),
            opened => opened,
        }
    }

    /// Whether its stamp is of these bytes and fits; `None` if it has none.
    fn look(&self, digest: Digest, file: &File, path: &Path) -> Result<Option<bool>, Error> {
        let now = self.of(file, path)?;
        Ok(self.get(now.inode).map(|(of, known)| of == digest && known == now))
    }

    /// A blob was hashed and is right; `false` if it is another inode by now.
    fn put_if_still(&self, digest: Digest, path: &Path, stamp: Stamp) -> Result<bool, Error> {
        let _settled = self.settled();
        let is_still = look_at(path)?.is_some_and(|found| found.ino() == stamp.inode);
        if is_still {
            self.put(digest, stamp);
        }
        Ok(is_still)
    }

    pub(super) fn put(&self, digest: Digest, stamp: Stamp) {
        let mut known = self.known();
        if known.by_inode.insert(stamp.inode, (digest, stamp)) != Some((digest, stamp)) {
            known.changed.insert(stamp.inode);
        }
    }

    pub(super) fn forget(&self, inode: u64) {
        let mut known = self.known();
        if known.by_inode.remove(&inode).is_some() {
            known.changed.insert(inode);
        }
    }

    fn get(&self, inode: u64) -> Option<(Digest, Stamp)> {
        self.known().by_inode.get(&inode).copied()
    }
}

/// No name of ours is being changed while this is held, so a stamp that does not fit was not made to by us.
pub(super) struct Settled<'a> {
    stamps: &'a Stamps,
    _held: MutexGuard<'a, ()>,
}

impl Settled<'_> {
    /// The same as [`Stamps::fits_at`].
    pub(super) fn fits_at(&self, digest: Digest, path: &Path) -> Result<bool, Error> {
        let file = self.stamps.regular_at(path)?;
        Ok(file.map_or(Ok(None), |file| self.stamps.look(digest, &file, path))? == Some(true))
    }

    /// `put_in_place` gives a blob another inode: what was known of the former one is forgotten, so that snapshots which
    /// link it are laid out again.
    pub(super) fn replace(&self, path: &Path, put_in_place: impl FnOnce() -> Result<(), Error>) -> Result<(), Error> {
        let former = look_at(path)?;
        put_in_place()?;
        if let Some(former) = former {
            self.stamps.forget(former.ino());
        }
        Ok(())
    }
}

fn stamp_of(found: &Metadata, place: u64) -> Stamp {
    let ns = |seconds: i64, ns: i64| i128::from(seconds) * 1_000_000_000 + i128::from(ns);
    Stamp {
        inode: found.ino(),
        size: found.len(),
        mtime_ns: ns(found.mtime(), found.mtime_nsec()),
        ctime_ns: ns(found.ctime(), found.ctime_nsec()),
        place,
    }
}

/// Changes of ours to the names of inodes: they move ctime, and must not look like somebody else's change. Nor may a change
/// of somebody else hide behind ours, so the kernel keeps writers away meanwhile.
pub(super) struct Touch<'a> {
    stamps: &'a Stamps,
    leases: Vec<ReadLease>,
}

impl<'a> Touch<'a> {
    pub(super) fn of(stamps: &'a Stamps) -> Touch<'a> {
        Touch { stamps, leases: Vec::new() }
    }

    /// Does `act`, which links or unlinks the inode that has this name. A stamp that fitted before fits afterwards, unless
    /// somebody could write the bytes meanwhile.
    pub(super) fn around<T>(&mut self, path: &Path, act: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        // Without a stamp there is none that could be lost, and what is not opened breaks no lease of the kernel.
        if look_at(path)?.is_none_or(|found| self.stamps.get(found.ino()).is_none()) {
            return act();
        }
        let file = match io::open_file(path) {
            Ok(Some(file)) => Arc::new(file),
            _ => return act(),
        };
        let before = self.stamps.of(&file, path)?;
        let Some((digest, _)) = self.stamps.get(before.inode).filter(|(_, stamp)| *stamp == before) else {
            return act();
        };
        let lease = match lease_on(&file) {
            Ok(lease) => Some(lease),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return act(),
            // A file system without leases: what mtime and size say must be enough.
            Err(_) => None,
        };
        let settled = self.stamps.settled();
        // Once more, under the lease: from here on only names, mode, owner and times can change.
        if self.stamps.of(&file, path)? != before || self.stamps.get(before.inode) != Some((digest, before)) {
            return act();
        }
        let done = act()?;
        let after = self.stamps.of(&file, path)?;
        if file.metadata().is_ok_and(|found| found.nlink() == 0) {
            self.stamps.forget(before.inode);
        } else if after.differs_by_ctime_at_most(&before) {
            self.stamps.put(digest, after);
        }
        drop(settled);
        self.leases.extend(lease);
        if self.leases.len() >= MAX_LEASES {
            self.settle();
        }
        Ok(done)
    }

    /// Lets writers in again, once their changes cannot carry the same ctime as ours.
    fn settle(&mut self) {
        if self.leases.is_empty() {
            return;
        }
        wait_for_a_tick();
        for lease in self.leases.drain(..).filter(|lease| !lease.holds()) {
            if let Ok(found) = lease.file().metadata() {
                self.stamps.forget(found.ino());
            }
        }
    }
}

impl Drop for Touch<'_> {
    fn drop(&mut self) {
        self.settle();
    }
}

/// The kernel stamps files with a clock that stands still for some milliseconds: two changes in between carry the same
/// time. After this, a change carries a later one than all before.
fn wait_for_a_tick() {
    let now = || {
        let time = clock_gettime(ClockId::RealtimeCoarse);
        (time.tv_sec, time.tv_nsec)
    };
    let before = now();
    while now() == before {
        thread::park_timeout(Duration::from_millis(1));
    }
}

impl Volume {
    /// Start-up: what the index remembers. A stamp that does not fit its inode any more is worth nothing, and does no harm.
    pub fn recall_stamps(&self, stamps: impl IntoIterator<Item = (Digest, Stamp)>) {
        let by_inode = stamps.into_iter().map(|(digest, stamp)| (stamp.inode, (digest, stamp)));
        self.stamps.known().by_inode.extend(by_inode);
    }

    /// What has changed since this was last asked, for the index to remember.
    pub fn changed_stamps(&self) -> Vec<StampChange> {
        let mut known = self.stamps.known();
        let changed = std::mem::take(&mut known.changed);
        changed.into_iter().map(|inode| (inode, known.by_inode.get(&inode).copied())).collect()
    }

    /// Whether a blob is here and known to be right, without a look at its bytes.
    pub fn is_proven(&self, digest: Digest) -> Result<bool, Error> {
        self.vouches_for(digest, &self.blob_path(digest))
    }

    /// Whether what has this name is known to hold these bytes. Beside the process that has the stamps nothing can be known:
    /// there it must be enough to be the blob.
    pub(super) fn vouches_for(&self, digest: Digest, path: &Path) -> Result<bool, Error> {
        if self.window.is_some() {
            return self.stamps.fits_at(digest, path);
        }
        let (found, blob) = (look_at(path)?, look_at(&self.blob_path(digest))?);
        Ok(found.zip(blob).is_some_and(|(found, blob)| found.is_file() && found.ino() == blob.ino()))
    }

    /// Hashes a blob, and stamps it if its bytes are right.
    ///
    /// An inode is stamped only if the kernel says that nobody can write it: a map that somebody made while he could would
    /// let him change the bytes later without moving ctime. Otherwise a copy takes its place. Reads the whole blob, so it
    /// takes time; nothing is locked meanwhile.
    pub fn prove(&self, digest: Digest, size: u64) -> Result<Proof, Error> {
        let path = self.blob_path(digest);
        let Some(file) = io::open_file(&path)?.map(Arc::new) else { return Ok(Proof::Missing) };
        let look =
            |file: &File| file.metadata().map_err(|source| Error::Disk { verb: "look at", path: path.clone(), source });
        let before = self.stamps.of(&file, &path)?;
        let known = self.stamps.get(before.inode).filter(|(of, _)| *of == digest).map(|(_, stamp)| stamp);
        if known == Some(before) {
            return Ok(Proof::Right);
        }
        let lease = lease_on(&file).ok();
        if before.size != size || hash_of(&file, &path, size)? != digest {
            return Ok(Proof::Wrong { inode: before.inode });
        }
        let after = self.stamps.of(&file, &path)?;
        wait_for_a_tick();
        let found = look(&file)?;
        // After an exchange of blocks the bytes in memory may be right where those on the disk are not: they are written anew.
        let is_in_place = known.is_none_or(|known| known.place == after.place);
        let is_ours = found.mode() & 0o7777 == BLOB_MODE && found.uid() == rustix::process::geteuid().as_raw();
        if is_in_place && is_ours && has_no_attributes(&file) && lease.is_some_and(|lease| lease.holds()) {
            // If not, an ingest of the same bytes has put its own in its place meanwhile.
            let is_right = self.stamps.put_if_still(digest, &path, after)? || self.is_proven(digest)?;
            return if is_right { Ok(Proof::Right) } else { Err(Error::Unproven { path }) };
        }
        match self.renew(digest, size) {
            Err(Error::Corrupt { .. }) => Ok(Proof::Wrong { inode: before.inode }),
            renewed => renewed.map(|()| Proof::Renewed),
        }
    }

    /// Puts a copy in the place of a blob: an inode that nobody else has ever had. Durable on return.
    fn renew(&self, digest: Digest, size: u64) -> Result<(), Error> {
        let (path, copy) = (self.blob_path(digest), self.layout.scratch(Scratch::File));
        let place = || self.stamps.settled().replace(&path, || self.disk.rename(&copy, &path));
        let placed = self.copy_blob(digest, size, &copy).and_then(|()| place());
        if placed.is_err() {
            // The first error is the one to report; start-up sweeps what stays behind.
            let _ = self.disk.unlink(&copy);
        }
        placed?;
        self.sync_parent(&path)?;
        // Its new name has moved ctime.
        if let Some(file) = io::open_file(&path)? {
            self.stamps.put(digest, self.stamps.of(&file, &path)?);
        }
        Ok(())
    }
}

/// A process that is just being started has copies of our descriptors for a moment: who is refused asks again.
fn lease_on(file: &Arc<File>) -> std::io::Result<ReadLease> {
    for _ in 1..LEASE_ATTEMPTS {
        match ReadLease::take(file) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::park_timeout(Duration::from_millis(1)),
            other => return other,
        }
    }
    ReadLease::take(file)
}

/// Whether nobody attached anything to the inode: an ACL, a capability, an attribute. What security modules attach is
/// theirs. Unknown means no; a file system without attributes has none.
fn has_no_attributes(file: &File) -> bool {
    let mut names = [0u8; 4096];
    match rustix::fs::flistxattr(file, &mut names) {
        Ok(length) => names[..length].split(|byte| *byte == 0).all(|name| {
            let is_of = |prefix: &[u8]| name.starts_with(prefix);
            !is_of(b"user.") && !is_of(b"system.") && !is_of(b"security.capability")
        }),
        Err(Errno::OPNOTSUPP) => true,
        Err(_) => false,
    }
}

pub(super) fn hash_of(file: &File, path: &Path, size: u64) -> Result<Digest, Error> {
    let mut digester = Digester::new(None, size);
    let mut buffer = vec![0; 1 << 20];
    loop {
        match io::read_up_to(file, path, &mut buffer)? {
            0 => break,
            got => digester.update(&buffer[..got]),
        }
    }
    Ok(digester.so_far())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::RelPath;
    use crate::store::ingest::tests::stored;
    use crate::store::record::tests::manifest;
    use std::fs::{self, FileTimes, Permissions};
    use std::io::Write;
    use std::os::unix::fs::{FileExt, PermissionsExt};
    use std::sync::mpsc;

    const BYTES: &[u8] = b"the right bytes";

    /// A volume with one blob, in one snapshot.
    struct Shared {
        _dir: tempfile::TempDir,
        volume: Volume,
        digest: Digest,
        link: std::path::PathBuf,
    }

    fn shared() -> Shared {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let digest = stored(&volume, BYTES).digest;
        let target = volume.publish(&RelPath::new("s3/b/@v1").unwrap(), &manifest(&[("a", BYTES)])).unwrap();
        Shared { _dir: dir, volume, digest, link: target.join("a") }
    }

    impl Shared {
        fn prove(&self) -> Proof {
            self.volume.prove(self.digest, BYTES.len() as u64).unwrap()
        }

        fn is_proven(&self) -> bool {
            let opened = self.volume.open_blob(self.digest, BYTES.len() as u64);
            assert_eq!(opened.is_ok(), self.volume.is_proven(self.digest).unwrap());
            opened.is_ok()
        }

        fn inode(&self) -> u64 {
            fs::metadata(self.volume.blob_path(self.digest)).unwrap().ino()
        }

        fn write(&self, bytes: &[u8]) {
            writer(&self.link).write_all_at(bytes, 0).unwrap();
        }
    }

    /// As somebody who may change the mode gets one; the mode is ours again.
    fn writer(path: &Path) -> File {
        fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
        let file = File::options().read(true).write(true).open(path).unwrap();
        fs::set_permissions(path, Permissions::from_mode(BLOB_MODE)).unwrap();
        file
    }

    #[test]
    fn who_looks_while_a_name_of_ours_changes_waits_for_the_stamp() {
        let shared = shared();
        let (path, stamps) = (shared.volume.blob_path(shared.digest), &shared.volume.stamps);
        let (answer, answers) = mpsc::channel();
        thread::scope(|scope| {
            let act = || {
                let done = shared.volume.disk.link(&path, &shared.volume.public().join("another"));
                scope.spawn(|| answer.send(stamps.fits_at(shared.digest, &path).unwrap()));
                // Who does not wait says at once that it does not fit.
                let early = answers.recv_timeout(Duration::from_millis(50));
                assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout));
                done
            };
            Touch::of(stamps).around(&path, act).unwrap();
        });
        assert_eq!(answers.recv(), Ok(true));
    }

    #[test]
    fn our_own_links_and_unlinks_are_not_taken_for_a_change() {
        let shared = shared();
        assert!(shared.is_proven());
        let other = RelPath::new("s3/b/@v2").unwrap();
        shared.volume.publish(&other, &manifest(&[("x", BYTES), ("y", BYTES)])).unwrap();
        assert!(shared.is_proven());
        shared.volume.remove_snapshot(&other).unwrap();
        assert!(shared.is_proven());
    }

    #[test]
    fn whatever_touches_an_inode_is_noticed() {
        let times = || FileTimes::new().set_modified(std::time::SystemTime::UNIX_EPOCH);
        type Touch<'a> = (&'a str, &'a dyn Fn(&Path));
        let touches: [Touch<'_>; 7] = [
            ("write", &|link| writer(link).write_all(b"x").unwrap()),
            ("truncate", &|link| writer(link).set_len(1).unwrap()),
            ("mode", &|link| fs::set_permissions(link, Permissions::from_mode(0o644)).unwrap()),
            ("owner", &|link| drop(std::os::unix::fs::chown(link, Some(rustix::process::geteuid().as_raw()), None))),
            ("times", &|link| File::open(link).unwrap().set_times(times()).unwrap()),
            ("link", &|link| fs::hard_link(link, link.with_file_name("b")).unwrap()),
            ("unlink", &|link| fs::remove_file(link).unwrap()),
        ];
        for (name, touch) in touches {
            let shared = shared();
            fs::set_permissions(shared.link.parent().unwrap(), Permissions::from_mode(0o755)).unwrap();
            touch(&shared.link);
            assert!(!shared.is_proven(), "{name}");
        }
        // The same bytes again, and the times as they were.
        let shared = shared();
        let before = fs::metadata(&shared.link).unwrap();
        shared.write(BYTES);
        let file = File::open(&shared.link).unwrap();
        file.set_times(FileTimes::new().set_modified(before.modified().unwrap())).unwrap();
        assert_eq!(fs::metadata(&shared.link).unwrap().modified().unwrap(), before.modified().unwrap());
        assert!(!shared.is_proven());
        assert_eq!(shared.prove(), Proof::Right);
        assert!(shared.is_proven());
    }

    #[test]
    fn wrong_bytes_are_told_and_never_stamped() {
        let shared = shared();
        shared.write(b"THE");
        assert_eq!(shared.prove(), Proof::Wrong { inode: shared.inode() });
        assert!(!shared.is_proven());
        fs::remove_file(shared.volume.blob_path(shared.digest)).unwrap();
        assert_eq!(shared.prove(), Proof::Missing);
    }

    #[test]
    fn an_inode_that_somebody_can_still_write_is_replaced() {
        let shared = shared();
        let before = shared.inode();
        let map = memmap2::MmapOptions::new().len(BYTES.len()).map_raw(&writer(&shared.link)).unwrap();
        assert_eq!(shared.prove(), Proof::Renewed);
        assert_ne!(shared.inode(), before);
        assert!(shared.is_proven());
        assert_eq!(map.len(), BYTES.len());
        assert_eq!(fs::metadata(&shared.link).unwrap().ino(), before, "who has the former inode keeps it");
    }

    #[test]
    fn an_inode_whose_mode_or_attributes_are_not_ours_is_replaced() {
        let shared = shared();
        match rustix::fs::fsetxattr(writer(&shared.link), "user.x", b"y", rustix::fs::XattrFlags::empty()) {
            Ok(()) => assert_eq!(shared.prove(), Proof::Renewed),
            Err(error) => println!("skipped: no attributes here, {error}"),
        }

        let shared = self::shared();
        fs::set_permissions(&shared.link, Permissions::from_mode(0o666)).unwrap();
        assert_eq!(shared.prove(), Proof::Renewed);
        let mode = fs::metadata(shared.volume.blob_path(shared.digest)).unwrap().mode();
        assert_eq!(mode & 0o777, BLOB_MODE);
    }

    #[test]
    fn a_writer_hides_no_change_behind_our_own() {
        let shared = shared();
        let _writer = writer(&shared.link);
        let other = RelPath::new("s3/b/@v2").unwrap();
        let published = shared.volume.publish(&other, &manifest(&[("x", BYTES)]));
        assert!(matches!(published, Err(Error::Unproven { .. })), "{published:?}");
        assert!(!shared.volume.public().join("s3/b/@v2").exists());
        assert_eq!(shared.prove(), Proof::Renewed);
        shared.volume.publish(&other, &manifest(&[("x", BYTES)])).unwrap();
    }

    #[test]
    fn stamps_are_told_once_and_taken_back() {
        let shared = shared();
        let told = shared.volume.changed_stamps();
        assert_eq!(told.iter().map(|(inode, _)| *inode).collect::<Vec<_>>(), [shared.inode()]);
        assert_eq!(shared.volume.changed_stamps(), []);
        let (digest, stamp) = told[0].1.unwrap();
        drop(std::mem::take(&mut *shared.volume.stamps.known()));
        assert!(!shared.is_proven());
        shared.volume.recall_stamps([(digest, Stamp { ctime_ns: stamp.ctime_ns - 1, ..stamp })]);
        assert!(!shared.is_proven());
        shared.volume.recall_stamps([(digest, stamp)]);
        assert!(shared.is_proven());
        assert_eq!(shared.volume.changed_stamps(), []);
    }

    #[test]
    fn a_commit_replaces_a_blob_that_is_not_known_to_be_right() {
        let shared = shared();
        let before = shared.inode();
        shared.write(b"THE");
        stored(&shared.volume, BYTES);
        assert_ne!(shared.inode(), before);
        assert!(shared.is_proven());
    }

    #[test]
    fn an_inode_that_is_not_the_blob_any_more_is_not_vouched_for() {
        let shared = shared();
        let (path, stamps) = (shared.volume.blob_path(shared.digest), &shared.volume.stamps);
        let (_, proven) = stamps.get(shared.inode()).unwrap();
        // Somebody proves it, while an ingest that has found it unproven puts its own in its place.
        stamps.forget(proven.inode);
        let part = shared.volume.root().join("part");
        fs::write(&part, BYTES).unwrap();
        stamps.put(shared.digest, proven);
        stamps.settled().replace(&path, || shared.volume.disk.rename(&part, &path)).unwrap();
        assert!(!stamps.fits_at(shared.digest, &shared.link).unwrap(), "its snapshot is laid out again");
        assert!(!stamps.put_if_still(shared.digest, &path, proven).unwrap());
        assert!(!stamps.fits_at(shared.digest, &shared.link).unwrap());
    }
}

//! What keeps writers away from a file, and tells where its bytes are: three calls to the kernel for which no library has a
//! safe form.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

/// Of asm-generic/fcntl.h, which every architecture Rust's standard library runs Linux on uses for it.
const F_SETSIG: libc::c_int = 10;

/// Makes a mount read-only, without set-uid, devices and execution. `tree` is the detached mount `open_tree` gave: no
/// mount namespace has it, so nobody but its holder ever sees it, and it goes away with the last descriptor that was opened
/// through it.
///
/// Needs CAP_SYS_ADMIN (`PermissionDenied` without) and Linux 5.12 (`Unsupported` before).
#[allow(unsafe_code)]
pub fn make_read_only(tree: BorrowedFd<'_>) -> io::Result<()> {
    // As `struct mount_attr` of linux/mount.h: attr_set, attr_clr, propagation, userns_fd.
    let attributes: [u64; 4] =
        [libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC, 0, 0, 0];
    // SAFETY: the kernel reads three things while the call lasts, and keeps and writes nothing.
    // - The descriptor is open as long as `tree` is borrowed.
    // - The path is a literal with its NUL; it is empty, so AT_EMPTY_PATH makes the call about the descriptor itself.
    // - `attributes` is 32 bytes on our stack, the size that is passed, in the layout of MOUNT_ATTR_SIZE_VER0: four u64
    //   without padding. A kernel that knows more fields takes those that are missing for zero.
    // A mount changes, not memory: nothing Rust relies on.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            attributes.as_ptr(),
            size_of_val(&attributes),
        )
    };
    if answer == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The kernel's word that nobody can write a file: no process has a descriptor or a map of it to write with, and who opens
/// it to write waits until this is dropped (or until `/proc/sys/fs/lease-break-time`, 45 s, has passed).
#[derive(Debug)]
pub struct ReadLease(Arc<File>);

impl ReadLease {
    /// Takes it on a file of ours that is open for reading. `WouldBlock`: somebody has it open to write. Any other error: it
    /// cannot be known, because the file system has no leases, or the file is another user's.
    ///
    /// An open file description has one lease, so take it on one that is nobody else's.
    pub fn take(file: &Arc<File>) -> io::Result<ReadLease> {
        // Who makes us give it up sends this signal. SIGIO, the default, would end the process; this one is ignored.
        fcntl(file.as_fd(), F_SETSIG, libc::SIGURG)?;
        fcntl(file.as_fd(), libc::F_SETLEASE, libc::F_RDLCK)?;
        Ok(ReadLease(file.clone()))
    }

    /// Whether it has held until now: nobody even asked to write.
    pub fn holds(&self) -> bool {
        fcntl(self.0.as_fd(), libc::F_GETLEASE, 0).is_ok_and(|lease| lease == libc::F_RDLCK)
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.0
    }
}

impl Drop for ReadLease {
    fn drop(&mut self) {
        // When it fails, closing the file still gives the lease back.
        let _ = fcntl(self.0.as_fd(), libc::F_SETLEASE, libc::F_UNLCK);
    }
}

/// The kernel's word that nobody but us has a file open or mapped: not through another link or mount, not in another
/// container, not on its way in a message. Who opens it waits until this is dropped (or until
/// `/proc/sys/fs/lease-break-time`, 45 s, has passed).
#[derive(Debug)]
pub struct SoleLease(File);

impl SoleLease {
    /// Takes it on a file of ours that is open for reading, or gives it back with the reason. `WouldBlock`: somebody has it
    /// open. Any other error: it cannot be known, because the file system has no leases, or the file is another user's.
    pub fn take(file: File) -> Result<SoleLease, (File, io::Error)> {
        // As for `ReadLease`: SIGIO, the default, would end the process when somebody opens the file.
        let taken = fcntl(file.as_fd(), F_SETSIG, libc::SIGURG)
            .and_then(|_| fcntl(file.as_fd(), libc::F_SETLEASE, libc::F_WRLCK));
        match taken {
            Ok(_) => Ok(SoleLease(file)),
            Err(error) => Err((file, error)),
        }
    }

    /// Gives it up; whether it has held until now: nobody even asked to open the file.
    pub fn give_up(self) -> (File, bool) {
        let held = fcntl(self.0.as_fd(), libc::F_GETLEASE, 0).is_ok_and(|lease| lease == libc::F_WRLCK);
        // When it fails, closing the file still gives the lease back.
        let _ = fcntl(self.0.as_fd(), libc::F_SETLEASE, libc::F_UNLCK);
        (self.0, held)
    }
}

/// `FS_IOC_FIEMAP`: `_IOWR('f', 11, struct fiemap)`.
const FIEMAP: libc::c_ulong = 0xC020_660B;
/// `FIEMAP_EXTENT_LAST`
const LAST_EXTENT: u32 = 1;
/// Extents that are asked for at a time.
const EXTENTS: usize = 64;

/// `struct fiemap` of linux/fiemap.h with room for [`EXTENTS`].
#[repr(C)]
struct ExtentMap {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    room: u32,
    reserved: u32,
    extents: [Extent; EXTENTS],
}

/// `struct fiemap_extent`
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

/// Where on the disk the bytes of a file are, as one number. It changes when blocks are exchanged with another file, which
/// changes bytes and moves no time of the inode (`EXT4_IOC_MOVE_EXT`, `XFS_IOC_SWAPEXT`).
///
/// The bytes must be on the disk. Fails on file systems that cannot tell.
#[allow(unsafe_code)]
pub fn place_of(file: &File) -> io::Result<u64> {
    let mut hasher = blake3::Hasher::new();
    // Neighbours that follow each other on the disk are one, however the file system keeps them.
    let mut run = (0, 0, 0);
    let mut next = 0;
    loop {
        let extents = [Extent::default(); EXTENTS];
        let (start, length, room) = (next, u64::MAX - next, EXTENTS as u32);
        let mut map = ExtentMap { start, length, flags: 0, mapped: 0, room, reserved: 0, extents };
        // SAFETY: the descriptor is open as long as `file` is borrowed. FS_IOC_FIEMAP reads the head of `map` and writes
        // `mapped` and at most `room` extents behind it: `map` is ours alone while the call lasts, has the kernel's layout
        // (repr(C), no padding: 32 bytes, then 56 for each), and room for exactly as many as it says. All its fields are
        // plain integers, for which every pattern of bits is a value.
        let answer = unsafe { libc::ioctl(file.as_raw_fd(), FIEMAP as _, &raw mut map) };
        if answer < 0 {
            return Err(io::Error::last_os_error());
        }
        let found = &map.extents[..EXTENTS.min(map.mapped as usize)];
        for extent in found {
            if (run.0 + run.2, run.1 + run.2) == (extent.logical, extent.physical) {
                run.2 += extent.length;
            } else {
                for number in [run.0, run.1, run.2] {
                    hasher.update(&u64::to_le_bytes(number));
                }
                run = (extent.logical, extent.physical, extent.length);
            }
        }
        match found.last() {
            Some(last) if last.flags & LAST_EXTENT == 0 => next = last.logical + last.length,
            _ => break,
        }
    }
    for number in [run.0, run.1, run.2] {
        hasher.update(&u64::to_le_bytes(number));
    }
    let mut place = [0; 8];
    place.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    Ok(u64::from_le_bytes(place))
}

#[allow(unsafe_code)]
fn fcntl(file: BorrowedFd<'_>, command: libc::c_int, argument: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: the descriptor is open as long as `file` is borrowed, and all three commands (F_SETSIG, F_SETLEASE,
    // F_GETLEASE; private to this module) take an int or nothing: no pointer is passed, so no memory is read or written.
    let answer = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::OpenOptionsExt;

    fn file() -> (tempfile::TempDir, std::path::PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, [7; 4096]).unwrap();
        (dir, path)
    }

    #[test]
    fn a_lease_is_refused_while_anybody_could_write() {
        let (_dir, path) = file();
        let writer = OpenOptions::new().read(true).write(true).open(&path).unwrap();
        let take = |path| ReadLease::take(&Arc::new(File::open(path).unwrap()));
        let refused = |path| take(path).unwrap_err().kind();
        assert_eq!(refused(&path), io::ErrorKind::WouldBlock);
        // A writable map needs no descriptor any more.
        let map = memmap2::MmapOptions::new().map_raw(&writer).unwrap();
        drop(writer);
        assert_eq!(refused(&path), io::ErrorKind::WouldBlock);
        drop(map);
        assert!(take(&path).unwrap().holds());
    }

    #[test]
    fn a_file_is_ours_alone_while_nobody_has_it_open_or_mapped() {
        let (dir, path) = file();
        let link = dir.path().join("link");
        fs::hard_link(&path, &link).unwrap();
        let take = || SoleLease::take(File::open(&path).unwrap());
        let refused = || take().unwrap_err().1.kind();
        let reader = File::open(&link).unwrap();
        assert_eq!(refused(), io::ErrorKind::WouldBlock);
        // A map needs no descriptor any more.
        let map = memmap2::MmapOptions::new().map_raw_read_only(&reader).unwrap();
        drop(reader);
        assert_eq!(refused(), io::ErrorKind::WouldBlock);
        drop(map);
        let (file, held) = take().unwrap().give_up();
        assert!(held);
        // Also when it has no name any more, which is how bytes are counted that readers keep.
        fs::remove_file(&path).unwrap();
        fs::remove_file(&link).unwrap();
        assert!(SoleLease::take(file).is_ok());
    }

    #[test]
    fn who_opens_a_file_that_is_ours_alone_is_noticed_and_ends_nothing() {
        let (_dir, path) = file();
        let lease = SoleLease::take(File::open(&path).unwrap()).unwrap();
        let asked = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        assert_eq!(asked.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(!lease.give_up().1, "the signal did not end us, and it is known");
        File::open(&path).unwrap();
    }

    #[test]
    fn a_file_has_a_place_of_its_own_and_keeps_it() {
        let (dir, path) = file();
        let other = dir.path().join("other");
        // Every second block of it is a hole, so it has more extents than fit into one answer.
        let sparse = File::create(&other).unwrap();
        for block in 0..100 {
            std::os::unix::fs::FileExt::write_all_at(&sparse, &[7; 4096], block * 8192).unwrap();
        }
        for path in [&path, &other] {
            File::options().write(true).open(path).unwrap().sync_all().unwrap();
        }
        let place = |path| place_of(&File::open(path).unwrap());
        let Ok(first) = place(&path) else {
            println!("skipped: this file system does not tell");
            return;
        };
        assert_eq!(place(&path).unwrap(), first);
        let sparse = place(&other).unwrap();
        assert_ne!(sparse, first);
        assert_eq!(place(&other).unwrap(), sparse);
    }

    #[test]
    fn who_asks_to_write_does_not_get_in_and_is_noticed() {
        let (_dir, path) = file();
        let lease = ReadLease::take(&Arc::new(File::open(&path).unwrap())).unwrap();
        let _reader = File::open(&path).unwrap();
        assert!(lease.holds());
        let asked = OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(&path);
        assert_eq!(asked.unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert!(!lease.holds(), "the signal did not end us, and it is known");
        drop(lease);
        OpenOptions::new().write(true).open(&path).unwrap();
    }
}

//! What keeps writers away from a descriptor: two calls to the kernel for which no library has a safe form.

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

//! A file system of a few megabytes, in a file: one that a test can fill.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Mounted until it is dropped.
pub(crate) struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    /// An ext4 of so many MiB, or why there is none.
    pub(crate) fn new(mib: u64) -> Result<SmallDisk, String> {
        let dir = tempfile::tempdir().unwrap();
        let (image, at) = (dir.path().join("image"), dir.path().join("disk"));
        fs::create_dir(&at).unwrap();
        fs::File::create(&image).unwrap().set_len(mib << 20).unwrap();
        run(Command::new("mkfs.ext4").args(["-q", "-m", "0"]).arg(&image))?;
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at))?;
        Ok(SmallDisk { dir })
    }

    /// Where it is mounted.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    /// Bytes it would still give.
    pub(crate) fn free_bytes(&self) -> u64 {
        let found = rustix::fs::statvfs(self.path()).unwrap();
        found.f_bavail * found.f_frsize
    }

    /// Uses so many bytes of it, as others do.
    pub(crate) fn fill(&self, name: &str, bytes: u64) {
        let file = fs::File::create(self.path().join(name)).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
    }

    /// Takes what fills it away.
    pub(crate) fn clear(&self) {
        for entry in fs::read_dir(self.path()).unwrap().map(Result::unwrap) {
            if entry.file_name().as_encoded_bytes().starts_with(b"filler-") {
                fs::remove_file(entry.path()).unwrap();
            }
        }
    }

    /// Leaves not a block, or one: each step takes half of what the one before has left.
    pub(crate) fn fill_up(&self) {
        let mut size = self.free_bytes();
        while size >= 1024 {
            let path = self.path().join(format!("filler-{:x}", fastrand::u64(..)));
            let Ok(file) = fs::File::create(&path) else { return };
            if rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size).is_err() {
                file.set_len(0).unwrap();
            }
            size /= 2;
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = run(Command::new("umount").arg("-l").arg(self.path()));
        assert!(unmounted.is_ok() || std::thread::panicking(), "{unmounted:?}");
    }
}

fn run(command: &mut Command) -> Result<(), String> {
    let name = Path::new(command.get_program()).display().to_string();
    match command.output() {
        Err(error) => Err(format!("`{name}` does not run: {error}")),
        Ok(done) if done.status.success() => Ok(()),
        Ok(done) => Err(format!("`{name}`: {}", String::from_utf8_lossy(&done.stderr).trim())),
    }
}

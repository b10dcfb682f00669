//! [`Scratch`]: a directory that a command works in, and that goes away with it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// A new directory, for this user alone. Removed when dropped, with volumes that are in it.
pub(super) struct Scratch(PathBuf);

impl Scratch {
    /// Makes one below `parent`, whose name begins with `prefix`.
    pub(super) fn below(parent: &Path, prefix: &str) -> io::Result<Scratch> {
        let path = parent.join(format!("{prefix}-{:016x}", fastrand::u64(..)));
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Scratch(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            tracing::warn!(%error, path = %self.0.display(), "the temporary directory is still there; remove it");
        }
    }
}

/// Removes a directory with all that is in it.
pub(super) fn remove(directory: &Path) -> io::Result<()> {
    // Snapshots are read-only directories: an ordinary user must make them writable to remove them.
    let _ = make_removable(directory);
    fs::remove_dir_all(directory)
}

fn make_removable(directory: &Path) -> io::Result<()> {
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            make_removable(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_also_where_nobody_may_write() {
        let parent = tempfile::tempdir().unwrap();
        let scratch = Scratch::below(parent.path(), "larder-x").unwrap();
        let snapshot = scratch.path().join("public/snapshot");
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(snapshot.join("file"), "x").unwrap();
        fs::set_permissions(&snapshot, fs::Permissions::from_mode(0o555)).unwrap();
        drop(scratch);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}

//! What is mounted where a directory is, as the kernel tells this process.

use std::fs;
use std::io;
use std::path::Path;

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// Its type, such as `ext4`.
    pub(super) kind: String,
    /// What it is on, such as `/dev/nvme1n1`; not more than a name where there is no device.
    pub(super) source: String,
}

/// The mount that a directory is on.
pub(super) fn of(directory: &Path) -> io::Result<Mount> {
    let directory = fs::canonicalize(directory)?;
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    find(&mounts, &directory).ok_or_else(|| io::Error::other("`/proc/self/mountinfo` does not list it"))
}

/// The last one of the longest mount point: later ones hide earlier ones.
fn find(mounts: &str, directory: &Path) -> Option<Mount> {
    let parsed = mounts.lines().filter_map(|line| {
        let (place, of_source) = line.split_once(" - ")?;
        let point = unescape(place.split(' ').nth(4)?);
        let (kind, rest) = of_source.split_once(' ')?;
        let source = unescape(rest.split(' ').next()?);
        directory.starts_with(&point).then(|| (point.len(), Mount { kind: kind.to_owned(), source }))
    });
    parsed.max_by_key(|(length, _)| *length).map(|(_, mount)| mount)
}

/// Blanks and their like stand there as three octal digits (`proc_pid_mountinfo(5)`).
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .iter()
        .fold(text.to_owned(), |text, (escaped, plain)| text.replace(escaped, plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_mount_counts_and_the_last_of_two_at_one_place() {
        let mounts = "\
            22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n\
            30 22 0:30 / /mnt rw - tmpfs tmpfs rw\n\
            31 22 259:1 / /mnt rw - xfs /dev/nvme0n1 rw\n\
            32 31 0:31 / /mnt/a\\040b rw - nfs4 host:/a rw\n\
            not a mount\n";
        let kind = |path: &str| find(mounts, Path::new(path)).map(|mount| mount.kind);
        assert_eq!(kind("/var/lib").as_deref(), Some("ext4"));
        assert_eq!(kind("/mnt/models").as_deref(), Some("xfs"));
        assert_eq!(kind("/mnt/a b/c").as_deref(), Some("nfs4"));
        assert_eq!(kind("/mntx").as_deref(), Some("ext4"));
        assert_eq!(kind("relative"), None);
        assert_eq!(find(mounts, Path::new("/mnt")).unwrap().source, "/dev/nvme0n1");
    }

    #[test]
    fn this_machine_tells() {
        assert!(!of(&std::env::temp_dir()).unwrap().kind.is_empty());
    }
}

//! A file system of its own in a file, that can be cut off as if the power had failed.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};

use tempfile::TempDir;

/// How often a file system that is busy is tried again.
const MAX_UNMOUNTS: usize = 500;
/// How often is looked whether an unmounted one is gone.
const MAX_LOOKS: usize = 20_000;

/// Kinds of file systems that volumes are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Ext4,
    Xfs,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Ext4 => "ext4",
            Kind::Xfs => "xfs",
        }
    }

    fn mount_options(self) -> &'static str {
        match self {
            Kind::Ext4 => "loop,errors=remount-ro",
            Kind::Xfs => "loop",
        }
    }

    fn check(self) -> &'static [&'static str] {
        match self {
            Kind::Ext4 => &["e2fsck", "-f", "-n"],
            Kind::Xfs => &["xfs_repair", "-n"],
        }
    }
}

/// Mounted at a directory while this lives.
pub(crate) struct LoopDisk {
    kind: Kind,
    dir: TempDir,
    at: PathBuf,
}

/// No call that changes the file system comes back while this lives.
pub(crate) struct Frozen<'a>(&'a LoopDisk);

/// The other end of a switch: see [`LoopDisk::fuse`].
pub(crate) struct Fuse {
    process: Child,
    say: ChildStdin,
}

impl LoopDisk {
    /// Makes one of `mib` MiB and mounts it; or why there is none.
    pub(crate) fn new(kind: Kind, mib: u64, at: &Path) -> Result<LoopDisk, String> {
        let dir = tempfile::tempdir().unwrap();
        let disk = LoopDisk { kind, dir, at: at.to_owned() };
        let image = std::fs::File::create(disk.image()).unwrap();
        image.set_len(mib << 20).unwrap();
        run(&format!("mkfs.{}", kind.name()), &["-q".as_ref(), disk.image().as_ref()])?;
        std::fs::create_dir_all(at).unwrap();
        disk.mount()?;
        Ok(disk)
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    pub(crate) fn mount(&self) -> Result<(), String> {
        run("mount", &["-o".as_ref(), self.kind.mount_options().as_ref(), self.image().as_ref(), self.at.as_ref()])
    }

    pub(crate) fn mount_read_only(&self) -> Result<(), String> {
        run("mount", &["-o".as_ref(), "loop,ro".as_ref(), self.image().as_ref(), self.at.as_ref()])
    }

    /// Another test that starts a process has for a moment all files open that this one has open. Whoever makes a mount
    /// namespace meanwhile has a mount of his own, and the file system lives on as it is until that ends.
    pub(crate) fn unmount(&self) -> Result<(), String> {
        let mut tried = run("umount", &[self.at.as_ref()]);
        for _ in 0..MAX_UNMOUNTS {
            if !tried.as_ref().is_err_and(|why| why.contains("busy")) {
                break;
            }
            tried = run("umount", &[self.at.as_ref()]);
        }
        tried?;
        match (0..MAX_LOOKS).any(|_| !self.is_alive()) {
            true => Ok(()),
            false => Err("somebody else has the file system mounted, in a namespace of his own".to_owned()),
        }
    }

    /// Whether a loop device has the image. It lets go of it when the last mount has ended.
    fn is_alive(&self) -> bool {
        let output = Command::new("losetup").arg("-j").arg(self.image()).output().unwrap();
        !output.stdout.is_empty()
    }

    /// Has every call that changes it wait.
    pub(crate) fn freeze(&self) -> Frozen<'_> {
        run("fsfreeze", &["--freeze".as_ref(), self.at.as_ref()]).unwrap();
        Frozen(self)
    }

    /// Lets ext4 find that it is damaged: it becomes read-only under whoever writes to it.
    pub(crate) fn find_damage(&self) {
        let output = Command::new("findmnt").args(["-n", "-o", "SOURCE"]).arg(&self.at).output().unwrap();
        let device = text(&output.stdout).trim().trim_start_matches("/dev/").to_owned();
        std::fs::write(format!("/sys/fs/ext4/{device}/trigger_fs_error"), "a test").unwrap();
    }

    /// Mends what was found, when it is not mounted.
    pub(crate) fn mend(&self) {
        Command::new("e2fsck").args(["-f", "-y"]).arg(self.image()).output().unwrap();
        self.must_be_clean();
    }

    /// What the file system's own checker says of it, when it is not mounted.
    pub(crate) fn must_be_clean(&self) {
        let (program, words) = self.kind.check().split_first().expect("a command has a name");
        let output = Command::new(program).args(words).arg(self.image()).output().unwrap();
        assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    }

    /// Gets ready to cut it off.
    pub(crate) fn fuse(&self) -> Fuse {
        let mut command = Command::new("xfs_io");
        command.arg("-x").arg(&self.at).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = command.spawn().unwrap();
        let say = process.stdin.take().expect("it is piped");
        Fuse { process, say }
    }
}

impl Fuse {
    /// Cuts the file system off at once, as a power cut does: what its log has not on the disk is lost. Returns when it
    /// is done.
    pub(crate) fn blow(mut self) {
        self.say.write_all(b"shutdown\nquit\n").unwrap();
        assert!(self.process.wait().unwrap().success());
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        run("fsfreeze", &["--unfreeze".as_ref(), self.0.at.as_ref()]).unwrap();
    }
}

impl Drop for LoopDisk {
    fn drop(&mut self) {
        if self.unmount().is_err() {
            // Somebody has it open still; it goes when he ends.
            let _ = run("umount", &["-l".as_ref(), self.at.as_ref()]);
        }
    }
}

fn run(program: &str, words: &[&std::ffi::OsStr]) -> Result<(), String> {
    match Command::new(program).args(words).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!("{program} does not work: {}", text(&output.stderr))),
        Err(e) => Err(format!("{program} is not there: {e}")),
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

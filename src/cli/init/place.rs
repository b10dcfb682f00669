//! The ways to make a model usable in a directory of the pod: link to it, share its blocks, or copy it.
//!
//! Every entry gets its name when it is whole, over what had the name, so that an init container that is started again
//! ends in the same state, and a reader never sees half a file.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use rustix::io::Errno;

use crate::fault::{Code, Diagnose};
use crate::model::{Digest, Digester, RelPath, Verified};

/// Bytes that are copied at a time.
const COPY_BYTES: usize = 1 << 20;

/// How a model gets into a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    /// Relative symbolic links into the mounted volume: takes no space and no time
    Symlink,
    /// Copies that share the volume's blocks, where the file system can (XFS, btrfs)
    Reflink,
    /// Copies, verified
    Copy,
}

impl Method {
    /// From the cheapest on.
    pub(super) const ALL: [Method; 3] = [Method::Symlink, Method::Reflink, Method::Copy];

    /// The word on the command line.
    pub(super) fn text(self) -> &'static str {
        match self {
            Method::Symlink => "symlink",
            Method::Reflink => "reflink",
            Method::Copy => "copy",
        }
    }
}

/// A file of the model that is open.
pub(super) struct OpenFile<'a> {
    pub(super) path: &'a RelPath,
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) file: &'a File,
}

/// Why a directory does not take the model, for each method that was tried.
#[derive(Debug, thiserror::Error)]
#[error("cannot make the model usable in `{}`: {}", dest.display(), told(tried))]
pub(super) struct Unusable {
    pub(super) dest: PathBuf,
    /// At least one.
    pub(super) tried: Vec<(Method, String)>,
}

fn told(tried: &[(Method, String)]) -> String {
    tried.iter().map(|(method, why)| format!("{}: {why}", method.text())).collect::<Vec<_>>().join("; ")
}

impl Diagnose for Unusable {
    fn code(&self) -> Code {
        Code::DestinationUnusable
    }

    fn action(&self) -> String {
        if self.tried.iter().any(|(method, _)| *method == Method::Copy) {
            return format!(
                "make `{}` a writable directory with room for the model, such as an emptyDir",
                self.dest.display()
            );
        }
        "mount the volume's `public/` read-only at the same path in every container of the pod and name it with `--mount`, or \
         let `--method auto` choose"
            .to_owned()
    }
}

/// Makes the model usable in `dest` by the first of `methods` that works; which one it was, and why those before it did
/// not.
///
/// `mounts` are directories where the model may be seen in this container, without a guarantee that it is.
pub(super) fn place(
    methods: &[Method],
    files: &[OpenFile<'_>],
    mounts: &[PathBuf],
    dest: &Path,
) -> Result<(Method, Vec<(Method, String)>), Unusable> {
    let mut tried = Vec::new();
    for method in methods {
        let placed =
            fs::create_dir_all(dest).map_err(|e| format!("it cannot be made: {e}")).and_then(|()| match method {
                Method::Symlink => link(files, mounts, dest),
                Method::Reflink => each_file(files, dest, reflink),
                Method::Copy => each_file(files, dest, copy),
            });
        match placed {
            Ok(()) => return Ok((*method, tried)),
            Err(why) => tried.push((*method, why)),
        }
    }
    Err(Unusable { dest: dest.to_owned(), tried })
}

/// One link for each entry at the top of the model, so that `dest` may be a mount point itself.
fn link(files: &[OpenFile<'_>], mounts: &[PathBuf], dest: &Path) -> Result<(), String> {
    let mut seen = Vec::new();
    let model = mounts.iter().find(|mount| match shows(mount, files) {
        Ok(()) => true,
        Err(why) => {
            seen.push(why);
            false
        }
    });
    let Some(model) = model else {
        return Err(if seen.is_empty() {
            "nothing says where the volume is mounted".to_owned()
        } else {
            seen.join(", ")
        });
    };
    let failed = |what: &Path, e: io::Error| format!("`{}`: {e}", what.display());
    let model = fs::canonicalize(model).map_err(|e| failed(model, e))?;
    let dest = fs::canonicalize(dest).map_err(|e| failed(dest, e))?;
    let tops: BTreeSet<&str> = files.iter().filter_map(|file| file.path.components().next()).collect();
    for top in tops {
        let scratch = scratch_beside(&dest.join(top));
        let target = relative(&dest, &model.join(top));
        let linked = symlink(target, &scratch).and_then(|()| fs::rename(&scratch, dest.join(top)));
        if linked.is_err() {
            // The first error is the one to report.
            let _ = fs::remove_file(&scratch);
        }
        linked.map_err(|e| failed(&dest.join(top), e))?;
    }
    Ok(())
}

/// Whether the very files that were handed out are below this directory: the same inodes, and not others of their names.
fn shows(directory: &Path, files: &[OpenFile<'_>]) -> Result<(), String> {
    for file in files {
        let path = directory.join(file.path.as_path());
        let (seen, handed) = match (fs::metadata(&path), file.file.metadata()) {
            (Ok(seen), Ok(handed)) => (seen, handed),
            (Err(e), _) | (_, Err(e)) => return Err(format!("`{}` is not there ({e})", path.display())),
        };
        if (seen.dev(), seen.ino()) != (handed.dev(), handed.ino()) {
            return Err(format!("`{}` is another file than the daemon's", path.display()));
        }
    }
    Ok(())
}

/// The way from a directory to a path; both absolute and without links.
fn relative(from: &Path, to: &Path) -> PathBuf {
    let (from, to): (Vec<Component<'_>>, Vec<_>) = (from.components().collect(), to.components().collect());
    let common = from.iter().zip(&to).take_while(|(a, b)| a == b).count();
    let up = from[common..].iter().map(|_| Component::ParentDir);
    up.chain(to[common..].iter().copied()).collect()
}

fn scratch_beside(path: &Path) -> PathBuf {
    let name = format!(".larder-{:016x}", fastrand::u64(..));
    path.with_file_name(name)
}

fn each_file(
    files: &[OpenFile<'_>],
    dest: &Path,
    fill: fn(&OpenFile<'_>, &File) -> Result<(), String>,
) -> Result<(), String> {
    for file in files {
        let to = dest.join(file.path.as_path());
        let failed = |e: io::Error| format!("`{}`: {e}", to.display());
        make_parents(dest, file.path).map_err(failed)?;
        let scratch = scratch_beside(&to);
        let filled = (|| {
            let new = OpenOptions::new().write(true).create_new(true).mode(0o644).open(&scratch).map_err(failed)?;
            fill(file, &new)?;
            new.set_permissions(fs::Permissions::from_mode(0o644)).map_err(failed)?;
            fs::rename(&scratch, &to).map_err(failed)
        })();
        if filled.is_err() {
            // The first error is the one to report.
            let _ = fs::remove_file(&scratch);
        }
        filled?;
    }
    Ok(())
}

/// Makes the directories above a file. A link an earlier run made in the place of one leads into the volume, which is
/// read-only: it is replaced, not followed.
fn make_parents(dest: &Path, path: &RelPath) -> io::Result<()> {
    for parent in path.parents().map(|parent| dest.join(parent)) {
        if fs::symlink_metadata(&parent).is_ok_and(|found| found.is_symlink()) {
            fs::remove_file(&parent)?;
        }
        match fs::create_dir(&parent) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists && parent.is_dir() => {}
            made => made?,
        }
    }
    Ok(())
}

fn reflink(file: &OpenFile<'_>, to: &File) -> Result<(), String> {
    rustix::fs::ioctl_ficlone(to, file.file).map_err(|errno| match errno {
        Errno::XDEV => "it is on another file system than the volume".to_owned(),
        Errno::OPNOTSUPP | Errno::NOTTY | Errno::INVAL => "its file system cannot share blocks".to_owned(),
        other => io::Error::from(other).to_string(),
    })
}

/// Reads by offset, so that the descriptor may be used by others too, and compares what was copied with its digest.
fn copy(file: &OpenFile<'_>, to: &File) -> Result<(), String> {
    let mut digester = Digester::new(None, file.size);
    let mut buffer = vec![0; COPY_BYTES.min(file.size.max(1) as usize)];
    let mut at = 0;
    loop {
        let got = match file.file.read_at(&mut buffer, at) {
            Ok(0) => break,
            Ok(got) => got,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(format!("`{}` cannot be read: {e}", file.path)),
        };
        digester.update(&buffer[..got]);
        to.write_all_at(&buffer[..got], at).map_err(|e| format!("`{}` cannot be written: {e}", file.path))?;
        at += got as u64;
    }
    match digester.finish() {
        Verified::As(digest) if digest == file.digest => Ok(()),
        _ => Err(format!("the bytes of `{}` are not what its digest says", file.path)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILES: [(&str, &[u8]); 4] =
        [("config.json", b"{}"), ("empty", b""), ("onnx/model.onnx", b"weights"), ("onnx/deep/x", b"x")];

    struct Model {
        dir: tempfile::TempDir,
        open: Vec<(RelPath, Digest, u64, File)>,
    }

    impl Model {
        fn new() -> Model {
            let dir = tempfile::tempdir().unwrap();
            let mut open = Vec::new();
            for (path, bytes) in FILES {
                let at = dir.path().join("mount/m").join(path);
                fs::create_dir_all(at.parent().unwrap()).unwrap();
                fs::write(&at, bytes).unwrap();
                open.push((
                    RelPath::new(path).unwrap(),
                    Digest::of(bytes),
                    bytes.len() as u64,
                    File::open(at).unwrap(),
                ));
            }
            Model { dir, open }
        }

        fn files(&self) -> Vec<OpenFile<'_>> {
            let open = self.open.iter();
            open.map(|(path, digest, size, file)| OpenFile { path, digest: *digest, size: *size, file }).collect()
        }

        fn at(&self, path: &str) -> PathBuf {
            self.dir.path().join(path)
        }
    }

    fn assert_usable(dest: &Path) {
        for (path, bytes) in FILES {
            assert_eq!(fs::read(dest.join(path)).unwrap(), bytes, "{path}");
        }
        let left = fs::read_dir(dest).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        assert_eq!(left.filter(|name| name.starts_with(".larder-")).count(), 0);
    }

    #[test]
    fn links_are_relative_and_lead_to_the_mount() {
        let model = Model::new();
        let (mount, dest) = (model.at("mount/m"), model.at("pod/models"));
        for _ in 0..2 {
            assert_eq!(
                place(&Method::ALL, &model.files(), &[model.at("elsewhere"), mount.clone()], &dest).unwrap(),
                (Method::Symlink, vec![])
            );
            assert_usable(&dest);
        }
        assert_eq!(fs::read_link(dest.join("config.json")).unwrap(), Path::new("../../mount/m/config.json"));
        assert_eq!(fs::read_link(dest.join("onnx")).unwrap(), Path::new("../../mount/m/onnx"));
        // The same two mounts at another place: relative links still lead there.
        fs::rename(model.dir.path().join("mount"), model.at("moved")).unwrap();
        fs::create_dir(model.at("other")).unwrap();
        fs::rename(model.at("moved"), model.at("other/mount")).unwrap();
        fs::rename(model.at("pod"), model.at("other/pod")).unwrap();
        assert_usable(&model.at("other/pod/models"));
    }

    #[test]
    fn another_file_of_the_same_name_is_not_linked_to() {
        let model = Model::new();
        let twin = Model::new();
        let dest = model.at("pod");
        let error = place(&[Method::Symlink], &model.files(), &[twin.at("mount/m")], &dest).unwrap_err();
        assert_eq!(error.code(), Code::DestinationUnusable);
        assert!(error.to_string().contains("is another file than the daemon's"), "{error}");
        assert!(error.action().contains("--mount"), "{}", error.action());
        assert_eq!(fs::read_dir(&dest).unwrap().count(), 0);
    }

    #[test]
    fn a_copy_is_the_pods_own_and_replaces_what_an_earlier_run_left() {
        let model = Model::new();
        let dest = model.at("pod");
        place(&[Method::Symlink], &model.files(), &[model.at("mount/m")], &dest).unwrap();
        assert_eq!(place(&[Method::Copy], &model.files(), &[], &dest).unwrap().0, Method::Copy);
        assert_usable(&dest);
        fs::write(dest.join("onnx/model.onnx"), "changed by the pod").unwrap();
        assert_eq!(fs::read(model.at("mount/m/onnx/model.onnx")).unwrap(), b"weights");
        place(&[Method::Copy], &model.files(), &[], &dest).unwrap();
        assert_usable(&dest);
    }

    #[test]
    fn bytes_that_are_not_what_their_digest_says_are_not_left_under_their_name() {
        let mut model = Model::new();
        model.open[2].1 = Digest::of(b"other");
        let dest = model.at("pod");
        let error = place(&[Method::Copy], &model.files(), &[], &dest).unwrap_err();
        assert!(error.to_string().contains("the bytes of `onnx/model.onnx` are not"), "{error}");
        assert!(!dest.join("onnx/model.onnx").exists());
        assert_eq!(fs::read_dir(dest.join("onnx")).unwrap().count(), 0);
    }

    #[test]
    fn a_destination_that_takes_nothing_is_told_for_each_method() {
        let model = Model::new();
        fs::write(model.at("file"), "").unwrap();
        let error = place(&Method::ALL, &model.files(), &[model.at("mount/m")], &model.at("file/dest")).unwrap_err();
        assert_eq!(error.tried.len(), 3);
        assert!(error.action().contains("emptyDir"), "{}", error.action());
    }

    #[test]
    fn the_way_from_one_place_to_another() {
        for (from, to, way) in [("/a/b", "/a/c/d", "../c/d"), ("/a", "/a/b", "b"), ("/mnt/models", "/v/x", "../../v/x")]
        {
            assert_eq!(relative(Path::new(from), Path::new(to)), Path::new(way));
        }
    }
}

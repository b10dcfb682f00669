//! `public/`: snapshots, which are hard links to blobs, and the Hub's refs, which name them.
//!
//! A snapshot is built in `ingests/` and gets its name when it is whole; it loses its name before it is taken apart. So
//! who looks at `public/` never sees half of one.

use std::collections::BTreeSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::io::{self, look_at};
use super::layout::{Scratch, hub_repo};
use super::stamp::{BLOB_MODE, Touch, hash_of};
use super::{Error, Volume, sizes_differ};
use crate::model::{Digest, Manifest, ManifestFile, RelPath};

/// `hub/models--org--name/refs`: what is below may be another revision's file.
const HUB_REFS_DEPTH: usize = 3;
const HUB_REF_MODE: u32 = 0o444;
const DIR_MODE: u32 = 0o555;
/// While it is built or taken apart: an ordinary user cannot change, nor rename, a directory that is read-only.
const DIR_MODE_OPEN: u32 = 0o755;

impl Volume {
    /// Lays a manifest out as a read-only directory below `public/`. Durable on return; the blobs must be here, and known to
    /// be right ([`Error::Unproven`] otherwise).
    ///
    /// One that is there already is kept if it is exactly this, and replaced otherwise.
    pub fn publish(&self, snapshot: &RelPath, manifest: &Manifest) -> Result<PathBuf, Error> {
        let target = self.public().join(snapshot.as_path());
        if self.holds_exactly(snapshot, manifest)? {
            self.restore_modes(snapshot, manifest)?;
            self.sync_parent(&target)?;
            return Ok(target);
        }
        let build = self.layout.scratch(Scratch::Snapshot);
        let mut touch = Touch::of(&self.stamps);
        let placed = self.build(&build, manifest, &mut touch).and_then(|()| self.place(&build, snapshot));
        if placed.is_err() {
            // The first error is the one to report; start-up sweeps what stays behind.
            let _ = self.destroy(&build);
        }
        placed?;
        Ok(target)
    }

    /// Whether a reader who enters the directory finds the manifest's files and nothing else, each known to be right, in
    /// directories he cannot write to. A look at each name, not at the bytes.
    pub fn is_laid_out(&self, snapshot: &RelPath, manifest: &Manifest) -> Result<bool, Error> {
        let is_right = |file: &ManifestFile, path: &Path| self.vouches_for(file.digest, path);
        Ok(self.has_right_dirs(snapshot, manifest)? && self.has_files(snapshot, manifest, is_right)?)
    }

    /// The same without opening a file, and less than a second after that without looking at each: it does not notice that
    /// blocks of two files were exchanged, and late what was done to a file that has no other name. [`Volume::open_blob`] does
    /// notice, for the file it hands out.
    pub fn looks_laid_out(&self, snapshot: &RelPath, manifest: &Manifest) -> Result<bool, Error> {
        let directories = || {
            let target = self.public().join(snapshot.as_path());
            let below: Vec<_> = dirs_of(manifest).iter().map(|dir| target.join(dir)).collect();
            [vec![target], below].concat()
        };
        self.glances.or_look(snapshot, directories, || {
            let is_right = |file: &ManifestFile, path: &Path| self.stamps.fits_but_for_place(file.digest, path);
            Ok(self.has_right_dirs(snapshot, manifest)? && self.has_files(snapshot, manifest, is_right)?)
        })
    }

    fn has_right_dirs(&self, snapshot: &RelPath, manifest: &Manifest) -> Result<bool, Error> {
        for (dir, mode) in self.modes_of(snapshot, manifest) {
            // A link in the place of a directory above would lead to the right files, but not in another mount.
            if mode_of(&dir)? != Some(mode) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn holds_exactly(&self, snapshot: &RelPath, manifest: &Manifest) -> Result<bool, Error> {
        for (dir, _) in self.modes_of(snapshot, manifest) {
            if mode_of(&dir)?.is_none() {
                return Ok(false);
            }
        }
        self.has_files(snapshot, manifest, |file, path| self.vouches_for(file.digest, path))
    }

    /// Whether these files are there, each right, and nothing else is.
    fn has_files(
        &self,
        snapshot: &RelPath,
        manifest: &Manifest,
        is_right: impl Fn(&ManifestFile, &Path) -> Result<bool, Error>,
    ) -> Result<bool, Error> {
        let target = self.public().join(snapshot.as_path());
        let (mut files, mut dirs, mut ahead) = (0, 0, vec![target.clone()]);
        while let Some(dir) = ahead.pop() {
            for (path, is_dir) in io::entries_in(&dir)? {
                if is_dir {
                    ahead.push(path);
                    dirs += 1;
                } else {
                    files += 1;
                }
            }
        }
        if (files, dirs) != (manifest.files().len(), dirs_of(manifest).len()) {
            return Ok(false);
        }
        for file in manifest.files() {
            if !is_right(file, &target.join(file.path.as_path()))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// What the mode of each directory must be, from `public/` to the innermost.
    fn modes_of(&self, snapshot: &RelPath, manifest: &Manifest) -> Vec<(PathBuf, u32)> {
        let (public, target) = (self.public(), self.public().join(snapshot.as_path()));
        let mut modes = vec![(public.clone(), DIR_MODE_OPEN)];
        modes.extend(snapshot.parents().map(|parent| (public.join(parent), DIR_MODE_OPEN)));
        modes.push((target.clone(), DIR_MODE));
        modes.extend(dirs_of(manifest).iter().map(|dir| (target.join(dir), DIR_MODE)));
        modes
    }

    fn restore_modes(&self, snapshot: &RelPath, manifest: &Manifest) -> Result<(), Error> {
        for (dir, mode) in self.modes_of(snapshot, manifest) {
            if mode_of(&dir)? != Some(mode) {
                self.disk.set_dir_mode(&dir, mode)?;
            }
        }
        Ok(())
    }

    /// Links every file, then makes every directory durable and read-only, but for the top one, which is still renamed.
    fn build(&self, build: &Path, manifest: &Manifest, touch: &mut Touch<'_>) -> Result<(), Error> {
        self.disk.make_dir(build, DIR_MODE_OPEN)?;
        let dirs = dirs_of(manifest);
        for dir in &dirs {
            self.disk.make_dir(&build.join(dir), DIR_MODE_OPEN)?;
        }
        for file in manifest.files() {
            self.lay_out_file(file, &build.join(file.path.as_path()), touch)?;
        }
        for dir in dirs.iter().map(|dir| build.join(dir)) {
            self.disk.set_dir_mode(&dir, DIR_MODE)?;
            self.disk.sync_dir(&dir)?;
        }
        self.disk.sync_dir(build)
    }

    fn lay_out_file(&self, file: &ManifestFile, at: &Path, touch: &mut Touch<'_>) -> Result<(), Error> {
        let blob = self.blob_path(file.digest);
        let corrupt = |found: String| Error::Corrupt { verb: "link", noun: "blob", path: blob.clone(), found };
        match self.blob_size(file.digest)? {
            None => return Err(corrupt("it is missing".into())),
            Some(size) if size != file.size => return Err(corrupt(sizes_differ(size, file.size))),
            Some(_) => {}
        }
        if !self.is_proven(file.digest)? {
            return Err(Error::Unproven { path: blob });
        }
        if !touch.around(&blob, || self.disk.link(&blob, at))? {
            return self.copy_blob(file.digest, file.size, at);
        }
        // Somebody could write it, or it became another inode: then this link is not known to be right.
        if self.vouches_for(file.digest, at)? { Ok(()) } else { Err(Error::Unproven { path: blob }) }
    }

    /// For a blob that has as many links as the file system allows (65,000 on ext4), or whose inode others could write.
    /// Verified, durable and stamped on return.
    pub(super) fn copy_blob(&self, digest: Digest, size: u64, at: &Path) -> Result<(), Error> {
        let path = self.blob_path(digest);
        let corrupt = |found: String| Error::Corrupt { verb: "copy", noun: "blob", path: path.clone(), found };
        let from = io::open_file(&path)?.ok_or_else(|| corrupt("it is missing".into()))?;
        let to = self.disk.create_new(at)?;
        if !self.disk.clone_bytes(&from, &to, at)? {
            let mut buffer = vec![0; 1 << 20];
            let mut copied = 0;
            loop {
                let got = io::read_up_to(&from, &path, &mut buffer)?;
                if got == 0 {
                    break;
                }
                self.disk.write_at(&to, at, &buffer[..got], copied)?;
                copied += got as u64;
            }
        }
        // Somebody may write the blob meanwhile, so what is hashed is the copy.
        let copy = io::open_file(at)?.ok_or_else(|| corrupt("its copy is gone".into()))?;
        if hash_of(&copy, at, size)? != digest {
            return Err(corrupt("its bytes are not what its name says".into()));
        }
        self.disk.sync_data(&to, at)?;
        self.disk.set_mode(&to, at, BLOB_MODE)?;
        self.stamps.put(digest, self.stamps.of(&copy, at)?);
        Ok(())
    }

    /// Gives what was built its name, and what had the name away.
    fn place(&self, build: &Path, snapshot: &RelPath) -> Result<(), Error> {
        let _shape = self.shape();
        self.clear_way(snapshot, usize::MAX)?;
        let target = self.make_public_parents(snapshot)?;
        let trash = match look_at(&target)? {
            Some(found) => Some(self.take_away(&target, found.is_dir())?),
            None => None,
        };
        self.disk.rename(build, &target)?;
        self.disk.set_dir_mode(&target, DIR_MODE)?;
        self.disk.sync_dir(&target)?;
        self.sync_parent(&target)?;
        trash.map_or(Ok(()), |trash| self.destroy(&trash))
    }

    /// Takes away what is no directory where one above `path` must be. Nothing of ours is, but for files below the first
    /// `depth` directories.
    fn clear_way(&self, path: &RelPath, depth: usize) -> Result<(), Error> {
        for (at, parent) in path.parents().map(|parent| self.public().join(parent)).enumerate() {
            match look_at(&parent)? {
                Some(found) if found.is_dir() || found.is_file() && at >= depth => {}
                Some(_) => {
                    let trash = self.take_away(&parent, false)?;
                    self.destroy(&trash)?;
                }
                None => break,
            }
        }
        Ok(())
    }

    /// Makes the directories above `path`, durably, and returns where it is. Those that are there are made durable too:
    /// a process may have been killed between making and syncing them.
    fn make_public_parents(&self, path: &RelPath) -> Result<PathBuf, Error> {
        let public = self.public();
        for parent in path.parents().map(|parent| public.join(parent)) {
            if !self.disk.make_dir(&parent, DIR_MODE_OPEN)? && mode_of(&parent)? != Some(DIR_MODE_OPEN) {
                self.disk.set_dir_mode(&parent, DIR_MODE_OPEN)?;
            }
            self.sync_parent(&parent)?;
        }
        Ok(public.join(path.as_path()))
    }

    /// Takes the name from a thing in `public/`; returns where it is now.
    fn take_away(&self, path: &Path, is_dir: bool) -> Result<PathBuf, Error> {
        let trash = self.layout.scratch(Scratch::Trash);
        if is_dir {
            self.disk.set_dir_mode(path, DIR_MODE_OPEN)?;
        }
        self.disk.rename(path, &trash)?;
        Ok(trash)
    }

    /// Removes a thing of `ingests/` that has lost its name, or never had one.
    pub(super) fn destroy(&self, trash: &Path) -> Result<(), Error> {
        let mut touch = Touch::of(&self.stamps);
        let mut unlink = |path: &Path| touch.around(path, || self.disk.unlink(path));
        if look_at(trash)?.is_some_and(|found| found.is_dir()) {
            self.disk.remove_tree(trash, unlink)
        } else {
            unlink(trash).map(drop)
        }
    }

    /// Takes the name from a snapshot, durably, then takes it apart; and the directories above it that become empty.
    /// The blobs stay. One that is not here is no error.
    pub fn remove_snapshot(&self, snapshot: &RelPath) -> Result<(), Error> {
        let path = self.public().join(snapshot.as_path());
        let trash = {
            let _shape = self.shape();
            let trash = match look_at(&path)? {
                Some(found) => Some(self.take_away(&path, found.is_dir())?),
                None => None,
            };
            if trash.is_some() {
                self.sync_parent(&path)?;
            }
            self.prune_above(snapshot)?;
            trash
        };
        trash.map_or(Ok(()), |trash| self.destroy(&trash))
    }

    /// Removes the directories above `path` that are empty, but never `public/`. The caller holds the shape.
    fn prune_above(&self, path: &RelPath) -> Result<(), Error> {
        let parents: Vec<PathBuf> = path.parents().map(|parent| self.public().join(parent)).collect();
        for parent in parents.iter().rev() {
            let there = look_at(parent)?.is_some();
            if there && !self.disk.remove_empty_dir(parent)? {
                break;
            }
        }
        Ok(())
    }

    /// Writes `hub/models--org--name/refs/<revision>`, which tells the Hub's libraries the name of the snapshot's
    /// directory. Durable on return.
    ///
    /// Fails with [`Error::RefConflict`] when another revision is a directory of this one, or the other way round.
    pub fn write_hub_ref(&self, repo: &str, revision: &str, snapshot_name: &str) -> Result<(), Error> {
        let path = hub_ref(repo, revision)?;
        let _shape = self.shape();
        self.clear_way(&path, HUB_REFS_DEPTH)?;
        self.check_hub_ref_is_free(repo, revision, &path)?;
        let file = self.make_public_parents(&path)?;
        self.disk.replace(&self.layout.scratch(Scratch::File), &file, snapshot_name.as_bytes(), HUB_REF_MODE)
    }

    /// The name that a ref of the Hub layout gives, if it is there as larder writes one.
    pub fn hub_ref(&self, repo: &str, revision: &str) -> Result<Option<String>, Error> {
        let path = hub_ref(repo, revision)?;
        for dir in path.parents().map(|parent| self.public().join(parent)) {
            if mode_of(&dir)? != Some(DIR_MODE_OPEN) {
                return Ok(None);
            }
        }
        let file = self.public().join(path.as_path());
        if !look_at(&file)?.is_some_and(|found| found.is_file() && found.mode() & 0o7777 == HUB_REF_MODE) {
            return Ok(None);
        }
        Ok(io::read_small(&file)?.and_then(|bytes| String::from_utf8(bytes).ok()))
    }

    fn check_hub_ref_is_free(&self, repo: &str, revision: &str, path: &RelPath) -> Result<(), Error> {
        let public = self.public();
        let file = public.join(path.as_path());
        // Empty directories are left behind by a crash between unlinking a ref and pruning; nothing else removes them.
        self.prune_inside(&file)?;
        let mut in_the_way = look_at(&file)?.filter(|found| found.is_dir()).map(|_| file);
        for parent in path.parents().map(|parent| public.join(parent)) {
            if in_the_way.is_none() && look_at(&parent)?.is_some_and(|found| !found.is_dir()) {
                in_the_way = Some(parent);
            }
        }
        match in_the_way {
            None => Ok(()),
            Some(path) => Err(Error::RefConflict { repo: repo.to_owned(), revision: revision.to_owned(), path }),
        }
    }

    /// Removes the directories in and below `dir` that hold no file. The caller holds the shape.
    fn prune_inside(&self, dir: &Path) -> Result<(), Error> {
        let mut dirs = Vec::new();
        let mut ahead = vec![dir.to_owned()];
        while let Some(dir) = ahead.pop() {
            if look_at(&dir)?.is_some_and(|found| found.is_dir()) {
                ahead.extend(io::names_in(&dir)?.into_iter().map(|name| dir.join(name)));
                dirs.push(dir);
            }
        }
        for dir in dirs.iter().rev() {
            self.disk.remove_empty_dir(dir)?;
        }
        Ok(())
    }

    /// Removes a ref of the Hub layout, durably, and the directories that become empty. One that is not here is no
    /// error.
    pub fn remove_hub_ref(&self, repo: &str, revision: &str) -> Result<(), Error> {
        let path = hub_ref(repo, revision)?;
        let _shape = self.shape();
        self.remove_public_file(&path)
    }

    /// The caller holds the shape.
    pub(super) fn remove_public_file(&self, path: &RelPath) -> Result<(), Error> {
        let file = self.public().join(path.as_path());
        // A directory here is another revision's.
        if look_at(&file)?.is_some_and(|found| !found.is_dir()) {
            self.disk.unlink(&file)?;
            self.sync_parent(&file)?;
        }
        self.prune_above(path)
    }

    /// Removes the directories of `public/` that hold no file and are no snapshot. Returns nothing: they take no space.
    pub(super) fn prune_public(&self, dirs: &[RelPath]) -> Result<(), Error> {
        let _shape = self.shape();
        // Inside out, because the list is sorted.
        for dir in dirs.iter().rev() {
            self.disk.remove_empty_dir(&self.public().join(dir.as_path()))?;
        }
        Ok(())
    }
}

/// The directories below the snapshot's own, outermost first.
fn dirs_of(manifest: &Manifest) -> BTreeSet<String> {
    manifest.files().iter().flat_map(|file| file.path.parents()).map(|dir| dir.to_owned()).collect()
}

/// Who may do what in a directory; `None` when there is none. A volume may have the set-group-id bit above it, and so in it.
fn mode_of(dir: &Path) -> Result<Option<u32>, Error> {
    Ok(look_at(dir)?.filter(|found| found.is_dir()).map(|found| found.mode() & 0o777))
}

fn hub_ref(repo: &str, revision: &str) -> Result<RelPath, Error> {
    // The repository is one component, so its slash must not make it two; the revision may have some.
    RelPath::new(revision)
        .and_then(|revision| RelPath::new(&format!("{}/refs/{revision}", hub_repo(repo))))
        .map_err(|source| Error::Name { noun: "a Hub ref", source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Code, Diagnose};
    use crate::store::Proof;
    use crate::store::ingest::tests::stored;
    use crate::store::record::tests::manifest;
    use std::fs;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::PermissionsExt;

    fn mode_of(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn rel(path: &str) -> RelPath {
        RelPath::new(path).unwrap()
    }

    fn volume_with(root: &Path, contents: &[&[u8]]) -> Volume {
        let volume = Volume::open(root).unwrap();
        for bytes in contents {
            stored(&volume, bytes);
        }
        volume
    }

    fn scratch_names(root: &Path) -> Vec<String> {
        io::names_in(&root.join("ingests")).unwrap()
    }

    #[test]
    fn a_snapshot_is_a_read_only_directory_of_links_to_blobs() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume_with(dir.path(), &[b"one", b"two", b""]);
        let manifest = manifest(&[
            ("config.json", b"one"),
            ("Config.json", b"two"),
            ("deep/er/model.bin", b"one"),
            ("deep/__init__.py", b""),
            ("@x", b""),
        ]);
        let target = volume.publish(&rel("hub/models--o--n/snapshots/v1"), &manifest).unwrap();
        assert_eq!(target, dir.path().join("public/hub/models--o--n/snapshots/v1"));
        for file in manifest.files() {
            let path = target.join(file.path.as_path());
            let (link, blob) =
                (fs::symlink_metadata(&path).unwrap(), fs::metadata(volume.blob_path(file.digest)).unwrap());
            assert_eq!((link.ino(), link.len()), (blob.ino(), file.size), "{}", file.path);
            assert_eq!(mode_of(&path), 0o444);
        }
        for dir in ["", "deep", "deep/er"] {
            assert_eq!(mode_of(&target.join(dir)), 0o555, "{dir:?}");
        }
        assert_eq!(mode_of(target.parent().unwrap()), 0o755);
        assert_eq!(scratch_names(dir.path()), Vec::<String>::new());

        volume.remove_snapshot(&rel("hub/models--o--n/snapshots/v1")).unwrap();
        volume.remove_snapshot(&rel("hub/models--o--n/snapshots/v1")).unwrap();
        assert_eq!(io::names_in(&volume.public()).unwrap(), Vec::<String>::new());
        assert_eq!(scratch_names(dir.path()), Vec::<String>::new());
        assert_eq!(volume.blobs().unwrap().len(), 3);
    }

    #[test]
    fn publishing_again_keeps_what_is_right_and_replaces_what_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume_with(dir.path(), &[b"one", b"two"]);
        let path = rel("s3/bucket/@v1");
        let manifest = manifest(&[("a", b"one"), ("d/b", b"two")]);
        let target = volume.publish(&path, &manifest).unwrap();
        let inode = || fs::metadata(&target).unwrap().ino();
        let before = inode();
        volume.publish(&path, &manifest).unwrap();
        assert_eq!(inode(), before);

        // Killed between the name and the mode.
        fs::set_permissions(&target, fs::Permissions::from_mode(0o755)).unwrap();
        volume.publish(&path, &manifest).unwrap();
        assert_eq!((inode(), mode_of(&target)), (before, 0o555));

        let spoil: [fn(&Path); 7] = [
            |dir| fs::write(dir.join("extra"), "x").unwrap(),
            |dir| fs::write(dir.join(std::ffi::OsStr::from_bytes(b"\xff")), "x").unwrap(),
            |dir| fs::create_dir(dir.join("extra")).unwrap(),
            |dir| {
                let (s3, aside) = (dir.parent().unwrap().parent().unwrap(), dir.ancestors().nth(3).unwrap().join("z"));
                fs::rename(s3, &aside).unwrap();
                std::os::unix::fs::symlink(&aside, s3).unwrap();
            },
            |dir| fs::remove_file(dir.join("a")).unwrap(),
            |dir| {
                fs::remove_file(dir.join("a")).unwrap();
                fs::write(dir.join("a"), "one").unwrap();
            },
            |dir| {
                fs::remove_file(dir.join("a")).unwrap();
                std::os::unix::fs::symlink("d/b", dir.join("a")).unwrap();
            },
        ];
        for spoil in spoil {
            let before = inode();
            fs::set_permissions(&target, fs::Permissions::from_mode(0o755)).unwrap();
            assert!(volume.is_laid_out(&path, &manifest).is_ok_and(|is| !is), "the mode of the directory is not ours");
            spoil(&target);
            assert!(!volume.is_laid_out(&path, &manifest).unwrap());
            // Unlinking and linking touch an inode as a write does.
            for file in manifest.files() {
                assert_eq!(volume.prove(file.digest, file.size).unwrap(), Proof::Right);
            }
            volume.publish(&path, &manifest).unwrap();
            assert_ne!(inode(), before);
            assert!(volume.is_laid_out(&path, &manifest).unwrap());
            assert_eq!(io::names_in(&target).unwrap(), ["a", "d"]);
            assert_eq!(fs::read(target.join("a")).unwrap(), b"one");
            assert_eq!(scratch_names(dir.path()), Vec::<String>::new());
        }
    }

    #[test]
    fn a_missing_or_short_blob_publishes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume_with(dir.path(), &[b"one", b"two"]);
        let manifest = manifest(&[("a", b"one"), ("b", b"two")]);
        let blob = volume.blob_path(Digest::of(b"two"));
        let spoil: [fn(&Path); 2] = [|blob| fs::remove_file(blob).unwrap(), |blob| fs::write(blob, "tw").unwrap()];
        for spoil in spoil {
            spoil(&blob);
            let error = volume.publish(&rel("s3/bucket/@v1"), &manifest).unwrap_err();
            assert_eq!(error.code(), Code::StoreCorrupt);
            assert!(!volume.public().join("s3/bucket/@v1").exists());
            assert_eq!(scratch_names(dir.path()), Vec::<String>::new());
        }
    }

    #[test]
    fn a_blob_with_too_many_links_is_copied_and_verified() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume_with(dir.path(), &[b"one"]);
        let (digest, to) = (Digest::of(b"one"), dir.path().join("ingests/copy"));
        volume.copy_blob(digest, 3, &to).unwrap();
        assert_eq!((fs::read(&to).unwrap(), mode_of(&to)), (b"one".to_vec(), 0o444));
        fs::remove_file(&to).unwrap();

        fs::remove_file(volume.blob_path(digest)).unwrap();
        fs::write(volume.blob_path(digest), "eno").unwrap();
        assert_eq!(volume.copy_blob(digest, 3, &to).unwrap_err().code(), Code::StoreCorrupt);
    }

    #[test]
    fn a_model_of_many_equal_files_is_laid_out_even_when_links_run_out() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume_with(dir.path(), &[b"one"]);
        let blob = volume.blob_path(Digest::of(b"one"));
        let links = dir.path().join("links");
        fs::create_dir(&links).unwrap();
        let runs_out = (0..70_000).any(|n| !volume.disk.link(&blob, &links.join(n.to_string())).unwrap());
        if !runs_out {
            println!("skipped: this file system allows more than 70,000 links");
            return;
        }
        let manifest = manifest(&[("a", b"one"), ("b", b"one")]);
        let path = rel("s3/bucket/@v1");
        assert!(matches!(volume.publish(&path, &manifest), Err(Error::Unproven { .. })));
        assert_eq!(volume.prove(Digest::of(b"one"), 3).unwrap(), Proof::Right);
        let target = volume.publish(&path, &manifest).unwrap();
        assert!(volume.is_laid_out(&path, &manifest).unwrap(), "a copy is known to be right too");
        for name in ["a", "b"] {
            let copy = fs::metadata(target.join(name)).unwrap();
            assert_ne!(copy.ino(), fs::metadata(&blob).unwrap().ino());
            assert_eq!((fs::read(target.join(name)).unwrap(), mode_of(&target.join(name))), (b"one".to_vec(), 0o444));
        }
    }

    #[test]
    fn hub_refs_name_the_snapshot_and_go_away_without_a_trace() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let refs = volume.public().join("hub/models--org--name/refs");
        for (revision, snapshot) in [("main", "c1"), ("refs/pr/1", "c2"), ("main", "c3")] {
            volume.write_hub_ref("org/name", revision, snapshot).unwrap();
            assert_eq!(fs::read_to_string(refs.join(revision)).unwrap(), snapshot);
            assert_eq!(mode_of(&refs.join(revision)), 0o444);
        }
        for revision in ["refs/pr", "refs"] {
            // A directory of other revisions is not this revision.
            volume.remove_hub_ref("org/name", revision).unwrap();
            assert!(refs.join("refs/pr/1").exists());
        }
        for revision in ["refs/pr/1", "main", "main"] {
            volume.remove_hub_ref("org/name", revision).unwrap();
        }
        assert_eq!(io::names_in(&volume.public()).unwrap(), Vec::<String>::new());
        for hostile in ["../../../x", "/x", "", "a//b"] {
            assert_eq!(volume.write_hub_ref("org/name", hostile, "c").unwrap_err().code(), Code::UnsafeName);
        }
    }

    #[test]
    fn revisions_that_cannot_both_be_files_do_each_other_no_harm() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let refs = volume.public().join("hub/models--o--n/refs");
        for (first, second) in [("a", "a/b"), ("x/y", "x")] {
            volume.write_hub_ref("o/n", first, "c1").unwrap();
            let error = volume.write_hub_ref("o/n", second, "c2").unwrap_err();
            assert!(matches!(error, Error::RefConflict { .. }), "{error}");
            assert_eq!(fs::read_to_string(refs.join(first)).unwrap(), "c1");
            volume.remove_hub_ref("o/n", first).unwrap();
            // What a crash between removing the ref and its directory leaves.
            fs::create_dir_all(refs.join(second).join("empty")).unwrap();
            volume.write_hub_ref("o/n", second, "c2").unwrap();
            volume.remove_hub_ref("o/n", second).unwrap();
        }
    }

    #[test]
    fn a_link_planted_in_public_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let volume = volume_with(dir.path(), &[b"one"]);
        let outside = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), volume.public().join("s3")).unwrap();
        let (path, manifest) = (rel("s3/@v1"), manifest(&[("a", b"one")]));
        let target = volume.publish(&path, &manifest).unwrap();
        assert!(fs::symlink_metadata(target.parent().unwrap()).unwrap().is_dir(), "it is taken out of the way");
        assert_eq!(io::names_in(outside.path()).unwrap(), Vec::<String>::new());
    }
}

//! What nothing names goes away: at the start of a process, before anything is pulled.
//!
//! Unknown means no. If one record cannot be read, or the manifest of one, then nobody knows what it names, and nothing
//! is removed at all. Names that are not ours are left where they are.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

use super::io::{self, allocated_bytes, look_at, names_in};
use super::layout::{BY_SCHEME, HUB, Scratch, VERSION_MARK};
use super::{Error, Volume, ingest};
use crate::model::{Digest, ModelId, Record, RelPath};

/// How long bytes are kept that nothing names but somebody may come back for: ingests, and blobs in quarantine.
pub const UNNAMED_KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// Space beyond the end of a part below this is the file system's own business.
const TRIM_ABOVE_BYTES: u64 = 1 << 20;

/// What a sweep removed.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Swept {
    /// Blobs no manifest names, and those whose time in quarantine is over.
    pub blobs: u64,
    /// Manifests no record names.
    pub manifests: u64,
    /// Snapshots no record names, and refs of the Hub layout that point to nothing.
    pub snapshots: u64,
    /// Ingests nobody can or did resume, and what was being built or thrown away.
    pub ingests: u64,
    /// Bytes of the disk this gave back.
    pub bytes: u64,
}

/// What must stay.
struct Named {
    models: BTreeSet<ModelId>,
    snapshots: BTreeSet<RelPath>,
    manifests: BTreeSet<Digest>,
    blobs: BTreeSet<Digest>,
}

/// What was found in `public/`.
#[derive(Default)]
struct Public {
    snapshots: Vec<RelPath>,
    /// Refs of the Hub layout.
    refs: Vec<RelPath>,
    /// Directories that are no snapshots, outermost first.
    dirs: Vec<RelPath>,
}

impl Volume {
    /// Removes nameless things: snapshots, manifests and blobs no record reaches, trash, dead temporaries, old ingests.
    /// Blobs that the note of a finished ingest names stay as long as the note.
    ///
    /// `records` are joined by those on disk. If one on disk cannot be read, or the manifest of one cannot, nothing is
    /// removed: the caller removes that record first, or leaves all as it is. To be called while no pull runs.
    pub fn sweep(&self, records: &[Record]) -> Result<Swept, Error> {
        let mut swept = Swept::default();
        let Some(mut named) = self.named(records)? else { return Ok(swept) };
        let now = SystemTime::now();
        self.sweep_ingests(now, &mut named, &mut swept)?;
        // Outside in, as everything is destroyed: what is left after a crash is nameless again.
        self.sweep_public(&named, &mut swept)?;
        self.sweep_manifests(&named, &mut swept)?;
        self.sweep_blobs(&named, &mut swept)?;
        self.sweep_quarantine(now, &mut swept)?;
        self.sweep_starts(|model| named.models.contains(&model))?;
        Ok(swept)
    }

    /// `None` when it cannot be known.
    fn named(&self, given: &[Record]) -> Result<Option<Named>, Error> {
        let (on_disk, unreadable) = self.records()?;
        if !unreadable.is_empty() {
            return Ok(None);
        }
        let mut named = Named {
            models: BTreeSet::new(),
            snapshots: BTreeSet::new(),
            manifests: BTreeSet::new(),
            blobs: BTreeSet::new(),
        };
        let mut seen: BTreeSet<(ModelId, Digest)> = BTreeSet::new();
        for record in given.iter().chain(&on_disk) {
            if !seen.insert((record.id(), record.manifest)) {
                continue;
            }
            named.models.insert(record.id());
            named.snapshots.insert(record.snapshot.clone());
            if named.manifests.insert(record.manifest) {
                match self.read_manifest(record.manifest) {
                    Ok(manifest) => named.blobs.extend(manifest.files().iter().map(|file| file.digest)),
                    Err(_) => return Ok(None),
                }
            }
        }
        Ok(Some(named))
    }

    /// Adds the blobs of the notes that stay to `named`.
    fn sweep_ingests(&self, now: SystemTime, named: &mut Named, swept: &mut Swept) -> Result<(), Error> {
        let dir = self.layout.ingests();
        let names = names_in(&dir)?;
        let ids: BTreeSet<&str> = names.iter().filter_map(|name| ingest_id(name)).collect();
        for id in ids {
            let (part, log) = (self.layout.ingest_part(id), self.layout.ingest_log(id));
            let is_being_written = match io::open_file(&part) {
                Ok(Some(file)) => io::try_lock(file, &part)?.is_none(),
                _ => false,
            };
            if is_being_written {
                continue;
            }
            let done = ingest::done_blob(&log).unwrap_or(None);
            let has_part = look_at(&part)?.is_some();
            let is_blob = match done {
                Some(digest) => self.blob_size(digest)?.is_some(),
                None => false,
            };
            let is_young = is_younger(&part, now)? || is_younger(&log, now)?;
            if is_young && (is_blob || has_part && ingest::is_resumable(&log).unwrap_or(false)) {
                named.blobs.extend(done.filter(|_| is_blob));
                if has_part {
                    swept.bytes += self.trim_part(&part)?;
                }
                continue;
            }
            swept.bytes += look_at(&part)?.map_or(0, |found| allocated_bytes(&found));
            // The note first: without it the bytes are never taken for something.
            self.destroy(&log)?;
            self.destroy(&part)?;
            swept.ingests += 1;
        }
        for name in names.iter().filter(|name| Scratch::ALL.iter().any(|kind| name.starts_with(kind.prefix()))) {
            self.destroy(&dir.join(name))?;
            swept.ingests += 1;
        }
        Ok(())
    }

    /// Gives back the space that a killed process had asked for and not used. Returns how much.
    fn trim_part(&self, path: &Path) -> Result<u64, Error> {
        let taken = |found: &std::fs::Metadata| allocated_bytes(found).saturating_sub(found.len());
        let Some(before) = look_at(path)?.filter(|found| found.is_file() && taken(found) > TRIM_ABOVE_BYTES) else {
            return Ok(0);
        };
        let file = self.disk.open_or_create(path)?;
        self.disk.set_len(&file, path, before.len())?;
        // The age of an ingest is when its bytes came.
        self.disk.set_modified(&file, path, before.modified().unwrap_or(SystemTime::UNIX_EPOCH))?;
        let after = look_at(path)?.map_or(0, |after| allocated_bytes(&after));
        Ok(allocated_bytes(&before).saturating_sub(after))
    }

    fn sweep_public(&self, named: &Named, swept: &mut Swept) -> Result<(), Error> {
        let mut found = Public::default();
        self.walk_hub(&mut found)?;
        for scheme in BY_SCHEME {
            self.walk_versions(RelPath::new(scheme).expect("a scheme is a path"), &mut found)?;
        }
        for snapshot in found.snapshots.iter().filter(|snapshot| !named.snapshots.contains(*snapshot)) {
            self.remove_snapshot(snapshot)?;
            swept.snapshots += 1;
        }
        for path in &found.refs {
            if !self.hub_ref_points_to_something(path)? {
                self.remove_public_file(path)?;
                swept.snapshots += 1;
            }
        }
        found.dirs.sort();
        self.prune_public(&found.dirs)
    }

    fn walk_hub(&self, found: &mut Public) -> Result<(), Error> {
        let Some(hub) = self.public_dir(HUB)? else { return Ok(()) };
        found.dirs.push(hub.clone());
        for repo in self.public_names(&hub)?.filter_map(|(name, is_dir)| is_dir.then_some(name)) {
            found.dirs.push(repo.clone());
            for (below, is_dir) in self.public_names(&repo)?.filter(|(_, is_dir)| *is_dir) {
                match below.components().last() {
                    Some("snapshots") => {
                        found
                            .snapshots
                            .extend(self.public_names(&below)?.filter(|(_, is_dir)| *is_dir).map(|(n, _)| n));
                        found.dirs.push(below);
                    }
                    Some("refs") => {
                        let mut ahead = vec![(below, is_dir)];
                        while let Some((path, is_dir)) = ahead.pop() {
                            if is_dir {
                                ahead.extend(self.public_names(&path)?);
                                found.dirs.push(path);
                            } else {
                                found.refs.push(path);
                            }
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }

    fn walk_versions(&self, top: RelPath, found: &mut Public) -> Result<(), Error> {
        let mut ahead: Vec<RelPath> = self.public_dir(top.as_str())?.into_iter().collect();
        while let Some(dir) = ahead.pop() {
            for (path, _) in self.public_names(&dir)?.filter(|(_, is_dir)| *is_dir) {
                if path.components().last().is_some_and(|name| name.starts_with(VERSION_MARK)) {
                    found.snapshots.push(path);
                } else {
                    ahead.push(path);
                }
            }
            found.dirs.push(dir);
        }
        Ok(())
    }

    fn public_dir(&self, path: &str) -> Result<Option<RelPath>, Error> {
        let path = RelPath::new(path).expect("a directory of the layout is a path");
        Ok(look_at(&self.public().join(path.as_path()))?.filter(|found| found.is_dir()).map(|_| path))
    }

    /// What is in a directory of `public/`, and whether each is a directory. Names that cannot be ours are left out.
    fn public_names(&self, dir: &RelPath) -> Result<impl Iterator<Item = (RelPath, bool)>, Error> {
        let mut found = Vec::new();
        for name in names_in(&self.public().join(dir.as_path()))? {
            let Ok(path) = RelPath::new(&format!("{dir}/{name}")) else { continue };
            if let Some(metadata) = look_at(&self.public().join(path.as_path()))? {
                found.push((path, metadata.is_dir()));
            }
        }
        Ok(found.into_iter())
    }

    fn hub_ref_points_to_something(&self, path: &RelPath) -> Result<bool, Error> {
        let public = self.public();
        let Ok(Some(bytes)) = io::read_small(&public.join(path.as_path())) else { return Ok(false) };
        let Some(name) = String::from_utf8(bytes).ok().and_then(|name| RelPath::new(&name).ok()) else {
            return Ok(false);
        };
        // hub/models--org--name/refs/…
        let repo = path.parents().nth(1).expect("a ref is in refs/ of a repository");
        let snapshot = public.join(repo).join("snapshots").join(name.as_path());
        Ok(name.components().count() == 1 && look_at(&snapshot)?.is_some_and(|found| found.is_dir()))
    }

    fn sweep_manifests(&self, named: &Named, swept: &mut Swept) -> Result<(), Error> {
        for name in names_in(&self.layout.manifests())? {
            let Ok(digest) = Digest::from_hex(&name) else { continue };
            if !named.manifests.contains(&digest) {
                let found = look_at(&self.layout.manifest(digest))?;
                self.remove_manifest(digest)?;
                swept.bytes += found.map_or(0, |found| allocated_bytes(&found));
                swept.manifests += 1;
            }
        }
        Ok(())
    }

    fn sweep_blobs(&self, named: &Named, swept: &mut Swept) -> Result<(), Error> {
        for digest in self.blob_names()? {
            if !named.blobs.contains(&digest) && self.blob_size(digest)?.is_some() {
                swept.bytes += self.remove_blob(digest, None)?.disk_bytes;
                swept.blobs += 1;
            }
        }
        Ok(())
    }

    fn sweep_quarantine(&self, now: SystemTime, swept: &mut Swept) -> Result<(), Error> {
        for name in names_in(&self.layout.quarantine())? {
            let path = self.layout.quarantine().join(&name);
            let Some(found) = look_at(&path)? else { continue };
            // The change of name is a change of the inode, not of its bytes.
            let since = std::os::unix::fs::MetadataExt::ctime(&found).max(0) as u64;
            let moved = SystemTime::UNIX_EPOCH + Duration::from_secs(since);
            if Digest::from_hex(&name).is_ok() && is_over(moved, now) {
                self.destroy(&path)?;
                swept.bytes += allocated_bytes(&found);
                swept.blobs += 1;
            }
        }
        Ok(())
    }
}

/// The id of an ingest, from the name of its part or its log.
fn ingest_id(name: &str) -> Option<&str> {
    let id = name.strip_suffix(".part").or_else(|| name.strip_suffix(".log"))?;
    (id.len() == 32 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))).then_some(id)
}

fn is_younger(path: &Path, now: SystemTime) -> Result<bool, Error> {
    let Some(found) = look_at(path)? else { return Ok(false) };
    Ok(!is_over(found.modified().unwrap_or(SystemTime::UNIX_EPOCH), now))
}

/// A time in the future says that the clock was wrong; it counts as now.
fn is_over(since: SystemTime, now: SystemTime) -> bool {
    now.duration_since(since).is_ok_and(|age| age > UNNAMED_KEPT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Manifest;
    use crate::store::ingest::tests::{key, started, stored};
    use crate::store::record::tests::{manifest, record};
    use crate::store::{Begun, IngestKey};
    use std::fs;

    /// A model as a pull makes it.
    fn model(volume: &Volume, reference: &str, files: &[(&str, &[u8])]) -> Record {
        for (_, bytes) in files {
            stored(volume, bytes);
        }
        let manifest: Manifest = manifest(files);
        volume.write_manifest(&manifest).unwrap();
        let record = record(reference, "v1", &manifest);
        volume.publish(&record.snapshot, &manifest).unwrap();
        volume.write_record(&record).unwrap();
        record
    }

    fn everything(root: &Path) -> Vec<String> {
        let mut all = Vec::new();
        let mut ahead = vec![root.to_owned()];
        while let Some(dir) = ahead.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                all.push(path.strip_prefix(root).unwrap().to_str().unwrap().to_owned());
                if fs::symlink_metadata(&path).unwrap().is_dir() {
                    ahead.push(path);
                }
            }
        }
        all.sort();
        all
    }

    fn age(path: &Path, by: Duration) {
        let file = fs::File::open(path).unwrap();
        file.set_modified(SystemTime::now() - by).unwrap();
    }

    /// Leaves one nameless thing of every kind.
    fn litter(volume: &Volume) {
        let root = volume.root();
        let lost = model(volume, "hf://o/lost@main", &[("a", b"lost"), ("d/b", b"lost too"), ("c", b"shared")]);
        volume.write_hub_ref("o/lost", "refs/pr/1", "v1").unwrap();
        volume.write_hub_ref("o/kept", "gone", "v0").unwrap();
        volume.remove_record(lost.id()).unwrap();
        let lost = model(volume, "https://host/lost/x/", &[("a", b"lost")]);
        volume.remove_record(lost.id()).unwrap();
        fs::create_dir_all(root.join("public/gs/b/empty/below")).unwrap();
        fs::create_dir_all(root.join("ingests/snapshot-1/d")).unwrap();
        fs::create_dir_all(root.join("ingests/trash-1/d")).unwrap();
        fs::write(root.join("ingests/trash-1/d/x"), "x").unwrap();
        fs::write(root.join("ingests/tmp-1"), "x").unwrap();
        fs::write(root.join("ingests").join(format!("{:032x}.part", 1)), "no log").unwrap();
        fs::write(root.join("ingests").join(format!("{:032x}.log", 2)), "no part").unwrap();
        stored(volume, b"nobody names me");
    }

    #[test]
    fn what_records_name_stays_and_the_rest_goes() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let mut records = Vec::new();
        records.push(model(&volume, "hf://o/kept@main", &[("a", b"kept"), ("@v/b", b"shared")]));
        volume.write_hub_ref("o/kept", "main", "v1").unwrap();
        records.push(model(&volume, "s3://bucket/a/@b", &[("a", b"kept"), ("e/__init__.py", b"")]));
        records.push(model(&volume, "https://host/file.gguf", &[("file.gguf", b"kept")]));
        let before = everything(dir.path());
        litter(&volume);
        assert_ne!(everything(dir.path()), before);

        let swept = volume.sweep(&records).unwrap();
        assert_eq!((swept.blobs, swept.manifests, swept.snapshots, swept.ingests), (3, 2, 4, 5));
        assert!(swept.bytes >= 3 * 512, "{swept:?}");
        assert_eq!(everything(dir.path()), before);
        assert_eq!(volume.sweep(&records).unwrap(), Swept::default());
        assert_eq!(everything(dir.path()), before);
        for record in &records {
            volume.read_manifest(record.manifest).unwrap();
        }
    }

    #[test]
    fn nothing_is_removed_while_a_record_or_its_manifest_cannot_be_read() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let kept = model(&volume, "hf://o/kept@main", &[("a", b"kept")]);
        litter(&volume);
        let torn = dir.path().join("refs/0000000000000001");
        fs::write(&torn, "{").unwrap();
        let before = everything(dir.path());
        assert_eq!(volume.sweep(std::slice::from_ref(&kept)).unwrap(), Swept::default());
        assert_eq!(everything(dir.path()), before);
        fs::remove_file(&torn).unwrap();

        volume.remove_manifest(kept.manifest).unwrap();
        let before = everything(dir.path());
        assert_eq!(volume.sweep(&[]).unwrap(), Swept::default());
        assert_eq!(everything(dir.path()), before);

        volume.remove_record(kept.id()).unwrap();
        assert!(volume.sweep(&[]).unwrap().blobs > 0);
        assert!(volume.blobs().unwrap().is_empty());
    }

    #[test]
    fn a_record_on_disk_counts_even_if_the_caller_does_not_know_it() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        model(&volume, "hf://o/kept@main", &[("a", b"kept")]);
        let before = everything(dir.path());
        assert_eq!(volume.sweep(&[]).unwrap(), Swept::default());
        assert_eq!(everything(dir.path()), before);
    }

    #[test]
    fn ingests_stay_for_a_week_and_so_do_the_blobs_they_finished() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let (half, done, alive) = (key(b"half of it"), key(b"done"), key(b"alive"));
        let mut ingest = started(&volume, &half);
        ingest.write(b"half").unwrap();
        ingest.pause().unwrap();
        let mut ingest = started(&volume, &done);
        ingest.write(b"done").unwrap();
        let blob = ingest.commit().unwrap();
        let before = everything(dir.path());
        assert_eq!(volume.sweep(&[]).unwrap(), Swept::default());
        assert_eq!(everything(dir.path()), before);
        assert_eq!(started(&volume, &half).len(), 4);
        assert!(matches!(volume.begin(&done).unwrap(), Begun::Done(found) if found == blob));

        let living = [started(&volume, &alive), started(&volume, &IngestKey { claim: None, ..alive.clone() })];
        for name in names_in(&dir.path().join("ingests")).unwrap() {
            age(&dir.path().join("ingests").join(name), UNNAMED_KEPT + Duration::from_secs(60));
        }
        let swept = volume.sweep(&[]).unwrap();
        assert_eq!((swept.ingests, swept.blobs), (2, 1));
        drop(living);
        assert_eq!(volume.blobs().unwrap(), []);
        assert_eq!(started(&volume, &half).len(), 0);
    }

    #[test]
    fn space_a_killed_process_had_asked_for_is_given_back() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let key = key(&[7; 9 << 20]);
        let mut ingest = started(&volume, &key);
        ingest.write(b"\x07\x07").unwrap();
        if volume.ingest_bytes().unwrap() < key.size {
            println!("skipped: this file system does not reserve space");
            return;
        }
        ingest.pause().unwrap();
        let part = names_in(&dir.path().join("ingests")).unwrap().into_iter().find(|name| name.ends_with(".part"));
        let part = dir.path().join("ingests").join(part.unwrap());
        let file = fs::File::options().write(true).open(&part).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::KEEP_SIZE, 0, key.size).unwrap();
        drop(file);
        let modified = fs::metadata(&part).unwrap().modified().unwrap();

        let swept = volume.sweep(&[]).unwrap();
        assert!(swept.bytes > 8 << 20, "{swept:?}");
        assert!(volume.ingest_bytes().unwrap() < 1 << 20);
        assert_eq!(fs::metadata(&part).unwrap().modified().unwrap(), modified);
        assert_eq!(volume.sweep(&[]).unwrap(), Swept::default());
        assert_eq!(started(&volume, &key).len(), 2);
    }

    #[test]
    fn names_that_are_not_ours_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        for path in ["blobs/00/README", "manifests/notes", "ingests/notes", "public/index.html", "quarantine/why.txt"] {
            fs::write(dir.path().join(path), "x").unwrap();
        }
        fs::create_dir_all(dir.path().join("public/other/@v1")).unwrap();
        let before = everything(dir.path());
        assert_eq!(volume.sweep(&[]).unwrap(), Swept::default());
        assert_eq!(everything(dir.path()), before);
    }
}

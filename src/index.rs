//! Facts that are quick to look up and can be lost: which bytes a claim stands for, when a model was last opened, and how
//! the inodes looked that are known to hold the right bytes.
//!
//! sled holds them, and sled is disposable: the truth is in the records on disk, and [`Index::reconcile`] brings it back.
//! So whatever goes wrong with sled, the directory is moved aside and an empty index takes its place. A missing entry
//! only costs fetching or hashing again; a wrong one is told by its seal and counts as missing.

mod keeper;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::io;
use std::num::ParseIntError;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use crate::model::{Claim, Digest, ModelId, Record, Stamp};
use keeper::{Keeper, Limits};

/// Longest wait for the lock of an index that the same process has just closed: sled gives it back a little later.
const LOCK_LIMIT: Duration = Duration::from_secs(2);

/// Memory sled may use. Its own default is 1 GiB.
const CACHE_BYTES: u64 = 16 << 20;

/// Claims, recency and stamps. Every call may block on the disk, for 10 seconds at most, but for what is said and asked of
/// uses, which never does.
pub struct Index {
    dir: PathBuf,
    rebuilt: bool,
    /// `None` where the disk takes no index: then nothing is known but what this process was told, and that only of uses.
    sled: Option<Keeper>,
    /// Whether something was written since the last flush.
    is_dirty: AtomicBool,
    /// Why the last change was not taken. sled takes none any more once its disk has refused one.
    refused: Mutex<Option<String>>,
    uses: Mutex<Uses>,
}

/// When a model was last used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LastUse {
    /// How many uses of any model there were until then, in the life of the volume. It is this that decides what was used
    /// less recently, because clocks jump.
    pub tick: u64,
    /// When it was last opened, if ever; milliseconds since the Unix epoch. For people.
    pub opened_ms: Option<u64>,
}

/// As many as there are models.
#[derive(Default)]
struct Uses {
    last: HashMap<ModelId, LastUse>,
    /// Not written yet.
    changed: BTreeSet<ModelId>,
    ticks: u64,
}

struct Sled {
    db: sled::Db,
    /// Key: claim, NUL, model id. So two models that make the same claim do not take it from each other.
    claims: sled::Tree,
    /// Key: model id.
    recency: sled::Tree,
    /// Key: number of the inode.
    stamps: sled::Tree,
}

/// What was to be noted is not.
#[derive(Debug, thiserror::Error)]
#[error("cannot write index `{}`: {why}", .dir.display())]
pub struct Error {
    /// Its directory.
    dir: PathBuf,
    /// What was found.
    why: String,
}

impl Index {
    /// Opens `dir`. One that cannot be opened and read in 10 seconds is moved to `<dir>.bad-1` (an older one there is
    /// deleted) and an empty one is made; then [`Index::was_rebuilt`] is true, and one warning is logged.
    ///
    /// Where none can be made (a full disk) it opens all the same, and remembers nothing: models must be opened and
    /// removed there, too.
    pub fn open(dir: &Path) -> Index {
        let (sled, rebuilt) = match keep(dir) {
            Ok(sled) => (Some(sled), false),
            Err(why) => (open_in_place_of(dir, &why), true),
        };
        let read = sled.as_ref().and_then(|sled| sled.ask(|sled| Ok(sled.uses())).ok());
        let uses = Mutex::new(read.unwrap_or_default());
        Index { dir: dir.to_owned(), rebuilt, sled, is_dirty: AtomicBool::new(true), refused: Mutex::default(), uses }
    }

    /// Whether an index was there and had to be given up.
    pub fn was_rebuilt(&self) -> bool {
        self.rebuilt
    }

    /// Why nothing is written now, if it is so: there is no index, sled does not answer, or it did not take what came last.
    pub fn why_unusable(&self) -> Option<String> {
        match &self.sled {
            None => Some(NONE.into()),
            Some(sled) => {
                let why = sled.silence().or_else(|| self.refused().clone());
                why.map(|why| format!("{why}; if the disk is well, restart larder"))
            }
        }
    }

    /// Makes the index hold what the records say, and nothing of models that have none. Idempotent.
    pub fn reconcile(&self, records: &[Record]) -> Result<(), Error> {
        let ids: BTreeSet<String> = records.iter().map(|record| record.id().to_string()).collect();
        self.uses().last.retain(|id, _| ids.contains(&id.to_string()));
        let batches: Vec<sled::Batch> = records.iter().map(claims_of).collect();
        self.writing(move |sled| {
            for entry in &sled.claims {
                let (key, _) = entry?;
                if !claim_owner(&key).is_some_and(|id| ids.contains(id)) {
                    sled.claims.remove(key)?;
                }
            }
            for entry in &sled.recency {
                let (key, _) = entry?;
                if !std::str::from_utf8(&key).is_ok_and(|id| ids.contains(id)) {
                    sled.recency.remove(key)?;
                }
            }
            batches.into_iter().try_for_each(|batch| sled.claims.apply_batch(batch))
        })
    }

    /// The bytes a claim stands for, if some model told. Whether they are here, only the store knows.
    pub fn digest_of(&self, claim: &Claim) -> Option<Digest> {
        let prefix = claim_prefix(claim);
        let find = move |sled: &Sled| {
            for entry in sled.claims.scan_prefix(&prefix) {
                let (key, value) = entry?;
                // A claim that has this one and a NUL as its beginning is another claim.
                let is_ours = claim_owner(&key).is_some_and(|id| key.len() == prefix.len() + id.len());
                if let Some(text) = unseal(&key, &value).filter(|_| is_ours)
                    && let Ok(digest) = Digest::from_hex(text)
                {
                    return Ok(Some(digest));
                }
            }
            Ok(None)
        };
        self.sled.as_ref()?.ask(find).ok().flatten()
    }

    /// Takes in what a record says.
    pub fn add(&self, record: &Record) -> Result<(), Error> {
        let claims = claims_of(record);
        self.writing(move |sled| sled.claims.apply_batch(claims))
    }

    /// Forgets what a record says, and when its model was last opened.
    pub fn remove(&self, record: &Record) -> Result<(), Error> {
        let id = record.id();
        {
            let mut uses = self.uses();
            uses.last.remove(&id);
            uses.changed.remove(&id);
        }
        let mut claims = sled::Batch::default();
        for (claim, _) in &record.claims {
            claims.remove(claim_key(claim, id));
        }
        self.writing(move |sled| {
            sled.claims.apply_batch(claims)?;
            sled.recency.remove(id.to_string())?;
            Ok(())
        })
    }

    /// The model was opened now. In memory; [`Index::flush`] writes it.
    pub fn opened(&self, id: ModelId, at_ms: u64) {
        self.uses().now(id).opened_ms = Some(at_ms);
    }

    /// The model was pulled, or confirmed by a pull, now: a use too, because what somebody has just asked for is not what
    /// was used least recently. In memory; [`Index::flush`] writes it.
    pub fn pulled(&self, id: ModelId) {
        self.uses().now(id);
    }

    /// When the model was last used. In memory, as is the next.
    pub fn last_use(&self, id: ModelId) -> LastUse {
        self.uses().last.get(&id).copied().unwrap_or_default()
    }

    /// When each model was last used.
    pub fn last_uses(&self) -> HashMap<ModelId, LastUse> {
        self.uses().last.clone()
    }

    /// Every stamp that can be read, with the digest of the bytes its inode holds.
    pub fn stamps(&self) -> Vec<(Digest, Stamp)> {
        let read = |entry: sled::Result<(sled::IVec, sled::IVec)>| {
            let (key, value) = entry.ok()?;
            let (digest, stamp) = unseal(&key, &value)?.split_once(' ')?;
            Some((Digest::from_hex(digest).ok()?, stamp.parse().ok()?))
        };
        let read_all = move |sled: &Sled| Ok(sled.stamps.iter().filter_map(read).collect());
        self.sled.as_ref().and_then(|sled| sled.ask(read_all).ok()).unwrap_or_default()
    }

    /// Takes in stamps that are new, and forgets those that are gone; by inode.
    pub fn write_stamps(&self, changes: &[(u64, Option<(Digest, Stamp)>)]) -> Result<(), Error> {
        let mut batch = sled::Batch::default();
        for (inode, stamp) in changes {
            let key = inode.to_string();
            match stamp {
                Some((digest, stamp)) => {
                    let value = seal(key.as_bytes(), &format!("{} {stamp}", digest.to_hex()));
                    batch.insert(key.as_str(), value);
                }
                None => batch.remove(key.as_str()),
            }
        }
        self.writing(move |sled| sled.stamps.apply_batch(batch))
    }

    /// Writes the uses and makes the index durable; touches the disk only if there is something new. What comes between two
    /// calls can be lost, and is then found out again by a look at the disk.
    pub fn flush(&self) -> Result<(), Error> {
        let changed: Vec<(ModelId, LastUse)> = {
            let uses = self.uses();
            uses.changed.iter().filter_map(|id| Some((*id, *uses.last.get(id)?))).collect()
        };
        // Taken before it is made durable: what is written meanwhile is for the next time.
        if !self.is_dirty.swap(false, Ordering::AcqRel) && changed.is_empty() {
            return Ok(());
        }
        self.flush_all(&changed).inspect_err(|_| self.is_dirty.store(true, Ordering::Release))?;
        // Uses that came meanwhile stay for the next time.
        let mut uses = self.uses();
        for (id, last) in changed {
            if uses.last.get(&id) == Some(&last) {
                uses.changed.remove(&id);
            }
        }
        Ok(())
    }

    fn flush_all(&self, changed: &[(ModelId, LastUse)]) -> Result<(), Error> {
        let mut batch = sled::Batch::default();
        for (id, last) in changed {
            let key = id.to_string();
            batch.insert(key.as_str(), seal(key.as_bytes(), &last.to_string()));
        }
        let file = self.dir.join("db");
        self.change(move |sled| {
            sled.recency.apply_batch(batch)?;
            sled.db.flush()?;
            // sled's own flush leaves the size of its file to the kernel's next write-back.
            Ok(fs::File::open(file)?.sync_all()?)
        })
    }

    fn uses(&self) -> MutexGuard<'_, Uses> {
        // A panic between two changes of it loses recency of one model at most.
        self.uses.lock().unwrap_or_else(|held| held.into_inner())
    }

    fn writing(&self, change: impl FnOnce(&Sled) -> sled::Result<()> + Send + 'static) -> Result<(), Error> {
        // Afterwards, so that a flush that is under way does not count it as made durable.
        let changed = self.change(change);
        self.is_dirty.store(true, Ordering::Release);
        changed
    }

    fn change(&self, change: impl FnOnce(&Sled) -> sled::Result<()> + Send + 'static) -> Result<(), Error> {
        let failed = |why| Error { dir: self.dir.clone(), why };
        let sled = self.sled.as_ref().ok_or_else(|| failed(NONE.into()))?;
        let changed = sled.ask(change);
        *self.refused() = changed.as_ref().err().cloned();
        changed.map_err(failed)
    }

    fn refused(&self) -> MutexGuard<'_, Option<String>> {
        self.refused.lock().unwrap_or_else(|held| held.into_inner())
    }
}

const NONE: &str = "there is none: it could not be made at the start";

impl Sled {
    fn uses(&self) -> Uses {
        let read = |entry: sled::Result<(sled::IVec, sled::IVec)>| {
            let (key, value) = entry.ok()?;
            let last = unseal(&key, &value)?.parse().ok()?;
            Some((std::str::from_utf8(&key).ok()?.parse().ok()?, last))
        };
        let last: HashMap<ModelId, LastUse> = self.recency.iter().filter_map(read).collect();
        let ticks = last.values().map(|last| last.tick).max().unwrap_or(0);
        Uses { last, changed: BTreeSet::new(), ticks }
    }
}

impl Uses {
    fn now(&mut self, id: ModelId) -> &mut LastUse {
        self.ticks += 1;
        self.changed.insert(id);
        let last = self.last.entry(id).or_default();
        last.tick = self.ticks;
        last
    }
}

/// `<tick> <milliseconds>`, or `<tick> -`.
impl fmt::Display for LastUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.opened_ms {
            Some(at_ms) => write!(f, "{} {at_ms}", self.tick),
            None => write!(f, "{} -", self.tick),
        }
    }
}

impl FromStr for LastUse {
    type Err = ParseIntError;

    fn from_str(text: &str) -> Result<LastUse, ParseIntError> {
        // Before there were ticks, milliseconds stood alone.
        let (tick, at) = text.split_once(' ').unwrap_or(("0", text));
        let opened_ms = if at == "-" { None } else { Some(at.parse()?) };
        Ok(LastUse { tick: tick.parse()?, opened_ms })
    }
}

fn claims_of(record: &Record) -> sled::Batch {
    let mut batch = sled::Batch::default();
    for (claim, digest) in &record.claims {
        let key = claim_key(claim, record.id());
        let value = seal(&key, &digest.to_hex());
        batch.insert(key, value);
    }
    batch
}

fn claim_prefix(claim: &Claim) -> Vec<u8> {
    [claim.as_str().as_bytes(), b"\0"].concat()
}

fn claim_key(claim: &Claim, id: ModelId) -> Vec<u8> {
    [claim.as_str().as_bytes(), b"\0", id.to_string().as_bytes()].concat()
}

/// The model id in the key of a claim.
fn claim_owner(key: &[u8]) -> Option<&str> {
    let id = key.rsplit(|byte| *byte == 0).next()?;
    std::str::from_utf8(id).ok().filter(|id| id.len() == 16)
}

/// The value with a short hash over key and value in front: damage makes an entry missing, never wrong.
fn seal(key: &[u8], text: &str) -> Vec<u8> {
    [&seal_of(key, text.as_bytes()), text.as_bytes()].concat()
}

fn unseal<'a>(key: &[u8], value: &'a [u8]) -> Option<&'a str> {
    let (seal, text) = value.split_at_checked(8)?;
    (seal == seal_of(key, text)).then(|| std::str::from_utf8(text).ok())?
}

fn seal_of(key: &[u8], text: &[u8]) -> [u8; 8] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.len() as u64).to_le_bytes()).update(key).update(text);
    let mut seal = [0; 8];
    seal.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    seal
}

/// Moves what could not be opened aside, and makes an empty index.
fn open_in_place_of(dir: &Path, why: &str) -> Option<Keeper> {
    match move_aside(dir) {
        Ok(aside) => tracing::warn!(why, moved_to = %aside.display(), "the index could not be opened and is rebuilt"),
        Err(error) => tracing::warn!(why, %error, "the index could not be opened, nor moved aside"),
    }
    let made = keep(dir);
    made.inspect_err(|why| {
        tracing::warn!(why, "there is no index: no model is lost, but files may be fetched or hashed again");
    })
    .ok()
}

fn keep(dir: &Path) -> Result<Keeper, String> {
    let dir = dir.to_owned();
    Keeper::start(Limits::DEFAULT, move || open_and_read(&dir))
}

fn open_and_read(dir: &Path) -> Result<Sled, String> {
    remove_torn_snapshots(dir).map_err(|e| e.to_string())?;
    let config = sled::Config::new().path(dir).cache_capacity(CACHE_BYTES).flush_every_ms(None);
    let deadline = Instant::now() + LOCK_LIMIT;
    let db = loop {
        match config.open() {
            Err(sled::Error::Io(e)) if e.to_string().contains("acquire lock") && Instant::now() < deadline => {
                thread::park_timeout(Duration::from_millis(20));
            }
            other => break other.map_err(|e| e.to_string())?,
        }
    };
    let open = |name: &str| db.open_tree(name).map_err(|e| e.to_string());
    let (claims, recency, stamps) = (open("claims")?, open("recency")?, open("stamps")?);
    // Damage shows when the pages are read, not when the tree is opened.
    for entry in claims.iter().chain(recency.iter()).chain(stamps.iter()) {
        entry.map_err(|e| e.to_string())?;
    }
    Ok(Sled { db, claims, recency, stamps })
}

/// sled 0.34 takes a snapshot that it had not finished writing for the newest one, and then never opens again.
fn remove_torn_snapshots(dir: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        if name.as_encoded_bytes().starts_with(b"snap.") && name.as_encoded_bytes().ends_with(b".generating") {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

fn move_aside(dir: &Path) -> io::Result<PathBuf> {
    let mut aside = dir.as_os_str().to_owned();
    aside.push(".bad-1");
    let aside = PathBuf::from(aside);
    match fs::symlink_metadata(&aside) {
        Ok(found) if found.is_dir() => fs::remove_dir_all(&aside)?,
        Ok(_) => fs::remove_file(&aside)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    fs::rename(dir, &aside)?;
    Ok(aside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Checksum, ModelRef, RelPath};

    fn claim(n: u8) -> Claim {
        Claim::checksum(Checksum::Sha256([n; 32]), 7)
    }

    fn record(reference: &str, claims: &[u8]) -> Record {
        let reference: ModelRef = reference.parse().unwrap();
        Record {
            reference,
            version: "v1".into(),
            manifest: Digest::of(b"manifest"),
            snapshot: RelPath::new("x").unwrap(),
            confirmed_at_ms: 0,
            sequence: 0,
            total_bytes: 0,
            total_files: 1,
            claims: claims.iter().map(|n| (claim(*n), Digest::of(&[*n]))).collect(),
        }
    }

    /// Behind the index's back.
    fn tamper(index: &Index, change: impl FnOnce(&Sled) -> sled::Result<()> + Send + 'static) {
        index.sled.as_ref().expect("it could be made").ask(change).unwrap();
    }

    #[test]
    fn where_no_index_can_be_made_it_opens_and_remembers_nothing() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "not a directory").unwrap();
        let index = Index::open(&dir.path().join("file/index"));
        let record = record("hf://o/n@main", &[1]);
        assert!(index.was_rebuilt());
        assert!(index.why_unusable().unwrap().contains("there is none"));
        assert!(index.add(&record).is_err() && index.reconcile(std::slice::from_ref(&record)).is_err());
        index.opened(record.id(), 7);
        assert!(index.flush().is_err() && index.write_stamps(&[]).is_err());
        assert_eq!((knows(&index), index.last_use(record.id()).opened_ms, index.stamps().len()), (vec![], Some(7), 0));
        assert!(index.remove(&record).is_err());
        assert_eq!(index.last_use(record.id()), LastUse::default());
    }

    fn knows(index: &Index) -> Vec<u8> {
        let known: Vec<u8> = (0..8).filter(|n| index.digest_of(&claim(*n)).is_some()).collect();
        for n in &known {
            assert_eq!(index.digest_of(&claim(*n)), Some(Digest::of(&[*n])));
        }
        known
    }

    #[test]
    fn claims_are_kept_over_a_restart_and_belong_to_their_model() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("index-v1");
        let (a, b) = (record("hf://o/a", &[1, 2]), record("hf://o/b", &[2, 3]));
        let index = Index::open(&at);
        assert!(!index.was_rebuilt());
        index.add(&a).unwrap();
        index.add(&b).unwrap();
        index.flush().unwrap();
        drop(index);
        let index = Index::open(&at);
        assert!(!index.was_rebuilt());
        assert_eq!(knows(&index), [1, 2, 3]);
        index.remove(&a).unwrap();
        assert_eq!(knows(&index), [2, 3]);
        index.remove(&b).unwrap();
        assert_eq!(knows(&index), Vec::<u8>::new());
    }

    #[test]
    fn reconciling_brings_back_what_is_missing_and_forgets_what_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (record("hf://o/a", &[1, 2]), record("hf://o/b", &[2, 3]));
        let index = Index::open(&dir.path().join("index"));
        index.add(&a).unwrap();
        for record in [&a, &b] {
            index.opened(record.id(), 5);
        }
        index.flush().unwrap();
        for _ in 0..2 {
            index.reconcile(std::slice::from_ref(&b)).unwrap();
            assert_eq!(knows(&index), [2, 3]);
            assert_eq!((index.last_use(a.id()).opened_ms, index.last_use(b.id()).opened_ms), (None, Some(5)));
        }
    }

    #[test]
    fn the_order_of_uses_is_kept_over_restarts_and_clock_jumps() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("index");
        let [a, b, c] = ["hf://o/a", "hf://o/b", "hf://o/c"].map(|reference| record(reference, &[]).id());
        let order = |index: &Index| {
            let mut ids = [a, b, c];
            ids.sort_by_key(|id| index.last_use(*id).tick);
            ids
        };
        let index = Index::open(&at);
        assert_eq!(index.last_use(a), LastUse { tick: 0, opened_ms: None });
        index.opened(a, 1000);
        index.flush().unwrap();
        index.opened(b, 5);
        index.pulled(c);
        index.flush().unwrap();
        drop(index);
        let index = Index::open(&at);
        assert_eq!(order(&index), [a, b, c]);
        assert_eq!(index.last_use(c), LastUse { tick: 3, opened_ms: None });
        // The clock was set back by far: the last use is the last one all the same.
        index.opened(a, 2);
        assert_eq!((order(&index), index.last_use(a).opened_ms), ([b, c, a], Some(2)));
        assert_eq!(index.last_uses().len(), 3);
    }

    #[test]
    fn what_was_written_before_there_were_ticks_is_older_than_everything_since() {
        assert_eq!("17".parse(), Ok(LastUse { tick: 0, opened_ms: Some(17) }));
        assert_eq!("3 17".parse(), Ok(LastUse { tick: 3, opened_ms: Some(17) }));
        assert!("x 17".parse::<LastUse>().is_err() && "".parse::<LastUse>().is_err());
    }

    #[test]
    fn stamps_are_kept_over_a_restart_and_a_damaged_one_is_missing() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("index");
        let stamp = |inode| (Digest::of(b"x"), Stamp { inode, size: 1, mtime_ns: -2, ctime_ns: 3, place: 4 });
        let index = Index::open(&at);
        index.write_stamps(&[(7, Some(stamp(7))), (8, Some(stamp(8))), (9, Some(stamp(9)))]).unwrap();
        index.write_stamps(&[(8, None), (10, None)]).unwrap();
        index.flush().unwrap();
        drop(index);
        let index = Index::open(&at);
        assert_eq!(index.stamps(), [stamp(7), stamp(9)]);
        tamper(&index, |sled| {
            let other = sled.stamps.get("7")?.unwrap();
            sled.stamps.insert("9", other).map(drop)
        });
        assert_eq!(index.stamps(), [stamp(7)]);
    }

    #[test]
    fn a_damaged_entry_is_missing_not_wrong() {
        let dir = tempfile::tempdir().unwrap();
        let record = record("hf://o/a", &[1]);
        let index = Index::open(&dir.path().join("index"));
        index.add(&record).unwrap();
        index.opened(record.id(), 10);
        index.flush().unwrap();
        assert_eq!(index.why_unusable(), None);
        let key = claim_key(&claim(1), record.id());
        let other = Digest::of(b"other").to_hex();
        for value in [&b""[..], b"short", &[0xff; 72], other.as_bytes(), &seal(b"another key", &other)] {
            let (key, id, value) = (key.clone(), record.id().to_string(), value.to_owned());
            tamper(&index, move |sled| {
                sled.claims.insert(key, value.as_slice())?;
                sled.recency.insert(id, value)?;
                assert_eq!(sled.uses().last.len(), 0);
                Ok(())
            });
            assert_eq!(index.digest_of(&claim(1)), None);
        }
        tamper(&index, |sled| sled.claims.insert(b"not a key", b"not a value").map(drop));
        index.reconcile(std::slice::from_ref(&record)).unwrap();
        assert_eq!(knows(&index), [1]);
    }

    #[test]
    fn whatever_is_in_its_place_it_opens_and_can_be_filled_again() {
        type Damage = fn(&Path);
        let damages: [(&str, Damage, Option<bool>); 7] = [
            ("untouched", |_| {}, Some(false)),
            ("deleted", |dir| fs::remove_dir_all(dir).unwrap(), Some(false)),
            (
                "a file",
                |dir| {
                    fs::remove_dir_all(dir).unwrap();
                    fs::write(dir, "garbage").unwrap();
                },
                Some(true),
            ),
            (
                "a torn snapshot",
                |dir| fs::write(dir.join("snap.FFFFFFFFFFFFFFFF.generating"), "").unwrap(),
                Some(false),
            ),
            ("garbage configuration", |dir| fs::write(dir.join("conf"), [0xa5; 999]).unwrap(), Some(true)),
            // Here sled may mend, refuse or panic; all is well as long as the index opens.
            (
                "truncated",
                |dir| fs::File::options().write(true).open(dir.join("db")).unwrap().set_len(100).unwrap(),
                None,
            ),
            (
                "overwritten",
                |dir| {
                    let length = fs::metadata(dir.join("db")).unwrap().len() as usize;
                    fs::write(dir.join("db"), vec![0xa5; length]).unwrap();
                },
                None,
            ),
        ];
        let record = record("hf://o/a", &[1, 2]);
        for (name, damage, rebuilt) in damages {
            let dir = tempfile::tempdir().unwrap();
            let at = dir.path().join("index-v1");
            let index = Index::open(&at);
            index.add(&record).unwrap();
            index.flush().unwrap();
            drop(index);
            damage(&at);
            let index = Index::open(&at);
            if let Some(rebuilt) = rebuilt {
                assert_eq!(index.was_rebuilt(), rebuilt, "{name}");
            }
            assert_eq!(dir.path().join("index-v1.bad-1").exists(), index.was_rebuilt(), "{name}");
            index.reconcile(std::slice::from_ref(&record)).unwrap();
            assert_eq!(knows(&index), [1, 2], "{name}");
        }
    }

    #[test]
    fn damage_of_any_byte_makes_entries_missing_never_wrong() {
        let record = record("hf://o/a", &[0, 1, 2, 3, 4, 5, 6, 7]);
        let dir = tempfile::tempdir().unwrap();
        let index = Index::open(&dir.path().join("whole"));
        index.add(&record).unwrap();
        index.flush().unwrap();
        drop(index);
        let rounds: u64 = std::env::var("ROUNDS").ok().and_then(|r| r.parse().ok()).unwrap_or(24);
        for seed in 0..rounds {
            let at = dir.path().join(format!("damaged-{seed}"));
            let mut random = fastrand::Rng::with_seed(seed);
            fs::create_dir(&at).unwrap();
            for entry in fs::read_dir(dir.path().join("whole")).unwrap() {
                let path = entry.unwrap().path();
                if !path.is_file() {
                    continue;
                }
                let mut bytes = fs::read(&path).unwrap();
                // Most of the file is room that is not used yet.
                let used = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
                for _ in 0..random.usize(1..8) {
                    if used > 0 {
                        bytes[random.usize(..used)] = random.u8(..);
                    }
                }
                fs::write(at.join(path.file_name().unwrap()), bytes).unwrap();
            }
            let index = Index::open(&at);
            let before = knows(&index);
            index.reconcile(std::slice::from_ref(&record)).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
            assert_eq!(knows(&index).len(), 8, "seed {seed}, before: {before:?}");
        }
    }

    #[test]
    fn only_one_bad_index_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("index-v1");
        for text in ["first", "second"] {
            fs::remove_dir_all(&at).ok();
            fs::write(&at, text).unwrap();
            assert!(Index::open(&at).was_rebuilt());
        }
        assert_eq!(fs::read_to_string(dir.path().join("index-v1.bad-1")).unwrap(), "second");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}

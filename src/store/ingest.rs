//! Ingests: bytes on their way to become a blob. Resumable, not yet trusted.
//!
//! The bytes are in `ingests/<id>.part`, the notes in `ingests/<id>.log`:
//!
//! ```text
//! larder-ingest 1 {"what":…,"size":…,"claim":…,"checksum":…}
//! at <offset> <64 hex>       BLAKE3 of the first <offset> bytes
//! done <64 hex>              verified; if this blob is here, it is these bytes
//! ```
//!
//! Neither file is made durable while bytes come, so after a power cut either may be torn, short or full of zeros. That
//! is why a resumed ingest hashes what is there, and takes only a prefix that a note vouches for.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::io::{self, Disk, LockedFile, allocated_bytes, look_at};
use super::layout::Layout;
use super::stamp::Stamps;
use super::{Blob, Error, Volume};
use crate::model::{Checksum, Claim, Digest, Digester, Verified};

/// A note is made whenever this many bytes have come since the last one: the most that is fetched again after a crash,
/// and one write.
pub const CHECKPOINT_BYTES: u64 = 1 << 20;

/// Files above this size ask for their space before their bytes come.
const PREALLOCATE_ABOVE_BYTES: u64 = 1 << 20;

/// Longest line of a log that is read. A header names a file of at most 1,024 bytes; JSON may escape each as six.
const MAX_LINE_BYTES: u64 = 64 << 10;

/// What writes past the page cache are aligned to, in bytes: the largest logical block that disks have.
const DIRECT_ALIGNMENT: u64 = 4096;

const HEADER_NAME: &str = "larder-ingest 1 ";

/// What an ingest is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IngestKey {
    /// By what the bytes can be recognised when somebody asks for them again. `None`: never resumed.
    pub claim: Option<Claim>,
    /// What the bytes must hash to, if the source says so.
    pub checksum: Option<Checksum>,
    /// How many bytes there must be.
    pub size: u64,
    /// For people: which file of which model. Never a secret.
    pub what: String,
}

/// What [`Volume::begin`] found.
#[derive(Debug)]
pub enum Begun {
    /// The bytes are here: an earlier ingest of the same was committed. Durable.
    Done(Blob),
    /// Bytes so far (maybe none).
    Ingest(Ingest),
}

/// A blob being written, in order. Dropped, it keeps its bytes for the next [`Volume::begin`] of the same claim.
pub struct Ingest {
    disk: Arc<Disk>,
    layout: Layout,
    stamps: Arc<Stamps>,
    key: IngestKey,
    part_path: PathBuf,
    /// Locked: one writer at a time.
    part: LockedFile,
    /// The same file, for writes past the page cache.
    direct: Direct,
    /// Whether such writes are wanted.
    bypasses: bool,
    log_path: PathBuf,
    log: File,
    log_length: u64,
    /// Taken when the end is reached one way or another.
    digester: Option<Box<Digester>>,
    length: u64,
    /// Where the last note stands.
    noted: u64,
}

/// What a write of some bytes took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WriteTime {
    /// Hashing them.
    pub hashing: Duration,
    /// Handing them to the file system, with the notes.
    pub writing: Duration,
}

/// A way past the page cache.
enum Direct {
    /// Nobody has asked for it yet.
    Unopened,
    Open(File),
    /// The file system or its device has none.
    Refused,
}

impl std::fmt::Debug for Ingest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ingest").field("key", &self.key).field("length", &self.length).finish_non_exhaustive()
    }
}

/// The first line of a log.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    what: String,
    size: u64,
    claim: Option<Claim>,
    checksum: Option<Checksum>,
}

impl Header {
    fn of(key: &IngestKey) -> Header {
        let what = key.what.chars().take(1024).collect();
        Header { what, size: key.size, claim: key.claim.clone(), checksum: key.checksum }
    }

    fn is_of(&self, key: &IngestKey) -> bool {
        self.size == key.size && self.claim == key.claim && self.checksum == key.checksum
    }

    fn line(&self) -> String {
        format!("{HEADER_NAME}{}\n", serde_json::to_string(self).expect("a plain struct becomes JSON"))
    }
}

enum Note {
    At(u64, Digest),
    Done(Digest),
}

fn parse_note(line: &str) -> Option<Note> {
    let mut words = line.split(' ');
    let note = match words.next()? {
        "at" => Note::At(words.next()?.parse().ok()?, Digest::from_hex(words.next()?).ok()?),
        "done" => Note::Done(Digest::from_hex(words.next()?).ok()?),
        _ => return None,
    };
    words.next().is_none().then_some(note)
}

/// Reads a log line by line, and ends at the first line that is torn or not ours.
struct LogReader {
    lines: BufReader<File>,
    /// Bytes of the lines given out so far.
    consumed: u64,
}

impl LogReader {
    fn open(path: &Path) -> Result<Option<LogReader>, Error> {
        Ok(io::open_file(path)?.map(|file| LogReader { lines: BufReader::new(file), consumed: 0 }))
    }

    fn line(&mut self) -> Option<String> {
        let mut line = Vec::new();
        // A log that cannot be read is like one that is not there: the bytes come again.
        let length = self.lines.by_ref().take(MAX_LINE_BYTES).read_until(b'\n', &mut line).ok()?;
        let line = String::from_utf8(line).ok()?.strip_suffix('\n')?.to_owned();
        self.consumed += length as u64;
        Some(line)
    }

    fn header(&mut self) -> Option<Header> {
        serde_json::from_str(self.line()?.strip_prefix(HEADER_NAME)?).ok()
    }

    fn note(&mut self) -> Option<Note> {
        let before = self.consumed;
        let note = self.line().and_then(|line| parse_note(&line));
        if note.is_none() {
            self.consumed = before;
        }
        note
    }
}

/// What the log at `path` says was verified, if it is of `size` bytes and says so.
fn done_in(path: &Path, is_asked_for: impl Fn(&Header) -> bool) -> Result<Option<Digest>, Error> {
    let Some(mut log) = LogReader::open(path)? else { return Ok(None) };
    if !log.header().is_some_and(|header| is_asked_for(&header)) {
        return Ok(None);
    }
    let mut done = None;
    while let Some(note) = log.note() {
        if let Note::Done(digest) = note {
            done = Some(digest);
        }
    }
    Ok(done)
}

/// The blob that the log of a finished ingest vouches for, whatever it is of.
pub(super) fn done_blob(log: &Path) -> Result<Option<Digest>, Error> {
    done_in(log, |_| true)
}

/// Whether the log is of an ingest that somebody can ask for again.
pub(super) fn is_resumable(log: &Path) -> Result<bool, Error> {
    let header = LogReader::open(log)?.and_then(|mut log| log.header());
    Ok(header.is_some_and(|header| header.claim.is_some()))
}

/// The prefix of a part that its log vouches for.
struct Prefix {
    digester: Digester,
    length: u64,
    /// How much of the log speaks of it.
    log_length: u64,
}

/// Hashes `part` up to the last note that is true of it. `None` when the log is not of `key`.
fn verified_prefix(key: &IngestKey, part: &File, part_path: &Path, log: &Path) -> Result<Option<Prefix>, Error> {
    // The digester cannot go back, so after a note that is not true it starts again and stops at the one before.
    let mut stop_at = key.size;
    'again: loop {
        let Some(mut notes) = LogReader::open(log)? else { return Ok(None) };
        if !notes.header().is_some_and(|header| header.is_of(key)) {
            return Ok(None);
        }
        let digester = Digester::new(key.checksum, key.size);
        let mut prefix = Prefix { digester, length: 0, log_length: notes.consumed };
        let mut at_start = part;
        std::io::Seek::rewind(&mut at_start).map_err(|source| Error::Disk {
            verb: "read",
            path: part_path.to_owned(),
            source,
        })?;
        let mut buffer = vec![0; CHECKPOINT_BYTES as usize];
        while let Some(Note::At(offset, digest)) = notes.note() {
            if offset > stop_at || offset <= prefix.length {
                break;
            }
            let mut ahead = offset - prefix.length;
            while ahead > 0 {
                let wanted = ahead.min(CHECKPOINT_BYTES) as usize;
                let got = io::read_up_to(part, part_path, &mut buffer[..wanted])?;
                prefix.digester.update(&buffer[..got]);
                ahead -= got as u64;
                if got < wanted {
                    break;
                }
            }
            if ahead > 0 || prefix.digester.so_far() != digest {
                stop_at = prefix.length;
                continue 'again;
            }
            prefix.length = offset;
            prefix.log_length = notes.consumed;
        }
        return Ok(Some(prefix));
    }
}

fn id_of(claim: &Claim) -> String {
    blake3::hash(claim.as_str().as_bytes()).to_hex()[..32].to_owned()
}

impl Volume {
    /// Starts an ingest, or goes on with the one of the same claim. Without a claim it is always a new one, and nothing
    /// of it stays when it is dropped.
    ///
    /// Reads and hashes what is there, so it takes time for large files. Fails with [`Error::InUse`] while another
    /// ingest of the same claim is alive.
    pub fn begin(&self, key: &IngestKey) -> Result<Begun, Error> {
        let id = match &key.claim {
            Some(claim) => id_of(claim),
            None => format!("{:032x}", fastrand::u128(..)),
        };
        let (part_path, log_path) = (self.layout.ingest_part(&id), self.layout.ingest_log(&id));
        if let Some(blob) = self.committed(key)? {
            return Ok(Begun::Done(blob));
        }
        let part = self.lock_part(&part_path, key)?;
        let (prefix, log) = match verified_prefix(key, &part, &part_path, &log_path)? {
            Some(prefix) => (prefix, self.disk.open_or_create(&log_path)?),
            None => {
                self.disk.unlink(&log_path)?;
                let log = self.disk.create_new(&log_path)?;
                let header = Header::of(key).line();
                self.disk.write_at(&log, &log_path, header.as_bytes(), 0)?;
                let digester = Digester::new(key.checksum, key.size);
                (Prefix { digester, length: 0, log_length: header.len() as u64 }, log)
            }
        };
        self.disk.set_len(&log, &log_path, prefix.log_length)?;
        self.disk.set_len(&part, &part_path, prefix.length)?;
        let ingest = Ingest {
            disk: self.disk.clone(),
            layout: self.layout.clone(),
            stamps: self.stamps.clone(),
            key: key.clone(),
            part_path,
            part,
            direct: Direct::Unopened,
            bypasses: false,
            log_path,
            log,
            log_length: prefix.log_length,
            digester: Some(Box::new(prefix.digester)),
            length: prefix.length,
            noted: prefix.length,
        };
        if key.size > PREALLOCATE_ABOVE_BYTES {
            self.disk.preallocate(&ingest.part, &ingest.part_path, key.size)?;
        }
        Ok(Begun::Ingest(ingest))
    }

    /// The blob that an earlier ingest of the same has become, if it was committed and its notes are not forgotten.
    /// Durable.
    pub fn committed(&self, key: &IngestKey) -> Result<Option<Blob>, Error> {
        let Some(claim) = &key.claim else { return Ok(None) };
        let log = self.layout.ingest_log(&id_of(claim));
        let Some(digest) = done_in(&log, |header| header.is_of(key))? else { return Ok(None) };
        if self.blob_size(digest)? != Some(key.size) {
            return Ok(None);
        }
        // We may have been killed between giving the blob its name and making the name durable.
        self.disk.sync_dir(&self.layout.blob_dir(digest))?;
        Ok(Some(Blob { digest, size: key.size }))
    }

    /// Opens and locks the part. Whoever held the lock before us may have renamed the file to a blob, which must never
    /// be written: so the name must still be that of the file we locked.
    fn lock_part(&self, path: &Path, key: &IngestKey) -> Result<LockedFile, Error> {
        let is_still_named = |file: &File| -> Result<bool, Error> {
            let ours = file.metadata();
            let ours = ours.map_err(|source| Error::Disk { verb: "look at", path: path.to_owned(), source })?;
            Ok(look_at(path)?.is_some_and(|named| (named.dev(), named.ino()) == (ours.dev(), ours.ino())))
        };
        for _ in 0..8 {
            // A commit that was cut off left it read-only, which an ordinary user cannot open to write.
            if look_at(path)?.is_some_and(|found| found.is_file() && found.mode() & 0o200 == 0)
                && let Some(part) = io::open_file(path)?
                && let Some(part) = io::try_lock(part, path)?
                && is_still_named(&part)?
            {
                self.disk.set_mode(&part, path, 0o600)?;
            }
            let part = self.disk.open_or_create(path)?;
            let Some(part) = io::try_lock(part, path)? else { break };
            if is_still_named(&part)? {
                return Ok(part);
            }
        }
        Err(Error::InUse { what: key.what.clone() })
    }

    /// Drops the notes of finished ingests, once a record names their blobs. Those still under way stay.
    pub fn forget_ingests(&self, claims: &[Claim]) -> Result<(), Error> {
        for id in claims.iter().map(id_of) {
            if look_at(&self.layout.ingest_part(&id))?.is_none() {
                self.disk.unlink(&self.layout.ingest_log(&id))?;
            }
        }
        Ok(())
    }

    /// Bytes of the disk that ingests take now: what they have, and while one is open also what it has asked for.
    pub fn ingest_bytes(&self) -> Result<u64, Error> {
        let mut bytes = 0;
        for name in io::names_in(&self.layout.ingests())? {
            if name.ends_with(".part")
                && let Some(found) = look_at(&self.layout.ingests().join(name))?
            {
                bytes += allocated_bytes(&found);
            }
        }
        Ok(bytes)
    }
}

impl Ingest {
    /// Bytes that are here and verified against what was written before: where fetching goes on.
    #[expect(clippy::len_without_is_empty, reason = "an offset, not a collection")]
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Appends, hashes, and notes how far it is. More than the promised size is refused ([`Error::Length`]) and changes
    /// nothing. After an error the same bytes can be written again.
    pub fn write(&mut self, bytes: &[u8]) -> Result<WriteTime, Error> {
        let length = self.length.saturating_add(bytes.len() as u64);
        if length > self.key.size {
            return Err(Error::Length { what: self.key.what.clone(), claimed: self.key.size, found: length });
        }
        let began = Instant::now();
        self.put(bytes)?;
        let written = Instant::now();
        self.digester.as_mut().expect("an ingest that is written has not ended").update(bytes);
        let hashed = Instant::now();
        self.length = length;
        if self.length - self.noted >= CHECKPOINT_BYTES {
            self.note_position()?;
        }
        Ok(WriteTime { hashing: hashed - written, writing: (written - began) + hashed.elapsed() })
    }

    /// Whether the bytes that follow go to the disk past the page cache, where they are aligned to it: [`Ingest::write`] is
    /// given whole pieces. They take half of the processor, and no memory from those who read; who reads them first waits for
    /// the disk.
    pub fn bypass_page_cache(&mut self, bypass: bool) -> Result<(), Error> {
        if bypass && matches!(self.direct, Direct::Unopened) {
            self.direct = self.disk.open_direct(&self.part_path)?.map_or(Direct::Refused, Direct::Open);
        }
        self.bypasses = bypass;
        Ok(())
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let is_aligned = |number: u64| number.is_multiple_of(DIRECT_ALIGNMENT);
        let fits = is_aligned(bytes.as_ptr() as u64) && is_aligned(bytes.len() as u64) && is_aligned(self.length);
        if let Direct::Open(direct) = &self.direct
            && self.bypasses
            && fits
        {
            if self.disk.write_direct_at(direct, &self.part_path, bytes, self.length)? {
                return Ok(());
            }
            self.direct = Direct::Refused;
        }
        self.disk.write_at(&self.part, &self.part_path, bytes, self.length)
    }

    fn note_position(&mut self) -> Result<(), Error> {
        let Some(digester) = &self.digester else { return Ok(()) };
        if self.length == self.noted {
            return Ok(());
        }
        let line = format!("at {} {}\n", self.length, digester.so_far().to_hex());
        self.note(&line)?;
        self.noted = self.length;
        Ok(())
    }

    fn note(&mut self, line: &str) -> Result<(), Error> {
        self.disk.write_at(&self.log, &self.log_path, line.as_bytes(), self.log_length)?;
        self.log_length += line.len() as u64;
        Ok(())
    }

    /// Stops here and keeps the bytes for the next [`Volume::begin`] of the same claim.
    pub fn pause(mut self) -> Result<(), Error> {
        self.stop()
    }

    fn stop(&mut self) -> Result<(), Error> {
        if self.key.claim.is_none() {
            return self.throw_away();
        }
        let noted = self.note_position();
        self.digester = None;
        noted?;
        // What was asked for and not used goes back.
        self.disk.set_len(&self.part, &self.part_path, self.length)
    }

    fn throw_away(&mut self) -> Result<(), Error> {
        self.digester = None;
        // The notes first: without them the bytes are never taken for something.
        self.disk.unlink(&self.log_path)?;
        self.disk.unlink(&self.part_path).map(drop)
    }

    /// Verifies length and checksum, makes the bytes durable and gives them their name. Durable on return.
    ///
    /// Bytes that are not what the source claims are thrown away ([`Error::Checksum`]); too few are kept
    /// ([`Error::Length`]), as after any other error.
    pub fn commit(mut self) -> Result<Blob, Error> {
        if self.length != self.key.size {
            let error = Error::Length { what: self.key.what.clone(), claimed: self.key.size, found: self.length };
            self.stop()?;
            return Err(error);
        }
        // For a failure below: the next begin then need not fetch the last range again.
        self.note_position()?;
        let digest = match self.digester.take().expect("an ingest that is committed has not ended").finish() {
            Verified::As(digest) => digest,
            Verified::Differs { claimed, found } => {
                self.throw_away()?;
                return Err(Error::Checksum { what: self.key.what.clone(), claimed, found });
            }
        };
        let blob = Blob { digest, size: self.key.size };
        let path = self.layout.blob(digest);
        // Bytes -> mode -> note -> name -> the name is durable. The note comes before the name, so that a kill between
        // them is told by the blob being here or not; a name must never come before its bytes.
        self.disk.set_len(&self.part, &self.part_path, self.length)?;
        self.disk.sync_data(&self.part, &self.part_path)?;
        self.disk.set_mode(&self.part, &self.part_path, 0o444)?;
        self.note(&format!("done {}\n", digest.to_hex()))?;
        // One that is not known to be right is replaced by the one that is.
        let settled = self.stamps.settled();
        let there = settled.fits_at(digest, &path)?;
        if there {
            self.disk.unlink(&self.part_path)?;
        } else {
            settled.replace(&path, || self.disk.rename(&self.part_path, &path))?;
            // Before anybody can take it for one that is not known to be right.
            self.stamps.put(digest, self.stamps.of(&self.part, &path)?);
        }
        drop(settled);
        self.disk.sync_dir(&self.layout.blob_dir(digest))?;
        if self.key.claim.is_none() {
            self.disk.unlink(&self.log_path)?;
        }
        Ok(blob)
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        if self.digester.is_some() {
            // Nobody is left to tell; what cannot be noted is fetched again.
            let _ = self.stop();
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::fault::{Code, Diagnose};
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    pub(crate) fn key(bytes: &[u8]) -> IngestKey {
        let checksum = sha256(bytes);
        IngestKey {
            claim: Some(Claim::checksum(checksum, bytes.len() as u64)),
            checksum: Some(checksum),
            size: bytes.len() as u64,
            what: "hf://o/n@main model.bin".into(),
        }
    }

    fn sha256(bytes: &[u8]) -> Checksum {
        let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
        Checksum::Sha256(sum.as_ref().try_into().unwrap())
    }

    pub(crate) fn started(volume: &Volume, key: &IngestKey) -> Ingest {
        match volume.begin(key).unwrap() {
            Begun::Ingest(ingest) => ingest,
            Begun::Done(blob) => panic!("{blob:?} is here"),
        }
    }

    /// A blob, with no note left of how it came.
    pub(crate) fn stored(volume: &Volume, bytes: &[u8]) -> Blob {
        let mut ingest = started(volume, &IngestKey { claim: None, ..key(bytes) });
        ingest.write(bytes).unwrap();
        ingest.commit().unwrap()
    }

    fn noise(length: usize) -> Vec<u8> {
        let mut random = fastrand::Rng::with_seed(length as u64);
        std::iter::repeat_with(|| random.u8(..)).take(length).collect()
    }

    fn leftovers(root: &Path) -> Vec<String> {
        io::names_in(&root.join("ingests")).unwrap()
    }

    fn paths(root: &Path, key: &IngestKey) -> (PathBuf, PathBuf) {
        let layout = Layout::new(root);
        let id = id_of(key.claim.as_ref().unwrap());
        (layout.ingest_part(&id), layout.ingest_log(&id))
    }

    const MIB: usize = CHECKPOINT_BYTES as usize;

    #[test]
    fn bytes_that_go_past_the_page_cache_are_the_same_however_they_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let bytes = noise(5 * MIB + 7);
        let mut page = memmap2::MmapMut::map_anon(MIB).unwrap();
        let mut at = 0;
        // A whole piece, one from which the rest is not aligned, one that is aligned again, the end.
        for (round, length) in [MIB, 4096, 10_000, MIB - 10_000 - 4096, 2 * MIB, MIB + 7].into_iter().enumerate() {
            let mut ingest = started(&volume, &key(&bytes));
            assert_eq!(ingest.len() as usize, at, "it is resumed where it was paused");
            for (turn, piece) in bytes[at..at + length].chunks(MIB).enumerate() {
                ingest.bypass_page_cache(turn == 0).unwrap();
                page[..piece.len()].copy_from_slice(piece);
                ingest.write(&page[..piece.len()]).unwrap();
            }
            at += length;
            if round < 5 {
                ingest.pause().unwrap();
            } else {
                let blob = ingest.commit().unwrap();
                assert_eq!(fs::read(volume.blob_path(blob.digest)).unwrap(), bytes);
            }
        }
        assert_eq!(at, bytes.len());
    }

    #[test]
    fn a_committed_blob_is_whole_read_only_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        for bytes in [noise(0), noise(1), noise(3 * MIB), noise(3 * MIB + 7)] {
            let key = key(&bytes);
            let mut ingest = started(&volume, &key);
            for piece in bytes.chunks(300_000) {
                ingest.write(piece).unwrap();
            }
            let blob = ingest.commit().unwrap();
            assert_eq!(blob, Blob { digest: Digest::of(&bytes), size: bytes.len() as u64 });
            let path = volume.blob_path(blob.digest);
            assert_eq!(fs::read(&path).unwrap(), bytes);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o444);
            assert!(matches!(volume.begin(&key).unwrap(), Begun::Done(found) if found == blob));
            volume.forget_ingests(&[key.claim.unwrap()]).unwrap();
            assert_eq!(leftovers(dir.path()), Vec::<String>::new());
        }
    }

    #[test]
    fn a_paused_ingest_keeps_every_byte() {
        let dir = tempfile::tempdir().unwrap();
        let bytes = noise(4 * MIB + 9);
        let key = key(&bytes);
        let mut at = 0;
        for (stop, by_drop) in [(10, false), (MIB + 5, true), (MIB + 5, false), (4 * MIB + 9, true)] {
            let volume = Volume::open(dir.path()).unwrap();
            let mut ingest = started(&volume, &key);
            assert_eq!(ingest.len(), at as u64);
            ingest.write(&bytes[at..stop]).unwrap();
            if by_drop {
                drop(ingest)
            } else {
                ingest.pause().unwrap()
            }
            at = stop;
            let held = volume.ingest_bytes().unwrap();
            assert!(held <= stop as u64 + 64 * 1024, "{held} bytes held for {stop}");
        }
        let volume = Volume::open(dir.path()).unwrap();
        assert_eq!(started(&volume, &key).commit().unwrap().digest, Digest::of(&bytes));
    }

    /// What a killed process leaves: nothing was noted since the last checkpoint.
    #[test]
    fn a_kill_costs_at_most_one_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let bytes = noise(4 * MIB);
        let key = key(&bytes);
        let mut ingest = started(&volume, &key);
        for piece in bytes[..3 * MIB - 1000].chunks(100_000) {
            ingest.write(piece).unwrap();
        }
        let (part, log) = paths(dir.path(), &key);
        let killed = (fs::read(&part).unwrap(), fs::read(&log).unwrap());
        drop(ingest);
        fs::write(&part, killed.0).unwrap();
        fs::write(&log, killed.1).unwrap();
        let mut ingest = started(&volume, &key);
        assert!(ingest.len() > (2 * MIB - 1000 - 100_000) as u64, "{}", ingest.len());
        let from = ingest.len() as usize;
        ingest.write(&bytes[from..]).unwrap();
        assert_eq!(ingest.commit().unwrap().digest, Digest::of(&bytes));
    }

    #[test]
    fn a_torn_tail_is_never_accepted() {
        let bytes = noise(3 * MIB);
        let key = key(&bytes);
        type Tear = fn(&mut Vec<u8>, &mut Vec<u8>);
        let tears: [(&str, Tear, usize); 9] = [
            ("nothing torn", |_, _| {}, 3 * MIB - 10),
            ("tail of zeros", |part, _| part[2 * MIB + 5..].fill(0), 2 * MIB),
            ("one bit in the middle", |part, _| part[MIB + 1] ^= 1, MIB),
            ("all zeros", |part, _| part.fill(0), 0),
            ("short file", |part, _| part.truncate(MIB + 3), MIB),
            ("empty file", |part, _| part.clear(), 0),
            ("long file", |part, _| part.extend([9; 5000]), 3 * MIB - 10),
            ("torn log", |_, log| log.truncate(log.len() - 3), 2 * MIB),
            ("log of zeros", |_, log| log.fill(0), 0),
        ];
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        for (name, tear, kept) in tears {
            let mut ingest = started(&volume, &key);
            for piece in bytes[..3 * MIB - 10].chunks(MIB) {
                ingest.write(piece).unwrap();
            }
            ingest.pause().unwrap();
            let (part, log) = paths(dir.path(), &key);
            let (mut part_bytes, mut log_bytes) = (fs::read(&part).unwrap(), fs::read(&log).unwrap());
            tear(&mut part_bytes, &mut log_bytes);
            fs::write(&part, part_bytes).unwrap();
            fs::write(&log, log_bytes).unwrap();

            let mut ingest = started(&volume, &key);
            assert_eq!(ingest.len(), kept as u64, "{name}");
            assert_eq!(fs::metadata(&part).unwrap().len(), kept as u64, "{name}");
            ingest.write(&bytes[kept..]).unwrap();
            let blob = ingest.commit().unwrap();
            assert_eq!(blob.digest, Digest::of(&bytes), "{name}");
            volume.remove_blob(blob.digest, None).unwrap();
        }
    }

    #[test]
    fn a_kill_between_any_two_steps_of_commit_leaves_no_named_half() {
        let bytes = noise(2 * MIB);
        let key = key(&bytes);
        let digest = Digest::of(&bytes);
        for step in ["before the note", "before the name", "after the name"] {
            let dir = tempfile::tempdir().unwrap();
            let volume = Volume::open(dir.path()).unwrap();
            let mut ingest = started(&volume, &key);
            ingest.write(&bytes).unwrap();
            ingest.pause().unwrap();
            let (part, log) = paths(dir.path(), &key);
            if step != "before the note" {
                let text = fs::read_to_string(&log).unwrap() + &format!("done {}\n", digest.to_hex());
                fs::write(&log, text).unwrap();
            }
            fs::set_permissions(&part, fs::Permissions::from_mode(0o444)).unwrap();
            if step == "after the name" {
                fs::rename(&part, volume.blob_path(digest)).unwrap();
            }
            assert_eq!(volume.blob_size(digest).unwrap().is_some(), step == "after the name");
            match volume.begin(&key) {
                Ok(Begun::Done(blob)) => assert_eq!((step, blob.digest), ("after the name", digest)),
                Ok(Begun::Ingest(ingest)) => {
                    assert_eq!(ingest.len(), key.size, "{step}");
                    assert_eq!(ingest.commit().unwrap().digest, digest);
                }
                Err(error) => panic!("{step}: {error}"),
            }
            assert_eq!(fs::read(volume.blob_path(digest)).unwrap(), bytes, "{step}");
        }
    }

    #[test]
    fn bytes_that_are_not_what_the_source_claims_leave_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let key = key(b"right");
        let mut ingest = started(&volume, &key);
        ingest.write(b"wrong").unwrap();
        let error = ingest.commit().unwrap_err();
        assert_eq!(error.code(), Code::ChecksumMismatch);
        assert!(error.to_string().contains("model.bin"), "{error}");
        assert_eq!(leftovers(dir.path()), Vec::<String>::new());
        assert_eq!(volume.blobs().unwrap(), []);
        assert_eq!(started(&volume, &key).len(), 0);
    }

    #[test]
    fn more_and_fewer_bytes_than_promised_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let key = key(b"12345");
        let mut ingest = started(&volume, &key);
        ingest.write(b"123").unwrap();
        assert_eq!(ingest.write(b"456").unwrap_err().code(), Code::SourceProtocol);
        assert_eq!(ingest.len(), 3);
        assert_eq!(ingest.commit().unwrap_err().code(), Code::SourceProtocol);
        let mut ingest = started(&volume, &key);
        assert_eq!(ingest.len(), 3);
        ingest.write(b"45").unwrap();
        ingest.commit().unwrap();
    }

    #[test]
    fn what_cannot_be_recognised_is_never_resumed() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let key = IngestKey { claim: None, checksum: None, ..key(b"12345") };
        let mut ingest = started(&volume, &key);
        ingest.write(b"123").unwrap();
        drop(ingest);
        assert_eq!(leftovers(dir.path()), Vec::<String>::new());
        let mut ingest = started(&volume, &key);
        ingest.write(b"12345").unwrap();
        ingest.commit().unwrap();
        assert_eq!(leftovers(dir.path()), Vec::<String>::new());
        assert_eq!(started(&volume, &key).len(), 0);
    }

    #[test]
    fn the_same_claim_with_another_checksum_starts_again() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let claim = Some(Claim::pin("place", "pin", 5));
        let first = IngestKey { claim: claim.clone(), ..key(b"12345") };
        let mut ingest = started(&volume, &first);
        ingest.write(b"123").unwrap();
        ingest.pause().unwrap();
        assert_eq!(started(&volume, &first).len(), 3);
        assert_eq!(started(&volume, &IngestKey { claim, ..key(b"abcde") }).len(), 0);
    }

    #[test]
    fn two_writers_of_one_claim_never_meet() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let key = key(b"12345");
        let mut first = started(&volume, &key);
        first.write(b"123").unwrap();
        assert_eq!(volume.begin(&key).unwrap_err().code(), Code::VolumeLocked);
        first.write(b"45").unwrap();
        let blob = first.commit().unwrap();
        assert!(matches!(volume.begin(&key).unwrap(), Begun::Done(found) if found == blob));
    }

    #[test]
    fn a_blob_that_is_here_is_kept_and_a_wrong_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let blob = stored(&volume, b"12345");
        let path = volume.blob_path(blob.digest);
        let inode = || fs::metadata(&path).unwrap().ino();
        let before = inode();
        stored(&volume, b"12345");
        assert_eq!(inode(), before);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "123").unwrap();
        stored(&volume, b"12345");
        assert_eq!(fs::read(&path).unwrap(), b"12345");
    }

    #[test]
    fn a_planted_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let key = key(b"12345");
        let (part, log) = paths(dir.path(), &key);
        let outside = dir.path().join("outside");
        fs::write(&outside, "precious").unwrap();
        for planted in [&part, &log] {
            std::os::unix::fs::symlink(&outside, planted).unwrap();
            assert_eq!(volume.begin(&key).unwrap_err().code(), Code::StoreCorrupt);
            assert_eq!(fs::read_to_string(&outside).unwrap(), "precious");
            for path in [&part, &log] {
                fs::remove_file(path).ok();
            }
        }
    }

    #[test]
    fn a_file_the_disk_cannot_hold_is_known_before_its_bytes_come() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        // Larger than any file can be: what is only larger than the disk would be given piece by piece, and fill it for a
        // moment under whoever else is at work there.
        let size = i64::MAX as u64;
        let key = IngestKey { claim: Some(Claim::pin("place", "pin", size)), checksum: None, size, what: "x".into() };
        match volume.begin(&key) {
            Err(error) => assert_eq!(error.code(), Code::VolumeFull, "{error}"),
            Ok(_) => println!("skipped: this file system does not reserve space"),
        }
        assert!(volume.ingest_bytes().unwrap() < 1 << 20);
    }

    #[test]
    fn an_ingest_keeps_the_volume_locked() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let ingest = started(&volume, &key(b"12345"));
        drop(volume);
        assert_eq!(Volume::open(dir.path()).err().unwrap().code(), Code::VolumeLocked);
        drop(ingest);
        Volume::open(dir.path()).unwrap();
    }
}

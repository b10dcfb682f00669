//! Evicting: making room by policy. `plan` decides, this carries it out, `told` says it through the doors.
//!
//! Never half a model, and never one that somebody uses: not one that is leased, pinned or being pulled, none that has just
//! come, and none that the kernel says somebody has open, even if he never asked us. What cannot be known keeps everything.

mod announce;
pub(super) mod plan;
mod told;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use super::ledger::{Books, Refusal, Unnamed};
use super::limits::Short;
use super::{Cache, Error, now_ms, rfc3339};
use crate::index::LastUse;
use crate::model::{Bytes, Digest, ModelId, ModelRef, Record};
use crate::store::{Eviction, Holders, OpenYet};
use crate::telemetry::metrics::EvictionRule;
pub use announce::Announcer;
use plan::{Census, Counted, Kept, Plan, Victim, plan};

/// Most descriptors of removed files that are kept to see when readers close them. The bytes of more are not counted.
const MAX_WATCHED: usize = 256;

/// What is remembered from one eviction to the next.
#[derive(Default)]
pub(super) struct Evictions {
    /// One at a time: two plans of the same moment would take twice what is needed.
    turn: Mutex<()>,
    notes: Mutex<Notes>,
    /// Who tells others what is here, if anybody does.
    announcer: OnceLock<Arc<dyn Announcer>>,
}

#[derive(Default)]
struct Notes {
    /// What readers keep open of removed models, and the bytes that counts for.
    open_yet: Vec<(OpenYet, u64)>,
    /// By reference text: when and why a version of it was last evicted, in words.
    evicted: HashMap<String, String>,
    /// What the log was last told about room that could not be made.
    complaint: Option<String>,
}

/// Who needs the room.
#[derive(Debug, Clone)]
pub(super) enum Cause {
    /// A pull of this.
    Pull(ModelRef),
    /// Use is over the quota.
    Quota,
    /// The file system has less free than it should.
    MinFree,
    /// Somebody asked for it.
    Request,
}

impl Cause {
    fn rule(&self) -> EvictionRule {
        match self {
            Cause::Pull(_) => EvictionRule::Pull,
            Cause::Quota => EvictionRule::Quota,
            Cause::MinFree => EvictionRule::MinFree,
            Cause::Request => EvictionRule::Request,
        }
    }

    /// In words, after "for".
    fn needed_by(&self) -> String {
        match self {
            Cause::Pull(reference) => format!("the pull of `{reference}`"),
            Cause::Quota => "the quota, which was exceeded".to_owned(),
            Cause::MinFree => "`volume.min_free`, which others had used".to_owned(),
            Cause::Request => "an operator, who asked for room".to_owned(),
        }
    }

    /// Whether less than what is needed is better than nothing. A pull that does not fit must not cost anybody his model.
    fn takes_what_there_is(&self) -> bool {
        matches!(self, Cause::Quota | Cause::MinFree)
    }
}

/// What would go for so much room, and what would stay.
pub(super) struct Outlook {
    short: Short,
    plan: Plan,
    census: Census,
    records: HashMap<ModelId, (Arc<Record>, LastUse)>,
    /// Why nothing goes: who uses what cannot be known.
    unknown: Option<String>,
}

/// What was done for room.
pub(super) struct Made {
    pub(super) evictions: Vec<Eviction>,
    /// Bytes the disk has back.
    pub(super) freed_bytes: u64,
    /// As it was before the last victim went.
    pub(super) outlook: Outlook,
}

impl Cache {
    /// Makes `want_bytes` of the disk fit, if evicting can do that; if not, nothing goes. Blocking.
    pub(super) fn make_room(&self, want_bytes: u64, cause: &Cause) -> Result<Made, Error> {
        self.hands()?;
        let _turn = self.0.evictions.turn.lock().expect("no panic while an eviction is under way");
        self.spend_reserve()?;
        let made = self.make_room_in_turn(want_bytes, cause);
        self.keep_reserve();
        made
    }

    fn make_room_in_turn(&self, want_bytes: u64, cause: &Cause) -> Result<Made, Error> {
        // What failed and cancelled pulls have left goes before any model.
        let mut freed_bytes = self.remove_unused_blobs(self.0.ledger.unused_blobs(), Vec::new())?;
        if freed_bytes > 0 {
            tracing::info!(bytes = freed_bytes, "cleared away what pulls that did not end well have left");
        }
        let (mut evictions, mut in_use) = (Vec::new(), HashSet::new());
        loop {
            let outlook = self.outlook(want_bytes, &mut in_use)?;
            if !outlook.plan.is_enough && !cause.takes_what_there_is() {
                return Ok(Made { evictions, freed_bytes, outlook });
            }
            let mut came_between = None;
            let _withdrawn = self.withdraw(outlook.plan.victims.iter().map(|victim| victim.id).collect());
            for victim in &outlook.plan.victims {
                match self.evict(&outlook, victim, cause)? {
                    Some((eviction, bytes)) => {
                        freed_bytes += bytes;
                        evictions.push(eviction);
                    }
                    None => {
                        came_between = Some(victim.id);
                        break;
                    }
                }
            }
            match came_between {
                Some(id) => in_use.insert(id),
                None => return Ok(Made { evictions, freed_bytes, outlook }),
            };
        }
    }

    /// Decides, and asks the kernel about each model that would go, until none of them is open. `in_use` are those that
    /// somebody was found to use. Blocking.
    fn outlook(&self, want_bytes: u64, in_use: &mut HashSet<ModelId>) -> Result<Outlook, Error> {
        let pulled = self.0.pulls.lock().expect("no panic while the pulls are held").references();
        let uses = self.hands()?.index.last_uses();
        let Books { models, blobs, unknown } = self.0.ledger.books();
        // They go first, whoever asks.
        let unused: u64 = blobs.values().filter(|blob| blob.users == 0).map(|blob| blob.disk_bytes).sum();
        let (mut room, mut taken) = (self.room()?, self.0.ledger.totals().taken);
        room.free_bytes += unused;
        taken.blob_bytes = taken.blob_bytes.saturating_sub(unused);
        let min_residency = self.limits().min_residency;
        let mut records = HashMap::with_capacity(models.len());
        let mut census = Census { models: Vec::with_capacity(models.len()), blobs };
        for model in models {
            let kept = if !model.holders.is_empty() {
                Some(Kept::Leased(model.holders))
            } else if model.is_pinned {
                Some(Kept::Pinned)
            } else if pulled.contains(&model.record.reference.to_string()) {
                Some(Kept::Pulled)
            } else if model.came.is_some_and(|came| came.elapsed() < min_residency) {
                Some(Kept::Young)
            } else {
                in_use.contains(&model.id).then_some(Kept::Open)
            };
            let last_use = uses.get(&model.id).copied().unwrap_or_default();
            let order = (last_use.tick, model.record.sequence);
            census.models.push(Counted { id: model.id, blobs: model.blobs, last_use: order, kept });
            records.insert(model.id, (model.record, last_use));
        }
        let short = room.short_of(want_bytes, &taken);
        let mut outlook = Outlook { short, plan: Plan::default(), census, records, unknown };
        let mut known_idle = HashSet::new();
        while outlook.unknown.is_none() {
            outlook.plan = choose(&outlook.census, short);
            let victims: HashSet<ModelId> = outlook.plan.victims.iter().map(|victim| victim.id).collect();
            let mut found = 0;
            for model in outlook.census.models.iter_mut().filter(|model| victims.contains(&model.id)) {
                if known_idle.contains(&model.id) {
                    continue;
                }
                match self.is_open(&model.blobs) {
                    Ok(false) => drop(known_idle.insert(model.id)),
                    Ok(true) => {
                        model.kept = Some(Kept::Open);
                        in_use.insert(model.id);
                        found += 1;
                    }
                    Err(error) => {
                        outlook.unknown = Some(error.to_string());
                        outlook.plan = Plan::default();
                        break;
                    }
                }
            }
            if found == 0 {
                break;
            }
        }
        Ok(outlook)
    }

    /// Whether anybody has any of the blobs open. One that another model shares counts too: which of the two he reads cannot
    /// be told.
    fn is_open(&self, blobs: &[Digest]) -> Result<bool, Error> {
        for digest in blobs {
            if self.0.volume.is_open(*digest)? {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// One model goes, or stays because somebody has come to use it (`None`); and the bytes that the disk has back. Blocking.
    ///
    /// Order: out of the books, so that nobody can open it; the kernel's word on all its blobs, which keeps others from
    /// opening them; the history; then as by request.
    fn evict(&self, outlook: &Outlook, victim: &Victim, cause: &Cause) -> Result<Option<(Eviction, u64)>, Error> {
        let _naming = self.0.naming.lock().expect("no panic while names change");
        let Ok(Some(unnamed)) = self.0.ledger.unname(victim.id) else { return Ok(None) };
        let reference = unnamed.record.reference.clone();
        if self.0.pulls.lock().expect("no panic while the pulls are held").is_active(&reference) {
            self.0.ledger.take_back(unnamed);
            return Ok(None);
        }
        let eviction = outlook.eviction(victim, cause);
        let ready = self.keep_others_out(&unnamed).and_then(|holders| {
            if holders.is_some() {
                self.0.volume.remember_eviction(&eviction)?;
            }
            Ok(holders)
        });
        let holders = match ready {
            Ok(Some(holders)) => holders,
            not_ready => {
                self.0.ledger.take_back(unnamed);
                return not_ready.map(|_| None);
            }
        };
        self.note(&eviction);
        let freed_bytes = self.destroy(unnamed, holders)?;
        self.save_stamps();
        self.0.metrics.evicted(cause.rule(), freed_bytes);
        self.announce_eviction(&eviction);
        tracing::info!(
            model = %eviction.model, reference = %eviction.reference, version = eviction.version, rule = eviction.rule,
            rank = eviction.rank, bytes = freed_bytes, needed_by = eviction.needed_by, needed = eviction.needed_bytes,
            "evicted"
        );
        Ok(Some((eviction, freed_bytes)))
    }

    /// The kernel's word on every blob that would lose its last name, all held at once; `None` if anybody has one of the
    /// model's blobs open.
    fn keep_others_out(&self, unnamed: &Unnamed) -> Result<Option<Vec<(Digest, Holders)>>, Error> {
        let blobs = unnamed.blobs();
        let losing: HashSet<Digest> = self.0.ledger.unused_of(&blobs).into_iter().collect();
        let mut kept_out = Vec::with_capacity(losing.len());
        for digest in &*blobs {
            if !losing.contains(digest) {
                if self.0.volume.is_open(*digest)? {
                    return Ok(None);
                }
                continue;
            }
            match self.0.volume.holders_of(*digest)? {
                Holders::Somebody(_) => return Ok(None),
                nobody => kept_out.push((*digest, nobody)),
            }
        }
        for (digest, _) in &kept_out {
            self.0.volume.condemn(*digest)?;
        }
        Ok(Some(kept_out))
    }

    /// Brings use back under the quota and the file system above what is left to others, as far as that can be, and asks
    /// the kernel again about removed bytes that readers had open. Blocking.
    pub fn keep_room(&self) {
        self.look_again();
        match self.come_down() {
            Ok(None) => self.notes().complaint = None,
            Ok(Some(left)) => self.complain_once(left),
            Err(error) => self.complain_once(error.to_string()),
        }
    }

    /// What is still short, in words.
    fn come_down(&self) -> Result<Option<String>, Error> {
        let short = || Ok::<_, Error>(self.room()?.short_of(0, &self.0.ledger.totals().taken));
        let before = short()?;
        if before.need_bytes == 0 {
            return Ok(None);
        }
        let cause = if before.of_disk { Cause::MinFree } else { Cause::Quota };
        let made = self.make_room(0, &cause)?;
        let after = short()?;
        let text = || {
            let limit =
                if after.of_disk { "the file system has too little free" } else { "models use more than the quota" };
            format!("{limit}, by {}; {}", Bytes(after.need_bytes), made.outlook.summary())
        };
        Ok((after.need_bytes > 0).then(text))
    }

    /// Logged when the reason changes; the bytes that are short change all the time.
    fn complain_once(&self, complaint: String) {
        let without_numbers = |text: &str| text.chars().filter(|c| !c.is_ascii_digit()).collect::<String>();
        let mut notes = self.notes();
        if notes.complaint.as_deref() != Some(&without_numbers(&complaint)) {
            tracing::warn!(why = complaint, "room cannot be made");
            notes.complaint = Some(without_numbers(&complaint));
        }
    }

    /// Why it cannot be known who uses what, so that nothing is evicted.
    pub(super) fn why_holders_are_unknown(&self) -> Option<String> {
        let books = self.0.ledger.why_unknown();
        books.or_else(|| self.0.volume.tells_holders().err().map(|error| error.to_string()))
    }

    /// Bytes of a removed blob count until the disk has them back.
    pub(super) fn watch(&self, open_yet: OpenYet, disk_bytes: u64) {
        let mut notes = self.notes();
        if notes.open_yet.len() < MAX_WATCHED {
            notes.open_yet.push((open_yet, disk_bytes));
        } else {
            self.0.ledger.given_back(disk_bytes);
        }
    }

    fn look_again(&self) {
        let watched = std::mem::take(&mut self.notes().open_yet);
        for (open_yet, disk_bytes) in watched {
            match open_yet.if_open() {
                Some(open_yet) => self.watch(open_yet, disk_bytes),
                None => self.0.ledger.given_back(disk_bytes),
            }
        }
    }

    /// Before something is taken away, or a directory of links laid out: that writes a little, which a full disk refuses.
    /// Blocking.
    pub(super) fn spend_reserve(&self) -> Result<(), Error> {
        if self.0.volume.spend_reserve()? {
            tracing::warn!(
                "the disk is full: its reserve is given back, so that models can be opened, evicted or removed"
            );
        }
        Ok(())
    }

    /// Makes the reserve again. Blocking.
    pub(super) fn keep_reserve(&self) {
        if let Err(error) = self.0.volume.keep_reserve() {
            tracing::warn!(%error, "no room is kept in reserve; on a full disk an eviction may fail");
        }
    }

    /// Start-up: what was evicted, and why.
    pub(super) fn recall_evictions(&self) {
        match self.0.volume.evictions() {
            Ok(evictions) => evictions.iter().for_each(|eviction| self.note(eviction)),
            Err(error) => tracing::warn!(%error, "what was evicted cannot be read"),
        }
    }

    fn note(&self, eviction: &Eviction) {
        let when = format!("it was evicted at {} for {}", rfc3339(eviction.at_ms), eviction.needed_by);
        self.notes().evicted.insert(eviction.reference.to_string(), when);
    }

    /// It is here again: that it was evicted explains nothing any more.
    pub(super) fn came_back(&self, reference: &ModelRef) {
        self.notes().evicted.remove(&reference.to_string());
    }

    /// When and why a version of a reference was evicted, in words.
    pub(super) fn when_evicted(&self, reference: &str) -> Option<String> {
        self.notes().evicted.get(reference).cloned()
    }

    /// Why there is no room, with who keeps it.
    pub(super) fn no_room(&self, what: String, needs: u64, refusal: Refusal, outlook: &Outlook) -> Error {
        let Refusal { free, used, reserved, quota } = refusal;
        let volume = self.0.config.root.display().to_string();
        Error::NoRoom { what, needs: Bytes(needs), free, used, reserved, quota, volume, outlook: outlook.summary() }
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.0.evictions.notes.lock().expect("no panic while the notes are held")
    }
}

/// As much as should go if there is that much, else what must.
fn choose(census: &Census, short: Short) -> Plan {
    let aimed = plan(census, short.aim_bytes);
    if aimed.is_enough {
        return aimed;
    }
    let needed = plan(census, short.need_bytes);
    if needed.is_enough { needed } else { aimed }
}

impl Outlook {
    /// Whether there was room all the same, because somebody had given his back.
    pub(super) fn has_room(&self) -> bool {
        self.short.need_bytes == 0
    }

    fn eviction(&self, victim: &Victim, cause: &Cause) -> Eviction {
        let (record, last_use) = &self.records[&victim.id];
        Eviction {
            at_ms: now_ms(),
            model: victim.id,
            reference: record.reference.clone(),
            version: record.version.clone(),
            rule: cause.rule().text().to_owned(),
            rank: victim.rank as u64,
            freed_bytes: victim.gained_bytes,
            last_opened_ms: last_use.opened_ms,
            needed_by: cause.needed_by(),
            needed_bytes: self.short.need_bytes,
        }
    }
}

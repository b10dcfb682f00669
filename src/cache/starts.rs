//! Starts: what a model cost whoever waited for it, and why one is not here. What nobody knows is told as unknown.
//!
//! How the pull that brought a model has spent its time is on the disk, so a restart does not forget it. The rest is in memory,
//! and bounded.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use super::lease::Held;
use super::pull::KnownPull;
use super::{Cache, Error, microseconds, now_ms, rfc3339};
use crate::model::{Holder, ModelId, ModelRef, Record};
use crate::store::StartNote;
use crate::wire::http::{
    Absence, AbsentBecause, HolderKind, Phase, ProofTime, PullTimeline, Start, StartLease, StartState, WarmStatus,
};

/// Removals that are remembered.
const MAX_REMOVALS: usize = 1024;
/// Versions whose last slow open is remembered.
const MAX_PROOFS: usize = 256;
/// Leases of pods that have ended and are still told about.
const MAX_ENDED_LEASES: usize = 256;

/// What is remembered of starts, besides the pulls.
#[derive(Default)]
pub(super) struct Starts(Mutex<Books>);

/// Each with the newest in front.
#[derive(Default)]
struct Books {
    removals: VecDeque<(ModelRef, u64)>,
    proofs: VecDeque<(ModelId, ProofTime)>,
    ended_leases: VecDeque<EndedLease>,
}

/// A lease of a pod that has ended. The version may have gone since.
#[derive(Clone)]
struct EndedLease {
    held: Held,
    reference: ModelRef,
    ended_ms: u64,
}

/// A reason why a model is not here, and when that came about.
struct Reason {
    at_ms: u64,
    absence: Absence,
}

fn remember<T>(books: &mut VecDeque<T>, newest: T, most: usize) {
    books.push_front(newest);
    books.truncate(most);
}

impl Starts {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.0.lock().expect("no panic while the starts are held")
    }

    /// Somebody removed a version of this.
    pub(super) fn removed(&self, reference: &ModelRef) {
        let mut books = self.books();
        books.removals.retain(|(known, _)| known != reference);
        remember(&mut books.removals, (reference.clone(), now_ms()), MAX_REMOVALS);
    }

    /// An open had to hash files of this version again.
    pub(super) fn proved(&self, model: ModelId, took: Duration) {
        let took_us = microseconds(took);
        let mut books = self.books();
        books.proofs.retain(|(known, _)| *known != model);
        remember(&mut books.proofs, (model, ProofTime { at: rfc3339(now_ms()), took_us }), MAX_PROOFS);
    }

    /// A lease on this version has ended.
    pub(super) fn lease_ended(&self, held: &Held, record: &Record) {
        if matches!(held.holder, Holder::Pod(_)) {
            let ended = EndedLease { held: held.clone(), reference: record.reference.clone(), ended_ms: now_ms() };
            remember(&mut self.books().ended_leases, ended, MAX_ENDED_LEASES);
        }
    }
}

impl Cache {
    /// What the last start of the version a reference means now has cost, or of the version with an id. Blocking.
    pub fn last_start(&self, name: &str) -> Result<Start, Error> {
        match name.parse::<ModelId>() {
            Ok(id) => {
                let record = self.0.ledger.model(id).ok_or_else(|| self.not_local(name))?;
                self.start_of(&record.reference, Some(id))
            }
            Err(()) => self.start_of(&name.parse()?, None),
        }
    }

    /// The same for each model that a pod (`NAMESPACE/NAME`) leases, or has leased while that is remembered. At least one.
    /// Blocking.
    pub fn last_starts_of_pod(&self, pod: &str) -> Result<Vec<Start>, Error> {
        let is_it = |held: &Held| matches!(held.holder, Holder::Pod(_)) && held.holder.to_string() == pod;
        let held = self.0.ledger.leases().into_iter().filter(is_it);
        let held = held.filter_map(|held| Some((self.0.ledger.model(held.model)?.reference.clone(), held.model)));
        let mut models: Vec<(ModelRef, ModelId)> = held.collect();
        let ended: Vec<EndedLease> = self.0.starts.books().ended_leases.iter().cloned().collect();
        models.extend(ended.into_iter().filter(|ended| is_it(&ended.held)).map(|e| (e.reference, e.held.model)));
        models.sort_by_key(|(reference, model)| (reference.to_string(), *model));
        models.dedup();
        if models.is_empty() {
            return Err(Error::PodNotKnown { pod: pod.chars().take(200).collect() });
        }
        let mut starts = Vec::with_capacity(models.len());
        for (reference, model) in models {
            let mut start = self.start_of(&reference, Some(model))?;
            start.leases.retain(|lease| lease.kind == HolderKind::Pod && lease.holder == pod);
            starts.push(start);
        }
        Ok(starts)
    }

    /// Of this version, or of the current one.
    fn start_of(&self, reference: &ModelRef, version: Option<ModelId>) -> Result<Start, Error> {
        let record = match version {
            Some(id) => self.0.ledger.model(id),
            None => self.0.ledger.current(reference),
        };
        let lacking = record.as_ref().and_then(|record| self.0.ledger.lacking(record.id()));
        let local = record.as_ref().filter(|_| lacking.is_none());
        let pulls = self.0.pulls.lock().expect("no panic while the pulls are held").of(reference);
        let last = pulls.first();
        let is_under_way = last.is_some_and(|pull| !pull.status.phase.is_final());
        let state = match (local, is_under_way) {
            (Some(_), _) => StartState::Local,
            (None, true) => StartState::OnItsWay,
            (None, false) => StartState::Absent,
        };
        let brought = local.and_then(|record| self.brought(record, &pulls));
        let (pull, later_pull) = match local {
            Some(_) => {
                let is_later =
                    |last: &&KnownPull| brought.as_ref().is_none_or(|brought| brought.pull != last.status.id);
                (brought.as_ref().map(told_from_note), last.filter(is_later).map(told))
            }
            None => (last.map(told), None),
        };
        let ready_ms = brought.as_ref().map(|brought| brought.timeline.ended_at_ms());
        let id = version.or_else(|| record.as_ref().map(|record| record.id()));
        let absence = match state {
            StartState::Absent => Some(self.absence(reference, lacking.as_ref().map(|file| file.as_str()), last)?),
            _ => None,
        };
        Ok(Start {
            reference: reference.to_string(),
            state,
            model: local.and_then(|record| self.with_residency(vec![self.info_now(record)]).pop()),
            absence,
            pull,
            later_pull,
            proof: id.and_then(|id| self.last_proof(id)),
            warm: id.and_then(|id| self.last_warm(id)),
            leases: id.map_or_else(Vec::new, |id| self.leases_beside(id, ready_ms)),
        })
    }

    /// The pull that brought a version: of those that are remembered, or as it was written down.
    fn brought(&self, record: &Record, pulls: &[KnownPull]) -> Option<StartNote> {
        let id = record.id();
        let remembered = pulls.iter().filter_map(|pull| pull.brought.as_ref()).find(|note| note.model == id);
        remembered.cloned().or_else(|| match self.0.volume.start_of(id) {
            Ok(note) => note,
            Err(error) => {
                tracing::warn!(%error, model = %id, "how a model came cannot be read");
                None
            }
        })
    }

    fn last_proof(&self, id: ModelId) -> Option<ProofTime> {
        self.0.starts.books().proofs.iter().find(|(model, _)| *model == id).map(|(_, proof)| proof.clone())
    }

    fn last_warm(&self, id: ModelId) -> Option<WarmStatus> {
        let id = id.to_string();
        self.warms().into_iter().find(|warm| warm.model == id)
    }

    /// Held ones and remembered ones, oldest first.
    fn leases_beside(&self, id: ModelId, ready_ms: Option<u64>) -> Vec<StartLease> {
        let held = self.0.ledger.leases().into_iter().filter(|held| held.model == id && !held.is_over());
        let mut leases: Vec<(Held, Option<u64>)> = held.map(|held| (held, None)).collect();
        let books = self.0.starts.books();
        let ended = books.ended_leases.iter().filter(|ended| ended.held.model == id);
        leases.extend(ended.map(|ended| (ended.held.clone(), Some(ended.ended_ms))));
        leases.sort_by(|(a, _), (b, _)| (a.since_ms, &a.id).cmp(&(b.since_ms, &b.id)));
        let told = |(held, ended_ms): &(Held, Option<u64>)| StartLease {
            holder: held.holder.to_string(),
            kind: held.kind(),
            since: rfc3339(held.since_ms),
            after_ready_ms: ready_ms
                .and_then(|ready| i64::try_from(i128::from(held.since_ms) - i128::from(ready)).ok()),
            ended_at: ended_ms.map(rfc3339),
        };
        leases.iter().map(told).collect()
    }

    /// Why a model is not here: the last that is known to have happened to it. Blocking.
    fn absence(&self, reference: &ModelRef, lacking: Option<&str>, last: Option<&KnownPull>) -> Result<Absence, Error> {
        let reasons = [last.and_then(failure), self.eviction(reference)?, self.removal(reference)];
        let newest = reasons.into_iter().flatten().max_by_key(|reason| reason.at_ms);
        Ok(match (newest, lacking) {
            (Some(Reason { absence, .. }), None) => absence,
            (_, Some(file)) => Absence {
                because: AbsentBecause::Spoilt,
                detail: format!("the bytes of `{file}` on this disk were found wrong or missing"),
                action: format!("pull it again: `larder pull '{reference}'`; who changed them? (docs/security.md)"),
                at: None,
                code: last.and_then(failure).and_then(|reason| reason.absence.code),
            },
            (None, None) => Absence {
                because: AbsentBecause::NotAsked,
                detail: format!(
                    "nobody has asked for it since this larder started, at {}, and no eviction of it is on record; what \
                     else was before is not known",
                    rfc3339(self.0.began_at_ms)
                ),
                action: pull_it(reference),
                at: None,
                code: None,
            },
        })
    }

    fn eviction(&self, reference: &ModelRef) -> Result<Option<Reason>, Error> {
        let evictions = self.0.volume.evictions()?;
        Ok(evictions.iter().rfind(|eviction| eviction.reference == *reference).map(|eviction| Reason {
            at_ms: eviction.at_ms,
            absence: Absence {
                because: AbsentBecause::Evicted,
                detail: format!(
                    "the last that is known of it: version {} was evicted for {}, as number {} of all that could go, in the \
                     order of last use",
                    eviction.version, eviction.needed_by, eviction.rank
                ),
                action: format!("{}; to keep it: `larder pin '{reference}'`", pull_it(reference)),
                at: Some(rfc3339(eviction.at_ms)),
                code: None,
            },
        }))
    }

    fn removal(&self, reference: &ModelRef) -> Option<Reason> {
        let books = self.0.starts.books();
        let (_, at_ms) = books.removals.iter().find(|(known, _)| known == reference)?;
        let absence = Absence {
            because: AbsentBecause::Removed,
            detail: "somebody removed it (`larder remove`)".to_owned(),
            action: pull_it(reference),
            at: Some(rfc3339(*at_ms)),
            code: None,
        };
        Some(Reason { at_ms: *at_ms, absence })
    }
}

/// A pull that did not end well, as a reason.
fn failure(pull: &KnownPull) -> Option<Reason> {
    let because = match pull.status.phase {
        Phase::Failed => AbsentBecause::Failed,
        Phase::Cancelled => AbsentBecause::Cancelled,
        _ => return None,
    };
    let error = pull.status.error.as_ref()?;
    let absence = Absence {
        because,
        detail: error.detail.clone(),
        action: error.action.clone(),
        at: pull.status.ended_at.clone(),
        code: Some(error.code.clone()),
    };
    Some(Reason { at_ms: pull.timeline.ended_at_ms(), absence })
}

fn pull_it(reference: &ModelRef) -> String {
    format!("pull it: `larder pull '{reference}'`")
}

fn told(pull: &KnownPull) -> PullTimeline {
    let (id, began_at) = (pull.status.id.clone(), rfc3339(pull.timeline.began_at_ms));
    PullTimeline {
        now: pull.now,
        error: pull.status.error.clone(),
        ..PullTimeline::new(id, pull.status.phase, began_at, &pull.timeline, pull.effort)
    }
}

fn told_from_note(note: &StartNote) -> PullTimeline {
    let began_at = rfc3339(note.timeline.began_at_ms);
    PullTimeline::new(note.pull.clone(), Phase::Ready, began_at, &note.timeline, note.effort)
}

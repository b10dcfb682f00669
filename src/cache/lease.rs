//! Leases: who uses which version now. While there is one, nothing of that version is taken away.
//!
//! A lease of a connection lives in memory and ends with it. One that outlives its request is a note on the disk too,
//! so it survives a restart; it ends when it is released, when its time is over, or when its pod is gone.

use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::rand::{GetRandomFlags, getrandom};

use super::ledger::Ledger;
use super::{Cache, Error, now_ms, rfc3339};
use crate::fault::Problem;
use crate::model::{Holder, ModelId, ModelRef, Pod, Record};
use crate::store::{LeaseNote, NotedHolder};
use crate::wire::http::{HolderKind, LeaseInfo, LeaseTerms};

/// Most leases that outlive their request.
const MAX_NOTED_LEASES: usize = 10_000;

/// Longest time a lease can be taken for: ten years is for ever, and nothing overflows.
const MAX_TTL: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Knows which pods are still on this node. Kubernetes does; where there is no Kubernetes, nobody does.
pub trait PodDirectory: Send + Sync {
    /// `None`: it cannot be known now, so its leases stay.
    fn is_gone(&self, pod: &Pod) -> Option<bool>;

    /// Why pods that have gone by now may not be known to have, if something keeps that from being known.
    fn trouble(&self) -> Option<Problem>;
}

/// A lease as the books have it.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) id: String,
    pub(super) model: ModelId,
    pub(super) holder: Holder,
    pub(super) since_ms: u64,
    pub(super) ends: Option<Ends>,
}

/// When time ends a lease: by the clock that cannot jump, and by the one people read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    pub(super) at: Instant,
    pub(super) at_ms: u64,
}

impl Ends {
    fn after(ttl: Duration) -> Ends {
        let ttl = ttl.min(MAX_TTL);
        Ends { at: Instant::now() + ttl, at_ms: now_ms().saturating_add(ttl.as_millis() as u64) }
    }

    /// What is left of a lease that a former process granted. A clock that was set back does not lengthen it.
    fn restored(note: &LeaseNote) -> Option<Ends> {
        let at_ms = note.ends_at_ms?;
        let whole = at_ms.saturating_sub(note.since_ms);
        let left = at_ms.saturating_sub(now_ms()).min(whole);
        Some(Ends { at: Instant::now() + Duration::from_millis(left).min(MAX_TTL), at_ms })
    }
}

/// A lease of a connection. Drop ends it.
#[must_use = "dropping a lease ends it"]
pub struct Lease {
    ledger: Ledger,
    held: Held,
}

impl Lease {
    pub(super) fn info(&self, record: &Record) -> LeaseInfo {
        lease_info(&self.held, record)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.ledger.release(&self.held.id);
        let Held { id, holder, model, .. } = &self.held;
        tracing::debug!(lease = id, %holder, %model, why = "its connection let go of it", "lease ended");
    }
}

/// For whom a lease is taken, and for how long, as a request says it.
#[derive(Debug, Clone)]
pub(super) struct Terms {
    pub(super) holder: Holder,
    pub(super) ttl: Option<Duration>,
}

impl Terms {
    pub(super) fn read(terms: &LeaseTerms) -> Result<Terms, Error> {
        let ttl = terms.ttl_seconds.map(Duration::from_secs);
        let holder = match (&terms.pod, &terms.holder) {
            (Some(pod), None) => Holder::Pod(Pod::new(&pod.uid, &pod.namespace, &pod.name)?),
            (None, Some(name)) => Holder::named(name)?,
            (None, None) if ttl.is_some() => Holder::named("anybody")?,
            (None, None) => return Err(Error::LeaseTerms { found: "nothing says when it ends" }),
            (Some(_), Some(_)) => return Err(Error::LeaseTerms { found: "it names a pod and a holder" }),
        };
        if ttl == Some(Duration::ZERO) {
            return Err(Error::LeaseTerms { found: "`ttl_seconds` is 0" });
        }
        Ok(Terms { holder, ttl })
    }
}

/// Hard to guess, because who knows it may release it. From the kernel: the generator of `aws-lc` seeds itself at its first
/// use, which takes 400 million instructions, and here the ledger is locked.
fn new_id() -> String {
    let mut id = [0; 16];
    // So few bytes come at once or, before the kernel has any, later.
    let filled = getrandom(&mut id, GetRandomFlags::empty());
    assert_eq!(filled, Ok(id.len()), "the kernel has random bytes");
    hex::encode(id)
}

impl Cache {
    /// A lease that ends when it is dropped, for a connection: on this version of a reference, or on the current one.
    pub(super) fn lease_connection(
        &self,
        reference: &ModelRef,
        version: Option<&str>,
        process: &str,
    ) -> Result<(Arc<Record>, Lease), Error> {
        self.lease_if_here(reference, version, process).ok_or_else(|| match version {
            Some(version) => {
                Error::VersionNotLocal { reference: reference.to_string(), version: version.chars().take(80).collect() }
            }
            None => self.why_not_open(reference),
        })
    }

    /// The same, of a model that has its name.
    pub(super) fn lease_if_here(
        &self,
        reference: &ModelRef,
        version: Option<&str>,
        process: &str,
    ) -> Option<(Arc<Record>, Lease)> {
        let holder = || Holder::Connection(process.to_owned());
        let held = |model| Held { id: new_id(), model, holder: holder(), since_ms: now_ms(), ends: None };
        let (record, held) = self.0.ledger.lease_version(reference, version, held)?;
        tracing::debug!(lease = held.id, holder = %held.holder, model = %held.model, "leased");
        Some((record, Lease { ledger: self.0.ledger.clone(), held }))
    }

    /// A lease that outlives the request, on this version. Asking again for the same holder and version renews it.
    /// Blocking: it is durable on return.
    pub(super) fn lease_noted(&self, record: &Record, terms: &Terms) -> Result<LeaseInfo, Error> {
        self.hands()?;
        // Two requests of one holder become one lease.
        let _noting = self.noting()?;
        let known = self.0.ledger.lease_of(&terms.holder, record.id());
        if known.is_none() && self.0.ledger.noted_leases() >= MAX_NOTED_LEASES {
            return Err(Error::TooManyLeases { most: MAX_NOTED_LEASES });
        }
        let asked = terms.ttl.map(Ends::after);
        let held = Held {
            id: known.as_ref().map_or_else(new_id, |known| known.id.clone()),
            model: record.id(),
            holder: terms.holder.clone(),
            since_ms: known.as_ref().map_or_else(now_ms, |known| known.since_ms),
            ends: known.filter(|known| !known.is_over()).map_or(asked, |known| later(known.ends, asked)),
        };
        // It may have been removed since it was found.
        let before = self.0.ledger.lease(held.clone()).map_err(|()| self.why_not_open(&record.reference))?;
        let noted = note_of(&held).map_or(Ok(()), |note| self.0.volume.write_note(&note));
        if let Err(error) = noted {
            // What was not noted was not granted.
            match before {
                Some(before) => drop(self.0.ledger.lease(before)),
                None => self.0.ledger.release(&held.id),
            }
            return Err(error.into());
        }
        tracing::info!(lease = held.id, holder = %held.holder, model = %held.model, "leased");
        Ok(lease_info(&held, record))
    }

    /// All leases, oldest first.
    pub fn leases(&self) -> Vec<LeaseInfo> {
        let mut held = self.0.ledger.leases();
        held.retain(|held| !held.is_over());
        held.sort_by(|a, b| (a.since_ms, &a.id).cmp(&(b.since_ms, &b.id)));
        let records = held.iter().map(|held| self.0.ledger.model(held.model));
        held.iter().zip(records).filter_map(|(held, record)| Some(lease_info(held, &*record?))).collect()
    }

    /// Ends a lease by request. One of a connection ends with its connection only. Blocking.
    pub fn release(&self, id: &str) -> Result<LeaseInfo, Error> {
        self.hands()?;
        let _noting = self.noting()?;
        let not_found = || Error::LeaseNotFound { id: id.chars().take(80).collect() };
        let held = self.0.ledger.lease_by_id(id).filter(|held| !held.is_over()).ok_or_else(not_found)?;
        if matches!(held.holder, Holder::Connection(_)) {
            return Err(Error::LeaseOfConnection { id: held.id, process: held.holder.to_string() });
        }
        let record = self.0.ledger.model(held.model).ok_or_else(not_found)?;
        self.end(&held, "it was released")?;
        Ok(lease_info(&held, &record))
    }

    /// From now on this tells which pods are gone. Before, or without it, nobody does, and their leases stay. The first one
    /// that is given stays.
    pub fn ask_about_pods(&self, pods: Arc<dyn PodDirectory>) {
        let _ = self.0.pods.set(pods);
    }

    /// Who tells which pods are gone, if anybody does.
    pub(super) fn pods(&self) -> Option<&dyn PodDirectory> {
        self.0.pods.get().map(|pods| &**pods)
    }

    /// Ends the leases whose time is over or whose pod is gone. Blocking.
    pub fn end_leases(&self) {
        // If not now, then the next time.
        let Ok(_noting) = self.noting() else { return };
        for held in self.0.ledger.leases() {
            let gone = match &held.holder {
                Holder::Pod(pod) => self.pods().and_then(|pods| pods.is_gone(pod)) == Some(true),
                _ => false,
            };
            let why = match (gone, held.is_over()) {
                (true, _) => "its pod is gone",
                (false, true) => "its time is over",
                (false, false) => continue,
            };
            if let Err(error) = self.end(&held, why) {
                tracing::warn!(%error, lease = held.id, "a lease that has ended could not be forgotten; it is tried again");
            }
        }
    }

    /// The note first: a lease that comes back after a power cut only keeps too much.
    fn end(&self, held: &Held, why: &'static str) -> Result<(), Error> {
        self.0.volume.remove_note::<LeaseNote>(&held.id)?;
        if let Some(record) = self.0.ledger.model(held.model) {
            self.0.starts.lease_ended(held, &record);
        }
        self.0.ledger.release(&held.id);
        tracing::info!(lease = held.id, holder = %held.holder, model = %held.model, why, "lease ended");
        Ok(())
    }

    /// Start-up: takes the leases up again that a former process granted. A note that cannot be read keeps everything.
    pub(super) fn restore_leases(&self) -> Result<(), Error> {
        let (notes, unreadable) = self.0.volume.notes::<LeaseNote>()?;
        for error in unreadable {
            tracing::warn!(%error, "a lease cannot be read: no model is removed until it is gone");
            self.0.ledger.holders_are_unknown(error.to_string());
        }
        for note in notes {
            let ends = Ends::restored(&note);
            let holder = match note.holder.holder() {
                Ok(holder) => holder,
                Err(error) => {
                    tracing::warn!(%error, lease = note.id, "a lease cannot be read: no model is removed until it is gone");
                    self.0.ledger.holders_are_unknown(format!("the holder of lease `{}` cannot be read", note.id));
                    continue;
                }
            };
            let held = Held { id: note.id, model: note.model, holder, since_ms: note.since_ms, ends };
            if self.0.ledger.lease(held.clone()).is_err() {
                tracing::warn!(lease = held.id, model = %held.model, holder = %held.holder, "a lease is on a model that is not here");
            }
        }
        Ok(())
    }
}

impl Held {
    pub(super) fn kind(&self) -> HolderKind {
        match self.holder {
            Holder::Pod(_) => HolderKind::Pod,
            Holder::Name(_) => HolderKind::Name,
            Holder::Connection(_) => HolderKind::Connection,
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.ends.is_some_and(|ends| ends.at <= Instant::now())
    }
}

/// Asking again never shortens a lease: who asks may not be who took it. `None` is never.
fn later(one: Option<Ends>, other: Option<Ends>) -> Option<Ends> {
    let (one, other) = (one?, other?);
    Some(if one.at >= other.at { one } else { other })
}

fn note_of(held: &Held) -> Option<LeaseNote> {
    Some(LeaseNote {
        id: held.id.clone(),
        model: held.model,
        holder: NotedHolder::of(&held.holder)?,
        since_ms: held.since_ms,
        ends_at_ms: held.ends.map(|ends| ends.at_ms),
    })
}

pub(super) fn lease_info(held: &Held, record: &Record) -> LeaseInfo {
    LeaseInfo {
        id: held.id.clone(),
        model: held.model.to_string(),
        reference: record.reference.to_string(),
        version: record.version.clone(),
        kind: held.kind(),
        holder: held.holder.to_string(),
        since: rfc3339(held.since_ms),
        expires_at: held.ends.map(|ends| rfc3339(ends.at_ms)),
    }
}

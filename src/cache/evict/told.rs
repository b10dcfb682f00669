//! Evictions through the doors: what would go, what went, and who keeps the rest.

use std::collections::HashSet;

use super::super::{Cache, Error, rfc3339, shortened};
use super::plan::{Counted, Kept, plan};
use super::{Cause, Outlook};
use crate::model::Bytes;
use crate::store::Eviction;
use crate::wire::http::{Evicted, EvictionInfo, EvictionPlan, KeptBecause, KeptModel, PlannedEviction};

/// Most evictions that are told at once.
const MAX_TOLD: usize = 1_000;

impl Cache {
    /// What would go if so many bytes had to fit. Changes nothing. Blocking.
    pub fn eviction_plan(&self, need_bytes: u64) -> Result<EvictionPlan, Error> {
        let room = self.room()?;
        let need_on_disk = room.on_disk(need_bytes);
        let outlook = self.outlook(need_on_disk, &mut HashSet::new())?;
        let free_bytes = room.left(&self.0.ledger.totals().taken);
        Ok(outlook.told(need_bytes, free_bytes))
    }

    /// Makes so many bytes fit. If that cannot be, nothing goes, and the error says who keeps the room. Blocking.
    pub fn evict_for(&self, need_bytes: u64) -> Result<Evicted, Error> {
        let need_on_disk = self.room()?.on_disk(need_bytes);
        let made = self.make_room(need_on_disk, &Cause::Request)?;
        if let Some(why) = &made.outlook.unknown
            && made.outlook.short.need_bytes > 0
        {
            return Err(Error::HoldersUnknowable { why: why.clone() });
        }
        if let Some(refusal) = self.0.ledger.refusal(need_on_disk, self.room()?) {
            return Err(self.no_room("make room".to_owned(), need_on_disk, refusal, &made.outlook));
        }
        Ok(Evicted { evictions: made.evictions.iter().map(told).collect(), freed_bytes: made.freed_bytes })
    }

    /// What was evicted, newest first: the last thousand. Blocking.
    pub fn evictions(&self) -> Result<Vec<EvictionInfo>, Error> {
        Ok(self.0.volume.evictions()?.iter().rev().take(MAX_TOLD).map(told).collect())
    }
}

pub(super) fn told(eviction: &Eviction) -> EvictionInfo {
    EvictionInfo {
        at: rfc3339(eviction.at_ms),
        model: eviction.model.to_string(),
        reference: eviction.reference.to_string(),
        version: eviction.version.clone(),
        rule: eviction.rule.clone(),
        rank: eviction.rank,
        freed_bytes: eviction.freed_bytes,
        opened_at: eviction.last_opened_ms.map(rfc3339),
        needed_by: eviction.needed_by.clone(),
        needed_bytes: eviction.needed_bytes,
    }
}

impl Outlook {
    fn told(&self, need_bytes: u64, free_bytes: u64) -> EvictionPlan {
        let victims = self.plan.victims.iter().map(|victim| {
            let (record, last_use) = &self.records[&victim.id];
            PlannedEviction {
                model: victim.id.to_string(),
                reference: record.reference.to_string(),
                version: record.version.clone(),
                rank: victim.rank as u64,
                gained_bytes: victim.gained_bytes,
                opened_at: last_use.opened_ms.map(rfc3339),
            }
        });
        let mut kept: Vec<KeptModel> = self.census.models.iter().filter_map(|model| self.kept(model)).collect();
        kept.sort_by(|a, b| (&a.reference, &a.version).cmp(&(&b.reference, &b.version)));
        EvictionPlan {
            need_bytes,
            free_bytes,
            short_bytes: self.short.need_bytes,
            gained_bytes: self.plan.gained_bytes,
            is_enough: self.plan.gained_bytes >= self.short.need_bytes,
            unknown_holders: self.unknown.clone(),
            victims: victims.collect(),
            kept,
        }
    }

    fn kept(&self, model: &Counted) -> Option<KeptModel> {
        let (record, _) = &self.records[&model.id];
        let (because, by) = match model.kept.as_ref()? {
            Kept::Leased(holders) => (KeptBecause::Leased, holders.clone()),
            Kept::Pinned => (KeptBecause::Pinned, vec![format!("a pin on `{}`", record.reference)]),
            Kept::Pulled => (KeptBecause::Pulled, vec![format!("a pull of `{}`", record.reference)]),
            Kept::Young => (KeptBecause::Young, vec!["`volume.min_residency`".to_owned()]),
            Kept::Open => (KeptBecause::Open, Vec::new()),
        };
        let (model, reference, version) = (model.id.to_string(), record.reference.to_string(), record.version.clone());
        Some(KeptModel { model, reference, version, because, by })
    }

    /// How much could go, and who keeps the rest; in words.
    pub(super) fn summary(&self) -> String {
        if let Some(why) = &self.unknown {
            return format!("nothing is evicted, because who uses what cannot be known: {why}");
        }
        let evictable = Bytes(plan(&self.census, u64::MAX).gained_bytes);
        let keeper = |kept: KeptModel| match kept.because {
            KeptBecause::Open => format!("a process that has `{}` open", kept.reference),
            KeptBecause::Young => format!("`volume.min_residency` (`{}` has just come)", kept.reference),
            _ => kept.by.join(", "),
        };
        let keepers: Vec<String> = self.census.models.iter().filter_map(|m| self.kept(m)).map(keeper).collect();
        match keepers.is_empty() {
            true => format!("{evictable} can be evicted"),
            false => format!("{evictable} can be evicted; the rest is held by {}", shortened(&keepers)),
        }
    }
}

//! Which models go, and why each: a pure function from a census to a plan, so that it can be printed before it is carried out.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::ledger::BlobUse;
use crate::model::{Digest, ModelId};

/// Everything the decision needs, at one moment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Census {
    pub(crate) models: Vec<Counted>,
    pub(crate) blobs: HashMap<Digest, BlobUse>,
}

/// One model in a census.
#[derive(Debug, Clone)]
pub(crate) struct Counted {
    pub(crate) id: ModelId,
    /// Its blobs, each once.
    pub(crate) blobs: Arc<[Digest]>,
    /// When it was last used: a count of uses, and then of confirmations, which a lost index cannot take away. The higher,
    /// the later. Not a clock, because clocks jump.
    pub(crate) last_use: (u64, u64),
    /// Why it stays whatever is needed.
    pub(crate) kept: Option<Kept>,
}

/// Why a model is not evicted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kept {
    /// These hold leases on it, in words.
    Leased(Vec<String>),
    /// Its reference is pinned.
    Pinned,
    /// A pull of it is under way.
    Pulled,
    /// It has not been here for long enough.
    Young,
    /// The kernel says that somebody has a file of it open.
    Open,
}

/// What would be evicted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    /// In the order they go: what was used least recently first.
    pub(crate) victims: Vec<Victim>,
    /// Bytes of the disk that all of them give back.
    pub(crate) gained_bytes: u64,
    /// Whether that is as much as was needed. If not, nothing is evicted.
    pub(crate) is_enough: bool,
}

/// One model that would go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Victim {
    pub(crate) id: ModelId,
    /// Its place among all that could go, from 1: the least recently used.
    pub(crate) rank: usize,
    /// Bytes of the disk that are free once it and those before it are gone, and were not before it went.
    pub(crate) gained_bytes: u64,
}

/// What stays, while models are taken out of it and put back.
struct Staying(HashMap<Digest, BlobUse>);

impl Staying {
    /// A model goes; the bytes only it still used.
    fn without(&mut self, model: &Counted) -> u64 {
        let mut gained = 0;
        for digest in &*model.blobs {
            let Some(blob) = self.0.get_mut(digest) else { continue };
            blob.users = blob.users.saturating_sub(1);
            if blob.users == 0 {
                gained += blob.disk_bytes;
            }
        }
        gained
    }

    /// It stays after all; the bytes it keeps.
    fn with(&mut self, model: &Counted) -> u64 {
        let mut kept = 0;
        for digest in &*model.blobs {
            let Some(blob) = self.0.get_mut(digest) else { continue };
            if blob.users == 0 {
                kept += blob.disk_bytes;
            }
            blob.users += 1;
        }
        kept
    }
}

/// Chooses victims until `need_bytes` are gained: whole models, least recently used first, none that is kept, and none more
/// than is needed. Bytes that a model which stays shares are not gained.
pub(crate) fn plan(census: &Census, need_bytes: u64) -> Plan {
    let mut candidates: Vec<&Counted> = census.models.iter().filter(|model| model.kept.is_none()).collect();
    // The id decides between those that were never opened, so that the same census gives the same plan.
    candidates.sort_by_key(|model| (model.last_use, model.id));
    let mut staying = Staying(census.blobs.clone());
    let mut gained = 0;
    let mut chosen = Vec::new();
    for (at, model) in candidates.iter().enumerate() {
        if gained >= need_bytes {
            break;
        }
        gained += staying.without(model);
        chosen.push((at + 1, *model));
    }
    let is_enough = gained >= need_bytes;
    // A model may have been taken in vain: its bytes are shared with one that stays, or a larger one after it gave enough.
    // The most recently used of those stays first.
    let mut spared = Vec::new();
    for (rank, model) in chosen.iter().rev() {
        let kept = staying.with(model);
        if gained - kept >= need_bytes || kept == 0 {
            gained -= kept;
            spared.push(*rank);
        } else {
            staying.without(model);
        }
    }
    chosen.retain(|(rank, _)| !spared.contains(rank));
    let mut staying = Staying(census.blobs.clone());
    let victims =
        chosen.iter().map(|(rank, model)| Victim { id: model.id, rank: *rank, gained_bytes: staying.without(model) });
    Plan { victims: victims.collect(), gained_bytes: gained, is_enough }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digest(name: u8) -> Digest {
        Digest::of(&[name])
    }

    fn id(n: u32) -> ModelId {
        format!("{n:016x}").parse().unwrap()
    }

    fn blob_use(disk_bytes: u64, users: u32) -> BlobUse {
        BlobUse { size: disk_bytes, disk_bytes, is_here: true, users }
    }

    /// Models of blobs, and their last use; blob `n` has `10^n` bytes.
    fn census(models: &[(&[u8], u64)]) -> Census {
        let models = models.iter().enumerate().map(|(n, (blobs, last_use))| Counted {
            id: id(n as u32),
            blobs: blobs.iter().map(|name| digest(*name)).collect(),
            last_use: (*last_use, 0),
            kept: None,
        });
        let models: Vec<Counted> = models.collect();
        let users = |digest: Digest| models.iter().filter(|model| model.blobs.contains(&digest)).count() as u32;
        let blob = |n: u8| (digest(n), blob_use(10u64.pow(n.into()), users(digest(n))));
        Census { blobs: (0..8u8).map(blob).collect(), models }
    }

    fn victims(plan: &Plan) -> Vec<(ModelId, usize, u64)> {
        plan.victims.iter().map(|victim| (victim.id, victim.rank, victim.gained_bytes)).collect()
    }

    #[test]
    fn what_was_used_least_recently_goes_first_and_no_more_than_is_needed() {
        let census = census(&[(&[2], 30), (&[1], 10), (&[3], 20)]);
        assert_eq!(victims(&plan(&census, 10)), [(id(1), 1, 10)]);
        assert_eq!(victims(&plan(&census, 1010)), [(id(1), 1, 10), (id(2), 2, 1000)]);
        // The oldest would be taken in vain, because the next one alone is enough.
        assert_eq!(victims(&plan(&census, 11)), [(id(2), 2, 1000)]);
        assert_eq!(victims(&plan(&census, 0)), []);
        assert!(plan(&census, 1110).is_enough && !plan(&census, 1111).is_enough);
    }

    #[test]
    fn bytes_that_a_kept_model_shares_are_not_gained() {
        let mut census = census(&[(&[1, 2], 1), (&[2, 3], 2), (&[2], 3)]);
        assert_eq!(plan(&census, 1).gained_bytes, 10);
        assert_eq!(victims(&plan(&census, 1110)), [(id(0), 1, 10), (id(1), 2, 1000), (id(2), 3, 100)]);
        census.models[2].kept = Some(Kept::Pinned);
        assert_eq!(plan(&census, 1110), Plan { is_enough: false, ..plan(&census, 1010) });
        census.models[1].kept = Some(Kept::Leased(vec!["ci".into()]));
        assert_eq!(victims(&plan(&census, 10)), [(id(0), 1, 10)]);
    }

    #[test]
    fn a_model_that_gives_nothing_back_stays() {
        let mut census = census(&[(&[1], 1), (&[1], 2), (&[2], 3)]);
        census.models[1].kept = Some(Kept::Young);
        assert_eq!(victims(&plan(&census, 100)), [(id(2), 2, 100)]);
    }

    #[test]
    fn bytes_that_a_pull_counts_on_are_not_gained() {
        let mut census = census(&[(&[1], 1), (&[2], 2)]);
        census.blobs.get_mut(&digest(1)).unwrap().users += 1;
        assert_eq!(victims(&plan(&census, 10)), [(id(1), 2, 100)]);
    }

    #[test]
    fn ten_thousand_models_that_share_their_bytes_are_planned() {
        let models: Vec<(Vec<u8>, u64)> = (0..10_000).map(|n| (vec![(n % 8) as u8], n)).collect();
        let census = census(&models.iter().map(|(blobs, at)| (blobs.as_slice(), *at)).collect::<Vec<_>>());
        let plan = plan(&census, u64::MAX);
        assert!(!plan.is_enough && plan.gained_bytes == 11_111_111);
    }

    proptest! {
        #[test]
        fn a_plan_keeps_what_is_kept_and_counts_what_it_gains(
            models in proptest::collection::vec((proptest::collection::btree_set(0u8..8, 1..4), 0u64..6, any::<bool>()), 0..12),
            need in 0u64..30_000_000,
        ) {
            let lists: Vec<(Vec<u8>, u64)> = models.iter().map(|(blobs, at, _)| (blobs.iter().copied().collect(), *at)).collect();
            let mut census = census(&lists.iter().map(|(blobs, at)| (blobs.as_slice(), *at)).collect::<Vec<_>>());
            for (model, (_, _, kept)) in census.models.iter_mut().zip(&models) {
                model.kept = kept.then_some(Kept::Pinned);
            }
            let plan = plan(&census, need);
            let goes = |model: &&Counted| plan.victims.iter().any(|victim| victim.id == model.id);
            let left: std::collections::HashSet<Digest> =
                census.models.iter().filter(|m| !goes(m)).flat_map(|m| m.blobs.to_vec()).collect();
            let gone: std::collections::HashSet<Digest> =
                census.models.iter().filter(goes).flat_map(|m| m.blobs.to_vec()).filter(|d| !left.contains(d)).collect();
            let bytes: u64 = gone.iter().map(|digest| census.blobs[digest].disk_bytes).sum();
            prop_assert_eq!(plan.gained_bytes, bytes);
            prop_assert_eq!(plan.victims.iter().map(|victim| victim.gained_bytes).sum::<u64>(), bytes);
            prop_assert!(census.models.iter().filter(goes).all(|model| model.kept.is_none()));
            prop_assert_eq!(plan.is_enough, bytes >= need);
            if !plan.is_enough {
                let all: Vec<_> = census.models.iter().filter(|m| m.kept.is_none()).collect();
                let kept: std::collections::HashSet<Digest> =
                    census.models.iter().filter(|m| m.kept.is_some()).flat_map(|m| m.blobs.to_vec()).collect();
                let could: std::collections::HashSet<Digest> =
                    all.iter().flat_map(|m| m.blobs.to_vec()).filter(|d| !kept.contains(d)).collect();
                prop_assert!(could.iter().map(|digest| census.blobs[digest].disk_bytes).sum::<u64>() < need);
            }
            // Not one too many.
            for victim in &plan.victims {
                if plan.is_enough {
                    let mut without = census.clone();
                    let model = without.models.iter_mut().find(|model| model.id == victim.id).unwrap();
                    model.kept = Some(Kept::Open);
                    let others: Vec<_> = plan.victims.iter().filter(|other| other.id != victim.id).collect();
                    let stays: std::collections::HashSet<Digest> = without
                        .models
                        .iter()
                        .filter(|m| !others.iter().any(|other| other.id == m.id))
                        .flat_map(|m| m.blobs.to_vec())
                        .collect();
                    let goes: std::collections::HashSet<Digest> = without
                        .models
                        .iter()
                        .filter(|m| others.iter().any(|other| other.id == m.id))
                        .flat_map(|m| m.blobs.to_vec())
                        .filter(|d| !stays.contains(d))
                        .collect();
                    prop_assert!(goes.iter().map(|digest| census.blobs[digest].disk_bytes).sum::<u64>() < need);
                }
            }
        }
    }
}

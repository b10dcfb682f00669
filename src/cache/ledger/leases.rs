//! [`Leases`]: every lease, found by its id and by its version, since each open asks who uses a version.

use std::collections::{BTreeSet, HashMap};

use super::super::lease::Held;
use crate::model::{Holder, ModelId};

/// Every lease, also those whose time is over.
#[derive(Default)]
pub(super) struct Leases {
    by_id: HashMap<String, Held>,
    /// The same ids; no version without one.
    by_model: HashMap<ModelId, Ids>,
    noted: usize,
}

/// The leases on one version. Those of connections have no end that time brings, and there can be thousands of them.
#[derive(Default)]
struct Ids {
    endless: BTreeSet<String>,
    ending: BTreeSet<String>,
}

impl Ids {
    fn of_kind(&mut self, held: &Held) -> &mut BTreeSet<String> {
        if held.ends.is_none() { &mut self.endless } else { &mut self.ending }
    }

    fn is_empty(&self) -> bool {
        self.endless.is_empty() && self.ending.is_empty()
    }
}

impl Leases {
    /// Takes a lease in; what the same id said before.
    pub(super) fn insert(&mut self, held: Held) -> Option<Held> {
        let before = self.remove(&held.id);
        self.by_model.entry(held.model).or_default().of_kind(&held).insert(held.id.clone());
        self.noted += usize::from(outlives_its_request(&held));
        self.by_id.insert(held.id.clone(), held);
        before
    }

    /// A lease ends.
    pub(super) fn remove(&mut self, id: &str) -> Option<Held> {
        let held = self.by_id.remove(id)?;
        if let Some(ids) = self.by_model.get_mut(&held.model) {
            ids.of_kind(&held).remove(id);
            if ids.is_empty() {
                self.by_model.remove(&held.model);
            }
        }
        self.noted -= usize::from(outlives_its_request(&held));
        Some(held)
    }

    pub(super) fn get(&self, id: &str) -> Option<&Held> {
        self.by_id.get(id)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Held> {
        self.by_id.values()
    }

    /// Those on one version.
    pub(super) fn on(&self, model: ModelId) -> impl Iterator<Item = &Held> {
        let ids = self.by_model.get(&model);
        ids.into_iter().flat_map(|ids| ids.endless.iter().chain(&ids.ending)).filter_map(|id| self.by_id.get(id))
    }

    /// How many on one version are not over. Looks only at those that can be: each open asks, also while a thousand
    /// connections have that version open.
    pub(super) fn count_on(&self, model: ModelId) -> usize {
        self.by_model.get(&model).map_or(0, |ids| {
            let ending = ids.ending.iter().filter_map(|id| self.by_id.get(id));
            ids.endless.len() + ending.filter(|held| !held.is_over()).count()
        })
    }

    /// How many outlive the request that took them.
    pub(super) fn noted(&self) -> usize {
        self.noted
    }
}

fn outlives_its_request(held: &Held) -> bool {
    !matches!(held.holder, Holder::Connection(_))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::super::lease::Ends;
    use super::*;

    #[test]
    fn leases_are_found_by_id_and_by_version_until_they_end() {
        let model = |n: u8| format!("{n:016x}").parse::<ModelId>().unwrap();
        let held =
            |id: &str, n: u8, holder: Holder| Held { id: id.into(), model: model(n), holder, since_ms: 0, ends: None };
        let mut leases = Leases::default();
        let name = || Holder::named("ci").unwrap();
        assert!(leases.insert(held("a", 1, name())).is_none());
        assert!(leases.insert(held("b", 1, Holder::Connection("process 1".into()))).is_none());
        assert!(leases.insert(held("a", 2, name())).is_some_and(|before| before.model == model(1)));
        let ids = |leases: &Leases, n| leases.on(model(n)).map(|held| held.id.clone()).collect::<Vec<_>>();
        assert_eq!((ids(&leases, 1), ids(&leases, 2), leases.noted()), (vec!["b".to_owned()], vec!["a".to_owned()], 1));
        assert!(leases.remove("a").is_some() && leases.remove("a").is_none());
        leases.remove("b");
        assert_eq!((leases.iter().count(), leases.by_model.len(), leases.noted()), (0, 0, 0));
    }

    #[test]
    fn a_lease_counts_until_its_time_is_over() {
        let model = "000000000000000a".parse::<ModelId>().unwrap();
        let now = Instant::now();
        let held = |id: &str, ends: Option<Instant>| Held {
            id: id.into(),
            model,
            holder: Holder::named("ci").unwrap(),
            since_ms: 0,
            ends: ends.map(|at| Ends { at, at_ms: 0 }),
        };
        let mut leases = Leases::default();
        for (id, ends, counted) in [
            ("endless", None, 1),
            ("later", Some(now + Duration::from_secs(3600)), 2),
            ("over", Some(now), 2),
            // One that is renewed may gain an end, or lose it.
            ("endless", Some(now), 1),
            ("over", None, 2),
        ] {
            leases.insert(held(id, ends));
            assert_eq!(leases.count_on(model), counted, "after {id}");
        }
        assert_eq!(leases.on(model).count(), 3);
        for id in ["endless", "later", "over"] {
            leases.remove(id);
        }
        assert_eq!((leases.count_on(model), leases.by_model.len()), (0, 0));
    }
}

//! [`Leases`]: every lease, found by its id and by its version, since each open asks who uses a version.

use std::collections::{BTreeSet, HashMap};

use super::super::lease::Held;
use crate::model::{Holder, ModelId};

/// Every lease, also those whose time is over.
#[derive(Default)]
pub(super) struct Leases {
    by_id: HashMap<String, Held>,
    /// The same ids; no version without one.
    by_model: HashMap<ModelId, BTreeSet<String>>,
    noted: usize,
}

impl Leases {
    /// Takes a lease in; what the same id said before.
    pub(super) fn insert(&mut self, held: Held) -> Option<Held> {
        let before = self.remove(&held.id);
        self.by_model.entry(held.model).or_default().insert(held.id.clone());
        self.noted += usize::from(outlives_its_request(&held));
        self.by_id.insert(held.id.clone(), held);
        before
    }

    /// A lease ends.
    pub(super) fn remove(&mut self, id: &str) -> Option<Held> {
        let held = self.by_id.remove(id)?;
        if let Some(ids) = self.by_model.get_mut(&held.model) {
            ids.remove(id);
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

    /// Those on one version, by id.
    pub(super) fn on(&self, model: ModelId) -> impl Iterator<Item = &Held> {
        self.by_model.get(&model).into_iter().flatten().filter_map(|id| self.by_id.get(id))
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
}

//! Who tells others that a model is about to go, before it goes.

use std::sync::Arc;

use super::super::Cache;
use super::told::told;
use crate::model::ModelId;
use crate::store::Eviction;
use crate::wire::http::EvictionInfo;

/// Tells others which models are here, so that pods are sent where their model is.
pub trait Announcer: Send + Sync {
    /// These versions are about to go. Returns when nobody is told any more that they are here, or when that takes too long.
    /// Blocking.
    fn withdraw(&self, models: &[ModelId]);

    /// It is decided about these: they went, or stay.
    fn settled(&self, models: &[ModelId]);

    /// This one went.
    fn evicted(&self, eviction: &EvictionInfo);
}

/// Versions that are not announced, because they are about to go. Drop ends that.
#[must_use = "dropping it announces again what has not gone"]
pub(super) struct Withdrawn {
    announcer: Option<Arc<dyn Announcer>>,
    models: Vec<ModelId>,
}

impl Drop for Withdrawn {
    fn drop(&mut self) {
        self.announcer.iter().for_each(|announcer| announcer.settled(&self.models));
    }
}

impl Cache {
    /// From now on this one is told of evictions, before and after. The first one that is given stays.
    pub fn announce_by(&self, announcer: Arc<dyn Announcer>) {
        let _ = self.0.evictions.announcer.set(announcer);
    }

    /// Blocking, for as long as the announcer takes.
    pub(super) fn withdraw(&self, models: Vec<ModelId>) -> Withdrawn {
        let announcer = self.0.evictions.announcer.get().cloned().filter(|_| !models.is_empty());
        announcer.iter().for_each(|announcer| announcer.withdraw(&models));
        Withdrawn { announcer, models }
    }

    pub(super) fn announce_eviction(&self, eviction: &Eviction) {
        self.0.evictions.announcer.get().into_iter().for_each(|announcer| announcer.evicted(&told(eviction)));
    }
}

//! Pins: references that are kept. What a pinned reference means now is not removed, and is pulled if it is not local.

use std::collections::BTreeSet;

use super::ledger::Pinned;
use super::{Cache, Error, now_ms, rfc3339};
use crate::model::ModelRef;
use crate::store::{PinNote, PinnedBy};
use crate::wire::http::{self, PinInfo};

/// Most references that are pinned.
const MAX_PINS: usize = 1_000;

impl Cache {
    /// Keeps a reference until it is unpinned. Pinning it again changes nothing. It is not pulled: that is
    /// [`Cache::pull`]. Blocking: durable on return.
    pub fn pin(&self, reference: &ModelRef) -> Result<PinInfo, Error> {
        self.pin_by(reference, PinnedBy::Operator)
    }

    /// Takes back what [`Cache::pin`] did. A reference that the configuration lists stays pinned by it. Blocking.
    pub fn unpin(&self, reference: &ModelRef) -> Result<PinInfo, Error> {
        self.unpin_by(reference, PinnedBy::Operator)
    }

    /// Every pin, by reference.
    pub fn pins(&self) -> Vec<PinInfo> {
        self.0.ledger.pins().iter().map(|pinned| self.pin_info(pinned)).collect()
    }

    /// Makes the pins of the configuration be these: pins and pulls what is new in the list, unpins what is no longer in
    /// it, and leaves alone what somebody else pinned. Every failure is logged, none stops the others. Blocking; needs a
    /// tokio runtime.
    pub fn keep_pinned(&self, listed: &[ModelRef]) {
        for pinned in self.0.ledger.pins() {
            if pinned.by.contains(&PinnedBy::Config)
                && !listed.contains(&pinned.reference)
                && let Err(error) = self.unpin_by(&pinned.reference, PinnedBy::Config)
            {
                tracing::warn!(%error, reference = %pinned.reference, "a pin that is no longer configured stays");
            }
        }
        for reference in listed {
            let pinned = self.pin_by(reference, PinnedBy::Config).map(drop);
            if let Err(error) = pinned.and_then(|()| self.pull(reference).map(drop)) {
                tracing::warn!(%error, %reference, "a pinned model is not pulled");
            }
        }
    }

    /// Whether a pinned reference is not local.
    pub fn lacks_pinned(&self) -> bool {
        self.0.ledger.pins().iter().any(|pinned| self.0.ledger.current(&pinned.reference).is_none())
    }

    /// Pulls every pinned reference that is not local; one that is on its way is joined. Needs a tokio runtime.
    pub fn pull_pinned(&self) {
        for pinned in self.0.ledger.pins() {
            let current = self.0.ledger.current(&pinned.reference);
            if current.is_none_or(|record| self.0.ledger.lacking(record.id()).is_some())
                && let Err(error) = self.pull_ahead(&pinned.reference)
            {
                tracing::warn!(%error, reference = %pinned.reference, "a pinned model is not pulled");
            }
        }
    }

    fn pin_by(&self, reference: &ModelRef, by: PinnedBy) -> Result<PinInfo, Error> {
        self.hands()?;
        let _noting = self.noting()?;
        let before = self.0.ledger.pinned(reference);
        if before.is_none() && self.0.ledger.pins().len() >= MAX_PINS {
            return Err(Error::TooManyPins { most: MAX_PINS });
        }
        let mut pinned = before.clone().unwrap_or_else(|| Pinned {
            reference: reference.clone(),
            by: BTreeSet::new(),
            since_ms: now_ms(),
        });
        if pinned.by.insert(by) {
            self.0.volume.write_note(&note_of(&pinned))?;
            tracing::info!(%reference, ?by, "pinned");
            self.0.ledger.pin(pinned.clone());
        }
        Ok(self.pin_info(&pinned))
    }

    fn unpin_by(&self, reference: &ModelRef, by: PinnedBy) -> Result<PinInfo, Error> {
        self.hands()?;
        let _noting = self.noting()?;
        let mut pinned =
            self.0.ledger.pinned(reference).ok_or_else(|| Error::NotPinned { reference: reference.to_string() })?;
        if !pinned.by.remove(&by) {
            return Err(Error::PinnedByConfig { reference: reference.to_string() });
        }
        if pinned.by.is_empty() {
            self.0.volume.remove_note::<PinNote>(&PinNote::name_for(reference))?;
            self.0.ledger.unpin(reference);
        } else {
            self.0.volume.write_note(&note_of(&pinned))?;
            self.0.ledger.pin(pinned.clone());
        }
        tracing::info!(%reference, ?by, "unpinned");
        Ok(self.pin_info(&pinned))
    }

    /// Start-up. A pin that cannot be read keeps everything.
    pub(super) fn restore_pins(&self) -> Result<(), Error> {
        let (notes, unreadable) = self.0.volume.notes::<PinNote>()?;
        for error in unreadable {
            tracing::warn!(%error, "a pin cannot be read: no model is removed until it is gone");
            self.0.ledger.holders_are_unknown(error.to_string());
        }
        for PinNote { reference, by, since_ms } in notes {
            self.0.ledger.pin(Pinned { reference, by, since_ms });
        }
        Ok(())
    }

    fn pin_info(&self, pinned: &Pinned) -> PinInfo {
        let by = |by: &PinnedBy| match by {
            PinnedBy::Operator => http::PinnedBy::Operator,
            PinnedBy::Config => http::PinnedBy::Config,
        };
        PinInfo {
            reference: pinned.reference.to_string(),
            by: pinned.by.iter().map(by).collect(),
            since: rfc3339(pinned.since_ms),
            model: self.0.ledger.current(&pinned.reference).map(|record| record.id().to_string()),
        }
    }
}

fn note_of(pinned: &Pinned) -> PinNote {
    PinNote { reference: pinned.reference.clone(), by: pinned.by.clone(), since_ms: pinned.since_ms }
}

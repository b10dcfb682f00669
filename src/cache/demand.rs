//! Who goes first: what somebody waits for (a pull, a warm-up for a reader), before what nobody does (what is pinned, what a
//! former run left, what is only to be there one day).

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::pace::Pace;

/// Ranges that pulls nobody waits for may fetch at a time, all together, while somebody waits for something else: a demanded
/// pull whose source is slow must not bring the others to a halt.
const TRICKLE_RANGES: usize = 1;

/// How many pulls and warm-ups somebody waits for.
pub(super) struct Demand {
    /// Below zero for a moment where one ends while somebody begins to wait for it.
    waited_for: watch::Sender<isize>,
    trickle: Arc<Semaphore>,
    /// Of what nobody waits for, all together.
    pace: Mutex<Pace>,
}

/// Whether somebody waits for one pull or warm-up. Drop: it has ended.
pub(super) struct Urgency {
    demand: Arc<Demand>,
    /// One of those below. No lock: it is looked at while the number is held still.
    waiting: AtomicU8,
}

const NOBODY: u8 = 0;
const SOMEBODY: u8 = 1;
const ENDED: u8 = 2;

/// A range that may be fetched, until it is dropped.
pub(super) struct Turn(#[expect(dead_code, reason = "it is held, not used")] Option<OwnedSemaphorePermit>);

impl Urgency {
    /// Nobody waits yet.
    pub(super) fn of(demand: &Arc<Demand>) -> Urgency {
        Urgency { demand: demand.clone(), waiting: AtomicU8::new(NOBODY) }
    }

    /// From now on somebody waits for it, unless it has ended.
    pub(super) fn raise(&self) {
        if self.waiting.compare_exchange(NOBODY, SOMEBODY, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.demand.waited_for.send_modify(|urged| *urged += 1);
        }
    }

    /// It has ended.
    pub(super) fn end(&self) {
        if self.waiting.swap(ENDED, Ordering::AcqRel) == SOMEBODY {
            self.demand.waited_for.send_modify(|urged| *urged -= 1);
        }
    }

    pub(super) fn is_raised(&self) -> bool {
        self.waiting.load(Ordering::Acquire) == SOMEBODY
    }
}

impl Drop for Urgency {
    fn drop(&mut self) {
        self.end();
    }
}

impl Demand {
    /// What nobody waits for gets so many bytes a second at most, if that is limited.
    pub(super) fn new(background_rate: Option<u64>) -> Arc<Demand> {
        let trickle = Arc::new(Semaphore::new(TRICKLE_RANGES));
        Arc::new(Demand { waited_for: watch::Sender::new(0), trickle, pace: Mutex::new(Pace::at(background_rate)) })
    }

    /// Waits until a pull of this urgency may fetch one more range.
    pub(super) async fn turn(&self, urgency: &Urgency) -> Turn {
        tokio::select! {
            biased;
            () = self.comes_first(urgency) => Turn(None),
            trickle = self.trickle.clone().acquire_owned() => Turn(trickle.ok()),
        }
    }

    /// Waits until nobody waits for anything, or somebody for this.
    pub(super) async fn comes_first(&self, urgency: &Urgency) {
        let mut waited_for = self.waited_for.subscribe();
        // It changes when somebody begins to wait for this one, too.
        let _ = waited_for.wait_for(|urged| *urged <= 0 || urgency.is_raised()).await;
    }

    /// Waits until nobody waits for anything.
    pub(super) async fn is_quiet(&self) {
        let _ = self.waited_for.subscribe().wait_for(|urged| *urged <= 0).await;
    }

    /// Waits until somebody waits for this.
    pub(super) async fn is_wanted(&self, urgency: &Urgency) {
        let _ = self.waited_for.subscribe().wait_for(|_| urgency.is_raised()).await;
    }

    /// So many bytes have come: waits as long as the rate of what nobody waits for demands, unless somebody waits for it.
    pub(super) async fn has_come(&self, urgency: &Urgency, bytes: u64) {
        if urgency.is_raised() {
            return;
        }
        let wait = self.pace.lock().expect("no panic while the pace is held").before(bytes);
        if wait > Duration::ZERO {
            let _ = tokio::time::timeout(wait, self.is_wanted(urgency)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn what_somebody_waits_for_goes_first_and_the_rest_trickles() {
        let demand = Demand::new(None);
        let [wanted, other] = [(); 2].map(|()| Urgency::of(&demand));
        let free = [demand.turn(&other).await, demand.turn(&other).await];
        wanted.raise();
        let _any_number = [demand.turn(&wanted).await, demand.turn(&wanted).await];
        let trickle = demand.turn(&other).await;
        assert!(demand.turn(&other).now_or_never().is_none(), "one range at a time");
        drop(trickle);
        let _trickle = demand.turn(&other).await;
        drop(free);

        let mut waits = Box::pin(demand.turn(&other));
        assert!((&mut waits).now_or_never().is_none());
        wanted.end();
        waits.await;
    }

    #[tokio::test]
    async fn what_is_waited_for_after_all_does_not_wait_any_more() {
        let demand = Demand::new(None);
        let [wanted, other] = [(); 2].map(|()| Urgency::of(&demand));
        wanted.raise();
        let _trickle = demand.turn(&other).await;
        let mut waits = Box::pin(demand.turn(&other));
        assert!((&mut waits).now_or_never().is_none());
        other.raise();
        other.raise();
        waits.await;
        wanted.end();
        other.end();
        other.raise();
        assert!(!other.is_raised(), "it has ended");
        assert_eq!(*demand.waited_for.borrow(), 0);
    }

    #[tokio::test]
    async fn a_rate_holds_for_all_that_nobody_waits_for_and_for_nothing_else() {
        let demand = Demand::new(Some(1));
        let [one, other, wanted] = [(); 3].map(|()| Urgency::of(&demand));
        wanted.raise();
        demand.has_come(&one, 3_600).await;
        assert!(demand.has_come(&other, 1).now_or_never().is_none(), "an hour of the rate is used up");
        demand.has_come(&wanted, 1 << 40).await;
        let mut waits = Box::pin(demand.has_come(&other, 1));
        assert!((&mut waits).now_or_never().is_none());
        other.raise();
        waits.await;
    }
}

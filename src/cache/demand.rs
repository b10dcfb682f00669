//! Who goes first: a pull that somebody waits for, before one that nobody does (what is pinned, what a former run left).

use std::sync::{Arc, Mutex};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

/// Ranges that pulls nobody waits for may fetch at a time, all together, while somebody waits for another one: a demanded
/// pull whose source is slow must not bring the others to a halt.
const TRICKLE_RANGES: usize = 1;

/// How many pulls somebody waits for.
pub(super) struct Demand {
    waited_for: watch::Sender<usize>,
    trickle: Arc<Semaphore>,
}

/// Whether somebody waits for one pull.
#[derive(Default)]
pub(super) struct Urgency(Mutex<Option<Urged>>);

/// One pull that somebody waits for. Drop: nobody does any more.
struct Urged(Arc<Demand>);

impl Drop for Urged {
    fn drop(&mut self) {
        self.0.waited_for.send_modify(|pulls| *pulls -= 1);
    }
}

/// A range that may be fetched, until it is dropped.
pub(super) struct Turn(#[expect(dead_code, reason = "it is held, not used")] Option<OwnedSemaphorePermit>);

impl Urgency {
    /// From now on somebody waits for this pull.
    pub(super) fn raise(&self, demand: &Arc<Demand>) {
        let mut urged = self.0.lock().expect("no panic while the urgency is held");
        urged.get_or_insert_with(|| {
            demand.waited_for.send_modify(|pulls| *pulls += 1);
            Urged(demand.clone())
        });
    }

    /// The pull has ended.
    pub(super) fn end(&self) {
        self.0.lock().expect("no panic while the urgency is held").take();
    }

    fn is_raised(&self) -> bool {
        self.0.lock().expect("no panic while the urgency is held").is_some()
    }
}

impl Demand {
    pub(super) fn new() -> Arc<Demand> {
        let trickle = Arc::new(Semaphore::new(TRICKLE_RANGES));
        Arc::new(Demand { waited_for: watch::Sender::new(0), trickle })
    }

    /// Waits until a pull of this urgency may fetch one more range.
    pub(super) async fn turn(&self, urgency: &Urgency) -> Turn {
        let mut waited_for = self.waited_for.subscribe();
        // It changes when somebody begins to wait for this one, too.
        let first = waited_for.wait_for(|pulls| *pulls == 0 || urgency.is_raised());
        tokio::select! {
            biased;
            _ = first => Turn(None),
            trickle = self.trickle.clone().acquire_owned() => Turn(trickle.ok()),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn what_somebody_waits_for_goes_first_and_the_rest_trickles() {
        let (demand, [wanted, other]) = (Demand::new(), [(); 2].map(|()| Urgency::default()));
        let free = [demand.turn(&other).await, demand.turn(&other).await];
        wanted.raise(&demand);
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
    async fn a_pull_that_is_waited_for_after_all_does_not_wait_any_more() {
        let (demand, [wanted, other]) = (Demand::new(), [(); 2].map(|()| Urgency::default()));
        wanted.raise(&demand);
        let _trickle = demand.turn(&other).await;
        let mut waits = Box::pin(demand.turn(&other));
        assert!((&mut waits).now_or_never().is_none());
        other.raise(&demand);
        other.raise(&demand);
        waits.await;
        wanted.end();
        other.end();
        assert_eq!(*demand.waited_for.borrow(), 0);
    }
}

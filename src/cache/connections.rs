//! [`Connections`]: how many requests for bytes are under way. As many as are configured, for a source that gives little on
//! each; fewer for one that gives as much on those: each connection costs the processor, and what is on its way in it is lost
//! when we are killed.

use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Fewer are never tried: a model has about as many files, and each needs one.
const FEWEST: usize = 4;
/// More connections are good for a source that gives less than this on each, in bytes a second.
const SCANTY_BYTES_PER_SECOND: u64 = 30_000_000;
/// What half as many connections must give to be enough, in hundredths of what all gave.
const ENOUGH_PERCENT: u64 = 95;
/// After so many windows (`super::throughput`) the search begins again: the source may give something else by then.
const WINDOWS_OF_REST: u32 = 50;

/// The connections that all pulls share.
pub(super) struct Connections {
    most: usize,
    free: Arc<Semaphore>,
    limit: Mutex<Limit>,
}

/// One of them, until it is dropped.
pub(super) struct Connection {
    permit: Option<OwnedSemaphorePermit>,
    connections: Arc<Connections>,
}

/// How many there may be.
#[derive(Debug)]
struct Limit {
    limit: usize,
    /// Permits above the limit that are still out.
    surplus: usize,
    /// Whether all were in use at some moment of this window: if not, the limit has decided nothing.
    binds: bool,
    search: Search,
}

/// Down from the most to the fewest that are enough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Search {
    /// The limit has just changed, and this window says nothing. With the rate of all, if that is known.
    Settles { of_all: Option<u64> },
    /// This window says what the limit gives.
    Measures { of_all: Option<u64> },
    /// It has ended, and begins again after so many windows.
    Rests { windows: u32 },
}

impl Search {
    const BEGINS: Search = Search::Settles { of_all: None };
}

impl Connections {
    /// At most `most`, at least one.
    pub(super) fn new(most: usize) -> Arc<Connections> {
        let most = most.max(1);
        let limit = Limit { limit: most, surplus: 0, binds: false, search: Search::BEGINS };
        Arc::new(Connections { most, free: Arc::new(Semaphore::new(most)), limit: Mutex::new(limit) })
    }

    fn limit(&self) -> MutexGuard<'_, Limit> {
        self.limit.lock().expect("no panic while connections are counted")
    }

    /// Waits for one.
    pub(super) async fn acquire(self: &Arc<Self>) -> Connection {
        let permit = self.free.clone().acquire_owned().await.expect("connections are never closed");
        if self.free.available_permits() == 0 {
            self.limit().binds = true;
        }
        Connection { permit: Some(permit), connections: self.clone() }
    }

    /// A window has ended, in which so many bytes came a second. Whether the fewest connections are enough.
    pub(super) fn adapt(&self, bytes_per_second: u64) -> bool {
        let mut limit = self.limit();
        if std::mem::take(&mut limit.binds) {
            let (to, search) = limit.search.next(limit.limit, self.most, bytes_per_second);
            limit.search = search;
            self.allow(&mut limit, to);
        }
        self.most > FEWEST && limit.limit <= FEWEST
    }

    /// Nothing is under way any more, and the next source may be another one.
    pub(super) fn start_over(&self) {
        let mut limit = self.limit();
        limit.search = Search::BEGINS;
        self.allow(&mut limit, self.most);
    }

    fn allow(&self, limit: &mut Limit, to: usize) {
        let from = std::mem::replace(&mut limit.limit, to);
        limit.surplus += from.saturating_sub(to);
        let more = to.saturating_sub(from);
        let still_out = more.min(limit.surplus);
        limit.surplus -= still_out;
        self.free.add_permits(more - still_out);
        limit.surplus -= self.free.forget_permits(limit.surplus);
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut limit = self.connections.limit();
        if limit.surplus > 0
            && let Some(permit) = self.permit.take()
        {
            limit.surplus -= 1;
            permit.forget();
        }
    }
}

impl Search {
    /// The next limit, and how the search goes on, after a window with this limit and this rate.
    fn next(self, limit: usize, most: usize, rate: u64) -> (usize, Search) {
        match self {
            Search::Settles { of_all } => (limit, Search::Measures { of_all }),
            Search::Measures { of_all: Some(of_all) } if rate < of_all / 100 * ENOUGH_PERCENT => {
                ((limit * 2).min(most), Search::Rests { windows: WINDOWS_OF_REST })
            }
            Search::Measures { of_all } => {
                let fewer = (limit / 2).max(FEWEST);
                if fewer >= limit || rate / (limit as u64) < SCANTY_BYTES_PER_SECOND {
                    return (limit, Search::Rests { windows: WINDOWS_OF_REST });
                }
                (fewer, Search::Settles { of_all: of_all.or(Some(rate)) })
            }
            Search::Rests { windows: 0 } => (most, Search::BEGINS),
            Search::Rests { windows } => (limit, Search::Rests { windows: windows - 1 }),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    /// Goes through so many windows in which all connections are in use, with a source that gives so much on so many.
    fn after(connections: &Arc<Connections>, windows: usize, gives: impl Fn(u64) -> u64) -> usize {
        for _ in 0..windows {
            let taken: Vec<_> = std::iter::from_fn(|| connections.acquire().now_or_never()).collect();
            connections.adapt(gives(taken.len() as u64));
        }
        connections.limit().limit
    }

    #[test]
    fn a_source_that_gives_all_on_few_is_asked_on_few() {
        let connections = Connections::new(16);
        assert_eq!(after(&connections, 8, |_| 1_000_000_000), FEWEST);
        assert_eq!(after(&connections, 5, |_| 1_000_000_000), FEWEST);
        assert_eq!(connections.free.available_permits(), FEWEST);
    }

    #[test]
    fn a_source_that_gives_little_on_each_is_asked_on_all() {
        let connections = Connections::new(16);
        for _ in 0..200 {
            assert_eq!(after(&connections, 1, |count| count * 25_000_000), 16);
        }
    }

    #[test]
    fn too_few_are_taken_back() {
        let connections = Connections::new(16);
        let gives = |count: u64| (count * 100_000_000).min(900_000_000);
        assert_eq!(after(&connections, 4, gives), 16, "8 gave a ninth less");
        assert_eq!(after(&connections, 40, gives), 16);
        assert_eq!(connections.free.available_permits(), 16);
    }

    #[test]
    fn the_search_begins_again_after_a_time_and_with_another_source() {
        let connections = Connections::new(16);
        after(&connections, 8, |_| 1_000_000_000);
        assert_eq!(after(&connections, 60, |count| count * 25_000_000), 16);

        let connections = Connections::new(16);
        after(&connections, 8, |_| 1_000_000_000);
        connections.start_over();
        assert_eq!(connections.free.available_permits(), 16);
    }

    #[test]
    fn what_is_above_a_lower_limit_ends_as_it_comes_back() {
        let connections = Connections::new(8);
        let mut taken: Vec<_> = std::iter::from_fn(|| connections.acquire().now_or_never()).collect();
        assert_eq!(taken.len(), 8);
        for _ in 0..2 {
            connections.limit().binds = true;
            connections.adapt(1_000_000_000);
        }
        taken.truncate(5);
        assert_eq!((connections.free.available_permits(), connections.limit().surplus), (0, 1));
        taken.truncate(4);
        assert!(connections.acquire().now_or_never().is_none());
        taken.truncate(3);
        assert!(connections.acquire().now_or_never().is_some());
        // Allowed again while some are still out that were to end.
        connections.start_over();
        drop(taken);
        assert_eq!((connections.free.available_permits(), connections.limit().surplus), (8, 0));
    }

    #[test]
    fn where_not_all_are_used_nothing_is_learnt() {
        let connections = Connections::new(16);
        for _ in 0..20 {
            let _one = connections.acquire().now_or_never();
            connections.adapt(1_000_000_000);
        }
        assert_eq!(connections.limit().limit, 16);
        assert_eq!(Connections::new(0).free.available_permits(), 1);
    }
}

//! Whether what a pull writes stays in the page cache: what is wanted ([`PageCache`]), and what one pull does ([`Caching`]).

use std::thread::available_parallelism;

use super::memory::Memory;

/// The part of the memory that a warm-up may fill which one pull may fill too: others pull at the same time, and pods need
/// memory when they begin to read.
const SHARE_PERCENT: u64 = 50;
/// From a source that gives more than this for each processor we have, bytes a second, bytes go past the page cache. To find,
/// clear and fill its pages takes a processor about a second for 10⁹ bytes, as much as all the rest of a pull: up to here a
/// pull takes about a third of the processors, and beyond, the page cache is what it waits for.
const BYTES_PER_SECOND_OF_PROCESSOR: u64 = 150_000_000;

/// What is wanted of the page cache when pulls write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageCache {
    /// What comes slowly of a model that fits there well stays in it, all else goes past it.
    Auto,
    /// Every model goes through it.
    Keep,
    /// None does.
    Bypass,
}

/// What becomes of the page cache when one pull writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caching {
    /// Everything goes through it.
    Keep,
    /// The model fits, so who waits for it reads from memory what went through it. That is cheap as long as no more bytes
    /// come a second.
    KeepUpTo { bytes_per_second: u64 },
    /// Everything goes to the disk directly. The model would push itself and others out.
    Bypass,
}

impl Caching {
    /// For a model of this size.
    pub(super) fn of(wanted: PageCache, total_bytes: u64, memory: &Memory) -> Caching {
        match wanted {
            PageCache::Auto if total_bytes <= memory.allowance(0).bytes / 100 * SHARE_PERCENT => {
                let processors = available_parallelism().map_or(1, |count| count.get() as u64);
                Caching::KeepUpTo { bytes_per_second: processors * BYTES_PER_SECOND_OF_PROCESSOR }
            }
            PageCache::Keep => Caching::Keep,
            PageCache::Auto | PageCache::Bypass => Caching::Bypass,
        }
    }

    /// Whether the next bytes go past it, when so many come a second. Unknown: yes.
    pub(super) fn bypasses(self, bytes_per_second: Option<u64>) -> bool {
        match self {
            Caching::Keep => false,
            Caching::KeepUpTo { bytes_per_second: most } => bytes_per_second.is_none_or(|rate| rate > most),
            Caching::Bypass => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_stays_in_memory_only_if_it_leaves_as_much_to_others() {
        let memory = Memory::of_a_node(10 << 30, 9 << 30);
        let of = |bytes, memory: &Memory| Caching::of(PageCache::Auto, bytes, memory);
        assert!(matches!(of(3 << 30, &memory), Caching::KeepUpTo { .. }));
        assert_eq!(of(5 << 30, &memory), Caching::Bypass);
        assert_eq!(of(1, &Memory::default()), Caching::Bypass, "unknown means no");
        assert_eq!(Caching::of(PageCache::Keep, 5 << 30, &memory), Caching::Keep);
        assert_eq!(Caching::of(PageCache::Bypass, 1, &memory), Caching::Bypass);
    }

    #[test]
    fn what_comes_faster_than_the_page_cache_takes_it_goes_past_it() {
        let slow = Caching::KeepUpTo { bytes_per_second: 100 };
        assert_eq!([None, Some(101), Some(100), Some(0)].map(|rate| slow.bypasses(rate)), [true, true, false, false]);
        assert!(!Caching::Keep.bypasses(None) && Caching::Bypass.bypasses(Some(0)));
    }
}

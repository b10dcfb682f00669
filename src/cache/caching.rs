//! Whether what a pull writes stays in the page cache: what is wanted ([`PageCache`]), and what one pull does ([`Caching`]).

use super::memory::Memory;

/// The part of the memory that a warm-up may fill which one pull may fill too: others pull at the same time, and pods need
/// memory when they begin to read.
const SHARE_PERCENT: u64 = 50;

/// What is wanted of the page cache when pulls write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageCache {
    /// A model stays in it that fits there well, the others go past it.
    Auto,
    /// Every model goes through it.
    Keep,
    /// None does.
    Bypass,
}

/// What becomes of the page cache when one pull writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Caching {
    /// The model fits: who waits for it reads it from memory, without having to wait for the disk again.
    Keep,
    /// It does not. It would push itself and others out, so it goes to the disk directly, which is also the cheaper way.
    Bypass,
}

impl Caching {
    /// For a model of this size.
    pub(super) fn of(wanted: PageCache, total_bytes: u64, memory: &Memory) -> Caching {
        match wanted {
            PageCache::Auto if total_bytes <= memory.allowance(0).bytes / 100 * SHARE_PERCENT => Caching::Keep,
            PageCache::Keep => Caching::Keep,
            PageCache::Auto | PageCache::Bypass => Caching::Bypass,
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
        assert_eq!(of(3 << 30, &memory), Caching::Keep);
        assert_eq!(of(5 << 30, &memory), Caching::Bypass);
        assert_eq!(of(1, &Memory::default()), Caching::Bypass, "unknown means no");
        assert_eq!(Caching::of(PageCache::Keep, 5 << 30, &memory), Caching::Keep);
        assert_eq!(Caching::of(PageCache::Bypass, 1, &memory), Caching::Bypass);
    }
}

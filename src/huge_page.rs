//! Memory that a disk can be given in few parts.

use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{Advice, MmapMut};

/// What one huge page holds, where there are any: of x86-64, and of AArch64 with pages of 4 KiB.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// So much memory, cleared, in one piece where the kernel has such a piece (`madvise`, or `always`, in
/// `/sys/kernel/mm/transparent_hugepage/enabled`), and in small pages where it has none. It is a map of its own: what is dropped
/// goes to the system. It begins at a multiple of its size.
///
/// A request to a disk lists the places in memory where its bytes are, and there are only so many in a list. Where a virtual disk
/// pays for each place, requests past the page cache took a half or a third of the time from huge pages.
#[derive(Debug)]
pub struct HugePage {
    map: MmapMut,
    start: usize,
}

impl HugePage {
    /// Takes no memory until it is touched.
    pub fn map() -> io::Result<HugePage> {
        // Wherever it begins, an aligned part is in it; the rest is never touched.
        let map = MmapMut::map_anon(2 * HUGE_PAGE_BYTES)?;
        // A kernel without them says so, and gives small ones.
        let _ = map.advise(Advice::HugePage);
        let start = map.as_ptr().addr().next_multiple_of(HUGE_PAGE_BYTES) - map.as_ptr().addr();
        Ok(HugePage { map, start })
    }

    /// Cuts it into parts of so many bytes, which must divide it. It goes to the system with the last of them.
    pub fn cut(mut self, part_bytes: usize) -> Vec<PagePart> {
        assert!(HUGE_PAGE_BYTES.is_multiple_of(part_bytes), "{part_bytes} bytes do not divide a huge page");
        let parts: Vec<NonNull<[u8]>> = self.chunks_exact_mut(part_bytes).map(NonNull::from).collect();
        let page = Arc::new(self);
        parts.into_iter().map(|bytes| PagePart { bytes, _page: page.clone() }).collect()
    }
}

impl Deref for HugePage {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.start..][..HUGE_PAGE_BYTES]
    }
}

impl DerefMut for HugePage {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..][..HUGE_PAGE_BYTES]
    }
}

/// A part of a huge page, and the only way to its bytes. It begins at a multiple of its size.
#[derive(Debug)]
pub struct PagePart {
    bytes: NonNull<[u8]>,
    /// Keeps them mapped.
    _page: Arc<HugePage>,
}

// SAFETY: the bytes belong to no thread, and whoever has a part has them alone: see `deref`.
#[allow(unsafe_code)]
unsafe impl Send for PagePart {}
// SAFETY: through a shared part its bytes are only read.
#[allow(unsafe_code)]
unsafe impl Sync for PagePart {}

impl Deref for PagePart {
    type Target = [u8];

    #[allow(unsafe_code)]
    fn deref(&self) -> &[u8] {
        // SAFETY: `cut` made one of each of the parts, which do not overlap, and gave up the page itself, into which nobody looks
        // any more; it is mapped, where it was, as long as we hold it; a part is not copied.
        unsafe { self.bytes.as_ref() }
    }
}

impl DerefMut for PagePart {
    #[allow(unsafe_code)]
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and who has the part alone has its bytes alone.
        unsafe { self.bytes.as_mut() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap_and_outlive_each_other() {
        let parts = HugePage::map().unwrap().cut(HUGE_PAGE_BYTES / 4);
        let filled = parts.into_iter().zip(1..).map(|(mut part, number)| {
            assert_eq!(part.as_ptr().addr() % (HUGE_PAGE_BYTES / 4), 0);
            part.fill(number);
            part
        });
        let mut filled: Vec<PagePart> = filled.collect();
        assert_eq!(filled.len(), 4);
        for number in (1..=4).rev() {
            let last = filled.pop().unwrap();
            assert!(last.len() == HUGE_PAGE_BYTES / 4 && last.iter().all(|byte| *byte == number));
        }
    }

    #[test]
    fn it_is_aligned_whole_and_cleared() {
        let mut pages = [(); 3].map(|()| HugePage::map().unwrap());
        for page in &mut pages {
            assert_eq!((page.len(), page.as_ptr().addr() % HUGE_PAGE_BYTES), (HUGE_PAGE_BYTES, 0));
            assert!(page.iter().all(|byte| *byte == 0));
            page.fill(7);
        }
    }
}

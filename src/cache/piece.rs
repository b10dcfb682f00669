//! The memory that bytes are received into.

use std::sync::{Mutex, MutexGuard};

use crate::huge_page::{HugePage, PagePart};

/// Bytes of one piece: large enough for wide SIMD and few system calls, small enough to stay in the cache while the
/// writer's passes (BLAKE3, the checksum, the write) go over it.
pub(super) const PIECE_BYTES: usize = 1 << 20;

/// Memory for pieces that nobody fills now. Writes past the page cache need what begins at a page.
#[derive(Default)]
pub(super) struct Buffers(Mutex<Vec<PagePart>>);

impl Buffers {
    /// One that was used before, or a new one.
    pub(super) fn take(&self) -> PagePart {
        let mut free = self.free();
        if free.is_empty() {
            free.extend(HugePage::map().expect("there is memory for a piece").cut(PIECE_BYTES));
        }
        free.pop().expect("a page holds some")
    }

    pub(super) fn put_back(&self, buffer: PagePart) {
        self.free().push(buffer);
    }

    /// Gives what is free back to the system.
    pub(super) fn give_back(&self) {
        *self.free() = Vec::new();
    }

    fn free(&self) -> MutexGuard<'_, Vec<PagePart>> {
        self.0.lock().expect("no panic while the buffers are held")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_used_again_until_they_are_given_back() {
        let buffers = Buffers::default();
        let [first, second] = [buffers.take(), buffers.take()];
        assert_eq!((first.len(), first.as_ptr().addr() % PIECE_BYTES), (PIECE_BYTES, 0));
        let place = first.as_ptr();
        buffers.put_back(first);
        assert_eq!(buffers.take().as_ptr(), place);
        buffers.put_back(second);
        buffers.give_back();
        assert!(buffers.free().is_empty());
    }
}

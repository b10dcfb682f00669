//! The memory that this process has taken from the system and does not use.

/// Gives it back, as far as the allocator can: glibc keeps what was freed, in a heap for each thread, until the end of that
/// heap is free. Takes some milliseconds. Other allocators are not asked: musl's gives back by itself.
#[cfg_attr(target_env = "gnu", allow(unsafe_code))]
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number, may be called by any thread at any time, and touches nothing but memory that was freed: glibc
    // holds the lock of each heap meanwhile.
    unsafe {
        libc::malloc_trim(0);
    }
}

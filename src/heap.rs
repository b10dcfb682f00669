//! The memory that this process has taken from the system and does not use.

/// Heaps that threads share, for good. Each thread that finds all of them busy would otherwise get its own, and what is freed in it
/// later stays there; a daemon has dozens of threads while it pulls, and none after.
#[cfg(target_env = "gnu")]
const MOST_HEAPS: libc::c_int = 2;

/// Has all threads share a few heaps. For the beginning of a process that stays: heaps that there are stay. Other allocators than
/// glibc's are not asked.
#[cfg_attr(target_env = "gnu", allow(unsafe_code))]
pub fn share() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes two numbers, checks them, and changes one of the allocator's own, under its lock.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, MOST_HEAPS);
    }
}

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

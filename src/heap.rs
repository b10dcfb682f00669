//! The memory that this process has taken from the system and does not use.

use std::fs;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;

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

/// Gives it back, as far as it can be: what [`trim`] does, and the pages of the program that were needed once. Takes some
/// milliseconds. For when nothing is expected: what comes next is slower by them.
pub fn give_back() {
    trim();
    let_go_of_the_program();
}

/// Gives back what was freed and a heap still keeps. glibc has a heap for each thread, and keeps that until its end is free. Other
/// allocators are not asked: musl's gives back by itself.
#[cfg_attr(target_env = "gnu", allow(unsafe_code))]
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number, may be called by any thread at any time, and touches nothing but memory that was freed: glibc
    // holds the lock of each heap meanwhile.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Two thirds of what an idle daemon holds would be code: of the command line, of starting, of pulling. The kernel maps what is
/// needed again, from its page cache as a rule, some microseconds for each 64 KiB.
#[allow(unsafe_code)]
fn let_go_of_the_program() {
    let Ok(program) = fs::read_link("/proc/self/exe") else { return };
    let maps = fs::read("/proc/self/maps").unwrap_or_default();
    for code in maps.split(|byte| *byte == b'\n').filter_map(|line| code_of(line, program.as_os_str().as_bytes())) {
        // SAFETY: the range is a private map of the program's own file that can be executed and not written, so what is in memory
        // is what is in the file (which Linux lets nobody write while it runs), and comes from there again when it is touched.
        // Nobody unmaps it while the process runs. A kernel that refuses leaves all as it was.
        let _ = unsafe { libc::madvise(code.start as *mut libc::c_void, code.len(), libc::MADV_DONTNEED) };
    }
}

/// The addresses in this line of `/proc/self/maps`, if they are code of this program.
fn code_of(line: &[u8], program: &[u8]) -> Option<Range<usize>> {
    // proc(5): address, permissions, offset, device, inode, and the path after blanks; a path may have blanks itself.
    let line = line.strip_suffix(program)?;
    let mut fields = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let is_code = fields.next()? == "r-xp" && fields.count() == 3;
    let [start, end] = [start, end].map(|address| usize::from_str_radix(address, 16).ok());
    Some(start?..end?).filter(|_| is_code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_code_of_the_program_is_let_go() {
        let code = |line: &str| code_of(line.as_bytes(), b"/opt/my larder");
        assert_eq!(code("1000-3000 r-xp 0067c000 fe:00 3670 /opt/my larder"), Some(0x1000..0x3000));
        for other in [
            "1000-3000 r--p 00000000 fe:00 3670 /opt/my larder",
            "1000-3000 rwxp 0067c000 fe:00 3670 /opt/my larder",
            "1000-3000 r-xp 0067c000 fe:00 3670 /else/opt/my larder",
            "1000-3000 r-xp 0067c000 fe:00 3670 /opt/my larder (deleted)",
            "1000-3000 r-xp 00000000 00:00 0 [vdso]",
            "1000 r-xp 0067c000 fe:00 3670 /opt/my larder",
            "",
        ] {
            assert_eq!(code(other), None, "{other}");
        }
    }

    #[test]
    fn what_was_given_back_is_there_when_it_is_needed() {
        let maps = fs::read("/proc/self/maps").unwrap();
        let program = fs::read_link("/proc/self/exe").unwrap();
        let code = maps.split(|byte| *byte == b'\n').find_map(|line| code_of(line, program.as_os_str().as_bytes()));
        let address = (give_back as fn()) as usize;
        assert!(code.unwrap().contains(&address), "this test is code of this program");
        for _ in 0..3 {
            give_back();
        }
    }
}

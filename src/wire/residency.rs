//! How much of a file is in the page cache, as the kernel tells.
//!
//! `cachestat` (Linux 6.5) counts the pages of a range without mapping it. Before it there is `mincore` over a mapping,
//! which shows what is resident without touching it, but tells only the owner of a file the truth: to everybody else it
//! says that all of it is resident, so that one user cannot watch what another reads.

// The two calls have no safe wrapper in any library of ours.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use libc::{c_int, c_long, c_uint};

/// The number of the call; one for all architectures that larder is built for, and absent from the library for some.
const SYS_CACHESTAT: c_long = 451;

/// Bytes that are mapped at a time to ask `mincore`: its answer has a byte for each page, so it takes 64 KiB.
const MINCORE_WINDOW_BYTES: u64 = 256 << 20;

/// How the kernel is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// `cachestat`.
    Cachestat,
    /// `mincore`.
    Mincore,
}

impl Method {
    /// The one that works here. The kernel is asked once.
    pub fn of_this_kernel() -> Method {
        static METHOD: OnceLock<Method> = OnceLock::new();
        *METHOD.get_or_init(|| match cachestat(-1, 0, 1) {
            // The call is there, and says that this is no file.
            Err(libc::EBADF) => Method::Cachestat,
            _ => Method::Mincore,
        })
    }

    /// The name of the call.
    pub fn text(self) -> &'static str {
        match self {
            Method::Cachestat => "cachestat",
            Method::Mincore => "mincore",
        }
    }
}

/// Bytes of the first `size` bytes of a file that are in the page cache; `None` if the kernel does not tell us.
pub fn resident_bytes(file: &File, size: u64) -> Option<u64> {
    resident_bytes_in(file, 0, size)
}

/// The same of `length` bytes from `offset` on. What lies beyond the end of the file is not resident.
pub fn resident_bytes_in(file: &File, offset: u64, length: u64) -> Option<u64> {
    resident_by(Method::of_this_kernel(), file, offset, length)
}

/// Pages are counted whole, so the sum is cut to the bytes that were asked about.
fn resident_by(method: Method, file: &File, offset: u64, length: u64) -> Option<u64> {
    if length == 0 {
        return Some(0);
    }
    let pages = match method {
        Method::Cachestat => cachestat(file.as_raw_fd(), offset, length).ok()?,
        Method::Mincore => resident_pages_by_mincore(file, offset, length)?,
    };
    Some(pages.saturating_mul(page_bytes()).min(length))
}

fn page_bytes() -> u64 {
    rustix::param::page_size() as u64
}

/// Pages of a range of a file that are in the page cache, or the error number.
fn cachestat(fd: c_int, offset: u64, length: u64) -> Result<u64, c_int> {
    /// `struct cachestat_range` of the kernel.
    #[repr(C)]
    struct Range {
        offset: u64,
        length: u64,
    }
    /// `struct cachestat` of the kernel.
    #[repr(C)]
    #[derive(Default)]
    struct Counts {
        cached: u64,
        dirty: u64,
        writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let range = Range { offset, length };
    let mut counts = Counts::default();
    let flags: c_uint = 0;
    // SAFETY: the kernel reads `range` and writes `counts`, both of which have its layout, are on our stack and outlive the
    // call; it keeps neither. A descriptor that is not open is an error of the call. A kernel without the call touches
    // nothing and says ENOSYS: no other call ever had this number.
    let done = unsafe { libc::syscall(SYS_CACHESTAT, fd, &raw const range, &raw mut counts, flags) };
    if done == 0 { Ok(counts.cached) } else { Err(last_error()) }
}

fn last_error() -> c_int {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

fn resident_pages_by_mincore(file: &File, offset: u64, length: u64) -> Option<u64> {
    let metadata = file.metadata().ok()?;
    if metadata.uid() != rustix::process::geteuid().as_raw() {
        return None;
    }
    let page = page_bytes();
    let end = offset.saturating_add(length).min(metadata.len());
    // A mapping begins at a page.
    let mut at = offset - offset % page;
    let mut pages = 0;
    while at < end {
        let window = (end - at).min(MINCORE_WINDOW_BYTES);
        pages += resident_pages_of_window(file, at, window)?;
        at += window;
    }
    Some(pages)
}

/// `offset` is a multiple of the page size, `length` is at most [`MINCORE_WINDOW_BYTES`] and not 0.
fn resident_pages_of_window(file: &File, offset: u64, length: u64) -> Option<u64> {
    let length = usize::try_from(length).ok()?;
    let mut resident = vec![0u8; length.div_ceil(page_bytes() as usize)];
    // SAFETY: a new mapping at a place the kernel chooses, so no memory of ours is replaced. It is never read nor written
    // through: nothing points to it but the two calls below, so it cannot fault if the file shrinks meanwhile.
    let mapped = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            length,
            libc::PROT_READ,
            libc::MAP_PRIVATE,
            file.as_raw_fd(),
            libc::off_t::try_from(offset).ok()?,
        )
    };
    if mapped == libc::MAP_FAILED {
        return None;
    }
    // SAFETY: `mapped` is the start of the mapping of `length` bytes made above, and `resident` has a byte for each page of
    // it, which is all that the kernel writes.
    let told = unsafe { libc::mincore(mapped, length, resident.as_mut_ptr().cast()) } == 0;
    // SAFETY: exactly the mapping made above, which nothing else knows of and nothing uses after this.
    unsafe { libc::munmap(mapped, length) };
    told.then(|| resident.iter().filter(|page| *page & 1 == 1).count() as u64)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::FileExt;

    use rustix::fs::{Advice, fadvise};

    use super::*;

    const SIZE: u64 = 3 << 20;

    /// A file of some pages and a bit, none of which is resident; `None` where the file system cannot drop them.
    fn dropped() -> Option<File> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![7; SIZE as usize + 17]).unwrap();
        file.sync_all().unwrap();
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        match resident_by(Method::Mincore, &file, 0, SIZE) {
            Some(0) => Some(file),
            found => {
                println!("skipped: pages of a temporary file cannot be dropped, {found:?} bytes stay");
                None
            }
        }
    }

    fn methods() -> Vec<Method> {
        match Method::of_this_kernel() {
            Method::Cachestat => vec![Method::Cachestat, Method::Mincore],
            Method::Mincore => vec![Method::Mincore],
        }
    }

    #[test]
    fn each_way_to_ask_tells_what_was_dropped_and_what_was_read() {
        let Some(mut file) = dropped() else { return };
        fadvise(&file, 0, None, Advice::Random).unwrap();
        for method in methods() {
            assert_eq!(resident_by(method, &file, 0, SIZE + 17), Some(0), "{method:?}");
        }
        // One byte of the last page.
        file.read_exact_at(&mut [0], SIZE + 16).unwrap();
        for method in methods() {
            assert_eq!(resident_by(method, &file, 0, SIZE), Some(0), "{method:?}");
            assert_eq!(resident_by(method, &file, SIZE, 17), Some(17), "{method:?}: pages are cut to the bytes");
        }
        file.rewind().unwrap();
        file.read_to_end(&mut Vec::new()).unwrap();
        for method in methods() {
            assert_eq!(resident_by(method, &file, 0, SIZE + 17), Some(SIZE + 17), "{method:?}");
            assert_eq!(resident_by(method, &file, 5, 10), Some(10), "{method:?}");
        }
    }

    #[test]
    fn nothing_beyond_the_end_is_resident() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"short").unwrap();
        for method in methods() {
            assert_eq!(resident_by(method, &file, 1 << 40, SIZE), Some(0), "{method:?}");
            assert_eq!(resident_by(method, &file, 0, 0), Some(0), "{method:?}");
        }
    }

    #[test]
    fn mincore_is_not_believed_about_a_file_of_somebody_else() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: only root can give a file away");
            return;
        }
        let file = tempfile::tempfile().unwrap();
        file.set_len(SIZE).unwrap();
        rustix::fs::fchown(&file, Some(rustix::fs::Uid::from_raw(65_534)), None).unwrap();
        assert_eq!(resident_by(Method::Mincore, &file, 0, SIZE), None);
    }
}

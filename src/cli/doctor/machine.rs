//! The kernel that larder runs on.

use super::super::bench::machine::kernel_release;
use super::finding::{Finding, Mark};

/// Since when there is `cachestat`, which tells exactly how much of a file is in memory.
const CACHESTAT: (u32, u32) = (6, 5);
/// Since when there is `mount_setattr`, by which nobody can write through a descriptor that larder hands out.
const PRIVATE_MOUNTS: (u32, u32) = (5, 12);

/// Which kernel this is, and what larder lacks on it.
pub(super) fn kernel() -> Finding {
    of_release(&kernel_release().unwrap_or_else(|| "of an unknown release".to_owned()))
}

fn of_release(release: &str) -> Finding {
    let state = format!("Linux {release}");
    match version(release) {
        None => Finding::new(Mark::Note, "kernel", state, "its version cannot be told from its name"),
        Some(found) if found < PRIVATE_MOUNTS => {
            let means = "descriptors cannot be made read-only for root (Linux 5.12), and what is in memory is told of one's own \
                         files alone (6.5)";
            Finding::new(Mark::Note, "kernel", state, means)
        }
        Some(found) if found < CACHESTAT => {
            let means = "what is in memory is told of one's own files alone: `cachestat` came with Linux 6.5";
            Finding::new(Mark::Note, "kernel", state, means)
        }
        Some(_) => Finding::new(Mark::Ok, "kernel", state, "it has all that larder uses"),
    }
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_old_kernel_lacks_is_a_note() {
        let mark = |release| of_release(release).mark;
        assert_eq!(mark("6.5.0-1-amd64"), Mark::Ok);
        assert_eq!(mark("7.0-rc1"), Mark::Ok);
        for old in ["6.4.16", "5.4.0-100-generic", "4.18", "nonsense", ""] {
            assert_eq!(mark(old), Mark::Note, "{old}");
        }
        assert!(of_release("5.11.1").means.contains("5.12"));
        assert!(!of_release("5.15.1").means.contains("5.12"));
    }
}

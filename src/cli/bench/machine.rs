//! What the numbers are numbers of, and what the processor of this machine can do.

use std::fs;
use std::path::Path;
use std::time::Instant;

use aws_lc_rs::digest as lc;

use super::super::mounts;
use super::report::Machine;

/// Hashed at a time: what stays in the cache of a processor.
const BLOCK_BYTES: usize = 1 << 20;
/// How often.
const BLOCKS: usize = 256;
/// What of the memory is left to others, in hundredths: as warm-ups leave it.
const RESERVE_PERCENT: u64 = 10;

/// This machine, and the file system of a directory.
pub(super) fn machine(directory: &Path) -> Machine {
    Machine {
        processors: std::thread::available_parallelism().map_or(1, usize::from),
        memory_bytes: meminfo().and_then(|text| kib(&text, "MemTotal")),
        kernel: kernel_release(),
        file_system: mounts::of(directory).map_or_else(|_| "an unknown file system".to_owned(), |mount| mount.kind),
    }
}

/// Such as `6.12.0`; `None` if it does not tell.
pub(in crate::cli) fn kernel_release() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/osrelease").ok().map(|text| text.trim().to_owned())
}

/// How much page cache the node can take now; `None` if it does not tell.
pub(super) fn free_memory_bytes() -> Option<u64> {
    let text = meminfo()?;
    let reserve = kib(&text, "MemTotal")? / 100 * RESERVE_PERCENT;
    Some(kib(&text, "MemAvailable")?.saturating_sub(reserve))
}

/// MB/s of one core.
pub(super) fn blake3_rate() -> f64 {
    rate(blake3::hash)
}

/// MB/s of one core.
pub(super) fn sha256_rate() -> f64 {
    rate(|block| lc::digest(&lc::SHA256, block))
}

fn rate<T>(hash: impl Fn(&[u8]) -> T) -> f64 {
    let block = vec![7; BLOCK_BYTES];
    hash(&block);
    let began = Instant::now();
    for _ in 0..BLOCKS {
        std::hint::black_box(hash(&block));
    }
    (BLOCKS * BLOCK_BYTES) as f64 / began.elapsed().as_secs_f64() / 1e6
}

fn meminfo() -> Option<String> {
    fs::read_to_string("/proc/meminfo").ok()
}

fn kib(meminfo: &str, name: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_described_and_what_it_does_not_tell_is_left_out() {
        let machine = machine(Path::new("/"));
        assert!(machine.processors > 0 && machine.memory_bytes.is_some() && machine.kernel.is_some());
        assert_eq!(kib("MemTotal:        2 kB\nMemAvailable:    1 kB\n", "MemAvailable"), Some(1024));
        assert_eq!(kib("MemTotal:        2 kB\n", "MemAvailable"), None);
    }
}

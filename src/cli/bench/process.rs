//! What the kernel counts of a process: processor time, memory, and how often it woke up.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::fault::{Code, Problem};

/// What a process has used.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(super) struct Used {
    /// Of all its threads, in user and in kernel mode.
    pub(super) processor: Duration,
    pub(super) resident_bytes: u64,
    /// The most that was resident at any time.
    pub(super) peak_resident_bytes: u64,
}

impl Used {
    pub(super) fn by_this_process() -> Result<Used, Problem> {
        Used::by(std::process::id())
    }

    pub(super) fn by(pid: u32) -> Result<Used, Problem> {
        let (stat, status) = (read(pid, "stat")?, read(pid, "status")?);
        let ticks = rustix::param::clock_ticks_per_second();
        let unreadable = || unknown(pid, "its `/proc` entries are not as expected");
        Ok(Used {
            processor: processor_time(&stat, ticks).ok_or_else(unreadable)?,
            resident_bytes: kib(&status, "VmRSS").ok_or_else(unreadable)?,
            peak_resident_bytes: kib(&status, "VmHWM").ok_or_else(unreadable)?,
        })
    }
}

/// How often the threads of a process have gone to sleep to wait for something: each time, something has woken them up.
/// Threads that have ended are not counted.
pub(super) fn wake_ups(pid: u32) -> Result<u64, Problem> {
    let tasks = fs::read_dir(place(pid, "task")).map_err(|e| unknown(pid, &e.to_string()))?;
    let mut sum = 0;
    for task in tasks {
        let path = task.map_err(|e| unknown(pid, &e.to_string()))?.path().join("status");
        // A thread may end meanwhile.
        let status = fs::read_to_string(path).unwrap_or_default();
        sum += field(&status, "voluntary_ctxt_switches").and_then(|text| text.parse().ok()).unwrap_or(0);
    }
    Ok(sum)
}

fn place(pid: u32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

fn read(pid: u32, name: &str) -> Result<String, Problem> {
    fs::read_to_string(place(pid, name)).map_err(|e| unknown(pid, &e.to_string()))
}

fn unknown(pid: u32, why: &str) -> Problem {
    Problem::new(Code::InternalError, format!("cannot tell what process {pid} has used: {why}"), "is `/proc` mounted?")
}

/// The 14th and 15th field of `/proc/PID/stat`. The second one is a name in parentheses, with anything in it.
fn processor_time(stat: &str, ticks_per_second: u64) -> Option<Duration> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks: u64 = fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?;
    Some(Duration::from_secs_f64(ticks as f64 / ticks_per_second as f64))
}

fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

fn kib(status: &str, name: &str) -> Option<u64> {
    field(status, name)?.strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_lines_are_read_whatever_the_name_of_the_process() {
        let stat = "4711 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 250 150 0 0 20 0 9";
        assert_eq!(processor_time(stat, 100), Some(Duration::from_secs(4)));
        assert_eq!(processor_time("4711 (a", 100), None);
        let status = "Name:\tx\nVmHWM:\t    2048 kB\nvoluntary_ctxt_switches:\t17\nnonvoluntary_ctxt_switches:\t3\n";
        assert_eq!(kib(status, "VmHWM"), Some(2 << 20));
        assert_eq!((kib(status, "VmRSS"), field(status, "voluntary_ctxt_switches")), (None, Some("17")));
    }

    #[test]
    fn this_process_has_used_something_and_one_that_is_not_there_is_an_error() {
        let used = Used::by_this_process().unwrap();
        assert!(used.resident_bytes > 0 && used.peak_resident_bytes >= used.resident_bytes, "{used:?}");
        assert!(wake_ups(std::process::id()).is_ok());
        assert!(Used::by(u32::MAX).unwrap_err().message.contains("4294967295"));
    }
}

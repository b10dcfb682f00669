//! The history: which models were evicted, and why. One file of lines, the newest last, so that "why is my model gone" has an
//! answer after a restart too.

use serde::{Deserialize, Serialize};

use super::io::{look_at, read_small};
use super::layout::Scratch;
use super::record::json_line;
use super::{Error, Volume};
use crate::model::{ModelId, ModelRef};

/// Largest history, in bytes: some ten thousand evictions. Beyond it the older half goes.
const MAX_HISTORY_BYTES: u64 = 4 << 20;

/// One eviction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eviction {
    /// When; milliseconds since the Unix epoch.
    pub at_ms: u64,
    /// The version that went.
    pub model: ModelId,
    /// Its reference.
    pub reference: ModelRef,
    /// Its version.
    pub version: String,
    /// By which rule it was chosen.
    pub rule: String,
    /// Its place among all that could go, from 1: the least recently used.
    pub rank: u64,
    /// Bytes of the disk it gave back.
    pub freed_bytes: u64,
    /// When it was last opened, if ever; milliseconds since the Unix epoch.
    pub last_opened_ms: Option<u64>,
    /// Who needed the room, in words.
    pub needed_by: String,
    /// How many bytes were needed.
    pub needed_bytes: u64,
}

impl Volume {
    /// Adds to the history. Durable on return.
    pub fn remember_eviction(&self, eviction: &Eviction) -> Result<(), Error> {
        let path = self.layout.history();
        let line = json_line(eviction);
        let length = look_at(&path)?.map_or(0, |found| found.len());
        if length + line.len() as u64 > MAX_HISTORY_BYTES {
            let kept = self.evictions()?;
            let mut text: Vec<u8> = kept[kept.len() / 2..].iter().flat_map(json_line).collect();
            text.extend_from_slice(&line);
            return self.disk.replace(&self.layout.scratch(Scratch::File), &path, &text, 0o600);
        }
        let file = self.disk.open_or_create(&path)?;
        // A line that a crash cut off has no end: the next one begins on a line of its own, and the torn one is not read.
        let torn = read_small(&path)?.is_some_and(|bytes| !bytes.is_empty() && !bytes.ends_with(b"\n"));
        let line = if torn { [b"\n", line.as_slice()].concat() } else { line };
        self.disk.write_at(&file, &path, &line, length)?;
        self.disk.sync_data(&file, &path)?;
        if length == 0 {
            self.disk.sync_dir(self.layout.root())?;
        }
        Ok(())
    }

    /// What was evicted, oldest first. Lines that cannot be read are left out: they are history, and decide nothing.
    pub fn evictions(&self) -> Result<Vec<Eviction>, Error> {
        let bytes = read_small(&self.layout.history())?.unwrap_or_default();
        Ok(bytes.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn eviction(n: u64) -> Eviction {
        let reference: ModelRef = "hf://o/n@main".parse().unwrap();
        Eviction {
            at_ms: n,
            model: ModelId::new(&reference, "v1"),
            reference,
            version: "v1".into(),
            rule: "least recently used".into(),
            rank: 1,
            freed_bytes: 7,
            last_opened_ms: None,
            needed_by: "a pull".into(),
            needed_bytes: 5,
        }
    }

    #[test]
    fn what_was_evicted_is_remembered_over_restarts_and_torn_lines() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        assert_eq!(volume.evictions().unwrap(), []);
        volume.remember_eviction(&eviction(1)).unwrap();
        drop(volume);
        let path = dir.path().join("history");
        let text = fs::read_to_string(&path).unwrap() + "{\"at_ms\":2,\"mod";
        fs::write(&path, text).unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        volume.remember_eviction(&eviction(3)).unwrap();
        assert_eq!(volume.evictions().unwrap(), [eviction(1), eviction(3)]);
    }

    #[test]
    fn a_long_history_forgets_its_older_half() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        let line = json_line(&eviction(1_000_000));
        let many = MAX_HISTORY_BYTES as usize / line.len();
        let text: Vec<u8> = (0..many as u64).flat_map(|n| json_line(&eviction(1_000_000 + n))).collect();
        fs::write(dir.path().join("history"), text).unwrap();
        volume.remember_eviction(&eviction(9_000_000)).unwrap();
        let left = volume.evictions().unwrap();
        assert_eq!((left.len(), left.last()), (many - many / 2 + 1, Some(&eviction(9_000_000))));
        assert!(fs::metadata(dir.path().join("history")).unwrap().len() < MAX_HISTORY_BYTES);
    }
}

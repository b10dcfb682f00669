//! The reserve: a file whose blocks are given back when the disk is full, because taking a model away writes a little first
//! (the history, the index, a ref of the Hub).

use super::io::{allocated_bytes, look_at};
use super::{Error, Volume};

/// Room that is kept back, in bytes.
const RESERVE_BYTES: u64 = 8 << 20;

/// Least free bytes of a file system on which it is made: it must not be what fills a small disk.
const MIN_FREE_BYTES: u64 = 8 * RESERVE_BYTES;

/// With fewer free bytes than this, a removal begins by giving it back.
const ALMOST_FULL_BYTES: u64 = 1 << 20;

impl Volume {
    /// Makes the reserve, if it is not there and the file system has room and can promise it. A disk that does not is not an
    /// error: the next call tries again.
    pub fn keep_reserve(&self) -> Result<(), Error> {
        let path = self.layout.reserve();
        if look_at(&path)?.is_some_and(|found| found.is_file()) || self.space()?.free_bytes < MIN_FREE_BYTES {
            return Ok(());
        }
        let file = self.disk.create_new(&path)?;
        let made = self.disk.preallocate(&file, &path, RESERVE_BYTES);
        let is_allocated = look_at(&path)?.is_some_and(|found| allocated_bytes(&found) >= RESERVE_BYTES);
        if made.is_err() || !is_allocated {
            // A file that takes no blocks gives none back.
            self.disk.unlink(&path)?;
        }
        Ok(())
    }

    /// Gives the reserve back if the disk is almost full; whether it did.
    pub fn spend_reserve(&self) -> Result<bool, Error> {
        if self.space()?.free_bytes >= ALMOST_FULL_BYTES {
            return Ok(false);
        }
        self.disk.unlink(&self.layout.reserve())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_takes_blocks_and_is_kept_while_there_is_room() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::open(dir.path()).unwrap();
        volume.keep_reserve().unwrap();
        volume.keep_reserve().unwrap();
        let Some(found) = look_at(&dir.path().join("reserve")).unwrap() else {
            println!("skipped: this file system has no room, or cannot promise it");
            return;
        };
        assert!(allocated_bytes(&found) >= RESERVE_BYTES);
        assert!(!volume.spend_reserve().unwrap(), "there is room");
    }
}

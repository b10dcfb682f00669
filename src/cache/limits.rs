//! How much room models may take: what is configured, what that is on this disk, and what is short of it.

use std::time::Duration;

use crate::model::{Bytes, Share, percent_of};
use crate::store::Space;

/// What is left free where kubelet is on the same file system, in hundredths of it. Below 15 % it throws images away, below
/// 10 % it evicts pods.
const MIN_FREE_BESIDE_KUBELET_PERCENT: u8 = 20;
/// What is left free elsewhere, in bytes.
const MIN_FREE_BYTES: u64 = 2_000_000_000;

/// What models may take, and for how long they stay. It can change while larder runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most bytes of the disk that models may take; without it, what the file system has.
    pub quota: Option<Share>,
    /// To how many hundredths of the quota an eviction goes down.
    pub low_water_percent: u8,
    /// What is left free for others.
    pub min_free: MinFree,
    /// A model that came less than this ago is not evicted.
    pub min_residency: Duration,
}

/// How much of the file system is left to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MinFree {
    /// As much.
    Of(Share),
    /// More than kubelet wants free, if it may be on the same file system; else 2 GB.
    Auto,
}

/// How much room there is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Room {
    /// Most bytes that models may take, if that is limited.
    pub(super) quota: Option<Bytes>,
    /// What an eviction goes down to, if the quota is short.
    pub(super) low_water_bytes: u64,
    /// Bytes the file system would still give.
    pub(super) free_bytes: u64,
    /// Bytes of them that are left to others.
    pub(super) min_free_bytes: u64,
    /// A file takes a multiple of this many bytes.
    pub(super) block_bytes: u64,
}

/// What is taken of the room, in bytes of the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Taken {
    /// By blobs, each once.
    pub(super) blob_bytes: u64,
    /// By blobs that have no name any more: they are being removed, or somebody has them open.
    pub(super) going_bytes: u64,
    /// By promises.
    pub(super) reserved_bytes: u64,
    /// The part of the promises that the file system has already given.
    pub(super) written_bytes: u64,
}

/// What is missing for so many more bytes to fit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Short {
    /// So many must go.
    pub(super) need_bytes: u64,
    /// So many should go, if anything does: not every pull then has to evict.
    pub(super) aim_bytes: u64,
    /// Whether the disk is short, and not the quota alone.
    pub(super) of_disk: bool,
}

impl MinFree {
    /// How many bytes that is of a file system with so many in all, which kubelet may be on too.
    pub fn on(self, total_bytes: u64, beside_kubelet: bool) -> u64 {
        let share = match self {
            MinFree::Of(share) => share,
            MinFree::Auto if beside_kubelet => Share::Percent(MIN_FREE_BESIDE_KUBELET_PERCENT),
            MinFree::Auto => Share::Bytes(Bytes(MIN_FREE_BYTES)),
        };
        share.of(total_bytes)
    }
}

impl Limits {
    /// What they are on this disk.
    pub(super) fn on(&self, space: Space, beside_kubelet: bool) -> Room {
        let quota = self.quota.map(|quota| quota.of(space.total_bytes));
        Room {
            quota: quota.map(Bytes),
            low_water_bytes: quota.map_or(u64::MAX, |quota| percent_of(self.low_water_percent, quota)),
            free_bytes: space.free_bytes,
            min_free_bytes: self.min_free.on(space.total_bytes, beside_kubelet),
            block_bytes: space.block_bytes,
        }
    }
}

impl Taken {
    fn all(&self) -> u64 {
        self.blob_bytes + self.going_bytes + self.reserved_bytes
    }

    /// What was promised and is not yet taken from the file system.
    fn promised(&self) -> u64 {
        self.reserved_bytes - self.written_bytes
    }
}

impl Room {
    /// Bytes of the disk that a file of so many bytes takes.
    pub(super) fn on_disk(&self, size: u64) -> u64 {
        size.checked_next_multiple_of(self.block_bytes.max(1)).unwrap_or(u64::MAX)
    }

    /// What the quota still allows, if there is one.
    pub(super) fn left_of_quota(&self, taken: &Taken) -> Option<u64> {
        self.quota.map(|quota| quota.0.saturating_sub(taken.all()))
    }

    /// What the disk can still give, less what is left to others.
    pub(super) fn left_of_disk(&self, taken: &Taken) -> u64 {
        self.free_bytes.saturating_sub(self.min_free_bytes).saturating_sub(taken.promised())
    }

    /// What both of them leave.
    pub(super) fn left(&self, taken: &Taken) -> u64 {
        self.left_of_disk(taken).min(self.left_of_quota(taken).unwrap_or(u64::MAX))
    }

    /// What is missing for `want_bytes` more.
    pub(super) fn short_of(&self, want_bytes: u64, taken: &Taken) -> Short {
        let above = |limit: u64| taken.all().saturating_add(want_bytes).saturating_sub(limit);
        let quota = self.quota.map_or(0, |quota| above(quota.0));
        let wanted_free = want_bytes.saturating_add(taken.promised()).saturating_add(self.min_free_bytes);
        let disk = wanted_free.saturating_sub(self.free_bytes);
        let need_bytes = quota.max(disk);
        let aim_bytes = if quota > 0 { need_bytes.max(above(self.low_water_bytes)) } else { need_bytes };
        Short { need_bytes, aim_bytes, of_disk: disk > quota }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPACE: Space = Space { total_bytes: 1000, free_bytes: 300, block_bytes: 10 };

    fn limits(quota: Option<Share>, min_free: MinFree) -> Limits {
        Limits { quota, low_water_percent: 90, min_free, min_residency: Duration::ZERO }
    }

    #[test]
    fn what_is_configured_becomes_bytes_of_this_disk() {
        let room = limits(Some(Share::Percent(50)), MinFree::Of(Share::Percent(20))).on(SPACE, false);
        let expected = Room {
            quota: Some(Bytes(500)),
            low_water_bytes: 450,
            free_bytes: 300,
            min_free_bytes: 200,
            block_bytes: 10,
        };
        assert_eq!(room, expected);
        assert_eq!((room.on_disk(0), room.on_disk(1), room.on_disk(10), room.on_disk(11)), (0, 10, 10, 20));
        assert_eq!(limits(None, MinFree::Auto).on(SPACE, false).min_free_bytes, MIN_FREE_BYTES);
        assert_eq!(limits(None, MinFree::Auto).on(SPACE, true).min_free_bytes, 200);
    }

    #[test]
    fn promises_and_what_readers_keep_open_count_and_nothing_counts_twice() {
        let room = limits(Some(Share::Bytes(Bytes(500))), MinFree::Of(Share::Bytes(Bytes(100)))).on(SPACE, false);
        let taken = Taken { blob_bytes: 200, going_bytes: 50, reserved_bytes: 100, written_bytes: 40 };
        assert_eq!(room.left_of_quota(&taken), Some(150));
        assert_eq!(room.left_of_disk(&taken), 140, "40 of the 100 are gone from it already");
        assert_eq!(room.left(&taken), 140);
    }

    #[test]
    fn a_short_quota_is_brought_below_the_low_water_mark_and_a_short_disk_to_what_is_needed() {
        let room =
            |quota| limits(Some(Share::Bytes(Bytes(quota))), MinFree::Of(Share::Bytes(Bytes(100)))).on(SPACE, false);
        let taken = Taken { blob_bytes: 400, ..Taken::default() };
        let short = |quota, want| room(quota).short_of(want, &taken);
        assert_eq!(short(500, 100), Short::default());
        assert_eq!(short(500, 110), Short { need_bytes: 10, aim_bytes: 60, of_disk: false });
        assert_eq!(short(10_000, 230), Short { need_bytes: 30, aim_bytes: 30, of_disk: true });
        // The quota was lowered below what is taken.
        assert_eq!(short(300, 0), Short { need_bytes: 100, aim_bytes: 130, of_disk: false });
    }
}

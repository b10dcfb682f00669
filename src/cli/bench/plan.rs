//! How large the measured model is: as asked, or as the disk and the memory of this node allow. Pure.

use super::content::Shape;
use crate::model::Bytes;

/// Files of the model.
pub(super) const SHARDS: u64 = 4;
/// Shards of the model of which one is changed.
pub(super) const REVISED_SHARDS: u64 = 10;
/// The least that says anything, when less than what was asked for has to do.
pub(super) const LEAST_BYTES: u64 = 64_000_000;
/// What a volume takes beside its models, and a file system beside its files.
const SLACK_BYTES: u64 = 64_000_000;

/// What there is of what the measurement takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Room {
    /// Of the disk, and more than what is left to others.
    pub(super) disk_bytes: u64,
    /// Of memory, for the page cache; `None` where the kernel does not tell.
    pub(super) memory_bytes: Option<u64>,
}

/// What is measured with.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// The model.
    pub(super) model: Shape,
    /// A quarter of it, for what does not become truer with more bytes.
    pub(super) small: Shape,
    /// As large as that, in the shards of which one is changed.
    pub(super) revised: Shape,
    /// Why it is smaller than asked.
    pub(super) notes: Vec<String>,
}

impl Plan {
    /// For a model of so many bytes. At no time is more than one on the disk, except two of the small one. `None`
    /// if too little fits.
    pub(super) fn new(asked_bytes: u64, room: Room) -> Option<Plan> {
        let mut notes = Vec::new();
        let on_disk = room.disk_bytes.saturating_sub(SLACK_BYTES);
        let mut bytes = asked_bytes;
        if on_disk < bytes {
            bytes = on_disk;
            notes.push(shortened(
                asked_bytes,
                bytes,
                &format!("only {} of the disk may be taken", Bytes(room.disk_bytes)),
            ));
        }
        if let Some(memory) = room.memory_bytes.filter(|memory| *memory < bytes) {
            bytes = memory;
            notes.push(shortened(asked_bytes, bytes, &format!("only {} of memory may be filled", Bytes(memory))));
        }
        (bytes >= asked_bytes.min(LEAST_BYTES)).then(|| Plan {
            model: Shape::of(bytes, SHARDS),
            small: Shape::of(bytes / 4, SHARDS),
            revised: Shape::of(bytes / 4, REVISED_SHARDS),
            notes,
        })
    }
}

fn shortened(asked: u64, bytes: u64, why: &str) -> String {
    format!("measured with {} instead of {}: {why}", Bytes(bytes), Bytes(asked))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    fn plan(disk_bytes: u64, memory_bytes: Option<u64>) -> Option<Plan> {
        Plan::new(4 * GB, Room { disk_bytes, memory_bytes })
    }

    #[test]
    fn what_fits_is_as_large_as_asked() {
        let plan = plan(100 * GB, Some(16 * GB)).unwrap();
        assert_eq!((plan.model, plan.notes), (Shape::of(4 * GB, 4), vec![]));
        assert_eq!((plan.small.shards, plan.revised.shards), (4, 10));
    }

    #[test]
    fn what_does_not_fit_is_smaller_and_says_so() {
        let short = plan(2 * GB, Some(GB)).unwrap();
        assert!(short.model.bytes() <= GB && short.model.bytes() > GB - 100_000);
        assert!(short.notes[0].contains("1.9 GB instead of 4.0 GB: only 2.0 GB of the disk"), "{:?}", short.notes);
        assert!(short.notes[1].contains("only 1.0 GB of memory"), "{:?}", short.notes);
        assert_eq!(plan(4 * GB + SLACK_BYTES, None).unwrap().notes, [] as [String; 0]);
    }

    #[test]
    fn too_little_is_refused_unless_so_little_was_asked_for() {
        assert_eq!(plan(SLACK_BYTES + LEAST_BYTES - 1, None), None);
        assert!(Plan::new(1_000_000, Room { disk_bytes: SLACK_BYTES + 1_000_000, memory_bytes: None }).is_some());
        assert_eq!(Plan::new(1_000_000, Room { disk_bytes: SLACK_BYTES, memory_bytes: None }), None);
    }
}

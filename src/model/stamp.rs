//! [`Stamp`]: how an inode looked when its bytes were last known to be right.

use std::fmt;
use std::str::FromStr;

/// What the file system says of an inode. While it says the same, nobody has changed the bytes since: no call sets ctime,
/// and every write, truncation, change of mode, owner, times or attributes, link and unlink moves it. An exchange of blocks
/// does not; it moves the place.
///
/// Without the number of the device, which may be another after a reboot: all stamps are of one volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The number of the inode.
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// When the bytes changed; nanoseconds since the Unix epoch.
    pub mtime_ns: i128,
    /// When anything of the inode changed; nanoseconds since the Unix epoch.
    pub ctime_ns: i128,
    /// Where on the disk the bytes are, as a number; 0 where blocks cannot be exchanged.
    pub place: u64,
}

impl Stamp {
    /// The same but for ctime: what a link or an unlink leaves of a stamp.
    pub fn differs_by_ctime_at_most(&self, other: &Stamp) -> bool {
        *self == Stamp { ctime_ns: self.ctime_ns, ..*other }
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Stamp { inode, size, mtime_ns, ctime_ns, place } = self;
        write!(f, "{inode} {size} {mtime_ns} {ctime_ns} {place}")
    }
}

impl FromStr for Stamp {
    type Err = ();

    fn from_str(text: &str) -> Result<Stamp, ()> {
        let mut words = text.split(' ');
        let mut word = || words.next().ok_or(());
        let stamp = Stamp {
            inode: word()?.parse().map_err(drop)?,
            size: word()?.parse().map_err(drop)?,
            mtime_ns: word()?.parse().map_err(drop)?,
            ctime_ns: word()?.parse().map_err(drop)?,
            place: word()?.parse().map_err(drop)?,
        };
        words.next().is_none().then_some(stamp).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stamp_reads_as_it_was_written() {
        let stamp =
            Stamp { inode: 7, size: u64::MAX, mtime_ns: -1, ctime_ns: i128::from(i64::MAX) * 1_000_000_000, place: 5 };
        assert_eq!(stamp.to_string().parse(), Ok(stamp));
        for other in ["", "1 2 3 4", "1 2 3 4 5 6", "1 2 3 4 x", "-1 2 3 4 5"] {
            assert_eq!(other.parse::<Stamp>(), Err(()), "{other}");
        }
    }

    #[test]
    fn only_ctime_may_differ_after_a_link() {
        let stamp = Stamp { inode: 1, size: 2, mtime_ns: 3, ctime_ns: 4, place: 5 };
        assert!(stamp.differs_by_ctime_at_most(&Stamp { ctime_ns: 5, ..stamp }));
        assert!(!stamp.differs_by_ctime_at_most(&Stamp { mtime_ns: 9, ..stamp }));
        assert!(!stamp.differs_by_ctime_at_most(&Stamp { place: 9, ..stamp }));
    }
}

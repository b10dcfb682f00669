//! [`Bytes`] and [`Share`]: numbers of bytes, as people write and read them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes. Reads `140GB`, `64MiB`, `1024`; prints `160.2 GB` (decimal units, as disks are sold).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        bytesize::ByteSize(self.0).display().si().fmt(f)
    }
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Bytes, String> {
        text.trim()
            .parse::<bytesize::ByteSize>()
            .map(|size| Bytes(size.0))
            .map_err(|_| format!("`{text}` is not a size; write a number and a unit, such as `140GB` or `64MiB`"))
    }
}

/// A number of bytes, or a part of what a disk has. Reads `140GB` and `80%`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Share {
    /// As many.
    Bytes(Bytes),
    /// So many hundredths; 100 at most.
    Percent(u8),
}

impl Share {
    /// How many bytes it is of so many.
    pub fn of(self, total_bytes: u64) -> u64 {
        match self {
            Share::Bytes(bytes) => bytes.0,
            Share::Percent(percent) => percent_of(percent, total_bytes),
        }
    }
}

/// So many hundredths of a number of bytes, rounded down.
pub fn percent_of(percent: u8, bytes: u64) -> u64 {
    u64::try_from(u128::from(bytes) * u128::from(percent) / 100).unwrap_or(u64::MAX)
}

impl FromStr for Share {
    type Err = String;

    fn from_str(text: &str) -> Result<Share, String> {
        match text.trim().strip_suffix('%') {
            None => text.parse().map(Share::Bytes),
            Some(number) => match number.trim_end().parse() {
                Ok(percent @ 0..=100) => Ok(Share::Percent(percent)),
                _ => Err(format!("`{text}` is not a percentage from 0% to 100%")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_and_print_as_people_do() {
        assert_eq!("140GB".parse(), Ok(Bytes(140_000_000_000)));
        assert_eq!("64MiB".parse(), Ok(Bytes(64 << 20)));
        assert_eq!("1024".parse(), Ok(Bytes(1024)));
        assert!("lots".parse::<Bytes>().is_err());
        assert!("-1".parse::<Bytes>().is_err());
        assert_eq!(Bytes(160_200_000_000).to_string(), "160.2 GB");
        assert_eq!(Bytes(0).to_string(), "0 B");
    }

    #[test]
    fn a_share_is_a_size_or_a_percentage() {
        assert_eq!("140GB".parse(), Ok(Share::Bytes(Bytes(140_000_000_000))));
        assert_eq!(" 80 % ".parse(), Ok(Share::Percent(80)));
        for wrong in ["101%", "-1%", "%", "1.5%", "lots"] {
            assert!(wrong.parse::<Share>().is_err(), "{wrong}");
        }
        assert_eq!((Share::Percent(80).of(1000), Share::Bytes(Bytes(7)).of(1000)), (800, 7));
        assert_eq!(Share::Percent(100).of(u64::MAX), u64::MAX);
    }
}

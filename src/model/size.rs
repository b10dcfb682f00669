//! [`Bytes`]: a number of bytes, as people write and read it.

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
}

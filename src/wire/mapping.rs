//! [`Map`]: the bytes of a file that was handed out, read through the page cache without a copy. The only `unsafe`.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Deref;

use memmap2::Mmap;

/// A whole file of a model, mapped shared and read-only. It stays valid when its model, its connection and the daemon are
/// gone.
///
/// An error of the disk while a page is read is a `SIGBUS`, as with every map of a file.
pub struct Map(Option<Mmap>);

impl Map {
    /// Maps all of a file that the daemon handed out; an empty one is an empty slice.
    #[allow(unsafe_code)]
    pub(crate) fn of(file: &File) -> io::Result<Map> {
        if file.metadata()?.len() == 0 {
            // mmap(2) refuses a length of zero.
            return Ok(Map(None));
        }
        // SAFETY: `Mmap` needs a file that nobody changes or shortens while it is mapped.
        // - Who may call: only this crate, and it maps nothing but descriptors that a daemon handed out. They are blobs.
        // - We never change or shorten a blob: it gets its name after its last byte was written and verified, and from then
        //   on `store` only links and unlinks it. An unlinked inode keeps its bytes while it is mapped.
        // - Others cannot through what they are given: the blob has mode 0444 and the descriptor is read-only, so neither
        //   it nor a map of it can be written. Where the daemon opens blobs through its private read-only mount, opening
        //   the descriptor once more for writing is refused too, even to root.
        // - What is left: a process that has root's rights over the volume itself, or the raw disk, can write the inode
        //   behind our back. Then the bytes of this slice change under their reader, or, cut short, end in a SIGBUS. That
        //   is so for every program that maps a file; no check here could exclude it, so it is a condition on the node.
        // - The length is the file's at the moment of mapping, which `memmap2` asks for itself.
        let map = unsafe { Mmap::map(file)? };
        Ok(Map(Some(map)))
    }
}

impl Deref for Map {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0.as_deref().unwrap_or_default()
    }
}

impl AsRef<[u8]> for Map {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl fmt::Debug for Map {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Map").field("bytes", &self.len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    #[test]
    fn a_map_is_the_file_and_outlives_it() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"every byte").unwrap();
        // Where the file stands does not matter.
        file.rewind().unwrap();
        let map = Map::of(&file).unwrap();
        drop(file);
        assert_eq!(&*map, b"every byte");
    }

    #[test]
    fn an_empty_file_is_an_empty_slice() {
        let map = Map::of(&tempfile::tempfile().unwrap()).unwrap();
        assert_eq!(map.as_ref(), b"");
    }
}

//! [`RangeReader`]: what a source gives of a file.

use futures::StreamExt;
use futures::stream::BoxStream;

use super::*;

/// The bytes of one range, in order, and nothing but them.
#[async_trait]
pub trait RangeReader: Send {
    /// Receives the next bytes into the front of `into`, which is not empty: how many, and 0 after the last of the range.
    /// After an error there is nothing more. Nothing is lost if it is dropped while it waits.
    async fn read(&mut self, into: &mut [u8]) -> Result<usize, Error>;
}

/// Reads what comes in pieces that somebody else has made.
pub(super) struct Pieces {
    coming: BoxStream<'static, Result<Bytes, Error>>,
    /// Of the last one, what was not read yet.
    rest: Bytes,
}

impl Pieces {
    pub(super) fn of(pieces: impl Stream<Item = Result<Bytes, Error>> + Send + 'static) -> Box<dyn RangeReader> {
        Box::new(Pieces { coming: pieces.boxed(), rest: Bytes::new() })
    }
}

#[async_trait]
impl RangeReader for Pieces {
    async fn read(&mut self, into: &mut [u8]) -> Result<usize, Error> {
        while self.rest.is_empty() {
            match self.coming.next().await.transpose()? {
                Some(piece) => self.rest = piece,
                None => return Ok(0),
            }
        }
        let taken = self.rest.split_to(self.rest.len().min(into.len()));
        into[..taken.len()].copy_from_slice(&taken);
        Ok(taken.len())
    }
}

/// All that comes.
#[cfg(test)]
pub(super) async fn collect(mut reader: Box<dyn RangeReader>) -> Result<Vec<u8>, Error> {
    let (mut all, mut block) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        match reader.read(&mut block).await? {
            0 => return Ok(all),
            came => all.extend_from_slice(&block[..came]),
        }
    }
}

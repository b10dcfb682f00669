//! [`Line`]: one connection as bytes. Frames come in and go out within a time limit each, and that the other side is gone
//! is noticed whatever we wait for.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::wire::frame::{BadFrame, Decoder, MAX_REQUEST_BYTES, send_with_descriptors};

/// Longest time for the first request, and for the rest of one that has begun.
const REQUEST_SECONDS: u64 = 30;

/// Longest time in which not one byte of an answer is taken.
const STALL_SECONDS: u64 = 10;

/// Most bytes that are read at once.
pub(super) const READ_BYTES: usize = 4096;

/// One connection.
pub(super) struct Line {
    stream: UnixStream,
    decoder: Decoder,
    /// Bytes after the end of a frame.
    unread: Vec<u8>,
    /// How many of the bytes that were given to us the socket still has. They are taken from it when the answer is out: taking
    /// them makes room in the socket, for which the kernel wakes whoever waits on the other side for something else.
    untaken: usize,
    /// When the request that is under way must be whole.
    due: Option<Instant>,
}

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum Over {
    /// The other side has ended: on purpose, or because its process is gone.
    #[error("the other side has ended")]
    Gone,
    /// What came is not a frame.
    #[error(transparent)]
    Bad(#[from] BadFrame),
    /// A request came before the answer to the last one.
    #[error("a request came before the answer to the last one")]
    OutOfTurn,
    /// The request took too long.
    #[error("no whole request came within {REQUEST_SECONDS} s")]
    Late,
    /// Nobody reads what we say.
    #[error("nothing was read for {STALL_SECONDS} s")]
    Stalled,
    /// The daemon shuts down.
    #[error("the daemon is shutting down")]
    Draining,
    /// The system's words.
    #[error(transparent)]
    Broken(#[from] io::Error),
}

impl Line {
    /// On which these bytes were seen, and not taken.
    pub(super) fn new(stream: UnixStream, seen: Vec<u8>) -> Line {
        let due = Some(Instant::now() + Duration::from_secs(REQUEST_SECONDS));
        Line { stream, decoder: Decoder::new(MAX_REQUEST_BYTES), untaken: seen.len(), unread: seen, due }
    }

    /// What is at the other end, in words.
    pub(super) fn process(&self) -> String {
        match self.stream.peer_cred() {
            Ok(peer) => process_in_words(peer.pid(), peer.uid()),
            Err(_) => "an unknown process".to_owned(),
        }
    }

    /// The JSON of the next request. Between two of them a client may take as long as it likes.
    pub(super) async fn request(&mut self) -> Result<Vec<u8>, Over> {
        loop {
            let mut bytes = self.unread.as_slice();
            let json = self.decoder.take(&mut bytes)?;
            let taken = self.unread.len() - bytes.len();
            self.unread.drain(..taken);
            if let Some(json) = json {
                self.due = None;
                return Ok(json);
            }
            if self.due.is_none() && !self.decoder.is_between_frames() {
                self.due = Some(Instant::now() + Duration::from_secs(REQUEST_SECONDS));
            }
            let due = self.due;
            let read = self.read();
            match due {
                Some(due) => tokio::time::timeout_at(due, read).await.map_err(|_| Over::Late)??,
                None => read.await?,
            }
        }
    }

    /// Ends when the other side does, or when it speaks although it is not its turn.
    pub(super) async fn interruption(&mut self) -> Over {
        while self.unread.is_empty() {
            if let Err(over) = self.read().await {
                return over;
            }
        }
        Over::OutOfTurn
    }

    async fn read(&mut self) -> Result<(), Over> {
        self.take_seen();
        let Line { stream, unread, .. } = self;
        stream.readable().await?;
        let mut buffer = [0; READ_BYTES];
        match stream.try_read(&mut buffer) {
            Ok(0) => Err(Over::Gone),
            Ok(read) => {
                unread.extend_from_slice(&buffer[..read]);
                Ok(())
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => Err(Over::Gone),
            Err(e) => Err(e.into()),
        }
    }

    /// Takes from the socket what was only looked at.
    fn take_seen(&mut self) {
        while self.untaken > 0 {
            let mut buffer = [0; READ_BYTES];
            let most = self.untaken.min(buffer.len());
            // They are there. If not, the connection is broken, and whoever uses it next is told so.
            let taken = recv(&self.stream, &mut buffer[..most], RecvFlags::empty()).map_or(0, |(_, taken)| taken);
            self.untaken = if taken == 0 { 0 } else { self.untaken - taken };
        }
    }

    /// Waits until some bytes would be taken.
    pub(super) async fn writable(&self) -> Result<(), Over> {
        let writable = tokio::time::timeout(Duration::from_secs(STALL_SECONDS), self.stream.writable());
        Ok(writable.await.map_err(|_| Over::Stalled)??)
    }

    /// Sends all bytes.
    pub(super) async fn send(&self, mut bytes: &[u8]) -> Result<(), Over> {
        while !bytes.is_empty() {
            self.writable().await?;
            match self.stream.try_write(bytes) {
                Ok(sent) => bytes = &bytes[sent..],
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                Err(e) if e.kind() == ErrorKind::BrokenPipe => return Err(Over::Gone),
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// Sends the last that is said on this connection. What has come and was not read goes unread: closing on it would
    /// reset the connection, and some clients would not see what was said.
    pub(super) async fn finish(self, bytes: &[u8]) -> Result<(), Over> {
        self.send(bytes).await?;
        let mut buffer = [0; READ_BYTES];
        for _ in 0..MAX_REQUEST_BYTES.div_ceil(READ_BYTES) {
            if !self.stream.try_read(&mut buffer).is_ok_and(|read| read > 0) {
                break;
            }
        }
        Ok(())
    }

    /// Sends as many bytes as are taken now, and the files with the first of them.
    pub(super) fn try_send_files(&self, bytes: &[u8], files: &[File]) -> io::Result<usize> {
        let descriptors: Vec<BorrowedFd<'_>> = files.iter().map(|file| file.as_fd()).collect();
        self.stream.try_io(Interest::WRITABLE, || send_with_descriptors(self.stream.as_fd(), bytes, &descriptors))
    }
}

impl Drop for Line {
    /// Closing a socket that has bytes would look like a connection that broke.
    fn drop(&mut self) {
        self.take_seen();
    }
}

/// The kernel gives the number 0 for a process that has none where we are.
fn process_in_words(pid: Option<i32>, uid: u32) -> String {
    match pid {
        Some(pid) if pid > 0 => format!("process {pid} of user {uid}"),
        _ => format!("a process of user {uid} in another pid namespace"),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::super::spoken;
    use super::*;

    #[test]
    fn a_process_without_a_number_here_is_not_process_0() {
        assert_eq!(process_in_words(Some(7), 1000), "process 7 of user 1000");
        assert_eq!(process_in_words(Some(0), 0), "a process of user 0 in another pid namespace");
    }

    fn pair() -> (Line, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Line::new(ours, Vec::new()), theirs)
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_asks_nothing_is_closed_after_a_while() {
        let (mut line, mut theirs) = pair();
        assert!(matches!(line.request().await, Err(Over::Late)));
        let (mut slow, mut other) = pair();
        theirs.write_all(&[0, 0]).await.unwrap();
        other.write_all(&[0, 0, 0, 9, b'{']).await.unwrap();
        assert!(matches!(slow.request().await, Err(Over::Late)));
    }

    #[tokio::test(start_paused = true)]
    async fn between_two_requests_there_is_no_hurry() {
        let (mut line, mut theirs) = pair();
        theirs.write_all(&[0, 0, 0, 2, b'{', b'}']).await.unwrap();
        assert_eq!(line.request().await.unwrap(), b"{}");
        let wait = tokio::time::timeout(Duration::from_secs(REQUEST_SECONDS * 100), line.request());
        assert!(wait.await.is_err(), "it is still listened to");
        theirs.write_all(&[0]).await.unwrap();
        assert!(matches!(line.request().await, Err(Over::Late)), "but one that has begun must come");
    }

    async fn seen(bytes: &[u8]) -> (Line, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(bytes).await.unwrap();
        let (_, seen) = spoken(&ours).await.unwrap();
        (Line::new(ours, seen), theirs)
    }

    #[tokio::test]
    async fn what_was_seen_is_read_once_and_what_follows_is_not_lost() {
        let (mut line, mut theirs) = seen(b"\0\0\0\x02{}\0\0").await;
        assert_eq!(line.request().await.unwrap(), b"{}");
        theirs.write_all(b"\0\x02[]").await.unwrap();
        assert_eq!(line.request().await.unwrap(), b"[]");
    }

    #[tokio::test]
    async fn a_connection_that_ends_before_what_was_seen_is_taken_ends_and_does_not_break() {
        let (line, mut theirs) = seen(b"\0\0\0\x02{}").await;
        line.send(b"answer").await.unwrap();
        drop(line);
        let mut answer = Vec::new();
        theirs.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer");
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_that_stalls_is_given_up() {
        let (line, theirs) = pair();
        assert!(matches!(line.send(&vec![0; 16 << 20]).await, Err(Over::Stalled)));
        drop(theirs);
        assert!(matches!(line.send(&[0]).await, Err(Over::Gone)));
    }

    #[tokio::test]
    async fn the_end_of_the_other_side_is_noticed_while_something_else_is_awaited() {
        let (mut line, theirs) = pair();
        drop(theirs);
        assert!(matches!(line.interruption().await, Over::Gone));
        let (mut line, mut theirs) = pair();
        theirs.write_all(&[0]).await.unwrap();
        assert!(matches!(line.interruption().await, Over::OutOfTurn));
    }
}

//! The floor of an open: a process that does nothing but hand out descriptors, and clients that know as little.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::part::{cannot, say};
use crate::fault::Problem;
use crate::wire::frame::{self, Decoder, MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, OpenFiles, Request};
use crate::wire::frame::{receive_with_descriptors, send_with_descriptors};
use crate::wire::mapping::Map;

/// Bytes that are received at once.
const RECEIVE_BYTES: usize = 16 * 1024;
/// Longest time without an answer.
const SILENCE: Duration = Duration::from_secs(60);

/// The process itself: it answers one client after the other, until its standard input ends.
pub(super) fn run(socket: &Path, files: &[PathBuf]) -> io::Result<()> {
    let files = files.iter().map(File::open).collect::<io::Result<Vec<File>>>()?;
    let listener = UnixListener::bind(socket)?;
    std::thread::spawn(move || {
        let descriptors: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut byte = [0];
            // A client that goes away gets nothing, and harms nobody.
            let _ = stream
                .read_exact(&mut byte)
                .and_then(|()| send_with_descriptors(stream.as_fd(), &byte, &descriptors).map(drop));
        }
    });
    say(&())?;
    io::copy(&mut io::stdin(), &mut io::sink()).map(drop)
}

/// Connects, and receives descriptors from that process.
pub(super) fn fetch_bare(socket: &Path) -> io::Result<Opened> {
    let mut stream = UnixStream::connect(socket)?;
    stream.write_all(&[0])?;
    let (mut byte, mut came) = ([0], VecDeque::new());
    receive_with_descriptors(stream.as_fd(), &mut byte, &mut came)?;
    Ok(Opened { _connection: stream, descriptors: came.into() })
}

/// A client of the daemon that only counts frames.
pub(super) struct BareClient {
    socket: PathBuf,
    request: Vec<u8>,
}

/// Descriptors in hand, and the connection that is the lease.
pub(super) struct Opened {
    _connection: UnixStream,
    descriptors: Vec<OwnedFd>,
}

impl Opened {
    pub(super) fn count(&self) -> usize {
        self.descriptors.len()
    }

    /// Maps each file, and touches its first byte.
    pub(super) fn touch(self) -> io::Result<()> {
        for descriptor in self.descriptors {
            let map = Map::of(&File::from(descriptor))?;
            std::hint::black_box(map.first().copied());
        }
        Ok(())
    }
}

impl BareClient {
    /// Of a model that is local.
    pub(super) fn new(socket: &Path, reference: &str) -> BareClient {
        let open = OpenFiles { descriptors: true, ..OpenFiles::of(reference) };
        let request = frame::encode(&Request::Open(Box::new(open)), MAX_REQUEST_BYTES).expect("a short request");
        BareClient { socket: socket.to_owned(), request }
    }

    /// Connects, asks, and receives the frame that says what is open and the one with `files` descriptors.
    pub(super) fn open(&self, files: usize) -> Result<Opened, Problem> {
        let opened = self.receive().map_err(|e| cannot(&format!("an open was not answered: {e}")))?;
        match opened.count() {
            count if count == files => Ok(opened),
            count => Err(cannot(&format!("an open was answered with {count} descriptors instead of {files}"))),
        }
    }

    fn receive(&self) -> io::Result<Opened> {
        let mut stream = UnixStream::connect(&self.socket)?;
        // A refusal is one frame, and then nothing comes.
        stream.set_read_timeout(Some(SILENCE))?;
        stream.write_all(&self.request)?;
        let (mut buffer, mut came) = ([0; RECEIVE_BYTES], VecDeque::new());
        let (mut decoder, mut frames) = (Decoder::new(MAX_ANSWER_BYTES), 0);
        while frames < 2 {
            let mut bytes = match receive_with_descriptors(stream.as_fd(), &mut buffer, &mut came)? {
                0 => break,
                received => &buffer[..received],
            };
            while decoder.take(&mut bytes).map_err(io::Error::other)?.is_some() {
                frames += 1;
            }
        }
        Ok(Opened { _connection: stream, descriptors: came.into() })
    }
}

//! Frames of the socket door: what is said, how it is cut into bytes, and how descriptors travel with it.
//! `docs/protocol.md` has it for whoever writes another client.
//!
//! A frame is its length, four bytes, the highest first, and as many bytes of JSON. Since no frame has 16 MiB, its first
//! byte is zero, with which no HTTP request begins: so one socket can answer both.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::http::{LeaseInfo, LeaseTerms, ModelFile, ModelInfo, ProblemBody, PullStatus};
use crate::model::RelPath;

/// The protocol these frames are of.
pub const PROTOCOL: u32 = 1;

/// Largest request, in bytes of JSON.
pub const MAX_REQUEST_BYTES: usize = 64 * 1024;

/// Largest answer, in bytes of JSON.
pub const MAX_ANSWER_BYTES: usize = 1024 * 1024;

/// Most files of one batch, and so most descriptors of one message. The kernel takes 253 (SCM_MAX_FD), but all of them
/// are open here and in the receiver at once, and a process that was started with a limit of 256 must be able to take one.
pub const MAX_BATCH_FILES: usize = 64;

/// A batch fits into an answer, whatever its names: JSON writes one byte as at most six.
const _: () = assert!(MAX_BATCH_FILES * (6 * RelPath::MAX_BYTES + 256) < MAX_ANSWER_BYTES);

const HEADER_BYTES: usize = 4;

/// What a client says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Opens a model, or one file of it.
    Open(Box<OpenFiles>),
    /// Asks for the next batch of files.
    More {},
    /// Ends a lease before the connection ends.
    Release {
        /// Its id.
        lease: String,
    },
}

/// Which model is opened, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenFiles {
    /// [`PROTOCOL`]
    pub protocol: u32,
    /// What to open.
    pub reference: String,
    /// Patterns of files, as in the pull.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// Patterns of files, as in the pull.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Only this version, not what the reference means now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// Only this file of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Pull it if it is not local, and wait for that.
    #[serde(default)]
    pub wait: bool,
    /// Hand out descriptors of the files; without them, their names alone.
    #[serde(default)]
    pub descriptors: bool,
    /// Start to bring the model into the page cache.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub warm: bool,
    /// Take a lease that outlives the connection, beside the connection's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseTerms>,
}

impl OpenFiles {
    /// The names of the files of what the reference says, if it is local.
    pub fn of(reference: impl ToString) -> OpenFiles {
        OpenFiles {
            protocol: PROTOCOL,
            reference: reference.to_string(),
            include: Vec::new(),
            exclude: Vec::new(),
            version: None,
            file: None,
            wait: false,
            descriptors: false,
            warm: false,
            lease: None,
        }
    }
}

/// What the daemon says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Answer {
    /// The model is being pulled.
    Progress {
        /// Where that stands.
        pull: Box<PullStatus>,
    },
    /// The model is open; its files follow.
    Opened(Box<OpenedFiles>),
    /// A batch of files.
    Files {
        /// The files.
        files: Vec<ModelFile>,
        /// How many descriptors came with the first byte of this frame, or of the [`Answer::Opened`] it was sent with: as
        /// many as files, in their order, or none.
        descriptors: usize,
    },
    /// A lease has ended.
    Released {
        /// The lease.
        lease: Box<LeaseInfo>,
    },
    /// The request is not granted.
    Error {
        /// Why, and what to do. Not spread into the frame: its `type` is another one.
        problem: Box<ProblemBody>,
    },
}

/// A model that is open on a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenedFiles {
    /// The version.
    pub model: ModelInfo,
    /// Its directory, relative to the one that readers mount.
    pub path_below_public: String,
    /// How many files will follow.
    pub files: u64,
    /// Bytes of those files.
    pub bytes: u64,
    /// The lease of the connection on this version.
    pub lease: LeaseInfo,
    /// The lease that outlives the connection, if one was asked for.
    pub lasting_lease: Option<LeaseInfo>,
    /// What keeps descriptors from being a way to write: `read-only-mount` or `modes`.
    pub descriptors: String,
}

/// Why bytes are not a frame, or a frame not what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadFrame {
    /// No JSON has no bytes.
    #[error("cannot read a frame: its length is 0")]
    Empty,
    /// Longer than what may be sent this way.
    #[error("cannot read a frame: its length is {length} bytes, more than {most}")]
    TooLong {
        /// What its head says.
        length: u32,
        /// The limit.
        most: usize,
    },
    /// Not the JSON of a message.
    #[error("cannot read a frame: {found}")]
    Unreadable {
        /// What was found, and where.
        found: String,
    },
    /// The descriptors that were announced did not come.
    #[error("cannot read a frame: it announces {announced} descriptors for {files} files, and {came} came")]
    Descriptors {
        /// What the frame says.
        announced: usize,
        /// Files of the frame.
        files: usize,
        /// What has come.
        came: usize,
    },
}

/// A message as a frame. `None` if it is longer than `most` bytes.
pub fn encode(message: &impl Serialize, most: usize) -> Option<Vec<u8>> {
    // Enough for most messages, so that it need not grow.
    let mut bytes = Vec::with_capacity(1024);
    bytes.extend([0; HEADER_BYTES]);
    // Strings, numbers and lists: they always serialise.
    serde_json::to_writer(&mut bytes, message).ok()?;
    let length = bytes.len() - HEADER_BYTES;
    bytes[..HEADER_BYTES].copy_from_slice(&u32::try_from(length).ok()?.to_be_bytes());
    (length <= most).then_some(bytes)
}

/// A frame's JSON as a message.
pub fn decode<T: DeserializeOwned>(json: &[u8]) -> Result<T, BadFrame> {
    // Serde would take a list of the values too.
    if json.trim_ascii_start().starts_with(b"[") {
        return Err(BadFrame::Unreadable { found: "it is a list, not an object".into() });
    }
    serde_json::from_slice(json).map_err(|e| BadFrame::Unreadable { found: e.to_string() })
}

/// Puts frames together from bytes, however those are cut. Holds one frame at most, and takes memory only for bytes that
/// have come: a head that promises much costs nothing.
#[derive(Debug)]
pub struct Decoder {
    most: usize,
    head: [u8; HEADER_BYTES],
    head_bytes: usize,
    json: Vec<u8>,
}

impl Decoder {
    /// For frames of at most `most` bytes of JSON.
    pub fn new(most: usize) -> Decoder {
        Decoder { most, head: [0; HEADER_BYTES], head_bytes: 0, json: Vec::new() }
    }

    /// Takes from the front of `bytes` what belongs to one frame; its JSON when it is whole. `None`: all was taken, and it
    /// is not whole yet. After an error nothing that follows can be a frame.
    pub fn take(&mut self, bytes: &mut &[u8]) -> Result<Option<Vec<u8>>, BadFrame> {
        let head = split(bytes, HEADER_BYTES - self.head_bytes);
        self.head[self.head_bytes..][..head.len()].copy_from_slice(head);
        self.head_bytes += head.len();
        if self.head_bytes < HEADER_BYTES {
            return Ok(None);
        }
        let length = u32::from_be_bytes(self.head);
        if length == 0 {
            return Err(BadFrame::Empty);
        }
        if length as usize > self.most {
            return Err(BadFrame::TooLong { length, most: self.most });
        }
        let length = length as usize;
        let json = split(bytes, length - self.json.len());
        if self.json.capacity() - self.json.len() < json.len() {
            // Doubled, as a vector grows, but never beyond the frame.
            let room = (self.json.len() + json.len()).max(2 * self.json.capacity()).min(length);
            self.json.reserve_exact(room - self.json.len());
        }
        self.json.extend_from_slice(json);
        if self.json.len() < length {
            return Ok(None);
        }
        self.head_bytes = 0;
        Ok(Some(std::mem::take(&mut self.json)))
    }

    /// Whether it stands between two frames.
    pub fn is_between_frames(&self) -> bool {
        self.head_bytes == 0
    }
}

/// Takes the first `most` bytes, or all if there are fewer.
fn split<'a>(bytes: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (front, rest) = bytes.split_at(most.min(bytes.len()));
    *bytes = rest;
    front
}

/// Sends as many bytes as the socket takes now, and with the first of them the descriptors. They have been sent if one
/// byte was; what is left is sent without them.
pub fn send_with_descriptors(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_BATCH_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "more descriptors than one message takes"));
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

/// Receives bytes, and puts behind `descriptors` those that came with them, closed on exec. No bytes: the other side has
/// ended. The bytes may end one frame and begin the next, so descriptors belong to frames in the order of both.
pub fn receive_with_descriptors(
    socket: BorrowedFd<'_>,
    buffer: &mut [u8],
    descriptors: &mut VecDeque<OwnedFd>,
) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_BATCH_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket.as_fd(), &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = message {
            descriptors.extend(came);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        // The kernel has closed those it could not give us: our limit, most likely.
        return Err(io::Error::other("descriptors were lost: too many are open in this process"));
    }
    Ok(received.bytes)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn open() -> OpenFiles {
        OpenFiles {
            protocol: PROTOCOL,
            reference: "hf://org/name@main".into(),
            include: vec!["*.json".into()],
            exclude: Vec::new(),
            version: None,
            file: Some("config.json".into()),
            wait: true,
            descriptors: true,
            warm: false,
            lease: None,
        }
    }

    fn frame(json: &str) -> Vec<u8> {
        [&(json.len() as u32).to_be_bytes(), json.as_bytes()].concat()
    }

    fn decoded(mut bytes: &[u8]) -> Result<Option<Vec<u8>>, BadFrame> {
        Decoder::new(MAX_REQUEST_BYTES).take(&mut bytes)
    }

    #[test]
    fn frames_are_put_together_however_they_are_cut() {
        let requests = [Request::Open(Box::new(open())), Request::More {}, Request::Release { lease: "0f".into() }];
        let stream: Vec<u8> = requests.iter().flat_map(|r| encode(r, MAX_REQUEST_BYTES).unwrap()).collect();
        for size in 1..=stream.len() {
            let mut decoder = Decoder::new(MAX_REQUEST_BYTES);
            let mut found = Vec::new();
            for mut piece in stream.chunks(size) {
                while let Some(json) = decoder.take(&mut piece).unwrap() {
                    found.push(decode::<Request>(&json).unwrap());
                }
                assert!(piece.is_empty(), "what is not a frame yet is kept");
            }
            assert_eq!(found, requests, "in pieces of {size}");
            assert!(decoder.is_between_frames());
        }
    }

    #[test]
    fn a_frame_begins_as_no_http_request_does() {
        let longest = encode(&"x".repeat(MAX_ANSWER_BYTES - 2), MAX_ANSWER_BYTES).unwrap();
        assert_eq!((longest.len(), longest[0]), (HEADER_BYTES + MAX_ANSWER_BYTES, 0));
        assert_eq!(encode(&"x".repeat(MAX_ANSWER_BYTES - 1), MAX_ANSWER_BYTES), None);
    }

    #[test]
    fn a_length_is_not_believed_before_its_bytes_have_come() {
        assert_eq!(decoded(&[0, 0, 0, 0]), Err(BadFrame::Empty));
        let most = MAX_REQUEST_BYTES;
        for length in [most as u32 + 1, u32::MAX] {
            assert_eq!(decoded(&length.to_be_bytes()), Err(BadFrame::TooLong { length, most }));
        }
        let mut decoder = Decoder::new(most);
        let mut first = [&(most as u32).to_be_bytes()[..], b"{"].concat();
        assert_eq!(decoder.take(&mut &first[..]), Ok(None));
        assert!(decoder.json.capacity() < 64, "{}", decoder.json.capacity());
        first = vec![b' '; most - 1];
        for piece in first.chunks(1000) {
            assert!(decoder.json.capacity() <= most);
            decoder.take(&mut &piece[..]).unwrap();
        }
        assert!(decoder.is_between_frames());
    }

    #[test]
    fn what_is_not_a_request_is_said() {
        for (json, says) in [
            ("{", "EOF while parsing"),
            ("\u{1}", "expected value at line 1 column 1"),
            (r#"["more"]"#, "it is a list"),
            ("{}", "missing field `type`"),
            (r#"{"type":"remove"}"#, "unknown variant `remove`, expected one of `open`, `more`, `release`"),
            (r#"{"type":"open","protocol":1}"#, "missing field `reference`"),
            (r#"{"type":"open","protocol":1,"reference":"m","wiat":true}"#, "unknown field `wiat`"),
            (r#"{"type":"more","now":true}"#, "unknown field `now`"),
            (r#"{"type":"release","lease":"x","force":true}"#, "unknown field `force`"),
            (r#"{"type":"more"} {}"#, "trailing characters"),
        ] {
            let json = decoded(&frame(json)).unwrap().unwrap();
            let error = decode::<Request>(&json).unwrap_err().to_string();
            assert!(error.starts_with("cannot read a frame: ") && error.contains(says), "{error}");
        }
    }

    #[test]
    fn an_answer_may_say_more_than_its_reader_knows() {
        let json = r#"{"type":"files","files":[],"descriptors":0,"later":1}"#;
        assert_eq!(decode::<Answer>(json.as_bytes()), Ok(Answer::Files { files: Vec::new(), descriptors: 0 }));
    }

    #[test]
    fn descriptors_arrive_with_their_frames_closed_on_exec() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let files: Vec<File> = (0..MAX_BATCH_FILES).map(|_| tempfile::tempfile().unwrap()).collect();
        let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(|file| file.as_fd()).collect();
        assert_eq!(send_with_descriptors(ours.as_fd(), b"ab", &borrowed[..1]).unwrap(), 2);
        assert_eq!(send_with_descriptors(ours.as_fd(), b"c", &[]).unwrap(), 1);
        assert_eq!(send_with_descriptors(ours.as_fd(), b"d", &borrowed).unwrap(), 1);
        drop(ours);

        let (mut bytes, mut came, mut buffer) = (Vec::new(), VecDeque::new(), [0; 16]);
        loop {
            match receive_with_descriptors(theirs.as_fd(), &mut buffer, &mut came).unwrap() {
                0 => break,
                received => bytes.extend_from_slice(&buffer[..received]),
            }
        }
        assert_eq!((bytes.as_slice(), came.len()), (b"abcd".as_slice(), 1 + MAX_BATCH_FILES));
        let inode = |fd: &OwnedFd| rustix::fs::fstat(fd).unwrap().st_ino;
        let expected = std::iter::once(&files[0]).chain(&files);
        for (file, came) in expected.zip(&came) {
            assert_eq!(inode(&file.try_clone().unwrap().into()), inode(came), "in the order they were sent");
            assert!(rustix::io::fcntl_getfd(came).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        }
    }

    #[test]
    fn more_descriptors_than_a_batch_has_are_not_sent_or_lost_in_silence() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        // The space is rounded up by the header's alignment, so one more might fit.
        let many = vec![file.as_fd(); MAX_BATCH_FILES + 4];
        assert_eq!(send_with_descriptors(ours.as_fd(), b"a", &many).unwrap_err().kind(), io::ErrorKind::InvalidInput);

        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_BATCH_FILES + 4))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&many)));
        sendmsg(&ours, &[IoSlice::new(b"a")], &mut control, SendFlags::NOSIGNAL).unwrap();
        let error = receive_with_descriptors(theirs.as_fd(), &mut [0; 16], &mut VecDeque::new()).unwrap_err();
        assert!(error.to_string().starts_with("descriptors were lost"), "{error}");
    }
}

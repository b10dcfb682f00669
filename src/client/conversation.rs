//! [`Conversation`]: what is said to open a model, apart from how its bytes are carried. It takes bytes and descriptors, and
//! says what to do next.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::OwnedFd;

use crate::fault::{Code, Problem};
use crate::model::MAX_LISTED_FILES;
use crate::wire::frame::{
    self, Answer, BadFrame, Decoder, MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, OpenFiles, OpenedFiles, Request,
};
use crate::wire::http::{ModelFile, PullStatus};

/// One open, from its request to its last file.
pub(super) struct Conversation {
    decoder: Decoder,
    descriptors: bool,
    opened: Option<OpenedFiles>,
    files: Vec<(ModelFile, File)>,
}

/// What to do next.
#[derive(Debug)]
pub(super) enum Step {
    /// Receive more.
    Receive,
    /// Send this, and go on.
    Send(Vec<u8>),
    /// Show this, and go on.
    Show(Box<PullStatus>),
    /// That was all.
    Done(Box<Delivered>),
}

/// A model that was opened.
#[derive(Debug)]
pub(super) struct Delivered {
    pub(super) opened: OpenedFiles,
    /// Sorted by path. Empty when no descriptors were asked for.
    pub(super) files: Vec<(ModelFile, File)>,
}

impl Conversation {
    /// With what is to be sent first.
    pub(super) fn new(asked: &OpenFiles) -> Result<(Conversation, Vec<u8>), Problem> {
        let conversation = Conversation {
            decoder: Decoder::new(MAX_ANSWER_BYTES),
            descriptors: asked.descriptors,
            opened: None,
            files: Vec::new(),
        };
        let first = frame::encode(&Request::Open(Box::new(asked.clone())), MAX_REQUEST_BYTES).ok_or_else(|| {
            Problem::new(
                Code::BadRequest,
                format!("cannot ask for the model: the request is longer than {MAX_REQUEST_BYTES} bytes"),
                "shorten the reference or its patterns",
            )
        })?;
        Ok((conversation, first))
    }

    /// Takes from the front of `bytes`, and from the front of `came` the descriptors that belong to them.
    pub(super) fn step(&mut self, bytes: &mut &[u8], came: &mut VecDeque<OwnedFd>) -> Result<Step, Problem> {
        let json = self.decoder.take(bytes).map_err(strange)?;
        let Some(json) = json else { return Ok(Step::Receive) };
        match frame::decode::<Answer>(&json).map_err(strange)? {
            Answer::Progress { pull } => Ok(Step::Show(pull)),
            Answer::Error(problem) => Err(Problem::from(&*problem)),
            Answer::Opened(opened) if self.opened.is_none() && opened.files <= MAX_LISTED_FILES as u64 => {
                self.opened = Some(*opened);
                // Who wants no descriptors wants only the lease; the names that follow are not waited for.
                Ok(if self.descriptors { self.next(false) } else { self.done() })
            }
            Answer::Files { files, descriptors } if self.opened.is_some() => {
                if descriptors != files.len() || came.len() < descriptors {
                    let (announced, files, came) = (descriptors, files.len(), came.len());
                    return Err(strange(BadFrame::Descriptors { announced, files, came }));
                }
                self.files.extend(files.into_iter().zip(came.drain(..descriptors).map(File::from)));
                Ok(self.next(true))
            }
            _ => Err(strange(BadFrame::Unreadable { found: "it is not an answer to what was asked".into() })),
        }
    }

    /// After `opened` the first batch comes by itself; the others are asked for, one by one.
    fn next(&mut self, ask: bool) -> Step {
        let expected = self.opened.as_ref().map_or(0, |opened| opened.files);
        if self.files.len() as u64 >= expected {
            return self.done();
        }
        match ask.then(|| frame::encode(&Request::More {}, MAX_REQUEST_BYTES)).flatten() {
            Some(more) => Step::Send(more),
            None => Step::Receive,
        }
    }

    fn done(&mut self) -> Step {
        match self.opened.take() {
            Some(opened) => Step::Done(Box::new(Delivered { opened, files: std::mem::take(&mut self.files) })),
            None => Step::Receive,
        }
    }
}

/// What answers is no larder, or one of another version.
fn strange(found: BadFrame) -> Problem {
    Problem::new(
        Code::InternalError,
        format!("cannot understand the daemon: {found}"),
        "check that a larder of this version listens on the socket (`larder --version`)",
    )
}

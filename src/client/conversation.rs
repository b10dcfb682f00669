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
    /// Receive more: all bytes have been taken.
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
        loop {
            let Some(json) = self.decoder.take(bytes).map_err(strange)? else { return Ok(Step::Receive) };
            let answer = frame::decode(&json).map_err(strange)?;
            if let Some(step) = self.take(answer, came)? {
                return Ok(step);
            }
        }
    }

    /// What to do after an answer; `None`: look at the next one.
    fn take(&mut self, answer: Answer, came: &mut VecDeque<OwnedFd>) -> Result<Option<Step>, Problem> {
        match answer {
            Answer::Progress { pull } => Ok(Some(Step::Show(pull))),
            Answer::Error { problem } => Err(Problem::from(&*problem)),
            Answer::Opened(opened) if self.opened.is_none() && opened.files <= MAX_LISTED_FILES as u64 => {
                // Who wants no descriptors wants only the lease: the names that follow are not waited for.
                let is_all = opened.files == 0 || !self.descriptors;
                self.opened = Some(*opened);
                // The first batch comes by itself.
                Ok(if is_all { self.done() } else { None })
            }
            Answer::Files { files, descriptors } if self.opened.is_some() => {
                if descriptors != files.len() || came.len() < descriptors {
                    let (announced, files, came) = (descriptors, files.len(), came.len());
                    return Err(strange(BadFrame::Descriptors { announced, files, came }));
                }
                self.files.extend(files.into_iter().zip(came.drain(..descriptors).map(File::from)));
                let expected = self.opened.as_ref().map_or(0, |opened| opened.files);
                if self.files.len() as u64 >= expected {
                    return Ok(self.done());
                }
                Ok(frame::encode(&Request::More {}, MAX_REQUEST_BYTES).map(Step::Send))
            }
            _ => Err(strange(BadFrame::Unreadable { found: "it is not an answer to what was asked".into() })),
        }
    }

    fn done(&mut self) -> Option<Step> {
        let opened = self.opened.take()?;
        Some(Step::Done(Box::new(Delivered { opened, files: std::mem::take(&mut self.files) })))
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::wire::frame::PROTOCOL;

    fn asked(descriptors: bool) -> OpenFiles {
        serde_json::from_value(json!({"protocol": PROTOCOL, "reference": "m", "descriptors": descriptors})).unwrap()
    }

    fn opened(files: u64) -> Vec<u8> {
        let lease = json!({"id": "l", "model": "i", "reference": "m", "version": "v", "kind": "connection", "holder": "h",
            "since": "s", "expires_at": null});
        let model = json!({"id": "i", "reference": "m", "version": "v", "manifest": "d", "current": true, "path": "/p",
            "bytes": 1, "files": files, "confirmed_at": "c", "opened_at": null, "pinned": false, "leases": 1,
            "resident_bytes": null});
        said(json!({"type": "opened", "model": model, "path_below_public": "p", "files": files, "bytes": 1,
            "lease": lease, "lasting_lease": null, "descriptors": "modes"}))
    }

    fn files(names: &[&str]) -> Vec<u8> {
        let files: Vec<_> = names.iter().map(|name| json!({"path": name, "digest": "d", "size": 0})).collect();
        said(json!({"type": "files", "descriptors": files.len(), "files": files}))
    }

    fn said(answer: serde_json::Value) -> Vec<u8> {
        frame::encode(&answer, MAX_ANSWER_BYTES).unwrap()
    }

    fn descriptors(count: usize) -> VecDeque<OwnedFd> {
        (0..count).map(|_| tempfile::tempfile().unwrap().into()).collect()
    }

    /// Frames and descriptors arrive however the kernel cuts them.
    #[test]
    fn files_find_their_descriptors_however_the_bytes_are_cut() {
        let stream = [opened(3), files(&["a", "b"]), files(&["c"])].concat();
        for size in 1..=stream.len() {
            let (mut conversation, _) = Conversation::new(&asked(true)).unwrap();
            let mut came = descriptors(3);
            let (mut sent, mut done) = (0, None);
            for mut piece in stream.chunks(size) {
                loop {
                    match conversation.step(&mut piece, &mut came).unwrap() {
                        Step::Receive => break assert!(piece.is_empty()),
                        Step::Send(_) => sent += 1,
                        Step::Show(pull) => panic!("{pull:?}"),
                        Step::Done(delivered) => break done = Some(delivered),
                    }
                }
            }
            let delivered = done.expect("all files have come");
            let names: Vec<_> = delivered.files.iter().map(|(file, _)| file.path.as_str()).collect();
            assert_eq!((names, sent, came.len()), (vec!["a", "b", "c"], 1, 0), "in pieces of {size}");
        }
    }

    #[test]
    fn a_lease_alone_is_taken_without_its_files() {
        let (mut conversation, _) = Conversation::new(&asked(false)).unwrap();
        let step = conversation.step(&mut &opened(3)[..], &mut VecDeque::new()).unwrap();
        assert!(matches!(step, Step::Done(delivered) if delivered.files.is_empty()));
    }

    #[test]
    fn an_answer_that_does_not_fit_is_not_believed() {
        let mut too_many = descriptors(1);
        for (stream, says) in [
            (files(&["a"]), "it is not an answer to what was asked"),
            ([opened(1), opened(1)].concat(), "it is not an answer to what was asked"),
            (opened(MAX_LISTED_FILES as u64 + 1), "it is not an answer to what was asked"),
            ([opened(2), files(&["a", "b"])].concat(), "it announces 2 descriptors for 2 files, and 1 came"),
            (said(json!({"type": "later"})), "unknown variant `later`"),
            (b"HTTP/1.1 200 OK".to_vec(), "its length is 1213486160 bytes"),
        ] {
            let (mut conversation, _) = Conversation::new(&asked(true)).unwrap();
            let error = conversation.step(&mut &stream[..], &mut too_many).unwrap_err();
            assert!(
                error.message.starts_with("cannot understand the daemon: ") && error.message.contains(says),
                "{error}"
            );
        }
    }
}

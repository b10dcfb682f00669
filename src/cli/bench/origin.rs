//! The origin that models are pulled from: a web server of its own process, so that what it takes of the processor is not
//! counted as larder's, and fast enough not to be what is measured. It sends pages of memory without copying them.
//!
//! It serves one model twice: `/plain/`, whose listing has no checksums, and `/checked/`, whose listing has them. On its
//! standard input it is asked what it has sent; it ends when that ends.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, RwLock};
use std::time::{Duration, Instant};

use rustix::fs::sendfile;
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::content::{Content, Piece, Shape};
use super::part::{Helper, Part, say};
use crate::fault::Problem;

/// Bytes that are sent and counted at a time.
const STEP_BYTES: u64 = 1 << 20;
/// The same of an origin that is slow on purpose.
const SLOW_STEP_BYTES: u64 = 64 << 10;
/// Longest head of a request.
const MAX_HEAD_BYTES: u64 = 16 << 10;

/// How slow it is on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pace {
    /// Before the first byte of each answer.
    pub(super) latency: Duration,
    /// On each connection.
    pub(super) bytes_per_second: u64,
}

/// What the origin has sent so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sent {
    pub(super) requests: u64,
    /// Bytes of shards.
    pub(super) body_bytes: u64,
    /// When the last of them went: [`now`].
    pub(super) last_at: Duration,
}

/// What it is asked, one to a line.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Question {
    /// What have you sent?
    Sent,
    /// The same, when so many bytes of shards have gone.
    SentAtLeast(u64),
    /// The same, after changing one shard.
    Revise,
}

/// The time since some moment that is the same for all processes.
pub(super) fn now() -> Duration {
    let now = clock_gettime(ClockId::Monotonic);
    Duration::new(now.tv_sec.unsigned_abs(), u32::try_from(now.tv_nsec).unwrap_or(0))
}

/// An origin that runs.
pub(super) struct Origin {
    helper: Helper,
    port: u16,
    pub(super) shape: Shape,
}

impl Origin {
    /// Starts one, and waits until it has generated its model.
    pub(super) async fn start(shape: Shape, pace: Option<Pace>) -> Result<Origin, Problem> {
        let mut helper = Helper::start(&Part::Origin { shape, pace })?;
        let port = helper.heard().await?;
        Ok(Origin { helper, port, shape })
    }

    /// Where the model without checksums is.
    pub(super) fn plain(&self) -> String {
        format!("http://127.0.0.1:{}/plain/", self.port)
    }

    /// Where the same model with checksums is.
    pub(super) fn checked(&self) -> String {
        format!("http://127.0.0.1:{}/checked/", self.port)
    }

    pub(super) async fn sent(&mut self) -> Result<Sent, Problem> {
        self.helper.ask(&Question::Sent).await
    }

    /// Waits until so many bytes of shards have gone.
    pub(super) async fn sent_at_least(&mut self, bytes: u64) -> Result<Sent, Problem> {
        self.helper.ask(&Question::SentAtLeast(bytes)).await
    }

    /// Changes one shard.
    pub(super) async fn revise(&mut self) -> Result<Sent, Problem> {
        self.helper.ask(&Question::Revise).await
    }
}

/// What the connections share.
struct State {
    content: RwLock<Content>,
    pace: Option<Pace>,
    sent: Mutex<Sent>,
    more: Condvar,
}

/// The process itself.
pub(super) fn run(shape: Shape, pace: Option<Pace>) -> io::Result<()> {
    let content = RwLock::new(Content::generate(shape)?);
    let state = Arc::new(State { content, pace, sent: Mutex::default(), more: Condvar::new() });
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    say(&listener.local_addr()?.port())?;
    let accepting = state.clone();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let state = accepting.clone();
            // A client that goes away ends its connection, and nothing else.
            std::thread::spawn(move || state.answer_all(&stream));
        }
    });
    for line in io::stdin().lines() {
        say(&state.reply(serde_json::from_str(&line?)?)?)?;
    }
    Ok(())
}

/// What a client wants.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    head_only: bool,
    path: String,
    /// `Range: bytes=…`, as it stands there.
    range: Option<String>,
}

impl State {
    fn reply(&self, question: Question) -> io::Result<Sent> {
        let least = match question {
            Question::Sent => 0,
            Question::SentAtLeast(least) => least,
            Question::Revise => {
                self.content.write().expect("nobody panics with it").revise()?;
                0
            }
        };
        let sent = self.sent.lock().expect("nobody panics with it");
        Ok(*self.more.wait_while(sent, |sent| sent.body_bytes < least).expect("nobody panics with it"))
    }

    fn answer_all(&self, stream: &TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut reader = BufReader::new(stream);
        while let Some(asked) = read_request(&mut reader)? {
            self.sent.lock().expect("nobody panics with it").requests += 1;
            if let Some(pace) = self.pace {
                wait_until(Instant::now() + pace.latency);
            }
            self.answer(stream, &asked)?;
        }
        Ok(())
    }

    fn answer(&self, mut stream: &TcpStream, asked: &Asked) -> io::Result<()> {
        let content = self.content.read().expect("nobody panics with it");
        let (directory, name) = asked.path.trim_start_matches('/').split_once('/').unwrap_or_default();
        if name == "larder.json" {
            let body = content.listing(directory == "checked");
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len());
            let body = if asked.head_only { "" } else { &body };
            return stream.write_all(format!("{head}{body}").as_bytes());
        }
        let Some(shard) = (0..content.shape.shards).find(|shard| content.shape.name(*shard) == name) else {
            return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
        };
        let size = content.shape.shard_bytes;
        let range = asked.range.as_deref().and_then(|range| parse_range(range, size));
        let (status, asked_for) = match &range {
            Some(range) => ("206 Partial Content", range.clone()),
            None => ("200 OK", 0..size),
        };
        let content_range = range.map_or_else(String::new, |range| {
            format!("Content-Range: bytes {}-{}/{size}\r\n", range.start, range.end - 1)
        });
        let length = asked_for.end - asked_for.start;
        let etag = content.etag(shard);
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {length}\r\nETag: {etag}\r\nAccept-Ranges: bytes\r\n{content_range}\r\n"
        );
        stream.write_all(head.as_bytes())?;
        if asked.head_only { Ok(()) } else { self.send(stream, &content, shard, asked_for) }
    }

    fn send(&self, mut stream: &TcpStream, content: &Content, shard: u64, range: Range<u64>) -> io::Result<()> {
        let step = if self.pace.is_some() { SLOW_STEP_BYTES } else { STEP_BYTES };
        let (began, mut at) = (Instant::now(), range.start);
        while at < range.end {
            let went = match content.piece(shard, at, range.end.min(at + step)) {
                Piece::Head { at, length } => {
                    stream.write_all(&content.head(shard)[at as usize..][..length as usize])?;
                    length
                }
                Piece::Pool { mut at, length } => {
                    let length = usize::try_from(length).unwrap_or(usize::MAX);
                    match sendfile(stream, content.pool(), Some(&mut at), length) {
                        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                        Ok(went) => went as u64,
                        Err(Errno::INTR) => 0,
                        Err(error) => return Err(error.into()),
                    }
                }
            };
            at += went;
            let mut sent = self.sent.lock().expect("nobody panics with it");
            sent.body_bytes += went;
            sent.last_at = now();
            drop(sent);
            self.more.notify_all();
            if let Some(pace) = self.pace {
                let due = (at - range.start) as f64 / pace.bytes_per_second as f64;
                wait_until(began + Duration::from_secs_f64(due));
            }
        }
        Ok(())
    }
}

/// `None`: the client has ended.
fn read_request(reader: &mut impl BufRead) -> io::Result<Option<Asked>> {
    let (mut asked, mut head, mut line) = (Asked::default(), reader.take(MAX_HEAD_BYTES), String::new());
    if head.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split_whitespace();
    asked.head_only = words.next() == Some("HEAD");
    asked.path = words.next().unwrap_or_default().to_owned();
    loop {
        line.clear();
        if head.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let Some((name, value)) = line.split_once(':') else { return Ok(Some(asked)) };
        if name.eq_ignore_ascii_case("range") {
            asked.range = Some(value.trim().to_owned());
        }
    }
}

/// `bytes=FIRST-LAST` and `bytes=FIRST-` of a file of `size` bytes.
fn parse_range(text: &str, size: u64) -> Option<Range<u64>> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let first: u64 = first.parse().ok()?;
    let end = if last.is_empty() { size } else { last.parse::<u64>().ok()?.checked_add(1)?.min(size) };
    (first < end).then_some(first..end)
}

/// This is what being slow is: nothing is waited for.
fn wait_until(moment: Instant) {
    while let Some(left) = moment.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
        std::thread::park_timeout(left);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_and_the_next_one_left() {
        let mut bytes =
            "GET /plain/x HTTP/1.1\r\nHost: a:1\r\nRANGE: bytes=5-9\r\n\r\nHEAD /y HTTP/1.1\r\n\r\n".as_bytes();
        let first = Asked { head_only: false, path: "/plain/x".into(), range: Some("bytes=5-9".into()) };
        assert_eq!(read_request(&mut bytes).unwrap(), Some(first));
        assert_eq!(read_request(&mut bytes).unwrap(), Some(Asked { head_only: true, path: "/y".into(), range: None }));
        assert_eq!(read_request(&mut bytes).unwrap(), None);
        assert!(read_request(&mut "GET / HTTP/1.1\r\nHost: a".as_bytes()).is_err());
    }

    #[test]
    fn ranges_are_of_the_file() {
        assert_eq!(parse_range("bytes=5-9", 100), Some(5..10));
        assert_eq!(parse_range("bytes=5-", 100), Some(5..100));
        assert_eq!(parse_range("bytes=5-900", 100), Some(5..100));
        assert_eq!(
            (parse_range("bytes=100-", 100), parse_range("bytes=-5", 100), parse_range("lines=1-2", 9)),
            (None, None, None)
        );
    }
}

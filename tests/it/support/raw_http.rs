//! Just enough HTTP/1.1 to answer by hand, rightly or wrongly.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// A connection whose requests are read and answered by hand.
pub(crate) struct Connection {
    stream: BufReader<TcpStream>,
    activity: Arc<AtomicU64>,
}

/// A request without a body.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    pub(crate) headers: Vec<(String, String)>,
}

impl Connection {
    pub(crate) fn new(stream: TcpStream) -> Connection {
        Connection::counted(stream, Arc::default())
    }

    /// The same; counts whatever happens on it.
    pub(crate) fn counted(stream: TcpStream, activity: Arc<AtomicU64>) -> Connection {
        // A body that waits for the acknowledgement of its head looks like a stall.
        stream.set_nodelay(true).expect("a connected socket takes TCP_NODELAY");
        Connection { stream: BufReader::new(stream), activity }
    }

    /// The next request; `None` when the client is gone.
    pub(crate) async fn next(&mut self) -> Option<Asked> {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line).await.ok()? == 0 {
                return None;
            }
            self.activity.fetch_add(1, Ordering::SeqCst);
            match line.trim_end() {
                "" => break,
                text => lines.push(text.to_owned()),
            }
        }
        let mut first = lines.first()?.split(' ').map(str::to_owned);
        let (method, path) = (first.next()?, first.next()?);
        let headers = lines[1..].iter().filter_map(|line| line.split_once(':'));
        let headers = headers.map(|(k, v)| (k.trim().to_ascii_lowercase(), v.trim().to_owned())).collect();
        Some(Asked { method, path, headers })
    }

    /// Writes bytes as they are. False when the client is gone.
    pub(crate) async fn write(&mut self, bytes: impl AsRef<[u8]>) -> bool {
        for piece in bytes.as_ref().chunks(16 * 1024) {
            self.activity.fetch_add(1, Ordering::SeqCst);
            if self.stream.get_mut().write_all(piece).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Writes an answer with its Content-Length. False when the client is gone.
    pub(crate) async fn answer(&mut self, asked: &Asked, answer: Answer) -> bool {
        let head = answer.head(answer.body.len());
        self.write(head).await && (asked.method == "HEAD" || self.write(&answer.body).await)
    }

    /// Sends nothing more and waits until the client gives up.
    pub(crate) async fn stall(&mut self) {
        let mut ignored = [0; 1024];
        while self.stream.read(&mut ignored).await.is_ok_and(|read| read > 0) {}
    }

    /// Closes with a reset in place of an orderly end.
    pub(crate) fn reset(self) {
        self.stream.get_ref().set_zero_linger().expect("a connected socket takes SO_LINGER");
    }
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// `Range: bytes=a-b`, within `size`; `Err` if it begins behind the end.
    pub(crate) fn range(&self, size: usize) -> Result<Option<Range<usize>>, ()> {
        let Some((first, last)) =
            self.header("range").and_then(|r| r.strip_prefix("bytes=")).and_then(|r| r.split_once('-'))
        else {
            return Ok(None);
        };
        let first: usize = first.parse().map_err(|_| ())?;
        let end = last.parse::<usize>().map_or(size, |last| size.min(last + 1));
        if first < end { Ok(Some(first..end)) } else { Err(()) }
    }
}

/// A whole answer.
#[derive(Debug, Clone)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn new(status: u16, headers: &[(&str, &str)], body: impl Into<Vec<u8>>) -> Answer {
        let headers = headers.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        Answer { status, headers, body: body.into() }
    }

    /// A file as a server should give it: HEAD, one range, If-Match.
    pub(crate) fn file(asked: &Asked, bytes: &[u8], etag: &str) -> Answer {
        if asked.header("if-match").is_some_and(|wanted| wanted != etag) {
            return Answer::new(412, &[("ETag", etag)], "");
        }
        let total = bytes.len();
        match asked.range(total) {
            Ok(None) => Answer::new(200, &[("ETag", etag)], bytes),
            Ok(Some(range)) => {
                let content_range = format!("bytes {}-{}/{total}", range.start, range.end - 1);
                Answer::new(206, &[("ETag", etag), ("Content-Range", &content_range)], &bytes[range])
            }
            Err(()) => Answer::new(416, &[("Content-Range", &format!("bytes */{total}"))], ""),
        }
    }

    /// The head, with a Content-Length that may lie.
    pub(crate) fn head(&self, length: usize) -> String {
        let mut head = self.head_without_length();
        head.insert_str(head.len() - 2, &format!("Content-Length: {length}\r\n"));
        head
    }

    pub(crate) fn head_without_length(&self) -> String {
        let headers: String = self.headers.iter().map(|(k, v)| format!("{k}: {v}\r\n")).collect();
        format!("HTTP/1.1 {} Status\r\n{headers}\r\n", self.status)
    }
}

/// SHA-256 in hexadecimal digits: what files are marked with, and what listings claim of them.
pub(crate) fn sha256(bytes: &[u8]) -> String {
    hex::encode(aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes))
}

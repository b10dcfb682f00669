//! Requests whose bodies are received into the memory of who reads them.
//!
//! An HTTP library receives into buffers of its own, and each byte is copied out of them: a quarter of the processor's time
//! of a whole pull. So hyper reads only the head of an answer here, from which [`HeadFirst`] keeps the body away, and is asked
//! for the connection back. A body without a length in its head (it is chunked, or ends with the connection) goes through
//! hyper. What goes through a proxy is for the ordinary client.

use std::collections::HashMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, Weak};
use std::task::{Context, Poll, ready};
use std::time::Instant;

use futures::FutureExt;
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::rt::{Read, ReadBuf, ReadBufCursor, Write};
use hyper_rustls::{HttpsConnector, MaybeHttpsStream};
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioIo;
use reqwest::Version;
use reqwest::header::HeaderName;
use rustls::ClientConfig;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::CertificateDer;
use rustls_platform_verifier::Verifier;
use tokio::net::TcpStream;
use tokio::time::sleep;
use tower_service::Service;

use super::*;

/// Whatever a connection can fail with; names no URL.
pub(in crate::source) type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Connector = HttpsConnector<HttpConnector>;

/// A connection to a source, with or without TLS.
type Line = MaybeHttpsStream<TokioIo<TcpStream>>;

/// Read at a time until the head of an answer has ended, in bytes: what is read of the body with it is copied.
const HEAD_READ_BYTES: usize = 4096;

/// Sends GETs. Its connections are its own.
pub(in crate::source) struct DirectClient {
    connect_timeout: Duration,
    /// Whom to believe besides those that the system believes.
    extra_roots: Vec<CertificateDer<'static>>,
    proxies: Arc<Matcher>,
    /// Made when first needed: to load the certificates takes longer than to list the models.
    connector: OnceLock<Connector>,
    idle: Arc<Idle>,
}

/// What came: a head, and its body one way or the other.
pub(in crate::source) enum Answer {
    /// The body is still in the connection.
    Direct(hyper::Response<Box<DirectBody>>),
    /// The body comes through hyper.
    Through(hyper::Response<Incoming>),
}

impl DirectClient {
    /// Nothing is connected yet.
    pub(in crate::source) fn new(
        connect_timeout: Duration,
        extra_roots: Vec<CertificateDer<'static>>,
        proxies: Arc<Matcher>,
    ) -> DirectClient {
        DirectClient { connect_timeout, extra_roots, proxies, connector: OnceLock::new(), idle: Arc::default() }
    }

    /// Whether a request there goes there directly, not through a proxy.
    pub(in crate::source) fn reaches(&self, uri: &hyper::Uri) -> bool {
        self.proxies.intercept(uri).is_none()
    }

    /// Sends a GET. Waits as long as the head of the answer takes.
    pub(in crate::source) async fn get(&self, uri: &hyper::Uri, headers: &HeaderMap) -> Result<Answer, BoxError> {
        let request = request(uri, headers)?;
        let place = format!("{}://{}", uri.scheme_str().unwrap_or_default(), request.headers()[header::HOST].to_str()?);
        while let Some(line) = self.idle.take(&place) {
            // The server may have closed it while the request was on its way: then another one is asked.
            if let Ok(answer) = self.exchange(line, request.clone(), &place).await {
                return Ok(answer);
            }
        }
        let connected = timeout(self.connect_timeout, self.connector()?.call(uri.clone())).await;
        let line = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        self.exchange(line, request, &place).await
    }

    fn connector(&self) -> Result<Connector, BoxError> {
        if let Some(connector) = self.connector.get() {
            return Ok(connector.clone());
        }
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = Verifier::new_with_extra_roots(self.extra_roots.clone(), provider.clone())?;
        let mut tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"http/1.1".to_vec()];
        let mut tcp = HttpConnector::new();
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(self.connect_timeout));
        tcp.enforce_http(false);
        // Who was faster made the one that all share.
        Ok(self.connector.get_or_init(|| (tcp, tls).into()).clone())
    }

    async fn exchange(&self, line: Line, request: hyper::Request<String>, place: &str) -> Result<Answer, BoxError> {
        let through = Arc::new(AtomicBool::new(false));
        let (mut sender, mut connection) = http1::handshake(HeadFirst::new(line, through.clone())).await?;
        let answer = sender.send_request(request);
        tokio::pin!(answer);
        let answer = tokio::select! {
            answer = &mut answer => answer?,
            // Then the answer is there, or says why there is none.
            _ = &mut connection => answer.await?,
        };
        let length = answer.body().size_hint().exact();
        let is_of_bytes = matches!(answer.status(), StatusCode::OK | StatusCode::PARTIAL_CONTENT);
        if !is_of_bytes || length.is_none() {
            through.store(true, Ordering::Release);
            // It ends with the body, or when nobody wants that.
            tokio::spawn(connection);
            return Ok(Answer::Through(answer));
        }
        let (head, _) = answer.into_parts();
        let parts = connection.into_parts();
        let mut ahead = parts.read_buf.to_vec();
        ahead.extend_from_slice(parts.io.kept());
        let stays = head.version == Version::HTTP_11 && !closes(&head.headers);
        let back = stays.then(|| (Arc::downgrade(&self.idle), place.to_owned()));
        let left = length.unwrap_or_default();
        let body = DirectBody { line: Some(parts.io.line), ahead, left, back };
        Ok(Answer::Direct(hyper::Response::from_parts(head, Box::new(body))))
    }
}

/// As it goes over the wire: to a path, with the host in a header.
fn request(uri: &hyper::Uri, headers: &HeaderMap) -> Result<hyper::Request<String>, BoxError> {
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let mut request = hyper::Request::builder().uri(path).body(String::new())?;
    let mut to = headers.clone();
    let mut unless_said = |name: HeaderName, value: HeaderValue| {
        to.entry(name).or_insert(value);
    };
    let authority = uri.authority().map_or("", |authority| authority.as_str());
    unless_said(header::HOST, authority.rsplit('@').next().unwrap_or_default().parse()?);
    unless_said(header::USER_AGENT, HeaderValue::from_static(USER_AGENT));
    unless_said(header::ACCEPT, HeaderValue::from_static("*/*"));
    *request.headers_mut() = to;
    Ok(request)
}

/// Whether the server closes the connection after this answer.
fn closes(headers: &HeaderMap) -> bool {
    let said = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    said.flat_map(|value| value.split(',')).any(|word| word.trim().eq_ignore_ascii_case("close"))
}

/// A body that is still in its connection.
pub(in crate::source) struct DirectBody {
    /// Until the body has ended.
    line: Option<Line>,
    /// Its first bytes, which came with the head.
    ahead: Vec<u8>,
    /// Bytes that are still to be read.
    left: u64,
    /// Where the connection waits for the next request, if it may.
    back: Option<(Weak<Idle>, String)>,
}

impl DirectBody {
    /// The body as the `expected` bytes of a range of `what`, if it has so many.
    pub(in crate::source) fn into_reader(
        self: Box<Self>,
        what: String,
        expected: u64,
    ) -> Result<Box<dyn RangeReader>, Error> {
        if self.left != expected {
            let detail = format!("the answer has {} bytes, the range {expected}", self.left);
            return Err(Error::Protocol { what, detail });
        }
        Ok(Box::new(DirectRange { body: self, what, expected }))
    }

    /// Receives the next bytes into the front of `into`, which is not empty: how many, 0 after the last. A connection that
    /// ends before them is an error. Nothing is lost if it is dropped while it waits.
    async fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let wanted = usize::try_from(self.left).unwrap_or(usize::MAX).min(into.len());
        let came = match &mut self.line {
            _ if wanted == 0 => 0,
            _ if !self.ahead.is_empty() => {
                let taken = wanted.min(self.ahead.len());
                into[..taken].copy_from_slice(&self.ahead[..taken]);
                self.ahead.drain(..taken);
                taken
            }
            Some(line) => match receive(line, &mut into[..wanted]).await? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                came => came,
            },
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        };
        self.left -= came as u64;
        if self.left == 0
            && let Some(line) = self.line.take()
            && let Some((idle, place)) = self.back.take()
            && let Some(idle) = idle.upgrade()
            // What comes after the body belongs to no request.
            && self.ahead.is_empty()
        {
            idle.put(place, line);
        }
        Ok(came)
    }
}

/// A direct body, and what it is of.
struct DirectRange {
    body: Box<DirectBody>,
    what: String,
    expected: u64,
}

#[async_trait]
impl RangeReader for DirectRange {
    async fn read(&mut self, into: &mut [u8]) -> Result<usize, Error> {
        let DirectRange { body, what, expected } = self;
        let got = *expected - body.left;
        body.read(into).await.map_err(|_| Error::Truncated { what: what.clone(), expected: *expected, got })
    }
}

/// What the connection has now, or the next time that it has something; 0 at its end.
async fn receive(line: &mut Line, into: &mut [u8]) -> io::Result<usize> {
    std::future::poll_fn(|context| {
        let mut buffer = ReadBuf::new(into);
        ready!(Pin::new(&mut *line).poll_read(context, buffer.unfilled()))?;
        Poll::Ready(Ok(buffer.filled().len()))
    })
    .await
}

/// Connections that wait for their next request, each for at most [`IDLE_CONNECTION`].
#[derive(Default)]
struct Idle(Mutex<Waiting>);

#[derive(Default)]
struct Waiting {
    lines: HashMap<String, Vec<(Line, Instant)>>,
    /// Whether a task looks after them.
    watched: bool,
}

impl Idle {
    fn waiting(&self) -> std::sync::MutexGuard<'_, Waiting> {
        self.0.lock().expect("no panic while idle connections are counted")
    }

    /// The one that was used last, and that the server has neither closed nor said anything on.
    fn take(&self, place: &str) -> Option<Line> {
        loop {
            let (mut line, _) = self.waiting().lines.get_mut(place)?.pop()?;
            if receive(&mut line, &mut [0]).now_or_never().is_none() {
                return Some(line);
            }
        }
    }

    fn put(self: &Arc<Idle>, place: String, line: Line) {
        let mut waiting = self.waiting();
        waiting.lines.entry(place).or_default().push((line, Instant::now()));
        if !std::mem::replace(&mut waiting.watched, true) {
            tokio::spawn(Idle::watch(Arc::downgrade(self)));
        }
    }

    /// Closes what has waited for too long, until nothing waits.
    async fn watch(idle: Weak<Idle>) {
        loop {
            sleep(IDLE_CONNECTION).await;
            let Some(idle) = idle.upgrade() else { return };
            let mut waiting = idle.waiting();
            waiting.lines.retain(|_, lines| {
                lines.retain(|(_, since)| since.elapsed() < IDLE_CONNECTION);
                !lines.is_empty()
            });
            waiting.watched = !waiting.lines.is_empty();
            if !waiting.watched {
                return;
            }
        }
    }
}

/// What hyper sees of a connection: all heads, and the body only if it may go through.
struct HeadFirst<L> {
    line: L,
    /// What was read so far; dropped when the body goes through.
    read: Vec<u8>,
    /// How much of it hyper has.
    given: usize,
    /// Where the head of the answer has ended.
    head: Option<usize>,
    /// Where the head that is being read began.
    begins: usize,
    /// Set by who saw that the body goes through.
    through: Arc<AtomicBool>,
}

impl<L> HeadFirst<L> {
    fn new(line: L, through: Arc<AtomicBool>) -> HeadFirst<L> {
        HeadFirst { line, read: Vec::new(), given: 0, head: None, begins: 0, through }
    }

    /// What was read and not given.
    fn kept(&self) -> &[u8] {
        &self.read[self.given..]
    }

    /// Notes where the head of the answer ends, if it has.
    fn look_for_the_end(&mut self, from: usize) {
        const END: &[u8] = b"\r\n\r\n";
        let mut from = from.saturating_sub(END.len() - 1).max(self.begins);
        while let Some(at) = self.read[from..].windows(END.len()).position(|four| four == END) {
            let end = from + at + END.len();
            // `HTTP/1.1 1xx` is only announced before the answer.
            if self.read[self.begins..].get(9) != Some(&b'1') {
                self.head = Some(end);
                return;
            }
            (self.begins, from) = (end, end);
        }
    }
}

impl<L: Read + Unpin> Read for HeadFirst<L> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, mut into: ReadBufCursor<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let through = this.through.load(Ordering::Acquire);
        loop {
            let may_have = this.head.filter(|_| !through).unwrap_or(this.read.len());
            if this.given < may_have {
                let giving = (may_have - this.given).min(into.remaining());
                into.put_slice(&this.read[this.given..][..giving]);
                this.given += giving;
                return Poll::Ready(Ok(()));
            }
            match this.head {
                _ if through => {
                    (this.read, this.given) = (Vec::new(), 0);
                    return Pin::new(&mut this.line).poll_read(context, into);
                }
                // Whoever lets the body through polls again.
                Some(_) => return Poll::Pending,
                None => {}
            }
            let mut block = [0; HEAD_READ_BYTES];
            let mut buffer = ReadBuf::new(&mut block);
            ready!(Pin::new(&mut this.line).poll_read(context, buffer.unfilled()))?;
            if buffer.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            let before = this.read.len();
            this.read.extend_from_slice(buffer.filled());
            this.look_for_the_end(before);
        }
    }
}

impl<L: Write + Unpin> Write for HeadFirst<L> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().line).poll_write(context, bytes)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().line).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().line).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::super::super::reader::collect;
    use super::*;

    const ANSWER: &str = "HTTP/1.1 206 X\r\nContent-Length: 10\r\n\r\n0123456789";

    /// Serves connections that each give these answers, one for each request, and then end.
    struct Server {
        uri: hyper::Uri,
        connections: Arc<AtomicUsize>,
    }

    async fn serve(mut stream: impl AsyncRead + AsyncWrite + Unpin, answers: &[&str]) {
        for answer in answers {
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                let Ok(byte) = stream.read_u8().await else { return };
                head.push(byte);
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
            stream.flush().await.unwrap();
        }
    }

    impl Server {
        async fn giving(answers: &'static [&'static str]) -> Server {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let uri = format!("http://{}/file?signed=1", listener.local_addr().unwrap()).parse().unwrap();
            let connections = Arc::new(AtomicUsize::new(0));
            let accepted = connections.clone();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    accepted.fetch_add(1, Ordering::SeqCst);
                    tokio::spawn(serve(stream, answers));
                }
            });
            Server { uri, connections }
        }

        fn connections(&self) -> usize {
            self.connections.load(Ordering::SeqCst)
        }
    }

    fn client() -> DirectClient {
        believing(Vec::new())
    }

    fn believing(roots: Vec<CertificateDer<'static>>) -> DirectClient {
        DirectClient::new(Duration::from_secs(10), roots, Arc::new(Matcher::builder().build()))
    }

    async fn direct(client: &DirectClient, server: &Server) -> Box<dyn RangeReader> {
        match client.get(&server.uri, &HeaderMap::new()).await.unwrap() {
            Answer::Direct(answer) => answer.into_body().into_reader("x".into(), 10).unwrap(),
            Answer::Through(answer) => panic!("{answer:?}"),
        }
    }

    #[tokio::test]
    async fn a_connection_is_used_again_when_its_body_was_read() {
        let (client, server) = (client(), Server::giving(&[ANSWER; 3]).await);
        for _ in 0..3 {
            assert_eq!(collect(direct(&client, &server).await).await.unwrap(), b"0123456789");
        }
        assert_eq!(server.connections(), 1);
    }

    #[tokio::test]
    async fn a_connection_that_the_server_has_closed_is_not_missed() {
        let (client, server) = (client(), Server::giving(&[ANSWER]).await);
        for connections in 1..=3 {
            assert_eq!(collect(direct(&client, &server).await).await.unwrap(), b"0123456789");
            assert_eq!(server.connections(), connections);
        }
    }

    #[tokio::test]
    async fn a_connection_is_used_again_only_in_the_state_in_which_it_was() {
        const CLOSES: &str = "HTTP/1.1 206 X\r\nConnection: close\r\nContent-Length: 10\r\n\r\n0123456789";
        const OLD: &str = "HTTP/1.0 206 X\r\nContent-Length: 10\r\n\r\n0123456789";
        const MORE: &str = "HTTP/1.1 206 X\r\nContent-Length: 10\r\n\r\n0123456789and more";
        for answers in [&[CLOSES, ANSWER], &[OLD, ANSWER], &[MORE, ANSWER]] {
            let (client, server) = (client(), Server::giving(answers).await);
            for connections in 1..=2 {
                assert_eq!(collect(direct(&client, &server).await).await.unwrap(), b"0123456789");
                assert_eq!(server.connections(), connections, "{answers:?}");
            }
        }
        let (client, server) = (client(), Server::giving(&[ANSWER; 2]).await);
        for connections in 1..=2 {
            let mut left = direct(&client, &server).await;
            assert_eq!(left.read(&mut [0; 4]).await, Ok(4));
            assert_eq!(server.connections(), connections, "one was left in the middle");
        }
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_says_how_far_it_came() {
        const SHORT: &str = "HTTP/1.1 206 X\r\nContent-Length: 10\r\n\r\n0123";
        let (client, server) = (client(), Server::giving(&[SHORT]).await);
        let error = collect(direct(&client, &server).await).await.unwrap_err();
        assert_eq!(error, Error::Truncated { what: "x".into(), expected: 10, got: 4 });
    }

    #[tokio::test]
    async fn a_body_of_another_length_is_refused_before_it_is_read() {
        let (client, server) = (client(), Server::giving(&[ANSWER]).await);
        let Ok(Answer::Direct(answer)) = client.get(&server.uri, &HeaderMap::new()).await else { panic!() };
        assert!(matches!(answer.into_body().into_reader("x".into(), 11), Err(Error::Protocol { .. })));
    }

    #[tokio::test]
    async fn what_has_no_length_or_is_no_file_comes_through_the_library() {
        const CHUNKED: &str = "HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n012\r\n0\r\n\r\n";
        const UNTIL_THE_END: &str = "HTTP/1.1 200 X\r\n\r\n012";
        const REFUSED: &str = "HTTP/1.1 403 X\r\nContent-Length: 3\r\n\r\n012";
        for answer in [&[CHUNKED], &[UNTIL_THE_END], &[REFUSED]] {
            let (client, server) = (client(), Server::giving(answer).await);
            let Ok(Answer::Through(answer)) = client.get(&server.uri, &HeaderMap::new()).await else { panic!() };
            let body = http_body_util::BodyExt::collect(answer.into_body()).await.unwrap();
            assert_eq!(&*body.to_bytes(), b"012");
        }
    }

    #[tokio::test]
    async fn a_certificate_is_believed_only_if_somebody_we_believe_has_signed_it() {
        let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
        let key = made.signing_key.serialize_der().try_into().unwrap();
        let tls = rustls::ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(tls));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let uri: hyper::Uri = format!("https://{}/file", listener.local_addr().unwrap()).parse().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Ok(stream) = acceptor.accept(stream).await {
                    serve(stream, &[ANSWER; 2]).await;
                }
            }
        });
        let error = client().get(&uri, &HeaderMap::new()).await.err().unwrap();
        assert_eq!(Step::of(&*error), Step::Tls, "{error:?}");
        let believing = believing(vec![made.cert.der().clone()]);
        for _ in 0..2 {
            let Ok(Answer::Direct(answer)) = believing.get(&uri, &HeaderMap::new()).await else { panic!() };
            let reader = answer.into_body().into_reader("x".into(), 10).unwrap();
            assert_eq!(collect(reader).await.unwrap(), b"0123456789");
        }
    }

    #[tokio::test]
    async fn the_head_alone_is_given_however_it_comes() {
        let early = "HTTP/1.1 103 X\r\nLink: </x>\r\n\r\n";
        let head = "HTTP/1.1 206 X\r\nContent-Length: 10\r\n\r\n";
        let all = format!("{early}{head}0123456789");
        for block in 1..=all.len() {
            let (near, mut far) = tokio::io::duplex(block);
            let (near, all) = (TokioIo::new(near), all.clone());
            let sending = tokio::spawn(async move { far.write_all(all.as_bytes()).await.map(|()| far) });
            let mut reader = TokioIo::new(HeadFirst::new(near, Arc::default()));
            let mut given = vec![0; early.len() + head.len()];
            reader.read_exact(&mut given).await.unwrap();
            assert_eq!(given, [early, head].concat().as_bytes(), "in blocks of {block}");
            assert!(reader.read(&mut [0]).now_or_never().is_none(), "in blocks of {block}");
            let first = reader.into_inner();
            assert!(b"0123456789".starts_with(first.kept()), "in blocks of {block}");
            drop(first);
            let _ = sending.await;
        }
    }
}

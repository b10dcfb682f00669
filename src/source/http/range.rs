//! One range of a file: exactly its bytes, from the version that was asked for, or an error.

use reqwest::header::HeaderName;

use super::*;

/// An open range.
pub struct Body {
    /// Exactly the bytes of the range, or an error.
    pub bytes: Box<dyn RangeReader>,
    /// The mark of the file they are from, as [`Response::mark`] gives it.
    pub mark: Option<String>,
}

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Body").field("mark", &self.mark).finish_non_exhaustive()
    }
}

impl Client {
    /// Opens `range` of a file of `size` bytes. `range` is not empty and lies within the file; `request.range` is
    /// overwritten.
    ///
    /// `pin` is what [`Response::mark`] gave before: the server is asked for exactly that version, and an answer that is
    /// of another one, or does not say which, is an error. Anything else (a weak ETag) is ignored.
    pub async fn open_range(
        &self,
        mut request: Request,
        size: u64,
        range: Range<u64>,
        pin: Option<&str>,
    ) -> Result<Body, Error> {
        let pin = pin.and_then(Pin::read);
        if let Some(pin) = &pin
            && let Ok(value) = HeaderValue::from_str(pin.text)
        {
            request.headers.insert(pin.condition.clone(), value);
        }
        request.range = Some(range.clone());
        let what = request.what.clone();
        let response = self.send(request).await?;
        let began = || pin.as_ref().map_or_else(|| format!("{size} bytes"), |pin| pin.text.to_owned());
        let changed = |now: String| Error::Changed { what: what.clone(), began: began(), now };
        let protocol = |detail: String| Error::Protocol { what: what.clone(), detail };
        let content_range = response.header(header::CONTENT_RANGE).map(ContentRange::parse);
        match response.status().as_u16() {
            412 => return Err(changed(response.mark().unwrap_or_else(|| "another version".into()))),
            416 => {
                let now = match content_range {
                    Some(Some(ContentRange { total: Some(total), .. })) => format!("{total} bytes"),
                    _ => "shorter".into(),
                };
                return Err(changed(now));
            }
            200 | 206 => {}
            _ => {
                let status = response.status();
                return Err(match response.accept().await {
                    Ok(_) => protocol(format!("the server answered {} to a range", status.as_u16())),
                    Err(e) => e,
                });
            }
        }
        if let Some(pin) = &pin {
            match response.header(&pin.validator) {
                Some(now) if now == pin.text => {}
                Some(now) => return Err(changed(quoted(now))),
                None => return Err(protocol(format!("the answer has no {}, though the file has one", pin.validator))),
            }
        }
        if let Some(coding) = response.header(header::CONTENT_ENCODING).filter(|c| !c.eq_ignore_ascii_case("identity"))
        {
            return Err(protocol(format!("the body is encoded as {}, which was not asked for", quoted(coding))));
        }
        let expected = range.end - range.start;
        let length = response.content_length();
        if response.status() == StatusCode::OK {
            if range != (0..size) {
                return Err(protocol("the server ignored the range and sent the whole file".into()));
            }
            if let Some(length) = length.filter(|length| *length != size) {
                return Err(match &pin {
                    Some(_) => protocol(format!("the answer has {length} bytes, the file {size}")),
                    None => changed(format!("{length} bytes")),
                });
            }
        } else {
            let kind = response.header(header::CONTENT_TYPE).unwrap_or_default();
            if kind.to_ascii_lowercase().starts_with("multipart/") {
                return Err(protocol("the answer is a multipart body, which was not asked for".into()));
            }
            match content_range {
                None => return Err(protocol("the answer to a range has no Content-Range".into())),
                Some(Some(ContentRange { span: Some(span), total: Some(total) })) if span == range => {
                    if total != size {
                        return Err(match &pin {
                            Some(_) => protocol(format!("the range is of {total} bytes, the file has {size}")),
                            None => changed(format!("{total} bytes")),
                        });
                    }
                }
                Some(_) => {
                    let shown = quoted(response.header(header::CONTENT_RANGE).unwrap_or_default());
                    let asked = format!("{}-{}/{size}", range.start, range.end - 1);
                    return Err(protocol(format!("the answer is range {shown}, asked for was {asked}")));
                }
            }
            if let Some(length) = length.filter(|length| *length != expected) {
                return Err(protocol(format!("the answer has {length} bytes, the range {expected}")));
            }
        }
        let mark = response.mark();
        let bytes: Box<dyn RangeReader> = match response.direct {
            Some(body) => body.into_reader(what, expected)?,
            None => exactly(response.inner, what, expected),
        };
        Ok(Body { bytes, mark })
    }
}

/// A mark of a file, and the headers it stands in.
struct Pin<'a> {
    text: &'a str,
    condition: HeaderName,
    validator: HeaderName,
}

impl Pin<'_> {
    fn read(text: &str) -> Option<Pin<'_>> {
        if is_strong(text) {
            return Some(Pin { text, condition: header::IF_MATCH, validator: header::ETAG });
        }
        httpdate::parse_http_date(text).ok()?;
        Some(Pin { text, condition: header::IF_UNMODIFIED_SINCE, validator: header::LAST_MODIFIED })
    }
}

/// `Content-Range: bytes 0-9/100`, `bytes */100` or `bytes 0-9/*`.
struct ContentRange {
    span: Option<Range<u64>>,
    total: Option<u64>,
}

impl ContentRange {
    fn parse(value: &str) -> Option<ContentRange> {
        let (span, total) = value.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
        let number = |text: &str| text.trim().parse::<u64>().ok();
        let span = match span.trim() {
            "*" => None,
            span => {
                let (first, last) = span.split_once('-')?;
                Some(number(first)?..number(last)?.checked_add(1)?)
            }
        };
        Some(ContentRange { span, total: number(total) })
    }
}

/// Counts a body: `expected` bytes, or an error, and never a byte more.
fn exactly(response: reqwest::Response, what: String, expected: u64) -> Box<dyn RangeReader> {
    let start = Some((response, 0u64));
    Pieces::of(futures::stream::unfold(start, move |state| {
        let what = what.clone();
        async move {
            let (mut response, got) = state.filter(|(_, got)| *got < expected)?;
            let chunk = match response.chunk().await {
                Ok(Some(chunk)) => chunk,
                Ok(None) | Err(_) => return Some((Err(Error::Truncated { what, expected, got }), None)),
            };
            let got = got + chunk.len() as u64;
            if got > expected {
                return Some((Err(Error::Overlong { what, expected }), None));
            }
            // The last piece is given only when the body ends there, so that a body that is too long fails whole. A
            // connection that breaks now, breaks after the last byte.
            if got == expected
                && let Ok(Some(more)) = response.chunk().await
                && !more.is_empty()
            {
                return Some((Err(Error::Overlong { what, expected }), None));
            }
            Some((Ok(chunk), Some((response, got))))
        }
    }))
}

#[cfg(test)]
mod tests {
    use super::super::super::reader::collect;
    use super::super::tests::{answer, client, server, url};
    use super::*;

    #[test]
    fn content_ranges_are_read_strictly() {
        let read = |text| ContentRange::parse(text).map(|range| (range.span, range.total));
        assert_eq!(read("bytes 0-9/100"), Some((Some(0..10), Some(100))));
        assert_eq!(read("bytes */100"), Some((None, Some(100))));
        assert_eq!(read("bytes 5-9/*"), Some((Some(5..10), None)));
        for bad in ["", "bytes", "bytes 1/2", "bytes a-b/3", "bytes 0-18446744073709551615/3", "items 0-9/100"] {
            assert_eq!(read(bad), None, "{bad:?}");
        }
    }

    /// What becomes of a range 2..5 of `abcdefgh`, if the server answers this.
    async fn range_from(answer: String, pin: Option<&str>) -> Result<Vec<u8>, Error> {
        let (port, _) = server(move |_| answer.clone()).await;
        let request = Request::get(url(&format!("http://127.0.0.1:{port}/")), "x");
        let body = client().open_range(request, 8, 2..5, pin).await?;
        collect(body.bytes).await
    }

    #[tokio::test]
    async fn a_range_is_exactly_the_range_or_an_error() {
        let pin = Some("\"v1\"");
        let right = "ETag: \"v1\"\r\nContent-Range: bytes 2-4/8\r\n";
        assert_eq!(range_from(answer(206, right, "cde"), pin).await.unwrap(), b"cde");
        assert_eq!(range_from(answer(206, right, "cde"), Some("W/\"weak\"")).await.unwrap(), b"cde", "no pin");

        let changed = [
            answer(206, "ETag: \"v2\"\r\nContent-Range: bytes 2-4/8\r\n", "cde"),
            answer(200, "ETag: \"v2\"\r\n", "abcdefgh"),
            answer(412, "", ""),
            answer(416, "Content-Range: bytes */1\r\n", ""),
        ];
        for answer in changed {
            let error = range_from(answer.clone(), pin).await.unwrap_err();
            assert!(matches!(error, Error::Changed { .. }), "{answer:?}: {error}");
        }
        let error = range_from(answer(206, "Content-Range: bytes 2-4/9\r\n", "cde"), None).await.unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{error}");

        let confused = [
            answer(200, "ETag: \"v1\"\r\n", "abcdefgh"),
            answer(206, "ETag: \"v1\"\r\nContent-Range: bytes 1-3/8\r\n", "cde"),
            answer(206, "ETag: \"v1\"\r\nContent-Range: bytes 2-4/9\r\n", "cde"),
            answer(206, "ETag: \"v1\"\r\nContent-Range: bytes 2-4/*\r\n", "cde"),
            answer(206, "ETag: \"v1\"\r\n", "cde"),
            answer(206, "Content-Range: bytes 2-4/8\r\n", "cde"),
            answer(206, right, "cd"),
            answer(206, right, "cdef"),
            answer(206, &format!("{right}Content-Encoding: gzip\r\n"), "cde"),
            answer(206, &format!("{right}Content-Type: multipart/byteranges; boundary=b\r\n"), "cde"),
            answer(204, "", ""),
            answer(304, "", ""),
        ];
        for answer in confused {
            let error = range_from(answer.clone(), pin).await.unwrap_err();
            assert!(matches!(error, Error::Protocol { .. }), "{answer:?}: {error}");
        }

        let chunked = |body: &str| format!("HTTP/1.1 206 X\r\n{right}Transfer-Encoding: chunked\r\n\r\n{body}");
        assert_eq!(range_from(chunked("3\r\ncde\r\n0\r\n\r\n"), pin).await.unwrap(), b"cde");
        let error = range_from(chunked("2\r\ncd\r\n0\r\n\r\n"), pin).await.unwrap_err();
        assert_eq!(error, Error::Truncated { what: "x".into(), expected: 3, got: 2 });
        for longer in ["4\r\ncdef\r\n0\r\n\r\n", "3\r\ncde\r\n1\r\nf\r\n0\r\n\r\n"] {
            let error = range_from(chunked(longer), pin).await.unwrap_err();
            assert_eq!(error, Error::Overlong { what: "x".into(), expected: 3 });
        }
    }

    #[tokio::test]
    async fn a_whole_file_may_come_without_a_range() {
        let (port, _) = server(|_| answer(200, "ETag: \"v1\"\r\n", "abcdefgh")).await;
        let request = Request::get(url(&format!("http://127.0.0.1:{port}/")), "x");
        let body = client().open_range(request.clone(), 8, 0..8, Some("\"v1\"")).await.unwrap();
        assert_eq!(collect(body.bytes).await.unwrap(), b"abcdefgh");
        let error = client().open_range(request, 9, 0..9, None).await.unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{error}");
    }

    #[tokio::test]
    async fn only_the_version_that_was_listed_is_asked_for() {
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        for (pin, condition) in
            [("\"v1\"", "if-match: \"v1\""), (date, "if-unmodified-since: sun, 06 nov 1994 08:49:37 gmt")]
        {
            let (port, heads) = server(|_| answer(412, "", "")).await;
            let request = Request::get(url(&format!("http://127.0.0.1:{port}/")), "x");
            assert!(client().open_range(request, 8, 2..5, Some(pin)).await.is_err());
            let heads = heads.lock().unwrap();
            assert!(heads.iter().all(|head| head.lines().any(|line| line == condition)), "{heads:?}");
        }
    }

    #[tokio::test]
    async fn a_date_pins_where_there_is_no_etag() {
        let old = "Sun, 06 Nov 1994 08:49:37 GMT";
        let head = |modified: &str| format!("Last-Modified: {modified}\r\nContent-Range: bytes 2-4/8\r\n");
        assert_eq!(range_from(answer(206, &head(old), "cde"), Some(old)).await.unwrap(), b"cde");
        let newer = head("Sun, 06 Nov 1994 08:49:38 GMT");
        let error = range_from(answer(206, &newer, "cde"), Some(old)).await.unwrap_err();
        assert!(matches!(error, Error::Changed { .. }), "{error}");

        for (date, mark) in [("Sun, 06 Nov 1994 08:50:37 GMT", Some(old)), ("Sun, 06 Nov 1994 08:50:00 GMT", None)] {
            let (port, _) =
                server(move |_| answer(200, &format!("Date: {date}\r\nLast-Modified: {old}\r\n"), "")).await;
            let request = Request::get(url(&format!("http://127.0.0.1:{port}/")), "x");
            assert_eq!(client().send(request).await.unwrap().mark().as_deref(), mark, "answered {date}");
        }
    }
}

//! What must hold of every input, whoever made it: the fuzz targets try to find one that breaks it, and
//! `tests/fuzz_corpus.rs` replays what they have found.

use larder::model::{Digest, Manifest};
use larder::wire::frame::{Answer, BadFrame, Decoder, MAX_ANSWER_BYTES, MAX_REQUEST_BYTES, Request, decode, encode};

/// A manifest that can be read is the canonical text of itself, and names no file outside of its directory.
pub(crate) fn manifest(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(manifest) = Manifest::decode(text) else { return };
    assert_eq!(manifest.encode(), text);
    assert_eq!(manifest.digest(), Digest::of(bytes));
    for file in manifest.files() {
        assert!(file.size <= manifest.total_bytes());
        assert!(!file.path.as_path().is_absolute());
        assert!(file.path.components().all(|part| !matches!(part, "" | "." | "..") && !part.contains(['/', '\0'])));
    }
}

/// Frames do not depend on how their bytes were cut, and a message that can be read says the same when it is sent on.
///
/// The first byte says how the rest is cut.
pub(crate) fn frame(bytes: &[u8]) {
    let Some((cut, stream)) = bytes.split_first() else { return };
    for most in [MAX_REQUEST_BYTES, MAX_ANSWER_BYTES] {
        let whole = frames(stream, stream.len().max(1), most);
        assert_eq!(whole, frames(stream, usize::from(*cut) + 1, most));
        for json in &whole.0 {
            assert!(json.len() <= most);
            if let Ok(request) = decode::<Request>(json)
                && let Some(sent) = encode(&request, MAX_REQUEST_BYTES)
            {
                assert_eq!(decode::<Request>(&sent[4..]), Ok(request));
            }
            if let Ok(answer) = decode::<Answer>(json)
                && let Some(sent) = encode(&answer, MAX_ANSWER_BYTES)
            {
                let again = decode::<Answer>(&sent[4..]).map(|answer| serde_json::to_value(answer).unwrap());
                assert_eq!(again, Ok(serde_json::to_value(answer).unwrap()));
            }
        }
    }
}

/// The frames of a stream that comes in pieces of one size, and what ended it.
fn frames(stream: &[u8], piece_bytes: usize, most: usize) -> (Vec<Vec<u8>>, Option<BadFrame>) {
    let mut decoder = Decoder::new(most);
    let mut found = Vec::new();
    for mut piece in stream.chunks(piece_bytes) {
        loop {
            match decoder.take(&mut piece) {
                Ok(Some(json)) => found.push(json),
                Ok(None) => break,
                Err(bad) => return (found, Some(bad)),
            }
        }
        assert!(piece.is_empty(), "what was not taken is lost");
    }
    (found, None)
}

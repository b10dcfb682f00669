//! Replays what the fuzz targets of `tests/fuzz` were given and have found; `docs/contributing.md` says how to run them.

use std::fs;
use std::path::Path;

#[path = "fuzz/properties.rs"]
mod properties;

fn replay(corpus: &str, property: fn(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(corpus);
    let inputs: Vec<_> = fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(inputs.len() > 20, "{} holds {} inputs", dir.display(), inputs.len());
    for path in inputs {
        let bytes = fs::read(&path).unwrap();
        let held = std::panic::catch_unwind(|| property(&bytes));
        assert!(held.is_ok(), "{} breaks the property", path.display());
    }
}

#[test]
fn the_corpus_of_frames_holds() {
    replay("frame", properties::frame);
}

#[test]
fn the_corpus_of_manifests_holds() {
    replay("manifest", properties::manifest);
}

/// A property that lets everything through would make the fuzzers blind.
#[test]
fn the_properties_look_at_what_they_are_given() {
    let good = [&[3u8][..], &15u32.to_be_bytes(), br#"{"type":"more"}"#].concat();
    properties::frame(&good);
    let manifest = format!("larder-manifest 1\nblake3:{} 2 a/b\n", "0".repeat(64));
    properties::manifest(manifest.as_bytes());
    assert!(larder::model::Manifest::decode(&manifest).is_ok());
}

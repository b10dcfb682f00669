//! The one way to leave a test out because something it needs is absent.

/// Says why a test is left out; the test returns right after. Under `LARDER_TEST_STRICT=1`, which `.ci/run` sets after
/// it has put everything in place, it fails instead, so that nothing is left out unseen.
pub(crate) fn skipped(reason: &str) {
    let strict = std::env::var("LARDER_TEST_STRICT").is_ok_and(|v| v == "1");
    assert!(!strict, "skipped: {reason}");
    println!("skipped: {reason}");
}

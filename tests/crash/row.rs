//! One row of the table: cases of one kind, how many failed, and how long they took.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use futures::FutureExt;

/// Failures that are shown of one row.
const MAX_SHOWN: usize = 5;

/// Whether every case is tried, or as many as a continuous integration has time for.
pub(crate) fn is_long() -> bool {
    std::env::var("LARDER_CRASH").is_ok_and(|size| size == "long")
}

/// The number for this size.
pub(crate) fn size(short: usize, long: usize) -> usize {
    if is_long() { long } else { short }
}

/// The number of random cycles for this size, or what `LARDER_CRASH_CYCLES` says.
pub(crate) fn cycles(short: usize, long: usize) -> usize {
    let asked = std::env::var("LARDER_CRASH_CYCLES").ok().and_then(|cycles| cycles.parse().ok());
    asked.unwrap_or_else(|| size(short, long))
}

/// The seed of `LARDER_SEED`, or a new one.
pub(crate) fn seed() -> u64 {
    std::env::var("LARDER_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..))
}

/// Cases of one kind.
pub(crate) struct Row {
    name: String,
    began: Instant,
    cases: usize,
    failures: Vec<String>,
}

impl Row {
    pub(crate) fn new(name: &str) -> Row {
        Row { name: name.to_owned(), began: Instant::now(), cases: 0, failures: Vec::new() }
    }

    /// One case, which fails by a panic. `label` is how to find it again.
    pub(crate) async fn case<T>(&mut self, label: &str, case: impl Future<Output = T>) -> Option<T> {
        self.cases += 1;
        match AssertUnwindSafe(case).catch_unwind().await {
            Ok(done) => Some(done),
            Err(panic) => {
                self.failures.push(format!("{label}: {}", said(panic.as_ref())));
                None
            }
        }
    }

    /// Prints the row; fails if a case has.
    pub(crate) fn end(self) {
        let Row { name, began, cases, failures } = self;
        println!("| {name} | {cases} | {} | {} |", failures.len(), began.elapsed().as_secs());
        let shown: Vec<_> = failures.iter().take(MAX_SHOWN).map(String::as_str).collect();
        assert!(shown.is_empty(), "{} of {cases} failed:\n{}", failures.len(), shown.join("\n"));
    }
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().cloned();
    text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_else(|| "a panic".to_owned())
}

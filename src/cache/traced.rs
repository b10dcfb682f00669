//! What pulls and opens were like, as traces: made from the same timelines that `larder why` shows, so that their spans sum to
//! the whole. Without a collector none of this costs more than a look at a pointer.

use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use super::clock::{Clock, During};
use super::{Cache, Error};
use crate::fault::{Code, Diagnose};
use crate::model::{Effort, ModelRef, Stage, Timeline};
use crate::telemetry::{Parent, Traces, Work};

/// The clock of an open, if somebody wants to know.
pub(super) struct Watched(Option<Arc<Clock>>);

impl Watched {
    /// The open does this now.
    pub(super) fn during(&self, stage: Stage) -> Option<During> {
        self.0.as_ref().map(|clock| clock.during(stage))
    }
}

impl Cache {
    /// From now on pulls and opens are sent there. The first one that is given stays.
    pub fn trace_with(&self, traces: Traces) {
        let _ = self.0.traces.set(traces);
    }

    /// A clock for an open that begins, if there are traces.
    pub(super) fn watch_open(&self) -> Watched {
        Watched(self.0.traces.get().map(|_| Clock::start()))
    }

    /// An open has ended.
    pub(super) fn open_ended(
        &self,
        watched: &Watched,
        reference: &ModelRef,
        version: Result<&str, &Error>,
        caller: Option<&Parent>,
    ) {
        let (Some(clock), Some(traces)) = (&watched.0, self.0.traces.get()) else { return };
        let reference = reference.to_string();
        let texts = [("larder.reference", reference.as_str()), ("larder.version", version.unwrap_or_default())];
        let texts = if version.is_ok() { &texts[..] } else { &texts[..1] };
        send(traces, "open", &clock.stop(), texts, &[], version.err().map(Diagnose::code), caller);
    }

    /// A pull has ended.
    pub(super) fn pull_ended(
        &self,
        timeline: &Timeline,
        effort: Effort,
        texts: &[(&'static str, &str)],
        error: Option<Code>,
        caller: Option<&Parent>,
    ) {
        let Some(traces) = self.0.traces.get() else { return };
        let numbers = [
            ("larder.fetched_bytes", effort.fetched_bytes),
            ("larder.hashing_us", effort.hashing_us),
            ("larder.writing_us", effort.writing_us),
            ("larder.durable_us", effort.durable_us),
        ];
        send(traces, "pull", timeline, texts, &numbers, error, caller);
    }
}

fn send(
    traces: &Traces,
    name: &'static str,
    timeline: &Timeline,
    texts: &[(&'static str, &str)],
    numbers: &[(&'static str, u64)],
    error: Option<Code>,
    parent: Option<&Parent>,
) {
    let parts: Vec<(&'static str, Duration)> =
        timeline.stages.iter().map(|stage| (stage.stage.text(), Duration::from_micros(stage.took_us))).collect();
    let began = UNIX_EPOCH + Duration::from_millis(timeline.began_at_ms);
    traces.send(&Work { name, began, parts: &parts, texts, numbers, error: error.map(Code::text), parent });
}

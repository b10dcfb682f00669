//! Events on our node: a pull that failed, a full volume, an eviction. Not each of them: what repeats itself is told once in a
//! while, and never many at once.

use std::collections::{HashMap, HashSet, VecDeque};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::fault::Code;
use crate::wire::http::{EvictionInfo, Phase, PullStatus};

/// The same is not told again for so long.
const QUIET: Duration = Duration::from_secs(600);
/// Most events at once; more come back one by one.
const BURST: u32 = 20;
/// Time after which one more may be told.
const REFILL: Duration = Duration::from_secs(30);
/// Most events that wait for the API server: the oldest are not told.
const MAX_WAITING: usize = 50;
/// Most bytes of the text of an event: Kubernetes refuses more.
const MAX_NOTE_BYTES: usize = 1024;

/// Something to tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Happening {
    is_warning: bool,
    reason: &'static str,
    /// The sentence, the action and the code.
    note: String,
    /// What makes two of them the same.
    about: String,
}

impl Happening {
    /// A pull that has failed; `None` if it has not.
    fn of_pull(pull: &PullStatus) -> Option<Happening> {
        let error = pull.error.as_ref().filter(|_| pull.phase == Phase::Failed)?;
        let full = [Code::VolumeFull.text(), Code::NeverFits.text()].contains(&error.code.as_str());
        Some(Happening {
            is_warning: true,
            reason: if full { "VolumeFull" } else { "PullFailed" },
            note: note(&error.detail, &error.action, &error.code),
            about: format!("{} {}", error.code, pull.reference),
        })
    }

    pub(super) fn of_eviction(eviction: &EvictionInfo) -> Happening {
        let EvictionInfo { reference, version, needed_by, .. } = eviction;
        Happening {
            is_warning: false,
            reason: "ModelEvicted",
            note: cut(&format!(
                "evicted `{reference}` (version {version}) for {needed_by}; pull it again to have it here"
            )),
            about: format!("evicted {reference} {version}"),
        }
    }

    /// As it is posted, into the namespace of events of nodes.
    pub(super) fn on(&self, node: &str, reported_by: &str, at: &str, name: &str) -> Value {
        json!({
            "apiVersion": "events.k8s.io/v1", "kind": "Event",
            "metadata": {"name": name, "namespace": NAMESPACE},
            "eventTime": at, "type": if self.is_warning { "Warning" } else { "Normal" },
            "reason": self.reason, "action": self.reason, "note": self.note,
            "reportingController": "larder.dev/larder", "reportingInstance": reported_by,
            // The uid that kubelet gives a node in its own events, so that `kubectl describe node` shows both.
            "regarding": {"apiVersion": "v1", "kind": "Node", "name": node, "uid": node},
        })
    }
}

/// Where events of what has no namespace stand.
pub(super) const NAMESPACE: &str = "default";

fn note(sentence: &str, action: &str, code: &str) -> String {
    cut(&format!("{sentence}; {action} ({code})"))
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_NOTE_BYTES)].to_owned()
}

/// What waits to be told, and what has been.
#[derive(Debug)]
pub(super) struct Happenings {
    waiting: VecDeque<Happening>,
    /// When what was last told.
    told: HashMap<String, Instant>,
    allowance: u32,
    filled_at: Instant,
    /// Pulls that had failed when somebody last looked.
    failed: HashSet<String>,
}

impl Happenings {
    pub(super) fn new(now: Instant) -> Happenings {
        let (waiting, told, failed) = (VecDeque::new(), HashMap::new(), HashSet::new());
        Happenings { waiting, told, allowance: BURST, filled_at: now, failed }
    }

    /// Takes up the pulls that have failed since the last look.
    pub(super) fn look_at(&mut self, pulls: &[PullStatus], now: Instant) {
        let before = std::mem::take(&mut self.failed);
        for pull in pulls {
            let Some(happening) = Happening::of_pull(pull) else { continue };
            if !before.contains(&pull.id) {
                self.add(happening, now);
            }
            self.failed.insert(pull.id.clone());
        }
    }

    pub(super) fn add(&mut self, happening: Happening, now: Instant) {
        self.told.retain(|_, at| now.duration_since(*at) < QUIET);
        let refilled = now.duration_since(self.filled_at).as_secs() / REFILL.as_secs();
        if refilled > 0 {
            self.allowance = self.allowance.saturating_add(refilled.min(u64::from(BURST)) as u32).min(BURST);
            self.filled_at = now;
        }
        if self.allowance == 0 || self.told.contains_key(&happening.about) {
            return;
        }
        self.allowance -= 1;
        self.told.insert(happening.about.clone(), now);
        if self.waiting.len() == MAX_WAITING {
            self.waiting.pop_front();
        }
        self.waiting.push_back(happening);
    }

    pub(super) fn next(&mut self) -> Option<Happening> {
        self.waiting.pop_front()
    }

    pub(super) fn put_back(&mut self, happening: Happening) {
        if self.waiting.len() < MAX_WAITING {
            self.waiting.push_front(happening);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn happening(about: &str) -> Happening {
        Happening { is_warning: true, reason: "PullFailed", note: about.to_owned(), about: about.to_owned() }
    }

    #[test]
    fn the_same_is_told_once_in_a_while_and_many_are_told_bit_by_bit() {
        let start = Instant::now();
        let mut happenings = Happenings::new(start);
        let told = |happenings: &mut Happenings| std::iter::from_fn(|| happenings.next()).count();
        happenings.add(happening("a"), start);
        happenings.add(happening("a"), start + Duration::from_secs(599));
        assert_eq!(told(&mut happenings), 1);
        let later = start + QUIET;
        (0..100).for_each(|n| happenings.add(happening(&n.to_string()), later));
        assert_eq!(told(&mut happenings), BURST as usize);
        (100..200).for_each(|n| happenings.add(happening(&n.to_string()), later + REFILL));
        assert_eq!(told(&mut happenings), 1);
        assert!(happenings.told.len() <= 2 * BURST as usize);
        happenings.add(happening("a"), later + 20 * QUIET);
        assert_eq!(told(&mut happenings), 1, "it is told again after a while");
    }

    #[test]
    fn what_waits_for_the_api_server_is_bounded() {
        let mut now = Instant::now();
        let mut happenings = Happenings::new(now);
        for n in 0..200 {
            now += REFILL;
            happenings.add(happening(&n.to_string()), now);
        }
        assert_eq!(happenings.waiting.len(), MAX_WAITING);
        assert_eq!(happenings.waiting.back().unwrap().about, "199");
    }

    #[test]
    fn a_long_sentence_is_cut_between_letters() {
        assert_eq!(cut(&"é".repeat(1_000)).len(), MAX_NOTE_BYTES);
        assert_eq!(cut(&format!("x{}", "é".repeat(1_000))).len(), MAX_NOTE_BYTES - 1);
        assert_eq!(note("cannot pull `x`: y", "do z", "volume-full"), "cannot pull `x`: y; do z (volume-full)");
    }
}

//! How this node does things where it depends on the kernel, the file system or our rights.

use super::Cache;
use crate::fault::Problem;
use crate::store::Descriptors;
use crate::wire::http::Detail;

impl Cache {
    /// One line for each such thing, for `/readyz` and `larder doctor`.
    pub fn details(&self) -> Vec<Detail> {
        let holders = holders(self.why_holders_are_unknown());
        let mut details = vec![descriptors(self.0.volume.descriptors()), snapshots(), holders];
        details.extend(self.0.hands.as_ref().map(|hands| index(hands.index.why_unusable())));
        details.extend(self.pods().map(|of_node| pods(of_node.trouble())));
        details.extend(self.warm_details());
        details
    }
}

fn descriptors(descriptors: Descriptors) -> Detail {
    let (state, means, best) = match descriptors {
        Descriptors::ReadOnlyMount => (
            "read-only mount",
            "nobody can write through a descriptor that larder hands out, not even root".into(),
            true,
        ),
        Descriptors::FileModes { why } => {
            let means = format!(
                "a reader with root's rights can write through a descriptor that larder hands out; it is found before the \
                 next open. It is so because {why}"
            );
            ("file modes", means, false)
        }
    };
    Detail { name: "descriptors".into(), state: state.into(), means, best }
}

fn snapshots() -> Detail {
    let means = "all readers of a file share one copy of it, on the disk and in memory; whoever mounts the volume's \
                 `public/` to write can change it for all, so pods mount it with `readOnly: true`";
    Detail { name: "snapshots".into(), state: "hard links".into(), means: means.into(), best: true }
}

fn holders(unknown: Option<String>) -> Detail {
    let best = unknown.is_none();
    let (state, means) = match unknown {
        None => (
            "kernel leases",
            "the kernel tells who has a model open, so none of those is evicted, whoever reads it".to_owned(),
        ),
        Some(why) => ("unknown", format!("who uses what cannot be known, so nothing is evicted: {why}")),
    };
    Detail { name: "holders".into(), state: state.into(), means, best }
}

fn index(unusable: Option<String>) -> Detail {
    let best = unusable.is_none();
    let (state, means) = match unusable {
        None => ("kept", "what is known of bytes and uses is there after a restart".to_owned()),
        Some(why) => (
            "not kept",
            format!(
                "no model is lost, but files may be fetched or hashed again, and what was used last be forgotten: {why}"
            ),
        ),
    };
    Detail { name: "index".into(), state: state.into(), means, best }
}

fn pods(trouble: Option<Problem>) -> Detail {
    let best = trouble.is_none();
    let (state, means) = match trouble {
        None => ("watched", "a lease of a pod ends seconds after the pod has gone".to_owned()),
        Some(Problem { code, message, action, .. }) => (
            "unknown",
            format!("which pods are gone cannot be known, so their leases are kept: {message} ({code}); {action}"),
        ),
    };
    Detail { name: "pods".into(), state: state.into(), means, best }
}

//! What stands on our node's object: the labels of it as a value, without I/O.

use std::collections::BTreeMap;

use aws_lc_rs::digest::{SHA256, digest};
use serde_json::{Value, json};

use crate::wire::http::ModelInfo;

/// Says that models can be opened on the node.
pub const READY_LABEL: &str = "larder.dev/ready";
/// Before the hash of a reference: the model is there.
pub const MODEL_PREFIX: &str = "models.larder.dev/";
/// Which reference each hash is of, as a JSON object.
pub const NAMES_ANNOTATION: &str = "larder.dev/models";
/// Most models with a label: more would make the node's object large, which all of the cluster watches.
pub const MAX_LABELLED: usize = 64;
/// Longest annotation with their names, in bytes; those beyond it have a label alone.
const MAX_NAMES_BYTES: usize = 16 * 1024;
/// Hexadecimal digits of a hash.
const KEY_DIGITS: usize = 16;

/// A model as the node tells of it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Told {
    /// Pinned ones first: `false` sorts before `true`.
    pub(super) not_pinned: bool,
    pub(super) reference: String,
    /// The id of its version.
    pub(super) id: String,
}

impl Told {
    /// The models that a reference leads to now.
    pub(super) fn of(models: Vec<ModelInfo>) -> Vec<Told> {
        let current = models.into_iter().filter(|model| model.current);
        let told = |model: ModelInfo| Told { not_pinned: !model.pinned, reference: model.reference, id: model.id };
        let mut told: Vec<_> = current.map(told).collect();
        told.sort();
        told
    }
}

/// What the node's object is to say of us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Notice {
    labels: BTreeMap<String, &'static str>,
    names: String,
}

impl Notice {
    /// `models` are sorted; the first of them are told. By name and not by use, so that an open changes nothing.
    pub(super) fn of<'a>(ready: bool, models: impl Iterator<Item = &'a Told>) -> Notice {
        let mut labels = BTreeMap::new();
        if ready {
            labels.insert(READY_LABEL.to_owned(), "true");
        }
        let (mut names, mut bytes) = (BTreeMap::new(), 2);
        for model in models.take(MAX_LABELLED) {
            let key = key_of(&model.reference);
            labels.insert(format!("{MODEL_PREFIX}{key}"), if model.not_pinned { "pulled" } else { "pinned" });
            bytes += key.len() + model.reference.len() + "\"\":\"\",".len();
            if bytes <= MAX_NAMES_BYTES {
                names.insert(key, &model.reference);
            }
        }
        Notice { labels, names: serde_json::to_string(&names).expect("texts are JSON") }
    }

    /// As it is applied: what we have applied before and do not any more is taken away by the API server.
    pub(super) fn applied_to(&self, node: &str) -> Value {
        let annotations = json!({NAMES_ANNOTATION: self.names});
        let metadata = json!({"name": node, "labels": self.labels, "annotations": annotations});
        json!({"apiVersion": "v1", "kind": "Node", "metadata": metadata})
    }
}

/// What a reference is called in a label: the beginning of the SHA-256 of its canonical text.
fn key_of(reference: &str) -> String {
    hex::encode(digest(&SHA256, reference.as_bytes()))[..KEY_DIGITS].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(pinned: bool, reference: &str) -> Told {
        Told { not_pinned: !pinned, reference: reference.into(), id: String::new() }
    }

    #[test]
    fn a_label_is_the_hash_that_everybody_can_make_of_a_reference() {
        // printf %s hf://Qwen/Qwen3-0.6B@main | sha256sum | cut -c1-16
        assert_eq!(key_of("hf://Qwen/Qwen3-0.6B@main"), "a7ce98a766cf62c2");
        let models = [told(true, "hf://Qwen/Qwen3-0.6B@main"), told(false, "s3://b/p")];
        let notice = Notice::of(true, models.iter()).applied_to("n1");
        assert_eq!(notice["metadata"]["name"], "n1");
        assert_eq!(notice["metadata"]["labels"]["larder.dev/ready"], "true");
        assert_eq!(notice["metadata"]["labels"]["models.larder.dev/a7ce98a766cf62c2"], "pinned");
        let names: Value =
            serde_json::from_str(notice["metadata"]["annotations"][NAMES_ANNOTATION].as_str().unwrap()).unwrap();
        assert_eq!(names["a7ce98a766cf62c2"], "hf://Qwen/Qwen3-0.6B@main");
        assert_eq!(names.as_object().unwrap().len(), 2);
        let unready = Notice::of(false, models.iter()).applied_to("n1");
        assert!(unready["metadata"]["labels"].get(READY_LABEL).is_none());
    }

    #[test]
    fn what_a_node_says_is_bounded_and_pinned_models_come_first() {
        let mut models: Vec<Told> = (0..200).map(|n| told(n == 199, &format!("hf://o/{n:03}"))).collect();
        models.sort();
        let labels = Notice::of(false, models.iter()).labels;
        assert_eq!(labels.len(), MAX_LABELLED);
        assert_eq!(labels[&format!("{MODEL_PREFIX}{}", key_of("hf://o/199"))], "pinned");
        let long: Vec<Told> = (0..10).map(|n| told(true, &format!("hf://o/{n}{}", "x".repeat(5_000)))).collect();
        let notice = Notice::of(false, long.iter());
        assert_eq!(notice.labels.len(), 10);
        assert!(
            notice.names.len() <= MAX_NAMES_BYTES && notice.names.len() > MAX_NAMES_BYTES / 2,
            "{}",
            notice.names.len()
        );
    }
}

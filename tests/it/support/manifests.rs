//! What is in `daemonset/`, as Kubernetes would be given it.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::skip::skipped;

/// `daemonset/`.
pub(crate) fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset")
}

/// Every part of `daemonset/components/`, by name.
pub(crate) fn components() -> Vec<String> {
    names_in(&directory().join("components"))
}

/// Every file of `daemonset/examples/`, by name.
pub(crate) fn examples() -> Vec<String> {
    names_in(&directory().join("examples")).into_iter().filter(|name| name.ends_with(".yaml")).collect()
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = entries.collect();
    names.sort();
    assert!(!names.is_empty(), "nothing is in {}", dir.display());
    names
}

/// The text of an example.
pub(crate) fn example_text(name: &str) -> String {
    fs::read_to_string(directory().join("examples").join(name)).unwrap()
}

/// The objects of an example.
pub(crate) fn example(name: &str) -> Vec<Value> {
    objects(&example_text(name))
}

/// The documents of a YAML text.
pub(crate) fn objects(yaml: &str) -> Vec<Value> {
    serde_saphyr::from_multiple(yaml).unwrap_or_else(|e| panic!("{e}:\n{yaml}"))
}

/// The one object of a kind.
pub(crate) fn only<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let found: Vec<_> = objects.iter().filter(|object| object["kind"] == kind).collect();
    assert_eq!(found.len(), 1, "{kind}: {found:#?}");
    found[0]
}

/// The base with some of the components. `None`, after saying why, if nothing here renders it.
pub(crate) fn base_with(components: &[&str]) -> Option<Vec<Value>> {
    let dir = tempfile::tempdir().unwrap();
    let above = "../".repeat(dir.path().components().count() - 1);
    let path = |name: &str| format!("{above}{}", directory().join(name).strip_prefix("/").unwrap().display());
    let components: Vec<_> = components.iter().map(|name| path(&format!("components/{name}"))).collect();
    let kustomization = json!({
        "apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization",
        "resources": [path("base")], "components": components,
    });
    fs::write(dir.path().join("kustomization.yaml"), kustomization.to_string()).unwrap();
    Some(objects(&rendered(dir.path())?))
}

/// What a directory with a `kustomization.yaml` is rendered to. `None`, after saying why, if nothing here renders it.
pub(crate) fn rendered(dir: &Path) -> Option<String> {
    let (program, word) = match std::env::var_os("LARDER_TEST_KUSTOMIZE") {
        Some(kustomize) => (kustomize, "build"),
        None => (OsString::from("kubectl"), "kustomize"),
    };
    let output = match Command::new(&program).arg(word).arg(dir).output() {
        Ok(output) => output,
        Err(e) => {
            skipped(&format!("`{}` does not run: {e}; set LARDER_TEST_KUSTOMIZE", program.display()));
            return None;
        }
    };
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(String::from_utf8(output.stdout).unwrap())
}

/// The entries of a list; none if it is not there.
pub(crate) fn list<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

/// The containers of a pod's `spec`, those that only begin included.
pub(crate) fn containers(spec: &Value) -> impl Iterator<Item = &Value> {
    list(spec, "/initContainers").iter().chain(list(spec, "/containers"))
}

/// The entry of a list that has this name.
pub(crate) fn named<'a>(entries: &'a [Value], name: &str) -> &'a Value {
    entries.iter().find(|entry| entry["name"] == name).unwrap_or_else(|| panic!("no {name} in {entries:#?}"))
}

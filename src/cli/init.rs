//! `larder init`: makes models usable in directories of a pod, before its containers start.
//!
//! The words, the exit codes and the last lines of the log are those of KServe's storage-initializer, so that an image
//! whose entry point is this command can stand in for it. It needs nothing of the node but the socket for pods.

mod place;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokio::time::Instant;

use super::interruption;
use super::leases::{LeaseFor, this_pod};
use super::progress::Reporter;
use super::report::say;
use super::socket::{self, Mount};
use crate::client::{Model, Opener, default_socket};
use crate::fault::{Code, Diagnose, Problem};
use crate::model::{Bytes, ModelRef, RelPath};
use crate::wire::http::LeaseTerms;
use place::{Method, OpenFile, place};

/// How long a lease lasts that no pod ends: longer than any start takes, shorter than anybody forgets.
const LEASE_WITHOUT_POD: Duration = Duration::from_secs(24 * 3600);

const SAME: &str = "run the same version of larder in the pod and on the node";

/// The words of `larder init`.
#[derive(Debug, Args)]
pub(super) struct Init {
    /// What to make usable and in which directory; any number of pairs
    #[arg(value_name = "REF DEST", required = true, num_args = 1..)]
    pairs: Vec<String>,
    /// How a model gets into its directory
    #[arg(long, value_enum, default_value_t = Choice::Auto)]
    method: Choice,
    #[command(flatten)]
    mount: Mount,
    /// Longest wait for the daemon, such as `2m`
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration, default_value = "2m")]
    patience: Duration,
    #[command(flatten)]
    lease: LeaseFor,
}

/// How the method is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Choice {
    /// The first that works of `symlink`, `reflink` and `copy`
    Auto,
    /// Relative symbolic links into the mounted volume: no space, no time
    Symlink,
    /// Copies that share the volume's blocks, where the file system can (XFS, btrfs)
    Reflink,
    /// Copies, verified
    Copy,
}

impl Choice {
    fn methods(self) -> &'static [Method] {
        match self {
            Choice::Auto => &Method::ALL,
            Choice::Symlink => &[Method::Symlink],
            Choice::Reflink => &[Method::Reflink],
            Choice::Copy => &[Method::Copy],
        }
    }
}

/// What is wrong with the words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Error {
    #[error("cannot initialise: each reference needs a directory, and the number of words is {found}")]
    NotPairs { found: usize },
    #[error("cannot initialise: {variable} is neither a JSON list of patterns nor patterns separated by commas")]
    Patterns { variable: &'static str },
}

impl Diagnose for Error {
    fn code(&self) -> Code {
        Code::BadRequest
    }

    fn action(&self) -> String {
        match self {
            Error::NotPairs { .. } => "write `larder init REF DEST [REF DEST …]`".to_owned(),
            Error::Patterns { variable } => format!("write it as `{variable}='[\"*.safetensors\", \"*.json\"]'`"),
        }
    }
}

/// Makes each reference usable in its directory, one after the other.
pub(super) async fn run(init: &Init, at: Option<&Path>, quiet: bool) -> Result<(), Problem> {
    let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let pairs = pairs(&init.pairs, variable)?;
    let terms = match init.lease.terms(variable)? {
        Some(terms) => terms,
        None => own_terms(variable),
    };
    for pair in pairs {
        let began = Instant::now();
        let opener = at.map_or_else(|| Opener::new(&default_socket()), Opener::new).patience(init.patience);
        let mut reporter = if quiet { Reporter::Silent } else { Reporter::Lines(Box::new(say)) };
        let model = socket::open(opener.clone(), &pair.reference, &mut reporter, interruption()).await?;
        let (methods, dest) = (init.method.methods(), pair.dest.clone());
        let mounts = vec![init.mount.directory(&model)];
        let placing =
            tokio::task::spawn_blocking(move || use_in(&model, methods, &mounts, &dest).map(|used| (used, model)));
        let (used, model) = placing.await.map_err(|error| super::Error::Bug { why: error.to_string() })??;
        used.say(&model);
        if used.method == Method::Symlink {
            // The connection's lease keeps the version until this one does.
            opener.without_files().version(&model.info().version).lease(terms.clone()).open(&pair.reference).await?;
            say(&leased(&terms));
        }
        // Who runs KServe looks for these two lines.
        say(&format!("Successfully copied {} to {}", pair.text, pair.dest.display()));
        say(&format!("Model downloaded in {:.2} seconds.", began.elapsed().as_secs_f64()));
    }
    Ok(())
}

/// What a model was made usable by.
struct Used {
    method: Method,
    /// Methods that were tried before, and why they did not work.
    failed: Vec<(Method, String)>,
}

fn use_in(model: &Model, methods: &[Method], mounts: &[PathBuf], dest: &Path) -> Result<Used, Problem> {
    let strange =
        |what: &str| Problem::new(Code::InternalError, format!("cannot read what the daemon sent: {what}"), SAME);
    let mut files = Vec::new();
    for listed in model.files() {
        let path = RelPath::new(&listed.path).map_err(|error| strange(&error.to_string()))?;
        let digest = listed.digest.parse().map_err(|_| strange(&listed.digest))?;
        files.push((path, digest, listed.size, model.file(&listed.path)?));
    }
    let files: Vec<_> =
        files.iter().map(|(path, digest, size, file)| OpenFile { path, digest: *digest, size: *size, file }).collect();
    let (method, failed) = place(methods, &files, mounts, dest).map_err(|error| Problem::of(&error))?;
    Ok(Used { method, failed })
}

impl Used {
    fn say(&self, model: &Model) {
        for (method, why) in &self.failed {
            say(&format!("cannot use {}: {why}", method.text()));
        }
        let size = Bytes(model.files().map(|file| file.size).sum());
        say(&format!("used {} for {size} of {}", self.method.text(), model.info().reference));
    }
}

/// Until when the model is kept.
fn leased(terms: &LeaseTerms) -> String {
    let holder = terms.holder.as_deref().unwrap_or("anybody");
    match (&terms.pod, terms.ttl_seconds) {
        (Some(pod), _) => format!("leased for the pod {}/{}", pod.namespace, pod.name),
        (None, Some(seconds)) => format!(
            "leased for {holder} for {}: without POD_UID, POD_NAMESPACE and POD_NAME no lease ends with the pod",
            humantime::format_duration(Duration::from_secs(seconds))
        ),
        (None, None) => format!("leased for {holder} until it is released"),
    }
}

/// A lease for this pod; where the pod does not know itself, one for its host name that time ends.
fn own_terms(variable: impl Fn(&str) -> Option<String>) -> LeaseTerms {
    match this_pod(&variable) {
        Ok(pod) => LeaseTerms { pod: Some(pod), ..LeaseTerms::default() },
        Err(_) => LeaseTerms {
            holder: variable("HOSTNAME"),
            ttl_seconds: Some(LEASE_WITHOUT_POD.as_secs()),
            ..LeaseTerms::default()
        },
    }
}

/// A reference and the directory it is made usable in.
#[derive(Debug)]
struct Pair {
    reference: ModelRef,
    /// As it was written.
    text: String,
    dest: PathBuf,
}

fn pairs(words: &[String], variable: impl Fn(&str) -> Option<String>) -> Result<Vec<Pair>, Problem> {
    if words.is_empty() || !words.len().is_multiple_of(2) {
        return Err(Problem::of(&Error::NotPairs { found: words.len() }));
    }
    let include = patterns("STORAGE_ALLOW_PATTERNS", &variable)?;
    let exclude = patterns("STORAGE_IGNORE_PATTERNS", &variable)?;
    let pair = |words: &[String]| {
        let reference = ModelRef::parse_with(&as_ours(&words[0]), &include, &exclude);
        let reference = reference.map_err(|error| Problem::of(&error))?;
        Ok(Pair { reference, text: words[0].clone(), dest: PathBuf::from(&words[1]) })
    };
    words.chunks(2).map(pair).collect()
}

/// KServe writes a revision of the Hub as `hf://org/name:revision`.
fn as_ours(text: &str) -> String {
    let name = text.strip_prefix("hf://").and_then(|rest| rest.split_once(':'));
    match name {
        Some((repo, revision)) if !repo.contains(['@', '#']) && !revision.contains(['@', ':', '/']) => {
            format!("hf://{repo}@{revision}")
        }
        _ => text.to_owned(),
    }
}

/// The patterns of a variable, as KServe writes them: a JSON list, or words separated by commas.
fn patterns(name: &'static str, variable: impl Fn(&str) -> Option<String>) -> Result<Vec<String>, Problem> {
    let Some(text) = variable(name) else { return Ok(Vec::new()) };
    if text.trim_start().starts_with('[') {
        return serde_json::from_str(&text).map_err(|_| Problem::of(&Error::Patterns { variable: name }));
    }
    Ok(text.split(',').map(str::trim).filter(|pattern| !pattern.is_empty()).map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn words_are_pairs_and_an_odd_one_is_told() {
        let nothing = |_: &str| None;
        let read = pairs(&words("hf://o/n /mnt/models s3://bucket/p /mnt/other"), nothing).unwrap();
        let read: Vec<_> = read.iter().map(|p| (p.reference.to_string(), p.dest.display().to_string())).collect();
        let expected = [("hf://o/n@main", "/mnt/models"), ("s3://bucket/p", "/mnt/other")];
        assert_eq!(read, expected.map(|(a, b)| (a.to_owned(), b.to_owned())));
        for wrong in ["", "hf://o/n", "hf://o/n /a hf://o/m"] {
            let problem = pairs(&words(wrong), nothing).unwrap_err();
            assert!(problem.action.contains("larder init REF DEST"), "{}", problem.action);
        }
        assert_eq!(pairs(&words("ftp://x /a"), nothing).unwrap_err().code, Code::BadReference);
    }

    #[test]
    fn a_revision_written_as_kserve_writes_it_is_understood() {
        for (theirs, ours) in [
            ("hf://o/n:v1.0", "hf://o/n@v1.0"),
            ("hf://o/n", "hf://o/n"),
            ("hf://o/n@v1", "hf://o/n@v1"),
            ("https://host:8080/x", "https://host:8080/x"),
            ("s3://bucket/a:b", "s3://bucket/a:b"),
        ] {
            assert_eq!(as_ours(theirs), ours);
        }
    }

    #[test]
    fn patterns_are_a_json_list_or_words_between_commas() {
        let set = |value: &'static str| move |_: &str| Some(value.to_owned());
        assert_eq!(patterns("X", set("[\"*.json\", \"a,b\"]")), Ok(vec!["*.json".into(), "a,b".into()]));
        assert_eq!(patterns("X", set("*.json, *.txt,")), Ok(vec!["*.json".into(), "*.txt".into()]));
        assert_eq!(patterns("X", |_| None), Ok(vec![]));
        assert_eq!(patterns("X", set("[1]")).unwrap_err().code, Code::BadRequest);
        let allowed = |name: &str| (name == "STORAGE_ALLOW_PATTERNS").then(|| "*.json".to_owned());
        let read = pairs(&words("hf://o/n /a"), allowed).unwrap();
        assert_eq!(read[0].reference.to_string(), "hf://o/n@main#include=*.json");
    }

    #[test]
    fn a_pod_that_does_not_know_itself_leases_for_a_time() {
        let terms = own_terms(|name| (name == "HOSTNAME").then(|| "vllm-0".to_owned()));
        assert_eq!((terms.holder.as_deref(), terms.ttl_seconds), (Some("vllm-0"), Some(24 * 3600)));
        let terms = own_terms(|name| Some(format!("{name}-value")));
        assert_eq!((terms.pod.unwrap().uid.as_str(), terms.ttl_seconds), ("POD_UID-value", None));
    }
}

//! [`Selection`]: which files of a model are asked for.

use globset::{GlobBuilder, GlobSet, GlobSetBuilder};

use super::RelPath;
use crate::fault::{Code, Diagnose};

/// Patterns of files to take and to leave. Part of what is asked for: another selection is another model.
///
/// The rules are those of the Hub's clients: a file is taken when it matches any `include` (or there is none) and no
/// `exclude`; `*` also matches `/`; a pattern that ends in `/` means everything below.
#[derive(Clone, Default)]
pub struct Selection {
    include: Vec<String>,
    exclude: Vec<String>,
    includes: GlobSet,
    excludes: GlobSet,
}

/// A pattern that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot read the pattern {pattern:?}: {why}")]
pub struct PatternError {
    pattern: String,
    why: String,
}

impl Diagnose for PatternError {
    fn code(&self) -> Code {
        Code::BadPattern
    }

    fn action(&self) -> String {
        "write a pattern such as `*.safetensors` or `onnx/`; quote it, so that the shell does not expand it".into()
    }
}

impl Selection {
    /// Most patterns of one kind.
    pub const MAX_PATTERNS: usize = 64;
    /// Longest pattern, in bytes.
    pub const MAX_PATTERN_BYTES: usize = 256;

    /// Reads the patterns; their order and repetitions do not matter.
    pub fn new(include: &[String], exclude: &[String]) -> Result<Selection, PatternError> {
        let include = canonical(include)?;
        let exclude = canonical(exclude)?;
        Ok(Selection { includes: compile(&include)?, excludes: compile(&exclude)?, include, exclude })
    }

    /// Whether everything is asked for.
    pub fn is_everything(&self) -> bool {
        self.include.is_empty() && self.exclude.is_empty()
    }

    /// Whether the file is asked for.
    pub fn takes(&self, path: &RelPath) -> bool {
        (self.include.is_empty() || self.includes.is_match(path.as_str())) && !self.excludes.is_match(path.as_str())
    }

    /// The include patterns, sorted.
    pub fn include(&self) -> &[String] {
        &self.include
    }

    /// The exclude patterns, sorted.
    pub fn exclude(&self) -> &[String] {
        &self.exclude
    }
}

impl PartialEq for Selection {
    fn eq(&self, other: &Selection) -> bool {
        self.include == other.include && self.exclude == other.exclude
    }
}

impl Eq for Selection {}

impl std::fmt::Debug for Selection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Selection").field("include", &self.include).field("exclude", &self.exclude).finish()
    }
}

fn canonical(patterns: &[String]) -> Result<Vec<String>, PatternError> {
    let refuse = |pattern: &str, why: &str| {
        Err(PatternError { pattern: pattern.chars().take(80).collect(), why: why.to_owned() })
    };
    if patterns.len() > Selection::MAX_PATTERNS {
        return refuse(&patterns[Selection::MAX_PATTERNS], "there are more than 64 patterns");
    }
    for pattern in patterns {
        if pattern.is_empty() {
            return refuse(pattern, "it is empty");
        }
        if pattern.len() > Selection::MAX_PATTERN_BYTES {
            return refuse(pattern, "it is longer than 256 bytes");
        }
        if pattern.chars().any(char::is_control) {
            return refuse(pattern, "it has a control character");
        }
    }
    let mut patterns = patterns.to_vec();
    patterns.sort();
    patterns.dedup();
    Ok(patterns)
}

fn compile(patterns: &[String]) -> Result<GlobSet, PatternError> {
    let refuse = |pattern: &str, error: globset::Error| PatternError {
        pattern: pattern.to_owned(),
        why: error.kind().to_string(),
    };
    let mut set = GlobSetBuilder::new();
    for pattern in patterns {
        let text = if pattern.ends_with('/') { format!("{pattern}*") } else { pattern.clone() };
        set.add(GlobBuilder::new(&text).literal_separator(false).build().map_err(|e| refuse(pattern, e))?);
    }
    set.build().map_err(|e| refuse(&patterns.join(" "), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(include: &[&str], exclude: &[&str], names: &[&str]) -> Vec<String> {
        let own = |list: &[&str]| list.iter().map(|s| s.to_string()).collect::<Vec<_>>();
        let selection = Selection::new(&own(include), &own(exclude)).unwrap();
        names.iter().filter(|n| selection.takes(&RelPath::new(n).unwrap())).map(|n| n.to_string()).collect()
    }

    #[test]
    fn patterns_mean_what_the_hubs_clients_mean() {
        let names = ["config.json", "model.safetensors", "onnx/model.onnx", "onnx/config.json"];
        assert_eq!(taken(&[], &[], &names).len(), 4);
        assert_eq!(taken(&["*.json"], &[], &names), ["config.json", "onnx/config.json"]);
        assert_eq!(taken(&["onnx/"], &[], &names), ["onnx/model.onnx", "onnx/config.json"]);
        assert_eq!(taken(&["*.json"], &["onnx/*"], &names), ["config.json"]);
        assert_eq!(taken(&[], &["*"], &names), Vec::<String>::new());
    }

    #[test]
    fn bad_patterns_are_named() {
        for bad in ["", "[", "a{b", "x\ny", &"y".repeat(300)] {
            assert!(Selection::new(&[bad.to_owned()], &[]).is_err(), "{bad:?}");
        }
        assert!(Selection::new(&vec!["a".to_owned(); 65], &[]).is_err());
    }
}

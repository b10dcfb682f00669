//! [`RelPath`]: the only way a name from outside becomes a path.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A relative path inside a snapshot: UTF-8, `/` between components, never leaves the directory it is joined to.
///
/// Limits: [`RelPath::MAX_BYTES`] in all, [`RelPath::MAX_COMPONENT_BYTES`] for one name (NAME_MAX of Linux),
/// [`RelPath::MAX_DEPTH`] components.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RelPath(String);

/// Why a name cannot become a path. The name is printed escaped and shortened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("name {shown} {why}")]
pub struct RelPathError {
    shown: String,
    why: &'static str,
}

impl RelPath {
    /// Longest path, in bytes: leaves room for the root below PATH_MAX (4,096).
    pub const MAX_BYTES: usize = 1024;
    /// Longest component, in bytes.
    pub const MAX_COMPONENT_BYTES: usize = 255;
    /// Most components.
    pub const MAX_DEPTH: usize = 32;

    /// Checks a name from outside.
    pub fn new(name: &str) -> Result<RelPath, RelPathError> {
        let refuse = |why| {
            let shown: String = name.chars().take(80).collect();
            let ellipsis = if shown.len() < name.len() { "…" } else { "" };
            Err(RelPathError { shown: format!("{shown:?}{ellipsis}"), why })
        };
        if name.is_empty() {
            return refuse("is empty");
        }
        if name.len() > Self::MAX_BYTES {
            return refuse("is longer than 1,024 bytes");
        }
        if name.starts_with('/') {
            return refuse("is absolute");
        }
        if name.contains('\\') {
            return refuse("has a backslash");
        }
        if name.chars().any(char::is_control) {
            return refuse("has a control character");
        }
        let mut depth = 0;
        for component in name.split('/') {
            depth += 1;
            match component {
                "" => return refuse("has an empty component"),
                "." | ".." => return refuse("has a `.` or `..` component"),
                c if c.len() > Self::MAX_COMPONENT_BYTES => return refuse("has a component longer than 255 bytes"),
                _ => {}
            }
        }
        if depth > Self::MAX_DEPTH {
            return refuse("has more than 32 components");
        }
        Ok(RelPath(name.to_owned()))
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The path, to join to a directory of ours.
    pub fn as_path(&self) -> &Path {
        Path::new(&self.0)
    }

    /// The components, outermost first. Never empty.
    pub fn components(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }

    /// Every directory above the file, outermost first.
    pub fn parents(&self) -> impl Iterator<Item = &str> {
        self.0.match_indices('/').map(|(at, _)| &self.0[..at])
    }

    /// Whether `self` lies in the directory `dir`.
    pub fn is_inside(&self, dir: &RelPath) -> bool {
        self.0.strip_prefix(dir.as_str()).is_some_and(|rest| rest.starts_with('/'))
    }
}

impl fmt::Display for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for RelPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0)
    }
}

impl FromStr for RelPath {
    type Err = RelPathError;

    fn from_str(name: &str) -> Result<RelPath, RelPathError> {
        RelPath::new(name)
    }
}

impl Serialize for RelPath {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for RelPath {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<RelPath, D::Error> {
        RelPath::new(&String::deserialize(deserializer)?).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn hostile_names_are_refused() {
        let long = "x".repeat(5000);
        let wide = format!("a/{}", "x".repeat(256));
        let deep = vec!["d"; 33].join("/");
        for name in [
            "",
            "/",
            "/etc/passwd",
            "..",
            "../x",
            "a/..",
            "a/../../b",
            ".",
            "./a",
            "a//b",
            "a/",
            "a\0b",
            "a\\b",
            "..\\x",
            "C:\\x",
            "a\nb",
            "a\u{7f}",
            long.as_str(),
            wide.as_str(),
            deep.as_str(),
        ] {
            assert!(RelPath::new(name).is_err(), "{name:?} became a path");
        }
        for name in ["a", "a/b", "...", "..a", ".gitattributes", "ä/ü.json", "a b", "x:y", &"x".repeat(255)] {
            assert!(RelPath::new(name).is_ok(), "{name:?} was refused");
        }
    }

    #[test]
    fn refusals_are_short_and_escaped() {
        let message = RelPath::new(&format!("{}\u{1b}[31m", "a".repeat(4000))).unwrap_err().to_string();
        assert!(message.len() < 300, "{message}");
        assert!(!RelPath::new("a\u{1b}[31m").unwrap_err().to_string().contains('\u{1b}'));
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_stays_inside(name in "[a./\\\\\u{0}é ]{0,24}") {
            if let Ok(path) = RelPath::new(&name) {
                let joined = Path::new("/root/dir").join(path.as_path());
                let mut depth = 0i32;
                for component in joined.strip_prefix("/root/dir").unwrap().components() {
                    match component {
                        std::path::Component::Normal(_) => depth += 1,
                        other => prop_assert!(false, "{other:?} in {name:?}"),
                    }
                }
                prop_assert!(depth > 0);
                prop_assert_eq!(RelPath::new(path.as_str()).unwrap(), path);
            }
        }
    }
}

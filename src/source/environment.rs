//! The variables that sources are told by.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// Most entries of a directory of variables, and most bytes of one. A service account's key is some 2.5 KB.
const MAX_ENTRIES: usize = 256;
const MAX_VALUE_BYTES: u64 = 64 << 10;

/// The environment variables the sources read, captured once, so that tests need not change the process.
#[derive(Clone, Default)]
pub struct Environment(BTreeMap<String, Variable>);

#[derive(Clone)]
struct Variable {
    value: String,
    /// Where it was read, if it is not the process's.
    file: Option<PathBuf>,
}

impl Environment {
    /// The variables of this process that are UTF-8.
    pub fn of_process() -> Environment {
        std::env::vars_os().filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?))).collect()
    }

    /// These variables, and before them those of a directory: a file for each, named like the variable, whose value is its
    /// text. It is how a Secret is mounted, so what is not named like a variable (`..data`) is not looked at, and a
    /// newline at the end is not part of the value.
    ///
    /// The error says which file is wrong, and how: one that cannot be read is not taken for one that says nothing. At most
    /// 256 entries, and 64 KiB of each.
    pub(super) fn over(&self, directory: &Path) -> Result<Environment, String> {
        let at = |path: &Path| format!("`{}`", path.display());
        let unreadable = |path: &Path, error: &dyn std::fmt::Display| format!("{} cannot be read: {error}", at(path));
        let mut variables = self.0.clone();
        for (entry, seen) in fs::read_dir(directory).map_err(|e| unreadable(directory, &e))?.zip(1..) {
            if seen > MAX_ENTRIES {
                return Err(format!("{} has more than {MAX_ENTRIES} entries", at(directory)));
            }
            let path = entry.map_err(|e| unreadable(directory, &e))?.path();
            let Some(name) = path.file_name().and_then(|name| name.to_str()).filter(|name| is_variable(name)) else {
                continue;
            };
            let mut value = String::new();
            match File::open(&path).and_then(|file| file.take(MAX_VALUE_BYTES + 1).read_to_string(&mut value)) {
                // kubelet takes a key away while we look.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(unreadable(&path, &error)),
                Ok(length) if length as u64 > MAX_VALUE_BYTES => {
                    return Err(format!("{} is longer than {MAX_VALUE_BYTES} bytes", at(&path)));
                }
                Ok(_) => {}
            }
            let name = name.to_owned();
            variables
                .insert(name, Variable { value: value.trim_end_matches(['\n', '\r']).to_owned(), file: Some(path) });
        }
        Ok(Environment(variables))
    }

    /// The value of a variable, if it is set and not empty.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(|variable| variable.value.as_str()).filter(|value| !value.is_empty())
    }

    /// Where a person finds it, quoted: the file it was read from, or its name.
    pub fn origin(&self, name: &str) -> String {
        match self.0.get(name).and_then(|variable| variable.file.as_ref()) {
            Some(file) => format!("`{}`", file.display()),
            None => format!("`{name}`"),
        }
    }

    /// Whether a variable says yes: `1`, `true`, `yes` or `on`, in any case.
    pub fn flag(&self, name: &str) -> bool {
        self.get(name).is_some_and(|v| ["1", "true", "yes", "on"].contains(&v.to_ascii_lowercase().as_str()))
    }

    /// Every variable, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, variable)| (name.as_str(), variable.value.as_str()))
    }
}

impl<K: Into<String>, V: Into<String>> FromIterator<(K, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(pairs: I) -> Environment {
        let variable = |value: V| Variable { value: value.into(), file: None };
        Environment(pairs.into_iter().map(|(name, value)| (name.into(), variable(value))).collect())
    }
}

fn is_variable(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    name.bytes().all(plain) && !name.starts_with(|c: char| c.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mounted_secret_goes_before_the_process_and_is_read_as_it_is_now() {
        let dir = tempfile::tempdir().unwrap();
        let process = Environment::from_iter([("AWS_REGION", "here"), ("AWS_SECRET_ACCESS_KEY", "old")]);
        // As kubelet lays it out.
        fs::create_dir(dir.path().join("..2026")).unwrap();
        std::os::unix::fs::symlink("..2026", dir.path().join("..data")).unwrap();
        fs::write(dir.path().join("..2026/AWS_SECRET_ACCESS_KEY"), "new\r\n").unwrap();
        let link = dir.path().join("AWS_SECRET_ACCESS_KEY");
        std::os::unix::fs::symlink("..data/AWS_SECRET_ACCESS_KEY", &link).unwrap();
        fs::write(dir.path().join("not-a-variable"), [0xff]).unwrap();
        let merged = process.over(dir.path()).unwrap();
        assert_eq!(merged.iter().collect::<Vec<_>>(), [("AWS_REGION", "here"), ("AWS_SECRET_ACCESS_KEY", "new")]);
        assert_eq!(merged.origin("AWS_SECRET_ACCESS_KEY"), format!("`{}`", link.display()));
        assert_eq!(merged.origin("AWS_REGION"), "`AWS_REGION`");
        fs::remove_dir_all(dir.path().join("..2026")).unwrap();
        assert_eq!(process.over(dir.path()).unwrap().get("AWS_SECRET_ACCESS_KEY"), Some("old"));
    }

    #[test]
    fn what_cannot_be_read_is_told_and_never_taken_for_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let none = Environment::default();
        let said = |dir: &Path| none.over(dir).err().unwrap();
        assert!(said(&dir.path().join("none")).contains("none` cannot be read"));
        let file = dir.path().join("KEY");
        fs::write(&file, [0xff]).unwrap();
        assert!(said(dir.path()).contains("KEY` cannot be read"));
        fs::write(&file, vec![b'a'; MAX_VALUE_BYTES as usize]).unwrap();
        assert_eq!(none.over(dir.path()).unwrap().get("KEY").map(str::len), Some(MAX_VALUE_BYTES as usize));
        fs::write(&file, vec![b'a'; MAX_VALUE_BYTES as usize + 1]).unwrap();
        assert!(said(dir.path()).contains("is longer than 65536 bytes"));
        fs::remove_file(&file).unwrap();
        for n in 0..=MAX_ENTRIES {
            fs::write(dir.path().join(format!("V{n}")), "").unwrap();
        }
        assert!(said(dir.path()).contains("more than 256 entries"));
    }
}

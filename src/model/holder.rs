//! [`Holder`]: who holds a lease.

use std::fmt;

/// Longest name of a holder, in bytes.
pub const MAX_HOLDER_BYTES: usize = 253;

/// A pod, as the downward API names it. Kubernetes limits each of the three to 253 bytes or fewer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Pod {
    uid: String,
    namespace: String,
    name: String,
}

/// Who holds a lease.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Holder {
    /// A pod, until it is gone. Its uid is its identity: a pod of the same name may be another one.
    Pod(Pod),
    /// Somebody with a name.
    Name(String),
    /// What is at the other end of a connection, in words.
    Connection(String),
}

/// Why a text cannot name a holder.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot take a lease: {what} is {found:?}, not 1 to {MAX_HOLDER_BYTES} of the characters `A-Z a-z 0-9 . _ - / : @`"
)]
pub struct HolderError {
    /// Which part.
    pub what: &'static str,
    /// What was found, cut short.
    pub found: String,
}

fn checked(what: &'static str, text: &str) -> Result<String, HolderError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-/:@".contains(&b);
    if (1..=MAX_HOLDER_BYTES).contains(&text.len()) && text.bytes().all(plain) {
        Ok(text.to_owned())
    } else {
        Err(HolderError { what, found: text.chars().take(80).collect() })
    }
}

impl Pod {
    /// Checks each part: they come from outside, and stand in files, logs and tables.
    pub fn new(uid: &str, namespace: &str, name: &str) -> Result<Pod, HolderError> {
        Ok(Pod {
            uid: checked("the uid of the pod", uid)?,
            namespace: checked("the namespace of the pod", namespace)?,
            name: checked("the name of the pod", name)?,
        })
    }

    /// `metadata.uid`
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// `metadata.namespace`
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// `metadata.name`
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Holder {
    /// Somebody with a name.
    pub fn named(name: &str) -> Result<Holder, HolderError> {
        Ok(Holder::Name(checked("the name of the holder", name)?))
    }
}

impl fmt::Display for Holder {
    /// In words: `namespace/pod`, the name, or the process.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Pod(pod) => write!(f, "{}/{}", pod.namespace, pod.name),
            Holder::Name(name) => f.write_str(name),
            Holder::Connection(process) => f.write_str(process),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_speak_to_a_terminal_or_fill_a_log_are_refused() {
        assert!(Holder::named("ci-42/job:7@host").is_ok());
        for bad in ["", "a b", "a\nb", "\u{1b}[31m", "é", &"x".repeat(254)] {
            assert!(Holder::named(bad).is_err(), "{bad:?}");
            assert!(Pod::new(bad, "ns", "pod").is_err(), "{bad:?}");
        }
        let error = Pod::new("u", "", "p").unwrap_err().to_string();
        assert!(error.starts_with("cannot take a lease: the namespace of the pod is \"\""), "{error}");
    }

    #[test]
    fn a_holder_prints_as_people_name_it() {
        let pod = Pod::new("0b1c", "team-a", "vllm-0").unwrap();
        assert_eq!(Holder::Pod(pod).to_string(), "team-a/vllm-0");
        assert_eq!(Holder::named("ci").unwrap().to_string(), "ci");
    }
}

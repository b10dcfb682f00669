//! Notes: small files, each written whole, that say what must survive a restart: pulls to resume, leases, pins.

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::io::{names_in, read_small};
use super::layout::{Layout, Scratch};
use super::record::json_line;
use super::{Error, Volume};
use crate::model::{Holder, HolderError, ModelId, ModelRef, Pod, RelPath};

/// One kind of note: a directory of its own, and a file for each.
pub trait Note: Serialize + DeserializeOwned {
    /// As errors name it.
    const NOUN: &'static str;
    /// Where notes of this kind are.
    #[doc(hidden)]
    fn directory(layout: &DirectoriesOfNotes<'_>) -> PathBuf;
    /// The name of its file: one path component. A note under another name is not read.
    fn name(&self) -> String;
}

/// The directories notes can be in.
#[doc(hidden)]
pub struct DirectoriesOfNotes<'a>(&'a Layout);

/// A pull that is resumed when the process starts again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingPull {
    /// Its id: one path component.
    pub id: String,
    /// What it pulls.
    pub reference: ModelRef,
}

/// A lease that outlives the request that took it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseNote {
    /// Its id: one path component.
    pub id: String,
    /// The version that is leased.
    pub model: ModelId,
    /// Who holds it.
    pub holder: NotedHolder,
    /// When it was taken; milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// When it ends by itself, if time ends it; milliseconds since the Unix epoch.
    pub ends_at_ms: Option<u64>,
}

/// A [`Holder`] as it is written down.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NotedHolder {
    /// A pod.
    Pod {
        /// `metadata.uid`
        uid: String,
        /// `metadata.namespace`
        namespace: String,
        /// `metadata.name`
        name: String,
    },
    /// Somebody with a name.
    Name(String),
}

/// A reference that is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinNote {
    /// What is kept.
    pub reference: ModelRef,
    /// Who wants it kept; at least one.
    pub by: BTreeSet<PinnedBy>,
    /// When it was first pinned; milliseconds since the Unix epoch.
    pub since_ms: u64,
}

/// Who wants a reference kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PinnedBy {
    /// Somebody who asked for it.
    Operator,
    /// The configuration, which lists it.
    Config,
}

impl Note for PendingPull {
    const NOUN: &'static str = "pending pull";

    fn directory(layout: &DirectoriesOfNotes<'_>) -> PathBuf {
        layout.0.pulls()
    }

    fn name(&self) -> String {
        self.id.clone()
    }
}

impl Note for LeaseNote {
    const NOUN: &'static str = "lease";

    fn directory(layout: &DirectoriesOfNotes<'_>) -> PathBuf {
        layout.0.leases()
    }

    fn name(&self) -> String {
        self.id.clone()
    }
}

impl Note for PinNote {
    const NOUN: &'static str = "pin";

    fn directory(layout: &DirectoriesOfNotes<'_>) -> PathBuf {
        layout.0.pins()
    }

    fn name(&self) -> String {
        PinNote::name_for(&self.reference)
    }
}

impl PinNote {
    /// The name of the note for a reference: the first 32 hexadecimal digits of BLAKE3 over its text.
    pub fn name_for(reference: &ModelRef) -> String {
        blake3::hash(reference.to_string().as_bytes()).to_hex()[..32].to_owned()
    }
}

impl NotedHolder {
    /// `None` for a connection: it does not outlive itself.
    pub fn of(holder: &Holder) -> Option<NotedHolder> {
        match holder {
            Holder::Pod(pod) => Some(NotedHolder::Pod {
                uid: pod.uid().to_owned(),
                namespace: pod.namespace().to_owned(),
                name: pod.name().to_owned(),
            }),
            Holder::Name(name) => Some(NotedHolder::Name(name.clone())),
            Holder::Connection(_) => None,
        }
    }

    /// Checked again: somebody may have written the file by hand.
    pub fn holder(&self) -> Result<Holder, HolderError> {
        match self {
            NotedHolder::Pod { uid, namespace, name } => Ok(Holder::Pod(Pod::new(uid, namespace, name)?)),
            NotedHolder::Name(name) => Holder::named(name),
        }
    }
}

impl Volume {
    /// Writes a note, or writes it anew. Durable on return.
    pub fn write_note<N: Note>(&self, note: &N) -> Result<(), Error> {
        let path = self.note_path::<N>(&note.name())?;
        self.disk.replace(&self.layout.scratch(Scratch::File), &path, &json_line(note), 0o600)
    }

    /// Takes a note away. Not durable on return: one that comes back after a power cut only keeps or resumes too much.
    pub fn remove_note<N: Note>(&self, name: &str) -> Result<(), Error> {
        let path = self.note_path::<N>(name)?;
        self.disk.unlink(&path).map(drop)
    }

    /// All notes of a kind that can be read, sorted by name; those that cannot are returned as errors next to them.
    pub fn notes<N: Note>(&self) -> Result<(Vec<N>, Vec<Error>), Error> {
        let (mut notes, mut errors) = (Vec::new(), Vec::new());
        for name in names_in(&N::directory(&DirectoriesOfNotes(&self.layout)))? {
            match self.read_note(&name) {
                Ok(note) => notes.extend(note),
                Err(error) => errors.push(error),
            }
        }
        Ok((notes, errors))
    }

    /// `None` when it was removed since its name was listed.
    fn read_note<N: Note>(&self, name: &str) -> Result<Option<N>, Error> {
        let path = N::directory(&DirectoriesOfNotes(&self.layout)).join(name);
        let corrupt = |found: String| Error::Corrupt { verb: "read", noun: N::NOUN, path: path.clone(), found };
        let Some(bytes) = read_small(&path)? else { return Ok(None) };
        let line = bytes.strip_suffix(b"\n").ok_or_else(|| corrupt("it does not end in a newline".into()))?;
        let note: N = serde_json::from_slice(line).map_err(|e| corrupt(e.to_string()))?;
        if note.name() != name {
            return Err(corrupt(format!("it is the {} `{}`", N::NOUN, note.name())));
        }
        Ok(Some(note))
    }

    fn note_path<N: Note>(&self, name: &str) -> Result<PathBuf, Error> {
        // A slash would make it another directory's file.
        let name = RelPath::new(&name.replace('/', "//"));
        let name = name.map_err(|source| Error::Name { noun: N::NOUN, source })?;
        Ok(N::directory(&DirectoriesOfNotes(&self.layout)).join(name.as_path()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::{Code, Diagnose};
    use std::fs;

    #[test]
    fn notes_survive_and_garbage_is_told_and_hides_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let pull = |id: &str| PendingPull { id: id.into(), reference: "hf://o/n@main".parse().unwrap() };
        let volume = Volume::open(dir.path()).unwrap();
        for id in ["1", "2"] {
            volume.write_note(&pull(id)).unwrap();
        }
        fs::write(dir.path().join("pulls/3"), "{").unwrap();
        fs::write(dir.path().join("pulls/4"), fs::read(dir.path().join("pulls/1")).unwrap()).unwrap();
        volume.remove_note::<PendingPull>("1").unwrap();
        drop(volume);
        let volume = Volume::open(dir.path()).unwrap();
        let (pulls, errors) = volume.notes::<PendingPull>().unwrap();
        assert_eq!(pulls, [pull("2")]);
        assert_eq!(errors.iter().map(|e| e.code()).collect::<Vec<_>>(), [Code::StoreCorrupt; 2]);
        for id in ["", "..", "a/b", "../refs/x"] {
            assert_eq!(volume.write_note(&pull(id)).unwrap_err().code(), Code::UnsafeName, "{id}");
            assert_eq!(volume.remove_note::<PendingPull>(id).unwrap_err().code(), Code::UnsafeName, "{id}");
        }
    }

    #[test]
    fn a_holder_is_read_as_it_was_written_and_checked_again() {
        let pod = Holder::Pod(Pod::new("uid-1", "ns", "pod-0").unwrap());
        for holder in [pod, Holder::named("ci").unwrap()] {
            assert_eq!(NotedHolder::of(&holder).unwrap().holder(), Ok(holder));
        }
        assert_eq!(NotedHolder::of(&Holder::Connection("process 1".into())), None);
        assert!(NotedHolder::Name("\u{1b}[31m".into()).holder().is_err());
    }
}

//! `larder prepare`: what only root can do for a daemon that is not root.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};

use clap::Args;

use crate::config::{Config, ServeConfig};
use crate::fault::{Code, Diagnose, Problem};
use crate::store::Volume;

/// The words of `larder prepare`.
#[derive(Debug, Args)]
pub(super) struct Prepare {
    /// Who will run the daemon, by number: `7437:7437`
    #[arg(long, value_name = "USER:GROUP", value_parser = owner)]
    owner: Owner,
}

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Owner {
    user: u32,
    group: u32,
}

fn owner(text: &str) -> Result<Owner, String> {
    let parts = text.split_once(':').and_then(|(user, group)| Some((user.parse().ok()?, group.parse().ok()?)));
    let (user, group) = parts.ok_or("it is not two numbers such as `7437:7437`")?;
    Ok(Owner { user, group })
}

/// Why the directory of the socket is not given away.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("cannot give `{}` away: it also holds {name:?}, which is not of larder", dir.display())]
    Shared { dir: PathBuf, name: String },
    #[error("cannot {verb} `{}`: {source}", dir.display())]
    Disk { verb: &'static str, dir: PathBuf, source: io::Error },
}

impl Diagnose for Error {
    fn code(&self) -> Code {
        Code::ListenFailed
    }

    fn action(&self) -> String {
        match self {
            Error::Shared { .. } => "set `serve.socket` (LARDER_SOCKET) to a path in a directory of its own".to_owned(),
            Error::Disk { .. } => "run it as root with CAP_CHOWN, where the directory can be written".to_owned(),
        }
    }
}

/// Makes the directories that are missing, and gives them away.
pub(super) fn run(config: &Config, words: &Prepare) -> Result<(), Problem> {
    let Owner { user, group } = words.owner;
    Volume::give_root(&config.volume.root, user, group).map_err(|error| Problem::of(&error))?;
    give_socket_dir(&config.serve, words.owner).map_err(|error| Problem::of(&error))
}

/// The daemon itself makes a directory of the pods' socket that is not there yet.
fn give_socket_dir(serve: &ServeConfig, owner: Owner) -> Result<(), Error> {
    let Some(dir) = serve.socket.parent() else { return Ok(()) };
    let failed = |verb| move |source| Error::Disk { verb, dir: dir.to_owned(), source };
    fs::create_dir_all(dir).map_err(failed("create"))?;
    let found = fs::metadata(dir).map_err(failed("look at"))?;
    if (found.uid(), found.gid()) == (owner.user, owner.group) {
        return Ok(());
    }
    for entry in fs::read_dir(dir).map_err(failed("read"))? {
        let entry = entry.map_err(failed("read"))?;
        if !is_ours(&entry.path(), serve) {
            return Err(Error::Shared { dir: dir.to_owned(), name: entry.file_name().to_string_lossy().into_owned() });
        }
    }
    chown(dir, Some(owner.user), Some(owner.group)).map_err(failed("give away"))
}

/// A socket of ours, or the directory of one.
fn is_ours(path: &Path, serve: &ServeConfig) -> bool {
    let of_pods = serve.pod_socket.as_deref();
    path == serve.socket || of_pods.is_some_and(|socket| path == socket || Some(path) == socket.parent())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_two_numbers() {
        assert_eq!(owner("7437:0"), Ok(Owner { user: 7437, group: 0 }));
        for wrong in ["", "7437", "larder:larder", "1:2:3", "-1:1", "4294967296:1"] {
            assert!(owner(wrong).is_err(), "{wrong}");
        }
    }
}

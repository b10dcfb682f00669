//! [`Glances`]: snapshots that were looked at as a whole a moment ago. Until then a look at their directories is enough: no
//! name in a directory can come, go or become another one's without changing the times of the directory.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::Error;
use super::io::look_at;
use crate::model::RelPath;

/// For how long: as late is noticed what happens above a snapshot, or to a file that several names share.
const GOOD_FOR: Duration = Duration::from_secs(1);
/// Most snapshots that are remembered.
const MAX_SNAPSHOTS: usize = 1024;

#[derive(Default)]
pub(super) struct Glances(Mutex<HashMap<RelPath, Glance>>);

struct Glance {
    since: Instant,
    directories: Vec<(PathBuf, Look)>,
}

/// What of a directory changes when something in it does.
#[derive(Debug, PartialEq, Eq)]
struct Look {
    device: u64,
    inode: u64,
    mode: u32,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Look {
    fn at(path: &Path) -> Result<Option<Look>, Error> {
        Ok(look_at(path)?.map(|found| Look {
            device: found.dev(),
            inode: found.ino(),
            mode: found.mode(),
            modified: (found.mtime(), found.mtime_nsec()),
            changed: (found.ctime(), found.ctime_nsec()),
        }))
    }
}

impl Glances {
    /// Whether `look` finds the snapshot right, or has done so a moment ago and its directories are the same since.
    pub(super) fn or_look(
        &self,
        snapshot: &RelPath,
        directories: impl FnOnce() -> Vec<PathBuf>,
        look: impl FnOnce() -> Result<bool, Error>,
    ) -> Result<bool, Error> {
        if self.is_fresh(snapshot)? {
            return Ok(true);
        }
        let since = Instant::now();
        // Before: what changes while all is looked at is seen the next time.
        let directories: Result<Option<Vec<_>>, Error> =
            directories().into_iter().map(|path| Ok(Look::at(&path)?.map(|look| (path, look)))).collect();
        let is_right = look()?;
        let mut glances = self.0.lock().expect("no panic while glances are held");
        match directories? {
            Some(directories) if is_right => {
                if glances.len() >= MAX_SNAPSHOTS {
                    glances.clear();
                }
                glances.insert(snapshot.clone(), Glance { since, directories });
            }
            _ => drop(glances.remove(snapshot)),
        }
        Ok(is_right)
    }

    fn is_fresh(&self, snapshot: &RelPath) -> Result<bool, Error> {
        let glances = self.0.lock().expect("no panic while glances are held");
        let Some(glance) = glances.get(snapshot).filter(|glance| glance.since.elapsed() < GOOD_FOR) else {
            return Ok(false);
        };
        for (path, look) in &glance.directories {
            if Look::at(path)?.as_ref() != Some(look) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::fs;

    #[test]
    fn only_what_has_not_changed_is_not_looked_at_again() {
        let dir = tempfile::tempdir().unwrap();
        let (top, below) = (dir.path().join("top"), dir.path().join("top/below"));
        fs::create_dir_all(&below).unwrap();
        fs::write(below.join("file"), "1").unwrap();
        let (glances, name, looks) = (Glances::default(), RelPath::new("top").unwrap(), Cell::new(0));
        let is_right = |answer| {
            let look = || {
                looks.set(looks.get() + 1);
                Ok(answer)
            };
            glances.or_look(&name, || vec![top.clone(), below.clone()], look).unwrap()
        };
        assert!(!is_right(false) && !is_right(false));
        assert_eq!(looks.replace(0), 2, "what is wrong is looked at each time");
        assert!(is_right(true) && is_right(true));
        assert_eq!(looks.replace(0), 1);
        let changes: [&dyn Fn(); 4] = [
            &|| fs::rename(below.join("file"), below.join("other")).unwrap(),
            &|| fs::write(below.join("more"), "").unwrap(),
            &|| fs::remove_file(below.join("more")).unwrap(),
            &|| {
                fs::rename(&top, dir.path().join("gone")).unwrap();
                fs::create_dir_all(&below).unwrap();
            },
        ];
        for (at, change) in changes.into_iter().enumerate() {
            change();
            assert!(is_right(true));
            assert_eq!(looks.replace(0), 1, "change {at}");
        }
        fs::remove_dir_all(&top).unwrap();
        assert!(!is_right(false));
    }

    #[test]
    fn what_was_looked_at_long_ago_is_looked_at_again() {
        let (dir, glances) = (tempfile::tempdir().unwrap(), Glances::default());
        let name = RelPath::new("x").unwrap();
        assert!(glances.or_look(&name, || vec![dir.path().to_owned()], || Ok(true)).unwrap());
        assert!(glances.is_fresh(&name).unwrap());
        glances.0.lock().unwrap().get_mut(&name).unwrap().since -= GOOD_FOR;
        assert!(!glances.is_fresh(&name).unwrap());
    }

    #[test]
    fn memory_has_a_limit() {
        let (dir, glances) = (tempfile::tempdir().unwrap(), Glances::default());
        for at in 0..MAX_SNAPSHOTS + 10 {
            let name = RelPath::new(&at.to_string()).unwrap();
            assert!(glances.or_look(&name, || vec![dir.path().to_owned()], || Ok(true)).unwrap());
        }
        assert!(glances.0.lock().unwrap().len() <= MAX_SNAPSHOTS);
    }
}

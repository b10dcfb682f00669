//! Every call of a command in the order it was made: what has a name has its bytes on the disk before, and has the name on
//! the disk when the command ends. A power cut shows a missing fsync only by chance, because another one, of the index or of
//! the next file, brings to the disk what it should have brought; here it shows each time.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::larder::Home;
use super::models::{Models, bytes};
use super::skip::skipped;
use super::strace::{self, Call};

/// Calls that write, name or make durable.
const CALLS: &str = "write,pwrite64,writev,pwritev,ftruncate,fsync,fdatasync,rename,renameat,renameat2,link,\
                     linkat,symlink,symlinkat,mkdir,mkdirat,unlink,unlinkat,rmdir";
/// Where nothing has been promised yet: what is there is found again or swept.
const UNPROMISED: [&str; 3] = ["index-v1", "ingests", "quarantine"];

/// What has been done that a power cut could undo.
#[derive(Debug, Default)]
struct Undurable {
    /// Files with bytes that may be in memory only.
    bytes: BTreeSet<PathBuf>,
    /// Names that were given or taken since their directory was made durable.
    names: BTreeSet<PathBuf>,
    /// What an fsync that is under way makes durable: what there was when it began.
    under_way: BTreeMap<u32, (BTreeSet<PathBuf>, BTreeSet<PathBuf>)>,
    /// How many names were given or taken in all.
    promised: usize,
    /// Names that were given before their bytes were durable.
    early: Vec<PathBuf>,
}

impl Undurable {
    fn begins(&mut self, call: &Call, root: &Path) {
        match call.name.as_str() {
            "fsync" | "fdatasync" => {
                let of = call.paths[0].as_path();
                let bytes = self.bytes.iter().filter(|path| *path == of).cloned().collect();
                let names = self.names.iter().filter(|path| path.parent() == Some(of)).cloned().collect();
                self.under_way.insert(call.thread, (bytes, names));
            }
            "write" | "pwrite64" | "writev" | "pwritev" | "ftruncate" => {
                self.bytes.extend(call.paths.iter().filter(|path| path.starts_with(root)).cloned());
            }
            "rename" | "renameat" | "renameat2" | "link" | "linkat" if is_promised(&call.paths[1], root) => {
                self.early.extend(self.bytes.get(&call.paths[0]).map(|_| call.paths[1].clone()));
            }
            _ => {}
        }
    }

    fn has_worked(&mut self, call: &Call, root: &Path) {
        let named = match call.name.as_str() {
            "fsync" | "fdatasync" => {
                let (bytes, names) = self.under_way.remove(&call.thread).expect("it has begun");
                self.bytes.retain(|path| !bytes.contains(path));
                self.names.retain(|path| !names.contains(path));
                return;
            }
            "rename" | "renameat" | "renameat2" | "link" | "linkat" | "symlink" | "symlinkat" => &call.paths[1],
            "mkdir" | "mkdirat" => &call.paths[0],
            // A note, a manifest or a link that comes back after a power cut keeps too much, or is swept. A record that
            // comes back names bytes that are gone.
            "unlink" | "unlinkat" if call.paths[0].starts_with(root.join("refs")) => &call.paths[0],
            _ => return,
        };
        if is_promised(named, root) {
            self.names.insert(named.clone());
            self.promised += 1;
        }
    }
}

fn is_promised(path: &Path, root: &Path) -> bool {
    path.strip_prefix(root)
        .is_ok_and(|path| !UNPROMISED.iter().any(|dir| path.starts_with(dir)) && path != Path::new(""))
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_command_has_named_is_on_the_disk_when_it_ends() {
    if let Some(why) = strace::unusable() {
        return skipped(&why);
    }
    let (home, mut models) = (Home::new(), Models::default());
    let shared = ("weights/shared.bin", bytes("shared", 9_000));
    let large = bytes("large", (3 << 20) + 17);
    let first = models.put(home.path(), "first", &[("model.bin", large), shared.clone()]);
    let second = models.put(home.path(), "second", &[("own.bin", bytes("second", 5_000)), shared]);
    let third = models.put(home.path(), "third", &[("a/b/own.bin", bytes("third", 5_000))]);
    // How many names each gives or takes in the volume, at least.
    let commands: [(&[&str], usize); 9] = [
        // The directories of the volume, two blobs, a manifest, a snapshot and the way to it, a record, a pin.
        (&["pull", "-q", &first], 256 + 10 + 6),
        (&["pull", "-q", &second], 4),
        (&["pull", "-q", &third], 4),
        (&["pin", &first], 1),
        (&["open", "--lease-for", "worker", &second], 1),
        (&["unpin", &first], 0),
        (&["remove", &first], 1),
        (&["remove", &third], 1),
        (&["list"], 0),
    ];
    let root = home.root();
    for (words, at_least) in commands {
        let command = home.command(words);
        let (output, calls) = tokio::task::spawn_blocking(move || strace::calls(&command, CALLS)).await.unwrap();
        let mut undurable = Undurable::default();
        for call in &calls {
            match call.step {
                strace::Step::Begins => undurable.begins(call, &root),
                strace::Step::HasWorked => undurable.has_worked(call, &root),
            }
        }
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {said}");
        assert!(undurable.promised >= at_least, "{words:?} named only {}: {said}", undurable.promised);
        assert_eq!(undurable.early, [] as [PathBuf; 0], "{words:?} gave names to bytes that a power cut would take");
        assert!(undurable.names.is_empty(), "{words:?} ended, and a power cut would undo {:#?}", undurable.names);
    }
}

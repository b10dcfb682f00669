//! Nothing a reader does can change what others read, or it is found before the next open.
//!
//! A root process with a container's default capabilities tries every operation it could, through each way of access. After
//! each, either no byte of the store has changed, or the next open finds it: it hands out no wrong byte, the blob goes to
//! quarantine and comes again.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use larder::fault::Code;
use larder::model::{Digest, ManifestFile, RelPath};

use crate::support::hostile_reader::{Access, HostileReader, NOTHING_MORE, is_possible, operations};
use crate::support::model_origin::ModelOrigin;
use crate::support::node::{TestNode, files_below};

const WEIGHTS: &str = "d/weights";
const CONFIG: &str = "config.json";
const CONFIG_BYTES: &[u8] = b"{\"layers\": 2}";

fn weights() -> Vec<u8> {
    (0..300_000u32).map(|n| (n % 251) as u8).collect()
}

/// How the attacker reaches the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    ReadOnlyTree,
    WritableTree,
    Descriptor,
    /// Opened as where no mount may be made.
    DescriptorWithoutMount,
}

/// What became of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Unchanged,
    /// No byte, but a name, a mode or an inode; the open put it right.
    Mended,
    /// Wrong bytes were found, put into quarantine and pulled again.
    Found,
}

/// Operations, and what became of the store after each step of them.
type Table = Vec<(String, Vec<Outcome>)>;

struct Siege {
    node: TestNode,
    origin: ModelOrigin,
}

impl Siege {
    async fn lay() -> Siege {
        let origin = ModelOrigin::start().await;
        origin.put("m", WEIGHTS, &weights());
        origin.put("m", CONFIG, CONFIG_BYTES);
        let node = TestNode::new().start().await;
        node.ready(&origin.reference("m")).await;
        Siege { node, origin }
    }

    fn model(&self) -> String {
        self.origin.reference("m")
    }

    fn access<'a>(&self, way: Way, public: &'a Path) -> Access<'a> {
        let weights = weights();
        let file = || ManifestFile {
            path: RelPath::new(WEIGHTS).unwrap(),
            digest: Digest::of(&weights),
            size: weights.len() as u64,
        };
        match way {
            Way::ReadOnlyTree => Access::Tree { public, writable: false },
            Way::WritableTree => Access::Tree { public, writable: true },
            Way::Descriptor => Access::Descriptor(self.node.cache().descriptor(&file()).unwrap()),
            Way::DescriptorWithoutMount => {
                let hex = file().digest.to_hex();
                let blob = self.node.volume().join("blobs").join(&hex[..2]).join(hex);
                Access::Descriptor(File::open(blob).unwrap())
            }
        }
    }

    /// The first thing that is not as larder left it, if anything is.
    fn damage(&self, dir: &Path) -> Option<String> {
        let public = self.node.volume().join("public");
        for blob in files_below(&self.node.volume().join("blobs")) {
            let name = blob.file_name().unwrap().to_str().unwrap().to_owned();
            if Digest::of(&fs::read(&blob).unwrap()).to_hex() != name {
                return Some(format!("blob {name}"));
            }
            if fs::metadata(&blob).unwrap().mode() & 0o7777 != 0o444 {
                return Some(format!("mode of blob {name}"));
            }
        }
        for ancestor in dir.ancestors().take_while(|ancestor| ancestor.starts_with(&public)) {
            match fs::symlink_metadata(ancestor) {
                Ok(found) if found.is_dir() && found.mode() & 0o7777 == if ancestor == dir { 0o555 } else { 0o755 } => {
                }
                _ => return Some(ancestor.display().to_string()),
            }
        }
        let names: Vec<_> = files_below(dir);
        if names != [dir.join(CONFIG), dir.join(WEIGHTS)] || fs::read_dir(dir).unwrap().count() != 2 {
            return Some(format!("{names:?}"));
        }
        let right = |name: &str, bytes: &[u8]| fs::read(dir.join(name)).is_ok_and(|found| found == bytes);
        let right = right(CONFIG, CONFIG_BYTES) && right(WEIGHTS, &weights());
        (!right).then(|| "bytes of the snapshot".to_owned())
    }

    /// Opens, and checks every byte that is handed out.
    async fn open_and_check(&self, cell: &str) -> Outcome {
        let seen = ["wrong", "renewed"].map(|outcome| format!("larder_proofs_total{{outcome=\"{outcome}\"}}"));
        let count = || {
            let mended = self.node.counted("larder_snapshots_mended_total");
            (self.node.counted(&seen[0]), self.node.counted(&seen[1]), mended)
        };
        let before = count();
        let opened = self.node.open(&self.model()).await;
        if let Err((code, told)) = &opened {
            assert_eq!(*code, Code::NotReady, "{cell}: {told}");
            assert!(told.contains(WEIGHTS), "{cell}: {told}");
            let quarantine = files_below(&self.node.volume().join("quarantine"));
            assert_eq!(quarantine.len(), 1, "{cell}: {quarantine:?}");
            fs::remove_file(&quarantine[0]).unwrap();
            self.node.ready(&self.model()).await;
        }
        let dir = self.node.open(&self.model()).await.unwrap_or_else(|(_, told)| panic!("{cell}: {told}"));
        assert_eq!(self.damage(&dir), None, "{cell}: after the open");
        for (path, bytes) in [(WEIGHTS, weights()), (CONFIG, CONFIG_BYTES.to_vec())] {
            let path = RelPath::new(path).unwrap();
            let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
            let file = self.node.cache().descriptor(&ManifestFile { path, digest, size }).unwrap();
            let mut found = vec![0; bytes.len()];
            file.read_exact_at(&mut found, 0).unwrap();
            assert_eq!((found, file.metadata().unwrap().len()), (bytes, size), "{cell}: through a descriptor");
        }
        match (opened.is_err(), count() == before) {
            (true, _) => Outcome::Found,
            (false, false) => Outcome::Mended,
            (false, true) => Outcome::Unchanged,
        }
    }

    /// Tries every operation by one way.
    async fn withstand(&self, way: Way) -> Table {
        let public = self.node.volume().join("public");
        let dir = self.node.open(&self.model()).await.unwrap();
        let file = dir.strip_prefix(&public).unwrap().join(WEIGHTS).to_str().unwrap().to_owned();
        let mut table = Vec::new();
        for operation in operations() {
            let cell = format!("{way:?}: {operation}");
            let access = self.access(way, &public);
            let hidden = self.node.beside_volume();
            let (mut attacker, mut said) = HostileReader::start(access, &file, hidden, &operation);
            let mut outcomes = Vec::new();
            // Once after it did what it could, and once more after it used what it still holds.
            while said != NOTHING_MORE && outcomes.len() < 2 {
                let damage = self.damage(&dir);
                let outcome = self.open_and_check(&cell).await;
                assert!(damage.is_none() || outcome != Outcome::Unchanged, "{cell}: {damage:?} was not found");
                println!("| {way:?} | {operation} | {said} | {outcome:?} | {} |", damage.unwrap_or_default());
                outcomes.push(outcome);
                said = attacker.go_on();
            }
            drop(attacker);
            // What the attacker left beside our files is no concern of ours, but must not be in its own way next time.
            for entry in fs::read_dir(&public).unwrap().map(|entry| entry.unwrap()) {
                if entry.file_name() == "loot" {
                    fs::remove_dir_all(entry.path()).unwrap();
                }
            }
            assert!(!outcomes.is_empty(), "{cell}: it did nothing");
            table.push((operation, outcomes));
        }
        table
    }
}

fn changed(table: &Table) -> Vec<&str> {
    let changed = table.iter().filter(|(_, outcomes)| outcomes.iter().any(|outcome| *outcome != Outcome::Unchanged));
    changed.map(|(operation, _)| operation.as_str()).collect()
}

async fn outcomes(way: Way) -> Option<Table> {
    if !is_possible() {
        return None;
    }
    let siege = Siege::lay().await;
    let table = siege.withstand(way).await;
    assert!(table.len() >= 40, "only {} operations", table.len());
    Some(table)
}

#[tokio::test]
async fn a_tree_that_is_mounted_read_only_is_not_changed_by_anything() {
    if let Some(table) = outcomes(Way::ReadOnlyTree).await {
        assert_eq!(changed(&table), Vec::<&str>::new());
    }
}

#[tokio::test]
async fn what_is_changed_through_a_tree_that_is_mounted_to_write_is_found_before_the_next_open() {
    if let Some(table) = outcomes(Way::WritableTree).await {
        for operation in ["write", "write_and_set_times_back", "map_and_store_later", "replace_directory", "chmod"] {
            assert!(changed(&table).contains(&operation), "{operation} did nothing: the test proves nothing");
        }
    }
}

#[tokio::test]
async fn nothing_can_be_changed_through_a_descriptor() {
    if let Some(table) = outcomes(Way::Descriptor).await {
        assert_eq!(changed(&table), Vec::<&str>::new());
    }
}

#[tokio::test]
async fn what_is_changed_through_a_descriptor_where_no_mount_may_be_made_is_found_before_the_next_open() {
    if let Some(table) = outcomes(Way::DescriptorWithoutMount).await {
        for operation in ["reopen_and_write", "fchmod_given_descriptor"] {
            assert!(changed(&table).contains(&operation), "{operation} did nothing: the test proves nothing");
        }
    }
}

//! How much the page cache can still take: what the node has available, and the memory limits this process runs under.
//!
//! Page cache is charged to who touches it first. Under a memory limit a warm-up therefore fills only that limit, and the
//! kernel throws out what came first for what comes next: that trap is seen before anything is read.

use std::fs;
use std::path::{Path, PathBuf};

use crate::model::Bytes;

/// The part of a memory that warm-ups leave to others.
const RESERVE_PERCENT: u64 = 10;

/// The memory this process may fill, at one moment.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// `None`: the node does not say.
    node: Option<Node>,
    limits: Vec<Limit>,
}

/// What the kernel says of the whole node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Node {
    total_bytes: u64,
    /// What could be had without swapping: page cache that can be dropped is part of it.
    available_bytes: u64,
}

/// A memory cgroup that we are in and that has less than the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Limit {
    pub(super) bytes: u64,
    /// What is charged to it and is not page cache.
    held_bytes: u64,
    pub(super) place: PathBuf,
}

/// How many bytes may be read, and what keeps it from being more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Allowance {
    pub(super) bytes: u64,
    pub(super) bound: Bound,
}

/// What there is too little of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Bound {
    /// Nobody can say how much there is.
    Unknown,
    /// The memory of the node.
    Node { available: Bytes, reserve: Bytes },
    /// The memory limit of this process.
    Limit(Limit),
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Bound::Unknown => f.write_str("`/proc/meminfo` does not say how much memory is available"),
            Bound::Node { available, reserve } => {
                write!(f, "the node has {available} of memory available, of which {reserve} are left to others")
            }
            Bound::Limit(limit) => limit.fmt(f),
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "larder runs under a memory limit of {} (`{}`): the page cache it fills is charged to that limit and thrown \
             out; remove the memory limit (keep the request)",
            Bytes(self.bytes),
            self.place.display()
        )
    }
}

impl Memory {
    /// As it is now.
    pub(super) fn of_this_process() -> Memory {
        let node = fs::read_to_string("/proc/meminfo").ok().and_then(|text| Node::read(&text));
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        let total_bytes = node.map_or(u64::MAX, |node| node.total_bytes);
        Memory { node, limits: limits(Path::new("/sys/fs/cgroup"), &groups, total_bytes) }
    }

    /// That of a node without any limit.
    #[cfg(test)]
    pub(super) fn of_a_node(total_bytes: u64, available_bytes: u64) -> Memory {
        Memory { node: Some(Node { total_bytes, available_bytes }), limits: Vec::new() }
    }

    /// The tightest limit, if there is any.
    pub(super) fn limit(&self) -> Option<&Limit> {
        self.limits.iter().min_by_key(|limit| limit.bytes)
    }

    /// How many bytes of a model may be read, `resident_bytes` of which are resident. Page cache counts as available, and
    /// so do they: reading more than the rest would throw out what was read before.
    pub(super) fn allowance(&self, resident_bytes: u64) -> Allowance {
        let of_node = match self.node {
            None => Allowance { bytes: 0, bound: Bound::Unknown },
            Some(node) => {
                let reserve = reserve(node.total_bytes);
                let bytes = node.available_bytes.saturating_sub(reserve).saturating_sub(resident_bytes);
                let (available, reserve) = (Bytes(node.available_bytes), Bytes(reserve));
                Allowance { bytes, bound: Bound::Node { available, reserve } }
            }
        };
        // What is resident already may be charged to somebody else; only what we read is ours.
        let of_limits = self.limits.iter().map(|limit| Allowance {
            bytes: limit.bytes.saturating_sub(reserve(limit.bytes)).saturating_sub(limit.held_bytes),
            bound: Bound::Limit(limit.clone()),
        });
        std::iter::once(of_node).chain(of_limits).min_by_key(|allowance| allowance.bytes).expect("the node's is there")
    }
}

fn reserve(bytes: u64) -> u64 {
    bytes / 100 * RESERVE_PERCENT
}

impl Node {
    fn read(meminfo: &str) -> Option<Node> {
        let kib = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
        };
        Some(Node { total_bytes: kib("MemTotal")?, available_bytes: kib("MemAvailable")? })
    }
}

/// The names of a version of cgroups.
struct Files {
    limits: &'static [&'static str],
    usage: &'static str,
    /// In `memory.stat`, with all groups below: page cache, and the part of it that cannot be dropped.
    cache: &'static str,
    shared: &'static str,
}

const V1: Files = Files {
    limits: &["memory.limit_in_bytes"],
    usage: "memory.usage_in_bytes",
    cache: "total_cache",
    shared: "total_shmem",
};
// From `memory.high` on the kernel throws out page cache too.
const V2: Files =
    Files { limits: &["memory.max", "memory.high"], usage: "memory.current", cache: "file", shared: "shmem" };

/// The limits of our memory cgroups and of those above them that are less than `total_bytes`. In a container the path may
/// be one of the host, which is not there; then the root of the mount is the container's own group.
fn limits(mount: &Path, groups: &str, total_bytes: u64) -> Vec<Limit> {
    let mut found = Vec::new();
    for line in groups.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let (bases, files) = match controllers {
            "" => (vec![mount.to_owned(), mount.join("unified")], &V2),
            _ if controllers.split(',').any(|controller| controller == "memory") => (vec![mount.join("memory")], &V1),
            _ => continue,
        };
        for base in bases {
            let path = Path::new(path.trim_start_matches('/'));
            // A group above the root of our namespace is shown as `..`: it cannot be looked at.
            let inside = !path.components().any(|part| part == std::path::Component::ParentDir);
            let path = if inside { path } else { Path::new("") };
            found.extend(path.ancestors().filter_map(|path| limit(&base.join(path), files, total_bytes)));
        }
    }
    found
}

fn limit(group: &Path, files: &Files, total_bytes: u64) -> Option<Limit> {
    let number = |name: &str| fs::read_to_string(group.join(name)).ok()?.trim().parse::<u64>().ok();
    // `max`, and the largest number of version 1, are no limits.
    let bytes = files.limits.iter().filter_map(|name| number(name)).min().filter(|bytes| *bytes < total_bytes)?;
    let stat = fs::read_to_string(group.join("memory.stat")).unwrap_or_default();
    let counted = |name: &str| {
        let value = stat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.and_then(|value| value.parse::<u64>().ok()).unwrap_or(0)
    };
    let droppable = counted(files.cache).saturating_sub(counted(files.shared));
    // Nobody knows what is used: then all of it is.
    let held_bytes = number(files.usage).map_or(bytes, |used| used.saturating_sub(droppable));
    Some(Limit { bytes, held_bytes, place: group.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    /// A node with so much memory, and so much of it available.
    fn node(total_bytes: u64, available_bytes: u64) -> Memory {
        Memory { node: Some(Node { total_bytes, available_bytes }), limits: Vec::new() }
    }

    fn limited(mut memory: Memory, bytes: u64, held_bytes: u64) -> Memory {
        memory.limits.push(Limit { bytes, held_bytes, place: "/sys/fs/cgroup/pod".into() });
        memory
    }

    #[test]
    fn what_may_be_read_is_the_least_that_the_node_and_each_limit_leave() {
        let node_80 = node(100 * GB, 80 * GB);
        for (memory, resident, bytes, bound) in [
            (node_80.clone(), 0, 70, "node"),
            (node_80.clone(), 30 * GB, 40, "node"),
            (node_80.clone(), 75 * GB, 0, "node"),
            (node(100 * GB, 9 * GB), 0, 0, "node"),
            (Memory::default(), 0, 0, "unknown"),
            (limited(node_80.clone(), 20 * GB, 3 * GB), 0, 15, "limit"),
            // What is resident is charged to whoever read it, not to us.
            (limited(node_80.clone(), 20 * GB, 3 * GB), 30 * GB, 15, "limit"),
            (limited(node_80.clone(), 20 * GB, 20 * GB), 0, 0, "limit"),
            (limited(node_80.clone(), 90 * GB, 0), 0, 70, "node"),
            (limited(limited(node_80.clone(), 20 * GB, 0), 10 * GB, 0), 0, 9, "limit"),
        ] {
            let allowance = memory.allowance(resident);
            let kind = match &allowance.bound {
                Bound::Unknown => "unknown",
                Bound::Node { .. } => "node",
                Bound::Limit(_) => "limit",
            };
            assert_eq!((allowance.bytes / GB, kind), (bytes, bound), "{memory:?} with {resident}");
        }
    }

    #[test]
    fn the_trap_is_named_with_the_limit_and_what_to_do() {
        let memory = limited(node(100 * GB, 80 * GB), 268_435_456, 0);
        assert_eq!(
            memory.allowance(0).bound.to_string(),
            "larder runs under a memory limit of 268.4 MB (`/sys/fs/cgroup/pod`): the page cache it fills is charged to \
             that limit and thrown out; remove the memory limit (keep the request)"
        );
        assert_eq!(
            node(100 * GB, 80 * GB).allowance(0).bound.to_string(),
            "the node has 80.0 GB of memory available, of which 10.0 GB are left to others"
        );
    }

    #[test]
    fn this_node_says_how_much_memory_it_has() {
        let node = Memory::of_this_process().node.unwrap();
        assert!(node.available_bytes > 0 && node.available_bytes <= node.total_bytes, "{node:?}");
        assert_eq!(Node::read("MemTotal: 10 kB\n"), None, "an old kernel does not say what is available");
    }

    /// Groups of both versions, as directories with files.
    fn groups(files: &[(&str, &str)]) -> tempfile::TempDir {
        let mount = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = mount.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        mount
    }

    fn found(files: &[(&str, &str)], groups_of_process: &str) -> Vec<(u64, u64, String)> {
        let mount = groups(files);
        let place = |limit: &Limit| limit.place.strip_prefix(mount.path()).unwrap().display().to_string();
        let mut found = limits(mount.path(), groups_of_process, 1000);
        found.sort_by_key(|limit| limit.bytes);
        found.iter().map(|limit| (limit.bytes, limit.held_bytes, place(limit))).collect()
    }

    #[test]
    fn limits_are_found_on_the_whole_path_in_both_versions() {
        let v1 = [
            ("memory/kubepods/pod1/memory.limit_in_bytes", "500\n"),
            ("memory/kubepods/pod1/memory.usage_in_bytes", "300\n"),
            ("memory/kubepods/pod1/memory.stat", "cache 1\ntotal_cache 250\ntotal_shmem 50\n"),
            ("memory/kubepods/memory.limit_in_bytes", "800\n"),
            ("memory/memory.limit_in_bytes", "9223372036854771712\n"),
        ];
        let expected = [(500, 100, "memory/kubepods/pod1".to_owned()), (800, 800, "memory/kubepods".to_owned())];
        assert_eq!(found(&v1, "5:cpu,cpuacct:/x\n4:memory:/kubepods/pod1\n0::/\n"), expected);

        let v2 = [
            ("pod2/app/memory.max", "max\n"),
            ("pod2/app/memory.high", "400\n"),
            ("pod2/app/memory.current", "390\n"),
            ("pod2/app/memory.stat", "anon 90\nfile 300\nshmem 0\n"),
            ("pod2/memory.max", "600\n"),
            ("pod2/memory.current", "not a number\n"),
        ];
        let expected = [(400, 90, "pod2/app".to_owned()), (600, 600, "pod2".to_owned())];
        assert_eq!(found(&v2, "0::/pod2/app\n"), expected);
    }

    #[test]
    fn in_a_container_the_root_of_the_mount_is_its_own_group() {
        let own = [("memory/memory.limit_in_bytes", "500\n"), ("memory/memory.usage_in_bytes", "0\n")];
        let expected = [(500, 0, "memory".to_owned())];
        assert_eq!(found(&own, "4:memory:/docker/0123\n"), expected);
        assert_eq!(found(&own, "4:memory:/../../docker/0123\n"), expected);
        assert_eq!(found(&own, "nonsense\n"), []);
    }
}

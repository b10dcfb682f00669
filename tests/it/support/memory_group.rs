//! A memory cgroup with a limit, where this user may make one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Removed when it is dropped.
pub(crate) struct MemoryGroup {
    dir: PathBuf,
}

impl MemoryGroup {
    /// With this limit in bytes, or why there is none.
    pub(crate) fn new(name: &str, limit_bytes: u64) -> Result<MemoryGroup, String> {
        let groups = fs::read_to_string("/proc/self/cgroup").map_err(|e| e.to_string())?;
        let of = |controllers: &str| {
            let mut lines = groups.lines().filter_map(|line| line.split_once(':').map(|(_, rest)| rest));
            lines.find_map(|line| line.strip_prefix(controllers)?.strip_prefix(':')).map(|path| path.trim_matches('/'))
        };
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let (base, own, limit) = match (v1.is_dir(), of("memory"), of("")) {
            (true, Some(own), _) => (v1, own, "memory.limit_in_bytes"),
            (false, _, Some(own)) => (Path::new("/sys/fs/cgroup"), own, "memory.max"),
            _ => return Err("this process is in no memory cgroup".to_owned()),
        };
        // In a container the path may be one of the host; then the root of the mount is our own group.
        let parent = if base.join(own).is_dir() { base.join(own) } else { base.to_owned() };
        let dir = parent.join(format!("larder-test-{name}-{}", std::process::id()));
        fs::create_dir(&dir).map_err(|e| format!("no cgroup can be made below {}: {e}", parent.display()))?;
        let group = MemoryGroup { dir };
        fs::write(group.dir.join(limit), limit_bytes.to_string())
            .map_err(|e| format!("no memory limit can be set: {e}"))?;
        Ok(group)
    }

    /// The same command, in this group from its beginning.
    pub(crate) fn enter(&self, command: &Command) -> Command {
        let mut inside = Command::new("/bin/sh");
        inside.args(["-c", "echo $$ > \"$0\" && exec \"$@\""]).arg(self.dir.join("cgroup.procs"));
        inside.arg(command.get_program()).args(command.get_args()).env_clear();
        inside.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        inside
    }

    /// How messages name it.
    pub(crate) fn place(&self) -> &Path {
        &self.dir
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Its pages stay charged to it until they are dropped; the directory goes all the same.
        let _ = fs::remove_dir(&self.dir);
    }
}

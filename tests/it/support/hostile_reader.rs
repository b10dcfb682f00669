//! A root process of a container that tries to change what it may only read: `hostile_reader.py` in a mount and a process
//! namespace of its own, with the capabilities a container has by default.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;

/// What Docker, containerd and CRI-O leave a container's root.
const CAPABILITIES: &str = "-all,+chown,+dac_override,+fsetid,+fowner,+mknod,+net_raw,+setgid,+setuid,+setfcap,+setpcap,\
                            +net_bind_service,+sys_chroot,+kill,+audit_write";

/// Arguments: where the attacker sees the tree (or `-`), the tree, `ro` or `rw`, what is hidden from it, and its command.
const ENTER: &str = r#"
set -e
seen=$1 tree=$2 how=$3 hidden=$4
shift 4
if [ "$seen" != - ]; then
    mount --bind "$tree" "$seen"
    [ "$how" = rw ] || mount -o remount,bind,ro "$seen"
fi
mount -t tmpfs none "$hidden"
exec setpriv --bounding-set="$CAPABILITIES" --inh-caps=-all "$@"
"#;

/// The interpreter itself, because a shim in its place takes longer than the attack. Or why there is no attacker.
static PYTHON: LazyLock<Result<String, String>> = LazyLock::new(|| {
    let python = std::env::var("LARDER_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let found = Command::new(&python).args(["-c", "import sys; print(sys.executable)"]).output();
    let found = found.map_err(|e| format!("`{python}` does not run: {e}"))?;
    let python = String::from_utf8_lossy(&found.stdout).trim().to_owned();
    let probe = "mount -t tmpfs none /mnt && exec setpriv --bounding-set=-all true";
    let entered = Command::new("unshare").args(["-m", "-p", "-f", "sh", "-c", probe]).output();
    match entered {
        Ok(entered) if entered.status.success() => Ok(python),
        Ok(entered) => {
            Err(format!("no container can be imitated: {}", String::from_utf8_lossy(&entered.stderr).trim()))
        }
        Err(e) => Err(format!("`unshare` does not run: {e}")),
    }
});

/// What the attacker says when it holds nothing it could go on with.
pub(crate) const NOTHING_MORE: &str = "nothing more to do";

/// What the attacker has.
pub(crate) enum Access<'a> {
    /// The public tree, mounted.
    Tree {
        /// Where it is.
        public: &'a Path,
        /// Whether a careless pod mounted it to write.
        writable: bool,
    },
    /// A descriptor it was given.
    Descriptor(File),
}

/// The attacker while it holds what it got.
pub(crate) struct HostileReader {
    child: Child,
    answers: BufReader<UnixStream>,
}

/// Whether attackers can be had; says why not.
pub(crate) fn is_possible() -> bool {
    match &*PYTHON {
        Ok(_) => true,
        Err(why) => {
            super::skip::skipped(why);
            false
        }
    }
}

/// The names of all operations.
pub(crate) fn operations() -> Vec<String> {
    let hidden = tempfile::tempdir().unwrap();
    let reader = Access::Descriptor(File::open("/dev/null").unwrap());
    let (_, names) = HostileReader::start(reader, "-", hidden.path(), "list");
    names.split(' ').map(str::to_owned).collect()
}

impl HostileReader {
    /// Tries one operation on `file`, a path in the tree; the attacker, and what the kernel said. It does not see what is
    /// below `hidden`.
    pub(crate) fn start(access: Access<'_>, file: &str, hidden: &Path, operation: &str) -> (HostileReader, String) {
        let python = PYTHON.as_ref().unwrap_or_else(|why| panic!("{why}"));
        let seen = tempfile::tempdir().unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut command = Command::new("unshare");
        command.args(["-m", "-p", "-f", "--propagation", "private", "--mount-proc", "--kill-child"]);
        command.args(["sh", "-c", ENTER, "sh"]).env("CAPABILITIES", CAPABILITIES);
        let at = match access {
            Access::Tree { public, writable } => {
                command.arg(seen.path()).arg(public).arg(if writable { "rw" } else { "ro" }).stdin(Stdio::null());
                seen.path().to_str().unwrap()
            }
            Access::Descriptor(file) => {
                command.args(["-", "-", "-"]).stdin(file);
                "-"
            }
        };
        command.arg(hidden).arg(python).arg("-c").arg(include_str!("hostile_reader.py"));
        command.args([at, file, operation]).stdout(OwnedFd::from(theirs));
        let child = command.spawn().unwrap();
        // The command has our end of the pair too, and would keep it open.
        drop(command);
        let mut reader = HostileReader { child, answers: BufReader::new(ours) };
        let said = reader.answer();
        (reader, said)
    }

    /// Goes on with what it holds; what the kernel said.
    pub(crate) fn go_on(&mut self) -> String {
        self.answers.get_mut().write_all(b"on\n").unwrap();
        self.answer()
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "the attacker died: {line:?}");
        line.trim_end().to_owned()
    }
}

impl Drop for HostileReader {
    fn drop(&mut self) {
        let _ = self.answers.get_mut().shutdown(std::net::Shutdown::Both);
        let _ = self.child.wait();
    }
}

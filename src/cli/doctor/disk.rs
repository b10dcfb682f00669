//! The disk that models are on, or will be: what it is, what it gives, and how much of it models may take.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxAttributes, StatxFlags, ioctl_ficlone, statx};

use super::super::bench::disk::{Read, Write, read, write};
use super::super::mounts::{self, Mount};
use super::super::scratch::Scratch;
use super::finding::{Finding, Mark};
use crate::cache::KUBELET_DIRECTORY;
use crate::config::Config;
use crate::fault::Code;
use crate::model::{Bytes, Share};
use crate::store::{Space, share_a_disk};

/// Written and read to find out how fast the disk is: a quarter of a second on NVMe, some seconds on a spinning one.
const MEASURED_BYTES: u64 = 256 << 20;
/// What must be free for that, in bytes beside what is left to others.
const ROOM_TO_MEASURE: u64 = 4 * MEASURED_BYTES;
/// In bytes a second. A model that is read slower than this keeps a GPU waiting for minutes: networked disks of clouds and
/// spinning ones are below it, NVMe is far above.
const SLOW_BYTES_PER_SECOND: f64 = 300e6;
/// Below so many hundredths free, kubelet throws images away; below 10 it evicts pods (its own defaults).
const KUBELET_WANTS_FREE_PERCENT: u8 = 15;
/// Written in every container's `/etc/hosts` by kubelet, from its own directory: where kubelet's disk is seen from a pod.
const MOUNTED_BY_KUBELET: &str = "/etc/hosts";

/// What the file system can do, tried out.
#[derive(Debug)]
struct Abilities {
    hard_links: Result<(), String>,
    reflinks: bool,
    verity: bool,
}

/// Measured around the page cache, in bytes a second.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Speed {
    written: f64,
    read: f64,
}

/// How full it is, in bytes.
#[derive(Debug, Clone, Copy)]
struct Room {
    total: u64,
    free: u64,
    left_to_others: u64,
    quota: Option<u64>,
    /// Whether kubelet's images and logs are on it too.
    beside_kubelet: bool,
}

/// Looks at the disk of the volume, or of the nearest directory above it that is there. Blocking, for seconds.
pub(super) fn findings(config: &Config) -> Vec<Finding> {
    let root = &config.volume.root;
    let Some(directory) = root.ancestors().find(|directory| directory.is_dir()) else {
        let means = format!("`{}` is not an absolute path of a directory", root.display());
        return vec![Finding::new(Mark::Problem(Code::DiskError), "disk", "unknown", means)];
    };
    match look(config, directory) {
        Ok(findings) => findings,
        Err(error) => {
            let means = format!(
                "cannot try out `{}`: {error}; run it as the user that larder runs as, or name another directory with `--root`",
                directory.display()
            );
            vec![Finding::new(Mark::Problem(Code::DiskError), "disk", "unknown", means)]
        }
    }
}

fn look(config: &Config, directory: &Path) -> io::Result<Vec<Finding>> {
    let room = room(config, directory)?;
    let mut findings = vec![of_room(&room)];
    let scratch = Scratch::below(directory, "larder-doctor")?;
    let abilities = try_out(scratch.path())?;
    findings.push(of_file_system(&mounts::of(directory)?, &abilities, is_disk_of_the_system(config, directory)));
    findings.push(match room.free.saturating_sub(room.left_to_others) {
        free if free < ROOM_TO_MEASURE => {
            let means =
                format!("not measured: {} would have to be free beside what is left to others", Bytes(ROOM_TO_MEASURE));
            Finding::new(Mark::Note, "speed", "unknown", means)
        }
        _ => of_speed(measure(scratch.path())),
    });
    Ok(findings)
}

fn room(config: &Config, directory: &Path) -> io::Result<Room> {
    let Space { total_bytes: total, free_bytes: free, .. } = Space::at(directory)?;
    let is_pod = config.cache().in_kubernetes;
    let beside = |place: &str| share_a_disk(Path::new(place), directory);
    let beside_kubelet = beside(KUBELET_DIRECTORY) || is_pod && beside(MOUNTED_BY_KUBELET);
    let limits = &config.volume.limits;
    Ok(Room {
        total,
        free,
        left_to_others: limits.min_free.on(total, beside_kubelet || is_pod),
        quota: limits.quota.map(|quota| quota.of(total)),
        beside_kubelet,
    })
}

fn of_room(room: &Room) -> Finding {
    let Room { total, free, left_to_others, quota, beside_kubelet } = *room;
    let state = format!("{} of {} free", Bytes(free), Bytes(total));
    let quota = quota.map_or(String::new(), |quota| format!(" (`volume.quota` is {})", Bytes(quota)));
    let left = format!("{} are left to others{quota}", Bytes(left_to_others));
    let wanted = Share::Percent(KUBELET_WANTS_FREE_PERCENT).of(total);
    if free <= left_to_others {
        let means = format!(
            "nothing can be pulled: {left}; free some, lower `volume.min_free`, or name another disk with `volume.root`"
        );
        return Finding::new(Mark::Problem(Code::VolumeFull), "room", state, means);
    }
    if beside_kubelet && left_to_others < wanted {
        let means = format!(
            "kubelet is on this disk and throws images away when less than {} are free, and evicts pods a little later: set \
             `volume.min_free` to `auto`; now {left}",
            Bytes(wanted)
        );
        return Finding::new(Mark::Note, "room", state, means);
    }
    Finding::new(Mark::Ok, "room", state, left)
}

fn try_out(directory: &Path) -> io::Result<Abilities> {
    let (first, second, copy) = (directory.join("first"), directory.join("second"), directory.join("copy"));
    let file = File::create(&first)?;
    io::Write::write_all(&mut &file, &[7; 4096])?;
    let hard_links = fs::hard_link(&first, &second).map_err(|e| e.to_string());
    let reflinks = ioctl_ficlone(File::create(copy)?, &file).is_ok();
    let found = statx(&file, "", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
    let verity = found.stx_attributes_mask.contains(StatxAttributes::VERITY);
    Ok(Abilities { hard_links, reflinks, verity })
}

/// Whether what the system itself needs is on it.
fn is_disk_of_the_system(config: &Config, directory: &Path) -> bool {
    let system = if config.cache().in_kubernetes { MOUNTED_BY_KUBELET } else { "/" };
    share_a_disk(Path::new(system), directory)
}

fn of_file_system(mount: &Mount, abilities: &Abilities, is_of_the_system: bool) -> Finding {
    let has = |has: bool| if has { "yes" } else { "no" };
    let state = mount.kind.clone();
    let place = format!("on `{}`", mount.source);
    if let Err(why) = &abilities.hard_links {
        let means =
            format!("{place}; it makes no hard links ({why}), and models are directories of them: use ext4 or XFS");
        return Finding::new(Mark::Problem(Code::DiskError), "file system", state, means);
    }
    let means = format!(
        "{place}; hard links: yes; reflinks: {}, fs-verity: {} (neither is needed)",
        has(abilities.reflinks),
        has(abilities.verity)
    );
    let could_be_better = match mount.kind.as_str() {
        "tmpfs" | "ramfs" => Some("it is memory: models are gone after a restart of the node"),
        "overlay" => Some("it goes with the container: mount a directory of the node"),
        "nfs" | "nfs4" | "cifs" | "smb3" | "ceph" | "9p" => {
            Some("it is not local: every cold read crosses the network")
        }
        kind if kind.starts_with("fuse") => Some("every cold read goes through a process: use a disk of the node"),
        _ if is_of_the_system => Some("it is the disk of the system: logs and images share its room and its speed"),
        _ => None,
    };
    match could_be_better {
        Some(why) => Finding::new(Mark::Note, "file system", state, format!("{means}; {why}")),
        None => Finding::new(Mark::Ok, "file system", state, means),
    }
}

fn measure(directory: &Path) -> io::Result<Speed> {
    let written = Write { directory: directory.to_owned(), bytes: MEASURED_BYTES };
    let write_seconds = write(&written)?.as_secs_f64();
    let files: Vec<PathBuf> = written.files().collect();
    let read_seconds = read(&Read { files, keeps: false })?.as_secs_f64();
    let bytes = written.total_bytes() as f64;
    Ok(Speed { written: bytes / write_seconds, read: bytes / read_seconds })
}

fn of_speed(speed: io::Result<Speed>) -> Finding {
    let speed = match speed {
        Ok(speed) => speed,
        Err(error) => return Finding::new(Mark::Note, "speed", "unknown", format!("not measured: {error}")),
    };
    let a_second = |bytes: f64| format!("{} a second", Bytes(bytes as u64));
    let state = format!("reads {}, writes {}", a_second(speed.read), a_second(speed.written));
    let model = Bytes(16_000_000_000);
    let seconds = model.0 as f64 / speed.read;
    let means = format!("{model} that are not in memory are read in {seconds:.0} s");
    if speed.read < SLOW_BYTES_PER_SECOND {
        let means = format!("{means}: a local NVMe disk is some ten times as fast");
        return Finding::new(Mark::Note, "speed", state, means);
    }
    Finding::new(Mark::Ok, "speed", state, means)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str) -> Mount {
        Mount { kind: kind.into(), source: "/dev/nvme1n1".into() }
    }

    #[test]
    fn a_directory_of_this_machine_is_tried_out_and_nothing_is_left() {
        let dir = tempfile::tempdir().unwrap();
        let abilities = try_out(dir.path()).unwrap();
        assert_eq!(abilities.hard_links, Ok(()));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_disk_is_judged_by_what_models_need() {
        let able = |hard_links| Abilities { hard_links, reflinks: false, verity: true };
        let mark = |kind, hard_links, of_system| of_file_system(&mount(kind), &able(hard_links), of_system).mark;
        assert_eq!(mark("xfs", Ok(()), false), Mark::Ok);
        assert_eq!(mark("xfs", Ok(()), true), Mark::Note);
        assert_eq!(mark("vfat", Err("no".into()), false), Mark::Problem(Code::DiskError));
        for kind in ["tmpfs", "overlay", "nfs4", "fuse.sshfs"] {
            assert_eq!(mark(kind, Ok(()), false), Mark::Note, "{kind}");
        }
    }

    #[test]
    fn room_is_judged_by_what_is_left_to_others_and_by_kubelet() {
        let room = Room { total: 1000, free: 500, left_to_others: 200, quota: None, beside_kubelet: true };
        assert_eq!(of_room(&room).mark, Mark::Ok);
        assert_eq!(of_room(&Room { left_to_others: 149, ..room }).mark, Mark::Note);
        assert_eq!(of_room(&Room { left_to_others: 149, beside_kubelet: false, ..room }).mark, Mark::Ok);
        assert_eq!(of_room(&Room { free: 200, ..room }).mark, Mark::Problem(Code::VolumeFull));
    }

    #[test]
    fn a_slow_disk_is_told_in_seconds_of_a_model() {
        let found = of_speed(Ok(Speed { written: 50e6, read: 100e6 }));
        assert_eq!(
            (found.mark, found.state.as_str()),
            (Mark::Note, "reads 100.0 MB a second, writes 50.0 MB a second")
        );
        assert!(found.means.starts_with("16.0 GB that are not in memory are read in 160 s"), "{}", found.means);
        assert_eq!(of_speed(Ok(Speed { written: 1e9, read: 2e9 })).mark, Mark::Ok);
        assert_eq!(of_speed(Err(io::ErrorKind::Unsupported.into())).mark, Mark::Note);
    }
}

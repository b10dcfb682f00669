//! Disks that refuse: calls that fail, a disk that is full, and one that becomes read-only.

use super::checker::{self, Promised};
use super::larder::{Ended, Home, Running};
use super::loop_disk::{Kind, LoopDisk};
use super::models::{Models, bytes};
use super::row::{Row, size};
use super::skip::skipped;
use super::strace;

/// Calls on the volume, and how a disk refuses them. There is no `write` among them: that is how threads wake each other.
const FAULTS: [(&str, &str); 14] = [
    ("pwrite64", "ENOSPC"),
    ("pwrite64", "EIO"),
    ("ftruncate", "EIO"),
    ("fallocate", "ENOSPC"),
    ("fdatasync", "EIO"),
    ("fdatasync", "ENOSPC"),
    ("fsync", "EIO"),
    ("fsync", "ENOSPC"),
    ("rename", "EIO"),
    ("rename", "ENOSPC"),
    ("linkat", "ENOSPC"),
    ("mkdir", "ENOSPC"),
    ("fchmod", "EIO"),
    ("unlink", "EIO"),
];

/// What a disk that refuses may end in: exit codes of `full` and `misconfigured`.
fn assert_coded(ended: &Ended) {
    assert!(matches!(ended.code, Some(0 | 73 | 78)), "{ended:?}");
    // sled panics when it cannot write; that is caught.
    assert!(ended.err.matches("panicked").count() == ended.err.matches("/sled-").count(), "{ended:?}");
    if ended.code != Some(0) {
        let code = ["disk-error", "volume-full", "volume-read-only"].map(|code| format!("code: {code}"));
        assert!(code.iter().any(|code| ended.err.contains(code)) && ended.err.contains("action: "), "{ended:?}");
        assert_eq!(ended.out, "", "an error and an answer");
    }
}

/// A home with a model that is here, and one that is not.
async fn ground(home: &Home) -> (Models, String, String) {
    let mut models = Models::default();
    let shared = ("shared.bin", bytes("shared", 9_000));
    let large = ("model.bin", bytes("large", (2 << 20) + 5));
    let here = models.put(home.path(), "here", &[("own.bin", bytes("here", 5_000)), shared.clone()]);
    let wanted = models.put(home.path(), "wanted", &[("a/own.bin", bytes("wanted", 5_000)), shared, large]);
    (models, here, wanted)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_fails_ends_in_a_coded_error_and_half_of_nothing() {
    if let Some(why) = strace::unusable() {
        return skipped(&why);
    }
    let home = Home::new();
    let (models, here, wanted) = ground(&home).await;
    let outside = checker::outside_of(&home);
    for (call, error) in FAULTS {
        let mut row = Row::new(&format!("{call} of a command fails with {error}"));
        for nth in 1..=size(3, usize::MAX) {
            let case = async {
                let _ = std::fs::remove_dir_all(home.root());
                home.done(&["pull", "-q", &here]).await;
                let mut command = strace::failing(&home.command(&["pull", "-q", &wanted]), call, error, nth);
                let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
                let text = |bytes| String::from_utf8(bytes).unwrap();
                let err = text(output.stderr);
                let failed = err.contains("(INJECTED)");
                let ended = Ended { code: output.status.code(), out: text(output.stdout), err };
                assert_coded(&ended);
                let mut promised = Promised { here: [here.clone()].into(), ..Promised::default() };
                if ended.code == Some(0) {
                    promised.here.extend([wanted.clone()]);
                }
                checker::check(&home, &models, &promised, &outside).await;
                home.done(&["pull", "-q", &wanted]).await;
                failed
            };
            let failed = row.case(&format!("the call number {nth} of a thread"), case).await;
            if failed != Some(true) {
                break;
            }
        }
        row.end();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_with_a_call_that_fails_serves_the_rest() {
    if let Some(why) = strace::unusable() {
        return skipped(&why);
    }
    let home = Home::new();
    let (models, here, wanted) = ground(&home).await;
    let outside = checker::outside_of(&home);
    for (call, error) in FAULTS {
        let mut row = Row::new(&format!("{call} of a daemon fails with {error}"));
        for nth in 1..=size(2, usize::MAX) {
            let case = async {
                let _ = std::fs::remove_dir_all(home.root());
                let path = home.done(&["pull", "-q", &here]).await;
                let mut daemon = home.serve().await;
                let mut fault = Running::start(strace::attached(daemon.id(), call, error, nth));
                fault.says(" attached").await;
                let ended = home.run(&["pull", "-q", &wanted]).await;
                fault.terminate();
                fault.ended().await;
                assert_coded(&ended);
                assert_eq!(home.done(&["open", &here]).await, path);
                let again = home.run(&["pull", "-q", &wanted]).await;
                let is_read_only = again.err.contains("code: volume-read-only");
                // sled syncs its own files, which nothing depends on.
                let was_not_durable = ended.code != Some(0) && ["fsync", "fdatasync"].contains(&call);
                assert_eq!(is_read_only, was_not_durable, "{ended:?} {again:?}");
                assert!(is_read_only || again.code == Some(0), "{again:?}");
                daemon.terminate();
                assert!(daemon.ended().await.0.success(), "{}", daemon.said());
                let mut promised = Promised { here: [here.clone()].into(), ..Promised::default() };
                if !is_read_only {
                    promised.here.extend([wanted.clone()]);
                }
                checker::check(&home, &models, &promised, &outside).await;
                fault.said().contains("(INJECTED)")
            };
            if row.case(&format!("the call number {nth} of a thread"), case).await != Some(true) {
                break;
            }
        }
        row.end();
    }
}

/// sled may panic, refuse, or wait for ever: which of them is its own affair.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_whose_index_cannot_be_written_serves_without_it() {
    if let Some(why) = strace::unusable() {
        return skipped(&why);
    }
    let home = Home::new();
    let (models, here, wanted) = ground(&home).await;
    let outside = checker::outside_of(&home);
    let file = home.root().join("index-v1/db");
    let mut row = Row::new("the index of a daemon cannot be written");
    for calls in ["pwrite64", "fsync,fdatasync,sync_file_range", "pwrite64,fsync,fdatasync,sync_file_range"] {
        let case = async {
            let _ = std::fs::remove_dir_all(home.root());
            let path = home.done(&["pull", "-q", &here]).await;
            let mut daemon = home.serve().await;
            let mut fault = Running::start(strace::attached_to(&file, daemon.id(), calls, "EIO"));
            fault.says(" attached").await;
            home.done(&["pull", "-q", &wanted]).await;
            assert_eq!(home.done(&["open", &here]).await, path);
            home.done(&["remove", &wanted]).await;
            home.done(&["pull", "-q", &wanted]).await;
            let told = home.done(&["doctor"]).await;
            assert!(told.contains("\nnote  index ") && told.contains("restart larder"), "{told}");
            daemon.terminate();
            assert!(daemon.ended().await.0.success(), "{}", daemon.said());
            fault.ended().await;
            assert!(fault.said().contains("(INJECTED)"), "{}", fault.said());
            let told = home.done(&["doctor"]).await;
            assert!(told.contains("\nok    index "), "{told}");
            let promised = Promised { here: [here.clone(), wanted.clone()].into(), ..Promised::default() };
            checker::check(&home, &models, &promised, &outside).await;
        };
        row.case(calls, case).await;
    }
    row.end();
}

/// How much of a write of a part was done, if it was less than was asked for: a line of the trace.
fn shortened(line: &str) -> Option<(u64, u64)> {
    let (call, done) = line.split_once(") = ")?;
    let asked = call.rsplit(", ").nth(1).filter(|_| call.contains(".part>"))?;
    let (asked, done) = (asked.parse().ok()?, done.trim().parse().ok()?);
    (done < asked).then_some((done, asked))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_is_cut_short_is_continued_and_then_told() {
    if let Some(why) = strace::unusable() {
        return skipped(&why);
    }
    let home = Home::new();
    let (models, here, wanted) = ground(&home).await;
    let outside = checker::outside_of(&home);
    let mut row = Row::new("a write is cut short by a limit on the size of files");
    for most_kib in (1_100..2_040).step_by(size(313, 13)) {
        let case = async {
            let _ = std::fs::remove_dir_all(home.root());
            home.done(&["pull", "-q", &here]).await;
            let pull = home.command(&["pull", "-q", &wanted]);
            let mut limited = std::process::Command::new("prlimit");
            limited.arg(format!("--fsize={}", most_kib * 1024)).arg(pull.get_program()).args(pull.get_args());
            limited.envs(pull.get_envs().filter_map(|(name, value)| Some((name, value?))));
            let traces = tempfile::tempdir().unwrap();
            let mut command = strace::told(&limited, "pwrite64", traces.path());
            let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
            let text = |bytes| String::from_utf8(bytes).unwrap();
            let ended = Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) };
            assert_coded(&ended);
            assert!(ended.err.contains("code: volume-full"), "{ended:?}");
            let calls: String = checker::files_in(traces.path()).into_values().map(text).collect();
            let cut: Vec<_> = calls.lines().filter_map(shortened).collect();
            assert_eq!(cut, [((most_kib - 1024) * 1024, 1024 * 1024)], "the kernel wrote a part of one piece: {calls}");
            assert!(calls.contains(&format!(", {}) = -1 EFBIG", most_kib * 1024)), "the rest was tried: {calls}");
            let mut promised = Promised { here: [here.clone()].into(), ..Promised::default() };
            checker::check(&home, &models, &promised, &outside).await;
            home.done(&["pull", "-q", &wanted]).await;
            promised.here.insert(wanted.clone());
            checker::check(&home, &models, &promised, &outside).await;
        };
        row.case(&format!("files of at most {most_kib} KiB"), case).await;
    }
    row.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_is_full_is_told_and_harms_nothing() {
    let home = Home::new();
    let disk = match LoopDisk::new(Kind::Ext4, 16, &home.root()) {
        Ok(disk) => disk,
        Err(why) => return skipped(&why),
    };
    let (models, here, wanted) = ground(&home).await;
    let outside = checker::outside_of(&home);
    home.done(&["pull", "-q", &here]).await;
    // The sockets are usually on another disk; here their directory must be there before it is full.
    home.serve().await.kill().await;
    let filler = home.root().join("lost+found/filler");
    let mut row = Row::new("a full disk");
    let promised = Promised { here: [here.clone()].into(), ..Promised::default() };
    for left_kib in (0..size(2_600, 2_600)).step_by(size(430, 8)) {
        let case = async {
            fill(&filler, &home.root(), left_kib as u64 * 1024);
            let ended = home.run(&["pull", "-q", &wanted]).await;
            assert_coded(&ended);
            home.serve().await.kill().await;
            // A directory whose files were replaced must be laid out again, which needs some room.
            let opened = home.run(&["open", &here]).await;
            assert_coded(&opened);
            std::fs::remove_file(&filler).unwrap();
            checker::check(&home, &models, &promised, &outside).await;
            home.done(&["pull", "-q", &wanted]).await;
            home.done(&["remove", &wanted]).await;
        };
        row.case(&format!("{left_kib} KiB left"), case).await;
    }
    let case = async {
        fill(&filler, &home.root(), 0);
        home.done(&["remove", &here]).await;
        std::fs::remove_file(&filler).unwrap();
        let promised = Promised { gone: [here.clone()].into(), ..Promised::default() };
        checker::check(&home, &models, &promised, &outside).await;
    };
    row.case("a removal with nothing left", case).await;
    disk.unmount().unwrap();
    disk.must_be_clean();
    disk.mount().unwrap();
    row.end();
}

/// Takes all of the disk but this much.
fn fill(filler: &std::path::Path, root: &std::path::Path, left_bytes: u64) {
    let file = std::fs::File::create(filler).unwrap();
    let free = rustix::fs::statvfs(root).unwrap();
    let take = (free.f_bfree * free.f_frsize).saturating_sub(left_bytes);
    if take > 0 {
        let _ = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, take);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_becomes_read_only_serves_what_is_here() {
    let home = Home::new();
    let disk = match LoopDisk::new(Kind::Ext4, 64, &home.root()) {
        Ok(disk) => disk,
        Err(why) => return skipped(&why),
    };
    let (models, here, wanted) = ground(&home).await;
    let outside = checker::outside_of(&home);
    let path = home.done(&["pull", "-q", &here]).await;
    let mut row = Row::new("a disk that becomes read-only");
    let case = async {
        let mut daemon = home.serve().await;
        disk.find_damage();
        let ended = home.run(&["pull", "-q", &wanted]).await;
        assert_ne!(ended.code, Some(0), "{ended:?}");
        assert_coded(&ended);
        assert_eq!(home.done(&["open", &here]).await, path);
        daemon.terminate();
        daemon.ended().await;
        disk.unmount().unwrap();
        disk.mend();
        disk.mount().unwrap();
        let promised = Promised { here: [here.clone()].into(), ..Promised::default() };
        checker::check(&home, &models, &promised, &outside).await;
    };
    row.case("emergency remount", case).await;
    row.end();
}

//! `larder init`: a model becomes usable in a directory of the pod, by the cheapest way that works there.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::support::hub::{RepoFile, TestHub};
use super::support::larder::{Ended, Home};
use super::support::model_origin::ModelOrigin;
use super::support::skip::skipped;

const FILES: [(&str, &[u8]); 3] =
    [("config.json", b"{}"), ("model.safetensors", &[7; 100_000]), ("onnx/model.onnx", b"weights")];

/// A Hub with a model, and a home whose daemon knows it.
async fn home() -> (TestHub, Home, String) {
    let hub = TestHub::start().await;
    hub.publish("org/m", FILES.map(|(path, bytes)| RepoFile::new(path, bytes)).to_vec());
    let mut home = Home::new();
    home.set("HF_ENDPOINT", hub.endpoint());
    (hub, home, "hf://org/m@main".to_owned())
}

/// A home whose commands stand in a pod: they know the pods' socket, and which pod they are.
fn pod_of(home: &Home) -> Vec<(&'static str, String)> {
    vec![
        ("LARDER_SOCKET", home.pod_socket().display().to_string()),
        ("POD_UID", "uid-1".into()),
        ("POD_NAMESPACE", "team".into()),
        ("POD_NAME", "vllm-0".into()),
    ]
}

async fn init(home: &Home, variables: &[(&'static str, String)], words: &[&str]) -> Ended {
    let mut command = home.command(&[&["init"], words].concat());
    command.envs(variables.iter().cloned());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
}

fn assert_usable(dest: &Path) {
    let mut found = BTreeMap::new();
    for (path, _) in FILES {
        found.insert(path, fs::read(dest.join(path)).unwrap_or_else(|e| panic!("{path}: {e}")));
    }
    assert!(found.iter().map(|(path, bytes)| (*path, bytes.as_slice())).eq(FILES));
}

fn last_lines(said: &str) -> [&str; 2] {
    let lines: Vec<&str> = said.lines().collect();
    [lines[lines.len() - 2], lines[lines.len() - 1]]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_not_local_is_pulled_linked_to_and_leased_for_the_pod() {
    let (_hub, home, reference) = home().await;
    let _daemon = home.serve().await;
    let dest = home.path().join("mnt/models");
    for _ in 0..2 {
        let ended = init(&home, &pod_of(&home), &[&reference, dest.to_str().unwrap()]).await;
        assert_eq!((ended.code, ended.out.as_str()), (Some(0), ""), "{}", ended.err);
        assert!(ended.err.contains("used symlink for 100.0 kB of "), "{}", ended.err);
        assert!(ended.err.contains("leased for the pod team/vllm-0"), "{}", ended.err);
        let [copied, took] = last_lines(&ended.err);
        assert_eq!(copied, format!("Successfully copied {reference} to {}", dest.display()));
        assert!(took.starts_with("Model downloaded in ") && took.ends_with(" seconds."), "{took}");
    }
    assert_usable(&dest);
    let target = fs::read_link(dest.join("onnx")).unwrap();
    assert!(target.is_relative(), "{}", target.display());
    let leases = home.done(&["leases"]).await;
    assert_eq!(leases.lines().count(), 2, "{leases}");
    assert!(leases.contains(" pod   team/vllm-0 "), "{leases}");
    assert_eq!(home.run(&["remove", &reference]).await.code, Some(75));
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_pod_open_pulls_leases_and_prints_where_the_pod_sees_the_model_and_nothing_else_is_answered() {
    let (_hub, home, reference) = home().await;
    let _daemon = home.serve().await;
    let run = async |words: &[&str]| {
        let mut command = home.command(words);
        command.envs(pod_of(&home));
        let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ended { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) }
    };
    let ended = run(&["open", &reference]).await;
    assert_eq!((ended.code, ended.err.contains("code: not-local")), (Some(66), true), "{}", ended.err);
    let ended = run(&["open", "--wait", "--lease-for", "pod", "--mount", "/models", &reference]).await;
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.out.starts_with("/models/hub/models--org--m/snapshots/"), "{}", ended.out);
    assert!(home.public().join(ended.out.trim().strip_prefix("/models/").unwrap()).join("config.json").exists());
    assert_eq!(home.done(&["leases"]).await.lines().count(), 2, "the connection's is over, the pod's is not");
    for words in [&["list"][..], &["remove", &reference], &["leases"]] {
        let ended = run(words).await;
        assert_eq!(ended.code, Some(77), "{words:?}: {}", ended.err);
        assert!(ended.err.contains("code: policy-denied") && ended.err.contains("`serve.socket`"), "{}", ended.err);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_the_volume_is_not_mounted_the_model_is_copied_and_no_lease_stays() {
    let (_hub, home, reference) = home().await;
    let _daemon = home.serve().await;
    let (dest, elsewhere) = (home.path().join("dest"), home.path().join("elsewhere"));
    let words = ["--mount", elsewhere.to_str().unwrap(), "--method", "auto", &reference, dest.to_str().unwrap()];
    let ended = init(&home, &pod_of(&home), &words).await;
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("cannot use symlink: `") && ended.err.contains("is not there"), "{}", ended.err);
    let used = ["used copy for ", "used reflink for "].iter().any(|used| ended.err.contains(used));
    assert!(used && !ended.err.contains("leased for"), "{}", ended.err);
    assert_usable(&dest);
    assert_eq!(fs::metadata(dest.join("config.json")).unwrap().nlink(), 1, "the pod's file is its own");
    assert_eq!(home.run(&["leases"]).await.err, "nobody holds a lease\n");

    let words = ["--method", "symlink", "--mount", elsewhere.to_str().unwrap(), &reference, dest.to_str().unwrap()];
    let ended = init(&home, &pod_of(&home), &words).await;
    assert_eq!(ended.code, Some(1), "{}", ended.err);
    assert!(ended.err.contains("code: destination-unusable") && ended.err.contains("--mount"), "{}", ended.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn several_models_are_made_usable_by_one_command_and_patterns_are_kserves() {
    let (hub, home, reference) = home().await;
    hub.publish("org/other", vec![RepoFile::new("config.json", &b"other"[..])]);
    let _daemon = home.serve().await;
    let [one, two] = ["one", "two"].map(|name| home.path().join(name));
    let other = "hf://org/other:main".to_owned();
    let mut pod = pod_of(&home);
    pod.push(("STORAGE_ALLOW_PATTERNS", "[\"*.json\"]".into()));
    let words = [&reference, one.to_str().unwrap(), &other, two.to_str().unwrap()];
    let ended = init(&home, &pod, &words).await;
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert_eq!(ended.err.matches("Successfully copied ").count(), 2);
    assert_eq!(fs::read_dir(&one).unwrap().count(), 1);
    assert_eq!(fs::read(two.join("config.json")).unwrap(), b"other");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_failure_ends_with_exit_code_1_and_says_what_to_do() {
    let (_hub, home, reference) = home().await;
    let daemon = home.serve().await;
    let dest = home.path().join("dest");
    let dest = dest.to_str().unwrap();
    let absent = "hf://org/absent".to_owned();
    for (words, code) in [
        (vec![reference.as_str()], "bad-request"),
        (vec!["ftp://host/m", dest], "bad-reference"),
        (vec![&absent, dest], "auth-missing"),
        (vec![&reference, "/proc/version/dest"], "destination-unusable"),
        (vec!["file:///etc", dest], "policy-denied"),
        (vec!["http://169.254.169.254/latest/", dest], "policy-denied"),
    ] {
        let ended = init(&home, &pod_of(&home), &words).await;
        assert_eq!(ended.code, Some(1), "{words:?}: {}", ended.err);
        assert!(ended.err.contains(&format!("code: {code}")), "{words:?}: {}", ended.err);
        assert!(ended.err.contains("action: "), "{words:?}: {}", ended.err);
    }
    daemon.kill().await;
    let mut pod = pod_of(&home);
    pod[0].1 = home.path().join("not-mounted/larder.sock").display().to_string();
    let ended = init(&home, &pod, &["--patience", "10ms", &reference, dest]).await;
    assert_eq!(ended.code, Some(1));
    assert!(ended.err.contains("code: daemon-unreachable") && ended.err.contains("mounted"), "{}", ended.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_starts_later_is_waited_for() {
    let (_hub, home, reference) = home().await;
    let dest = home.path().join("dest");
    let mut command = home.command(&["init", &reference, dest.to_str().unwrap()]);
    command.envs(pod_of(&home));
    let waiting = tokio::task::spawn_blocking(move || command.output().unwrap());
    let _daemon = home.serve().await;
    let output = waiting.await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_usable(&dest);
}

/// A small file system of its own, in a file; gone with its owner.
struct Mounted {
    at: PathBuf,
}

impl Mounted {
    fn xfs(dir: &Path) -> Result<Mounted, String> {
        let (image, at) = (dir.join("xfs.img"), dir.join("xfs"));
        fs::create_dir(&at).map_err(|e| e.to_string())?;
        let file = fs::File::create(&image).map_err(|e| e.to_string())?;
        // The smallest that mkfs.xfs makes; it takes only what is written.
        file.set_len(300 << 20).map_err(|e| e.to_string())?;
        for (program, words) in [("mkfs.xfs", vec!["-q"]), ("mount", vec!["-o", "loop"])] {
            let mut command = Command::new(program);
            command.args(words).arg(&image);
            if program == "mount" {
                command.arg(&at);
            }
            let output = command.output().map_err(|e| format!("{program}: {e}"))?;
            if !output.status.success() {
                return Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()));
            }
        }
        Ok(Mounted { at })
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_file_system_that_can_the_copies_share_the_volumes_blocks() {
    let dir = tempfile::tempdir().unwrap();
    let xfs = match Mounted::xfs(dir.path()) {
        Ok(xfs) => xfs,
        Err(why) => return skipped(&why),
    };
    let origin = ModelOrigin::start().await;
    let weights: Vec<u8> = (0..32u32 << 18).flat_map(u32::to_le_bytes).collect();
    origin.put("m", "model.safetensors", &weights);
    let reference = origin.reference("m");
    let mut home = Home::new();
    home.set("LARDER_ROOT", xfs.at.join("volume").to_str().unwrap());
    home.set("LARDER_SOCKET", home.path().join("s/larder.sock").to_str().unwrap());
    home.set("LARDER_SERVE_POD_SOCKET", home.path().join("p/larder.sock").to_str().unwrap());
    let _daemon = home.serve().await;
    home.done(&["pull", &reference]).await;
    let free = || rustix::fs::statvfs(&xfs.at).map(|found| found.f_bfree * found.f_frsize).unwrap();
    let before = free();
    let dest = xfs.at.join("pod/models");
    let words = ["--mount", "/nowhere", &reference, dest.to_str().unwrap()];
    let variables = vec![("LARDER_SOCKET", home.path().join("p/larder.sock").display().to_string())];
    let ended = init(&home, &variables, &words).await;
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.err.contains("used reflink for 33.6 MB of "), "{}", ended.err);
    assert!(fs::read(dest.join("model.safetensors")).unwrap() == weights);
    let taken = before.saturating_sub(free());
    assert!(taken < weights.len() as u64 / 10, "{taken} bytes were copied");
}

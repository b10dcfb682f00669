//! `larder prepare`: directories for a daemon that is not root.

use std::fs;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;
use std::process::Command;

use super::support::larder::Home;
use super::support::skip::skipped;

fn owner(path: &Path) -> (u32, u32) {
    let found = fs::metadata(path).unwrap();
    (found.uid(), found.gid())
}

/// The home, with a socket outside of the volume as in a pod; `None` if files cannot be given away here.
fn home() -> Option<Home> {
    let mut home = Home::new();
    if chown(home.path().join("tmp"), Some(7437), Some(7437)).is_err() {
        skipped("giving files away needs CAP_CHOWN");
        return None;
    }
    home.set("LARDER_SOCKET", home.path().join("run/larder.sock").to_str().unwrap());
    home.set("LARDER_SERVE_POD_SOCKET", home.path().join("run/pods/larder.sock").to_str().unwrap());
    Some(home)
}

const WORDS: [&str; 3] = ["prepare", "--owner", "7437:7438"];

#[tokio::test]
async fn root_with_no_other_right_makes_the_directories_and_gives_them_away() {
    let Some(home) = home() else { return };
    for _ in 0..2 {
        let larder = home.command(&WORDS);
        let mut command = Command::new("setpriv");
        command.args(["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all,+chown"]).arg(larder.get_program());
        command.args(larder.get_args()).env_clear();
        command.envs(larder.get_envs().filter_map(|(name, value)| Some((name, value?))));
        let output = match command.output() {
            Ok(output) => output,
            Err(e) => return skipped(&format!("setpriv: {e}")),
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(owner(&home.root()), (7437, 7438));
        assert_eq!(owner(&home.path().join("run")), (7437, 7438));
    }
    assert_eq!(fs::read_dir(home.root()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_volume_and_its_sockets_are_given_away_with_what_is_in_them_as_it_was() {
    let Some(home) = home() else { return };
    drop(home.serve().await);
    // It was killed, so its sockets are still there.
    home.done(&WORDS).await;
    assert_eq!(owner(&home.root()), (7437, 7438));
    assert_eq!(owner(&home.path().join("run")), (7437, 7438));
    assert_ne!(owner(&home.root().join("blobs")), (7437, 7438));
}

#[tokio::test]
async fn a_directory_that_holds_something_else_is_not_given_away() {
    let Some(home) = home() else { return };
    for (dir, code) in [("volume", "volume-foreign"), ("run", "listen-failed")] {
        let dir = home.path().join(dir);
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("thesis.tex"), "words").unwrap();
        let before = owner(&dir);
        let ended = home.run(&WORDS).await;
        assert_eq!(ended.code, Some(78), "{}", ended.err);
        assert!(ended.err.contains(&format!("code: {code}")) && ended.err.contains("thesis.tex"), "{}", ended.err);
        assert_eq!(owner(&dir), before);
        fs::remove_file(dir.join("thesis.tex")).unwrap();
    }
}

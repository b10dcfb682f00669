//! The program as a user runs it: what is on which stream, and how it ends.

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// larder for a user with nothing but this home.
fn larder(home: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_larder"));
    command.args(words).env_clear().env("HOME", home).env("LARDER_ROOT", home.join("volume")).stdin(Stdio::null());
    command
}

fn run(home: &Path, words: &[&str]) -> Output {
    larder(home, words).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn config_show_says_each_value_and_who_said_it() {
    let home = tempfile::tempdir().unwrap();
    let shown = run(home.path(), &["config", "show", "--socket", "/x.sock"]);
    let out = text(&shown.stdout);
    assert!(shown.status.success(), "{}", text(&shown.stderr));
    let line = |key: &str| out.lines().find(|line| line.starts_with(key)).unwrap().to_owned();
    assert!(line("volume.root").ends_with("env LARDER_ROOT"));
    assert!(line("serve.socket").ends_with("flag --socket"));
    assert!(line("pull.memory").ends_with("default"));
    let root = run(home.path(), &["config", "show", "volume.root"]);
    assert_eq!(text(&root.stdout), format!("{}\n", home.path().join("volume").display()));
    assert!(!home.path().join("volume").exists(), "looking at the configuration makes no volume");
}

#[test]
fn config_check_lists_every_mistake_and_ends_with_78() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("larder.toml");
    std::fs::write(&file, "[pull]\nmemory = \"1KiB\"\n[volume]\nqota = \"5GB\"\n").unwrap();
    let file = file.to_str().unwrap();
    let checked = run(home.path(), &["config", "check", file]);
    assert_eq!(checked.status.code(), Some(78));
    assert_eq!(text(&checked.stdout), "");
    assert_eq!(
        text(&checked.stderr),
        format!(
            "error: cannot use the configuration: 2 problems\n  \
             {file}:2 pull.memory: \"1KiB\" is not a size from 8MiB to 4GiB\n  \
             {file}:4 volume.qota: unknown key; did you mean `volume.quota`?\n\
             action: correct what is listed and run `larder config check`; docs/configuration.md has every key            \
             code: config-invalid\n"
        )
    );
    let checked = run(home.path(), &["config", "check"]);
    assert_eq!((checked.status.code(), text(&checked.stdout).as_str()), (Some(0), "ok\n"));
}

#[test]
fn a_bad_reference_is_refused_before_anything_is_done() {
    let home = tempfile::tempdir().unwrap();
    let refused = run(home.path(), &["pull", "ftp://host/file", "-o", "json"]);
    assert_eq!(refused.status.code(), Some(65));
    let body: serde_json::Value = serde_json::from_slice(&refused.stderr).unwrap();
    assert_eq!(body["code"], "bad-reference");
    assert!(body["action"].as_str().unwrap().contains("https://host/file"));
    assert!(refused.stdout.is_empty());
    assert!(!home.path().join("volume").exists());
}

#[test]
fn a_socket_that_was_named_without_a_daemon_ends_with_75() {
    let home = tempfile::tempdir().unwrap();
    let refused = larder(home.path(), &["list"]).env("LARDER_SOCKET", home.path().join("s.sock")).output().unwrap();
    assert_eq!(refused.status.code(), Some(75));
    assert!(text(&refused.stderr).contains("code: daemon-unreachable"));
    assert!(!home.path().join("volume").exists());
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let home = tempfile::tempdir().unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = larder(home.path(), &["config", "show"]).stdout(writer).output().unwrap();
    assert_eq!((ended.status.code(), text(&ended.stderr).as_str()), (Some(0), ""));
}

#[test]
fn completions_know_the_commands() {
    let home = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let script = text(&run(home.path(), &["completions", shell]).stdout);
        assert!(["pull", "remove", "config"].iter().all(|word| script.contains(word)), "{shell}");
    }
}

#[test]
fn doctor_tells_what_could_be_better_and_fails_only_for_what_does_not_work() {
    let home = tempfile::tempdir().unwrap();
    let told = run(home.path(), &["doctor"]);
    let out = text(&told.stdout);
    assert!(told.status.success(), "{}", text(&told.stderr));
    let line = |what: &str| out.lines().find(|line| line.contains(what)).unwrap_or_else(|| panic!("{out}")).to_owned();
    assert!(line(" daemon ").starts_with("note ") && line(" daemon ").contains("larder serve"));
    assert!(line(" descriptors ").contains("read-only mount") || line(" descriptors ").contains("CAP_SYS_ADMIN"));
    assert!(line(" snapshots ").starts_with("ok "));

    let socket = home.path().join("s.sock");
    let told = larder(home.path(), &["doctor"]).env("LARDER_SOCKET", &socket).output().unwrap();
    assert_eq!(told.status.code(), Some(75));
    assert!(text(&told.stdout).contains("problem  daemon  unreachable"), "{}", text(&told.stdout));
    assert!(text(&told.stderr).contains("code: daemon-unreachable"));
}

#[test]
fn the_readme_names_the_command_that_tests() {
    let readme = include_str!("../../README.md");
    assert!(readme.contains("```sh\ncargo test\n```"));
}

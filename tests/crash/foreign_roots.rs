//! Roots, sockets and disks that are not what they should be: each is told, with what to do, and left alone.

use std::fs;
use std::path::Path;

use super::checker;
use super::larder::{Ended, Home};
use super::loop_disk::{Kind, LoopDisk};
use super::row::Row;
use super::skip::skipped;

/// Sets the scene below this root.
type Scene = fn(&Path);

/// What a start must say, where `ROOT` stands for the root.
fn assert_told(home: &Home, ended: &Ended, told: &str) {
    let said = ended.err.replace(home.root().to_str().unwrap(), "ROOT");
    assert_eq!((ended.code, said.as_str()), (Some(78), told));
}

const SCENES: [(&str, Scene, &str); 5] = [
    (
        "of a newer larder",
        |root| write(root, "FORMAT", "larder-volume 2\n"),
        "error: cannot open volume `ROOT`: its format is 2, this larder knows up to 1\n\
         action: run the larder that wrote it, or a newer one; nothing was touched            code: volume-newer\n",
    ),
    (
        "of something else",
        |root| write(root, "photos/cat.jpg", "meow"),
        "error: cannot open volume `ROOT`: it is not a larder volume, it has no `FORMAT` but holds \"photos\"\n\
         action: point `volume.root` at an empty directory; nothing in this one was touched            \
         code: volume-foreign\n",
    ),
    (
        "with another format",
        |root| write(root, "FORMAT", "something\n"),
        "error: cannot open volume `ROOT`: it is not a larder volume, its `FORMAT` is not ours\n\
         action: point `volume.root` at an empty directory; nothing in this one was touched            \
         code: volume-foreign\n",
    ),
    (
        "a file",
        |root| fs::write(root, "x").unwrap(),
        "error: cannot open volume `ROOT`: it is not a larder volume, it is not a directory\n\
         action: point `volume.root` at an empty directory; nothing in this one was touched            \
         code: volume-foreign\n",
    ),
    (
        "with a directory as lock",
        |root| write(root, "lock/file", "x"),
        "error: cannot create `ROOT/lock`: Is a directory (os error 21)\n\
         action: look for disk errors (`dmesg`) and at the owner and mode of `ROOT/lock`            code: disk-error\n",
    ),
];

fn write(root: &Path, name: &str, text: &str) {
    let path = root.join(name);
    fs::create_dir_all(path.parent().expect("it is below the root")).unwrap();
    fs::write(path, text).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_that_is_not_ours_is_told_and_left_alone() {
    let mut row = Row::new("foreign roots");
    for (name, set, told) in SCENES {
        let case = async {
            let home = Home::new();
            set(&home.root());
            let before = checker::files_in(home.path());
            assert_told(&home, &home.run(&["serve"]).await, told);
            assert!(checker::files_in(home.path()) == before, "it was changed");
        };
        row.case(name, case).await;
    }
    row.end();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_root_on_a_read_only_disk_is_told() {
    let home = Home::new();
    let disk = match LoopDisk::new(Kind::Ext4, 16, &home.root()) {
        Ok(disk) => disk,
        Err(why) => return skipped(&why),
    };
    home.done(&["list"]).await;
    disk.unmount().unwrap();
    disk.mount_read_only().unwrap();
    assert_told(
        &home,
        &home.run(&["serve"]).await,
        "error: cannot create `ROOT/lock`: Read-only file system (os error 30)\n\
         action: look for why its file system is read-only (`dmesg`, `findmnt`), and mount it writable            \
         code: disk-error\n",
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_in_the_place_of_the_socket_is_told_and_left_alone() {
    let home = Home::new();
    let file = home.path().join("precious");
    fs::write(&file, "x").unwrap();
    let ended = home.run(&["serve", "--socket", file.to_str().unwrap()]).await;
    let file = file.to_str().unwrap();
    let told = format!(
        "error: cannot listen on `{file}`: it exists and is not a socket\naction: move `{file}` away, or set \
         `serve.socket` (LARDER_SOCKET) or `serve.pod_socket` (LARDER_SERVE_POD_SOCKET)            code: listen-failed\n"
    );
    assert!(ended.code == Some(78) && ended.err.ends_with(&told), "{ended:?}");
    assert_eq!(fs::read_to_string(file).unwrap(), "x");
}

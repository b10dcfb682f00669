//! `larder bench` as a user runs it: every row is there, and nothing is left behind.

use std::collections::BTreeSet;
use std::path::Path;

use crate::support::larder::Home;

/// Small enough for a test; what is measured then says nothing.
const TINY: [&str; 4] = ["--size", "4MB", "--rounds", "1"];

fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).unwrap().next().is_none()
}

/// The names in the page's table of rows.
fn documented_rows() -> BTreeSet<String> {
    let page = include_str!("../../docs/performance.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` | "));
    rows.map(|(name, _)| name.to_owned()).collect()
}

/// The names in the page's tables of fields.
fn documented_fields() -> BTreeSet<String> {
    let page = include_str!("../../docs/performance.md");
    let tables = page.split("\n| Field | Means |\n|---|---|\n").skip(1);
    let rows = tables.flat_map(|table| table.lines().map_while(|line| line.strip_prefix("| ")?.split_once(" | ")));
    rows.flat_map(|(names, _)| names.split(", ").map(str::to_owned)).collect()
}

fn keys(object: &serde_json::Value) -> Vec<String> {
    object.as_object().unwrap().keys().cloned().collect()
}

#[tokio::test]
async fn every_row_is_measured_printed_and_documented_and_the_directory_is_left_clean() {
    let home = Home::new();
    let disk = tempfile::tempdir().unwrap();
    let words = ["bench", "--json", "--dir", disk.path().to_str().unwrap()];
    let printed = home.done(&[&words[..], &TINY].concat()).await;
    let report: serde_json::Value = serde_json::from_str(&printed).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let names: BTreeSet<String> = rows.iter().map(|row| row["row"].as_str().unwrap().to_owned()).collect();
    assert_eq!(names, documented_rows());
    assert_eq!([keys(&report), keys(&rows[0])].concat().into_iter().collect::<BTreeSet<_>>(), documented_fields());
    for row in rows {
        let measured = row["measured"].as_f64();
        // A small machine cannot do everything: then it says why.
        assert!(measured.is_some() != row["why"].is_string(), "{row}");
        assert!(measured.is_none_or(|value| value.is_finite() && value >= 0.0), "{row}");
    }
    let value = |name: &str| rows.iter().find(|row| row["row"] == name).unwrap()["measured"].as_f64();
    for always in ["cold-pull", "checked-pull", "repull", "open", "open-command", "warm-up", "load-warm"] {
        assert!(value(always) > Some(0.0), "{always}: {report:#}");
    }
    // What does not depend on how fast this machine is.
    assert_eq!((value("crowd"), value("repull-requests"), value("repull-bytes")), (Some(1.0), Some(1.0), Some(0.0)));
    assert!(value("revision-origin").unwrap() < 0.11 && value("resume").unwrap() >= 1.0, "{report:#}");
    assert_eq!((report["shards"].as_u64(), report["rounds"].as_u64()), (Some(4), Some(1)));
    assert!(is_empty(disk.path()));
    assert!(!home.root().exists(), "a volume of the user is neither needed nor made");
}

#[tokio::test]
async fn one_row_can_be_measured_alone_and_is_printed_as_a_table() {
    let home = Home::new();
    let disk = tempfile::tempdir().unwrap();
    let words = ["bench", "--only", "repull", "--dir", disk.path().to_str().unwrap()];
    let ended = home.run(&[&words[..], &TINY].concat()).await;
    assert_eq!(ended.code, Some(0), "{}", ended.err);
    assert!(ended.out.starts_with("larder 0.1.0 on "), "{}", ended.out);
    let table: Vec<&str> = ended.out.lines().skip_while(|line| !line.starts_with("ROW")).collect();
    assert_eq!(table.len(), 2, "{}", ended.out);
    assert!(table[1].starts_with("repull ") && table[1].contains(" round-trip "), "{}", ended.out);
    assert!(ended.err.contains("measuring round-trip, repull"), "{}", ended.err);
    assert!(is_empty(disk.path()));
}

#[tokio::test]
async fn an_interruption_leaves_nothing_behind() {
    let home = Home::new();
    let disk = tempfile::tempdir().unwrap();
    let mut bench = home.start(&["bench", "--size", "64MB", "--dir", disk.path().to_str().unwrap()]);
    bench.says("measuring receive, floor").await;
    bench.terminate();
    let (status, out) = bench.ended().await;
    assert_eq!((status.code(), out.as_str()), (Some(130), ""));
    assert!(bench.said().contains("code: bench-stopped"), "{}", bench.said());
    assert!(is_empty(disk.path()));
}

#[tokio::test]
async fn what_cannot_be_measured_is_refused_with_what_to_do() {
    let home = Home::new();
    let unknown = home.run(&["bench", "--only", "cold-pul"]).await;
    assert_eq!(unknown.code, Some(2));
    assert!(unknown.err.contains("a similar value exists: 'cold-pull'"), "{}", unknown.err);
    let missing = home.run(&["bench", "--dir", "/nowhere", "--json"]).await;
    let problem: serde_json::Value = serde_json::from_str(&missing.err).unwrap();
    assert_eq!((missing.code, problem["code"].as_str()), (Some(78), Some("disk-error")));
    assert!(problem["action"].as_str().unwrap().contains("--dir"), "{problem}");
    let mut full = home.command(&["bench"]);
    // As if all of the disk were left to others.
    full.env("LARDER_VOLUME_MIN_FREE", "1PB").current_dir(home.path());
    let full = tokio::task::spawn_blocking(move || full.output().unwrap()).await.unwrap();
    let said = String::from_utf8(full.stderr).unwrap();
    assert_eq!(full.status.code(), Some(73), "{said}");
    assert!(said.contains("code: volume-full") && said.contains("`--size`"), "{said}");
}

//! `larder doctor --node`: a machine before and after larder is there.

use super::support::api_server::ApiServer;
use super::support::hub::{RepoFile, TestHub};
use super::support::larder::{Ended, Home};
use super::support::model_origin::ModelOrigin;

/// Mark, state and meaning of a finding.
fn finding(ended: &Ended, name: &str) -> (String, String, String) {
    let findings: serde_json::Value = serde_json::from_str(&ended.out).unwrap_or_else(|e| panic!("{e}: {ended:?}"));
    let found = findings.as_array().unwrap().iter().find(|finding| finding["name"] == name);
    let found = found.unwrap_or_else(|| panic!("no {name}: {ended:?}"));
    let text = |key: &str| found[key].as_str().unwrap().to_owned();
    (text("mark"), text("state"), text("means"))
}

#[tokio::test]
async fn a_machine_is_looked_at_before_larder_is_there_and_nothing_is_left() {
    let home = Home::new();
    let ended = home.run(&["doctor", "--node", "-o", "json"]).await;
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(finding(&ended, "daemon").1, "none");
    assert!(finding(&ended, "kernel").1.starts_with("Linux "));
    assert!(finding(&ended, "room").1.contains(" free"));
    assert!(finding(&ended, "file system").2.contains("hard links: yes"));
    let (_, speed, means) = finding(&ended, "speed");
    assert!(speed.starts_with("reads ") || means.starts_with("not measured"), "{speed} {means}");
    assert!(!home.root().exists(), "a look makes no volume");
    let names: Vec<_> = std::fs::read_dir(home.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| !name.to_str().unwrap().contains("doctor")), "{names:?}");

    let told = home.run(&["doctor", "--node"]).await;
    assert_eq!(told.code, Some(0), "{told:?}");
    assert!(told.out.contains("\nok    kernel ") || told.out.contains("\nnote  kernel "), "{}", told.out);
}

#[tokio::test]
async fn each_pinned_model_is_asked_for_at_its_source_and_nothing_is_fetched() {
    let (origin, hub) = (ModelOrigin::start().await, TestHub::start().await);
    origin.put("m", "model.safetensors", b"weights");
    hub.publish("acme/private", vec![RepoFile::new("config.json", b"{}".to_vec())]);
    hub.make_private("acme/private");
    hub.publish("acme/gated", vec![RepoFile::new("config.json", b"{}".to_vec())]);
    hub.gate("acme/gated");
    hub.allow("hf_of_nobody");
    let here = origin.reference("m");
    let mut home = Home::new();
    home.set("HF_ENDPOINT", hub.endpoint());
    let mut daemon = home.serve().await;
    home.done(&["pin", &here]).await;
    home.set("LARDER_PULL_PINNED", "hf://acme/gated");
    home.set("HF_TOKEN", "hf_of_nobody");
    let ended = home.run(&["doctor", "--node", "-o", "json"]).await;
    assert_eq!(finding(&ended, "hf://acme/gated@main").1, "licence-not-accepted", "it is listed, and not given");
    home.set("HF_TOKEN", "");
    home.set("LARDER_PULL_PINNED", &format!("{here} hf://acme/private https://127.0.0.1:1/m"));
    let ended = home.run(&["doctor", "--node", "-o", "json"]).await;
    assert_eq!(ended.code, Some(77), "that of the first problem: {ended:?}");
    assert_eq!(finding(&ended, "daemon").1, "answers");
    let (mark, state, means) = finding(&ended, &here);
    assert!(mark == "ok" && state == "found" && means.contains("7 B in 1 file"), "{means}");
    let (mark, state, means) = finding(&ended, "hf://acme/private@main");
    assert!(mark == "problem" && state == "auth-missing" && means.contains("HF_TOKEN"), "{state} {means}");
    let (mark, state, means) = finding(&ended, "https://127.0.0.1:1/m");
    assert!(mark == "problem" && state == "source-unreachable" && means.contains("the connection failed"), "{means}");
    daemon.terminate();
    daemon.ended().await;
}

#[tokio::test]
async fn a_right_that_is_missing_in_the_cluster_is_named_with_what_it_costs() {
    let api = ApiServer::start_with_tls().await;
    let mut home = Home::new();
    let ended = home.run(&["doctor", "--node", "-o", "json"]).await;
    assert_eq!(finding(&ended, "rights").1, "none needed");
    let identity = api.becomes_the_cluster_of(&mut home);
    home.set("LARDER_KUBERNETES_NODE", "n1");
    home.set("LARDER_KUBERNETES_ANNOUNCE", "true");
    let ended = home.run(&["doctor", "--node", "-o", "json"]).await;
    assert_eq!(ended.code, Some(78), "{ended:?}");
    assert!(finding(&ended, "rights").2.contains("automountServiceAccountToken"), "this is no pod");

    let Some(ended) = home.run_as_pod(identity, &["doctor", "--node", "-o", "json"]).await else { return };
    assert_eq!(ended.code, Some(0), "{ended:?}");
    assert_eq!(finding(&ended, "may list pods").0, "ok");
    api.denies("watch", "pods");
    let Some(ended) = home.run_as_pod(identity, &["doctor", "--node", "-o", "json"]).await else { return };
    assert_eq!(ended.code, Some(78), "{ended:?}");
    let (mark, state, means) = finding(&ended, "may watch pods");
    assert!(mark == "problem" && state == "no" && means.contains("leases of pods stay"), "{means}");
    assert_eq!(finding(&ended, "may create events").0, "ok");
}

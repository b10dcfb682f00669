//! The rules and the dashboard of `daemonset/`, as Prometheus reads them. `tests/documentation.rs` compares them with the pages.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::support::skip::skipped;

fn daemonset(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset").join(name)
}

/// `promtool`, at a file. `false`, after saying why, if it is not there.
fn promtool_takes(words: &[&str], file: &Path) -> bool {
    let program = std::env::var_os("LARDER_TEST_PROMTOOL").unwrap_or_else(|| "promtool".into());
    match Command::new(&program).args(words).arg(file).output() {
        Err(e) => skipped(&format!("`{}` does not run: {e}; set LARDER_TEST_PROMTOOL", program.display())),
        Ok(output) => {
            let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
            assert!(output.status.success(), "{said}");
            return true;
        }
    }
    false
}

#[test]
fn alerts_come_when_they_must_and_not_when_they_need_not() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/support/alerts.test.yaml");
    if promtool_takes(&["check", "rules"], &daemonset("alerts.yaml")) {
        promtool_takes(&["test", "rules"], &here);
    }
    // Each is tried there, for silence too.
    let tests = std::fs::read_to_string(here).unwrap();
    let rules: Value = serde_saphyr::from_str(&std::fs::read_to_string(daemonset("alerts.yaml")).unwrap()).unwrap();
    for rule in rules["groups"][0]["rules"].as_array().unwrap() {
        let name = rule["alert"].as_str().unwrap();
        assert!(tests.contains(&format!("alertname: {name}}}")), "{name} is not tried for silence");
        assert!(tests.contains(&format!("alertname: {name}\n        exp_alerts:")), "{name} never comes");
    }
}

#[test]
fn every_panel_of_the_dashboard_is_a_query_that_prometheus_reads() {
    let text = std::fs::read_to_string(daemonset("dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let asked = panels.iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let rules: Vec<Value> = asked.map(|target| json!({"record": "panel", "expr": target["expr"]})).collect();
    assert!(rules.len() >= panels.len());
    let file = tempfile::NamedTempFile::new().unwrap();
    // JSON is YAML. Queries that are asked twice would be found fault with as rules, so each is in a group of its own.
    let groups = rules.iter().enumerate().map(|(at, rule)| json!({"name": format!("panel {at}"), "rules": [rule]}));
    std::fs::write(file.path(), json!({"groups": groups.collect::<Vec<_>>()}).to_string()).unwrap();
    promtool_takes(&["check", "rules", "--lint=none"], file.path());
}

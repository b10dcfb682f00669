//! Pages that repeat what the code says are compared with it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use larder::fault::{Code, Fault};
use larder::serve::fd::MAX_POD_CONNECTIONS;
use larder::telemetry::metrics::METRICS;
use larder::wire::frame::{MAX_ANSWER_BYTES, MAX_BATCH_FILES, MAX_REQUEST_BYTES, Request};

fn page(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs").join(name);
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The cells of the table rows whose first cell begins with `mark`.
fn rows(page: &str, mark: &str) -> Vec<Vec<String>> {
    page.lines()
        .filter(|line| line.starts_with(&format!("| {mark}")))
        .map(|line| line.trim_matches('|').split(" | ").map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

#[test]
fn errors_md_has_one_row_for_each_code() {
    let found = rows(&page("errors.md"), "<a id=");
    let names: Vec<&str> = found.iter().map(|row| row[0].as_str()).collect();
    let expected: Vec<String> = Code::ALL.iter().map(|code| format!("<a id=\"{code}\"></a>`{code}`")).collect();
    assert_eq!(names, expected);
    for (row, code) in found.iter().zip(Code::ALL) {
        let fault = code.fault();
        let facts = [fault.label().to_owned(), fault.http_status().to_string(), fault.exit_code().to_string()];
        assert_eq!(row[1..4], facts, "{code}");
        assert!(row.len() == 6 && !row[4].is_empty() && !row[5].is_empty(), "{code}");
    }
}

#[test]
fn errors_md_has_one_row_for_each_class() {
    let page = page("errors.md");
    for fault in Fault::ALL {
        let row = rows(&page, &format!("`{}` ", fault.label()));
        let facts = [fault.http_status().to_string(), fault.exit_code().to_string()];
        assert_eq!(row.iter().map(|row| &row[2..]).collect::<Vec<_>>(), [facts], "{}", fault.label());
    }
}

#[test]
fn api_md_has_one_heading_for_each_route() {
    let api = serde_json::to_value(larder::serve::openapi()).unwrap();
    let mut routes = BTreeSet::new();
    for (path, item) in api["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys() {
            routes.insert(format!("{} {path}", method.to_uppercase()));
        }
    }
    let page = page("api.md");
    let headings: BTreeSet<String> =
        page.lines().filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`')).map(str::to_owned).collect();
    assert_eq!(headings, routes);
    for section in page.split("\n### `").skip(1) {
        assert!(section.contains("larder-curl "), "no example for {}", section.lines().next().unwrap());
    }
}

#[test]
fn examples_in_api_md_have_the_fields_of_the_schemas() {
    let api = serde_json::to_value(larder::serve::openapi()).unwrap();
    let page = page("api.md");
    let examples: Vec<serde_json::Value> = page
        .split("```json\n")
        .skip(1)
        .map(|rest| serde_json::from_str(rest.split("```").next().unwrap()).expect("an example is not JSON"))
        .collect();
    let fields = |value: &serde_json::Value| value.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    for (schema, has) in [
        ("PullStatus", "files_done"),
        ("WarmStatus", "resident_bytes_before"),
        ("ProblemBody", "detail"),
        ("Readiness", "ready"),
    ] {
        let example = examples.iter().find(|e| e.get(has).is_some()).unwrap_or_else(|| panic!("no {schema}"));
        let mut expected = fields(&api["components"]["schemas"][schema]["properties"]);
        // Only there when it is known.
        expected.remove("retry_after_seconds");
        assert_eq!(fields(example), expected, "{schema}");
    }
    for (list, schema) in [("leases", "LeaseInfo"), ("pins", "PinInfo"), ("starts", "Start")] {
        let example = examples.iter().find_map(|e| e.get(list)?.get(0)).unwrap_or_else(|| panic!("no {schema}"));
        assert_eq!(fields(example), fields(&api["components"]["schemas"][schema]["properties"]), "{schema}");
    }
    let start = examples.iter().find_map(|e| e.get("starts")?.get(0)).unwrap();
    for (part, schema) in [
        (&start["pull"], "PullTimeline"),
        (&start["pull"]["stages"][0], "StageSpan"),
        (&start["leases"][0], "StartLease"),
    ] {
        assert_eq!(fields(part), fields(&api["components"]["schemas"][schema]["properties"]), "{schema}");
    }
    let models = examples.iter().find_map(|e| e["models"].get(0)?.get("path").map(|_| &e["models"][0])).unwrap();
    assert_eq!(fields(models), fields(&api["components"]["schemas"]["ModelInfo"]["properties"]));
}

#[test]
fn protocol_md_has_the_requests_and_the_limits_of_the_code() {
    let page = page("protocol.md");
    let requests = page.split("\n## Requests\n").nth(1).expect("a section `Requests`").split("\n## ").next().unwrap();
    let examples: Vec<Request> = requests
        .split("```json\n")
        .skip(1)
        .map(|rest| serde_json::from_str(rest.split("```").next().unwrap()).expect("an example is no request"))
        .collect();
    assert!(matches!(examples[..], [Request::Open(_), Request::More {}, Request::Release { .. }]), "{examples:?}");
    let grouped = |number: usize| match number {
        0..1000 => number.to_string(),
        1000..1_000_000 => format!("{},{:03}", number / 1000, number % 1000),
        _ => format!("{},{:03},{:03}", number / 1_000_000, number / 1000 % 1000, number % 1000),
    };
    for (number, unit) in [
        (MAX_REQUEST_BYTES, " bytes"),
        (MAX_ANSWER_BYTES, " bytes"),
        (MAX_BATCH_FILES, " files"),
        (MAX_POD_CONNECTIONS, " at most"),
    ] {
        let said = format!("{}{unit}", grouped(number));
        assert!(page.contains(&said), "it does not say {said}");
    }
}

#[test]
fn operations_md_has_one_row_for_each_metric() {
    let page = page("operations.md");
    let section = page.split("\n## Metrics\n").nth(1).expect("no section `Metrics`").split("\n## ").next().unwrap();
    let found = rows(section, "`");
    let expected: Vec<Vec<String>> = METRICS
        .iter()
        .map(|metric| {
            let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
            vec![format!("`{}`", metric.name), labels.join(", "), metric.help.to_owned()]
        })
        .collect();
    assert_eq!(found, expected);
}

fn of_daemonset(name: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("daemonset").join(name)).unwrap()
}

#[test]
fn operations_md_has_one_paragraph_for_each_alert() {
    let rules: serde_json::Value = serde_saphyr::from_str(&of_daemonset("alerts.yaml")).unwrap();
    let page = page("operations.md");
    let section = page.split("\n## Alerts\n").nth(1).expect("no section `Alerts`").split("\n## ").next().unwrap();
    let mut paragraphs = section.split("\n### ").skip(1).map(|paragraph| paragraph.split_once('\n').unwrap());
    for rule in rules["groups"][0]["rules"].as_array().unwrap() {
        let name = rule["alert"].as_str().unwrap();
        let (heading, text) = paragraphs.next().unwrap_or_else(|| panic!("no paragraph for {name}"));
        assert_eq!(heading, name);
        assert!(text.trim().len() > 100, "{name}: what does it mean, and what is to be done?");
        let runbook = format!("docs/operations.md#{}", name.to_lowercase());
        assert_eq!(rule["annotations"]["runbook"], runbook, "{name}");
    }
    assert_eq!(paragraphs.next(), None, "an alert that is not there");
}

#[test]
fn alerts_and_dashboard_ask_only_for_what_is_measured() {
    for file in ["alerts.yaml", "dashboard.json"] {
        let text = of_daemonset(file);
        let words = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let asked: BTreeSet<&str> =
            words.filter(|word| word.starts_with("larder_")).map(|word| word.trim_end_matches("_bucket")).collect();
        assert!(asked.len() > 8, "{file}: {asked:?}");
        for name in asked {
            assert!(METRICS.iter().any(|metric| metric.name == name), "{file} asks for {name}");
        }
    }
}

#[test]
fn kubernetes_md_gives_people_the_rights_that_the_plug_in_needs_and_no_more() {
    let page = page("kubernetes.md");
    let rights = page.split("\n### Rights\n").nth(1).expect("no section `Rights`").split("\n#").next().unwrap();
    let yaml = rights.split("```yaml\n").nth(1).unwrap().split("```").next().unwrap();
    let rules: Vec<serde_json::Value> = yaml
        .split("---\n")
        .map(|object| serde_saphyr::from_str::<serde_json::Value>(object).expect("it is YAML"))
        .map(|object| serde_json::json!([object["kind"], object["rules"]]))
        .collect();
    let rule = |resource: &str, verbs: &[&str]| serde_json::json!({"apiGroups": [""], "resources": [resource], "verbs": verbs});
    let in_larder = [rule("pods", &["list"]), rule("pods/portforward", &["get", "create"])];
    let everywhere = [rule("nodes", &["list"])];
    assert_eq!(rules, [serde_json::json!(["Role", in_larder]), serde_json::json!(["ClusterRole", everywhere])]);
}

#[test]
fn reliability_md_names_tests_that_are_there() {
    fn sources(dir: &Path, all: &mut String) {
        for entry in fs::read_dir(dir).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                sources(&entry.path(), all);
            } else if entry.path().extension().is_some_and(|extension| extension == "rs") {
                *all += &fs::read_to_string(entry.path()).unwrap();
            }
        }
    }
    let mut all = String::new();
    for dir in ["src", "tests"] {
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(dir), &mut all);
    }
    let page = page("reliability.md");
    let tables = page.lines().filter(|line| line.starts_with("| "));
    let held = tables.filter_map(|row| row.trim_end_matches(" |").rsplit_once(" | "));
    let words = held.flat_map(|(_, held)| held.split('`').skip(1).step_by(2));
    let names: Vec<&str> =
        words.map(|word| word.rsplit("::").next().expect("a word")).filter(|w| w.contains('_')).collect();
    assert!(names.len() > 40, "{names:?}");
    for name in names {
        assert!(name == "write_all_at" || all.contains(&format!("fn {name}(")), "no test is called {name}");
    }
}

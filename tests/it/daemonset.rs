//! What `daemonset/` asks of a cluster: as it is rendered, before any cluster sees it. `pods.rs` runs it.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use larder::kubernetes::{POD_LABEL, POD_PORT};
use serde_json::{Value, json};

use super::support::larder::Home;
use super::support::manifests::{
    base_with, components, containers, directory, example, example_text, examples, list, named, objects, only, rendered,
};
use super::support::real_client::{python, run};
use super::support::skip::skipped;

/// The base alone, and with each component.
fn renderings() -> Option<Vec<(String, Vec<Value>)>> {
    let mut all = vec![("base".to_owned(), base_with(&[])?)];
    for component in components() {
        all.push((component.clone(), base_with(&[&component])?));
    }
    Some(all)
}

/// The `spec` of the daemon's pods.
fn pod_spec(objects: &[Value]) -> &Value {
    &only(objects, "DaemonSet")["spec"]["template"]["spec"]
}

/// Capability, right or user that a container has beyond what `restricted` allows, in words.
fn privileges(pod: &Value, container: &Value) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    let of =
        |key: &str| container["securityContext"].get(key).or(pod["securityContext"].get(key)).unwrap_or(&Value::Null);
    for key in ["hostNetwork", "hostPID", "hostIPC"] {
        found.extend((pod[key] == true).then(|| key.to_owned()));
    }
    for (key, wanted) in [
        ("runAsNonRoot", json!(true)),
        ("allowPrivilegeEscalation", json!(false)),
        ("readOnlyRootFilesystem", json!(true)),
        ("seccompProfile", json!({"type": "RuntimeDefault"})),
    ] {
        found.extend((*of(key) != wanted).then(|| key.to_owned()));
    }
    found.extend((!of("privileged").is_null()).then(|| "privileged".to_owned()));
    let dropped = list(container, "/securityContext/capabilities/drop");
    found.extend((dropped != [json!("ALL")]).then(|| "capabilities that are not dropped".to_owned()));
    let added = list(container, "/securityContext/capabilities/add");
    found.extend(added.iter().map(|capability| capability.as_str().unwrap().to_owned()));
    found
}

#[test]
fn no_container_has_a_privilege_without_a_reason() {
    let Some(renderings) = renderings() else { return };
    for (name, objects) in renderings {
        let pod = pod_spec(&objects);
        for container in containers(pod) {
            let reasons: &[&str] = match (name.as_str(), container["name"].as_str().unwrap()) {
                // It gives root's directories away.
                (_, "prepare") => &["CHOWN", "runAsNonRoot"],
                // Its mount needs the capability, the capability needs root, and Kubernetes wants the last one said.
                ("read-only-descriptors", "larder") => &["SYS_ADMIN", "runAsNonRoot", "allowPrivilegeEscalation"],
                _ => &[],
            };
            let reasons: BTreeSet<String> = reasons.iter().map(|&reason| reason.to_owned()).collect();
            assert_eq!(privileges(pod, container), reasons, "{name}: {}", container["name"]);
        }
    }
}

/// What larder may do in the API, a verb and a resource each. A rule that says it in another way is no right with a reason.
fn rights(objects: &[Value]) -> BTreeSet<String> {
    let roles = objects.iter().filter(|object| matches!(object["kind"].as_str(), Some("Role" | "ClusterRole")));
    let rules = roles.flat_map(|role| list(role, "/rules"));
    rules.fold(BTreeSet::new(), |mut found, rule| {
        assert_eq!(rule.as_object().unwrap().len(), 3, "{rule}");
        for (group, resource, verb) in list(rule, "/apiGroups").iter().flat_map(|group| {
            let resources = list(rule, "/resources").iter();
            resources.flat_map(move |resource| list(rule, "/verbs").iter().map(move |verb| (group, resource, verb)))
        }) {
            let [group, resource, verb] = [group, resource, verb].map(|text| text.as_str().unwrap());
            found.insert(format!("{verb} {resource}{}{group}", if group.is_empty() { "" } else { "." }));
        }
        found
    })
}

#[test]
fn larder_has_no_right_in_the_api_without_a_reason() {
    let Some(renderings) = renderings() else { return };
    for (name, objects) in renderings {
        // To end the leases of pods that are gone.
        let mut reasons = vec!["list pods", "watch pods"];
        if name == "node-labels" {
            // To say what is here, to take the taint of new nodes off, and to say what went wrong.
            reasons.extend(["patch nodes", "get nodes", "create events.events.k8s.io"]);
        }
        if name == "network-api" {
            // To learn who asks.
            reasons.push("create tokenreviews.authentication.k8s.io");
        }
        assert_eq!(rights(&objects), reasons.into_iter().map(str::to_owned).collect(), "{name}");
        for binding in objects.iter().filter(|object| object["kind"].as_str().unwrap().ends_with("RoleBinding")) {
            let subject = json!({"kind": "ServiceAccount", "name": "larder", "namespace": "larder"});
            assert_eq!(binding["subjects"], json!([subject]), "{name}");
            let role = &binding["roleRef"];
            let defined = |object: &Value| object["kind"] == role["kind"] && object["metadata"]["name"] == role["name"];
            assert!(objects.iter().any(defined), "{name}: {role}");
        }
        let account = only(&objects, "ServiceAccount");
        assert_eq!(pod_spec(&objects)["serviceAccountName"], account["metadata"]["name"], "{name}");
        // Whoever else runs under the account has no token of it unless he asks.
        assert_eq!(account["automountServiceAccountToken"], false, "{name}");
        assert_eq!(pod_spec(&objects)["automountServiceAccountToken"], true, "{name}");
    }
}

#[test]
fn only_the_daemon_writes_to_the_node_and_only_to_its_own_directories() {
    let Some(objects) = base_with(&[]) else { return };
    let pod = pod_spec(&objects);
    for container in containers(pod) {
        for mount in list(container, "/volumeMounts") {
            let volume = named(list(pod, "/volumes"), mount["name"].as_str().unwrap());
            let of_node = volume.get("hostPath").is_some();
            assert_eq!(mount["readOnly"] == true, !of_node, "{mount}");
        }
    }
    let paths: Vec<_> = list(pod, "/volumes").iter().filter_map(|volume| volume["hostPath"]["path"].as_str()).collect();
    assert_eq!(paths, ["/var/lib/larder", "/run/larder"]);
}

#[test]
fn memory_is_requested_and_not_limited() {
    let Some(objects) = base_with(&[]) else { return };
    for container in containers(pod_spec(&objects)) {
        assert!(container["resources"]["requests"]["memory"].is_string(), "{container}");
        assert!(container["resources"].get("limits").is_none(), "{container}");
    }
}

#[test]
fn every_setting_is_one_that_larder_takes_and_leads_into_what_is_mounted() {
    let Some(renderings) = renderings() else { return };
    for (name, objects) in renderings {
        let pod = pod_spec(&objects);
        let config = only(&objects, "ConfigMap");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), config["data"]["config.toml"].as_str().unwrap()).unwrap();
        for container in containers(pod) {
            let mut command = Command::new(env!("CARGO_BIN_EXE_larder"));
            command.env_clear().args(["config", "show", "--output", "json"]);
            for variable in list(container, "/env") {
                let value = match variable["valueFrom"]["fieldRef"]["fieldPath"].as_str() {
                    Some("spec.nodeName") => "n1",
                    _ => variable["value"].as_str().unwrap(),
                };
                command.env(variable["name"].as_str().unwrap(), value);
            }
            command.env("LARDER_CONFIG", file.path());
            let output = command.output().unwrap();
            assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
            let shown: Value = serde_json::from_slice(&output.stdout).unwrap();
            let value = |key: &str| {
                let settings = shown["settings"].as_array().or(shown.as_array()).expect("a list of settings");
                let found = settings.iter().find(|setting| setting["key"] == key).unwrap();
                found["value"].as_str().unwrap().to_owned()
            };
            let mounted = |volume: &str| {
                named(list(container, "/volumeMounts"), volume)["mountPath"].as_str().unwrap().to_owned()
            };
            assert_eq!(value("volume.root"), mounted("cache"), "{name}");
            let announces = name == "node-labels" && container["name"] != "prepare";
            assert_eq!(value("kubernetes.announce"), announces.to_string(), "{name}");
            assert_eq!(value("kubernetes.node"), if container["name"] == "prepare" { "off" } else { "n1" }, "{name}");
            assert_eq!(value("serve.socket"), format!("{}/larder.sock", mounted("run")), "{name}");
            assert_eq!(value("serve.pod_socket"), format!("{}/pods/larder.sock", mounted("run")), "{name}");
            // Whoever reaches it can remove models. Port-forwards end there.
            assert_eq!(value("serve.listen"), format!("127.0.0.1:{POD_PORT}"), "{name}");
            for (setting, component) in [("serve.health_listen", "metrics"), ("serve.network_listen", "network-api")] {
                let is_open = name == component && container["name"] != "prepare";
                assert_eq!(value(setting) != "off", is_open, "{name}: {setting}");
            }
        }
        let file = named(list(pod, "/volumes"), "config");
        assert_eq!(file["configMap"]["name"], config["metadata"]["name"], "{name}");
    }
}

fn has_a_namespace(object: &Value) -> bool {
    !matches!(object["kind"].as_str(), Some("Namespace" | "ClusterRole" | "ClusterRoleBinding"))
}

#[test]
fn every_selector_finds_the_daemons_pods() {
    let all: Vec<_> = components();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let Some(objects) = base_with(&all) else { return };
    let set = only(&objects, "DaemonSet");
    let labels = set["spec"]["template"]["metadata"]["labels"].as_object().unwrap();
    let (key, value) = POD_LABEL.split_once('=').unwrap();
    assert_eq!(labels[key], value, "`kubectl larder` finds them by it");
    let mut selected = 0;
    for object in &objects {
        let what = &object["kind"];
        let selector = match what.as_str().unwrap() {
            "DaemonSet" => &object["spec"]["selector"]["matchLabels"],
            "NetworkPolicy" => &object["spec"]["podSelector"]["matchLabels"],
            "Service" => &object["spec"]["selector"],
            _ => continue,
        };
        selected += 1;
        let selector = selector.as_object().unwrap_or_else(|| panic!("{what} selects nothing"));
        assert!(!selector.is_empty() && selector.iter().all(|(key, value)| labels.get(key) == Some(value)), "{what}");
        // A selector cannot change when larder does.
        assert!(!selector.contains_key("app.kubernetes.io/version"), "{what}");
    }
    assert_eq!(selected, 6);
    let ports = list(named(list(pod_spec(&objects), "/containers"), "larder"), "/ports");
    for object in &objects {
        let led_to = list(object, "/spec/ports").iter().map(|port| &port["targetPort"]);
        let let_in =
            list(object, "/spec/ingress").iter().flat_map(|rule| list(rule, "/ports")).map(|port| &port["port"]);
        for port in led_to.chain(let_in) {
            named(ports, port.as_str().unwrap());
        }
        if let Some(scraped) = object["metadata"]["annotations"]["prometheus.io/port"].as_str() {
            assert_eq!(named(ports, "health")["containerPort"].to_string(), scraped);
        }
    }
    for object in objects.iter().filter(|object| has_a_namespace(object)) {
        assert_eq!(object["metadata"]["namespace"], "larder", "{}", object["kind"]);
    }
}

#[test]
fn images_and_labels_are_of_this_version() {
    let version = env!("CARGO_PKG_VERSION");
    let ours = format!("larder:{version}");
    let Some(objects) = base_with(&[]) else { return };
    for container in containers(pod_spec(&objects)) {
        assert_eq!(container["image"], ours);
    }
    for object in &objects {
        assert_eq!(object["metadata"]["labels"]["app.kubernetes.io/version"], version, "{}", object["kind"]);
    }
    for name in examples() {
        for line in example_text(&name).lines().filter_map(|line| line.trim().strip_prefix("image: ")) {
            let (image, tag) = line.rsplit_once(':').unwrap_or_else(|| panic!("{name}: {line} has no tag"));
            assert!(tag != "latest" && (image != "larder" || tag == version), "{name}: {line}");
        }
    }
}

/// The `spec`s of pods in an example, those that others make of it included.
fn pod_specs(objects: &[Value]) -> Vec<&Value> {
    let spec = |object: &'_ Value| matches!(object["kind"].as_str(), Some("Pod" | "ServingRuntime"));
    objects.iter().filter(|object| spec(object)).map(|object| &object["spec"]).collect()
}

#[test]
fn examples_mount_the_nodes_directories_read_only_and_say_which_level_that_needs() {
    let Some(base) = base_with(&[]) else { return };
    let node = |volume: &str| named(list(pod_spec(&base), "/volumes"), volume)["hostPath"]["path"].as_str().unwrap();
    let known = [format!("{}/public", node("cache")), format!("{}/pods", node("run"))];
    for name in examples() {
        let objects = example(&name);
        let specs = pod_specs(&objects);
        assert_eq!(specs.len(), 1, "{name}");
        let volumes = list(specs[0], "/volumes");
        let of_node: Vec<_> = volumes.iter().filter(|volume| volume.get("hostPath").is_some()).collect();
        for volume in &of_node {
            assert!(known.iter().any(|path| volume["hostPath"]["path"] == *path), "{name}: {volume}");
            // A pod that comes before larder waits; nothing is made in its place.
            assert_eq!(volume["hostPath"]["type"], "Directory", "{name}");
        }
        let brought = objects.iter().filter(|object| object["kind"] == "ClusterStorageContainer");
        for container in containers(specs[0]).chain(brought.map(|object| &object["spec"]["container"])) {
            for mount in list(container, "/volumeMounts") {
                let volume = named(volumes, mount["name"].as_str().unwrap());
                assert!(mount["readOnly"] == true || volume.get("emptyDir").is_some(), "{name}: {mount}");
            }
        }
        let level = if of_node.is_empty() { "restricted" } else { "privileged" };
        let text = example_text(&name);
        let said = text.lines().find(|line| line.starts_with("# Pod Security level of the ")).unwrap_or_default();
        assert!(said.contains(&format!("namespace: `{level}`")), "{name} says {said:?}");
        if level == "restricted" {
            for container in containers(specs[0]) {
                let mut beyond = privileges(specs[0], container);
                // That level does not ask for it.
                beyond.remove("readOnlyRootFilesystem");
                assert!(beyond.is_empty(), "{name}: {beyond:?}");
            }
        }
    }
}

#[test]
fn the_claim_is_bound_to_the_volume_of_its_example() {
    let objects = example("claim.yaml");
    let (volume, claim) = (only(&objects, "PersistentVolume"), only(&objects, "PersistentVolumeClaim"));
    let pod = only(&objects, "Pod");
    assert_eq!(claim["spec"]["volumeName"], volume["metadata"]["name"]);
    for key in ["accessModes", "storageClassName"] {
        assert_eq!(claim["spec"][key], volume["spec"][key]);
    }
    assert_eq!(claim["spec"]["accessModes"], json!(["ReadOnlyMany"]));
    assert_eq!(claim["spec"]["resources"]["requests"], volume["spec"]["capacity"]);
    assert_eq!(volume["spec"]["claimRef"]["name"], claim["metadata"]["name"]);
    assert_eq!(volume["spec"]["claimRef"]["namespace"], claim["metadata"]["namespace"]);
    assert_eq!(claim["metadata"]["namespace"], pod["metadata"]["namespace"]);
    assert_eq!(pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"], claim["metadata"]["name"]);
}

#[test]
fn the_reader_of_the_example_is_that_of_the_page() {
    let objects = example("socket.yaml");
    let page = include_str!("../../docs/readers.md");
    let code = page.split("```python\n").nth(1).unwrap().split("```").next().unwrap();
    assert_eq!(only(&objects, "ConfigMap")["data"]["model.py"], code);
}

/// Prints the complaints of Kubernetes' own schema about each object.
const VALIDATE: &str = r#"
import json, sys
import kubernetes_validate as known

for thing in json.load(sys.stdin):
    try:
        known.validate(thing, known.latest_version(), strict=True)
    except known.ValidationError as error:
        print(thing["kind"], thing["metadata"]["name"], error)
"#;

/// The YAML of the pages; what is a part of a pod becomes a pod.
fn objects_of_pages() -> Vec<Value> {
    let pages = ["docs/kubernetes.md", "docs/pods.md"];
    let text =
        pages.map(|page| std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(page)).unwrap()).concat();
    let blocks = text.split("```yaml\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let parts = blocks.flat_map(objects).filter(|part| part["kind"] != "Kustomization" && part["components"].is_null());
    let whole = |part: Value| match part["kind"].is_string() {
        true => part,
        false => {
            let mut spec = json!({"containers": [{"name": "reader"}]});
            spec.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "of-a-page"}, "spec": spec})
        }
    };
    parts.map(whole).collect()
}

#[test]
fn every_object_is_as_kubernetes_defines_it() {
    let Some(renderings) = renderings() else { return };
    let Some(mut command) = python() else { return };
    if command.args(["-c", "import kubernetes_validate"]).output().is_ok_and(|output| !output.status.success()) {
        return skipped("the Python of LARDER_TEST_PYTHON cannot import kubernetes_validate");
    }
    let mut all: Vec<Value> = renderings.into_iter().flat_map(|(_, objects)| objects).collect();
    for name in examples() {
        // Those of KServe are not Kubernetes' own.
        let own = |object: &Value| !object["apiVersion"].as_str().unwrap().starts_with("serving.kserve.io/");
        all.extend(example(&name).into_iter().filter(own));
    }
    let of_pages = objects_of_pages();
    assert!(of_pages.len() >= 6, "{of_pages:#?}");
    all.extend(of_pages);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), serde_json::to_vec(&all).unwrap()).unwrap();
    let mut command = python().unwrap();
    command.args(["-c", VALIDATE]).stdin(std::fs::File::open(file.path()).unwrap());
    assert_eq!(run(&mut command).unwrap(), "");
}

#[test]
#[ignore = "needs a cluster: KUBECONFIG=FILE cargo test --test it -- --ignored an_api_server"]
fn an_api_server_takes_every_object() {
    let Some(renderings) = renderings() else { return };
    for (name, objects) in renderings {
        // A dry run makes no namespace, so what belongs into one is asked about in one that is there.
        let asked: Vec<Value> = objects
            .into_iter()
            .map(|mut object| {
                if has_a_namespace(&object) {
                    object["metadata"]["namespace"] = json!("default");
                }
                object
            })
            .collect();
        let file = tempfile::NamedTempFile::with_suffix(".json").unwrap();
        std::fs::write(file.path(), json!({"apiVersion": "v1", "kind": "List", "items": asked}).to_string()).unwrap();
        let output = Command::new("kubectl").args(["apply", "--dry-run=server", "-f"]).arg(file.path()).output();
        let output = output.expect("kubectl runs");
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// The YAML of the page, rendered where the page says that it stands.
#[test]
fn the_kustomization_of_the_page_sets_the_three_values() {
    let page = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/kubernetes.md")).unwrap();
    let block =
        |mark: &str| page.split(mark).nth(1).unwrap_or_else(|| panic!("no {mark}")).split("```").next().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let above = "../".repeat(dir.path().components().count() - 1);
    let here = format!("{above}{}/", directory().strip_prefix("/").unwrap().display());
    let text = block("```yaml\n# kustomization.yaml\n").replace("larder/daemonset/", &here);
    std::fs::write(dir.path().join("kustomization.yaml"), text).unwrap();
    std::fs::write(dir.path().join("config.toml"), block("```toml\n# config.toml\n")).unwrap();
    let Some(yaml) = rendered(dir.path()) else { return };
    let objects = objects(&yaml);
    let pod = pod_spec(&objects);
    assert_eq!(named(list(pod, "/volumes"), "cache")["hostPath"]["path"], "/mnt/nvme/larder");
    assert_eq!(named(list(pod, "/volumes"), "cache")["hostPath"]["type"], "DirectoryOrCreate");
    for container in containers(pod) {
        assert_eq!(container["image"], format!("registry.example.com/larder:{}", env!("CARGO_PKG_VERSION")));
    }
    let config = only(&objects, "ConfigMap");
    assert_eq!(named(list(pod, "/volumes"), "config")["configMap"]["name"], config["metadata"]["name"]);
    let home = Home::new();
    let file = home.path().join("config.toml");
    std::fs::write(&file, config["data"]["config.toml"].as_str().unwrap()).unwrap();
    let mut command = home.command(&["config", "show", "volume.quota", "--config", file.to_str().unwrap()]);
    let output = command.env_remove("LARDER_ROOT").output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "1500GB\n", "{}", String::from_utf8_lossy(&output.stderr));
}

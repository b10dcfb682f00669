//! `daemonset/` and its examples, run: the image, the daemon as the manifest starts it, and pods that read a model through it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::support::hub::{RepoFile, TestHub};
use super::support::manifests::{base_with, containers, example, list, named, only};
use super::support::podman::{Pod, can_run_pods, each_container, use_image_under_test, use_shell, volume};
use super::support::real_client::{can_load, python_places, real_model};

/// What the examples ask for.
const REPO: &str = "Qwen/Qwen3-0.6B";
const REFERENCE: &str = "hf://Qwen/Qwen3-0.6B";
const TOKEN: &str = "hf_of_a_test";

const WEIGHTS: &[u8] = &[7; 100_000];

/// Compares the model with what the Hub has, and tries to change it through every mount.
const READ: &str = "set -e
b=/bin/busybox
cd MODEL
$b test \"$($b cat config.json)\" = '{}'
$b test \"$($b wc -c < weights/model.safetensors)\" = 100000
$b test -z \"$($b tr -d '\\007' < weights/model.safetensors)\"
$b test -z \"$($b ls -A | $b grep -v -e config.json -e weights)\"
for dir in . /var/lib/larder/public /models; do
    if $b test -d $dir && $b touch $dir/new; then echo 'it can be written'; exit 1; fi
done
if $b test -e weights && (echo x >> weights/model.safetensors); then echo 'it can be written'; exit 1; fi
echo 'read and compared'
";

/// A machine with the DaemonSet's pod, and a Hub that only its token opens.
struct Machine {
    dir: tempfile::TempDir,
    hub: TestHub,
    spec: Value,
    config: Value,
    daemon: Option<Pod>,
}

impl Machine {
    /// The daemon is ready. `None`, after saying why, if pods cannot run here.
    async fn start(components: &[&str]) -> Option<Machine> {
        if !can_run_pods() {
            return None;
        }
        let objects = base_with(components)?;
        let hub = TestHub::start().await;
        let files = [("config.json", &b"{}"[..]), ("weights/model.safetensors", WEIGHTS)];
        hub.publish(REPO, files.map(|(path, bytes)| RepoFile::new(path, bytes)).to_vec());
        hub.make_private(REPO);
        hub.allow(TOKEN);
        hub.grant(TOKEN, REPO);

        let dir = tempfile::tempdir().unwrap();
        // Other users enter it, as they enter the directories of a node.
        fs::set_permissions(dir.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let mut spec = only(&objects, "DaemonSet")["spec"]["template"]["spec"].clone();
        use_image_under_test(&mut spec);
        for name in ["cache", "run"] {
            volume(&mut spec, name)["hostPath"]["path"] = json!(dir.path().join(name));
        }
        // Secrets, as directories.
        for name in ["token", "environment"] {
            fs::create_dir(dir.path().join(name)).unwrap();
            let secret = volume(&mut spec, name).as_object_mut().unwrap();
            secret.remove("secret");
            secret.insert("hostPath".into(), json!({"path": dir.path().join(name)}));
        }
        each_container(&mut spec, |container| {
            let fields = container.as_object_mut().unwrap();
            fields.remove("envFrom");
            // They are asked below, one by one.
            for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
                fields.remove(probe);
            }
            container["env"].as_array_mut().unwrap().push(json!({"name": "HF_ENDPOINT", "value": hub.endpoint()}));
        });
        let mut config = only(&objects, "ConfigMap").clone();
        let text = config["data"]["config.toml"].as_str().unwrap();
        // The network of this machine has other daemons, and its disk is not ours to measure.
        let text = text.replace("127.0.0.1:7437", "127.0.0.1:0").replace("quota = ", "min_free = \"0\"\nquota = ");
        config["data"]["config.toml"] = json!(text);
        let mut machine = Machine { dir, hub, spec, config, daemon: None };
        machine.start_daemon().await;
        Some(machine)
    }

    async fn start_daemon(&mut self) {
        let pod = json!({"metadata": {"name": "larder"}, "spec": self.spec});
        let pod = Pod::play(&pod, &[&self.config]).unwrap_or_else(|why| panic!("{why}"));
        pod.follow("larder").says("\"message\":\"ready\"").await;
        self.daemon = Some(pod);
    }

    fn daemon(&self) -> &Pod {
        self.daemon.as_ref().expect("it was started")
    }

    /// As the Secret reaches a node some time after it was made.
    fn give_token(&self) {
        fs::write(self.dir.path().join("token/HF_TOKEN"), TOKEN).unwrap();
    }

    async fn larder(&self, words: &[&str]) -> Result<String, String> {
        self.daemon().exec("larder", &[&["/larder"], words].concat()).await
    }

    /// What `larder doctor` says of one thing.
    async fn state(&self, name: &str) -> String {
        let told: Value = serde_json::from_str(&self.larder(&["doctor", "-o", "json"]).await.unwrap()).unwrap();
        named(told["details"].as_array().unwrap(), name)["state"].as_str().unwrap().to_owned()
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    /// An example's pod, on this machine.
    fn here(&self, mut spec: Value) -> Value {
        use_image_under_test(&mut spec);
        for (known, here) in [
            ("/var/lib/larder/public", self.cache().join("public")),
            ("/run/larder/pods", self.dir.path().join("run/pods")),
        ] {
            for volume in spec["volumes"].as_array_mut().unwrap() {
                if volume["hostPath"]["path"] == known {
                    volume["hostPath"]["path"] = json!(here);
                }
            }
        }
        spec
    }

    /// The lines of a file of `/proc` that say who the daemon is and what it may.
    fn status(&self) -> String {
        let status = fs::read_to_string(self.daemon().process("larder").join("status")).unwrap();
        let lines = status.lines().filter(|line| {
            ["Uid:", "CapEff:", "CapBnd:", "NoNewPrivs:", "Seccomp:"].iter().any(|key| line.starts_with(key))
        });
        lines.map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(" ")).collect::<Vec<_>>().join("; ")
    }
}

/// The pod of an example, with a shell that reads the model where the example has it.
fn reading(spec: &Value, container: &str, at: &str) -> Value {
    let mut spec = spec.clone();
    spec["restartPolicy"] = json!("Never");
    let containers = spec["containers"].as_array_mut().unwrap();
    let container = containers.iter_mut().find(|found| found["name"] == container).unwrap();
    use_shell(container, &READ.replace("MODEL", at));
    spec
}

/// Runs a pod to its end.
async fn run(spec: Value, container: &str, needs: &[&Value]) -> (i32, String, Pod) {
    let pod = json!({"metadata": {"name": "example"}, "spec": spec});
    let pod = Pod::play(&pod, needs).unwrap_or_else(|why| panic!("{why}"));
    let code = pod.ended(container).await;
    let log = pod.log(container);
    (code, log, pod)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_is_nobody_else_has_no_right_and_is_as_good_as_one_on_the_node() {
    let Some(mut machine) = Machine::start(&[]).await else { return };
    assert_eq!(
        machine.status(),
        "Uid: 7437; CapEff: 0000000000000000; CapBnd: 0000000000000000; NoNewPrivs: 1; Seccomp: 2"
    );
    for dir in ["cache", "run", "cache/blobs"] {
        assert_eq!(fs::metadata(machine.dir.path().join(dir)).unwrap().uid(), 7437, "{dir}");
    }
    let objects = base_with(&[]).unwrap();
    let probed = named(list(only(&objects, "DaemonSet"), "/spec/template/spec/containers"), "larder");
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"] {
        let words = list(probed, &format!("/{probe}/exec/command")).iter().map(|word| word.as_str().unwrap());
        machine
            .daemon()
            .exec("larder", &words.collect::<Vec<_>>())
            .await
            .unwrap_or_else(|why| panic!("{probe}: {why}"));
    }

    assert_eq!(machine.state("holders").await, "kernel leases", "nothing can be evicted otherwise");
    assert_eq!(machine.state("descriptors").await, "file modes");
    assert_eq!(machine.state("memory limit").await, "none");

    // A token that comes later needs no restart.
    let refused = machine.larder(&["pull", "-q", REFERENCE]).await.unwrap_err();
    assert!(refused.contains("code: auth-missing"), "{refused}");
    machine.give_token();
    machine.larder(&["pull", "-q", REFERENCE]).await.unwrap();
    assert_eq!(machine.larder(&["warm", "-q", REFERENCE]).await.unwrap(), "100 % resident (100.0 of 100.0 kB)\n");
    let removed = machine.larder(&["remove", REFERENCE]).await.unwrap();
    assert!(removed.contains("freed "), "{removed}");
    machine.larder(&["pull", "-q", REFERENCE]).await.unwrap();

    // It ends when it is asked, and its successor, whose `prepare` runs again, finds everything.
    machine.daemon().stop().await;
    assert_eq!(machine.daemon().ended("larder").await, 0);
    assert!(machine.daemon().log("larder").contains("\"message\":\"stopped\""), "{}", machine.daemon().log("larder"));
    machine.daemon = None;
    machine.start_daemon().await;
    assert!(machine.larder(&["list"]).await.unwrap().contains(REPO));
    assert!(machine.hub.bytes_sent("weights/model.safetensors") <= 2 * WEIGHTS.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_component_for_read_only_descriptors_brings_them_with_one_capability() {
    let Some(machine) = Machine::start(&["read-only-descriptors"]).await else { return };
    // Bit 21 is CAP_SYS_ADMIN.
    assert_eq!(
        machine.status(),
        "Uid: 0; CapEff: 0000000000200000; CapBnd: 0000000000200000; NoNewPrivs: 0; Seccomp: 2"
    );
    assert_eq!(machine.state("descriptors").await, "read-only mount");
    assert_eq!(machine.state("holders").await, "kernel leases");
    machine.give_token();
    machine.larder(&["pull", "-q", REFERENCE]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_with_an_init_container_pulls_leases_and_reads() {
    let Some(machine) = Machine::start(&[]).await else { return };
    machine.give_token();
    let example = example("init-container.yaml");
    let spec = machine.here(reading(&only(&example, "Pod")["spec"], "vllm", "/mnt/models"));
    let (code, log, pod) = run(spec, "vllm", &[]).await;
    assert_eq!((code, log.contains("read and compared")), (0, true), "{log}");
    let initial = pod.log("model");
    assert!(initial.contains("used symlink for ") && initial.contains("leased for the pod "), "{initial}");
    let leases = machine.larder(&["leases"]).await.unwrap();
    assert_eq!(leases.matches(" pod ").count(), 1, "{leases}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_example_for_kserve_is_a_storage_initializer() {
    let Some(machine) = Machine::start(&[]).await else { return };
    machine.give_token();
    let objects = example("kserve.yaml");
    let runtime = only(&objects, "ServingRuntime");
    // As KServe's webhook makes the pod.
    let mut initializer = only(&objects, "ClusterStorageContainer")["spec"]["container"].clone();
    assert!(initializer.get("args").is_none(), "they would take the place of KServe's");
    let service = &only(&objects, "InferenceService")["spec"]["predictor"];
    initializer["args"] = json!([service["model"]["storageUri"], "/mnt/models"]);
    let mut spec = runtime["spec"].clone();
    let target = json!({"name": "kserve-provision-location", "mountPath": "/mnt/models"});
    initializer["volumeMounts"].as_array_mut().unwrap().push(target.clone());
    spec["initContainers"] = json!([initializer]);
    let mut read_only = target;
    read_only["readOnly"] = json!(true);
    spec["containers"][0]["volumeMounts"].as_array_mut().unwrap().push(read_only);
    spec["volumes"].as_array_mut().unwrap().push(json!({"name": "kserve-provision-location", "emptyDir": {}}));
    spec.as_object_mut().unwrap().remove("supportedModelFormats");

    let spec = machine.here(reading(&spec, "kserve-container", "/mnt/models"));
    let (code, log, pod) = run(spec, "kserve-container", &[]).await;
    assert_eq!((code, log.contains("read and compared")), (0, true), "{log}");
    let initial = pod.log("storage-initializer");
    assert!(initial.contains(&format!("Successfully copied {REFERENCE} to /mnt/models")), "{initial}");
}

/// The pod of an example whose Python runs as it stands there, with this machine's Python.
fn with_python(spec: &Value, places: &[PathBuf], program: &Path) -> Value {
    let mut spec = spec.clone();
    spec["restartPolicy"] = json!("Never");
    let container = &mut spec["containers"][0];
    let command = container["command"].take();
    use_shell(container, "");
    container["command"] = command;
    assert_eq!(container["command"][0], "python");
    container["command"][0] = json!(program);
    for (at, place) in places.iter().enumerate() {
        let name = format!("python-{at}");
        let mounts = container["volumeMounts"].as_array_mut().unwrap();
        mounts.push(json!({"name": name, "mountPath": place, "readOnly": true}));
    }
    let volumes = places.iter().enumerate();
    let volumes = volumes.map(|(at, place)| json!({"name": format!("python-{at}"), "hostPath": {"path": place}}));
    spec["volumes"].as_array_mut().unwrap().extend(volumes);
    spec
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_without_an_init_container_find_the_model_by_its_name() {
    let Some(machine) = Machine::start(&[]).await else { return };
    machine.give_token();
    machine.larder(&["pin", REFERENCE]).await.unwrap();
    let snapshot = fs::read_dir(machine.cache().join("public/hub/models--Qwen--Qwen3-0.6B/snapshots")).unwrap();
    let version = snapshot.map(|entry| entry.unwrap().file_name().into_string().unwrap()).next().unwrap();
    let at = format!("/models/hub/models--Qwen--Qwen3-0.6B/snapshots/{version}");
    for name in ["directory.yaml", "claim.yaml"] {
        let objects = example(name);
        let mut spec = only(&objects, "Pod")["spec"].clone();
        by_claim(&objects, &mut spec);
        let spec = machine.here(reading(&spec, "python", &at));
        let (code, log, _) = run(spec, "python", &[]).await;
        assert_eq!((code, log.contains("read and compared")), (0, true), "{name}: {log}");
    }
}

/// Puts what kubelet would mount for a claim in its place.
fn by_claim(objects: &[Value], spec: &mut Value) {
    for volume in spec["volumes"].as_array_mut().unwrap() {
        if volume.get("persistentVolumeClaim").is_some() {
            let path = &only(objects, "PersistentVolume")["spec"]["local"]["path"];
            *volume = json!({"name": volume["name"], "hostPath": {"path": path, "type": "Directory"}});
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_examples_in_python_do_what_they_say() {
    let Some(machine) = Machine::start(&[]).await else { return };
    let Some(model) = can_load().then(real_model).flatten() else { return };
    machine.give_token();
    let names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"];
    let files = names.iter().filter_map(|name| Some(RepoFile::new(name, fs::read(model.join(name)).ok()?)));
    machine.hub.publish(REPO, files.collect());
    machine.larder(&["pin", REFERENCE]).await.unwrap();
    let (program, places) = python_places().unwrap();
    for (name, says) in
        [("directory.yaml", "Tokenizer"), ("claim.yaml", "Tokenizer"), ("socket.yaml", "float32 (30522, 384)")]
    {
        let objects = example(name);
        let mut spec = only(&objects, "Pod")["spec"].clone();
        by_claim(&objects, &mut spec);
        let spec = with_python(&machine.here(spec), &places, &program);
        let needs: Vec<&Value> = objects.iter().filter(|object| object["kind"] == "ConfigMap").collect();
        let container = containers(&spec).next().unwrap()["name"].as_str().unwrap().to_owned();
        let (code, log, _) = run(spec, &container, &needs).await;
        assert_eq!((code, log.contains(says)), (0, true), "{name}: {log}");
    }
}

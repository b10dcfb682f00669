//! Pods without a cluster: `podman kube play` runs what kubelet would, in containers of the image that `LARDER_TEST_IMAGE` names.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;

use serde_json::{Value, json};

use super::larder::Running;
use super::manifests::containers;
use super::skip::skipped;

/// A shell for pods that read a model, and nothing else. Built once for all tests of a run.
const SHELL_IMAGE: &str = "localhost/larder-test-shell:1";

/// Whether pods can run here, or why not.
static CAN: LazyLock<Result<(), String>> = LazyLock::new(|| {
    let image = image().ok_or("LARDER_TEST_IMAGE names no image; `daemonset/build-image` builds one")?;
    done(&mut podman(&["image", "exists", &image])).map_err(|why| format!("podman has no image `{image}` {why}"))?;
    let dir = tempfile::tempdir().map_err(|e| e.to_string())?;
    fs::copy("/bin/busybox", dir.path().join("busybox")).map_err(|e| format!("`/bin/busybox`: {e}"))?;
    let text = "FROM scratch\nCOPY busybox /bin/sh\nCOPY busybox /bin/busybox\n";
    fs::write(dir.path().join("Containerfile"), text).map_err(|e| e.to_string())?;
    done(podman(&["build", "--quiet", "--tag", SHELL_IMAGE]).arg(dir.path())).map(drop)
});

fn image() -> Option<String> {
    std::env::var("LARDER_TEST_IMAGE").ok().filter(|image| !image.is_empty())
}

fn podman(words: &[&str]) -> Command {
    let mut command = Command::new("podman");
    command.args(words).stdin(Stdio::null());
    command
}

fn done(command: &mut Command) -> Result<String, String> {
    let output = command.output().map_err(|e| format!("podman: {e}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    Err(format!("{}{}", text(&output.stdout), text(&output.stderr)))
}

/// Whether pods can run here; says why not. `none` is what `.ci/run` names where it has seen, and said, that they cannot.
pub(crate) fn can_run_pods() -> bool {
    if image().is_some_and(|image| image == "none") {
        println!("left out: no containers can run here");
        return false;
    }
    match &*CAN {
        Ok(()) => true,
        Err(why) => {
            skipped(why);
            false
        }
    }
}

/// A pod that runs, or has run. Gone with its owner.
pub(crate) struct Pod {
    name: String,
    /// ConfigMaps, which podman keeps as volumes of their names.
    volumes: Vec<String>,
    dir: tempfile::TempDir,
}

impl Pod {
    /// Runs a pod, with what it needs (ConfigMaps), until its init containers have ended and its containers run. The pod has
    /// the network of this machine. An error has the log of what failed.
    pub(crate) fn play(pod: &Value, needs: &[&Value]) -> Result<Pod, String> {
        // Several tests run the same manifest at the same time.
        let name = format!("{}-{:08x}", pod["metadata"]["name"].as_str().unwrap(), fastrand::u32(..));
        let mut pod = pod.clone();
        pod["apiVersion"] = json!("v1");
        pod["kind"] = json!("Pod");
        // Otherwise podman removes init containers with their logs, and now and then before they have ended.
        let kept = json!({"io.podman.annotations.init.container.type": "always"});
        pod["metadata"] = json!({"name": name, "annotations": kept});
        each_container(&mut pod["spec"], |container| {
            for variable in container["env"].as_array_mut().into_iter().flatten() {
                // Podman has neither namespaces nor nodes to name.
                let field = &variable["valueFrom"]["fieldRef"]["fieldPath"];
                if field == "metadata.namespace" || field == "spec.nodeName" {
                    *variable = json!({"name": variable["name"], "value": "default"});
                }
            }
        });
        let (mut documents, mut volumes) = (Vec::new(), Vec::new());
        for &need in needs {
            let own = format!("{}-{name}", need["metadata"]["name"].as_str().unwrap());
            for volume in pod["spec"]["volumes"].as_array_mut().into_iter().flatten() {
                if volume["configMap"]["name"] == need["metadata"]["name"] {
                    volume["configMap"]["name"] = json!(own);
                }
            }
            let mut need = need.clone();
            need["metadata"]["name"] = json!(own);
            documents.push(need.to_string());
            volumes.push(own);
        }
        documents.push(pod.to_string());
        let played = Pod { name, volumes, dir: tempfile::tempdir().unwrap() };
        let file = played.dir.path().join("pod.yaml");
        fs::write(&file, documents.join("\n---\n")).unwrap();
        let output = podman(&["kube", "play", "--network", "host"]).arg(&file).output().map_err(|e| e.to_string())?;
        if output.status.success() {
            return Ok(played);
        }
        let mut said = String::from_utf8_lossy(&output.stderr).into_owned();
        for container in containers(&pod["spec"]) {
            said += &played.log(container["name"].as_str().unwrap());
        }
        Err(said)
    }

    fn container(&self, name: &str) -> String {
        format!("{}-{name}", self.name)
    }

    /// What a container has said so far.
    pub(crate) fn log(&self, container: &str) -> String {
        let output = podman(&["logs", &self.container(container)]).output().unwrap();
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
    }

    /// What a container says, as it says it.
    pub(crate) fn follow(&self, container: &str) -> Running {
        Running::start(podman(&["logs", "--follow", &self.container(container)]))
    }

    /// Waits for the end of a container; its exit code.
    pub(crate) async fn ended(&self, container: &str) -> i32 {
        let name = self.container(container);
        let code = tokio::task::spawn_blocking(move || done(&mut podman(&["wait", &name]))).await.unwrap();
        code.unwrap().trim().parse().unwrap()
    }

    /// Runs a command in a container that runs; what it prints, or what it printed when it failed.
    pub(crate) async fn exec(&self, container: &str, words: &[&str]) -> Result<String, String> {
        let mut command = podman(&["exec", &self.container(container)]);
        command.args(words);
        tokio::task::spawn_blocking(move || done(&mut command)).await.unwrap()
    }

    /// The first process of a container, as this machine sees it.
    pub(crate) fn process(&self, container: &str) -> PathBuf {
        let found = done(&mut podman(&["inspect", "--format", "{{.State.Pid}}", &self.container(container)]));
        Path::new("/proc").join(found.unwrap().trim())
    }

    /// SIGTERM to its containers, and their end, as when the pod is deleted.
    pub(crate) async fn stop(&self) {
        let mut command = podman(&["pod", "stop", "--time", "30", &self.name]);
        tokio::task::spawn_blocking(move || done(&mut command)).await.unwrap().unwrap();
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        let _ = podman(&["pod", "rm", "--force", "--time", "0", &self.name]).output();
        let _ = podman(&["volume", "rm", "--force"]).args(&self.volumes).output();
    }
}

/// What kubelet would pull, and this machine cannot: the image under test in the place of the released one.
pub(crate) fn use_image_under_test(spec: &mut Value) {
    each_container(spec, |container| {
        if container["image"].as_str().is_some_and(|image| image.starts_with("larder:")) {
            container["image"] = json!(image().expect("pods can run"));
            container["imagePullPolicy"] = json!("Never");
        }
    });
}

/// Puts a shell script in the place of an application. It is run as it stands in the manifest otherwise.
pub(crate) fn use_shell(container: &mut Value, script: &str) {
    container["image"] = json!(SHELL_IMAGE);
    container["imagePullPolicy"] = json!("Never");
    container["command"] = json!(["/bin/sh", "-c", script]);
    let fields = container.as_object_mut().unwrap();
    for field in ["args", "resources", "ports"] {
        fields.remove(field);
    }
}

/// The same for all containers of a pod's `spec`.
pub(crate) fn each_container(spec: &mut Value, mut change: impl FnMut(&mut Value)) {
    for key in ["initContainers", "containers"] {
        if let Some(containers) = spec[key].as_array_mut() {
            containers.iter_mut().for_each(&mut change);
        }
    }
}

/// The volume of a pod's `spec` that has this name.
pub(crate) fn volume<'a>(spec: &'a mut Value, name: &str) -> &'a mut Value {
    let volumes = spec["volumes"].as_array_mut().unwrap();
    volumes.iter_mut().find(|volume| volume["name"] == name).unwrap_or_else(|| panic!("no volume {name}"))
}

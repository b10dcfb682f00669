//! Leases and pins: what somebody uses or keeps is not removed, over restarts too; and each ends when it should.

use std::fs;
use std::sync::Arc;

use larder::cache::PodDirectory;
use larder::client::Client;
use larder::fault::{Code, Diagnose, Problem};
use larder::model::Pod;
use larder::wire::http::{HolderKind, LeaseInfo, LeaseTerms, OpenRequest, Opened, PinnedBy, PodIdentity};

use super::support::larder::Home;
use super::support::model_origin::ModelOrigin;
use super::support::node::{TestNode, files_below, reference};

async fn origin_with(models: &[&str]) -> ModelOrigin {
    let origin = ModelOrigin::start().await;
    for model in models {
        origin.put(model, "config.json", b"{}");
        origin.put(model, "model.safetensors", model.as_bytes());
    }
    origin
}

fn pod(uid: &str) -> LeaseTerms {
    let pod = PodIdentity { uid: uid.into(), namespace: "team".into(), name: "vllm-0".into() };
    LeaseTerms { pod: Some(pod), ..LeaseTerms::default() }
}

fn named(name: &str) -> LeaseTerms {
    LeaseTerms { holder: Some(name.into()), ..LeaseTerms::default() }
}

fn lease(node: &TestNode, model: &str, terms: LeaseTerms) -> Opened {
    node.cache().open_as(&OpenRequest { lease: Some(terms), ..OpenRequest::of(model) }).unwrap()
}

/// Removes what nobody may remove; who holds it, as the error says.
fn held(node: &TestNode, model: &str) -> String {
    let error = node.cache().remove(model).unwrap_err();
    assert_eq!(error.code(), Code::ModelInUse, "{error}");
    assert!(node.cache().model(model).is_ok());
    error.to_string()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_leased_model_is_not_removed_until_the_last_lease_is_released() {
    let origin = origin_with(&["m"]).await;
    let model = origin.reference("m");
    let node = TestNode::new().start().await;
    node.ready(&model).await;
    let (one, two) =
        (lease(&node, &model, pod("uid-1")).lease.unwrap(), lease(&node, &model, named("ci")).lease.unwrap());
    assert_eq!(
        (one.kind, one.holder.as_str(), two.kind, two.holder.as_str()),
        (HolderKind::Pod, "team/vllm-0", HolderKind::Name, "ci")
    );
    let by_id = |mut leases: Vec<LeaseInfo>| {
        leases.sort_by(|a, b| a.id.cmp(&b.id));
        leases
    };
    assert_eq!(by_id(node.cache().leases()), by_id(vec![one.clone(), two.clone()]));
    assert_eq!(node.cache().models()[0].leases, 2);
    let said = held(&node, &model);
    assert!(said.contains(&format!("held by ci (lease `{}`), team/vllm-0 (lease `{}`)", two.id, one.id)), "{said}");

    assert_eq!(node.cache().release(&one.id).unwrap(), one);
    assert_eq!(node.cache().release(&one.id).unwrap_err().code(), Code::LeaseNotFound);
    held(&node, &model);
    node.cache().release(&two.id).unwrap();
    assert_eq!(node.cache().remove(&model).unwrap().models.len(), 1);
    assert!(files_below(&node.volume().join("leases")).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn asking_again_for_the_same_holder_renews_its_lease() {
    let origin = origin_with(&["m"]).await;
    let model = origin.reference("m");
    let node = TestNode::new().start().await;
    node.ready(&model).await;
    let first = lease(&node, &model, LeaseTerms { ttl_seconds: Some(60), ..pod("uid-1") }).lease.unwrap();
    let again = lease(&node, &model, LeaseTerms { ttl_seconds: Some(3600), ..pod("uid-1") }).lease.unwrap();
    assert_eq!(first.id, again.id);
    assert!(again.expires_at > first.expires_at, "{again:?}");
    let shorter = lease(&node, &model, LeaseTerms { ttl_seconds: Some(1), ..pod("uid-1") }).lease.unwrap();
    assert_eq!(shorter, again, "asking again never shortens it");
    let other = lease(&node, &model, pod("uid-2")).lease.unwrap();
    assert_ne!(other.id, again.id);
    assert_eq!(node.cache().leases().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn leases_and_pins_are_still_there_after_a_restart() {
    let origin = origin_with(&["leased", "pinned", "neither"]).await;
    let [leased, pinned, neither] = ["leased", "pinned", "neither"].map(|model| origin.reference(model));
    let mut node = TestNode::new().start().await;
    for model in [&leased, &pinned, &neither] {
        node.ready(model).await;
    }
    let taken = [pod("uid-1"), named("ci"), LeaseTerms { ttl_seconds: Some(3600), ..LeaseTerms::default() }];
    let taken = taken.map(|terms| lease(&node, &leased, terms).lease.unwrap());
    let pin = node.cache().pin(&reference(&pinned)).unwrap();
    let leases = node.cache().leases();
    assert_eq!(leases.len(), taken.len());
    node.restart(|_| {}).await;
    assert_eq!(node.cache().leases(), leases);
    assert_eq!(node.cache().pins(), [pin]);
    held(&node, &leased);
    held(&node, &pinned);
    node.cache().remove(&neither).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_ends_when_its_time_is_over_also_while_nobody_looked() {
    let origin = origin_with(&["m"]).await;
    let model = origin.reference("m");
    let mut node = TestNode::new().start().await;
    node.ready(&model).await;
    lease(&node, &model, LeaseTerms { ttl_seconds: Some(1), ..pod("uid-1") });
    let note = files_below(&node.volume().join("leases")).pop().unwrap();
    // As if the time had passed: the note says when it ends, in milliseconds since the Unix epoch.
    let text = fs::read_to_string(&note).unwrap();
    let mut written: serde_json::Value = serde_json::from_str(&text).unwrap();
    for (field, by) in [("since_ms", 10_000), ("ends_at_ms", 5_000)] {
        written[field] = (written[field].as_u64().unwrap() - by).into();
    }
    node.restart(|_| fs::write(&note, format!("{written}\n")).unwrap()).await;
    assert_eq!(node.cache().leases(), []);
    node.cache().end_leases();
    assert!(!note.exists());
    node.cache().remove(&model).unwrap();
}

/// What Kubernetes would say.
struct Pods([(&'static str, Option<bool>); 3]);

impl PodDirectory for Pods {
    fn is_gone(&self, pod: &Pod) -> Option<bool> {
        self.0.iter().find(|(uid, _)| *uid == pod.uid()).and_then(|(_, gone)| *gone)
    }

    fn trouble(&self) -> Option<Problem> {
        None
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_lease_of_a_pod_ends_when_it_is_gone_and_stays_when_nobody_knows() {
    let origin = origin_with(&["m"]).await;
    let model = origin.reference("m");
    let node = TestNode::new().start().await;
    node.ready(&model).await;
    let ids = ["gone", "here", "unknown"].map(|uid| lease(&node, &model, pod(uid)).lease.unwrap().id);
    let by_name = lease(&node, &model, named("gone")).lease.unwrap().id;
    node.cache().end_leases();
    assert_eq!(node.cache().leases().len(), 4);
    let pods = Pods([("gone", Some(true)), ("here", Some(false)), ("unknown", None)]);
    node.cache().ask_about_pods(Arc::new(pods));
    node.cache().end_leases();
    let mut left: Vec<_> = node.cache().leases().into_iter().map(|lease| lease.id).collect();
    left.sort();
    let mut expected = vec![ids[1].clone(), ids[2].clone(), by_name];
    expected.sort();
    assert_eq!(left, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_that_cannot_be_read_keeps_everything() {
    let origin = origin_with(&["m"]).await;
    let model = origin.reference("m");
    let mut node = TestNode::new().start().await;
    node.ready(&model).await;
    for (dir, text) in [("leases", "{"), ("pins", "\0\0\0\0")] {
        let note = node.volume().join(dir).join("0123");
        node.restart(|_| fs::write(&note, text).unwrap()).await;
        let error = node.cache().remove(&model).unwrap_err();
        assert_eq!(error.code(), Code::ModelInUse);
        assert!(error.to_string().contains(&format!("{}/0123", dir)), "{error}");
        node.restart(|_| fs::remove_file(&note).unwrap()).await;
    }
    node.cache().remove(&model).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn terms_that_say_too_little_or_too_much_are_refused_with_what_to_say() {
    let origin = origin_with(&["m"]).await;
    let model = origin.reference("m");
    let node = TestNode::new().start().await;
    node.ready(&model).await;
    let refused = [
        (LeaseTerms::default(), "nothing says when it ends"),
        (LeaseTerms { holder: Some("x".into()), ..pod("u") }, "it names a pod and a holder"),
        (LeaseTerms { ttl_seconds: Some(0), ..pod("u") }, "`ttl_seconds` is 0"),
        (named("a b"), "the name of the holder is \"a b\""),
        (pod(&"u".repeat(300)), "the uid of the pod"),
    ];
    for (terms, says) in refused {
        let asked = OpenRequest { lease: Some(terms), ..OpenRequest::of(&model) };
        let error = node.cache().open_as(&asked).unwrap_err();
        assert_eq!(error.code(), Code::BadRequest);
        assert!(error.to_string().contains(says) && !error.action().is_empty(), "{error}");
    }
    let forever = LeaseTerms { ttl_seconds: Some(u64::MAX), ..pod("u") };
    assert!(lease(&node, &model, forever).lease.unwrap().expires_at.is_some());
    let absent = OpenRequest { lease: Some(pod("u")), ..OpenRequest::of(origin.reference("absent")) };
    assert_eq!(node.cache().open_as(&absent).unwrap_err().code(), Code::NotLocal);
    assert_eq!(node.cache().leases().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_keeps_the_current_version_and_lets_old_ones_go() {
    let origin = origin_with(&["m"]).await;
    let model = origin.reference("m");
    let node = TestNode::new().start().await;
    node.ready(&model).await;
    let old = node.cache().models()[0].id.clone();
    node.cache().pin(&reference(&model)).unwrap();
    assert!(held(&node, &old).contains(&format!("a pin on `{model}`")));
    origin.put("m", "model.safetensors", b"new");
    node.ready(&model).await;
    let models = node.cache().models();
    assert_eq!(models.iter().map(|m| (m.current, m.pinned)).collect::<Vec<_>>(), [(true, true), (false, false)]);
    node.cache().remove(&old).unwrap();
    held(&node, &model);

    node.cache().unpin(&reference(&model)).unwrap();
    assert_eq!(node.cache().unpin(&reference(&model)).unwrap_err().code(), Code::NotPinned);
    assert!(files_below(&node.volume().join("pins")).is_empty());
    node.cache().remove(&model).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_and_people_pin_without_getting_in_each_others_way() {
    let origin = origin_with(&["a", "b"]).await;
    let [a, b] = ["a", "b"].map(|model| reference(&origin.reference(model)));
    let node = TestNode::new().start().await;
    node.cache().pin(&a).unwrap();
    node.cache().keep_pinned(&[a.clone(), b.clone()]);
    let by = || node.cache().pins().into_iter().map(|pin| pin.by).collect::<Vec<_>>();
    assert_eq!(by(), [vec![PinnedBy::Operator, PinnedBy::Config], vec![PinnedBy::Config]]);
    for model in [&a, &b] {
        node.ready_ref(model).await;
    }
    assert_eq!(node.cache().unpin(&b).unwrap_err().code(), Code::PolicyDenied);
    assert_eq!(node.cache().unpin(&a).unwrap().by, [PinnedBy::Config]);
    node.cache().pin(&a).unwrap();
    node.cache().keep_pinned(&[]);
    assert_eq!(by(), [vec![PinnedBy::Operator]]);
    assert!(node.cache().remove(&b.to_string()).is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_applies_the_difference_and_a_mistake_changes_nothing() {
    let origin = origin_with(&["a", "b", "c"]).await;
    let [a, b, c] = ["a", "b", "c"].map(|model| origin.reference(model));
    let mut home = Home::new();
    let file = home.path().join("larder.toml");
    home.set("LARDER_CONFIG", file.to_str().unwrap());
    let configure = |text: &str| fs::write(&file, text).unwrap();
    let pinned = |list: &[&String]| format!("[pull]\npinned = {list:?}\n");
    configure(&pinned(&[&a, &b]));
    let mut daemon = home.serve().await;
    for _ in 0..2 {
        daemon.says("\"message\":\"pull ready\"").await;
    }
    home.done(&["pin", &a]).await;

    configure(&(pinned(&[&b, &c]) + "retries = 3\n"));
    let line = daemon.says("configuration read again").await;
    assert!(line.contains("pull.pinned") && line.contains("pull.retries"), "{line}");
    home.done(&["open", "--wait", &c]).await;
    let pins = home.done(&["pins"]).await;
    let rows: Vec<Vec<&str>> = pins.lines().skip(1).map(|line| line.split_whitespace().take(3).collect()).collect();
    assert_eq!(rows, [[a.as_str(), "operator", "yes"], [&b, "config", "yes"], [&c, "config", "yes"]]);

    let before = Client::new(&home.socket()).pins().await.unwrap();
    configure("[pull]\npinned = [\"ftp://x\"]\n");
    let line = daemon.says("the configuration is not applied").await;
    assert!(line.contains("config-invalid") && line.contains("ftp"), "{line}");
    assert_eq!(Client::new(&home.socket()).pins().await.unwrap(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn sighup_reads_the_configuration_again_wherever_it_is() {
    let mut home = Home::new();
    let (elsewhere, file) = (home.path().join("elsewhere.toml"), home.path().join("data/larder.toml"));
    fs::write(&elsewhere, "").unwrap();
    std::os::unix::fs::symlink(&elsewhere, &file).unwrap();
    home.set("LARDER_CONFIG", file.to_str().unwrap());
    let mut daemon = home.serve().await;
    fs::write(&elsewhere, "[pull]\nretries = 3\n").unwrap();
    daemon.hang_up();
    let line = daemon.says("configuration read again").await;
    assert!(line.contains("pull.retries"), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_config_map_reaches_a_running_daemon() {
    let origin = origin_with(&["a"]).await;
    let model = origin.reference("a");
    let mut home = Home::new();
    // As kubelet mounts it: a link to a file behind a link, of which the second is given another aim.
    let dir = home.path().join("etc");
    let publish = |name: &str, text: &str| {
        fs::create_dir_all(dir.join(name)).unwrap();
        fs::write(dir.join(name).join("config.toml"), text).unwrap();
        std::os::unix::fs::symlink(name, dir.join("..data_tmp")).unwrap();
        fs::rename(dir.join("..data_tmp"), dir.join("..data")).unwrap();
    };
    publish("..first", "");
    std::os::unix::fs::symlink("..data/config.toml", dir.join("config.toml")).unwrap();
    home.set("LARDER_CONFIG", dir.join("config.toml").to_str().unwrap());
    let mut daemon = home.serve().await;
    publish("..second", &format!("[pull]\npinned = [\"{model}\"]\n"));
    daemon.says("\"message\":\"pull ready\"").await;
    publish("..third", "[pull]\npinned = 1\n");
    daemon.says("the configuration is not applied").await;
    assert_eq!(Client::new(&home.socket()).pins().await.unwrap().len(), 1);
    publish("..fourth", "");
    daemon.says("configuration read again").await;
    assert!(Client::new(&home.socket()).pins().await.unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_take_list_and_release_leases_with_a_daemon_and_without() {
    let origin = origin_with(&["m"]).await;
    let model = origin.reference("m");
    let mut home = Home::new();
    for with_daemon in [false, true] {
        let _daemon = if with_daemon { Some(home.serve().await) } else { None };
        home.done(&["pull", "--pin", &model]).await;
        let refused = home.run(&["open", "--lease-for", "pod", &model]).await;
        assert_eq!(refused.code, Some(65));
        assert!(refused.err.contains("POD_UID, POD_NAMESPACE, POD_NAME are not set"), "{}", refused.err);
        for (name, value) in [("POD_UID", "uid-1"), ("POD_NAMESPACE", "team"), ("POD_NAME", "vllm-0")] {
            home.set(name, value);
        }
        home.done(&["open", "--lease-for", "pod", "--ttl", "2h", &model]).await;
        for name in ["POD_UID", "POD_NAMESPACE", "POD_NAME"] {
            home.set(name, "");
        }
        let list = home.done(&["leases"]).await;
        let row: Vec<&str> = list.lines().nth(1).expect("one lease").split_whitespace().collect();
        assert_eq!(row[1..4], ["pod", "team/vllm-0", &model], "{list}");
        let refused = home.run(&["remove", &model]).await;
        assert_eq!(refused.code, Some(75));
        assert!(refused.err.contains("team/vllm-0 (lease `") && refused.err.contains("a pin on `"), "{}", refused.err);
        home.done(&["release", row[0]]).await;
        assert_eq!(home.run(&["release", row[0]]).await.code, Some(66));
        assert_eq!(home.run(&["leases"]).await.err, "nobody holds a lease\n");
        home.done(&["unpin", &model]).await;
        home.done(&["remove", &model]).await;
    }
}

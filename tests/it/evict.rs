//! Room is made by evicting what was used least recently, never what somebody uses, and always with a reason that stays.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use larder::client::Client;
use larder::fault::{Code, Diagnose};
use larder::index::Index;
use larder::model::{Bytes, Share};
use larder::wire::http::{EvictionPlan, KeptBecause, LeaseTerms, OpenRequest, Phase};

use super::support::larder::{Home, Running};
use super::support::model_origin::ModelOrigin;
use super::support::node::{TestNode, reference};
use super::support::skip::skipped;
use super::support::small_disk::SmallDisk;

const MIB: u64 = 1 << 20;

/// Models of one file of so many MiB, each of other bytes.
async fn origin(models: &[(&str, u64)]) -> ModelOrigin {
    let origin = ModelOrigin::start().await;
    for (model, mib) in models {
        origin.put(model, "weights", &noise(model, *mib));
    }
    origin
}

fn noise(name: &str, mib: u64) -> Vec<u8> {
    let mut bytes = vec![0; (mib * MIB) as usize];
    let seed = name.bytes().fold(0, |seed: u64, byte| seed * 251 + u64::from(byte));
    fastrand::Rng::with_seed(seed).fill(&mut bytes);
    bytes
}

fn named(name: &str) -> LeaseTerms {
    LeaseTerms { holder: Some(name.into()), ..LeaseTerms::default() }
}

/// The id of the lease.
fn lease(node: &TestNode, model: &str, terms: LeaseTerms) -> String {
    let opened = node.cache().open_as(&OpenRequest { lease: Some(terms), ..OpenRequest::of(model) }).unwrap();
    opened.lease.unwrap().id
}

fn local(node: &TestNode) -> BTreeSet<String> {
    node.cache().models().into_iter().map(|model| model.reference).collect()
}

fn victims(plan: &EvictionPlan) -> Vec<&str> {
    plan.victims.iter().map(|victim| victim.reference.as_str()).collect()
}

/// What is taken of the quota.
fn taken(node: &TestNode) -> u64 {
    let gauges = node.cache().gauges();
    gauges.blob_bytes + gauges.deleted_open_bytes + gauges.reserved_bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_used_least_recently_goes_first_whatever_the_clock_says_and_after_a_restart() {
    let origin = origin(&[("a", 1), ("b", 1), ("c", 1), ("d", 1)]).await;
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|model| origin.reference(model));
    let mut node = TestNode::new().quota(3 * MIB).start().await;
    for model in [&a, &b, &c] {
        node.ready(model).await;
    }
    for model in [&c, &a] {
        node.open(model).await.unwrap();
    }
    let id = node.cache().model(&b).unwrap().model.id.parse().unwrap();
    // The clock is set back to 1970, and somebody opens a model.
    node.restart(|root| {
        let index = Index::open(&root.join("index-v1"));
        index.opened(id, 1);
        index.flush().unwrap();
    })
    .await;
    let plan = node.cache().eviction_plan(3 * MIB).unwrap();
    assert_eq!((victims(&plan), plan.is_enough), (vec![c.as_str(), &a, &b], true));
    node.ready(&d).await;
    assert_eq!(local(&node), BTreeSet::from([a.clone(), b.clone(), d.clone()]));
    // A pull that finds its version local is a use too.
    node.ready(&a).await;
    assert_eq!(victims(&node.cache().eviction_plan(3 * MIB).unwrap()), [&b, &d, &a]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_lost_leaves_the_order_of_the_last_confirmations() {
    let origin = origin(&[("a", 1), ("b", 1)]).await;
    let (a, b) = (origin.reference("a"), origin.reference("b"));
    let mut node = TestNode::new().quota(2 * MIB).start().await;
    for model in [&b, &a] {
        node.ready(model).await;
    }
    node.restart(|root| fs::remove_dir_all(root.join("index-v1")).unwrap()).await;
    assert_eq!(victims(&node.cache().eviction_plan(MIB).unwrap()), [&b]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_uses_is_not_evicted_and_the_refusal_says_who() {
    let models = ["leased", "pinned", "pulled", "open", "idle"];
    let origin = origin(&[("leased", 1), ("pinned", 1), ("pulled", 1), ("open", 1), ("idle", 1), ("new", 3)]).await;
    let [leased, pinned, pulled, open, idle] = models.map(|model| origin.reference(model));
    let new = origin.reference("new");
    let node = TestNode::new().quota(6 * MIB).leaves_parts().start().await;
    for model in [&leased, &pinned, &pulled, &open, &idle] {
        node.ready(model).await;
    }
    let id = lease(&node, &leased, named("ci"));
    node.cache().pin(&reference(&pinned)).unwrap();
    let reader = File::open(node.open(&open).await.unwrap().join("weights")).unwrap();
    origin.put("pulled", "weights", &noise("changed", 1));
    origin.hold_after(origin.sent_bytes());
    let mut pull = node.cache().pull(&reference(&pulled)).unwrap();
    origin.is_waited_for().await;
    let sent = origin.sent_bytes();

    let says = node.refused(&reference(&new), Code::VolumeFull).await;
    for part in [
        "needs 3.1 MB, the quota of 6.3 MB can give 0 B".to_owned(),
        "1.0 MB can be evicted; the rest is held by".to_owned(),
        format!("ci (lease `{id}`)"),
        format!("a pin on `{pinned}`"),
        format!("a pull of `{pulled}`"),
        format!("a process that has `{open}` open"),
    ] {
        assert!(says.contains(&part), "{part} is not in: {says}");
    }
    assert_eq!(origin.sent_bytes(), sent, "a byte of a model that was refused was fetched");
    assert_eq!(local(&node), [&leased, &pinned, &pulled, &open, &idle].into_iter().cloned().collect());
    let error = node.cache().evict_for(3 * MIB).unwrap_err();
    assert!(error.code() == Code::VolumeFull && error.to_string().starts_with("cannot make room: "), "{error}");

    let kept: BTreeMap<String, KeptBecause> =
        node.cache().eviction_plan(MIB).unwrap().kept.into_iter().map(|kept| (kept.reference, kept.because)).collect();
    let because = [KeptBecause::Leased, KeptBecause::Pinned, KeptBecause::Pulled];
    assert_eq!(kept, [&leased, &pinned, &pulled].into_iter().cloned().zip(because).collect());
    drop(reader);
    assert_eq!(node.cache().evict_for(MIB).unwrap().evictions.len(), 1);
    origin.let_go();
    pull.finished().await;
    node.cache().release(&id).unwrap();
    node.cache().unpin(&reference(&pinned)).unwrap();
    node.ready(&new).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_has_just_come_stays_and_one_that_was_here_at_the_start_may_go() {
    let origin = origin(&[("a", 1), ("b", 1)]).await;
    let (a, b) = (origin.reference("a"), origin.reference("b"));
    let young = |limits: &mut larder::cache::Limits| limits.min_residency = Duration::from_secs(3600);
    let mut node = TestNode::new().quota(MIB).limits(young).start().await;
    node.ready(&a).await;
    let says = node.refused(&reference(&b), Code::VolumeFull).await;
    assert!(says.contains("`volume.min_residency`"), "{says}");
    node.restart(|_| {}).await;
    node.ready(&b).await;
    assert_eq!(local(&node), BTreeSet::from([b]));
}

/// A process that never asked us, and has a file in one way.
struct Stranger(Child);

impl Stranger {
    /// `how` is a program that ends with a line and waits; `None` if it does not run here.
    fn reads(how: &str, path: &Path) -> Option<Stranger> {
        let python = std::env::var("LARDER_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
        let mut command = Command::new("sh");
        command.args(["-c", how]).env("PYTHON", python).env("FILE", path);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let stranger = Stranger(child);
        (line.trim() == "has it").then_some(stranger)
    }

    /// Ends, and with it what it has.
    fn ends(mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_a_stranger_has_open_or_mapped_keeps_its_model() {
    const DESCRIPTOR: &str = r#"exec 3<"$FILE"; echo has it; read nothing"#;
    const MAP: &str = r#"exec "$PYTHON" -c '
import mmap, os, sys
fd = os.open(os.environ["FILE"], os.O_RDONLY)
bytes = mmap.mmap(fd, 0, prot=mmap.PROT_READ)
os.close(fd)
print("has it", flush=True)
sys.stdin.read()
'"#;
    const OTHER_MOUNT: &str = r#"
mkdir "$FILE.seen"; mount --bind "$(dirname "$FILE")" "$FILE.seen" && mount -o remount,bind,ro "$FILE.seen"
exec 3<"$FILE.seen/weights"; umount -l "$FILE.seen"; rmdir "$FILE.seen"; echo has it; read nothing"#;
    for how in [DESCRIPTOR, MAP, OTHER_MOUNT] {
        let origin = origin(&[("a", 1), ("b", 1)]).await;
        let (a, b) = (origin.reference("a"), origin.reference("b"));
        let node = TestNode::new().quota(MIB).start().await;
        let file = node.ready(&a).await.join("weights");
        // A directory of a model takes no other; this one is a link of the same inode.
        let link = node.beside_volume().join("weights");
        fs::hard_link(&file, &link).unwrap();
        let Some(stranger) = Stranger::reads(how, &link) else {
            skipped("no python3, or no rights to mount");
            continue;
        };
        fs::remove_file(&link).unwrap();
        let says = node.refused(&reference(&b), Code::VolumeFull).await;
        assert!(says.contains(&format!("a process that has `{a}` open")), "{says}");
        assert_eq!(local(&node), BTreeSet::from([a]));
        stranger.ends();
        node.ready(&b).await;
        assert_eq!(local(&node), BTreeSet::from([b]));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_holders_cannot_be_known_nothing_is_evicted_and_everybody_is_told() {
    let origin = origin(&[("a", 1), ("b", 1)]).await;
    let (a, b) = (origin.reference("a"), origin.reference("b"));
    let mut node = TestNode::new().quota(MIB).start().await;
    node.ready(&a).await;
    let holders = |node: &TestNode| node.cache().details().into_iter().find(|detail| detail.name == "holders").unwrap();
    assert_eq!((node.counted("larder_holders_unknown"), holders(&node).best), (0, true));
    node.restart(|root| fs::write(root.join("leases/torn"), "{").unwrap()).await;

    let says = node.refused(&reference(&b), Code::VolumeFull).await;
    assert!(says.contains("nothing is evicted, because who uses what cannot be known: "), "{says}");
    assert_eq!(node.cache().evict_for(MIB).unwrap_err().code(), Code::ModelInUse);
    let plan = node.cache().eviction_plan(MIB).unwrap();
    assert!(plan.victims.is_empty() && !plan.is_enough && plan.unknown_holders.is_some(), "{plan:?}");
    node.cache().set_limits(larder::cache::Limits { quota: Some(Share::Bytes(Bytes(MIB / 2))), ..limits() });
    node.cache().keep_room();
    assert_eq!(local(&node), BTreeSet::from([a]));
    assert_eq!((node.counted("larder_holders_unknown"), holders(&node).best), (1, false));
    assert!(holders(&node).means.contains("leases/torn"), "{:?}", holders(&node));
}

/// The same command on a file system without leases, as far as it can tell; `None` if there is no Python to do it.
fn without_leases(command: &Command) -> Option<Command> {
    let python = std::env::var("LARDER_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
    let mut wrapped = Command::new(python);
    wrapped.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/support/without_leases.py"));
    let works = Command::new(wrapped.get_program()).args(wrapped.get_args()).arg("/bin/true").status();
    wrapped.arg(command.get_program()).args(command.get_args()).env_clear();
    wrapped.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    works.is_ok_and(|status| status.success()).then_some(wrapped)
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_file_system_without_leases_nothing_is_evicted_and_everybody_is_told() {
    let origin = origin(&[("a", 2), ("b", 2)]).await;
    let (a, b) = (origin.reference("a"), origin.reference("b"));
    let mut home = Home::new();
    home.set("LARDER_VOLUME_QUOTA", "3MB");
    home.set("LARDER_VOLUME_MIN_RESIDENCY", "0s");
    let Some(serve) = without_leases(&home.command(&["serve"])) else {
        return skipped("no python3 that can set a seccomp filter");
    };
    let mut daemon = Running::start(serve);
    daemon.says("\"message\":\"ready\"").await;
    let client = Client::new(&home.socket());
    home.done(&["pull", "-q", &a]).await;

    let refused = home.run(&["pull", "-q", &b]).await;
    assert!(refused.err.contains("code: volume-full"), "{refused:?}");
    for err in [refused.err, home.run(&["evict", "--need", "2MB"]).await.err] {
        assert!(err.contains("who uses what cannot be known") && err.contains("cannot ask who has `"), "{err}");
    }
    let plan = client.eviction_plan(2_000_000).await.unwrap();
    assert!(plan.victims.is_empty() && !plan.is_enough, "{plan:?}");
    let why = plan.unknown_holders.expect("it says why");
    assert!(why.contains("Invalid argument"), "{why}");
    let dry_run = home.run(&["evict", "--need", "2MB", "--dry-run"]).await;
    assert!(dry_run.err.contains("nothing can be evicted, because who uses what cannot be known"), "{dry_run:?}");
    let doctor = home.run(&["doctor"]).await;
    assert!(doctor.out.contains("so nothing is evicted: cannot ask who has `"), "{doctor:?}");

    // What is here is opened, and goes by hand, as the action says.
    home.done(&["open", &a]).await;
    assert_eq!(client.models().await.unwrap().len(), 1);
    home.done(&["remove", &a]).await;
    home.done(&["pull", "-q", &b]).await;
}

fn limits() -> larder::cache::Limits {
    larder::cache::Limits {
        quota: None,
        low_water_percent: 100,
        min_free: larder::cache::MinFree::Of(Share::Bytes(Bytes(0))),
        min_residency: Duration::ZERO,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn shared_bytes_are_counted_once_and_are_not_gained_from_a_kept_model() {
    let origin = origin(&[("a", 1), ("b", 1), ("c", 2)]).await;
    for model in ["a", "b"] {
        origin.put(model, "shared", &noise("shared", 2));
    }
    let [a, b, c] = ["a", "b", "c"].map(|model| origin.reference(model));
    let node = TestNode::new().quota(5 * MIB).start().await;
    for model in [&a, &b] {
        node.ready(model).await;
    }
    assert_eq!(taken(&node), 4 * MIB);
    let id = lease(&node, &b, named("ci"));
    let plan = node.cache().eviction_plan(2 * MIB).unwrap();
    assert_eq!((victims(&plan), plan.gained_bytes), (vec![a.as_str()], MIB));
    assert_eq!(node.cache().evict_for(2 * MIB).unwrap().freed_bytes, MIB);
    node.ready(&c).await;
    node.cache().pin(&reference(&c)).unwrap();
    assert_eq!(taken(&node), 5 * MIB);
    node.refused(&reference(&a), Code::VolumeFull).await;
    node.cache().release(&id).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_is_lowered_takes_effect_at_once() {
    let origin = origin(&[("a", 2), ("b", 2)]).await;
    let (a, b) = (origin.reference("a"), origin.reference("b"));
    let mut home = Home::new();
    let file = home.path().join("larder.toml");
    home.set("LARDER_CONFIG", file.to_str().unwrap());
    fs::write(&file, "[volume]\nmin_residency = \"0s\"\n").unwrap();
    let mut daemon = home.serve().await;
    for model in [&a, &b] {
        home.done(&["pull", model]).await;
    }
    home.done(&["open", &a]).await;
    fs::write(&file, "[volume]\nmin_residency = \"0s\"\nquota = \"3MB\"\n").unwrap();
    daemon.hang_up();
    let line = daemon.says("\"message\":\"evicted\"").await;
    assert!(line.contains("\"rule\":\"quota\"") && line.contains(&b), "{line}");
    daemon.says("configuration read again").await;
    let models = Client::new(&home.socket()).models().await.unwrap();
    assert_eq!(models.iter().map(|model| &model.reference).collect::<Vec<_>>(), [&a]);

    // What went, and why, has an answer also when no daemon runs.
    daemon.terminate();
    daemon.ended().await;
    let history = home.done(&["history"]).await;
    assert!(history.contains(&b) && history.contains("the quota, which was exceeded"), "{history}");
    let ended = home.run(&["open", &b]).await;
    assert!(ended.err.contains("it is not local, it was evicted at 20"), "{}", ended.err);
    assert!(ended.err.contains("for the quota, which was exceeded"), "{}", ended.err);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_plan_says_is_what_happens_over_http_and_by_command() {
    let origin = origin(&[("a", 2), ("b", 2), ("c", 2), ("d", 2)]).await;
    let [a, b, c, d] = ["a", "b", "c", "d"].map(|model| origin.reference(model));
    let mut home = Home::new();
    home.set("LARDER_VOLUME_QUOTA", "9MB");
    home.set("LARDER_VOLUME_LOW_WATER", "100%");
    home.set("LARDER_VOLUME_MIN_RESIDENCY", "0s");
    let _daemon = home.serve().await;
    for model in [&a, &b, &c, &d] {
        home.done(&["pull", model]).await;
    }
    home.done(&["open", "--lease-for", "ci", &b]).await;
    let client = Client::new(&home.socket());
    let plan = client.eviction_plan(4_000_000).await.unwrap();
    assert_eq!((victims(&plan), plan.kept.len(), plan.kept[0].by.len()), (vec![a.as_str(), &c], 1, 1));
    let told = home.done(&["evict", "--need", "4MB", "--dry-run", "-o", "json"]).await;
    assert_eq!(serde_json::from_str::<EvictionPlan>(&told).unwrap(), plan);
    let table = home.done(&["evict", "--need", "4MB", "--dry-run"]).await;
    assert!(table.contains("leased") && table.contains("ci (lease `"), "{table}");
    assert_eq!(client.models().await.unwrap().len(), 4, "a plan changes nothing");

    let said = home.done(&["evict", "--need", "4MB"]).await;
    let gone = client.evictions().await.unwrap();
    assert_eq!(gone.iter().map(|gone| &gone.reference).collect::<Vec<_>>(), [&c, &a], "newest first");
    assert!(said.contains(&format!("evicted {a}")) && said.ends_with("freed 4.2 MB\n"), "{said}");
    for (gone, planned) in gone.iter().rev().zip(&plan.victims) {
        let expected = (&planned.model, planned.rank, planned.gained_bytes, &planned.opened_at);
        assert_eq!((&gone.model, gone.rank, gone.freed_bytes, &gone.opened_at), expected);
        assert_eq!((gone.rule.as_str(), gone.needed_bytes), ("request", plan.short_bytes));
    }
    let refused = client.evict(8_000_000).await.unwrap_err();
    assert!(refused.code == Code::VolumeFull && refused.message.contains("ci (lease `"), "{refused}");
    assert_eq!(client.models().await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_survives_a_restart_and_says_for_whom_a_model_went() {
    let origin = origin(&[("a", 1), ("b", 1)]).await;
    let (a, b) = (origin.reference("a"), origin.reference("b"));
    let mut node = TestNode::new().quota(MIB).start().await;
    node.ready(&a).await;
    node.ready(&b).await;
    node.restart(|_| {}).await;
    let history = node.cache().evictions().unwrap();
    assert_eq!((history.len(), &history[0].reference, history[0].rule.as_str()), (1, &a, "pull"));
    assert_eq!((history[0].rank, history[0].freed_bytes, history[0].needed_bytes), (1, MIB, MIB));
    let (code, says) = node.open(&a).await.unwrap_err();
    assert!(code == Code::NotLocal && says.ends_with(&format!("for the pull of `{b}`")), "{says}");
    assert_eq!(node.counted("larder_evictions_total{rule=\"pull\"}"), 0, "that was the former process");
    node.ready(&a).await;
    node.cache().remove(&a).unwrap();
    assert!(node.open(&a).await.unwrap_err().1.ends_with("it is not local"), "it was not evicted this time");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_of_a_removed_model_count_until_the_last_reader_closes_them() {
    let origin = origin(&[("a", 1), ("b", 1)]).await;
    let (a, b) = (origin.reference("a"), origin.reference("b"));
    let node = TestNode::new().quota(MIB).start().await;
    let reader = File::open(node.ready(&a).await.join("weights")).unwrap();
    assert_eq!(node.cache().remove(&a).unwrap().freed_bytes, 0, "the disk has nothing back yet");
    assert_eq!(taken(&node), MIB);
    node.cache().keep_room();
    assert_eq!(node.counted("larder_deleted_open_bytes"), MIB);
    node.refused(&reference(&b), Code::VolumeFull).await;
    drop(reader);
    node.cache().keep_room();
    assert_eq!(taken(&node), 0);
    node.ready(&b).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_use_of_the_disk_makes_models_go() {
    let disk = match SmallDisk::new(128) {
        Ok(disk) => disk,
        Err(why) => return skipped(&why),
    };
    let origin = origin(&[("a", 8), ("b", 8)]).await;
    let (a, b) = (origin.reference("a"), origin.reference("b"));
    let min_free = larder::cache::MinFree::Of(Share::Bytes(Bytes(30 * MIB)));
    let node =
        TestNode::new().at(&disk.path().join("volume")).limits(|limits| limits.min_free = min_free).start().await;
    for model in [&a, &b] {
        node.ready(model).await;
    }
    node.cache().keep_room();
    assert_eq!(local(&node).len(), 2, "there is room");
    disk.fill("others", disk.free_bytes() - 25 * MIB);
    node.cache().keep_room();
    assert_eq!(local(&node), BTreeSet::from([b.clone()]));
    assert!(disk.free_bytes() >= 30 * MIB);
    let history = node.cache().evictions().unwrap();
    assert_eq!((history[0].reference.as_str(), history[0].rule.as_str()), (a.as_str(), "min-free"));
    // More than all models together: what can go, goes.
    disk.fill("more", disk.free_bytes() - MIB);
    node.cache().keep_room();
    assert!(local(&node).is_empty());
    assert_eq!(node.counted("larder_evictions_total{rule=\"min-free\"}"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_without_a_free_byte_can_be_emptied() {
    let disk = match SmallDisk::new(128) {
        Ok(disk) => disk,
        Err(why) => return skipped(&why),
    };
    let origin = origin(&[("a", 16), ("b", 16), ("c", 16)]).await;
    let [a, b, c] = ["a", "b", "c"].map(|model| origin.reference(model));
    let root = disk.path().join("volume");
    let mut node = TestNode::new().at(&root).start().await;
    for model in [&a, &b, &c] {
        node.ready(model).await;
    }
    assert!(root.join("reserve").exists());
    disk.fill_up();
    assert!(disk.free_bytes() < 4096, "{}", disk.free_bytes());
    // The 8 MiB of the reserve are not enough for these.
    assert_eq!(node.cache().evict_for(20 * MIB).unwrap().evictions[0].reference, a);
    assert_eq!(node.cache().evictions().unwrap().len(), 1);
    assert!(!root.join("reserve").exists(), "there is no room to spare");
    disk.clear();
    node.cache().evict_for(0).unwrap();
    assert!(root.join("reserve").exists(), "it is made again");
    // A start needs it too.
    disk.fill_up();
    node.restart(|_| {}).await;
    for model in [&b, &c] {
        node.cache().remove(model).unwrap();
    }
    assert!(local(&node).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn on_a_disk_without_a_free_byte_a_directory_is_laid_out_again() {
    let disk = match SmallDisk::new(128) {
        Ok(disk) => disk,
        Err(why) => return skipped(&why),
    };
    let origin = origin(&[("a", 1)]).await;
    let a = origin.reference("a");
    let node = TestNode::new().at(&disk.path().join("volume")).start().await;
    let dir = node.ready(&a).await;
    fs::remove_dir_all(&dir).unwrap();
    disk.fill_up();
    assert_eq!(node.open(&a).await, Ok(dir.clone()));
    assert!(dir.join("weights").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_that_race_for_room_never_exceed_the_quota() {
    let models: Vec<String> = (0..8).map(|n| format!("m{n}")).collect();
    let sizes: Vec<(&str, u64)> = models.iter().map(|model| (model.as_str(), 1)).collect();
    let origin = origin(&sizes).await;
    let node = TestNode::new().quota(3 * MIB).start().await;
    for round in 0..3 {
        let pulls: Vec<_> =
            models.iter().map(|model| node.cache().pull(&reference(&origin.reference(model))).unwrap()).collect();
        for mut pull in pulls {
            loop {
                assert!(taken(&node) <= 3 * MIB, "round {round}: {}", taken(&node));
                if pull.status.borrow_and_update().phase.is_final() {
                    break;
                }
                pull.status.changed().await.unwrap();
            }
            let status = pull.finished().await;
            let code = status.error.as_ref().map(|error| error.code.as_str());
            assert!(status.phase == Phase::Ready || code == Some("volume-full"), "{status:?}");
        }
        assert!((1..=3).contains(&local(&node).len()), "{:?}", local(&node));
    }
}

/// What a test of this kind finds is found again with `LARDER_SEED`.
#[tokio::test(flavor = "multi_thread")]
async fn whatever_happens_the_quota_holds_and_what_is_leased_stays() {
    let seed =
        std::env::var("LARDER_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("LARDER_SEED={seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let names: Vec<String> = (0..7).map(|n| format!("m{n}")).collect();
    let origin = ModelOrigin::start().await;
    for (n, name) in names.iter().enumerate() {
        origin.put(name, "weights", &noise(name, 1 + n as u64 % 2));
        origin.put(name, "shared", &noise(&format!("shared{}", n % 3), 1));
    }
    let models: Vec<String> = names.iter().map(|name| origin.reference(name)).collect();
    const QUOTA: u64 = 7 * MIB;
    let mut node = TestNode::new().quota(QUOTA).start().await;
    // By lease.
    let mut leased: BTreeMap<String, String> = BTreeMap::new();
    for step in 0..60 {
        let model = random.choice(&models).unwrap().clone();
        match random.u8(..10) {
            0..=4 => {
                let status = node.pull(&model).await;
                let code = status.error.as_ref().map(|error| error.code.as_str());
                assert!(status.phase == Phase::Ready || code == Some("volume-full"), "step {step}: {status:?}");
            }
            5 => drop(node.open(&model).await),
            6 if local(&node).contains(&model) => {
                leased.insert(lease(&node, &model, named(&format!("holder{}", random.u8(..3)))), model);
            }
            7 => {
                if let Some((id, _)) = leased.pop_first() {
                    node.cache().release(&id).unwrap();
                }
            }
            8 => drop(node.cache().remove(&model)),
            9 if random.u8(..3) == 0 => node.restart(|_| {}).await,
            _ => drop(node.cache().evict_for(random.u64(..QUOTA))),
        }
        assert!(taken(&node) <= QUOTA, "step {step}: {}", taken(&node));
        let local = local(&node);
        assert!(leased.values().all(|model| local.contains(model)), "step {step}: {leased:?}, {local:?}");
        node.check();
    }
}

//! Killed after each call that changes the volume, one run after another, until a run ends unharmed.

use std::path::{Path, PathBuf};

use larder::model::Digest;
use larder::store::{ScrubNote, Volume};

use super::checker::{self, Promised};
use super::larder::Home;
use super::models::{Models, bytes};
use super::row::{Row, is_long, seed, size};
use super::skip::skipped;
use super::strace::{self, Traced};

/// One home with the models there are; its volume is made anew for each point.
struct Ground {
    home: Home,
    models: Models,
    small: String,
    shares: String,
    large: String,
}

impl Ground {
    fn new() -> Ground {
        let (home, mut models) = (Home::new(), Models::default());
        let shared = ("weights/shared.bin", bytes("shared", 9_000));
        let own = |name: &str| {
            vec![
                ("config.json", format!("{{\"of\":\"{name}\"}}").into_bytes()),
                ("own.bin", bytes(name, 5_000)),
                shared.clone(),
            ]
        };
        let small = models.put(home.path(), "small", &own("small"));
        let shares = models.put(home.path(), "shares", &own("shares"));
        let large = models.put(
            home.path(),
            "large",
            &[("model.safetensors", bytes("large", (3 << 20) + 17)), ("config.json", b"{}".to_vec())],
        );
        std::fs::write(home.path().join("small-quota.toml"), "[volume]\nquota = \"1MB\"\n").unwrap();
        Ground { home, models, small, shares, large }
    }

    /// Nothing is there.
    fn clear(&self) {
        match std::fs::remove_dir_all(self.home.root()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => panic!("the volume cannot be removed: {e}"),
            _ => {}
        }
    }

    /// Runs a command and kills it where `is_the_end` says so.
    async fn run_until(&self, run: &Run, is_the_end: impl FnMut(usize, &str) -> bool + Send + 'static) -> Traced {
        let words: Vec<&str> = run.words.iter().map(String::as_str).collect();
        let (command, root, last_word) = (self.home.command(&words), self.home.root(), run.last_word);
        tokio::task::spawn_blocking(move || strace::run_until(&command, &root, last_word, is_the_end)).await.unwrap()
    }

    /// Runs a command that is killed before it can end.
    async fn cut(&self, run: &[&str], fragment: &'static str) {
        let cut = self.run_until(&words(run), move |_, line| line.contains(fragment)).await;
        assert!(cut.was_cut_off, "{fragment} never came: {cut:?}");
    }

    /// The same words with a quota of 1 MB.
    fn with_small_quota(&self, run: &[&str]) -> Run {
        let config = self.home.path().join("small-quota.toml").display().to_string();
        words(&[&["--config", &config], run].concat())
    }

    /// A file of the volume.
    fn file_in(&self, dir: &str) -> PathBuf {
        let dir = self.home.root().join(dir);
        let name = checker::files_in(&dir).into_keys().next().expect("a file is there");
        dir.join(name)
    }
}

/// What is run and killed.
struct Run {
    words: Vec<String>,
    /// What a daemon says when it has done what is looked at: then it is asked to end.
    last_word: Option<&'static str>,
}

fn words(words: &[&str]) -> Run {
    Run { words: words.iter().map(|word| (*word).to_owned()).collect(), last_word: None }
}

/// Kills what `run` says after the first, second, third … call, each time on the volume that `prepare` makes. `promise` says what
/// the prepared volume has promised, and what the command promises when it says that it is done.
async fn sweep(
    name: &str,
    prepare: impl AsyncFn(&Ground) -> Promised,
    run: impl Fn(&Ground) -> Run,
    promise: impl Fn(&Ground, &mut Promised),
) {
    if let Some(why) = strace::unusable() {
        return skipped(&why);
    }
    let ground = Ground::new();
    let outside = checker::outside_of(&ground.home);
    let run = run(&ground);
    let mut row = Row::new(&format!("kill points: {name}"));
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut calls = 0;
    // The first run is not killed, and says how many calls there are.
    let mut next = usize::MAX;
    loop {
        let label = format!("seed {seed}, larder {}, killed after call {next} of about {calls}", run.words.join(" "));
        let ended = row
            .case(&label, async {
                ground.clear();
                let mut promised = prepare(&ground).await;
                let ended = ground.run_until(&run, move |count, _| count == next).await;
                assert!(ended.code.is_none_or(|code| code == 0), "{ended:?}");
                if ended.acknowledged() {
                    promise(&ground, &mut promised);
                } else {
                    // It may be done or not: nobody was told.
                    let mut asked = Promised::default();
                    promise(&ground, &mut asked);
                    promised.here.retain(|reference| !asked.gone.contains(reference));
                    promised.gone.retain(|reference| !asked.here.contains(reference));
                }
                checker::check(&ground.home, &ground.models, &promised, &outside).await;
                ended
            })
            .await;
        match ended {
            Some(ended) if next == usize::MAX => (calls, next) = (ended.calls, 0),
            Some(ended) if !ended.was_cut_off => break,
            None if next == usize::MAX => break,
            _ => {}
        }
        let step = (calls / size(POINTS, usize::MAX)).max(1);
        next += if is_long() { 1 } else { 1 + random.usize(0..2 * step - 1) };
        if next > 2 * calls {
            break;
        }
    }
    println!("kill points: {name}: about {calls} calls change the volume");
    row.end();
}

/// About how many points of a scenario are tried in the short version.
const POINTS: usize = 8;

async fn pulled(ground: &Ground, reference: &str) -> Promised {
    ground.home.done(&["pull", "-q", reference]).await;
    Promised { here: [reference.to_owned()].into(), ..Promised::default() }
}

async fn both_that_share(ground: &Ground) -> Promised {
    let mut promised = pulled(ground, &ground.small).await;
    promised.here.extend(pulled(ground, &ground.shares).await.here);
    promised
}

fn small_is_gone(ground: &Ground, promised: &mut Promised) {
    promised.here.remove(&ground.small);
    promised.gone.insert(ground.small.clone());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_being_made() {
    sweep("first start", async |_| Promised::default(), |_| words(&["list"]), |_, _| ()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull() {
    let here = |ground: &Ground, promised: &mut Promised| promised.here.extend([ground.small.clone()]);
    let fresh = async |ground: &Ground| {
        ground.home.done(&["list"]).await;
        Promised::default()
    };
    sweep("pull", fresh, |ground| words(&["pull", "-q", &ground.small]), here).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_resumed() {
    let here = |ground: &Ground, promised: &mut Promised| promised.here.extend([ground.large.clone()]);
    let half = async |ground: &Ground| {
        ground.cut(&["pull", "-q", &ground.large], "\"at 2097152").await;
        Promised::default()
    };
    sweep("resume", half, |ground| words(&["pull", "-q", &ground.large]), here).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_of_a_model_that_shares_a_file() {
    let here = |ground: &Ground, promised: &mut Promised| promised.here.extend([ground.shares.clone()]);
    sweep(
        "dedupe",
        async |ground| pulled(ground, &ground.small).await,
        |ground| words(&["pull", "-q", &ground.shares]),
        here,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin() {
    let pinned = |ground: &Ground, promised: &mut Promised| promised.pinned.extend([ground.small.clone()]);
    sweep("pin", async |ground| pulled(ground, &ground.small).await, |ground| words(&["pin", &ground.small]), pinned)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pin_that_is_taken_back() {
    let prepared = async |ground: &Ground| {
        ground.home.done(&["pin", &ground.small]).await;
        Promised { here: [ground.small.clone()].into(), ..Promised::default() }
    };
    sweep("unpin", prepared, |ground| words(&["unpin", &ground.small]), |_, _| ()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease() {
    let leased = |_: &Ground, promised: &mut Promised| promised.leased.extend(["worker".to_owned()]);
    let open = |ground: &Ground| words(&["open", "--lease-for", "worker", &ground.small]);
    sweep("lease", async |ground| pulled(ground, &ground.small).await, open, leased).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_of_a_model_that_shares_a_file() {
    sweep("remove", both_that_share, |ground| words(&["remove", &ground.small]), small_is_gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_eviction_of_a_model_that_shares_a_file() {
    // Some kilobytes less than the quota leaves: the least recently used of the two must go.
    let evict = |ground: &Ground| ground.with_small_quota(&["evict", "--need", "970kB"]);
    sweep("evict", both_that_share, evict, small_is_gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_has_become_smaller() {
    let both = async |ground: &Ground| {
        let mut promised = pulled(ground, &ground.large).await;
        promised.here.extend(pulled(ground, &ground.small).await.here);
        promised
    };
    let serve =
        |ground: &Ground| Run { last_word: Some("\"message\":\"evicted\""), ..ground.with_small_quota(&["serve"]) };
    let large_is_gone = |ground: &Ground, promised: &mut Promised| {
        promised.here.remove(&ground.large);
        promised.gone.insert(ground.large.clone());
    };
    sweep("quota shrink", both, serve, large_is_gone).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_scrub_that_finds_a_flipped_byte() {
    let flipped = async |ground: &Ground| {
        pulled(ground, &ground.small).await;
        flip(&ground.file_in("blobs"));
        // A daemon goes on at once with the pass that the one before it had begun.
        let begun = ScrubNote { reached: Some(Digest::from_hex(&"0".repeat(64)).unwrap()), ended_ms: None };
        Volume::open(&ground.home.root()).unwrap().write_scrub_note(&begun).unwrap();
        Promised { spoilt: Some(ground.small.clone()), ..Promised::default() }
    };
    let serve = |_: &Ground| Run { last_word: Some("\"message\":\"pull ready\""), ..words(&["serve"]) };
    let here = |ground: &Ground, promised: &mut Promised| promised.here.extend([ground.small.clone()]);
    sweep("scrub", flipped, serve, here).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_after_a_kill() {
    let cut = async |ground: &Ground| {
        let promised = pulled(ground, &ground.small).await;
        ground.cut(&["pull", "-q", &ground.shares], "/refs/").await;
        ground.cut(&["pull", "-q", &ground.large], "\"done ").await;
        ground.cut(&["pull", "-q", &ground.large], "/ingests/snapshot-").await;
        promised
    };
    sweep("recovery", cut, |_| words(&["list"]), |_, _| ()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_that_is_rebuilt() {
    let spoilt = async |ground: &Ground| {
        let promised = pulled(ground, &ground.small).await;
        spoil(&ground.home.root().join("index-v1/db"));
        promised
    };
    sweep("index rebuild", spoilt, |_| words(&["list"]), |_, _| ()).await;
}

fn spoil(path: &Path) {
    std::fs::write(path, bytes("garbage", 4096)).unwrap();
}

/// Changes a byte; its length and its name are as before.
fn flip(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[0] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_of_a_model_that_is_laid_out_again() {
    let lost = async |ground: &Ground| {
        let promised = pulled(ground, &ground.small).await;
        std::fs::remove_dir_all(ground.home.public().join("file")).unwrap();
        promised
    };
    sweep("snapshot mend", lost, |_| words(&["list"]), |_, _| ()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repair_of_bytes_that_were_changed() {
    let changed = async |ground: &Ground| {
        pulled(ground, &ground.small).await;
        spoil(&ground.file_in("blobs"));
        Promised { spoilt: Some(ground.small.clone()), ..Promised::default() }
    };
    let here = |ground: &Ground, promised: &mut Promised| promised.here.extend([ground.small.clone()]);
    sweep("repair", changed, |ground| words(&["open", "--wait", &ground.small]), here).await;
}

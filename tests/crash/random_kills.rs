//! A daemon with many pulls under way, killed at a random moment; again and again on one volume.

use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use larder::client::Client;
use larder::fault::Problem;
use larder::wire::http::{Phase, PullRequest};

use super::checker::{self, Promised};
use super::hostile_origin::HostileOrigin;
use super::larder::Home;
use super::models::{Files, Models, bytes};
use super::row::{Row, cycles, seed};

const MODELS: usize = 12;
const AT_ONCE: usize = 8;
/// Latest moment of a kill: a little more than the pulls of one round take.
const LATEST_KILL_MS: u64 = 400;
/// The same where pulls wait before they ask again.
const LATEST_HOSTILE_KILL_MS: u64 = 1_500;
/// Most kills between two checks.
const MOST_KILLS_IN_A_ROW: usize = 3;
/// One of so many models that are here is removed and not pulled again.
const REMOVED_ONE_OF: u8 = 4;

/// What one user was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Nothing,
    Removed,
    Ready,
}

/// What one user asks for.
#[derive(Debug, Clone, Copy)]
struct Wish {
    remove: bool,
    pull: bool,
}

/// Asks for it, and gives the last answer.
async fn ask(client: Client, reference: String, wish: Wish) -> (String, Told) {
    let mut told = Told::Nothing;
    let _: Result<(), Problem> = async {
        if wish.remove {
            client.remove(&reference).await?;
            told = Told::Removed;
        }
        if wish.pull {
            // From here on the model may come, though nobody is told of it.
            told = Told::Nothing;
            let pull = client.pull(&PullRequest::of(&reference)).await?;
            let mut states = client.watch(&pull.id).await?;
            while let Some(state) = states.next().await {
                if state?.phase == Phase::Ready {
                    told = Told::Ready;
                }
            }
        }
        Ok(())
    }
    .await;
    (reference, told)
}

/// Runs a daemon, has users ask for all of `references`, and kills it at that moment.
async fn killed(
    home: &Home,
    references: &[String],
    promised: &mut Promised,
    random: &mut fastrand::Rng,
    moment: Duration,
) {
    let daemon = home.serve().await;
    let client = Client::new(&home.socket());
    let users = references.iter().map(|reference| {
        let is_here = promised.here.remove(reference);
        promised.gone.remove(reference);
        let wish = Wish { remove: is_here, pull: !is_here || random.u8(0..REMOVED_ONE_OF) > 0 };
        tokio::spawn(ask(client.clone(), reference.clone(), wish))
    });
    let users: Vec<_> = users.collect();
    tokio::time::sleep(moment).await;
    daemon.kill().await;
    for user in join_all(users).await {
        match user.unwrap() {
            (_, Told::Nothing) => {}
            (reference, Told::Removed) => promised.gone.extend([reference]),
            (reference, Told::Ready) => promised.here.extend([reference]),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_promised_survives_kill_9_at_a_random_moment() {
    let (home, mut models) = (Home::new(), Models::default());
    let shared = ("shared.bin", bytes("shared", 300_000));
    let mut references: Vec<_> = (0..MODELS)
        .map(|at| {
            let own = ("own.bin", bytes(&format!("own {at}"), 700_000 + 90_000 * at));
            models.put(home.path(), &format!("m{at}"), &[own, ("config.json", b"{}".to_vec()), shared.clone()])
        })
        .collect();
    let outside = checker::outside_of(&home);
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut row = Row::new("kill -9 of a daemon with 8 pulls");
    let mut promised = Promised::default();
    for cycle in 0..cycles(25, 10_000) {
        random.shuffle(&mut references);
        let moment = Duration::from_millis(random.u64(0..LATEST_KILL_MS));
        let label = format!("seed {seed}, cycle {cycle}, killed after {moment:?}");
        let survived = row.case(&label, async {
            killed(&home, &references[..AT_ONCE], &mut promised, &mut random, moment).await;
            checker::check(&home, &models, &promised, &outside).await;
        });
        if survived.await.is_none() {
            break;
        }
    }
    row.end();
}

/// Larger than what is lost of a file that was being written, so that there is something to go on with.
fn hostile_files(at: usize) -> Files {
    let files = [
        ("own.bin", bytes(&format!("own {at}"), 2_300_000 + 200_000 * at)),
        ("config.json", format!("{{\"of\":{at}}}").into_bytes()),
        ("shared.bin", bytes("shared", 1_300_000)),
    ];
    files.map(|(path, bytes)| (path.to_owned(), bytes)).into()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_promised_survives_kill_9_while_every_origin_misbehaves() {
    let (home, mut models) = (Home::new(), Models::default());
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let (mut origins, mut references) = (Vec::new(), Vec::new());
    for at in 0..AT_ONCE {
        let origin = HostileOrigin::serving(random.u64(..), hostile_files(at)).await;
        models.are_at(&origin.url, origin.files.clone());
        references.push(origin.url.clone());
        origins.push(origin);
    }
    let outside = checker::outside_of(&home);
    let mut row = Row::new("kill -9 of a daemon with 8 pulls from a hostile origin");
    let mut promised = Promised::default();
    for cycle in 0..cycles(15, 1_000) {
        let kills: Vec<_> = (0..random.usize(1..=MOST_KILLS_IN_A_ROW))
            .map(|_| Duration::from_millis(random.u64(0..LATEST_HOSTILE_KILL_MS)))
            .collect();
        let label = format!("seed {seed}, cycle {cycle}, killed after {kills:?}");
        let survived = row.case(&label, async {
            for moment in &kills {
                for origin in &origins {
                    origin.is_wrong(random.choice([10, 30, 60]).unwrap());
                }
                killed(&home, &references, &mut promised, &mut random, *moment).await;
            }
            // What is resumed comes to an end when the origin has healed.
            for origin in &origins {
                origin.is_wrong(0);
            }
            checker::check(&home, &models, &promised, &outside).await;
        });
        if survived.await.is_none() {
            break;
        }
    }
    let label = format!("seed {seed}, every model when the origin has healed");
    let healed = async {
        for reference in &references {
            home.done(&["pull", "-q", reference]).await;
        }
        let promised = Promised { here: references.iter().cloned().collect(), ..Promised::default() };
        checker::check(&home, &models, &promised, &outside).await;
    };
    row.case(&label, healed).await;
    row.end();
}

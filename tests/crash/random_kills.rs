//! A daemon with many pulls under way, killed at a random moment; again and again on one volume.

use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use larder::client::Client;
use larder::fault::Problem;
use larder::wire::http::{Phase, PullRequest};

use super::checker::{self, Promised};
use super::larder::Home;
use super::models::{Models, bytes};
use super::row::{Row, cycles, seed};

const MODELS: usize = 12;
const AT_ONCE: usize = 8;
/// Latest moment of a kill: a little more than the pulls of one round take.
const LATEST_KILL_MS: u64 = 400;

/// What one user was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Nothing,
    Removed,
    Ready,
}

/// Removes the model if it is here, and pulls it again.
async fn replace(client: Client, reference: String, is_here: bool) -> (String, Told) {
    let mut told = Told::Nothing;
    let _: Result<(), Problem> = async {
        if is_here {
            client.remove(&reference).await?;
            told = Told::Removed;
        }
        let pull = client.pull(&PullRequest::of(&reference)).await?;
        told = Told::Nothing;
        let mut states = client.watch(&pull.id).await?;
        while let Some(state) = states.next().await {
            if state?.phase == Phase::Ready {
                told = Told::Ready;
            }
        }
        Ok(())
    }
    .await;
    (reference, told)
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
            let daemon = home.serve().await;
            let client = Client::new(&home.socket());
            let users = references[..AT_ONCE].iter().map(|reference| {
                let is_here = promised.here.remove(reference);
                promised.gone.remove(reference);
                tokio::spawn(replace(client.clone(), reference.clone(), is_here))
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
            checker::check(&home, &models, &promised, &outside).await;
        });
        if survived.await.is_none() {
            break;
        }
    }
    row.end();
}

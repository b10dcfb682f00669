//! `larder demo`: the main job, with no network and no other service.
//!
//! A small origin inside this process serves a generated model of real shape; a daemon on a temporary volume pulls it
//! through the HTTP API; then it is opened, read, and opened again.

mod origin;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures::StreamExt;

use super::report::out;
use super::scratch::Scratch;
use crate::client::Client;
use crate::config::{Config, Flags, Surroundings};
use crate::daemon::Daemon;
use crate::fault::{Code, Problem};
use crate::model::{Bytes, Digest};
use crate::source::Environment;
use crate::wire::http::{ModelDetail, OpenRequest, Phase, PullRequest, PullStatus};
use origin::Origin;

/// Prints a line; that nobody reads on is no error.
macro_rules! say {
    ($($words:tt)*) => { out(&format!("{}\n", format_args!($($words)*)))? };
}

/// Runs the demonstration and prints what happened in plain words.
pub(crate) async fn run() -> Result<(), Problem> {
    let place = Scratch::below(&std::env::temp_dir(), "larder-demo");
    let place = place.map_err(|e| broken("make a temporary directory", &e))?;
    let origin = Origin::start().await.map_err(|e| broken("start the origin", &e))?;
    say!("A model of {} in {} files, at {}", Bytes(origin.total_bytes()), origin.files(), origin.reference());
    say!("A daemon with an empty volume, in {}", place.path().display());

    let daemon = Daemon::start(&config(place.path())?).await?;
    let client = Client::new(daemon.socket());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(daemon.run_until(async {
        let _ = stopped.await;
        "the demonstration is over"
    }));
    let told = tell(&client, &origin).await;
    let _ = stop.send(());
    running.await.map_err(|e| broken("stop the daemon", &e))?;
    told
}

async fn tell(client: &Client, origin: &Origin) -> Result<(), Problem> {
    let request = PullRequest::of(origin.reference());
    let open = OpenRequest::of(origin.reference());

    say!("\n1. Pull it (POST /v1/pulls). Nothing is here yet.");
    let began = Instant::now();
    let first = pull(client, &request).await?;
    let cold = began.elapsed();
    say!(
        "   {} came from the origin in {:.2} s ({}/s): hashed while it was written, made durable, and given a name.",
        Bytes(first.bytes_fetched),
        cold.as_secs_f64(),
        Bytes(rate(first.bytes_fetched, cold)),
    );

    say!("\n2. Open it: a directory of plain read-only files.");
    let began = Instant::now();
    let opened = client.open(&open).await?;
    say!("   {:.2} ms: {}", millis(began.elapsed()), opened.model.path);

    say!("\n3. Read all of it, as a loader does, and compare every byte with its digest.");
    let detail = client.model(&opened.model.id).await?;
    let began = Instant::now();
    let directory = PathBuf::from(&opened.model.path);
    let read = tokio::task::spawn_blocking(move || read_all(&directory, &detail)).await;
    let read = read.map_err(|e| broken("read the model", &e))??;
    let took = began.elapsed();
    say!("   {} in {:.2} s ({}/s): all as they should be.", Bytes(read), took.as_secs_f64(), Bytes(rate(read, took)));

    say!("\n4. Open it again, and pull it again, as the next pod would.");
    let began = Instant::now();
    client.open(&open).await?;
    let warm = began.elapsed();
    let again = pull(client, &request).await?;
    say!("   Opened in {:.2} ms. The second pull fetched {}.", millis(warm), Bytes(again.bytes_fetched));

    let times = origin.sent_bytes() as f64 / origin.total_bytes() as f64;
    say!(
        "\nCold {:.2} s, warm {:.2} ms. The origin sent each byte {}.",
        cold.as_secs_f64(),
        millis(warm),
        times_text(times)
    );
    say!("The volume was temporary and is removed now. Yours: `larder serve`, then `larder pull hf://org/name`.");
    Ok(())
}

async fn pull(client: &Client, request: &PullRequest) -> Result<PullStatus, Problem> {
    let submitted = client.pull(request).await?;
    let mut updates = client.watch(&submitted.id).await?;
    let mut last = submitted;
    while let Some(status) = updates.next().await {
        last = status?;
    }
    match (&last.phase, &last.error) {
        (Phase::Ready, _) => Ok(last),
        (_, Some(error)) => Err(Problem::from(error)),
        (phase, None) => Err(broken("pull the model", &phase.text())),
    }
}

fn read_all(directory: &Path, detail: &ModelDetail) -> Result<u64, Problem> {
    let mut read = 0;
    for file in &detail.manifest_files {
        let path = directory.join(&file.path);
        let mut hasher = blake3::Hasher::new();
        let opened = File::open(&path).map_err(|e| broken("open a file of the model", &e))?;
        hasher.update_reader(opened).map_err(|e| broken("read a file of the model", &e))?;
        if Digest::finish(&hasher).to_string() != file.digest {
            return Err(broken("trust a file of the model", &path.display()));
        }
        read += hasher.count();
    }
    Ok(read)
}

fn times_text(times: f64) -> String {
    if (times - 1.0).abs() < 0.001 { "once".into() } else { format!("{times:.3} times") }
}

fn rate(bytes: u64, over: Duration) -> u64 {
    (bytes as f64 / over.as_secs_f64().max(1e-6)) as u64
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn broken(what: &str, why: &dyn std::fmt::Display) -> Problem {
    let action = "check that the temporary directory (`TMPDIR`) has 1 GB free, and report this if it has";
    Problem::new(Code::InternalError, format!("cannot {what}: {why}"), action)
}

/// The defaults, over a volume and a socket of its own; nothing of the user's configuration.
fn config(place: &Path) -> Result<Config, Problem> {
    let home = place.display().to_string();
    let own = [
        ("HOME", home.clone()),
        ("LARDER_ROOT", format!("{home}/volume")),
        ("LARDER_SOCKET", format!("{home}/larder.sock")),
        ("LARDER_SERVE_LISTEN", "127.0.0.1:0".to_owned()),
        ("LARDER_VOLUME_MIN_FREE", "0".to_owned()),
    ];
    let surroundings = Surroundings::new(Environment::from_iter(own), false);
    Config::load(&Flags::default(), &surroundings).map_err(|e| Problem::of(&e))
}

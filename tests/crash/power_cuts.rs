//! Power cuts: the file system is shut down without its log, mounted again, and checked. One volume lives through all
//! cuts of a test, so what was promised long ago is looked at each time.

use std::sync::{Arc, Mutex};

use super::checker::{self, Promised};
use super::larder::Home;
use super::loop_disk::{Kind, LoopDisk};
use super::models::{Models, bytes};
use super::row::{Row, cycles, seed};
use super::skip::skipped;
use super::strace::{self, Traced};

const MODELS: usize = 6;
/// About as many calls as a pull needs to change the volume: beyond them the power is cut right after the answer.
const MOST_CALLS: usize = 150;

/// Something a user asks for.
#[derive(Debug, Clone, Copy)]
enum Wish {
    Pull,
    Remove,
    Pin,
    Unpin,
    Lease,
}

impl Wish {
    fn words<'a>(self, reference: &'a str, holder: &'a str) -> Vec<&'a str> {
        match self {
            Wish::Pull => vec!["pull", "-q", reference],
            Wish::Remove => vec!["remove", reference],
            Wish::Pin => vec!["pin", reference],
            Wish::Unpin => vec!["unpin", reference],
            Wish::Lease => vec!["open", "--lease-for", holder, reference],
        }
    }

    /// What is true after it was asked for, and after it was done.
    fn promise(self, reference: &str, holder: &str, done: bool, promised: &mut Promised) {
        let (reference, holder) = (reference.to_owned(), holder.to_owned());
        match (self, done) {
            (Wish::Pull | Wish::Pin, false) => drop(promised.gone.take(&reference)),
            (Wish::Remove, false) => drop(promised.here.take(&reference)),
            (Wish::Unpin, _) => drop(promised.pinned.take(&reference)),
            (Wish::Lease, false) => {}
            (Wish::Pull, true) => promised.here.extend([reference]),
            (Wish::Pin, true) => {
                promised.here.extend([reference.clone()]);
                promised.pinned.extend([reference]);
            }
            (Wish::Remove, true) => promised.gone.extend([reference]),
            (Wish::Lease, true) => promised.leased.extend([holder]),
        }
    }
}

/// What is asked for next of this model.
fn wish(random: &mut fastrand::Rng, promised: &Promised, reference: &str) -> Wish {
    let (is_here, is_pinned) = (promised.here.contains(reference), promised.pinned.contains(reference));
    match random.u8(0..10) {
        0..=1 => Wish::Pin,
        2 if is_here => Wish::Lease,
        _ if is_pinned => Wish::Unpin,
        3..=9 if is_here => Wish::Remove,
        _ => Wish::Pull,
    }
}

async fn power_cuts(kind: Kind, cuts: usize) {
    let home = Home::new();
    let disk = match LoopDisk::new(kind, 512, &home.root()) {
        Ok(disk) => disk,
        Err(why) => return skipped(&why),
    };
    if let Some(why) = strace::unusable() {
        return skipped(&why);
    }
    let mut models = Models::default();
    let shared = ("shared.bin", bytes("shared", 70_000));
    let references: Vec<_> = (0..MODELS)
        .map(|at| {
            let own = bytes(&format!("own {at}"), if at % 3 == 0 { (1 << 20) + 4_000 } else { 6_000 });
            models.put(
                home.path(),
                &format!("m{at}"),
                &[("own.bin", own), ("a/config.json", b"{}".to_vec()), shared.clone()],
            )
        })
        .collect();
    let outside = checker::outside_of(&home);
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    let mut row = Row::new(&format!("power cuts: {}", kind.name()));
    let mut promised = Promised::default();
    for cut in 0..cuts {
        let reference = &references[random.usize(0..MODELS)];
        let (wish, at, holder) =
            (wish(&mut random, &promised, reference), random.usize(1..MOST_CALLS), format!("worker-{cut}"));
        let label = format!("seed {seed}, cut {cut}: {wish:?} of {reference}, cut off at call {at}");
        let survived = row.case(&label, async {
            wish.promise(reference, &holder, false, &mut promised);
            let ended = cut_off(&home, &disk, &wish.words(reference, &holder), at).await;
            if ended.acknowledged() {
                wish.promise(reference, &holder, true, &mut promised);
            }
            disk.unmount().unwrap();
            disk.mount().unwrap();
            checker::check(&home, &models, &promised, &outside).await;
        });
        // What is wrong stays wrong on this volume.
        if survived.await.is_none() {
            break;
        }
    }
    disk.unmount().unwrap();
    disk.must_be_clean();
    disk.mount().unwrap();
    row.end();
}

/// Runs a command, and cuts the power after this many calls, or else when it has ended.
async fn cut_off(home: &Home, disk: &LoopDisk, words: &[&str], at: usize) -> Traced {
    let fuse = Arc::new(Mutex::new(Some(disk.fuse())));
    let (command, root, other) = (home.command(words), home.root(), fuse.clone());
    let run = move || {
        strace::run_until(&command, &root, None, |count, _| {
            let is_the_end = count >= at;
            if is_the_end && let Some(fuse) = other.lock().unwrap().take() {
                fuse.blow();
            }
            is_the_end
        })
    };
    let ended = tokio::task::spawn_blocking(run).await.unwrap();
    if let Some(fuse) = fuse.lock().unwrap().take() {
        fuse.blow();
    }
    ended
}

#[tokio::test(flavor = "multi_thread")]
async fn on_ext4_what_was_promised_is_there_after_a_power_cut() {
    power_cuts(Kind::Ext4, cycles(25, 5_000)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn on_xfs_what_was_promised_is_there_after_a_power_cut() {
    power_cuts(Kind::Xfs, cycles(25, 5_000)).await;
}

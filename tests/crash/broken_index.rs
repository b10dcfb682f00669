//! What can be wrong with `index-v1/`: nothing of it may cost a model, or keep the daemon from starting.

use std::fs;
use std::path::Path;

use super::checker::{self, Promised};
use super::larder::Home;
use super::models::{Models, bytes};
use super::row::{Row, seed, size};

/// Does something to an index.
type Damage = (&'static str, fn(&Path));

const DAMAGES: [Damage; 10] = [
    ("deleted", |index| fs::remove_dir_all(index).unwrap()),
    ("empty", |index| {
        fs::remove_dir_all(index).unwrap();
        fs::create_dir(index).unwrap();
    }),
    ("a file", |index| {
        fs::remove_dir_all(index).unwrap();
        fs::write(index, "x").unwrap();
    }),
    ("without db", |index| fs::remove_file(index.join("db")).unwrap()),
    ("without conf", |index| fs::remove_file(index.join("conf")).unwrap()),
    ("db cut short", |index| cut(&index.join("db"), 2)),
    ("db of no length", |index| cut(&index.join("db"), usize::MAX)),
    ("db of garbage", |index| fs::write(index.join("db"), bytes("garbage", 100_000)).unwrap()),
    ("conf of garbage", |index| fs::write(index.join("conf"), bytes("garbage", 100)).unwrap()),
    ("a torn snapshot", |index| fs::write(index.join("snap.FFFFFFFFFFFFFFFF.generating"), "").unwrap()),
];

fn cut(path: &Path, by: usize) {
    let whole = fs::read(path).unwrap();
    fs::write(path, &whole[..whole.len() / by]).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_starts_with_any_index_and_no_model_is_lost() {
    let (home, mut models) = (Home::new(), Models::default());
    let mut promised = Promised::default();
    for name in ["a", "b"] {
        let files = [("own.bin", bytes(name, 5_000)), ("shared.bin", bytes("shared", 9_000))];
        promised.here.extend([models.put(home.path(), name, &files)]);
    }
    let outside = checker::outside_of(&home);
    for reference in &promised.here {
        home.done(&["pull", "-q", reference]).await;
    }
    let index = home.root().join("index-v1");
    let mut row = Row::new("a broken index");
    for (name, damage) in DAMAGES {
        let case = async {
            damage(&index);
            checker::check(&home, &models, &promised, &outside).await;
        };
        row.case(name, case).await;
    }
    let seed = seed();
    let mut random = fastrand::Rng::with_seed(seed);
    for at in 0..size(8, 500) {
        let case = async {
            let db = index.join("db");
            let mut damaged = fs::read(&db).unwrap();
            for _ in 0..random.usize(1..64) {
                // Where sled has its pages; most of the file is room for more.
                let at = random.usize(0..damaged.len().min(16 << 10));
                damaged[at] = random.u8(..);
            }
            fs::write(db, damaged).unwrap();
            checker::check(&home, &models, &promised, &outside).await;
        };
        row.case(&format!("seed {seed}, damage {at}"), case).await;
    }
    row.end();
}

//! A web server that does, from a seed, everything that servers, proxies and attackers were seen to do.
//!
//! It serves a directory with a `larder.json` and answers each request rightly or with one [`Fault`]. The same seed and
//! the same requests give the same faults. [`HostileOrigin::log`] says what was done. A test that uses it starts with
//! tokio's clock paused, does its work [`HostileOrigin::in_no_time`], and prints the seed when it fails.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, SystemTime};

use tokio::net::TcpListener;

use super::raw_http::{Answer, Asked, Connection, sha256};

/// The environment variable that runs one seed only.
pub(crate) const SEED_VARIABLE: &str = "LARDER_SEED";
/// The environment variable that says how many seeds to run.
const SEEDS_VARIABLE: &str = "LARDER_SEEDS";

/// Where the listing is.
const LISTING: &str = "/model/larder.json";

/// The seeds `0..count`, as many as [`SEEDS_VARIABLE`] says, or the one in [`SEED_VARIABLE`].
pub(crate) fn seeds(count: u64) -> Vec<u64> {
    let number = |name| Some(std::env::var(name).ok()?.parse::<u64>().expect("seeds are numbers"));
    match number(SEED_VARIABLE) {
        Some(seed) => vec![seed],
        None => (0..number(SEEDS_VARIABLE).unwrap_or(count)).collect(),
    }
}

/// What is done to an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    CutByFin,
    CutByReset,
    CutAfterOneByte,
    ChunkedTooLong,
    GarbageBehind,
    LengthTooShort,
    LengthTooLong,
    NoLength,
    RangeIgnored,
    RangeShifted,
    RangeOfAnotherTotal,
    Multipart,
    Changed,
    ChangedBehindTheSameEtag,
    Gzip,
    FlippedBit,
    TooManyRequests,
    Unavailable,
    WindowUsedUp,
    ServerError,
    Denied,
    Gone,
    RedirectElsewhere,
    RedirectLoop,
    RedirectToMetadata,
    RedirectWithUser,
    RedirectToNowhere,
    StallBeforeHead,
    StallInBody,
    GarbageStatus,
    EndlessHeaders,
    BadChunk,
    NoAnswer,
}

impl Fault {
    pub(crate) const ALL: [Fault; 33] = [
        Fault::CutByFin,
        Fault::CutByReset,
        Fault::CutAfterOneByte,
        Fault::ChunkedTooLong,
        Fault::GarbageBehind,
        Fault::LengthTooShort,
        Fault::LengthTooLong,
        Fault::NoLength,
        Fault::RangeIgnored,
        Fault::RangeShifted,
        Fault::RangeOfAnotherTotal,
        Fault::Multipart,
        Fault::Changed,
        Fault::ChangedBehindTheSameEtag,
        Fault::Gzip,
        Fault::FlippedBit,
        Fault::TooManyRequests,
        Fault::Unavailable,
        Fault::WindowUsedUp,
        Fault::ServerError,
        Fault::Denied,
        Fault::Gone,
        Fault::RedirectElsewhere,
        Fault::RedirectLoop,
        Fault::RedirectToMetadata,
        Fault::RedirectWithUser,
        Fault::RedirectToNowhere,
        Fault::StallBeforeHead,
        Fault::StallInBody,
        Fault::GarbageStatus,
        Fault::EndlessHeaders,
        Fault::BadChunk,
        Fault::NoAnswer,
    ];

    /// Whether it ends a pull and hides what would have come after. [`Fault::Changed`] does too, but is the one that must
    /// be met often.
    fn ends_a_pull(self) -> bool {
        use Fault::*;
        matches!(self, Denied | Gone | RedirectToMetadata | RedirectWithUser | RedirectToNowhere | RangeOfAnotherTotal)
    }

    /// Whether only a checksum can tell.
    fn needs_checksum(self) -> bool {
        matches!(self, Fault::ChangedBehindTheSameEtag | Fault::FlippedBit)
    }
}

/// What is wrong with the listing itself, for as long as the origin does not heal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ListingFault {
    Name(&'static str),
    FileAndDirectory,
    Twice,
    TooManyFiles,
    TooLarge,
    NegativeSize,
    NotJson,
    Endless,
    BadChecksum,
    LinkToMetadata,
}

impl ListingFault {
    /// Those that cost no time; [`HostileOrigin::start`] chooses among them.
    pub(crate) const SMALL: [ListingFault; 15] = [
        ListingFault::Name("../x"),
        ListingFault::Name("/etc/passwd"),
        ListingFault::Name("a/../../b"),
        ListingFault::Name("."),
        ListingFault::Name(""),
        ListingFault::Name("a\0b"),
        ListingFault::Name("a\\..\\b"),
        ListingFault::Name("\u{1b}[2J"),
        ListingFault::FileAndDirectory,
        ListingFault::Twice,
        ListingFault::TooLarge,
        ListingFault::NegativeSize,
        ListingFault::NotJson,
        ListingFault::BadChecksum,
        ListingFault::LinkToMetadata,
    ];

    /// Those that take megabytes.
    pub(crate) const LARGE: [ListingFault; 2] = [ListingFault::TooManyFiles, ListingFault::Endless];

    /// All of them.
    pub(crate) fn all() -> impl Iterator<Item = ListingFault> {
        Self::SMALL.into_iter().chain(Self::LARGE)
    }
}

/// The origin. It runs until its runtime ends.
pub(crate) struct HostileOrigin {
    /// The directory that holds `larder.json`; ends in a slash.
    pub(crate) url: String,
    /// What the listing claims, by path.
    pub(crate) files: BTreeMap<String, Vec<u8>>,
    /// What decides everything else.
    pub(crate) seed: u64,
    state: Arc<State>,
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    checksums: bool,
    listing: Vec<u8>,
    listing_fault: Option<ListingFault>,
    /// Port of this server and of the one that redirects lead to.
    ports: [u16; 2],
    chance: Mutex<Chance>,
    asked_elsewhere: Mutex<Vec<Asked>>,
    /// Counts whatever happens here.
    activity: Arc<AtomicU64>,
}

struct Chance {
    rng: fastrand::Rng,
    plan: Plan,
    log: Vec<String>,
}

struct Plan {
    checksums: bool,
    listing_fault: Option<ListingFault>,
    /// How many of a hundred answers are wrong.
    percent: u8,
    /// Faults still to be done; `None` is no end.
    faults_left: Option<u32>,
    /// The only fault, done to ranges only.
    only: Option<Fault>,
}

impl HostileOrigin {
    /// Most faults of an origin that heals.
    pub(crate) const FAULTS_BEFORE_HEALED: u32 = 8;

    /// Starts an origin. One that `heals` behaves after [`HostileOrigin::FAULTS_BEFORE_HEALED`] faults, and has a listing
    /// without fault from the beginning.
    pub(crate) async fn start(seed: u64, heals: bool) -> HostileOrigin {
        Self::with_plan(seed, |rng| Plan {
            checksums: rng.bool(),
            listing_fault: (!heals && rng.u8(..4) == 0).then(|| rng.choice(ListingFault::SMALL).unwrap()),
            percent: rng.choice([5, 20, 50, 90]).unwrap(),
            faults_left: heals.then_some(Self::FAULTS_BEFORE_HEALED),
            only: None,
        })
        .await
    }

    /// Starts one with checksums that does `fault` to the first range that is asked for, and nothing else.
    pub(crate) async fn with_one(fault: Fault) -> HostileOrigin {
        let plan = Plan { checksums: true, listing_fault: None, percent: 100, faults_left: Some(1), only: Some(fault) };
        Self::with_plan(0, |_| plan).await
    }

    /// Starts one whose listing is wrong, and nothing else.
    pub(crate) async fn with_listing(fault: ListingFault) -> HostileOrigin {
        let plan = Plan { checksums: true, listing_fault: Some(fault), percent: 0, faults_left: None, only: None };
        Self::with_plan(0, |_| plan).await
    }

    /// Starts one that serves these files with checksums, and does nothing wrong until [`HostileOrigin::is_wrong`].
    #[allow(dead_code, reason = "tests/crash uses it")]
    pub(crate) async fn serving(seed: u64, files: BTreeMap<String, Vec<u8>>) -> HostileOrigin {
        let plan = Plan { checksums: true, listing_fault: None, percent: 0, faults_left: None, only: None };
        Self::with_files(seed, fastrand::Rng::with_seed(seed), files, plan).await
    }

    /// So many of a hundred answers are wrong from now on.
    #[allow(dead_code, reason = "tests/crash uses it")]
    pub(crate) fn is_wrong(&self, percent: u8) {
        self.state.chance.lock().unwrap().plan.percent = percent;
    }

    async fn with_plan(seed: u64, plan: impl FnOnce(&mut fastrand::Rng) -> Plan) -> HostileOrigin {
        let mut rng = fastrand::Rng::with_seed(seed);
        let files: BTreeMap<String, Vec<u8>> =
            ["config.json", "weights/one.safetensors", "weights/two.safetensors", "x"]
                .into_iter()
                .map(|path| {
                    let length = rng.usize(1..40_000);
                    (path.to_owned(), std::iter::repeat_with(|| rng.u8(..)).take(length).collect())
                })
                .collect();
        let plan = plan(&mut rng);
        Self::with_files(seed, rng, files, plan).await
    }

    async fn with_files(seed: u64, rng: fastrand::Rng, files: BTreeMap<String, Vec<u8>>, plan: Plan) -> HostileOrigin {
        let (checksums, listing_fault) = (plan.checksums, plan.listing_fault);
        let listeners =
            [TcpListener::bind("127.0.0.1:0").await.unwrap(), TcpListener::bind("127.0.0.1:0").await.unwrap()];
        let ports = [0, 1].map(|i: usize| listeners[i].local_addr().unwrap().port());
        let state = Arc::new(State {
            files: files.clone(),
            checksums,
            listing: listing(&files, checksums, listing_fault),
            listing_fault,
            ports,
            chance: Mutex::new(Chance {
                rng,
                plan,
                log: listing_fault.map(|fault| format!("listing: {fault:?}")).into_iter().collect(),
            }),
            asked_elsewhere: Mutex::default(),
            activity: Arc::default(),
        });
        for (listener, elsewhere) in listeners.into_iter().zip([false, true]) {
            let state = state.clone();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    let state = state.clone();
                    tokio::spawn(async move {
                        let mut connection = Connection::counted(stream, state.activity.clone());
                        while let Some(asked) = connection.next().await {
                            match state.serve(connection, asked, elsewhere).await {
                                Some(open) => connection = open,
                                None => return,
                            }
                        }
                    });
                }
            });
        }
        HostileOrigin { url: format!("http://127.0.0.1:{}/model/", ports[0]), files, seed, state }
    }

    /// Does `work` with waits and stalls passing at once: turns the paused clock whenever nothing happens here.
    ///
    /// Left to itself, the paused clock jumps to the next timer as soon as all tasks wait, and so also while bytes are on
    /// their way between two sockets: every answer would come too late. A blocking task keeps it from that.
    pub(crate) async fn in_no_time<T>(&self, work: impl Future<Output = T>) -> T {
        let clock = async {
            let (mut seen, mut step) = (0, Duration::ZERO);
            loop {
                let a_moment = || {
                    let (_sender, nothing) = mpsc::channel::<()>();
                    let _nothing = nothing.recv_timeout(Duration::from_millis(1));
                };
                tokio::task::spawn_blocking(a_moment).await.unwrap();
                let now = self.state.activity.load(Ordering::SeqCst);
                // Small steps first, so that a moment's delay of the machine is no stall.
                // No larger than any wait, because work on the disk is also a moment in which nothing happens here.
                let longer = (step * 2).clamp(Duration::from_millis(500), Duration::from_secs(60));
                step = if now == seen { longer } else { Duration::ZERO };
                seen = now;
                tokio::time::advance(step).await;
            }
        };
        tokio::select! {
            done = work => done,
            () = clock => unreachable!("it has no end"),
        }
    }

    /// Whether the listing has checksums. Without, a change under the same mark cannot be noticed and is not made.
    pub(crate) fn has_checksums(&self) -> bool {
        self.state.checksums
    }

    /// What is wrong with the listing.
    pub(crate) fn listing_fault(&self) -> Option<ListingFault> {
        self.state.listing_fault
    }

    /// The other version of a file, which [`Fault::Changed`] gives.
    pub(crate) fn changed(bytes: &[u8]) -> Vec<u8> {
        bytes.iter().map(|b| b ^ 0x55).collect()
    }

    /// What was done so far, one line for each request.
    pub(crate) fn log(&self) -> String {
        self.state.chance.lock().unwrap().log.join("\n")
    }

    /// Every request at the host that redirects lead to.
    pub(crate) fn asked_elsewhere(&self) -> Vec<Asked> {
        self.state.asked_elsewhere.lock().unwrap().clone()
    }

    /// How to see one seed again.
    pub(crate) fn how_to_rerun(&self, test: &str) -> String {
        format!("seed {0}; run again with {SEED_VARIABLE}={0} cargo test --test it {test}\n{1}", self.seed, self.log())
    }
}

impl State {
    fn pick(&self, asked: &Asked, elsewhere: bool) -> Option<Fault> {
        let mut chance = self.chance.lock().unwrap();
        // Nothing has a checksum of the listing.
        let is_claimed = self.checksums && asked.path != LISTING;
        let allowed = |fault: &Fault| is_claimed || !fault.needs_checksum();
        let wanted = chance.rng.u8(..100) < chance.plan.percent && !elsewhere && chance.plan.faults_left != Some(0);
        let fault = match chance.plan.only {
            Some(fault) => Some(fault).filter(|_| wanted && asked.header("range").is_some()),
            None => {
                // Those that end a pull are rarer, or few seeds would come to anything else.
                let ends = chance.rng.u8(..16) == 0;
                let fits = |fault: &Fault| wanted && allowed(fault) && (ends || !fault.ends_a_pull());
                chance.rng.choice(Fault::ALL).filter(fits)
            }
        };
        if fault.is_some()
            && let Some(left) = &mut chance.plan.faults_left
        {
            *left -= 1;
        }
        let range = asked.header("range").unwrap_or("-");
        chance.log.push(format!("{} {} {range}: {fault:?}", asked.method, asked.path));
        fault
    }

    fn random(&self, below: usize) -> usize {
        self.chance.lock().unwrap().rng.usize(..below)
    }

    /// The right answer.
    fn answer(&self, asked: &Asked, bytes: Option<&[u8]>) -> Answer {
        match bytes {
            Some(bytes) => Answer::file(asked, bytes, &format!("\"{}\"", &sha256(bytes)[..16])),
            None => Answer::new(404, &[], ""),
        }
    }

    /// Answers; gives the connection back if it can be used again.
    async fn serve(&self, mut connection: Connection, asked: Asked, elsewhere: bool) -> Option<Connection> {
        if elsewhere {
            self.asked_elsewhere.lock().unwrap().push(asked.clone());
        }
        let bytes = match asked.path.strip_prefix("/model/") {
            Some(_) if asked.path == LISTING => Some(self.listing.as_slice()),
            Some(path) => self.files.get(path).map(Vec::as_slice),
            None => None,
        };
        let right = self.answer(&asked, bytes);
        let Some(fault) = self.pick(&asked, elsewhere) else {
            return connection.answer(&asked, right).await.then_some(connection);
        };
        let head_only = asked.method == "HEAD";
        let (length, bytes) = (right.body.len(), bytes.unwrap_or_default());
        let cut = self.random(length.max(1));
        let status = |status, headers: &[(&str, &str)]| Answer::new(status, headers, "words of the server \u{1b}[31m");
        let redirect = |to: &str| Answer::new(302, &[("Location", to)], "");
        let with = |name: &str, value: &str| {
            let mut answer = right.clone();
            answer.headers.retain(|(key, _)| !key.eq_ignore_ascii_case(name));
            answer.headers.push((name.into(), value.into()));
            answer
        };
        let answer = match fault {
            // What has no body cannot break in it.
            Fault::CutByFin
            | Fault::CutByReset
            | Fault::CutAfterOneByte
            | Fault::ChunkedTooLong
            | Fault::GarbageBehind
            | Fault::LengthTooShort
            | Fault::NoLength
            | Fault::StallInBody
            | Fault::BadChunk
                if head_only =>
            {
                right
            }
            Fault::CutByFin | Fault::CutByReset | Fault::CutAfterOneByte | Fault::StallInBody => {
                let cut = if fault == Fault::CutAfterOneByte { 1.min(length) } else { cut };
                connection.write(right.head(length)).await;
                connection.write(&right.body[..cut]).await;
                match fault {
                    Fault::CutByReset => connection.reset(),
                    Fault::StallInBody => connection.stall().await,
                    _ => {}
                }
                return None;
            }
            Fault::ChunkedTooLong | Fault::BadChunk => {
                let chunked = with("Transfer-Encoding", "chunked");
                connection.write(chunked.head_without_length()).await;
                connection.write(format!("{length:x}\r\n")).await;
                connection.write(&right.body).await;
                let rest = if fault == Fault::BadChunk { "\r\nzz\r\n" } else { "\r\n4\r\nmore\r\n0\r\n\r\n" };
                connection.write(rest).await;
                return None;
            }
            Fault::GarbageBehind => {
                connection.write(right.head(length)).await;
                connection.write(&right.body).await;
                return connection.write("more than was promised").await.then_some(connection);
            }
            Fault::LengthTooShort | Fault::LengthTooLong => {
                let lie = if fault == Fault::LengthTooShort { cut } else { length + 1 + cut };
                connection.write(right.head(lie)).await;
                if !head_only {
                    connection.write(&right.body).await;
                }
                return None;
            }
            Fault::NoLength => {
                connection.write(with("Connection", "close").head_without_length()).await;
                connection.write(&right.body).await;
                return None;
            }
            Fault::RangeIgnored => {
                let whole = Asked { headers: Vec::new(), ..asked.clone() };
                self.answer(&whole, Some(bytes))
            }
            Fault::RangeShifted => with("Content-Range", &format!("bytes 1-{length}/{}", bytes.len() + 1)),
            Fault::RangeOfAnotherTotal => {
                let first = asked.range(bytes.len()).ok().flatten().map_or(0, |range| range.start);
                let range = format!("bytes {first}-{}/{}", first + length.max(1) - 1, bytes.len() + 1);
                with("Content-Range", &range)
            }
            Fault::Multipart => with("Content-Type", "multipart/byteranges; boundary=x"),
            Fault::Changed => {
                // By a server that does not know If-Match.
                let mut asked = asked.clone();
                asked.headers.retain(|(name, _)| name != "if-match");
                self.answer(&asked, Some(&HostileOrigin::changed(bytes)))
            }
            Fault::ChangedBehindTheSameEtag => Answer { body: HostileOrigin::changed(&right.body), ..right },
            Fault::Gzip => with("Content-Encoding", "gzip"),
            Fault::FlippedBit => {
                let mut flipped = right;
                if let Some(byte) = flipped.body.get_mut(cut) {
                    *byte ^= 1 << (cut % 8);
                }
                flipped
            }
            Fault::TooManyRequests | Fault::Unavailable => {
                let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(90));
                let forms = ["1", "120", "0", "-5", "1e12", "99999999999999999999", "soon", "", &date, "NaN", "inf"];
                let form = forms[self.random(forms.len())];
                let number = if fault == Fault::Unavailable { 503 } else { 429 };
                status(number, &[("Retry-After", form)])
            }
            Fault::WindowUsedUp => {
                let forms = [
                    [("RateLimit", "\"default\";r=0;t=55"), ("RateLimit-Policy", "\"default\";q=100;w=300")],
                    [("RateLimit-Remaining", "0"), ("RateLimit-Reset", "7")],
                    [("RateLimit", "limit=10, remaining=0, reset=9"), ("RateLimit-Policy", "10;w=60")],
                    [("RateLimit", "\"a\";r=0;t=99999999999,;;==,\"b\""), ("RateLimit-Reset", "x")],
                ];
                let mut answer = if self.random(2) == 0 { right } else { status(429, &[]) };
                let form = forms[self.random(forms.len())].map(|(key, value)| (key.to_owned(), value.to_owned()));
                answer.headers.extend(form);
                answer
            }
            Fault::ServerError => status([500, 502, 504, 599][self.random(4)], &[]),
            Fault::Denied => status([401, 403][self.random(2)], &[]),
            Fault::Gone => status([404, 410][self.random(2)], &[]),
            Fault::RedirectElsewhere => redirect(&format!("http://127.0.0.1:{}{}", self.ports[1], asked.path)),
            Fault::RedirectLoop => redirect(&asked.path),
            Fault::RedirectToMetadata => {
                let forms =
                    ["169.254.169.254", "[fd00:ec2::254]", "0xa9fea9fe", "[::ffff:169.254.169.254]", "[fe80::1]"];
                redirect(&format!("http://{}/latest/meta-data/", forms[self.random(forms.len())]))
            }
            Fault::RedirectWithUser => redirect(&format!("http://user@127.0.0.1:{}{}", self.ports[1], asked.path)),
            Fault::RedirectToNowhere => {
                let long = format!("/{}", "x".repeat(20_000));
                let forms = ["ftp://127.0.0.1/x", "http://", "file:///etc/passwd", "//", &long, "\u{7f}"];
                redirect(forms[self.random(forms.len())])
            }
            Fault::StallBeforeHead => {
                connection.stall().await;
                return None;
            }
            Fault::GarbageStatus => {
                connection.write("HTTP/9.9 maybe\r\n\r\n").await;
                return None;
            }
            Fault::EndlessHeaders => {
                connection.write("HTTP/1.1 200 OK\r\n").await;
                let header = format!("X-Endless: {}\r\n", "x".repeat(4096));
                while connection.write(&header).await {}
                return None;
            }
            Fault::NoAnswer => return None,
        };
        connection.answer(&asked, answer).await.then_some(connection)
    }
}

fn listing(right: &BTreeMap<String, Vec<u8>>, checksums: bool, fault: Option<ListingFault>) -> Vec<u8> {
    let entry = |path: &str, size: serde_json::Value| {
        let mut entry = serde_json::json!({"path": path, "size": size});
        if checksums {
            entry["sha256"] = sha256(right.get(path).map_or(b"", Vec::as_slice)).into();
        }
        entry
    };
    let mut files: Vec<_> = right.iter().map(|(path, bytes)| entry(path, bytes.len().into())).collect();
    match fault {
        None => {}
        Some(ListingFault::Name(name)) => files.push(entry(name, 1.into())),
        Some(ListingFault::FileAndDirectory) => files.push(entry("config.json/child", 1.into())),
        Some(ListingFault::Twice) => files.push(entry("config.json", 1.into())),
        Some(ListingFault::TooManyFiles) => {
            let files: Vec<_> = (0..=100_000).map(|i| format!(r#"{{"path":"f{i}","size":1}}"#)).collect();
            return format!(r#"{{"files":[{}]}}"#, files.join(",")).into_bytes();
        }
        Some(ListingFault::TooLarge) => files.extend(["y", "z"].map(|path| entry(path, (u64::MAX - 1).into()))),
        Some(ListingFault::NegativeSize) => files.push(entry("y", (-1).into())),
        Some(ListingFault::NotJson) => return b"<html>sign in</html>".into(),
        // Longer than what is read of a listing.
        Some(ListingFault::Endless) => return vec![b'['; (32 << 20) + 1],
        Some(ListingFault::BadChecksum) => {
            files.push(serde_json::json!({"path": "y", "size": 1, "sha256": "zz"}));
        }
        Some(ListingFault::LinkToMetadata) => {
            files.push(serde_json::json!({"path": "y", "size": 1, "url": "http://169.254.169.254/latest"}));
        }
    }
    serde_json::json!({ "files": files }).to_string().into_bytes()
}

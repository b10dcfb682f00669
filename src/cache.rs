//! The verbs, and the only place that decides: pull? wait? evict? refuse?
//!
//! Every door (HTTP, the command line) is a translation to the methods of [`Cache`]. Methods that are not `async` and
//! touch the disk say so: a door calls them on a blocking thread.

mod caching;
mod clock;
mod connections;
mod demand;
mod details;
mod evict;
mod job;
mod lease;
mod ledger;
mod limits;
mod manifests;
mod memory;
mod models;
mod open;
mod pace;
mod piece;
mod pin;
mod proof;
mod pull;
mod recover;
mod scrub;
mod silence;
mod starts;
mod throughput;
mod traced;
mod transfer;
mod warm;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::fault::{Code, Diagnose, Problem};
use crate::index::Index;
use crate::model::{Bytes, HolderError, ReferenceError};
use crate::source::{self, Sources};
use crate::store::{self, Volume};
use crate::telemetry::metrics::Gauges;
use crate::telemetry::{Metrics, Traces};

pub use caching::PageCache;
use demand::Demand;
pub use evict::Announcer;
use evict::Evictions;
pub use job::{JobHandle, JobStatus};
pub use lease::{Lease, PodDirectory};
use ledger::Ledger;
use limits::Room;
pub use limits::{Limits, MinFree};
use manifests::Manifests;
pub use open::OpenModel;
use proof::Proofs;
pub use pull::PullHandle;
use pull::Pulls;
pub use scrub::ScrubHandle;
use scrub::Scrubs;
use silence::{Asking, Turnstile};
use starts::Starts;
use transfer::Budget;
pub use warm::WarmHandle;
use warm::Warms;

/// Where kubelet keeps what it watches the free space of.
pub const KUBELET_DIRECTORY: &str = "/var/lib/kubelet";

/// What the cache is configured with.
#[derive(Debug, Clone)]
pub struct CacheConfig {
    /// The volume's directory.
    pub root: PathBuf,
    /// How much room models may take.
    pub limits: Limits,
    /// Whether this is a pod. It cannot see kubelet's directory, which may be on the same file system.
    pub in_kubernetes: bool,
    /// Memory for bytes in flight, all pulls together.
    pub pull_memory: Bytes,
    /// Most range requests under way, all pulls together.
    pub pull_connections: usize,
    /// Bytes a second of all pulls together that nobody waits for, if that is limited.
    pub background_rate: Option<Bytes>,
    /// What becomes of the page cache when a pull writes.
    pub page_cache: PageCache,
    /// Longest time without a byte, before a stream is dropped and resumed.
    pub stall_timeout: Duration,
    /// Failures of one range in a row, without a byte of progress, before a pull fails.
    pub retry_attempts: u32,
    /// Whether an open of a version that is not resident starts to warm it.
    pub warm_on_open: bool,
    /// Whether each model has a metric of its own.
    pub metrics_by_model: bool,
}

/// The models of one volume. Cheap to clone.
#[derive(Clone)]
pub struct Cache(Arc<Inner>);

struct Inner {
    config: CacheConfig,
    /// Those of the configuration are where it began.
    limits: Mutex<Limits>,
    volume: Volume,
    /// Without an index and sources the cache is a view: it lists and opens, and refuses to change anything.
    hands: Option<Hands>,
    metrics: Arc<Metrics>,
    /// Without a collector there are none.
    traces: OnceLock<Traces>,
    ledger: Ledger,
    /// Without one nobody knows which pods are gone.
    pods: OnceLock<Arc<dyn PodDirectory>>,
    evictions: Evictions,
    starts: Starts,
    /// When this process began with the volume; milliseconds since the Unix epoch.
    began_at_ms: u64,
    pulls: Mutex<Pulls>,
    manifests: Manifests,
    warms: Warms,
    scrubs: Scrubs,
    proofs: Proofs,
    budget: Arc<Budget>,
    demand: Arc<Demand>,
    /// Serialises giving and taking names: publishing a model, removing one. Taken on blocking threads only.
    naming: Mutex<()>,
    /// Serialises leases and pins that are written down, so that the books and the disk change in the same order. Taken
    /// on blocking threads only, and never together with `naming`.
    noting: Turnstile,
    asking: Asking,
    /// Read while a blob is committed, written while blobs are unlinked: a blob that has just been committed is in the
    /// ledger before anybody can decide that nothing uses it.
    commits: Arc<RwLock<()>>,
    tasks: TaskTracker,
    stop: CancellationToken,
}

struct Hands {
    index: Index,
    sources: Sources,
}

/// Why the cache did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The reference cannot be read.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The source did not give what was asked for.
    #[error(transparent)]
    Source(#[from] source::Error),
    /// The disk did not take or give what was asked for.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// Larger than the quota.
    #[error("cannot pull `{reference}`: it has {size}, more than the quota of {quota}")]
    NeverFits {
        /// What was asked for.
        reference: String,
        /// Its size.
        size: Bytes,
        /// The quota.
        quota: Bytes,
    },
    /// No room now.
    #[error("cannot {what}: it needs {needs}, {} can give {free} (models use {used}, other pulls were promised {reserved}); {outlook}",
        match quota { Some(quota) => format!("the quota of {quota}"), None => format!("the disk of `{volume}`") })]
    NoRoom {
        /// What was asked for, such as "pull `hf://o/n`".
        what: String,
        /// Bytes of the disk that it takes and are not here yet.
        needs: Bytes,
        /// What could be written.
        free: Bytes,
        /// What models use.
        used: Bytes,
        /// What other pulls were promised.
        reserved: Bytes,
        /// The quota, if it is what is short; otherwise the disk is.
        quota: Option<Bytes>,
        /// The volume's directory.
        volume: String,
        /// What could be evicted, and who keeps the rest.
        outlook: String,
    },
    /// Nothing is evicted.
    #[error("cannot evict: who uses what cannot be known, {why}")]
    HoldersUnknowable {
        /// What was found.
        why: String,
    },
    /// Not here.
    #[error("cannot open `{reference}`: it is not local{}", evicted.as_ref().map(|why| format!(", {why}")).unwrap_or_default())]
    NotLocal {
        /// What was asked for.
        reference: String,
        /// When and why it was evicted, if it was.
        evicted: Option<String>,
    },
    /// The reference may be here in other versions.
    #[error("cannot open `{reference}`: its version `{version}` is not local")]
    VersionNotLocal {
        /// What was asked for.
        reference: String,
        /// The version.
        version: String,
    },
    /// The model is here, and has no such file.
    #[error("cannot open a file of `{reference}`: it has no file {file:?}")]
    NoSuchFile {
        /// What was asked for.
        reference: String,
        /// The file.
        file: String,
    },
    /// Not here, so not to be removed.
    #[error("cannot remove `{reference}`: it is not local")]
    NothingToRemove {
        /// What was asked for.
        reference: String,
    },
    /// Somebody uses it.
    #[error("cannot remove `{reference}`: it is held by {}", shortened(holders))]
    InUse {
        /// What was asked for.
        reference: String,
        /// Who, in words; at least one.
        holders: Vec<String>,
    },
    /// A lease or a pin cannot be read, so nobody knows what it keeps.
    #[error("cannot remove `{reference}`: who uses it cannot be known, {why}")]
    HoldersUnknown {
        /// What was asked for.
        reference: String,
        /// What was found.
        why: String,
    },
    /// A lease cannot be for this holder.
    #[error(transparent)]
    Holder(#[from] HolderError),
    /// Nobody could tell when the lease ends.
    #[error("cannot take a lease: {found}")]
    LeaseTerms {
        /// What is wrong with the request.
        found: &'static str,
    },
    /// No such lease.
    #[error("cannot release the lease `{id}`: there is none with this id")]
    LeaseNotFound {
        /// What was asked for.
        id: String,
    },
    /// No lease of this pod is known, not even one that has ended.
    #[error("cannot say why the pod `{pod}` was slow: it leases no model here, and no lease of it is remembered")]
    PodNotKnown {
        /// What was asked for.
        pod: String,
    },
    /// It ends with its connection, and not by request.
    #[error("cannot release the lease `{id}`: it is the connection of {process}")]
    LeaseOfConnection {
        /// What was asked for.
        id: String,
        /// What is at the other end.
        process: String,
    },
    /// A limit of ours.
    #[error("cannot take a lease: {most} are held already")]
    TooManyLeases {
        /// The limit.
        most: usize,
    },
    /// A limit of ours.
    #[error("cannot pin: {most} references are pinned already")]
    TooManyPins {
        /// The limit.
        most: usize,
    },
    /// Not pinned, so not to be unpinned.
    #[error("cannot unpin `{reference}`: it is not pinned")]
    NotPinned {
        /// What was asked for.
        reference: String,
    },
    /// The configuration lists it.
    #[error("cannot unpin `{reference}`: the configuration lists it")]
    PinnedByConfig {
        /// What was asked for.
        reference: String,
    },
    /// On its way.
    #[error("cannot open `{reference}`: it is being pulled, {percent} % is here{}",
        eta.map(|eta| format!(", {} to go", humantime::format_duration(eta))).unwrap_or_default())]
    NotReady {
        /// What was asked for.
        reference: String,
        /// How much is here.
        percent: u8,
        /// How long it will take, if that can be told.
        eta: Option<Duration>,
    },
    /// Its bytes were found wrong; it is pulled again.
    #[error("cannot open `{what}`: the bytes of `{file}` on this disk were wrong or missing; it is being pulled again, {percent} % is here{}",
        eta.map(|eta| format!(", {} to go", humantime::format_duration(eta))).unwrap_or_default())]
    Spoilt {
        /// What was asked for.
        what: String,
        /// The file.
        file: String,
        /// How much of the model is here.
        percent: u8,
        /// How long it will take, if that can be told.
        eta: Option<Duration>,
    },
    /// A limit of ours.
    #[error("cannot open `{file}`: it was touched and must be hashed again, and many others are being hashed")]
    BeingHashed {
        /// The file.
        file: String,
    },
    /// No such pull.
    #[error("cannot find the pull `{id}`: it ended long ago, or never was")]
    PullNotFound {
        /// What was asked for.
        id: String,
    },
    /// No such pass.
    #[error("cannot find the scrub `{id}`: it ended long ago, or never was")]
    ScrubNotFound {
        /// What was asked for.
        id: String,
    },
    /// No such warm-up.
    #[error("cannot find the warm-up `{id}`: it ended long ago, or never was")]
    WarmNotFound {
        /// What was asked for.
        id: String,
    },
    /// A limit of ours.
    #[error("cannot warm: {most} warm-ups are under way already")]
    TooManyWarms {
        /// The limit.
        most: usize,
    },
    /// Taken back by request.
    #[error("the pull was cancelled")]
    Cancelled,
    /// A limit of ours.
    #[error("cannot pull: {most} pulls are under way already")]
    TooManyPulls {
        /// The limit.
        most: usize,
    },
    /// Under way when we were told to stop.
    #[error("cannot finish the pull of `{reference}`: larder is shutting down")]
    Paused {
        /// What was asked for.
        reference: String,
    },
    /// Shutting down.
    #[error("cannot pull: larder is shutting down")]
    Draining,
    /// Shutting down.
    #[error("cannot warm: larder is shutting down")]
    DrainingWarms,
    /// This process only looks.
    #[error("cannot change the volume `{volume}`: another process holds it")]
    View {
        /// The volume's directory.
        volume: String,
    },
}

impl Diagnose for Error {
    fn code(&self) -> Code {
        match self {
            Error::Reference(e) => e.code(),
            Error::Source(e) => e.code(),
            Error::Store(e) => e.code(),
            Error::NeverFits { .. } => Code::NeverFits,
            Error::NoRoom { .. } => Code::VolumeFull,
            Error::NotLocal { .. } | Error::VersionNotLocal { .. } | Error::NothingToRemove { .. } => Code::NotLocal,
            Error::NoSuchFile { .. } => Code::FileNotFound,
            Error::NotReady { .. } | Error::Spoilt { .. } | Error::BeingHashed { .. } => Code::NotReady,
            Error::InUse { .. }
            | Error::HoldersUnknown { .. }
            | Error::HoldersUnknowable { .. }
            | Error::LeaseOfConnection { .. } => Code::ModelInUse,
            Error::Holder(_) | Error::LeaseTerms { .. } => Code::BadRequest,
            Error::LeaseNotFound { .. } | Error::PodNotKnown { .. } => Code::LeaseNotFound,
            Error::TooManyLeases { .. } | Error::TooManyPins { .. } | Error::TooManyWarms { .. } => {
                Code::TooManyHolders
            }
            Error::NotPinned { .. } => Code::NotPinned,
            Error::PinnedByConfig { .. } => Code::PolicyDenied,
            Error::PullNotFound { .. } => Code::PullNotFound,
            Error::ScrubNotFound { .. } => Code::ScrubNotFound,
            Error::WarmNotFound { .. } => Code::WarmNotFound,
            Error::Cancelled => Code::PullCancelled,
            Error::TooManyPulls { .. } => Code::TooManyPulls,
            Error::Paused { .. } | Error::Draining | Error::DrainingWarms => Code::Draining,
            Error::View { .. } => Code::VolumeLocked,
        }
    }

    fn action(&self) -> String {
        match self {
            Error::Reference(e) => e.action(),
            Error::Source(e) => e.action(),
            Error::Store(e) => e.action(),
            Error::NeverFits { .. } => "raise `volume.quota`, or pull fewer files with `--include`".into(),
            Error::NoRoom { quota: Some(_), .. } => {
                "end what keeps a model (`larder evict --need 0 --dry-run` shows who does), raise `volume.quota`, or pull fewer \
                 files with `--include`"
                    .into()
            }
            Error::NoRoom { quota: None, .. } => {
                "end what keeps a model (`larder evict --need 0 --dry-run` shows who does), free the disk or lower \
                 `volume.min_free`, or pull fewer files with `--include`"
                    .into()
            }
            Error::NotLocal { reference, .. } => format!("pull it: `larder pull {reference}`, or open it with `--wait`"),
            Error::VersionNotLocal { .. } => "open it without a version, or see what is local with `larder list`".into(),
            Error::NoSuchFile { .. } => "take a name of the model's files (`GET /v1/models/{name}`)".into(),
            Error::NothingToRemove { .. } => "see what is local with `larder list`".into(),
            Error::NotReady { .. } => "wait for it with `--wait`".into(),
            Error::Spoilt { .. } => {
                "wait for it with `--wait`; who changed the bytes? Pods must mount the volume with `readOnly: true` \
                 (docs/security.md)"
                    .into()
            }
            Error::BeingHashed { .. } => "ask again in a second".into(),
            Error::InUse { .. } => {
                "end what uses it; or `larder release` the lease, `larder unpin` the reference (`larder leases`, `larder pins`)"
                    .into()
            }
            Error::HoldersUnknowable { .. } => {
                "see `larder doctor` and the log; until then models go by `larder remove` alone".into()
            }
            Error::HoldersUnknown { .. } => {
                "look at that file; stop larder, move it out of the volume, start larder".into()
            }
            Error::Holder(_) => "send the values of the downward API, or a name of those characters".into(),
            Error::LeaseTerms { .. } => {
                "name a pod (`uid`, `namespace`, `name`), or a `holder`, or how long it lasts (`ttl_seconds`)".into()
            }
            Error::LeaseNotFound { .. } => "see the leases with `larder leases`".into(),
            Error::PodNotKnown { pod } => {
                format!(
                    "see who leases what with `larder leases` on the pod's node; a pod that still waits for its model has no \
                     lease yet: `larder pulls`; if you mean a model of the Hub: `larder why hf://{pod}`"
                )
            }
            Error::LeaseOfConnection { .. } => "end that process, or have it close the model".into(),
            Error::TooManyLeases { .. } => "release some that are not needed (`larder leases`, `larder release`)".into(),
            Error::TooManyPins { .. } => "unpin some (`larder pins`, `larder unpin`)".into(),
            Error::NotPinned { .. } => "see what is pinned with `larder pins`".into(),
            Error::PinnedByConfig { .. } => "take it out of `pull.pinned`: a running daemon notices".into(),
            Error::PullNotFound { .. } => "list the pulls with `larder pulls`".into(),
            Error::ScrubNotFound { .. } => "see those there are with `GET /v1/scrubs`".into(),
            Error::WarmNotFound { .. } => "warm the model again: what is resident is not read twice".into(),
            Error::TooManyWarms { .. } => "ask again when one has ended (`GET /v1/warms`)".into(),
            Error::Cancelled => "pull again: it goes on where it stopped".into(),
            Error::TooManyPulls { .. } => "ask again when one has ended (`larder pulls`)".into(),
            Error::Paused { .. } => "nothing: the daemon goes on with it when it has started again".into(),
            Error::Draining | Error::DrainingWarms => "ask again when it has started again".into(),
            Error::View { .. } => "wait until it ends, or talk to it through its socket (`LARDER_SOCKET`)".into(),
        }
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Error::Source(e) => e.retry_after(),
            Error::Store(e) => e.retry_after(),
            Error::BeingHashed { .. } => Some(Duration::from_secs(1)),
            Error::NotReady { eta, .. } | Error::Spoilt { eta, .. } => {
                Some(eta.unwrap_or(Duration::from_secs(5)).max(Duration::from_secs(1)))
            }
            Error::InUse { .. } | Error::TooManyLeases { .. } => Some(Duration::from_secs(60)),
            Error::TooManyPulls { .. }
            | Error::TooManyWarms { .. }
            | Error::Paused { .. }
            | Error::Draining
            | Error::DrainingWarms => Some(Duration::from_secs(5)),
            _ => None,
        }
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Problem {
        Problem::of(&error)
    }
}

impl Cache {
    /// Why the volume takes no writes, if it does not.
    pub fn read_only_because(&self) -> Option<String> {
        self.0.volume.read_only_because()
    }

    /// The directory readers mount.
    pub fn public(&self) -> PathBuf {
        self.0.volume.public()
    }

    /// What `/metrics` reads when it is scraped. Asks the file system, and from time to time opens every blob; blocking.
    pub fn gauges(&self) -> Gauges {
        let totals = self.0.ledger.totals();
        let (residency, room) = (self.residency(), self.room());
        Gauges {
            models: totals.models,
            blob_bytes: totals.taken.blob_bytes,
            deleted_open_bytes: totals.taken.going_bytes,
            reserved_bytes: totals.taken.reserved_bytes,
            quota_bytes: room.as_ref().ok().and_then(|room| room.quota).map(|quota| quota.0),
            free_bytes: room.as_ref().map_or(0, |room| room.free_bytes),
            min_free_bytes: room.as_ref().map_or(0, |room| room.min_free_bytes),
            holders_unknown: self.why_holders_are_unknown().is_some(),
            pods_unknown: self.pods().map(|pods| pods.trouble().is_some()),
            pulls_active: self.0.pulls.lock().expect("no panic while the pulls are held").active() as u64,
            leases: self.0.ledger.lease_counts(),
            volume_read_only: self.read_only_because().is_some(),
            resident_bytes: residency.bytes,
            resident_models: residency.models,
        }
    }

    /// Writes what is only in memory (when models were last opened, and what is known of blobs). Blocking.
    pub fn flush(&self) {
        self.save_stamps();
        if let Some(hands) = &self.0.hands
            && let Err(error) = hands.index.flush()
        {
            tracing::warn!(%error, "the index could not be flushed; recency may be lost, and blobs hashed again");
        }
    }

    /// Pauses every pull (its bytes stay, and it is resumed at the next start) and stops every warm-up, waits for that at
    /// most `deadline`, and flushes.
    pub async fn drain(&self, deadline: Duration) {
        self.0.stop.cancel();
        self.0.tasks.close();
        if tokio::time::timeout(deadline, self.0.tasks.wait()).await.is_err() {
            tracing::warn!(
                seconds = deadline.as_secs(),
                "some pulls or warm-ups did not stop in time; pulls are resumed all the same"
            );
        }
        let cache = self.clone();
        if tokio::task::spawn_blocking(move || cache.flush()).await.is_err() {
            tracing::warn!("the index could not be flushed; recency may be lost, and blobs hashed again");
        }
    }

    fn hands(&self) -> Result<&Hands, Error> {
        let volume = || Error::View { volume: self.0.config.root.display().to_string() };
        self.0.hands.as_ref().ok_or_else(volume)
    }

    fn room(&self) -> Result<Room, Error> {
        Ok(self.limits().on(self.0.volume.space()?, self.is_beside_kubelet()))
    }

    fn limits(&self) -> Limits {
        *self.0.limits.lock().expect("no panic while the limits are held")
    }

    /// What models may take from now on. What is over it goes at the next [`Cache::keep_room`].
    pub fn set_limits(&self, limits: Limits) {
        *self.0.limits.lock().expect("no panic while the limits are held") = limits;
    }

    fn is_beside_kubelet(&self) -> bool {
        self.0.config.in_kubernetes || self.0.volume.shares_its_disk_with(Path::new(KUBELET_DIRECTORY))
    }
}

/// Milliseconds since the Unix epoch. For people to read; never compared to decide anything.
fn now_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The first few, and how many more there are.
fn shortened(names: &[String]) -> String {
    const SHOWN: usize = 5;
    let mut text = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}

/// RFC 3339, to the second.
fn rfc3339(at_ms: u64) -> String {
    // The formatter panics beyond the year 9999.
    let at = Duration::from_millis(at_ms.min(253_402_300_799_000));
    humantime::format_rfc3339_seconds(UNIX_EPOCH + at).to_string()
}

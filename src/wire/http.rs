//! Bodies of the HTTP API. One place, so that the server, the client and the OpenAPI document cannot disagree.

mod starts;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::fault::{Code, Problem};
pub use starts::{
    Absence, AbsentBecause, ProofTime, PullTimeline, StageSpan, Start, StartLease, StartList, StartState,
};

/// Asks for a model to be made local. The same body joins the pull that is already under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    /// What to pull: `hf://org/name@revision`, `s3://bucket/prefix`, …
    #[schema(example = "hf://Qwen/Qwen3-0.6B@main")]
    pub reference: String,
    /// Patterns of files to take; all files if there is none.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// Patterns of files to leave.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Pin the reference too: what it means is kept until it is unpinned.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub pin: bool,
    /// Bring the model into the page cache when it is ready.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub warm: bool,
}

impl PullRequest {
    /// A pull of all that the reference says, and nothing besides.
    pub fn of(reference: impl ToString) -> PullRequest {
        PullRequest {
            reference: reference.to_string(),
            include: Vec::new(),
            exclude: Vec::new(),
            pin: false,
            warm: false,
        }
    }
}

/// Where a pull stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// The source is asked which version and which files the reference means.
    Resolving,
    /// Bytes are on their way.
    Fetching,
    /// Every byte is here; the snapshot is being laid out.
    Publishing,
    /// The model is local and whole.
    Ready,
    /// It ended with an error; `error` says which.
    Failed,
    /// Somebody took it back.
    Cancelled,
}

impl Phase {
    /// Whether nothing will happen any more.
    pub fn is_final(self) -> bool {
        matches!(self, Phase::Ready | Phase::Failed | Phase::Cancelled)
    }

    /// The phase as it is printed.
    pub fn text(self) -> &'static str {
        match self {
            Phase::Resolving => "resolving",
            Phase::Fetching => "fetching",
            Phase::Publishing => "publishing",
            Phase::Ready => "ready",
            Phase::Failed => "failed",
            Phase::Cancelled => "cancelled",
        }
    }
}

/// A pull, as it stands now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PullStatus {
    /// Names the pull until the daemon ends.
    pub id: String,
    /// What is pulled, in canonical form.
    pub reference: String,
    /// Where it stands.
    pub phase: Phase,
    /// The version the source gave, once it is resolved.
    pub version: Option<String>,
    /// Files that are whole.
    pub files_done: u64,
    /// Files in all; 0 until resolved.
    pub files_total: u64,
    /// Bytes that are on this disk: fetched, resumed, or here before.
    pub bytes_done: u64,
    /// Bytes in all; 0 until resolved.
    pub bytes_total: u64,
    /// Bytes that came from the source in this pull.
    pub bytes_fetched: u64,
    /// `bytes_done` of `bytes_total`, 0 to 100, rounded down; 100 only when it is ready.
    pub percent: u8,
    /// Bytes a second from the source, over the last seconds.
    pub bytes_per_second: u64,
    /// Seconds to go at that rate, if it can be told.
    pub eta_seconds: Option<u64>,
    /// A file that is being fetched now.
    pub file: Option<String>,
    /// Why it waits, when it waits: the last retryable error and when the next attempt is made.
    pub waiting: Option<String>,
    /// The model, when it is ready.
    pub model: Option<String>,
    /// The directory to read, when it is ready.
    pub path: Option<String>,
    /// What went wrong, when it failed.
    pub error: Option<ProblemBody>,
    /// RFC 3339.
    pub started_at: String,
    /// RFC 3339; when it ended.
    pub ended_at: Option<String>,
    /// How many asked for it.
    pub asked: u64,
}

impl PullStatus {
    /// A pull that somebody has just asked for.
    pub fn started(id: &str, reference: &str, started_at: String) -> PullStatus {
        PullStatus {
            id: id.to_owned(),
            reference: reference.to_owned(),
            phase: Phase::Resolving,
            version: None,
            files_done: 0,
            files_total: 0,
            bytes_done: 0,
            bytes_total: 0,
            bytes_fetched: 0,
            percent: 0,
            bytes_per_second: 0,
            eta_seconds: None,
            file: None,
            waiting: None,
            model: None,
            path: None,
            error: None,
            started_at,
            ended_at: None,
            asked: 1,
        }
    }
}

/// All pulls the daemon remembers, newest first.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PullList {
    /// The pulls.
    pub pulls: Vec<PullStatus>,
}

/// Asks for a model that is local to be brought into the page cache. The same body joins the warm-up that is under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct WarmRequest {
    /// What to warm.
    #[schema(example = "hf://Qwen/Qwen3-0.6B@main")]
    pub reference: String,
    /// Patterns of files, as in the pull.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// Patterns of files, as in the pull.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
}

impl WarmRequest {
    /// A warm-up of what the reference says.
    pub fn of(reference: impl ToString) -> WarmRequest {
        WarmRequest { reference: reference.to_string(), include: Vec::new(), exclude: Vec::new() }
    }
}

/// Where a warm-up stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum WarmPhase {
    /// Another one reads: one does at a time.
    Queued,
    /// What is not resident is read.
    Reading,
    /// The model is resident: the kernel says so of 99 % of it or more.
    Warm,
    /// It ended, and not all of the model is known to be resident; `why` says the reason.
    Stopped,
    /// It ended with an error; `error` says which.
    Failed,
    /// Somebody took it back, or the daemon ended.
    Cancelled,
}

impl WarmPhase {
    /// Whether nothing will happen any more.
    pub fn is_final(self) -> bool {
        !matches!(self, WarmPhase::Queued | WarmPhase::Reading)
    }

    /// The phase as it is printed.
    pub fn text(self) -> &'static str {
        match self {
            WarmPhase::Queued => "queued",
            WarmPhase::Reading => "reading",
            WarmPhase::Warm => "warm",
            WarmPhase::Stopped => "stopped",
            WarmPhase::Failed => "failed",
            WarmPhase::Cancelled => "cancelled",
        }
    }
}

/// A warm-up, as it stands now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct WarmStatus {
    /// Names the warm-up until the daemon ends.
    pub id: String,
    /// The id of the version.
    pub model: String,
    /// What is warmed, in canonical form.
    pub reference: String,
    /// Where it stands.
    pub phase: WarmPhase,
    /// Bytes of the model, a file that stands twice counted once; 0 until it reads.
    pub bytes_total: u64,
    /// Bytes that were found resident, or have been read.
    pub bytes_done: u64,
    /// Bytes that have been read.
    pub bytes_read: u64,
    /// Bytes that were resident before, if the kernel tells.
    pub resident_bytes_before: Option<u64>,
    /// Bytes that are resident, as the kernel said last: before the first byte was read, and after the last.
    pub resident_bytes: Option<u64>,
    /// While it reads, `bytes_done` of `bytes_total`, 99 at most. When it has ended, `resident_bytes` of `bytes_total`, if
    /// the kernel tells. Rounded down.
    pub percent: Option<u8>,
    /// Bytes a second, over all of the reading.
    pub bytes_per_second: u64,
    /// Why not all of it will be, or is, resident.
    pub why: Option<String>,
    /// What went wrong, when it failed.
    pub error: Option<ProblemBody>,
    /// RFC 3339; when it was asked for.
    pub started_at: String,
    /// RFC 3339; when it ended.
    pub ended_at: Option<String>,
}

impl WarmStatus {
    /// A warm-up that somebody has just asked for.
    pub fn queued(id: &str, model: &str, reference: &str, started_at: String) -> WarmStatus {
        WarmStatus {
            id: id.to_owned(),
            model: model.to_owned(),
            reference: reference.to_owned(),
            phase: WarmPhase::Queued,
            bytes_total: 0,
            bytes_done: 0,
            bytes_read: 0,
            resident_bytes_before: None,
            resident_bytes: None,
            percent: None,
            bytes_per_second: 0,
            why: None,
            error: None,
            started_at,
            ended_at: None,
        }
    }
}

/// Asks for all blobs to be read from the disk and hashed again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ScrubRequest {
    /// Bytes a second; as fast as the disk without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_per_second: Option<u64>,
}

/// Where a scrub stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ScrubPhase {
    /// Blobs are read and hashed.
    Reading,
    /// Every blob was looked at.
    Done,
    /// Somebody took it back, or the daemon ended.
    Cancelled,
    /// It ended with an error; `error` says which.
    Failed,
}

impl ScrubPhase {
    /// Whether nothing will happen any more.
    pub fn is_final(self) -> bool {
        self != ScrubPhase::Reading
    }

    /// The phase as it is printed.
    pub fn text(self) -> &'static str {
        match self {
            ScrubPhase::Reading => "reading",
            ScrubPhase::Done => "done",
            ScrubPhase::Cancelled => "cancelled",
            ScrubPhase::Failed => "failed",
        }
    }
}

/// What is wrong with a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Found {
    /// Its bytes are not what its name says. It is in quarantine.
    Wrong,
    /// It is gone.
    Missing,
    /// The disk does not give its bytes. It is in quarantine.
    Unreadable,
}

impl Found {
    /// As it is printed.
    pub fn text(self) -> &'static str {
        match self {
            Found::Wrong => "wrong",
            Found::Missing => "missing",
            Found::Unreadable => "unreadable",
        }
    }
}

/// A blob that is not right, and a file it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ScrubFinding {
    /// `blake3:…`
    pub blob: String,
    /// What is wrong with it.
    pub found: Found,
    /// The model that lists it, if one does. It is pulled again.
    pub reference: Option<String>,
    /// The file of the model.
    pub file: Option<String>,
}

/// A scrub, as it stands now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ScrubStatus {
    /// Names the scrub until the daemon ends.
    pub id: String,
    /// Where it stands.
    pub phase: ScrubPhase,
    /// Whether the daemon began it by itself.
    pub in_background: bool,
    /// Bytes a second at most, if that is bounded.
    pub rate_bytes_per_second: Option<u64>,
    /// Blobs that were looked at.
    pub blobs_done: u64,
    /// Blobs in all.
    pub blobs_total: u64,
    /// Bytes that were read.
    pub bytes_done: u64,
    /// Bytes in all.
    pub bytes_total: u64,
    /// What is wrong; a thousand lines at most.
    pub findings: Vec<ScrubFinding>,
    /// Blobs that are not right.
    pub findings_total: u64,
    /// What went wrong, when it failed.
    pub error: Option<ProblemBody>,
    /// RFC 3339.
    pub started_at: String,
    /// RFC 3339; when it ended.
    pub ended_at: Option<String>,
}

impl ScrubStatus {
    /// A scrub that has just begun.
    pub fn started(id: &str, rate: Option<u64>, in_background: bool, started_at: String) -> ScrubStatus {
        ScrubStatus {
            id: id.to_owned(),
            phase: ScrubPhase::Reading,
            in_background,
            rate_bytes_per_second: rate,
            blobs_done: 0,
            blobs_total: 0,
            bytes_done: 0,
            bytes_total: 0,
            findings: Vec::new(),
            findings_total: 0,
            error: None,
            started_at,
            ended_at: None,
        }
    }
}

/// All scrubs the daemon remembers, newest first.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ScrubList {
    /// The scrubs.
    pub scrubs: Vec<ScrubStatus>,
}

/// All warm-ups the daemon remembers, newest first.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct WarmList {
    /// The warm-ups.
    pub warms: Vec<WarmStatus>,
}

/// One version of a model that is local and whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelInfo {
    /// Names this version of this reference.
    pub id: String,
    /// What it was pulled as, in canonical form.
    pub reference: String,
    /// The version the source gave it: a commit, or a hash over its listing.
    pub version: String,
    /// Digest of the manifest: two models with the same content have the same.
    pub manifest: String,
    /// Whether this is the version the reference means now.
    pub current: bool,
    /// The directory to read.
    pub path: String,
    /// Bytes in all.
    pub bytes: u64,
    /// Files in all.
    pub files: u64,
    /// RFC 3339; when the source was last asked and this was the version.
    pub confirmed_at: String,
    /// RFC 3339; when it was last opened, if ever.
    pub opened_at: Option<String>,
    /// Whether its reference is pinned and this is the version that is kept for it.
    pub pinned: bool,
    /// Leases on this version.
    pub leases: u64,
    /// Bytes of it that are in the page cache, where that was asked for and the kernel tells. A file that stands twice in
    /// the model is in memory once, and counts once.
    pub resident_bytes: Option<u64>,
    /// The same as a part of all it could be, 0 to 100, rounded down; 100 only when nothing is missing.
    pub resident_percent: Option<u8>,
}

/// A model with its files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelDetail {
    /// The model.
    #[serde(flatten)]
    pub model: ModelInfo,
    /// Its files, sorted by path.
    pub manifest_files: Vec<ModelFile>,
}

/// A file of a model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ModelFile {
    /// Where it is in the snapshot.
    pub path: String,
    /// `blake3:…`
    pub digest: String,
    /// Bytes.
    pub size: u64,
}

/// All models that are local and whole, by reference and then newest first.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ModelList {
    /// The models.
    pub models: Vec<ModelInfo>,
}

/// Asks for the directory of a model that is local.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct OpenRequest {
    /// What to open.
    pub reference: String,
    /// Patterns of files, as in the pull.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// Patterns of files, as in the pull.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
    /// Take a lease that outlives the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<LeaseTerms>,
    /// Start to bring the model into the page cache.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub warm: bool,
}

impl OpenRequest {
    /// An open of what the reference says, without a lease that outlives it.
    pub fn of(reference: impl ToString) -> OpenRequest {
        OpenRequest {
            reference: reference.to_string(),
            include: Vec::new(),
            exclude: Vec::new(),
            lease: None,
            warm: false,
        }
    }
}

/// For whom a lease is taken, and for how long. At least one of `pod`, `holder` and `ttl_seconds`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LeaseTerms {
    /// For this pod: it ends when it is released, or when larder is told that the pod is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodIdentity>,
    /// It ends when somebody releases it; asking again with the same name renews it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<String>,
    /// It ends after as many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_seconds: Option<u64>,
}

/// A pod, as the downward API names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PodIdentity {
    /// `metadata.uid`
    pub uid: String,
    /// `metadata.namespace`
    pub namespace: String,
    /// `metadata.name`
    pub name: String,
}

/// Who holds a lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum HolderKind {
    /// A pod; until it is gone.
    Pod,
    /// Somebody with a name; until it is released.
    Name,
    /// A connection to the socket; until it is closed.
    Connection,
}

/// A lease: somebody uses this version now, and nothing of it is taken away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LeaseInfo {
    /// Names the lease. Hard to guess: who knows it may release it.
    pub id: String,
    /// The id of the version.
    pub model: String,
    /// What was opened.
    pub reference: String,
    /// The version.
    pub version: String,
    /// What kind of holder.
    pub kind: HolderKind,
    /// The holder in words: `namespace/pod`, a name, or the process at the other end.
    pub holder: String,
    /// RFC 3339; when it was taken.
    pub since: String,
    /// RFC 3339; when it ends by itself, if time ends it.
    pub expires_at: Option<String>,
}

/// All leases, oldest first.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct LeaseList {
    /// The leases.
    pub leases: Vec<LeaseInfo>,
}

/// A model that was opened, and the lease that was taken on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Opened {
    /// The model.
    #[serde(flatten)]
    pub model: ModelInfo,
    /// The lease, if one was asked for.
    pub lease: Option<LeaseInfo>,
}

/// Asks for a reference to be pinned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    /// What to pin. It is pulled if it is not local.
    pub reference: String,
    /// Patterns of files, as in the pull.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub include: Vec<String>,
    /// Patterns of files, as in the pull.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub exclude: Vec<String>,
}

/// Who wants a reference kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum PinnedBy {
    /// Somebody asked for it; until somebody unpins it.
    Operator,
    /// The configuration lists it; until it no longer does.
    Config,
}

/// A reference that is kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PinInfo {
    /// What is pinned, in canonical form.
    pub reference: String,
    /// Who wants it kept; both may.
    pub by: Vec<PinnedBy>,
    /// RFC 3339; when it was first pinned.
    pub since: String,
    /// The id of the version that is kept, if one is local.
    pub model: Option<String>,
}

/// All pins, by reference.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PinList {
    /// The pins.
    pub pins: Vec<PinInfo>,
}

/// What a removal did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Removed {
    /// The models that are gone.
    pub models: Vec<ModelInfo>,
    /// Bytes the disk has back; bytes shared with a model that stays are not counted.
    pub freed_bytes: u64,
}

/// Asks for room to be made, as a pull of so many bytes would.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EvictRequest {
    /// Bytes that should fit.
    pub need_bytes: u64,
}

/// What would be evicted for so many bytes, and what would stay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EvictionPlan {
    /// Bytes that should fit.
    pub need_bytes: u64,
    /// Bytes that fit now.
    pub free_bytes: u64,
    /// Bytes that must go for the others to fit.
    pub short_bytes: u64,
    /// Bytes of the disk that all victims give back. More than is short where the quota is: an eviction goes down to
    /// `volume.low_water`.
    pub gained_bytes: u64,
    /// Whether that is enough. If not, nothing is evicted.
    pub is_enough: bool,
    /// Why nothing can be evicted, if who uses what cannot be known.
    pub unknown_holders: Option<String>,
    /// In the order they go.
    pub victims: Vec<PlannedEviction>,
    /// What stays whatever is needed, by reference.
    pub kept: Vec<KeptModel>,
}

/// A model that would be evicted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PlannedEviction {
    /// The id of the version.
    pub model: String,
    /// What it was pulled as.
    pub reference: String,
    /// The version.
    pub version: String,
    /// Its place among all that could go, from 1: the least recently used.
    pub rank: u64,
    /// Bytes of the disk it gives back, once those before it are gone. Bytes shared with a model that stays are not counted.
    pub gained_bytes: u64,
    /// RFC 3339; when it was last opened, if ever.
    pub opened_at: Option<String>,
}

/// A model that is not evicted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeptModel {
    /// The id of the version.
    pub model: String,
    /// What it was pulled as.
    pub reference: String,
    /// The version.
    pub version: String,
    /// Why it stays.
    pub because: KeptBecause,
    /// Who keeps it, in words, if they are known.
    pub by: Vec<String>,
}

/// Why a model is not evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum KeptBecause {
    /// Somebody holds a lease on it.
    Leased,
    /// Its reference is pinned.
    Pinned,
    /// It is being pulled.
    Pulled,
    /// It has not been here for `volume.min_residency`.
    Young,
    /// The kernel says that somebody has a file of it open or mapped.
    Open,
}

impl KeptBecause {
    /// As it is printed.
    pub fn text(self) -> &'static str {
        match self {
            KeptBecause::Leased => "leased",
            KeptBecause::Pinned => "pinned",
            KeptBecause::Pulled => "pulled",
            KeptBecause::Young => "young",
            KeptBecause::Open => "open",
        }
    }
}

/// A model that was evicted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EvictionInfo {
    /// RFC 3339.
    pub at: String,
    /// The id of the version.
    pub model: String,
    /// What it was pulled as.
    pub reference: String,
    /// The version.
    pub version: String,
    /// Why there was an eviction: `pull`, `quota`, `min-free` or `request`. Who goes is always what was used least recently.
    pub rule: String,
    /// Its place among all that could go, from 1: the least recently used.
    pub rank: u64,
    /// Bytes of the disk it gave back.
    pub freed_bytes: u64,
    /// RFC 3339; when it was last opened, if ever.
    pub opened_at: Option<String>,
    /// Who needed the room, in words.
    pub needed_by: String,
    /// Bytes that had to go.
    pub needed_bytes: u64,
}

/// What was evicted, newest first.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct EvictionList {
    /// The evictions.
    pub evictions: Vec<EvictionInfo>,
}

/// What an eviction did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Evicted {
    /// The models that are gone, in the order they went.
    pub evictions: Vec<EvictionInfo>,
    /// Bytes the disk has back.
    pub freed_bytes: u64,
}

/// Whether the daemon can do its work.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Readiness {
    /// All of them hold.
    pub ready: bool,
    /// What still has to happen, or what is wrong.
    pub waiting_for: Vec<String>,
    /// The program's version.
    pub version: String,
    /// How this node does things where it depends on the kernel, the file system or our rights.
    pub details: Vec<Detail>,
}

/// One thing that depends on the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Detail {
    /// What it is about, such as `descriptors`.
    pub name: String,
    /// How it is, such as `read-only mount`.
    pub state: String,
    /// What it means for whoever runs this node, and what would change it.
    pub means: String,
    /// Whether it is as good as it can be.
    pub best: bool,
}

/// An error, as RFC 9457 says it (`application/problem+json`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProblemBody {
    /// Where the code is explained, relative to the project's documentation.
    #[serde(rename = "type")]
    pub kind: String,
    /// The class of the failure.
    pub title: String,
    /// The HTTP status.
    pub status: u16,
    /// What happened, with numbers.
    pub detail: String,
    /// The stable code.
    pub code: String,
    /// What to do.
    pub action: String,
    /// The request, as it stands in the log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    /// Seconds until it makes sense to ask again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u64>,
}

impl From<&Problem> for ProblemBody {
    fn from(problem: &Problem) -> ProblemBody {
        ProblemBody {
            kind: format!("docs/errors.md#{}", problem.code),
            title: problem.fault().label().to_owned(),
            status: problem.fault().http_status(),
            detail: problem.message.clone(),
            code: problem.code.to_string(),
            action: problem.action.clone(),
            request_id: None,
            retry_after_seconds: problem.retry_after_seconds,
        }
    }
}

impl From<&ProblemBody> for Problem {
    fn from(body: &ProblemBody) -> Problem {
        let known = serde_json::from_value(serde_json::Value::String(body.code.clone()));
        Problem {
            code: known.unwrap_or(Code::InternalError),
            message: body.detail.clone(),
            action: body.action.clone(),
            retry_after_seconds: body.retry_after_seconds,
        }
    }
}

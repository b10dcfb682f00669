//! Bodies that tell what a start has cost.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::schema::{Object, ObjectBuilder, Type};

use super::{HolderKind, ModelInfo, Phase, ProblemBody, WarmStatus};
use crate::model::{Effort, Stage, StageTime, Timeline};

/// What the last starts of the models that were asked about have cost: of one model, or of each that a pod leases.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct StartList {
    /// The starts; at least one.
    pub starts: Vec<Start>,
}

/// How a model came, who uses it and how much of it is in memory; or why it is not here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Start {
    /// What was asked for, in canonical form.
    pub reference: String,
    /// Whether it is here.
    pub state: StartState,
    /// The version, if it is local; with how much of it is resident.
    pub model: Option<ModelInfo>,
    /// Why it is not here, if it is absent.
    pub absence: Option<Absence>,
    /// The pull that brought the version; the one that is under way; or the last one, if it failed. `null` if none is known:
    /// a crash came before it was written down, or an older larder brought it.
    pub pull: Option<PullTimeline>,
    /// A later pull of the same reference, under way or ended: the source was asked again.
    pub later_pull: Option<PullTimeline>,
    /// The last open that had to read and hash files again, because somebody touched them or larder was killed; if there was
    /// one since larder started.
    pub proof: Option<ProofTime>,
    /// The last warm-up of the version, while the daemon remembers it.
    pub warm: Option<WarmStatus>,
    /// Leases on the version, oldest first: those that are held, and those of pods that have ended, while the daemon
    /// remembers them.
    pub leases: Vec<StartLease>,
}

/// Whether a model is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum StartState {
    /// It is local and whole.
    Local,
    /// It is being pulled.
    OnItsWay,
    /// It is not here; `absence` says why.
    Absent,
}

/// Why a model is not here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Absence {
    /// The kind of reason.
    pub because: AbsentBecause,
    /// The reason, as a sentence.
    pub detail: String,
    /// What to do about it.
    pub action: String,
    /// RFC 3339; since when, if that is known.
    pub at: Option<String>,
    /// The code of the error, if a pull failed.
    pub code: Option<String>,
}

/// The kind of reason why a model is not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum AbsentBecause {
    /// The last pull failed.
    Failed,
    /// The last pull was taken back.
    Cancelled,
    /// It was evicted.
    Evicted,
    /// Somebody removed it.
    Removed,
    /// Its bytes were found wrong or missing.
    Spoilt,
    /// Nobody is known to have asked for it.
    NotAsked,
}

/// How a pull has spent its time. The stages follow each other without gap or overlap, so they sum to the whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct PullTimeline {
    /// The id of the pull.
    pub pull: String,
    /// Where it stands, or how it ended.
    pub phase: Phase,
    /// The stage it is in now, while it is under way.
    #[schema(schema_with = stage_schema)]
    pub now: Option<Stage>,
    /// RFC 3339; when it was asked for.
    pub began_at: String,
    /// Microseconds from then to its end, or until now: the sum of the stages.
    pub took_us: u64,
    /// What it spent them on, in the order in which the stages first came.
    pub stages: Vec<StageSpan>,
    /// Bytes that came from the source.
    pub fetched_bytes: u64,
    /// Microseconds of hashing. Files are worked on at the same time, and while others come: this and the next two are no
    /// part of the sum.
    pub hashing_us: u64,
    /// Microseconds of handing bytes to the file system.
    pub writing_us: u64,
    /// Microseconds of making files durable (fsync) and giving them their names.
    pub durable_us: u64,
    /// What went wrong, if it failed.
    pub error: Option<ProblemBody>,
}

/// What one stage of a pull took.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StageSpan {
    /// The stage.
    #[schema(schema_with = stage_schema)]
    pub stage: Stage,
    /// Microseconds, all its times together.
    pub took_us: u64,
}

impl PullTimeline {
    /// The pull with this id and these times.
    pub fn new(pull: String, phase: Phase, began_at: String, timeline: &Timeline, effort: Effort) -> PullTimeline {
        let span = |&StageTime { stage, took_us }: &StageTime| StageSpan { stage, took_us };
        PullTimeline {
            pull,
            phase,
            now: None,
            began_at,
            took_us: timeline.total_us(),
            stages: timeline.stages.iter().map(span).collect(),
            fetched_bytes: effort.fetched_bytes,
            hashing_us: effort.hashing_us,
            writing_us: effort.writing_us,
            durable_us: effort.durable_us,
            error: None,
        }
    }

    /// What one stage took; nothing, if it never came.
    pub fn of(&self, stage: Stage) -> u64 {
        self.stages.iter().find(|span| span.stage == stage).map_or(0, |span| span.took_us)
    }
}

/// An open that had to read and hash files again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProofTime {
    /// RFC 3339; when it ended.
    pub at: String,
    /// Microseconds it took.
    pub took_us: u64,
}

/// A lease, beside the pull that brought its version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct StartLease {
    /// The holder in words: `namespace/pod`, a name, or the process at the other end.
    pub holder: String,
    /// What kind of holder.
    pub kind: HolderKind,
    /// RFC 3339; when it was taken.
    pub since: String,
    /// Milliseconds from the end of that pull to the lease; negative if the lease is older; `null` if the pull is not known.
    pub after_ready_ms: Option<i64>,
    /// RFC 3339; when it ended, if it has.
    pub ended_at: Option<String>,
}

fn stage_schema() -> Object {
    ObjectBuilder::new().schema_type(Type::String).enum_values(Some(Stage::ALL.map(Stage::text))).build()
}

//! `larder why`: what a start has cost, part by part, for people who wait for it.

use std::time::Duration;

use clap::Args;

use super::door::Door;
use super::report::{json, out, plain};
use super::table::{self, Align};
use super::{Cli, Output, Rendering, progress};
use crate::fault::Problem;
use crate::model::{Bytes, ModelId, ModelRef, Stage};
use crate::wire::http::{Absence, ModelInfo, Phase, PullTimeline, StageSpan, Start, StartLease, StartList, WarmStatus};

/// What took less than this, in microseconds, needs no advice.
const WORTH_ADVICE_US: u64 = 1_000_000;

/// The words of `larder why`.
#[derive(Debug, Args)]
pub(super) struct Why {
    /// A model: its reference, or the id of one version; or a pod: `NAMESPACE/NAME`
    #[arg(value_name = "REF|ID|POD")]
    name: String,
    /// As it was given to `larder pull`; may be repeated
    #[arg(long, value_name = "PATTERN")]
    include: Vec<String>,
    /// As it was given to `larder pull`; may be repeated
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    #[command(flatten)]
    pub(super) rendering: Rendering,
}

/// What is asked about.
#[derive(Debug, PartialEq, Eq)]
enum Subject {
    /// A reference in canonical form, or an id.
    Model(String),
    Pod(String),
}

impl Why {
    fn subject(&self) -> Result<Subject, Problem> {
        if let Ok(id) = self.name.parse::<ModelId>() {
            return Ok(Subject::Model(id.to_string()));
        }
        // No reference is without a scheme, and no pod has one.
        let is_pod = self.name.split_once('/').is_some_and(|(namespace, name)| {
            !namespace.is_empty() && !namespace.contains(':') && !name.is_empty() && !name.contains('/')
        });
        if is_pod && self.include.is_empty() && self.exclude.is_empty() {
            return Ok(Subject::Pod(self.name.clone()));
        }
        let reference = ModelRef::parse_with(&self.name, &self.include, &self.exclude);
        reference.map(|reference| Subject::Model(reference.to_string())).map_err(|error| Problem::of(&error))
    }
}

pub(super) async fn run(cli: &Cli, why: &Why) -> Result<(), Problem> {
    let subject = why.subject()?;
    let door = Door::to_read(&cli.load()?).await?;
    let starts = match &subject {
        Subject::Model(name) => door.last_start(name).await.map(|start| vec![start]),
        Subject::Pod(pod) => door.last_starts_of_pod(pod).await,
    };
    door.close().await;
    let starts = starts?;
    let text = match cli.output() {
        Output::Json => json(&StartList { starts }),
        Output::Table => plain(&starts.iter().map(explained).collect::<Vec<_>>().join("\n\n")),
    };
    Ok(out(&text)?)
}

/// One start, in paragraphs.
fn explained(start: &Start) -> String {
    let mut paragraphs = vec![headline(start)];
    if let Some(absence) = &start.absence {
        paragraphs.push(absent(absence));
    }
    match &start.pull {
        Some(pull) => paragraphs.extend(course(pull, &start.reference)),
        None if start.model.is_some() => paragraphs.push(
            "How it came is not known: larder was stopped before that was written down, or an older larder brought it.\n"
                .to_owned(),
        ),
        None => {}
    }
    paragraphs.extend(since(start));
    if !start.leases.is_empty() {
        paragraphs.push(lease_table(&start.leases));
    }
    paragraphs.join("\n")
}

fn headline(start: &Start) -> String {
    let name = &start.reference;
    match (&start.model, &start.absence) {
        (Some(model), _) => format!("{name} is here: {}\n", facts(model)),
        (None, None) => format!("{name} is on its way\n"),
        (None, Some(_)) => format!("{name} is not here\n"),
    }
}

fn facts(model: &ModelInfo) -> String {
    let resident = model.resident_percent.map_or_else(
        || "how much of it is in memory is not known".to_owned(),
        |percent| format!("{percent} % of it in memory now"),
    );
    format!("version {}, {}, {resident}", progress::short(&model.version), Bytes(model.bytes))
}

fn absent(absence: &Absence) -> String {
    let at = absence.at.as_ref().map(|at| format!(", at {at}")).unwrap_or_default();
    let code = absence.code.as_ref().map(|code| format!("            code: {code}")).unwrap_or_default();
    format!("why: {}{at}\naction: {}{code}\n", absence.detail, absence.action)
}

/// What a pull has spent its time on.
fn course(pull: &PullTimeline, reference: &str) -> Vec<String> {
    let whole = took(pull.took_us);
    let ended = match pull.phase {
        Phase::Ready => format!("It came with a pull that was asked for at {} and took {whole}", pull.began_at),
        Phase::Failed | Phase::Cancelled => {
            format!("The pull was asked for at {} and ended after {whole}", pull.began_at)
        }
        _ => format!("Its pull was asked for at {}, {whole} ago", pull.began_at),
    };
    let now = pull.now.map(|stage| format!("; now: {}", stage.text())).unwrap_or_default();
    let mut paragraphs = vec![format!("{ended}{now}.\n"), stage_table(pull)];
    if pull.hashing_us + pull.writing_us + pull.durable_us > 0 {
        let [hashing, writing, durable] = [pull.hashing_us, pull.writing_us, pull.durable_us].map(took);
        paragraphs.push(format!(
            "Beside that, while other bytes came, and of all files together: {hashing} of hashing, {writing} of writing, \
             {durable} until the disk had them for good (fsync).\n"
        ));
    }
    let longest = pull.stages.iter().max_by_key(|span| span.took_us);
    if let Some(longest) = longest.filter(|longest| longest.took_us >= WORTH_ADVICE_US) {
        let text = longest.stage.text();
        paragraphs.push(format!("What helps against `{text}`: {}\n", what_helps(longest.stage, reference)));
    }
    paragraphs
}

fn stage_table(pull: &PullTimeline) -> String {
    let row =
        |name: &str, took_us: u64, what: String| [name.to_owned(), took(took_us), share(took_us, pull.took_us), what];
    // Those that nobody could see are one line, so that the column still sums to the whole.
    let (seen, rest): (Vec<&StageSpan>, Vec<&StageSpan>) =
        pull.stages.iter().partition(|span| u128::from(span.took_us) * 100 >= u128::from(pull.took_us));
    let mut rows: Vec<[String; 4]> =
        seen.iter().map(|span| row(span.stage.text(), span.took_us, meaning(span.stage, pull))).collect();
    if !rest.is_empty() {
        let names: Vec<&str> = rest.iter().map(|span| span.stage.text()).collect();
        rows.push(row("the rest", rest.iter().map(|span| span.took_us).sum(), names.join(", ")));
    }
    rows.push(row("the whole", pull.took_us, String::new()));
    let columns =
        [("STAGE", Align::Left), ("TOOK", Align::Right), ("SHARE", Align::Right), ("WHAT HAPPENED", Align::Left)];
    table::render(columns, &rows)
}

/// For people who have not read the glossary.
fn meaning(stage: Stage, pull: &PullTimeline) -> String {
    let text = match stage {
        Stage::Bookkeeping => "the request was written down, so that a restart goes on with it",
        Stage::Resolving => "the source was asked which version and which files this is",
        Stage::Checking => "what is on this disk already was looked at, or read and hashed again",
        Stage::MakingRoom => "room was made on the disk",
        Stage::Queued => "others went first, or fetched the same bytes",
        Stage::Memory => "others had the memory for bytes in flight (`pull.memory`)",
        Stage::BackingOff => "the source asked us to wait, or failed and was asked again after a pause",
        Stage::Asking => "the source was asked for bytes and had not sent the first",
        Stage::Receiving => {
            let rate = u128::from(pull.fetched_bytes) * 1_000_000 / u128::from(pull.of(Stage::Receiving).max(1));
            let rate = Bytes(u64::try_from(rate).unwrap_or(u64::MAX));
            return format!("bytes came from the source: {} at {rate}/s", Bytes(pull.fetched_bytes));
        }
        Stage::Writing => "bytes that had come were hashed and written, and none came meanwhile",
        Stage::Publishing => "the directory was laid out and the model got its name",
    };
    text.to_owned()
}

fn what_helps(stage: Stage, reference: &str) -> String {
    let ahead = format!("fetch it before it is needed, and keep it: `larder pin '{reference}'`");
    match stage {
        Stage::Bookkeeping | Stage::Publishing => {
            "a disk that answers faster for `volume.root` (`larder bench` measures it)".to_owned()
        }
        Stage::Resolving | Stage::Asking => {
            format!("look at DNS, proxy and network on the way to the source; or {ahead}")
        }
        Stage::Checking => "nothing: an interrupted pull has left those bytes, and they need not come again".to_owned(),
        Stage::MakingRoom => {
            "a larger `volume.quota`, so that less must be evicted first (`larder history` says what went)".to_owned()
        }
        Stage::Queued => "fewer pulls at a time (`larder pulls` lists them), more `pull.connections`, or another `pull.background_rate`".to_owned(),
        Stage::Memory => "more `pull.memory`, or fewer pulls at a time (`larder pulls` lists them)".to_owned(),
        Stage::BackingOff => {
            format!("a token or a mirror, if the source limits us (the log names the error); or {ahead}")
        }
        Stage::Receiving => format!("a source or mirror that is nearer; or {ahead}"),
        Stage::Writing => {
            "a faster disk for `volume.root`, or more processors: the source is not what it waits for".to_owned()
        }
    }
}

/// What has happened to it since it came.
fn since(start: &Start) -> Option<String> {
    let mut lines = Vec::new();
    if let Some(later) = &start.later_pull {
        let how = match (later.phase, &later.error) {
            (Phase::Ready, _) if later.fetched_bytes == 0 => "and nothing had to be fetched".to_owned(),
            (Phase::Ready, _) => format!("and {} came", Bytes(later.fetched_bytes)),
            (_, Some(error)) => format!("and that failed: {}", error.detail),
            (phase, None) => format!("and stands at {}", phase.text()),
        };
        lines.push(format!(
            "Its source was asked again at {}: that took {}, {how}.",
            later.began_at,
            took(later.took_us)
        ));
    }
    if let Some(proof) = &start.proof {
        let took = took(proof.took_us);
        lines.push(format!("An open had to read and hash files again: it took {took} and ended at {}.", proof.at));
    }
    lines.extend(start.warm.as_ref().map(warmed));
    (!lines.is_empty()).then(|| lines.join("\n") + "\n")
}

fn warmed(warm: &WarmStatus) -> String {
    let read = Bytes(warm.bytes_read);
    let ended = warm.ended_at.as_ref().map(|at| format!(", ended at {at}")).unwrap_or_default();
    let why = warm.why.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    format!(
        "Its warm-up, asked for at {}{ended}, has read {read} and is `{}`{why}.",
        warm.started_at,
        warm.phase.text()
    )
}

fn lease_table(leases: &[StartLease]) -> String {
    let after = |lease: &StartLease| match lease.after_ready_ms {
        None => "?".to_owned(),
        Some(ms) if ms < 0 => "before it".to_owned(),
        Some(ms) => format!("{} after it", took(ms.unsigned_abs().saturating_mul(1000))),
    };
    let row = |lease: &StartLease| {
        let ended = lease.ended_at.clone().unwrap_or_else(|| "still uses it".to_owned());
        [lease.holder.clone(), lease.since.clone(), after(lease), ended]
    };
    let columns = ["USED BY", "SINCE", "THE PULL", "UNTIL"].map(|title| (title, Align::Left));
    table::render(columns, &leases.iter().map(row).collect::<Vec<_>>())
}

/// A time as exactly as a person wants to know it.
fn took(took_us: u64) -> String {
    match took_us {
        0..1000 => format!("{:.1} ms", took_us as f64 / 1000.0),
        1000..1_000_000 => format!("{} ms", took_us / 1000),
        _ => progress::took_text(Duration::from_micros(took_us)),
    }
}

fn share(part: u64, whole: u64) -> String {
    match u128::from(part) * 100 / u128::from(whole.max(1)) {
        0 if part > 0 => "<1 %".to_owned(),
        percent => format!("{percent} %"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Effort, StageTime, Timeline};
    use crate::wire::http::{AbsentBecause, HolderKind, StartState};

    fn why(name: &str) -> Why {
        Why {
            name: name.into(),
            include: Vec::new(),
            exclude: Vec::new(),
            rendering: Rendering { output: Output::Table },
        }
    }

    fn start(model: Option<ModelInfo>) -> Start {
        Start {
            reference: "hf://o/n@main".into(),
            state: StartState::Local,
            model,
            absence: None,
            pull: None,
            later_pull: None,
            proof: None,
            warm: None,
            leases: Vec::new(),
        }
    }

    fn local() -> Start {
        start(Some(ModelInfo {
            id: "0123456789abcdef".into(),
            reference: "hf://o/n@main".into(),
            version: "0123456789abcdef0123".into(),
            manifest: "blake3:00".into(),
            current: true,
            path: "/v/public/x".into(),
            bytes: 140_200_000_000,
            files: 3,
            confirmed_at: "2026-01-01T00:00:00Z".into(),
            opened_at: None,
            pinned: false,
            leases: 1,
            resident_bytes: Some(7),
            resident_percent: Some(43),
        }))
    }

    #[test]
    fn a_word_is_a_pod_an_id_or_a_reference() {
        let subject = |name: &str| why(name).subject();
        assert_eq!(subject("team/vllm-0"), Ok(Subject::Pod("team/vllm-0".into())));
        assert_eq!(subject("0123456789abcdef"), Ok(Subject::Model("0123456789abcdef".into())));
        assert_eq!(subject("hf://o/n"), Ok(Subject::Model("hf://o/n@main".into())));
        for wrong in ["", "/", "team/", "/vllm-0", "a/b/c", "gpt2", "ftp:/x"] {
            assert!(subject(wrong).is_err(), "{wrong}");
        }
        let selected = Why { include: vec!["*.json".into()], ..why("hf://o/n") };
        assert_eq!(selected.subject(), Ok(Subject::Model("hf://o/n@main#include=*.json".into())));
    }

    #[test]
    fn a_slow_start_says_which_part_took_the_time_and_what_helps() {
        let times = [
            (Stage::Bookkeeping, 4_000),
            (Stage::Resolving, 7_000_000),
            (Stage::BackingOff, 61_000_000),
            (Stage::Receiving, 472_000_000),
            (Stage::Publishing, 1_000),
        ];
        let stages = times.map(|(stage, took_us)| StageTime { stage, took_us }).to_vec();
        let effort = Effort {
            fetched_bytes: 140_200_000_000,
            hashing_us: 241_000_000,
            writing_us: 120_000_000,
            durable_us: 12_000_000,
        };
        let timeline = Timeline { began_at_ms: 0, stages };
        let began_at = "2026-01-01T00:00:00Z".to_owned();
        let pull = PullTimeline::new("p1".into(), Phase::Ready, began_at, &timeline, effort);
        let lease = |holder: &str, after_ready_ms, ended_at: Option<&str>| StartLease {
            holder: holder.into(),
            kind: HolderKind::Pod,
            since: "2026-01-01T00:09:02Z".into(),
            after_ready_ms,
            ended_at: ended_at.map(str::to_owned),
        };
        let leases =
            vec![lease("team/vllm-0", Some(2100), None), lease("team/vllm-1", Some(-5), Some("2026-01-02T00:00:00Z"))];
        assert_eq!(
            explained(&Start { pull: Some(pull), leases, ..local() }),
            "hf://o/n@main is here: version 0123456789ab, 140.2 GB, 43 % of it in memory now\n\
             \n\
             It came with a pull that was asked for at 2026-01-01T00:00:00Z and took 9m.\n\
             \n\
             STAGE         TOOK  SHARE  WHAT HAPPENED\n\
             resolving    7.0 s    1 %  the source was asked which version and which files this is\n\
             backing-off   1m1s   11 %  the source asked us to wait, or failed and was asked again after a pause\n\
             receiving    7m52s   87 %  bytes came from the source: 140.2 GB at 297.0 MB/s\n\
             the rest      5 ms   <1 %  bookkeeping, publishing\n\
             the whole       9m  100 %\n\
             \n\
             Beside that, while other bytes came, and of all files together: 4m1s of hashing, 2m of writing, 12 s until the \
             disk had them for good (fsync).\n\
             \n\
             What helps against `receiving`: a source or mirror that is nearer; or fetch it before it is needed, and keep it: \
             `larder pin 'hf://o/n@main'`\n\
             \n\
             USED BY      SINCE                 THE PULL        UNTIL\n\
             team/vllm-0  2026-01-01T00:09:02Z  2.1 s after it  still uses it\n\
             team/vllm-1  2026-01-01T00:09:02Z  before it       2026-01-02T00:00:00Z\n"
        );
    }

    #[test]
    fn what_is_not_known_is_said_and_a_model_that_is_not_here_says_why() {
        assert!(explained(&local()).contains("How it came is not known"));
        let absence = Absence {
            because: AbsentBecause::Failed,
            detail: "cannot pull `hf://o/n@main`: \u{1b}no room".into(),
            action: "raise `volume.quota`".into(),
            at: Some("2026-01-01T00:00:00Z".into()),
            code: Some("volume-full".into()),
        };
        assert_eq!(
            explained(&Start { state: StartState::Absent, absence: Some(absence), ..start(None) }),
            "hf://o/n@main is not here\n\
             \n\
             why: cannot pull `hf://o/n@main`: \u{1b}no room, at 2026-01-01T00:00:00Z\n\
             action: raise `volume.quota`            code: volume-full\n"
        );
    }

    #[test]
    fn times_are_as_exact_as_they_are_short() {
        let shown: Vec<String> = [0, 400, 999, 1000, 999_999, 1_000_000, 59_000_000, 600_000_000].map(took).into();
        assert_eq!(shown, ["0.0 ms", "0.4 ms", "1.0 ms", "1 ms", "999 ms", "1.0 s", "59 s", "10m"]);
        assert_eq!([share(0, 0), share(0, 9), share(1, 900), share(9, 9)], ["0 %", "0 %", "<1 %", "100 %"]);
    }
}

//! What a person should know of this node: one finding a line.

mod disk;
mod finding;
mod machine;
mod rights;
mod sources;

use clap::Args;

use super::door::Door;
use super::report::{json, out};
use super::{Error, Output, Rendering};
use crate::config::Config;
use crate::fault::{Code, Problem};
use crate::model::ModelRef;
use crate::wire::http::Readiness;
use finding::{Finding, Mark, print, verdict};

/// The words of `larder doctor`.
#[derive(Debug, Args)]
pub(super) struct Words {
    /// Look at the machine too: its kernel, its disk (which is measured), its room, the sources of pinned models, and the
    /// rights in the cluster; also before anything is installed. It takes some seconds
    #[arg(long)]
    node: bool,
    #[command(flatten)]
    pub(super) rendering: Rendering,
}

/// Asks the daemon, or looks at the volume in this process, and prints what it finds. An error if something does not work.
pub(super) async fn run(config: &Config, words: &Words) -> Result<(), Problem> {
    let output = words.rendering.output;
    let is_for_programs = output == Output::Json;
    if !words.node {
        return match of_daemon(config).await {
            Ok(readiness) if is_for_programs => Ok(out(&json(&readiness.answer))?),
            Ok(readiness) => tell(&readiness.findings(config)),
            Err(problem) if problem.code == Code::DaemonUnreachable && !is_for_programs => {
                tell(&[unreachable(problem)])
            }
            Err(problem) => Err(problem),
        };
    }
    let findings = of_node(config).await;
    if is_for_programs {
        out(&json(&findings.iter().map(Finding::body).collect::<Vec<_>>()))?;
        return verdict(&findings);
    }
    tell(&findings)
}

fn tell(findings: &[Finding]) -> Result<(), Problem> {
    print(findings)?;
    verdict(findings)
}

/// What somebody who runs a cache here should know, whether or not there is one already.
async fn of_node(config: &Config) -> Vec<Finding> {
    let mut pinned = config.pull.pinned.clone();
    let mut findings = match is_here(config) {
        false => vec![Finding::new(Mark::Note, "daemon", "none", nobody(config, "There is no volume yet"))],
        true => match of_daemon_and_pins(config).await {
            Ok((answered, pins)) => {
                for reference in pins {
                    if !pinned.contains(&reference) {
                        pinned.push(reference);
                    }
                }
                answered.findings(config)
            }
            Err(problem) => vec![unreachable(problem)],
        },
    };
    findings.push(machine::kernel());
    let there = config.clone();
    let of_disk = tokio::task::spawn_blocking(move || disk::findings(&there)).await;
    let of_disk = of_disk.map_err(|error| Problem::of(&Error::Bug { why: error.to_string() }));
    findings.extend(of_disk.unwrap_or_else(|problem| vec![Finding::of("disk", "unknown", &problem)]));
    findings.extend(sources::findings(config, &pinned).await);
    findings.extend(rights::findings(config).await);
    findings
}

/// Whether there is a daemon or a volume. Nothing is made.
fn is_here(config: &Config) -> bool {
    config.volume.root.join("FORMAT").exists() || config.serve.socket.exists()
}

/// What a daemon, or the volume looked at in this process, says of itself.
struct Answered {
    answer: Readiness,
    /// Whether it was found in this process, because no daemon answers.
    here: bool,
}

async fn of_daemon(config: &Config) -> Result<Answered, Problem> {
    let door = Door::to_read(config).await?;
    let answered = answered_through(&door).await;
    door.close().await;
    answered
}

/// The same, and what is pinned: probes do not ask for that every few seconds.
async fn of_daemon_and_pins(config: &Config) -> Result<(Answered, Vec<ModelRef>), Problem> {
    let door = Door::to_read(config).await?;
    let (answered, pins) = (answered_through(&door).await, door.pins().await);
    door.close().await;
    Ok((answered?, pins?.iter().filter_map(|pin| pin.reference.parse().ok()).collect()))
}

async fn answered_through(door: &Door) -> Result<Answered, Problem> {
    Ok(Answered { answer: door.readiness().await?, here: !door.outlives_us() })
}

fn unreachable(problem: Problem) -> Finding {
    Finding::new(Mark::Problem(problem.code), "daemon", "unreachable", problem.message)
}

fn nobody(config: &Config, what: &str) -> String {
    format!("nobody answers on `{}`; `larder serve` starts it. {what}", config.serve.socket.display())
}

impl Answered {
    fn findings(self, config: &Config) -> Vec<Finding> {
        let daemon = match self.here {
            false => {
                let means = format!("larder {} on `{}`", self.answer.version, config.serve.socket.display());
                Finding::new(Mark::Ok, "daemon", "answers", means)
            }
            true => Finding::new(Mark::Note, "daemon", "none", nobody(config, "This is what this process found")),
        };
        [daemon].into_iter().chain(findings(self.answer)).collect()
    }
}

fn findings(readiness: Readiness) -> Vec<Finding> {
    let waiting = readiness.waiting_for.into_iter();
    let waiting = waiting.map(|what| Finding::new(Mark::Problem(Code::NotReady), "ready", "no", what));
    let details = readiness.details.into_iter().map(|detail| {
        let mark = if detail.best { Mark::Ok } else { Mark::Note };
        Finding::new(mark, &detail.name, detail.state, detail.means)
    });
    waiting.chain(details).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::http::Detail;

    #[test]
    fn what_could_be_better_is_a_note_and_what_fails_is_a_problem() {
        let detail = |best| Detail { name: "descriptors".into(), state: "x".into(), means: "y".into(), best };
        let readiness = |waiting_for: &[&str]| Readiness {
            ready: waiting_for.is_empty(),
            waiting_for: waiting_for.iter().map(|what| (*what).to_owned()).collect(),
            version: "1".into(),
            details: vec![detail(true), detail(false)],
        };
        let marks = |readiness| findings(readiness).iter().map(|f| f.mark).collect::<Vec<_>>();
        assert_eq!(marks(readiness(&[])), [Mark::Ok, Mark::Note]);
        assert_eq!(marks(readiness(&["start-up"])), [Mark::Problem(Code::NotReady), Mark::Ok, Mark::Note]);
        assert!(tell(&findings(readiness(&[]))).is_ok());
        let problem = tell(&findings(readiness(&["start-up", "volume is read-only: x"]))).unwrap_err();
        assert_eq!(problem.code, Code::NotReady);
        assert!(problem.message.contains("2 problems, the first: start-up"), "{}", problem.message);
    }
}

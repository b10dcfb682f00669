//! What a person should know of this node: one finding a line.

use super::door::Door;
use super::report::{json, out};
use super::table::{self, Align};
use super::{Error, Output};
use crate::config::Config;
use crate::fault::{Code, Problem};
use crate::wire::http::Readiness;

/// How a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// As good as it can be.
    Ok,
    /// It works, and could be better.
    Note,
    /// It does not work.
    Problem(Code),
}

impl Mark {
    fn text(self) -> &'static str {
        match self {
            Mark::Ok => "ok",
            Mark::Note => "note",
            Mark::Problem(_) => "problem",
        }
    }
}

struct Finding {
    mark: Mark,
    name: String,
    state: String,
    means: String,
}

/// Asks the daemon, or looks at the volume in this process, and prints what it finds. An error if something does not work.
pub(super) async fn run(config: &Config, output: Output) -> Result<(), Problem> {
    let socket = config.serve.socket.display().to_string();
    let door = match Door::to_read(config).await {
        Ok(door) => door,
        Err(problem) if problem.code == Code::DaemonUnreachable && output == Output::Table => {
            return tell(&[daemon(Mark::Problem(problem.code), "unreachable", problem.message)]);
        }
        Err(problem) => return Err(problem),
    };
    let here = !door.outlives_us();
    let readiness = door.readiness().await;
    door.close().await;
    let readiness = readiness?;
    if output == Output::Json {
        return Ok(out(&json(&readiness))?);
    }
    let daemon = match here {
        false => daemon(Mark::Ok, "answers", format!("larder {} on `{socket}`", readiness.version)),
        true => {
            let means =
                format!("nobody answers on `{socket}`; `larder serve` starts it. This is what this process found");
            daemon(Mark::Note, "none", means)
        }
    };
    let findings: Vec<Finding> = [daemon].into_iter().chain(findings(readiness)).collect();
    tell(&findings)
}

fn daemon(mark: Mark, state: &str, means: String) -> Finding {
    Finding { mark, name: "daemon".into(), state: state.into(), means }
}

fn findings(readiness: Readiness) -> Vec<Finding> {
    let waiting = readiness.waiting_for.into_iter().map(|what| Finding {
        mark: Mark::Problem(Code::NotReady),
        name: "ready".into(),
        state: "no".into(),
        means: what,
    });
    let details = readiness.details.into_iter().map(|detail| Finding {
        mark: if detail.best { Mark::Ok } else { Mark::Note },
        name: detail.name,
        state: detail.state,
        means: detail.means,
    });
    waiting.chain(details).collect()
}

fn tell(findings: &[Finding]) -> Result<(), Problem> {
    let columns = [("", Align::Left), ("WHAT", Align::Left), ("STATE", Align::Left), ("MEANS", Align::Left)];
    let row = |f: &Finding| [f.mark.text().to_owned(), f.name.clone(), f.state.clone(), f.means.clone()];
    out(&table::render(columns, &findings.iter().map(row).collect::<Vec<_>>()))?;
    let problems = findings.iter().filter_map(|finding| match finding.mark {
        Mark::Problem(code) => Some((code, finding.means.clone())),
        _ => None,
    });
    match problems.clone().next() {
        None => Ok(()),
        Some((code, first)) => Err(Error::Unwell { problems: problems.count(), first, code }.into()),
    }
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

//! `kubectl larder pull`: makes models local on many nodes, and ends well only if all of them say so.

use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, join_all};
use serde::Serialize;
use tokio::time::Instant;

use super::fleet::{Fleet, Nodes, Reached};
use super::{Error, Pull, Words, failed, in_a_cell};
use crate::cli::door::Door;
use crate::cli::progress::{self, Followed, Reporters, took_text};
use crate::cli::report::{json, out, say};
use crate::cli::table::{self, Align};
use crate::cli::{self, Kind, Output, interruption, is_terminal, outcome};
use crate::fault::{Code, Problem};
use crate::model::{Bytes, ModelRef};
use crate::wire::http::{Phase, ProblemBody, PullRequest, PullStatus};

/// Longest time that a daemon which has taken a pull may be away: a restart, a roll-out, or a connection that broke.
const MAX_ABSENCE: Duration = Duration::from_secs(120);
/// Pause before it is asked again.
const ASK_AGAIN: Duration = Duration::from_secs(1);

/// What came of one reference on one node.
struct Row {
    node: String,
    reference: String,
    /// As the daemon told it last.
    pull: Option<PullStatus>,
    problem: Option<Problem>,
    took: Duration,
}

/// With `-o json`.
#[derive(Serialize)]
struct Body<'a> {
    pulls: Vec<OnNode<'a>>,
}

#[derive(Serialize)]
struct OnNode<'a> {
    node: &'a str,
    reference: &'a str,
    /// `None` if the daemon has not taken it.
    pull: Option<&'a PullStatus>,
    error: Option<ProblemBody>,
    seconds: f64,
}

/// Ends when somebody interrupts the command.
type Interrupted = Shared<BoxFuture<'static, ()>>;

pub(super) async fn run(words: &Words, pull: &Pull) -> Result<(), Problem> {
    let parse = |text: &String| text.parse::<ModelRef>().map_err(|error| Problem::of(&error));
    let references: Vec<ModelRef> = pull.references.iter().map(parse).collect::<Result<_, _>>()?;
    let interrupted = interruption().boxed().shared();
    let fleet = tokio::select! {
        fleet = Fleet::of(words, pull.nodes.as_deref().map_or(Nodes::All, Nodes::Labelled)) => fleet?,
        () = interrupted.clone() => return Err(Error::StoppedWaiting.into()),
    };
    let reporters = pull.wait.then(|| Reporters::for_stderr(words.quiet, is_terminal()));
    let answers = fleet.each(async |reached| {
        let one = |reference| on_node(reached, reference, reporters.as_ref(), &interrupted);
        Ok(join_all(references.iter().map(one)).await)
    });
    let rows = answers.await.into_iter().flat_map(|(node, answer)| {
        answer.unwrap_or_else(|problem| {
            references.iter().map(|reference| Row::without_daemon(&node, reference, &problem)).collect()
        })
    });
    let rows: Vec<Row> = rows.collect();
    match words.output() {
        Output::Json => out(&json(&Body { pulls: rows.iter().map(OnNode::of).collect() }))?,
        Output::Table => out(&table(&rows))?,
    }
    let problems: Vec<_> = rows.iter().filter_map(|row| Some((&row.node, row.problem.as_ref()?))).collect();
    let done = failed("pull", fleet.len(), problems);
    if !pull.wait {
        let refused = match &done {
            Err(Error::Failed { failed, .. }) => failed.len(),
            _ => 0,
        };
        say(&format!(
            "accepted on {} of {} nodes; `--wait` waits until the models are there",
            fleet.len() - refused,
            fleet.len()
        ));
    }
    done?;
    match rows.iter().all(|row| row.is_settled(pull.wait)) {
        true => Ok(()),
        false => Err(Error::StoppedWaiting.into()),
    }
}

/// Has one node pull one model; waits for it if there is somebody to tell how far it is.
async fn on_node(
    reached: &Reached,
    reference: &ModelRef,
    reporters: Option<&Reporters>,
    interrupted: &Interrupted,
) -> Row {
    let began = Instant::now();
    let (pull, problem) = match reporters {
        Some(reporters) => follow(reached, reference, reporters, interrupted).await,
        None => hand_over(reached, reference, interrupted).await,
    };
    let problem = problem.map(|problem| reached.explain(problem));
    Row { node: reached.node.clone(), reference: reference.to_string(), pull, problem, took: began.elapsed() }
}

/// The pull as it was last told, and what went wrong. Neither if the command was interrupted before anything was told.
type Outcome = (Option<PullStatus>, Option<Problem>);

/// Starts or joins a pull, and does not wait for it.
async fn hand_over(reached: &Reached, reference: &ModelRef, interrupted: &Interrupted) -> Outcome {
    match unless(interrupted, reached.answer(reached.client.pull(&PullRequest::of(reference)))).await {
        None => (None, None),
        Some(Err(problem)) => (None, Some(problem)),
        Some(Ok(status)) if status.phase.is_final() => ended(status),
        Some(Ok(status)) => (Some(status), None),
    }
}

/// Starts or joins a pull, and shows how far it is until it has ended; also if the daemon is away meanwhile.
async fn follow(reached: &Reached, reference: &ModelRef, reporters: &Reporters, interrupted: &Interrupted) -> Outcome {
    let (began, door) = (Instant::now(), Door::Daemon(reached.client.clone()));
    // Until when it may be away: not at all before it has taken the pull.
    let mut patient_until = began;
    loop {
        let problem = match unless(interrupted, reached.answer(door.pull(reference, false))).await {
            None => return (None, None),
            Some(Err(problem)) => problem,
            Some(Ok(statuses)) => {
                let mut reporter = reporters.of(&reached.node);
                let followed = progress::follow(statuses, &mut reporter, interrupted.clone()).await;
                patient_until = Instant::now() + MAX_ABSENCE;
                match followed {
                    Ok(Followed::Ended(status)) => {
                        if status.phase == Phase::Ready {
                            reporter.ready(&status, began.elapsed());
                        }
                        return ended(status);
                    }
                    Ok(Followed::Interrupted(seen)) => return (seen, None),
                    Ok(Followed::Lost) => lost(reference),
                    Err(problem) => problem,
                }
            }
        };
        let may_pass = matches!(problem.code, Code::DaemonUnreachable | Code::Draining);
        if !may_pass || Instant::now() >= patient_until {
            return (None, Some(problem));
        }
        if unless(interrupted, tokio::time::sleep(ASK_AGAIN)).await.is_none() {
            return (None, None);
        }
    }
}

/// What comes of it; `None` if the command is interrupted before.
async fn unless<T>(interrupted: &Interrupted, asked: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        biased;
        () = interrupted.clone() => None,
        answer = asked => Some(answer),
    }
}

fn ended(status: PullStatus) -> Outcome {
    let problem = outcome(&status).err();
    (Some(status), problem)
}

fn lost(reference: &ModelRef) -> Problem {
    cli::Error::Lost { job: Kind::Pull, reference: reference.to_string() }.into()
}

impl Row {
    fn without_daemon(node: &str, reference: &ModelRef, problem: &Problem) -> Row {
        let (node, reference) = (node.to_owned(), reference.to_string());
        Row { node, reference, pull: None, problem: Some(problem.clone()), took: Duration::ZERO }
    }

    /// Whether nothing more was wanted of it.
    fn is_settled(&self, wait: bool) -> bool {
        self.problem.is_some() || self.pull.as_ref().is_some_and(|pull| !wait || pull.phase.is_final())
    }

    fn cells(&self) -> [String; 5] {
        let pull = self.pull.as_ref();
        let state = match (&self.problem, pull) {
            (Some(_), _) => "failed",
            (None, Some(pull)) => pull.phase.text(),
            (None, None) => "unknown",
        };
        let bytes = pull.map(|pull| pull.bytes_total).filter(|bytes| *bytes > 0);
        let end = match &self.problem {
            Some(problem) => in_a_cell(problem),
            None if pull.is_some_and(|pull| pull.phase.is_final()) => took_text(self.took),
            None => String::new(),
        };
        let bytes = bytes.map_or_else(String::new, |bytes| Bytes(bytes).to_string());
        [self.node.clone(), self.reference.clone(), state.to_owned(), bytes, end]
    }
}

impl OnNode<'_> {
    fn of(row: &Row) -> OnNode<'_> {
        OnNode {
            node: &row.node,
            reference: &row.reference,
            pull: row.pull.as_ref(),
            error: row.problem.as_ref().map(ProblemBody::from),
            seconds: row.took.as_secs_f64(),
        }
    }
}

fn table(rows: &[Row]) -> String {
    let columns = [
        ("NODE", Align::Left),
        ("REFERENCE", Align::Left),
        ("STATE", Align::Left),
        ("SIZE", Align::Right),
        ("TIME OR ERROR", Align::Left),
    ];
    table::render(columns, &rows.iter().map(Row::cells).collect::<Vec<_>>())
}

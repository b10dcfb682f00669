//! `kubectl larder`: asks the larders of many nodes at once, for who has a kubeconfig.
//!
//! kubectl runs the program `kubectl-larder` for it. The larders are found by their pods, and each is asked through a port-forward
//! of the API server, so none of them has to be open to the network.

mod fleet;
mod list;
mod pull;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use super::{Output, Rendering, block_on};
use crate::fault::{Code, Diagnose, Problem};
use crate::kubernetes::{self, Found, POD_LABEL, POD_PORT};

/// Most references of one command.
const MAX_REFERENCES: usize = 16;

/// Ask the larders of many nodes at once
#[derive(Debug, Parser)]
#[command(
    name = "kubectl-larder",
    bin_name = "kubectl larder",
    version,
    propagate_version = true,
    max_term_width = 120
)]
#[command(after_help = "Rights and examples are in docs/kubernetes.md, exit codes in docs/cli.md.")]
pub struct Words {
    /// The kubeconfig; without it those of KUBECONFIG, or `~/.kube/config`
    #[arg(long, global = true, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    kubeconfig: Option<PathBuf>,
    /// The context of the kubeconfig, if not its current one
    #[arg(long, global = true, value_name = "NAME")]
    context: Option<String>,
    /// Where the DaemonSet of larder is
    #[arg(short, long, global = true, value_name = "NAME", default_value = "larder")]
    namespace: String,
    /// Show no progress
    #[arg(short, long, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make models local on many nodes
    Pull(Pull),
    /// List the models that are local, node by node
    #[command(visible_alias = "ls")]
    List(List),
}

#[derive(Debug, Args)]
struct Pull {
    /// What to make local: `hf://org/name@revision`, `s3://bucket/prefix`, `https://host/file`, …
    #[arg(value_name = "REF", required = true, num_args = 1..=MAX_REFERENCES)]
    references: Vec<String>,
    /// Only on nodes with these labels, such as `pool=gpu`; else on each that has a larder
    #[arg(long, value_name = "LABEL=VALUE")]
    nodes: Option<String>,
    /// Wait until the models are there on all of them
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    rendering: Rendering,
}

#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    which: Which,
    #[command(flatten)]
    rendering: Rendering,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// Those of each node that has a larder
    #[arg(long)]
    all_nodes: bool,
    /// Those of this node
    #[arg(long, value_name = "NAME")]
    node: Option<String>,
}

impl Words {
    fn output(&self) -> Output {
        match &self.command {
            Command::Pull(Pull { rendering, .. }) | Command::List(List { rendering, .. }) => rendering.output,
        }
    }
}

/// Does what the words say.
pub fn run(words: &Words) -> Result<(), Problem> {
    block_on(async {
        match &words.command {
            Command::Pull(pull) => pull::run(words, pull).await,
            Command::List(list) => list::run(words, list).await,
        }
    })
}

/// Tells standard error what went wrong, and the exit code that belongs to it.
pub fn report(words: &Words, problem: &Problem) -> ExitCode {
    super::report::error(problem, words.output());
    ExitCode::from(problem.fault().exit_code())
}

/// What has to be allowed to who asks the API server for something.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Permission {
    ListNodes,
    ListPods { namespace: String },
    ForwardPorts { namespace: String },
}

impl std::fmt::Display for Permission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Permission::ListNodes => f.write_str("`list` on `nodes`"),
            Permission::ListPods { namespace } => write!(f, "`list` on `pods` in the namespace `{namespace}`"),
            Permission::ForwardPorts { namespace } => {
                write!(f, "`get` and `create` on `pods/portforward` in the namespace `{namespace}`")
            }
        }
    }
}

/// What goes wrong between the words and the larders.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Error {
    #[error(transparent)]
    NoCluster(kubernetes::Error),
    #[error("{error}")]
    Cluster { error: kubernetes::Error, right: Permission },
    #[error("cannot find a node: none has the labels `{selector}`")]
    NoNode { selector: String },
    #[error("cannot find a larder: no pod with the label `{POD_LABEL}` is in the namespace `{namespace}`{}", on(node))]
    NoDaemon { namespace: String, node: Option<String> },
    #[error("cannot reach the daemon on `{node}`: no pod of larder is there")]
    Missing { namespace: String, node: String },
    #[error("cannot reach the daemon on `{node}`: its pod `{pod}` is not running: {state}")]
    Waits { namespace: String, node: String, pod: String, state: String },
    #[error("cannot reach the daemon on `{node}`: {why}")]
    Unreachable { namespace: String, node: String, pod: String, why: String },
    #[error("cannot ask the daemon on `{node}`: it is too old to know what it was asked for")]
    TooOld { namespace: String, node: String },
    #[error("cannot make a socket that leads to the daemons: {why}")]
    NoSocket { why: String },
    #[error("cannot {verb} on {} of {of} nodes: {}", failed.len(), some_of(failed))]
    Failed { verb: &'static str, failed: Vec<String>, of: usize, code: Code, action: String },
    #[error("cannot wait for the nodes: interrupted; pulls that have begun go on")]
    StoppedWaiting,
    #[error("cannot list the models: interrupted")]
    StoppedListing,
}

/// Names that are told of many.
const MAX_NAMED: usize = 5;

fn some_of(names: &[String]) -> String {
    match names.len().checked_sub(MAX_NAMED) {
        None | Some(0) => names.join(", "),
        Some(more) => format!("{} and {more} more", names[..MAX_NAMED].join(", ")),
    }
}

fn on(node: &Option<String>) -> String {
    node.as_ref().map_or_else(String::new, |node| format!(" on the node `{node}`"))
}

impl Diagnose for Error {
    fn code(&self) -> Code {
        match self {
            Error::Cluster { error: kubernetes::Error { found: Found::Refused { status: 400, .. }, .. }, .. } => {
                Code::BadRequest
            }
            Error::NoCluster(error) | Error::Cluster { error, .. } => error.code(),
            Error::NoNode { .. } => Code::NodeNotFound,
            Error::NoDaemon { .. } => Code::DaemonNotFound,
            Error::Missing { .. } | Error::Waits { .. } | Error::Unreachable { .. } => Code::DaemonUnreachable,
            Error::TooOld { .. } => Code::RouteNotFound,
            Error::NoSocket { .. } => Code::DiskError,
            Error::Failed { code, .. } => *code,
            Error::StoppedWaiting | Error::StoppedListing => Code::PullCancelled,
        }
    }

    fn action(&self) -> String {
        match self {
            Error::NoCluster(kubernetes::Error { found: Found::NoIdentity { .. }, .. }) => {
                "name one with `--kubeconfig` or KUBECONFIG, and a context of it with `--context` (`kubectl config get-contexts`)"
                    .to_owned()
            }
            Error::Cluster { error, right } => match &error.found {
                Found::Refused { status: 400, .. } => {
                    "correct the labels: `--nodes LABEL=VALUE`, as `kubectl get nodes -l LABEL=VALUE` takes them".to_owned()
                }
                Found::Refused { status: 403, .. } => {
                    format!("have whoever runs the cluster allow you {right}: the Role is in docs/kubernetes.md (\"Pulling on many nodes\")")
                }
                _ => talk(),
            },
            Error::NoCluster(_) => talk(),
            Error::NoNode { .. } => "`kubectl get nodes --show-labels` shows the labels there are".to_owned(),
            Error::NoDaemon { .. } => {
                "name the namespace of larder with `-n`, or deploy it there: `kubectl get daemonsets -A -l \
                 app.kubernetes.io/name=larder` shows where it is"
                    .to_owned()
            }
            Error::Missing { namespace, node } => format!(
                "look why the DaemonSet has none there, which often is a taint of the node: `kubectl -n {namespace} describe \
                 daemonset larder`, `kubectl describe node {node}`"
            ),
            Error::Waits { namespace, pod, .. } => {
                format!("`kubectl -n {namespace} describe pod {pod}` says what it waits for")
            }
            Error::Unreachable { namespace, pod, .. } => format!(
                "look at it (`kubectl -n {namespace} logs {pod}`), and whether it listens where a port-forward ends: `serve.listen` \
                 is `127.0.0.1:{POD_PORT}` in `daemonset/base/config.toml`"
            ),
            Error::TooOld { namespace, .. } => format!(
                "roll out a larder of this version ({}): `newTag` in your kustomization, then `kubectl -n {namespace} rollout \
                 status daemonset/larder`",
                env!("CARGO_PKG_VERSION")
            ),
            Error::NoSocket { .. } => "set TMPDIR to a directory with a short path that can be written".to_owned(),
            Error::Failed { action, .. } => action.clone(),
            Error::StoppedWaiting => "the same command follows them again".to_owned(),
            Error::StoppedListing => String::new(),
        }
    }
}

/// What to do if the API server does not answer as it should.
fn talk() -> String {
    "make `kubectl get --raw /readyz` work with the same kubeconfig and context".to_owned()
}

impl From<Error> for Problem {
    fn from(error: Error) -> Problem {
        Problem::of(&error)
    }
}

/// A problem in a cell of a table.
fn in_a_cell(problem: &Problem) -> String {
    let Problem { code, message, action, .. } = problem;
    format!("{code}: {message}{}{action}", if action.is_empty() { "" } else { "; " })
}

/// What failed on some of the nodes; the first of it says what to do.
fn failed<'a>(
    verb: &'static str,
    of: usize,
    problems: impl IntoIterator<Item = (&'a String, &'a Problem)>,
) -> Result<(), Error> {
    let mut problems = problems.into_iter().peekable();
    let Some((_, first)) = problems.peek().copied() else { return Ok(()) };
    let mut failed: Vec<String> = problems.map(|(node, _)| node.clone()).collect();
    failed.dedup();
    Err(Error::Failed { verb, failed, of, code: first.code, action: first.action.clone() })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn words(line: &str) -> Result<Words, clap::Error> {
        Words::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_tree_is_sound() {
        Words::command().debug_assert();
    }

    #[test]
    fn a_list_is_of_one_node_or_of_all() {
        assert!(words("kubectl-larder list --all-nodes -n models").is_ok());
        assert!(words("kubectl-larder list --node n1 -o json").is_ok());
        assert_eq!(words("kubectl-larder list").unwrap_err().exit_code(), 2);
        assert_eq!(words("kubectl-larder list --all-nodes --node n1").unwrap_err().exit_code(), 2);
        assert_eq!(words("kubectl-larder pull").unwrap_err().exit_code(), 2);
    }

    #[test]
    fn what_failed_names_the_nodes_and_does_as_the_first_says() {
        let problem = |action: &str| Problem::new(Code::VolumeFull, "x", action);
        let names: Vec<String> = (1..=7).map(|number| format!("n{number}")).collect();
        let problems: Vec<_> = names.iter().map(|name| (name.clone(), problem(name))).collect();
        let told = |count: usize| {
            let some = problems[..count].iter().map(|(node, problem)| (node, problem));
            failed("pull", 9, some).map_err(|error| (error.to_string(), error.code(), error.action()))
        };
        assert_eq!(told(0), Ok(()));
        let (message, code, action) = told(2).unwrap_err();
        assert_eq!(
            (message.as_str(), code, action.as_str()),
            ("cannot pull on 2 of 9 nodes: n1, n2", Code::VolumeFull, "n1")
        );
        assert_eq!(told(7).unwrap_err().0, "cannot pull on 7 of 9 nodes: n1, n2, n3, n4, n5 and 2 more");
        let twice = problems[..1].iter().chain(&problems[..1]).map(|(node, problem)| (node, problem));
        assert_eq!(failed("pull", 9, twice).unwrap_err().to_string(), "cannot pull on 1 of 9 nodes: n1");
    }
}

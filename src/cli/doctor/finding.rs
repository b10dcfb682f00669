//! [`Finding`]: one thing that a person should know of this node.

use serde::Serialize;

use super::super::Error;
use super::super::report::out;
use super::super::table::{self, Align};
use crate::fault::{Code, Problem};

/// How a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mark {
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

/// What was looked at, how it is, and what that means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    pub(super) mark: Mark,
    pub(super) name: String,
    pub(super) state: String,
    pub(super) means: String,
}

impl Finding {
    pub(super) fn new(mark: Mark, name: &str, state: impl Into<String>, means: impl Into<String>) -> Finding {
        Finding { mark, name: name.to_owned(), state: state.into(), means: means.into() }
    }

    /// What does not work, and what to do.
    pub(super) fn of(name: &str, state: &str, problem: &Problem) -> Finding {
        let means = match problem.action.as_str() {
            "" => problem.message.clone(),
            action => format!("{}; {action}", problem.message),
        };
        Finding::new(Mark::Problem(problem.code), name, state, means)
    }

    /// As it is printed for programs.
    pub(super) fn body(&self) -> impl Serialize {
        #[derive(Serialize)]
        struct Body {
            mark: &'static str,
            name: String,
            state: String,
            means: String,
            #[serde(skip_serializing_if = "Option::is_none")]
            code: Option<&'static str>,
        }
        let code = match self.mark {
            Mark::Problem(code) => Some(code.text()),
            _ => None,
        };
        let Finding { mark, name, state, means } = self.clone();
        Body { mark: mark.text(), name, state, means, code }
    }
}

/// One a line.
pub(super) fn print(findings: &[Finding]) -> Result<(), Problem> {
    let columns = [("", Align::Left), ("WHAT", Align::Left), ("STATE", Align::Left), ("MEANS", Align::Left)];
    let row = |f: &Finding| [f.mark.text().to_owned(), f.name.clone(), f.state.clone(), f.means.clone()];
    Ok(out(&table::render(columns, &findings.iter().map(row).collect::<Vec<_>>()))?)
}

/// An error if something does not work, with the code of the first such thing.
pub(super) fn verdict(findings: &[Finding]) -> Result<(), Problem> {
    let problems = findings.iter().filter_map(|finding| match finding.mark {
        Mark::Problem(code) => Some((code, finding.means.clone())),
        _ => None,
    });
    match problems.clone().next() {
        None => Ok(()),
        Some((code, first)) => Err(Error::Unwell { problems: problems.count(), first, code }.into()),
    }
}

//! `kubectl larder list`: what is local on which node.

use std::collections::BTreeMap;

use serde::Serialize;

use super::fleet::{Fleet, Nodes};
use super::{Error, List, Which, Words, failed, in_a_cell};
use crate::cli::report::{json, out, say};
use crate::cli::table::{self, Align};
use crate::cli::{MODEL_COLUMNS, Output, interruption, model_cells};
use crate::fault::Problem;
use crate::wire::http::{ModelInfo, ProblemBody};

/// What a node said.
type Answer = Result<Vec<ModelInfo>, Problem>;

/// With `-o json`.
#[derive(Serialize)]
struct Body<'a> {
    nodes: Vec<OfNode<'a>>,
}

#[derive(Serialize)]
struct OfNode<'a> {
    node: &'a str,
    /// `None` if it could not be asked.
    models: Option<&'a [ModelInfo]>,
    error: Option<ProblemBody>,
}

pub(super) async fn run(words: &Words, list: &List) -> Result<(), Problem> {
    // Not left to the system: sockets are taken away when this ends.
    tokio::select! {
        done = ask(words, list) => done,
        () = interruption() => Err(Error::StoppedListing.into()),
    }
}

async fn ask(words: &Words, List { which: Which { node, .. }, .. }: &List) -> Result<(), Problem> {
    let fleet = Fleet::of(words, node.as_deref().map_or(Nodes::All, Nodes::Named)).await?;
    let answers = fleet.each(async |reached| {
        let models = reached.answer(reached.client.models_with_residency()).await;
        models.map_err(|problem| reached.explain(problem))
    });
    let answers = answers.await;
    match words.output() {
        Output::Json => out(&json(&Body { nodes: answers.iter().map(OfNode::of).collect() }))?,
        Output::Table => {
            let empty = answers.iter().filter(|(_, answer)| answer.as_ref().is_ok_and(Vec::is_empty));
            empty.for_each(|(node, _)| say(&format!("{node}: no model is local")));
            out(&tables(&answers))?;
        }
    }
    let problems = answers.iter().filter_map(|(node, answer)| Some((node, answer.as_ref().err()?)));
    Ok(failed("list the models", answers.len(), problems)?)
}

impl OfNode<'_> {
    fn of<'a>((node, answer): (&'a String, &'a Answer)) -> OfNode<'a> {
        let error = answer.as_ref().err().map(ProblemBody::from);
        OfNode { node, models: answer.as_deref().ok(), error }
    }
}

/// The models, and then why there are none of some nodes.
fn tables(answers: &BTreeMap<String, Answer>) -> String {
    let [reference, version, size, files, resident, current, opened, _path] = MODEL_COLUMNS;
    let columns = [("NODE", Align::Left), reference, version, size, files, resident, current, opened];
    let of_node = |(node, answer): (&String, &Answer)| {
        let models = answer.as_deref().unwrap_or_default().iter().map(model_cells);
        let node = node.clone();
        models.map(move |[a, b, c, d, e, f, g, _path]| [node.clone(), a, b, c, d, e, f, g]).collect::<Vec<_>>()
    };
    let models: Vec<_> = answers.iter().flat_map(of_node).collect();
    let failed = answers.iter().filter_map(|(node, answer)| Some([node.clone(), in_a_cell(answer.as_ref().err()?)]));
    let failed: Vec<_> = failed.collect();
    let mut tables = Vec::new();
    if !models.is_empty() {
        tables.push(table::render(columns, &models));
    }
    if !failed.is_empty() {
        tables.push(table::render([("NODE", Align::Left), ("ERROR", Align::Left)], &failed));
    }
    tables.join("\n")
}

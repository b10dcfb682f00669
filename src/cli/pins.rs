//! Pins: the commands that list them, set them and take them back.

use super::door::Door;
use super::report::{json, out, plain, say};
use super::table::{self, Align};
use super::{Cli, Output, PinWords, wait_for};
use crate::config::Config;
use crate::fault::Problem;
use crate::wire::http::{PinInfo, PinList, PinnedBy};

pub(super) async fn list(config: &Config, output: Output) -> Result<(), Problem> {
    let door = Door::to_read(config).await?;
    let pins = door.pins().await;
    door.close().await;
    let pins = pins?;
    if output == Output::Json {
        return Ok(out(&json(&PinList { pins }))?);
    }
    if pins.is_empty() {
        say("nothing is pinned; `larder pin hf://org/name` keeps a model");
        return Ok(());
    }
    Ok(out(&pin_table(&pins))?)
}

/// Pins first, so that what is pulled is kept from its first moment on.
pub(super) async fn pin(cli: &Cli, words: &PinWords) -> Result<(), Problem> {
    let reference = words.target.parse()?;
    let door = Door::to_change(&cli.load()?).await?;
    let done = async {
        let pin = door.pin(&reference).await?;
        if pin.model.is_none() {
            wait_for(&door, &reference, false, cli, false).await?;
        }
        let text = match cli.output() {
            Output::Table => plain(&format!("pinned {}\n", pin.reference)),
            Output::Json => json(&pin),
        };
        Ok(out(&text)?)
    };
    let done = done.await;
    door.close().await;
    done
}

pub(super) async fn unpin(cli: &Cli, words: &PinWords) -> Result<(), Problem> {
    let reference = words.target.parse()?;
    let door = Door::to_change(&cli.load()?).await?;
    let unpinned = door.unpin(&reference).await;
    door.close().await;
    let pin = unpinned?;
    let text = match (cli.output(), pin.by.contains(&PinnedBy::Config)) {
        (Output::Json, _) => json(&pin),
        (Output::Table, false) => plain(&format!("unpinned {}\n", pin.reference)),
        (Output::Table, true) => plain(&format!("unpinned {}; the configuration still lists it\n", pin.reference)),
    };
    Ok(out(&text)?)
}

fn pin_table(pins: &[PinInfo]) -> String {
    let rows: Vec<[String; 4]> = pins
        .iter()
        .map(|pin| {
            let by = |by: &PinnedBy| match by {
                PinnedBy::Operator => "operator",
                PinnedBy::Config => "config",
            };
            [
                pin.reference.clone(),
                pin.by.iter().map(by).collect::<Vec<_>>().join(", "),
                if pin.model.is_some() { "yes" } else { "no" }.to_owned(),
                pin.since.clone(),
            ]
        })
        .collect();
    table::render(["REFERENCE", "BY", "LOCAL", "SINCE"].map(|title| (title, Align::Left)), &rows)
}

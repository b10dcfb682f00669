//! `larder open`: the directory of a model. A daemon is asked as a pod asks it, so that the command works in pods too.

use std::time::Duration;

use clap::Args;

use super::door::Door;
use super::leases::LeaseFor;
use super::report::{json, out};
use super::socket::{self, Mount};
use super::{Cli, Output, Rendering, Target, interruption, wait_for, warm};
use crate::cache::Cache;
use crate::client::Opener;
use crate::config::Config;
use crate::fault::{Code, Problem};
use crate::model::ModelRef;
use crate::wire::http::{LeaseTerms, OpenRequest, Opened};

/// The words of `larder open`.
#[derive(Debug, Args)]
pub(super) struct Open {
    #[command(flatten)]
    target: Target,
    /// Pull the model if it is not local
    #[arg(long)]
    wait: bool,
    /// Start to bring it into memory
    #[arg(long)]
    warm: bool,
    #[command(flatten)]
    mount: Mount,
    #[command(flatten)]
    lease: LeaseFor,
    #[command(flatten)]
    pub(super) rendering: Rendering,
}

pub(super) async fn run(cli: &Cli, open: &Open) -> Result<(), Problem> {
    let reference = open.target.parse()?;
    let terms = open.lease.terms(|name| std::env::var(name).ok())?;
    let config = cli.load()?;
    // A lease is written down, an open is not.
    let door = if terms.is_some() { Door::to_change(&config).await? } else { Door::to_read(&config).await? };
    let opened = match &door {
        Door::Daemon(_) => through_socket(cli, open, &config, &reference, terms).await,
        Door::Here(cache) => here(cli, open, &door, cache, &reference, terms).await,
    };
    door.close().await;
    let opened = opened?;
    let text = match cli.output() {
        Output::Table => format!("{}\n", opened.model.path),
        Output::Json => json(&opened),
    };
    Ok(out(&text)?)
}

async fn through_socket(
    cli: &Cli,
    open: &Open,
    config: &Config,
    reference: &ModelRef,
    terms: Option<LeaseTerms>,
) -> Result<Opened, Problem> {
    // It has just answered: there is nothing to be patient for.
    let opener = Opener::new(&config.serve.socket).patience(Duration::ZERO).wait(open.wait).without_files();
    let opener = terms.into_iter().fold(opener, Opener::lease);
    let opener = if open.warm { opener.warm() } else { opener };
    let model = socket::open(opener, reference, &mut cli.reporter(), interruption()).await?;
    let mut info = model.info().clone();
    info.path = open.mount.directory(&model).display().to_string();
    Ok(Opened { model: info, lease: model.lasting_lease().cloned() })
}

async fn here(
    cli: &Cli,
    open: &Open,
    door: &Door,
    cache: &Cache,
    reference: &ModelRef,
    lease: Option<LeaseTerms>,
) -> Result<Opened, Problem> {
    let asked = OpenRequest { lease, warm: open.warm, ..OpenRequest::of(reference) };
    let again = async || {
        let (cache, asked) = (cache.clone(), asked.clone());
        let opened = tokio::task::spawn_blocking(move || cache.open_as(&asked)).await;
        Ok(opened.map_err(|error| super::Error::Bug { why: error.to_string() })??)
    };
    let opened = match again().await {
        Err(Problem { code: Code::NotLocal | Code::NotReady, .. }) if open.wait => {
            wait_for(door, reference, false, cli, false).await?;
            again().await
        }
        answer => answer,
    }?;
    if open.warm {
        // Nobody would go on with it when this process ends.
        warm::follow(door, reference, cli).await?;
    }
    Ok(opened)
}

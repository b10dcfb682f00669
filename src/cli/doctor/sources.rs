//! Whether each model that is to be kept can be had from its source: name, connection, TLS, credential, licence.

use std::time::Duration;

use futures::StreamExt;
use tokio::time::timeout;

use super::finding::{Finding, Mark};
use crate::config::Config;
use crate::fault::{Code, Problem};
use crate::model::{Bytes, Listing, ModelRef};
use crate::source::{Environment, Error, Sources};

/// Longest wait for the listing of one model.
const TIME_FOR_EACH: Duration = Duration::from_secs(20);
/// Asked at the same time.
const AT_ONCE: usize = 8;

/// Asks the source of each of them what it has, as a pull would begin, and fetches one byte.
pub(super) async fn findings(config: &Config, pinned: &[ModelRef]) -> Vec<Finding> {
    if pinned.is_empty() {
        let means = "no model is pinned, so none was asked for (`pull.pinned`, `larder pin`)";
        return vec![Finding::new(Mark::Ok, "sources", "not asked", means)];
    }
    let sources = Sources::new(config.sources(), Environment::of_process());
    let sources = &sources;
    futures::stream::iter(pinned).map(|reference| ask(sources, reference)).buffered(AT_ONCE).collect().await
}

async fn ask(sources: &Sources, reference: &ModelRef) -> Finding {
    let name = reference.to_string();
    match timeout(TIME_FOR_EACH, try_out(sources, reference)).await {
        Ok(Ok(listing)) => {
            let (bytes, files) = (Bytes(listing.total_bytes()), listing.files().len());
            let files = if files == 1 { "1 file".to_owned() } else { format!("{files} files") };
            let means = format!("its source gives {bytes} in {files}, version {}", listing.version());
            Finding::new(Mark::Ok, &name, "found", means)
        }
        Ok(Err(error)) => not_found(&name, &Problem::of(&error)),
        Err(_) => {
            let message = format!("its source has not answered for {} s", TIME_FOR_EACH.as_secs());
            let action = "check that the host answers, HTTPS_PROXY and any NetworkPolicy";
            not_found(&name, &Problem::new(Code::SourceUnreachable, message, action))
        }
    }
}

/// Many sources list what they do not let everybody read: a licence that was not accepted shows with the first byte.
async fn try_out(sources: &Sources, reference: &ModelRef) -> Result<Listing, Error> {
    let source = sources.open(reference)?;
    let listing = source.resolve().await?;
    if let Some(file) = listing.files().iter().filter(|file| file.size > 0).min_by_key(|file| file.size) {
        // What is not marked comes in one answer, and the rest of it is not waited for.
        source.fetch(file, 0..1).await?.read(&mut [0]).await?;
    }
    Ok(listing)
}

fn not_found(name: &str, problem: &Problem) -> Finding {
    Finding::of(name, problem.code.text(), problem)
}

//! `larder scrub`: reads every blob from the disk, and says which are not right.

use clap::Args;
use tokio::time::Instant;

use super::door::Door;
use super::progress::{self, Followed, Job, of, took_text};
use super::report::{json, out};
use super::table::{self, Align};
use super::{Cli, Error, Output, Rendering, interruption};
use crate::fault::Problem;
use crate::model::Bytes;
use crate::wire::http::{ScrubPhase, ScrubStatus};

/// The words of `larder scrub`.
#[derive(Debug, Args)]
pub(super) struct Scrub {
    /// Most bytes a second, such as `100MB/s`; as fast as the disk without it
    #[arg(long, value_name = "RATE", value_parser = rate)]
    rate: Option<u64>,
    #[command(flatten)]
    pub(super) rendering: Rendering,
}

fn rate(text: &str) -> Result<u64, String> {
    let bytes = text.strip_suffix("/s").unwrap_or(text).parse::<Bytes>().ok().filter(|bytes| bytes.0 > 0);
    bytes.map(|bytes| bytes.0).ok_or_else(|| "write it as `100MB/s`".to_owned())
}

pub(super) async fn run(cli: &Cli, scrub: &Scrub) -> Result<(), Problem> {
    let began = Instant::now();
    let door = Door::to_change(&cli.load()?).await?;
    let mut reporter = cli.reporter();
    let followed = match door.scrub(scrub.rate).await {
        Ok(statuses) => progress::follow(statuses, &mut reporter, interruption()).await,
        Err(problem) => Err(problem),
    };
    let goes_on = door.outlives_us();
    door.close().await;
    let status = match followed? {
        Followed::Ended(status) => status,
        Followed::Interrupted(Some(ScrubStatus { id, .. })) if goes_on => {
            return Err(Error::StoppedWatchingScrub { id }.into());
        }
        Followed::Interrupted(_) | Followed::Lost => return Err(Error::StoppedScrubbing.into()),
    };
    match (status.phase, &status.error) {
        (_, Some(error)) => return Err(Problem::from(error)),
        (ScrubPhase::Cancelled, _) => return Err(Error::StoppedScrubbing.into()),
        _ => {}
    }
    match cli.output() {
        Output::Json => out(&json(&status))?,
        Output::Table if status.findings.is_empty() => {}
        Output::Table => out(&findings(&status))?,
    }
    let read =
        format!("{} in {} blobs, in {}", Bytes(status.bytes_done), status.blobs_done, took_text(began.elapsed()));
    match status.findings_total {
        0 => reporter.say(&format!("scrubbed {read}: all are right")),
        wrong => return Err(Error::Scrubbed { wrong, read }.into()),
    }
    Ok(())
}

fn findings(status: &ScrubStatus) -> String {
    let rows: Vec<[String; 4]> = status
        .findings
        .iter()
        .map(|finding| {
            let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".to_owned());
            [finding.found.text().to_owned(), or_none(&finding.reference), or_none(&finding.file), finding.blob.clone()]
        })
        .collect();
    table::render(["FOUND", "REFERENCE", "FILE", "BLOB"].map(|title| (title, Align::Left)), &rows)
}

impl Job for ScrubStatus {
    const DOING: &'static str = "scrubbing";

    fn reference(&self) -> &str {
        "the volume"
    }

    fn bytes(&self) -> (u64, u64) {
        (self.bytes_done, self.bytes_total)
    }

    fn summary(&self) -> String {
        let wrong = match self.findings_total {
            0 => String::new(),
            wrong => format!(", {wrong} not right"),
        };
        format!("{}{wrong}", of(self.bytes_done, self.bytes_total))
    }

    fn change(&self, before: Option<&ScrubStatus>) -> Option<String> {
        let is_new = before.is_none_or(|before| before.findings_total != self.findings_total);
        is_new.then(|| self.summary())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_bytes_a_second() {
        assert_eq!((rate("100MB/s"), rate("5")), (Ok(100_000_000), Ok(5)));
        for wrong in ["", "0", "fast", "100MB/h", "-1"] {
            assert!(rate(wrong).is_err(), "{wrong}");
        }
    }
}

//! `larder warm`: brings a model into the page cache, and says how much of it is there.

use std::time::Duration;

use tokio::time::Instant;

use super::door::Door;
use super::progress::{self, Followed, Job, of, took_text};
use super::report::{json, out, plain, say};
use super::{Cli, Error, Kind, Output, Warm, interruption};
use crate::fault::Problem;
use crate::model::{Bytes, ModelRef};
use crate::wire::http::{WarmPhase, WarmStatus};

pub(super) async fn warm(cli: &Cli, warm: &Warm) -> Result<(), Problem> {
    let reference = warm.target.parse()?;
    let config = cli.load()?;
    // Page cache is the kernel's: it can be filled beside another process that holds the volume.
    let door = Door::to_read(&config).await?;
    if warm.detach && !door.outlives_us() {
        door.close().await;
        let socket = config.serve.socket;
        return Err(Error::NobodyToLeaveItTo { job: Kind::WarmUp, reference: reference.to_string(), socket }.into());
    }
    let done = if warm.detach { hand_over(&door, &reference).await } else { follow(&door, &reference, cli).await };
    door.close().await;
    let status = done?;
    let text = match (cli.output(), warm.detach) {
        (Output::Json, _) => json(&status),
        (Output::Table, true) => format!("{}\n", status.id),
        (Output::Table, false) => plain(&format!("{}\n", resident(&status))),
    };
    Ok(out(&text)?)
}

/// Starts a warm-up and does not wait for it.
async fn hand_over(door: &Door, reference: &ModelRef) -> Result<WarmStatus, Problem> {
    use futures::StreamExt;
    let first = door.warm(reference).await?.next().await;
    first.ok_or_else(|| Error::Lost { job: Kind::WarmUp, reference: reference.to_string() })?
}

/// Warms, shows how far it is, and says what came of it. A model that is not resident in whole is no failure: the message
/// says how much of it is, and why not more.
pub(super) async fn follow(door: &Door, reference: &ModelRef, cli: &Cli) -> Result<WarmStatus, Problem> {
    let began = Instant::now();
    let statuses = door.warm(reference).await?;
    let mut reporter = cli.reporter();
    let followed = progress::follow(statuses, &mut reporter, interruption()).await?;
    let reference = reference.to_string();
    let status = match followed {
        Followed::Ended(status) => status,
        Followed::Interrupted(Some(WarmStatus { id, percent, .. })) if door.outlives_us() => {
            return Err(
                Error::StoppedWaiting { job: Kind::WarmUp, reference, percent: percent.unwrap_or(0), id }.into()
            );
        }
        Followed::Interrupted(_) => return Err(Error::StoppedWarming { reference }.into()),
        Followed::Lost => return Err(Error::Lost { job: Kind::WarmUp, reference }.into()),
    };
    match (status.phase, &status.error, &status.why) {
        (_, Some(error), _) => Err(Problem::from(error)),
        (WarmPhase::Cancelled, ..) => Err(Error::StoppedWarming { reference }.into()),
        (_, None, Some(why)) => {
            // Not progress: `--quiet` does not hide it.
            say(&format!("stopped {reference}  {}: {why}", resident(&status)));
            Ok(status)
        }
        (_, None, None) => {
            reporter.say(&warm_line(&status, began.elapsed()));
            Ok(status)
        }
    }
}

/// `warm hf://…  100 % resident (2.8 of 2.8 GB) in 1.2 s (2.1 GB read)`
fn warm_line(status: &WarmStatus, took: Duration) -> String {
    let read = Bytes(status.bytes_read);
    format!("warm {}  {} in {} ({read} read)", status.reference, resident(status), took_text(took))
}

/// `43 % resident (1.2 of 2.8 GB)`
fn resident(status: &WarmStatus) -> String {
    match (status.resident_bytes, status.percent) {
        (Some(resident), Some(percent)) => format!("{percent} % resident ({})", of(resident, status.bytes_total)),
        _ => format!("unknown how much of {} is resident", Bytes(status.bytes_total)),
    }
}

impl Job for WarmStatus {
    const DOING: &'static str = "warming";

    fn reference(&self) -> &str {
        &self.reference
    }

    fn bytes(&self) -> (u64, u64) {
        (self.bytes_done, self.bytes_total)
    }

    fn summary(&self) -> String {
        let mut parts = vec![self.phase.text().to_owned()];
        if self.phase == WarmPhase::Reading {
            let percent = self.percent.unwrap_or(0);
            parts = vec![format!("{percent} % ({})", of(self.bytes_done, self.bytes_total))];
            if self.bytes_per_second > 0 {
                parts.push(format!("{}/s", Bytes(self.bytes_per_second)));
            }
        }
        parts.join(", ")
    }

    fn change(&self, before: Option<&WarmStatus>) -> Option<String> {
        if before.is_some_and(|before| before.phase == self.phase) {
            return None;
        }
        Some(match (self.phase, self.resident_bytes_before) {
            (WarmPhase::Reading, Some(before)) => {
                format!("{} of {} to read", Bytes(self.bytes_total.saturating_sub(before)), Bytes(self.bytes_total))
            }
            (phase, _) => phase.text().to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(phase: WarmPhase) -> WarmStatus {
        WarmStatus {
            phase,
            bytes_total: 2_800_000_000,
            bytes_done: 1_200_000_000,
            bytes_read: 1_100_000_000,
            resident_bytes_before: Some(100_000_000),
            resident_bytes: Some(1_200_000_000),
            percent: Some(42),
            bytes_per_second: 1_300_000_000,
            ..WarmStatus::queued("w1", "0123456789abcdef", "hf://o/n@main", "2026-01-01T00:00:00Z".into())
        }
    }

    #[test]
    fn progress_says_how_far_and_how_fast() {
        assert_eq!(status(WarmPhase::Reading).summary(), "42 % (1.2 of 2.8 GB), 1.3 GB/s");
        assert_eq!(status(WarmPhase::Queued).summary(), "queued");
        let (queued, reading) = (status(WarmPhase::Queued), status(WarmPhase::Reading));
        assert_eq!(queued.change(None).unwrap(), "queued");
        assert_eq!(reading.change(Some(&queued)).unwrap(), "2.7 GB of 2.8 GB to read");
        assert_eq!(reading.change(Some(&reading)), None);
    }

    #[test]
    fn the_result_is_what_is_resident_and_not_what_was_read() {
        let done = status(WarmPhase::Warm);
        let line = warm_line(&done, Duration::from_secs(12));
        assert_eq!(line, "warm hf://o/n@main  42 % resident (1.2 of 2.8 GB) in 12 s (1.1 GB read)");
        let untold = WarmStatus { resident_bytes: None, percent: None, ..done };
        assert_eq!(resident(&untold), "unknown how much of 2.8 GB is resident");
    }
}

//! Loads while larder does something that nobody waits for.

use std::path::{Path, PathBuf};

use super::Bench;
use super::loads::{drop_pages, load};
use super::node::Node;
use super::origin::Origin;
use super::row::Row;
use crate::fault::Problem;
use crate::wire::http::{Phase, PullRequest, ScrubRequest};

/// Bytes that have come of the other model when a load begins, or a quarter of it: the pull is under way.
const UNDER_WAY_BYTES: u64 = 16 << 20;

pub(super) async fn beside(bench: &mut Bench) -> Result<(), Problem> {
    let node = Node::start(&bench.place("node")).await?;
    let origin = Origin::start(bench.plan.small, None).await?;
    let reference = origin.plain();
    let model = node.open(&reference).await?;
    let files: Vec<PathBuf> = origin.shape.names().map(|name| Path::new(&model.info().path).join(name)).collect();
    drop(model);
    drop(origin);
    let mut other = Origin::start(bench.plan.small, None).await?;
    for round in 0..bench.rounds {
        for turn in 0..4 {
            bench.settle().await?;
            drop_pages(&files).await?;
            let load = || load(&node, &reference, &files, true);
            match (round + turn) % 4 {
                0 => bench.push(Row::LoadAlone, load().await?.as_secs_f64()),
                case @ (1 | 2) => {
                    let before = other.sent().await?.body_bytes;
                    let pull = node.client.pull(&PullRequest::of(other.plain())).await?;
                    if case == 2 {
                        // Whoever asks how it stands waits for it.
                        node.client.pull_status(&pull.id).await?;
                    }
                    other.sent_at_least(before + UNDER_WAY_BYTES.min(other.shape.bytes() / 4)).await?;
                    let row = if case == 1 { Row::LoadBesidePull } else { Row::LoadBesideWantedPull };
                    bench.push(row, load().await?.as_secs_f64());
                    // Its bytes are not for the next round to go on with.
                    if node.client.cancel(&pull.id).await?.phase != Phase::Ready {
                        // Pulled and not opened: what somebody has held until just now may not be removed yet.
                        node.pulled(&other.plain()).await?;
                    }
                    node.client.remove(&other.plain()).await?;
                }
                _ => {
                    let scrub = node.client.scrub(&ScrubRequest { bytes_per_second: None }).await?;
                    bench.push(Row::LoadBesideScrub, load().await?.as_secs_f64());
                    node.client.cancel_scrub(&scrub.id).await?;
                }
            }
        }
    }
    node.remove()
}

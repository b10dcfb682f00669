//! A daemon that nobody asks for anything.

use std::time::Duration;

use tokio::time::Instant;

use super::Bench;
use super::node::Node;
use super::origin::Origin;
use super::process::wake_ups;
use super::row::Row;
use crate::fault::Problem;
use crate::source::http::IDLE_CONNECTION;

/// How long it is watched in each round. What it does by itself it does every five seconds.
const WATCHED: Duration = Duration::from_secs(10);
/// Until threads that have nothing to do have ended, and memory was given back.
const SETTLES: Duration = Duration::from_secs(2);
/// More rounds tell nothing new.
const MAX_ROUNDS: u32 = 2;

pub(super) async fn idle(bench: &mut Bench) -> Result<(), Problem> {
    let origin = Origin::start(bench.plan.small, None).await?;
    for _ in 0..bench.rounds.min(MAX_ROUNDS) {
        let node = Node::start(&bench.place("node")).await?;
        tokio::time::sleep(SETTLES).await;
        let (began, before) = (Instant::now(), wake_ups(node.pid())?);
        tokio::time::sleep(WATCHED).await;
        let woken = wake_ups(node.pid())?.saturating_sub(before);
        bench.push(Row::IdleWakeUps, woken as f64 / began.elapsed().as_secs_f64());
        bench.push(Row::IdleMemory, resident(&node)?);
        drop(node.open(&origin.plain()).await?);
        // Connections are kept for the next pull, and threads for the next work.
        tokio::time::sleep(2 * IDLE_CONNECTION + SETTLES).await;
        bench.push(Row::IdleMemoryAfterPull, resident(&node)?);
        node.remove()?;
    }
    Ok(())
}

/// MiB.
fn resident(node: &Node) -> Result<f64, Problem> {
    Ok(node.used()?.resident_bytes as f64 / f64::from(1 << 20))
}

//! Evictions: the commands that make room, say what would go, and what went.

use clap::Args;

use super::door::Door;
use super::report::{json, out, plain, say};
use super::table::{self, Align};
use super::{Output, Rendering, progress};
use crate::config::Config;
use crate::fault::Problem;
use crate::model::Bytes;
use crate::wire::http::{EvictionInfo, EvictionList, EvictionPlan, KeptModel, PlannedEviction};

/// The words of `larder evict`.
#[derive(Debug, Args)]
pub(super) struct Evict {
    /// How much should fit, such as `140GB`
    #[arg(long, value_name = "SIZE")]
    need: Bytes,
    /// Say what would go and who keeps the rest, and change nothing
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    pub(super) rendering: Rendering,
}

pub(super) async fn evict(config: &Config, words: &Evict) -> Result<(), Problem> {
    let (door, output) = (Door::to_change(config).await?, words.rendering.output);
    let done = match words.dry_run {
        true => door.eviction_plan(words.need.0).await.and_then(|plan| shown_plan(&plan, output)),
        false => door.evict(words.need.0).await.map(|evicted| match output {
            Output::Json => json(&evicted),
            Output::Table => {
                let mut text = String::new();
                for gone in &evicted.evictions {
                    text.push_str(&format!("evicted {} {}\n", gone.reference, progress::short(&gone.version)));
                }
                plain(&format!("{text}freed {}\n", Bytes(evicted.freed_bytes)))
            }
        }),
    };
    door.close().await;
    Ok(out(&done?)?)
}

fn shown_plan(plan: &EvictionPlan, output: Output) -> Result<String, Problem> {
    if output == Output::Json {
        return Ok(json(plan));
    }
    let [need, free, gained] = [plan.need_bytes, plan.free_bytes, plan.gained_bytes].map(Bytes);
    say(&match &plan.unknown_holders {
        Some(why) => format!("nothing can be evicted, because who uses what cannot be known: {why}"),
        None if plan.short_bytes == 0 => format!("{need} fit: {free} are free, nothing would be evicted"),
        None if plan.is_enough => format!("for {need}, where {free} are free, {gained} would be evicted"),
        None => {
            format!("{need} do not fit: {free} are free, and no more than {gained} could be evicted, so nothing would")
        }
    });
    let mut text = String::new();
    if !plan.victims.is_empty() {
        text.push_str(&victim_table(&plan.victims));
    }
    if !plan.kept.is_empty() {
        text.push_str(if text.is_empty() { "" } else { "\n" });
        text.push_str(&kept_table(&plan.kept));
    }
    Ok(text)
}

pub(super) async fn history(config: &Config, output: Output) -> Result<(), Problem> {
    let door = Door::to_read(config).await?;
    let evictions = door.evictions().await;
    door.close().await;
    let evictions = evictions?;
    if output == Output::Json {
        return Ok(out(&json(&EvictionList { evictions }))?);
    }
    if evictions.is_empty() {
        say("no model was ever evicted");
        return Ok(());
    }
    Ok(out(&history_table(&evictions))?)
}

fn victim_table(victims: &[PlannedEviction]) -> String {
    let rows: Vec<[String; 5]> = victims
        .iter()
        .map(|victim| {
            [
                victim.rank.to_string(),
                victim.reference.clone(),
                progress::short(&victim.version),
                Bytes(victim.gained_bytes).to_string(),
                victim.opened_at.clone().unwrap_or_else(|| "never".to_owned()),
            ]
        })
        .collect();
    let columns = [
        ("RANK", Align::Right),
        ("EVICTED", Align::Left),
        ("VERSION", Align::Left),
        ("FREES", Align::Right),
        ("OPENED", Align::Left),
    ];
    table::render(columns, &rows)
}

fn kept_table(kept: &[KeptModel]) -> String {
    let rows: Vec<[String; 4]> = kept
        .iter()
        .map(|model| {
            let version = progress::short(&model.version);
            [model.reference.clone(), version, model.because.text().to_owned(), model.by.join(", ")]
        })
        .collect();
    table::render(["KEPT", "VERSION", "BECAUSE", "BY"].map(|title| (title, Align::Left)), &rows)
}

fn history_table(evictions: &[EvictionInfo]) -> String {
    let rows: Vec<[String; 8]> = evictions
        .iter()
        .map(|gone| {
            [
                gone.at.clone(),
                gone.reference.clone(),
                progress::short(&gone.version),
                Bytes(gone.freed_bytes).to_string(),
                gone.rule.clone(),
                gone.rank.to_string(),
                gone.opened_at.clone().unwrap_or_else(|| "never".to_owned()),
                format!("{} ({})", gone.needed_by, Bytes(gone.needed_bytes)),
            ]
        })
        .collect();
    let columns = [
        ("AT", Align::Left),
        ("EVICTED", Align::Left),
        ("VERSION", Align::Left),
        ("FREED", Align::Right),
        ("RULE", Align::Left),
        ("RANK", Align::Right),
        ("OPENED", Align::Left),
        ("FOR", Align::Left),
    ];
    table::render(columns, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::http::KeptBecause;

    #[test]
    fn a_plan_shows_who_goes_in_order_and_who_keeps_the_rest() {
        let victim = |rank, reference: &str, opened: Option<&str>| PlannedEviction {
            model: "0123456789abcdef".into(),
            reference: reference.into(),
            version: "0123456789abcdef0123".into(),
            rank,
            gained_bytes: 2_800_000_000,
            opened_at: opened.map(str::to_owned),
        };
        let kept = KeptModel {
            model: "0123456789abcdef".into(),
            reference: "hf://o/c@main".into(),
            version: "v1".into(),
            because: KeptBecause::Leased,
            by: vec!["team/vllm-0 (lease `x`)".into()],
        };
        let plan = EvictionPlan {
            need_bytes: 5,
            free_bytes: 0,
            short_bytes: 5,
            gained_bytes: 5_600_000_000,
            is_enough: true,
            unknown_holders: None,
            victims: vec![victim(1, "hf://o/a@main", None), victim(2, "hf://o/b@main", Some("2026"))],
            kept: vec![kept],
        };
        assert_eq!(
            shown_plan(&plan, Output::Table).unwrap(),
            "RANK  EVICTED        VERSION        FREES  OPENED\n\
             \u{20}  1  hf://o/a@main  0123456789ab  2.8 GB  never\n\
             \u{20}  2  hf://o/b@main  0123456789ab  2.8 GB  2026\n\
             \n\
             KEPT           VERSION  BECAUSE  BY\n\
             hf://o/c@main  v1       leased   team/vllm-0 (lease `x`)\n"
        );
    }
}

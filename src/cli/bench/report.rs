//! What was measured, as a table for people and as one JSON object. Pure.

use std::collections::BTreeMap;

use serde::Serialize;

use super::row::{Row, Target, Unit};
use super::statistics::Samples;
use crate::cli::table::{self, Align};

/// What came of each row: readings, or why there are none.
#[derive(Debug, Default)]
pub(super) struct Readings(BTreeMap<Row, Result<Samples, String>>);

impl Readings {
    /// One more reading of a row.
    pub(super) fn push(&mut self, row: Row, value: f64) {
        // A row that failed once stays so: what is left of its rounds would look like all of them.
        if let Ok(samples) = self.0.entry(row).or_insert_with(|| Ok(Samples::default())) {
            samples.push(value);
        }
    }

    /// A row cannot be measured here.
    pub(super) fn fail(&mut self, row: Row, why: &str) {
        self.0.insert(row, Err(why.to_owned()));
    }

    fn samples(&self, row: Row) -> Option<&Samples> {
        self.0.get(&row)?.as_ref().ok()
    }
}

/// The whole answer: what `--json` prints.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) larder: &'static str,
    pub(super) machine: Machine,
    /// Of the model that is pulled.
    pub(super) size_bytes: u64,
    pub(super) shards: u64,
    pub(super) rounds: u32,
    /// What was done otherwise than asked.
    pub(super) notes: Vec<String>,
    pub(super) rows: Vec<Line>,
}

/// What the numbers are numbers of.
#[derive(Debug, Serialize)]
pub(super) struct Machine {
    pub(super) processors: usize,
    pub(super) memory_bytes: Option<u64>,
    pub(super) kernel: Option<String>,
    pub(super) file_system: String,
}

/// One row.
#[derive(Debug, PartialEq, Serialize)]
pub(super) struct Line {
    row: String,
    what: &'static str,
    unit: Unit,
    /// The median of the rounds; `null` if it could not be measured.
    measured: Option<f64>,
    least: Option<f64>,
    most: Option<f64>,
    readings: usize,
    /// The row it is compared with, and that one's median.
    beside: Option<Beside>,
    /// Of what was measured to the row beside it: the median of the rounds' ratios.
    ratio: Option<f64>,
    target: Option<String>,
    met: Option<bool>,
    /// Why it could not be measured.
    why: Option<String>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Beside {
    row: String,
    measured: Option<f64>,
}

/// The rows that were asked for; all if none was named.
pub(super) fn lines(readings: &Readings, only: &[Row]) -> Vec<Line> {
    let asked = |row: &&Row| only.is_empty() || only.contains(row);
    Row::ALL.iter().filter(asked).map(|row| line(*row, readings)).collect()
}

fn line(row: Row, readings: &Readings) -> Line {
    let facts = row.facts();
    let samples = readings.samples(row);
    let beside = facts.beside.and_then(|other| readings.samples(other));
    let measured = samples.and_then(Samples::median);
    let ratio = samples.zip(beside).and_then(|(samples, beside)| samples.ratio_to(beside));
    let why = match readings.0.get(&row) {
        Some(Err(why)) => Some(why.clone()),
        None => Some("it was not measured".to_owned()),
        Some(Ok(_)) => None,
    };
    Line {
        row: row.name(),
        what: facts.what,
        unit: facts.unit,
        measured,
        least: samples.and_then(Samples::least),
        most: samples.and_then(Samples::most),
        readings: samples.map_or(0, Samples::count),
        beside: facts.beside.map(|other| Beside { row: other.name(), measured: beside.and_then(Samples::median) }),
        ratio,
        target: facts.target.map(|target| target_text(target, facts.unit, facts.beside)),
        met: facts.target.and_then(|target| is_met(target, measured?, beside.and_then(Samples::median), ratio)),
        why,
    }
}

/// `None` if what it is relative to was not measured.
fn is_met(target: Target, measured: f64, beside: Option<f64>, ratio: Option<f64>) -> Option<bool> {
    Some(match target {
        Target::AtLeast(least) => measured >= least,
        Target::AtMost(most) => measured <= most,
        Target::RatioAtLeast(least) => ratio? >= least,
        Target::RatioAtMost(most) => ratio? <= most,
        Target::AboveByAtMost(most) => measured <= beside? + most,
    })
}

fn target_text(target: Target, unit: Unit, beside: Option<Row>) -> String {
    let other = || beside.map(|row| row.name()).unwrap_or_default();
    match target {
        Target::AtLeast(least) => format!("≥ {}", quantity(least, unit)),
        Target::AtMost(most) => format!("≤ {}", quantity(most, unit)),
        Target::RatioAtLeast(least) => format!("≥ {least:.2} × {}", other()),
        Target::RatioAtMost(most) => format!("≤ {most:.2} × {}", other()),
        Target::AboveByAtMost(most) => format!("≤ {} + {}", other(), quantity(most, unit)),
    }
}

/// Three digits that count, or as many as stand before the point.
fn quantity(value: f64, unit: Unit) -> String {
    let decimals = match (unit, value.abs()) {
        (Unit::Requests | Unit::Bytes, _) => 0,
        (Unit::Times, _) => 2,
        (_, 100.0..) => 0,
        (_, 10.0..) => 1,
        _ => 2,
    };
    format!("{value:.decimals$} {}", unit.text())
}

/// The table, with what it was measured on above it and what could not be measured below.
pub(super) fn text(report: &Report) -> String {
    let Machine { processors, memory_bytes, kernel, file_system } = &report.machine;
    let memory = memory_bytes.map_or_else(String::new, |bytes| format!(", {} of memory", crate::model::Bytes(bytes)));
    let kernel = kernel.as_ref().map_or_else(String::new, |kernel| format!(", Linux {kernel}"));
    let mut text = format!(
        "larder {} on {processors} processors{memory}{kernel}, {file_system}\n{} in {} shards, medians of {} round{}\n",
        report.larder,
        crate::model::Bytes(report.size_bytes),
        report.shards,
        report.rounds,
        if report.rounds == 1 { "" } else { "s" },
    );
    for note in &report.notes {
        text += &format!("note: {note}\n");
    }
    text.push('\n');
    let shown = |value: Option<f64>, unit| value.map_or_else(|| "-".to_owned(), |value| quantity(value, unit));
    let rows: Vec<[String; 8]> = report
        .rows
        .iter()
        .map(|line| {
            let spread = line.least.zip(line.most).filter(|_| line.readings > 1);
            let beside = line.beside.as_ref();
            [
                line.row.clone(),
                shown(line.measured, line.unit),
                spread.map_or_else(String::new, |(least, most)| {
                    let least = quantity(least, line.unit);
                    let number = least.split(' ').next().unwrap_or_default();
                    format!("{number} to {}", quantity(most, line.unit))
                }),
                beside.map_or_else(String::new, |other| format!("{} {}", other.row, shown(other.measured, line.unit))),
                line.ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}")),
                line.target.clone().unwrap_or_default(),
                line.met.map_or("", |met| if met { "yes" } else { "no" }).to_owned(),
                line.what.to_owned(),
            ]
        })
        .collect();
    let columns = [
        ("ROW", Align::Left),
        ("MEASURED", Align::Right),
        ("FROM TO", Align::Right),
        ("BESIDE", Align::Left),
        ("RATIO", Align::Right),
        ("TARGET", Align::Left),
        ("MET", Align::Left),
        ("WHAT", Align::Left),
    ];
    text += &table::render(columns, &rows);
    let mut failed = report.rows.iter().filter_map(|line| Some((&line.row, line.why.as_ref()?))).peekable();
    if failed.peek().is_some() {
        text += "\nNot measured here:\n";
    }
    for (row, why) in failed {
        text += &format!("{row}: {why}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn readings(rows: &[(Row, &[f64])]) -> Readings {
        let mut readings = Readings::default();
        for (row, values) in rows {
            values.iter().for_each(|value| readings.push(*row, *value));
        }
        readings
    }

    fn report(rows: Vec<Line>) -> Report {
        Report {
            larder: "1.2.3",
            machine: Machine {
                processors: 2,
                memory_bytes: Some(24_000_000_000),
                kernel: Some("6.18.5".into()),
                file_system: "ext4".into(),
            },
            size_bytes: 4_000_000_000,
            shards: 4,
            rounds: 3,
            notes: vec!["only 4.0 GB".into()],
            rows,
        }
    }

    #[test]
    fn the_table_has_each_row_beside_what_it_is_compared_with() {
        let mut readings = readings(&[
            (Row::Floor, &[1200.0, 1300.0, 600.0]),
            (Row::ColdPull, &[1140.0, 1170.0, 570.0]),
            (Row::Resume, &[1.015, 1.004, 1.03]),
        ]);
        readings.fail(Row::DirectRead, "this file system takes no O_DIRECT");
        let lines = lines(&readings, &[Row::DirectRead, Row::Floor, Row::ColdPull, Row::Resume]);
        assert_eq!(
            text(&report(lines)),
            "larder 1.2.3 on 2 processors, 24.0 GB of memory, Linux 6.18.5, ext4\n\
             4.0 GB in 4 shards, medians of 3 rounds\n\
             note: only 4.0 GB\n\
             \n\
             ROW           MEASURED           FROM TO  BESIDE           RATIO  TARGET          MET  WHAT\n\
             direct-read          -                                                                 the disk: direct reads of a model's files, several at a time\n\
             floor        1200 MB/s  600 to 1300 MB/s                                               receive + BLAKE3 + direct write by a bare program, durable\n\
             cold-pull    1140 MB/s  570 to 1170 MB/s  floor 1200 MB/s   0.95  ≥ 0.90 × floor  yes  from nothing to descriptors in hand, durable\n\
             resume          1.01 ×    1.00 to 1.03 ×                          ≤ 1.02 ×        yes  kill -9 at half: bytes of the origin in all\n\
             \n\
             Not measured here:\n\
             direct-read: this file system takes no O_DIRECT\n"
        );
    }

    #[test]
    fn a_row_that_failed_once_has_no_readings_and_says_why() {
        let mut readings = readings(&[(Row::Open, &[50.0])]);
        readings.fail(Row::Open, "the daemon went away");
        readings.push(Row::Open, 51.0);
        let line = &lines(&readings, &[Row::Open])[0];
        assert_eq!((line.measured, line.met, line.why.as_deref()), (None, None, Some("the daemon went away")));
    }

    #[test]
    fn a_target_is_met_or_not_and_unknown_without_what_it_is_relative_to() {
        assert_eq!(is_met(Target::AtMost(1.0), 1.0, None, None), Some(true));
        assert_eq!(is_met(Target::AtLeast(0.9), 0.89, None, None), Some(false));
        assert_eq!(is_met(Target::AboveByAtMost(50.0), 61.0, Some(11.0), None), Some(true));
        assert_eq!(is_met(Target::AboveByAtMost(50.0), 62.0, Some(11.0), None), Some(false));
        assert_eq!(is_met(Target::RatioAtMost(0.5), 1.0, Some(2.1), Some(0.48)), Some(true));
        assert_eq!(is_met(Target::RatioAtLeast(0.9), 1.0, None, None), None);
        assert_eq!(
            target_text(Target::AboveByAtMost(20.0), Unit::Milliseconds, Some(Row::RoundTrip)),
            "≤ round-trip + 20.0 ms"
        );
    }

    #[test]
    fn every_row_is_there_when_none_is_named() {
        let lines = lines(&Readings::default(), &[]);
        assert_eq!(lines.len(), Row::ALL.len());
        assert!(lines.iter().all(|line| line.why.is_some()));
    }

    #[test]
    fn numbers_have_the_digits_that_count() {
        let shown =
            [(1234.5, Unit::MegabytesPerSecond), (12.34, Unit::Milliseconds), (0.714, Unit::SecondsPerGigabyte)]
                .map(|(value, unit)| quantity(value, unit));
        assert_eq!(shown, ["1234 MB/s", "12.3 ms", "0.71 s/GB"]);
        assert_eq!((quantity(1.0, Unit::Requests), quantity(1.0, Unit::Times)), ("1 req".into(), "1.00 ×".into()));
    }
}

//! [`Timeline`]: the time of one pull, cut into stages; and the [`Course`] it is made by.

use serde::{Deserialize, Serialize};

/// What a pull does at one moment.
///
/// Parts of a pull do several things at the same time: one range comes, another waits, a file is made durable. The pull is
/// then in the foremost of these stages, see [`Stage::BY_PRECEDENCE`]; so it is always in exactly one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// None of the others: the pull is written down so that a restart resumes it, or ends.
    Bookkeeping,
    /// The source is asked which version and which files the reference means.
    Resolving,
    /// What is here already is looked at; what came of a file before is read and hashed again.
    Checking,
    /// Room is promised, and made by evicting.
    MakingRoom,
    /// Others go first: no connection or place is free, another pull fetches the same bytes, or nobody waits for this one and
    /// its rate is bounded.
    Queued,
    /// Other pulls have the memory for bytes in flight.
    Memory,
    /// The source asked us to wait, or it failed and is asked again after a pause.
    BackingOff,
    /// The source was asked for bytes, and none has come.
    Asking,
    /// Bytes come from the source.
    Receiving,
    /// No byte comes, and those that have come are hashed, written and made durable.
    Writing,
    /// The directory is laid out and the model gets its name.
    Publishing,
}

impl Stage {
    /// Every stage, in the order in which a pull that meets them all first does.
    pub const ALL: [Stage; 11] = [
        Stage::Bookkeeping,
        Stage::Resolving,
        Stage::Checking,
        Stage::MakingRoom,
        Stage::Queued,
        Stage::Memory,
        Stage::BackingOff,
        Stage::Asking,
        Stage::Receiving,
        Stage::Writing,
        Stage::Publishing,
    ];

    /// The foremost first: what brings the pull on, before what it waits for.
    pub const BY_PRECEDENCE: [Stage; 11] = [
        Stage::Publishing,
        Stage::Receiving,
        Stage::Writing,
        Stage::BackingOff,
        Stage::Asking,
        Stage::Memory,
        Stage::Queued,
        Stage::MakingRoom,
        Stage::Checking,
        Stage::Resolving,
        Stage::Bookkeeping,
    ];

    /// As it is printed.
    pub fn text(self) -> &'static str {
        match self {
            Stage::Bookkeeping => "bookkeeping",
            Stage::Resolving => "resolving",
            Stage::Checking => "checking",
            Stage::MakingRoom => "making-room",
            Stage::Queued => "queued",
            Stage::Memory => "memory",
            Stage::BackingOff => "backing-off",
            Stage::Asking => "asking",
            Stage::Receiving => "receiving",
            Stage::Writing => "writing",
            Stage::Publishing => "publishing",
        }
    }
}

/// What one stage took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageTime {
    /// The stage.
    pub stage: Stage,
    /// Microseconds, all its times together.
    pub took_us: u64,
}

/// How a pull has spent its time. The stages do not overlap and leave nothing out: each is the time from one change of stage
/// to the next, read from one clock. So they sum to the whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeline {
    /// When it began; milliseconds since the Unix epoch.
    pub began_at_ms: u64,
    /// In the order in which they first came, each once. [`Stage::ALL`] bounds them.
    pub stages: Vec<StageTime>,
}

impl Timeline {
    /// The whole, in microseconds.
    pub fn total_us(&self) -> u64 {
        // A text that nobody verified may claim anything.
        self.stages.iter().fold(0, |sum, stage| sum.saturating_add(stage.took_us))
    }

    /// When it ended, or where it stands; milliseconds since the Unix epoch. For people to read: the clock it counts from may
    /// have been set meanwhile.
    pub fn ended_at_ms(&self) -> u64 {
        self.began_at_ms.saturating_add(self.total_us() / 1000)
    }
}

/// What a pull has done, counted part by part. Parts work at the same time, so the times here sum to nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Effort {
    /// Bytes that came from the source.
    pub fetched_bytes: u64,
    /// Microseconds of hashing.
    pub hashing_us: u64,
    /// Microseconds of handing bytes to the file system.
    pub writing_us: u64,
    /// Microseconds of making files durable and giving them their names.
    pub durable_us: u64,
}

/// A timeline in the making. It has no clock of its own: who changes it says how many microseconds have passed since the
/// beginning, and never fewer than before.
#[derive(Debug, Default)]
pub struct Course {
    timeline: Timeline,
    /// How many parts of the pull are in each stage, in the order of [`Stage::ALL`].
    parts: [u32; Stage::ALL.len()],
    /// When the stage it is in began.
    since_us: u64,
    now: Option<Stage>,
}

impl Course {
    /// Begins now, at 0, which is this time for people; milliseconds since the Unix epoch.
    pub fn begin(began_at_ms: u64) -> Course {
        let timeline = Timeline { began_at_ms, stages: Vec::new() };
        Course { timeline, now: Some(Stage::Bookkeeping), ..Course::default() }
    }

    /// A part begins to do this. The clock is read only if that changes the stage of the whole.
    pub fn enter(&mut self, stage: Stage, clock_us: impl FnOnce() -> u64) {
        self.parts[stage as usize] += 1;
        self.settle(clock_us);
    }

    /// A part no longer does this.
    pub fn leave(&mut self, stage: Stage, clock_us: impl FnOnce() -> u64) {
        let parts = &mut self.parts[stage as usize];
        *parts = parts.saturating_sub(1);
        self.settle(clock_us);
    }

    /// A part does something else.
    pub fn shift(&mut self, from: Stage, to: Stage, clock_us: impl FnOnce() -> u64) {
        let parts = &mut self.parts[from as usize];
        *parts = parts.saturating_sub(1);
        self.parts[to as usize] += 1;
        self.settle(clock_us);
    }

    /// Nothing counts any more; the whole. Later changes change nothing.
    pub fn end(&mut self, clock_us: u64) -> Timeline {
        if let Some(stage) = self.now.take() {
            self.charge(stage, clock_us);
        }
        self.timeline.clone()
    }

    /// The stage it is in, until it has ended.
    pub fn now(&self) -> Option<Stage> {
        self.now
    }

    /// As it stands at this time.
    pub fn so_far(&self, clock_us: u64) -> Timeline {
        let mut timeline = self.timeline.clone();
        if let Some(stage) = self.now {
            charge(&mut timeline.stages, stage, clock_us.saturating_sub(self.since_us));
        }
        timeline
    }

    fn foremost(&self) -> Stage {
        let is_entered = |stage: &&Stage| self.parts[**stage as usize] > 0;
        Stage::BY_PRECEDENCE.iter().find(is_entered).copied().unwrap_or(Stage::Bookkeeping)
    }

    fn settle(&mut self, clock_us: impl FnOnce() -> u64) {
        let foremost = self.foremost();
        if let Some(now) = self.now.filter(|now| *now != foremost) {
            self.charge(now, clock_us());
            self.now = Some(foremost);
        }
    }

    fn charge(&mut self, stage: Stage, clock_us: u64) {
        charge(&mut self.timeline.stages, stage, clock_us.saturating_sub(self.since_us));
        self.since_us = self.since_us.max(clock_us);
    }
}

fn charge(stages: &mut Vec<StageTime>, stage: Stage, took_us: u64) {
    match stages.iter_mut().find(|known| known.stage == stage) {
        Some(known) => known.took_us += took_us,
        None => stages.push(StageTime { stage, took_us }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn stages(timeline: &Timeline) -> Vec<(Stage, u64)> {
        timeline.stages.iter().map(|stage| (stage.stage, stage.took_us)).collect()
    }

    #[test]
    fn a_pull_is_in_the_foremost_stage_of_its_parts() {
        let mut course = Course::begin(5);
        course.enter(Stage::Queued, || 1);
        course.enter(Stage::Asking, || 3);
        course.enter(Stage::Receiving, || 10);
        // The clock is not read: bytes come all the same.
        course.enter(Stage::Writing, || panic!("the stage is as before"));
        course.leave(Stage::Queued, || panic!("the stage is as before"));
        assert_eq!(course.now(), Some(Stage::Receiving));
        course.leave(Stage::Receiving, || 100);
        assert_eq!(course.now(), Some(Stage::Writing));
        course.shift(Stage::Writing, Stage::Asking, || 107);
        course.shift(Stage::Asking, Stage::Receiving, || 110);
        let expected = [
            (Stage::Bookkeeping, 1),
            (Stage::Queued, 2),
            (Stage::Asking, 10),
            (Stage::Receiving, 91),
            (Stage::Writing, 7),
        ];
        assert_eq!(stages(&course.so_far(111)), expected);
        let whole = course.end(120);
        assert_eq!((whole.began_at_ms, whole.total_us(), course.now()), (5, 120, None));
        course.leave(Stage::Receiving, || panic!("it has ended"));
        assert_eq!(course.so_far(500), whole, "what comes after the end is not of it");
    }

    #[test]
    fn every_stage_has_one_place_one_precedence_and_one_name() {
        for (place, stage) in Stage::ALL.iter().enumerate() {
            assert_eq!(*stage as usize, place, "{stage:?}");
            assert_eq!(Stage::BY_PRECEDENCE.iter().filter(|other| *other == stage).count(), 1, "{stage:?}");
            assert_eq!(serde_json::to_value(stage).unwrap(), stage.text());
        }
    }

    proptest! {
        #[test]
        fn the_stages_sum_to_the_whole_whatever_the_parts_do(
            steps in proptest::collection::vec((0..Stage::ALL.len(), any::<bool>(), 0u64..1000), 0..200),
        ) {
            let (mut course, mut clock) = (Course::begin(0), 0);
            for (stage, enters, passed) in steps {
                clock += passed;
                let stage = Stage::ALL[stage];
                if enters { course.enter(stage, || clock) } else { course.leave(stage, || clock) }
                prop_assert_eq!(course.so_far(clock + 3).total_us(), clock + 3);
            }
            let whole = course.end(clock + 9);
            prop_assert_eq!(whole.total_us(), clock + 9);
            let mut seen = std::collections::BTreeSet::new();
            prop_assert!(whole.stages.iter().all(|stage| seen.insert(stage.stage.text())));
        }
    }
}

//! [`Row`]: what is measured, in which unit, beside what, and what it should be. The one list of rows.

use clap::ValueEnum;
use serde::Serialize;

/// In what a row is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Unit {
    #[serde(rename = "MB/s")]
    MegabytesPerSecond,
    /// Of processor time, all threads together, for 10⁹ bytes.
    #[serde(rename = "s/GB")]
    SecondsPerGigabyte,
    #[serde(rename = "MiB")]
    Mebibytes,
    #[serde(rename = "s")]
    Seconds,
    #[serde(rename = "ms")]
    Milliseconds,
    #[serde(rename = "us")]
    Microseconds,
    /// Of what it would be at best.
    #[serde(rename = "x")]
    Times,
    #[serde(rename = "req")]
    Requests,
    #[serde(rename = "bytes")]
    Bytes,
    #[serde(rename = "/s")]
    PerSecond,
}

impl Unit {
    pub(super) fn text(self) -> &'static str {
        match self {
            Unit::MegabytesPerSecond => "MB/s",
            Unit::SecondsPerGigabyte => "s/GB",
            Unit::Mebibytes => "MiB",
            Unit::Seconds => "s",
            Unit::Milliseconds => "ms",
            Unit::Microseconds => "µs",
            Unit::Times => "×",
            Unit::Requests => "req",
            Unit::Bytes => "B",
            Unit::PerSecond => "/s",
        }
    }
}

/// What a row should be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Target {
    AtLeast(f64),
    AtMost(f64),
    /// Of the row beside it.
    RatioAtLeast(f64),
    /// Of the row beside it.
    RatioAtMost(f64),
    /// More than the row beside it, in the unit of both.
    AboveByAtMost(f64),
}

/// What rows are measured together, because they need the same things to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Section {
    Processor,
    Disk,
    ColdPull,
    SlowSource,
    Resume,
    Repull,
    Crowd,
    Revision,
    Opens,
    Loads,
    Beside,
    Idle,
}

/// What is known of a row before it is measured.
#[derive(Debug, Clone, Copy)]
pub(super) struct Facts {
    pub(super) what: &'static str,
    pub(super) unit: Unit,
    pub(super) section: Section,
    /// What it is compared with.
    pub(super) beside: Option<Row>,
    pub(super) target: Option<Target>,
}

macro_rules! rows {
    ($($row:ident: $what:literal, $unit:ident, $section:ident, $beside:expr, $target:expr;)*) => {
        /// One line of the table; its name is what `--only` takes.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum)]
        pub(super) enum Row { $(#[doc = $what] $row,)* }

        impl Row {
            /// Every row, in the order of the table.
            pub(super) const ALL: &'static [Row] = &[$(Row::$row,)*];

            pub(super) fn facts(self) -> Facts {
                #[allow(unused_imports)]
                use {Row::*, Target::*};
                match self {
                    $(Row::$row => Facts {
                        what: $what, unit: Unit::$unit, section: Section::$section, beside: $beside, target: $target,
                    },)*
                }
            }
        }
    };
}

rows! {
    // What the machine gives.
    DirectWrite: "the disk: direct writes, several at a time, durable", MegabytesPerSecond, Disk, None, None;
    DirectRead: "the disk: direct reads of a model's files, several at a time", MegabytesPerSecond, Loads, None, None;
    DirectReadKept: "the same into memory that is new and stays, as a page cache is filled", MegabytesPerSecond, Loads, None, None;
    Receive: "loopback: receive from the origin and throw away", MegabytesPerSecond, ColdPull, None, None;
    Blake3: "BLAKE3 on one core", MegabytesPerSecond, Processor, None, None;
    Sha256: "SHA-256 on one core", MegabytesPerSecond, Processor, None, None;
    Descriptors: "connect, receive descriptors, map, first bytes: p50", Microseconds, Opens, None, None;
    DescriptorsP99: "the same: p99", Microseconds, Opens, None, None;
    DescriptorsCrowd: "the same by 1,000 clients at once: p99", Milliseconds, Opens, None, None;
    Process: "fork and exec of `/bin/true`: p50", Milliseconds, Opens, None, None;
    RoundTrip: "one metadata request to the origin, connect included", Milliseconds, Repull, None, None;
    Floor: "receive + BLAKE3 + direct write by a bare program, durable", MegabytesPerSecond, ColdPull, None, None;
    FloorCpu: "its processor time", SecondsPerGigabyte, ColdPull, None, None;
    FloorSync: "its fsync after the last byte", Milliseconds, ColdPull, None, None;
    // What larder does with it.
    ColdPull: "from nothing to descriptors in hand, durable", MegabytesPerSecond, ColdPull, Some(Floor),
        Some(RatioAtLeast(0.90));
    ColdPullCpu: "its processor time, BLAKE3 included", SecondsPerGigabyte, ColdPull, Some(FloorCpu), Some(AtMost(0.9));
    CheckedPull: "the same with the source's SHA-256", MegabytesPerSecond, ColdPull, Some(Floor), None;
    CheckedPullCpu: "its processor time, both hashes included", SecondsPerGigabyte, ColdPull, Some(FloorCpu),
        Some(AtMost(1.5));
    PullMemory: "most memory of the daemon in any of these pulls", Mebibytes, ColdPull, None, Some(AtMost(96.0));
    LastByte: "from the last byte sent to the reader unblocked", Milliseconds, ColdPull, Some(FloorSync),
        Some(AboveByAtMost(50.0));
    SlowSource: "20 ms away, 25 MB/s a connection: of what its connections give", Times, SlowSource, None,
        Some(AtLeast(0.90));
    SlowSourceCpu: "its processor time", SecondsPerGigabyte, SlowSource, Some(ColdPullCpu), None;
    Resume: "kill -9 at half: bytes of the origin in all", Times, Resume, None, Some(AtMost(1.02));
    Repull: "an unchanged model pulled again", Milliseconds, Repull, Some(RoundTrip), Some(AboveByAtMost(20.0));
    RepullRequests: "its requests to the origin", Requests, Repull, None, Some(AtMost(1.0));
    RepullBytes: "its bytes of files", Bytes, Repull, None, Some(AtMost(0.0));
    Crowd: "64 clients at once for one absent model: bytes of the origin", Times, Crowd, None, Some(AtMost(1.0));
    RevisionOrigin: "1 of 10 shards changed: bytes of the origin", Times, Revision, None, Some(AtMost(0.11));
    RevisionDisk: "both revisions on the disk", Times, Revision, None, Some(AtMost(1.11));
    Open: "warm open by `larder::client`, descriptors in hand: p50", Microseconds, Opens, Some(Descriptors),
        Some(AtMost(100.0));
    OpenP99: "the same: p99", Microseconds, Opens, Some(DescriptorsP99), Some(AtMost(500.0));
    OpenBare: "warm open by a bare client, mapped, first bytes: p50", Microseconds, Opens, Some(Descriptors), None;
    OpenBareP99: "the same: p99", Microseconds, Opens, Some(DescriptorsP99), None;
    OpenCrowd: "1,000 bare clients at once: p99", Milliseconds, Opens, Some(DescriptorsCrowd), Some(AtMost(20.0));
    OpenCommand: "`larder open` as a whole process: p50", Milliseconds, Opens, Some(Process), Some(AtMost(5.0));
    OpenCommandP99: "the same: p99", Milliseconds, Opens, None, None;
    WarmUp: "a cold model into the page cache", MegabytesPerSecond, Loads, Some(DirectRead), Some(RatioAtLeast(0.90));
    LoadPlain: "first load of a cold model, mapped, without warm-up", Seconds, Loads, None, None;
    LoadWarm: "the same with a warm-up begun by its open", Seconds, Loads, Some(LoadPlain), Some(RatioAtMost(0.5));
    LoadAlone: "first load of a quarter of it, with a warm-up", Seconds, Beside, None, None;
    LoadBesidePull: "the same while a pull that nobody waits for is under way", Seconds, Beside, Some(LoadAlone), None;
    LoadBesideWantedPull: "the same while a pull that somebody waits for is under way", Seconds, Beside, Some(LoadAlone), None;
    LoadBesideScrub: "the same while a scrub reads as fast as it can", Seconds, Beside, Some(LoadAlone), None;
    IdleMemory: "the daemon just started", Mebibytes, Idle, None, Some(AtMost(16.0));
    IdleMemoryAfterPull: "the daemon after a pull", Mebibytes, Idle, None, Some(AtMost(16.0));
    IdleWakeUps: "wake-ups of the idle daemon, all threads", PerSecond, Idle, None, None;
}

impl Row {
    /// As it is written in the table and after `--only`.
    pub(super) fn name(self) -> String {
        self.to_possible_value().expect("no row is skipped").get_name().to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_named_for_the_command_line() {
        assert_eq!((Row::ColdPullCpu.name(), Row::OpenP99.name()), ("cold-pull-cpu".into(), "open-p99".into()));
        let names: std::collections::BTreeSet<String> = Row::ALL.iter().map(|row| row.name()).collect();
        assert_eq!(names.len(), Row::ALL.len());
    }

    #[test]
    fn what_is_compared_is_in_one_unit() {
        for row in Row::ALL {
            let facts = row.facts();
            let beside = facts.beside.map(|other| other.facts().unit);
            assert!(beside.is_none_or(|unit| unit == facts.unit), "{row:?}");
            let relative = !matches!(facts.target, None | Some(Target::AtLeast(_) | Target::AtMost(_)));
            assert!(!relative || beside.is_some(), "{row:?} has a target relative to nothing");
        }
    }
}

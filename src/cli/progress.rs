//! How far a job is: a bar on a terminal, a line every ten seconds elsewhere.

use std::future::Future;
use std::pin::pin;
use std::time::Duration;

use futures::StreamExt;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::time::{Instant, MissedTickBehavior};

use super::door::Statuses;
use super::report::{plain, say};
use crate::cache::JobStatus;
use crate::fault::Problem;
use crate::model::Bytes;
use crate::wire::http::{Phase, PullStatus};

/// The time between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);
/// The time between two drawings of the bar, while nothing comes.
const DRAW_EVERY: Duration = Duration::from_millis(250);

/// Where progress is shown.
pub(super) enum Reporter {
    /// On a terminal.
    Bar(ProgressBar),
    /// Elsewhere: whole lines.
    Lines(Box<dyn FnMut(&str) + Send>),
    /// Nowhere: `--quiet`.
    Silent,
}

/// Makes the reporters of jobs that go on at once.
pub(super) enum Reporters {
    /// On a terminal: a line for each.
    Bars(MultiProgress),
    /// Elsewhere.
    Lines,
    /// Nowhere.
    Silent,
}

/// A job that is followed to its end, as it stands at one moment.
pub(super) trait Job: JobStatus {
    /// What is done to the reference.
    const DOING: &'static str;

    /// What it is about.
    fn reference(&self) -> &str;

    /// Bytes that are done, and bytes in all; 0 while those are not known.
    fn bytes(&self) -> (u64, u64);

    /// How far it is, in a line.
    fn summary(&self) -> String;

    /// What has changed, if it is worth a line.
    fn change(&self, before: Option<&Self>) -> Option<String>;
}

/// How the watching of a job ended.
#[derive(Debug)]
pub(super) enum Followed<J> {
    /// The job has ended, well or not.
    Ended(J),
    /// The watcher was interrupted; this is the last that was seen.
    Interrupted(Option<J>),
    /// Nothing more is heard of it.
    Lost,
}

impl Reporter {
    /// What fits standard error.
    pub(super) fn for_stderr(quiet: bool, terminal: bool) -> Reporter {
        if quiet {
            return Reporter::Silent;
        }
        if !terminal {
            return Reporter::Lines(Box::new(say));
        }
        Reporter::bar(ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr()))
    }

    fn bar(bar: ProgressBar) -> Reporter {
        let style =
            ProgressStyle::with_template("{spinner} [{bar:24}] {prefix}{wide_msg}").expect("the template is right");
        bar.set_style(style.progress_chars("=> "));
        bar.enable_steady_tick(DRAW_EVERY);
        Reporter::Bar(bar)
    }

    /// Shows a state that was just heard of.
    fn heard<J: Job>(&mut self, before: Option<&J>, now: &J) {
        match self {
            Reporter::Silent => {}
            Reporter::Lines(write) => {
                if let Some(said) = now.change(before) {
                    write(&line(now, &said));
                }
            }
            Reporter::Bar(bar) => {
                if before.is_none() {
                    bar.println(plain(&format!("{}{} {}", bar.prefix(), J::DOING, now.reference())));
                }
                let (done, total) = now.bytes();
                if total > 0 {
                    bar.set_length(total);
                    bar.set_position(done);
                }
                bar.set_message(plain(&now.summary()));
            }
        }
    }

    /// Shows that it is still being watched.
    fn still(&mut self, now: &impl Job) {
        if let Reporter::Lines(write) = self {
            write(&line(now, &now.summary()));
        }
    }

    /// Leaves the screen as if it had never been there.
    fn end(&mut self) {
        if let Reporter::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }

    /// Says that the model is here.
    pub(super) fn ready(&mut self, status: &PullStatus, took: Duration) {
        self.say(&ready(status, took));
    }

    /// Says how it ended.
    pub(super) fn say(&mut self, line: &str) {
        match self {
            Reporter::Silent => {}
            Reporter::Lines(write) => write(line),
            // Others may still be there.
            Reporter::Bar(bar) => {
                // The bar cannot be asked while it is suspended.
                let line = format!("{}{line}", bar.prefix());
                bar.suspend(|| say(&line));
            }
        }
    }
}

impl Reporters {
    /// What fits standard error.
    pub(super) fn for_stderr(quiet: bool, terminal: bool) -> Reporters {
        match (quiet, terminal) {
            (true, _) => Reporters::Silent,
            (false, true) => Reporters::Bars(MultiProgress::with_draw_target(ProgressDrawTarget::stderr())),
            (false, false) => Reporters::Lines,
        }
    }

    /// A reporter that says whose the job is before everything else.
    pub(super) fn of(&self, whose: &str) -> Reporter {
        let prefix = format!("{whose}: ");
        match self {
            Reporters::Silent => Reporter::Silent,
            Reporters::Lines => Reporter::Lines(Box::new(move |line: &str| say(&format!("{prefix}{line}")))),
            Reporters::Bars(bars) => Reporter::bar(bars.add(ProgressBar::no_length().with_prefix(plain(&prefix)))),
        }
    }
}

/// Watches a job until it ends or `interrupted` does.
pub(super) async fn follow<J: Job>(
    mut statuses: Statuses<J>,
    reporter: &mut Reporter,
    interrupted: impl Future<Output = ()>,
) -> Result<Followed<J>, Problem> {
    let mut lines = tokio::time::interval_at(Instant::now() + LINE_EVERY, LINE_EVERY);
    lines.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut interrupted = pin!(interrupted);
    let mut last: Option<J> = None;
    let followed = loop {
        tokio::select! {
            // What is known is shown before what was asked for: a job that has ended was not interrupted.
            biased;
            next = statuses.next() => match next {
                Some(Ok(now)) if now.is_final() => break Ok(Followed::Ended(now)),
                Some(Ok(now)) => {
                    reporter.heard(last.as_ref(), &now);
                    last = Some(now);
                }
                Some(Err(problem)) => break Err(problem),
                None => break Ok(Followed::Lost),
            },
            () = &mut interrupted => break Ok(Followed::Interrupted(last.take())),
            _ = lines.tick() => {
                if let Some(now) = &last {
                    reporter.still(now);
                }
            }
        }
    };
    reporter.end();
    followed
}

fn line<J: Job>(now: &J, said: &str) -> String {
    format!("{} {}: {said}", J::DOING, now.reference())
}

impl Job for PullStatus {
    const DOING: &'static str = "pulling";

    fn reference(&self) -> &str {
        &self.reference
    }

    fn bytes(&self) -> (u64, u64) {
        (self.bytes_done, self.bytes_total)
    }

    fn summary(&self) -> String {
        summary(self)
    }

    fn change(&self, before: Option<&PullStatus>) -> Option<String> {
        change(before, self)
    }
}

/// `43 % (1.2 of 2.8 GB), 310.0 MB/s, 2m10s to go, model-00002.safetensors`
pub(super) fn summary(status: &PullStatus) -> String {
    let mut parts = Vec::new();
    if status.bytes_total > 0 {
        parts.push(format!("{} % ({})", status.percent, of(status.bytes_done, status.bytes_total)));
    } else {
        parts.push(status.phase.text().to_owned());
    }
    match (&status.waiting, status.phase) {
        (Some(waiting), _) => parts.push(format!("waiting: {waiting}")),
        (None, Phase::Fetching) => {
            if status.bytes_per_second > 0 {
                parts.push(format!("{}/s", Bytes(status.bytes_per_second)));
            }
            parts.extend(status.eta_seconds.map(|seconds| format!("{} to go", span(Duration::from_secs(seconds)))));
            parts.extend(status.file.clone());
        }
        (None, phase) if status.bytes_total > 0 => parts.push(phase.text().to_owned()),
        (None, _) => {}
    }
    parts.join(", ")
}

/// What has changed, if it is worth a line: the start, another phase, the beginning of a wait.
fn change(before: Option<&PullStatus>, now: &PullStatus) -> Option<String> {
    let began = before.is_none_or(|before| before.phase != now.phase);
    let waits = now.waiting.is_some() && before.is_none_or(|before| before.waiting.is_none());
    Some(match (began, now.phase) {
        _ if waits => summary(now),
        (true, Phase::Fetching) => format!(
            "version {}, {} files, {}, {} to fetch",
            short(now.version.as_deref().unwrap_or("unknown")),
            now.files_total,
            Bytes(now.bytes_total),
            Bytes(now.bytes_total.saturating_sub(now.bytes_done))
        ),
        (true, phase) => phase.text().to_owned(),
        (false, _) => return None,
    })
}

/// `ready hf://…  2.8 GB in 12 s (2.1 GB from the source)`
fn ready(status: &PullStatus, took: Duration) -> String {
    format!(
        "ready {}  {} in {} ({} from the source)",
        status.reference,
        Bytes(status.bytes_total),
        took_text(took),
        Bytes(status.bytes_fetched)
    )
}

/// The start of a version: enough to recognise it by.
pub(super) fn short(version: &str) -> String {
    version.chars().take(12).collect()
}

/// `1.2 of 2.8 GB`, or `900.0 MB of 2.8 GB`.
pub(super) fn of(done: u64, total: u64) -> String {
    let (done, total) = (Bytes(done).to_string(), Bytes(total).to_string());
    match (done.split_once(' '), total.split_once(' ')) {
        (Some((number, unit)), Some((_, same))) if unit == same => format!("{number} of {total}"),
        _ => format!("{done} of {total}"),
    }
}

/// `2m10s`; whole seconds.
pub(super) fn span(time: Duration) -> String {
    humantime::format_duration(Duration::from_secs(time.as_secs())).to_string().replace(' ', "")
}

/// How long it took, as exactly as a person wants to know.
pub(super) fn took_text(took: Duration) -> String {
    match took.as_secs_f64() {
        seconds if seconds < 10.0 => format!("{seconds:.1} s"),
        seconds if seconds < 60.0 => format!("{seconds:.0} s"),
        _ => span(took),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use futures::{SinkExt, channel::mpsc};

    use super::*;
    use crate::cli::tests::status;

    fn fetching() -> PullStatus {
        PullStatus {
            phase: Phase::Fetching,
            version: Some("0123456789abcdef".into()),
            files_total: 12,
            bytes_done: 1_200_000_000,
            bytes_total: 2_800_000_000,
            percent: 43,
            bytes_per_second: 310_000_000,
            eta_seconds: Some(130),
            file: Some("model-00002.safetensors".into()),
            ..status("hf://o/n@main")
        }
    }

    #[test]
    fn a_summary_says_how_far_how_fast_how_long_and_what() {
        let now = fetching();
        assert_eq!(summary(&now), "43 % (1.2 of 2.8 GB), 310.0 MB/s, 2m10s to go, model-00002.safetensors");
        let slow = PullStatus { bytes_done: 900_000_000, bytes_per_second: 0, eta_seconds: None, file: None, ..now };
        assert_eq!(summary(&slow), "43 % (900.0 MB of 2.8 GB)");
    }

    #[test]
    fn a_summary_says_why_it_waits_instead_of_how_fast_it_is() {
        let waiting =
            PullStatus { waiting: Some("rate limited; next try at 12:04:31 (attempt 3)".into()), ..fetching() };
        assert_eq!(summary(&waiting), "43 % (1.2 of 2.8 GB), waiting: rate limited; next try at 12:04:31 (attempt 3)");
        assert_eq!(summary(&status("hf://o/n@main")), "resolving");
    }

    #[test]
    fn a_line_is_worth_a_start_a_phase_and_a_wait() {
        let (start, fetching) = (status("hf://o/n@main"), fetching());
        let waiting = PullStatus { waiting: Some("the connection broke".into()), ..fetching.clone() };
        let further = PullStatus { bytes_done: 1_300_000_000, ..fetching.clone() };
        let again = PullStatus { waiting: Some("it broke again".into()), ..waiting.clone() };
        let said = |before: Option<&PullStatus>, now| change(before, now);
        assert_eq!(said(None, &start).unwrap(), "resolving");
        assert_eq!(said(Some(&start), &fetching).unwrap(), "version 0123456789ab, 12 files, 2.8 GB, 1.6 GB to fetch");
        assert!(said(Some(&fetching), &waiting).unwrap().ends_with("waiting: the connection broke"));
        assert_eq!(said(Some(&fetching), &further), None);
        assert_eq!(said(Some(&waiting), &again), None, "waits that follow each other are told every ten seconds");
        assert_eq!(said(Some(&waiting), &further), None);
    }

    #[test]
    fn the_last_line_says_what_it_cost() {
        let done = PullStatus { bytes_fetched: 2_100_000_000, ..fetching() };
        let line = |took| ready(&done, took);
        assert_eq!(line(Duration::from_secs(12)), "ready hf://o/n@main  2.8 GB in 12 s (2.1 GB from the source)");
        assert!(line(Duration::from_millis(140)).contains(" in 0.1 s "));
        assert!(line(Duration::from_secs(3723)).contains(" in 1h2m3s "));
    }

    fn collecting() -> (Reporter, Arc<Mutex<Vec<String>>>) {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = lines.clone();
        (Reporter::Lines(Box::new(move |line: &str| sink.lock().unwrap().push(line.to_owned()))), lines)
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_terminal_there_is_a_line_every_ten_seconds() {
        let (mut sender, receiver) = mpsc::channel(1);
        let (mut reporter, lines) = collecting();
        let watched = tokio::spawn(async move {
            let followed = follow(receiver.boxed(), &mut reporter, std::future::pending()).await;
            (followed, reporter)
        });
        sender.send(Ok(fetching())).await.unwrap();
        tokio::time::sleep(Duration::from_secs(25)).await;
        assert_eq!(lines.lock().unwrap().len(), 3, "{lines:?}");
        assert_eq!(
            lines.lock().unwrap()[2],
            "pulling hf://o/n@main: 43 % (1.2 of 2.8 GB), 310.0 MB/s, 2m10s to go, model-00002.safetensors"
        );
        sender.send(Ok(PullStatus { phase: Phase::Ready, ..fetching() })).await.unwrap();
        let (followed, _) = watched.await.unwrap();
        assert!(matches!(followed, Ok(Followed::Ended(status)) if status.phase == Phase::Ready));
    }

    #[tokio::test(start_paused = true)]
    async fn an_interruption_tells_what_was_last_seen() {
        let (mut sender, receiver) = mpsc::channel(1);
        sender.send(Ok(fetching())).await.unwrap();
        let interrupted = tokio::time::sleep(Duration::from_secs(1));
        let followed = follow(receiver.boxed(), &mut Reporter::Silent, interrupted).await;
        assert!(matches!(followed, Ok(Followed::Interrupted(Some(status))) if status.percent == 43));
    }

    #[tokio::test]
    async fn a_bar_follows_the_bytes_and_is_gone_at_the_end() {
        let mut reporter = Reporter::for_stderr(false, true);
        let ready = PullStatus { phase: Phase::Ready, ..fetching() };
        let states = futures::stream::iter([Ok(status("hf://o/n@main")), Ok(fetching()), Ok(ready)]);
        follow(states.boxed(), &mut reporter, std::future::pending()).await.unwrap();
        let Reporter::Bar(bar) = reporter else { panic!("a terminal has a bar") };
        assert_eq!((bar.message(), bar.length(), bar.is_finished()), (summary(&fetching()), Some(2_800_000_000), true));
    }

    #[tokio::test]
    async fn of_several_jobs_each_says_whose_it_is() {
        let reporters = Reporters::for_stderr(false, true);
        let (mut first, second) = (reporters.of("n1"), reporters.of("n2"));
        let states = futures::stream::iter([Ok(fetching()), Ok(PullStatus { phase: Phase::Ready, ..fetching() })]);
        follow(states.boxed(), &mut first, std::future::pending()).await.unwrap();
        // Beside the line of the second, which is still there.
        first.ready(&fetching(), Duration::from_secs(1));
        let (Reporter::Bar(first), Reporter::Bar(second)) = (first, second) else { panic!("a terminal has bars") };
        assert_eq!((first.prefix(), first.is_finished()), ("n1: ".to_owned(), true));
        assert_eq!((second.prefix(), second.is_finished()), ("n2: ".to_owned(), false));
    }

    #[tokio::test]
    async fn a_stream_that_just_ends_is_lost() {
        let nothing: Statuses<PullStatus> = futures::stream::empty().boxed();
        let followed = follow(nothing, &mut Reporter::Silent, std::future::pending()).await;
        assert!(matches!(followed, Ok(Followed::Lost)));
    }
}

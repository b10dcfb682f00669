//! Whatever a source does, the bytes are right or there is an error.

use std::sync::Arc;
use std::time::Duration;

use larder::fault::{Code, Diagnose};
use larder::model::{Digester, Verified};
use larder::source::{Environment, Error, OnWait, RetryPolicy, SourceConfig, Sources};

use crate::support::hostile_origin::{Fault, HostileOrigin, ListingFault, seeds};
use crate::support::raw_http::Asked;
use crate::support::source_contract::collect;

const TIMEOUT: Duration = Duration::from_secs(30);

fn sources() -> Sources {
    let config = SourceConfig { connect_timeout: TIMEOUT, stall_timeout: TIMEOUT, environment: None };
    Sources::new(config, Environment::default())
}

/// Every file of the listing, each fetched in ranges as a pull does. A file that its checksum refuses is left out.
async fn read_all(sources: &Sources, origin: &HostileOrigin) -> Result<Vec<(String, Vec<u8>)>, Error> {
    let policy =
        RetryPolicy { first_wait: Duration::from_millis(10), stall_timeout: TIMEOUT, ..RetryPolicy::default() };
    let source: Arc<dyn larder::source::Source> = sources.open(&origin.url.parse().unwrap())?.into();
    let quiet: OnWait = Arc::new(|attempt| {
        assert!(attempt.wait <= Duration::from_secs(661), "waits {:?}: {}", attempt.wait, attempt.error);
        Box::new(())
    });
    let listing = policy.resolve(&*source, &quiet).await?;
    let mut read = Vec::new();
    for file in listing.files() {
        let mut digester = Digester::new(file.checksum, file.size);
        let mut bytes = Vec::new();
        let third = file.size.div_ceil(3).max(1);
        for start in (0..file.size).step_by(third as usize) {
            let range = start..file.size.min(start + third);
            let part = collect(policy.fetch(source.clone(), file.clone(), range.clone(), quiet.clone())).await?;
            assert_eq!(part.len() as u64, range.end - range.start, "{} {range:?}", file.path);
            digester.update(&part);
            bytes.extend(part);
        }
        if let Verified::As(_) = digester.finish() {
            read.push((file.path.to_string(), bytes));
        }
    }
    Ok(read)
}

fn assert_right(origin: &HostileOrigin, read: &[(String, Vec<u8>)], rerun: &str) {
    for (path, bytes) in read {
        let right = &origin.files[path];
        // Without a checksum, the other version is a version; a mixture of the two never is.
        let other_version = !origin.has_checksums() && *bytes == HostileOrigin::changed(right);
        assert!(bytes == right || other_version, "wrong bytes of {path} were accepted: {rerun}");
    }
}

fn assert_speaks_plainly(error: &Error, rerun: &str) {
    let text = error.to_string();
    assert!(!text.chars().any(char::is_control), "{text:?} would reach a terminal: {rerun}");
    assert!(text.len() < 1500, "{text:?} is too long: {rerun}");
}

#[tokio::test(start_paused = true)]
async fn bytes_from_a_hostile_origin_are_right_or_there_is_an_error() {
    let sources = sources();
    let (mut whole, mut failed) = (0, 0);
    let seeds = seeds(200);
    for &seed in &seeds {
        let origin = HostileOrigin::start(seed, false).await;
        let outcome = origin.in_no_time(read_all(&sources, &origin)).await;
        let rerun = origin.how_to_rerun("bytes_from_a_hostile_origin");
        let leaked = |asked: &Asked| asked.header("authorization").or(asked.header("cookie")).is_some();
        assert!(!origin.asked_elsewhere().iter().any(leaked), "{:?}: {rerun}", origin.asked_elsewhere());
        match outcome {
            Ok(read) => {
                assert_eq!(origin.listing_fault(), None, "a listing that must be refused was taken: {rerun}");
                assert_right(&origin, &read, &rerun);
                whole += 1;
            }
            Err(error) => {
                assert_speaks_plainly(&error, &rerun);
                failed += 1;
            }
        }
    }
    println!("{whole} of {} seeds were read, {failed} refused", seeds.len());
    assert!(seeds.len() == 1 || (whole > 0 && failed > 0), "{whole} read, {failed} refused: the faults prove nothing");
}

#[tokio::test(start_paused = true)]
async fn an_origin_that_heals_is_read_whole_in_the_end() {
    let sources = sources();
    for seed in seeds(60) {
        let origin = HostileOrigin::start(seed, true).await;
        // Each round uses up at least one fault, or succeeds.
        let mut done = false;
        for _ in 0..=HostileOrigin::FAULTS_BEFORE_HEALED {
            if let Ok(read) = origin.in_no_time(read_all(&sources, &origin)).await
                && read.len() == origin.files.len()
            {
                assert_right(&origin, &read, &origin.how_to_rerun("an_origin_that_heals"));
                done = true;
                break;
            }
        }
        assert!(done, "{}", origin.how_to_rerun("an_origin_that_heals"));
    }
}

#[tokio::test(start_paused = true)]
async fn a_listing_that_cannot_become_a_directory_is_refused_as_a_whole() {
    let sources = sources();
    for fault in ListingFault::all() {
        let origin = HostileOrigin::with_listing(fault).await;
        let error = origin.in_no_time(read_all(&sources, &origin)).await.expect_err(&format!("{fault:?} was taken"));
        let expected = match fault {
            ListingFault::NegativeSize | ListingFault::NotJson | ListingFault::Endless => Code::SourceProtocol,
            ListingFault::BadChecksum | ListingFault::LinkToMetadata => Code::SourceProtocol,
            _ => Code::UnsafeName,
        };
        assert_eq!(error.code(), expected, "{fault:?}: {error}");
        assert_speaks_plainly(&error, &format!("{fault:?}"));
        assert!(!origin.log().contains("weights"), "{fault:?}: files of a listing that is refused were asked for");
    }
}

#[tokio::test(start_paused = true)]
async fn each_fault_alone_is_mended_or_told() {
    let sources = sources();
    for fault in Fault::ALL {
        let origin = HostileOrigin::with_one(fault).await;
        let outcome = origin.in_no_time(read_all(&sources, &origin)).await;
        let expected = match fault {
            Fault::Changed | Fault::RangeOfAnotherTotal => Err(Code::SourceChanged),
            Fault::Denied => Err(Code::AuthMissing),
            Fault::Gone => Err(Code::FileNotFound),
            Fault::RedirectToMetadata | Fault::RedirectWithUser | Fault::RedirectToNowhere => Err(Code::SourceProtocol),
            // The file is refused by its checksum, the others are read.
            Fault::ChangedBehindTheSameEtag | Fault::FlippedBit => Ok(origin.files.len() - 1),
            _ => Ok(origin.files.len()),
        };
        if let Ok(read) = &outcome {
            assert_right(&origin, read, &format!("{fault:?}"));
        }
        let found = outcome.as_ref().map(Vec::len).map_err(|error| error.code());
        assert_eq!(found, expected, "{fault:?}: {:?}\n{}", outcome.err(), origin.log());
    }
}

//! A disk that takes calls and does not answer: a file system that is frozen while pulls write to it.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use futures::StreamExt;
use futures::future::{join_all, select_all};
use larder::client::Client;
use larder::fault::Code;
use larder::wire::http::{LeaseTerms, OpenRequest, Phase, PullRequest, Readiness};
use tokio::time::{Instant, timeout};

use super::checker::{self, Promised};
use super::gated_origin::GatedOrigin;
use super::larder::{Home, Running};
use super::loop_disk::{Kind, LoopDisk};
use super::models::{Models, bytes};
use super::row::{Row, size};
use super::skip::skipped;

const PULLS: usize = 4;
const FILE_BYTES: usize = 12 << 20;
/// More than wait for their turn, and than there are threads to wait on.
const LEASES: usize = 600;
/// Most bytes of memory that a stalled daemon may take more than before: its budget for pulls, and as much again for
/// connections, threads and the allocator.
const MORE_MEMORY_BYTES: u64 = 64 << 20;
/// Longest wait for an answer: a bound against hanging, not a measurement.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// Asks a daemon over TCP, as a kubelet or Prometheus does.
struct Asker {
    client: reqwest::Client,
    address: String,
}

impl Asker {
    fn of(daemon: &Running) -> Asker {
        let client = reqwest::Client::builder().no_proxy().tls_certs_only([]).timeout(MAX_WAIT).build().unwrap();
        Asker { client, address: format!("http://{}", daemon.tcp_address()) }
    }

    async fn get(&self, path: &str) -> (u16, String) {
        let answer = self.client.get(format!("{}{path}", self.address)).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    /// Asks again and again, until it is ready or not.
    async fn readiness(&self, ready: bool) -> Readiness {
        let end = Instant::now() + MAX_WAIT;
        loop {
            let (status, text) = self.get("/readyz").await;
            let seen: Readiness = serde_json::from_str(&text).unwrap();
            assert_eq!(status == 200, seen.ready);
            if seen.ready == ready {
                return seen;
            }
            assert!(Instant::now() < end, "{seen:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

fn resident_bytes(daemon: &Running) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", daemon.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_stalls_is_told_and_all_goes_on_when_it_answers() {
    let home = Home::new();
    let disk = match LoopDisk::new(Kind::Ext4, 256, &home.root()) {
        Ok(disk) => disk,
        Err(why) => return skipped(&why),
    };
    let mut models = Models::default();
    let here = models.put(home.path(), "here", &[("own.bin", bytes("here", 5_000))]);
    let mut origins = Vec::new();
    for at in 0..PULLS {
        let files = BTreeMap::from([("own.bin".to_owned(), bytes(&format!("own {at}"), FILE_BYTES))]);
        let origin = GatedOrigin::start(files.clone()).await;
        models.are_at(&origin.reference(), files);
        origins.push(origin);
    }
    let outside = checker::outside_of(&home);
    let path = home.done(&["pull", "-q", &here]).await;
    let mut row = Row::new("a disk that stalls (for 60 s in the long version)");
    let case = async {
        let mut daemon = home.serve().await;
        let (client, asker) = (Client::new(&home.socket()), Asker::of(&daemon));
        assert!(asker.readiness(true).await.waiting_for.is_empty());
        let mut pulls = Vec::new();
        for origin in &origins {
            origin.allow_more(1 << 20);
            let pull = client.pull(&PullRequest::of(origin.reference())).await.unwrap();
            pulls.push(client.watch(&pull.id).await.unwrap());
        }
        // They share the memory; one has come as far as its origin lets it.
        select_all(origins.iter().map(|origin| Box::pin(origin.held()))).await;
        let before = resident_bytes(&daemon);
        let frozen = disk.freeze();
        for origin in &origins {
            origin.allow_more(FILE_BYTES as u64);
        }

        let seen = asker.readiness(false).await;
        let why = seen.waiting_for.concat();
        assert!(
            why.starts_with("disk-stalled: ") && why.contains(" has not answered for 1") && why.contains("; look ")
        );
        assert_eq!(asker.get("/livez").await, (200, "ok".to_owned()));
        // Those that need a write wait, or are told; the others do not notice.
        let leases = (0..LEASES).map(|at| {
            let lease = LeaseTerms { holder: Some(format!("worker-{at}")), ..LeaseTerms::default() };
            let (client, request) = (client.clone(), OpenRequest { lease: Some(lease), ..OpenRequest::of(&here) });
            tokio::spawn(async move { client.open(&request).await })
        });
        let leases: Vec<_> = leases.collect();
        let silent_for = Duration::from_secs(size(0, 60) as u64);
        let began = Instant::now();
        loop {
            let opened = timeout(MAX_WAIT, home.done(&["open", &here])).await;
            assert_eq!(opened.expect("it needs no write"), path);
            let (status, metrics) = asker.get("/metrics").await;
            assert!(status == 200 && metrics.contains("\nlarder_models 1\n"), "{metrics}");
            assert!(!asker.readiness(false).await.ready);
            if began.elapsed() >= silent_for {
                break;
            }
        }
        let more = resident_bytes(&daemon).saturating_sub(before);
        assert!(more < MORE_MEMORY_BYTES, "{more} bytes more than before");

        drop(frozen);
        let mut taken = 0;
        for answer in join_all(leases).await {
            match answer.unwrap() {
                Ok(opened) => taken += usize::from(opened.lease.is_some()),
                Err(problem) => assert_eq!(problem.code, Code::DiskStalled, "{problem}"),
            }
        }
        assert!(taken > 0, "those that waited got it");
        assert!(asker.readiness(true).await.waiting_for.is_empty());
        for states in pulls {
            let last = states.collect::<Vec<_>>().await.pop().expect("a pull has a last state").unwrap();
            assert_eq!(last.phase, Phase::Ready, "{last:?}");
        }
        daemon.terminate();
        assert!(daemon.ended().await.0.success() && !daemon.said().contains("panicked"), "{}", daemon.said());
        let mut promised = Promised { here: [here.clone()].into(), ..Promised::default() };
        promised.here.extend(origins.iter().map(GatedOrigin::reference));
        checker::check(&home, &models, &promised, &outside).await;
    };
    row.case("freeze and thaw", case).await;
    row.end();
}

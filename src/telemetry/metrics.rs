//! Every metric, in one list: [`METRICS`]. Base units only: bytes and seconds.

use std::fmt::Write;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Metric, Registry};

/// Content type of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// One metric as it is documented.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Described {
    /// As it is scraped.
    pub name: &'static str,
    /// Label names.
    pub labels: &'static [&'static str],
    /// What it counts. No full stop: the encoder adds it.
    pub help: &'static str,
}

const fn described(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Described {
    Described { name, labels, help }
}

/// Every metric. A metric that is not here cannot be registered.
pub const METRICS: &[Described] = &[
    described("larder_build_info", &["version"], "The program's version; the value is always 1"),
    described("larder_pulls_total", &["outcome"], "Pulls that ended: ready, unchanged, failed or cancelled"),
    described("larder_pull_failures_total", &["fault", "code"], "Pulls that failed, by class and code of the error"),
    described("larder_pull_duration_seconds", &["outcome"], "From asking for a pull to its end"),
    described("larder_origin_bytes_total", &[], "Bytes of models fetched from sources"),
    described("larder_avoided_bytes_total", &[], "Bytes that pulls needed and found on this disk"),
    described("larder_source_retries_total", &["code"], "Requests to sources made again, by code of the failure"),
    described("larder_opens_total", &["outcome"], "Opens: hit if the model was local, miss if not"),
    described("larder_warms_total", &["outcome"], "Warm-ups that ended: warm, stopped, failed or cancelled"),
    described("larder_warm_read_bytes_total", &[], "Bytes that warm-ups read from the disk or the page cache"),
    described(
        "larder_index_rebuilds_total",
        &[],
        "Times the index could not be opened and was rebuilt from the records",
    ),
    described(
        "larder_proofs_total",
        &["outcome"],
        "Blobs hashed again because something touched them: right, renewed (right, but writable by others) or wrong",
    ),
    described("larder_snapshots_mended_total", &[], "Directories of models that were not as larder left them"),
    described("larder_scrubbed_bytes_total", &[], "Bytes of blobs read from the disk by scrubbing"),
    described("larder_scrub_findings_total", &["found"], "Blobs that scrubbing found wrong, missing or unreadable"),
    described("larder_swept_bytes_total", &[], "Bytes of nameless files that were cleared away"),
    described("larder_evictions_total", &["rule"], "Models evicted: for a pull, quota, min-free or by request"),
    described("larder_evicted_bytes_total", &[], "Bytes of the disk that evictions gave back"),
    described("larder_http_requests_total", &["route", "status"], "Answers of the HTTP API"),
    described("larder_http_request_duration_seconds", &["route"], "From a request to the head of its answer"),
    described("larder_models", &[], "Models that are local and whole"),
    described("larder_blob_bytes", &[], "Bytes of the disk that blobs take, each counted once"),
    described(
        "larder_deleted_open_bytes",
        &[],
        "Bytes of the disk that removed blobs take because somebody has them open",
    ),
    described("larder_reserved_bytes", &[], "Bytes promised to pulls under way"),
    described("larder_quota_bytes", &[], "Most bytes models may use; absent if only the file system limits them"),
    described("larder_free_bytes", &[], "Bytes the file system of the volume would still give"),
    described("larder_min_free_bytes", &[], "Bytes of them that are left to others"),
    described("larder_holders_unknown", &[], "1 if who uses what cannot be known, so that nothing is evicted; else 0"),
    described(
        "larder_pods_unknown",
        &[],
        "1 if which pods are gone cannot be known, so that their leases are kept; else 0; absent outside of Kubernetes",
    ),
    described("larder_pulls_active", &[], "Pulls under way"),
    described("larder_leases", &["kind"], "Leases that are held: by a pod, by a name or by a connection"),
    described("larder_volume_read_only", &[], "1 if the volume takes no more writes, else 0"),
    described(
        "larder_resident_bytes",
        &[],
        "Bytes of blobs that are in the page cache, measured some seconds ago; absent if the kernel does not tell",
    ),
    described(
        "larder_model_resident_bytes",
        &["model", "reference"],
        "Bytes of a model that are in the page cache; only with `serve.metrics_by_model`",
    ),
    described("process_resident_memory_bytes", &[], "Memory of this process that is in RAM"),
    described("process_open_fds", &[], "Open file descriptors of this process"),
];

/// How a pull ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PullOutcome {
    /// Bytes came and the model is local.
    Ready,
    /// The version the source has was local already.
    Unchanged,
    /// It ended with an error.
    Failed,
    /// Somebody took it back.
    Cancelled,
}

impl PullOutcome {
    /// Every outcome: each is exported from the start, so that a rate over it has a beginning.
    pub const ALL: [PullOutcome; 4] =
        [PullOutcome::Ready, PullOutcome::Unchanged, PullOutcome::Failed, PullOutcome::Cancelled];

    /// Label value.
    pub fn text(self) -> &'static str {
        match self {
            PullOutcome::Ready => "ready",
            PullOutcome::Unchanged => "unchanged",
            PullOutcome::Failed => "failed",
            PullOutcome::Cancelled => "cancelled",
        }
    }
}

/// How a warm-up ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WarmOutcome {
    /// The model is resident.
    Warm,
    /// Not all of it is.
    Stopped,
    /// It ended with an error.
    Failed,
    /// Somebody took it back.
    Cancelled,
}

impl WarmOutcome {
    /// Every outcome: each is exported from the start, so that a rate over it has a beginning.
    pub const ALL: [WarmOutcome; 4] =
        [WarmOutcome::Warm, WarmOutcome::Stopped, WarmOutcome::Failed, WarmOutcome::Cancelled];

    /// Label value.
    pub fn text(self) -> &'static str {
        match self {
            WarmOutcome::Warm => "warm",
            WarmOutcome::Stopped => "stopped",
            WarmOutcome::Failed => "failed",
            WarmOutcome::Cancelled => "cancelled",
        }
    }
}

impl EncodeLabelValue for WarmOutcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        encoder.write_str(self.text())
    }
}

impl EncodeLabelValue for PullOutcome {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> std::fmt::Result {
        encoder.write_str(self.text())
    }
}

/// Why a model was evicted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum EvictionRule {
    /// A pull needed the room.
    Pull,
    /// Use was over the quota.
    Quota,
    /// The file system had less free than it should.
    MinFree,
    /// Somebody asked for room.
    Request,
}

impl EvictionRule {
    /// Every rule: each is exported from the start, so that a rate over it has a beginning.
    pub const ALL: [EvictionRule; 4] =
        [EvictionRule::Pull, EvictionRule::Quota, EvictionRule::MinFree, EvictionRule::Request];

    /// Label value.
    pub fn text(self) -> &'static str {
        match self {
            EvictionRule::Pull => "pull",
            EvictionRule::Quota => "quota",
            EvictionRule::MinFree => "min-free",
            EvictionRule::Request => "request",
        }
    }
}

/// What hashing a blob again found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProofOutcome {
    /// Its bytes are right.
    Right,
    /// Its bytes are right, but others could write it: another inode took its place.
    Renewed,
    /// Its bytes are wrong: it is in quarantine.
    Wrong,
}

impl ProofOutcome {
    /// Every outcome.
    pub const ALL: [ProofOutcome; 3] = [ProofOutcome::Right, ProofOutcome::Renewed, ProofOutcome::Wrong];

    /// Label value.
    pub fn text(self) -> &'static str {
        match self {
            ProofOutcome::Right => "right",
            ProofOutcome::Renewed => "renewed",
            ProofOutcome::Wrong => "wrong",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: PullOutcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RuleLabel {
    rule: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct KindLabel {
    kind: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WarmLabel {
    outcome: WarmOutcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ModelLabel {
    model: String,
    reference: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TextLabel {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FoundLabel {
    found: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FailureLabel {
    fault: &'static str,
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct CodeLabel {
    code: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteStatusLabel {
    route: String,
    status: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteLabel {
    route: String,
}

/// What only a scrape asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Gauges {
    /// Models that are local and whole.
    pub models: u64,
    /// Bytes of the disk that blobs take.
    pub blob_bytes: u64,
    /// Bytes of the disk that removed blobs take because somebody has them open.
    pub deleted_open_bytes: u64,
    /// Bytes promised to pulls.
    pub reserved_bytes: u64,
    /// The quota, if there is one.
    pub quota_bytes: Option<u64>,
    /// Bytes the file system would still give.
    pub free_bytes: u64,
    /// Bytes of them that are left to others.
    pub min_free_bytes: u64,
    /// Whether nothing is evicted, because who uses what cannot be known.
    pub holders_unknown: bool,
    /// Whether leases of pods are kept, because which pods are gone cannot be known; `None` where nobody ever could.
    pub pods_unknown: Option<bool>,
    /// Pulls under way.
    pub pulls_active: u64,
    /// Leases by the kind of their holder.
    pub leases: LeaseCounts,
    /// Whether the volume takes no more writes.
    pub volume_read_only: bool,
    /// Bytes of blobs that are in the page cache, if the kernel tells.
    pub resident_bytes: Option<u64>,
    /// The same of each model, where that is wanted.
    pub resident_models: Vec<ResidentModel>,
}

/// What of a model is in the page cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResidentModel {
    /// The id of the version.
    pub model: String,
    /// What it was pulled as.
    pub reference: String,
    /// Bytes.
    pub bytes: u64,
}

/// How many leases are held, by the kind of their holder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LeaseCounts {
    /// By pods.
    pub pods: u64,
    /// By names.
    pub names: u64,
    /// By connections.
    pub connections: u64,
}

type Histograms<L> = Family<L, Histogram, fn() -> Histogram>;

/// The counters of one daemon. No global: a test has its own.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    pulls: Family<OutcomeLabel, Counter>,
    pull_failures: Family<FailureLabel, Counter>,
    pull_seconds: Histograms<OutcomeLabel>,
    origin_bytes: Counter,
    avoided_bytes: Counter,
    source_retries: Family<CodeLabel, Counter>,
    opens: Family<TextLabel, Counter>,
    warms: Family<WarmLabel, Counter>,
    warm_read_bytes: Counter,
    index_rebuilds: Counter,
    proofs: Family<TextLabel, Counter>,
    snapshots_mended: Counter,
    scrubbed_bytes: Counter,
    scrub_findings: Family<FoundLabel, Counter>,
    swept_bytes: Counter,
    evictions: Family<RuleLabel, Counter>,
    evicted_bytes: Counter,
    http_requests: Family<RouteStatusLabel, Counter>,
    http_seconds: Histograms<RouteLabel>,
}

/// A tenth of a second (nothing to fetch) to four hours (a very large model on a slow line).
fn pull_seconds() -> Histogram {
    Histogram::new([
        0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0, 7200.0, 14400.0,
    ])
}

/// Half a millisecond (an open) to ten seconds (a removal of a large model).
fn http_seconds() -> Histogram {
    Histogram::new([0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0])
}

/// Registers `metric` as [`METRICS`] describes it. The library adds `_total` and `_info` by the type, so they are taken off.
fn register(registry: &mut Registry, name: &str, metric: impl Metric) {
    let described = METRICS.iter().find(|d| d.name == name).expect("a metric is registered that METRICS does not list");
    let stem = name.strip_suffix("_total").or(name.strip_suffix("_info")).unwrap_or(name);
    registry.register(stem, described.help, metric);
}

impl Default for Metrics {
    fn default() -> Metrics {
        Metrics::new()
    }
}

impl Metrics {
    /// All counters at zero.
    pub fn new() -> Metrics {
        let mut metrics = Metrics {
            registry: Registry::default(),
            pulls: Family::default(),
            pull_failures: Family::default(),
            pull_seconds: Family::new_with_constructor(pull_seconds),
            origin_bytes: Counter::default(),
            avoided_bytes: Counter::default(),
            source_retries: Family::default(),
            opens: Family::default(),
            warms: Family::default(),
            warm_read_bytes: Counter::default(),
            index_rebuilds: Counter::default(),
            proofs: Family::default(),
            snapshots_mended: Counter::default(),
            scrubbed_bytes: Counter::default(),
            scrub_findings: Family::default(),
            swept_bytes: Counter::default(),
            evictions: Family::default(),
            evicted_bytes: Counter::default(),
            http_requests: Family::default(),
            http_seconds: Family::new_with_constructor(http_seconds),
        };
        for found in ["wrong", "missing", "unreadable"] {
            drop(metrics.scrub_findings.get_or_create(&FoundLabel { found }));
        }
        for outcome in PullOutcome::ALL {
            drop(metrics.pulls.get_or_create(&OutcomeLabel { outcome }));
        }
        for outcome in WarmOutcome::ALL {
            drop(metrics.warms.get_or_create(&WarmLabel { outcome }));
        }
        for outcome in ["hit", "miss"] {
            drop(metrics.opens.get_or_create(&TextLabel { outcome }));
        }
        for outcome in ProofOutcome::ALL {
            drop(metrics.proofs.get_or_create(&TextLabel { outcome: outcome.text() }));
        }
        for rule in EvictionRule::ALL {
            drop(metrics.evictions.get_or_create(&RuleLabel { rule: rule.text() }));
        }
        let to = &mut metrics.registry;
        register(to, "larder_build_info", Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]));
        register(to, "larder_pulls_total", metrics.pulls.clone());
        register(to, "larder_pull_failures_total", metrics.pull_failures.clone());
        register(to, "larder_pull_duration_seconds", metrics.pull_seconds.clone());
        register(to, "larder_origin_bytes_total", metrics.origin_bytes.clone());
        register(to, "larder_avoided_bytes_total", metrics.avoided_bytes.clone());
        register(to, "larder_source_retries_total", metrics.source_retries.clone());
        register(to, "larder_opens_total", metrics.opens.clone());
        register(to, "larder_warms_total", metrics.warms.clone());
        register(to, "larder_warm_read_bytes_total", metrics.warm_read_bytes.clone());
        register(to, "larder_index_rebuilds_total", metrics.index_rebuilds.clone());
        register(to, "larder_proofs_total", metrics.proofs.clone());
        register(to, "larder_snapshots_mended_total", metrics.snapshots_mended.clone());
        register(to, "larder_scrubbed_bytes_total", metrics.scrubbed_bytes.clone());
        register(to, "larder_scrub_findings_total", metrics.scrub_findings.clone());
        register(to, "larder_swept_bytes_total", metrics.swept_bytes.clone());
        register(to, "larder_evictions_total", metrics.evictions.clone());
        register(to, "larder_evicted_bytes_total", metrics.evicted_bytes.clone());
        register(to, "larder_http_requests_total", metrics.http_requests.clone());
        register(to, "larder_http_request_duration_seconds", metrics.http_seconds.clone());
        metrics
    }

    /// A pull ended, `seconds` after it was asked for.
    pub fn pull_ended(&self, outcome: PullOutcome, seconds: f64) {
        self.pulls.get_or_create(&OutcomeLabel { outcome }).inc();
        self.pull_seconds.get_or_create(&OutcomeLabel { outcome }).observe(seconds);
    }

    /// Why a pull failed: class and code of the error. Comes besides [`Metrics::pull_ended`].
    pub fn pull_failed(&self, fault: &'static str, code: &'static str) {
        self.pull_failures.get_or_create(&FailureLabel { fault, code }).inc();
    }

    /// Bytes came from a source.
    pub fn origin_bytes(&self, bytes: u64) {
        self.origin_bytes.inc_by(bytes);
    }

    /// A pull needed bytes that were here already.
    pub fn avoided_bytes(&self, bytes: u64) {
        self.avoided_bytes.inc_by(bytes);
    }

    /// A request to a source is made again because of `code`.
    pub fn source_retry(&self, code: &'static str) {
        self.source_retries.get_or_create(&CodeLabel { code }).inc();
    }

    /// Somebody asked for a model's directory; `hit`: it was there.
    pub fn opened(&self, hit: bool) {
        self.opens.get_or_create(&TextLabel { outcome: if hit { "hit" } else { "miss" } }).inc();
    }

    /// A warm-up ended, having read so many bytes.
    pub fn warm_ended(&self, outcome: WarmOutcome, read_bytes: u64) {
        self.warms.get_or_create(&WarmLabel { outcome }).inc();
        self.warm_read_bytes.inc_by(read_bytes);
    }

    /// The index was rebuilt.
    pub fn index_rebuilt(&self) {
        self.index_rebuilds.inc();
    }

    /// A blob was hashed again.
    pub fn proved(&self, outcome: ProofOutcome) {
        self.proofs.get_or_create(&TextLabel { outcome: outcome.text() }).inc();
    }

    /// Scrubbing reads bytes.
    pub fn scrubbed(&self, bytes: u64) {
        self.scrubbed_bytes.inc_by(bytes);
    }

    /// Scrubbing found a blob that is not right.
    pub fn scrub_found(&self, found: &'static str) {
        self.scrub_findings.get_or_create(&FoundLabel { found }).inc();
    }

    /// A directory was laid out again, because it was not as it was left.
    pub fn snapshot_mended(&self) {
        self.snapshots_mended.inc();
    }

    /// Nameless files were cleared away.
    pub fn swept(&self, bytes: u64) {
        self.swept_bytes.inc_by(bytes);
    }

    /// A request was answered. `route` is a pattern of the router, never a path somebody sent: those are without number.
    pub fn http_answered(&self, route: &str, status: u16, took: Duration) {
        let route = route.to_owned();
        self.http_seconds.get_or_create(&RouteLabel { route: route.clone() }).observe(took.as_secs_f64());
        self.http_requests.get_or_create(&RouteStatusLabel { route, status }).inc();
    }

    /// A model was evicted, which gave `bytes` of the disk back.
    pub fn evicted(&self, rule: EvictionRule, bytes: u64) {
        self.evictions.get_or_create(&RuleLabel { rule: rule.text() }).inc();
        self.evicted_bytes.inc_by(bytes);
    }

    /// All metrics as OpenMetrics text; `gauges` are the numbers of this moment.
    pub fn encode(&self, gauges: &Gauges) -> String {
        let mut now = Registry::default();
        let mut gauge = |name, value: Option<u64>| {
            if let Some(value) = value {
                register(&mut now, name, ConstGauge::new(value));
            }
        };
        gauge("larder_models", Some(gauges.models));
        gauge("larder_blob_bytes", Some(gauges.blob_bytes));
        gauge("larder_deleted_open_bytes", Some(gauges.deleted_open_bytes));
        gauge("larder_reserved_bytes", Some(gauges.reserved_bytes));
        gauge("larder_quota_bytes", gauges.quota_bytes);
        gauge("larder_free_bytes", Some(gauges.free_bytes));
        gauge("larder_min_free_bytes", Some(gauges.min_free_bytes));
        gauge("larder_holders_unknown", Some(u64::from(gauges.holders_unknown)));
        gauge("larder_pods_unknown", gauges.pods_unknown.map(u64::from));
        gauge("larder_pulls_active", Some(gauges.pulls_active));
        gauge("larder_volume_read_only", Some(u64::from(gauges.volume_read_only)));
        let leases = Family::<KindLabel, Gauge<u64, AtomicU64>>::default();
        let LeaseCounts { pods, names, connections } = gauges.leases;
        for (kind, held) in [("pod", pods), ("name", names), ("connection", connections)] {
            leases.get_or_create(&KindLabel { kind }).set(held);
        }
        gauge("larder_resident_bytes", gauges.resident_bytes);
        gauge("process_resident_memory_bytes", resident_bytes());
        gauge("process_open_fds", open_fds());
        register(&mut now, "larder_leases", leases);
        if !gauges.resident_models.is_empty() {
            let family = Family::<ModelLabel, Gauge<u64, AtomicU64>>::default();
            for ResidentModel { model, reference, bytes } in gauges.resident_models.iter().cloned() {
                family.get_or_create(&ModelLabel { model, reference }).set(bytes);
            }
            register(&mut now, "larder_model_resident_bytes", family);
        }

        let mut body = String::with_capacity(16 * 1024);
        text::encode_registry(&mut body, &self.registry)
            .and_then(|()| text::encode_registry(&mut body, &now))
            .and_then(|()| text::encode_eof(&mut body))
            .expect("writing to a string does not fail");
        body
    }
}

fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kib: u64 = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?.split_whitespace().next()?.parse().ok()?;
    Some(kib * 1024)
}

fn open_fds() -> Option<u64> {
    let entries = std::fs::read_dir("/proc/self/fd").ok()?.count() as u64;
    // The directory being read is one of them.
    Some(entries.saturating_sub(1))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn everything() -> String {
        let metrics = Metrics::new();
        metrics.pull_ended(PullOutcome::Ready, 3.0);
        metrics.pull_failed("full", "volume-full");
        metrics.origin_bytes(10);
        metrics.avoided_bytes(20);
        metrics.source_retry("rate-limited");
        metrics.opened(true);
        metrics.warm_ended(WarmOutcome::Stopped, 40);
        metrics.index_rebuilt();
        metrics.proved(ProofOutcome::Wrong);
        metrics.snapshot_mended();
        metrics.swept(30);
        metrics.evicted(EvictionRule::MinFree, 80);
        metrics.http_answered("/v1/models", 200, Duration::from_millis(2));
        let model = ResidentModel { model: "0123456789abcdef".into(), reference: "hf://o/\"n".into(), bytes: 60 };
        metrics.encode(&Gauges {
            models: 4,
            quota_bytes: Some(50),
            pods_unknown: Some(true),
            volume_read_only: true,
            resident_bytes: Some(70),
            resident_models: vec![model],
            ..Gauges::default()
        })
    }

    #[test]
    fn what_is_encoded_is_what_is_listed() {
        let text = everything();
        let mut found = BTreeSet::new();
        for line in text.lines().filter_map(|l| l.strip_prefix("# TYPE ")) {
            let (name, kind) = line.split_once(' ').unwrap();
            found.insert(match kind {
                "counter" => format!("{name}_total"),
                "info" => format!("{name}_info"),
                _ => name.to_owned(),
            });
        }
        let listed: BTreeSet<String> = METRICS.iter().map(|d| d.name.to_owned()).collect();
        assert_eq!(found, listed);
        for described in METRICS {
            for label in described.labels {
                let mut samples = text.lines().filter(|l| l.starts_with(described.name));
                assert!(samples.any(|l| l.contains(&format!("{label}=\""))), "{} has no {label}", described.name);
            }
        }
    }

    #[test]
    fn samples_are_what_was_counted() {
        let text = everything();
        for line in [
            "larder_pulls_total{outcome=\"ready\"} 1",
            "larder_pulls_total{outcome=\"cancelled\"} 0",
            "larder_pull_failures_total{fault=\"full\",code=\"volume-full\"} 1",
            "larder_pull_duration_seconds_bucket{le=\"2.0\",outcome=\"ready\"} 0",
            "larder_pull_duration_seconds_bucket{le=\"5.0\",outcome=\"ready\"} 1",
            "larder_proofs_total{outcome=\"wrong\"} 1",
            "larder_proofs_total{outcome=\"right\"} 0",
            "larder_snapshots_mended_total 1",
            "larder_origin_bytes_total 10",
            "larder_avoided_bytes_total 20",
            "larder_source_retries_total{code=\"rate-limited\"} 1",
            "larder_opens_total{outcome=\"hit\"} 1",
            "larder_opens_total{outcome=\"miss\"} 0",
            "larder_index_rebuilds_total 1",
            "larder_warms_total{outcome=\"stopped\"} 1",
            "larder_warms_total{outcome=\"warm\"} 0",
            "larder_warm_read_bytes_total 40",
            "larder_resident_bytes 70",
            "larder_model_resident_bytes{model=\"0123456789abcdef\",reference=\"hf://o/\\\"n\"} 60",
            "larder_swept_bytes_total 30",
            "larder_evictions_total{rule=\"min-free\"} 1",
            "larder_evictions_total{rule=\"pull\"} 0",
            "larder_evicted_bytes_total 80",
            "larder_http_requests_total{route=\"/v1/models\",status=\"200\"} 1",
            "larder_models 4",
            "larder_quota_bytes 50",
            "larder_pods_unknown 1",
            "larder_volume_read_only 1",
        ] {
            assert!(text.lines().any(|l| l == line), "`{line}` is missing in\n{text}");
        }
        assert!(text.ends_with("# EOF\n"));
        assert_eq!(text.matches("# EOF").count(), 1);
    }

    #[test]
    fn without_a_quota_there_is_no_number_for_it() {
        assert!(!Metrics::new().encode(&Gauges::default()).contains("larder_quota_bytes"));
    }
}

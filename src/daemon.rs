//! Builds everything, runs it, drains it.

mod config_file;
mod membership;

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::config::{Config, ScrubConfig};
use crate::fault::{Code, Problem};
use crate::heap;
use crate::kubernetes::NodePods;
use crate::serve::{self, Door, Listener, ReadyLatches, fd};
use crate::source::{Environment, Sources};
use crate::telemetry::{self, Metrics, Traces};

use config_file::ConfigFile;
use membership::Membership;

/// How often the daemon does what nobody asks for.
const TEND_EVERY: Duration = Duration::from_secs(5);
/// How long a drain waits for pulls to pause.
const DRAIN_DEADLINE: Duration = Duration::from_secs(5);

/// The keys that are applied to a running daemon.
const APPLIED_AT_ONCE: [&str; 5] =
    ["volume.quota", "volume.low_water", "volume.min_free", "volume.min_residency", "pull.pinned"];

const REPORT: &str = "report this with the log";

/// Takes the volume and builds the cache over it, without any door: what the command line uses when no daemon answers.
pub async fn build_cache(config: &Config) -> Result<(Cache, Arc<Metrics>), Problem> {
    // A limit on the size of files (RLIMIT_FSIZE) is then an error of the write, as on a full disk, and not our end.
    let _ignored = signal(SignalKind::from_raw(Signal::XFSZ.as_raw())).map_err(no_signals)?;
    let metrics = Arc::new(Metrics::new());
    let sources = Sources::new(config.sources(), Environment::of_process());
    let (cache_config, counted) = (config.cache(), metrics.clone());
    let cache = blocking(move || Cache::start(cache_config, sources, counted)).await??;
    Ok((cache, metrics))
}

/// Looks at the volume beside the process that holds it: lists and opens, changes nothing.
pub async fn build_view(config: &Config) -> Result<Cache, Problem> {
    let config = config.cache();
    Ok(blocking(move || Cache::view(config, Arc::new(Metrics::new()))).await??)
}

/// Logs as configured, runs until SIGTERM or SIGINT, then drains. SIGHUP, and a change of the configuration file, reads the
/// configuration again with `reload`.
pub async fn run(config: &Config, reload: impl Fn() -> Result<Config, Problem>) -> Result<(), Problem> {
    telemetry::init(config.log.format, &config.log.filter).map_err(|error| {
        let action = "write `log.filter` as in `info` or `info,larder=debug`";
        Problem::new(Code::ConfigInvalid, format!("cannot start logging: {error}"), action)
    })?;
    let mut terminate = signal(SignalKind::terminate()).map_err(no_signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(no_signals)?;
    let mut hangup = signal(SignalKind::hangup()).map_err(no_signals)?;
    // A start may take long, and what changes meanwhile is not missed.
    let mut file = config.file().and_then(ConfigFile::watch);
    let daemon = Daemon::start(config).await?;
    let (cache, mut config) = (daemon.cache.clone(), config.clone());
    let asked = async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => return "SIGTERM",
                _ = interrupt.recv() => return "SIGINT",
                _ = hangup.recv() => {}
                () = or_never(file.as_mut().map(ConfigFile::changed)) => {}
            }
            config = reloaded(&cache, config, reload()).await;
        }
    };
    daemon.run_until(asked).await;
    Ok(())
}

/// Waits for what may happen; for ever if there is nothing that could.
async fn or_never(event: Option<impl Future<Output = ()>>) {
    match event {
        Some(event) => event.await,
        None => std::future::pending().await,
    }
}

/// Applies what can change while the daemon runs, and says what cannot. A configuration with mistakes changes nothing.
async fn reloaded(cache: &Cache, running: Config, read: Result<Config, Problem>) -> Config {
    let next = match read {
        Ok(next) => next,
        Err(problem) => {
            tracing::error!(code = %problem.code, "the configuration is not applied: {problem}");
            return running;
        }
    };
    let changed = next.differences(&running);
    let (applied, later): (Vec<_>, Vec<_>) = changed.into_iter().partition(|key| APPLIED_AT_ONCE.contains(key));
    let (cache, pinned, limits) = (cache.clone(), next.pull.pinned.clone(), next.volume.limits);
    let apply = move || {
        cache.set_limits(limits);
        // Also when the list is as before: what could not be pulled then is tried again now.
        cache.keep_pinned(&pinned);
        cache.keep_room();
    };
    if let Err(problem) = blocking(apply).await {
        tracing::error!(code = %problem.code, "the limits and the pinned models are not applied: {problem}");
    }
    tracing::info!(?applied, at_the_next_start = ?later, "configuration read again");
    next
}

/// A daemon that is up: its volume is recovered and its doors are open.
pub struct Daemon {
    cache: Cache,
    latches: ReadyLatches,
    socket: PathBuf,
    tcp: Option<SocketAddr>,
    doors: Vec<JoinHandle<()>>,
    tending: JoinHandle<()>,
    membership: Option<Membership>,
    traces: Option<Traces>,
    shutdown: CancellationToken,
}

impl Daemon {
    /// Order: volume and recovery, then the doors, then the pulls a former run left and what is pinned. Ready when it
    /// returns.
    pub async fn start(config: &Config) -> Result<Daemon, Problem> {
        let (cache, metrics) = build_cache(config).await?;
        let traces = traces_of_process();
        traces.iter().for_each(|traces| cache.trace_with(traces.clone()));
        let latches = ReadyLatches::new();
        let starting = latches.hold("start-up");
        let shutdown = CancellationToken::new();
        let most = fd::most_connections(fd::raise_descriptor_limit());
        let frames = fd::Frames::new(cache.clone(), most, shutdown.clone());
        let door = Door { cache: cache.clone(), metrics, latches: latches.clone(), shutdown: shutdown.clone() };
        let (router, health_router) = (serve::router(door.clone()), serve::health_router(door));

        let socket = serve::bind_unix(&config.serve.socket).await.map_err(|e| Problem::of(&e))?;
        let listener = bound(config.serve.listen).await?;
        let health_listener = bound(config.serve.health_listen).await?;
        let network_listener = bound(config.serve.network_listen).await?;
        let addresses = [&listener, &health_listener, &network_listener].map(|l| l.as_ref()?.tcp_address());
        let doorkeeper = match &network_listener {
            Some(_) => Some(Arc::new(membership::doorkeeper(&config.serve.network_accounts).await?)),
            None => None,
        };
        let pods = match &config.serve.pod_socket {
            Some(path) => Some(serve::bind_for_pods(path).await.map_err(|e| Problem::of(&e))?),
            None => None,
        };
        let listen = |l, router, frames| tokio::spawn(serve::listen(l, router, frames, shutdown.clone()));
        let mut doors = vec![listen(socket, router.clone(), Some(frames.clone()))];
        doors.extend(listener.map(|l| listen(l, router.clone(), None)));
        doors.extend(health_listener.map(|l| listen(l, health_router, None)));
        doors.extend(
            network_listener
                .zip(doorkeeper)
                .map(|(l, doorkeeper)| listen(l, router.layer(Extension(doorkeeper)), None)),
        );
        doors.extend(pods.map(|pods| tokio::spawn(fd::listen_to_pods(pods, frames))));

        let (resuming, pinned) = (cache.clone(), config.pull.pinned.clone());
        blocking(move || {
            resuming.resume_pending();
            resuming.keep_pinned(&pinned);
            resuming.pull_pinned();
        })
        .await?;
        let membership = Membership::begin(&config.kubernetes, &cache, &latches).await?;
        let tending =
            tokio::spawn(tend(cache.clone(), config.scrub.clone(), membership.as_ref().map(Membership::pods)));
        drop(starting);
        let [listen, health, network] = addresses;
        tracing::info!(
            root = %config.volume.root.display(), socket = %config.serve.socket.display(),
            pod_socket = config.serve.pod_socket.as_deref().map(|path| tracing::field::display(path.display())),
            listen = listen.map(tracing::field::display), health_listen = health.map(tracing::field::display),
            network_listen = network.map(tracing::field::display), "ready"
        );
        Ok(Daemon {
            cache,
            latches,
            socket: config.serve.socket.clone(),
            tcp: listen,
            doors,
            tending,
            membership,
            traces,
            shutdown,
        })
    }

    /// The Unix socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The TCP address, if it listens on one.
    pub fn tcp_address(&self) -> Option<SocketAddr> {
        self.tcp
    }

    /// Runs until `asked` says why to stop, then drains: stops accepting, answers what is in flight, pauses pulls, flushes,
    /// and gives the volume back.
    pub async fn run_until(self, asked: impl Future<Output = &'static str>) {
        let reason = asked.await;
        tracing::info!(reason, "draining");
        let _unready = self.latches.hold("shutting down");
        if let Some(membership) = self.membership {
            membership.end().await;
        }
        self.shutdown.cancel();
        for door in self.doors {
            if let Err(error) = door.await {
                tracing::error!(%error, "a door did not close cleanly");
            }
        }
        self.tending.abort();
        self.cache.drain(DRAIN_DEADLINE).await;
        if let Some(traces) = self.traces {
            let _ = blocking(move || traces.end()).await;
        }
        tracing::info!("stopped");
    }
}

/// Traces are no reason not to start.
fn traces_of_process() -> Option<Traces> {
    Traces::of_process().unwrap_or_else(|error| {
        let action = "write OTEL_EXPORTER_OTLP_ENDPOINT as in `http://collector.observability:4318`";
        tracing::error!(%error, action, "no traces are sent");
        None
    })
}

async fn bound(address: Option<SocketAddr>) -> Result<Option<Listener>, Problem> {
    match address {
        Some(address) => Ok(Some(serve::bind_tcp(address).await.map_err(|e| Problem::of(&e))?)),
        None => Ok(None),
    }
}

/// Does from time to time what nobody asks for: writes recency, so that a crash loses seconds of it; ends leases; makes
/// room where others have taken it; pulls what is pinned and not here; scrubs. Leases of pods end as soon as those go.
async fn tend(cache: Cache, scrub: ScrubConfig, pods: Option<Arc<NodePods>>) {
    let mut ticks = tokio::time::interval(TEND_EVERY);
    let mut missing = Backoff::new();
    let mut ticked = 0u64;
    loop {
        tokio::select! {
            _ = ticks.tick() => ticked += 1,
            () = or_never(pods.as_ref().map(|pods| pods.some_went())) => {
                let cache = cache.clone();
                if blocking(move || cache.end_leases()).await.is_err() {
                    return;
                }
                continue;
            }
        }
        let tended = cache.clone();
        let due = missing.is_due(cache.lacks_pinned());
        let scrub = scrub.clone();
        // The first tick comes with the start; by the next one, what starting and the first requests needed is over.
        let settled = ticked == 2;
        let work = blocking(move || {
            if settled {
                heap::give_back();
            }
            tended.flush();
            tended.end_leases();
            tended.keep_room();
            if due {
                tended.pull_pinned();
            }
            if let Some(rate) = scrub.rate {
                tended.scrub_in_background(rate.0, scrub.every);
            }
        });
        if work.await.is_err() {
            return;
        }
    }
}

/// When to try again what keeps failing: at first soon, then ever less often.
struct Backoff {
    wait: Duration,
    due: Option<Instant>,
}

impl Backoff {
    const FIRST: Duration = Duration::from_secs(60);
    const LONGEST: Duration = Duration::from_secs(3600);

    fn new() -> Backoff {
        Backoff { wait: Backoff::FIRST, due: None }
    }

    /// Whether to try now, when `needed`.
    fn is_due(&mut self, needed: bool) -> bool {
        if !needed {
            *self = Backoff::new();
            return false;
        }
        let now = Instant::now();
        match self.due {
            Some(due) if now >= due => {
                self.wait = (self.wait * 2).min(Backoff::LONGEST);
                self.due = Some(now + self.wait);
                true
            }
            Some(_) => false,
            None => {
                self.due = Some(now + self.wait);
                false
            }
        }
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Problem> {
    let broken = |error| Problem::new(Code::InternalError, format!("cannot work with the volume: {error}"), REPORT);
    tokio::task::spawn_blocking(work).await.map_err(broken)
}

fn no_signals(error: std::io::Error) -> Problem {
    Problem::new(Code::InternalError, format!("cannot listen for signals: {error}"), REPORT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_keeps_failing_is_tried_ever_less_often_and_afresh_when_it_is_needed_again() {
        let mut backoff = Backoff::new();
        let mut tried = Vec::new();
        for minute in 0..300u64 {
            if backoff.is_due(true) {
                tried.push(minute);
            }
            tokio::time::advance(Duration::from_secs(60)).await;
        }
        assert_eq!(tried, [1, 3, 7, 15, 31, 63, 123, 183, 243]);
        assert!(!backoff.is_due(false));
        assert!(!backoff.is_due(true));
        tokio::time::advance(Backoff::FIRST).await;
        assert!(backoff.is_due(true));
    }
}

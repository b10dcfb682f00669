//! What our node says of itself to the cluster: labels for what is here, events for what went wrong, and no taint any more
//! when what is pinned is here.
//!
//! Nothing waits for the API server, with one exception: a label goes before the model does, for at most [`MAX_WITHDRAWAL`].

use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher::DefaultBackoff;
use serde_json::json;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::happening::{Happening, Happenings, NAMESPACE};
use super::notice::{Notice, Told};
use super::{Cluster, Error, Found, answer};
use crate::cache::{self, Cache};
use crate::fault::Problem;
use crate::model::ModelId;
use crate::wire::http::EvictionInfo;

/// Who has set a field, for server-side apply.
const FIELD_MANAGER: &str = "larder";
/// Longest time that an eviction waits until its label is gone.
const MAX_WITHDRAWAL: Duration = Duration::from_secs(3);
/// Longest time that a shutdown waits until the node says that it is not ready.
const MAX_FAREWELL: Duration = Duration::from_secs(2);
/// Longest name of who reports an event, in bytes.
const MAX_REPORTER_BYTES: usize = 128;

/// Tells the cluster about one node.
pub struct NodeAnnouncer {
    node: String,
    /// The key of the taint that goes when everything that is pinned is here.
    startup_taint: Option<String>,
    state: Mutex<State>,
    /// The API server has taken a notice.
    applied: Condvar,
    /// There is something to tell.
    changed: Notify,
}

struct State {
    ready: bool,
    models: Vec<Told>,
    /// How many have gone so far.
    evicted: u64,
    /// Ids of models that are about to go.
    leaving: Vec<String>,
    /// `None` before the first look: what a former process has told stays until then.
    wanted: Option<Notice>,
    /// Which notice is wanted, and which the API server has.
    version: u64,
    applied: u64,
    taint: Taint,
    happenings: Happenings,
    trouble: Option<Found>,
}

/// What is to become of the taint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Taint {
    Stays,
    Goes,
    /// Or there never was one.
    Gone,
}

impl NodeAnnouncer {
    /// Of this node, which is not ready yet and has no model. The taint with this key is taken off once.
    pub fn new(node: &str, startup_taint: Option<String>) -> NodeAnnouncer {
        let taint = if startup_taint.is_some() { Taint::Stays } else { Taint::Gone };
        let state = State {
            ready: false,
            models: Vec::new(),
            evicted: 0,
            leaving: Vec::new(),
            wanted: None,
            version: 0,
            applied: 0,
            taint,
            happenings: Happenings::new(Instant::now()),
            trouble: None,
        };
        let (applied, changed) = (Condvar::new(), Notify::new());
        NodeAnnouncer { node: node.to_owned(), startup_taint, state: Mutex::new(state), applied, changed }
    }

    /// Looks what there is to tell. Asks nobody.
    pub fn look_at(&self, cache: &Cache, ready: bool) {
        let evicted = self.state().evicted;
        let (models, pulls, lacks_pinned) = (Told::of(cache.models()), cache.pulls(), cache.lacks_pinned());
        self.change(|state| {
            // What was looked at may have gone since: then the next look tells.
            if state.evicted == evicted {
                state.models = models;
            }
            state.ready = ready;
            state.happenings.look_at(&pulls, Instant::now());
            if state.taint == Taint::Stays && ready && !lacks_pinned {
                state.taint = Taint::Goes;
            }
        });
    }

    /// No model can be opened here now. Which notice says so.
    pub fn is_not_ready(&self) -> u64 {
        self.change(|state| state.ready = false)
    }

    /// The node is not ready any more. Waits, but not long, until the API server knows. Blocking.
    pub fn say_farewell(&self) {
        let version = self.is_not_ready();
        if !self.is_applied(version, MAX_FAREWELL) {
            tracing::warn!(node = self.node, "the node still says that it is ready: the API server does not answer");
        }
    }

    /// Whether the API server has this notice or a later one, after waiting for that. Blocking.
    fn is_applied(&self, version: u64, most: Duration) -> bool {
        let waited = self.applied.wait_timeout_while(self.state(), most, |state| state.applied < version);
        !waited.expect("no panic while the state is held").1.timed_out()
    }

    /// Keeps telling. Never ends: what fails is said once and tried again, ever less often.
    pub async fn tell(&self, cluster: Cluster) {
        let mut backoff = DefaultBackoff::default();
        loop {
            match self.tell_all(&cluster).await {
                Ok(()) => {
                    self.state().trouble = None;
                    self.changed.notified().await;
                }
                Err(found) => {
                    self.say(found);
                    sleep(backoff.next().expect("it has no last one")).await;
                }
            }
        }
    }

    async fn tell_all(&self, cluster: &Cluster) -> Result<(), Found> {
        if self.state().has_nothing_to_tell() {
            return Ok(());
        }
        // Seldom enough for a connection of its own, and the token is the one of now.
        let client = cluster.client()?;
        let nodes: Api<PartialObjectMeta<Node>> = Api::all(client.clone());
        loop {
            let unapplied = self.state().unapplied();
            let Some((version, notice)) = unapplied else { break };
            let params = PatchParams::apply(FIELD_MANAGER).force();
            let body = Patch::Apply(notice.applied_to(&self.node));
            answer(nodes.patch(&self.node, &params, &body)).await?;
            self.state().applied = version;
            self.applied.notify_all();
        }
        let taint = self.state().taint;
        if taint == Taint::Goes {
            self.take_taint_off(Api::all(client.clone())).await?;
            self.state().taint = Taint::Gone;
        }
        let events: Api<Event> = Api::namespaced(client, NAMESPACE);
        loop {
            let next = self.state().happenings.next();
            let Some(happening) = next else { return Ok(()) };
            let told = answer(events.create(&PostParams::default(), &self.event(&happening))).await;
            // What is refused is refused again.
            if let Err(found) = told {
                if !matches!(found, Found::Refused { .. }) {
                    self.state().happenings.put_back(happening);
                }
                return Err(found);
            }
        }
    }

    fn event(&self, happening: &Happening) -> Event {
        let at = humantime::format_rfc3339_micros(SystemTime::now()).to_string();
        let reporter = &self.node[..self.node.floor_char_boundary(MAX_REPORTER_BYTES)];
        let event = happening.on(&self.node, reporter, &at, &format!("larder-{:016x}", fastrand::u64(..)));
        serde_json::from_value(event).expect("it is an event")
    }

    /// Taints are one list, which others change too: so only if nobody has meanwhile.
    async fn take_taint_off(&self, nodes: Api<Node>) -> Result<(), Found> {
        let Some(key) = &self.startup_taint else { return Ok(()) };
        let node = answer(nodes.get(&self.node)).await?;
        let before = node.spec.and_then(|spec| spec.taints).unwrap_or_default();
        let kept: Vec<_> = before.iter().filter(|taint| taint.key != *key).collect();
        if kept.len() == before.len() {
            return Ok(());
        }
        let metadata = json!({"resourceVersion": node.metadata.resource_version});
        let body = Patch::Merge(json!({"metadata": metadata, "spec": {"taints": kept}}));
        answer(nodes.patch(&self.node, &PatchParams::default(), &body)).await?;
        tracing::info!(node = self.node, taint = key, "everything that is pinned is here: the node takes pods");
        Ok(())
    }

    /// Which notice is wanted after it.
    fn change(&self, change: impl FnOnce(&mut State)) -> u64 {
        let mut state = self.state();
        change(&mut state);
        let State { ready, models, leaving, .. } = &*state;
        let wanted = Some(Notice::of(*ready, models.iter().filter(|model| !leaving.contains(&model.id))));
        if wanted != state.wanted {
            state.wanted = wanted;
            state.version += 1;
        }
        if !state.has_nothing_to_tell() {
            self.changed.notify_one();
        }
        state.version
    }

    /// Logged when it begins and when it becomes another one.
    fn say(&self, found: Found) {
        let before = self.state().trouble.replace(found.clone());
        if found.is_news_after(before.as_ref()) {
            let error = Error { what: format!("tell the cluster about node `{}`", self.node), found };
            let Problem { code, message, action, .. } = Problem::of(&error);
            tracing::warn!(%code, action, error = message, "labels and events of the node are not those of now");
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while the state is held")
    }
}

impl State {
    fn has_nothing_to_tell(&self) -> bool {
        self.applied == self.version && self.taint != Taint::Goes && self.happenings.is_empty()
    }

    fn unapplied(&self) -> Option<(u64, Notice)> {
        let notice = self.wanted.clone().filter(|_| self.applied < self.version)?;
        Some((self.version, notice))
    }
}

impl cache::Announcer for NodeAnnouncer {
    fn withdraw(&self, models: &[ModelId]) {
        // Also if that changes nothing here: the API server may have what a former process has told.
        let version = self.change(|state| state.leaving.extend(models.iter().map(ModelId::to_string)));
        if !self.is_applied(version, MAX_WITHDRAWAL) {
            tracing::warn!(
                node = self.node,
                "the labels of models that are evicted could not be taken off in time: a pod may still be sent here for them"
            );
        }
    }

    fn settled(&self, models: &[ModelId]) {
        self.change(|state| {
            for id in models.iter().map(ModelId::to_string) {
                if let Some(at) = state.leaving.iter().position(|leaving| *leaving == id) {
                    state.leaving.swap_remove(at);
                }
            }
        });
    }

    fn evicted(&self, eviction: &EvictionInfo) {
        self.change(|state| {
            state.evicted += 1;
            state.models.retain(|model| model.id != eviction.model);
            state.happenings.add(Happening::of_eviction(eviction), Instant::now());
        });
    }
}

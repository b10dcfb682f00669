//! [`Tunnel`]: a Unix socket on this machine that leads to the larder of a pod.
//!
//! Each connection to it is one port-forward of the API server, which ends at the loopback of the pod: so whoever can ask a daemon
//! on a Unix socket can ask it there, and nothing has to listen on the network of pods.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

use futures::FutureExt;
use kube::api::Portforwarder;
use tokio::io::{copy, split};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

use super::daemons::{Daemon, Daemons};
use super::{Found, answer, quoted};

/// Where larder listens in its pod, as `daemonset/base/config.toml` says.
pub const POD_PORT: u16 = 7437;

/// Open until it is dropped; whoever put the socket somewhere takes it away.
pub struct Tunnel {
    end: Arc<FarEnd>,
    _accepting: AbortOnDropHandle<()>,
}

/// Why a connection failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trouble {
    /// The API server did not begin the port-forward.
    ApiServer(Found),
    /// The port-forward did not reach larder; in the words of the cluster, or what the pod waits for.
    Pod(String),
}

/// Where a tunnel leads.
struct FarEnd {
    daemons: Daemons,
    node: String,
    /// The pod that was on the node when it was last looked.
    pod: Mutex<String>,
    /// Of the last connection, if it failed.
    trouble: Mutex<Option<Trouble>>,
}

impl Tunnel {
    /// Listens on the socket, which must be where nobody else can reach it: whoever does is to the cluster who made the tunnel.
    pub(super) fn open(daemons: &Daemons, node: &str, pod: &str, socket: &Path) -> io::Result<Tunnel> {
        let listener = UnixListener::bind(socket)?;
        let (pod, trouble) = (Mutex::new(pod.to_owned()), Mutex::default());
        let end = Arc::new(FarEnd { daemons: daemons.clone(), node: node.to_owned(), pod, trouble });
        let accepting = tokio::spawn(accept(listener, end.clone()));
        Ok(Tunnel { end, _accepting: AbortOnDropHandle::new(accepting) })
    }

    /// The pod that is on the node, as far as is known.
    pub fn pod(&self) -> String {
        self.end.pod().clone()
    }

    /// Why the last connection failed, if it did.
    pub fn trouble(&self) -> Option<Trouble> {
        self.end.trouble().clone()
    }
}

async fn accept(listener: UnixListener, end: Arc<FarEnd>) {
    // They end with us.
    let mut connections = JoinSet::new();
    while let Ok((mut local, _)) = listener.accept().await {
        while connections.try_join_next().is_some() {}
        let end = end.clone();
        connections.spawn(async move {
            let forwarded = end.forward(&mut local).await;
            // Before `local` ends, so that who sees the end can ask why.
            *end.trouble() = forwarded.err();
        });
    }
}

impl FarEnd {
    /// Carries bytes both ways, until one side ends or the pod cannot be reached.
    async fn forward(&self, local: &mut UnixStream) -> Result<(), Trouble> {
        let mut forwarder = self.reach().await?;
        let both = forwarder.take_stream(POD_PORT).zip(forwarder.take_error(POD_PORT));
        let (remote, refused) = both.expect("what is taken once for a port that was asked for is there");
        let (mut from_pod, mut to_pod) = split(remote);
        let (mut from_client, mut to_client) = local.split();
        // HTTP has no use for half a connection. How it ends is for those who speak over it.
        tokio::select! {
            _ = copy(&mut from_pod, &mut to_client) => {}
            _ = copy(&mut from_client, &mut to_pod) => {}
        }
        // A reason comes before the end, and the client has not seen that yet.
        match refused.now_or_never().flatten() {
            Some(said) => Err(Trouble::Pod(quoted(said.trim()))),
            None => Ok(()),
        }
    }

    /// Begins a port-forward to the pod; or, if it is gone, to the one that has come to the node in its place.
    async fn reach(&self) -> Result<Portforwarder, Trouble> {
        let pod = self.pod().clone();
        let gone = match self.begin(&pod).await {
            Err(gone @ Found::Refused { status: 404, .. }) => Trouble::ApiServer(gone),
            begun => return begun.map_err(Trouble::ApiServer),
        };
        let mut now = self.daemons.by_node(Some(&self.node)).await.map_err(|error| Trouble::ApiServer(error.found))?;
        match now.remove(&self.node) {
            Some(Daemon::Runs { pod: other }) if other != pod => {
                *self.pod() = other.clone();
                self.begin(&other).await.map_err(Trouble::ApiServer)
            }
            Some(Daemon::Waits { pod, state }) => Err(Trouble::Pod(format!("its pod `{pod}` is not running: {state}"))),
            _ => Err(gone),
        }
    }

    async fn begin(&self, pod: &str) -> Result<Portforwarder, Found> {
        answer(self.daemons.pods().portforward(pod, &[POD_PORT])).await
    }

    fn pod(&self) -> MutexGuard<'_, String> {
        self.pod.lock().expect("no panic while the name is held")
    }

    fn trouble(&self) -> MutexGuard<'_, Option<Trouble>> {
        self.trouble.lock().expect("no panic while the trouble is held")
    }
}

//! The cluster of somebody's kubeconfig.

use std::path::Path;

use hyper_util::client::proxy::matcher::Matcher;
use kube::Config;
use kube::config::{KubeConfigOptions, Kubeconfig, KubeconfigError};

use super::{Cluster, Error, Found, quoted};

impl Cluster {
    /// The cluster of a kubeconfig, as kubectl would choose it: this file, or those of KUBECONFIG, or `~/.kube/config`; this
    /// context of it, or the current one. Blocking, for as long as it takes to read them.
    pub fn of_kubeconfig(file: Option<&Path>, context: Option<&str>) -> Result<Cluster, Error> {
        read(file, context).map(Cluster::new).map_err(|error| {
            let what = "find the cluster in a kubeconfig".to_owned();
            Error { what, found: Found::NoIdentity { detail: quoted(&error.to_string()) } }
        })
    }
}

fn read(file: Option<&Path>, context: Option<&str>) -> Result<Config, KubeconfigError> {
    let kubeconfig = match file {
        Some(file) => Kubeconfig::read_from(file)?,
        None => Kubeconfig::read()?,
    };
    let clusters = kubeconfig.clusters.iter().filter_map(|named| named.cluster.as_ref());
    let proxies: Vec<String> = clusters.filter_map(|cluster| cluster.proxy_url.clone()).collect();
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    // Nothing of it waits: all has been read.
    let mut config = futures::executor::block_on(Config::from_custom_kubeconfig(kubeconfig, &options))?;
    let is_named = proxies.iter().any(|proxy| proxy.parse().ok() == config.proxy_url);
    // kube compares NO_PROXY with the address of the proxy, not with the server's.
    if !is_named && Matcher::from_env().intercept(&config.cluster_url).is_none() {
        config.proxy_url = None;
    }
    Ok(config)
}

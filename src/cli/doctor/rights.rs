//! Whether the API server of the cluster lets larder do what it is configured to do.

use super::finding::{Finding, Mark};
use crate::config::Config;
use crate::fault::{Code, Problem};
use crate::kubernetes::{Cluster, GIVE_RIGHTS, Right};

/// Asks the API server about each right that is needed here; nothing is changed.
pub(super) async fn findings(config: &Config) -> Vec<Finding> {
    let needed = needed(config);
    if needed.is_empty() {
        let means = "it is told of no cluster (`kubernetes.node` and `serve.network_listen` are off), so it needs none";
        return vec![Finding::new(Mark::Ok, "rights", "none needed", means)];
    }
    let cluster = match tokio::task::spawn_blocking(Cluster::of_this_pod).await {
        Ok(Ok(cluster)) => cluster,
        Ok(Err(error)) => return vec![Finding::of("rights", "unknown", &Problem::of(&error))],
        Err(error) => {
            let problem = Problem::of(&super::super::Error::Bug { why: error.to_string() });
            return vec![Finding::of("rights", "unknown", &problem)];
        }
    };
    let mut findings = Vec::new();
    for right in needed {
        let name = format!("may {right}");
        match cluster.may(&right).await {
            Ok(true) => findings.push(Finding::new(Mark::Ok, &name, "yes", right.why)),
            Ok(false) => {
                let message = format!("without it: {}", right.without);
                findings.push(Finding::of(&name, "no", &Problem::new(Code::KubernetesDenied, message, GIVE_RIGHTS)));
            }
            Err(error) => {
                findings.push(Finding::of(&name, "unknown", &Problem::of(&error)));
                // The next would be answered alike, each after its time limit.
                break;
            }
        }
    }
    findings
}

fn needed(config: &Config) -> Vec<Right> {
    let kubernetes = &config.kubernetes;
    let mut needed = Vec::new();
    if kubernetes.node.is_some() {
        needed.extend([Right::LIST_PODS, Right::WATCH_PODS]);
        if kubernetes.announce {
            needed.extend([Right::PATCH_NODES, Right::CREATE_EVENTS]);
            needed.extend(kubernetes.startup_taint.as_ref().map(|_| Right::GET_NODES));
        }
    }
    if config.serve.network_listen.is_some() {
        needed.push(Right::REVIEW_TOKENS);
    }
    needed
}

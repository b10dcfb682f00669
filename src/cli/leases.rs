//! Leases: for whom a command takes one, and the commands that list and release them.

use std::time::Duration;

use clap::Args;

use super::door::Door;
use super::report::{json, out, plain, say};
use super::table::{self, Align};
use super::{Error, Output, progress};
use crate::config::Config;
use crate::fault::Problem;
use crate::wire::http::{HolderKind, LeaseInfo, LeaseList, LeaseTerms, PodIdentity};

/// The variables the downward API fills, as every example sets them.
const POD_VARIABLES: [&str; 3] = ["POD_UID", "POD_NAMESPACE", "POD_NAME"];

/// For whom a lease is taken.
#[derive(Debug, Args)]
pub(super) struct LeaseFor {
    /// Keep the model for `pod` (from POD_UID, POD_NAMESPACE and POD_NAME), or for somebody with this name
    #[arg(long, value_name = "pod|NAME")]
    lease_for: Option<String>,
    /// Keep the model for as long, such as `2h`
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    ttl: Option<Duration>,
}

impl LeaseFor {
    /// What to ask the daemon for; nothing when no flag was given.
    pub(super) fn terms(&self, variable: impl Fn(&str) -> Option<String>) -> Result<Option<LeaseTerms>, Problem> {
        let ttl_seconds = self.ttl.map(|ttl| ttl.as_secs().max(1));
        let (pod, holder) = match self.lease_for.as_deref() {
            None if ttl_seconds.is_none() => return Ok(None),
            None => (None, None),
            Some("pod") => (Some(this_pod(variable)?), None),
            Some(name) => (None, Some(name.to_owned())),
        };
        Ok(Some(LeaseTerms { pod, holder, ttl_seconds }))
    }
}

/// The pod this process runs in.
pub(super) fn this_pod(variable: impl Fn(&str) -> Option<String>) -> Result<PodIdentity, Problem> {
    let [uid, namespace, name] = POD_VARIABLES.map(|known| variable(known).filter(|value| !value.is_empty()));
    match (uid, namespace, name) {
        (Some(uid), Some(namespace), Some(name)) => Ok(PodIdentity { uid, namespace, name }),
        (uid, namespace, name) => {
            let missing = POD_VARIABLES.into_iter().zip([uid, namespace, name]);
            let missing = missing.filter(|(_, value)| value.is_none()).map(|(known, _)| known).collect();
            Err(Error::NoPod { missing }.into())
        }
    }
}

pub(super) async fn list(config: &Config, output: Output) -> Result<(), Problem> {
    let door = Door::to_read(config).await?;
    let leases = door.leases().await;
    door.close().await;
    let leases = leases?;
    if output == Output::Json {
        return Ok(out(&json(&LeaseList { leases }))?);
    }
    if leases.is_empty() {
        say("nobody holds a lease");
        return Ok(());
    }
    Ok(out(&lease_table(&leases))?)
}

pub(super) async fn release(config: &Config, id: &str, output: Output) -> Result<(), Problem> {
    let door = Door::to_change(config).await?;
    let released = door.release(id).await;
    door.close().await;
    let lease = released?;
    let text = match output {
        Output::Table => plain(&format!("released {} of {}\n", lease.reference, lease.holder)),
        Output::Json => json(&lease),
    };
    Ok(out(&text)?)
}

fn lease_table(leases: &[LeaseInfo]) -> String {
    let rows: Vec<[String; 7]> = leases
        .iter()
        .map(|lease| {
            let kind = match lease.kind {
                HolderKind::Pod => "pod",
                HolderKind::Name => "name",
                HolderKind::Connection => "connection",
            };
            [
                lease.id.clone(),
                kind.to_owned(),
                lease.holder.clone(),
                lease.reference.clone(),
                progress::short(&lease.version),
                lease.since.clone(),
                lease.expires_at.clone().unwrap_or_else(|| "never".to_owned()),
            ]
        })
        .collect();
    let columns =
        ["ID", "KIND", "HOLDER", "REFERENCE", "VERSION", "SINCE", "EXPIRES"].map(|title| (title, Align::Left));
    table::render(columns, &rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Code;

    fn asked(lease_for: Option<&str>, ttl: Option<u64>) -> LeaseFor {
        LeaseFor { lease_for: lease_for.map(str::to_owned), ttl: ttl.map(Duration::from_secs) }
    }

    #[test]
    fn a_lease_is_for_a_pod_a_name_a_time_or_nobody() {
        let nothing = |_: &str| None;
        assert_eq!(asked(None, None).terms(nothing), Ok(None));
        let terms = asked(None, Some(7)).terms(nothing).unwrap().unwrap();
        assert_eq!(terms, LeaseTerms { ttl_seconds: Some(7), ..LeaseTerms::default() });
        let terms = asked(Some("ci"), None).terms(nothing).unwrap().unwrap();
        assert_eq!(terms, LeaseTerms { holder: Some("ci".into()), ..LeaseTerms::default() });
        let pod = |name: &str| Some(format!("{name} value"));
        let terms = asked(Some("pod"), None).terms(pod).unwrap().unwrap();
        assert_eq!(terms.pod.unwrap().uid, "POD_UID value");
    }

    #[test]
    fn a_pod_that_does_not_know_itself_is_told_which_variables_to_set() {
        let half = |name: &str| (name == "POD_NAME").then(|| "p".to_owned());
        let problem = asked(Some("pod"), None).terms(half).unwrap_err();
        assert_eq!(problem.code, Code::BadRequest);
        assert!(problem.message.contains("POD_UID, POD_NAMESPACE"), "{problem}");
        assert!(problem.action.contains("fieldPath: metadata.uid"), "{}", problem.action);
    }
}

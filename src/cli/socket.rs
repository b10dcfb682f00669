//! Opening through the daemon's socket, as a pod does, and showing how far a pull is meanwhile.

use std::future::Future;
use std::path::PathBuf;

use clap::Args;
use futures::{StreamExt, stream};
use tokio::sync::mpsc;

use super::progress::{self, Followed, Reporter};
use super::{Error, Kind, PullStatus};
use crate::client::{Model, Opener};
use crate::fault::Problem;
use crate::model::ModelRef;

/// Where this process sees the volume.
#[derive(Debug, Args)]
pub(super) struct Mount {
    /// Where the volume's `public/` is mounted here, if not where the daemon has it
    #[arg(long, env = "LARDER_MOUNT", value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    mount: Option<PathBuf>,
}

impl Mount {
    /// The directory of a model, as this process sees it.
    pub(super) fn directory(&self, model: &Model) -> PathBuf {
        match &self.mount {
            Some(mount) => mount.join(model.path_below_public()),
            None => PathBuf::from(&model.info().path),
        }
    }
}

/// Opens a model, and shows how far its pull is. Ends when `interrupted` does; the pull goes on.
pub(super) async fn open(
    opener: Opener,
    reference: &ModelRef,
    reporter: &mut Reporter,
    interrupted: impl Future<Output = ()>,
) -> Result<Model, Problem> {
    let (heard, statuses) = mpsc::unbounded_channel::<PullStatus>();
    let opener = opener.on_progress(move |status| {
        // Nobody listens any more when the model is open.
        let _ = heard.send(status.clone());
    });
    let statuses = stream::unfold(statuses, |mut heard| async move { Some((Ok(heard.recv().await?), heard)) });
    // The opener goes when it has opened, and with it the channel: then nothing more is heard, and both have ended.
    let opening = async move { opener.open(reference).await };
    let following = progress::follow(statuses.boxed(), reporter, interrupted);
    tokio::pin!(opening, following);
    tokio::select! {
        opened = &mut opening => {
            let _ = following.await;
            opened
        }
        followed = &mut following => match followed? {
            Followed::Interrupted(last) => {
                let (id, percent) = last.map_or_else(Default::default, |status| (status.id, status.percent));
                Err(Error::StoppedWaiting { job: Kind::Pull, reference: reference.to_string(), percent, id }.into())
            }
            Followed::Ended(_) | Followed::Lost => opening.await,
        },
    }
}

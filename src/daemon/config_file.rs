//! Notices that the configuration file has become another one, without asking for it again and again.

use std::ffi::OsString;
use std::io::{Error, ErrorKind};
use std::path::Path;

use futures::StreamExt;
use inotify::{EventMask, EventStream, Inotify, WatchMask};

/// The link that kubelet gives another aim when a ConfigMap has changed; every file of the volume leads through it.
const DATA_LINK: &str = "..data";

/// Room for some events; those that do not fit are read next.
const BUFFER_BYTES: usize = 4096;

/// Waits for changes of one file.
pub(super) struct ConfigFile {
    events: EventStream<[u8; BUFFER_BYTES]>,
    name: OsString,
}

impl ConfigFile {
    /// `None`, after saying why, where it cannot be known. Needs a tokio runtime.
    pub(super) fn watch(path: &Path) -> Option<ConfigFile> {
        match ConfigFile::try_watch(path) {
            Ok(file) => Some(file),
            // There is none, and no directory for one: nothing to say to somebody who has not asked for it.
            Err(error) if error.kind() == ErrorKind::NotFound => {
                tracing::debug!(path = %path.display(), %error, "there is no configuration file to watch");
                None
            }
            Err(error) => {
                let path = path.display();
                tracing::info!(%path, %error, "a change of the configuration file is applied on SIGHUP only");
                None
            }
        }
    }

    /// The directory is watched, not the file: who changes one puts another in its place.
    fn try_watch(path: &Path) -> Result<ConfigFile, Error> {
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(ErrorKind::InvalidFilename.into());
        };
        let inotify = Inotify::init()?;
        inotify.watches().add(directory, WatchMask::MOVED_TO | WatchMask::CLOSE_WRITE)?;
        Ok(ConfigFile { events: inotify.into_event_stream([0; BUFFER_BYTES])?, name: name.to_owned() })
    }

    /// Returns when the file may have changed since the last time; never if that cannot be known any more.
    pub(super) async fn changed(&mut self) {
        while let Some(Ok(event)) = self.events.next().await {
            let is_ours = event.name.is_some_and(|name| name == self.name || name == *DATA_LINK);
            if is_ours || event.mask.contains(EventMask::Q_OVERFLOW) {
                return;
            }
        }
        std::future::pending().await
    }
}

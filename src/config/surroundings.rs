//! What the process finds around itself: variables and the user. Captured once, so that tests need not change either.

use std::path::PathBuf;

use super::setting::absolute;
use super::{SETTINGS, meant, nearest};
use crate::source::Environment;

/// The environment variables and the user, as the configuration sees them.
#[derive(Clone, Default)]
pub struct Surroundings {
    environment: Environment,
    is_root: bool,
    /// Variables of ours that are not UTF-8: dropping them in silence would be a lie.
    unreadable: Vec<String>,
}

impl Surroundings {
    /// Those of this process.
    pub fn of_process() -> Surroundings {
        let unreadable = std::env::vars_os()
            .filter(|(name, value)| name.to_string_lossy().starts_with("LARDER_") && value.to_str().is_none())
            .map(|(name, _)| name.to_string_lossy().into_owned())
            .collect();
        Surroundings {
            environment: Environment::of_process(),
            is_root: rustix::process::geteuid().is_root(),
            unreadable,
        }
    }

    /// These variables, for root or for another user.
    pub fn new(environment: Environment, is_root: bool) -> Surroundings {
        Surroundings { environment, is_root, unreadable: Vec::new() }
    }

    pub(super) fn is_root(&self) -> bool {
        self.is_root
    }

    /// Kubernetes gives this variable to every pod.
    pub(super) fn is_pod(&self) -> bool {
        self.get("KUBERNETES_SERVICE_HOST").is_some()
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.environment.get(name)
    }

    /// Variables that look like ours and are not, or cannot be read.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems: Vec<String> = self.unreadable.iter().map(|name| format!("{name}: is not UTF-8")).collect();
        let sections = || SETTINGS.iter().filter_map(|s| s.key.split('.').next());
        for (name, _) in self.environment.iter() {
            let ours = sections().any(|section| {
                name.strip_prefix("LARDER_")
                    .is_some_and(|rest| rest.starts_with(&format!("{}_", section.to_uppercase())))
            });
            // Kubernetes gives every pod variables named after the services beside it, and one may be `larder-pull`.
            let service_link = name.contains("_SERVICE_") || name.contains("_PORT");
            if ours && !service_link && SETTINGS.iter().all(|s| s.env != name) {
                let as_key = name.trim_start_matches("LARDER_").to_lowercase().replacen('_', ".", 1);
                let same_key = SETTINGS.iter().find(|s| s.key == as_key).map(|s| s.env);
                let hint = same_key.or_else(|| nearest(name, SETTINGS.iter().map(|s| s.env)));
                problems.push(format!("{name}: unknown variable{}", meant(hint)));
            }
        }
        problems
    }

    /// The default root.
    pub(super) fn root(&self) -> Result<String, String> {
        if self.is_root {
            return Ok("/var/lib/larder".to_owned());
        }
        match self.directory("XDG_DATA_HOME")? {
            Some(data) => Ok(data.join("larder").display().to_string()),
            None => match self.directory("HOME")? {
                Some(home) => Ok(home.join(".local/share/larder").display().to_string()),
                None => Err("volume.root: HOME is not set, so there is no default; set LARDER_ROOT".to_owned()),
            },
        }
    }

    /// The default socket, if there is a place for it outside the root.
    pub(super) fn socket(&self) -> Result<Option<String>, String> {
        if self.is_root {
            return Ok(Some("/run/larder/larder.sock".to_owned()));
        }
        let runtime = self.directory("XDG_RUNTIME_DIR")?;
        Ok(runtime.map(|runtime| runtime.join("larder/larder.sock").display().to_string()))
    }

    /// The default file. Without a home there is none, and none is needed.
    pub(super) fn config_file(&self) -> Result<Option<PathBuf>, String> {
        if self.is_root {
            return Ok(Some(PathBuf::from("/etc/larder/config.toml")));
        }
        let directory = match self.directory("XDG_CONFIG_HOME")? {
            Some(config) => Some(config),
            None => self.directory("HOME")?.map(|home| home.join(".config")),
        };
        Ok(directory.map(|directory| directory.join("larder/config.toml")))
    }

    /// The directory a variable names, if it is set; an error if it depends on where the process was started.
    fn directory(&self, name: &str) -> Result<Option<PathBuf>, String> {
        let Some(text) = self.get(name) else { return Ok(None) };
        absolute(text).map(Some).ok_or_else(|| format!("{name}: {text:?} is not an absolute path"))
    }
}

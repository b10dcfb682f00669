//! The settings of every bench.

use std::path::Path;

use larder::config::{Config, Flags, Surroundings};
use larder::source::Environment;

/// The defaults, with everything below this directory, and nothing done that nobody asks for.
pub(crate) fn settings(home: &Path) -> Config {
    let home = home.display().to_string();
    let environment = Environment::from_iter([
        ("HOME", home.clone()),
        ("LARDER_ROOT", format!("{home}/volume")),
        ("LARDER_SOCKET", format!("{home}/s")),
        ("LARDER_SERVE_LISTEN", "off".to_owned()),
        ("LARDER_SERVE_POD_SOCKET", "off".to_owned()),
        ("LARDER_VOLUME_MIN_FREE", "0".to_owned()),
        ("LARDER_SCRUB_RATE", "none".to_owned()),
    ]);
    Config::load(&Flags::default(), &Surroundings::new(environment, false)).expect("these are settings")
}

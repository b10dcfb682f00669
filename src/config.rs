//! One file, the environment and the flags become one typed [`Config`], with all mistakes told at once.
//!
//! A flag wins over the environment, the environment over the file, the file over the default. Every layer is read, so
//! a mistake in a file is told even where a flag hides it. [`SETTINGS`] is the one table of keys.

mod setting;
mod surroundings;

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Serialize, Serializer};
use toml::de::{DeTable, DeValue};

use crate::cache::{CacheConfig, Limits, MinFree, PageCache};
use crate::fault::{Code, Diagnose};
use crate::model::{Bytes, ModelRef};
use crate::serve::Account;
use crate::source::SourceConfig;
use crate::telemetry::LogFormat;

pub use setting::{Fallback, SETTINGS, Setting};
pub use surroundings::Surroundings;

/// Largest configuration file, in bytes.
pub const MAX_FILE_BYTES: u64 = 1 << 20;
/// Most problems that are listed; the others are counted.
pub const MAX_PROBLEMS: usize = 50;

/// Everything that can be configured, within its limits. Made by [`Config::load`].
#[derive(Debug, Clone)]
pub struct Config {
    /// `[volume]`
    pub volume: VolumeConfig,
    /// `[pull]`
    pub pull: PullConfig,
    /// `[serve]`
    pub serve: ServeConfig,
    /// `[scrub]`
    pub scrub: ScrubConfig,
    /// `[kubernetes]`
    pub kubernetes: KubernetesConfig,
    /// `[log]`
    pub log: LogConfig,
    /// The file, which need not be there.
    file: Option<PathBuf>,
    /// Whether this is a pod.
    in_kubernetes: bool,
    effective: Vec<Effective>,
}

/// The disk.
#[derive(Debug, Clone)]
pub struct VolumeConfig {
    /// The directory larder owns; absolute.
    pub root: PathBuf,
    /// How much room models may take, and for how long they stay.
    pub limits: Limits,
}

/// How models are pulled. The limits hold for all pulls together.
#[derive(Debug, Clone)]
pub struct PullConfig {
    /// Memory for bytes in flight.
    pub memory: Bytes,
    /// Most requests for bytes under way.
    pub connections: u32,
    /// Bytes a second of all pulls together that nobody waits for.
    pub background_rate: Option<Bytes>,
    /// What becomes of the page cache.
    pub page_cache: PageCache,
    /// Longest time without a byte.
    pub stall_timeout: Duration,
    /// Failures in a row, without a byte of progress.
    pub retries: u32,
    /// A directory of variables for the sources; absolute.
    pub environment: Option<PathBuf>,
    /// What is pulled at start and kept.
    pub pinned: Vec<ModelRef>,
}

/// Where the daemon answers.
#[derive(Debug, Clone)]
pub struct ServeConfig {
    /// The Unix socket; absolute.
    pub socket: PathBuf,
    /// The Unix socket that pods mount; absolute.
    pub pod_socket: Option<PathBuf>,
    /// The TCP address, if there is one.
    pub listen: Option<SocketAddr>,
    /// The TCP address for health and metrics alone, if there is one.
    pub health_listen: Option<SocketAddr>,
    /// The TCP address for those with a token, if there is one.
    pub network_listen: Option<SocketAddr>,
    /// Whose tokens are good there.
    pub network_accounts: Vec<Account>,
    /// Whether an open starts to warm what is not resident.
    pub warm_on_open: bool,
    /// Whether each model has a metric of its own.
    pub metrics_by_model: bool,
}

/// What the daemon reads by itself.
#[derive(Debug, Clone)]
pub struct ScrubConfig {
    /// Bytes a second; `None`: nothing is read.
    pub rate: Option<Bytes>,
    /// Time between two passes.
    pub every: Duration,
}

/// The cluster this is a node of.
#[derive(Debug, Clone)]
pub struct KubernetesConfig {
    /// The name of the node; `None`: the cluster is asked nothing.
    pub node: Option<String>,
    /// Whether the node tells what is here.
    pub announce: bool,
    /// The key of the taint that goes when what is pinned is here.
    pub startup_taint: Option<String>,
}

/// Logs.
#[derive(Debug, Clone)]
pub struct LogConfig {
    /// How lines look.
    pub format: LogFormat,
    /// Which lines are written; the grammar has been checked.
    pub filter: String,
}

/// What was said on the command line.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// `--config`: the file to read.
    pub config: Option<PathBuf>,
    /// `--root`
    pub root: Option<String>,
    /// `--socket`
    pub socket: Option<String>,
}

/// Who said a value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// Nobody.
    Default,
    /// The file.
    File {
        /// Its path.
        path: PathBuf,
        /// From 1.
        line: usize,
    },
    /// This environment variable.
    Environment(&'static str),
    /// This flag.
    Flag(&'static str),
}

impl Origin {
    /// Whether it was said for this one command: by a flag or a variable.
    pub fn is_explicit(&self) -> bool {
        matches!(self, Origin::Environment(_) | Origin::Flag(_))
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line } => write!(f, "file {}:{line}", path.display()),
            Origin::Environment(name) => write!(f, "env {name}"),
            Origin::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// The value of one setting, as it was written, and who wrote it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Effective {
    /// The key.
    pub key: &'static str,
    /// The value.
    pub value: String,
    /// Who said it.
    pub origin: Origin,
}

/// Every mistake of a configuration, one line each: where, which key, what was found and what is taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot use the configuration: {}", listed(.problems))]
pub struct ConfigError {
    /// At least one.
    pub problems: Vec<String>,
}

impl Diagnose for ConfigError {
    fn code(&self) -> Code {
        Code::ConfigInvalid
    }

    fn action(&self) -> String {
        "correct what is listed and run `larder config check`; docs/configuration.md has every key".to_owned()
    }
}

fn listed(problems: &[String]) -> String {
    let mut text = match problems.len() {
        1 => "1 problem".to_owned(),
        n => format!("{n} problems"),
    };
    for problem in problems.iter().take(MAX_PROBLEMS) {
        text.push_str("\n  ");
        text.push_str(problem);
    }
    if problems.len() > MAX_PROBLEMS {
        text.push_str(&format!("\n  and {} more", problems.len() - MAX_PROBLEMS));
    }
    text
}

impl Config {
    /// Reads the file that the flags, the environment or the default name, then the environment, then the flags.
    ///
    /// A file that nobody named may be absent. The error has every problem of every layer.
    pub fn load(flags: &Flags, surroundings: &Surroundings) -> Result<Config, ConfigError> {
        let mut problems = surroundings.problems();
        let mut config = Config { in_kubernetes: surroundings.is_pod(), ..Config::blank() };
        match config_file(flags, surroundings) {
            Ok(Some(file)) => {
                read_file(&file, &mut config, &mut problems);
                config.file = Some(file.path);
            }
            Ok(None) => {}
            Err(problem) => problems.push(problem),
        }
        for (setting, text, origin) in of_environment(surroundings).chain(of_flags(flags)) {
            let place = match &origin {
                Origin::Environment(name) | Origin::Flag(name) => *name,
                _ => setting.key,
            };
            if let Err(why) = config.take(setting, &text, origin) {
                problems.push(format!("{place}: {why}"));
            }
        }
        for setting in SETTINGS {
            // Said, if perhaps wrongly: then the default must not be blamed too.
            if config.effective.iter().any(|e| e.key == setting.key) {
                continue;
            }
            let text = match setting.default {
                Fallback::Text(text) => Ok(text.to_owned()),
                Fallback::EmptyList => Ok(String::new()),
                Fallback::Root => surroundings.root(),
                Fallback::Socket => default_socket(&config, surroundings),
                Fallback::PodSocket => Ok(default_pod_socket(&config, surroundings)),
            };
            let taken = text.and_then(|text| match setting.default {
                // It may be too long to bind; only `serve` needs it, and says so when it cannot.
                Fallback::Socket => {
                    config.serve.socket = PathBuf::from(&text);
                    config.record(setting, text, Origin::Default);
                    Ok(())
                }
                Fallback::PodSocket => {
                    config.serve.pod_socket = Some(&text).filter(|text| *text != "off").map(PathBuf::from);
                    config.record(setting, text, Origin::Default);
                    Ok(())
                }
                _ => config.take(setting, &text, Origin::Default).map_err(|why| format!("{}: {why}", setting.key)),
            });
            if let Err(problem) = taken
                && !problems.contains(&problem)
            {
                problems.push(problem);
            }
        }
        if !problems.is_empty() {
            return Err(ConfigError { problems });
        }
        config.effective.sort_by_key(|e| SETTINGS.iter().position(|s| s.key == e.key));
        Ok(config)
    }

    /// The file that it is read from, if it has one; it may be absent.
    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// Every setting with its value and who said it, in the order of [`SETTINGS`].
    pub fn effective(&self) -> &[Effective] {
        &self.effective
    }

    /// The keys whose values differ from `other`'s, in the order of [`SETTINGS`].
    pub fn differences(&self, other: &Config) -> Vec<&'static str> {
        let value =
            |config: &Config, key: &str| config.effective.iter().find(|e| e.key == key).map(|e| e.value.clone());
        SETTINGS.iter().map(|s| s.key).filter(|key| value(self, key) != value(other, key)).collect()
    }

    /// Whether the socket was named for this command, so that a daemon must answer on it.
    pub fn socket_is_explicit(&self) -> bool {
        self.effective.iter().any(|e| e.key == "serve.socket" && e.origin.is_explicit())
    }

    /// The part of it that the cache takes.
    pub fn cache(&self) -> CacheConfig {
        CacheConfig {
            root: self.volume.root.clone(),
            limits: self.volume.limits,
            in_kubernetes: self.in_kubernetes,
            pull_memory: self.pull.memory,
            pull_connections: self.pull.connections as usize,
            background_rate: self.pull.background_rate,
            page_cache: self.pull.page_cache,
            stall_timeout: self.pull.stall_timeout,
            // The first attempt is not a retry.
            retry_attempts: self.pull.retries + 1,
            warm_on_open: self.serve.warm_on_open,
            metrics_by_model: self.serve.metrics_by_model,
        }
    }

    /// The part of it that the sources take.
    pub fn sources(&self) -> SourceConfig {
        SourceConfig {
            stall_timeout: self.pull.stall_timeout,
            environment: self.pull.environment.clone(),
            ..SourceConfig::default()
        }
    }

    /// Nothing said yet. Never seen outside: every setting is read over it.
    fn blank() -> Config {
        let limits =
            Limits { quota: None, low_water_percent: 100, min_free: MinFree::Auto, min_residency: Duration::ZERO };
        Config {
            volume: VolumeConfig { root: PathBuf::new(), limits },
            file: None,
            in_kubernetes: false,
            pull: PullConfig {
                memory: Bytes(0),
                background_rate: None,
                page_cache: PageCache::Auto,
                connections: 0,
                stall_timeout: Duration::ZERO,
                retries: 0,
                environment: None,
                pinned: Vec::new(),
            },
            serve: ServeConfig {
                socket: PathBuf::new(),
                pod_socket: None,
                listen: None,
                health_listen: None,
                network_listen: None,
                network_accounts: Vec::new(),
                warm_on_open: false,
                metrics_by_model: false,
            },
            scrub: ScrubConfig { rate: None, every: Duration::ZERO },
            kubernetes: KubernetesConfig { node: None, announce: false, startup_taint: None },
            log: LogConfig { format: LogFormat::Auto, filter: String::new() },
            effective: Vec::new(),
        }
    }

    /// Reads a value into its place. A wrong one is remembered too: then its default must not be blamed.
    fn take(&mut self, setting: &Setting, text: &str, origin: Origin) -> Result<(), String> {
        self.record(setting, text.trim().to_owned(), origin);
        setting.read(text, self)
    }

    /// Remembers who said it, over whoever said it before.
    fn record(&mut self, setting: &Setting, value: String, origin: Origin) {
        self.effective.retain(|e| e.key != setting.key);
        self.effective.push(Effective { key: setting.key, value, origin });
    }
}

/// The default socket belongs to the default root: another root has its own, so that a command for one volume never
/// talks to the daemon of another.
fn default_socket(config: &Config, surroundings: &Surroundings) -> Result<String, String> {
    let root_is_default = config.effective.iter().any(|e| e.key == "volume.root" && e.origin == Origin::Default);
    let shared = if root_is_default { surroundings.socket()? } else { None };
    Ok(shared.unwrap_or_else(|| config.volume.root.join("larder.sock").display().to_string()))
}

/// Pods are there where root runs us. For another user it would be a way for everybody on the machine to pull with their
/// tokens.
fn default_pod_socket(config: &Config, surroundings: &Surroundings) -> String {
    match config.serve.socket.parent().filter(|_| surroundings.is_root()) {
        Some(dir) => dir.join("pods/larder.sock").display().to_string(),
        None => "off".to_owned(),
    }
}

struct File {
    path: PathBuf,
    must_exist: bool,
}

fn config_file(flags: &Flags, surroundings: &Surroundings) -> Result<Option<File>, String> {
    if let Some(path) = &flags.config {
        return Ok(Some(File { path: path.clone(), must_exist: true }));
    }
    if let Some(text) = surroundings.get("LARDER_CONFIG") {
        let path = setting::absolute(text).ok_or_else(|| format!("LARDER_CONFIG: {text:?} is not an absolute path"))?;
        return Ok(Some(File { path, must_exist: true }));
    }
    Ok(surroundings.config_file()?.map(|path| File { path, must_exist: false }))
}

fn of_environment(surroundings: &Surroundings) -> impl Iterator<Item = (&'static Setting, String, Origin)> {
    SETTINGS.iter().filter_map(|setting| {
        let text = surroundings.get(setting.env)?.to_owned();
        Some((setting, text, Origin::Environment(setting.env)))
    })
}

fn of_flags(flags: &Flags) -> impl Iterator<Item = (&'static Setting, String, Origin)> {
    SETTINGS.iter().filter_map(|setting| {
        let flag = setting.flag?;
        let text = match flag {
            "--root" => flags.root.clone()?,
            "--socket" => flags.socket.clone()?,
            _ => return None,
        };
        Some((setting, text, Origin::Flag(flag)))
    })
}

fn read_file(file: &File, config: &mut Config, problems: &mut Vec<String>) {
    let shown = file.path.display();
    let text = match file_text(&file.path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !file.must_exist => return,
        Err(error) => return problems.push(format!("{shown}: cannot be read: {error}")),
    };
    let (table, errors) = DeTable::parse_recoverable(&text);
    if !errors.is_empty() {
        problems.extend(errors.iter().map(|error| {
            let at = error.span().map(|span| position(&text, span.start));
            let at = at.map(|(line, column)| format!(":{line}:{column}")).unwrap_or_default();
            format!("{shown}{at}: {}", error.message().trim().replace('\n', ", "))
        }));
        // What recovery guessed the rest to mean is not what was written: say nothing about it.
        return;
    }
    let mut found = Vec::new();
    Reading { text: &text, path: &file.path }.table(table.get_ref(), "", config, &mut found);
    // The parser sorts by name; people read from the top.
    found.sort();
    problems.extend(found.into_iter().map(|(line, problem)| format!("{shown}:{line} {problem}")));
}

/// A file whose TOML is right, while its keys are read.
struct Reading<'a> {
    text: &'a str,
    path: &'a Path,
}

impl Reading<'_> {
    /// Reads a table into `config`, and what is wrong with it, by line, into `found`.
    fn table(&self, table: &DeTable<'_>, section: &str, config: &mut Config, found: &mut Vec<(usize, String)>) {
        for (name, value) in table {
            let line = position(self.text, name.span().start).0;
            let key = match section {
                "" => name.get_ref().to_string(),
                section => format!("{section}.{}", name.get_ref()),
            };
            if let Some(setting) = SETTINGS.iter().find(|s| s.key == key) {
                let origin = Origin::File { path: self.path.to_owned(), line };
                let taken = setting.text_of(value.get_ref()).and_then(|text| config.take(setting, &text, origin));
                found.extend(taken.err().map(|why| (line, format!("{key}: {why}"))));
                continue;
            }
            let is_section = SETTINGS.iter().any(|s| s.key.split('.').next() == Some(&key));
            match value.get_ref() {
                // One level is all there is: deeper tables are unknown as a whole, so the recursion is bounded.
                DeValue::Table(inner) if section.is_empty() && (is_section || !inner.is_empty()) => {
                    self.table(inner, &key, config, found);
                }
                other if is_section => {
                    found.push((line, format!("{key}: it is of type {}, not a table", other.type_str())))
                }
                _ => {
                    let hint = nearest(&key, SETTINGS.iter().map(|s| s.key));
                    found.push((line, format!("{}: unknown key{}", plain(&key), meant(hint))));
                }
            }
        }
    }
}

/// The text of the file, refused when it is too long or not UTF-8.
fn file_text(path: &Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    let read = std::fs::File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if read as u64 > MAX_FILE_BYTES {
        return Err(std::io::Error::other(format!("it is longer than {MAX_FILE_BYTES} bytes")));
    }
    Ok(text)
}

/// Line and column of a byte, both from 1; the column counts characters.
fn position(text: &str, byte: usize) -> (usize, usize) {
    let before = text.get(..byte).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}

/// The known name that was probably meant: few edits away, or the same without its section.
fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let name: String = name.chars().take(80).collect();
    let distance = |known: &str| {
        let last = known.rsplit('.').next().unwrap_or(known);
        let bare = name.rsplit('.').next().unwrap_or(&name);
        // The section may be wrong or missing as a whole, but that is a greater mistake than a letter.
        strsim::damerau_levenshtein(&name, known).min(1 + strsim::damerau_levenshtein(bare, last))
    };
    // Of names as many edits away, the one that begins alike.
    let rank = |known: &str| (distance(known), (1e6 * (1.0 - strsim::jaro_winkler(&name, known))) as u64);
    let best = known.map(|known| (rank(known), known)).min()?;
    (best.0.0 <= 3 && best.0.0 * 3 <= best.1.len()).then_some(best.1)
}

fn meant(hint: Option<&str>) -> String {
    hint.map(|hint| format!("; did you mean `{hint}`?")).unwrap_or_default()
}

/// A name from outside, shortened and without control characters.
fn plain(name: &str) -> String {
    name.chars().take(80).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Share;
    use crate::source::Environment;

    /// A user with a home of their own, and whatever else is said.
    fn user(variables: &[(&str, &str)]) -> (tempfile::TempDir, Surroundings) {
        let home = tempfile::tempdir().unwrap();
        let own = [("HOME", home.path().to_str().unwrap())];
        let surroundings = Surroundings::new(own.iter().chain(variables).copied().collect(), false);
        (home, surroundings)
    }

    fn write(home: &tempfile::TempDir, text: &str) -> PathBuf {
        let path = home.path().join(".config/larder/config.toml");
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }

    fn origin(config: &Config, key: &str) -> String {
        config.effective().iter().find(|e| e.key == key).unwrap().origin.to_string()
    }

    fn problems(flags: &Flags, surroundings: &Surroundings) -> Vec<String> {
        Config::load(flags, surroundings).expect_err("it has mistakes").problems
    }

    #[test]
    fn an_ordinary_user_needs_no_file_and_no_variable() {
        let (home, surroundings) = user(&[]);
        let config = Config::load(&Flags::default(), &surroundings).unwrap();
        assert_eq!(config.volume.root, home.path().join(".local/share/larder"));
        assert_eq!(config.serve.socket, home.path().join(".local/share/larder/larder.sock"));
        let limits = config.volume.limits;
        assert_eq!((limits.quota, limits.min_free, limits.low_water_percent), (None, MinFree::Auto, 95));
        assert_eq!(limits.min_residency, Duration::from_secs(600));
        assert_eq!(config.pull.memory, Bytes(64 << 20));
        assert_eq!((config.pull.connections, config.pull.retries), (16, 8));
        assert_eq!(config.pull.stall_timeout, Duration::from_secs(30));
        assert_eq!(config.serve.listen, Some("127.0.0.1:7437".parse().unwrap()));
        assert!(config.effective().iter().all(|e| e.origin == Origin::Default));
        let keys: Vec<_> = config.effective().iter().map(|e| e.key).collect();
        assert_eq!(keys, SETTINGS.iter().map(|s| s.key).collect::<Vec<_>>());
    }

    #[test]
    fn root_lives_in_the_systems_directories() {
        let surroundings = Surroundings::new(Environment::default(), true);
        let config = Config::load(&Flags::default(), &surroundings);
        // A machine may have a file of its own there; this test is about the defaults.
        if Path::new("/etc/larder/config.toml").exists() {
            println!("skipped: /etc/larder/config.toml exists");
            return;
        }
        let config = config.unwrap();
        assert_eq!(config.volume.root, Path::new("/var/lib/larder"));
        assert_eq!(config.serve.socket, Path::new("/run/larder/larder.sock"));
    }

    #[test]
    fn the_xdg_directories_are_honoured() {
        let (_home, surroundings) = user(&[("XDG_DATA_HOME", "/data"), ("XDG_RUNTIME_DIR", "/run/user/7")]);
        let config = Config::load(&Flags::default(), &surroundings).unwrap();
        assert_eq!(config.volume.root, Path::new("/data/larder"));
        assert_eq!(config.serve.socket, Path::new("/run/user/7/larder/larder.sock"));
    }

    #[test]
    fn another_root_has_its_own_socket() {
        let (_home, surroundings) = user(&[("XDG_RUNTIME_DIR", "/run/user/7"), ("LARDER_ROOT", "/other")]);
        let config = Config::load(&Flags::default(), &surroundings).unwrap();
        assert_eq!(config.serve.socket, Path::new("/other/larder.sock"));
        assert!(!config.socket_is_explicit());
    }

    #[test]
    fn a_flag_wins_over_the_environment_over_the_file_over_the_default() {
        let (home, surroundings) = user(&[("LARDER_ROOT", "/env"), ("LARDER_PULL_RETRIES", "3")]);
        let path = write(
            &home,
            "[volume]\nroot = \"/file\"\nquota = \"500GB\"\n\n[pull]\nretries = 2\nconnections = 4\nmemory = 16_777_216\n",
        );
        let flags = Flags { root: Some("/flag".into()), ..Flags::default() };
        let config = Config::load(&flags, &surroundings).unwrap();
        assert_eq!(config.volume.root, Path::new("/flag"));
        assert_eq!(config.volume.limits.quota, Some(Share::Bytes(Bytes(500_000_000_000))));
        assert_eq!((config.pull.retries, config.pull.connections), (3, 4));
        assert_eq!(config.pull.memory, Bytes(16 << 20));
        assert_eq!(origin(&config, "volume.root"), "flag --root");
        assert_eq!(origin(&config, "pull.retries"), "env LARDER_PULL_RETRIES");
        assert_eq!(origin(&config, "volume.quota"), format!("file {}:3", path.display()));
        assert_eq!(origin(&config, "pull.connections"), format!("file {}:7", path.display()));
        assert_eq!(origin(&config, "log.filter"), "default");
    }

    #[test]
    fn all_problems_are_told_at_once_with_their_lines() {
        let (home, surroundings) = user(&[
            ("LARDER_SERVE_LISTEN", "localhost"),
            ("LARDER_VOLUME_ROOT", "/x"),
            ("LARDER_PULL_SERVICE_HOST", "10.0.0.1"),
            ("XDG_RUNTIME_DIR", "run"),
        ]);
        let path = write(
            &home,
            "memory = \"1GiB\"\n[pull]\nretries = 101\nmemory = \"64 lots\"\nconections = 4\nstall_timeout = 30\n\
             [log]\nformat = \"xml\"\nfilter = \"larder=loud\"\n[volume]\nroot = \"models\"\n[colour]\nred = 1\n",
        );
        let flags = Flags { socket: Some("larder.sock".into()), ..Flags::default() };
        let told = problems(&flags, &surroundings);
        let file = path.display();
        let expected = [
            "LARDER_VOLUME_ROOT: unknown variable; did you mean `LARDER_ROOT`?".to_owned(),
            format!("{file}:1 memory: unknown key; did you mean `pull.memory`?"),
            format!("{file}:3 pull.retries: \"101\" is not a number from 0 to 100"),
            format!("{file}:4 pull.memory: \"64 lots\" is not a size from 8MiB to 4GiB"),
            format!("{file}:5 pull.conections: unknown key; did you mean `pull.connections`?"),
            format!("{file}:6 pull.stall_timeout: it is of type integer, not a duration from 1s to 10m"),
            format!("{file}:8 log.format: \"xml\" is not `auto`, `text` or `json`"),
            format!("{file}:9 log.filter: \"larder=loud\" is not a filter as in `RUST_LOG`"),
            format!("{file}:11 volume.root: \"models\" is not an absolute path"),
            format!("{file}:13 colour.red: unknown key"),
            "LARDER_SERVE_LISTEN: \"localhost\" is not an IP address and a port, or `off`".to_owned(),
            "--socket: \"larder.sock\" is not an absolute path of at most 107 bytes".to_owned(),
        ];
        assert_eq!(told, expected);
        let error = ConfigError { problems: told };
        assert!(error.to_string().starts_with("cannot use the configuration: 12 problems\n  LARDER_VOLUME_ROOT"));
        assert_eq!(error.code(), Code::ConfigInvalid);
    }

    #[test]
    fn a_misspelt_name_is_told_with_the_nearest_one_and_a_strange_one_without() {
        let (_home, surroundings) = user(&[("LARDER_PULL_RETRY", "3"), ("LARDER_LOG_ROTATION", "daily")]);
        assert_eq!(
            problems(&Flags::default(), &surroundings),
            [
                "LARDER_LOG_ROTATION: unknown variable",
                "LARDER_PULL_RETRY: unknown variable; did you mean `LARDER_PULL_RETRIES`?"
            ]
        );
    }

    #[test]
    fn broken_toml_is_told_with_line_and_column() {
        let (home, surroundings) = user(&[("LARDER_PULL_RETRIES", "many")]);
        let path = write(&home, "[pull]\nretries = \n");
        let told = problems(&Flags::default(), &surroundings);
        assert_eq!(told.len(), 2, "{told:#?}");
        assert!(told[0].starts_with(&format!("{}:2:", path.display())), "{told:#?}");
        assert!(told[1].starts_with("LARDER_PULL_RETRIES: "), "{told:#?}");
    }

    #[test]
    fn a_file_that_was_named_must_be_there() {
        let (home, surroundings) = user(&[]);
        let absent = home.path().join("absent.toml");
        let flags = Flags { config: Some(absent.clone()), ..Flags::default() };
        let told = problems(&flags, &surroundings);
        assert!(told[0].starts_with(&format!("{}: cannot be read", absent.display())), "{told:#?}");
        let (_home, surroundings) = user(&[("LARDER_CONFIG", absent.to_str().unwrap())]);
        assert_eq!(problems(&Flags::default(), &surroundings).len(), 1);
        let (_home, surroundings) = user(&[("LARDER_CONFIG", "here.toml")]);
        assert_eq!(
            problems(&Flags::default(), &surroundings),
            ["LARDER_CONFIG: \"here.toml\" is not an absolute path"]
        );
    }

    #[test]
    fn without_a_home_the_variable_to_set_is_named() {
        let nowhere = Surroundings::default();
        let told = problems(&Flags::default(), &nowhere);
        assert_eq!(told, ["volume.root: HOME is not set, so there is no default; set LARDER_ROOT"]);
        let flags = Flags { root: Some("/here".into()), ..Flags::default() };
        assert_eq!(Config::load(&flags, &nowhere).unwrap().serve.socket, Path::new("/here/larder.sock"));
        let (_home, relative) = user(&[("XDG_DATA_HOME", "data")]);
        assert_eq!(problems(&Flags::default(), &relative), ["XDG_DATA_HOME: \"data\" is not an absolute path"]);
    }

    #[test]
    fn an_endless_list_of_problems_is_cut() {
        let (home, surroundings) = user(&[]);
        write(&home, &(0..200).map(|n| format!("zz{n} = 1\n")).collect::<String>());
        let error = Config::load(&Flags::default(), &surroundings).unwrap_err();
        assert_eq!(error.problems.len(), 200);
        assert!(error.to_string().ends_with("\n  and 150 more"), "{error}");
        assert_eq!(error.to_string().lines().count(), MAX_PROBLEMS + 2);
    }

    #[test]
    fn a_file_without_end_is_refused() {
        let (home, surroundings) = user(&[]);
        write(&home, &"#".repeat(MAX_FILE_BYTES as usize + 1));
        assert!(problems(&Flags::default(), &surroundings)[0].contains("longer than 1048576 bytes"));
    }

    #[test]
    fn the_words_for_nothing_are_read() {
        let (_home, surroundings) = user(&[("LARDER_SERVE_LISTEN", "off"), ("LARDER_VOLUME_QUOTA", "none")]);
        let config = Config::load(&Flags::default(), &surroundings).unwrap();
        assert_eq!((config.serve.listen, config.volume.limits.quota), (None, None));
        let (_home, surroundings) = user(&[("LARDER_SOCKET", "/run/x.sock")]);
        assert!(Config::load(&Flags::default(), &surroundings).unwrap().socket_is_explicit());
    }

    #[test]
    fn pods_have_a_socket_where_root_runs_us_or_somebody_wants_one() {
        let pods = |root: bool, variables: &[(&str, &str)]| {
            let environment = [("HOME", "/home/u")].iter().chain(variables).copied().collect();
            Config::load(&Flags::default(), &Surroundings::new(environment, root)).unwrap().serve.pod_socket
        };
        assert_eq!(pods(true, &[]), Some("/run/larder/pods/larder.sock".into()));
        assert_eq!(pods(true, &[("LARDER_SOCKET", "/x/s")]), Some("/x/pods/larder.sock".into()));
        assert_eq!(pods(true, &[("LARDER_SERVE_POD_SOCKET", "off")]), None);
        assert_eq!(pods(false, &[]), None);
        assert_eq!(pods(false, &[("LARDER_SERVE_POD_SOCKET", "/x/p")]), Some("/x/p".into()));
    }

    #[test]
    fn a_list_of_references_is_read_from_the_file_and_from_a_variable() {
        let read = |config: Config| config.pull.pinned.iter().map(ToString::to_string).collect::<Vec<_>>();
        let expected = ["hf://o/a@main", "s3://bucket/p"];
        let (home, surroundings) = user(&[]);
        write(&home, "[pull]\npinned = [\n  \"hf://o/a\",\n  \"s3://bucket/p\",\n  \"hf://o/a@main\",\n]\n");
        assert_eq!(read(Config::load(&Flags::default(), &surroundings).unwrap()), expected);
        let (_home, surroundings) = user(&[("LARDER_PULL_PINNED", " hf://o/a\n s3://bucket/p ")]);
        assert_eq!(read(Config::load(&Flags::default(), &surroundings).unwrap()), expected);

        let (home, surroundings) = user(&[]);
        for (wrong, says) in [
            ("\"hf://o/a\"", "it is of type string, not a list"),
            ("[1]", "it is not a list"),
            ("[\"hf://o/a s3://bucket/p\"]", "it is not a list"),
            ("[\"ftp://o/a\"]", "`ftp://` is not supported"),
        ] {
            let file = write(&home, &format!("[pull]\npinned = {wrong}\n"));
            let told = problems(&Flags::default(), &surroundings);
            assert!(told.len() == 1 && told[0].starts_with(&format!("{}:2 pull.pinned: ", file.display())), "{told:?}");
            assert!(told[0].contains(says), "{told:?}");
        }
    }

    #[test]
    fn what_differs_between_two_configurations_is_told_by_key() {
        let (_home, one) = user(&[]);
        let (_home, other) =
            user(&[("LARDER_PULL_PINNED", "hf://o/a"), ("LARDER_PULL_RETRIES", "1"), ("LARDER_ROOT", "/x")]);
        let load = |surroundings| Config::load(&Flags::default(), surroundings).unwrap();
        assert_eq!(load(&one).differences(&load(&one)), [] as [&str; 0]);
        let differences = load(&one).differences(&load(&other));
        assert_eq!(differences, ["volume.root", "pull.retries", "pull.pinned", "serve.socket"]);
    }

    #[test]
    fn limits_hold_at_both_ends() {
        for (name, value, good) in [
            ("LARDER_PULL_MEMORY", "8MiB", true),
            ("LARDER_PULL_MEMORY", "8388607", false),
            ("LARDER_PULL_MEMORY", "4GiB", true),
            ("LARDER_PULL_MEMORY", "4294967297", false),
            ("LARDER_PULL_CONNECTIONS", "0", false),
            ("LARDER_PULL_CONNECTIONS", "256", true),
            ("LARDER_PULL_CONNECTIONS", "257", false),
            ("LARDER_PULL_STALL_TIMEOUT", "999ms", false),
            ("LARDER_PULL_STALL_TIMEOUT", "10m", true),
            ("LARDER_PULL_STALL_TIMEOUT", "601s", false),
            ("LARDER_VOLUME_QUOTA", "99999999999999999999EB", false),
            ("LARDER_VOLUME_QUOTA", "0", false),
            ("LARDER_VOLUME_MIN_FREE", "0", true),
            ("LARDER_SERVE_WARM_ON_OPEN", "true", true),
            ("LARDER_SERVE_WARM_ON_OPEN", "yes", false),
            ("LARDER_KUBERNETES_NODE", "ip-10-0-0-1.ec2.internal", true),
            ("LARDER_KUBERNETES_NODE", "n1,status.phase=Failed", false),
            ("LARDER_KUBERNETES_NODE", "", true),
            ("LARDER_SERVE_NETWORK_ACCOUNTS", "team/ci kube-system/default", true),
            ("LARDER_SERVE_NETWORK_ACCOUNTS", "team/*", false),
            ("LARDER_SERVE_NETWORK_ACCOUNTS", "ci", false),
            ("LARDER_SOCKET", &format!("/{}", "s".repeat(106)), true),
            ("LARDER_SOCKET", &format!("/{}", "s".repeat(107)), false),
        ] {
            let (_home, surroundings) = user(&[(name, value)]);
            assert_eq!(Config::load(&Flags::default(), &surroundings).is_ok(), good, "{name}={value}");
        }
    }

    #[test]
    fn keys_and_variables_are_unique_and_ours() {
        let mut seen = std::collections::BTreeSet::new();
        for setting in SETTINGS {
            assert!(seen.insert(setting.key) && seen.insert(setting.env), "{} stands twice", setting.key);
            assert_eq!(setting.key.split('.').count(), 2, "{}", setting.key);
            assert!(setting.env.starts_with("LARDER_") && setting.doc.ends_with('.'), "{}", setting.key);
        }
    }

    /// The table as docs/configuration.md has it, between its markers.
    fn documented() -> String {
        let mut text = String::new();
        for setting in SETTINGS {
            let fallback = match setting.default {
                Fallback::Text(value) => format!("`{value}`"),
                other => other.text().to_owned(),
            };
            let flag = setting.flag.map(|flag| format!(", flag `{flag}`")).unwrap_or_default();
            text.push_str(&format!(
                "### `{}`\n\n{}\n\n- Takes: {}\n- Default: {fallback}\n- Variable: `{}`{flag}\n\n",
                setting.key,
                setting.doc,
                setting.takes(),
                setting.env
            ));
        }
        text.push_str("## A file with every key\n\n```toml\n");
        text.push_str(&template());
        text.push_str("```\n\n");
        text
    }

    /// A file that says what the defaults say; a key whose default depends on the user is commented out.
    fn template() -> String {
        let mut text = String::new();
        let mut section = "";
        for setting in SETTINGS {
            let (own, name) = setting.key.split_once('.').unwrap();
            if own != section {
                let gap = if section.is_empty() { "" } else { "\n" };
                text.push_str(&format!("{gap}[{own}]\n"));
                section = own;
            }
            text.push_str(&match setting.default {
                Fallback::Text(value) if value.parse::<u64>().is_ok() || value.parse::<bool>().is_ok() => {
                    format!("{name} = {value}\n")
                }
                Fallback::Text(value) => format!("{name} = \"{value}\"\n"),
                Fallback::EmptyList => format!("{name} = []\n"),
                Fallback::Root => format!("# {name} = \"/var/lib/larder\"\n"),
                Fallback::Socket => format!("# {name} = \"/run/larder/larder.sock\"\n"),
                Fallback::PodSocket => format!("# {name} = \"/run/larder/pods/larder.sock\"\n"),
            });
        }
        text
    }

    #[test]
    fn the_template_says_what_the_defaults_say() {
        let (home, surroundings) = user(&[]);
        let values = |config: &Config| config.effective().iter().map(|e| e.value.clone()).collect::<Vec<_>>();
        let bare = values(&Config::load(&Flags::default(), &surroundings).unwrap());
        write(&home, &template());
        assert_eq!(values(&Config::load(&Flags::default(), &surroundings).unwrap()), bare);
    }

    #[test]
    fn docs_configuration_md_is_the_table() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/configuration.md");
        let text = std::fs::read_to_string(&path).unwrap();
        let (begin, end) = ("<!-- settings: begin -->\n\n", "<!-- settings: end -->");
        let (head, rest) = text.split_once(begin).expect("docs/configuration.md has a begin mark");
        let (table, tail) = rest.split_once(end).expect("docs/configuration.md has an end mark");
        if table != documented() && std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, format!("{head}{begin}{}{end}{tail}", documented())).unwrap();
            return;
        }
        assert!(
            table == documented(),
            "docs/configuration.md is not the table of settings; `UPDATE_DOCS=1 cargo test --lib config::` writes it:\n{}",
            documented()
        );
    }
}

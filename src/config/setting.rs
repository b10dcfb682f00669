//! The table of settings. It alone knows the keys: parsing, `config show` and docs/configuration.md follow it.

use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::de::DeValue;

use super::Config;
use crate::cache::{MinFree, PageCache};
use crate::model::{Bytes, ModelRef, Share};
use crate::serve::Account;
use crate::telemetry::LogFormat;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const PB: u64 = 1_000_000_000_000_000;

/// The longest path a Unix socket can be bound to (`sun_path` without its NUL), in bytes.
const MAX_SOCKET_PATH_BYTES: usize = 107;
/// Longest value of any setting but a list, in bytes.
const MAX_VALUE_BYTES: usize = 4096;
/// Longest name of an object or a taint of Kubernetes, in bytes.
const MAX_NAME_BYTES: usize = 253;
/// Most ServiceAccounts of a list.
const MAX_ACCOUNTS: usize = 100;
/// Most references of a list.
const MAX_REFERENCES: usize = 1_000;

/// One key: where it is written, what it takes, and what it is for.
#[derive(Debug)]
pub struct Setting {
    /// As it is written in the file: `section.name`.
    pub key: &'static str,
    /// The environment variable.
    pub env: &'static str,
    /// The command line flag, if there is one.
    pub flag: Option<&'static str>,
    /// The value when nobody says another.
    pub default: Fallback,
    /// One or two sentences for the documentation.
    pub doc: &'static str,
    pub(super) slot: Slot,
}

/// The value of a setting that nobody set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// The same for everybody.
    Text(&'static str),
    /// A directory that depends on the user.
    Root,
    /// A socket that depends on the user and on the root.
    Socket,
    /// A list with nothing in it.
    EmptyList,
    /// A socket that depends on the user and on the other one.
    PodSocket,
}

impl Fallback {
    /// The value, or how it is found.
    pub fn text(self) -> &'static str {
        match self {
            Fallback::Text(text) => text,
            Fallback::EmptyList => "an empty list",
            Fallback::Root => "`$XDG_DATA_HOME/larder` or `~/.local/share/larder`; for root `/var/lib/larder`",
            Fallback::Socket => {
                "`$XDG_RUNTIME_DIR/larder/larder.sock`, without it `<root>/larder.sock`; for root \
                 `/run/larder/larder.sock`; when the root is set: `<root>/larder.sock`"
            }
            Fallback::PodSocket => "for root `pods/larder.sock` in the directory of `serve.socket`; for others `off`",
        }
    }
}

/// Where the value of a setting lands, and within which limits.
#[derive(Debug)]
pub(super) enum Slot {
    Directory(fn(&mut Config) -> &mut PathBuf),
    /// The path of a directory, or `off`.
    OptionalDirectory(fn(&mut Config) -> &mut Option<PathBuf>),
    Socket(fn(&mut Config) -> &mut PathBuf),
    /// The path of a socket, or `off`.
    OptionalSocket(fn(&mut Config) -> &mut Option<PathBuf>),
    Size(fn(&mut Config) -> &mut Bytes, RangeInclusive<u64>),
    /// A size, or `none`.
    OptionalSize(fn(&mut Config) -> &mut Option<Bytes>, RangeInclusive<u64>),
    /// A size or a percentage of the file system, or `none`.
    Quota(fn(&mut Config) -> &mut Option<Share>, RangeInclusive<u64>),
    /// A size or a percentage of the file system, or `auto`.
    MinFree(fn(&mut Config) -> &mut MinFree, RangeInclusive<u64>),
    Percent(fn(&mut Config) -> &mut u8, RangeInclusive<u8>),
    Count(fn(&mut Config) -> &mut u32, RangeInclusive<u32>),
    Time(fn(&mut Config) -> &mut Duration, RangeInclusive<Duration>),
    Bool(fn(&mut Config) -> &mut bool),
    /// An address and a port, or `off`.
    Listen(fn(&mut Config) -> &mut Option<SocketAddr>),
    /// A list; in a text, blanks separate its members.
    References(fn(&mut Config) -> &mut Vec<ModelRef>),
    /// A list of ServiceAccounts; in a text, blanks separate its members.
    Accounts(fn(&mut Config) -> &mut Vec<Account>),
    /// The name of an object or a taint of Kubernetes, or `off`.
    OptionalName(fn(&mut Config) -> &mut Option<String>),
    Format(fn(&mut Config) -> &mut LogFormat),
    /// `auto`, `keep`, `bypass`.
    PageCache(fn(&mut Config) -> &mut PageCache),
    Filter(fn(&mut Config) -> &mut String),
}

/// Every setting, in the order of the documentation.
pub static SETTINGS: &[Setting] = &[
    Setting {
        key: "volume.root",
        env: "LARDER_ROOT",
        flag: Some("--root"),
        default: Fallback::Root,
        doc: "The directory larder owns. Readers are given `<root>/public`, and nothing else of it.",
        slot: Slot::Directory(|c| &mut c.volume.root),
    },
    Setting {
        key: "volume.quota",
        env: "LARDER_VOLUME_QUOTA",
        flag: None,
        default: Fallback::Text("none"),
        doc: "Most of the disk that models may use; a percentage is of the file system, `none` is all that it has. What \
              was used least recently is evicted for a pull that does not fit; if that is not enough, the pull is refused \
              before its first byte. A change is applied at once.",
        slot: Slot::Quota(|c| &mut c.volume.limits.quota, 1_000_000..=1000 * PB),
    },
    Setting {
        key: "volume.low_water",
        env: "LARDER_VOLUME_LOW_WATER",
        flag: None,
        default: Fallback::Text("95%"),
        doc: "To how much of the quota an eviction brings use down, so that not every pull must evict. A change is applied at once.",
        slot: Slot::Percent(|c| &mut c.volume.limits.low_water_percent, 1..=100),
    },
    Setting {
        key: "volume.min_free",
        env: "LARDER_VOLUME_MIN_FREE",
        flag: None,
        default: Fallback::Text("auto"),
        doc: "How much of the file system is left to others, whatever the quota says; what they use counts too. `auto` is \
              20 % where kubelet may be on the same file system, because it throws images away below 15 % and evicts \
              pods below 10 %, and 2GB elsewhere. A change is applied at once.",
        slot: Slot::MinFree(|c| &mut c.volume.limits.min_free, 0..=PB),
    },
    Setting {
        key: "volume.min_residency",
        env: "LARDER_VOLUME_MIN_RESIDENCY",
        flag: None,
        default: Fallback::Text("10m"),
        doc: "A model that came less than this ago is not evicted, so that two that do not fit together do not push each \
              other out again and again. A change is applied at once.",
        slot: Slot::Time(|c| &mut c.volume.limits.min_residency, Duration::ZERO..=Duration::from_secs(7 * 24 * 3600)),
    },
    Setting {
        key: "pull.memory",
        env: "LARDER_PULL_MEMORY",
        flag: None,
        default: Fallback::Text("64MiB"),
        doc: "Memory for bytes that have come and are not yet written, all pulls together.",
        slot: Slot::Size(|c| &mut c.pull.memory, 8 * MIB..=4 * GIB),
    },
    Setting {
        key: "pull.connections",
        env: "LARDER_PULL_CONNECTIONS",
        flag: None,
        default: Fallback::Text("16"),
        doc: "Most requests for bytes under way, all pulls together; a source that gives as much on fewer is asked on fewer.",
        slot: Slot::Count(|c| &mut c.pull.connections, 1..=256),
    },
    Setting {
        key: "pull.background_rate",
        env: "LARDER_PULL_BACKGROUND_RATE",
        flag: None,
        default: Fallback::Text("none"),
        doc: "Bytes a second that pulls nobody waits for may take, all together: those of pinned models, those that are only asked \
              for and not followed, those that a restart goes on with. Whatever it says, they fetch one range at a time while \
              somebody waits for another model.",
        slot: Slot::OptionalSize(|c| &mut c.pull.background_rate, 1_000_000..=PB),
    },
    Setting {
        key: "pull.page_cache",
        env: "LARDER_PULL_PAGE_CACHE",
        flag: None,
        default: Fallback::Text("auto"),
        doc: "Whether a model that is pulled stays in memory for who loads it first: `keep`; or goes past it to the disk, \
              which is the faster and cheaper way to pull: `bypass`. `auto` keeps of a model that takes at most half of the \
              memory that is available what comes no faster than 150 MB/s for each processor.",
        slot: Slot::PageCache(|c| &mut c.pull.page_cache),
    },
    Setting {
        key: "pull.stall_timeout",
        env: "LARDER_PULL_STALL_TIMEOUT",
        flag: None,
        default: Fallback::Text("30s"),
        doc: "Longest time without a byte, before a request is dropped and asked again from where it stopped.",
        slot: Slot::Time(|c| &mut c.pull.stall_timeout, Duration::from_secs(1)..=Duration::from_secs(600)),
    },
    Setting {
        key: "pull.retries",
        env: "LARDER_PULL_RETRIES",
        flag: None,
        default: Fallback::Text("8"),
        doc: "How often a request may fail in a row, without one byte of progress, before the pull fails.",
        slot: Slot::Count(|c| &mut c.pull.retries, 0..=100),
    },
    Setting {
        key: "pull.environment",
        env: "LARDER_PULL_ENVIRONMENT",
        flag: None,
        default: Fallback::Text("off"),
        doc: "A directory with a file for each variable that sources are told by (`AWS_SECRET_ACCESS_KEY`, `HF_TOKEN`, …), whose               text is its value: a mounted Secret. It is read again at each pull, and goes before the variables of the process.",
        slot: Slot::OptionalDirectory(|c| &mut c.pull.environment),
    },
    Setting {
        key: "pull.pinned",
        env: "LARDER_PULL_PINNED",
        flag: None,
        default: Fallback::EmptyList,
        doc: "References that are pulled when the daemon starts, and kept: the pre-warm list. A change is applied at once.",
        slot: Slot::References(|c| &mut c.pull.pinned),
    },
    Setting {
        key: "serve.socket",
        env: "LARDER_SOCKET",
        flag: Some("--socket"),
        default: Fallback::Socket,
        doc: "The Unix socket the daemon answers on, and on which the commands look for it.",
        slot: Slot::Socket(|c| &mut c.serve.socket),
    },
    Setting {
        key: "serve.pod_socket",
        env: "LARDER_SERVE_POD_SOCKET",
        flag: None,
        default: Fallback::PodSocket,
        doc: "The Unix socket that pods open models on; `off` for none. Whoever reaches it can have models pulled and \
              read them, and nothing else: its directory, in which it stands alone, is what pods mount.",
        slot: Slot::OptionalSocket(|c| &mut c.serve.pod_socket),
    },
    Setting {
        key: "serve.listen",
        env: "LARDER_SERVE_LISTEN",
        flag: None,
        default: Fallback::Text("127.0.0.1:7437"),
        doc: "The TCP address the daemon answers on; `off` for none. Whoever reaches it can pull and remove models.",
        slot: Slot::Listen(|c| &mut c.serve.listen),
    },
    Setting {
        key: "serve.health_listen",
        env: "LARDER_SERVE_HEALTH_LISTEN",
        flag: None,
        default: Fallback::Text("off"),
        doc: "A further TCP address, which answers `/livez`, `/readyz` and `/metrics` and nothing else; `off` for none.",
        slot: Slot::Listen(|c| &mut c.serve.health_listen),
    },
    Setting {
        key: "serve.network_listen",
        env: "LARDER_SERVE_NETWORK_LISTEN",
        flag: None,
        default: Fallback::Text("off"),
        doc: "A further TCP address, for the network of pods; `off` for none. Every request needs the token of a ServiceAccount in \
              `serve.network_accounts`, made for the audience `larder.dev`; the Kubernetes API confirms it. It is not encrypted.",
        slot: Slot::Listen(|c| &mut c.serve.network_listen),
    },
    Setting {
        key: "serve.network_accounts",
        env: "LARDER_SERVE_NETWORK_ACCOUNTS",
        flag: None,
        default: Fallback::EmptyList,
        doc: "ServiceAccounts, as `namespace/name`, that may use the API on `serve.network_listen`. They may do all of it, so they can \
              pull and remove models.",
        slot: Slot::Accounts(|c| &mut c.serve.network_accounts),
    },
    Setting {
        key: "serve.warm_on_open",
        env: "LARDER_SERVE_WARM_ON_OPEN",
        flag: None,
        default: Fallback::Text("false"),
        doc: "Whether an open of a model that is not in the page cache starts to bring it there, in the background.",
        slot: Slot::Bool(|c| &mut c.serve.warm_on_open),
    },
    Setting {
        key: "serve.metrics_by_model",
        env: "LARDER_SERVE_METRICS_BY_MODEL",
        flag: None,
        default: Fallback::Text("false"),
        doc: "Whether `/metrics` has a series for each model, named by its reference. Leave it off where many models, or \
              many versions of them, come and go.",
        slot: Slot::Bool(|c| &mut c.serve.metrics_by_model),
    },
    Setting {
        key: "scrub.rate",
        env: "LARDER_SCRUB_RATE",
        flag: None,
        default: Fallback::Text("20MB"),
        doc: "Bytes a second that the daemon reads by itself to find out whether the disk still gives what was written. \
              `none`: it does not; `larder scrub` does when it is asked.",
        slot: Slot::OptionalSize(|c| &mut c.scrub.rate, 1_000_000..=PB),
    },
    Setting {
        key: "scrub.every",
        env: "LARDER_SCRUB_EVERY",
        flag: None,
        default: Fallback::Text("30d"),
        doc: "Time between the end of one such pass over all blobs and the beginning of the next.",
        slot: Slot::Time(|c| &mut c.scrub.every, Duration::from_secs(3600)..=Duration::from_secs(365 * 24 * 3600)),
    },
    Setting {
        key: "kubernetes.node",
        env: "LARDER_KUBERNETES_NODE",
        flag: None,
        default: Fallback::Text("off"),
        doc: "The name of this node in its cluster. With it larder asks the Kubernetes API which pods of the node are gone, and \
              ends their leases; `off`: nobody is asked, and they stay. The DaemonSet sets it.",
        slot: Slot::OptionalName(|c| &mut c.kubernetes.node),
    },
    Setting {
        key: "kubernetes.announce",
        env: "LARDER_KUBERNETES_ANNOUNCE",
        flag: None,
        default: Fallback::Text("false"),
        doc: "Whether the node says in its labels that larder is ready and which models are there, and in events what went \
              wrong. Needs `kubernetes.node`, and rights that the component `node-labels` brings.",
        slot: Slot::Bool(|c| &mut c.kubernetes.announce),
    },
    Setting {
        key: "kubernetes.startup_taint",
        env: "LARDER_KUBERNETES_STARTUP_TAINT",
        flag: None,
        default: Fallback::Text("off"),
        doc: "The key of a taint that new nodes have. larder takes it off, once, when everything that is pinned is there. Needs \
              `kubernetes.announce`.",
        slot: Slot::OptionalName(|c| &mut c.kubernetes.startup_taint),
    },
    Setting {
        key: "log.format",
        env: "LARDER_LOG_FORMAT",
        flag: None,
        default: Fallback::Text("auto"),
        doc: "How log lines look: `text` for people, `json` for machines; `auto` is `text` on a terminal and `json` \
              elsewhere.",
        slot: Slot::Format(|c| &mut c.log.format),
    },
    Setting {
        key: "log.filter",
        env: "LARDER_LOG_FILTER",
        flag: None,
        default: Fallback::Text("info"),
        doc: "What is logged: a level, or levels by module such as `info,larder::cache=debug`.",
        slot: Slot::Filter(|c| &mut c.log.filter),
    },
];

impl Setting {
    /// What the setting takes, with its limits.
    pub fn takes(&self) -> String {
        match &self.slot {
            Slot::Directory(_) => "an absolute path".to_owned(),
            Slot::OptionalDirectory(_) => "an absolute path, or `off`".to_owned(),
            Slot::Socket(_) => format!("an absolute path of at most {MAX_SOCKET_PATH_BYTES} bytes"),
            Slot::OptionalSocket(_) => format!("an absolute path of at most {MAX_SOCKET_PATH_BYTES} bytes, or `off`"),
            Slot::Size(_, limits) => {
                format!("a size from {} to {}", size_text(*limits.start()), size_text(*limits.end()))
            }
            Slot::Quota(_, limits) => {
                let (least, most) = (size_text(*limits.start()), size_text(*limits.end()));
                format!("a size from {least} to {most}, a percentage from 1% to 100%, or `none`")
            }
            Slot::OptionalSize(_, limits) => {
                format!("a size from {} to {}, or `none`", size_text(*limits.start()), size_text(*limits.end()))
            }
            Slot::MinFree(_, limits) => {
                let (least, most) = (size_text(*limits.start()), size_text(*limits.end()));
                format!("a size from {least} to {most}, a percentage from 0% to 99%, or `auto`")
            }
            Slot::Percent(_, limits) => format!("a percentage from {}% to {}%", limits.start(), limits.end()),
            Slot::Count(_, limits) => format!("a number from {} to {}", limits.start(), limits.end()),
            Slot::Time(_, limits) => {
                format!("a duration from {} to {}", time_text(limits.start()), time_text(limits.end()))
            }
            Slot::Bool(_) => "`true` or `false`".to_owned(),
            Slot::Listen(_) => "an IP address and a port, or `off`".to_owned(),
            Slot::References(_) => {
                format!(
                    "a list of at most {MAX_REFERENCES} references without blanks; in a variable, blanks separate them"
                )
            }
            Slot::Accounts(_) => {
                format!("a list of at most {MAX_ACCOUNTS} of `namespace/name`; in a variable, blanks separate them")
            }
            Slot::OptionalName(_) => {
                format!("1 to {MAX_NAME_BYTES} of the characters `a-z 0-9 - . /`, or `off`")
            }
            Slot::Format(_) => "`auto`, `text` or `json`".to_owned(),
            Slot::PageCache(_) => "`auto`, `keep` or `bypass`".to_owned(),
            Slot::Filter(_) => "a filter as in `RUST_LOG`".to_owned(),
        }
    }

    /// A value of the file as text. Sizes and numbers may be written as TOML integers, everything else is a string.
    pub(super) fn text_of(&self, value: &DeValue<'_>) -> Result<String, String> {
        let is_share = matches!(self.slot, Slot::Quota(..) | Slot::MinFree(..));
        let number = is_share || matches!(self.slot, Slot::Size(..) | Slot::OptionalSize(..) | Slot::Count(..));
        let list = matches!(self.slot, Slot::References(_) | Slot::Accounts(_));
        match value {
            DeValue::Array(members) if list => {
                let text = |member: &DeValue<'_>| match member {
                    DeValue::String(text) if !text.contains(char::is_whitespace) && !text.is_empty() => {
                        Ok(text.to_string())
                    }
                    _ => Err(format!("it is not {}", self.takes())),
                };
                members
                    .iter()
                    .map(|member| text(member.get_ref()))
                    .collect::<Result<Vec<_>, _>>()
                    .map(|all| all.join(" "))
            }
            DeValue::String(text) if !list && !matches!(self.slot, Slot::Count(..)) => Ok(text.to_string()),
            DeValue::Boolean(value) if matches!(self.slot, Slot::Bool(_)) => Ok(value.to_string()),
            DeValue::Integer(digits) if number && digits.radix() == 10 => Ok(digits.as_str().replace('_', "")),
            other => Err(format!("it is of type {}, not {}", other.type_str(), self.takes())),
        }
    }

    /// Reads a value into its place. An error says what was found and what is taken.
    pub(super) fn read(&self, text: &str, config: &mut Config) -> Result<(), String> {
        let text = text.trim();
        let refuse = || format!("{:?} is not {}", shown(text), self.takes());
        let longest = match self.slot {
            Slot::References(_) => MAX_REFERENCES * ModelRef::MAX_BYTES,
            Slot::Accounts(_) => MAX_ACCOUNTS * 2 * MAX_NAME_BYTES,
            _ => MAX_VALUE_BYTES,
        };
        if text.len() > longest || text.contains('\0') {
            return Err(refuse());
        }
        match &self.slot {
            Slot::Directory(at) => *at(config) = absolute(text).ok_or_else(refuse)?,
            Slot::OptionalDirectory(at) if text == "off" => *at(config) = None,
            Slot::OptionalDirectory(at) => *at(config) = Some(absolute(text).ok_or_else(refuse)?),
            Slot::Socket(at) => *at(config) = socket(text).ok_or_else(refuse)?,
            Slot::OptionalSocket(at) if text == "off" => *at(config) = None,
            Slot::OptionalSocket(at) => *at(config) = Some(socket(text).ok_or_else(refuse)?),
            Slot::Size(at, limits) => *at(config) = size(text, limits).ok_or_else(refuse)?,
            Slot::OptionalSize(at, _) if text == "none" => *at(config) = None,
            Slot::OptionalSize(at, limits) => *at(config) = Some(size(text, limits).ok_or_else(refuse)?),
            Slot::Quota(at, _) if text == "none" => *at(config) = None,
            Slot::Quota(at, limits) => *at(config) = Some(share(text, limits, 1..=100).ok_or_else(refuse)?),
            Slot::MinFree(at, _) if text == "auto" => *at(config) = MinFree::Auto,
            Slot::MinFree(at, limits) => *at(config) = MinFree::Of(share(text, limits, 0..=99).ok_or_else(refuse)?),
            Slot::Percent(at, limits) => {
                let Ok(Share::Percent(percent)) = text.parse() else { return Err(refuse()) };
                *at(config) = Some(percent).filter(|n| limits.contains(n)).ok_or_else(refuse)?;
            }
            Slot::Count(at, limits) => {
                *at(config) = text.parse().ok().filter(|n| limits.contains(n)).ok_or_else(refuse)?;
            }
            Slot::Time(at, limits) => {
                let time = humantime::parse_duration(text).ok().filter(|t| limits.contains(t));
                *at(config) = time.ok_or_else(refuse)?;
            }
            Slot::Bool(at) => *at(config) = text.parse().map_err(|_| refuse())?,
            Slot::Listen(at) if text == "off" => *at(config) = None,
            Slot::Listen(at) => *at(config) = Some(text.parse().map_err(|_| refuse())?),
            Slot::References(at) => {
                let mut references = Vec::new();
                for word in text.split_whitespace() {
                    let reference = word.parse().map_err(|e: crate::model::ReferenceError| e.to_string())?;
                    if !references.contains(&reference) {
                        references.push(reference);
                    }
                }
                if references.len() > MAX_REFERENCES {
                    return Err(format!("it has {} references, it is not {}", references.len(), self.takes()));
                }
                *at(config) = references;
            }
            Slot::Accounts(at) => {
                let accounts: Option<Vec<Account>> = text.split_whitespace().map(|word| word.parse().ok()).collect();
                *at(config) = accounts.filter(|accounts| accounts.len() <= MAX_ACCOUNTS).ok_or_else(refuse)?;
            }
            Slot::OptionalName(at) if text == "off" => *at(config) = None,
            Slot::OptionalName(at) => *at(config) = Some(name(text).ok_or_else(refuse)?),
            Slot::Format(at) => {
                *at(config) = match text {
                    "auto" => LogFormat::Auto,
                    "text" => LogFormat::Text,
                    "json" => LogFormat::Json,
                    _ => return Err(refuse()),
                }
            }
            Slot::PageCache(at) => {
                *at(config) = match text {
                    "auto" => PageCache::Auto,
                    "keep" => PageCache::Keep,
                    "bypass" => PageCache::Bypass,
                    _ => return Err(refuse()),
                }
            }
            Slot::Filter(at) => {
                if text.is_empty() || tracing_subscriber::EnvFilter::try_new(text).is_err() {
                    return Err(refuse());
                }
                *at(config) = text.to_owned();
            }
        }
        Ok(())
    }
}

/// A path from outside, if it does not depend on where the process was started.
pub(super) fn absolute(text: &str) -> Option<PathBuf> {
    let path = Path::new(text);
    path.is_absolute().then(|| path.to_path_buf())
}

fn socket(text: &str) -> Option<PathBuf> {
    absolute(text).filter(|_| text.len() <= MAX_SOCKET_PATH_BYTES)
}

/// It stands in a selector, where `,` and `=` have a meaning.
fn name(text: &str) -> Option<String> {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-./".contains(&b);
    ((1..=MAX_NAME_BYTES).contains(&text.len()) && text.bytes().all(plain)).then(|| text.to_owned())
}

fn size(text: &str, limits: &RangeInclusive<u64>) -> Option<Bytes> {
    text.parse().ok().filter(|Bytes(n)| limits.contains(n)).map(|bytes: Bytes| bytes)
}

/// A size or a percentage, each within its limits.
fn share(text: &str, sizes: &RangeInclusive<u64>, percents: RangeInclusive<u8>) -> Option<Share> {
    text.parse().ok().filter(|share| match share {
        Share::Bytes(Bytes(n)) => sizes.contains(n),
        Share::Percent(n) => percents.contains(n),
    })
}

/// A limit as it would be written: binary units where they are exact.
fn size_text(bytes: u64) -> String {
    match bytes {
        0 => "0".to_owned(),
        n if n.is_multiple_of(GIB) => format!("{}GiB", n / GIB),
        n if n.is_multiple_of(MIB) => format!("{}MiB", n / MIB),
        n if n.is_multiple_of(KIB) && n < 1_000_000 => format!("{}KiB", n / KIB),
        n => Bytes(n).to_string().replace(".0 ", ""),
    }
}

fn time_text(time: &Duration) -> String {
    humantime::format_duration(*time).to_string()
}

fn shown(text: &str) -> String {
    text.chars().take(80).collect()
}

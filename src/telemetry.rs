//! Logs, metrics and traces: the subscriber, the names of log fields, every metric in one list, and what a collector is sent.
//!
//! # Fields
//!
//! A log line is an event with the fields below and no others for the same meaning, so that one query finds all lines
//! about one thing. A line is written once, where the error is handled, never on the way there. No field ever carries a
//! token, a signed URL or a URL's query.
//!
//! | Field | Meaning |
//! |---|---|
//! | `reference` | a ModelRef in canonical form |
//! | `model` | a model id, 16 hexadecimal digits |
//! | `pull` | a pull id |
//! | `source` | the scheme of a source: `hf`, `s3`, … |
//! | `file` | a file of a model, relative to its snapshot |
//! | `host` | a host of a source |
//! | `path` | a path on this disk |
//! | `bytes` | a number of bytes |
//! | `seconds` | how long it took |
//! | `attempt` | which attempt this was, from 1 |
//! | `code` | the stable code of an error |
//! | `fault` | the class of an error |
//! | `action` | what to do about an error |
//! | `error` | the sentence of an error |
//! | `request_id` | one HTTP request |
//! | `method`, `route`, `status` | of an HTTP request and its answer |

pub mod metrics;
mod traces;

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::util::SubscriberInitExt;

pub use metrics::Metrics;
pub use traces::{Parent, Traces, TracesError, Work};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    #[default]
    Auto,
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Why logging could not be set up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InitError {
    /// The filter breaks the grammar.
    #[error("cannot read the log filter `{filter}`: {why}")]
    Filter {
        /// As it was given.
        filter: String,
        /// What is wrong with it.
        why: String,
    },
    /// This process has a subscriber.
    #[error("cannot set up logging: it is set up already")]
    Twice,
}

/// What libraries say below `warn` is about them, not about us, and may quote a request. The errors of hf-hub and kube come
/// back to us and are logged once, where they are handled. A filter that names one wins.
const QUIET: &str = "hf_hub=off,h2=warn,hyper=warn,hyper_util=warn,reqwest=warn,rustls=warn,object_store=warn,\
                     tower=warn,sled=warn,kube_client=off,kube_runtime=off";

/// Starts logging to standard error. `filter` is `info`, `larder=debug`, … as in `RUST_LOG`.
///
/// Timestamps are RFC 3339 in UTC. Colours only on a terminal, and not if `NO_COLOR` is set.
pub fn init(format: LogFormat, filter: &str) -> Result<(), InitError> {
    let terminal = std::io::stderr().is_terminal();
    let json = match format {
        LogFormat::Auto => !terminal,
        LogFormat::Text => false,
        LogFormat::Json => true,
    };
    let colour = terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    subscriber(json, colour, filter, std::io::stderr)?.try_init().map_err(|_| InitError::Twice)
}

fn subscriber<W>(
    json: bool,
    colour: bool,
    filter: &str,
    writer: W,
) -> Result<Box<dyn tracing::Subscriber + Send + Sync>, InitError>
where
    W: for<'a> MakeWriter<'a> + Send + Sync + 'static,
{
    let filter = EnvFilter::builder()
        .parse(format!("{QUIET},{filter}"))
        .map_err(|why| InitError::Filter { filter: filter.to_owned(), why: why.to_string() })?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(writer);
    Ok(match json {
        true => Box::new(builder.json().flatten_event(true).with_current_span(false).finish()),
        false => Box::new(builder.with_ansi(colour).finish()),
    })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn written(json: bool, filter: &str) -> String {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = subscriber(json, false, filter, move || writer.clone()).unwrap();
        tracing::subscriber::with_default(subscriber, || {
            tracing::info!(model = "abc", bytes = 7, "the model is ready");
            tracing::info!(target: "sled", "noise");
            tracing::debug!("detail");
        });
        String::from_utf8(lines.0.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn json_lines_carry_fields_and_an_rfc_3339_timestamp() {
        let text = written(true, "info");
        let line: serde_json::Value = serde_json::from_str(text.trim_end()).unwrap();
        assert_eq!(line["message"], "the model is ready");
        assert_eq!((&line["model"], &line["bytes"]), (&"abc".into(), &7.into()));
        humantime::parse_rfc3339(line["timestamp"].as_str().unwrap()).unwrap();
    }

    #[test]
    fn text_lines_have_no_escape_codes_without_colour() {
        let text = written(false, "info");
        assert!(text.contains("the model is ready") && !text.contains('\u{1b}'), "{text}");
    }

    #[test]
    fn libraries_are_quiet_until_they_are_named() {
        assert!(!written(false, "debug").contains("noise"));
        assert!(written(false, "debug").contains("detail"));
        assert!(written(false, "info,sled=info").contains("noise"));
    }

    #[test]
    fn a_bad_filter_is_an_error_that_quotes_it() {
        let Err(error) = subscriber(false, false, "larder=loud", std::io::sink) else { panic!("it was read") };
        assert!(error.to_string().starts_with("cannot read the log filter `larder=loud`: "), "{error}");
    }
}

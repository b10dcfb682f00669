//! When a host may be asked again: what its answers ask us to wait, and the [`HostGate`] that keeps to it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use reqwest::StatusCode;
use reqwest::header::HeaderMap;
use tokio::time::Instant;
use url::Url;

use super::*;

/// Longest wait a source may ask for: a longer Retry-After counts as this.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(600);
/// Most hosts the [`HostGate`] remembers; more than any pull talks to.
const MAX_GATED_HOSTS: usize = 1024;

/// Told when a request must wait for its host. What it returns is held until the wait is over.
pub type OnGate = Arc<dyn Fn() -> Box<dyn Send> + Send + Sync>;

tokio::task_local! {
    static ON_GATE: OnGate;
}

/// Does `work`, and tells `on_gate` of each wait of its own task. The task, because no layer between a pull and a gate should
/// have to hand it on.
pub fn telling_of_gates<F: Future>(on_gate: OnGate, work: F) -> impl Future<Output = F::Output> {
    ON_GATE.scope(on_gate, work)
}

/// Holds back requests to a host until the time it named. Shared by all sources, so that sixteen parallel ranges do not
/// ask sixteen times.
#[derive(Default)]
pub struct HostGate {
    not_before: Mutex<HashMap<String, Instant>>,
}

impl HostGate {
    /// Nobody asks `host` (with its port, if it is not the scheme's) for `wait`, at most [`MAX_RETRY_AFTER`].
    pub fn note(&self, host: &str, wait: Duration) {
        if wait.is_zero() {
            return;
        }
        let now = Instant::now();
        let until = now + wait.min(MAX_RETRY_AFTER);
        let mut hosts = self.not_before.lock().unwrap_or_else(PoisonError::into_inner);
        if hosts.len() >= MAX_GATED_HOSTS {
            hosts.retain(|_, until| *until > now);
        }
        if let Some(known) = hosts.get_mut(host) {
            *known = until.max(*known);
        } else if hosts.len() < MAX_GATED_HOSTS {
            hosts.insert(host.to_owned(), until);
        }
    }

    /// Waits until `host` may be asked; at most [`MAX_RETRY_AFTER`], however often it is noted meanwhile.
    pub async fn wait(&self, host: &str) {
        let latest = Instant::now() + MAX_RETRY_AFTER;
        loop {
            let until = {
                let mut hosts = self.not_before.lock().unwrap_or_else(PoisonError::into_inner);
                match hosts.get(host) {
                    Some(until) if *until > Instant::now() && Instant::now() < latest => (*until).min(latest),
                    Some(_) => {
                        hosts.remove(host);
                        return;
                    }
                    None => return,
                }
            };
            let _wait = ON_GATE.try_with(|on_gate| on_gate()).ok();
            tokio::time::sleep_until(until).await;
        }
    }
}

/// `host` or `host:port`, as errors and the gate name it.
pub(super) fn authority(url: &Url) -> String {
    match (url.host_str(), url.port()) {
        (Some(host), Some(port)) => format!("{host}:{port}"),
        (Some(host), None) => host.to_owned(),
        (None, _) => String::new(),
    }
}

/// How long the answer asks to wait, at most [`MAX_RETRY_AFTER`]: Retry-After of a refusal, or what is left of a window
/// whose requests are used up.
pub(super) fn asked_to_wait(headers: &HeaderMap, status: StatusCode) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let refused = matches!(status.as_u16(), 429 | 503);
    let retry_after = text("retry-after").filter(|_| refused).and_then(|value| retry_after(value, SystemTime::now()));
    let window = text("ratelimit").and_then(used_up_window);
    let older = match (text("ratelimit-remaining").map(str::trim), text("ratelimit-reset")) {
        (Some("0"), Some(reset)) => seconds(reset),
        _ => None,
    };
    retry_after.or(window).or(older)
}

/// Retry-After: seconds or a date, from servers that may write anything.
fn retry_after(value: &str, now: SystemTime) -> Option<Duration> {
    seconds(value).or_else(|| {
        let at = httpdate::parse_http_date(value.trim()).ok()?;
        Some(at.duration_since(now).unwrap_or_default().min(MAX_RETRY_AFTER))
    })
}

fn seconds(value: &str) -> Option<Duration> {
    let seconds: f64 = value.trim().parse().ok().filter(|s: &f64| !s.is_nan())?;
    Some(Duration::from_secs_f64(seconds.clamp(0.0, MAX_RETRY_AFTER.as_secs_f64())))
}

/// `RateLimit: "name";r=0;t=55`, a list of them, or the older `limit=100, remaining=0, reset=55`: the longest wait of
/// those that have nothing remaining.
fn used_up_window(value: &str) -> Option<Duration> {
    let parameters = |item: &str| -> HashMap<String, String> {
        item.split(';').filter_map(|p| p.split_once('=')).map(|(k, v)| (k.trim().into(), v.trim().into())).collect()
    };
    let older = parameters(&value.replace(',', ";"));
    if older.get("remaining").is_some_and(|r| r == "0") {
        return older.get("reset").and_then(|reset| seconds(reset));
    }
    let used_up = value.split(',').map(parameters).filter(|p| p.get("r").is_some_and(|r| r == "0"));
    used_up.filter_map(|p| p.get("t").and_then(|t| seconds(t))).max()
}

#[cfg(test)]
mod tests {
    use super::*;

    use reqwest::header::{HeaderName, HeaderValue};

    #[test]
    fn retry_after_is_understood_in_every_form_and_clamped() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let date = |offset: u64| httpdate::fmt_http_date(now + Duration::from_secs(offset));
        let past = httpdate::fmt_http_date(now - Duration::from_secs(60));
        for (text, seconds) in [
            ("0", Some(0)),
            ("120", Some(120)),
            (" 7 ", Some(7)),
            ("-5", Some(0)),
            ("1e12", Some(600)),
            ("99999999999999999999999", Some(600)),
            ("inf", Some(600)),
            (&date(90), Some(90)),
            (&date(1_000_000), Some(600)),
            (&past, Some(0)),
            ("NaN", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(retry_after(text, now), seconds.map(Duration::from_secs), "{text:?}");
        }
    }

    #[test]
    fn a_window_that_is_used_up_is_waited_for() {
        for (text, seconds) in [
            (r#""default";r=0;t=55"#, Some(55)),
            (r#""api";r=4;t=55"#, None),
            (r#""a";r=0;t=5, "b";r=0;t=9, "c";r=1;t=99"#, Some(9)),
            ("limit=10, remaining=0, reset=12", Some(12)),
            ("limit=10, remaining=3, reset=12", None),
            (r#""a";r=0;t=1e99"#, Some(600)),
            (r#""a";r=0"#, None),
            (";;==,,", None),
        ] {
            assert_eq!(used_up_window(text), seconds.map(Duration::from_secs), "{text:?}");
        }
        let headers = |pairs: &[(&'static str, &'static str)]| -> HeaderMap {
            pairs.iter().map(|(k, v)| (HeaderName::from_static(k), HeaderValue::from_static(v))).collect()
        };
        let older = headers(&[("ratelimit-remaining", "0"), ("ratelimit-reset", "3")]);
        assert_eq!(asked_to_wait(&older, StatusCode::OK), Some(Duration::from_secs(3)));
        let page = headers(&[("retry-after", "3")]);
        assert_eq!(asked_to_wait(&page, StatusCode::OK), None, "Retry-After of an answer that is no refusal");
        assert_eq!(asked_to_wait(&page, StatusCode::SERVICE_UNAVAILABLE), Some(Duration::from_secs(3)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_gate_holds_a_host_back_until_its_time_and_no_other_host() {
        let gate = HostGate::default();
        let began = Instant::now();
        gate.note("busy.example", Duration::from_secs(40));
        gate.note("busy.example", Duration::from_secs(10));
        gate.wait("idle.example").await;
        assert_eq!(began.elapsed(), Duration::ZERO);
        gate.wait("busy.example").await;
        assert_eq!(began.elapsed().as_secs(), 40, "the later time counts");
        gate.wait("busy.example").await;
        assert_eq!(began.elapsed().as_secs(), 40);

        gate.note("busy.example", Duration::from_secs(1_000_000));
        gate.wait("busy.example").await;
        assert_eq!(began.elapsed().as_secs(), 40 + 600, "no host holds us longer than the longest wait");
    }

    #[test]
    fn the_gate_remembers_only_so_many_hosts() {
        let gate = HostGate::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _entered = runtime.enter();
        for i in 0..5000 {
            gate.note(&format!("{i}.example"), Duration::from_secs(60));
        }
        assert_eq!(gate.not_before.lock().unwrap().len(), MAX_GATED_HOSTS);
    }
}

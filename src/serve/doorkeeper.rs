//! The doorkeeper of the door on the network of pods: who asks must have the token of a ServiceAccount that is allowed in.
//!
//! A token is made for this audience alone, so one that somebody stole here is good for nothing else, and one that was made for
//! the API server is not taken. Who it is of, the API server says; its answer is kept for a short time.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use aws_lc_rs::digest::{SHA256, digest};
use axum::http::{HeaderMap, Method, header};
use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::problem::Refused;
use crate::fault::{Code, Problem};

/// What a token must have been made for.
pub const AUDIENCE: &str = "larder.dev";

/// Longest token, in bytes.
const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// Longest name of a namespace or a ServiceAccount, in bytes.
const MAX_NAME_BYTES: usize = 253;
/// How long the answer about a token is good: for so long after its account was deleted it still opens.
const ANSWER_KEPT: Duration = Duration::from_secs(60);
/// Most answers that are kept.
const MAX_ANSWERS: usize = 1_000;
/// Most questions under way: whoever sends nonsense in a flood waits, and the API server does not notice.
const MAX_QUESTIONS: usize = 4;

/// Tells whose token it is. Kubernetes does.
#[async_trait]
pub trait TokenReviewer: Send + Sync {
    /// The user a token is of; `None` if it is of nobody, or not for [`AUDIENCE`].
    async fn review(&self, token: &str) -> Result<Option<String>, Problem>;
}

/// A ServiceAccount: `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    namespace: String,
    name: String,
}

impl Account {
    /// As the API server names it.
    fn user(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace, self.name)
    }
}

impl fmt::Display for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl FromStr for Account {
    type Err = ();

    fn from_str(text: &str) -> Result<Account, ()> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-.".contains(&b);
        let is_name = |name: &str| (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(plain);
        let (namespace, name) = text.split_once('/').ok_or(())?;
        match is_name(namespace) && is_name(name) {
            true => Ok(Account { namespace: namespace.to_owned(), name: name.to_owned() }),
            false => Err(()),
        }
    }
}

type Hash = [u8; 32];

/// Lets in who is allowed in.
pub struct Doorkeeper {
    reviewer: Arc<dyn TokenReviewer>,
    allowed: Vec<String>,
    /// By hash, so that no token stays in memory.
    answers: Mutex<HashMap<Hash, (Instant, Option<String>)>>,
    questions: Semaphore,
}

impl Doorkeeper {
    /// For these accounts and nobody else.
    pub fn new(reviewer: Arc<dyn TokenReviewer>, accounts: &[Account]) -> Doorkeeper {
        let allowed = accounts.iter().map(Account::user).collect();
        Doorkeeper { reviewer, allowed, answers: Mutex::default(), questions: Semaphore::new(MAX_QUESTIONS) }
    }

    /// Whether a request with these headers is let in. While the API server does not answer, nobody is whom it has not
    /// confirmed within the last minute.
    pub(super) async fn admit(&self, method: &Method, headers: &HeaderMap) -> Result<(), Refused> {
        let refused = |found: &str| {
            let action =
                format!("send the token of a ServiceAccount for the audience `{AUDIENCE}` (`Authorization: Bearer …`)");
            Refused::without_a_token(format!("cannot answer {method} on the network: {found}"), action)
        };
        let token = bearer(headers).ok_or_else(|| refused("no token was sent"))?;
        let user = self.user_of(token).await?;
        let user = user.ok_or_else(|| refused("the token is of nobody, or for another audience"))?;
        if self.allowed.contains(&user) {
            return Ok(());
        }
        let user: String = user.chars().take(2 * MAX_NAME_BYTES).flat_map(char::escape_debug).collect();
        Err(Refused::new(
            Code::PolicyDenied,
            format!("cannot answer {method} on the network: `{user}` is not in `serve.network_accounts`"),
            "ask who configures larder to add that ServiceAccount, as `namespace/name`",
        ))
    }

    async fn user_of(&self, token: &str) -> Result<Option<String>, Refused> {
        let hash: Hash = digest(&SHA256, token.as_bytes()).as_ref().try_into().expect("SHA-256 has 32 bytes");
        if let Some(known) = self.known(&hash) {
            return Ok(known);
        }
        let _question = self.questions.acquire().await.expect("the semaphore is never closed");
        // Others have asked about it meanwhile.
        if let Some(known) = self.known(&hash) {
            return Ok(known);
        }
        let user = self.reviewer.review(token).await?;
        let mut answers = self.answers();
        let now = Instant::now();
        if answers.len() >= MAX_ANSWERS {
            answers.retain(|_, (at, _)| now.duration_since(*at) < ANSWER_KEPT);
        }
        if answers.len() >= MAX_ANSWERS {
            answers.clear();
        }
        answers.insert(hash, (now, user.clone()));
        Ok(user)
    }

    fn known(&self, hash: &Hash) -> Option<Option<String>> {
        let answers = self.answers();
        let (at, user) = answers.get(hash)?;
        (at.elapsed() < ANSWER_KEPT).then(|| user.clone())
    }

    fn answers(&self) -> MutexGuard<'_, HashMap<Hash, (Instant, Option<String>)>> {
        self.answers.lock().expect("no panic while the answers are held")
    }
}

/// The token of a request, if it can be one: three parts in base64url. Nothing else is worth a question.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut sent = headers.get_all(header::AUTHORIZATION).iter();
    let (value, None) = (sent.next()?, sent.next()) else { return None };
    let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
    let plain = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
    let is_token = token.len() <= MAX_TOKEN_BYTES && token.split('.').count() == 3 && token.split('.').all(plain);
    (scheme.eq_ignore_ascii_case("bearer") && is_token).then_some(token)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::routing::get;
    use axum::{Extension, Router};

    use super::super::request::with_manners;
    use super::super::tests::Running;
    use super::*;
    use crate::telemetry::Metrics;

    /// `of.<name>.x` is the token of an account of the namespace `team`.
    #[derive(Default)]
    struct Reviewer {
        asked: AtomicUsize,
        is_down: std::sync::atomic::AtomicBool,
    }

    #[async_trait]
    impl TokenReviewer for Reviewer {
        async fn review(&self, token: &str) -> Result<Option<String>, Problem> {
            self.asked.fetch_add(1, Ordering::SeqCst);
            if self.is_down.load(Ordering::SeqCst) {
                return Err(Problem::new(Code::KubernetesUnreachable, "cannot review a token: down", "wait"));
            }
            let name = token.strip_prefix("of.").and_then(|rest| rest.strip_suffix(".x"));
            Ok(name.map(|name| format!("system:serviceaccount:team:{name}")))
        }
    }

    async fn door(reviewer: Arc<Reviewer>) -> Running {
        let doorkeeper = Arc::new(Doorkeeper::new(reviewer, &["team/ci".parse().unwrap()]));
        let routes = Router::new().route("/v1/models", get(|| async { "models" }));
        Running::tcp(with_manners(routes, Arc::new(Metrics::new())).layer(Extension(doorkeeper))).await
    }

    async fn asked_with(door: &Running, authorization: &str) -> (u16, String) {
        let head = format!("GET /v1/models HTTP/1.1\r\nhost: larder.larder.svc\r\n{authorization}");
        let answer = door.raw(&head).await;
        (answer[9..12].parse().unwrap(), answer)
    }

    #[tokio::test]
    async fn only_an_account_that_is_listed_is_let_in_and_others_are_told_why() {
        let reviewer = Arc::new(Reviewer::default());
        let door = door(reviewer.clone()).await;
        for (authorization, status, says) in [
            ("authorization: Bearer of.ci.x\r\n", 200, "models"),
            ("authorization: bearer of.ci.x\r\n", 200, "models"),
            ("", 401, "no token was sent"),
            ("authorization: Basic b2Y6Y2k=\r\n", 401, "no token was sent"),
            ("authorization: Bearer no token\r\n", 401, "no token was sent"),
            ("authorization: Bearer of.ci.x\r\nauthorization: Bearer of.ci.x\r\n", 401, "no token was sent"),
            ("authorization: Bearer un.known.token\r\n", 401, "the token is of nobody, or for another audience"),
            (
                "authorization: Bearer of.other.x\r\n",
                403,
                "`system:serviceaccount:team:other` is not in `serve.network_accounts`",
            ),
        ] {
            let (found, answer) = asked_with(&door, authorization).await;
            assert!(found == status && answer.contains(says), "{authorization}: {answer}");
            assert_eq!(answer.contains("www-authenticate: Bearer"), status == 401, "{answer}");
        }
        // What cannot be a token is not asked about, and nothing is asked twice.
        assert_eq!(reviewer.asked.load(Ordering::SeqCst), 3);
    }

    #[tokio::test]
    async fn while_nobody_can_tell_whose_a_token_is_nobody_new_is_let_in() {
        let reviewer = Arc::new(Reviewer::default());
        let door = door(reviewer.clone()).await;
        assert_eq!(asked_with(&door, "authorization: Bearer of.ci.x\r\n").await.0, 200);
        reviewer.is_down.store(true, Ordering::SeqCst);
        assert_eq!(asked_with(&door, "authorization: Bearer of.ci.x\r\n").await.0, 200);
        let (status, answer) = asked_with(&door, "authorization: Bearer of.other.x\r\n").await;
        assert!(status == 503 && answer.contains("kubernetes-unreachable"), "{answer}");
    }

    #[tokio::test(start_paused = true)]
    async fn answers_are_kept_for_a_minute_and_are_bounded() {
        let reviewer = Arc::new(Reviewer::default());
        let doorkeeper = Doorkeeper::new(reviewer.clone(), &[]);
        doorkeeper.user_of("of.ci.x").await.unwrap();
        tokio::time::advance(ANSWER_KEPT - Duration::from_secs(1)).await;
        doorkeeper.user_of("of.ci.x").await.unwrap();
        assert_eq!(reviewer.asked.load(Ordering::SeqCst), 1);
        tokio::time::advance(Duration::from_secs(1)).await;
        doorkeeper.user_of("of.ci.x").await.unwrap();
        assert_eq!(reviewer.asked.load(Ordering::SeqCst), 2);
        for n in 0..3 * MAX_ANSWERS {
            doorkeeper.user_of(&format!("of.{n}.x")).await.unwrap();
            assert!(doorkeeper.answers().len() <= MAX_ANSWERS);
        }
    }

    #[test]
    fn an_account_is_a_namespace_and_a_name() {
        assert_eq!("team/ci".parse::<Account>().unwrap().to_string(), "team/ci");
        for bad in ["", "team", "team/", "/ci", "team/*", "team/ci/x", "Team/ci", "system:serviceaccount:team:ci"] {
            assert!(bad.parse::<Account>().is_err(), "{bad}");
        }
    }
}

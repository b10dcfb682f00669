//! What a person is told when it goes wrong, word for word; and that doing what is said there mends it. Roots and disks that are
//! wrong are in `tests/crash/foreign_roots.rs`.

use std::fs;

use super::support::hub::{RepoFile, TestHub};
use super::support::larder::{Ended, Home, Running};
use super::support::model_origin::ModelOrigin;

const TOKEN: &str = "hf_of_the_owner";

/// A hub with `acme/tiny`, and a daemon that knows it; variables of sources are read from `secret/`, as from a mounted Secret.
struct Node {
    hub: TestHub,
    home: Home,
    daemon: Running,
}

impl Node {
    async fn start(more: &[(&str, &str)]) -> Node {
        let hub = TestHub::start().await;
        hub.publish("acme/tiny", vec![RepoFile::new("config.json", b"{}".to_vec())]);
        let mut home = Home::new();
        fs::create_dir(home.path().join("secret")).unwrap();
        home.set("HF_ENDPOINT", hub.endpoint());
        home.set("LARDER_PULL_ENVIRONMENT", home.path().join("secret").to_str().unwrap().to_owned().as_str());
        for (name, value) in more {
            home.set(name, value);
        }
        let daemon = home.serve().await;
        Node { hub, home, daemon }
    }

    /// What the Secret holds from now on.
    fn secret(&self, name: &str, value: &str) {
        fs::write(self.home.path().join("secret").join(name), value).unwrap();
    }

    async fn run(&self, words: &str) -> Ended {
        self.home.run(&words.split(' ').collect::<Vec<_>>()).await
    }

    /// Runs a command that fails, and compares what it says. In what is expected, `HOME` stands for the home, `HUB` for the host of
    /// the hub, and `N` for the port of any other server.
    async fn tells(&self, words: &str, code: i32, message: &str, action_and_code: &str) {
        let ended = self.run(words).await;
        let hub = self.hub.endpoint().trim_start_matches("http://");
        let said = ended.err.replace(self.home.path().to_str().unwrap(), "HOME").replace(hub, "HUB");
        let told = format!("error: {message}\naction: {action_and_code}\n");
        assert_eq!((ended.code, without_ports(&said)), (Some(code), told), "larder {words}: {ended:?}");
        assert_eq!(ended.out, "", "an error and an answer");
    }

    async fn works(&self, words: &str) -> String {
        self.home.done(&words.split(' ').collect::<Vec<_>>()).await
    }

    async fn ends(mut self) {
        self.daemon.terminate();
        self.daemon.ended().await;
    }
}

/// `N` for each port of loopback, and for the time of the next try.
fn without_ports(text: &str) -> String {
    let mut parts = text.split("127.0.0.1:");
    let first = parts.next().unwrap_or_default().to_owned();
    let plain =
        parts.fold(first, |plain, part| plain + "127.0.0.1:N" + part.trim_start_matches(|c: char| c.is_ascii_digit()));
    match plain.split_once("pull again after ") {
        Some((before, after)) => format!("{before}pull again after N{}", &after[after.find(';').unwrap_or(0)..]),
        None => plain,
    }
}

#[tokio::test]
async fn a_token_that_is_missing_is_told_with_the_line_that_makes_the_secret() {
    let node = Node::start(&[]).await;
    node.hub.make_private("acme/tiny");
    node.hub.grant(TOKEN, "acme/tiny");
    node.tells(
        "pull -q hf://acme/tiny",
        77,
        "cannot read `hf://acme/tiny@main`: it is private, gated or does not exist, and no credential is \
         configured",
        "check the spelling; if it is private or gated, set HF_TOKEN (`kubectl -n larder create secret \
         generic larder-token --from-literal=HF_TOKEN=…`)            code: auth-missing",
    )
    .await;
    node.secret("HF_TOKEN", TOKEN);
    node.works("pull -q hf://acme/tiny").await;
    node.ends().await;
}

#[tokio::test]
async fn a_token_that_is_rejected_is_told_with_its_place_and_replaced_without_a_restart() {
    let node = Node::start(&[]).await;
    node.hub.make_private("acme/tiny");
    node.hub.grant(TOKEN, "acme/tiny");
    node.secret("HF_TOKEN", "hf_expired");
    node.tells(
        "pull -q hf://acme/tiny",
        77,
        "cannot read `hf://acme/tiny@main`: the credential from `HOME/secret/HF_TOKEN` is rejected (the Hub \
         answered 401: \"Invalid credentials in Authorization header\")",
        "replace the credential in `HOME/secret/HF_TOKEN`; a file is read again at the next pull, a variable \
         at the next start            code: auth-invalid",
    )
    .await;
    node.secret("HF_TOKEN", TOKEN);
    node.works("pull -q hf://acme/tiny").await;
    node.ends().await;
}

#[tokio::test]
async fn a_licence_that_was_not_accepted_is_told_with_the_page_to_accept_it_on() {
    let node = Node::start(&[]).await;
    node.hub.gate("acme/tiny");
    node.hub.allow(TOKEN);
    node.secret("HF_TOKEN", TOKEN);
    node.tells(
        "pull -q hf://acme/tiny",
        77,
        "cannot read `hf://acme/tiny@main`: the account `tester` has not been granted access to it",
        "ask for access at http://HUB/acme/tiny with that account, then pull again            code: \
         licence-not-accepted",
    )
    .await;
    node.hub.grant(TOKEN, "acme/tiny");
    node.works("pull -q hf://acme/tiny").await;
    node.ends().await;
}

#[tokio::test]
async fn a_name_that_is_mistyped_is_told_and_a_revision_with_those_there_are() {
    let node = Node::start(&[("HF_TOKEN", TOKEN)]).await;
    node.hub.allow(TOKEN);
    node.tells(
        "pull -q hf://acme/tyni",
        66,
        "cannot find `hf://acme/tyni@main`: `HUB` has no such repository",
        "check the spelling, and that we may see it from here, with the credentials we have            code: \
         repo-not-found",
    )
    .await;
    node.tells(
        "pull -q hf://acme/tiny@v3",
        66,
        "cannot find revision `v3` of `hf://acme/tiny`",
        "it has main            code: revision-not-found",
    )
    .await;
    node.works("pull -q hf://acme/tiny@main").await;
    node.tells(
        "pull -q ftp://acme/tiny",
        65,
        "cannot read the reference `ftp://acme/tiny`: `ftp://` is not supported",
        "did you mean `https://acme/tiny`? The schemes are hf:// s3:// gs:// az:// https:// http:// \
         file://            code: bad-reference",
    )
    .await;
    node.tells(
        "pull -q acme/tiny",
        65,
        "cannot read the reference `acme/tiny`: it has no scheme",
        "did you mean `hf://acme/tiny`? The schemes are hf:// s3:// gs:// az:// https:// http:// \
         file://            code: bad-reference",
    )
    .await;
    node.works("pull -q hf://acme/tiny").await;
    node.ends().await;
}

#[tokio::test]
async fn a_source_that_limits_us_is_told_with_the_time_of_the_next_try() {
    let node = Node::start(&[("LARDER_PULL_RETRIES", "0")]).await;
    node.hub.limit_next("/acme/tiny", 1, &[("retry-after", "0")]);
    node.tells(
        "pull -q hf://acme/tiny",
        69,
        "cannot read `hf://acme/tiny@main`: `HUB` limits the rate of requests",
        "pull again after N; a token or a mirror raises the limit            code: rate-limited",
    )
    .await;
    node.works("pull -q hf://acme/tiny").await;
    node.ends().await;
}

#[tokio::test]
async fn a_source_that_cannot_be_reached_is_told_with_the_step_that_failed() {
    let node = Node::start(&[("LARDER_PULL_RETRIES", "0")]).await;
    node.secret("HF_ENDPOINT", "http://nobody.invalid");
    let ended = node.run("pull -q hf://acme/tiny").await;
    // The rest is the resolver's words, which are not the same everywhere.
    assert!(ended.err.starts_with("error: cannot reach `nobody.invalid`: name resolution failed: "), "{ended:?}");
    let action =
        "\naction: check the spelling of the host, DNS and any NetworkPolicy            code: source-unreachable\n";
    assert!(ended.err.ends_with(action) && ended.code == Some(69), "{ended:?}");
    node.secret("HF_ENDPOINT", "http://127.0.0.1:1");
    node.tells(
        "pull -q hf://acme/tiny",
        69,
        "cannot reach `127.0.0.1:N`: the connection failed: Connection refused (os error 111)",
        "check that the host is up, HTTPS_PROXY, NO_PROXY and any NetworkPolicy            code: \
         source-unreachable",
    )
    .await;
    node.secret("HF_ENDPOINT", &node.hub.endpoint().replace("http:", "https:"));
    node.tells(
        "pull -q hf://acme/tiny",
        69,
        "cannot reach `HUB`: the TLS handshake failed: received corrupt message of type InvalidContentType",
        "check the certificate, and SSL_CERT_FILE if a private CA signs it            code: \
         source-unreachable",
    )
    .await;
    node.secret("HF_ENDPOINT", node.hub.endpoint());
    node.works("pull -q hf://acme/tiny").await;
    node.ends().await;
}

#[tokio::test]
async fn wrong_bytes_are_told_with_the_file_and_the_command_to_try_again() {
    let (node, origin) = (Node::start(&[("LARDER_PULL_RETRIES", "0")]).await, ModelOrigin::start().await);
    origin.put("m", "model.safetensors", b"right");
    origin.lie("m", "model.safetensors", Some(b"wrong"));
    let reference = origin.reference("m");
    node.tells(
        &format!("pull -q {reference}"),
        74,
        "cannot keep `model.safetensors (http://127.0.0.1:N/m/)`: the source claims \
         sha256:27042f4e6eca7d0b2a7ee4026df2ecfa51d3339e6d122aa099118ecd8563bad9, its bytes are \
         sha256:8810ad581e59f2bc3928b261707a71308f7e139eb04820366dc4d5c18d980225",
        "pull again: none of these bytes is kept; if it stays so, the source or a proxy on the way sends \
         wrong bytes            code: checksum-mismatch",
    )
    .await;
    origin.lie("m", "model.safetensors", None);
    node.works(&format!("pull -q {reference}")).await;
    node.ends().await;
}

#[tokio::test]
async fn a_model_that_does_not_fit_is_told_with_who_keeps_the_room_and_what_helps() {
    let (node, origin) = (
        Node::start(&[("LARDER_VOLUME_QUOTA", "1MB"), ("LARDER_VOLUME_MIN_RESIDENCY", "0s")]).await,
        ModelOrigin::start().await,
    );
    for (model, bytes) in [("kept", 700_000), ("wanted", 600_000), ("large", 1_200_000)] {
        origin.put(model, "model.safetensors", &vec![bytes as u8; bytes]);
        origin.put(model, "config.json", b"{}");
    }
    let [kept, wanted, large] = ["kept", "wanted", "large"].map(|model| origin.reference(model));
    node.works(&format!("pull -q --pin {kept}")).await;
    node.tells(
        &format!("pull -q {wanted}"),
        73,
        "cannot pull `http://127.0.0.1:N/wanted/`: it needs 602.1 kB, the quota of 1.0 MB can give 295.5 kB \
         (models use 704.5 kB, other pulls were promised 0 B); 0 B can be evicted; the rest is held by a \
         pin on `http://127.0.0.1:N/kept/`",
        "end what keeps a model (`larder evict --need 0 --dry-run` shows who does), raise `volume.quota`, or \
         pull fewer files with `--include`            code: volume-full",
    )
    .await;
    node.works(&format!("unpin {kept}")).await;
    node.works(&format!("pull -q {wanted}")).await;

    node.tells(
        &format!("pull -q {large}"),
        73,
        "cannot pull `http://127.0.0.1:N/large/`: it has 1.2 MB, more than the quota of 1.0 MB",
        "raise `volume.quota`, or pull fewer files with `--include`            code: never-fits",
    )
    .await;
    node.works(&format!("pull -q --include *.json {large}")).await;
    node.ends().await;
}

#[tokio::test]
async fn a_model_that_is_on_its_way_is_told_with_how_to_wait_for_it() {
    let (node, origin) = (Node::start(&[]).await, ModelOrigin::start().await);
    origin.put("m", "model.safetensors", &[7; 1000]);
    origin.hold_after(430);
    let reference = origin.reference("m");
    node.tells(
        &format!("open {reference}"),
        66,
        "cannot open `http://127.0.0.1:N/m/`: it is not local",
        "pull it: `larder pull http://127.0.0.1:N/m/`, or open it with `--wait`            code: not-local",
    )
    .await;
    let mut pull = node.home.start(&["pull", "-q", &reference]);
    origin.is_waited_for().await;
    node.tells(
        &format!("open {reference}"),
        75,
        "cannot open `http://127.0.0.1:N/m/`: it is being pulled, 0 % is here",
        "wait for it with `--wait`            code: not-ready",
    )
    .await;
    let mut open = node.home.start(&["open", "--wait", &reference]);
    origin.let_go();
    assert!(open.ended().await.0.success() && pull.ended().await.0.success());
    node.ends().await;
}

#[tokio::test]
async fn a_source_that_never_stays_as_it_is_is_told_with_both_versions() {
    // In ranges of 1 MiB: what comes in one answer is of one version.
    let node = Node::start(&[("LARDER_PULL_MEMORY", "8MiB")]).await;
    let origin = ModelOrigin::start().await;
    const BYTES: usize = 4_000_000;
    origin.put("m", "model.safetensors", &vec![0; BYTES]);
    // A pull begins again with the new version, but not for ever.
    for change in 1..=50 {
        origin.change_after(u64::from(change) * 500_000, "m", "model.safetensors", &vec![change; BYTES]);
    }
    let pull = format!("pull -q {}", origin.reference("m"));
    let ended = node.run(&pull).await;
    let said = without_ports(&ended.err);
    let before = "error: cannot pull `http://127.0.0.1:N/m/model.safetensors`: it changed at the source: it was ";
    let after = "\naction: pull again: the new version is taken as a whole            code: source-changed\n";
    assert!(said.starts_with(before) && said.contains(", now it is ") && said.ends_with(after), "{said}");
    assert_eq!(ended.code, Some(69));
    origin.stays_as_it_is();
    node.works(&pull).await;
    node.ends().await;
}

#[tokio::test]
async fn what_the_configuration_keeps_is_told_with_where_to_change_it() {
    let node = Node::start(&[("LARDER_PULL_PINNED", "hf://acme/tiny")]).await;
    node.tells(
        "unpin hf://acme/tiny",
        77,
        "cannot unpin `hf://acme/tiny@main`: the configuration lists it",
        "take it out of `pull.pinned`: a running daemon notices            code: policy-denied",
    )
    .await;
    node.ends().await;
}

//! The doors on the network: health and metrics for everybody, the API for those with a token that the cluster confirms.

use std::net::SocketAddr;

use serde_json::Value;

use super::support::api_server::{ApiServer, Mood};
use super::support::larder::Home;

/// Status and body of a `GET`, with this token.
async fn get(address: SocketAddr, path: &str, token: Option<&str>) -> (u16, String) {
    let mut request = reqwest::Client::new().get(format!("http://{address}{path}"));
    if let Some(token) = token {
        request = request.bearer_auth(token);
    }
    let answer = request.send().await.unwrap();
    (answer.status().as_u16(), answer.text().await.unwrap())
}

fn code(body: &str) -> String {
    let body: Value = serde_json::from_str(body).unwrap_or_else(|e| panic!("{e}: {body}"));
    body["code"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_port_for_health_answers_probes_and_prometheus_and_nothing_else() {
    let mut home = Home::new();
    home.set("LARDER_SERVE_HEALTH_LISTEN", "127.0.0.1:0");
    let daemon = home.serve().await;
    let address = daemon.address("health_listen");
    assert_ne!(address, daemon.tcp_address());
    assert_eq!(get(address, "/livez", None).await, (200, "ok".to_owned()));
    assert_eq!(get(address, "/readyz", None).await.0, 200);
    assert!(get(address, "/metrics", None).await.1.contains("larder_build_info"));
    for path in ["/v1/models", "/v1/pulls", "/openapi.json"] {
        let (status, body) = get(address, path, None).await;
        assert_eq!((status, code(&body).as_str()), (404, "route-not-found"), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn on_the_network_the_api_is_for_accounts_that_are_listed_and_only_while_the_cluster_can_tell() {
    let api = ApiServer::start_with_tls().await;
    let mut home = Home::new();
    let identity = api.becomes_the_cluster_of(&mut home);
    home.set("LARDER_SERVE_NETWORK_LISTEN", "127.0.0.1:0");
    home.set("LARDER_SERVE_NETWORK_ACCOUNTS", "team/ci");
    let Some(daemon) = home.serve_as_pod(identity).await else { return };
    let address = daemon.address("network_listen");
    for (token, status, expected) in [
        (None, 401, "token-refused"),
        (Some("nobody.nobody.x"), 401, "token-refused"),
        (Some("apiserver.team--ci.x"), 401, "token-refused"),
        (Some("larder.team--other.x"), 403, "policy-denied"),
    ] {
        for path in ["/v1/models", "/metrics", "/nowhere"] {
            let (found, body) = get(address, path, token).await;
            assert_eq!((found, code(&body).as_str()), (status, expected), "{token:?} {path}");
        }
    }
    assert_eq!(get(address, "/v1/models", Some("larder.team--ci.x")).await.0, 200);
    api.becomes(Mood::Down);
    assert_eq!(get(address, "/v1/models", Some("larder.team--ci.x")).await.0, 200, "it was confirmed a moment ago");
    let (status, body) = get(address, "/v1/models", Some("larder.team--ci.y")).await;
    assert_eq!((status, code(&body).as_str()), (503, "kubernetes-unreachable"), "{body}");
    assert!(!daemon.said().contains("team--"), "a token is in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_cluster_the_door_on_the_network_is_not_opened() {
    let mut home = Home::new();
    home.set("LARDER_SERVE_NETWORK_LISTEN", "127.0.0.1:0");
    let ended = home.run(&["serve"]).await;
    assert_eq!(ended.code, Some(78));
    assert!(ended.err.contains("kubernetes-denied") && ended.err.contains("serve.network_listen"), "{}", ended.err);
}

//! fake-gcs-server: a Google Cloud Storage server, from `go install github.com/fsouza/fake-gcs-server`.

use std::process::Command;

use super::server_process::ServerProcess;

/// A running fake-gcs-server. It knows no credentials, and ignores If-Match.
pub(crate) struct FakeGcs {
    _process: ServerProcess,
    /// `http://127.0.0.1:port`
    pub(crate) endpoint: String,
    /// The port of it.
    pub(crate) port: u16,
    http: reqwest::Client,
}

impl FakeGcs {
    /// Starts one. `None` without fake-gcs-server; says so.
    pub(crate) fn start() -> Option<FakeGcs> {
        let program = std::env::var("LARDER_TEST_GCS").unwrap_or_else(|_| "fake-gcs-server".into());
        // It logs to standard error; the shell turns that round and is replaced by it.
        let mut command = Command::new("sh");
        command.args(["-c", "exec \"$0\" \"$@\" 2>&1", &program]);
        command.args(["-backend", "memory", "-scheme", "http", "-host", "127.0.0.1", "-port", "0"]);
        command.args(["-public-host", "127.0.0.1"]);
        let started = ServerProcess::start(command, |line| line.contains("server started").then_some(()));
        let Some((process, ())) = started else {
            super::skip::skipped(
                "fake-gcs-server is not there: go install github.com/fsouza/fake-gcs-server@v1.56.1, and name it in \
                 LARDER_TEST_GCS",
            );
            return None;
        };
        let port = listening_port(process.id());
        let endpoint = format!("http://127.0.0.1:{port}");
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Some(FakeGcs { _process: process, endpoint, port, http })
    }

    /// Makes a bucket.
    pub(crate) async fn make_bucket(&self, bucket: &str) {
        let url = format!("{}/storage/v1/b?project=test", self.endpoint);
        let body = serde_json::json!({ "name": bucket });
        self.http.post(url).json(&body).send().await.unwrap().error_for_status().unwrap();
    }

    /// Puts an object under exactly this key.
    pub(crate) async fn put(&self, bucket: &str, key: &str, bytes: &[u8]) {
        let url = format!("{}/upload/storage/v1/b/{bucket}/o", self.endpoint);
        let request = self.http.post(url).query(&[("uploadType", "media"), ("name", key)]);
        request.body(bytes.to_vec()).send().await.unwrap().error_for_status().unwrap();
    }
}

/// The port a process listens on: the server does not say which one it was given.
fn listening_port(process: u32) -> u16 {
    let links = std::fs::read_dir(format!("/proc/{process}/fd")).unwrap();
    let sockets: Vec<String> = links
        .filter_map(|link| Some(std::fs::read_link(link.ok()?.path()).ok()?.to_str()?.to_owned()))
        .filter_map(|target| Some(target.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let table = std::fs::read_to_string(format!("/proc/{process}/net/tcp")).unwrap();
    let listening = table.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>()).find(|fields| {
        // Fields: slot, local address, remote address, state (0A: LISTEN), …, inode.
        fields.get(3) == Some(&"0A") && fields.get(9).is_some_and(|inode| sockets.iter().any(|s| s == inode))
    });
    let local = listening.expect("the server listens")[1];
    u16::from_str_radix(local.split_once(':').unwrap().1, 16).unwrap()
}

//! moto: an S3 server, from PyPI (`pip install 'moto[server]'`).

use std::process::Command;

use larder::source::Environment;
use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};

use super::server_process::ServerProcess;

/// Ends when its standard input does, so that it never outlives the test.
const PROGRAM: &str = r#"
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("listens on", server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"#;

/// moto takes any signature that has the right form, until it is told to look.
const ANY_SIGNATURE: &str =
    "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0";

/// A running moto.
pub(crate) struct Moto {
    _process: ServerProcess,
    /// `http://127.0.0.1:port`
    pub(crate) endpoint: String,
    /// The port of it.
    pub(crate) port: u16,
    http: reqwest::Client,
}

impl Moto {
    /// Starts one. `None` without moto; says so.
    pub(crate) fn start() -> Option<Moto> {
        let python = std::env::var("LARDER_TEST_PYTHON").unwrap_or_else(|_| "python3".into());
        let mut command = Command::new(python);
        command.args(["-c", PROGRAM]);
        let started = ServerProcess::start(command, |line| line.strip_prefix("listens on ")?.trim().parse().ok());
        let Some((process, port)) = started else {
            super::skip::skipped(
                "moto is not there: pip install 'moto[server]', and name python in LARDER_TEST_PYTHON",
            );
            return None;
        };
        let port: u16 = port;
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        Some(Moto { _process: process, endpoint: format!("http://127.0.0.1:{port}"), port, http })
    }

    /// Makes a bucket in us-east-1.
    pub(crate) async fn make_bucket(&self, bucket: &str) {
        self.request(reqwest::Method::PUT, bucket, &[], Vec::new()).await;
    }

    /// Makes a bucket that everybody may list.
    pub(crate) async fn make_public_bucket(&self, bucket: &str) {
        self.request(reqwest::Method::PUT, bucket, &[("x-amz-acl", "public-read")], Vec::new()).await;
    }

    /// Puts an object under exactly this key, a slash at its end included, with these headers.
    pub(crate) async fn put_raw(&self, bucket: &str, key: &str, headers: &[(&str, &str)], bytes: &[u8]) {
        self.request(reqwest::Method::PUT, &format!("{bucket}/{key}"), headers, bytes.to_vec()).await;
    }

    /// Puts an object.
    pub(crate) async fn put(&self, bucket: &str, key: &str, bytes: &[u8]) {
        let key = Path::parse(key).unwrap();
        self.store(bucket).put(&key, PutPayload::from(bytes.to_vec())).await.unwrap();
    }

    /// Whether credentials are checked. It knows no user, so then every credential is wrong.
    pub(crate) async fn check_credentials(&self, check: bool) {
        let unchecked_requests = if check { "0" } else { "inf" };
        let url = format!("{}/moto-api/reset-auth", self.endpoint);
        self.http.post(url).body(unchecked_requests).send().await.unwrap().error_for_status().unwrap();
    }

    /// The variables with which a bucket of this server is found, through `endpoint`.
    pub(crate) fn environment(&self, endpoint: &str) -> Environment {
        [
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ACCESS_KEY_ID", "test"),
            ("AWS_SECRET_ACCESS_KEY", "not-a-real-secret"),
        ]
        .into_iter()
        .collect()
    }

    fn store(&self, bucket: &str) -> AmazonS3 {
        AmazonS3Builder::new()
            .with_endpoint(&self.endpoint)
            .with_allow_http(true)
            .with_bucket_name(bucket)
            .with_access_key_id("test")
            .with_secret_access_key("not-a-real-secret")
            .build()
            .unwrap()
    }

    async fn request(&self, method: reqwest::Method, path: &str, headers: &[(&str, &str)], body: Vec<u8>) {
        let mut request = self.http.request(method, format!("{}/{path}", self.endpoint)).body(body);
        request = request.header("authorization", ANY_SIGNATURE);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        request.send().await.unwrap().error_for_status().unwrap();
    }
}

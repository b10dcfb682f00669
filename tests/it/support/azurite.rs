//! Azurite: an Azure Blob server, from npm (`npm install azurite`).

use std::process::Command;

use aws_lc_rs::hmac;
use larder::source::Environment;
use object_store::azure::{MicrosoftAzure, MicrosoftAzureBuilder};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};

use super::server_process::ServerProcess;

/// The account and the key that every Azurite has; they are published.
pub(crate) const ACCOUNT: &str = "devstoreaccount1";
/// See [`ACCOUNT`].
pub(crate) const KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

/// A running Azurite.
pub(crate) struct Azurite {
    _process: ServerProcess,
    /// `http://127.0.0.1:port`
    pub(crate) endpoint: String,
    /// The port of it.
    pub(crate) port: u16,
}

impl Azurite {
    /// Starts one. `None` without Azurite; says so.
    pub(crate) fn start() -> Option<Azurite> {
        let program = std::env::var("LARDER_TEST_AZURITE").unwrap_or_else(|_| "azurite-blob".into());
        let mut command = Command::new(program);
        command.args(["--inMemoryPersistence", "--blobHost", "127.0.0.1", "--blobPort", "0", "--skipApiVersionCheck"]);
        command.args(["--disableTelemetry", "--disableProductStyleUrl"]);
        let started = ServerProcess::start(command, |line| Some(line.split_once(" listens on ")?.1.trim().to_owned()));
        let Some((process, endpoint)) = started else {
            super::skip::skipped(
                "Azurite is not there: npm install azurite, and name azurite-blob in LARDER_TEST_AZURITE",
            );
            return None;
        };
        let port = endpoint.rsplit_once(':').and_then(|(_, port)| port.parse().ok()).expect("a URL with a port");
        Some(Azurite { _process: process, endpoint, port })
    }

    /// Makes a container; a public one may be listed by everybody.
    pub(crate) async fn make_container(&self, container: &str, public: bool) {
        let date = httpdate::fmt_http_date(std::time::SystemTime::now());
        let mut headers = vec![("x-ms-date", date.as_str()), ("x-ms-version", "2021-12-02")];
        if public {
            headers.insert(0, ("x-ms-blob-public-access", "container"));
        }
        let signed: String = headers.iter().map(|(name, value)| format!("{name}:{value}\n")).collect();
        // The account stands twice: once as the account, once because it is in the path of Azurite's URLs.
        let to_sign = format!("PUT{}{signed}/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container", "\n".repeat(12));
        let signature = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &from_base64(KEY)), to_sign.as_bytes());
        let url = format!("{}/{ACCOUNT}/{container}?restype=container", self.endpoint);
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut request = http.put(url).header("content-length", "0");
        for (name, value) in headers {
            request = request.header(name, value);
        }
        let authorization = format!("SharedKey {ACCOUNT}:{}", to_base64(signature.as_ref()));
        request.header("authorization", authorization).send().await.unwrap().error_for_status().unwrap();
    }

    /// Puts a blob.
    pub(crate) async fn put(&self, container: &str, key: &str, bytes: &[u8]) {
        let key = Path::parse(key).unwrap();
        self.store(container).put(&key, PutPayload::from(bytes.to_vec())).await.unwrap();
    }

    /// The variables with which a container of this server is found, through `endpoint`, with this account key.
    pub(crate) fn environment(&self, endpoint: &str, key: &str) -> Environment {
        let endpoint = format!("{endpoint}/{ACCOUNT}");
        [
            ("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT),
            ("AZURE_STORAGE_ACCOUNT_KEY", key),
            ("AZURE_STORAGE_ENDPOINT", &endpoint),
        ]
        .into_iter()
        .collect()
    }

    fn store(&self, container: &str) -> MicrosoftAzure {
        MicrosoftAzureBuilder::new()
            .with_endpoint(format!("{}/{ACCOUNT}", self.endpoint))
            .with_allow_http(true)
            .with_account(ACCOUNT)
            .with_access_key(KEY)
            .with_container_name(container)
            .build()
            .unwrap()
    }
}

const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

fn to_base64(bytes: &[u8]) -> String {
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = group.iter().enumerate().fold(0u32, |bits, (i, byte)| bits | u32::from(*byte) << (16 - 8 * i));
        for i in 0..4 {
            let digit = if i <= group.len() { ALPHABET[(bits >> (18 - 6 * i)) as usize & 63] } else { b'=' };
            text.push(digit as char);
        }
    }
    text
}

fn from_base64(text: &str) -> Vec<u8> {
    let (mut bytes, mut bits, mut count) = (Vec::new(), 0u32, 0);
    for digit in text.bytes().filter_map(|b| ALPHABET.iter().position(|a| *a == b)) {
        bits = bits << 6 | digit as u32;
        count += 6;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count) as u8);
        }
    }
    bytes
}

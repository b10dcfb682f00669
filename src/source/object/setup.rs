//! From environment variables to a store, as the tools of each cloud read them.
//!
//! `object_store` can read the process's environment itself; here the captured [`Environment`] is read instead, with the
//! variables that the clouds' own tools know and `object_store` does not.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::gcp::{GcpCredential, GoogleCloudStorageBuilder, GoogleConfigKey};
use object_store::{ClientOptions, ObjectStore, RetryConfig, StaticCredentialProvider};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use url::Url;

use super::super::*;
use super::connector::{self, Connector};
use crate::model::Scheme;

/// The account name and key that every Azure emulator has; they are published, and no secret.
const EMULATOR_ACCOUNT: &str = "devstoreaccount1";
const EMULATOR_KEY: &str = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";

const S3_ADVICE: &str = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run with a role (IRSA, Pod Identity, \
                         instance role); for a public bucket set AWS_NO_SIGN_REQUEST=true";
const GS_ADVICE: &str = "set GOOGLE_APPLICATION_CREDENTIALS to a key file, or run with Workload Identity; for a public \
                         bucket set GOOGLE_SKIP_SIGNATURE=true";
const AZ_ADVICE: &str = "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or run with Workload Identity; for a \
                         public container set AZURE_SKIP_SIGNATURE=true";

/// A bucket's store, and what errors about it name.
pub(super) struct Place {
    pub(super) store: Arc<dyn ObjectStore>,
    /// URL of the server, without a slash at its end.
    pub(super) endpoint: String,
    /// Host of the server, with its port if it is not the scheme's.
    pub(super) host: String,
    /// How to configure a credential.
    pub(super) advice: &'static str,
    /// Where the environment's credential was found.
    found_in: Option<String>,
    was_given_credential: Arc<AtomicBool>,
}

/// The URL of a server, as it was written and where.
struct Endpoint {
    url: Url,
}

impl Endpoint {
    fn parse(variable: &str, text: &str) -> Result<Endpoint, String> {
        let usable = |url: &Url| {
            matches!(url.scheme(), "http" | "https")
                && url.host().is_some()
                && url.username().is_empty()
                && url.password().is_none()
                && url.query().is_none()
        };
        match Url::parse(text).ok().filter(usable) {
            Some(url) => Ok(Endpoint { url }),
            None => Err(format!("`{variable}` is not a URL like https://host:port, without user and query")),
        }
    }

    fn text(&self) -> String {
        self.url.as_str().trim_end_matches('/').to_owned()
    }

    fn is_plain(&self) -> bool {
        self.url.scheme() == "http"
    }
}

/// What the three kinds of store share while they are built.
struct Shared<'a> {
    bucket: &'a str,
    config: &'a SourceConfig,
    gate: Arc<HostGate>,
    environment: &'a Environment,
    was_given_credential: Arc<AtomicBool>,
}

impl Shared<'_> {
    fn connector(&self, host: &str, ca_variables: &[&str]) -> Result<Connector, String> {
        let mut certificates = Vec::new();
        for variable in ca_variables {
            if let Some(file) = self.environment.get(variable) {
                let pem = std::fs::read(file).map_err(|e| format!("`{variable}` names `{file}`: {e}"))?;
                let found: Vec<_> = CertificateDer::pem_slice_iter(&pem).collect::<Result<_, _>>().unwrap_or_default();
                if found.is_empty() {
                    return Err(format!("`{variable}` names `{file}`, which holds no PEM certificate"));
                }
                certificates.extend(found);
            }
        }
        Ok(Connector {
            host: host.to_owned(),
            bucket: self.bucket.to_owned(),
            gate: self.gate.clone(),
            connect_timeout: self.config.connect_timeout,
            stall_timeout: self.config.stall_timeout,
            certificates,
            proxies: connector::proxies(self.environment)?,
            was_given_credential: self.was_given_credential.clone(),
        })
    }

    fn place(
        &self,
        store: impl ObjectStore,
        endpoint: &Endpoint,
        advice: &'static str,
        found_in: Option<String>,
    ) -> Place {
        Place {
            store: Arc::new(store),
            endpoint: endpoint.text(),
            host: gate::authority(&endpoint.url),
            advice,
            found_in,
            was_given_credential: self.was_given_credential.clone(),
        }
    }

    /// The first of the variables that is set, with its name.
    fn first<'v>(&self, variables: &[&'v str]) -> Option<(&'v str, &str)> {
        variables.iter().find_map(|name| Some((*name, self.environment.get(name)?)))
    }

    /// Opens the token files that are named, because `object_store` reports a missing one without saying who named it.
    fn check_files(&self, variables: &[&str]) -> Result<(), String> {
        for variable in variables {
            if let Some(file) = self.environment.get(variable) {
                std::fs::File::open(file).map_err(|e| format!("`{variable}` names `{file}`: {e}"))?;
            }
        }
        Ok(())
    }

    /// Every variable with this prefix that is set, lower-cased as `object_store` names its keys.
    fn keys<'v>(&'v self, prefix: &'v str) -> impl Iterator<Item = (String, &'v str)> {
        let set = self.environment.iter().filter(move |(name, value)| name.starts_with(prefix) && !value.is_empty());
        set.map(|(name, value)| (name.to_ascii_lowercase(), value))
    }
}

impl Place {
    /// Builds the store of a bucket. The error is the detail of [`Error::Misconfigured`].
    pub(super) fn new(
        scheme: Scheme,
        bucket: &str,
        config: &SourceConfig,
        gate: Arc<HostGate>,
        environment: &Environment,
    ) -> Result<Place, String> {
        let shared = Shared { bucket, config, gate, environment, was_given_credential: Arc::default() };
        match scheme {
            Scheme::S3 => s3(&shared),
            Scheme::Gs => gs(&shared),
            _ => az(&shared),
        }
    }

    /// Where the credential comes from that the requests carry, if they carry one.
    pub(super) fn origin(&self) -> Option<String> {
        let given =
            || self.was_given_credential.load(Ordering::Relaxed).then(|| "the identity of this node or pod".into());
        self.found_in.clone().or_else(given)
    }
}

/// Every retry and every time limit on a whole body is ours: see `super::super::retry`.
fn no_retries() -> RetryConfig {
    RetryConfig { max_retries: 0, ..RetryConfig::default() }
}

fn options(config: &SourceConfig, endpoint: &Endpoint) -> ClientOptions {
    ClientOptions::new()
        .with_timeout_disabled()
        .with_connect_timeout(config.connect_timeout)
        .with_read_timeout(config.stall_timeout)
        .with_allow_http(endpoint.is_plain())
}

/// What `object_store` says about its configuration, without the name of the store it puts before it.
fn said(error: object_store::Error) -> String {
    let text = match &error {
        object_store::Error::Generic { source, .. } => source.to_string(),
        other => other.to_string(),
    };
    super::shortened(&text)
}

fn s3(shared: &Shared<'_>) -> Result<Place, String> {
    let environment = shared.environment;
    let mut builder = AmazonS3Builder::new();
    for (key, value) in shared.keys("AWS_") {
        use AmazonS3ConfigKey as Key;
        match key.parse() {
            // The bucket is the reference's, the endpoint and the connection are set below, and we only read.
            Ok(Key::Bucket | Key::Endpoint | Key::S3Endpoint | Key::VirtualHostedStyleRequest | Key::Client(_)) => {}
            Ok(Key::CopyIfNotExists | Key::ConditionalPut | Key::Checksum | Key::SkipSignature) => {}
            Ok(key) => builder = builder.with_config(key, value),
            Err(_) => {}
        }
    }
    let anonymous = environment.flag("AWS_SKIP_SIGNATURE") || environment.flag("AWS_NO_SIGN_REQUEST");
    if !anonymous && environment.get("AWS_ACCESS_KEY_ID").is_none() {
        shared.check_files(&["AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"])?;
    }
    let virtual_hosted = environment.flag("AWS_VIRTUAL_HOSTED_STYLE_REQUEST")
        || environment.get("AWS_S3_ADDRESSING_STYLE").is_some_and(|style| style == "virtual");
    let bucket = shared.bucket;
    let custom = shared.first(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"]);
    let endpoint = match custom {
        Some((variable, text)) => {
            let mut endpoint = Endpoint::parse(variable, text)?;
            // `object_store` takes the endpoint of this style as it is, people write it without the bucket.
            if virtual_hosted
                && let Some(host) = endpoint.url.host_str().map(str::to_owned)
                && !host.starts_with(&format!("{bucket}."))
            {
                let hosted = endpoint.url.set_host(Some(&format!("{bucket}.{host}")));
                hosted.map_err(|e| format!("`{variable}` cannot carry the bucket before its host: {e}"))?;
            }
            builder = builder.with_endpoint(endpoint.text());
            endpoint
        }
        None => {
            let region = shared.first(&["AWS_REGION", "AWS_DEFAULT_REGION"]).map_or("us-east-1", |(_, region)| region);
            let host = format!("s3.{region}.amazonaws.com");
            let host = if virtual_hosted { format!("{bucket}.{host}") } else { host };
            Endpoint::parse("AWS_REGION", &format!("https://{host}"))?
        }
    };
    let found_in = [
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
    ];
    let found_in = shared.first(&found_in).filter(|_| !anonymous).map(|(name, _)| environment.origin(name));
    let connector = shared.connector(&gate::authority(&endpoint.url), &["AWS_CA_BUNDLE", "SSL_CERT_FILE"])?;
    let store = builder
        .with_bucket_name(bucket)
        .with_virtual_hosted_style_request(virtual_hosted)
        .with_skip_signature(anonymous)
        .with_client_options(options(shared.config, &endpoint))
        .with_retry(no_retries())
        .with_http_connector(connector)
        .build()
        .map_err(said)?;
    Ok(shared.place(store, &endpoint, S3_ADVICE, found_in))
}

fn gs(shared: &Shared<'_>) -> Result<Place, String> {
    let environment = shared.environment;
    let mut builder = GoogleCloudStorageBuilder::new();
    for (key, value) in shared.keys("GOOGLE_") {
        use GoogleConfigKey as Key;
        match key.parse() {
            Ok(Key::Bucket | Key::BaseUrl | Key::SkipSignature | Key::Client(_)) | Err(_) => {}
            Ok(key) => builder = builder.with_config(key, value),
        }
    }
    // The emulator's variable may be written without a scheme, and its servers know no credentials.
    let emulator = environment.get("STORAGE_EMULATOR_HOST").filter(|_| environment.get("GOOGLE_BASE_URL").is_none());
    let endpoint = match (environment.get("GOOGLE_BASE_URL"), emulator) {
        (Some(base), _) => Endpoint::parse("GOOGLE_BASE_URL", base)?,
        (None, Some(host)) if host.contains("://") => Endpoint::parse("STORAGE_EMULATOR_HOST", host)?,
        (None, Some(host)) => Endpoint::parse("STORAGE_EMULATOR_HOST", &format!("http://{host}"))?,
        (None, None) => Endpoint::parse("GOOGLE_BASE_URL", "https://storage.googleapis.com")?,
    };
    let anonymous = environment.flag("GOOGLE_SKIP_SIGNATURE") || emulator.is_some();
    let mut found_in = shared
        .first(&[
            "GOOGLE_BEARER_TOKEN",
            "GOOGLE_SERVICE_ACCOUNT_KEY",
            "GOOGLE_SERVICE_ACCOUNT",
            "GOOGLE_SERVICE_ACCOUNT_PATH",
            "GOOGLE_APPLICATION_CREDENTIALS",
        ])
        .map(|(name, _)| environment.origin(name));
    if anonymous {
        // Otherwise a key file that this bucket does not need could still keep it from being read.
        let nobody = StaticCredentialProvider::new(GcpCredential { bearer: String::new() });
        builder = builder.with_credentials(Arc::new(nobody));
        found_in = None;
    } else if found_in.is_none() {
        // Where `gcloud auth application-default login` leaves it.
        found_in = environment
            .get("HOME")
            .map(|home| format!("{home}/.config/gcloud/application_default_credentials.json"))
            .filter(|file| std::path::Path::new(file).exists());
    }
    let connector = shared.connector(&gate::authority(&endpoint.url), &["SSL_CERT_FILE"])?;
    let store = builder
        .with_bucket_name(shared.bucket)
        .with_base_url(endpoint.text().as_str())
        .with_skip_signature(anonymous)
        .with_client_options(options(shared.config, &endpoint))
        .with_retry(no_retries())
        .with_http_connector(connector)
        .build()
        .map_err(said)?;
    Ok(shared.place(store, &endpoint, GS_ADVICE, found_in))
}

fn az(shared: &Shared<'_>) -> Result<Place, String> {
    let environment = shared.environment;
    let mut builder = MicrosoftAzureBuilder::new();
    for (key, value) in shared.keys("AZURE_").chain(shared.keys("IDENTITY_ENDPOINT")) {
        use AzureConfigKey as Key;
        match key.parse() {
            Ok(Key::ContainerName | Key::AccountName | Key::Endpoint | Key::UseEmulator | Key::SkipSignature) => {}
            Ok(Key::Client(_)) | Err(_) => {}
            Ok(key) => builder = builder.with_config(key, value),
        }
    }
    let anonymous = environment.flag("AZURE_SKIP_SIGNATURE");
    let emulator = environment.flag("AZURE_STORAGE_USE_EMULATOR");
    let connection = ConnectionString::parse(environment.get("AZURE_STORAGE_CONNECTION_STRING").unwrap_or_default());

    let account = shared.first(&["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"]).map(|(_, name)| name);
    let account = account.or(connection.account).or(emulator.then_some(EMULATOR_ACCOUNT));
    let account = account.ok_or("no storage account is named: set AZURE_STORAGE_ACCOUNT_NAME to its name")?;
    let plain = !account.is_empty() && account.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
    if !plain {
        return Err("the name of the storage account is not made of letters, digits and `-`".into());
    }

    let named = shared.first(&["AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"]);
    let endpoint = match (named, connection.endpoint) {
        (Some((variable, text)), _) => Endpoint::parse(variable, text)?,
        (None, Some(text)) => Endpoint::parse("AZURE_STORAGE_CONNECTION_STRING", text)?,
        (None, None) if emulator => {
            let at = environment.get("AZURITE_BLOB_STORAGE_URL").unwrap_or("http://127.0.0.1:10000");
            let at = format!("{}/{account}", at.trim_end_matches('/'));
            Endpoint::parse("AZURITE_BLOB_STORAGE_URL", &at)?
        }
        (None, None) if environment.flag("AZURE_USE_FABRIC_ENDPOINT") => {
            Endpoint::parse("AZURE_STORAGE_ENDPOINT", &format!("https://{account}.blob.fabric.microsoft.com"))?
        }
        (None, None) => {
            let suffix = connection.suffix.unwrap_or("core.windows.net");
            Endpoint::parse("AZURE_STORAGE_CONNECTION_STRING", &format!("https://{account}.blob.{suffix}"))?
        }
    };

    let given = [
        "AZURE_STORAGE_ACCOUNT_KEY",
        "AZURE_STORAGE_ACCESS_KEY",
        "AZURE_STORAGE_MASTER_KEY",
        "AZURE_STORAGE_SAS_TOKEN",
        "AZURE_STORAGE_SAS_KEY",
        "AZURE_STORAGE_TOKEN",
        "AZURE_STORAGE_CLIENT_SECRET",
        "AZURE_CLIENT_SECRET",
        "AZURE_FEDERATED_TOKEN_FILE",
    ];
    let given = shared.first(&given).map(|(name, _)| name);
    let mut found_in = given.map(|name| environment.origin(name));
    if given.is_none() {
        // Names that `object_store` does not know, the command line tool of Azure does.
        let key = shared.first(&["AZURE_STORAGE_KEY"]);
        let key = key.or(connection.key.map(|key| ("AZURE_STORAGE_CONNECTION_STRING", key)));
        if let Some((variable, key)) = key {
            builder = builder.with_access_key(key);
            found_in = Some(environment.origin(variable));
        } else if let Some(sas) = connection.sas {
            builder = builder.with_config(AzureConfigKey::SasKey, sas);
            found_in = Some(environment.origin("AZURE_STORAGE_CONNECTION_STRING"));
        } else if emulator {
            builder = builder.with_access_key(EMULATOR_KEY);
            found_in = Some("the emulator's published key".into());
        }
    }
    if anonymous {
        found_in = None;
    } else if given == Some("AZURE_FEDERATED_TOKEN_FILE") {
        shared.check_files(&["AZURE_FEDERATED_TOKEN_FILE"])?;
    }
    let connector = shared.connector(&gate::authority(&endpoint.url), &["SSL_CERT_FILE"])?;
    let store = builder
        .with_account(account)
        .with_container_name(shared.bucket)
        .with_endpoint(endpoint.text())
        .with_skip_signature(anonymous)
        .with_client_options(options(shared.config, &endpoint))
        .with_retry(no_retries())
        .with_http_connector(connector)
        .build()
        .map_err(said)?;
    Ok(shared.place(store, &endpoint, AZ_ADVICE, found_in))
}

/// `AccountName=…;AccountKey=…;BlobEndpoint=…`, as the portal of Azure gives it out.
#[derive(Debug, Default, PartialEq, Eq)]
struct ConnectionString<'a> {
    account: Option<&'a str>,
    key: Option<&'a str>,
    sas: Option<&'a str>,
    endpoint: Option<&'a str>,
    suffix: Option<&'a str>,
}

impl<'a> ConnectionString<'a> {
    fn parse(text: &'a str) -> ConnectionString<'a> {
        let mut found = ConnectionString::default();
        for (name, value) in text.split(';').filter_map(|part| part.split_once('=')) {
            let slot = match name.trim() {
                "AccountName" => &mut found.account,
                "AccountKey" => &mut found.key,
                "SharedAccessSignature" => &mut found.sas,
                "BlobEndpoint" => &mut found.endpoint,
                "EndpointSuffix" => &mut found.suffix,
                _ => continue,
            };
            *slot = Some(value.trim()).filter(|value| !value.is_empty());
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_string_is_read_as_the_portal_writes_it() {
        let text =
            "DefaultEndpointsProtocol=https;AccountName=models;AccountKey=a+/b==;EndpointSuffix=core.usgovcloudapi.net";
        let found = ConnectionString::parse(text);
        assert_eq!(found.account, Some("models"));
        assert_eq!(found.key, Some("a+/b=="), "a key may end with the sign that separates name and value");
        assert_eq!(found.suffix, Some("core.usgovcloudapi.net"));
        assert_eq!(ConnectionString::parse(""), ConnectionString::default());
    }

    #[test]
    fn endpoints_that_could_hold_a_secret_are_refused() {
        for bad in ["", "host:9000", "ftp://host", "https://user:pass@host", "https://host/?sig=x", "https://"] {
            assert!(Endpoint::parse("V", bad).is_err(), "{bad}");
        }
        assert_eq!(Endpoint::parse("V", "http://Host:80/account/").unwrap().text(), "http://host/account");
    }

    fn place(scheme: Scheme, variables: &[(&str, &str)]) -> Place {
        let environment: Environment = variables.iter().copied().collect();
        let place = Place::new(scheme, "models", &SourceConfig::default(), Arc::default(), &environment);
        place.unwrap_or_else(|e| panic!("{variables:?}: {e}"))
    }

    #[test]
    fn the_endpoint_is_the_one_the_tools_of_the_cloud_would_ask() {
        type Case<'a> = (Scheme, &'a [(&'a str, &'a str)], &'a str);
        let cases: [Case; 11] = [
            (Scheme::S3, &[], "https://s3.us-east-1.amazonaws.com"),
            (Scheme::S3, &[("AWS_DEFAULT_REGION", "eu-west-3")], "https://s3.eu-west-3.amazonaws.com"),
            (
                Scheme::S3,
                &[("AWS_DEFAULT_REGION", "eu-west-3"), ("AWS_REGION", "eu-west-1")],
                "https://s3.eu-west-1.amazonaws.com",
            ),
            (Scheme::S3, &[("AWS_ENDPOINT", "https://c"), ("AWS_ENDPOINT_URL", "https://b")], "https://b"),
            (Scheme::S3, &[("AWS_ENDPOINT_URL_S3", "https://a"), ("AWS_ENDPOINT_URL", "https://b")], "https://a"),
            (
                Scheme::S3,
                &[("AWS_ENDPOINT_URL", "https://b"), ("AWS_S3_ADDRESSING_STYLE", "virtual")],
                "https://models.b",
            ),
            (
                Scheme::S3,
                &[("AWS_ENDPOINT_URL", "https://models.b"), ("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "true")],
                "https://models.b",
            ),
            (Scheme::Gs, &[("GOOGLE_SKIP_SIGNATURE", "1")], "https://storage.googleapis.com"),
            (Scheme::Gs, &[("STORAGE_EMULATOR_HOST", "localhost:4443")], "http://localhost:4443"),
            (
                Scheme::Az,
                &[("AZURE_STORAGE_ACCOUNT", "acme"), ("AZURE_STORAGE_KEY", "a2V5")],
                "https://acme.blob.core.windows.net",
            ),
            (Scheme::Az, &[("AZURE_STORAGE_USE_EMULATOR", "true")], "http://127.0.0.1:10000/devstoreaccount1"),
        ];
        for (scheme, variables, expected) in cases {
            assert_eq!(place(scheme, variables).endpoint, expected, "{variables:?}");
        }
    }

    #[test]
    fn a_credential_is_named_by_where_it_was_found() {
        let key = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];
        assert_eq!(place(Scheme::S3, &key).origin().as_deref(), Some("`AWS_ACCESS_KEY_ID`"));
        let irsa = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/dev/null"), ("AWS_ROLE_ARN", "arn")];
        assert_eq!(place(Scheme::S3, &irsa).origin().as_deref(), Some("`AWS_WEB_IDENTITY_TOKEN_FILE`"));
        assert_eq!(place(Scheme::S3, &[]).origin(), None, "a role of the instance shows only when it is asked for");
        let anonymous = [key[0], key[1], ("AWS_NO_SIGN_REQUEST", "true")];
        assert_eq!(place(Scheme::S3, &anonymous).origin(), None, "a key that is not sent cannot be wrong");
    }
}

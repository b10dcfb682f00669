//! What every source promises. A module of tests implements [`Origin`] for a place it can set up and calls [`holds`].

use std::sync::Arc;

use async_trait::async_trait;
use larder::fault::{Code, Diagnose};
use larder::model::{Digester, ListedFile, Listing, ModelRef, Verified};
use larder::source::{Environment, Error, OnWait, RangeReader, RetryPolicy, Source, SourceConfig, Sources};

/// The model that [`Origin::reference`] holds when [`holds`] begins.
pub(crate) const FILES: [(&str, &[u8]); 3] =
    [("config.json", b"{\"model_type\": \"test\"}"), ("empty", b""), ("weights/a b+c.safetensors", &WEIGHTS)];

/// Long enough to be cut in the middle; no two of its 251-byte stretches in a row are alike.
pub(crate) static WEIGHTS: [u8; 300_000] = {
    let mut bytes = [0; 300_000];
    let mut i = 0;
    while i < bytes.len() {
        bytes[i] = (i % 251) as u8 ^ (i / 251) as u8;
        i += 1;
    }
    bytes
};

/// A place that holds models, and misbehaves when told to.
#[async_trait]
pub(crate) trait Origin: Sync {
    /// Variables with which the source finds this place.
    fn environment(&self) -> Environment;

    /// A model of exactly [`FILES`].
    fn reference(&self) -> ModelRef;

    /// A model that is not there.
    fn missing(&self) -> ModelRef;

    /// Replaces a file of the model.
    async fn put(&self, path: &str, bytes: &[u8]);

    /// From now on refuses everything, or nothing. False if the place cannot refuse.
    async fn deny(&self, denied: bool) -> bool;

    /// Breaks the body of the next file after so many bytes. False if the place has no bodies that can break.
    async fn break_next_body_after(&self, bytes: u64) -> bool;
}

/// The contract: list, fetch whole, fetch a range, missing, resume, denied, changed under us.
pub(crate) async fn holds(origin: &impl Origin) {
    let source = open(origin, &origin.reference());

    let listing = source.resolve().await.expect("a model that is there has a listing");
    let listed: Vec<_> = listing.files().iter().map(|f| (f.path.as_str(), f.size)).collect();
    let there: Vec<_> = FILES.iter().map(|(path, bytes)| (*path, bytes.len() as u64)).collect();
    assert_eq!(listed, there, "the listing is the files that are there, sorted");
    let again = open(origin, &origin.reference()).resolve().await.unwrap();
    assert_eq!(again.version(), listing.version(), "what did not change keeps its version");

    for (path, bytes) in FILES.iter().filter(|(_, bytes)| !bytes.is_empty()) {
        let file = file(&listing, path);
        assert_eq!(&fetch_whole(&source, file).await.unwrap(), bytes, "{path} arrives as it is");
        let mut digester = Digester::new(file.checksum, file.size);
        digester.update(bytes);
        assert!(matches!(digester.finish(), Verified::As(_)), "the checksum of {path} is of its bytes");
    }

    let weights = file(&listing, FILES[2].0);
    for range in [0..1, 1000..250_000, 299_999..300_000] {
        let stream = source.fetch(weights, range.clone()).await.unwrap();
        let expected = &WEIGHTS[range.start as usize..range.end as usize];
        assert!(collect(stream).await.unwrap() == expected, "{range:?} is exactly that range");
    }

    let missing = open(origin, &origin.missing()).resolve().await.expect_err("what is not there has no listing");
    assert_eq!(missing.code(), Code::RepoNotFound, "{missing}");
    assert!(!missing.action().is_empty(), "{missing}");

    if origin.break_next_body_after(100_000).await {
        let bytes = fetch_whole(&source, weights).await.expect("a broken body is resumed");
        assert!(bytes == WEIGHTS, "a resumed body is whole");
    }

    if origin.deny(true).await {
        let error = match open(origin, &origin.reference()).resolve().await {
            Ok(listing) => fetch_whole(&source, file(&listing, FILES[2].0)).await.expect_err("refused"),
            Err(error) => error,
        };
        let codes = [Code::AuthMissing, Code::AuthInvalid, Code::LicenceNotAccepted, Code::SourceUnreachable];
        assert!(codes.contains(&error.code()), "{error} is {}", error.code());
        assert!(!error.action().is_empty(), "{error}");
        origin.deny(false).await;
    }

    let mut other = WEIGHTS.to_vec();
    other[299_999] ^= 1;
    origin.put(FILES[2].0, &other).await;
    match fetch_whole(&source, weights).await {
        Err(error) => assert_eq!(error.code(), Code::SourceChanged, "{error}"),
        // A listing may name a version that stays, as the Hub's commits do.
        Ok(bytes) if bytes == WEIGHTS => {}
        // A source whose files have no mark is caught by the checksum, which `cache` verifies.
        Ok(bytes) => {
            let mut digester = Digester::new(weights.checksum, weights.size);
            digester.update(&bytes);
            let verified = digester.finish();
            assert!(
                matches!(verified, Verified::Differs { .. }),
                "a file that changed passed for the one that was listed"
            );
        }
    }
    // The same source again: a pull that met a change starts over from the listing.
    let now = source.resolve().await.unwrap();
    assert_ne!(now.version(), listing.version(), "what changed is another version");
    assert!(fetch_whole(&source, file(&now, FILES[2].0)).await.unwrap() == other);
}

/// The source of a reference in an environment, as the daemon opens it.
pub(crate) fn open_in(environment: Environment, reference: &str) -> Result<Arc<dyn Source>, Error> {
    let sources = Sources::new(SourceConfig::default(), environment);
    Ok(sources.open(&reference.parse().unwrap())?.into())
}

/// The names that a source lists.
pub(crate) async fn listed(source: &Arc<dyn Source>) -> Vec<String> {
    source.resolve().await.unwrap().files().iter().map(|f| f.path.to_string()).collect()
}

/// The source of a reference of an origin.
pub(crate) fn open(origin: &impl Origin, reference: &ModelRef) -> Arc<dyn Source> {
    open_in(origin.environment(), &reference.to_string()).unwrap_or_else(|e| panic!("{reference}: {e}"))
}

/// The listed file of that path.
pub(crate) fn file<'a>(listing: &'a Listing, path: &str) -> &'a ListedFile {
    listing.files().iter().find(|f| f.path.as_str() == path).unwrap_or_else(|| panic!("{path} is not listed"))
}

/// All bytes of a file, with retries.
pub(crate) async fn fetch_whole(source: &Arc<dyn Source>, file: &ListedFile) -> Result<Vec<u8>, Error> {
    let quiet: OnWait = Arc::new(|_| Box::new(()));
    let policy = RetryPolicy { first_wait: std::time::Duration::from_millis(1), ..RetryPolicy::default() };
    collect(policy.fetch(source.clone(), file.clone(), 0..file.size, quiet)).await
}

/// All bytes that come.
pub(crate) async fn collect(mut reader: Box<dyn RangeReader>) -> Result<Vec<u8>, Error> {
    let (mut all, mut block) = (Vec::new(), vec![0; 1 << 16]);
    loop {
        match reader.read(&mut block).await? {
            0 => return Ok(all),
            came => all.extend_from_slice(&block[..came]),
        }
    }
}

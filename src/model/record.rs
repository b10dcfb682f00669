//! [`Record`]: the small file that names a model version; and the names derived from it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Checksum, Digest, ListedFile, ModelRef, RelPath};

/// Names one version of one reference: 16 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ModelId([u8; 8]);

impl ModelId {
    /// The id of `version` of `reference`: the first 8 bytes of BLAKE3 over both.
    pub fn new(reference: &ModelRef, version: &str) -> ModelId {
        let hash = blake3::hash(format!("{reference}\n{version}").as_bytes());
        ModelId(hash.as_bytes()[..8].try_into().expect("BLAKE3 has 32 bytes"))
    }
}

impl fmt::Display for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for ModelId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ModelId({self})")
    }
}

impl FromStr for ModelId {
    type Err = ();

    fn from_str(text: &str) -> Result<ModelId, ()> {
        let mut bytes = [0; 8];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| ())?;
        Ok(ModelId(bytes))
    }
}

impl Serialize for ModelId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ModelId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<ModelId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(|()| serde::de::Error::custom("not a model id"))
    }
}

/// A source's statement by which bytes can be recognised without fetching them.
///
/// A checksum recognises them wherever they come from; a pin only at the place it was given for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Claim(String);

impl Claim {
    /// By checksum and size.
    pub fn checksum(checksum: Checksum, size: u64) -> Claim {
        Claim(format!("{checksum} {size}"))
    }

    /// By place, pin and size.
    pub fn pin(locator: &str, pin: &str, size: u64) -> Claim {
        let place = blake3::hash(format!("{locator}\n{pin}").as_bytes());
        Claim(format!("pin:{} {size}", &place.to_hex()[..32]))
    }

    /// The strongest claim a listed file makes, if it makes any.
    pub fn of(file: &ListedFile) -> Option<Claim> {
        match (file.checksum, &file.pin) {
            (Some(checksum), _) => Some(Claim::checksum(checksum, file.size)),
            (None, Some(pin)) => Some(Claim::pin(&file.locator, pin, file.size)),
            (None, None) => None,
        }
    }

    /// The claim as a key of the index and as the name of an ingest.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What names a model version. Written last, whole, as `refs/<model id>`; while it exists, everything it names is whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What was asked for.
    pub reference: ModelRef,
    /// The version the source gave it.
    pub version: String,
    /// The content: a file in `manifests/`.
    pub manifest: Digest,
    /// The snapshot, relative to `public/`.
    pub snapshot: RelPath,
    /// When a pull last found this version current at the source; milliseconds since the Unix epoch.
    pub confirmed_at_ms: u64,
    /// Grows with each confirmation on this volume: of the versions of one reference, the highest is the current one.
    /// Not a clock, because clocks jump.
    pub sequence: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Files in all.
    pub total_files: u64,
    /// How the files can be recognised: claim and digest. Rebuilds the index.
    pub claims: Vec<(Claim, Digest)>,
}

impl Record {
    /// The id, which is also the file name.
    pub fn id(&self) -> ModelId {
        ModelId::new(&self.reference, &self.version)
    }
}

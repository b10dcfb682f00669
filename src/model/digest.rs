//! [`Digest`] (ours, BLAKE3) and [`Checksum`] (a source's claim). Two types, because one proves and the other is checked.

use std::fmt;
use std::str::FromStr;

use aws_lc_rs::digest as lc;
use serde::{Deserialize, Serialize};

/// BLAKE3 of a blob's bytes: its name on disk and its address on the wire.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// A text that is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a digest: expected `blake3:` and 64 lower-case hexadecimal digits")]
pub struct DigestError(String);

impl Digest {
    /// The digest of bytes in memory.
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(*blake3::hash(bytes).as_bytes())
    }

    /// The digest a finished hasher stands for.
    pub fn finish(hasher: &blake3::Hasher) -> Digest {
        Digest(*hasher.finalize().as_bytes())
    }

    /// 64 hexadecimal digits: the file name of the blob.
    pub fn to_hex(self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().as_str().to_owned()
    }

    /// The digest named by 64 lower-case hexadecimal digits.
    pub fn from_hex(text: &str) -> Result<Digest, DigestError> {
        let lower = !text.bytes().any(|b| b.is_ascii_uppercase());
        let mut bytes = [0; 32];
        match hex::decode_to_slice(text, &mut bytes) {
            Ok(()) if lower => Ok(Digest(bytes)),
            _ => Err(DigestError(text.chars().take(80).collect())),
        }
    }

    /// The first 12 digits, for logs.
    pub fn short(self) -> String {
        hex::encode(&self.0[..6])
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blake3:{}", self.to_hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({})", self.short())
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Digest, DigestError> {
        let hex = text.strip_prefix("blake3:").ok_or_else(|| DigestError(text.chars().take(80).collect()))?;
        Digest::from_hex(hex)
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Digest, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a source says the bytes hash to. It can be verified, never compared with a [`Digest`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Checksum {
    /// SHA-256 of the bytes: the Hub's LFS oid, and our listing format.
    Sha256([u8; 32]),
    /// SHA-1 of `blob <size>\0` and the bytes: git's object id, which the Hub gives for files outside LFS.
    GitSha1([u8; 20]),
}

/// A text that is not a checksum.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a checksum: expected `sha256:` and 64 or `git-sha1:` and 40 lower-case hexadecimal digits")]
pub struct ChecksumError(String);

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Checksum::Sha256(b) => write!(f, "sha256:{}", hex::encode(b)),
            Checksum::GitSha1(b) => write!(f, "git-sha1:{}", hex::encode(b)),
        }
    }
}

impl FromStr for Checksum {
    type Err = ChecksumError;

    fn from_str(text: &str) -> Result<Checksum, ChecksumError> {
        let bad = || ChecksumError(text.chars().take(80).collect());
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(bad());
        }
        let (kind, digits) = text.split_once(':').ok_or_else(bad)?;
        let bytes = hex::decode(digits).map_err(|_| bad())?;
        match kind {
            "sha256" => bytes.try_into().map(Checksum::Sha256).map_err(|_| bad()),
            "git-sha1" => bytes.try_into().map(Checksum::GitSha1).map_err(|_| bad()),
            _ => Err(bad()),
        }
    }
}

impl Serialize for Checksum {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Checksum {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Checksum, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Hashes a file's bytes in order, once: BLAKE3 for its name, and what the source claimed, if it claimed anything.
pub struct Digester {
    blake3: blake3::Hasher,
    claimed: Option<(Checksum, lc::Context)>,
}

/// What a [`Digester`] found when the last byte was in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verified {
    /// The bytes are what the source claims, or it claims nothing.
    As(Digest),
    /// The bytes hash to another checksum of the same kind.
    Differs {
        /// What the source claims.
        claimed: Checksum,
        /// What the bytes are.
        found: Checksum,
    },
}

impl Digester {
    /// A hasher for a file of `size` bytes. Git's checksum begins with the size, so it must be known before the bytes.
    pub fn new(claimed: Option<Checksum>, size: u64) -> Digester {
        let claimed = claimed.map(|claim| {
            let context = match claim {
                Checksum::Sha256(_) => lc::Context::new(&lc::SHA256),
                Checksum::GitSha1(_) => {
                    let mut context = lc::Context::new(&lc::SHA1_FOR_LEGACY_USE_ONLY);
                    context.update(format!("blob {size}\0").as_bytes());
                    context
                }
            };
            (claim, context)
        });
        Digester { blake3: blake3::Hasher::new(), claimed }
    }

    /// Takes the next bytes in.
    pub fn update(&mut self, bytes: &[u8]) {
        self.blake3.update(bytes);
        if let Some((_, context)) = &mut self.claimed {
            context.update(bytes);
        }
    }

    /// BLAKE3 of what has been taken in so far.
    pub fn so_far(&self) -> Digest {
        Digest::finish(&self.blake3)
    }

    /// Compares with the claim.
    pub fn finish(self) -> Verified {
        let digest = Digest::finish(&self.blake3);
        let Some((claimed, context)) = self.claimed else { return Verified::As(digest) };
        let sum = context.finish();
        let found = match claimed {
            Checksum::Sha256(_) => Checksum::Sha256(sum.as_ref().try_into().expect("SHA-256 has 32 bytes")),
            Checksum::GitSha1(_) => Checksum::GitSha1(sum.as_ref().try_into().expect("SHA-1 has 20 bytes")),
        };
        if found == claimed { Verified::As(digest) } else { Verified::Differs { claimed, found } }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers() {
        // printf hello | sha256sum; printf hello | git hash-object --stdin
        let sha256 = "sha256:2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824";
        let git = "git-sha1:b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0";
        for claim in [sha256, git] {
            let claim: Checksum = claim.parse().unwrap();
            let mut digester = Digester::new(Some(claim), 5);
            digester.update(b"he");
            digester.update(b"llo");
            assert_eq!(digester.finish(), Verified::As(Digest::of(b"hello")));

            let mut digester = Digester::new(Some(claim), 5);
            digester.update(b"hellO");
            assert!(matches!(digester.finish(), Verified::Differs { .. }), "{claim}");
        }
    }

    #[test]
    fn text_forms_are_strict_and_round_trip() {
        let digest = Digest::of(b"x");
        assert_eq!(digest.to_string().parse::<Digest>().unwrap(), digest);
        assert!(digest.to_string().to_uppercase().parse::<Digest>().is_err());
        for bad in ["", "blake3:", "blake3:zz", "sha256:00", "md5:d41d8cd98f00b204e9800998ecf8427e"] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
            assert!(bad.parse::<Checksum>().is_err(), "{bad}");
        }
    }
}

//! The nouns. No I/O, no tokio.

mod digest;
mod holder;
mod listing;
mod manifest;
mod path;
mod record;
mod reference;
mod selection;
mod size;
mod stamp;
mod timeline;

pub use digest::{Checksum, ChecksumError, Digest, DigestError, Digester, Verified};
pub use holder::{Holder, HolderError, MAX_HOLDER_BYTES, Pod};
pub use listing::{ListedFile, Listing, ListingBuilder, ListingError, MAX_LISTED_FILES};
pub use manifest::{Manifest, ManifestError, ManifestFile};
pub use path::{RelPath, RelPathError};
pub use record::{Claim, ModelId, Record};
pub use reference::{Location, ModelRef, ReferenceError, Scheme};
pub use selection::{PatternError, Selection};
pub use size::{Bytes, Share, percent_of};
pub use stamp::Stamp;
pub use timeline::{Course, Effort, Stage, StageTime, Timeline};

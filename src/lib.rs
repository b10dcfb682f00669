//! larder: a node-local model cache.
//!
//! It makes a model local once, proves every byte, keeps it content-addressed on local disk, and hands it to any number
//! of readers without copying.
//!
//! # Ranks: one direction for every import
//!
//! ```text
//! rank 8   main   kubectl-larder   cli  words -> one call
//! rank 7   daemon                       builds everything, runs, drains
//! rank 6   config                       one file -> typed, all mistakes at once
//! rank 5   serve   client   kubernetes  the door, its other side, and the cluster's API
//! rank 4   cache                        the only place that decides: pull? wait? refuse?
//! rank 3   store   index   source       bytes on this disk; facts; bytes from elsewhere
//! rank 2   wire                         every byte that crosses a process
//! rank 1   model                        the nouns; no I/O
//! rank 0   fault   telemetry   heap   huge_page   priority
//!                                        what an error must say; logs and metrics; memory; who goes first
//! ```
//!
//! A module may `use` only modules of a lower rank, never its own rank, never upwards. `store`, `index` and `source` do
//! not know each other: only `cache` marries them. `fault`, `model`, `wire`, `store` and `index` are synchronous and do
//! not use tokio. `tests/architecture.rs` holds this table as data and fails with a sentence that names the mend.
//!
//! - [`fault`]: the closed list of what can go wrong, and the one table to HTTP status, exit code and metric label.
//! - [`telemetry`]: the log subscriber, the names of log fields, and every metric in one list.
//! - [`heap`]: memory that is taken and not used.
//! - [`huge_page`]: memory that a disk can be given in few parts.
//! - [`priority`]: when the disk serves a thread.
//! - [`model`]: the nouns: `ModelRef`, `Digest`, `Checksum`, `RelPath`, `Manifest`, `Listing`.
//! - [`wire`]: bodies of the HTTP API, frames of the socket, the map of a descriptor, and what of a file is in memory.
//! - [`store`]: the only code that changes the disk.
//! - [`index`]: sled; disposable; checksum to digest, recency.
//! - [`source`]: places that resolve a reference and stream its files.
//! - [`cache`]: the verbs.
//! - [`serve`]: the doors: HTTP, and descriptors over the socket.
//! - [`client`]: the same doors from the other side.
//! - [`kubernetes`]: the API server of the cluster: which pods of this node are gone, what the node says of itself, and where
//!   the larders of a cluster are.
//! - [`config`]: the file, the environment and the flags.
//! - [`daemon`]: builds everything, runs it, drains it.
//! - [`cli`]: words to one call, for one node and (`kubectl larder`) for many.

pub mod cache;
pub mod cli;
pub mod client;
pub mod config;
pub mod daemon;
pub mod fault;
pub mod heap;
pub mod huge_page;
pub mod index;
pub mod kubernetes;
pub mod model;
pub mod priority;
pub mod serve;
pub mod source;
pub mod store;
pub mod telemetry;
pub mod wire;

//! The doors from the other side: [`Client`] asks a daemon by HTTP, and [`Opener`] has it hand out the files of a model.
//!
//! ```no_run
//! # fn main() -> Result<(), larder::fault::Problem> {
//! let reference: larder::model::ModelRef = "hf://org/name@main".parse().unwrap();
//! let model = larder::client::blocking::open(&reference)?;
//! let weights = model.mmap("model.safetensors")?;
//! println!("{} bytes of {}", weights.len(), model.info().version);
//! # Ok(())
//! # }
//! ```
//!
//! While a [`Model`] is held, nothing of its version is taken away. It keeps working when the daemon is gone, and its lease
//! is taken again when the daemon is back.

mod asynchronous;
pub mod blocking;
mod conversation;
mod http;
mod model;
mod opener;

pub use http::Client;
pub use model::Model;
pub use opener::{DEFAULT_PATIENCE, Opener, default_socket};

use crate::fault::Problem;
use crate::model::ModelRef;

/// Opens a model on the [`default_socket`]; one that is not local is pulled first. Needs a tokio runtime, and the lease is
/// kept for as long as that runs.
pub async fn open(reference: &ModelRef) -> Result<Model, Problem> {
    Opener::new(&default_socket()).open(reference).await
}

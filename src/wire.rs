//! Every byte that crosses a process: bodies of the HTTP API, frames of the socket door and the descriptors with them,
//! what a reader makes of a descriptor, and how much of a file is in memory.

pub mod frame;
pub mod guard;
pub mod http;
pub mod mapping;
pub mod residency;

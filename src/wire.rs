//! Every byte that crosses a process: bodies of the HTTP API, frames of the socket door and the descriptors with them,
//! and what a reader makes of a descriptor.

pub mod frame;
pub mod http;
pub mod mapping;

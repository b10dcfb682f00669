//! Every byte that crosses a process.

pub mod http;

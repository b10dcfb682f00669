//! What larder promises, tested through its doors and against real peers.

mod api;
mod cli;
mod daemon;
mod evict;
mod fd_daemon;
mod fd_door;
mod holders;
mod hostile;
mod hostile_reader;
mod hub_protocol;
mod init;
mod prepare;
mod pull;
mod readers_page;
mod real;
mod scrub;
mod sharing;
mod source_az;
mod source_file;
mod source_gs;
mod source_hf;
mod source_s3;
mod source_web;
mod support;
mod touched;
mod warm;

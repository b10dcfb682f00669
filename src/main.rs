//! The binary: parse, run, print the error, exit code; nothing else.

use std::process::ExitCode;

use clap::Parser;
use larder::cli::{self, Cli};

/// glibc keeps what its threads have freed: after a pull a daemon would hold the memory of its busiest moment for ever.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => cli::report(&cli, &problem),
    }
}

//! The binary: parse, run, print the error, exit code; nothing else.

use std::process::ExitCode;

use clap::Parser;
use larder::cli::{self, Cli};

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli::run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => cli::report(&cli, &problem),
    }
}

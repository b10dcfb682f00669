//! The plug-in of kubectl: parse, run, print the error, exit code; nothing else.

use std::process::ExitCode;

use clap::Parser;
use larder::cli::kubectl::{self, Words};

fn main() -> ExitCode {
    let words = Words::parse();
    match kubectl::run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => kubectl::report(&words, &problem),
    }
}

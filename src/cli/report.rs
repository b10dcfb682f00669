//! What is written to the terminal. Results go to standard output, everything else to standard error.

use std::io::{self, Write};

use serde::Serialize;

use super::{Error, Output};
use crate::fault::Problem;
use crate::wire::http::ProblemBody;

/// A failure as a person reads it: what happened; what to do, and the code to search for.
pub(super) fn error_text(problem: &Problem) -> String {
    let (message, code) = (plain(&problem.message), problem.code);
    match plain(&problem.action).replace('\n', " ") {
        action if action.is_empty() => format!("error: {message}\ncode: {code}\n"),
        action => format!("error: {message}\naction: {action}            code: {code}\n"),
    }
}

/// Writes a failure to standard error.
pub(super) fn error(problem: &Problem, output: Output) {
    let text = match output {
        Output::Table => error_text(problem),
        Output::Json => json(&ProblemBody::from(problem)),
    };
    // Nobody is left to be told when standard error is closed.
    let _ = io::stderr().lock().write_all(text.as_bytes());
}

/// Writes a line of progress or advice to standard error.
pub(super) fn say(line: &str) {
    // As above.
    let _ = writeln!(io::stderr().lock(), "{}", plain(line));
}

/// Writes the result to standard output.
pub(super) fn out(text: &str) -> Result<(), Error> {
    write_to(&mut io::stdout().lock(), text)
}

fn write_to(out: &mut impl Write, text: &str) -> Result<(), Error> {
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // The reader has seen enough (`larder list | head -1`).
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        Err(error) => Err(Error::Output { why: error.to_string() }),
        Ok(()) => Ok(()),
    }
}

/// A body of the API, as JSON for people and for `jq`.
pub(super) fn json(body: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(body).expect("a body has string keys and no failing serialiser");
    text.push('\n');
    text
}

/// Text that may come from outside, without the characters that move a cursor or change a colour.
pub(super) fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Code;

    fn problem(action: &str) -> Problem {
        Problem {
            code: Code::VolumeFull,
            message: "cannot pull `hf://acme/big@main`: needs 160.2 GB, 41.0 GB are free".into(),
            action: action.into(),
            retry_after_seconds: None,
        }
    }

    #[test]
    fn an_error_says_what_happened_what_to_do_and_its_code() {
        assert_eq!(
            error_text(&problem("raise `volume.quota`")),
            "error: cannot pull `hf://acme/big@main`: needs 160.2 GB, 41.0 GB are free\n\
             action: raise `volume.quota`            code: volume-full\n"
        );
        assert!(error_text(&problem("")).ends_with("\ncode: volume-full\n"));
    }

    #[test]
    fn an_error_cannot_speak_to_the_terminal() {
        assert!(!error_text(&problem("\u{1b}]0;title\u{7}")).contains(['\u{1b}', '\u{7}']));
    }

    #[test]
    fn an_error_is_a_problem_body_in_json() {
        let body: ProblemBody = serde_json::from_str(&json(&ProblemBody::from(&problem("x")))).unwrap();
        assert_eq!((body.code.as_str(), body.status), ("volume-full", 507));
    }

    struct Closed(io::ErrorKind);

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_has_seen_enough_is_no_error() {
        assert!(write_to(&mut Closed(io::ErrorKind::BrokenPipe), "x").is_ok());
        assert!(write_to(&mut Closed(io::ErrorKind::StorageFull), "x").is_err());
    }
}

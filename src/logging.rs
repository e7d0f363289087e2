//! Logs: which lines are written, and in which form, on stderr.
//!
//! What the levels mean follows go-mmproxy's `-v`: nothing about single connections but what somebody
//! has to mend (0), the errors of single connections (1, `-v`, debug), every change of their state
//! (2, `-vv`, trace). `-q` leaves warnings and errors.

mod journal;

use std::io::{self, IsTerminal};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt};

use crate::cli::{Global, LogFormat};
use journal::Journal;

/// Installs the process's logger. Once; a second call changes nothing.
pub fn init(global: &Global) {
    let level = level(global.quiet, global.verbose);
    // other crates report what is lost (rtnetlink: messages), and would flood the trace level
    let filter = Targets::new()
        .with_target(env!("CARGO_CRATE_NAME"), level)
        .with_default(LevelFilter::WARN);
    let on_terminal = io::stderr().is_terminal();
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let lines = fmt::layer().with_writer(io::stderr).with_target(false);
    let lines = match global.log_format {
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_span_list(false)
            .boxed(),
        LogFormat::Journald => match Journal::connect() {
            Ok(journal) => journal.boxed(),
            Err(error) => {
                eprintln!("cannot connect to the journal: {error}: logs are text on stderr");
                lines.with_ansi(false).boxed()
            }
        },
        LogFormat::Auto if journal::has_stderr() => match Journal::connect() {
            Ok(journal) => journal.boxed(),
            // a service that may not reach the socket still has its stderr there, which adds the time
            Err(_) => lines.without_time().with_ansi(false).boxed(),
        },
        LogFormat::Auto => lines.with_ansi(on_terminal && !no_color).boxed(),
        LogFormat::Text => lines.with_ansi(false).boxed(),
    };
    // fails only where a logger is installed already
    let _ = tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .try_init();
}

fn level(quiet: bool, verbose: u8) -> LevelFilter {
    match (quiet, verbose) {
        (true, _) => LevelFilter::WARN,
        (false, 0) => LevelFilter::INFO,
        (false, 1) => LevelFilter::DEBUG,
        (false, _) => LevelFilter::TRACE,
    }
}

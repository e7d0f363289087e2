//! One file per verb: the only place that knows the order of steps, and where errors become exit codes.
//!
//! Exit codes: 0 done, 1 it failed or a check found something, 2 usage or configuration.

mod ask;
mod check;
mod conns;
mod demo;
mod doctor;
mod edge_config;
mod explain;
mod files;
mod import;
mod leaving;
mod legacy;
mod link;
mod manual;
mod output;
mod own;
mod pathway;
mod probe;
mod release;
mod reload;
mod run;
mod status;
mod top;
mod units;
mod upgrade;

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::cli::{Cli, Command};
use crate::compat::OldName;
use crate::config::Diagnostics;
use crate::logging;

/// A failure that is the caller's to mend, in what was typed or configured: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Parses the command line, runs the verb, prints an error chain once on stderr.
pub fn main() -> ExitCode {
    let mut words = std::env::args_os();
    let argv0 = words.next().unwrap_or_default();
    let outcome = match OldName::of(&argv0) {
        Some(name) => legacy::run(name, argv0, words),
        None => {
            let cli = Cli::parse();
            logging::init(&cli.global);
            dispatch(cli)
        }
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            let configuration = error.chain().find_map(|cause| cause.downcast_ref());
            if let Some(mistakes) = configuration {
                say(&drawn(mistakes));
                return ExitCode::from(2);
            }
            say(&format!("error: {error:#}"));
            ExitCode::from(if error.is::<UsageError>() { 2 } else { 1 })
        }
    }
}

/// A line on stderr. Where nobody reads it (`2>&1 | head`), the exit code still tells.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Waits for a future where there is one, else for ever. As cancel-safe as the future.
async fn option<F: Future>(future: Option<F>) -> Option<F::Output> {
    match future {
        Some(future) => Some(future.await),
        None => std::future::pending().await,
    }
}

/// Mistakes or warnings as text for stderr: in colour on a terminal, unless `$NO_COLOR` is set
/// (<https://no-color.org>).
fn drawn(diagnostics: &Diagnostics) -> String {
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    diagnostics.draw(io::stderr().is_terminal() && !no_color)
}

fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    let Cli { global, command } = cli;
    match command {
        Command::Pathway(command) => pathway::run(&global, command),
        Command::Run(args) => run::run(&global, *args),
        Command::Reload(args) => reload::run(&global, &args),
        Command::Release(args) => release::run(&global, &args),
        Command::Upgrade(args) => upgrade::run(&global, &args),
        Command::Status(args) => status::run(&global, &args),
        Command::Conns(args) => conns::run(&global, args),
        Command::Top(args) => top::run(&global, &args),
        Command::Explain(args) => explain::run(&global, &args),
        Command::Check(args) => check::run(&global, &args),
        Command::Doctor(args) => doctor::run(&global, args),
        Command::Probe(args) => probe::run(&global, args),
        Command::EdgeConfig(args) => edge_config::run(&global, &args),
        Command::Import(args) => import::run(&global, &args),
        Command::Link(args) => link::run(&args),
        Command::Demo(args) => demo::run(&global, args),
        Command::Completions(args) => {
            // into memory first: the generator panics where stdout is closed or full
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "mmproxyctl", &mut script);
            output::results().write_all(&script)?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Man(args) => manual::run(&args),
    }
}

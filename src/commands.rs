//! One file per verb: the only place that knows the order of steps, and where errors become exit codes.
//!
//! Exit codes: 0 done, 1 it failed or a check found something, 2 usage or configuration.

mod check;
mod demo;
mod pathway;
mod probe;
mod run;

use std::io;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::cli::{Cli, Command};

/// A failure that is the caller's to mend, in what was typed or configured: exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// Parses the command line, runs the verb, prints an error chain once on stderr.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    match dispatch(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if error.is::<UsageError>() { 2 } else { 1 })
        }
    }
}

fn dispatch(cli: Cli) -> anyhow::Result<ExitCode> {
    let Cli { global, command } = cli;
    match command {
        Command::Pathway(command) => pathway::run(&global, command),
        Command::Run(args) => run::run(&global, args),
        Command::Check(args) => check::run(&global, &args),
        Command::Probe(args) => probe::run(&global, args),
        Command::Demo(args) => demo::run(&global, args),
        Command::Completions(args) => {
            clap_complete::generate(
                args.shell,
                &mut Cli::command(),
                "mmproxyctl",
                &mut io::stdout(),
            );
            Ok(ExitCode::SUCCESS)
        }
        Command::Man => {
            clap_mangen::Man::new(Cli::command()).render(&mut io::stdout())?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

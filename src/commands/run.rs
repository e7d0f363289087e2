//! `run`: relays in the foreground, from their lines in instances.tsv to a drained end.
//!
//! The process's own thread looks after the relays, answers the control socket and speaks with systemd;
//! connections live on the worker threads.
//!
//! In order: [`keeper`] (where asked for), [`handover`] (what the process before passes on), [`start`],
//! [`process`] (serve until told to stop), [`ending`].

mod diagnosis;
mod ending;
mod fleet;
mod handler;
mod handover;
mod keeper;
mod pathways;
mod plan;
mod process;
mod relay;
mod remedy;
mod signals;
mod standalone;
mod start;
mod view;

use std::process::ExitCode;

use anyhow::Context;

use self::handover::Inheritance;
use self::keeper::{Kept, Side};
use crate::cli::{Global, RunArgs};
use crate::config::Origin;
use crate::systemd;

/// Runs the verb.
pub(super) fn run(global: &Global, args: RunArgs) -> anyhow::Result<ExitCode> {
    let origin = standalone::origin(global, &args)?;
    run_from(global, args, origin, Patience::Retry)
}

/// What becomes of a process while one of its relays does not run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Patience {
    /// It is tried again and again.
    Retry,
    /// The process ends, with exit code 1: whoever runs it starts it again.
    GiveUp,
}

/// Runs the relays of any origin.
pub(super) fn run_from(
    global: &Global,
    args: RunArgs,
    origin: Origin,
    patience: Patience,
) -> anyhow::Result<ExitCode> {
    // before anything else: the process may not have threads yet
    let keeper = if args.keep_sessions {
        match keeper::part().context("cannot start the process that relays")? {
            Side::Keeper(code) => return Ok(code),
            Side::Kept(kept) => kept,
        }
    } else {
        Kept::by_nobody()
    };
    // before anything is opened: both come as numbers of descriptors
    let inheritance = handover::receive_all()?;
    let passed = systemd::passed().context("cannot take the sockets that systemd passed")?;
    let answer = inheritance.as_ref().map(Inheritance::answer).transpose()?;
    match start::start(
        global,
        args,
        (origin, patience),
        inheritance,
        passed,
        keeper,
    ) {
        Ok(Some(process)) => process.run(answer),
        Ok(None) => Ok(ExitCode::SUCCESS),
        Err(error) => {
            if let Some(answer) = answer {
                answer.failed(&format!("{error:#}"))?;
            }
            Err(error)
        }
    }
}

//! `upgrade`: has every running process of this host start the program anew and hand over to it.

use std::process::ExitCode;

use super::reload::{Asking, ask};
use crate::cli::{Global, UpgradeArgs};
use crate::control::messages::Request;

/// Runs the verb.
pub(super) fn run(global: &Global, args: &UpgradeArgs) -> anyhow::Result<ExitCode> {
    let how = Asking {
        request: Request::Upgrade {},
        of: &args.processes,
        json: args.json,
    };
    ask(global, &how, |answer| {
        vec![format!(
            "handed over, pid {} to {}; {} connections stay with the old process until they end",
            answer["from"], answer["to"], answer["draining"]
        )]
    })
}

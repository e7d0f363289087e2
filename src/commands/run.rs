//! `run`.

use std::process::ExitCode;

use crate::cli::{Global, RunArgs};

/// Runs the verb.
pub(super) fn run(_global: &Global, _args: RunArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}

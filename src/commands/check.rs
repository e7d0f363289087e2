//! `check`.

use std::process::ExitCode;

use crate::cli::{CheckArgs, Global};

/// Runs the verb.
pub(super) fn run(_global: &Global, _args: &CheckArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}

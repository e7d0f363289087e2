//! `probe`.

use std::process::ExitCode;

use crate::cli::{Global, ProbeArgs};

/// Runs the verb.
pub(super) fn run(_global: &Global, _args: ProbeArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}

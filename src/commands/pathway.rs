//! `pathway`.

use std::process::ExitCode;

use crate::cli::{Global, PathwayCommand};

/// Runs the verb.
pub(super) fn run(_global: &Global, _command: PathwayCommand) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}

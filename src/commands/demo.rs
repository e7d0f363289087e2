//! `demo`.

use std::process::ExitCode;

use crate::cli::{DemoArgs, Global};

/// Runs the verb.
pub(super) fn run(_global: &Global, _args: DemoArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not built yet")
}

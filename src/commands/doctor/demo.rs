//! `doctor --demo`.

use std::process::ExitCode;

pub(super) fn run(_faults: &[String]) -> anyhow::Result<ExitCode> {
    anyhow::bail!("not yet")
}

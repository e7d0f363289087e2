//! `release`: has running processes give up what they have for another one to come, and keep only what is open.

use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

use super::reload::{Asking, ask};
use crate::cli::{Global, ReleaseArgs};
use crate::control::messages::Request;

/// Runs the verb.
pub(super) fn run(global: &Global, args: &ReleaseArgs) -> anyhow::Result<ExitCode> {
    if let Some(unit) = &args.if_restarting
        && !is_restarting(unit)?
    {
        return Ok(ExitCode::SUCCESS);
    }
    let how = Asking {
        request: Request::Release {},
        of: &args.processes,
        json: args.json,
    };
    ask(global, &how, |answer| {
        vec![format!(
            "released by pid {}; {} connections stay with it until they end",
            answer["from"], answer["draining"]
        )]
    })
}

/// Whether systemd stops a unit in order to start it again. While it stops, that is told by its job only.
fn is_restarting(unit: &str) -> anyhow::Result<bool> {
    let output = Command::new("systemctl")
        .args(["list-jobs", "--plain", "--no-legend", "--no-pager"])
        .output()
        .context("cannot ask systemctl whether the unit is being restarted")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!("systemctl list-jobs failed: {}", said.trim());
    }
    Ok(restarts(&String::from_utf8_lossy(&output.stdout), unit))
}

/// A line is the job's number, its unit, its type, its state.
fn restarts(jobs: &str, unit: &str) -> bool {
    jobs.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next() == Some(unit) && words.next() == Some("restart")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_is_told_from_a_stop() {
        let jobs = "  7 mmproxy@a.service  restart running\n 12 mmproxy.service stop    running\n";
        assert!(restarts(jobs, "mmproxy@a.service"));
        assert!(!restarts(jobs, "mmproxy.service"));
        assert!(!restarts(jobs, "mmproxy@b.service"));
        assert!(!restarts("", "mmproxy.service"));
    }
}

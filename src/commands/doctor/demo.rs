//! `doctor --demo`: breaks a host in private namespaces, one fault after the other, and shows what the
//! doctor says, what mends it, and that it did.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail, ensure};

use super::super::UsageError;
use crate::demo::clinic::ills::Ill;
use crate::demo::clinic::{Clinic, ills};
use crate::demo::namespace::isolate;
use crate::doctor::Diagnosis;

/// Where the demonstration keeps its files: in a /run of its own.
const DIRECTORY: &str = "/run/demo";

/// Shows all faults, or those of these names.
pub(super) fn run(wanted: &[String]) -> anyhow::Result<ExitCode> {
    let ills = ills::all();
    for name in wanted {
        if ills.iter().all(|ill| ill.fault != name) {
            let mut known: Vec<&str> = ills.iter().map(|ill| ill.fault).collect();
            known.dedup();
            let known = known.join(", ");
            return Err(UsageError(format!("no fault '{name}' to show: there are {known}")).into());
        }
    }
    let program = std::env::current_exe().context("cannot find this program's file")?;
    isolate()?;
    let mut out = io::stdout().lock();
    let chosen = ills
        .into_iter()
        .filter(|ill| wanted.is_empty() || wanted.iter().any(|name| name == ill.fault));
    let (mut shown, mut skipped) = (0, 0);
    for (number, ill) in chosen.enumerate() {
        let directory = PathBuf::from(DIRECTORY).join(number.to_string());
        match show(&mut out, &ill, &directory, &program) {
            Ok(()) => shown += 1,
            // a program that is not installed, or a kernel that does not let a user do it
            Err(error) => {
                skipped += 1;
                writeln!(out, "  not shown: {error:#}\n")?;
            }
        }
    }
    writeln!(
        out,
        "Shown, named and mended: {shown}; not shown: {skipped}."
    )?;
    Ok(ExitCode::from(u8::from(skipped > 0)))
}

fn show(out: &mut impl Write, ill: &Ill, directory: &Path, program: &Path) -> anyhow::Result<()> {
    writeln!(out, "== {}", ill.what)?;
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    let mut clinic = Clinic::build(directory, program)?;
    clinic.fall_ill(ill)?;
    for line in ill
        .inject
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
    {
        writeln!(out, "  $ {line}")?;
    }
    let (healthy, found) = ask(&clinic, ill.under, ill.ask)?;
    ensure!(!healthy, "the doctor found nothing");
    let diagnosis = found
        .iter()
        .find(|one| one.fault.to_string() == ill.fault)
        .with_context(|| format!("the doctor does not say {}", ill.fault))?;
    super::diagnosis(out, diagnosis)?;
    let printed: Vec<_> = found
        .iter()
        .flat_map(|one| {
            one.fix
                .commands
                .iter()
                .map(|command| (one.fix.on, command.as_str()))
        })
        .collect();
    clinic.mend(ill, &printed)?;
    let (healthy, found) = ask(&clinic, "", ill.ask)?;
    if !healthy {
        let verdicts: Vec<_> = found.into_iter().map(|one| one.verdict).collect();
        bail!("still ill afterwards: {}", verdicts.join("; "));
    }
    writeln!(out, "  afterwards: healthy\n")?;
    Ok(())
}

/// The doctor's answer, from a process of its own as a person has it.
fn ask(clinic: &Clinic, under: &str, instances: &str) -> anyhow::Result<(bool, Vec<Diagnosis>)> {
    let output = clinic.output(&format!("{under} mmproxyctl doctor --json {instances}"))?;
    #[derive(serde::Deserialize)]
    struct Answer {
        healthy: bool,
        diagnoses: Vec<Diagnosis>,
    }
    let answer: Answer = serde_json::from_slice(&output.stdout).with_context(|| {
        format!(
            "the doctor failed: {}",
            String::from_utf8_lossy(&output.stderr)
        )
    })?;
    Ok((answer.healthy, answer.diagnoses))
}

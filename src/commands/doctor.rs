//! `doctor`: which instances, what their processes say, the examination, then what a person reads.

mod demo;
pub(super) mod patients;

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;

use super::output::{print_json, table, trimmed};
use super::{UsageError, drawn};
use crate::cli::{DoctorArgs, Global};
use crate::config::{self, Configuration};
use crate::doctor::evidence::{Entry, Instance, Outcome};
use crate::doctor::{self, Asked, Diagnosis, Examination, Severity};
use crate::model::Mark;
use crate::pathway::{self, Options};
use crate::resolve;
use crate::runtime_dir::RuntimeDir;

/// How long another run may hold the pathways' lock.
const LOCK_LIMIT: Duration = Duration::from_secs(30);

/// Runs the verb.
pub(super) fn run(global: &Global, args: DoctorArgs) -> anyhow::Result<ExitCode> {
    if args.demo {
        return demo::run(&args.instances);
    }
    let mut configuration = config::load(&global.config_dir)?;
    configuration.warn_of_own(super::own::look);
    if !configuration.warnings.is_empty() && !global.quiet {
        eprintln!("{}\n", drawn(&configuration.warnings));
    }
    let configuration = with_addresses(configuration)?;
    let asked = chosen(global, &configuration, &args.instances)?;
    let asker = patients::asker(global);
    let mut examination = doctor::examine(&asked, &asker).context("cannot examine")?;
    let mut fixed = Vec::new();
    if args.fix {
        fixed = fix(global, &asked, &examination.diagnoses)?;
        if !fixed.is_empty() {
            examination = doctor::examine(&asked, &asker).context("cannot examine again")?;
        }
    }
    if args.json {
        print_json(&Report {
            fixed: &fixed,
            examination: &examination,
        })?;
    } else {
        let mut out = io::stdout().lock();
        for mark in &fixed {
            writeln!(out, "fixed: pathway {mark} is in place\n")?;
        }
        show(&mut out, &examination)?;
    }
    Ok(ExitCode::from(u8::from(!examination.healthy)))
}

/// With the addresses that the names of targets have now.
fn with_addresses(configuration: Configuration) -> anyhow::Result<Configuration> {
    let named = configuration.instances.iter();
    let wanted: BTreeSet<_> = named.flat_map(|instance| instance.named.wanted()).collect();
    if wanted.is_empty() {
        return Ok(configuration);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let (answers, failing) = runtime.block_on(resolve::once(wanted));
    for ((name, family), why) in failing {
        eprintln!("warning: the target {name} has no {family} address: {why}");
    }
    Ok(configuration.with_answers(&answers))
}

#[derive(Serialize)]
struct Report<'r> {
    fixed: &'r [u32],
    #[serde(flatten)]
    examination: &'r Examination,
}

fn chosen(
    global: &Global,
    configuration: &Configuration,
    names: &[String],
) -> anyhow::Result<Vec<Asked>> {
    if configuration.instances.is_empty() {
        let directory = configuration.directory.display();
        return Err(UsageError(format!("no instance in {directory}/instances.tsv")).into());
    }
    for name in names {
        if configuration.instance(name).is_none() {
            let known = configuration.instances.iter();
            let known: Vec<&str> = known.map(|one| one.name.as_str()).collect();
            let file = configuration.directory.join("instances.tsv");
            return Err(UsageError(format!(
                "no instance '{name}' in {}: there are {}",
                file.display(),
                known.join(", ")
            ))
            .into());
        }
    }
    let wanted = configuration.instances.iter().filter(|instance| {
        names.is_empty() || names.iter().any(|name| name == instance.name.as_str())
    });
    let running = patients::running(&RuntimeDir::resolve(global.runtime_dir.clone()));
    Ok(wanted
        .filter_map(|instance| patients::asked(configuration, instance, &running))
        .collect())
}

/// Puts the pathways in place that a fault names, and says which.
fn fix(global: &Global, asked: &[Asked], diagnoses: &[Diagnosis]) -> anyhow::Result<Vec<u32>> {
    let mut marks: Vec<u32> = diagnoses.iter().filter_map(|one| one.fix.pathway).collect();
    marks.sort_unstable();
    marks.dedup();
    let wanted: Vec<_> = marks
        .iter()
        .filter_map(|mark| {
            asked
                .iter()
                .find(|one| Mark::new(*mark) == Some(one.pathway.mark))
        })
        .map(|one| one.pathway.clone())
        .collect();
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let options = Options {
        dry_run: false,
        firewall: global.firewall,
        runtime_dir: RuntimeDir::resolve(global.runtime_dir.clone()),
        set_sysctls: global.set_sysctls,
        lock_timeout: LOCK_LIMIT,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    runtime
        .block_on(pathway::add(&wanted, &options))
        .context("cannot put the pathways in place")?;
    Ok(marks)
}

/// The ways, then what is wrong with them.
fn show(out: &mut impl Write, examination: &Examination) -> io::Result<()> {
    let evidence = &examination.evidence;
    let mut rows = table([
        "INSTANCE",
        "PATHWAY",
        "TARGET",
        "PLAIN",
        "SPOOFED",
        "CONNTRACK",
    ]);
    for instance in &evidence.instances {
        for target in &instance.targets {
            rows.add_row([
                instance.name.clone(),
                instance.mark.to_string(),
                format!("{} {}", instance.protocol, target.address),
                probed(&target.plain, instance),
                probed(&target.spoofed, instance),
                tracked(&target.entry),
            ]);
        }
    }
    if !rows.is_empty() {
        writeln!(out, "{}\n", trimmed(&rows))?;
    }
    for one in &examination.diagnoses {
        diagnosis(out, one)?;
    }
    let faults = examination.diagnoses.iter();
    let faults = faults.filter(|one| one.severity == Severity::Fault).count();
    let what = match evidence.instances.len() {
        1 => "1 instance".to_owned(),
        many => format!("{many} instances"),
    };
    match faults {
        0 => writeln!(out, "healthy: {what}"),
        1 => writeln!(out, "1 fault, {what}"),
        many => writeln!(out, "{many} faults, {what}"),
    }
}

/// One verdict with its evidence and its fix.
pub(super) fn diagnosis(out: &mut impl Write, one: &Diagnosis) -> io::Result<()> {
    let severity = match one.severity {
        Severity::Fault => "FAULT",
        Severity::Note => "note",
    };
    writeln!(out, "{severity} {}: {}", one.fault, one.verdict)?;
    if !one.instances.is_empty() {
        writeln!(out, "  instances  {}", one.instances.join(", "))?;
    }
    for line in &one.evidence {
        writeln!(out, "  seen       {line}")?;
    }
    if let Some(host) = one.fix.on {
        writeln!(out, "  fix, on    {host}")?;
    }
    for command in &one.fix.commands {
        writeln!(out, "  fix        {command}")?;
    }
    if let Some(advice) = &one.fix.advice {
        writeln!(out, "  do         {advice}")?;
    }
    writeln!(out)
}

fn probed(outcome: &Outcome, instance: &Instance) -> String {
    match outcome {
        Outcome::Untried => "-".to_owned(),
        Outcome::Open(0) => "bound".to_owned(),
        Outcome::Open(micros) => format!("{}.{} ms", micros / 1000, micros % 1000 / 100),
        Outcome::Refused if instance.protocol == "udp" => "answered".to_owned(),
        Outcome::Refused => "refused".to_owned(),
        Outcome::Silent => "silent".to_owned(),
        Outcome::Failed(errno) => io::Error::from_raw_os_error(*errno).to_string(),
    }
}

fn tracked(entry: &Entry) -> String {
    match entry {
        Entry::Unknown => "?".to_owned(),
        Entry::Absent => "-".to_owned(),
        Entry::Seen { mark, state, .. } => format!("mark {mark} {state}").trim_end().to_owned(),
    }
}

//! `pathway …`: which pathways are meant, then the change or the question, then what a person reads.

mod list;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;

use super::UsageError;
use super::output::{print_json, results, table, trimmed};
use crate::cli::{Global, PathwayAllArgs, PathwayChangeArgs, PathwayCommand};
use crate::config::{self, PathwayFiles};
use crate::model::{Instance, Mark, Pathway};
use crate::pathway::piece::Step;
use crate::pathway::watch::repairs;
use crate::pathway::{self, Change, Finding, Goal, Options, Outcome, Report};
use crate::resolve;
use crate::runtime_dir::RuntimeDir;

/// How long another run may hold the lock. One run takes well under a second, and may wait five for
/// the lock of iptables.
const LOCK_LIMIT: Duration = Duration::from_secs(30);

/// Runs the verb.
pub(super) fn run(global: &Global, command: PathwayCommand) -> anyhow::Result<ExitCode> {
    let mut files = config::load_pathways(&global.config_dir)?;
    files.warn_of_own(super::own::look);
    if !files.warnings.is_empty() && !global.quiet {
        eprintln!("{}\n", super::drawn(&files.warnings));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start the runtime")?;
    let files = runtime.block_on(with_addresses(files, global.quiet));
    let change = |goal, targets: Option<Vec<String>>, how: PathwayAllArgs| {
        let pathways = match targets {
            Some(targets) => chosen(global, &files, &targets)?,
            None => configured(&files)?,
        };
        let options = Options {
            dry_run: how.dry_run,
            runtime_dir: RuntimeDir::resolve(global.runtime_dir.clone()),
            lock_timeout: LOCK_LIMIT,
            firewall: global.firewall,
            set_sysctls: global.set_sysctls,
        };
        let report = runtime.block_on(async {
            match goal {
                Goal::Add => pathway::add(&pathways, &options).await,
                Goal::Del => pathway::del(&pathways, &options).await,
            }
        });
        let report = report.with_context(|| match goal {
            Goal::Add => format!("cannot add {}", named(&pathways)),
            Goal::Del => format!("cannot delete {}", named(&pathways)),
        })?;
        show_change(global, goal, &pathways, &report, &how)?;
        if goal == Goal::Del && !how.dry_run && !global.quiet {
            list::warn_of_keepers(&pathways, &repairs::published(&options.runtime_dir)?);
        }
        Ok(ExitCode::SUCCESS)
    };
    match command {
        PathwayCommand::Watch(args) => watch::run(global, &files, &args, &runtime),
        PathwayCommand::Add(args) => change(Goal::Add, targets(&args), args.change),
        PathwayCommand::Del(args) => change(Goal::Del, targets(&args), args.change),
        PathwayCommand::AddAll(how) => change(Goal::Add, None, how),
        PathwayCommand::DelAll(how) => change(Goal::Del, None, how),
        PathwayCommand::List(args) => {
            let listed = runtime
                .block_on(pathway::list(&files.pathways, global.firewall))
                .context("cannot list the pathways")?;
            let runtime_dir = RuntimeDir::resolve(global.runtime_dir.clone());
            let kept = repairs::published(&runtime_dir)?;
            list::show(&listed, &kept, args.json)?;
            Ok(ExitCode::SUCCESS)
        }
        PathwayCommand::Check(args) => {
            let pathways = match args.targets.as_slice() {
                [] => configured(&files)?,
                targets => chosen(global, &files, targets)?,
            };
            let findings = runtime
                .block_on(pathway::check(&pathways, global.firewall))
                .with_context(|| format!("cannot check {}", named(&pathways)))?;
            show_check(&pathways, &findings, args.json)
        }
    }
}

/// Puts the addresses of targets that are names into the pathways. A name without one is said, and no failure:
/// a container that is not up yet must not keep the other services' roads away.
async fn with_addresses(files: PathwayFiles, quiet: bool) -> PathwayFiles {
    let named = files.instances.iter();
    let wanted: BTreeSet<_> = named.flat_map(|instance| instance.named.wanted()).collect();
    if wanted.is_empty() {
        return files;
    }
    let (answers, failing) = resolve::once(wanted).await;
    for ((name, family), why) in failing {
        if !quiet {
            eprintln!(
                "warning: the target {name} has no {family} address, and no pathway leads to it: {why}"
            );
        }
    }
    files.with_answers(&answers)
}

/// The typed targets, or `None` for `--all`.
fn targets(args: &PathwayChangeArgs) -> Option<Vec<String>> {
    (!args.all).then(|| args.targets.clone())
}

/// Every pathway of pathways.conf, which must have one.
fn configured(files: &PathwayFiles) -> anyhow::Result<Vec<Pathway>> {
    if files.pathways.is_empty() {
        let directory = files.directory.display();
        return Err(UsageError(format!("no pathway in {directory}/pathways.conf")).into());
    }
    Ok(files.pathways.clone())
}

/// The pathways of marks and names of instances, each once.
fn chosen(
    global: &Global,
    files: &PathwayFiles,
    targets: &[String],
) -> anyhow::Result<Vec<Pathway>> {
    let mut pathways = Vec::<Pathway>::new();
    for target in targets {
        // an instance may be called 123; the old scripts took digits for a mark, and so does this
        let mark = match (target.parse::<Mark>(), files.instance(target)) {
            (Ok(mark), _) => mark,
            (
                Err(_),
                Some(&Instance {
                    mark: Some(mark), ..
                }),
            ) => mark,
            (Err(error), _) if target.starts_with(|c: char| c.is_ascii_digit()) => {
                return Err(UsageError(error.to_string()).into());
            }
            (Err(_), _) => {
                let directory = files.directory.display();
                return Err(UsageError(format!(
                    "'{target}' is no mark, and no instance in {directory}/instances.tsv"
                ))
                .into());
            }
        };
        if pathways.iter().any(|pathway| pathway.mark == mark) {
            continue;
        }
        let Some(pathway) = files.pathway_or_defaults(mark) else {
            return Err(UsageError(format!(
                "mark {mark} is the number of a system table: put it in pathways.conf with table="
            ))
            .into());
        };
        if files.pathway(mark).is_none() {
            let clash = files
                .pathways
                .iter()
                .find(|other| other.table == pathway.table);
            if let Some(other) = clash {
                return Err(UsageError(format!(
                    "table {} is that of mark {} in pathways.conf: put mark {mark} there with table=",
                    pathway.table, other.mark
                ))
                .into());
            }
            if !global.quiet {
                eprintln!("note: mark {mark} is in no pathways.conf: taking the defaults");
            }
        }
        pathways.push(pathway);
    }
    Ok(pathways)
}

fn named(pathways: &[Pathway]) -> String {
    match pathways {
        [one] => format!("the pathway of mark {}", one.mark),
        many => format!("{} pathways", many.len()),
    }
}

/// What a pathway is called beside its mark.
fn label(pathway: &Pathway) -> &str {
    pathway.name.as_deref().unwrap_or("-")
}

#[derive(Serialize)]
struct ChangeJson<'r> {
    changed: bool,
    dry_run: bool,
    pathways: Vec<PathwayJson<'r>>,
    notes: &'r [String],
}

#[derive(Serialize)]
struct PathwayJson<'r> {
    mark: Mark,
    name: Option<&'r str>,
    changed: bool,
    changes: Vec<&'r Change>,
}

fn show_change(
    global: &Global,
    goal: Goal,
    pathways: &[Pathway],
    report: &Report,
    how: &PathwayAllArgs,
) -> anyhow::Result<()> {
    let mut by_mark = BTreeMap::<Mark, Vec<&Change>>::new();
    for change in &report.changes {
        by_mark.entry(change.mark).or_default().push(change);
    }
    if how.json {
        return print_json(&ChangeJson {
            changed: report.changed(),
            dry_run: how.dry_run,
            pathways: pathways
                .iter()
                .map(|pathway| {
                    let changes = by_mark.remove(&pathway.mark).unwrap_or_default();
                    PathwayJson {
                        mark: pathway.mark,
                        name: pathway.name.as_deref(),
                        changed: !changes.is_empty(),
                        changes,
                    }
                })
                .collect(),
            notes: &report.notes,
        });
    }
    if !global.quiet {
        for note in &report.notes {
            eprintln!("note: {note}");
        }
    }
    let mut out = results();
    if how.dry_run {
        for change in &report.changes {
            writeln!(out, "{}", change.command)?;
        }
        return Ok(());
    }
    let mut table = table(["MARK", "NAME", "RESULT", "WHAT"]);
    for pathway in pathways {
        let changes = by_mark.remove(&pathway.mark).unwrap_or_default();
        let row = |result: String, what: String| {
            vec![
                pathway.mark.to_string(),
                label(pathway).to_owned(),
                result,
                what,
            ]
        };
        if changes.is_empty() {
            let what = match goal {
                Goal::Add => "all in place",
                Goal::Del => "nothing there",
            };
            table.add_row(row("unchanged".to_owned(), what.to_owned()));
        }
        for outcome in changes
            .iter()
            .map(|change| change.outcome)
            .collect::<BTreeSet<_>>()
        {
            let of = changes.iter().filter(|change| change.outcome == outcome);
            table.add_row(row(outcome.to_string(), counted(outcome, of.copied())));
        }
    }
    writeln!(out, "{}", trimmed(&table))?;
    Ok(())
}

/// "3 rules, 2 routes, 6 CONNMARK lines, 1 TPROXY line", and where they came from.
fn counted<'c>(outcome: Outcome, changes: impl Iterator<Item = &'c Change>) -> String {
    let (mut rules, mut routes, mut lines, mut left) = (0, 0, 0, 0);
    let (mut intercepts, mut entries, mut sysctls, mut disorder) = (0, 0, 0, false);
    for change in changes {
        match change.command {
            Step::AddRule(_) | Step::DelRule(_) => rules += 1,
            Step::AddRoute(_) | Step::DelRoute(_) | Step::AdoptRoute { .. } => routes += 1,
            Step::InsertLine(ref line) | Step::DelLine(ref line) => match line.intercepts() {
                true => intercepts += 1,
                false => lines += 1,
            },
            Step::Entries(ref step) => {
                entries += step.entries.len();
                disorder |= step.entries.is_empty();
            }
            Step::TakeSwitch(_) | Step::LeaveSwitch(_) => sysctls += 1,
            // they come and go with the lines
            Step::DropChain { .. } | Step::DropTable { .. } => continue,
        }
        left += usize::from(change.leftover);
    }
    let counts = [
        (rules, "rule"),
        (routes, "route"),
        (lines, "CONNMARK line"),
        (intercepts, "TPROXY line"),
        (entries, "nftables entry"),
        (sysctls, "sysctl"),
    ];
    let mut text = counts
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| match (count, what.strip_suffix('y')) {
            (1, _) => format!("{count} {what}"),
            (_, Some(stem)) => format!("{count} {stem}ies"),
            _ => format!("{count} {what}s"),
        })
        .chain(disorder.then(|| "what is not ours in table inet mmproxy".to_owned()))
        .collect::<Vec<_>>()
        .join(", ");
    match (outcome, left) {
        (Outcome::Replaced | Outcome::Adopted, _) => text.push_str(" left by other scripts"),
        (_, 0) => {}
        (_, left) => text.push_str(&format!(" ({left} left by other scripts)")),
    }
    text
}

#[derive(Serialize)]
struct CheckJson<'f> {
    in_place: bool,
    findings: &'f [Finding],
}

fn show_check(pathways: &[Pathway], findings: &[Finding], json: bool) -> anyhow::Result<ExitCode> {
    let code = ExitCode::from(u8::from(!findings.is_empty()));
    if json {
        print_json(&CheckJson {
            in_place: findings.is_empty(),
            findings,
        })?;
        return Ok(code);
    }
    let mut out = results();
    for pathway in pathways {
        let mark = pathway.mark;
        let mut of = findings
            .iter()
            .filter(|finding| finding.mark == mark)
            .peekable();
        let Some(fix) = of.peek().map(|finding| finding.fix()) else {
            writeln!(out, "mark {mark}: in place")?;
            continue;
        };
        for finding in of {
            writeln!(out, "mark {mark}: {finding}")?;
        }
        writeln!(out, "mark {mark}: to mend it: {fix}")?;
    }
    Ok(code)
}

//! Pathways: the kernel's return roads, as rules, routes and CONNMARK lines.
//!
//! | file | owns |
//! |---|---|
//! | [`piece`] | one rule, route or line as a value, and as the command that makes it |
//! | [`plan`] | pure: what is wanted, and the ordered difference to what is there |
//! | [`netlink`] | rules and routes through rtnetlink |
//! | [`firewall`] | what gives replies their mark: the choice of a back end, and the back ends |
//! | [`leftovers`] | what the old programs' routing left, found by its shape |
//! | [`host`] | lock, read, diff, apply, read back, verify, undo |
//! | [`watch`] | keeping them: told of changes, reading again, repairing, counting |
//!
//! Must not know: connections, configuration files, how a report is shown.

pub mod firewall;
pub mod host;
pub mod leftovers;
pub mod netlink;
pub mod piece;
pub mod plan;
pub mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use crate::model::{Family, Mark, Pathway};

pub use firewall::Firewall;
pub use host::{Error, Options, Report};
pub use piece::PROTOCOL;
pub use plan::{Change, Goal, Outcome};

use piece::{FoundRoute, Step};
use plan::{Conflict, TableTaken};

/// Installs what is missing of these pathways, replaces what the old scripts left, removes what is stale.
///
/// Idempotent: with all in place it changes nothing. Established connections survive it. Runs on a
/// current-thread tokio runtime, in the network namespace of the calling thread.
///
/// # Errors
/// See [`Error`]; what the run had changed is taken back then, or named.
pub async fn add(wanted: &[Pathway], options: &Options) -> Result<Report, Error> {
    host::change(Goal::Add, wanted, options).await
}

/// Removes exactly what is ours of these pathways, and what the old scripts left of them.
///
/// # Errors
/// As [`add`].
pub async fn del(wanted: &[Pathway], options: &Options) -> Result<Report, Error> {
    host::change(Goal::Del, wanted, options).await
}

/// What is missing of these pathways; empty when all is in place.
///
/// # Errors
/// When the kernel cannot be read.
pub async fn check(wanted: &[Pathway], firewall: Firewall) -> Result<Vec<Finding>, Error> {
    let reading = host::read(wanted, firewall).await?;
    let plan = plan::plan(Goal::Add, wanted, &reading.facts, &reading.present);
    Ok(findings(plan, firewall))
}

fn findings(plan: plan::Plan, firewall: Firewall) -> Vec<Finding> {
    let conflicts = plan.conflicts.into_iter().map(|conflict| Finding {
        mark: conflict.mark(),
        firewall,
        problem: match conflict {
            Conflict::Table(taken) => Problem::TableTaken(taken),
            other => Problem::Conflict(other),
        },
    });
    let missing = plan
        .changes
        .into_iter()
        .filter(|change| change.outcome == Outcome::Added || change.command.is_disorder())
        .flat_map(|change| {
            change
                .command
                .pieces()
                .into_iter()
                .map(move |step| (change.mark, step))
        })
        .map(|(mark, step)| Finding {
            mark,
            firewall,
            problem: Problem::Missing(step),
        });
    conflicts.chain(missing).collect()
}

/// One thing that keeps a pathway from working.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The pathway.
    pub mark: Mark,
    /// The choice of a firewall that it was looked for with.
    pub firewall: Firewall,
    /// What it is.
    pub problem: Problem,
}

/// What can be wrong with a pathway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Problem {
    /// A piece is not there; the step that would make it.
    Missing(Step),
    /// Its table is another program's.
    TableTaken(TableTaken),
    /// What is wanted cannot be had.
    Conflict(Conflict),
}

impl Finding {
    /// Whether connections fail for it. Routers' ICMP is missed by those alone that meet a narrower link; pathways
    /// that an older version made are without until the next `add`.
    pub fn is_vital(&self) -> bool {
        !matches!(&self.problem, Problem::Missing(Step::AddRule(rule)) if rule.icmp)
    }

    /// The command that mends it.
    pub fn fix(&self) -> String {
        let mut fix = format!("mmproxyctl pathway add {}", self.mark);
        if self.firewall != Firewall::Auto {
            fix.push_str(&format!(" --firewall {}", self.firewall.name()));
        }
        if let Problem::Missing(Step::TakeSwitch(_)) = self.problem {
            fix.push_str(" --set-sysctls");
        }
        fix
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.problem {
            Problem::TableTaken(taken) => taken.fmt(f),
            Problem::Conflict(conflict) => conflict.fmt(f),
            Problem::Missing(step) => match step {
                Step::AddRule(rule) => write!(f, "{} rule missing: {rule}", rule.family),
                Step::AddRoute(route) => write!(f, "{} route missing: {route}", route.family),
                Step::InsertLine(line) => write!(
                    f,
                    "{} mangle {} rule missing: {}",
                    line.family,
                    line.chain.name(),
                    line.words
                ),
                Step::Entries(step) if step.entries.is_empty() => f.write_str(
                    "nftables table inet mmproxy: something in it is not ours, or not as it was made",
                ),
                Step::Entries(step) => {
                    let entries: Vec<_> = step.entries.iter().map(ToString::to_string).collect();
                    write!(f, "nftables entry missing: {}", entries.join("; "))
                }
                Step::TakeSwitch(_) => write!(f, "{}=1 missing", piece::SWITCH),
                other => write!(f, "not done: {other}"),
            },
        }
    }
}

impl Serialize for Finding {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        let mut finding = to.serialize_struct("Finding", 3)?;
        finding.serialize_field("mark", &self.mark)?;
        finding.serialize_field("problem", &self.to_string())?;
        finding.serialize_field("fix", &self.fix())?;
        finding.end()
    }
}

/// How much of a pathway the kernel holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// All of it, and nothing stale.
    InPlace,
    /// All of it, and something that the next `add` will replace or remove.
    Stale,
    /// Some of it.
    Partial,
    /// None of it.
    Absent,
    /// Ours, and no file names it.
    NotConfigured,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::InPlace => "in place",
            Self::Stale => "in place, with leftovers",
            Self::Partial => "incomplete",
            Self::Absent => "absent",
            Self::NotConfigured => "in no file",
        })
    }
}

/// One pathway: wanted against what the kernel has.
#[derive(Debug, Clone, Serialize)]
pub struct Listed {
    /// Its mark; unknown for rules and routes of ours that no marked rule explains.
    pub mark: Option<Mark>,
    /// Its name, where a file gives one.
    pub name: Option<String>,
    /// Its table; unknown where only CONNMARK lines are left.
    pub table: Option<u32>,
    /// How much is there.
    pub state: State,
    /// How many pieces it wants.
    pub wanted: usize,
    /// What is missing.
    pub missing: Vec<Finding>,
    /// What the next `add` replaces, adopts or removes, as commands.
    pub stale: Vec<String>,
}

/// Every pathway that is wanted, then every one of ours in the kernel that is not.
///
/// # Errors
/// When the kernel cannot be read.
pub async fn list(wanted: &[Pathway], firewall: Firewall) -> Result<Vec<Listed>, Error> {
    let reading = host::read(wanted, firewall).await?;
    let plan::Plan {
        changes, conflicts, ..
    } = plan::plan(Goal::Add, wanted, &reading.facts, &reading.present);
    let mut count = BTreeMap::<Mark, usize>::new();
    for mark in plan::Wanted::new(wanted, &reading.facts).marks(&reading.facts) {
        *count.entry(mark).or_default() += 1;
    }
    let mut missing = BTreeMap::<Mark, Vec<Finding>>::new();
    let mut stale = BTreeMap::<Mark, Vec<String>>::new();
    for change in &changes {
        if change.outcome != Outcome::Added && !change.command.is_disorder() {
            let commands = stale.entry(change.mark).or_default();
            commands.push(change.command.to_string());
        }
    }
    for finding in findings(
        plan::Plan {
            changes,
            conflicts,
            notes: Vec::new(),
        },
        firewall,
    ) {
        missing.entry(finding.mark).or_default().push(finding);
    }
    let mut listed: Vec<Listed> = wanted
        .iter()
        .map(|pathway| {
            let mark = pathway.mark;
            let missing = missing.remove(&mark).unwrap_or_default();
            let stale = stale.remove(&mark).unwrap_or_default();
            let wanted = count.get(&mark).copied().unwrap_or_default();
            Listed {
                mark: Some(mark),
                name: pathway.name.clone(),
                table: Some(pathway.table.get()),
                state: match (missing.len(), stale.is_empty()) {
                    (0, true) => State::InPlace,
                    (0, false) => State::Stale,
                    (some, _) if some < wanted => State::Partial,
                    _ => State::Absent,
                },
                wanted,
                missing,
                stale,
            }
        })
        .collect();
    listed.extend(not_configured(
        wanted,
        &reading.present,
        &host::our_routes().await?,
    ));
    Ok(listed)
}

/// What carries our tag and belongs to none of these pathways, by table, then by mark of the lines.
fn not_configured(
    wanted: &[Pathway],
    present: &plan::Present,
    routes: &[FoundRoute],
) -> Vec<Listed> {
    let known: BTreeSet<u32> = plan::tables(wanted, &present.rules)
        .into_values()
        .flatten()
        .collect();
    let mut marks: BTreeSet<u32> = wanted.iter().map(|pathway| pathway.mark.get()).collect();
    let mut tables = BTreeMap::<u32, Option<Mark>>::new();
    for rule in present.rules.iter().filter(|rule| rule.is_ours()) {
        if let Some(table) = rule.table().filter(|table| !known.contains(table)) {
            let mark = tables.entry(table).or_default();
            *mark = mark.or(rule.pathway_mark().and_then(Mark::new));
        }
    }
    for route in routes {
        let (FoundRoute::LocalDefault(piece::Route { table, .. })
        | FoundRoute::Other { table, .. }) = route;
        if !known.contains(table) {
            tables.entry(*table).or_default();
        }
    }
    let entry = |mark: Option<Mark>, table| Listed {
        mark,
        name: None,
        table,
        state: State::NotConfigured,
        wanted: 0,
        missing: Vec::new(),
        stale: Vec::new(),
    };
    let mut listed = Vec::new();
    for (table, mark) in tables {
        marks.extend(mark.map(Mark::get));
        listed.push(entry(mark, Some(table)));
    }
    for tag in present.firewall.marks() {
        if !marks.contains(&tag) {
            listed.push(entry(Mark::new(tag), None));
        }
    }
    listed
}

impl Report {
    /// Whether the kernel was, or would be, changed.
    pub fn changed(&self) -> bool {
        !self.changes.is_empty()
    }

    /// Marks of the pathways that something changed for.
    pub fn changed_marks(&self) -> BTreeSet<Mark> {
        self.changes.iter().map(|change| change.mark).collect()
    }
}

impl Step {
    /// The family of the piece; none where it serves both.
    pub fn family(&self) -> Option<Family> {
        Some(match self {
            Self::AddRule(rule) | Self::DelRule(rule) => rule.family,
            Self::AddRoute(route) | Self::DelRoute(route) | Self::AdoptRoute { route, .. } => {
                route.family
            }
            Self::InsertLine(line) | Self::DelLine(line) => line.family,
            Self::DropChain { family, .. } | Self::DropTable { family } => *family,
            Self::Entries(_) | Self::TakeSwitch(_) | Self::LeaveSwitch(_) => return None,
        })
    }

    /// Whether it does nothing but put a table of ours in order.
    pub fn is_disorder(&self) -> bool {
        matches!(self, Self::Entries(step) if step.entries.is_empty())
    }

    /// One step for each piece, where it is about several.
    fn pieces(self) -> Vec<Self> {
        match self {
            Self::Entries(step) if step.entries.len() > 1 => step
                .entries
                .iter()
                .map(|entry| {
                    Self::Entries(piece::EntriesStep {
                        entries: vec![*entry],
                        ..step.clone()
                    })
                })
                .collect(),
            other => vec![other],
        }
    }
}

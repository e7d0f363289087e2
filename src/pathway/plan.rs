//! From what is wanted and what is there to what must change. Pure: reads nothing, changes nothing.
//!
//! `ROUTING.md`'s scheme as values: [`Wanted::new`] lists every rule, route and CONNMARK line of a
//! set of pathways, [`plan`] compares them with the kernel's and orders the difference so that at no
//! moment less than before is in place (make before break).

mod conflict;
mod differ;
mod wanted;
mod without;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::Serialize;

use crate::model::{Mark, Pathway};

use super::firewall::{self, Switch};
use super::piece::{FoundRoute, Route, Rule, Step, UNTAGGED};
pub use conflict::{Conflict, TableTaken};
use differ::{Differ, index};
pub use wanted::{Facts, UNROUTED_PRIORITY, Wanted, needs_switch, wants_lines};

/// What the kernel holds, as far as it concerns the pathways in question.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Present {
    /// Rules of both families that [`Rule`] can express.
    pub rules: BTreeSet<Rule>,
    /// Tables that any other rule looks up.
    pub other_lookups: BTreeSet<u32>,
    /// Routes of the tables of [`tables`].
    pub routes: Vec<FoundRoute>,
    /// What the firewall's back ends hold.
    pub firewall: firewall::Found,
    /// Where `tcp_fwmark_accept` stands.
    pub switch: Switch,
}

/// What is to be done with the pathways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Everything wanted is there, nothing stale.
    Add,
    /// Nothing of theirs is there.
    Del,
}

/// What a change means to a person.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It was missing.
    Added,
    /// It was of the old scripts, did the same, and has a successor that is ours.
    Replaced,
    /// It was of the old scripts and is now ours, as it stands.
    Adopted,
    /// It was ours, or of the old scripts, and is no longer wanted.
    Removed,
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Added => "added",
            Self::Replaced => "replaced",
            Self::Adopted => "adopted",
            Self::Removed => "removed",
        })
    }
}

/// One change and whose it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    /// The pathway.
    pub mark: Mark,
    /// What it means.
    pub outcome: Outcome,
    /// Whether what goes was left by the old scripts.
    pub leftover: bool,
    /// What is done, as the equivalent command.
    pub command: Step,
}

/// The way from what is there to what is wanted, in the order to go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Changes, make before break.
    pub changes: Vec<Change>,
    /// What forbids them.
    pub conflicts: Vec<Conflict>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// The tables that belong to each of the pathways: the wanted one, and any that marked rules of ours
/// look up (the table was another when they were added). A table that our marked rules use for
/// another mark is that mark's.
pub fn tables(pathways: &[Pathway], rules: &BTreeSet<Rule>) -> BTreeMap<Mark, BTreeSet<u32>> {
    let mut by_mark = BTreeMap::<u32, BTreeSet<u32>>::new();
    let mut by_table = BTreeMap::<u32, BTreeSet<u32>>::new();
    // the mark of rules with a destination is no pathway's
    let of_pathways = |rule: &&Rule| rule.is_ours() && rule.to.is_none();
    for rule in rules.iter().filter(of_pathways) {
        if let (Some((mark, _)), Some(table)) = (rule.mark, rule.table()) {
            by_mark.entry(mark).or_default().insert(table);
            by_table.entry(table).or_default().insert(mark);
        }
    }
    pathways
        .iter()
        .map(|pathway| {
            let mark = pathway.mark.get();
            let mut tables = by_mark.remove(&mark).unwrap_or_default();
            tables.insert(pathway.table.get());
            tables.retain(|table| {
                by_table
                    .get(table)
                    .is_none_or(|marks| marks.iter().all(|user| *user == mark))
            });
            (pathway.mark, tables)
        })
        .collect()
}

/// The tables whose routes must be read before planning: those of [`tables`], and where the scripts'
/// rules still stand, the one named like the mark.
pub fn tables_to_read(pathways: &[Pathway], rules: &BTreeSet<Rule>) -> BTreeSet<u32> {
    let by_mark = index(rules, Rule::pathway_mark);
    let scripts = pathways.iter().filter_map(|pathway| {
        let mark = pathway.mark.get();
        by_mark
            .get(&mark)?
            .iter()
            .any(|rule| rule.table() == Some(mark) && UNTAGGED.contains(&rule.protocol))
            .then_some(mark)
    });
    let owned = tables(pathways, rules).into_values().flatten();
    owned.chain(scripts).collect()
}

/// What must change so that the kernel holds what the goal says of these pathways.
pub fn plan(goal: Goal, pathways: &[Pathway], facts: &Facts, present: &Present) -> Plan {
    let wanted = match goal {
        Goal::Add => Wanted::new(pathways, facts),
        Goal::Del => Wanted::default(),
    };
    let mut differ = Differ {
        goal,
        facts,
        present,
        wanted: &wanted,
        tables: tables(pathways, &present.rules),
        by_table: index(&present.rules, Rule::table),
        by_mark: index(&present.rules, Rule::pathway_mark),
        destination: pathways
            .iter()
            .map(|pathway| (pathway.mark, pathway.table.get()))
            .collect(),
        routes: BTreeMap::new(),
        stale: Vec::new(),
        plan: Plan::default(),
    };
    for route in &present.routes {
        let (FoundRoute::LocalDefault(Route { table, .. }) | FoundRoute::Other { table, .. }) =
            route;
        differ.routes.entry(*table).or_default().push(route);
    }
    for pathway in pathways {
        differ.make_routes(pathway);
    }
    for (rule, mark) in &wanted.rules {
        if !present.rules.contains(rule) {
            differ.make(*mark, Outcome::Added, Step::AddRule(*rule));
        }
    }
    differ
        .plan
        .conflicts
        .extend(conflict::with_firewall(goal, pathways, facts, present));
    let (take, leave) = match without::switch(goal, pathways, facts, present) {
        Ok(changes) => changes
            .into_iter()
            .partition(|change| change.outcome == Outcome::Added),
        Err(conflict) => {
            differ.plan.conflicts.push(conflict);
            (Vec::new(), Vec::new())
        }
    };
    differ.plan.notes.extend(without::notes(&take));
    differ.plan.notes.extend(without::notes(&leave));
    differ.plan.changes.extend(take);
    let lines = firewall::changes(goal, pathways, facts.backend, &wanted, &present.firewall);
    differ.plan.changes.extend(lines);
    differ.plan.changes.extend(leave);
    for pathway in pathways {
        let rules = differ.stale_rules(pathway);
        differ.stale_routes(pathway, &rules);
    }
    let Differ {
        mut plan,
        mut stale,
        ..
    } = differ;
    // The marked rules go last: they are what says which table is the pathway's, so a run that is
    // killed here leaves nothing that the next one cannot attribute. A rule that finds its table
    // empty hands on to the next, which by now is the new one.
    let place = |change: &Change| match &change.command {
        Step::DelRule(rule) if rule.pathway_mark().is_none() => 0,
        Step::DelRoute(_) => 1,
        _ => 2,
    };
    stale.sort_by_key(place);
    plan.changes.extend(stale);
    plan
}

#[cfg(test)]
mod tests;

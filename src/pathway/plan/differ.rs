//! Rules and routes: the difference between what is wanted and what is there. Pure.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{Family, Mark, Pathway};
use crate::pathway::piece::{FoundRoute, Leads, PROTOCOL, Route, Rule, Step, UNTAGGED};

use super::wanted::{marked, wanted_rules};
use super::{Change, Conflict, Facts, Goal, Outcome, Plan, Present, TableTaken, Wanted};

pub(super) fn index(
    rules: &BTreeSet<Rule>,
    key: impl Fn(&Rule) -> Option<u32>,
) -> BTreeMap<u32, Vec<Rule>> {
    let mut index = BTreeMap::<_, Vec<_>>::new();
    for rule in rules {
        if let Some(key) = key(rule) {
            index.entry(key).or_default().push(*rule);
        }
    }
    index
}

fn taken(pathway: &Pathway, why: String) -> Conflict {
    let (mark, table) = (pathway.mark, pathway.table.get());
    Conflict::Table(TableTaken { mark, table, why })
}

/// The comparison while it goes on. Indexed by table and mark, so that it stays linear in the pathways.
pub(super) struct Differ<'a> {
    pub(super) goal: Goal,
    pub(super) facts: &'a Facts,
    pub(super) present: &'a Present,
    pub(super) wanted: &'a Wanted,
    pub(super) tables: BTreeMap<Mark, BTreeSet<u32>>,
    pub(super) by_table: BTreeMap<u32, Vec<Rule>>,
    pub(super) by_mark: BTreeMap<u32, Vec<Rule>>,
    /// Where each pathway will be.
    pub(super) destination: BTreeMap<Mark, u32>,
    pub(super) routes: BTreeMap<u32, Vec<&'a FoundRoute>>,
    pub(super) stale: Vec<Change>,
    pub(super) plan: Plan,
}

impl Differ<'_> {
    pub(super) fn make(&mut self, mark: Mark, outcome: Outcome, command: Step) {
        self.plan.changes.push(Change {
            mark,
            outcome,
            leftover: outcome == Outcome::Adopted,
            command,
        });
    }

    /// The mark of a pathway of ours that has this table and is not about to leave it.
    fn tenant(&self, pathway: &Pathway) -> Option<u32> {
        let table = pathway.table.get();
        let rules = self.by_table.get(&table)?.iter();
        let mut marks = rules
            .filter(|rule| rule.is_ours())
            .filter_map(Rule::pathway_mark);
        marks.find(|&mark| {
            mark != pathway.mark.get()
                && Mark::new(mark)
                    .and_then(|mark| self.destination.get(&mark))
                    .is_none_or(|wanted| *wanted == table)
        })
    }

    pub(super) fn make_routes(&mut self, pathway: &Pathway) {
        let table = pathway.table.get();
        if let (Goal::Add, Some(tenant)) = (self.goal, self.tenant(pathway)) {
            let why = format!("is the table of mark {tenant}");
            self.plan.conflicts.push(taken(pathway, why));
        }
        for &family in &self.facts.families {
            let route = Route {
                family,
                table,
                protocol: PROTOCOL,
            };
            if !self.wanted.routes.contains_key(&route) {
                continue;
            }
            let mut there = None;
            let user = self.other_user(pathway, family);
            for found in self.routes.get(&table).into_iter().flatten() {
                let foreign = match found {
                    FoundRoute::LocalDefault(found) if found.family != family => continue,
                    FoundRoute::Other { family: other, .. } if *other != family => continue,
                    FoundRoute::LocalDefault(found)
                        if found.is_ours()
                            || (UNTAGGED.contains(&found.protocol) && user.is_none()) =>
                    {
                        there = Some(found.protocol);
                        continue;
                    }
                    FoundRoute::LocalDefault(found) => match &user {
                        Some(rule) => format!("{found}, used by {rule}"),
                        None => found.to_string(),
                    },
                    FoundRoute::Other { text, .. } => text.clone(),
                };
                let why = format!("holds another program's {family} route ({foreign})");
                self.plan.conflicts.push(taken(pathway, why));
            }
            match there {
                Some(PROTOCOL) => {}
                Some(from) => self.make(
                    pathway.mark,
                    Outcome::Adopted,
                    Step::AdoptRoute { route, from },
                ),
                None => self.make(pathway.mark, Outcome::Added, Step::AddRoute(route)),
            }
        }
    }

    /// A rule of another program that uses the pathway's table. An untagged route there is that
    /// program's (TPROXY set-ups have the very same one), not what the scripts left.
    fn other_user(&self, pathway: &Pathway, family: Family) -> Option<String> {
        let table = pathway.table.get();
        let shapes = self.shapes(pathway);
        let rules = self.by_table.get(&table).into_iter().flatten();
        let mut others = rules.filter(|rule| {
            let leftover = || {
                UNTAGGED.contains(&rule.protocol) && shapes.iter().any(|shape| rule.means(shape))
            };
            rule.family == family && !rule.is_ours() && !leftover()
        });
        let inexpressible = || {
            let used = self.present.other_lookups.contains(&table);
            used.then(|| "another rule".to_owned())
        };
        others
            .next()
            .map(|rule| format!("the rule {rule}"))
            .or_else(inexpressible)
    }

    fn unmake(&mut self, mark: Mark, leftover: bool, command: Step) {
        self.stale.push(Change {
            mark,
            outcome: match self.goal {
                Goal::Add if leftover => Outcome::Replaced,
                _ => Outcome::Removed,
            },
            leftover,
            command,
        });
    }

    /// Rules of the pathway that are not wanted: ours by tag, the scripts' by meaning.
    pub(super) fn stale_rules(&mut self, pathway: &Pathway) -> BTreeSet<Rule> {
        let marked = self.by_mark.get(&pathway.mark.get()).into_iter().flatten();
        let unmarked = self.tables[&pathway.mark]
            .iter()
            .filter_map(|table| self.by_table.get(table))
            .flatten()
            .filter(|rule| rule.pathway_mark().is_none());
        let shapes = self.shapes(pathway);
        let (mut stale, mut notes) = (BTreeMap::new(), Vec::new());
        for rule in marked.chain(unmarked) {
            let leftover =
                UNTAGGED.contains(&rule.protocol) && shapes.iter().any(|shape| rule.means(shape));
            if !rule.is_ours() && !leftover {
                notes.extend(self.foreign(pathway, rule));
            } else if !self.wanted.rules.contains_key(rule) {
                stale.insert(*rule, leftover);
            }
        }
        self.plan.notes.extend(notes);
        for (rule, leftover) in &stale {
            self.unmake(pathway.mark, *leftover, Step::DelRule(*rule));
        }
        stale.into_keys().collect()
    }

    /// What a rule of another program does to this pathway.
    fn foreign(&self, pathway: &Pathway, rule: &Rule) -> Option<String> {
        let (mark, priority) = (pathway.mark, pathway.priority.get());
        (self.goal == Goal::Add
            && !rule.is_ours()
            && rule.mark.is_some()
            && rule.table() != Some(pathway.table.get())
            && rule.priority <= priority)
            .then(|| {
                format!(
                    "another program's {} rule comes before those of mark {mark}: {rule}",
                    rule.family
                )
            })
    }

    /// What a rule of the scripts, or one typed by hand, must mean to count as left over.
    fn shapes(&self, pathway: &Pathway) -> Vec<Rule> {
        let scripts = Family::BOTH.map(|family| Rule {
            leads: Leads::Table(pathway.mark.get()),
            ..marked(pathway, family)
        });
        let wanted = Family::BOTH
            .into_iter()
            .flat_map(|family| wanted_rules(pathway, family, self.facts));
        wanted.chain(scripts).collect()
    }

    /// Routes of the pathway that are not wanted; `leaving` are the rules that go before them.
    pub(super) fn stale_routes(&mut self, pathway: &Pathway, leaving: &BTreeSet<Rule>) {
        let owned = &self.tables[&pathway.mark];
        // the scripts name the table like the mark
        let mut tables = owned.clone();
        tables.insert(pathway.mark.get());
        let mut stale = Vec::new();
        for table in tables {
            let used_by_others = |family: Family| {
                self.present.other_lookups.contains(&table)
                    || self
                        .by_table
                        .get(&table)
                        .into_iter()
                        .flatten()
                        .any(|rule| rule.family == family && !leaving.contains(rule))
            };
            for found in self.routes.get(&table).into_iter().flatten() {
                let FoundRoute::LocalDefault(route) = found else {
                    continue;
                };
                let wanted = self.wanted.routes.contains_key(&Route {
                    protocol: PROTOCOL,
                    ..*route
                });
                let leftover = UNTAGGED.contains(&route.protocol) && !used_by_others(route.family);
                if !wanted && (leftover || route.is_ours() && owned.contains(&table)) {
                    stale.push((*route, leftover));
                }
            }
        }
        for (route, leftover) in stale {
            self.unmake(pathway.mark, leftover, Step::DelRoute(route));
        }
    }
}

//! From what is wanted and what is there to what must change. Pure: reads nothing, changes nothing.
//!
//! `ROUTING.md`'s scheme as values: [`Wanted::new`] lists every rule, route and CONNMARK line of a
//! set of pathways, [`plan`] compares them with the kernel's and orders the difference so that at no
//! moment less than before is in place (make before break).

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use serde::Serialize;

use crate::model::{ConnmarkMode, Family, Mark, Pathway};

use super::firewall::Ruleset;
use super::lines;
use super::piece::{Chain, FoundRoute, Job, Line, PROTOCOL, Route, Rule, Step, UNTAGGED, loopback};

/// Where a rule stands that shall answer only when the main table (32766) has no route.
pub const UNROUTED_PRIORITY: u32 = 40_000;

/// What of the host decides how the scheme looks.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Facts {
    /// The families that this host serves.
    pub families: Vec<Family>,
    /// Whether packets from 127.0.0.0/8 may leave where clients are reached (`route_localnet`).
    pub route_localnet: bool,
    /// The families with a route to addresses anywhere.
    pub default_route: Vec<Family>,
    /// Target addresses that are this host's own.
    pub own: BTreeSet<IpAddr>,
}

/// Every piece that a set of pathways wants, by the mark that wants it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Rules.
    pub rules: BTreeMap<Rule, Mark>,
    /// Routes.
    pub routes: BTreeMap<Route, Mark>,
    /// CONNMARK lines, saves before restores.
    pub lines: BTreeSet<Line>,
}

impl Wanted {
    /// The scheme for these pathways on a host like this.
    pub fn new(pathways: &[Pathway], facts: &Facts) -> Self {
        let mut wanted = Self::default();
        for pathway in pathways {
            for &family in &facts.families {
                let rules = wanted_rules(pathway, family, facts);
                wanted
                    .rules
                    .extend(rules.into_iter().map(|rule| (rule, pathway.mark)));
                let route = Route {
                    family,
                    table: pathway.table.get(),
                    protocol: PROTOCOL,
                };
                wanted.routes.insert(route, pathway.mark);
                if wants_lines(pathway, facts) {
                    wanted.lines.extend(
                        [
                            (Chain::Output, Job::Save),
                            (Chain::Output, Job::Restore),
                            (Chain::Prerouting, Job::Restore),
                        ]
                        .map(|(chain, job)| Line {
                            family,
                            chain,
                            job,
                            mark: pathway.mark,
                            mask: pathway.mask,
                        }),
                    );
                }
            }
        }
        wanted
    }
}

/// Whether CONNMARK lines are wanted. With `route_localnet` on, a loopback target has no unmarked rule
/// to rely on, so `auto` cannot leave them out.
pub fn wants_lines(pathway: &Pathway, facts: &Facts) -> bool {
    pathway.wants_connmark() || (pathway.connmark == ConnmarkMode::Auto && facts.route_localnet)
}

fn marked(pathway: &Pathway, family: Family) -> Rule {
    Rule {
        family,
        priority: pathway.priority.get(),
        source: loopback(family),
        mark: Some((pathway.mark.get(), pathway.mask.get())),
        iif_lo: true,
        table: pathway.table.get(),
        protocol: PROTOCOL,
    }
}

fn wanted_rules(pathway: &Pathway, family: Family, facts: &Facts) -> Vec<Rule> {
    let marked = marked(pathway, family);
    let mut rules = vec![marked];
    // A reply is routed once before it has its mark. From 127.0.0.1 to an outside client that look-up
    // fails unless route_localnet is on, so the unmarked rule answers it. Where it is on, the rule
    // would catch replies to clients that were DNATed to 127.0.0.1; there the main table answers, and
    // the rule is needed only behind it, for a host without a default route.
    let relies_on_main =
        family == Family::V4 && facts.route_localnet && wants_lines(pathway, facts);
    let unmarked = if !relies_on_main {
        Some(pathway.priority.unmarked())
    } else if !facts.default_route.contains(&family) {
        Some(UNROUTED_PRIORITY)
    } else {
        None
    };
    rules.extend(unmarked.map(|priority| Rule {
        priority,
        mark: None,
        ..marked
    }));
    for &source in &pathway.targets {
        if Family::of(source.addr()) != family {
            continue;
        }
        // no `iif`: a container's reply comes in on its bridge. Never without `from`: the relay's own
        // packets carry the mark too, with the client as source.
        let rule = Rule {
            source,
            iif_lo: false,
            ..marked
        };
        rules.push(rule);
        let own =
            source.prefix_len() == source.max_prefix_len() && facts.own.contains(&source.addr());
        if own && !facts.default_route.contains(&family) {
            rules.push(Rule {
                priority: UNROUTED_PRIORITY,
                mark: None,
                ..rule
            });
        }
    }
    rules
}

/// What the kernel holds, as far as it concerns the pathways in question.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Present {
    /// Rules of both families that [`Rule`] can express.
    pub rules: BTreeSet<Rule>,
    /// Tables that any other rule looks up.
    pub other_lookups: BTreeSet<u32>,
    /// Routes of the tables of [`tables`].
    pub routes: Vec<FoundRoute>,
    /// Mangle tables; the first of a family is the one that lines are added to.
    pub firewall: Vec<Ruleset>,
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

/// A table that a pathway cannot have: every look-up of the pathway could meet the other's route first,
/// and taking the table over could break its owner.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "table {table} is not free for mark {mark}: it {why}; give the pathway another with table="
)]
pub struct TableTaken {
    /// The pathway.
    pub mark: Mark,
    /// Its table.
    pub table: u32,
    /// Whose it is, as the end of "it …".
    pub why: String,
}

/// The way from what is there to what is wanted, in the order to go.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Plan {
    /// Changes, make before break.
    pub changes: Vec<Change>,
    /// What forbids them.
    pub conflicts: Vec<TableTaken>,
    /// What a person should know.
    pub notes: Vec<String>,
}

/// The tables that belong to each of the pathways: the wanted one, and any that marked rules of ours
/// look up (the table was another when they were added). A table that our marked rules use for
/// another mark is that mark's.
pub fn tables(pathways: &[Pathway], rules: &BTreeSet<Rule>) -> BTreeMap<Mark, BTreeSet<u32>> {
    let mut by_mark = BTreeMap::<u32, BTreeSet<u32>>::new();
    let mut by_table = BTreeMap::<u32, BTreeSet<u32>>::new();
    for rule in rules.iter().filter(|rule| rule.is_ours()) {
        if let Some((mark, _)) = rule.mark {
            by_mark.entry(mark).or_default().insert(rule.table);
            by_table.entry(rule.table).or_default().insert(mark);
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
    let by_mark = index(rules, |rule| rule.mark.map(|(mark, _)| mark));
    let scripts = pathways.iter().filter_map(|pathway| {
        let mark = pathway.mark.get();
        by_mark
            .get(&mark)?
            .iter()
            .any(|rule| rule.table == mark && UNTAGGED.contains(&rule.protocol))
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
        by_table: index(&present.rules, |rule| Some(rule.table)),
        by_mark: index(&present.rules, |rule| rule.mark.map(|(mark, _)| mark)),
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
    let lines = lines::changes(goal, pathways, &wanted.lines, &present.firewall);
    differ.plan.changes.extend(lines);
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
        Step::DelRule(rule) if rule.mark.is_none() => 0,
        Step::DelRoute(_) => 1,
        _ => 2,
    };
    stale.sort_by_key(place);
    plan.changes.extend(stale);
    plan
}

fn index(rules: &BTreeSet<Rule>, key: impl Fn(&Rule) -> Option<u32>) -> BTreeMap<u32, Vec<Rule>> {
    let mut index = BTreeMap::<_, Vec<_>>::new();
    for rule in rules {
        if let Some(key) = key(rule) {
            index.entry(key).or_default().push(*rule);
        }
    }
    index
}

/// The comparison while it goes on. Indexed by table and mark, so that it stays linear in the pathways.
struct Differ<'a> {
    goal: Goal,
    facts: &'a Facts,
    present: &'a Present,
    wanted: &'a Wanted,
    tables: BTreeMap<Mark, BTreeSet<u32>>,
    by_table: BTreeMap<u32, Vec<Rule>>,
    by_mark: BTreeMap<u32, Vec<Rule>>,
    /// Where each pathway will be.
    destination: BTreeMap<Mark, u32>,
    routes: BTreeMap<u32, Vec<&'a FoundRoute>>,
    stale: Vec<Change>,
    plan: Plan,
}

impl Differ<'_> {
    fn make(&mut self, mark: Mark, outcome: Outcome, command: Step) {
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
            .filter_map(|rule| Some(rule.mark?.0));
        marks.find(|&mark| {
            mark != pathway.mark.get()
                && Mark::new(mark)
                    .and_then(|mark| self.destination.get(&mark))
                    .is_none_or(|wanted| *wanted == table)
        })
    }

    fn make_routes(&mut self, pathway: &Pathway) {
        let table = pathway.table.get();
        if let (Goal::Add, Some(tenant)) = (self.goal, self.tenant(pathway)) {
            self.plan.conflicts.push(TableTaken {
                mark: pathway.mark,
                table,
                why: format!("is the table of mark {tenant}"),
            });
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
                self.plan.conflicts.push(TableTaken {
                    mark: pathway.mark,
                    table,
                    why: format!("holds another program's {family} route ({foreign})"),
                });
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
    fn stale_rules(&mut self, pathway: &Pathway) -> BTreeSet<Rule> {
        let marked = self.by_mark.get(&pathway.mark.get()).into_iter().flatten();
        let unmarked = self.tables[&pathway.mark]
            .iter()
            .filter_map(|table| self.by_table.get(table))
            .flatten()
            .filter(|rule| rule.mark.is_none());
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
            && rule.table != pathway.table.get()
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
            table: pathway.mark.get(),
            ..marked(pathway, family)
        });
        let wanted = Family::BOTH
            .into_iter()
            .flat_map(|family| wanted_rules(pathway, family, self.facts));
        wanted.chain(scripts).collect()
    }

    /// Routes of the pathway that are not wanted; `leaving` are the rules that go before them.
    fn stale_routes(&mut self, pathway: &Pathway, leaving: &BTreeSet<Rule>) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::TableId;

    fn facts() -> Facts {
        Facts {
            families: Family::BOTH.to_vec(),
            route_localnet: false,
            default_route: Family::BOTH.to_vec(),
            own: BTreeSet::new(),
        }
    }

    fn pathway(mark: u32) -> Pathway {
        Pathway::with_defaults(Mark::new(mark).unwrap()).unwrap()
    }

    /// The kernel after these changes, as far as rules and routes go.
    fn after(present: &Present, plan: &Plan) -> Present {
        let mut present = present.clone();
        for change in &plan.changes {
            match &change.command {
                Step::AddRule(rule) => assert!(present.rules.insert(*rule), "{rule} is there"),
                Step::DelRule(rule) => assert!(present.rules.remove(rule), "no {rule}"),
                Step::AddRoute(route) => present.routes.push(FoundRoute::LocalDefault(*route)),
                Step::DelRoute(route) => {
                    let found = FoundRoute::LocalDefault(*route);
                    assert!(present.routes.contains(&found), "no {route}");
                    present.routes.retain(|other| *other != found);
                }
                Step::AdoptRoute { route, from } => {
                    let old = Route {
                        protocol: *from,
                        ..*route
                    };
                    let old = FoundRoute::LocalDefault(old);
                    let place = present.routes.iter_mut().find(|found| **found == old);
                    *place.expect("a route to adopt") = FoundRoute::LocalDefault(*route);
                }
                _ => {}
            }
        }
        present
    }

    #[test]
    fn a_plan_carried_out_leaves_nothing_to_do() {
        let mut moved = pathway(123);
        moved.table = TableId::new(9000).unwrap();
        let states = [
            vec![pathway(123), pathway(124)],
            vec![moved.clone(), pathway(124)],
            vec![moved],
        ];
        let mut present = Present::default();
        for pathways in &states {
            let first = plan(Goal::Add, pathways, &facts(), &present);
            assert_eq!(first.conflicts, []);
            present = after(&present, &first);
            let second = plan(Goal::Add, pathways, &facts(), &present);
            // lines are not part of this model: they stay wanted
            let left = second
                .changes
                .iter()
                .filter(|change| !matches!(change.command, Step::InsertLine(_)));
            assert_eq!(left.count(), 0);
        }
        let all = [pathway(123), pathway(124)];
        present = after(&present, &plan(Goal::Del, &all, &facts(), &present));
        assert_eq!(present, Present::default());
    }

    #[test]
    fn a_run_that_dies_at_any_step_is_completed_by_the_next() {
        let mut moved = pathway(123);
        moved.table = TableId::new(9000).unwrap();
        let start = after(
            &Present::default(),
            &plan(Goal::Add, &[moved], &facts(), &Present::default()),
        );
        // both a change of table and a removal
        for goal in [Goal::Add, Goal::Del] {
            let whole = plan(goal, &[pathway(123)], &facts(), &start);
            let expected = after(&start, &whole);
            for steps in 0..whole.changes.len() {
                let died = Plan {
                    changes: whole.changes[..steps].to_vec(),
                    ..Plan::default()
                };
                let present = after(&start, &died);
                let rest = plan(goal, &[pathway(123)], &facts(), &present);
                let present = after(&present, &rest);
                assert_eq!(present.rules, expected.rules, "{goal:?} died after {steps}");
                assert_eq!(present.routes.len(), expected.routes.len(), "{steps}");
            }
        }
    }

    #[test]
    fn undoing_a_plan_restores_what_was() {
        let start = after(
            &Present::default(),
            &plan(Goal::Add, &[pathway(123)], &facts(), &Present::default()),
        );
        let mut moved = pathway(123);
        moved.table = TableId::new(9000).unwrap();
        let forth = plan(Goal::Add, &[moved], &facts(), &start);
        let mut back = forth.clone();
        back.changes.reverse();
        for change in &mut back.changes {
            change.command = change.command.inverse().expect("no chain is dropped here");
        }
        let end = after(&after(&start, &forth), &back);
        assert_eq!(end.rules, start.rules);
        assert_eq!(end.routes.len(), start.routes.len());
    }

    #[test]
    fn a_family_that_is_not_served_is_not_wanted() {
        let mut facts = facts();
        facts.families = vec![Family::V4];
        let wanted = Wanted::new(&[pathway(123)], &facts);
        assert!(wanted.rules.keys().all(|rule| rule.family == Family::V4));
        assert_eq!((wanted.routes.len(), wanted.lines.len()), (1, 3));
    }
}

//! What routing of the programs that this one replaces left in the kernel: found by its shape, removed when
//! somebody asks for it.
//!
//! Nothing here is tagged as anybody's, so the shapes are narrow: loopback as source with `iif lo`, tables
//! that hold nothing but `local default dev lo`, CONNMARK lines of marks that the old set-up used.

use std::collections::BTreeSet;

use crate::model::Family;

use super::firewall::ruleset::Ruleset;
use super::host::{Error, Host, Means};
use super::netlink::{Netlink, RoutesOf};
use super::piece::{FoundRoute, LineStep, Rule, Step, loopback};
use super::plan::{Goal, Present};

/// Marks and tables that the old set-up is known to have used.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Known {
    /// Firewall marks.
    pub marks: BTreeSet<u32>,
    /// Routing tables.
    pub tables: BTreeSet<u32>,
}

/// The steps that remove what is left, rules before the routes that they lead to.
///
/// # Errors
/// When the kernel cannot be read.
pub async fn find(known: &Known) -> Result<Vec<Step>, Error> {
    let host = Host::open(Goal::Del, Means::installed())?;
    let mut present = Present::default();
    host.read_rules(&mut present).await?;
    host.read_firewall(&mut present).await?;
    let mut tables: BTreeSet<(Family, u32)> = present
        .rules
        .iter()
        .filter_map(|rule| Some((rule.family, rule.table()?)))
        .collect();
    let families: BTreeSet<Family> = tables.iter().map(|(family, _)| *family).collect();
    for family in families {
        tables.extend(known.tables.iter().map(|table| (family, *table)));
    }
    let netlink = Netlink::open()?;
    for (family, table) in tables {
        if !is_system(table) {
            let of = RoutesOf::Table(table);
            present.routes.extend(netlink.routes(family, of).await?);
        }
    }
    Ok(left(&present, known))
}

/// Removes them. Goes on after a failure.
///
/// # Errors
/// Each step that failed, with the reason; none where the kernel cannot be reached at all.
pub async fn remove(steps: &[Step]) -> Result<(), Vec<(Option<Step>, Error)>> {
    let host = Host::open(Goal::Del, Means::installed()).map_err(|error| vec![(None, error)])?;
    let mut failed = Vec::new();
    for step in steps {
        if let Err(error) = host.run(std::slice::from_ref(step)).await {
            failed.push((Some(step.clone()), error));
        }
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(failed)
    }
}

fn is_system(table: u32) -> bool {
    matches!(table, 0 | 253..=255)
}

/// Pure: what is left among what is there.
fn left(present: &Present, known: &Known) -> Vec<Step> {
    let old: BTreeSet<&Rule> = present
        .rules
        .iter()
        .filter(|rule| is_left(rule, present, known))
        .collect();
    let mut marks = known.marks.clone();
    marks.extend(old.iter().filter_map(|rule| Some(rule.mark?.0)));
    let mut tables: BTreeSet<u32> = old.iter().filter_map(|rule| rule.table()).collect();
    tables.extend(&known.tables);
    let mut steps: Vec<Step> = old.iter().map(|rule| Step::DelRule(**rule)).collect();
    for route in &present.routes {
        let FoundRoute::LocalDefault(route) = route else {
            continue;
        };
        let leads_here =
            |rule: &&Rule| (rule.family, rule.table()) == (route.family, Some(route.table));
        let used = present.other_lookups.contains(&route.table)
            || present
                .rules
                .iter()
                .filter(leads_here)
                .any(|rule| !old.contains(rule));
        if tables.contains(&route.table) && !route.is_ours() && !used {
            steps.push(Step::DelRoute(*route));
        }
    }
    for ruleset in &present.firewall.iptables {
        steps.extend(lines_left(ruleset, &marks));
    }
    steps
}

/// Whether a rule has the shape of the old set-ups' and leads to a table like theirs.
fn is_left(rule: &Rule, present: &Present, known: &Known) -> bool {
    let Some(table) = rule.table().filter(|table| !is_system(*table)) else {
        return false;
    };
    let from_loopback = rule.iif_lo && rule.source.trunc() == loopback(rule.family).trunc();
    // "fwmark M lookup T" alone may be anybody's: only with a mark that the old set-up used
    let by_mark = !rule.iif_lo
        && rule.to.is_none()
        && rule.source.prefix_len() == 0
        && rule
            .mark
            .is_some_and(|(mark, _)| known.marks.contains(&mark));
    let mut of_table = present.routes.iter().filter(|route| match route {
        FoundRoute::LocalDefault(route) => (route.family, route.table) == (rule.family, table),
        FoundRoute::Other {
            family,
            table: other,
            ..
        } => (*family, *other) == (rule.family, table),
    });
    let leads_back = matches!(
        (of_table.next(), of_table.next()),
        (Some(FoundRoute::LocalDefault(_)), None)
    );
    !rule.is_ours() && (from_loopback || by_mark) && (leads_back || known.tables.contains(&table))
}

fn lines_left(ruleset: &Ruleset, marks: &BTreeSet<u32>) -> Vec<Step> {
    let mut steps = Vec::new();
    for (position, (chain, line)) in ruleset.lines().enumerate() {
        let connmark = line
            .connmark
            .as_ref()
            .filter(|line| line.tag().is_none())
            .is_some_and(|line| marks.contains(&line.mark));
        if connmark || marks.iter().any(|mark| clears(*mark, &line.words)) {
            steps.push(Step::DelLine(LineStep {
                program: ruleset.program.clone(),
                chain,
                position: position + 1,
                words: line.words.clone(),
                family: ruleset.family,
                made: None,
            }));
        }
    }
    steps
}

/// A line that takes the mark off again, which one fork's container set-up has.
fn clears(mark: u32, words: &str) -> bool {
    words == format!("-m mark --mark {mark:#x} -j MARK --set-xmark 0x0/0xffffffff")
}

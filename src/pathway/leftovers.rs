//! What routing of the programs that this one replaces left in the kernel: found by its shape, removed when
//! somebody asks for it.
//!
//! Nothing here is tagged as anybody's, so the shapes are narrow: loopback as source with `iif lo`, tables
//! that hold nothing but `local default dev lo`, CONNMARK lines of marks that the old set-up used.

use std::collections::BTreeSet;

use crate::model::Family;

use super::firewall::Ruleset;
use super::firewall::iptables;
use super::host::Error;
use super::netlink::{Netlink, RoutesOf};
use super::piece::{FoundRoute, LineStep, Rule, Step, loopback};

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
    let netlink = Netlink::open()?;
    let mut steps = Vec::new();
    for family in families() {
        let rules = netlink.rules(family).await?.plain;
        let mut tables: BTreeSet<u32> = rules.iter().map(|rule| rule.table).collect();
        tables.extend(&known.tables);
        let mut routes = Vec::new();
        for table in tables.into_iter().filter(|table| !is_system(*table)) {
            routes.extend(netlink.routes(family, RoutesOf::Table(table)).await?);
        }
        let rulesets = match iptables::tools(family) {
            Ok(tools) => iptables::read(&tools).await?,
            // without the program there are no lines of it
            Err(iptables::Error::Missing { .. }) => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        steps.extend(left(&rules, &routes, &rulesets, known));
    }
    Ok(steps)
}

/// Removes them. Goes on after a failure.
///
/// # Errors
/// Each step that failed, with the reason.
pub async fn remove(steps: &[Step]) -> Result<(), Vec<(Step, Error)>> {
    let mut failed = Vec::new();
    for step in steps {
        if let Err(error) = remove_one(step).await {
            failed.push((step.clone(), error));
        }
    }
    if failed.is_empty() {
        Ok(())
    } else {
        Err(failed)
    }
}

async fn remove_one(step: &Step) -> Result<(), Error> {
    match step {
        Step::DelRule(rule) => Netlink::open()?.del_rule(rule).await?,
        Step::DelRoute(route) => Netlink::open()?.del_route(route).await?,
        Step::DelLine(line) => {
            let tools = iptables::tools(line.family)?;
            let tool = tools.iter().find(|tool| *tool.program() == line.program);
            if let Some(tool) = tool {
                tool.write(std::slice::from_ref(step)).await?;
            }
        }
        // nothing else is found here
        _ => {}
    }
    Ok(())
}

fn families() -> Vec<Family> {
    let mut families = vec![Family::V4];
    if std::path::Path::new("/proc/sys/net/ipv6").exists() {
        families.push(Family::V6);
    }
    families
}

fn is_system(table: u32) -> bool {
    matches!(table, 0 | 253..=255)
}

/// Pure: what is left of these rules, routes and lines of one family.
fn left(rules: &[Rule], routes: &[FoundRoute], rulesets: &[Ruleset], known: &Known) -> Vec<Step> {
    let leads_back = |table: u32| {
        let mut of_table = routes.iter().filter(|route| match route {
            FoundRoute::LocalDefault(route) => route.table == table,
            FoundRoute::Other { table: other, .. } => *other == table,
        });
        matches!(
            (of_table.next(), of_table.next()),
            (Some(FoundRoute::LocalDefault(_)), None)
        )
    };
    let is_left = |rule: &&Rule| {
        let from_loopback = rule.iif_lo && rule.source.trunc() == loopback(rule.family).trunc();
        // "fwmark M lookup T" alone may be anybody's: only with a mark that the old set-up used
        let by_mark = !rule.iif_lo
            && rule.source.prefix_len() == 0
            && rule
                .mark
                .is_some_and(|(mark, _)| known.marks.contains(&mark));
        !rule.is_ours()
            && !is_system(rule.table)
            && (from_loopback || by_mark)
            && (leads_back(rule.table) || known.tables.contains(&rule.table))
    };
    let old: Vec<&Rule> = rules.iter().filter(is_left).collect();
    let mut marks = known.marks.clone();
    marks.extend(old.iter().filter_map(|rule| Some(rule.mark?.0)));
    let mut steps: Vec<Step> = old.iter().map(|rule| Step::DelRule(**rule)).collect();
    let mut tables: BTreeSet<u32> = old.iter().map(|rule| rule.table).collect();
    tables.extend(&known.tables);
    for route in routes {
        let FoundRoute::LocalDefault(route) = route else {
            continue;
        };
        let used = rules
            .iter()
            .any(|rule| rule.table == route.table && !old.contains(&rule));
        if tables.contains(&route.table) && !route.is_ours() && !used {
            steps.push(Step::DelRoute(*route));
        }
    }
    for ruleset in rulesets {
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
    }
    steps
}

/// A line that takes the mark off again, which one fork's container set-up has.
fn clears(mark: u32, words: &str) -> bool {
    words == format!("-m mark --mark {mark:#x} -j MARK --set-xmark 0x0/0xffffffff")
}

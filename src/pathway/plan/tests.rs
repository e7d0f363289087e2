//! Plans carried out on a model of rules and routes.

use std::collections::BTreeSet;

use super::*;
use crate::model::{Family, TableId};
use crate::pathway::firewall::Backend;

fn facts() -> Facts {
    Facts {
        families: Family::BOTH.to_vec(),
        route_localnet: false,
        default_route: Family::BOTH.to_vec(),
        own: BTreeSet::new(),
        backend: Backend::Iptables,
        may_set_sysctls: false,
    }
}

/// With a target that routers may stand before.
fn pathway(mark: u32) -> Pathway {
    let mut pathway = Pathway::with_defaults(Mark::new(mark).unwrap()).unwrap();
    pathway.targets.insert("172.20.0.2/32".parse().unwrap());
    pathway
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
fn routers_are_heard_of_by_the_families_that_they_stand_in() {
    let mut facts = facts();
    let of = |facts: &Facts| {
        let wanted = Wanted::new(&[pathway(123)], facts);
        let rules = wanted.rules.into_keys().filter(|rule| rule.icmp);
        rules.map(|rule| rule.to_string()).collect::<Vec<_>>()
    };
    let marked = "fwmark 0x7b/0xff";
    assert_eq!(
        of(&facts),
        [
            format!("priority 101 {marked} iif lo ipproto icmp goto 103 protocol 177"),
            format!("priority 102 {marked} ipproto icmp lookup 123 protocol 177"),
            format!("priority 103 {marked} iif lo ipproto icmp nop protocol 177"),
        ]
    );
    facts.own.insert("172.20.0.2".parse().unwrap());
    assert_eq!(of(&facts), [""; 0]);
}

#[test]
fn a_family_that_is_not_served_is_not_wanted() {
    let mut facts = facts();
    facts.families = vec![Family::V4];
    let wanted = Wanted::new(&[pathway(123)], &facts);
    assert!(wanted.rules.keys().all(|rule| rule.family == Family::V4));
    assert_eq!((wanted.routes.len(), wanted.lines.len()), (1, 3));
}

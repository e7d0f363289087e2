//! What the kernel's routing says about the pathways and about each target's answers.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::Asked;
use crate::causes::with_causes;
use crate::doctor::evidence::{Host, Missing, Pathway, Place, Shadow};
use crate::doctor::probe;
use crate::model::{self, Family, TargetAddr};
use crate::pathway::netlink::{Answered, Netlink, Question, SeenRule};
use crate::pathway::piece::{PROTOCOL, Step};
use crate::pathway::plan::UNROUTED_PRIORITY;
use crate::pathway::{self, Firewall, Problem};

/// How many destinations of another program's table are tried.
const DESTINATIONS: usize = 3;

pub(super) async fn look_at_routing(
    host: &mut Host,
    asked: &[Asked],
    firewall: Firewall,
) -> Vec<Pathway> {
    match Netlink::open() {
        Ok(netlink) => {
            for family in Family::BOTH {
                match netlink.seen_rules(family).await {
                    Ok(rules) => host.rules.extend(rules),
                    Err(error) if family == Family::V6 && error.errno().is_some() => {}
                    Err(error) => host.unseen.push(with_causes(&error)),
                }
                let way = ask(&netlink, probe::nobody(family, 0)).await;
                if way.kind.as_deref() == Some("unicast") {
                    host.default_route.insert(family, way.dev);
                }
            }
        }
        Err(error) => host.unseen.push(with_causes(&error)),
    }
    let mut by_mark = BTreeMap::new();
    for one in asked {
        by_mark.entry(one.pathway.mark).or_insert(one);
    }
    let wanted: Vec<model::Pathway> = by_mark.values().map(|one| one.pathway.clone()).collect();
    let (listed, unread) = match pathway::list(&wanted, firewall).await {
        Ok(listed) => (listed, None),
        Err(error) => (Vec::new(), Some(with_causes(&error))),
    };
    let listed: BTreeMap<_, _> = listed
        .into_iter()
        .filter_map(|listed| Some((listed.mark?, listed)))
        .collect();
    by_mark
        .into_iter()
        .map(|(mark, one)| {
            let pathway = &one.pathway;
            let (missing, stale) = match listed.get(&mark) {
                Some(listed) => (
                    listed.missing.iter().map(missing).collect(),
                    listed.stale.clone(),
                ),
                None => (Vec::new(), Vec::new()),
            };
            Pathway {
                mark: mark.get(),
                mask: pathway.mask.get(),
                table: pathway.table.get(),
                priority: pathway.priority.get(),
                configured: one.configured,
                connmark: pathway.wants_connmark(),
                unread: unread.clone(),
                missing,
                stale,
            }
        })
        .collect()
}

fn missing(finding: &pathway::Finding) -> Missing {
    let (family, unrouted) = match &finding.problem {
        Problem::Missing(step) => (
            step.family(),
            matches!(step, Step::AddRule(rule) if rule.priority == UNROUTED_PRIORITY),
        ),
        Problem::TableTaken(_) | Problem::Conflict(_) => (None, false),
    };
    Missing {
        family,
        text: finding.to_string(),
        unrouted,
        taken: matches!(finding.problem, Problem::TableTaken(_)),
        sysctl: matches!(finding.problem, Problem::Missing(Step::TakeSwitch(_))),
    }
}

/// The way to an address, for a packet without mark.
pub(super) async fn ask(netlink: &Netlink, to: IpAddr) -> Answered {
    let question = Question {
        to,
        from: None,
        mark: 0,
        iif: None,
    };
    netlink.route(question).await.unwrap_or_default()
}

/// What the routing says about a target.
pub(super) struct Routes {
    pub(super) place: Place,
    pub(super) client: IpAddr,
    pub(super) marked: Answered,
    pub(super) unmarked: Answered,
    pub(super) forward: Answered,
    pub(super) chosen: Answered,
    pub(super) shadows: Vec<Shadow>,
}

pub(super) async fn routes(
    netlink: &Netlink,
    host: &Host,
    asked: &Asked,
    target: TargetAddr,
    number: usize,
) -> Routes {
    let client = probe::nobody(target.family(), number);
    let (to, mark) = (target.ip(), asked.pathway.mark.get());
    let way = ask(netlink, to).await;
    let place = if to.is_loopback() {
        Place::Loopback
    } else if way.is_local() {
        Place::Own
    } else if way.kind.as_deref() == Some("unicast") {
        Place::Remote
    } else {
        Place::Nowhere
    };
    let remote = place == Place::Remote;
    let iif = way.dev.as_deref().filter(|_| remote);
    let index = iif.and_then(|name| nix::net::if_::if_nametoindex(name).ok());
    let answer = async |to: IpAddr, mark: u32| {
        let question = Question {
            to,
            from: Some(target.ip()),
            mark,
            iif: index,
        };
        netlink.route(question).await.unwrap_or_default()
    };
    let forward = Question {
        to,
        from: None,
        mark,
        iif: None,
    };
    let came_in = iif.unwrap_or("lo");
    let mut shadows = Vec::new();
    let behind = asked.pathway.priority.get();
    // a local service's answer is routed once without its mark
    let looks = [(mark, behind), (0, asked.pathway.priority.unmarked())];
    let looks = &looks[..if place == Place::Loopback { 2 } else { 1 }];
    for (number, rule) in host.rules.iter().enumerate() {
        for &(mark, behind) in looks {
            if !before_ours(rule, target.family(), behind) {
                continue;
            }
            for clients in destinations(netlink, rule, client).await {
                let to = inside(clients);
                let meets = rule.selector.matches(target.ip(), to, mark, came_in);
                if meets != Some(true) {
                    continue;
                }
                let answer = answer(to, mark).await;
                if !answer.is_local() {
                    shadows.push(Shadow {
                        rule: number,
                        clients,
                        answer,
                    });
                }
            }
        }
    }
    Routes {
        place,
        client,
        marked: answer(client, mark).await,
        unmarked: answer(client, 0).await,
        forward: netlink.route(forward).await.unwrap_or_default(),
        chosen: ask(netlink, client).await,
        shadows,
    }
}

/// Whether a rule of others is asked before ours. The local table comes first by right.
fn before_ours(rule: &SeenRule, family: Family, ours: u32) -> bool {
    rule.family == family
        && rule.protocol != PROTOCOL
        && rule.priority < ours
        && rule.table != Some(255)
        && rule.action != "nop"
}

/// Clients that may go through a rule's table: the client of the probe, and what the table leads to.
async fn destinations(netlink: &Netlink, rule: &SeenRule, client: IpAddr) -> Vec<IpNet> {
    let mut nets = vec![IpNet::from(client)];
    if let Some(table) = rule.table.filter(|table| !matches!(table, 253 | 254)) {
        let found = netlink.destinations(rule.family, table).await;
        let found = found.unwrap_or_default().into_iter();
        nets.extend(found.filter(|net| net.prefix_len() > 0).take(DESTINATIONS));
    }
    nets
}

/// Some address of a prefix, not its first one.
pub(super) fn inside(net: IpNet) -> IpAddr {
    const NUMBER: u128 = 77;
    match net.network() {
        IpAddr::V4(ip) => {
            let hosts = u32::MAX.checked_shr(net.prefix_len().into()).unwrap_or(0);
            Ipv4Addr::from_bits(ip.to_bits() | (NUMBER as u32 & hosts)).into()
        }
        IpAddr::V6(ip) => {
            let hosts = u128::MAX.checked_shr(net.prefix_len().into()).unwrap_or(0);
            Ipv6Addr::from_bits(ip.to_bits() | (NUMBER & hosts)).into()
        }
    }
}

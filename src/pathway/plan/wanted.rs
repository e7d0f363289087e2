//! The scheme of `ROUTING.md` as values, and what transparent listeners need: which rules, routes and lines a set of pathways wants on a host. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use crate::model::{ConnmarkMode, Family, Mark, Pathway, TRANSPARENT_MARK};
use crate::pathway::firewall::Backend;
use crate::pathway::firewall::table::Entry;
use crate::pathway::in_use::ByMark;
use crate::pathway::piece::{Chain, Job, Leads, Line, PROTOCOL, Route, Rule, anywhere, loopback};

/// Where a rule stands that shall answer only when the main table (32766) has no route.
pub const UNROUTED_PRIORITY: u32 = 40_000;

/// What of the host decides how the scheme looks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The families that this host serves.
    pub families: Vec<Family>,
    /// Whether packets from 127.0.0.0/8 may leave where clients are reached (`route_localnet`).
    pub route_localnet: bool,
    /// The families with a route to addresses anywhere.
    pub default_route: Vec<Family>,
    /// Target addresses that are this host's own.
    pub own: BTreeSet<IpAddr>,
    /// What gives replies their mark.
    pub backend: Backend,
    /// Whether a sysctl may be set.
    pub may_set_sysctls: bool,
    /// What is in place, wanted by no pathway, and stays for the connections that are open there.
    pub still_used: ByMark,
}

impl Facts {
    /// Whether a target is one address, and this host's own.
    pub(super) fn is_own(&self, target: &IpNet) -> bool {
        target.prefix_len() == target.max_prefix_len() && self.own.contains(&target.addr())
    }
}

/// Every piece that a set of pathways wants, by the mark that wants it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Wanted {
    /// Rules.
    pub rules: BTreeMap<Rule, Mark>,
    /// Routes.
    pub routes: BTreeMap<Route, Mark>,
    /// CONNMARK and TPROXY lines, saves before restores.
    pub lines: BTreeSet<Line>,
    /// The pathways that need `tcp_fwmark_accept`.
    pub switch: BTreeSet<Mark>,
}

impl Wanted {
    /// The scheme for these pathways on a host like this.
    pub fn new(pathways: &[Pathway], facts: &Facts) -> Self {
        let mut wanted = Self::default();
        for pathway in pathways {
            wanted
                .switch
                .extend(needs_switch(pathway, facts).then_some(pathway.mark));
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
                if facts.backend != Backend::None {
                    wanted.lines.extend(Line::interceptions(pathway, family));
                }
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

impl Wanted {
    /// The mark of each piece, as often as it has pieces in the back end of these facts.
    pub fn marks(&self, facts: &Facts) -> Vec<Mark> {
        let rules_and_routes = self.rules.values().chain(self.routes.values()).copied();
        let lines: Vec<Mark> = match facts.backend {
            Backend::Iptables => self.lines.iter().map(|line| line.mark).collect(),
            // an entry serves both families
            Backend::Nftables => {
                let entries: BTreeSet<Entry> = self.lines.iter().map(Entry::from).collect();
                entries.into_iter().map(|entry| entry.mark).collect()
            }
            Backend::None => Vec::new(),
        };
        rules_and_routes
            .chain(lines)
            .chain(self.switch.iter().copied())
            .collect()
    }
}

/// Whether CONNMARK lines are wanted. With `route_localnet` on, a loopback target has no unmarked rule
/// to rely on, so `auto` cannot leave them out.
pub fn wants_lines(pathway: &Pathway, facts: &Facts) -> bool {
    facts.backend != Backend::None
        && (pathway.wants_connmark()
            || (pathway.connmark == ConnmarkMode::Auto && facts.route_localnet))
}

/// Whether the pathway relies on `tcp_fwmark_accept`: where there is no firewall, for what the unmarked
/// loopback rule does not carry.
pub fn needs_switch(pathway: &Pathway, facts: &Facts) -> bool {
    facts.backend == Backend::None
        && pathway.connmark != ConnmarkMode::Off
        && (!pathway.targets.is_empty() || facts.route_localnet)
}

pub(super) fn marked(pathway: &Pathway, family: Family) -> Rule {
    Rule {
        family,
        priority: pathway.priority.get(),
        source: loopback(family),
        to: None,
        mark: Some((pathway.mark.get(), pathway.mask.get())),
        iif_lo: true,
        icmp: false,
        leads: Leads::Table(pathway.table.get()),
        protocol: PROTOCOL,
    }
}

pub(super) fn wanted_rules(pathway: &Pathway, family: Family, facts: &Facts) -> Vec<Rule> {
    let marked = marked(pathway, family);
    let mut rules = vec![marked];
    // A reply is routed once before it has its mark. From 127.0.0.1 to an outside client that look-up
    // fails unless route_localnet is on, so the unmarked rule answers it. Where it is on, the rule
    // would catch replies to clients that were DNATed to 127.0.0.1; there the main table answers, and
    // the rule is needed only behind it, for a host without a default route.
    let marked_in_time = wants_lines(pathway, facts) || needs_switch(pathway, facts);
    let relies_on_main = family == Family::V4 && facts.route_localnet && marked_in_time;
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
        if facts.is_own(&source) && !facts.default_route.contains(&family) {
            rules.push(Rule {
                priority: UNROUTED_PRIORITY,
                mark: None,
                ..rule
            });
        }
    }
    if beyond_this_host(pathway, family, facts) {
        rules.extend(icmp(pathway, marked));
    }
    // what TPROXY has marked is delivered here whatever its destination. Never without `to`: with
    // tcp_fwmark_accept the answers carry the mark as well, and with src_valid_mark so does the look-up
    // of the way back to their sender.
    let networks = pathway.interceptions.iter();
    rules.extend(
        networks
            .map(|one| one.listen.network())
            .filter(|network| Family::of(network.addr()) == family)
            .map(|network| Rule {
                source: anywhere(family),
                to: Some(network),
                mark: Some((TRANSPARENT_MARK, pathway.transparent_mask().get())),
                iif_lo: false,
                ..marked
            }),
    );
    rules
}

/// Whether there may be routers between this host and a target.
fn beyond_this_host(pathway: &Pathway, family: Family, facts: &Facts) -> bool {
    let mut targets = pathway.targets.iter();
    targets.any(|target| Family::of(target.addr()) == family && !facts.is_own(target))
}

/// What takes in the ICMP of routers on the way to a target, above all "too big" of a narrower link: it is for
/// the client, as an answer is, and as RELATED it gets the connection's mark, but it is from the router, so no
/// rule with a target's `from` matches.
///
/// Only what comes in is taken. What this host sends itself with the mark and ICMP is for a target (port
/// unreachable, once a relay's UDP socket is closed); and with `src_valid_mark`, or nft's `fib saddr . mark`
/// (firewalld has it), the way back to the router is looked up with the ICMP's mark and must not be found to
/// lead here. Both are looked up as from `lo`, and "not iif lo" cannot stand beside other selectors: so they are
/// led past.
fn icmp(pathway: &Pathway, marked: Rule) -> [Rule; 3] {
    let [past, take, land] = pathway.priority.icmp();
    let of = |priority, iif_lo, leads| Rule {
        priority,
        source: anywhere(marked.family),
        iif_lo,
        icmp: true,
        leads,
        ..marked
    };
    [
        of(past, true, Leads::Past(land)),
        of(take, false, marked.leads),
        of(land, true, Leads::On),
    ]
}

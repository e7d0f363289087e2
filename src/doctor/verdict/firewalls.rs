//! Which firewall line a probe died of, and the exception that lets it pass.

use crate::doctor::evidence::{Evidence, Instance, Pathway, Place, Target};
use crate::doctor::filters::{Action, Base, FilterRule, Packet};

/// The packets of a probe at every hook: the request with the mark, the answer with and without it.
pub(super) fn packets<'a>(
    instance: &'a Instance,
    target: &'a Target,
    pathway: &Pathway,
) -> Vec<Packet<'a>> {
    let remote = target.place == Place::Remote;
    let dev = if remote {
        target.forward.dev.as_deref()
    } else {
        Some("lo")
    };
    let packet = |hook, answer, mark| Packet {
        hook,
        iif: dev.filter(|_| matches!(hook, "input" | "prerouting" | "ingress")),
        oif: dev.filter(|_| matches!(hook, "output" | "postrouting")),
        from: if answer {
            target.address.ip()
        } else {
            target.client
        },
        to: if answer {
            target.client
        } else {
            target.address.ip()
        },
        protocol: &instance.protocol,
        port: target.address.port(),
        answer,
        mark,
    };
    let (going, coming) = (["output", "postrouting"], ["prerouting", "input"]);
    let mut packets = Vec::new();
    packets.extend(going.map(|hook| packet(hook, false, pathway.mark)));
    if !remote {
        packets.extend(coming.map(|hook| packet(hook, false, pathway.mark)));
    }
    for mark in [pathway.mark, 0] {
        packets.extend(coming.map(|hook| packet(hook, true, mark)));
        packets.push(packet("ingress", true, mark));
        if !remote {
            packets.extend(going.map(|hook| packet(hook, true, mark)));
        }
    }
    packets
}

/// The line that did this to the probe: the one whose count rose, else the first that may have.
pub(super) fn culprit<'e>(
    evidence: &'e Evidence,
    packets: &[Packet<'_>],
    action: &Action,
) -> Option<&'e FilterRule> {
    let met = |rule: &&FilterRule| {
        rule.action == *action && !rule.ours && packets.iter().any(|packet| may_meet(rule, packet))
    };
    let all = &evidence.host.filters;
    let counted = all
        .iter()
        .filter(met)
        .find(|rule| rule.met().is_some_and(|packets| packets > 0));
    counted.or_else(|| {
        all.iter()
            .enumerate()
            .filter(|(_, rule)| met(rule) && rule.packets.is_none())
            .find(|(at, rule)| {
                packets
                    .iter()
                    .any(|packet| may_meet(rule, packet) && !let_through(&all[..*at], rule, packet))
            })
            .map(|(_, rule)| rule)
    })
}

/// In a bridge or device table the interface is a port that nothing else here knows.
fn may_meet(rule: &FilterRule, packet: &Packet<'_>) -> bool {
    if !matches!(rule.at.family.as_str(), "bridge" | "netdev") {
        return rule.may_meet(packet);
    }
    let mut any_port = rule.clone();
    any_port.matches.iif = None;
    any_port.matches.oif = None;
    any_port.may_meet(packet)
}

/// Whether a line before it in the same chain surely accepts the packet. A policy is listed first and asked
/// last.
fn let_through(before: &[FilterRule], rule: &FilterRule, packet: &Packet<'_>) -> bool {
    before.iter().any(|other| {
        other.at == rule.at
            && other.action == Action::Accept
            && !other.matches.beyond
            && other.may_meet(packet)
    })
}

/// The commands that let the probe's packets pass before the line.
pub(super) fn exception(
    rule: &FilterRule,
    packets: &[Packet<'_>],
    target: &Target,
    pathway: &Pathway,
) -> Vec<String> {
    // raw tables, bridges and devices see packets before they have their mark back
    let early = rule.at.table == "raw"
        || matches!(rule.at.family.as_str(), "bridge" | "netdev")
        || rule.action == Action::NoTrack;
    let mut commands = Vec::new();
    for base in &rule.at.bases {
        let mut here = packets
            .iter()
            .filter(|packet| packet.hook == base.hook && may_meet(rule, packet));
        let Some(first) = here.next() else {
            continue;
        };
        let port = if rule.at.program == "nft" && early && rule.at.family == "bridge" {
            None
        } else {
            first.iif.or(first.oif)
        };
        let unmarked = early || (!pathway.connmark && target.place != Place::Remote);
        if !early {
            commands.push(marked(rule, base, port, first, pathway));
        }
        if unmarked {
            let port = if rule.action == Action::NoTrack {
                None
            } else {
                port
            };
            let mut directions = vec![first.answer];
            directions.extend(here.map(|packet| packet.answer));
            directions.sort_unstable();
            directions.dedup();
            commands.extend(
                directions.into_iter().map(|answer| {
                    addressed(rule, base, port, &Packet { answer, ..*first }, target)
                }),
            );
        }
    }
    commands.dedup();
    commands
}

fn marked(
    rule: &FilterRule,
    base: &Base,
    port: Option<&str>,
    packet: &Packet<'_>,
    pathway: &Pathway,
) -> String {
    let (mark, mask) = (pathway.mark, pathway.mask);
    if rule.at.program == "nft" {
        let name = match port {
            Some(port) if packet.iif.is_some() => format!("iifname {port} "),
            Some(port) => format!("oifname {port} "),
            None => String::new(),
        };
        return format!(
            "nft 'insert rule {} {} {} {name}meta mark & {mask:#x} == {mark:#x} accept'",
            rule.at.family, rule.at.table, base.chain
        );
    }
    let name = match port {
        Some(port) if packet.iif.is_some() => format!("-i {port} "),
        Some(port) => format!("-o {port} "),
        None => String::new(),
    };
    format!(
        "{} {}-I {} {name}-m mark --mark {mark:#x}/{mask:#x} -j ACCEPT",
        rule.at.program,
        table(rule),
        base.chain
    )
}

fn addressed(
    rule: &FilterRule,
    base: &Base,
    port: Option<&str>,
    packet: &Packet<'_>,
    target: &Target,
) -> String {
    let ip = target.address.ip();
    let number = target.address.port();
    if rule.at.program == "nft" {
        let family = if ip.is_ipv4() { "ip" } else { "ip6" };
        let (address, side) = if packet.answer {
            ("saddr", "sport")
        } else {
            ("daddr", "dport")
        };
        let name = match port {
            Some(port) if packet.iif.is_some() => format!("iifname {port} "),
            Some(port) => format!("oifname {port} "),
            None => String::new(),
        };
        return format!(
            "nft 'insert rule {} {} {} {name}{family} {address} {ip} {} {side} {number} accept'",
            rule.at.family, rule.at.table, base.chain, packet.protocol
        );
    }
    let (address, side) = if packet.answer {
        ("-s", "--sport")
    } else {
        ("-d", "--dport")
    };
    let name = match port {
        Some(port) if packet.iif.is_some() => format!("-i {port} "),
        Some(port) => format!("-o {port} "),
        None => String::new(),
    };
    format!(
        "{} {}-I {} {name}{address} {ip} -p {} {side} {number} -j ACCEPT",
        rule.at.program,
        table(rule),
        base.chain,
        packet.protocol
    )
}

/// `-t TABLE `, where it is not the filter table.
fn table(rule: &FilterRule) -> String {
    match rule.at.table.as_str() {
        "filter" => String::new(),
        other => format!("-t {other} "),
    }
}

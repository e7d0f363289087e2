//! What instances may not have in common with each other, and what they need from pathways.conf.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::diagnostics::{Diagnostic, Diagnostics};
use super::instances::Line;
use super::pathways;
use super::source::{Source, Word};
use crate::model::{
    Family, InstanceName, Listen, ListenNetwork, ListenRange, Mark, PortRange, Protocol,
    SocketPath, TRANSPARENT_MARK,
};

/// Names, listen addresses and targets of all instances.
pub(super) fn check(source: &Source, lines: &[Line<'_>], found: &mut Diagnostics) {
    check_names(source, lines, found);
    let listeners = check_listeners(source, lines, found);
    check_networks(source, lines, found);
    for line in lines {
        check_targets(source, line, &listeners, found);
    }
}

/// Each instance's mark has a pathway.
pub(super) fn check_marks(
    source: &Source,
    lines: &[Line<'_>],
    marks: &BTreeSet<Mark>,
    found: &mut Diagnostics,
) {
    const SHOWN: usize = 20;
    let mut known: Vec<String> = marks.iter().take(SHOWN).map(Mark::to_string).collect();
    if marks.len() > SHOWN {
        known.push("…".to_owned());
    }
    let expected = match known.len() {
        0 => "a pathway of that mark in pathways.conf, which has none".to_owned(),
        1 => format!("{}, the mark that pathways.conf has", known[0]),
        _ => format!(
            "one of the marks that pathways.conf has: {}",
            known.join(", ")
        ),
    };
    for (mark, word) in lines.iter().filter_map(|line| line.mark) {
        if !marks.contains(&mark) {
            found.push(Diagnostic::error(
                source.position(word),
                format!("no pathway has mark {mark}"),
                expected.as_str(),
            ));
        }
    }
}

/// No pathway's own packets look like those that are handed to a transparent listener: they would come back
/// where they go to one of its addresses.
pub(super) fn check_intercepted(
    source: &Source,
    lines: &[Line<'_>],
    of_pathways: &Source,
    pathways: &[pathways::Line<'_>],
    found: &mut Diagnostics,
) {
    let mask_of = |mark| pathways.iter().find(|one| one.mark == mark)?.mask;
    let networks: Vec<_> = lines
        .iter()
        .filter_map(|line| match (&line.listen, line.mark) {
            (Some((Listen::Network(network), word)), Some((mark, _))) if !network.is_anywhere() => {
                Some((mask_of(mark)?.0, network, *word))
            }
            _ => None,
        })
        .collect();
    for pathway in pathways {
        let taken = networks
            .iter()
            .find(|(mask, ..)| mask.takes_for_intercepted(pathway.mark));
        if let Some((mask, network, word)) = taken {
            found.push(
                Diagnostic::error(
                    of_pathways.position(pathway.mark_word),
                    format!(
                        "packets of mark {} look like those that are handed to a transparent listener",
                        pathway.mark
                    ),
                    format!("a mark that has not just the bit {TRANSPARENT_MARK:#x} of {}", mask.transparent()),
                )
                .with(&source.position(*word), format!("what is routed here for {network}")),
            );
        }
    }
}

fn check_names(source: &Source, lines: &[Line<'_>], found: &mut Diagnostics) {
    let mut names: BTreeMap<&InstanceName, Word<'_>> = BTreeMap::new();
    for (name, word) in lines.iter().filter_map(|line| line.name.as_ref()) {
        if let Some(first) = names.get(name) {
            found.push(
                Diagnostic::error(
                    source.position(*word),
                    format!("two instances are named {name}"),
                    "a name of its own",
                )
                .with(&source.position(*first), "the first one"),
            );
        } else {
            names.insert(name, *word);
        }
    }
}

/// Who listens on a range of ports of an address: its first port and last, the line, the place in it.
#[derive(Clone, Copy)]
struct Listener<'l> {
    range: ListenRange,
    line: &'l Line<'l>,
    word: Word<'l>,
}

/// Who listens where: per protocol and address disjoint ranges, by their first port.
#[derive(Default)]
struct Listeners<'l>(BTreeMap<(Protocol, SocketAddr), BTreeMap<u16, Listener<'l>>>);

impl<'l> Listeners<'l> {
    /// One that listens on some of these ports.
    fn overlapping(&self, protocol: Protocol, range: ListenRange) -> Option<Listener<'l>> {
        let of_address = self.0.get(&(protocol, without_port(range.first())))?;
        let (_, last) = of_address.range(..=range.last()).next_back()?;
        (last.range.last() >= range.first().port()).then_some(*last)
    }

    fn insert(&mut self, protocol: Protocol, listener: Listener<'l>) {
        let first = listener.range.first();
        let of_address = self.0.entry((protocol, without_port(first))).or_default();
        of_address.insert(first.port(), listener);
    }

    fn all(&self) -> impl Iterator<Item = (Protocol, &Listener<'l>)> {
        self.0
            .iter()
            .flat_map(|((protocol, _), ranges)| ranges.values().map(|one| (*protocol, one)))
    }
}

fn without_port(mut addr: SocketAddr) -> SocketAddr {
    addr.set_port(0);
    addr
}

/// Only equal addresses are a mistake: Linux lets a wildcard and a specific address share a port when both
/// have SO_REUSEPORT, and prefers the specific one, which may be meant.
fn check_listeners<'l>(
    source: &Source,
    lines: &'l [Line<'_>],
    found: &mut Diagnostics,
) -> Listeners<'l> {
    let mut listeners = Listeners::default();
    let mut paths: BTreeMap<&SocketPath, Word<'_>> = BTreeMap::new();
    for line in lines {
        let Some((listen, word)) = &line.listen else {
            continue;
        };
        let first = match (listen, listen.ports()) {
            (Listen::Unix(path), _) => {
                let first = paths.get(path).copied();
                paths.entry(path).or_insert(*word);
                first.map(|first| (first, listen.to_string()))
            }
            // these have rules of their own
            (Listen::Network(_), _) | (_, None) => None,
            (_, Some(range)) => match listeners.overlapping(line.protocol, range) {
                Some(first) => Some((first.word, common(range, first.range))),
                None => {
                    let word = *word;
                    listeners.insert(line.protocol, Listener { range, line, word });
                    None
                }
            },
        };
        if let Some((first, what)) = first {
            found.push(
                Diagnostic::error(
                    source.position(*word),
                    format!("two instances listen on {what} ({})", line.protocol),
                    "an address or a port of its own",
                )
                .with(&source.position(first), "the first one"),
            );
        }
    }
    for (protocol, one) in listeners.all() {
        let everywhere = wildcard(one.range);
        if one.range.ip().is_unspecified() {
            continue;
        }
        if let Some(theirs) = listeners.overlapping(protocol, everywhere) {
            let ports = overlap(one.range, theirs.range);
            found.push(
                Diagnostic::warning(
                    source.position(one.word),
                    format!(
                        "another instance listens on port {ports} of every address: what goes to {} comes here",
                        one.range.ip()
                    ),
                    "different ports, unless this is meant",
                )
                .with(&source.position(theirs.word), "every address"),
            );
        }
    }
    listeners
}

/// What is handed to a transparent listener reaches nobody else: neither another one nor a socket on one of
/// the addresses.
fn check_networks(source: &Source, lines: &[Line<'_>], found: &mut Diagnostics) {
    let networks = lines
        .iter()
        .enumerate()
        .filter_map(|(at, line)| match &line.listen {
            Some((Listen::Network(network), word)) => Some((at, line, *network, *word)),
            _ => None,
        });
    for (at, line, network, word) in networks {
        let mut others = lines.iter().enumerate().filter(|(other, _)| *other != at);
        let meets = others.find_map(|(other, theirs)| {
            let (listen, place) = theirs.listen.as_ref()?;
            let both_networks = matches!(listen, Listen::Network(_));
            // said once, at the later one
            let is_turn = !both_networks || other < at;
            let meets =
                theirs.protocol == line.protocol && is_turn && network.overlaps(whole(listen)?);
            meets.then_some((listen, *place))
        });
        if let Some((listen, place)) = meets {
            found.push(
                Diagnostic::error(
                    source.position(word),
                    format!(
                        "what is sent to {listen} ({}) belongs to another instance as well",
                        line.protocol
                    ),
                    "addresses or ports of its own",
                )
                .with(&source.position(place), "the other instance"),
            );
        }
    }
}

/// All that a listen address takes, as one network; a wildcard is its own, as no packet is sent there.
fn whole(listen: &Listen) -> Option<ListenNetwork> {
    match listen {
        Listen::Network(network) => Some(*network),
        _ => listen
            .ports()
            .map(|range| ListenNetwork::single(range.ip(), range.ports())),
    }
}

/// The ports that two ranges have in common, of those that have any.
fn overlap(one: ListenRange, other: ListenRange) -> PortRange {
    let first = one.first().port().max(other.first().port());
    let last = one.last().min(other.last());
    PortRange::new(first, last).unwrap_or(one.ports())
}

/// The same, with the address.
fn common(one: ListenRange, other: ListenRange) -> String {
    let ports = overlap(one, other);
    let mut addr = one.first();
    addr.set_port(ports.first());
    match ports.count() {
        1 => addr.to_string(),
        _ => format!("{addr}-{}", ports.last()),
    }
}

/// The same ports of every address of the family.
fn wildcard(range: ListenRange) -> ListenRange {
    let ip = match range.first() {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    ListenRange::new(ip, range.ports())
}

/// A target that is a relay's own listener.
fn check_targets(
    source: &Source,
    line: &Line<'_>,
    listeners: &Listeners<'_>,
    found: &mut Diagnostics,
) {
    let Some(instance) = &line.instance else {
        return;
    };
    for target in instance.targets() {
        let word = match target.family() {
            Family::V4 => line.target4_word,
            Family::V6 => line.target6_word,
        };
        let Some(ports) = instance.target_port_range(target) else {
            continue;
        };
        let range = ListenRange::new(target.ip(), ports);
        // a loopback target is certainly on this host, where a wildcard listener takes it
        let listener = listeners.overlapping(line.protocol, range).or_else(|| {
            listeners
                .overlapping(line.protocol, wildcard(range))
                .filter(|_| target.ip().is_loopback())
        });
        let target = range;
        let (
            Some(word),
            Some(Listener {
                line: other,
                word: listen,
                ..
            }),
        ) = (word, listener)
        else {
            continue;
        };
        let listen = source.position(listen);
        found.push(if std::ptr::eq(other, line) {
            Diagnostic::error(
                source.position(word),
                format!("target {target} is where this instance itself listens"),
                "the service's address and port",
            )
            .with(&listen, "its listen address")
        } else {
            Diagnostic::warning(
                source.position(word),
                format!("target {target} is where another instance listens, which waits for a PROXY header"),
                "the service's address and port",
            )
            .with(&listen, "the other instance")
        });
    }
}

//! What instances may not have in common with each other, and what they need from pathways.conf.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use super::diagnostics::{Diagnostic, Diagnostics};
use super::instances::Line;
use super::source::{Source, Word};
use crate::model::{Family, InstanceName, Mark, Protocol};

/// Names, listen addresses and targets of all instances.
pub(super) fn check(source: &Source, lines: &[Line<'_>], found: &mut Diagnostics) {
    check_names(source, lines, found);
    let listeners = check_listeners(source, lines, found);
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

/// Who listens where.
type Listeners<'l> = BTreeMap<(Protocol, SocketAddr), (&'l Line<'l>, Word<'l>)>;

/// Only equal addresses are a mistake: Linux lets a wildcard and a specific address share a port when both
/// have SO_REUSEPORT, and prefers the specific one, which may be meant.
fn check_listeners<'l>(
    source: &Source,
    lines: &'l [Line<'_>],
    found: &mut Diagnostics,
) -> Listeners<'l> {
    let mut listeners: Listeners<'l> = BTreeMap::new();
    for line in lines {
        let Some((listen, word)) = line.listen else {
            continue;
        };
        let key = (line.protocol, listen.get());
        if let Some((_, first)) = listeners.get(&key) {
            found.push(
                Diagnostic::error(
                    source.position(word),
                    format!("two instances listen on {listen} ({})", line.protocol),
                    "an address or a port of its own",
                )
                .with(&source.position(*first), "the first one"),
            );
        } else {
            listeners.insert(key, (line, word));
        }
    }
    for ((protocol, addr), (_, word)) in &listeners {
        if let Some((_, theirs)) = listeners
            .get(&(*protocol, wildcard(*addr)))
            .filter(|_| !addr.ip().is_unspecified())
        {
            found.push(
                Diagnostic::warning(
                    source.position(*word),
                    format!("another instance listens on port {} of every address: what goes to {} comes here", addr.port(), addr.ip()),
                    "different ports, unless this is meant",
                )
                .with(&source.position(*theirs), "every address"),
            );
        }
    }
    listeners
}

fn wildcard(addr: SocketAddr) -> SocketAddr {
    let ip = match addr {
        SocketAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    SocketAddr::new(ip, addr.port())
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
        let target = target.get();
        // a loopback target is certainly on this host, where a wildcard listener takes it
        let listener = listeners.get(&(line.protocol, target)).or_else(|| {
            listeners
                .get(&(line.protocol, wildcard(target)))
                .filter(|_| target.ip().is_loopback())
        });
        let (Some(word), Some((other, listen))) = (word, listener) else {
            continue;
        };
        let listen = source.position(*listen);
        found.push(if std::ptr::eq(*other, line) {
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

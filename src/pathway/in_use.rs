//! What open connections still need of pathways, although no file wants it any more.
//!
//! Owns: which pieces of ours may be such, and asking the kernel for the sockets that need them. It is asked
//! rather than the relays, because it knows of every process: one that drains after an upgrade, relays of
//! their own units beside `pathway watch`. Must not know: what becomes of the answer.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::ops::ControlFlow;

use ipnet::IpNet;

use super::firewall::table::Table;
use super::firewall::{Backend, Found};
use super::piece::{Job, Rule};
use super::plan::{Facts, Present};
use crate::model::{ConnmarkMode, Interception, Mark, Pathway, Protocol, prefix_text};
use crate::socket::connected::{self, Connected};

/// Ways of a pathway beside those from loopback.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ways {
    /// Back from targets.
    pub targets: BTreeSet<IpNet>,
    /// To transparent listeners.
    pub interceptions: BTreeSet<Interception>,
    /// Whether there are CONNMARK lines, which what comes back from targets may rely on.
    pub lines: bool,
}

impl Ways {
    fn is_empty(&self) -> bool {
        self.targets.is_empty() && self.interceptions.is_empty()
    }

    /// Those that a connection is on.
    fn of(&self, connection: &Connected, mark: Mark) -> Self {
        let (local, peer) = (connection.local, connection.peer);
        let marked = connection.mark == mark.get();
        // what was handed to a listener has the address that was asked for, whoever that belongs to
        let handed = |one: &&Interception| {
            one.protocol == connection.protocol
                && one.listen.network().contains(&local.ip())
                && one.listen.ports().contains(local.port())
        };
        let to_target = |target: &&IpNet| marked && target.contains(&peer.ip());
        Self {
            targets: self.targets.iter().filter(to_target).copied().collect(),
            interceptions: self.interceptions.iter().filter(handed).copied().collect(),
            lines: self.lines,
        }
    }
}

impl fmt::Display for Ways {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let targets = self.targets.iter().map(prefix_text);
        let all = targets.chain(self.interceptions.iter().map(ToString::to_string));
        f.write_str(&all.collect::<Vec<_>>().join(", "))
    }
}

/// Why ways of a pathway that no file wants are in place.
pub fn why_kept(mark: Mark, ways: impl fmt::Display) -> String {
    format!(
        "mark {mark}: no file wants {ways} any more, and the rules for it stay while connections use them"
    )
}

/// Ways by the pathway's mark.
pub type ByMark = BTreeMap<Mark, Ways>;

/// The ways that the kernel has for these pathways and that none of them wants.
pub(super) fn unwanted(pathways: &[Pathway], rules: &BTreeSet<Rule>, firewall: &Found) -> ByMark {
    let by_mark: BTreeMap<u32, &Pathway> = pathways
        .iter()
        .map(|pathway| (pathway.mark.get(), pathway))
        .collect();
    let mut unwanted = ByMark::new();
    // those of routers' ICMP are from anywhere, and go with the last target
    let of_target = |rule: &&Rule| rule.is_ours() && !rule.iif_lo && !rule.icmp;
    for rule in rules.iter().filter(of_target) {
        let Some(pathway) = rule.pathway_mark().and_then(|mark| by_mark.get(&mark)) else {
            continue;
        };
        // a wider one that is wanted answers for it
        let mut wanted = pathway.targets.iter();
        if !wanted.any(|target| target.contains(&rule.source)) {
            let ways = unwanted.entry(pathway.mark).or_default();
            ways.targets.insert(rule.source);
        }
    }
    for (mark, one) in intercepted(firewall) {
        if let Some(pathway) = by_mark.get(&mark)
            && !pathway.interceptions.contains(&one)
        {
            let ways = unwanted.entry(pathway.mark).or_default();
            ways.interceptions.insert(one);
        }
    }
    let tags = firewall.marks();
    for (mark, ways) in &mut unwanted {
        ways.lines = tags.contains(&mark.get());
    }
    unwanted
}

/// What lines and entries of ours hand to listeners, with the pathways' marks.
fn intercepted(firewall: &Found) -> impl Iterator<Item = (u32, Interception)> {
    let handing = |job: Job| match job {
        Job::Intercept(one) => Some(one),
        Job::Save | Job::Restore => None,
    };
    let lines = firewall.iptables.iter().flat_map(|ruleset| ruleset.lines());
    let lines = lines.filter_map(move |(_, line)| {
        let line = line.connmark.as_ref()?;
        Some((line.tag()?, handing(line.job)?))
    });
    let entries = firewall.nftables.iter().flat_map(|table| match table {
        Table::Ours { entries, .. } => entries.iter().collect(),
        Table::Foreign | Table::Unreadable => Vec::new(),
    });
    let entries = entries.filter_map(move |entry| Some((entry.mark.get(), handing(entry.job)?)));
    lines.chain(entries)
}

/// Those of these ways that connections are on.
///
/// # Errors
/// When the kernel does not list the sockets.
pub(super) fn used(mut unknown: ByMark) -> io::Result<ByMark> {
    let mut used = ByMark::new();
    each_while(|one| {
        for (mark, ways) in &mut unknown {
            let found = ways.of(&one, *mark);
            if !found.is_empty() {
                ways.targets.retain(|way| !found.targets.contains(way));
                ways.interceptions
                    .retain(|way| !found.interceptions.contains(way));
                let known = used.entry(*mark).or_default();
                known.targets.extend(found.targets);
                known.interceptions.extend(found.interceptions);
                known.lines = found.lines;
            }
        }
        unknown.retain(|_, ways| !ways.is_empty());
        !unknown.is_empty()
    })?;
    Ok(used)
}

/// How many connections there are on each of these pathways, of those that have any: with their mark, or handed
/// to their listeners.
///
/// # Errors
/// When the kernel does not list the sockets.
pub(super) fn connections(pathways: &[Pathway]) -> io::Result<BTreeMap<Mark, usize>> {
    let mut counts = BTreeMap::new();
    if pathways.is_empty() {
        return Ok(counts);
    }
    each_while(|one| {
        for pathway in pathways {
            let handed = Ways {
                interceptions: pathway.interceptions.clone(),
                ..Ways::default()
            };
            let marked = one.mark == pathway.mark.get();
            if marked || !handed.of(&one, pathway.mark).is_empty() {
                *counts.entry(pathway.mark).or_default() += 1;
            }
        }
        true
    })?;
    Ok(counts)
}

/// Shows every connection of both protocols while more is wanted.
fn each_while(mut wants_more: impl FnMut(Connected) -> bool) -> io::Result<()> {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let mut more = true;
        let shown = connected::each(protocol, |one| {
            more = wants_more(one);
            match more {
                true => ControlFlow::Continue(()),
                false => ControlFlow::Break(()),
            }
        });
        match shown {
            // built without the list of this protocol's sockets; of TCP's there always is one
            Err(error)
                if protocol == Protocol::Udp && error.raw_os_error() == Some(libc::ENOENT) => {}
            shown => shown?,
        }
        if !more {
            break;
        }
    }
    Ok(())
}

/// What is in place for these pathways and stays although none of them wants it.
///
/// # Errors
/// When the kernel does not list the sockets.
pub(super) fn still_used(
    pathways: &[Pathway],
    backend: Backend,
    present: &Present,
) -> io::Result<ByMark> {
    let mut unwanted = unwanted(pathways, &present.rules, &present.firewall);
    // without a firewall, a target beyond loopback and UDP cannot be had together: what the files want goes first
    let forbidden = |pathway: &&Pathway| backend == Backend::None && !pathway.udp.is_empty();
    for pathway in pathways.iter().filter(forbidden) {
        unwanted.remove(&pathway.mark);
    }
    match unwanted.is_empty() {
        true => Ok(unwanted),
        false => used(unwanted),
    }
}

impl Facts {
    /// Pathways with what stays for the connections on it.
    pub(super) fn with_used<'p>(&self, pathways: &'p [Pathway]) -> Cow<'p, [Pathway]> {
        if self.still_used.is_empty() {
            return Cow::Borrowed(pathways);
        }
        let mut with_used = pathways.to_vec();
        for pathway in &mut with_used {
            if let Some(ways) = self.still_used.get(&pathway.mark) {
                pathway.targets.extend(&ways.targets);
                pathway.interceptions.extend(&ways.interceptions);
                let relies = ways.lines && !ways.targets.is_empty();
                if relies && pathway.connmark == ConnmarkMode::Off {
                    pathway.connmark = ConnmarkMode::Auto;
                }
            }
        }
        Cow::Owned(with_used)
    }
}

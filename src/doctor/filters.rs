//! Every firewall's lines as values, as far as a diagnosis needs them: what they match, what they do to a
//! packet or its mark, and how many packets they met.
//!
//! Owns: reading `iptables-save -c` ([`xtables`]) and `nft -j list ruleset` ([`nftables`]). Must not know:
//! which packets are of interest.

pub mod nftables;
pub mod xtables;

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::model::Family;

/// One line, or a chain's policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterRule {
    /// Where it stands.
    pub at: At,
    /// The line as its program shows it.
    pub text: String,
    /// What it matches.
    pub matches: Matches,
    /// What it does.
    pub action: Action,
    /// The packets that it met before the probes and after them; none where it does not count.
    pub packets: Option<(u64, u64)>,
    /// The same lines under other names show what belongs to this program: its tag.
    pub ours: bool,
}

/// The place of a line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct At {
    /// `iptables`, `ip6tables`, their `-legacy` forms, or `nft`.
    pub program: String,
    /// `ip`, `ip6`, `inet`, `bridge`, …
    pub family: String,
    /// The table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The base chains that lead here.
    pub bases: Vec<Base>,
}

/// A base chain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// Its name.
    pub chain: String,
    /// The hook, in nft's words: `prerouting`, `input`, `forward`, `output`, `postrouting`.
    pub hook: String,
}

/// What a line does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Action {
    /// The packet is lost, silently or with an answer.
    Drop,
    /// It passes this hook.
    Accept,
    /// Connection tracking does not see it.
    NoTrack,
    /// Its mark gets this value in these bits.
    SetMark(u32, u32),
    /// Anything else.
    Other,
}

/// What a line matches; what is `None` does not restrict.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Matches {
    /// The interface that the packet came in on; `!` before it means any other.
    pub iif: Option<Named>,
    /// The interface that it leaves by.
    pub oif: Option<Named>,
    /// Its source.
    pub source: Option<Prefix>,
    /// Its destination.
    pub destination: Option<Prefix>,
    /// `tcp`, `udp`, `icmp`, …
    pub protocol: Option<String>,
    /// The source ports, from and to.
    pub sport: Option<(u16, u16)>,
    /// The destination ports, from and to.
    pub dport: Option<(u16, u16)>,
    /// Its mark: value, mask, and whether any other is meant.
    pub mark: Option<(u32, u32, bool)>,
    /// Whether it matches on more than these.
    pub beyond: bool,
}

/// An interface, or any other; a `+` or `*` at its end stands for every continuation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// The name.
    pub name: String,
    /// Whether any other is meant.
    pub inverted: bool,
}

/// A prefix, or everything outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Prefix {
    /// The prefix.
    pub net: IpNet,
    /// Whether everything outside is meant.
    pub inverted: bool,
}

/// A packet, as a line sees it.
#[derive(Debug, Clone, Copy)]
pub struct Packet<'a> {
    /// The hook.
    pub hook: &'a str,
    /// The interface that it came in on.
    pub iif: Option<&'a str>,
    /// The interface that it leaves by.
    pub oif: Option<&'a str>,
    /// Its source.
    pub from: IpAddr,
    /// Its destination.
    pub to: IpAddr,
    /// `tcp` or `udp`.
    pub protocol: &'a str,
    /// The service's port.
    pub port: u16,
    /// Whether the port is the packet's source port.
    pub answer: bool,
    /// Its mark.
    pub mark: u32,
}

impl Named {
    fn covers(&self, name: Option<&str>) -> bool {
        let Some(name) = name else {
            // no interface at all has another name
            return self.inverted;
        };
        let same = match self.name.strip_suffix(['+', '*']) {
            Some(start) => name.starts_with(start),
            None => self.name == name,
        };
        same != self.inverted
    }
}

impl Prefix {
    fn covers(self, ip: IpAddr) -> bool {
        self.net.contains(&ip) != self.inverted
    }
}

impl Matches {
    /// Whether nothing that is known here keeps the line from matching the packet.
    pub fn may_match(&self, packet: &Packet<'_>) -> bool {
        self.may_match_from(packet, Some(packet.from))
    }

    /// The same whatever the packet's source.
    fn may_match_from(&self, packet: &Packet<'_>, from: Option<IpAddr>) -> bool {
        let Self {
            iif,
            oif,
            source,
            destination,
            protocol,
            sport,
            dport,
            mark,
            beyond: _,
        } = self;
        let within = |range: &(u16, u16)| (range.0..=range.1).contains(&packet.port);
        iif.as_ref().is_none_or(|iif| iif.covers(packet.iif))
            && oif.as_ref().is_none_or(|oif| oif.covers(packet.oif))
            && from.is_none_or(|from| source.is_none_or(|source| source.covers(from)))
            && destination.is_none_or(|to| to.covers(packet.to))
            && protocol
                .as_deref()
                .is_none_or(|name| name == packet.protocol)
            && sport
                .as_ref()
                .is_none_or(|range| !packet.answer || within(range))
            && dport
                .as_ref()
                .is_none_or(|range| packet.answer || within(range))
            && mark.is_none_or(|(value, mask, inverted)| {
                (packet.mark & mask == value & mask) != inverted
            })
    }
}

impl FilterRule {
    /// Whether packets of a family come by.
    pub fn serves(&self, family: Family) -> bool {
        match self.at.family.as_str() {
            "ip" => family == Family::V4,
            "ip6" => family == Family::V6,
            _ => true,
        }
    }

    /// Whether the line may do what it does to the packet.
    pub fn may_meet(&self, packet: &Packet<'_>) -> bool {
        self.serves(Family::of(packet.to))
            && self.at.bases.iter().any(|base| base.hook == packet.hook)
            && self.matches.may_match(packet)
    }

    /// The clients that the line singles out of those who send such a packet: wide prefixes only, because
    /// a single address is a ban, which is meant.
    pub fn singles_out(&self, packet: &Packet<'_>) -> Option<IpNet> {
        let source = self.matches.source.filter(|source| !source.inverted)?;
        let wide = match Family::of(packet.to) {
            Family::V4 => 16,
            Family::V6 => 48,
        };
        let meets = self.action == Action::Drop
            && source.net.prefix_len() <= wide
            && Family::of(source.net.addr()) == Family::of(packet.to)
            && self.serves(Family::of(packet.to))
            && self.at.bases.iter().any(|base| base.hook == packet.hook)
            && self.matches.may_match_from(packet, None);
        meets.then_some(source.net)
    }

    /// How many packets it met while the probes ran.
    pub fn met(&self) -> Option<u64> {
        self.packets
            .map(|(before, after)| after.saturating_sub(before))
    }

    /// Table and chain, as a person finds them.
    pub fn place(&self) -> String {
        let At {
            program,
            family,
            table,
            chain,
            ..
        } = &self.at;
        if program == "nft" {
            format!("nft {family} {table} {chain}")
        } else {
            format!("{program} -t {table} {chain}")
        }
    }
}

/// Two readings of the same firewalls: the first one's counts beside the second one's.
pub fn joined(before: &[FilterRule], after: Vec<FilterRule>) -> Vec<FilterRule> {
    after
        .into_iter()
        .enumerate()
        .map(|(at, mut rule)| {
            let same = |old: &&FilterRule| old.at == rule.at && old.text == rule.text;
            // nothing changes between the two but now and then: then the line is looked for
            let old = before
                .get(at)
                .filter(same)
                .or_else(|| before.iter().find(same));
            if let (Some((_, now)), Some(old)) = (rule.packets, old) {
                rule.packets = Some((old.packets.map_or(0, |(_, then)| then), now));
            }
            rule
        })
        .collect()
}

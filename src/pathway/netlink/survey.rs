//! What a diagnosis asks of the kernel's routing beyond what a plan needs: every rule with all of its
//! selectors, whoever made it, and how one particular packet would be routed.
//!
//! Must not know: which rules are wanted.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_DUMP};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use serde::{Deserialize, Serialize};

use super::{Error, Netlink, address_family, short_table};
use crate::model::Family;

/// A rule as the kernel lists it, of whatever kind.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenRule {
    /// The family.
    pub family: Family,
    /// Where it stands.
    pub priority: u32,
    /// Which packets it is for.
    pub selector: Selector,
    /// The table that it looks up; none where it does something else (blackhole, goto …).
    pub table: Option<u32>,
    /// What it does, in the words of `ip rule`.
    pub action: String,
    /// Routes with a prefix of at most this length do not count (`suppress_prefixlength`).
    pub suppress: Option<u32>,
    /// Who made it.
    pub protocol: u8,
}

/// Which packets a rule is for; what is `None` does not restrict.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selector {
    /// Packets that do *not* match the rest.
    pub inverted: bool,
    /// `from`.
    pub from: Option<IpNet>,
    /// `to`.
    pub to: Option<IpNet>,
    /// `fwmark`: value and mask.
    pub mark: Option<(u32, u32)>,
    /// `iif`.
    pub iif: Option<String>,
    /// Selectors beyond these, in the words of `ip rule`; whether they match is not known here.
    pub beyond: Vec<String>,
}

impl Selector {
    /// Whether a packet matches; `None` where that depends on what is not known here.
    pub fn matches(&self, from: IpAddr, to: IpAddr, mark: u32, iif: &str) -> Option<bool> {
        let within = |prefix: Option<IpNet>, ip: IpAddr| prefix.is_none_or(|net| net.contains(&ip));
        let known = within(self.from, from)
            && within(self.to, to)
            && self
                .mark
                .is_none_or(|(value, mask)| mark & mask == value & mask)
            && self.iif.as_deref().is_none_or(|name| name == iif);
        match (known, self.beyond.is_empty()) {
            (true, false) => None,
            (known, _) => Some(known != self.inverted),
        }
    }
}

impl SeenRule {
    /// The words behind `ip rule add`, at some priority.
    pub fn words(&self, priority: u32) -> String {
        let mut words = String::new();
        if self.selector.inverted {
            words.push_str("not ");
        }
        words.push_str(&match self.selector.from {
            Some(from) => format!("from {from}"),
            None => "from all".to_owned(),
        });
        if let Some(to) = self.selector.to {
            words.push_str(&format!(" to {to}"));
        }
        match self.selector.mark {
            Some((value, u32::MAX)) => words.push_str(&format!(" fwmark {value:#x}")),
            Some((value, mask)) => words.push_str(&format!(" fwmark {value:#x}/{mask:#x}")),
            None => {}
        }
        if let Some(iif) = &self.selector.iif {
            words.push_str(&format!(" iif {iif}"));
        }
        for word in &self.selector.beyond {
            words.push_str(&format!(" {word}"));
        }
        words.push_str(&format!(" priority {priority} {}", self.action));
        if let Some(length) = self.suppress {
            words.push_str(&format!(" suppress_prefixlength {length}"));
        }
        words
    }
}

/// One packet, to be routed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question {
    /// Where it goes.
    pub to: IpAddr,
    /// Where it comes from.
    pub from: Option<IpAddr>,
    /// Its mark; 0 for none.
    pub mark: u32,
    /// The interface that it came in on; none for the host's own.
    pub iif: Option<u32>,
}

/// How it would be routed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answered {
    /// `local`, `unicast`, `blackhole` …; none where there is no route.
    pub kind: Option<String>,
    /// The table of the route.
    pub table: Option<u32>,
    /// The interface that it leaves by.
    pub dev: Option<String>,
    /// The router in between.
    pub gateway: Option<IpAddr>,
    /// The source that the kernel would choose.
    pub source: Option<IpAddr>,
    /// Why there is none.
    pub error: Option<i32>,
}

impl Answered {
    /// Whether it is delivered to this host.
    pub fn is_local(&self) -> bool {
        self.kind.as_deref() == Some("local")
    }
}

impl std::fmt::Display for Answered {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (&self.kind, self.error) {
            (Some(kind), _) => {
                f.write_str(kind)?;
                if let Some(gateway) = self.gateway {
                    write!(f, " via {gateway}")?;
                }
                if let Some(dev) = &self.dev {
                    write!(f, " dev {dev}")?;
                }
                match self.table {
                    Some(table) => write!(f, " table {table}"),
                    None => Ok(()),
                }
            }
            (None, Some(errno)) => io::Error::from_raw_os_error(errno).fmt(f),
            (None, None) => f.write_str("no answer"),
        }
    }
}

impl Netlink {
    /// Every rule of a family, first to last.
    ///
    /// # Errors
    /// As [`Netlink::rules`].
    pub async fn seen_rules(&self, family: Family) -> Result<Vec<SeenRule>, Error> {
        let mut request = RuleMessage::default();
        request.header.family = address_family(family);
        let operation = || format!("list the {family} rules");
        let request = RouteNetlinkMessage::GetRule(request);
        let mut rules: Vec<_> = self
            .ask(&operation, request, NLM_F_DUMP)
            .await?
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewRule(message) => Some(seen(family, &message)),
                _ => None,
            })
            .collect();
        rules.sort_by_key(|rule| rule.priority);
        Ok(rules)
    }

    /// The destinations of a table's routes; the default route is `0.0.0.0/0` or `::/0`.
    ///
    /// # Errors
    /// As [`Netlink::routes`].
    pub async fn destinations(&self, family: Family, table: u32) -> Result<Vec<IpNet>, Error> {
        let mut request = RouteMessage::default();
        request.header.address_family = address_family(family);
        request.header.table = short_table(table);
        request.attributes.push(RouteAttribute::Table(table));
        let operation = || format!("list the {family} routes of table {table}");
        let request = RouteNetlinkMessage::GetRoute(request);
        let messages = match self.ask(&operation, request, NLM_F_DUMP).await {
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(Vec::new()),
            answer => answer?,
        };
        Ok(messages
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewRoute(message) => destination(family, &message),
                _ => None,
            })
            .collect())
    }

    /// How the kernel would route a packet.
    ///
    /// # Errors
    /// See [`Error`]; "no route" is an answer.
    pub async fn route(&self, question: Question) -> Result<Answered, Error> {
        let Question {
            to,
            from,
            mark,
            iif,
        } = question;
        let family = Family::of(to);
        let mut request = RouteMessage::default();
        request.header.address_family = address_family(family);
        request.header.destination_prefix_length = IpNet::from(to).prefix_len();
        if family == Family::V4 {
            // else IPv4 answers with table 254; IPv6 tells anyway, and refuses the flag
            request.header.flags = RouteFlags::LookupTable;
        }
        let attributes = &mut request.attributes;
        attributes.push(RouteAttribute::Destination(address(to)));
        if let Some(from) = from {
            request.header.source_prefix_length = IpNet::from(from).prefix_len();
            attributes.push(RouteAttribute::Source(address(from)));
        }
        if mark != 0 {
            attributes.push(RouteAttribute::Mark(mark));
        }
        attributes.extend(iif.map(RouteAttribute::Iif));
        let operation = || format!("look up the route to {to}");
        let request = RouteNetlinkMessage::GetRoute(request);
        let messages = match self.ask(&operation, request, NLM_F_ACK).await {
            Ok(messages) => messages,
            Err(Error::Refused { source, .. }) => {
                return Ok(Answered {
                    error: source.raw_os_error(),
                    ..Answered::default()
                });
            }
            Err(error) => return Err(error),
        };
        let answer = messages.into_iter().find_map(|message| match message {
            RouteNetlinkMessage::NewRoute(message) => Some(answered(&message)),
            _ => None,
        });
        Ok(answer.unwrap_or_default())
    }
}

fn address(ip: IpAddr) -> RouteAddress {
    match ip {
        IpAddr::V4(ip) => RouteAddress::Inet(ip),
        IpAddr::V6(ip) => RouteAddress::Inet6(ip),
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

fn any(family: Family) -> IpAddr {
    match family {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

fn destination(family: Family, message: &RouteMessage) -> Option<IpNet> {
    let to = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(to) => ip(to),
            _ => None,
        });
    let length = message.header.destination_prefix_length;
    IpNet::new(to.unwrap_or(any(family)), length).ok()
}

fn answered(message: &RouteMessage) -> Answered {
    let mut answer = Answered {
        kind: Some(match message.header.kind {
            RouteType::Local => "local".to_owned(),
            RouteType::Unicast => "unicast".to_owned(),
            other => format!("{other:?}").to_lowercase(),
        }),
        table: Some(u32::from(message.header.table)),
        ..Answered::default()
    };
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(table) => answer.table = Some(*table),
            RouteAttribute::Oif(index) => {
                let name = nix::net::if_::if_indextoname(*index).ok();
                answer.dev = name.map(|name| name.to_string_lossy().into_owned());
            }
            RouteAttribute::Gateway(via) => answer.gateway = ip(via),
            RouteAttribute::PrefSource(source) => answer.source = ip(source),
            _ => {}
        }
    }
    answer
}

fn seen(family: Family, message: &RuleMessage) -> SeenRule {
    let header = &message.header;
    let mut rule = SeenRule {
        family,
        priority: 0,
        selector: Selector {
            inverted: header.flags.contains(RuleFlags::Invert),
            ..Selector::default()
        },
        table: None,
        action: String::new(),
        suppress: None,
        protocol: 0,
    };
    let (mut mark, mut mask, mut table) = (None, None, u32::from(header.table));
    let mut goto = None;
    let selector = &mut rule.selector;
    if header.tos != 0 {
        selector.beyond.push(format!("tos {:#x}", header.tos));
    }
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(value) => rule.priority = *value,
            RuleAttribute::Protocol(value) => rule.protocol = u8::from(*value),
            RuleAttribute::Table(value) => table = *value,
            RuleAttribute::Source(ip) => selector.from = IpNet::new(*ip, header.src_len).ok(),
            RuleAttribute::Destination(ip) => selector.to = IpNet::new(*ip, header.dst_len).ok(),
            RuleAttribute::Iifname(name) => selector.iif = Some(name.clone()),
            RuleAttribute::Oifname(name) => selector.beyond.push(format!("oif {name}")),
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = Some(*value),
            RuleAttribute::Goto(value) => goto = Some(*value),
            RuleAttribute::SuppressPrefixLen(u32::MAX)
            | RuleAttribute::SuppressIfGroup(u32::MAX) => {}
            RuleAttribute::SuppressPrefixLen(length) => rule.suppress = Some(*length),
            RuleAttribute::UidRange(range) => {
                selector
                    .beyond
                    .push(format!("uidrange {}-{}", range.start, range.end));
            }
            RuleAttribute::IpProtocol(protocol) => {
                // as a number, which `ip` takes wherever it knows no names
                let number = i32::from(*protocol);
                selector.beyond.push(format!("ipproto {number}"));
            }
            RuleAttribute::SourcePortRange(range) => {
                selector
                    .beyond
                    .push(format!("sport {}-{}", range.start, range.end));
            }
            RuleAttribute::DestinationPortRange(range) => {
                selector
                    .beyond
                    .push(format!("dport {}-{}", range.start, range.end));
            }
            RuleAttribute::L3MDev(true) => selector.beyond.push("l3mdev".to_owned()),
            _ => {}
        }
    }
    if mark.is_some() || mask.is_some() {
        selector.mark = Some((mark.unwrap_or(0), mask.unwrap_or(u32::MAX)));
    }
    rule.action = match header.action {
        RuleAction::ToTable => {
            rule.table = Some(table);
            match table {
                255 => "lookup local".to_owned(),
                254 => "lookup main".to_owned(),
                253 => "lookup default".to_owned(),
                table => format!("lookup {table}"),
            }
        }
        RuleAction::Goto => format!("goto {}", goto.unwrap_or(0)),
        RuleAction::Nop => "nop".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    };
    rule
}

//! Rules and routes through rtnetlink: dump, add, delete, look up.
//!
//! Every request is a raw message that insists on the kernel's answer: the builders of the crate
//! cannot say mask and owner, and their `execute` takes a lost connection for success. Must not know:
//! what is wanted.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures_util::StreamExt;
use ipnet::IpNet;
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::IpProtocol;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use tokio::task::JoinHandle;

use crate::model::Family;

use super::piece::{FoundRoute, Leads, PROTOCOL, Route, Rule};

mod survey;

pub use survey::{Answered, Question, SeenRule, Selector};

/// How long the kernel may take for one answer; it takes microseconds, unless the message was lost.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);

/// How often a dump is begun again that changed under way.
const DUMP_TRIES: usize = 20;

/// `RT_TABLE_COMPAT`: what the header's eight bits hold for a table above 255.
const TABLE_ABOVE_255: u8 = 252;

/// `lo` has index 1 in every network namespace.
const LO: u32 = 1;

/// `IP6_RT_PRIO_USER`, the metric of an IPv6 route that says none.
const V6_METRIC: u32 = 1024;

/// Why the kernel's routing could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No netlink socket.
    #[error("cannot open a netlink socket")]
    Open(#[source] io::Error),
    /// The kernel refused.
    #[error("the kernel refused to {operation}")]
    Refused {
        /// What was asked for.
        operation: String,
        /// Its errno.
        #[source]
        source: io::Error,
    },
    /// The netlink connection ended before the answer.
    #[error("lost the netlink connection while trying to {operation}")]
    Lost {
        /// What was asked for.
        operation: String,
    },
    /// No answer in time.
    #[error("no answer from the kernel within {ANSWER_LIMIT:?} to {operation}")]
    Timeout {
        /// What was asked for.
        operation: String,
    },
    /// The state kept changing while it was read.
    #[error("the kernel's state changed {DUMP_TRIES} times while trying to {operation}")]
    Unsteady {
        /// What was asked for.
        operation: String,
    },
}

impl Error {
    /// The errno, where the kernel gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } | Self::Open(source) => source.raw_os_error(),
            _ => None,
        }
    }
}

/// One answer of the kernel, complete.
enum Answer {
    Complete(Vec<RouteNetlinkMessage>),
    /// The dump is not of one moment (`NLM_F_DUMP_INTR`), or messages were dropped.
    Interrupted,
}

/// A connection of its own for requests. Its task ends with the value.
#[derive(Debug)]
pub struct Netlink {
    handle: Handle,
    task: JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The rules of one family.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    /// Those that [`Rule`] can express.
    pub plain: Vec<Rule>,
    /// The tables that all others look up.
    pub other_lookups: Vec<u32>,
}

/// How an address is reached by a packet without mark and source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lookup {
    /// It is this host's own.
    Local,
    /// Through the interface with this index.
    Via(Option<u32>),
    /// A route forbids it (blackhole, prohibit, throw to nowhere).
    Forbidden,
    /// No route.
    Unreachable,
}

impl Netlink {
    /// Opens a connection in the caller's network namespace. Needs a tokio runtime.
    ///
    /// # Errors
    /// [`Error::Open`].
    pub fn open() -> Result<Self, Error> {
        // strict checking makes the kernel honour a dump's filter instead of ignoring it
        let (mut connection, handle, _) =
            rtnetlink::new_connection_with_strict_check().map_err(Error::Open)?;
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        Ok(Self {
            handle,
            task: tokio::spawn(connection),
        })
    }

    /// Sends a request and returns only when the kernel has answered all of it.
    async fn ask(
        &self,
        operation: &dyn Fn() -> String,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, Error> {
        for _ in 0..DUMP_TRIES {
            let mut message = NetlinkMessage::from(request.clone());
            message.header.flags = NLM_F_REQUEST | flags;
            match tokio::time::timeout(ANSWER_LIMIT, self.answer(operation, message)).await {
                Ok(Ok(Answer::Complete(messages))) => return Ok(messages),
                Ok(Ok(Answer::Interrupted)) => {}
                Ok(Err(error)) => return Err(error),
                Err(_) => {
                    return Err(Error::Timeout {
                        operation: operation(),
                    });
                }
            }
        }
        Err(Error::Unsteady {
            operation: operation(),
        })
    }

    async fn answer(
        &self,
        operation: &dyn Fn() -> String,
        message: NetlinkMessage<RouteNetlinkMessage>,
    ) -> Result<Answer, Error> {
        let lost = || Error::Lost {
            operation: operation(),
        };
        let refused = |code: i32| Error::Refused {
            operation: operation(),
            source: io::Error::from_raw_os_error(code.saturating_abs()),
        };
        let mut answers = self.handle.clone().request(message).map_err(|_| lost())?;
        let mut messages = Vec::new();
        let mut interrupted = false;
        while let Some(answer) = answers.next().await {
            interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => messages.push(message),
                NetlinkPayload::Error(error) if error.code.is_some() => {
                    return Err(refused(error.raw_code()));
                }
                NetlinkPayload::Done(done) if done.code < 0 => return Err(refused(done.code)),
                NetlinkPayload::Overrun(_) => return Ok(Answer::Interrupted),
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) if interrupted => {
                    return Ok(Answer::Interrupted);
                }
                NetlinkPayload::Error(_) | NetlinkPayload::Done(_) => {
                    return Ok(Answer::Complete(messages));
                }
                _ => {}
            }
        }
        Err(lost())
    }

    /// Every rule of a family.
    ///
    /// # Errors
    /// See [`Error`]; a family that the kernel lacks is refused with `EAFNOSUPPORT` or `EOPNOTSUPP`.
    pub async fn rules(&self, family: Family) -> Result<Rules, Error> {
        let mut request = RuleMessage::default();
        request.header.family = address_family(family);
        let operation = || format!("list the {family} rules");
        let request = RouteNetlinkMessage::GetRule(request);
        let mut rules = Rules::default();
        for message in self.ask(&operation, request, NLM_F_DUMP).await? {
            let RouteNetlinkMessage::NewRule(message) = message else {
                continue;
            };
            match found_rule(family, &message) {
                Ok(rule) => rules.plain.push(rule),
                Err(table) => rules.other_lookups.extend(table),
            }
        }
        Ok(rules)
    }

    /// Every route of a table, or of every table with one owner.
    ///
    /// # Errors
    /// See [`Error`]. A table that does not exist has no routes.
    pub async fn routes(&self, family: Family, of: RoutesOf) -> Result<Vec<FoundRoute>, Error> {
        let mut request = RouteMessage::default();
        request.header.address_family = address_family(family);
        match of {
            RoutesOf::Everyone => {}
            RoutesOf::Table(table) => {
                request.header.table = short_table(table);
                request.attributes.push(RouteAttribute::Table(table));
            }
            RoutesOf::Owner(protocol) => request.header.protocol = RouteProtocol::from(protocol),
        }
        let operation = || format!("list the {family} routes");
        let request = RouteNetlinkMessage::GetRoute(request);
        let messages = match self.ask(&operation, request, NLM_F_DUMP).await {
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(Vec::new()),
            answer => answer?,
        };
        Ok(messages
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewRoute(message) => Some(found_route(family, &message)),
                _ => None,
            })
            .collect())
    }

    /// How the kernel would route a packet to this address.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn lookup(&self, to: IpAddr) -> Result<Lookup, Error> {
        let mut request = RouteMessage::default();
        request.header.address_family = address_family(Family::of(to));
        // no flag: with strict checking IPv6 answers EINVAL to RTM_F_LOOKUP_TABLE
        request.header.destination_prefix_length = IpNet::from(to).prefix_len();
        request
            .attributes
            .push(RouteAttribute::Destination(match to {
                IpAddr::V4(to) => RouteAddress::Inet(to),
                IpAddr::V6(to) => RouteAddress::Inet6(to),
            }));
        let operation = || format!("look up the route to {to}");
        let request = RouteNetlinkMessage::GetRoute(request);
        let messages = match self.ask(&operation, request, NLM_F_ACK).await {
            Ok(messages) => messages,
            Err(error) => {
                return match error.errno() {
                    Some(libc::ENETUNREACH) => Ok(Lookup::Unreachable),
                    Some(libc::EINVAL | libc::EACCES | libc::EHOSTUNREACH) => Ok(Lookup::Forbidden),
                    _ => Err(error),
                };
            }
        };
        for message in messages {
            if let RouteNetlinkMessage::NewRoute(route) = message {
                return Ok(match route.header.kind {
                    RouteType::Local => Lookup::Local,
                    RouteType::Unicast => Lookup::Via(route.attributes.iter().find_map(
                        |attribute| match attribute {
                            RouteAttribute::Oif(index) => Some(*index),
                            _ => None,
                        },
                    )),
                    _ => Lookup::Forbidden,
                });
            }
        }
        Ok(Lookup::Unreachable)
    }

    /// Adds a rule. One that is there already, the same in everything, is left as it is.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn add_rule(&self, rule: &Rule) -> Result<(), Error> {
        let operation = || format!("add the {} rule {rule}", rule.family);
        let request = RouteNetlinkMessage::NewRule(rule_message(rule));
        // NLM_F_REPLACE would be ignored and add a second one
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        unless(libc::EEXIST, self.ask(&operation, request, flags).await)
    }

    /// Deletes a rule. One that is gone already is no error.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn del_rule(&self, rule: &Rule) -> Result<(), Error> {
        let operation = || format!("delete the {} rule {rule}", rule.family);
        // every attribute is sent: the kernel deletes the first rule that fits what it is told
        let request = RouteNetlinkMessage::DelRule(rule_message(rule));
        unless(libc::ENOENT, self.ask(&operation, request, NLM_F_ACK).await)
    }

    /// Adds a route where there is none; an existing one is refused, whoever owns it.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn add_route(&self, route: &Route) -> Result<(), Error> {
        let operation = || format!("add the {} route {route}", route.family);
        let request = RouteNetlinkMessage::NewRoute(route_message(route));
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        self.ask(&operation, request, flags).await.map(|_| ())
    }

    /// Puts a route in the place of the one that is there, in one step.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn replace_route(&self, route: &Route) -> Result<(), Error> {
        let operation = || format!("replace the {} route {route}", route.family);
        let request = RouteNetlinkMessage::NewRoute(route_message(route));
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
        self.ask(&operation, request, flags).await.map(|_| ())
    }

    /// Deletes a route. One that is gone already is no error.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn del_route(&self, route: &Route) -> Result<(), Error> {
        let operation = || format!("delete the {} route {route}", route.family);
        let request = RouteNetlinkMessage::DelRoute(route_message(route));
        unless(libc::ESRCH, self.ask(&operation, request, NLM_F_ACK).await)
    }
}

/// Which routes are listed. The kernel filters, so that a router's full table is not copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RoutesOf {
    /// All tables.
    Everyone,
    /// One table.
    Table(u32),
    /// All tables, routes with this protocol only.
    Owner(u8),
}

fn unless(errno: i32, answer: Result<Vec<RouteNetlinkMessage>, Error>) -> Result<(), Error> {
    match answer {
        Err(error) if error.errno() != Some(errno) => Err(error),
        _ => Ok(()),
    }
}

fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn short_table(table: u32) -> u8 {
    u8::try_from(table).unwrap_or(TABLE_ABOVE_255)
}

fn rule_message(rule: &Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = address_family(rule.family);
    message.header.src_len = rule.source.prefix_len();
    message.attributes = vec![
        RuleAttribute::Priority(rule.priority),
        RuleAttribute::Source(rule.source.addr()),
        RuleAttribute::Protocol(RouteProtocol::from(rule.protocol)),
    ];
    // the default, Unspec, is accepted and then fails every look-up that matches
    message.header.action = match rule.leads {
        Leads::Table(table) => {
            message.header.table = short_table(table);
            message.attributes.push(RuleAttribute::Table(table));
            RuleAction::ToTable
        }
        Leads::Past(priority) => {
            message.attributes.push(RuleAttribute::Goto(priority));
            RuleAction::Goto
        }
        Leads::On => RuleAction::Nop,
    };
    if let Some(to) = rule.to {
        message.header.dst_len = to.prefix_len();
        message
            .attributes
            .push(RuleAttribute::Destination(to.addr()));
    }
    if let Some((mark, mask)) = rule.mark {
        message.attributes.push(RuleAttribute::FwMark(mark));
        message.attributes.push(RuleAttribute::FwMask(mask));
    }
    if rule.iif_lo {
        message
            .attributes
            .push(RuleAttribute::Iifname("lo".to_owned()));
    }
    if rule.icmp {
        message
            .attributes
            .push(RuleAttribute::IpProtocol(icmp(rule.family)));
    }
    message
}

/// `IPPROTO_ICMP` or `IPPROTO_ICMPV6`.
fn icmp(family: Family) -> IpProtocol {
    match family {
        Family::V4 => IpProtocol::Icmp,
        Family::V6 => IpProtocol::from(libc::IPPROTO_ICMPV6),
    }
}

/// The rule in canonical form, or the table it looks up where it is beyond that form.
pub(super) fn found_rule(family: Family, message: &RuleMessage) -> Result<Rule, Option<u32>> {
    let header = &message.header;
    let table = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RuleAttribute::Table(table) => Some(*table),
            _ => None,
        })
        .unwrap_or(u32::from(header.table));
    let mut goto = None;
    let other = Err((header.action == RuleAction::ToTable).then_some(table));
    // the flags say "not" or that an interface is missing; the latter does not change what is meant
    if header.tos != 0 || header.flags.contains(RuleFlags::Invert) {
        return other;
    }
    let any = match family {
        Family::V4 => IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
        Family::V6 => IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
    };
    let (mut priority, mut protocol, mut source, mut iif_lo) = (0, 0, any, false);
    let (mut mark, mut mask, mut to, mut is_icmp) = (None, None, None, false);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(value) => priority = *value,
            RuleAttribute::Protocol(value) => protocol = u8::from(*value),
            RuleAttribute::Source(value) => source = *value,
            RuleAttribute::Destination(value) => to = IpNet::new(*value, header.dst_len).ok(),
            RuleAttribute::Iifname(name) if name == "lo" => iif_lo = true,
            RuleAttribute::FwMark(value) => mark = Some(*value),
            RuleAttribute::FwMask(value) => mask = Some(*value),
            RuleAttribute::IpProtocol(value) if *value == icmp(family) => is_icmp = true,
            RuleAttribute::Goto(value) => goto = Some(*value),
            // always there, and all ones when the rule suppresses nothing
            RuleAttribute::SuppressPrefixLen(u32::MAX)
            | RuleAttribute::SuppressIfGroup(u32::MAX)
            | RuleAttribute::Table(_) => {}
            _ => return other,
        }
    }
    let Ok(source) = IpNet::new(source, header.src_len) else {
        return other;
    };
    let leads = match (header.action, goto) {
        (RuleAction::ToTable, None) => Leads::Table(table),
        (RuleAction::Goto, Some(priority)) => Leads::Past(priority),
        (RuleAction::Nop, None) => Leads::On,
        _ => return other,
    };
    // so much of a shape means something here only where it is our own
    let special =
        to.is_some() || header.dst_len != 0 || is_icmp || !matches!(leads, Leads::Table(_));
    if special && protocol != PROTOCOL {
        return other;
    }
    Ok(Rule {
        family,
        priority,
        source,
        to,
        mark: match (mark, mask) {
            (None, None) => None,
            (mark, mask) => Some((mark.unwrap_or(0), mask.unwrap_or(u32::MAX))),
        },
        iif_lo,
        icmp: is_icmp,
        leads,
        protocol,
    })
}

fn route_message(route: &Route) -> RouteMessage {
    // from the empty message, not from a builder's: its scope and type would make deletes miss
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(route.family);
    message.header.table = short_table(route.table);
    message.header.protocol = RouteProtocol::from(route.protocol);
    message.header.kind = RouteType::Local;
    message.attributes = vec![RouteAttribute::Table(route.table), RouteAttribute::Oif(LO)];
    match route.family {
        Family::V4 => message.header.scope = RouteScope::Host,
        Family::V6 => {
            message.header.scope = RouteScope::Universe;
            message.attributes.push(RouteAttribute::Priority(V6_METRIC));
        }
    }
    message
}

fn found_route(family: Family, message: &RouteMessage) -> FoundRoute {
    let header = &message.header;
    let mut table = u32::from(header.table);
    let mut metric = 0;
    let mut on_lo = false;
    let mut plain = true;
    let mut to = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(value) => table = *value,
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::Oif(index) => on_lo = *index == LO,
            RouteAttribute::Destination(RouteAddress::Inet(addr)) => to = Some(addr.to_string()),
            RouteAttribute::Destination(RouteAddress::Inet6(addr)) => to = Some(addr.to_string()),
            RouteAttribute::CacheInfo(_) | RouteAttribute::Preference(_) => {}
            _ => plain = false,
        }
    }
    let usual = match family {
        Family::V4 => metric == 0 && header.scope == RouteScope::Host,
        Family::V6 => metric == V6_METRIC,
    };
    let protocol = u8::from(header.protocol);
    let shape = header.kind == RouteType::Local
        && header.destination_prefix_length == 0
        && header.source_prefix_length == 0
        && header.tos == 0;
    if plain && usual && on_lo && shape {
        return FoundRoute::LocalDefault(Route {
            family,
            table,
            protocol,
        });
    }
    let kind = format!("{:?}", header.kind).to_lowercase();
    let to = match to {
        Some(to) => format!("{to}/{}", header.destination_prefix_length),
        None => "default".to_owned(),
    };
    FoundRoute::Other {
        family,
        table,
        text: format!("{kind} {to} metric {metric} proto {protocol}"),
    }
}

//! The pieces a pathway is made of, as values: one ip rule, one route, one CONNMARK line.
//!
//! Each has exactly one text form: the words that `ip` or `iptables` would take for it. Must not
//! know: which pieces are wanted, how they reach the kernel.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use serde::Serialize;

use crate::model::{Family, Mark, Mask};

/// Who made a rule or route (`FRA_PROTOCOL`, `rtm_protocol`): 177 is named in no `rt_protos` file.
pub const PROTOCOL: u8 = 177;

/// `RTPROT_UNSPEC` and `RTPROT_BOOT`: what `ip` gives a rule and a route that say nothing.
pub(crate) const UNTAGGED: [u8; 2] = [0, 3];

/// One ip rule that looks up a table, as the kernel stores it: no more selectors than these.
///
/// `source` keeps its host bits, because `127.0.0.1/8` and `127.0.0.0/8` are different rules to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Rule {
    /// The family.
    pub family: Family,
    /// Where it stands (`FRA_PRIORITY`).
    pub priority: u32,
    /// `from`.
    pub source: IpNet,
    /// Mark and mask; `None` matches every packet.
    pub mark: Option<(u32, u32)>,
    /// Whether only packets of this host's own match (`iif lo`).
    pub iif_lo: bool,
    /// The table that is looked up.
    pub table: u32,
    /// The owner, [`PROTOCOL`] for ours.
    pub protocol: u8,
}

impl Rule {
    /// Whether the tag says that this program made it.
    pub fn is_ours(&self) -> bool {
        self.protocol == PROTOCOL
    }

    /// Whether two rules send the same packets to the same table, wherever they stand and whoever
    /// made them. Masks count as the same when both look at every bit of the same mark.
    pub(crate) fn means(&self, other: &Self) -> bool {
        let marks = match (self.mark, other.mark) {
            (None, None) => true,
            (Some((mark, mask)), Some((wanted, wanted_mask))) => {
                mark == wanted && (mask == wanted_mask || mask == u32::MAX)
            }
            _ => false,
        };
        marks
            && self.family == other.family
            && self.source.trunc() == other.source.trunc()
            && self.iif_lo == other.iif_lo
            && self.table == other.table
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "priority {} from {}", self.priority, self.source)?;
        match self.mark {
            Some((mark, u32::MAX)) => write!(f, " fwmark {mark:#x}")?,
            Some((mark, mask)) => write!(f, " fwmark {mark:#x}/{mask:#x}")?,
            None => {}
        }
        if self.iif_lo {
            f.write_str(" iif lo")?;
        }
        write!(f, " lookup {} protocol {}", self.table, self.protocol)
    }
}

/// `local default dev lo` in a table: what every pathway's table holds, and nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Route {
    /// The family.
    pub family: Family,
    /// The table.
    pub table: u32,
    /// The owner, [`PROTOCOL`] for ours. No part of a route's identity to the kernel.
    pub protocol: u8,
}

impl Route {
    /// Whether the tag says that this program made it.
    pub fn is_ours(&self) -> bool {
        self.protocol == PROTOCOL
    }
}

impl fmt::Display for Route {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "local default dev lo table {} proto {}",
            self.table, self.protocol
        )
    }
}

/// A route as found in a table of interest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FoundRoute {
    /// The shape of [`Route`], with the family's usual metric.
    LocalDefault(Route),
    /// Anything else.
    Other {
        /// The family.
        family: Family,
        /// The table.
        table: u32,
        /// What it is, for a message.
        text: String,
    },
}

/// A chain of the mangle table that holds lines of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Chain {
    /// `OUTPUT`: packets of this host's own, re-routed when the mark changes.
    Output,
    /// `PREROUTING`: packets that come in, before they are routed.
    Prerouting,
}

impl Chain {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Output, Self::Prerouting];

    /// Its name to iptables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Output => "OUTPUT",
            Self::Prerouting => "PREROUTING",
        }
    }
}

/// What a CONNMARK line does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Job {
    /// Packet mark → connection mark.
    Save,
    /// Connection mark → packet mark.
    Restore,
}

/// One CONNMARK line that is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Line {
    /// `iptables` or `ip6tables`.
    pub family: Family,
    /// Where it stands.
    pub chain: Chain,
    /// What it does.
    pub job: Job,
    /// The pathway's mark.
    pub mark: Mark,
    /// The pathway's mask.
    pub mask: Mask,
}

/// What begins the comment that tags a line as ours; the mark follows in decimal.
pub(crate) const COMMENT: &str = "mmproxyctl:";

/// What iptables-nft had to make for the first line of ours, and what goes with the last one.
///
/// The lines' own tags remember it: nothing else lives exactly as long as they do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Made {
    /// The base chain.
    Chain,
    /// The base chain and the table.
    Table,
}

impl Made {
    /// How a tag says it.
    pub fn tag(self) -> &'static str {
        match self {
            Self::Chain => "made-chain",
            Self::Table => "made-table",
        }
    }

    /// The reverse of [`Made::tag`].
    pub fn from_tag(text: &str) -> Option<Self> {
        [Self::Chain, Self::Table]
            .into_iter()
            .find(|made| made.tag() == text)
    }
}

impl Line {
    /// The words behind `-A CHAIN`, with what the tag shall remember.
    pub fn words(&self, made: Option<Made>) -> String {
        let words = self.to_string();
        match made {
            Some(made) => {
                let tag = format!("{COMMENT}{}", self.mark);
                words.replacen(&tag, &format!("{tag}:{}", made.tag()), 1)
            }
            None => words,
        }
    }
}

impl fmt::Display for Line {
    /// The words behind `-A CHAIN`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mark, mask) = (self.mark.get(), self.mask.get());
        let (matcher, action) = match self.job {
            Job::Save => ("mark", "save"),
            Job::Restore => ("connmark", "restore"),
        };
        write!(
            f,
            "-m {matcher} --mark {mark:#x}/{mask:#x} -m comment --comment {COMMENT}{mark} \
             -j CONNMARK --{action}-mark --nfmask {mask:#x} --ctmask {mask:#x}"
        )
    }
}

/// A program that reads and writes one family's mangle table, by the name it is called with.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Program(pub Arc<str>);

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One change of the kernel. Its text is the equivalent command; it is all that undoing needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Adds a rule.
    AddRule(Rule),
    /// Deletes a rule, matched by all it has.
    DelRule(Rule),
    /// Adds a route; fails where one is there.
    AddRoute(Route),
    /// Makes a route that is there ours, in one step; `from` is the owner it had.
    AdoptRoute {
        /// The route as ours.
        route: Route,
        /// The protocol it had.
        from: u8,
    },
    /// Deletes a route.
    DelRoute(Route),
    /// Inserts a line into a chain.
    InsertLine(LineStep),
    /// Deletes the first line with these words.
    DelLine(LineStep),
    /// Deletes the base chain that the first line had made, if it is empty.
    DropChain {
        /// Who made it.
        program: Program,
        /// Its family.
        family: Family,
        /// The chain.
        chain: Chain,
    },
    /// Deletes the mangle table that the first line had made, if it is empty.
    DropTable {
        /// Its family.
        family: Family,
    },
}

/// A line and its place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineStep {
    /// Who does it.
    pub program: Program,
    /// The chain.
    pub chain: Chain,
    /// The line's number in the chain, from 1, at the time of the step.
    pub position: usize,
    /// The words behind `-A CHAIN`.
    pub words: String,
    /// The family.
    pub family: Family,
    /// What comes or goes with the line.
    pub made: Option<Made>,
}

impl Step {
    /// The steps that take this one back. A dropped chain comes back with its next line.
    pub fn inverse(&self) -> Option<Self> {
        Some(match self {
            Self::AddRule(rule) => Self::DelRule(*rule),
            Self::DelRule(rule) => Self::AddRule(*rule),
            Self::AddRoute(route) => Self::DelRoute(*route),
            Self::DelRoute(route) => Self::AddRoute(*route),
            Self::AdoptRoute { route, from } => Self::AdoptRoute {
                route: Route {
                    protocol: *from,
                    ..*route
                },
                from: route.protocol,
            },
            Self::InsertLine(line) => Self::DelLine(line.clone()),
            Self::DelLine(line) => Self::InsertLine(line.clone()),
            Self::DropChain { .. } | Self::DropTable { .. } => return None,
        })
    }
}

/// `ip` or `ip -6`.
fn ip(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip -6",
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AddRule(rule) => write!(f, "{} rule add {rule}", ip(rule.family)),
            Self::DelRule(rule) => write!(f, "{} rule del {rule}", ip(rule.family)),
            Self::AddRoute(route) => write!(f, "{} route add {route}", ip(route.family)),
            Self::AdoptRoute { route, .. } => {
                write!(f, "{} route replace {route}", ip(route.family))
            }
            Self::DelRoute(route) => write!(f, "{} route del {route}", ip(route.family)),
            Self::InsertLine(line) => write!(
                f,
                "{} -t mangle -I {} {} {}",
                line.program,
                line.chain.name(),
                line.position,
                line.words
            ),
            Self::DelLine(line) => write!(
                f,
                "{} -t mangle -D {} {}",
                line.program,
                line.chain.name(),
                line.words
            ),
            Self::DropChain { program, chain, .. } => {
                write!(f, "{program} -t mangle -X {}", chain.name())
            }
            Self::DropTable { family } => {
                let family = match family {
                    Family::V4 => "ip",
                    Family::V6 => "ip6",
                };
                write!(f, "nft delete table {family} mangle")
            }
        }
    }
}

impl Serialize for Step {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// 127.0.0.0/8 or ::1, the source of every pathway's loopback rules.
pub(crate) fn loopback(family: Family) -> IpNet {
    let (addr, len) = match family {
        Family::V4 => (IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)), 8),
        Family::V6 => (IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
    };
    // both lengths are valid for their family, so the host prefix is never taken
    IpNet::new(addr, len).unwrap_or_else(|_| IpNet::from(addr))
}

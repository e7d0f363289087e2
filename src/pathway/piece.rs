//! The pieces a pathway is made of, as values: one ip rule, one route, one CONNMARK line.
//!
//! Each has exactly one text form: the words that `ip` or `iptables` would take for it. Must not
//! know: which pieces are wanted, how they reach the kernel.

mod line;
mod step;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use crate::model::Family;

pub(crate) use line::COMMENT;
pub use line::{Chain, Job, Line, Made, Program};
pub(crate) use step::SWITCH;
pub use step::{EntriesStep, LineStep, Step, Swap, SwitchStep};

/// Who made a rule or route (`FRA_PROTOCOL`, `rtm_protocol`): 177 is named in no `rt_protos` file.
pub const PROTOCOL: u8 = 177;

/// `RTPROT_UNSPEC` and `RTPROT_BOOT`: what `ip` gives a rule and a route that say nothing.
pub(crate) const UNTAGGED: [u8; 2] = [0, 3];

/// One ip rule as the kernel stores it: no more selectors than these, and no other actions.
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
    /// `to`; `None` matches every destination.
    pub to: Option<IpNet>,
    /// Mark and mask; `None` matches every packet.
    pub mark: Option<(u32, u32)>,
    /// Whether only packets of this host's own match (`iif lo`).
    pub iif_lo: bool,
    /// Whether only the family's ICMP matches (`ipproto`).
    pub icmp: bool,
    /// Where it leads.
    pub leads: Leads,
    /// The owner, [`PROTOCOL`] for ours.
    pub protocol: u8,
}

/// Where a rule leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Leads {
    /// Into a table (`lookup`); where that has no route, on to the next rule.
    Table(u32),
    /// To the first rule with this priority, which is a later one (`goto`).
    Past(u32),
    /// On to the next rule, whatever matches (`nop`): somewhere to land for those that lead past others.
    On,
}

impl Rule {
    /// The table that is looked up.
    pub(crate) fn table(&self) -> Option<u32> {
        match self.leads {
            Leads::Table(table) => Some(table),
            Leads::Past(_) | Leads::On => None,
        }
    }

    /// Whether the tag says that this program made it.
    pub fn is_ours(&self) -> bool {
        self.protocol == PROTOCOL
    }

    /// The mark of the pathway that it is for, as far as it tells: what a rule with a destination matches is
    /// the same bit for all pathways.
    pub(crate) fn pathway_mark(&self) -> Option<u32> {
        let (mark, _) = self.mark.filter(|_| self.to.is_none())?;
        Some(mark)
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
            && self.to == other.to
            && self.iif_lo == other.iif_lo
            && self.icmp == other.icmp
            && self.leads == other.leads
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "priority {}", self.priority)?;
        match self.to {
            Some(to) if self.source.prefix_len() == 0 => write!(f, " to {to}")?,
            Some(to) => write!(f, " from {} to {to}", self.source)?,
            None if self.icmp && self.source.prefix_len() == 0 => {}
            None => write!(f, " from {}", self.source)?,
        }
        match self.mark {
            Some((mark, u32::MAX)) => write!(f, " fwmark {mark:#x}")?,
            Some((mark, mask)) => write!(f, " fwmark {mark:#x}/{mask:#x}")?,
            None => {}
        }
        if self.iif_lo {
            f.write_str(" iif lo")?;
        }
        if self.icmp {
            write!(f, " ipproto {}", icmp(self.family))?;
        }
        match self.leads {
            Leads::Table(table) => write!(f, " lookup {table}")?,
            Leads::Past(priority) => write!(f, " goto {priority}")?,
            Leads::On => f.write_str(" nop")?,
        }
        write!(f, " protocol {}", self.protocol)
    }
}

/// The family's ICMP, in the words of `ip rule`.
pub(crate) fn icmp(family: Family) -> &'static str {
    match family {
        Family::V4 => "icmp",
        Family::V6 => "ipv6-icmp",
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

/// Every address of a family.
pub(crate) fn anywhere(family: Family) -> IpNet {
    match family {
        Family::V4 => IpNet::V4(ipnet::Ipv4Net::default()),
        Family::V6 => IpNet::V6(ipnet::Ipv6Net::default()),
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

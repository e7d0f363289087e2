//! One change of the kernel as a value, and as the equivalent command.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use serde::Serialize;

use crate::model::{Family, Mark};
use crate::pathway::firewall::table::{self, Entry, Layout};

use super::{Chain, Made, Program, Route, Rule};

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
    /// Replaces `table inet mmproxy`.
    Entries(EntriesStep),
    /// Has accepted TCP connections take their mark from the client's packets (`tcp_fwmark_accept`).
    TakeSwitch(SwitchStep),
    /// Takes back [`Step::TakeSwitch`].
    LeaveSwitch(SwitchStep),
}

/// One pathway's part in a replacement of the table. The steps of one replacement are one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntriesStep {
    /// The pathway.
    pub mark: Mark,
    /// What comes or goes for it; nothing where only disorder goes.
    pub entries: Vec<Entry>,
    /// The table before and after, of all pathways.
    pub swap: Arc<Swap>,
    /// Whether the step takes the replacement back.
    pub back: bool,
    /// Whether it is the transaction's first, whose text is the whole of it.
    pub first: bool,
}

/// A table that takes another's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Swap {
    /// What it held.
    pub before: BTreeSet<Entry>,
    /// What it holds then.
    pub after: BTreeSet<Entry>,
    /// What of it can stay; `None` where it must go first.
    pub stays: Option<Layout>,
}

impl EntriesStep {
    /// What `nft -f -` is given for all the steps of the replacement.
    pub fn transaction(&self) -> String {
        let Swap {
            before,
            after,
            stays,
        } = &*self.swap;
        if self.back {
            table::transaction(before, Some(&Layout::of(after)))
        } else {
            table::transaction(after, stays.as_ref())
        }
    }
}

/// `net.ipv4.tcp_fwmark_accept`, which IPv6 obeys, too.
pub(crate) const SWITCH: &str = "net.ipv4.tcp_fwmark_accept";

/// One pathway's use of the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SwitchStep {
    /// The pathway.
    pub mark: Mark,
    /// Whether the switch itself changes: the first that needs it turns it on, the last turns it off.
    pub turns: bool,
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

impl LineStep {
    /// Whether the line hands packets to a listener.
    pub fn intercepts(&self) -> bool {
        self.words.contains(" -j TPROXY ")
    }
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
            Self::Entries(step) => Self::Entries(EntriesStep {
                back: !step.back,
                ..step.clone()
            }),
            Self::TakeSwitch(step) => Self::LeaveSwitch(*step),
            Self::LeaveSwitch(step) => Self::TakeSwitch(*step),
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
            // the lines behind # are for people: a shell, and nft, pass over them
            Self::Entries(step) if step.first => {
                write!(f, "nft -f - <<'END'\n{}END", step.transaction())
            }
            Self::Entries(step) => write!(f, "# mark {}: in the same transaction", step.mark),
            Self::TakeSwitch(step) if step.turns => write!(f, "sysctl -w {SWITCH}=1"),
            Self::LeaveSwitch(step) if step.turns => write!(f, "sysctl -w {SWITCH}=0"),
            Self::TakeSwitch(step) | Self::LeaveSwitch(step) => {
                write!(f, "# mark {}: {SWITCH} stays", step.mark)
            }
        }
    }
}

impl Serialize for Step {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

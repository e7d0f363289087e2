//! What forbids a plan: somebody else's property, or what the chosen back end cannot do.

use crate::model::{Interception, Mark, Pathway};
use crate::pathway::firewall::Backend;
use crate::pathway::firewall::table::Table;
use crate::pathway::piece::SWITCH;

use super::{Facts, Goal, Present, wants_lines, without};

/// A table that a pathway cannot have: every look-up of the pathway could meet the other's route first,
/// and taking the table over could break its owner.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "table {table} is not free for mark {mark}: it {why}; give the pathway another with table="
)]
pub struct TableTaken {
    /// The pathway.
    pub mark: Mark,
    /// Its table.
    pub table: u32,
    /// Whose it is, as the end of "it …".
    pub why: String,
}

/// Why nothing may be changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// The pathway's routing table is in use.
    #[error(transparent)]
    Table(#[from] TableTaken),
    /// Another program has a table of our name.
    #[error(
        "table inet mmproxy of nftables is another program's: it holds nothing with our tag; if nobody \
         needs it, 'nft delete table inet mmproxy', else choose --firewall iptables"
    )]
    ForeignTable {
        /// The first pathway that wants it.
        mark: Mark,
    },
    /// UDP without a firewall.
    #[error(
        "--firewall none serves TCP only, and mark {mark} has UDP ({instances}): a UDP service's answers \
         get their mark from connection tracking alone; choose iptables or nftables, or, if all targets \
         of the mark are on loopback, connmark=auto in pathways.conf"
    )]
    Udp {
        /// The pathway.
        mark: Mark,
        /// Its UDP instances.
        instances: String,
    },
    /// TPROXY without a firewall.
    #[error(
        "--firewall none cannot hand {interception} to a listener, as mark {mark} wants (listen=transparent): \
         choose iptables or nftables"
    )]
    Interception {
        /// The pathway.
        mark: Mark,
        /// The first of what it wants.
        interception: Interception,
    },
    /// A pathway's mark looks like that of packets that are handed to transparent listeners.
    #[error(
        "mark {mark} looks like that of packets for transparent listeners (listen=transparent): give that \
         pathway another mark"
    )]
    TransparentMark {
        /// The pathway.
        mark: Mark,
    },
    /// A target elsewhere without a firewall.
    #[error(
        "--firewall none serves this host's own addresses only, and {target}, a target of mark {mark}, is \
         none: what answers from elsewhere gets its mark from connection tracking alone; choose iptables \
         or nftables"
    )]
    Far {
        /// The pathway.
        mark: Mark,
        /// The target.
        target: String,
    },
    /// The switch is off and may not be touched.
    #[error(
        "mark {mark} needs {SWITCH}=1 with --firewall none, and it is 0; it concerns every TCP connection \
         of this host, so it is set only with --set-sysctls (and set back by 'pathway del')"
    )]
    Switch {
        /// The pathway.
        mark: Mark,
    },
    /// The kernel has no such switch.
    #[error("mark {mark} needs {SWITCH} with --firewall none, which this kernel does not have")]
    NoSwitch {
        /// The pathway.
        mark: Mark,
    },
}

impl Conflict {
    /// The pathway that is in its way.
    pub fn mark(&self) -> Mark {
        match self {
            Self::Table(taken) => taken.mark,
            Self::ForeignTable { mark }
            | Self::Udp { mark, .. }
            | Self::Far { mark, .. }
            | Self::Interception { mark, .. }
            | Self::TransparentMark { mark }
            | Self::Switch { mark }
            | Self::NoSwitch { mark } => *mark,
        }
    }
}

/// What the back end forbids or cannot do.
pub(super) fn with_firewall(
    goal: Goal,
    pathways: &[Pathway],
    facts: &Facts,
    present: &Present,
) -> Vec<Conflict> {
    if goal == Goal::Del {
        return Vec::new();
    }
    let of_us = pathways.iter().find(|pathway| {
        let mut listening = pathways.iter().filter(|one| !one.interceptions.is_empty());
        listening.any(|one| one.mask.takes_for_intercepted(pathway.mark))
    });
    if let Some(Pathway { mark, .. }) = of_us {
        return vec![Conflict::TransparentMark { mark: *mark }];
    }
    if facts.backend == Backend::None {
        return pathways
            .iter()
            .filter_map(|pathway| without::refusal(pathway, facts))
            .collect();
    }
    let foreign = matches!(
        present.firewall.nftables,
        Some(Table::Foreign | Table::Unreadable)
    );
    pathways
        .iter()
        .filter(|pathway| {
            facts.backend == Backend::Nftables
                && foreign
                && (wants_lines(pathway, facts) || !pathway.interceptions.is_empty())
        })
        .map(|pathway| Conflict::ForeignTable { mark: pathway.mark })
        .take(1)
        .collect()
}

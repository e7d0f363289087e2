//! A rule of our table in the words that nft takes.

use std::fmt;

use ipnet::IpNet;

use super::{Does, Marks};
use crate::model::{Interception, TRANSPARENT_MARK, prefix_text};

/// The packets of an interception, as nft selects them.
struct Packets(Interception);

impl fmt::Display for Packets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(Interception { protocol, listen }) = self;
        let family = nft_family(listen.network());
        // a network of one address is listed as the address
        let network = prefix_text(&listen.network());
        write!(f, "{family} daddr {network}")?;
        write!(f, " {protocol} dport {} iifname != \"lo\"", listen.ports())
    }
}

/// The elements of a map, in braces.
pub(super) fn elements<'a>(targets: impl IntoIterator<Item = (&'a u32, &'a String)>) -> String {
    let of = |(mark, name)| format!("{mark:#x} : jump {name}");
    let all: Vec<_> = targets.into_iter().map(of).collect();
    format!("{{ {} }}", all.join(", "))
}

pub(super) fn nft_family(network: IpNet) -> &'static str {
    match network {
        IpNet::V4(_) => "ip",
        IpNet::V6(_) => "ip6",
    }
}

impl fmt::Display for Does {
    /// The words that nft takes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dispatch { key, mask, to } => {
                write!(f, "{} & {mask:#x} vmap ", key.words())?;
                match to {
                    Marks::Map(name) => write!(f, "@{name}"),
                    Marks::Inline(targets) => write!(f, "{}", elements(targets)),
                }
            }
            Self::Set {
                key,
                keep: 0,
                value,
            } => write!(f, "{} set {value:#x}", key.words()),
            Self::Set { key, keep, value } => {
                let key = key.words();
                write!(f, "{key} set {key} & {keep:#x} | {value:#x}")
            }
            Self::Jump(name) => write!(f, "jump {name}"),
            Self::Intercept { what, mask } => {
                let (family, keep) = (nft_family(what.listen.network()), !mask);
                let socket = what.listen.socket();
                write!(f, "{} tproxy {family} to {socket} ", Packets(*what))?;
                match keep {
                    0 => write!(f, "meta mark set {TRANSPARENT_MARK:#x} accept"),
                    _ => write!(
                        f,
                        "meta mark set meta mark & {keep:#x} | {TRANSPARENT_MARK:#x} accept"
                    ),
                }
            }
            Self::Refuse(what) => write!(f, "{} drop", Packets(*what)),
            Self::Other => Ok(()),
        }
    }
}

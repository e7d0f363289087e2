//! One line of the mangle table as a value, and as the words that `iptables` takes for it.

use std::fmt;
use std::sync::Arc;

use crate::model::TRANSPARENT_MARK;
use crate::model::{Family, Interception, Mark, Mask, Pathway};

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

/// What a line does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Job {
    /// Packet mark → connection mark.
    Save,
    /// Connection mark → packet mark.
    Restore,
    /// Packets for these addresses → a transparent listener (TPROXY), marked so that they stay here.
    Intercept(Interception),
}

/// One line that is wanted.
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
    /// The bits that are looked at and written: the pathway's mask, with the bit that is set where packets
    /// are intercepted.
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
    /// The lines that a pathway's transparent listeners need in a family.
    pub fn interceptions(pathway: &Pathway, family: Family) -> impl Iterator<Item = Self> {
        let wanted = pathway.interceptions.iter();
        wanted
            .filter(move |one| one.listen.family() == family)
            .map(move |one| Self {
                family,
                chain: Chain::Prerouting,
                job: Job::Intercept(*one),
                mark: pathway.mark,
                mask: pathway.transparent_mask(),
            })
    }

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
            Job::Intercept(Interception { protocol, listen }) => {
                let (network, socket) = (listen.network(), listen.socket());
                write!(
                    f,
                    "-d {network} ! -i lo -p {protocol} -m {protocol} --dport "
                )?;
                write!(f, "{}", listen.ports().first())?;
                if listen.ports().count() > 1 {
                    write!(f, ":{}", listen.ports().last())?;
                }
                return write!(
                    f,
                    " -m comment --comment {COMMENT}{mark} -j TPROXY --on-port {} --on-ip {} \
                     --tproxy-mark {TRANSPARENT_MARK:#x}/{mask:#x}",
                    socket.port(),
                    socket.ip()
                );
            }
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
